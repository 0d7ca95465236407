/* SPDX-License-Identifier: MIT */
/* Real atomics (seq_cst) on elements of integer arrays in shared memory. */
#include "py_shi.h"

/* Which type an element has. */
struct element {
    void *at;
    Py_ssize_t size;
    bool is_signed;
};

static int find_index(const Py_buffer *view, PyObject *index, char **at)
{
    Py_ssize_t n = PyTuple_Check(index) ? PyTuple_GET_SIZE(index) : 1, i;
    if (n != view->ndim) {
        PyErr_Format(PyExc_IndexError, "the array has %d dimensions, the index %zd", view->ndim, n);
        return -1;
    }
    *at = view->buf;
    for (i = 0; i < n; i++) {
        PyObject *part = PyTuple_Check(index) ? PyTuple_GET_ITEM(index, i) : index;
        Py_ssize_t k = PyNumber_AsSsize_t(part, PyExc_IndexError);
        if (k == -1 && PyErr_Occurred())
            return -1;
        if (k < 0)
            k += view->shape[i];
        if (k < 0 || k >= view->shape[i]) {
            PyErr_Format(PyExc_IndexError, "index %R is out of range for an axis of %zd", part,
                         view->shape[i]);
            return -1;
        }
        *at += k * view->strides[i];
    }
    return 0;
}

static int find(PyObject *array, PyObject *index, struct element *e, Py_buffer *view)
{
    char *at;
    if (PyObject_GetBuffer(array, view, PyBUF_STRIDES | PyBUF_FORMAT | PyBUF_WRITABLE) < 0)
        return -1;
    const char *format = view->format ? view->format : "B";
    if (*format == '@' || *format == '=' || *format == '<')
        format++;
    bool is_signed = strchr("bhilqn", *format) != NULL;
    if (!*format || format[1] || !strchr("bBhHiIlLqQnN", *format)) {
        PyErr_Format(PyExc_TypeError, "atomics work on integer arrays, not on format '%s'",
                     view->format ? view->format : "B");
        goto fail;
    }
    if (view->ndim == 0) {
        PyErr_SetString(PyExc_IndexError, "give a 0-dimensional array as array.reshape(1), 0");
        goto fail;
    }
    if (find_index(view, index, &at) < 0)
        goto fail;
    if ((uintptr_t)at % (size_t)view->itemsize) {
        PyErr_SetString(PyExc_ValueError, "the element is not aligned to its size");
        goto fail;
    }
    *e = (struct element){at, view->itemsize, is_signed};
    return 0;
fail:
    PyBuffer_Release(view);
    return -1;
}

/* The value in the element's own width; OverflowError when it does not fit. */
static int as_bits(PyObject *object, const struct element *e, uint64_t *bits)
{
    PyObject *index = PyNumber_Index(object);
    if (!index)
        return -1;
    int width = (int)e->size * 8, overflow;
    long long value = PyLong_AsLongLongAndOverflow(index, &overflow);
    bool fits;
    if (overflow > 0 && !e->is_signed && width == 64) {
        *bits = PyLong_AsUnsignedLongLong(index);
        fits = !PyErr_Occurred();
        PyErr_Clear();
    } else {
        *bits = (uint64_t)value;
        if (overflow)
            fits = false;
        else if (e->is_signed)
            fits = width == 64 ||
                   (value >= -(1ll << (width - 1)) && value < (1ll << (width - 1)));
        else
            fits = value >= 0 && (width == 64 || (uint64_t)value < (1ull << width));
    }
    Py_DECREF(index);
    if (!fits)
        PyErr_Format(PyExc_OverflowError, "%R does not fit %s%d", object,
                     e->is_signed ? "int" : "uint", width);
    return fits ? 0 : -1;
}

static PyObject *as_object(uint64_t bits, const struct element *e)
{
    switch (e->size) {
    case 1:
        return e->is_signed ? PyLong_FromLong((int8_t)bits) : PyLong_FromLong((uint8_t)bits);
    case 2:
        return e->is_signed ? PyLong_FromLong((int16_t)bits) : PyLong_FromLong((uint16_t)bits);
    case 4:
        return e->is_signed ? PyLong_FromLong((int32_t)bits)
                            : PyLong_FromUnsignedLong((uint32_t)bits);
    default:
        return e->is_signed ? PyLong_FromLongLong((int64_t)bits)
                            : PyLong_FromUnsignedLongLong(bits);
    }
}

