/* SPDX-License-Identifier: MIT */
#include "base/sys.h"

#include <errno.h>
#include <signal.h>
#include <string.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include "base/clock.h"
#include "base/native.h"
#include "base/rules.h"
#include "irq/chip.h"
#include "irq/ring.h"
#include "irq/signal.h"
#include "smp/entry.h"
#include "smp/sched.h"
#include "smp/smp.h"
#include "users/rcu.h"
#include "users/tick.h"

#ifndef sigev_notify_thread_id
#define sigev_notify_thread_id _sigev_un._tid
#endif

#define TIMERS_MIN 1024u
#define TIMERS_PER_CPU 4u
#define RUN_AT_MOST 64u    /* timers in one interrupt: a periodic one may always be due */
#define STALL_NS 50000000u /* the broadcast is so late: another CPU does it */
#define EARLY_NS 2000000u  /* what a test that breaks the rule takes for due */

/* Of this process, which is one CPU: its own timer, and timers for the interpreter. */
static struct {
    bool made;
    int id; /* the kernel's number of it (timer_create(2)) */
    uint32_t head, n;
    uint32_t timer[SHI_TIMER_QUEUE];
} own;

/* ---- where things are ------------------------------------------------------------ */

static uint32_t timers_of(uint32_t ncpus)
{
    return TIMERS_MIN + TIMERS_PER_CPU * ncpus;
}

uint64_t shi_tick_bytes(const struct shi_machine *m)
{
    uint64_t timers = timers_of(m->ncpus);
    return sizeof(struct shi_tick) + m->ncpus * sizeof(struct shi_tick_cpu) +
           timers * sizeof(struct shi_hrtimer) + m->ncpus * ((timers + 63) / 64) * 8;
}

struct shi_tick *shi_tick_state(const struct shi_machine *m)
{
    if (!shi_load_relaxed(&m->header->users[SHI_USER_tick]))
        return NULL;
    return shi_user(m, SHI_USER_tick, shi_tick_bytes(m));
}

static struct shi_hrtimer *table(const struct shi_machine *m, struct shi_tick *st)
{
    return (struct shi_hrtimer *)(void *)&st->cpu[m->ncpus];
}

static shi_a64 *adopt_of(const struct shi_machine *m, struct shi_tick *st, uint32_t cpu)
{
    uint32_t timers = timers_of(m->ncpus), words = (timers + 63) / 64;
    return (shi_a64 *)(void *)(table(m, st) + timers) + (uint64_t)cpu * words;
}

static struct shi_hrtimer *timer_at(const struct shi_machine *m, struct shi_tick *st,
                                    uint32_t index)
{
    if (index >= timers_of(m->ncpus))
        return NULL;
    struct shi_hrtimer *t = table(m, st) + index;
    return shi_load_acquire(&t->kind) ? t : NULL;
}

struct shi_hrtimer *shi_hrtimer(const struct shi_machine *m, uint32_t index)
{
    struct shi_tick *st = shi_tick_state(m);
    return st ? timer_at(m, st, index) : NULL;
}

static inline uint32_t cpu_of(uint64_t w)
{
    return (uint16_t)(w >> SHI_T_CPU_SHIFT);
}

static inline uint32_t use_of(uint64_t w)
{
    return (uint32_t)(w >> SHI_T_USE_SHIFT);
}

/* The next use: what refers to the one before is stale. */
static inline uint64_t next_use(uint64_t w, uint64_t state, uint32_t cpu)
{
    return state | (uint64_t)cpu << SHI_T_CPU_SHIFT |
           (uint64_t)(use_of(w) + 1) << SHI_T_USE_SHIFT;
}

static bool online(const struct shi_machine *m, uint32_t cpu)
{
    return cpu < m->ncpus && shi_word_online(shi_load_full(&shi_slot(m, cpu)->word));
}

/* nohz_full: to be left alone (shmipi/users/nohz.py, whose mask comes first). */
static bool isolated(const struct shi_machine *m, uint32_t cpu)
{
    const shi_a64 *mask = NULL;
    if (shi_load_relaxed(&m->header->users[SHI_USER_nohz]))
        mask = shi_user(m, SHI_USER_nohz, SHI_MASK_WORDS * sizeof(uint64_t));
    return mask && (shi_load_relaxed(&mask[cpu / 64]) >> (cpu % 64) & 1);
}

/* Who takes over from a CPU that is gone: online, from `cpu` on; one that keeps house, if there
 * is any. */
