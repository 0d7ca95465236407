/* SPDX-License-Identifier: MIT */
/* call_single_queue by itself: order, who rings, refusal, damage. */
#include "rig.h"

#include <errno.h>

#include "smp/queue.h"

static struct rig rig;

/* Take everything off the owner's queue, oldest first. */
static struct shi_list take(struct shi_self *self)
{
    return shi_queue_in_order(self, shi_queue_grab(self));
}

/* A machine whose CPUs nobody runs: the test is the owner of their queues. */
static void quiet(uint32_t ncpus)
{
    uint32_t i;
    struct shi_header *plan = calloc(1, sizeof *plan);
    CHECK(plan);
    memset(&rig, 0, sizeof rig);
    rig.ncpus = ncpus;
    shi_native_init();
    CHECK(shi_layout_plan(plan, ncpus, 0, 1 << 20, 1 << 20) == 0);
    rig_chip(&plan->chip);
    plan->doorbell = SHI_DB_futex;
    plan->kick_signal = 40;
    CHECK(shi_clock_calibrate(&plan->clock) == 0);
    void *base = mmap(NULL, plan->total_bytes, PROT_READ | PROT_WRITE,
                      MAP_SHARED | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    CHECK(base != MAP_FAILED);
    memcpy(base, plan, sizeof *plan);
    CHECK(shi_machine_attach(&rig.m, base, plan->total_bytes, -1) == 0);
    free(plan);
    CHECK(shi_self_init(&rig.host, &rig.m, ncpus) == 0);
    for (i = 0; i < ncpus; i++) {
        shi_reap_reset(&rig.host, i);
        CHECK(shi_self_init(&rig.cpu[i], &rig.m, i) == 0);
    }
}

static void unquiet(void)
{
    uint32_t i;
    for (i = 0; i < rig.ncpus; i++)
        shi_self_fini(&rig.cpu[i]);
    shi_self_fini(&rig.host);
    CHECK(munmap(rig.m.base, rig.m.total_bytes) == 0);
}

static void set_state(uint32_t cpu, enum shi_state state)
{
    shi_a64 *word = &shi_slot(&rig.m, cpu)->word;
    shi_store_full(word, shi_word_with(shi_load_full(word), state));
}

/* Fill, lock and push a csd of the host: what push says, its index in *local. */
static int push(uint32_t dst, uint64_t type, uint32_t *local)
{
    shi_enter(&rig.host);
    int64_t got = shi_csd_get(&rig.host);
    CHECK(got >= 0);
    struct shi_csd *csd = shi_own_csd(&rig.host, (uint32_t)got);
    memset((char *)csd + 16, 0, sizeof *csd - 16);
    csd->func = SHI_FUNC_NATIVE;
    CHECK(shi_csd_trylock(&rig.host, csd, type, dst) == 0);
    CHECK(shi_csd_trylock(&rig.host, csd, type, dst) == -EBUSY);
    int rc = shi_queue_push(&rig.host, dst, shi_own_index(&rig.host, (uint32_t)got), csd);
    if (rc < 0) {
        shi_csd_cancel(csd);
        CHECK(!shi_csd_locked(csd));
        shi_csd_put(&rig.host, (uint32_t)got);
    }
    shi_leave(&rig.host);
    *local = (uint32_t)got;
    return rc;
}

static void who_rings(void)
{
    uint32_t local;
    quiet(2);
    CHECK(push(1, SHI_CSD_SYNC, &local) == -ENXIO); /* offline until it says otherwise */
    set_state(1, SHI_DEAD);
    CHECK(push(1, SHI_CSD_SYNC, &local) == -ENXIO);
    set_state(1, SHI_HALTED);
    CHECK(push(1, SHI_CSD_SYNC, &local) == SHI_PUSH_RING);
    CHECK(push(1, SHI_CSD_SYNC, &local) == SHI_PUSH_COALESCED);
    CHECK(push(1, SHI_CSD_ASYNC, &local) == SHI_PUSH_COALESCED);
    CHECK(take(&rig.cpu[1]).count == 3);
    CHECK(push(1, SHI_CSD_SYNC, &local) == SHI_PUSH_RING); /* empty again */
    take(&rig.cpu[1]);
    set_state(1, SHI_POLLING);
    CHECK(push(1, SHI_CSD_SYNC, &local) == SHI_PUSH_ELIDED);
    CHECK(push(1, SHI_CSD_SYNC, &local) == SHI_PUSH_COALESCED);
    take(&rig.cpu[1]);
    set_state(1, SHI_RUNNING);
    CHECK(push(1, SHI_CSD_SYNC, &local) == SHI_PUSH_RING);
    unquiet();
}

static void order(void)
{
    uint32_t locals[100], i;
    quiet(2);
    set_state(1, SHI_POLLING);
    for (i = 0; i < 100; i++)
        CHECK(push(1, i % 3 ? SHI_CSD_SYNC : SHI_CSD_ASYNC, &locals[i]) >= 0);
    struct shi_list list = take(&rig.cpu[1]);
    CHECK(list.count == 100);
    for (i = 0; i < 100; i++)
        CHECK(shi_list_pop(&rig.cpu[1], &list) == shi_own_index(&rig.host, locals[i]));
    CHECK(shi_list_pop(&rig.cpu[1], &list) == UINT32_MAX);
    CHECK(list.head == 0 && list.tail == 0 && list.count == 0);
    /* One by one onto a list of the owner's: the same order. */
    for (i = 0; i < 100; i++)
        shi_list_append(&rig.m, &list, shi_own_index(&rig.host, locals[i]));
    for (i = 0; i < 100; i++)
        CHECK(shi_list_pop(&rig.cpu[1], &list) == shi_own_index(&rig.host, locals[i]));
    unquiet();
}

/* A csd for an earlier generation of the CPU, or for another CPU, is not taken. */
static void not_ours(void)
{
    uint32_t local;
    quiet(2);
    set_state(1, SHI_POLLING);
    CHECK(push(1, SHI_CSD_SYNC, &local) >= 0);
    uint32_t index = shi_own_index(&rig.host, local);
    CHECK(shi_csd_is_ours(&rig.cpu[1], index));
    CHECK(!shi_csd_is_ours(&rig.cpu[0], index));
    CHECK(!shi_csd_is_ours(&rig.cpu[1], index + 1)); /* never handed out */
    CHECK(!shi_csd_is_ours(&rig.cpu[1], rig.m.ncsds));
    CHECK(!shi_csd_is_ours(&rig.cpu[1], UINT32_MAX));
    rig.cpu[1].gen++;
    CHECK(!shi_csd_is_ours(&rig.cpu[1], index));
    rig.cpu[1].gen--;
    shi_csd_unlock(&rig.cpu[1], shi_csd(&rig.m, index));
    CHECK(!shi_csd_is_ours(&rig.cpu[1], index));
    unquiet();
}

/* Random links and heads: walks end, and nothing is taken that is not addressed here. */
static void damage(void)
{
    unsigned seed = 5, turn, i;
    uint32_t locals[20];
    quiet(2);
    set_state(1, SHI_POLLING);
    for (i = 0; i < 20; i++)
        CHECK(push(1, SHI_CSD_SYNC, &locals[i]) >= 0);
    uint64_t low = shi_load_full(&shi_slot(&rig.m, 1)->word) & SHI_W_LOW;
    for (turn = 0; turn < 3000; turn++) {
        for (i = 0; i < 20; i++) { /* often among themselves: circles */
            uint32_t next = (uint32_t)rand_r(&seed);
            if (rand_r(&seed) % 4)
                next = shi_own_index(&rig.host, locals[next % 20]) + 1;
            shi_store_relaxed(&shi_own_csd(&rig.host, locals[i])->next, next);
        }
        uint32_t head = (uint32_t)rand_r(&seed);
        if (rand_r(&seed) % 4)
            head = shi_own_index(&rig.host, locals[head % 20]) + 1;
        shi_store_full(&shi_slot(&rig.m, 1)->word, low | (uint64_t)head << SHI_W_HEAD_SHIFT);
        struct shi_list list = take(&rig.cpu[1]);
        uint32_t index, popped = 0;
        while ((index = shi_list_pop(&rig.cpu[1], &list)) != UINT32_MAX) {
            CHECK(shi_csd_is_ours(&rig.cpu[1], index));
            CHECK(++popped <= rig.m.ncsds);
        }
    }
    CHECK(shi_load_relaxed(&shi_slot(&rig.m, 1)->counters[SHI_CTX_TASK][SHI_C_corrupt]) > 0);
    unquiet();
}

/* Many pushers, one owner: everything arrives once, and each pusher's in its order. */
#define PUSHERS 4
#define PUSHES 20000

static void *pusher(void *arg)
{
    struct shi_self *self = arg;
    uint32_t i;
    for (i = 0; i < PUSHES; i++) {
        int64_t local;
        for (;;) {
            shi_enter(self);
            local = shi_nowait_get(self);
            if (local >= 0)
                break;
            shi_leave(self);
            shi_cpu_relax();
        }
        struct shi_csd *csd = shi_own_csd(self, (uint32_t)local);
        csd->func = SHI_FUNC_NATIVE;
        csd->kind = SHI_K_INT;
        csd->value.i = i;
        CHECK(shi_csd_trylock(self, csd, SHI_CSD_ASYNC, 0) == 0);
        CHECK(shi_queue_push(self, 0, shi_own_index(self, (uint32_t)local), csd) >= 0);
        shi_csd_leave(self, (uint32_t)local);
        shi_leave(self);
    }
    return NULL;
}

static void many_pushers(void)
{
    pthread_t threads[PUSHERS];
    int64_t next[PUSHERS + 1] = { 0 };
    uint32_t i, index, done = 0;
    quiet(PUSHERS + 1);
    for (i = 0; i <= PUSHERS; i++)
        set_state(i, SHI_POLLING);
    for (i = 0; i < PUSHERS; i++)
        CHECK(pthread_create(&threads[i], NULL, pusher, &rig.cpu[i + 1]) == 0);
    while (done < PUSHERS * PUSHES) {
        struct shi_list list = take(&rig.cpu[0]);
        while ((index = shi_list_pop(&rig.cpu[0], &list)) != UINT32_MAX) {
            struct shi_csd *csd = shi_csd(&rig.m, index);
            CHECK(csd->src >= 1 && csd->src <= PUSHERS);
            CHECK(csd->value.i == next[csd->src]);
            next[csd->src]++;
            shi_csd_unlock(&rig.cpu[0], csd);
            done++;
        }
    }
    for (i = 0; i < PUSHERS; i++)
        CHECK(pthread_join(threads[i], NULL) == 0);
    CHECK(take(&rig.cpu[0]).count == 0);
    unquiet();
}

int main(void)
{
    who_rings();
    order();
    not_ours();
    damage();
    many_pushers();
    return 0;
}
