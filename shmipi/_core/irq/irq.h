/* SPDX-License-Identifier: MIT */
/*
 * Interrupts: ringing a CPU, serving what arrived, and the soft mask.
 */
#ifndef SHI_IRQ_H
#define SHI_IRQ_H

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
/* Completion of a parked waiter: wake its CPU, or the host. */
void shi_irq_ring_waiter(struct shi_self *self, uint32_t slot);
/* No progress: ring again whatever the bits say, if there is work.  1 rung, 0 nothing to
 * ring for, or -EAGAIN when no signal could be queued. */
int shi_irq_rering(struct shi_self *self, uint32_t dst);
/* smp_send_reschedule. -ENXIO when offline. */
int shi_irq_send_reschedule(struct shi_self *self, uint32_t dst);

/* Signal an NMI to `dst`: 0 or -errno. */
int shi_irq_signal_nmi(struct shi_self *self, uint32_t dst);
/* INIT: have `dst`'s process ended, unless it has. */
void shi_irq_end(struct shi_self *self, uint32_t dst);
/* In the NMI's signal handler: bring the own CPU's interpreter to its Python handler. */
void shi_irq_call_python_for_nmi(struct shi_self *self);
/* The same: let an idle CPU look around, as after an interrupt. */
void shi_irq_look_after_nmi(struct shi_self *self);

/* Drain lines and queue until both are empty.  Soft-masked.  True if there was any. */
bool shi_service(struct shi_self *self);
/* __flush_smp_call_function_queue: take the whole queue and run it. */
void shi_flush_queue(struct shi_self *self);
/* Run a csd that was taken: native at once, Python now or deferred. */
void shi_csd_run(struct shi_self *self, uint32_t index);
/* Body of the kick handler. */
void shi_irq_entry(struct shi_self *self);

/* local_irq_save: the flag as it was.  Restore replays what happened meanwhile;
 * Python work it found is on self->deferred or self->later. */
uint8_t shi_irq_save(struct shi_self *self);
void shi_irq_restore(struct shi_self *self, uint8_t flags);

/* Change of state of the own CPU. */
void shi_set_polling(struct shi_self *self);
/* POLLING -> RUNNING; serves first whatever would be overlooked.  Python csds that were
 * deferred while doing so are on self->deferred or self->later. */
void shi_set_running(struct shi_self *self);

#endif
