/* SPDX-License-Identifier: MIT */
#include "base/sys.h"

#include <errno.h>
#include <string.h>

#include "base/native.h"
#include "base/rules.h"
#include "irq/chip.h"
#include "smp/entry.h"
#include "users/each.h"
#include "users/icache.h"
#include "users/membarrier.h"

/* ---- what this process has fetched ------------------------------------------------------- */

static struct {
    struct shi_icache *ic; /* NULL: not begun */
    struct shi_icache_cpu *row;
    uint64_t version[SHI_TEXTS]; /* 0: not cached */
    uint32_t depth;              /* calls inside each other */
} cache;

uint64_t shi_icache_bytes(const struct shi_machine *m)
{
    return sizeof(struct shi_icache) + (uint64_t)m->ncpus * sizeof(struct shi_icache_cpu);
}

struct shi_icache *shi_icache(const struct shi_machine *m)
{
    return shi_user(m, SHI_USER_icache, shi_icache_bytes(m));
}

/* The row is a dead process's: nothing of what it ran is under way. */
static bool begin(struct shi_self *self)
{
    struct shi_icache *ic = shi_icache(self->m);
    if (!ic)
        return false;
    struct shi_icache_cpu *row = &ic->cpus[self->id];
    memset(cache.version, 0, sizeof cache.version);
    shi_store_full(&row->running, 0);
    shi_store_full(&row->stale, 0);
    /* Nothing is cached: all flushes up to now are taken. */
    shi_store_full(&row->seen, shi_load_full(&ic->epoch));
    shi_store_full(&row->gen, self->gen);
    cache.row = row;
    cache.ic = ic;
    return true;
}

static inline bool ready(struct shi_self *self)
{
    return __builtin_expect(cache.ic != NULL, 1) || begin(self);
}

/* Interrupts are off, or masked. */
static void flush_here(struct shi_self *self)
{
    if (!ready(self))
        return;
    /* Read first: what is fetched from now on is not older than this. */
    uint64_t epoch = shi_load_full(&cache.ic->epoch);
    memset(cache.version, 0, sizeof cache.version);
    shi_sync_core();
    shi_fetch_add_relaxed(&cache.row->flushes, 1);
    shi_store_full(&cache.row->seen, epoch);
}

uint64_t shi_icache_enter(struct shi_self *self, struct shi_icache *ic, uint32_t text)
{
    uint64_t version;
    shi_enter(self);
    if (!ready(self)) {
        shi_leave(self);
        return 0;
    }
    /* As users/tlb.c: offline, it was passed by. */
    if (shi_load_full(&cache.row->stale) && shi_xchg_full(&cache.row->stale, 0))
        flush_here(self);
    version = cache.version[text];
    if (!version) {
        version = shi_load_full(&ic->texts[text].version);
        cache.version[text] = version;
        shi_fetch_add_relaxed(&cache.row->fetches, 1);
    }
    /* Full, and no flush comes between the look above and here: who has flushed this CPU finds
     * a call that goes by what was cached before. */
    if (version && !cache.depth++)
        shi_xchg_full(&cache.row->running, 1 + shi_load_relaxed(&cache.row->seen));
    shi_leave(self);
    return version;
}

void shi_icache_exit(struct shi_self *self)
{
    shi_enter(self);
    if (cache.depth && !--cache.depth)
        shi_store_release(&cache.row->running, 0); /* with all that the call has done */
    shi_leave(self);
}

bool shi_icache_inside(const struct shi_self *self)
{
    return !self->host && cache.depth;
}

/* ---- replacing -------------------------------------------------------------------------------- */

int64_t shi_text_write(struct shi_icache *ic, uint32_t text, uint32_t native,
                       const void *pickle, uint64_t bytes)
{
    struct shi_text *t = &ic->texts[text];
    uint64_t next = shi_load_relaxed(&t->version) + 1;
    if (bytes > SHI_TEXT_BYTES)
        return -E2BIG;
    /* The older half: nobody has that cached since the last replacement has returned.  Who is
     * killed in here has changed nothing that anybody reads. */
    t->code[next & 1].native = native;
    t->code[next & 1].bytes = (uint32_t)bytes;
    memcpy(t->code[next & 1].pickle, pickle, bytes);
    shi_store_full(&t->version, next);
    return (int64_t)next;
}

