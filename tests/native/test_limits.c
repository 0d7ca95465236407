/* SPDX-License-Identifier: MIT */
/*
 * The raw limits: every kind runs between two pinned processes and counts its calls, the
 * target of the sleeping kinds sleeps, a side that is missing, refused or killed never
 * hangs the other, and signal handlers and masks are as before.
 */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <errno.h>
#include <fcntl.h>
#include <mqueue.h>
#include <sched.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include "base/clock.h"
#include "measure/limit.h"

static int failures;

#define CHECK(cond, ...)                                                                       \
    do {                                                                                       \
        if (!(cond)) {                                                                         \
            failures++;                                                                        \
            printf("FAIL %s:%d: %s: ", __FILE__, __LINE__, #cond);                             \
            printf(__VA_ARGS__);                                                               \
            printf("\n");                                                                      \
        }                                                                                      \
    } while (0)

typedef unsigned long long ull;

static struct shi_limit_area *area;
static struct shi_hist *rtt, *one_way;
static uint32_t sessions;
static int cores[2];

static int find_cores(void)
{
    cpu_set_t set;
    int found = 0;

    if (sched_getaffinity(0, sizeof set, &set) != 0)
        return 0;
    for (int i = 0; i < CPU_SETSIZE && found < 2; i++)
        if (CPU_ISSET(i, &set))
            cores[found++] = i;
    return found;
}

static void pin(int core)
{
    cpu_set_t set;

    CPU_ZERO(&set);
    CPU_SET((size_t)core, &set);
    if (sched_setaffinity(0, sizeof set, &set) != 0) {
        printf("cannot pin to core %d: %s\n", core, strerror(errno));
        exit(77);
    }
}

static int on_lines(int kind)
{
    return kind <= SHI_LIMIT_CACHELINE;
}

static struct shi_limit_params params(int kind)
{
    struct shi_limit_params p;

    shi_limit_params_init(&p, kind);
    p.session = ++sessions;
    p.calls = on_lines(kind) ? 20000 : 300;
    p.warmup = 30;
    p.core = cores[1];
    p.deadline_ns = shi_now_ns() + 20000000000u;
    snprintf(p.name, sizeof p.name, "/shmipi-test-%d-%u", (int)getpid(), sessions);
    if (kind == SHI_LIMIT_OF(eventfd)) {
        p.fd = eventfd(0, EFD_CLOEXEC);
        CHECK(p.fd >= 0, "%s", strerror(errno));
    }
    return p;
}

/* A flag of the C library's own, which it adds to whatever it installs. */
#define RESTORER 0x04000000

/* Whether handlers and mask are what they were. */
struct signals {
    sigset_t mask;
    struct sigaction act[65];
};

static void take_signals(struct signals *s)
{
    memset(s, 0, sizeof *s);
    sigprocmask(SIG_SETMASK, NULL, &s->mask);
    for (int i = 1; i <= 64; i++)
        sigaction(i, NULL, &s->act[i]);
}

static int same_signals(const struct signals *before)
{
    struct signals now;

    take_signals(&now);
    for (int i = 1; i <= 64; i++)
        if (sigismember(&now.mask, i) != sigismember(&before->mask, i) ||
            now.act[i].sa_handler != before->act[i].sa_handler ||
            ((now.act[i].sa_flags ^ before->act[i].sa_flags) & ~RESTORER) != 0)
            return 0;
    return 1;
}

/* A child that runs the target's role and exits with its -error, 99 if it left signals
 * changed. */
static pid_t start_pong(struct shi_limit_params p)
{
    pid_t parent = getpid(), pid;

    fflush(stdout);
    pid = fork();
    if (pid == 0) {
        struct signals before;
        int err;

        prctl(PR_SET_PDEATHSIG, SIGKILL);
        pin(cores[1]);
        p.peer_pid = p.peer_tid = parent;
        take_signals(&before);
        err = shi_limit_pong(area, &p);
        _exit(same_signals(&before) ? -err : 99);
    }
    return pid;
}

static int finish(pid_t pid)
{
    int status;

    if (waitpid(pid, &status, 0) != pid || !WIFEXITED(status))
        return -1000;
    return -WEXITSTATUS(status);
}

/* One run of both roles.  Returns ping's result. */
static int run(struct shi_limit_params *p, struct shi_hist *hist, double *batch_ns)
{
    struct signals before;
    pid_t pid = start_pong(*p);
    int ping, pong;

    p->peer_pid = p->peer_tid = pid;
    take_signals(&before);
    ping = shi_limit_ping(area, p, hist, batch_ns);
    CHECK(same_signals(&before), "%s: ping left signals changed", shi_limit_name((int)p->kind));
    pong = finish(pid);
    CHECK(pong == ping, "%s: ping %d, pong %d", shi_limit_name((int)p->kind), ping, pong);
    if (p->fd >= 0)
        close(p->fd);
    return ping;
}

static int is_sleeping(int kind)
{
    return kind >= SHI_LIMIT_PIPE_PARK || kind == SHI_LIMIT_FUTEX_PARK;
}

static int has_busy(int kind)
{
    return kind >= SHI_LIMIT_MEMBARRIER && kind <= SHI_LIMIT_MPROTECT64;
}

/* What a system may refuse; anything else is a failure of ours. */
static int is_refusal(int kind, int err)
{
    if (err == -ENOSYS || err == -EPERM || err == -EACCES)
        return kind == SHI_LIMIT_MEMBARRIER || kind == SHI_LIMIT_OF(mqueue);
    return kind == SHI_LIMIT_OF(mqueue) && (err == -EMFILE || err == -ENOSPC);
}

/* ---- Tests ---- */

static void test_kind(int kind)
{
    const char *name = shi_limit_name(kind);
    struct shi_limit_params p = params(kind);
    double block = -1;
    int err;

    /* The pass with a clock around each call. */
    shi_hist_reset(rtt);
    shi_hist_reset(one_way);
    p.flags = SHI_LIMIT_ONE_WAY;
    p.one_way = one_way;
    err = run(&p, rtt, &block);
    if (is_refusal(kind, err)) {
        printf("%-11s unavailable: %s\n", name, strerror(-err));
        return;
    }
    CHECK(err == 0, "%s: %s", name, strerror(-err));
    if (err != 0)
        return;
    CHECK(block > 0, "%s: %f", name, block);
    if (kind == SHI_LIMIT_QUEUE) { /* nobody waits for a single call */
        CHECK(shi_hist_count(rtt) == 0, "%s: %llu", name, (ull)shi_hist_count(rtt));
        printf("%-11s per call: %.1f ns\n", name, block);
        return;
    }
    CHECK(shi_hist_count(rtt) == p.calls, "%s: %llu", name, (ull)shi_hist_count(rtt));
    CHECK(shi_hist_min(rtt) > 0, "%s: a round trip of 0 ns", name);
    if (has_busy(kind)) {
        CHECK(shi_hist_count(one_way) == 0, "%s has no way there", name);
    } else {
        CHECK(shi_hist_count(one_way) == p.calls, "%s: %llu", name,
              (ull)shi_hist_count(one_way));
        CHECK(shi_hist_min(one_way) > 0, "%s: arrived before it was sent", name);
        CHECK(shi_hist_mean(one_way) < shi_hist_mean(rtt), "%s: there %f, and back %f", name,
              shi_hist_mean(one_way), shi_hist_mean(rtt));
    }
    printf("%-11s per call: p50 %7llu p99 %7llu max %8llu  one way p50 %7llu", name,
           (ull)shi_hist_value_at_quantile(rtt, 0.5),
           (ull)shi_hist_value_at_quantile(rtt, 0.99), (ull)shi_hist_max(rtt),
           (ull)shi_hist_value_at_quantile(one_way, 0.5));

    /* The block, as it stands beside the machine's own rows. */
    p = params(kind);
    block = -1;
    err = run(&p, NULL, &block);
    CHECK(err == 0 && block > 0, "%s: %s, %f", name, strerror(-err), block);
    printf("  block: %9.1f ns  preempted %u", block, shi_load_relaxed(&area->preempted));
    if (is_sleeping(kind)) {
        uint32_t total = p.calls + p.warmup, slept = shi_load_relaxed(&area->slept), tries;

        printf("  slept %u of %u", slept, total);
        /* A few may find the ring there already, when somebody lost his core; many, when
         * a hypervisor has one core for both at the moment: that passes. */
        for (tries = 0; tries < 10 && slept + total / 10 < total; tries++) {
            usleep(100000);
            p = params(kind);
            err = run(&p, NULL, &block);
            CHECK(err == 0, "%s: %s", name, strerror(-err));
            slept = shi_load_relaxed(&area->slept);
            printf(", again %u", slept);
        }
        CHECK(slept + total / 10 >= total, "%s: slept %u times in %u calls", name, slept,
              total);
    }
    printf("\n");
}

static void test_placements(int kind, uint32_t flags, uint32_t backoff_ns)
{
    double low = 1e18, high = 0;

    for (uint32_t i = 0; i < 16; i++) {
        struct shi_limit_params p = params(kind);
        double ns = -1;
        int err;

        p.placement = i;
        p.flags = flags;
        p.backoffs = 1;
        p.backoff_ns[0] = backoff_ns;
        err = run(&p, NULL, &ns);
        CHECK(err == 0 && ns > 0, "placement %u: %d, %f", i, err, ns);
        low = ns < low ? ns : low;
        high = ns > high ? ns : high;
    }
    printf("%s%s, looked for after %u ns, over 16 placements: %.1f to %.1f ns\n",
           shi_limit_name(kind), flags & SHI_LIMIT_PLAIN ? " by loads and stores" : "",
           backoff_ns, low, high);
    /* The sender looks no sooner; by how far a core's frequency moves it may be off. */
    CHECK(low > backoff_ns / 4, "%s: %f", shi_limit_name(kind), low);
}

/* Back-offs take turns, and each has its own figure. */
static void test_backoffs(void)
{
    static const uint32_t ns[] = { 6000, 0, 3000 };
    struct shi_limit_params p = params(SHI_LIMIT_MAILBOX);
    double found[3] = { 0, 0, 0 };
    int err;

    p.calls = 9000;
    p.batch = 100;
    p.backoffs = 3;
    memcpy(p.backoff_ns, ns, sizeof ns);
    err = run(&p, NULL, found);
    CHECK(err == 0, "%d", err);
    for (int i = 0; i < 3; i++)
        CHECK(found[i] > ns[i] / 4.0, "%u ns: %f", ns[i], found[i]);
    CHECK(found[1] < found[2] && found[2] < found[0], "%f %f %f", found[0], found[1], found[2]);
}

/* A last batch that is short, one that is the only one, a single call. */
static void test_odd_batches(int kind)
{
    static const uint32_t cases[][2] = { { 2500, 1000 }, { 700, 1000 }, { 1, 1 }, { 3, 3 } };

    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        struct shi_limit_params p = params(kind);
        double ns = -1;
        int err;

        p.calls = cases[i][0];
        p.batch = cases[i][1];
        p.warmup = 0;
        err = run(&p, NULL, &ns);
        CHECK(err == 0 && ns > 0, "%s: %u calls by %u: %d, %f", shi_limit_name(kind), p.calls,
              p.batch, err, ns);
    }
}

