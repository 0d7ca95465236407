/* SPDX-License-Identifier: MIT */
/* Calls with a result, and tasks: posted by their number, and collected. */
#include "py/base.h"

#include "irq/chip.h"
#include "py/native.h"
#include "py/outgoing.h"
#include "py/result.h"
#include "py/tables.h"
#include "py/trace.h"
#include "py/wait.h"

/* May the machine be used, and are there `n` arguments?  0, or -1; `text` is how it is called. */
static int positional(Machine *machine, Py_ssize_t nargs, Py_ssize_t n, const char *text)
{
    if (shi_use(machine) < 0)
        return -1;
    if (nargs == n)
        return 0;
    PyErr_SetString(PyExc_TypeError, text);
    return -1;
}

static PyObject *as_args(PyObject *args, PyObject *kwargs)
{
    if (!PyTuple_CheckExact(args) || (kwargs != Py_None && !PyDict_CheckExact(kwargs))) {
        PyErr_SetString(PyExc_TypeError, "args is a tuple, kwargs a dict or None");
        return NULL;
    }
    return args;
}

/* Room for a task's result.  One for each CPU leaves most of the arena to payloads; a
 * result that is larger lies in its CPU's arena. */
static uint32_t reply_room(const Machine *machine)
{
    uint32_t room = SHI_REPLY_ROOM;
    while (room && (uint64_t)room * machine->m.ncpus > machine->m.arena_bytes / 4)
        room /= 2;
    return room;
}

/* post(cpu, func, args, kwargs, task): start a call, its number back. */
static int64_t post(Machine *machine, int64_t cpu, PyObject *function, PyObject *args,
                    PyObject *kwargs, uint64_t type, uint8_t *apply)
{
    struct outgoing out;
    if (!as_args(args, kwargs))
        return -1;
    if (cpu < 0 || cpu >= machine->m.ncpus) {
        shi_raise_errno(machine, -ENXIO, (int)cpu);
        return -1;
    }
    if (shi_outgoing_call(machine, &out, function, args, kwargs == Py_None ? NULL : kwargs) < 0)
        return -1;
    if (out.call.room && (type & SHI_CSD_TYPE) == SHI_CSD_TTWU)
        out.call.room = reply_room(machine);
    *apply = out.call.apply;
    int64_t local = shi_outgoing_post(machine, &out, type, (uint32_t)cpu);
    shi_outgoing_clear(machine, &out);
    return local;
}

static PyObject *machine_call(Machine *machine, PyObject *const *args, Py_ssize_t nargs)
{
    int64_t cpu;
    uint64_t deadline;
    uint8_t apply;
    if (positional(machine, nargs, 5, "call(cpu, func, args, kwargs, timeout)") < 0)
        return NULL;
    if (shi_as_cpu(args[0], &cpu) < 0 || shi_as_deadline(args[4], &deadline) < 0)
        return NULL;
    int64_t local = post(machine, cpu, args[1], args[2], args[3], SHI_CSD_SYNC, &apply);
    if (local < 0 || shi_wait_csd(machine, (uint32_t)local, (uint32_t)cpu, deadline) < 0)
        return NULL;
    PyObject *result = shi_result(machine, (uint32_t)local, (uint32_t)cpu, apply);
    shi_call_end(&machine->self, (uint32_t)local);
    return result;
}

/* call_on_cpu(cpu, func, par): by a kworker there; its result. */
static PyObject *machine_call_on_cpu(Machine *machine, PyObject *const *args, Py_ssize_t nargs)
{
    int64_t cpu;
    uint8_t apply;
    if (positional(machine, nargs, 3, "call_on_cpu(cpu, func, par)") < 0 ||
        shi_as_cpu(args[0], &cpu) < 0)
        return NULL;
    if (Py_TYPE(args[1]) == shi_native_type) {
        PyErr_SetString(PyExc_TypeError, "a native handler runs as an IPI handler, and not "
                                         "in task context");
        return NULL;
    }
    PyObject *par = PyTuple_Pack(1, args[2]);
    int64_t local = par ? post(machine, cpu, args[1], par, Py_None,
                               SHI_CSD_TTWU | SHI_CSD_WORK | SHI_CSD_PARKED, &apply)
                        : -1;
    Py_XDECREF(par);
    if (local < 0 || shi_wait_work(machine, (uint32_t)local, (uint32_t)cpu) < 0)
        return NULL;
    PyObject *result = shi_result(machine, (uint32_t)local, (uint32_t)cpu, apply);
    shi_call_end(&machine->self, (uint32_t)local);
    return result;
}

