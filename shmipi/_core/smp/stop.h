/* SPDX-License-Identifier: MIT */
/*
 * kernel/stop_machine.c: the stopper of each CPU, above every task, and multi_cpu_stop.
 *
 * A work is a csd of its sender (SHI_CSD_STOP and over) that goes through the one queue of its
 * CPU, as every wake-up does.  Taken from there it waits on self->stops until the CPU can be
 * preempted: at an interrupt's exit, in the idle loop, in waits, at schedule points, and when
 * preemption or interrupts come on again.
 *
 * Works that take several CPUs together (multi_cpu_stop) share the struct shi_multi of their
 * sender's slot.  Works of several CPUs are queued under one lock of the machine
 * (shi_header.stop_lock), so that they stand in the same order everywhere: two of them never
 * wait for each other.
 */
#ifndef SHI_STOP_H
#define SHI_STOP_H

#include "base/machine.h"

static inline bool shi_type_stops(uint64_t lock)
{
    return (lock & SHI_CSD_TYPE) >= SHI_CSD_STOP;
}

/* ---- the sender: one at a time in a slot ------------------------------------------- */

/* A new multi_cpu_stop of `n` CPUs from `lo` to `hi`, `nactive` of which run the function.
 * -EBUSY: CPUs are in the last one yet.  `deadline_ns`: 0 for none. */
int shi_multi_begin(struct shi_self *self, uint32_t n, uint32_t nactive, uint32_t lo,
                    uint32_t hi, uint64_t deadline_ns);
/* Queue the work of one of them, in csd `local`: 0, or -errno.  Between shi_enter and
 * shi_leave, with preemption disabled from the first to shi_multi_go. */
int shi_multi_queue(struct shi_self *self, uint32_t local, uint32_t cpu, bool active);
/* All are queued but `missing`, which have gone since.  If `void_`, it can not be done at all. */
void shi_multi_go(struct shi_self *self, uint32_t missing, bool void_);
/* Nobody waits for it any more: unless the function has begun, it never does. */
void shi_multi_cancel(struct shi_self *self, bool even_running);
/* The state's word, as seen by its sender. */
uint32_t shi_multi_word(const struct shi_self *self);
/* Has `cpu` come as far as the state in which the sender's last one was given up? */
bool shi_multi_is_late(const struct shi_self *self, uint32_t cpu);

/* ---- the CPU ------------------------------------------------------------------------ */

/* Run the works that are due, as far as they are C's.  True: the next needs the interpreter, or
 * what waits for that. */
bool shi_stop_run(struct shi_self *self);

enum shi_step_of_stop {
    SHI_MULTI_DONE = 0,
    SHI_MULTI_RUN = 1, /* interrupts are off everywhere: run the function, then shi_multi_ran */
    SHI_MULTI_PYTHON = 2, /* interrupts are on, and a handler waits for the interpreter */
};

/* Take the next work off self->stops: its csd, or UINT32_MAX.  shi_stop_end after it. */
uint32_t shi_stop_take(struct shi_self *self);
void shi_stop_end(struct shi_self *self);
/* multi_cpu_stop on this CPU, for the work in csd `index`; again after SHI_MULTI_PYTHON.
 * The caller unlocks the csd when it is done. */
void shi_multi_enter(struct shi_self *self, uint32_t index);
enum shi_step_of_stop shi_multi_step(struct shi_self *self);
void shi_multi_ran(struct shi_self *self);
/* Was it given up while its function runs here? */
bool shi_multi_lapsed(const struct shi_self *self);
/* The layers below run it by this name (shi_machine.stopper). */
void shi_stop_register(struct shi_machine *m);
/* This CPU goes offline: works that it has not begun never are. */
void shi_stop_flush(struct shi_self *self);

/* ---- the firmware ------------------------------------------------------------------- */

/* A CPU has died with this csd of `src` in hand. */
void shi_multi_lost(struct shi_self *self, uint32_t src, uint64_t lock);
/* The sender has died. */
void shi_multi_orphan(struct shi_self *self, uint32_t id);

#endif
