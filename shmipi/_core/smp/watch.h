/* SPDX-License-Identifier: MIT */
/*
 * The watchdog: rings that died with their ringer are made good, whoever waits.
 *
 * A sender can be stopped or killed between its push and its ring, and a kick can find the
 * signal queue full: then the target has work, everybody after that sender trusts that it
 * was rung, and a call without a waiter is never run.  So the firmware looks at the CPUs'
 * words every 10 ms, and rings where it has found the same trouble twice and nothing that
 * the CPU has done in between.
 */
#ifndef SHI_WATCH_H
#define SHI_WATCH_H

#include "base/machine.h"

#define SHI_WATCH_NS 10000000u
#define SHI_WATCH_CPUS 512u /* looked at each time: a line pair of each, 50 us at most */

struct shi_watch; /* what was seen at the last look, in the firmware's memory */

/* NULL: no memory. */
struct shi_watch *shi_watch_new(const struct shi_machine *m);
/* One look, at SHI_WATCH_CPUS CPUs in turn.  True: the firmware is asked to end one (INIT)
 * or to start one (STARTUP). */
bool shi_watch_look(struct shi_self *self, struct shi_watch *watch);

/*
 * Who waits for `dst` has seen no progress for a while: shi_irq_rering, for when the watchdog
 * is stopped itself.  Of all who wait, and of all who give up and wait anew, ever fewer ring
 * until `dst` does something: a stopped CPU has each signal queued.
 */
int shi_watch_ring(struct shi_self *self, uint32_t dst);

/* A number that moves whenever the owner of `slot` has taken something that was sent. */
uint64_t shi_watch_progress(const struct shi_slot *slot);

#endif
