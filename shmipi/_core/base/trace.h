/* SPDX-License-Identifier: MIT */
/*
 * Tracepoints with the kernel's names, in a ring per slot that the owner alone writes.
 * Oldest records are overwritten; a reader checks `seq` before and after it copies.
 */
#ifndef SHI_TRACE_H
#define SHI_TRACE_H

#include "base/machine.h"

extern const char *const shi_trace_names[SHI_T_COUNT];
void shi_trace_write(struct shi_self *self, enum shi_trace_event event, uint32_t cpu,
                     uint32_t csd, uint32_t func, uint32_t arg);

static inline struct shi_trace_record *shi_trace_ring(const struct shi_machine *m, uint32_t id)
{
    return (struct shi_trace_record *)(m->base + m->trace_offset) +
           (uint64_t)id * m->trace_records;
}

#define SHI_TRACE(self, event, cpu, csd, func, arg)                                            \
    do {                                                                                       \
        if (__builtin_expect((self)->trace, 0))                                                \
            shi_trace_write((self), SHI_T_##event, (cpu), (csd), (func), (arg));               \
    } while (0)

#endif
