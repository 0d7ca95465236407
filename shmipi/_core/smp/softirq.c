/* SPDX-License-Identifier: MIT */
#include "base/sys.h"

#include <errno.h>

#include "base/clock.h"
#include "base/trace.h"
#include "irq/chip.h"
#include "irq/irqdesc.h"
#include "smp/softirq.h"

#define MAX_SOFTIRQ_NS 2000000u
#define MAX_SOFTIRQ_RESTART 10u

const char *const shi_softirq_names[SHI_NR_SOFTIRQS] = {
#define X(name) #name,
    SHI_SOFTIRQS(X)
#undef X
};

/* The same in each process of a machine: filled before the first fork. */
static shi_softirq_action *softirq_vec[SHI_NR_SOFTIRQS];

int shi_open_softirq(uint32_t nr, shi_softirq_action *action)
{
    if (nr >= SHI_NR_SOFTIRQS || !action)
        return -EINVAL;
    if (softirq_vec[nr] && softirq_vec[nr] != action)
        return -EBUSY;
    softirq_vec[nr] = action;
    return 0;
}

bool shi_softirq_is_native(uint32_t nr)
{
    return nr < SHI_NR_SOFTIRQS && softirq_vec[nr];
}

uint64_t shi_softirq_count(const struct shi_machine *m, uint32_t cpu, uint32_t nr)
{
    return cpu < m->ncpus && nr < SHI_NR_SOFTIRQS
               ? shi_load_relaxed(&shi_slot(m, cpu)->softirqs[nr])
               : 0;
}

/* What is left is ksoftirqd's. */
static void wakeup_softirqd(struct shi_self *self)
{
    SHI_TRACE(self, softirqd_wake, self->id, 0, 0, shi_load_relaxed(&self->softirqs));
    self->softirqd = true;
    if (self->m->wake_softirqd)
        self->m->wake_softirqd(self);
}

void shi_raise_softirq_only(struct shi_self *self, uint32_t nr)
{
    if (nr >= SHI_NR_SOFTIRQS)
        return;
    SHI_TRACE(self, softirq_raise, self->id, 0, 0, nr);
    /* A read-modify-write: a handler on top of this raises others. */
    shi_fetch_or_full(&self->softirqs, 1u << nr);
}

void shi_raise_softirq(struct shi_self *self, uint32_t nr)
{
    shi_raise_softirq_only(self, nr);
    /* A native handler that the idle loop or a waiter runs is in a core section of theirs: they
     * look when it has returned, as the end of an interrupt does. */
    if (!shi_in_interrupt(self) && !self->in_core)
        wakeup_softirqd(self);
}

/* ---- running them ---------------------------------------------------------------- */

/* A native action that calls one of Python's is Python's (shi_softirq_calls). */
static uint32_t kind_of(const struct shi_self *self, uint32_t nr)
{
    /* Acquire pairs with open_softirq's release: the handler. */
    uint32_t action = shi_load_acquire(&shi_irq_area(self->m)->softirq[nr].action);
    return softirq_vec[nr] && action != SHI_IA_PYTHON ? SHI_IA_NATIVE : action;
}

bool shi_softirq_calls(const struct shi_self *self, uint32_t nr)
{
    return __builtin_expect(shi_load_relaxed(&shi_irq_area(self->m)->softirq[nr].action) ==
                                SHI_IA_PYTHON,
                            0) &&
           self->hooks.softirq;
}

bool shi_softirq_wants_python(const struct shi_self *self)
{
    uint32_t pending = shi_load_relaxed(&self->softirqs), nr;
    bool python = false;
    if (!self->hooks.softirq)
        return false;
    for (nr = 0; nr < SHI_NR_SOFTIRQS; nr++) {
        if (!(pending >> nr & 1))
            continue;
        if (kind_of(self, nr) != SHI_IA_PYTHON)
            return false;
        python = true;
    }
    return python;
}

static void run_one(struct shi_self *self, uint32_t nr)
{
    const struct shi_irqdesc *desc = &shi_irq_area(self->m)->softirq[nr];
    shi_a64 *count = &self->slot->softirqs[nr];
    uint32_t depth = self->softirq, preempt = self->preempt;
    struct shi_irqdesc seen;
    shi_store_relaxed(count, shi_load_relaxed(count) + 1); /* the owner's, and not nested */
    SHI_TRACE(self, softirq_entry, self->id, 0, 0, nr);
    if (softirq_vec[nr]) {
        softirq_vec[nr](self);
    } else if (!shi_irqdesc_read(desc, &seen)) {
        shi_count(self, SHI_C_irq_other);
    } else if (shi_load_relaxed(&seen.action) == SHI_IA_PYTHON && self->hooks.softirq) {
        self->hooks.softirq(self, nr);
    } else if (shi_load_relaxed(&seen.action) != SHI_IA_NATIVE ||
               !shi_irqdesc_run_native(self, &seen)) {
        shi_count(self, SHI_C_irq_other); /* raised, and nobody has opened it */
    }
    shi_end_if_forked(self);
    SHI_TRACE(self, softirq_exit, self->id, 0, 0, nr);
    /* "entered softirq with preempt_count, exited with": as it was. */
    self->softirq = depth;
    self->preempt = preempt;
}

/* Run what is pending now, but what is Python's if it may not; `left` gets those. */
static void run_pass(struct shi_self *self, bool python, uint32_t *left)
{
    uint32_t pending = shi_load_relaxed(&self->softirqs) & ~*left, nr;
    for (nr = 0; !python && nr < SHI_NR_SOFTIRQS; nr++)
        if (pending >> nr & 1 && kind_of(self, nr) == SHI_IA_PYTHON)
            *left |= 1u << nr;
    pending &= ~*left;
    /* Taken back before they run: raised from here on they run once more. */
    shi_fetch_and_full(&self->softirqs, ~pending);
    for (nr = 0; pending; nr++, pending >>= 1)
        if (pending & 1)
            run_one(self, nr);
}

void shi_softirq_handle(struct shi_self *self, bool python)
{
    uint64_t end = shi_now_ns() + MAX_SOFTIRQ_NS;
    uint32_t restart = MAX_SOFTIRQ_RESTART, left = 0;
    uint8_t ctx = self->ctx;
    bool again;
    self->softirqd = false;
    if (python)
        self->softirq_asked = false;
    do {
        again = true;
        self->softirq += SHI_SOFTIRQ_SERVING;
        self->ctx = SHI_CTX_SOFTIRQ;
        self->counts = self->slot->counters[SHI_CTX_SOFTIRQ];
        shi_signal_fence();
        do {
            run_pass(self, python, &left);
            if (!(shi_load_relaxed(&self->softirqs) & ~left))
                break;
            again = shi_now_ns() < end && --restart &&
                    !(shi_load_relaxed(&self->slot->word) & SHI_W_NEED_RESCHED);
        } while (again && !self->left);
        shi_signal_fence();
        self->ctx = ctx;
        self->counts = self->slot->counters[ctx];
        self->softirq -= SHI_SOFTIRQ_SERVING;
        shi_signal_fence();
        /* An interrupt between the last look and here has found softirqs being served, and
         * has left what it raised to them: look once more. */
    } while (again && !self->left && shi_load_relaxed(&self->softirqs) & ~left);
    if (!again)
        wakeup_softirqd(self);
    if (shi_load_relaxed(&self->softirqs) & left)
        self->softirq_asked = true;
}
