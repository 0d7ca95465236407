/* SPDX-License-Identifier: MIT */
/*
 * Sending IPIs of domains, verified (kernel/irq/ipi.c: ipi_send_single, ipi_send_mask).
 *
 * Everything is looked up in the tables themselves, each time: no copy of them can be
 * stale.  What is not plainly right is not sent; whoever has words for it finds out why.
 */
#ifndef SHI_IPI_H
#define SHI_IPI_H

#include "base/machine.h"

/* Send the IPI `virq` to `cpu`, or to the CPUs of `mask` (`words` 64-bit words; NULL: all
 * that it was reserved for).  0, or -EINVAL when nothing was sent: no such irq, another
 * CPU, damage.  `by_groups`: of CPUs that share a line, one register write reaches a group. */
int shi_ipi_send_single(struct shi_self *self, uint32_t virq, uint32_t cpu);
int shi_ipi_send_mask(struct shi_self *self, uint32_t virq, const uint64_t *mask,
                      uint32_t words, bool by_groups);

#endif
