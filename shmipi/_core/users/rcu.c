/* SPDX-License-Identifier: MIT */
#include "base/sys.h"

#include <errno.h>

#include "base/clock.h"
#include "base/native.h"
#include "base/rules.h"
#include "base/step.h"
#include "smp/entry.h"
#include "smp/smp.h"
#include "smp/softirq.h"
#include "smp/wait.h"
#include "smp/waitq.h"
#include "users/rcu.h"

#define HURRY_NS 5000000u /* a normal grace period interrupts who has not reported by then */
#define ASK_AGAIN 2u      /* of need_qs: the handler has run, and could not report */
#define TICK_NS 1000000u  /* looked at again, where a CPU could not be sent to, or reads */

/* Of this process, which is one CPU: is it in an extended quiescent state? */
static bool in_eqs;
/* Threads of a host share its slot, and so the lock's name in shared memory. */
static pthread_mutex_t host_lock = PTHREAD_MUTEX_INITIALIZER;
static int exp_native = -1, tick_native = -1;

uint64_t shi_rcu_bytes(const struct shi_machine *m)
{
    return sizeof(struct shi_rcu) + m->ncpus * sizeof(struct shi_rcu_cpu);
}

struct shi_rcu *shi_rcu_state(const struct shi_machine *m)
{
    if (!shi_load_relaxed(&m->header->users[SHI_USER_rcu]))
        return NULL;
    return shi_user(m, SHI_USER_rcu, shi_rcu_bytes(m));
}

/* ---- quiescent states -------------------------------------------------------------- */

static bool must_report(struct shi_rcu *st, uint32_t cpu)
{
    return (shi_load_full(&st->expmask[cpu / 64]) >> (cpu % 64) & 1) != 0;
}

/* rcu_report_exp_cpu_mult: by the CPU itself, or by who knows it quiescent. */
static bool report(struct shi_self *self, struct shi_rcu *st, uint32_t cpu)
{
    uint64_t bit = 1ull << (cpu % 64);
    /* Full: what its readers have read stands before it, and after it in turn the reads of
     * those who find the grace period over. */
    if (!(shi_fetch_and_full(&st->expmask[cpu / 64], ~bit) & bit))
        return false;
    uint64_t left = shi_fetch_sub_full(&st->remaining, 1) - 1;
    uint64_t at = shi_load_relaxed(&st->waitq);
    if (!left && at && at < shi_array_end(self->m))
        shi_waitq_wake(self, (struct shi_waitq *)(self->m->base + at), SHI_WAKE_ALL);
    return true;
}

static void report_self(struct shi_self *self, struct shi_rcu *st)
{
    struct shi_rcu_cpu *c = &st->cpu[self->id];
    shi_store_relaxed(&c->need_qs, 0);
    if (report(self, st, self->id))
        shi_store_relaxed(&c->reports, shi_load_relaxed(&c->reports) + 1);
}

/* rcu_exp_handler: the interrupt. */
static void exp_handler(void *info)
{
    struct shi_self *self = shi_this_cpu();
    struct shi_rcu *st = self ? shi_rcu_state(self->m) : NULL;
    (void)info;
    if (!st || !must_report(st, self->id))
        return; /* it has reported since it was sent to */
    struct shi_rcu_cpu *c = &st->cpu[self->id];
    bool reads = shi_load_relaxed(&c->nesting) != 0;
    if (shi_rule_off(self->m, SHI_RULE_rcu_handler))
        reads = false;
    if (reads)
        shi_store_relaxed(&c->need_qs, 1); /* the outermost unlock reports */
    else if (self->preempt) /* as good as a reader, as in the kernel: asked again in a tick */
        shi_store_full(&c->need_qs, ASK_AGAIN);
    else
        report_self(self, st);
}

void shi_rcu_read_lock(struct shi_self *self, struct shi_rcu *st)
{
    struct shi_rcu_cpu *c = &st->cpu[self->id];
    shi_store_relaxed(&c->nesting, shi_load_relaxed(&c->nesting) + 1);
    shi_signal_fence(); /* the handler finds the depth before anything was read */
}

