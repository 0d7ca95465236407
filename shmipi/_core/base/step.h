/* SPDX-License-Identifier: MIT */
/*
 * Labelled steps of the protocol, at which a test can stop or kill the process.
 *
 * They cost one predictable branch on a private flag that is false unless the machine
 * was booted for fault tests, so the code that is tested is the code that is shipped.
 */
#ifndef SHI_STEP_H
#define SHI_STEP_H

#include "base/machine.h"

#define SHI_STEPS(X)                                                                           \
    X(resched)     /* NEED_RESCHED set, no interrupt sent yet */                               \
    X(push)        /* csd filled and locked, not yet on the queue */                           \
    X(aim)         /* its lock word names the target's process, not yet on the queue */        \
    X(pushed)      /* on the queue, the word's state not yet acted upon */                     \
    X(raise)       /* pending bit set, the target's word not yet changed */                    \
    X(ring)        /* the word says RUNG or KICKED, nothing rung yet */                        \
    X(rung)        /* doorbell or kick has been sent */                                        \
    X(ack)         /* target: kick acknowledged, nothing drained */                            \
    X(drain)       /* target: list taken, nothing run */                                       \
    X(run)         /* target: about to run one csd's function */                               \
    X(unlock)      /* target: function has run, csd still locked */                            \
    X(unlock_ring) /* target: unlocked, parked waiter not yet rung */                          \
    X(halt)        /* about to publish HALTED */                                               \
    X(halted)      /* HALTED published, not yet asleep */                                      \
    X(wake)        /* awake, still HALTED or RUNG */                                           \
    X(task)        /* about to become RUNNING */                                               \
    X(park)        /* waiter: about to set PARKED */                                           \
    X(parked)      /* waiter: PARKED set, HALTED not yet published */                          \
    X(online)      /* identity published, word still OFFLINE */                                \
    X(offline)     /* drained, about to publish OFFLINE */                                     \
    X(line)        /* target: line taken from the chip, nothing done for it */                 \
    X(spurious)    /* target: nobody has requested the line, not masked yet */                 \
    X(nmi)         /* NMI pending, not yet signalled */                                        \
    X(nmi_ask)     /* NMI IPI: a target asked for, its NMI not yet sent */                     \
    X(nmi_wait)    /* NMI IPI: all NMIs sent, none waited for */                               \
    X(nmi_take)    /* target: has entered an NMI IPI, its function not yet called */           \
    X(complete)    /* a completion counted, nobody woken yet */                                \
    X(undo)        /* irq tables: about to free one thing more of what is half there */

enum shi_step {
    SHI_STEP_none = 0,
#define X(name) SHI_STEP_##name,
    SHI_STEPS(X)
#undef X
        SHI_STEP_COUNT
};

enum shi_step_action { SHI_STEP_STOP = 1, SHI_STEP_KILL = 2 };

extern const char *const shi_step_names[SHI_STEP_COUNT];
void shi_step_reached(struct shi_self *self, enum shi_step step);

#define SHI_STEP(self, name)                                                                   \
    do {                                                                                       \
        if (__builtin_expect((self)->steps, 0))                                                \
            shi_step_reached((self), SHI_STEP_##name);                                         \
    } while (0)

#endif
