/* SPDX-License-Identifier: MIT */
#include "base/sys.h"

#include <errno.h>
#include <sched.h>
#include <stdio.h>
#include <string.h>

#include "base/clock.h"
#include "base/native.h"
#include "base/rules.h"
#include "base/step.h"
#include "base/trace.h"
#include "irq/chip.h"
#include "irq/remind.h"
#include "irq/ring.h"
#include "smp/csd.h"
#include "smp/entry.h"
#include "smp/flag_ipi.h"
#include "smp/queue.h"
#include "smp/sched.h"
#include "smp/smp.h"

#define SPINS 256u
#define REMOTE_NS 200000u /* so long for another's run queue, then by its wake list */
#define SLICE_NS 3000000u /* sysctl_sched_base_slice */
#define OWED_NS (2 * SLICE_NS)
#define BALANCE_NS 1000000u
#define STEP_NS 200000000u   /* so long for a step to end where a CPU is to go offline */
#define STAYS_NS 2000000000u /* and for its next try */
#define SCAN_CPUS 64u        /* looked at for one that is idle */

/* ---- functions of steps ----------------------------------------------------------- */

static struct {
    shi_task_step *step;
    bool (*python)(const struct shi_self *); /* NULL: never */
    char name[SHI_COMM];
} steppers[SHI_STEPPERS];
static uint32_t nsteppers;
static int ttwu_func = -1;

static void ttwu_unlocked(void *info)
{
    (void)info; /* a name in traces: what is done is flush_queue's third pass */
}

void shi_sched_init(void)
{
    if (ttwu_func < 0)
        ttwu_func = shi_native_register("sched_ttwu_pending", ttwu_unlocked);
}

int shi_stepper_register_mixed(const char *name, shi_task_step *step,
                               bool (*python)(const struct shi_self *))
{
    uint32_t i;
    for (i = 0; i < nsteppers; i++)
        if (strcmp(steppers[i].name, name) == 0)
            return (int)i;
    if (nsteppers == SHI_STEPPERS)
        return -ENOSPC;
    strncpy(steppers[nsteppers].name, name, SHI_COMM - 1);
    steppers[nsteppers].step = step;
    steppers[nsteppers].python = python;
    return (int)nsteppers++;
}

int shi_stepper_register(const char *name, shi_task_step *step)
{
    return shi_stepper_register_mixed(name, step, NULL);
}

/*
 * ---- words ------------------------------------------------------------------------
 *
 * In this file an acquire load of a task's word pairs with the swap that has written it, which
 * is full, by whoever had the task: what he has stored in it is seen.  One of shi_sched.top pairs
 * with the swap in shi_kthread_create: entries below it are there.
 */

static inline uint64_t with_state(uint64_t w, enum shi_task_state state)
{
    return (w & ~SHI_TW_STATE) | (uint64_t)state;
}

static inline uint64_t with_cpu(uint64_t w, uint32_t cpu)
{
    return (w & ~(SHI_TW_SLOT << SHI_TW_CPU_SHIFT)) | (uint64_t)cpu << SHI_TW_CPU_SHIFT;
}

/* 0: nobody's turn. */
static inline uint64_t with_waker(uint64_t w, uint32_t slot)
{
    return (w & ~(SHI_TW_SLOT << SHI_TW_WAKER_SHIFT)) | (uint64_t)slot << SHI_TW_WAKER_SHIFT;
}

static inline uint32_t waker_of(uint64_t w)
{
    return (uint32_t)(w >> SHI_TW_WAKER_SHIFT & SHI_TW_SLOT);
}

static inline uint32_t index_of(const struct shi_machine *m, const struct shi_task *task)
{
    return (uint32_t)((uint64_t)((const uint8_t *)task - (const uint8_t *)shi_task(m, 0)) /
                      m->task_bytes);
}

struct shi_task *shi_task_find(const struct shi_machine *m, uint64_t id, uint64_t *word)
{
    uint32_t index = (uint32_t)id - 1;
    if (!(uint32_t)id || index >= m->ntasks)
        return NULL;
    struct shi_task *task = shi_task(m, index);
    *word = shi_load_acquire(&task->word);
    if (shi_task_id(index, *word) != id || shi_tw_state(*word) <= SHI_TASK_CLAIMED)
        return NULL;
    return task;
}

int shi_task_state(const struct shi_machine *m, uint64_t id)
{
    uint64_t w;
    return shi_task_find(m, id, &w) ? (int)shi_tw_state(w) : -ESRCH;
}

static bool allowed(const struct shi_task *task, uint32_t cpu)
{
    return shi_load_relaxed(&task->allowed[cpu / 64]) >> (cpu % 64) & 1;
}

bool shi_cpu_active(const struct shi_machine *m, uint32_t cpu)
{
    const struct shi_slot *slot = shi_slot(m, cpu);
    return shi_word_online(shi_load_relaxed(&slot->word)) &&
           shi_load_relaxed(&slot->hotplug) == SHI_HP_ONLINE &&
           shi_load_relaxed(&shi_rq(m, cpu)->active);
}

/* cpus_share_cache(). */
bool shi_cpus_share_cache(const struct shi_machine *m, uint32_t a, uint32_t b)
{
    return shi_load_relaxed(&shi_rq(m, a)->llc) == shi_load_relaxed(&shi_rq(m, b)->llc);
}

/* rq->nr_running: what is queued, and what runs. */
static uint32_t nr_running(const struct shi_machine *m, uint32_t cpu)
{
    const struct shi_rq *rq = shi_rq(m, cpu);
    return shi_load_relaxed(&rq->queued) + (shi_load_relaxed(&rq->curr) != 0) +
           (shi_load_relaxed(&shi_slot(m, cpu)->task) != 0);
}

bool shi_idle_cpu(const struct shi_machine *m, uint32_t cpu)
{
    return !nr_running(m, cpu) && !shi_load_relaxed(&shi_rq(m, cpu)->ttwu_pending);
}

/* ---- run queues ------------------------------------------------------------------- */

static void append(const struct shi_machine *m, struct shi_rq *rq, uint32_t index)
{
    struct shi_task *task = shi_task(m, index);
    uint32_t class = task->flags & SHI_PF_RT ? 0 : 1, tail = shi_load_relaxed(&rq->tail[class]);
    shi_store_relaxed(&task->next, 0);
    if (tail && tail <= m->ntasks)
        shi_store_relaxed(&shi_task(m, tail - 1)->next, index + 1);
    else
        shi_store_relaxed(&rq->head[class], index + 1);
    shi_store_relaxed(&rq->tail[class], index + 1);
    shi_store_relaxed(&rq->queued, shi_load_relaxed(&rq->queued) + 1);
}

static bool is_queued(uint64_t w, uint32_t cpu)
{
    return shi_tw_state(w) == SHI_TASK_RUNNING && w & SHI_TW_ON_RQ && !(w & SHI_TW_ON_CPU) &&
           shi_tw_cpu(w) == cpu;
}

/* Its holder died in the middle of a change, or its links are damaged. */
static void rebuild(const struct shi_machine *m, uint32_t cpu)
{
    struct shi_rq *rq = shi_rq(m, cpu);
    uint32_t i, top = shi_load_acquire(&shi_sched(m)->top);
    for (i = 0; i < 2; i++) {
        shi_store_relaxed(&rq->head[i], 0);
        shi_store_relaxed(&rq->tail[i], 0);
    }
    shi_store_relaxed(&rq->queued, 0);
    for (i = 0; i < top && i < m->ntasks; i++)
        if (is_queued(shi_load_acquire(&shi_task(m, i)->word), cpu))
            append(m, rq, i);
}

/* `ns`: how long at most, 0: until it is had.  Between shi_enter and shi_leave, or in a
 * handler: nothing here interrupts who has it.  0 or -EAGAIN. */
