/* SPDX-License-Identifier: MIT */
#include "base/sys.h"

#include "base/trace.h"

const char *const shi_trace_names[SHI_T_COUNT] = { "none",
#define X(name) #name,
                                                   SHI_TRACE_EVENTS(X)
#undef X
};

void shi_trace_write(struct shi_self *self, enum shi_trace_event event, uint32_t cpu,
                     uint32_t csd, uint32_t func, uint32_t arg)
{
    if (self->left)
        return; /* the ring is another's by now */
    /* A read-modify-write: the kick handler may trace in the middle of this, and the
     * host's threads share one ring. */
    uint64_t at = shi_fetch_add_relaxed(&self->slot->trace_head, 1);
    struct shi_trace_record *r = shi_trace_ring(self->m, self->id) +
                                 at % self->m->trace_records;
    r->seq = 0;
    shi_signal_fence();
    r->stamp = shi_stamp();
    r->event = (uint16_t)event;
    r->cpu = (uint16_t)cpu;
    r->csd = csd;
    r->func = func;
    r->arg = arg;
    shi_signal_fence();
    r->seq = at + 1;
}
