/* SPDX-License-Identifier: MIT */
#include "base/sys.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "base/step.h"
#include "users/mmap.h"

#define TABLE_BATCH 64u /* tables that wait before others are asked (MAX_TABLE_BATCH) */
#define REGION (SHI_MM_PAGE * SHI_MM_ENTRIES) /* what one table of the last level maps */
#define MMAP_START (16ull * REGION)

/* ---- the lock --------------------------------------------------------------------------------- */

int shi_mm_trylock(struct shi_self *self, const struct shi_vm_view *v, uint32_t mm)
{
    struct shi_mm *of = &v->mms[mm];
    int err = shi_lock_try(self, &of->lock);
    if (err)
        return err;
    /* Before any change: who finds 1 has the lock of one who was killed in the middle. */
    return shi_xchg_full(&of->torn, 1) != 0;
}

void shi_mm_unlock(struct shi_self *self, const struct shi_vm_view *v, uint32_t mm, bool whole)
{
    struct shi_mm *of = &v->mms[mm];
    if (whole)
        shi_store_full(&of->torn, 0);
    shi_store_relaxed(&of->releases, shi_load_relaxed(&of->releases) + 1); /* its holder's */
    shi_lock_release(self, &of->lock);
}

/* ---- when frames may be used again -------------------------------------------------------------- */

struct pages {
    uint32_t *list;
    uint32_t n;
};

static bool owned(uint64_t w, uint32_t mm)
{
    enum shi_frame_state state = shi_frame_state(w);
    return state >= SHI_FR_PAGE && state <= SHI_FR_TABLE_LIMBO && shi_frame_owner(w) == mm;
}

/* Flushed: a page is free, a table waits for who may be walking it. */
static void out_of_limbo(const struct shi_vm_view *v, uint32_t frame)
{
    enum shi_frame_state state = shi_frame_state(shi_load_relaxed(&v->frames[frame]));
    if (state == SHI_FR_LIMBO) {
        shi_frame_put(v, frame);
    } else if (state == SHI_FR_TABLE_LIMBO) {
        shi_store_release(&v->frames[frame], shi_frame_word(SHI_FR_TABLE_WAITS, 0, 0, 0));
        shi_fetch_add_full(&v->vm->tables_waiting, 1);
    }
}

static int flush_range(struct shi_self *self, const struct shi_vm_view *v, uint32_t mm,
                       uint64_t start, uint64_t pages, bool freed_tables,
                       const struct shi_flusher *by)
{
    uint32_t n = pages < SHI_FLUSH_ALL ? (uint32_t)pages : SHI_FLUSH_ALL;
    return mm ? shi_flush_tlb_mm_range(self, v, mm, start, n, freed_tables, by)
              : shi_flush_tlb_kernel_range(self, v, start, n, by);
}

/* tlb_finish_mmu: flush, and only then free. */
static int finish(struct shi_self *self, const struct shi_vm_view *v, uint32_t mm,
                  uint64_t start, uint64_t pages, const struct pages *gone, bool tables,
                  const struct shi_flusher *by)
{
    struct shi_mm *of = &v->mms[mm];
    bool stuck = shi_load_relaxed(&of->stuck);
    uint32_t i;
    if (!gone->n && !stuck)
        return 0;
    SHI_STEP(self, unmap);
    int err =
        flush_range(self, v, mm, start, stuck ? SHI_FLUSH_ALL : pages, tables || stuck, by);
    SHI_STEP(self, unmap_free);
    if (err) {
        shi_store_relaxed(&of->stuck, 1);
        return err;
    }
    for (i = 0; i < gone->n; i++)
        out_of_limbo(v, gone->list[i]);
    for (i = 1; stuck && i < v->nframes; i++)
        if (owned(shi_load_relaxed(&v->frames[i]), mm))
            out_of_limbo(v, i);
    shi_store_relaxed(&of->stuck, 0);
    /* A failure to ask leaves them waiting. */
    if (shi_load_relaxed(&v->vm->tables_waiting) >= TABLE_BATCH)
        err = shi_mm_reclaim(self, v, by);
    return err < 0 ? err : 0;
}

