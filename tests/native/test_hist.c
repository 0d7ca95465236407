/* SPDX-License-Identifier: MIT */
/* The histogram has HdrHistogram's layout and quantiles, and loses nothing. */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/hist.h"

static int failures;

#define CHECK(cond, ...)                                                                       \
    do {                                                                                       \
        if (!(cond)) {                                                                         \
            failures++;                                                                        \
            printf("FAIL %s:%d: %s: ", __FILE__, __LINE__, #cond);                             \
            printf(__VA_ARGS__);                                                               \
            printf("\n");                                                                      \
        }                                                                                      \
    } while (0)

typedef unsigned long long ull;

/* ---- The reference: HdrHistogram_c's arithmetic, written from its definition. ---- */

static int32_t hdr_index(int64_t value)
{
    const int32_t unit_magnitude = 0, half_magnitude = 10, half_count = 1024;
    const int64_t mask = 2047;
    int32_t pow2ceiling = 64 - __builtin_clzll((ull)(value | mask));
    int32_t bucket = pow2ceiling - unit_magnitude - (half_magnitude + 1);
    int32_t sub = (int32_t)(value >> (bucket + unit_magnitude));

    return ((bucket + 1) << half_magnitude) + (sub - half_count);
}

static int64_t hdr_value(int32_t index)
{
    int32_t bucket = (index >> 10) - 1;
    int32_t sub = (index & 1023) + 1024;

    if (bucket < 0) {
        sub -= 1024;
        bucket = 0;
    }
    return (int64_t)sub << bucket;
}

static int64_t hdr_highest_equivalent(int64_t value)
{
    int32_t pow2ceiling = 64 - __builtin_clzll((ull)(value | 2047));
    int32_t bucket = pow2ceiling - 11;
    int32_t sub = (int32_t)(value >> bucket);
    int64_t low = (int64_t)sub << bucket;
    int64_t size = (int64_t)1 << (sub >= 2048 ? bucket + 1 : bucket);

    return low + size - 1;
}

static int32_t hdr_buckets_needed(int64_t highest)
{
    int64_t untrackable = 2048;
    int32_t buckets = 1;

    while (untrackable <= highest) {
        untrackable <<= 1;
        buckets++;
    }
    return buckets;
}

/* ---- Helpers ---- */

static uint64_t seed = 88172645463325252u;

static uint64_t rnd(void)
{
    seed ^= seed << 13;
    seed ^= seed >> 7;
    seed ^= seed << 17;
    return seed;
}

static struct shi_hist *fresh(void)
{
    struct shi_hist *h = malloc(sizeof *h);

    if (h == NULL)
        exit(1);
    memset(h, 0xa5, sizeof *h); /* reset must not rely on zeroed memory */
    shi_hist_reset(h);
    return h;
}

static int by_value(const void *a, const void *b)
{
    uint64_t x = *(const uint64_t *)a, y = *(const uint64_t *)b;

    return (x > y) - (x < y);
}

static void check_value(uint64_t v)
{
    uint32_t i = shi_hist_index(v);

    CHECK(i < SHI_HIST_LEN, "value %llu index %u", (ull)v, i);
    CHECK((int32_t)i == hdr_index((int64_t)v), "value %llu: %u, reference %d", (ull)v, i,
          hdr_index((int64_t)v));
    CHECK(shi_hist_lowest(i) <= v && v <= shi_hist_highest(i), "value %llu in [%llu, %llu]",
          (ull)v, (ull)shi_hist_lowest(i), (ull)shi_hist_highest(i));
    CHECK((int64_t)shi_hist_highest(i) == hdr_highest_equivalent((int64_t)v),
          "value %llu: %llu, reference %llu", (ull)v, (ull)shi_hist_highest(i),
          (ull)hdr_highest_equivalent((int64_t)v));
}

/* ---- Tests ---- */

static void test_layout(void)
{
    CHECK(hdr_buckets_needed((int64_t)SHI_HIST_HIGHEST) == SHI_HIST_BUCKETS, "%d",
          hdr_buckets_needed((int64_t)SHI_HIST_HIGHEST));
    CHECK(SHI_HIST_LEN == 33792, "%u", SHI_HIST_LEN);
    CHECK(shi_hist_index(SHI_HIST_HIGHEST) == SHI_HIST_LEN - 1, "%u",
          shi_hist_index(SHI_HIST_HIGHEST));
    for (uint32_t i = 0; i < SHI_HIST_LEN; i++) {
        CHECK((int64_t)shi_hist_lowest(i) == hdr_value((int32_t)i), "bucket %u", i);
        CHECK(shi_hist_index(shi_hist_lowest(i)) == i, "bucket %u", i);
        CHECK(shi_hist_index(shi_hist_highest(i)) == i, "bucket %u", i);
        if (i > 0)
            CHECK(shi_hist_lowest(i) == shi_hist_highest(i - 1) + 1, "bucket %u", i);
    }
    for (uint64_t v = 0; v < 10000; v++)
        check_value(v);
    for (int bit = 11; bit < 42; bit++)
        for (int64_t d = -3; d <= 3; d++)
            check_value((uint64_t)(((int64_t)1 << bit) + d));
    for (int i = 0; i < 200000; i++)
        check_value(rnd() >> (22 + rnd() % 42));
    check_value(SHI_HIST_HIGHEST);
}

static void test_three_digits(void)
{
    for (int i = 0; i < 100000; i++) {
        uint64_t v = rnd() >> (22 + rnd() % 40);
        uint32_t at = shi_hist_index(v);
        uint64_t width = shi_hist_highest(at) - shi_hist_lowest(at);

        CHECK(width * 1000 <= v, "value %llu in a bucket of width %llu", (ull)v, (ull)width);
    }
}

static void test_empty(void)
{
    struct shi_hist *h = fresh();
    uint32_t index = 0, at;
    uint64_t count;

    CHECK(shi_hist_count(h) == 0 && shi_hist_min(h) == 0 && shi_hist_max(h) == 0, "empty");
    CHECK(shi_hist_mean(h) == 0.0, "%g", shi_hist_mean(h));
    CHECK(shi_hist_value_at_quantile(h, 0.5) == 0, "empty");
    CHECK(!shi_hist_next(h, &index, &at, &count), "an empty one has no buckets");
    shi_hist_record_n(h, 77, 0);
    CHECK(shi_hist_count(h) == 0 && shi_hist_max(h) == 0, "nothing recorded 0 times");
    free(h);
}

/* Known answers, so that the reference above is not the only witness. */
static void test_known_quantiles(void)
{
    struct shi_hist *h = fresh();

    for (uint64_t v = 1; v <= 10000; v++)
        shi_hist_record(h, v * 1000);
    CHECK(shi_hist_min(h) == 1000 && shi_hist_max(h) == 10000000, "exact ends");
    CHECK(shi_hist_mean(h) == 5000500.0, "%f", shi_hist_mean(h));
    /* The 5,000th is 5,000,000: its bucket is [4,997,120; 5,001,215] (width 2^12). */
    CHECK(shi_hist_value_at_quantile(h, 0.5) == 5001215, "%llu",
          (ull)shi_hist_value_at_quantile(h, 0.5));
    CHECK(shi_hist_value_at_quantile(h, 0.0) == 1000, "lowest equivalent at 0");
    CHECK(shi_hist_value_at_quantile(h, 1.0) == shi_hist_highest(shi_hist_index(10000000)),
          "the last bucket at 1");
    CHECK(shi_hist_value_at_quantile(h, 2.0) == shi_hist_value_at_quantile(h, 1.0), "above 1");
    CHECK(shi_hist_value_at_quantile(h, -1.0) == 1000, "below 0");
    CHECK(shi_hist_value_at_quantile(h, (double)NAN) == 1000, "not a number");
    free(h);
}

/* Against a sorted list of the same values. */
static void test_quantiles(void)
{
    enum { N = 20000 };
    static const double qs[] = { 0.001, 0.01, 0.1, 0.25, 0.5, 0.75, 0.9, 0.99, 0.999, 1.0 };
    uint64_t *values = malloc(N * sizeof *values);
    struct shi_hist *h = fresh();
    long double sum = 0;

    if (values == NULL)
        exit(1);
    for (int i = 0; i < N; i++) {
        values[i] = rnd() >> (22 + rnd() % 40);
        sum += values[i];
        shi_hist_record(h, values[i]);
    }
    qsort(values, N, sizeof *values, by_value);
    for (size_t k = 0; k < sizeof qs / sizeof qs[0]; k++) {
        uint64_t rank = (uint64_t)(qs[k] * N + 0.5);
        uint64_t want = (uint64_t)hdr_highest_equivalent((int64_t)values[rank - 1]);

        CHECK(shi_hist_value_at_quantile(h, qs[k]) == want, "q %g: %llu, want %llu", qs[k],
              (ull)shi_hist_value_at_quantile(h, qs[k]), (ull)want);
    }
    CHECK(shi_hist_min(h) == values[0] && shi_hist_max(h) == values[N - 1], "exact ends");
    CHECK(fabs(shi_hist_mean(h) - (double)(sum / N)) <= 1e-9 * shi_hist_mean(h), "%f",
          shi_hist_mean(h));
    free(values);
    free(h);
}

static void test_overflow(void)
{
    struct shi_hist *h = fresh();

    shi_hist_record(h, 5);
    shi_hist_record(h, SHI_HIST_HIGHEST);
    CHECK(h->overflow == 0, "the highest value is not an overflow");
    shi_hist_record(h, SHI_HIST_HIGHEST + 1);
    shi_hist_record_n(h, UINT64_MAX, 2);
    CHECK(h->overflow == 3 && h->count == 5, "%llu of %llu", (ull)h->overflow, (ull)h->count);
    CHECK(h->counts[SHI_HIST_LEN - 1] == 4, "%llu", (ull)h->counts[SHI_HIST_LEN - 1]);
    CHECK(shi_hist_max(h) == UINT64_MAX, "max stays exact");
    CHECK(shi_hist_value_at_quantile(h, 1.0) == SHI_HIST_HIGHEST, "quantiles are capped");
    free(h);
}

static void test_sum_beyond_64_bits(void)
{
    struct shi_hist *h = fresh();

    shi_hist_record_n(h, UINT64_C(1) << 41, UINT64_C(1) << 30); /* 2^71 at once */
    CHECK(shi_hist_mean(h) == ldexp(1.0, 41), "%f", shi_hist_mean(h));
    shi_hist_reset(h);
    for (int i = 0; i < 64; i++)
        shi_hist_record(h, UINT64_C(1) << 62); /* carries one by one */
    CHECK(shi_hist_mean(h) == ldexp(1.0, 62), "%f", shi_hist_mean(h));
    free(h);
}

static void test_record_n_and_merge(void)
{
    struct shi_hist *one = fresh(), *many = fresh(), *half = fresh(), *other = fresh();

    for (int i = 0; i < 3000; i++) {
        uint64_t v = rnd() >> (20 + rnd() % 44), n = rnd() % 5;

        for (uint64_t k = 0; k < n; k++)
            shi_hist_record(one, v);
        shi_hist_record_n(many, v, n);
        shi_hist_record_n(i % 2 ? half : other, v, n);
    }
    CHECK(memcmp(one, many, sizeof *one) == 0, "record_n(v, n) is n times record(v)");
    shi_hist_merge(half, other);
    CHECK(memcmp(half, many, sizeof *half) == 0, "merging halves makes the whole");
    shi_hist_reset(other);
    shi_hist_merge(half, other);
    CHECK(memcmp(half, many, sizeof *half) == 0, "merging an empty one changes nothing");
    shi_hist_merge(other, many);
    CHECK(memcmp(other, many, sizeof *other) == 0, "merging into an empty one copies");
    shi_hist_merge(many, many);
    CHECK(many->count == 2 * one->count, "with itself: count");
    CHECK(shi_hist_mean(many) == shi_hist_mean(one), "with itself: %f %f", shi_hist_mean(many),
          shi_hist_mean(one));
    free(one);
    free(many);
    free(half);
    free(other);
}

static void test_iterate(void)
{
    struct shi_hist *h = fresh();
    uint32_t index = 0, at, last = 0;
    uint64_t count, total = 0;
    int buckets = 0;

    shi_hist_record_n(h, 0, 3);
    shi_hist_record_n(h, 100, 5);
    shi_hist_record_n(h, 1000000, 7);
    shi_hist_record_n(h, SHI_HIST_HIGHEST, 9);
    while (shi_hist_next(h, &index, &at, &count)) {
        CHECK(buckets == 0 || at > last, "in order");
        CHECK(h->counts[at] == count, "bucket %u", at);
        last = at;
        total += count;
        buckets++;
    }
    CHECK(buckets == 4 && total == 24, "%d buckets, %llu values", buckets, (ull)total);
    CHECK(!shi_hist_next(h, &index, &at, &count), "the end stays the end");
    free(h);
}

int main(void)
{
    test_layout();
    test_three_digits();
    test_empty();
    test_known_quantiles();
    test_quantiles();
    test_overflow();
    test_sum_beyond_64_bits();
    test_record_n_and_merge();
    test_iterate();
    return failures != 0;
}
