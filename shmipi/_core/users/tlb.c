/* SPDX-License-Identifier: MIT */
#include "base/sys.h"

#include <errno.h>
#include <signal.h>
#include <string.h>

#include "base/clock.h"
#include "base/native.h"
#include "base/rules.h"
#include "base/step.h"
#include "smp/entry.h"
#include "users/each.h"
#include "users/tlb.h"

/* ---- the TLB of this process --------------------------------------------------------- */

#define ENTRIES 512u
#define TAG_SHIFT 36 /* above the number of a virtual page: which context */
#define VPN_MASK ((1ull << TAG_SHIFT) - 1)
#define CONTEXTS (1ull << (64 - TAG_SHIFT))

struct entry {
    uint64_t load, store; /* tags: what it may be used for; 0: for nothing */
    char *page;
    uint64_t unused;
};

/* One CPU a process.  A CPU's process is new where its CPU has died: so is its TLB. */
static struct {
    struct shi_vm_view v;
    struct shi_tlb_cpu *row; /* NULL: not begun */
    /* Contexts: a flush of all of one gives it a new number, which no entry has. */
    uint64_t contexts; /* the last that was given out */
    uint64_t of_asid[SHI_MM_ASIDS];
    uint64_t user, kernel; /* of the loads and stores now */
    struct entry entries[ENTRIES];
} tlb;

#define NO_CONTEXT 1ull /* no entry has it: there is no user half */

/* They come round: without entries, all may have new ones. */
static void renumber(void)
{
    bool user = tlb.user != NO_CONTEXT;
    uint32_t asid;
    memset(tlb.entries, 0, sizeof tlb.entries);
    tlb.contexts = NO_CONTEXT;
    for (asid = 0; asid < SHI_MM_ASIDS; asid++)
        tlb.of_asid[asid] = ++tlb.contexts;
    tlb.kernel = ++tlb.contexts;
    if (user)
        tlb.user = tlb.of_asid[shi_load_relaxed(&tlb.row->asid) % SHI_MM_ASIDS];
}

static uint64_t new_context(void)
{
    if (tlb.contexts + 1 == CONTEXTS)
        renumber();
    return ++tlb.contexts;
}

static inline struct entry *entry_of(uint64_t addr)
{
    return &tlb.entries[(addr >> SHI_MM_PAGE_SHIFT) % ENTRIES];
}

static inline uint64_t tag_of(uint64_t addr)
{
    uint64_t context = (int64_t)addr < 0 ? tlb.kernel : tlb.user;
    return context << TAG_SHIFT | (addr >> SHI_MM_PAGE_SHIFT & VPN_MASK);
}

/* invlpg: this page, of what is loaded and of the kernel. */
static void flush_one(uint64_t addr)
{
    struct entry *e = entry_of(addr);
    uint64_t tag = tag_of(addr);
    if (e->load == tag)
        e->load = e->store = 0;
}

static void flush_asid(uint32_t asid)
{
    tlb.of_asid[asid] = new_context();
}

/* write_cr3: all of the address space that is loaded; the kernel's pages are global. */
static void flush_local(void)
{
    uint32_t asid = shi_load_relaxed(&tlb.row->asid) % SHI_MM_ASIDS;
    flush_asid(asid);
    if (tlb.user != NO_CONTEXT)
        tlb.user = tlb.of_asid[asid];
}

static void flush_everything(void)
{
    uint32_t asid;
    for (asid = 0; asid < SHI_MM_ASIDS; asid++) {
        shi_store_relaxed(&tlb.row->ctxs[asid].ctx_id, 0);
        shi_store_relaxed(&tlb.row->ctxs[asid].tlb_gen, 0);
        flush_asid(asid);
    }
    tlb.kernel = new_context();
}

