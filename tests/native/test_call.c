/* SPDX-License-Identifier: MIT */
/* Calls from many senders to halting CPUs: each runs exactly once, none is lost. */
#include "rig.h"

#define SENDERS 3
#define CALLS 4000

static struct rig rig;
static uint64_t counted; /* offset of a word in the arrays window */
static pthread_mutex_t one_host = PTHREAD_MUTEX_INITIALIZER;

static void *sender(void *arg)
{
    unsigned seed = (unsigned)(uintptr_t)arg;
    int i;
    (void)one_host;
    for (i = 0; i < CALLS; i++) {
        uint32_t dst = (uint32_t)rand_r(&seed) % rig.ncpus;
        CHECK(rig_call(&rig.host, dst, 1, counted + dst * 8, SHI_K_POINTER) == 0);
    }
    return NULL;
}

static void storm(enum shi_idle idle)
{
    pthread_t threads[SENDERS];
    uint64_t total = 0, i;
    rig_boot(&rig, 4, idle);
    counted = rig.m.array_offset;
    for (i = 0; i < SENDERS; i++)
        CHECK(pthread_create(&threads[i], NULL, sender, (void *)(uintptr_t)(i + 1)) == 0);
    for (i = 0; i < SENDERS; i++)
        CHECK(pthread_join(threads[i], NULL) == 0);
    CHECK(rig_call(&rig.host, rig.ncpus, 0, 0, SHI_K_NONE) == -6); /* -ENXIO */
    for (i = 0; i < rig.ncpus; i++)
        total += shi_load_relaxed((shi_a64 *)(void *)(rig.m.base + counted) + i);
    CHECK(total == SENDERS * CALLS);
    rig_stop(&rig);
}

int main(void)
{
    storm(SHI_IDLE_HALT);
    storm(SHI_IDLE_HALTPOLL);
    storm(SHI_IDLE_POLL);
    return 0;
}
