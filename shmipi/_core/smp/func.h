/* SPDX-License-Identifier: MIT */
/*
 * Functions by number.  A sender publishes the pickle of a function once, in its own
 * arena, under (index, serial); a target that has not met the number reads it there.
 * So no message about a function can be overtaken by a call of it.
 */
#ifndef SHI_FUNC_H
#define SHI_FUNC_H

#include "base/machine.h"

/* All of these: inside shi_enter/shi_leave. */
/* Publish `length` bytes: the function's index, or -EMFILE (as many as there can be),
 * -ENOBUFS, -E2BIG, -ENOSPC. */
int64_t shi_func_publish(struct shi_self *self, const void *pickle, uint32_t length);
/* A csd names the function from now on / no longer. */
void shi_func_hold(struct shi_self *self, uint32_t index);
void shi_func_drop(struct shi_self *self, uint32_t index);
/* The function object is gone: free the number when no csd names it. */
void shi_func_retire(struct shi_self *self, uint32_t index);
int shi_func_inherit(struct shi_self *self);

/* Target side: where the pickle of src's function is; -ENOENT, -EBADMSG.  It is the sender's
 * memory: copy it, and let the copy have the checksum `sum` before it is believed. */
int shi_func_find(const struct shi_machine *m, uint32_t src, uint32_t index, uint32_t serial,
                  const void **pickle, uint32_t *length, uint64_t *sum);

#endif
