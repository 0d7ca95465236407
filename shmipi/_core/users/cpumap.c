/* SPDX-License-Identifier: MIT */
#include "base/sys.h"

#include <errno.h>
#include <stdio.h>

#include "base/rules.h"
#include "base/step.h"
#include "smp/entry.h"
#include "smp/softirq.h"
#include "users/cpumap.h"

#define POLL_BUDGET 64u /* NAPI_POLL_WEIGHT: packets between two flushes of a driver */

/* ---- where things are ------------------------------------------------------------- */

static uint64_t up(uint64_t n)
{
    return (n + SHI_PAIR - 1) / SHI_PAIR * SHI_PAIR;
}

static uint64_t list_at(uint32_t max_entries)
{
    return up(sizeof(struct shi_cpumap) + (uint64_t)max_entries * sizeof(uint64_t));
}

/* Of each key one that is used, one that ends, and some more. */
static uint32_t list_room(uint32_t max_entries)
{
    return 2 * max_entries + 64;
}

static uint64_t flush_at(uint32_t max_entries)
{
    return up(list_at(max_entries) + (uint64_t)list_room(max_entries) * sizeof(uint64_t));
}

uint64_t shi_cpumap_bytes(const struct shi_machine *m, uint32_t max_entries)
{
    return flush_at(max_entries) + (uint64_t)m->ncpus * sizeof(struct shi_cpumap_flush);
}

static uint64_t ring_at(const struct shi_machine *m)
{
    return sizeof(struct shi_cpumap_entry) + (uint64_t)m->ncpus * sizeof(struct shi_bulk);
}

uint64_t shi_cpumap_entry_bytes(const struct shi_machine *m, uint32_t qsize)
{
    return ring_at(m) + shi_ring_bytes(qsize);
}

static void *inside(const struct shi_machine *m, uint64_t at, uint64_t bytes)
{
    uint64_t end = shi_array_end(m);
    if (at < m->array_offset || at > end || bytes > end - at || at % SHI_LINE)
        return NULL;
    return m->base + at;
}

static uint64_t where(const struct shi_machine *m, const void *p)
{
    return (uint64_t)((const uint8_t *)p - m->base);
}

struct shi_cpumap *shi_cpumap(const struct shi_machine *m, uint64_t at)
{
    struct shi_cpumap *map = inside(m, at, sizeof *map);
    if (!map || !map->max_entries || map->max_entries > m->ncpus)
        return NULL;
    return inside(m, at, shi_cpumap_bytes(m, map->max_entries));
}

static shi_a64 *list(struct shi_cpumap *map)
{
    return (shi_a64 *)((uint8_t *)map + list_at(map->max_entries));
}

static struct shi_cpumap_flush *flush_list(struct shi_cpumap *map, uint32_t cpu)
{
    return (struct shi_cpumap_flush *)((uint8_t *)map + flush_at(map->max_entries)) + cpu;
}

static uint32_t nentries(const struct shi_cpumap *map)
{
    /* Acquire pairs with the count's addition in shi_cpumap_add. */
    uint32_t n = shi_load_acquire(&map->nentries), room = list_room(map->max_entries);
    return n < room ? n : room;
}

static struct shi_ptr_ring *ring(const struct shi_machine *m, const struct shi_cpumap_entry *e)
{
    return (struct shi_ptr_ring *)((uint8_t *)(uintptr_t)e + ring_at(m));
}

/* Of which the entry's memory was made: checked against the arrays' end each time. */
static uint32_t capacity(const struct shi_ptr_ring *r)
{
    return shi_load_relaxed(&r->capacity);
}

struct shi_cpumap_entry *shi_cpumap_entry(const struct shi_machine *m, uint64_t at)
{
    struct shi_cpumap_entry *e = inside(m, at, shi_cpumap_entry_bytes(m, 1));
    if (!e)
        return NULL;
    uint32_t room = capacity(ring(m, e));
    if (!room || room > SHI_CPUMAP_QSIZE)
        return NULL;
    return inside(m, at, shi_cpumap_entry_bytes(m, room));
}

