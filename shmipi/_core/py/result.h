/* SPDX-License-Identifier: MIT */
/* Results, on the sender. */
#ifndef SHI_PY_RESULT_H
#define SHI_PY_RESULT_H

#include "py/base.h"

/* The result of an unlocked csd (not given back): new reference, or NULL. */
PyObject *shi_result(Machine *machine, uint32_t local, uint32_t dst, uint8_t apply);
/* A host waits for `dst`, which has no room for what it has to send: read all that it lends
 * this host into private memory, whoever asks for it later. */
void shi_read_early(Machine *machine, uint32_t dst);
/* Nobody will ask for the result of `local`. */
void shi_drop_early(Machine *machine, uint32_t local);

#endif
