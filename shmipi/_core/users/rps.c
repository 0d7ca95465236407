/* SPDX-License-Identifier: MIT */
#include "base/sys.h"

#include <errno.h>
#include <string.h>

#include "base/clock.h"
#include "base/native.h"
#include "base/rules.h"
#include "base/step.h"
#include "smp/entry.h"
#include "smp/softirq.h"
#include "users/csds.h"
#include "users/rps.h"

#define NAPI_STATE_SCHED 1u
#define SOCKET_BATCH 64u   /* packets that a protocol of Python's gets at once, at most */
#define NET_RX_NS 8000000u /* netdev_budget_usecs: two ticks of 4 ms */
#define NO_SOCK UINT32_MAX
#define DIRECT UINT32_MAX  /* of a flow: delivered where it came */
#define BY_MAP 0x80000000u /* of a flow: not by the flow tables */

/* ---- where things are ------------------------------------------------------------- */

static uint64_t up(uint64_t n)
{
    return (n + SHI_PAIR - 1) / SHI_PAIR * SHI_PAIR;
}

static uint64_t map_at(void)
{
    return up(sizeof(struct shi_rps));
}

static uint64_t sock_at(const struct shi_machine *m)
{
    return up(map_at() + (uint64_t)m->ncpus * sizeof(shi_a32));
}

static uint64_t dev_at(const struct shi_machine *m, uint32_t flows)
{
    return up(sock_at(m) + (uint64_t)flows * sizeof(shi_a32));
}

static uint64_t cpus_at(const struct shi_machine *m, uint32_t flows)
{
    return up(dev_at(m, flows) + (uint64_t)flows * sizeof(struct shi_rps_dev_flow));
}

static uint32_t ring_room(uint32_t backlog)
{
    return 2 * (backlog + 1);
}

static uint64_t cpu_bytes(uint32_t backlog)
{
    return up(sizeof(struct shi_softnet)) + shi_ring_bytes(ring_room(backlog));
}

uint64_t shi_rps_bytes(const struct shi_machine *m, uint32_t backlog, uint32_t flows)
{
    return cpus_at(m, flows) + (uint64_t)m->nslots * cpu_bytes(backlog);
}

struct shi_rps *shi_rps(const struct shi_machine *m)
{
    struct shi_rps *rps = shi_user(m, SHI_USER_rps, sizeof *rps);
    /* Acquire pairs with shi_rps_init's release: its sizes. */
    if (!rps || !shi_load_acquire(&rps->made) || rps->backlog > SHI_RPS_BACKLOG ||
        rps->flows > SHI_RPS_FLOWS)
        return NULL;
    return shi_user(m, SHI_USER_rps, shi_rps_bytes(m, rps->backlog, rps->flows));
}

struct shi_softnet *shi_softnet(const struct shi_machine *m, struct shi_rps *rps, uint32_t cpu)
{
    return (struct shi_softnet *)((uint8_t *)rps + cpus_at(m, rps->flows) +
                                  (uint64_t)cpu * cpu_bytes(rps->backlog));
}

static struct shi_ptr_ring *ring_of(struct shi_softnet *sd)
{
    return (struct shi_ptr_ring *)((uint8_t *)sd + up(sizeof *sd));
}

static shi_a32 *map_of(struct shi_rps *rps)
{
    return (shi_a32 *)((uint8_t *)rps + map_at());
}

static shi_a32 *sock_flows(const struct shi_machine *m, struct shi_rps *rps)
{
    return (shi_a32 *)((uint8_t *)rps + sock_at(m));
}

static struct shi_rps_dev_flow *dev_flows(const struct shi_machine *m, struct shi_rps *rps)
{
    return (struct shi_rps_dev_flow *)((uint8_t *)rps + dev_at(m, rps->flows));
}

static bool online(const struct shi_machine *m, uint32_t cpu)
{
    /* Acquire pairs with the swap that made it online, or not any more. */
    return shi_word_online(shi_load_acquire(&shi_slot(m, cpu)->word));
}

/* ---- settings --------------------------------------------------------------------- */

int shi_rps_init(const struct shi_machine *m, uint64_t at, uint32_t backlog, uint32_t flows)
{
    struct shi_rps *rps = (struct shi_rps *)(m->base + at);
    uint32_t cpu;
    if (at < m->array_offset || at > shi_array_end(m) || backlog > SHI_RPS_BACKLOG ||
        flows > SHI_RPS_FLOWS || (flows & (flows - 1)) ||
        shi_rps_bytes(m, backlog, flows) > shi_array_end(m) - at)
        return -EINVAL;
    /* Acquire pairs with the release below: its sizes. */
    if (shi_load_acquire(&rps->made))
        return rps->backlog == backlog && rps->flows == flows ? 0 : -EINVAL;
    rps->backlog = backlog;
    rps->flows = flows;
    shi_store_relaxed(&rps->max_backlog, backlog);
    shi_store_relaxed(&rps->weight, 64);
    shi_store_relaxed(&rps->budget, 300);
    shi_store_relaxed(&rps->flow_limit_len, SHI_FLOW_BUCKETS);
    shi_store_relaxed(&rps->sock_mask, NO_SOCK);
    for (cpu = 0; cpu < m->nslots; cpu++) {
        struct shi_ptr_ring *r = ring_of(shi_softnet(m, rps, cpu));
        shi_store_relaxed(&r->capacity, ring_room(backlog));
        shi_store_relaxed(&r->size, ring_room(backlog));
    }
    shi_store_release(&rps->made, 1);
    return 0;
}

