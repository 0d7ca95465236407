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

#define NMI_DESC 0u

int shi_nmi_send(struct shi_self *self, uint32_t dst)
{
    struct shi_machine *m = self->m;
    struct shi_pic *pic = shi_pic(m, dst);
    uint32_t was, pending;
    if (!shi_word_online(shi_load_acquire(&shi_slot(m, dst)->word)))
        return -ENXIO;
    SHI_TRACE(self, nmi_send, dst, 0, 0, 0);
    shi_count(self, SHI_C_nmi_sent);
    if (m->chip.nmi != SHI_NO_LINE) {
        shi_irq_raise(self, dst, shi_line_of(m, m->chip.nmi, dst));
        return 1;
    }
    was = shi_load_relaxed(&pic->nmi);
    do {
        pending = was & SHI_NMI_PENDING;
        if (pending >= (was & SHI_NMI_IN_SERVICE ? 1u : 2u)) {
            shi_count(self, SHI_C_nmi_collapsed);
            return 0;
        }
        /* Full: releases what the sender stored before to the handler's exchange. */
    } while (!shi_cas_full(&pic->nmi, &was, was + 1));
    SHI_STEP(self, nmi);
    shi_irq_signal_nmi(self, dst);
    return 1;
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

/* Pending becomes in service: false when none is pending, or one is in service. */
static bool accept_nmi(struct shi_self *self)
{
    shi_a32 *nmi = &self->slot->pic.nmi;
    uint32_t was = shi_load_relaxed(nmi);
    do {
        if (!(was & SHI_NMI_PENDING) || was & SHI_NMI_IN_SERVICE)
            return false;
    } while (!shi_cas_full(nmi, &was, (was - 1) | SHI_NMI_IN_SERVICE));
    /* By read-modify-write: a Python handler counts in another context of this CPU. */
    shi_fetch_add_relaxed(&self->slot->counters[SHI_CTX_NMI][SHI_C_nmi], 1);
    return true;
}

void shi_nmi_entered(struct shi_self *self)
{
    SHI_TRACE(self, nmi_handler, self->id, 0, 0, 0);
    shi_fetch_add_full(&self->slot->pic.nmi_entered, 1);
}

void shi_nmi_done(struct shi_self *self)
{
    SHI_TRACE(self, nmi_exit, self->id, 0, 0, 0);
    shi_fetch_and_full(&self->slot->pic.nmi, ~SHI_NMI_IN_SERVICE);
}

/* Run it here if it is native: true.  False: Python has to. */
static bool run(struct shi_self *self)
{
    struct shi_irqdesc seen;
    shi_irqdesc_read(shi_irqdesc(self->m, NMI_DESC), &seen);
    uint32_t action = shi_load_relaxed(&seen.action);
    if (action == SHI_IA_PYTHON)
        return false;
    if (action == SHI_IA_NATIVE) {
        shi_nmi_entered(self);
        shi_irqdesc_run_native(self, &seen);
    }
    return true; /* nobody's: counted, as the kernel's "NMI received for unknown reason" */
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

/* Bring the own CPU's interpreter to its Python handler. */
static void call_python(struct shi_self *self)
{
    if (self->hooks.nmi) {
        self->hooks.nmi(self); /* for a CPU that runs Python now, handlers included */
        shi_remind(self);
    }
    look_after(self);
}

void shi_nmi_entry(struct shi_self *self)
{
    while (accept_nmi(self)) {
        uint8_t depth = self->in_nmi;
        SHI_TRACE(self, nmi_entry, self->id, 0, 0, 0);
        self->in_nmi = 1;
        if (!run(self)) {
            self->in_nmi = depth;
            self->nmi_waits = 1;
            shi_signal_fence();
            call_python(self);
            return; /* in service until its handler has returned */
        }
        self->in_nmi = depth;
        shi_nmi_done(self);
        if (self->pausing)
            look_after(self); /* the task that halted here goes on */
    }
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
