/* SPDX-License-Identifier: MIT */
#include "sys.h"

#include "bench.h"
