/* SPDX-License-Identifier: MIT */
/*
 * Results that their sender gave no block for, or too small a one.
 *
 * The target writes them into a block of its own arena and lends it: the csd names the
 * block and bears SHI_S_LENT until the sender has read it.  So a result needs no second
 * interrupt: who is busy, parked or offline by then need not do anything.  What the dead
 * have lent stays: the next process in the slot finds it.
 *
 * The target looks at what it has lent when it lends, and before it halts.  A block comes
 * back when its csd no longer bears this loan: the sender has read it, has left, or died.
 */
#ifndef SHI_LEND_H
#define SHI_LEND_H

#include "base/machine.h"

/* Larger results may fill half the arena, no more: the rest is for what this CPU sends,
 * and small results (exceptions above all) never wait behind large ones. */
#define SHI_LEND_SMALL 65536u

/* All of these: inside shi_enter/shi_leave. */
/* The target, before it unlocks: the result is these bytes.  0; -ENOBUFS or -ENOSPC when
 * there is no room (if anything is lent there will be); -ENOMEM. */
int shi_lend(struct shi_self *self, struct shi_csd *csd, uint8_t status, const void *data,
             uint64_t length);
/* Take back what nobody wants any more, of the next `looks` loans. */
void shi_lend_sweep(struct shi_self *self, uint32_t looks);
/* The csd was unlocked, and nobody waited for it any more.  `seq`: its lock word then. */
void shi_lend_forget(struct shi_self *self, const struct shi_csd *csd, uint64_t seq);

/* A new process in the slot: what the one before it has lent keeps its place. */
void shi_lend_inherit(struct shi_self *self);

/* The sender has read what a csd with SHI_S_LENT names, or never will. */
void shi_lend_done(struct shi_self *self, struct shi_csd *csd);

/* Has `dst` results that wait for room?  Then it looks again when it is rung: a sender that
 * died has made room, and can not say so. */
bool shi_lend_remind(struct shi_self *self, uint32_t dst);

/* Results wait for room: from now on senders that have read one say so. */
static inline void shi_lend_starve(struct shi_self *self, bool waits)
{
    /* Full: before the look at the loans.  Who clears SHI_S_LENT and then reads this
     * either finds it, or has cleared before that look. */
    shi_store_full(&self->slot->starved, waits ? SHI_ST_WAITS : SHI_ST_NO);
}

#endif
