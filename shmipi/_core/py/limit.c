/* SPDX-License-Identifier: MIT */
/* The raw limits for Python. */
#include "py/base.h"

#include "base/clock.h"
#include "measure/fork.h"
#include "measure/limit.h"
#include "py/hist.h"
#include "py/tables.h"

static PyObject *limit_error(int err)
{
    errno = -err;
    return PyErr_SetFromErrno(PyExc_OSError);
}

/* backoffs=(ns, ...).  0, or -1 with an exception. */
static int limit_backoffs(PyObject *object, struct shi_limit_params *p)
{
    PyObject *all = object ? PySequence_Tuple(object) : PyTuple_New(0);
    Py_ssize_t n = all ? PyTuple_GET_SIZE(all) : -1, i;
    if (n > (Py_ssize_t)SHI_LIMIT_BACKOFFS)
        PyErr_Format(PyExc_ValueError, "%u back-offs at most", SHI_LIMIT_BACKOFFS);
    for (i = 0; i < n && !PyErr_Occurred(); i++) {
        unsigned long ns = PyLong_AsUnsignedLong(PyTuple_GET_ITEM(all, i));
        if (!PyErr_Occurred() && ns > SHI_LIMIT_BACKOFF_MAX)
            PyErr_Format(PyExc_ValueError, "a back-off of %lu ns", ns);
        else
            p->backoff_ns[i] = (uint32_t)ns;
    }
    Py_XDECREF(all);
    p->backoffs = (uint32_t)n;
    return PyErr_Occurred() ? -1 : 0;
}

/* The keywords of both roles.  `area` stays exported while the role runs. */
static int limit_params(PyObject *args, PyObject *kwargs, Py_buffer *area,
                        struct shi_limit_params *p, int *clocked, int *one_way)
{
    static char *names[] = { "area",     "kind",      "session",  "calls",    "warmup",
                             "batch",    "placement", "gap_ns",   "deadline", "peer_pid",
                             "peer_tid", "fd",        "name",     "core",     "plain",
                             "clocked",  "one_way",   "backoffs", NULL };
    const char *kind, *name = "";
    unsigned session, calls, warmup = 100, batch = 1000, placement = 0, gap = SHI_LIMIT_GAP_NS;
    double seconds = 30.0;
    int peer_pid = 0, peer_tid = 0, fd = -1, core = 0, plain = 0;
    PyObject *backoffs = NULL;
    *clocked = *one_way = 0;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "w*sII|$IIIIdiiisipppO", names, area, &kind,
                                     &session, &calls, &warmup, &batch, &placement, &gap,
                                     &seconds, &peer_pid, &peer_tid, &fd, &name, &core, &plain,
                                     clocked, one_way, &backoffs))
        return -1;
    int number = shi_limit_kind(kind);
    if (number < 0 || area->len < (Py_ssize_t)sizeof(struct shi_limit_area) ||
        strlen(name) >= sizeof p->name || !(seconds > 0 && seconds < 1e6)) {
        PyErr_SetString(PyExc_ValueError, "no such limit, or an area that is too small");
        PyBuffer_Release(area);
        return -1;
    }
    shi_limit_params_init(p, number);
    if (limit_backoffs(backoffs, p) < 0) {
        PyBuffer_Release(area);
        return -1;
    }
    p->session = session;
    p->calls = calls;
    p->warmup = warmup;
    p->batch = batch;
    p->placement = placement;
    p->gap_ns = gap;
    p->deadline_ns = shi_now_ns() + (uint64_t)(seconds * 1e9);
    p->peer_pid = peer_pid;
    p->peer_tid = peer_tid;
    p->fd = fd;
    strcpy(p->name, name);
    p->core = core;
    p->flags = (plain ? SHI_LIMIT_PLAIN : 0) | (*one_way ? SHI_LIMIT_ONE_WAY : 0);
    return 0;
}

static PyObject *floats(const double *values, uint32_t n)
{
    PyObject *list = PyList_New(n);
    for (uint32_t i = 0; list && i < n; i++) {
        PyObject *value = PyFloat_FromDouble(values[i]);
        if (value)
            PyList_SET_ITEM(list, i, value);
        else
            Py_CLEAR(list);
    }
    return list;
}

