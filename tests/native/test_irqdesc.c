/* SPDX-License-Identifier: MIT */
/* irq descriptors by themselves: the lock, who handles a line, what is put off and freed. */
#include "rig.h"

#include <pthread.h>

#include "irq/irqdesc.h"

#define VIRQ 40
#define LINE 0x40u

static struct rig rig;
static struct shi_self *cpu; /* this thread is CPU 0 */
static uint64_t got;

static void handler(void *info)
{
    got = (uint64_t)(uintptr_t)info;
}

/* Line LINE is irq VIRQ's, unmasked at CPU 0. */
static struct shi_irqdesc *boot(void)
{
    rig_quiet(&rig, 2);
    cpu = &rig.cpu[0];
    rig_set_state(&rig, 0, SHI_POLLING);
    rig_set_state(&rig, 1, SHI_RUNNING);
    rig.m.chip.use[LINE] = SHI_USE_IRQ;
    struct shi_irqdesc *desc = shi_irqdesc(&rig.m, VIRQ);
    desc->epoch = 1;
    shi_store_full(&desc->used, 1);
    shi_store_full(&shi_irq_area(&rig.m)->line_virq[LINE], VIRQ);
    shi_chip_enable(&rig.host, 0, LINE, true);
    return desc;
}

static void raise_line(void)
{
    shi_enter(&rig.host);
    shi_irq_raise(&rig.host, 0, LINE);
    shi_leave(&rig.host);
    cpu->irqs_off = 1;
    shi_service(cpu);
    cpu->irqs_off = 0;
}

static uint64_t counted(enum shi_counter which)
{
    return shi_load_relaxed(&cpu->slot->counters[SHI_CTX_TASK][which]);
}

static void the_lock(void)
{
    struct shi_irqdesc *desc = boot();
    struct shi_irq_area *area = shi_irq_area(&rig.m);
    CHECK(shi_irq_trylock(&rig.cpu[1]) == 0);
    CHECK(shi_irq_trylock(&rig.host) == -EAGAIN);
    shi_irq_unlock(&rig.host); /* not its own: nothing */
    CHECK(shi_irq_trylock(&rig.host) == -EAGAIN);
    shi_irq_unlock(&rig.cpu[1]);
    CHECK(shi_irq_trylock(&rig.host) == 0);
    shi_irq_unlock(&rig.host);

    /* Killed while it held it, two irqs half made: who takes it next frees them. */
    CHECK(shi_irq_trylock(&rig.cpu[1]) == 0);
    shi_store_full(&area->desc[VIRQ + 1].used, 1);
    shi_store_full(&desc->action, SHI_IA_NATIVE);
    shi_store_full(&area->undo, (uint64_t)2 << 32 | VIRQ);
    shi_reap_mark(&rig.firmware, 1, 9);
    CHECK(shi_irq_trylock(&rig.host) == 0);
    CHECK(!shi_load_full(&area->undo));
    CHECK(!shi_load_full(&desc->used) && !shi_load_full(&area->desc[VIRQ + 1].used));
    CHECK(shi_load_full(&desc->action) == SHI_IA_NONE);
    CHECK(shi_load_full(&area->line_virq[LINE]) == 0);
    shi_irq_unlock(&rig.host);
    CHECK(shi_irqdesc(&rig.m, SHI_NR_IRQS) == NULL);
    rig_unquiet(&rig);
}

static void native_handlers(void)
{
    struct shi_irqdesc *desc = boot();
    int native = shi_native_register("irqdesc", handler);
    CHECK(native >= 0);
    raise_line(); /* nobody has requested it */
    CHECK(counted(SHI_C_irq_other) == 1 && counted(SHI_C_irq_handled) == 0);
    raise_line(); /* and since that is spurious, it is held back from then on */
    CHECK(counted(SHI_C_irq_other) == 1);
    shi_irqdesc_set_native(desc, (uint32_t)native, SHI_K_INT, 77, 0);
    shi_chip_enable(&rig.host, 0, LINE, true);
    raise_line();
    CHECK(got == 77 && counted(SHI_C_irq_handled) == 1);
    /* this_cpu_ptr(), and nothing behind the arrays. */
    shi_store_full(&rig.m.header->array_used, SHI_PAGE);
    shi_irqdesc_set_native(desc, (uint32_t)native, SHI_K_POINTER, rig.m.array_offset, 64);
    raise_line();
    CHECK(got == (uint64_t)(uintptr_t)(rig.m.base + rig.m.array_offset));
    got = 0;
    shi_irqdesc_set_native(desc, (uint32_t)native, SHI_K_POINTER, UINT64_MAX, 64);
    raise_line();
    CHECK(got == 0 && counted(SHI_C_irq_other) == 2);
    shi_irqdesc_set_native(desc, SHI_NATIVE_MAX, SHI_K_INT, 5, 0); /* there is no such one */
    raise_line();
    CHECK(got == 0 && counted(SHI_C_irq_other) == 3);
    shi_irqdesc_clear(desc);
    raise_line();
    CHECK(got == 0 && counted(SHI_C_irq_other) == 4 && counted(SHI_C_irq_handled) == 2);
    rig_unquiet(&rig);
}

#define REPLACED 200000

static uint64_t torn, ran;
static shi_a32 replacing;
static int numbers[2];

