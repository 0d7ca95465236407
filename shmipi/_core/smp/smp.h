/* SPDX-License-Identifier: MIT */
/*
 * kernel/smp.c: lock a csd, queue it, send the interrupt, wait; take the queue and run it.
 *
 * A call is three steps, of users, benches and tests alike: shi_call_post, shi_call_wait,
 * and when its result has been read shi_call_end.
 *
 * Core sections of the sender, each a mutex on the host and a mask on a CPU: one from getting
 * the csd to ringing, because between its getting and its push nobody may take the sender's
 * lists, and a payload that fits no more has to give the csd back; one to give it back, which
 * cannot be before the wait.  A call that nobody waits for has the first alone.  To many, the
 * first is one for each CPU, so that none holds interrupts off for longer than one push, and
 * the doorbells are one more.
 *
 * `local` counts a sender's own csds.
 */
#ifndef SHI_SMP_H
#define SHI_SMP_H

#include "base/machine.h"
#include "smp/sender.h"

/* ---- one call -------------------------------------------------------------------- */

/*
 * Get a csd, fill it, queue it for `dst` and ring: its local index, or -errno with nothing left
 * behind.  `type`: SHI_CSD_SYNC or _TTWU, and the csd is the caller's (with SHI_CSD_PARKED the
 * unlock rings from the start); SHI_CSD_ASYNC: from the pool of calls that nobody waits for,
 * and given back when its target has taken it up.
 *
 * -EAGAIN: every csd is in flight, shi_call_room and again.  -ENXIO: `dst` is not online.
 * -EOWNERDEAD: the machine has ended.  -ESHUTDOWN: this guest has left.  Others: no room for
 * the payload, see shi_csd_block.
 */
int64_t shi_call_post(struct shi_self *self, const struct shi_call *call, uint64_t type,
                      uint32_t dst);

/* What a waiter does that is more than C.  `arg` is what was given with it. */
struct shi_waiter {
    uint64_t hold_ns;         /* spins for so long before it lets go */
    void (*begin)(void *arg); /* the wait has begun: nothing seen of it yet */
    /* Between two looks, with the enum shi_waited that ended the last: 0, or -errno to end
     * the wait by. */
    int (*turn)(void *arg, uint32_t dst, int why);
    /* About to spin for longer, or to sleep; and after it, with what let_go said. */
    void *(*let_go)(void *arg);
    void (*take_back)(void *arg, void *gone);
    void (*end)(void *arg);
    /* csd_lock_wait_toolong(): csd `index` is waited for as long as `stall` says.  0, or -errno
     * to end the wait by.  And when it was unlocked after all. */
    int (*stalled)(void *arg, const struct shi_stall *stall, uint32_t index, uint32_t dst);
    void (*unstuck)(void *arg, const struct shi_stall *stall, uint32_t index, uint32_t dst);
};

/* csd_lock_wait, the one loop over wait.h: spin, then sleep, serving the own queue, until
 * `local` is unlocked.  `waiter` NULL: nothing but C waits.  0, or -ETIMEDOUT, -EDEADLK,
 * -EOWNERDEAD (the machine is gone), -ESHUTDOWN, -EBADMSG (damage), or `turn`'s. */
/* `stall`: of a wait that is made of several, who makes them ends it; NULL: of this one. */
int shi_csd_wait(struct shi_self *self, uint32_t local, uint32_t dst, uint64_t deadline_ns,
                 const struct shi_waiter *waiter, void *arg, struct shi_stall *stall);
/* The same of a posted call: on an error the csd is left behind, and given back when its
 * target has unlocked it. */
int shi_call_wait(struct shi_self *self, uint32_t local, uint32_t dst, uint64_t deadline_ns,
                  const struct shi_waiter *waiter, void *arg);
/* The result has been read. */
void shi_call_end(struct shi_self *self, uint32_t local);
/* Every csd is in flight: wait for the oldest that nobody else waits for, 1 ms at most,
 * because its target may be stopped and others may have ended.  0: try again; -EAGAIN: all
 * belong to somebody; else as shi_csd_wait, `*dst` the CPU it was about. */
int shi_call_room(struct shi_self *self, const struct shi_waiter *waiter, void *arg,
                  uint32_t *dst);

/* ---- calls to many --------------------------------------------------------------- */

struct shi_many {
    const uint32_t *mask; /* CPUs, ascending; the own one, and who is not online, are skipped */
    uint32_t n;
    int (*cond)(void *arg, uint32_t cpu); /* 1, 0, or -errno to end it by.  NULL: all */
    void *cond_arg;
    const struct shi_waiter *waiter; /* or NULL */
    void *arg;
    /* Room for n each, and what came of it: to whom it went by which csd. */
    uint32_t *cpus, *locals, *ipis;
    uint32_t queued, nipis;
    uint32_t polls; /* of the last of ipis: its csd (index + 1) if it polls, else 0 */
    uint32_t at;    /* the CPU that an error is about */
};

/* smp_call_function_many_cond up to its wait: queue all, then ring who is to be rung, on an
 * error too.  `wait`: many->locals are the caller's, shi_call_wait and shi_call_end each.
 * 0, or as shi_call_post and shi_call_room. */
int shi_call_many(struct shi_self *self, struct shi_many *many, const struct shi_call *call,
                  bool wait);

/* ---- a csd of one's own ---------------------------------------------------------- */

/* A csd that is filled and in nobody's queue: its local index, or as shi_call_post. */
int64_t shi_call_prepare(struct shi_self *self, const struct shi_call *call);
/* smp_call_function_single_async: generic_exec_single for a remote CPU and a csd that was
 * filled before.  0, -EBUSY (locked), or as shi_call_post.  Between shi_enter and shi_leave. */
int shi_call_single(struct shi_self *self, uint32_t local, uint64_t type, uint32_t dst);

/* The same without its interrupt, which one for several stands for: enum shi_pushed, for the
 * caller to send it, or -errno. */
int shi_call_push(struct shi_self *self, uint32_t local, uint64_t type, uint32_t dst);

/* __smp_call_single_queue of a woken task: pass 3 of `dst` gets a csd with `func` and `task`.
 * 0, or as shi_call_post; -EAGAIN is not waited for.  Between shi_enter and shi_leave. */
int shi_call_wake(struct shi_self *self, uint32_t func, uint64_t task, uint32_t dst);

/* __smp_call_single_queue: a csd that its owner has locked.  0, or -ENXIO: it is locked still.
 * Between shi_enter and shi_leave. */
int shi_call_single_queue(struct shi_self *self, uint32_t local, uint32_t dst);
/* Run one that this CPU has taken, or put it off for the interpreter.  Soft-masked. */
void shi_csd_run(struct shi_self *self, uint32_t index);

/* -EBUSY when in use.  Between shi_enter and shi_leave.  `type` is SHI_CSD_SYNC, ...; the
 * push fills in dst's generation. */
int shi_csd_trylock(struct shi_self *self, struct shi_csd *csd, uint64_t type, uint32_t dst);
/* The target, after (SYNC) or before (ASYNC) the function: rings a parked waiter. */
void shi_csd_unlock(struct shi_self *self, struct shi_csd *csd);

/* smp_send_reschedule: the interrupt, whatever the target does, also to itself.  -ENXIO when
 * offline. */
int shi_irq_send_reschedule(struct shi_self *self, uint32_t dst);

/* The lines of call-function and reschedule IPIs, and the queue, are this file's. */
void shi_smp_register(struct shi_machine *m);

#endif