/* initialize_tlbstate_and_flush: what stands in the row is a dead process's. */
static bool begin(struct shi_self *self)
{
    uint32_t mm;
    if (!shi_vm_view(self->m, &tlb.v))
        return false;
    struct shi_tlb_cpu *row = &tlb.v.cpus[self->id];
    uint64_t bit = 1ull << (self->id % 64);
    shi_store_full(&row->loaded_mm, 0);
    shi_store_full(&row->mm, 0);
    shi_store_full(&row->is_lazy, 0);
    shi_store_relaxed(&row->membarrier_state, 0);
    shi_store_relaxed(&row->asid, 0);
    shi_store_relaxed(&row->next_asid, 1);
    shi_store_relaxed(&row->flush_required, 0);
    for (mm = 1; mm < SHI_MMS; mm++)
        if (shi_load_relaxed(&shi_mm_cpumask(&tlb.v, mm)[self->id / 64]) & bit)
            shi_fetch_and_full(&shi_mm_cpumask(&tlb.v, mm)[self->id / 64], ~bit);
    tlb.row = row;
    tlb.contexts = tlb.user = NO_CONTEXT;
    flush_everything();
    shi_store_full(&row->stale, 0);
    shi_store_full(&row->gen, self->gen);
    return true;
}

static inline bool ready(struct shi_self *self)
{
    return __builtin_expect(tlb.row != NULL, 1) || begin(self);
}

struct shi_tlb_cpu *shi_tlb_row(struct shi_self *self)
{
    shi_enter(self);
    struct shi_tlb_cpu *row = !self->host && ready(self) ? tlb.row : NULL;
    shi_leave(self);
    return row;
}

/* ---- switch_mm ------------------------------------------------------------------------- */

/* choose_new_asid(): true where its entries are not right any more, or another's. */
static bool choose_asid(const struct shi_mm *next, uint64_t next_gen, uint32_t *asid)
{
    struct shi_tlb_cpu *row = tlb.row;
    uint64_t ctx_id = shi_load_relaxed(&next->ctx_id);
    uint32_t i;
    for (i = 0; i < SHI_MM_ASIDS; i++)
        if (shi_load_relaxed(&row->ctxs[i].ctx_id) == ctx_id) {
            *asid = i;
            return shi_load_relaxed(&row->ctxs[i].tlb_gen) < next_gen;
        }
    i = shi_load_relaxed(&row->next_asid) % SHI_MM_ASIDS;
    shi_store_relaxed(&row->next_asid, i + 1);
    *asid = i;
    return true;
}

/* switch_mm_irqs_off().  0 is init_mm, which has no user half. */
static void switch_mm(struct shi_self *self, uint32_t next)
{
    struct shi_tlb_cpu *row = tlb.row;
    const struct shi_mm *mm = &tlb.v.mms[next];
    uint32_t prev = shi_load_relaxed(&row->loaded_mm),
             asid = shi_load_relaxed(&row->asid) % SHI_MM_ASIDS;
    bool was_lazy = shi_load_relaxed(&row->is_lazy), need_flush;
    uint64_t gen;
    /*
     * Full, and before the load of tlb_gen: who flushes adds to tlb_gen first and looks at
     * is_lazy second, so either it sees that this CPU is not lazy, or its new generation is
     * seen here.
     */
    if (was_lazy)
        shi_xchg_full(&row->is_lazy, 0);
    if (prev == next) {
        if (!was_lazy)
            return;
        gen = shi_load_full(&mm->tlb_gen);
        need_flush = shi_load_relaxed(&row->ctxs[asid].tlb_gen) != gen &&
                     !shi_rule_off(self->m, SHI_RULE_tlb_lazy);
        shi_tlb_event(row, need_flush ? SHI_TE_lazy_stale : SHI_TE_lazy_fresh, 1);
    } else {
        uint64_t bit = 1ull << (self->id % 64);
        shi_a64 *mask = &shi_mm_cpumask(&tlb.v, next)[self->id / 64];
        /* The same with loaded_mm: from here on who flushes prev or next sends to this CPU
         * (should_flush_tlb), or its generation is seen below. */
        shi_xchg_full(&row->loaded_mm, SHI_MM_SWITCHING);
        if (next && !(shi_load_full(mask) & bit))
            shi_fetch_or_full(mask, bit);
        SHI_STEP(self, switch_mm);
        gen = shi_load_full(&mm->tlb_gen);
        need_flush = choose_asid(mm, gen, &asid);
        shi_tlb_event(row, need_flush ? SHI_TE_switch_flushed : SHI_TE_switch_kept, 1);
    }
    if (need_flush) {
        shi_store_relaxed(&row->ctxs[asid].ctx_id, shi_load_relaxed(&mm->ctx_id));
        shi_store_relaxed(&row->ctxs[asid].tlb_gen, gen);
        flush_asid(asid);
    }
    shi_store_relaxed(&row->asid, asid);
    tlb.user = next ? tlb.of_asid[asid] : NO_CONTEXT; /* CR3 before loaded_mm */
    shi_store_full(&row->loaded_mm, next);
}

