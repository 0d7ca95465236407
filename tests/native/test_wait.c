/* SPDX-License-Identifier: MIT */
/* csd_lock_wait by itself: what ends it, in time and out of it. */
#include "rig.h"

#include "smp/wait.h"

static struct rig rig;

#define MS 1000000ll
#define LONG (20000 * MS)

static bool never(const void *arg)
{
    (void)arg;
    return false;
}

static bool at_once(const void *arg)
{
    return arg == NULL;
}

/* Reasons not to sleep are found before; the state is as it was after. */
static void halts(void)
{
    rig_quiet(&rig, 1);
    struct shi_self *cpu = &rig.cpu[0];
    shi_a64 *word = &cpu->slot->word;
    uint64_t start = shi_now_ns();
    rig_set_state(&rig, 0, SHI_POLLING);
    CHECK(shi_halt_until(cpu, at_once, NULL, LONG) == 0);
    shi_fetch_or_full(word, SHI_W_NEED_RESCHED);
    CHECK(shi_halt_until(cpu, never, NULL, LONG) == 0);
    shi_fetch_and_full(word, ~SHI_W_NEED_RESCHED);
    shi_fetch_or_full(word, SHI_W_PENDING);
    CHECK(shi_halt_until(cpu, NULL, NULL, LONG) == 0);
    shi_fetch_and_full(word, ~SHI_W_PENDING);
    CHECK(shi_now_ns() - start < (uint64_t)LONG);
    CHECK(shi_halt_until(cpu, NULL, NULL, MS) == -ETIMEDOUT);
    CHECK(shi_word_state(shi_load_full(word)) == SHI_POLLING);
    rig_set_state(&rig, 0, SHI_RUNNING);
    cpu->irqs_off = 1; /* what is pending is not served, so it is no reason */
    shi_fetch_or_full(word, SHI_W_PENDING);
    CHECK(shi_halt_until(cpu, never, NULL, MS) == -ETIMEDOUT);
    CHECK(shi_word_state(shi_load_full(word)) == SHI_RUNNING);
    CHECK(cpu->happened); /* and is not forgotten */
    cpu->irqs_off = cpu->happened = 0;
    rig_set_state(&rig, 0, SHI_DEAD);
    CHECK(shi_halt_until(cpu, never, NULL, LONG) == 0);
    rig_unquiet(&rig);
}

/* A csd of `self` that is queued at CPU 1. */
static uint32_t call(struct shi_self *self)
{
    const struct shi_call noop = { .func = SHI_FUNC_NATIVE };
    rig_set_state(&rig, 1, SHI_POLLING);
    int64_t local = shi_call_post(self, &noop, SHI_CSD_SYNC, 1);
    CHECK(local >= 0);
    return (uint32_t)local;
}

static void boot(void)
{
    rig_quiet(&rig, 2);
    rig_set_state(&rig, 0, SHI_RUNNING);
}

static int wait_for(struct shi_self *self, uint32_t local, uint64_t deadline_ns)
{
    struct shi_wait wait;
    int why;
    shi_wait_begin(self, &wait, shi_own_index(self, local), 1, deadline_ns);
    why = shi_wait_spin(self, &wait, 0);
    while (why > 0)
        why = shi_wait_sleep(self, &wait);
    shi_wait_end(self, &wait);
    CHECK(self->host || shi_load_full(&self->slot->waiting_for) == 0);
    return why;
}

static void *answer(void *csd)
{
    /* When it sleeps: an unlock that finds PARKED rings. */
    while (!(shi_load_acquire(&((struct shi_csd *)csd)->lock) & SHI_CSD_PARKED))
        sched_yield();
    shi_csd_unlock(&rig.cpu[1], csd);
    return NULL;
}

static void woken_by_the_answer(void)
{
    uint32_t i, turn;
    boot();
    rig.cpu[0].in_task = true;
    for (turn = 0; turn < 100; turn++)
        for (i = 0; i < 2; i++) {
            struct shi_self *self = i ? &rig.host : &rig.cpu[0];
            uint32_t local = call(self);
            pthread_t thread;
            CHECK(pthread_create(&thread, NULL, answer, shi_own_csd(self, local)) == 0);
            CHECK(wait_for(self, local, 0) == SHI_WAIT_DONE);
            CHECK(pthread_join(thread, NULL) == 0);
            shi_queue_grab(&rig.cpu[1]);
            shi_call_end(self, local);
        }
    CHECK(shi_word_state(shi_load_full(&rig.cpu[0].slot->word)) == SHI_RUNNING);
    rig_unquiet(&rig);
}

