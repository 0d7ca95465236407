/* SPDX-License-Identifier: MIT */
/*
 * kernel/sched/core.c: a run queue for each CPU, of tasks that run in steps.
 *
 * A native task is a function that is called again and again and does a little each time;
 * what it keeps between two steps is in shared memory, so it may run anywhere.  A Python
 * task's step runs until it yields (py/sched.c).  Steps run with interrupts on: in the idle
 * loop, at schedule points (cond_resched, waits, between Cluster tasks), and on top of a
 * Cluster task that may be preempted, when an interrupt that set NEED_RESCHED returns.
 *
 * Waking, from any CPU, the host, a handler or a softirq (no NMI):
 *
 *     sleeper                                   waker
 *     set_current_state(INTERRUPTIBLE)          the condition becomes true
 *     <full>                                    <full>
 *     look at the condition                     look at the task's word
 *     false: SHI_RAN_SLEEP                      asleep, or about to be: make it run
 *
 * One of the two sees the other.  A task whose step still runs is only marked: its CPU looks
 * at the mark when the step ends, in the one compare-and-swap that puts it to sleep.
 *
 * A run queue is what the tasks' words say, in a list: who takes its lock from a dead
 * holder makes the list anew from the words.
 */
#ifndef SHI_SCHED_H
#define SHI_SCHED_H

#include "base/machine.h"

/* What a step has to say when it ends. */
enum shi_ran {
    SHI_RAN_RUNNING = 0, /* there is more to do: others first */
    SHI_RAN_SLEEP = 1,   /* schedule(): it sleeps, if its state still says so */
    SHI_RAN_EXIT = 2,
};

/* A step of task `id`, on `self`, which is its CPU.  Short: interrupts that the CPU was not
 * kicked for are served between two of them. */
typedef enum shi_ran shi_task_step(struct shi_self *self, uint64_t id, uint64_t arg);

#define SHI_STEPPERS 64u

/* For shi_users_init(): the same index in every process; or -ENOSPC. */
int shi_stepper_register(const char *name, shi_task_step *step);
/* The same of steps that may need the interpreter: `python` says whether the next one on this
 * CPU does.  Where self->step_python is not set, a step does the rest. */
int shi_stepper_register_mixed(const char *name, shi_task_step *step,
                               bool (*python)(const struct shi_self *));
/* Once, before: what stands in traces for sched_ttwu_pending. */
void shi_sched_init(void);

/* ---- tasks ----------------------------------------------------------------------- */

/*
 * A new task, NEW until it is woken: its id, > 0.  `cpu` < 0: wherever there is room; else
 * bound to that CPU for good.  `flags`: SHI_PF_RT, SHI_PF_REAP and so on.  Legal in any
 * context but NMIs.  -EINVAL: no such step; -ENXIO: no such CPU; -EAGAIN: no entry is free.
 */
int64_t shi_kthread_create(struct shi_self *self, const char *comm, int stepper, uint64_t arg,
                           int cpu, uint32_t flags);
/* Created, and woken. */
int64_t shi_kthread_run(struct shi_self *self, const char *comm, int stepper, uint64_t arg,
                        int cpu, uint32_t flags);
/* A task that waits for a kworker is to let others run. */
bool shi_work_due(const struct shi_self *self);
/* The task's step that runs here, 0: none. */
uint64_t shi_current_task(const struct shi_self *self);
/* Of the task itself: full, before it looks at what it waits for. */
void shi_set_current_state(struct shi_self *self, uint64_t id, enum shi_task_state state);
/* Wake it at `when` (shi_now_ns) at the latest, once; 0: no more.  Before SHI_RAN_SLEEP. */
void shi_schedule_timeout(struct shi_self *self, uint64_t id, uint64_t when);
/* 1: it was asleep, or about to be, or new; 0: it runs anyway; -ESRCH: it has ended, or
 * never was.  Full: what was stored before is seen by the task. */
int shi_wake_up_process(struct shi_self *self, uint64_t id);
/* The same of a task that is in one of these states (bits by enum shi_task_state). */
int shi_try_to_wake_up(struct shi_self *self, uint64_t id, uint32_t states);
bool shi_kthread_should_stop(const struct shi_self *self, uint64_t id);
/* Ask it to end, and wake it.  0 or -ESRCH.  It has ended when shi_task_state() says so. */
int shi_kthread_stop(struct shi_self *self, uint64_t id);
/* enum shi_task_state, or -ESRCH. */
int shi_task_state(const struct shi_machine *m, uint64_t id);
/* Its word and its entry, or NULL. */
struct shi_task *shi_task_find(const struct shi_machine *m, uint64_t id, uint64_t *word);
/* The entry is free for another: of a DEAD task, or one that was never woken.  -EBUSY. */
int shi_task_release(struct shi_self *self, uint64_t id);
/* sched_setaffinity.  `words` as in cpus_ptr.  -EINVAL: bound, or no active CPU among them;
 * -EBUSY: what it has begun cannot leave its CPU; -ESRCH. */
int shi_set_cpus_allowed(struct shi_self *self, uint64_t id, const uint64_t *words);

/* ---- the CPUs' side -------------------------------------------------------------- */

