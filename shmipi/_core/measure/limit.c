/* SPDX-License-Identifier: MIT */
/* Raw round trips between two processes: see limit.h for what is measured. */
#include "measure/limit.h"

#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <linux/futex.h>
#include <linux/membarrier.h>
#include <mqueue.h>
#include <poll.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include "base/clock.h"
#include "irq/doorbell.h"

#ifndef sigev_notify_thread_id
#define sigev_notify_thread_id _sigev_un._tid
#endif

/* Phases in area->ping and area->pong; larger ones are failures. */
#define PHASE_READY 1u
#define PHASE_DONE 2u
#define PHASE_FAILED 0x80000000u

/* Polls between two looks at clock and peer: tens of microseconds, so that a round trip
 * between two spinning sides never contains one. */
#define POLLS_PER_LOOK 65536u

#define WATCH_PERIOD_NS 20000000
#define CORES_MAX 65536

static const char *const kind_names[SHI_LIMIT_BELLS] = {
    [SHI_LIMIT_FLOOR] = "floor",           [SHI_LIMIT_MAILBOX] = "mailbox",
    [SHI_LIMIT_QUEUE] = "queue",           [SHI_LIMIT_CACHELINE] = "cacheline",
    [SHI_LIMIT_FUTEX_PARK] = "futex_park", [SHI_LIMIT_SIGNAL] = "signal",
    [SHI_LIMIT_MEMBARRIER] = "membarrier", [SHI_LIMIT_MPROTECT] = "mprotect",
    [SHI_LIMIT_MPROTECT64] = "mprotect64", [SHI_LIMIT_PIPE_PARK] = "pipe_park",
};

/* One role in one process. */
struct run {
    struct shi_limit_area *area;
    const struct shi_limit_params *p;
    shi_a64 *mine;
    shi_a64 *theirs;
    uint64_t deadline;
    uint32_t work, backoff[SHI_LIMIT_BACKOFFS]; /* rounds of spend() */
    struct shi_raw raw;
    char *pages; /* mprotect: those whose rights change */
    size_t page_bytes;
    const struct shi_raw_ops *ops; /* what rings, and what wakes; NULL for none */
    int watching;
    int signo_changed;
    int mask_changed;
    int timer;
    struct sigaction old_watch;
    struct sigaction old_signo;
    sigset_t old_mask;
};

/* Signal handlers are the process's: one role at a time may install them. */
static shi_a32 handlers_taken;

/* Set by the deadline timer, for the loop that makes no system call. */
static shi_a32 watch_fired;

/* What the handler of the `signal` kind works on. */
static struct {
    struct shi_limit_area *area;
    int32_t sender;
    uint32_t stamp;
    shi_a32 count;
    shi_a32 active;
} on_signal;

/* ---- Small things ---------------------------------------------------------------- */

static long futex(shi_a32 *word, int op, uint32_t value, const struct timespec *when)
{
    return syscall(SYS_futex, word, op, value, when, NULL, FUTEX_BITSET_MATCH_ANY);
}

static struct timespec to_timespec(uint64_t ns)
{
    struct timespec ts = { .tv_sec = (time_t)(ns / 1000000000u),
                           .tv_nsec = (long)(ns % 1000000000u) };

    return ts;
}

static int sleeps(uint32_t kind)
{
    return kind >= SHI_LIMIT_PIPE_PARK || kind == SHI_LIMIT_FUTEX_PARK;
}

/* A thread of ping is busy on the other core, and pong has no part. */
static int has_busy(uint32_t kind)
{
    return kind >= SHI_LIMIT_MEMBARRIER && kind <= SHI_LIMIT_MPROTECT64;
}

/* ---- Two pipes: what `perf bench sched pipe` does --------------------------------- */

/* Two named ones, which lie in /dev/shm until both sides have them open. */
static void park_path(const struct shi_raw *raw, bool back, char *path, size_t size)
{
    snprintf(path, size, "/dev/shm%s%s", raw->name, back ? ".back" : "");
}

static int park_open(struct shi_raw *raw)
{
    char path[128];

    for (int back = 0; back < 2; back++) {
        park_path(raw, back, path, sizeof path);
        if (!raw->sleeper && mkfifo(path, 0600) != 0)
            return -errno;
        raw->named = !raw->sleeper;
        /* For both directions: to open it never waits, and a write gets no SIGPIPE. */
        int fd = open(path, O_RDWR | O_CLOEXEC | O_NOFOLLOW);

        if (fd < 0)
            return -errno;
        *(back ? &raw->back : &raw->fd) = fd;
        raw->opened = true;
    }
    return 0;
}

static void park_unlink(struct shi_raw *raw)
{
    char path[128];

    for (int back = 0; back < 2; back++) {
        park_path(raw, back, path, sizeof path);
        unlink(path);
    }
}

static int park_write(int fd)
{
    return write(fd, "", 1) == 1 ? 0 : -errno;
}

static int park_read(int fd)
{
    char token;

    return read(fd, &token, 1) == 1 ? 0 : -errno;
}

static int park_ring(struct shi_raw *raw, uint32_t n)
{
    (void)n;
    return park_write(raw->fd);
}

static int park_sleep(struct shi_raw *raw, uint32_t n)
{
    (void)n;
    return park_read(raw->sleeper ? raw->fd : raw->back);
}

static const struct shi_raw_ops park_ops = {
    .name = "pipe_park",
    .by_name = true,
    .open = park_open,
    .unlink = park_unlink,
    .ring = park_ring,
    .sleep = park_sleep,
};

