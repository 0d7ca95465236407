/* SPDX-License-Identifier: MIT */
#include "base/sys.h"

#include <errno.h>
#include <unistd.h>

#include "base/event.h"
#include "base/native.h"
#include "base/rules.h"
#include "irq/chip.h"
#include "irq/nmi.h"
#include "smp/entry.h"
#include "users/stop.h"

static struct shi_stop *state_of(const struct shi_machine *m)
{
    return shi_user(m, SHI_USER_stop, sizeof(struct shi_stop));
}

/* ---- who stops the others ---------------------------------------------------------------- */

int shi_send_stop_begin(struct shi_self *self)
{
    struct shi_stop *state = state_of(self->m);
    uint32_t i;
    if (!state)
        return -ENOENT;
    if (shi_lock_try(self, &state->stopping))
        return -EBUSY;
    shi_store_full(&state->nmi, 0);
    for (i = 0; i < SHI_MAX_CPUS / 64; i++)
        shi_store_full(&state->mask[i], 0);
    return 0;
}

void shi_send_stop_end(struct shi_self *self)
{
    struct shi_stop *state = state_of(self->m);
    if (state)
        shi_lock_release(self, &state->stopping);
}

void shi_send_stop_born(struct shi_self *self)
{
    struct shi_stop *state = state_of(self->m);
    /* Before it is online: what was asked of who had the slot before is not asked of it. */
    if (state)
        shi_fetch_and_full(&state->mask[self->id / 64], ~(1ull << (self->id % 64)));
}

static void ask(struct shi_self *self, uint32_t cpu)
{
    struct shi_stop *state = state_of(self->m);
    /* Full: before what makes it look. */
    if (state)
        shi_fetch_or_full(&state->mask[cpu / 64], 1ull << (cpu % 64));
}

static uint32_t stop_line(const struct shi_machine *m)
{
    uint32_t line;
    for (line = 0; line < m->chip.nlines; line++)
        if (m->chip.use[line] == SHI_USE_STOP)
            return line;
    return SHI_NO_LINE;
}

bool shi_send_stop_by_line(struct shi_self *self, uint32_t cpu)
{
    uint32_t line = stop_line(self->m);
    if (line == SHI_NO_LINE)
        return false;
    ask(self, cpu);
    shi_enter(self);
    shi_count(self, SHI_C_chip_writes);
    shi_irq_raise(self, cpu, line);
    shi_leave(self);
    return true;
}

void shi_send_stop_by_nmi(struct shi_self *self, uint32_t cpu)
{
    struct shi_stop *state = state_of(self->m);
    if (!state)
        return;
    shi_store_full(&state->nmi, 1);
    ask(self, cpu);
    shi_enter(self);
    shi_nmi_send(self, cpu);
    shi_leave(self);
}

bool shi_send_stop_asked(const struct shi_machine *m, uint32_t cpu)
{
    const struct shi_stop *state = state_of(m);
    return state && shi_load_full(&state->mask[cpu / 64]) >> (cpu % 64) & 1 &&
           shi_word_online(shi_load_full(&shi_slot(m, cpu)->word));
}

/* ---- who is stopped ------------------------------------------------------------------------ */

_Noreturn void shi_stop_this_cpu(struct shi_self *self)
{
    struct shi_slot *slot = self->slot;
    struct shi_stop *state = state_of(self->m);
    uint64_t w = shi_load_relaxed(&slot->word);
    shi_store_release(&slot->stopped, 1);
    /* set_cpu_online(false): from here on nobody queues anything.  What is queued is the
     * firmware's to complete, as of a CPU that died. */
    while (!shi_cas_full(&slot->word, &w, shi_word_with(w, SHI_OFFLINE)))
        ;
    if (state)
        shi_fetch_and_full(&state->mask[self->id / 64], ~(1ull << (self->id % 64)));
    shi_event_ring(&self->m->header->hotplug_event);
    _exit(SHI_STOPPED_STATUS);
}

static bool is_asked(const struct shi_self *self)
{
    const struct shi_stop *state = state_of(self->m);
    return state && shi_load_full(&state->mask[self->id / 64]) >> (self->id % 64) & 1;
}

/* sysvec_reboot, ipi_cpu_stop: its line. */
static bool take_stop(struct shi_self *self, uint32_t line)
{
    (void)line;
    if (is_asked(self))
        shi_stop_this_cpu(self);
    return true; /* sent to who had the slot before */
}

void shi_send_stop_nmi(struct shi_self *self)
{
    const struct shi_stop *state = state_of(self->m);
    if (state && shi_load_full(&state->nmi) && is_asked(self) &&
        !(shi_rule_off(self->m, SHI_RULE_nmi_stop) && self->irqs_off))
        shi_stop_this_cpu(self);
}

/* stop_this_cpu() of architectures that have no line for it: smp_call_function's. */
static void stop_this_cpu(void *info)
{
    struct shi_self *self = shi_this_cpu();
    (void)info;
    if (self)
        shi_stop_this_cpu(self);
}

void shi_send_stop_register(struct shi_machine *m)
{
    m->actions[SHI_USE_STOP] = take_stop;
}

void shi_send_stop_init(void)
{
    shi_native_register("stop_this_cpu", stop_this_cpu);
}