/* enter_lazy_tlb(): a kernel thread runs, and has no user half; what was loaded stays. */
static void enter_lazy(void)
{
    if (!shi_load_relaxed(&tlb.row->loaded_mm))
        return; /* init_mm: nothing to be lazy about */
    tlb.user = NO_CONTEXT;
    shi_store_full(&tlb.row->is_lazy, 1);
}

int shi_mm_use(struct shi_self *self, uint32_t mm)
{
    int err = 0;
    shi_enter(self);
    if (!ready(self)) {
        err = -ENXIO;
    } else if (mm >= SHI_MMS || (mm && !shi_load_acquire(&tlb.v.mms[mm].ctx_id))) {
        err = -EINVAL;
    } else {
        struct shi_tlb_cpu *row = tlb.row;
        bool registers = mm != 0;
        uint32_t state = registers ? shi_load_relaxed(&tlb.v.mms[mm].membarrier_state) : 0;
        /* membarrier_update_current_mm; then current->mm with a full barrier before it, for
         * what the last task did, and behind it, for what the next one does (membarrier.c's
         * scenario E). */
        shi_store_relaxed(&row->membarrier_state, state);
        shi_xchg_full(&row->mm, mm);
        if (mm && !shi_load_full(&tlb.v.mms[mm].ctx_id)) {
            /* It is being taken away: who does that looks at row->mm behind ctx_id. */
            shi_store_full(&row->mm, 0);
            mm = 0;
            err = -EINVAL;
        }
        self->has_mm = mm != 0;
        if (mm) {
            switch_mm(self, mm);
            /* A registration since: it looks at row->mm before it writes to the row. */
            if (registers)
                shi_store_relaxed(&row->membarrier_state,
                                  shi_load_full(&tlb.v.mms[mm].membarrier_state));
        } else {
            enter_lazy();
        }
    }
    shi_leave(self);
    return err;
}

uint32_t shi_mm_current(struct shi_self *self)
{
    return self->has_mm && tlb.row ? shi_load_relaxed(&tlb.row->mm) : 0;
}

void shi_mm_idle(struct shi_self *self, enum shi_mm_idle what)
{
    uint32_t mm = shi_mm_current(self);
    if (!mm)
        return;
    if (what == SHI_MM_EXIT) {
        shi_mm_use(self, 0); /* exit_mm */
        return;
    }
    shi_enter(self);
    if (what == SHI_MM_SLEEPS)
        enter_lazy();
    else
        switch_mm(self, mm);
    shi_leave(self);
}

/* ---- loads and stores ---------------------------------------------------------------------- */

/* It was offline when a flush passed it by: nothing here is right. */
static void was_offline(struct shi_self *self)
{
    struct shi_tlb_cpu *row = tlb.row;
    uint32_t mm = shi_load_relaxed(&row->mm);
    bool lazy = shi_load_relaxed(&row->is_lazy);
    shi_tlb_event(row, SHI_TE_was_offline, 1);
    shi_store_full(&row->is_lazy, 0);
    shi_store_full(&row->loaded_mm, 0);
    tlb.user = NO_CONTEXT;
    flush_everything();
    if (mm && !lazy)
        switch_mm(self, mm);
}

static int fault_at(struct shi_fault *fault, uint64_t addr, bool write, bool mapped)
{
    fault->addr = addr;
    fault->write = write;
    fault->si_code = mapped ? SEGV_ACCERR : SEGV_MAPERR;
    if (tlb.row)
        shi_tlb_event(tlb.row, SHI_TE_faults, 1);
    return -EFAULT;
}

