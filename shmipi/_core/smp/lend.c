/* SPDX-License-Identifier: MIT */
#include "base/sys.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "irq/chip.h"
#include "smp/lend.h"
#include "smp/payload.h"

/* At every loan, so many older ones are looked at: more than one, so that they get fewer. */
#define LOOKS 4u

static bool wanted(const struct shi_self *self, const struct shi_loan *loan)
{
    const struct shi_machine *m = self->m;
    struct shi_slot *slot = shi_slot(m, loan->csd >> m->csd_shift);
    struct shi_csd *csd = shi_csd(m, loan->csd);
    if ((uint16_t)shi_load_acquire(&slot->generation) != loan->src_gen ||
        shi_word_state(shi_load_acquire(&slot->word)) == SHI_DEAD)
        return false; /* the dead read nothing, and an heir knows nothing of it */
    /*
     * Full, both: after the store in shi_lend_starve.  They pair with the exchange in
     * shi_lend_done: the sender's reads of the block stand before what is written there
     * next.  Another sequence number: the csd is in use again, so it was given back; this
     * pairs with the release in shi_csd_trylock.
     */
    return (uint16_t)(shi_load_full(&csd->lock) >> SHI_CSD_SEQ_SHIFT) == loan->seq &&
           shi_load_full(&csd->status) & SHI_S_LENT;
}

static void take_back(struct shi_sender *s, uint32_t i)
{
    s->lent -= shi_arena_room(&s->arena, s->loans[i].block);
    shi_arena_free(&s->arena, s->loans[i].block);
    s->loans[i] = s->loans[--s->nloans];
}

void shi_lend_sweep(struct shi_self *self, uint32_t looks)
{
    struct shi_sender *s = &self->sender;
    if (looks > s->nloans)
        looks = s->nloans;
    while (looks--) {
        if (s->loan_next >= s->nloans)
            s->loan_next = 0;
        if (wanted(self, &s->loans[s->loan_next]))
            s->loan_next++;
        else
            take_back(s, s->loan_next);
    }
}

void shi_lend_forget(struct shi_self *self, const struct shi_csd *csd, uint64_t seq)
{
    struct shi_sender *s = &self->sender;
    uint32_t index = shi_csd_number(self->m, csd) - 1, i;
    for (i = s->nloans; i-- > 0;)
        if (s->loans[i].csd == index &&
            s->loans[i].seq == (uint16_t)(seq >> SHI_CSD_SEQ_SHIFT)) {
            take_back(s, i);
            /* No sender says that there is room now: this CPU looks by itself, at the end
             * of what it is doing. */
            uint32_t waits = SHI_ST_WAITS;
            shi_cas_full(&self->slot->starved, &waits, SHI_ST_LOOK);
            return;
        }
}

static int more_loans(struct shi_sender *s)
{
    if (s->nloans < s->loan_room)
        return 0;
    uint32_t room = s->loan_room ? 2 * s->loan_room : 16;
    struct shi_loan *grown = realloc(s->loans, room * sizeof *grown);
    if (!grown)
        return -ENOMEM;
    s->loans = grown;
    s->loan_room = room;
    return 0;
}

static void note(struct shi_self *self, const struct shi_csd *csd, uint64_t lock,
                 uint64_t block)
{
    struct shi_sender *s = &self->sender;
    s->lent += shi_arena_room(&s->arena, block);
    s->loans[s->nloans++] = (struct shi_loan){
        .block = block,
        .csd = shi_csd_number(self->m, csd) - 1,
        .seq = (uint16_t)(lock >> SHI_CSD_SEQ_SHIFT),
        .src_gen = csd->src_gen,
    };
}

/* Of a csd that nobody has locked: its sender may be giving it back right now. */
static void inherit(struct shi_self *self, const struct shi_csd *csd, uint64_t lock)
{
    struct shi_ref ref = csd->value.ref;
    if (csd->kind != SHI_K_PICKLE || ref.cpu != self->id || more_loans(&self->sender) ||
        !shi_payload(self->m, self->id, &ref))
        return;
    int64_t at = shi_arena_reserve(&self->sender.arena, ref.offset, ref.length);
    if (at >= 0) /* else the sender finds out by the checksum */
        note(self, csd, lock, (uint64_t)at);
}

void shi_lend_inherit(struct shi_self *self)
{
    const struct shi_machine *m = self->m;
    uint32_t s, i;
    if (!shi_load_relaxed(&self->slot->lends) || shi_sender_arena(self))
        return;
    for (s = 0; s < m->nslots; s++) {
        uint32_t top = shi_load_acquire(&shi_slot(m, s)->csd_top);
        if (top > m->csds_per_slot)
            top = m->csds_per_slot;
        const struct shi_csd *csd = (const struct shi_csd *)shi_region(m, s);
        for (i = 0; i < top; i++, csd++) {
            uint64_t lock = shi_load_acquire(&csd->lock);
            if (!(lock & (SHI_CSD_LOCK | SHI_CSD_DIED)) &&
                shi_load_acquire(&csd->status) & SHI_S_LENT)
                inherit(self, csd, lock);
        }
    }
}

static int64_t room_for(struct shi_sender *s, uint64_t length)
{
    if (length > SHI_LEND_SMALL && s->lent + length > s->arena.bytes / 2)
        return -ENOBUFS;
    return shi_arena_alloc(&s->arena, length);
}

int shi_lend(struct shi_self *self, struct shi_csd *csd, uint8_t status, const void *data,
             uint64_t length)
{
    struct shi_sender *s = &self->sender;
    int err = shi_sender_arena(self);
    if (!err)
        err = more_loans(s);
    if (err)
        return err;
    shi_lend_sweep(self, LOOKS);
    int64_t at = room_for(s, length);
    if (at < 0 && s->nloans) {
        shi_lend_sweep(self, s->nloans);
        at = room_for(s, length);
    }
    if (at < 0)
        return (int)at;
    memcpy(shi_arena_base(self->m, self->id) + at, data, length);
    csd->kind = SHI_K_PICKLE;
    csd->value.ref = (struct shi_ref){
        .offset = (uint64_t)at,
        .sum = shi_checksum(self->m, data, length),
        .length = (uint32_t)length,
        .cpu = (uint16_t)self->id,
        .gen = self->gen,
    };
    note(self, csd, shi_load_relaxed(&csd->lock), (uint64_t)at);
    shi_store_relaxed(&self->slot->lends, 1);
    /* The sender reads it, and the block, after the unlock. */
    shi_store_relaxed(&csd->status, (uint8_t)(status | SHI_S_LENT));
    return 0;
}

bool shi_lend_remind(struct shi_self *self, uint32_t dst)
{
    shi_a32 *starved = &shi_slot(self->m, dst)->starved;
    uint32_t waits = SHI_ST_WAITS;
    if (shi_load_full(starved) == SHI_ST_NO)
        return false;
    shi_cas_full(starved, &waits, SHI_ST_LOOK);
    return true;
}

void shi_lend_done(struct shi_self *self, struct shi_csd *csd)
{
    uint32_t cpu = csd->value.ref.cpu, waits = SHI_ST_WAITS;
    /* Full: releases the block after it was read (see wanted), and stands before the look
     * at `starved` (see shi_lend_starve). */
    shi_fetch_and_full(&csd->status, (uint8_t)~SHI_S_LENT);
    if (cpu >= self->m->ncpus ||
        shi_load_full(&shi_slot(self->m, cpu)->starved) != SHI_ST_WAITS)
        return;
    if (shi_cas_full(&shi_slot(self->m, cpu)->starved, &waits, SHI_ST_LOOK))
        shi_chip_prod(self, cpu);
}
