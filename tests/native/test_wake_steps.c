/* SPDX-License-Identifier: MIT */
/*
 * try_to_wake_up(), its waker or its target killed at every step of it, and each stopped at
 * every step while the other is killed: the task runs once, on one CPU, and is queued once; and
 * each stopped at every step while the task is told to run elsewhere: it does.
 *
 * Who is killed is a process of its own (the segment is shared); the test is the firmware, and
 * all other CPUs.
 */
#include "rig.h"

#include <signal.h>
#include <sys/wait.h>

#include "base/step.h"
#include "smp/reap.h"

enum { WAKER = 0, TARGET = 1, OTHER = 2, NCPUS = 3 };
enum how { WAKE_LIST, DIRECT };

static struct rig rig;
static int stepper;
static shi_a32 *ran;   /* shared */
static shi_a32 *where; /* shared: a bit for each CPU that it ran on */
static bool passed[SHI_STEP_COUNT];
static enum shi_step at_step;

static enum shi_ran once(struct shi_self *self, uint64_t id, uint64_t arg)
{
    (void)arg;
    shi_fetch_add_full(ran, 1);
    shi_fetch_or_full(where, 1u << self->id);
    shi_set_current_state(self, id, SHI_TASK_INTERRUPTIBLE);
    return SHI_RAN_SLEEP;
}

/* A task that sleeps, where it was last: on the target. */
static uint64_t boot(enum how how)
{
    const uint64_t both = 1u << TARGET | 1u << OTHER;
    uint64_t word;
    uint32_t i;
    rig_quiet(&rig, NCPUS);
    for (i = 0; i < NCPUS; i++) {
        rig_set_state(&rig, i, SHI_HALTED);
        shi_sched_cpu_online(&rig.cpu[i]);
        rig.cpu[i].steps = true;
    }
    shi_store_full(ran, 0);
    shi_store_full(where, 0);
    uint64_t id = (uint64_t)shi_kthread_create(&rig.cpu[TARGET], "sleeper", stepper, 0, -1, 0);
    CHECK(shi_set_cpus_allowed(&rig.host, id, &both) == 0);
    /* One CPU that something runs on already is woken for by who wakes, under its lock. */
    for (i = TARGET; how == DIRECT && i < NCPUS; i++)
        shi_store_full(&shi_slot(&rig.m, i)->task, 1);
    CHECK(shi_task_find(&rig.m, id, &word) && shi_tw_cpu(word) == TARGET);
    return id;
}

static void serve(struct shi_self *self)
{
    shi_enter(self);
    shi_service(self);
    shi_leave(self);
}

static void arm(uint32_t cpu, enum shi_step step, enum shi_step_action action)
{
    struct shi_slot *slot = shi_slot(&rig.m, cpu);
    shi_store_relaxed(&slot->step_hit, 0);
    shi_store_relaxed(&slot->step_action, action);
    shi_store_release(&slot->step, step);
}

/* The CPU as a process, until it is killed, stopped or done. */
static pid_t start(uint32_t cpu, uint64_t id)
{
    pid_t pid = fork();
    CHECK(pid >= 0);
    if (pid)
        return pid;
    if (cpu == WAKER)
        shi_wake_up_process(&rig.cpu[WAKER], id);
    else
        serve(&rig.cpu[TARGET]);
    _exit(0);
}

static int status_of(pid_t pid)
{
    int status;
    CHECK(waitpid(pid, &status, WUNTRACED) == pid);
    return status;
}

static void end(pid_t pid)
{
    kill(pid, SIGCONT);
    int status = status_of(pid);
    CHECK(WIFEXITED(status) && !WEXITSTATUS(status));
}

static void mark(uint32_t cpu)
{
    shi_reap_mark(&rig.firmware, cpu, SIGKILL);
}

static void complete(uint32_t cpu)
{
    shi_reap_complete(&rig.firmware, cpu);
    shi_reap_ring_all(&rig.firmware);
}

