/* SPDX-License-Identifier: MIT */
/*
 * kernel/softirq.c: what a handler leaves for later, and is done with interrupts on.
 *
 * Raised by a handler, a softirq runs when the outermost interrupt has ended: lowest number
 * first, never on top of another of its CPU, and again for what was raised meanwhile, up to
 * ten times or 2 ms; the rest is ksoftirqd's.  Where it was held off (local_bh_disable), the
 * last local_bh_enable runs it.  Who raises one in a task wakes ksoftirqd, unless softirqs are
 * held off there.
 *
 * Native actions run where the interrupt has come, in its signal's handler; Python's at the
 * next bytecode boundary, or at once in the idle loop.  Order is kept within each kind.
 */
#ifndef SHI_SOFTIRQ_H
#define SHI_SOFTIRQ_H

#include "base/machine.h"

typedef void shi_softirq_action(struct shi_self *self);

/* The action of `nr` on every CPU: called before CPUs are forked (shi_users_init).  0, -EINVAL,
 * or -EBUSY when it has another. */
int shi_open_softirq(uint32_t nr, shi_softirq_action *action);
/* Is its action the core's own?  Then no other may be given. */
bool shi_softirq_is_native(uint32_t nr);

/* raise_softirq(): on this CPU, in a task, a handler or a softirq; not in an NMI. */
void shi_raise_softirq(struct shi_self *self, uint32_t nr);
/* __raise_softirq_irqoff(): the bit alone, for whom it is run anyway. */
void shi_raise_softirq_only(struct shi_self *self, uint32_t nr);

/* Until shi_local_bh_enable (entry.h) no softirq runs here.  They nest. */
static inline void shi_local_bh_disable(struct shi_self *self)
{
    self->softirq += SHI_SOFTIRQ_DISABLE;
    shi_signal_fence();
}

/* Does the core's own action of `nr` call a function of Python's, and how: in that action, as
 * often as it likes, not in a core section (self->hooks.softirq). */
bool shi_softirq_calls(const struct shi_self *self, uint32_t nr);

/* Are all that are pending here Python's? */
bool shi_softirq_wants_python(const struct shi_self *self);

/* handle_softirqs(): for shi_do_softirq alone, which sees to what they may and may not. */
void shi_softirq_handle(struct shi_self *self, bool python);

/* How often `cpu` has run it: kstat_softirqs_cpu(). */
uint64_t shi_softirq_count(const struct shi_machine *m, uint32_t cpu, uint32_t nr);

extern const char *const shi_softirq_names[SHI_NR_SOFTIRQS];

#endif
