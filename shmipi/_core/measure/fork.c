/* SPDX-License-Identifier: MIT */
#include "base/sys.h"

#include <errno.h>
#include <sched.h>
#include <signal.h>
#include <stdalign.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include "base/clock.h"
#include "base/event.h"
#include "measure/fork.h"

#define LOOK_NS 100000000

/* Shared with the children. */
struct meeting {
    shi_a32 here; /* children that have run */
    shi_a32 full; /* event: the last of them has */
    shi_a32 end;  /* event: they may go */
};

/* What a CPU has to do too, and nothing else: die with its parent, be pinned, say that it is
 * there, and sleep. */
static void child(struct meeting *m, pid_t parent, uint32_t n, uint32_t core)
{
    cpu_set_t set;
    CPU_ZERO(&set);
    CPU_SET(core % CPU_SETSIZE, &set);
    if (prctl(PR_SET_PDEATHSIG, SIGKILL, 0, 0, 0) || getppid() != parent ||
        sched_setaffinity(0, sizeof set, &set))
        _exit(1);
    /* Full: who finds all here finds this one pinned. */
    if (shi_fetch_add_full(&m->here, 1) + 1 == n)
        shi_event_ring(&m->full);
    /* Acquire pairs with the ring of `end`, which changes it before it wakes. */
    while (!shi_load_acquire(&m->end))
        shi_event_wait(&m->end, 0, -1);
    _exit(0);
}

/* 1: all are here, 0: not yet, -ECHILD: one died or was stopped, and is not waited for. */
static int all_here(struct meeting *m, uint32_t n, const pid_t *pids)
{
    uint32_t i;
    if (shi_load_acquire(&m->here) == n)
        return 1;
    for (i = 0; i < n; i++) {
        siginfo_t info = { .si_pid = 0 };
        const int look = WEXITED | WSTOPPED | WNOHANG | WNOWAIT;
        if (waitid(P_PID, (id_t)pids[i], &info, look) || info.si_pid)
            return -ECHILD;
    }
    return 0;
}

/* Until it is gone.  One that was stopped (SIGSTOP) would never go by itself. */
static void reap(pid_t pid)
{
    int status;
    for (;;) {
        pid_t done = waitpid(pid, &status, WUNTRACED);
        if (done < 0 && errno == EINTR)
            continue;
        if (done < 0 || !WIFSTOPPED(status))
            return;
        kill(pid, SIGKILL);
    }
}