static bool online(const struct shi_machine *m, uint32_t cpu)
{
    /* Acquire pairs with the swap that made it online, or not any more. */
    return cpu < m->ncpus && shi_word_online(shi_load_acquire(&shi_slot(m, cpu)->word));
}

/* ---- making ----------------------------------------------------------------------- */

int shi_cpumap_init(const struct shi_machine *m, uint64_t at, uint32_t max_entries)
{
    struct shi_cpumaps *maps = shi_user(m, SHI_USER_cpumap, sizeof *maps);
    if (!max_entries || !maps)
        return -EINVAL;
    if (max_entries > m->ncpus)
        return -E2BIG;
    struct shi_cpumap *map = inside(m, at, shi_cpumap_bytes(m, max_entries));
    if (!map)
        return -EINVAL;
    if (map->max_entries) /* made before */
        return map->max_entries == max_entries ? 0 : -EINVAL;
    uint32_t n = shi_load_relaxed(&maps->n);
    if (n >= SHI_CPUMAPS)
        return -EMFILE;
    map->max_entries = max_entries;
    map->number = n;
    /* Release: who finds the map finds it made. */
    shi_store_release(&maps->map[n], at);
    shi_store_release(&maps->n, n + 1);
    return 0;
}

int shi_cpumap_check(const struct shi_machine *m, const struct shi_cpumap *map, uint64_t key,
                     uint64_t qsize, uint64_t flags)
{
    if (flags > SHI_BPF_EXIST)
        return -EINVAL;
    if (key >= map->max_entries)
        return -E2BIG;
    if (flags == SHI_BPF_NOEXIST)
        return -EEXIST; /* an array's entries all exist */
    if (qsize > SHI_CPUMAP_QSIZE)
        return -EOVERFLOW;
    return key >= m->ncpus ? -ENODEV : 0;
}

int shi_cpumap_add(struct shi_self *self, struct shi_cpumap *map, uint64_t at, uint32_t qsize)
{
    const struct shi_machine *m = self->m;
    struct shi_cpumap_entry *e = inside(m, at, shi_cpumap_entry_bytes(m, qsize));
    uint32_t n;
    if (!e || !qsize || qsize > SHI_CPUMAP_QSIZE)
        return -EINVAL;
    uint64_t none = 0;
    /* Of two who make it, one adds it. */
    if (!shi_cas_full(&e->map, &none, where(m, map)))
        return -EALREADY;
    n = shi_fetch_add_full(&map->nentries, 1);
    if (n >= list_room(map->max_entries)) {
        shi_fetch_sub_full(&map->nentries, 1);
        return -ENOSPC;
    }
    shi_store_relaxed(&ring(m, e)->capacity, qsize);
    shi_store_relaxed(&e->index, n);
    shi_store_release(&list(map)[n], at); /* 0 until now: passed over */
    return 0;
}

int64_t shi_cpumap_claim(struct shi_self *self, struct shi_cpumap *map, uint32_t qsize)
{
    uint32_t i, n = nentries(map);
    for (i = 0; i < n; i++) {
        /* Acquire pairs with shi_cpumap_add's release: the entry's memory. */
        uint64_t at = shi_load_acquire(&list(map)[i]);
        struct shi_cpumap_entry *e = shi_cpumap_entry(self->m, at);
        uint32_t state = SHI_CM_FREE;
        if (e && capacity(ring(self->m, e)) >= qsize &&
            shi_cas_full(&e->state, &state, SHI_CM_SETUP))
            return (int64_t)at;
    }
    return -ENOENT;
}

/* ---- the thread of an entry ------------------------------------------------------- */

static int stepper = -1, prog_stepper = -1;

