/* SPDX-License-Identifier: MIT */
#include "base/sys.h"

#include <errno.h>

#include "base/clock.h"
#include "base/native.h"
#include "base/rules.h"
#include "base/step.h"
#include "base/trace.h"
#include "irq/chip.h"
#include "irq/ring.h"
#include "smp/csd.h"
#include "smp/entry.h"
#include "smp/lend.h"
#include "smp/queue.h"
#include "smp/sender.h"
#include "smp/smp.h"
#include "smp/stall.h"
#include "smp/wait.h"
#include "smp/watch.h"

/* ---- lock and unlock -------------------------------------------------------------- */

static inline int lock_csd(struct shi_self *self, struct shi_csd *csd, uint64_t type,
                           uint32_t dst)
{
    uint64_t old = shi_load_acquire(&csd->lock);
    if (old & SHI_CSD_LOCK)
        return -EBUSY;
    /*
     * A plain store: unlocked, the csd is its sender's alone (threads of the host come
     * here one at a time).  A new sequence number each time: a reaper that still holds
     * the old lock word cannot complete this use of the csd.  Release: who lent a result
     * for the last use finds the number changed (shi_lend_sweep) and writes where that
     * was read.
     */
    shi_store_release(&csd->lock, ((old & SHI_CSD_SEQ) + (1ull << SHI_CSD_SEQ_SHIFT)) |
                                      SHI_CSD_LOCK | type | (uint64_t)dst << SHI_CSD_DST_SHIFT);
    csd->src = (uint16_t)self->id;
    csd->src_gen = self->gen;
    shi_store_relaxed(&csd->status, SHI_S_DONE);
    return 0;
}

static inline void unlock_csd(struct shi_self *self, struct shi_csd *csd)
{
    uint32_t src = csd->src; /* after the exchange the csd may be anything */
    uint64_t seq = shi_load_relaxed(&csd->lock) & SHI_CSD_SEQ;
    SHI_STEP(self, unlock);
    SHI_TRACE(self, csd_unlock, src, shi_csd_number(self->m, csd), 0, 0);
    /*
     * Full: releases the handler's stores to the waiter's acquire load of the lock,
     * and stands before the load of the waiter's word in shi_irq_ring_waiter.  A
     * waiter that set PARKED before this exchange is rung; one that tries after it
     * finds the csd unlocked.
     */
    uint64_t old = shi_xchg_full(&csd->lock, seq);
    if (__builtin_expect(!(old & SHI_CSD_LOCK), 0))
        shi_stall_double_unlock(self, shi_csd_number(self->m, csd) - 1);
    if (__builtin_expect((old & (SHI_CSD_PARKED | SHI_CSD_LEFT)) != 0, 0)) {
        if (old & SHI_CSD_LEFT)
            shi_lend_forget(self, csd, seq);
        if (!(old & SHI_CSD_PARKED))
            return;
        SHI_STEP(self, unlock_ring);
        if (src < self->m->nslots)
            shi_irq_ring_waiter(self, src);
    }
}

int shi_csd_trylock(struct shi_self *self, struct shi_csd *csd, uint64_t type, uint32_t dst)
{
    return lock_csd(self, csd, type, dst);
}

void shi_csd_unlock(struct shi_self *self, struct shi_csd *csd)
{
    unlock_csd(self, csd);
}

/* ---- sending ----------------------------------------------------------------------- */

/* Lock and push: enum shi_pushed, or -errno. */
static inline int lock_and_push(struct shi_self *self, uint32_t local, uint64_t type,
                                uint32_t dst)
{
    struct shi_csd *csd = shi_own_csd(self, local);
    if (dst >= self->m->ncpus)
        return -ENXIO;
    if (__builtin_expect(shi_ended(self), 0))
        return -EOWNERDEAD;
    if (__builtin_expect(self->left, 0))
        return -ESHUTDOWN;
    SHI_TRACE(self, call_begin, dst, shi_own_index(self, local) + 1, csd->func, (uint32_t)type);
    int err = lock_csd(self, csd, type, dst);
    if (err)
        return err;
    err = shi_queue_push(self, dst, shi_own_index(self, local), csd);
    if (err < 0)
        shi_csd_cancel(csd);
    return err;
}

