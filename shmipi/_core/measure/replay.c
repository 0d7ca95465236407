/* SPDX-License-Identifier: MIT */
#include "base/sys.h"

#include <errno.h>
#include <sched.h>
#include <stdlib.h>
#include <string.h>

#include "base/clock.h"
#include "base/native.h"
#include "irq/chip.h"
#include "measure/replay.h"
#include "smp/csd.h"
#include "smp/entry.h"
#include "smp/idle.h"
#include "smp/queue.h"
#include "smp/sched.h"
#include "smp/sender.h"
#include "smp/smp.h"

#define MEET_NS 30000000000u /* for all to come */
#define LEAD_NS 3000000u     /* from the last one's coming to the start */
#define LOOK_NS 1000000u     /* between two looks at who is there still */
#define SLICE_NS 50000000u   /* the longest sleep: others may give up */
#define SPIN_NS 10000000u    /* for an answer; then as users' calls wait */
#define ANSWER_NS 20000000000u
#define LOOK_ROUND 1024u
#define LIST 64u

struct pending {
    uint32_t local, dst;
};

/* This CPU's, of the replay that runs. */
struct replay {
    struct shi_self *self;
    struct shi_replay_run *run;
    struct shi_replay_cpu *own;
    uint64_t start;   /* by now() */
    int64_t shift_ns; /* causal: so much later than there */
    uint32_t rescheds, forgiven;
    uint32_t state; /* it waits in */
    bool in_vector;
    struct pending *pending; /* queued, and not waited for yet */
    uint32_t npending, room;
    uint32_t *many; /* room for a call to many */
    shi_action *actions[SHI_NUSES];
    void (*woken)(struct shi_self *, struct shi_list *);
};

static struct replay *current;
static int one_func = -1, wake_func = -1;

static const enum shi_line_use vectors[] = { SHI_USE_RESCHEDULE, SHI_USE_CALL,
                                             SHI_USE_CALL_SINGLE };
#define NVECTORS (sizeof vectors / sizeof *vectors)

/* ns by stamps, in which everything is reported: to go by another clock would add the error of
 * its calibration, some us in a second. */
static uint64_t now(void)
{
    return shi_stamp_to_mono(shi_stamp());
}

/* The same moment by the clock that timeouts have. */
static uint64_t clock_of(uint64_t at)
{
    int64_t left = (int64_t)(at - now());
    return shi_now_ns() + (uint64_t)(left > 0 ? left : 0);
}

/* ---- what arrives ---------------------------------------------------------------- */

static void begin_call(const struct replay *r, struct shi_replay_call *call, uint64_t stamp)
{
    shi_store_relaxed(&call->unseen, !r->in_vector);
    shi_store_release(&call->entered, stamp);
}

static void run_call(const struct replay *r, struct shi_replay_call *call)
{
    begin_call(r, call, shi_stamp());
    shi_spin_ns(call->burn_ns);
    /* Release: a wait that it ends, on this CPU or at its sender, finds its stamps. */
    shi_store_release(&call->left, shi_stamp());
}

/* A call's function: which it is, or which of a call to many. */
static void on_call(void *info)
{
    const struct replay *r = current;
    uint32_t which[2], i;
    memcpy(which, info, sizeof which);
    if (!r || which[0] >= r->run->ncalls || which[1] > r->run->ncalls - which[0])
        return;
    for (i = 0; i < which[1]; i++) {
        struct shi_replay_call *call = &r->run->calls[which[0] + i];
        if (call->cpu == r->self->id) {
            run_call(r, call);
            return;
        }
    }
}

static void on_wake(void *info)
{
    (void)info; /* wake-ups are taken as a list: on_woken */
}

/* sched_ttwu_pending(): the list is one run, as long as the longest of its own. */
static void run_list(const struct replay *r, struct shi_replay_call *const *list, uint32_t n)
{
    uint64_t stamp = shi_stamp(), ns = 0;
    uint32_t i;
    for (i = 0; i < n; i++) {
        begin_call(r, list[i], stamp);
        ns = list[i]->burn_ns > ns ? list[i]->burn_ns : ns;
    }
    shi_spin_ns(ns);
    stamp = shi_stamp();
    for (i = 0; i < n; i++)
        shi_store_release(&list[i]->left, stamp); /* as in run_call */
}

