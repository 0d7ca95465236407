/* SPDX-License-Identifier: MIT */
#include "base/sys.h"

#include <errno.h>
#include <limits.h>
#include <linux/futex.h>
#include <sys/syscall.h>
#include <time.h>

#include "base/clock.h"
#include "base/native.h"
#include "base/rules.h"
#include "base/step.h"
#include "irq/ring.h"
#include "smp/csd.h"
#include "smp/entry.h"
#include "smp/queue.h"
#include "smp/smp.h"
#include "smp/stop.h"
#include "smp/wait.h"

#define SPIN_NS 100000u
#define SPIN_SHARED_NS 20000u /* the host, or others' programs, want this core */
#define SPIN_ROUND 64
#define LOOK_NS 100000000u /* asleep: has somebody died on the way to the next state? */

/* Who sleeps for the next state: those that run no function are not woken for RUN. */
#define WAKE_ACTIVE 1u
#define WAKE_ALL 3u

static inline uint32_t state_of(uint32_t word)
{
    return word & 0xf;
}

static inline bool given_up(uint32_t word)
{
    return state_of(word) > SHI_MS_EXIT;
}

static inline bool is_over(uint32_t word)
{
    return state_of(word) >= SHI_MS_EXIT || state_of(word) == SHI_MS_NONE;
}

/* The state after `word`, when all have acknowledged that.  RUN that somebody died in ends as what
 * is given up does, and as late as what is not: when all others have done. */
static inline uint32_t next_of(uint32_t word)
{
    return state_of(word) == SHI_MS_RUN && word & 0xf0
               ? (word & ~0xffu) | SHI_MS_DIED | SHI_MS_RUN << 4
               : word + 1;
}

static inline bool same_use(uint32_t a, uint32_t b)
{
    return a >> 8 == b >> 8;
}

static inline uint64_t acked_by(uint32_t src, uint32_t word)
{
    return (uint64_t)(src + 1) << 32 | word;
}

/* ---- states ------------------------------------------------------------------------- */

/* Those that have acknowledged `before` sleep by their doorbells while interrupts are on, so
 * that calls wake them, and on the state's word once they are off. */
static void wake(struct shi_self *self, uint32_t src, uint32_t before, uint32_t whom)
{
    struct shi_multi *ms = &shi_slot(self->m, src)->multi;
    uint32_t cpu, hi = shi_load_relaxed(&ms->hi);
    if (state_of(before) <= SHI_MS_PREPARE || shi_rule_off(self->m, SHI_RULE_stop_irqs_off))
        for (cpu = shi_load_relaxed(&ms->lo); cpu <= hi && cpu < self->m->ncpus; cpu++) {
            const struct shi_slot *slot = shi_slot(self->m, cpu);
            if (cpu != self->id && shi_load_relaxed(&slot->stop_ack) == acked_by(src, before) &&
                shi_word_state(shi_load_full(&slot->word)) == SHI_HALTED)
                shi_irq_ring_waiter(self, cpu);
        }
    /* Full: after the state has changed.  Who sleeps has counted itself first, and looks at the
     * state second (the kernel does, in futex): one of the two sees the other. */
    if (shi_load_full(&ms->sleepers))
        syscall(SYS_futex, &ms->state, FUTEX_WAKE_BITSET, INT_MAX, NULL, NULL, whom);
}

/*
 * All have acknowledged state `word`: the next.  Called by the last of them, and if that was
 * killed on the way by whoever looks: both steps are compare-and-swaps from one known value, so
 * nobody does them twice.
 */
static void advance(struct shi_self *self, uint32_t src, uint32_t word)
{
    struct shi_multi *ms = &shi_slot(self->m, src)->multi;
    uint32_t next = next_of(word);
    uint64_t ack = (uint64_t)word << 32;
    uint64_t count = state_of(next) == SHI_MS_RUN ? shi_load_relaxed(&ms->nactive)
                                                  : shi_load_relaxed(&ms->n);
    /* set_state(): the counter first, the state second. */
    shi_cas_full(&ms->ack, &ack, (uint64_t)next << 32 | count);
    uint32_t was = word;
    SHI_STEP(self, multi_state);
    if (shi_cas_full(&ms->state, &was, next))
        wake(self, src, word, state_of(next) == SHI_MS_RUN ? WAKE_ACTIVE : WAKE_ALL);
}

