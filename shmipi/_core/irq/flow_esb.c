/* SPDX-License-Identifier: MIT */
/*
 * XIVE with powerpc's muxed IPIs over it (arch/powerpc/sysdev/xive/common.c and
 * arch/powerpc/kernel/smp.c), and the core doorbell (arch/powerpc/kernel/dbell.c).
 *
 * An interrupt source is a pair of bits, P and Q.  A trigger that finds both clear sets P
 * and sends a notification; one that finds P sets Q and is absorbed.  An EOI clears P, or
 * when Q was set clears that and notifies again.  Q without P is off: triggers are lost.
 *
 * A notification is an entry of the CPU's event queue, written as the source notifies and
 * read first in, first out (xive_read_eq).  Here it is a bit (`N`) and, behind others, a
 * turn; its CPU writes the entries of all that have notified, in that order, before it
 * reads one.  So a trigger is one compare-and-swap of P, Q and N, and nobody can die between
 * P and its notification.  That of a source that is masked when its CPU looks is held until
 * it is unmasked, and then queued anew, as a retrigger does.
 *
 * Source 0 is the one IPI that a CPU has.  Behind it are `messages`, a byte each; its
 * handler (xive_muxed_ipi_action, smp_ipi_demux) exchanges them with zero until there
 * are none.  The doorbell is one bit, without Q and below no CPPR, that leads to the same
 * messages (doorbell_exception).
 */
#include "base/sys.h"

#include <errno.h>

#include "base/trace.h"
#include "irq/chip.h"

/* Lines, as shmipi/irq/chips/xive.py has them. */
#define IPI_LINE 5u      /* a trigger of source 0, whatever the messages are */
#define DOORBELL_LINE 6u /* msgsnd */
#define MESSAGES 8u      /* lines below this one, those two aside, are messages */

/* irr[0]: P, Q and N of each source, and the doorbell. */
#define SOURCES 21u
#define P(source) (1ull << (source))
#define Q(source) (P(source) << SOURCES)
#define N(source) (P(source) << 2 * SOURCES)
#define ALL ((1ull << SOURCES) - 1)
#define DOORBELL (1ull << 63)

/* irr[1] to irr[3], in the line of irr[0]: a byte for each source, its turn among those
 * that have notified, and behind them the byte that counts turns.  0: it found no other
 * notification when it came, and is before all that have a turn; HELD: after them, and
 * not at all while it is masked.  Turns are modulo 128, from 1: that far apart are
 * no two of the 21 that there can be. */
#define TURNS 128u
#define HELD 0xffu

#define IPI_SOURCE 0u
#define PRIORITY 7u /* xive_irq_priority, of IPIs and devices alike */
#define EQ_GENERATION 0x80000000u

/* ESB pages (asm/xive-regs.h): each of these is where a range begins.  A load below
 * ESB_GET is an EOI, a store below ESB_STORE_EOI a trigger. */
#define ESB_STORE_EOI 0x400u
#define ESB_GET 0x800u
#define ESB_SET_PQ_00 0xc00u
#define ESB_END 0x1000u
#define ESB_VAL_P 2u
#define ESB_VAL_Q 1u

/* paca->irq_happened (asm/hw_irq.h).  HMI, DEC and PMI do not arise here. */
#define PACA_IRQ_HARD_DIS 0x01u
#define PACA_IRQ_DBELL 0x02u
#define PACA_IRQ_EE 0x04u

enum { NOT_DEMUXING, BY_XIVE, BY_DOORBELL, BY_HAND };

_Static_assert(3 * SOURCES == 63, "P, Q, N and the doorbell fill a word");
_Static_assert(MESSAGES - 1 + SOURCES == SHI_ESB_LINES, "a line for each source");
_Static_assert(SOURCES + 1 <= (SHI_NLINES / 64 - 1) * 8, "turns are in irr[1] and up");

static uint32_t source_of(uint32_t line)
{
    return line < MESSAGES ? IPI_SOURCE : line - (MESSAGES - 1);
}

static uint32_t line_of(uint32_t source)
{
    return source == IPI_SOURCE ? IPI_LINE : source + (MESSAGES - 1);
}

static uint32_t pq(uint64_t esb, uint32_t source)
{
    return (esb & P(source) ? ESB_VAL_P : 0) | (esb & Q(source) ? ESB_VAL_Q : 0);
}

/* Sources that are not masked; masking the IPI does nothing (xive_ipi_do_nothing). */
static uint64_t enabled(const struct shi_pic *pic)
{
    return (shi_load_relaxed(&pic->enable[0]) >> (MESSAGES - 1) & ALL) | P(IPI_SOURCE);
}

