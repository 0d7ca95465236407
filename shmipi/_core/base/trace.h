/* SPDX-License-Identifier: MIT */
/*
 * Tracepoints, in a ring per slot that the owner alone writes.
 *
 * The rings are an array of the machine, made when somebody first traces; which events are
 * recorded is a word of the header that nobody writes to otherwise.  A reader checks `seq`
 * before and after it copies a record, so one that its writer died in the middle of is left out.
 * A ring overwrites its oldest records, or, lossless, records no more until a reader has taken
 * some: what is not there is counted in both cases.  A CPU never waits for a reader.
 */
#ifndef SHI_TRACE_H
#define SHI_TRACE_H

#include "base/machine.h"

extern const char *const shi_trace_names[SHI_T_COUNT];

/*
 * Who calls the core says for its next records which line that is, and which function is
 * called: by the numbers of their names, 0: the core itself, none.  A CPU is one thread; of a
 * host each has its own (to find which takes as long as all the rest of a record).
 */
extern _Thread_local struct shi_trace_said shi_trace_thread;

static inline struct shi_trace_said *shi_trace_said(struct shi_self *self)
{
    return self->host ? &shi_trace_thread : &self->said;
}

/* `stamp`: 0 for now. */
void shi_trace_write(struct shi_self *self, enum shi_trace_event event, uint32_t cpu,
                     uint32_t csd, uint32_t func, uint32_t arg, uint64_t stamp);
/* ipi_send_cpumask, and which CPUs (ascending). */
void shi_trace_mask(struct shi_self *self, const uint32_t *cpus, uint32_t n, uint32_t writes,
                    uint32_t line);

/* Bytes of the rings, `records` each; 0: so many there cannot be. */
uint64_t shi_trace_bytes(const struct shi_machine *m, uint32_t records);
/* The rings, or NULL: none, or their description is damaged. */
struct shi_trace_area *shi_trace_area(const struct shi_machine *m);
struct shi_trace_head *shi_trace_head(const struct shi_trace_area *area, uint32_t id);
struct shi_trace_record *shi_trace_ring(const struct shi_machine *m,
                                        const struct shi_trace_area *area, uint32_t id);

/* A new name: its number, or 0 when there is no room or no area. */
uint32_t shi_trace_name(struct shi_self *self, const char *text, size_t length);

/* What was read of a ring. */
struct shi_trace_read {
    uint64_t next; /* where to go on */
    uint64_t lost; /* overwritten, or begun by who died in the middle */
    uint64_t torn; /* of those: the latter */
};
/*
 * Copy whole records of slot `id` from position `from` on, `room` at most: how many.  Stops at
 * one that is being written, but for `final`: nobody writes any more.
 */
uint32_t shi_trace_take(const struct shi_machine *m, struct shi_trace_area *area, uint32_t id,
                        uint64_t from, struct shi_trace_record *to, uint32_t room, bool final,
                        struct shi_trace_read *read);

#define SHI_TRACE_BIT(event) (1ull << SHI_T_##event)
#define SHI_TRACING_ANY(self, bits)                                                            \
    __builtin_expect((shi_load_relaxed((self)->tracing) & (bits)) != 0, 0)
#define SHI_TRACING(self, event) SHI_TRACING_ANY(self, SHI_TRACE_BIT(event))

#define SHI_TRACE(self, event, cpu, csd, func, arg)                                            \
    do {                                                                                       \
        if (SHI_TRACING(self, event))                                                          \
            shi_trace_write((self), SHI_T_##event, (cpu), (csd), (func), (arg), 0);            \
    } while (0)

/* Of a csd's `func`, at its sender: a Python function's number means nothing to a reader. */
static inline uint32_t shi_trace_func(struct shi_self *self, uint32_t func)
{
    uint32_t called = func & SHI_FUNC_NATIVE ? 0 : shi_trace_said(self)->called;
    return called ? SHI_TRACE_NAMED | called : func;
}

#endif