static int rq_lock(struct shi_self *self, uint32_t cpu, uint64_t ns)
{
    struct shi_rq *rq = shi_rq(self->m, cpu);
    uint64_t end = 0;
    uint32_t spins = 0;
    for (;;) {
        int rc = shi_lock_take(self, &rq->lock);
        if (__builtin_expect(rc > 0, 0))
            rebuild(self->m, cpu);
        if (rc >= 0)
            return 0;
        shi_cpu_relax();
        if (++spins % SPINS)
            continue;
        if (shi_ended(self))
            return -EAGAIN;
        if (ns) {
            uint64_t now = shi_now_ns();
            if (!end)
                end = now + ns;
            if (now >= end)
                return -EAGAIN;
        }
        sched_yield(); /* its holder may want this core */
    }
}

static void rq_unlock(struct shi_self *self, uint32_t cpu)
{
    /* Releases the list, and the words of its tasks. */
    shi_store_release(&shi_rq(self->m, cpu)->lock, 0);
}

/*
 * Is it this one that activates task `id`?  Of all who find it WAKING one does, whose swap sets
 * TURN: a waker goes on to another CPU when its target dies between aim and push, and the reaper,
 * who finds the csd aimed, goes on in its place; a target that has the csd of a waker who dies
 * has it while the reaper gives the task to another.
 */
static bool take_turn(struct shi_self *self, struct shi_task *task, uint64_t id, uint32_t waker)
{
    /* Acquire pairs with the swap to WAKING: what its waker has stored in it. */
    uint64_t w = shi_load_acquire(&task->word);
    do {
        if (w >> SHI_TW_SERIAL_SHIFT != id >> 32 || shi_tw_state(w) != SHI_TASK_WAKING ||
            w & SHI_TW_TURN || waker_of(w) != waker + 1)
            return false;
        SHI_STEP(self, ttwu_look);
    } while (!shi_cas_full(&task->word, &w, with_waker(w, self->id + 1) | SHI_TW_TURN));
    SHI_STEP(self, ttwu_turn);
    return true;
}

/* Any active CPU of the mask: `first`, or the first after it; -1: none. */
static int any_allowed(const struct shi_machine *m, const struct shi_task *task, uint32_t first,
                       bool idle)
{
    uint32_t i, cpu = first, n = idle && m->ncpus > SCAN_CPUS ? SCAN_CPUS : m->ncpus;
    for (i = 0; i < n; i++) {
        if (allowed(task, cpu) && shi_cpu_active(m, cpu) && (!idle || shi_idle_cpu(m, cpu)))
            return (int)cpu;
        if (++cpu == m->ncpus)
            cpu = 0;
    }
    return -1;
}

static bool stays(const struct shi_task *task, uint64_t w)
{
    return w & SHI_TW_PINNED || task->flags & SHI_PF_BOUND;
}

/* May it not run on `cpu`, and does it have another? */
static bool strays(const struct shi_machine *m, const struct shi_task *task, uint64_t w,
                   uint32_t cpu)
{
    return !allowed(task, cpu) && !stays(task, w) &&
           !shi_rule_off(m, SHI_RULE_sched_cpus_ptr) && any_allowed(m, task, cpu, false) >= 0;
}

/* Take it off the run queue again, under its lock: it is ours, to be queued elsewhere. */
static void deactivate(struct shi_self *self, struct shi_task *task, uint32_t cpu)
{
    uint64_t w = shi_load_relaxed(&task->word);
    while (
        !shi_cas_full(&task->word, &w,
                      with_waker(with_state(w, SHI_TASK_WAKING), self->id + 1) & ~SHI_TW_ON_RQ))
        ;
    rebuild(self->m, cpu);
}

/*
 * ttwu_do_activate, under the queue's lock, by who took the turn.  The list first: killed in
 * between, the word still says whose turn it is, and the list is made anew.  False: it may not
 * run there, since its CPU was chosen; it is WAKING again, by this one, and to be queued anew.
 */
static bool activate(struct shi_self *self, struct shi_task *task, uint32_t cpu)
{
    uint64_t w = shi_load_relaxed(&task->word), next;
    if (shi_tw_cpu(w) != cpu)
        shi_store_relaxed(&task->migrations, shi_load_relaxed(&task->migrations) + 1);
    append(self->m, shi_rq(self->m, cpu), index_of(self->m, task));
    SHI_STEP(self, ttwu_list);
    do {
        next = (with_waker(with_cpu(with_state(w, SHI_TASK_RUNNING), cpu), 0) | SHI_TW_ON_RQ) &
               ~SHI_TW_TURN;
    } while (!shi_cas_full(&task->word, &w, next));
    /* The word first, by that swap, the mask second; who sets the mask stores it first (full),
     * and looks at the word second: one of the two sees the other, and moves it.  Nobody has
     * taken it from here yet: that needs the lock. */
    if (__builtin_expect(strays(self->m, task, next, cpu), 0)) {
        deactivate(self, task, cpu);
        return false;
    }
    SHI_STEP(self, ttwu_queued);
    if (nr_running(self->m, cpu) > 1)
        shi_store_relaxed(&shi_sched(self->m)->overload, 1);
    return true;
}

/* Take the first off that may be taken; or, `puller` >= 0, the first that may run there. */
static struct shi_task *take_first(struct shi_self *self, uint32_t cpu, int puller)
{
    const struct shi_machine *m = self->m;
    struct shi_rq *rq = shi_rq(m, cpu);
    uint32_t class, steps;
    for (class = 0; class < 2; class++) {
        uint32_t before = 0, at = shi_load_relaxed(&rq->head[class]);
        for (steps = 0; at; steps++) {
            if (at > m->ntasks || steps > m->ntasks) {
                shi_count(self, SHI_C_corrupt);
                rebuild(m, cpu);
                return NULL; /* the next look finds it */
            }
            struct shi_task *task = shi_task(m, at - 1);
            uint32_t next = shi_load_relaxed(&task->next);
            uint64_t w = shi_load_acquire(&task->word), taken = 0;
            bool stale = false;
            do {
                stale = !is_queued(w, cpu);
                if (stale)
                    break;
                if (puller < 0)
                    taken = w | SHI_TW_ON_CPU;
                else if (task->flags & SHI_PF_BOUND || w & SHI_TW_PINNED ||
                         !allowed(task, (uint32_t)puller))
                    break;
                else
                    taken = with_waker(with_state(w, SHI_TASK_WAKING), self->id + 1) &
                            ~SHI_TW_ON_RQ;
            } while (!shi_cas_full(&task->word, &w, taken));
            if (!stale && !taken) {
                before = at;
                at = next;
                continue;
            }
            if (before)
                shi_store_relaxed(&shi_task(m, before - 1)->next, next);
            else
                shi_store_relaxed(&rq->head[class], next);
            if (!next)
                shi_store_relaxed(&rq->tail[class], before);
            shi_store_relaxed(&rq->queued, shi_load_relaxed(&rq->queued) - 1);
            if (!stale)
                return task;
            at = next;
        }
    }
    return NULL;
}

/* ---- resched ---------------------------------------------------------------------- */

