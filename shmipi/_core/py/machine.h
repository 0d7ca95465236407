/* SPDX-License-Identifier: MIT */
/* The Machine type: a process's mapping of a segment. */
#ifndef SHI_PY_MACHINE_H
#define SHI_PY_MACHINE_H

#include "py/base.h"

PyObject *shi_machine_new(PyTypeObject *type, PyObject *args, PyObject *kwargs);
void shi_machine_dealloc(PyObject *object);
int shi_machine_getbuffer(PyObject *object, Py_buffer *view, int flags);
extern PyGetSetDef shi_machine_getset[];

#endif
