/* SPDX-License-Identifier: MIT */
#include "base/sys.h"

#include <errno.h>

#include "base/rules.h"
#include "irq/nmi.h"
#include "smp/entry.h"
#include "users/backtrace.h"

static struct shi_backtrace *state_of(const struct shi_machine *m)
{
    struct shi_backtrace *state =
        shi_user(m, SHI_USER_backtrace, shi_backtrace_bytes(m->ncpus));
    return state && state->dump.ncpus == m->ncpus ? state : NULL;
}

uint64_t shi_backtrace_bytes(uint32_t ncpus)
{
    return offsetof(struct shi_backtrace, dump) + shi_dump_bytes(ncpus);
}

void shi_backtrace_init(struct shi_backtrace *state, uint32_t ncpus)
{
    shi_dump_init(&state->dump, ncpus);
}

/* ---- who asks -------------------------------------------------------------------------- */

int shi_backtrace_begin(struct shi_self *self)
{
    struct shi_backtrace *state = state_of(self->m);
    uint32_t i;
    if (!state)
        return -ENOENT;
    /* Of a holder that died: its CPUs are asked no more. */
    if (shi_lock_try(self, &state->flag) && !shi_rule_off(self->m, SHI_RULE_nmi_one_at_a_time))
        return -EBUSY;
    for (i = 0; i < SHI_MAX_CPUS / 64; i++)
        shi_store_full(&state->mask[i], 0);
    shi_dump_begin(&state->dump);
    return 0;
}

int shi_backtrace_ask(struct shi_self *self, uint32_t cpu)
{
    struct shi_backtrace *state = state_of(self->m);
    if (!state)
        return -ENOENT;
    /* Full: before the NMI, which looks for it. */
    shi_fetch_or_full(&state->mask[cpu / 64], 1ull << (cpu % 64));
    shi_enter(self);
    int sent = shi_nmi_send(self, cpu);
    shi_leave(self);
    if (sent < 0)
        shi_fetch_and_full(&state->mask[cpu / 64], ~(1ull << (cpu % 64)));
    return sent < 0 ? sent : 0;
}

bool shi_backtrace_asked(const struct shi_machine *m, uint32_t cpu)
{
    const struct shi_backtrace *state = state_of(m);
    /* Acquire pairs with the swap by which it says that its text is there. */
    return state && shi_load_acquire(&state->mask[cpu / 64]) >> (cpu % 64) & 1;
}

const char *shi_backtrace_text(const struct shi_machine *m, uint32_t cpu, uint32_t *length)
{
    const struct shi_backtrace *state = state_of(m);
    return state ? shi_dump_text(&state->dump, cpu, length) : NULL;
}

void shi_backtrace_end(struct shi_self *self)
{
    struct shi_backtrace *state = state_of(self->m);
    uint32_t i;
    if (!state)
        return;
    for (i = 0; i < SHI_MAX_CPUS / 64; i++)
        shi_store_full(&state->mask[i], 0);
    shi_lock_release(self, &state->flag);
}

/* ---- who is asked ------------------------------------------------------------------------ */

#define TITLE "NMI backtrace for cpu "

void shi_backtrace_here(struct shi_self *self)
{
    struct shi_backtrace *state = state_of(self->m);
    if (!state)
        return;
    const void *context = self->context;
    self->context = NULL; /* not what a handler had interrupted before */
    shi_dump_here(self, &state->dump, shi_dump_round(&state->dump), TITLE);
    self->context = context;
}

uint32_t shi_backtrace_nmi(struct shi_self *self)
{
    struct shi_backtrace *state = state_of(self->m);
    uint64_t bit = 1ull << (self->id % 64);
    if (!state)
        return 0;
    uint32_t round = shi_dump_round(&state->dump); /* before the look: see shi_dump_begin */
    if (!(shi_load_acquire(&state->mask[self->id / 64]) & bit))
        return 0;
    if (shi_rule_off(self->m, SHI_RULE_nmi_unmaskable) && self->irqs_off)
        return 0;
    shi_dump_here(self, &state->dump, round, TITLE);
    if (!shi_rule_off(self->m, SHI_RULE_nmi_clear_cpu))
        shi_fetch_and_full(&state->mask[self->id / 64], ~bit);
    return 1;
}
