/* SPDX-License-Identifier: MIT */
#include "base/sys.h"

#include <errno.h>

#include "base/clock.h"
#include "base/event.h"
#include "base/step.h"
#include "irq/chip.h"
#include "irq/doorbell.h"
#include "irq/signal.h"
#include "smp/csd.h"
#include "smp/entry.h"
#include "smp/sender.h"
#include "smp/wait.h"
#include "smp/watch.h"

#define TICK_NS 10000000u /* no progress for so long: ring again */
#define DEADLOCK_TICK_NS 1000000u
#define PATIENCE_STEP 16u
#define SPIN_ROUND 64 /* looks between two readings of the clock */

/* Interrupts off: the waiter may not serve its own queue (kernel: that is the reason
 * for the rule that interrupts must be on). */
static bool may_serve(const struct shi_self *self)
{
    return !self->host && !self->irqs_off;
}

void shi_wait_begin(struct shi_self *self, struct shi_wait *wait, uint32_t index, uint32_t dst,
                    uint64_t deadline_ns)
{
    wait->csd = shi_csd(self->m, index);
    wait->dst = dst;
    wait->index = index;
    wait->deadline_ns = deadline_ns;
    wait->tick_ns = 0;
    wait->seen = 0;
    wait->published = false;
    wait->patience = NULL;
    /* From the note, not from the csd: its line is the target's by now.  Who waits for room
     * waits for a csd that another thread of the host may be using again. */
    uint8_t polled =
        shi_load_relaxed(&self->sender.notes[index & (self->m->csds_per_slot - 1)].polled);
    if (polled && dst < self->m->ncpus)
        wait->patience = shi_patience(self, dst, polled - 1u);
    if (may_serve(self) && shi_word_state(shi_load_relaxed(&self->slot->word)) == SHI_RUNNING)
        shi_set_polling(self);
}

void shi_wait_end(struct shi_self *self, struct shi_wait *wait)
{
    if (self->left) /* the slot is another's */
        return;
    if (wait->published) /* a wait that an NMI's handler interrupted goes on */
        shi_store_release(&self->slot->waiting_for, wait->outer);
    if (self->in_task && may_serve(self))
        shi_set_running(self);
}

static bool work_due(const struct shi_self *self)
{
    return __builtin_expect(self->work_wait, 0) && self->m->work_due(self);
}

/* Serve the own queue, once: a flood of calls to this CPU may leave it empty never, and what
 * is waited for has come.  True: the caller has Python work to run, is asked to go offline, or
 * to leave the task. */
static bool serve(struct shi_self *self)
{
    if (self->left)
        return true; /* a fork's child: the queue is its parent's */
    self->in_core++;
    shi_service_once(self);
    self->in_core--;
    if (self->happened)
        shi_leave_slow(self);
    shi_do_softirq(self, self->inline_python);
    if (shi_stop_due(self))
        self->m->stopper(self);
    return (shi_python_waits(self) || shi_cancel_asked(self) || self->down || work_due(self)) &&
           !self->in_irq;
}

static bool own_work(const struct shi_self *self)
{
    uint64_t w = shi_load_acquire(&self->slot->word);
    return shi_word_work(w) || shi_resched_due(self, w) || work_due(self);
}

uint64_t shi_wait_budget(const struct shi_self *self, uint32_t dst)
{
    const struct shi_machine *m = self->m;
    if (self->spin_ns)
        return self->spin_ns - 1;
    if (!m->oversubscribed)
        return 100000;
    uint32_t mine = shi_load_relaxed(&self->slot->core);
    uint32_t theirs = shi_load_relaxed(&shi_slot(m, dst)->core);
    /* On one core nothing can happen while this process spins. */
    return !self->host && mine == theirs ? 0 : 20000;
}

/*
 * The target polls, and takes the csd's line to write the answer.  A look before it has
 * takes the line away from it, and it has to ask again: so the sender looks first when the
 * answer is about to be there.  When that is, it learns: a little later each time it looked
 * too early, which costs a transfer; sooner by the least step when it was there, so that one
 * look in seventeen is too early.  The first look asks for the line to write: the next call
 * fills it.  Meanwhile the own queue is served, as in every wait.
 */
static int look_late(struct shi_self *self, struct shi_wait *wait, bool service)
{
    shi_a16 *patience = wait->patience;
    uint32_t rounds = shi_load_relaxed(patience), i;
    wait->patience = NULL;
    for (i = 0; i < rounds; i++) {
        if (service && own_work(self) && serve(self))
            return SHI_WAIT_PYTHON;
        shi_signal_fence(); /* a loop that the compiler keeps */
    }
    shi_prefetch_write(wait->csd);
    if (!shi_csd_locked(wait->csd)) {
        if (rounds)
            shi_store_relaxed(patience, (uint16_t)(rounds - 1));
        return SHI_WAIT_DONE;
    }
    if (rounds < SHI_PATIENCE_MAX)
        shi_store_relaxed(patience, (uint16_t)(rounds + PATIENCE_STEP));
    return SHI_WAIT_MORE;
}

