/* SPDX-License-Identifier: MIT */
#include "base/sys.h"

#include <errno.h>
#include <sched.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>

#include "base/clock.h"
#include "base/native.h"
#include "base/trace.h"
#include "irq/chip.h"
#include "irq/doorbell.h"
#include "irq/signal.h"
#include "measure/bench.h"
#include "smp/entry.h"
#include "smp/sender.h"
#include "smp/smp.h"
#include "smp/wait.h"

#define SPIN_NS 20000000u
#define RELAXED_TRIES 100
#define YIELD_NS 20000u
#define LOOK_ROUND 4096u

static uint32_t native(const char *name)
{
    return (uint32_t)shi_native_find(name) | SHI_FUNC_NATIVE;
}

/* What the layer above makes of func(None), or of func(8 bytes). */
static struct shi_call message(uint32_t func, bool bytes)
{
    return (struct shi_call){ .func = func,
                              .kind = bytes ? SHI_K_BYTES : SHI_K_NONE,
                              .length = bytes ? sizeof(uint64_t) : 0,
                              .apply = SHI_A_INFO };
}

/* What an unlocked csd says: it ran, or its CPU died with it. */
static int outcome(const struct shi_csd *csd)
{
    if (shi_load_relaxed(&csd->lock) & SHI_CSD_DIED)
        return -EOWNERDEAD;
    return shi_load_relaxed(&csd->status) == SHI_S_DONE ? 0 : -EIO;
}

/* How long its waits spin, as shi_wait_budget has it: a spinning sender that got no answer
 * goes on as users' calls do: asleep, ringing again every 10 ms. */
static uint64_t spin_for(struct shi_self *self, uint64_t spin_ns)
{
    uint64_t before = self->spin_ns;
    self->spin_ns = spin_ns;
    return before;
}

static int look(const struct shi_self *self, uint64_t deadline_ns)
{
    if (shi_load_relaxed(&self->m->header->machine_state) >= SHI_M_STOPPING)
        return -ECANCELED;
    return shi_now_ns() >= deadline_ns ? -ETIMEDOUT : 0;
}

/* A line is raised, and its handler has run: no queue, no csd, and nothing is elided. */
static int raise_line(struct shi_self *self, const struct shi_bench_calls *b)
{
    uint64_t seen = shi_load_relaxed(b->count);
    uint32_t i;
    shi_enter(self);
    shi_count(self, SHI_C_chip_writes);
    shi_irq_raise(self, b->dst, b->line);
    shi_leave(self);
    for (;;) {
        for (i = 0; i < LOOK_ROUND; i++)
            if (shi_load_acquire(b->count) != seen)
                return 0;
        int err = look(self, b->deadline_ns);
        if (err)
            return err;
    }
}

/* Wait for a word to be odd, or even: what it is then, or 0 and why not. */
static uint64_t turned(struct shi_self *self, const shi_a64 *word, uint64_t odd,
                       uint64_t deadline_ns, int *err)
{
    for (*err = 0; !*err; *err = look(self, deadline_ns)) {
        uint32_t i;
        for (i = 0; i < LOOK_ROUND; i++) {
            /* Pairs with the other side's release: whose turn it is. */
            uint64_t value = shi_load_acquire(word);
            if ((value & 1) == odd)
                return value;
        }
    }
    return 0;
}

static int ask_fake(struct shi_self *self, const struct shi_bench_calls *b)
{
    int err;
    shi_store_release(b->fake, shi_load_relaxed(b->fake) + 1);
    turned(self, b->fake, 0, b->deadline_ns, &err);
    return err;
}

int shi_bench_fake(struct shi_self *self, shi_a64 *word, uint32_t calls, uint64_t delay_ns,
                   uint64_t deadline_ns, struct shi_hist *waited)
{
    uint32_t i;
    for (i = 0; i < calls; i++) {
        int err;
        uint64_t value = turned(self, word, 1, deadline_ns, &err), from = shi_stamp(), to;
        if (err)
            return err;
        do
            to = shi_stamp();
        while (shi_stamp_to_ns(to - from) < delay_ns);
        shi_store_release(word, value + 1);
        shi_hist_record(waited, shi_stamp_to_ns(to - from));
    }
    return 0;
}

