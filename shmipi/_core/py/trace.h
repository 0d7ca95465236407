/* SPDX-License-Identifier: MIT */
/* Tracing: who calls what, in names; and the rings, for those who read them. */
#ifndef SHI_PY_TRACE_H
#define SHI_PY_TRACE_H

#include "base/trace.h"
#include "py/base.h"

void shi_say_call_slow(Machine *machine, PyObject *function);

/* The next records of this thread are of a call of `function`, from the line that is run.  NULL:
 * of what calls none, such as a reschedule IPI. */
static inline void shi_say_call(Machine *machine, PyObject *function)
{
    if (SHI_TRACING_ANY(&machine->self, ~0ull))
        shi_say_call_slow(machine, function);
}

/* What comes next is not of that call: what the core sends by itself is of no line. */
static inline void shi_call_said(Machine *machine)
{
    if (SHI_TRACING_ANY(&machine->self, ~0ull))
        *shi_trace_said(&machine->self) = (struct shi_trace_said){ 0 };
}

/* A function as records name it; 0: nothing is recorded. */
uint32_t shi_called(Machine *machine, PyObject *function);

#endif
