/* SPDX-License-Identifier: MIT */
/* A call on its target: what to run, and what came of it. */
#ifndef SHI_PY_INCOMING_H
#define SHI_PY_INCOMING_H

#include "py/base.h"

struct incoming {
    PyObject *function; /* owned */
    PyObject *args;     /* owned: tuple */
    PyObject *kwargs;   /* owned or NULL */
    uint8_t apply;
    bool bare; /* `args` is the one argument itself */
};
/* 0, or -1 after the csd was completed with an error. */
int shi_incoming(Machine *machine, struct incoming *in, struct shi_csd *csd, bool async);
void shi_incoming_clear(struct incoming *in);
PyObject *shi_incoming_apply(const struct incoming *in);
/* Store the outcome of a SYNC csd (`value` NULL: the exception that is set).  True: unlock
 * it; false: it waits for room, and shi_send_unsent will. */
bool shi_outcome(Machine *machine, struct shi_csd *csd, PyObject *value, bool wanted);
/* Send what waits for room, as far as there is some now. */
void shi_send_unsent(Machine *machine);

#endif