/* kthread_create_on_node, kthread_bind and the first wake-up. */
static int start(struct shi_self *self, struct shi_cpumap_entry *e)
{
    const struct shi_cpumap *map = shi_cpumap(self->m, shi_load_relaxed(&e->map));
    uint32_t cpu = shi_load_relaxed(&e->cpu);
    char comm[SHI_COMM];
    snprintf(comm, sizeof comm, "cpumap/%u/map:%u", cpu, map ? map->number : 0);
    int step = shi_load_relaxed(&e->prog) ? prog_stepper : stepper;
    int64_t task =
        shi_kthread_create(self, comm, step, where(self->m, e), (int)cpu, SHI_PF_REAP);
    if (task < 0)
        return (int)task;
    shi_store_release(&e->kthread, (uint64_t)task);
    shi_wake_up_process(self, (uint64_t)task);
    return 0;
}

static void wake(struct shi_self *self, const struct shi_cpumap_entry *e)
{
    /* Acquire pairs with start's release: the task is there. */
    uint64_t task = shi_load_acquire(&e->kthread);
    if (task)
        shi_wake_up_process(self, task);
}

int shi_cpumap_setup(struct shi_self *self, uint64_t at, uint32_t cpu, uint32_t qsize,
                     bool prog)
{
    static shi_a32 programs;
    struct shi_cpumap_entry *e = shi_cpumap_entry(self->m, at);
    if (!e || shi_load_relaxed(&e->state) != SHI_CM_SETUP || !qsize ||
        qsize > capacity(ring(self->m, e)))
        return -EINVAL;
    struct shi_ptr_ring *r = ring(self->m, e);
    uint32_t i;
    for (i = 0; i < capacity(r); i++)
        shi_store_relaxed(&r->queue[i], 0);
    shi_store_relaxed(&r->produced, 0);
    shi_store_relaxed(&r->head, 0);
    shi_store_relaxed(&r->tail, 0);
    shi_store_relaxed(&r->lock, 0);
    shi_store_relaxed(&r->size, qsize);
    shi_store_relaxed(&e->cpu, cpu);
    shi_store_relaxed(&e->qsize, qsize);
    shi_store_relaxed(&e->kthread, 0);
    /* Another number than the last one's of this memory: CPUs keep what they have loaded. */
    uint32_t number = shi_fetch_add_relaxed(&programs, 1) << 13 | (self->id & 0xfff) << 1 | 1;
    shi_store_relaxed(&e->prog, prog ? number : 0);
    shi_store_release(&e->state, SHI_CM_LIVE);
    return start(self, e);
}

/* Does no CPU have packets for it in a bulk, nor will any?  It is off the map. */
static bool graced(struct shi_self *self, const struct shi_cpumap_entry *e)
{
    uint32_t cpu;
    for (cpu = 0; cpu < self->m->ncpus; cpu++)
        /* Full: pairs with the exchange in bulk_of.  Either that sees the entry off the map,
         * or this sees its bulk. */
        if (shi_load_full(&e->bulk[cpu].active))
            return false;
    return true;
}

/* All that is in its ring is dropped: there is no CPU to deliver it on. */
static void purge(struct shi_self *self, struct shi_net *net, struct shi_cpumap_entry *e)
{
    struct shi_ptr_ring *r = ring(self->m, e);
    while (shi_hand_take(self, net, &e->hand, r, capacity(r), SHI_NET_BULK, &e->purged) > 0) {
        SHI_STEP(self, purge);
        shi_hand_drop(self->m, net, &e->hand, &e->purged);
        SHI_STEP(self, purge);
    }
    shi_ring_zero(r, capacity(r));
}

/* The one consumer of its ring, here: see shi_hand_lock. */
static int lock_hand(struct shi_self *self, struct shi_net *net, struct shi_cpumap_entry *e)
{
    struct shi_ptr_ring *r = ring(self->m, e);
    return shi_hand_lock(self, net, &e->hand, r, capacity(r), &e->purged);
}

static void release(struct shi_cpumap_entry *e)
{
    shi_store_relaxed(&e->kthread, 0);
    shi_store_release(&e->state, SHI_CM_FREE);
}

/*
 * cpu_map_bpf_prog_run, of the one packet in hand: with interrupts on and softirqs off.  Its
 * verdict is the packet's end: passed on, it is this CPU's; redirected, it has gone into another
 * bulk, as another packet; and all else is a drop.  Who dies in the program had it in hand.
 */
