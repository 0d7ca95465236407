/* SPDX-License-Identifier: MIT */
/* csd_lock_wait_toolong() of a waiter that runs Python: shmipi/smp/csdlock.py says it. */
#ifndef SHI_PY_STALL_H
#define SHI_PY_STALL_H

#include "py/base.h"

/* Of struct shi_waiter.  -EINTR: an exception is set. */
int shi_stalled(void *machine, const struct shi_stall *stall, uint32_t index, uint32_t dst);
void shi_unstuck(void *machine, const struct shi_stall *stall, uint32_t index, uint32_t dst);

#endif
