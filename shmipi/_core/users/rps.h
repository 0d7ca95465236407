/* SPDX-License-Identifier: MIT */
/*
 * net/core/dev.c and net/core/rps.h: receive packet steering.  A CPU that gets packets from a
 * device chooses by their flow which CPU does the rest, puts them on that one's backlog, and
 * tells it by an IPI, at most once until it has emptied its backlog.
 *
 * A backlog is one ring: up to `spliced` its packets are the kernel's process_queue, behind
 * that its input_pkt_queue.
 */
#ifndef SHI_RPS_H
#define SHI_RPS_H

#include "users/net.h"

#define SHI_NET_RX_SUCCESS 0
#define SHI_NET_RX_DROP 1
#define SHI_RPS_NO_CPU UINT32_MAX
#define SHI_RPS_BACKLOG 16383u /* the largest max_backlog */
#define SHI_RPS_FLOWS (1u << 20)
#define SHI_FLOW_HISTORY 128u /* FLOW_LIMIT_HISTORY */
#define SHI_FLOW_BUCKETS 4096u

/* Of a flow table of the receive queue: where its packets went last.  One word, so that who
 * queues what a dead CPU left never gives one CPU the tail of another's backlog. */
struct shi_rps_dev_flow {
    shi_a64 word; /* last_qtail << 32 | cpu; SHI_RPS_NO_CPU: nowhere yet */
};

struct shi_sd_flow_limit {
    shi_a32 on, head, count;
    uint16_t history[SHI_FLOW_HISTORY];
    uint8_t buckets[SHI_FLOW_BUCKETS];
};

/* struct softnet_data. */
struct shi_softnet {
    /* By others too, under the lock of the ring. */
    _Alignas(SHI_PAIR) shi_a32 napi; /* backlog.state: NAPI_STATE_SCHED */
    shi_a64 spliced;                 /* ring.produced when process_queue was filled last */
    shi_a32 rps_ipi_next;            /* 1 + the next on somebody's rps_ipi_list */
    /* A packet that is moved here from another's backlog, which it leaves behind: for who takes
     * the lock from a mover that died in the middle (settle). */
    shi_a32 move_from;          /* 1 + whose; 0: none */
    shi_a64 move_at, move_head; /* ring.produced here, and ring.head there, before */
    /* Its own. */
    _Alignas(SHI_PAIR) shi_a32 input_queue_head; /* delivered: after, not before */
    shi_a32 rps_ipi_list;                        /* 1 + the first CPU to tell */
    shi_a32 poll;                                /* its backlog is on the poll_list */
    shi_a32 in_net_rx_action;
    shi_a64 processed, received_rps, time_squeeze, ipis, direct;
    struct shi_hand hand;
    /* What it hands in, one at a time: to the backlog whose CPU is `aim` - 1. */
    struct shi_bulk bulk;
    shi_a32 aim;
    shi_a64 requeued, redropped; /* of its backlog, by another: it was dead or offline */
    shi_a32 move_to;             /* 1 + to whose backlog one is moved; 0: none */
    struct shi_sd_flow_limit limit;
};

/* The state of SHI_USER_rps.  Then: the rps_map, the flow tables, the CPUs' softnet_data and
 * rings. */
struct shi_rps {
    uint32_t backlog; /* the rings are made for this many + 1, twice */
    uint32_t flows;   /* room of each flow table */
    shi_a32 max_backlog, weight, budget, flow_limit_len;
    shi_a32 map_len;   /* 0: no RPS */
    shi_a32 sock_mask; /* rps_sock_flow_table: entries - 1; 0 entries: UINT32_MAX */
    shi_a32 dev_log;   /* rps_dev_flow_table: 1 + log2 of its entries; 0: none */
    shi_a32 made;
};

uint64_t shi_rps_bytes(const struct shi_machine *m, uint32_t backlog, uint32_t flows);
/* First use of the state: 0, -EINVAL. */
int shi_rps_init(const struct shi_machine *m, uint64_t at, uint32_t backlog, uint32_t flows);
struct shi_rps *shi_rps(const struct shi_machine *m);
struct shi_softnet *shi_softnet(const struct shi_machine *m, struct shi_rps *rps, uint32_t cpu);

/* store_rps_map: CPUs, in order; none: off.  -ENXIO: no such CPU. */
int shi_rps_set_map(const struct shi_machine *m, struct shi_rps *rps, const uint32_t *cpus,
                    uint32_t n);
/* rps_sock_flow_sysctl, store_rps_dev_flow_table_cnt: rounded up to a power of two; 0: none.
 * -EINVAL: too many. */
int shi_rps_set_sock_flows(const struct shi_machine *m, struct shi_rps *rps, uint64_t n);
int shi_rps_set_dev_flows(const struct shi_machine *m, struct shi_rps *rps, uint64_t n);
/* flow_limit_cpu_sysctl of one CPU, flow_limit_table_len_sysctl (-EINVAL: no power of two). */
int shi_rps_flow_limit(const struct shi_machine *m, struct shi_rps *rps, uint32_t cpu, bool on);
int shi_rps_flow_limit_len(struct shi_rps *rps, uint64_t n);
/* The task that takes a flow's packets runs on this CPU (rps_record_sock_flow). */
void shi_rps_record(const struct shi_machine *m, struct shi_rps *rps, uint32_t hash,
                    uint32_t cpu);

/* get_rps_cpu: the CPU, or -1. */
int shi_rps_cpu(const struct shi_machine *m, struct shi_rps *rps, uint32_t hash);
/* A packet of this CPU: SHI_NET_RX_SUCCESS, SHI_NET_RX_DROP, or -ENOBUFS.  `receive`: as
 * netif_receive_skb, which delivers at once where there is no CPU to steer to; else as
 * netif_rx.  `data` is counted for it where `counted`. */
int shi_netif_rx(struct shi_self *self, struct shi_net *net, struct shi_rps *rps, uint32_t hash,
                 uint64_t data, bool receive, bool counted);
/* Of `nflows` flows from `hash` on, in turn.  How many were handed in. */
int64_t shi_rps_generate(struct shi_self *self, struct shi_net *net, struct shi_rps *rps,
                         uint32_t hash, uint32_t nflows, uint64_t n, bool receive);

struct shi_rps_stats {
    uint64_t in, delivered, dropped, died, queued, ipis, received_rps, time_squeeze, requeued,
        flow_limited, processed;
};
/* Of one CPU: handed in by it; the others are its backlog's. */
void shi_rps_stats(const struct shi_machine *m, struct shi_rps *rps, uint32_t cpu,
                   struct shi_rps_stats *s);

/* As if so many packets had gone through this CPU's backlog, which is empty: for tests of counts
 * that come round.  0, -EBUSY, -EINVAL. */
int shi_rps_set_count(const struct shi_machine *m, struct shi_rps *rps, uint32_t cpu,
                      uint64_t count);

/* The NET_RX softirq and the function of its IPI, for every process alike. */
void shi_rps_register(void);
/* dev_cpu_dead: send the IPIs that the CPU had not sent, and give its backlog to others.
 * `dead`: it was killed, and what it had in hand died with it. */
void shi_rps_cpu_dead(struct shi_self *self, uint32_t cpu, bool dead);
/* This CPU is online again, perhaps another process: what others have put on its backlog when
 * they saw it online still, and did not tell. */
void shi_rps_online(struct shi_self *self);

#endif