/* A miss, or an entry that does not allow it: the walk.  The page, or NULL and a fault. */
static char *walk(struct shi_self *self, uint64_t addr, bool write, struct shi_fault *fault)
{
    if (shi_load_full(&tlb.row->stale) && shi_xchg_full(&tlb.row->stale, 0))
        was_offline(self);
    bool kernel = shi_addr_kernel(addr);
    uint32_t mm = kernel ? 0 : shi_load_relaxed(&tlb.row->loaded_mm);
    shi_a64 *pte = NULL;
    uint64_t found = 0, noted;
    shi_tlb_event(tlb.row, SHI_TE_walks, 1);
    if (shi_addr_canonical(addr) && (kernel || tlb.user != NO_CONTEXT) && mm < SHI_MMS)
        pte = shi_walk(&tlb.v, mm, addr);
    if (pte)
        found = shi_load_acquire(pte);
    do {
        if (!(found & SHI_PTE_PRESENT) || (write && !(found & SHI_PTE_WRITE)) ||
            found >> SHI_MM_PAGE_SHIFT >= tlb.v.nframes) {
            fault_at(fault, addr, write, found != 0);
            return NULL;
        }
        /* As hardware does, in one access: never into an entry that is gone meanwhile. */
        noted = found | SHI_PTE_ACCESSED | (write ? SHI_PTE_DIRTY : 0);
    } while (noted != found && !shi_cas_full(pte, &found, noted));
    struct entry *e = entry_of(addr);
    e->page = shi_frame_at(&tlb.v, (uint32_t)(noted >> SHI_MM_PAGE_SHIFT));
    e->load = tag_of(addr);
    /* A store into a clean page has to come here, to note it. */
    e->store = noted & SHI_PTE_WRITE && noted & SHI_PTE_DIRTY ? e->load : 0;
    return e->page;
}

/* Where `addr` is, with interrupts masked. */
static inline char *translate(struct shi_self *self, uint64_t addr, bool write,
                              struct shi_fault *fault)
{
    const struct entry *e = entry_of(addr);
    /* stale: who takes this CPU for offline stores it and then looks at its state again, and
     * who comes online has stored that before it looks here. */
    char *page = __builtin_expect((write ? e->store : e->load) == tag_of(addr), 1) &&
                         !shi_load_relaxed(&tlb.row->stale)
                     ? e->page
                     : walk(self, addr, write, fault);
    return page ? page + (addr & (SHI_MM_PAGE - 1)) : NULL;
}

/* A process without a TLB has nothing mapped. */
static int not_here(struct shi_self *self, uint64_t addr, bool write, struct shi_fault *fault)
{
    return self->host || !ready(self) ? -ENXIO : fault_at(fault, addr, write, false);
}

int shi_tlb_load(struct shi_self *self, uint64_t addr, uint64_t *value, struct shi_fault *fault)
{
    int err = 0;
    if (addr % sizeof *value)
        return shi_tlb_copy(self, addr, value, sizeof *value, false, &(uint64_t){ 0 }, fault);
    shi_enter(self);
    if (__builtin_expect(!tlb.row, 0) && (self->host || !ready(self))) {
        err = -ENXIO;
    } else {
        const char *at = translate(self, addr, false, fault);
        if (__builtin_expect(at != NULL, 1))
            *value = shi_load_relaxed((const shi_a64 *)at);
        else
            err = -EFAULT;
    }
    shi_leave(self);
    return err;
}

int shi_tlb_store(struct shi_self *self, uint64_t addr, uint64_t value, struct shi_fault *fault)
{
    int err = 0;
    if (addr % sizeof value)
        return shi_tlb_copy(self, addr, &value, sizeof value, true, &(uint64_t){ 0 }, fault);
    shi_enter(self);
    if (__builtin_expect(!tlb.row, 0) && (self->host || !ready(self))) {
        err = -ENXIO;
    } else {
        char *at = translate(self, addr, true, fault);
        if (__builtin_expect(at != NULL, 1))
            shi_store_relaxed((shi_a64 *)at, value);
        else
            err = -EFAULT;
    }
    shi_leave(self);
    return err;
}

