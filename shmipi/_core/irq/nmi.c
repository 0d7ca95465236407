/* SPDX-License-Identifier: MIT */
#include "base/sys.h"

#include <errno.h>

#include "base/step.h"
#include "base/trace.h"
#include "irq/chip.h"
#include "irq/doorbell.h"
#include "irq/irqdesc.h"
#include "irq/nmi.h"
#include "irq/remind.h"
#include "irq/ring.h"

static struct shi_nmi_area *area_of(const struct shi_machine *m)
{
    return &shi_irq_area(m)->nmi;
}

/* By read-modify-write: a Python handler counts in another context of this CPU. */
static void count(struct shi_self *self, enum shi_counter c, uint32_t n)
{
    shi_fetch_add_relaxed(&self->slot->counters[SHI_CTX_NMI][c], n);
}

/* ---- sending --------------------------------------------------------------------- */

static int send(struct shi_self *self, uint32_t dst, uint32_t line)
{
    struct shi_machine *m = self->m;
    struct shi_pic *pic = shi_pic(m, dst);
    uint32_t was;
    bool full;
    if (!shi_word_online(shi_load_acquire(&shi_slot(m, dst)->word)))
        return -ENXIO;
    SHI_TRACE(self, nmi_send, dst, 0, 0, 0);
    shi_count(self, SHI_C_nmi_sent);
    if (line != SHI_NO_LINE) {
        shi_irq_raise(self, dst, line);
        return 1;
    }
    was = shi_load_relaxed(&pic->nmi);
    do {
        full = (was & SHI_NMI_PENDING) >= (was & SHI_NMI_IN_SERVICE ? 1u : 2u);
        /* Full, changed or not: releases what the sender stored before (an NMI IPI's number,
         * too) to the exchange that takes one of those pending.  A load alone could find them
         * while its own stores are still on their way, and they be taken without. */
    } while (!shi_cas_full(&pic->nmi, &was, full ? was : was + 1));
    if (full) {
        shi_count(self, SHI_C_nmi_collapsed);
        return 0;
    }
    SHI_STEP(self, nmi);
    shi_irq_signal_nmi(self, dst);
    return 1;
}

static uint32_t line_to(const struct shi_machine *m, uint32_t dst)
{
    return m->chip.nmi == SHI_NO_LINE ? SHI_NO_LINE : shi_line_of(m, m->chip.nmi, dst);
}

int shi_nmi_send(struct shi_self *self, uint32_t dst)
{
    return send(self, dst, line_to(self->m, dst));
}

/* A line that does what an NMI does, of a chip that has NMIs as well (powerpc's message). */
static uint32_t safe_line(const struct shi_machine *m)
{
    uint32_t line;
    for (line = 0; line < m->chip.nlines; line++)
        if (m->chip.use[line] == SHI_USE_NMI)
            return line;
    return SHI_NO_LINE;
}

int shi_nmi_resend(struct shi_self *self, uint32_t dst)
{
    uint32_t nmi = shi_load_full(&shi_pic(self->m, dst)->nmi);
    /* One in service looks for more itself when it ends. */
    if (!(nmi & SHI_NMI_PENDING) || nmi & SHI_NMI_IN_SERVICE)
        return 0;
    int err = shi_irq_signal_nmi(self, dst);
    return err ? err : 1;
}

/* ---- NMI IPIs: the sender ---------------------------------------------------------- */

int shi_nmi_ipi_trylock(struct shi_self *self)
{
    return shi_lock_try(self, &area_of(self->m)->lock);
}

void shi_nmi_ipi_unlock(struct shi_self *self)
{
    shi_lock_release(self, &area_of(self->m)->lock);
}

struct shi_irqdesc *shi_nmi_ipi(const struct shi_machine *m)
{
    return &area_of(m)->ipi;
}

uint32_t shi_nmi_ipi_number(struct shi_self *self)
{
    struct shi_nmi_area *nmi = area_of(self->m);
    uint32_t number = shi_load_relaxed(&nmi->request) + 1;
    number += !number; /* 0: none */
    /* Before the function is replaced: who reads part of the new one, for a number that a dead
     * sender has left, looks at this again after it and finds another (asked). */
    shi_store_full(&nmi->request, number);
    return number;
}

