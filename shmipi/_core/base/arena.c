/* SPDX-License-Identifier: MIT */
#include "base/sys.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "base/arena.h"
#include "base/segment.h"

/* Freed blocks of this size give their pages back to the system. */
#define PUNCH_BYTES (1u << 20)

static void push_free(struct shi_arena *a, uint32_t block, uint32_t order)
{
    a->order[block] = (uint8_t)(order + 1);
    a->is_free[block] = 1;
    a->prev[block] = 0;
    a->next[block] = a->head[order];
    if (a->head[order])
        a->prev[a->head[order] - 1] = block + 1;
    a->head[order] = block + 1;
}

static void drop_free(struct shi_arena *a, uint32_t block, uint32_t order)
{
    uint32_t next = a->next[block], prev = a->prev[block];
    if (prev)
        a->next[prev - 1] = next;
    else
        a->head[order] = next;
    if (next)
        a->prev[next - 1] = prev;
    a->is_free[block] = 0;
}

static uint32_t order_for(uint64_t length)
{
    uint32_t order = 0;
    while ((1ull << (SHI_ARENA_MIN_SHIFT + order)) < length)
        order++;
    return order;
}

int shi_arena_init(struct shi_arena *a, const struct shi_machine *m, uint64_t file_offset,
                   uint64_t bytes)
{
    memset(a, 0, sizeof *a);
    a->m = m;
    a->file_offset = file_offset;
    a->top_order = order_for(bytes);
    if (bytes != 1ull << (SHI_ARENA_MIN_SHIFT + a->top_order) ||
        a->top_order >= SHI_ARENA_ORDERS)
        return -EINVAL;
    a->bytes = bytes;
    a->nblocks = (uint32_t)(bytes >> SHI_ARENA_MIN_SHIFT);
    /* calloc: pages of the tables that are never needed are never touched. */
    a->order = calloc(a->nblocks, 1);
    a->is_free = calloc(a->nblocks, 1);
    a->next = calloc(a->nblocks, sizeof *a->next);
    a->prev = calloc(a->nblocks, sizeof *a->prev);
    a->backed = calloc((bytes >> SHI_ARENA_BACK_SHIFT) + 1, 1);
    if (!a->order || !a->is_free || !a->next || !a->prev || !a->backed) {
        shi_arena_fini(a);
        return -ENOMEM;
    }
    push_free(a, 0, a->top_order);
    return 0;
}

void shi_arena_fini(struct shi_arena *a)
{
    free(a->order);
    free(a->is_free);
    free(a->next);
    free(a->prev);
    free(a->backed);
    memset(a, 0, sizeof *a);
}

static int back(struct shi_arena *a, uint64_t offset, uint64_t length)
{
    uint64_t first = offset >> SHI_ARENA_BACK_SHIFT;
    uint64_t last = (offset + length - 1) >> SHI_ARENA_BACK_SHIFT;
    uint64_t i, todo = 0;
    for (i = first; i <= last; i++)
        todo += !a->backed[i];
    if (!todo)
        return 0;
    uint64_t from = first << SHI_ARENA_BACK_SHIFT;
    uint64_t to = (last + 1) << SHI_ARENA_BACK_SHIFT;
    if (to > a->bytes)
        to = a->bytes;
    int err = shi_machine_back(a->m, a->file_offset + from, to - from);
    if (err)
        return err;
    memset(a->backed + first, 1, last - first + 1);
    return 0;
}

int64_t shi_arena_alloc(struct shi_arena *a, uint64_t length)
{
    if (length > a->bytes)
        return -E2BIG;
    uint32_t want = order_for(length), order = want;
    while (order <= a->top_order && !a->head[order])
        order++;
    if (order > a->top_order)
        return -ENOBUFS;
    uint32_t block = a->head[order] - 1;
    drop_free(a, block, order);
    while (order > want) {
        order--;
        push_free(a, block + (1u << order), order); /* keep the lower half: dense */
    }
    a->order[block] = (uint8_t)(want + 1);
    uint64_t offset = (uint64_t)block << SHI_ARENA_MIN_SHIFT;
    /* Only what is asked for: the tail of a large block may never be touched. */
    int err = back(a, offset, length ? length : 1);
    if (err) {
        shi_arena_free(a, offset);
        return err;
    }
    return (int64_t)offset;
}

uint64_t shi_arena_room(const struct shi_arena *a, uint64_t offset)
{
    return 1ull << (SHI_ARENA_MIN_SHIFT + a->order[offset >> SHI_ARENA_MIN_SHIFT] - 1);
}

static void punch(struct shi_arena *a, uint64_t offset, uint64_t length)
{
    if (!shi_machine_punch(a->m, a->file_offset + offset, length))
        return; /* a saving, not a duty */
    memset(a->backed + (offset >> SHI_ARENA_BACK_SHIFT), 0, length >> SHI_ARENA_BACK_SHIFT);
}

void shi_arena_free(struct shi_arena *a, uint64_t offset)
{
    uint32_t block = (uint32_t)(offset >> SHI_ARENA_MIN_SHIFT);
    uint32_t order = a->order[block] - 1u;
    if (shi_arena_room(a, offset) >= PUNCH_BYTES)
        punch(a, offset, shi_arena_room(a, offset));
    a->order[block] = 0;
    while (order < a->top_order) {
        uint32_t buddy = block ^ (1u << order);
        if (!a->is_free[buddy] || a->order[buddy] != order + 1)
            break;
        drop_free(a, buddy, order);
        a->order[buddy] = 0;
        block &= ~(1u << order);
        order++;
    }
    push_free(a, block, order);
}

int64_t shi_arena_reserve(struct shi_arena *a, uint64_t offset, uint64_t length)
{
    if (length > a->bytes || offset > a->bytes - length)
        return -EINVAL;
    /* The smallest aligned block that covers the range and is inside a free one. */
    uint32_t want = order_for(length);
    uint32_t first = (uint32_t)(offset >> SHI_ARENA_MIN_SHIFT);
    uint32_t last = length ? (uint32_t)((offset + length - 1) >> SHI_ARENA_MIN_SHIFT) : first;
    while ((first >> want) != (last >> want))
        want++;
    uint32_t block = first >> want << want, order = want, start = block;
    while (order <= a->top_order && !(a->is_free[start] && a->order[start] == order + 1)) {
        order++;
        start = block >> order << order;
    }
    if (order > a->top_order)
        return -EBUSY;
    drop_free(a, start, order);
    a->order[start] = 0;
    while (order > want) {
        order--;
        uint32_t half = 1u << order;
        if (block & half) {
            push_free(a, start, order);
            start += half;
        } else {
            push_free(a, start + half, order);
        }
    }
    a->order[block] = (uint8_t)(want + 1);
    return (int64_t)block << SHI_ARENA_MIN_SHIFT;
}