static enum shi_ran run_program(struct shi_self *self, struct shi_net *net,
                                struct shi_cpumap_entry *e)
{
    struct shi_hand *h = &e->hand;
    uint32_t id = shi_load_relaxed(&h->id[0]), verdict = SHI_XDP_ABORTED;
    const struct shi_packet *p = shi_packet(self->m, net, id);
    if (p && self->hooks.xdp) {
        uint32_t hash = p->hash;
        uint64_t data = p->data;
        shi_local_bh_disable(self);
        shi_leave(self);
        verdict = self->hooks.xdp(self, where(self->m, e), hash, data);
        shi_local_bh_enable(self, self->step_python);
        shi_enter(self);
    }
    if (verdict >= SHI_NXDP)
        verdict = SHI_XDP_ABORTED;
    shi_store_relaxed(&e->xdp[verdict], shi_load_relaxed(&e->xdp[verdict]) + 1);
    if (verdict == SHI_XDP_PASS)
        shi_net_receive(self, net, id);
    if (verdict == SHI_XDP_PASS || verdict == SHI_XDP_REDIRECT) {
        shi_hand_done(self->m, net, h);
    } else {
        shi_hand_turn(h, &e->purged);
        shi_hand_drop(self->m, net, h, &e->purged);
    }
    return SHI_RAN_RUNNING;
}

/* One batch, by the ring's consumer: SHI_RAN_RUNNING, or how the step ends. */
static enum shi_ran batch(struct shi_self *self, uint64_t task, struct shi_net *net,
                          struct shi_cpumap_entry *e)
{
    struct shi_ptr_ring *r = ring(self->m, e);
    /* Acquire pairs with the release of who has made it LIVE, or the store of STOP. */
    uint32_t room = capacity(r), state = shi_load_acquire(&e->state);
    int n, k;
    bool stop = state == SHI_CM_STOP;
    if (!stop && state != SHI_CM_LIVE)
        return SHI_RAN_EXIT; /* emptied in its place while its CPU was gone */
    if (stop && (shi_rule_off(self->m, SHI_RULE_cpumap_drain) ||
                 (graced(self, e) && shi_ring_empty(r, room)))) {
        release(e);
        return SHI_RAN_EXIT;
    }
    if (shi_ring_empty(r, room)) {
        if (shi_rule_off(self->m, SHI_RULE_cpumap_recheck)) {
            for (k = 0; k < 256; k++) /* what else one might do between the two */
                shi_cpu_relax();
            shi_set_current_state(self, task, SHI_TASK_INTERRUPTIBLE);
            return SHI_RAN_SLEEP;
        }
        /* Not in this order: looked, empty; filled, and woken, which is nothing as it runs;
         * asleep, and nobody wakes it. */
        shi_set_current_state(self, task, SHI_TASK_INTERRUPTIBLE);
        /* Acquire pairs with the store of STOP: it is off the map. */
        if (shi_ring_empty(r, room) && shi_load_acquire(&e->state) == SHI_CM_LIVE) {
            shi_store_relaxed(&e->sleeps, shi_load_relaxed(&e->sleeps) + 1);
            return SHI_RAN_SLEEP;
        }
        if (stop && shi_ring_empty(r, room) && !graced(self, e))
            return SHI_RAN_SLEEP; /* a CPU has packets for it: its flush wakes */
        shi_set_current_state(self, task, SHI_TASK_RUNNING);
    }
    bool prog = shi_load_relaxed(&e->prog) != 0;
    n = shi_hand_take(self, net, &e->hand, r, room, prog ? 1 : SHI_NET_BULK, NULL);
    if (prog && n > 0)
        return run_program(self, net, e);
    for (k = 0; k < n; k++)
        shi_net_receive(self, net, shi_load_relaxed(&e->hand.id[k]));
    if (n > 0)
        shi_hand_done(self->m, net, &e->hand);
    return SHI_RAN_RUNNING;
}

static void flush_maps(struct shi_self *self, struct shi_net *net);

#define BATCHES 16u /* of a step: interrupts that only look at the word wait for its end */

