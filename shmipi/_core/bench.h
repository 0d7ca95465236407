/* SPDX-License-Identifier: MIT */
/* Native loops that measure the full path. */
#ifndef SHI_BENCH_H
#define SHI_BENCH_H

#include "machine.h"

#endif