/* smp_call_function_single(dst, func, info, wait=1). */
static inline int call(struct shi_self *self, const struct shi_bench_calls *b, uint32_t func,
                       uint64_t *arrived)
{
    if (__builtin_expect(b->count != NULL, 0))
        return raise_line(self, b);
    if (__builtin_expect(b->fake != NULL, 0))
        return ask_fake(self, b);
    const struct shi_call it = message(func, b->stamp);
    int64_t local = shi_call_post(self, &it, SHI_CSD_SYNC, b->dst);
    if (local < 0)
        return (int)local;
    int err = shi_call_wait(self, (uint32_t)local, b->dst, b->deadline_ns, NULL, NULL);
    if (err)
        return err;
    const struct shi_csd *csd = shi_own_csd(self, (uint32_t)local);
    err = outcome(csd);
    if (b->stamp)
        *arrived = csd->value.u;
    shi_call_end(self, (uint32_t)local);
    return err;
}

static void pause_for(uint32_t gap_ns)
{
    uint64_t from = shi_stamp();
    while (shi_stamp_to_ns(shi_stamp() - from) < gap_ns)
        shi_cpu_relax();
}

static bool in_state(const struct shi_self *self, uint32_t dst, int state)
{
    uint64_t w = shi_load_relaxed(&shi_slot(self->m, dst)->word);
    return state < 0 || shi_word_state(w) == (enum shi_state)state;
}

int64_t shi_bench_await(struct shi_self *self, uint32_t dst, int state, uint32_t gap_ns,
                        uint64_t deadline_ns)
{
    int64_t missed;
    for (missed = 0;; missed++) {
        pause_for(gap_ns);
        if (in_state(self, dst, state))
            return missed;
        int err = look(self, deadline_ns);
        /* Offline or dead, it gets to no other state. */
        if (!err && !shi_word_online(shi_load_relaxed(&shi_slot(self->m, dst)->word)))
            err = -ENXIO;
        if (err)
            return err;
        if (missed > RELAXED_TRIES)
            sched_yield(); /* it may need this very core to get there */
    }
}

static int await(struct shi_self *self, struct shi_bench_calls *b)
{
    int err = look(self, b->deadline_ns);
    if (err)
        return err;
    int64_t missed = shi_bench_await(self, b->dst, b->state, b->gap_ns, b->deadline_ns);
    if (missed < 0)
        return (int)missed;
    b->missed += missed > 0;
    return 0;
}

static int warm_up(struct shi_self *self, struct shi_bench_calls *b, uint32_t func)
{
    uint64_t arrived;
    uint32_t i;
    int err = 0;
    for (i = 0; i < b->warmup && !err; i++) {
        if (!b->batch || !i)
            err = await(self, b);
        if (!err)
            err = call(self, b, func, &arrived);
    }
    b->missed = 0;
    return err;
}

static int batches(struct shi_self *self, struct shi_bench_calls *b, uint32_t func)
{
    uint64_t arrived;
    uint32_t n = b->calls / b->batch, i, k;
    for (i = 0; i < n; i++) {
        int err = await(self, b);
        if (err)
            return err;
        uint64_t from = shi_stamp();
        for (k = 0; k < b->batch && !err; k++)
            err = call(self, b, func, &arrived);
        uint64_t took = shi_stamp() - from;
        if (err)
            return err;
        b->batches[b->nbatches++] = (double)shi_stamp_to_ns(took) / b->batch;
    }
    return 0;
}

static uint64_t counted(const struct shi_self *self, uint32_t dst, enum shi_counter counter)
{
    struct shi_slot *slot = shi_slot(self->m, dst);
    uint64_t sum = 0;
    int ctx;
    for (ctx = 0; ctx < SHI_NCTX; ctx++)
        sum += shi_load_relaxed(&slot->counters[ctx][counter]);
    return sum;
}

static uint64_t rung_by(const struct shi_self *self)
{
    return counted(self, self->id, SHI_C_doorbells_sent) +
           counted(self, self->id, SHI_C_kicks_sent);
}

static int64_t apart(uint64_t to, uint64_t from)
{
    return to >= from ? (int64_t)shi_stamp_to_ns(to - from)
                      : -(int64_t)shi_stamp_to_ns(from - to);
}

static void arrival(struct shi_bench_calls *b, uint64_t from, uint64_t arrived, uint64_t to)
{
    int64_t there = apart(arrived, from), back = apart(to, arrived);
    if (b->one_way)
        shi_hist_record(b->one_way, there > 0 ? (uint64_t)there : 0);
    b->there_ns = there < b->there_ns ? there : b->there_ns;
    b->back_ns = back < b->back_ns ? back : b->back_ns;
}

