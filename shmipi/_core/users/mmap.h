/* SPDX-License-Identifier: MIT */
/*
 * mmap, munmap, mprotect and reclaim: who changes page tables, and when a page may be used
 * again.
 *
 * A page that was taken out of the page tables is in limbo until every CPU that may have it in
 * its TLB has dropped it.  A flush that was given up (Ctrl-C) leaves its pages there; the next
 * one of the same mm that ends frees them, because generations make it a flush of all that came
 * before.  Who is killed in the middle leaves `torn`: the next to take the lock sweeps what the
 * page tables do not lead to, flushes, and frees.
 */
#ifndef SHI_MMAP_H
#define SHI_MMAP_H

#include "users/tlb.h"

/* In all: 0 or more, or -errno: as the system call, -ESRCH (no such mm), or of a flush. */

/* The lock of the page tables of `mm`.  0; -EAGAIN: somebody's; 1: taken from one who died, and
 * shi_mm_recover comes first. */
int shi_mm_trylock(struct shi_self *self, const struct shi_vm_view *v, uint32_t mm);
/* `whole`: else the next one has to recover it. */
void shi_mm_unlock(struct shi_self *self, const struct shi_vm_view *v, uint32_t mm, bool whole);

/* ---- the lock is held -------------------------------------------------------------------- */

int shi_mm_recover(struct shi_self *self, const struct shi_vm_view *v, uint32_t mm,
                   const struct shi_flusher *by);
/* -EEXIST: it has another's name already; -ENOMEM. */
int shi_mm_make(struct shi_self *self, const struct shi_vm_view *v, uint32_t mm,
                const char *name);
/* exit_mmap.  -EBUSY: a CPU's task uses it. */
int shi_mm_end(struct shi_self *self, const struct shi_vm_view *v, uint32_t mm,
               const struct shi_flusher *by);

/* Zeroed pages at `*addr` (MAP_FIXED_NOREPLACE), or where there is room if it is 0.  -EINVAL,
 * -EEXIST (part of it is mapped), -ENOMEM: nothing has changed. */
int shi_mmap(struct shi_self *self, const struct shi_vm_view *v, uint32_t mm, uint64_t *addr,
             uint64_t bytes, uint32_t prot, const struct shi_flusher *by);
/* -EINVAL.  What is not mapped is passed over. */
int shi_munmap(struct shi_self *self, const struct shi_vm_view *v, uint32_t mm, uint64_t addr,
               uint64_t bytes, const struct shi_flusher *by);
/* -EINVAL, -ENOMEM (part of it is not mapped): nothing has changed. */
int shi_mprotect(struct shi_self *self, const struct shi_vm_view *v, uint32_t mm, uint64_t addr,
                 uint64_t bytes, uint32_t prot, const struct shi_flusher *by);
/* try_to_unmap with TTU_BATCH_FLUSH: the pages taken, whose flush is put off. */
int shi_try_to_unmap(struct shi_self *self, const struct shi_vm_view *v, uint32_t mm,
                     uint64_t addr, uint64_t bytes, const struct shi_flusher *by);
/* Through the page tables, as access_process_vm() does: bytes copied, less at a hole. */
int64_t shi_mm_access(const struct shi_vm_view *v, uint32_t mm, uint64_t addr, void *data,
                      uint64_t bytes, bool write);

/* ---- no lock -------------------------------------------------------------------------------- */

/* try_to_unmap_flush: flush, and free the pages: how many. */
int shi_try_to_unmap_flush(struct shi_self *self, const struct shi_vm_view *v,
                           const struct shi_flusher *by);
/* Free page tables that wait for nobody to walk them, and what the batches of dead CPUs hold:
 * how many. */
int shi_mm_reclaim(struct shi_self *self, const struct shi_vm_view *v,
                   const struct shi_flusher *by);

#endif