int shi_tlb_copy(struct shi_self *self, uint64_t addr, void *data, uint64_t bytes, bool write,
                 uint64_t *done, struct shi_fault *fault)
{
    char *out = data;
    uint64_t at = 0;
    int err = 0;
    while (at < bytes && !err) {
        uint64_t here = SHI_MM_PAGE - ((addr + at) & (SHI_MM_PAGE - 1));
        if (here > bytes - at)
            here = bytes - at;
        shi_enter(self); /* a page at a time, as interrupts come between instructions */
        if (self->host || !ready(self)) {
            err = not_here(self, addr + at, write, fault);
        } else {
            char *page = translate(self, addr + at, write, fault);
            if (!page)
                err = -EFAULT;
            else if (write)
                memcpy(page, out + at, here);
            else
                memcpy(out + at, page, here);
        }
        shi_leave(self);
        if (!err)
            at += here;
    }
    *done = at;
    return err;
}

/* ---- flush_tlb_func -------------------------------------------------------------------------- */

#define NO_GENERATION 0ull /* TLB_GENERATION_INVALID */

/* struct flush_tlb_info, small enough to travel inside the csd: nobody's that could die. */
struct info {
    uint64_t start, new_gen;
    uint32_t pages; /* SHI_FLUSH_ALL */
    uint16_t mm;    /* SHI_MM_NONE: whatever is loaded */
    uint8_t freed_tables, trim;
};
_Static_assert(sizeof(struct info) == SHI_INLINE, "flush_tlb_info travels in the csd");

/* Interrupts are off, or masked. */
static void flush_tlb_func(struct shi_self *self, const struct info *f, bool local)
{
    struct shi_tlb_cpu *row = tlb.row;
    uint32_t loaded = shi_load_relaxed(&row->loaded_mm), i;
    uint32_t asid = shi_load_relaxed(&row->asid) % SHI_MM_ASIDS;
    if (!local) {
        shi_count(self, SHI_C_irq_tlb);
        shi_tlb_event(row, SHI_TE_remote_flush_received, 1);
    }
    if (f->mm != SHI_MM_NONE && f->mm != loaded) {
        /* It was left in the mask when it went on to another mm, whose entries stay; of this
         * one's nothing is used before switch_mm has looked at its generation. */
        if (f->mm < SHI_MMS)
            shi_fetch_and_full(&shi_mm_cpumask(&tlb.v, f->mm)[self->id / 64],
                               ~(1ull << (self->id % 64)));
        shi_tlb_event(row, SHI_TE_wrong_mm, 1);
        return;
    }
    if (!loaded || loaded >= SHI_MMS)
        return; /* init_mm has no user half */
    if (shi_load_relaxed(&row->is_lazy)) {
        switch_mm(self, 0);
        shi_tlb_event(row, SHI_TE_lazy_left, 1);
        return;
    }
    uint64_t local_gen = shi_load_relaxed(&row->ctxs[asid].tlb_gen);
    if (f->new_gen != NO_GENERATION && f->new_gen <= local_gen) {
        shi_tlb_event(row, SHI_TE_up_to_date, 1);
        return;
    }
    /* Read before the flush, and no entry is made between the two: what is made later has
     * seen the page tables as of this generation. */
    uint64_t mm_gen = shi_load_full(&tlb.v.mms[loaded].tlb_gen);
    if (local_gen == mm_gen) {
        shi_tlb_event(row, SHI_TE_up_to_date, 1);
        return;
    }
    bool next_one = f->new_gen == local_gen + 1 && f->new_gen == mm_gen;
    if (f->pages != SHI_FLUSH_ALL &&
        (next_one || shi_rule_off(self->m, SHI_RULE_tlb_generation))) {
        for (i = 0; i < f->pages; i++)
            flush_one(f->start + ((uint64_t)i << SHI_MM_PAGE_SHIFT));
        shi_tlb_event(row, SHI_TE_partial, 1);
        if (local)
            shi_tlb_event(row, SHI_TE_local_flush_one, f->pages);
    } else {
        flush_local();
        shi_tlb_event(row, SHI_TE_full, 1);
        if (local)
            shi_tlb_event(row, SHI_TE_local_flush_all, 1);
    }
    shi_store_relaxed(&row->ctxs[asid].tlb_gen, mm_gen);
}

