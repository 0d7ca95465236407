/* SPDX-License-Identifier: MIT */
/* smp_call_function_many_cond and everything over it. */
#include "py/many.h"

#include "base/trace.h"
#include "py/call.h"
#include "py/native.h"
#include "py/outgoing.h"
#include "py/result.h"
#include "py/wait.h"

/* cond_func(cpu, info). */
struct asked {
    PyObject *function, *info;
};

static int ask(void *arg, uint32_t cpu)
{
    const struct asked *cond = arg;
    PyObject *yes = PyObject_CallFunction(cond->function, "IO", (unsigned)cpu, cond->info);
    int truth = yes ? PyObject_IsTrue(yes) : -1;
    Py_XDECREF(yes);
    return truth < 0 ? -EINTR : truth; /* an exception is set */
}

static int add_failure(PyObject **failures, PyObject *error)
{
    if (!*failures && !(*failures = PyList_New(0)))
        return -1;
    return PyList_Append(*failures, error);
}

/* Wait for all; what they failed with goes to a list, by CPU.  `own` (a reference that is
 * taken over, or NULL) is what failed here.  0, or -1 with an exception: the wait was
 * interrupted. */
static int many_wait(Machine *machine, const struct shi_many *many, PyObject **failures,
                     PyObject *own)
{
    uint32_t i;
    int err = 0;
    for (i = 0; i < many->queued; i++) {
        uint32_t local = many->locals[i], cpu = many->cpus[i];
        if (err) { /* interrupted: leave the rest behind, safely */
            shi_leave_behind(machine, local);
            continue;
        }
        if (shi_wait_csd(machine, local, cpu, 0) < 0) {
            err = -1;
            continue;
        }
        PyObject *none = shi_result(machine, local, cpu, SHI_A_INFO);
        shi_call_end(&machine->self, local);
        PyObject *error = none ? NULL : shi_take_exception();
        Py_XDECREF(none);
        if (error && own && cpu > machine->self.id) {
            err = add_failure(failures, own);
            Py_CLEAR(own);
        }
        if (error && !err)
            err = add_failure(failures, error);
        Py_XDECREF(error);
    }
    if (own && !err)
        err = add_failure(failures, own);
    Py_XDECREF(own);
    return err;
}

/* What one CPU failed with is raised as it is, of several a group.  All have run. */
static void raise_failures(PyObject *failures)
{
    PyObject *error = Py_NewRef(PyList_GET_ITEM(failures, 0));
    if (PyList_GET_SIZE(failures) > 1) {
        PyObject *group =
            PyObject_CallFunction(shi_py.GroupError, "sO", "several CPUs failed", failures);
        if (group)
            Py_SETREF(error, group);
        else
            PyErr_Clear(); /* an error among them that is no Exception */
    }
    shi_put_exception(error);
}

static int call_many(Machine *machine, uint32_t *mask, uint32_t n, PyObject *function,
                     PyObject *info, bool wait, bool run_self, PyObject *cond)
{
    struct shi_self *self = &machine->self;
    struct outgoing out;
    struct asked asked = { cond, info };
    struct shi_many many = { .mask = mask,
                             .n = n,
                             .cond = cond ? ask : NULL,
                             .cond_arg = &asked,
                             .waiter = &shi_python_waiter,
                             .arg = machine };
    PyObject *failures = NULL;
    bool self_in_mask = false;
    int err = -1;
    uint32_t i;
    if (shi_check_context(machine) < 0)
        return -1;
    shi_count(self, SHI_C_calls_many);
    SHI_TRACE(self, call_entry, n ? mask[0] : self->id, 0, 0, SHI_E_MANY);
    for (i = 0; i < n; i++)
        self_in_mask |= !self->host && mask[i] == self->id;
    many.cpus = PyMem_Malloc(sizeof(uint32_t) * (3 * (size_t)n + 1));
    if (!many.cpus) {
        PyErr_NoMemory();
        return -1;
    }
    many.locals = many.cpus + n;
    many.ipis = many.locals + n;
    if (shi_outgoing_info(machine, &out, function, info) < 0)
        goto done;
    err = shi_call_many(self, &many, &out.call, wait);
    if (err && err != -EINTR) {
        if (err == -EAGAIN)
            shi_raise_errno(machine, err, -1);
        else
            shi_raise_post(machine, &out, err, (int)many.at);
    }
    shi_outgoing_clear(machine, &out);
    PyObject *failure = NULL, *own = NULL;
    if (!err && run_self && self_in_mask) {
        int truth = cond ? ask(&asked, self->id) : 1;
        /* Runs while the others do: after the doorbells, before the wait. */
        if (truth < 0)
            failure = shi_take_exception();
        else if (truth && shi_run_local(machine, function, info, wait) < 0)
            own = shi_take_exception();
    } else if (err) {
        failure = shi_take_exception();
    }
    if (!wait)
        many.queued = 0;
    err = many_wait(machine, &many, &failures, own);
    if (failure) { /* of sending, not of the function: it did not go to all */
        PyErr_Clear();
        shi_put_exception(failure);
        err = -1;
    } else if (!err && failures) {
        raise_failures(failures);
        err = -1;
    }
done:
    Py_XDECREF(failures);
    PyMem_Free(many.cpus);
    return err;
}

