/* SPDX-License-Identifier: MIT */
/* CallSingleData: a request that its caller owns, and smp_call_function_single_async. */
#ifndef SHI_PY_CSD_H
#define SHI_PY_CSD_H

#include "py/base.h"

shi_smp_function shi_single_async;
int shi_csd_types(PyObject *module);

#endif
