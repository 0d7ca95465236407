/* SPDX-License-Identifier: MIT */
#include "base/sys.h"

#include <errno.h>
#include <sched.h>

#include "base/clock.h"
#include "base/step.h"
#include "base/trace.h"
#include "irq/doorbell.h"
#include "irq/signal.h"
#include "smp/entry.h"
#include "smp/flag_ipi.h"
#include "smp/idle.h"
#include "smp/irq_work.h"
#include "smp/lend.h"
#include "smp/sched.h"

/* haltpoll's numbers (drivers/cpuidle/governors/haltpoll.c): the window doubles when a
 * halt was short enough to have been worth polling for, and shrinks when it was not. */
#define POLL_MAX_NS 200000u
#define POLL_GROW_START_NS 50000u
#define POLL_SHARED_MAX_NS 5000u /* others want this core */
#define RELEASE_NS 20000u        /* the interpreter is not held for longer while spinning */
#define YIELD_NS 50000u
#define SPIN_ROUND 64
#define HALT_LOOKS 16u /* at results lent, before each halt */

#define SIGNALS_NS 1000000u /* a task that polls: look for signals of its own so often */

static bool stopping(const struct shi_self *self)
{
    return shi_load_relaxed(&self->m->header->machine_state) >= SHI_M_STOPPING;
}

static bool has_work(const struct shi_self *self)
{
    uint64_t w = shi_load_acquire(&self->slot->word);
    return shi_word_work(w) || shi_resched_due(self, w);
}

static uint64_t window(struct shi_self *self, enum shi_idle idle)
{
    bool shared = self->m->oversubscribed;
    switch (idle) {
    case SHI_IDLE_POLL:
        return UINT64_MAX;
    case SHI_IDLE_HALTPOLL:
        if (shared && self->poll_ns > POLL_SHARED_MAX_NS)
            return POLL_SHARED_MAX_NS;
        return self->poll_ns;
    default:
        return 0;
    }
}

static void adapt(struct shi_self *self, uint64_t halted_ns)
{
    if (halted_ns > self->poll_ns && halted_ns <= POLL_MAX_NS) {
        self->poll_ns = self->poll_ns ? self->poll_ns * 2 : POLL_GROW_START_NS;
        if (self->poll_ns > POLL_MAX_NS)
            self->poll_ns = POLL_MAX_NS;
    } else if (halted_ns > POLL_MAX_NS) {
        self->poll_ns /= 2;
    }
}

/* Spin for the idle policy's window, until `end` at most.  True: there is work. */
static inline bool poll_for(struct shi_self *self, shi_ready *ready, const void *arg,
                            uint64_t end)
{
    struct shi_slot *slot = self->slot;
    uint64_t start = 0, now, released = 0, limit;
    uint32_t i;
    for (;;) {
        for (i = 0; i < SPIN_ROUND; i++)
            if (has_work(self) || (ready && ready(arg)))
                return true;
        self->flood = 0;
        now = shi_now_ns();
        if (!start)
            start = now;
        if (shi_tick_look(self, now))
            return true;
        limit = window(self, (enum shi_idle)shi_load_relaxed(&slot->idle));
        if (now - start >= limit || now >= end || stopping(self) || shi_python_waits(self) ||
            shi_hotplug_due(self))
            return has_work(self);
        if (!released && now - start >= RELEASE_NS) {
            if (self->hooks.release)
                self->hooks.release(self);
            released = now;
        }
        if (self->m->oversubscribed && now - start >= YIELD_NS)
            sched_yield(); /* somebody else's core as well */
    }
}

static bool poll(struct shi_self *self, uint64_t timer)
{
    return poll_for(self, NULL, NULL, timer ? timer : UINT64_MAX);
}

