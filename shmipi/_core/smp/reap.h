/* SPDX-License-Identifier: MIT */
/* What the firmware does for a CPU, or an attached host, that died.  `self` is the firmware's slot. */
#ifndef SHI_REAP_H
#define SHI_REAP_H

#include "base/machine.h"

/* 1. From here on nobody can queue for it or ring it.  `end`: how its process ended, see
 * SHI_END_EXITED; 0: not known. */
void shi_reap_mark(struct shi_self *self, uint32_t cpu, uint32_t end);
/* 2. Complete what was addressed to it; wake its parked waiters.  How many. */
uint32_t shi_reap_complete(struct shi_self *self, uint32_t cpu);
/* Where a process that is stopped holds up the rest (shi_sched_is_free): the calls, not the tasks.
 * True: it does not, and nothing was done. */
bool shi_reap_calls(struct shi_self *self, uint32_t cpu);
/* 3. Rings may have died with it: ring every CPU that has work. */
void shi_reap_ring_all(struct shi_self *self);
/*
 * A sender that is killed between the lock word's generation and the swap that queues the csd
 * leaves one that looks queued and that nobody will ever unlock.  Once its target has been idle
 * since, it is unlocked here.  How many of the csds that the slot's earlier processes had
 * locked are still out: on their way, or not known to be nobody's yet.
 */
uint32_t shi_reap_orphans(struct shi_self *self, uint32_t id);
/* 4. A pid is given up when no live slot may still signal it.  Whom this slot, if it is live,
 * may: 1 + the CPU, or 0. */
uint32_t shi_reap_guards(struct shi_self *self, uint32_t id);
/* 5. Make the slot ready for a new process; its generation, never 0 in 16 bits. */
uint32_t shi_reap_reset(struct shi_self *self, uint32_t cpu);

/*
 * A guest: a process that attached to the machine, in a slot that others had before it.
 * Between two guests a slot has a generation of its own: who looks whether a guest still
 * lives (locks, irq handlers) compares only that.
 */
void shi_guest_admit(struct shi_self *self, uint32_t id, uint32_t pid);
/* It has gone, in order or not: its locks, hazards and tasks with it; what it left unrung,
 * rings. */
void shi_guest_bury(struct shi_self *self, uint32_t id);
/* How many of its csds others still have.  0: the slot's memory has been given back; else
 * what they refer to stays, and a next guest inherits it (shi_sender_init). */
uint32_t shi_guest_clear(struct shi_self *self, uint32_t id);

/* The machine stops: wake everybody to see it. */
void shi_reap_stop_all(struct shi_self *self);

#endif