/* cpu_map_kthread_run, some times round its loop. */
static enum shi_ran thread_step(struct shi_self *self, uint64_t task, uint64_t at)
{
    struct shi_net *net = shi_net(self->m);
    struct shi_cpumap_entry *e = shi_cpumap_entry(self->m, at);
    enum shi_ran ran = SHI_RAN_RUNNING;
    uint32_t i;
    if (!net || !e || shi_load_relaxed(&e->kthread) != task)
        return SHI_RAN_EXIT;
    uint64_t redirected = shi_load_relaxed(&e->xdp[SHI_XDP_REDIRECT]);
    for (i = 0; i < BATCHES && ran == SHI_RAN_RUNNING; i++) {
        if (shi_word_work(shi_load_relaxed(&self->slot->word)))
            break; /* cond_resched() */
        shi_enter(self);
        if (__builtin_expect(lock_hand(self, net, e) == 0, 1)) {
            ran = batch(self, task, net, e);
            shi_hand_unlock(self, &e->hand);
        } else {
            i = BATCHES; /* who took this CPU for gone will see the entry's end */
        }
        shi_leave(self);
    }
    if (shi_load_relaxed(&e->prog) && shi_load_relaxed(&e->xdp[SHI_XDP_REDIRECT]) != redirected)
        flush_maps(self, net); /* xdp_do_flush() */
    shi_store_relaxed(&e->runs, shi_load_relaxed(&e->runs) + 1);
    return ran;
}

static bool always(const struct shi_self *self)
{
    return self->hooks.xdp != NULL;
}

void shi_cpumap_register(void)
{
    if (stepper < 0)
        stepper = shi_stepper_register("cpumap", thread_step);
    if (prog_stepper < 0)
        prog_stepper = shi_stepper_register_mixed("cpumap_prog", thread_step, always);
}

/* ---- taking off the map ----------------------------------------------------------- */

uint64_t shi_cpumap_replace(struct shi_self *self, struct shi_cpumap *map, uint32_t key,
                            uint64_t at)
{
    /* Full: pairs with bulk_of, see graced(). */
    uint64_t old = shi_xchg_full(&map->entry[key], at);
    struct shi_cpumap_entry *e = old ? shi_cpumap_entry(self->m, old) : NULL;
    if (!e)
        return 0;
    shi_store_full(&e->state, SHI_CM_STOP);
    wake(self, e); /* kthread_stop() */
    return old;
}

/* Empty a ring in the place of a CPU that is gone.  It may come back meanwhile, or another may do
 * this too: one of them is the consumer. */
static void end_entry(struct shi_self *self, struct shi_net *net, struct shi_cpumap_entry *e)
{
    shi_enter(self);
    if (lock_hand(self, net, e) == 0) {
        /* Acquire pairs with the store of STOP: it is off the map. */
        if (shi_load_acquire(&e->state) == SHI_CM_STOP &&
            !online(self->m, shi_load_relaxed(&e->cpu)) && graced(self, e)) {
            purge(self, net, e);
            release(e);
        }
        shi_hand_unlock(self, &e->hand);
    }
    shi_leave(self);
}

void shi_cpumap_collect(struct shi_self *self, struct shi_net *net, struct shi_cpumap *map)
{
    uint32_t i, n = nentries(map);
    for (i = 0; i < n; i++) {
        /* Acquires pair with shi_cpumap_add's release, and with the store of STOP. */
        struct shi_cpumap_entry *e = shi_cpumap_entry(self->m, shi_load_acquire(&list(map)[i]));
        if (!e || shi_load_acquire(&e->state) != SHI_CM_STOP)
            continue;
        if (online(self->m, shi_load_relaxed(&e->cpu)))
            wake(self, e); /* its bulks may have been flushed since */
        else
            end_entry(self, net, e);
    }
}

/* ---- handing in ------------------------------------------------------------------- */

