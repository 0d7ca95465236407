/* SPDX-License-Identifier: MIT */
/* call_single_queue by itself: order, who rings, refusal, damage. */
#include "rig.h"

#include <errno.h>

#include "smp/queue.h"

static struct rig rig;

#define quiet(n) rig_quiet(&rig, n)
#define unquiet() rig_unquiet(&rig)
#define set_state(cpu, state) rig_set_state(&rig, cpu, state)
#define push(dst, type, local) rig_push(&rig, dst, type, local)

/* Take everything off the owner's queue, oldest first. */
static struct shi_list take(struct shi_self *self)
{
    return shi_queue_in_order(self, shi_queue_grab(self));
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
    CHECK(push(1, SHI_CSD_SYNC, &local) == SHI_PUSH_POLLS);
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

/* As much as is read in one go, newest first; more, or a link that is wrong, is for lists. */
static void batch(void)
{
    uint32_t locals[SHI_QUEUE_BATCH + 1], found[SHI_QUEUE_BATCH], i;
    quiet(2);
    set_state(1, SHI_POLLING);
    for (i = 0; i < SHI_QUEUE_BATCH; i++)
        CHECK(push(1, SHI_CSD_ASYNC, &locals[i]) >= 0);
    uint32_t newest = shi_queue_grab(&rig.cpu[1]);
    CHECK(shi_queue_read(&rig.cpu[1], newest, found) == SHI_QUEUE_BATCH);
    for (i = 0; i < SHI_QUEUE_BATCH; i++)
        CHECK(found[i] == shi_own_index(&rig.host, locals[SHI_QUEUE_BATCH - 1 - i]));
    CHECK(shi_queue_read(&rig.cpu[0], newest, found) == 0); /* another CPU's */
    shi_a32 *link = &shi_own_csd(&rig.host, locals[7])->next;
    uint32_t whole = shi_load_relaxed(link);
    shi_store_relaxed(link, newest); /* a circle */
    CHECK(shi_queue_read(&rig.cpu[1], newest, found) == 0);
    shi_store_relaxed(link, UINT32_MAX); /* out of the segment */
    CHECK(shi_queue_read(&rig.cpu[1], newest, found) == 0);
    shi_store_relaxed(link, whole);
    CHECK(shi_queue_in_order(&rig.cpu[1], newest).count == SHI_QUEUE_BATCH);
    unquiet();
    quiet(2);
    set_state(1, SHI_POLLING);
    for (i = 0; i <= SHI_QUEUE_BATCH; i++)
        CHECK(push(1, SHI_CSD_ASYNC, &locals[i]) >= 0);
    newest = shi_queue_grab(&rig.cpu[1]);
    CHECK(shi_queue_read(&rig.cpu[1], newest, found) == 0);
    CHECK(shi_queue_in_order(&rig.cpu[1], newest).count == SHI_QUEUE_BATCH + 1);
    unquiet();
}

static uint64_t ran[3 * SHI_QUEUE_BATCH];
static uint32_t nran;

static void note(void *info)
{
    ran[nran++] = (uint64_t)(uintptr_t)info;
}

/* Of each kind the oldest first, and those that are waited for before the others; the same in
 * one go, and in lists. */
static void kinds(void)
{
    int number = shi_native_register("note", note);
    uint32_t n, i, sync;
    CHECK(number >= 0);
    for (n = 2; n < 3 * SHI_QUEUE_BATCH; n += n < 6 ? 1 : SHI_QUEUE_BATCH / 2) {
        quiet(2);
        set_state(1, SHI_POLLING);
        for (i = sync = 0; i < n; i++) {
            const struct shi_call call = { .func = SHI_FUNC_NATIVE | (uint32_t)number,
                                           .kind = SHI_K_INT,
                                           .apply = SHI_A_INFO,
                                           .value.u = i };
            int64_t local = shi_call_prepare(&rig.host, &call);
            CHECK(local >= 0);
            shi_enter(&rig.host);
            CHECK(shi_call_single(&rig.host, (uint32_t)local,
                                  i % 3 == 1 ? SHI_CSD_SYNC : SHI_CSD_ASYNC, 1) == 0);
            shi_leave(&rig.host);
            sync += i % 3 == 1;
        }
        nran = 0;
        rig.m.drain(&rig.cpu[1]);
        CHECK(nran == n);
        for (i = 0; i < n; i++)
            CHECK((ran[i] % 3 == 1) == (i < sync));
        for (i = 1; i < n; i++)
            CHECK(i == sync || ran[i - 1] < ran[i]);
        for (i = 0; i < rig.host.sender.csd_top; i++)
            CHECK(!shi_csd_locked(shi_own_csd(&rig.host, i)));
        unquiet();
    }
}

/* Nobody waits for a target that is slow, or stopped, while another has made room. */
static void room_behind_the_oldest(void)
{
    const struct shi_call call = { .func = SHI_FUNC_NATIVE, .apply = SHI_A_INFO };
    uint32_t i;
    quiet(2);
    set_state(0, SHI_HALTED);
    set_state(1, SHI_POLLING);
    CHECK(shi_call_post(&rig.host, &call, SHI_CSD_ASYNC, 0) >= 0); /* not taken up */
    for (i = 1; i < SHI_NOWAIT_POOL; i++)
        CHECK(shi_call_post(&rig.host, &call, SHI_CSD_ASYNC, 1) >= 0);
    CHECK(shi_call_post(&rig.host, &call, SHI_CSD_ASYNC, 1) == -EAGAIN);
    rig.m.drain(&rig.cpu[1]);
    for (i = 1; i < SHI_NOWAIT_POOL; i++)
        CHECK(shi_call_post(&rig.host, &call, SHI_CSD_ASYNC, 1) >= 0);
    CHECK(shi_call_post(&rig.host, &call, SHI_CSD_ASYNC, 1) == -EAGAIN);
    rig.m.drain(&rig.cpu[1]);
    rig.m.drain(&rig.cpu[0]);
    shi_enter(&rig.host);
    shi_csd_collect(&rig.host);
    CHECK(!rig.host.sender.nowait && rig.host.sender.nfree == rig.host.sender.csd_top);
    shi_leave(&rig.host);
    unquiet();
}

static void link_to(uint32_t local, uint32_t next)
{
    shi_store_relaxed(&shi_own_csd(&rig.host, local)->next, next);
}

/* What valid() is for: it finds each way in which links can be wrong, and nothing in whole
 * ones. */
static void valid(void)
{
    uint32_t locals[3], i, first, last;
    struct shi_list list;
    quiet(2);
    shi_a64 *word = &shi_slot(&rig.m, 1)->word;
    set_state(1, SHI_RUNNING);
    CHECK(shi_queue_valid(&rig.m, 1, shi_load_full(word)) == 0);
    for (i = 0; i < 3; i++)
        CHECK(push(1, SHI_CSD_SYNC, &locals[i]) >= 0);
    uint64_t w = shi_load_full(word);
    first = shi_own_index(&rig.host, locals[0]) + 1;
    last = shi_own_index(&rig.host, locals[2]) + 1;
    CHECK(shi_queue_valid(&rig.m, 1, w) == 3);
    CHECK(shi_queue_valid(&rig.m, 0, w) == -EBADMSG); /* of another CPU */
    CHECK(shi_queue_valid(&rig.m, 1, w + (1ull << SHI_W_GEN_SHIFT)) == -EBADMSG);
    CHECK(shi_queue_valid(&rig.m, 1, w | UINT64_MAX << SHI_W_HEAD_SHIFT) == -EBADMSG);
    link_to(locals[0], last); /* a circle */
    CHECK(shi_queue_valid(&rig.m, 1, w) == -EBADMSG);
    link_to(locals[0], UINT32_MAX); /* out of the segment */
    CHECK(shi_queue_valid(&rig.m, 1, w) == -EBADMSG);
    link_to(locals[0], 0);
    struct shi_csd *middle = shi_own_csd(&rig.host, locals[1]);
    uint64_t lock = shi_load_full(&middle->lock);
    shi_store_full(&middle->lock, lock & ~SHI_CSD_LOCK); /* unlocked, and still queued */
    CHECK(shi_queue_valid(&rig.m, 1, w) == -EBADMSG);
    shi_store_full(&middle->lock, lock);
    middle->src++;
    CHECK(shi_queue_valid(&rig.m, 1, w) == -EBADMSG);
    middle->src--;
    CHECK(shi_queue_valid(&rig.m, 1, w) == 3);

    list = take(&rig.cpu[1]);
    struct shi_list whole = list;
    CHECK(shi_list_valid(&rig.cpu[1], &list) == 3);
    CHECK(shi_list_valid(&rig.cpu[0], &list) == -EBADMSG);
    list.count = 2;
    CHECK(shi_list_valid(&rig.cpu[1], &list) == -EBADMSG);
    list = whole;
    list.tail = first;
    CHECK(shi_list_valid(&rig.cpu[1], &list) == -EBADMSG);
    list = whole;
    link_to(locals[2], first); /* the last goes back to the first */
    CHECK(shi_list_valid(&rig.cpu[1], &list) == -EBADMSG);
    link_to(locals[2], 0);
    CHECK(shi_list_valid(&rig.cpu[1], &list) == 3);
    while (shi_list_pop(&rig.cpu[1], &list) != UINT32_MAX)
        CHECK(shi_list_valid(&rig.cpu[1], &list) == (int)list.count);
    CHECK(shi_list_valid(&rig.cpu[1], &list) == 0);
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
    batch();
    kinds();
    room_behind_the_oldest();
    valid();
    many_pushers();
    return 0;
}
