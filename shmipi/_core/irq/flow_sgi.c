/* SPDX-License-Identifier: MIT */
/*
 * Software generated interrupts of the Arm GIC (IHI 0048 for GICv2, IHI 0069 for GICv3).
 *
 * The distributor holds an SGI pending and forwards it while it is enabled.  The CPU
 * interface signals it when its priority is above (its number below) PMR and above the
 * running priority, which is that of what was acknowledged and not ended.  The acknowledge
 * makes it active, and until it is deactivated it can become pending again but is not taken
 * again.  EOIR drops the running priority and, with EOImode 0, deactivates; ICACTIVER
 * deactivates and nothing else.
 *
 * GICv2 keeps it pending for each sending CPU apart, and an acknowledge takes one of them
 * and names it; GICv3 has one pending bit.
 */
#include "base/sys.h"

#include "irq/chip.h"

#define SPURIOUS_INTID 1023u
#define GICD_INT_DEF_PRI 0xa0u /* of GICv2's SGIs as the driver sets them up */
#define GICV3_PRIO_IRQ 0xc0u   /* of GICv3's: since 6.11, one for all security states */
#define IDLE_PRIORITY 0x100u   /* below all there are */

/* GICv2: a byte for each SGI, eight of them a word. */
static inline uint64_t bank_bit(uint32_t line, uint32_t source)
{
    return 1ull << (8 * (line % 8) + source);
}

static bool sgi_set(struct shi_self *self, uint32_t dst, uint32_t line)
{
    struct shi_machine *m = self->m;
    struct shi_pic *pic = shi_pic(m, dst);
    if (m->chip.banked) {
        /* The host is no CPU interface.  GICD_SPENDSGIR lets software make an SGI
         * pending in any CPU's name: it does so in CPU 0's. */
        uint32_t source = self->host ? 0 : self->id;
        shi_fetch_or_full(&pic->bank[line / 8], bank_bit(line, source));
    } else {
        shi_fetch_or_full(&shi_slot(m, dst)->irr[0], 1ull << line);
    }
    /* What is masked goes no further than the distributor, and wakes nobody.  Pending
     * first (full), enabled second: see shi_chip_enable.  PMR and the running priority
     * are not looked at: their owner changes them without a full barrier. */
    return shi_load_full(&pic->enable[0]) >> line & 1;
}

/* Which of the eight bytes are not zero, as eight bits. */
static inline uint64_t nonzero_bytes(uint64_t word)
{
    word |= word >> 4;
    word |= word >> 2;
    word |= word >> 1;
    /* The lowest bit of each byte now; the product gathers them in the highest byte. */
    return (word & 0x0101010101010101ull) * 0x0102040810204080ull >> 56;
}

static uint64_t pending_bits(const struct shi_machine *m, uint32_t cpu)
{
    const struct shi_pic *pic = shi_pic(m, cpu);
    if (!m->chip.banked)
        return shi_load_full(&shi_slot(m, cpu)->irr[0]);
    return nonzero_bytes(shi_load_full(&pic->bank[0])) |
           nonzero_bytes(shi_load_full(&pic->bank[1])) << 8;
}

/* Of the lines in `bits` the one of the highest priority, the least number among equals. */
static uint32_t best(const struct shi_pic *pic, uint64_t bits, uint32_t *priority)
{
    uint32_t found = SHI_NO_LINE;
    *priority = IDLE_PRIORITY;
    while (bits) {
        uint32_t line = (uint32_t)__builtin_ctzll(bits);
        uint32_t p = shi_load_relaxed(&pic->priority[line]);
        bits &= bits - 1;
        if (p < *priority) {
            *priority = p;
            found = line;
        }
    }
    return found;
}

static uint32_t deliverable(const struct shi_machine *m, uint32_t cpu)
{
    const struct shi_pic *pic = shi_pic(m, cpu);
    uint64_t active = shi_load_relaxed(&pic->isr[0]) & 0xffff, bits = pending_bits(m, cpu);
    uint64_t acknowledged = shi_load_relaxed(&pic->running) & 0xffff;
    uint32_t priority, running, line;
    /* The PMR is kept inverted: 0, as after reset, lets everything through. */
    uint32_t pmr = 0xffu - (shi_load_relaxed(&pic->threshold) & 0xffu);
    bits &= shi_load_relaxed(&pic->enable[0]) & ~active & 0xffff;
    if (!bits)
        return SHI_NO_LINE;
    line = best(pic, bits, &priority);
    best(pic, acknowledged, &running);
    return priority < pmr && priority < running ? line : SHI_NO_LINE;
}

