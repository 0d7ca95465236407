/* SPDX-License-Identifier: MIT */
#include "base/sys.h"

#include <errno.h>

#include "base/event.h"
#include "irq/chip.h"
#include "irq/signal.h"
#include "irq/startup.h"

#define STARTUP_LOOK_NS 100000000

int shi_chip_wait_startup(struct shi_self *self)
{
    shi_a32 *startup = &self->slot->pic.startup;
    uint32_t was = shi_load_relaxed(startup), next;
    if (!self->m->chip.startup)
        return 0;
    /* INIT has ended this process: a STARTUP since is for the next one. */
    while (shi_load_full(&self->slot->pic.init) == self->gen && self->gen)
        shi_event_wait(&self->slot->pic.init, self->gen, STARTUP_LOOK_NS);
    do {
        /* The bootstrap processor does not wait; nor does a process that was made
         * because a STARTUP asked for it. */
        next = self->id == 0 || was == SHI_SU_ASKED ? SHI_SU_STARTED : SHI_SU_WAITING;
    } while (!shi_cas_full(startup, &was, next));
    if (next == SHI_SU_STARTED)
        return 0;
    shi_event_ring(&self->m->header->hotplug_event);
    while (shi_load_acquire(startup) == SHI_SU_WAITING) {
        if (shi_load_relaxed(&self->m->header->machine_state) >= SHI_M_STOPPING)
            return -ECANCELED;
        shi_event_wait(startup, SHI_SU_WAITING, STARTUP_LOOK_NS);
    }
    /* Taken: who dies from here on dies as a CPU that has started. */
    was = SHI_SU_GRANTED;
    shi_cas_full(startup, &was, SHI_SU_STARTED);
    return 0;
}

int shi_chip_let_start(struct shi_self *self, uint32_t cpu)
{
    shi_a32 *startup = &shi_pic(self->m, cpu)->startup;
    uint32_t was = SHI_SU_WAITING;
    if (!shi_cas_full(startup, &was, SHI_SU_STARTED))
        return 0;
    shi_event_wake(startup);
    return 1;
}

static bool is_dead(const struct shi_machine *m, uint32_t cpu)
{
    return shi_word_state(shi_load_full(&shi_slot(m, cpu)->word)) == SHI_DEAD;
}

int shi_chip_startup(struct shi_self *self, uint32_t cpu, uint32_t vector)
{
    struct shi_pic *pic = shi_pic(self->m, cpu);
    uint32_t was = shi_load_acquire(&pic->startup), next;
    do {
        /* What waited may be dead: then nobody would take it. */
        if (was == SHI_SU_RESET || (was != SHI_SU_ASKED && is_dead(self->m, cpu)))
            next = SHI_SU_ASKED;
        else if (was == SHI_SU_WAITING)
            next = SHI_SU_GRANTED;
        else
            return 0; /* SDM: a STARTUP IPI that finds no waiting processor is dropped */
        shi_store_relaxed(&pic->sipi, vector);
    } while (!shi_cas_full(&pic->startup, &was, next));
    if (next == SHI_SU_GRANTED) {
        /* Granted first (full), dead second; the reaper marks it dead first and looks for
         * what was granted second: one of the two sees the other, and asks for a process. */
        if (!is_dead(self->m, cpu)) {
            shi_event_wake(&pic->startup);
            return 1;
        }
        shi_startup_died(self->m, cpu);
    }
    shi_firmware_look(self);
    return 1;
}

int shi_chip_init(struct shi_self *self, uint32_t cpu)
{
    shi_a32 *startup = &shi_pic(self->m, cpu)->startup;
    uint32_t was = shi_load_acquire(startup);
    do {
        /* In reset, and its process still there: who sent the INIT before was killed right
         * here, and nobody else would end it.  (None is made in reset before a STARTUP.) */
        if (was == SHI_SU_RESET && !is_dead(self->m, cpu))
            break;
        /* What waits, or comes up to wait, or is about to be made, is in reset. */
        if (was != SHI_SU_STARTED && was != SHI_SU_GRANTED)
            return 0;
        /* The state first, the end second: a STARTUP that follows at once finds it. */
    } while (!shi_cas_full(startup, &was, cpu ? SHI_SU_RESET : SHI_SU_ASKED));
    shi_irq_end(self, cpu);
    shi_firmware_look(self); /* it ends the process; and CPU 0's, dead before, is made anew */
    return 1;
}