static void flush_kernel(const struct info *f)
{
    uint32_t i;
    if (f->pages == SHI_FLUSH_ALL) { /* do_flush_tlb_all: __flush_tlb_all */
        tlb.kernel = new_context();
        flush_local();
    }
    for (i = 0; f->pages != SHI_FLUSH_ALL && i < f->pages; i++)
        flush_one(f->start + ((uint64_t)i << SHI_MM_PAGE_SHIFT));
}

static void remote_flush(void *data)
{
    struct shi_self *self = shi_this_cpu();
    struct info f;
    if (!self || !ready(self))
        return;
    memcpy(&f, data, sizeof f);
    flush_tlb_func(self, &f, false);
}

static void remote_flush_kernel(void *data)
{
    struct shi_self *self = shi_this_cpu();
    struct info f;
    if (!self || !ready(self))
        return;
    memcpy(&f, data, sizeof f);
    flush_kernel(&f);
}

/* tlb_remove_table_smp_sync: the interrupt is all there is to it. */
static void table_sync(void *data)
{
    (void)data;
}

static int flush_handler, kernel_handler, sync_handler;

void shi_tlb_handlers(void)
{
    if (flush_handler)
        return;
    flush_handler = shi_native_register("flush_tlb_func", remote_flush);
    kernel_handler = shi_native_register("do_kernel_range_flush", remote_flush_kernel);
    sync_handler = shi_native_register("tlb_remove_table_smp_sync", table_sync);
}

/* ---- sending -------------------------------------------------------------------------------- */

struct flush {
    struct shi_self *self;
    const struct shi_vm_view *v;
    struct info f;
};

static struct shi_tlb_cpu *row_of(const struct shi_self *self, const struct shi_vm_view *v)
{
    return &v->cpus[self->id];
}

static bool should_flush_tlb(void *arg, uint32_t cpu)
{
    const struct flush *flush = arg;
    const struct shi_tlb_cpu *row = &flush->v->cpus[cpu];
    /* Acquire: is_lazy is at least as new as loaded_mm (the kernel's smp_rmb). */
    uint32_t loaded = shi_load_full(&row->loaded_mm);
    if (shi_load_full(&row->is_lazy))
        return false; /* it catches up in switch_mm */
    return flush->f.mm == SHI_MM_NONE || loaded == SHI_MM_SWITCHING || loaded == flush->f.mm ||
           flush->f.trim;
}

/*
 * A CPU that is offline is not sent to, and comes back with its entries.  It is told first, and
 * then it is looked at again whether it is online (shi_call_many does): it stores that first
 * and then looks at what it was told, so one of the two sees the other.
 */
static void tell_offline(const struct shi_self *self, const struct shi_vm_view *v,
                         const shi_a64 *mask)
{
    uint32_t cpu;
    for (cpu = 0; cpu < self->m->ncpus; cpu++)
        if ((!mask || shi_load_full(&mask[cpu / 64]) >> (cpu % 64) & 1) &&
            !shi_word_online(shi_load_full(&shi_slot(self->m, cpu)->word)))
            shi_xchg_full(&v->cpus[cpu].stale, 1);
}

static void flush_here(void *arg)
{
    struct flush *flush = arg;
    if (ready(flush->self))
        flush_tlb_func(flush->self, &flush->f, true);
}

static void flush_kernel_here(void *arg)
{
    struct flush *flush = arg;
    if (ready(flush->self))
        flush_kernel(&flush->f);
}

/* cpumask_any_but() */
static bool any_but(const struct shi_self *self, const struct shi_vm_view *v,
                    const shi_a64 *mask)
{
    uint32_t i;
    for (i = 0; i < v->mask_words; i++) {
        uint64_t bits = shi_load_full(&mask[i]);
        if (!self->host && self->id / 64 == i)
            bits &= ~(1ull << (self->id % 64));
        if (bits)
            return true;
    }
    return false;
}

