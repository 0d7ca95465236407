/* SPDX-License-Identifier: MIT */
/* smp_send_stop(): CPUs that stop, by a line, by an NMI or by a call. */
#ifndef SHI_STOP_H
#define SHI_STOP_H

#include "base/machine.h"

struct shi_stop {
    shi_a64 stopping; /* stopping_cpu: the first caller (shi_lock_try) */
    shi_a32 nmi;      /* 1: who takes an NMI is to stop as well */
    uint32_t reserved;
    shi_a64 mask[SHI_MAX_CPUS / 64]; /* cpus_stop_mask: who is to stop, and has not */
};

/* Be the one who stops the others: -EBUSY, another is.  And not any more: who has not stopped
 * by then still does when it takes what was sent, as REBOOT_VECTOR and the NMI do. */
int shi_send_stop_begin(struct shi_self *self);
void shi_send_stop_end(struct shi_self *self);
/* By a new process in the slot, before it is online. */
void shi_send_stop_born(struct shi_self *self);
/* This CPU is to stop: by its line (false: the controller has none), ... */
bool shi_send_stop_by_line(struct shi_self *self, uint32_t cpu);
/* ... by an NMI, also those that were asked before, or by whatever calls stop_this_cpu. */
void shi_send_stop_by_nmi(struct shi_self *self, uint32_t cpu);
/* Has it yet to stop?  Not what is offline, or dead. */
bool shi_send_stop_asked(const struct shi_machine *m, uint32_t cpu);

/* Never returns: the CPU is offline at once, and its process ends. */
_Noreturn void shi_stop_this_cpu(struct shi_self *self);

/* Of NMI_LOCAL: stop, if this CPU is to. */
void shi_send_stop_nmi(struct shi_self *self);
void shi_send_stop_register(struct shi_machine *m);
void shi_send_stop_init(void);

#endif
