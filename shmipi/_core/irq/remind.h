/* SPDX-License-Identifier: MIT */
/*
 * Asking the interpreter again.
 *
 * The kick's handler can only ask for a Python handler: the interpreter looks at its next
 * bytecode.  A task that is past its last look and on its way into a system call sleeps
 * with the request standing, and nobody rings again, because the kick was taken.  So a
 * CPU that has asked has a timer of its own thread set: while what was asked for waits, it
 * interrupts the task again every millisecond, whoever sent the kick and whether or not
 * anybody waits for it.
 */
#ifndef SHI_REMIND_H
#define SHI_REMIND_H

#include "base/machine.h"

/* Make the timer, in the CPU's own process and thread.  -errno (-EAGAIN:
 * RLIMIT_SIGPENDING counts it). */
int shi_remind_open(struct shi_self *self);
/* The interpreter was asked: see to it that it looks.  Async-signal-safe. */
void shi_remind(struct shi_self *self);
/* The timer's signal was taken.  Async-signal-safe. */
void shi_remind_expired(struct shi_self *self);
/* Before a halt, where nothing waits unseen: it is not to be interrupted. */
void shi_remind_stop(struct shi_self *self);

#endif