static void out_of_time(void)
{
    boot();
    uint32_t local = call(&rig.cpu[0]), mine = call(&rig.host);
    CHECK(wait_for(&rig.cpu[0], local, shi_now_ns() + 2 * MS) == -ETIMEDOUT);
    CHECK(wait_for(&rig.host, mine, shi_now_ns() + 2 * MS) == -ETIMEDOUT);
    CHECK(shi_csd_locked(shi_own_csd(&rig.cpu[0], local))); /* the queue's, as before */
    rig_unquiet(&rig);
}

/* While it waits it serves what is sent to it; with interrupts off it does not. */
static void serves_its_own_queue(void)
{
    const struct shi_call noop = { .func = SHI_FUNC_NATIVE };
    shi_a64 *run = &rig.cpu[0].slot->counters[SHI_CTX_TASK][SHI_C_native_run];
    boot();
    run = &rig.cpu[0].slot->counters[SHI_CTX_TASK][SHI_C_native_run];
    uint32_t local = call(&rig.cpu[0]);
    CHECK(shi_call_post(&rig.host, &noop, SHI_CSD_ASYNC, 0) >= 0);
    rig.cpu[0].irqs_off = 1;
    CHECK(wait_for(&rig.cpu[0], local, shi_now_ns() + 2 * MS) == -ETIMEDOUT);
    CHECK(shi_load_full(run) == 0);
    rig.cpu[0].irqs_off = 0;
    CHECK(wait_for(&rig.cpu[0], local, shi_now_ns() + 2 * MS) == -ETIMEDOUT);
    CHECK(shi_load_full(run) == 1);
    rig_unquiet(&rig);
}

static struct shi_csd *waited_for;
static uint32_t nruns, more_number;

/* Each call is followed by another; with the third the answer comes. */
static void more(void *info)
{
    const struct shi_call call = { .func = SHI_FUNC_NATIVE | more_number };
    (void)info;
    if (++nruns == 3)
        shi_csd_unlock(&rig.cpu[1], waited_for);
    if (nruns < 1000)
        CHECK(shi_call_post(&rig.host, &call, SHI_CSD_ASYNC, 0) >= 0);
}

/* What it serves does not end: the answer is seen all the same. */
static void answered_under_a_flood(void)
{
    boot();
    nruns = 0;
    more_number = (uint32_t)shi_native_register("more", more);
    const struct shi_call first = { .func = SHI_FUNC_NATIVE | more_number };
    uint32_t local = call(&rig.cpu[0]);
    waited_for = shi_own_csd(&rig.cpu[0], local);
    CHECK(shi_call_post(&rig.host, &first, SHI_CSD_ASYNC, 0) >= 0);
    CHECK(wait_for(&rig.cpu[0], local, 0) == SHI_WAIT_DONE);
    CHECK(nruns == 3);
    rig_unquiet(&rig);
}

static void a_circle_is_told(void)
{
    boot();
    uint32_t local = call(&rig.cpu[0]);
    uint64_t entry = (uint64_t)(shi_own_index(&rig.cpu[0], local) + 1) << 32;
    rig.cpu[0].irqs_off = 1;
    /* CPU 1 waits for CPU 0, with interrupts on: it will answer. */
    shi_store_full(&rig.cpu[1].slot->waiting_for, 1 | entry);
    CHECK(wait_for(&rig.cpu[0], local, shi_now_ns() + 5 * MS) == -ETIMEDOUT);
    shi_store_full(&rig.cpu[1].slot->waiting_for, 1 | SHI_WAITS_IRQS_OFF | entry);
    CHECK(wait_for(&rig.cpu[0], local, shi_now_ns() + LONG) == -EDEADLK);
    rig_unquiet(&rig);
}

static void the_machine_ends(void)
{
    boot();
    uint32_t local = call(&rig.cpu[0]);
    shi_store_full(&rig.m.header->machine_state, SHI_M_DEAD);
    CHECK(wait_for(&rig.cpu[0], local, 0) == -EOWNERDEAD);
    rig_unquiet(&rig);
}

int main(void)
{
    halts();
    woken_by_the_answer();
    out_of_time();
    serves_its_own_queue();
    answered_under_a_flood();
    a_circle_is_told();
    the_machine_ends();
    return 0;
}
