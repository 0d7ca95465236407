/* SPDX-License-Identifier: MIT */
/*
 * Replaying what CPUs of another machine did: each CPU of this one runs its script, a list of
 * steps in shared memory, in a native loop within a task.
 *
 * A step is due at a time since the common start.  Between two the CPU waits in the state that
 * the other machine's was in (shi_idle_until); handlers take as long as they took there.  All
 * that is reported is stamped here: when a call was queued, when its function began, when each
 * interrupt was entered and left, and for how long one kept a running CPU from running.
 */
#ifndef SHI_REPLAY_H
#define SHI_REPLAY_H

#include "base/machine.h"

enum shi_replay_op {
    SHI_RP_WAIT = 0,    /* in `state`, until at_ns, or what ends it (below) */
    SHI_RP_CALL = 1,    /* queue call `call` for `cpu`; `state`: enum shi_replay_type */
    SHI_RP_MANY = 2,    /* smp_call_function_many: calls `call` to `call` + count - 1 */
    SHI_RP_JOIN = 3,    /* csd_lock_wait: until all that are waited for have run */
    SHI_RP_RESCHED = 4, /* smp_send_reschedule(cpu); its stamp goes to `call` */
    SHI_RP_LAZY = 5,    /* TIF_NEED_RESCHED_LAZY of `cpu`, and no interrupt */
    SHI_RP_LOCAL = 6,   /* run call `call` here, with interrupts off: it is in no queue */
    SHI_RP_BATCH = 7,   /* queue `count` calls from `call` on, then one interrupt for all */
    SHI_RP_RAISE = 8,   /* the interrupt of a call, whose queueing is not known */
};

enum shi_replay_type { SHI_RP_SYNC = 0, SHI_RP_ASYNC = 1, SHI_RP_WAKE = 2 };

#define SHI_RP_NONE UINT32_MAX
#define SHI_RP_HALTPOLL 0xff /* a WAIT's `state`: idle as the policy haltpoll has it */

struct shi_replay_step {
    uint64_t at_ns;   /* due; WAIT: it is over then */
    uint64_t run_ns;  /* WAIT: RUNNING from then on */
    uint64_t over_ns; /* WAIT, JOIN: when what is waited for was over there, or 0 */
    uint32_t call;    /* its call; WAIT: the call that ends it when it has run, or none */
    uint32_t count;   /* MANY, BATCH; WAIT: that many reschedules end it, 0: they do not */
    uint16_t cpu;
    uint8_t op, state; /* WAIT: enum shi_state, or SHI_RP_HALTPOLL */
    uint32_t reserved;
};
_Static_assert(sizeof(struct shi_replay_step) == 40, "as shmipi/trace/script.py has it");

/* What became of a call, and its place in /proc/interrupts: written by sender and target. */
enum shi_replay_how {
    SHI_RP_UNSENT = 0,
    SHI_RP_RUNG = 1,
    SHI_RP_COALESCED = 2,
    SHI_RP_ELIDED = 3,
    SHI_RP_NOT_QUEUED = 4, /* it ran where it was asked for, or its interrupt was spared */
};

struct shi_replay_call {
    shi_a64 due;     /* when it was to be sent, in the stamps' ns; 0: at no certain time */
    shi_a64 queued;  /* stamps */
    shi_a64 entered; /* its function, or that of the list that it was in; 0: not yet */
    shi_a64 left;
    uint32_t burn_ns; /* how long that takes */
    uint16_t cpu;     /* its target */
    shi_a8 how;       /* enum shi_replay_how */
    shi_a8 unseen;    /* it ran outside an interrupt: there a kernel records nothing */
};
_Static_assert(sizeof(struct shi_replay_call) == 40, "as shmipi/trace/script.py has it");

/* An interrupt that was taken. */
struct shi_replay_entry {
    uint64_t entered, left; /* stamps */
    uint32_t use;           /* enum shi_line_use */
    uint32_t state;         /* that the CPU waited in, as a step has it */
};

struct shi_replay_cpu {
    _Alignas(SHI_PAIR) uint32_t nentries; /* taken, also those that the log had no room for */
    uint32_t missed;                      /* waits that no interrupt ended, though one should */
    uint64_t lost_ns; /* of a running CPU, to interrupts: from before the signal until after */
    uint64_t step;    /* that it is at */
};

struct shi_replay_control {
    _Alignas(SHI_PAIR) shi_a32 ready;
    shi_a32 done;
    shi_a32 come;                     /* to shi_replay_meet() */
    _Alignas(SHI_PAIR) shi_a64 start; /* shi_now_ns() clock; 0: not all are ready */
    shi_a32 abort;                    /* somebody gave up: all do */
    uint32_t ncpus;
    struct shi_replay_cpu cpus[];
};
_Static_assert(offsetof(struct shi_replay_control, start) == 128 &&
                   sizeof(struct shi_replay_control) == 256 &&
                   sizeof(struct shi_replay_cpu) == 128,
               "as shmipi/trace/replay.py reads them");

enum shi_replay_pace {
    SHI_RP_TIMED = 0,
    SHI_RP_CAUSAL = 1, /* as long after what it followed there, an interrupt or an answer */
    SHI_RP_ASAP = 2,   /* no waits, but for answers */
};

/* Everything in shared memory, checked by the caller but for what is in it. */
struct shi_replay_run {
    const struct shi_replay_step *steps;
    uint32_t nsteps, ncalls;
    struct shi_replay_call *calls;
    struct shi_replay_entry *entries;
    uint32_t entries_room;
    struct shi_replay_control *control;
    uint32_t pace;       /* enum shi_replay_pace */
    uint32_t resched_ns; /* a reschedule's handler takes so long */
    uint64_t patience_ns;
    uint32_t dst; /* whom an error is about */
};

/* Of `ncpus` CPUs. */
uint64_t shi_replay_control_bytes(uint32_t ncpus);
/* Wait, asleep, until all CPUs have come to this: whoever is to have a core for himself from
 * then on takes it from nobody who has yet to come.  Of `run`: only `control`.  As below. */
int shi_replay_meet(struct shi_self *self, struct shi_replay_run *run);
/* Run the own CPU's script, with all others.  0, or -ECANCELED (the machine ends), -EINTR (the
 * task is cancelled), -EPIPE (another CPU gave up), -ETIMEDOUT (somebody did not come, or a
 * call did not return), -EOWNERDEAD, -ENXIO (a CPU died, or went offline), -EINVAL (a step
 * that is none). */
int shi_replay(struct shi_self *self, struct shi_replay_run *run);
/* Its native handlers. */
void shi_replay_register(void);

#endif
