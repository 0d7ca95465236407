/* SPDX-License-Identifier: MIT */
#include "base/sys.h"

#include <errno.h>
#include <fcntl.h>
#include <mqueue.h>
#include <poll.h>
#include <semaphore.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#include "base/event.h"
#include "irq/doorbell.h"
#include "irq/remind.h"
#include "irq/signal.h"

/* The low half of a slot's word (little-endian: sys.h insists). */
static shi_a32 *low_half(struct shi_slot *slot)
{
    return (shi_a32 *)(void *)&slot->word;
}

static struct timespec relative(int64_t ns)
{
    return (struct timespec){ .tv_sec = ns / 1000000000, .tv_nsec = ns % 1000000000 };
}

static struct timespec absolute(clockid_t clock, int64_t ns)
{
    struct timespec t;
    clock_gettime(clock, &t);
    int64_t sum = t.tv_nsec + ns;
    t.tv_sec += sum / 1000000000;
    t.tv_nsec = sum % 1000000000;
    return t;
}

int shi_doorbell_open(struct shi_machine *m, const char *prefix, const int *eventfds)
{
    char name[128];
    uint32_t i;
    int err = 0;
    switch (m->doorbell) {
    case SHI_DB_EVENTFD:
        m->eventfds = calloc(m->ncpus, sizeof *m->eventfds);
        if (!m->eventfds)
            return -ENOMEM;
        memcpy(m->eventfds, eventfds, m->ncpus * sizeof *eventfds);
        return 0;
    case SHI_DB_SEM:
        m->sems = calloc(m->ncpus, sizeof *m->sems);
        if (!m->sems)
            return -ENOMEM;
        for (i = 0; i < m->ncpus && !err; i++) {
            snprintf(name, sizeof name, "/%s.%u", prefix, i);
            sem_t *sem = sem_open(name, 0);
            if (sem == SEM_FAILED)
                err = -errno;
            else
                m->sems[i] = sem;
        }
        break;
    case SHI_DB_MQUEUE:
        m->mqueues = calloc(m->ncpus, sizeof *m->mqueues);
        if (!m->mqueues)
            return -ENOMEM;
        memset(m->mqueues, 0xff, m->ncpus * sizeof *m->mqueues);
        for (i = 0; i < m->ncpus && !err; i++) {
            snprintf(name, sizeof name, "/%s.%u", prefix, i);
            m->mqueues[i] = mq_open(name, O_RDWR | O_CLOEXEC);
            if (m->mqueues[i] < 0)
                err = -errno;
        }
        break;
    default:
        return 0;
    }
    if (err)
        shi_doorbell_close(m);
    return err;
}

