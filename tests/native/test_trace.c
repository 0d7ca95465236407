/* SPDX-License-Identifier: MIT */
/* Trace rings: what is counted when they are full, and who dies in the middle of a record. */
#include "rig.h"

#define SIZE 8u

static struct rig rig;
static struct shi_trace_area *area;
static struct shi_trace_record got[4 * SIZE];

static void boot(bool lossless)
{
    rig_quiet(&rig, 2);
    area = rig_trace(&rig, SIZE);
    shi_store_relaxed(&area->lossless, lossless);
}

static void end(void)
{
    uint32_t i;
    for (i = 0; i < rig.ncpus; i++)
        shi_self_fini(&rig.cpu[i]);
    shi_self_fini(&rig.host);
    shi_self_fini(&rig.firmware);
    CHECK(munmap(rig.m.base, rig.m.total_bytes) == 0);
}

static void write_n(struct shi_self *self, uint32_t n)
{
    uint32_t i;
    for (i = 0; i < n; i++)
        SHI_TRACE(self, flush, 0, 0, 0, (uint32_t)shi_load_relaxed(&self->ring.head->head));
}

static uint32_t take(uint32_t id, uint64_t from, bool final, struct shi_trace_read *read)
{
    return shi_trace_take(&rig.m, area, id, from, got, 4 * SIZE, final, read);
}

static void begin(struct shi_self *self)
{
    SHI_TRACE(self, flush, 0, 0, 0, 0); /* finds its ring */
}

static void the_oldest_are_overwritten_and_counted(void)
{
    struct shi_trace_read read;
    uint32_t i;
    boot(false);
    begin(&rig.cpu[0]);
    write_n(&rig.cpu[0], 3 * SIZE - 1);
    CHECK(take(0, 0, false, &read) == SIZE);
    CHECK(read.next == 3 * SIZE && read.lost == 2 * SIZE && read.torn == 0);
    for (i = 0; i < SIZE; i++)
        CHECK(got[i].arg == 2 * SIZE + i);
    CHECK(take(1, 0, false, &read) == 0 && read.next == 0); /* another's is another ring */
    end();
}

static void a_full_lossless_ring_records_no_more_and_counts(void)
{
    struct shi_trace_read read;
    struct shi_trace_head *head;
    boot(true);
    begin(&rig.cpu[0]);
    head = shi_trace_head(area, 0);
    write_n(&rig.cpu[0], SIZE + 4);
    CHECK(shi_load_relaxed(&head->head) == SIZE && shi_load_relaxed(&head->dropped) == 5);
    CHECK(take(0, 0, false, &read) == SIZE && read.lost == 0);
    CHECK(got[0].arg == 0 && got[SIZE - 1].arg == SIZE - 1);
    shi_store_release(&head->tail, 3); /* room for three */
    write_n(&rig.cpu[0], 4);
    CHECK(shi_load_relaxed(&head->head) == SIZE + 3 && shi_load_relaxed(&head->dropped) == 6);
    CHECK(take(0, 3, false, &read) == SIZE && read.lost == 0 && got[SIZE - 1].arg == SIZE + 2);
    end();
}

/* As a process leaves it that is killed between the two stores of `seq`. */
static void half_a_record(struct shi_self *self)
{
    struct shi_trace_head *head = self->ring.head;
    uint64_t at = shi_fetch_add_relaxed(&head->head, 1);
    shi_store_relaxed(&self->ring.records[at & (SIZE - 1)].seq, (uint32_t)at);
}

static void half_a_record_of_the_living_is_waited_for(void)
{
    struct shi_trace_read read;
    boot(false);
    begin(&rig.cpu[0]);
    half_a_record(&rig.cpu[0]);
    write_n(&rig.cpu[0], 2); /* an NMI on top of it */
    CHECK(take(0, 0, false, &read) == 1 && read.next == 1 && read.lost == 0);
    CHECK(take(0, 1, true, &read) == 2 && read.next == 4 && read.lost == 1 && read.torn == 1);
    end();
}

static void half_a_record_of_the_dead_is_passed(void)
{
    struct shi_trace_read read;
    boot(false);
    begin(&rig.cpu[0]);
    half_a_record(&rig.cpu[0]);
    shi_reap_mark(&rig.firmware, 0, 9);
    CHECK(take(0, 0, false, &read) == 1 && read.next == 2 && read.torn == 1);
    /* Its ring is the next process's, which goes on behind. */
    shi_self_fini(&rig.cpu[0]);
    shi_reap_reset(&rig.firmware, 0);
    CHECK(shi_self_init(&rig.cpu[0], &rig.m, 0) == 0);
    begin(&rig.cpu[0]);
    CHECK(take(0, 0, false, &read) == 2 && read.next == 3 && read.torn == 1);
    CHECK(got[1].event == SHI_T_flush);
    /* And the reaper has said in its own that the CPU is dead. */
    CHECK(take(rig.ncpus + 1, 0, false, &read) == 1 && got[0].event == SHI_T_cpu_dead);
    CHECK(got[0].cpu == 0 && got[0].arg == 9);
    end();
}

static void nothing_is_recorded_that_is_switched_off(void)
{
    struct shi_trace_read read;
    boot(false);
    shi_store_release(&rig.m.header->tracing, SHI_TRACE_BIT(csd_unlock));
    SHI_TRACE(&rig.cpu[0], flush, 0, 0, 0, 0);
    CHECK(take(0, 0, false, &read) == 0);
    SHI_TRACE(&rig.cpu[0], csd_unlock, 1, 0, 0, 0);
    CHECK(take(0, 0, false, &read) == 1 && got[0].event == SHI_T_csd_unlock);
    end();
}

static void a_mask_is_told_in_words(void)
{
    const uint32_t cpus[] = { 1, 3, 64, 4095 };
    struct shi_trace_read read;
    boot(false);
    shi_trace_mask(&rig.cpu[0], cpus, 4, 1, 252);
    CHECK(take(0, 0, false, &read) == 4);
    CHECK(got[0].event == SHI_T_ipi_send_cpumask && got[0].cpu == 4 && got[0].csd == 3);
    CHECK(got[1].csd == 0 && got[1].func == 0xa && got[1].arg == 0);
    CHECK(got[2].csd == 64 && got[2].func == 1 && got[2].arg == 0);
    CHECK(got[3].csd == 4032 && got[3].func == 0 && got[3].arg == 1u << 31);
    end();
}

static void damaged_rings_are_none(void)
{
    boot(false);
    area->records = 7;
    CHECK(!shi_trace_area(&rig.m));
    SHI_TRACE(&rig.cpu[0], flush, 0, 0, 0, 0);
    area->records = SHI_TRACE_MOST; /* beyond the arrays */
    CHECK(!shi_trace_area(&rig.m));
    SHI_TRACE(&rig.cpu[0], flush, 0, 0, 0, 0);
    shi_store_release(&rig.m.header->users[SHI_USER_trace], 0);
    SHI_TRACE(&rig.cpu[0], flush, 0, 0, 0, 0); /* switched on, and there are none */
    end();
}

int main(void)
{
    the_oldest_are_overwritten_and_counted();
    a_full_lossless_ring_records_no_more_and_counts();
    half_a_record_of_the_living_is_waited_for();
    half_a_record_of_the_dead_is_passed();
    nothing_is_recorded_that_is_switched_off();
    a_mask_is_told_in_words();
    damaged_rings_are_none();
    return 0;
}
