/* SPDX-License-Identifier: MIT */
/* Who a process is in a machine: its slot, what it owns, what it counts. */
#ifndef SHI_MACHINE_H
#define SHI_MACHINE_H

#include "base/sys.h"

#include <pthread.h>
#include <time.h>
#include <unistd.h>

#include "base/arena.h"
#include "base/segment.h"

struct shi_self;
struct shi_text;

/* What a sender knows about each of its csds and functions, in private memory. */
struct shi_csd_note {
    uint64_t block;  /* arena block + 1, or 0 */
    uint32_t func;   /* function index + 1, or 0 */
    uint32_t shared; /* index + 1 of the csd that owns the block with this one */
    uint32_t users;  /* csds that share this one's block */
    uint8_t ending;  /* give this one back with the last of its users */
    uint8_t nowait;  /* counts against SHI_NOWAIT_POOL */
    uint8_t left;    /* nobody will ask for its result */
    shi_a8 polled;   /* sent alone, to a CPU that polled: 1 + shi_patience_kind, else 0 */
};

struct shi_func_note {
    uint64_t block; /* arena block + 1, or 0 */
    uint32_t in_flight;
    uint8_t dead; /* the function object is gone: free when in_flight is 0 */
};

/* What was said of a wait for a csd: csd_lock_wait_toolong(). */
struct shi_stall {
    uint64_t begun_ns, said_ns; /* shi_now_ns(); 0: it has only just begun */
    uint32_t bug;               /* its number, 0: nothing was said */
    uint32_t messages;
    uint32_t backoff; /* that many timeouts until the next, by then */
};

struct shi_sender {
    struct shi_arena arena;
    void *room; /* of all tables below: one mapping, a page of which costs when touched */
    size_t room_bytes;
    struct shi_csd_note *notes;
    uint32_t *free_csds; /* stack */
    uint32_t nfree, csd_top;
    shi_a16 *patience; /* how long an answer takes that is near: see shi_patience */
    uint32_t *flight;  /* ring of csds sent without waiting, oldest first */
    uint32_t flight_head, flight_count;
    uint32_t nowait;     /* of those, how many came from wait=0 calls */
    uint32_t behind;     /* 1 + the CPU in whose queue the last one stood behind another */
    uint32_t room_looks; /* in vain, one after another, for room for more of them */
    struct shi_stall room_stall;
    struct shi_func_note *funcs;
    uint32_t *free_funcs;
    uint32_t nfree_funcs, func_top, next_serial;
    struct shi_loan *loans; /* oldest first but for gaps that were filled */
    uint32_t nloans, loan_room, loan_next;
    uint64_t lent; /* bytes of their blocks */
};

/* A block with a result, which its caller may read: lend.h. */
struct shi_loan {
    uint64_t block; /* in the arena */
    uint32_t csd;   /* index through all slots */
    uint16_t seq;   /* which use of it */
    uint16_t src_gen;
};

/* A list of csds the owner has taken off its queue, linked by csd.next. */
struct shi_list {
    uint32_t head, tail, count; /* index + 1 */
};

/* What the layer above (Python, or a native test) plugs in. */
struct shi_hooks {
    void *arg;
    /* Run one Python csd now.  Soft-masked.  NULL: always defer. */
    void (*run)(struct shi_self *, uint32_t csd);
    /* About to spin for longer than 20 us, or to sleep: give the interpreter up. */
    void (*release)(struct shi_self *);
    /* Called in the kick handler when Python work was deferred: async-signal-safe. */
    void (*interrupt)(struct shi_self *);
    /* Run the Python handler of a requested irq's line now, and end it.  Soft-masked. */
    void (*irq)(struct shi_self *, uint32_t line);
    /* Run a step of a Python task: enum shi_ran.  Interrupts on. */
    int (*step)(struct shi_self *, uint64_t id);
    void (*work)(struct shi_self *self, uint32_t csd); /* what a kworker does */
    void (*above)(
        struct shi_self *self); /* run a task that waits behind the step on top of it */
    /* About to be online: run the STARTING section's Python callbacks.  Soft-masked. */
    void (*starting)(struct shi_self *);
    /* An NMI's handler is Python's.  In the NMI's signal handler: async-signal-safe. */
    void (*nmi)(struct shi_self *);
    /* Write the Python stack of this CPU, innermost first.  Async-signal-safe. */
    void (*stack)(struct shi_self *, struct shi_text *);
    /* Run the program of a cpumap's entry on a packet: enum shi_xdp.  In its thread. */
    uint32_t (*xdp)(struct shi_self *, uint64_t entry, uint32_t hash, uint64_t data);
    /* Run the Python action of a softirq now.  Interrupts are on.  NULL: always defer. */
    void (*softirq)(struct shi_self *, uint32_t nr);
};

