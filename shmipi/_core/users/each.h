/* SPDX-License-Identifier: MIT */
/* on_each_cpu_cond_mask() of a native handler, for the users that are C. */
#ifndef SHI_EACH_H
#define SHI_EACH_H

#include "smp/smp.h"

struct shi_each {
    int native; /* the handler's index in this process */
    const uint32_t
        *renumber;       /* of a guest: the machine's number of each of ours + 1, or NULL */
    const void *info;    /* SHI_INLINE bytes, which travel inside each csd */
    const shi_a64 *mask; /* a bit for each CPU; NULL: all */
    bool (*cond)(void *arg, uint32_t cpu); /* NULL: all of the mask */
    void (*local)(void *arg); /* here, if this CPU is in the mask; NULL: never here */
    void *arg;
    bool nowait;
    const struct shi_waiter *waiter; /* or NULL: nothing but C waits */
    void *waiter_arg;
};

/*
 * Send, run here, wait for all.  0; or -errno: of sending, and not all were sent to; -EINTR
 * and others of the wait, and not all have answered.  -ENOSYS: the machine that this guest is
 * attached to does not know the handler.  In task context, interrupts enabled.
 */
int shi_each_cpu_native(struct shi_self *self, const struct shi_each *each);

#endif
