/* SPDX-License-Identifier: MIT */
/*
 * Interrupt controllers: how a line becomes pending at another CPU, in which order
 * pending lines are taken, and how they are ended.
 *
 * What a controller is made of (its lines, what they mean, how they are counted) comes
 * from its class in shmipi/irq/chips/ and is in the machine's header.  How it behaves is
 * one of a few flows; a flow is one file, flow_*.c.
 */
#ifndef SHI_CHIP_H
#define SHI_CHIP_H

#include "base/machine.h"

struct shi_flow {
    const char *name;
    uint32_t max_lines; /* that it keeps state for: at most SHI_NLINES */
    uint32_t banked;    /* the most CPUs of which it keeps a line pending apart; 0: cannot */
    bool routed;        /* lines are the machine's, and each is routed to one CPU */
    bool eoi_first;     /* system lines are ended as they are taken, before their work */
    /* Make `line` of `dst` pending.  True: the target has to be rung. */
    bool (*set)(struct shi_self *, uint32_t dst, uint32_t line);
    /* Take the line that is next in the chip's order, or SHI_NO_LINE.  By the owner. */
    uint32_t (*next)(struct shi_self *);
    /* The line's work is done (EOI, deactivate).  NULL: nothing to do. */
    void (*end)(struct shi_self *, uint32_t line);
    /* Is there a line that `next` would give to `cpu`?  By anybody: a look. */
    bool (*pending)(const struct shi_machine *, uint32_t cpu);
    /* Mask or unmask a line of a CPU.  NULL: by the CPU's enable bits. */
    void (*enable)(struct shi_self *, uint32_t cpu, uint32_t line, bool on);
    /* Take back what is pending and not taken yet.  NULL: the CPU's pending bit. */
    void (*clear)(struct shi_self *, uint32_t cpu, uint32_t line);
    /* The CPU's part as after power-on; masks of requested irqs stay. */
    void (*reset)(const struct shi_machine *, uint32_t cpu);
    /* A kick found interrupts off.  NULL: nothing to note. */
    void (*masked)(struct shi_self *);
};

/* Those that have registers which only they know: see their files. */
extern const struct shi_flow shi_flow_mailbox, shi_flow_sgi, shi_flow_esb;

/* esb: smp_muxed_ipi_set_message. */
void shi_esb_message(struct shi_self *self, uint32_t dst, uint32_t message);
/* esb: smp_ipi_demux called by hand.  In a core section of the owner's. */
void shi_esb_demux(struct shi_self *self);
/* esb: a load from, or a store to, the ESB page of a source: what it gives (0 for a
 * store), or -EINVAL.  Between shi_enter and shi_leave. */
int shi_esb_load(struct shi_self *self, uint32_t cpu, uint32_t line, uint32_t offset);
int shi_esb_store(struct shi_self *self, uint32_t cpu, uint32_t line, uint32_t offset);

/* ---- sending: between shi_enter and shi_leave ------------------------------------ */

/* Set a line of `dst` pending and ring it the way its state asks for. */
void shi_irq_raise(struct shi_self *self, uint32_t dst, uint32_t line);
/* mailbox: make all of `bits` of `dst` pending in one store. */
void shi_mailbox_write(struct shi_self *self, uint32_t dst, uint64_t bits);
void shi_chip_send_call_single(struct shi_self *self, uint32_t dst);
void shi_chip_send_call_mask(struct shi_self *self, const uint32_t *cpus, uint32_t n);
void shi_chip_send_reschedule(struct shi_self *self, uint32_t dst);
/* Make `dst` look at what is wanted of it, whatever its chip masks. */
void shi_chip_prod(struct shi_self *self, uint32_t dst);

/* ---- receiving ------------------------------------------------------------------- */

/* Take and dispatch what is pending here.  Soft-masked. */
void shi_chip_handle(struct shi_self *self);
/* Take what `next` gives until there is nothing. */
void shi_chip_take(struct shi_self *self);
/* Do what taking `line` means; false: its handler was put off. */
bool shi_chip_act(struct shi_self *self, uint32_t line);
/* Count it in its row of /proc/interrupts. */
void shi_chip_count_row(struct shi_self *self, uint32_t line);
/* A kick came while interrupts were off: powerpc notes of which kind ... */
void shi_chip_note_masked(struct shi_self *self);
/* ... until they are on again and everything was replayed. */
void shi_chip_replayed(struct shi_self *self);
/* The own CPU's chip may have something now: taken when the core section ends, or when
 * interrupts are on. */