/* CPPR lets through what is more favoured: of a lower number.  Nothing is, of the one
 * priority that there is, between taking an interrupt and its EOI. */
static bool let_through(const struct shi_pic *pic)
{
    return PRIORITY < 0xffu - (shi_load_relaxed(&pic->threshold) & 0xffu) &&
           !shi_load_relaxed(&pic->iar);
}

static bool external_pending(const struct shi_pic *pic, uint64_t esb)
{
    bool queued = shi_load_relaxed(&pic->eq_put) != shi_load_relaxed(&pic->eq_at);
    return let_through(pic) && (queued || esb >> 2 * SOURCES & enabled(pic));
}

static bool esb_pending(const struct shi_machine *m, uint32_t cpu)
{
    /* Full, and first: a sender has set its bit, the owner has changed its masks. */
    uint64_t esb = shi_load_full(&shi_slot(m, cpu)->irr[0]);
    return esb & DOORBELL || external_pending(shi_pic(m, cpu), esb);
}

/* ---- the order of notifications -------------------------------------------------- */

static shi_a8 *turn_of(const struct shi_machine *m, uint32_t cpu, uint32_t source)
{
    return (shi_a8 *)(void *)&shi_slot(m, cpu)->irr[1] + source;
}

/* A turn after all that were given, in place of `was`. */
static void give_turn(const struct shi_machine *m, uint32_t cpu, uint32_t source, uint8_t was)
{
    uint32_t n = shi_fetch_add_full(turn_of(m, cpu, SOURCES), 1);
    /* Full, and before N is set: the owner that finds N finds the turn.  Only in place of
     * `was`: of two that trigger one source at once the second is absorbed, and must not
     * move what the first has queued behind what came in between. */
    shi_cas_full(turn_of(m, cpu, source), &was, (uint8_t)(1 + n % TURNS));
}

/* To be called before N of `source` is set in what is `esb` now. */
static inline void queue_up(const struct shi_machine *m, uint32_t cpu, uint32_t source,
                            uint64_t esb)
{
    if (__builtin_expect((esb >> 2 * SOURCES & ALL & ~P(source)) != 0, 0) &&
        !shi_load_relaxed(turn_of(m, cpu, source)))
        give_turn(m, cpu, source, 0);
}

/* Of these notifications the first that came. */
static uint32_t oldest(struct shi_self *self, uint64_t found)
{
    uint32_t first = (uint32_t)__builtin_ctzll(found), source;
    for (found &= found - 1; found; found &= found - 1) {
        source = (uint32_t)__builtin_ctzll(found);
        uint32_t a = shi_load_relaxed(turn_of(self->m, self->id, source));
        uint32_t b = shi_load_relaxed(turn_of(self->m, self->id, first));
        if (b && a != HELD && (!a || b == HELD || (a - b) % TURNS > TURNS / 2))
            first = source;
    }
    return first;
}

/* ---- the sender's side ----------------------------------------------------------- */

static void trigger(struct shi_self *self, uint32_t dst, uint32_t source)
{
    shi_a64 *esb = &shi_slot(self->m, dst)->irr[0];
    /* Lazily masked, what is held already is all there will be: IRQS_PENDING is a flag. */
    bool masked = !(enabled(shi_pic(self->m, dst)) & P(source));
    uint64_t was = shi_load_relaxed(esb), next;
    do {
        next = was;
        if (!(was & (P(source) | Q(source)))) {
            queue_up(self->m, dst, source, was);
            next |= P(source) | N(source);
        } else if (was & P(source) && !(was & N(source) && masked))
            next |= Q(source);
        /* Full, changed or not: cause_ipi's barrier between message and trigger. */
    } while (!shi_cas_full(esb, &was, next));
    SHI_TRACE(self, chip_trigger, dst, 0, 0, pq(was, source) | line_of(source) << 8);
}

static void doorbell(struct shi_self *self, uint32_t dst)
{
    shi_fetch_or_full(&shi_slot(self->m, dst)->irr[0], DOORBELL);
}

/* cpu_sibling_mask: this CPU is in its own. */
static bool sibling(const struct shi_self *self, uint32_t dst)
{
    uint32_t n = self->m->chip.siblings;
    return n > 1 && !self->host && dst / n == self->id / n;
}