static PyObject *limit_ping(PyObject *module, PyObject *args, PyObject *kwargs)
{
    struct shi_limit_params p;
    Py_buffer area;
    int clocked, one_way;
    double batch_ns[SHI_LIMIT_BACKOFFS] = { 0 };
    (void)module;
    if (limit_params(args, kwargs, &area, &p, &clocked, &one_way) < 0)
        return NULL;
    PyObject *result = NULL, *batches = NULL;
    Hist *rtt = shi_hist_make(), *there = shi_hist_make();
    if (!rtt || !there)
        goto out;
    p.one_way = one_way ? there->h : NULL;
    const struct shi_limit_area *a = area.buf;
    int err;
    Py_BEGIN_ALLOW_THREADS
    err = shi_limit_ping(area.buf, &p, clocked ? rtt->h : NULL, batch_ns);
    Py_END_ALLOW_THREADS
    if (err)
        limit_error(err);
    else
        batches = floats(batch_ns, p.backoffs ? p.backoffs : 1);
    if (batches)
        result = Py_BuildValue("(OONII)", rtt, there, batches, shi_load_relaxed(&a->slept),
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

/* The cores of a sequence; NULL with an exception. */
static uint32_t *read_cores(PyObject *sequence, uint32_t *number)
{
    PyObject *list = PySequence_Fast(sequence, "cores");
    if (!list)
        return NULL;
    Py_ssize_t n = PySequence_Fast_GET_SIZE(list), i;
    uint32_t *cores = calloc(n ? (size_t)n : 1, sizeof *cores);
    if (!cores)
        PyErr_NoMemory();
    for (i = 0; cores && i < n && !PyErr_Occurred(); i++)
        cores[i] = (uint32_t)PyLong_AsUnsignedLong(PySequence_Fast_GET_ITEM(list, i));
    Py_DECREF(list);
    if (!PyErr_Occurred() && (n < 1 || n > (Py_ssize_t)SHI_MAX_CPUS))
        PyErr_Format(PyExc_ValueError, "%zd cores", n);
    *number = (uint32_t)n;
    if (!PyErr_Occurred())
        return cores;
    free(cores);
    return NULL;
}

/* limit_fork(cores) -> (seconds until all are there, seconds until all have ended) */
static PyObject *limit_fork(PyObject *module, PyObject *arg)
{
    struct shi_forks found;
    uint32_t n;
    (void)module;
    uint32_t *cores = read_cores(arg, &n);
    if (!cores)
        return NULL;
    int err = shi_forks(n, cores, n, &found);
    free(cores);
    if (err)
        return limit_error(err);
    return Py_BuildValue("(dd)", (double)found.fork_ns / 1e9, (double)found.exit_ns / 1e9);
}

/* limit_wakes(cores, rounds, gap_ns) -> (ns of each round, switches of the children) */
static PyObject *limit_wakes(PyObject *module, PyObject *args)
{
    struct shi_wakes w = { 0 };
    PyObject *sequence, *list = NULL;
    unsigned long long gap;
    uint32_t i, n;
    (void)module;
    if (!PyArg_ParseTuple(args, "OIK:limit_wakes", &sequence, &w.rounds, &gap))
        return NULL;
    uint32_t *cores = read_cores(sequence, &n);
    if (!cores)
        return NULL;
    w.gap_ns = gap;
    w.ns = calloc(w.rounds + 1, sizeof *w.ns);
    int err = w.ns ? shi_wakes(n, cores, &w) : -ENOMEM;
    if (err)
        limit_error(err);
    else
        list = PyList_New(w.rounds);
    for (i = 0; list && i < w.rounds; i++) {
        PyObject *ns = PyFloat_FromDouble(w.ns[i]);
        if (!ns)
            Py_CLEAR(list);
        else
            PyList_SET_ITEM(list, i, ns);
    }
    free(cores);
    free(w.ns);
    return list ? Py_BuildValue("(NK)", list, (unsigned long long)w.switches) : NULL;
}

#define WORDS(function) (PyCFunction)(void (*)(void))(function), METH_VARARGS | METH_KEYWORDS
PyMethodDef shi_limit_functions[] = {
    { "limit_ping", WORDS(limit_ping),
      "limit_ping($module, /, area, kind, session, calls, **options)\n--\n\n"
      "The sender of a raw limit: (round trips, one way, median ns of batches with each "
      "back-off, slept,\n"
      "preempted).  OSError: what the system forbids." },
    { "limit_pong", WORDS(limit_pong),
      "limit_pong($module, /, area, kind, session, calls, **options)\n--\n\nIts target, in "
      "another process." },
    { "limit_fork", limit_fork, METH_O,
      "limit_fork(cores)\n--\n\n"
      "Fork this process, of one thread, once for each of `cores`; each child is pinned "
      "there,\n"
      "says so and sleeps: seconds until all have, and until all have ended.  OSError." },
    { "limit_wakes", limit_wakes, METH_VARARGS,
      "limit_wakes(cores, rounds, gap_ns)\n--\n\n"
      "Fork this process once for each of `cores`; wake all that sleep there and wait until\n"
      "they have answered, `rounds` times: (ns of each, switches of contexts).  OSError." },
    { NULL, NULL, 0, NULL },
};