/* Is the process that holds a batch gone? */
static bool holder_died(const struct shi_self *self, uint64_t w)
{
    uint32_t slot = shi_frame_owner(w);
    if (slot >= self->m->nslots)
        return true;
    uint64_t word = shi_load_acquire(&shi_slot(self->m, slot)->word);
    if (slot < self->m->ncpus)
        return shi_word_state(word) == SHI_DEAD || shi_word_gen(word) != shi_frame_gen(w);
    return (uint16_t)shi_load_acquire(&shi_slot(self->m, slot)->generation) != shi_frame_gen(w);
}

int shi_mm_reclaim(struct shi_self *self, const struct shi_vm_view *v,
                   const struct shi_flusher *by)
{
    uint32_t batch = (shi_fetch_add_relaxed(&v->vm->batches, 1) + 1) & 0xffff, i, n = 0;
    uint64_t mine = shi_frame_word(SHI_FR_TABLE_HELD, self->id, self->gen, batch);
    bool dead = false;
    /* Whoever dies in here leaves them held by a dead process. */
    for (i = 1; i < v->nframes; i++) {
        uint64_t w = shi_load_relaxed(&v->frames[i]);
        enum shi_frame_state state = shi_frame_state(w);
        bool waits = state == SHI_FR_TABLE_WAITS;
        bool left = (state == SHI_FR_HELD || state == SHI_FR_TABLE_HELD) &&
                    holder_died(self, w);
        if ((waits || left) && shi_cas_full(&v->frames[i], &w, mine)) {
            n++;
            if (waits)
                shi_fetch_add_full(&v->vm->tables_waiting, -1ull);
            else
                shi_fetch_add_relaxed(&v->vm->frames_found, 1);
            dead |= left;
        }
    }
    /* Pages of a dead one's batch have not been flushed. */
    int err = !n     ? 0
              : dead ? shi_flush_tlb_everywhere(self, v, by)
                     : shi_tlb_remove_table_sync_one(self, v, by);
    for (i = 1; i < v->nframes && n; i++)
        if (shi_load_relaxed(&v->frames[i]) == mine) {
            if (err) {
                shi_store_release(&v->frames[i],
                                  shi_frame_word(SHI_FR_TABLE_HELD, 0xffff, 0, 0));
                continue; /* as a dead one's: with the next flush of all */
            }
            shi_frame_put(v, i);
        }
    return err ? err : (int)n;
}

/* ---- unmapping ------------------------------------------------------------------------------------ */

static uint64_t pages_of(uint64_t bytes)
{
    return (bytes + SHI_MM_PAGE - 1) >> SHI_MM_PAGE_SHIFT;
}

/* Is it a range of this mm?  0, -EINVAL or `beyond`. */
static int check(const struct shi_vm_view *v, uint32_t mm, uint64_t addr, uint64_t bytes,
                 int beyond)
{
    uint64_t end = mm ? SHI_MM_USER_END : 0, start = mm ? 0 : SHI_MM_KERNEL_START;
    if (!shi_load_acquire(&v->mms[mm].ctx_id))
        return -ESRCH;
    if (addr % SHI_MM_PAGE || !bytes)
        return -EINVAL;
    if (bytes > SHI_MM_USER_END || addr < start || (mm && addr > end) ||
        pages_of(bytes) << SHI_MM_PAGE_SHIFT > end - addr)
        return beyond;
    return 0;
}

static bool room_for(struct pages *gone, const struct shi_vm_view *v, uint64_t pages)
{
    uint64_t most = pages < v->nframes ? pages : v->nframes;
    gone->n = 0;
    gone->list = malloc((most + 3 * (most / SHI_MM_ENTRIES + 2)) * sizeof *gone->list);
    return gone->list != NULL;
}