/* The system calls of a doorbell that a kind makes, or NULL. */
static const struct shi_raw_ops *ops_of(uint32_t kind)
{
    switch (kind) {
    case SHI_LIMIT_FUTEX_PARK:
        return shi_db_futex.raw;
    case SHI_LIMIT_SIGNAL: /* the same signal, to one that does not sleep */
        return shi_db_signal.raw;
    case SHI_LIMIT_PIPE_PARK:
        return &park_ops;
    default:
        return kind >= SHI_LIMIT_BELLS ? shi_doorbells[kind - SHI_LIMIT_BELLS]->raw : NULL;
    }
}

/* Nobody sleeps, and no system call is made: lines travel. */
static int on_lines(uint32_t kind)
{
    return kind <= SHI_LIMIT_CACHELINE;
}

static uint64_t word(const struct run *r, uint32_t phase)
{
    return (uint64_t)r->p->session << 32 | phase;
}

/* The other side's phase in this session; 0 while it has not come. */
static uint32_t their_phase(const struct run *r)
{
    uint64_t w = shi_load_acquire(r->theirs); /* pairs with the releases in announce() */

    return (uint32_t)(w >> 32) == r->p->session ? (uint32_t)w : 0;
}

static void announce(const struct run *r, uint32_t phase)
{
    shi_store_release(r->mine, word(r, phase));
}

/* Look up from a wait: 0 to go on, else why not. */
static int look(const struct run *r)
{
    uint32_t phase = their_phase(r);

    if (phase & PHASE_FAILED)
        return -(int)(phase & ~PHASE_FAILED);
    return shi_now_ns() >= r->deadline ? -ETIMEDOUT : 0;
}

/* Wait for the other side to reach a phase.  Spins a little, then naps: the other side
 * may still have to be scheduled, perhaps on this very core. */
static int meet(const struct run *r, uint32_t phase)
{
    const struct timespec nap = { .tv_sec = 0, .tv_nsec = 50000 };
    uint32_t looks = 0;

    for (;;) {
        uint32_t seen = their_phase(r);
        int err;

        if (!(seen & PHASE_FAILED) && seen >= phase)
            return 0;
        err = look(r);
        if (err != 0)
            return err;
        if (++looks > 1000)
            nanosleep(&nap, NULL);
        else
            shi_cpu_relax();
    }
}

/* Spin until *at is `want`.  No system call and no clock, except after very many polls. */
static inline int spin_for(const struct run *r, shi_a32 *at, uint32_t want)
{
    for (;;) {
        /* No pause instruction: it delays the poll that finds the answer (on some
         * processors by 140 cycles, more than the whole transfer takes). */
        for (uint32_t i = 0; i < POLLS_PER_LOOK; i++)
            if (__builtin_expect(shi_load_acquire(at) == want, 0))
                return 0;

        int err = look(r);

        if (err != 0)
            return err;
    }
}

/*
 * Spin until *at is `want`, and make it `answer` in the same instruction.
 *
 * This is the fastest way a line goes there and back.  A poll by load gets the line for
 * reading; the answer then asks for it once more, for writing: two transactions each way.
 * A compare-and-swap that polls gets it for writing at once: one each way.  (Two loads and
 * stores 210 ns, compare-and-swap 100 ns on the same cores of a Cascade Lake.)
 */
static inline int swap_for(const struct run *r, shi_a32 *at, uint32_t want, uint32_t answer)
{
    for (;;) {
        for (uint32_t i = 0; i < POLLS_PER_LOOK; i++) {
            uint32_t seen = want;

            if (shi_cas_full(at, &seen, answer))
                return 0;
        }

        int err = look(r);

        if (err != 0)
            return err;
    }
}

/*
 * Work that touches no memory.  Not by the clock, which costs more than the 10 ns that are
 * to pass; not by the pause instruction, which lasts from 10 to 60 ns.
 */
static inline void spend(uint32_t rounds)
{
    for (; rounds > 0; rounds--)
        __asm__ __volatile__("" : "+r"(rounds));
}

#define SPEND_ROUNDS 20000u

/* How many rounds of spend() take so long, now: the core's frequency changes. */
static void calibrate(struct run *r)
{
    uint64_t best = UINT64_MAX;

    for (int i = 0; i < 5; i++) {
        uint64_t from = shi_now_ns(), took;

        spend(SPEND_ROUNDS);
        took = shi_now_ns() - from;
        best = took < best ? took : best;
    }
    if (best == 0)
        best = 1;
    r->work = (uint32_t)((uint64_t)SHI_LIMIT_WORK_NS * SPEND_ROUNDS / best);
    for (uint32_t i = 0; i < r->p->backoffs; i++)
        r->backoff[i] = (uint32_t)((uint64_t)r->p->backoff_ns[i] * SPEND_ROUNDS / best);
}

static void wait_gap(uint32_t gap_ns)
{
    uint64_t from = shi_stamp();

    while (shi_stamp_to_ns(shi_stamp() - from) < gap_ns)
        shi_cpu_relax();
}

/* ---- Deadline timer -------------------------------------------------------------- */

/*
 * A sleeping side sleeps without a time-out: eventfd reads have none, and where there is
 * one it costs a timer per call, which would make the limit slower than it is.  Instead
 * one timer per run signals this thread at the deadline, and again every 20 ms, so that a
 * signal that comes between the check of the clock and the system call is not the last.
 */
static void watch_handler(int signo)
{
    (void)signo;
    shi_store_relaxed(&watch_fired, 1);
}

