/* SPDX-License-Identifier: MIT */
/* smp_call_function_single, smp_send_reschedule and resched_cpu. */
#include "py/call.h"

#include "irq/chip.h"
#include "base/native.h"
#include "smp/sched.h"
#include "py/entry.h"
#include "py/native.h"
#include "py/outgoing.h"
#include "py/result.h"
#include "py/wait.h"
#include "py/trace.h"

static bool warned_irqs_off, warned_in_interrupt;

static const char irqs_off_text[] =
    "an IPI is sent and waited for with interrupts disabled: two CPUs that do this to each "
    "other wait for ever";
static const char in_interrupt_text[] =
    "an IPI is sent and waited for in interrupt context (an IPI handler, or a softirq): use "
    "smp_call_function_single_async there";

int shi_check_context(const Machine *machine)
{
    const struct shi_self *self = &machine->self;
    if (self->host)
        return 0;
    if (!shi_in_task(self))
        return shi_warn_once(&warned_in_interrupt, in_interrupt_text);
    /* Not of a CPU that is offline, or has died: nobody sends to it and waits. */
    if (self->irqs_off && shi_word_online(shi_load_relaxed(&self->slot->word)))
        return shi_warn_once(&warned_irqs_off, irqs_off_text);
    return 0;
}

/* ---- the self branch ------------------------------------------------------------- */

/* func(info) here, with interrupts off: no csd, no doorbell.  The exception, if any, is
 * the waiter's as it would be from another CPU. */
int shi_run_local(Machine *machine, PyObject *function, PyObject *info, bool wait)
{
    struct shi_self *self = &machine->self;
    shi_count(self, SHI_C_calls_self);
    uint8_t flags = shi_irq_save(self);
    int err = 0;
    uint32_t called = shi_called(machine, function);
    SHI_TRACE(self, csd_function_entry, self->id, 0, called, 0);
    if (Py_TYPE(function) == shi_native_type) {
        struct outgoing out;
        err = shi_outgoing_info(machine, &out, function, info);
        shi_native_handler *native = shi_native_get(((NativeHandler *)function)->index);
        if (!err && native)
            native(out.call.kind == SHI_K_INT ? (void *)(intptr_t)out.call.value.i
                   : out.call.kind == SHI_K_POINTER
                       ? (void *)(machine->m.base + out.call.value.u)
                   : out.call.kind == SHI_K_BYTES ? (void *)out.call.value.bytes
                                                  : NULL);
    } else {
        PyObject *result = PyObject_CallOneArg(function, info);
        if (!result) {
            PyObject *error = shi_take_exception();
            if (wait) {
                PyObject *bytes = PyObject_CallOneArg(shi_py.dump_exception, error);
                PyObject *remote = bytes ? PyObject_CallFunction(shi_py.load_exception, "Ni",
                                                                 bytes, (int)self->id)
                                         : NULL;
                shi_put_exception(remote);
                err = -1;
            } else {
                PyErr_SetObject((PyObject *)Py_TYPE(error), error);
                shi_count(self, SHI_C_unraisable);
                PyErr_WriteUnraisable(function);
            }
            Py_XDECREF(error);
        }
        Py_XDECREF(result);
    }
    SHI_TRACE(self, csd_function_exit, self->id, 0, called, 0);
    shi_irq_restore(self, flags);
    if (shi_python_waits(self) && !shi_masked(self)) {
        PyObject *error = err ? shi_take_exception() : NULL;
        shi_take_deferred(machine);
        shi_put_exception(error);
    }
    return err;
}

/* ---- smp_call_function_single ---------------------------------------------------- */

/* What is left of a waiting call once it is queued. */
static PyObject *finish_single(Machine *machine, uint32_t local, uint32_t cpu)
{
    if (shi_wait_csd(machine, local, cpu, 0) < 0)
        return NULL;
    PyObject *result = shi_result(machine, local, cpu, SHI_A_INFO);
    shi_call_end(&machine->self, local);
    return result;
}

/*
 * The common call: plain positional arguments, a function that is known, an argument that
 * fits the csd.  1: done, `result` is the answer; 0: the general way has to do it.
 */
static int quick_single(Machine *machine, PyObject *const *args, Py_ssize_t nargs,
                        PyObject **result)
{
    struct shi_self *self = &machine->self;
    struct outgoing out;
    bool wait = nargs < 4 || args[3] == Py_True;
    *result = NULL;
    if (nargs < 2 || nargs > 4 || (!wait && args[3] != Py_False) ||
        !PyLong_CheckExact(args[0]) || self->in_irq || self->irqs_off || self->softirq)
        return 0;
    long cpu = PyLong_AsLong(args[0]);
    if (cpu < 0 || cpu >= (long)machine->m.ncpus || (!self->host && cpu == (long)self->id)) {
        PyErr_Clear();
        return 0;
    }
    int ready = shi_outgoing_inline(machine, &out, args[1], nargs > 2 ? args[2] : Py_None);
    if (ready <= 0)
        return ready < 0;
    SHI_TRACE(self, call_entry, (uint32_t)cpu, 0, 0, SHI_E_SINGLE);
    int64_t local =
        shi_outgoing_post(machine, &out, wait ? SHI_CSD_SYNC : SHI_CSD_ASYNC, (uint32_t)cpu);
    shi_call_said(machine);
    if (local >= 0)
        *result = wait ? finish_single(machine, (uint32_t)local, (uint32_t)cpu)
                       : Py_NewRef(Py_None);
    return 1;
}