/* The next page to look at behind one whose table is not there. */
static uint64_t next_region(uint64_t addr, uint64_t end)
{
    uint64_t next = (addr | (REGION - 1)) + 1;
    return next && next - addr < end - addr ? next : end;
}

/* Take the pages out of the page tables: frames to `gone`, in limbo or (`batch`) held. */
static void zap(struct shi_self *self, const struct shi_vm_view *v, uint32_t mm, uint64_t addr,
                uint64_t end, bool batch, struct pages *gone)
{
    uint64_t word = batch ? shi_frame_word(SHI_FR_HELD, self->id, self->gen, 0)
                          : shi_frame_word(SHI_FR_LIMBO, mm, 0, 0);
    while (addr != end) {
        shi_a64 *pte = shi_walk(v, mm, addr);
        if (!pte) {
            addr = next_region(addr, end);
            continue;
        }
        uint64_t old = shi_load_relaxed(pte) ? shi_pte_clear(v, pte) : 0;
        uint64_t frame = old >> SHI_MM_PAGE_SHIFT;
        if (frame && frame < v->nframes && gone->n < v->nframes) {
            shi_store_release(&v->frames[frame], word);
            gone->list[gone->n++] = (uint32_t)frame;
        }
        addr += SHI_MM_PAGE;
    }
}

/* free_pgtables: those of the range that have no entries any more. */
static bool zap_tables(const struct shi_vm_view *v, uint32_t mm, uint64_t addr, uint64_t end,
                       struct pages *gone)
{
    uint32_t before = gone->n;
    while (mm && addr != end) { /* the kernel's stay, as those of vmalloc do */
        if (shi_walk(v, mm, addr))
            gone->n += shi_free_tables(v, mm, addr, gone->list + gone->n);
        addr = next_region(addr, end);
    }
    return gone->n != before;
}

static int unmap(struct shi_self *self, const struct shi_vm_view *v, uint32_t mm, uint64_t addr,
                 uint64_t pages, const struct shi_flusher *by)
{
    struct pages gone;
    uint64_t end = addr + (pages << SHI_MM_PAGE_SHIFT);
    if (!room_for(&gone, v, pages))
        return -ENOMEM;
    zap(self, v, mm, addr, end, false, &gone);
    bool tables = zap_tables(v, mm, addr, end, &gone);
    int err = finish(self, v, mm, addr, pages, &gone, tables, by);
    free(gone.list);
    return err;
}

int shi_munmap(struct shi_self *self, const struct shi_vm_view *v, uint32_t mm, uint64_t addr,
               uint64_t bytes, const struct shi_flusher *by)
{
    int err = check(v, mm, addr, bytes, -EINVAL);
    if (!err)
        err = shi_flush_tlb_batched_pending(self, v, mm, by);
    return err ? err : unmap(self, v, mm, addr, pages_of(bytes), by);
}

/* ---- mapping ---------------------------------------------------------------------------------------- */

static uint64_t flags_of(uint32_t mm, uint32_t prot)
{
    uint64_t flags = mm ? 0 : SHI_PTE_GLOBAL;
    if (prot & SHI_PROT_WRITE)
        return flags | SHI_PTE_PRESENT | SHI_PTE_WRITE;
    return flags | (prot & SHI_PROT_READ ? SHI_PTE_PRESENT : SHI_PTE_PROTNONE);
}

/* The first page of the range that is mapped (or, `hole`, is not), or `end`. */
static uint64_t find(const struct shi_vm_view *v, uint32_t mm, uint64_t addr, uint64_t end,
                     bool hole)
{
    while (addr != end) {
        const shi_a64 *pte = shi_walk(v, mm, addr);
        if (!pte && !hole) {
            addr = next_region(addr, end);
            continue;
        }
        if ((pte && shi_load_relaxed(pte)) != hole)
            break;
        addr += SHI_MM_PAGE;
    }
    return addr;
}

