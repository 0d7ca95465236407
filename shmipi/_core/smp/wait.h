/* SPDX-License-Identifier: MIT */
/* csd_lock_wait: wait for a csd, serve the own queue meanwhile, and never for ever. */
#ifndef SHI_WAIT_H
#define SHI_WAIT_H

#include "base/machine.h"

struct shi_wait {
    struct shi_csd *csd;
    uint32_t dst, index;
    uint64_t deadline_ns; /* shi_now_ns() clock; 0: none */
    uint64_t tick_ns;     /* next look at progress */
    uint64_t seen;        /* dst's word at the last look */
    uint64_t progress;    /* and what it had done (shi_watch_progress) */
    shi_a16 *patience;    /* before the first look, NULL: none */
    bool published;
    uint64_t outer; /* what was published before: the wait that this one is within */
};

enum shi_waited {
    SHI_WAIT_DONE = 0,
    SHI_WAIT_MORE = 1,   /* still locked: go on, with shi_wait_sleep */
    SHI_WAIT_PYTHON = 2, /* Python csds were deferred: run them, then go on */
    SHI_WAIT_SIGNAL = 3, /* it slept: signals may have come, let the interpreter look */
};
/* and -ETIMEDOUT, -EDEADLK, -EOWNERDEAD (the machine is gone), -EBADMSG (damage) */

/* The CPU publishes POLLING so that crossed calls cost no signal; nothing on the host
 * or with interrupts off. */
void shi_wait_begin(struct shi_self *self, struct shi_wait *wait, uint32_t index, uint32_t dst,
                    uint64_t deadline_ns);
/* Spin for `budget_ns` at most. */
int shi_wait_spin(struct shi_self *self, struct shi_wait *wait, uint64_t budget_ns);
/* Sleep until something happens, 10 ms at most. */
int shi_wait_sleep(struct shi_self *self, struct shi_wait *wait);
/* Back to RUNNING if a task waited. */
void shi_wait_end(struct shi_self *self, struct shi_wait *wait);

/* What a halt waits for besides its CPU being rung: read from shared memory. */
typedef bool shi_ready(const void *arg);
/*
 * Halt the own CPU until it is rung, for `ns` at most (< 0: for ever): not at all where there
 * is work that may be served, or `ready` (NULL: never).  Who makes it ready does so with a
 * read-modify-write and then calls shi_irq_ring_waiter.  0, -EINTR or -ETIMEDOUT.
 */
int shi_halt_until(struct shi_self *self, shi_ready *ready, const void *arg, int64_t ns);

/* How long a waiter should spin before it sleeps. */
uint64_t shi_wait_budget(const struct shi_self *self, uint32_t dst);

#endif
