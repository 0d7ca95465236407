/* SPDX-License-Identifier: MIT */
#include "base/sys.h"

#include <errno.h>

#include "base/event.h"
#include "base/native.h"
#include "base/step.h"
#include "irq/chip.h"
#include "irq/irqdesc.h"

#define READ_TRIES 1000
#define VIRQ_TRIES 3

struct shi_irqdesc *shi_irqdesc(const struct shi_machine *m, uint32_t virq)
{
    return virq < SHI_NR_IRQS ? &shi_irq_area(m)->desc[virq] : NULL;
}

/* ---- the lock -------------------------------------------------------------------- */

/* The place that names `virq` among the irqs of a line, or NULL. */
static shi_a32 *place_of(const struct shi_machine *m, uint32_t line, uint32_t virq)
{
    struct shi_irq_area *area = shi_irq_area(m);
    shi_a32 *place = &area->line_virq[line];
    uint32_t found, n;
    /* Bounded: nothing in the segment is trusted. */
    for (n = 0; n < SHI_NR_IRQS && (found = shi_load_acquire(place)); n++) {
        if (found == virq)
            return place;
        if (found >= SHI_NR_IRQS)
            return NULL;
        place = &area->desc[found].next;
    }
    return NULL;
}

static void take_line(struct shi_self *self, uint32_t line, uint32_t virq, shi_a32 *place)
{
    shi_irqdesc_reset_line(self, line, virq);
    SHI_STEP(self, undo);
    if (self->m->flow->routed)
        shi_chip_route(self, line, SHI_NO_LINE);
    /* One store, whether it is the first or not: killed before it, it is done again. */
    shi_store_full(place, shi_load_relaxed(&shi_irq_area(self->m)->desc[virq].next));
}

void shi_irq_free_undo(struct shi_self *self)
{
    struct shi_irq_area *area = shi_irq_area(self->m);
    uint64_t undo = shi_load_relaxed(&area->undo);
    uint32_t first = (uint32_t)undo, count = (uint32_t)(undo >> 32), line, virq;
    shi_a32 *place;
    if (!undo)
        return;
    /* Whatever state they are in, and however often: who does this can be killed, too. */
    for (line = 0; first && first < SHI_NR_IRQS && line < self->m->chip.nlines; line++)
        if ((place = place_of(self->m, line, first))) {
            SHI_STEP(self, undo);
            take_line(self, line, first, place);
        }
    for (virq = first ? first : 1; virq < SHI_NR_IRQS && virq - first < count; virq++) {
        SHI_STEP(self, undo);
        shi_irqdesc_clear(&area->desc[virq]);
        SHI_STEP(self, undo);
        shi_store_full(&area->desc[virq].used, 0);
    }
    SHI_STEP(self, undo);
    shi_store_release(&area->undo, 0);
}

int shi_irq_trylock(struct shi_self *self)
{
    int err = shi_lock_try(self, &shi_irq_area(self->m)->lock);
    if (!err)
        shi_irq_free_undo(self);
    return err;
}

void shi_irq_unlock(struct shi_self *self)
{
    shi_a64 *lock = &shi_irq_area(self->m)->lock;
    if (!shi_lock_mine(self, lock))
        return;
    shi_irq_free_undo(self);
    shi_lock_release(self, lock);
}

/* ---- handlers -------------------------------------------------------------------- */

/* Its lock is held.  The number is odd meanwhile, also where who changed it was killed. */
static uint32_t begin_change(struct shi_irqdesc *desc)
{
    uint32_t seq = shi_load_relaxed(&desc->seq) | 1;
    shi_store_relaxed(&desc->seq, seq); /* the releases of `put` keep it before the fields */
    return seq;
}

static void end_change(struct shi_irqdesc *desc, uint32_t seq, uint32_t action)
{
    shi_store_release(&desc->action, action);
    shi_store_release(&desc->seq, seq + 1); /* read with acquire: it finds all the fields */
}

/* Release: who reads it with acquire (`get`) and looks at the number after that finds the
 * odd one, or a later one. */
static void put(uint32_t *field, uint32_t value)
{
    shi_store_release((shi_a32 *)field, value);
}

