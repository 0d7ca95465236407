/* SPDX-License-Identifier: MIT */
/* Replaying another machine's CPUs, for Python, on a CPU of this one. */
#include "py/entry.h"
#include "py/tables.h"

#include <errno.h>

#include "base/clock.h"
#include "measure/replay.h"

static int check(const Py_buffer *buffer, size_t item, const char *what)
{
    if ((size_t)buffer->len % item == 0 && (uintptr_t)buffer->buf % sizeof(uint64_t) == 0)
        return 0;
    PyErr_Format(PyExc_ValueError, "%s: %zd bytes are no whole number of aligned items", what,
                 buffer->len);
    return -1;
}

static PyObject *result_of(Machine *machine, int err, uint32_t dst)
{
    if (err == -EINTR && shi_task_interrupt(machine) < 0)
        return NULL;
    if (err == -ECANCELED)
        return shi_raise(shi_py.MachineDiedError, EOWNERDEAD, -1,
                         "the machine was shut down during the replay");
    if (err == -EPIPE)
        return shi_raise(shi_py.CancelledError, EPIPE, (int)machine->self.id,
                         "CPU %d gave the replay up: another CPU has", (int)machine->self.id);
    if (err == -EINVAL) {
        PyErr_SetString(PyExc_ValueError, "a step of the script is none");
        return NULL;
    }
    if (err)
        return shi_raise_errno(machine, err, (int)dst);
    Py_RETURN_NONE;
}

/* `control` fits this machine, and this is a task with interrupts on; else an exception. */
static int prepare(Machine *machine, struct shi_replay_run *run, const Py_buffer *control)
{
    const struct shi_self *self = &machine->self;
    if (check(control, sizeof(uint64_t), "control") < 0)
        return -1;
    if ((uint64_t)control->len < shi_replay_control_bytes(machine->m.ncpus) ||
        (uintptr_t)control->buf % SHI_PAIR || run->pace > SHI_RP_ASAP) {
        PyErr_SetString(PyExc_ValueError,
                        "control has no room for each CPU, or the pace is none");
        return -1;
    }
    if (!self->in_task || self->irqs_off || self->in_irq || shi_preempt_off(self)) {
        shi_raise(shi_py.StateError, 0, (int)self->id,
                  "a replay is for a task, with interrupts enabled");
        return -1;
    }
    run->control = control->buf;
    run->control->ncpus = machine->m.ncpus;
    return 0;
}

/* Python handlers run inside of it, and what was put off then, behind it. */
static PyObject *go(Machine *machine, struct shi_replay_run *run,
                    int (*act)(struct shi_self *, struct shi_replay_run *))
{
    struct shi_self *self = &machine->self;
    bool inlined = self->inline_python;
    self->inline_python = true;
    int err = act(self, run);
    self->inline_python = inlined;
    shi_take_back(machine, NULL);
    shi_take_deferred(machine);
    return result_of(machine, err, run->dst);
}

static PyObject *replay_meet(PyObject *module, PyObject *buffer)
{
    Py_buffer control;
    struct shi_replay_run run = { 0 };
    PyObject *result = NULL;
    (void)module;
    Machine *machine = shi_use_cpu("replay from a task on each of its CPUs");
    if (!machine || PyObject_GetBuffer(buffer, &control, PyBUF_WRITABLE) < 0)
        return NULL;
    if (!prepare(machine, &run, &control))
        result = go(machine, &run, shi_replay_meet);
    PyBuffer_Release(&control);
    return result;
}

static PyObject *replay(PyObject *module, PyObject *args)
{
    Py_buffer steps = { 0 }, calls = { 0 }, entries = { 0 }, control = { 0 };
    struct shi_replay_run run = { 0 };
    unsigned long long patience;
    PyObject *result = NULL;
    (void)module;
    if (!PyArg_ParseTuple(args, "y*w*w*w*IIK:replay", &steps, &calls, &entries, &control,
                          &run.pace, &run.resched_ns, &patience))
        return NULL;
    Machine *machine = shi_use_cpu("replay from a task on each of its CPUs");
    if (!machine || check(&steps, sizeof *run.steps, "steps") < 0 ||
        check(&calls, sizeof *run.calls, "calls") < 0 ||
        check(&entries, sizeof *run.entries, "entries") < 0 ||
        prepare(machine, &run, &control) < 0)
        goto out;
    run.steps = steps.buf;
    run.nsteps = (uint32_t)((size_t)steps.len / sizeof *run.steps);
    run.calls = calls.buf;
    run.ncalls = (uint32_t)((size_t)calls.len / sizeof *run.calls);
    run.entries = entries.buf;
    run.entries_room = (uint32_t)((size_t)entries.len / sizeof *run.entries);
    run.patience_ns = patience;
    result = go(machine, &run, shi_replay);
out:
    PyBuffer_Release(&steps);
    PyBuffer_Release(&calls);
    PyBuffer_Release(&entries);
    PyBuffer_Release(&control);
    return result;
}

static PyObject *replay_control_bytes(PyObject *module, PyObject *arg)
{
    (void)module;
    unsigned long ncpus = PyLong_AsUnsignedLong(arg);
    if (PyErr_Occurred())
        return NULL;
    return PyLong_FromUnsignedLongLong(
        shi_replay_control_bytes((uint32_t)(ncpus < SHI_MAX_CPUS ? ncpus : SHI_MAX_CPUS)));
}

PyMethodDef shi_replay_functions[] = {
    { "replay", replay, METH_VARARGS,
      "replay(steps, calls, entries, control, pace, resched_ns, patience_ns)\n--\n\n"
      "Run this CPU's script, with all other CPUs: see shmipi/trace/replay.py." },
    { "replay_meet", replay_meet, METH_O,
      "replay_meet(control)\n--\n\nSleep until every CPU has come to this." },
    { "replay_control_bytes", replay_control_bytes, METH_O,
      "replay_control_bytes(ncpus) -> bytes of `control`" },
    { NULL, NULL, 0, NULL },
};
