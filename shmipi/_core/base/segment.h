/* SPDX-License-Identifier: MIT */
/*
 * A process's own view of the segment: the mapping, checked once, and where things lie.
 */
#ifndef SHI_SEGMENT_H
#define SHI_SEGMENT_H

#include "base/layout.h"

struct shi_self;
struct shi_flow;

/* Do what taking `line` means; false: its handler was put off.  Soft-masked. */
typedef bool shi_action(struct shi_self *self, uint32_t line);

/* Geometry, copied out of the header once and checked: never read from there again. */
struct shi_machine {
    uint8_t *base;
    struct shi_header *header;
    uint64_t total_bytes;
    uint64_t slot_offset, irq_offset, region_offset, region_bytes, func_offset, arena_offset;
    uint64_t arena_bytes, trace_offset, array_offset, array_bytes, sum_key;
    uint64_t payload_max; /* the largest single payload */
    uint32_t ncpus, nslots, csd_shift, csds_per_slot, ncsds, trace_records;
    uint32_t cookie, kick_signal, nmi_signal;
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
    void *bells;  /* what the doorbell opened, for each CPU, or NULL (irq/db.h) */
    bool adopted; /* of a guest: from descriptors, not by name */
};

/* Geometry for a machine of this shape; fills everything of `h` but the name. */
int shi_layout_plan(struct shi_header *h, uint32_t ncpus, uint32_t trace_records,
                    uint64_t arena_bytes, uint64_t array_bytes);
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

/* Where the arrays made so far end. */
static inline uint64_t shi_array_end(const struct shi_machine *m)
{
    uint64_t used = shi_load_acquire(&m->header->array_used);
    return m->array_offset + (used < m->array_bytes ? used : m->array_bytes);
}

static inline struct shi_slot *shi_slot(const struct shi_machine *m, uint32_t id)
{
    return (struct shi_slot *)(m->base + m->slot_offset + (uint64_t)id * SHI_SLOT_BYTES);
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