static uint32_t on_lists(uint64_t id)
{
    uint32_t cpu, class, at, n = 0, found = 0;
    for (cpu = 0; cpu < NCPUS; cpu++) {
        struct shi_rq *rq = shi_rq(&rig.m, cpu);
        uint32_t length = 0;
        CHECK(shi_lock_is_free(&rig.host, &rq->lock));
        if (shi_load_full(&rq->lock))
            continue; /* a dead one's: who takes it makes the list anew */
        for (class = 0; class < 2; class++)
            for (at = shi_load_full(&rq->head[class]); at; length++) {
                CHECK(at <= rig.m.ntasks && ++n < 10);
                found += at == (uint32_t)id;
                at = shi_load_full(&shi_task(&rig.m, at - 1)->next);
            }
        CHECK(length == shi_load_full(&rq->queued));
    }
    return found;
}

/* Those who live look, as they would when they are rung or idle; `dead` does not.  `awake`
 * are about to, whether they are told or not: a bit each. */
static void check(uint64_t id, uint32_t dead, uint32_t awake)
{
    uint32_t cpu, round;
    passed[at_step] = true;
    for (cpu = 0; cpu < NCPUS; cpu++) {
        uint64_t w = shi_load_full(&rig.cpu[cpu].slot->word);
        /* It is told: nobody looks at a run queue without a reason to. */
        if (cpu != dead && !(awake >> cpu & 1) && shi_load_full(&shi_rq(&rig.m, cpu)->queued))
            CHECK(shi_word_work(w) || w & (SHI_W_NEED_RESCHED | SHI_W_LAZY));
    }
    for (round = 0; round < 2; round++)
        for (cpu = 0; cpu < NCPUS; cpu++)
            if (cpu != dead)
                serve(&rig.cpu[cpu]);
    CHECK(on_lists(id) == 1);
    for (cpu = 0; cpu < NCPUS; cpu++) {
        if (cpu == dead)
            continue;
        while (shi_sched_work(&rig.cpu[cpu]) && shi_schedule_one(&rig.cpu[cpu], false))
            ;
    }
    CHECK(shi_load_full(ran) == 1);
    CHECK(shi_task_state(&rig.m, id) == SHI_TASK_INTERRUPTIBLE);
    CHECK(on_lists(id) == 0);
    /* It can be woken again, by another. */
    CHECK(shi_wake_up_process(&rig.cpu[OTHER], id) == 1);
    rig_unquiet(&rig);
}

/* For who reads of a failure. */
static void now(const char *what, enum how how, enum shi_step step)
{
    printf("%s at %s, %s\n", what, shi_step_names[step],
           how == DIRECT ? "directly" : "by the wake list");
    at_step = step;
    fflush(stdout);
}

/* Nobody hears of a wake-up whose waker was killed before it said WAKING: not made. */
static void waker_killed(enum how how, enum shi_step step)
{
    now("waker killed", how, step);
    uint64_t id = boot(how);
    arm(WAKER, step, SHI_STEP_KILL);
    int status = status_of(start(WAKER, id));
    if (WIFEXITED(status)) {
        rig_unquiet(&rig); /* it does not pass here on this way */
        return;
    }
    CHECK(WIFSIGNALED(status));
    mark(WAKER);
    complete(WAKER);
    check(id, WAKER, 0);
}

static void target_killed(enum how how, enum shi_step step)
{
    now("target killed", how, step);
    uint64_t id = boot(how);
    CHECK(shi_wake_up_process(&rig.cpu[WAKER], id) == 1);
    arm(TARGET, step, SHI_STEP_KILL);
    int status = status_of(start(TARGET, id));
    if (WIFEXITED(status)) {
        rig_unquiet(&rig);
        return;
    }
    CHECK(WIFSIGNALED(status));
    mark(TARGET);
    complete(TARGET);
    check(id, TARGET, 0);
}

/* Does it stop while it holds the lock of the target's run queue?  The reaper waits for it. */
static bool in_the_lock(void)
{
    uint64_t held = shi_load_full(&shi_rq(&rig.m, TARGET)->lock);
    return held != 0;
}

static void waker_stopped_and_target_killed(enum how how, enum shi_step step)
{
    now("waker stopped, target killed", how, step);
    uint64_t id = boot(how);
    arm(WAKER, step, SHI_STEP_STOP);
    pid_t pid = start(WAKER, id);
    if (WIFEXITED(status_of(pid))) {
        rig_unquiet(&rig);
        return;
    }
    mark(TARGET);
    if (in_the_lock())
        end(pid);
    complete(TARGET);
    serve(&rig.cpu[OTHER]); /* it may have the task now, and before the waker goes on */
    if (!in_the_lock() && waitpid(pid, NULL, WNOHANG) == 0)
        end(pid);
    check(id, TARGET, 1u << OTHER);
}

