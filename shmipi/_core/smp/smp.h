/* SPDX-License-Identifier: MIT */
/*
 * kernel/smp.c: lock a csd, queue it, send the interrupt; take the queue and run it.
 *
 * `local` counts a sender's own csds; everything here runs between shi_enter and
 * shi_leave, and the caller has filled the csd (func, kind, value, apply) before.
 */
#ifndef SHI_SMP_H
#define SHI_SMP_H

#include "base/machine.h"

/* generic_exec_single for a remote CPU.  0, -EBUSY (locked), -ENXIO (unlocked again). */
int shi_call_single(struct shi_self *self, uint32_t local, uint64_t type, uint32_t dst);
/* The enqueue half of smp_call_function_many: 1 when `dst` must be sent an IPI, else 0
 * or -EBUSY, -ENXIO.  Then one shi_call_ipi_mask for all of them. */
int shi_call_queue(struct shi_self *self, uint32_t local, uint64_t type, uint32_t dst);
void shi_call_ipi_mask(struct shi_self *self, const uint32_t *cpus, uint32_t n);

/* -EBUSY when in use.  Between shi_enter and shi_leave.  `type` is SHI_CSD_SYNC, ...; the
 * push fills in dst's generation. */
int shi_csd_trylock(struct shi_self *self, struct shi_csd *csd, uint64_t type, uint32_t dst);
/* The target, after (SYNC) or before (ASYNC) the function: rings a parked waiter. */
void shi_csd_unlock(struct shi_self *self, struct shi_csd *csd);

/* smp_send_reschedule. -ENXIO when offline. */
int shi_irq_send_reschedule(struct shi_self *self, uint32_t dst);

/* The lines of call-function and reschedule IPIs, and the queue, are this file's. */
void shi_smp_register(struct shi_machine *m);

#endif
