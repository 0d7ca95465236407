/* SPDX-License-Identifier: MIT */
/* Measuring for Python: histograms, the raw limits, and the loops of bench.c. */
#include "py_shi.h"

#include <stdlib.h>

#include "bench.h"
#include "clock.h"
#include "hist.h"
#include "limit.h"

/* ---- Hist ------------------------------------------------------------------------------------ */

typedef struct {
    PyObject_HEAD
    struct shi_hist *h;
} Hist;

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

static Hist *hist_make(PyTypeObject *type)
{
    Hist *hist = (Hist *)type->tp_alloc(type, 0);
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
    static char *names[] = {"state", NULL};
    Py_buffer state = {0};
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "|y*:Hist", names, &state))
        return NULL;
    Hist *hist = hist_make(type);
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
    const uint64_t head[HIST_HEAD] = {h->count, h->overflow, h->min,
                                      h->max,   h->sum_low,  h->sum_high};
    memcpy(to, head, sizeof head);
    to += sizeof head;
    for (index = 0; shi_hist_next(h, &index, &at, &count); to += 16) {
        const uint64_t pair[2] = {at, count};
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

static PyObject *hist_quantile(PyObject *object, PyObject *arg)
{
    double q = PyFloat_AsDouble(arg);
    if (PyErr_Occurred())
        return NULL;
    return PyLong_FromUnsignedLongLong(shi_hist_value_at_quantile(((Hist *)object)->h, q));
}

static PyObject *hist_stats(PyObject *object, PyObject *unused)
{
    const struct shi_hist *h = ((Hist *)object)->h;
    (void)unused;
#define AT(q) (unsigned long long)shi_hist_value_at_quantile(h, q)
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
    {"record", (PyCFunction)(void (*)(void))hist_record, METH_FASTCALL,
     "record($self, ns, count=1, /)\n--\n\nCount `ns` (`count` times)."},
    {"merge", hist_merge, METH_O, "merge($self, other, /)\n--\n\nAdd the values of another."},
    {"quantile", hist_quantile, METH_O,
     "quantile($self, q, /)\n--\n\nThe value in ns at quantile `q` (0 to 1); 0 while empty."},
    {"stats", hist_stats, METH_NOARGS,
     "stats($self, /)\n--\n\nmin, p50, p90, p99, p999, max and mean in ns."},
    {"buckets", hist_buckets, METH_NOARGS,
     "buckets($self, /)\n--\n\n(lowest ns, highest ns, count) of each bucket in use."},
    {"__reduce__", hist_reduce, METH_NOARGS, NULL},
    {NULL, NULL, 0, NULL},
};
static PyGetSetDef hist_getset[] = {
    {"count", hist_count, NULL, "How many values were recorded.", NULL},
    {NULL, NULL, NULL, NULL, NULL},
};
static PyType_Slot hist_slots[] = {
    {Py_tp_new, hist_new},
    {Py_tp_dealloc, hist_dealloc},
    {Py_tp_methods, hist_methods},
    {Py_tp_getset, hist_getset},
    {Py_tp_doc, "Hist()\n--\n\n"
                "A histogram of nanoseconds in HdrHistogram's bucket layout: three significant\n"
                "digits from 1 ns to 73 minutes.  Pickles by value."},
    {0, NULL},
};
static PyType_Spec hist_spec = {
    .name = "shmipi._core.Hist",
    .basicsize = sizeof(Hist),
    .flags = Py_TPFLAGS_DEFAULT,
    .slots = hist_slots,
};

/* ---- clocks ------------------------------------------------------------------------------------- */

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

/* ---- the raw limits ------------------------------------------------------------------------------- */

static PyObject *limit_error(int err)
{
    errno = -err;
    return PyErr_SetFromErrno(PyExc_OSError);
}

/* The keywords of both roles.  `area` stays exported while the role runs. */
static int limit_params(PyObject *args, PyObject *kwargs, Py_buffer *area,
                        struct shi_limit_params *p, int *clocked, int *one_way)
{
    static char *names[] = {"area",    "kind",      "session", "calls",    "warmup",
                            "batch",   "placement", "gap_ns",  "deadline", "peer_pid",
                            "peer_tid", "eventfd",  "mq_name", "core",     "plain",
                            "clocked", "one_way",   NULL};
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
    Hist *rtt = hist_make(hist_type), *there = hist_make(hist_type);
    if (!rtt || !there)
        goto out;
    p.one_way = one_way ? there->h : NULL;
    const struct shi_limit_area *a = area.buf;
    int err;
    Py_BEGIN_ALLOW_THREADS
    err = shi_limit_ping(area.buf, &p, clocked ? rtt->h : NULL, &batch_ns);
    Py_END_ALLOW_THREADS
    if (err)
        limit_error(err);
    else
        result = Py_BuildValue("(OOdII)", rtt, there, batch_ns, shi_load_relaxed(&a->slept),
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
    Py_BEGIN_ALLOW_THREADS
    err = shi_limit_pong(area.buf, &p);
    Py_END_ALLOW_THREADS
    PyBuffer_Release(&area);
    if (err)
        return limit_error(err);
    Py_RETURN_NONE;
}

/* ---- loops over the full path ---------------------------------------------------------------------- */

static Machine *measuring_cpu(void)
{
    Machine *machine = shi_use_current();
    if (machine && machine->self.host) {
        shi_raise(shi_py.StateError, 0, -1, "the host is no CPU: measure from a task on one");
        return NULL;
    }
    return machine;
}

static uint64_t deadline(double seconds)
{
    return shi_now_ns() + (uint64_t)((seconds > 0 && seconds < 1e6 ? seconds : 1e6) * 1e9);
}

/* Python csds that came meanwhile run as they do for any waiter of this CPU. */
static bool loop_begin(Machine *machine)
{
    bool inlined = machine->self.inline_python;
    machine->self.inline_python = true;
    return inlined;
}

static void loop_end(Machine *machine, bool inlined)
{
    machine->self.inline_python = inlined;
    if (machine->self.deferred.head && !machine->self.irqs_off)
        shi_run_deferred(machine);
}

static PyObject *loop_error(Machine *machine, int err, uint32_t dst)
{
    if (err == -ECANCELED)
        return shi_raise(shi_py.MachineDiedError, EOWNERDEAD, -1,
                         "the machine was shut down while it was measured");
    return shi_raise_errno(machine, err, (int)dst);
}

static PyObject *as_list(const double *values, uint32_t n)
{
    PyObject *list = PyList_New(n);
    uint32_t i;
    for (i = 0; list && i < n; i++) {
        PyObject *value = PyFloat_FromDouble(values[i]);
        if (!value)
            Py_CLEAR(list);
        else
            PyList_SET_ITEM(list, i, value);
    }
    return list;
}

static PyObject *bench_calls(PyObject *module, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"cpu",   "calls", "warmup", "batch",    "gap_ns", "skip",
                            "state", "park",  "stamp",  "deadline", NULL};
    struct shi_bench_calls b = {.state = -1};
    int park = 0, stamped = 0;
    double seconds = 60;
    (void)module;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "II|$IIIIippd:bench_calls", names, &b.dst,
                                     &b.calls, &b.warmup, &b.batch, &b.gap_ns, &b.skip, &b.state,
                                     &park, &stamped, &seconds))
        return NULL;
    Machine *machine = measuring_cpu();
    if (!machine)
        return NULL;
    b.park = park;
    b.stamp = stamped;
    b.deadline_ns = deadline(seconds);
    PyObject *result = NULL, *list;
    Hist *rtt = hist_make(hist_type), *one_way = hist_make(hist_type);
    b.batches = calloc(b.batch ? b.calls / b.batch + 1 : 1, sizeof *b.batches);
    if (!rtt || !one_way || !b.batches) {
        if (!PyErr_Occurred())
            PyErr_NoMemory();
        goto out;
    }
    b.rtt = rtt->h;
    b.one_way = one_way->h;
    bool inlined = loop_begin(machine);
    int err = shi_bench_calls(&machine->self, &b);
    loop_end(machine, inlined);
    if (err) {
        loop_error(machine, err, b.dst);
        goto out;
    }
    list = as_list(b.batches, b.nbatches);
    if (list)
        result = Py_BuildValue("(OONIKi)", rtt, one_way, list, b.missed,
                               (unsigned long long)b.preempted, (int)b.moved);