static int watch_start(struct run *r)
{
    struct sigaction act = { .sa_handler = watch_handler, .sa_flags = SA_ONSTACK };
    struct sigevent ev;
    struct itimerspec when;
    sigset_t set;

    shi_store_relaxed(&watch_fired, 0);
    sigemptyset(&act.sa_mask); /* without SA_RESTART: it must end the system call */
    if (sigaction(r->p->watch_signo, &act, &r->old_watch) != 0)
        return -errno;
    r->watching = 1;
    sigemptyset(&set);
    sigaddset(&set, r->p->watch_signo);
    pthread_sigmask(SIG_UNBLOCK, &set, NULL); /* the old mask is kept by take_signals() */

    memset(&ev, 0, sizeof ev);
    ev.sigev_notify = SIGEV_THREAD_ID;
    ev.sigev_signo = r->p->watch_signo;
    ev.sigev_notify_thread_id = (pid_t)syscall(SYS_gettid);
    /* The system call itself: before glibc 2.34 the wrapper is in a library of its own. */
    if (syscall(SYS_timer_create, CLOCK_MONOTONIC, &ev, &r->timer) != 0) {
        r->timer = -1;
        return -errno;
    }
    when.it_value = to_timespec(r->deadline);
    when.it_interval = to_timespec(WATCH_PERIOD_NS);
    if (syscall(SYS_timer_settime, r->timer, TIMER_ABSTIME, &when, NULL) != 0)
        return -errno;
    return 0;
}

/* ---- The target's side of a signal ----------------------------------------------- */

static void signal_handler(int signo, siginfo_t *info, void *context)
{
    (void)signo;
    (void)context;
    /* A signal from anybody else is not a call. */
    if (!shi_load_relaxed(&on_signal.active) || info->si_pid != on_signal.sender)
        return;

    uint32_t n = shi_load_relaxed(&on_signal.count) + 1;

    if (on_signal.stamp)
        shi_store_relaxed(&on_signal.area->arrived, shi_stamp());
    shi_store_relaxed(&on_signal.count, n);
    shi_store_release(&on_signal.area->answer, n);
}

/* Keep the old mask, install what the kind needs.  Undone by give_back(). */
static int take_signals(struct run *r, int is_pong)
{
    uint32_t kind = r->p->kind;
    int needs_watch = (is_pong && (sleeps(kind) || kind == SHI_LIMIT_SIGNAL)) ||
                      kind == SHI_LIMIT_FUTEX_PARK || kind == SHI_LIMIT_PIPE_PARK;
    uint32_t free_mark = 0;
    sigset_t set;
    int err;

    if (!needs_watch)
        return 0;
    if (!shi_cas_full(&handlers_taken, &free_mark, 1))
        return -EBUSY;
    pthread_sigmask(SIG_SETMASK, NULL, &r->old_mask);
    r->mask_changed = 1;
    err = watch_start(r);
    if (err != 0)
        return err;

    sigemptyset(&set);
    sigaddset(&set, r->p->signo);
    if (is_pong && kind == SHI_LIMIT_SIGNAL) {
        struct sigaction act = { .sa_sigaction = signal_handler,
                                 .sa_flags = SA_SIGINFO | SA_ONSTACK };

        sigemptyset(&act.sa_mask);
        on_signal.area = r->area;
        on_signal.sender = r->p->peer_pid;
        on_signal.stamp = r->p->flags & SHI_LIMIT_ONE_WAY;
        shi_store_relaxed(&on_signal.count, 0);
        shi_store_relaxed(&on_signal.active, 0);
        shi_signal_fence();
        if (sigaction(r->p->signo, &act, &r->old_signo) != 0)
            return -errno;
        r->signo_changed = 1;
        pthread_sigmask(SIG_UNBLOCK, &set, NULL); /* left-overs arrive here, ignored */
        shi_signal_fence();
        shi_store_relaxed(&on_signal.active, 1);
        shi_signal_fence();
    }
    return 0;
}

/* Everything back as it was found: timer, handlers, mask, descriptors, names. */
static void give_back(struct run *r)
{
    if (r->raw.named)
        r->ops->unlink(&r->raw);
    if (r->raw.opened)
        close(r->raw.fd);
    if (r->raw.back >= 0)
        close(r->raw.back);
    if (r->pages != NULL)
        munmap(r->pages, r->page_bytes);
    if (r->timer >= 0)
        syscall(SYS_timer_delete, r->timer);
    shi_store_relaxed(&on_signal.active, 0);
    shi_signal_fence();
    if (r->mask_changed) {
        const struct timespec now = { 0, 0 };
        sigset_t set;

        /* Still pending signals of ours would meet the old handlers: take them out. */
        sigemptyset(&set);
        if (r->watching)
            sigaddset(&set, r->p->watch_signo);
        if (r->signo_changed || r->raw.blocked)
            sigaddset(&set, r->p->signo);
        pthread_sigmask(SIG_BLOCK, &set, NULL);
        while (sigtimedwait(&set, NULL, &now) > 0)
            ;
    }
    if (r->signo_changed)
        sigaction(r->p->signo, &r->old_signo, NULL);
    if (r->watching)
        sigaction(r->p->watch_signo, &r->old_watch, NULL);
    if (r->mask_changed) {
        pthread_sigmask(SIG_SETMASK, &r->old_mask, NULL);
        shi_store_release(&handlers_taken, 0);
    }
}

/* ---- Beginning and end ----------------------------------------------------------- */

