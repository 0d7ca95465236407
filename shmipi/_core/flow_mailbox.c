/* SPDX-License-Identifier: MIT */
/*
 * A mailbox of action bits (MIPS: Loongson-3, Octeon), and the kernel's ipi-mux over one
 * software interrupt (RISC-V: kernel/irq/ipi-mux.c).  Both are a word of pending bits
 * that a sender ORs into; the owner reads and clears all that are enabled, then
 * dispatches, least bit first.  They differ in who is rung: a mailbox is level
 * triggered, ipi-mux rings once for each bit that goes from 0 to 1.
 */
#include "sys.h"

#include "chip.h"

static bool mailbox_set(struct shi_self *self, uint32_t dst, uint32_t line)
{
    shi_fetch_or_full(&shi_slot(self->m, dst)->irr[line / 64], 1ull << (line % 64));
    return true;
}

static bool mux_set(struct shi_self *self, uint32_t dst, uint32_t line)
{
    uint64_t bit = 1ull << (line % 64);
    uint64_t was = shi_fetch_or_full(&shi_slot(self->m, dst)->irr[line / 64], bit);
    /* Pending first (full), enabled second; unmask enables first and looks at pending
     * second (shi_chip_enable): without that order both could miss it. */
    return !(was & bit) && shi_load_full(&shi_pic(self->m, dst)->enable[line / 64]) & bit;
}

static uint32_t mailbox_next(struct shi_self *self)
{
    struct shi_slot *slot = self->slot;
    uint32_t i, words = (self->m->chip.nlines + 63) / 64;
    for (i = 0; i < words; i++) {
        if (!self->taken[i]) {
            uint64_t enabled = shi_load_relaxed(&slot->pic.enable[i]);
            if (shi_load_relaxed(&slot->irr[i]) & enabled)
                self->taken[i] = shi_fetch_and_full(&slot->irr[i], ~enabled) & enabled;
        }
        if (self->taken[i]) {
            uint32_t bit = (uint32_t)__builtin_ctzll(self->taken[i]);
            self->taken[i] &= self->taken[i] - 1;
            return i * 64 + bit;
        }
    }
    return SHI_NO_LINE;
}

static bool mailbox_pending(const struct shi_machine *m, uint32_t cpu)
{
    const struct shi_slot *slot = shi_slot(m, cpu);
    uint32_t i;
    for (i = 0; i < (m->chip.nlines + 63) / 64; i++)
        if (shi_load_full(&slot->irr[i]) & shi_load_relaxed(&slot->pic.enable[i]))
            return true;
    return false;
}

const struct shi_flow shi_flow_mailbox = {
    .name = "mailbox",
    .set = mailbox_set,
    .next = mailbox_next,
    .pending = mailbox_pending,
};

const struct shi_flow shi_flow_mux = {
    .name = "mux",
    .set = mux_set,
    .next = mailbox_next,
    .pending = mailbox_pending,
};
