/* SPDX-License-Identifier: MIT */
/*
 * Wait queues (include/linux/wait.h) and completions (include/linux/completion.h) in shared
 * memory: who waits, in which order, and waking them.
 *
 * There are no links and no lock, so nobody's death can damage a queue: each slot has one
 * entry, and a bit that says where to look.
 */
#ifndef SHI_WAITQ_H
#define SHI_WAITQ_H

#include "base/machine.h"

struct shi_waitq {
    shi_a64 done;   /* of a completion */
    shi_a64 ticket; /* entries made so far: their order */
    /* A bit for each slot whose entry may be in use, then the entries. */
    shi_a64 words[];
};

#define SHI_WAKE_ALL UINT32_MAX
#define SHI_COMPLETED_ALL 0xffffffffull /* the kernel's UINT_MAX: complete_all() */

/* How many 64-bit words a queue of this machine takes, all 0 at first. */
uint64_t shi_waitq_words(const struct shi_machine *m);

/* prepare_to_wait, or prepare_to_wait_exclusive: stand in the queue, behind the others
 * unless entry `ticket` still stands (0: none).  The entry's ticket; look at the condition
 * after this. */
uint64_t shi_waitq_prepare(struct shi_self *self, struct shi_waitq *q, uint64_t ticket,
                           bool exclusive);
/* Does the entry stand yet?  A wake-up takes it away. */
bool shi_waitq_stands(const struct shi_self *self, const struct shi_waitq *q, uint64_t ticket);
/* finish_wait; `ticket` 0: whatever entry it has.  True: a wake-up had taken the entry, or
 * may have. */
bool shi_waitq_finish(struct shi_self *self, struct shi_waitq *q, uint64_t ticket);
/* wake_up_nr: everybody but exclusive waiters, and `nr` of those, who has waited longest
 * first.  How many were woken. */
uint32_t shi_waitq_wake(struct shi_self *self, struct shi_waitq *q, uint32_t nr);
/* waitqueue_active. */
bool shi_waitq_active(const struct shi_self *self, const struct shi_waitq *q);

/* complete, complete_all: count, then wake. */
void shi_complete(struct shi_self *self, struct shi_waitq *q, bool all);
/* try_wait_for_completion. */
bool shi_completion_take(struct shi_waitq *q);

#endif