static void target_stopped_and_waker_killed(enum how how, enum shi_step step)
{
    now("target stopped, waker killed", how, step);
    uint64_t id = boot(how);
    CHECK(shi_wake_up_process(&rig.cpu[WAKER], id) == 1);
    arm(TARGET, step, SHI_STEP_STOP);
    pid_t pid = start(TARGET, id);
    if (WIFEXITED(status_of(pid))) {
        rig_unquiet(&rig);
        return;
    }
    mark(WAKER);
    complete(WAKER);
    serve(&rig.cpu[OTHER]);
    end(pid);
    check(id, WAKER, 1u << TARGET | 1u << OTHER);
}

/* set_cpus_allowed_ptr() by another, who waits for the run queue's lock where that is held. */
static void told_to_run_elsewhere(enum how how, enum shi_step step, uint32_t stopped)
{
    const uint64_t other = 1u << OTHER;
    now(stopped == WAKER ? "waker stopped, mask changed" : "target stopped, mask changed", how,
        step);
    uint64_t id = boot(how);
    if (stopped == TARGET)
        CHECK(shi_wake_up_process(&rig.cpu[WAKER], id) == 1);
    arm(stopped, step, SHI_STEP_STOP);
    pid_t pid = start(stopped, id), setter;
    if (WIFEXITED(status_of(pid))) {
        rig_unquiet(&rig);
        return;
    }
    if ((setter = fork()) == 0)
        _exit(shi_set_cpus_allowed(&rig.host, id, &other) ? 1 : 0);
    CHECK(setter > 0);
    int status, rounds;
    pid_t ended = 0;
    for (rounds = 0; !ended && rounds < 50; rounds++) {
        usleep(1000);
        ended = waitpid(setter, &status, WNOHANG);
    }
    if (in_the_lock())
        end(pid);
    if (!ended)
        status = status_of(setter);
    CHECK(WIFEXITED(status) && !WEXITSTATUS(status));
    if (waitpid(pid, NULL, WNOHANG) == 0)
        end(pid);
    check(id, NCPUS, 1u << TARGET | 1u << OTHER);
    CHECK(shi_load_full(where) == other);
}

/* Its csd was taken by a CPU that takes no tasks any more: it goes on, and is not left there. */
static void sent_to_a_cpu_on_its_way_offline(void)
{
    uint64_t id = boot(WAKE_LIST);
    CHECK(shi_wake_up_process(&rig.cpu[WAKER], id) == 1);
    CHECK(shi_sched_cpu_dying(&rig.cpu[TARGET]) == 0);
    serve(&rig.cpu[TARGET]);
    CHECK(!shi_sched_work(&rig.cpu[TARGET]));
    check(id, NCPUS, 0);
}

/* Those of step.h that a wake-up passes, in its waker or its target. */
static const enum shi_step steps[] = {
    SHI_STEP_ttwu,        SHI_STEP_push,      SHI_STEP_aim,       SHI_STEP_pushed,
    SHI_STEP_raise,       SHI_STEP_ring,      SHI_STEP_rung,      SHI_STEP_drain,
    SHI_STEP_line,        SHI_STEP_ttwu_look, SHI_STEP_ttwu_turn, SHI_STEP_ttwu_list,
    SHI_STEP_ttwu_queued, SHI_STEP_resched,   SHI_STEP_unlock,
};

int main(void)
{
    uint32_t how, i;
    alarm(80);
    stepper = shi_stepper_register("once", once);
    ran = mmap(NULL, SHI_PAGE, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    CHECK(ran != MAP_FAILED);
    where = ran + 1;
    for (how = WAKE_LIST; how <= DIRECT; how++)
        for (i = 0; i < sizeof steps / sizeof *steps; i++) {
            waker_killed(how, steps[i]);
            target_killed(how, steps[i]);
            waker_stopped_and_target_killed(how, steps[i]);
            target_stopped_and_waker_killed(how, steps[i]);
            told_to_run_elsewhere(how, steps[i], WAKER);
            told_to_run_elsewhere(how, steps[i], TARGET);
        }
    for (i = 0; i < sizeof steps / sizeof *steps; i++)
        CHECK(passed[steps[i]]);
    sent_to_a_cpu_on_its_way_offline();
    return 0;
}
