/* SPDX-License-Identifier: MIT */
/* kernel/softirq.c's rules, where interrupts enter a CPU. */
#include "rig.h"

#include "smp/entry.h"
#include "smp/softirq.h"

static struct rig rig;
static struct shi_self *cpu; /* this thread is CPU 0 */
static uint32_t native, ran[64], nran, handled, limit;
static uint64_t pause_ns; /* that the tasklet takes */

static void reset(void)
{
    nran = handled = 0;
    limit = 64;
    shi_store_relaxed(&cpu->softirqs, 0);
    cpu->softirqd = false;
}

/* A handler that raises the softirqs whose bits it is given. */
static void handler(void *info)
{
    uintptr_t bits = (uintptr_t)info, nr;
    CHECK(cpu->in_irq && shi_masked(cpu) && !shi_in_task(cpu));
    handled++;
    for (nr = SHI_NR_SOFTIRQS; nr-- > 0;) /* the highest first: not the order they run in */
        if (bits >> nr & 1)
            shi_raise_softirq(cpu, (uint32_t)nr);
}

static void note(uint32_t nr)
{
    CHECK(shi_in_serving_softirq(cpu) && !shi_in_task(cpu) && shi_in_interrupt(cpu));
    CHECK(!cpu->in_irq && !shi_masked(cpu)); /* interrupts are on */
    if (nran < 64)
        ran[nran++] = nr;
}

static void kick(uint32_t bits)
{
    const struct shi_call call = { .func = SHI_FUNC_NATIVE | native,
                                   .kind = SHI_K_INT,
                                   .value.u = bits };
    CHECK(shi_call_post(&rig.host, &call, SHI_CSD_ASYNC, 0) >= 0);
    shi_fetch_or_full(&cpu->slot->word, SHI_W_KICKED);
    shi_irq_entry(cpu);
}

static void hi(struct shi_self *self)
{
    (void)self;
    note(SHI_HI_SOFTIRQ);
}

static void timer(struct shi_self *self)
{
    (void)self;
    note(SHI_TIMER_SOFTIRQ);
}

/* An interrupt comes in its middle, and raises a lower one. */
static void net_rx(struct shi_self *self)
{
    uint32_t before = handled;
    note(SHI_NET_RX_SOFTIRQ);
    kick(1 << SHI_HI_SOFTIRQ);
    CHECK(handled == before + 1); /* it was let in ... */
    CHECK(ran[nran - 1] == SHI_NET_RX_SOFTIRQ && shi_in_serving_softirq(self)); /* ... alone */
}

/* Always something left to do, as far as `limit`. */
static void tasklet(struct shi_self *self)
{
    uint64_t end = shi_now_ns() + pause_ns;
    note(SHI_TASKLET_SOFTIRQ);
    while (shi_now_ns() < end)
        ;
    if (nran < limit)
        shi_raise_softirq(self, SHI_TASKLET_SOFTIRQ);
}

/* It leaves softirqs and preemption disabled behind. */
static void careless(struct shi_self *self)
{
    note(SHI_RCU_SOFTIRQ);
    shi_local_bh_disable(self);
    self->preempt++;
}

static void lowest_first_when_the_handler_has_returned(void)
{
    reset();
    kick(1 << SHI_TIMER_SOFTIRQ | 1 << SHI_HI_SOFTIRQ | 1 << SHI_RCU_SOFTIRQ);
    CHECK(nran == 3 && ran[0] == SHI_HI_SOFTIRQ && ran[1] == SHI_TIMER_SOFTIRQ);
    CHECK(ran[2] == SHI_RCU_SOFTIRQ);
    CHECK(!cpu->softirq && !cpu->preempt && shi_in_task(cpu)); /* nothing is left behind */
    CHECK(shi_word_state(shi_load_relaxed(&cpu->slot->word)) == SHI_RUNNING);
    CHECK(shi_softirq_count(&rig.m, 0, SHI_TIMER_SOFTIRQ) == 1);
}

static void never_nested(void)
{
    reset();
    kick(1 << SHI_NET_RX_SOFTIRQ);
    CHECK(handled == 2 && nran == 2);
    CHECK(ran[0] == SHI_NET_RX_SOFTIRQ && ran[1] == SHI_HI_SOFTIRQ); /* after it, not in it */
}

static void ten_times_and_the_rest_is_ksoftirqds(void)
{
    uint32_t tries, most = 0;
    cpu->preempt = 1; /* else ksoftirqd has its turn as the interrupt returns */
    for (tries = 0; tries < 20 && most < 10; tries++) { /* 2 ms may be over before, too */
        reset();
        kick(1 << SHI_TASKLET_SOFTIRQ);
        CHECK(nran <= 10 && cpu->softirqd);
        CHECK(shi_load_relaxed(&cpu->softirqs) == 1 << SHI_TASKLET_SOFTIRQ);
        most = nran > most ? nran : most;
    }
    CHECK(most == 10);
    /* The end of the next interrupt runs them all the same. */
    limit = nran + 1;
    kick(0);
    CHECK(nran == limit && !shi_load_relaxed(&cpu->softirqs) && !cpu->softirqd);
    cpu->preempt = 0;
}

/* ... or 2 ms: what takes longer is not run again, however few times it was. */
static void two_ms_and_the_rest_is_ksoftirqds(void)
{
    reset();
    pause_ns = 2500000;
    kick(1 << SHI_TASKLET_SOFTIRQ);
    CHECK(nran == 1 && cpu->softirqd);
    CHECK(shi_load_relaxed(&cpu->softirqs) == 1 << SHI_TASKLET_SOFTIRQ);
    pause_ns = 0;
    limit = nran + 1;
    kick(0);
    CHECK(nran == limit && !shi_load_relaxed(&cpu->softirqs));
}

