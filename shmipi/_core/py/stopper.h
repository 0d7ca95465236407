/* SPDX-License-Identifier: MIT */
/* The stopper's works that need the interpreter. */
#ifndef SHI_PY_STOPPER_H
#define SHI_PY_STOPPER_H

#include "py/base.h"

/* Run the works that are due.  `waiting` runs what waits for the interpreter, but these: a
 * multi_cpu_stop takes interrupts until all have come.  Holds the interpreter. */
void shi_stopper_run(Machine *machine, void (*waiting)(Machine *));

#endif
