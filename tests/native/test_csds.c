/* SPDX-License-Identifier: MIT */
/* Guarded csds of users: one for each CPU, of one sender and of one machine. */
#include "users/csds.h"

#include "rig.h"

static struct rig r;
static shi_a64 ran;

static void count(void *info)
{
    CHECK(!info);
    shi_fetch_add_full(&ran, 1);
}

static void send_each(int number, uint64_t expected)
{
    uint64_t end = shi_now_ns() + 20000000000u;
    uint32_t cpu;
    for (cpu = 0; cpu < r.ncpus; cpu++) {
        CHECK(shi_csds_send(&r.host, SHI_CSDS_BLK, number, cpu) == 0);
        while (shi_load_full(&ran) != expected + cpu + 1) {
            CHECK(shi_now_ns() < end); /* lost */
            sched_yield();
        }
    }
}

static uint64_t corrupt(void)
{
    uint64_t n = 0;
    uint32_t i, ctx;
    for (i = 0; i < r.m.nslots; i++)
        for (ctx = 0; ctx < SHI_NCTX; ctx++)
            n += shi_load_relaxed(&shi_slot(&r.m, i)->counters[ctx][SHI_C_corrupt]);
    return n;
}

/* A process that has one machine after the other is the same slot in each. */
static void each_machine_has_its_own(int number)
{
    const struct shi_call call = { .func = SHI_FUNC_NATIVE | (uint32_t)number };
    int i;
    shi_store_full(&ran, 0);
    rig_boot(&r, 2, SHI_IDLE_HALT);
    for (i = 0; i < 5; i++)
        CHECK(shi_call_prepare(&r.host, &call) == i);
    send_each(number, 0);
    send_each(number, 2);
    uint32_t top = r.host.sender.csd_top;
    CHECK(top == 7 && r.host.csds); /* one for each CPU, however often */
    CHECK(!corrupt());
    rig_stop(&r);
    rig_boot(&r, 2, SHI_IDLE_HALT);
    send_each(number, 4);
    CHECK(r.host.sender.csd_top == 2);
    CHECK(!corrupt());
    rig_stop(&r);
}

static void bad_cpus_are_refused(int number)
{
    rig_boot(&r, 2, SHI_IDLE_HALT);
    CHECK(shi_csds_send(&r.host, SHI_CSDS_RPS, number, 2) == -ENXIO);
    CHECK(shi_csds_send(&r.host, SHI_CSDS_RPS, -1, 0) == -ENXIO);
    CHECK(!r.host.sender.csd_top);
    rig_stop(&r);
}

int main(void)
{
    alarm(60);
    shi_native_init();
    int number = shi_native_register("count_csds", count);
    CHECK(number >= 0);
    each_machine_has_its_own(number);
    bad_cpus_are_refused(number);
    return 0;
}
