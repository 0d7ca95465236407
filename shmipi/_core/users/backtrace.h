/* SPDX-License-Identifier: MIT */
/* lib/nmi_backtrace.c: every CPU says by an NMI where it is. */
#ifndef SHI_BACKTRACE_H
#define SHI_BACKTRACE_H

#include "users/dump.h"

struct shi_backtrace {
    shi_a64 flag;                    /* backtrace_flag: one at a time (shi_lock_try) */
    shi_a64 mask[SHI_MAX_CPUS / 64]; /* backtrace_mask: who is asked, and has not said it */
    _Alignas(SHI_LINE) struct shi_dump dump;
};

uint64_t shi_backtrace_bytes(uint32_t ncpus);
/* Its memory is new. */
void shi_backtrace_init(struct shi_backtrace *state, uint32_t ncpus);

/* nmi_trigger_cpumask_backtrace() in steps.  -EBUSY: another is under way. */
int shi_backtrace_begin(struct shi_self *self);
/* raise(): ask a CPU.  0, or -ENXIO. */
int shi_backtrace_ask(struct shi_self *self, uint32_t cpu);
/* Has it yet to say it? */
bool shi_backtrace_asked(const struct shi_machine *m, uint32_t cpu);
const char *shi_backtrace_text(const struct shi_machine *m, uint32_t cpu, uint32_t *length);
/* nmi_cpu_backtrace(NULL): of this CPU, without an NMI. */
void shi_backtrace_here(struct shi_self *self);
void shi_backtrace_end(struct shi_self *self);

/* nmi_cpu_backtrace(), of NMI_LOCAL: how many NMIs it was for, 1 or 0. */
uint32_t shi_backtrace_nmi(struct shi_self *self);

#endif