static void on_woken(struct shi_self *self, struct shi_list *woken)
{
    const struct replay *r = current;
    struct shi_replay_call *list[LIST];
    struct shi_list others = { 0, 0, 0 };
    uint32_t index, n = 0;
    while ((index = shi_list_pop(self, woken)) != UINT32_MAX) {
        struct shi_csd *csd = shi_csd(self->m, index);
        uint64_t which = csd->value.u;
        if (csd->func != (SHI_FUNC_NATIVE | (uint32_t)wake_func)) {
            shi_list_append(self->m, &others, index);
            continue;
        }
        shi_count(self, SHI_C_native_run);
        shi_csd_unlock(self, csd);
        if (which >= r->run->ncalls)
            continue;
        list[n++] = &r->run->calls[which];
        if (n == LIST) {
            run_list(r, list, n);
            n = 0;
        }
    }
    if (n)
        run_list(r, list, n);
    if (others.head)
        r->woken(self, &others);
}

/* An interrupt: what it always does, and its stamps. */
static bool on_vector(struct shi_self *self, uint32_t line)
{
    struct replay *r = current;
    uint32_t use = self->m->chip.use[line], at = r->own->nentries;
    uint64_t entered = shi_stamp();
    r->in_vector = true;
    bool done = r->actions[use](self, line);
    if (use == SHI_USE_RESCHEDULE) {
        r->rescheds++;
        shi_spin_ns(r->run->resched_ns);
    }
    r->in_vector = false;
    if (at < r->run->entries_room)
        r->run->entries[at] = (struct shi_replay_entry){
            .entered = entered, .left = shi_stamp(), .use = use, .state = r->state
        };
    r->own->nentries = at + 1;
    return done;
}

static void take_over(struct replay *r)
{
    struct shi_machine *m = r->self->m;
    uint8_t flags = shi_irq_save(r->self);
    size_t i;
    current = r;
    for (i = 0; i < NVECTORS; i++) {
        r->actions[vectors[i]] = m->actions[vectors[i]];
        m->actions[vectors[i]] = on_vector;
    }
    r->woken = m->woken;
    m->woken = on_woken;
    shi_irq_restore(r->self, flags);
}

static void give_back(struct replay *r)
{
    struct shi_machine *m = r->self->m;
    uint8_t flags = shi_irq_save(r->self);
    size_t i;
    for (i = 0; i < NVECTORS; i++)
        m->actions[vectors[i]] = r->actions[vectors[i]];
    m->woken = r->woken;
    current = NULL;
    shi_irq_restore(r->self, flags);
}

/* ---- waiting --------------------------------------------------------------------- */

/* Is this to go on? */
static int look(const struct replay *r)
{
    const struct shi_self *self = r->self;
    if (shi_load_relaxed(&self->m->header->machine_state) >= SHI_M_STOPPING)
        return -ECANCELED;
    if (shi_cancel_asked(self))
        return -EINTR;
    /* Acquire: what made the other give up; pairs with the release in give_up(). */
    if (shi_load_acquire(&r->run->control->abort) || shi_hotplug_due(self))
        return -EPIPE;
    return 0;
}

/* Is everybody there? */
static int look_around(struct replay *r)
{
    const struct shi_machine *m = r->self->m;
    uint32_t cpu;
    for (cpu = 0; cpu < r->run->control->ncpus; cpu++) {
        if (!shi_word_online(shi_load_acquire(&shi_slot(m, cpu)->word))) {
            r->run->dst = cpu;
            return -EOWNERDEAD;
        }
    }
    return look(r);
}

/* Has what the wait is for come? */
static bool ended(const struct replay *r, const struct shi_replay_step *step)
{
    /* Acquire pairs with the releases in run_call() and run_list(). */
    if (step->call < r->run->ncalls && shi_load_acquire(&r->run->calls[step->call].left))
        return true;
    return step->count && r->rescheds + r->forgiven >= step->count;
}