/* A few may find the ring there already, when somebody lost his core; many, when a hypervisor
 * has one core for both at the moment: that passes. */
static int slept_nearly_always(int tries)
{
    if (shi_load_relaxed(&area->slept) + 33 >= 330)
        return 1;
    if (tries < 10)
        usleep(100000);
    return 0;
}

/* What a run before left in the descriptors is not taken for a call. */
static void test_leftovers(void)
{
    static const uint64_t many = 5;
    struct mq_attr attr = { .mq_maxmsg = 4, .mq_msgsize = 16 };
    struct shi_limit_params p;
    char name[64];
    mqd_t queue;
    int err, tries = 0;

    do {
        p = params(SHI_LIMIT_OF(eventfd));
        CHECK(write(p.fd, &many, sizeof many) == sizeof many, "%s", strerror(errno));
        err = run(&p, NULL, NULL);
        CHECK(err == 0, "eventfd: %d", err);
    } while (!slept_nearly_always(++tries) && tries < 10);
    CHECK(shi_load_relaxed(&area->slept) + 33 >= 330, "eventfd: slept %u of 330",
          shi_load_relaxed(&area->slept));

    /* Also: a queue by descriptor instead of by name. */
    snprintf(name, sizeof name, "/shmipi-test-%d", (int)getpid());
    tries = 0;
    do {
        queue = mq_open(name, O_RDWR | O_CREAT | O_EXCL, 0600, &attr);
        if (queue == (mqd_t)-1) {
            printf("mqueue by descriptor: skipped, %s\n", strerror(errno));
            return;
        }
        mq_unlink(name);
        CHECK(mq_send(queue, "x", 1, 0) == 0 && mq_send(queue, "y", 1, 0) == 0, "mq_send");
        p = params(SHI_LIMIT_OF(mqueue));
        p.name[0] = '\0';
        p.fd = queue;
        err = run(&p, NULL, NULL);
        CHECK(err == 0, "mqueue: %d", err);
    } while (!slept_nearly_always(++tries) && tries < 10);
    CHECK(shi_load_relaxed(&area->slept) + 33 >= 330, "mqueue: slept %u of 330",
          shi_load_relaxed(&area->slept));
}

