/* SPDX-License-Identifier: MIT */
#include "base/sys.h"

#include <errno.h>
#include <pthread.h>
#include <signal.h>
#include <string.h>

#include "base/clock.h"
#include "base/rules.h"
#include "base/step.h"
#include "base/trace.h"
#include "irq/chip.h"
#include "irq/doorbell.h"
#include "irq/nmi.h"
#include "irq/remind.h"
#include "irq/ring.h"
#include "irq/signal.h"
#include "smp/entry.h"
#include "smp/softirq.h"

/* A kick so soon after the last one is part of a storm: stay and poll a little, as a
 * network driver does (NAPI), because the next one costs its sender 10 us. */
#define STORM_NS 50000u
#define STORM_POLL_NS 2000u

bool shi_service_once(struct shi_self *self)
{
    /* Acquire pairs with the push: but what is acted upon comes from the RMW. */
    uint64_t w = shi_load_acquire(&self->slot->word);
    if (w & SHI_W_PENDING) {
        shi_chip_handle(self);
    } else if (shi_word_head(w)) {
        self->m->drain(self);
    } else if (shi_resched_due(self, w)) {
        SHI_TRACE(self, resched_idle, self->id, 0, 0, 0);
        shi_fetch_and_full(&self->slot->word, ~(SHI_W_NEED_RESCHED | SHI_W_LAZY));
    } else if (self->tick_now) {
        self->tick_now = 0;
        shi_count(self, SHI_C_irq_timer);
        self->m->timers->run(self);
    } else {
        return false;
    }
    self->served++;
    return true;
}

bool shi_service(struct shi_self *self)
{
    bool did = false;
    while (shi_service_once(self))
        did = true;
    return did;
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
        next = shi_word_with(w, SHI_RUNNING) & ~(SHI_W_KICKED | SHI_W_ASKED);
        if (shi_python_waits(self))
            next |= SHI_W_ASKED;
        if (shi_cas_full(&self->slot->word, &w, next))
            break;
    }
    /* Who set it while this CPU waited found it polling, and sent nothing. */
    if (__builtin_expect((next & (SHI_W_NEED_RESCHED | SHI_W_LAZY)) != 0, 0))
        self->m->resched(self);
    if (self->m->timers)
        self->m->timers->arm(self);
}

/* ---- softirqs -------------------------------------------------------------------- */

/* Where a rule is off: on top of another one, once. */
static bool may_nest(const struct shi_self *self)
{
    return shi_rule_off(self->m, SHI_RULE_softirq_nested) &&
           shi_load_relaxed(&self->softirqs) && self->softirq == SHI_SOFTIRQ_SERVING &&
           !self->in_irq && !self->in_nmi && !shi_masked(self);
}

/*
 * Interrupts are on while softirqs run: kicks come as signals, so the word says RUNNING, and
 * the signal is let in where this is its handler (once: a kick on top of a softirq finds
 * softirqs being served, and comes back here for nothing).
 */
void shi_do_softirq(struct shi_self *self, bool python)
{
    if ((!shi_softirqs_due(self) && !may_nest(self)) || self->left)
        return;
    enum shi_state before = shi_word_state(shi_load_relaxed(&self->slot->word));
    bool inlined = self->inline_python, task = self->in_task, kick = self->in_kick;
    if (before != SHI_RUNNING && before != SHI_POLLING)
        return;
    self->inline_python = false;
    if (before == SHI_POLLING)
        shi_set_running(self);
    if (kick || (!task && shi_doorbell_of(self->m)->by_signal)) {
        self->in_kick = false;
        shi_kick_block(self, false);
    }
    if (python)
        self->in_task = true; /* for the interpreter: handlers run between its bytecodes */
    shi_softirq_handle(self, python && self->hooks.softirq);
    self->in_task = task;
    if (kick) {
        shi_kick_block(self, true);
        self->in_kick = true;
    }
    if (self->left)
        return;
    if (before == SHI_POLLING)
        shi_set_polling(self);
    self->inline_python = inlined;
}

void shi_local_bh_enable(struct shi_self *self, bool python)
{
    shi_signal_fence();
    self->softirq -= SHI_SOFTIRQ_DISABLE;
    shi_signal_fence();
    if (!shi_rule_off(self->m, SHI_RULE_softirq_bh_enable))
        shi_do_softirq(self, python);
}

/* ---- taking a kick --------------------------------------------------------------- */

/* The interrupt is over but for its return: what it is on top of, `ctx`, as far as others are
 * concerned.  POLLING: what comes meanwhile is not signalled. */
static void leave_irq(struct shi_self *self, uint8_t ctx)
{
    self->ctx = ctx;
    self->counts = self->slot->counters[ctx];
    self->irqs_off = 0;
    self->in_irq--;
}