int shi_rcu_read_unlock(struct shi_self *self, struct shi_rcu *st)
{
    struct shi_rcu_cpu *c = &st->cpu[self->id];
    uint32_t depth = shi_load_relaxed(&c->nesting);
    if (!depth)
        return -EDEADLK;
    shi_signal_fence();
    shi_store_relaxed(&c->nesting, depth - 1);
    shi_signal_fence();
    /* A handler between the store and this look finds depth 0 and reports by itself. */
    if (depth == 1 && __builtin_expect(shi_load_acquire(&c->need_qs), 0))
        report_self(self, st);
    return 0;
}

/* ---- context tracking --------------------------------------------------------------- */

void shi_rcu_idle_enter(struct shi_self *self)
{
    struct shi_rcu *st = shi_rcu_state(self->m);
    if (!st || in_eqs || shi_load_relaxed(&st->cpu[self->id].nesting))
        return; /* a task that waits in a read-side section reads on */
    /* Full: after all that was read. */
    in_eqs = true;
    shi_fetch_add_full(&st->cpu[self->id].watching, 1);
    if (must_report(st, self->id))
        report_self(self, st);
}

void shi_rcu_idle_exit(struct shi_self *self)
{
    struct shi_rcu *st = in_eqs ? shi_rcu_state(self->m) : NULL;
    if (!st)
        return;
    /* Full: before all that will be read.  Who removes something does that first and looks at
     * this second: either it finds this CPU watching, or this CPU reads what is new. */
    shi_fetch_add_full(&st->cpu[self->id].watching, 1);
    in_eqs = false;
}

/* ---- grace periods ------------------------------------------------------------------ */

uint64_t shi_rcu_snap(struct shi_rcu *st)
{
    /* Full: what the caller has removed is removed before a grace period that counts. */
    uint64_t seq = shi_fetch_add_full(&st->seq, 0);
    return (seq + 3) & ~1ull; /* one that runs has begun too early */
}

static bool rcu_done(struct shi_rcu *st, uint64_t seq)
{
    return (int64_t)(shi_load_full(&st->seq) - seq) >= 0;
}

static bool online(const struct shi_machine *m, uint32_t cpu)
{
    return shi_word_online(shi_load_full(&shi_slot(m, cpu)->word));
}

/* Offline, and no task stands in a read-side section there. */
static bool offline(const struct shi_machine *m, struct shi_rcu *st, uint32_t cpu)
{
    return !online(m, cpu) &&
           (shi_word_state(shi_load_full(&shi_slot(m, cpu)->word)) == SHI_DEAD ||
            !shi_load_full(&st->cpu[cpu].nesting));
}

/* Has it slept at some time since the grace period began? */
static bool slept(const struct shi_machine *m, struct shi_rcu *st, uint32_t cpu)
{
    const struct shi_rcu_cpu *c = &st->cpu[cpu];
    uint64_t now = shi_load_full(&c->watching);
    return (now & 1) || now != c->snap || shi_rule_off(m, SHI_RULE_rcu_idle);
}

/* The interrupt, or what takes its place: a step of sync_rcu_exp_select_node_cpus. */
static void send(struct shi_self *self, struct shi_rcu *st, uint32_t cpu, uint64_t now)
{
    struct shi_rcu_cpu *c = &st->cpu[cpu];
    if (!self->host && cpu == self->id) {
        exp_handler(NULL); /* who waits is no reader, but its task may have been in one */
        return;
    }
    const struct shi_call call = { .func = SHI_FUNC_NATIVE | (uint32_t)exp_native,
                                   .kind = SHI_K_NONE,
                                   .apply = SHI_A_INFO };
    int64_t err = shi_call_post(self, &call, SHI_CSD_ASYNC, cpu);
    if (err >= 0) {
        shi_fetch_add_relaxed(&st->ipis, 1);
        c->sent_ns = now;
    } else if (err == -ENXIO) {
        SHI_STEP(self, rcu_enxio);
        /* Between the look and the call it went offline.  Under the lock again: is it, or has
         * it come back, and is to be asked in a tick? */
        if (offline(self->m, st, cpu)) {
            shi_fetch_add_relaxed(&st->gone, 1);
            report(self, st, cpu);
        } else {
            shi_fetch_add_relaxed(&st->retried, 1);
        }
    }
}