/* A queue made for a run has no name any more, whatever became of the run. */
static void test_no_queue_left(void)
{
    struct shi_limit_params p = params(SHI_LIMIT_OF(mqueue));
    int err = run(&p, NULL, NULL);

    CHECK(err == 0 || is_refusal(SHI_LIMIT_OF(mqueue), err), "%d", err);
    CHECK(mq_open(p.name, O_RDONLY) == (mqd_t)-1, "%s is left", p.name);
    p = params(SHI_LIMIT_OF(mqueue));
    p.deadline_ns = shi_now_ns() + 50000000;
    err = shi_limit_ping(area, &p, NULL, NULL); /* nobody comes */
    CHECK(err == -ETIMEDOUT || is_refusal(SHI_LIMIT_OF(mqueue), err), "%d", err);
    CHECK(mq_open(p.name, O_RDONLY) == (mqd_t)-1, "%s is left", p.name);
}

/* Neither side waits for ever for one that never comes. */
static void test_nobody_comes(void)
{
    for (int kind = 0; kind < SHI_LIMIT_KINDS; kind++) {
        struct shi_limit_params p = params(kind);
        struct signals before;
        uint64_t from = shi_now_ns();
        int err;

        take_signals(&before);
        p.peer_pid = p.peer_tid = getpid();
        p.deadline_ns = from + 20000000;
        err = shi_limit_ping(area, &p, NULL, NULL);
        CHECK(err == -ETIMEDOUT || is_refusal(kind, err), "%s: ping %d", shi_limit_name(kind),
              err);
        p.session = ++sessions;
        err = shi_limit_pong(area, &p);
        CHECK(err == -ETIMEDOUT, "%s: pong %d", shi_limit_name(kind), err);
        CHECK(shi_now_ns() - from < 2000000000, "%s: took %llu ms", shi_limit_name(kind),
              (ull)((shi_now_ns() - from) / 1000000));
        CHECK(same_signals(&before), "%s left signals changed", shi_limit_name(kind));
        if (p.fd >= 0)
            close(p.fd);
    }
}

