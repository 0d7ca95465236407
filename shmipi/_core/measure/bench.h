/* SPDX-License-Identifier: MIT */
/*
 * Native loops that measure the full path: the very functions that users' calls go
 * through, called from C, so that no interpreter is in a figure that is not its own.
 *
 * They run on a CPU of the machine, in a task, and measure calls to other CPUs.  What
 * they are compared with is in limit.h.
 */
#ifndef SHI_BENCH_H
#define SHI_BENCH_H

#include "base/hist.h"
#include "base/machine.h"

/* Waiting calls to one CPU; or, with `count`, raises of a line of the chip. */
struct shi_bench_calls {
    uint32_t dst;
    uint32_t calls;       /* measured ones */
    uint32_t warmup;      /* before them */
    uint32_t batch;       /* > 0: calls between two looks at the clock; 0: clock each call */
    uint32_t gap_ns;      /* pause before each call, or each batch */
    uint32_t skip;        /* csds put aside meanwhile: another cache line travels */
    int state;            /* enum shi_state that dst must be in at each call, or -1 */
    bool park;            /* sleep for the completion at once; else spin for it */
    bool stamp;           /* the handler says when it was entered: fills one_way */
    uint32_t line;        /* raised in place of each call, */
    shi_a64 *count;       /* if its handler, `count`, adds 1 here: what the sender spins on */
    uint64_t deadline_ns; /* shi_now_ns() clock: give up */
    struct shi_hist *rtt; /* where batch is 0 */
    struct shi_hist *one_way;
    double *batches; /* ns per call of each batch: room for calls / batch */

    uint32_t nbatches;
    uint32_t missed;    /* calls for which dst was not in `state`: paused again */
    uint64_t preempted; /* times this CPU was pushed off its core */
    bool moved;         /* and whether it ended on another */
};

/* 0, -ETIMEDOUT, -ECANCELED (the machine stops), -EOWNERDEAD (dst died), or what
 * queueing a call says. */
int shi_bench_calls(struct shi_self *self, struct shi_bench_calls *b);

/* Pause for gap_ns, and on until `dst` is in `state` (-1: any).  How often it was not, or
 * -ETIMEDOUT, -ECANCELED, -ENXIO (`dst` is offline or dead). */
int64_t shi_bench_await(struct shi_self *self, uint32_t dst, int state, uint32_t gap_ns,
                        uint64_t deadline_ns);

/* `calls` calls of the native no-op that nobody waits for, then wait until dst's counter
 * `counter` is `until` and the last handler has returned.  Stamps of beginning and end. */
struct shi_bench_flood {
    uint32_t dst;
    uint32_t calls;
    uint64_t until;
    uint64_t deadline_ns;
    uint64_t from_stamp, to_stamp;
};
int shi_bench_flood(struct shi_self *self, struct shi_bench_flood *f);
int shi_bench_until(struct shi_self *self, uint32_t dst, enum shi_counter counter,
                    uint64_t until, uint64_t deadline_ns);

/* on_each_cpu(wait=1) of the native no-op, `calls` times; ns of each into `ns`. */
struct shi_bench_broadcast {
    uint32_t calls, warmup, gap_ns;
    int state; /* as above, of every other CPU */
    uint64_t deadline_ns;
    double *ns;
    double first_ns; /* of the first, which warms up or not: whose pages nobody has touched */
    uint32_t missed;
};
int shi_bench_broadcast(struct shi_self *self, struct shi_bench_broadcast *b);

#endif
