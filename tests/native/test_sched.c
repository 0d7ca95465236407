/* SPDX-License-Identifier: MIT */
/* The scheduler's core: native tasks over CPUs that are threads. */
#include "rig.h"

#define ROUNDS 20000u

static struct rig r;
static struct {
    _Alignas(128) shi_a32 posted, done;
    shi_a64 peer;
} work[RIG_CPUS];
static shi_a32 running[RIG_CPUS], twice, stopping;

/* Does one for each that was posted, and then sleeps. */
static enum shi_ran worker(struct shi_self *self, uint64_t id, uint64_t arg)
{
    shi_set_current_state(self, id, SHI_TASK_INTERRUPTIBLE);
    if (shi_kthread_should_stop(self, id)) /* behind it: who stops it wakes it once */
        return SHI_RAN_EXIT;
    if (shi_fetch_add_full(&running[arg], 1))
        shi_fetch_add_full(&twice, 1);
    enum shi_ran ran = SHI_RAN_SLEEP;
    if (shi_load_acquire(&work[arg].done) != shi_load_acquire(&work[arg].posted)) {
        shi_set_current_state(self, id, SHI_TASK_RUNNING);
        shi_fetch_add_full(&work[arg].done, 1);
        uint64_t peer = shi_load_acquire(&work[arg].peer);
        if (peer) {
            shi_store_relaxed(&work[!arg].posted, shi_load_relaxed(&work[!arg].posted) + 1);
            int rc = shi_wake_up_process(self, peer);
            CHECK(rc >= 0 || shi_load_acquire(&stopping));
        }
        ran = SHI_RAN_RUNNING;
    }
    shi_fetch_sub_full(&running[arg], 1);
    return ran;
}

static int stepper;

static void wait_for(uint32_t i, uint32_t n)
{
    uint64_t end = shi_now_ns() + 20000000000u;
    while (shi_load_acquire(&work[i].done) != n) {
        CHECK(shi_now_ns() < end); /* a wake-up was lost */
        sched_yield();
    }
}

static void wait_dead(uint64_t id)
{
    uint64_t end = shi_now_ns() + 20000000000u;
    while (shi_task_state(&r.m, id) != SHI_TASK_DEAD) {
        CHECK(shi_now_ns() < end);
        sched_yield();
    }
}

static void no_wakeup_is_lost(int cpu)
{
    memset((void *)work, 0, sizeof work);
    uint64_t id = (uint64_t)shi_kthread_run(&r.host, "worker", stepper, 0, cpu, 0);
    uint32_t i;
    for (i = 1; i <= ROUNDS; i++) {
        shi_store_relaxed(&work[0].posted, i);
        CHECK(shi_wake_up_process(&r.host, id) >= 0);
        if (i % 3 == 0)
            wait_for(0, i);
    }
    wait_for(0, ROUNDS);
    CHECK(shi_kthread_stop(&r.host, id) == 0);
    wait_dead(id);
    CHECK(shi_wake_up_process(&r.host, id) == -ESRCH);
    CHECK(shi_kthread_stop(&r.host, id) == -ESRCH);
    CHECK(shi_task_release(&r.host, id) == 0);
    CHECK(shi_wake_up_process(&r.host, id) == -ESRCH);
    CHECK(shi_task_release(&r.host, id) == -ESRCH);
}

static void two_wake_each_other(void)
{
    uint64_t a, b, end = shi_now_ns() + 60000000000u;
    memset((void *)work, 0, sizeof work);
    a = (uint64_t)shi_kthread_create(&r.host, "ping", stepper, 0, 0, 0);
    b = (uint64_t)shi_kthread_create(&r.host, "pong", stepper, 1, 1, 0);
    shi_store_release(&work[0].peer, b);
    shi_store_release(&work[1].peer, a);
    CHECK(shi_wake_up_process(&r.host, b) == 1);
    shi_store_relaxed(&work[0].posted, 1);
    CHECK(shi_wake_up_process(&r.host, a) == 1);
    while (shi_load_acquire(&work[1].done) < ROUNDS / 4) {
        CHECK(shi_now_ns() < end);
        sched_yield();
    }
    shi_store_full(&stopping, 1);
    CHECK(shi_kthread_stop(&r.host, a) == 0);
    wait_dead(a);
    shi_store_release(&work[1].peer, 0);
    shi_kthread_stop(&r.host, b);
    wait_dead(b);
    shi_store_full(&stopping, 0);
    CHECK(shi_task_release(&r.host, a) == 0 && shi_task_release(&r.host, b) == 0);
}

