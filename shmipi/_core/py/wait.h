/* SPDX-License-Identifier: MIT */
/* Waiting for a call. */
#ifndef SHI_PY_WAIT_H
#define SHI_PY_WAIT_H

#include "base/clock.h"
#include "py/base.h"

#define SHI_GIL_SPIN_NS 20000u /* the interpreter is never held for longer by a spin */

/* What Python does in a wait of the core; its `arg` is the Machine.  It ends a wait with
 * -EINTR: an exception is set. */
extern const struct shi_waiter shi_python_waiter;
/* Wait for csd `local`; serves the own queue.  0, or -1 with an exception (the csd is
 * left behind, safely). */
int shi_wait_csd(Machine *machine, uint32_t local, uint32_t dst, uint64_t deadline_ns);
/* The same in task context for another CPU's kworker: meanwhile others run here, too. */
int shi_wait_work(Machine *machine, uint32_t local, uint32_t dst);
/* A CPU in a wait polls, and has run the handlers that a kick put off. */
void shi_wait_settle(Machine *machine);
/* Every csd for wait=0 calls is in flight: wait for the oldest.  0, or -1. */
int shi_wait_for_room(Machine *machine);
/* One turn of a loop that looks whether others are ready, the `turn`th: others are served, and
 * after some the core is theirs.  0, or -1 with an exception. */
int shi_wait_turn(Machine *machine, uint32_t turn);

/* What such a loop gives another before it blames him. */
struct shi_allowance {
    uint64_t left_ns, seen_ns;
};
static inline struct shi_allowance shi_allow(uint64_t ns)
{
    return (struct shi_allowance){ ns, shi_now_ns() };
}
/* After a look that found him not ready.  A turn takes 50 us: where this process was not run
 * for longer (SIGSTOP, a busy machine), the other may have been in the same plight, or ready
 * long ago, so that time counts for little, and there is another look before the end. */
static inline bool shi_allowance_over(struct shi_allowance *p)
{
    uint64_t now = shi_now_ns(), took = now - p->seen_ns;
    p->seen_ns = now;
    if (took > 100000000)
        took = 100000000;
    if (took > p->left_ns)
        return true;
    p->left_ns -= took;
    return false;
}
void shi_leave_behind(Machine *machine, uint32_t local);

#endif
