/* SPDX-License-Identifier: MIT */
#include "base/sys.h"

#include <errno.h>

#include "base/event.h"
#include "base/step.h"
#include "base/trace.h"
#include "irq/doorbell.h"
#include "irq/ring.h"
#include "irq/signal.h"

/*
 * The pid that a kick goes to must not be another process by then.  While `ringing`
 * names the target, the reaper does not wait for it, so its pid stays taken.  The
 * store is an exchange and stands before the swap of the target's word: either the
 * swap finds DEAD, or the reaper, which writes DEAD first and reads hazards second,
 * finds this one.
 */
static void hazard_set(struct shi_self *self, uint32_t dst)
{
    if (self->host)
        pthread_mutex_lock(&self->kick_lock); /* one hazard for all its threads */
    shi_xchg_full(&self->slot->ringing, dst + 1);
}

static void hazard_clear(struct shi_self *self)
{
    shi_store_release(&self->slot->ringing, 0);
    if (self->host)
        pthread_mutex_unlock(&self->kick_lock);
}

static bool needs_pid(const struct shi_machine *m, uint64_t w, bool again)
{
    switch (shi_word_state(w)) {
    case SHI_RUNNING:
        return m->kick && (again || !(w & SHI_W_KICKED));
    case SHI_HALTED:
        return shi_doorbell_of(m)->by_signal;
    case SHI_RUNG:
        return again && shi_doorbell_of(m)->by_signal;
    default:
        return false;
    }
}

/*
 * Turn `dst`'s word into one that says "somebody rings", with `set` added, and ring.
 * `again`: ring even where the word says that somebody else undertook to.  -errno when
 * nothing could be sent: then the watchdog rings, because others trust the word.
 */
static int ring(struct shi_self *self, uint32_t dst, uint64_t set, bool completion, bool again)
{
    struct shi_machine *m = self->m;
    struct shi_slot *slot = shi_slot(m, dst);
    enum shi_rung way;
    bool hazard = false;
    int err = 0;
    /* Full: after the line was set, so that one who comes online sees it, or we see him. */
    uint64_t w = shi_load_full(&slot->word), next;
    for (;;) {
        /* The own pid is taken; and an NMI on top of this must not end its hazard. */
        if (!hazard && (dst != self->id || self->host) && needs_pid(m, w, again)) {
            hazard_set(self, dst);
            hazard = true;
            w = shi_load_relaxed(&slot->word);
        }
        way = SHI_RUNG_NOT;
        next = w | set;
        switch (shi_word_state(w)) {
        case SHI_HALTED:
            next = shi_word_with(next, SHI_RUNG);
            way = SHI_RUNG_DOORBELL;
            break;
        case SHI_RUNG:
            way = again ? SHI_RUNG_DOORBELL : SHI_RUNG_NOT;
            break;
        case SHI_RUNNING:
            if (!completion && m->kick && (again || !(w & SHI_W_KICKED))) {
                next |= SHI_W_KICKED;
                way = SHI_RUNG_KICK;
            }
            break;
        case SHI_POLLING:
            break;
        default: /* offline or dead */
            goto out;
        }
        /* Full: the pending bit and the queue stand before what the target reads
         * after it has changed its own state with a read-modify-write of this word. */
        if (shi_cas_full(&slot->word, &w, next))
            break;
    }
    SHI_STEP(self, ring);
    SHI_TRACE(self, rung, dst, 0, 0, (uint32_t)way);
    if (way == SHI_RUNG_DOORBELL)
        err = shi_doorbell_ring(self, dst);
    else if (way == SHI_RUNG_KICK)
        err = shi_kick_send(self, dst);
    else if (shi_word_state(w) == SHI_RUNNING && !completion && m->kick)
        shi_count(self, SHI_C_kicks_coalesced);
    SHI_STEP(self, rung);
out:
    if (hazard)
        hazard_clear(self);
    return err;
}

void shi_irq_ring(struct shi_self *self, uint32_t dst)
{
    ring(self, dst, SHI_W_PENDING, false, false);
}

void shi_irq_ring_pending(struct shi_self *self, uint32_t dst, bool again)
{
    ring(self, dst, SHI_W_PENDING, false, again);
}

int shi_irq_ring_again(struct shi_self *self, uint32_t dst, uint64_t set)
{
    return ring(self, dst, set, false, true);
}

void shi_irq_ring_waiter(struct shi_self *self, uint32_t id)
{
    if (id >= self->m->ncpus) {
        shi_count(self, SHI_C_doorbells_sent);
        shi_event_ring(&shi_slot(self->m, id)->event);
    } else {
        ring(self, id, 0, true, false);
    }
}

int shi_irq_signal_nmi(struct shi_self *self, uint32_t dst)
{
    int err = -ESRCH;
    hazard_set(self, dst);
    if (shi_word_online(shi_load_full(&shi_slot(self->m, dst)->word))) {
        SHI_TRACE(self, rung, dst, 0, 0, SHI_RUNG_NMI);
        err = shi_nmi_signal(self, dst);
    }
    hazard_clear(self);
    return err;
}
