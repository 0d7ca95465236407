/* SPDX-License-Identifier: MIT */
/* Doorbells, opened at boot or adopted from a machine that runs. */
#include "py/base.h"

#include "irq/doorbell.h"
#include "py/tables.h"

/* The descriptors in a list of one for each CPU, or of none where none are `wanted`. */
static int *fds_of(const Machine *machine, PyObject *list, bool wanted)
{
    Py_ssize_t i, n = PyList_Check(list) ? PyList_GET_SIZE(list) : -1;
    if (n != (wanted ? (Py_ssize_t)machine->m.ncpus : 0)) {
        PyErr_SetString(PyExc_ValueError, "one descriptor for each CPU that needs one");
        return NULL;
    }
    int *fds = PyMem_Calloc((size_t)n + 1, sizeof *fds);
    if (!fds) {
        PyErr_NoMemory();
        return NULL;
    }
    for (i = 0; i < n && !PyErr_Occurred(); i++)
        fds[i] = (int)PyLong_AsLong(PyList_GET_ITEM(list, i));
    if (PyErr_Occurred()) {
        PyMem_Free(fds);
        return NULL;
    }
    return fds;
}

METHOD(open_doorbells)
{
    Machine *machine = MACHINE(object);
    const char *prefix;
    PyObject *list;
    if (!PyArg_ParseTuple(arg, "sO", &prefix, &list))
        return NULL;
    int *fds = fds_of(machine, list, shi_doorbell_of(&machine->m)->by_fds);
    if (!fds)
        return NULL;
    int err = shi_doorbell_open(&machine->m, prefix, fds);
    PyMem_Free(fds);
    if (err)
        return shi_os_error(-err, prefix);
    Py_RETURN_NONE;
}

/* adopt_doorbells(fds): of a machine that runs. */
METHOD(adopt_doorbells)
{
    Machine *machine = MACHINE(object);
    int *fds = fds_of(machine, arg, shi_doorbell_of(&machine->m)->adopt != NULL);
    if (!fds)
        return NULL;
    int err = shi_doorbell_adopt(&machine->m, fds);
    PyMem_Free(fds);
    if (err)
        return shi_os_error(-err, "the machine's doorbells");
    Py_RETURN_NONE;
}

/* doorbell_fds() -> descriptors that stand for doorbells here, one for each CPU, or none. */
METHOD(doorbell_fds)
{
    const struct shi_machine *m = &MACHINE(object)->m;
    const struct shi_doorbell_ops *ops = shi_doorbell_of(m);
    Py_ssize_t i, n = ops->fd && m->bells ? (Py_ssize_t)m->ncpus : 0;
    (void)arg;
    PyObject *list = PyList_New(n);
    for (i = 0; list && i < n; i++) {
        PyObject *fd = PyLong_FromLong(ops->fd(m, (uint32_t)i));
        if (!fd)
            Py_CLEAR(list);
        else
            PyList_SET_ITEM(list, i, fd);
    }
    return list;
}

/* (name, by_signal, by_fds, whether a guest is handed descriptors) of each, by number. */
int shi_doorbell_names(PyObject *module)
{
    PyObject *table = PyTuple_New(SHI_DB_COUNT);
    for (Py_ssize_t i = 0; table && i < SHI_DB_COUNT; i++) {
        const struct shi_doorbell_ops *ops = shi_doorbells[i];
        PyObject *row = Py_BuildValue("(sNNN)", ops->name, PyBool_FromLong(ops->by_signal),
                                      PyBool_FromLong(ops->by_fds),
                                      PyBool_FromLong(ops->adopt != NULL));
        if (!row)
            Py_CLEAR(table);
        else
            PyTuple_SET_ITEM(table, i, row);
    }
    int err = table ? PyModule_AddObjectRef(module, "DOORBELLS", table) : -1;
    Py_XDECREF(table);
    return err;
}

PyMethodDef shi_doorbell_methods[] = {
    MANY(open_doorbells, "open_doorbells(prefix, fds)"),
    ONE(adopt_doorbells, "adopt_doorbells(fds): a guest's"),
    NOARGS(doorbell_fds, "Descriptors that stand for doorbells here."),
    { NULL, NULL, 0, NULL },
};
