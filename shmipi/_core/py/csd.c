/* SPDX-License-Identifier: MIT */
/* CallSingleData: a request that its caller owns, and smp_call_function_single_async. */
#include "py/csd.h"

#include "py/call.h"
#include "py/outgoing.h"
#include "py/tables.h"
#include "py/wait.h"
#include "py/trace.h"

typedef struct {
    PyObject_HEAD
    Machine *machine;
    uint32_t local;
    PyObject *function, *info;
} CallSingleData;

static PyTypeObject *csd_type;

static PyObject *csd_make(Machine *machine, PyObject *function, PyObject *info)
{
    struct outgoing out;
    if (shi_outgoing_info(machine, &out, function, info) < 0)
        return NULL;
    int64_t local = shi_outgoing_prepare(machine, &out);
    shi_outgoing_clear(machine, &out);
    if (local < 0)
        return NULL;
    CallSingleData *csd = PyObject_GC_New(CallSingleData, csd_type);
    if (!csd) {
        shi_call_end(&machine->self, (uint32_t)local);
        return NULL;
    }
    csd->machine = (Machine *)Py_NewRef((PyObject *)machine);
    csd->local = (uint32_t)local;
    csd->function = Py_NewRef(function);
    csd->info = Py_NewRef(info);
    PyObject_GC_Track(csd);
    return (PyObject *)csd;
}

static PyObject *csd_new(PyTypeObject *type, PyObject *args, PyObject *kwargs)
{
    static char *names[] = { "func", "info", "machine", NULL };
    PyObject *function, *info = Py_None, *machine = NULL;
    (void)type;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "O|O$O:CallSingleData", names, &function,
                                     &info, &machine))
        return NULL;
    if (machine == Py_None)
        machine = NULL;
    if (machine && Py_TYPE(machine) != shi_machine_type)
        return PyErr_Format(PyExc_TypeError, "machine is a Machine or None, not %R",
                            Py_TYPE(machine));
    Machine *m = machine ? (Machine *)machine : shi_use_current();
    if (!m || shi_use(m) < 0)
        return NULL;
    return csd_make(m, function, info);
}

static int csd_traverse(PyObject *self, visitproc visit, void *arg)
{
    CallSingleData *csd = (CallSingleData *)self;
    Py_VISIT(Py_TYPE(self));
    Py_VISIT(csd->machine);
    Py_VISIT(csd->function);
    Py_VISIT(csd->info);
    return 0;
}

static void csd_dealloc(PyObject *self)
{
    CallSingleData *csd = (CallSingleData *)self;
    PyTypeObject *type = Py_TYPE(self);
    PyObject_GC_UnTrack(self);
    if (csd->machine && !shi_gone(csd->machine)) {
        if (shi_other_thread(csd->machine))
            shi_late(csd->machine, csd->local, true);
        else if (shi_csd_locked(shi_own_csd(&csd->machine->self, csd->local)))
            shi_leave_behind(csd->machine, csd->local);
        else
            shi_call_end(&csd->machine->self, csd->local);
    }
    Py_XDECREF(csd->machine);
    Py_XDECREF(csd->function);
    Py_XDECREF(csd->info);
    type->tp_free(self);
    Py_DECREF(type);
}

static bool is_locked(const CallSingleData *csd)
{
    return !shi_gone(csd->machine) &&
           shi_csd_locked(shi_own_csd(&csd->machine->self, csd->local));
}

static PyObject *csd_repr(PyObject *self)
{
    const CallSingleData *csd = (CallSingleData *)self;
    return PyUnicode_FromFormat("<CallSingleData func=%R locked=%s>", csd->function,
                                is_locked(csd) ? "True" : "False");
}

static PyObject *csd_get_locked(PyObject *self, void *unused)
{
    (void)unused;
    return PyBool_FromLong(is_locked((CallSingleData *)self));
}

static PyObject *csd_get_func(PyObject *self, void *unused)
{
    (void)unused;
    return Py_NewRef(((CallSingleData *)self)->function);
}

static PyObject *csd_get_info(PyObject *self, void *unused)
{
    (void)unused;
    return Py_NewRef(((CallSingleData *)self)->info);
}

/* INIT_CSD(csd, func, info=None) */
static PyObject *csd_init(PyObject *module, PyObject *const *args, Py_ssize_t nargs,
                          PyObject *kwnames)
{
    static const char *const names[] = { "csd", "func", "info" };
    PyObject *a[3];
    (void)module;
    if (shi_parse("INIT_CSD", names, 2, 3, args, nargs, kwnames, a) < 0)
        return NULL;
    if (Py_TYPE(a[0]) != csd_type)
        return PyErr_Format(PyExc_TypeError, "csd is a CallSingleData, not %R", Py_TYPE(a[0]));
    CallSingleData *csd = (CallSingleData *)a[0];
    if (shi_use(csd->machine) < 0)
        return NULL;
    CallSingleData *fresh =
        (CallSingleData *)csd_make(csd->machine, a[1], a[2] ? a[2] : Py_None);
    if (!fresh)
        return NULL;
    if (is_locked(csd)) { /* the kernel would overwrite it under its target's hands */
        Py_DECREF(fresh);
        return shi_raise_errno(csd->machine, -EBUSY, -1);
    }
    const CallSingleData old = *csd;
    csd->local = fresh->local;
    csd->function = fresh->function;
    csd->info = fresh->info;
    fresh->local = old.local; /* and goes with it */
    fresh->function = old.function;
    fresh->info = old.info;
    Py_DECREF(fresh);
    Py_RETURN_NONE;
}

