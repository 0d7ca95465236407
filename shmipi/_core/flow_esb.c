/* SPDX-License-Identifier: MIT */
/*
 * XIVE with powerpc's muxed IPIs over it (arch/powerpc/sysdev/xive/common.c and
 * arch/powerpc/kernel/smp.c).
 *
 * Each source has two bits, P (a notification is on its way or being handled) and Q (it
 * came again meanwhile); a trigger only notifies when it finds both clear, and EOI
 * triggers again when it finds Q.  P is bit `source` of irr[0] and Q bit 32 + `source`,
 * so that a trigger is one compare-and-swap: nobody can die between P and its
 * notification.  What is notified is put in the CPU's event queue, whose entries carry a
 * generation bit that flips at each turn of the ring, and taken from there.
 *
 * Source 0 is the one IPI a CPU has.  Behind it are `messages`, a byte each; its handler
 * (smp_ipi_demux) exchanges them with zero until there are none.  Bit 31 is the core
 * doorbell (msgsnd), the second way in for siblings; it has no Q.
 */
#include "sys.h"

#include "chip.h"
#include "trace.h"

#define IPI_SOURCE 0u
#define FIRST_SOURCE 8u /* lines below are messages */
#define DOORBELL 31u
#define SOURCES 0x7fffffffull
#define PRIORITY 7u /* xive_irq_priority, of IPIs and devices alike */
#define EQ_GENERATION 0x80000000u

/* paca->irq_happened (asm/hw_irq.h). */
#define PACA_IRQ_DBELL 0x02u
#define PACA_IRQ_EE 0x04u

enum { NOT_DEMUXING, BY_XIVE, BY_DOORBELL };

/* smp_ipi_demux_relaxed: a host action before the function calls that flush for it. */
static const uint8_t order[] = {4, 0, 1, 2, 3};

static bool trigger(struct shi_self *self, uint32_t dst, uint32_t source)
{
    shi_a64 *esb = &shi_slot(self->m, dst)->irr[0];
    const uint64_t p = 1ull << source, q = p << 32;
    uint64_t was = shi_load_relaxed(esb), next;
    do {
        if (was & p)
            next = was | q; /* 10 -> 11, 11 absorbs */
        else if (was & q)
            next = was; /* 01: off */
        else
            next = was | p;
        /* Full: xive_cause_ipi's barrier between the message and the trigger. */
    } while (!shi_cas_full(esb, &was, next));
    SHI_TRACE(self, chip_trigger, dst, 0, 0,
              (uint32_t)(!!(was & p) * 2 + !!(was & q)) | source << 8);
    /* P, found without Q, was somebody's who may have died before he rang: a ring more. */
    return !(was & q);
}

static bool siblings(const struct shi_self *self, uint32_t dst)
{
    uint32_t n = self->m->chip.siblings;
    return n > 1 && !self->host && dst / n == self->id / n;
}

static bool esb_set(struct shi_self *self, uint32_t dst, uint32_t line)
{
    struct shi_slot *slot = shi_slot(self->m, dst);
    if (line >= FIRST_SOURCE)
        return trigger(self, dst, line);
    /* smp_muxed_ipi_set_message: a plain byte store, nobody else's byte is touched. */
    shi_store_full((shi_a8 *)(void *)&slot->pic.messages + line, 1);
    SHI_TRACE(self, chip_message, dst, 0, 0, line);
    if (siblings(self, dst)) {
        shi_fetch_or_full(&slot->irr[0], 1ull << DOORBELL);
        return true;
    }
    return trigger(self, dst, IPI_SOURCE);
}

/* Sources with P that are not handled yet. */
static uint64_t notified(const struct shi_machine *m, uint32_t cpu)
{
    const struct shi_pic *pic = shi_pic(m, cpu);
    return shi_load_full(&shi_slot(m, cpu)->irr[0]) & SOURCES &
           ~shi_load_relaxed(&pic->isr[0]) & (shi_load_relaxed(&pic->enable[0]) | 1);
}

/* CPPR lets interrupts through whose priority is above (their number below) it. */
static bool let_through(const struct shi_pic *pic)
{
    return PRIORITY < 0xffu - (shi_load_relaxed(&pic->threshold) & 0xffu) &&
           !shi_load_relaxed(&pic->iar);
}

/* The controller's half: notifications to the event queue. */
static void present(struct shi_self *self)
{
    struct shi_pic *pic = &self->slot->pic;
    uint64_t found = notified(self->m, self->id);
    while (found) {
        uint32_t source = (uint32_t)__builtin_ctzll(found);
        uint32_t put = shi_load_relaxed(&pic->eq_put);
        found &= found - 1;
        shi_store_relaxed(&pic->isr[0], shi_load_relaxed(&pic->isr[0]) | 1ull << source);
        /* The first turn has generation 1: a ring of zeros is empty. */
        shi_store_relaxed(&pic->eq[put % SHI_EQ],
                          ((put / SHI_EQ) % 2 ? 0 : EQ_GENERATION) | (source + 1));
        shi_store_relaxed(&pic->eq_put, put + 1);
    }
}