enum operation { LOAD, STORE, ADD, OR, AND, EXCHANGE, COMPARE };

#define OPERATE(type)                                                                            \
    do {                                                                                         \
        _Atomic type *p = e->at;                                                                 \
        type v = (type)value, want = (type)expected;                                             \
        switch (op) {                                                                            \
        case LOAD:                                                                               \
            return shi_load_full(p);                                                             \
        case STORE:                                                                              \
            shi_store_full(p, v);                                                                \
            return 0;                                                                            \
        case ADD:                                                                                \
            return shi_fetch_add_full(p, v);                                                     \
        case OR:                                                                                 \
            return shi_fetch_or_full(p, v);                                                      \
        case AND:                                                                                \
            return shi_fetch_and_full(p, v);                                                     \
        case EXCHANGE:                                                                           \
            return shi_xchg_full(p, v);                                                          \
        case COMPARE:                                                                            \
            shi_cas_full(p, &want, v);                                                           \
            return want;                                                                         \
        }                                                                                        \
        return 0;                                                                                \
    } while (0)

static uint64_t operate(enum operation op, const struct element *e, uint64_t value,
                        uint64_t expected)
{
    switch (e->size) {
    case 1:
        OPERATE(uint8_t);
    case 2:
        OPERATE(uint16_t);
    case 4:
        OPERATE(uint32_t);
    default:
        OPERATE(uint64_t);
    }
}

static PyObject *run(const char *name, enum operation op, PyObject *const *args,
                     Py_ssize_t nargs, Py_ssize_t want)
{
    Py_buffer view;
    struct element e;
    uint64_t value = 0, expected = 0;
    PyObject *result = NULL;
    if (nargs != want)
        return PyErr_Format(PyExc_TypeError, "%s() takes %zd arguments (%zd given)", name, want,
                            nargs);
    if (find(args[0], args[1], &e, &view) < 0)
        return NULL;
    if (want == 3 && as_bits(args[2], &e, &value) < 0)
        goto out;
    if (want == 4 &&
        (as_bits(args[2], &e, &expected) < 0 || as_bits(args[3], &e, &value) < 0))
        goto out;
    uint64_t old = operate(op, &e, value, expected);
    result = op == STORE ? Py_NewRef(Py_None) : as_object(old, &e);
out:
    PyBuffer_Release(&view);
    return result;
}

#define ATOMIC(name, op, nargs)                                                                  \
    static PyObject *element_##name(PyObject *module, PyObject *const *args, Py_ssize_t n)        \
    {                                                                                            \
        (void)module;                                                                            \
        return run(#name, op, args, n, nargs);                                                   \
    }
ATOMIC(load, LOAD, 2)
ATOMIC(store, STORE, 3)
ATOMIC(fetch_add, ADD, 3)
ATOMIC(fetch_or, OR, 3)
ATOMIC(fetch_and, AND, 3)
ATOMIC(exchange, EXCHANGE, 3)
ATOMIC(compare_exchange, COMPARE, 4)

#define ENTRY(name, text)                                                                        \
    {"atomic_" #name, (PyCFunction)(void (*)(void))element_##name, METH_FASTCALL, text}
PyMethodDef shi_atomic_functions[] = {
    ENTRY(load, "load(array, index)\n--\n\nThe element."),
    ENTRY(store, "store(array, index, value)\n--\n\nSet the element."),
    ENTRY(fetch_add, "fetch_add(array, index, value)\n--\n\nAdd, wrapping; the old value."),
    ENTRY(fetch_or, "fetch_or(array, index, value)\n--\n\nOr; the old value."),
    ENTRY(fetch_and, "fetch_and(array, index, value)\n--\n\nAnd; the old value."),
    ENTRY(exchange, "exchange(array, index, value)\n--\n\nSet; the old value."),
    ENTRY(compare_exchange,
          "compare_exchange(array, index, expected, new)\n--\n\nSet to `new` if it equals "
          "`expected`; the value found: it succeeded if that equals `expected`."),
    {NULL, NULL, 0, NULL},
};
