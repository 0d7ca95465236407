/* SPDX-License-Identifier: MIT */
#include "base/sys.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>

#include "smp/csd.h"
#include "smp/lend.h"
#include "smp/payload.h"
#include "smp/sender.h"

#define CSDS_PER_PAGE (SHI_PAGE / SHI_LINE)
#define FUNCS_PER_PAGE (SHI_PAGE / sizeof(struct shi_func))
#define AHEAD                                                                                  \
    8u /* calls that nobody waits for: whose csd is fetched while this one is filled */

/* ---- payloads -------------------------------------------------------------------- */

/* A block of the arena, also of what has become free there: its offset, or -errno. */
static int64_t arena_alloc(struct shi_self *self, uint64_t length)
{
    struct shi_sender *s = &self->sender;
    int err = shi_sender_arena(self);
    if (err)
        return err;
    int64_t at = shi_arena_alloc(&s->arena, length);
    if ((at == -ENOBUFS || at == -ENOSPC) && (s->flight_count || s->nloans)) {
        shi_csd_collect(self); /* blocks of calls that have ended since */
        shi_lend_sweep(self, s->nloans);
        at = shi_arena_alloc(&s->arena, length);
    }
    return at;
}

int64_t shi_csd_block(struct shi_self *self, uint32_t index, uint64_t length)
{
    int64_t at = arena_alloc(self, length);
    if (at >= 0)
        self->sender.notes[index].block = (uint64_t)at + 1;
    return at;
}

void shi_csd_share(struct shi_self *self, uint32_t index, uint32_t owner)
{
    self->sender.notes[index].shared = owner + 1;
    self->sender.notes[owner].users++;
}

/* ---- functions ------------------------------------------------------------------- */

static uint32_t new_serial(struct shi_self *self)
{
    struct shi_sender *s = &self->sender;
    if (!s->next_serial) {
        struct timespec now;
        clock_gettime(CLOCK_MONOTONIC, &now);
        s->next_serial = (uint32_t)(now.tv_nsec ^ now.tv_sec << 20);
    }
    if (++s->next_serial == 0)
        s->next_serial = 1;
    return s->next_serial;
}

int64_t shi_func_publish(struct shi_self *self, const void *pickle, uint32_t length)
{
    struct shi_sender *s = &self->sender;
    int err;
    if (!s->nfree_funcs) {
        if (s->func_top == SHI_FUNCS)
            return -EMFILE;
        if (s->func_top % FUNCS_PER_PAGE == 0) {
            const struct shi_machine *m = self->m;
            err = shi_machine_back(m,
                                   m->region_offset + (uint64_t)self->id * m->region_bytes +
                                       m->func_offset + s->func_top * sizeof(struct shi_func),
                                   SHI_PAGE);
            if (err)
                return err;
        }
        s->free_funcs[s->nfree_funcs++] = s->func_top++;
        /* Release: who reads the top finds backed, zeroed entries below it. */
        shi_store_release(&self->slot->func_top, s->func_top);
    }
    int64_t at = arena_alloc(self, length);
    if (at < 0)
        return at;
    memcpy(shi_arena_base(self->m, self->id) + at, pickle, length);
    uint32_t index = s->free_funcs[--s->nfree_funcs];
    struct shi_func *f = shi_func_entry(self->m, self->id, index);
    f->length = length;
    f->offset = (uint64_t)at;
    f->sum = shi_checksum(self->m, pickle, length);
    /* Release pairs with the acquire in shi_func_find; the push orders it as well. */
    shi_store_release(&f->serial, new_serial(self));
    s->funcs[index] = (struct shi_func_note){ .block = (uint64_t)at + 1 };
    return index;
}

static void func_free(struct shi_self *self, uint32_t index)
{
    struct shi_sender *s = &self->sender;
    shi_store_release(&shi_func_entry(self->m, self->id, index)->serial, 0);
    if (s->funcs[index].block)
        shi_arena_free(&s->arena, s->funcs[index].block - 1);
    s->funcs[index] = (struct shi_func_note){ 0 };
    s->free_funcs[s->nfree_funcs++] = index;
}

void shi_func_hold(struct shi_self *self, uint32_t index)
{
    self->sender.funcs[index].in_flight++;
}