#define SHI_SELF_CSDS 2u /* users that have a csd for each CPU (users/csds.h) */

struct shi_self {
    struct shi_machine *m;
    struct shi_slot *slot;
    uint32_t id;
    uint16_t gen;
    bool host;  /* or firmware, or guest: sends and waits, but is no CPU */
    bool guest; /* a host that is attached: the machine is another's */
    /* A guest detaches: its waits end; and then its slot is not its own any more.  A fork's
     * child has left from the start: the slot is the parent's. */
    volatile uint8_t leaving, left;
    struct shi_self *next_host; /* of this process (shi_self_init) */
    pid_t pid, tid;
    pthread_t thread;
    shi_a64 *counts; /* of the context it is in */

    /* Read by the kick handler of the same thread. */
    volatile uint8_t irqs_off; /* local_irq_disable, or a handler is running */
    volatile uint8_t in_core;  /* depth of core sections in task context */
    volatile uint8_t happened; /* a kick came while masked */
    volatile uint8_t in_irq;   /* depth of hard-irq context */
    volatile uint8_t ctx;      /* enum shi_ctx for counters */
    volatile uint8_t in_nmi;
    const void *context; /* in a signal's handler: the ucontext_t of what it has interrupted */
    volatile uint8_t in_kick; /* the kick's signal is blocked: its handler runs */
    /* softirq_count(): SHI_SOFTIRQ_SERVING, and twice that for each local_bh_disable(). */
    volatile uint32_t softirq;
    shi_a32 raised, lazy;        /* irq_work queued here, newest first: csd index + 1 */
    volatile uint32_t queueing;  /* 1 + the csd of an irq_work on its way to another CPU */
    volatile bool timer_due;     /* the timer's interrupt has come, and is to be taken */
    shi_a32 softirqs;            /* raised, and not begun: bits by enum shi_softirq */
    volatile bool softirq_asked; /* the interpreter is to run those that are Python's */
    volatile bool softirqd;      /* what is pending was left to ksoftirqd */
    volatile uint8_t nmi_waits;  /* an NMI is in service, and Python has to handle it */
    /* Of the NMI in service (irq/nmi.c): whose turn it is, and what was handled so far. */
    uint8_t nmi_type;
    bool nmi_again;   /* back to back: it was pending when the one before was over */
    bool nmi_swallow; /* that one has handled several events: this may have been one of them */
    volatile bool nmi_ahead; /* an NMI IPI was entered ahead of its NMI, which is to come ... */
    bool nmi_spent;          /* ... and may be this one */
    uint32_t nmi_handled;
    volatile uint8_t reminding; /* the timer is set (remind.h) */
    volatile uint32_t held;     /* depth of imports: kicks leave Python handlers waiting */
    bool has_timer;
    uint8_t core_shared; /* 1: no other CPU has this one's core, 2: one has; 0: not known */
    volatile bool down;  /* it is offline: take_cpu_down has run, and it has to play dead */
    bool ran;            /* its state was RUNNING */
    bool inline_python;  /* the idle loop or a waiter: run Python csds at once */
    bool in_task;
    struct shi_csd *volatile cancellable; /* of the task, while its function runs */
    uint32_t served;                      /* changes with every interrupt that was taken */
    uint32_t *csds; /* guarded ones of users (users/csds.c): SHI_SELF_CSDS for each CPU, + 1 */
    struct shi_list waking; /* woken tasks' csds that are not on the run queue yet */
    uint32_t current;       /* 1 + the task (smp/sched.h) whose step runs, 0: none */
    uint8_t sched_depth;    /* steps on top of each other */
    bool step_python;       /* the step that runs here may use the interpreter */
    uint8_t late_state;     /* a rule is off: the state that a step ends with */
    uint64_t leaving_ns;    /* since then a step holds its takedown off, 0: none */
    uint64_t turn_ns;       /* until then who runs is not preempted again (shi_turn_begin) */
    uint64_t resumed;       /* when it went on last: a stamp */
    int64_t lag_ns;         /* how long it has run more than those on top of it */
    uint64_t balance_ns;    /* when it last looked for an idle CPU for a task too many */
    bool has_mm;            /* what runs here has an address space (users/tlb.c) */
    bool work_wait;         /* a task waits for another CPU's kworker: others run here */
    bool pausing;           /* a task waits for one: a native NMI has to be noticed too */
    uint32_t preempt;       /* depth of preempt_disable(): shi_preempt_count() has it all */
    bool steps;
    struct shi_trace_said {
        uint32_t site, called;
    } said;                 /* see shi_trace_said() */
    const shi_a64 *tracing; /* of the header: the events that are recorded */
    struct {                /* its ring, found anew when there is another one */
        uint64_t at;        /* of the area, 0: not looked for */
        struct shi_trace_area *area;
        struct shi_trace_head *head;
        struct shi_trace_record *records;
        uint64_t mask;
    } ring;

