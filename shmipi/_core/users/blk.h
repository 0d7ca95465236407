/* SPDX-License-Identifier: MIT */
/*
 * block/blk-mq.c: requests complete on the CPU that has submitted them, wherever the device's
 * interrupt comes.
 *
 * A CPU has 64 tags of its own, so the requests that wait to be completed there are one word, a
 * bit each: setting a bit says whether the word was empty, as llist_add() does, and taking them
 * all is one exchange.  A bit set twice is set: who is killed between a request's state and its
 * bit is repaired by setting it.
 */
#ifndef SHI_BLK_H
#define SHI_BLK_H

#include "base/machine.h"

#define SHI_BLK_DEPTH 64u

enum shi_rq_state {
    SHI_RQ_IDLE = 0,
    SHI_RQ_IN_FLIGHT = 1,
    SHI_RQ_COMPLETE = 2, /* its interrupt has come; ->complete has not run */
    SHI_RQ_DONE = 3,     /* it has; the tag is the submitter's to free */
};

/* state | claimer << 8 | generation of the submitter << 24 | uses << 40 */
#define SHI_RQ_STATE 0xffull
#define SHI_RQ_CLAIMER_SHIFT 8
#define SHI_RQ_GEN_SHIFT 24

struct shi_request {
    _Alignas(SHI_LINE) shi_a64 word;
    uint64_t data;
    shi_a32 completions; /* of its tag */
    shi_a32 why;         /* enum shi_rq_why, of its completion elsewhere */
    shi_a32 on;          /* 1 + the CPU that has completed it */
};

enum shi_rq_why { SHI_RW_SAME = 0, SHI_RW_CACHE = 1, SHI_RW_OFFLINE = 2, SHI_RW_FLAG = 3 };

enum { SHI_BLK_SAME_COMP = 1, SHI_BLK_SAME_FORCE = 2 };

struct shi_blk_cpu {
    _Alignas(SHI_PAIR) shi_a64 done; /* blk_cpu_done: own tags; others set bits */
    _Alignas(SHI_PAIR) shi_a32 cursor;
    shi_a32 claiming; /* 1 + the request it is about to complete */
    shi_a32 nlocal;   /* others' requests that complete here, in its BLOCK softirq */
    shi_a32 local[SHI_BLK_DEPTH];
    shi_a64 submitted, completed, ended, elsewhere, wrong, ipis, interrupts, reported;
};

/* The state of SHI_USER_blk; then the CPUs' tags. */
struct shi_blk {
    shi_a32 made, flags, nr_hw_queues;
    _Alignas(SHI_PAIR) struct shi_blk_cpu cpu[];
};

uint64_t shi_blk_bytes(const struct shi_machine *m);
struct shi_blk *shi_blk(const struct shi_machine *m);
/* The queue's limits: 0, -EINVAL. */
int shi_blk_set(struct shi_blk *q, uint32_t flags, uint32_t nr_hw_queues);

/* blk_mq_alloc_request and blk_mq_start_request: a tag of this CPU, or -EAGAIN. */
int64_t shi_blk_submit(struct shi_self *self, struct shi_blk *q, uint64_t data);
/* blk_mq_complete_request: the device's interrupt for `tag` comes here.  1: it completes
 * elsewhere, or later; 0: it has completed; -EINVAL: no such tag; -EALREADY: not in flight. */
int shi_blk_complete(struct shi_self *self, struct shi_blk *q, uint32_t tag);
/* The device's interrupt for up to `n` requests that are in flight, of whichever CPU. */
int64_t shi_blk_interrupt(struct shi_self *self, struct shi_blk *q, uint32_t n);
/* blk_mq_end_request of up to `n` own requests that are done: their tags, and the
 * CPU that has completed each. */
uint32_t shi_blk_end(struct shi_self *self, struct shi_blk *q, uint32_t *tags, uint64_t *data,
                     uint32_t *on, uint32_t n);
/* All at once, `n` times: submit what can be, take interrupts, end what is done. */
int64_t shi_blk_generate(struct shi_self *self, struct shi_blk *q, uint64_t n);

struct shi_blk_stats {
    uint64_t submitted, completed, ended, elsewhere, wrong, ipis, interrupts, reported,
        in_flight, waiting, doubles;
};
void shi_blk_stats(const struct shi_machine *m, struct shi_blk *q, uint32_t cpu,
                   struct shi_blk_stats *s);

void shi_blk_register(void);
/* blk_softirq_cpu_dead. */
void shi_blk_cpu_dead(struct shi_self *self, uint32_t cpu, bool dead);
/* This CPU is online again. */
void shi_blk_online(struct shi_self *self);

#endif
