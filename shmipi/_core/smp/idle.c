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
#include "smp/idle.h"
#include "smp/lend.h"

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

static bool poll(struct shi_self *self)
{
    return poll_for(self, NULL, NULL, UINT64_MAX);
}

/* Sleep on the doorbell until rung.  0, or -EINTR. */
static int halt(struct shi_self *self)
{
    struct shi_slot *slot = self->slot;
    bool by_signal = shi_doorbell_of(self->m)->by_signal;
    uint64_t w = shi_load_relaxed(&slot->word), next;
    int err = 0;
    if (by_signal)
        shi_kick_block(self, true);
    SHI_STEP(self, halt);
    do {
        if (shi_word_work(w) || shi_resched_due(self, w) || !shi_word_online(w))
            return 0;
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
        err = shi_doorbell_wait(self, (uint32_t)(w & SHI_W_LOW), -1);
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
    struct shi_slot *slot = self->slot;
    for (;;) {
        if (has_work(self)) {
            self->in_core++;
            shi_service(self);
            self->in_core--;
            if (self->happened)
                shi_leave_slow(self);
        }
        if (shi_python_waits(self))
            return SHI_IDLE_PYTHON;
        if (stopping(self))
            return SHI_IDLE_STOP;
        if (shi_load_acquire(&slot->hotplug) != SHI_HP_ONLINE)
            return SHI_IDLE_OFFLINE;
        if (self->tasks.head)
            return SHI_IDLE_TASK;
        say_quiet(self);
        if (poll(self))
            continue;
        if (shi_python_waits(self) || stopping(self) ||
            shi_load_relaxed(&slot->hotplug) != SHI_HP_ONLINE)
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
        int err = halt(self);
        adapt(self, shi_now_ns() - start);
        if (err == -EINTR)
            return SHI_IDLE_SIGNAL;
    }
}

int shi_idle_in_task(struct shi_self *self, shi_ready *ready, const void *arg,
                     uint64_t until_ns)
{
    struct shi_slot *slot = self->slot;
    uint64_t start = shi_now_ns(), end = until_ns ? until_ns : UINT64_MAX;
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