/* Until call `i` of a schedule is due; at once if those before have taken too long. */
static int due(struct shi_self *self, struct shi_bench_calls *b, uint32_t i, uint64_t start)
{
    int err = look(self, b->deadline_ns);
    while (!err && shi_stamp_to_ns(shi_stamp() - start) < i * b->period_ns)
        shi_cpu_relax();
    return err;
}

static int each(struct shi_self *self, struct shi_bench_calls *b, uint32_t func)
{
    uint64_t arrived = 0, start = shi_stamp(), rung = rung_by(self);
    uint32_t i;
    for (i = 0; i < b->calls && !b->broke; i++) {
        int err = b->period_ns ? due(self, b, i, start) : await(self, b);
        if (err)
            return err;
        uint64_t from = shi_stamp();
        err = call(self, b, func, &arrived);
        uint64_t to = shi_stamp(), ns = shi_stamp_to_ns(to - from);
        if (err)
            return err;
        if (b->rtt)
            shi_hist_record(b->rtt, ns);
        if (b->period_ns && b->scheduled)
            shi_hist_record(b->scheduled, shi_stamp_to_ns(to - start) - i * b->period_ns);
        if (b->stamp)
            arrival(b, from, arrived, to);
        if (b->break_ns && ns > b->break_ns) {
            b->broke = true;
            b->broke_at = i;
            b->broke_from = from;
            b->broke_arrived = b->stamp ? arrived : 0;
            b->broke_to = to;
        }
    }
    b->rung = rung_by(self) - rung;
    return 0;
}

int shi_bench_calls(struct shi_self *self, struct shi_bench_calls *b)
{
    uint32_t func = native(b->stamp ? "stamp" : "noop"), aside = 0, *kept = NULL;
    struct rusage before, after;
    int core = sched_getcpu(), err = 0;
    b->nbatches = 0;
    b->missed = 0;
    b->there_ns = b->back_ns = INT64_MAX;
    b->broke = false;
    if (b->stamp && b->fake)
        return -EINVAL;
    if (b->dst >= self->m->ncpus || b->dst == self->id)
        return -ENXIO;
    if (b->count && b->line >= self->m->chip.nlines)
        return -EINVAL;
    if (b->skip && !(kept = calloc(b->skip, sizeof *kept)))
        return -ENOMEM;
    shi_enter(self);
    while (aside < b->skip && !err) {
        int64_t got = shi_csd_get(self);
        if (got < 0)
            err = (int)got;
        else
            kept[aside++] = (uint32_t)got;
    }
    shi_leave(self);
    bool task = self->in_task;
    getrusage(RUSAGE_THREAD, &before);
    self->in_task = false; /* polling from call to call: it serves its queue in each wait */
    uint64_t spin_ns = spin_for(self, b->park ? 1 : SPIN_NS + 1);
    if (!err)
        err = warm_up(self, b, func);
    if (!err)
        err = b->batch ? batches(self, b, func) : each(self, b, func);
    spin_for(self, spin_ns);
    self->in_task = task;
    if (task) {
        /* A wait that slept for a signal left it blocked: it found no task to go back to. */
        if (shi_doorbell_of(self->m)->by_signal)
            shi_kick_block(self, false);
        shi_set_running(self);
    }
    getrusage(RUSAGE_THREAD, &after);
    b->preempted = (uint64_t)(after.ru_nivcsw - before.ru_nivcsw);
    b->moved = sched_getcpu() != core;
    shi_enter(self);
    while (aside)
        shi_csd_put(self, kept[--aside]);
    shi_leave(self);
    free(kept);
    return err;
}

/* ---- calls nobody waits for ------------------------------------------------------------- */

int shi_bench_until(struct shi_self *self, uint32_t dst, enum shi_counter counter,
                    uint64_t until, uint64_t deadline_ns)
{
    uint64_t from = shi_now_ns();
    while (counted(self, dst, counter) < until) {
        int err = look(self, deadline_ns);
        if (err)
            return err;
        if (shi_now_ns() - from > YIELD_NS)
            sched_yield(); /* another sender may share this core */
    }
    return 0;
}

