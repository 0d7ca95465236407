/* SPDX-License-Identifier: MIT */
#include "base/sys.h"

#include <errno.h>
#include <signal.h>
#include <string.h>
#include <unistd.h>

#include "irq/chip.h"
#include "base/clock.h"
#include "smp/csd.h"
#include "irq/doorbell.h"
#include "irq/irq.h"
#include "base/native.h"
#include "irq/nmi.h"
#include "smp/queue.h"
#include "smp/remind.h"
#include "base/step.h"
#include "base/trace.h"

/* A kick so soon after the last one is part of a storm: stay and poll a little, as a
 * network driver does (NAPI), because the next one costs its sender 10 us. */
#define STORM_NS 50000u
#define STORM_POLL_NS 2000u

/* ---- ringing --------------------------------------------------------------------- */

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
        return m->doorbell == SHI_DB_SIGNAL;
    case SHI_RUNG:
        return again && m->doorbell == SHI_DB_SIGNAL;
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
        if (!hazard && needs_pid(m, w, again)) {
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

void shi_irq_ring_waiter(struct shi_self *self, uint32_t id)
{
    if (id >= self->m->ncpus) {
        shi_count(self, SHI_C_doorbells_sent);
        shi_event_ring(&shi_slot(self->m, id)->event);
    } else {
        ring(self, id, 0, true, false);
    }
}

int shi_irq_rering(struct shi_self *self, uint32_t dst)
{
    uint64_t w = shi_load_full(&shi_slot(self->m, dst)->word);
    enum shi_state state = shi_word_state(w);
    if (!shi_word_online(w))
        return 0;
    int nmi = shi_nmi_resend(self, dst);
    /* A line whose sender died between setting it and ringing. */
    uint64_t set = self->m->flow->pending(self->m, dst) ? SHI_W_PENDING : 0;
    if (set & ~w) {
        w |= set;
    } else if (state == SHI_POLLING || (state == SHI_RUNNING && !self->m->kick)) {
        return nmi;
    }
    /* What died with a ringer may be no more than its promise to ring: RUNG or KICKED
     * with nothing sent silences every later sender, work or no work.  (ASKED alone is
     * the business of the CPU's own timer: remind.h.) */
    if (!shi_word_work(w) && state != SHI_RUNG && !(w & SHI_W_KICKED))
        return nmi;
    int err = ring(self, dst, set, false, true);
    if (!err)
        shi_count(self, SHI_C_rekicked);
    return err ? err : 1;
}

int shi_irq_send_reschedule(struct shi_self *self, uint32_t dst)
{
    struct shi_slot *slot = shi_slot(self->m, dst);
    uint64_t w = shi_load_relaxed(&slot->word);
    SHI_TRACE(self, call_entry, dst, 0, 0, SHI_E_RESCHEDULE);
    for (;;) {
        if (!shi_word_online(w))
            return -ENXIO;
        if (shi_word_state(w) != SHI_POLLING)
            break;
        /* set_nr_if_polling: the idle loop looks at the flag, no IPI is needed. */
        if (shi_cas_full(&slot->word, &w, w | SHI_W_NEED_RESCHED)) {
            shi_count(self, SHI_C_resched_elided);
            shi_count(self, SHI_C_elided);
            SHI_TRACE(self, wake_idle_without_ipi, dst, 0, 0, 0);
            return 0;
        }
    }
    shi_count(self, SHI_C_resched_sent);
    shi_chip_send_reschedule(self, dst);
    return 0;
}

/* ---- NMIs, and INIT --------------------------------------------------------------- */

void shi_irq_end(struct shi_self *self, uint32_t dst)
{
    struct shi_slot *slot = shi_slot(self->m, dst);
    uint64_t w = shi_load_full(&slot->word);
    if (dst == self->id && !self->host)
        kill(getpid(), SIGKILL); /* its own pid, whatever the segment says */
    /* The firmware does it, whose child it is: a pid in here may be damaged, or another's
     * by now.  The generation says of which process we speak. */
    if (shi_word_state(w) != SHI_DEAD)
        shi_store_full(&slot->pic.init, shi_word_gen(w));
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

void shi_irq_call_python_for_nmi(struct shi_self *self)
{
    if (self->hooks.nmi) {
        self->hooks.nmi(self); /* for a CPU that runs Python now, handlers included */
        shi_remind(self);
    }
    shi_irq_look_after_nmi(self);
}

void shi_irq_look_after_nmi(struct shi_self *self)
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

/* ---- running what arrived -------------------------------------------------------- */

static void run_native(struct shi_self *self, uint32_t index, struct shi_csd *csd)
{
    shi_native_handler *function = shi_native_get(csd->func & ~SHI_FUNC_NATIVE);
    bool sync = (shi_load_relaxed(&csd->lock) & SHI_CSD_TYPE) == SHI_CSD_SYNC;
    union shi_value copy;
    void *info = NULL;
    if (!function) {
        shi_count(self, SHI_C_corrupt);
        shi_store_relaxed(&csd->status, SHI_S_NOFUNC);
        shi_csd_unlock(self, csd);
        return;
    }
    switch (csd->kind) {
    case SHI_K_INT:
        info = (void *)(intptr_t)csd->value.i;
        break;
    case SHI_K_POINTER:
        if (csd->value.u >= shi_array_end(self->m)) {
            shi_count(self, SHI_C_corrupt);
            shi_store_relaxed(&csd->status, SHI_S_BROKEN);
            shi_csd_unlock(self, csd);
            return;
        }
        info = self->m->base + csd->value.u;
        break;
    case SHI_K_BYTES:
        info = csd->value.bytes;
        if (!sync) {
            copy = csd->value; /* the sender may use the csd again at once */
            info = copy.bytes;
        }
        break;
    default:
        break;
    }
    shi_count(self, SHI_C_native_run);
    shi_store_relaxed(&self->slot->cur_csd, index + 1);
    SHI_TRACE(self, csd_function_entry, self->id, index + 1, csd->func, 0);
    SHI_STEP(self, run);
    if (sync) {
        shi_count(self, SHI_C_csd_sync);
        function(info);
        SHI_TRACE(self, csd_function_exit, self->id, index + 1, 0, 0);
        shi_csd_unlock(self, csd);
    } else {
        shi_count(self, SHI_C_csd_async);
        shi_csd_unlock(self, csd);
        function(info);
        SHI_TRACE(self, csd_function_exit, self->id, index + 1, 0, 0);
    }
    shi_store_relaxed(&self->slot->cur_csd, 0);
}

void shi_csd_run(struct shi_self *self, uint32_t index)
{
    struct shi_csd *csd = shi_csd(self->m, index);
    if (csd->func & SHI_FUNC_NATIVE)
        run_native(self, index, csd);
    else if (self->inline_python && self->hooks.run && !shi_python_waits(self))
        self->hooks.run(self, index); /* in order: not past one that was put off */
    else
        shi_list_append(self->m, &self->deferred, index);
}

/* __flush_smp_call_function_queue: SYNC, then ASYNC and irq_work, then wake-ups. */
void shi_flush_queue(struct shi_self *self)
{
    const struct shi_machine *m = self->m;
    uint32_t newest = shi_queue_grab(self), index = newest - 1;
    struct shi_list taken, later = { 0, 0, 0 };
    if (!newest)
        return;
    if (shi_csd_is_ours(self, index) && !shi_load_relaxed(&shi_csd(m, index)->next)) {
        /* One only, which is what latency is made of: no lists, and its line is not
         * written to before the unlock, so it stays shared with the waiter. */
        if ((shi_load_relaxed(&shi_csd(m, index)->lock) & SHI_CSD_TYPE) == SHI_CSD_TTWU)
            shi_list_append(m, &self->tasks, index);
        else
            shi_csd_run(self, index);
        return;
    }
    taken = shi_queue_in_order(self, newest);
    while ((index = shi_list_pop(self, &taken)) != UINT32_MAX) {
        uint64_t type = shi_load_relaxed(&shi_csd(m, index)->lock) & SHI_CSD_TYPE;
        if (taken.head)
            shi_prefetch_write(shi_csd(m, taken.head - 1));
        if (type == SHI_CSD_SYNC)
            shi_csd_run(self, index);
        else if (type == SHI_CSD_TTWU)
            shi_list_append(m, &self->tasks, index); /* wake-ups only queue a task */
        else
            shi_list_append(m, &later, index);
    }
    while ((index = shi_list_pop(self, &later)) != UINT32_MAX)
        shi_csd_run(self, index);
}

bool shi_service(struct shi_self *self)
{
    bool did = false;
    for (;;) {
        /* Acquire pairs with the push: but what is acted upon comes from the RMW. */
        uint64_t w = shi_load_acquire(&self->slot->word);
        if (w & SHI_W_PENDING) {
            shi_chip_handle(self);
        } else if (shi_word_head(w)) {
            shi_flush_queue(self);
        } else if (w & SHI_W_NEED_RESCHED) {
            SHI_TRACE(self, resched_idle, self->id, 0, 0, 0);
            shi_fetch_and_full(&self->slot->word, ~SHI_W_NEED_RESCHED);
        } else {
            self->served += did;
            return did;
        }
        did = true;
    }
}

/* ---- the soft mask --------------------------------------------------------------- */

void shi_set_polling(struct shi_self *self)
{
    uint64_t w = shi_load_relaxed(&self->slot->word), next;
    do {
        if (!shi_word_online(w))
            return;
        next = shi_word_with(w, SHI_POLLING);
    } while (!shi_cas_full(&self->slot->word, &w, next));
}

void shi_set_running(struct shi_self *self)
{
    uint64_t w = shi_load_relaxed(&self->slot->word), next;
    SHI_STEP(self, task);
    for (;;) {
        if (!shi_word_online(w))
            return;
        if (shi_word_work(w)) {
            /* Its sender saw POLLING and did not ring: nobody else will look. */
            if (self->irqs_off) {
                self->happened = 1; /* replayed by shi_irq_restore */
            } else {
                self->in_core++;
                shi_service(self);
                self->in_core--;
                w = shi_load_relaxed(&self->slot->word);
                continue;
            }
        }
        /* ASKED from a kick since may have been answered by run_deferred already, and a
         * stale one keeps senders from kicking for ever. */
        next = shi_word_with(w, SHI_RUNNING) &
               ~(SHI_W_KICKED | SHI_W_NEED_RESCHED | SHI_W_ASKED);
        if (shi_python_waits(self))
            next |= SHI_W_ASKED;
        if (shi_cas_full(&self->slot->word, &w, next))
            return;
    }
}

/* In hard-irq context: drain, with senders told to leave the kicking be. */
static void irq_work(struct shi_self *self)
{
    uint8_t ctx = self->ctx;
    bool inline_python = self->inline_python;
    uint64_t w = shi_load_relaxed(&self->slot->word), next;
    if (shi_word_state(w) != SHI_RUNNING)
        return; /* a replay in another state: that state's owner looks */
    self->ctx = SHI_CTX_IRQ;
    self->counts = self->slot->counters[SHI_CTX_IRQ];
    self->irqs_off = 1;
    self->in_irq++;
    self->inline_python = false;
    shi_set_polling(self);
    if (!shi_service(self))
        shi_count(self, SHI_C_kicks_empty);
    uint64_t now = shi_now_ns();
    if (now - self->storm_ns < STORM_NS) {
        while (shi_now_ns() - now < STORM_POLL_NS && !shi_python_waits(self))
            if (shi_service(self))
                now = shi_now_ns();
    }
    self->storm_ns = now;
    w = shi_load_relaxed(&self->slot->word);
    do {
        while (shi_word_work(w)) {
            shi_service(self);
            w = shi_load_relaxed(&self->slot->word);
        }
        if (!shi_word_online(w))
            break;
        /* ASKED anew: an NMI may have been what waited, and its handler has run since. */
        next = shi_word_with(w, SHI_RUNNING) & ~SHI_W_ASKED;
        if (shi_python_waits(self))
            next |= SHI_W_ASKED;
        /* Compare-and-swap: a push since the last look makes it fail. */
    } while (!shi_cas_full(&self->slot->word, &w, next));
    self->in_irq--;
    shi_chip_replayed(self);
    self->irqs_off = 0;
    self->ctx = ctx;
    self->counts = self->slot->counters[ctx];
    self->inline_python = inline_python;
    bool offline = shi_load_acquire(&self->slot->hotplug) == SHI_HP_OFFLINE;
    if ((shi_python_waits(self) || offline || shi_cancel_asked(self)) &&
        self->hooks.interrupt) {
        self->hooks.interrupt(self);
        shi_remind(self); /* it may have looked for the last time before a system call */
    }
}

void shi_irq_entry(struct shi_self *self)
{
    /* Acknowledge first, drain second: a push after this kicks again. */
    uint64_t w = shi_fetch_and_full(&self->slot->word, ~SHI_W_KICKED);
    SHI_STEP(self, ack);
    shi_fetch_add_relaxed(&self->slot->counters[SHI_CTX_NMI][SHI_C_kicks_received], 1);
    SHI_TRACE(self, irq_entry, self->id, 0, 0, 0);
    if (shi_masked(self)) {
        self->happened = 1;
        shi_chip_note_masked(self);
        return;
    }
    /* A late kick: polling or halted, the owner finds the work by that state's rules,
     * and nothing may be taken off the queue behind its back. */
    if (shi_word_state(w) == SHI_RUNNING)
        irq_work(self);
    else
        shi_count(self, SHI_C_kicks_empty);
    SHI_TRACE(self, irq_exit, self->id, 0, 0, 0);
}

void shi_leave_slow(struct shi_self *self)
{
    while (!shi_masked(self) && self->happened) {
        self->happened = 0;
        shi_signal_fence();
        irq_work(self);
    }
}

uint8_t shi_irq_save(struct shi_self *self)
{
    uint8_t flags = self->irqs_off;
    self->irqs_off = 1;
    shi_signal_fence();
    return flags;
}

void shi_irq_restore(struct shi_self *self, uint8_t flags)
{
    shi_signal_fence();
    self->irqs_off = flags;
    shi_signal_fence();
    shi_leave_slow(self);
}