PyMethodDef shi_csd_functions[] = {
    { "INIT_CSD", FAST(csd_init), METH_FASTCALL | METH_KEYWORDS,
      "INIT_CSD(csd, func, info=None)\n--\n\n"
      "Make a CallSingleData one of `func` and `info`, as CallSingleData() does.\n"
      "CsdBusyError (EBUSY) while it is in use.  linux/smp.h." },
    { NULL, NULL, 0, NULL },
};

static PyGetSetDef csd_getset[] = {
    { "locked", csd_get_locked, NULL, "True while a submission of it has not been taken up.",
      NULL },
    { "func", csd_get_func, NULL, "The function.", NULL },
    { "info", csd_get_info, NULL, "Its argument, as it was when this was made.", NULL },
    { NULL, NULL, NULL, NULL, NULL },
};

static PyType_Slot csd_slots[] = {
    { Py_tp_new, csd_new },
    { Py_tp_dealloc, csd_dealloc },
    { Py_tp_traverse, csd_traverse },
    { Py_tp_repr, csd_repr },
    { Py_tp_getset, csd_getset },
    { Py_tp_doc,
      "CallSingleData(func, info=None, *, machine=None)\n--\n\n"
      "A caller-owned request (the kernel's call_single_data_t).\n\n"
      "`func` and `info` are pickled and registered now, so that submitting it never\n"
      "allocates and never blocks.  It may be submitted again as soon as `locked` is False.\n"
      "`machine` is what cluster.smp.CallSingleData fills in." },
    { 0, NULL },
};
static PyType_Spec csd_spec = {
    .name = "shmipi._core.CallSingleData",
    .basicsize = sizeof(CallSingleData),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC,
    .slots = csd_slots,
};

int shi_csd_types(PyObject *module)
{
    if (!csd_type)
        csd_type = (PyTypeObject *)PyType_FromSpec(&csd_spec);
    return csd_type ? PyModule_AddObjectRef(module, "CallSingleData", (PyObject *)csd_type)
                    : -1;
}

/* A csd of this machine's that nobody uses: NULL with an exception. */
static CallSingleData *free_csd(Machine *machine, PyObject *object, int64_t cpu)
{
    if (Py_TYPE(object) != csd_type)
        return (CallSingleData *)PyErr_Format(
            PyExc_TypeError, "csd is a CallSingleData, not %R", Py_TYPE(object));
    CallSingleData *csd = (CallSingleData *)object;
    if (csd->machine != machine) {
        PyErr_SetString(PyExc_ValueError, "this CallSingleData belongs to another machine");
        return NULL;
    }
    if (shi_csd_locked(shi_own_csd(&machine->self, csd->local)))
        return (CallSingleData *)shi_raise_errno(machine, -EBUSY, (int)cpu);
    return csd;
}

PyObject *shi_stop_nowait(Machine *machine, PyObject *const *args, Py_ssize_t nargs)
{
    struct shi_self *self = &machine->self;
    int64_t cpu;
    if (shi_use(machine) < 0)
        return NULL;
    if (nargs != 2) {
        PyErr_SetString(PyExc_TypeError, "stop_nowait(cpu, csd)");
        return NULL;
    }
    if (shi_as_cpu(args[0], &cpu) < 0)
        return NULL;
    CallSingleData *csd = free_csd(machine, args[1], cpu);
    if (!csd)
        return NULL;
    if (cpu < 0 || cpu >= machine->m.ncpus)
        return shi_raise_errno(machine, -ENXIO, (int)cpu);
    shi_say_call(machine, csd->function);
    shi_enter(self);
    int err = shi_call_single(self, csd->local, SHI_CSD_STOP_NOWAIT, (uint32_t)cpu);
    shi_leave(self);
    shi_call_said(machine);
    if (err && err != -ENXIO)
        return shi_raise_errno(machine, err, (int)cpu);
    return PyBool_FromLong(!err);
}

PyObject *shi_single_async(Machine *machine, PyObject *const *args, Py_ssize_t nargs,
                           PyObject *kwnames)
{
    static const char *const names[] = { "cpu", "csd" };
    PyObject *a[2];
    int64_t cpu;
    if (shi_parse("smp_call_function_single_async", names, 2, 2, args, nargs, kwnames, a) < 0 ||
        shi_as_cpu(a[0], &cpu) < 0)
        return NULL;
    CallSingleData *csd = free_csd(machine, a[1], cpu);
    struct shi_self *self = &machine->self;
    if (!csd)
        return NULL;
    shi_count(self, SHI_C_calls_single);
    if (!self->host && cpu == self->id) {
        if (shi_run_local(machine, csd->function, csd->info, false) < 0)
            return NULL;
        Py_RETURN_NONE;
    }
    if (cpu < 0 || cpu >= machine->m.ncpus)
        return shi_raise_errno(machine, -ENXIO, (int)cpu);
    shi_say_call(machine, csd->function);
    shi_enter(self);
    int err = shi_call_single(self, csd->local, SHI_CSD_ASYNC, (uint32_t)cpu);
    shi_leave(self);
    shi_call_said(machine);
    if (err)
        return shi_raise_errno(machine, err, (int)cpu);
    Py_RETURN_NONE;
}
