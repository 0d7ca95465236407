/* SPDX-License-Identifier: MIT */
/* INIT: the state first, the process's end second, and who is killed between the two. */
#include "rig.h"

#include "irq/chip.h"
#include "irq/startup.h"

#define GENERATION 5u

static struct rig rig;

static uint32_t ended(void)
{
    return shi_load_full(&shi_pic(&rig.m, 1)->init);
}

/* CPU 1's process waits for STARTUP. */
static shi_a32 *waiting(void)
{
    rig_quiet(&rig, 2);
    shi_a32 *startup = &shi_pic(&rig.m, 1)->startup;
    rig.m.chip.startup = 1;
    rig_set_state(&rig, 1, SHI_OFFLINE);
    shi_store_full(startup, SHI_SU_WAITING);
    return startup;
}

/* Killed as it waited, and nobody has come to make another: a process is asked for. */
static void startup_finds_who_waits_dead(void)
{
    shi_a32 *startup = waiting();
    shi_reap_mark(&rig.firmware, 1, 9);
    CHECK(shi_chip_startup(&rig.host, 1, 7) == 1);
    CHECK(shi_load_full(startup) == SHI_SU_ASKED);
    CHECK(shi_chip_startup(&rig.host, 1, 8) == 0); /* one is enough */
    CHECK(shi_load_full(&shi_pic(&rig.m, 1)->sipi) == 7);
    shi_reap_reset(&rig.firmware, 1);
    CHECK(shi_load_full(startup) == SHI_SU_ASKED);
    rig_unquiet(&rig);
}

/* Granted, and killed before it has gone on: whoever comes next in the slot has started. */
static void startup_is_granted_to_the_dying(void)
{
    shi_a32 *startup = waiting();
    CHECK(shi_chip_startup(&rig.host, 1, 7) == 1);
    CHECK(shi_load_full(startup) != SHI_SU_WAITING);
    CHECK(shi_chip_startup(&rig.host, 1, 8) == 0);
    shi_reap_mark(&rig.firmware, 1, 9);
    CHECK(shi_load_full(startup) == SHI_SU_ASKED); /* the firmware makes a process */
    shi_reap_reset(&rig.firmware, 1);
    CHECK(shi_load_full(startup) == SHI_SU_ASKED);
    CHECK(shi_chip_wait_startup(&rig.cpu[1]) == 0); /* which does not wait, and if it dies, */
    CHECK(shi_load_full(startup) == SHI_SU_STARTED);
    shi_reap_mark(&rig.firmware, 1, 9);
    shi_reap_reset(&rig.firmware, 1); /* no other is made by itself */
    CHECK(shi_load_full(startup) == SHI_SU_NONE);
    rig_unquiet(&rig);

    startup = waiting(); /* INIT before it has gone on: in reset again */
    CHECK(shi_chip_startup(&rig.host, 1, 7) == 1);
    CHECK(shi_chip_init(&rig.host, 1) == 1);
    CHECK(shi_load_full(startup) == SHI_SU_RESET);
    rig_unquiet(&rig);
}

int main(void)
{
    rig_quiet(&rig, 2);
    shi_a32 *startup = &shi_pic(&rig.m, 1)->startup;
    shi_a64 *word = &shi_slot(&rig.m, 1)->word;
    rig_set_state(&rig, 1, SHI_RUNNING);
    shi_store_full(word, (uint64_t)GENERATION << SHI_W_GEN_SHIFT | SHI_RUNNING);
    CHECK(shi_word_gen(shi_load_full(word)) == GENERATION);

    shi_store_full(startup, SHI_SU_WAITING); /* in reset already */
    CHECK(shi_chip_init(&rig.host, 1) == 0 && ended() == 0);
    shi_store_full(startup, SHI_SU_STARTED);
    CHECK(shi_chip_init(&rig.host, 1) == 1 && ended() == GENERATION);
    CHECK(shi_load_full(startup) == SHI_SU_RESET);

    /* Killed before it asked for the process's end: the next INIT does. */
    shi_store_full(&shi_pic(&rig.m, 1)->init, 0);
    CHECK(shi_chip_init(&rig.host, 1) == 1 && ended() == GENERATION);
    CHECK(shi_load_full(startup) == SHI_SU_RESET);

    rig_set_state(&rig, 1, SHI_DEAD); /* it has ended: a second INIT is nothing */
    CHECK(shi_chip_init(&rig.host, 1) == 0);
    rig_unquiet(&rig);
    startup_finds_who_waits_dead();
    startup_is_granted_to_the_dying();
    return 0;
}
