/* SPDX-License-Identifier: MIT */
/*
 * call_single_data: who may use one, for how long, and how it is given back.
 *
 * What travels belongs to its sender: the csd, the argument, and the block a result is
 * written to.  A result that does not fit there the target lends (lend.h).
 */
#ifndef SHI_CSD_H
#define SHI_CSD_H

#include <errno.h>

#include "base/machine.h"
#include "base/step.h"
#include "base/trace.h"
#include "irq/ring.h"
#include "smp/lend.h"

int shi_sender_init(struct shi_self *self);
void shi_sender_fini(struct shi_self *self);
/* Set the arena up, at its first use: its tables are private memory.  0 or -errno. */
int shi_sender_arena(struct shi_self *self);

/* A csd of this sender that nobody uses: its index, or -EAGAIN (all in flight),
 * -ENOSPC.  Call inside shi_enter/shi_leave. */
int64_t shi_csd_get(struct shi_self *self);
/* Give back a csd that is unlocked, with its block and its hold on its function. */
void shi_csd_put(struct shi_self *self, uint32_t index);
/* Nobody will wait for it: it is given back when its target has unlocked it. */
void shi_csd_leave(struct shi_self *self, uint32_t index);
/* The same, and its result is not wanted: for a csd that may have one. */
void shi_csd_abandon(struct shi_self *self, uint32_t index);
/* Give back every csd left behind that has been unlocked since. */
void shi_csd_collect(struct shi_self *self);
/* The oldest csd in flight, or UINT32_MAX. */
uint32_t shi_csd_oldest(const struct shi_self *self);

/* The sender takes back a csd that was never queued. */
void shi_csd_cancel(struct shi_csd *csd);

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

/* -EBUSY when in use.  Between shi_enter and shi_leave.  `type` is SHI_CSD_SYNC, ...; the
 * push fills in dst's generation. */
static inline int shi_csd_trylock(struct shi_self *self, struct shi_csd *csd, uint64_t type,
                                  uint32_t dst)
{
    uint64_t old = shi_load_acquire(&csd->lock);
    if (old & SHI_CSD_LOCK)
        return -EBUSY;
    /*
     * A plain store: unlocked, the csd is its sender's alone (threads of the host come
     * here one at a time).  A new sequence number each time: a reaper that still holds
     * the old lock word cannot complete this use of the csd.  Release: who lent a result
     * for the last use finds the number changed (shi_lend_sweep) and writes where that
     * was read.
     */
    shi_store_release(&csd->lock, ((old & SHI_CSD_SEQ) + (1ull << SHI_CSD_SEQ_SHIFT)) |
                                      SHI_CSD_LOCK | type | (uint64_t)dst << SHI_CSD_DST_SHIFT);
    csd->src = (uint16_t)self->id;
    csd->src_gen = self->gen;
    shi_store_relaxed(&csd->status, SHI_S_DONE);
    return 0;
}

/* The target, after (SYNC) or before (ASYNC) the function: rings a parked waiter. */
static inline void shi_csd_unlock(struct shi_self *self, struct shi_csd *csd)
{
    uint32_t src = csd->src; /* after the exchange the csd may be anything */
    uint64_t seq = shi_load_relaxed(&csd->lock) & SHI_CSD_SEQ;
    SHI_STEP(self, unlock);
    SHI_TRACE(self, csd_unlock, src, shi_csd_number(self->m, csd), 0, 0);
    /*
     * Full: releases the handler's stores to the waiter's acquire load of the lock,
     * and stands before the load of the waiter's word in shi_irq_ring_waiter.  A
     * waiter that set PARKED before this exchange is rung; one that tries after it
     * finds the csd unlocked.
     */
    uint64_t old = shi_xchg_full(&csd->lock, seq);
    if (__builtin_expect((old & (SHI_CSD_PARKED | SHI_CSD_LEFT)) != 0, 0)) {
        if (old & SHI_CSD_LEFT)
            shi_lend_forget(self, csd, seq);
        if (!(old & SHI_CSD_PARKED))
            return;
        SHI_STEP(self, unlock_ring);
        if (src < self->m->nslots)
            shi_irq_ring_waiter(self, src);
    }
}

/* A block of the sender's arena, also of what has become free there: its offset, or -errno. */
int64_t shi_sender_alloc(struct shi_self *self, uint64_t length);
/* Attach a new arena block of `length` bytes to a csd: its offset, or -errno. */
int64_t shi_csd_block(struct shi_self *self, uint32_t index, uint64_t length);
/* Let `index` use the block of `owner` too: one payload, many targets. */
void shi_csd_share(struct shi_self *self, uint32_t index, uint32_t owner);
/* No more csds will share it: it goes with the last that does. */
void shi_csd_end_sharing(struct shi_self *self, uint32_t owner);

/* The payload behind `ref` in the arena of slot `src`; NULL when it does not lie there. */
void *shi_payload(const struct shi_machine *m, uint32_t src, const struct shi_ref *ref);

#endif
