/* SPDX-License-Identifier: MIT */
#include "base/sys.h"

#include "smp/entry.h"
#include "smp/flag_ipi.h"
#include "smp/smp.h"

void shi_flag_ipi(struct shi_self *self, const uint64_t *words)
{
    struct shi_sched *sched = shi_sched(self->m);
    uint32_t i;
    for (i = 0; i < shi_affinity_words(self->m->ncpus); i++)
        if (words[i])
            shi_fetch_or_full(&sched->pending_ipi[i], words[i]);
    /* After the bits: who takes the flag looks there. */
    shi_store_full(&sched->ipi_flagged, 1);
}

uint32_t shi_signal_pending_ipi(struct shi_self *self)
{
    struct shi_sched *sched = shi_sched(self->m);
    uint32_t i, cpu, sent = 0;
    /* The flag first: a bit that is set after its word was taken sets it again. */
    if (!shi_xchg_full(&sched->ipi_flagged, 0))
        return 0;
    shi_enter(self);
    for (i = 0; i < shi_affinity_words(self->m->ncpus); i++) {
        uint64_t set = shi_load_relaxed(&sched->pending_ipi[i])
                           ? shi_xchg_full(&sched->pending_ipi[i], 0)
                           : 0;
        for (; set; set &= set - 1) {
            cpu = i * 64 + (uint32_t)__builtin_ctzll(set);
            if (cpu < self->m->ncpus && (self->host || cpu != self->id) &&
                !shi_irq_send_reschedule(self, cpu))
                sent++;
        }
    }
    shi_leave(self);
    return sent;
}
