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
    /* An NMI's handler is Python's.  In the NMI's signal handler: async-signal-safe. */
    void (*nmi)(struct shi_self *);
};

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
    volatile uint8_t nmi_waits; /* an NMI is in service, and Python has to handle it */
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
    bool inline_python; /* the idle loop or a waiter: run Python csds at once */
    bool in_task;
    struct shi_csd *volatile cancellable; /* of the task, while its function runs */
    uint32_t served;                      /* changes with every interrupt that was taken */
    bool pausing; /* a task waits for one: a native NMI has to be noticed too */
    uint32_t preempt;
    bool trace;
    bool steps;

    uint32_t unsent; /* results for which there was no room yet: the layer above has them */
    struct shi_list deferred; /* Python csds waiting for the interpreter */
    struct shi_list tasks;
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

static inline bool shi_masked(const struct shi_self *self)
{
    return self->irqs_off || self->in_core;
}

/*
 * Is NEED_RESCHED of this word a reason to leave the idle loop?  Of a task it is not: it is
 * not preempted, and sees the flag (need_resched()) until it waits, ends or lets others run
 * (cond_resched()), which is what schedule() is here.
 */
static inline bool shi_resched_due(const struct shi_self *self, uint64_t w)
{
    return w & SHI_W_NEED_RESCHED && (!self->in_task || self->pausing);
}

/*
 * Is this CPU to go offline, or to end?  A section with preemption disabled holds off the
 * stopper, and with it the takedown (kernel/cpu.c, takedown_cpu).
 */
static inline bool shi_hotplug_due(const struct shi_self *self)
{
    return !self->preempt && shi_load_acquire(&self->slot->hotplug) != SHI_HP_ONLINE;
}

/* Does anything wait for the interpreter that interrupts off hold back? */
static inline bool shi_irqs_wait(const struct shi_self *self)
{
    return self->deferred.head || self->nlater ||
           (self->unsent && shi_load_relaxed(&self->slot->starved) != SHI_ST_WAITS);
}

/* Does anything wait for the interpreter? */
static inline bool shi_python_waits(const struct shi_self *self)
{
    return self->nmi_waits || shi_irqs_wait(self);
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