static uint32_t successor(const struct shi_machine *m, uint32_t cpu)
{
    uint32_t i, at, any = cpu;
    for (i = 0; i < m->ncpus; i++) {
        at = (cpu + i) % m->ncpus;
        if (!online(m, at))
            continue;
        if (!isolated(m, at))
            return at;
        if (any == cpu)
            any = at;
    }
    return any;
}

static void mask_set(shi_a64 *mask, uint32_t cpu)
{
    shi_fetch_or_full(&mask[cpu / 64], 1ull << (cpu % 64));
}

static bool mask_clear(shi_a64 *mask, uint32_t cpu)
{
    uint64_t bit = 1ull << (cpu % 64);
    if (!(shi_load_relaxed(&mask[cpu / 64]) & bit))
        return false;
    return (shi_fetch_and_full(&mask[cpu / 64], ~bit) & bit) != 0;
}

static bool mask_test(const shi_a64 *mask, uint32_t cpu)
{
    return (shi_load_full(&mask[cpu / 64]) >> (cpu % 64) & 1) != 0;
}

/* A time that is published: 0, as the state is made, is never. */
static uint64_t published(const shi_a64 *when)
{
    uint64_t ns = shi_load_full(when);
    return ns ? ns : SHI_NEVER;
}

/* True: it was later, so that who waits for it has to be told. */
static bool make_earlier(shi_a64 *when, uint64_t ns)
{
    uint64_t was = shi_load_full(when);
    while (!was || ns < was)
        if (shi_cas_full(when, &was, ns))
            return true;
    return false;
}

static void add(shi_a64 *count)
{
    shi_store_relaxed(count, shi_load_relaxed(count) + 1); /* the owner alone */
}

/* ---- the queue of a CPU: a heap, by its owner alone, soft-masked -------------------- */

static bool stale(const struct shi_machine *m, struct shi_tick *st, uint32_t cpu,
                  const struct shi_tick_entry *e)
{
    const struct shi_hrtimer *t = timer_at(m, st, e->timer);
    uint64_t w = t ? shi_load_full(&t->word) : 0;
    return !t || (w & SHI_T_STATE) != SHI_T_QUEUED || cpu_of(w) != cpu || use_of(w) != e->use;
}

static void sift_down(struct shi_tick_cpu *c, uint32_t at)
{
    struct shi_tick_entry moving = c->queue[at];
    for (;;) {
        uint32_t child = 2 * at + 1;
        if (child >= c->n)
            break;
        if (child + 1 < c->n && c->queue[child + 1].expires < c->queue[child].expires)
            child++;
        if (moving.expires <= c->queue[child].expires)
            break;
        c->queue[at] = c->queue[child];
        at = child;
    }
    c->queue[at] = moving;
}

static void sift_up(struct shi_tick_cpu *c, uint32_t at)
{
    struct shi_tick_entry moving = c->queue[at];
    while (at && moving.expires < c->queue[(at - 1) / 2].expires) {
        c->queue[at] = c->queue[(at - 1) / 2];
        at = (at - 1) / 2;
    }
    c->queue[at] = moving;
}

static void pop(struct shi_tick_cpu *c)
{
    c->queue[0] = c->queue[--c->n];
    if (c->n)
        sift_down(c, 0);
}

/* Drop what is stale. */
static void compact(struct shi_self *self, struct shi_tick *st, struct shi_tick_cpu *c)
{
    uint32_t i, kept = 0;
    for (i = 0; i < c->n; i++)
        if (!stale(self->m, st, self->id, &c->queue[i]))
            c->queue[kept++] = c->queue[i];
    c->n = kept;
    for (i = kept / 2; i-- > 0;)
        sift_down(c, i);
}

static struct shi_tick_cpu *mine(struct shi_self *self, struct shi_tick *st)
{
    struct shi_tick_cpu *c = &st->cpu[self->id];
    if (c->n > SHI_TIMER_QUEUE)
        c->n = 0; /* damaged */
    return c;
}

static bool has_room(struct shi_self *self, struct shi_tick *st, struct shi_tick_cpu *c,
                     uint32_t limit)
{
    if (c->n >= limit)
        compact(self, st, c);
    return c->n < limit;
}

static void publish_next(struct shi_tick_cpu *c)
{
    shi_store_full(&c->next_event, c->n ? c->queue[0].expires : SHI_NEVER);
}

static void push(struct shi_tick_cpu *c, uint64_t expires, uint32_t index, uint64_t w)
{
    c->queue[c->n] = (struct shi_tick_entry){ expires, index, use_of(w) };
    sift_up(c, c->n++);
    shi_store_relaxed(&c->handler, 1);
    publish_next(c);
}

/* ---- timers ---------------------------------------------------------------------- */