    uint64_t tick_armed;       /* when the kernel's timer interrupts a task; 0: it is not set */
    volatile uint8_t tick_now; /* something of this CPU's timers is due */
    uint32_t expired;          /* timers whose Python functions wait for the interpreter */

    uint32_t unsent; /* results for which there was no room yet: the layer above has them */
    struct shi_list deferred; /* Python csds waiting for the interpreter */
    struct shi_list tasks;
    bool task_runs;           /* one of them, perhaps below a step that is on top of it */
    uint64_t behind_ns;       /* since when one waits behind a step, by what this CPU has run */
    struct shi_list stops;    /* works of the stopper, not begun */
    volatile uint8_t in_stop; /* it runs one */
    struct {                  /* the multi_cpu_stop that this CPU is in */
        uint32_t csd;         /* index + 1, 0: none */
        uint32_t src;         /* whose */
        uint32_t word;        /* the state that it has come to */
        bool active, irqs_off, ran;
    } multi;
    uint16_t later[SHI_NLINES];     /* lines of requested irqs waiting for the interpreter */
    uint64_t later_for[SHI_NLINES]; /* by line: of which irq, and which of its reservations */
    uint32_t handling;              /* 1 + the line whose Python handler runs, 0: none does */
    uint32_t nlater;
    uint64_t taken[SHI_NLINES / 64]; /* read from the chip, and not dispatched yet */
    uint8_t demuxing;                /* esb: in smp_ipi_demux, and how it came there */
    uint32_t flood;                  /* times in a row that nobody waited for what was queued */
    uint64_t storm_ns;               /* when the kick handler last returned */
    uint64_t poll_ns;                /* haltpoll's window */
    uint64_t spin_ns; /* measuring: a waiter spins so long less one; 0: shi_wait_budget knows */
    struct shi_sender sender;
    struct shi_hooks hooks;
    pthread_mutex_t lock; /* host only: its threads share one sender */
    pthread_mutex_t kick_lock;
    timer_t timer; /* of the CPU's own thread: asks the interpreter again */
};

/* A native handler that forks comes back in the child, too, which is no CPU: it would complete
 * its parent's call a second time and take the next one off its queue.  It ends here. */
static inline void shi_end_if_forked(const struct shi_self *self)
{
    if (__builtin_expect(self->left, 0))
        _exit(0);
}

