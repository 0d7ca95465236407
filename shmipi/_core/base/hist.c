/* SPDX-License-Identifier: MIT */
/* HdrHistogram's layout and quantiles over plain memory. */
#include "base/hist.h"

#include <string.h>

void shi_hist_reset(struct shi_hist *h)
{
    memset(h, 0, sizeof *h);
    h->min = UINT64_MAX;
}

void shi_hist_merge(struct shi_hist *into, const struct shi_hist *from)
{
    for (uint32_t i = 0; i < SHI_HIST_LEN; i++)
        into->counts[i] += from->counts[i];
    into->count += from->count;
    into->overflow += from->overflow;
    if (from->min < into->min)
        into->min = from->min;
    if (from->max > into->max)
        into->max = from->max;
    /* Both operands may be the same histogram: its sum is read before it is changed. */
    uint64_t low = from->sum_low, high = from->sum_high;

    into->sum_low += low;
    into->sum_high += high + (into->sum_low < low);
}

uint64_t shi_hist_count(const struct shi_hist *h)
{
    return h->count;
}

uint64_t shi_hist_min(const struct shi_hist *h)
{
    return h->count == 0 ? 0 : h->min;
}

uint64_t shi_hist_max(const struct shi_hist *h)
{
    return h->max;
}

double shi_hist_mean(const struct shi_hist *h)
{
    if (h->count == 0)
        return 0.0;
    return ((double)h->sum_high * 18446744073709551616.0 + (double)h->sum_low) /
           (double)h->count;
}

uint64_t shi_hist_lowest(uint32_t index)
{
    if (index < SHI_HIST_SUB_COUNT)
        return index;

    uint32_t bucket = index / SHI_HIST_HALF_COUNT - 1;
    uint64_t sub = index % SHI_HIST_HALF_COUNT + SHI_HIST_HALF_COUNT;

    return sub << bucket;
}

uint64_t shi_hist_highest(uint32_t index)
{
    return shi_hist_lowest(index + 1) - 1;
}

uint64_t shi_hist_value_at_quantile(const struct shi_hist *h, double q)
{
    uint64_t rank, seen = 0;
    bool lowest = !(q > 0.0); /* also a NaN */

    if (h->count == 0)
        return 0;
    if (lowest)
        q = 0.0;
    if (q > 1.0)
        q = 1.0;
    rank = (uint64_t)(q * (double)h->count + 0.5);
    if (rank == 0)
        rank = 1;
    for (uint32_t i = 0; i < SHI_HIST_LEN; i++) {
        seen += h->counts[i];
        if (seen >= rank)
            return lowest ? shi_hist_lowest(i) : shi_hist_highest(i);
    }
    /* Only when a writer is at work or a double cannot hold the count. */
    return h->max;
}

bool shi_hist_next(const struct shi_hist *h, uint32_t *index, uint32_t *at, uint64_t *count)
{
    for (uint32_t i = *index; i < SHI_HIST_LEN; i++) {
        if (h->counts[i] != 0) {
            *at = i;
            *count = h->counts[i];
            *index = i + 1;
            return true;
        }
    }
    *index = SHI_HIST_LEN;
    return false;
}