/* Sleep on the doorbell until rung, or `timer` (0: never).  0, or -EINTR. */
static int halt(struct shi_self *self, uint64_t timer)
{
    struct shi_slot *slot = self->slot;
    bool by_signal = shi_doorbell_of(self->m)->by_signal;
    uint64_t w = shi_load_relaxed(&slot->word), next;
    const struct shi_timers *timers = self->m->timers;
    int64_t ns = timers ? timers->enter(self) : -1;
    uint64_t until = ns < 0 ? 0 : shi_now_ns() + (uint64_t)ns;
    if (!until || (timer && timer < until))
        until = timer;
    int err = 0;
    if (by_signal)
        shi_kick_block(self, true);
    SHI_STEP(self, halt);
    do {
        if (shi_word_work(w) || shi_resched_due(self, w) || !shi_word_online(w))
            goto out;
        next = shi_word_with(w, SHI_HALTED);
        /* Compare-and-swap: work queued since the look makes it fail, and who queues
         * after it sees HALTED. */
    } while (!shi_cas_full(&slot->word, &w, next));
    SHI_STEP(self, halted);
    SHI_TRACE(self, cpu_halt, self->id, 0, 0, 0);
    shi_count(self, SHI_C_halts);
    /* The low half anew each time: a late kick clears KICKED in it without ringing. */
    while (shi_word_state(w = shi_load_full(&slot->word)) == SHI_HALTED) {
        if (stopping(self))
            break;
        int64_t left = until ? (int64_t)(until - shi_now_ns()) : -1;
        if (until && left <= 0)
            break;
        err = shi_doorbell_wait(self, (uint32_t)(w & SHI_W_LOW), left);
        if (err)
            break;
        if (shi_word_state(shi_load_full(&slot->word)) == SHI_HALTED)
            shi_count(self, SHI_C_doorbells_spurious); /* a token left from before */
    }
    SHI_STEP(self, wake);
    w = shi_load_relaxed(&slot->word);
    do {
        next = shi_word_with(w, SHI_POLLING);
    } while (!shi_cas_full(&slot->word, &w, next));
    SHI_TRACE(self, cpu_wake, self->id, 0, 0, 0);
    if (shi_word_state(w) == SHI_RUNG) {
        shi_count(self, SHI_C_doorbells_received);
        if (!shi_word_work(w))
            shi_count(self, SHI_C_doorbells_spurious);
    }
out:
    if (timers) {
        shi_tick_look(self, shi_now_ns());
        timers->exit(self);
    }
    return err;
}

/*
 * Idle, this CPU has no csd in hand but what is on its queue.  Who ended before this looks
 * at the queue has pushed what it ever will: a csd of his that is locked still, and not on
 * the queue here, is nobody's (shi_reap_orphans).
 */
static void say_quiet(struct shi_self *self)
{
    struct shi_slot *slot = self->slot;
    /* Acquire: before the look at the queue; the pushes of the dead stand before it. */
    uint32_t departed = shi_load_acquire(&self->m->header->departed);
    if (__builtin_expect(departed == shi_load_relaxed(&slot->quiet), 1))
        return;
    if (!self->unsent && !shi_word_head(shi_load_full(&slot->word)))
        shi_store_release(&slot->quiet, departed);
}

enum shi_idle_why shi_idle(struct shi_self *self)
{
    if (self->has_mm)
        self->m->mm_idle(self, SHI_MM_EXIT);
    for (;;) {
        if (has_work(self) || self->tick_now) {
            self->in_core++;
            shi_service(self);
            self->in_core--;
            if (self->happened)
                shi_leave_slow(self);
        }
        if (shi_stop_due(self))
            self->m->stopper(self);
        if (shi_python_waits(self))
            return SHI_IDLE_PYTHON;
        /* do_softirq_post_smp_call_flush(); not what ksoftirqd has been woken for, in its turn
         * among others. */
        if (!self->softirqd || !shi_sched_work(self))
            shi_do_softirq(self, self->inline_python);
        if (stopping(self))
            return SHI_IDLE_STOP;
        if (self->down)
            return SHI_IDLE_OFFLINE;
        uint64_t timer = shi_sched_timers(self, 0);
        if (timer)
            timer = shi_sched_timers(self, shi_now_ns());
        if (shi_sched_work(self)) {
            if (shi_sched_next(self) == SHI_NEXT_PYTHON)
                return SHI_IDLE_SCHED;
            /* In turn with Cluster tasks. */
            if (shi_schedule_one(self, true) && !self->tasks.head)
                continue;
        }
        if (self->tasks.head)
            return SHI_IDLE_TASK;
        if (shi_sched_newidle(self))
            continue;
        if (__builtin_expect(shi_irq_work_waits(self), 0)) {
            shi_irq_work_timer(self); /* tick_nohz_tick_stopped() */
            continue;
        }
        if (shi_softirqs_due(self) || shi_python_waits(self))
            continue; /* more than its budget: again, as ksoftirqd */
        say_quiet(self);
        shi_ipi_point(self);
        if (poll(self, timer))
            continue;
        if (timer && shi_now_ns() >= timer)
            continue;
        if (shi_python_waits(self) || stopping(self) || self->down)
            continue;
        if (self->sender.nloans) {
            self->in_core++;
            shi_lend_sweep(self, HALT_LOOKS);
            self->in_core--;
            if (self->happened)
                shi_leave_slow(self);
        }
        if (self->hooks.release)
            self->hooks.release(self);
        uint64_t start = shi_now_ns();
        int err = halt(self, timer);
        adapt(self, shi_now_ns() - start);
        if (err == -EINTR)
            return SHI_IDLE_SIGNAL;
    }
}

/* A task that waits lets others run: native steps here.  True: it is to look again. */
static bool let_run(struct shi_self *self)
{
    if (!shi_sched_work(self) || shi_preempt_off(self) || self->irqs_off)
        return false;
    return shi_sched_next(self) == SHI_NEXT_PYTHON || shi_schedule_one(self, true);
}