void shi_esb_message(struct shi_self *self, uint32_t dst, uint32_t message)
{
    /* Nobody else's byte is touched, so senders need no read-modify-write.  Release: what
     * was stored before is seen by whoever finds it, whatever he was interrupted by. */
    shi_store_release((shi_a8 *)(void *)&shi_pic(self->m, dst)->messages + message, 1);
    SHI_TRACE(self, chip_message, dst, 0, 0, message);
}

static bool esb_set(struct shi_self *self, uint32_t dst, uint32_t line)
{
    if (line == DOORBELL_LINE) {
        doorbell(self, dst);
    } else if (line == IPI_LINE || line >= MESSAGES) {
        trigger(self, dst, source_of(line));
    } else {
        shi_esb_message(self, dst, line);
        if (sibling(self, dst)) /* dbell_or_ic_cause_ipi */
            doorbell(self, dst);
        else
            trigger(self, dst, IPI_SOURCE);
    }
    /* Absorbed or held back by a mask, it needs no ring: what ends the one or takes the
     * other away looks again.  Else ring, though P was there before: its sender may have
     * died before he did. */
    return esb_pending(self->m, dst);
}

/* ---- the ESB pages --------------------------------------------------------------- */

/* EOI at the source: true when it notified again. */
static bool source_eoi(struct shi_self *self, uint32_t cpu, uint32_t source)
{
    shi_a64 *esb = &shi_slot(self->m, cpu)->irr[0];
    uint64_t was = shi_load_relaxed(esb), next;
    do {
        next = was;
        if (pq(was, source) == (ESB_VAL_P | ESB_VAL_Q)) {
            queue_up(self->m, cpu, source, was);
            next = (was & ~Q(source)) | N(source);
        } else if (was & P(source))
            next = was & ~P(source);
        /* Full: the masks that its caller opened stand before the bits. */
    } while (!shi_cas_full(esb, &was, next));
    bool again = next != was && next & P(source);
    SHI_TRACE(self, chip_eoi, cpu, 0, 0, (uint32_t)again | line_of(source) << 8);
    return again;
}

static bool has_esb(const struct shi_self *self, uint32_t line, uint32_t offset)
{
    return self->m->flow == &shi_flow_esb && (line == IPI_LINE || line >= MESSAGES) &&
           offset < ESB_END;
}

/* P and Q as offset bits 9 and 8 say; what they were. */
static uint32_t set_pq(struct shi_self *self, uint32_t cpu, uint32_t source, uint32_t offset)
{
    shi_a64 *esb = &shi_slot(self->m, cpu)->irr[0];
    uint64_t was = shi_load_relaxed(esb), next;
    uint32_t set = offset >> 8 & 3;
    do {
        next = was & ~(P(source) | Q(source));
        next |= (set & ESB_VAL_P ? P(source) : 0) | (set & ESB_VAL_Q ? Q(source) : 0);
        /* What was notified is in the queue, or as good as: it stays. */
    } while (!shi_cas_full(esb, &was, next));
    return pq(was, source);
}

int shi_esb_load(struct shi_self *self, uint32_t cpu, uint32_t line, uint32_t offset)
{
    uint32_t source = source_of(line);
    if (!has_esb(self, line, offset))
        return -EINVAL;
    if (offset >= ESB_SET_PQ_00)
        return (int)set_pq(self, cpu, source, offset);
    if (offset >= ESB_GET)
        return (int)pq(shi_load_full(&shi_slot(self->m, cpu)->irr[0]), source);
    bool again = source_eoi(self, cpu, source);
    shi_chip_look(self, cpu, false);
    return again;
}

int shi_esb_store(struct shi_self *self, uint32_t cpu, uint32_t line, uint32_t offset)
{
    uint32_t source = source_of(line);
    if (!has_esb(self, line, offset))
        return -EINVAL;
    if (offset >= ESB_SET_PQ_00) {
        set_pq(self, cpu, source, offset);
        return 0;
    }
    if (offset >= ESB_GET)
        return -EINVAL; /* undefined */
    if (offset < ESB_STORE_EOI)
        trigger(self, cpu, source);
    else
        source_eoi(self, cpu, source);
    shi_chip_look(self, cpu, false);
    return 0;
}

/* ---- the CPU's side -------------------------------------------------------------- */

/* The kernel reads the entry of a masked source and sets it aside (IRQS_PENDING). */
static void hold(struct shi_self *self, uint64_t masked)
{
    for (; masked; masked &= masked - 1)
        shi_store_relaxed(turn_of(self->m, self->id, (uint32_t)__builtin_ctzll(masked)), HELD);
}