/* May tasks be put there? */
bool shi_cpu_active(const struct shi_machine *m, uint32_t cpu);
/* idle_cpu(): nothing runs there, is queued there, or is about to be. */
bool shi_idle_cpu(const struct shi_machine *m, uint32_t cpu);
/* cpus_share_cache(). */
bool shi_cpus_share_cache(const struct shi_machine *m, uint32_t a, uint32_t b);
/* __resched_curr.  `lazy`: TIF_NEED_RESCHED_LAZY.  -ENXIO when offline. */
int shi_resched_curr(struct shi_self *self, uint32_t cpu, bool lazy);

/* What smp.c and entry.c, which are below, call of it. */
void shi_sched_register(struct shi_machine *m);
/* resched_cpu(): nothing for a CPU that is offline. */
void shi_irq_resched_cpu(struct shi_self *self, uint32_t cpu);
/* What is to run here next. */
enum shi_next { SHI_NEXT_NONE = 0, SHI_NEXT_NATIVE = 1, SHI_NEXT_PYTHON = 2 };
enum shi_next shi_sched_next(const struct shi_self *self);
/*
 * schedule(): take the first off the run queue and run a step of it, Python's by the hook
 * `self->hooks.step`; `native`: not a Python one.  False: there was none.  Interrupts on, not
 * in a core section.
 */
bool shi_schedule_one(struct shi_self *self, bool native);
/* Take a task from a run queue that has more than its CPU runs.  True: there is one now. */
bool shi_sched_newidle(struct shi_self *self);
/* Wake those whose time has come; when the next one's will, or 0: in the timer's interrupt
 * (users/tick.c) ... */
uint64_t shi_sched_expire(struct shi_self *self, uint64_t now);
/* ... and in the idle loop. */
uint64_t shi_sched_timers(struct shi_self *self, uint64_t now);
/* A task lets others run: the same, where nothing interrupts it (kick=False). */
void shi_sched_point(struct shi_self *self);
#define SHI_SCHED_DEPTH 8u
#define SHI_WORK_DEPTH 64u /* where a kworker waits for another, and would for ever */
/*
 * Whom others were on top of since `began` goes on: undisturbed but by RT until it has run as
 * long as they.  Who has less than its share, a kernel thread that mostly sleeps, so comes on
 * top as soon as it is woken; who takes all it gets, every second slice.  A stack of preempted
 * steps would else end each after all that are above it, times the ticks that it needs
 * itself: the lowest never.
 */
void shi_turn_begin(struct shi_self *self, uint64_t began);
/* A task begins. */
void shi_turn_reset(struct shi_self *self);
/* A task begins on top of a step, and has ended. */
struct shi_turn {
    uint64_t began, resumed;
    int64_t lag;
    uint32_t current;
};
void shi_turn_above(struct shi_self *self, struct shi_turn *below);
void shi_turn_below(struct shi_self *self, const struct shi_turn *below);
bool shi_turn_lasts(const struct shi_self *self);
/* Look again within a millisecond: others wait. */
void shi_sched_tick(struct shi_self *self);
/* There is something for the idle loop: without a write, and mostly without a miss. */
bool shi_sched_work(const struct shi_self *self);

/* ---- CPUs that come and go ------------------------------------------------------- */

void shi_sched_cpu_online(struct shi_self *self);
/* Before it is offline: its tasks go elsewhere, but those that are bound or pinned.  -EAGAIN:
 * a step of one has not ended; try again when it has (balance_hotplug_wait), soon. */
int shi_sched_cpu_dying(struct shi_self *self);
/* The firmware: `cpu`, whose word says so, is dead.  What ran there is DEAD and says DIED; the
 * rest goes elsewhere.  Also what it was waking. */
void shi_sched_cpu_dead(struct shi_self *self, uint32_t cpu);
/* Before that: can it be done now?  False: a live process has the lock of its run queue, and does
 * not go on (SIGSTOP). */
bool shi_sched_is_free(struct shi_self *self, uint32_t cpu);
/* The wake list of a CPU that died had this one, from slot `waker`. */
void shi_sched_rewake(struct shi_self *self, uint64_t id, uint32_t waker);
/* What slot `id`, which has ended, was about to do to tasks is done for it. */
void shi_sched_slot_dead(struct shi_self *self, uint32_t id);

/* ---- where things lie ------------------------------------------------------------ */

static inline struct shi_rq *shi_rq(const struct shi_machine *m, uint32_t cpu)
{
    return (struct shi_rq *)(shi_sched(m) + 1) + cpu;
}

/* `index` below m->ntasks. */
static inline struct shi_task *shi_task(const struct shi_machine *m, uint32_t index)
{
    return (struct shi_task *)((uint8_t *)shi_rq(m, m->ncpus) +
                               (uint64_t)index * m->task_bytes);
}

static inline enum shi_task_state shi_tw_state(uint64_t w)
{
    return (enum shi_task_state)(w & SHI_TW_STATE);
}

static inline uint32_t shi_tw_cpu(uint64_t w)
{
    return (uint32_t)(w >> SHI_TW_CPU_SHIFT & SHI_TW_SLOT);
}

/* A task's id: which use of which entry. */
static inline uint64_t shi_task_id(uint32_t index, uint64_t word)
{
    return word >> SHI_TW_SERIAL_SHIFT << 32 | (index + 1);
}

#endif