/* smp_call_function_single(dst, noop, NULL, wait=0). */
static inline int post(struct shi_self *self, uint32_t dst, const struct shi_call *it,
                       uint64_t deadline_ns)
{
    for (;;) {
        int64_t local = shi_call_post(self, it, SHI_CSD_ASYNC, dst);
        if (local >= 0)
            return 0;
        uint32_t busy;
        int err = local == -EAGAIN ? shi_call_room(self, NULL, NULL, &busy) : (int)local;
        if (!err)
            err = look(self, deadline_ns);
        if (err)
            return err;
    }
}

int shi_bench_flood(struct shi_self *self, struct shi_bench_flood *f)
{
    const struct shi_bench_calls last = { .dst = f->dst, .deadline_ns = f->deadline_ns };
    const struct shi_call it = message(native("noop"), false);
    uint32_t i;
    int err = 0;
    if (f->dst >= self->m->ncpus || f->dst == self->id)
        return -ENXIO;
    f->from_stamp = shi_stamp();
    for (i = 0; i < f->calls && !err; i++) {
        err = post(self, f->dst, &it, f->deadline_ns);
        if (!err && i % 4096 == 4095)
            err = look(self, f->deadline_ns);
    }
    if (!err)
        err = shi_bench_until(self, f->dst, SHI_C_native_run, f->until, f->deadline_ns);
    /* All have been entered.  This one is served when the last of them has returned. */
    uint64_t spin_ns = spin_for(self, SPIN_NS + 1);
    if (!err)
        err = call(self, &last, it.func, NULL);
    spin_for(self, spin_ns);
    f->to_stamp = shi_stamp();
    return err;
}

/* ---- on_each_cpu ------------------------------------------------------------------------- */

/* on_each_cpu(func, NULL, wait=1). */
static int broadcast(struct shi_self *self, uint32_t func, struct shi_many *many,
                     uint64_t deadline_ns)
{
    const struct shi_call it = message(func, false);
    uint32_t i;
    shi_count(self, SHI_C_calls_many);
    int first = shi_call_many(self, many, &it, true);
    if (!first) { /* the local part, between the doorbells and the wait */
        uint8_t flags = shi_irq_save(self);
        shi_count(self, SHI_C_calls_self);
        shi_native_get(func & ~SHI_FUNC_NATIVE)(NULL);
        shi_irq_restore(self, flags);
    }
    for (i = 0; i < many->queued; i++) {
        int rc = shi_call_wait(self, many->locals[i], many->cpus[i], deadline_ns, NULL, NULL);
        if (!rc) {
            rc = outcome(shi_own_csd(self, many->locals[i]));
            shi_call_end(self, many->locals[i]);
        }
        first = first ? first : rc;
    }
    return first;
}

static int all_in_state(struct shi_self *self, struct shi_bench_broadcast *b)
{
    uint32_t cpu;
    pause_for(b->gap_ns);
    for (cpu = 0; cpu < self->m->ncpus; cpu++) {
        if (cpu == self->id || in_state(self, cpu, b->state))
            continue;
        b->missed++;
        while (!in_state(self, cpu, b->state)) {
            int err = look(self, b->deadline_ns);
            if (!err && !shi_word_online(shi_load_relaxed(&shi_slot(self->m, cpu)->word)))
                err = -ENXIO; /* it gets to no other state */
            if (err)
                return err;
            sched_yield(); /* CPUs of this core cannot halt before they run */
        }
        pause_for(b->gap_ns);
        cpu = UINT32_MAX; /* from the start: one may have woken */
    }
    return 0;
}

int shi_bench_broadcast(struct shi_self *self, struct shi_bench_broadcast *b)
{
    uint32_t func = native("noop"), n = self->m->ncpus, i;
    uint32_t *room = calloc(4 * (size_t)n, sizeof *room);
    int err = 0;
    if (!room)
        return -ENOMEM;
    for (i = 0; i < n; i++)
        room[i] = i;
    struct shi_many many = {
        .mask = room, .n = n, .cpus = room + n, .locals = room + 2 * n, .ipis = room + 3 * n
    };
    b->missed = 0;
    for (i = 0; i < b->warmup + b->calls && !err; i++) {
        err = all_in_state(self, b);
        if (err)
            break;
        uint64_t from = shi_stamp();
        err = broadcast(self, func, &many, b->deadline_ns);
        uint64_t took = shi_stamp() - from;
        if (!i)
            b->first_ns = (double)shi_stamp_to_ns(took);
        if (!err && i >= b->warmup)
            b->ns[i - b->warmup] = (double)shi_stamp_to_ns(took);
    }
    free(room);
    return err;
}

