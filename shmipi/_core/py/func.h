/* SPDX-License-Identifier: MIT */
/* Functions travel as numbers. */
#ifndef SHI_PY_FUNC_H
#define SHI_PY_FUNC_H

#include "py/base.h"

/* May it go by number?  Other callables (bound methods, partials, objects) may change in ways
 * that identity does not show: they are pickled at each call, with the arguments. */
bool shi_function_by_number(PyObject *function);
/* Number of one that may, for this sender: >= 0, or -1 with an exception set.  Have a csd hold
 * it (shi_csd_fill), or shi_func_hold, before Python code runs. */
int64_t shi_function_number(Machine *machine, PyObject *function);
/* A new reference to src's function, or NULL (with or without an exception). */
PyObject *shi_function_received(Machine *machine, uint32_t src, uint16_t src_gen,
                                uint32_t index, uint32_t serial);
/* The name of the function that this process has sent by that number; None: it is gone. */
PyObject *shi_function_name(Machine *machine, uint32_t number);
void shi_functions_clear(Machine *machine);
int shi_function_types(void);

#endif