static int wait_step(struct replay *r, const struct shi_replay_step *step)
{
    struct shi_self *self = r->self;
    bool causal = r->run->pace == SHI_RP_CAUSAL;
    bool expects = step->call != SHI_RP_NONE || step->count;
    uint64_t base = r->start + (uint64_t)r->shift_ns;
    uint64_t limit = base + step->at_ns, run = base + step->run_ns;
    if (r->run->pace == SHI_RP_ASAP)
        return look(r);
    if (causal && expects)
        run = limit += r->run->patience_ns;
    for (;;) {
        uint64_t at = now(), lost = 0;
        if (expects && ended(r, step)) {
            if (causal && step->over_ns)
                r->shift_ns = (int64_t)(at - r->start - step->over_ns);
            return 0;
        }
        if (at >= limit) {
            r->own->missed += expects;
            if (step->count) /* it may have been one with another */
                r->forgiven = step->count - r->rescheds;
            if (causal && expects && step->over_ns)
                r->shift_ns = (int64_t)(at - r->start - step->over_ns);
            return 0;
        }
        uint64_t until = at < run ? run : limit;
        bool slice = until - at > SLICE_NS;
        int err = slice ? look_around(r) : look(r);
        if (err)
            return err;
        if (slice)
            until = at + SLICE_NS;
        r->state = at < run ? step->state : SHI_RUNNING;
        if (r->state == SHI_RUNNING) {
            shi_run_until(self, clock_of(until), &lost);
            r->own->lost_ns += lost;
        } else if (r->state == SHI_RP_HALTPOLL) {
            shi_haltpoll_until(self, clock_of(until));
        } else {
            shi_idle_until(self, (enum shi_state)r->state, clock_of(until));
        }
        r->state = SHI_RUNNING;
    }
}

/* csd_lock_wait of the oldest.  Not as users' calls wait, who poll: there its CPU was running,
 * and was interrupted. */
static int join_one(struct replay *r, const struct pending *p)
{
    struct shi_self *self = r->self;
    const struct shi_csd *csd = shi_own_csd(self, p->local);
    uint64_t from = shi_now_ns();
    uint32_t i;
    int err = 0;
    r->run->dst = p->dst;
    while (shi_csd_locked(csd) && !err && shi_now_ns() - from < SPIN_NS) {
        for (i = 0; i < LOOK_ROUND && shi_csd_locked(csd); i++)
            shi_cpu_relax();
        err = look(r);
        if (self->m->oversubscribed)
            sched_yield();
    }
    if (shi_csd_locked(csd)) {
        uint64_t most = err ? 0 : ANSWER_NS;
        int rc = shi_call_wait(self, p->local, p->dst, shi_now_ns() + most + 1, NULL, NULL);
        if (rc)
            return err ? err : rc; /* left behind */
    }
    if (shi_load_relaxed(&csd->lock) & SHI_CSD_DIED)
        err = -EOWNERDEAD;
    shi_call_end(self, p->local);
    return err;
}

static int join(struct replay *r)
{
    uint32_t i;
    int first = 0;
    for (i = 0; i < r->npending; i++) {
        int err = join_one(r, &r->pending[i]);
        first = first ? first : err;
    }
    r->npending = 0;
    return first;
}

static int will_wait(struct replay *r, uint32_t local, uint32_t dst)
{
    if (r->npending == r->room) {
        uint32_t room = r->room ? 2 * r->room : LIST;
        struct pending *more = realloc(r->pending, room * sizeof *more);
        if (!more) {
            const struct pending one = { local, dst };
            join_one(r, &one);
            return -ENOMEM;
        }
        r->pending = more;
        r->room = room;
    }
    r->pending[r->npending++] = (struct pending){ local, dst };
    return 0;
}

/* ---- sending --------------------------------------------------------------------- */

static struct shi_call message(uint32_t first, uint32_t n)
{
    const uint32_t which[2] = { first, n };
    struct shi_call it = { .func = SHI_FUNC_NATIVE | (uint32_t)one_func,
                           .kind = SHI_K_BYTES,
                           .length = sizeof which,
                           .apply = SHI_A_INFO };
    memcpy(it.value.bytes, which, sizeof which);
    return it;
}

struct spared {
    uint64_t elided, coalesced;
};

