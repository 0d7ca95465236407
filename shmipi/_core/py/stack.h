/* SPDX-License-Identifier: MIT */
/* The Python stack of a CPU, from its own NMI handler or from outside its process. */
#ifndef SHI_PY_STACK_H
#define SHI_PY_STACK_H

#include "py/base.h"

#include "base/text.h"

/*
 * The innermost frame first, a line each, as faulthandler writes them.  Async-signal-safe, and
 * what is read is read by the kernel (process_vm_readv): memory that is none, because a frame
 * is just being made or everything is damaged, ends the walk and nothing else.  `pid`: of a CPU
 * of this machine, this process included.  False: it may not be read.
 */
bool shi_stack_write(const struct shi_slot *slot, pid_t pid, struct shi_text *out);
/* Where a CPU's Python begins, when it becomes one: written into its slot. */
void shi_stack_note(struct shi_slot *slot);
/* A frame of this thread, the innermost first; `code`: borrowed, NULL: there is none more. */
struct shi_frame {
    const void *frame;
    PyObject *code;
    const void *instruction;
};
void shi_frame_begin(struct shi_frame *at);
void shi_frame_next(struct shi_frame *at);
/* Where its instructions begin. */
const void *shi_code_begin(const PyCodeObject *code);
/* The hook of the core: this CPU's. */
void shi_stack_hook(struct shi_self *self, struct shi_text *out);

#endif
