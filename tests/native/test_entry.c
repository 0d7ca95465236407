/* SPDX-License-Identifier: MIT */
/* Where interrupts enter a CPU: the soft mask, core sections, and changes of state. */
#include "rig.h"

#include "smp/entry.h"

static struct rig rig;
static struct shi_self *cpu; /* this thread is CPU 0 */
static uint32_t ran;

static void handler(void *info)
{
    (void)info;
    ran++;
    CHECK(shi_masked(cpu)); /* a handler is never interrupted by another */
}

static uint32_t native;

/* Something for CPU 0, as it comes from the host. */
static void send(void)
{
    const struct shi_call call = { .func = SHI_FUNC_NATIVE | native };
    CHECK(shi_call_post(&rig.host, &call, SHI_CSD_ASYNC, 0) >= 0);
}

static uint64_t word(void)
{
    return shi_load_full(&cpu->slot->word);
}

static void boot(enum shi_state state)
{
    rig_quiet(&rig, 1);
    cpu = &rig.cpu[0];
    int got = shi_native_register("entry", handler);
    CHECK(got >= 0);
    native = (uint32_t)got;
    rig_set_state(&rig, 0, state);
    ran = 0;
}

static void kick(void)
{
    shi_fetch_or_full(&cpu->slot->word, SHI_W_KICKED);
    shi_irq_entry(cpu);
    CHECK(!(word() & SHI_W_KICKED)); /* acknowledged, whatever comes of it */
}

static void taken_at_once(void)
{
    boot(SHI_RUNNING);
    send();
    kick();
    CHECK(ran == 1 && shi_word_state(word()) == SHI_RUNNING && !shi_word_work(word()));
    kick(); /* a late one finds nothing */
    CHECK(ran == 1);
    CHECK(shi_load_relaxed(&cpu->slot->counters[SHI_CTX_IRQ][SHI_C_kicks_empty]) == 1);
    CHECK(shi_load_relaxed(&cpu->slot->counters[SHI_CTX_NMI][SHI_C_kicks_received]) == 2);
    rig_unquiet(&rig);
}

static void held_while_interrupts_are_off(void)
{
    boot(SHI_RUNNING);
    uint8_t outer = shi_irq_save(cpu), inner;
    send();
    kick();
    CHECK(!ran && cpu->happened);
    inner = shi_irq_save(cpu);
    shi_irq_restore(cpu, inner); /* they were off already */
    CHECK(!ran);
    shi_irq_restore(cpu, outer);
    CHECK(ran == 1 && !cpu->happened);
    rig_unquiet(&rig);
}

static void held_in_core_sections(void)
{
    boot(SHI_RUNNING);
    shi_enter(cpu);
    shi_enter(cpu);
    send();
    kick();
    shi_leave(cpu);
    CHECK(!ran);
    shi_leave(cpu);
    CHECK(ran == 1);
    rig_unquiet(&rig);
}

/* Nothing may be taken off the queue behind the back of who polls, or halts. */
static void late_kicks_leave_the_queue_be(void)
{
    static const enum shi_state others[] = { SHI_POLLING, SHI_HALTED };
    uint32_t i;
    for (i = 0; i < 2; i++) {
        boot(others[i]);
        send();
        kick();
        CHECK(!ran && shi_word_head(word()));
        rig_unquiet(&rig);
    }
}

/* Its sender saw POLLING and did not ring: who goes on to a task looks again. */
static void nothing_is_left_behind_for_a_task(void)
{
    boot(SHI_POLLING);
    send();
    shi_set_running(cpu);
    CHECK(ran == 1 && shi_word_state(word()) == SHI_RUNNING);
    shi_set_polling(cpu);
    CHECK(shi_word_state(word()) == SHI_POLLING);
    send();
    uint8_t flags = shi_irq_save(cpu);
    shi_set_running(cpu);
    CHECK(ran == 1 && cpu->happened && shi_word_state(word()) == SHI_RUNNING);
    shi_irq_restore(cpu, flags);
    CHECK(ran == 2);
    rig_unquiet(&rig);
}

static void service_says_whether_there_was_any(void)
{
    boot(SHI_POLLING);
    uint32_t served = cpu->served;
    CHECK(!shi_service(cpu) && cpu->served == served);
    shi_fetch_or_full(&cpu->slot->word, SHI_W_NEED_RESCHED);
    CHECK(shi_service(cpu) && cpu->served == served + 1);
    CHECK(!(word() & SHI_W_NEED_RESCHED));
    cpu->irqs_off = 1;
    send();
    send();
    CHECK(shi_service(cpu) && ran == 2);
    cpu->irqs_off = 0;
    CHECK(!shi_service(cpu));
    rig_set_state(&rig, 0, SHI_OFFLINE); /* gone: these change nothing */
    shi_set_polling(cpu);
    shi_set_running(cpu);
    CHECK(shi_word_state(word()) == SHI_OFFLINE);
    rig_unquiet(&rig);
}

/* A ring that died with its ringer is made good where there is something to ring for. */
static void rung_again(void)
{
    boot(SHI_HALTED);
    CHECK(shi_irq_rering(&rig.host, 0) == 0);
    rig_set_state(&rig, 0, SHI_RUNG); /* a promise that nobody keeps */
    CHECK(shi_irq_rering(&rig.host, 0) == 1);
    CHECK(shi_load_relaxed(&rig.host.counts[SHI_C_rekicked]) == 1);
    rig_set_state(&rig, 0, SHI_POLLING);
    CHECK(shi_irq_rering(&rig.host, 0) == 0);
    rig_set_state(&rig, 0, SHI_DEAD);
    CHECK(shi_irq_rering(&rig.host, 0) == 0);
    rig_unquiet(&rig);
}

int main(void)
{
    taken_at_once();
    held_while_interrupts_are_off();
    held_in_core_sections();
    late_kicks_leave_the_queue_be();
    nothing_is_left_behind_for_a_task();
    service_says_whether_there_was_any();
    rung_again();
    return 0;
}
