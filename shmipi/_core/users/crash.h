/* SPDX-License-Identifier: MIT */
/*
 * Crash: the death of one CPU stops all others, and each saves what it was doing first.
 *
 * Who does it outlives them: the firmware, in the place of the CPU that a crash kernel would
 * boot on.  panic() ends its CPU by SIGABRT, after it has said why.
 */
#ifndef SHI_CRASH_H
#define SHI_CRASH_H

#include "users/dump.h"

#define SHI_PANIC_TEXT 512u
#define SHI_CRASH_PATH 1024u

/* What a CPU saves beside its text: its "registers". */
struct shi_crash_save {
    shi_a32 saved;   /* 1: all of this, stored last */
    shi_a32 signal;  /* that ended it, 0: none has */
    shi_a64 address; /* of what it touched then, where that has one */
    shi_a32 irqs_off, in_irq, in_nmi, preempt, in_task, nested;
};

struct shi_crash {
    shi_a32 armed;
    shi_a32 waiting;                 /* waiting_for_crash_ipi */
    shi_a32 begun;                   /* 1: somebody has: there is one crash */
    shi_a64 panic_cpu;               /* 1 + slot of the first who panics */
    shi_a64 mask[SHI_MAX_CPUS / 64]; /* who is to save itself, and stop */
    char panic[SHI_PANIC_TEXT];
    char path[SHI_CRASH_PATH];                       /* of the file that the firmware writes */
    _Alignas(SHI_LINE) struct shi_crash_save save[]; /* ncpus, then struct shi_dump */
};

uint64_t shi_crash_bytes(uint32_t ncpus);
/* Its memory is new, or of a crash that is over: ready for one. */
void shi_crash_arm(struct shi_crash *state, uint32_t ncpus);
struct shi_crash *shi_crash_state(const struct shi_machine *m);
struct shi_dump *shi_crash_dump(const struct shi_machine *m, struct shi_crash *state);

/* nmi_shootdown_cpus(), by the firmware: how many CPUs are asked, or -EBUSY: it was called
 * before, and the kernel warns.  `waiting` counts them down. */
int shi_crash_shootdown(struct shi_self *self);
/* Who is asked and has not answered. */
bool shi_crash_asked(const struct shi_crash *state, uint32_t cpu);
/* panic(), on a CPU or a host: 0, or -EBUSY: another was first.  The caller ends then. */
int shi_crash_panic(struct shi_self *self, const char *text);

/* Of NMI_LOCAL: save and stop, if this CPU is asked to. */
void shi_crash_nmi(struct shi_self *self);
/* Handlers of the signals by which a process ends for what it did: of this CPU. */
int shi_crash_install(void);

#endif