/* SIGKILL of the target in the middle of the run. */
static void test_target_killed(int kind)
{
    struct shi_limit_params p = params(kind);
    struct signals before;
    pid_t pid, killer;
    int err, status;

    p.calls = SHI_LIMIT_CALLS_MAX / 100; /* far more than 60 ms, also where lines are fast */
    p.deadline_ns = shi_now_ns() + 160000000;
    take_signals(&before);
    pid = start_pong(p);
    fflush(stdout);
    killer = fork();
    if (killer == 0) {
        usleep(60000);
        kill(pid, SIGKILL);
        _exit(0);
    }
    p.peer_pid = p.peer_tid = pid;
    err = shi_limit_ping(area, &p, NULL, NULL);
    /* A zombie still takes signals; one that is gone does not. */
    CHECK(err == -ETIMEDOUT || err == -ESRCH || is_refusal(kind, err), "%s: %d",
          shi_limit_name(kind), err);
    CHECK(same_signals(&before), "%s left signals changed", shi_limit_name(kind));
    waitpid(pid, &status, 0);
    waitpid(killer, &status, 0);
    if (p.fd >= 0)
        close(p.fd);
}

/* Of a sender that is killed before both sides have them open: elsewhere a machine's owner
 * removes them, and here nobody else does. */
static void remove_names(const struct shi_limit_params *p)
{
    char path[128];

    mq_unlink(p->name);
    for (int back = 0; back < 2; back++) {
        snprintf(path, sizeof path, "/dev/shm%s%s", p->name, back ? ".back" : "");
        unlink(path);
    }
}

