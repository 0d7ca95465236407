/* SPDX-License-Identifier: MIT */
/* NMIs by themselves: who is asked and in which order, and who enters an NMI IPI. */
#include "rig.h"

#include <signal.h>

#include "irq/irqdesc.h"
#include "irq/nmi.h"

#define MANY 100000u

static struct rig rig;
static struct shi_self *cpu; /* this thread is CPU 0 */
static uint64_t order;       /* a decimal digit for each handler that was asked */

static void note(void *info)
{
    order = 10 * order + (uint64_t)(uintptr_t)info;
}

static void boot(void)
{
    signal(41, SIG_IGN);
    rig_quiet(&rig, 2);
    rig.m.nmi_signal = 41;
    cpu = &rig.cpu[0];
    rig_set_state(&rig, 0, SHI_RUNNING);
    rig_set_state(&rig, 1, SHI_RUNNING);
    order = 0;
}

static uint32_t native(void)
{
    int found = shi_native_find("note");
    return (uint32_t)(found < 0 ? shi_native_register("note", note) : found);
}

static void add(uint32_t type, uint64_t number, bool first)
{
    struct shi_irqdesc *action = shi_nmi_action_free(&rig.m, type);
    CHECK(action);
    shi_irqdesc_set_native(action, native(), SHI_K_INT, number, 0);
    shi_nmi_action_add(&rig.m, type, action, first);
}

/* One NMI of CPU 0: who was asked. */
static uint64_t nmi(void)
{
    order = 0;
    CHECK(shi_nmi_send(&rig.host, 0) == 1);
    shi_nmi_entry(cpu);
    CHECK(!shi_load_full(&cpu->slot->pic.nmi));
    CHECK(!(shi_load_full(&cpu->slot->pic.nmi_service) & 1));
    return order;
}

static uint64_t counted(enum shi_counter which)
{
    return shi_load_relaxed(&cpu->slot->counters[SHI_CTX_NMI][which]);
}

static void who_is_asked(void)
{
    uint32_t i;
    boot();
    CHECK(nmi() == 0 && counted(SHI_C_nmi_unknown) == 1);
    add(SHI_NMI_UNKNOWN, 9, false);
    CHECK(nmi() == 9 && counted(SHI_C_nmi_unknown) == 2);
    add(SHI_NMI_SERR, 7, false);
    add(SHI_NMI_IO_CHECK, 8, false);
    shi_fetch_or_full(&shi_irq_area(&rig.m)->nmi.reason, 0xff);
    CHECK(nmi() == 7);
    CHECK(nmi() == 8);
    CHECK(nmi() == 9); /* the other bits are no reasons */
    CHECK(counted(SHI_C_nmi_external) == 2 && counted(SHI_C_nmi_unknown) == 3);
    add(SHI_NMI_LOCAL, 1, false);
    add(SHI_NMI_LOCAL, 2, false);
    add(SHI_NMI_LOCAL, 3, true);
    CHECK(nmi() == 312);
    shi_nmi_action_remove(&rig.m, SHI_NMI_LOCAL, 1);
    CHECK(nmi() == 32);
    shi_nmi_action_remove(&rig.m, SHI_NMI_LOCAL, 0);
    shi_nmi_action_remove(&rig.m, SHI_NMI_LOCAL, 0);
    CHECK(nmi() == 9);
    for (i = 0; i < SHI_NMI_ACTIONS; i++)
        add(SHI_NMI_LOCAL, i % 10, i % 2);
    CHECK(!shi_nmi_action_free(&rig.m, SHI_NMI_LOCAL));
    CHECK(nmi() == 319753102468024);
    CHECK(!shi_nmi_action(&rig.m, SHI_NMI_LOCAL, SHI_NMI_ACTIONS));
    /* Whatever the segment says. */
    shi_store_full(&shi_irq_area(&rig.m)->nmi.order[SHI_NMI_LOCAL], UINT64_MAX);
    nmi();
    rig_unquiet(&rig);
}

