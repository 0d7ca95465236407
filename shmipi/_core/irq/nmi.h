/* SPDX-License-Identifier: MIT */
/*
 * NMIs: a signal of their own, which neither local_irq_disable nor a handler holds up.
 *
 * As many as hardware keeps (and as KVM does): two pending while none is in service, one
 * while one is; more collapse.  Who is asked, and in which order, is as in default_do_nmi
 * (arch/x86/kernel/nmi.c), with the function of an NMI IPI (smp_handle_nmi_ipi of
 * arch/powerpc/kernel/smp.c) as the first handler of NMI_LOCAL.  Of one type the native
 * handlers run inside the signal handler; then the Python ones at the next bytecode boundary,
 * and the NMI is in service until the last has returned.
 */
#ifndef SHI_NMI_H
#define SHI_NMI_H

#include "base/machine.h"

/* ---- sending --------------------------------------------------------------------- */

/* Send one: 1, 0 when it collapsed, -ENXIO.  On chips without NMIs, their line for it.
 * The caller counts the register write: one may send to several CPUs. */
int shi_nmi_send(struct shi_self *self, uint32_t dst);
/* Signal again if one waits for it: its sender may have died before it did.  1 signalled,
 * 0 nothing to signal, or -errno. */
int shi_nmi_resend(struct shi_self *self, uint32_t dst);

/*
 * An NMI IPI: one function, for CPUs that are asked for by its number.  One at a time; who
 * holds the lock numbers it, publishes the function (shi_nmi_ipi), asks, and has every CPU
 * either enter it or taken back before it lets go.  What a dead sender has left is of an
 * older number as soon as the next one has taken its own.
 */
int shi_nmi_ipi_trylock(struct shi_self *self);
void shi_nmi_ipi_unlock(struct shi_self *self);
/* A new number, and where its function goes (shi_irqdesc_set_*). */
uint32_t shi_nmi_ipi_number(struct shi_self *self);
struct shi_irqdesc *shi_nmi_ipi(const struct shi_machine *m);
/* Ask for `dst` and send it an NMI; `safe`: by the line that can be masked, where the chip has
 * one.  0 or -ENXIO. */
int shi_nmi_ipi_ask(struct shi_self *self, uint32_t dst, uint32_t number, bool safe);
/* Has `dst` entered it?  (Or was it taken back, or is dead.) */
bool shi_nmi_ipi_entered(const struct shi_machine *m, uint32_t dst, uint32_t number);
/* It has not been entered, and will not be: false when it has. */
bool shi_nmi_ipi_take_back(const struct shi_machine *m, uint32_t dst, uint32_t number);

/* ---- receiving ------------------------------------------------------------------- */

/* Body of the NMI signal's handler. */
void shi_nmi_entry(struct shi_self *self);
/* Its line, on chips where one stands in for it, is this file's. */
void shi_nmi_register(struct shi_machine *m);

/* For who runs the Python handlers of the NMI in service, those of `nmi_type`: when all have
 * run, ask others.  True: there are Python ones among them. */
bool shi_nmi_go_on(struct shi_self *self);
/* All have been asked: it is over.  Then those that are pending, as in the signal handler. */
void shi_nmi_done(struct shi_self *self);

/* Is this CPU asked for?  Then by which number, and whose function it is. */
bool shi_nmi_ipi_asked(struct shi_self *self, struct shi_irqdesc *seen, uint32_t *number);
/* Enter it: false when it has been taken back. */
bool shi_nmi_ipi_enter(struct shi_self *self, uint32_t number);
/* If it is asked for a native function, run it: 1, else 0.  `python`: it is not native. */
uint32_t shi_nmi_ipi_native(struct shi_self *self, bool *python);

/* ---- handlers: the irq tables are locked ----------------------------------------- */

/* The place at `index` of those who are asked for `type`, or NULL. */
struct shi_irqdesc *shi_nmi_action(const struct shi_machine *m, uint32_t type, uint32_t index);
/* A place for one more, or NULL. */
struct shi_irqdesc *shi_nmi_action_free(const struct shi_machine *m, uint32_t type);
/* From now on it is asked: before all others, or behind them. */
void shi_nmi_action_add(const struct shi_machine *m, uint32_t type,
                        const struct shi_irqdesc *action, bool first);
/* From now on it is not: but it may be running until nmi_service of each CPU that is odd now
 * has changed. */
void shi_nmi_action_remove(const struct shi_machine *m, uint32_t type, uint32_t index);

#endif
