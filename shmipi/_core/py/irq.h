/* SPDX-License-Identifier: MIT */
/* Requesting handlers of irqs, and of NMIs.  The irq tables are locked. */
#ifndef SHI_PY_IRQ_H
#define SHI_PY_IRQ_H

#include "py/base.h"

#include "irq/irqdesc.h"

/* Publish a native handler, with None, an int or a shared array for it; with a stride, CPU n
 * gets what lies n strides after it.  0, or -1. */
int shi_native_request(Machine *machine, struct shi_irqdesc *desc, PyObject *handler,
                       PyObject *info, uint32_t stride);
/* Publish a Python handler, and hold its number: 0, or -1. */
int shi_python_request(Machine *machine, struct shi_irqdesc *desc, PyObject *handler);
/* Numbers of functions are held for what this process has requested, whatever becomes of the
 * function object.  Give back those of what others have freed, or have requested since. */
void shi_irq_let_go(Machine *machine);

#endif