void shi_func_drop(struct shi_self *self, uint32_t index)
{
    struct shi_func_note *note = &self->sender.funcs[index];
    if (--note->in_flight == 0 && note->dead)
        func_free(self, index);
}

void shi_func_retire(struct shi_self *self, uint32_t index)
{
    struct shi_func_note *note = &self->sender.funcs[index];
    note->dead = 1;
    if (note->in_flight == 0)
        func_free(self, index);
}

/* ---- csds ------------------------------------------------------------------------ */

/*
 * How many are out: what the reaper scans this slot for.  It is stored before the csd is filled,
 * so before the push's compare-and-swap on its target's word releases both: who has marked the
 * target DEAD, in the same word, finds at least 1 until the csd has been unlocked and put back.
 */
static void publish_out(struct shi_self *self)
{
    struct shi_sender *s = &self->sender;
    shi_store_relaxed(&self->slot->csds_out, s->csd_top - s->nfree);
}

/* In flight: a ring of indices, oldest first. */
static void flight_push(struct shi_self *self, uint32_t index)
{
    struct shi_sender *s = &self->sender;
    s->flight[(s->flight_head + s->flight_count++) & (self->m->csds_per_slot - 1)] = index;
}

static uint32_t flight_pop(struct shi_self *self)
{
    struct shi_sender *s = &self->sender;
    uint32_t index = s->flight[s->flight_head];
    s->flight_head = (s->flight_head + 1) & (self->m->csds_per_slot - 1);
    s->flight_count--;
    return index;
}

/*
 * One that nobody uses and yet is locked is damaged: nobody will ever unlock it, and given
 * out it would fail one call after the other.  Its place is lost, no more.
 */
static bool usable(struct shi_self *self, uint32_t index)
{
    if (__builtin_expect(!shi_csd_locked(shi_own_csd(self, index)), 1))
        return true;
    shi_count(self, SHI_C_corrupt);
    return false;
}

static int64_t pop_free(struct shi_self *self)
{
    struct shi_sender *s = &self->sender;
    while (s->nfree) {
        uint32_t index = s->free_csds[--s->nfree]; /* used last: its line is warm */
        if (usable(self, index)) {
            publish_out(self);
            return index;
        }
    }
    return -EAGAIN;
}

static int64_t new_csd(struct shi_self *self)
{
    struct shi_sender *s = &self->sender;
    if (s->csd_top == self->m->csds_per_slot)
        return -EAGAIN;
    if (s->csd_top % CSDS_PER_PAGE == 0) {
        uint64_t at = self->m->region_offset + (uint64_t)self->id * self->m->region_bytes +
                      (uint64_t)s->csd_top * SHI_LINE;
        int err = shi_machine_back(self->m, at, SHI_PAGE);
        if (err)
            return err;
    }
    uint32_t index = s->csd_top++;
    /* Release: the reaper that reads the top finds backed, zeroed csds below it. */
    shi_store_release(&self->slot->csd_top, s->csd_top);
    publish_out(self);
    return index;
}

int64_t shi_csd_get(struct shi_self *self)
{
    int64_t index = pop_free(self);
    if (index >= 0)
        return index;
    shi_csd_collect(self);
    index = pop_free(self);
    while (index < 0) {
        index = new_csd(self);
        if (index < 0 || usable(self, (uint32_t)index))
            break;
        index = -EAGAIN;
    }
    return index;
}

/* The block goes on with one of those that share it (an earlier owner's csds only). */
static void hand_over(struct shi_sender *s, uint32_t index, uint32_t n)
{
    struct shi_csd_note *note = &s->notes[index];
    uint32_t heir = UINT32_MAX, i;
    for (i = 0; i < n; i++) {
        if (s->notes[i].shared != index + 1)
            continue;
        if (heir == UINT32_MAX) {
            heir = i;
            s->notes[i].shared = 0;
            s->notes[i].block = note->block;
            s->notes[i].users = note->users - 1;
        } else {
            s->notes[i].shared = heir + 1;
        }
    }
    note->block = 0;
    note->users = 0;
}

