/* SPDX-License-Identifier: MIT */
/* NativeHandler: a C function in the place of a Python one. */
#include "py/native.h"

#include "base/native.h"
#include "py/tables.h"
#include "measure/replay.h"
#include "measure/wakes.h"
#include "users/users.h"

PyTypeObject *shi_native_type;

static PyObject *native_new(PyTypeObject *type, PyObject *args, PyObject *kwargs)
{
    static char *names[] = { "name", NULL };
    PyObject *name;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "U:NativeHandler", names, &name))
        return NULL;
    const char *utf8 = PyUnicode_AsUTF8(name);
    if (!utf8)
        return NULL;
    int index = shi_native_find(utf8);
    if (index < 0 && strchr(utf8, ':')) {
        /* As given to Cluster, which keeps the absolute path. */
        PyObject *path = shi_import("os.path");
        PyObject *full = path ? PyObject_CallMethod(path, "abspath", "O", name) : NULL;
        const char *text = full ? PyUnicode_AsUTF8(full) : NULL;
        if (text)
            index = shi_native_find(text);
        Py_XDECREF(full);
        Py_XDECREF(path);
        if (!text)
            return NULL;
    }
    if (index < 0)
        return PyErr_Format(
            PyExc_LookupError,
            "no native handler %R: built-in ones are noop, count, stamp and burn; "
            "others are named in Cluster(handlers=...)",
            name);
    NativeHandler *handler = (NativeHandler *)type->tp_alloc(type, 0);
    if (!handler)
        return NULL;
    handler->index = (uint32_t)index;
    handler->name = Py_NewRef(name);
    return (PyObject *)handler;
}

static void native_dealloc(PyObject *object)
{
    PyTypeObject *type = Py_TYPE(object);
    Py_XDECREF(((NativeHandler *)object)->name);
    type->tp_free(object);
    Py_DECREF(type);
}

static PyObject *native_repr(PyObject *object)
{
    return PyUnicode_FromFormat("NativeHandler(%R)", ((NativeHandler *)object)->name);
}

static PyObject *native_reduce(PyObject *object, PyObject *unused)
{
    (void)unused;
    return Py_BuildValue("O(O)", Py_TYPE(object), ((NativeHandler *)object)->name);
}

int64_t shi_native_number(const Machine *machine, PyObject *handler)
{
    uint32_t index = ((NativeHandler *)handler)->index;
    if (!machine->natives)
        return index;
    if (index < SHI_NATIVE_MAX && machine->natives[index])
        return machine->natives[index] - 1;
    PyErr_Format(PyExc_LookupError,
                 "%R: the machine %s was not booted with this native handler (its owner names "
                 "them in Cluster(handlers=...))",
                 handler, machine->m.header->name);
    return -1;
}

int shi_native_or_none(const Machine *machine, PyObject *handler, int64_t *number)
{
    if (handler == Py_None)
        return 0;
    if (!PyObject_TypeCheck(handler, shi_native_type)) {
        PyErr_SetString(PyExc_TypeError, "a NativeHandler, or None");
        return -1;
    }
    *number = shi_native_number(machine, handler);
    return *number < 0 ? -1 : 0;
}

static PyMethodDef native_methods[] = {
    { "__reduce__", native_reduce, METH_NOARGS, NULL },
    { NULL, NULL, 0, NULL },
};
static PyType_Slot native_slots[] = {
    { Py_tp_new, native_new },
    { Py_tp_dealloc, native_dealloc },
    { Py_tp_repr, native_repr },
    { Py_tp_methods, native_methods },
    { Py_tp_doc,
      "NativeHandler(name)\n--\n\n"
      "A C function in the role of an IPI handler: give it where a function goes.\n\n"
      "`name`: noop, count (adds 1 to a 64-bit word), stamp, burn (spins for as many ns\n"
      "as its argument says), or `FILE.so:symbol` as "
      "given to\nCluster(handlers=...)." },
    { 0, NULL },
};
static PyType_Spec native_spec = {
    .name = "shmipi._core.NativeHandler",
    .basicsize = sizeof(NativeHandler),
    .flags = Py_TPFLAGS_DEFAULT,
    .slots = native_slots,
};

static PyObject *native_load(PyObject *module, PyObject *arg)
{
    char why[512];
    const char *spec = PyUnicode_AsUTF8(arg);
    (void)module;
    if (!spec || shi_bound() < 0)
        return NULL;
    int err = shi_native_load(spec, why, sizeof why);
    if (err < 0)
        return shi_raise(shi_py.BootError, -err, -1, "native handler %s: %s", spec, why);
    return PyLong_FromLong(err);
}

static PyObject *native_name(PyObject *module, PyObject *arg)
{
    const char *name = PyUnicode_AsUTF8(arg);
    (void)module;
    if (!name || shi_bound() < 0)
        return NULL;
    int err = shi_native_name(name);
    if (err < 0)
        return shi_raise(shi_py.BootError, -err, -1, "native handler %s: too many handlers",
                         name);
    return PyLong_FromLong(err);
}

/* Every name this process has numbered, in order: a firmware numbers them alike. */
static PyObject *native_names(PyObject *module, PyObject *unused)
{
    uint32_t i;
    const char *name;
    (void)module;
    (void)unused;
    PyObject *list = PyList_New(0);
    for (i = 0; list && (name = shi_native_name_of(i)); i++) {
        PyObject *text = PyUnicode_FromString(name);
        if (!text || PyList_Append(list, text) < 0)
            Py_CLEAR(list);
        Py_XDECREF(text);
    }
    return list;
}

/* map_natives(numbers): numbers[n] is ours of what the machine calls native handler n. */
METHOD(map_natives)
{
    Machine *machine = MACHINE(object);
    Py_ssize_t i, n = PyList_Check(arg) ? PyList_GET_SIZE(arg) : -1;
    if (n < 0 || n > SHI_NATIVE_MAX) {
        PyErr_SetString(PyExc_ValueError, "a list of numbers");
        return NULL;
    }
    uint32_t *natives = PyMem_Calloc(SHI_NATIVE_MAX, sizeof *natives);
    if (!natives)
        return PyErr_NoMemory();
    for (i = 0; i < n; i++) {
        unsigned long ours = PyLong_AsUnsignedLong(PyList_GET_ITEM(arg, i));
        if (!PyErr_Occurred() && ours < SHI_NATIVE_MAX)
            natives[ours] = (uint32_t)i + 1;
    }
    PyMem_Free(machine->natives);
    machine->natives = natives;
    if (PyErr_Occurred())
        return NULL;
    Py_RETURN_NONE;
}

PyMethodDef shi_native_methods[] = {
    ONE(map_natives, "map_natives(numbers): ours of the machine's native handlers, in order"),
    { NULL, NULL, 0, NULL },
};

PyMethodDef shi_native_functions[] = {
    { "native_names", native_names, METH_NOARGS, "native_names() -> list" },
    { "native_load", native_load, METH_O, "native_load(spec) -> index" },
    { "native_name", native_name, METH_O, "native_name(spec) -> index, without loading it" },
    { NULL, NULL, 0, NULL },
};

int shi_native_types(PyObject *module)
{
    shi_native_init();
    shi_users_init();
    shi_wakes_register();
    shi_replay_register();
    if (!shi_native_type)
        shi_native_type = (PyTypeObject *)PyType_FromSpec(&native_spec);
    return shi_native_type
               ? PyModule_AddObjectRef(module, "NativeHandler", (PyObject *)shi_native_type)
               : -1;
}