static void not_again_where_the_cpu_is_to_reschedule(void)
{
    reset();
    cpu->in_task = true; /* else the interrupt itself obeys it */
    cpu->preempt = 1;
    shi_fetch_or_full(&cpu->slot->word, SHI_W_NEED_RESCHED);
    kick(1 << SHI_TASKLET_SOFTIRQ);
    CHECK(nran == 1 && cpu->softirqd);
    shi_schedule(cpu);
    cpu->in_task = false;
    cpu->preempt = 0;
}

/* ksoftirqd/0: asleep, woken for what is left, on the run queue, asleep again. */
static void by_its_thread(void)
{
    uint64_t id, w;
    reset();
    limit = 25;
    cpu->preempt = 1;
    kick(1 << SHI_TASKLET_SOFTIRQ);
    cpu->preempt = 0;
    id = shi_load_relaxed(&shi_rq(&rig.m, 0)->ksoftirqd);
    const struct shi_task *task = shi_task_find(&rig.m, id, &w);
    CHECK(task && strcmp(task->comm, "ksoftirqd/0") == 0 && task->flags == SHI_PF_BOUND);
    while (nran < limit) {
        uint32_t before = nran;
        CHECK(shi_task_state(&rig.m, id) == SHI_TASK_RUNNING);
        CHECK(shi_sched_next(cpu) == SHI_NEXT_NATIVE && shi_schedule_one(cpu, true));
        CHECK(nran > before && nran <= before + 10);
    }
    while (shi_schedule_one(cpu, true))
        ;
    CHECK(shi_task_state(&rig.m, id) == SHI_TASK_INTERRUPTIBLE);
    shi_raise_softirq(cpu, SHI_HI_SOFTIRQ);
    CHECK(nran == limit && shi_schedule_one(cpu, true) && nran == limit + 1);
}

static void held_off_until_the_last_enable(void)
{
    reset();
    shi_local_bh_disable(cpu);
    shi_local_bh_disable(cpu);
    kick(1 << SHI_HI_SOFTIRQ);
    CHECK(handled == 1 && !nran && !cpu->softirqd);
    CHECK(shi_in_task(cpu) && shi_in_interrupt(cpu) && !shi_in_serving_softirq(cpu));
    shi_raise_softirq(cpu, SHI_TIMER_SOFTIRQ); /* in a task, but it will be run here */
    CHECK(!cpu->softirqd);
    shi_local_bh_enable(cpu, false);
    CHECK(!nran);
    shi_local_bh_enable(cpu, false);
    CHECK(nran == 2 && ran[0] == SHI_HI_SOFTIRQ && ran[1] == SHI_TIMER_SOFTIRQ);
}

static void raised_in_a_task_it_is_ksoftirqds(void)
{
    reset();
    shi_raise_softirq(cpu, SHI_HI_SOFTIRQ);
    CHECK(!nran && cpu->softirqd);
    shi_do_softirq(cpu, false);
    CHECK(nran == 1 && !cpu->softirqd);
}

/* A waiter that serves its own queue, and an idle CPU, poll: RUNNING while softirqs run. */
static void after_a_drain_without_an_interrupt(void)
{
    reset();
    shi_set_polling(cpu);
    shi_raise_softirq_only(cpu, SHI_HI_SOFTIRQ);
    shi_do_softirq(cpu, false);
    CHECK(nran == 1);
    CHECK(shi_word_state(shi_load_relaxed(&cpu->slot->word)) == SHI_POLLING);
    shi_set_running(cpu);
}

static void nobodys_is_dropped(void)
{
    reset();
    kick(1 << SHI_BLOCK_SOFTIRQ);
    CHECK(!nran && !shi_load_relaxed(&cpu->softirqs));
    CHECK(shi_load_relaxed(&cpu->slot->counters[SHI_CTX_SOFTIRQ][SHI_C_irq_other]) == 1);
}

int main(void)
{
    CHECK(shi_open_softirq(SHI_HI_SOFTIRQ, hi) == 0);
    CHECK(shi_open_softirq(SHI_HI_SOFTIRQ, hi) == 0);
    CHECK(shi_open_softirq(SHI_HI_SOFTIRQ, timer) == -EBUSY);
    CHECK(shi_open_softirq(SHI_NR_SOFTIRQS, hi) == -EINVAL);
    CHECK(shi_open_softirq(SHI_TIMER_SOFTIRQ, timer) == 0);
    CHECK(shi_open_softirq(SHI_NET_RX_SOFTIRQ, net_rx) == 0);
    CHECK(shi_open_softirq(SHI_TASKLET_SOFTIRQ, tasklet) == 0);
    CHECK(shi_open_softirq(SHI_RCU_SOFTIRQ, careless) == 0);
    rig_quiet(&rig, 1);
    cpu = &rig.cpu[0];
    int got = shi_native_register("softirq", handler);
    CHECK(got >= 0);
    native = (uint32_t)got;
    rig_set_state(&rig, 0, SHI_RUNNING);
    lowest_first_when_the_handler_has_returned();
    never_nested();
    ten_times_and_the_rest_is_ksoftirqds();
    two_ms_and_the_rest_is_ksoftirqds();
    not_again_where_the_cpu_is_to_reschedule();
    by_its_thread();
    held_off_until_the_last_enable();
    raised_in_a_task_it_is_ksoftirqds();
    after_a_drain_without_an_interrupt();
    nobodys_is_dropped();
    rig_unquiet(&rig);
    return 0;
}