/* rcu_exp_gp_seq_start, sync_exp_reset_tree, and who is not sent to. */
static void start(struct shi_self *self, struct shi_rcu *st, uint64_t now)
{
    const struct shi_machine *m = self->m;
    uint32_t cpu, i;
    shi_store_relaxed(&st->remaining, m->ncpus);
    for (i = 0; i < shi_affinity_words(m->ncpus); i++) {
        uint32_t n = m->ncpus - i * 64;
        shi_store_relaxed(&st->expmask[i], n >= 64 ? ~0ull : (1ull << n) - 1);
    }
    st->started_ns = st->stall_ns = now;
    shi_fetch_add_full(&st->seq, 1);
    for (cpu = 0; cpu < m->ncpus; cpu++) {
        struct shi_rcu_cpu *c = &st->cpu[cpu];
        /* Full: after the mask, which a CPU that falls asleep now looks at; and after what
         * the grace period is waited for. */
        c->snap = shi_fetch_add_full(&c->watching, 0);
        c->sent_ns = 0;
        if (offline(m, st, cpu)) {
            shi_fetch_add_relaxed(&st->offline, 1);
            report(self, st, cpu);
        } else if (slept(m, st, cpu)) {
            shi_fetch_add_relaxed(&st->idle, 1);
            report(self, st, cpu);
        } else {
            shi_store_full(&c->need_qs, 1); /* it may report at its next unlock by itself */
        }
    }
}

/* Who is left: send, or find it quiescent by now. */
static void look(struct shi_self *self, struct shi_rcu *st, uint64_t now, bool expedited)
{
    const struct shi_machine *m = self->m;
    uint32_t i, words = shi_affinity_words(m->ncpus);
    bool hurry = expedited || now - st->started_ns > HURRY_NS;
    for (i = 0; i < words; i++) {
        uint64_t set = shi_load_full(&st->expmask[i]);
        for (; set; set &= set - 1) {
            uint32_t cpu = i * 64 + (uint32_t)__builtin_ctzll(set);
            struct shi_rcu_cpu *c = &st->cpu[cpu];
            if (offline(m, st, cpu) || slept(m, st, cpu))
                report(self, st, cpu);
            else if (hurry && online(m, cpu) &&
                     (!c->sent_ns || (now > c->sent_ns + TICK_NS &&
                                      shi_load_full(&c->need_qs) == ASK_AGAIN))) {
                shi_store_full(&c->need_qs, 1);
                send(self, st, cpu, now);
            }
        }
    }
}

bool shi_rcu_advance(struct shi_self *self, uint64_t seq, bool expedited)
{
    struct shi_rcu *st = shi_rcu_state(self->m);
    if (!st || rcu_done(st, seq))
        return true;
    if (self->host && pthread_mutex_trylock(&host_lock))
        return false;
    if (!self->host)
        self->in_core++; /* a handler or softirq of this CPU must not find the lock its own */
    if (!shi_lock_try(self, &st->lock)) {
        uint64_t now = shi_now_ns();
        while (!rcu_done(st, seq)) {
            if (!(shi_load_full(&st->seq) & 1))
                start(self, st, now);
            look(self, st, now, expedited);
            if (shi_load_full(&st->remaining))
                break;
            shi_fetch_add_full(&st->seq, 1); /* rcu_exp_gp_seq_end */
        }
        shi_lock_release(self, &st->lock);
    }
    if (self->host)
        pthread_mutex_unlock(&host_lock);
    else if (!--self->in_core && self->happened)
        shi_leave_slow(self);
    return rcu_done(st, seq);
}

bool shi_rcu_spin(struct shi_self *self, uint64_t seq, bool expedited)
{
    struct shi_rcu *st = shi_rcu_state(self->m);
    if (shi_rcu_advance(self, seq, expedited))
        return true;
    bool service = !self->host && self->in_task && !self->irqs_off;
    uint64_t end = shi_now_ns() + (self->m->oversubscribed ? 20000u : 100000u);
    bool done = false;
    uint32_t i;
    if (service)
        shi_set_polling(self);
    while (!done) {
        for (i = 0; i < 64 && shi_load_acquire(&st->remaining); i++) {
            if (!service || !shi_word_work(shi_load_acquire(&self->slot->word)))
                continue;
            self->in_core++;
            shi_service_once(self);
            self->in_core--;
            if (self->happened)
                shi_leave_slow(self);
        }
        if (!shi_load_acquire(&st->remaining))
            done = shi_rcu_advance(self, seq, expedited);
        if (shi_now_ns() >= end || (service && shi_python_waits(self)))
            break;
        shi_cpu_relax();
    }
    if (service)
        shi_set_running(self);
    return done;
}

