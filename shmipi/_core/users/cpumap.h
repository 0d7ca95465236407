/* SPDX-License-Identifier: MIT */
/*
 * kernel/bpf/cpumap.c: packets redirected to other CPUs, in bulks of 8, through a bounded ring
 * each, which a kernel thread of that CPU empties.
 *
 * An entry is memory of its own.  What updates and deletes take off the map is told to stop,
 * and is free again when its thread has emptied the ring and no CPU has packets for it in a
 * bulk: the grace period and the kthread_stop of __cpu_map_entry_free in one.
 */
#ifndef SHI_CPUMAP_H
#define SHI_CPUMAP_H

#include "smp/sched.h"
#include "users/net.h"

#define SHI_CPUMAPS 16u         /* maps of a machine */
#define SHI_CPUMAP_QSIZE 16384u /* the kernel's sanity limit */
#define SHI_CPUMAP_FLUSH 60u    /* entries a CPU may have packets for, before it flushes */

/* The kernel's flags of an update. */
enum { SHI_BPF_ANY = 0, SHI_BPF_NOEXIST = 1, SHI_BPF_EXIST = 2 };

/* enum xdp_action */
enum shi_xdp {
    SHI_XDP_ABORTED = 0,
    SHI_XDP_DROP = 1,
    SHI_XDP_PASS = 2,
    SHI_XDP_TX = 3, /* not here */
    SHI_XDP_REDIRECT = 4,
    SHI_NXDP
};

enum shi_cpumap_state {
    SHI_CM_FREE = 0,
    SHI_CM_SETUP = 1,
    SHI_CM_LIVE = 2,
    SHI_CM_STOP = 3, /* off the map: kthread_should_stop() */
};

struct shi_cpumap_entry {
    _Alignas(SHI_PAIR) shi_a32 state; /* enum shi_cpumap_state */
    shi_a32 cpu, qsize;
    shi_a32 index;         /* in the map's list */
    shi_a64 kthread;       /* its task, 0: none */
    shi_a64 purged;        /* dropped with it, because its CPU was not online */
    shi_a64 map;           /* offset of its map */
    shi_a64 ring;          /* offset of its ring */
    shi_a64 runs, sleeps;  /* of the thread */
    shi_a32 prog;          /* which one, Python's, its thread runs on each packet; 0: none */
    shi_a64 xdp[SHI_NXDP]; /* what that has said; of one that a death cut off perhaps nothing */
    struct shi_hand hand;
    struct shi_bulk bulk[]; /* by CPU; then the ring */
};

/* The entries for which a CPU has packets in bulks (cpu_map_flush_list). */
struct shi_cpumap_flush {
    _Alignas(SHI_PAIR) shi_a32 n;
    uint16_t entry[SHI_CPUMAP_FLUSH];
};

struct shi_cpumap {
    uint32_t max_entries, room; /* room: of the list of entries */
    uint32_t number;            /* among the machine's maps: map_id */
    shi_a32 nentries;
    shi_a64 lock;                       /* of updates (shi_lock_try) */
    _Alignas(SHI_PAIR) shi_a64 entry[]; /* by key: offset of the entry, 0: none */
    /* then the list of all entries that were ever made; then flush lists, by CPU */
};

/* The state of SHI_USER_cpumap. */
struct shi_cpumaps {
    shi_a32 n;
    shi_a64 map[SHI_CPUMAPS];
};

uint64_t shi_cpumap_bytes(const struct shi_machine *m, uint32_t max_entries);
uint64_t shi_cpumap_entry_bytes(const struct shi_machine *m, uint32_t qsize);
/* Make what lies at `at` a map (cpu_map_alloc): 0, -EINVAL, -E2BIG, -EMFILE. */
int shi_cpumap_init(const struct shi_machine *m, uint64_t at, uint32_t max_entries);
/* NULL: nothing that could be one is there. */
struct shi_cpumap *shi_cpumap(const struct shi_machine *m, uint64_t at);
struct shi_cpumap_entry *shi_cpumap_entry(const struct shi_machine *m, uint64_t at);

/* What cpu_map_update_elem refuses: 0 or -errno. */
int shi_cpumap_check(const struct shi_machine *m, const struct shi_cpumap *map, uint64_t key,
                     uint64_t qsize, uint64_t flags);
/* A free entry with room for qsize, now SETUP: its offset, or -ENOENT: add one. */
int64_t shi_cpumap_claim(struct shi_self *self, struct shi_cpumap *map, uint32_t qsize);
/* Memory for one more: its offset is in the list from now on, FREE.  0, -EALREADY:
 * it is, -ENOSPC. */
int shi_cpumap_add(struct shi_self *self, struct shi_cpumap *map, uint64_t at, uint32_t qsize);
/* __cpu_map_entry_alloc of claimed memory.  `prog`: with a program; else without. */
int shi_cpumap_setup(struct shi_self *self, uint64_t at, uint32_t cpu, uint32_t qsize,
                     bool prog);
/* __cpu_map_entry_replace: `at` 0: delete.  The entry that was there, or 0. */
uint64_t shi_cpumap_replace(struct shi_self *self, struct shi_cpumap *map, uint32_t key,
                            uint64_t at);

/* cpu_map_enqueue of a packet of this CPU: 0, -ENOENT (no entry), -ENOBUFS. */
int64_t shi_cpumap_enqueue(struct shi_self *self, struct shi_net *net, struct shi_cpumap *map,
                           uint32_t key, uint32_t hash, uint64_t data);
/* __cpu_map_flush, at the end of a poll: how many threads were told. */
int shi_cpumap_flush(struct shi_self *self, struct shi_net *net, struct shi_cpumap *map);
/* A driver that polls: `n` packets of one flow of the check, a flush after each 64.  How many
 * were handed in: fewer where there was no entry, or no packet was free. */
int64_t shi_cpumap_generate(struct shi_self *self, struct shi_net *net, struct shi_cpumap *map,
                            uint32_t key, uint32_t hash, uint64_t n);

struct shi_cpumap_stats {
    uint64_t in, delivered, dropped, died, queued, flushes, wakes, sleeps, runs, entries;
    uint64_t xdp[SHI_NXDP];
};
void shi_cpumap_stats(const struct shi_machine *m, struct shi_cpumap *map,
                      struct shi_cpumap_stats *s);

/* What is off the map and waits for nobody but a CPU that is gone, is free again. */
void shi_cpumap_collect(struct shi_self *self, struct shi_net *net, struct shi_cpumap *map);
/* The step of its threads, for every process alike. */
void shi_cpumap_register(void);
/* A CPU has died, and nobody runs for it yet. */
void shi_cpumap_died(struct shi_self *self, uint32_t cpu);
/* A new process of a CPU: the threads of its entries begin again. */
void shi_cpumap_online(struct shi_self *self);

#endif
