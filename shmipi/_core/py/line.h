/* SPDX-License-Identifier: MIT */
/* The Python handlers of requested irqs; and what they have in common with those of NMIs. */
#ifndef SHI_PY_LINE_H
#define SHI_PY_LINE_H

#include "py/base.h"

#include "irq/irqdesc.h"

static inline bool shi_same_handler(const struct shi_irqdesc *a, const struct shi_irqdesc *b)
{
    return a->func == b->func && a->serial == b->serial && a->src == b->src &&
           a->src_gen == b->src_gen;
}

/* The Python handler of a requested irq's line: run, then end the line.  Soft-masked. */
void shi_run_line(Machine *machine, uint32_t line);
/* Run the Python action of softirq `nr` now.  Softirqs are served. */
void shi_run_softirq(Machine *machine, uint32_t nr);
/* The Python handler of `desc`: a new reference, or NULL (with or without an exception). */
PyObject *shi_handler_of(Machine *machine, const struct shi_irqdesc *desc);
/* What `function` (NULL: it is gone) gives for `args`, or NULL: what it raised, or what is set
 * already, was unraisable.  Between shi_handler_begin and _end. */
PyObject *shi_handler_apply(Machine *machine, PyObject *function, PyObject *const *args,
                            size_t nargs, enum shi_handler kind);

#endif