/* SIGKILL of the sender in the middle: the target, asleep, wakes by its own timer. */
static void test_sender_killed(int kind)
{
    struct shi_limit_params p = params(kind);
    pid_t target, sender, parent = getpid();
    uint64_t from = shi_now_ns();
    int err, status;
    int pipe_fd[2];

    if (pipe(pipe_fd) != 0)
        exit(1);
    p.calls = SHI_LIMIT_CALLS_MAX / 100; /* far more than 60 ms, also where lines are fast */
    p.deadline_ns = from + 160000000;
    fflush(stdout);
    sender = fork();
    if (sender == 0) {
        prctl(PR_SET_PDEATHSIG, SIGKILL);
        if (read(pipe_fd[0], &target, sizeof target) != sizeof target || getppid() != parent)
            _exit(1);
        p.peer_pid = p.peer_tid = target;
        _exit(-shi_limit_ping(area, &p, NULL, NULL));
    }
    target = fork();
    if (target == 0) {
        struct signals before;

        prctl(PR_SET_PDEATHSIG, SIGKILL);
        pin(cores[1]);
        p.peer_pid = p.peer_tid = sender;
        take_signals(&before);
        err = shi_limit_pong(area, &p);
        _exit(same_signals(&before) ? -err : 99);
    }
    if (write(pipe_fd[1], &target, sizeof target) != sizeof target)
        exit(1);
    usleep(60000);
    kill(sender, SIGKILL);
    waitpid(sender, &status, 0);
    err = finish(target);
    remove_names(&p);
    CHECK(err == -ETIMEDOUT || is_refusal(kind, err), "%s: %d", shi_limit_name(kind), err);
    CHECK(shi_now_ns() - from < 2000000000, "%s: took %llu ms", shi_limit_name(kind),
          (ull)((shi_now_ns() - from) / 1000000));
    close(pipe_fd[0]);
    close(pipe_fd[1]);
    if (p.fd >= 0)
        close(p.fd);
}

