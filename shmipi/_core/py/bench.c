/* SPDX-License-Identifier: MIT */
/* The measuring loops of bench.c for Python, on a CPU of the machine. */
#include "py/entry.h"
#include "py/hist.h"
#include "py/tables.h"

#include <stdlib.h>

#include "measure/bench.h"
#include "base/clock.h"

/* ---- loops over the full path ------------------------------------------------------------ */

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
    if (shi_python_waits(&machine->self) && !machine->self.irqs_off)
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
    static char *names[] = { "cpu",  "calls", "warmup",   "batch", "gap_ns", "skip", "state",
                             "park", "stamp", "deadline", "line",  "count",  NULL };
    struct shi_bench_calls b = { .state = -1 };
    int park = 0, stamped = 0;
    double seconds = 60;
    PyObject *result = NULL, *list;
    Hist *rtt = NULL, *one_way = NULL;
    Py_buffer count = { 0 };
    (void)module;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "II|$IIIIippdIw*:bench_calls", names, &b.dst,
                                     &b.calls, &b.warmup, &b.batch, &b.gap_ns, &b.skip,
                                     &b.state, &park, &stamped, &seconds, &b.line, &count))
        return NULL;
    Machine *machine = shi_use_cpu("measure from a task on one");
    if (!machine)
        goto out;
    if (count.obj && ((size_t)count.len < sizeof *b.count ||
                      (uintptr_t)count.buf % sizeof *b.count || stamped)) {
        PyErr_SetString(PyExc_ValueError, "count is an aligned 64-bit word, without stamp");
        goto out;
    }
    b.count = count.buf;
    b.park = park;
    b.stamp = stamped;
    b.deadline_ns = deadline(seconds);
    rtt = shi_hist_make();
    one_way = shi_hist_make();
    b.batches = calloc(b.batch ? (size_t)b.calls / b.batch + 1 : 1, sizeof *b.batches);
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
    if (count.obj)
        PyBuffer_Release(&count);
    free(b.batches);
    Py_XDECREF(rtt);
    Py_XDECREF(one_way);
    return result;
}

static PyObject *bench_await(PyObject *module, PyObject *const *args, Py_ssize_t nargs)
{
    Machine *machine = shi_use_cpu("measure from a task on one");
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
    int64_t missed =
        shi_bench_await(&machine->self, (uint32_t)cpu, (int)state, (uint32_t)gap, deadline(60));
    return missed < 0 ? loop_error(machine, (int)missed, (uint32_t)cpu)
                      : PyLong_FromLongLong(missed);
}

static PyObject *bench_flood(PyObject *module, PyObject *args)
{
    struct shi_bench_flood f = { 0 };
    double seconds = 60;
    unsigned long long until;
    (void)module;
    if (!PyArg_ParseTuple(args, "IIK|d:bench_flood", &f.dst, &f.calls, &until, &seconds))
        return NULL;
    Machine *machine = shi_use_cpu("measure from a task on one");
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
    Machine *machine = shi_use_cpu("measure from a task on one");
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
    static char *names[] = { "calls", "warmup", "gap_ns", "state", "deadline", NULL };
    struct shi_bench_broadcast b = { .state = -1 };
    double seconds = 60;
    (void)module;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "I|$IIid:bench_broadcast", names, &b.calls,
                                     &b.warmup, &b.gap_ns, &b.state, &seconds))
        return NULL;
    Machine *machine = shi_use_cpu("measure from a task on one");
    if (!machine)
        return NULL;
    b.deadline_ns = deadline(seconds);
    b.ns = calloc((size_t)b.calls + 1, sizeof *b.ns);
    if (!b.ns)
        return PyErr_NoMemory();
    bool inlined = loop_begin(machine);
    int err = shi_bench_broadcast(&machine->self, &b);
    loop_end(machine, inlined);
    PyObject *list = err ? NULL : as_list(b.ns, b.calls);
    free(b.ns);
    if (err)
        return loop_error(machine, err, 0);
    return list ? Py_BuildValue("(NdI)", list, b.first_ns, b.missed) : NULL;
}

static PyObject *bench_spin(PyObject *module, PyObject *arg)
{
    Machine *machine = shi_use_cpu("measure from a task on one");
    (void)module;
    if (!machine)
        return NULL;
    unsigned long long ns = arg == Py_None ? 0 : PyLong_AsUnsignedLongLong(arg);
    if (PyErr_Occurred())
        return NULL;
    machine->self.spin_ns = arg == Py_None ? 0 : ns + 1;
    Py_RETURN_NONE;
}

/* ---- what the module gets ---------------------------------------------------------------- */

#define WORDS(function) (PyCFunction)(void (*)(void))(function), METH_VARARGS | METH_KEYWORDS
PyMethodDef shi_bench_functions[] = {
    { "bench_calls", WORDS(bench_calls),
      "bench_calls(cpu, calls, *, warmup, batch, gap_ns, skip, state, park, stamp, deadline,\n"
      "            line, count)\n"
      "--\n\nWaiting calls of a native handler: (round trips, one way, ns per call of each\n"
      "batch, missed, preempted, moved).  With `count`, a 64-bit word that the handler of\n"
      "`line` adds 1 to, this line of the chip is raised in place of each call." },
    { "bench_await", (PyCFunction)(void (*)(void))bench_await, METH_FASTCALL,
      "bench_await(cpu, state, gap_ns)\n--\n\n"
      "Pause, and on until `cpu` is in `state`: how often it was not." },
    { "bench_flood", bench_flood, METH_VARARGS,
      "bench_flood(cpu, calls, until, seconds=60)\n--\n\n"
      "Calls nobody waits for, until all have run: ns of beginning and end." },
    { "bench_until", bench_until, METH_VARARGS,
      "bench_until(cpu, counter, until, seconds=60)\n--\n\nWait for a counter of `cpu`." },
    { "bench_broadcast", WORDS(bench_broadcast),
      "bench_broadcast(calls, *, warmup, gap_ns, state, deadline)\n--\n\n"
      "on_each_cpu(wait=True) of a native handler: (ns of each, of the very first, missed)." },
    { "bench_spin", bench_spin, METH_O,
      "bench_spin(ns)\n--\n\n"
      "Let this CPU's waiters spin so long before they sleep; None: as the machine does." },
    { NULL, NULL, 0, NULL },
};
