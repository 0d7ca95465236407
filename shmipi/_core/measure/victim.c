/* SPDX-License-Identifier: MIT */
#include "base/sys.h"

#include <errno.h>
#include <linux/membarrier.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdio.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "base/atomics.h"
#include "base/clock.h"
#include "measure/bench.h"
#include "measure/victim.h"

struct worker {
    struct shi_victim *v;
    shi_a32 state; /* 0 starting, 1 working, 2 done, else FAILED | errno */
};

#define FAILED 0x80000000u

uint64_t shi_thread_waited(void)
{
    unsigned long long ran, waited;
    FILE *file = fopen("/proc/thread-self/schedstat", "re");
    int n = file ? fscanf(file, "%llu %llu", &ran, &waited) : 0;
    if (file)
        fclose(file);
    return n == 2 ? waited : 0;
}

static void *work(void *arg)
{
    struct worker *w = arg;
    cpu_set_t set;
    CPU_ZERO(&set);
    CPU_SET(w->v->core % CPU_SETSIZE, &set);
    if (sched_setaffinity(0, sizeof set, &set)) {
        shi_store_release(&w->state, FAILED | (uint32_t)errno);
        return NULL;
    }
    uint64_t before = shi_thread_waited();
    shi_store_release(&w->state, 1);
    w->v->units = shi_bench_work(w->v->ns);
    w->v->waited_ns = shi_thread_waited() - before;
    /* Release pairs with the caller's acquire: then the units are there. */
    shi_store_release(&w->state, 2);
    return NULL;
}

static int call_on_schedule(struct worker *w)
{
    uint64_t from = shi_stamp();
    while (shi_load_acquire(&w->state) == 1) {
        uint64_t due = w->v->calls * w->v->period_ns;
        if (!w->v->period_ns || shi_stamp_to_ns(shi_stamp() - from) < due) {
            shi_cpu_relax();
            continue;
        }
        if (syscall(SYS_membarrier, MEMBARRIER_CMD_PRIVATE_EXPEDITED, 0, 0) < 0)
            return -errno;
        w->v->calls++;
    }
    return 0;
}

int shi_membarrier_victim(struct shi_victim *v)
{
    struct worker w = { .v = v };
    sigset_t all, old;
    pthread_t thread;
    uint32_t state;
    v->units = v->calls = v->waited_ns = 0;
    if (syscall(SYS_membarrier, MEMBARRIER_CMD_REGISTER_PRIVATE_EXPEDITED, 0, 0) < 0)
        return -errno;
    /* Signals of the process are for its own threads, not for this one. */
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &old);
    int err = -pthread_create(&thread, NULL, work, &w);
    pthread_sigmask(SIG_SETMASK, &old, NULL);
    if (err)
        return err;
    /* Acquire pairs with the thread's release: it is on its core. */
    while (!(state = shi_load_acquire(&w.state)))
        sched_yield();
    if (!(state & FAILED))
        err = call_on_schedule(&w);
    pthread_join(thread, NULL);
    state = shi_load_relaxed(&w.state);
    return state & FAILED ? -(int)(state & ~FAILED) : err;
}
