/* SPDX-License-Identifier: MIT */
/*
 * arch/x86/mm/tlb.c: the TLB of each process, what it has loaded, and how others have entries
 * dropped there.
 *
 * A TLB is private memory of its process.  It is looked into with interrupts masked, and the
 * flush is a native handler, so that nobody finds an entry, is interrupted by its flush, and
 * goes on with it.
 */
#ifndef SHI_TLB_H
#define SHI_TLB_H

#include "smp/smp.h"
#include "users/mm.h"

#define SHI_FLUSH_ALL UINT32_MAX

/* Who waits, and as a guest. */
struct shi_flusher {
    const uint32_t *renumber; /* shi_each */
    const struct shi_waiter *waiter;
    void *arg;
};

/* Their handlers; more calls do nothing. */
void shi_tlb_handlers(void);

/* ---- the address space of this CPU's task --------------------------------------------- */

/* kthread_use_mm, kthread_unuse_mm: current->mm.  0: none, and lazy TLB mode.  0 or -errno. */
int shi_mm_use(struct shi_self *self, uint32_t mm);
uint32_t shi_mm_current(struct shi_self *self);
/* shi_machine.mm_idle. */
void shi_mm_idle(struct shi_self *self, enum shi_mm_idle what);
/* The row of this CPU, filled by this process; NULL: no address spaces in this machine. */
struct shi_tlb_cpu *shi_tlb_row(struct shi_self *self);

/* ---- loads and stores -------------------------------------------------------------------- */

struct shi_fault {
    uint64_t addr;
    uint32_t si_code; /* SEGV_MAPERR, SEGV_ACCERR */
    bool write;
};

/* 8 bytes, aligned: one atomic access.  0, -EFAULT (and what, in `fault`), -ENXIO: there are
 * no address spaces. */
int shi_tlb_load(struct shi_self *self, uint64_t addr, uint64_t *value,
                 struct shi_fault *fault);
int shi_tlb_store(struct shi_self *self, uint64_t addr, uint64_t value,
                  struct shi_fault *fault);
/* Any bytes: page by page; `*done` of them were copied. */
int shi_tlb_copy(struct shi_self *self, uint64_t addr, void *data, uint64_t bytes, bool write,
                 uint64_t *done, struct shi_fault *fault);

/* ---- flushes: 0, or -errno of sending or of the wait: then not all have flushed ------------ */

int shi_flush_tlb_mm_range(struct shi_self *self, const struct shi_vm_view *v, uint32_t mm,
                           uint64_t start, uint32_t pages, bool freed_tables,
                           const struct shi_flusher *by);
int shi_flush_tlb_kernel_range(struct shi_self *self, const struct shi_vm_view *v,
                               uint64_t start, uint32_t pages, const struct shi_flusher *by);
/* Whatever is loaded, on all CPUs, lazy ones included. */
int shi_flush_tlb_everywhere(struct shi_self *self, const struct shi_vm_view *v,
                             const struct shi_flusher *by);
/* What others may walk page tables without a lock is over when it returns. */
int shi_tlb_remove_table_sync_one(struct shi_self *self, const struct shi_vm_view *v,
                                  const struct shi_flusher *by);

/* arch_tlbbatch_add_pending and set_tlb_ubc_flush_pending; arch_tlbbatch_flush. */
void shi_tlb_batch_add(struct shi_self *self, const struct shi_vm_view *v, uint32_t mm);
int shi_tlb_batch_flush(struct shi_self *self, const struct shi_vm_view *v,
                        const struct shi_flusher *by);
int shi_flush_tlb_batched_pending(struct shi_self *self, const struct shi_vm_view *v,
                                  uint32_t mm, const struct shi_flusher *by);

#endif
