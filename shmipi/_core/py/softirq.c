/* SPDX-License-Identifier: MIT */
/* Softirqs as Python drives them. */
#include "py/base.h"

#include <errno.h>

#include "irq/chip.h"
#include "irq/irqdesc.h"
#include "smp/softirq.h"
#include "py/entry.h"
#include "py/irq.h"
#include "py/native.h"
#include "py/signals.h"
#include "py/tables.h"

static int as_number(PyObject *object)
{
    uint32_t nr;
    return shi_as_slot(object, SHI_NR_SOFTIRQS, &nr) < 0 ? -1 : (int)nr;
}

/* softirq_open(nr, action, info).  OSError EBUSY: its action is the core's.  The irq tables are
 * locked. */
METHOD(softirq_open)
{
    Machine *machine = MACHINE(object);
    PyObject *number, *action, *info;
    if (!PyArg_ParseTuple(arg, "OOO", &number, &action, &info) || shi_use(machine) < 0)
        return NULL;
    int nr = as_number(number);
    if (nr < 0)
        return NULL;
    if (shi_softirq_is_native((uint32_t)nr))
        return shi_os_error(EBUSY, shi_softirq_names[nr]);
    struct shi_irqdesc *desc = &shi_irq_area(&machine->m)->softirq[nr];
    if (Py_IS_TYPE(action, shi_native_type)
            ? shi_native_request(machine, desc, action, info, 0) < 0
            : shi_python_request(machine, desc, action) < 0)
        return NULL;
    shi_irq_let_go(machine);
    Py_RETURN_NONE;
}

/* net_protocol(action or None): what the core's NET_RX calls with what it has delivered.  The irq
 * tables are locked. */
METHOD(net_protocol)
{
    Machine *machine = MACHINE(object);
    if (shi_use(machine) < 0)
        return NULL;
    struct shi_irqdesc *desc = &shi_irq_area(&machine->m)->softirq[SHI_NET_RX_SOFTIRQ];
    if (arg == Py_None)
        shi_irqdesc_clear(desc);
    else if (shi_python_request(machine, desc, arg) < 0)
        return NULL;
    shi_irq_let_go(machine);
    Py_RETURN_NONE;
}

METHOD(softirq_count)
{
    Machine *machine = MACHINE(object);
    unsigned cpu, nr;
    if (!PyArg_ParseTuple(arg, "II", &cpu, &nr) || shi_use(machine) < 0)
        return NULL;
    return PyLong_FromUnsignedLongLong(shi_softirq_count(&machine->m, cpu, nr));
}

static PyObject *raise_it(PyObject *number, void (*how)(struct shi_self *, uint32_t))
{
    Machine *machine = shi_use_cpu(SHI_ONLY_CPU);
    int nr = machine ? as_number(number) : -1;
    if (nr < 0)
        return NULL;
    struct shi_self *self = &machine->self;
    if (self->in_nmi)
        return shi_raise(shi_py.StateError, 0, (int)self->id,
                         "an NMI handler cannot raise a softirq: it may have interrupted who "
                         "does; have it queue an irq_work");
    if (!shi_softirq_is_native((uint32_t)nr) &&
        !shi_load_acquire(&shi_irq_area(&machine->m)->softirq[nr].action))
        return shi_raise(shi_py.StateError, 0, (int)self->id,
                         "softirq %s has no action: open_softirq() first",
                         shi_softirq_names[nr]);
    how(self, (uint32_t)nr);
    Py_RETURN_NONE;
}

static PyObject *raise_softirq(PyObject *Py_UNUSED(module), PyObject *number)
{
    return raise_it(number, shi_raise_softirq);
}

static PyObject *raise_only(PyObject *Py_UNUSED(module), PyObject *number)
{
    return raise_it(number, shi_raise_softirq_only);
}

static PyObject *bh_disable(PyObject *Py_UNUSED(module), PyObject *Py_UNUSED(unused))
{
    Machine *machine = shi_use_cpu(SHI_ONLY_CPU);
    if (!machine)
        return NULL;
    shi_local_bh_disable(&machine->self);
    Py_RETURN_NONE;
}

static PyObject *bh_enable(PyObject *Py_UNUSED(module), PyObject *Py_UNUSED(unused))
{
    static bool given;
    Machine *machine = shi_use_cpu(SHI_ONLY_CPU);
    if (!machine)
        return NULL;
    struct shi_self *self = &machine->self;
    if (self->softirq < SHI_SOFTIRQ_DISABLE)
        return shi_raise(shi_py.StateError, 0, (int)self->id,
                         "local_bh_enable() without local_bh_disable()");
    if ((self->in_irq || self->irqs_off) &&
        shi_warn_once(&given, "local_bh_enable() in an IPI handler, or with interrupts "
                              "disabled: softirqs run with interrupts enabled") < 0)
        return NULL;
    /* In the middle of an import Python handlers wait, and so do Python actions. */
    shi_local_bh_enable(self, !self->held);
    shi_signals_let_go(machine);
    shi_after_enable(machine); /* what was put off meanwhile, a takedown among them */
    if (shi_task_interrupt(machine) < 0 || shi_signals_check(machine) < 0)
        return NULL;
    Py_RETURN_NONE;
}

static PyObject *pending(PyObject *Py_UNUSED(module), PyObject *Py_UNUSED(unused))
{
    Machine *machine = shi_use_cpu(SHI_ONLY_CPU);
    return machine ? PyLong_FromUnsignedLong(shi_load_relaxed(&machine->self.softirqs)) : NULL;
}

PyMethodDef shi_softirq_methods[] = {
    MANY(softirq_open, "softirq_open(nr, action, info)"),
    ONE(net_protocol, "net_protocol(action or None): what NET_RX calls with packets"),
    MANY(softirq_count, "softirq_count(cpu, nr) -> int"),
    { NULL, NULL, 0, NULL },
};

PyMethodDef shi_softirq_functions[] = {
    { "raise_softirq", raise_softirq, METH_O,
      "raise_softirq(nr)\n--\n\n"
      "Have softirq `nr` run on this CPU: in a handler or a softirq when the outermost\n"
      "interrupt has ended; with softirqs disabled at the last local_bh_enable(); in a task\n"
      "it is ksoftirqd that is woken, a thread that takes turns with the task.\n\n"
      "ValueError for a number that is none, ClusterStateError for one that nobody has\n"
      "opened, and in an NMI.  kernel/softirq.c." },
    { "raise_softirq_irqoff", raise_only, METH_O,
      "raise_softirq_irqoff(nr)\n--\n\n"
      "The kernel's __raise_softirq_irqoff(): mark it pending, and wake nobody." },
    { "local_bh_disable", bh_disable, METH_NOARGS,
      "local_bh_disable()\n--\n\n"
      "No softirq runs on this CPU until local_bh_enable(), as often as this was called." },
    { "local_bh_enable", bh_enable, METH_NOARGS,
      "local_bh_enable()\n--\n\n"
      "The last one runs what was raised meanwhile, here and now.  ClusterStateError without\n"
      "local_bh_disable(); ShmipiWarning, once, in a handler or with interrupts disabled." },
    { "local_softirq_pending", pending, METH_NOARGS,
      "local_softirq_pending()\n--\n\nThe softirqs that are raised here: 1 << nr each." },
    { NULL, NULL, 0, NULL },
};