/* ack_state(): the last one to acknowledge moves to the next. */
static void acknowledge(struct shi_self *self, uint32_t src, uint32_t word, uint32_t count)
{
    struct shi_multi *ms = &shi_slot(self->m, src)->multi;
    uint64_t ack = shi_load_relaxed(&ms->ack);
    if (!self->host)
        shi_store_full(&self->slot->stop_ack, acked_by(src, word));
    do {
        if (ack >> 32 != word || (uint32_t)ack < count)
            return; /* given up since, or damaged */
        /* Full: releases what was done in this state to who goes on from the next. */
    } while (!shi_cas_full(&ms->ack, &ack, ack - count));
    SHI_STEP(self, multi_ack);
    if ((uint32_t)ack == count)
        advance(self, src, word);
    else if (shi_rule_off(self->m, SHI_RULE_stop_last_ack) && src != self->id) {
        shi_store_full(&ms->ack, (uint64_t)word << 32);
        advance(self, src, word);
    }
}

/* Did the last one to acknowledge end before it advanced?  Then this does. */
static void look(struct shi_self *self, uint32_t src, uint32_t word)
{
    uint64_t ack = shi_load_full(&shi_slot(self->m, src)->multi.ack);
    if (ack == (uint64_t)word << 32 || ack >> 32 == next_of(word))
        advance(self, src, word);
}

/* Give it up, wherever it is by now but not once the function may run (unless `running`). */
static void give_up(struct shi_self *self, uint32_t src, uint32_t use, enum shi_multi_state how,
                    bool running)
{
    struct shi_multi *ms = &shi_slot(self->m, src)->multi;
    /* Acquire pairs with the swap of who has changed it last. */
    uint32_t was = shi_load_acquire(&ms->state);
    do {
        if (!same_use(was, use) || is_over(was) || (state_of(was) == SHI_MS_RUN && !running))
            return;
    } while (
        !shi_cas_full(&ms->state, &was, (was & ~0xffu) | (uint32_t)how | state_of(was) << 4));
    wake(self, src, was, WAKE_ALL);
}

/* One that runs the function has died.  The others may run it still, and nothing else may run
 * until they have: RUN begins anew without it, for those who have acknowledged it too. */
static void run_without(struct shi_self *self, uint32_t src, uint32_t word)
{
    struct shi_multi *ms = &shi_slot(self->m, src)->multi;
    uint32_t left = shi_load_relaxed(&ms->nactive) - 1, dead = word >> 4 & 0xf, was = word;
    uint32_t next = (word & ~0xf0u) | (dead + 1) << 4;
    if (!left || left >= self->m->ncpus || dead == 0xf) {
        give_up(self, src, word, SHI_MS_DIED, true);
        return;
    }
    shi_store_relaxed(&ms->nactive, left);
    /* As in set_state(): the counter first.  Who acknowledges `word` from here on counts for
     * nothing, and does so once more when it finds the state changed.  If the last one had,
     * and advances meanwhile, its swap of the state makes this one fail: all have done. */
    shi_store_full(&ms->ack, (uint64_t)next << 32 | left);
    if (shi_cas_full(&ms->state, &was, next))
        wake(self, src, word, WAKE_ACTIVE);
}

/* ---- the sender --------------------------------------------------------------------- */

int shi_multi_begin(struct shi_self *self, uint32_t n, uint32_t nactive, uint32_t lo,
                    uint32_t hi, uint64_t deadline_ns)
{
    struct shi_multi *ms = &self->slot->multi;
    /* Acquire pairs with the swap to its end: nobody writes what is set below. */
    uint32_t was = shi_load_acquire(&ms->state);
    if (!is_over(was))
        return -EBUSY;
    uint32_t word = ((was & ~0xffu) + 0x100) | SHI_MS_PREPARE;
    shi_store_relaxed(&ms->sleepers, 0);
    shi_store_relaxed(&ms->n, n);
    shi_store_relaxed(&ms->nactive, nactive);
    shi_store_relaxed(&ms->lo, lo);
    shi_store_relaxed(&ms->hi, hi);
    shi_store_relaxed(&ms->deadline_ns, deadline_ns);
    /* The sender acknowledges too, when all are queued: nobody goes on before. */
    shi_store_full(&ms->ack, (uint64_t)word << 32 | (n + 1));
    /* Release: who finds this use finds all of the above, and that the csds of the last are
     * abandoned (shi_multi_enter). */
    shi_store_full(&ms->state, word);
    return 0;
}

int shi_multi_queue(struct shi_self *self, uint32_t local, uint32_t cpu, bool active)
{
    return shi_call_single(self, local, active ? SHI_CSD_MULTI_ACTIVE : SHI_CSD_MULTI, cpu);
}

