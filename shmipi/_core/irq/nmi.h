/* SPDX-License-Identifier: MIT */
/*
 * NMIs: a signal of their own, which neither local_irq_disable nor a handler holds up.
 *
 * As many as hardware keeps (and as KVM does): two pending while none is in service, one
 * while one is; more collapse.  A native handler runs inside the signal handler; a Python
 * one at the next bytecode boundary, and is in service until it has returned.
 */
#ifndef SHI_NMI_H
#define SHI_NMI_H

#include "base/machine.h"

/* Send one: 1, 0 when it collapsed, -ENXIO.  On chips without NMIs, their line for it.
 * The caller counts the register write: one may send to several CPUs. */
int shi_nmi_send(struct shi_self *self, uint32_t dst);
/* Body of the NMI signal's handler. */
void shi_nmi_entry(struct shi_self *self);
/* Its line, on chips where one stands in for it, is this file's. */
void shi_nmi_register(struct shi_machine *m);
/* Its handler begins: who waits for that sees it. */
void shi_nmi_entered(struct shi_self *self);
/* Its handler, Python's, has returned. */
void shi_nmi_done(struct shi_self *self);
/* Signal again if one waits for it: its sender may have died before it did.  1 signalled,
 * 0 nothing to signal, or -errno. */
int shi_nmi_resend(struct shi_self *self, uint32_t dst);

#endif