/* What one side cannot do, both hear, at once and by the same number. */
static void test_refusals(void)
{
    struct shi_limit_params p;
    uint64_t from = shi_now_ns();
    int err, fd;
    pid_t pid;

    p = params(SHI_LIMIT_OF(eventfd));
    close(p.fd);
    p.fd = 987; /* open in neither */
    err = run(&p, NULL, NULL);
    CHECK(err == -EBADF, "a closed eventfd: %d", err);

    p = params(SHI_LIMIT_OF(eventfd));
    fd = fcntl(p.fd, F_GETFL);
    fcntl(p.fd, F_SETFL, fd | O_NONBLOCK);
    err = run(&p, NULL, NULL);
    CHECK(err == -EINVAL, "an eventfd that does not block: %d", err);

    /* Only the target's is closed. */
    p = params(SHI_LIMIT_OF(eventfd));
    fd = p.fd;
    p.fd = 987;
    pid = start_pong(p);
    p.fd = fd;
    err = shi_limit_ping(area, &p, NULL, NULL);
    CHECK(err == -EBADF, "the target's eventfd closed: ping %d", err);
    err = finish(pid);
    CHECK(err == -EBADF, "the target's eventfd closed: pong %d", err);
    close(fd);

    p = params(SHI_LIMIT_MEMBARRIER);
    p.core = 60000;
    err = run(&p, NULL, NULL);
    CHECK(err == -EINVAL || is_refusal(SHI_LIMIT_MEMBARRIER, err), "a core that is not: %d",
          err);
    CHECK(shi_now_ns() - from < 5000000000u, "told at once, not at the deadline");
}

/* Signals of the same number from a third process are not calls. */
static void test_stray_signals(int kind)
{
    struct shi_limit_params p = params(kind);
    struct sigaction ignore = { .sa_handler = SIG_IGN }, old;
    pid_t target, stray;
    int err, status;

    /* The target begins and ends with it ignored, so that strays do not end it. */
    sigaction(p.signo, &ignore, &old);
    p.calls = 2000;
    p.gap_ns = 100000;
    target = start_pong(p);
    sigaction(p.signo, &old, NULL);
    stray = fork();
    if (stray == 0) {
        for (int i = 0; i < 100; i++) {
            kill(target, p.signo);
            usleep(1000);
        }
        _exit(0);
    }
    p.peer_pid = p.peer_tid = target;
    shi_hist_reset(rtt);
    err = shi_limit_ping(area, &p, rtt, NULL);
    CHECK(err == 0, "%s: ping %d", shi_limit_name(kind), err);
    err = finish(target);
    CHECK(err == 0, "%s: pong %d", shi_limit_name(kind), err);
    CHECK(shi_load_relaxed(&area->answer) == p.calls + p.warmup, "%s: %u answers",
          shi_limit_name(kind), shi_load_relaxed(&area->answer));
    /* A stray that counted would be an answer that was there before the call. */
    CHECK(shi_hist_min(rtt) > 300, "%s: an answer after %llu ns", shi_limit_name(kind),
          (ull)shi_hist_min(rtt));
    waitpid(stray, &status, 0);
}

static void test_bad_params(void)
{
    struct shi_limit_params good = params(SHI_LIMIT_OF(futex)), p;

#define REFUSED(change)                                                                        \
    do {                                                                                       \
        p = good;                                                                              \
        change;                                                                                \
        CHECK(shi_limit_ping(area, &p, NULL, NULL) == -EINVAL, "ping");                        \
        CHECK(shi_limit_pong(area, &p) == -EINVAL, "pong");                                    \
    } while (0)

    REFUSED(p.kind = SHI_LIMIT_KINDS);
    REFUSED(p.session = 0);
    REFUSED(p.calls = 0);
    REFUSED(p.calls = UINT32_MAX);
    REFUSED(p.warmup = UINT32_MAX);
    REFUSED(p.batch = 0);
    REFUSED(p.placement = SHI_LIMIT_PLACEMENTS);
    REFUSED(p.backoffs = 1; p.backoff_ns[0] = SHI_LIMIT_BACKOFF_MAX + 1);
    REFUSED(p.backoffs = SHI_LIMIT_BACKOFFS + 1);
    REFUSED(p.backoffs = 4; p.calls = p.batch * 4 - 1);
    REFUSED(p.signo = 0);
    REFUSED(p.signo = 65);
    REFUSED(p.watch_signo = -1);
    REFUSED(p.watch_signo = p.signo);
    REFUSED(p.kind = SHI_LIMIT_SIGNAL); /* to whom? */
    REFUSED(p.kind = SHI_LIMIT_OF(signal));
    REFUSED(p.kind = SHI_LIMIT_OF(mqueue); p.name[0] = '\0'); /* which? */
    REFUSED(p.kind = SHI_LIMIT_MEMBARRIER; p.core = -1);
    REFUSED(p.kind = SHI_LIMIT_MPROTECT; p.core = -1);
    REFUSED(p.kind = SHI_LIMIT_PIPE_PARK; p.name[0] = '\0');
    CHECK(shi_limit_ping(NULL, &good, NULL, NULL) == -EINVAL, "no area");
    CHECK(shi_limit_pong((struct shi_limit_area *)((char *)area + 8), &good) == -EINVAL,
          "an area that is not aligned");
}

