/* SPDX-License-Identifier: MIT */
#include "base/sys.h"

#include <stdio.h>
#include <unistd.h>

#include "base/clock.h"
#include "irq/chip.h"
#include "smp/csd.h"
#include "smp/entry.h"
#include "smp/stall.h"

#define NS_PER_MS UINT64_C(1000000)

/* ilog2(num_online_cpus()) / 2 + 1 */
static uint32_t backoff(const struct shi_machine *m)
{
    uint32_t cpu, online = 0;
    for (cpu = 0; cpu < m->ncpus; cpu++)
        online += shi_word_online(shi_load_relaxed(&shi_slot(m, cpu)->word));
    return online ? (31u - (uint32_t)__builtin_clz(online)) / 2 + 1 : 1;
}

bool shi_stall_due(struct shi_self *self, struct shi_stall *stall, const struct shi_csd *csd)
{
    const struct shi_machine *m = self->m;
    uint64_t timeout = shi_load_relaxed(&m->header->csd_lock_timeout) * NS_PER_MS;
    uint64_t now = shi_now_ns();
    if (!stall->begun_ns) {
        stall->begun_ns = stall->said_ns = now;
        stall->backoff = 1;
    }
    if (!timeout || now - stall->said_ns <= timeout * stall->backoff)
        return false;
    /* Acquire pairs with the push's release: whose csd it is. */
    uint64_t lock = shi_load_acquire(&csd->lock);
    /* Which task waits for which is not the call-function layer's: a task may take long. */
    if (!(lock & SHI_CSD_LOCK) || (lock & SHI_CSD_TYPE) == SHI_CSD_TTWU)
        return false;
    if (!stall->bug) {
        stall->bug = shi_fetch_add_relaxed(&m->header->csd_bugs, 1) + 1;
        shi_fetch_add_relaxed(&self->slot->csd_stuck, 1);
    }
    stall->said_ns = now;
    stall->messages++;
    stall->backoff = (stall->messages + 1) * backoff(m);
    return true;
}

void shi_stall_over(struct shi_self *self, const struct shi_stall *stall)
{
    shi_a32 *stuck = &self->slot->csd_stuck;
    uint32_t was = shi_load_relaxed(stuck);
    if (self->left || !stall->bug)
        return;
    /* Not below 0, whatever another process has left there. */
    while (was && !shi_cas_full(stuck, &was, was - 1))
        ;
}

bool shi_stall_any(const struct shi_machine *m)
{
    uint32_t id;
    for (id = 0; id < m->nslots; id++) {
        const struct shi_slot *slot = shi_slot(m, id);
        if (!shi_load_relaxed(&slot->csd_stuck))
            continue;
        /* What a dead waiter waited for is over, where the kernel would count it for ever. */
        if (id >= m->ncpus ? id < shi_first_guest(m) || shi_load_relaxed(&slot->pid)
                           : shi_word_state(shi_load_relaxed(&slot->word)) != SHI_DEAD)
            return true;
    }
    return false;
}

bool shi_stall_may_dump(struct shi_self *self, uint32_t cpu)
{
    uint32_t was = 0;
    return shi_cas_full(&shi_slot(self->m, cpu)->dumped, &was, 1);
}

void shi_stall_resend(struct shi_self *self, uint32_t cpu)
{
    shi_enter(self);
    shi_chip_send_call_single(self, cpu);
    shi_irq_rering(self, cpu); /* the line may be pending, and its ring be what was lost */
    shi_leave(self);
}

void shi_stall_double_unlock(struct shi_self *self, uint32_t index)
{
    static bool given;
    char text[160];
    if (given)
        return;
    given = true;
    int n = snprintf(text, sizeof text,
                     "WARNING: csd: CSD %u was unlocked on CPU#%u, and nobody had locked it\n",
                     index + 1, self->id);
    if (n > 0 && write(STDERR_FILENO, text, (size_t)n) < 0)
        return; /* nobody is there to be told */
}
