/* SPDX-License-Identifier: MIT */
/* What hosts ask of CPUs, and the events that tell of it. */
#include "py/base.h"

#include "base/event.h"
#include "irq/chip.h"
#include "irq/startup.h"
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

/* hotplug(cpu, offline) -> state of the CPU's word: ask it to park, or to come back. */
METHOD(hotplug)
{
    Machine *machine = MACHINE(object);
    unsigned cpu;
    int offline;
    if (!PyArg_ParseTuple(arg, "Ip", &cpu, &offline) || shi_use(machine) < 0)
        return NULL;
    if (cpu >= machine->m.ncpus)
        return shi_raise_errno(machine, -ENXIO, (int)cpu);
    struct shi_slot *slot = shi_slot(&machine->m, cpu);
    uint32_t want = offline ? SHI_HP_OFFLINE : SHI_HP_ONLINE,
             old = shi_load_acquire(&slot->hotplug);
    while (old != SHI_HP_STOP && !shi_cas_full(&slot->hotplug, &old, want))
        ;
    shi_event_wake(&slot->hotplug);
    if (!offline && machine->m.chip.startup)
        shi_chip_let_start(&machine->self, cpu);
    if (offline) {
        if (machine->self.host && shi_load_acquire(&slot->starved))
            shi_read_early(machine, cpu); /* it goes when it has sent everything */
        /* Any interrupt makes it look. */
        shi_enter(&machine->self);
        shi_chip_prod(&machine->self, cpu);
        shi_leave(&machine->self);
    }
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
    MANY(hotplug, "hotplug(cpu, offline)"),
    MANY(wait_event, "wait_event(seen, seconds) -> count"),
    NOARGS(ring_event, "Wake whoever waits for an event of this slot."),
    MANY(wait_hotplug, "wait_hotplug(seen, seconds) -> count"),
    { NULL, NULL, 0, NULL },
};