/* call_function_single_prep_ipi(): its target polls, and looks at the queue by itself. */
static void elide(struct shi_self *self, uint32_t dst, uint32_t number)
{
    shi_count(self, SHI_C_elided);
    SHI_TRACE(self, wake_idle_without_ipi, dst, number, 0, 0);
}

int shi_call_single_queue(struct shi_self *self, uint32_t local, uint32_t dst)
{
    uint32_t index = shi_own_index(self, local);
    int pushed = shi_queue_push(self, dst, index, shi_own_csd(self, local));
    if (pushed == SHI_PUSH_POLLS)
        elide(self, dst, index + 1);
    else if (pushed == SHI_PUSH_RING)
        shi_chip_send_call_single(self, dst);
    return pushed < 0 ? pushed : 0;
}

int shi_call_single(struct shi_self *self, uint32_t local, uint64_t type, uint32_t dst)
{
    /* Before the push: with it the line is the target's. */
    uint8_t kind = shi_patience_kind(shi_own_csd(self, local)->func);
    int pushed = lock_and_push(self, local, type, dst);
    if (pushed == SHI_PUSH_POLLS)
        elide(self, dst, shi_own_index(self, local) + 1);
    else if (pushed == SHI_PUSH_RING)
        shi_chip_send_call_single(self, dst);
    shi_store_relaxed(&self->sender.notes[local].polled,
                      pushed == SHI_PUSH_POLLS && type == SHI_CSD_SYNC ? (uint8_t)(1 + kind)
                                                                       : 0);
    return pushed < 0 ? pushed : 0;
}

int shi_call_push(struct shi_self *self, uint32_t local, uint64_t type, uint32_t dst)
{
    shi_store_relaxed(&self->sender.notes[local].polled, 0);
    return lock_and_push(self, local, type, dst);
}

int64_t shi_call_post(struct shi_self *self, const struct shi_call *call, uint64_t type,
                      uint32_t dst)
{
    bool nowait = (type & SHI_CSD_TYPE) == SHI_CSD_ASYNC;
    shi_enter(self);
    int64_t local = nowait ? shi_nowait_get(self) : shi_csd_get(self);
    if (local >= 0) {
        int err = shi_csd_fill(self, (uint32_t)local, call);
        if (!err)
            err = shi_call_single(self, (uint32_t)local, type, dst);
        if (err) {
            shi_csd_put(self, (uint32_t)local);
            local = err;
        } else if (nowait) {
            shi_csd_leave(self, (uint32_t)local);
        }
    }
    if (local != -EAGAIN) /* else it comes again */
        shi_count(self, SHI_C_calls_single);
    shi_leave(self);
    return local;
}

int shi_call_wake(struct shi_self *self, uint32_t func, uint64_t task, uint32_t dst)
{
    const struct shi_call call = { .func = func, .kind = SHI_K_INT, .value.u = task };
    int64_t local = shi_nowait_get(self);
    if (local < 0)
        return (int)local;
    shi_csd_fill_head(self, (uint32_t)local, &call);
    int err = shi_call_single(self, (uint32_t)local, SHI_CSD_TTWU, dst);
    if (err)
        shi_csd_put(self, (uint32_t)local);
    else
        shi_csd_leave(self, (uint32_t)local);
    return err;
}

int64_t shi_call_prepare(struct shi_self *self, const struct shi_call *call)
{
    shi_enter(self);
    int64_t local = shi_csd_get(self);
    int err = local < 0 ? 0 : shi_csd_fill(self, (uint32_t)local, call);
    if (err) {
        shi_csd_put(self, (uint32_t)local);
        local = err;
    }
    shi_leave(self);
    return local;
}

/* ---- many ------------------------------------------------------------------------- */

/* As in the kernel one target that polls needs no interrupt, and of several nobody asks
 * whether they poll: one register write may be for all of them. */
