/* SPDX-License-Identifier: MIT */
/* The payload arena: blocks never overlap, everything comes back, and an heir can take
 * the places that an earlier owner of the slot left in use. */
#include "rig.h"

#include <errno.h>

#define BYTES (1u << 20)
#define BLOCKS 512
#define TURNS 60000

static struct shi_machine machine = { .fd = -1 }; /* nothing to allocate in a file */

struct block {
    int64_t at;
    uint64_t length;
};

static uint8_t owner[BYTES >> SHI_ARENA_MIN_SHIFT]; /* which block has this piece, + 1 */

static uint64_t pieces(uint64_t length)
{
    uint64_t n = (length + (1u << SHI_ARENA_MIN_SHIFT) - 1) >> SHI_ARENA_MIN_SHIFT;
    return n ? n : 1;
}

static void mark(const struct block *b, uint8_t from, uint8_t to)
{
    uint64_t i, first = (uint64_t)b->at >> SHI_ARENA_MIN_SHIFT;
    for (i = first; i < first + pieces(b->length); i++) {
        CHECK(owner[i] == from);
        owner[i] = to;
    }
}

static void never_overlap(void)
{
    struct shi_arena a;
    static struct block blocks[255];
    unsigned seed = 7, turn, i;
    memset(owner, 0, sizeof owner);
    CHECK(shi_arena_init(&a, &machine, 0, BYTES) == 0);
    for (turn = 0; turn < TURNS; turn++) {
        i = (unsigned)rand_r(&seed) % 255;
        struct block *b = &blocks[i];
        if (b->length) {
            mark(b, (uint8_t)(i + 1), 0);
            shi_arena_free(&a, (uint64_t)b->at);
            b->length = 0;
            continue;
        }
        uint64_t want = 1 + (uint64_t)rand_r(&seed) % (1u << (rand_r(&seed) % 18 + 1));
        b->at = shi_arena_alloc(&a, want);
        if (b->at < 0) {
            CHECK(b->at == -ENOBUFS);
            continue;
        }
        CHECK((uint64_t)b->at + want <= BYTES);
        CHECK(shi_arena_room(&a, (uint64_t)b->at) >= want);
        CHECK((uint64_t)b->at % shi_arena_room(&a, (uint64_t)b->at) == 0);
        b->length = want;
        mark(b, 0, (uint8_t)(i + 1));
    }
    for (i = 0; i < 255; i++)
        if (blocks[i].length)
            shi_arena_free(&a, (uint64_t)blocks[i].at);
    /* Everything has come together again. */
    CHECK(shi_arena_alloc(&a, BYTES) == 0);
    CHECK(shi_arena_alloc(&a, 1) == -ENOBUFS);
    shi_arena_fini(&a);
}

static void limits(void)
{
    struct shi_arena a;
    CHECK(shi_arena_init(&a, &machine, 0, BYTES) == 0);
    CHECK(shi_arena_alloc(&a, BYTES + 1) == -E2BIG);
    CHECK(shi_arena_alloc(&a, UINT64_MAX) == -E2BIG);
    CHECK(shi_arena_alloc(&a, 0) == 0); /* something of its own all the same */
    CHECK(shi_arena_alloc(&a, 1) != 0);
    CHECK(shi_arena_alloc(&a, BYTES) == -ENOBUFS);
    shi_arena_fini(&a);
    CHECK(shi_arena_init(&a, &machine, 0, BYTES - 1) == -EINVAL);
    CHECK(shi_arena_init(&a, &machine, 0, 3 * BYTES) == -EINVAL);
}

/* Take random ranges as they were given out before; what is handed out afterwards must
 * not touch them. */
static void reserved_places_are_kept(void)
{
    unsigned seed = 11, turn;
    for (turn = 0; turn < 200; turn++) {
        struct shi_arena before, after;
        struct block kept[8];
        unsigned n = 0, i;
        memset(owner, 0, sizeof owner);
        CHECK(shi_arena_init(&before, &machine, 0, BYTES) == 0);
        CHECK(shi_arena_init(&after, &machine, 0, BYTES) == 0);
        for (i = 0; i < 8; i++) {
            uint64_t want = 1 + (uint64_t)rand_r(&seed) % 60000;
            int64_t at = shi_arena_alloc(&before, want);
            CHECK(at >= 0);
            if (rand_r(&seed) % 2)
                continue;
            kept[n] = (struct block){ at, want };
            int64_t got = shi_arena_reserve(&after, (uint64_t)at, want);
            CHECK(got >= 0 && got <= at);
            CHECK((uint64_t)got + shi_arena_room(&after, (uint64_t)got) >= (uint64_t)at + want);
            mark(&kept[n], 0, (uint8_t)(n + 1));
            n++;
            /* Twice the same: it is taken. */
            CHECK(shi_arena_reserve(&after, (uint64_t)at, want) == -EBUSY);
        }
        for (;;) {
            struct block b = { .length = 256 };
            b.at = shi_arena_alloc(&after, 256);
            if (b.at < 0)
                break;
            mark(&b, 0, 200);
        }
        for (i = 0; i < n; i++)
            shi_arena_free(&after, (uint64_t)kept[i].at);
        shi_arena_fini(&before);
        shi_arena_fini(&after);
    }
}

/* What is read from a damaged segment: refused, not believed. */
static void absurd_reservations(void)
{
    struct shi_arena a;
    unsigned seed = 3, turn;
    CHECK(shi_arena_init(&a, &machine, 0, BYTES) == 0);
    CHECK(shi_arena_reserve(&a, BYTES, 1) == -EINVAL);
    CHECK(shi_arena_reserve(&a, UINT64_MAX, 2) == -EINVAL);
    CHECK(shi_arena_reserve(&a, 1, BYTES) == -EINVAL);
    CHECK(shi_arena_reserve(&a, 0, UINT64_MAX) == -EINVAL);
    for (turn = 0; turn < 2000; turn++) {
        uint64_t at = (uint64_t)rand_r(&seed) % (2 * BYTES);
        int64_t got = shi_arena_reserve(&a, at, (uint64_t)rand_r(&seed) % 5000);
        if (got >= 0)
            shi_arena_free(&a, (uint64_t)got);
    }
    CHECK(shi_arena_alloc(&a, BYTES) == 0);
    shi_arena_fini(&a);
}

int main(void)
{
    never_overlap();
    limits();
    reserved_places_are_kept();
    absurd_reservations();
    return 0;
}
