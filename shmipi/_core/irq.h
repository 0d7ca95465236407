/* SPDX-License-Identifier: MIT */
/*
 * Interrupts: pending lines, the soft mask, and the irq chip that a call which is not
 * elided passes through.
 */
#ifndef SHI_IRQ_H
#define SHI_IRQ_H

#include "machine.h"

/* x86 system vectors (arch/x86/include/asm/irq_vectors.h). */
#define SHI_VEC_RESCHEDULE 0xfdu
#define SHI_VEC_CALL_FUNCTION 0xfcu
#define SHI_VEC_CALL_FUNCTION_SINGLE 0xfbu

/* What an interrupt controller does with the generic layer's IPIs. */
struct shi_irq_chip {
    const char *name;
    void (*send_call_single)(struct shi_self *, uint32_t dst);
    void (*send_call_mask)(struct shi_self *, const uint32_t *cpus, uint32_t n);
    void (*send_reschedule)(struct shi_self *, uint32_t dst);
    /* Take and dispatch the pending lines of this CPU.  Soft-masked. */
    void (*handle)(struct shi_self *);
};

const struct shi_irq_chip *shi_irq_chip_by_name(const char *name);

/* Set a line of `dst` pending and ring it the way its state asks for. */
void shi_irq_raise(struct shi_self *self, uint32_t dst, uint32_t line);
/* Completion of a parked waiter: wake its CPU, or the host. */
void shi_irq_ring_waiter(struct shi_self *self, uint32_t slot);
/* No progress: ring again whatever the bits say, if there is work. */
bool shi_irq_rering(struct shi_self *self, uint32_t dst);
/* smp_send_reschedule. -ENXIO when offline. */
int shi_irq_send_reschedule(struct shi_self *self, uint32_t dst);

/* Drain lines and queue until both are empty.  Soft-masked.  True if there was any. */
bool shi_service(struct shi_self *self);
/* Run a csd that was taken: native at once, Python now or deferred. */
void shi_csd_run(struct shi_self *self, uint32_t index);
/* Body of the kick handler. */
void shi_irq_entry(struct shi_self *self);

/* local_irq_save: the flag as it was.  Restore replays what happened meanwhile;
 * Python work it found is on self->deferred. */
uint8_t shi_irq_save(struct shi_self *self);
void shi_irq_restore(struct shi_self *self, uint8_t flags);

/* Change of state of the own CPU. */
void shi_set_polling(struct shi_self *self);
/* POLLING -> RUNNING; serves first whatever would be overlooked.  Python csds that were
 * deferred while doing so are on self->deferred. */
void shi_set_running(struct shi_self *self);

#endif