int64_t shi_rcu_holdout(const struct shi_machine *m, uint32_t cpu)
{
    struct shi_rcu *st = shi_rcu_state(m);
    for (; st && cpu < m->ncpus; cpu++)
        if (must_report(st, cpu))
            return cpu;
    return -1;
}

bool shi_rcu_stalled(struct shi_rcu *st, uint64_t after_ns)
{
    uint64_t now = shi_now_ns();
    if (!(shi_load_full(&st->seq) & 1) || now - st->stall_ns < after_ns)
        return false;
    st->stall_ns = now; /* whoever comes first says it: once */
    shi_fetch_add_relaxed(&st->stalls, 1);
    return true;
}

/* ---- callbacks ----------------------------------------------------------------------- */

int shi_call_rcu(struct shi_self *self, enum shi_rcu_kind kind, uint32_t func, uint64_t info)
{
    struct shi_rcu *st = shi_rcu_state(self->m);
    int err = -ENOSPC;
    shi_enter(self);
    struct shi_rcu_cpu *c = &st->cpu[self->id];
    uint64_t at = shi_load_relaxed(&c->queued);
    if (at - shi_load_relaxed(&c->done) < SHI_RCU_RING) {
        struct shi_rcu_head *head = &c->ring[at % SHI_RCU_RING];
        head->seq = shi_rcu_snap(st);
        head->info = info;
        head->func = func;
        shi_store_relaxed(&head->kind, (uint32_t)kind);
        shi_store_full(&c->queued, at + 1);
        err = 0;
    }
    shi_leave(self);
    return err;
}

/* Callbacks that have not all run: from `*at` on; false: none. */
static bool some(struct shi_rcu_cpu *c, uint64_t *at, uint64_t *queued)
{
    *at = shi_load_acquire(&c->done); /* acquire: before how many there are by now */
    *queued = shi_load_acquire(&c->queued);
    return *at < *queued && *queued - *at <= SHI_RCU_RING;
}

static inline shi_a32 *kind_of(struct shi_rcu_cpu *c, uint64_t at)
{
    return &c->ring[at % SHI_RCU_RING].kind;
}

/* `done`, past what has run or was lost. */
static void sweep(struct shi_rcu_cpu *c)
{
    uint64_t at, queued;
    if (!some(c, &at, &queued))
        return;
    while (at < queued && shi_load_relaxed(kind_of(c, at)) == SHI_RCU_GONE)
        at++;
    shi_store_full(&c->done, at);
}

/* 0; -EAGAIN: somebody else invokes them; -EBUSY: not this CPU's, and it does so itself. */
static int ring_lock(struct shi_self *self, struct shi_rcu *st, uint32_t cpu)
{
    struct shi_rcu_cpu *c = &st->cpu[cpu];
    uint64_t at, queued;
    if (shi_lock_take(self, &c->lock) < 0)
        return -EAGAIN;
    /* Under the lock: who comes back from here on finds it taken. */
    if (cpu != self->id && online(self->m, cpu)) {
        shi_lock_release(self, &c->lock);
        return -EBUSY;
    }
    if (!some(c, &at, &queued))
        return 0;
    /* Cut off by a death, with the lock held or (a Python one) without: not run again, since
     * nobody knows how far it came. */
    for (; at < queued; at++) {
        uint32_t kind = SHI_RCU_BUSY;
        if (shi_cas_full(kind_of(c, at), &kind, SHI_RCU_GONE))
            shi_fetch_add_relaxed(&c->lost, 1);
    }
    return 0;
}

