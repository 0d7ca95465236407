/* SPDX-License-Identifier: MIT */
#include "base/sys.h"

#include <errno.h>
#include <sched.h>
#include <signal.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "irq/signal.h"

#define KICK_TRIES 200

int shi_signal_queue(const struct shi_self *self, uint32_t sig, pid_t pid, pid_t tid,
                     uint32_t from)
{
    const struct shi_machine *m = self->m;
    siginfo_t info;
    memset(&info, 0, sizeof info);
    info.si_signo = (int)sig;
    info.si_code = SI_QUEUE;
    info.si_pid = self->pid;
    info.si_uid = getuid();
    info.si_value.sival_ptr = (void *)(uintptr_t)((uint64_t)m->cookie << 32 | from);
    return syscall(SYS_rt_tgsigqueueinfo, pid, tid, (int)sig, &info) ? -errno : 0;
}

static int signal_cpu(struct shi_self *self, uint32_t dst, uint32_t sig)
{
    struct shi_slot *slot = shi_slot(self->m, dst);
    pid_t pid = (pid_t)shi_load_relaxed(&slot->pid), tid = (pid_t)shi_load_relaxed(&slot->tid);
    /* The watchdog does not stand still for one: it comes again in 10 ms. */
    int tries = self->id == self->m->ncpus + 1 ? 1 : KICK_TRIES, err = -ESRCH;
    if (shi_load_relaxed(&self->m->header->machine_state) == SHI_M_DEAD || self->left)
        return err; /* nobody guards the pids of its CPUs any more */
    if (pid <= 0 || tid <= 0)
        return err; /* never a group, never everyone, whatever the segment says */
    while (tries--) {
        err = shi_signal_queue(self, sig, pid, tid, self->id);
        if (err != -EAGAIN)
            break;
        /* RLIMIT_SIGPENDING: signals of others of this user wait to be taken.  If it does
         * not clear, the watchdog goes on trying. */
        shi_count(self, SHI_C_kicks_retried);
        sched_yield();
    }
    return err;
}

int shi_kick_send(struct shi_self *self, uint32_t dst)
{
    int err = signal_cpu(self, dst, self->m->kick_signal);
    if (!err)
        shi_count(self, SHI_C_kicks_sent);
    else /* none is outstanding: who finds the queue empty tries again, and the watchdog */
        shi_fetch_and_full(&shi_slot(self->m, dst)->word, ~SHI_W_KICKED);
    return err;
}

int shi_nmi_signal(struct shi_self *self, uint32_t dst)
{
    /* One that cannot be queued stays pending: the watchdog signals again. */
    return signal_cpu(self, dst, self->m->nmi_signal);
}

void shi_firmware_look(const struct shi_self *self)
{
    const struct shi_header *h = self->m->header;
    pid_t pid = (pid_t)shi_load_relaxed(&h->firmware_pid);
    /* A CPU's parent is the firmware, or it has lost it and is about to end; the host
     * does not wait for its firmware before it has marked the machine dead. */
    if (shi_load_relaxed(&h->machine_state) == SHI_M_DEAD || pid <= 1 ||
        (!self->host && getppid() != pid))
        return;
    kill(pid, SIGCHLD); /* which it takes from a descriptor, to look for dead CPUs */
}

void shi_irq_end(struct shi_self *self, uint32_t dst)
{
    struct shi_slot *slot = shi_slot(self->m, dst);
    uint64_t w = shi_load_full(&slot->word);
    if (dst == self->id && !self->host)
        kill(getpid(), SIGKILL); /* its own pid, whatever the segment says */
    /* The firmware does it, whose child it is: a pid in here may be damaged, or another's
     * by now.  The generation says of which process we speak. */
    if (shi_word_state(w) != SHI_DEAD)
        shi_store_full(&slot->pic.init, shi_word_gen(w));
}

bool shi_signal_ours(const struct shi_self *self, const siginfo_t *info)
{
    uint64_t value = (uint64_t)(uintptr_t)info->si_value.sival_ptr;
    return (uint32_t)(value >> 32) == self->m->cookie;
}

bool shi_signal_timer(const struct shi_self *self, const siginfo_t *info)
{
    return info->si_code == SI_TIMER && shi_signal_ours(self, info);
}

void shi_kick_block(const struct shi_self *self, bool block)
{
    sigset_t set;
    sigemptyset(&set);
    sigaddset(&set, (int)self->m->kick_signal);
    pthread_sigmask(block ? SIG_BLOCK : SIG_UNBLOCK, &set, NULL);
}
