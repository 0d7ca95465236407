/* SPDX-License-Identifier: MIT */
/*
 * A sender's payload arena: a buddy allocator whose bookkeeping is private.
 *
 * Only the owner allocates and frees, so the segment holds payload bytes and nothing
 * that a stray write could turn into a bad pointer.  Pages are allocated in the file
 * before they are handed out.
 */
#ifndef SHI_ARENA_H
#define SHI_ARENA_H

#include <stdint.h>

#define SHI_ARENA_MIN_SHIFT 8 /* 256 bytes: the smallest block */
#define SHI_ARENA_ORDERS 28
#define SHI_ARENA_BACK_SHIFT 16 /* file pages are allocated 64 KiB at a time */

struct shi_machine;

struct shi_arena {
    const struct shi_machine *m;
    uint64_t file_offset; /* of the arena, in the segment */
    uint64_t bytes;
    uint32_t top_order;
    uint32_t nblocks;      /* of the smallest size */
    uint8_t *order;        /* per smallest block: order + 1 of the block that starts there */
    uint8_t *is_free;      /* likewise */
    uint32_t *next, *prev; /* free lists through block numbers, + 1 */
    uint32_t head[SHI_ARENA_ORDERS];
    uint8_t *backed;
};

int shi_arena_init(struct shi_arena *a, const struct shi_machine *m, uint64_t file_offset,
                   uint64_t bytes);
void shi_arena_fini(struct shi_arena *a);
/* Offset of a block of at least `length` bytes; -ENOBUFS, -E2BIG or -ENOSPC. */
int64_t shi_arena_alloc(struct shi_arena *a, uint64_t length);
void shi_arena_free(struct shi_arena *a, uint64_t offset);
/* The room of an allocated block, in bytes. */
uint64_t shi_arena_room(const struct shi_arena *a, uint64_t offset);
/* Take the free block(s) that cover [offset, offset+length): what an earlier owner of
 * the slot left in use.  One block covers it; its offset is returned, or -EBUSY. */
int64_t shi_arena_reserve(struct shi_arena *a, uint64_t offset, uint64_t length);

#endif
