/* SPDX-License-Identifier: MIT */
/* Tasks of the scheduler where Python runs. */
#ifndef SHI_PY_SCHED_H
#define SHI_PY_SCHED_H

#include "py/base.h"

/* The core's hook: a step of Python task `id`.  Holds the interpreter. */
int shi_python_step(struct shi_self *self, uint64_t id);
/* The machine is closed: what has begun in this process never goes on. */
void shi_begun_clear(Machine *machine);
/* preempt_schedule, cond_resched: let those run that wait, for a slice each.  In a task, with
 * the interpreter; nothing where it may not be preempted. */
void shi_let_others_run(Machine *machine);
/* The same for who waits for a kworker: those that it waits for may wait for them. */
void shi_run_works(Machine *machine);
/* preempt_schedule: not while it has its turn. */
void shi_preempt_python(Machine *machine);
/* The same if somebody asked for it. */
static inline void shi_preempt_check(Machine *machine)
{
    if (__builtin_expect(
            (shi_load_relaxed(&machine->self.slot->word) & SHI_W_NEED_RESCHED) != 0, 0))
        shi_preempt_python(machine);
}

#endif
