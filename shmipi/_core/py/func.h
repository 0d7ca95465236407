/* SPDX-License-Identifier: MIT */
/* Functions travel as numbers. */
#ifndef SHI_PY_FUNC_H
#define SHI_PY_FUNC_H

#include "py/base.h"

/* Number of `function` for this sender: >= 0, -1 not by number (pickle it with the
 * arguments), -2 with an exception set.  Hold it (shi_func_hold) before Python code runs. */
int64_t shi_function_number(Machine *machine, PyObject *function);
/* A new reference to src's function, or NULL (with or without an exception). */
PyObject *shi_function_received(Machine *machine, uint32_t src, uint16_t src_gen,
                                uint32_t index, uint32_t serial);
void shi_functions_clear(Machine *machine);
int shi_function_types(void);

#endif
