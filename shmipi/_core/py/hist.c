/* SPDX-License-Identifier: MIT */
/* Histograms for Python. */
#include "py/hist.h"

static PyTypeObject *hist_type;

/* Pickled: these, then an index and a count for each bucket that is not empty. */
#define HIST_HEAD 6u

static int hist_restore(struct shi_hist *h, const uint64_t *data, Py_ssize_t words)
{
    Py_ssize_t i;
    uint64_t count = 0;
    if (words < (Py_ssize_t)HIST_HEAD || (words - HIST_HEAD) % 2)
        return -1;
    h->count = data[0];
    h->overflow = data[1];
    h->min = data[2];
    h->max = data[3];
    h->sum_low = data[4];
    h->sum_high = data[5];
    for (i = HIST_HEAD; i < words; i += 2) {
        if (data[i] >= SHI_HIST_LEN)
            return -1;
        h->counts[data[i]] += data[i + 1];
        count += data[i + 1];
    }
    return count == h->count ? 0 : -1;
}

Hist *shi_hist_make(void)
{
    Hist *hist = (Hist *)hist_type->tp_alloc(hist_type, 0);
    if (!hist)
        return NULL;
    hist->h = PyMem_Malloc(sizeof *hist->h);
    if (!hist->h) {
        Py_DECREF(hist);
        PyErr_NoMemory();
        return NULL;
    }
    shi_hist_reset(hist->h);
    return hist;
}

static PyObject *hist_new(PyTypeObject *type, PyObject *args, PyObject *kwargs)
{
    static char *names[] = { "state", NULL };
    Py_buffer state = { 0 };
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "|y*:Hist", names, &state))
        return NULL;
    (void)type; /* not to be derived from */
    Hist *hist = shi_hist_make();
    if (hist && state.obj) {
        Py_ssize_t words = state.len / 8;
        uint64_t *copy = PyMem_Malloc((size_t)(words ? words : 1) * 8);
        int err = !copy || state.len % 8;
        if (!err) {
            memcpy(copy, state.buf, (size_t)words * 8);
            err = hist_restore(hist->h, copy, words);
        }
        PyMem_Free(copy);
        if (err) {
            PyErr_SetString(PyExc_ValueError, "this is not the state of a Hist");
            Py_CLEAR(hist);
        }
    }
    if (state.obj)
        PyBuffer_Release(&state);
    return (PyObject *)hist;
}

static void hist_dealloc(PyObject *object)
{
    PyTypeObject *type = Py_TYPE(object);
    PyMem_Free(((Hist *)object)->h);
    type->tp_free(object);
    Py_DECREF(type);
}

static PyObject *hist_reduce(PyObject *object, PyObject *unused)
{
    const struct shi_hist *h = ((Hist *)object)->h;
    uint32_t index = 0, at, n = 0;
    uint64_t count;
    (void)unused;
    while (shi_hist_next(h, &index, &at, &count))
        n++;
    PyObject *bytes = PyBytes_FromStringAndSize(NULL, (Py_ssize_t)(HIST_HEAD + 2 * n) * 8);
    if (!bytes)
        return NULL;
    char *to = PyBytes_AS_STRING(bytes);
    const uint64_t head[HIST_HEAD] = { h->count, h->overflow, h->min,
                                       h->max,   h->sum_low,  h->sum_high };
    memcpy(to, head, sizeof head);
    to += sizeof head;
    for (index = 0; shi_hist_next(h, &index, &at, &count); to += 16) {
        const uint64_t pair[2] = { at, count };
        memcpy(to, pair, sizeof pair);
    }
    return Py_BuildValue("O(N)", Py_TYPE(object), bytes);
}

static PyObject *hist_record(PyObject *object, PyObject *const *args, Py_ssize_t nargs)
{
    if (nargs < 1 || nargs > 2) {
        PyErr_SetString(PyExc_TypeError, "record(ns, count=1)");
        return NULL;
    }
    uint64_t n = 1, ns = PyLong_AsUnsignedLongLong(args[0]);
    if (nargs == 2)
        n = PyErr_Occurred() ? 0 : PyLong_AsUnsignedLongLong(args[1]);
    if (PyErr_Occurred())
        return NULL;
    shi_hist_record_n(((Hist *)object)->h, ns, n);
    Py_RETURN_NONE;
}