out:
    free(b.batches);
    Py_XDECREF(rtt);
    Py_XDECREF(one_way);
    return result;
}

static PyObject *bench_await(PyObject *module, PyObject *const *args, Py_ssize_t nargs)
{
    Machine *machine = measuring_cpu();
    (void)module;
    if (!machine)
        return NULL;
    if (nargs != 3) {
        PyErr_SetString(PyExc_TypeError, "bench_await(cpu, state, gap_ns)");
        return NULL;
    }
    unsigned long cpu = PyLong_AsUnsignedLong(args[0]);
    long state = PyErr_Occurred() ? -1 : PyLong_AsLong(args[1]);
    unsigned long gap = PyErr_Occurred() ? 0 : PyLong_AsUnsignedLong(args[2]);
    if (PyErr_Occurred())
        return NULL;
    if (cpu >= machine->m.ncpus)
        return shi_raise_errno(machine, -ENXIO, (int)cpu);
    int64_t missed = shi_bench_await(&machine->self, (uint32_t)cpu, (int)state, (uint32_t)gap,
                                     deadline(60));
    return missed < 0 ? loop_error(machine, (int)missed, (uint32_t)cpu)
                      : PyLong_FromLongLong(missed);
}

static PyObject *bench_flood(PyObject *module, PyObject *args)
{
    struct shi_bench_flood f = {0};
    double seconds = 60;
    unsigned long long until;
    (void)module;
    if (!PyArg_ParseTuple(args, "IIK|d:bench_flood", &f.dst, &f.calls, &until, &seconds))
        return NULL;
    Machine *machine = measuring_cpu();
    if (!machine)
        return NULL;
    f.until = until;
    f.deadline_ns = deadline(seconds);
    bool inlined = loop_begin(machine);
    int err = shi_bench_flood(&machine->self, &f);
    loop_end(machine, inlined);
    if (err)
        return loop_error(machine, err, f.dst);
    return Py_BuildValue("(KK)", (unsigned long long)shi_stamp_to_mono(f.from_stamp),
                         (unsigned long long)shi_stamp_to_mono(f.to_stamp));
}

