/* SPDX-License-Identifier: MIT */
/*
 * Reschedule IPIs that are put off until a schedule point, as Zephyr's kernel/ipi.c has them:
 * flagged as often as one likes, they are sent there, one for each CPU, by whoever comes first.
 */
#ifndef SHI_FLAG_IPI_H
#define SHI_FLAG_IPI_H

#include "base/machine.h"

/* flag_ipi(): `words` is a mask of CPUs. */
void shi_flag_ipi(struct shi_self *self, const uint64_t *words);
/* signal_pending_ipi(): how many were sent; not to this CPU, nor to those that are offline. */
uint32_t shi_signal_pending_ipi(struct shi_self *self);

/* A schedule point. */
static inline void shi_ipi_point(struct shi_self *self)
{
    if (__builtin_expect(shi_load_relaxed(&shi_sched(self->m)->ipi_flagged), 0))
        shi_signal_pending_ipi(self);
}

#endif