static void ring_many(struct shi_self *self, struct shi_many *many)
{
    if (many->nipis == 1 && many->polls)
        elide(self, many->ipis[0], many->polls);
    else if (many->nipis == 1)
        shi_chip_send_call_single(self, many->ipis[0]);
    else if (many->nipis)
        shi_chip_send_call_mask(self, many->ipis, many->nipis);
    many->nipis = 0;
}

/* One core section for one CPU: 0 (queued, or offline since: skipped, as the kernel does). */
static int queue_one(struct shi_self *self, struct shi_many *many, const struct shi_call *call,
                     int64_t owner, uint32_t cpu, bool wait)
{
    int err = 0;
    shi_enter(self);
    int64_t local = wait ? shi_csd_get(self) : shi_nowait_get(self);
    if (local < 0) {
        /* About to wait: nobody must wait for doorbells not yet rung. */
        ring_many(self, many);
        shi_leave(self);
        return (int)local;
    }
    if (owner < 0)
        err = shi_csd_fill(self, (uint32_t)local, call);
    else
        shi_csd_fill_shared(self, (uint32_t)local, call, (uint32_t)owner);
    if (!err)
        err = lock_and_push(self, (uint32_t)local, wait ? SHI_CSD_SYNC : SHI_CSD_ASYNC, cpu);
    if (err < 0) {
        shi_csd_put(self, (uint32_t)local);
    } else {
        if (err != SHI_PUSH_COALESCED) {
            many->polls = err == SHI_PUSH_POLLS ? shi_own_index(self, (uint32_t)local) + 1 : 0;
            many->ipis[many->nipis++] = cpu;
        }
        if (!wait)
            shi_csd_leave(self, (uint32_t)local);
        many->cpus[many->queued] = cpu;
        many->locals[many->queued++] = (uint32_t)local;
    }
    shi_leave(self);
    return err < 0 && err != -ENXIO ? err : 0;
}

/* While Python code may run before a csd holds the function: its number stays its own. */
static void hold_function(struct shi_self *self, const struct shi_call *call, bool *held)
{
    if (*held || !shi_call_by_number(call))
        return;
    shi_enter(self);
    shi_func_hold(self, call->func);
    shi_leave(self);
    *held = true;
}

static int make_room(struct shi_self *self, struct shi_many *many, const struct shi_call *call,
                     bool *held)
{
    hold_function(self, call, held);
    return shi_call_room(self, many->waiter, many->arg, &many->at);
}

int shi_call_many(struct shi_self *self, struct shi_many *many, const struct shi_call *call,
                  bool wait)
{
    int64_t owner = -1; /* the payload's own csd: it goes with the last that shares it */
    bool held = false;
    uint32_t i;
    int err = 0;
    many->queued = 0;
    many->nipis = 0;
    while (call->payload && !err && (owner = shi_call_prepare(self, call)) < 0)
        err = owner == -EAGAIN ? make_room(self, many, call, &held) : (int)owner;
    if (many->cond)
        hold_function(self, call, &held);
    for (i = 0; i < many->n && !err; i++) {
        uint32_t cpu = many->mask[i];
        many->at = cpu;
        if ((!self->host && cpu == self->id) ||
            !shi_word_online(shi_load_relaxed(&shi_slot(self->m, cpu)->word)))
            continue;
        int yes = many->cond ? many->cond(many->cond_arg, cpu) : 1;
        if (yes < 0)
            err = yes;
        while (yes > 0 && (err = queue_one(self, many, call, owner, cpu, wait)) == -EAGAIN)
            if ((err = make_room(self, many, call, &held)))
                break;
    }
    /* The doorbells once, after everything is queued. */
    shi_enter(self);
    ring_many(self, many);
    if (owner >= 0)
        shi_csd_end_sharing(self, (uint32_t)owner);
    if (held)
        shi_func_drop(self, call->func);
    shi_leave(self);
    return err;
}

/* ---- wait ------------------------------------------------------------------------- */

#define ROOM_LOOK_NS 1000000u
#define ROOM_LOOKS 16u

