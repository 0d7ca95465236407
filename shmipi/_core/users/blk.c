/* SPDX-License-Identifier: MIT */
#include "base/sys.h"

#include <errno.h>
#include <string.h>

#include "base/native.h"
#include "base/rules.h"
#include "smp/entry.h"
#include "smp/sched.h"
#include "smp/softirq.h"
#include "users/blk.h"
#include "users/csds.h"

uint64_t shi_blk_bytes(const struct shi_machine *m)
{
    return sizeof(struct shi_blk) +
           (uint64_t)m->ncpus *
               (sizeof(struct shi_blk_cpu) + SHI_BLK_DEPTH * sizeof(struct shi_request));
}

struct shi_blk *shi_blk(const struct shi_machine *m)
{
    struct shi_blk *q = shi_user(m, SHI_USER_blk, shi_blk_bytes(m));
    /* Acquire pairs with shi_blk_set's release: its limits. */
    return q && shi_load_acquire(&q->made) ? q : NULL;
}

int shi_blk_set(struct shi_blk *q, uint32_t flags, uint32_t nr_hw_queues)
{
    if (flags > (SHI_BLK_SAME_COMP | SHI_BLK_SAME_FORCE) || !nr_hw_queues)
        return -EINVAL;
    shi_store_relaxed(&q->flags, flags);
    shi_store_relaxed(&q->nr_hw_queues, nr_hw_queues);
    shi_store_release(&q->made, 1);
    return 0;
}

static struct shi_request *request(const struct shi_machine *m, struct shi_blk *q, uint32_t tag)
{
    return (struct shi_request *)&q->cpu[m->ncpus] + tag;
}

static uint32_t state_of(uint64_t word)
{
    return (uint32_t)(word & SHI_RQ_STATE);
}

static uint16_t gen_of(uint64_t word)
{
    return (uint16_t)(word >> SHI_RQ_GEN_SHIFT);
}

/* Is the process that has submitted it there, and its CPU online? */
static bool reachable(const struct shi_machine *m, uint32_t cpu, uint64_t word)
{
    /* Acquire pairs with the swap that made it online, or dead. */
    uint64_t w = shi_load_acquire(&shi_slot(m, cpu)->word);
    return shi_word_online(w) && shi_word_gen(w) == gen_of(word);
}

static void add(shi_a64 *p, uint64_t n)
{
    shi_store_relaxed(p, shi_load_relaxed(p) + n);
}

/* ---- submitting ------------------------------------------------------------------- */

int64_t shi_blk_submit(struct shi_self *self, struct shi_blk *q, uint64_t data)
{
    struct shi_blk_cpu *mine = &q->cpu[self->id];
    uint32_t i;
    int64_t got = -EAGAIN;
    shi_enter(self);
    for (i = 0; i < SHI_BLK_DEPTH && got < 0; i++) {
        uint32_t at = (shi_load_relaxed(&mine->cursor) + i) % SHI_BLK_DEPTH;
        struct shi_request *rq = request(self->m, q, self->id * SHI_BLK_DEPTH + at);
        /* Acquire pairs with shi_blk_end's release: it has been read. */
        uint64_t word = shi_load_acquire(&rq->word);
        if (state_of(word) != SHI_RQ_IDLE)
            continue;
        rq->data = data;
        shi_store_relaxed(&rq->why, SHI_RW_SAME);
        add(&mine->submitted, 1);
        /* Release: the device finds the request as it was filled. */
        shi_store_release(&rq->word, ((word >> 40) + 1) << 40 |
                                         (uint64_t)self->gen << SHI_RQ_GEN_SHIFT |
                                         SHI_RQ_IN_FLIGHT);
        shi_store_relaxed(&mine->cursor, at + 1);
        got = self->id * SHI_BLK_DEPTH + at;
    }
    shi_leave(self);
    return got;
}

/* ---- completing ------------------------------------------------------------------- */

/* ->complete, here: once, whoever else tries. */
static void complete_rq(struct shi_self *self, struct shi_blk *q, uint32_t tag)
{
    const struct shi_machine *m = self->m;
    struct shi_request *rq = request(m, q, tag);
    uint32_t cpu = tag / SHI_BLK_DEPTH;
    /* Acquire pairs with the swap of who has had its interrupt: `why`. */
    uint64_t word = shi_load_acquire(&rq->word), next;
    bool theirs;
    do {
        if (state_of(word) != SHI_RQ_COMPLETE)
            return;
        theirs = reachable(m, cpu, word);
        shi_store_relaxed(&rq->on, self->id + 1); /* before the tag is its submitter's again */
        next = (word & ~SHI_RQ_STATE) | (theirs ? SHI_RQ_DONE : SHI_RQ_IDLE);
    } while (!shi_cas_full(&rq->word, &word, next));
    struct shi_blk_cpu *mine = self->host ? NULL : &q->cpu[self->id];
    /* Release: after the swap, which has counted the use. */
    shi_fetch_add_full(&rq->completions, 1);
    if (!mine || !theirs)
        shi_fetch_add_relaxed(&q->cpu[cpu].reported, 1); /* its submitter is gone */
    if (!mine)
        return;
    add(&mine->completed, 1);
    if (cpu == self->id)
        return;
    add(&mine->elsewhere, 1);
    if (shi_load_relaxed(&rq->why) == SHI_RW_SAME && theirs)
        add(&mine->wrong, 1);
}

