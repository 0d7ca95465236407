/* SPDX-License-Identifier: MIT */
/* The idle loop of a CPU: poll, poll for a while, or halt. */
#ifndef SHI_IDLE_H
#define SHI_IDLE_H

#include "base/machine.h"
#include "smp/wait.h"

enum shi_idle_why {
    SHI_IDLE_TASK = 1,    /* self->tasks is not empty */
    SHI_IDLE_STOP = 2,    /* the machine is stopping */
    SHI_IDLE_OFFLINE = 3, /* asked to go offline */
    SHI_IDLE_SIGNAL = 4,  /* a signal came: let the interpreter look */
    SHI_IDLE_PYTHON = 5,  /* self->deferred is not empty */
    SHI_IDLE_SCHED = 6,   /* a step of a Python task is next */
};

/* Idle until something is to be done that is not an interrupt handler's work. */
enum shi_idle_why shi_idle(struct shi_self *self);

/*
 * Idle once in the middle of a task, which has made the CPU POLLING and served all there
 * was: poll as the idle policy says, then halt, until there is work, `ready` (NULL: never),
 * or `until_ns` (0: no limit).  Gives the interpreter up by the hook.  0, -EINTR, -ETIMEDOUT;
 * it may come back for nothing.
 */
int shi_idle_in_task(struct shi_self *self, shi_ready *ready, const void *arg,
                     uint64_t until_ns);

/*
 * Timed idle, of a task with interrupts on: wait in `state` until `until_ns` (shi_now_ns()
 * clock).  HALTED sleeps on the doorbell, whichever it is; POLLING serves what it sees;
 * RUNNING spins, and is kicked.  1: an interrupt was taken; 0: it is time, or something wants
 * the task (the machine ends, it is cancelled, Python waits, the CPU is to go offline).
 * -EINTR: a signal came that is none of shmipi's.  It is RUNNING when this returns.
 */
int shi_idle_until(struct shi_self *self, enum shi_state state, uint64_t until_ns);
/* The same of the idle policy haltpoll: polls for its window, then halts, and adapts it. */
int shi_haltpoll_until(struct shi_self *self, uint64_t until_ns);
/* The same of RUNNING alone; `lost_ns` (or NULL): for how long the interrupt kept it from
 * spinning, from before the signal until after it. */
int shi_run_until(struct shi_self *self, uint64_t until_ns, uint64_t *lost_ns);

#endif
