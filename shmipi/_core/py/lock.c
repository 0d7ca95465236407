/* SPDX-License-Identifier: MIT */
/* Locks between hosts. */
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

PyMethodDef shi_lock_methods[] = {
    ONE(trylock, "trylock(name) -> bool: a lock between hosts (shi_header)"),
    ONE(unlock, "unlock(name)"),
    { NULL, NULL, 0, NULL },
};