int shi_resched_curr(struct shi_self *self, uint32_t cpu, bool lazy)
{
    struct shi_slot *slot = shi_slot(self->m, cpu);
    uint64_t w = shi_load_relaxed(&slot->word), bit;
    bool own = cpu == self->id && !self->host;
    /*
     * set_nr_and_not_polling(): the flag and the look at the state are one compare-and-swap.
     * An idle loop that this finds polling looks at the flag, and one that goes to sleep
     * fails to, because its word has changed.
     */
    do {
        if (!shi_word_online(w))
            return -ENXIO;
        /* Of the idle task nothing is put off. */
        bool idle = !shi_load_relaxed(&slot->task) &&
                    !shi_load_relaxed(&shi_rq(self->m, cpu)->curr);
        bit = lazy && !idle ? SHI_W_LAZY : SHI_W_NEED_RESCHED;
        if (w & (bit | SHI_W_NEED_RESCHED))
            return 0; /* who set it has told the CPU, or is about to */
    } while (!shi_cas_full(&slot->word, &w, w | bit));
    SHI_STEP(self, resched);
    if (own) { /* the flag alone: looked at when the interrupt returns, or soon */
        if (shi_load_relaxed(&slot->task) && shi_sched_work(self))
            shi_sched_tick(self);
        return 0;
    }
    if (shi_word_state(w) == SHI_POLLING) {
        shi_count(self, SHI_C_resched_elided);
        shi_count(self, SHI_C_elided);
        SHI_TRACE(self, wake_idle_without_ipi, cpu, 0, 0, 0);
    } else if (bit == SHI_W_NEED_RESCHED) {
        return shi_irq_send_reschedule(self, cpu);
    }
    return 0;
}

void shi_irq_resched_cpu(struct shi_self *self, uint32_t cpu)
{
    SHI_TRACE(self, call_entry, cpu, 0, 0, SHI_E_RESCHED_CPU);
    shi_resched_curr(self, cpu, false);
}

/* Does what runs there have its turn, and a tick that ends it?  Then who is woken waits. */
static bool has_turn(const struct shi_machine *m, uint32_t cpu)
{
    return shi_load_relaxed(&shi_slot(m, cpu)->tick) &&
           shi_now_ns() < shi_load_relaxed(&shi_rq(m, cpu)->turn);
}

/* wakeup_preempt: RT at once, and others unless what runs has had less than they. */
static void wakeup_preempt(struct shi_self *self, uint32_t cpu, const struct shi_task *task)
{
    if (!shi_rule_off(self->m, SHI_RULE_sched_resched))
        shi_resched_curr(self, cpu, !(task->flags & SHI_PF_RT) && has_turn(self->m, cpu));
}

/* ---- waking ----------------------------------------------------------------------- */

/* select_task_rq: where it was if that is idle, this CPU, an idle one, where it was; and by
 * select_fallback_rq one that it has not asked for, when none of its own is active. */
static uint32_t select_task_rq(struct shi_self *self, const struct shi_task *task, uint64_t w)
{
    const struct shi_machine *m = self->m;
    uint32_t prev = shi_tw_cpu(w) < m->ncpus ? shi_tw_cpu(w) : 0;
    int cpu;
    if (stays(task, w))
        return prev;
    if (shi_rule_off(m, SHI_RULE_sched_cpus_ptr)) {
        cpu = (int)(self->id < m->ncpus ? self->id : (prev + 1) % m->ncpus);
        return shi_cpu_active(m, (uint32_t)cpu) ? (uint32_t)cpu : prev;
    }
    if (allowed(task, prev) && shi_cpu_active(m, prev) && shi_idle_cpu(m, prev))
        return prev;
    cpu = any_allowed(m, task, prev, true);
    if (cpu < 0 && allowed(task, prev) && shi_cpu_active(m, prev))
        cpu = (int)prev;
    if (cpu < 0)
        cpu = any_allowed(m, task, prev, false);
    for (uint32_t i = 0; cpu < 0 && i < m->ncpus; i++)
        if (shi_cpu_active(m, i))
            cpu = (int)i;
    return cpu < 0 ? prev : (uint32_t)cpu;
}

/* ttwu_queue_cond: is it left to the target to put the task on its run queue? */
static bool queue_cond(const struct shi_self *self, const struct shi_task *task, uint32_t cpu)
{
    const struct shi_machine *m = self->m;
    if (!shi_cpu_active(m, cpu) || !allowed(task, cpu))
        return false;
    if (!self->host && !shi_cpus_share_cache(m, self->id, cpu))
        return true;
    if (!self->host && cpu == self->id)
        return false;
    return !nr_running(m, cpu);
}

/* __ttwu_queue_wakelist: 0, or -errno with nothing sent. */
static int queue_wakelist(struct shi_self *self, uint64_t id, uint32_t cpu)
{
    /* Before the push: who looks for an idle CPU meanwhile looks elsewhere. */
    shi_store_relaxed(&shi_rq(self->m, cpu)->ttwu_pending, 1);
    return shi_call_wake(self, SHI_FUNC_NATIVE | (uint32_t)ttwu_func, id, cpu);
}

/* Under its lock, by who wakes: 0, or -ENXIO: the CPU takes no tasks, -EXDEV: not this one, or
 * -EAGAIN. */
static int queue_direct(struct shi_self *self, struct shi_task *task, uint64_t id, uint32_t cpu,
                        bool bound, uint64_t ns)
{
    if (rq_lock(self, cpu, ns))
        return -EAGAIN;
    bool active = shi_load_relaxed(&shi_rq(self->m, cpu)->active);
    bool turn = (active || bound) && take_turn(self, task, id, self->id);
    bool strayed = turn && !activate(self, task, cpu);
    rq_unlock(self, cpu);
    if (!active && !bound)
        return -ENXIO;
    if (strayed)
        return -EXDEV;
    if (turn) /* else another has done it in our place */
        wakeup_preempt(self, cpu, task);
    return 0;
}

/* ttwu_queue: a task that is ours (WAKING) goes to a run queue, whatever happens. */
static void queue_task(struct shi_self *self, struct shi_task *task, uint64_t w)
{
    uint64_t id = shi_task_id(index_of(self->m, task), w);
    bool bound = stays(task, w);
    for (;;) {
        uint32_t cpu = select_task_rq(self, task, w);
        if (queue_cond(self, task, cpu) && !queue_wakelist(self, id, cpu))
            return;
        int err = queue_direct(self, task, id, cpu, bound,
                               !self->host && cpu == self->id ? 0 : REMOTE_NS);
        if (!err)
            return;
        /* The holder of its lock is stopped, or has no core: without it. */
        if (err == -EAGAIN && shi_cpu_active(self->m, cpu) && cpu != self->id &&
            !queue_wakelist(self, id, cpu))
            return;
        if (shi_ended(self) || self->left)
            return;
        if (err == -ENXIO && any_allowed(self->m, task, 0, false) < 0 &&
            !shi_cpu_active(self->m, select_task_rq(self, task, w)))
            bound = true; /* no CPU at all is up: it waits where it was */
    }
}

/* Between shi_enter and shi_leave. */
static int wake(struct shi_self *self, uint64_t id, uint32_t states)
{
    uint64_t w, next;
    struct shi_task *task = shi_task_find(self->m, id, &w);
    if (!task || shi_tw_state(w) == SHI_TASK_DEAD)
        return -ESRCH;
    if (!(w & SHI_TW_ON_CPU) && shi_tw_cpu(w) < self->m->ncpus) /* looked at, then marked */
        shi_prefetch_write(shi_rq(self->m, shi_tw_cpu(w)));
    /* A read-modify-write, and not a load: whatever the caller has stored before is seen by
     * a task that sets its state after this, and looks.  The swap below is one, too. */
    if (!(states >> shi_tw_state(w) & 1))
        w = shi_fetch_or_full(&task->word, 0);
    for (;;) {
        enum shi_task_state state = shi_tw_state(w);
        if (w >> SHI_TW_SERIAL_SHIFT != id >> 32 || state <= SHI_TASK_CLAIMED ||
            state == SHI_TASK_DEAD)
            return -ESRCH;
        if (!(states >> state & 1))
            return 0;
        bool runs = w & SHI_TW_ON_CPU && !shi_rule_off(self->m, SHI_RULE_sched_on_cpu);
        /* ttwu_runnable: its step has not ended.  Who ends it finds the new state. */
        next = runs ? with_state(w, SHI_TASK_RUNNING)
                    : with_waker(with_state(w, SHI_TASK_WAKING), self->id + 1) &
                          ~(SHI_TW_ON_RQ | SHI_TW_ON_CPU);
        if (!shi_cas_full(&task->word, &w, next))
            continue;
        if (runs) {
            shi_fetch_add_relaxed(&task->wakeups, 1);
        } else { /* nobody else wakes it meanwhile */
            shi_store_relaxed(&task->wakeups, shi_load_relaxed(&task->wakeups) + 1);
            SHI_STEP(self, ttwu);
            shi_store_relaxed(&task->timer, 0);
            queue_task(self, task, next);
        }
        return 1;
    }
}