int64_t shi_hrtimer_setup(const struct shi_machine *m, enum shi_timer_kind kind, uint32_t func,
                          uint32_t info_kind, uint64_t info, const char *name)
{
    struct shi_tick *st = shi_tick_state(m);
    uint32_t i, n = st ? timers_of(m->ncpus) : 0;
    for (i = 0; i < n; i++) {
        struct shi_hrtimer *t = table(m, st) + i;
        uint64_t none = 0, claimed = SHI_T_AGAIN; /* of one that is free: being made */
        if (shi_load_relaxed(&t->kind) != SHI_TK_FREE || shi_load_relaxed(&t->word) ||
            !shi_cas_full(&t->word, &none, claimed))
            continue;
        t->func = func;
        t->info = info;
        t->info_kind = info_kind;
        strncpy(t->name, name, SHI_TIMER_NAME - 1);
        shi_store_relaxed(&t->expires, 0);
        shi_store_relaxed(&t->word, 1ull << SHI_T_USE_SHIFT);
        shi_store_release(&t->kind, kind); /* whole, for who finds the kind */
        return i;
    }
    return -ENOSPC;
}

/* Tell `cpu` that it has timers to put into its queue. */
static void hand_over(struct shi_self *self, struct shi_tick *st, uint32_t index, uint32_t cpu)
{
    mask_set(adopt_of(self->m, st, cpu), index);
    shi_store_full(&st->cpu[cpu].adopt, 1); /* after the bit: who takes the flag looks there */
    shi_chip_send_reschedule(self, cpu);    /* as wake_up_nohz_cpu() does */
}

int shi_hrtimer_start(struct shi_self *self, uint32_t index, uint64_t expires,
                      uint64_t interval, uint32_t cpu)
{
    struct shi_tick *st = shi_tick_state(self->m);
    struct shi_hrtimer *t = st ? timer_at(self->m, st, index) : NULL;
    bool here = !self->host && cpu == self->id;
    uint64_t w, next;
    if (!t)
        return -ENOENT;
    if (self->in_nmi)
        return -EPERM;
    if (!online(self->m, cpu))
        return -ENXIO;
    shi_enter(self);
    if (here && !has_room(self, st, mine(self, st), SHI_TIMER_QUEUE / 2)) {
        shi_leave(self);
        return -ENOSPC;
    }
    if (!expires)
        expires = 1;
    /* Before the word: if this CPU dies right after it, the timer is found as it is meant. */
    shi_store_relaxed(&t->expires, expires);
    shi_store_relaxed(&t->interval, interval);
    w = shi_load_full(&t->word);
    do {
        if ((w & SHI_T_STATE) == SHI_T_RUNNING)
            next = next_use(w, SHI_T_RUNNING | SHI_T_AGAIN, cpu_of(w));
        else
            next = next_use(w, SHI_T_QUEUED, cpu);
        /* Who has the timer by the word as it was, finds that it is not its any more. */
    } while (!shi_cas_full(&t->word, &w, next));
    if ((next & SHI_T_STATE) == SHI_T_QUEUED) {
        if (here)
            push(mine(self, st), expires, index, next);
        else
            hand_over(self, st, index, cpu);
    }
    shi_leave(self);
    if ((next & SHI_T_STATE) == SHI_T_QUEUED && !here && !online(self->m, cpu)) {
        /* It went offline meanwhile, and may have looked for its timers before ours. */
        shi_enter(self);
        self->m->timers->leave(self, cpu);
        shi_leave(self);
    } else if (here && self->in_task) {
        self->m->timers->arm(self);
    }
    return 0;
}

int shi_hrtimer_try_to_cancel(struct shi_self *self, uint32_t index)
{
    struct shi_tick *st = shi_tick_state(self->m);
    struct shi_hrtimer *t = st ? timer_at(self->m, st, index) : NULL;
    if (!t)
        return -ENOENT;
    uint64_t w = shi_load_full(&t->word);
    for (;;) {
        if ((w & SHI_T_STATE) == SHI_T_INACTIVE)
            return 0;
        if ((w & SHI_T_STATE) == SHI_T_RUNNING)
            return -1;
        if (shi_cas_full(&t->word, &w, next_use(w, SHI_T_INACTIVE, 0)))
            return 1;
    }
}

uint64_t shi_hrtimer_forward(struct shi_self *self, uint32_t index, uint64_t now,
                             uint64_t interval)
{
    struct shi_hrtimer *t = shi_hrtimer(self->m, index);
    uint64_t expires = t ? shi_load_relaxed(&t->expires) : SHI_NEVER, n;
    if (now < expires || !interval)
        return 0;
    n = (now - expires) / interval + 1;
    shi_store_relaxed(&t->expires, expires + n * interval);
    return n;
}