/* native_flush_tlb_multi() */
static int flush_tlb_multi(struct flush *flush, const shi_a64 *mask,
                           const struct shi_flusher *by)
{
    struct shi_each each = { .native = flush_handler,
                             .renumber = by->renumber,
                             .info = &flush->f,
                             .mask = mask,
                             .cond = flush->f.freed_tables ? NULL : should_flush_tlb,
                             .local = flush_here,
                             .arg = flush,
                             .waiter = by->waiter,
                             .waiter_arg = by->arg };
    shi_tlb_event(row_of(flush->self, flush->v), SHI_TE_remote_flush, 1);
    tell_offline(flush->self, flush->v, mask);
    if (shi_rule_off(flush->self->m, SHI_RULE_tlb_shootdown)) {
        if (!flush->self->host) {
            shi_enter(flush->self);
            flush_here(flush);
            shi_leave(flush->self);
        }
        return 0;
    }
    return shi_each_cpu_native(flush->self, &each);
}

static void local_flush(struct flush *flush)
{
    shi_enter(flush->self);
    flush_here(flush);
    shi_leave(flush->self);
}

#define TRIM_NS 1000000000ull /* HZ */

static bool should_trim(struct shi_mm *mm)
{
    uint64_t now = shi_now_ns();
    if (now <= shi_load_relaxed(&mm->next_trim_ns))
        return false;
    shi_store_relaxed(&mm->next_trim_ns, now + TRIM_NS);
    return true;
}

static uint32_t up_to_ceiling(const struct shi_vm_view *v, uint32_t pages)
{
    return pages > shi_load_relaxed(&v->vm->ceiling) ? SHI_FLUSH_ALL : pages;
}

int shi_flush_tlb_mm_range(struct shi_self *self, const struct shi_vm_view *v, uint32_t mm,
                           uint64_t start, uint32_t pages, bool freed_tables,
                           const struct shi_flusher *by)
{
    struct shi_mm *of = &v->mms[mm];
    const shi_a64 *mask = shi_mm_cpumask(v, mm);
    /* inc_mm_tlb_gen: full, after the page tables were changed and before anybody's row is
     * looked at (switch_mm). */
    uint64_t new_gen = shi_fetch_add_full(&of->tlb_gen, 1) + 1;
    struct flush flush = {
        self, v, { start, new_gen, up_to_ceiling(v, pages), (uint16_t)mm, freed_tables, 0 }
    };
    if (any_but(self, v, mask)) {
        flush.f.trim = should_trim(of);
        return flush_tlb_multi(&flush, mask, by);
    }
    if (!self->host && shi_load_relaxed(&row_of(self, v)->loaded_mm) == mm)
        local_flush(&flush);
    return 0;
}

int shi_flush_tlb_kernel_range(struct shi_self *self, const struct shi_vm_view *v,
                               uint64_t start, uint32_t pages, const struct shi_flusher *by)
{
    struct flush flush = {
        self, v, { start, NO_GENERATION, up_to_ceiling(v, pages), SHI_MM_NONE, 0, 0 }
    };
    struct shi_each each = { .native = kernel_handler,
                             .renumber = by->renumber,
                             .info = &flush.f,
                             .local = flush_kernel_here,
                             .arg = &flush,
                             .waiter = by->waiter,
                             .waiter_arg = by->arg };
    tell_offline(self, v, NULL);
    return shi_each_cpu_native(self, &each);
}

int shi_tlb_remove_table_sync_one(struct shi_self *self, const struct shi_vm_view *v,
                                  const struct shi_flusher *by)
{
    struct info nothing = { 0 };
    struct shi_each each = { .native = sync_handler,
                             .renumber = by->renumber,
                             .info = &nothing,
                             .waiter = by->waiter,
                             .waiter_arg = by->arg };
    shi_tlb_event(row_of(self, v), SHI_TE_table_sync, 1);
    return shi_each_cpu_native(self, &each);
}

/* ---- batches --------------------------------------------------------------------------------- */