/* Where there is room for so many bytes: upwards from where the last was found, once round. */
static uint64_t get_unmapped_area(const struct shi_vm_view *v, uint32_t mm, uint64_t bytes)
{
    uint64_t first = mm ? MMAP_START : SHI_MM_KERNEL_START, last = mm ? SHI_MM_USER_END : 0;
    uint64_t at = shi_load_relaxed(&v->mms[mm].mmap_base), turned = 0, found;
    if (at < first || at % SHI_MM_PAGE)
        at = first;
    for (;;) {
        if (bytes > last - at) {
            if (turned++ || bytes > last - first)
                return 0;
            at = first;
        }
        found = find(v, mm, at, at + bytes, false);
        if (found == at + bytes) {
            shi_store_relaxed(&v->mms[mm].mmap_base, found);
            return at;
        }
        at = found + SHI_MM_PAGE;
    }
}

static int map(const struct shi_vm_view *v, uint32_t mm, uint64_t addr, uint64_t pages,
               uint64_t flags)
{
    uint64_t i;
    for (i = 0; i < pages; i++) {
        shi_a64 *pte = shi_walk_alloc(v, mm, addr + (i << SHI_MM_PAGE_SHIFT));
        uint32_t frame = pte ? shi_frame_get(v, SHI_FR_PAGE, mm) : 0;
        if (!frame)
            return -ENOMEM;
        shi_pte_set(v, pte, (uint64_t)frame << SHI_MM_PAGE_SHIFT | flags);
    }
    return 0;
}

int shi_mmap(struct shi_self *self, const struct shi_vm_view *v, uint32_t mm, uint64_t *addr,
             uint64_t bytes, uint32_t prot, const struct shi_flusher *by)
{
    uint64_t at = *addr, pages = pages_of(bytes);
    if (prot & ~(SHI_PROT_READ | SHI_PROT_WRITE))
        return -EINVAL;
    int err = check(v, mm, at ? at : mm ? MMAP_START : SHI_MM_KERNEL_START, bytes, -ENOMEM);
    if (err || (!at && !(at = get_unmapped_area(v, mm, pages << SHI_MM_PAGE_SHIFT))))
        return err ? err : -ENOMEM;
    if (find(v, mm, at, at + (pages << SHI_MM_PAGE_SHIFT), false) !=
        at + (pages << SHI_MM_PAGE_SHIFT))
        return -EEXIST;
    if (pages >= v->nframes)
        return -ENOMEM;
    err = map(v, mm, at, pages, flags_of(mm, prot));
    if (err) {
        int undone = unmap(self, v, mm, at, pages, by);
        /* What waits to be free may be enough. */
        if (!undone && shi_mm_reclaim(self, v, by) > 0)
            err = map(v, mm, at, pages, flags_of(mm, prot));
        if (err && !undone)
            undone = unmap(self, v, mm, at, pages, by);
        err = undone ? undone : err;
    }
    if (!err)
        *addr = at;
    return err;
}

int shi_mprotect(struct shi_self *self, const struct shi_vm_view *v, uint32_t mm, uint64_t addr,
                 uint64_t bytes, uint32_t prot, const struct shi_flusher *by)
{
    uint64_t pages = pages_of(bytes), end = addr + (pages << SHI_MM_PAGE_SHIFT), at;
    uint64_t flags = flags_of(mm, prot);
    bool narrowed = false;
    if (prot & ~(SHI_PROT_READ | SHI_PROT_WRITE))
        return -EINVAL;
    int err = check(v, mm, addr, bytes, -ENOMEM);
    if (!err && find(v, mm, addr, end, true) != end)
        err = -ENOMEM;
    if (!err)
        err = shi_flush_tlb_batched_pending(self, v, mm, by);
    for (at = addr; !err && at != end; at += SHI_MM_PAGE) {
        shi_a64 *pte = shi_walk(v, mm, at);
        uint64_t old = pte ? shi_load_relaxed(pte) : 0, next;
        do {
            next = (old & (SHI_PTE_ACCESSED | SHI_PTE_DIRTY)) | (old & ~SHI_PTE_FLAGS) | flags;
        } while (pte && !shi_cas_full(pte, &old, next));
        /* What is wider now is found by the walk of who is refused (a spurious fault). */
        narrowed |= (old & ~next & (SHI_PTE_PRESENT | SHI_PTE_WRITE)) != 0;
    }
    if (!err && narrowed)
        err = flush_range(self, v, mm, addr, pages, false, by);
    return err;
}