static void enter_irq(struct shi_self *self)
{
    self->ctx = SHI_CTX_IRQ;
    self->counts = self->slot->counters[SHI_CTX_IRQ];
    self->irqs_off = 1;
    self->in_irq++;
}

/* irq_exit(): before who is woken by a softirq is looked at. */
static void exit_softirqs(struct shi_self *self, uint8_t ctx)
{
    if (__builtin_expect(!shi_load_relaxed(&self->softirqs), 1))
        return;
    leave_irq(self, ctx);
    shi_do_softirq(self, false);
    enter_irq(self);
}

/* irqentry_exit_cond_resched(): the interrupt is over, and its task may be preempted.  Still
 * POLLING: what comes meanwhile is served between two steps. */
static enum shi_preempted preempt(struct shi_self *self)
{
    leave_irq(self, SHI_CTX_TASK);
    enum shi_preempted how = self->m->preempt(self);
    enter_irq(self);
    return how;
}

/* In hard-irq context: drain, with senders told to leave the kicking be.  `reminded`: nobody has
 * sent one, and what was left to ksoftirqd stays its own. */
static void take_interrupts(struct shi_self *self, bool reminded)
{
    uint8_t ctx = self->ctx;
    bool inline_python = self->inline_python;
    uint64_t w = shi_load_relaxed(&self->slot->word), next;
    if (shi_word_state(w) != SHI_RUNNING)
        return; /* a replay in another state: that state's owner looks */
    self->ctx = SHI_CTX_IRQ;
    self->counts = self->slot->counters[SHI_CTX_IRQ];
    self->irqs_off = 1;
    shi_store_relaxed(&self->slot->masked, 0);
    self->in_irq++;
    self->inline_python = false;
    shi_set_polling(self);
    shi_tick_look(self, shi_now_ns());
    if (!shi_service(self))
        shi_count(self, SHI_C_kicks_empty);
    uint64_t now = shi_now_ns();
    if (now - self->storm_ns < STORM_NS) {
        while (shi_now_ns() - now < STORM_POLL_NS && !shi_python_waits(self))
            if (shi_service(self))
                now = shi_now_ns();
    }
    self->storm_ns = now;
    if (!reminded || !self->softirqd)
        exit_softirqs(self, ctx);
    w = shi_load_relaxed(&self->slot->word);
    enum shi_preempted how = SHI_PREEMPT_RAN;
    do {
        next = 0;
        while (shi_word_work(w) ||
               (w & SHI_W_NEED_RESCHED && how == SHI_PREEMPT_RAN && !shi_preempt_off(self))) {
            if (shi_word_work(w))
                shi_service(self);
            else
                how = preempt(self);
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
    if (next & (SHI_W_NEED_RESCHED | SHI_W_LAZY))
        self->m->resched(self); /* its turn lasts, or this was set while it polled */
    if (self->m->timers)
        self->m->timers->arm(self);
    self->in_irq--;
    shi_chip_replayed(self);
    self->irqs_off = 0;
    shi_signal_fence();
    if (shi_stop_due(self)) { /* above what was interrupted, which can be preempted */
        shi_set_polling(self);
        self->m->stopper(self);
        shi_set_running(self);
    }
    self->ctx = ctx;
    self->counts = self->slot->counters[ctx];
    self->inline_python = inline_python;
    if (!self->softirqd)
        shi_do_softirq(self, false); /* of what came since they were looked at */
    bool offline = shi_hotplug_due(self);
    if ((shi_python_waits(self) || offline || how == SHI_PREEMPT_PYTHON ||
         shi_cancel_asked(self)) &&
        self->hooks.interrupt) {
        self->hooks.interrupt(self);
        shi_remind(self); /* it may have looked for the last time before a system call */
    }
}

/* The kernel's timer, which stands for the CPU's own. */
static void tick_expired(struct shi_self *self)
{
    self->tick_armed = 0;
    if (shi_masked(self))
        self->happened = 1;
    else if (shi_word_state(shi_load_relaxed(&self->slot->word)) == SHI_RUNNING)
        take_interrupts(self, false);
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
        shi_store_relaxed(&self->slot->masked, self->irqs_off);
        shi_chip_note_masked(self);
        return;
    }
    /* A late kick: polling or halted, the owner finds the work by that state's rules,
     * and nothing may be taken off the queue behind its back. */
    if (shi_word_state(w) == SHI_RUNNING)
        take_interrupts(self, false);
    else
        shi_count(self, SHI_C_kicks_empty);
    SHI_TRACE(self, irq_exit, self->id, 0, 0, 0);
}

/* ---- and what was put off --------------------------------------------------------- */

void shi_leave_slow(struct shi_self *self)
{
    while (!shi_masked(self) && self->happened) {
        self->happened = 0;
        shi_signal_fence();
        take_interrupts(self, false);
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

/* ---- the signals' handler --------------------------------------------------------- */

/* One CPU a process: read by the handler. */
static struct shi_self *volatile kick_self;

/* What it interrupts may be in the middle of counting. */
static void nmi(struct shi_self *self)
{
    shi_a64 *counts = self->counts;
    uint8_t ctx = self->ctx;
    self->counts = self->slot->counters[SHI_CTX_NMI];
    self->ctx = SHI_CTX_NMI;
    shi_nmi_entry(self);
    self->ctx = ctx;
    self->counts = counts;
}

static void on_kick(int sig, siginfo_t *info, void *context)
{
    int saved = errno;
    struct shi_self *self = kick_self;
    if (!self)
        goto out; /* a child of a task is no CPU (forget, below) */
    if (shi_signal_timer(self, info)) {
        if ((uintptr_t)info->si_value.sival_ptr & SHI_TICK_SIGNAL) {
            tick_expired(self);
            goto out;
        }
        shi_remind_expired(self);
        bool work = shi_irq_work_waits(self);
        if (work)
            shi_irq_work_timer(self);
        if ((self->m->tick(self) || work) &&
            shi_word_state(shi_load_relaxed(&self->slot->word)) == SHI_RUNNING) {
            if (shi_masked(self)) {
                self->happened = 1;
            } else {
                bool outer = self->in_kick;
                self->in_kick = true;
                take_interrupts(self, !work);
                self->in_kick = outer;
            }
        }
        goto out;
    }
    if (info->si_code != SI_QUEUE || !shi_signal_ours(self, info)) {
        shi_fetch_add_relaxed(&self->slot->counters[SHI_CTX_NMI][SHI_C_kicks_spurious], 1);
        goto out;
    }
    if (!pthread_equal(pthread_self(), self->thread)) {
        /* A process-directed signal took another thread: pass it to the CPU's own. */
        shi_signal_queue(self, (uint32_t)sig, self->pid, self->tid,
                         (uint32_t)(uintptr_t)info->si_value.sival_ptr);
        goto out;
    }
    const void *interrupted = self->context;
    self->context = context;
    if ((uint32_t)sig == self->m->kick_signal) {
        bool outer = self->in_kick;
        self->in_kick = true;
        shi_irq_entry(self);
        self->in_kick = outer;
    } else {
        nmi(self);
    }
    self->context = interrupted;
out:
    errno = saved;
}

struct shi_self *shi_this_cpu(void)
{
    return kick_self;
}

static int install(const struct shi_machine *m)
{
    struct sigaction action;
    memset(&action, 0, sizeof action);
    action.sa_sigaction = on_kick;
    /* No SA_RESTART: a task blocked in a system call must come back to the interpreter
     * so that a Python handler runs; Python itself then resumes the call (PEP 475). */
    action.sa_flags = SA_SIGINFO | SA_ONSTACK;
    sigemptyset(&action.sa_mask);
    if (sigaction((int)m->kick_signal, &action, NULL))
        return -errno;
    /* An NMI comes through everything; nothing comes through an NMI. */
    sigaddset(&action.sa_mask, (int)m->kick_signal);
    return sigaction((int)m->nmi_signal, &action, NULL) ? -errno : 0;
}

static void forget(void)
{
    kick_self = NULL;
}

/* In a fork's child, which may return into a wait of its parent's. */
static void leave(void)
{
    if (kick_self)
        kick_self->left = 1;
    forget();
}

int shi_kick_install(struct shi_self *self)
{
    static bool hooked;
    if (!hooked && pthread_atfork(NULL, NULL, leave))
        return -ENOMEM;
    hooked = true;
    kick_self = self;
    return install(self->m);
}

void shi_kick_remove(void)
{
    forget();
}

int shi_kick_check(struct shi_self *self)
{
    const int signals[] = { (int)self->m->kick_signal, (int)self->m->nmi_signal };
    struct sigaction now;
    sigset_t mask, ours;
    size_t i;
    int found = 0;
    sigemptyset(&ours);
    for (i = 0; i < sizeof signals / sizeof *signals; i++) {
        sigaddset(&ours, signals[i]);
        if (sigaction(signals[i], NULL, &now) == 0 &&
            (!(now.sa_flags & SA_SIGINFO) || now.sa_sigaction != on_kick))
            found = -EEXIST;
    }
    if (found)
        install(self->m);
    if (pthread_sigmask(SIG_UNBLOCK, &ours, &mask) == 0 &&
        (sigismember(&mask, signals[0]) || sigismember(&mask, signals[1])))
        found = found ? found : -EPERM;
    return found;
}

/* ---- rings that may have been lost ------------------------------------------------ */

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
    if (!shi_word_work(w) && state != SHI_RUNG && !(w & SHI_W_KICKED) &&
        !shi_resched_unsent(self->m, dst, w))
        return nmi;
    int err = shi_irq_ring_again(self, dst, set);
    if (!err)
        shi_count(self, SHI_C_rekicked);
    return err ? err : 1;
}