int shi_nmi_ipi_ask(struct shi_self *self, uint32_t dst, uint32_t number, bool safe)
{
    const struct shi_machine *m = self->m;
    uint32_t line = line_to(m, dst);
    if (!shi_word_online(shi_load_acquire(&shi_slot(m, dst)->word)))
        return -ENXIO;
    /* Before the NMI is pending: who takes that finds it.  Releases the function. */
    shi_store_full(&shi_pic(m, dst)->nmi_request, number);
    SHI_STEP(self, nmi_ask);
    if (safe && line == SHI_NO_LINE)
        line = safe_line(m);
    int sent = send(self, dst, line);
    if (sent < 0)
        return sent;
    shi_count(self, SHI_C_chip_writes);
    return 0;
}

bool shi_nmi_ipi_entered(const struct shi_machine *m, uint32_t dst, uint32_t number)
{
    /* Acquire pairs with the swap by which the target enters it (shi_nmi_ipi_enter). */
    return shi_load_acquire(&shi_pic(m, dst)->nmi_request) != number;
}

bool shi_nmi_ipi_take_back(const struct shi_machine *m, uint32_t dst, uint32_t number)
{
    /* Against the target's, of the same word: one of the two has it. */
    return shi_cas_full(&shi_pic(m, dst)->nmi_request, &number, 0);
}

/* ---- NMI IPIs: the target ---------------------------------------------------------- */

bool shi_nmi_ipi_asked(struct shi_self *self, struct shi_irqdesc *seen, uint32_t *number)
{
    struct shi_nmi_area *nmi = area_of(self->m);
    shi_a32 *request = &self->slot->pic.nmi_request;
    /* Acquire pairs with the ask: the function is that of this number, or of a later one. */
    *number = shi_load_acquire(request);
    if (!*number)
        return false;
    bool whole = shi_irqdesc_read(&nmi->ipi, seen);
    /* The number after the function: see shi_nmi_ipi_number. */
    bool stands = shi_load_acquire(&nmi->request) == *number;
    if (whole && stands && !shi_lock_is_free(self, &nmi->lock))
        return true;
    /* Its sender has died: who lives takes back what he has asked for before he lets go of the
     * lock.  If another asks just now, by a new number, the swap fails, and its NMI comes. */
    uint32_t stale = *number;
    if (!stands || shi_lock_is_free(self, &nmi->lock))
        shi_cas_full(request, &stale, 0);
    return false;
}

bool shi_nmi_ipi_enter(struct shi_self *self, uint32_t number)
{
    /* What was read of the function is of this number: its sender replaces it only when
     * nobody is asked for it any more. */
    if (!shi_cas_full(&self->slot->pic.nmi_request, &number, 0))
        return false;
    SHI_TRACE(self, nmi_handler, self->id, 0, 0, 0);
    SHI_STEP(self, nmi_take);
    return true;
}

uint32_t shi_nmi_ipi_native(struct shi_self *self, bool *python)
{
    struct shi_irqdesc seen;
    uint32_t number;
    *python = false;
    if (!shi_nmi_ipi_asked(self, &seen, &number))
        return 0;
    if (shi_load_relaxed(&seen.action) == SHI_IA_PYTHON)
        *python = true;
    if (shi_load_relaxed(&seen.action) != SHI_IA_NATIVE || !shi_nmi_ipi_enter(self, number))
        return 0;
    shi_irqdesc_run_native(self, &seen);
    return 1;
}

/* ---- handlers ---------------------------------------------------------------------- */

/* Four bits each: what stands beyond the last is 0. */
static uint32_t place_at(uint64_t order, uint32_t index)
{
    return index < SHI_NMI_ACTIONS ? (uint32_t)(order >> (4 * index)) & 0xf : 0;
}

static uint32_t length_of(uint64_t order)
{
    uint32_t n = 0;
    while (place_at(order, n))
        n++;
    return n;
}

struct shi_irqdesc *shi_nmi_action(const struct shi_machine *m, uint32_t type, uint32_t index)
{
    struct shi_nmi_area *nmi = area_of(m);
    /* Acquire pairs with the exchange of shi_nmi_action_add: the handler is whole. */
    uint32_t place = place_at(shi_load_acquire(&nmi->order[type]), index);
    return place ? &nmi->action[type][place - 1] : NULL;
}