int64_t shi_mm_access(const struct shi_vm_view *v, uint32_t mm, uint64_t addr, void *data,
                      uint64_t bytes, bool write)
{
    char *out = data;
    uint64_t at = 0;
    while (at < bytes) {
        uint64_t here = SHI_MM_PAGE - ((addr + at) & (SHI_MM_PAGE - 1));
        const shi_a64 *pte = shi_addr_canonical(addr + at) ? shi_walk(v, mm, addr + at) : NULL;
        uint64_t frame = pte ? shi_load_acquire(pte) >> SHI_MM_PAGE_SHIFT : 0;
        if (!frame || frame >= v->nframes)
            break;
        if (here > bytes - at)
            here = bytes - at;
        char *page = shi_frame_at(v, (uint32_t)frame) + ((addr + at) & (SHI_MM_PAGE - 1));
        if (write)
            memcpy(page, out + at, here);
        else
            memcpy(out + at, page, here);
        at += here;
    }
    return (int64_t)at;
}

/* ---- reclaim ---------------------------------------------------------------------------------------- */

int shi_try_to_unmap(struct shi_self *self, const struct shi_vm_view *v, uint32_t mm,
                     uint64_t addr, uint64_t bytes, const struct shi_flusher *by)
{
    struct pages gone;
    int err = check(v, mm, addr, bytes, -EINVAL);
    (void)by;
    if (err || !mm)
        return err ? err : -EINVAL;
    if (!room_for(&gone, v, pages_of(bytes)))
        return -ENOMEM;
    zap(self, v, mm, addr, addr + (pages_of(bytes) << SHI_MM_PAGE_SHIFT), true, &gone);
    free(gone.list);
    if (gone.n) {
        shi_tlb_batch_add(self, v, mm);
        shi_tlb_event(&v->cpus[self->id], SHI_TE_batched, gone.n);
    }
    return (int)gone.n;
}

int shi_try_to_unmap_flush(struct shi_self *self, const struct shi_vm_view *v,
                           const struct shi_flusher *by)
{
    uint64_t held = shi_frame_word(SHI_FR_HELD, self->id, self->gen, 0);
    uint32_t batch = (shi_fetch_add_relaxed(&v->vm->batches, 1) + 1) & 0xffff, i, n = 0;
    uint64_t mine = shi_frame_word(SHI_FR_HELD, self->id, self->gen, batch ? batch : 1);
    for (i = 1; i < v->nframes; i++)
        if (shi_load_relaxed(&v->frames[i]) == held) {
            shi_store_relaxed(&v->frames[i], mine);
            n++;
        }
    int err = shi_tlb_batch_flush(self, v, by);
    for (i = 1; n && i < v->nframes; i++)
        if (shi_load_relaxed(&v->frames[i]) == mine) {
            if (err)
                shi_store_relaxed(&v->frames[i], held);
            else
                shi_frame_put(v, i);
        }
    return err ? err : (int)n;
}

/* ---- address spaces ------------------------------------------------------------------------------------ */

