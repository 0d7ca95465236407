/* SPDX-License-Identifier: MIT */
/*
 * Where interrupts enter a CPU: the handler of the kick, serving what arrived, the soft
 * mask and the core's own sections.
 */
#ifndef SHI_ENTRY_H
#define SHI_ENTRY_H

#include "base/machine.h"

/*
 * A core section: between these the kick handler only notes that it was called, so
 * the sender's private lists never change under it.  On the host, whose threads share
 * one sender and which takes no interrupts, it is a mutex.
 */
static inline void shi_enter(struct shi_self *self)
{
    if (self->host) {
        pthread_mutex_lock(&self->lock);
        return;
    }
    self->in_core++;
    shi_signal_fence();
}

void shi_leave_slow(struct shi_self *self);

static inline void shi_leave(struct shi_self *self)
{
    if (self->host) {
        pthread_mutex_unlock(&self->lock);
        return;
    }
    shi_signal_fence();
    self->in_core--;
    shi_signal_fence();
    if (__builtin_expect(self->happened, 0))
        shi_leave_slow(self);
}

/* Drain lines and queue until both are empty.  Soft-masked.  True if there was any. */
bool shi_service(struct shi_self *self);
/* One of them, for who waits and looks at something in between.  True if there was any. */
bool shi_service_once(struct shi_self *self);
/* Body of the kick handler. */
void shi_irq_entry(struct shi_self *self);

/* local_irq_save: the flag as it was.  Restore replays what happened meanwhile;
 * Python work it found is on self->deferred or self->later. */
uint8_t shi_irq_save(struct shi_self *self);
void shi_irq_restore(struct shi_self *self, uint8_t flags);

/* Change of state of the own CPU. */
void shi_set_polling(struct shi_self *self);
/* POLLING -> RUNNING; serves first whatever would be overlooked.  Python csds that were
 * deferred while doing so are on self->deferred or self->later. */
void shi_set_running(struct shi_self *self);

/*
 * An interrupt has ended here, or something else that lets softirqs run: those that are
 * pending.  `python`: this may run Python actions now; else the interpreter is asked.
 * Nothing where they may not run (kernel/softirq.c, do_softirq).
 */
void shi_do_softirq(struct shi_self *self, bool python);
/* The last of these runs what was held off.  See shi_local_bh_disable, smp/softirq.h. */
void shi_local_bh_enable(struct shi_self *self, bool python);

/* Install the handlers of the kick and the NMI signal, for the process's CPU `self`. */
int shi_kick_install(struct shi_self *self);
void shi_kick_remove(void);
/* 0, or what task code did to one of them: -EEXIST replaced it, -EPERM blocks it.
 * It is put right again in either case. */
int shi_kick_check(struct shi_self *self);

/* No progress: ring again whatever the bits say, if there is work.  1 rung, 0 nothing to
 * ring for, or -EAGAIN when no signal could be queued. */
int shi_irq_rering(struct shi_self *self, uint32_t dst);

/* Another one runs, or the same goes on: NEED_RESCHED has been obeyed. */
static inline void shi_schedule(struct shi_self *self)
{
    if (shi_load_relaxed(&self->slot->word) & (SHI_W_NEED_RESCHED | SHI_W_LAZY))
        shi_fetch_and_full(&self->slot->word, ~(SHI_W_NEED_RESCHED | SHI_W_LAZY));
}
/* NEED_RESCHED of a CPU that sleeps in its idle loop: who set it died before the interrupt. */
static inline bool shi_resched_unsent(const struct shi_machine *m, uint32_t cpu, uint64_t w)
{
    return w & SHI_W_NEED_RESCHED && shi_word_state(w) == SHI_HALTED &&
           !shi_load_relaxed(&shi_slot(m, cpu)->task);
}

/* What this process is, for native handlers; NULL: no CPU (a host, a fork's child). */
struct shi_self *shi_this_cpu(void);

/* Is there any irq_work (smp/irq_work.h) that nothing but the timer brings? */
static inline bool shi_irq_work_waits(const struct shi_self *self)
{
    return shi_load_relaxed(&self->lazy) ||
           (self->m->irq_work == SHI_NO_LINE && shi_load_relaxed(&self->raised));
}

/* The timer's interrupt: whoever looks at the word next takes it. */
static inline void shi_irq_work_timer(struct shi_self *self)
{
    self->timer_due = true;
    shi_fetch_or_full(&self->slot->word, SHI_W_PENDING);
}

#endif
