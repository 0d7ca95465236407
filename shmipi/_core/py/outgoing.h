/* SPDX-License-Identifier: MIT */
/* What a call is made of, into a csd. */
#ifndef SHI_PY_OUTGOING_H
#define SHI_PY_OUTGOING_H

#include "py/base.h"

#define SHI_REPLY_ROOM 4096u /* block for the result of a call */

/* What a call is made of before it has a csd. */
struct outgoing {
    uint32_t func, serial;
    int64_t number; /* of the function, or -1 */
    uint8_t kind, length, apply;
    union shi_value value;
    PyObject *pickle; /* owned; NULL when the argument is inline */
    uint32_t room;
    Machine *holder; /* holds function `number` until cleared */
};
/* func(info). */
int shi_outgoing_info(Machine *machine, struct outgoing *out, PyObject *function,
                      PyObject *info);
/* func(*args, **kwargs), result wanted. */
int shi_outgoing_call(Machine *machine, struct outgoing *out, PyObject *function,
                      PyObject *args, PyObject *kwargs);
/* The same where nothing needs pickling or clearing: 1, else 0 (or -1, exception set). */
int shi_outgoing_inline(Machine *machine, struct outgoing *out, PyObject *function,
                        PyObject *info);
void shi_outgoing_clear(struct outgoing *out);
/* Fill csd `local`; inside shi_enter/shi_leave.  0 or -errno. */
int shi_outgoing_fill(Machine *machine, const struct outgoing *out, uint32_t local);
/* Let `local` carry the same payload as `owner`. */
void shi_outgoing_share(Machine *machine, const struct outgoing *out, uint32_t local,
                        uint32_t owner);
/* A csd that holds `out`.  `nowait`: from the pool.  Local index, or -1. */
int64_t shi_get_filled(Machine *machine, const struct outgoing *out, bool nowait);

#endif