static PyObject *hist_merge(PyObject *object, PyObject *other)
{
    if (Py_TYPE(other) != hist_type)
        return PyErr_Format(PyExc_TypeError, "a Hist merges a Hist, not %R", Py_TYPE(other));
    shi_hist_merge(((Hist *)object)->h, ((Hist *)other)->h);
    Py_RETURN_NONE;
}

static uint64_t at_most(uint64_t value, uint64_t limit)
{
    return value < limit ? value : limit;
}

static PyObject *hist_quantile(PyObject *object, PyObject *arg)
{
    double q = PyFloat_AsDouble(arg);
    if (PyErr_Occurred())
        return NULL;
    const struct shi_hist *h = ((Hist *)object)->h;
    return PyLong_FromUnsignedLongLong(
        at_most(shi_hist_value_at_quantile(h, q), shi_hist_max(h)));
}

static PyObject *hist_stats(PyObject *object, PyObject *unused)
{
    const struct shi_hist *h = ((Hist *)object)->h;
    (void)unused;
    /* A bucket's highest value may be above all that were counted in it. */
#define AT(q) (unsigned long long)at_most(shi_hist_value_at_quantile(h, q), shi_hist_max(h))
    return Py_BuildValue("{sKsKsKsKsKsKsd}", "min", (unsigned long long)shi_hist_min(h), "p50",
                         AT(0.5), "p90", AT(0.9), "p99", AT(0.99), "p999", AT(0.999), "max",
                         (unsigned long long)shi_hist_max(h), "mean", shi_hist_mean(h));
#undef AT
}

static PyObject *hist_buckets(PyObject *object, PyObject *unused)
{
    const struct shi_hist *h = ((Hist *)object)->h;
    uint32_t index = 0, at;
    uint64_t count;
    PyObject *list = PyList_New(0);
    (void)unused;
    while (list && shi_hist_next(h, &index, &at, &count)) {
        PyObject *row = Py_BuildValue("(KKK)", (unsigned long long)shi_hist_lowest(at),
                                      (unsigned long long)shi_hist_highest(at),
                                      (unsigned long long)count);
        if (!row || PyList_Append(list, row) < 0)
            Py_CLEAR(list);
        Py_XDECREF(row);
    }
    return list;
}

static PyObject *hist_count(PyObject *object, void *unused)
{
    (void)unused;
    return PyLong_FromUnsignedLongLong(shi_hist_count(((Hist *)object)->h));
}

static PyMethodDef hist_methods[] = {
    { "record", (PyCFunction)(void (*)(void))hist_record, METH_FASTCALL,
      "record($self, ns, count=1, /)\n--\n\nCount `ns` (`count` times)." },
    { "merge", hist_merge, METH_O, "merge($self, other, /)\n--\n\nAdd the values of another." },
    { "quantile", hist_quantile, METH_O,
      "quantile($self, q, /)\n--\n\nThe value in ns at quantile `q` (0 to 1); 0 while empty." },
    { "stats", hist_stats, METH_NOARGS,
      "stats($self, /)\n--\n\nmin, p50, p90, p99, p999, max and mean in ns." },
    { "buckets", hist_buckets, METH_NOARGS,
      "buckets($self, /)\n--\n\n(lowest ns, highest ns, count) of each bucket in use." },
    { "__reduce__", hist_reduce, METH_NOARGS, NULL },
    { NULL, NULL, 0, NULL },
};
static PyGetSetDef hist_getset[] = {
    { "count", hist_count, NULL, "How many values were recorded.", NULL },
    { NULL, NULL, NULL, NULL, NULL },
};
static PyType_Slot hist_slots[] = {
    { Py_tp_new, hist_new },
    { Py_tp_dealloc, hist_dealloc },
    { Py_tp_methods, hist_methods },
    { Py_tp_getset, hist_getset },
    { Py_tp_doc, "Hist()\n--\n\n"
                 "A histogram of nanoseconds in HdrHistogram's bucket layout: three\n"
                 "significant digits from 1 ns to 73 minutes.  Pickles by value." },
    { 0, NULL },
};
static PyType_Spec hist_spec = {
    .name = "shmipi._core.Hist",
    .basicsize = sizeof(Hist),
    .flags = Py_TPFLAGS_DEFAULT,
    .slots = hist_slots,
};

int shi_hist_types(PyObject *module)
{
    if (!hist_type)
        hist_type = (PyTypeObject *)PyType_FromSpec(&hist_spec);
    return hist_type ? PyModule_AddObjectRef(module, "Hist", (PyObject *)hist_type) : -1;
}