static void put_block(struct shi_self *self, uint32_t index)
{
    struct shi_sender *s = &self->sender;
    struct shi_csd_note *note = &s->notes[index];
    if (note->shared) {
        struct shi_csd_note *owner = &s->notes[note->shared - 1];
        note->shared = 0;
        if (--owner->users == 0 && owner->ending) {
            owner->ending = 0;
            shi_csd_put(self, (uint32_t)(owner - s->notes));
        }
        return;
    }
    if (note->block && note->users) {
        hand_over(s, index, self->m->csds_per_slot);
    } else if (note->block) {
        shi_arena_free(&s->arena, note->block - 1);
        note->block = 0;
    }
}

void shi_csd_put(struct shi_self *self, uint32_t index)
{
    struct shi_sender *s = &self->sender;
    struct shi_csd_note *note = &s->notes[index];
    if (__builtin_expect(shi_load_relaxed(&shi_own_csd(self, index)->status) & SHI_S_LENT, 0))
        shi_lend_done(self, shi_own_csd(self, index));
    s->nowait -= note->nowait;
    note->nowait = 0;
    note->left = 0;
    shi_store_relaxed(&note->polled, 0);
    if (note->func) {
        shi_func_drop(self, note->func - 1);
        note->func = 0;
    }
    put_block(self, index);
    s->free_csds[s->nfree++] = index;
    publish_out(self);
}

void shi_csd_end_sharing(struct shi_self *self, uint32_t owner)
{
    if (self->sender.notes[owner].users)
        self->sender.notes[owner].ending = 1;
    else
        shi_csd_put(self, owner);
}

void shi_csd_leave(struct shi_self *self, uint32_t index)
{
    flight_push(self, index);
}

void shi_csd_abandon(struct shi_self *self, uint32_t index)
{
    struct shi_csd *csd = shi_own_csd(self, index);
    uint64_t lock = shi_load_acquire(&csd->lock);
    /* The unlock's exchange finds LEFT, and what was lent is taken back by the target;
     * or this swap finds it unlocked, and it is given back here. */
    while (lock & SHI_CSD_LOCK && !shi_cas_full(&csd->lock, &lock, lock | SHI_CSD_LEFT))
        ;
    if (lock & SHI_CSD_LOCK) {
        self->sender.notes[index].left = 1;
        flight_push(self, index);
    } else {
        shi_csd_put(self, index);
    }
}

uint32_t shi_csd_oldest(const struct shi_self *self)
{
    const struct shi_sender *s = &self->sender;
    return s->flight_count ? s->flight[s->flight_head] : UINT32_MAX;
}

#define LATER 32u /* of SHI_NOWAIT_POOL */

uint32_t shi_csd_later(const struct shi_self *self)
{
    const struct shi_sender *s = &self->sender;
    return s->flight_count > LATER
               ? s->flight[(s->flight_head + LATER) & (self->m->csds_per_slot - 1)]
               : shi_csd_oldest(self);
}

void shi_csd_collect(struct shi_self *self)
{
    struct shi_sender *s = &self->sender;
    uint32_t n = s->flight_count, oldest = shi_csd_oldest(self), i;
    for (i = 0; i < n; i++) {
        uint32_t index = flight_pop(self);
        uint64_t lock = shi_load_acquire(&shi_own_csd(self, index)->lock);
        if (!(lock & SHI_CSD_LOCK)) {
            shi_csd_put(self, index);
        } else if ((uint16_t)(lock >> SHI_CSD_DST_SHIFT) < self->m->ncpus) {
            flight_push(self, index); /* keep it: order among the rest stays */
        } else {
            /* Damaged: nobody will ever unlock it.  Its place is lost, no more. */
            shi_count(self, SHI_C_corrupt);
            s->nowait -= s->notes[index].nowait;
            s->notes[index].nowait = 0;
        }
    }
    if (shi_csd_oldest(self) != oldest)
        s->room_looks = 0; /* which were for that one */
}

