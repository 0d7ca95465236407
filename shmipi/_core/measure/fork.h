/* SPDX-License-Identifier: MIT */
/* Limits that are plain processes: of a boot, forks that do nothing; of a broadcast, wake-ups. */
#ifndef SHI_FORK_H
#define SHI_FORK_H

#include <stdint.h>

struct shi_forks {
    uint64_t fork_ns; /* from the first fork until every child has run and said so */
    uint64_t exit_ns; /* from telling them to end until the last was waited for */
};

/* Fork this process, which has one thread, `n` times, each child pinned to one of `cores` in
 * turn.  0, or -errno: of the fork that was refused, or -ECHILD for a child that died. */
int shi_forks(uint32_t n, const uint32_t *cores, uint32_t ncores, struct shi_forks *found);

/* `rounds` times: `n` children of this process, each pinned to its core, sleep on a futex of
 * their own, are woken one after the other, and have all answered.  ns of each round, and how
 * often the children were switched away from, in all, with one round that is not counted. */
struct shi_wakes {
    uint32_t rounds;
    uint64_t gap_ns; /* before each round, asleep: until all of them sleep */
    double *ns;      /* room for `rounds` */
    uint64_t switches;
};

/* As shi_forks. */
int shi_wakes(uint32_t n, const uint32_t *cores, struct shi_wakes *w);

#endif
