/* SPDX-License-Identifier: MIT */
#include "base/sys.h"

#include <string.h>

#include "base/step.h"
#include "base/trace.h"
#include "irq/chip.h"
#include "irq/ring.h"

/* ---- sending --------------------------------------------------------------------- */

void shi_irq_raise(struct shi_self *self, uint32_t dst, uint32_t line)
{
    SHI_TRACE(self, ipi_send_cpu, dst, 0, 0, line);
    bool ring = self->m->flow->set(self, dst, line);
    SHI_STEP(self, raise);
    if (ring) {
        SHI_TRACE(self, line_set, dst, 0, 0, line);
        shi_irq_ring(self, dst);
    } else {
        SHI_TRACE(self, line_kept, dst, 0, 0, line);
    }
}

/* Are these (ascending), and this CPU, all that are online? */
static bool all_online(const struct shi_self *self, const uint32_t *cpus, uint32_t n)
{
    const struct shi_machine *m = self->m;
    uint32_t cpu, i = 0;
    for (cpu = 0; cpu < m->ncpus; cpu++) {
        if (i < n && cpus[i] == cpu)
            i++;
        else if (cpu != self->id && shi_word_online(shi_load_relaxed(&shi_slot(m, cpu)->word)))
            return false; /* soon, as a rule: the first that is left out */
    }
    return true;
}

/* Register writes that an IPI to these CPUs takes (ascending). */
static uint32_t writes_to(const struct shi_self *self, const uint32_t *cpus, uint32_t n)
{
    const struct shi_chip *chip = &self->m->chip;
    uint32_t i, writes = 0, last = UINT32_MAX;
    if (chip->shorthand && n > 1 && all_online(self, cpus, n))
        return 1; /* all but self */
    if (!chip->group)
        return 1;
    for (i = 0; i < n; i++)
        if (cpus[i] / chip->group != last) {
            last = cpus[i] / chip->group;
            writes++;
        }
    return writes;
}

void shi_chip_send_call_single(struct shi_self *self, uint32_t dst)
{
    const struct shi_machine *m = self->m;
    SHI_TRACE(self, call_ipi, dst, 0, 0, m->chip.call_single);
    shi_count(self, SHI_C_chip_writes);
    shi_irq_raise(self, dst, shi_line_of(m, m->chip.call_single, dst));
}

void shi_chip_send_call_mask(struct shi_self *self, const uint32_t *cpus, uint32_t n)
{
    const struct shi_machine *m = self->m;
    uint32_t i, writes = writes_to(self, cpus, n);
    if (SHI_TRACING(self, ipi_send_cpumask))
        shi_trace_mask(self, cpus, n, writes, m->chip.call);
    shi_count_n(self, SHI_C_chip_writes, writes);
    for (i = 0; i < n; i++)
        shi_irq_raise(self, cpus[i], shi_line_of(m, m->chip.call, cpus[i]));
}

void shi_chip_send_reschedule(struct shi_self *self, uint32_t dst)
{
    const struct shi_machine *m = self->m;
    SHI_TRACE(self, reschedule_ipi, dst, 0, 0, m->chip.reschedule);
    shi_count(self, SHI_C_chip_writes);
    shi_irq_raise(self, dst, shi_line_of(m, m->chip.reschedule, dst));
}

void shi_chip_prod(struct shi_self *self, uint32_t dst)
{
    shi_chip_send_reschedule(self, dst);
    /* Taken already, or held back: then nobody rang.  Nor has who made the line pending
     * before us, where that is who rings (ipi-mux), if he is stopped on the way to it. */
    if (!self->m->flow->pending(self->m, dst) ||
        !(shi_load_full(&shi_slot(self->m, dst)->word) & SHI_W_PENDING))
        shi_irq_ring(self, dst);
}

/* ---- receiving ------------------------------------------------------------------- */

void shi_chip_count_row(struct shi_self *self, uint32_t line)
{
    uint32_t row = self->m->chip.row[line];
    shi_count(self, SHI_C_irq_taken);
    if (row >= SHI_NROWS)
        return;
    shi_a64 *p = &self->slot->pic.rows[row];
    shi_store_relaxed(p, shi_load_relaxed(p) + 1); /* the owner alone, soft-masked */
}

/* Those of function calls are told by what is on the queue (smp.c). */
static const uint8_t causes[SHI_NUSES] = {
    [SHI_USE_NONE] = SHI_CAUSE_other,      [SHI_USE_RESCHEDULE] = SHI_CAUSE_reschedule,
    [SHI_USE_CALL] = SHI_NCAUSES,          [SHI_USE_CALL_SINGLE] = SHI_NCAUSES,
    [SHI_USE_NMI] = SHI_CAUSE_nmi_line,    [SHI_USE_IRQ] = SHI_CAUSE_irq,
    [SHI_USE_COUNT] = SHI_CAUSE_other,     [SHI_USE_IRQ_WORK] = SHI_CAUSE_irq_work,
    [SHI_USE_TIMER] = SHI_CAUSE_broadcast, [SHI_USE_STOP] = SHI_CAUSE_stop,
    [SHI_USE_ICACHE] = SHI_CAUSE_icache,
};

