/* SPDX-License-Identifier: MIT */
/* Choosing and calibrating the clock behind shi_stamp(). */
#include "base/clock.h"

#include <errno.h>
#include <fcntl.h>
#include <stddef.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define CALIBRATION_NS 10000000u
#define PAIR_TRIES 64
#define COST_BATCHES 101
#define COST_STAMPS 64

/* Counters outside 0.9 MHz .. 20 GHz are not counters of time. */
#define MULT_SHIFT 32
#define MULT_MIN ((uint64_t)(0.05 * 4294967296.0))
#define MULT_MAX ((uint64_t)(1100.0 * 4294967296.0))

#define MONOTONIC_CLOCK                                                                        \
    { .source = SHI_CLOCK_MONOTONIC, .shift = 0, .mult = 1, .base_stamp = 0, .base_ns = 0 }

struct shi_clock shi_clock_current = MONOTONIC_CLOCK;

static int usable = SHI_CLOCK_MONOTONIC;
static int initialised;

#if defined(__x86_64__)
/* The first bytes of a file as a string; empty if it cannot be read. */
static void read_head(const char *path, char *buf, size_t size)
{
    size_t have = 0;
    int fd = open(path, O_RDONLY | O_CLOEXEC);

    while (fd >= 0 && have < size - 1) {
        ssize_t n = read(fd, buf + have, size - 1 - have);

        if (n < 0 && errno == EINTR)
            continue;
        if (n <= 0)
            break;
        have += (size_t)n;
    }
    if (fd >= 0)
        close(fd);
    buf[have] = '\0';
}

static int has_word(const char *text, const char *word)
{
    size_t len = strlen(word);
    const char *at = text;

    while ((at = strstr(at, word)) != NULL) {
        int starts = at == text || strchr(" \t\n", at[-1]) != NULL;
        int ends = strchr(" \t\n", at[len]) != NULL; /* also the final NUL */

        if (starts && ends)
            return 1;
        at += len;
    }
    return 0;
}

static int tsc_is_usable(void)
{
    static const char source[] =
        "/sys/devices/system/clocksource/clocksource0/current_clocksource";
    char buf[8192];

    /* The kernel checks at boot and ever after that the TSCs of all cores agree, and
     * drops it as its own clock when they do not.  kvm-clock is the TSC, scaled. */
    read_head(source, buf, sizeof buf);
    if (!has_word(buf, "tsc") && !has_word(buf, "kvm-clock"))
        return 0;
    /* The first core's flags are in the first few KB. */
    read_head("/proc/cpuinfo", buf, sizeof buf);
    return has_word(buf, "constant_tsc") && has_word(buf, "nonstop_tsc");
}
#endif

int shi_clock_init(void)
{
    if (initialised)
        return 0;
#if defined(__x86_64__)
    usable = tsc_is_usable() ? SHI_CLOCK_TSC : SHI_CLOCK_MONOTONIC;
#elif defined(__aarch64__)
    /* Architected: constant rate, never stops, the same on all cores; Linux itself
     * grants user space access, its own vdso reads it. */
    usable = SHI_CLOCK_CNTVCT;
#endif
    initialised = 1;
    return 0;
}

void shi_clock_forbid_counter(void)
{
    initialised = 1;
    usable = SHI_CLOCK_MONOTONIC;
}

int shi_clock_usable(void)
{
    shi_clock_init();
    return usable;
}

/* One moment on both clocks: of several tries, the one the clocks enclose tightest. */
static void take_pair(uint64_t *stamp, uint64_t *ns)
{
    uint64_t best = UINT64_MAX;

    for (int i = 0; i < PAIR_TRIES; i++) {
        uint64_t before = shi_counter();
        uint64_t now = shi_now_ns();
        uint64_t width = shi_counter() - before;

        if (width < best) {
            best = width;
            *stamp = before + width / 2;
            *ns = now;
        }
    }
}

int shi_clock_calibrate(struct shi_clock *out)
{
    struct shi_clock made = MONOTONIC_CLOCK;

    shi_clock_init();
    if (usable != SHI_CLOCK_MONOTONIC) {
        uint64_t stamp0 = 0, ns0 = 0, stamp1 = 0, ns1 = 0;
        struct timespec pause = { .tv_sec = 0, .tv_nsec = CALIBRATION_NS };
        shi_u128 mult = 0;

        take_pair(&stamp0, &ns0);
        /* A signal that cuts the sleep short must not cost precision. */
        while (clock_nanosleep(CLOCK_MONOTONIC, 0, &pause, &pause) == EINTR)
            ;
        take_pair(&stamp1, &ns1);
        if (stamp1 > stamp0 && ns1 > ns0)
            mult = (((shi_u128)(ns1 - ns0) << MULT_SHIFT) + (stamp1 - stamp0) / 2) /
                   (stamp1 - stamp0);
        if (mult >= MULT_MIN && mult <= MULT_MAX) {
            made.source = (uint32_t)usable;
            made.shift = MULT_SHIFT;
            made.mult = (uint64_t)mult;
            made.base_stamp = stamp1;
            made.base_ns = ns1;
        }
    }
    shi_clock_current = made;
    if (out != NULL)
        *out = made;
    return 0;
}

int shi_clock_adopt(const struct shi_clock *shared)
{
    struct shi_clock copy;

    if (shared == NULL)
        return -EINVAL;
    copy = *shared;
    shi_clock_init();
    if (copy.source == SHI_CLOCK_MONOTONIC) {
        if (copy.mult != 1 || copy.shift != 0 || copy.base_stamp != 0 || copy.base_ns != 0)
            return -EINVAL;
    } else if (copy.source == SHI_CLOCK_TSC || copy.source == SHI_CLOCK_CNTVCT) {
        if (copy.shift != MULT_SHIFT || copy.mult < MULT_MIN || copy.mult > MULT_MAX)
            return -EINVAL;
        if (copy.source != (uint32_t)usable)
            return -ENOTSUP;
    } else {
        return -EINVAL;
    }
    shi_clock_current = copy;
    return 0;
}

static int by_value(const void *a, const void *b)
{
    uint64_t x = *(const uint64_t *)a, y = *(const uint64_t *)b;

    return (x > y) - (x < y);
}

double shi_timer_cost_ns(void)
{
    uint64_t cost[COST_BATCHES];
    double unit = (double)shi_clock_current.mult /
                  (double)((uint64_t)1 << shi_clock_current.shift);

    for (int i = 0; i < COST_BATCHES; i++) {
        uint64_t first = shi_stamp();

        for (int k = 1; k < COST_STAMPS; k++)
            (void)shi_stamp();
        cost[i] = shi_stamp() - first;
    }
    qsort(cost, COST_BATCHES, sizeof cost[0], by_value);
    return (double)cost[COST_BATCHES / 2] * unit / COST_STAMPS;
}

const char *shi_clock_name(int source)
{
    switch (source) {
    case SHI_CLOCK_TSC:
        return "tsc";
    case SHI_CLOCK_CNTVCT:
        return "cntvct";
    default:
        return "monotonic";
    }
}
