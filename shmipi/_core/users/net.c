/* SPDX-License-Identifier: MIT */
#include "base/sys.h"

#include <errno.h>
#include <sched.h>

#include "base/clock.h"
#include "smp/entry.h"
#include "users/net.h"

/* ---- the lock of a ring ----------------------------------------------------------- */

#define LOCK_SPINS 2000u
#define LOCK_WAIT_NS 20000000u

static int try_lock(struct shi_self *self, struct shi_ptr_ring *r)
{
    uint64_t dead;
    int got = shi_lock_steal(self, &r->lock, &dead);
    if (got <= 0)
        return got;
    shi_fetch_add_relaxed(&r->steals, 1);
    return shi_holder_slot(dead) < self->m->nslots ? (int)shi_holder_slot(dead) + 1
                                                   : (int)self->m->nslots + 1; /* damaged */
}

int shi_ring_lock(struct shi_self *self, struct shi_ptr_ring *r)
{
    uint32_t i;
    uint64_t start = 0, now;
    int got;
    for (i = 0; (got = try_lock(self, r)) == -EAGAIN; i++) {
        shi_cpu_relax();
        if (i < LOCK_SPINS)
            continue;
        now = shi_now_ns();
        if (!start)
            start = now;
        if (now - start > LOCK_WAIT_NS)
            return -ETIMEDOUT;
        sched_yield(); /* it may wait for this very core */
    }
    return got;
}

void shi_ring_unlock(struct shi_self *self, struct shi_ptr_ring *r)
{
    shi_lock_drop(self, &r->lock);
}

/* ---- packets ---------------------------------------------------------------------- */

#define LOOK_AHEAD 64u

static uint64_t flows_at(const struct shi_machine *m)
{
    return sizeof(struct shi_net) + (uint64_t)m->ncpus * sizeof(struct shi_net_cpu);
}

uint64_t shi_net_bytes(const struct shi_machine *m, uint32_t slice, uint32_t nflows)
{
    return flows_at(m) + (uint64_t)nflows * sizeof(struct shi_net_flow) +
           (uint64_t)m->ncpus * slice * sizeof(struct shi_packet);
}

int shi_net_init(const struct shi_machine *m, uint64_t at, uint32_t slice, uint32_t nflows)
{
    struct shi_net *net = (struct shi_net *)(m->base + at);
    uint64_t end = shi_array_end(m);
    if (at < m->array_offset || at > end || !slice || (nflows & (nflows - 1)) ||
        (uint64_t)slice * m->ncpus > 1u << 30 || shi_net_bytes(m, slice, nflows) > end - at)
        return -EINVAL;
    /* Acquire pairs with the release below: its sizes. */
    if (shi_load_acquire(&net->made))
        return net->slice == slice && net->nflows == nflows ? 0 : -EINVAL;
    net->slice = slice;
    net->nflows = nflows;
    shi_store_release(&net->made, 1);
    return 0;
}

struct shi_net *shi_net(const struct shi_machine *m)
{
    struct shi_net *net = shi_user(m, SHI_USER_net, sizeof *net);
    /* Acquire pairs with shi_net_init's release: its sizes. */
    if (!net || !shi_load_acquire(&net->made) || !net->slice ||
        (net->nflows & (net->nflows - 1)))
        return NULL;
    return shi_user(m, SHI_USER_net, shi_net_bytes(m, net->slice, net->nflows));
}

struct shi_net_flow *shi_net_flow(const struct shi_machine *m, struct shi_net *net,
                                  uint32_t hash)
{
    if (!net->nflows)
        return NULL;
    return (struct shi_net_flow *)((uint8_t *)net + flows_at(m)) + (hash & (net->nflows - 1));
}

static inline struct shi_packet *packets(const struct shi_machine *m, struct shi_net *net)
{
    return (struct shi_packet *)((uint8_t *)net + flows_at(m) +
                                 (uint64_t)net->nflows * sizeof(struct shi_net_flow));
}

struct shi_packet *shi_packet(const struct shi_machine *m, struct shi_net *net, uint32_t id)
{
    return (uint64_t)id < (uint64_t)m->ncpus * net->slice ? packets(m, net) + id : NULL;
}