static int check(const struct shi_limit_area *area, const struct shi_limit_params *p)
{
    const struct shi_raw_ops *ops;

    if (area == NULL || p == NULL || (uintptr_t)area % alignof(struct shi_limit_area) != 0)
        return -EINVAL;
    if (p->kind >= SHI_LIMIT_KINDS || p->session == 0 || p->calls == 0 ||
        p->calls > SHI_LIMIT_CALLS_MAX || p->warmup > SHI_LIMIT_CALLS_MAX || p->batch == 0 ||
        p->placement >= SHI_LIMIT_PLACEMENTS || p->gap_ns > 1000000000u ||
        p->backoffs > SHI_LIMIT_BACKOFFS ||
        (p->backoffs > 1 && p->calls / p->batch < p->backoffs))
        return -EINVAL;
    for (uint32_t i = 0; i < p->backoffs; i++)
        if (p->backoff_ns[i] > SHI_LIMIT_BACKOFF_MAX)
            return -EINVAL;
    ops = ops_of(p->kind);
    if (p->watch_signo <= 0 || p->watch_signo > SIGRTMAX || p->signo <= 0 ||
        p->signo > SIGRTMAX || p->signo == p->watch_signo)
        return -EINVAL;
    if (ops != NULL && ops->by_pid && (p->peer_pid <= 0 || p->peer_tid <= 0))
        return -EINVAL;
    if (ops != NULL && ops->by_name && (p->fd < 0 || ops == &park_ops) &&
        (p->name[0] != '/' || p->name[1] == '\0' ||
         memchr(p->name, '\0', sizeof p->name) == NULL))
        return -EINVAL;
    if (has_busy(p->kind) && (p->core < 0 || p->core >= CORES_MAX))
        return -EINVAL;
    return 0;
}

/* What both use is made by ping, which comes first; pong throws away what a run before this
 * one left in it. */
static int prepare(struct run *r, int is_pong)
{
    const struct shi_limit_params *p = r->p;

    if (p->kind == SHI_LIMIT_MEMBARRIER && !is_pong &&
        syscall(SYS_membarrier, MEMBARRIER_CMD_REGISTER_PRIVATE_EXPEDITED, 0, 0) != 0)
        return errno == EINVAL ? -ENOSYS : -errno;
    if ((p->kind == SHI_LIMIT_MPROTECT || p->kind == SHI_LIMIT_MPROTECT64) && !is_pong) {
        r->page_bytes = (p->kind == SHI_LIMIT_MPROTECT ? 1 : 64) *
                        (size_t)sysconf(_SC_PAGESIZE);
        r->pages = mmap(NULL, r->page_bytes, PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (r->pages == MAP_FAILED) {
            r->pages = NULL;
            return -errno;
        }
    }
    if (r->ops == NULL || r->ops->open == NULL || (is_pong && !sleeps(p->kind)))
        return 0;
    return r->ops->open(&r->raw);
}

/*
 * Meet.  Ping prepares everything that both use, then comes; pong waits for that,
 * prepares its own side and comes; so nothing of a run before can be taken for this one.
 */
static int begin(struct run *r, struct shi_limit_area *area, const struct shi_limit_params *p,
                 int is_pong)
{
    int err;

    memset(r, 0, sizeof *r);
    r->area = area;
    r->p = p;
    r->mine = is_pong ? &area->pong : &area->ping;
    r->theirs = is_pong ? &area->ping : &area->pong;
    r->deadline = p->deadline_ns + (is_pong ? SHI_LIMIT_GRACE_NS : 0);
    r->ops = ops_of(p->kind);
    r->raw = (struct shi_raw){
        .sleeper = is_pong,
        .word = &area->request,
        .object = area->object,
        .name = p->name,
        .fd = p->kind == SHI_LIMIT_PIPE_PARK ? -1 : p->fd,
        .back = -1,
        .pid = p->peer_pid,
        .tid = p->peer_tid,
        .signo = p->signo,
    };
    r->timer = -1;
    if (on_lines(p->kind))
        calibrate(r);

    if (is_pong) {
        err = meet(r, PHASE_READY);
        if (err == 0)
            err = take_signals(r, 1);
        if (err == 0)
            err = prepare(r, 1);
    } else {
        shi_store_relaxed(&area->request, 0);
        shi_store_relaxed(&area->answer, 0);
        shi_store_relaxed(&area->arrived, 0);
        shi_store_relaxed(&area->slept, 0);
        shi_store_relaxed(&area->preempted, 0);
        for (uint32_t i = 0; i < SHI_LIMIT_PLACEMENTS; i++) {
            shi_store_relaxed(&area->lines[i].value, 0);
            shi_store_relaxed(&area->lines[i].next, 0);
        }
        err = take_signals(r, 0);
        if (err == 0)
            err = prepare(r, 0);
    }
    if (err == 0)
        announce(r, PHASE_READY);
    if (err == 0 && !is_pong)
        err = meet(r, PHASE_READY);
    if (err == 0 && r->raw.named) {
        r->ops->unlink(&r->raw); /* both have it open: leave no name behind */
        r->raw.named = false;
    }
    return err;
}

/* Part.  A failure is told to the other side. */
static int end(struct run *r, int err)
{
    announce(r, err == 0 ? PHASE_DONE : PHASE_FAILED | (uint32_t)-err);
    if (has_busy(r->p->kind) && r->mine == &r->area->ping) {
        shi_store_release(&r->area->finished, r->p->session);
        futex(&r->area->finished, FUTEX_WAKE, INT_MAX, NULL);
    }
    give_back(r);
    return err;
}

/* ---- One call -------------------------------------------------------------------- */

/* Sleep until ping has rung for the n-th time.  0, or why the wait ended. */
static inline int sleep_for_ring(struct run *r, uint32_t n)
{
    for (;;) {
        int err = r->ops->sleep(&r->raw, n);

        if (err == -EINTR)
            err = look(r);
        else
            return err;
        if (err != 0)
            return err;
    }
}

/* What is not measured: have the pages writable, and written to. */
static int make_ready(struct run *r)
{
    size_t step = (size_t)sysconf(_SC_PAGESIZE);

    if (r->pages == NULL)
        return 0;
    if (mprotect(r->pages, r->page_bytes, PROT_READ | PROT_WRITE) != 0)
        return -errno;
    for (size_t at = 0; at < r->page_bytes; at += step)
        ((volatile char *)r->pages)[at] = 1;
    return 0;
}

/* Make the target run: the one operation that is measured. */
static inline int ring(struct run *r, uint32_t n)
{
    if (r->ops != NULL)
        return r->ops->ring(&r->raw, n);
    /* Each returns when the other core has answered. */
    if (r->pages != NULL)
        return mprotect(r->pages, r->page_bytes, PROT_READ) != 0 ? -errno : 0;
    return syscall(SYS_membarrier, MEMBARRIER_CMD_PRIVATE_EXPEDITED, 0, 0) < 0 ? -errno : 0;
}

/* Wait for the n-th answer the way the kind says. */
static inline int take_answer(struct run *r, uint32_t n)
{
    if (has_busy(r->p->kind))
        return 0;
    if (r->p->kind == SHI_LIMIT_PIPE_PARK)
        return sleep_for_ring(r, n);
    if (r->p->kind != SHI_LIMIT_FUTEX_PARK)
        return spin_for(r, &r->area->answer, n);
    /* Pairs with the release in pong's answer. */
    while (shi_load_acquire(&r->area->answer) != n) {
        if (futex(&r->area->answer, FUTEX_WAIT, n - 1, NULL) == 0 || errno == EAGAIN)
            continue;
        if (errno != EINTR)
            return -errno;

        int err = look(r);

        if (err != 0)
            return err;
    }
    return 0;
}

/* How often this thread slept and was pushed off its core since `before`. */
static void tell_switches(struct shi_limit_area *area, const struct rusage *before)
{
    struct rusage now;

    getrusage(RUSAGE_THREAD, &now);
    shi_store_relaxed(&area->slept, (uint32_t)(now.ru_nvcsw - before->ru_nvcsw));
    shi_store_relaxed(&area->preempted, (uint32_t)(now.ru_nivcsw - before->ru_nivcsw));
}

/* ---- The busy thread on the other core ------------------------------------------- */

struct busy {
    pthread_t thread;
    struct shi_limit_area *area;
    int32_t core;
    shi_a32 state; /* 0 starting, 1 running on its core, else PHASE_FAILED | errno */
    shi_a32 stop;
};

static void *busy_main(void *arg)
{
    struct busy *b = arg;
    struct rusage before;
    size_t ncores = (size_t)b->core + 1;
    cpu_set_t *set = CPU_ALLOC(ncores);
    int err = ENOMEM;

    if (set != NULL) {
        CPU_ZERO_S(CPU_ALLOC_SIZE(ncores), set);
        CPU_SET_S((size_t)b->core, CPU_ALLOC_SIZE(ncores), set);
        err = sched_setaffinity(0, CPU_ALLOC_SIZE(ncores), set) != 0 ? errno : 0;
        CPU_FREE(set);
    }
    getrusage(RUSAGE_THREAD, &before);
    shi_store_release(&b->state, err == 0 ? 1 : PHASE_FAILED | (uint32_t)err);
    /* User code that never enters the kernel, so that only an IPI reaches it. */
    while (err == 0 && shi_load_relaxed(&b->stop) == 0)
        ;
    if (err == 0)
        tell_switches(b->area, &before);
    return NULL;
}

static void busy_stop(struct busy *b)
{
    shi_store_release(&b->stop, 1);
    pthread_join(b->thread, NULL);
}

static int busy_start(struct run *r, struct busy *b)
{
    sigset_t all, old;
    uint32_t state;
    int err;

    memset(b, 0, sizeof *b);
    b->core = r->p->core;
    b->area = r->area;
    /* Signals of the process are for its own threads, not for this one. */
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &old);
    err = -pthread_create(&b->thread, NULL, busy_main, b);
    pthread_sigmask(SIG_SETMASK, &old, NULL);
    if (err != 0)
        return err;
    while ((state = shi_load_acquire(&b->state)) == 0 && err == 0) {
        sched_yield();
        err = look(r);
    }
    if (state & PHASE_FAILED)
        err = -(int)(state & ~PHASE_FAILED);
    if (err != 0)
        busy_stop(b);
    return err;
}

