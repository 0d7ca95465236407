/* SPDX-License-Identifier: MIT */
/* Stamps go forward, agree with CLOCK_MONOTONIC, and can be shared between processes. */
#include <errno.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include "base/atomics.h"
#include "base/clock.h"

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

/* Before any calibration: usable, in nanoseconds. */
static void test_before(void)
{
    uint64_t ns = shi_now_ns(), stamp = shi_stamp();

    CHECK(shi_clock_current.source == SHI_CLOCK_MONOTONIC, "%u", shi_clock_current.source);
    CHECK(stamp >= ns && stamp - ns < 1000000000, "stamp %llu, now %llu", (ull)stamp, (ull)ns);
    CHECK(shi_stamp_to_ns(12345) == 12345, "one stamp is one nanosecond");
    CHECK(shi_stamp_to_mono(stamp) == stamp, "and counts from the same zero");
    CHECK(shi_clock_init() == 0 && shi_clock_init() == 0, "may be called again");
    CHECK(shi_clock_current.source == SHI_CLOCK_MONOTONIC, "init alone changes no unit");
}

static void test_calibrate(void)
{
    struct shi_clock made;
    uint64_t from = shi_now_ns(), took;

    CHECK(shi_clock_calibrate(&made) == 0, "calibrate");
    took = shi_now_ns() - from;
    printf("source %s, %.6f ns per tick, calibrated in %.1f ms, a stamp costs %.1f ns\n",
           shi_clock_name((int)made.source),
           (double)made.mult / (double)(UINT64_C(1) << made.shift), (double)took / 1e6,
           shi_timer_cost_ns());
    CHECK(made.source == (uint32_t)shi_clock_usable(), "%u", made.source);
    CHECK(memcmp(&made, &shi_clock_current, sizeof made) == 0, "in force");
}

/* The tightest of several looks at both clocks. */
static void look_at_both(uint64_t *stamp, uint64_t *ns)
{
    uint64_t best = UINT64_MAX;

    for (int i = 0; i < 50; i++) {
        uint64_t before = shi_stamp(), now = shi_now_ns(), after = shi_stamp();

        if (after - before < best) {
            best = after - before;
            *stamp = before + best / 2;
            *ns = now;
        }
    }
}

/* Over 200 ms: 50 ppm are 10 us.  The best of three, as a busy machine disturbs a pair. */
static void test_accuracy(void)
{
    double best = 1e9;

    for (int i = 0; i < 3; i++) {
        struct timespec pause = { 0, 200000000 };
        uint64_t s0 = 0, n0 = 0, s1 = 0, n1 = 0;
        double ppm;

        look_at_both(&s0, &n0);
        nanosleep(&pause, NULL);
        look_at_both(&s1, &n1);
        ppm = ((double)shi_stamp_to_ns(s1 - s0) / (double)(n1 - n0) - 1) * 1e6;
        printf("error over 200 ms: %+.2f ppm\n", ppm);
        best = fmin(best, fabs(ppm));
    }
    CHECK(best < 50, "%.1f ppm", best);
}

static void test_forward(void)
{
    uint64_t last = shi_stamp();

    for (int i = 0; i < 1000000; i++) {
        uint64_t now = shi_stamp();

        if (now < last) {
            CHECK(now >= last, "%llu after %llu", (ull)now, (ull)last);
            break;
        }
        last = now;
    }
}

static void test_mono(void)
{
    int good = 0;
    uint64_t base = shi_clock_current.base_stamp;

    for (int i = 0; i < 100; i++) {
        uint64_t before = shi_now_ns(), at = shi_stamp_to_mono(shi_stamp()),
                 after = shi_now_ns();

        /* 1 us for what the calibration is off since it was made. */
        good += at + 1000 + (before - shi_clock_current.base_ns) / 20000 >= before &&
                at <= after + 1000 + (before - shi_clock_current.base_ns) / 20000;
    }
    CHECK(good == 100, "%d of 100 stamps lie between two looks at CLOCK_MONOTONIC", good);
    CHECK(shi_stamp_to_mono(base) == shi_clock_current.base_ns, "at the base");
    if (shi_clock_current.source != SHI_CLOCK_MONOTONIC)
        CHECK(shi_stamp_to_mono(base - 1000000) + shi_stamp_to_ns(1000000) ==
                  shi_clock_current.base_ns,
              "before the base");
    /* Ten years of 5 GHz do not overflow. */
    CHECK(shi_stamp_to_ns(UINT64_C(1576800000000000000)) >
              shi_stamp_to_ns(UINT64_C(1576700000000000000)),
          "long differences");
}

/* Another process, forked before there was a calibration, adopts it. */
struct shared {
    struct shi_clock clock;
    uint64_t stamp, mono;
    int rc;
    shi_a32 ready;
};

static struct shared *shared;
static pid_t adopter;

