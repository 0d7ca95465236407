/* SPDX-License-Identifier: MIT */
/* Waiting for a call. */
#ifndef SHI_PY_WAIT_H
#define SHI_PY_WAIT_H

#include "py/base.h"

#define SHI_GIL_SPIN_NS 20000u /* the interpreter is never held for longer by a spin */

/* What Python does in a wait of the core; its `arg` is the Machine.  It ends a wait with
 * -EINTR: an exception is set. */
extern const struct shi_waiter shi_python_waiter;
/* Wait for csd `local`; serves the own queue.  0, or -1 with an exception (the csd is
 * left behind, safely). */
int shi_wait_csd(Machine *machine, uint32_t local, uint32_t dst, uint64_t deadline_ns);
/* A CPU in a wait polls, and has run the handlers that a kick put off. */
void shi_wait_settle(Machine *machine);
/* Every csd for wait=0 calls is in flight: wait for the oldest.  0, or -1. */
int shi_wait_for_room(Machine *machine);
void shi_leave_behind(Machine *machine, uint32_t local);

#endif