static int remote_number = -1;

/* __blk_mq_complete_request_remote: hard irq, on the CPU that has submitted. */
static void complete_remote(void *info)
{
    struct shi_self *self = shi_this_cpu();
    (void)info;
    if (self)
        shi_raise_softirq_only(self, SHI_BLOCK_SOFTIRQ);
}

/* blk_done_softirq. */
static void blk_done_softirq(struct shi_self *self)
{
    struct shi_blk *q = shi_blk(self->m);
    if (!q)
        return;
    struct shi_blk_cpu *mine = &q->cpu[self->id];
    uint32_t i, n;
    /* Full: takes them all, and who sets a bit from here on finds the word empty. */
    uint64_t bits = shi_xchg_full(&mine->done, 0);
    while (bits) {
        complete_rq(self, q, self->id * SHI_BLK_DEPTH + (uint32_t)__builtin_ctzll(bits));
        bits &= bits - 1;
    }
    shi_enter(self);
    n = shi_load_relaxed(&mine->nlocal);
    for (i = 0; i < n && i < SHI_BLK_DEPTH; i++) {
        uint32_t tag = shi_load_relaxed(&mine->local[i]);
        if (tag < self->m->ncpus * SHI_BLK_DEPTH)
            complete_rq(self, q, tag);
    }
    shi_store_relaxed(&mine->nlocal, 0);
    shi_leave(self);
}

/* blk_cpu_csd. */
static int send_csd(struct shi_self *self, uint32_t cpu)
{
    return shi_csds_send(self, SHI_CSDS_BLK, remote_number, cpu);
}

/* blk_mq_complete_need_ipi; else *why it is not sent to its CPU. */
static bool need_ipi(const struct shi_self *self, const struct shi_blk *q, uint32_t cpu,
                     uint64_t word, uint32_t *why)
{
    const struct shi_machine *m = self->m;
    uint32_t flags = shi_load_relaxed(&q->flags);
    *why = SHI_RW_FLAG;
    if (!(flags & SHI_BLK_SAME_COMP))
        return false;
    *why = SHI_RW_SAME;
    if (cpu == self->id)
        return false;
    if (!(flags & SHI_BLK_SAME_FORCE) && shi_cpus_share_cache(m, cpu, self->id)) {
        *why = SHI_RW_CACHE;
        return false;
    }
    if (!reachable(m, cpu, word)) {
        *why = SHI_RW_OFFLINE;
        return false;
    }
    return !shi_rule_off(m, SHI_RULE_blk_same_cpu);
}

int shi_blk_complete(struct shi_self *self, struct shi_blk *q, uint32_t tag)
{
    const struct shi_machine *m = self->m;
    uint32_t cpu = tag / SHI_BLK_DEPTH, why;
    if (cpu >= m->ncpus)
        return -EINVAL;
    struct shi_request *rq = request(m, q, tag);
    struct shi_blk_cpu *mine = &q->cpu[self->id];
    /* Acquire pairs with shi_blk_submit's release: the request as it was filled. */
    uint64_t word = shi_load_acquire(&rq->word);
    shi_enter(self);
    shi_store_relaxed(&mine->claiming, tag + 1);
    shi_signal_fence();
    do {
        if (state_of(word) != SHI_RQ_IN_FLIGHT) {
            shi_store_relaxed(&mine->claiming, 0);
            shi_leave(self);
            return -EALREADY;
        }
        /* Full: of two interrupts for one request, or a timeout, one completes it. */
    } while (!shi_cas_full(&rq->word, &word,
                           (word & ~(SHI_RQ_STATE | 0xffffull << SHI_RQ_CLAIMER_SHIFT)) |
                               (uint64_t)(self->id & 0xffff) << SHI_RQ_CLAIMER_SHIFT |
                               SHI_RQ_COMPLETE));
    add(&mine->interrupts, 1);
    int got = 1;
    bool ipi = false, raise = false;
    if (need_ipi(self, q, cpu, word, &why)) {
        /* blk_mq_complete_send_ipi.  Full: releases the request to who takes the word. */
        uint64_t bit = 1ull << tag % SHI_BLK_DEPTH;
        ipi = shi_fetch_or_full(&q->cpu[cpu].done, bit) == 0;
    } else {
        shi_store_relaxed(&rq->why, why);
        if (shi_load_relaxed(&q->nr_hw_queues) != 1) {
            got = 0;
        } else if (cpu == self->id) {
            /* blk_mq_raise_softirq. */
            raise = shi_fetch_or_full(&mine->done, 1ull << tag % SHI_BLK_DEPTH) == 0;
        } else if (shi_load_relaxed(&mine->nlocal) < SHI_BLK_DEPTH) {
            uint32_t n = shi_load_relaxed(&mine->nlocal);
            shi_store_relaxed(&mine->local[n], tag);
            shi_store_release(&mine->nlocal, n + 1);
            raise = n == 0;
        } else {
            got = 0;
        }
    }
    if (!got)
        complete_rq(self, q, tag);
    int err = 0;
    if (ipi && !(shi_rule_off(m, SHI_RULE_blk_send_ipi) &&
                 (shi_load_relaxed(&mine->ipis) & 0x1f) == 0x1f))
        err = send_csd(self, cpu);
    if (ipi)
        add(&mine->ipis, 1);
    shi_store_release(&mine->claiming, 0);
    shi_leave(self);
    if (raise)
        shi_raise_softirq(self, SHI_BLOCK_SOFTIRQ);
    if (err) /* it went meanwhile, or no csd is free: nobody else would look at its word */
        shi_blk_cpu_dead(self, cpu, false);
    return got;
}

