/* SPDX-License-Identifier: MIT */
/* Waiting for a call. */
#include "py/wait.h"

#include "base/clock.h"
#include "base/trace.h"
#include "smp/watch.h"
#include "py/entry.h"
#include "py/result.h"
#include "py/signals.h"

void shi_give_back(Machine *machine, uint32_t local)
{
    shi_enter(&machine->self);
    shi_csd_put(&machine->self, local);
    shi_leave(&machine->self);
}

void shi_leave_behind(Machine *machine, uint32_t local)
{
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
    if (shi_python_waits(self)) {
        /* POLLING, so the kick handler puts off nothing more. */
        shi_fetch_and_full(&self->slot->word, ~SHI_W_ASKED);
        shi_run_deferred(machine);
    }
}

int shi_wait_unlocked(Machine *machine, uint32_t index, uint32_t dst, uint64_t deadline_ns)
{
    struct shi_self *self = &machine->self;
    struct shi_wait wait;
    bool inlined = self->inline_python;
    shi_wait_begin(self, &wait, index, dst, deadline_ns);
    shi_wait_settle(machine);
    uint64_t budget = shi_wait_budget(self, dst);
    int rc = shi_wait_spin(self, &wait, budget < SHI_GIL_SPIN_NS ? budget : SHI_GIL_SPIN_NS);
    bool spun = budget <= SHI_GIL_SPIN_NS;
    while (rc > 0) {
        shi_wait_settle(machine);
        if (rc == SHI_WAIT_PYTHON)
            shi_wait_python(machine);
        if ((rc == SHI_WAIT_SIGNAL ? PyErr_CheckSignals() : shi_signals_check(machine)) < 0 ||
            shi_task_interrupt(machine) < 0) {
            rc = -EINTR;
            break;
        }
        if (self->host && shi_load_acquire(&shi_slot(self->m, dst)->starved))
            shi_read_early(machine, dst);
        PyThreadState *mine = shi_give_up(machine);
        rc = spun ? shi_wait_sleep(self, &wait)
                  : shi_wait_spin(self, &wait, budget - SHI_GIL_SPIN_NS);
        spun = true;
        shi_take_back(machine, mine);
    }
    self->inline_python = inlined;
    shi_wait_end(self, &wait);
    if (!self->host)
        shi_take_deferred(machine);
    return rc;
}

int shi_wait_csd(Machine *machine, uint32_t local, uint32_t dst, uint64_t deadline_ns)
{
    int err =
        shi_wait_unlocked(machine, shi_own_index(&machine->self, local), dst, deadline_ns);
    SHI_TRACE(&machine->self, call_end, dst, shi_own_index(&machine->self, local) + 1, 0,
              (uint32_t)-err);
    if (!err)
        return 0;
    shi_leave_behind(machine, local);
    if (err != -EINTR)
        shi_raise_errno(machine, err, (int)dst);
    return -1;
}

#define ROOM_LOOK_NS 1000000u
#define ROOM_LOOKS 16u

/* Every csd for wait=0 calls is in flight: wait for the oldest.  0: look again, or -1. */
int shi_wait_for_room(Machine *machine)
{
    shi_enter(&machine->self);
    uint32_t oldest = shi_csd_oldest(&machine->self);
    shi_leave(&machine->self);
    if (oldest == UINT32_MAX) {
        /* All belong to futures, tasks and CallSingleData: only their owners free them. */
        shi_raise_errno(machine, -EAGAIN, -1);
        return -1;
    }
    uint64_t lock = shi_load_relaxed(&shi_own_csd(&machine->self, oldest)->lock);
    uint32_t dst = (uint16_t)(lock >> SHI_CSD_DST_SHIFT);
    if (dst >= machine->m.ncpus) {
        shi_enter(&machine->self);
        shi_csd_collect(&machine->self); /* damaged: dropped there */
        shi_leave(&machine->self);
        return 0;
    }
    /* Not for long: its target may be stopped, and others have ended since. */
    int err = shi_wait_unlocked(machine, shi_own_index(&machine->self, oldest), dst,
                                shi_now_ns() + ROOM_LOOK_NS);
    if (err == -ETIMEDOUT) {
        if (++machine->room_looks % ROOM_LOOKS == 0) {
            /* Each look is too short to notice that a ring was lost: ring again. */
            shi_enter(&machine->self);
            shi_watch_ring(&machine->self, dst);
            shi_leave(&machine->self);
        }
        return 0;
    }
    machine->room_looks = 0;
    if (err == -EBADMSG)
        return 0; /* damaged: collected as such */
    if (err && err != -EINTR)
        shi_raise_errno(machine, err, (int)dst);
    return err ? -1 : 0;
}
