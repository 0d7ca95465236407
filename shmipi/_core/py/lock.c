/* SPDX-License-Identifier: MIT */
/* Locks between hosts, and cpus_read_lock(). */
#include "py/base.h"

#include "py/tables.h"

/* trylock(name) -> bool: take a lock between hosts; unlock(name). */
static shi_a64 *lock_named(Machine *machine, PyObject *arg)
{
    struct shi_header *h = machine->m.header;
    const char *name = PyUnicode_AsUTF8(arg);
    if (name && !strcmp(name, "array"))
        return &h->array_lock;
    if (name && !strcmp(name, "hotplug"))
        return &h->hotplug_lock;
    if (name && !strcmp(name, "stop"))
        return &h->stop_lock;
    if (name && !strcmp(name, "tool"))
        return &h->tool_lock;
    if (name)
        PyErr_Format(PyExc_ValueError, "there is no lock %s", name);
    return NULL;
}

METHOD(trylock)
{
    Machine *machine = MACHINE(object);
    shi_a64 *lock = shi_use(machine) < 0 ? NULL : lock_named(machine, arg);
    if (!lock)
        return NULL;
    /* This host's already: its threads come here one at a time, so one of them left it,
     * interrupted (Ctrl-C) between taking it and the block that gives it back. */
    if (lock != &machine->m.header->tool_lock && shi_lock_mine(&machine->self, lock))
        Py_RETURN_TRUE;
    return PyBool_FromLong(shi_lock_try(&machine->self, lock) == 0);
}

METHOD(unlock)
{
    shi_a64 *lock = lock_named(MACHINE(object), arg);
    if (!lock)
        return NULL;
    shi_lock_release(&MACHINE(object)->self, lock);
    Py_RETURN_NONE;
}

/*
 * cpus_read_lock(): a percpu_rw_semaphore, whose readers write a word of their own.  A reader
 * adds itself first and looks at the writer's lock second, the writer takes that first and
 * looks at the readers second: one of the two sees the other.
 *
 * cpus_read_trylock() -> bool.  Who is inside already goes in: the writer waits for it.
 */
METHOD(cpus_read_trylock)
{
    Machine *machine = MACHINE(object);
    (void)arg;
    if (shi_use(machine) < 0)
        return NULL;
    shi_a32 *readers = &machine->self.slot->cpus_read;
    if (shi_fetch_add_full(readers, 1) ||
        shi_lock_is_free(&machine->self, &machine->m.header->hotplug_lock))
        Py_RETURN_TRUE;
    shi_fetch_add_full(readers, -1u);
    Py_RETURN_FALSE;
}

/* cpus_read_unlock() -> bool: False when it was not held. */
METHOD(cpus_read_unlock)
{
    Machine *machine = MACHINE(object);
    (void)arg;
    if (shi_use(machine) < 0)
        return NULL;
    shi_a32 *readers = &machine->self.slot->cpus_read;
    uint32_t n = shi_load_relaxed(readers);
    /* Full: releases what was done inside to the writer that finds it 0. */
    while (n && !shi_cas_full(readers, &n, n - 1))
        ;
    return PyBool_FromLong(n != 0);
}

/* cpus_reader() -> the first slot that holds cpus_read_lock(), or -1.  The hotplug lock is
 * held: none comes from now on. */
METHOD(cpus_reader)
{
    const struct shi_machine *m = &MACHINE(object)->m;
    uint32_t i;
    (void)arg;
    if (shi_use(MACHINE(object)) < 0)
        return NULL;
    for (i = 0; i < m->nslots; i++)
        if (shi_load_full(&shi_slot(m, i)->cpus_read))
            return PyLong_FromUnsignedLong(i);
    return PyLong_FromLong(-1);
}

PyMethodDef shi_lock_methods[] = {
    ONE(trylock, "trylock(name) -> bool: a lock between hosts (shi_header)"),
    ONE(unlock, "unlock(name)"),
    NOARGS(cpus_read_trylock, "Hold off CPU hotplug: bool."),
    NOARGS(cpus_read_unlock, "bool: False when it was not held."),
    NOARGS(cpus_reader, "The first slot that holds cpus_read_lock(), or -1."),
    { NULL, NULL, 0, NULL },
};