int shi_rps_set_map(const struct shi_machine *m, struct shi_rps *rps, const uint32_t *cpus,
                    uint32_t n)
{
    uint32_t i;
    for (i = 0; i < n; i++)
        if (cpus[i] >= m->ncpus)
            return -ENXIO;
    /* Off meanwhile: who looks finds no map, or all of it. */
    shi_store_full(&rps->map_len, 0);
    for (i = 0; i < n && i < m->ncpus; i++)
        shi_store_relaxed(&map_of(rps)[i], cpus[i]);
    shi_store_release(&rps->map_len, i);
    return 0;
}

static uint32_t power_of_two(uint64_t n)
{
    uint32_t size = 1;
    while (size < n)
        size <<= 1;
    return size;
}

int shi_rps_set_sock_flows(const struct shi_machine *m, struct shi_rps *rps, uint64_t n)
{
    uint32_t i;
    if (n > rps->flows)
        return -EINVAL;
    shi_store_full(&rps->sock_mask, NO_SOCK);
    if (!n)
        return 0;
    for (i = 0; i < power_of_two(n); i++)
        shi_store_relaxed(&sock_flows(m, rps)[i], SHI_RPS_NO_CPU);
    shi_store_release(&rps->sock_mask, power_of_two(n) - 1);
    return 0;
}

int shi_rps_set_dev_flows(const struct shi_machine *m, struct shi_rps *rps, uint64_t n)
{
    uint32_t i;
    if (n > rps->flows)
        return -EINVAL;
    shi_store_full(&rps->dev_log, 0);
    if (!n)
        return 0;
    for (i = 0; i < power_of_two(n); i++)
        shi_store_relaxed(&dev_flows(m, rps)[i].word, SHI_RPS_NO_CPU);
    shi_store_release(&rps->dev_log, 1 + (uint32_t)__builtin_ctz(power_of_two(n)));
    return 0;
}

int shi_rps_flow_limit(const struct shi_machine *m, struct shi_rps *rps, uint32_t cpu, bool on)
{
    if (cpu >= m->ncpus)
        return -EINVAL;
    struct shi_sd_flow_limit *fl = &shi_softnet(m, rps, cpu)->limit;
    if (on && !shi_load_relaxed(&fl->on)) {
        memset(fl->history, 0, sizeof fl->history);
        memset(fl->buckets, 0, sizeof fl->buckets);
    }
    shi_store_release(&fl->on, on);
    return 0;
}

int shi_rps_flow_limit_len(struct shi_rps *rps, uint64_t n)
{
    if (!n || (n & (n - 1)) || n > SHI_FLOW_BUCKETS)
        return -EINVAL;
    shi_store_relaxed(&rps->flow_limit_len, (uint32_t)n);
    return 0;
}

/* rps_cpu_mask: the rest of an entry are bits of the flow's hash. */
static uint32_t cpu_mask(const struct shi_machine *m)
{
    return power_of_two(m->ncpus) - 1;
}

void shi_rps_record(const struct shi_machine *m, struct shi_rps *rps, uint32_t hash,
                    uint32_t cpu)
{
    /* Acquire pairs with shi_rps_set_sock_flows' release: the table is empty. */
    uint32_t mask = shi_load_acquire(&rps->sock_mask);
    if (mask == NO_SOCK || mask >= rps->flows || !hash)
        return;
    uint32_t entry = (hash & ~cpu_mask(m)) | cpu;
    shi_a32 *at = &sock_flows(m, rps)[hash & mask];
    if (shi_load_relaxed(at) != entry)
        shi_store_relaxed(at, entry);
}

/* ---- get_rps_cpu ------------------------------------------------------------------ */

#define GOLDEN_RATIO_32 0x61C88647u

static uint32_t hash_32(uint32_t value, uint32_t bits)
{
    return bits ? value * GOLDEN_RATIO_32 >> (32 - bits) : 0;
}

static uint64_t flow_word(uint32_t cpu, uint32_t tail)
{
    return (uint64_t)tail << 32 | cpu;
}

/*
 * rps_input_queue_tail_save, with the lock of cpu's ring: of two who queue there the later one
 * saves last.  Not when the flow has moved meanwhile, which needs no lock: as two words, the
 * tail of the old backlog would pass for that of the new one, which may be far ahead of it;
 * then the flow moves on before what is queued there.
 */
static void save_tail(struct shi_rps_dev_flow *rflow, uint32_t cpu, uint32_t tail)
{
    uint64_t w = shi_load_relaxed(&rflow->word);
    while ((uint32_t)w == cpu && !shi_cas_full(&rflow->word, &w, flow_word(cpu, tail)))
        ;
}

/* RFS: the CPU, or SHI_RPS_NO_CPU: as without.  `move`: on behalf of the receive queue, which
 * alone moves its flows.  `left`: 1 + the CPU that it moves from in order, or 0. */
