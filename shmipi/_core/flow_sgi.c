/* SPDX-License-Identifier: MIT */
/*
 * Software generated interrupts of the Arm GIC (IHI 0048 for GICv2, IHI 0069 for GICv3).
 * A pending SGI is taken when its priority is above (its number below) PMR and above
 * that of what is active; the acknowledge makes it active, and it is not taken again
 * before it is deactivated.  GICv2 keeps it pending for each sending CPU apart, and an
 * acknowledge names the sender; GICv3 has one pending bit.
 */
#include "sys.h"

#include "chip.h"

static bool sgi_set(struct shi_self *self, uint32_t dst, uint32_t line)
{
    struct shi_machine *m = self->m;
    if (m->chip.banked) {
        /* The host is no processor interface: it sends in CPU 0's name. */
        uint32_t source = self->host ? 0 : self->id;
        shi_fetch_or_full(&shi_pic(m, dst)->bank[line], (uint8_t)(1u << source));
    } else {
        shi_fetch_or_full(&shi_slot(m, dst)->irr[0], 1ull << line);
    }
    return true;
}

static uint64_t pending_bits(const struct shi_machine *m, uint32_t cpu)
{
    const struct shi_pic *pic = shi_pic(m, cpu);
    uint64_t bits = 0;
    uint32_t line;
    if (!m->chip.banked)
        return shi_load_full(&shi_slot(m, cpu)->irr[0]);
    for (line = 0; line < m->chip.nlines; line++)
        if (shi_load_full(&pic->bank[line]))
            bits |= 1ull << line;
    return bits;
}

/* Of the lines in `bits` the one of the highest priority, the least number among equals. */
static uint32_t best(const struct shi_pic *pic, uint64_t bits, uint32_t *priority)
{
    uint32_t found = SHI_NO_LINE;
    *priority = 0x100;
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
    uint64_t active = shi_load_relaxed(&pic->isr[0]), bits = pending_bits(m, cpu);
    uint32_t priority, running, line;
    /* The PMR is kept inverted: 0, as after reset, lets everything through. */
    uint32_t pmr = 0xffu - (shi_load_relaxed(&pic->threshold) & 0xffu);
    bits &= shi_load_relaxed(&pic->enable[0]) & ~active;
    line = best(pic, bits, &priority);
    best(pic, active, &running);
    return line != SHI_NO_LINE && priority < pmr && priority < running ? line : SHI_NO_LINE;
}

static uint32_t sgi_next(struct shi_self *self)
{
    struct shi_machine *m = self->m;
    struct shi_pic *pic = &self->slot->pic;
    uint32_t line = deliverable(m, self->id), iar = line;
    uint64_t bit = 1ull << (line & 63);
    if (line == SHI_NO_LINE)
        return line;
    if (m->chip.banked) { /* one source at a time: the others keep the line pending */
        uint32_t source = (uint32_t)__builtin_ctz(shi_load_full(&pic->bank[line]));
        shi_fetch_and_full(&pic->bank[line], (uint8_t)~(1u << source));
        iar |= source << 10; /* GICC_IAR: CPUID in bits 12 to 10 */
    } else {
        shi_fetch_and_full(&self->slot->irr[0], ~bit);
    }
    shi_store_relaxed(&pic->iar, iar);
    shi_store_relaxed(&pic->isr[0], shi_load_relaxed(&pic->isr[0]) | bit);
    return line;
}

/* EOIR and DIR: priority drop, and not active any more. */
static void sgi_end(struct shi_self *self, uint32_t line)
{
    shi_a64 *active = &self->slot->pic.isr[0];
    shi_store_relaxed(active, shi_load_relaxed(active) & ~(1ull << line));
}

static bool sgi_pending(const struct shi_machine *m, uint32_t cpu)
{
    return deliverable(m, cpu) != SHI_NO_LINE;
}

static void sgi_reset(const struct shi_machine *m, uint32_t cpu)
{
    struct shi_pic *pic = shi_pic(m, cpu);
    uint32_t i;
    for (i = 0; i < sizeof pic->priority; i++)
        shi_store_relaxed(&pic->priority[i], 0xa0); /* GICD_INT_DEF_PRI */
    shi_store_relaxed(&pic->iar, 1023);             /* spurious: nothing acknowledged */
}

const struct shi_flow shi_flow_sgi = {
    .name = "sgi",
    .set = sgi_set,
    .next = sgi_next,
    .end = sgi_end,
    .pending = sgi_pending,
    .reset = sgi_reset,
};
