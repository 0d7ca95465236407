/* SPDX-License-Identifier: MIT */
/*
 * The MIPS GIC (drivers/irqchip/irq-mips-gic.c): interrupts are the machine's, not a
 * CPU's.  Each is routed to one CPU.  An edge interrupt is sent by writing its number to
 * WEDGE, and acknowledged by clearing it there before it is handled.  SMASK and RMASK
 * set and reset its mask bit; what comes while it is masked stays pending.
 *
 * Its handler copies what is pending once and dispatches the copy, least number first
 * (gic_handle_shared_int): one that comes again meanwhile waits for the next copy, so none
 * keeps those above it from being taken.
 *
 * Behind them are a CPU's local interrupts (GIC_LOCAL_INT_*): pending and masked in its own
 * part (VL_PEND, VL_MASK), not routed, and dispatched before the shared ones
 * (gic_handle_local_int).
 *
 * Which lines are a CPU's is in a mask of that CPU (the driver's pcpu_masks): a look is
 * three loads and an AND for 64 lines.
 */
#include "base/sys.h"

#include "irq/chip.h"
#include "irq/ring.h"

#define WORDS (SHI_NVECTORS / 64) /* of the shared ones: the local ones are in the next */
#define LOCAL WORDS

_Static_assert(LOCAL + 1 == SHI_NLINES / 64, "lines behind the shared ones are local");

static bool shared_set(struct shi_self *self, uint32_t dst, uint32_t line)
{
    const struct shi_machine *m = self->m;
    struct shi_irq_area *area = shi_irq_area(m);
    uint64_t bit = 1ull << (line % 64);
    uint32_t route;
    if (line / 64 == LOCAL) {
        shi_fetch_or_full(&shi_slot(m, dst)->irr[LOCAL], bit);
        return shi_load_full(&shi_pic(m, dst)->enable[LOCAL]) & bit;
    }
    shi_fetch_or_full(&area->shared[line / 64], bit);
    /* Pending first, mask and route second; SMASK and the map registers are written
     * first and pending is looked at second: one sees the other. */
    if (!(shi_load_full(&area->mask[line / 64]) & bit))
        return false;
    if (shi_load_full(&shi_pic(m, dst)->routed[line / 64]) & bit)
        return true;
    /* Routed to another CPU meanwhile: WEDGE knows no target. */
    route = shi_load_full(&area->route[line]);
    if (route - 1 < m->ncpus)
        shi_irq_ring(self, route - 1);
    return false;
}

/* Lines of one word that are pending, not masked, routed to `cpu`, and not waiting there
 * for a handler that was put off. */
static uint64_t mine(const struct shi_machine *m, uint32_t cpu, uint32_t word)
{
    const struct shi_irq_area *area = shi_irq_area(m);
    const struct shi_pic *pic = shi_pic(m, cpu);
    uint64_t pend, routed;
    if (word == LOCAL) {
        pend = shi_load_full(&shi_slot(m, cpu)->irr[LOCAL]); /* nearly always none */
        return pend ? pend & shi_load_full(&pic->enable[LOCAL]) &
                          ~shi_load_relaxed(&pic->isr[LOCAL])
                    : 0;
    }
    routed = shi_load_full(&pic->routed[word]);
    if (!routed)
        return 0;
    return shi_load_full(&area->shared[word]) & shi_load_full(&area->mask[word]) & routed &
           ~shi_load_relaxed(&pic->isr[word]);
}

/* Not masked here, and not routed away. */
static bool is_open(const struct shi_machine *m, uint32_t cpu, uint32_t line)
{
    const struct shi_irq_area *area = shi_irq_area(m);
    const struct shi_pic *pic = shi_pic(m, cpu);
    uint32_t word = line / 64;
    uint64_t on = word == LOCAL
                      ? shi_load_full(&pic->enable[LOCAL])
                      : shi_load_full(&area->mask[word]) & shi_load_full(&pic->routed[word]);
    return on >> (line % 64) & 1;
}

/* WEDGE, cleared.  False: it is not set any more (taken back), or masked, or routed away. */
static bool take(struct shi_self *self, shi_a64 *pend, uint32_t line)
{
    uint64_t bit = 1ull << (line % 64);
    if (!shi_kept_in_service(self->m, line))
        return shi_fetch_and_full(pend, ~bit) & bit;
    shi_line_begin(self, line);
    if (shi_fetch_and_full(pend, ~bit) & bit) {
        if (is_open(self->m, self->id, line))
            return true;
        /* Before it is let go of: whose it was it still is.  As its sender: who unmasked it,
         * or has it now, did not find it pending. */
        if (shared_set(self, self->id, line))
            shi_chip_recheck(self);
    }
    shi_line_done(self, line);
    return false;
}