/* The kernel's sysvec handlers and handle_percpu_irq: false when Python has it now. */
bool shi_chip_act(struct shi_self *self, uint32_t line)
{
    const struct shi_machine *m = self->m;
    uint32_t use = m->chip.use[line];
    uint32_t why = use < SHI_NUSES ? causes[use] : SHI_CAUSE_other;
    if (why < SHI_NCAUSES)
        shi_cause(self, (enum shi_cause)why);
    if (use < SHI_NUSES && m->actions[use]) {
        SHI_TRACE(self, vector_entry, self->id, 0, 0, line | use << 16);
        bool done = m->actions[use](self, line);
        SHI_TRACE(self, vector_exit, self->id, 0, 0, line | use << 16);
        return done;
    }
    if (use != SHI_USE_COUNT)
        shi_count(self, SHI_C_irq_other); /* reported: `shmipi interrupts` has a row of them */
    return true;
}

/* Say that a line was ended where it was: before or after its work. */
static inline void trace_eoi(struct shi_self *self, uint32_t line, bool before)
{
    if (SHI_TRACING(self, line_eoi) &&
        before == (self->m->flow->eoi_first && self->m->chip.use[line] != SHI_USE_IRQ))
        SHI_TRACE(self, line_eoi, self->id, 0, 0, line);
}

void shi_chip_take(struct shi_self *self)
{
    const struct shi_flow *flow = self->m->flow;
    uint32_t line;
    while ((line = flow->next(self)) != SHI_NO_LINE) {
        SHI_TRACE(self, line_ack, self->id, 0, 0, line);
        trace_eoi(self, line, true);
        SHI_STEP(self, line);
        shi_chip_count_row(self, line);
        if (!shi_chip_act(self, line))
            continue;
        if (flow->end)
            flow->end(self, line);
        if (shi_kept_in_service(self->m, line))
            shi_line_done(self, line);
        trace_eoi(self, line, false);
    }
}

void shi_chip_handle(struct shi_self *self)
{
    /* The summary first, the lines second: a line set in between sets it again. */
    shi_fetch_and_full(&self->slot->word, ~SHI_W_PENDING);
    SHI_TRACE(self, ipi_entry, self->id, 0, 0, 0);
    shi_chip_take(self);
    if (__builtin_expect(self->timer_due, 0)) {
        self->timer_due = false;
        shi_count(self, SHI_C_irq_timer);
        self->m->local_timer(self);
    }
    if (shi_load_relaxed(&self->slot->pic.spurious)) {
        /* Asserted when the mask went up, and gone by the acknowledge: x86 has a vector
         * for it, a GIC reads 1023. */
        shi_store_relaxed(&self->slot->pic.spurious, 0);
        shi_count(self, SHI_C_irq_spurious);
    }
    SHI_TRACE(self, ipi_exit, self->id, 0, 0, 0);
}

void shi_chip_recheck(struct shi_self *self)
{
    if (!self->m->flow->pending(self->m, self->id))
        return;
    shi_fetch_or_full(&self->slot->word, SHI_W_PENDING);
    self->happened = 1; /* served by shi_leave, or by local_irq_enable */
}

void shi_chip_eoi(struct shi_self *self, uint32_t line)
{
    if (self->m->flow->end)
        self->m->flow->end(self, line);
    SHI_TRACE(self, line_eoi, self->id, 0, 0, line);
    shi_chip_recheck(
        self); /* what its end lets through, or what came while it was in service */
}

void shi_chip_end(struct shi_self *self, uint32_t line)
{
    shi_chip_eoi(self, line);
    shi_line_done(self, line);
}

static void enable(struct shi_self *self, uint32_t cpu, uint32_t line, bool on)
{
    const struct shi_machine *m = self->m;
    shi_a64 *word = &shi_pic(m, cpu)->enable[line / 64];
    uint64_t bit = 1ull << (line % 64);
    if (m->flow->enable)
        m->flow->enable(self, cpu, line, on);
    else if (on)
        shi_fetch_or_full(word, bit);
    else
        shi_fetch_and_full(word, ~bit);
    if (!on)
        return;
    /* Enabled first (the full read-modify-write above), pending looked at second; a
     * sender sets pending first and looks at enabled second: one sees the other. */
    if (cpu == self->id)
        shi_chip_recheck(self);
    else
        shi_chip_look(self, cpu, false);
}

/* A line that the machine has once (shared) is masked once, whoever it is routed to. */
static shi_a64 *wanted(const struct shi_machine *m, uint32_t cpu, uint32_t line)
{
    bool once = m->flow->routed && line < SHI_NVECTORS;
    return &shi_pic(m, once ? 0 : cpu)->wanted[line / 64];
}