static void affinity(void)
{
    uint64_t one = 1, none = 0, far = 1ull << 40, both = 3;
    memset((void *)work, 0, sizeof work);
    uint64_t id = (uint64_t)shi_kthread_run(&r.host, "roams", stepper, 0, -1, 0);
    CHECK(shi_set_cpus_allowed(&r.host, id, &none) == -EINVAL);
    CHECK(shi_set_cpus_allowed(&r.host, id, &far) == -EINVAL);
    CHECK(shi_set_cpus_allowed(&r.host, id, &one) == 0);
    for (uint32_t i = 1; i <= 100; i++) {
        shi_store_relaxed(&work[0].posted, i);
        CHECK(shi_wake_up_process(&r.host, id) >= 0);
        wait_for(0, i);
        uint64_t w;
        CHECK(shi_task_find(&r.m, id, &w) && shi_tw_cpu(w) == 0);
    }
    CHECK(shi_set_cpus_allowed(&r.host, id, &both) == 0);
    CHECK(shi_kthread_stop(&r.host, id) == 0);
    wait_dead(id);
    CHECK(shi_set_cpus_allowed(&r.host, id, &both) == -ESRCH);
    CHECK(shi_task_release(&r.host, id) == 0);
    id = (uint64_t)shi_kthread_create(&r.host, "bound", stepper, 0, 1, 0);
    CHECK(shi_set_cpus_allowed(&r.host, id, &both) == -EINVAL);
    CHECK(shi_task_release(&r.host, id) == 0);
    CHECK(shi_kthread_create(&r.host, "x", stepper, 0, RIG_CPUS, 0) == -ENXIO);
    CHECK(shi_kthread_create(&r.host, "x", SHI_STEPPERS, 0, 0, 0) == -EINVAL);
}

static shi_a64 woke_at;

static enum shi_ran sleeper(struct shi_self *self, uint64_t id, uint64_t until)
{
    if (shi_now_ns() >= until) {
        shi_store_full(&woke_at, shi_now_ns());
        return SHI_RAN_EXIT;
    }
    shi_set_current_state(self, id, SHI_TASK_UNINTERRUPTIBLE);
    shi_schedule_timeout(self, id, until);
    return SHI_RAN_SLEEP;
}

static void timers(void)
{
    int step = shi_stepper_register("sleeper", sleeper);
    for (int i = 0; i < 20; i++) {
        uint64_t until = shi_now_ns() + 500000;
        shi_store_full(&woke_at, 0);
        CHECK(shi_kthread_run(&r.host, "sleeper", step, until, -1, SHI_PF_REAP) > 0);
        uint64_t end = shi_now_ns() + 20000000000u;
        while (!shi_load_acquire(&woke_at)) {
            CHECK(shi_now_ns() < end);
            sched_yield();
        }
        CHECK(shi_load_acquire(&woke_at) >= until);
    }
}

/* sched_ttwu_pending: a wake-up is pending until its task is on the run queue, and not from when
 * the list was taken: else who looks for an idle CPU meanwhile finds this one. */
static void pending_until_enqueued(void)
{
    struct shi_rq *rq = shi_rq(&r.m, 1);
    memset((void *)work, 0, sizeof work);
    uint64_t id = (uint64_t)shi_kthread_create(&r.host, "held", stepper, 0, 1, 0);
    uint64_t end = shi_now_ns() + 20000000000u, seen, most = 0;
    while (!shi_idle_cpu(&r.m, 1)) /* else it would be queued under its lock */
        CHECK(shi_now_ns() < end);
    shi_store_relaxed(&work[0].posted, 1);
    CHECK(shi_lock_take(&r.host, &rq->lock) >= 0);
    CHECK(shi_wake_up_process(&r.host, id) == 1);
    /* Until it has taken the list, and then for a while. */
    while (shi_word_work(shi_load_full(&shi_slot(&r.m, 1)->word)))
        CHECK(shi_now_ns() < end);
    for (seen = shi_now_ns(); most < 2000000; most = shi_now_ns() - seen) {
        CHECK(shi_load_full(&rq->ttwu_pending) && !shi_idle_cpu(&r.m, 1));
        CHECK(!shi_load_full(&rq->queued));
        sched_yield();
    }
    shi_lock_release(&r.host, &rq->lock);
    wait_for(0, 1);
    CHECK(!shi_load_full(&rq->ttwu_pending));
    CHECK(shi_kthread_stop(&r.host, id) == 0);
    wait_dead(id);
    CHECK(shi_task_release(&r.host, id) == 0);
}

