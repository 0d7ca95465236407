/* SPDX-License-Identifier: MIT */
/*
 * Ringing a CPU: from its state word to the doorbell, the kick, or nothing.
 *
 * The one place that signals a CPU, so that its pid is never another process's by then.
 */
#ifndef SHI_RING_H
#define SHI_RING_H

#include "base/machine.h"

/* How a CPU was rung (the argument of tracepoint `rung`). */
enum shi_rung {
    SHI_RUNG_NOT = 0,
    SHI_RUNG_DOORBELL = 1,
    SHI_RUNG_KICK = 2,
    SHI_RUNG_NMI = 3,
};

/* The chip has set a line of `dst`: PENDING, and ring it the way its state asks for. */
void shi_irq_ring(struct shi_self *self, uint32_t dst);
/* The same for one whose lines are pending already; `again`: whatever its word says. */
void shi_irq_ring_pending(struct shi_self *self, uint32_t dst, bool again);
/* Whatever its word says, with `set` (SHI_W_PENDING or 0) added to it.  0, or -errno when
 * nothing could be sent. */
int shi_irq_ring_again(struct shi_self *self, uint32_t dst, uint64_t set);
/* Completion of a parked waiter: wake its CPU, or the host. */
void shi_irq_ring_waiter(struct shi_self *self, uint32_t slot);
/* Signal an NMI to `dst`: 0 or -errno. */
int shi_irq_signal_nmi(struct shi_self *self, uint32_t dst);

#endif
