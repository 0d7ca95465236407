/* SPDX-License-Identifier: MIT */
/* Values: what fits a csd lies in it, what does not is pickled. */
#include "py/codec.h"

PyObject *shi_pickled(Machine *machine, PyObject *object)
{
    PyObject *bytes = shi_unmixed(machine, shi_py.dumps, object);
    if (bytes &&
        (!PyBytes_Check(bytes) || (uint64_t)PyBytes_GET_SIZE(bytes) > machine->m.payload_max)) {
        shi_raise(shi_py.ArenaError, E2BIG, -1,
                  "%zd bytes pickled: an argument or result may have %llu at most (half "
                  "the sender's arena); put large data in cluster.shared()",
                  PyBytes_GET_SIZE(bytes), (unsigned long long)machine->m.payload_max);
        Py_CLEAR(bytes);
    }
    return bytes;
}

/* The payload behind `ref` in src's arena, copied first and checked after: nothing that
 * does not bear the machine's checksum is unpickled. */
PyObject *shi_payload_bytes(Machine *machine, uint32_t src, const struct shi_ref *ref)
{
    struct shi_ref mine = *ref;
    const void *at = shi_payload(&machine->m, src, &mine);
    if (!at)
        return shi_raise(shi_py.LayoutError, 0, -1, "a payload lies outside its arena");
    PyObject *copy = PyBytes_FromStringAndSize(at, mine.length);
    if (copy && shi_checksum(&machine->m, PyBytes_AS_STRING(copy), mine.length) != mine.sum) {
        Py_DECREF(copy);
        return shi_raise(shi_py.LayoutError, 0, -1, "a payload is damaged (checksum)");
    }
    return copy;
}

PyObject *shi_decode(Machine *machine, uint32_t src, uint8_t kind, uint8_t length,
                     const union shi_value *v)
{
    switch (kind) {
    case SHI_K_NONE:
        Py_RETURN_NONE;
    case SHI_K_BOOL:
        return PyBool_FromLong(v->i != 0);
    case SHI_K_INT:
        return PyLong_FromLongLong(v->i);
    case SHI_K_FLOAT:
        return PyFloat_FromDouble(v->f);
    case SHI_K_BYTES:
        if (length <= SHI_INLINE)
            return PyBytes_FromStringAndSize((const char *)v->bytes, length);
        break;
    case SHI_K_PICKLE: {
        PyObject *bytes = shi_payload_bytes(machine, src, &v->ref);
        if (!bytes)
            return NULL;
        PyObject *object = shi_unmixed(machine, shi_py.loads, bytes);
        Py_DECREF(bytes);
        return object;
    }
    default:
        break;
    }
    return shi_raise(shi_py.LayoutError, 0, -1, "a call_single_data is damaged (kind %d)",
                     kind);
}