/* XIVE: what was notified goes to the event queue, in its order. */
static void enqueue(struct shi_self *self)
{
    struct shi_pic *pic = &self->slot->pic;
    uint64_t all = shi_load_full(&self->slot->irr[0]) >> 2 * SOURCES & ALL;
    uint64_t found = all & enabled(pic);
    uint32_t put = shi_load_relaxed(&pic->eq_put);
    if (__builtin_expect(all != found, 0))
        hold(self, all & ~found);
    while (found && put - shi_load_relaxed(&pic->eq_at) < SHI_EQ) {
        uint32_t source = oldest(self, found);
        /* The first turn's generation is 1: a ring of zeros is empty. */
        uint32_t generation = put / SHI_EQ % 2 ? 0 : EQ_GENERATION;
        found &= ~P(source);
        /* The turn first: who sets N again takes a new one. */
        if (shi_load_relaxed(turn_of(self->m, self->id, source)))
            shi_store_relaxed(turn_of(self->m, self->id, source), 0);
        bool irq = shi_kept_in_service(self->m, line_of(source));
        if (irq)
            shi_line_begin(self, line_of(source));
        uint64_t was = shi_fetch_and_full(&self->slot->irr[0], ~N(source));
        if (irq && !(was & N(source))) { /* somebody has taken it back meanwhile */
            shi_line_done(self, line_of(source));
            continue;
        }
        shi_store_relaxed(&pic->eq[put % SHI_EQ], generation | line_of(source));
        shi_store_relaxed(&pic->eq_put, ++put);
    }
}

/* xive_read_eq: the next entry, if its generation is that of this turn. */
static uint32_t read_eq(struct shi_pic *pic)
{
    uint32_t at = shi_load_relaxed(&pic->eq_at);
    uint32_t entry = shi_load_relaxed(&pic->eq[at % SHI_EQ]);
    uint32_t generation = at / SHI_EQ % 2 ? 0 : EQ_GENERATION;
    uint32_t source = source_of(entry & ~EQ_GENERATION);
    if ((entry & EQ_GENERATION) != generation || source >= SOURCES)
        return SHI_NO_LINE;
    shi_store_relaxed(&pic->eq_at, at + 1);
    return source;
}

/* xive_get_irq: take the next external interrupt.  Its source, or SHI_NO_LINE. */
static uint32_t get_irq(struct shi_self *self)
{
    struct shi_pic *pic = &self->slot->pic;
    uint32_t source;
    if (!let_through(pic))
        return SHI_NO_LINE;
    enqueue(self);
    while ((source = read_eq(pic)) != SHI_NO_LINE) {
        if (enabled(pic) & P(source)) {
            shi_store_relaxed(&pic->iar, PRIORITY);
            shi_store_relaxed(&pic->isr[0],
                              shi_load_relaxed(&pic->isr[0]) | 1ull << line_of(source));
            return source;
        }
        /* Masked since it was put there: kept for its unmasking, as IRQS_PENDING is, which
         * may have come in between.  But without P it was taken back, and is stale. */
        uint64_t was = shi_load_relaxed(&self->slot->irr[0]);
        if (was & P(source))
            shi_store_relaxed(turn_of(self->m, self->id, source), HELD);
        while (was & P(source) && !shi_cas_full(&self->slot->irr[0], &was, was | N(source)))
            ;
        shi_line_done(self, line_of(source));
        enqueue(self);
    }
    return SHI_NO_LINE;
}

static void end(struct shi_self *self, uint32_t line)
{
    struct shi_pic *pic = &self->slot->pic;
    uint64_t serving = shi_load_relaxed(&pic->isr[0]);
    if (!(serving & 1ull << line))
        return; /* by hand already */
    shi_store_relaxed(&pic->isr[0], serving & ~(1ull << line));
    shi_store_relaxed(&pic->iar, 0);
    source_eoi(self, self->id, source_of(line));
}

static uint64_t message_bits(uint64_t all)
{
    uint64_t bits = 0;
    uint32_t i;
    for (i = 0; i < MESSAGES; i++)
        if (all >> (8 * i) & 0xff)
            bits |= 1ull << i;
    return bits;
}

static uint32_t next_message(uint64_t *bits)
{
    /* A host action first: kick_all_cpus_sync relies on a function call flushing it. */
    uint32_t line = *bits & 1ull << SHI_PPC_MSG_RM_HOST_ACTION
                        ? SHI_PPC_MSG_RM_HOST_ACTION
                        : (uint32_t)__builtin_ctzll(*bits);
    *bits &= ~(1ull << line);
    return line;
}