/* The bulk of this CPU for `key`, on its flush list: NULL, no entry. */
static struct shi_bulk *bulk_of(struct shi_self *self, struct shi_cpumap *map, uint32_t key,
                                struct shi_cpumap_entry **entry)
{
    /* Acquire pairs with shi_cpumap_replace's swap: the entry is set up. */
    uint64_t at = shi_load_acquire(&map->entry[key]);
    for (;;) {
        struct shi_cpumap_entry *e = at ? shi_cpumap_entry(self->m, at) : NULL;
        if (!e)
            return NULL;
        struct shi_bulk *b = &e->bulk[self->id];
        *entry = e;
        if (shi_load_relaxed(&b->active))
            return b;
        /* Full: from here on who takes the entry off the map waits for the flush, or it is off
         * already and the look below sees it. */
        shi_xchg_full(&b->active, 1);
        uint64_t now = shi_load_full(&map->entry[key]);
        if (now == at) {
            struct shi_cpumap_flush *f = flush_list(map, self->id);
            uint32_t n = shi_load_relaxed(&f->n);
            f->entry[n < SHI_CPUMAP_FLUSH ? n : 0] = (uint16_t)shi_load_relaxed(&e->index);
            shi_store_relaxed(&f->n, n + 1);
            return b;
        }
        shi_store_release(&b->active, 0);
        at = now;
    }
}

/* bq_flush_to_queue. */
static void flush_bulk(struct shi_self *self, struct shi_net *net, struct shi_cpumap_entry *e,
                       struct shi_bulk *b)
{
    struct shi_ptr_ring *r = ring(self->m, e);
    if (!shi_bulk_count(b))
        return;
    if (shi_rule_off(self->m, SHI_RULE_cpumap_producer_lock)) {
        shi_bulk_produce(self, net, b, r, capacity(r));
        return;
    }
    int dead = shi_ring_lock(self, r);
    if (dead < 0) {
        shi_bulk_drop(self, net, b); /* who has the lock is stopped: as if the ring were full */
        return;
    }
    if (dead) {
        shi_ring_repair(r, capacity(r));
        if ((uint32_t)dead <= self->m->ncpus && (uint32_t)dead - 1 != self->id)
            shi_bulk_bury(self->m, net, &e->bulk[dead - 1], r);
    }
    shi_bulk_produce(self, net, b, r, capacity(r));
    shi_ring_unlock(self, r);
}

/* bq_enqueue.  Between shi_enter and shi_leave. */
static int enqueue(struct shi_self *self, struct shi_net *net, struct shi_cpumap *map,
                   uint32_t key, uint32_t hash, uint64_t data, bool counted)
{
    struct shi_cpumap_entry *e;
    struct shi_bulk *b = key < map->max_entries ? bulk_of(self, map, key, &e) : NULL;
    if (!b)
        return -ENOENT;
    int64_t id = shi_packet_alloc(self, net, hash, data);
    if (id < 0)
        return (int)id;
    if (counted) {
        struct shi_net_flow *flow = shi_net_flow(self->m, net, hash);
        if (flow) {
            data = shi_load_relaxed(&flow->sent) + 1;
            shi_store_relaxed(&flow->sent, data);
            shi_packet(self->m, net, (uint32_t)id)->data = data;
        }
    }
    if (shi_bulk_count(b) == SHI_NET_BULK)
        flush_bulk(self, net, e, b);
    shi_bulk_add(self->m, net, b, (uint32_t)id);
    return 0;
}

/* __cpu_map_flush.  Between shi_enter and shi_leave. */
static int flush_all(struct shi_self *self, struct shi_net *net, struct shi_cpumap *map)
{
    struct shi_cpumap_flush *f = flush_list(map, self->id);
    uint32_t n = shi_load_relaxed(&f->n), i;
    int told = 0;
    if (n > SHI_CPUMAP_FLUSH)
        n = SHI_CPUMAP_FLUSH;
    for (i = 0; i < n; i++) {
        uint32_t index = f->entry[i];
        struct shi_cpumap_entry *e =
            index < nentries(map)
                ? shi_cpumap_entry(self->m, shi_load_acquire(&list(map)[index]))
                : NULL;
        if (!e)
            continue;
        struct shi_bulk *b = &e->bulk[self->id];
        flush_bulk(self, net, e, b);
        /* Release: the grace period may end; what was flushed is in the ring. */
        shi_store_release(&b->active, 0);
        shi_store_relaxed(&b->wakes, shi_load_relaxed(&b->wakes) + 1);
        wake(self, e);
        told++;
    }
    shi_store_relaxed(&f->n, 0);
    return told;
}