int shi_csd_wait(struct shi_self *self, uint32_t local, uint32_t dst, uint64_t deadline_ns,
                 const struct shi_waiter *waiter, void *arg, struct shi_stall *stall)
{
    struct shi_wait wait;
    bool inlined = !self->host && self->inline_python; /* a CPU's begin and turn may set it */
    shi_wait_begin(self, &wait, shi_own_index(self, local), dst, deadline_ns);
    if (waiter)
        waiter->begin(arg);
    uint64_t budget = shi_wait_budget(self, dst);
    uint64_t hold = waiter && waiter->hold_ns < budget ? waiter->hold_ns : budget;
    bool spun = hold == budget;
    int rc = shi_wait_spin(self, &wait, hold);
    struct shi_stall own = { 0 };
    if (!stall)
        stall = &own;
    while (rc > 0) {
        void *gone = NULL;
        if (waiter) {
            int err = waiter->turn(arg, dst, rc);
            if (!err && shi_stall_due(self, stall, wait.csd))
                err = waiter->stalled(arg, stall, wait.index, dst);
            if (err) {
                rc = err;
                break;
            }
            gone = waiter->let_go(arg);
        }
        rc = spun ? shi_wait_sleep(self, &wait) : shi_wait_spin(self, &wait, budget - hold);
        spun = true;
        if (waiter)
            waiter->take_back(arg, gone);
    }
    /* A signal's handler may have detached this guest, or let a thread that did go first: what
     * reads as an unlocked csd is a page of zeros in the slot's place. */
    if (!rc && __builtin_expect(self->left, 0))
        rc = -ESHUTDOWN;
    if (!self->host)
        self->inline_python = inlined;
    shi_wait_end(self, &wait);
    if (__builtin_expect(own.bug, 0)) {
        shi_stall_over(self, &own);
        if (!rc)
            waiter->unstuck(arg, &own, wait.index, dst);
    }
    if (waiter)
        waiter->end(arg);
    return rc;
}

int shi_call_wait(struct shi_self *self, uint32_t local, uint32_t dst, uint64_t deadline_ns,
                  const struct shi_waiter *waiter, void *arg)
{
    int err = shi_csd_wait(self, local, dst, deadline_ns, waiter, arg, NULL);
    SHI_TRACE(self, call_end, dst, shi_own_index(self, local) + 1, 0, (uint32_t)-err);
    if (err && !self->left) { /* else it is another's by now, as is who has locked the mutex */
        shi_enter(self);
        shi_csd_abandon(self, local);
        shi_leave(self);
    }
    return err;
}

void shi_call_end(struct shi_self *self, uint32_t local)
{
    shi_enter(self);
    shi_csd_put(self, local);
    shi_leave(self);
}

