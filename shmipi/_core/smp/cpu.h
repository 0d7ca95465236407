/* SPDX-License-Identifier: MIT */
/*
 * Becoming part of a machine: a process attaches, takes a slot, goes online and offline.
 */
#ifndef SHI_CPU_H
#define SHI_CPU_H

#include "base/machine.h"

/* Check a mapped header against `mapped` bytes; -EINVAL, or -EPROTO for another ABI. */
int shi_machine_attach(struct shi_machine *m, void *base, uint64_t mapped, int fd);

/* Become slot `id`.  `gen` is 0 for the host and the firmware. */
int shi_self_init(struct shi_self *self, struct shi_machine *m, uint32_t id);
void shi_self_fini(struct shi_self *self);
/* CPU: take the slot (pid, start time, thread) and go online, polling. */
int shi_self_online(struct shi_self *self);

/* __cpu_disable and smpcfd_dying_cpu: run what is queued, and be offline.  With interrupts off
 * everywhere.  -EBUSY when Python has to run first, -EAGAIN when results wait for room. */
int shi_cpu_disable(struct shi_self *self);
/* Offline: sleep until asked back.  -ECANCELED when the machine stops. */
int shi_cpu_play_dead(struct shi_self *self);

/* Give the own slot up, for another to have: what this process still writes to it goes to
 * private memory from here on.  The caller is the only thread in the core.  0 or -errno. */
int shi_self_leave(struct shi_self *self);

#endif