void shi_chip_recheck(struct shi_self *self);
/* The handler of a requested irq that was put off has run. */
void shi_chip_end(struct shi_self *self, uint32_t line);
/* Its EOI by hand: in progress is it until it has returned. */
void shi_chip_eoi(struct shi_self *self, uint32_t line);
/* Mask or unmask; a line that was pending while masked is taken on unmask. */
void shi_chip_enable(struct shi_self *self, uint32_t cpu, uint32_t line, bool on);
/* Mask a line of this CPU, though nobody has disabled it ... */
void shi_chip_hold(struct shi_self *self, uint32_t line);
/* ... and not any more: as it was enabled or disabled last, also by others just now. */
void shi_chip_unhold(struct shi_self *self, uint32_t line);
/* Take back a line that is pending at `cpu`. */
void shi_chip_clear(struct shi_self *self, uint32_t cpu, uint32_t line);
/* shared: from now on `line` interrupts `cpu` (SHI_NO_LINE: nobody).  One at a time. */
void shi_chip_route(struct shi_self *self, uint32_t line, uint32_t cpu);
/* TPR, CPPR or PMR of this CPU; what it lets through is taken when interrupts are on. */
void shi_chip_threshold(struct shi_self *self, uint32_t value);
/* Set the summary bit of `cpu` if its chip has anything, and ring it. */
void shi_chip_look(struct shi_self *self, uint32_t cpu, bool again);
/* As after power-on: at boot, and before a process takes the slot again. */
void shi_chip_reset(const struct shi_machine *m, uint32_t cpu);
/* The own CPU's, with what its process has read from the chip and not dispatched. */
void shi_chip_reset_own(struct shi_self *self);

static inline struct shi_pic *shi_pic(const struct shi_machine *m, uint32_t cpu)
{
    return &shi_slot(m, cpu)->pic;
}

/* The CPU's process is marked dead: a STARTUP that it was given and did not take stands, and
 * asks for another. */
static inline void shi_startup_died(const struct shi_machine *m, uint32_t cpu)
{
    uint32_t was = SHI_SU_GRANTED;
    shi_cas_full(&shi_pic(m, cpu)->startup, &was, SHI_SU_ASKED);
}

static inline struct shi_irq_area *shi_irq_area(const struct shi_machine *m)
{
    return (struct shi_irq_area *)(m->base + m->irq_offset);
}

/*
 * Chips that have no in-service bits: the core keeps one for a line that has a handler.
 * A Python handler may be put off, and on hardware it would run before the line is read
 * again; so until the handler has returned, the line stays pending and is not taken.
 */
static inline bool shi_kept_in_service(const struct shi_machine *m, uint32_t line)
{
    return m->chip.use[line] == SHI_USE_IRQ;
}

static inline void shi_set_in_service(struct shi_self *self, uint32_t line, bool on)
{
    shi_a64 *isr = &self->slot->pic.isr[line / 64]; /* written by the owner alone */
    uint64_t bit = 1ull << (line % 64), was = shi_load_relaxed(isr);
    shi_store_relaxed(isr, on ? was | bit : was & ~bit);
}

/*
 * IRQD_IRQ_INPROGRESS, for each CPU apart: a line that has a handler is this CPU's from just
 * before it is acknowledged until its handler has ended, or was found to be gone.  Not the
 * in-service bit, which a handler's own EOI ends.  While a CPU that lives has it, the line is
 * given to no other irq, so that what was taken for the one is never handled by the next.
 *
 * Called before the read-modify-write that takes the pending bit back (full).  Who frees the
 * line takes pending bits back first and looks here second: either it finds this, or the
 * acknowledge finds nothing pending.  Likewise who withdraws the handler: that first, and
 * here second, while the CPU looks for the handler after the acknowledge.
 */
static inline void shi_line_begin(struct shi_self *self, uint32_t line)
{
    shi_a64 *lines = &self->slot->pic.inprogress[line / 64]; /* written by the owner alone */
    shi_store_relaxed(lines, shi_load_relaxed(lines) | 1ull << (line % 64));
}

/* Release: who finds that it has ended finds what its handler did. */
static inline void shi_line_done(struct shi_self *self, uint32_t line)
{
    shi_a64 *lines = &self->slot->pic.inprogress[line / 64];
    uint64_t bit = 1ull << (line % 64), was = shi_load_relaxed(lines);
    if (was & bit)
        shi_store_release(lines, was & ~bit);
}

/* Lines of one word that `cpu` has in progress: none of the dead.  `begun`: without those
 * whose handler was put off: it looks then whether it is the same irq's still. */
static inline uint64_t shi_lines_in_progress(const struct shi_machine *m, uint32_t cpu,
                                             uint32_t word, bool begun)
{
    const struct shi_pic *pic = shi_pic(m, cpu);
    /* Full: after what was withdrawn, or taken back, and before who lives. */
    uint64_t lines = shi_load_full(&pic->inprogress[word]);
    if (lines && begun)
        lines &= ~shi_load_full(&pic->put_off[word]);
    return lines && shi_word_state(shi_load_full(&shi_slot(m, cpu)->word)) != SHI_DEAD ? lines
                                                                                       : 0;
}

/* Where a CPU's lines of one kind lie. */
static inline uint32_t shi_line_of(const struct shi_machine *m, uint32_t line, uint32_t cpu)
{
    return m->chip.per_cpu ? line + cpu : line;
}

#endif