static uint32_t by_flow(const struct shi_machine *m, struct shi_rps *rps, uint32_t hash,
                        bool move, struct shi_rps_dev_flow **rflow, uint32_t *left)
{
    /* Acquires pair with the releases of who set the tables: they are empty. */
    uint32_t log = shi_load_acquire(&rps->dev_log), mask = shi_load_acquire(&rps->sock_mask);
    if (!log || log > 21 || 1u << (log - 1) > rps->flows || mask == NO_SOCK ||
        mask >= rps->flows)
        return SHI_RPS_NO_CPU;
    uint32_t ident = shi_load_relaxed(&sock_flows(m, rps)[hash & mask]);
    if ((ident ^ hash) & ~cpu_mask(m))
        return SHI_RPS_NO_CPU; /* another flow's, or nobody's */
    uint32_t next = ident & cpu_mask(m), tail = 0;
    struct shi_rps_dev_flow *flow = &dev_flows(m, rps)[hash_32(hash, log - 1)];
    uint64_t w = shi_load_relaxed(&flow->word);
    uint32_t cpu = (uint32_t)w;
    if (cpu != next) {
        bool here = cpu < m->ncpus && online(m, cpu);
        /* Acquire pairs with the count of what was delivered: all before the tail was. */
        if (here && move &&
            ((int32_t)(shi_load_acquire(&shi_softnet(m, rps, cpu)->input_queue_head) -
                       (uint32_t)(w >> 32)) >= 0 ||
             shi_rule_off(m, SHI_RULE_rps_rfs_order)))
            *left = cpu + 1;
        if (!here || *left) {
            cpu = next;
            if (next < m->ncpus) /* set_rps_cpu */
                tail = shi_load_relaxed(&shi_softnet(m, rps, next)->input_queue_head);
            if (move)
                shi_store_relaxed(&flow->word, flow_word(next, tail));
        }
    }
    if (cpu >= m->ncpus || !online(m, cpu))
        return SHI_RPS_NO_CPU;
    *rflow = flow;
    return cpu;
}

static int get_rps_cpu(const struct shi_machine *m, struct shi_rps *rps, uint32_t hash,
                       bool move, struct shi_rps_dev_flow **rflow, uint32_t *left)
{
    /* Acquire pairs with shi_rps_set_map's release: the CPUs. */
    uint32_t len = shi_load_acquire(&rps->map_len);
    *rflow = NULL;
    *left = 0;
    if (!hash || (!len && !shi_load_relaxed(&rps->dev_log)))
        return -1;
    uint32_t cpu = by_flow(m, rps, hash, move, rflow, left);
    if (cpu != SHI_RPS_NO_CPU)
        return (int)cpu;
    if (len && len <= m->ncpus) {
        cpu = shi_load_relaxed(&map_of(rps)[(uint64_t)hash * len >> 32]); /* reciprocal_scale */
        if (cpu < m->ncpus && online(m, cpu))
            return (int)cpu;
    }
    return -1;
}

int shi_rps_cpu(const struct shi_machine *m, struct shi_rps *rps, uint32_t hash)
{
    struct shi_rps_dev_flow *rflow;
    uint32_t left;
    return get_rps_cpu(m, rps, hash, true, &rflow, &left);
}

/* ---- the IPI ---------------------------------------------------------------------- */

static int trigger_number = -1;

/* Called from hard irq, on the CPU whose backlog it is. */
static void rps_trigger_softirq(void *info)
{
    struct shi_self *self = shi_this_cpu();
    struct shi_rps *rps = self ? shi_rps(self->m) : NULL;
    (void)info;
    if (!rps)
        return;
    struct shi_softnet *sd = shi_softnet(self->m, rps, self->id);
    shi_store_relaxed(&sd->poll, 1);
    if (!shi_load_relaxed(&sd->in_net_rx_action))
        shi_raise_softirq_only(self, SHI_NET_RX_SOFTIRQ);
    shi_store_relaxed(&sd->received_rps, shi_load_relaxed(&sd->received_rps) + 1);
}

/* remsd->csd.  NAPI_STATE_SCHED sees to it that it is used by one at a time. */
static int send_ipi(struct shi_self *self, uint32_t cpu)
{
    return shi_csds_send(self, SHI_CSDS_RPS, trigger_number, cpu);
}

/* net_rps_send_ipi: of all that wait on this CPU's list.  Interrupts on. */
static void net_rps_action(struct shi_self *self, struct shi_rps *rps, struct shi_softnet *sd)
{
    const struct shi_machine *m = self->m;
    uint32_t left;
    for (left = m->ncpus; left; left--) {
        shi_enter(self);
        uint32_t cpu = shi_load_relaxed(&sd->rps_ipi_list) - 1;
        if (cpu < m->ncpus)
            shi_store_relaxed(&sd->rps_ipi_list,
                              shi_load_relaxed(&shi_softnet(m, rps, cpu)->rps_ipi_next));
        shi_leave(self);
        if (cpu >= m->ncpus)
            return;
        if (!online(m, cpu))
            continue;
        if (cpu == self->id) { /* of a dead CPU's list */
            shi_store_relaxed(&sd->poll, 1);
            shi_raise_softirq_only(self, SHI_NET_RX_SOFTIRQ);
            continue;
        }
        int err = shi_rule_off(m, SHI_RULE_rps_send_ipi) &&
                          (shi_load_relaxed(&sd->ipis) & 0x1f) == 0x1f
                      ? 0
                      : send_ipi(self, cpu);
        shi_store_relaxed(&sd->ipis, shi_load_relaxed(&sd->ipis) + 1);
        if (err && err != -ENXIO) {
            /* Every csd is in flight: it stays on the list, and is tried again. */
            shi_enter(self);
            shi_store_relaxed(&shi_softnet(m, rps, cpu)->rps_ipi_next,
                              shi_load_relaxed(&sd->rps_ipi_list));
            shi_store_relaxed(&sd->rps_ipi_list, cpu + 1);
            shi_leave(self);
            shi_raise_softirq_only(self, SHI_NET_RX_SOFTIRQ);
            return;
        }
    }
}