static void back_to_back(void)
{
    boot();
    add(SHI_NMI_LOCAL, 1, false);
    add(SHI_NMI_LOCAL, 2, false);
    CHECK(shi_nmi_send(&rig.host, 0) == 1);
    CHECK(shi_nmi_send(&rig.host, 0) == 1);
    CHECK(shi_nmi_send(&rig.host, 0) == 0); /* a third collapses */
    shi_nmi_entry(cpu);
    CHECK(order == 1212 && cpu->nmi_swallow); /* two events in one NMI */
    shi_nmi_action_remove(&rig.m, SHI_NMI_LOCAL, 0);
    shi_nmi_action_remove(&rig.m, SHI_NMI_LOCAL, 0);
    CHECK(nmi() == 0); /* not back to back */
    CHECK(counted(SHI_C_nmi_swallowed) == 0 && counted(SHI_C_nmi_unknown) == 1);
    cpu->nmi_ahead = true; /* entered from a wait */
    CHECK(nmi() == 0);
    CHECK(counted(SHI_C_nmi_swallowed) == 1 && counted(SHI_C_nmi_unknown) == 1);
    CHECK(nmi() == 0 && counted(SHI_C_nmi_unknown) == 2);
    rig_unquiet(&rig);
}

/* Its signal came just after the CPU had gone offline, and the CPU comes back before the Python
 * handlers have run: the NMI is over once, when they have. */
static void in_service_when_back(void)
{
    struct shi_irqdesc *action;
    boot();
    struct shi_pic *pic = &rig.cpu[0].slot->pic;
    action = shi_nmi_action_free(&rig.m, SHI_NMI_LOCAL);
    shi_irqdesc_set_python(cpu, action, 0, 1);
    shi_nmi_action_add(&rig.m, SHI_NMI_LOCAL, action, false);
    CHECK(shi_nmi_send(&rig.host, 0) == 1);
    shi_nmi_entry(cpu);
    CHECK(cpu->nmi_waits && shi_load_full(&pic->nmi_service) & 1);
    CHECK(shi_nmi_send(&rig.host, 0) == 1); /* lost, as what is sent to a CPU that is offline */
    shi_chip_reset_own(cpu);
    CHECK(shi_load_full(&pic->nmi) == SHI_NMI_IN_SERVICE);
    CHECK(shi_load_full(&pic->nmi_service) & 1);
    cpu->nmi_waits = 0;
    shi_nmi_done(cpu);
    CHECK(!shi_load_full(&pic->nmi) && !(shi_load_full(&pic->nmi_service) & 1));
    shi_nmi_action_remove(&rig.m, SHI_NMI_LOCAL, 0);
    add(SHI_NMI_LOCAL, 1, false);
    CHECK(nmi() == 1);
    rig_unquiet(&rig);
}

/* The sender has the lock: its number. */
static uint32_t publish(struct shi_self *self, uint64_t value)
{
    uint32_t number = shi_nmi_ipi_number(self);
    shi_irqdesc_set_native(shi_nmi_ipi(&rig.m), native(), SHI_K_INT, value, 0);
    return number;
}

