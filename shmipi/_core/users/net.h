/* SPDX-License-Identifier: MIT */
/*
 * What RPS and cpumap have in common: packets, and handing them from CPU to CPU so that each
 * is accounted for, whoever is killed wherever.
 *
 * A packet is 16 bytes of shared memory.  It belongs to the CPU that has made it, which takes
 * its packets in turn and finds by the packet's own state which is free; so there is no list
 * that a death could damage.  A producer's packets on their way into a ring are in its bulk, a
 * consumer's taken from one in its hand: these two are what is looked at after a death.
 *
 *   handed in = delivered + dropped + died + in queues
 */
#ifndef SHI_NET_H
#define SHI_NET_H

#include "users/ptr_ring.h"

#define SHI_NET_BULK 8u /* CPU_MAP_BULK_SIZE, and CPUMAP_BATCH */

enum shi_packet_state { SHI_PK_FREE = 0, SHI_PK_MADE = 1, SHI_PK_QUEUED = 2 };
#define SHI_PK_STATE 3u
#define SHI_PK_USE 4u /* one use more: with the state, in one word */

struct shi_packet {
    shi_a32 state;
    uint32_t hash; /* of its flow */
    uint64_t data; /* the user's; where order is checked, its number in its flow */
};
_Static_assert(sizeof(struct shi_packet) == 16, "four packets a line");

/* Where the protocol would be: what has arrived of each flow. */
struct shi_net_flow {
    _Alignas(SHI_LINE) shi_a64 sent; /* by the one sender that a flow has */
    shi_a32 aimed;                   /* 1 + the CPU of the last one */
    /* Below this number the order may change: its CPU has gone, or come (get_rps_cpu). */
    shi_a64 amnesty;
    _Alignas(SHI_LINE) shi_a64 last; /* of those that were delivered */
    shi_a64 delivered, disorder, doubles;
};

#define SHI_NET_SOCKET 256u /* packets that nobody has read yet, of a CPU */

struct shi_net_cpu {
    _Alignas(SHI_PAIR) shi_a32 cursor; /* its next packet */
    shi_a64 nobufs;
    /* What was delivered here, for tasks of this CPU to read (sk_receive_queue). */
    _Alignas(SHI_LINE) shi_a32 put, got;
    shi_a64 rcvbuf_errors;
    struct {
        uint64_t data;
        uint32_t hash, pad;
    } socket[SHI_NET_SOCKET];
};

/* The state of SHI_USER_net. */
struct shi_net {
    uint32_t slice, nflows; /* packets a CPU has; flows: a power of two, or 0 */
    shi_a32 made, sockets;  /* sockets: 1: there is somebody who reads */
    _Alignas(SHI_PAIR) struct shi_net_cpu cpu[];
    /* then the flows, then the packets */
};

/* First use of the state at `at`: 0, -EINVAL. */
int shi_net_init(const struct shi_machine *m, uint64_t at, uint32_t slice, uint32_t nflows);
uint64_t shi_net_bytes(const struct shi_machine *m, uint32_t slice, uint32_t nflows);
/* NULL: not made, or damaged. */
struct shi_net *shi_net(const struct shi_machine *m);
struct shi_net_flow *shi_net_flow(const struct shi_machine *m, struct shi_net *net,
                                  uint32_t hash);
struct shi_packet *shi_packet(const struct shi_machine *m, struct shi_net *net, uint32_t id);
/* A packet of the own CPU: its number, or -ENOBUFS.  Between shi_enter and shi_leave. */
int64_t shi_packet_alloc(struct shi_self *self, struct shi_net *net, uint32_t hash,
                         uint64_t data);
void shi_packet_free(const struct shi_machine *m, struct shi_net *net, uint32_t id);
/* __netif_receive_skb: the protocol of this CPU has it.  Between shi_enter and shi_leave. */
void shi_net_receive(struct shi_self *self, struct shi_net *net, uint32_t id);
/* recvmsg: up to `n` packets that were delivered here, in order.  How many. */
uint32_t shi_net_recv(struct shi_self *self, struct shi_net *net, uint32_t *hash,
                      uint64_t *data, uint32_t n);