static void start_adopter(void)
{
    shared =
        mmap(NULL, sizeof *shared, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    if (shared == MAP_FAILED)
        exit(1);
    fflush(stdout);
    adopter = fork();
    if (adopter == 0) {
        for (int i = 0; i < 10000 && !shi_load_acquire(&shared->ready); i++)
            usleep(1000);
        shared->rc = shi_clock_adopt(&shared->clock);
        shared->stamp = shi_stamp();
        shared->mono = shi_stamp_to_mono(shared->stamp);
        _exit(0);
    }
}

static void test_adopt_in_another_process(void)
{
    uint64_t before, after;
    int status = -1;

    shared->clock = shi_clock_current;
    shared->rc = 1;
    before = shi_stamp();
    shi_store_release(&shared->ready, 1);
    CHECK(waitpid(adopter, &status, 0) == adopter && status == 0, "status %d", status);
    after = shi_stamp();
    CHECK(shared->rc == 0, "%d", shared->rc);
    CHECK(before <= shared->stamp && shared->stamp <= after, "%llu %llu %llu", (ull)before,
          (ull)shared->stamp, (ull)after);
    CHECK(shared->mono == shi_stamp_to_mono(shared->stamp), "one calibration, one answer");
    munmap(shared, sizeof *shared);
}

static void test_adopt_refuses(void)
{
    const struct shi_clock good = shi_clock_current;
    struct shi_clock bad;

    CHECK(shi_clock_adopt(NULL) == -EINVAL, "NULL");
    bad = good, bad.source = 77;
    CHECK(shi_clock_adopt(&bad) == -EINVAL, "no such source");
    bad = good, bad.mult = 0;
    CHECK(shi_clock_adopt(&bad) == -EINVAL, "mult 0");
    bad = good, bad.shift = 200;
    CHECK(shi_clock_adopt(&bad) == -EINVAL, "a shift beyond the word");
    bad = good, bad.mult = UINT64_MAX;
    CHECK(shi_clock_adopt(&bad) == -EINVAL, "mult too large");
    memset(&bad, 0, sizeof bad);
    CHECK(shi_clock_adopt(&bad) == -EINVAL, "a zeroed segment");
    bad = good;
    bad.source = shi_clock_usable() == SHI_CLOCK_CNTVCT ? SHI_CLOCK_TSC : SHI_CLOCK_CNTVCT;
    bad.shift = 32, bad.mult = UINT64_C(1) << 32;
    CHECK(shi_clock_adopt(&bad) == -ENOTSUP, "another processor's counter");
    CHECK(memcmp(&good, &shi_clock_current, sizeof good) == 0, "a refusal changes nothing");
}

/* Says the same of this box as grep does. */
static void test_usable(void)
{
#if defined(__x86_64__)
    static const char command[] =
        "grep -qwE 'tsc|kvm-clock'"
        " /sys/devices/system/clocksource/clocksource0/current_clocksource 2>/dev/null &&"
        " grep -qw constant_tsc /proc/cpuinfo && grep -qw nonstop_tsc /proc/cpuinfo";
    int want = system(command) == 0 ? SHI_CLOCK_TSC : SHI_CLOCK_MONOTONIC;

    CHECK(shi_clock_usable() == want, "%s, want %s", shi_clock_name(shi_clock_usable()),
          shi_clock_name(want));
#elif defined(__aarch64__)
    CHECK(shi_clock_usable() == SHI_CLOCK_CNTVCT, "%d", shi_clock_usable());
#endif
}

/* Without a usable counter everything works, in nanoseconds.  Runs last. */
static void test_fallback(void)
{
    const struct shi_clock good = shi_clock_current;
    struct shi_clock made;
    uint64_t stamp, ns;

    shi_clock_forbid_counter();
    CHECK(shi_clock_calibrate(&made) == 0 && made.source == SHI_CLOCK_MONOTONIC, "falls back");
    ns = shi_now_ns();
    stamp = shi_stamp();
    CHECK(stamp >= ns && stamp - ns < 1000000000, "stamps are CLOCK_MONOTONIC");
    CHECK(shi_stamp_to_mono(stamp) == stamp, "in its unit");
    CHECK(shi_clock_adopt(&made) == 0, "and can be shared");
    CHECK(shi_clock_adopt(&good) == (good.source == SHI_CLOCK_MONOTONIC ? 0 : -ENOTSUP),
          "a counter this process may not use is refused");
    printf("a CLOCK_MONOTONIC stamp costs %.1f ns\n", shi_timer_cost_ns());
    CHECK(shi_timer_cost_ns() > 0, "%f", shi_timer_cost_ns());
    test_forward();
}

int main(void)
{
    double cost;

    start_adopter();
    test_before();
    test_usable();
    test_calibrate();
    cost = shi_timer_cost_ns();
    CHECK(cost > 0 && cost < 10000, "%f", cost);
    test_accuracy();
    test_forward();
    test_mono();
    test_adopt_in_another_process();
    test_adopt_refuses();
    test_fallback();
    return failures != 0;
}