static uint32_t get(const uint32_t *field)
{
    return shi_load_acquire((const shi_a32 *)field);
}

void shi_irqdesc_set_native(struct shi_irqdesc *desc, uint32_t native, uint32_t kind,
                            uint64_t info, uint32_t stride)
{
    uint32_t seq = begin_change(desc);
    put(&desc->func, native);
    put(&desc->kind, kind);
    put(&desc->stride, stride);
    shi_store_release((shi_a64 *)&desc->info, info);
    end_change(desc, seq, SHI_IA_NATIVE);
}

void shi_irqdesc_set_python(struct shi_self *self, struct shi_irqdesc *desc, uint32_t func,
                            uint32_t serial)
{
    uint32_t seq = begin_change(desc);
    put(&desc->func, func);
    put(&desc->serial, serial);
    put(&desc->stride, 0);
    shi_store_release((shi_a16 *)&desc->src, (uint16_t)self->id);
    shi_store_release((shi_a16 *)&desc->src_gen, self->gen);
    end_change(desc, seq, SHI_IA_PYTHON);
}

void shi_irqdesc_set_line(struct shi_irqdesc *desc, uint32_t line)
{
    uint32_t seq = begin_change(desc);
    put(&desc->func, line);
    end_change(desc, seq, SHI_IA_LINE);
}

void shi_irqdesc_clear(struct shi_irqdesc *desc)
{
    uint32_t seq = begin_change(desc);
    shi_store_full(&desc->action, SHI_IA_NONE);
    end_change(desc, seq, SHI_IA_NONE);
}

bool shi_irqdesc_read(const struct shi_irqdesc *desc, struct shi_irqdesc *seen)
{
    uint32_t tries, seq;
    for (tries = 0; tries < READ_TRIES; tries++) {
        seq = shi_load_acquire(&desc->seq);
        if (seq & 1) { /* bounded: who replaces it may wait for this core, or be dead */
            shi_cpu_relax();
            continue;
        }
        seen->func = get(&desc->func);
        seen->serial = get(&desc->serial);
        seen->kind = get(&desc->kind);
        seen->stride = get(&desc->stride);
        seen->src = shi_load_acquire((const shi_a16 *)&desc->src);
        seen->src_gen = shi_load_acquire((const shi_a16 *)&desc->src_gen);
        seen->info = shi_load_acquire((const shi_a64 *)&desc->info);
        shi_store_relaxed(&seen->action, shi_load_acquire(&desc->action));
        /* Of two requests the one's function would get the other's info: all again. */
        if (shi_load_relaxed(&desc->seq) == seq)
            return true;
    }
    shi_store_relaxed(&seen->action, SHI_IA_NONE);
    return false;
}

bool shi_irqdesc_run_native(struct shi_self *self, const struct shi_irqdesc *desc)
{
    shi_native_handler *function = shi_native_get(desc->func);
    void *info = NULL;
    if (!function)
        return false;
    if (desc->kind == SHI_K_INT)
        info = (void *)(uintptr_t)desc->info;
    else if (desc->kind == SHI_K_POINTER) {
        uint64_t at = desc->info + (uint64_t)desc->stride * self->id; /* this_cpu_ptr() */
        if (desc->info >= shi_array_end(self->m) || at >= shi_array_end(self->m))
            return false;
        info = self->m->base + at;
    }
    function(info);
    shi_end_if_forked(self);
    return true;
}

bool shi_irqdesc_requester_lives(const struct shi_machine *m, const struct shi_irqdesc *desc)
{
    if (desc->src >= m->nslots)
        return false;          /* damaged */
    if (desc->src >= m->ncpus) /* the host's end is the machine's: its generation stays 0 */
        return (uint16_t)shi_load_acquire(&shi_slot(m, desc->src)->generation) == desc->src_gen;
    uint64_t w = shi_load_acquire(&shi_slot(m, desc->src)->word);
    return shi_word_state(w) != SHI_DEAD && shi_word_gen(w) == desc->src_gen;
}

static shi_a64 *line_count(const struct shi_machine *m, uint32_t cpu, uint32_t line)
{
    return (shi_a64 *)(m->base + shi_line_count_offset(m)) + (uint64_t)cpu * SHI_NLINES + line;
}

