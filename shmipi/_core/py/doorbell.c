/* SPDX-License-Identifier: MIT */
/* Doorbells, opened at boot or adopted from a machine that runs. */
#include "py/base.h"

#include "irq/doorbell.h"
#include "py/tables.h"

METHOD(open_doorbells)
{
    Machine *machine = MACHINE(object);
    const char *prefix;
    PyObject *list;
    int *fds = NULL;
    Py_ssize_t i;
    if (!PyArg_ParseTuple(arg, "sO!", &prefix, &PyList_Type, &list))
        return NULL;
    if (machine->m.doorbell == SHI_DB_EVENTFD) {
        if (PyList_GET_SIZE(list) != (Py_ssize_t)machine->m.ncpus) {
            PyErr_SetString(PyExc_ValueError, "one eventfd per CPU");
            return NULL;
        }
        fds = PyMem_Malloc(sizeof *fds * machine->m.ncpus);
        if (!fds)
            return PyErr_NoMemory();
        for (i = 0; i < (Py_ssize_t)machine->m.ncpus; i++)
            fds[i] = (int)PyLong_AsLong(PyList_GET_ITEM(list, i));
    }
    int err = PyErr_Occurred() ? -EINVAL : shi_doorbell_open(&machine->m, prefix, fds);
    PyMem_Free(fds);
    if (err)
        return PyErr_Occurred() ? NULL : shi_os_error(-err, prefix);
    Py_RETURN_NONE;
}

/* adopt_doorbells(fds): of a machine that runs.  Those of queues are ours from now on. */
METHOD(adopt_doorbells)
{
    Machine *machine = MACHINE(object);
    Py_ssize_t i, n = PyList_Check(arg) ? PyList_GET_SIZE(arg) : -1;
    bool wanted = machine->m.doorbell == SHI_DB_EVENTFD || machine->m.doorbell == SHI_DB_SEM ||
                  machine->m.doorbell == SHI_DB_MQUEUE;
    if (n != (wanted ? (Py_ssize_t)machine->m.ncpus : 0)) {
        PyErr_SetString(PyExc_ValueError, "one descriptor for each CPU that needs one");
        return NULL;
    }
    int *fds = PyMem_Calloc((size_t)n + 1, sizeof *fds);
    if (!fds)
        return PyErr_NoMemory();
    for (i = 0; i < n; i++)
        fds[i] = (int)PyLong_AsLong(PyList_GET_ITEM(arg, i));
    int err = PyErr_Occurred() ? -EINVAL : shi_doorbell_adopt(&machine->m, fds);
    PyMem_Free(fds);
    if (err)
        return PyErr_Occurred() ? NULL : shi_os_error(-err, "the machine's doorbells");
    Py_RETURN_NONE;
}

/* doorbell_fds() -> descriptors that stand for doorbells here, one for each CPU, or none. */
METHOD(doorbell_fds)
{
    const struct shi_machine *m = &MACHINE(object)->m;
    const int *fds = m->eventfds ? m->eventfds : m->mqueues;
    Py_ssize_t i, n = fds ? (Py_ssize_t)m->ncpus : 0;
    (void)arg;
    PyObject *list = PyList_New(n);
    for (i = 0; list && i < n; i++) {
        PyObject *fd = PyLong_FromLong(fds[i]);
        if (!fd)
            Py_CLEAR(list);
        else
            PyList_SET_ITEM(list, i, fd);
    }
    return list;
}

PyMethodDef shi_doorbell_methods[] = {
    MANY(open_doorbells, "open_doorbells(prefix, eventfds)"),
    ONE(adopt_doorbells, "adopt_doorbells(fds): a guest's"),
    NOARGS(doorbell_fds, "Descriptors that stand for doorbells here."),
    { NULL, NULL, 0, NULL },
};
