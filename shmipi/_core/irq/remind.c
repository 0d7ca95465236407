/* SPDX-License-Identifier: MIT */
#include "base/sys.h"

#include <errno.h>
#include <signal.h>
#include <string.h>
#include <time.h>

#include "irq/remind.h"

#define REMIND_NS 1000000u

/* musl and older glibc have the field, not the name (timer_create(2)). */
#ifndef sigev_notify_thread_id
#define sigev_notify_thread_id _sigev_un._tid
#endif

int shi_remind_open(struct shi_self *self)
{
    struct sigevent event;
    memset(&event, 0, sizeof event);
    /* The kick's own signal, told apart by its si_code: no other is taken from the user's
     * programs, and what blocks or replaces the kick is found out in one place. */
    event.sigev_notify = SIGEV_THREAD_ID;
    event.sigev_signo = (int)self->m->kick_signal;
    event.sigev_notify_thread_id = self->tid;
    event.sigev_value.sival_ptr =
        (void *)(uintptr_t)((uint64_t)self->m->cookie << 32 | self->id);
    if (timer_create(CLOCK_MONOTONIC, &event, &self->timer))
        return -errno;
    self->has_timer = true;
    return 0;
}

static void set(const struct shi_self *self, uint32_t ns)
{
    const struct itimerspec once = { .it_value = { .tv_nsec = ns } };
    timer_settime(self->timer, 0, &once, NULL);
}

void shi_remind(struct shi_self *self)
{
    /* Left as it is when it is set: kicks in a storm cost one system call per ms. */
    if (self->reminding || !self->has_timer)
        return;
    /* The flag first: a kick between the two finds a timer that is about to be set. */
    self->reminding = 1;
    shi_signal_fence();
    shi_store_relaxed(&self->slot->tick, 1);
    set(self, REMIND_NS);
}

/* Does anything wait that only the interpreter's look will take? */
static bool waits(const struct shi_self *self)
{
    if (self->nmi_waits && !self->in_nmi)
        return true;
    /* Polling or halted, the owner of that state looks.  With interrupts off, who lets them
     * in again takes what is there, and so does the end of an import. */
    if (self->irqs_off || shi_word_state(shi_load_relaxed(&self->slot->word)) != SHI_RUNNING)
        return false;
    if (shi_cancel_asked(self))
        return true;
    return !self->held && (shi_irqs_wait(self) || shi_stop_due(self) || self->down);
}

void shi_remind_expired(struct shi_self *self)
{
    self->reminding = 0;
    /* Full: before the look at what may have been left to this tick. */
    shi_xchg_full(&self->slot->tick, 0);
    if (!waits(self))
        return;
    shi_fetch_add_relaxed(&self->slot->counters[SHI_CTX_NMI][SHI_C_kicks_timed], 1);
    if (self->nmi_waits && !self->in_nmi && self->hooks.nmi)
        self->hooks.nmi(self);
    if (self->hooks.interrupt)
        self->hooks.interrupt(self);
    shi_remind(self);
}

void shi_remind_stop(struct shi_self *self)
{
    if (!self->reminding)
        return;
    set(self, 0);
    shi_signal_fence();
    shi_xchg_full(&self->slot->tick, 0);
    /* Last: an NMI in between has left it unset, and the idle loop is about to look. */
    self->reminding = 0;
}
