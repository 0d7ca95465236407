/* SPDX-License-Identifier: MIT */
#include "base/sys.h"

#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <linux/futex.h>
#include <mqueue.h>
#include <poll.h>
#include <sched.h>
#include <semaphore.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include "irq/doorbell.h"
#include "irq/irq.h"
#include "irq/nmi.h"
#include "smp/remind.h"

#define KICK_TRIES 200

static long futex(shi_a32 *word, int op, uint32_t value, const struct timespec *timeout)
{
    return syscall(SYS_futex, word, op, value, timeout, NULL, 0);
}

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
        futex(low_half(slot), FUTEX_WAKE, 1, NULL);
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

static bool of_this_machine(const struct shi_self *self, const siginfo_t *info)
{
    uint64_t value = (uint64_t)(uintptr_t)info->si_value.sival_ptr;
    return (uint32_t)(value >> 32) == self->m->cookie;
}

static bool own_timer(const struct shi_self *self, const siginfo_t *info)
{
    return info->si_code == SI_TIMER && of_this_machine(self, info);
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
    if (own_timer(self, &info)) {
        shi_remind_expired(self);
        return -EINTR; /* as its handler would have ended the wait */
    }
    if (info.si_code != SI_QUEUE || !of_this_machine(self, &info)) {
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
        t = relative(timeout_ns);
        err = (int)futex(low_half(self->slot), FUTEX_WAIT, low, timeout_ns < 0 ? NULL : &t);
        if (err == 0 || errno == EAGAIN)
            return 0;
        return -errno;
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

/* ---- the kick signal ------------------------------------------------------------- */

/* One CPU a process: read by the handler. */
static struct shi_self *volatile kick_self;

static int queue_signal(const struct shi_self *self, uint32_t sig, pid_t pid, pid_t tid,
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
        err = queue_signal(self, sig, pid, tid, self->id);
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

/* What it interrupts may be in the middle of counting. */
static void nmi(struct shi_self *self)
{
    shi_a64 *counts = self->counts;
    uint8_t ctx = self->ctx;
    self->counts = self->slot->counters[SHI_CTX_NMI];
    self->ctx = SHI_CTX_NMI;
    shi_nmi_entry(self);
    self->ctx = ctx;
    self->counts = counts;
}

static void on_kick(int sig, siginfo_t *info, void *context)
{
    int saved = errno;
    struct shi_self *self = kick_self;
    (void)context;
    if (!self)
        goto out; /* a child of a task is no CPU (forget, below) */
    if (own_timer(self, info)) {
        shi_remind_expired(self);
        goto out;
    }
    if (info->si_code != SI_QUEUE || !of_this_machine(self, info)) {
        shi_fetch_add_relaxed(&self->slot->counters[SHI_CTX_NMI][SHI_C_kicks_spurious], 1);
        goto out;
    }
    if (!pthread_equal(pthread_self(), self->thread)) {
        /* A process-directed signal took another thread: pass it to the CPU's own. */
        queue_signal(self, (uint32_t)sig, self->pid, self->tid,
                     (uint32_t)(uintptr_t)info->si_value.sival_ptr);
        goto out;
    }
    if ((uint32_t)sig == self->m->kick_signal)
        shi_irq_entry(self);
    else
        nmi(self);
out:
    errno = saved;
}

static int install(const struct shi_machine *m)
{
    struct sigaction action;
    memset(&action, 0, sizeof action);
    action.sa_sigaction = on_kick;
    /* No SA_RESTART: a task blocked in a system call must come back to the interpreter
     * so that a Python handler runs; Python itself then resumes the call (PEP 475). */
    action.sa_flags = SA_SIGINFO | SA_ONSTACK;
    sigemptyset(&action.sa_mask);
    if (sigaction((int)m->kick_signal, &action, NULL))
        return -errno;
    /* An NMI comes through everything; nothing comes through an NMI. */
    sigaddset(&action.sa_mask, (int)m->kick_signal);
    return sigaction((int)m->nmi_signal, &action, NULL) ? -errno : 0;
}

static void forget(void)
{
    kick_self = NULL;
}

int shi_kick_install(struct shi_self *self)
{
    static bool hooked;
    if (!hooked && pthread_atfork(NULL, NULL, forget))
        return -ENOMEM;
    hooked = true;
    kick_self = self;
    return install(self->m);
}

void shi_kick_remove(void)
{
    forget();
}

int shi_kick_check(struct shi_self *self)
{
    const int signals[] = { (int)self->m->kick_signal, (int)self->m->nmi_signal };
    struct sigaction now;
    sigset_t mask, ours;
    size_t i;
    int found = 0;
    sigemptyset(&ours);
    for (i = 0; i < sizeof signals / sizeof *signals; i++) {
        sigaddset(&ours, signals[i]);
        if (sigaction(signals[i], NULL, &now) == 0 &&
            (!(now.sa_flags & SA_SIGINFO) || now.sa_sigaction != on_kick))
            found = -EEXIST;
    }
    if (found)
        install(self->m);
    if (pthread_sigmask(SIG_UNBLOCK, &ours, &mask) == 0 &&
        (sigismember(&mask, signals[0]) || sigismember(&mask, signals[1])))
        found = found ? found : -EPERM;
    return found;
}

void shi_kick_block(const struct shi_self *self, bool block)
{
    sigset_t set;
    sigemptyset(&set);
    sigaddset(&set, (int)self->m->kick_signal);
    pthread_sigmask(block ? SIG_BLOCK : SIG_UNBLOCK, &set, NULL);
}

/* ---- the host's event count ------------------------------------------------------ */

void shi_event_wake(shi_a32 *event)
{
    futex(event, FUTEX_WAKE, INT_MAX, NULL);
}

void shi_event_ring(shi_a32 *event)
{
    shi_fetch_add_full(event, 1);
    shi_event_wake(event);
}

int shi_event_wait(shi_a32 *event, uint32_t seen, int64_t timeout_ns)
{
    struct timespec t = relative(timeout_ns < 0 ? 0 : timeout_ns);
    if (futex(event, FUTEX_WAIT, seen, timeout_ns < 0 ? NULL : &t) == 0 || errno == EAGAIN)
        return 0;
    return -errno;
}
