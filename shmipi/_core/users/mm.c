/* SPDX-License-Identifier: MIT */
#include "base/sys.h"

#include <errno.h>
#include <string.h>

#include "users/mm.h"

/* ---- where everything is ------------------------------------------------------------ */

static uint64_t round_up(uint64_t n)
{
    return (n + SHI_PAIR - 1) / SHI_PAIR * SHI_PAIR;
}

static uint32_t mask_words(const struct shi_machine *m)
{
    return (m->ncpus + 63) / 64;
}

/* Offsets of the five parts behind the head, and of the end. */
struct plan {
    uint64_t cpus, mms, masks, frames, memory, end;
};

static struct plan plan(const struct shi_machine *m, uint32_t nframes)
{
    struct plan p;
    p.cpus = round_up(sizeof(struct shi_vm));
    p.mms = p.cpus + sizeof(struct shi_tlb_cpu) * m->nslots;
    p.masks = p.mms + sizeof(struct shi_mm) * SHI_MMS;
    p.frames = round_up(p.masks + (uint64_t)(SHI_MMS + m->nslots) * mask_words(m) * 8);
    p.memory = round_up(p.frames + (uint64_t)nframes * 8);
    p.end = p.memory + ((uint64_t)nframes << SHI_MM_PAGE_SHIFT);
    return p;
}

uint64_t shi_vm_bytes(const struct shi_machine *m, uint32_t nframes)
{
    return plan(m, nframes).end;
}

bool shi_vm_view(const struct shi_machine *m, struct shi_vm_view *v)
{
    struct shi_vm *vm = shi_user(m, SHI_USER_tlb, sizeof *vm);
    uint32_t nframes = vm ? vm->nframes : 0;
    if (!nframes || nframes > SHI_MM_FRAMES_MAX || vm->nslots != m->nslots)
        return false;
    struct plan p = plan(m, nframes);
    char *base = shi_user(m, SHI_USER_tlb, p.end);
    if (!base)
        return false;
    v->vm = vm;
    v->cpus = (struct shi_tlb_cpu *)(base + p.cpus);
    v->mms = (struct shi_mm *)(base + p.mms);
    v->masks = (shi_a64 *)(base + p.masks);
    v->frames = (shi_a64 *)(base + p.frames);
    v->memory = base + p.memory;
    v->nframes = nframes;
    v->mask_words = mask_words(m);
    return true;
}

int shi_vm_init(const struct shi_machine *m, uint32_t nframes)
{
    struct shi_vm_view v;
    struct shi_vm *vm = shi_user(m, SHI_USER_tlb, sizeof *vm);
    if (vm && vm->nframes)
        return 0; /* another host was first */
    if (nframes < 2 || nframes > SHI_MM_FRAMES_MAX ||
        !shi_user(m, SHI_USER_tlb, plan(m, nframes).end))
        return -EINVAL;
    vm->nslots = m->nslots;
    shi_store_relaxed(&vm->ceiling, SHI_MM_CEILING);
    shi_store_relaxed(&vm->next_ctx_id, 2);
    vm->nframes = nframes;
    if (!shi_vm_view(m, &v))
        return -EINVAL;
    struct shi_mm *init = &v.mms[0];
    strcpy(init->name, "init_mm");
    shi_store_relaxed(&init->mmap_base, SHI_MM_KERNEL_START);
    shi_store_relaxed(&init->tlb_gen, 1);
    shi_store_relaxed(&init->pgd, shi_frame_get(&v, SHI_FR_TABLE, 0));
    shi_store_release(&init->ctx_id, 1);
    return 0;
}

/* ---- frames -------------------------------------------------------------------------- */

uint32_t shi_frame_get(const struct shi_vm_view *v, enum shi_frame_state state, uint32_t owner)
{
    uint32_t at = shi_load_relaxed(&v->vm->hint), i;
    for (i = 0; i < v->nframes; i++, at++) {
        uint64_t found = 0;
        if (at >= v->nframes)
            at = 0;
        /* One swap takes it and says whose it is: who is killed next leaves nothing that a
         * look at the owner's page tables does not find (shi_mark).  Frame 0 is none. */
        if (at && !shi_load_relaxed(&v->frames[at]) &&
            shi_cas_full(&v->frames[at], &found, shi_frame_word(state, owner, 0, 0))) {
            shi_store_relaxed(&v->vm->hint, at + 1);
            memset(shi_frame_at(v, at), 0, SHI_MM_PAGE);
            return at;
        }
    }
    return 0;
}

/* ---- page tables ---------------------------------------------------------------------- */

static uint32_t index_at(uint64_t addr, uint32_t level)
{
    return (uint32_t)(addr >> (SHI_MM_PAGE_SHIFT + 9 * (SHI_MM_LEVELS - 1 - level))) &
           (SHI_MM_ENTRIES - 1);
}

static shi_a64 *table(const struct shi_vm_view *v, uint32_t frame)
{
    return (shi_a64 *)shi_frame_at(v, frame);
}

/* The frame that an entry leads to, 0: none, or damaged. */
static uint32_t frame_of(const struct shi_vm_view *v, uint64_t entry)
{
    uint64_t frame = entry >> SHI_MM_PAGE_SHIFT;
    return entry & (SHI_PTE_PRESENT | SHI_PTE_PROTNONE) && frame < v->nframes ? (uint32_t)frame
                                                                              : 0;
}

