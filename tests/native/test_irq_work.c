/* SPDX-License-Identifier: MIT */
/* kernel/irq_work.c's rules, and the passes in which a queue is run. */
#include "rig.h"

#include <signal.h>
#include <sys/wait.h>

#include "base/step.h"
#include "smp/entry.h"
#include "smp/irq_work.h"
#include "smp/reap.h"

#define IRQ_WORK_LINE 0xf6u

static struct rig rig;
static struct shi_self *cpu; /* this thread is CPU 0 */
static uint32_t native, again, ran[32], nran;
static uint32_t requeue; /* local index + 1 of one that its function queues again */

static void note(void *info)
{
    CHECK(nran < 32);
    ran[nran++] = (uint32_t)(uintptr_t)info;
}

static struct shi_csd *csd_of(struct shi_self *self, uint32_t local)
{
    return shi_own_csd(self, local);
}

static uint64_t state_of(struct shi_self *self, uint32_t local)
{
    return shi_load_full(&csd_of(self, local)->lock) & (SHI_CSD_LOCK | SHI_CSD_BUSY);
}

static void note_and_queue(void *info)
{
    note(info);
    if (!requeue)
        return;
    uint32_t local = requeue - 1;
    requeue = 0;
    CHECK(state_of(cpu, local) == SHI_CSD_BUSY); /* PENDING is cleared before the function */
    CHECK(shi_irq_work_queue(cpu, local, false) == 1);
    CHECK(shi_irq_work_queue(cpu, local, false) == 0);
    CHECK(state_of(cpu, local) == (SHI_CSD_LOCK | SHI_CSD_BUSY));
}

static uint32_t make(struct shi_self *self, uint32_t function, uint32_t number)
{
    const struct shi_call call = { .func = SHI_FUNC_NATIVE | function,
                                   .kind = SHI_K_INT,
                                   .value.u = number };
    int64_t local = shi_call_prepare(self, &call);
    CHECK(local >= 0);
    return (uint32_t)local;
}

static void post(uint64_t type, uint32_t number)
{
    const struct shi_call call = { .func = SHI_FUNC_NATIVE | native,
                                   .kind = SHI_K_INT,
                                   .value.u = number };
    CHECK(shi_call_post(&rig.host, &call, type, 0) >= 0);
}

static void boot(bool line, uint32_t ncpus)
{
    rig_quiet(&rig, ncpus);
    cpu = &rig.cpu[0];
    nran = requeue = 0;
    if (line) {
        rig.m.chip.use[IRQ_WORK_LINE] = SHI_USE_IRQ_WORK;
        shi_irq_work_register(&rig.m);
    }
    rig_set_state(&rig, 0, SHI_RUNNING);
}

static bool raised(void)
{
    return shi_load_full(&cpu->slot->irr[IRQ_WORK_LINE / 64]) >> (IRQ_WORK_LINE % 64) & 1;
}

static void kick(void)
{
    shi_fetch_or_full(&cpu->slot->word, SHI_W_KICKED);
    shi_irq_entry(cpu);
}

static void once_while_pending_and_last_in_first_out(void)
{
    uint32_t i, work[3];
    boot(true, 1);
    for (i = 0; i < 3; i++)
        work[i] = make(cpu, native, i + 1);
    uint8_t flags = shi_irq_save(cpu);
    uint64_t writes = shi_load_relaxed(&cpu->counts[SHI_C_chip_writes]);
    for (i = 0; i < 3; i++)
        CHECK(shi_irq_work_queue(cpu, work[i], false) == 1);
    CHECK(shi_irq_work_queue(cpu, work[1], false) == 0);
    CHECK(state_of(cpu, work[1]) == (SHI_CSD_LOCK | SHI_CSD_BUSY));
    /* One interrupt, of the list that was empty. */
    CHECK(raised() && shi_load_relaxed(&cpu->counts[SHI_C_chip_writes]) == writes + 1);
    CHECK(!nran);
    shi_irq_restore(cpu, flags);
    kick();
    CHECK(nran == 3 && ran[0] == 3 && ran[1] == 2 && ran[2] == 1);
    for (i = 0; i < 3; i++)
        CHECK(!state_of(cpu, work[i]));
    rig_unquiet(&rig);
}

