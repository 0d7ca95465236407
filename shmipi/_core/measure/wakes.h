/* SPDX-License-Identifier: MIT */
/*
 * Wake-ups of native tasks of the scheduler: by who looks at a clock before it, and after the
 * task's step has begun on the other CPU; and of two tasks by each other, in turns.
 */
#ifndef SHI_WAKES_H
#define SHI_WAKES_H

#include "base/hist.h"
#include "base/machine.h"

/* What two players share, in an array of the machine: whose turn it is, ... */
struct shi_game {
    shi_a64 turn, left; /* ... how many more there are, */
    shi_a64 task[2];    /* the players, and when the first began and the last ended */
    shi_a64 began_ns, ended_ns;
};

enum shi_bench_task { SHI_BENCH_SLEEPER, SHI_BENCH_PLAYER };

/* Once in each process, before the first fork. */
void shi_wakes_register(void);
/*
 * A task of that kind bound to `cpu`, its id: NEW, or -errno.  `at`: offset of the 64-bit word
 * in which a sleeper counts its steps, or of a player's game.  -EINVAL: not of an array.
 */
int64_t shi_bench_task(struct shi_self *self, enum shi_bench_task kind, uint32_t cpu,
                       uint64_t at);

struct shi_bench_wakes {
    uint64_t task; /* a sleeper, on */
    uint32_t dst;
    uint64_t at; /* its word */
    uint32_t calls, warmup, gap_ns;
    int state; /* enum shi_state that dst must be in, or -1 */
    uint64_t deadline_ns;
    struct shi_hist *took;
};

/* try_to_wake_up() of a task that sleeps, until its step runs: ns of each.  0, -ETIMEDOUT,
 * -ECANCELED (the machine stops), -ENXIO (dst is offline or dead), -ESRCH (the task ended). */
int shi_bench_wakes(struct shi_self *self, struct shi_bench_wakes *b);

#endif
