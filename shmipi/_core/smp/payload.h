/* SPDX-License-Identifier: MIT */
/*
 * What lies in a sender's arena, for its owner and for who it was sent to.
 */
#ifndef SHI_PAYLOAD_H
#define SHI_PAYLOAD_H

#include "base/machine.h"

/* Set the own arena up, at its first use: its tables are private memory.  0 or -errno. */
int shi_sender_arena(struct shi_self *self);

/* The payload behind `ref` in the arena of slot `src`; NULL when it does not lie there. */
void *shi_payload(const struct shi_machine *m, uint32_t src, const struct shi_ref *ref);

/* Target side: where the pickle of src's function is; -ENOENT, -EBADMSG.  It is the sender's
 * memory: copy it, and let the copy have the checksum `sum` before it is believed. */
int shi_func_find(const struct shi_machine *m, uint32_t src, uint32_t index, uint32_t serial,
                  const void **pickle, uint32_t *length, uint64_t *sum);

#endif