int shi_csd_attach(struct shi_self *self, uint32_t local, const struct shi_call *call)
{
    struct shi_csd *csd = shi_own_csd(self, local);
    int64_t at =
        shi_csd_block(self, local, call->bytes > call->room ? call->bytes : call->room);
    if (at < 0)
        return (int)at;
    if (call->room) {
        csd->reply = (uint64_t)at;
        csd->room = call->room;
    }
    if (call->payload) {
        memcpy(shi_arena_base(self->m, self->id) + at, call->payload, call->bytes);
        csd->value.ref = (struct shi_ref){
            .offset = (uint64_t)at,
            .length = (uint32_t)call->bytes,
            .sum = shi_checksum(self->m, call->payload, call->bytes),
        };
    }
    return 0;
}

void shi_csd_fill_shared(struct shi_self *self, uint32_t local, const struct shi_call *call,
                         uint32_t owner)
{
    shi_csd_fill_head(self, local, call);
    if (call->payload) {
        shi_own_csd(self, local)->value = shi_own_csd(self, owner)->value;
        shi_csd_share(self, local, owner);
    }
}

/*
 * The oldest in flight has been unlocked, and holds nothing but its function: it is the next
 * call's as it is.  It stays counted as out (publish_out) from its last use to this one, and
 * was unlocked when the acquire load found it so; who fills it is its owner.
 */
static bool use_again(struct shi_self *self, uint32_t index)
{
    struct shi_csd_note *note = &self->sender.notes[index];
    if (!note->nowait || note->block || note->shared || note->users ||
        shi_load_relaxed(&shi_own_csd(self, index)->status) & SHI_S_LENT)
        return false;
    flight_pop(self);
    if (note->func) {
        shi_func_drop(self, note->func - 1);
        note->func = 0;
    }
    note->left = 0;
    return true;
}

int64_t shi_nowait_get(struct shi_self *self)
{
    struct shi_sender *s = &self->sender;
    if (s->nowait >= SHI_NOWAIT_POOL) {
        uint32_t oldest = shi_csd_oldest(self);
        if (!shi_csd_locked(shi_own_csd(self, oldest))) {
            if (s->flight_count > AHEAD) /* the lines its target unlocked come in meanwhile */
                shi_prefetch_write(shi_own_csd(
                    self, s->flight[(s->flight_head + AHEAD) & (self->m->csds_per_slot - 1)]));
            s->room_looks = 0;
            if (use_again(self, oldest))
                return oldest;
            shi_csd_put(self, flight_pop(self));
        } else {
            /*
             * Those behind it most likely are locked too, and a look at each would take its
             * line away from the target that is about to unlock it.  But its target may be
             * slower than others, or stopped: when one half the pool behind it is unlocked,
             * or was waited for in vain (shi_call_room).
             */
            if (s->room_looks || !shi_csd_locked(shi_own_csd(self, shi_csd_later(self))))
                shi_csd_collect(self);
            if (s->nowait >= SHI_NOWAIT_POOL)
                return -EAGAIN;
        }
    }
    int64_t local = shi_csd_get(self);
    if (local >= 0) {
        s->notes[local].nowait = 1;
        s->nowait++;
    }
    return local;
}

/* ---- a process begins, in a slot that others had before it ------------------------ */

/* Another inherited csd has reserved this payload already: many() shares one. */
static void share_inherited(struct shi_self *self, uint32_t index, uint64_t offset)
{
    struct shi_sender *s = &self->sender;
    uint32_t i;
    for (i = 0; i < index; i++)
        if (s->notes[i].block && shi_own_csd(self, i)->value.ref.offset == offset) {
            shi_csd_share(self, index, i);
            return;
        }
}

static void inherit_functions(struct shi_self *self)
{
    struct shi_sender *s = &self->sender;
    uint32_t i, top = shi_load_acquire(&self->slot->func_top);
    if (top > SHI_FUNCS)
        top = SHI_FUNCS;
    for (i = 0; i < s->flight_count; i++) {
        uint32_t index = s->flight[i];
        struct shi_csd *csd = shi_own_csd(self, index);
        if (csd->func & SHI_FUNC_NATIVE || csd->func >= top)
            continue;
        struct shi_func_note *note = &s->funcs[csd->func];
        if (!note->in_flight) {
            struct shi_func *f = shi_func_entry(self->m, self->id, csd->func);
            int64_t at = -EINVAL;
            if (shi_sender_arena(self) == 0)
                at = shi_arena_reserve(&s->arena, f->offset, f->length);
            note->block = at < 0 ? 0 : (uint64_t)at + 1;
            note->dead = 1;
        }
        note->in_flight++;
        s->notes[index].func = csd->func + 1;
    }
    for (i = 0; i < top; i++) {
        if (s->funcs[i].in_flight)
            continue;
        shi_store_relaxed(&shi_func_entry(self->m, self->id, i)->serial, 0);
        s->free_funcs[s->nfree_funcs++] = i;
    }
    s->func_top = top;
}