int shi_call_room(struct shi_self *self, const struct shi_waiter *waiter, void *arg,
                  uint32_t *dst)
{
    struct shi_sender *s = &self->sender;
    /*
     * Whose unlock to wait for: not that of the oldest, but of one some way behind it.  A
     * sender that goes on as soon as there is room for one call looks at each csd while its
     * target is about to unlock it, and the line goes back and forth for each.  But the
     * oldest, where that way has been waited in vain.
     */
    shi_enter(self);
    uint32_t local = s->room_looks ? shi_csd_oldest(self) : shi_csd_later(self);
    if (local == UINT32_MAX) {
        shi_leave(self);
        return -EAGAIN; /* futures', tasks' and CallSingleData's: only their owners free them */
    }
    uint64_t lock = shi_load_relaxed(&shi_own_csd(self, local)->lock);
    *dst = (uint16_t)(lock >> SHI_CSD_DST_SHIFT);
    if (*dst >= self->m->ncpus) {
        shi_csd_collect(self); /* damaged: dropped there */
        shi_leave(self);
        return 0;
    }
    /* One wait of many looks: it is complained of as csd_lock() of one csd is.  Taken out, since
     * threads of a host wait here at the same time. */
    struct shi_stall stall = s->room_stall;
    s->room_stall = (struct shi_stall){ 0 };
    if (!s->room_looks) {
        shi_stall_over(self, &stall);
        stall = (struct shi_stall){ 0 };
    }
    shi_leave(self);
    int err = shi_csd_wait(self, local, *dst, shi_now_ns() + ROOM_LOOK_NS, waiter, arg, &stall);
    if (__builtin_expect(self->left, 0)) /* as in shi_call_wait */
        return err ? err : -ESHUTDOWN;
    if (err != -ETIMEDOUT && __builtin_expect(stall.bug, 0)) {
        shi_stall_over(self, &stall);
        if (!err)
            waiter->unstuck(arg, &stall, shi_own_index(self, local), *dst);
    }
    shi_enter(self);
    if (err != -ETIMEDOUT) {
        s->room_looks = 0;
    } else {
        if (++s->room_looks % ROOM_LOOKS == 0)
            shi_watch_ring(self, *dst); /* each look is too short to notice a lost ring */
        if (__builtin_expect(s->room_stall.bug, 0))
            shi_stall_over(self, &stall); /* another thread has put its own there */
        else
            s->room_stall = stall;
    }
    shi_leave(self);
    if (err == -ETIMEDOUT)
        return 0;
    return err == -EBADMSG ? 0 : err; /* damaged: collected as such */
}

/* ---- smp_send_reschedule, resched_cpu --------------------------------------------- */

int shi_irq_send_reschedule(struct shi_self *self, uint32_t dst)
{
    SHI_TRACE(self, call_entry, dst, 0, 0, SHI_E_RESCHEDULE);
    if (!shi_word_online(shi_load_relaxed(&shi_slot(self->m, dst)->word)))
        return -ENXIO;
    shi_count(self, SHI_C_resched_sent);
    shi_chip_send_reschedule(self, dst);
    return 0;
}

/* ---- task wake-ups ----------------------------------------------------------------- */

/* A Cluster task is appended to those that wait, a work gets a kworker (or, without room for
 * one, waits as they do); a wake-up's csd goes to `woken`, which the scheduler takes as one
 * (pass 3). */
static inline void wake_up(struct shi_self *self, uint32_t index, struct shi_list *woken)
{
    bool scheduler = shi_csd(self->m, index)->func & SHI_FUNC_NATIVE;
    if (__builtin_expect((shi_load_relaxed(&shi_csd(self->m, index)->lock) & SHI_CSD_WORK) != 0,
                         0) &&
        !scheduler && self->m->work(self, index) == 0)
        return;
    shi_list_append(self->m, scheduler ? woken : &self->tasks, index);
    if (!scheduler && shi_task_waits(self))
        shi_fetch_or_full(&self->slot->word, SHI_W_LAZY); /* the tick preempts the step */
}

/* ---- running what arrived --------------------------------------------------------- */

static void run_native(struct shi_self *self, uint32_t index, struct shi_csd *csd)
{
    shi_native_handler *function = shi_native_get(csd->func & ~SHI_FUNC_NATIVE);
    bool sync = (shi_load_relaxed(&csd->lock) & SHI_CSD_TYPE) == SHI_CSD_SYNC;
    union shi_value copy;
    uint32_t func = csd->func; /* unlocked, the csd may be anything */
    void *info = NULL;
    if (!function) {
        shi_count(self, SHI_C_corrupt);
        shi_store_relaxed(&csd->status, SHI_S_NOFUNC);
        unlock_csd(self, csd);
        return;
    }
    switch (csd->kind) {
    case SHI_K_INT:
        info = (void *)(intptr_t)csd->value.i;
        break;
    case SHI_K_POINTER:
        if (csd->value.u >= shi_array_end(self->m)) {
            shi_count(self, SHI_C_corrupt);
            shi_store_relaxed(&csd->status, SHI_S_BROKEN);
            unlock_csd(self, csd);
            return;
        }
        info = self->m->base + csd->value.u;
        break;
    case SHI_K_BYTES:
        info = csd->value.bytes;
        if (!sync) {
            copy = csd->value; /* the sender may use the csd again at once */
            info = copy.bytes;
        }
        break;
    default:
        break;
    }
    shi_count(self, SHI_C_native_run);
    shi_csd_record(self->slot, index + 1, csd);
    SHI_TRACE(self, csd_function_entry, self->id, index + 1, csd->func, 0);
    SHI_STEP(self, run);
    if (sync) {
        shi_count(self, SHI_C_csd_sync);
        function(info);
        shi_end_if_forked(self);
        SHI_TRACE(self, csd_function_exit, self->id, index + 1, func, 0);
        unlock_csd(self, csd);
    } else {
        bool work = shi_csd_is_irq_work(csd);
        uint64_t flags = 0;
        shi_count(self, work ? SHI_C_irq_work : SHI_C_csd_async);
        if (work)
            flags = shi_irq_work_begin(self->m, csd);
        else
            unlock_csd(self, csd);
        function(info);
        shi_end_if_forked(self);
        SHI_TRACE(self, csd_function_exit, self->id, index + 1, func, 0);
        if (work)
            shi_irq_work_end(csd, flags);
    }
    shi_store_relaxed(&self->slot->cur_csd, 0);
}

