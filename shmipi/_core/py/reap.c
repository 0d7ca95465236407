/* SPDX-License-Identifier: MIT */
/* The firmware's work: it looks after the CPUs, and buries the dead. */
#include "py/base.h"

#include <poll.h>
#include <stdlib.h>
#include <time.h>

#include "base/clock.h"
#include "smp/reap.h"
#include "smp/watch.h"
#include "users/users.h"
#include "py/tables.h"

METHOD(set_firmware)
{
    unsigned long pid = PyLong_AsUnsignedLong(arg);
    if (PyErr_Occurred())
        return NULL;
    shi_store_full(&MACHINE(object)->m.header->firmware_pid, (uint32_t)pid);
    Py_RETURN_NONE;
}

/* Takes `item` over, which may be NULL. */
static bool append(PyObject *list, PyObject *item)
{
    bool good = item && PyList_Append(list, item) == 0;
    Py_XDECREF(item);
    return good;
}

#define CPU_METHOD(name, expression)                                                           \
    METHOD(name)                                                                               \
    {                                                                                          \
        Machine *machine = MACHINE(object);                                                    \
        uint32_t cpu;                                                                          \
        if (shi_as_slot(arg, machine->m.ncpus, &cpu) < 0)                                      \
            return NULL;                                                                       \
        expression;                                                                            \
    }
CPU_METHOD(boot_error, return PyLong_FromUnsignedLong(
                           shi_load_acquire(&shi_slot(&machine->m, cpu)->boot_error)))
CPU_METHOD(ended,
           return PyLong_FromUnsignedLong(shi_load_acquire(&shi_slot(&machine->m, cpu)->end)))
/* None: a process that is stopped holds up its tasks; to be called again. */
METHOD(reap_complete)
{
    Machine *machine = MACHINE(object);
    uint32_t cpu;
    if (shi_as_slot(arg, machine->m.ncpus, &cpu) < 0)
        return NULL;
    if (!shi_reap_calls(&machine->self, cpu))
        Py_RETURN_NONE;
    uint32_t done = shi_reap_complete(&machine->self, cpu);
    shi_users_died(&machine->self, cpu);
    return PyLong_FromUnsignedLong(done);
}

METHOD(reap_orphans)
{
    Machine *machine = MACHINE(object);
    unsigned long id = PyLong_AsUnsignedLong(arg);
    if (PyErr_Occurred())
        return NULL;
    if (id >= machine->m.nslots)
        return PyErr_Format(PyExc_ValueError, "no slot %lu", id);
    return PyLong_FromUnsignedLong(shi_reap_orphans(&machine->self, (uint32_t)id));
}

/* reap_guarded() -> CPUs that some live slot may still signal, one look for all of them */
METHOD(reap_guarded)
{
    Machine *machine = MACHINE(object);
    uint32_t s, target;
    (void)arg;
    PyObject *found = PyList_New(0);
    for (s = 0; found && s < machine->m.nslots; s++)
        if ((target = shi_reap_guards(&machine->self, s)) != 0 &&
            !append(found, PyLong_FromUnsignedLong(target - 1)))
            Py_CLEAR(found);
    return found;
}

/* guest_admit(slot, pid), guest_bury(slot), guest_clear(slot) -> csds others still have. */
METHOD(guest_admit)
{
    Machine *machine = MACHINE(object);
    unsigned id, pid;
    if (!PyArg_ParseTuple(arg, "II", &id, &pid))
        return NULL;
    if (id < shi_first_guest(&machine->m) || id >= machine->m.nslots) {
        PyErr_SetString(PyExc_ValueError, "no slot of a guest");
        return NULL;
    }
    shi_guest_admit(&machine->self, id, pid);
    Py_RETURN_NONE;
}

static int guest_arg(const Machine *machine, PyObject *arg, uint32_t *id)
{
    unsigned long value = PyLong_AsUnsignedLong(arg);
    if (PyErr_Occurred())
        return -1;
    if (value < shi_first_guest(&machine->m) || value >= machine->m.nslots) {
        PyErr_SetString(PyExc_ValueError, "no slot of a guest");
        return -1;
    }
    *id = (uint32_t)value;
    return 0;
}

METHOD(guest_bury)
{
    uint32_t id;
    if (guest_arg(MACHINE(object), arg, &id) < 0)
        return NULL;
    shi_guest_bury(&MACHINE(object)->self, id);
    Py_RETURN_NONE;
}

METHOD(guest_clear)
{
    uint32_t id;
    if (guest_arg(MACHINE(object), arg, &id) < 0)
        return NULL;
    return PyLong_FromUnsignedLong(shi_guest_clear(&MACHINE(object)->self, id));
}

/* reap_mark(cpu, end=0): it is dead; `end` is what ended() says from now on. */
METHOD(reap_mark)
{
    Machine *machine = MACHINE(object);
    unsigned cpu, end = 0;
    if (!PyArg_ParseTuple(arg, "I|I", &cpu, &end))
        return NULL;
    if (cpu >= machine->m.ncpus)
        return PyErr_Format(PyExc_ValueError, "no slot %u", cpu);
    shi_reap_mark(&machine->self, cpu, end);
    Py_RETURN_NONE;
}