/* rcu_do_batch: of this CPU, or, without `python`, of another that is gone. */
static int do_batch(struct shi_self *self, struct shi_rcu *st, uint32_t cpu, uint64_t *python)
{
    struct shi_rcu_cpu *c = &st->cpu[cpu];
    uint64_t at, queued;
    if (!some(c, &at, &queued))
        return 0;
    int rc = ring_lock(self, st, cpu);
    if (rc)
        return rc == -EBUSY ? 0 : rc;
    some(c, &at, &queued);
    for (; at < queued && !rc; at++) {
        struct shi_rcu_head *head = &c->ring[at % SHI_RCU_RING];
        uint32_t kind = shi_load_relaxed(&head->kind);
        if (kind == SHI_RCU_GONE || (kind == SHI_RCU_PYTHON && !python))
            continue;
        if (!shi_rcu_advance(self, head->seq, false)) {
            rc = -EAGAIN;
            break;
        }
        shi_store_relaxed(&head->kind, SHI_RCU_BUSY);
        shi_signal_fence(); /* before it does anything: see ring_lock */
        if (kind == SHI_RCU_PYTHON) {
            *python = head->info;
            rc = 1;
            break;
        }
        shi_native_handler *function = shi_native_get(head->func);
        if (function && kind == SHI_RCU_INT)
            function((void *)(uintptr_t)head->info);
        else if (function && head->info < shi_array_end(self->m))
            function(self->m->base + head->info);
        shi_end_if_forked(self);
        if (!python)
            shi_fetch_add_relaxed(&st->migrated, 1);
        shi_store_relaxed(&head->kind, SHI_RCU_GONE);
    }
    sweep(c);
    shi_lock_release(self, &c->lock);
    return rc;
}

int shi_rcu_core(struct shi_self *self, uint64_t *python)
{
    struct shi_rcu *st = shi_rcu_state(self->m);
    int rc = st ? do_batch(self, st, self->id, python) : 0;
    uint32_t cpu;
    if (rc > 0 || !st || !shi_load_relaxed(&st->left))
        return rc;
    /* First: a CPU that goes meanwhile sets it again. */
    shi_xchg_full(&st->left, 0);
    for (cpu = 0; cpu < self->m->ncpus; cpu++)
        if (cpu != self->id && !online(self->m, cpu) && do_batch(self, st, cpu, NULL) < 0) {
            shi_store_full(&st->left, 1);
            rc = -EAGAIN;
        }
    return rc;
}

void shi_rcu_done(struct shi_self *self)
{
    struct shi_rcu_cpu *c = &shi_rcu_state(self->m)->cpu[self->id];
    uint64_t at, queued;
    if (some(c, &at, &queued) && shi_load_relaxed(kind_of(c, at)) == SHI_RCU_BUSY) {
        shi_store_relaxed(kind_of(c, at), SHI_RCU_GONE);
        sweep(c);
    }
}

uint32_t shi_rcu_natives_left(const struct shi_machine *m, uint32_t cpu)
{
    struct shi_rcu *st = shi_rcu_state(m);
    uint64_t at, queued;
    uint32_t n = 0;
    if (!st || !some(&st->cpu[cpu], &at, &queued))
        return 0;
    for (; at < queued; at++) {
        uint32_t kind = shi_load_relaxed(kind_of(&st->cpu[cpu], at));
        n += kind == SHI_RCU_INT || kind == SHI_RCU_POINTER || kind == SHI_RCU_BUSY;
    }
    return n;
}

/* What only the dead process could have called. */
static void lose_python(struct shi_rcu_cpu *c)
{
    uint64_t at, queued;
    if (!some(c, &at, &queued))
        return;
    for (; at < queued; at++) {
        uint32_t kind = SHI_RCU_PYTHON;
        if (shi_cas_full(kind_of(c, at), &kind, SHI_RCU_GONE))
            shi_fetch_add_relaxed(&c->lost, 1);
    }
}

void shi_rcu_dead(struct shi_self *self, uint32_t cpu)
{
    struct shi_rcu *st = shi_rcu_state(self->m);
    if (!st)
        return;
    struct shi_rcu_cpu *c = &st->cpu[cpu];
    if (shi_load_relaxed(&c->nesting))
        shi_fetch_add_relaxed(&st->died_readers, 1);
    shi_store_relaxed(&c->nesting, 0);
    shi_store_relaxed(&c->need_qs, 0);
    shi_fetch_and_full(&c->watching, ~1ull); /* its next process begins awake */
    lose_python(c);
    report(self, st, cpu);
}

