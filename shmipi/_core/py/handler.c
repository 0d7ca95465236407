/* SPDX-License-Identifier: MIT */
/* What stands around each Python handler: who looks on is told, forks end, room in the stack. */
#include "py/handler.h"

#include <unistd.h>

#include "base/clock.h"
#include "py/signals.h"

void shi_flush_standard_files(void)
{
    const char *const names[] = { "stdout", "stderr" };
    size_t i;
    for (i = 0; i < 2; i++) {
        PyObject *file = PySys_GetObject(names[i]); /* borrowed */
        PyObject *done = file && file != Py_None ? PyObject_CallMethod(file, "flush", NULL)
                                                 : NULL;
        Py_XDECREF(done);
        PyErr_Clear();
    }
}

/* The function forked and its child came back here: the child is no second CPU, and ends
 * where the function does. */
void shi_leave_if_forked(Machine *machine, PyObject *result)
{
    int status = 0;
    if (__builtin_expect(!machine->self.left, 1))
        return;
    if (!result) {
        PyObject *code = NULL, *error = shi_take_exception();
        if (PyErr_GivenExceptionMatches(error, PyExc_SystemExit)) {
            code = PyObject_GetAttrString(error, "code");
            status = code && PyLong_Check(code) ? (int)PyLong_AsLong(code) : code != Py_None;
        } else {
            PyErr_SetObject((PyObject *)Py_TYPE(error), error);
            PyErr_Print();
            status = 1;
        }
    }
    shi_flush_standard_files();
    _exit(status);
}

/* A function's own name: nothing is formatted, and no Python runs. */
static const char *name_of(PyObject *function, size_t *length)
{
    const char *name = NULL;
    if (PyMethod_Check(function))
        function = PyMethod_GET_FUNCTION(function);
    if (PyFunction_Check(function)) {
        Py_ssize_t n = 0;
        name = PyUnicode_AsUTF8AndSize(((PyFunctionObject *)function)->func_qualname, &n);
        if (!name)
            PyErr_Clear(); /* a name that is no text */
        *length = (size_t)n;
    }
    if (!name) {
        name = PyCFunction_Check(function) ? ((PyCFunctionObject *)function)->m_ml->ml_name
               : PyType_Check(function)    ? ((PyTypeObject *)function)->tp_name
                                           : Py_TYPE(function)->tp_name;
        *length = strlen(name);
    }
    return name;
}

/* The name that stands in the slot, if it is a function's: a process is one CPU. */
static PyObject *said;

void shi_say_handler(struct shi_self *self, PyObject *function, enum shi_handler kind)
{
    struct shi_slot *slot = self->slot;
    PyObject *text = PyFunction_Check(function) ? ((PyFunctionObject *)function)->func_qualname
                                                : NULL;
    /* The name is written when it is another one than the last time: what is held is alive,
     * so the same object is the same name. */
    if (!text || text != said) {
        size_t length;
        const char *name = name_of(function, &length);
        if (length >= sizeof slot->handler_name) { /* its end tells more than its begin */
            name += length - (sizeof slot->handler_name - 1);
            length = sizeof slot->handler_name - 1;
        }
        memcpy(slot->handler_name, name, length);
        slot->handler_name[length] = 0;
        Py_XSETREF(said, Py_XNewRef(text));
    }
    shi_store_relaxed(&slot->since, shi_stamp_early());
    /* Release: who finds the kind finds name and time.  One that has been overtaken since
     * finds another time when it looks again. */
    shi_store_release(&slot->handler, kind);
}

void shi_handler_outer(const struct shi_self *self, struct handler_said *outer)
{
    const struct shi_slot *slot = self->slot;
    outer->kind = shi_load_relaxed(&slot->handler);
    outer->since = shi_load_relaxed(&slot->since);
    if (outer->kind)
        memcpy(outer->name, slot->handler_name, sizeof outer->name);
}

void shi_say_outer(struct shi_self *self, const struct handler_said *outer)
{
    struct shi_slot *slot = self->slot;
    if (outer->kind) {
        memcpy(slot->handler_name, outer->name, sizeof outer->name);
        Py_CLEAR(said);
        shi_store_relaxed(&slot->since, outer->since);
    }
    shi_store_release(&slot->handler, outer->kind);
}

/* ---- recursion ------------------------------------------------------------------------- */

#define HEADROOM 200 /* frames that a handler has, however deep the task is */

#if PY_VERSION_HEX >= 0x030c0000
#define LIMIT(t) (t)->py_recursion_limit
#define REMAINING(t) (t)->py_recursion_remaining
#else
#define LIMIT(t) (t)->recursion_limit
#define REMAINING(t) (t)->recursion_remaining
#endif

static int headroom_begin(const Machine *machine)
{
    if (!machine->self.in_task)
        return -1;
    PyThreadState *state = PyThreadState_Get();
    int limit = LIMIT(state);
    LIMIT(state) += HEADROOM;
    REMAINING(state) += HEADROOM;
#if PY_VERSION_HEX >= 0x030c0000
    state->c_recursion_remaining += HEADROOM;
#endif
    return limit;
}

static void headroom_end(int limit)
{
    if (limit < 0)
        return;
    PyThreadState *state = PyThreadState_Get();
    if (LIMIT(state) == limit + HEADROOM) { /* else the handler has set another limit */
        LIMIT(state) -= HEADROOM;
        REMAINING(state) -= HEADROOM;
    }
#if PY_VERSION_HEX >= 0x030c0000
    state->c_recursion_remaining -= HEADROOM;
#endif
}

/* ---- the handler ----------------------------------------------------------------- */

/* What it sends itself is not of the call that it interrupts, which goes on after it. */
static void said_begin(Machine *machine, struct handler_scope *scope)
{
    scope->said = machine->self.said;
    machine->self.said = (struct shi_trace_said){ 0 };
}

void shi_handler_begin(Machine *machine, struct handler_scope *scope)
{
    said_begin(machine, scope);
    scope->limit = headroom_begin(machine);
    scope->pending = PyErr_Occurred() ? shi_take_exception() : NULL;
    scope->irqs_off = machine->self.irqs_off;
    machine->self.irqs_off = 1;
    machine->self.in_irq++;
}

void shi_softirq_begin(Machine *machine, struct handler_scope *scope)
{
    said_begin(machine, scope);
    scope->limit = headroom_begin(machine);
    scope->pending = PyErr_Occurred() ? shi_take_exception() : NULL;
}

void shi_softirq_end(Machine *machine, struct handler_scope *scope)
{
    machine->self.said = scope->said;
    headroom_end(scope->limit);
    shi_put_exception(scope->pending);
}

void shi_handler_end(Machine *machine, struct handler_scope *scope)
{
    machine->self.said = scope->said;
    headroom_end(scope->limit);
    machine->self.in_irq--;
    machine->self.irqs_off = scope->irqs_off;
    shi_signals_let_go(machine);
    shi_put_exception(scope->pending);
}