METHOD(reap_ring_all)
{
    (void)arg;
    shi_reap_ring_all(&MACHINE(object)->self);
    Py_RETURN_NONE;
}

/* The watchdog's look, if 10 ms have gone by since the last.  1: the firmware has something
 * to do, 0, or -1. */
static int look_after(Machine *machine)
{
    uint64_t now = shi_now_ns();
    if (!machine->watch && !(machine->watch = shi_watch_new(&machine->m))) {
        PyErr_NoMemory();
        return -1;
    }
    if (now - machine->looked_ns < SHI_WATCH_NS)
        return 0;
    machine->looked_ns = now;
    return shi_watch_look(&machine->self, machine->watch);
}

METHOD(look_after)
{
    (void)arg;
    if (look_after(MACHINE(object)) < 0)
        return NULL;
    Py_RETURN_NONE;
}

/* ordered() -> ([(cpu, generation of the process that INIT ends), ...], [cpus that a STARTUP
 * has reached]): one look at all. */
METHOD(ordered)
{
    Machine *machine = MACHINE(object);
    uint32_t cpu, gen;
    (void)arg;
    PyObject *ends = PyList_New(0), *starts = PyList_New(0);
    bool good = ends && starts;
    for (cpu = 0; good && cpu < machine->m.ncpus; cpu++) {
        struct shi_pic *pic = &shi_slot(&machine->m, cpu)->pic;
        if ((gen = shi_load_acquire(&pic->init)) != 0)
            good = append(ends, Py_BuildValue("II", cpu, gen));
        if (good && shi_load_acquire(&pic->startup) == SHI_SU_ASKED)
            good = append(starts, PyLong_FromUnsignedLong(cpu));
    }
    if (good)
        return Py_BuildValue("NN", ends, starts);
    Py_XDECREF(ends);
    Py_XDECREF(starts);
    return NULL;
}

/* watch(fd, seconds): look after the CPUs until `fd` can be read, a CPU is to be ended or
 * started, or time is up (< 0: never).  In C, because it is the firmware's life: 100 times a second. */
METHOD(watch)
{
    Machine *machine = MACHINE(object);
    int fd, ready = 0;
    double seconds;
    if (!PyArg_ParseTuple(arg, "id", &fd, &seconds))
        return NULL;
    uint64_t end = seconds < 0 ? UINT64_MAX : shi_now_ns() + (uint64_t)(seconds * 1e9);
    do {
        int asked = look_after(machine);
        if (asked < 0)
            return NULL;
        if (asked)
            break;
        uint64_t now = shi_now_ns(), next = machine->looked_ns + SHI_WATCH_NS;
        uint64_t until = next < end ? next : end;
        uint64_t ns = until > now ? until - now : 0;
        struct timespec t = { .tv_sec = (time_t)(ns / 1000000000),
                              .tv_nsec = (long)(ns % 1000000000) };
        struct pollfd p = { .fd = fd, .events = POLLIN };
        Py_BEGIN_ALLOW_THREADS
        ready = ppoll(&p, 1, &t, NULL);
        Py_END_ALLOW_THREADS
        if (ready < 0 && (errno != EINTR || PyErr_CheckSignals() < 0))
            return PyErr_Occurred() ? NULL : PyErr_SetFromErrno(PyExc_OSError);
    } while (ready <= 0 && shi_now_ns() < end);
    Py_RETURN_NONE;
}

METHOD(stop_all)
{
    (void)arg;
    shi_reap_stop_all(&MACHINE(object)->self);
    Py_RETURN_NONE;
}

PyMethodDef shi_reap_methods[] = {
    ONE(set_firmware, "set_firmware(pid)"),
    ONE(boot_error, "boot_error(cpu) -> errno"),
    ONE(ended, "ended(cpu) -> how its process ended: a signal, END_EXITED | status, or 0"),
    MANY(reap_mark, "reap_mark(cpu, end=0)"),
    ONE(reap_complete, "reap_complete(cpu) -> how many, or None: again later"),
    ONE(reap_orphans, "reap_orphans(slot) -> csds of its earlier processes that are out"),
    NOARGS(reap_guarded, "CPUs that some live slot may still signal: a list."),
    MANY(guest_admit, "guest_admit(slot, pid)"),
    ONE(guest_bury, "guest_bury(slot)"),
    ONE(guest_clear, "guest_clear(slot) -> how many csds others still have"),
    NOARGS(reap_ring_all, "Ring every CPU that has work."),
    NOARGS(look_after, "The watchdog's look, if 10 ms have gone by since the last."),
    NOARGS(ordered,
           "CPUs that INIT ends, with the generation of each, and those that STARTUP reached."),
    MANY(watch, "watch(fd, seconds): look after the CPUs until fd can be read"),
    NOARGS(stop_all, "The machine stops."),
    { NULL, NULL, 0, NULL },
};
