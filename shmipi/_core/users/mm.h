/* SPDX-License-Identifier: MIT */
/*
 * Address spaces: physical pages, page tables of four levels that are made of them, and what
 * each CPU has loaded.  All of it lies in the state of the user "tlb":
 *
 *   shi_vm | shi_tlb_cpu of each slot | shi_mm, each | masks | a word for each frame | frames
 *
 * Whoever may write the segment may have damaged it: what is read from a page table is checked
 * before it is followed.
 */
#ifndef SHI_MM_H
#define SHI_MM_H

#include "base/machine.h"

#define SHI_MM_PAGE_SHIFT 12
#define SHI_MM_PAGE (1ull << SHI_MM_PAGE_SHIFT)
#define SHI_MM_LEVELS 4u
#define SHI_MM_ENTRIES 512u
#define SHI_MMS 64u     /* address spaces; 0 is init_mm, the kernel's */
#define SHI_MM_ASIDS 6u /* TLB_NR_DYN_ASIDS */
#define SHI_MM_FRAMES_MAX (1u << 20)
#define SHI_MM_USER_END (1ull << 47)
#define SHI_MM_KERNEL_START (~0ull << 47)
#define SHI_MM_CEILING 33u /* tlb_single_page_flush_ceiling */

/* loaded_mm, beside a number: it is being changed (LOADED_MM_SWITCHING). */
#define SHI_MM_SWITCHING 0xffffu
#define SHI_MM_NONE 0xfffeu

/* A page table entry: a frame's number from bit 12 on. */
#define SHI_PTE_PRESENT 0x1ull
#define SHI_PTE_WRITE 0x2ull
#define SHI_PTE_ACCESSED 0x20ull
#define SHI_PTE_DIRTY 0x40ull
#define SHI_PTE_GLOBAL 0x100ull
#define SHI_PTE_PROTNONE 0x200ull /* mapped, and nobody may touch it */
#define SHI_PTE_FLAGS 0xfffull

#define SHI_PROT_READ 1u
#define SHI_PROT_WRITE 2u

enum shi_frame_state {
    SHI_FR_FREE = 0,
    SHI_FR_PAGE = 1,  /* of an mm */
    SHI_FR_TABLE = 2, /* of an mm: a page table, which has so many entries */
    /* Not in the page tables any more, but a TLB may have it until the flush has ended. */
    SHI_FR_LIMBO = 3,
    SHI_FR_TABLE_LIMBO = 4,
    /* Flushed; somebody may be walking it still (tlb_remove_table). */
    SHI_FR_TABLE_WAITS = 5,
    /* Of a process: in its batch of unmapped pages, or of tables; `entries`: which batch. */
    SHI_FR_HELD = 6,
    SHI_FR_TABLE_HELD = 7,
};

/* A frame's word: state | owner (an mm, or a slot) | generation of the slot | entries. */
static inline uint64_t shi_frame_word(enum shi_frame_state state, uint32_t owner, uint16_t gen,
                                      uint32_t entries)
{
    return (uint64_t)state | (uint64_t)owner << 8 | (uint64_t)gen << 24 |
           (uint64_t)entries << 40;
}
static inline enum shi_frame_state shi_frame_state(uint64_t w)
{
    return (enum shi_frame_state)(w & 0xff);
}
static inline uint32_t shi_frame_owner(uint64_t w)
{
    return (uint32_t)(w >> 8 & 0xffff);
}
static inline uint16_t shi_frame_gen(uint64_t w)
{
    return (uint16_t)(w >> 24);
}
static inline uint32_t shi_frame_entries(uint64_t w)
{
    return (uint32_t)(w >> 40 & 0xffff);
}

/* vm_event: what each process has counted. */
#define SHI_TLB_EVENTS(X)                                                                      \
    X(remote_flush)          /* native_flush_tlb_multi: NR_TLB_REMOTE_FLUSH */                 \
    X(remote_flush_received) /* flush_tlb_func for another CPU */                              \
    X(local_flush_all)                                                                         \
    X(local_flush_one)                                                                         \
    X(full)        /* flush_tlb_func flushed all of an mm, here */                             \
    X(partial)     /* or pages, this many times */                                             \
    X(up_to_date)  /* or nothing, because the generation was reached */                        \
    X(wrong_mm)    /* or nothing, because another mm is loaded: it left the mask */            \
    X(lazy_left)   /* it was lazy, and left the mm for init_mm */                              \
    X(lazy_fresh)  /* back from being lazy: nothing had been missed */                         \
    X(lazy_stale)  /* or it had, and all was flushed */                                        \
    X(switch_kept) /* switch_mm to an mm whose entries were still right */                     \
    X(switch_flushed)                                                                          \
    X(walks) /* page table walks: misses */                                                    \
    X(faults)                                                                                  \
    X(batched)      /* pages unmapped whose flush is put off */                                \
    X(batch_flush)  /* arch_tlbbatch_flush */                                                  \
    X(batch_forced) /* flush_tlb_batched_pending had to flush */                               \
    X(table_sync)   /* tlb_remove_table_sync_one */                                            \
    X(was_offline)  /* back online: all was flushed */                                         \
    X(sync_core)    /* membarrier's SYNC_CORE, here */

enum shi_tlb_event {
#define X(name) SHI_TE_##name,
    SHI_TLB_EVENTS(X)
#undef X
        SHI_TLB_NEVENTS
};

