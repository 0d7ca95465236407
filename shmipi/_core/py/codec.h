/* SPDX-License-Identifier: MIT */
/* Values: what fits a csd lies in it, what does not is pickled. */
#ifndef SHI_PY_CODEC_H
#define SHI_PY_CODEC_H

#include "py/base.h"

/* Inline when it fits the csd's own cache line: 1, else 0.  Here, because each call asks it
 * twice, and a call across files would be a part of what it costs. */
static inline int shi_encode_inline(PyObject *object, uint8_t *kind, uint8_t *length,
                                    union shi_value *v)
{
    if (object == Py_None) {
        *kind = SHI_K_NONE;
        return 1;
    }
    if (PyBool_Check(object)) {
        *kind = SHI_K_BOOL;
        v->i = object == Py_True;
        return 1;
    }
    if (PyLong_CheckExact(object)) {
        int overflow;
        long long value = PyLong_AsLongLongAndOverflow(object, &overflow);
        if (overflow)
            return 0;
        *kind = SHI_K_INT;
        v->i = value;
        return 1;
    }
    if (PyFloat_CheckExact(object)) {
        *kind = SHI_K_FLOAT;
        v->f = PyFloat_AS_DOUBLE(object);
        return 1;
    }
    if (PyBytes_CheckExact(object) && PyBytes_GET_SIZE(object) <= (Py_ssize_t)SHI_INLINE) {
        *kind = SHI_K_BYTES;
        *length = (uint8_t)PyBytes_GET_SIZE(object);
        memcpy(v->bytes, PyBytes_AS_STRING(object), *length);
        return 1;
    }
    return 0;
}

/* An object's pickle, ArenaFullError when it is larger than a payload may be. */
PyObject *shi_pickled(Machine *machine, PyObject *object);
/* The payload behind `ref` in src's arena, copied first and checked after: nothing that
 * does not bear the machine's checksum is unpickled. */
PyObject *shi_payload_bytes(Machine *machine, uint32_t src, const struct shi_ref *ref);
PyObject *shi_decode(Machine *machine, uint32_t src, uint8_t kind, uint8_t length,
                     const union shi_value *v);

#endif