/* All that is this mm's and that its page tables do not lead to: into limbo. */
static uint32_t sweep(const struct shi_vm_view *v, uint32_t mm, const uint8_t *seen)
{
    uint32_t i, n = 0;
    for (i = 1; i < v->nframes; i++) {
        uint64_t w = shi_load_relaxed(&v->frames[i]);
        if (seen[i] || !owned(w, mm))
            continue;
        bool table = shi_frame_state(w) == SHI_FR_TABLE ||
                     shi_frame_state(w) == SHI_FR_TABLE_LIMBO;
        shi_store_release(&v->frames[i],
                          shi_frame_word(table ? SHI_FR_TABLE_LIMBO : SHI_FR_LIMBO, mm, 0, 0));
        n++;
    }
    return n;
}

int shi_mm_recover(struct shi_self *self, const struct shi_vm_view *v, uint32_t mm,
                   const struct shi_flusher *by)
{
    struct pages none = { NULL, 0 };
    uint8_t *seen = calloc(1, v->nframes);
    if (!seen)
        return -ENOMEM;
    shi_mark(v, mm, seen);
    uint32_t n = sweep(v, mm, seen);
    free(seen);
    shi_fetch_add_relaxed(&v->vm->torn_found, 1);
    shi_fetch_add_relaxed(&v->vm->frames_found, n);
    /* He may have been killed with a flush under way for what is in the page tables still
     * (mprotect), too. */
    shi_store_relaxed(&v->mms[mm].stuck, 1);
    return finish(self, v, mm, 0, SHI_FLUSH_ALL, &none, true, by);
}

int shi_mm_make(struct shi_self *self, const struct shi_vm_view *v, uint32_t mm,
                const char *name)
{
    struct shi_mm *of = &v->mms[mm];
    (void)self;
    if (shi_load_acquire(&of->ctx_id))
        return -EEXIST;
    uint32_t pgd = shi_load_relaxed(&of->pgd); /* of one who was killed right here */
    if (!pgd && !(pgd = shi_frame_get(v, SHI_FR_TABLE, mm)))
        return -ENOMEM;
    shi_store_relaxed(&of->pgd, pgd);
    shi_store_relaxed(&of->tlb_gen, 1);
    shi_store_relaxed(&of->membarrier_state, 0);
    shi_store_relaxed(&of->tlb_flush_batched, 0);
    shi_store_relaxed(&of->next_trim_ns, 0);
    shi_store_relaxed(&of->mmap_base, MMAP_START);
    strncpy(of->name, name, sizeof of->name - 1);
    of->name[sizeof of->name - 1] = 0;
    shi_store_full(&of->ctx_id, shi_fetch_add_full(&v->vm->next_ctx_id, 1));
    return 0;
}

int shi_mm_end(struct shi_self *self, const struct shi_vm_view *v, uint32_t mm,
               const struct shi_flusher *by)
{
    struct shi_mm *of = &v->mms[mm];
    struct pages none = { NULL, 0 };
    uint8_t *seen = calloc(1, v->nframes);
    uint32_t i;
    if (!seen)
        return -ENOMEM;
    /* Full, before the rows: who begins to use it looks here after it has said so. */
    uint64_t ctx_id = shi_xchg_full(&of->ctx_id, 0);
    for (i = 0; i < self->m->ncpus; i++) {
        const struct shi_tlb_cpu *row = &v->cpus[i];
        uint64_t w = shi_load_full(&shi_slot(self->m, i)->word);
        if (shi_load_full(&row->mm) == mm && shi_word_state(w) != SHI_DEAD &&
            (uint16_t)shi_load_full(&row->gen) == shi_word_gen(w)) {
            shi_store_full(&of->ctx_id, ctx_id);
            free(seen);
            return -EBUSY;
        }
    }
    shi_store_full(&of->pgd, 0);
    sweep(v, mm, seen);
    free(seen);
    shi_store_relaxed(&of->stuck, 1);
    return finish(self, v, mm, 0, SHI_FLUSH_ALL, &none, true, by);
}