/* ---- enqueue_to_backlog ----------------------------------------------------------- */

static bool flow_limit(struct shi_rps *rps, struct shi_softnet *mine, uint32_t hash,
                       uint32_t qlen, uint32_t max)
{
    struct shi_sd_flow_limit *fl = &mine->limit;
    /* Acquire pairs with shi_rps_flow_limit's release: the buckets are empty. */
    if (qlen < max >> 1 || !shi_load_acquire(&fl->on))
        return false;
    uint32_t len = shi_load_relaxed(&rps->flow_limit_len), head = shi_load_relaxed(&fl->head);
    uint32_t now = hash_32(hash, (uint32_t)__builtin_ctz(len ? len : 1)) &
                   (SHI_FLOW_BUCKETS - 1);
    uint32_t old = fl->history[head & (SHI_FLOW_HISTORY - 1)] & (SHI_FLOW_BUCKETS - 1);
    fl->history[head & (SHI_FLOW_HISTORY - 1)] = (uint16_t)now;
    shi_store_relaxed(&fl->head, (head + 1) & (SHI_FLOW_HISTORY - 1));
    if (fl->buckets[old])
        fl->buckets[old]--;
    if (++fl->buckets[now] <= SHI_FLOW_HISTORY >> 1)
        return false;
    shi_store_relaxed(&fl->count, shi_load_relaxed(&fl->count) + 1);
    return true;
}

/* napi_schedule_rps, with the lock of cpu's ring. */
static void napi_schedule_rps(struct shi_self *self, struct shi_softnet *mine,
                              struct shi_softnet *sd, uint32_t cpu)
{
    if (sd == mine) {
        shi_store_relaxed(&sd->poll, 1);
    } else {
        shi_store_relaxed(&sd->rps_ipi_next, shi_load_relaxed(&mine->rps_ipi_list));
        shi_store_release(&mine->rps_ipi_list, cpu + 1);
    }
    if (!shi_load_relaxed(&mine->in_net_rx_action))
        shi_raise_softirq_only(self, SHI_NET_RX_SOFTIRQ);
}

static uint32_t qlen_of(const struct shi_softnet *sd, const struct shi_ptr_ring *r)
{
    uint64_t n = shi_load_relaxed(&r->produced) - shi_load_relaxed(&sd->spliced);
    return n < UINT32_MAX ? (uint32_t)n : UINT32_MAX;
}

/* A mover has died with the lock of this backlog: a packet that is here leaves the one that it
 * came from.  Once more makes no difference. */
static void settle(const struct shi_machine *m, struct shi_rps *rps, struct shi_softnet *sd)
{
    /* Acquire pairs with the mover's release: from where, and what stood there. */
    uint32_t from = shi_load_acquire(&sd->move_from);
    if (!from)
        return;
    if (from <= m->ncpus &&
        shi_load_relaxed(&ring_of(sd)->produced) != shi_load_relaxed(&sd->move_at)) {
        struct shi_softnet *old = shi_softnet(m, rps, from - 1);
        uint64_t head = shi_load_relaxed(&sd->move_head);
        shi_cas_full(&ring_of(old)->head, &head, head + 1);
        shi_store_release(&old->input_queue_head, (uint32_t)head + 1);
    }
    shi_store_release(&sd->move_from, 0);
}

/* The lock of cpu's ring, with what a dead holder left put right.  0 or -ETIMEDOUT. */
static int lock_backlog(struct shi_self *self, struct shi_net *net, struct shi_rps *rps,
                        uint32_t cpu)
{
    struct shi_ptr_ring *r = ring_of(shi_softnet(self->m, rps, cpu));
    int dead = shi_ring_lock(self, r);
    if (dead <= 0)
        return dead;
    shi_ring_repair(r, ring_room(rps->backlog));
    settle(self->m, rps, shi_softnet(self->m, rps, cpu));
    uint32_t slot = (uint32_t)dead - 1;
    if (slot < self->m->ncpus && slot != self->id) {
        struct shi_softnet *its = shi_softnet(self->m, rps, slot);
        /* Acquire pairs with the dead one's release, before its bulk had anything. */
        if (shi_load_acquire(&its->aim) == cpu + 1)
            shi_bulk_bury(self->m, net, &its->bulk, r);
    }
    return 0;
}

/* cpu's backlog is this one's to empty, with what a dead consumer left put right.  0 or -EAGAIN. */
static int own_backlog(struct shi_self *self, struct shi_net *net, struct shi_rps *rps,
                       uint32_t cpu)
{
    struct shi_softnet *sd = shi_softnet(self->m, rps, cpu);
    int err = shi_hand_lock(self, net, &sd->hand, ring_of(sd), ring_room(rps->backlog),
                            &sd->redropped);
    if (err)
        return err;
    /* Acquire pairs with the mover's release, before it took the other's lock. */
    uint32_t to = shi_load_acquire(&sd->move_to);
    if (__builtin_expect(to != 0, 0)) {
        /* It died, and with the lock of the other, or the move had been settled. */
        if (to <= self->m->ncpus) {
            if (lock_backlog(self, net, rps, to - 1) < 0) {
                shi_hand_unlock(self, &sd->hand);
                return -EAGAIN;
            }
            shi_ring_unlock(self, ring_of(shi_softnet(self->m, rps, to - 1)));
        }
        shi_store_relaxed(&sd->move_to, 0);
    }
    return 0;
}