int64_t shi_packet_alloc(struct shi_self *self, struct shi_net *net, uint32_t hash,
                         uint64_t data)
{
    struct shi_net_cpu *cpu = &net->cpu[self->id];
    struct shi_packet *own = packets(self->m, net) + (uint64_t)self->id * net->slice;
    uint32_t at = shi_load_relaxed(&cpu->cursor), looks;
    for (looks = 0; looks < LOOK_AHEAD; looks++) {
        if (at >= net->slice)
            at = 0;
        struct shi_packet *p = &own[at];
        /* Acquire pairs with the free: who had it has read it.  MADE is left by a process of
         * this CPU that was killed before it handed the packet in. */
        uint32_t state = shi_load_acquire(&p->state);
        if ((state & SHI_PK_STATE) != SHI_PK_QUEUED) {
            shi_store_relaxed(&p->state, ((state & ~SHI_PK_STATE) + SHI_PK_USE) | SHI_PK_MADE);
            p->hash = hash;
            p->data = data;
            shi_store_relaxed(&cpu->cursor, at + 1);
            return (int64_t)self->id * net->slice + at;
        }
        at++;
    }
    shi_store_relaxed(&cpu->cursor, at);
    shi_store_relaxed(&cpu->nobufs, shi_load_relaxed(&cpu->nobufs) + 1);
    return -ENOBUFS;
}

static inline void free_packet(struct shi_packet *p)
{
    /* Release: what was read of it was read before its owner fills it anew. */
    shi_store_release(&p->state, shi_load_relaxed(&p->state) & ~SHI_PK_STATE);
}

void shi_packet_free(const struct shi_machine *m, struct shi_net *net, uint32_t id)
{
    struct shi_packet *p = shi_packet(m, net, id);
    if (p)
        free_packet(p);
}

static void to_socket(struct shi_net_cpu *cpu, const struct shi_packet *p)
{
    uint32_t put = shi_load_relaxed(&cpu->put);
    if (put - shi_load_relaxed(&cpu->got) >= SHI_NET_SOCKET) {
        shi_store_relaxed(&cpu->rcvbuf_errors, shi_load_relaxed(&cpu->rcvbuf_errors) + 1);
        return;
    }
    cpu->socket[put % SHI_NET_SOCKET].hash = p->hash;
    cpu->socket[put % SHI_NET_SOCKET].data = p->data;
    shi_store_release(&cpu->put, put + 1);
}

uint32_t shi_net_recv(struct shi_self *self, struct shi_net *net, uint32_t *hash,
                      uint64_t *data, uint32_t n)
{
    struct shi_net_cpu *cpu = &net->cpu[self->id];
    uint32_t k;
    shi_enter(self);
    /* Acquire pairs with to_socket's release: what is below is there. */
    uint32_t got = shi_load_relaxed(&cpu->got), there = shi_load_acquire(&cpu->put) - got;
    for (k = 0; k < n && k < there && k < SHI_NET_SOCKET; k++, got++) {
        hash[k] = cpu->socket[got % SHI_NET_SOCKET].hash;
        data[k] = cpu->socket[got % SHI_NET_SOCKET].data;
    }
    shi_store_relaxed(&cpu->got, got);
    shi_leave(self);
    return k;
}

void shi_net_receive(struct shi_self *self, struct shi_net *net, uint32_t id)
{
    const struct shi_packet *p = shi_packet(self->m, net, id);
    struct shi_net_flow *flow = p ? shi_net_flow(self->m, net, p->hash) : NULL;
    if (!flow)
        return;
    if (__builtin_expect(shi_load_relaxed(&net->sockets), 0))
        to_socket(&net->cpu[self->id], p);
    uint64_t last = shi_load_relaxed(&flow->last);
    if (p->data > last) {
        shi_store_relaxed(&flow->last, p->data);
        shi_store_relaxed(&flow->delivered, shi_load_relaxed(&flow->delivered) + 1);
    } else if (p->data == last) {
        shi_fetch_add_relaxed(&flow->doubles, 1);
    } else if (p->data >= shi_load_acquire(&flow->amnesty)) {
        /* Acquire pairs with excuse's swap, before the packet was handed on. */
        shi_fetch_add_relaxed(&flow->disorder, 1);
    }
}

/* ---- bulks ------------------------------------------------------------------------ */

void shi_bulk_add(const struct shi_machine *m, struct shi_net *net, struct shi_bulk *b,
                  uint32_t id)
{
    struct shi_packet *p = shi_packet(m, net, id);
    uint64_t word = shi_load_relaxed(&b->word);
    uint32_t n = shi_bulk_count(b);
    if (!p || n == SHI_NET_BULK)
        return;
    shi_store_relaxed(&b->q[n], id);
    shi_store_relaxed(&p->state, (shi_load_relaxed(&p->state) & ~SHI_PK_STATE) | SHI_PK_QUEUED);
    /* One store makes it handed in and in the bulk: who buries the producer finds both. */
    shi_store_release(&b->word, ((word >> 8) + 1) << 8 | (n + 1));
}