void shi_chip_enable(struct shi_self *self, uint32_t cpu, uint32_t line, bool on)
{
    shi_a64 *word = wanted(self->m, cpu, line);
    uint64_t bit = 1ull << (line % 64);
    /* First (full), the mask second: see shi_chip_unhold. */
    if (on)
        shi_fetch_or_full(word, bit);
    else
        shi_fetch_and_full(word, ~bit);
    enable(self, cpu, line, on);
}

void shi_chip_hold(struct shi_self *self, uint32_t line)
{
    enable(self, self->id, line, false);
}

void shi_chip_unhold(struct shi_self *self, uint32_t line)
{
    const shi_a64 *word = wanted(self->m, self->id, line);
    bool on = false;
    /* Changed first, looked at second, as often as it takes.  Who enables or disables it
     * meanwhile says so first and changes the mask second: that either comes after ours, or
     * is found here. */
    while ((shi_load_full(word) >> (line % 64) & 1) != on) {
        on = !on;
        enable(self, self->id, line, on);
    }
}

void shi_chip_clear(struct shi_self *self, uint32_t cpu, uint32_t line)
{
    if (self->m->flow->clear)
        self->m->flow->clear(self, cpu, line);
    else
        shi_fetch_and_full(&shi_slot(self->m, cpu)->irr[line / 64], ~(1ull << (line % 64)));
}

void shi_chip_threshold(struct shi_self *self, uint32_t value)
{
    const struct shi_machine *m = self->m;
    struct shi_pic *pic = &self->slot->pic;
    bool asserted = m->flow->pending(m, self->id);
    shi_store_full(&pic->threshold, value);
    if (asserted && !m->flow->pending(m, self->id)) {
        /* INTR was up already: by the time it is acknowledged there is nothing left. */
        shi_store_relaxed(&pic->spurious, 1);
        shi_fetch_or_full(&self->slot->word, SHI_W_PENDING);
        self->happened = 1;
    }
    shi_chip_recheck(self);
}

void shi_chip_look(struct shi_self *self, uint32_t cpu, bool again)
{
    if (self->m->flow->pending(self->m, cpu))
        shi_irq_ring_pending(self, cpu, again);
}

static void reset(const struct shi_machine *m, uint32_t cpu)
{
    struct shi_pic *pic = shi_pic(m, cpu);
    struct shi_slot *slot = shi_slot(m, cpu);
    uint32_t i;
    for (i = 0; i < SHI_NLINES / 64; i++) {
        shi_store_relaxed(&slot->irr[i], 0);
        shi_store_relaxed(&pic->isr[i], 0);
        shi_store_release(&pic->inprogress[i], 0);
        shi_store_relaxed(&pic->put_off[i], 0);
    }
    for (i = 0; i < m->chip.nlines; i++) /* those of requested irqs stay as they are */
        if (m->chip.use[i] != SHI_USE_IRQ)
            shi_fetch_or_full(&pic->enable[i / 64], 1ull << (i % 64));
    shi_store_relaxed(&pic->messages, 0);
    shi_store_relaxed(&pic->nmi_request, 0);
    shi_store_relaxed(&pic->threshold, 0);
    shi_store_relaxed(&pic->spurious, 0);
    shi_store_relaxed(&pic->happened, 0);
    for (i = 0; i < sizeof pic->bank / sizeof *pic->bank; i++)
        shi_store_relaxed(&pic->bank[i], 0);
    if (m->flow->reset)
        m->flow->reset(m, cpu);
}

void shi_chip_reset(const struct shi_machine *m, uint32_t cpu)
{
    struct shi_pic *pic = shi_pic(m, cpu);
    shi_a32 *startup = &pic->startup;
    uint32_t was = shi_load_relaxed(startup);
    reset(m, cpu);
    shi_store_relaxed(&pic->nmi, 0);
    /* Of a process that was killed in an NMI's handler: over. */
    shi_store_relaxed(&pic->nmi_service, (shi_load_relaxed(&pic->nmi_service) + 1) & ~1u);
    shi_startup_died(m, cpu);
    /* INIT, or a STARTUP that asked for the process that takes the slot, still stands. */
    while ((was == SHI_SU_WAITING || was == SHI_SU_STARTED) &&
           !shi_cas_full(startup, &was, SHI_SU_NONE))
        ;
}

void shi_chip_reset_own(struct shi_self *self)
{
    memset(self->taken, 0, sizeof self->taken);
    self->demuxing = 0;
    reset(self->m, self->id); /* its process stays, and so has started */
    /* One may be in service: its signal came just after this CPU had gone offline, and its
     * Python handlers have yet to run.  It is over when they have (nmi.c), and not before. */
    shi_fetch_and_full(&self->slot->pic.nmi, SHI_NMI_IN_SERVICE);
}

void shi_chip_note_masked(struct shi_self *self)
{
    SHI_TRACE(self, irq_masked, self->id, 0, 0, 0);
    if (self->m->flow->masked)
        self->m->flow->masked(self);
}

void shi_chip_replayed(struct shi_self *self)
{
    if (self->m->flow->masked)
        shi_store_relaxed(&self->slot->pic.happened, 0);
}