int shi_wait_spin(struct shi_self *self, struct shi_wait *wait, uint64_t budget_ns)
{
    bool service = may_serve(self);
    uint64_t end = 0;
    uint32_t i;
    if (wait->patience && budget_ns) {
        int rc = look_late(self, wait, service);
        if (rc != SHI_WAIT_MORE)
            return rc;
    }
    for (;;) {
        for (i = 0; i < SPIN_ROUND; i++) {
            if (!shi_csd_locked(wait->csd))
                return SHI_WAIT_DONE;
            if (service && own_work(self) && serve(self))
                return SHI_WAIT_PYTHON;
        }
        uint64_t now = shi_now_ns();
        if (!end)
            end = now + budget_ns;
        if (now >= end)
            return SHI_WAIT_MORE;
        shi_cpu_relax();
    }
}

/*
 * CPUs that wait for each other in a circle, all with interrupts off, wait for ever.
 * Each entry is read twice: the circle is real when nothing in it moved.
 */
static bool deadlocked(struct shi_self *self)
{
    const struct shi_machine *m = self->m;
    int pass;
    for (pass = 0; pass < 2; pass++) {
        uint32_t at = self->id, steps;
        for (steps = 0; steps <= m->ncpus; steps++) {
            uint64_t entry = shi_load_full(&shi_slot(m, at)->waiting_for);
            uint32_t next = (uint32_t)entry & 0xffff, csd = (uint32_t)(entry >> 32);
            if (!next || !(entry & SHI_WAITS_IRQS_OFF) || next > m->ncpus || !csd ||
                csd > m->ncsds || !shi_word_online(shi_load_relaxed(&shi_slot(m, at)->word)))
                return false;
            /* It may have its answer and not have woken up to it yet. */
            if (!shi_csd_locked(shi_csd(m, csd - 1)))
                return false;
            at = next - 1;
            if (at == self->id)
                break;
        }
        if (at != self->id)
            return false;
    }
    return true;
}

/*
 * The target dropped csds that it found damaged, and what stood behind them.  If it has
 * nothing queued, runs nothing and is no task's, nobody has ours any more.
 */
static bool lost(const struct shi_slot *target, uint64_t w)
{
    enum shi_state state = shi_word_state(w);
    return shi_load_acquire(&target->damaged) && !shi_load_acquire(&target->starved) &&
           !shi_word_work(w) && (state == SHI_HALTED || state == SHI_POLLING) &&
           !shi_load_acquire(&target->cur_csd) && !shi_load_acquire(&target->task);
}

static int look_around(struct shi_self *self, struct shi_wait *wait, uint64_t now)
{
    if (self->leaving)
        return -ESHUTDOWN;
    if (shi_ended(self))
        return -EOWNERDEAD;
    if (wait->deadline_ns && now >= wait->deadline_ns)
        return -ETIMEDOUT;
    if (self->irqs_off && !self->host && deadlocked(self))
        return -EDEADLK;
    if (now >= wait->tick_ns) {
        struct shi_slot *target = shi_slot(self->m, wait->dst);
        uint64_t w = shi_load_full(&target->word);
        if (wait->tick_ns && lost(target, w) && lost(target, wait->seen))
            return -EBADMSG;
        uint64_t progress = shi_watch_progress(target);
        /* A ring may have died with its ringer: the firmware's watchdog makes it good, and
         * if that is stopped itself, who waits.  The head may have moved: others queue
         * behind the stranded one and do not ring. */
        if (wait->tick_ns && progress == wait->progress && shi_word_work(w) &&
            shi_word_work(wait->seen))
            shi_watch_ring(self, wait->dst);
        if (wait->tick_ns && shi_load_acquire(&target->starved) == SHI_ST_LOOK) {
            /* The same of who made room for a result there. */
            shi_enter(self);
            shi_chip_prod(self, wait->dst);
            shi_leave(self);
        }
        wait->progress = progress;
        wait->seen = w;
        wait->tick_ns = now + TICK_NS;
    }
    return 0;
}

static void sleep_host(struct shi_self *self, struct shi_wait *wait, int64_t ns)
{
    uint32_t seen = shi_load_full(&self->slot->event);
    uint64_t lock = shi_load_acquire(&wait->csd->lock);
    SHI_STEP(self, park);
    while (lock & SHI_CSD_LOCK && !(lock & SHI_CSD_PARKED))
        if (shi_cas_full(&wait->csd->lock, &lock, lock | SHI_CSD_PARKED))
            break;
    SHI_STEP(self, parked);
    /* The count was read before PARKED was set: an unlock since has changed it. */
    if (shi_csd_locked(wait->csd))
        shi_event_wait(&self->slot->event, seen, ns);
    SHI_STEP(self, wake);
}

