/* SPDX-License-Identifier: MIT */
/*
 * A csd of one's own for each CPU: what in the kernel is one csd of the target, used by whoever
 * sends (softnet_data.csd, blk_cpu_csd).  A csd is its sender's here, so each sender has them
 * all; the user's own state sees to it that one is sent at a time.
 */
#ifndef SHI_CSDS_H
#define SHI_CSDS_H

#include "base/machine.h"

enum shi_csds_user { SHI_CSDS_RPS, SHI_CSDS_BLK, SHI_CSDS_USERS };

_Static_assert(SHI_CSDS_USERS == SHI_SELF_CSDS, "each has its part of shi_self's csds");

/* smp_call_function_single_async(cpu, csd) of native handler `number`, which gets NULL.  0, also
 * where it is on its way already; -ENXIO; -EAGAIN, -ENOSPC, -ENOMEM: there is no csd. */
int shi_csds_send(struct shi_self *self, enum shi_csds_user user, int number, uint32_t cpu);

#endif