/* Counted by who pushes, in task context: no interrupt counts there. */
static struct spared spared(const struct shi_self *self)
{
    return (struct spared){ shi_load_relaxed(&self->counts[SHI_C_elided]),
                            shi_load_relaxed(&self->counts[SHI_C_coalesced]) };
}

static void note(struct replay *r, uint32_t call, struct spared before)
{
    struct spared after = spared(r->self);
    enum shi_replay_how how = after.elided != before.elided         ? SHI_RP_ELIDED
                              : after.coalesced != before.coalesced ? SHI_RP_COALESCED
                                                                    : SHI_RP_RUNG;
    shi_store_relaxed(&r->run->calls[call].how, (uint8_t)how);
}

/* About to be sent: when it should be, and when it is. */
static void stamp_call(const struct replay *r, struct shi_replay_call *call, uint64_t at_ns)
{
    uint64_t due = r->start + (uint64_t)r->shift_ns + at_ns;
    shi_store_relaxed(&call->due, r->run->pace == SHI_RP_ASAP ? 0 : due);
    shi_store_relaxed(&call->queued, shi_stamp());
}

static int make_room(struct replay *r)
{
    int err = shi_call_room(r->self, NULL, NULL, &r->run->dst);
    return err ? err : look(r);
}

static int64_t post(struct replay *r, const struct shi_replay_step *step)
{
    struct shi_self *self = r->self;
    const struct shi_call it = message(step->call, 1);
    if (step->state != SHI_RP_WAKE)
        return shi_call_post(
            self, &it, step->state == SHI_RP_SYNC ? SHI_CSD_SYNC : SHI_CSD_ASYNC, step->cpu);
    shi_enter(self);
    int err = shi_call_wake(self, SHI_FUNC_NATIVE | (uint32_t)wake_func, step->call, step->cpu);
    shi_leave(self);
    return err;
}

static int call_step(struct replay *r, const struct shi_replay_step *step)
{
    struct shi_replay_call *call = &r->run->calls[step->call];
    struct spared before;
    int64_t local;
    do {
        before = spared(r->self);
        stamp_call(r, call, step->at_ns);
        local = post(r, step);
        if (local == -EAGAIN) {
            int err = make_room(r);
            if (err)
                return err;
        }
    } while (local == -EAGAIN);
    if (local < 0)
        return (int)local;
    note(r, step->call, before);
    return step->state == SHI_RP_SYNC ? will_wait(r, (uint32_t)local, step->cpu) : 0;
}

static int many_step(struct replay *r, const struct shi_replay_step *step)
{
    struct shi_self *self = r->self;
    struct shi_replay_call *calls = &r->run->calls[step->call];
    uint32_t n = step->count, i, k, ncpus = self->m->ncpus;
    if (n > ncpus)
        return -EINVAL;
    if (!r->many && !(r->many = calloc(4 * (size_t)ncpus, sizeof *r->many)))
        return -ENOMEM;
    struct shi_many many = { .mask = r->many,
                             .n = n,
                             .cpus = r->many + ncpus,
                             .locals = r->many + 2 * (size_t)ncpus,
                             .ipis = r->many + 3 * (size_t)ncpus };
    const struct shi_call it = message(step->call, n);
    struct spared before = spared(self);
    for (i = 0; i < n; i++) {
        r->many[i] = calls[i].cpu;
        many.ipis[i] = UINT32_MAX;
        stamp_call(r, &calls[i], step->at_ns);
    }
    int err = shi_call_many(self, &many, &it, true);
    bool elided = spared(self).elided != before.elided;
    for (i = 0; i < many.queued; i++) {
        uint8_t how = SHI_RP_COALESCED;
        for (k = 0; k < n; k++)
            if (many.ipis[k] == many.cpus[i])
                how = elided ? SHI_RP_ELIDED : SHI_RP_RUNG;
        for (k = 0; k < n; k++)
            if (calls[k].cpu == many.cpus[i])
                shi_store_relaxed(&calls[k].how, how);
        int rc = will_wait(r, many.locals[i], many.cpus[i]);
        err = err ? err : rc;
    }
    r->run->dst = many.at;
    if (!err && many.queued < n)
        err = -ENXIO; /* skipped: it is offline */
    return err;
}

