/* SPDX-License-Identifier: MIT */
/*
 * Read-copy update (kernel/rcu/tree.c, tree_exp.h): readers that take no lock, and grace
 * periods that wait for all who read when they began.
 *
 * A grace period is a number that is odd while it runs, and a mask of CPUs that have yet to
 * report a quiescent state.  Whoever waits for it drives it, under a lock that is held for one
 * step at a time and never while waiting; so a driver that dies or is stopped leaves a grace
 * period that the next one goes on with.
 *
 * A reader stores its depth with no barrier: the interrupt (rcu_exp_handler) is what orders it.
 * The handler runs on the reader's own CPU, before the section or in its midst, and its report
 * is a full read-modify-write.  CPUs that sleep are not sent to: they have said so by a full
 * read-modify-write of their own (context tracking), and say when they wake before they read.
 */
#ifndef SHI_RCU_H
#define SHI_RCU_H

#include "base/machine.h"

#define SHI_RCU_RING 256u /* callbacks of one CPU */

struct shi_rcu_head {
    uint64_t seq;  /* grace period that has to end first */
    uint64_t info; /* a number, an offset in the segment, or the process's own number */
    uint32_t func;
    shi_a32 kind; /* enum shi_rcu_kind */
};

enum shi_rcu_kind {
    SHI_RCU_INT = 0,
    SHI_RCU_POINTER = 1,
    SHI_RCU_PYTHON = 2,
    SHI_RCU_BUSY = 3, /* it runs: who is killed in it does not leave it to be run again */
    SHI_RCU_GONE = 4, /* it has run, or was lost, before others that are older */
};

struct shi_rcu_cpu {
    _Alignas(SHI_PAIR) shi_a32 nesting; /* depth of rcu_read_lock; the owner's */
    shi_a32 need_qs;  /* cpu_no_qs: the outermost rcu_read_unlock is to report */
    shi_a64 watching; /* odd: asleep, it reads nothing (ct->state) */
    shi_a64 reports;  /* quiescent states of grace periods that it reported itself */
    /* Of the grace period's driver, under its lock. */
    _Alignas(SHI_PAIR) uint64_t snap; /* of watching */
    uint64_t sent_ns;                 /* the interrupt has been sent; 0: not yet */
    /* Callbacks: the owner queues them, soft-masked; who has the lock invokes them, which is
     * the owner, or, where that is gone, another CPU.  `done` is read by rcu_barrier(). */
    _Alignas(SHI_PAIR) shi_a64 queued;
    shi_a64 done;
    shi_a64 lost; /* of those done: that a death has taken */
    shi_a64 lock; /* shi_lock_take */
    struct shi_rcu_head ring[SHI_RCU_RING];
};

struct shi_rcu {
    _Alignas(SHI_PAIR) shi_a64 seq; /* odd: a grace period runs */
    shi_a64 remaining;              /* CPUs that have yet to report */
    shi_a64 waitq;                  /* where who waits stands; 0: nowhere */
    _Alignas(SHI_PAIR) shi_a64 lock;
    uint64_t started_ns, stall_ns;
    shi_a64 ipis;         /* sent */
    shi_a64 idle;         /* CPUs not sent to, because they slept */
    shi_a64 offline;      /* because they were offline, at first */
    shi_a64 retried;      /* -ENXIO, and online when looked at again: a tick later again */
    shi_a64 gone;         /* -ENXIO, and offline: reported in its place */
    shi_a64 died_readers; /* CPUs that died in a read-side section: it ended with them */
    shi_a64 stalls;
    shi_a64 migrated; /* callbacks of CPUs that are gone, invoked elsewhere */
    shi_a32 left;     /* a CPU may have gone and left some */
    _Alignas(SHI_PAIR) shi_a64 expmask[SHI_MAX_CPUS / 64];
    struct shi_rcu_cpu cpu[];
};

uint64_t shi_rcu_bytes(const struct shi_machine *m);
struct shi_rcu *shi_rcu_state(const struct shi_machine *m);

/* On a CPU, in any context but an NMI.  0, or -EDEADLK: an unlock without its lock. */
void shi_rcu_read_lock(struct shi_self *self, struct shi_rcu *st);
int shi_rcu_read_unlock(struct shi_self *self, struct shi_rcu *st);

/* The end of the first grace period that begins after this (rcu_seq_snap). */
uint64_t shi_rcu_snap(struct shi_rcu *st);
/*
 * One step towards `seq`: end the grace period that runs if all have reported, begin the next
 * if one is needed, send what is to be sent.  True: it is over.  `expedited`: CPUs are
 * interrupted at once, else when they have not reported by themselves for 5 ms.
 */
bool shi_rcu_advance(struct shi_self *self, uint64_t seq, bool expedited);
/* The same for as long as it is worth spinning. */
bool shi_rcu_spin(struct shi_self *self, uint64_t seq, bool expedited);
/* Who holds the grace period up, for a report: the next CPU from `cpu` on, or -1. */
int64_t shi_rcu_holdout(const struct shi_machine *m, uint32_t cpu);
bool shi_rcu_stalled(struct shi_rcu *st, uint64_t after_ns);

/* call_rcu on this CPU.  0, or -ENOSPC: too many wait. */
int shi_call_rcu(struct shi_self *self, enum shi_rcu_kind kind, uint32_t func, uint64_t info);
/* rcu_core: invoke native callbacks that are ready, from the oldest on; when all of this CPU
 * are done, those that CPUs have left which are gone.  1: a Python one is next, its number in
 * `*python`; 0: none is ready; -EAGAIN: some wait for a grace period. */
int shi_rcu_core(struct shi_self *self, uint64_t *python);
/* The Python one has run. */
void shi_rcu_done(struct shi_self *self);
/* Native callbacks of `cpu` that have not run. */
uint32_t shi_rcu_natives_left(const struct shi_machine *m, uint32_t cpu);

/* Context tracking, by the idle loop and who waits. */
void shi_rcu_idle_enter(struct shi_self *self);
void shi_rcu_idle_exit(struct shi_self *self);
/* `cpu` died, or this CPU has gone offline: rcutree_migrate_callbacks. */
void shi_rcu_dead(struct shi_self *self, uint32_t cpu);
void shi_rcu_leave(struct shi_self *self, uint32_t cpu);
/* Who was told then has not invoked what was left: this CPU, or another one. */
void shi_rcu_retell(struct shi_self *self);
/* This CPU is online again. */
void shi_rcu_join(struct shi_self *self);

void shi_rcu_natives(void);

#endif