int shi_try_to_wake_up(struct shi_self *self, uint64_t id, uint32_t states)
{
    shi_enter(self);
    int rc = wake(self, id, states);
    shi_leave(self);
    return rc;
}

#define ASLEEP                                                                                 \
    (1u << SHI_TASK_NEW | 1u << SHI_TASK_INTERRUPTIBLE | 1u << SHI_TASK_UNINTERRUPTIBLE)

int shi_wake_up_process(struct shi_self *self, uint64_t id)
{
    return shi_try_to_wake_up(self, id, ASLEEP);
}

/* Is a task that was sent here to go on to another CPU?  This one is on its way offline, or may
 * not run it any more. */
static bool sent_on(const struct shi_self *self, const struct shi_task *task, uint64_t w)
{
    const struct shi_machine *m = self->m;
    return (!stays(task, w) && !shi_load_relaxed(&shi_rq(m, self->id)->active)) ||
           strays(m, task, w, self->id);
}

/* One of the wake list, under the own queue's lock, which is let go meanwhile where the task is
 * another CPU's.  The task, if it is on this queue now. */
static struct shi_task *wake_listed(struct shi_self *self, uint64_t id, uint32_t waker)
{
    uint64_t w, next;
    struct shi_task *task = shi_task_find(self->m, id, &w);
    if (!task)
        return NULL;
    if (__builtin_expect(!sent_on(self, task, w), 1)) {
        /* Not that of a waker who died since: then the task was queued in its place. */
        if (!take_turn(self, task, id, waker))
            return NULL;
        if (__builtin_expect(activate(self, task, self->id), 1))
            return task;
        rq_unlock(self, self->id);
        queue_task(self, task, w);
        rq_lock(self, self->id, 0);
        return NULL;
    }
    if (shi_tw_state(w) != SHI_TASK_WAKING || w & SHI_TW_TURN || waker_of(w) != waker + 1)
        return NULL;
    next = with_waker(w, self->id + 1);
    if (shi_cas_full(&task->word, &w, next)) {
        rq_unlock(self, self->id);
        queue_task(self, task, next);
        rq_lock(self, self->id, 0);
    }
    return NULL;
}

/* The idle loop has called this, and looks at the run queue before it does anything else. */
static bool idle_looks(const struct shi_self *self)
{
    return shi_word_state(shi_load_relaxed(&self->slot->word)) == SHI_POLLING &&
           !self->in_task && !shi_in_interrupt(self) && !self->sched_depth;
}

/* The TTWU pass of the queue: put all these woken tasks on the own run queue. */
static void ttwu_pending(struct shi_self *self, struct shi_list *woken)
{
    const struct shi_machine *m = self->m;
    struct shi_rq *rq = shi_rq(m, self->id);
    uint32_t index, n = 0;
    bool rt = false;
    if (!woken->head)
        return;
    uint32_t named = woken->head; /* by the kernel, for all of them */
    SHI_TRACE(self, csd_function_entry, self->id, named, SHI_FUNC_NATIVE | (uint32_t)ttwu_func,
              woken->count);
    uint32_t first = (uint32_t)shi_csd(m, woken->head - 1)->value.u - 1;
    if (first < m->ntasks) /* its waker's by now, as is the run queue's line */
        shi_prefetch_write(shi_task(m, first));
    rq_lock(self, self->id, 0);
    while ((index = shi_list_pop(self, woken)) != UINT32_MAX) {
        struct shi_csd *csd = shi_csd(m, index);
        const struct shi_task *task = wake_listed(self, csd->value.u, csd->src);
        if (task) {
            rt |= (task->flags & SHI_PF_RT) != 0;
            n++;
        }
        /* After it is queued: until then a death finds the task by its csd's target. */
        shi_csd_unlock(self, csd);
    }
    /* After the first was enqueued: else who looks for an idle CPU finds none queued, none
     * pending, and all stack up here. */
    shi_store_relaxed(&rq->ttwu_pending, 0);
    shi_store_relaxed(&rq->wakelist, shi_load_relaxed(&rq->wakelist) + n);
    shi_store_relaxed(&rq->batches, shi_load_relaxed(&rq->batches) + 1);
    rq_unlock(self, self->id);
    if (n && !shi_rule_off(m, SHI_RULE_sched_resched) && !idle_looks(self))
        shi_resched_curr(self, self->id, !rt && has_turn(m, self->id));
    SHI_TRACE(self, csd_function_exit, self->id, named, SHI_FUNC_NATIVE | (uint32_t)ttwu_func,
              n);
}

/* ---- tasks ------------------------------------------------------------------------ */

/* Word `i` of housekeeping_cpumask(HK_TYPE_KTHREAD): who may run anywhere keeps off the CPUs that
 * are nohz_full, unless it is told otherwise. */
static uint64_t housekeeping(const struct shi_machine *m, uint32_t i)
{
    const shi_a64 *isolated = shi_user(m, SHI_USER_nohz, SHI_NOHZ_WORDS * sizeof(shi_a64));
    if (!isolated || i >= SHI_NOHZ_WORDS || shi_rule_off(m, SHI_RULE_nohz_housekeeping))
        return UINT64_MAX;
    return ~shi_load_relaxed(&isolated[i]);
}

int64_t shi_kthread_create(struct shi_self *self, const char *comm, int stepper, uint64_t arg,
                           int cpu, uint32_t flags)
{
    const struct shi_machine *m = self->m;
    struct shi_sched *sched = shi_sched(m);
    uint32_t i, index, words = shi_affinity_words(m->ncpus);
    struct shi_task *task = NULL;
    uint64_t w = 0;
    if (!(flags & SHI_PF_PYTHON) && (stepper < 0 || (uint32_t)stepper >= nsteppers))
        return -EINVAL;
    if (cpu >= (int)m->ncpus)
        return -ENXIO;
    for (i = 0; i < m->ntasks && !task; i++) {
        index = shi_fetch_add_relaxed(&sched->next, 1) % m->ntasks;
        w = shi_load_acquire(&shi_task(m, index)->word);
        /* Who claims it says so: a claimer that dies gives it back (shi_sched_slot_dead). */
        if (shi_tw_state(w) == SHI_TASK_FREE &&
            shi_cas_full(&shi_task(m, index)->word, &w,
                         with_waker(with_state(w, SHI_TASK_CLAIMED), self->id + 1)))
            task = shi_task(m, index);
    }
    if (!task)
        return -EAGAIN;
    uint32_t top = shi_load_relaxed(&sched->top);
    while (top <= index && !shi_cas_full(&sched->top, &top, index + 1))
        ;
    shi_store_relaxed(&task->next, 0);
    task->step = (uint32_t)stepper;
    task->arg = arg;
    task->flags = flags | (cpu >= 0 && !(flags & SHI_PF_PYTHON) ? SHI_PF_BOUND : 0);
    shi_store_relaxed(&task->length, 0);
    shi_store_relaxed(&task->timer, 0);
    memset(task->comm, 0, sizeof task->comm);
    strncpy(task->comm, comm, sizeof task->comm - 1);
    shi_store_relaxed(&task->runtime_ns, 0);
    shi_store_relaxed(&task->wakeups, 0);
    shi_store_relaxed(&task->switches, 0);
    shi_store_relaxed(&task->preempted, 0);
    shi_store_relaxed(&task->migrations, 0);
    for (i = 0; i < words; i++)
        shi_store_relaxed(&task->allowed[i], cpu < 0 ? housekeeping(m, i) : 0);
    if (cpu >= 0)
        shi_store_relaxed(&task->allowed[cpu / 64], 1ull << (cpu % 64));
    uint32_t home = cpu >= 0              ? (uint32_t)cpu
                    : self->id < m->ncpus ? self->id
                                          : index % m->ncpus;
    uint64_t serial = ((w >> SHI_TW_SERIAL_SHIFT) + 1) & 0xffffff;
    w = serial << SHI_TW_SERIAL_SHIFT | (uint64_t)home << SHI_TW_CPU_SHIFT | SHI_TASK_NEW;
    /* Releases all of the above to who finds the task by its id. */
    shi_xchg_full(&task->word, w);
    return (int64_t)shi_task_id(index, w);
}

