/* SPDX-License-Identifier: MIT */
#include "base/sys.h"

#include <errno.h>

#include "smp/call.h"
#include "irq/chip.h"
#include "smp/csd.h"
#include "smp/queue.h"
#include "base/trace.h"

int shi_call_queue(struct shi_self *self, uint32_t local, uint64_t type, uint32_t dst)
{
    struct shi_csd *csd = shi_own_csd(self, local);
    if (dst >= self->m->ncpus)
        return -ENXIO;
    if (__builtin_expect(shi_ended(self), 0))
        return -EOWNERDEAD;
    if (__builtin_expect(self->left, 0))
        return -ESHUTDOWN;
    SHI_TRACE(self, call_begin, dst, shi_own_index(self, local) + 1, csd->func, (uint32_t)type);
    int err = shi_csd_trylock(self, csd, type, dst);
    if (err)
        return err;
    err = shi_queue_push(self, dst, shi_own_index(self, local), csd);
    if (err < 0)
        shi_csd_cancel(csd);
    return err < 0 ? err : err == SHI_PUSH_RING;
}

int shi_call_single(struct shi_self *self, uint32_t local, uint64_t type, uint32_t dst)
{
    int ipi = shi_call_queue(self, local, type, dst);
    if (ipi > 0)
        shi_chip_send_call_single(self, dst);
    return ipi < 0 ? ipi : 0;
}

void shi_call_ipi_mask(struct shi_self *self, const uint32_t *cpus, uint32_t n)
{
    if (n == 1)
        shi_chip_send_call_single(self, cpus[0]);
    else if (n)
        shi_chip_send_call_mask(self, cpus, n);
}

int64_t shi_nowait_get(struct shi_self *self)
{
    struct shi_sender *s = &self->sender;
    if (s->nowait >= SHI_NOWAIT_POOL) {
        uint32_t oldest = shi_csd_oldest(self);
        if (!shi_csd_locked(shi_own_csd(self, oldest))) {
            s->flight_head = (s->flight_head + 1) & (self->m->csds_per_slot - 1);
            s->flight_count--;
            shi_csd_put(self, oldest);
        } else {
            shi_csd_collect(self);
            if (s->nowait >= SHI_NOWAIT_POOL)
                return -EAGAIN;
        }
        if (s->flight_count > 8) /* the lines its target unlocked come in meanwhile */
            shi_prefetch_write(shi_own_csd(
                self, s->flight[(s->flight_head + 8) & (self->m->csds_per_slot - 1)]));
    }
    int64_t local = shi_csd_get(self);
    if (local >= 0) {
        s->notes[local].nowait = 1;
        s->nowait++;
    }
    return local;
}