#define FLUSHED_SHIFT 16
#define PENDING_MASK ((1u << (FLUSHED_SHIFT - 1)) - 1)
#define PENDING_LARGE (PENDING_MASK / 2)

void shi_tlb_batch_add(struct shi_self *self, const struct shi_vm_view *v, uint32_t mm)
{
    struct shi_mm *of = &v->mms[mm];
    struct shi_tlb_cpu *row = row_of(self, v);
    uint32_t i, batch;
    /* Full, and before the mask is read: a CPU that is not in it yet sees the generation. */
    shi_fetch_add_full(&of->tlb_gen, 1);
    for (i = 0; i < v->mask_words; i++) {
        uint64_t bits = shi_load_full(&shi_mm_cpumask(v, mm)[i]);
        if (bits)
            shi_fetch_or_full(&shi_batch_cpumask(v, self->id)[i], bits);
    }
    shi_store_full(&row->flush_required, 1);
    batch = shi_load_relaxed(&of->tlb_flush_batched);
    do {
        /* `pending` never comes round to `flushed`. */
        i = (batch & PENDING_MASK) > PENDING_LARGE ? 1 : batch + 1;
    } while (!shi_cas_full(&of->tlb_flush_batched, &batch, i));
}

int shi_tlb_batch_flush(struct shi_self *self, const struct shi_vm_view *v,
                        const struct shi_flusher *by)
{
    struct shi_tlb_cpu *row = row_of(self, v);
    struct flush flush = { self, v, { 0, NO_GENERATION, SHI_FLUSH_ALL, SHI_MM_NONE, 0, 0 } };
    shi_a64 mask[SHI_MAX_CPUS / 64];
    uint32_t i;
    int err = 0;
    if (!shi_xchg_full(&row->flush_required, 0))
        return 0;
    /* Taken: what another thread of a host adds meanwhile is for its own flush. */
    for (i = 0; i < v->mask_words; i++)
        mask[i] = shi_xchg_full(&shi_batch_cpumask(v, self->id)[i], 0);
    shi_tlb_event(row, SHI_TE_batch_flush, 1);
    if (any_but(self, v, mask))
        err = flush_tlb_multi(&flush, mask, by);
    else if (!self->host && shi_load_relaxed(&mask[self->id / 64]) >> (self->id % 64) & 1)
        local_flush(&flush);
    for (i = 0; err && i < v->mask_words; i++) /* the next flush is for these, too */
        shi_fetch_or_full(&shi_batch_cpumask(v, self->id)[i], shi_load_relaxed(&mask[i]));
    if (err)
        shi_store_full(&row->flush_required, 1);
    return err;
}

int shi_flush_tlb_everywhere(struct shi_self *self, const struct shi_vm_view *v,
                             const struct shi_flusher *by)
{
    struct flush flush = { self, v, { 0, NO_GENERATION, SHI_FLUSH_ALL, SHI_MM_NONE, 1, 0 } };
    struct shi_each each = { .native = flush_handler,
                             .renumber = by->renumber,
                             .info = &flush.f,
                             .local = flush_here,
                             .arg = &flush,
                             .waiter = by->waiter,
                             .waiter_arg = by->arg };
    tell_offline(self, v, NULL);
    return shi_each_cpu_native(self, &each);
}

int shi_flush_tlb_batched_pending(struct shi_self *self, const struct shi_vm_view *v,
                                  uint32_t mm, const struct shi_flusher *by)
{
    struct shi_mm *of = &v->mms[mm];
    uint32_t batch = shi_load_full(&of->tlb_flush_batched);
    uint32_t pending = batch & PENDING_MASK, flushed = batch >> FLUSHED_SHIFT;
    if (pending == flushed || shi_rule_off(self->m, SHI_RULE_tlb_batched))
        return 0;
    shi_tlb_event(row_of(self, v), SHI_TE_batch_forced, 1);
    int err = shi_flush_tlb_mm_range(self, v, mm, 0, SHI_FLUSH_ALL, false, by);
    /* One that came during the flush stays pending. */
    if (!err)
        shi_cas_full(&of->tlb_flush_batched, &batch, pending | pending << FLUSHED_SHIFT);
    return err;
}
