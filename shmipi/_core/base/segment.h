/* SPDX-License-Identifier: MIT */
/*
 * A process's own view of the segment: the mapping, checked once, and where things lie.
 */
#ifndef SHI_SEGMENT_H
#define SHI_SEGMENT_H

#include "base/layout.h"

struct shi_self;
struct shi_flow;
struct shi_list;

/* Do what taking `line` means; false: its handler was put off.  Soft-masked. */
typedef bool shi_action(struct shi_self *self, uint32_t line);

/* The timers of a CPU (users/tick.c): what its idle loop, its waits and its interrupts ask. */
struct shi_timers {
    /* Is there anything for `run` at `now`? */
    bool (*due)(struct shi_self *self, uint64_t now);
    /* The local timer's interrupt.  Soft-masked. */
    void (*run)(struct shi_self *self);
    /* About to sleep (tick_broadcast_enter): for how many ns at most; < 0: until it is rung. */
    int64_t (*enter)(struct shi_self *self);
    /* Awake again (tick_broadcast_exit). */
    void (*exit)(struct shi_self *self);
    /* A task is about to run: what interrupts it when a timer expires. */
    void (*arm)(struct shi_self *self);
    /* `cpu` takes no interrupts any more: it went offline (its own doing) or died. */
    void (*leave)(struct shi_self *self, uint32_t cpu);
    /* This CPU is online. */
    void (*join)(struct shi_self *self);
    /* The watchdog's look. */
    void (*watch)(struct shi_self *self);
};
enum shi_preempted {
    SHI_PREEMPT_RAN,    /* others ran, and there may be more */
    SHI_PREEMPT_NOT,    /* nobody is next, or not yet */
    SHI_PREEMPT_PYTHON, /* the interpreter is needed for who is next */
};
enum shi_mm_idle { SHI_MM_SLEEPS, SHI_MM_WAKES, SHI_MM_EXIT };

/* Geometry, copied out of the header once and checked: never read from there again. */
struct shi_machine {
    uint8_t *base;
    struct shi_header *header;
    uint64_t total_bytes;
    uint64_t slot_offset, irq_offset, region_offset, region_bytes, func_offset, arena_offset;
    uint64_t sched_offset, task_offset;
    uint64_t arena_bytes, array_offset, array_bytes, sum_key;
    uint64_t payload_max; /* the largest single payload */
    uint32_t ncpus, nslots, csd_shift, csds_per_slot, ncsds;
    uint32_t cookie, kick_signal, nmi_signal, ntasks, task_bytes;
    enum shi_doorbell doorbell;
    bool kick;
    bool oversubscribed;
    int fd;               /* of the segment: only by shi_machine_fd and _close */
    uint64_t dev, ino;    /* of the file that it is, 0 for none (native tests) */
    char path[64];        /* of that file, to open it again */
    struct shi_chip chip; /* checked */
    const struct shi_flow *flow;
    /* What taking a line means, by its use (chip.use); and what takes the queue. */
    shi_action *actions[SHI_NUSES];
    void (*drain)(struct shi_self *);
    /* Handlers of NMI_LOCAL that the core has itself: how many NMIs were theirs.  Or NULL. */
    uint32_t (*nmi_local)(struct shi_self *);
    /* The scheduler's, which is above who calls it: woken tasks' csds; a task may be preempted;
     * its tick (true: somebody waits). */
    void (*woken)(struct shi_self *, struct shi_list *);
    enum shi_preempted (*preempt)(struct shi_self *);
    bool (*tick)(struct shi_self *);
    void (*resched)(struct shi_self *);
    int (*work)(struct shi_self *, uint32_t csd);
    void (*wake_softirqd)(struct shi_self *);  /* NULL: a machine without the thread */
    bool (*work_due)(const struct shi_self *); /* of who waits for one (work_wait) */
    /* Runs the stopper's works that are due.  True: the next needs the interpreter. */
    bool (*stopper)(struct shi_self *);
    const struct shi_timers *timers; /* NULL: a machine without */
    /* A task with an address space sleeps, goes on, or has ended (shi_self.has_mm). */
    void (*mm_idle)(struct shi_self *, enum shi_mm_idle);
    void *bells;  /* what the doorbell opened, for each CPU, or NULL (irq/db.h) */
    bool adopted; /* of a guest: from descriptors, not by name */
    void (*local_timer)(struct shi_self *); /* its interrupt (self->timer_due) */
    uint32_t irq_work; /* the line that a CPU sends itself for it, or SHI_NO_LINE */
};

/* Geometry for a machine of this shape; fills everything of `h` but the name. */
int shi_layout_plan(struct shi_header *h, uint32_t ncpus, uint64_t arena_bytes,
                    uint64_t array_bytes);
