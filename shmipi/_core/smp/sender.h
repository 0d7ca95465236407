/* SPDX-License-Identifier: MIT */
/*
 * What a sender owns: its csds, the functions it has published, and their payloads; for how
 * long, and how each is given back.
 *
 * What travels belongs to its sender: the csd, the argument, and the block a result is
 * written to.  A result that does not fit there the target lends (lend.h).
 *
 * Functions go by number.  A sender publishes the pickle of a function once, in its own
 * arena, under (index, serial); a target that has not met the number reads it there.
 * So no message about a function can be overtaken by a call of it.
 *
 * `local` counts a sender's own csds.  All but the first two: between shi_enter and shi_leave.
 */
#ifndef SHI_SENDER_H
#define SHI_SENDER_H

#include "base/machine.h"

int shi_sender_init(struct shi_self *self);
void shi_sender_fini(struct shi_self *self);

static inline struct shi_csd *shi_own_csd(const struct shi_self *self, uint32_t local)
{
    return (struct shi_csd *)shi_region(self->m, self->id) + local;
}

static inline uint32_t shi_own_index(const struct shi_self *self, uint32_t local)
{
    return (self->id << self->m->csd_shift) + local;
}

/* ---- csds ------------------------------------------------------------------------ */

#define SHI_PATIENCE_MAX 512u /* rounds of a loop over one warm line: some 200 ns */
#define SHI_PATIENCE_KINDS 4u

/*
 * How long a waiter leaves its csd alone before the first look, where the target polls: for
 * each target, and apart for native and Python handlers and by the last bit of a function's
 * number, so that quick functions do not wait for what was learnt of slow ones.  Private
 * memory; threads of the host share it, so the words are atomic, and a lost step is lost.
 */
static inline uint8_t shi_patience_kind(uint32_t func)
{
    return (uint8_t)(func >> 31 << 1 | (func & 1));
}

static inline shi_a16 *shi_patience(const struct shi_self *self, uint32_t dst, uint32_t kind)
{
    return &self->sender.patience[dst * SHI_PATIENCE_KINDS + kind];
}

/* A csd of this sender that nobody uses: its index, or -EAGAIN (all in flight),
 * -ENOSPC. */
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
/* The one half a pool of wait=0 calls behind it, or the oldest where there are not so many. */
uint32_t shi_csd_later(const struct shi_self *self);
/* A csd for a call nobody waits for: at most SHI_NOWAIT_POOL are in flight.  Its local
 * index, -EAGAIN when one has to be waited for (shi_csd_oldest), -ENOSPC. */
int64_t shi_nowait_get(struct shi_self *self);

/* Attach a new arena block of `length` bytes to a csd: its offset, or -errno. */
int64_t shi_csd_block(struct shi_self *self, uint32_t index, uint64_t length);
/* Let `index` use the block of `owner` too: one payload, many targets. */
void shi_csd_share(struct shi_self *self, uint32_t index, uint32_t owner);
/* No more csds will share it: it goes with the last that does. */
void shi_csd_end_sharing(struct shi_self *self, uint32_t owner);

/* ---- functions ------------------------------------------------------------------- */

/* Publish `length` bytes: the function's index, or -EMFILE (as many as there can be),
 * -ENOBUFS, -E2BIG, -ENOSPC. */
int64_t shi_func_publish(struct shi_self *self, const void *pickle, uint32_t length);
/* A csd names the function from now on / no longer. */
void shi_func_hold(struct shi_self *self, uint32_t index);
void shi_func_drop(struct shi_self *self, uint32_t index);
/* The function object is gone: free the number when no csd names it. */
void shi_func_retire(struct shi_self *self, uint32_t index);

/* ---- filling a csd ---------------------------------------------------------------- */

/* What a call is made of before it has a csd. */
struct shi_call {
    uint32_t func, serial; /* as in the csd */
    uint8_t kind, length, apply;
    uint32_t room; /* of a block for its result, 0: what fits the csd */
    union shi_value value;
    const void *payload; /* for SHI_K_PICKLE, else NULL */
    uint64_t bytes;
};

static inline bool shi_call_by_number(const struct shi_call *call)
{
    return !(call->func & SHI_FUNC_NATIVE) && !(call->apply & SHI_A_INLINE_FUNC);
}

/* A block for csd `local` with the payload, or for its result.  0 or -errno. */
int shi_csd_attach(struct shi_self *self, uint32_t local, const struct shi_call *call);

/* Fill all of csd `local` but its block; it holds the function from then on. */
static inline void shi_csd_fill_head(struct shi_self *self, uint32_t local,
                                     const struct shi_call *call)
{
    struct shi_csd *csd = shi_own_csd(self, local);
    csd->func = call->func;
    csd->serial = call->serial;
    csd->kind = call->kind;
    csd->length = call->length;
    csd->apply = call->apply;
    csd->room = 0;
    csd->value = call->value;
    if (shi_call_by_number(call)) {
        shi_func_hold(self, call->func);
        self->sender.notes[local].func = call->func + 1;
    }
}

/* Fill csd `local`.  0, or -errno of its block: give the csd back then. */
static inline int shi_csd_fill(struct shi_self *self, uint32_t local,
                               const struct shi_call *call)
{
    shi_csd_fill_head(self, local, call);
    return call->payload || call->room ? shi_csd_attach(self, local, call) : 0;
}

/* The same, with the payload that is in `owner` already. */
void shi_csd_fill_shared(struct shi_self *self, uint32_t local, const struct shi_call *call,
                         uint32_t owner);

#endif