void shi_csd_run(struct shi_self *self, uint32_t index)
{
    struct shi_csd *csd = shi_csd(self->m, index);
    if (csd->func & SHI_FUNC_NATIVE)
        run_native(self, index, csd);
    else if (self->inline_python && self->hooks.run && !shi_python_waits(self))
        self->hooks.run(self, index); /* in order: not past one that was put off */
    else
        shi_list_append(self->m, &self->deferred, index);
}

/*
 * Calls that nobody waits for keep coming: let some more come before the next look at the
 * queue.  Each look takes the line with its head away from who pushes, and found one or two;
 * left alone it stays with him for several pushes.  Only after some of these in a row: any
 * call that is waited for, and a look at an empty queue, ends it (self->flood).
 */
#define FLOOD 16u
#define LINGER 256u /* rounds of a loop on nothing: some 60 ns */

static void linger(struct shi_self *self)
{
    uint32_t i;
    /* A task that serves its queue itself waits for something: it is to look at that. */
    if (++self->flood <= FLOOD || (self->in_task && !self->in_irq))
        return;
    for (i = 0; i < LINGER; i++)
        shi_signal_fence();
}

/* What a function call interrupt was for: what is oldest on the queue. */
static enum shi_cause cause_of(uint64_t type)
{
    if (type >= SHI_CSD_STOP)
        return SHI_CAUSE_stopper;
    return type == SHI_CSD_TTWU       ? SHI_CAUSE_wakeup
           : type == SHI_CSD_IRQ_WORK ? SHI_CAUSE_irq_work
                                      : SHI_CAUSE_call;
}

static inline void account(struct shi_self *self, enum shi_cause why)
{
    if (why != SHI_CAUSE_irq_work || !shi_rule_off(self->m, SHI_RULE_nohz_account))
        shi_cause(self, why);
}

static inline uint64_t type_of(const struct shi_machine *m, uint32_t index)
{
    return shi_load_relaxed(&shi_csd(m, index)->lock) & SHI_CSD_TYPE;
}

/* The queue in lists, through shared memory: however long it is, and damaged or not. */
static void flush_lists(struct shi_self *self, uint32_t newest, bool interrupt)
{
    const struct shi_machine *m = self->m;
    struct shi_list taken = shi_queue_in_order(self, newest), later = { 0, 0, 0 };
    struct shi_list woken = { 0, 0, 0 };
    uint32_t index;
    if (interrupt)
        account(self, taken.head ? cause_of(type_of(m, taken.head - 1)) : SHI_CAUSE_empty);
    while ((index = shi_list_pop(self, &taken)) != UINT32_MAX) {
        uint64_t type = type_of(m, index);
        if (taken.head)
            shi_prefetch_write(shi_csd(m, taken.head - 1));
        if (type == SHI_CSD_SYNC)
            shi_csd_run(self, index);
        else if (type == SHI_CSD_TTWU)
            wake_up(self, index, &woken);
        else if (type >= SHI_CSD_STOP)
            shi_list_append(m, &self->stops, index); /* or wake the stopper */
        else
            shi_list_append(m, &later, index);
    }
    while ((index = shi_list_pop(self, &later)) != UINT32_MAX)
        shi_csd_run(self, index);
    if (woken.head)
        self->m->woken(self, &woken);
}