static PyObject *machine_post(Machine *machine, PyObject *const *args, Py_ssize_t nargs)
{
    int64_t cpu;
    uint8_t apply;
    if (positional(machine, nargs, 5, "post(cpu, func, args, kwargs, task)") < 0)
        return NULL;
    int task = PyObject_IsTrue(args[4]);
    if (task < 0 || shi_as_cpu(args[0], &cpu) < 0)
        return NULL;
    /* PARKED from the start: the unlock rings, and whoever collects it is woken. */
    int64_t local = post(machine, cpu, args[1], args[2], args[3],
                         (task ? SHI_CSD_TTWU : SHI_CSD_SYNC) | SHI_CSD_PARKED, &apply);
    return local < 0 ? NULL : PyLong_FromLongLong(local);
}

/* ---- tasks on several CPUs ------------------------------------------------------- */

/* The number of a posted task: its csd, and of which use.  A number that is kept for too
 * long is not the next call's. */
#define TASK_SEQ_SHIFT 32
#define TASK_TAG (1ull << 48)

static uint64_t task_number(const Machine *machine, uint32_t local)
{
    uint64_t lock = shi_load_relaxed(&shi_own_csd(&machine->self, local)->lock);
    return TASK_TAG | lock >> SHI_CSD_SEQ_SHIFT << TASK_SEQ_SHIFT | local;
}

/* Give back csds that were filled and never queued. */
static void put_all(Machine *machine, const uint32_t *locals, uint32_t n)
{
    struct shi_self *self = &machine->self;
    shi_enter(self);
    while (n)
        shi_csd_put(self, locals[--n]);
    shi_leave(self);
}

/* A csd for each of `n` CPUs, filled with one payload for all.  0, or -1: none is taken. */
static int fill_many(Machine *machine, struct outgoing *out, uint32_t *locals, uint32_t n)
{
    struct shi_self *self = &machine->self;
    int64_t owner = -1;
    uint32_t i;
    if (out->call.room)
        out->call.room = reply_room(machine);
    if (out->pickle && n > 1 && PyBytes_GET_SIZE(out->pickle) > (Py_ssize_t)out->call.room) {
        out->call.room = 0;
        owner = shi_outgoing_prepare(machine, out);
        if (owner < 0)
            return -1;
    }
    for (i = 0; i < n; i++) {
        int64_t local;
        if (owner < 0) {
            local = shi_outgoing_prepare(machine, out);
        } else {
            shi_enter(self);
            while ((local = shi_csd_get(self)) == -EAGAIN) {
                shi_leave(self);
                if (shi_wait_for_room(machine) < 0)
                    goto fail;
                shi_enter(self);
            }
            if (local >= 0)
                shi_csd_fill_shared(self, (uint32_t)local, &out->call, (uint32_t)owner);
            shi_leave(self);
            if (local < 0)
                shi_raise_errno(machine, (int)local, -1);
        }
        if (local < 0)
            goto fail;
        locals[i] = (uint32_t)local;
    }
    if (owner >= 0) { /* it goes with the last that shares */
        shi_enter(self);
        shi_csd_end_sharing(self, (uint32_t)owner);
        shi_leave(self);
    }
    return 0;
fail:
    put_all(machine, locals, i);
    if (owner >= 0)
        put_all(machine, &(uint32_t){ (uint32_t)owner }, 1);
    return -1;
}

/*
 * start_tasks(cpus, func, args, kwargs, numbers): one task on each CPU of the list, their
 * numbers appended to `numbers`; in the place of one whose CPU went offline meanwhile,
 * -errno.  Everything that can fail does before the first is queued: so a task takes two core
 * sections, where a call's csd is filled and queued in one.
 */