static void an_nmi_ipi(void)
{
    struct shi_irqdesc seen;
    uint32_t number, found;
    boot();
    CHECK(shi_nmi_ipi_trylock(&rig.cpu[1]) == 0);
    CHECK(shi_nmi_ipi_trylock(&rig.host) == -EAGAIN);
    number = publish(&rig.cpu[1], 4);
    CHECK(shi_nmi_ipi_ask(&rig.cpu[1], 0, number, false) == 0);
    CHECK(!shi_nmi_ipi_entered(&rig.m, 0, number));
    shi_nmi_entry(cpu);
    CHECK(order == 4 && shi_nmi_ipi_entered(&rig.m, 0, number));
    CHECK(!shi_nmi_ipi_take_back(&rig.m, 0, number));
    CHECK(counted(SHI_C_nmi_unknown) == 0);

    /* Taken back: its NMI comes, and finds nothing. */
    number = publish(&rig.cpu[1], 5);
    CHECK(shi_nmi_ipi_ask(&rig.cpu[1], 0, number, true) == 0);
    CHECK(shi_nmi_ipi_asked(cpu, &seen, &found) && found == number);
    CHECK(shi_nmi_ipi_take_back(&rig.m, 0, number));
    CHECK(!shi_nmi_ipi_enter(cpu, found));
    shi_nmi_entry(cpu);
    CHECK(order == 4 && counted(SHI_C_nmi_unknown) == 1);
    rig_set_state(&rig, 0, SHI_OFFLINE);
    CHECK(shi_nmi_ipi_ask(&rig.cpu[1], 0, number, false) == -ENXIO);
    rig_set_state(&rig, 0, SHI_RUNNING);

    /* Its sender dies: void at once, and what the next one publishes is not run for it. */
    number = publish(&rig.cpu[1], 6);
    CHECK(shi_nmi_ipi_ask(&rig.cpu[1], 0, number, false) == 0);
    shi_reap_mark(&rig.firmware, 1, 9);
    CHECK(!shi_nmi_ipi_asked(cpu, &seen, &found));
    CHECK(!shi_load_full(&cpu->slot->pic.nmi_request));
    shi_store_full(&cpu->slot->pic.nmi_request, number);
    CHECK(shi_nmi_ipi_trylock(&rig.host) == 0);
    found = publish(&rig.host, 7);
    CHECK(found == number + 1);
    shi_nmi_entry(cpu);
    CHECK(order == 4 && !shi_load_full(&cpu->slot->pic.nmi_request));
    shi_store_full(&shi_irq_area(&rig.m)->nmi.request, UINT32_MAX);
    CHECK(publish(&rig.host, 8) == 1); /* 0 asks for nobody */
    shi_nmi_ipi_unlock(&rig.host);
    CHECK(shi_nmi_ipi_trylock(&rig.host) == 0);
    shi_nmi_ipi_unlock(&rig.host);
    rig_unquiet(&rig);
}

/* Enters what it is asked for: `value` must be that of the number it has entered. */
static shi_a64 entered, wrong;
static shi_a32 stop;

static void *target(void *arg)
{
    struct shi_irqdesc seen;
    uint32_t number;
    (void)arg;
    while (!shi_load_acquire(&stop)) {
        if (!shi_nmi_ipi_asked(cpu, &seen, &number) || !shi_nmi_ipi_enter(cpu, number))
            continue;
        shi_fetch_add_full(&entered, 1);
        if (seen.info != number || shi_load_relaxed(&seen.action) != SHI_IA_NATIVE)
            shi_fetch_add_full(&wrong, 1);
    }
    return NULL;
}

/* The sender asks and takes back as fast as it can: each is entered, or taken back, once. */
static void entered_or_taken_back(void)
{
    pthread_t thread;
    uint32_t i;
    uint64_t back = 0;
    boot();
    CHECK(shi_nmi_ipi_trylock(&rig.host) == 0);
    CHECK(pthread_create(&thread, NULL, target, NULL) == 0);
    for (i = 0; i < MANY; i++) {
        uint32_t number = shi_nmi_ipi_number(&rig.host);
        shi_irqdesc_set_native(shi_nmi_ipi(&rig.m), native(), SHI_K_INT, number, 0);
        shi_store_full(&cpu->slot->pic.nmi_request, number);
        if (i % 1000 == 0)
            while (!shi_nmi_ipi_entered(&rig.m, 0, number))
                sched_yield();
        back += shi_nmi_ipi_take_back(&rig.m, 0, number);
    }
    shi_store_release(&stop, 1);
    CHECK(pthread_join(thread, NULL) == 0);
    printf("%u asked, %llu entered, %llu taken back\n", MANY,
           (unsigned long long)shi_load_full(&entered), (unsigned long long)back);
    CHECK(shi_load_full(&entered) + back == MANY);
    CHECK(shi_load_full(&entered) >= MANY / 1000 && !shi_load_full(&wrong));
    shi_nmi_ipi_unlock(&rig.host);
    rig_unquiet(&rig);
}

int main(void)
{
    who_is_asked();
    back_to_back();
    in_service_when_back();
    an_nmi_ipi();
    entered_or_taken_back();
    return 0;
}