/* __flush_smp_call_function_queue: SYNC, then ASYNC and irq_work, then wake-ups.  `interrupt`:
 * one has come for it. */
static inline void flush(struct shi_self *self, bool interrupt)
{
    const struct shi_machine *m = self->m;
    if (__builtin_expect(shi_load_relaxed(&self->slot->dumped), 0))
        shi_store_release(&self->slot->dumped, 0); /* from here on waiters may again */
    uint32_t newest = shi_queue_grab(self), index = newest - 1;
    uint32_t batch[SHI_QUEUE_BATCH], n, i, later;
    struct shi_list woken = { 0, 0, 0 };
    if (!newest) {
        if (interrupt)
            shi_cause(self, SHI_CAUSE_empty);
        return;
    }
    if (shi_csd_is_ours(self, index) && !shi_load_relaxed(&shi_csd(m, index)->next)) {
        /* One only, which is what latency is made of: no lists, and its line is not
         * written to before the unlock, so it stays shared with the waiter. */
        uint64_t type = type_of(m, index);
        if (interrupt)
            account(self, cause_of(type));
        if (type == SHI_CSD_TTWU)
            wake_up(self, index, &woken);
        else if (__builtin_expect(type >= SHI_CSD_STOP, 0))
            shi_list_append(m, &self->stops, index);
        else
            shi_csd_run(self, index);
        if (type == SHI_CSD_TTWU && woken.head)
            self->m->woken(self, &woken);
        if (type == SHI_CSD_ASYNC)
            linger(self);
        else
            self->flood = 0;
        return;
    }
    n = later = shi_queue_read(self, newest, batch);
    if (!n) {
        flush_lists(self, newest, interrupt);
        return;
    }
    if (interrupt)
        account(self, cause_of(type_of(m, batch[n - 1])));
    for (i = n; i-- > 0;) {
        index = batch[i];
        uint64_t type = type_of(m, index);
        if (type == SHI_CSD_SYNC)
            shi_csd_run(self, index);
        else if (type == SHI_CSD_TTWU)
            wake_up(self, index, &woken);
        else if (type >= SHI_CSD_STOP)
            shi_list_append(m, &self->stops, index);
        else
            batch[--later] = index;
    }
    for (i = n; i-- > later;)
        shi_csd_run(self, batch[i]);
    if (woken.head)
        self->m->woken(self, &woken);
    if (later) /* some are waited for, or wake a task up */
        self->flood = 0;
    else
        linger(self);
}

static void flush_queue(struct shi_self *self)
{
    flush(self, false);
}

static bool take_reschedule(struct shi_self *self, uint32_t line)
{
    SHI_TRACE(self, scheduler_ipi, self->id, 0, 0, line);
    shi_count(self, SHI_C_irq_resched); /* the nudge is all there is to it */
    return true;
}

static bool take_call(struct shi_self *self, uint32_t line)
{
    SHI_TRACE(self, call_interrupt, self->id, 0, 0, line);
    shi_count(self, SHI_C_irq_call);
    flush(self, true);
    return true;
}

static bool take_call_single(struct shi_self *self, uint32_t line)
{
    SHI_TRACE(self, call_interrupt, self->id, 0, 0, line);
    shi_count(self, SHI_C_irq_call_single);
    flush(self, true);
    return true;
}

void shi_smp_register(struct shi_machine *m)
{
    m->actions[SHI_USE_RESCHEDULE] = take_reschedule;
    m->actions[SHI_USE_CALL] = take_call;
    m->actions[SHI_USE_CALL_SINGLE] = take_call_single;
    m->drain = flush_queue;
}