/* Bytes that must be allocated at boot: header, directory, slots. */
uint64_t shi_layout_fixed(const struct shi_header *h);
/* Check a mapped header against `mapped` bytes, all but its chip; -EINVAL, or -EPROTO for
 * another ABI. */
int shi_segment_attach(struct shi_machine *m, void *base, uint64_t mapped, int fd);
/* A descriptor of the segment's file, or -1.  A task may close every descriptor it finds,
 * and open a file that then has our number: that one is never touched. */
int shi_machine_fd(const struct shi_machine *m);
/* Close the descriptor, if it is ours still. */
void shi_machine_close(struct shi_machine *m);
/* Allocate a range of the segment's file: 0, -ENOSPC, ... */
int shi_machine_back(const struct shi_machine *m, uint64_t offset, uint64_t length);
/* Give a range back: it reads as zeros.  False: the pages are kept as they are. */
bool shi_machine_punch(const struct shi_machine *m, uint64_t offset, uint64_t length);

/* Keyed checksum of a payload: guards against damage, not against an attacker. */
uint64_t shi_checksum(const struct shi_machine *m, const void *data, uint64_t length);

/* Bytes of the counts of lines taken, all CPUs together. */
static inline uint64_t shi_line_count_bytes(uint32_t ncpus)
{
    return (uint64_t)ncpus * SHI_NLINES * sizeof(uint64_t);
}

static inline uint32_t shi_affinity_words(uint32_t ncpus)
{
    return (ncpus + 63) / 64;
}

/* Entries of the task table, and bytes of each. */
static inline uint64_t shi_ntasks(uint32_t ncpus)
{
    return SHI_TASKS + 8 * (uint64_t)ncpus;
}

static inline uint64_t shi_task_bytes(uint32_t ncpus)
{
    uint64_t bytes = sizeof(struct shi_task) + shi_affinity_words(ncpus) * sizeof(uint64_t);
    return (bytes + SHI_PAIR - 1) / SHI_PAIR * SHI_PAIR;
}

/* Where the arrays made so far end. */
static inline uint64_t shi_array_end(const struct shi_machine *m)
{
    uint64_t used = shi_load_acquire(&m->header->array_used);
    return m->array_offset + (used < m->array_bytes ? used : m->array_bytes);
}

/* SHI_USER_nohz begins with the mask of isolated CPUs, in so many words (shmipi/users/nohz.py). */
#define SHI_NOHZ_WORDS 64u

/* `bytes` of a user's state that lies `at`; NULL: there is none, or its place is damaged. */
static inline void *shi_user_at(const struct shi_machine *m, uint64_t at, uint64_t bytes)
{
    uint64_t end = shi_array_end(m);
    if (at < m->array_offset || at > end || bytes > end - at || at % SHI_LINE)
        return NULL;
    return m->base + at;
}

/* The state of a user of IPIs, `bytes` of it; NULL: it has none, or its place is damaged. */
static inline void *shi_user(const struct shi_machine *m, enum shi_user which, uint64_t bytes)
{
    /* Acquire: pairs with the release of who has made it. */
    return shi_user_at(m, shi_load_acquire(&m->header->users[which]), bytes);
}

static inline struct shi_slot *shi_slot(const struct shi_machine *m, uint32_t id)
{
    return (struct shi_slot *)(m->base + m->slot_offset + (uint64_t)id * SHI_SLOT_BYTES);
}

static inline struct shi_sched *shi_sched(const struct shi_machine *m)
{
    return (struct shi_sched *)(m->base + m->sched_offset);
}

static inline uint8_t *shi_region(const struct shi_machine *m, uint32_t id)
{
    return m->base + m->region_offset + (uint64_t)id * m->region_bytes;
}

/* `index` counts through all slots; the caller has checked it. */
static inline struct shi_csd *shi_csd(const struct shi_machine *m, uint32_t index)
{
    return (struct shi_csd *)shi_region(m, index >> m->csd_shift) +
           (index & (m->csds_per_slot - 1));
}

/* index + 1 of a csd anywhere in the segment. */
static inline uint32_t shi_csd_number(const struct shi_machine *m, const struct shi_csd *csd)
{
    uint64_t at = (uint64_t)((const uint8_t *)csd - shi_region(m, 0));
    return ((uint32_t)(at / m->region_bytes) << m->csd_shift) +
           (uint32_t)(at % m->region_bytes / sizeof *csd) + 1;
}

static inline struct shi_func *shi_func_entry(const struct shi_machine *m, uint32_t id,
                                              uint32_t index)
{
    return (struct shi_func *)(shi_region(m, id) + m->func_offset) + index;
}

static inline uint8_t *shi_arena_base(const struct shi_machine *m, uint32_t id)
{
    return shi_region(m, id) + m->arena_offset;
}

static inline uint32_t shi_first_guest(const struct shi_machine *m)
{
    return m->ncpus + 2;
}

#endif