/* What of them found the queue empty: one interrupt. */
static void ring_batch(struct replay *r, uint32_t dst, uint32_t *found)
{
    if (*found == SHI_RP_NONE)
        return;
    shi_store_relaxed(&r->run->calls[*found].how, SHI_RP_RUNG);
    shi_chip_send_call_single(r->self, dst);
    *found = SHI_RP_NONE;
}

static int batch_step(struct replay *r, const struct shi_replay_step *step)
{
    struct shi_self *self = r->self;
    uint32_t i, found = SHI_RP_NONE;
    int err = 0;
    shi_enter(self);
    for (i = 0; i < step->count && !err; i++) {
        uint32_t which = step->call + i;
        struct shi_call it = message(which, 1);
        uint64_t type = step->state == SHI_RP_WAKE ? SHI_CSD_TTWU : SHI_CSD_ASYNC;
        if (type == SHI_CSD_TTWU)
            it = (struct shi_call){ .func = SHI_FUNC_NATIVE | (uint32_t)wake_func,
                                    .kind = SHI_K_INT,
                                    .value.u = which };
        int64_t local = shi_nowait_get(self);
        if (local < 0) {
            ring_batch(r, step->cpu, &found); /* nobody waits for a ring that is not sent */
            shi_leave(self);
            err = local == -EAGAIN ? make_room(r) : (int)local;
            shi_enter(self);
            i--;
            continue;
        }
        shi_csd_fill_head(self, (uint32_t)local, &it);
        stamp_call(r, &r->run->calls[which], step->at_ns);
        int pushed = shi_call_push(self, (uint32_t)local, type, step->cpu);
        if (pushed < 0) {
            shi_csd_put(self, (uint32_t)local);
            err = pushed;
            break;
        }
        shi_csd_leave(self, (uint32_t)local);
        shi_store_relaxed(&r->run->calls[which].how,
                          pushed == SHI_PUSH_POLLS ? SHI_RP_ELIDED : SHI_RP_COALESCED);
        if (pushed == SHI_PUSH_RING && found == SHI_RP_NONE)
            found = which;
    }
    ring_batch(r, step->cpu, &found);
    shi_leave(self);
    return err;
}

static int raise_step(struct replay *r, const struct shi_replay_step *step)
{
    struct shi_self *self = r->self;
    struct shi_replay_call *call = &r->run->calls[step->call];
    int err = 0;
    stamp_call(r, call, step->at_ns);
    if (step->op == SHI_RP_LAZY) {
        err = shi_resched_curr(self, step->cpu, true);
        shi_store_relaxed(&call->how, SHI_RP_NOT_QUEUED);
        return err;
    }
    shi_enter(self);
    if (step->op == SHI_RP_RAISE)
        shi_chip_send_call_single(self, step->cpu);
    else
        err = shi_irq_send_reschedule(self, step->cpu);
    shi_leave(self);
    shi_store_relaxed(&call->how, SHI_RP_RUNG);
    return err;
}

static void local_step(struct replay *r, const struct shi_replay_step *step)
{
    struct shi_replay_call *call = &r->run->calls[step->call];
    uint8_t flags = shi_irq_save(r->self);
    shi_count(r->self, SHI_C_calls_self);
    shi_store_relaxed(&call->how, SHI_RP_NOT_QUEUED);
    run_call(r, call);
    shi_irq_restore(r->self, flags);
}

/* ---- the script ------------------------------------------------------------------ */

