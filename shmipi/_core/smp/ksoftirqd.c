/* SPDX-License-Identifier: MIT */
#include "base/sys.h"

#include <stdio.h>

#include "smp/entry.h"
#include "smp/ksoftirqd.h"
#include "smp/sched.h"
#include "smp/softirq.h"

static int stepper = -1;

/* run_ksoftirqd, once round smpboot_thread_fn's loop.  It looks after it has set its state:
 * raised in between, a softirq finds it asleep and wakes it. */
static enum shi_ran run_ksoftirqd(struct shi_self *self, uint64_t id, uint64_t arg)
{
    (void)arg;
    shi_set_current_state(self, id, SHI_TASK_INTERRUPTIBLE);
    if (!shi_load_relaxed(&self->softirqs)) /* ksoftirqd_should_run */
        return SHI_RAN_SLEEP;
    shi_set_current_state(self, id, SHI_TASK_RUNNING);
    shi_do_softirq(self, self->step_python);
    return SHI_RAN_RUNNING; /* cond_resched() */
}

static bool wants_python(const struct shi_self *self)
{
    return shi_softirq_wants_python(self);
}

/* The thread of this CPU, 0: there is no room for one. */
static uint64_t ksoftirqd(struct shi_self *self)
{
    shi_a64 *place = &shi_rq(self->m, self->id)->ksoftirqd;
    uint64_t id = shi_load_relaxed(place), w;
    char comm[SHI_COMM];
    if (id && shi_task_find(self->m, id, &w))
        return id;
    snprintf(comm, sizeof comm, "ksoftirqd/%u", self->id);
    int64_t made = shi_kthread_create(self, comm, stepper, 0, (int)self->id, 0);
    if (made <= 0)
        return 0;
    shi_store_relaxed(place, (uint64_t)made); /* this CPU's alone */
    return (uint64_t)made;
}

static void wake(struct shi_self *self)
{
    uint64_t id = ksoftirqd(self);
    if (id)
        shi_wake_up_process(self, id);
}

void shi_ksoftirqd_init(void)
{
    if (stepper < 0)
        stepper = shi_stepper_register_mixed("ksoftirqd", run_ksoftirqd, wants_python);
}

void shi_ksoftirqd_register(struct shi_machine *m)
{
    m->wake_softirqd = wake;
}
