/* SPDX-License-Identifier: MIT */
/*
 * The MIPS GIC (drivers/irqchip/irq-mips-gic.c): interrupts are the machine's, not a
 * CPU's.  Each is routed to one CPU.  An edge interrupt is sent by writing its number to
 * WEDGE, and acknowledged by clearing it there before it is handled.  SMASK and RMASK
 * set and reset its mask bit; what comes while it is masked stays pending.
 */
#include "sys.h"

#include "chip.h"

static bool shared_set(struct shi_self *self, uint32_t dst, uint32_t line)
{
    struct shi_irq_area *area = shi_irq_area(self->m);
    uint64_t bit = 1ull << (line % 64);
    shi_fetch_or_full(&area->shared[line / 64], bit);
    (void)dst;
    /* Pending first, mask second: see shi_chip_enable. */
    return shi_load_full(&area->mask[line / 64]) & bit;
}

/* Lines of one word that are pending, not masked and routed to `cpu`. */
static uint64_t mine(const struct shi_machine *m, uint32_t cpu, uint32_t word)
{
    const struct shi_irq_area *area = shi_irq_area(m);
    uint64_t found = shi_load_full(&area->shared[word]) & shi_load_relaxed(&area->mask[word]);
    uint64_t left = found;
    while (left) {
        uint32_t bit = (uint32_t)__builtin_ctzll(left);
        left &= left - 1;
        if (shi_load_relaxed(&area->route[word * 64 + bit]) != cpu + 1)
            found &= ~(1ull << bit);
    }
    return found;
}

static uint32_t shared_next(struct shi_self *self)
{
    struct shi_irq_area *area = shi_irq_area(self->m);
    uint32_t i;
    for (i = 0; i < SHI_NLINES / 64; i++) {
        uint64_t found = mine(self->m, self->id, i);
        if (found) {
            uint32_t bit = (uint32_t)__builtin_ctzll(found);
            shi_fetch_and_full(&area->shared[i], ~(1ull << bit)); /* WEDGE, cleared */
            return i * 64 + bit;
        }
    }
    return SHI_NO_LINE;
}

static bool shared_pending(const struct shi_machine *m, uint32_t cpu)
{
    uint32_t i;
    for (i = 0; i < SHI_NLINES / 64; i++)
        if (mine(m, cpu, i))
            return true;
    return false;
}

static void shared_enable(struct shi_self *self, uint32_t cpu, uint32_t line, bool on)
{
    struct shi_irq_area *area = shi_irq_area(self->m);
    uint64_t bit = 1ull << (line % 64);
    (void)cpu;
    if (on)
        shi_fetch_or_full(&area->mask[line / 64], bit); /* SMASK */
    else
        shi_fetch_and_full(&area->mask[line / 64], ~bit); /* RMASK */
}

static void shared_reset(const struct shi_machine *m, uint32_t cpu)
{
    struct shi_irq_area *area = shi_irq_area(m);
    uint32_t line;
    for (line = 0; line < m->chip.nlines; line++) {
        uint64_t bit = 1ull << (line % 64);
        if (shi_load_relaxed(&area->route[line]) != cpu + 1)
            continue;
        shi_fetch_and_full(&area->shared[line / 64], ~bit);
        if (m->chip.use[line] != SHI_USE_IRQ)
            shi_fetch_or_full(&area->mask[line / 64], bit);
    }
}

const struct shi_flow shi_flow_shared = {
    .name = "shared",
    .set = shared_set,
    .next = shared_next,
    .pending = shared_pending,
    .enable = shared_enable,
    .reset = shared_reset,
};