/* ---- a producer's packets on their way into a ring ------------------------------- */

struct shi_bulk {
    _Alignas(SHI_PAIR) shi_a64 word; /* packets handed in so far << 8 | how many are in q */
    shi_a64 flush; /* 0; 1 + ring.produced when the flush began; SHI_BULK_DROP: it drops all */
    shi_a64 drops, drops_before;
    shi_a64 died;
    shi_a32 active; /* 1 from the first packet to the end of the poll (flush_node) */
    shi_a32 q[SHI_NET_BULK];
    shi_a64 flushes, wakes;
};
#define SHI_BULK_DROP UINT64_MAX

static inline uint32_t shi_bulk_count(const struct shi_bulk *b)
{
    uint32_t n = (uint32_t)(shi_load_relaxed(&b->word) & 0xff);
    return n < SHI_NET_BULK ? n : SHI_NET_BULK;
}

/* One more, there is room. */
void shi_bulk_add(const struct shi_machine *m, struct shi_net *net, struct shi_bulk *b,
                  uint32_t id);
/* With the ring's lock: all into the ring, what finds no room is dropped and counted.  How many
 * the ring took. */
uint32_t shi_bulk_produce(struct shi_self *self, struct shi_net *net, struct shi_bulk *b,
                          struct shi_ptr_ring *r, uint32_t capacity);
/* Without it: drop all. */
void shi_bulk_drop(struct shi_self *self, struct shi_net *net, struct shi_bulk *b);
/* Its producer is dead.  With the ring's lock, the ring repaired. */
void shi_bulk_bury(const struct shi_machine *m, struct shi_net *net, struct shi_bulk *b,
                   struct shi_ptr_ring *r);

/* ---- a consumer's, taken from one ------------------------------------------------ */

struct shi_hand {
    _Alignas(SHI_PAIR) shi_a64 done; /* delivered so far << 8 | flags | how many are in id */
    shi_a64 owner;                   /* who takes from the ring: 0, or its holder */
    shi_a64 from;                    /* ring.head before they were taken */
    shi_a64 drops_before;            /* DROPPING: the count of drops, then */
    shi_a64 died;
    shi_a32 id[SHI_NET_BULK];
    shi_a32 state[SHI_NET_BULK]; /* the packet's, by which this use of it is known */
};
#define SHI_HAND_FREEING 0x80u  /* counted, and on their way back to their owners */
#define SHI_HAND_DROPPING 0x40u /* they are not delivered, and not counted yet */

/*
 * A ring has one consumer: its CPU, or, when that is gone, who empties it in its place.  0, with
 * what a dead one had in hand accounted for (to `drops`, if it was about to drop them), or
 * -EAGAIN: somebody has it.  Between shi_enter and shi_leave, as all of these.
 */
int shi_hand_lock(struct shi_self *self, struct shi_net *net, struct shi_hand *h,
                  struct shi_ptr_ring *r, uint32_t capacity, shi_a64 *drops);
void shi_hand_unlock(struct shi_self *self, struct shi_hand *h);
/* Take up to `n` packets: how many, 0, or -EBADMSG (dropped and counted as corrupt).  `drops`:
 * they are for shi_hand_drop, to be counted there; NULL: to be delivered. */
int shi_hand_take(struct shi_self *self, struct shi_net *net, struct shi_hand *h,
                  struct shi_ptr_ring *r, uint32_t capacity, uint32_t n, const shi_a64 *drops);
/* How many are in the ring, or in hand: taken, and neither delivered nor dropped. */
uint64_t shi_hand_queued(const struct shi_hand *h, const struct shi_ptr_ring *r);
/* They are delivered. */
void shi_hand_done(const struct shi_machine *m, struct shi_net *net, struct shi_hand *h);
/* What was taken to be delivered is to be dropped. */
void shi_hand_turn(struct shi_hand *h, const shi_a64 *drops);
/* They are dropped. */
void shi_hand_drop(const struct shi_machine *m, struct shi_net *net, struct shi_hand *h,
                   shi_a64 *drops);

#endif