static uint32_t burnt;

static enum shi_ran burner(struct shi_self *self, uint64_t id, uint64_t ns)
{
    uint64_t end = shi_now_ns() + ns;
    shi_set_current_state(self, id, SHI_TASK_INTERRUPTIBLE);
    while (shi_now_ns() < end)
        ;
    burnt++;
    return SHI_RAN_SLEEP;
}

/* Wake it on top of a task that has run for `had` since others were on top of it last, with the
 * tick armed; has it run?  False: this thread lost its core meanwhile. */
static bool on_top(struct shi_self *cpu, uint64_t id, int64_t had, bool *told, bool *ran)
{
    uint32_t before = burnt;
    cpu->lag_ns += had;
    shi_fetch_and_full(&cpu->slot->word, ~(SHI_W_NEED_RESCHED | SHI_W_LAZY));
    shi_wake_up_process(cpu, id);
    uint64_t w = shi_load_relaxed(&cpu->slot->word);
    CHECK(!(w & SHI_W_NEED_RESCHED) != !(w & SHI_W_LAZY)); /* one of the two */
    *told = w & SHI_W_NEED_RESCHED;
    uint64_t began = shi_now_ns();
    r.m.preempt(cpu);
    *ran = burnt != before;
    return shi_now_ns() - began < 2500000;
}

/* Who sleeps more than it runs comes on top when it is woken; who has had more waits. */
static void who_has_had_less_is_first(void)
{
    int step = shi_stepper_register("burner", burner);
    uint32_t tries, right = 0;
    rig_quiet(&r, 1);
    struct shi_self *cpu = &r.cpu[0];
    rig_set_state(&r, 0, SHI_RUNNING);
    shi_store_relaxed(&cpu->slot->task, 1);
    int64_t little = shi_kthread_create(cpu, "little", step, 10000, 0, 0);
    int64_t much = shi_kthread_create(cpu, "much", step, 2000000, 0, 0);
    CHECK(little > 0 && much > 0);
    for (tries = 0; tries < 200 && right < 5; tries++) {
        bool told, ran;
        shi_store_relaxed(&cpu->slot->tick, 1);
        shi_turn_reset(cpu);
        if (!on_top(cpu, (uint64_t)little, 3000000, &told, &ran))
            continue;
        CHECK(told && ran && !shi_turn_lasts(cpu)); /* at once, and not at the tick */
        if (!on_top(cpu, (uint64_t)little, 0, &told, &ran))
            continue;
        CHECK(told && ran && !shi_turn_lasts(cpu)); /* and again: it has saved */
        shi_turn_reset(cpu);
        if (!on_top(cpu, (uint64_t)much, 0, &told, &ran))
            continue;
        CHECK(told && ran);
        if (!shi_turn_lasts(cpu) || !on_top(cpu, (uint64_t)little, 0, &told, &ran) || ran)
            continue; /* the turn was over before it was looked at */
        CHECK(!told);
        right++;
        while (shi_turn_lasts(cpu))
            ;
        r.m.preempt(cpu);
        CHECK(shi_task_state(&r.m, (uint64_t)little) == SHI_TASK_INTERRUPTIBLE);
    }
    CHECK(right == 5);
    rig_unquiet(&r);
}

int main(void)
{
    const enum shi_idle policies[] = { SHI_IDLE_POLL, SHI_IDLE_HALTPOLL, SHI_IDLE_HALT };
    alarm(120);
    stepper = shi_stepper_register("worker", worker);
    CHECK(stepper == shi_stepper_register("worker", worker));
    who_has_had_less_is_first();
    for (int i = 0; i < 3; i++) {
        rig_boot(&r, 2, policies[i]);
        no_wakeup_is_lost(1);
        no_wakeup_is_lost(-1);
        two_wake_each_other();
        affinity();
        pending_until_enqueued();
        timers();
        rig_stop(&r);
    }
    CHECK(!shi_load_relaxed(&twice));
    return 0;
}