void shi_multi_go(struct shi_self *self, uint32_t missing, bool void_)
{
    struct shi_multi *ms = &self->slot->multi;
    uint32_t word = shi_load_relaxed(&ms->state);
    if (void_)
        give_up(self, self->id, word, SHI_MS_GONE, false);
    else if (state_of(word) == SHI_MS_PREPARE) {
        shi_store_relaxed(&ms->n, shi_load_relaxed(&ms->n) - missing);
        acknowledge(self, self->id, word, 1 + missing);
    }
}

void shi_multi_cancel(struct shi_self *self, bool even_running)
{
    give_up(self, self->id, shi_load_acquire(&self->slot->multi.state), SHI_MS_CANCELLED,
            even_running);
}

uint32_t shi_multi_word(const struct shi_self *self)
{
    /* Acquire pairs with the swap to EXIT: what the function has done. */
    return shi_load_acquire(&self->slot->multi.state);
}

bool shi_multi_is_late(const struct shi_self *self, uint32_t cpu)
{
    uint32_t word = shi_multi_word(self);
    /* Acquire pairs with that CPU's store, before it counted itself. */
    uint64_t ack = shi_load_acquire(&shi_slot(self->m, cpu)->stop_ack);
    uint32_t in = given_up(word) ? word >> 4 & 0xf : state_of(word);
    return ack >> 32 != self->id + 1 || !same_use((uint32_t)ack, word) ||
           state_of((uint32_t)ack) < in;
}

/* ---- waiting ------------------------------------------------------------------------ */

/* Does a CPU have this one's core as well?  Then nothing happens there while this one spins. */
static bool shares_core(struct shi_self *self)
{
    if (!self->core_shared) {
        uint32_t mine = shi_load_relaxed(&self->slot->core), cpu;
        self->core_shared = 1;
        for (cpu = 0; cpu < self->m->ncpus; cpu++)
            if (cpu != self->id && shi_load_relaxed(&shi_slot(self->m, cpu)->core) == mine) {
                self->core_shared = 2;
                break;
            }
    }
    return self->core_shared == 2;
}

struct awaited {
    const shi_a32 *state;
    uint32_t word;
};

static bool has_changed(const void *arg)
{
    const struct awaited *a = arg;
    return shi_load_full(a->state) != a->word;
}

static void sleep_off(struct shi_self *self, struct shi_multi *ms, uint32_t word,
                      uint64_t until)
{
    const struct timespec t = { .tv_sec = (time_t)(until / 1000000000),
                                .tv_nsec = (long)(until % 1000000000) };
    shi_fetch_add_full(&ms->sleepers, 1);
    SHI_STEP(self, multi_park);
    syscall(SYS_futex, &ms->state, FUTEX_WAIT_BITSET, word, &t, NULL,
            self->multi.active ? WAKE_ALL : WAKE_ALL & ~WAKE_ACTIVE);
    /* Who was killed in there is counted for ever: one system call more for who advances. */
    if (same_use(shi_load_relaxed(&ms->state), word))
        shi_fetch_sub_full(&ms->sleepers, 1);
}

/* Until the state is another one, or there is work that may be served, or for a while. */
static void await(struct shi_self *self, struct shi_multi *ms, uint32_t word)
{
    bool serving = !self->irqs_off; /* PREPARE */
    uint64_t deadline = shi_load_relaxed(&ms->deadline_ns), now = shi_now_ns(), until;
    uint64_t spin = now + (shares_core(self)         ? 0
                           : self->m->oversubscribed ? SPIN_SHARED_NS
                                                     : SPIN_NS);
    struct awaited awaited = { &ms->state, word };
    uint32_t i;
    do {
        for (i = 0; i < SPIN_ROUND; i++) {
            /* Acquires pair with the swap to the next state, and with a push. */
            if (shi_load_acquire(&ms->state) != word ||
                (serving && shi_word_work(shi_load_acquire(&self->slot->word))))
                return;
        }
        shi_cpu_relax();
        now = shi_now_ns();
    } while (now < spin);
    if (deadline && now >= deadline) {
        give_up(self, self->multi.src, word, SHI_MS_TIMEOUT, true);
        return;
    }
    look(self, self->multi.src, word);
    until = now + LOOK_NS;
    if (deadline && deadline < until)
        until = deadline;
    if (serving)
        shi_halt_until(self, has_changed, &awaited, (int64_t)(until - now));
    else
        sleep_off(self, ms, word, until);
}

/* ---- multi_cpu_stop on a CPU --------------------------------------------------------- */

