/* SPDX-License-Identifier: MIT */
/* A task's own signal handlers raise into the task, never into an IPI handler. */
#ifndef SHI_PY_SIGNALS_H
#define SHI_PY_SIGNALS_H

#include "py/base.h"

/* The CPU that this thread is, or NULL. */
Machine *shi_own_cpu(void);
/* Signals of the task's that came meanwhile are raised again, and then looked at: 0, or -1
 * with what its handler raised. */
void shi_signals_raise(Machine *machine);
int shi_signals_check(Machine *machine);
/* What came while the interpreter did not know of its fork: anything? Ask it again to look. */
bool shi_signals_came(void);
void shi_signals_early(void);
static inline void shi_signals_let_go(Machine *machine)
{
    if (__builtin_expect(machine->put_off != 0, 0) && shi_in_task(&machine->self))
        shi_signals_raise(machine);
}
/* Put `by` in the place of a function of module `in`, which `original` keeps: 0, or -1. */
int shi_replace(const char *in, const char *name, PyObject **original, PyMethodDef *by);
/* From here on in this process and those it forks: 0, or -1. */
int shi_signals_shield(void);
int shi_signals_types(void);
/* A callable of the module for signal.signal() that is not wrapped as the task's own are. */
int shi_signal_entry(PyObject *module, const char *name, vectorcallfunc function);

#endif