PyObject *shi_single(Machine *machine, PyObject *const *args, Py_ssize_t nargs,
                     PyObject *kwnames)
{
    static const char *const names[] = { "cpu", "func", "info", "wait" };
    PyObject *a[4], *quick;
    struct outgoing out;
    int64_t cpu;
    if (!kwnames && quick_single(machine, args, nargs, &quick))
        return quick;
    if (shi_parse("smp_call_function_single", names, 2, 4, args, nargs, kwnames, a) < 0)
        return NULL;
    PyObject *info = a[2] ? a[2] : Py_None;
    int wait = shi_as_bool(a[3], 1);
    if (wait < 0 || shi_as_cpu(a[0], &cpu) < 0 || shi_check_context(machine) < 0)
        return NULL;
    struct shi_self *self = &machine->self;
    if (!self->host && cpu == self->id) {
        shi_count(self, SHI_C_calls_single);
        if (!PyCallable_Check(a[1]) && Py_TYPE(a[1]) != shi_native_type)
            return PyErr_Format(PyExc_TypeError, "%R is not callable", a[1]);
        if (shi_run_local(machine, a[1], info, wait) < 0)
            return NULL;
        Py_RETURN_NONE;
    }
    if (cpu < 0 || cpu >= machine->m.ncpus) {
        shi_count(self, SHI_C_calls_single);
        return shi_raise_errno(machine, -ENXIO, (int)cpu);
    }
    SHI_TRACE(self, call_entry, (uint32_t)cpu, 0, 0, SHI_E_SINGLE);
    if (shi_outgoing_info(machine, &out, a[1], info) < 0)
        return NULL;
    int64_t local =
        shi_outgoing_post(machine, &out, wait ? SHI_CSD_SYNC : SHI_CSD_ASYNC, (uint32_t)cpu);
    shi_outgoing_clear(machine, &out);
    if (local < 0)
        return NULL;
    if (!wait)
        Py_RETURN_NONE;
    return finish_single(machine, (uint32_t)local, (uint32_t)cpu);
}

/* ---- smp_send_reschedule --------------------------------------------------------- */

PyObject *shi_send_reschedule(Machine *machine, PyObject *const *args, Py_ssize_t nargs,
                              PyObject *kwnames)
{
    static const char *const names[] = { "cpu" };
    PyObject *a[1];
    int64_t cpu;
    if (shi_parse("smp_send_reschedule", names, 1, 1, args, nargs, kwnames, a) < 0 ||
        shi_as_cpu(a[0], &cpu) < 0)
        return NULL;
    struct shi_self *self = &machine->self;
    if (cpu < 0 || cpu >= machine->m.ncpus)
        return shi_raise_errno(machine, -ENXIO, (int)cpu);
    shi_say_call(machine, NULL);
    shi_enter(self);
    int err = shi_irq_send_reschedule(self, (uint32_t)cpu);
    shi_leave(self);
    shi_call_said(machine);
    if (err == -ENXIO) {
        /* "Worst case is that we lose a reschedule": warned of, and not sent. */
        if (PyErr_WarnFormat(shi_py.Warning, 1,
                             "sched: Unexpected reschedule of offline CPU#%d!", (int)cpu) < 0)
            return NULL;
    }
    Py_RETURN_NONE;
}

PyObject *shi_resched_cpu(Machine *machine, PyObject *const *args, Py_ssize_t nargs,
                          PyObject *kwnames)
{
    static const char *const names[] = { "cpu" };
    PyObject *a[1];
    int64_t cpu;
    if (shi_parse("resched_cpu", names, 1, 1, args, nargs, kwnames, a) < 0 ||
        shi_as_cpu(a[0], &cpu) < 0)
        return NULL;
    if (cpu < 0 || cpu >= machine->m.ncpus)
        return shi_raise_errno(machine, -ENXIO, (int)cpu);
    shi_say_call(machine, NULL);
    shi_enter(&machine->self);
    shi_irq_resched_cpu(&machine->self, (uint32_t)cpu); /* offline: nothing, as in the kernel */
    shi_leave(&machine->self);
    shi_call_said(machine);
    Py_RETURN_NONE;
}
