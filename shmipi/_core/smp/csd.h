/* SPDX-License-Identifier: MIT */
/*
 * call_single_data: what its lock word says.  Who locks and unlocks is in smp.c, whose it is
 * in sender.h.
 */
#ifndef SHI_CSD_H
#define SHI_CSD_H

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

/* The sender takes back a csd that was never queued. */
static inline void shi_csd_cancel(struct shi_csd *csd)
{
    shi_fetch_and_full(&csd->lock, SHI_CSD_SEQ);
}

#endif
