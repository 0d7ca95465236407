/* SPDX-License-Identifier: MIT */
/* What stands around each Python handler: who looks on is told, forks end, room in the stack. */
#ifndef SHI_PY_HANDLER_H
#define SHI_PY_HANDLER_H

#include "base/trace.h"
#include "py/base.h"

/* After a function of the user's: `result`, or an exception.  Ends a fork's child. */
void shi_leave_if_forked(Machine *machine, PyObject *result);
void shi_flush_standard_files(void);
/* For who looks from outside: a Python handler begins, or `outer` goes on. */
struct handler_said {
    uint32_t kind;
    uint64_t since;
    char name[SHI_HANDLER_NAME];
};
void shi_say_handler(struct shi_self *self, PyObject *function, enum shi_handler kind);
void shi_handler_outer(const struct shi_self *self, struct handler_said *outer);
void shi_say_outer(struct shi_self *self, const struct handler_said *outer);
/* A Python handler begins and ends: soft-masked, with frames of its own, and what it
 * interrupts may be about to raise, which stays its own. */
struct handler_scope {
    PyObject *pending;
    uint8_t irqs_off;
    int limit;
    struct shi_trace_said said; /* of a call that it comes in the middle of */
};
void shi_handler_begin(Machine *machine, struct handler_scope *scope);
void shi_handler_end(Machine *machine, struct handler_scope *scope);
/* The same of a softirq's action: interrupts stay on. */
void shi_softirq_begin(Machine *machine, struct handler_scope *scope);
void shi_softirq_end(Machine *machine, struct handler_scope *scope);

#endif
