/* SPDX-License-Identifier: MIT */
/* What hosts ask of CPUs, and the events that tell of it. */
#include "py/base.h"

#include "base/event.h"
#include "irq/chip.h"
#include "irq/startup.h"
#include "py/call.h"
#include "users/users.h"
#include "py/result.h"
#include "py/tables.h"

/* set_idle(cpu, policy): takes effect at the CPU's next look. */
METHOD(set_idle)
{
    Machine *machine = MACHINE(object);
    unsigned cpu, idle;
    if (!PyArg_ParseTuple(arg, "II", &cpu, &idle))
        return NULL;
    if (cpu >= machine->m.ncpus || idle > SHI_IDLE_HALT) {
        PyErr_SetString(PyExc_ValueError, "no such CPU or policy");
        return NULL;
    }
    shi_store_full(&shi_slot(&machine->m, cpu)->idle, idle);
    shi_enter(&machine->self);
    shi_chip_prod(&machine->self, cpu);
    shi_leave(&machine->self);
    Py_RETURN_NONE;
}

/* wake_cpu(cpu): one that plays dead is asked to come back. */
METHOD(wake_cpu)
{
    Machine *machine = MACHINE(object);
    uint32_t cpu, old = SHI_HP_OFFLINE;
    if (shi_use(machine) < 0 || shi_as_slot(arg, machine->m.ncpus, &cpu) < 0)
        return NULL;
    struct shi_slot *slot = shi_slot(&machine->m, cpu);
    shi_cas_full(&slot->hotplug, &old, SHI_HP_ONLINE);
    shi_event_wake(&slot->hotplug);
    if (machine->m.chip.startup)
        shi_chip_let_start(&machine->self, cpu);
    Py_RETURN_NONE;
}

/* users_states() -> [(state, name), ...] of CPU hotplug that users of IPIs have, highest first. */
METHOD(users_states)
{
    const struct shi_users_state *state;
    PyObject *list = PyList_New(0);
    uint32_t i;
    (void)object;
    (void)arg;
    for (i = 0; list && (state = shi_users_state(i)) != NULL; i++) {
        PyObject *one = Py_BuildValue("Is", state->state, state->name);
        if (!one || PyList_Append(list, one) < 0)
            Py_CLEAR(list);
        Py_XDECREF(one);
    }
    return list;
}

/* users_teardown(state, cpu): it has gone offline; what was there of one goes to others. */
METHOD(users_teardown)
{
    Machine *machine = MACHINE(object);
    const struct shi_users_state *one;
    unsigned state, cpu, i;
    if (!PyArg_ParseTuple(arg, "II", &state, &cpu) || shi_use(machine) < 0)
        return NULL;
    for (i = 0; (one = shi_users_state(i)) != NULL && one->state != state; i++)
        ;
    if (!one || cpu >= machine->m.ncpus) {
        PyErr_SetString(PyExc_ValueError, "no such state or CPU");
        return NULL;
    }
    one->teardown(&machine->self, cpu, false);
    Py_RETURN_NONE;
}

/* make_room(cpu): read what it lends this host: it goes offline when it has sent everything. */
METHOD(make_room)
{
    Machine *machine = MACHINE(object);
    uint32_t cpu;
    if (shi_use(machine) < 0 || shi_as_slot(arg, machine->m.ncpus, &cpu) < 0)
        return NULL;
    if (machine->self.host && shi_load_acquire(&shi_slot(&machine->m, cpu)->starved))
        shi_read_early(machine, cpu);
    /* Any interrupt makes it look. */
    shi_enter(&machine->self);
    shi_chip_prod(&machine->self, cpu);
    shi_leave(&machine->self);
    Py_RETURN_NONE;
}

/* set_starting(some): does a CPU that comes up look for STARTING callbacks? */
METHOD(set_starting)
{
    int some = PyObject_IsTrue(arg);
    if (some < 0 || shi_use(MACHINE(object)) < 0)
        return NULL;
    shi_store_full(&MACHINE(object)->m.header->starting, (uint32_t)some);
    Py_RETURN_NONE;
}

/* run_here(func, info): with interrupts off, as a call of a CPU to itself. */
METHOD(run_here)
{
    PyObject *function, *info;
    if (!PyArg_ParseTuple(arg, "OO", &function, &info) || shi_use(MACHINE(object)) < 0 ||
        shi_run_local(MACHINE(object), function, info, true) < 0)
        return NULL;
    Py_RETURN_NONE;
}

METHOD(ring_hotplug)
{
    (void)arg;
    if (shi_use(MACHINE(object)) < 0)
        return NULL;
    shi_event_ring(&MACHINE(object)->m.header->hotplug_event);
    Py_RETURN_NONE;
}

static PyObject *wait_word(shi_a32 *word, PyObject *arg)
{
    unsigned long seen;
    double seconds;
    if (!PyArg_ParseTuple(arg, "kd", &seen, &seconds))
        return NULL;
    int err;
    Py_BEGIN_ALLOW_THREADS
    err =
        shi_load_acquire(word) == (uint32_t)seen
            ? shi_event_wait(word, (uint32_t)seen, seconds < 0 ? -1 : (int64_t)(seconds * 1e9))
            : 0;
    Py_END_ALLOW_THREADS
    if (err == -EINTR && PyErr_CheckSignals() < 0)
        return NULL;
    return PyLong_FromUnsignedLong(shi_load_acquire(word));
}

/* Event counts: `seen = m.event`, look, `m.wait_event(seen, seconds)`. */
METHOD(wait_event)
{
    return wait_word(&MACHINE(object)->self.slot->event, arg);
}

METHOD(ring_event)
{
    (void)arg;
    shi_event_ring(&MACHINE(object)->self.slot->event);
    Py_RETURN_NONE;
}

METHOD(wait_hotplug)
{
    return wait_word(&MACHINE(object)->m.header->hotplug_event, arg);
}

PyMethodDef shi_hotplug_methods[] = {
    MANY(set_idle, "set_idle(cpu, policy)"),
    ONE(wake_cpu, "wake_cpu(cpu): one that plays dead comes back"),
    NOARGS(users_states, "[(state, name), ...] of CPU hotplug that users of IPIs have."),
    MANY(users_teardown, "users_teardown(state, cpu): what was there goes to others"),
    ONE(make_room, "make_room(cpu): read what it lends this host"),
    ONE(set_starting, "set_starting(some): are there STARTING callbacks?"),
    MANY(run_here, "run_here(func, info): with interrupts off"),
    NOARGS(ring_hotplug, "Wake whoever waits for CPUs to come or go."),
    MANY(wait_event, "wait_event(seen, seconds) -> count"),
    NOARGS(ring_event, "Wake whoever waits for an event of this slot."),
    MANY(wait_hotplug, "wait_hotplug(seen, seconds) -> count"),
    { NULL, NULL, 0, NULL },
};