static bool list_is_full(const struct shi_self *self, struct shi_cpumap *map)
{
    return shi_load_relaxed(&flush_list(map, self->id)->n) >= SHI_CPUMAP_FLUSH;
}

int64_t shi_cpumap_enqueue(struct shi_self *self, struct shi_net *net, struct shi_cpumap *map,
                           uint32_t key, uint32_t hash, uint64_t data)
{
    shi_enter(self);
    if (list_is_full(self, map))
        flush_all(self, net, map);
    int err = enqueue(self, net, map, key, hash, data, false);
    shi_leave(self);
    return err;
}

int shi_cpumap_flush(struct shi_self *self, struct shi_net *net, struct shi_cpumap *map)
{
    shi_enter(self);
    int told = flush_all(self, net, map);
    shi_leave(self);
    return told;
}

int64_t shi_cpumap_generate(struct shi_self *self, struct shi_net *net, struct shi_cpumap *map,
                            uint32_t key, uint32_t hash, uint64_t n)
{
    uint64_t i = 0, k;
    int err = 0;
    while (i < n && !err) {
        shi_enter(self);
        for (k = 0; k < POLL_BUDGET && i < n && !err; k++)
            if (!(err = enqueue(self, net, map, key, hash, 0, true)))
                i++;
        flush_all(self, net, map);
        shi_leave(self);
    }
    return err && err != -ENOBUFS && !i ? err : (int64_t)i;
}

/* ---- figures ---------------------------------------------------------------------- */

/* What the program has redirected, into whichever map. */
static void flush_maps(struct shi_self *self, struct shi_net *net)
{
    const struct shi_machine *m = self->m;
    struct shi_cpumaps *maps = shi_user(m, SHI_USER_cpumap, sizeof *maps);
    uint32_t i, n = maps ? shi_load_acquire(&maps->n) : 0;
    for (i = 0; i < n && i < SHI_CPUMAPS; i++) {
        /* Acquires, of the count too, pair with shi_cpumap_init's releases: the map is made. */
        struct shi_cpumap *map = shi_cpumap(m, shi_load_acquire(&maps->map[i]));
        if (map && shi_load_relaxed(&flush_list(map, self->id)->n))
            shi_cpumap_flush(self, net, map);
    }
}

void shi_cpumap_stats(const struct shi_machine *m, struct shi_cpumap *map,
                      struct shi_cpumap_stats *s)
{
    uint32_t i, cpu, n = nentries(map);
    *s = (struct shi_cpumap_stats){ .entries = 0 };
    for (i = 0; i < n; i++) {
        /* Acquire pairs with shi_cpumap_add's release: the entry's memory. */
        struct shi_cpumap_entry *e = shi_cpumap_entry(m, shi_load_acquire(&list(map)[i]));
        if (!e)
            continue;
        const struct shi_ptr_ring *r = ring(m, e);
        uint32_t state = shi_load_acquire(&e->state);
        s->entries += state == SHI_CM_LIVE || state == SHI_CM_STOP;
        /* Acquires pair with the releases of who hands in and who delivers: none is counted twice. */
        s->delivered += shi_load_acquire(&e->hand.done) >> 8;
        s->died += shi_load_relaxed(&e->hand.died);
        s->dropped += shi_load_relaxed(&e->purged);
        s->runs += shi_load_relaxed(&e->runs);
        s->sleeps += shi_load_relaxed(&e->sleeps);
        for (cpu = 0; cpu < SHI_NXDP; cpu++)
            s->xdp[cpu] += shi_load_relaxed(&e->xdp[cpu]);
        if (state != SHI_CM_FREE)
            s->queued += shi_hand_queued(&e->hand, r);
        for (cpu = 0; cpu < m->ncpus; cpu++) {
            const struct shi_bulk *b = &e->bulk[cpu];
            s->in += shi_load_acquire(&b->word) >> 8;
            s->queued += shi_bulk_count(b);
            s->dropped += shi_load_relaxed(&b->drops);
            s->died += shi_load_relaxed(&b->died);
            s->flushes += shi_load_relaxed(&b->flushes);
            s->wakes += shi_load_relaxed(&b->wakes);
        }
    }
}

