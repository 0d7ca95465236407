/* SPDX-License-Identifier: MIT */
/*
 * call_single_data: what its lock word says.  Who locks and unlocks is in smp.c, whose it is
 * in sender.h.
 */
#ifndef SHI_CSD_H
#define SHI_CSD_H

#include "base/rules.h"
#include "base/segment.h"

static inline bool shi_csd_locked(const struct shi_csd *csd)
{
    /* Acquire pairs with the exchange in shi_csd_unlock: the handler's stores. */
    return (shi_load_acquire(&csd->lock) & SHI_CSD_LOCK) != 0;
}

/* Locked, but its sender died before the push: the push writes the target's generation,
 * which is never 0, just before its compare-and-swap. */
static inline bool shi_csd_unqueued(const struct shi_csd *csd)
{
    return (shi_load_acquire(&csd->lock) >> SHI_CSD_GEN_SHIFT & 0xffff) == 0;
}

static inline bool shi_csd_is_irq_work(const struct shi_csd *csd)
{
    return (shi_load_relaxed(&csd->lock) & SHI_CSD_TYPE) == SHI_CSD_IRQ_WORK;
}

/*
 * irq_work_single(), before and after the function.  PENDING is cleared before it: who queues
 * it from now on, the function itself for one, has it run once more.  Full: acquires what its
 * queuer stored before.  BUSY after it, unless somebody has claimed it meanwhile: the sequence
 * number is another then.
 */
static inline uint64_t shi_irq_work_begin(const struct shi_machine *m, struct shi_csd *csd)
{
    if (shi_rule_off(m, SHI_RULE_softirq_pending))
        return shi_load_acquire(&csd->lock);
    return shi_fetch_and_full(&csd->lock, ~SHI_CSD_LOCK) & ~SHI_CSD_LOCK;
}

static inline void shi_irq_work_end(struct shi_csd *csd, uint64_t flags)
{
    /* (LOCK is set in what a rule that is off has left.) */
    shi_cas_full(&csd->lock, &flags, flags & ~(SHI_CSD_BUSY | SHI_CSD_LOCK));
}

/* The sender takes back a csd that was never queued. */
static inline void shi_csd_cancel(struct shi_csd *csd)
{
    shi_fetch_and_full(&csd->lock, SHI_CSD_SEQ);
}

/* csd_lock_record(): what this CPU executes from now on, for who waits for it. */
static inline void shi_csd_record(struct shi_slot *slot, uint32_t number,
                                  const struct shi_csd *csd)
{
    shi_store_relaxed(&slot->cur_csd_func, csd->func);
    shi_store_relaxed(&slot->cur_csd_info, csd->value.u);
    shi_store_relaxed(&slot->cur_csd_kind, csd->kind);
    /* Release: who finds the csd finds its function and argument. */
    shi_store_release(&slot->cur_csd, number);
}

#endif