int shi_idle_in_task(struct shi_self *self, shi_ready *ready, const void *arg,
                     uint64_t until_ns)
{
    struct shi_slot *slot = self->slot;
    uint64_t start = shi_now_ns(), end = until_ns ? until_ns : UINT64_MAX;
    if (let_run(self))
        return 0;
    uint64_t look = start + SIGNALS_NS;
    if (poll_for(self, ready, arg, look < end ? look : end) || shi_python_waits(self) ||
        stopping(self) || shi_hotplug_due(self) ||
        shi_load_relaxed(&slot->idle) == SHI_IDLE_POLL)
        return 0;
    start = shi_now_ns();
    if (start >= end)
        return -ETIMEDOUT;
    if (self->hooks.release)
        self->hooks.release(self);
    shi_count(self, SHI_C_halts);
    SHI_TRACE(self, cpu_halt, self->id, 0, 0, 0);
    SHI_STEP(self, halt);
    int err = shi_halt_until(self, ready, arg, until_ns ? (int64_t)(end - start) : -1);
    SHI_TRACE(self, cpu_wake, self->id, 0, 0, 0);
    adapt(self, shi_now_ns() - start);
    return err;
}

/* ---- timed idle ------------------------------------------------------------------ */

/* Does anything want the task that is more than an interrupt's handler? */
static bool wanted(const struct shi_self *self)
{
    return stopping(self) || shi_cancel_asked(self) || shi_python_waits(self) ||
           shi_hotplug_due(self) || self->left;
}

static void serve(struct shi_self *self)
{
    self->in_core++;
    shi_service(self);
    self->in_core--;
    if (self->happened)
        shi_leave_slow(self);
    shi_do_softirq(self, self->inline_python);
}

int shi_run_until(struct shi_self *self, uint64_t until_ns, uint64_t *lost_ns)
{
    uint32_t served = self->served;
    uint64_t last = shi_now_ns();
    if (lost_ns)
        *lost_ns = 0;
    for (;;) {
        shi_signal_fence(); /* the kick's handler writes `served` */
        uint64_t now = shi_now_ns();
        if (self->served != served) {
            if (lost_ns)
                *lost_ns = now - last;
            return 1;
        }
        if (now >= until_ns || wanted(self))
            return 0;
        last = now;
        if (self->m->oversubscribed)
            sched_yield();
    }
}

static int poll_until(struct shi_self *self, uint64_t until_ns)
{
    uint32_t i;
    for (;;) {
        for (i = 0; i < SPIN_ROUND; i++)
            if (has_work(self))
                return 0;
        uint64_t now = shi_now_ns();
        if (now >= until_ns || wanted(self) || shi_tick_look(self, now))
            return 0;
        if (self->m->oversubscribed)
            sched_yield();
    }
}

/* Polling until `poll_ns`, then halted.  Returns how long the last halt was, or 0, too. */
static int idle_until(struct shi_self *self, uint64_t poll_ns, uint64_t until_ns,
                      uint64_t *halted_ns)
{
    uint32_t served = self->served;
    int err = 0;
    *halted_ns = 0;
    shi_set_polling(self);
    for (;;) {
        serve(self);
        uint64_t now = shi_now_ns();
        if (self->served != served || err == -EINTR || now >= until_ns || wanted(self))
            break;
        if (now < poll_ns) {
            err = poll_until(self, poll_ns < until_ns ? poll_ns : until_ns);
            continue;
        }
        if (self->hooks.release)
            self->hooks.release(self);
        shi_count(self, SHI_C_halts);
        SHI_TRACE(self, cpu_halt, self->id, 0, 0, 0);
        err = shi_halt_until(self, NULL, NULL, (int64_t)(until_ns - now));
        SHI_TRACE(self, cpu_wake, self->id, 0, 0, 0);
        *halted_ns = shi_now_ns() - now;
    }
    shi_set_running(self); /* serves what came since the last look */
    if (self->served != served)
        return 1;
    return err == -EINTR ? err : 0;
}

int shi_idle_until(struct shi_self *self, enum shi_state state, uint64_t until_ns)
{
    uint64_t halted;
    if (state == SHI_RUNNING)
        return shi_run_until(self, until_ns, NULL);
    return idle_until(self, state == SHI_POLLING ? UINT64_MAX : 0, until_ns, &halted);
}

int shi_haltpoll_until(struct shi_self *self, uint64_t until_ns)
{
    uint64_t halted, poll_ns = self->poll_ns;
    /* Not the shorter window of a machine that shares cores with its host: that sleeps. */
    int rc = idle_until(self, shi_now_ns() + poll_ns, until_ns, &halted);
    if (halted)
        adapt(self, halted);
    return rc;
}