static void first(void *info)
{
    ran++;
    torn += (uint64_t)(uintptr_t)info != 1;
}

static void second(void *info)
{
    ran++;
    torn += (uint64_t)(uintptr_t)info != 2;
}

static void *replace(void *desc)
{
    uint32_t i;
    for (i = 0; i < REPLACED; i++)
        shi_irqdesc_set_native(desc, (uint32_t)numbers[i % 2], SHI_K_INT, 1 + i % 2, 0);
    shi_store_full(&replacing, 0);
    return NULL;
}

/* A handler is called with its own info, or not at all, while another takes its place. */
static void replaced_while_it_is_read(void)
{
    struct shi_irqdesc *desc = boot();
    pthread_t thread;
    numbers[0] = shi_native_register("first", first);
    numbers[1] = shi_native_register("second", second);
    shi_irqdesc_set_native(desc, (uint32_t)numbers[0], SHI_K_INT, 1, 0);
    shi_store_full(&replacing, 1);
    CHECK(pthread_create(&thread, NULL, replace, desc) == 0);
    do
        raise_line();
    while (shi_load_full(&replacing));
    CHECK(pthread_join(thread, NULL) == 0);
    CHECK(ran > 0 && torn == 0);
    ran = 0;
    raise_line();
    CHECK(ran == 1 && torn == 0);
    /* Killed half way: nobody's, and the line is not held back for it. */
    shi_store_full(&desc->seq, shi_load_full(&desc->seq) + 1);
    desc->func = (uint32_t)numbers[1];
    raise_line();
    CHECK(torn == 0);
    CHECK(ran == 1);
    shi_irqdesc_set_native(desc, (uint32_t)numbers[1], SHI_K_INT, 2, 0);
    raise_line();
    CHECK(ran == 2 && torn == 0);
    rig_unquiet(&rig);
}

/* A Python handler that cannot run now: the line is kept, once, and is the same irq's. */
static void put_off(void)
{
    struct shi_irqdesc *desc = boot();
    shi_irqdesc_set_python(&rig.cpu[1], desc, 3, 1);
    CHECK(shi_irqdesc_requester_lives(&rig.m, desc));
    CHECK(shi_irqdesc_pop(cpu) == SHI_NO_LINE);
    raise_line();
    CHECK(cpu->nlater == 1 && shi_irqdesc_still(cpu, LINE));
    desc->epoch++; /* given back, and taken by another meanwhile */
    CHECK(!shi_irqdesc_still(cpu, LINE));
    desc->epoch--;
    raise_line(); /* pending, in service: not taken again before its handler has run */
    CHECK(cpu->nlater == 1);
    CHECK(shi_irqdesc_pop(cpu) == LINE && shi_irqdesc_pop(cpu) == SHI_NO_LINE);
    cpu->irqs_off = 1;
    shi_chip_end(cpu, LINE);
    shi_service(cpu);
    cpu->irqs_off = 0;
    CHECK(cpu->nlater == 1); /* what came meanwhile */
    shi_reap_mark(&rig.firmware, 1, 9);
    CHECK(!shi_irqdesc_requester_lives(&rig.m, desc));
    shi_reap_reset(&rig.firmware, 1); /* another process in its place */
    CHECK(!shi_irqdesc_requester_lives(&rig.m, desc));
    desc->src = UINT16_MAX;
    CHECK(!shi_irqdesc_requester_lives(&rig.m, desc));
    rig_unquiet(&rig);
}

/* Given back: masked, not pending, counted from zero. */
static void reset(void)
{
    boot();
    raise_line(); /* counted; nobody has requested it, so it is held back ... */
    shi_chip_enable(&rig.host, 0, LINE, true); /* ... until it is enabled anew */
    shi_enter(&rig.host);
    shi_irq_raise(&rig.host, 0, LINE);
    shi_leave(&rig.host);
    CHECK(rig.m.flow->pending(&rig.m, 0));
    shi_irqdesc_reset_line(&rig.host, LINE, VIRQ);
    CHECK(!rig.m.flow->pending(&rig.m, 0));
    shi_a64 *count = (shi_a64 *)(rig.m.base + shi_line_count_offset(&rig.m));
    CHECK(shi_load_relaxed(&count[LINE]) == 0);
    uint64_t other = counted(SHI_C_irq_other);
    raise_line(); /* masked */
    CHECK(counted(SHI_C_irq_other) == other);
    rig_unquiet(&rig);
}

static void coprocessors(void)
{
    boot();
    struct shi_coproc *coproc = &shi_irq_area(&rig.m)->coproc[2];
    CHECK(shi_coproc_raise(&rig.host, 2, 0) == -ENXIO);
    CHECK(shi_coproc_raise(&rig.host, 2, VIRQ) == -ENXIO);
    CHECK(shi_coproc_raise(&rig.host, SHI_NCOPROC, VIRQ) == -ENXIO);
    shi_store_full(&coproc->virq, VIRQ);
    uint32_t seen = shi_load_full(&coproc->event);
    CHECK(shi_coproc_raise(&rig.host, 2, VIRQ) == 0);
    CHECK(shi_load_full(&coproc->pending) && shi_load_full(&coproc->event) != seen);
    rig_unquiet(&rig);
}

int main(void)
{
    the_lock();
    native_handlers();
    replaced_while_it_is_read();
    put_off();
    reset();
    coprocessors();
    return 0;
}
