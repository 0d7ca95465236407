/* SPDX-License-Identifier: MIT */
/*
 * Native handlers: C functions that touch only shared memory and run in hard-irq
 * context.  The table is filled before the CPUs are forked, so an index means the same
 * function in all of them.
 */
#ifndef SHI_NATIVE_H
#define SHI_NATIVE_H

#include "base/machine.h"

/* The kernel's smp_call_func_t.  `info`: NULL for None, the number for an int, the
 * bytes for bytes, the data for a shared array. */
typedef void shi_native_handler(void *info);

#define SHI_NATIVE_MAX 256u
#define SHI_NATIVE_TAKEDOWN SHI_NATIVE_MAX /* take_cpu_down: the core's own, in no table */

/* Index of the handler, or -ENOSPC.  `name` is copied. */
int shi_native_register(const char *name, shi_native_handler *function);
/* `FILE.so:symbol`: -ENOENT no such file, -ENOEXEC not loadable, -ESRCH no symbol.
 * `why` gets the loader's words. */
int shi_native_load(const char *spec, char *why, size_t room);
/* A name without its function: for a process that only sends. */
int shi_native_name(const char *name);
int shi_native_find(const char *name);
const char *shi_native_name_of(uint32_t index);
shi_native_handler *shi_native_get(uint32_t index);
/* noop, count, stamp, burn: in this order, at the front. */
void shi_native_init(void);

#endif