static void queued_again_while_it_runs(void)
{
    boot(true, 1);
    uint32_t work = make(cpu, again, 7);
    requeue = work + 1;
    CHECK(shi_irq_work_queue(cpu, work, false) == 1);
    kick();
    CHECK(nran == 2 && !state_of(cpu, work));
    rig_unquiet(&rig);
}

/* On top of a task that holds a core section, and has queued half of its own. */
static void queued_by_an_nmi(void)
{
    boot(true, 1);
    uint32_t first = make(cpu, native, 1), second = make(cpu, native, 2);
    shi_enter(cpu);
    cpu->ctx = SHI_CTX_NMI;
    CHECK(shi_irq_work_queue(cpu, first, false) == 1);
    CHECK(shi_irq_work_queue(cpu, first, false) == 0);
    cpu->ctx = SHI_CTX_TASK;
    CHECK(!nran && raised());
    CHECK(shi_irq_work_queue(cpu, second, false) == 1);
    kick();
    CHECK(!nran);
    shi_leave(cpu);
    CHECK(nran == 2 && ran[0] == 2 && ran[1] == 1);
    rig_unquiet(&rig);
}

/* Without a line the next tick brings it, as it does a lazy one with a line. */
static void by_the_tick(bool line)
{
    boot(line, 1);
    uint32_t work = make(cpu, native, 1);
    cpu->in_task = true;
    CHECK(shi_irq_work_queue(cpu, work, line) == 1);
    kick();
    CHECK(!nran && shi_irq_work_waits(cpu) && !raised());
    shi_irq_work_timer(cpu);
    kick();
    CHECK(nran == 1 && !shi_irq_work_waits(cpu));
    cpu->in_task = false;
    rig_unquiet(&rig);
}

static void by_the_decrementer(void)
{
    boot(false, 1);
    rig.m.chip.decrementer = 1;
    uint32_t work = make(cpu, native, 1);
    CHECK(shi_irq_work_queue(cpu, work, false) == 1);
    CHECK(shi_word_work(shi_load_full(&cpu->slot->word)));
    kick();
    CHECK(nran == 1);
    rig_unquiet(&rig);
}

/* smpcfd_dying_cpu(): what nothing but a tick would bring is run before it is gone. */
static void a_cpu_that_goes_offline_runs_its_own(void)
{
    boot(false, 1);
    uint32_t work = make(cpu, native, 1), lazy = make(cpu, native, 2);
    CHECK(shi_irq_work_queue(cpu, work, false) == 1);
    CHECK(shi_irq_work_queue(cpu, lazy, true) == 1);
    int err = shi_cpu_disable(cpu);
    CHECK(!err || err == -ECANCELED); /* nobody waits for it here */
    CHECK(nran == 2 && ran[0] == 1 && ran[1] == 2 && !state_of(cpu, lazy));
    rig_unquiet(&rig);
}

static struct shi_list woken;

static void take_woken(struct shi_self *self, struct shi_list *list)
{
    CHECK(nran == 5);
    woken = *list;
    while (shi_list_pop(self, list) != UINT32_MAX)
        note((void *)(uintptr_t)100);
}

/* All SYNC, then ASYNC and irq_work as they came, then wake-ups, as one list. */
static void the_three_passes(bool long_queue)
{
    uint32_t i;
    boot(false, 1);
    rig.m.woken = take_woken;
    uint32_t work = make(&rig.host, native, 2);
    shi_enter(&rig.host);
    CHECK(shi_call_wake(&rig.host, SHI_FUNC_NATIVE | native, 100, 0) >= 0);
    shi_leave(&rig.host);
    post(SHI_CSD_ASYNC, 1);
    CHECK(shi_irq_work_queue_on(&rig.host, work, false, 0) == 1);
    CHECK(shi_irq_work_queue_on(&rig.host, work, false, 0) == 0);
    post(SHI_CSD_SYNC, 3);
    post(SHI_CSD_ASYNC, 4);
    post(SHI_CSD_SYNC, 5);
    if (long_queue) { /* more than a batch: by lists in the segment */
        for (i = 0; i < SHI_QUEUE_BATCH; i++)
            CHECK(shi_irq_work_queue_on(&rig.host, make(&rig.host, again + 1, 0), false, 0) ==
                  1);
    }
    kick();
    const uint32_t order[] = { 3, 5, 1, 2, 4, 100 };
    CHECK(nran == 6 && !memcmp(ran, order, sizeof order) && woken.count == 1);
    CHECK(!state_of(&rig.host, work));
    rig_unquiet(&rig);
}

