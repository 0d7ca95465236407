/* SPDX-License-Identifier: MIT */
/* The Python handlers of requested irqs, and actions of softirqs. */
#include "py/line.h"

#include "irq/chip.h"
#include "py/func.h"
#include "py/handler.h"

#define HANDLER_TRIES 4

PyObject *shi_handler_of(Machine *machine, const struct shi_irqdesc *desc)
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

PyObject *shi_handler_apply(Machine *machine, PyObject *function, PyObject *const *args,
                            size_t nargs, enum shi_handler kind)
{
    struct shi_self *self = &machine->self;
    PyObject *result = NULL;
    struct handler_said outer; /* an NMI's may stand on top of another */
    if (function) {
        shi_count(self, SHI_C_python_run);
        shi_handler_outer(self, &outer);
        shi_say_handler(self, function, kind);
        result = PyObject_Vectorcall(function, args, nargs, NULL);
        shi_leave_if_forked(machine, result);
        shi_say_outer(self, &outer);
    } else {
        shi_count(self, SHI_C_irq_other); /* freed meanwhile, or its requester is gone */
    }
    if (PyErr_Occurred()) {
        shi_count(self, SHI_C_unraisable);
        PyErr_WriteUnraisable(function);
    }
    return result;
}

/* Call the handler of an irq with its number. */
static void apply(Machine *machine, const struct shi_irqdesc *desc, PyObject *number)
{
    struct handler_scope scope;
    shi_handler_begin(machine, &scope);
    PyObject *function = shi_handler_of(machine, desc);
    if (function)
        shi_count(&machine->self, SHI_C_irq_handled);
    PyObject *result = shi_handler_apply(machine, function, &number, 1, SHI_H_IRQ);
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
        apply(machine, desc, number);
        self->handling = outer;
        Py_DECREF(number);
    }
    shi_chip_end(self, line);
}

void shi_run_softirq(Machine *machine, uint32_t nr)
{
    struct handler_scope scope;
    uint8_t irqs_off = machine->self.irqs_off;
    shi_softirq_begin(machine, &scope);
    PyObject *function = shi_handler_of(machine, &shi_irq_area(&machine->m)->softirq[nr]);
    PyObject *result = shi_handler_apply(machine, function, NULL, 0, SHI_H_SOFTIRQ);
    Py_XDECREF(result);
    Py_XDECREF(function);
    if (machine->self.irqs_off != irqs_off) /* an action that has left interrupts off */
        shi_irq_restore(&machine->self, irqs_off);
    shi_softirq_end(machine, &scope);
}