static PyObject *bench_until(PyObject *module, PyObject *args)
{
    unsigned cpu, counter;
    unsigned long long until;
    double seconds = 60;
    (void)module;
    if (!PyArg_ParseTuple(args, "IIK|d:bench_until", &cpu, &counter, &until, &seconds))
        return NULL;
    Machine *machine = measuring_cpu();
    if (!machine)
        return NULL;
    if (cpu >= machine->m.ncpus || counter >= SHI_NCOUNTERS)
        return PyErr_Format(PyExc_ValueError, "no CPU %u or counter %u", cpu, counter);
    int err = shi_bench_until(&machine->self, cpu, (enum shi_counter)counter, until,
                              deadline(seconds));
    if (err)
        return loop_error(machine, err, cpu);
    Py_RETURN_NONE;
}

static PyObject *bench_broadcast(PyObject *module, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"calls", "warmup", "gap_ns", "state", "deadline", NULL};
    struct shi_bench_broadcast b = {.state = -1};
    double seconds = 60;
    (void)module;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "I|$IIid:bench_broadcast", names, &b.calls,
                                     &b.warmup, &b.gap_ns, &b.state, &seconds))
        return NULL;
    Machine *machine = measuring_cpu();
    if (!machine)
        return NULL;
    b.deadline_ns = deadline(seconds);
    b.ns = calloc(b.calls + 1, sizeof *b.ns);
    if (!b.ns)
        return PyErr_NoMemory();
    bool inlined = loop_begin(machine);
    int err = shi_bench_broadcast(&machine->self, &b);
    loop_end(machine, inlined);
    PyObject *list = err ? NULL : as_list(b.ns, b.calls);
    free(b.ns);
    if (err)
        return loop_error(machine, err, 0);
    return list ? Py_BuildValue("(NI)", list, b.missed) : NULL;
}

