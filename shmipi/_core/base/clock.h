/* SPDX-License-Identifier: MIT */
/*
 * Stamps: the cheapest clock that all CPUs of the machine agree on.
 *
 * A stamp is a raw counter value (TSC, CNTVCT_EL0, or CLOCK_MONOTONIC in ns where the
 * counter cannot be trusted).  Differences of stamps become nanoseconds by one
 * multiplication and a shift, calibrated against CLOCK_MONOTONIC.  One process
 * calibrates and puts struct shi_clock into shared memory, the others adopt it: two
 * processes that calibrate by themselves would disagree by a few ppm.
 *
 * Until shi_clock_calibrate() or shi_clock_adopt() has succeeded, stamps are
 * CLOCK_MONOTONIC nanoseconds: stamps and their conversion always belong together.
 */
#ifndef SHI_CLOCK_H
#define SHI_CLOCK_H

#include "base/sys.h"

#include <stdint.h>
#include <time.h>

enum shi_clock_source {
    SHI_CLOCK_MONOTONIC = 0,
    SHI_CLOCK_TSC = 1,
    SHI_CLOCK_CNTVCT = 2,
};

/* Plain data, no pointers: it is copied into shared memory as it is. */
struct shi_clock {
    uint32_t source; /* enum shi_clock_source */
    uint32_t shift;  /* ns = (stamps * mult) >> shift, with a 128-bit product */
    uint64_t mult;
    uint64_t base_stamp; /* this stamp was taken at ... */
    uint64_t base_ns;    /* ... this CLOCK_MONOTONIC time */
};
_Static_assert(sizeof(struct shi_clock) == 32, "struct shi_clock lives in shared memory");

/* The calibration in force in this process.  Read it freely, never write it. */
extern struct shi_clock shi_clock_current __attribute__((visibility("hidden")));

__extension__ typedef unsigned __int128 shi_u128;

/* Now, CLOCK_MONOTONIC in ns (by the vdso: no system call where the kernel has one). */
static inline uint64_t shi_now_ns(void)
{
    struct timespec ts;

    clock_gettime(CLOCK_MONOTONIC, &ts);
    return (uint64_t)ts.tv_sec * 1000000000u + (uint64_t)ts.tv_nsec;
}

/*
 * The raw counter.
 *
 * x86: RDTSC alone may execute before earlier loads have their values, so that a poll
 * loop would seem to end before it did.  LFENCE in front waits until all earlier
 * instructions, those loads among them, are complete.  Nothing is needed behind: what a
 * sender does after its first stamp is a store, a locked instruction or a system call.
 * Stores leave the core in order after the RDTSC has retired, and the other two do not
 * start before it; a later *load* that runs early only reads an answer that is not
 * there yet.  A second LFENCE would add its cost to every number and order nothing.
 *
 * aarch64: ISB keeps the counter read from being speculated above earlier instructions.
 */
static inline uint64_t shi_counter(void)
{
#if defined(__x86_64__)
    uint32_t lo, hi;

    __asm__ __volatile__("lfence\n\trdtsc" : "=a"(lo), "=d"(hi)::"memory");
    return (uint64_t)hi << 32 | lo;
#elif defined(__aarch64__)
    uint64_t value;

    __asm__ __volatile__("isb\n\tmrs %0, cntvct_el0" : "=r"(value)::"memory");
    return value;
#else
    return shi_now_ns();
#endif
}

/* As shi_counter(), without waiting for earlier instructions: some nanoseconds early, and
 * cheap enough for what only says since when something runs. */
static inline uint64_t shi_counter_early(void)
{
#if defined(__x86_64__)
    return __builtin_ia32_rdtsc();
#elif defined(__aarch64__)
    uint64_t value;

    __asm__ __volatile__("mrs %0, cntvct_el0" : "=r"(value));
    return value;
#else
    return shi_now_ns();
#endif
}

/* A stamp of this moment, in units of the clock in force. */
static inline uint64_t shi_stamp(void)
{
    if (__builtin_expect(shi_clock_current.source != SHI_CLOCK_MONOTONIC, 1))
        return shi_counter();
    return shi_now_ns();
}

/* The same of about this moment: for a person, not for a figure. */
static inline uint64_t shi_stamp_early(void)
{
    if (__builtin_expect(shi_clock_current.source != SHI_CLOCK_MONOTONIC, 1))
        return shi_counter_early();
    return shi_now_ns();
}

/* A difference of two stamps in ns (rounded down). */
static inline uint64_t shi_stamp_to_ns(uint64_t delta)
{
    return (uint64_t)(((shi_u128)delta * shi_clock_current.mult) >> shi_clock_current.shift);
}

/* A stamp as CLOCK_MONOTONIC time in ns; stamps from before the calibration work too. */
static inline uint64_t shi_stamp_to_mono(uint64_t stamp)
{
    if (stamp >= shi_clock_current.base_stamp)
        return shi_clock_current.base_ns +
               shi_stamp_to_ns(stamp - shi_clock_current.base_stamp);
    return shi_clock_current.base_ns - shi_stamp_to_ns(shi_clock_current.base_stamp - stamp);
}

/* Spin for so many ns, 10 s at most; by stamps, so that it is as exact as those are. */
#define SHI_SPIN_MOST_NS 10000000000u
static inline void shi_spin_ns(uint64_t ns)
{
    uint64_t from = shi_stamp(), most = ns < SHI_SPIN_MOST_NS ? ns : SHI_SPIN_MOST_NS;
    while (shi_stamp_to_ns(shi_stamp() - from) < most)
        ;
}

/*
 * Find out which counter this process may use: one that runs at a constant rate, does
 * not stop, and that the kernel itself uses as its clock, so that it is known to agree
 * between cores.  Returns 0 (where there is none, CLOCK_MONOTONIC stays in use).
 */
int shi_clock_init(void);

/*
 * From now on this process calibrates and adopts CLOCK_MONOTONIC only: for a box whose
 * kernel trusts a counter wrongly, and for tests of life without one.
 */
void shi_clock_forbid_counter(void);

/* The counter found by shi_clock_init(): enum shi_clock_source. */
int shi_clock_usable(void);

/*
 * Calibrate against CLOCK_MONOTONIC (takes 10 ms), put the result in force, and copy
 * it to *out if out is not NULL.  Returns 0.
 */
int shi_clock_calibrate(struct shi_clock *out);

/*
 * Put a calibration made by another process in force.  -EINVAL: it is not one (it may
 * come from damaged shared memory).  -ENOTSUP: this process cannot read that counter.
 */
int shi_clock_adopt(const struct shi_clock *shared);

/* What one stamp costs, in ns: the median over many short batches.  Never subtracted. */
double shi_timer_cost_ns(void);

/* "tsc", "cntvct" or "monotonic". */
const char *shi_clock_name(int source);

#endif