void shi_multi_enter(struct shi_self *self, uint32_t index)
{
    struct shi_csd *csd = shi_csd(self->m, index);
    uint32_t src = csd->src < self->m->nslots ? csd->src : self->id;
    uint64_t lock = shi_load_relaxed(&csd->lock);
    self->multi.csd = index + 1;
    self->multi.src = src;
    self->multi.active = (lock & SHI_CSD_TYPE) == SHI_CSD_MULTI_ACTIVE;
    self->multi.irqs_off = false;
    self->multi.ran = false;
    /* The use of it first, whether the csd is abandoned second.  A sender abandons its csds
     * before it begins the next: so this is the csd's use, or LEFT is seen. */
    self->multi.word = shi_load_full(&shi_slot(self->m, src)->multi.state) & ~0xffu;
    if (shi_load_full(&csd->lock) & SHI_CSD_LEFT)
        self->multi.word = UINT32_MAX; /* nobody's */
}

static void leave(struct shi_self *self)
{
    self->multi.csd = 0;
    self->multi.active = false;
    if (self->multi.irqs_off) {
        self->multi.irqs_off = false;
        shi_signal_fence();
        self->irqs_off = 0;
    }
}

static bool is_ending(const struct shi_self *self)
{
    return shi_load_relaxed(&self->m->header->machine_state) >= SHI_M_STOPPING;
}

enum shi_step_of_stop shi_multi_step(struct shi_self *self)
{
    uint32_t src = self->multi.src;
    struct shi_multi *ms = &shi_slot(self->m, src)->multi;
    for (;;) {
        /* Acquire pairs with the swap to this state: what was done in the one before. */
        uint32_t word = shi_load_acquire(&ms->state);
        if (!same_use(word, self->multi.word) || is_over(word) || is_ending(self) ||
            (state_of(self->multi.word) >= SHI_MS_DISABLE_IRQ && !self->multi.active &&
             shi_rule_off(self->m, SHI_RULE_stop_atomic))) {
            leave(self);
            return SHI_MULTI_DONE;
        }
        if (word != self->multi.word) {
            self->multi.word = word;
            if (state_of(word) == SHI_MS_DISABLE_IRQ &&
                !shi_rule_off(self->m, SHI_RULE_stop_irqs_off)) {
                self->irqs_off = 1;
                self->multi.irqs_off = true;
                shi_signal_fence();
            } else if (state_of(word) == SHI_MS_RUN) {
                SHI_STEP(self, multi_run);
                if (!self->multi.active)
                    continue; /* nobody waits for these */
                if (!self->multi.ran)
                    return SHI_MULTI_RUN;
            }
            acknowledge(self, src, word, 1);
            continue;
        }
        if (!self->irqs_off) { /* PREPARE */
            self->in_core++;
            shi_service(self);
            self->in_core--;
            if (self->happened)
                shi_leave_slow(self);
            if (shi_irqs_wait(self) || self->nmi_waits)
                return SHI_MULTI_PYTHON;
        }
        await(self, ms, word);
    }
}

void shi_multi_ran(struct shi_self *self)
{
    self->multi.ran = true;
    acknowledge(self, self->multi.src, self->multi.word, 1);
}

bool shi_multi_lapsed(const struct shi_self *self)
{
    return shi_load_full(&shi_slot(self->m, self->multi.src)->multi.state) != self->multi.word;
}

/* ---- the stopper --------------------------------------------------------------------- */

uint32_t shi_stop_take(struct shi_self *self)
{
    self->in_core++;
    uint32_t index = shi_list_pop(self, &self->stops);
    self->in_core--;
    if (index == UINT32_MAX)
        return index;
    /* cpu stop callbacks must not sleep */
    self->in_stop = 1;
    self->preempt++;
    return index;
}

void shi_stop_end(struct shi_self *self)
{
    self->preempt--;
    self->in_stop = 0;
    if (self->happened)
        shi_leave_slow(self);
}

static bool needs_python(const struct shi_self *self, uint32_t at)
{
    const struct shi_csd *csd = shi_csd(self->m, at - 1);
    uint64_t type = shi_load_relaxed(&csd->lock) & SHI_CSD_TYPE;
    return type != SHI_CSD_MULTI && (!(csd->func & SHI_FUNC_NATIVE) ||
                                     csd->func == (SHI_FUNC_NATIVE | SHI_NATIVE_TAKEDOWN));
}

