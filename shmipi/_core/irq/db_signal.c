/* SPDX-License-Identifier: MIT */
/* The doorbell `signal`: the kick signal, which a halted CPU has blocked and waits for. */
#include "base/sys.h"

#include <errno.h>
#include <signal.h>

#include "irq/db.h"
#include "irq/remind.h"
#include "irq/signal.h"

static int wait_rung(struct shi_self *self, uint32_t low, int64_t timeout_ns)
{
    sigset_t set;
    siginfo_t info;
    struct timespec t = shi_db_relative(timeout_ns < 0 ? 0 : timeout_ns);
    (void)low;
    sigemptyset(&set);
    sigaddset(&set, (int)self->m->kick_signal);
    int sig = timeout_ns < 0 ? sigwaitinfo(&set, &info) : sigtimedwait(&set, &info, &t);
    if (sig < 0)
        return errno == EAGAIN ? -ETIMEDOUT : -errno;
    if (shi_signal_timer(self, &info)) {
        shi_remind_expired(self);
        return -EINTR; /* as its handler would have ended the wait */
    }
    if (info.si_code != SI_QUEUE || !shi_signal_ours(self, &info)) {
        shi_count(self, SHI_C_kicks_spurious);
        return -EINTR; /* not ours: look around and sleep again */
    }
    return 0;
}

const struct shi_doorbell_ops shi_db_signal = {
    .name = "signal",
    .by_signal = true,
    .ring = shi_kick_send,
    .wait = wait_rung,
};