/* ---- The two roles --------------------------------------------------------------- */

static int by_value(const void *a, const void *b)
{
    double x = *(const double *)a, y = *(const double *)b;

    return (x > y) - (x < y);
}

static double median(double *values, uint32_t n)
{
    qsort(values, n, sizeof values[0], by_value);
    return n % 2 != 0 ? values[n / 2] : (values[n / 2 - 1] + values[n / 2]) / 2;
}

/* One for each back-off, which took turns. */
static void medians(double *values, uint32_t n, uint32_t turns, double *found)
{
    double *mine = values + n; /* the second half of what was allocated */

    if (turns == 0)
        turns = 1;
    for (uint32_t turn = 0; turn < turns; turn++) {
        uint32_t count = 0;

        for (uint32_t i = turn; i < n; i += turns)
            mine[count++] = values[i];
        found[turn] = median(mine, count);
    }
}

/* Neighbouring indices lie on different pages: what varies with the place (the slice of
 * the last-level cache a line belongs to) varies more. 421 is odd, so all are visited. */
static struct shi_limit_line *placed(struct shi_limit_area *area, uint32_t placement)
{
    return &area->lines[placement * 421u % SHI_LIMIT_PLACEMENTS];
}

/* What travels: a function, an argument, a length would. */
static inline void put_payload(struct shi_limit_line *box, uint32_t n)
{
    for (uint32_t i = 0; i < SHI_LIMIT_PAYLOAD; i++)
        shi_store_relaxed(&box->payload[i], (uint64_t)n << 32 | i);
}