/* The one packet in this CPU's bulk.  Between shi_enter and shi_leave. */
static int enqueue_to_backlog(struct shi_self *self, struct shi_net *net, struct shi_rps *rps,
                              struct shi_softnet *mine, uint32_t cpu, uint32_t hash,
                              struct shi_rps_dev_flow *rflow)
{
    struct shi_softnet *sd = shi_softnet(self->m, rps, cpu);
    struct shi_ptr_ring *r = ring_of(sd);
    uint32_t max = shi_load_relaxed(&rps->max_backlog), qlen = qlen_of(sd, r), room;
    if (qlen > max || flow_limit(rps, mine, hash, qlen, max) ||
        lock_backlog(self, net, rps, cpu) < 0) {
        shi_bulk_drop(self, net, &mine->bulk);
        return SHI_NET_RX_DROP;
    }
    room = ring_room(rps->backlog);
    qlen = qlen_of(sd, r);
    if (qlen > max) {
        shi_ring_unlock(self, r);
        shi_bulk_drop(self, net, &mine->bulk);
        return SHI_NET_RX_DROP;
    }
    /* Under the lock that process_backlog clears it with: so one IPI for each 0 to 1, and none
     * is missed. */
    if (!qlen && !(shi_load_relaxed(&sd->napi) & NAPI_STATE_SCHED)) {
        shi_store_relaxed(&sd->napi, NAPI_STATE_SCHED);
        napi_schedule_rps(self, mine, sd, cpu);
    }
    uint32_t took = shi_bulk_produce(self, net, &mine->bulk, r, room);
    if (rflow)
        save_tail(rflow, cpu, (uint32_t)shi_load_relaxed(&r->produced));
    shi_ring_unlock(self, r);
    return took ? SHI_NET_RX_SUCCESS : SHI_NET_RX_DROP;
}

/* What the check of order has to know: below this number it may have changed. */
static void excuse(struct shi_net_flow *flow, uint64_t number)
{
    uint64_t before = shi_load_relaxed(&flow->amnesty);
    /* Only up: its sender does so, and who queues what a dead CPU left. */
    while (before < number && !shi_cas_full(&flow->amnesty, &before, number))
        ;
}

/* `left`: 1 + the CPU that RFS has moved it from in order.  That is not where it went last when
 * that CPU has been offline since: its packets went by the map. */
static void note_aim(struct shi_net_flow *flow, uint32_t aim, uint64_t number, uint32_t left)
{
    uint32_t before = shi_load_relaxed(&flow->aimed);
    if (before == aim)
        return;
    if (!left || left != before)
        excuse(flow, number);
    shi_store_relaxed(&flow->aimed, aim);
}

static int rx(struct shi_self *self, struct shi_net *net, struct shi_rps *rps, uint32_t hash,
              uint64_t data, bool receive, bool counted)
{
    const struct shi_machine *m = self->m;
    struct shi_softnet *mine = shi_softnet(m, rps, self->id);
    struct shi_net_flow *flow = counted ? shi_net_flow(m, net, hash) : NULL;
    struct shi_rps_dev_flow *rflow;
    uint32_t left;
    if (flow)
        data = shi_load_relaxed(&flow->sent) + 1;
    int64_t id = shi_packet_alloc(self, net, hash, data);
    if (id < 0)
        return (int)id;
    if (flow)
        shi_store_relaxed(&flow->sent, data);
    int cpu = get_rps_cpu(m, rps, hash, true, &rflow, &left);
    if (flow)
        /* What the map has sent to a CPU is not in last_qtail: as in the kernel, the flow may leave
         * that CPU before it. */
        note_aim(flow,
                 cpu >= 0  ? ((uint32_t)cpu + 1) | (rflow ? 0 : BY_MAP)
                 : receive ? DIRECT
                           : (self->id + 1) | BY_MAP,
                 data, left);
    if (cpu < 0 && receive) {
        shi_net_receive(self, net, (uint32_t)id);
        shi_packet_free(m, net, (uint32_t)id);
        shi_store_relaxed(&mine->direct, shi_load_relaxed(&mine->direct) + 1);
        if (shi_softirq_calls(self, SHI_NET_RX_SOFTIRQ))
            shi_raise_softirq_only(self, SHI_NET_RX_SOFTIRQ);
        return SHI_NET_RX_SUCCESS;
    }
    if (cpu < 0)
        cpu = (int)self->id;
    shi_store_release(&mine->aim, (uint32_t)cpu + 1);
    shi_bulk_add(m, net, &mine->bulk, (uint32_t)id);
    return enqueue_to_backlog(self, net, rps, mine, (uint32_t)cpu, hash, rflow);
}

int shi_netif_rx(struct shi_self *self, struct shi_net *net, struct shi_rps *rps, uint32_t hash,
                 uint64_t data, bool receive, bool counted)
{
    bool bh = !self->in_irq && !self->softirq; /* need_bh_off */
    if (bh)
        shi_local_bh_disable(self);
    shi_enter(self);
    int got = rx(self, net, rps, hash, data, receive, counted);
    shi_leave(self);
    if (bh)
        shi_local_bh_enable(self, true);
    return got;
}

