/* SPDX-License-Identifier: MIT */
/* The Python handlers of requested irqs and of the NMI. */
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
/* The Python handler of the NMI that is in service, and of those after it. */
void shi_run_nmi(Machine *machine);

#endif
