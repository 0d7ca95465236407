/* SPDX-License-Identifier: MIT */
/* The measuring loops of bench.c for Python, on a CPU of the machine. */
#include "py/entry.h"
#include "py/hist.h"
#include "py/tables.h"

#include <stdlib.h>

#include "measure/bench.h"
#include "measure/victim.h"
#include "measure/wakes.h"
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

/* What came of timed calls, for Python. */
static PyObject *timed_result(const struct shi_bench_calls *b, PyObject *rtt, PyObject *one_way,
                              PyObject *scheduled)
{
    PyObject *clock, *broke;
    if (b->there_ns == INT64_MAX)
        clock = Py_NewRef(Py_None);
    else
        clock = Py_BuildValue("(LL)", (long long)-b->back_ns, (long long)b->there_ns);
    if (!b->broke)
        broke = Py_NewRef(Py_None);
    else
        broke = Py_BuildValue(
            "(IKKK)", b->broke_at, (unsigned long long)shi_stamp_to_mono(b->broke_from),
            (unsigned long long)(b->broke_arrived ? shi_stamp_to_mono(b->broke_arrived) : 0),
            (unsigned long long)shi_stamp_to_mono(b->broke_to));
    if (!clock || !broke) {
        Py_XDECREF(clock);
        Py_XDECREF(broke);
        return NULL;
    }
    return Py_BuildValue("{sOsOsOsIsKsOsNsN}", "rtt", rtt, "one_way", one_way, "scheduled",
                         scheduled, "missed", b->missed, "rung", (unsigned long long)b->rung,
                         "moved", b->moved ? Py_True : Py_False, "clock_ns", clock, "broke",
                         broke);
}

static bool is_word(const Py_buffer *buffer)
{
    if ((size_t)buffer->len >= sizeof(shi_a64) && !((uintptr_t)buffer->buf % sizeof(shi_a64)))
        return true;
    PyErr_SetString(PyExc_ValueError, "an aligned 64-bit word");
    return false;
}

static PyObject *bench_fake(PyObject *module, PyObject *args)
{
    Py_buffer word = { 0 };
    unsigned calls;
    unsigned long long delay;
    double seconds = 60;
    PyObject *result = NULL;
    Hist *waited = NULL;
    (void)module;
    if (!PyArg_ParseTuple(args, "w*IK|d:bench_fake", &word, &calls, &delay, &seconds))
        return NULL;
    Machine *machine = shi_use_cpu("measure from a task on one");
    if (machine && is_word(&word))
        waited = shi_hist_make();
    if (waited) {
        int err = shi_bench_fake(&machine->self, word.buf, calls, delay, deadline(seconds),
                                 waited->h);
        result = err ? loop_error(machine, err, machine->self.id) : Py_NewRef(waited);
    }
    Py_XDECREF(waited);
    PyBuffer_Release(&word);
    return result;
}

static PyObject *bench_timed(PyObject *module, PyObject *args, PyObject *kwargs)
{
    static char *names[] = { "cpu",   "calls",     "warmup",   "gap_ns",   "state", "park",
                             "stamp", "period_ns", "break_ns", "deadline", "fake",  NULL };
    struct shi_bench_calls b = { .state = -1 };
    int park = 0, stamped = 0;
    unsigned long long period = 0, broken = 0;
    double seconds = 60;
    PyObject *result = NULL;
    Hist *rtt = NULL, *one_way = NULL, *scheduled = NULL;
    Py_buffer fake = { 0 };
    (void)module;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "II|$IIippKKdw*:bench_timed", names, &b.dst,
                                     &b.calls, &b.warmup, &b.gap_ns, &b.state, &park, &stamped,
                                     &period, &broken, &seconds, &fake))
        return NULL;
    Machine *machine = shi_use_cpu("measure from a task on one");
    if (!machine || (fake.obj && !is_word(&fake)))
        goto out;
    rtt = shi_hist_make();
    one_way = shi_hist_make();
    scheduled = shi_hist_make();
    b.fake = fake.buf;
    b.park = park;
    b.stamp = stamped;
    b.period_ns = period;
    b.break_ns = broken;
    b.deadline_ns = deadline(seconds);
    if (rtt && one_way && scheduled) {
        b.rtt = rtt->h;
        b.one_way = one_way->h;
        b.scheduled = scheduled->h;
        bool inlined = loop_begin(machine);
        int err = shi_bench_calls(&machine->self, &b);
        loop_end(machine, inlined);
        if (err)
            loop_error(machine, err, b.dst);
        else if (!PyErr_Occurred())
            result =
                timed_result(&b, (PyObject *)rtt, (PyObject *)one_way, (PyObject *)scheduled);
    }
out:
    if (fake.obj)
        PyBuffer_Release(&fake);
    Py_XDECREF(rtt);
    Py_XDECREF(one_way);
    Py_XDECREF(scheduled);
    return result;
}