int64_t shi_kthread_run(struct shi_self *self, const char *comm, int stepper, uint64_t arg,
                        int cpu, uint32_t flags)
{
    int64_t id = shi_kthread_create(self, comm, stepper, arg, cpu, flags);
    if (id > 0)
        shi_wake_up_process(self, (uint64_t)id);
    return id;
}

/* queue_work_on(), here: a kworker of this CPU runs csd `index`, which waits for nobody before
 * it.  0, or -EAGAIN: no task is free. */
static int queue_work(struct shi_self *self, uint32_t index)
{
    char comm[SHI_COMM];
    snprintf(comm, sizeof comm, "kworker/%u", self->id);
    int64_t id = shi_kthread_create(self, comm, -1, index, (int)self->id,
                                    SHI_PF_PYTHON | SHI_PF_BOUND | SHI_PF_REAP | SHI_PF_WORK);
    if (id < 0)
        return (int)id;
    /* Of this process: it ends when the CPU dies, as the csd does, which is another's then. */
    shi_fetch_or_full(&shi_task(self->m, (uint32_t)id - 1)->word, SHI_TW_PINNED);
    shi_wake_up_process(self, (uint64_t)id);
    return 0;
}

bool shi_work_due(const struct shi_self *self)
{
    return self->work_wait && shi_sched_work(self) && !shi_preempt_off(self) &&
           !self->irqs_off && self->sched_depth < SHI_WORK_DEPTH;
}

uint64_t shi_current_task(const struct shi_self *self)
{
    if (!self->current)
        return 0;
    return shi_task_id(self->current - 1,
                       shi_load_relaxed(&shi_task(self->m, self->current - 1)->word));
}

static void store_state(struct shi_task *task, enum shi_task_state state)
{
    uint64_t w = shi_load_relaxed(&task->word);
    /* Full: the state before the look at what the task waits for (see sched.h). */
    while (!shi_cas_full(&task->word, &w, with_state(w, state)))
        ;
}

void shi_set_current_state(struct shi_self *self, uint64_t id, enum shi_task_state state)
{
    uint64_t w;
    struct shi_task *task = shi_task_find(self->m, id, &w);
    if (!task)
        return;
    if (shi_rule_off(self->m, SHI_RULE_sched_state_first) && state != SHI_TASK_RUNNING)
        self->late_state = (uint8_t)state; /* when the step has ended, after the look */
    else
        store_state(task, state);
}

void shi_schedule_timeout(struct shi_self *self, uint64_t id, uint64_t when)
{
    uint64_t w;
    struct shi_task *task = shi_task_find(self->m, id, &w);
    if (!task)
        return;
    shi_store_relaxed(&task->timer, when);
    struct shi_rq *rq = shi_rq(self->m, self->id);
    uint64_t first = shi_load_relaxed(&rq->timer);
    while (when && (!first || when < first) && !shi_cas_full(&rq->timer, &first, when))
        ;
    /* In the idle loop, in a wait and at the end of an interrupt it is looked at anyway. */
    if (when && shi_word_state(shi_load_relaxed(&self->slot->word)) == SHI_RUNNING &&
        self->m->timers)
        self->m->timers->arm(self);
}

void shi_sched_point(struct shi_self *self)
{
    uint64_t first = shi_load_relaxed(&shi_rq(self->m, self->id)->timer), now;
    if (__builtin_expect(first != 0, 0) && (now = shi_now_ns()) >= first)
        shi_sched_expire(self, now);
}

bool shi_kthread_should_stop(const struct shi_self *self, uint64_t id)
{
    uint64_t w;
    return !shi_task_find(self->m, id, &w) || w & SHI_TW_STOP;
}

int shi_kthread_stop(struct shi_self *self, uint64_t id)
{
    uint64_t w;
    struct shi_task *task = shi_task_find(self->m, id, &w);
    do {
        if (!task || w >> SHI_TW_SERIAL_SHIFT != id >> 32 || shi_tw_state(w) == SHI_TASK_DEAD)
            return -ESRCH;
    } while (!shi_cas_full(&task->word, &w, w | SHI_TW_STOP));
    shi_wake_up_process(self, id); /* it may have ended by itself meanwhile */
    return 0;
}

/* Of a task that is ours alone. */
static void end_task(struct shi_task *task, uint64_t set)
{
    uint64_t w = shi_load_relaxed(&task->word), next;
    do {
        next =
            with_waker(with_state(w, task->flags & SHI_PF_REAP ? SHI_TASK_FREE : SHI_TASK_DEAD),
                       0) &
            ~(SHI_TW_ON_RQ | SHI_TW_ON_CPU | SHI_TW_PINNED);
        /* Releases what it returned. */
    } while (!shi_cas_full(&task->word, &w, next | set));
}

int shi_task_release(struct shi_self *self, uint64_t id)
{
    uint64_t w;
    struct shi_task *task = shi_task_find(self->m, id, &w);
    do {
        if (!task || w >> SHI_TW_SERIAL_SHIFT != id >> 32)
            return -ESRCH;
        if (shi_tw_state(w) != SHI_TASK_DEAD && shi_tw_state(w) != SHI_TASK_NEW)
            return -EBUSY;
    } while (!shi_cas_full(&task->word, &w,
                           w & UINT64_MAX << SHI_TW_SERIAL_SHIFT)); /* FREE, nobody's */
    return 0;
}

int shi_set_cpus_allowed(struct shi_self *self, uint64_t id, const uint64_t *words)
{
    const struct shi_machine *m = self->m;
    uint32_t i, cpu, n = shi_affinity_words(m->ncpus);
    bool some = false;
    uint64_t w, next;
    struct shi_task *task = shi_task_find(m, id, &w);
    if (!task || shi_tw_state(w) == SHI_TASK_DEAD)
        return -ESRCH;
    if (task->flags & SHI_PF_BOUND)
        return -EINVAL;
    for (cpu = 0; cpu < m->ncpus && !some; cpu++)
        some = words[cpu / 64] >> (cpu % 64) & 1 && shi_cpu_active(m, cpu);
    if (!some)
        return -EINVAL;
    cpu = shi_tw_cpu(w);
    if (w & SHI_TW_PINNED && !(words[cpu / 64] >> (cpu % 64) & 1))
        return -EBUSY;
    for (i = 0; i < n; i++)
        shi_store_relaxed(&task->allowed[i], words[i]);
    shi_fence_full();
    shi_enter(self);
    /* Where it is now: queued where it may not be, or running there.  A task that sleeps is
     * given a CPU when it is woken, and one that is WAKING: see activate(). */
    while (shi_task_find(m, id, &w) && !allowed(task, cpu = shi_tw_cpu(w)) &&
           shi_tw_state(w) == SHI_TASK_RUNNING) {
        if (w & SHI_TW_ON_CPU) {
            shi_resched_curr(self, cpu, false); /* its CPU sends it on when the step ends */
            break;
        }
        if (rq_lock(self, cpu, REMOTE_NS))
            continue;
        w = shi_load_acquire(&task->word);
        bool ours = false;
        if (is_queued(w, cpu)) {
            next = with_waker(with_state(w, SHI_TASK_WAKING), self->id + 1) & ~SHI_TW_ON_RQ;
            ours = shi_cas_full(&task->word, &w, next);
            if (ours)
                rebuild(m, cpu); /* without it */
        }
        rq_unlock(self, cpu);
        if (ours) {
            queue_task(self, task, next);
            break;
        }
    }
    shi_leave(self);
    return 0;
}