/* The next line of the copy, or SHI_NO_LINE. */
static uint32_t dispatch(struct shi_self *self)
{
    struct shi_irq_area *area = shi_irq_area(self->m);
    uint32_t n;
    for (n = 0; n <= WORDS; n++) {
        uint32_t i = n ? n - 1 : LOCAL;
        shi_a64 *pend = i == LOCAL ? &self->slot->irr[LOCAL] : &area->shared[i];
        while (self->taken[i]) {
            uint64_t bit = self->taken[i] & (0 - self->taken[i]);
            uint32_t line = i * 64 + (uint32_t)__builtin_ctzll(bit);
            self->taken[i] &= ~bit;
            /* Masked since, or routed away: it stays pending for whoever unmasks it, or is
             * taken there. */
            if (!(mine(self->m, self->id, i) & bit) || !take(self, pend, line))
                continue;
            if (shi_kept_in_service(self->m, line))
                shi_set_in_service(self, line, true);
            return line;
        }
    }
    return SHI_NO_LINE;
}

static uint32_t shared_next(struct shi_self *self)
{
    uint32_t i, line;
    uint64_t found;
    do {
        if ((line = dispatch(self)) != SHI_NO_LINE)
            return line;
        for (i = 0, found = 0; i <= LOCAL; i++)
            found |= self->taken[i] = mine(self->m, self->id, i);
    } while (found);
    return SHI_NO_LINE;
}

static void shared_end(struct shi_self *self, uint32_t line)
{
    if (shi_kept_in_service(self->m, line))
        shi_set_in_service(self, line, false);
}

static bool shared_pending(const struct shi_machine *m, uint32_t cpu)
{
    uint32_t i;
    for (i = 0; i <= LOCAL; i++)
        if (mine(m, cpu, i))
            return true;
    return false;
}

static void shared_enable(struct shi_self *self, uint32_t cpu, uint32_t line, bool on)
{
    struct shi_irq_area *area = shi_irq_area(self->m);
    uint64_t bit = 1ull << (line % 64);
    uint32_t route;
    if (line / 64 == LOCAL) { /* VL_SMASK, VL_RMASK */
        shi_a64 *enable = &shi_pic(self->m, cpu)->enable[LOCAL];
        if (on)
            shi_fetch_or_full(enable, bit);
        else
            shi_fetch_and_full(enable, ~bit);
        return;
    }
    if (!on) {
        shi_fetch_and_full(&area->mask[line / 64], ~bit); /* RMASK */
        return;
    }
    shi_fetch_or_full(&area->mask[line / 64], bit); /* SMASK */
    route = shi_load_full(&area->route[line]);
    if (route - 1 < self->m->ncpus && route - 1 != cpu)
        shi_chip_look(self, route - 1, false); /* the caller looks at `cpu` */
}

static void shared_clear(struct shi_self *self, uint32_t cpu, uint32_t line)
{
    shi_a64 *pend = line / 64 == LOCAL ? &shi_slot(self->m, cpu)->irr[LOCAL]
                                       : &shi_irq_area(self->m)->shared[line / 64];
    shi_fetch_and_full(pend, ~(1ull << (line % 64)));
}

void shi_chip_route(struct shi_self *self, uint32_t line, uint32_t cpu)
{
    const struct shi_machine *m = self->m;
    struct shi_irq_area *area = shi_irq_area(m);
    uint64_t bit = 1ull << (line % 64);
    uint32_t old = shi_load_relaxed(&area->route[line]) - 1;
    if (line / 64 == LOCAL)
        return;
    if (old < m->ncpus && old != cpu)
        shi_fetch_and_full(&shi_pic(m, old)->routed[line / 64], ~bit);
    shi_store_full(&area->route[line], cpu + 1); /* SHI_NO_LINE + 1 is 0: nobody's */
    if (cpu >= m->ncpus)
        return;
    shi_fetch_or_full(&shi_pic(m, cpu)->routed[line / 64], bit);
    shi_chip_look(self, cpu, false); /* what is pending goes with it */
}

static void shared_reset(const struct shi_machine *m, uint32_t cpu)
{
    struct shi_irq_area *area = shi_irq_area(m);
    uint32_t i;
    for (i = 0; i < WORDS; i++) {
        uint64_t routed = shi_load_full(&shi_pic(m, cpu)->routed[i]), left;
        shi_fetch_and_full(&area->shared[i], ~routed);
        for (left = routed; left; left &= left - 1) {
            uint32_t bit = (uint32_t)__builtin_ctzll(left);
            if (m->chip.use[i * 64 + bit] != SHI_USE_IRQ)
                shi_fetch_or_full(&area->mask[i], 1ull << bit);
        }
    }
}

const struct shi_flow shi_flow_shared = {
    .name = "shared",
    .max_lines = SHI_NLINES,
    .routed = true,
    .set = shared_set,
    .next = shared_next,
    .end = shared_end,
    .pending = shared_pending,
    .enable = shared_enable,
    .clear = shared_clear,
    .reset = shared_reset,
};