int64_t shi_rps_generate(struct shi_self *self, struct shi_net *net, struct shi_rps *rps,
                         uint32_t hash, uint32_t nflows, uint64_t n, bool receive)
{
    bool bh = !self->in_irq && !self->softirq;
    uint32_t weight = shi_load_relaxed(&rps->weight), k;
    uint64_t i = 0;
    int got = 0;
    while (i < n && got >= 0) {
        /* A driver's poll: BH off, and the IPIs when it ends. */
        if (bh)
            shi_local_bh_disable(self);
        for (k = 0; k < weight && i < n && got >= 0; k++) {
            shi_enter(self);
            got = rx(self, net, rps, hash + (uint32_t)(i % nflows), 0, receive, true);
            shi_leave(self);
            if (got >= 0)
                i++;
        }
        if (bh)
            shi_local_bh_enable(self, true);
    }
    return (int64_t)i;
}

/* The protocol, if it is Python's (dev_add_pack): what was delivered is in this CPU's socket.  What
 * it raises ends it, with some of them taken: it is called for the others, which no packet may
 * follow for long. */
static void call_protocol(struct shi_self *self, const struct shi_net *net)
{
    const struct shi_net_cpu *cpu = &net->cpu[self->id];
    uint32_t got, took = 1;
    while (took && shi_softirq_calls(self, SHI_NET_RX_SOFTIRQ) &&
           shi_load_relaxed(&cpu->put) != (got = shi_load_relaxed(&cpu->got))) {
        self->hooks.softirq(self, SHI_NET_RX_SOFTIRQ);
        took = shi_load_relaxed(&cpu->got) - got; /* 0: the function is no more */
    }
}

/* ---- NET_RX ----------------------------------------------------------------------- */

static uint32_t poll_backlog(struct shi_self *self, struct shi_net *net, struct shi_rps *rps,
                             struct shi_softnet *sd, uint32_t quota)
{
    const struct shi_machine *m = self->m;
    struct shi_ptr_ring *r = ring_of(sd);
    uint32_t room = ring_room(rps->backlog), work = 0;
    for (;;) {
        uint64_t left;
        while ((left = shi_load_relaxed(&sd->spliced) - shi_load_relaxed(&r->head)) != 0) {
            uint32_t most = quota - work < left ? quota - work : (uint32_t)left;
            shi_enter(self);
            int n = shi_hand_take(self, net, &sd->hand, r, room, most, NULL), k;
            for (k = 0; k < n; k++)
                shi_net_receive(self, net, shi_load_relaxed(&sd->hand.id[k]));
            if (n > 0) {
                shi_hand_done(m, net, &sd->hand);
                work += (uint32_t)n;
                shi_store_relaxed(&sd->processed,
                                  shi_load_relaxed(&sd->processed) + (uint32_t)n);
                /* Release: who finds the queue so far along finds them delivered. */
                shi_store_release(&sd->input_queue_head, (uint32_t)shi_load_relaxed(&r->head));
            }
            shi_leave(self);
            if (n <= 0)
                break;
            if (work >= quota)
                return work;
        }
        bool again = true;
        shi_enter(self);
        if (shi_rule_off(m, SHI_RULE_rps_napi_lock)) {
            again = shi_load_relaxed(&r->produced) != shi_load_relaxed(&sd->spliced);
            shi_store_relaxed(&sd->spliced, shi_load_relaxed(&r->produced));
            if (!again)
                shi_store_relaxed(&sd->napi, 0);
        } else if (lock_backlog(self, net, rps, self->id) == 0) {
            uint64_t produced = shi_load_relaxed(&r->produced);
            again = produced != shi_load_relaxed(&sd->spliced);
            if (again)
                shi_store_relaxed(&sd->spliced, produced);
            else
                shi_store_relaxed(&sd->napi, 0);
            shi_ring_unlock(self, r);
        } else {
            shi_leave(self);
            return quota; /* its holder is stopped: polled again later */
        }
        shi_leave(self);
        if (!again)
            return work;
    }
}

static uint32_t process_backlog(struct shi_self *self, struct shi_net *net, struct shi_rps *rps,
                                struct shi_softnet *sd, uint32_t quota)
{
    if (shi_load_relaxed(&sd->rps_ipi_list))
        net_rps_action(self, rps, sd); /* better now than at the end of it all */
    shi_enter(self);
    int err = own_backlog(self, net, rps, self->id);
    shi_leave(self);
    if (err)
        return quota; /* who took this CPU for gone gives it to others: later */
    uint32_t work = poll_backlog(self, net, rps, sd, quota);
    shi_hand_unlock(self, &sd->hand);
    return work;
}

static void net_rx_action(struct shi_self *self)
{
    struct shi_rps *rps = shi_rps(self->m);
    struct shi_net *net = shi_net(self->m);
    if (!rps || !net)
        return;
    struct shi_softnet *sd = shi_softnet(self->m, rps, self->id);
    uint32_t weight = shi_load_relaxed(&rps->weight);
    int64_t budget = shi_load_relaxed(&rps->budget);
    uint64_t end = shi_now_ns() + NET_RX_NS;
    if (!weight)
        weight = 1;
    if (shi_softirq_calls(self, SHI_NET_RX_SOFTIRQ) && weight > SOCKET_BATCH)
        weight = SOCKET_BATCH; /* the socket has room for so many */
    shi_store_relaxed(&sd->in_net_rx_action, 1);
    call_protocol(self, net); /* what was delivered directly (netif_receive_skb) */
    for (;;) {
        /* The handler of the IPI may come at any time: what it adds to the list is found by
         * the next look, or raises the softirq, as in_net_rx_action says. */
        if (!shi_load_relaxed(&sd->poll)) {
            shi_store_relaxed(&sd->in_net_rx_action, 0);
            shi_signal_fence();
            if (!shi_load_relaxed(&sd->poll))
                break;
            shi_store_relaxed(&sd->in_net_rx_action, 1);
            continue;
        }
        shi_store_relaxed(&sd->poll, 0);
        uint32_t work = process_backlog(self, net, rps, sd, weight);
        call_protocol(self, net);
        if (work >= weight)
            shi_store_relaxed(&sd->poll, 1);
        budget -= work;
        if (budget <= 0 || shi_now_ns() >= end) {
            shi_store_relaxed(&sd->time_squeeze, shi_load_relaxed(&sd->time_squeeze) + 1);
            break;
        }
    }
    if (shi_load_relaxed(&sd->poll))
        shi_raise_softirq_only(self, SHI_NET_RX_SOFTIRQ);
    shi_store_relaxed(&sd->in_net_rx_action, 0);
    if (shi_load_relaxed(&sd->rps_ipi_list))
        net_rps_action(self, rps, sd);
}

