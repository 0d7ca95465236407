/* SPDX-License-Identifier: MIT */
#include "base/sys.h"

#include "base/step.h"
#include "irq/ring.h"
#include "smp/entry.h"
#include "smp/waitq.h"

/* An entry: ticket | exclusive | generation of its slot.  0: nobody waits. */
#define EXCLUSIVE 0x10000ull
#define TICKET_SHIFT 17
#define TICKETS (UINT64_MAX >> TICKET_SHIFT)

static uint32_t mask_words(const struct shi_machine *m)
{
    return (m->nslots + 63) / 64;
}

static shi_a64 *entry_of(const struct shi_self *self, const struct shi_waitq *q, uint32_t slot)
{
    return (shi_a64 *)&q->words[mask_words(self->m) + slot];
}

uint64_t shi_waitq_words(const struct shi_machine *m)
{
    return sizeof(struct shi_waitq) / sizeof(uint64_t) + mask_words(m) + m->nslots;
}

/* ---- waiting --------------------------------------------------------------------- */

static uint64_t new_entry(struct shi_self *self, struct shi_waitq *q, bool exclusive)
{
    uint64_t ticket = 0;
    while (!ticket) /* 0 is none; they come round after 2^47 */
        ticket = (shi_fetch_add_full(&q->ticket, 1) + 1) & TICKETS;
    return ticket << TICKET_SHIFT | (exclusive ? EXCLUSIVE : 0) | self->gen;
}

uint64_t shi_waitq_prepare(struct shi_self *self, struct shi_waitq *q, uint64_t ticket,
                           bool exclusive)
{
    shi_a64 *entry = entry_of(self, q, self->id);
    shi_a64 *mask = &q->words[self->id / 64];
    uint64_t bit = 1ull << (self->id % 64), found = shi_load_full(entry), next;
    for (;;) {
        bool own = (uint16_t)found == self->gen && found >> TICKET_SHIFT;
        /* Threads of a host share its entry, which wakes them all: they stand in it
         * together, and exclusively only if all do. */
        if (own && (self->host || found >> TICKET_SHIFT == ticket))
            next = exclusive ? found : found & ~EXCLUSIVE;
        else
            next = new_entry(self, q, exclusive);
        /* Full, as is the bit: the caller looks at its condition next.  Who wakes stores
         * the condition first and reads bits and entries second: one sees the other. */
        if (shi_cas_full(entry, &found, next))
            break;
    }
    shi_fetch_or_full(mask, bit);
    return next >> TICKET_SHIFT;
}

bool shi_waitq_stands(const struct shi_self *self, const struct shi_waitq *q, uint64_t ticket)
{
    return shi_load_full(entry_of(self, q, self->id)) >> TICKET_SHIFT == ticket;
}

bool shi_waitq_finish(struct shi_self *self, struct shi_waitq *q, uint64_t ticket)
{
    shi_a64 *entry = entry_of(self, q, self->id);
    uint64_t found = shi_load_full(entry);
    bool woken = true;
    /* Without a ticket, its own entry all the same: a CPU's is nobody else's, and threads of
     * a host stand up again. */
    while (found >> TICKET_SHIFT == ticket ||
           (!ticket && found >> TICKET_SHIFT && (uint16_t)found == self->gen))
        if (shi_cas_full(entry, &found, 0)) {
            woken = !ticket; /* or not, who knows */
            break;
        }
    if (self->host) {
        /* Other threads may have stood in this entry: they look, and make one again.  The
         * bit stays, as another thread may be setting it now. */
        if (!woken || !ticket)
            shi_irq_ring_waiter(self, self->id);
    } else {
        shi_fetch_and_full(&q->words[self->id / 64], ~(1ull << (self->id % 64)));
    }
    return woken;
}

/* ---- waking ---------------------------------------------------------------------- */

/* Is there still somebody behind an entry?  `now`: who can go on at once. */
static bool stands(const struct shi_self *self, uint32_t slot, uint64_t found, bool now)
{
    const struct shi_slot *s = shi_slot(self->m, slot);
    if (slot >= self->m->ncpus)
        return (uint16_t)shi_load_acquire(&s->generation) == (uint16_t)found;
    uint64_t w = shi_load_full(&s->word);
    return shi_word_gen(w) == (uint16_t)found &&
           (now ? shi_word_online(w) : shi_word_state(w) != SHI_DEAD);
}

