/* SPDX-License-Identifier: MIT */
/* Lines of every flow, raised by many and masked by others meanwhile: the last one sent
 * is always seen, and so is what its sender stored before it. */
#include "rig.h"

#include "irq/chip.h"
#include "irq/flows.h"
#include "irq/irqdesc.h"

#define CPUS 3
#define SENDERS 2
#define ROUNDS 40
#define BURSTS 50 /* each ends with a last line that must be seen */
#define VIRQ 7

static struct rig rig;
static uint32_t line_of_cpu[CPUS];

/* Of each CPU: what its senders have counted, and what its handler has seen of it. */
struct cell {
    _Alignas(SHI_LINE) shi_a64 sent;
    shi_a64 seen, taken;
};
static struct cell cells[CPUS];

static void note(void *info)
{
    struct cell *cell = &cells[rig_id];
    (void)info;
    uint32_t i;
    shi_fetch_add_relaxed(&cell->taken, 1);
    shi_store_relaxed(&cell->seen, shi_load_relaxed(&cell->sent));
    for (i = 0; i < 50; i++)
        shi_cpu_relax(); /* in service for a while after it has looked */
}

static void *sender(void *arg)
{
    unsigned seed = (unsigned)(uintptr_t)arg;
    int i;
    for (i = 0; i < ROUNDS; i++) {
        uint32_t cpu = (uint32_t)rand_r(&seed) % CPUS;
        shi_fetch_add_relaxed(&cells[cpu].sent, 1);
        shi_enter(&rig.host);
        shi_irq_raise(&rig.host, cpu, line_of_cpu[cpu]);
        shi_leave(&rig.host);
    }
    return NULL;
}

static void *masker(void *arg)
{
    unsigned seed = 99;
    int i;
    (void)arg;
    for (i = 0; i < ROUNDS / 4; i++) {
        uint32_t cpu = (uint32_t)rand_r(&seed) % CPUS;
        shi_enter(&rig.host);
        shi_chip_enable(&rig.host, cpu, line_of_cpu[cpu], false);
        shi_leave(&rig.host);
        sched_yield();
        shi_enter(&rig.host);
        shi_chip_enable(&rig.host, cpu, line_of_cpu[cpu], true);
        shi_leave(&rig.host);
    }
    return NULL;
}

static void describe(struct shi_chip *chip, enum shi_flow_kind flow, bool banked)
{
    uint32_t i;
    memset(chip, 0, sizeof *chip);
    strcpy(chip->name, "test");
    chip->flow = flow;
    chip->nmi = SHI_NO_LINE;
    chip->group = chip->siblings = 1;
    chip->banked = banked;
    memset(chip->row, 0xff, sizeof chip->row);
    chip->call = chip->call_single = flow == SHI_FLOW_VECTOR ? 0xfb : 0;
    chip->reschedule = flow == SHI_FLOW_VECTOR ? 0xfd : 1;
    chip->per_cpu = flow == SHI_FLOW_SHARED;
    if (chip->per_cpu)
        chip->reschedule = CPUS;
    chip->nlines = flow == SHI_FLOW_VECTOR ? 256
                   : flow == SHI_FLOW_SGI  ? 16
                   : flow == SHI_FLOW_ESB  ? SHI_ESB_LINES
                                           : 31;
    for (i = 0; i < chip->nlines; i++)
        chip->use[i] = i >= 8 ? SHI_USE_IRQ : SHI_USE_NONE;
    for (i = 0; i < (chip->per_cpu ? CPUS : 1u); i++) {
        chip->use[chip->call + i] = SHI_USE_CALL;
        chip->use[chip->reschedule + i] = SHI_USE_RESCHEDULE;
    }
}

/* Twice the same with nothing left to see, or time is up. */
static bool settled(void)
{
    uint32_t cpu, looks;
    for (looks = 0; looks < 50000; looks++) {
        bool all = true;
        for (cpu = 0; cpu < CPUS; cpu++)
            all = all &&
                  shi_load_relaxed(&cells[cpu].seen) == shi_load_relaxed(&cells[cpu].sent);
        if (all)
            return true;
        usleep(100);
    }
    return false;
}

