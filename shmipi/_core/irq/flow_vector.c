/* SPDX-License-Identifier: MIT */
/*
 * The local APIC (Intel SDM volume 3, "Advanced Programmable Interrupt Controller"):
 * 256 vectors; the upper four bits are the priority class.  A vector is at most once
 * pending (IRR) and at most once in service (ISR).  It is taken when its class is above
 * the processor's (PPR), which is the higher of TPR's and that of the highest ISR bit.
 */
#include "base/sys.h"

#include "irq/chip.h"

#define SPURIOUS_VECTOR 0xffu

/* The highest bit set, or SHI_NO_LINE. */
static uint32_t highest(const shi_a64 *bits, const shi_a64 *and)
{
    int i;
    for (i = SHI_NVECTORS / 64 - 1; i >= 0; i--) {
        /* Full: who unmasks, or comes online, has done so before it looks; an acquire
         * load may pass his own store where the processor has weaker ones (RCpc). */
        uint64_t word = shi_load_full(&bits[i]);
        if (word && and) /* nearly always none, and then the mask's line is not needed */
            word &= shi_load_relaxed(&and[i]);
        if (word)
            return (uint32_t)i * 64 + 63u - (uint32_t)__builtin_clzll(word);
    }
    return SHI_NO_LINE;
}

/* PPR[7:4]. */
static uint32_t processor_class(const struct shi_pic *pic)
{
    uint32_t task = shi_load_relaxed(&pic->threshold) >> 4;
    uint32_t serving = highest(pic->isr, NULL);
    return serving != SHI_NO_LINE && serving >> 4 > task ? serving >> 4 : task;
}

static uint32_t deliverable(const struct shi_machine *m, uint32_t cpu)
{
    const struct shi_pic *pic = shi_pic(m, cpu);
    uint32_t vector = highest(shi_slot(m, cpu)->irr, pic->enable);
    return vector != SHI_NO_LINE && vector >> 4 > processor_class(pic) ? vector : SHI_NO_LINE;
}

static bool vector_set(struct shi_self *self, uint32_t dst, uint32_t vector)
{
    shi_fetch_or_full(&shi_slot(self->m, dst)->irr[vector / 64], 1ull << (vector % 64));
    return true;
}

/* INTA: pending to in service.  False: somebody has taken it back, or masked it, meanwhile. */
static bool acknowledge(struct shi_self *self, uint32_t vector)
{
    struct shi_pic *pic = &self->slot->pic;
    shi_a64 *irr = &self->slot->irr[vector / 64];
    uint64_t bit = 1ull << (vector % 64);
    /* The kernel's system vectors write EOI before they do anything else.  In service
     * before it is not pending any more: who looks from outside always finds it. */
    if (!shi_kept_in_service(self->m, vector)) {
        shi_fetch_and_full(irr, ~bit);
        return true;
    }
    shi_line_begin(self, vector);
    shi_set_in_service(self, vector, true);
    if (shi_fetch_and_full(irr, ~bit) & bit) {
        if (shi_load_full(&pic->enable[vector / 64]) & bit)
            return true;
        shi_fetch_or_full(irr, bit); /* before it is let go of: whose it was it still is */
    }
    shi_set_in_service(self, vector, false);
    shi_line_done(self, vector);
    return false;
}

static uint32_t vector_next(struct shi_self *self)
{
    struct shi_pic *pic = &self->slot->pic;
    uint32_t vector;
    do {
        vector = deliverable(self->m, self->id);
    } while (vector != SHI_NO_LINE && !acknowledge(self, vector));
    if (vector == SHI_NO_LINE) {
        if (shi_load_relaxed(&pic->spurious)) {
            shi_store_relaxed(&pic->spurious, 0);
            shi_count(self, SHI_C_irq_spurious);
            return SPURIOUS_VECTOR; /* no ISR bit, and no EOI */
        }
        return SHI_NO_LINE;
    }
    shi_store_relaxed(&pic->spurious, 0);
    return vector;
}

/*
 * EOI.  The register names no vector: the highest in service is done, which on hardware
 * is the one whose handler runs.  Here a handler of Python may still wait for the
 * interpreter while a higher vector is taken, so what is done is named: one EOI too
 * many, from a handler that wrote it and returned, ends nothing else.
 */
static void vector_end(struct shi_self *self, uint32_t vector)
{
    shi_a64 *isr = &self->slot->pic.isr[vector / 64];
    uint64_t bit = 1ull << (vector % 64), serving = shi_load_relaxed(isr);
    if (serving & bit) /* release: who finds it ended finds what its handler did */
        shi_store_release(isr, serving & ~bit);
}

static bool vector_pending(const struct shi_machine *m, uint32_t cpu)
{
    return deliverable(m, cpu) != SHI_NO_LINE;
}

const struct shi_flow shi_flow_vector = {
    .name = "vector",
    .max_lines = SHI_NVECTORS,
    .eoi_first = true,
    .set = vector_set,
    .next = vector_next,
    .end = vector_end,
    .pending = vector_pending,
};
