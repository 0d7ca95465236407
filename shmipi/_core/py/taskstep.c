/* SPDX-License-Identifier: MIT */
/* Steps of Python tasks of the scheduler: what runs when the core has picked one. */
#include "py/sched.h"

#include <string.h>

#include "irq/remind.h"
#include "smp/sched.h"
#include "py/handler.h"

/* What shmipi/users/scheduler.py, which is above this, has to say of steps. */
static struct {
    PyObject *begin; /* (machine, id) -> what iterates from now on; or an int: what it ran */
    PyObject *end;   /* (machine, id, value): it has returned */
    PyObject *fail;  /* (machine, id, error): it has raised */
} python;

/* Imported where a Python task runs first. */
static int find_python(void)
{
    if (python.fail)
        return 0;
    PyObject *module = shi_import("shmipi.users.scheduler");
    python.begin = module ? PyObject_GetAttrString(module, "_begin") : NULL;
    python.end = python.begin ? PyObject_GetAttrString(module, "_end") : NULL;
    python.fail = python.end ? PyObject_GetAttrString(module, "_fail") : NULL;
    Py_XDECREF(module);
    return python.fail ? 0 : -1;
}

/* ---- what has begun in this process ----------------------------------------------- */

struct begun {
    uint64_t id;
    PyObject *iterator;
};

/* Where that of task `id` stands; NULL: no memory. */
static struct begun *begun_of(Machine *machine, uint64_t id)
{
    if (!machine->begun)
        machine->begun = PyMem_Calloc(machine->m.ntasks, sizeof *machine->begun);
    return machine->begun ? &machine->begun[(uint32_t)id - 1] : NULL;
}

void shi_begun_clear(Machine *machine)
{
    struct begun *begun = machine->begun;
    uint32_t i;
    machine->begun = NULL; /* what is dropped may run Python */
    for (i = 0; begun && i < machine->m.ntasks; i++)
        Py_XDECREF(begun[i].iterator);
    PyMem_Free(begun);
}

/* What function(machine, id, object) says that the task ran; `object` is taken over. */
static int say(Machine *machine, PyObject *function, uint64_t id, PyObject *object)
{
    PyObject *result = PyObject_CallFunction(function, "OKO", (PyObject *)machine,
                                             (unsigned long long)id, object);
    long ran = result ? PyLong_AsLong(result) : SHI_RAN_EXIT;
    Py_XDECREF(result);
    Py_DECREF(object);
    if (PyErr_Occurred()) {
        PyErr_WriteUnraisable(function);
        return SHI_RAN_EXIT;
    }
    return ran == SHI_RAN_RUNNING || ran == SHI_RAN_SLEEP ? (int)ran : SHI_RAN_EXIT;
}

/* next(iterator), which is taken over. */
static int iterate(Machine *machine, uint64_t id, PyObject *iterator)
{
    PyObject *value = NULL;
    PySendResult sent = PyIter_Send(iterator, Py_None, &value);
    shi_leave_if_forked(machine, value);
    Py_DECREF(iterator);
    if (sent == PYGEN_NEXT) {
        Py_DECREF(value);
        return SHI_RAN_SLEEP;
    }
    struct begun *begun = begun_of(machine, id);
    if (begun && begun->id == id)
        Py_CLEAR(begun->iterator);
    return sent == PYGEN_RETURN ? say(machine, python.end, id, value)
                                : say(machine, python.fail, id, shi_take_exception());
}

/* Its first step, or any of one that is pickled after each. */
static int begin(Machine *machine, uint64_t id)
{
    PyObject *made = find_python() < 0
                         ? NULL
                         : PyObject_CallFunction(python.begin, "OK", (PyObject *)machine,
                                                 (unsigned long long)id);
    shi_leave_if_forked(machine, made);
    if (made && PyLong_CheckExact(made)) {
        int ran = (int)PyLong_AsLong(made);
        Py_DECREF(made);
        return ran == SHI_RAN_SLEEP ? ran : SHI_RAN_EXIT;
    }
    struct begun *begun = made ? begun_of(machine, id) : NULL;
    if (!begun) {
        if (!PyErr_Occurred())
            PyErr_NoMemory();
        PyErr_WriteUnraisable(python.begin);
        Py_XDECREF(made);
        return SHI_RAN_EXIT;
    }
    begun->id = id;
    Py_XSETREF(begun->iterator, Py_NewRef(made));
    return iterate(machine, id, made);
}

/* ---- a step ----------------------------------------------------------------------- */

/* __schedule_bug: "BUG: scheduling while atomic". */
static void atomic_yield(Machine *machine)
{
    struct shi_self *self = &machine->self;
    if (PyErr_WarnFormat(shi_py.Warning, 1,
                         "CPU %d: the task %s yields with %s disabled: scheduling while atomic",
                         (int)self->id, self->slot->task_name,
                         self->irqs_off ? "interrupts" : "preemption") < 0)
        PyErr_WriteUnraisable(NULL);
    self->preempt = 0;
    shi_irq_restore(self, 0);
}

static int step_of(Machine *machine, const struct shi_task *task, uint64_t id)
{
    struct shi_self *self = &machine->self;
    const struct begun *begun = machine->begun ? begun_of(machine, id) : NULL;
    if (task && task->flags & SHI_PF_WORK) { /* a kworker, which is C's */
        self->hooks.work(self, (uint32_t)task->arg);
        return SHI_RAN_EXIT;
    }
    /* Its iterator is in this process: the step is one call. */
    if (__builtin_expect(begun && begun->id == id && begun->iterator, 1))
        return iterate(machine, id, Py_NewRef(begun->iterator));
    return begin(machine, id);
}

int shi_python_step(struct shi_self *self, uint64_t id)
{
    Machine *machine = self->hooks.arg;
    struct shi_csd *cancellable = self->cancellable;
    PyObject *pending = PyErr_Occurred() ? shi_take_exception() : NULL;
    char below[sizeof self->slot->task_name];
    uint64_t w;
    const struct shi_task *task = shi_task_find(self->m, id, &w);
    self->cancellable = NULL; /* of the task below, not of this one */
    memcpy(below, self->slot->task_name, sizeof below);
    if (task) {
        memcpy(self->slot->task_name, task->comm, SHI_COMM);
        self->slot->task_name[SHI_COMM] = 0;
    }
    if (shi_sched_work(self))
        shi_sched_tick(self); /* others wait */
    int ran = step_of(machine, task, id);
    if (PyErr_Occurred())
        PyErr_WriteUnraisable(NULL);
    if (self->preempt || self->irqs_off)
        atomic_yield(machine);
    memcpy(self->slot->task_name, below, sizeof below);
    self->cancellable = cancellable;
    if (shi_cancel_asked(self))
        shi_remind(self); /* asked for while this was on top of it */
    shi_put_exception(pending);
    return ran;
}
