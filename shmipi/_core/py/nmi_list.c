/* SPDX-License-Identifier: MIT */
/* Registering NMI handlers: who is asked, and in which order. */
#include "py/base.h"

#include <errno.h>
#include <string.h>

#include "irq/chip.h"
#include "irq/irqdesc.h"
#include "irq/nmi.h"
#include "py/irq.h"
#include "py/line.h"
#include "py/native.h"
#include "py/tables.h"

static int check_type(unsigned type)
{
    if (type < SHI_NMI_MAX)
        return 0;
    PyErr_Format(PyExc_ValueError, "there is no NMI type %u", type);
    return -1;
}

static bool is_called(const struct shi_irqdesc *action, const char *name)
{
    return !strncmp(action->name, name, sizeof action->name);
}

/* Are they the same function, whatever they are given? */
static bool is_same(const struct shi_irqdesc *a, const struct shi_irqdesc *b)
{
    uint32_t action = shi_load_acquire(&a->action);
    if (action != shi_load_acquire(&b->action))
        return false;
    return action == SHI_IA_PYTHON ? shi_same_handler(a, b) : a->func == b->func;
}

static bool is_linked(const struct shi_machine *m, unsigned type,
                      const struct shi_irqdesc *action)
{
    const struct shi_irqdesc *other;
    uint32_t i;
    for (i = 0; (other = shi_nmi_action(m, type, i)); i++)
        if (other != action && is_called(other, action->name) && is_same(other, action))
            return true;
    return false;
}

/* nmi_register(type, handler, first, name, info) -> how many there were.  OSError EEXIST: the
 * same one is there under this name; ENOSPC: there is no room.  The irq tables are locked. */
METHOD(nmi_register)
{
    Machine *machine = MACHINE(object);
    const struct shi_machine *m = &machine->m;
    unsigned type;
    PyObject *handler, *info;
    int first;
    const char *name;
    uint32_t n = 0;
    if (!PyArg_ParseTuple(arg, "IOpsO", &type, &handler, &first, &name, &info) ||
        check_type(type) < 0 || shi_use(machine) < 0)
        return NULL;
    struct shi_irqdesc *action = shi_nmi_action_free(m, type);
    if (!action)
        return shi_os_error(ENOSPC, name);
    if (strlen(name) >= sizeof action->name)
        return shi_os_error(ENAMETOOLONG, name);
    if (Py_IS_TYPE(handler, shi_native_type)
            ? shi_native_request(machine, action, handler, info, 0) < 0
            : shi_python_request(machine, action, handler) < 0)
        return NULL;
    memset(action->name, 0, sizeof action->name);
    memcpy(action->name, name, strlen(name));
    if (is_linked(m, type, action)) {
        shi_irqdesc_clear(action);
        shi_irq_let_go(machine);
        return shi_os_error(EEXIST, name);
    }
    while (shi_nmi_action(m, type, n))
        n++;
    shi_nmi_action_add(m, type, action, first);
    shi_irq_let_go(machine);
    return PyLong_FromUnsignedLong(n);
}

/* nmi_unregister(type, name) -> bool: was it there?  The irq tables are locked. */
METHOD(nmi_unregister)
{
    Machine *machine = MACHINE(object);
    const struct shi_irqdesc *action;
    unsigned type;
    const char *name;
    uint32_t i;
    if (!PyArg_ParseTuple(arg, "Is", &type, &name) || check_type(type) < 0 ||
        shi_use(machine) < 0)
        return NULL;
    for (i = 0; (action = shi_nmi_action(&machine->m, type, i)); i++) {
        if (!is_called(action, name))
            continue;
        shi_nmi_action_remove(&machine->m, type, i);
        shi_irq_let_go(machine);
        Py_RETURN_TRUE;
    }
    Py_RETURN_FALSE;
}

/* nmi_services() -> {cpu: count} of CPUs that have an NMI in service now.  An exception where
 * the machine has ended: nobody marks its CPUs dead then. */
METHOD(nmi_services)
{
    Machine *machine = MACHINE(object);
    const struct shi_machine *m = &machine->m;
    uint32_t cpu;
    (void)arg;
    if (shi_use(machine) < 0)
        return NULL;
    if (shi_ended(&machine->self))
        return shi_raise_errno(machine, -EOWNERDEAD, -1);
    PyObject *found = PyDict_New();
    for (cpu = 0; found && cpu < m->ncpus; cpu++) {
        const struct shi_slot *slot = shi_slot(m, cpu);
        /* Full: after the order was changed (shi_nmi_action_remove). */
        uint32_t service = shi_load_full(&slot->pic.nmi_service);
        if (!(service & 1) || !shi_word_online(shi_load_acquire(&slot->word)))
            continue;
        PyObject *key = PyLong_FromUnsignedLong(cpu);
        PyObject *value = PyLong_FromUnsignedLong(service);
        if (!key || !value || PyDict_SetItem(found, key, value) < 0)
            Py_CLEAR(found);
        Py_XDECREF(key);
        Py_XDECREF(value);
    }
    return found;
}

/* nmi_reason(bits): why the next NMI comes that is no CPU's own. */
METHOD(nmi_reason)
{
    Machine *machine = MACHINE(object);
    unsigned long bits = PyLong_AsUnsignedLong(arg);
    if (PyErr_Occurred() || shi_use(machine) < 0)
        return NULL;
    if (bits & ~(unsigned long)(SHI_NMI_REASON_SERR | SHI_NMI_REASON_IOCHK))
        return PyErr_Format(PyExc_ValueError, "%lu is no reason", bits);
    shi_fetch_or_full(&shi_irq_area(&machine->m)->nmi.reason, (uint32_t)bits);
    Py_RETURN_NONE;
}

PyMethodDef shi_nmi_list_methods[] = {
    MANY(nmi_register, "nmi_register(type, handler, first, name, info) -> how many there were"),
    MANY(nmi_unregister, "nmi_unregister(type, name) -> bool: was it there?"),
    NOARGS(nmi_services, "Those that have an NMI in service, as {cpu: count}."),
    ONE(nmi_reason, "nmi_reason(bits): why the next NMI comes that is no CPU's own"),
    { NULL, NULL, 0, NULL },
};