/* Clear a pending SGI of this number.  False: somebody has meanwhile. */
static bool unpend(struct shi_self *self, uint32_t line, uint32_t *source)
{
    shi_a64 *bank = &self->slot->pic.bank[line / 8];
    uint64_t bit, senders;
    *source = 0;
    if (!self->m->chip.banked) {
        bit = 1ull << line;
        return shi_fetch_and_full(&self->slot->irr[0], ~bit) & bit;
    }
    /* One sender, the lowest CPU (as GIC-400); the others keep it pending. */
    while ((senders = shi_load_acquire(bank) >> (8 * (line % 8)) & 0xff)) {
        *source = (uint32_t)__builtin_ctzll(senders);
        bit = bank_bit(line, *source);
        if (shi_fetch_and_full(bank, ~bit) & bit)
            return true;
    }
    return false;
}

/* The same, and it is not masked either. */
static bool take(struct shi_self *self, uint32_t line, uint32_t *source)
{
    struct shi_pic *pic = &self->slot->pic;
    if (!shi_kept_in_service(self->m, line))
        return unpend(self, line, source);
    shi_line_begin(self, line);
    if (unpend(self, line, source)) {
        if (shi_load_full(&pic->enable[0]) >> line & 1)
            return true;
        /* Before it is let go of: whose it was it still is. */
        if (self->m->chip.banked)
            shi_fetch_or_full(&pic->bank[line / 8], bank_bit(line, *source));
        else
            shi_fetch_or_full(&self->slot->irr[0], 1ull << line);
    }
    shi_line_done(self, line);
    return false;
}

static uint32_t sgi_next(struct shi_self *self)
{
    struct shi_machine *m = self->m;
    struct shi_pic *pic = &self->slot->pic;
    uint32_t line, source;
    do {
        line = deliverable(m, self->id);
    } while (line != SHI_NO_LINE && !take(self, line, &source));
    if (shi_load_relaxed(&pic->spurious)) { /* it was signalled, and masked before this */
        shi_store_relaxed(&pic->spurious, 0);
        if (line == SHI_NO_LINE) {
            shi_store_relaxed(&pic->iar, SPURIOUS_INTID);
            shi_count(self, SHI_C_irq_spurious);
        }
    }
    if (line == SHI_NO_LINE)
        return line;
    if (m->chip.banked) {
        uint32_t shift = 4 * line;
        uint64_t others = shi_load_relaxed(&pic->senders) & ~(0xfull << shift);
        shi_store_relaxed(&pic->senders, others | (uint64_t)source << shift);
    }
    shi_store_relaxed(&pic->iar, line | source << 10); /* GICC_IAR: CPUID in 12 to 10 */
    shi_store_relaxed(&pic->isr[0], shi_load_relaxed(&pic->isr[0]) | 1ull << line);
    shi_store_relaxed(&pic->running, shi_load_relaxed(&pic->running) | 1u << line);
    return line;
}

/* EOIR with EOImode 0: priority drop and deactivation in one. */
static void sgi_end(struct shi_self *self, uint32_t line)
{
    struct shi_pic *pic = &self->slot->pic;
    shi_store_relaxed(&pic->running, shi_load_relaxed(&pic->running) & ~(1u << line));
    shi_store_relaxed(&pic->isr[0], shi_load_relaxed(&pic->isr[0]) & ~(1ull << line));
}

/* GICD_CPENDSGIR for all its senders, or GICR_ICPENDR0. */
static void sgi_clear(struct shi_self *self, uint32_t cpu, uint32_t line)
{
    if (self->m->chip.banked)
        shi_fetch_and_full(&shi_pic(self->m, cpu)->bank[line / 8],
                           ~(0xffull << (8 * (line % 8))));
    else
        shi_fetch_and_full(&shi_slot(self->m, cpu)->irr[0], ~(1ull << line));
}

static bool sgi_pending(const struct shi_machine *m, uint32_t cpu)
{
    return deliverable(m, cpu) != SHI_NO_LINE;
}

static void sgi_reset(const struct shi_machine *m, uint32_t cpu)
{
    struct shi_pic *pic = shi_pic(m, cpu);
    uint8_t priority = m->chip.banked ? GICD_INT_DEF_PRI : GICV3_PRIO_IRQ;
    uint32_t i;
    for (i = 0; i < sizeof pic->priority; i++)
        shi_store_relaxed(&pic->priority[i], priority);
    shi_store_relaxed(&pic->running, 0);
    shi_store_relaxed(&pic->senders, 0);
    shi_store_relaxed(&pic->iar, SPURIOUS_INTID); /* nothing acknowledged yet */
}

const struct shi_flow shi_flow_sgi = {
    .name = "sgi",
    .max_lines = 16,
    .banked = 8, /* bits of a byte */
    .set = sgi_set,
    .next = sgi_next,
    .end = sgi_end,
    .pending = sgi_pending,
    .clear = sgi_clear,
    .reset = sgi_reset,
};