static void empty(struct shi_bulk *b)
{
    shi_store_release(&b->word, shi_load_relaxed(&b->word) & ~0xffull);
    shi_store_release(&b->flush, 0);
}

static void drop_from(const struct shi_machine *m, struct shi_net *net, struct shi_bulk *b,
                      uint32_t first, uint32_t n)
{
    uint32_t k;
    shi_store_release(&b->drops, shi_load_relaxed(&b->drops_before) + n - first);
    empty(b);
    /* After they are counted: a death in here costs the pool a few packets, and no account. */
    for (k = first; k < n; k++)
        shi_packet_free(m, net, shi_load_relaxed(&b->q[k]));
}

uint32_t shi_bulk_produce(struct shi_self *self, struct shi_net *net, struct shi_bulk *b,
                          struct shi_ptr_ring *r, uint32_t capacity)
{
    uint32_t n = shi_bulk_count(b);
    shi_store_relaxed(&b->drops_before, shi_load_relaxed(&b->drops));
    shi_store_release(&b->flush, shi_load_relaxed(&r->produced) + 1);
    uint32_t took = shi_ring_produce(r, capacity, b->q, n);
    shi_store_relaxed(&b->flushes, shi_load_relaxed(&b->flushes) + 1);
    if (__builtin_expect(took < n, 0))
        drop_from(self->m, net, b, took, n);
    else
        empty(b);
    return took;
}

void shi_bulk_drop(struct shi_self *self, struct shi_net *net, struct shi_bulk *b)
{
    shi_store_relaxed(&b->drops_before, shi_load_relaxed(&b->drops));
    shi_store_release(&b->flush, SHI_BULK_DROP);
    drop_from(self->m, net, b, 0, shi_bulk_count(b));
}

void shi_bulk_bury(const struct shi_machine *m, struct shi_net *net, struct shi_bulk *b,
                   struct shi_ptr_ring *r)
{
    uint32_t n = shi_bulk_count(b), took = 0, k;
    /* Acquire pairs with its producer's release: what the ring and the drops were. */
    uint64_t flush = shi_load_acquire(&b->flush);
    if (n) {
        if (flush && flush != SHI_BULK_DROP) {
            uint64_t more = shi_load_relaxed(&r->produced) - (flush - 1);
            took = more < n ? (uint32_t)more : n;
        }
        if (flush) /* its own count of them may have been made, or not */
            shi_store_relaxed(&b->drops, shi_load_relaxed(&b->drops_before));
        shi_store_relaxed(&b->died, shi_load_relaxed(&b->died) + n - took);
        for (k = took; k < n; k++)
            shi_packet_free(m, net, shi_load_relaxed(&b->q[k]));
    }
    empty(b);
    shi_store_release(&b->active, 0);
}

/* ---- hands ------------------------------------------------------------------------ */

static inline uint32_t in_hand(uint64_t done)
{
    uint32_t n = (uint32_t)(done & (SHI_HAND_DROPPING - 1));
    return n < SHI_NET_BULK ? n : SHI_NET_BULK;
}

int shi_hand_take(struct shi_self *self, struct shi_net *net, struct shi_hand *h,
                  struct shi_ptr_ring *r, uint32_t capacity, uint32_t n, const shi_a64 *drops)
{
    uint64_t done = shi_load_relaxed(&h->done) >> 8 << 8;
    int got = shi_ring_peek(r, capacity, h->id, n < SHI_NET_BULK ? n : SHI_NET_BULK), k;
    if (got <= 0) {
        if (got == -EBADMSG) {
            /* Nothing behind a damaged entry can be believed. */
            shi_count(self, SHI_C_corrupt);
            /* Acquire pairs with the producers' release: the entries that are given up. */
            shi_store_release(&r->head, shi_load_acquire(&r->produced));
            shi_ring_zero(r, capacity);
        }
        return got;
    }
    for (k = 0; k < got; k++) {
        const struct shi_packet *p = shi_packet(self->m, net, shi_load_relaxed(&h->id[k]));
        shi_store_relaxed(&h->state[k], p ? shi_load_relaxed(&p->state) : 0);
    }
    shi_store_relaxed(&h->from, shi_load_relaxed(&r->head));
    if (drops) {
        shi_store_relaxed(&h->drops_before, shi_load_relaxed(drops));
        done |= SHI_HAND_DROPPING;
    }
    /* In hand first, off the ring second: who buries the consumer tells by the head which. */
    shi_store_release(&h->done, done | (uint64_t)got);
    shi_ring_take(r, capacity, (uint32_t)got);
    return got;
}