/* ---- where no IPI is sent ---------------------------------------------------------------- */

void shi_bench_local(struct shi_self *self, uint32_t calls, bool itself, struct shi_hist *took)
{
    shi_native_handler *volatile handler = shi_native_get(native("noop") & ~SHI_FUNC_NATIVE);
    uint32_t i;
    for (i = 0; i < calls; i++) {
        uint64_t from = shi_stamp();
        if (itself) {
            shi_count(self, SHI_C_calls_self);
            uint8_t flags = shi_irq_save(self);
            handler(NULL);
            shi_irq_restore(self, flags);
        } else {
            handler(NULL);
        }
        shi_hist_record(took, shi_stamp_to_ns(shi_stamp() - from));
    }
}

/* ---- storms ------------------------------------------------------------------------------ */

/* smp_call_function_many(dsts, noop, NULL, wait). */
static int storm_many(struct shi_self *self, struct shi_many *many, const struct shi_call *it,
                      const struct shi_bench_storm *s)
{
    uint32_t i;
    shi_count(self, SHI_C_calls_many);
    int first = shi_call_many(self, many, it, s->wait);
    for (i = 0; s->wait && i < many->queued; i++) {
        int rc =
            shi_call_wait(self, many->locals[i], many->cpus[i], s->deadline_ns, NULL, NULL);
        if (!rc) {
            rc = outcome(shi_own_csd(self, many->locals[i]));
            shi_call_end(self, many->locals[i]);
        }
        first = first ? first : rc;
    }
    return first;
}

int shi_bench_storm(struct shi_self *self, struct shi_bench_storm *s)
{
    struct shi_bench_calls one = { .deadline_ns = s->deadline_ns };
    const struct shi_call it = message(native("noop"), false);
    uint32_t *room = calloc(3 * (size_t)s->ndsts, sizeof *room), i, turn;
    struct shi_many many = { .mask = s->dsts,
                             .n = s->ndsts,
                             .cpus = room,
                             .locals = room + s->ndsts,
                             .ipis = room + 2 * (size_t)s->ndsts };
    int err = 0;
    s->calls = 0;
    if (!room)
        return -ENOMEM;
    for (turn = 0; !err && (!s->most || turn < s->most) && shi_now_ns() < s->until_ns; turn++) {
        for (i = 0; i < (s->many ? 1 : s->ndsts) && !err; i++) {
            uint64_t from = shi_stamp();
            one.dst = s->dsts[i];
            if (s->many)
                err = storm_many(self, &many, &it, s);
            else if (s->wait)
                err = call(self, &one, it.func, NULL);
            else
                err = post(self, one.dst, &it, s->deadline_ns);
            if (!err && s->wait)
                shi_hist_record(s->rtt, shi_stamp_to_ns(shi_stamp() - from));
            s->calls += s->many ? s->ndsts : 1;
        }
        if (!err)
            err = look(self, s->deadline_ns);
    }
    /* A target's queue is first in, first out: these run when all before them have. */
    for (i = 0; i < s->ndsts && !s->wait && !err; i++) {
        one.dst = s->dsts[i];
        err = call(self, &one, it.func, NULL);
    }
    free(room);
    return err;
}

/* ---- work that can be interrupted ---------------------------------------------------- */

#define WORK_UNIT 64

uint64_t shi_bench_work(uint64_t ns)
{
    uint64_t from = shi_stamp(), units = 0;
    volatile uint64_t sink = 1;
    while (shi_stamp_to_ns(shi_stamp() - from) < ns) {
        uint64_t x = sink;
        uint32_t i;
        for (i = 0; i < WORK_UNIT; i++)
            x = x * 6364136223846793005u + 1442695040888963407u;
        sink = x;
        units++;
    }
    return units;
}

double shi_bench_trace(struct shi_self *self, uint32_t events, bool traced)
{
    uint64_t from = shi_stamp();
    uint32_t i;
    for (i = 0; i < events; i++) {
        if (traced)
            SHI_TRACE(self, flush, self->id, 0, 0, i);
        shi_signal_fence();
    }
    return (double)shi_stamp_to_ns(shi_stamp() - from);
}