/* Its function has ended here. */
static void finish(struct shi_self *self, struct shi_tick *st, struct shi_hrtimer *t,
                   uint32_t index, bool restart)
{
    struct shi_tick_cpu *c = mine(self, st);
    uint64_t w = shi_load_full(&t->word), next, now = shi_now_ns();
    uint64_t interval = shi_load_relaxed(&t->interval), expires;
    do {
        if ((w & SHI_T_STATE) != SHI_T_RUNNING || cpu_of(w) != self->id)
            return;
        expires = shi_load_relaxed(&t->expires);
        if (!(w & SHI_T_AGAIN)) {
            restart = restart || interval;
            if (restart && interval && expires <= now) /* hrtimer_forward_now */
                expires += ((now - expires) / interval + 1) * interval;
        }
        bool queue = (restart || w & SHI_T_AGAIN) && has_room(self, st, c, SHI_TIMER_QUEUE);
        shi_store_relaxed(&t->expires, expires);
        next = next_use(w, queue ? SHI_T_QUEUED : SHI_T_INACTIVE, self->id);
    } while (!shi_cas_full(&t->word, &w, next));
    if ((next & SHI_T_STATE) == SHI_T_QUEUED)
        push(c, expires, index, next);
}

static void call_native(const struct shi_machine *m, const struct shi_hrtimer *t)
{
    shi_native_handler *function = shi_native_get(t->func);
    if (!function)
        return;
    if (t->info_kind == SHI_K_POINTER) {
        if (t->info < shi_array_end(m))
            function(m->base + t->info);
    } else {
        function((void *)(uintptr_t)t->info);
    }
}

/* __run_hrtimer: an entry that is due and not stale. */
static void expire(struct shi_self *self, struct shi_tick *st, struct shi_tick_cpu *c,
                   struct shi_tick_entry e)
{
    struct shi_hrtimer *t = timer_at(self->m, st, e.timer);
    uint64_t w = shi_load_full(&t->word), next;
    do {
        if ((w & SHI_T_STATE) != SHI_T_QUEUED || cpu_of(w) != self->id || use_of(w) != e.use)
            return; /* cancelled, or started elsewhere, since the look */
        next = (w & ~SHI_T_STATE) | SHI_T_RUNNING;
    } while (!shi_cas_full(&t->word, &w, next));
    add(&c->expired);
    shi_store_relaxed(&t->due, e.expires);
    shi_fetch_add_relaxed(&t->fired, 1);
    if (shi_load_relaxed(&t->kind) == SHI_TK_PYTHON) {
        own.timer[(own.head + own.n++) % SHI_TIMER_QUEUE] = e.timer; /* each at most once */
        self->expired = own.n;
        return;
    }
    call_native(self->m, t);
    shi_end_if_forked(self);
    finish(self, st, t, e.timer, false);
}

int64_t shi_tick_pop(struct shi_self *self)
{
    if (!own.n)
        return -1;
    uint32_t index = own.timer[own.head];
    own.head = (own.head + 1) % SHI_TIMER_QUEUE;
    self->expired = --own.n;
    return index;
}

void shi_tick_done(struct shi_self *self, uint32_t index, bool restart)
{
    struct shi_tick *st = shi_tick_state(self->m);
    struct shi_hrtimer *t = st ? timer_at(self->m, st, index) : NULL;
    shi_enter(self);
    if (t)
        finish(self, st, t, index, restart);
    shi_leave(self);
}

/* Timers that others have put on this CPU. */
static void take_over(struct shi_self *self, struct shi_tick *st, struct shi_tick_cpu *c)
{
    const struct shi_machine *m = self->m;
    shi_a64 *bits = adopt_of(m, st, self->id);
    uint32_t i, words = (timers_of(m->ncpus) + 63) / 64;
    if (!shi_load_full(&c->adopt))
        return;
    shi_xchg_full(&c->adopt, 0); /* the flag first: a bit set after its word was read sets it */
    for (i = 0; i < words; i++) {
        uint64_t set = shi_load_full(&bits[i]) ? shi_xchg_full(&bits[i], 0) : 0;
        for (; set; set &= set - 1) {
            uint32_t index = i * 64 + (uint32_t)__builtin_ctzll(set);
            struct shi_hrtimer *t = timer_at(m, st, index);
            uint64_t w = t ? shi_load_full(&t->word) : 0;
            if (!t || (w & SHI_T_STATE) != SHI_T_QUEUED || cpu_of(w) != self->id)
                continue; /* cancelled, or started elsewhere, since */
            if (has_room(self, st, c, SHI_TIMER_QUEUE))
                push(c, shi_load_relaxed(&t->expires), index, w);
            else
                shi_fetch_add_relaxed(&t->lost, 1);
        }
    }
}

