/* SPDX-License-Identifier: MIT */
/* Real atomics on elements of integer arrays in shared memory, and memory barriers. */
#include "py/tables.h"

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
        PyErr_Format(PyExc_IndexError, "the array has %d dimensions, the index %zd", view->ndim,
                     n);
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
    *e = (struct element){ at, view->itemsize, is_signed };
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

enum operation { LOAD, STORE, ADD, SUB, OR, AND, XOR, EXCHANGE, COMPARE, ACQUIRE, RELEASE };

#define OPERATE(type)                                                                          \
    do {                                                                                       \
        _Atomic type *p = e->at;                                                               \
        type v = (type)value, want = (type)expected;                                           \
        switch (op) {                                                                          \
        case LOAD:                                                                             \
            return shi_load_full(p);                                                           \
        case STORE:                                                                            \
            shi_store_full(p, v);                                                              \
            return 0;                                                                          \
        case ADD:                                                                              \
            return shi_fetch_add_full(p, v);                                                   \
        case SUB:                                                                              \
            return shi_fetch_sub_full(p, v);                                                   \
        case OR:                                                                               \
            return shi_fetch_or_full(p, v);                                                    \
        case AND:                                                                              \
            return shi_fetch_and_full(p, v);                                                   \
        case XOR:                                                                              \
            return shi_fetch_xor_full(p, v);                                                   \
        case EXCHANGE:                                                                         \
            return shi_xchg_full(p, v);                                                        \
        case COMPARE:                                                                          \
            shi_cas_full(p, &want, v);                                                         \
            return want;                                                                       \
        case ACQUIRE:                                                                          \
            return shi_load_acquire(p);                                                        \
        case RELEASE:                                                                          \
            shi_store_release(p, v);                                                           \
            return 0;                                                                          \
        }                                                                                      \
        return 0;                                                                              \
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
    if (want == 4 && (as_bits(args[2], &e, &expected) < 0 || as_bits(args[3], &e, &value) < 0))
        goto out;
    uint64_t old = operate(op, &e, value, expected);
    result = op == STORE || op == RELEASE ? Py_NewRef(Py_None) : as_object(old, &e);
out:
    PyBuffer_Release(&view);
    return result;
}

#define ELEMENT(name, op, nargs)                                                               \
    static PyObject *element_##name(PyObject *module, PyObject *const *args, Py_ssize_t n)     \
    {                                                                                          \
        (void)module;                                                                          \
        return run(#name, op, args, n, nargs);                                                 \
    }
ELEMENT(load, LOAD, 2)
ELEMENT(store, STORE, 3)
ELEMENT(fetch_add, ADD, 3)
ELEMENT(fetch_sub, SUB, 3)
ELEMENT(fetch_or, OR, 3)
ELEMENT(fetch_and, AND, 3)
ELEMENT(fetch_xor, XOR, 3)
ELEMENT(exchange, EXCHANGE, 3)
ELEMENT(compare_exchange, COMPARE, 4)
ELEMENT(smp_load_acquire, ACQUIRE, 2)
ELEMENT(smp_store_release, RELEASE, 3)

#define BARRIER(name, fence)                                                                   \
    static PyObject *barrier_##name(PyObject *module, PyObject *unused)                        \
    {                                                                                          \
        (void)module;                                                                          \
        (void)unused;                                                                          \
        fence();                                                                               \
        Py_RETURN_NONE;                                                                        \
    }
BARRIER(smp_mb, shi_fence_full)
BARRIER(smp_rmb, shi_fence_acquire)
BARRIER(smp_wmb, shi_fence_release)

#define ENTRY(name, arguments, text)                                                           \
    { #name, (PyCFunction)(void (*)(void))element_##name, METH_FASTCALL,                       \
      #name "($module, " arguments ", /)\n--\n\n" text }
/* Of shmipi.atomic, whose names the help and the pickles of these are to bear. */
static PyMethodDef atomics[] = {
    ENTRY(load, "array, index", "Return the element."),
    ENTRY(store, "array, index, value", "Set the element."),
    ENTRY(fetch_add, "array, index, value", "Add, wrapping; return the old value."),
    ENTRY(fetch_sub, "array, index, value", "Subtract, wrapping; return the old value."),
    ENTRY(fetch_or, "array, index, value", "Or; return the old value."),
    ENTRY(fetch_and, "array, index, value", "And; return the old value."),
    ENTRY(fetch_xor, "array, index, value", "Exclusive or; return the old value."),
    ENTRY(exchange, "array, index, value", "Set; return the old value."),
    ENTRY(compare_exchange, "array, index, expected, new",
          "Set to `new` if it equals `expected`; return the value found.\n\n"
          "It succeeded if that equals `expected`."),
};

#define BARRIER_ENTRY(name, text)                                                              \
    { #name, barrier_##name, METH_NOARGS, #name "($module, /)\n--\n\n" text }
PyMethodDef shi_barrier_functions[] = {
    BARRIER_ENTRY(smp_mb,
                  "Full barrier: every load and store before it stands before every one "
                  "after it."),
    BARRIER_ENTRY(smp_rmb, "Read barrier: loads before it stand before loads after it.\n\n"
                           "It pairs with smp_wmb() on the CPU that stored."),
    BARRIER_ENTRY(smp_wmb, "Write barrier: stores before it stand before stores after it.\n\n"
                           "It pairs with smp_rmb() on the CPU that loads."),
    ENTRY(smp_load_acquire, "array, index",
          "Return an element of an integer array in shared memory.\n\n"
          "What stands after it sees all that was stored before the smp_store_release() that\n"
          "stored the value. Index and errors are those of shmipi.atomic."),
    ENTRY(
        smp_store_release, "array, index, value",
        "Set an element of an integer array in shared memory.\n\n"
        "Who sees the value by smp_load_acquire() sees all that was stored before. Index and\n"
        "errors are those of shmipi.atomic."),
    { NULL, NULL, 0, NULL },
};

int shi_atomic_add(PyObject *module)
{
    PyObject *home = PyUnicode_FromString("shmipi.atomic");
    size_t i;
    int err = home ? 0 : -1;
    for (i = 0; !err && i < sizeof atomics / sizeof *atomics; i++) {
        char name[32];
        PyObject *function = PyCFunction_NewEx(&atomics[i], module, home);
        snprintf(name, sizeof name, "atomic_%s", atomics[i].ml_name);
        err = function ? PyModule_AddObjectRef(module, name, function) : -1;
        Py_XDECREF(function);
    }
    Py_XDECREF(home);
    return err;
}
