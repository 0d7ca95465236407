/* SPDX-License-Identifier: MIT */
/*
 * A mailbox of action bits (MIPS: Loongson-3, Octeon), and the kernel's ipi-mux over one
 * software interrupt (RISC-V: kernel/irq/ipi-mux.c).  Both are a word of pending bits
 * that a sender ORs into; the owner reads and clears all that are enabled, then
 * dispatches, least bit first; what comes meanwhile is read the next time.  They differ
 * in who is rung: a mailbox is level triggered (STATUS & EN), ipi-mux rings once for each
 * bit that goes from 0 to 1.
 *
 * Both sides of a mask: a sender sets pending first and looks at enabled second, unmask
 * enables first and looks at pending second (shi_chip_enable).  All four are full, so one
 * of the two sees the other, and a bit that was sent is never left with nobody to ring.
 */
#include "base/sys.h"

#include "base/step.h"
#include "base/trace.h"
#include "irq/chip.h"
#include "irq/ring.h"

static uint64_t enabled(const struct shi_machine *m, uint32_t dst, uint32_t word)
{
    return shi_load_full(&shi_pic(m, dst)->enable[word]);
}

static bool mailbox_set(struct shi_self *self, uint32_t dst, uint32_t line)
{
    uint64_t bit = 1ull << (line % 64);
    shi_fetch_or_full(&shi_slot(self->m, dst)->irr[line / 64], bit);
    /* Also for a bit that was set already: whoever set it may have died before it rang. */
    return enabled(self->m, dst, line / 64) & bit;
}

static bool mux_set(struct shi_self *self, uint32_t dst, uint32_t line)
{
    uint64_t bit = 1ull << (line % 64);
    uint64_t was = shi_fetch_or_full(&shi_slot(self->m, dst)->irr[line / 64], bit);
    /* If its sender died before it rang, the reaper finds the bit (shi_irq_rering). */
    return !(was & bit) && enabled(self->m, dst, line / 64) & bit;
}

void shi_mailbox_write(struct shi_self *self, uint32_t dst, uint64_t bits)
{
    uint64_t left;
    for (left = bits; left; left &= left - 1)
        SHI_TRACE(self, ipi_send_cpu, dst, 0, 0, (uint32_t)__builtin_ctzll(left));
    shi_fetch_or_full(&shi_slot(self->m, dst)->irr[0], bits);
    SHI_STEP(self, raise);
    uint64_t on = enabled(self->m, dst, 0);
    for (left = bits; left; left &= left - 1) {
        uint32_t line = (uint32_t)__builtin_ctzll(left);
        if (on & 1ull << line)
            SHI_TRACE(self, line_set, dst, 0, 0, line);
        else
            SHI_TRACE(self, line_kept, dst, 0, 0, line);
    }
    if (on & bits)
        shi_irq_ring(self, dst);
}

/* Enabled, and not waiting for a handler that was put off. */
static uint64_t open_lines(const struct shi_pic *pic, uint32_t word)
{
    return shi_load_relaxed(&pic->enable[word]) & ~shi_load_relaxed(&pic->isr[word]);
}

/* Of these lines those that have handlers. */
static uint64_t irqs_of(const struct shi_machine *m, uint32_t word, uint64_t lines)
{
    uint64_t left, irqs = 0;
    for (left = lines; left; left &= left - 1)
        if (shi_kept_in_service(m, word * 64 + (uint32_t)__builtin_ctzll(left)))
            irqs |= left & (0 - left);
    return irqs;
}

/* Read and clear what is pending and open: what was there at the first look; one that came
 * since has set the summary bit again. */
static uint64_t read_and_clear(struct shi_self *self, uint32_t word)
{
    struct shi_pic *pic = &self->slot->pic;
    shi_a64 *irr = &self->slot->irr[word];
    /* Relaxed: they were set before the summary bit, which shi_chip_handle has taken with a
     * full read-modify-write. */
    uint64_t want = shi_load_relaxed(irr) & open_lines(pic, word), got, irqs, masked;
    if (!want)
        return 0;
    irqs = irqs_of(self->m, word, want);
    if (__builtin_expect(!irqs, 1))
        return shi_fetch_and_full(irr, ~want) & want;
    shi_store_relaxed(&pic->inprogress[word], shi_load_relaxed(&pic->inprogress[word]) | irqs);
    got = shi_fetch_and_full(irr, ~want) & want;
    masked = got & irqs & ~shi_load_full(&pic->enable[word]);
    if (masked)
        shi_fetch_or_full(irr, masked); /* before they are let go of: whose they were */
    got &= ~masked;
    shi_store_release(&pic->inprogress[word],
                      shi_load_relaxed(&pic->inprogress[word]) & ~(irqs & ~got));
    if (masked & shi_load_full(&pic->enable[word]))
        shi_chip_recheck(self); /* unmasked again, by one that did not find them pending */
    return got;
}

static uint32_t mailbox_next(struct shi_self *self)
{
    uint32_t i, words = (self->m->chip.nlines + 63) / 64;
    for (i = 0; i < words; i++) {
        if (!self->taken[i])
            self->taken[i] = read_and_clear(self, i);
        if (self->taken[i]) {
            uint32_t line = i * 64 + (uint32_t)__builtin_ctzll(self->taken[i]);
            self->taken[i] &= self->taken[i] - 1;
            if (shi_kept_in_service(self->m, line))
                shi_set_in_service(self, line, true);
            return line;
        }
    }
    return SHI_NO_LINE;
}

static void mailbox_end(struct shi_self *self, uint32_t line)
{
    if (shi_kept_in_service(self->m, line))
        shi_set_in_service(self, line, false);
}

static bool mailbox_pending(const struct shi_machine *m, uint32_t cpu)
{
    const struct shi_slot *slot = shi_slot(m, cpu);
    uint32_t i;
    for (i = 0; i < (m->chip.nlines + 63) / 64; i++)
        if (shi_load_full(&slot->irr[i]) & open_lines(&slot->pic, i))
            return true;
    return false;
}

const struct shi_flow shi_flow_mailbox = {
    .name = "mailbox",
    .max_lines = SHI_NVECTORS,
    .set = mailbox_set,
    .next = mailbox_next,
    .end = mailbox_end,
    .pending = mailbox_pending,
};

const struct shi_flow shi_flow_mux = {
    .name = "mux",
    .max_lines = SHI_NVECTORS,
    .set = mux_set,
    .next = mailbox_next,
    .end = mailbox_end,
    .pending = mailbox_pending,
};