static void do_sync_core(void *info)
{
    struct shi_self *self = shi_this_cpu();
    (void)info;
    if (self)
        flush_here(self);
}

static bool take_line(struct shi_self *self, uint32_t line)
{
    (void)line;
    flush_here(self);
    return true;
}

static int handler;

void shi_icache_handlers(void)
{
    if (!handler)
        handler = shi_native_register("do_sync_core", do_sync_core);
}

void shi_icache_register(struct shi_machine *m)
{
    m->actions[SHI_USE_ICACHE] = take_line;
}

static uint32_t line_of(const struct shi_machine *m)
{
    uint32_t line;
    for (line = 0; line < m->chip.nlines; line++)
        if (m->chip.use[line] == SHI_USE_ICACHE)
            return line;
    return SHI_NO_LINE;
}

static bool online(const struct shi_self *self, uint32_t cpu)
{
    return shi_word_online(shi_load_full(&shi_slot(self->m, cpu)->word));
}

/* octeon_flush_icache_all_cores(): the line to each; who has taken it says so in its row. */
static void by_line(struct shi_self *self, uint32_t line)
{
    uint32_t cpu;
    for (cpu = 0; cpu < self->m->ncpus; cpu++) {
        if ((!self->host && cpu == self->id) || !online(self, cpu))
            continue;
        shi_enter(self);
        shi_irq_raise(self, cpu, shi_line_of(self->m, line, cpu));
        shi_leave(self);
    }
}

static void local(void *arg)
{
    flush_here(arg);
}

int64_t shi_icache_flush(struct shi_self *self, struct shi_icache *ic,
                         const struct shi_flusher *by)
{
    unsigned char nothing[SHI_INLINE] = { 0 };
    struct shi_each each = { .native = handler,
                             .renumber = by->renumber,
                             .info = nothing,
                             .local = local,
                             .arg = self,
                             .waiter = by->waiter,
                             .waiter_arg = by->arg };
    uint32_t line = line_of(self->m), cpu;
    /* Full: after the new version, before anybody's state. */
    uint64_t epoch = shi_fetch_add_full(&ic->epoch, 1) + 1;
    int err = 0;
    for (cpu = 0; cpu < self->m->ncpus; cpu++)
        if (!online(self, cpu))
            shi_xchg_full(&ic->cpus[cpu].stale, 1);
    if (shi_rule_off(self->m, SHI_RULE_icache_ipi))
        return (int64_t)epoch;
    if (line == SHI_NO_LINE) {
        err = shi_each_cpu_native(self, &each);
    } else {
        by_line(self, line);
        if (!self->host) {
            shi_enter(self);
            flush_here(self);
            shi_leave(self);
        }
    }
    return err ? err : (int64_t)epoch;
}

/* A CPU that is gone, or whose process has called nothing yet, runs no old code. */
static bool is_behind(const struct shi_self *self, const struct shi_icache *ic, uint32_t cpu,
                      uint64_t epoch)
{
    const struct shi_icache_cpu *row = &ic->cpus[cpu];
    uint64_t w = shi_load_full(&shi_slot(self->m, cpu)->word);
    uint64_t running = shi_load_full(&row->running);
    if (shi_word_state(w) == SHI_DEAD || (uint16_t)shi_load_full(&row->gen) != shi_word_gen(w))
        return false;
    if (running && running <= epoch && !shi_rule_off(self->m, SHI_RULE_icache_wait))
        return true;
    return shi_word_online(w) && shi_load_full(&row->seen) < epoch &&
           !shi_rule_off(self->m, SHI_RULE_icache_ipi);
}

int64_t shi_icache_behind(struct shi_self *self, struct shi_icache *ic, uint64_t epoch)
{
    uint32_t cpu;
    for (cpu = 0; cpu < self->m->ncpus; cpu++)
        if (is_behind(self, ic, cpu, epoch))
            return cpu;
    return -1;
}

void shi_icache_prod(struct shi_self *self, uint32_t cpu)
{
    uint32_t line = line_of(self->m);
    shi_enter(self);
    if (line != SHI_NO_LINE && online(self, cpu) && (self->host || cpu != self->id))
        shi_irq_raise(self, cpu, shi_line_of(self->m, line, cpu));
    shi_irq_rering(self, cpu);
    shi_leave(self);
}