/* xive_scan_interrupts: the next entry, if its generation is that of this turn. */
static uint32_t event(struct shi_self *self)
{
    struct shi_pic *pic = &self->slot->pic;
    uint32_t at = shi_load_relaxed(&pic->eq_at);
    uint32_t entry = shi_load_relaxed(&pic->eq[at % SHI_EQ]);
    uint32_t generation = (at / SHI_EQ) % 2 ? 0 : EQ_GENERATION;
    if (!entry || (entry & EQ_GENERATION) != generation)
        return SHI_NO_LINE;
    shi_store_relaxed(&pic->eq_at, at + 1);
    shi_store_relaxed(&pic->iar, PRIORITY); /* CPPR: nothing of this priority until EOI */
    return (entry & ~EQ_GENERATION) - 1;
}

/* ESB load with SET_PQ_00; a Q that was set triggers again. */
static void source_eoi(struct shi_self *self, uint32_t source)
{
    struct shi_pic *pic = &self->slot->pic;
    const uint64_t p = 1ull << source, q = p << 32;
    uint64_t was, next;
    shi_store_relaxed(&pic->isr[0], shi_load_relaxed(&pic->isr[0]) & ~p);
    shi_store_relaxed(&pic->iar, 0);
    was = shi_load_relaxed(&self->slot->irr[0]);
    do {
        next = was & ~(p | q);
        if (was & q && was & p)
            next |= p;
    } while (!shi_cas_full(&self->slot->irr[0], &was, next));
    SHI_TRACE(self, chip_eoi, self->id, 0, 0, (uint32_t)(!!(was & q)) | source << 8);
}

static uint64_t message_bits(uint64_t all)
{
    uint64_t bits = 0;
    uint32_t i;
    for (i = 0; i < FIRST_SOURCE; i++)
        if (all >> (8 * i) & 0xff)
            bits |= 1ull << i;
    return bits;
}

static uint32_t next_message(uint64_t *bits)
{
    size_t i;
    for (i = 0; i < sizeof order; i++)
        if (*bits & 1ull << order[i]) {
            *bits &= ~(1ull << order[i]);
            return order[i];
        }
    uint32_t line = (uint32_t)__builtin_ctzll(*bits); /* no PPC_MSG_*: reported */
    *bits &= *bits - 1;
    return line;
}

static uint32_t esb_next(struct shi_self *self)
{
    struct shi_pic *pic = &self->slot->pic;
    shi_store_relaxed(&pic->happened, 0);
    for (;;) {
        if (self->taken[0])
            return next_message(&self->taken[0]);
        if (self->demuxing) {
            self->taken[0] = message_bits(shi_xchg_full(&pic->messages, 0));
            if (self->taken[0])
                continue;
            if (self->demuxing == BY_XIVE)
                source_eoi(self, IPI_SOURCE);
            self->demuxing = NOT_DEMUXING;
        }
        if (let_through(pic)) {
            present(self);
            uint32_t source = event(self);
            if (source != SHI_NO_LINE && source != IPI_SOURCE)
                return source;
            if (source == IPI_SOURCE) {
                self->demuxing = BY_XIVE;
                continue;
            }
        }
        if (!(shi_load_relaxed(&self->slot->irr[0]) & 1ull << DOORBELL))
            return SHI_NO_LINE;
        /* Cleared before the messages are read: a byte stored since rings anew. */
        shi_fetch_and_full(&self->slot->irr[0], ~(1ull << DOORBELL));
        self->demuxing = BY_DOORBELL;
    }
}

static void esb_end(struct shi_self *self, uint32_t line)
{
    if (line >= FIRST_SOURCE)
        source_eoi(self, line);
}

static bool esb_pending(const struct shi_machine *m, uint32_t cpu)
{
    return (shi_load_full(&shi_slot(m, cpu)->irr[0]) & 1ull << DOORBELL) ||
           (let_through(shi_pic(m, cpu)) && notified(m, cpu));
}

static void esb_reset(const struct shi_machine *m, uint32_t cpu)
{
    struct shi_pic *pic = shi_pic(m, cpu);
    uint32_t i;
    for (i = 0; i < SHI_EQ; i++)
        shi_store_relaxed(&pic->eq[i], 0);
    shi_store_relaxed(&pic->eq_at, 0);
    shi_store_relaxed(&pic->eq_put, 0);
    shi_store_relaxed(&pic->iar, 0);
}

void shi_esb_note_masked(struct shi_self *self)
{
    uint64_t lines = shi_load_relaxed(&self->slot->irr[0]);
    uint32_t happened = 0;
    if (lines & SOURCES)
        happened |= PACA_IRQ_EE;
    if (lines & 1ull << DOORBELL)
        happened |= PACA_IRQ_DBELL;
    shi_store_relaxed(&self->slot->pic.happened,
                      shi_load_relaxed(&self->slot->pic.happened) | happened);
}

const struct shi_flow shi_flow_esb = {
    .name = "esb",
    .set = esb_set,
    .next = esb_next,
    .end = esb_end,
    .pending = esb_pending,
    .reset = esb_reset,
};