static uint32_t on_its_way;
static int queued_on_top = -1;

/* Stands for an NMI: whatever this process is in the middle of, this comes on top. */
static void on_top(int signum)
{
    uint8_t ctx = cpu->ctx;
    (void)signum;
    cpu->ctx = SHI_CTX_NMI;
    queued_on_top = shi_irq_work_queue(cpu, on_its_way, false);
    cpu->ctx = ctx;
}

/* Its target dies while it is aimed, and is reaped; then an NMI queues the same work: that is
 * PENDING, and what is taken back is not what the NMI has put on the own list. */
static void reaped_on_its_way_with_an_nmi_on_top(void)
{
    int status;
    boot(true, 2);
    on_its_way = make(cpu, native, 1);
    rig_set_state(&rig, 1, SHI_HALTED);
    cpu->steps = true;
    shi_store_relaxed(&cpu->slot->step_action, SHI_STEP_STOP);
    shi_store_release(&cpu->slot->step, SHI_STEP_aim);
    pid_t pid = fork();
    CHECK(pid >= 0);
    if (!pid) {
        signal(SIGUSR1, on_top);
        CHECK(shi_irq_work_queue_on(cpu, on_its_way, false, 1) == -ENXIO);
        CHECK(queued_on_top == 0 && !state_of(cpu, on_its_way));
        CHECK(shi_irq_work_queue(cpu, on_its_way, false) == 1);
        kick();
        CHECK(nran == 1 && !shi_load_full(&cpu->counts[SHI_C_corrupt]));
        CHECK(!state_of(cpu, on_its_way));
        _exit(0);
    }
    CHECK(waitpid(pid, &status, WUNTRACED) == pid && WIFSTOPPED(status));
    shi_reap_mark(&rig.firmware, 1, SIGKILL);
    CHECK(shi_reap_complete(&rig.firmware, 1) == 1);
    kill(pid, SIGUSR1);
    kill(pid, SIGCONT);
    CHECK(waitpid(pid, &status, 0) == pid && WIFEXITED(status) && !WEXITSTATUS(status));
    rig_unquiet(&rig);
}

static void nothing(void *info)
{
    (void)info;
}

static void not_on_an_offline_cpu(void)
{
    boot(false, 1);
    uint32_t work = make(&rig.host, native, 1);
    rig_set_state(&rig, 0, SHI_OFFLINE);
    CHECK(shi_irq_work_queue_on(&rig.host, work, false, 0) == -ENXIO);
    CHECK(shi_irq_work_queue_on(&rig.host, work, false, 1) == -ENXIO);
    CHECK(!state_of(&rig.host, work));
    rig_unquiet(&rig);
}

int main(void)
{
    shi_native_init();
    native = (uint32_t)shi_native_register("note", note);
    again = (uint32_t)shi_native_register("again", note_and_queue);
    CHECK(shi_native_register("nothing", nothing) == (int)again + 1);
    once_while_pending_and_last_in_first_out();
    queued_again_while_it_runs();
    queued_by_an_nmi();
    by_the_tick(false);
    by_the_tick(true);
    by_the_decrementer();
    a_cpu_that_goes_offline_runs_its_own();
    the_three_passes(false);
    the_three_passes(true);
    not_on_an_offline_cpu();
    reaped_on_its_way_with_an_nmi_on_top();
    return 0;
}