uint64_t shi_hand_queued(const struct shi_hand *h, const struct shi_ptr_ring *r)
{
    /* The head first.  Acquire pairs with its release: in hand before it is off the ring. */
    uint64_t head = shi_load_acquire(&r->head), done = shi_load_acquire(&h->done);
    bool taken = !(done & SHI_HAND_FREEING) && shi_load_relaxed(&h->from) != head;
    return shi_load_relaxed(&r->produced) - head + (taken ? in_hand(done) : 0);
}

static void free_hand(const struct shi_machine *m, struct shi_net *net, struct shi_hand *h,
                      uint32_t n)
{
    uint32_t k;
    for (k = 0; k < n; k++) {
        struct shi_packet *p = shi_packet(m, net, shi_load_relaxed(&h->id[k]));
        uint32_t state = shi_load_relaxed(&h->state[k]);
        /* Only this use of it: freed before the consumer died, it may be another's by now. */
        if (p && (state & SHI_PK_STATE) == SHI_PK_QUEUED)
            shi_cas_full(&p->state, &state, state & ~SHI_PK_STATE);
    }
}

void shi_hand_done(const struct shi_machine *m, struct shi_net *net, struct shi_hand *h)
{
    uint64_t done = shi_load_relaxed(&h->done);
    uint32_t n = in_hand(done), k;
    done = ((done >> 8) + n) << 8;
    /* Delivered, all in one store; then their owners have them back. */
    shi_store_release(&h->done, done | SHI_HAND_FREEING | n);
    for (k = 0; k < n; k++)
        shi_packet_free(m, net, shi_load_relaxed(&h->id[k]));
    shi_store_release(&h->done, done);
}

void shi_hand_turn(struct shi_hand *h, const shi_a64 *drops)
{
    shi_store_relaxed(&h->drops_before, shi_load_relaxed(drops));
    /* Release: who buries this finds what the drops were. */
    shi_store_release(&h->done, shi_load_relaxed(&h->done) | SHI_HAND_DROPPING);
}

void shi_hand_drop(const struct shi_machine *m, struct shi_net *net, struct shi_hand *h,
                   shi_a64 *drops)
{
    uint64_t done = shi_load_relaxed(&h->done);
    uint32_t n = in_hand(done), k;
    /* A number, not one more: who buries this stores the same. */
    shi_store_release(drops, shi_load_relaxed(&h->drops_before) + n);
    done = done >> 8 << 8;
    shi_store_release(&h->done, done | SHI_HAND_FREEING | n);
    for (k = 0; k < n; k++)
        shi_packet_free(m, net, shi_load_relaxed(&h->id[k]));
    shi_store_release(&h->done, done);
}

/* Its last holder is dead: what it had in hand died with it, or was about to be dropped. */
static void bury_hand(const struct shi_machine *m, struct shi_net *net, struct shi_hand *h,
                      struct shi_ptr_ring *r, uint32_t capacity, shi_a64 *drops)
{
    /* Acquire pairs with the dead one's release: what it has in hand, and since which head. */
    uint64_t done = shi_load_acquire(&h->done);
    uint32_t n = in_hand(done);
    if (done & SHI_HAND_FREEING) {
        free_hand(m, net, h, n);
    } else if (n && shi_load_acquire(&r->head) != shi_load_relaxed(&h->from)) {
        if (done & SHI_HAND_DROPPING)
            shi_store_release(drops, shi_load_relaxed(&h->drops_before) + n);
        else
            shi_store_relaxed(&h->died, shi_load_relaxed(&h->died) + n);
        free_hand(m, net, h, n);
    }
    shi_store_release(&h->done, done >> 8 << 8);
    shi_ring_zero(r, capacity);
}

int shi_hand_lock(struct shi_self *self, struct shi_net *net, struct shi_hand *h,
                  struct shi_ptr_ring *r, uint32_t capacity, shi_a64 *drops)
{
    int got = shi_lock_take(self, &h->owner);
    if (__builtin_expect(got > 0, 0)) {
        bury_hand(self->m, net, h, r, capacity, drops);
        got = 0;
    }
    return got;
}

void shi_hand_unlock(struct shi_self *self, struct shi_hand *h)
{
    shi_lock_drop(self, &h->owner);
}
