/* SPDX-License-Identifier: MIT */
/* The Python handlers of requested irqs and of the NMI. */
#include "py/line.h"

#include "irq/chip.h"
#include "irq/nmi.h"
#include "py/func.h"
#include "py/handler.h"
#include "py/signals.h"

#define HANDLER_TRIES 4

/* The Python handler of `desc`: a new reference, or NULL (with or without an exception). */
static PyObject *handler_of(Machine *machine, const struct shi_irqdesc *desc)
{
    int tries;
    for (tries = 0; tries < HANDLER_TRIES; tries++) {
        struct shi_irqdesc seen, now;
        /* A handler dies with the process that requested it: its table may be another's
         * now. */
        if (!shi_irqdesc_read(desc, &seen) || shi_load_relaxed(&seen.action) != SHI_IA_PYTHON ||
            !shi_irqdesc_requester_lives(&machine->m, &seen))
            return NULL;
        PyObject *function =
            shi_function_received(machine, seen.src, seen.src_gen, seen.func, seen.serial);
        /* Another one may have taken its place just then, and its number be freed. */
        if (function ||
            (shi_irqdesc_read(desc, &now) && shi_load_relaxed(&now.action) == SHI_IA_PYTHON &&
             shi_same_handler(&seen, &now)))
            return function;
        PyErr_Clear();
    }
    return NULL;
}

/* Call the Python handler of `desc` with `argument`; what it raises is unraisable. */
static void apply(Machine *machine, const struct shi_irqdesc *desc, PyObject *argument,
                  bool is_nmi)
{
    struct shi_self *self = &machine->self;
    PyObject *function, *result = NULL;
    struct handler_scope scope;
    struct handler_said outer; /* an NMI's may stand on top of another */
    shi_handler_begin(machine, &scope);
    function = handler_of(machine, desc);
    if (function) {
        shi_count(self, SHI_C_python_run);
        if (is_nmi)
            shi_nmi_entered(self);
        else
            shi_count(self, SHI_C_irq_handled);
        shi_handler_outer(self, &outer);
        shi_say_handler(self, function, is_nmi ? SHI_H_NMI : SHI_H_IRQ);
        result = PyObject_CallOneArg(function, argument);
        shi_leave_if_forked(machine, result);
        shi_say_outer(self, &outer);
    } else {
        shi_count(self, SHI_C_irq_other); /* freed meanwhile, or its requester is gone */
    }
    if (PyErr_Occurred()) {
        shi_count(self, SHI_C_unraisable);
        PyErr_WriteUnraisable(function);
    }
    Py_XDECREF(result);
    Py_XDECREF(function);
    shi_handler_end(machine, &scope);
}

void shi_run_line(Machine *machine, uint32_t line)
{
    struct shi_self *self = &machine->self;
    uint32_t outer = self->handling;
    uint32_t virq = shi_irqdesc_virq(self, line);
    const struct shi_irqdesc *desc = shi_irqdesc(self->m, virq);
    PyObject *number = virq && desc ? PyLong_FromUnsignedLong(virq) : NULL;
    if (number) {
        self->handling = line + 1;
        apply(machine, desc, number, false);
        self->handling = outer;
        Py_DECREF(number);
    }
    shi_chip_end(self, line);
}

void shi_run_nmi(Machine *machine)
{
    struct shi_self *self = &machine->self;
    while (self->nmi_waits && !self->in_nmi) {
        self->in_nmi = 1;
        apply(machine, shi_irqdesc(self->m, 0), Py_None, true);
        self->in_nmi = 0;
        self->nmi_waits = 0;
        shi_signal_fence();
        shi_nmi_done(self);
        shi_nmi_entry(self); /* one more may have come while it was in service */
    }
    shi_signals_let_go(machine);
}