/* cpu_tlbstate, cpu_tlbstate_shared and what membarrier wants of a run queue. */
struct shi_tlb_cpu {
    /* Others read it (should_flush_tlb). */
    _Alignas(SHI_PAIR) shi_a32 loaded_mm;
    shi_a32 is_lazy;
    shi_a32 mm;               /* current->mm; 0: none, as a kernel thread */
    shi_a32 gen;              /* of the process that has filled this */
    shi_a32 membarrier_state; /* of rq */
    shi_a32 rseq;             /* counts what ends restartable sequences (rseq_preempt) */
    shi_a32 stale;            /* others: a flush has passed it by, because it was offline */
    /* The owner's. */
    _Alignas(SHI_LINE) shi_a32 asid;
    shi_a32 next_asid;
    struct {
        shi_a64 ctx_id, tlb_gen;
    } ctxs[SHI_MM_ASIDS];
    _Alignas(SHI_LINE) shi_a64 events[SHI_TLB_NEVENTS];
    /* tlb_ubc: its mask is beside those of the mms. */
    shi_a32 flush_required;
};

struct shi_mm {
    _Alignas(SHI_PAIR) shi_a64 tlb_gen; /* mm->context */
    shi_a64 ctx_id;                     /* never used again; 0: no such mm */
    shi_a32 pgd;                        /* frame; 0: none */
    shi_a32 membarrier_state;
    shi_a32 tlb_flush_batched; /* pending | flushed << 16 */
    shi_a32 torn;              /* 1 while its page tables are being changed */
    shi_a32 stuck;             /* 1: it has frames in limbo whose flush was given up */
    shi_a64 next_trim_ns;
    _Alignas(SHI_LINE) shi_a64 lock; /* of its page tables: shi_lock_try */
    shi_a64 releases;                /* of the lock, so far */
    shi_a64 mmap_base;               /* where a search for room begins */
    char name[48];
};

struct shi_vm {
    uint32_t nframes, nslots;
    shi_a32 ceiling;
    shi_a32 hint; /* where a search for a free frame begins */
    shi_a64 next_ctx_id;
    shi_a64 tables_waiting;
    /* What deaths have left and others have found. */
    shi_a64 torn_found, frames_found;
    shi_a32 batches; /* numbers of batches */
    _Alignas(SHI_PAIR) char end[];
};

/* Where all that is. */
struct shi_vm_view {
    struct shi_vm *vm;
    struct shi_tlb_cpu *cpus; /* by slot */
    struct shi_mm *mms;
    shi_a64 *masks;  /* mm_cpumask of each mm, then the batch's of each slot */
    shi_a64 *frames; /* a word each */
    char *memory;
    uint32_t nframes, mask_words;
};

uint64_t shi_vm_bytes(const struct shi_machine *m, uint32_t nframes);
/* The state is there and zeroed: make init_mm in it.  0 or -EINVAL. */
int shi_vm_init(const struct shi_machine *m, uint32_t nframes);
/* False: there is none, or it is damaged. */
bool shi_vm_view(const struct shi_machine *m, struct shi_vm_view *v);

static inline shi_a64 *shi_mm_cpumask(const struct shi_vm_view *v, uint32_t mm)
{
    return v->masks + (size_t)mm * v->mask_words;
}
static inline shi_a64 *shi_batch_cpumask(const struct shi_vm_view *v, uint32_t slot)
{
    return v->masks + (size_t)(SHI_MMS + slot) * v->mask_words;
}
static inline char *shi_frame_at(const struct shi_vm_view *v, uint32_t frame)
{
    return v->memory + ((size_t)frame << SHI_MM_PAGE_SHIFT);
}

/* An event of the process that `row` belongs to, with its interrupts masked or not: what an
 * interrupt counts it counts whole. */
static inline void shi_tlb_event(struct shi_tlb_cpu *row, enum shi_tlb_event event, uint64_t n)
{
    shi_fetch_add_relaxed(&row->events[event], n);
}

/* ---- frames: 0 is none ------------------------------------------------------------ */

/* Zeroed, or 0: none is free. */
uint32_t shi_frame_get(const struct shi_vm_view *v, enum shi_frame_state state, uint32_t owner);
static inline void shi_frame_put(const struct shi_vm_view *v, uint32_t frame)
{
    shi_store_release(&v->frames[frame], 0);
}

/* ---- page tables: between shi_mm_lock and unlock, but for the walk ------------------ */

/* The entry of the last level for `addr`, or NULL.  No lock is needed by who has interrupts
 * disabled: a table is not used again before he has taken one. */
shi_a64 *shi_walk(const struct shi_vm_view *v, uint32_t mm, uint64_t addr);
/* The same, with tables made where there are none.  NULL: no frames. */
shi_a64 *shi_walk_alloc(const struct shi_vm_view *v, uint32_t mm, uint64_t addr);
void shi_pte_set(const struct shi_vm_view *v, shi_a64 *pte, uint64_t value);
/* Takes the entry away; its old value, with what the CPUs have noted in it meanwhile. */
uint64_t shi_pte_clear(const struct shi_vm_view *v, shi_a64 *pte);
/* Unlink tables without entries above `addr`: how many, numbers to `out` (room for three). */
uint32_t shi_free_tables(const struct shi_vm_view *v, uint32_t mm, uint64_t addr,
                         uint32_t *out);
/* Which frames the tables of `mm` lead to: bytes in `seen`; counts entries anew. */
void shi_mark(const struct shi_vm_view *v, uint32_t mm, uint8_t *seen);

static inline bool shi_addr_kernel(uint64_t addr)
{
    return addr >= SHI_MM_KERNEL_START;
}
static inline bool shi_addr_canonical(uint64_t addr)
{
    return addr < SHI_MM_USER_END || addr >= SHI_MM_KERNEL_START;
}

#endif
