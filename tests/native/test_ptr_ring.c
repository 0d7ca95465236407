/* SPDX-License-Identifier: MIT */
/* The bounded ring of RPS and cpumap: full, round the end, in order, and a producer's death. */
#include "rig.h"

#include "users/ptr_ring.h"

#define ROOM 8u
#define STREAM 20000u

static struct rig rig;
static struct shi_ptr_ring *ring;

static void reset(uint32_t size)
{
    memset(ring, 0, shi_ring_bytes(ROOM));
    shi_store_relaxed(&ring->capacity, ROOM);
    shi_store_relaxed(&ring->size, size);
}

static uint32_t produce(uint32_t first, uint32_t n)
{
    shi_a32 ids[2 * ROOM];
    uint32_t k;
    for (k = 0; k < n; k++)
        shi_store_relaxed(&ids[k], first + k);
    return shi_ring_produce(ring, ROOM, ids, n);
}

/* Take `n`: they are `first` and on. */
static void consume(uint32_t first, uint32_t n)
{
    shi_a32 ids[2 * ROOM];
    uint32_t k;
    CHECK(shi_ring_peek(ring, ROOM, ids, n) == (int)n);
    for (k = 0; k < n; k++)
        CHECK(shi_load_relaxed(&ids[k]) == first + k);
    shi_ring_take(ring, ROOM, n);
}

static void full_takes_what_fits_and_no_more(void)
{
    shi_a32 id;
    reset(ROOM);
    CHECK(shi_ring_empty(ring, ROOM) && shi_ring_peek(ring, ROOM, &id, 1) == 0);
    CHECK(produce(0, 5) == 5);
    CHECK(produce(5, 5) == 3);
    CHECK(produce(9, 1) == 0);
    consume(0, 1);
    CHECK(produce(8, 2) == 1);
    consume(1, ROOM);
    CHECK(shi_ring_empty(ring, ROOM));
    /* A number 0 is an entry, too: the ring keeps it + 1. */
    CHECK(produce(0, 1) == 1 && !shi_ring_empty(ring, ROOM));
    reset(3); /* less than there is room for */
    CHECK(produce(0, ROOM) == 3);
}

static void in_order_round_the_end_and_where_counts_come_round(void)
{
    static const uint64_t starts[] = { 0, UINT32_MAX - 5, 5 };
    uint32_t i, k, n, next, size;
    for (i = 0; i < 3; i++)
        for (size = 1; size <= ROOM; size++) {
            reset(size);
            shi_store_relaxed(&ring->produced, starts[i]);
            shi_store_relaxed(&ring->head, starts[i]);
            shi_store_relaxed(&ring->tail, starts[i]);
            for (k = next = 0; k < 50; k++, next += n) {
                n = 1 + k % size;
                CHECK(produce(next, n) == n);
                consume(next, n);
            }
            CHECK(shi_ring_empty(ring, ROOM));
            CHECK(shi_load_relaxed(&ring->head) == shi_load_relaxed(&ring->produced));
        }
}

/* Killed between an entry and its count: the next producer counts it, and goes on behind. */
static void a_dead_producer_leaves_what_it_had_filled(void)
{
    struct shi_self *dead = &rig.cpu[0], *next = &rig.cpu[1];
    reset(ROOM);
    rig_set_state(&rig, 0, SHI_RUNNING);
    rig_set_state(&rig, 1, SHI_RUNNING);
    CHECK(shi_ring_lock(dead, ring) == 0);
    CHECK(produce(0, 3) == 3);
    shi_store_relaxed(&ring->produced, 1);          /* as if two of them were not counted yet */
    CHECK(shi_ring_lock(next, ring) == -ETIMEDOUT); /* it may only be slow */
    rig_set_state(&rig, 0, SHI_DEAD);
    CHECK(shi_ring_lock(next, ring) == 1); /* 1 + its slot */
    shi_ring_repair(ring, ROOM);
    CHECK(shi_load_relaxed(&ring->produced) == 3 && shi_load_relaxed(&ring->steals) == 1);
    CHECK(produce(3, 2) == 2);
    shi_ring_unlock(dead, ring); /* not its lock any more: nothing */
    CHECK(shi_load_relaxed(&ring->lock) != 0);
    shi_ring_unlock(next, ring);
    CHECK(shi_load_relaxed(&ring->lock) == 0);
    consume(0, 5);
    /* All that it had filled is taken already, zeroed or not: counted all the same. */
    CHECK(produce(5, 3) == 3);
    shi_store_relaxed(&ring->produced, 5);
    consume(5, 3);
    shi_ring_repair(ring, ROOM);
    CHECK(shi_load_relaxed(&ring->produced) == 8);
    rig_set_state(&rig, 0, SHI_RUNNING);
}

static void a_damaged_entry_is_told_from_an_empty_one(void)
{
    shi_a32 ids[ROOM];
    reset(ROOM);
    CHECK(produce(0, 3) == 3);
    shi_store_relaxed(&ring->queue[1], shi_ring_entry(7, 1)); /* of another turn */
    CHECK(shi_ring_peek(ring, ROOM, ids, 3) == 1);
    shi_ring_take(ring, ROOM, 1);
    CHECK(shi_ring_peek(ring, ROOM, ids, 3) == -EBADMSG);
    shi_store_relaxed(&ring->size, 1000); /* nor is a size believed that has no room */
    CHECK(shi_ring_size(ring, ROOM) == 1);
}

static void *producer(void *arg)
{
    struct shi_self *self = arg;
    uint32_t sent = 0, base = self->id * STREAM;
    while (sent < STREAM) {
        int got = shi_ring_lock(self, ring);
        CHECK(got == 0 || got == -ETIMEDOUT);
        if (got)
            continue;
        uint32_t took = produce(base + sent, STREAM - sent < 3 ? STREAM - sent : 3);
        shi_ring_unlock(self, ring);
        sent += took;
        if (!took)
            sched_yield();
    }
    return NULL;
}

/* Two producers under the lock, a consumer without: each one's in order, none lost or doubled. */
static void each_producers_in_order(void)
{
    pthread_t thread[2];
    uint32_t next[2] = { 0, 0 }, total = 0, i;
    reset(ROOM);
    for (i = 0; i < 2; i++)
        CHECK(pthread_create(&thread[i], NULL, producer, &rig.cpu[i]) == 0);
    while (total < 2 * STREAM) {
        shi_a32 ids[ROOM];
        int n = shi_ring_peek(ring, ROOM, ids, ROOM), k;
        CHECK(n >= 0);
        for (k = 0; k < n; k++, total++) {
            uint32_t id = shi_load_relaxed(&ids[k]), from = id / STREAM;
            CHECK(from < 2 && id % STREAM == next[from]);
            next[from]++;
        }
        shi_ring_take(ring, ROOM, (uint32_t)n);
        if (!n) {
            shi_ring_zero(ring, ROOM);
            sched_yield();
        }
    }
    for (i = 0; i < 2; i++)
        CHECK(pthread_join(thread[i], NULL) == 0);
    CHECK(shi_ring_empty(ring, ROOM) && shi_load_relaxed(&ring->steals) == 0);
}

int main(void)
{
    rig_quiet(&rig, 2);
    ring = aligned_alloc(SHI_PAIR, shi_ring_bytes(ROOM));
    CHECK(ring != NULL);
    full_takes_what_fits_and_no_more();
    in_order_round_the_end_and_where_counts_come_round();
    a_dead_producer_leaves_what_it_had_filled();
    a_damaged_entry_is_told_from_an_empty_one();
    each_producers_in_order();
    free(ring);
    rig_unquiet(&rig);
    return 0;
}