static inline int is_payload(struct shi_limit_line *box, uint32_t n)
{
    uint64_t sum = 0;

    for (uint32_t i = 0; i < SHI_LIMIT_PAYLOAD; i++)
        sum |= shi_load_relaxed(&box->payload[i]) ^ ((uint64_t)n << 32 | i);
    return sum == 0;
}

/* Where the exchange is: `bell` is what the target looks at, `box` what the sender does.
 * Of floor and cacheline they are one line, else neither neighbours nor on one page. */
struct place {
    struct shi_limit_line *bell, *box;
};

static struct place find_place(const struct run *r)
{
    uint32_t at = r->p->placement;
    struct place place = { placed(r->area, at), placed(r->area, at) };

    if (r->p->kind == SHI_LIMIT_MAILBOX)
        place.box = placed(r->area, (at + SHI_LIMIT_PLACEMENTS / 2 + 1) % SHI_LIMIT_PLACEMENTS);
    return place;
}

/* n exchanges: ping makes the bell odd, pong answers in the box with the next number. */
static inline int ping_boxes(struct run *r, struct place at, uint32_t value, uint32_t n,
                             uint32_t backoff)
{
    int err = 0;

    for (uint32_t i = 0; i < n && err == 0; i++, value += 2) {
        put_payload(at.box, value + 1);
        /* Pairs with the acquire in pong_boxes(): it finds the payload. */
        shi_store_release(&at.bell->value, value + 1);
        spend(backoff);
        err = spin_for(r, &at.box->value, value + 2);
        spend(r->work);
    }
    return err;
}

/*
 * n round trips on one line: ping makes it odd, pong even, and it comes back as at + 2n.
 * The next one begins with the poll that sees the last one's answer, so a batch ends with a
 * swap that changes nothing.
 */
static inline int ping_line(struct run *r, shi_a32 *line, uint32_t at, uint32_t n)
{
    int err = 0;

    if (r->p->flags & SHI_LIMIT_PLAIN) {
        for (uint32_t i = 0; i < n && err == 0; i++, at += 2) {
            shi_store_release(line, at + 1);
            err = spin_for(r, line, at + 2);
        }
        return err;
    }
    for (uint32_t i = 0; i < n && err == 0; i++, at += 2)
        err = swap_for(r, line, at, at + 1);
    return err != 0 ? err : swap_for(r, line, at, at);
}

static inline int ping_some(struct run *r, struct place place, uint32_t at, uint32_t n,
                            uint32_t turn)
{
    uint32_t backoff = r->p->backoffs != 0 ? r->backoff[turn % r->p->backoffs] : 0;

    return r->p->kind == SHI_LIMIT_CACHELINE ? ping_line(r, &place.bell->value, at, n)
                                             : ping_boxes(r, place, at, n, backoff);
}

static int ping_lines(struct run *r, struct shi_hist *hist, double *values, uint32_t *nvalues)
{
    const struct shi_limit_params *p = r->p;
    struct place place = find_place(r);
    uint32_t left = p->calls, at = 2 * p->warmup, turn = 0;
    /* With a histogram every round trip is a batch of its own. */
    uint32_t batch = hist != NULL ? 1 : p->batch;
    int err = ping_some(r, place, 0, p->warmup, 0);

    while (err == 0 && left > 0) {
        uint32_t n = left < batch ? left : batch;
        uint64_t from = shi_stamp();

        err = ping_some(r, place, at, n, turn++);

        uint64_t took = shi_stamp() - from;

        if (err != 0)
            break;
        if (hist != NULL)
            shi_hist_record(hist, shi_stamp_to_ns(took));
        if (hist != NULL && p->one_way != NULL && (p->flags & SHI_LIMIT_ONE_WAY)) {
            uint64_t there = shi_load_relaxed(&place.box->arrived);

            shi_hist_record(p->one_way, there > from ? shi_stamp_to_ns(there - from) : 0);
        }
        /* A shorter last batch counts only where there is no other. */
        if (n == batch || *nvalues == 0)
            values[(*nvalues)++] = (double)shi_stamp_to_ns(took) / n;
        at += 2 * n;
        left -= n;
    }
    return err;
}

static int ping_calls(struct run *r, struct shi_hist *hist, double *values, uint32_t *nvalues)
{
    const struct shi_limit_params *p = r->p;
    int one_way = p->one_way != NULL && (p->flags & SHI_LIMIT_ONE_WAY) && !has_busy(p->kind);
    uint32_t total = p->warmup + p->calls;
    int err = 0;

    for (uint32_t n = 1; n <= total && err == 0; n++) {
        wait_gap(p->gap_ns);

        /* No call begins after the deadline: the target may be gone by its own. */
        err = look(r);
        if (err == 0)
            err = make_ready(r);
        if (err != 0)
            break;

        uint64_t from = shi_stamp();

        err = ring(r, n);
        if (err == 0)
            err = take_answer(r, n);

        uint64_t took = shi_stamp_to_ns(shi_stamp() - from);

        if (err != 0 || n <= p->warmup)
            continue;
        if (hist != NULL)
            shi_hist_record(hist, took);
        if (one_way) {
            uint64_t there = shi_load_relaxed(&r->area->arrived);

            shi_hist_record(p->one_way, there > from ? shi_stamp_to_ns(there - from) : 0);
        }
        values[(*nvalues)++] = (double)took;
    }
    return err;
}

/* ---- The queue -------------------------------------------------------------------- */

