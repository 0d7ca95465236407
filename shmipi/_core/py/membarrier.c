/* SPDX-License-Identifier: MIT */
/* membarrier: shmipi/users/membarrier.py. */
#include "py/base.h"

#include <errno.h>

#include "py/entry.h"
#include "py/tables.h"
#include "py/wait.h"
#include "users/membarrier.h"

static struct shi_flusher by(Machine *machine)
{
    return (struct shi_flusher){ machine->natives, &shi_python_waiter, machine };
}

/* -EINTR: an exception is set. */
static PyObject *raise_mb(Machine *machine, int err)
{
    const char *why = err == -EPERM    ? "this address space is not registered for it"
                      : err == -EINVAL ? "there is no such command, or not with such flags"
                      : err == -ESRCH  ? "this task uses no address space: use_mm()"
                                       : NULL;
    if (err == -EINTR)
        return NULL;
    return why ? shi_raise(shi_py.MmError, -err, (int)machine->self.id, "membarrier: %s", why)
               : shi_raise_errno(machine, err, -1);
}

/* A task on a CPU: it is waited for others with interrupts enabled. */
static Machine *task(void)
{
    Machine *machine = shi_use_cpu("membarrier() is called by a task of a CPU");
    const struct shi_self *self = machine ? &machine->self : NULL;
    if (self && (self->in_irq || self->in_nmi || self->irqs_off || !self->in_task)) {
        shi_raise(shi_py.StateError, 0, (int)self->id,
                  "membarrier() is called by tasks with interrupts enabled");
        return NULL;
    }
    return machine;
}

/* Positional numbers, at least `least` of `most`, others as they are.  0 or -1. */
static int numbers(PyObject *const *args, Py_ssize_t nargs, Py_ssize_t least, Py_ssize_t most,
                   int64_t *out)
{
    Py_ssize_t i;
    if (nargs < least || nargs > most) {
        PyErr_Format(PyExc_TypeError, "%zd to %zd arguments", least, most);
        return -1;
    }
    for (i = 0; i < nargs; i++) {
        out[i] = PyLong_AsLongLong(args[i]);
        if (out[i] == -1 && PyErr_Occurred())
            return -1;
    }
    return 0;
}

/* membarrier(cmd, flags, cpu, has_global) */
static PyObject *membarrier(PyObject *Py_UNUSED(module), PyObject *const *args,
                            Py_ssize_t nargs)
{
    int64_t a[4] = { 0, 0, 0, 0 };
    Machine *machine = task();
    if (!machine || numbers(args, nargs, 4, 4, a) < 0)
        return NULL;
    if (a[0] < 0 || a[0] > UINT32_MAX || a[1] < 0 || a[1] > UINT32_MAX)
        return raise_mb(machine, -EINVAL);
    struct shi_flusher f = by(machine);
    int result = shi_membarrier(&machine->self, (uint32_t)a[0], (uint32_t)a[1],
                                a[2] < 0 || a[2] > UINT32_MAX ? UINT32_MAX : (uint32_t)a[2],
                                a[3] != 0, &f);
    return result < 0 ? raise_mb(machine, result) : PyLong_FromLong(result);
}

static PyObject *rseq_begin(PyObject *Py_UNUSED(module), PyObject *Py_UNUSED(unused))
{
    Machine *machine = task();
    return machine ? PyLong_FromUnsignedLong(shi_rseq_begin(&machine->self)) : NULL;
}

/* `bytes` of the machine's arrays at an offset. */
static void *at(Machine *machine, int64_t offset, uint64_t bytes)
{
    uint64_t end = shi_array_end(&machine->m), from = (uint64_t)offset;
    if (from % 8 || from < machine->m.array_offset || from > end || bytes > end - from) {
        PyErr_SetString(PyExc_ValueError, "no shared array is there");
        return NULL;
    }
    return machine->m.base + from;
}

/* rseq_commit(begun, offset, value) -> bool */
static PyObject *rseq_commit(PyObject *Py_UNUSED(module), PyObject *const *args,
                             Py_ssize_t nargs)
{
    int64_t a[3];
    Machine *machine = task();
    shi_a64 *where;
    if (!machine || numbers(args, nargs, 3, 3, a) < 0 || !(where = at(machine, a[1], 8)))
        return NULL;
    return PyBool_FromLong(
        shi_rseq_commit(&machine->self, (uint32_t)a[0], where, (uint64_t)a[2]));
}

/* litmus_fast(offset, rounds) -> rounds */
static PyObject *litmus_fast(PyObject *Py_UNUSED(module), PyObject *const *args,
                             Py_ssize_t nargs)
{
    int64_t a[2];
    Machine *machine = task();
    struct shi_litmus *l;
    if (!machine || numbers(args, nargs, 2, 2, a) < 0 || !(l = at(machine, a[0], sizeof *l)))
        return NULL;
    return PyLong_FromUnsignedLongLong(shi_litmus_fast(&machine->self, l, (uint64_t)a[1]));
}

/* litmus_slow(offset, rounds, cmd) -> (rounds, both zero) */
static PyObject *litmus_slow(PyObject *Py_UNUSED(module), PyObject *const *args,
                             Py_ssize_t nargs)
{
    int64_t a[3];
    uint64_t zero;
    Machine *machine = task();
    struct shi_litmus *l;
    if (!machine || numbers(args, nargs, 3, 3, a) < 0 || !(l = at(machine, a[0], sizeof *l)))
        return NULL;
    struct shi_flusher f = by(machine);
    int64_t n = shi_litmus_slow(&machine->self, l, (uint64_t)a[1], (uint32_t)a[2], &zero, &f);
    return n < 0 ? raise_mb(machine, (int)n)
                 : Py_BuildValue("LK", (long long)n, (unsigned long long)zero);
}

#define ENTRY(name, text) { #name, FAST(name), METH_FASTCALL, text }
PyMethodDef shi_membarrier_functions[] = {
    ENTRY(membarrier, "membarrier(cmd, flags, cpu, has_global) -> int"),
    { "rseq_begin", rseq_begin, METH_NOARGS, "Where a restartable sequence begins: a number." },
    ENTRY(rseq_commit, "rseq_commit(begun, offset, value) -> bool: its last store"),
    ENTRY(litmus_fast, "litmus_fast(offset, rounds) -> rounds: x = 1; r1 = y, no fence"),
    ENTRY(litmus_slow, "litmus_slow(offset, rounds, cmd) -> (rounds, both read 0)"),
    { NULL, NULL, 0, NULL },
};