/* lockdep_assert_preemption_disabled(): another CPU of the mask could go offline, or this be
 * another CPU, in the middle.  The host is no CPU, and an interrupt handler is not preempted. */
static int assert_preemption_disabled(const Machine *machine)
{
    static bool given;
    const struct shi_self *self = &machine->self;
    if (self->host || self->preempt || self->irqs_off || shi_in_interrupt(self))
        return 0;
    return shi_warn_once(&given,
                         "smp_call_function_many() with preemption enabled: it belongs between "
                         "preempt_disable() and preempt_enable()");
}

static PyObject *run_many(Machine *machine, PyObject *mask, PyObject *function, PyObject *info,
                          PyObject *wait_arg, bool run_self, PyObject *cond)
{
    uint32_t *cpus, n;
    int wait = shi_as_bool(wait_arg, 1);
    if (wait < 0)
        return NULL;
    if (!PyCallable_Check(function) && Py_TYPE(function) != shi_native_type)
        return PyErr_Format(PyExc_TypeError, "%R is not callable", function);
    if (cond && !PyCallable_Check(cond))
        return PyErr_Format(PyExc_TypeError, "cond_func: %R is not callable", cond);
    if (shi_as_mask(machine, mask, &cpus, &n) < 0)
        return NULL;
    int err =
        call_many(machine, cpus, n, function, info ? info : Py_None, wait, run_self, cond);
    PyMem_Free(cpus);
    if (err < 0)
        return NULL;
    Py_RETURN_NONE;
}

/* (mask, func, info, wait), or without a mask: all online CPUs. */
static PyObject *family(Machine *machine, const char *name, bool masked, bool run_self,
                        PyObject *const *args, Py_ssize_t nargs, PyObject *kwnames)
{
    static const char *const names[] = { "mask", "func", "info", "wait" };
    PyObject *a[4] = { NULL, NULL, NULL, NULL };
    int skip = !masked;
    if (shi_parse(name, names + skip, 2 - skip, 4 - skip, args, nargs, kwnames, a + skip) < 0 ||
        /* smp_call_function_many(); the others disable preemption themselves */
        (masked && !run_self && assert_preemption_disabled(machine) < 0))
        return NULL;
    return run_many(machine, a[0], a[1], a[2], a[3], run_self, NULL);
}

#define FAMILY(function, name, masked, run_self)                                               \
    PyObject *function(Machine *machine, PyObject *const *args, Py_ssize_t nargs,              \
                       PyObject *kwnames)                                                      \
    {                                                                                          \
        return family(machine, name, masked, run_self, args, nargs, kwnames);                  \
    }
FAMILY(shi_call_mask, "smp_call_function_many", true, false)
FAMILY(shi_call_others, "smp_call_function", false, false)
FAMILY(shi_each_cpu, "on_each_cpu", false, true)
FAMILY(shi_each_cpu_mask, "on_each_cpu_mask", true, true)

PyObject *shi_each_cpu_cond_mask(Machine *machine, PyObject *const *args, Py_ssize_t nargs,
                                 PyObject *kwnames)
{
    static const char *const names[] = { "cond_func", "func", "info", "wait", "mask" };
    PyObject *a[5];
    if (shi_parse("on_each_cpu_cond_mask", names, 2, 5, args, nargs, kwnames, a) < 0)
        return NULL;
    return run_many(machine, a[4] == Py_None ? NULL : a[4], a[1], a[2], a[3], true, a[0]);
}
