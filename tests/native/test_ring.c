/* SPDX-License-Identifier: MIT */
/* Ringing a CPU by itself: what each state asks for, and that a sleeper is always woken. */
#include "rig.h"

#include <signal.h>

#include "irq/ring.h"

static struct rig rig;

#define STATE(cpu) shi_word_state(shi_load_full(&shi_slot(&rig.m, cpu)->word))
#define SENT() shi_load_relaxed(&rig.host.counts[SHI_C_doorbells_sent])

static uint64_t pending(uint32_t cpu)
{
    return shi_load_full(&shi_slot(&rig.m, cpu)->word) & SHI_W_PENDING;
}

static void clear(uint32_t cpu, enum shi_state state)
{
    shi_fetch_and_full(&shi_slot(&rig.m, cpu)->word, ~(SHI_W_PENDING | SHI_W_KICKED));
    rig_set_state(&rig, cpu, state);
}

/* The machine has no kick: a running CPU looks when it is asked next. */
static void each_state(void)
{
    static const enum shi_state absent[] = { SHI_OFFLINE, SHI_DEAD };
    uint32_t i;
    rig_quiet(&rig, 1);
    for (i = 0; i < 2; i++) {
        clear(0, absent[i]);
        shi_irq_ring(&rig.host, 0);
        CHECK(STATE(0) == absent[i] && !pending(0));
    }
    clear(0, SHI_POLLING);
    shi_irq_ring(&rig.host, 0);
    CHECK(STATE(0) == SHI_POLLING && pending(0));
    clear(0, SHI_RUNNING);
    shi_irq_ring(&rig.host, 0);
    CHECK(STATE(0) == SHI_RUNNING && pending(0));
    CHECK(SENT() == 0);

    clear(0, SHI_HALTED);
    shi_irq_ring(&rig.host, 0);
    CHECK(STATE(0) == SHI_RUNG && pending(0));
    CHECK(SENT() == 1);
    shi_irq_ring(&rig.host, 0); /* somebody has undertaken to */
    CHECK(SENT() == 1);
    CHECK(shi_irq_ring_again(&rig.host, 0, 0) == 0); /* he may have died */
    CHECK(STATE(0) == SHI_RUNG && SENT() == 2);
    shi_irq_ring_pending(&rig.host, 0, true);
    CHECK(SENT() == 3);
    shi_irq_ring_pending(&rig.host, 0, false);
    CHECK(SENT() == 3);

    clear(0, SHI_HALTED); /* a completion is no interrupt */
    shi_irq_ring_waiter(&rig.host, 0);
    CHECK(STATE(0) == SHI_RUNG && !pending(0) && SENT() == 4);
    clear(0, SHI_RUNNING);
    shi_irq_ring_waiter(&rig.host, 0);
    CHECK(STATE(0) == SHI_RUNNING && SENT() == 4);
    uint32_t seen = shi_load_full(&rig.host.slot->event);
    shi_irq_ring_waiter(&rig.firmware, rig.host.id);
    CHECK(shi_load_full(&rig.host.slot->event) != seen);
    /* Nobody is left named: the reaper would never give up a pid. */
    CHECK(shi_load_full(&rig.host.slot->ringing) == 0);
    rig_unquiet(&rig);
}

/* With kicks: one is outstanding at a time, and its target cannot go while it is sent. */
static shi_a32 kicks;

static void on_signal(int number)
{
    (void)number;
    shi_fetch_add_relaxed(&kicks, 1);
}

static void kicks_are_one_at_a_time(void)
{
    rig_quiet(&rig, 1);
    rig.m.kick = true;
    signal((int)rig.m.kick_signal, on_signal);
    shi_store_full(&shi_slot(&rig.m, 0)->pid, (uint32_t)getpid());
    shi_store_full(&shi_slot(&rig.m, 0)->tid, (uint32_t)gettid());
    clear(0, SHI_RUNNING);
    shi_irq_ring(&rig.host, 0);
    CHECK(shi_load_full(&shi_slot(&rig.m, 0)->word) & SHI_W_KICKED);
    CHECK(shi_load_full(&kicks) == 1);
    shi_irq_ring(&rig.host, 0);
    CHECK(shi_load_full(&kicks) == 1);
    CHECK(shi_load_relaxed(&rig.host.counts[SHI_C_kicks_coalesced]) == 1);
    CHECK(shi_irq_ring_again(&rig.host, 0, SHI_W_PENDING) == 0);
    CHECK(shi_load_full(&kicks) == 2);
    CHECK(shi_load_relaxed(&rig.host.counts[SHI_C_kicks_sent]) == 2);
    CHECK(shi_load_full(&rig.host.slot->ringing) == 0);
    shi_store_full(&shi_slot(&rig.m, 0)->word, SHI_DEAD);
    CHECK(shi_irq_signal_nmi(&rig.host, 0) == -ESRCH);
    CHECK(shi_load_full(&kicks) == 2);
    signal((int)rig.m.kick_signal, SIG_DFL);
    rig_unquiet(&rig);
}

/* Many ring one that halts again and again: it sees the last that each of them did. */
#define RINGERS 3
#define ROUNDS 4000

static shi_a32 done[RINGERS];

static void *ringer(void *arg)
{
    struct shi_self *self = arg;
    uint32_t i;
    for (i = 0; i < ROUNDS; i++) {
        shi_fetch_add_full(&done[self->id - 1], 1);
        shi_irq_ring_waiter(self, 0);
    }
    return NULL;
}

static bool all_done(const void *seen)
{
    const uint32_t *was = seen;
    uint32_t i;
    for (i = 0; i < RINGERS; i++)
        if (shi_load_full(&done[i]) != was[i])
            return true;
    return false;
}

static void nobody_sleeps_on(void)
{
    pthread_t threads[RINGERS];
    uint32_t seen[RINGERS] = { 0 }, i;
    rig_quiet(&rig, RINGERS + 1);
    for (i = 0; i <= RINGERS; i++)
        rig_set_state(&rig, i, SHI_POLLING);
    for (i = 0; i < RINGERS; i++)
        CHECK(pthread_create(&threads[i], NULL, ringer, &rig.cpu[i + 1]) == 0);
    while (seen[0] + seen[1] + seen[2] < RINGERS * ROUNDS) {
        /* Ten seconds are for ever: a lost wake-up is -ETIMEDOUT. */
        CHECK(shi_halt_until(&rig.cpu[0], all_done, seen, 10000000000) != -ETIMEDOUT);
        for (i = 0; i < RINGERS; i++)
            seen[i] = shi_load_full(&done[i]);
    }
    for (i = 0; i < RINGERS; i++)
        CHECK(pthread_join(threads[i], NULL) == 0);
    CHECK(STATE(0) == SHI_POLLING);
    rig_unquiet(&rig);
}

int main(void)
{
    each_state();
    kicks_are_one_at_a_time();
    nobody_sleeps_on();
    return 0;
}
