/* SPDX-License-Identifier: MIT */
/*
 * kernel/irq_work.c: a function that runs in hard-irq context as soon as interrupts are on,
 * queued from anywhere, NMIs included.
 *
 * Each is a csd of the process that has made it (shi_call_prepare), which alone queues it: on
 * its own CPU, by a list that is run last in first out when the CPU has interrupted itself, or
 * on another one, by that one's call_single_queue.  Once: while it is PENDING it is not queued
 * again; PENDING is cleared before the function, BUSY after it.
 *
 * A CPU interrupts itself by its controller's line for it, else by what its architecture has:
 * the decrementer (powerpc), or the tick (mips), for which lazy ones wait anyway.  A CPU that
 * idles has stopped its tick, and waits for nothing.  The tick here is the CPU's timer, 1 ms
 * after it was needed.
 */
#ifndef SHI_IRQ_WORK_H
#define SHI_IRQ_WORK_H

#include "base/machine.h"

/* 1; 0: it is PENDING.  In any context, also on top of a core section. */
int shi_irq_work_queue(struct shi_self *self, uint32_t local, bool lazy);
/* The same on `cpu`: not from an NMI's native handler.  -ENXIO: it is not online, and the work
 * is not queued. */
int shi_irq_work_queue_on(struct shi_self *self, uint32_t local, bool lazy, uint32_t cpu);

/* irq_work_run(): all that is queued here, lazy ones too.  Soft-masked: the interrupt, and a
 * CPU that goes offline. */
void shi_irq_work_run(struct shi_self *self);

/* Its line, and the timer, are this file's. */
void shi_irq_work_register(struct shi_machine *m);

#endif