static void storm(enum shi_flow_kind flow, bool banked, enum shi_idle idle)
{
    pthread_t threads[SENDERS + 1];
    struct shi_chip chip;
    uint32_t i, line, burst;
    uint64_t taken = 0;
    describe(&chip, flow, banked);
    memset(cells, 0, sizeof cells);
    rig_boot_chip(&rig, CPUS, idle, &chip);
    struct shi_irq_area *area = shi_irq_area(&rig.m);
    int native = shi_native_name("note");
    for (i = 0; i < CPUS; i++) {
        line = line_of_cpu[i] = flow == SHI_FLOW_SHARED   ? 10 + i
                                : flow == SHI_FLOW_VECTOR ? 0x29
                                                          : 9;
        shi_store_relaxed(&area->line_virq[line], VIRQ);
    }
    CHECK(shi_irq_trylock(&rig.host) == 0);
    CHECK(shi_irq_trylock(&rig.firmware) == -EAGAIN);
    shi_irqdesc_set_native(shi_irqdesc(&rig.m, VIRQ), (uint32_t)native, SHI_K_NONE, 0, 0);
    shi_irq_unlock(&rig.host);
    for (i = 0; i < CPUS; i++) {
        if (flow == SHI_FLOW_SHARED) {
            uint32_t calls[] = { chip.call + i, chip.reschedule + i, line_of_cpu[i] }, n;
            for (n = 0; n < 3; n++)
                shi_chip_route(&rig.host, calls[n], i);
        }
        shi_chip_enable(&rig.host, i, line_of_cpu[i], true);
    }
    for (burst = 0; burst < BURSTS; burst++) {
        for (i = 0; i < SENDERS; i++)
            CHECK(pthread_create(&threads[i], NULL, sender,
                                 (void *)(uintptr_t)(burst * SENDERS + i + 1)) == 0);
        CHECK(pthread_create(&threads[SENDERS], NULL, masker, NULL) == 0);
        for (i = 0; i <= SENDERS; i++)
            CHECK(pthread_join(threads[i], NULL) == 0);
        CHECK(settled());
    }
    for (i = 0; i < CPUS; i++)
        taken += shi_load_relaxed(&cells[i].taken);
    CHECK(taken >= CPUS && taken <= SENDERS * ROUNDS * BURSTS + CPUS);
    /* Calls go on beside it. */
    for (i = 0; i < CPUS; i++)
        CHECK(rig_call(&rig.host, i, 0, 0, SHI_K_NONE) == 0);
    printf("%s: %lu of %d taken\n", shi_flow_of(flow)->name, (unsigned long)taken,
           SENDERS * ROUNDS * BURSTS);
    fflush(stdout);
    rig_stop(&rig);
}

/* An NMI's Python handler can be what ASKED was set for, and it does not take it back. */
static void asked_for_nothing(void)
{
    struct shi_self self;
    uint32_t i;
    rig_boot(&rig, 2, SHI_IDLE_HALT);
    shi_reap_stop_all(&rig.firmware);
    for (i = 0; i < 2; i++)
        CHECK(pthread_join(rig.thread[i], NULL) == 0);
    CHECK(shi_self_init(&self, &rig.m, 0) == 0);
    shi_store_full(&self.slot->word, (uint64_t)self.gen << SHI_W_GEN_SHIFT | SHI_RUNNING |
                                         SHI_W_ASKED | SHI_W_KICKED);
    shi_irq_entry(&self);
    CHECK(shi_word_state(shi_load_full(&self.slot->word)) == SHI_RUNNING);
    CHECK(!(shi_load_full(&self.slot->word) & SHI_W_ASKED));
    self.nmi_waits = 1;
    shi_irq_entry(&self);
    CHECK(shi_load_full(&self.slot->word) & SHI_W_ASKED);
    shi_self_fini(&self);
    shi_self_fini(&rig.host);
    shi_self_fini(&rig.firmware);
    CHECK(munmap(rig.m.base, rig.m.total_bytes) == 0);
}

int main(void)
{
    uint32_t flow;
    shi_native_init();
    CHECK(shi_native_register("note", note) >= 0);
    for (flow = 0; flow < SHI_NFLOWS; flow++) {
        storm((enum shi_flow_kind)flow, false, SHI_IDLE_HALT);
        storm((enum shi_flow_kind)flow, false, SHI_IDLE_HALTPOLL);
    }
    storm(SHI_FLOW_SGI, true, SHI_IDLE_HALT);
    asked_for_nothing();
    return 0;
}