static void test_names(void)
{
    static const char *const order[] = { "floor",      "mailbox",   "queue",      "cacheline",
                                         "futex_park", "signal",    "membarrier", "mprotect",
                                         "mprotect64", "pipe_park", "futex",      "sem",
                                         "sigwait",    "eventfd",   "mqueue",     "pipe" };

    CHECK(sizeof order / sizeof order[0] == SHI_LIMIT_KINDS, "%d", SHI_LIMIT_KINDS);
    for (int i = 0; i < SHI_LIMIT_KINDS; i++) {
        CHECK(strcmp(shi_limit_name(i), order[i]) == 0, "%d is %s", i, shi_limit_name(i));
        CHECK(shi_limit_kind(order[i]) == i, "%s is %d", order[i], shi_limit_kind(order[i]));
    }
    CHECK(shi_limit_name(-1) == NULL && shi_limit_name(SHI_LIMIT_KINDS) == NULL, "no kind");
    CHECK(shi_limit_kind("pigeon") == -EINVAL && shi_limit_kind(NULL) == -EINVAL, "no name");
}

int main(void)
{
    if (getenv("SHMIPI_EMULATED")) {
        printf("times of an emulator are nobody's limits\n");
        return 77;
    }
    rtt = malloc(sizeof *rtt);
    one_way = malloc(sizeof *one_way);
    area = mmap(NULL, sizeof *area, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    if (rtt == NULL || one_way == NULL || area == MAP_FAILED) {
        printf("out of memory\n");
        return 1;
    }
    if (find_cores() < 2) {
        printf("needs two cores\n");
        return 77;
    }
    memset(area, 0x5a, sizeof *area); /* needs no initialisation */
    shi_clock_calibrate(NULL);
    pin(cores[0]);

    test_names();
    test_bad_params();
    for (int kind = 0; kind < SHI_LIMIT_KINDS; kind++)
        test_kind(kind);
    test_placements(SHI_LIMIT_CACHELINE, 0, 0);
    test_placements(SHI_LIMIT_CACHELINE, SHI_LIMIT_PLAIN, 0);
    test_placements(SHI_LIMIT_FLOOR, 0, 0);
    test_placements(SHI_LIMIT_MAILBOX, 0, 100);
    test_backoffs();
    for (int kind = 0; on_lines(kind); kind++)
        test_odd_batches(kind);
    test_leftovers();
    test_no_queue_left();
    test_nobody_comes();
    test_refusals();
#if !defined(__SANITIZE_THREAD__)
    /* ThreadSanitizer keeps a signal until the next call that it intercepts; with strays
     * in between, a busy target makes none and the answer never comes. */
    test_stray_signals(SHI_LIMIT_SIGNAL);
#endif
    test_stray_signals(SHI_LIMIT_OF(signal));
    for (int kind = 0; kind < SHI_LIMIT_KINDS; kind++) {
        if (kind == SHI_LIMIT_MPROTECT64)
            continue; /* waits as mprotect does */
        test_target_killed(kind);
        test_sender_killed(kind);
    }
    free(rtt);
    free(one_way);
    munmap(area, sizeof *area);
    return failures != 0;
}