static void enter(struct shi_self *self, uint8_t by, uint32_t line)
{
    self->demuxing = by;
    SHI_TRACE(self, line_ack, self->id, 0, 0, line);
    shi_chip_count_row(self, line);
    shi_cause(self, SHI_CAUSE_mux);
}

static uint32_t esb_next(struct shi_self *self)
{
    struct shi_pic *pic = &self->slot->pic;
    for (;;) {
        if (self->taken[0])
            return next_message(&self->taken[0]);
        if (self->demuxing) { /* smp_ipi_demux_relaxed */
            uint8_t by = self->demuxing;
            self->taken[0] = message_bits(shi_xchg_full(&pic->messages, 0));
            SHI_TRACE(self, chip_demux, self->id, 0, 0, (uint32_t)self->taken[0]);
            if (self->taken[0])
                continue;
            self->demuxing = NOT_DEMUXING;
            if (by == BY_HAND)
                return SHI_NO_LINE;
            if (by == BY_XIVE)
                end(self, IPI_LINE);
        }
        /* External interrupts before doorbells: the order of the architecture, and that
         * of the replay (arch_local_irq_restore). */
        uint32_t source = get_irq(self);
        if (source == IPI_SOURCE) {
            enter(self, BY_XIVE, IPI_LINE);
        } else if (source != SHI_NO_LINE) {
            return line_of(source);
        } else if (shi_load_full(&self->slot->irr[0]) & DOORBELL) {
            /* Cleared before the messages are read: a byte stored since rings anew. */
            shi_fetch_and_full(&self->slot->irr[0], ~DOORBELL);
            enter(self, BY_DOORBELL, DOORBELL_LINE);
        } else {
            shi_store_relaxed(&pic->happened, 0);
            return SHI_NO_LINE;
        }
        shi_store_relaxed(&pic->spurious, 0);
    }
}

void shi_esb_demux(struct shi_self *self)
{
    uint8_t by = self->demuxing; /* a handler may call it */
    self->demuxing = BY_HAND;
    shi_chip_take(self);
    self->demuxing = by;
    /* A handler's wait may have looked at the chip meanwhile, and seen messages only. */
    shi_chip_recheck(self);
}

static void esb_end(struct shi_self *self, uint32_t line)
{
    if (line >= MESSAGES)
        end(self, line);
}

/* What was held for the mask comes again, behind what has come meanwhile. */
static void esb_enable(struct shi_self *self, uint32_t cpu, uint32_t line, bool on)
{
    shi_a64 *word = &shi_pic(self->m, cpu)->enable[0];
    if (!on) {
        shi_fetch_and_full(word, ~(1ull << line));
        return;
    }
    if (line >= MESSAGES && shi_load_relaxed(turn_of(self->m, cpu, source_of(line))) == HELD)
        give_turn(self->m, cpu, source_of(line), HELD);
    /* If the owner holds it only now, it finds it unmasked when it looks once more. */
    shi_fetch_or_full(word, 1ull << line);
}

static void esb_clear(struct shi_self *self, uint32_t cpu, uint32_t line)
{
    shi_a64 *esb = &shi_slot(self->m, cpu)->irr[0];
    uint32_t source = source_of(line);
    if (line < MESSAGES)
        return;
    shi_fetch_and_full(esb, ~(P(source) | Q(source) | N(source)));
    shi_store_relaxed(turn_of(self->m, cpu, source), 0);
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

/* masked_interrupt: an external one stays asserted, so MSR[EE] has to go off, and with it
 * whatever comes after; a doorbell has cleared itself. */
static void esb_masked(struct shi_self *self)
{
    struct shi_pic *pic = &self->slot->pic;
    uint64_t esb = shi_load_full(&self->slot->irr[0]);
    uint32_t happened = shi_load_relaxed(&pic->happened);
    if (happened & PACA_IRQ_HARD_DIS)
        return;
    if (esb & DOORBELL)
        happened |= PACA_IRQ_DBELL;
    if (external_pending(pic, esb))
        happened |= PACA_IRQ_EE | PACA_IRQ_HARD_DIS;
    shi_store_relaxed(&pic->happened, happened);
}

const struct shi_flow shi_flow_esb = {
    .name = "esb",
    .max_lines = SHI_ESB_LINES,
    .set = esb_set,
    .next = esb_next,
    .end = esb_end,
    .pending = esb_pending,
    .enable = esb_enable,
    .clear = esb_clear,
    .reset = esb_reset,
    .masked = esb_masked,
};