static int do_step(struct replay *r, const struct shi_replay_step *step)
{
    const struct shi_replay_run *run = r->run;
    bool about_call = step->op != SHI_RP_WAIT && step->op != SHI_RP_JOIN;
    bool several = step->op == SHI_RP_MANY || step->op == SHI_RP_BATCH;
    if (about_call && (step->call >= run->ncalls || step->cpu >= r->self->m->ncpus ||
                       (several && step->count > run->ncalls - step->call)))
        return -EINVAL;
    r->run->dst = step->cpu;
    shi_schedule(r->self); /* who has set NEED_RESCHED gets what it wants: the next step */
    switch (step->op) {
    case SHI_RP_WAIT:
        if (step->state != SHI_RUNNING && step->state != SHI_POLLING &&
            step->state != SHI_HALTED && step->state != SHI_RP_HALTPOLL)
            return -EINVAL;
        return wait_step(r, step);
    case SHI_RP_CALL:
        return call_step(r, step);
    case SHI_RP_MANY:
        return many_step(r, step);
    case SHI_RP_JOIN: {
        int err = join(r);
        if (!err && run->pace == SHI_RP_CAUSAL && step->over_ns)
            r->shift_ns = (int64_t)(now() - r->start - step->over_ns);
        return err;
    }
    case SHI_RP_RESCHED:
    case SHI_RP_LAZY:
    case SHI_RP_RAISE:
        return raise_step(r, step);
    case SHI_RP_LOCAL:
        local_step(r, step);
        return 0;
    case SHI_RP_BATCH:
        return batch_step(r, step);
    default:
        return -EINVAL;
    }
}

/* Until all have: asleep, but for the start, which all see at once. */
static int meet(struct replay *r, enum shi_state state, bool (*have)(const struct replay *),
                uint64_t limit_ns)
{
    uint64_t from = shi_now_ns();
    while (!have(r)) {
        int err = look_around(r);
        if (!err && shi_now_ns() - from > limit_ns)
            err = -ETIMEDOUT;
        if (err)
            return err;
        shi_idle_until(r->self, state, shi_now_ns() + LOOK_NS);
    }
    return 0;
}

static bool all_come(const struct replay *r)
{
    const struct shi_replay_control *c = r->run->control;
    return shi_load_full(&c->come) >= c->ncpus;
}

static bool has_start(const struct replay *r)
{
    return shi_load_acquire(&r->run->control->start) != 0; /* pairs with that in begin() */
}

static bool all_done(const struct replay *r)
{
    const struct shi_replay_control *c = r->run->control;
    return shi_load_full(&c->done) >= c->ncpus;
}

/* A common start: the last to come says when. */
static int begin(struct replay *r)
{
    struct shi_replay_control *c = r->run->control;
    if (shi_fetch_add_full(&c->ready, 1) + 1 == c->ncpus)
        shi_store_release(&c->start, now() + LEAD_NS);
    int err = meet(r, SHI_POLLING, has_start, MEET_NS);
    r->start = shi_load_acquire(&c->start);
    return err;
}

/* Everybody's steps are done: what they have sent is in the queues, and is taken here. */
static int end(struct replay *r)
{
    /* Full: after the pushes.  Who finds all done finds all that was pushed to it. */
    shi_fetch_add_full(&r->run->control->done, 1);
    int err = meet(r, SHI_HALTED, all_done, UINT64_MAX);
    if (!err)
        shi_idle_until(r->self, SHI_POLLING, shi_now_ns());
    return err;
}

int shi_replay_meet(struct shi_self *self, struct shi_replay_run *run)
{
    struct replay r = { .self = self, .run = run };
    shi_fetch_add_full(&run->control->come, 1);
    int err = meet(&r, SHI_HALTED, all_come, MEET_NS);
    if (err) /* pairs with the acquire in look() */
        shi_store_release(&run->control->abort, 1);
    return err;
}

int shi_replay(struct shi_self *self, struct shi_replay_run *run)
{
    struct replay r = {
        .self = self, .run = run, .own = &run->control->cpus[self->id], .state = SHI_RUNNING
    };
    if (current)
        return -EBUSY;
    take_over(&r);
    int err = begin(&r);
    for (uint32_t i = 0; i < run->nsteps && !err; i++) {
        r.own->step = i;
        err = do_step(&r, &run->steps[i]);
    }
    int joined = join(&r);
    err = err ? err : joined;
    if (!err)
        err = end(&r);
    if (err) /* pairs with the acquire in look() */
        shi_store_release(&run->control->abort, 1);
    give_back(&r);
    free(r.pending);
    free(r.many);
    return err;
}

uint64_t shi_replay_control_bytes(uint32_t ncpus)
{
    return sizeof(struct shi_replay_control) + ncpus * sizeof(struct shi_replay_cpu);
}

void shi_replay_register(void)
{
    one_func = shi_native_register("replay", on_call);
    wake_func = shi_native_register("replay_wake", on_wake);
}