/*
 * What calls that nobody waits for do to memory: the sender takes the oldest line of its
 * pool, waits until that is unlocked, fills and locks it, and pushes it with a
 * compare-and-swap on the list's head, in the line that the target looks at.  The target
 * takes the list whole and unlocks each, the oldest first.  No state, no chip, no counters.
 */
static struct shi_limit_line *pooled(const struct run *r, uint32_t index)
{
    /* Neighbours, as csds are; the head's line is none of them. */
    return &r->area->lines[index + SHI_LIMIT_PLACEMENTS / 2];
}

static shi_a32 *queue_head(const struct run *r)
{
    return &r->area->lines[0].next;
}

static int push(const struct run *r, uint32_t n)
{
    uint32_t index = n % SHI_LIMIT_POOL, head = 0;
    struct shi_limit_line *line = pooled(r, index);
    int err = 0;

    /*
     * In flight still: as a sender of calls does, wait for one half the pool behind it, and
     * keep away from those that are about to be unlocked.  The oldest first, so this one is
     * unlocked with it: the acquire finds both.
     */
    if (shi_load_acquire(&line->value) != 0)
        err = spin_for(r, &pooled(r, (index + SHI_LIMIT_POOL / 2) % SHI_LIMIT_POOL)->value, 0);
    /* The lines that the target unlocked come in meanwhile. */
    shi_prefetch_write(pooled(r, (index + 8) % SHI_LIMIT_POOL));
    if (err != 0)
        return err;
    put_payload(line, n);
    shi_store_relaxed(&line->value, n + 1);
    do {
        shi_store_relaxed(&line->next, head);
        /* Full: releases the line's words to the exchange in take_all(). */
    } while (!shi_cas_weak_full(queue_head(r), &head, index + 1));
    return 0;
}

static int ping_queue(struct run *r, double *values, uint32_t *nvalues)
{
    const struct shi_limit_params *p = r->p;
    uint32_t total = p->warmup + p->calls, n = 0;
    int err = 0;

    for (; n < p->warmup && err == 0; n++)
        err = push(r, n);
    while (err == 0 && n < total) {
        uint32_t many = total - n < p->batch ? total - n : p->batch, last = n + many;
        uint64_t from = shi_stamp();

        for (; n < last && err == 0; n++)
            err = push(r, n);
        if (err == 0) /* the last of them has been taken: with it all */
            err = spin_for(r, &pooled(r, (last - 1) % SHI_LIMIT_POOL)->value, 0);

        uint64_t took = shi_stamp() - from;

        if (err == 0 && (many == p->batch || *nvalues == 0))
            values[(*nvalues)++] = (double)shi_stamp_to_ns(took) / many;
    }
    return err;
}

#define AHEAD 16u /* as shi_queue_read */

static int pong_queue(struct run *r)
{
    struct shi_limit_line *taken[SHI_LIMIT_POOL];
    shi_a32 *head = queue_head(r);
    uint32_t total = r->p->warmup + r->p->calls, done = 0;

    while (done < total) {
        uint32_t at, n;
        uint32_t polls = 0;

        while (shi_load_acquire(head) == 0)
            if (++polls % POLLS_PER_LOOK == 0) {
                int err = look(r);

                if (err != 0)
                    return err;
            }
        /* Newest first; pairs with push().  More than the pool has is a circle. */
        for (at = shi_xchg_full(head, 0), n = 0; at != 0; n++) {
            if (n == SHI_LIMIT_POOL || at > SHI_LIMIT_POOL)
                return -EBADMSG;
            taken[n] = pooled(r, at - 1);
            /* Neighbours: those before it come in meanwhile. */
            if (at > AHEAD)
                shi_prefetch_write(pooled(r, at - 1 - AHEAD));
            at = shi_load_relaxed(&taken[n]->next);
        }
        for (; n > 0; n--, done++) { /* oldest first */
            struct shi_limit_line *line = taken[n - 1];

            if (shi_load_relaxed(&line->value) != done + 1 || !is_payload(line, done))
                return -EBADMSG;
            shi_xchg_full(&line->value, 0);
        }
    }
    return 0;
}

int shi_limit_ping(struct shi_limit_area *area, const struct shi_limit_params *p,
                   struct shi_hist *hist, double *batch_ns)
{
    struct busy busy;
    struct run r;
    uint32_t nvalues = 0;
    size_t max_values;
    double *values;
    int is_busy = 0;
    int err = check(area, p);

    if (err != 0)
        return err;
    max_values = on_lines(p->kind) && hist == NULL ? p->calls / p->batch + 1 : p->calls;
    values = malloc(2 * sizeof values[0] * max_values);
    if (values == NULL)
        return -ENOMEM;
    memset(values, 0, sizeof values[0] * max_values); /* no page fault later on */

    err = begin(&r, area, p, 0);
    if (err == 0 && has_busy(p->kind)) {
        err = busy_start(&r, &busy);
        is_busy = err == 0;
    }
    if (err == 0)
        err = p->kind == SHI_LIMIT_QUEUE ? ping_queue(&r, values, &nvalues)
              : on_lines(p->kind)        ? ping_lines(&r, hist, values, &nvalues)
                                         : ping_calls(&r, hist, values, &nvalues);
    if (is_busy)
        busy_stop(&busy);
    /* The area is the caller's again only when the target has left it. */
    if (err == 0 && !has_busy(p->kind))
        err = meet(&r, PHASE_DONE);
    if (err == 0 && batch_ns != NULL)
        medians(values, nvalues, p->backoffs, batch_ns);
    free(values);
    return end(&r, err);
}