static inline void shi_count_n(struct shi_self *self, enum shi_counter c, uint64_t n)
{
    shi_a64 *p = &self->counts[c];
    if (self->host)
        shi_fetch_add_relaxed(p, n); /* its threads share the row */
    else
        shi_store_relaxed(p, shi_load_relaxed(p) + n);
}

static inline void shi_count(struct shi_self *self, enum shi_counter c)
{
    shi_count_n(self, c, 1);
}

/* The interrupt that was counted is for this.  Soft-masked, or (nmi) in an NMI. */
static inline void shi_cause(struct shi_self *self, enum shi_cause why)
{
    shi_a64 *p = &self->slot->causes[why];
    shi_store_relaxed(p, shi_load_relaxed(p) + 1);
}

/* Of shi_self.csds. */
static inline size_t shi_self_csds_bytes(const struct shi_machine *m)
{
    return (size_t)SHI_SELF_CSDS * m->ncpus * sizeof(uint32_t);
}

static inline bool shi_masked(const struct shi_self *self)
{
    return self->irqs_off || self->in_core;
}

/* ---- contexts (include/linux/preempt.h) -------------------------------------------- */

#define SHI_SOFTIRQ_SERVING 1u /* SOFTIRQ_OFFSET */
#define SHI_SOFTIRQ_DISABLE 2u /* SOFTIRQ_DISABLE_OFFSET */

/* The kernel's preempt_count(): 8 bits of preemption, 8 of softirq, 4 of hardirq, 4 of NMI. */
static inline uint32_t shi_preempt_count(const struct shi_self *self)
{
    return (self->preempt & 0xffu) | (self->softirq & 0xffu) << 8 |
           (self->in_irq & 0xfu) << 16 | (self->in_nmi & 0xfu) << 20;
}

static inline bool shi_in_serving_softirq(const struct shi_self *self)
{
    return (self->softirq & SHI_SOFTIRQ_SERVING) != 0;
}

/* Does a task (of cluster.run) wait behind a step of the scheduler's? */
static inline bool shi_task_waits(const struct shi_self *self)
{
    return __builtin_expect(self->tasks.head != 0, 0) && self->current && !self->task_runs;
}

/* In a handler, an NMI or a softirq, or where softirqs are held off. */
static inline bool shi_in_interrupt(const struct shi_self *self)
{
    return self->in_irq || self->in_nmi || self->softirq;
}

static inline bool shi_in_task(const struct shi_self *self)
{
    return !self->in_irq && !self->in_nmi && !shi_in_serving_softirq(self);
}

static inline bool shi_preemptible(const struct shi_self *self)
{
    return !self->preempt && !shi_in_interrupt(self) && !shi_masked(self);
}

/* preempt_disable() or local_bh_disable(), or a softirq. */
static inline bool shi_preempt_off(const struct shi_self *self)
{
    return self->preempt || self->softirq;
}

/* May softirqs that are pending run here? */
static inline bool shi_softirqs_due(const struct shi_self *self)
{
    return __builtin_expect(shi_load_relaxed(&self->softirqs) != 0, 0) &&
           !shi_in_interrupt(self) && !shi_masked(self);
}

/*
 * Is NEED_RESCHED of this word a reason to leave the idle loop?  Of a task it is not: it is
 * not preempted, and sees the flag (need_resched()) until it waits, ends or lets others run
 * (cond_resched()), which is what schedule() is here.
 */
static inline bool shi_resched_due(const struct shi_self *self, uint64_t w)
{
    return w & (SHI_W_NEED_RESCHED | SHI_W_LAZY) && (!self->in_task || self->pausing);
}

/* Is this CPU to play dead, or to end?  (A section with preemption disabled holds off the
 * stopper, and with it the takedown: kernel/cpu.c, takedown_cpu.) */
static inline bool shi_hotplug_due(const struct shi_self *self)
{
    return self->down ||
           (!shi_preempt_off(self) && shi_load_acquire(&self->slot->hotplug) == SHI_HP_STOP);
}

