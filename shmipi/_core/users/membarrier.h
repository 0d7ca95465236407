/* SPDX-License-Identifier: MIT */
/* kernel/sched/membarrier.c, over the address spaces of users/tlb.h. */
#ifndef SHI_MEMBARRIER_H
#define SHI_MEMBARRIER_H

#include "users/tlb.h"

/* include/uapi/linux/membarrier.h */
enum shi_membarrier_cmd {
    SHI_MB_QUERY = 0,
    SHI_MB_GLOBAL = 1 << 0,
    SHI_MB_GLOBAL_EXPEDITED = 1 << 1,
    SHI_MB_REGISTER_GLOBAL_EXPEDITED = 1 << 2,
    SHI_MB_PRIVATE_EXPEDITED = 1 << 3,
    SHI_MB_REGISTER_PRIVATE_EXPEDITED = 1 << 4,
    SHI_MB_PRIVATE_EXPEDITED_SYNC_CORE = 1 << 5,
    SHI_MB_REGISTER_PRIVATE_EXPEDITED_SYNC_CORE = 1 << 6,
    SHI_MB_PRIVATE_EXPEDITED_RSEQ = 1 << 7,
    SHI_MB_REGISTER_PRIVATE_EXPEDITED_RSEQ = 1 << 8,
    SHI_MB_GET_REGISTRATIONS = 1 << 9,
};
#define SHI_MB_FLAG_CPU 1u

void shi_membarrier_handlers(void);
/*
 * membarrier(cmd, flags, cpu_id) of this CPU's task: what the system call returns; -ESRCH: the
 * task has no address space; or of the wait.  GLOBAL is what RCU does, and its caller's: here
 * it is -EINVAL, and QUERY names it if `global`.
 */
int shi_membarrier(struct shi_self *self, uint32_t cmd, uint32_t flags, uint32_t cpu,
                   bool global, const struct shi_flusher *by);

/* This CPU is online again, and its task goes on: who has passed it by meanwhile has ended its
 * sequence all the same (it was preempted by the stopper). */
void shi_membarrier_online(struct shi_self *self);

/* A full barrier, and nothing is executed that was fetched before. */
void shi_sync_core(void);

/* Restartable sequences: where this CPU's one begins; and its last store, done only if nothing
 * has ended it since (membarrier, or a switch to another address space).  False: again. */
uint32_t shi_rseq_begin(struct shi_self *self);
bool shi_rseq_commit(struct shi_self *self, uint32_t begun, shi_a64 *where, uint64_t value);

/* ---- what it is good for: an asymmetric fence ------------------------------------------- */

/* The store-buffer litmus test.  Two CPUs, `rounds` rounds: x = 1; r1 = y beside y = 1; r2 = x. */
struct shi_litmus {
    _Alignas(SHI_PAIR) shi_a64 x;
    _Alignas(SHI_PAIR) shi_a64 y;
    _Alignas(SHI_PAIR) shi_a64 fast; /* the round that it is in */
    shi_a64 r1, done;                /* what it has read, and of which round */
    _Alignas(SHI_PAIR) shi_a64 slow;
};
/* The side without any fence.  Rounds done: fewer if the other side did not come. */
uint64_t shi_litmus_fast(struct shi_self *self, struct shi_litmus *l, uint64_t rounds);
/* The other: between its store and its load membarrier(cmd), of 0 smp_mb().  Rounds done, or
 * -errno; in how many both have read 0. */
int64_t shi_litmus_slow(struct shi_self *self, struct shi_litmus *l, uint64_t rounds,
                        uint32_t cmd, uint64_t *both_zero, const struct shi_flusher *by);

#endif