uint64_t shi_irqdesc_taken(const struct shi_machine *m, uint32_t cpu, uint32_t line)
{
    return shi_load_relaxed(line_count(m, cpu, line));
}

/* Is this CPU one of those that the irq was reserved for? */
static bool is_for(const struct shi_machine *m, uint32_t virq, uint32_t cpu)
{
    const uint64_t *masks = (const uint64_t *)(m->base + shi_affinity_offset(m));
    const volatile uint64_t *mask = masks + (uint64_t)virq * shi_affinity_words(m->ncpus);
    return mask[cpu / 64] >> (cpu % 64) & 1;
}

uint32_t shi_irqdesc_virq(const struct shi_self *self, uint32_t line)
{
    const struct shi_irq_area *area = shi_irq_area(self->m);
    uint32_t tries, n, first, virq;
    for (tries = 0; tries < VIRQ_TRIES; tries++) {
        /* Acquire: of its descriptor what was stored before it was published (make). */
        first = virq = shi_load_acquire(&area->line_virq[line]);
        if (!first || first >= SHI_NR_IRQS)
            return 0;
        if (!shi_load_acquire(&area->desc[first].next)) {
            /* `next` is cleared anew only after the line was taken from it (take_line, make):
             * else this one may have become another line's irq, and left a chain behind. */
            if (shi_load_acquire(&area->line_virq[line]) == first)
                return first;
            continue;
        }
        /* Several, each for other CPUs.  One that was destroyed meanwhile may lead to those of
         * another line, which its hwirq tells, or nowhere: then from the first again. */
        for (n = 0; virq && virq < SHI_NR_IRQS && n < SHI_NR_IRQS; n++) {
            if (area->desc[virq].hwirq == line && is_for(self->m, virq, self->id))
                return virq;
            virq = shi_load_acquire(&area->desc[virq].next);
        }
    }
    return 0;
}

void shi_irqdesc_reset_line(struct shi_self *self, uint32_t line, uint32_t virq)
{
    const struct shi_irq_area *area = shi_irq_area(self->m);
    uint32_t cpu, owner = shi_load_relaxed(&area->line_virq[line]);
    bool others = owner && (owner != virq || shi_load_relaxed(&area->desc[virq].next));
    for (cpu = 0; cpu < self->m->ncpus; cpu++) {
        if (virq && others && !is_for(self->m, virq, cpu))
            continue;
        /* Masked first: what is set after that stays where it is until it is unmasked. */
        shi_chip_enable(self, cpu, line, false);
        shi_chip_clear(self, cpu, line);
        shi_store_relaxed(line_count(self->m, cpu, line), 0);
    }
}

static uint64_t reservation(uint32_t virq, const struct shi_irqdesc *desc)
{
    return virq | (uint64_t)desc->epoch << 32;
}

bool shi_irqdesc_still(const struct shi_self *self, uint32_t line)
{
    uint32_t virq = shi_irqdesc_virq(self, line);
    const struct shi_irqdesc *desc = shi_irqdesc(self->m, virq);
    return virq && desc && self->later_for[line] == reservation(virq, desc);
}

/* Nobody has requested it: masked here.  But in a kernel it is this CPU that enables it, and
 * here others do: who requested and then enabled it since did so for good. */
static void hold_back(struct shi_self *self, uint32_t line, const struct shi_irqdesc *desc)
{
    struct shi_irqdesc now;
    SHI_STEP(self, spurious);
    /* Masked (full), looked at again second.  Who requests publishes the handler first and
     * enables second: that either comes after this mask, or its handler is found here.  But
     * who has disabled it again by now did so for good, too. */
    shi_chip_hold(self, line);
    if (shi_irqdesc_read(desc, &now) && shi_load_relaxed(&now.action) != SHI_IA_NONE)
        shi_chip_unhold(self, line);
}

