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
    uint64_t period_ns;   /* a schedule: call k is due k periods after the first, whatever
                           * became of those before; in place of gap_ns and `state` */
    uint64_t break_ns;    /* stop at the first call that takes longer, 0: at none */
    shi_a64 *fake;        /* no call: a fake target answers here (shi_bench_fake) */
    struct shi_hist *rtt; /* where batch is 0 */
    struct shi_hist *one_way;
    struct shi_hist *scheduled; /* with a period: from when each call was due, not sent */
    double *batches;            /* ns per call of each batch: room for calls / batch */

    uint32_t nbatches;
    uint32_t missed;    /* calls for which dst was not in `state`: paused again */
    uint64_t rung;      /* doorbells and kicks of the counted calls */
    uint64_t preempted; /* times this CPU was pushed off its core */
    bool moved;         /* and whether it ended on another */
    /* With `stamp`: the shortest ways there and back, by the clocks of both sides.  dst's
     * clock is ahead of this one's by at least -back_ns and at most there_ns. */
    int64_t there_ns, back_ns;
    bool broke; /* a call took longer than break_ns: which, and its stamps */
    uint32_t broke_at;
    uint64_t broke_from, broke_arrived, broke_to;
};

/* 0, -ETIMEDOUT, -ECANCELED (the machine stops), -EOWNERDEAD (dst died), or what
 * queueing a call says. */
int shi_bench_calls(struct shi_self *self, struct shi_bench_calls *b);

/* Be a fake target: answer so many times, each after so long.  `waited` is for how long it did
 * keep each one waiting: what the other side has to find. */
int shi_bench_fake(struct shi_self *self, shi_a64 *word, uint32_t calls, uint64_t delay_ns,
                   uint64_t deadline_ns, struct shi_hist *waited);

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

/* What a call costs where no IPI is sent: the no-op called as any function, or as a CPU
 * calls itself, with interrupts off.  Each is clocked. */
void shi_bench_local(struct shi_self *self, uint32_t calls, bool itself, struct shi_hist *took);

/* Calls of the native no-op until the time is over: to each of `dsts` in turn, or, `many`, to
 * all of them at once; waited for and clocked, or not.  All have run when it returns. */
struct shi_bench_storm {
    uint32_t *dsts;
    uint32_t ndsts;
    bool many, wait;
    uint32_t most;                  /* round trips, or turns, 0: no limit */
    uint64_t until_ns, deadline_ns; /* shi_now_ns() clock */
    struct shi_hist *rtt;
    uint64_t calls; /* a call to n CPUs at once counts n times */
};
int shi_bench_storm(struct shi_self *self, struct shi_bench_storm *s);

/* Work until so many ns are over: how many units were done. */
uint64_t shi_bench_work(uint64_t ns);

/* ns of `events` rounds of a loop, with a tracepoint in it or without. */
double shi_bench_trace(struct shi_self *self, uint32_t events, bool traced);

#endif