static PyObject *bench_spin(PyObject *module, PyObject *arg)
{
    Machine *machine = measuring_cpu();
    (void)module;
    if (!machine)
        return NULL;
    unsigned long long ns = arg == Py_None ? 0 : PyLong_AsUnsignedLongLong(arg);
    if (PyErr_Occurred())
        return NULL;
    machine->self.spin_ns = arg == Py_None ? 0 : ns + 1;
    Py_RETURN_NONE;
}

/* ---- what the module gets --------------------------------------------------------------------------- */

#define WORDS(function) (PyCFunction)(void (*)(void))(function), METH_VARARGS | METH_KEYWORDS
PyMethodDef shi_bench_methods[] = {{NULL, NULL, 0, NULL}};
PyMethodDef shi_bench_functions[] = {
    {"stamp", stamp, METH_NOARGS,
     "stamp()\n--\n\nNow, in ns of CLOCK_MONOTONIC, by the cheapest clock that all CPUs of a\n"
     "machine agree on."},
    {"timer_cost_ns", timer_cost, METH_NOARGS,
     "timer_cost_ns()\n--\n\nWhat one stamp costs in ns."},
    {"clock_source", clock_source, METH_NOARGS,
     "clock_source()\n--\n\nThe clock behind stamps: tsc, cntvct or monotonic."},
    {"limit_ping", WORDS(limit_ping),
     "limit_ping(area, kind, session, calls, ...)\n--\n\n"
     "The sender of a raw limit: (round trips, one way, median ns of batches, slept,\n"
     "preempted).  OSError: what the system forbids."},
    {"limit_pong", WORDS(limit_pong),
     "limit_pong(area, kind, session, calls, ...)\n--\n\nIts target, in another process."},
    {"bench_calls", WORDS(bench_calls),
     "bench_calls(cpu, calls, *, warmup, batch, gap_ns, skip, state, park, stamp, deadline)\n"
     "--\n\nWaiting calls of a native handler: (round trips, one way, ns per call of each\n"
     "batch, missed, preempted, moved)."},
    {"bench_await", (PyCFunction)(void (*)(void))bench_await, METH_FASTCALL,
     "bench_await(cpu, state, gap_ns)\n--\n\n"
     "Pause, and on until `cpu` is in `state`: how often it was not."},
    {"bench_flood", bench_flood, METH_VARARGS,
     "bench_flood(cpu, calls, until, seconds=60)\n--\n\n"
     "Calls nobody waits for, until all have run: ns of beginning and end."},
    {"bench_until", bench_until, METH_VARARGS,
     "bench_until(cpu, counter, until, seconds=60)\n--\n\nWait for a counter of `cpu`."},
    {"bench_broadcast", WORDS(bench_broadcast),
     "bench_broadcast(calls, *, warmup, gap_ns, state, deadline)\n--\n\n"
     "on_each_cpu(wait=True) of a native handler: (ns of each, missed)."},
    {"bench_spin", bench_spin, METH_O,
     "bench_spin(ns)\n--\n\n"
     "Let this CPU's waiters spin so long before they sleep; None: as the machine does."},
    {NULL, NULL, 0, NULL},
};

int shi_bench_types(PyObject *module)
{
    if (!hist_type)
        hist_type = (PyTypeObject *)PyType_FromSpec(&hist_spec);
    if (!hist_type || PyModule_AddObjectRef(module, "Hist", (PyObject *)hist_type) < 0)
        return -1;
    const struct {
        const char *name;
        long value;
    } numbers[] = {
        {"LIMIT_AREA_BYTES", sizeof(struct shi_limit_area)},
        {"LIMIT_PLACEMENTS", SHI_LIMIT_PLACEMENTS},
        {"RUNNING", SHI_RUNNING},
        {"POLLING", SHI_POLLING},
        {"HALTED", SHI_HALTED},
    };
    size_t i;
    for (i = 0; i < sizeof numbers / sizeof *numbers; i++)
        if (PyModule_AddIntConstant(module, numbers[i].name, numbers[i].value) < 0)
            return -1;
    return 0;
}
