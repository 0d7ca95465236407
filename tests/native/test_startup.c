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
    return 0;
}