static uint32_t pgd_of(const struct shi_vm_view *v, uint32_t mm)
{
    uint32_t pgd = shi_load_acquire(&v->mms[mm].pgd);
    return pgd < v->nframes ? pgd : 0;
}

shi_a64 *shi_walk(const struct shi_vm_view *v, uint32_t mm, uint64_t addr)
{
    uint32_t frame = pgd_of(v, mm), level;
    for (level = 0; frame && level < SHI_MM_LEVELS - 1; level++)
        /* Acquire: pairs with the release that linked it; its zeros stand before that. */
        frame = frame_of(v, shi_load_acquire(&table(v, frame)[index_at(addr, level)]));
    return frame ? &table(v, frame)[index_at(addr, level)] : NULL;
}

/* The table that an entry is in counts one more, or one less.  The lock's holder alone does. */
static uint32_t count_entry(const struct shi_vm_view *v, const shi_a64 *entry, int more)
{
    size_t frame = (size_t)((const char *)entry - v->memory) >> SHI_MM_PAGE_SHIFT;
    uint64_t w = shi_load_relaxed(&v->frames[frame]);
    uint32_t n = shi_frame_entries(w) + (uint32_t)more;
    shi_store_relaxed(&v->frames[frame],
                      shi_frame_word(shi_frame_state(w), shi_frame_owner(w), 0, n & 0xffff));
    return n & 0xffff;
}

shi_a64 *shi_walk_alloc(const struct shi_vm_view *v, uint32_t mm, uint64_t addr)
{
    uint32_t frame = pgd_of(v, mm), level;
    for (level = 0; frame && level < SHI_MM_LEVELS - 1; level++) {
        shi_a64 *entry = &table(v, frame)[index_at(addr, level)];
        uint32_t next = frame_of(v, shi_load_acquire(entry));
        if (!next) {
            next = shi_frame_get(v, SHI_FR_TABLE, mm);
            if (!next)
                return NULL;
            shi_store_release(entry, (uint64_t)next << SHI_MM_PAGE_SHIFT | SHI_PTE_PRESENT);
            count_entry(v, entry, 1);
        }
        frame = next;
    }
    return frame ? &table(v, frame)[index_at(addr, level)] : NULL;
}

void shi_pte_set(const struct shi_vm_view *v, shi_a64 *pte, uint64_t value)
{
    /* Release: the page's first content is seen by who finds it. */
    shi_store_release(pte, value);
    count_entry(v, pte, 1);
}

uint64_t shi_pte_clear(const struct shi_vm_view *v, shi_a64 *pte)
{
    /* ptep_get_and_clear: a CPU that notes ACCESSED or DIRTY does so with a compare-and-swap,
     * and finds it gone. */
    uint64_t old = shi_xchg_full(pte, 0);
    if (old)
        count_entry(v, pte, -1);
    return old;
}

uint32_t shi_free_tables(const struct shi_vm_view *v, uint32_t mm, uint64_t addr, uint32_t *out)
{
    shi_a64 *entries[SHI_MM_LEVELS];
    uint32_t frames[SHI_MM_LEVELS], frame = pgd_of(v, mm), level, n = 0;
    for (level = 0; frame && level < SHI_MM_LEVELS; level++) {
        frames[level] = frame;
        entries[level] = &table(v, frame)[index_at(addr, level)];
        frame = level < SHI_MM_LEVELS - 1 ? frame_of(v, shi_load_acquire(entries[level])) : 0;
    }
    while (level-- > 1) {
        if (shi_frame_entries(shi_load_relaxed(&v->frames[frames[level]])))
            break;
        shi_store_full(entries[level - 1], 0);
        shi_store_release(&v->frames[frames[level]],
                          shi_frame_word(SHI_FR_TABLE_LIMBO, mm, 0, 0));
        count_entry(v, entries[level - 1], -1);
        out[n++] = frames[level];
    }
    return n;
}

static void mark_table(const struct shi_vm_view *v, uint32_t mm, uint32_t frame, uint32_t level,
                       uint8_t *seen)
{
    uint32_t i, n = 0;
    if (seen[frame])
        return; /* damaged: twice */
    seen[frame] = 1;
    for (i = 0; i < SHI_MM_ENTRIES; i++) {
        uint32_t next = frame_of(v, shi_load_acquire(&table(v, frame)[i]));
        if (!next)
            continue;
        n++;
        if (level < SHI_MM_LEVELS - 1) {
            mark_table(v, mm, next, level + 1, seen);
        } else {
            seen[next] = 1;
            shi_store_relaxed(&v->frames[next], shi_frame_word(SHI_FR_PAGE, mm, 0, 0));
        }
    }
    shi_store_relaxed(&v->frames[frame], shi_frame_word(SHI_FR_TABLE, mm, 0, n));
}

void shi_mark(const struct shi_vm_view *v, uint32_t mm, uint8_t *seen)
{
    uint32_t pgd = pgd_of(v, mm);
    if (pgd)
        mark_table(v, mm, pgd, 0, seen);
}
