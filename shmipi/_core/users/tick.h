/* SPDX-License-Identifier: MIT */
/*
 * Timers (kernel/time/hrtimer.c) and tick broadcast (kernel/time/tick-broadcast.c).
 *
 * Each CPU has a queue of timers, sorted by expiry.  A CPU that sleeps has stopped its local
 * timer, as in a deep C state, and stands in a mask; one CPU, to which the broadcast device is
 * bound, sleeps no longer than the first of those timers and sends the timer interrupt to
 * whose is due.
 *
 * What is true about a timer is one word: inactive, queued on a CPU, or running there, and
 * which use of it that is.  Who changes the word with compare-and-swap has the timer, so no
 * lock is held that a death could leave.  A CPU's queue is an index of its own: entries of
 * timers that were cancelled or taken elsewhere stay until they come up, and are recognised by
 * the number of their use.  Of a CPU that died or went offline the table of timers is read, and
 * never its queue.
 */
#ifndef SHI_TICK_H
#define SHI_TICK_H

#include "base/machine.h"

#define SHI_NEVER UINT64_MAX
#define SHI_TIMER_NAME 40u
#define SHI_TIMER_QUEUE 512u /* entries of a CPU's queue; timers on it: half as many */

enum shi_timer_kind { SHI_TK_FREE = 0, SHI_TK_NATIVE = 1, SHI_TK_PYTHON = 2 };

struct shi_hrtimer {
    _Alignas(SHI_PAIR) shi_a64 word; /* state | AGAIN | CPU << 16 | use << 32 */
    shi_a64 expires;                 /* CLOCK_MONOTONIC */
    shi_a64 interval; /* 0: once; else it is queued again so much later each time */
    shi_a32 kind;     /* enum shi_timer_kind */
    uint32_t func;    /* native handler */
    uint64_t info;    /* its argument: a number, or an offset in the segment */
    uint32_t info_kind;
    shi_a32 lost;  /* times it could not be taken over from a CPU that died */
    shi_a64 fired; /* times its function was called */
    char name[SHI_TIMER_NAME];
    shi_a64 due; /* expiry that its function was called for last */
    uint64_t reserved;
};
_Static_assert(sizeof(struct shi_hrtimer) == SHI_PAIR, "a timer is a line pair");

#define SHI_T_STATE 0x3ull
#define SHI_T_INACTIVE 0ull
#define SHI_T_QUEUED 1ull
#define SHI_T_RUNNING 2ull
#define SHI_T_AGAIN 0x4ull /* running, and started meanwhile: queued when its function ends */
#define SHI_T_CPU_SHIFT 16
#define SHI_T_USE_SHIFT 32

struct shi_tick_entry {
    uint64_t expires;
    uint32_t timer, use;
};

struct shi_tick_cpu {
    _Alignas(SHI_PAIR) shi_a64 next_event; /* the earliest of its queue, published */
    shi_a32 handler; /* 1: its event device has a handler (oneshot mode) */
    uint32_t n;
    /* Counts, of the owner. */
    shi_a64 local;     /* timer interrupts of its own device */
    shi_a64 broadcast; /* that came through the timer line */
    shi_a64 expired;   /* timers */
    shi_a64 sent;      /* broadcast interrupts, as the one the device is bound to */
    shi_a64 handlers;  /* broadcast device's interrupts */
    /* Written by others: timers that this CPU is to put into its queue. */
    _Alignas(SHI_PAIR) shi_a32 adopt;
    _Alignas(SHI_PAIR) struct shi_tick_entry queue[SHI_TIMER_QUEUE];
};

#define SHI_MASK_WORDS (SHI_MAX_CPUS / 64)

struct shi_tick {
    _Alignas(SHI_PAIR) shi_a64 bc_next; /* when the broadcast device interrupts */
    shi_a32 bound_on;                   /* 1 + the CPU it is bound to; 0: none */
    shi_a32 handovers;
    shi_a32 stalls; /* of those, because the CPU did not do its work */
    shi_a32 died;   /* timers whose function a CPU's death has ended */
    shi_a32 moved;  /* timers taken over from CPUs that were gone */
    _Alignas(SHI_PAIR) shi_a64 oneshot[SHI_MASK_WORDS]; /* CPUs whose local timer is stopped */
    _Alignas(SHI_PAIR) shi_a64 pending[SHI_MASK_WORDS]; /* of those, that were sent to */
    struct shi_tick_cpu cpu[];
    /* then the timers, then adopt_words of each CPU: a bit a timer */
};

/* Bytes of the state for this machine, all 0 at first. */
uint64_t shi_tick_bytes(const struct shi_machine *m);
/* NULL: this machine has had no timers so far. */
struct shi_tick *shi_tick_state(const struct shi_machine *m);
/* NULL: no such timer. */
struct shi_hrtimer *shi_hrtimer(const struct shi_machine *m, uint32_t index);

/* hrtimer_setup: its index, or -ENOSPC.  `func`: native handler; Python: unused. */
int64_t shi_hrtimer_setup(const struct shi_machine *m, enum shi_timer_kind kind, uint32_t func,
                          uint32_t info_kind, uint64_t info, const char *name);
/*
 * hrtimer_start on this CPU, or on `cpu` (add_timer_on).  Queued already: it moves.  While its
 * function runs: it is queued there when that has ended.  0; -ENXIO: `cpu` is not online;
 * -ENOSPC: too many on this CPU; -ENOENT: no such timer; -EPERM: from an NMI.
 */
int shi_hrtimer_start(struct shi_self *self, uint32_t index, uint64_t expires,
                      uint64_t interval, uint32_t cpu);
/* hrtimer_try_to_cancel: 1 it was queued, 0 it was not, -1 its function runs; -ENOENT. */
int shi_hrtimer_try_to_cancel(struct shi_self *self, uint32_t index);

/* hrtimer_forward: by how many intervals; in its function, before that asks for a restart. */
uint64_t shi_hrtimer_forward(struct shi_self *self, uint32_t index, uint64_t now,
                             uint64_t interval);

/* Python's: the next timer of this CPU whose function is to run, or -1; and when it has. */
int64_t shi_tick_pop(struct shi_self *self);
void shi_tick_done(struct shi_self *self, uint32_t index, bool restart);

/* tick_receive_broadcast: 0, -ENODEV (no event device), -EINVAL (nobody handles it). */
int shi_tick_receive_broadcast(struct shi_self *self);

/* For checks: a CPU that sleeps for good with its local timer stopped, while the CPU that the
 * broadcast device is bound to sleeps too, and longer than until that CPU's first timer.
 * -1: there is none. */
int64_t shi_tick_check(const struct shi_machine *m);

void shi_tick_register(struct shi_machine *m);
void shi_tick_natives(void);

#endif
