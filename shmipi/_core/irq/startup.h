/* SPDX-License-Identifier: MIT */
/* INIT and STARTUP: bringing secondary CPUs up by IPI. */
#ifndef SHI_STARTUP_H
#define SHI_STARTUP_H

#include "base/machine.h"

/* A secondary CPU of a chip that starts them by IPI: wait for STARTUP.  0, -ECANCELED. */
int shi_chip_wait_startup(struct shi_self *self);
/* Let a process that waits for STARTUP go on.  1; 0: none does, and nothing happens. */
int shi_chip_let_start(struct shi_self *self, uint32_t cpu);
/* The STARTUP IPI, which has a CPU without a process made one.  1: the CPU waited for
 * it; 0: it did not, and nothing happens. */
int shi_chip_startup(struct shi_self *self, uint32_t cpu, uint32_t vector);
/* The INIT IPI: end the CPU's process.  A secondary CPU then waits for STARTUP; CPU 0,
 * the bootstrap processor, starts again by itself.  1; 0: it was waiting already. */
int shi_chip_init(struct shi_self *self, uint32_t cpu);

#endif