int shi_halt_until(struct shi_self *self, shi_ready *ready, const void *arg, int64_t ns)
{
    struct shi_slot *slot = self->slot;
    bool service = may_serve(self), by_signal = shi_doorbell_of(self->m)->by_signal;
    uint64_t w = shi_load_relaxed(&slot->word), next;
    enum shi_state before = shi_word_state(w);
    int err = 0;
    /* Interrupts on: it sleeps as an idle CPU does, and its timers are taken. */
    const struct shi_timers *timers = service ? self->m->timers : NULL;
    int64_t tick = timers ? timers->enter(self) : -1;
    bool ticks = tick >= 0 && (ns < 0 || tick < ns);
    if (ticks)
        ns = tick;
    if (by_signal) /* first: a ring from now on is for the wait below, not the handler */
        shi_kick_block(self, true);
    do {
        if (!shi_word_online(w) ||
            (service && (shi_word_work(w) || shi_resched_due(self, w) || work_due(self))))
            goto out;
        next = shi_word_with(w, SHI_HALTED);
    } while (!shi_cas_full(&slot->word, &w, next));
    SHI_STEP(self, halted);
    /*
     * HALTED first (the full exchange above), what is waited for again second.  Who makes
     * it ready does that first and reads this word second: one of the two sees the other.
     * Without this look its ring could fall before HALTED.
     */
    if (!ready || !ready(arg))
        err = shi_doorbell_wait(self, (uint32_t)(next & SHI_W_LOW), ns);
    SHI_STEP(self, wake);
    w = shi_load_relaxed(&slot->word);
    do {
        if (!shi_word_online(w))
            break;
        next = shi_word_with(w, before == SHI_RUNNING ? SHI_RUNNING : SHI_POLLING);
        if (by_signal)
            next &= ~SHI_W_KICKED; /* the wait may have taken the kick itself */
    } while (!shi_cas_full(&slot->word, &w, next));
    if (shi_word_state(w) == SHI_RUNG) {
        shi_count(self, SHI_C_doorbells_received);
        if (!shi_word_work(w) && !(ready && ready(arg)))
            shi_count(self, SHI_C_doorbells_spurious);
    }
    if (before == SHI_RUNNING && (shi_word_work(w) || w & SHI_W_KICKED))
        self->happened = 1; /* interrupts are off: replayed when they come on */
out:
    if (timers) {
        shi_tick_look(self, shi_now_ns());
        timers->exit(self);
        if (ticks && err == -ETIMEDOUT)
            err = 0; /* it was not the caller's time that is over */
    }
    if (by_signal && self->in_task)
        shi_kick_block(self, false);
    return err;
}

static bool unlocked(const void *csd)
{
    return !shi_csd_locked(csd);
}

static void sleep_cpu(struct shi_self *self, struct shi_wait *wait, int64_t ns)
{
    uint64_t lock = shi_load_acquire(&wait->csd->lock);
    SHI_STEP(self, park);
    do {
        if (!(lock & SHI_CSD_LOCK))
            return;
    } while (!(lock & SHI_CSD_PARKED) &&
             !shi_cas_full(&wait->csd->lock, &lock, lock | SHI_CSD_PARKED));
    SHI_STEP(self, parked);
    shi_halt_until(self, unlocked, wait->csd, ns);
}

int shi_wait_sleep(struct shi_self *self, struct shi_wait *wait)
{
    bool service = may_serve(self);
    if (!shi_csd_locked(wait->csd))
        return SHI_WAIT_DONE;
    if (!wait->published) {
        wait->outer = self->host ? 0 : shi_load_relaxed(&self->slot->waiting_for);
        /* Release: who finds the entry finds the csd queued. */
        shi_store_full(&self->slot->waiting_for, (uint64_t)(wait->dst + 1) |
                                                     (self->irqs_off ? SHI_WAITS_IRQS_OFF : 0) |
                                                     (uint64_t)(wait->index + 1) << 32);
        wait->published = !self->host; /* threads of the host would overwrite it */
    }
    uint64_t now = shi_now_ns();
    if (service && (shi_tick_look(self, now) || own_work(self)) && serve(self))
        return SHI_WAIT_PYTHON;
    int err = look_around(self, wait, now);
    if (err)
        return shi_csd_locked(wait->csd) ? err : SHI_WAIT_DONE;
    uint64_t ns = self->irqs_off ? DEADLOCK_TICK_NS : TICK_NS;
    if (wait->deadline_ns && wait->deadline_ns - now < ns)
        ns = wait->deadline_ns - now;
    if (self->host)
        sleep_host(self, wait, (int64_t)ns);
    else
        sleep_cpu(self, wait, (int64_t)ns);
    if (!shi_csd_locked(wait->csd))
        return SHI_WAIT_DONE;
    /* Whatever ended the sleep: a signal that came before it interrupted nothing. */
    return SHI_WAIT_SIGNAL;
}
