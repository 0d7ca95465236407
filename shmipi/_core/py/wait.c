/* SPDX-License-Identifier: MIT */
/* Waiting for a call. */
#include "py/wait.h"

#include <errno.h>
#include <sched.h>

#include "smp/sched.h"
#include "py/entry.h"
#include "py/result.h"
#include "py/sched.h"
#include "py/signals.h"
#include "py/stall.h"

void shi_leave_behind(Machine *machine, uint32_t local)
{
    if (machine->self.left)
        return;
    shi_drop_early(machine, local);
    shi_enter(&machine->self);
    shi_csd_abandon(&machine->self, local);
    shi_leave(&machine->self);
}

/*
 * A CPU in a wait polls, and has run what a kick put off before: its sender may be the one
 * that is waited for.  Python that runs inside the wait (handlers of other signals, of
 * IPIs) may have left the CPU RUNNING, so this is asked again at every turn.
 */
void shi_wait_settle(Machine *machine)
{
    struct shi_self *self = &machine->self;
    if (self->host)
        return;
    self->inline_python = true;
    if (shi_masked(self))
        return;
    if (shi_word_state(shi_load_relaxed(&self->slot->word)) == SHI_RUNNING)
        shi_set_polling(self);
    if (shi_python_waits(self) || shi_softirqs_due(self)) {
        /* POLLING, so the kick handler puts off nothing more. */
        shi_fetch_and_full(&self->slot->word, ~SHI_W_ASKED);
        shi_run_deferred(machine);
    }
}

static void begin(void *machine)
{
    shi_wait_settle(machine);
}

static int turn(void *arg, uint32_t dst, int why)
{
    Machine *machine = arg;
    shi_wait_settle(machine);
    if (why == SHI_WAIT_PYTHON)
        shi_wait_python(machine);
    shi_signals_let_go(machine);
    if ((why == SHI_WAIT_SIGNAL ? PyErr_CheckSignals() : shi_signals_check(machine)) < 0 ||
        shi_task_interrupt(machine) < 0)
        return -EINTR;
    /* Such a handler has detached this guest, or forked: what this waits for, and the queue
     * that a CPU serves meanwhile, are another's. */
    if (machine->self.left)
        return -ESHUTDOWN;
    if (machine->self.host && shi_load_acquire(&shi_slot(&machine->m, dst)->starved))
        shi_read_early(machine, dst);
    return 0;
}

static void *let_go(void *machine)
{
    return shi_give_up(machine);
}

static void take_back(void *machine, void *gone)
{
    shi_take_back(machine, gone);
}

static void end(void *arg)
{
    Machine *machine = arg;
    if (!machine->self.host && !machine->self.left)
        shi_take_deferred(machine);
}

/* Python that may take long, in the middle of a wait: until it has ended the CPU is no poller,
 * who serves its queue by itself, but a task that is interrupted. */
static void as_running(struct shi_self *self)
{
    if (!self->host && self->in_task && !shi_masked(self))
        shi_set_running(self);
}

static int stalled(void *arg, const struct shi_stall *stall, uint32_t index, uint32_t dst)
{
    Machine *machine = arg;
    as_running(&machine->self);
    int err = shi_stalled(machine, stall, index, dst);
    if (!err && !machine->self.left)
        shi_wait_settle(machine);
    return err;
}

const struct shi_waiter shi_python_waiter = {
    .hold_ns = SHI_GIL_SPIN_NS,
    .begin = begin,
    .turn = turn,
    .let_go = let_go,
    .take_back = take_back,
    .end = end,
    .stalled = stalled,
    .unstuck = shi_unstuck,
};

/* wait_for_completion(): what is asked of this CPU meanwhile, who is waited for may wait for. */
static int work_turn(void *arg, uint32_t dst, int why)
{
    Machine *machine = arg;
    struct shi_self *self = &machine->self;
    int err = turn(arg, dst, why);
    if (err || !shi_work_due(self))
        return err;
    self->work_wait = false; /* theirs is another wait */
    self->inline_python = false;
    shi_irq_window(machine);
    shi_run_works(machine);
    if (self->left)
        return -ESHUTDOWN;
    self->work_wait = true;
    shi_wait_settle(machine);
    return 0;
}

static const struct shi_waiter work_waiter = {
    .hold_ns = SHI_GIL_SPIN_NS,
    .begin = begin,
    .turn = work_turn,
    .let_go = let_go,
    .take_back = take_back,
    .end = end,
    .stalled = stalled,
    .unstuck = shi_unstuck,
};

static int waited(Machine *machine, uint32_t local, uint32_t dst, int err)
{
    if (!err)
        return 0;
    shi_drop_early(machine, local);
    if (err != -EINTR)
        shi_raise_errno(machine, err, (int)dst);
    return -1;
}

int shi_wait_csd(Machine *machine, uint32_t local, uint32_t dst, uint64_t deadline_ns)
{
    return waited(
        machine, local, dst,
        shi_call_wait(&machine->self, local, dst, deadline_ns, &shi_python_waiter, machine));
}

int shi_wait_work(Machine *machine, uint32_t local, uint32_t dst)
{
    struct shi_self *self = &machine->self;
    bool outer = self->work_wait;
    self->work_wait = !self->host && !self->held && !machine->pickling;
    int err = shi_call_wait(self, local, dst, 0, &work_waiter, machine);
    self->work_wait = outer;
    return waited(machine, local, dst, err);
}

int shi_wait_for_room(Machine *machine)
{
    uint32_t dst = 0;
    int err = shi_call_room(&machine->self, &shi_python_waiter, machine, &dst);
    if (err && err != -EINTR)
        shi_raise_errno(machine, err, err == -EAGAIN ? -1 : (int)dst);
    return err ? -1 : 0;
}

#define TURN_SPINS 200u

int shi_wait_turn(Machine *machine, uint32_t turn)
{
    struct shi_self *self = &machine->self;
    if (turn % TURN_SPINS) {
        shi_cpu_relax();
        return 0;
    }
    if (!self->host && !shi_masked(self) &&
        (shi_word_work(shi_load_acquire(&self->slot->word)) || shi_python_waits(self)))
        shi_irq_window(machine);
    PyThreadState *mine = shi_give_up(machine);
    if (turn / TURN_SPINS < 20)
        sched_yield();
    else
        nanosleep(&(struct timespec){ 0, 50000 }, NULL);
    shi_take_back(machine, mine);
    if (PyErr_CheckSignals() < 0 || shi_task_interrupt(machine) < 0)
        return -1;
    if (shi_ended(self) || self->left) {
        shi_raise_errno(machine, self->left ? -ESHUTDOWN : -EOWNERDEAD, -1);
        return -1;
    }
    return 0;
}