/*
 * The slot's earlier owner was killed.  What it sent may still be in queues, so those
 * csds, their payloads and the functions they name keep their places until unlocked.
 */
static void inherit(struct shi_self *self)
{
    struct shi_sender *s = &self->sender;
    uint32_t top = shi_load_acquire(&self->slot->csd_top), i;
    if (top > self->m->csds_per_slot)
        top = self->m->csds_per_slot;
    s->csd_top = top;
    for (i = 0; i < top; i++) {
        struct shi_csd *csd = shi_own_csd(self, i);
        if (shi_csd_locked(csd) && shi_csd_unqueued(csd))
            shi_csd_cancel(csd); /* nobody else has it, nor will */
        if (!shi_csd_locked(csd)) {
            /* With a result that nobody will read: its target lends it no longer. */
            shi_store_release(&csd->status, SHI_S_DONE);
            s->free_csds[s->nfree++] = i;
            continue;
        }
        /* LENT, and about to be unlocked: it has been taken, and `ref` is not of this arena. */
        if (!(shi_load_acquire(&csd->status) & SHI_S_LENT) &&
            (csd->kind == SHI_K_PICKLE || csd->room)) {
            uint64_t offset = csd->room ? csd->reply : csd->value.ref.offset;
            uint64_t length = csd->room ? csd->room : csd->value.ref.length;
            if (shi_sender_arena(self) == 0) {
                int64_t at = shi_arena_reserve(&s->arena, offset, length);
                if (at >= 0)
                    s->notes[i].block = (uint64_t)at + 1;
                else
                    share_inherited(self, i, offset);
            }
        }
        flight_push(self, i);
    }
    inherit_functions(self);
    shi_lend_inherit(self); /* last: what is in flight cannot be lost */
}

static size_t lines(size_t n, size_t size)
{
    return (n * size + SHI_LINE - 1) / SHI_LINE * SHI_LINE;
}

/* A mapping, not the heap: in a CPU that has just been forked, what another process's tables
 * left on the heap is a copy of each page, though all that calloc() writes is zeros. */
int shi_sender_init(struct shi_self *self)
{
    struct shi_sender *s = &self->sender;
    size_t n = self->m->csds_per_slot;
    size_t patience = lines((size_t)self->m->ncpus * SHI_PATIENCE_KINDS, sizeof *s->patience);
    size_t free_csds = lines(n, sizeof *s->free_csds), flight = lines(n, sizeof *s->flight);
    size_t free_funcs = lines(SHI_FUNCS, sizeof *s->free_funcs);
    size_t funcs = lines(SHI_FUNCS, sizeof *s->funcs), notes = lines(n, sizeof *s->notes);
    size_t bytes = patience + free_csds + flight + free_funcs + funcs + notes;
    char *at = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (at == MAP_FAILED)
        return -ENOMEM;
    s->room = at;
    s->room_bytes = bytes;
    s->patience = (shi_a16 *)(void *)at;
    s->free_csds = (uint32_t *)(void *)(at += patience);
    s->flight = (uint32_t *)(void *)(at += free_csds);
    s->free_funcs = (uint32_t *)(void *)(at += flight);
    s->funcs = (struct shi_func_note *)(void *)(at += free_funcs);
    s->notes = (struct shi_csd_note *)(void *)(at += funcs);
    inherit(self);
    /* Not before: what the slot's earlier process had out is told until all of it is known. */
    publish_out(self);
    return 0;
}

void shi_sender_fini(struct shi_self *self)
{
    struct shi_sender *s = &self->sender;
    if (s->arena.m)
        shi_arena_fini(&s->arena);
    if (s->room)
        munmap(s->room, s->room_bytes);
    free(s->loans);
    memset(s, 0, sizeof *s);
}
