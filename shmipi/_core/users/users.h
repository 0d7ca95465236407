/* SPDX-License-Identifier: MIT */
/* What IPIs are for: the subsystems of the machine above its call-function layer. */
#ifndef SHI_USERS_H
#define SHI_USERS_H

#include "base/machine.h"

/* Their native handlers, by the same index in every process; more calls do nothing. */
void shi_users_init(void);
/* What their lines do: after shi_machine_attach. */
void shi_users_register(struct shi_machine *m);
/* The firmware's: a CPU has died, what was addressed to it is completed, and nobody runs there
 * yet.  What its users left half done is put right. */
void shi_users_died(struct shi_self *self, uint32_t cpu);
/* What they have of CPU hotplug's PREPARE section (linux/cpuhotplug.h): when a CPU is gone, what
 * was there goes to others.  `died`: it was killed, and what it was in the middle of is put right:
 * the firmware's; who takes CPUs down in order runs the others by smp/cpuhp.py. */
struct shi_users_state {
    uint32_t state; /* CPUHP_* */
    const char *name;
    void (*teardown)(struct shi_self *self, uint32_t cpu, bool died);
};
/* The `i`th, highest first; NULL: there are no more. */
const struct shi_users_state *shi_users_state(uint32_t i);
/* This CPU is online; `born`: as a new process, before anything else runs on it. */
void shi_users_online(struct shi_self *self, bool born);

#endif
