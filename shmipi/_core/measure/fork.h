/* SPDX-License-Identifier: MIT */
/* The limit of a boot: as many forks of the same process, that do nothing. */
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

#endif