int64_t shi_blk_interrupt(struct shi_self *self, struct shi_blk *q, uint32_t n)
{
    uint32_t all = self->m->ncpus * SHI_BLK_DEPTH, looked, done = 0;
    /* Others' first: that is what it is about. */
    uint32_t tag = (self->id + 1) % self->m->ncpus * SHI_BLK_DEPTH;
    for (looked = 0; looked < all && done < n; looked++) {
        if (state_of(shi_load_relaxed(&request(self->m, q, tag)->word)) == SHI_RQ_IN_FLIGHT &&
            shi_blk_complete(self, q, tag) >= 0)
            done++;
        if (++tag == all)
            tag = 0;
    }
    return done;
}

uint32_t shi_blk_end(struct shi_self *self, struct shi_blk *q, uint32_t *tags, uint64_t *data,
                     uint32_t *on, uint32_t n)
{
    struct shi_blk_cpu *mine = &q->cpu[self->id];
    uint32_t i, got = 0;
    shi_enter(self);
    for (i = 0; i < SHI_BLK_DEPTH && got < n; i++) {
        uint32_t tag = self->id * SHI_BLK_DEPTH + i;
        struct shi_request *rq = request(self->m, q, tag);
        /* Acquire pairs with complete_rq's swap: who has completed it. */
        uint64_t word = shi_load_acquire(&rq->word);
        if (state_of(word) != SHI_RQ_DONE)
            continue;
        if (tags)
            tags[got] = tag;
        if (data)
            data[got] = rq->data;
        if (on)
            on[got] = shi_load_relaxed(&rq->on) - 1;
        got++;
        add(&mine->ended, 1);
        shi_store_release(&rq->word, word & ~SHI_RQ_STATE);
    }
    shi_leave(self);
    return got;
}

int64_t shi_blk_generate(struct shi_self *self, struct shi_blk *q, uint64_t n)
{
    uint64_t i;
    int64_t did = 0;
    for (i = 0; i < n; i++) {
        while (shi_blk_submit(self, q, i) >= 0)
            did++;
        shi_blk_interrupt(self, q, SHI_BLK_DEPTH / 2);
        shi_blk_end(self, q, NULL, NULL, NULL, SHI_BLK_DEPTH);
    }
    return did;
}

/* ---- figures ---------------------------------------------------------------------- */

void shi_blk_stats(const struct shi_machine *m, struct shi_blk *q, uint32_t cpu,
                   struct shi_blk_stats *s)
{
    const struct shi_blk_cpu *c = &q->cpu[cpu];
    uint32_t i;
    memset(s, 0, sizeof *s);
    s->submitted = shi_load_relaxed(&c->submitted);
    s->completed = shi_load_relaxed(&c->completed);
    s->ended = shi_load_relaxed(&c->ended);
    s->elsewhere = shi_load_relaxed(&c->elsewhere);
    s->wrong = shi_load_relaxed(&c->wrong);
    s->ipis = shi_load_relaxed(&c->ipis);
    s->interrupts = shi_load_relaxed(&c->interrupts);
    s->reported = shi_load_relaxed(&c->reported);
    for (i = 0; i < SHI_BLK_DEPTH; i++) {
        struct shi_request *rq = request(m, q, cpu * SHI_BLK_DEPTH + i);
        /* The completions first: each use of the tag is counted before it completes, so what is
         * completed between the two looks is no second completion of what is seen. */
        uint32_t times = shi_load_acquire(&rq->completions);
        uint64_t word = shi_load_acquire(&rq->word), uses = word >> 40;
        uint64_t open = state_of(word) == SHI_RQ_IN_FLIGHT || state_of(word) == SHI_RQ_COMPLETE;
        s->in_flight += state_of(word) == SHI_RQ_IN_FLIGHT;
        s->waiting += state_of(word) == SHI_RQ_COMPLETE;
        /* As the count of uses does, they come round at 24 bits. */
        uint32_t more = (times - (uint32_t)(uses - open)) << 8;
        if ((int32_t)more > 0)
            s->doubles += more >> 8;
    }
}

