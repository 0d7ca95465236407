/* SPDX-License-Identifier: MIT */
/* NativeHandler: a C function in the place of a Python one. */
#ifndef SHI_PY_NATIVE_H
#define SHI_PY_NATIVE_H

#include "py/base.h"

extern PyTypeObject *shi_native_type;

typedef struct {
    PyObject_HEAD
    uint32_t index;
    PyObject *name;
} NativeHandler;

/* The number that the machine has for a native handler, or -1 with an exception. */
int64_t shi_native_number(const Machine *machine, PyObject *handler);
/* The same of what may be None, which leaves *number: 0, or -1 with an exception. */
int shi_native_or_none(const Machine *machine, PyObject *handler, int64_t *number);
int shi_native_types(PyObject *module);

#endif