int shi_forks(uint32_t n, const uint32_t *cores, uint32_t ncores, struct shi_forks *found)
{
    struct meeting *m =
        mmap(NULL, sizeof *m, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    pid_t *pids = calloc(n, sizeof *pids), parent = getpid();
    uint32_t i, made = 0;
    int err = m == MAP_FAILED || !pids ? -ENOMEM : 0;
    uint64_t from = shi_now_ns();
    for (; !err && made < n; made++) {
        pids[made] = fork();
        if (!pids[made])
            child(m, parent, n, cores[made % ncores]);
        if (pids[made] < 0) {
            err = -errno;
            break;
        }
    }
    while (!err) {
        /* Acquire, before the look: a ring after it ends the wait. */
        uint32_t seen = shi_load_acquire(&m->full);
        int here = all_here(m, n, pids);
        if (here > 0)
            break;
        err = here;
        if (!err && !seen)
            shi_event_wait(&m->full, seen, LOOK_NS);
    }
    uint64_t to = shi_now_ns();
    found->fork_ns = to - from;
    if (m != MAP_FAILED)
        shi_event_ring(&m->end);
    for (i = 0; i < made; i++)
        reap(pids[i]);
    found->exit_ns = shi_now_ns() - to;
    if (m != MAP_FAILED)
        munmap(m, sizeof *m);
    free(pids);
    return err;
}

/* ---- wake-ups of plain processes ---------------------------------------------------------- */

/* Shared with the children; each has a line of its own. */
struct sleepers {
    shi_a32 answered;
    shi_a32 full; /* event: the last of them has answered */
    struct {
        alignas(64) shi_a32 word; /* event: rung once for each round, and to end */
        shi_a32 end;
    } each[];
};

static void sleeper(struct sleepers *s, pid_t parent, uint32_t i, uint32_t n, uint32_t core)
{
    cpu_set_t set;
    uint32_t seen = 0;
    CPU_ZERO(&set);
    CPU_SET(core % CPU_SETSIZE, &set);
    if (prctl(PR_SET_PDEATHSIG, SIGKILL, 0, 0, 0) || getppid() != parent ||
        sched_setaffinity(0, sizeof set, &set))
        _exit(1);
    for (;;) {
        /* Full: who finds that all have answered finds this one on its core. */
        if (shi_fetch_add_full(&s->answered, 1) + 1 == n)
            shi_event_ring(&s->full);
        /* Acquire pairs with the ring, which changes the word before it wakes. */
        while (shi_load_acquire(&s->each[i].word) == seen)
            shi_event_wait(&s->each[i].word, seen, -1);
        seen++;
        if (shi_load_relaxed(&s->each[i].end))
            _exit(0);
    }
}

/* 0 when all have answered, or -ECHILD: one died or was stopped. */
static int all_answered(struct sleepers *s, uint32_t seen, uint32_t n, const pid_t *pids)
{
    for (;;) {
        /* Acquire pairs with the ring of the last to answer. */
        if (shi_load_acquire(&s->full) != seen)
            return 0;
        if (shi_event_wait(&s->full, seen, LOOK_NS) == -ETIMEDOUT &&
            shi_load_acquire(&s->full) == seen) {
            siginfo_t info = { .si_pid = 0 };
            const int look = WEXITED | WSTOPPED | WNOHANG | WNOWAIT;
            uint32_t i;
            for (i = 0; i < n; i++)
                if (waitid(P_PID, (id_t)pids[i], &info, look) || info.si_pid)
                    return -ECHILD;
        }
    }
}

static void wake_round(struct sleepers *s, uint32_t n)
{
    uint32_t i;
    shi_store_relaxed(&s->answered, 0);
    for (i = 0; i < n; i++)
        shi_event_ring(&s->each[i].word);
}

static void rest(uint64_t ns)
{
    struct timespec left = { .tv_sec = (time_t)(ns / 1000000000u),
                             .tv_nsec = (long)(ns % 1000000000u) };
    while (nanosleep(&left, &left) && errno == EINTR)
        ;
}

int shi_wakes(uint32_t n, const uint32_t *cores, struct shi_wakes *w)
{
    size_t room = sizeof(struct sleepers) + n * sizeof(((struct sleepers *)0)->each[0]);
    struct sleepers *s =
        mmap(NULL, room, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    pid_t *pids = calloc(n, sizeof *pids), parent = getpid();
    struct rusage before, after;
    uint32_t i, made = 0, round;
    int err = s == MAP_FAILED || !pids ? -ENOMEM : 0;
    getrusage(RUSAGE_CHILDREN, &before);
    for (; !err && made < n; made++) {
        pids[made] = fork();
        if (!pids[made])
            sleeper(s, parent, made, n, cores[made]);
        if (pids[made] < 0) {
            err = -errno;
            break;
        }
    }
    if (!err)
        err = all_answered(s, 0, n, pids);
    /* The first round is not counted: pages that nobody has touched. */
    for (round = 0; !err && round <= w->rounds; round++) {
        rest(w->gap_ns);                            /* until all of them sleep */
        uint32_t seen = shi_load_acquire(&s->full); /* pairs with the ring before this round */
        uint64_t from = shi_stamp();
        wake_round(s, n);
        err = all_answered(s, seen, n, pids);
        if (round)
            w->ns[round - 1] = (double)shi_stamp_to_ns(shi_stamp() - from);
    }
    for (i = 0; i < made; i++) {
        shi_store_relaxed(&s->each[i].end, 1); /* before the ring, which releases it */
        shi_event_ring(&s->each[i].word);
    }
    for (i = 0; i < made; i++)
        reap(pids[i]);
    getrusage(RUSAGE_CHILDREN, &after);
    w->switches =
        (uint64_t)(after.ru_nvcsw - before.ru_nvcsw + after.ru_nivcsw - before.ru_nivcsw);
    if (s != MAP_FAILED)
        munmap(s, room);
    free(pids);
    return err;
}
