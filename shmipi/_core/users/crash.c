/* SPDX-License-Identifier: MIT */
#include "base/sys.h"

#include <errno.h>
#include <signal.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "base/rules.h"
#include "irq/nmi.h"
#include "smp/entry.h"
#include "users/crash.h"
#include "users/stop.h"

static uint64_t saves_bytes(uint32_t ncpus)
{
    uint64_t bytes = sizeof(struct shi_crash) + (uint64_t)ncpus * sizeof(struct shi_crash_save);
    return (bytes + SHI_LINE - 1) / SHI_LINE * SHI_LINE;
}

uint64_t shi_crash_bytes(uint32_t ncpus)
{
    return saves_bytes(ncpus) + shi_dump_bytes(ncpus);
}

struct shi_dump *shi_crash_dump(const struct shi_machine *m, struct shi_crash *state)
{
    return (struct shi_dump *)((uint8_t *)state + saves_bytes(m->ncpus));
}

struct shi_crash *shi_crash_state(const struct shi_machine *m)
{
    return shi_user(m, SHI_USER_crash, shi_crash_bytes(m->ncpus));
}

static struct shi_crash *armed_state(const struct shi_machine *m)
{
    struct shi_crash *state = shi_crash_state(m);
    return state && shi_load_acquire(&state->armed) ? state : NULL;
}

void shi_crash_arm(struct shi_crash *state, uint32_t ncpus)
{
    struct shi_dump *dump = (struct shi_dump *)((uint8_t *)state + saves_bytes(ncpus));
    uint32_t i;
    shi_store_full(&state->armed, 0);
    shi_dump_init(dump, ncpus);
    shi_dump_begin(dump);
    for (i = 0; i < ncpus; i++)
        shi_store_relaxed(&state->save[i].saved, 0);
    for (i = 0; i < SHI_MAX_CPUS / 64; i++)
        shi_store_relaxed(&state->mask[i], 0);
    shi_store_relaxed(&state->waiting, 0);
    shi_store_relaxed(&state->begun, 0);
    shi_store_relaxed(&state->panic_cpu, 0);
    state->panic[0] = 0;
    /* Release: who finds it armed finds all this. */
    shi_store_full(&state->armed, 1);
}

/* ---- the firmware -------------------------------------------------------------------------- */

bool shi_crash_asked(const struct shi_crash *state, uint32_t cpu)
{
    /* Acquire pairs with the swap by which it has saved itself. */
    return shi_load_acquire(&state->mask[cpu / 64]) >> (cpu % 64) & 1;
}

int shi_crash_shootdown(struct shi_self *self)
{
    const struct shi_machine *m = self->m;
    struct shi_crash *state = armed_state(m);
    uint32_t cpu, asked = 0, was = 0;
    if (!state)
        return -ENOENT;
    if (!shi_cas_full(&state->begun, &was, 1))
        return -EBUSY;
    for (cpu = 0; cpu < m->ncpus; cpu++)
        if (shi_word_online(shi_load_acquire(&shi_slot(m, cpu)->word))) {
            shi_fetch_or_full(&state->mask[cpu / 64], 1ull << (cpu % 64));
            asked++;
        }
    shi_store_full(&state->waiting, asked);
    for (cpu = 0; cpu < m->ncpus; cpu++)
        if (shi_crash_asked(state, cpu)) {
            shi_enter(self);
            shi_nmi_send(self, cpu); /* one that has just died is not waited for */
            shi_leave(self);
        }
    return (int)asked;
}

/* ---- a CPU --------------------------------------------------------------------------------- */

static void save(struct shi_self *self, struct shi_crash *state, uint32_t round,
                 const char *title, uint32_t sig, uint64_t address)
{
    struct shi_crash_save *save = &state->save[self->id];
    shi_store_relaxed(&save->signal, sig);
    shi_store_relaxed(&save->address, address);
    shi_store_relaxed(&save->irqs_off, self->irqs_off);
    shi_store_relaxed(&save->in_irq, self->in_irq);
    shi_store_relaxed(&save->in_nmi, self->in_nmi);
    shi_store_relaxed(&save->preempt, self->preempt);
    shi_store_relaxed(&save->in_task, self->in_task);
    shi_dump_here(self, shi_crash_dump(self->m, state), round, title);
    shi_store_release(&save->saved, 1);
}

void shi_crash_nmi(struct shi_self *self)
{
    struct shi_crash *state = armed_state(self->m);
    uint64_t bit = 1ull << (self->id % 64);
    if (!state || !shi_crash_asked(state, self->id))
        return;
    if (shi_rule_off(self->m, SHI_RULE_crash_nmi) && self->irqs_off)
        return;
    if (!shi_rule_off(self->m, SHI_RULE_crash_save))
        save(self, state, shi_dump_round(shi_crash_dump(self->m, state)), "CPU ", 0, 0);
    shi_fetch_add_full(&state->waiting, UINT32_MAX);
    shi_fetch_and_full(&state->mask[self->id / 64], ~bit);
    shi_stop_this_cpu(self);
}

int shi_crash_panic(struct shi_self *self, const char *text)
{
    struct shi_crash *state = armed_state(self->m);
    uint64_t first = 0;
    size_t n = strlen(text);
    if (!state)
        return -ENOENT;
    if (!shi_cas_full(&state->panic_cpu, &first, (uint64_t)self->id + 1 + ((uint64_t)1 << 32)))
        return -EBUSY; /* panic_smp_self_stop(): the first stops us */
    if (n >= sizeof state->panic)
        n = sizeof state->panic - 1;
    memcpy(state->panic, text, n);
    state->panic[n] = 0;
    /* Release: who finds it without the mark finds the text. */
    shi_store_full(&state->panic_cpu, (uint64_t)self->id + 1);
    return 0;
}

/* ---- the signals ----------------------------------------------------------------------------- */

static const int fatal[] = { SIGSEGV, SIGBUS, SIGFPE, SIGILL, SIGABRT };
#define NFATAL (sizeof fatal / sizeof *fatal)
static struct sigaction before[NFATAL];

static void on_fatal(int sig, siginfo_t *info, void *context)
{
    struct shi_self *self = shi_this_cpu();
    int saved = errno;
    size_t i;
    /* First: a fault in here ends it as it would have without us. */
    for (i = 0; i < NFATAL; i++)
        sigaction(fatal[i], &before[i], NULL);
    struct shi_crash *state = self && getpid() == self->pid ? armed_state(self->m) : NULL;
    if (state && !shi_load_acquire(&state->save[self->id].saved)) {
        bool faulted = sig != SIGABRT && info->si_code > 0;
        self->context = context;
        save(self, state, shi_dump_round(shi_crash_dump(self->m, state)), "CPU ", (uint32_t)sig,
             faulted ? (uint64_t)(uintptr_t)info->si_addr : 0);
    }
    errno = saved;
    /* What faulted does so again when this returns; what was sent has to be sent again. */
    if (info->si_code <= 0)
        syscall(SYS_tgkill, getpid(), syscall(SYS_gettid), sig);
}

int shi_crash_install(void)
{
    struct sigaction action;
    size_t i;
    memset(&action, 0, sizeof action);
    action.sa_sigaction = on_fatal;
    action.sa_flags = SA_SIGINFO | SA_ONSTACK;
    sigemptyset(&action.sa_mask);
    for (i = 0; i < NFATAL; i++)
        if (sigaction(fatal[i], &action, &before[i]))
            return -errno;
    return 0;
}
