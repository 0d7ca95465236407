/* SPDX-License-Identifier: MIT */
/* The doorbell `signal`: the kick signal, which a halted CPU has blocked and waits for. */
#include "base/sys.h"

#include <errno.h>
#include <signal.h>
#include <sys/syscall.h>
#include <unistd.h>

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
        if ((uintptr_t)info.si_value.sival_ptr & SHI_TICK_SIGNAL)
            self->tick_armed = 0; /* it is set no longer: the next task sets it anew */
        else
            shi_remind_expired(self);
        return -EINTR; /* as its handler would have ended the wait */
    }
    if (info.si_code != SI_QUEUE || !shi_signal_ours(self, &info)) {
        shi_count(self, SHI_C_kicks_spurious);
        return -EINTR; /* not ours: look around and sleep again */
    }
    return 0;
}

static int raw_open(struct shi_raw *raw)
{
    const struct timespec now = { 0, 0 };
    sigset_t set;
    if (!raw->sleeper) /* signal 0: may we, and is it there? */
        return syscall(SYS_tgkill, raw->pid, raw->tid, 0) ? -errno : 0;
    sigemptyset(&set);
    sigaddset(&set, raw->signo);
    pthread_sigmask(SIG_BLOCK, &set, NULL);
    raw->blocked = true;
    while (sigtimedwait(&set, NULL, &now) > 0)
        ;
    return 0;
}

static int raw_ring(struct shi_raw *raw, uint32_t n)
{
    (void)n;
    return syscall(SYS_tgkill, raw->pid, raw->tid, raw->signo) ? -errno : 0;
}

static int raw_sleep(struct shi_raw *raw, uint32_t n)
{
    sigset_t set;
    siginfo_t info;
    (void)n;
    sigemptyset(&set);
    sigaddset(&set, raw->signo);
    do {
        if (sigwaitinfo(&set, &info) < 0)
            return -errno;
    } while (info.si_pid != raw->pid); /* from somebody else: not a ring */
    return 0;
}

static const struct shi_raw_ops raw_ops = {
    .name = "sigwait",
    .by_pid = true,
    .open = raw_open,
    .ring = raw_ring,
    .sleep = raw_sleep,
};

const struct shi_doorbell_ops shi_db_signal = {
    .name = "signal",
    .raw = &raw_ops,
    .by_signal = true,
    .ring = shi_kick_send,
    .wait = wait_rung,
};