/* ---- the broadcast ----------------------------------------------------------------- */

static uint32_t timer_line(const struct shi_machine *m)
{
    uint32_t line;
    for (line = 0; line < m->chip.nlines; line++)
        if (m->chip.use[line] == SHI_USE_TIMER)
            return line;
    return SHI_NO_LINE;
}

static int tick_native = -1;

/* tick_broadcast(mask) of the architecture: the timer's line, and where there is none a
 * function call, as on mips. */
static void send(struct shi_self *self, struct shi_tick_cpu *c, uint32_t cpu)
{
    uint32_t line = timer_line(self->m);
    add(&c->sent);
    if (line != SHI_NO_LINE) {
        shi_count(self, SHI_C_chip_writes);
        shi_irq_raise(self, cpu, shi_line_of(self->m, line, cpu));
        return;
    }
    const struct shi_call call = { .func = SHI_FUNC_NATIVE | (uint32_t)tick_native,
                                   .kind = SHI_K_NONE,
                                   .apply = SHI_A_INFO };
    if (shi_call_post(self, &call, SHI_CSD_ASYNC, cpu) < 0) {
        struct shi_tick *st = shi_tick_state(self->m);
        if (st) {
            mask_clear(st->pending, cpu); /* every csd is in flight: in a moment again */
            make_earlier(&st->bc_next, shi_now_ns() + 1000000);
        }
    }
}

/*
 * tick_handle_oneshot_broadcast, then tick_do_broadcast: interrupt who sleeps and whose timer
 * is due.  True: this CPU is among them; it is taken out of the mask, and runs its handler by
 * itself.
 */
static bool broadcast(struct shi_self *self, struct shi_tick *st)
{
    struct shi_tick_cpu *c = mine(self, st);
    uint32_t i, cpu, words = shi_affinity_words(self->m->ncpus);
    uint64_t now = shi_now_ns(), next = SHI_NEVER;
    bool local = false;
    add(&c->handlers);
    /* First, the mask second: a CPU that goes to sleep stands in the mask before it makes this
     * earlier.  Either it is found below, or what it stores stays. */
    shi_xchg_full(&st->bc_next, SHI_NEVER);
    for (i = 0; i < words; i++) {
        uint64_t set = shi_load_full(&st->oneshot[i]);
        for (; set; set &= set - 1) {
            cpu = i * 64 + (uint32_t)__builtin_ctzll(set);
            if (cpu >= self->m->ncpus)
                break;
            uint64_t event = published(&st->cpu[cpu].next_event);
            if (event > now) {
                if (event < next)
                    next = event;
            } else if (cpu == self->id) {
                local = true;
            } else if (!mask_test(st->pending, cpu) && online(self->m, cpu)) {
                mask_set(st->pending, cpu);
                send(self, c, cpu);
            }
        }
    }
    if (next != SHI_NEVER && !shi_rule_off(self->m, SHI_RULE_tick_reprogram))
        make_earlier(&st->bc_next, next);
    return local;
}

/* hotplug_cpu__broadcast_tick_pull: another CPU takes the broadcast over from `from`. */
static void pull(struct shi_self *self, struct shi_tick *st, uint32_t from, bool stalled)
{
    const struct shi_machine *m = self->m;
    uint32_t bound = from + 1, i, to = 0;
    if (shi_load_full(&st->bound_on) != bound)
        return;
    for (i = 1; i < m->ncpus && !to; i++)
        if (online(m, (from + i) % m->ncpus))
            to = (from + i) % m->ncpus + 1;
    if ((stalled && !to) || !shi_cas_full(&st->bound_on, &bound, to))
        return;
    shi_fetch_add_relaxed(&st->handovers, 1);
    if (stalled)
        shi_fetch_add_relaxed(&st->stalls, 1);
    if (!to)
        return; /* who sleeps next takes it */
    /* What the one before had to do is not known: look at all who sleep. */
    shi_store_full(&st->bc_next, shi_now_ns());
    shi_irq_ring_pending(self, to - 1, false);
}

/* ---- what the CPU asks ------------------------------------------------------------- */

static bool bound(const struct shi_self *self, const struct shi_tick *st)
{
    return shi_load_relaxed(&st->bound_on) == self->id + 1;
}

/* When a task that sleeps here is to be woken: schedule_hrtimeout()'s timer, which is always
 * this CPU's, and is not taken over when it goes (smp/sched.c wakes the tasks then). */
