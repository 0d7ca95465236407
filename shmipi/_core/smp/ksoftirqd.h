/* SPDX-License-Identifier: MIT */
/*
 * ksoftirqd/N: the kernel thread of CPU N that runs what handle_softirqs leaves, and what a
 * task raises.  It waits on the run queue among others, so softirqs that never end and tasks
 * take turns.  Made when it is first woken: most CPUs never need it.
 */
#ifndef SHI_KSOFTIRQD_H
#define SHI_KSOFTIRQD_H

#include "base/machine.h"

/* The step of these threads, for every process alike. */
void shi_ksoftirqd_init(void);
/* What smp/softirq.c, which is below, calls of it. */
void shi_ksoftirqd_register(struct shi_machine *m);

#endif