static void run_function(struct shi_self *self, uint32_t index)
{
    struct shi_csd *csd = shi_csd(self->m, index);
    shi_native_handler *function = shi_native_get(csd->func & ~SHI_FUNC_NATIVE);
    union shi_value copy = csd->value;
    uint8_t kind = csd->kind;
    void *info = NULL;
    if (kind == SHI_K_INT)
        info = (void *)(intptr_t)copy.i;
    else if (kind == SHI_K_POINTER && copy.u < shi_array_end(self->m))
        info = self->m->base + copy.u;
    else if (kind == SHI_K_BYTES)
        info = copy.bytes;
    if (!function || (kind == SHI_K_POINTER && !info)) {
        shi_count(self, SHI_C_corrupt);
        shi_store_relaxed(&csd->status, function ? SHI_S_BROKEN : SHI_S_NOFUNC);
        return;
    }
    if ((shi_load_relaxed(&csd->lock) & SHI_CSD_TYPE) == SHI_CSD_STOP_NOWAIT)
        shi_csd_unlock(self, csd);
    shi_count(self, SHI_C_native_run);
    function(info);
    shi_end_if_forked(self);
}

/* A work that needs no Python.  False: multi_cpu_stop goes on when Python has run. */
static bool run_work(struct shi_self *self, uint32_t index)
{
    struct shi_csd *csd = shi_csd(self->m, index);
    uint64_t type = shi_load_relaxed(&csd->lock) & SHI_CSD_TYPE;
    if (type < SHI_CSD_MULTI) {
        run_function(self, index);
        if (type == SHI_CSD_STOP)
            shi_csd_unlock(self, csd);
        return true;
    }
    for (;;) {
        enum shi_step_of_stop step = shi_multi_step(self);
        if (step == SHI_MULTI_PYTHON)
            return false;
        if (step == SHI_MULTI_DONE)
            break;
        run_function(self, index);
        shi_multi_ran(self);
    }
    shi_csd_unlock(self, csd);
    return true;
}

bool shi_stop_run(struct shi_self *self)
{
    while (shi_stop_due(self)) {
        uint32_t index;
        if (self->multi.csd) {
            index = self->multi.csd - 1;
            if (needs_python(self, index + 1) || shi_irqs_wait(self) || self->nmi_waits)
                return true;
            self->in_stop = 1;
            self->preempt++;
        } else {
            if (needs_python(self, self->stops.head))
                return true;
            index = shi_stop_take(self);
            if (index == UINT32_MAX)
                continue;
            if ((shi_load_relaxed(&shi_csd(self->m, index)->lock) & SHI_CSD_TYPE) >=
                SHI_CSD_MULTI)
                shi_multi_enter(self, index);
        }
        bool done = run_work(self, index);
        shi_stop_end(self);
        if (!done)
            return true;
    }
    return false;
}

void shi_stop_flush(struct shi_self *self)
{
    uint32_t index;
    self->in_core++;
    while ((index = shi_list_pop(self, &self->stops)) != UINT32_MAX) {
        struct shi_csd *csd = shi_csd(self->m, index);
        uint64_t type = shi_load_relaxed(&csd->lock) & SHI_CSD_TYPE;
        /* The others of it wait for a CPU that never comes. */
        if (type >= SHI_CSD_MULTI && csd->src < self->m->nslots)
            give_up(self, csd->src, shi_load_full(&shi_slot(self->m, csd->src)->multi.state),
                    SHI_MS_GONE, false);
        shi_store_relaxed(&csd->status, SHI_S_GONE);
        shi_csd_unlock(self, csd);
    }
    self->in_core--;
}

void shi_stop_register(struct shi_machine *m)
{
    m->stopper = shi_stop_run;
}

/* ---- deaths -------------------------------------------------------------------------- */

void shi_multi_lost(struct shi_self *self, uint32_t src, uint64_t lock)
{
    struct shi_multi *ms = &shi_slot(self->m, src)->multi;
    /* Acquire pairs with the last change of it: how many run the function. */
    uint32_t word = shi_load_acquire(&ms->state);
    if ((lock & SHI_CSD_TYPE) < SHI_CSD_MULTI || is_over(word))
        return;
    bool active = (lock & SHI_CSD_TYPE) == SHI_CSD_MULTI_ACTIVE;
    /* Before RUN it is given up; it may come to that meanwhile. */
    give_up(self, src, word, SHI_MS_DIED, false);
    word = shi_load_acquire(&ms->state);
    if (active && state_of(word) == SHI_MS_RUN)
        run_without(self, src, word);
    look(self, src, word);
}

void shi_multi_orphan(struct shi_self *self, uint32_t id)
{
    /* Acquire pairs with shi_multi_begin's store: its CPUs. */
    uint32_t word = shi_load_acquire(&shi_slot(self->m, id)->multi.state);
    if (state_of(word) == SHI_MS_PREPARE)
        give_up(self, id, word, SHI_MS_DIED, false);
}
