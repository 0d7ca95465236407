/* SPDX-License-Identifier: MIT */
/* The Python handlers of NMIs: irq/nmi.h says when it is their turn. */
#include "py/nmi.h"

#include "base/trace.h"
#include "irq/irqdesc.h"
#include "irq/nmi.h"
#include "py/func.h"
#include "py/handler.h"
#include "py/line.h"
#include "py/signals.h"

/* What a handler of (type, regs) returned: how many events it has handled.  It says nothing:
 * one, as a native handler, which can say nothing. */
static uint32_t events(Machine *machine, PyObject *function, PyObject *result)
{
    if (!result)
        return 0; /* raised, or gone */
    if (result == Py_None)
        return 1;
    unsigned long n = PyLong_Check(result) ? PyLong_AsUnsignedLong(result) : 0;
    if (!PyLong_Check(result))
        PyErr_Format(PyExc_TypeError,
                     "an NMI handler returns NMI_DONE, NMI_HANDLED, how many "
                     "events it has handled, or None: not %R",
                     result);
    if (PyErr_Occurred()) {
        shi_count(&machine->self, SHI_C_unraisable);
        PyErr_WriteUnraisable(function);
        return 0;
    }
    return n < UINT16_MAX ? (uint32_t)n : UINT16_MAX;
}

/* The function of an NMI IPI, if it is Python's: how many it was, 1 or 0. */
static uint32_t run_ipi(Machine *machine)
{
    struct shi_self *self = &machine->self;
    struct shi_irqdesc seen;
    struct handler_scope scope;
    PyObject *function = NULL, *regs = Py_None;
    uint32_t number, handled = 0;
    if (!shi_nmi_ipi_asked(self, &seen, &number) ||
        shi_load_relaxed(&seen.action) != SHI_IA_PYTHON)
        return 0;
    shi_handler_begin(machine, &scope);
    /* Its sender holds the number until this CPU has entered it, or was taken back. */
    if (shi_irqdesc_requester_lives(&machine->m, &seen))
        function =
            shi_function_received(machine, seen.src, seen.src_gen, seen.func, seen.serial);
    if (shi_nmi_ipi_enter(self, number)) {
        handled = 1;
        PyObject *result = shi_handler_apply(machine, function, &regs, 1, SHI_H_NMI);
        Py_XDECREF(result);
    }
    PyErr_Clear(); /* taken back: what it could not be unpickled for is nobody's */
    Py_XDECREF(function);
    shi_handler_end(machine, &scope);
    return handled;
}

/* The Python handlers of a type. */
static uint32_t run_type(Machine *machine, uint32_t type)
{
    struct shi_self *self = &machine->self;
    PyObject *args[] = { PyLong_FromUnsignedLong(type), Py_None };
    const struct shi_irqdesc *actions[SHI_NMI_ACTIONS];
    uint32_t n = 0, i, handled = 0;
    /* As they are now: one that a handler of these registers is for the next NMI. */
    while (n < SHI_NMI_ACTIONS && (actions[n] = shi_nmi_action(&machine->m, type, n)))
        n++;
    for (i = 0; i < n && args[0]; i++) {
        struct shi_irqdesc seen;
        struct handler_scope scope;
        if (!shi_irqdesc_read(actions[i], &seen) ||
            shi_load_relaxed(&seen.action) != SHI_IA_PYTHON)
            continue;
        shi_handler_begin(machine, &scope);
        PyObject *function = shi_handler_of(machine, actions[i]);
        if (function)
            SHI_TRACE(self, nmi_handler, self->id, 0, 0, 0);
        PyObject *result = shi_handler_apply(machine, function, args, 2, SHI_H_NMI);
        handled += events(machine, function, result);
        Py_XDECREF(result);
        Py_XDECREF(function);
        shi_handler_end(machine, &scope);
    }
    if (!args[0])
        PyErr_WriteUnraisable(NULL);
    Py_XDECREF(args[0]);
    return handled;
}

void shi_run_nmi(Machine *machine)
{
    struct shi_self *self = &machine->self;
    while (self->nmi_waits && !self->in_nmi) {
        self->in_nmi = 1;
        do {
            uint32_t type = self->nmi_type;
            if (type == SHI_NMI_LOCAL)
                self->nmi_handled += run_ipi(machine);
            self->nmi_handled += run_type(machine, type);
        } while (shi_nmi_go_on(self));
        self->in_nmi = 0;
        self->nmi_waits = 0;
        shi_signal_fence();
        shi_nmi_done(self); /* takes one more, that came while it was in service */
    }
    shi_signals_let_go(machine);
}

void shi_run_nmi_ipi(Machine *machine)
{
    struct shi_self *self = &machine->self;
    uint8_t depth = self->in_nmi;
    bool python, was = self->nmi_ahead;
    self->in_nmi = 1;
    self->nmi_ahead = true; /* before: its NMI may come in the middle of it */
    shi_signal_fence();
    uint32_t handled = shi_nmi_ipi_native(self, &python);
    if (python)
        handled = run_ipi(machine);
    shi_signal_fence();
    if (!handled && !was)
        self->nmi_ahead = false;
    self->in_nmi = depth;
}
