/* SPDX-License-Identifier: MIT */
/* CallSingleData: a request that its caller owns, and smp_call_function_single_async. */
#ifndef SHI_PY_CSD_H
#define SHI_PY_CSD_H

#include "py/base.h"

shi_smp_function shi_single_async;
/* stop_nowait(cpu, csd) -> bool: a work of a stopper, that nobody waits for. */
PyObject *shi_stop_nowait(Machine *machine, PyObject *const *args, Py_ssize_t nargs);
int shi_csd_types(PyObject *module);

#endif