/* Take the entry and wake who made it: false when it has changed. */
static bool take(struct shi_self *self, struct shi_waitq *q, uint32_t slot, uint64_t found)
{
    /* Full, and before the ring reads the CPU's word: it looks at its entry after it has
     * published HALTED (shi_halt_until), a host after it has read its event count. */
    if (!shi_cas_full(entry_of(self, q, slot), &found, 0))
        return false;
    shi_enter(self);
    shi_irq_ring_waiter(self, slot);
    shi_leave(self);
    return true;
}

/* Those who stand in the queue's mask, one after another. */
struct walk {
    uint32_t word;
    uint64_t bits;
};

/* The next one's slot and entry, which may be 0 by now; nslots: there is none. */
static uint32_t next_entry(const struct shi_self *self, const struct shi_waitq *q,
                           struct walk *walk, uint64_t *found)
{
    for (;;) {
        while (!walk->bits) {
            if (walk->word == mask_words(self->m))
                return self->m->nslots;
            walk->bits = shi_load_full(&q->words[walk->word++]);
        }
        uint32_t slot = (walk->word - 1) * 64 + (uint32_t)__builtin_ctzll(walk->bits);
        walk->bits &= walk->bits - 1;
        if (slot >= self->m->nslots)
            continue; /* damaged */
        *found = shi_load_full(entry_of(self, q, slot));
        return slot;
    }
}

/* The exclusive waiter that has waited longest: its slot, or nslots. */
static uint32_t longest(const struct shi_self *self, const struct shi_waitq *q, uint64_t *entry)
{
    struct walk walk = { 0, 0 };
    uint32_t slot, best = self->m->nslots;
    uint64_t found;
    *entry = UINT64_MAX;
    while ((slot = next_entry(self, q, &walk, &found)) != self->m->nslots)
        if (found & EXCLUSIVE && found < *entry && stands(self, slot, found, true)) {
            *entry = found;
            best = slot;
        }
    return best;
}

uint32_t shi_waitq_wake(struct shi_self *self, struct shi_waitq *q, uint32_t nr)
{
    struct walk walk = { 0, 0 };
    uint32_t slot, woken = 0, exclusive = 0, tries;
    uint64_t found;
    while ((slot = next_entry(self, q, &walk, &found)) != self->m->nslots) {
        if (!found)
            continue;
        if (!stands(self, slot, found, false)) /* it died: another may have the slot */
            shi_cas_full(entry_of(self, q, slot), &found, 0);
        else if (!(found & EXCLUSIVE) || nr == SHI_WAKE_ALL)
            woken += take(self, q, slot, found);
        else
            exclusive++;
    }
    if (nr == SHI_WAKE_ALL)
        return woken;
    /* One that is killed with its wake-up in hand passes nothing on: the others look at
     * their condition when the reaper rings them, and by their own clock. */
    for (tries = 0; exclusive && nr && tries <= self->m->nslots; tries++) {
        slot = longest(self, q, &found);
        if (slot == self->m->nslots)
            break;
        if (take(self, q, slot, found)) {
            woken++;
            nr--;
        }
    }
    return woken;
}

bool shi_waitq_active(const struct shi_self *self, const struct shi_waitq *q)
{
    struct walk walk = { 0, 0 };
    uint32_t slot;
    uint64_t found;
    while ((slot = next_entry(self, q, &walk, &found)) != self->m->nslots)
        if (found && stands(self, slot, found, false))
            return true;
    return false;
}

/* ---- completions ----------------------------------------------------------------- */

void shi_complete(struct shi_self *self, struct shi_waitq *q, bool all)
{
    uint64_t done = shi_load_relaxed(&q->done);
    /* Full: what the caller stored before is seen by who takes it (shi_completion_take),
     * and it stands before the look at who waits. */
    while (!shi_cas_full(&q->done, &done,
                         all || done >= SHI_COMPLETED_ALL ? SHI_COMPLETED_ALL : done + 1))
        ;
    SHI_STEP(self, complete);
    shi_waitq_wake(self, q, all ? SHI_WAKE_ALL : 1);
}

bool shi_completion_take(struct shi_waitq *q)
{
    uint64_t done = shi_load_full(&q->done);
    do {
        if (!done)
            return false;
        if (done >= SHI_COMPLETED_ALL)
            return true;
    } while (!shi_cas_full(&q->done, &done, done - 1));
    return true;
}
