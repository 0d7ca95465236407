/* SPDX-License-Identifier: MIT */
/*
 * include/linux/ptr_ring.h between processes: a bounded queue of small numbers, producers
 * under a lock, one consumer without.
 *
 * As there, an entry says by itself whether it is full (not 0), so that the two sides share no
 * index.  And it carries its place in the order (the count of entries made before it, + 1):
 * where a producer was killed between filling an entry and counting it, the next one finds so,
 * and the consumer knows a damaged ring from a whole one.
 */
#ifndef SHI_PTR_RING_H
#define SHI_PTR_RING_H

#include <errno.h>

#include "base/machine.h"

struct shi_ptr_ring {
    _Alignas(SHI_PAIR) shi_a64 lock; /* of the producers: 0, or its holder */
    shi_a64 produced;
    shi_a64 steals;                  /* times that a dead holder lost the lock */
    _Alignas(SHI_PAIR) shi_a64 head; /* consumed so far; stored before the entries are zeroed */
    shi_a64 tail;                    /* zeroed so far */
    _Alignas(SHI_PAIR) shi_a32 size; /* entries in use */
    shi_a32 capacity;                /* entries there is room for: written once */
    _Alignas(SHI_PAIR) shi_a64 queue[];
};

#define SHI_RING_BATCH 16u /* entries zeroed at a time: two lines (__ptr_ring_set_size) */

static inline uint64_t shi_ring_bytes(uint32_t capacity)
{
    uint64_t bytes = sizeof(struct shi_ptr_ring) + (uint64_t)capacity * sizeof(uint64_t);
    return (bytes + SHI_PAIR - 1) / SHI_PAIR * SHI_PAIR;
}

/* A size that may be believed, whatever stands in the segment. */
static inline uint32_t shi_ring_size(const struct shi_ptr_ring *r, uint32_t capacity)
{
    uint32_t size = shi_load_relaxed(&r->size);
    return size && size <= capacity ? size : 1;
}

static inline uint64_t shi_ring_entry(uint64_t count, uint32_t id)
{
    return (count + 1) << 32 | (id + 1);
}

/*
 * The lock of the producers.  0; 1 + the slot of a dead holder who lost it, when the caller has
 * to repair what that one may have left half done; -ETIMEDOUT: its holder is stopped, or does
 * not get its core.
 */
int shi_ring_lock(struct shi_self *self, struct shi_ptr_ring *r);
void shi_ring_unlock(struct shi_self *self, struct shi_ptr_ring *r);

/* Producer, with the lock, after a dead holder: entries that it had filled are counted. */
static inline void shi_ring_repair(struct shi_ptr_ring *r, uint32_t capacity)
{
    uint32_t size = shi_ring_size(r, capacity), n;
    uint64_t p = shi_load_relaxed(&r->produced);
    for (n = 0; n < size; n++, p++) {
        /* Acquire, and the entry first: the consumer publishes its head before it zeroes, so
         * who finds an entry zeroed finds that it was there by the head. */
        uint64_t entry = shi_load_acquire(&r->queue[p % size]);
        if ((!entry || entry >> 32 != (uint32_t)(p + 1)) &&
            (int64_t)(shi_load_acquire(&r->head) - p) <= 0)
            break;
    }
    shi_store_release(&r->produced, p);
}

/* Producer, with the lock: how many of the numbers found room, from the first on. */
static inline uint32_t shi_ring_produce(struct shi_ptr_ring *r, uint32_t capacity,
                                        const shi_a32 *ids, uint32_t n)
{
    uint32_t size = shi_ring_size(r, capacity), k;
    uint64_t p = shi_load_relaxed(&r->produced);
    uint32_t at = (uint32_t)(p % size);
    for (k = 0; k < n; k++, p++) {
        /* Acquire pairs with the consumer's zeroing: it has read what stood here. */
        if (shi_load_acquire(&r->queue[at]))
            break;
        /* Release: the consumer finds the packet as it was filled. */
        shi_store_release(&r->queue[at], shi_ring_entry(p, shi_load_relaxed(&ids[k])));
        if (++at == size)
            at = 0;
    }
    shi_store_release(&r->produced, p);
    return k;
}

/* __ptr_ring_empty, by the consumer. */
static inline bool shi_ring_empty(const struct shi_ptr_ring *r, uint32_t capacity)
{
    uint64_t head = shi_load_relaxed(&r->head);
    /* Acquire pairs with the producer's release of the entry. */
    return !shi_load_acquire(&r->queue[head % shi_ring_size(r, capacity)]);
}

/* Consumer: the next numbers, at most `n`, without taking them.  -EBADMSG: damaged. */
static inline int shi_ring_peek(const struct shi_ptr_ring *r, uint32_t capacity, shi_a32 *ids,
                                uint32_t n)
{
    uint32_t size = shi_ring_size(r, capacity), k;
    uint64_t h = shi_load_relaxed(&r->head);
    uint32_t at = (uint32_t)(h % size);
    if (n > size)
        n = size;
    for (k = 0; k < n; k++, h++) {
        /* Acquire pairs with the producer's release: the packet as it was filled. */
        uint64_t entry = shi_load_acquire(&r->queue[at]);
        if (!entry)
            break;
        if (entry >> 32 != (uint32_t)(h + 1) || !(uint32_t)entry)
            return k ? (int)k : -EBADMSG;
        shi_store_relaxed(&ids[k], (uint32_t)entry - 1);
        if (++at == size)
            at = 0;
    }
    return (int)k;
}

/* Consumer: entries up to the head are given back to the producers, latest first: they wait
 * for the one that is given back last (__ptr_ring_discard_one). */
static inline void shi_ring_zero(struct shi_ptr_ring *r, uint32_t capacity)
{
    uint32_t size = shi_ring_size(r, capacity);
    uint64_t h = shi_load_relaxed(&r->head), t = shi_load_relaxed(&r->tail), at;
    if (h - t > size)
        t = h - size;
    for (at = h; at != t; at--)
        shi_store_release(&r->queue[(at - 1) % size], 0);
    shi_store_relaxed(&r->tail, h);
}

/* Consumer: `n` of those that were peeked at are taken. */
static inline void shi_ring_take(struct shi_ptr_ring *r, uint32_t capacity, uint32_t n)
{
    uint32_t size = shi_ring_size(r, capacity);
    uint32_t batch = SHI_RING_BATCH > size / 2 ? 1 : SHI_RING_BATCH;
    uint64_t h = shi_load_relaxed(&r->head) + n;
    shi_store_release(&r->head, h);
    if (h - shi_load_relaxed(&r->tail) >= batch)
        shi_ring_zero(r, capacity);
}

#endif