static uint64_t next_sleeper(const struct shi_self *self)
{
    uint64_t when = shi_load_relaxed(&shi_rq(self->m, self->id)->timer);
    return when ? when : SHI_NEVER;
}

static uint64_t next_timer(const struct shi_self *self, struct shi_tick *st)
{
    const struct shi_tick_cpu *c = &st->cpu[self->id];
    uint64_t next = published(&c->next_event), bc;
    if (shi_load_relaxed(&c->adopt))
        return 0;
    if (bound(self, st) && (bc = published(&st->bc_next)) < next)
        next = bc;
    if (next && next != SHI_NEVER && shi_rule_off(self->m, SHI_RULE_tick_early))
        next = next > EARLY_NS ? next - EARLY_NS : 0;
    return next;
}

/* What the CPU's own event device is set to.  `st`: NULL, of a machine without timers. */
static uint64_t next_of(const struct shi_self *self, struct shi_tick *st)
{
    uint64_t sleeper = next_sleeper(self), next = st ? next_timer(self, st) : SHI_NEVER;
    return sleeper < next ? sleeper : next;
}

static bool due(struct shi_self *self, uint64_t now)
{
    return now >= next_of(self, shi_tick_state(self->m));
}

/* hrtimer_interrupt: what is due, in order. */
static void expire_due(struct shi_self *self, struct shi_tick *st)
{
    struct shi_tick_cpu *c = mine(self, st);
    uint32_t ran = 0;
    uint64_t now = shi_now_ns();
    if (shi_rule_off(self->m, SHI_RULE_tick_early))
        now += EARLY_NS;
    while (c->n && c->queue[0].expires <= now && ran < RUN_AT_MOST) {
        struct shi_tick_entry e = c->queue[0];
        pop(c);
        if (stale(self->m, st, self->id, &e))
            continue;
        expire(self, st, c, e);
        ran++;
    }
    publish_next(c);
}

static void run(struct shi_self *self)
{
    struct shi_tick *st = shi_tick_state(self->m);
    shi_cause(self, SHI_CAUSE_timer);
    self->in_irq++;
    if (st) {
        struct shi_tick_cpu *c = mine(self, st);
        take_over(self, st, c);
        if (bound(self, st) && published(&st->bc_next) <= shi_now_ns())
            broadcast(self, st); /* ours, if it is, is below */
        add(&c->local);
        expire_due(self, st);
    }
    /* hrtimer_wakeup(), of each.  The lock of a run queue is free of this CPU here: who has it is
     * soft-masked until it is given back, and so is not interrupted (rq_lock). */
    uint64_t now = shi_now_ns();
    if (now >= next_sleeper(self))
        shi_sched_expire(self, now);
    self->in_irq--;
}

/* The kernel's timer_create(2), by itself: this may be an interrupt's handler. */
static bool make_timer(struct shi_self *self)
{
    struct sigevent event;
    if (own.made)
        return true;
    memset(&event, 0, sizeof event);
    event.sigev_notify = SIGEV_THREAD_ID;
    event.sigev_signo = (int)self->m->kick_signal;
    event.sigev_notify_thread_id = self->tid;
    event.sigev_value.sival_ptr =
        (void *)(uintptr_t)((uint64_t)self->m->cookie << 32 | SHI_TICK_SIGNAL | self->id);
    own.made = syscall(SYS_timer_create, CLOCK_MONOTONIC, &event, &own.id) == 0;
    return own.made;
}

/* Set it (0: not at all). */
static void set_timer(struct shi_self *self, uint64_t ns)
{
    const struct itimerspec at = { .it_value = { .tv_sec = (time_t)(ns / 1000000000u),
                                                 .tv_nsec = (long)(ns % 1000000000u) } };
    self->tick_armed = ns;
    shi_signal_fence();
    syscall(SYS_timer_settime, own.id, TIMER_ABSTIME, &at, NULL);
}

