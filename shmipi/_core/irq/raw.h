/* SPDX-License-Identifier: MIT */
/*
 * A doorbell's system calls with nothing of the machine around them: its raw limit.  They
 * stand beside the doorbell that they are the limit of, in db_NAME.c, so that both do the
 * same.  measure/limit.c runs them between two processes.
 */
#ifndef SHI_RAW_H
#define SHI_RAW_H

#include <stdbool.h>
#include <stdint.h>
#include <sys/types.h>

#include "base/atomics.h"

#define SHI_RAW_OBJECT 64

/* One side of an exchange: the ringer's, or the sleeper's. */
struct shi_raw {
    bool sleeper;
    shi_a32 *word;    /* shared: the ringer stores the number of the ring, then rings */
    void *object;     /* shared: SHI_RAW_OBJECT bytes, aligned to 64 */
    const char *name; /* unused, "/x", the same on both sides */
    int fd;           /* the same object in both processes, or -1; `open` may get another */
    pid_t pid, tid;   /* of the other side */
    int signo;
    bool opened;  /* `fd` is to be closed */
    bool named;   /* what `name` stands for is to be unlinked */
    int back;     /* pipe_park: the way back, opened with `fd` */
    bool blocked; /* `signo` is, and may be pending: who restores the mask takes it out */
};

struct shi_raw_ops {
    const char *name;
    bool by_name; /* wants a name, where it is given no descriptor */
    bool by_pid;  /* wants the other side's pid and tid */
    /* Get ready: the ringer first, which makes what both use.  The sleeper throws away what
     * is left of an exchange before.  0 or -errno, with what is open marked in `raw`. */
    int (*open)(struct shi_raw *raw);
    /* Take the name away: the ringer, when both have it open; and at the end, if not yet. */
    void (*unlink)(struct shi_raw *raw);
    /* Ring for the n-th time; 0 or -errno. */
    int (*ring)(struct shi_raw *raw, uint32_t n);
    /* Sleep until rung for the n-th time, in exactly the system calls that a halted CPU
     * makes.  0, -EINTR (look around, come again) or another -errno. */
    int (*sleep)(struct shi_raw *raw, uint32_t n);
};

#endif
