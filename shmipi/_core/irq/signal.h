/* SPDX-License-Identifier: MIT */
/*
 * Signals between the processes of a machine: the kick, the NMI, and what the firmware is
 * told.  Each names its machine and sender, so that others' are told apart.
 */
#ifndef SHI_SIGNAL_H
#define SHI_SIGNAL_H

#include "base/machine.h"

#include <signal.h>

/* Send the kick signal to a CPU that this caller's hazard protects (ring.c).  0 or -errno. */
int shi_kick_send(struct shi_self *self, uint32_t dst);
/* Send the NMI signal to a CPU that this caller's hazard protects. */
int shi_nmi_signal(struct shi_self *self, uint32_t dst);
/* Have the firmware look after dead CPUs now. */
void shi_firmware_look(const struct shi_self *self);
/* INIT: have `dst`'s process ended, unless it has. */
void shi_irq_end(struct shi_self *self, uint32_t dst);
/* Queue `sig` for one thread, as if slot `from` had sent it.  0 or -errno. */
int shi_signal_queue(const struct shi_self *self, uint32_t sig, pid_t pid, pid_t tid,
                     uint32_t from);

/* In the value of a timer's signal: it is the CPU's own timer (users/tick.c), and not the
 * reminder (remind.h). */
#define SHI_TICK_SIGNAL 0x80000000ull

/* Does what came name this machine?  Is it one of its own timers'? */
bool shi_signal_ours(const struct shi_self *self, const siginfo_t *info);
bool shi_signal_timer(const struct shi_self *self, const siginfo_t *info);
/* Block or unblock the kick signal in this thread. */
void shi_kick_block(const struct shi_self *self, bool block);

#endif