/* ---- deaths ----------------------------------------------------------------------- */

static void bury(struct shi_self *self, struct shi_net *net, struct shi_cpumap_entry *e,
                 uint32_t cpu)
{
    struct shi_ptr_ring *r = ring(self->m, e);
    struct shi_bulk *b = &e->bulk[cpu];
    /* Acquire pairs with the dead one's stores, who may have died in them. */
    uint64_t held = shi_load_acquire(&r->lock), owner = shi_load_acquire(&e->hand.owner);
    if (shi_bulk_count(b) || shi_load_relaxed(&b->active) ||
        (held && shi_holder_slot(held) == cpu)) {
        /* With the lock, if it can be had: it may be the dead one's.  A producer that holds it
         * and is stopped has done this already, if it took it from the dead. */
        int got = shi_ring_lock(self, r);
        if (got > 0)
            shi_ring_repair(r, capacity(r));
        shi_bulk_bury(self->m, net, b, r);
        if (got >= 0)
            shi_ring_unlock(self, r);
    }
    if (owner && shi_holder_slot(owner) == cpu && lock_hand(self, net, e) == 0)
        shi_hand_unlock(self, &e->hand);
}

static void each_map(struct shi_self *self, uint32_t cpu,
                     void (*visit)(struct shi_self *, struct shi_net *, struct shi_cpumap *,
                                   struct shi_cpumap_entry *, uint32_t))
{
    const struct shi_machine *m = self->m;
    struct shi_cpumaps *maps = shi_user(m, SHI_USER_cpumap, sizeof *maps);
    struct shi_net *net = shi_net(m);
    uint32_t i, k, n = maps ? shi_load_acquire(&maps->n) : 0;
    for (i = 0; net && i < n && i < SHI_CPUMAPS; i++) {
        /* Acquires, of the count too, pair with shi_cpumap_init's releases: the map is made. */
        struct shi_cpumap *map = shi_cpumap(m, shi_load_acquire(&maps->map[i]));
        for (k = 0; map && k < nentries(map); k++) {
            /* Acquire pairs with shi_cpumap_add's release: the entry's memory. */
            struct shi_cpumap_entry *e = shi_cpumap_entry(m, shi_load_acquire(&list(map)[k]));
            if (e)
                visit(self, net, map, e, cpu);
        }
    }
}

static void bury_one(struct shi_self *self, struct shi_net *net, struct shi_cpumap *map,
                     struct shi_cpumap_entry *e, uint32_t cpu)
{
    shi_store_relaxed(&flush_list(map, cpu)->n, 0);
    bury(self, net, e, cpu);
    /* Acquire pairs with the store of STOP: it is off the map. */
    if (shi_load_acquire(&e->state) != SHI_CM_STOP)
        return;
    if (shi_load_relaxed(&e->cpu) == cpu)
        end_entry(self, net, e);
    else
        wake(self, e); /* the dead one's bulk was what it waited for */
}

void shi_cpumap_died(struct shi_self *self, uint32_t cpu)
{
    each_map(self, cpu, bury_one);
}

static void restart_one(struct shi_self *self, struct shi_net *net, struct shi_cpumap *map,
                        struct shi_cpumap_entry *e, uint32_t cpu)
{
    /* Acquire pairs with shi_cpumap_setup's release: the entry is set up. */
    uint32_t state = shi_load_acquire(&e->state);
    (void)net;
    (void)map;
    if (shi_load_relaxed(&e->cpu) == cpu && (state == SHI_CM_LIVE || state == SHI_CM_STOP))
        start(self, e);
}

void shi_cpumap_online(struct shi_self *self)
{
    each_map(self, self->id, restart_one);
}
