/* SPDX-License-Identifier: MIT */
/* Histograms, clocks and the raw limits for Python. */
#include "py/bench.h"

#include "base/clock.h"
#include "measure/limit.h"

/* ---- Hist -------------------------------------------------------------------------------- */

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

/* ---- clocks ------------------------------------------------------------------------------ */

static PyObject *stamp(PyObject *module, PyObject *unused)
{
    (void)module;
    (void)unused;
    return PyLong_FromUnsignedLongLong(shi_stamp_to_mono(shi_stamp()));
}

static PyObject *timer_cost(PyObject *module, PyObject *unused)
{
    (void)module;
    (void)unused;
    return PyFloat_FromDouble(shi_timer_cost_ns());
}

static PyObject *clock_source(PyObject *module, PyObject *unused)
{
    (void)module;
    (void)unused;
    return PyUnicode_FromString(shi_clock_name((int)shi_clock_current.source));
}

/* ---- the raw limits ---------------------------------------------------------------------- */

static PyObject *limit_error(int err)
{
    errno = -err;
    return PyErr_SetFromErrno(PyExc_OSError);
}

/* The keywords of both roles.  `area` stays exported while the role runs. */
static int limit_params(PyObject *args, PyObject *kwargs, Py_buffer *area,
                        struct shi_limit_params *p, int *clocked, int *one_way)
{
    static char *names[] = { "area",     "kind",      "session", "calls",    "warmup",
                             "batch",    "placement", "gap_ns",  "deadline", "peer_pid",
                             "peer_tid", "eventfd",   "mq_name", "core",     "plain",
                             "clocked",  "one_way",   NULL };
    const char *kind, *mq_name = "";
    unsigned session, calls, warmup = 100, batch = 1000, placement = 0, gap = SHI_LIMIT_GAP_NS;
    double seconds = 30.0;
    int peer_pid = 0, peer_tid = 0, eventfd = -1, core = 0, plain = 0;
    *clocked = *one_way = 0;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "w*sII|$IIIIdiiisippp", names, area, &kind,
                                     &session, &calls, &warmup, &batch, &placement, &gap,
                                     &seconds, &peer_pid, &peer_tid, &eventfd, &mq_name, &core,
                                     &plain, clocked, one_way))
        return -1;
    int number = shi_limit_kind(kind);
    if (number < 0 || area->len < (Py_ssize_t)sizeof(struct shi_limit_area) ||
        strlen(mq_name) >= sizeof p->mq_name || !(seconds > 0 && seconds < 1e6)) {
        PyErr_SetString(PyExc_ValueError, "no such limit, or an area that is too small");
        PyBuffer_Release(area);
        return -1;
    }
    shi_limit_params_init(p, number);
    p->session = session;
    p->calls = calls;
    p->warmup = warmup;
    p->batch = batch;
    p->placement = placement;
    p->gap_ns = gap;
    p->deadline_ns = shi_now_ns() + (uint64_t)(seconds * 1e9);
    p->peer_pid = peer_pid;
    p->peer_tid = peer_tid;
    p->eventfd = eventfd;
    strcpy(p->mq_name, mq_name);
    p->core = core;
    p->flags = (plain ? SHI_LIMIT_PLAIN : 0) | (*one_way ? SHI_LIMIT_ONE_WAY : 0);
    return 0;
}

static PyObject *limit_ping(PyObject *module, PyObject *args, PyObject *kwargs)
{
    struct shi_limit_params p;
    Py_buffer area;
    int clocked, one_way;
    double batch_ns = 0;
    (void)module;
    if (limit_params(args, kwargs, &area, &p, &clocked, &one_way) < 0)
        return NULL;
    PyObject *result = NULL;
    Hist *rtt = shi_hist_make(), *there = shi_hist_make();
    if (!rtt || !there)
        goto out;
    p.one_way = one_way ? there->h : NULL;
    const struct shi_limit_area *a = area.buf;
    int err;
    Py_BEGIN_ALLOW_THREADS err =
        shi_limit_ping(area.buf, &p, clocked ? rtt->h : NULL, &batch_ns);
    Py_END_ALLOW_THREADS if (err) limit_error(err);
    else result = Py_BuildValue("(OOdII)", rtt, there, batch_ns, shi_load_relaxed(&a->slept),
                                shi_load_relaxed(&a->preempted));
out:
    Py_XDECREF(rtt);
    Py_XDECREF(there);
    PyBuffer_Release(&area);
    return result;
}

static PyObject *limit_pong(PyObject *module, PyObject *args, PyObject *kwargs)
{
    struct shi_limit_params p;
    Py_buffer area;
    int clocked, one_way, err;
    (void)module;
    if (limit_params(args, kwargs, &area, &p, &clocked, &one_way) < 0)
        return NULL;
    Py_BEGIN_ALLOW_THREADS err = shi_limit_pong(area.buf, &p);
    Py_END_ALLOW_THREADS PyBuffer_Release(&area);
    if (err)
        return limit_error(err);
    Py_RETURN_NONE;
}

/* ---- what the module gets ---------------------------------------------------------------- */

#define WORDS(function) (PyCFunction)(void (*)(void))(function), METH_VARARGS | METH_KEYWORDS
PyMethodDef shi_limit_functions[] = {
    { "stamp", stamp, METH_NOARGS,
      "stamp()\n--\n\nNow, in ns of CLOCK_MONOTONIC, by the cheapest clock that all CPUs of a\n"
      "machine agree on." },
    { "timer_cost_ns", timer_cost, METH_NOARGS,
      "timer_cost_ns()\n--\n\nWhat one stamp costs in ns." },
    { "clock_source", clock_source, METH_NOARGS,
      "clock_source()\n--\n\nThe clock behind stamps: tsc, cntvct or monotonic." },
    { "limit_ping", WORDS(limit_ping),
      "limit_ping($module, /, area, kind, session, calls, **options)\n--\n\n"
      "The sender of a raw limit: (round trips, one way, median ns of batches, slept,\n"
      "preempted).  OSError: what the system forbids." },
    { "limit_pong", WORDS(limit_pong),
      "limit_pong($module, /, area, kind, session, calls, **options)\n--\n\nIts target, in "
      "another process." },
    { NULL, NULL, 0, NULL },
};

int shi_limit_types(PyObject *module)
{
    if (!hist_type)
        hist_type = (PyTypeObject *)PyType_FromSpec(&hist_spec);
    if (!hist_type || PyModule_AddObjectRef(module, "Hist", (PyObject *)hist_type) < 0 ||
        PyModule_AddIntConstant(module, "LIMIT_AREA_BYTES", sizeof(struct shi_limit_area)) <
            0 ||
        PyModule_AddIntConstant(module, "LIMIT_PLACEMENTS", SHI_LIMIT_PLACEMENTS) < 0)
        return -1;
    return PyModule_AddFunctions(module, shi_limit_functions);
}