/* A named semaphore of glibc is a file with a sem_t, shared by all who map it. */
static int adopt_sem(void **sem, int fd)
{
    struct stat status;
    if (fstat(fd, &status))
        return -errno;
    if (status.st_size != sizeof(sem_t)) /* beyond its end is a SIGBUS */
        return -EPROTO;
    void *at = mmap(NULL, sizeof(sem_t), PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    if (at == MAP_FAILED)
        return -errno;
    *sem = at;
    return 0;
}

int shi_doorbell_adopt(struct shi_machine *m, const int *fds)
{
    uint32_t i;
    int err = 0;
    m->adopted = true;
    switch (m->doorbell) {
    case SHI_DB_EVENTFD:
        return shi_doorbell_open(m, "", fds);
    case SHI_DB_SEM:
        m->sems = calloc(m->ncpus, sizeof *m->sems);
        if (!m->sems)
            return -ENOMEM;
        for (i = 0; i < m->ncpus && !err; i++)
            err = adopt_sem(&m->sems[i], fds[i]);
        break;
    case SHI_DB_MQUEUE: /* a queue's descriptor is a file's (mq_overview(7)) */
        m->mqueues = calloc(m->ncpus, sizeof *m->mqueues);
        if (!m->mqueues)
            return -ENOMEM;
        memcpy(m->mqueues, fds, m->ncpus * sizeof *fds);
        return 0;
    default:
        return 0;
    }
    if (err)
        shi_doorbell_close(m);
    return err;
}

void shi_doorbell_close(struct shi_machine *m)
{
    uint32_t i;
    for (i = 0; m->sems && i < m->ncpus; i++) {
        if (m->sems[i] && m->adopted)
            munmap(m->sems[i], sizeof(sem_t));
        else if (m->sems[i])
            sem_close(m->sems[i]);
    }
    for (i = 0; m->mqueues && i < m->ncpus; i++)
        if (m->mqueues[i] >= 0)
            mq_close(m->mqueues[i]);
    free(m->sems);
    free(m->mqueues);
    free(m->eventfds); /* the descriptors are their maker's */
    m->sems = NULL;
    m->mqueues = NULL;
    m->eventfds = NULL;
}

/*
 * A task has closed every descriptor, and so the doorbells of its machine: its CPU can
 * neither be woken nor wake another.  Its end is noticed at once, which no hang is.
 */
static void lost(const struct shi_self *self, int err)
{
    static const char text[] = "shmipi: a task closed the descriptors of its CPU's doorbells: "
                               "the CPU ends\n";
    if (err != EBADF || self->host)
        return;
    if (write(STDERR_FILENO, text, sizeof text - 1) < 0)
        _exit(2); /* closed, too */
    _exit(1);
}

int shi_doorbell_ring(struct shi_self *self, uint32_t dst)
{
    struct shi_machine *m = self->m;
    struct shi_slot *slot = shi_slot(m, dst);
    const uint64_t one = 1;
    const struct timespec past = { 0, 0 };
    shi_count(self, SHI_C_doorbells_sent);
    switch (m->doorbell) {
    case SHI_DB_FUTEX:
        shi_event_wake(low_half(slot));
        return 0;
    case SHI_DB_SEM:
        if (sem_post(m->sems[dst]))
            shi_count(self, SHI_C_doorbells_retried); /* EOVERFLOW: it is rung */
        return 0;
    case SHI_DB_EVENTFD:
        while (write(m->eventfds[dst], &one, sizeof one) < 0) {
            lost(self, errno);
            if (errno != EINTR)
                break;
        }
        return 0;
    case SHI_DB_MQUEUE:
        /* A full queue holds a token already: it will wake the target. */
        while (mq_timedsend(m->mqueues[dst], "", 0, 0, &past)) {
            if (errno == EINTR)
                continue;
            lost(self, errno);
            shi_count(self, SHI_C_doorbells_retried);
            break;
        }
        return 0;
    case SHI_DB_SIGNAL:
        return shi_kick_send(self, dst);
    }
    return 0;
}

static int wait_signal(struct shi_self *self, int64_t timeout_ns)
{
    sigset_t set;
    siginfo_t info;
    struct timespec t = relative(timeout_ns < 0 ? 0 : timeout_ns);
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

static int wait_rung(struct shi_self *self, uint32_t low, int64_t timeout_ns)
{
    struct shi_machine *m = self->m;
    struct timespec t;
    char message[8];
    uint64_t count;
    int err;
    switch (m->doorbell) {
    case SHI_DB_FUTEX:
        return shi_event_wait(low_half(self->slot), low, timeout_ns);
    case SHI_DB_SEM:
        if (timeout_ns < 0)
            return sem_wait(m->sems[self->id]) ? -errno : 0;
        t = absolute(CLOCK_REALTIME, timeout_ns);
        return sem_timedwait(m->sems[self->id], &t) ? -errno : 0;
    case SHI_DB_EVENTFD:
        if (timeout_ns >= 0) {
            struct pollfd p = { .fd = m->eventfds[self->id], .events = POLLIN };
            t = relative(timeout_ns);
            err = ppoll(&p, 1, &t, NULL);
            if (err <= 0)
                return err ? -errno : -ETIMEDOUT;
        }
        return read(m->eventfds[self->id], &count, sizeof count) < 0 ? -errno : 0;
    case SHI_DB_MQUEUE:
        if (timeout_ns < 0)
            return mq_receive(m->mqueues[self->id], message, sizeof message, NULL) < 0 ? -errno
                                                                                       : 0;
        t = absolute(CLOCK_REALTIME, timeout_ns);
        return mq_timedreceive(m->mqueues[self->id], message, sizeof message, NULL, &t) < 0
                   ? -errno
                   : 0;
    case SHI_DB_SIGNAL:
        return wait_signal(self, timeout_ns);
    }
    return -EINVAL;
}

int shi_doorbell_wait(struct shi_self *self, uint32_t low, int64_t timeout_ns)
{
    int err = wait_rung(self, low, timeout_ns);
    lost(self, -err);
    return err;
}
