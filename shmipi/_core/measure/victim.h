/* SPDX-License-Identifier: MIT */
/* What the kernel's own IPIs cost who is interrupted by them. */
#ifndef SHI_VICTIM_H
#define SHI_VICTIM_H

#include <stdint.h>

/* For `ns` a thread of this process works on `core`, while its caller, on another, makes a
 * private expedited membarrier() every period_ns (0: none), each of which interrupts that
 * core.  How many units of work were done (bench.h), how many calls were made, and for how long
 * the thread waited while others had its core. */
struct shi_victim {
    uint32_t core;
    uint64_t period_ns, ns;
    uint64_t units, calls, waited_ns;
};

/* 0, or -errno: what the system says to membarrier(), to the thread or to its core. */
int shi_membarrier_victim(struct shi_victim *v);

/* For how many ns this thread has been ready to run and has waited; 0 where the kernel does not
 * say. */
uint64_t shi_thread_waited(void);

#endif