static PyObject *machine_start_tasks(Machine *machine, PyObject *const *args, Py_ssize_t nargs)
{
    struct shi_self *self = &machine->self;
    struct outgoing out;
    PyObject *result = NULL;
    if (shi_use(machine) < 0)
        return NULL;
    if (nargs != 5 || !PyList_CheckExact(args[0]) || !PyList_CheckExact(args[4])) {
        PyErr_SetString(PyExc_TypeError, "start_tasks(cpus, func, args, kwargs, numbers)");
        return NULL;
    }
    if (Py_TYPE(args[1]) == shi_native_type) {
        PyErr_SetString(PyExc_TypeError,
                        "a native handler is no task, it runs as an IPI handler: "
                        "give it to cluster.call() or the smp_call_function "
                        "family");
        return NULL;
    }
    uint32_t n = (uint32_t)PyList_GET_SIZE(args[0]), i;
    uint32_t *cpus = PyMem_Calloc(2 * (size_t)n + 1, sizeof *cpus), *locals = cpus + n;
    PyObject *numbers = PyList_New(n);
    if (!cpus || !numbers) {
        PyErr_NoMemory();
        goto done;
    }
    for (i = 0; i < n; i++) {
        int64_t cpu;
        if (shi_as_cpu(PyList_GET_ITEM(args[0], i), &cpu) < 0)
            goto done;
        if (cpu < 0 || cpu >= machine->m.ncpus) {
            shi_raise_errno(machine, -ENXIO, (int)cpu);
            goto done;
        }
        cpus[i] = (uint32_t)cpu;
    }
    if (!as_args(args[2], args[3]) ||
        shi_outgoing_call(machine, &out, args[1], args[2],
                          args[3] == Py_None ? NULL : args[3]) < 0)
        goto done;
    int err = fill_many(machine, &out, locals, n);
    shi_outgoing_clear(machine, &out);
    if (err < 0)
        goto done;
    shi_say_call(machine, args[1]);
    for (i = 0; i < n; i++) {
        shi_enter(self);
        shi_count(self, SHI_C_calls_single);
        /* PARKED from the start: the unlock rings, and whoever collects it is woken. */
        err = shi_call_single(self, locals[i], SHI_CSD_TTWU | SHI_CSD_PARKED, cpus[i]);
        if (err)
            shi_csd_put(self, locals[i]);
        shi_leave(self);
        PyObject *number = err ? PyLong_FromLong(err)
                               : PyLong_FromUnsignedLongLong(task_number(machine, locals[i]));
        if (!number) { /* out of memory: run, and be collected by nobody */
            if (!err)
                shi_leave_behind(machine, locals[i]);
            put_all(machine, locals + i + 1, n - i - 1);
            goto done;
        }
        PyList_SET_ITEM(numbers, i, number);
    }
    /* In C, where no signal's handler comes between: whoever is interrupted has them all. */
    if (PyList_SetSlice(args[4], PyList_GET_SIZE(args[4]), PyList_GET_SIZE(args[4]), numbers) ==
        0)
        result = Py_NewRef(Py_None);
done:
    shi_call_said(machine);
    Py_XDECREF(numbers);
    PyMem_Free(cpus);
    return result;
}

static int as_local(const Machine *machine, PyObject *object, uint32_t *local)
{
    unsigned long long value = PyLong_AsUnsignedLongLong(object);
    if (PyErr_Occurred())
        return -1;
    *local = (uint32_t)value;
    if (*local >= machine->self.sender.csd_top ||
        (value >= TASK_TAG ? value != task_number(machine, *local) : value > UINT32_MAX)) {
        PyErr_SetString(PyExc_ValueError, "no such call");
        return -1;
    }
    return 0;
}

/* Arguments (call, cpu, timeout): 0, or -1. */
static int waited_for(Machine *machine, PyObject *const *args, Py_ssize_t nargs,
                      const char *text, uint32_t *local, int64_t *cpu, uint64_t *deadline)
{
    return positional(machine, nargs, 3, text) < 0 || as_local(machine, args[0], local) < 0 ||
                   shi_as_cpu(args[1], cpu) < 0 || shi_as_deadline(args[2], deadline) < 0
               ? -1
               : 0;
}

/* await_call(call, cpu, timeout) -> has it ended?  It stays its owner's in either case. */
static PyObject *machine_await_call(Machine *machine, PyObject *const *args, Py_ssize_t nargs)
{
    uint32_t local;
    int64_t cpu;
    uint64_t deadline;
    if (waited_for(machine, args, nargs, "await_call(call, cpu, timeout)", &local, &cpu,
                   &deadline) < 0)
        return NULL;
    int err = shi_csd_wait(&machine->self, local, (uint32_t)cpu, deadline, &shi_python_waiter,
                           machine, NULL);
    if (err && err != -ETIMEDOUT)
        return err == -EINTR ? NULL : shi_raise_errno(machine, err, (int)cpu);
    return PyBool_FromLong(!err);
}

/*
 * cancel(call, cpu) -> what became of it: 0: the task has ended; 1: it had not begun, and
 * never will; 2: it runs, and gets TaskInterrupt where it next runs Python with interrupts
 * enabled.
 */
