/* SPDX-License-Identifier: MIT */
/* What a published function was made of. */
#ifndef SHI_PY_GUARD_H
#define SHI_PY_GUARD_H

#include "py/base.h"

struct shi_guards;
/* From the lists of byvalue.publish(); NULL with an exception set.  Runs Python code. */
struct shi_guards *shi_guards_new(PyObject *functions, PyObject *types, PyObject *tables,
                                  PyObject *published);
/* Is everything as it was? */
bool shi_guards_hold(struct shi_guards *guards, PyObject *published);
void shi_guards_free(struct shi_guards *guards);

#endif
