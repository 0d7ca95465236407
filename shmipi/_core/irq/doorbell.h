/* SPDX-License-Identifier: MIT */
/* Waking a halted CPU: the doorbells of a machine, whichever they are (db.h). */
#ifndef SHI_DOORBELL_H
#define SHI_DOORBELL_H

#include "base/machine.h"
#include "irq/db.h"

/* By their numbers. */
extern const struct shi_doorbell_ops *const shi_doorbells[SHI_DB_COUNT];

static inline const struct shi_doorbell_ops *shi_doorbell_of(const struct shi_machine *m)
{
    return shi_doorbells[m->doorbell];
}

/* Open the doorbells of all CPUs in this process (they exist already): see db.h. */
int shi_doorbell_open(struct shi_machine *m, const char *prefix, const int *fds);
/* The same for a guest, which comes when there are no names any more: one descriptor for
 * each CPU, which stays the caller's. */
int shi_doorbell_adopt(struct shi_machine *m, const int *fds);
void shi_doorbell_close(struct shi_machine *m);

/* Ring the doorbell of a CPU whose word this caller has just turned to RUNG.  0, or -errno
 * when the signal that it is could not be queued. */
int shi_doorbell_ring(struct shi_self *self, uint32_t dst);
/* Sleep on the own doorbell while the word's low half is `low` (a HALTED value), or
 * until `timeout_ns` (< 0: for ever).  0 rung or a stale token, -EINTR, -ETIMEDOUT. */
int shi_doorbell_wait(struct shi_self *self, uint32_t low, int64_t timeout_ns);

#endif