/* ---- CPUs that go ----------------------------------------------------------------- */

void shi_blk_register(void)
{
    if (remote_number >= 0)
        return;
    remote_number = shi_native_register("blk_mq_complete_request_remote", complete_remote);
    shi_open_softirq(SHI_BLOCK_SOFTIRQ, blk_done_softirq);
}

/* The interrupt of a request had come to a CPU that is dead, and gone no further. */
static void again(struct shi_self *self, struct shi_blk *q, uint32_t claimer, uint32_t tag)
{
    struct shi_request *rq = request(self->m, q, tag);
    /* Acquire pairs with the dead one's swap to COMPLETE. */
    uint64_t word = shi_load_acquire(&rq->word);
    /* As if it had not come: the device sends another. */
    while (state_of(word) == SHI_RQ_COMPLETE &&
           (uint32_t)(word >> SHI_RQ_CLAIMER_SHIFT & 0xffff) == claimer)
        if (shi_cas_full(&rq->word, &word, (word & ~SHI_RQ_STATE) | SHI_RQ_IN_FLIGHT))
            return;
}

void shi_blk_cpu_dead(struct shi_self *self, uint32_t cpu, bool dead)
{
    const struct shi_machine *m = self->m;
    struct shi_blk *q = shi_blk(m);
    uint32_t i, tag;
    if (!q || cpu >= m->ncpus)
        return;
    struct shi_blk_cpu *its = &q->cpu[cpu];
    if (dead) {
        /* Acquire pairs with its release at the end of it: 0, and all was done. */
        tag = shi_load_acquire(&its->claiming) - 1;
        if (tag < m->ncpus * SHI_BLK_DEPTH) {
            struct shi_request *rq = request(m, q, tag);
            /* Acquire pairs with the dead one's swap to COMPLETE. */
            uint64_t word = shi_load_acquire(&rq->word);
            uint32_t to = tag / SHI_BLK_DEPTH;
            /* Its bit may be set, or its IPI sent: both can be done again. */
            if (state_of(word) == SHI_RQ_COMPLETE && to != cpu) {
                shi_fetch_or_full(&q->cpu[to].done, 1ull << tag % SHI_BLK_DEPTH);
                send_csd(self, to);
            }
        }
        /* Acquire pairs with its release: the tags below are there. */
        for (i = 0; i < shi_load_acquire(&its->nlocal) && i < SHI_BLK_DEPTH; i++)
            if ((tag = shi_load_relaxed(&its->local[i])) < m->ncpus * SHI_BLK_DEPTH)
                again(self, q, cpu, tag);
        shi_store_relaxed(&its->claiming, 0);
        shi_store_relaxed(&its->nlocal, 0);
    }
    /* blk_complete_reqs(&per_cpu(blk_cpu_done, cpu)) */
    shi_xchg_full(&its->done, 0);
    for (i = 0; i < SHI_BLK_DEPTH; i++) {
        struct shi_request *rq = request(m, q, cpu * SHI_BLK_DEPTH + i);
        /* Acquire pairs with the swap to COMPLETE, or to DONE. */
        uint64_t word = shi_load_acquire(&rq->word);
        if (state_of(word) == SHI_RQ_COMPLETE) {
            shi_store_relaxed(&rq->why, SHI_RW_OFFLINE);
            complete_rq(self, q, cpu * SHI_BLK_DEPTH + i);
        } else if (dead && state_of(word) == SHI_RQ_DONE) {
            shi_cas_full(&rq->word, &word, word & ~SHI_RQ_STATE); /* nobody will end it */
        }
    }
}

void shi_blk_online(struct shi_self *self)
{
    struct shi_blk *q = shi_blk(self->m);
    if (q &&
        (shi_load_full(&q->cpu[self->id].done) || shi_load_relaxed(&q->cpu[self->id].nlocal)))
        shi_raise_softirq(self, SHI_BLOCK_SOFTIRQ);
}