static PyObject *machine_cancel(Machine *machine, PyObject *const *args, Py_ssize_t nargs)
{
    struct shi_self *self = &machine->self;
    uint32_t local;
    int64_t cpu;
    if (positional(machine, nargs, 2, "cancel(call, cpu)") < 0)
        return NULL;
    if (as_local(machine, args[0], &local) < 0 || shi_as_cpu(args[1], &cpu) < 0)
        return NULL;
    struct shi_csd *csd = shi_own_csd(self, local);
    uint64_t lock = shi_load_acquire(&csd->lock);
    do {
        if (!(lock & SHI_CSD_LOCK) || (lock & SHI_CSD_TYPE) != SHI_CSD_TTWU)
            return PyLong_FromLong(0);
        /* Full: see BEGUN in run_task.  And before the interrupt that makes it look. */
    } while (!shi_cas_full(&csd->lock, &lock, lock | SHI_CSD_CANCEL));
    if (!(lock & SHI_CSD_BEGUN))
        return PyLong_FromLong(1);
    if (cpu >= 0 && cpu < machine->m.ncpus) {
        shi_enter(self);
        shi_chip_prod(self, (uint32_t)cpu);
        shi_leave(self);
    }
    return PyLong_FromLong(2);
}

/* refuse(cpu): raise what a call to a CPU that is not online raises. */
static PyObject *machine_refuse(Machine *machine, PyObject *object)
{
    int64_t cpu;
    if (shi_as_cpu(object, &cpu) < 0)
        return NULL;
    return shi_raise_errno(machine, -ENXIO, (int)cpu);
}

/* begun(call) -> bool: does its CPU run it, or has it? */
static PyObject *machine_begun(Machine *machine, PyObject *object)
{
    uint32_t local;
    if (shi_use(machine) < 0 || as_local(machine, object, &local) < 0)
        return NULL;
    uint64_t lock = shi_load_acquire(&shi_own_csd(&machine->self, local)->lock);
    return PyBool_FromLong(!(lock & SHI_CSD_LOCK) || (lock & SHI_CSD_BEGUN));
}

static PyObject *machine_done(Machine *machine, PyObject *object)
{
    uint32_t local;
    if (shi_use(machine) < 0 || as_local(machine, object, &local) < 0)
        return NULL;
    return PyBool_FromLong(!shi_csd_locked(shi_own_csd(&machine->self, local)));
}

/* collect(call, cpu, timeout): wait for a posted call and take its result. */
static PyObject *machine_collect(Machine *machine, PyObject *const *args, Py_ssize_t nargs)
{
    uint32_t local;
    int64_t cpu;
    uint64_t deadline;
    if (waited_for(machine, args, nargs, "collect(call, cpu, timeout)", &local, &cpu,
                   &deadline) < 0)
        return NULL;
    if (shi_wait_csd(machine, local, (uint32_t)cpu, deadline) < 0)
        return NULL;
    uint8_t apply = shi_own_csd(&machine->self, local)->apply;
    PyObject *result = shi_result(machine, local, (uint32_t)cpu, apply);
    shi_call_end(&machine->self, local);
    return result;
}

static PyObject *machine_abandon(Machine *machine, PyObject *object)
{
    uint32_t local;
    if (shi_use(machine) < 0 || as_local(machine, object, &local) < 0)
        return NULL;
    shi_leave_behind(machine, local);
    Py_RETURN_NONE;
}

PyMethodDef shi_post_methods[] = {
    { "call", FAST(machine_call), METH_FASTCALL,
      "call(cpu, func, args, kwargs, timeout)\n--\n\nfunc(*args, **kwargs) on cpu: its "
      "result." },
    { "call_on_cpu", FAST(machine_call_on_cpu), METH_FASTCALL,
      "call_on_cpu(cpu, func, par)\n--\n\nfunc(par) on cpu, by a kworker there: its result." },
    { "post", FAST(machine_post), METH_FASTCALL,
      "post(cpu, func, args, kwargs, task)\n--\n\nStart a call (or a task): its number." },
    { "start_tasks", FAST(machine_start_tasks), METH_FASTCALL,
      "start_tasks(cpus, func, args, kwargs, numbers)\n--\n\nOne payload, a task on each." },
    { "await_call", FAST(machine_await_call), METH_FASTCALL,
      "await_call(call, cpu, timeout)\n--\n\nWait for a posted call: has it ended?" },
    { "cancel", FAST(machine_cancel), METH_FASTCALL,
      "cancel(call, cpu)\n--\n\n0: the task has ended, 1: it will never run, 2: asked." },
    { "refuse", (PyCFunction)machine_refuse, METH_O, "refuse(cpu)\n--\n\nCpuOfflineError." },
    { "begun", (PyCFunction)machine_begun, METH_O, "begun(call)\n--\n\nHas a task begun?" },
    { "done", (PyCFunction)machine_done, METH_O, "done(call)\n--\n\nHas a posted call ended?" },
    { "collect", FAST(machine_collect), METH_FASTCALL,
      "collect(call, cpu, timeout)\n--\n\nWait for a posted call: its result." },
    { "abandon", (PyCFunction)machine_abandon, METH_O,
      "abandon(call)\n--\n\nNobody will collect this posted call." },
    { NULL, NULL, 0, NULL },
};
