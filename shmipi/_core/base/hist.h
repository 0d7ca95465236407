/* SPDX-License-Identifier: MIT */
/*
 * A histogram of nanoseconds with the bucket layout of HdrHistogram: lowest value 1,
 * three significant digits, 2,048 sub-buckets, so that counts can be exported to its
 * formats without change.  Highest value 2^42 - 1 ns (1 h 13 min).
 *
 * Plain memory of fixed size without pointers: it may live in shared memory.  One
 * writer, no locks; readers read when the writer has finished (say, after a join).
 */
#ifndef SHI_HIST_H
#define SHI_HIST_H

#include "base/sys.h"

#include <stdbool.h>
#include <stdint.h>

#define SHI_HIST_SUB_BITS 11 /* 2 * 10^3 values one apart need 2^11 sub-buckets */
#define SHI_HIST_SUB_COUNT (1u << SHI_HIST_SUB_BITS)
#define SHI_HIST_HALF_COUNT (SHI_HIST_SUB_COUNT / 2)
#define SHI_HIST_BUCKETS 32u
#define SHI_HIST_LEN ((SHI_HIST_BUCKETS + 1) * SHI_HIST_HALF_COUNT)
#define SHI_HIST_HIGHEST (((uint64_t)SHI_HIST_SUB_COUNT << (SHI_HIST_BUCKETS - 1)) - 1)

struct shi_hist {
    uint64_t count;    /* all values recorded, those above SHI_HIST_HIGHEST included */
    uint64_t overflow; /* how many were above it: they stand in the last bucket */
    uint64_t min;      /* exact; UINT64_MAX while empty (use shi_hist_min) */
    uint64_t max;      /* exact, also of values above SHI_HIST_HIGHEST */
    uint64_t sum_low;  /* exact sum, 128 bits */
    uint64_t sum_high;
    uint64_t counts[SHI_HIST_LEN];
};
_Static_assert(sizeof(struct shi_hist) == 8 * (6 + 33792), "struct shi_hist is shared");

/* The bucket of a value not above SHI_HIST_HIGHEST. */
static inline uint32_t shi_hist_index(uint64_t value)
{
    uint32_t top = 63u - (uint32_t)__builtin_clzll(value | (SHI_HIST_SUB_COUNT - 1));
    uint32_t bucket = top - (SHI_HIST_SUB_BITS - 1);

    /* In bucket 0 all 2,048 sub-buckets are used, in the others the upper half only:
     * their lower half would repeat the bucket before. */
    return bucket * SHI_HIST_HALF_COUNT + (uint32_t)(value >> bucket);
}

/* Record n values alike. */
static inline void shi_hist_record_n(struct shi_hist *h, uint64_t value, uint64_t n)
{
    uint64_t bounded = value <= SHI_HIST_HIGHEST ? value : SHI_HIST_HIGHEST;
    uint64_t low, high;

    if (n == 0)
        return;
    if (__builtin_mul_overflow(value, n, &low)) {
        __extension__ unsigned __int128 product = (unsigned __int128)value * n;

        high = (uint64_t)(product >> 64);
    } else {
        high = 0;
    }
    h->counts[shi_hist_index(bounded)] += n;
    h->count += n;
    if (bounded != value)
        h->overflow += n;
    if (value < h->min)
        h->min = value;
    if (value > h->max)
        h->max = value;
    h->sum_low += low;
    h->sum_high += high + (h->sum_low < low);
}

static inline void shi_hist_record(struct shi_hist *h, uint64_t value)
{
    shi_hist_record_n(h, value, 1);
}

/* Empty it; also how fresh memory becomes a histogram (all zero is not one: min). */
void shi_hist_reset(struct shi_hist *h);

/* Add the values of one to another. */
void shi_hist_merge(struct shi_hist *into, const struct shi_hist *from);

uint64_t shi_hist_count(const struct shi_hist *h);

/* Exact values in ns; 0 while empty. */
uint64_t shi_hist_min(const struct shi_hist *h);
uint64_t shi_hist_max(const struct shi_hist *h);
double shi_hist_mean(const struct shi_hist *h);

/*
 * The value at quantile q (0 .. 1, others are taken as the nearest of them), as
 * HdrHistogram's C and Python libraries give it: the highest value equivalent to that of
 * the (q * count + 0.5)th, for q = 0 the lowest.  0 while empty.
 */
uint64_t shi_hist_value_at_quantile(const struct shi_hist *h, double q);

/* The lowest and the highest value that are counted in one bucket. */
uint64_t shi_hist_lowest(uint32_t index);
uint64_t shi_hist_highest(uint32_t index);

/*
 * Go through the buckets that are not empty, in order of value.  Start with *index = 0
 * until false is returned; *at is the bucket, *count what it holds.
 */
bool shi_hist_next(const struct shi_hist *h, uint32_t *index, uint32_t *at, uint64_t *count);

#endif