/* Does anything wait for the interpreter that interrupts off hold back? */
static inline bool shi_irqs_wait(const struct shi_self *self)
{
    return self->deferred.head || self->nlater || self->expired ||
           (self->softirq_asked && !self->softirq) ||
           (self->unsent && shi_load_relaxed(&self->slot->starved) != SHI_ST_WAITS);
}

/* Is there a work for the stopper, and can what runs here be preempted by it? */
static inline bool shi_stop_due(const struct shi_self *self)
{
    return __builtin_expect(self->stops.head || self->multi.csd, 0) && !self->in_stop &&
           shi_preemptible(self);
}

/* Does anything wait for the interpreter?  The stopper may need it. */
static inline bool shi_python_waits(const struct shi_self *self)
{
    return self->nmi_waits || shi_irqs_wait(self) || shi_stop_due(self);
}

/* Is a timer of this CPU due?  Reads the clock. */
static inline bool shi_tick_look(struct shi_self *self, uint64_t now)
{
    if (self->m->timers && !self->host && self->m->timers->due(self, now))
        self->tick_now = 1;
    return self->tick_now;
}

/* Has the machine ended for this process?  A guest is told when its end has begun. */
static inline bool shi_ended(const struct shi_self *self)
{
    uint32_t state = shi_load_acquire(&self->m->header->machine_state);
    return state >= SHI_M_STOPPING && (state == SHI_M_DEAD || self->guest);
}

/* Wake every host that waits: the machine's owner and its guests. */
void shi_hosts_ring(const struct shi_machine *m);

/* A lock in the segment: 0, or its holder.  The pid tells processes apart that share a slot:
 * the firmware and the coprocessors that it has forked, a host and its children. */
#define SHI_HOLDER_SLOT_BITS 20
#define SHI_HOLDER_PID_BITS 24 /* the kernel's PID_MAX_LIMIT is 2^22 */
_Static_assert(SHI_MAX_CPUS + SHI_EXTRA_SLOTS + 1 < (1 << SHI_HOLDER_SLOT_BITS) - 1,
               "a holder's word has room for every slot, and for the orphan");
/* Of a holder of which it is known that it has died: no slot's. */
#define SHI_HOLDER_ORPHAN ((UINT64_C(1) << SHI_HOLDER_SLOT_BITS) - 1)

static inline uint32_t shi_holder_slot(uint64_t held)
{
    return ((uint32_t)held & ((1u << SHI_HOLDER_SLOT_BITS) - 1)) - 1;
}

static inline uint32_t shi_holder_pid(uint64_t held)
{
    return (uint32_t)(held >> SHI_HOLDER_SLOT_BITS) & ((1u << SHI_HOLDER_PID_BITS) - 1);
}

/* 0 or -EAGAIN; a holder that died loses it. */
int shi_lock_try(struct shi_self *self, shi_a64 *lock);
/* The same, and 1 when it was taken from one that died: what it protects may be half changed. */
int shi_lock_take(struct shi_self *self, shi_a64 *lock);
/* The same, and 1 with what stood there in *dead (shi_holder_slot). */
int shi_lock_steal(struct shi_self *self, shi_a64 *lock, uint64_t *dead);
/* Of what was taken so.  Nothing, if it was taken from this process meanwhile. */
void shi_lock_drop(struct shi_self *self, shi_a64 *lock);
/* Does this process hold it? */
bool shi_lock_mine(const struct shi_self *self, const shi_a64 *lock);
void shi_lock_release(struct shi_self *self, shi_a64 *lock);
/* A child that shares this process's slot has been waited for: what it held can be taken. */
void shi_lock_orphan(const struct shi_self *self, shi_a64 *lock, uint32_t pid);
/* Is it nobody's: free, or of a holder that died? */
bool shi_lock_is_free(const struct shi_self *self, const shi_a64 *lock);

/* Is the task that runs here to be interrupted?  The flag is in its own csd, so that it is
 * never the next task's. */
static inline bool shi_cancel_asked(const struct shi_self *self)
{
    const struct shi_csd *csd = self->cancellable;
    return csd && (shi_load_acquire(&csd->lock) & SHI_CSD_CANCEL) != 0;
}

#endif