struct shi_irqdesc *shi_nmi_action_free(const struct shi_machine *m, uint32_t type)
{
    struct shi_nmi_area *nmi = area_of(m);
    uint64_t order = shi_load_relaxed(&nmi->order[type]);
    uint32_t place, index, taken = 0;
    for (index = 0; place_at(order, index); index++)
        taken |= 1u << place_at(order, index);
    /* Also one that a CPU runs, which was removed while it did: what it reads of it is whole,
     * the old handler or the new one (shi_irqdesc_read). */
    for (place = 1; place <= SHI_NMI_ACTIONS; place++)
        if (!(taken >> place & 1))
            return &nmi->action[type][place - 1];
    return NULL;
}

void shi_nmi_action_add(const struct shi_machine *m, uint32_t type,
                        const struct shi_irqdesc *action, bool first)
{
    struct shi_nmi_area *nmi = area_of(m);
    uint64_t order = shi_load_relaxed(&nmi->order[type]);
    uint64_t place = (uint64_t)(action - nmi->action[type]) + 1;
    order = first ? order << 4 | place : order | place << (4 * length_of(order));
    /* Releases the handler to the walk. */
    shi_xchg_full(&nmi->order[type], order);
}

void shi_nmi_action_remove(const struct shi_machine *m, uint32_t type, uint32_t index)
{
    struct shi_nmi_area *nmi = area_of(m);
    uint64_t order = shi_load_relaxed(&nmi->order[type]);
    uint64_t before = (UINT64_C(1) << (4 * index)) - 1;
    struct shi_irqdesc *action = shi_nmi_action(m, type, index);
    /* Full: before the look at nmi_service.  Who is not in service then has made its own odd
     * after this, and reads the order after that (accept, walk). */
    shi_xchg_full(&nmi->order[type], (order & before) | (order >> 4 & ~before));
    shi_irqdesc_clear(action);
}

/* Run the native handlers of a type.  True: there are others. */
static bool walk(struct shi_self *self, uint32_t type)
{
    const struct shi_nmi_area *nmi = area_of(self->m);
    uint64_t order = shi_load_full(&nmi->order[type]);
    uint32_t index, place;
    bool python = false;
    for (index = 0; (place = place_at(order, index)); index++) {
        struct shi_irqdesc seen;
        if (!shi_irqdesc_read(&nmi->action[type][place - 1], &seen))
            continue;
        python |= shi_load_relaxed(&seen.action) == SHI_IA_PYTHON;
        if (shi_load_relaxed(&seen.action) != SHI_IA_NATIVE)
            continue;
        SHI_TRACE(self, nmi_handler, self->id, 0, 0, 0);
        self->nmi_handled += shi_irqdesc_run_native(self, &seen);
    }
    return python;
}

/* ---- taking one: default_do_nmi ---------------------------------------------------- */

/* Pending becomes in service: false when none is pending, or one is in service. */
static bool accept_nmi(struct shi_self *self)
{
    shi_a32 *nmi = &self->slot->pic.nmi;
    uint32_t was = shi_load_relaxed(nmi);
    do {
        if (!(was & SHI_NMI_PENDING) || was & SHI_NMI_IN_SERVICE)
            return false;
    } while (!shi_cas_full(nmi, &was, (was - 1) | SHI_NMI_IN_SERVICE));
    /* Full: before it reads who is asked (shi_nmi_action_remove). */
    shi_fetch_add_full(&self->slot->pic.nmi_service, 1);
    count(self, SHI_C_nmi, 1);
    return true;
}

/* Ask those of `nmi_type`.  True: Python ones are left. */
static bool ask(struct shi_self *self)
{
    bool python = false;
    if (self->nmi_type == SHI_NMI_LOCAL) {
        if (self->m->nmi_local)
            self->nmi_handled += self->m->nmi_local(self);
        self->nmi_handled += shi_nmi_ipi_native(self, &python);
    }
    python |= walk(self, self->nmi_type);
    return python;
}

/* Is there a reason that is no CPU's own?  Whose turn it is, then.  The port has a lock in the
 * kernel, so that one CPU handles it: here it is read and cleared in one. */
static bool external(struct shi_self *self)
{
    shi_a32 *reason = &area_of(self->m)->reason;
    uint32_t was = shi_load_relaxed(reason), bit;
    do {
        bit = was & SHI_NMI_REASON_SERR;
        if (!bit)
            bit = was & SHI_NMI_REASON_IOCHK;
        if (!bit)
            return false;
    } while (!shi_cas_full(reason, &was, was & ~bit));
    self->nmi_type = bit == SHI_NMI_REASON_SERR ? SHI_NMI_SERR : SHI_NMI_IO_CHECK;
    count(self, SHI_C_nmi_external, 1);
    return true;
}