/* For how long the timers let this CPU sleep, which is the broadcast's business from now on. */
static int64_t enter_broadcast(struct shi_self *self, struct shi_tick *st)
{
    struct shi_tick_cpu *c = &st->cpu[self->id];
    uint64_t own_next = published(&c->next_event), now, next;
    uint32_t holder = shi_load_full(&st->bound_on);
    if (own_next == SHI_NEVER && holder != self->id + 1)
        return shi_load_full(&c->adopt) ? 0 : -1;
    /* The first to sleep with a timer has the device; so has who finds its owner gone. */
    while (holder != self->id + 1 && (!holder || !online(self->m, holder - 1))) {
        if (shi_cas_full(&st->bound_on, &holder, self->id + 1)) {
            if (holder) {
                shi_fetch_add_relaxed(&st->handovers, 1);
                shi_store_full(&st->bc_next, shi_now_ns());
            }
            holder = self->id + 1;
        }
    }
    if (own_next != SHI_NEVER)
        mask_set(st->oneshot, self->id);
    if (holder == self->id + 1) {
        if (own_next != SHI_NEVER)
            make_earlier(&st->bc_next, own_next);
        if (shi_load_full(&c->adopt))
            return 0;
        next = published(&st->bc_next);
        if (own_next < next)
            next = own_next; /* where somebody else has the device by now */
        if (next == SHI_NEVER)
            return -1;
        now = shi_now_ns();
        return next > now ? (int64_t)(next - now) : 0;
    }
    if (self->tick_armed) /* broadcast_shutdown_local */
        set_timer(self, 0);
    /* Full, after the mask: see broadcast(). */
    if (!shi_rule_off(self->m, SHI_RULE_tick_program) && make_earlier(&st->bc_next, own_next)) {
        /* Its device is its own process's: it has to set it anew. */
        self->in_core++;
        shi_irq_ring_pending(self, holder - 1, false);
        self->in_core--;
    }
    return shi_load_full(&c->adopt) ? 0 : -1;
}

static int64_t enter(struct shi_self *self)
{
    shi_rcu_idle_enter(self);
    struct shi_tick *st = shi_tick_state(self->m);
    int64_t ns = st ? enter_broadcast(self, st) : -1;
    uint64_t sleeper = next_sleeper(self), now;
    if (__builtin_expect(sleeper == SHI_NEVER, 1))
        return ns;
    now = shi_now_ns();
    int64_t left = sleeper > now ? (int64_t)(sleeper - now) : 0;
    return ns < 0 || left < ns ? left : ns;
}

static void leave_sleep(struct shi_self *self)
{
    shi_rcu_idle_exit(self);
    struct shi_tick *st = shi_tick_state(self->m);
    if (st && mask_clear(st->oneshot, self->id))
        mask_clear(st->pending, self->id);
}

static void arm(struct shi_self *self)
{
    if (!self->m->kick || self->host)
        return;
    uint64_t next = next_of(self, shi_tick_state(self->m));
    if (__builtin_expect(next == SHI_NEVER, 1))
        return;
    /* Soft-masked: an interrupt between the look and the system call might set it for earlier,
     * which this would undo. */
    shi_enter(self);
    next = next_of(self, shi_tick_state(self->m));
    /* One that is set for earlier comes for nothing, and that is cheaper than to change it. */
    if (next != SHI_NEVER && (!self->tick_armed || self->tick_armed > next) && make_timer(self))
        set_timer(self, next ? next : 1); /* in the past: at once */
    shi_leave(self);
}

/* hrtimers_cpu_dying and tick_broadcast_offline. */
static void leave(struct shi_self *self, uint32_t cpu)
{
    const struct shi_machine *m = self->m;
    struct shi_tick *st = shi_tick_state(m);
    uint32_t i, n = timers_of(m->ncpus), to = cpu;
    if (shi_word_state(shi_load_full(&shi_slot(m, cpu)->word)) == SHI_DEAD)
        shi_rcu_dead(self, cpu);
    shi_rcu_leave(self, cpu);
    if (!st)
        return;
    bool dying = !self->host && cpu == self->id, dead;
    dead = shi_word_state(shi_load_full(&shi_slot(m, cpu)->word)) == SHI_DEAD;
    if (dying || dead) {
        mask_clear(st->oneshot, cpu);
        mask_clear(st->pending, cpu);
        shi_store_full(&st->cpu[cpu].next_event, SHI_NEVER);
        st->cpu[cpu].n = 0;
        if (dying)
            shi_store_relaxed(&st->cpu[cpu].handler, 0);
    }
    for (i = 0; i < n; i++) {
        struct shi_hrtimer *t = table(m, st) + i;
        uint64_t w = shi_load_full(&t->word);
        if (!shi_load_relaxed(&t->kind) || cpu_of(w) != cpu)
            continue;
        to = successor(m, to);
        if (!online(m, to)) { /* the last one: they wait until it is back */
            mask_set(adopt_of(m, st, cpu), i);
            shi_store_full(&st->cpu[cpu].adopt, 1);
            continue;
        }
        /* Its function ran when its CPU died: what it did is not known. */
        bool cut = (w & SHI_T_STATE) == SHI_T_RUNNING;
        if (cut && (!dead || !shi_cas_full(&t->word, &w, next_use(w, SHI_T_QUEUED, to))))
            continue;
        if (cut) {
            shi_fetch_add_relaxed(&st->died, 1);
            if (!(w & SHI_T_AGAIN) && !shi_load_relaxed(&t->interval)) {
                w = shi_load_full(&t->word);
                shi_cas_full(&t->word, &w, next_use(w, SHI_T_INACTIVE, 0));
                continue;
            }
        } else if ((w & SHI_T_STATE) != SHI_T_QUEUED ||
                   !shi_cas_full(&t->word, &w, next_use(w, SHI_T_QUEUED, to))) {
            continue;
        }
        shi_fetch_add_relaxed(&st->moved, 1);
        hand_over(self, st, i, to);
        to = (to + 1) % m->ncpus; /* not all on one */
    }
    pull(self, st, cpu, false);
}