static PyObject *bench_local(PyObject *module, PyObject *args)
{
    unsigned calls;
    int itself;
    (void)module;
    if (!PyArg_ParseTuple(args, "Ip:bench_local", &calls, &itself))
        return NULL;
    Machine *machine = shi_use_cpu("measure from a task on one");
    Hist *took = machine ? shi_hist_make() : NULL;
    if (took)
        shi_bench_local(&machine->self, calls, itself, took->h);
    return (PyObject *)took;
}

/* The CPUs of a sequence, none of them this one: how many, or -1. */
static Py_ssize_t read_targets(Machine *machine, PyObject *cpus, uint32_t **found)
{
    PyObject *fast = PySequence_Fast(cpus, "a sequence of CPUs");
    Py_ssize_t n = fast ? PySequence_Fast_GET_SIZE(fast) : -1, i;
    uint32_t *dsts = n > 0 ? calloc((size_t)n, sizeof *dsts) : NULL;
    if (n == 0)
        PyErr_SetString(PyExc_ValueError, "no CPU to call");
    else if (n > 0 && !dsts)
        PyErr_NoMemory();
    for (i = 0; dsts && i < n; i++) {
        unsigned long cpu = PyLong_AsUnsignedLong(PySequence_Fast_GET_ITEM(fast, i));
        if (!PyErr_Occurred() && (cpu >= machine->m.ncpus || cpu == machine->self.id))
            PyErr_Format(PyExc_ValueError, "CPU %lu is none to call from here", cpu);
        if (PyErr_Occurred())
            break;
        dsts[i] = (uint32_t)cpu;
    }
    Py_XDECREF(fast);
    if (PyErr_Occurred()) {
        free(dsts);
        return -1;
    }
    *found = dsts;
    return n;
}

static PyObject *bench_storm(PyObject *module, PyObject *args)
{
    struct shi_bench_storm s = { 0 };
    PyObject *cpus, *result = NULL;
    double seconds;
    int many, wait;
    (void)module;
    if (!PyArg_ParseTuple(args, "Odpp|I:bench_storm", &cpus, &seconds, &many, &wait, &s.most))
        return NULL;
    Machine *machine = shi_use_cpu("measure from a task on one");
    if (!machine)
        return NULL;
    Py_ssize_t n = read_targets(machine, cpus, &s.dsts);
    if (n < 0)
        return NULL;
    s.ndsts = (uint32_t)n;
    s.many = many;
    s.wait = wait;
    s.until_ns = deadline(seconds);
    s.deadline_ns = s.until_ns + 60000000000u;
    Hist *rtt = shi_hist_make();
    if (rtt) {
        s.rtt = rtt->h;
        uint64_t from = shi_now_ns();
        bool inlined = loop_begin(machine);
        int err = shi_bench_storm(&machine->self, &s);
        loop_end(machine, inlined);
        if (err)
            loop_error(machine, err, s.dsts[0]);
        else if (!PyErr_Occurred())
            result = Py_BuildValue("(OKK)", rtt, (unsigned long long)s.calls,
                                   (unsigned long long)(shi_now_ns() - from));
    }
    free(s.dsts);
    Py_XDECREF(rtt);
    return result;
}

static PyObject *bench_work(PyObject *module, PyObject *arg)
{
    unsigned long long ns = PyLong_AsUnsignedLongLong(arg);
    (void)module;
    return PyErr_Occurred() ? NULL : PyLong_FromUnsignedLongLong(shi_bench_work(ns));
}

static PyObject *thread_waited(PyObject *module, PyObject *unused)
{
    (void)module;
    (void)unused;
    return PyLong_FromUnsignedLongLong(shi_thread_waited());
}

static PyObject *bench_membarrier(PyObject *module, PyObject *args)
{
    struct shi_victim v = { 0 };
    unsigned long long period, ns;
    (void)module;
    if (!PyArg_ParseTuple(args, "IKK:bench_membarrier", &v.core, &period, &ns))
        return NULL;
    v.period_ns = period;
    v.ns = ns;
    int err = shi_membarrier_victim(&v);
    if (err) {
        errno = -err;
        return PyErr_SetFromErrno(PyExc_OSError);
    }
    return Py_BuildValue("(KKK)", (unsigned long long)v.units, (unsigned long long)v.calls,
                         (unsigned long long)v.waited_ns);
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

/* ---- wake-ups of tasks of the scheduler -------------------------------------------------- */

static PyObject *bench_task(PyObject *Py_UNUSED(module), PyObject *args)
{
    Machine *machine;
    int player;
    unsigned cpu;
    unsigned long long at;
    if (!PyArg_ParseTuple(args, "O!pIK:bench_task", shi_machine_type, &machine, &player, &cpu,
                          &at) ||
        shi_use(machine) < 0)
        return NULL;
    int64_t id =
        shi_bench_task(&machine->self, player ? SHI_BENCH_PLAYER : SHI_BENCH_SLEEPER, cpu, at);
    return id < 0 ? shi_raise_errno(machine, (int)id, (int)cpu) : PyLong_FromLongLong(id);
}

static PyObject *bench_wakes(PyObject *Py_UNUSED(module), PyObject *args, PyObject *kwargs)
{
    static char *names[] = { "task",   "cpu",   "at",       "calls", "warmup",
                             "gap_ns", "state", "deadline", NULL };
    struct shi_bench_wakes b = { .state = -1 };
    unsigned long long task, at;
    double seconds = 60;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "KIKI|$IIid:bench_wakes", names, &task,
                                     &b.dst, &at, &b.calls, &b.warmup, &b.gap_ns, &b.state,
                                     &seconds))
        return NULL;
    Machine *machine = shi_use_cpu("measure from a task on one");
    Hist *took = machine ? shi_hist_make() : NULL;
    if (!took)
        return NULL;
    b.task = task;
    b.at = at;
    b.took = took->h;
    b.deadline_ns = deadline(seconds);
    int err = shi_bench_wakes(&machine->self, &b);
    if (!err)
        return (PyObject *)took;
    Py_DECREF(took);
    return loop_error(machine, err, b.dst);
}