/* ---- schedule() ------------------------------------------------------------------- */

bool shi_sched_work(const struct shi_self *self)
{
    return shi_load_relaxed(&shi_rq(self->m, self->id)->queued) != 0 || self->waking.head;
}

enum shi_next shi_sched_next(const struct shi_self *self)
{
    const struct shi_machine *m = self->m;
    const struct shi_rq *rq = shi_rq(m, self->id);
    uint32_t head = shi_load_relaxed(&rq->head[0]);
    if (!head)
        head = shi_load_relaxed(&rq->head[1]);
    if (!head || head > m->ntasks)
        return SHI_NEXT_NONE;
    const struct shi_task *task = shi_task(m, head - 1);
    if (task->flags & SHI_PF_PYTHON)
        return SHI_NEXT_PYTHON;
    return task->step < nsteppers && steppers[task->step].python &&
                   steppers[task->step].python(self)
               ? SHI_NEXT_PYTHON
               : SHI_NEXT_NATIVE;
}

/* A step has ended.  The task is this CPU's until its word says otherwise. */
static void put_prev(struct shi_self *self, struct shi_task *task, uint64_t id,
                     enum shi_ran ran)
{
    struct shi_rq *rq = shi_rq(self->m, self->id);
    uint64_t w = shi_load_relaxed(&task->word), next;
    if (self->late_state) {
        store_state(task, self->late_state);
        self->late_state = 0;
    }
    if (ran == SHI_RAN_RUNNING)
        store_state(task, SHI_TASK_RUNNING);
    shi_enter(self);
    rq_lock(self, self->id, 0);
    w = shi_load_acquire(&task->word);
    /* On its way offline: the takedown came in the middle of this step. */
    bool gone = !shi_load_relaxed(&rq->active) && !(w & SHI_TW_PINNED);
    for (;;) {
        if (w >> SHI_TW_SERIAL_SHIFT != id >> 32 || !(w & SHI_TW_ON_CPU) ||
            shi_tw_cpu(w) != self->id)
            break; /* not ours any more: a rule is broken */
        if (ran == SHI_RAN_EXIT) {
            end_task(task, 0);
            break;
        }
        /* One compare-and-swap: a wake-up since the look at the state makes it fail, and one
         * that comes after it finds the task asleep. */
        if (shi_tw_state(w) == SHI_TASK_INTERRUPTIBLE ||
            shi_tw_state(w) == SHI_TASK_UNINTERRUPTIBLE) {
            if (!shi_cas_full(&task->word, &w, w & ~(SHI_TW_ON_RQ | SHI_TW_ON_CPU)))
                continue;
            if (gone && shi_load_relaxed(&task->timer)) {
                rq_unlock(self, self->id);
                wake(self, id, ASLEEP); /* nobody looks at its timer here */
                shi_leave(self);
                return;
            }
            break;
        }
        if ((gone || !allowed(task, self->id)) && !(w & SHI_TW_PINNED) &&
            !(task->flags & SHI_PF_BOUND)) {
        elsewhere:
            next = with_waker(with_state(w, SHI_TASK_WAKING), self->id + 1) &
                   ~(SHI_TW_ON_RQ | SHI_TW_ON_CPU);
            if (!shi_cas_full(&task->word, &w, next))
                continue;
            rq_unlock(self, self->id);
            queue_task(self, task, next);
            shi_leave(self);
            return;
        }
        uint64_t now = shi_now_ns();
        if (shi_load_relaxed(&rq->queued) && now - self->balance_ns > BALANCE_NS &&
            !(w & SHI_TW_PINNED) && !(task->flags & SHI_PF_BOUND)) {
            self->balance_ns = now;
            if (any_allowed(self->m, task, self->id, true) >= 0)
                goto elsewhere; /* an idle CPU may have it (nohz_balancer_kick) */
        }
        append(self->m, rq, index_of(self->m, task));
        while (!shi_cas_full(&task->word, &w, w & ~SHI_TW_ON_CPU))
            ;
        if (shi_load_relaxed(&rq->queued) > 1)
            shi_store_relaxed(&shi_sched(self->m)->overload, 1);
        break;
    }
    rq_unlock(self, self->id);
    shi_leave(self);
}

/* What runs here from now on has gone on at `resumed`, has run so much more than others, and has
 * its turn until `until`. */
static void turn(struct shi_self *self, uint64_t resumed, int64_t lag, uint64_t until)
{
    self->resumed = resumed;
    self->lag_ns = lag;
    self->turn_ns = until;
    shi_a64 *told = &shi_rq(self->m, self->id)->turn;
    if (shi_load_relaxed(told) != self->turn_ns)
        shi_store_relaxed(told, self->turn_ns);
}

bool shi_schedule_one(struct shi_self *self, bool native)
{
    const struct shi_machine *m = self->m;
    struct shi_rq *rq = shi_rq(m, self->id);
    if (native && shi_sched_next(self) != SHI_NEXT_NATIVE)
        return false;
    shi_ipi_point(self);
    shi_enter(self);
    rq_lock(self, self->id, 0);
    struct shi_task *task = take_first(self, self->id, -1);
    rq_unlock(self, self->id);
    shi_leave(self);
    if (!task)
        return false;
    uint32_t index = index_of(m, task), outer = self->current;
    bool python = self->step_python;
    uint64_t resumed = self->resumed;
    int64_t lag = self->lag_ns;
    uint64_t w = shi_load_relaxed(&task->word), id = shi_task_id(index, w);
    if (shi_load_relaxed(&self->slot->word) & (SHI_W_NEED_RESCHED | SHI_W_LAZY))
        shi_fetch_and_full(&self->slot->word, ~(SHI_W_NEED_RESCHED | SHI_W_LAZY));
    self->current = index + 1;
    self->step_python = !native;
    self->sched_depth++;
    shi_store_relaxed(&rq->curr, index + 1);
    shi_store_relaxed(&rq->switches, shi_load_relaxed(&rq->switches) + 1);
    shi_store_relaxed(&task->switches, shi_load_relaxed(&task->switches) + 1);
    uint64_t began = shi_stamp_early();
    turn(self, began, 0, 0);
    enum shi_ran ran = SHI_RAN_EXIT;
    if (task->flags & SHI_PF_PYTHON)
        ran = self->hooks.step ? self->hooks.step(self, id) : SHI_RAN_EXIT;
    else if (task->step < nsteppers)
        ran = steppers[task->step].step(self, id, task->arg);
    else
        shi_count(self, SHI_C_corrupt);
    shi_end_if_forked(self);
    shi_store_relaxed(&task->runtime_ns, shi_load_relaxed(&task->runtime_ns) +
                                             shi_stamp_to_ns(shi_stamp_early() - began));
    self->current = outer;
    self->step_python = python;
    turn(self, resumed, lag, 0); /* shi_turn_begin by who has let this run */
    self->sched_depth--;
    shi_store_relaxed(&rq->curr, outer);
    put_prev(self, task, id, ran);
    return true;
}

