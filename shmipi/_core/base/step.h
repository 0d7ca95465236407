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
    X(multi_queue) /* multi_cpu_stop: sender, has queued the work of one CPU more */           \
    X(multi_ack)   /* multi_cpu_stop: a state acknowledged, not advanced yet */                \
    X(multi_state) /* multi_cpu_stop: the last one has acknowledged, state not changed yet */  \
    X(multi_park)  /* multi_cpu_stop: interrupts off, about to sleep */                        \
    X(multi_run)   /* multi_cpu_stop: interrupts off everywhere, function not begun */         \
    X(ttwu)        /* a task's word says WAKING, nobody has been told of it */                 \
    X(ttwu_look)   /* found WAKING by who is about to activate it */                           \
    X(ttwu_turn)   /* it is its turn to: nobody else does; on no list yet */                   \
    X(ttwu_list)   /* on the run queue's list, the task's word does not say so yet */          \
    X(ttwu_queued) /* its word says so too, its CPU is not told yet */                         \
    X(complete)    /* a completion counted, nobody woken yet */                                \
    X(purge)       /* cpumap: packets in hand to be dropped, and when they have been */        \
    X(requeue)     /* RPS: before, in and after a packet's move from a backlog that is left */ \
    X(switch_mm)   /* between two address spaces: in neither, by what others see */            \
    X(unmap)       /* out of the page tables, no TLB flushed yet */                            \
    X(unmap_free)  /* all TLBs flushed, the pages not free yet */                              \
    X(rcu_enxio)   /* an expedited IPI was refused, its CPU not looked at again */             \
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