int64_t shi_tick_check(const struct shi_machine *m)
{
    struct shi_tick *st = shi_tick_state(m);
    uint32_t holder = st ? shi_load_full(&st->bound_on) : 0, cpu;
    if (!holder || holder > m->ncpus)
        return -1;
    struct shi_slot *owner = shi_slot(m, holder - 1);
    for (cpu = 0; cpu < m->ncpus; cpu++) {
        struct shi_slot *slot = shi_slot(m, cpu);
        uint64_t asleep = shi_load_full(&slot->word), w = shi_load_full(&owner->word);
        uint64_t halts = shi_load_full(&slot->counters[SHI_CTX_TASK][SHI_C_halts]);
        uint64_t owner_halts = shi_load_full(&owner->counters[SHI_CTX_TASK][SHI_C_halts]);
        uint64_t handlers = shi_load_full(&st->cpu[holder - 1].handlers);
        if (cpu == holder - 1 || shi_word_state(asleep) != SHI_HALTED ||
            shi_word_state(w) != SHI_HALTED || !mask_test(st->oneshot, cpu) ||
            mask_test(st->pending, cpu))
            continue;
        uint64_t event = published(&st->cpu[cpu].next_event), next = published(&st->bc_next);
        /* Neither has woken up meanwhile: they sleep on, and nothing will wake them. */
        if (event < next && shi_load_full(&slot->word) == asleep &&
            shi_load_full(&owner->word) == w && shi_load_full(&st->bound_on) == holder &&
            shi_load_full(&st->cpu[holder - 1].handlers) == handlers &&
            shi_load_full(&slot->counters[SHI_CTX_TASK][SHI_C_halts]) == halts &&
            shi_load_full(&owner->counters[SHI_CTX_TASK][SHI_C_halts]) == owner_halts)
            return cpu;
    }
    return -1;
}

static void watch(struct shi_self *self)
{
    struct shi_tick *st = shi_tick_state(self->m);
    uint32_t holder = st ? shi_load_relaxed(&st->bound_on) : 0;
    uint64_t next = st ? published(&st->bc_next) : SHI_NEVER;
    if (holder && holder <= self->m->ncpus && next != SHI_NEVER &&
        shi_now_ns() > next + STALL_NS)
        pull(self, st, holder - 1, true);
}

/* ---- the line ---------------------------------------------------------------------- */

int shi_tick_receive_broadcast(struct shi_self *self)
{
    struct shi_tick *st = shi_tick_state(self->m);
    if (!st || self->host)
        return -ENODEV;
    struct shi_tick_cpu *c = mine(self, st);
    if (!shi_load_relaxed(&c->handler))
        return -EINVAL;
    add(&c->broadcast);
    mask_clear(st->pending, self->id);
    self->in_irq++;
    take_over(self, st, c);
    expire_due(self, st);
    self->in_irq--;
    return 0;
}

static bool take_timer(struct shi_self *self, uint32_t line)
{
    (void)line;
    shi_tick_receive_broadcast(self);
    return true;
}

/* tick_broadcast_callee. */
static void callee(void *info)
{
    struct shi_self *self = shi_this_cpu();
    (void)info;
    if (self)
        shi_tick_receive_broadcast(self);
}

static const struct shi_timers timers = {
    .due = due,
    .run = run,
    .enter = enter,
    .exit = leave_sleep,
    .arm = arm,
    .leave = leave,
    .join = shi_rcu_join,
    .watch = watch,
};

void shi_tick_natives(void)
{
    tick_native = shi_native_find("tick_receive_broadcast");
    if (tick_native < 0)
        tick_native = shi_native_register("tick_receive_broadcast", callee);
}

void shi_tick_register(struct shi_machine *m)
{
    m->actions[SHI_USE_TIMER] = take_timer;
    m->timers = &timers;
}
