/* SPDX-License-Identifier: MIT */
/* What a call is made of, and its way into a csd. */
#ifndef SHI_PY_OUTGOING_H
#define SHI_PY_OUTGOING_H

#include "py/base.h"

#define SHI_REPLY_ROOM 4096u /* block for the result of a call */

/*
 * What a call is made of before it has a csd.  The function's number comes last, after all
 * pickling: no Python code runs between it and the csd that holds it, so nobody has to hold it
 * meanwhile.
 */
struct outgoing {
    struct shi_call call;
    PyObject *pickle; /* owned: what call.payload is in, or NULL */
};
/* func(info). */
int shi_outgoing_info(Machine *machine, struct outgoing *out, PyObject *function,
                      PyObject *info);
/* func(*args, **kwargs), result wanted. */
int shi_outgoing_call(Machine *machine, struct outgoing *out, PyObject *function,
                      PyObject *args, PyObject *kwargs);
/* The first where nothing needs pickling or clearing: 1, else 0 (or -1, exception set). */
int shi_outgoing_inline(Machine *machine, struct outgoing *out, PyObject *function,
                        PyObject *info);
/* It is sent, or given up: what it holds goes, and nothing more is said to be of it. */
void shi_outgoing_clear(Machine *machine, struct outgoing *out);
/* shi_call_post, waiting for room as long as it takes.  Local index, or -1. */
int64_t shi_outgoing_post(Machine *machine, const struct outgoing *out, uint64_t type,
                          uint32_t dst);
/* shi_call_prepare, likewise. */
int64_t shi_outgoing_prepare(Machine *machine, const struct outgoing *out);
/* Raise what posting to `cpu` failed with. */
void shi_raise_post(Machine *machine, const struct outgoing *out, int err, int cpu);

#endif