/* Those of `nmi_type` have been asked: whose turn is it?  False: nobody's. */
static bool next_type(struct shi_self *self)
{
    uint32_t handled = self->nmi_handled;
    self->nmi_handled = 0;
    if (self->nmi_type == SHI_NMI_UNKNOWN)
        count(self, SHI_C_nmi_unknown, handled ? handled : 1);
    if (self->nmi_type != SHI_NMI_LOCAL)
        return false;
    if (handled) {
        if (handled > 1) /* the NMI of one of them may be the next */
            self->nmi_swallow = true;
        return false;
    }
    if (external(self))
        return true;
    if ((self->nmi_again && self->nmi_swallow) || self->nmi_spent) {
        count(self, SHI_C_nmi_swallowed, 1);
        return false;
    }
    self->nmi_type = SHI_NMI_UNKNOWN;
    return true;
}

bool shi_nmi_go_on(struct shi_self *self)
{
    while (next_type(self))
        if (ask(self))
            return true;
    return false;
}

static void begin(struct shi_self *self, bool again)
{
    if (!again)
        self->nmi_swallow = false;
    self->nmi_again = again;
    self->nmi_spent = self->nmi_ahead;
    self->nmi_ahead = false;
    self->nmi_type = SHI_NMI_LOCAL;
    self->nmi_handled = 0;
}

/* Let an idle CPU look around, as after an interrupt. */
static void look_after(struct shi_self *self)
{
    shi_a64 *word = &self->slot->word;
    uint64_t w = shi_load_relaxed(word), next;
    do {
        switch (shi_word_state(w)) {
        case SHI_POLLING:
        case SHI_RUNG:
            next = w |
                   SHI_W_PENDING; /* the idle loop looks, finds no line, and Python's turn */
            break;
        case SHI_HALTED:
            next = shi_word_with(w | SHI_W_PENDING, SHI_RUNG);
            break;
        default:
            return;
        }
    } while (!shi_cas_full(word, &w, next));
    /* This signal has woken it, unless it came just before it went to sleep. */
    if (shi_word_state(w) == SHI_HALTED)
        shi_doorbell_ring(self, self->id);
}

/* Bring the own CPU's interpreter to its Python handlers. */
static void call_python(struct shi_self *self)
{
    if (self->hooks.nmi) {
        self->hooks.nmi(self); /* for a CPU that runs Python now, handlers included */
        shi_remind(self);
    }
    look_after(self);
}

static void over(struct shi_self *self)
{
    SHI_TRACE(self, nmi_exit, self->id, 0, 0, 0);
    /* Full, and before it can be odd again: who waits for a handler's end reads it. */
    shi_fetch_add_full(&self->slot->pic.nmi_service, 1);
    shi_fetch_and_full(&self->slot->pic.nmi, ~SHI_NMI_IN_SERVICE);
}

/* Take what is pending.  `again`: one has just been over. */
static void take(struct shi_self *self, bool again)
{
    for (; accept_nmi(self); again = true) {
        uint8_t depth = self->in_nmi;
        SHI_TRACE(self, nmi_entry, self->id, 0, 0, 0);
        self->in_nmi = 1;
        shi_cause(self, SHI_CAUSE_nmi);
        begin(self, again);
        bool python = ask(self) || shi_nmi_go_on(self);
        self->in_nmi = depth;
        if (python) {
            self->nmi_waits = 1;
            shi_signal_fence();
            call_python(self);
            return; /* in service until its handlers have returned */
        }
        over(self);
        if (self->pausing)
            look_after(self); /* the task that halted here goes on */
    }
}

void shi_nmi_entry(struct shi_self *self)
{
    take(self, false);
}

void shi_nmi_done(struct shi_self *self)
{
    over(self);
    take(self, true);
}

/* The line that stands in for an NMI was taken. */
static bool by_line(struct shi_self *self, uint32_t line)
{
    uint32_t was = shi_load_relaxed(&self->slot->pic.nmi);
    /* One line, one NMI: whatever is pending is what the line stands for. */
    while (!(was & SHI_NMI_PENDING) && !shi_cas_full(&self->slot->pic.nmi, &was, was + 1))
        ;
    shi_nmi_entry(self);
    (void)line;
    return true;
}

void shi_nmi_register(struct shi_machine *m)
{
    m->actions[SHI_USE_NMI] = by_line;
}
