/* SPDX-License-Identifier: MIT */
#include "base/sys.h"

#include <errno.h>

#include "base/trace.h"
#include "irq/chip.h"
#include "irq/remind.h"
#include "irq/ring.h"
#include "smp/csd.h"
#include "smp/entry.h"
#include "smp/irq_work.h"
#include "smp/queue.h"
#include "smp/sender.h"
#include "smp/smp.h"

/*
 * irq_work_claim(): PENDING and BUSY, in one swap, because an NMI on top of this may claim the
 * same one.  A new sequence number: who ends an earlier run of it leaves BUSY, and a reaper
 * that has seen that use leaves this one.
 */
static bool claim(struct shi_self *self, struct shi_csd *csd, uint32_t cpu)
{
    uint64_t old = shi_load_relaxed(&csd->lock), next;
    /* An NMI on top of who queues it: PENDING.  Its word may not say so any more, where a reaper
     * has found it aimed at a CPU that died; it is not queued there, and then it is free. */
    if (self->queueing == shi_csd_number(self->m, csd) && self->ctx == SHI_CTX_NMI)
        return false;
    do {
        if (old & SHI_CSD_LOCK)
            return false;
        next = ((old & SHI_CSD_SEQ) + (1ull << SHI_CSD_SEQ_SHIFT)) | SHI_CSD_LOCK |
               SHI_CSD_BUSY | SHI_CSD_IRQ_WORK | (uint64_t)cpu << SHI_CSD_DST_SHIFT;
        if (cpu == self->id && !self->host) /* by the push, of one that is sent */
            next |= (uint64_t)self->gen << SHI_CSD_GEN_SHIFT;
    } while (!shi_cas_full(&csd->lock, &old, next));
    csd->src = (uint16_t)self->id;
    csd->src_gen = self->gen;
    shi_store_relaxed(&csd->status, SHI_S_DONE);
    return true;
}

/* llist_add(): true if it was empty.  An NMI may add between the look and the swap. */
static bool add(struct shi_self *self, shi_a32 *list, uint32_t index)
{
    uint32_t first = shi_load_relaxed(list);
    do {
        shi_store_relaxed(&shi_csd(self->m, index)->next, first);
    } while (!shi_cas_full(list, &first, index + 1));
    return !first;
}

/* arch_irq_work_raise() */
static void interrupt_self(struct shi_self *self)
{
    struct shi_machine *m = self->m;
    if (m->irq_work != SHI_NO_LINE) {
        shi_count(self, SHI_C_chip_writes);
        shi_irq_raise(self, self->id, shi_line_of(m, m->irq_work, self->id));
    } else if (m->chip.decrementer) {
        self->timer_due = true;
        shi_signal_fence();
        shi_irq_ring(self, self->id);
    } else {
        shi_remind(self);
    }
}

static void queue_local(struct shi_self *self, uint32_t index, bool lazy)
{
    if (!add(self, lazy ? &self->lazy : &self->raised, index))
        return;
    if (!lazy) {
        SHI_TRACE(self, irq_work_ipi, self->id, index + 1,
                  shi_trace_func(self, shi_csd(self->m, index)->func), 0);
        interrupt_self(self);
    } else if (self->in_task || self->current)
        shi_remind(self); /* its tick; an idle CPU looks before it idles on */
}

int shi_irq_work_queue(struct shi_self *self, uint32_t local, bool lazy)
{
    if (!claim(self, shi_own_csd(self, local), self->id))
        return 0;
    /* Of an NMI on top of a task the section would end with the task's interrupts. */
    bool nmi = self->ctx == SHI_CTX_NMI;
    if (!nmi)
        shi_enter(self);
    queue_local(self, shi_own_index(self, local), lazy);
    if (!nmi)
        shi_leave(self);
    return 1;
}

int shi_irq_work_queue_on(struct shi_self *self, uint32_t local, bool lazy, uint32_t cpu)
{
    struct shi_csd *csd = shi_own_csd(self, local);
    if (cpu == self->id && !self->host)
        return shi_irq_work_queue(self, local, lazy);
    if (cpu >= self->m->ncpus ||
        !shi_word_online(shi_load_relaxed(&shi_slot(self->m, cpu)->word)))
        return -ENXIO;
    shi_enter(self);
    self->queueing = shi_csd_number(self->m, csd);
    shi_signal_fence();
    if (!claim(self, csd, cpu)) {
        self->queueing = 0;
        shi_leave(self);
        return 0;
    }
    int err = self->left        ? -ESHUTDOWN
              : shi_ended(self) ? -EOWNERDEAD
                                : shi_call_single_queue(self, local, cpu);
    if (err)
        shi_csd_cancel(csd);
    shi_signal_fence();
    self->queueing = 0;
    shi_leave(self);
    return err ? err : 1;
}

/* ---- running them ---------------------------------------------------------------- */

static void run_list(struct shi_self *self, shi_a32 *list)
{
    uint32_t at = shi_xchg_full(list, 0);
    while (at) {
        uint32_t index = at - 1;
        if (!shi_csd_is_ours(self, index)) {
            shi_count(self, SHI_C_corrupt);
            shi_store_release(&self->slot->damaged, 1);
            return; /* nothing behind it can be believed */
        }
        at = shi_load_relaxed(&shi_csd(self->m, index)->next);
        shi_csd_run(self, index);
    }
}

void shi_irq_work_run(struct shi_self *self)
{
    if (shi_load_relaxed(&self->raised))
        run_list(self, &self->raised);
    if (shi_load_relaxed(&self->lazy))
        run_list(self, &self->lazy);
}

static bool take(struct shi_self *self, uint32_t line)
{
    (void)line;
    shi_irq_work_run(self);
    return true;
}

/* irq_work_tick() */
static void tick(struct shi_self *self)
{
    shi_cause(self, SHI_CAUSE_irq_work);
    shi_irq_work_run(self);
}

void shi_irq_work_register(struct shi_machine *m)
{
    uint32_t line;
    m->irq_work = SHI_NO_LINE;
    for (line = m->chip.nlines; line-- > 0;)
        if (m->chip.use[line] == SHI_USE_IRQ_WORK)
            m->irq_work = line;
    m->actions[SHI_USE_IRQ_WORK] = take;
    m->local_timer = tick;
}