static int pong_boxes(struct run *r)
{
    struct place at = find_place(r);
    uint32_t total = r->p->warmup + r->p->calls;
    int stamps = (r->p->flags & SHI_LIMIT_ONE_WAY) != 0;
    int err = 0;

    for (uint32_t n = 0; n < total && err == 0; n++) {
        err = spin_for(r, &at.bell->value, 2 * n + 1);
        if (err == 0 && !is_payload(at.box, 2 * n + 1))
            err = -EBADMSG;
        if (stamps)
            shi_store_relaxed(&at.box->arrived, shi_stamp());
        spend(r->work);
        shi_store_release(&at.box->value, 2 * n + 2); /* pairs with ping_boxes() */
    }
    return err;
}

static int pong_line(struct run *r)
{
    const struct shi_limit_params *p = r->p;
    struct shi_limit_line *place = find_place(r).bell;
    shi_a32 *line = &place->value;
    uint32_t total = p->warmup + p->calls;
    int err = 0;

    if (!(p->flags & (SHI_LIMIT_PLAIN | SHI_LIMIT_ONE_WAY))) {
        for (uint32_t n = 0; n < total && err == 0; n++)
            err = swap_for(r, line, 2 * n + 1, 2 * n + 2);
        return err;
    }
    for (uint32_t n = 0; n < total && err == 0; n++) {
        if (p->flags & SHI_LIMIT_PLAIN)
            err = spin_for(r, line, 2 * n + 1);
        else /* fetch it for writing, but the stamp comes before the answer */
            err = swap_for(r, line, 2 * n + 1, 2 * n + 1);
        if (err != 0)
            break;
        if (p->flags & SHI_LIMIT_ONE_WAY)
            shi_store_relaxed(&place->arrived, shi_stamp());
        shi_store_release(line, 2 * n + 2);
    }
    return err;
}

static int pong_sleeping(struct run *r)
{
    const struct shi_limit_params *p = r->p;
    uint32_t total = p->warmup + p->calls;
    int err = 0;

    for (uint32_t n = 1; n <= total && err == 0; n++) {
        err = sleep_for_ring(r, n);
        if (err != 0)
            break;
        if (p->flags & SHI_LIMIT_ONE_WAY)
            shi_store_relaxed(&r->area->arrived, shi_stamp());
        shi_store_release(&r->area->answer, n); /* pairs with take_answer() */
        if (p->kind == SHI_LIMIT_PIPE_PARK)
            err = park_write(r->raw.back);
        if (p->kind == SHI_LIMIT_FUTEX_PARK && futex(&r->area->answer, FUTEX_WAKE, 1, NULL) < 0)
            err = -errno;
    }
    return err;
}

static int pong_signal(struct run *r)
{
    uint32_t total = r->p->warmup + r->p->calls;

    /* User code: two loads from its own memory, no system call, until told to stop. */
    for (;;) {
        if (shi_load_relaxed(&on_signal.count) >= total)
            return 0;
        if (shi_load_relaxed(&watch_fired)) {
            int err = look(r);

            if (err != 0)
                return err;
            shi_store_relaxed(&watch_fired, 0);
        }
    }
}

/* The core belongs to ping's busy thread meanwhile: sleep. */
static int pong_idle(struct run *r)
{
    struct timespec when = to_timespec(r->deadline);
    uint32_t seen;

    while ((seen = shi_load_acquire(&r->area->finished)) != r->p->session) {
        if (futex(&r->area->finished, FUTEX_WAIT_BITSET, seen, &when) != 0 && errno != EINTR &&
            errno != EAGAIN)
            return -errno;
    }
    return their_phase(r) & PHASE_FAILED ? look(r) : 0;
}

int shi_limit_pong(struct shi_limit_area *area, const struct shi_limit_params *p)
{
    struct rusage before;
    struct run r;
    int err = check(area, p);

    if (err != 0)
        return err;
    err = begin(&r, area, p, 1);
    if (err == 0) {
        getrusage(RUSAGE_THREAD, &before);
        switch (p->kind) {
        case SHI_LIMIT_FLOOR:
        case SHI_LIMIT_MAILBOX:
            err = pong_boxes(&r);
            break;
        case SHI_LIMIT_QUEUE:
            err = pong_queue(&r);
            break;
        case SHI_LIMIT_CACHELINE:
            err = pong_line(&r);
            break;
        case SHI_LIMIT_SIGNAL:
            err = pong_signal(&r);
            break;
        case SHI_LIMIT_MEMBARRIER:
        case SHI_LIMIT_MPROTECT:
        case SHI_LIMIT_MPROTECT64:
            err = pong_idle(&r);
            break;
        default:
            err = pong_sleeping(&r);
            break;
        }
        if (!has_busy(p->kind))
            tell_switches(area, &before);
    }
    return end(&r, err);
}

/* ---- Names and defaults ---------------------------------------------------------- */

const char *shi_limit_name(int kind)
{
    if (kind < 0 || kind >= SHI_LIMIT_KINDS)
        return NULL;
    return kind >= SHI_LIMIT_BELLS ? ops_of((uint32_t)kind)->name : kind_names[kind];
}

int shi_limit_kind(const char *name)
{
    for (int i = 0; name != NULL && i < SHI_LIMIT_KINDS; i++)
        if (strcmp(name, shi_limit_name(i)) == 0)
            return i;
    return -EINVAL;
}

void shi_limit_params_init(struct shi_limit_params *p, int kind)
{
    memset(p, 0, sizeof *p);
    p->kind = (uint32_t)kind;
    p->calls = 1000;
    p->warmup = 100;
    p->batch = 1000;
    p->gap_ns = SHI_LIMIT_GAP_NS;
    p->deadline_ns = shi_now_ns() + 30000000000u;
    p->signo = SIGRTMAX - 1;
    p->watch_signo = SIGRTMAX - 2;
    p->fd = -1;
}