bool shi_sched_newidle(struct shi_self *self)
{
    const struct shi_machine *m = self->m;
    struct shi_sched *sched = shi_sched(m);
    uint32_t i, cpu = self->id;
    if (!shi_load_relaxed(&sched->overload) || !shi_cpu_active(m, self->id))
        return false;
    /* Before the looks: who queues one too many after them sets it again. */
    shi_store_full(&sched->overload, 0);
    for (i = 1; i < m->ncpus; i++) {
        if (++cpu == m->ncpus)
            cpu = 0;
        if (!shi_load_relaxed(&shi_rq(m, cpu)->queued))
            continue;
        shi_enter(self);
        struct shi_task *task = NULL;
        if (!rq_lock(self, cpu, REMOTE_NS)) {
            task = take_first(self, cpu, (int)self->id);
            rq_unlock(self, cpu);
        }
        if (task) {
            uint64_t w =
                shi_load_relaxed(&task->word); /* WAKING, by this CPU, and no other's */
            rq_lock(self, self->id, 0);
            bool strayed = take_turn(self, task, shi_task_id(index_of(m, task), w), self->id) &&
                           !activate(self, task, self->id);
            rq_unlock(self, self->id);
            if (strayed)
                queue_task(self, task, w);
            shi_store_relaxed(&shi_rq(m, self->id)->pulled,
                              shi_load_relaxed(&shi_rq(m, self->id)->pulled) + 1);
        }
        shi_leave(self);
        if (task) {
            shi_store_relaxed(&sched->overload, 1); /* others may find one, too */
            return true;
        }
    }
    return false;
}

void shi_sched_tick(struct shi_self *self)
{
    shi_remind(self);
}

static bool others_wait(const struct shi_self *self)
{
    return shi_sched_work(self) || shi_task_waits(self);
}

/* nohz_balancer_kick(): an idle CPU, which sleeps, may take what waits here. */
static void nohz_kick(struct shi_self *self)
{
    const struct shi_machine *m = self->m;
    uint32_t head = shi_load_relaxed(&shi_rq(m, self->id)->head[1]);
    if (!head || head > m->ntasks || shi_task(m, head - 1)->flags & SHI_PF_BOUND)
        return;
    int cpu = any_allowed(m, shi_task(m, head - 1), self->id, true);
    if (cpu < 0)
        return;
    shi_store_full(&shi_sched(m)->overload, 1);
    shi_resched_curr(self, (uint32_t)cpu, false);
}

static bool ticked(struct shi_self *self)
{
    if (!others_wait(self) || shi_rule_off(self->m, SHI_RULE_sched_resched))
        return false;
    shi_fetch_add_relaxed(&self->slot->counters[SHI_CTX_NMI][SHI_C_irq_timer], 1);
    shi_cause(self, SHI_CAUSE_tick); /* in its signal's handler, and so once at a time */
    nohz_kick(self);
    /* What was asked for lazily is due, and a slice is over. */
    shi_fetch_or_full(&self->slot->word, SHI_W_NEED_RESCHED);
    return true;
}

/* It was asked to reschedule where nobody looked. */
static void resched(struct shi_self *self)
{
    if (others_wait(self))
        shi_sched_tick(self);
}

void shi_turn_begin(struct shi_self *self, uint64_t began)
{
    uint64_t now = shi_now_ns(), stamp = shi_stamp_early();
    int64_t others = (int64_t)(now - began);
    int64_t lag = self->lag_ns + (int64_t)shi_stamp_to_ns(stamp - self->resumed) - others;
    if (lag > (int64_t)SLICE_NS)
        lag = SLICE_NS; /* nobody saves up more */
    lag -= others;
    if (lag < -(int64_t)OWED_NS)
        lag = -(int64_t)OWED_NS; /* nor owes: this CPU may have been without its core */
    turn(self, stamp, lag, lag < 0 ? now + (uint64_t)-lag : 0);
}

void shi_turn_reset(struct shi_self *self)
{
    turn(self, shi_stamp_early(), 0, 0);
}

void shi_turn_above(struct shi_self *self, struct shi_turn *below)
{
    *below = (struct shi_turn){ .began = shi_now_ns(),
                                .resumed = self->resumed,
                                .lag = self->lag_ns,
                                .current = self->current };
    self->current = 0;
    shi_turn_reset(self);
}

void shi_turn_below(struct shi_self *self, const struct shi_turn *below)
{
    self->current = below->current;
    turn(self, below->resumed, below->lag, 0);
    shi_turn_begin(self, below->began);
}

bool shi_turn_lasts(const struct shi_self *self)
{
    return self->turn_ns && !shi_load_relaxed(&shi_rq(self->m, self->id)->head[0]) &&
           shi_now_ns() < self->turn_ns;
}

/* preempt_schedule_irq, on top of a task: native steps, for a slice at most. */
static enum shi_preempted preempt(struct shi_self *self)
{
    uint64_t began = shi_now_ns(), end = began + SLICE_NS;
    bool ran = false;
    if (shi_turn_lasts(self)) {
        shi_sched_tick(self);
        return SHI_PREEMPT_NOT;
    }
    while (!shi_preempt_off(self) && self->sched_depth < SHI_SCHED_DEPTH &&
           shi_sched_next(self) == SHI_NEXT_NATIVE && shi_schedule_one(self, true)) {
        ran = true;
        if (shi_now_ns() >= end)
            break; /* whom this is on top of has its turn */
    }
    if (ran)
        shi_turn_begin(self, began);
    if (!others_wait(self))
        return ran ? SHI_PREEMPT_RAN : SHI_PREEMPT_NOT;
    shi_sched_tick(self);
    if (shi_sched_next(self) == SHI_NEXT_PYTHON || shi_task_waits(self))
        return SHI_PREEMPT_PYTHON;
    return ran ? SHI_PREEMPT_RAN : SHI_PREEMPT_NOT;
}

uint64_t shi_sched_expire(struct shi_self *self, uint64_t now)
{
    const struct shi_machine *m = self->m;
    struct shi_rq *rq = shi_rq(m, self->id);
    uint64_t first = shi_load_relaxed(&rq->timer), next = 0;
    uint32_t i, top = shi_load_relaxed(&shi_sched(m)->top);
    if (!first || now < first)
        return first;
    /* First: a timer that is set meanwhile makes it less again. */
    shi_store_full(&rq->timer, 0);
    for (i = 0; i < top && i < m->ntasks; i++) {
        struct shi_task *task = shi_task(m, i);
        uint64_t when = shi_load_relaxed(&task->timer);
        uint64_t w = shi_load_acquire(&task->word);
        if (!when || shi_tw_cpu(w) != self->id)
            continue;
        if (when > now) {
            if (!next || when < next)
                next = when;
            continue;
        }
        shi_store_relaxed(&task->timer, 0);
        shi_wake_up_process(self, shi_task_id(i, w));
    }
    first = shi_load_relaxed(&rq->timer);
    while (next && (!first || next < first) && !shi_cas_full(&rq->timer, &first, next))
        ;
    return shi_load_relaxed(&rq->timer);
}

uint64_t shi_sched_timers(struct shi_self *self, uint64_t now)
{
    if (__builtin_expect(self->leaving_ns != 0, 0)) {
        /* Who takes this CPU down has died between two tries: it stays. */
        uint64_t stays = self->leaving_ns + STAYS_NS;
        uint64_t first = shi_load_relaxed(&shi_rq(self->m, self->id)->timer);
        if (now < stays)
            return first && first < stays ? first : stays;
        shi_sched_cpu_online(self);
    }
    return shi_sched_expire(self, now);
}

/* ---- CPUs that come and go -------------------------------------------------------- */

void shi_sched_cpu_online(struct shi_self *self)
{
    shi_enter(self);
    rq_lock(self, self->id, 0);
    self->leaving_ns = 0;
    /* Of a waker whose push came too late: nobody pushes while it is not active. */
    shi_store_relaxed(&shi_rq(self->m, self->id)->ttwu_pending, 0);
    shi_store_relaxed(&shi_rq(self->m, self->id)->active, 1);
    rq_unlock(self, self->id);
    shi_leave(self);
}