/* A line of an irq was taken: false when it is ended later, by shi_chip_end. */
static bool handle(struct shi_self *self, uint32_t line)
{
    uint32_t i, virq = shi_irqdesc_virq(self, line);
    const struct shi_irqdesc *desc = shi_irqdesc(self->m, virq);
    struct shi_irqdesc seen; /* not zeroed: two lines of stores in the way of each interrupt */
    shi_store_relaxed(&seen.action, SHI_IA_NONE);
    bool known = !virq || !desc || shi_irqdesc_read(desc, &seen);
    uint32_t action = shi_load_relaxed(&seen.action);
    shi_a64 *count = line_count(self->m, self->id, line); /* kstat_irqs: the owner's alone */
    shi_store_relaxed(count, shi_load_relaxed(count) + 1);
    if (action == SHI_IA_NATIVE && shi_irqdesc_run_native(self, &seen)) {
        shi_count(self, SHI_C_irq_handled);
        return true;
    }
    if (action == SHI_IA_LINE) {
        uint32_t as = seen.func;
        if (as < self->m->chip.nlines && self->m->chip.use[as] != SHI_USE_IRQ) {
            shi_count(self, SHI_C_irq_handled);
            shi_chip_count_row(self, as);
            return shi_chip_act(self, as);
        }
    }
    if (action != SHI_IA_PYTHON) {
        shi_count(self, SHI_C_irq_other); /* freed meanwhile, or never requested */
        /* handle_percpu_devid_irq: "Spurious and unmasked percpu IRQ", held back from here on */
        if (action == SHI_IA_NONE && virq && known)
            hold_back(self, line, desc);
        return true;
    }
    if (self->inline_python && self->hooks.irq && !shi_python_waits(self)) {
        self->hooks.irq(self, line);
        return true;
    }
    self->later_for[line] = reservation(virq, desc);
    shi_fetch_or_full(&self->slot->pic.put_off[line / 64], 1ull << (line % 64));
    for (i = 0; i < self->nlater; i++)
        if (self->later[i] == line)
            return false; /* once more before it was handled at all */
    if (self->nlater < SHI_NLINES)
        self->later[self->nlater++] = (uint16_t)line;
    return false;
}

void shi_irqdesc_register(struct shi_machine *m)
{
    m->actions[SHI_USE_IRQ] = handle;
}

uint32_t shi_irqdesc_pop(struct shi_self *self)
{
    uint32_t line, i;
    if (!self->nlater)
        return SHI_NO_LINE;
    line = self->later[0];
    self->nlater--;
    for (i = 0; i < self->nlater; i++)
        self->later[i] = self->later[i + 1];
    /* Full, and before its irq is looked at: who withdraws that does so first, and then looks
     * whether it has begun (shi_lines_in_progress). */
    shi_fetch_and_full(&self->slot->pic.put_off[line / 64], ~(1ull << (line % 64)));
    return line;
}

/* ---- coprocessors ---------------------------------------------------------------- */

int shi_coproc_raise(struct shi_self *self, uint32_t number, uint32_t virq)
{
    struct shi_coproc *coproc;
    if (number >= SHI_NCOPROC)
        return -ENXIO;
    coproc = &shi_irq_area(self->m)->coproc[number];
    if (!virq || shi_load_acquire(&coproc->virq) != virq)
        return -ENXIO; /* it has ended, and the place may be another's by now */
    shi_count(self, SHI_C_chip_writes);
    shi_fetch_or_full(&coproc->pending, 1);
    shi_event_ring(&coproc->event);
    return 0;
}

void shi_coproc_ended(const struct shi_self *self, uint32_t pid)
{
    struct shi_header *h = self->m->header;
    shi_lock_orphan(self, &shi_irq_area(self->m)->lock, pid);
    shi_lock_orphan(self, &shi_irq_area(self->m)->nmi.lock, pid);
    shi_lock_orphan(self, &h->array_lock, pid);
    shi_lock_orphan(self, &h->hotplug_lock, pid);
    shi_lock_orphan(self, &h->stop_lock, pid);
    shi_lock_orphan(self, &h->tool_lock, pid);
}

void shi_coproc_ring_all(const struct shi_machine *m)
{
    uint32_t i;
    for (i = 0; i < SHI_NCOPROC; i++)
        shi_event_ring(&shi_irq_area(m)->coproc[i].event);
}
