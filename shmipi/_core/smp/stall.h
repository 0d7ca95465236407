/* SPDX-License-Identifier: MIT */
/*
 * csd lock debugging (CONFIG_CSD_LOCK_WAIT_DEBUG of kernel/smp.c): whether a wait is to be
 * complained of, and how many are.  What is said, and to whom, is the waiter's.
 */
#ifndef SHI_STALL_H
#define SHI_STALL_H

#include "base/machine.h"

/* Has the csd been waited for longer than csd_lock_timeout, with its back-off, since the last
 * message?  Then the one that is due is counted, and the caller gives it. */
bool shi_stall_due(struct shi_self *self, struct shi_stall *stall, const struct shi_csd *csd);
/* The wait is over, whatever ended it. */
void shi_stall_over(struct shi_self *self, const struct shi_stall *stall);
/* csd_lock_is_stuck(): is there a wait that was complained of? */
bool shi_stall_any(const struct shi_machine *m);
/* dump_cpu_task() of this CPU is the caller's to do: once each time that it takes its queue. */
bool shi_stall_may_dump(struct shi_self *self, uint32_t cpu);
/* Send the IPI again, to a CPU that executes nothing. */
void shi_stall_resend(struct shi_self *self, uint32_t cpu);
/* WARN_ON(!(flags & CSD_FLAG_LOCK)) of csd_unlock.  Async-signal-safe. */
void shi_stall_double_unlock(struct shi_self *self, uint32_t index);

#endif