/* Send the tasks of `cpu` elsewhere, which is not active any more.  Under no lock. */
static void push_away(struct shi_self *self, uint32_t cpu)
{
    const struct shi_machine *m = self->m;
    uint32_t i, top = shi_load_acquire(&shi_sched(m)->top);
    for (i = 0; i < top && i < m->ntasks; i++) {
        struct shi_task *task = shi_task(m, i);
        uint64_t w = shi_load_acquire(&task->word), next;
        if (shi_tw_cpu(w) != cpu || stays(task, w))
            continue;
        if (is_queued(w, cpu)) {
            rq_lock(self, cpu, 0);
            next = with_waker(with_state(w, SHI_TASK_WAKING), self->id + 1) & ~SHI_TW_ON_RQ;
            bool ours = shi_cas_full(&task->word, &w, next);
            if (ours)
                rebuild(m, cpu);
            rq_unlock(self, cpu);
            if (ours)
                queue_task(self, task, next);
        } else if (shi_load_relaxed(&task->timer) &&
                   (shi_tw_state(w) == SHI_TASK_INTERRUPTIBLE ||
                    shi_tw_state(w) == SHI_TASK_UNINTERRUPTIBLE)) {
            /* Its timer was this CPU's: it looks again by itself. */
            wake(self, shi_task_id(i, w), ASLEEP);
        }
    }
}

/* A step here, perhaps below others, that is of a task which could go on elsewhere. */
static bool in_a_moving_step(const struct shi_self *self)
{
    const struct shi_machine *m = self->m;
    uint32_t i, top = shi_load_acquire(&shi_sched(m)->top);
    if (!self->sched_depth)
        return false;
    for (i = 0; i < top && i < m->ntasks; i++) {
        uint64_t w = shi_load_acquire(&shi_task(m, i)->word);
        if (w & SHI_TW_ON_CPU && !(w & SHI_TW_PINNED) && shi_tw_cpu(w) == self->id &&
            !(shi_task(m, i)->flags & SHI_PF_BOUND))
            return true;
    }
    return false;
}

int shi_sched_cpu_dying(struct shi_self *self)
{
    shi_enter(self);
    rq_lock(self, self->id, 0);
    shi_store_relaxed(&shi_rq(self->m, self->id)->active, 0);
    rq_unlock(self, self->id);
    push_away(self, self->id);
    shi_leave(self);
    if (!in_a_moving_step(self))
        return 0;
    /* It lies below the takedown: parked now, the task would be until the CPU is back.  Not
     * active meanwhile, so that it begins no other, and this one leaves at its end. */
    uint64_t now = shi_now_ns();
    if (!self->leaving_ns)
        self->leaving_ns = now;
    return now - self->leaving_ns < STEP_NS ? -EAGAIN : 0;
}

void shi_sched_rewake(struct shi_self *self, uint64_t id, uint32_t waker)
{
    uint64_t w, next;
    shi_enter(self);
    struct shi_task *task = shi_task_find(self->m, id, &w);
    /* Not where its waker goes on by itself: it has been refused by the dead CPU's queue. */
    if (task && shi_tw_state(w) == SHI_TASK_WAKING && !(w & SHI_TW_TURN) &&
        waker_of(w) == waker + 1) {
        next = with_waker(w, self->id + 1);
        if (shi_cas_full(&task->word, &w, next))
            queue_task(self, task, next);
    }
    shi_leave(self);
}

/* Who is dead has put a task on another's run queue, and has perhaps told nobody. */
static void finish_wakeups(struct shi_self *self, uint32_t id)
{
    const struct shi_machine *m = self->m;
    uint32_t cpu;
    for (cpu = 0; cpu < m->ncpus; cpu++) {
        struct shi_rq *rq = shi_rq(m, cpu);
        /* Acquire pairs with the swap that took it: whose it was when he died. */
        uint64_t held = shi_load_acquire(&rq->lock);
        if (held && shi_holder_slot(held) == id && rq_lock(self, cpu, REMOTE_NS) == 0)
            rq_unlock(self, cpu); /* taken from it, the list is made anew */
        if (shi_load_relaxed(&rq->queued) && shi_cpu_active(m, cpu))
            shi_resched_curr(self, cpu, false);
    }
}

void shi_sched_slot_dead(struct shi_self *self, uint32_t id)
{
    const struct shi_machine *m = self->m;
    uint32_t i, top = shi_load_acquire(&shi_sched(m)->top);
    shi_enter(self);
    for (i = 0; i < top && i < m->ntasks; i++) {
        struct shi_task *task = shi_task(m, i);
        uint64_t w = shi_load_acquire(&task->word), next;
        if (waker_of(w) != id + 1)
            continue;
        if (shi_tw_state(w) == SHI_TASK_CLAIMED) {
            next = with_waker(with_state(w, SHI_TASK_FREE), 0);
            shi_cas_full(&task->word, &w, next);
        } else if (shi_tw_state(w) == SHI_TASK_WAKING) {
            /* Half woken.  A csd of it that is on its way finds it woken. */
            next = with_waker(w, self->id + 1) & ~SHI_TW_TURN;
            if (shi_cas_full(&task->word, &w, next))
                queue_task(self, task, next);
        }
    }
    finish_wakeups(self, id);
    shi_leave(self);
}

bool shi_sched_is_free(struct shi_self *self, uint32_t cpu)
{
    shi_enter(self);
    bool had = rq_lock(self, cpu, REMOTE_NS) == 0;
    if (had)
        rq_unlock(self, cpu);
    shi_leave(self);
    return had;
}

void shi_sched_cpu_dead(struct shi_self *self, uint32_t cpu)
{
    const struct shi_machine *m = self->m;
    struct shi_rq *rq = shi_rq(m, cpu);
    uint32_t i, top = shi_load_acquire(&shi_sched(m)->top);
    shi_enter(self);
    rq_lock(self, cpu, 0);
    shi_store_relaxed(&rq->active, 0);
    shi_store_relaxed(&rq->curr, 0);
    shi_store_relaxed(&rq->ttwu_pending, 0);
    shi_store_relaxed(&rq->timer, 0);
    rebuild(m, cpu);
    rq_unlock(self, cpu);
    /* It may have taken the flag, and not all of the mask. */
    shi_store_full(&shi_sched(m)->ipi_flagged, 1);
    for (i = 0; i < top && i < m->ntasks; i++) {
        struct shi_task *task = shi_task(m, i);
        uint64_t w = shi_load_acquire(&task->word), next;
        if (shi_tw_cpu(w) != cpu || shi_tw_state(w) <= SHI_TASK_NEW ||
            shi_tw_state(w) == SHI_TASK_DEAD || shi_tw_state(w) == SHI_TASK_WAKING)
            continue;
        if (task->flags & SHI_PF_BOUND && !(task->flags & SHI_PF_PYTHON)) {
            /* A kernel thread of that CPU looks again as soon as there is one. */
            rq_lock(self, cpu, 0);
            do {
                next = (with_state(w, SHI_TASK_RUNNING) | SHI_TW_ON_RQ) & ~SHI_TW_ON_CPU;
            } while (!shi_cas_full(&task->word, &w, next));
            rebuild(m, cpu);
            rq_unlock(self, cpu);
        } else if (w & (SHI_TW_ON_CPU | SHI_TW_PINNED)) {
            end_task(task, SHI_TW_DIED);
        }
    }
    /* Without those that have ended, whose entries may be used anew, and linked elsewhere. */
    rq_lock(self, cpu, 0);
    rebuild(m, cpu);
    rq_unlock(self, cpu);
    push_away(self, cpu);
    shi_leave(self);
    shi_sched_slot_dead(self, cpu);
}

void shi_sched_register(struct shi_machine *m)
{
    m->woken = ttwu_pending;
    m->preempt = preempt;
    m->tick = ticked;
    m->resched = resched;
    m->work = queue_work;
    m->work_due = shi_work_due;
}
