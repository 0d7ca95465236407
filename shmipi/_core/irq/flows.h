/* SPDX-License-Identifier: MIT */
/*
 * The flows that there are: how lines become pending, are taken and are ended, which is
 * what differs between chips.  A flow is one file, flow_*.c, with a struct shi_flow of its
 * name, and its line here; what it asks of a chip's description is in the struct.
 */
#ifndef SHI_FLOWS_H
#define SHI_FLOWS_H

#include "base/machine.h"

/* By their numbers in the header of a machine: add at the end. */
#define SHI_FLOWS(X)                                                                           \
    X(VECTOR, vector)   /* bits by priority class, in-service bits, EOI (local APIC) */        \
    X(MAILBOX, mailbox) /* bits, read and cleared all at once, least first (mailbox) */        \
    X(MUX, mux)         /* the same, a ring for each bit that goes 0 to 1 (ipi-mux) */         \
    X(SGI, sgi)         /* by priority, active until deactivated (GIC) */                      \
    X(SHARED, shared)   /* one register for all, each bit routed to a CPU (MIPS GIC) */        \
    X(ESB, esb)         /* messages behind one source with P and Q (XIVE) */

enum shi_flow_kind {
#define X(kind, name) SHI_FLOW_##kind,
    SHI_FLOWS(X)
#undef X
        SHI_NFLOWS
};

/* Check a description and find its flow: -EINVAL for one that cannot be. */
int shi_chip_check(const struct shi_chip *chip, uint32_t ncpus);
const struct shi_flow *shi_flow_of(uint32_t kind);

#endif