/* Have the first CPU online after `cpu` invoke what is left: which, or -1. */
static int tell(struct shi_self *self, uint32_t cpu)
{
    const struct shi_machine *m = self->m;
    const struct shi_call call = { .func = SHI_FUNC_NATIVE | (uint32_t)tick_native,
                                   .kind = SHI_K_NONE,
                                   .apply = SHI_A_INFO };
    uint32_t i, to = cpu;
    for (i = 0; i < m->ncpus; i++) {
        to = to + 1 < m->ncpus ? to + 1 : 0;
        if (to != self->id && online(m, to) &&
            shi_call_post(self, &call, SHI_CSD_ASYNC, to) >= 0)
            return (int)to;
    }
    return -1;
}

void shi_rcu_retell(struct shi_self *self)
{
    static shi_a32 last; /* another one each time: who was told may be stopped */
    struct shi_rcu *st = shi_rcu_state(self->m);
    if (!st)
        return;
    shi_store_full(&st->left, 1);
    if (!self->host) {
        shi_raise_softirq(self, SHI_RCU_SOFTIRQ);
        return;
    }
    int told = tell(self, shi_load_relaxed(&last));
    if (told >= 0)
        shi_store_relaxed(&last, (uint32_t)told);
}

void shi_rcu_leave(struct shi_self *self, uint32_t cpu)
{
    const struct shi_machine *m = self->m;
    struct shi_rcu *st = shi_rcu_state(m);
    if (!st)
        return;
    if (shi_load_relaxed(&st->cpu[cpu].done) == shi_load_relaxed(&st->cpu[cpu].queued) &&
        shi_word_state(shi_load_full(&shi_slot(m, cpu)->word)) != SHI_DEAD &&
        !shi_load_relaxed(&st->left))
        return; /* it has left none, and was not to invoke others' */
    shi_store_full(&st->left, 1);
    /* Who is told has no need to be anybody's neighbour; where nobody is online, the first
     * that is again looks (shi_rcu_join). */
    tell(self, cpu);
}

void shi_rcu_join(struct shi_self *self)
{
    struct shi_rcu *st = shi_rcu_state(self->m);
    struct shi_rcu_cpu *c = st ? &st->cpu[self->id] : NULL;
    if (c && (shi_load_relaxed(&st->left) ||
              shi_load_relaxed(&c->done) != shi_load_relaxed(&c->queued)))
        shi_raise_softirq(self, SHI_RCU_SOFTIRQ);
}

/* ---- a reader, for tests ------------------------------------------------------------- */

/*
 * A native reader of words: which object is current; how many reads there were; how many found
 * it freed; then the objects' words, 0 where an object is freed.  It looks at one for a while.
 */
static void read_object(void *info)
{
    struct shi_self *self = shi_this_cpu();
    struct shi_rcu *st = self ? shi_rcu_state(self->m) : NULL;
    shi_a64 *words = info;
    uint32_t i;
    bool freed = false;
    if (!st)
        return;
    shi_rcu_read_lock(self, st);
    const shi_a64 *object = &words[3 + shi_load_acquire(&words[0]) % 64];
    for (i = 0; i < 64; i++) {
        freed |= !shi_load_relaxed(object);
        shi_signal_fence();
    }
    shi_rcu_read_unlock(self, st);
    shi_fetch_add_relaxed(&words[1], 1);
    if (freed)
        shi_fetch_add_relaxed(&words[2], 1);
}

/* Free an object: the callback of the same test. */
static void free_object(void *info)
{
    shi_store_full((shi_a64 *)info, 0);
}

/* rcu_sched_clock_irq: callbacks wait here. */
static void tick(void *info)
{
    struct shi_self *self = shi_this_cpu();
    (void)info;
    if (self && self->m->header->users[SHI_USER_rcu])
        shi_raise_softirq(self, SHI_RCU_SOFTIRQ);
}

void shi_rcu_natives(void)
{
    exp_native = shi_native_find("rcu_exp_handler");
    if (exp_native >= 0)
        return;
    exp_native = shi_native_register("rcu_exp_handler", exp_handler);
    tick_native = shi_native_register("rcu_tick", tick);
    shi_native_register("rcu_read_object", read_object);
    shi_native_register("rcu_free_object", free_object);
}
