/* SPDX-License-Identifier: MIT */
/*
 * synchronize_irq(): wait until no handler of an irq is in progress.  What is looked at are
 * the words in which CPUs say so (shi_line_begin), so a handler costs nothing more where
 * nobody waits.
 */
#include "py/base.h"

#include <errno.h>

#include "base/clock.h"
#include "irq/chip.h"
#include "irq/irqdesc.h"
#include "py/entry.h"
#include "py/tables.h"

#define SHORT_NAP_NS 50000
#define NAP_NS 500000
#define SHORT_NAPS 20

/* A line at a CPU that has it in progress, and how many that CPU had taken by then. */
struct place {
    uint32_t cpu, line;
    uint64_t taken;
};

/* What is waited for. */
struct sync {
    uint32_t irq;
    double seconds;
    bool hard;  /* also in handlers of other irqs */
    bool begun; /* not for handlers that were put off: they will not find themselves */
    struct place *places;
    Py_ssize_t n;
};

static bool in_progress(const struct shi_machine *m, const struct place *place, bool begun)
{
    return shi_lines_in_progress(m, place->cpu, place->line / 64, begun) >> (place->line % 64) &
           1;
}

/* Those of `pairs`, (cpu, line) each, that are in progress now: 0, or -1. */
static int look(Machine *machine, PyObject *pairs, struct sync *sync)
{
    Py_ssize_t i;
    for (i = 0; i < PyList_GET_SIZE(pairs); i++) {
        struct place place;
        if (!PyArg_ParseTuple(PyList_GET_ITEM(pairs, i), "II", &place.cpu, &place.line))
            return -1;
        if (place.cpu >= machine->m.ncpus || place.line >= SHI_NLINES) {
            PyErr_SetString(PyExc_ValueError, "there is no such CPU, or line");
            return -1;
        }
        /* Counted after the handler was begun with, as a rule: see `ended`. */
        place.taken = shi_irqdesc_taken(&machine->m, place.cpu, place.line);
        if (in_progress(&machine->m, &place, sync->begun))
            sync->places[sync->n++] = place;
    }
    return 0;
}

/* Of a line that comes all the time one handler begins as the other ends.  When two more were
 * taken than at the first look, the one that was in progress then has ended. */
static bool ended(const struct shi_machine *m, const struct place *place, bool begun)
{
    return !in_progress(m, place, begun) ||
           (int64_t)(shi_irqdesc_taken(m, place->cpu, place->line) - place->taken) >= 2;
}

static int may_wait(const Machine *machine, const struct sync *sync)
{
    const struct shi_self *self = &machine->self;
    Py_ssize_t i;
    if (self->host)
        return 0;
    if (shi_other_thread(machine)) {
        shi_raise(shi_py.StateError, 0, -1,
                  "irqs are waited for by a CPU's own thread, not by others of its process");
        return -1;
    }
    if (!self->in_irq && !self->in_nmi && !self->irqs_off)
        return 0;
    for (i = 0; i < sync->n; i++)
        if (sync->places[i].cpu == self->id) {
            shi_raise(shi_py.DeadlockError, EDEADLK, (int)self->id,
                      "CPU %d has a handler of irq %u in progress, beneath what waits for its "
                      "end now",
                      (int)self->id, sync->irq);
            return -1;
        }
    if (sync->hard)
        return 0;
    shi_raise(shi_py.StateError, 0, -1,
              "the end of an irq's handlers is not waited for in interrupt handlers, nor with "
              "interrupts disabled: it may have to sleep (synchronize_hardirq does not)");
    return -1;
}

static PyObject *timed_out(const struct sync *sync)
{
    uint32_t cpu = sync->places[sync->n - 1].cpu;
    PyObject *seconds = PyFloat_FromDouble(sync->seconds);
    if (seconds)
        shi_raise(shi_py.TimeoutError, ETIMEDOUT, (int)cpu,
                  "a handler of irq %u has been in progress on CPU %u for %S s; is it stopped?",
                  sync->irq, cpu, seconds);
    Py_XDECREF(seconds);
    return NULL;
}

static PyObject *wait_for(Machine *machine, struct sync *sync)
{
    uint64_t end = shi_now_ns() + (uint64_t)(sync->seconds * 1e9);
    uint32_t naps = 0;
    while (sync->n) {
        const struct place *last = &sync->places[sync->n - 1];
        if (ended(&machine->m, last, sync->begun)) {
            sync->n--;
            continue;
        }
        if (shi_ended(&machine->self))
            return shi_raise_errno(machine, -EOWNERDEAD, (int)last->cpu);
        if (shi_now_ns() >= end)
            return timed_out(sync);
        if (shi_nap(machine, naps++ < SHORT_NAPS ? SHORT_NAP_NS : NAP_NS) < 0)
            return NULL;
    }
    Py_RETURN_NONE;
}

/* irq_synchronize(irq, pairs, seconds, hard, begun): until none of (cpu, line) that is in
 * progress now is any more. */
METHOD(irq_synchronize)
{
    Machine *machine = MACHINE(object);
    PyObject *pairs, *done = NULL;
    struct sync sync = { 0 };
    int hard, begun;
    if (!PyArg_ParseTuple(arg, "IO!dpp", &sync.irq, &PyList_Type, &pairs, &sync.seconds, &hard,
                          &begun))
        return NULL;
    if (!(sync.seconds >= 0 && sync.seconds < 1e9)) {
        PyErr_SetString(PyExc_ValueError, "handlers are waited for 0 or more seconds");
        return NULL;
    }
    if (shi_use(machine) < 0)
        return NULL;
    sync.hard = hard;
    sync.begun = begun;
    sync.places = PyMem_Calloc((size_t)PyList_GET_SIZE(pairs) + 1, sizeof *sync.places);
    if (!sync.places)
        return PyErr_NoMemory();
    if (look(machine, pairs, &sync) == 0 && may_wait(machine, &sync) == 0)
        done = wait_for(machine, &sync);
    PyMem_Free(sync.places);
    return done;
}

/* irq_in_progress(cpus) -> int: the lines, a bit each, that one of these CPUs (a mask; None:
 * any) has begun to handle. */
METHOD(irq_in_progress)
{
    Machine *machine = MACHINE(object);
    uint64_t found[SHI_NLINES / 64] = { 0 };
    uint32_t *cpus, n, i, word;
    if (shi_use(machine) < 0 ||
        shi_as_mask(machine, arg == Py_None ? NULL : arg, &cpus, &n) < 0)
        return NULL;
    for (i = 0; i < n; i++)
        for (word = 0; word < SHI_NLINES / 64; word++)
            found[word] |= shi_lines_in_progress(&machine->m, cpus[i], word, true);
    PyMem_Free(cpus);
    PyObject *bytes = PyBytes_FromStringAndSize((const char *)found, sizeof found);
    PyObject *bits = bytes ? PyObject_CallMethod((PyObject *)&PyLong_Type, "from_bytes", "Os",
                                                 bytes, "little")
                           : NULL;
    Py_XDECREF(bytes);
    return bits;
}

PyMethodDef shi_irqsync_methods[] = {
    { "irq_synchronize", machine_irq_synchronize, METH_VARARGS,
      "irq_synchronize(irq, pairs, seconds, hard, begun): wait for handlers of (cpu, line) "
      "each" },
    { "irq_in_progress", machine_irq_in_progress, METH_O,
      "irq_in_progress(cpus) -> int: lines that these CPUs have begun to handle" },
    { NULL, NULL, 0, NULL },
};