void shi_rps_register(void)
{
    if (trigger_number >= 0)
        return;
    trigger_number = shi_native_register("rps_trigger_softirq", rps_trigger_softirq);
    shi_open_softirq(SHI_NET_RX_SOFTIRQ, net_rx_action);
}

/* ---- figures ---------------------------------------------------------------------- */

void shi_rps_stats(const struct shi_machine *m, struct shi_rps *rps, uint32_t cpu,
                   struct shi_rps_stats *s)
{
    struct shi_softnet *sd = shi_softnet(m, rps, cpu);
    const struct shi_ptr_ring *r = ring_of(sd);
    uint64_t direct = shi_load_relaxed(&sd->direct);
    /* Acquires pair with the releases of who hands in and who delivers: no more are queued then. */
    s->in = (shi_load_acquire(&sd->bulk.word) >> 8) + direct;
    s->delivered = (shi_load_acquire(&sd->hand.done) >> 8) + direct;
    s->dropped = shi_load_relaxed(&sd->bulk.drops) + shi_load_relaxed(&sd->redropped);
    s->died = shi_load_relaxed(&sd->bulk.died) + shi_load_relaxed(&sd->hand.died);
    s->queued = shi_hand_queued(&sd->hand, r) + shi_bulk_count(&sd->bulk);
    s->ipis = shi_load_relaxed(&sd->ipis);
    s->received_rps = shi_load_relaxed(&sd->received_rps);
    s->time_squeeze = shi_load_relaxed(&sd->time_squeeze);
    s->requeued = shi_load_relaxed(&sd->requeued);
    s->flow_limited = shi_load_relaxed(&sd->limit.count);
    s->processed = shi_load_relaxed(&sd->processed);
}

int shi_rps_set_count(const struct shi_machine *m, struct shi_rps *rps, uint32_t cpu,
                      uint64_t count)
{
    if (cpu >= m->ncpus)
        return -EINVAL;
    struct shi_softnet *sd = shi_softnet(m, rps, cpu);
    struct shi_ptr_ring *r = ring_of(sd);
    if (shi_load_relaxed(&r->head) != shi_load_relaxed(&r->produced))
        return -EBUSY;
    shi_ring_zero(r, ring_room(rps->backlog));
    shi_store_relaxed(&r->head, count);
    shi_store_relaxed(&r->tail, count);
    shi_store_relaxed(&r->produced, count);
    shi_store_relaxed(&sd->spliced, count);
    shi_store_relaxed(&sd->input_queue_head, (uint32_t)count);
    return 0;
}

/* ---- CPUs that go ----------------------------------------------------------------- */

static uint32_t first_online(const struct shi_machine *m)
{
    uint32_t cpu;
    for (cpu = 0; cpu < m->ncpus && !online(m, cpu); cpu++)
        ;
    return cpu;
}

/* The first of old's backlog to that of CPU `to`: whoever is killed meanwhile, it is on one of
 * the two.  False: there is no room. */
static bool move(struct shi_self *self, struct shi_net *net, struct shi_rps *rps, uint32_t cpu,
                 uint32_t to, const shi_a32 *id, struct shi_rps_dev_flow *rflow)
{
    const struct shi_machine *m = self->m;
    struct shi_softnet *sd = shi_softnet(m, rps, to), *old = shi_softnet(m, rps, cpu);
    struct shi_ptr_ring *r = ring_of(sd), *from = ring_of(old);
    uint32_t room = ring_room(rps->backlog);
    bool took = false;
    shi_store_release(&old->move_to, to + 1);
    if (lock_backlog(self, net, rps, to) == 0) {
        if (qlen_of(sd, r) <= shi_load_relaxed(&rps->max_backlog)) {
            shi_store_relaxed(&sd->move_at, shi_load_relaxed(&r->produced));
            shi_store_relaxed(&sd->move_head, shi_load_relaxed(&from->head));
            shi_store_release(&sd->move_from, cpu + 1);
            SHI_STEP(self, requeue);
            took = shi_ring_produce(r, room, id, 1);
            SHI_STEP(self, requeue);
            if (took)
                shi_ring_take(from, room, 1);
            SHI_STEP(self, requeue);
            shi_store_release(&sd->move_from, 0);
        }
        if (took)
            shi_store_relaxed(&sd->napi, NAPI_STATE_SCHED);
        if (took && rflow)
            save_tail(rflow, to, (uint32_t)shi_load_relaxed(&r->produced));
        shi_ring_unlock(self, r);
    }
    shi_store_release(&old->move_to, 0);
    return took;
}