/* ---- what the module gets ---------------------------------------------------------------- */

#define WORDS(function) (PyCFunction)(void (*)(void))(function), METH_VARARGS | METH_KEYWORDS
/* bench_trace(events): ns of a tracepoint, less the loop around it. */
static PyObject *bench_trace(PyObject *module, PyObject *arg)
{
    unsigned long events = PyLong_AsUnsignedLong(arg);
    (void)module;
    Machine *machine = PyErr_Occurred() ? NULL : shi_use_cpu("measure from a task on one");
    if (!machine)
        return NULL;
    if (!events || events > UINT32_MAX)
        return PyErr_Format(PyExc_ValueError, "no number of events: %lu", events);
    shi_bench_trace(&machine->self, 100, true); /* its ring is found, and warm */
    double empty = shi_bench_trace(&machine->self, (uint32_t)events, false);
    double ns = shi_bench_trace(&machine->self, (uint32_t)events, true);
    return PyFloat_FromDouble(ns > empty ? (ns - empty) / (double)events : 0);
}

PyMethodDef shi_bench_functions[] = {
    { "bench_trace", bench_trace, METH_O,
      "bench_trace(events)\n--\n\nns of a tracepoint, less the loop around it." },
    { "bench_calls", WORDS(bench_calls),
      "bench_calls(cpu, calls, *, warmup, batch, gap_ns, skip, state, park, stamp, deadline,\n"
      "            line, count)\n"
      "--\n\nWaiting calls of a native handler: (round trips, one way, ns per call of each\n"
      "batch, missed, preempted, moved).  With `count`, a 64-bit word that the handler of\n"
      "`line` adds 1 to, this line of the chip is raised in place of each call." },
    { "bench_timed", WORDS(bench_timed),
      "bench_timed(cpu, calls, *, warmup, gap_ns, state, park, stamp, period_ns, break_ns,\n"
      "            deadline, fake)\n"
      "--\n\nWaiting calls of a native handler, each clocked, as a dict: rtt, one_way and\n"
      "scheduled (from when a call of a schedule was due), missed, rung (doorbells and\n"
      "kicks), moved, clock_ns (by how much the target's clock is ahead: at least, at most; "
      "None without stamp), broke (None,\n"
      "or which call took longer than break_ns, and when it was sent, arrived, was over)." },
    { "bench_fake", bench_fake, METH_VARARGS,
      "bench_fake(word, calls, delay_ns, seconds=60)\n--\n\nBe a fake target of bench_timed "
      "with "
      "this word: how long each one was kept waiting, in ns." },
    { "bench_local", bench_local, METH_VARARGS,
      "bench_local(calls, itself)\n--\n\nA native no-op called as a function, or by this CPU "
      "on itself." },
    { "bench_storm", bench_storm, METH_VARARGS,
      "bench_storm(cpus, seconds, many, wait, most=0)\n--\n\n"
      "Calls to each in turn or to all at once, for so long or `most` times: (round trips,\n"
      "calls, ns)." },
    { "bench_work", bench_work, METH_O,
      "bench_work(ns)\n--\n\nWork for so long: how many units were done." },
    { "bench_membarrier", bench_membarrier, METH_VARARGS,
      "bench_membarrier(core, period_ns, ns)\n--\n\nA thread works on `core` while this one "
      "makes a membarrier() every period_ns: (units, calls, ns that it waited for its core)." },
    { "thread_waited", thread_waited, METH_NOARGS,
      "thread_waited()\n--\n\nns for which this thread has waited for its core while others "
      "had it." },
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
    { "bench_task", bench_task, METH_VARARGS,
      "bench_task(machine, player, cpu, at)\n--\n\n"
      "A native task on `cpu`, NEW, its id: it counts its steps in the word at offset `at`;\n"
      "or plays: turn, left, two ids, when it began and when it ended." },
    { "bench_wakes", WORDS(bench_wakes),
      "bench_wakes(task, cpu, at, calls, *, warmup, gap_ns, state, deadline)\n--\n\n"
      "Wake a task of bench_task until its step runs: Hist of ns." },
    { "bench_spin", bench_spin, METH_O,
      "bench_spin(ns)\n--\n\n"
      "Let this CPU's waiters spin so long before they sleep; None: as the machine does." },
    { NULL, NULL, 0, NULL },
};