/* netif_rx of the first packet of a dead CPU's backlog, on behalf of CPU `here`. */
static void requeue(struct shi_self *self, struct shi_net *net, struct shi_rps *rps,
                    uint32_t cpu, uint32_t here, const shi_a32 *id)
{
    const struct shi_machine *m = self->m;
    struct shi_softnet *old = shi_softnet(m, rps, cpu);
    struct shi_ptr_ring *r = ring_of(old);
    const struct shi_packet *p = shi_packet(m, net, shi_load_relaxed(id));
    struct shi_rps_dev_flow *rflow;
    uint32_t left, room = ring_room(rps->backlog);
    if (!p) {
        shi_ring_take(r, room, 1);
        return;
    }
    struct shi_net_flow *flow = shi_net_flow(m, net, p->hash);
    if (flow) {
        /* What is on its way to where it was, and the next that is sent, may overtake it. */
        /* As late as it can be: any number that was sent by then. */
        excuse(flow, shi_load_acquire(&flow->sent) + 1);
        shi_store_relaxed(&flow->aimed, 0);
    }
    int to = get_rps_cpu(m, rps, p->hash, false, &rflow, &left);
    if (move(self, net, rps, cpu, to < 0 ? here : (uint32_t)to, id, rflow))
        shi_store_relaxed(&old->requeued, shi_load_relaxed(&old->requeued) + 1);
    else if (shi_hand_take(self, net, &old->hand, r, room, 1, &old->redropped) > 0)
        shi_hand_drop(m, net, &old->hand, &old->redropped);
}

/* Unless it is back, or another does this already. */
static void requeue_all(struct shi_self *self, struct shi_net *net, struct shi_rps *rps,
                        uint32_t cpu, uint32_t here)
{
    struct shi_softnet *old = shi_softnet(self->m, rps, cpu);
    struct shi_ptr_ring *r = ring_of(old);
    uint32_t room = ring_room(rps->backlog);
    shi_a32 id;
    if (own_backlog(self, net, rps, cpu))
        return;
    if (!online(self->m, cpu)) {
        shi_store_relaxed(&old->rps_ipi_list, 0);
        shi_store_relaxed(&old->poll, 0);
        shi_store_relaxed(&old->in_net_rx_action, 0);
        while (shi_ring_peek(r, room, &id, 1) == 1) {
            requeue(self, net, rps, cpu, here, &id);
            shi_store_release(&old->input_queue_head, (uint32_t)shi_load_relaxed(&r->head));
        }
        shi_ring_zero(r, room);
        if (lock_backlog(self, net, rps, cpu) == 0) {
            shi_store_relaxed(&old->spliced, shi_load_relaxed(&r->head));
            if (shi_load_relaxed(&r->head) == shi_load_relaxed(&r->produced))
                shi_store_relaxed(&old->napi, 0);
            shi_ring_unlock(self, r);
        }
    }
    shi_hand_unlock(self, &old->hand);
}

void shi_rps_cpu_dead(struct shi_self *self, uint32_t cpu, bool dead)
{
    const struct shi_machine *m = self->m;
    struct shi_rps *rps = shi_rps(m);
    struct shi_net *net = shi_net(m);
    uint32_t i, aim, here;
    if (!rps || !net || cpu >= m->ncpus)
        return;
    struct shi_softnet *old = shi_softnet(m, rps, cpu);
    if (dead) {
        /* Acquire pairs with the dead one's release, before its bulk had anything. */
        aim = shi_load_acquire(&old->aim) - 1;
        if (shi_bulk_count(&old->bulk) && aim < m->ncpus) {
            struct shi_ptr_ring *r = ring_of(shi_softnet(m, rps, aim));
            bool locked = lock_backlog(self, net, rps, aim) == 0;
            shi_bulk_bury(m, net, &old->bulk, r);
            if (locked)
                shi_ring_unlock(self, r);
        }
    }
    here = first_online(m);
    /* Also what was put on others' since they went, by who saw them online still, and what one
     * who did this left when it was killed. */
    for (i = 0; i < m->ncpus && here < m->ncpus; i++)
        if (!online(m, i))
            requeue_all(self, net, rps, i, here);
    /* What it had on its list, or was about to put there; and what was given to others now.
     * Who is told for nothing finds nothing. */
    for (i = 0; i < m->ncpus; i++)
        /* Acquire pairs with the unlock of who has set it: what is queued there. */
        if (online(m, i) && shi_load_acquire(&shi_softnet(m, rps, i)->napi) & NAPI_STATE_SCHED)
            send_ipi(self, i);
}

void shi_rps_online(struct shi_self *self)
{
    struct shi_rps *rps = shi_rps(self->m);
    if (!rps)
        return;
    struct shi_softnet *sd = shi_softnet(self->m, rps, self->id);
    struct shi_ptr_ring *r = ring_of(sd);
    shi_store_relaxed(&sd->in_net_rx_action, 0);
    /* Full: behind the swap that made it online.  Who queues looks for that afterwards. */
    if (shi_load_full(&r->produced) == shi_load_relaxed(&r->head) &&
        !shi_load_relaxed(&sd->napi) && !shi_load_relaxed(&sd->rps_ipi_list))
        return;
    shi_store_relaxed(&sd->poll, 1);
    shi_raise_softirq(self, SHI_NET_RX_SOFTIRQ);
}
