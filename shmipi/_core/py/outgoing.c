/* SPDX-License-Identifier: MIT */
/* What a call is made of, into a csd. */
#include "py/outgoing.h"

#include <string.h>

#include "py/codec.h"
#include "py/func.h"
#include "py/native.h"
#include "py/wait.h"
#include "py/trace.h"

static int native_function(const Machine *machine, struct shi_call *call, PyObject *function)
{
    int64_t native = shi_native_number(machine, function);
    call->func = SHI_FUNC_NATIVE | (uint32_t)native;
    return native < 0 ? -1 : 0;
}

static int native_info(const Machine *machine, struct shi_call *call, PyObject *info)
{
    if (shi_encode_inline(info, &call->kind, &call->length, &call->value) &&
        call->kind != SHI_K_FLOAT)
        return 0;
    if (PyObject_CheckBuffer(info) && !PyBytes_Check(info)) {
        Py_buffer view;
        if (PyObject_GetBuffer(info, &view, PyBUF_STRIDES) < 0)
            return -1;
        const uint8_t *p = view.buf;
        PyBuffer_Release(&view);
        if (p >= machine->m.base && p < machine->m.base + machine->m.total_bytes) {
            call->kind = SHI_K_POINTER;
            call->value.u = (uint64_t)(p - machine->m.base);
            return 0;
        }
    }
    PyErr_Format(PyExc_TypeError,
                 "a native handler takes None, an int of 64 bits, bytes up to %u or an array "
                 "made by cluster.shared() or cluster.percpu(), not %R",
                 SHI_INLINE, Py_TYPE(info));
    return -1;
}

static int check_callable(PyObject *function)
{
    if (PyCallable_Check(function))
        return 0;
    PyErr_Format(PyExc_TypeError, "%R is not callable", function);
    return -1;
}

/* The last step: from here to the csd no Python code runs. */
static int number_function(Machine *machine, struct shi_call *call, PyObject *function)
{
    int64_t number = shi_function_number(machine, function);
    if (number < 0)
        return -1;
    call->func = (uint32_t)number;
    call->serial =
        shi_load_relaxed(&shi_func_entry(&machine->m, machine->self.id, call->func)->serial);
    return 0;
}

/* `object` is what travels; it is taken over.  NULL: an exception is set. */
static int pickle(Machine *machine, struct outgoing *out, PyObject *object)
{
    out->pickle = object ? shi_pickled(machine, object) : NULL;
    Py_XDECREF(object);
    if (!out->pickle)
        return -1;
    out->call.kind = SHI_K_PICKLE;
    out->call.payload = PyBytes_AS_STRING(out->pickle);
    out->call.bytes = (uint64_t)PyBytes_GET_SIZE(out->pickle);
    return 0;
}

static int of_info(Machine *machine, struct outgoing *out, PyObject *function, PyObject *info)
{
    struct shi_call *call = &out->call;
    memset(out, 0, sizeof *out);
    shi_say_call(machine, function);
    call->apply = SHI_A_INFO;
    if (Py_TYPE(function) == shi_native_type)
        return native_function(machine, call, function) < 0 ? -1
                                                            : native_info(machine, call, info);
    if (check_callable(function) < 0)
        return -1;
    if (!shi_function_by_number(function)) {
        call->apply |= SHI_A_INLINE_FUNC;
        return pickle(machine, out, PyTuple_Pack(2, function, info));
    }
    if (!shi_encode_inline(info, &call->kind, &call->length, &call->value) &&
        pickle(machine, out, Py_NewRef(info)) < 0)
        return -1;
    if (number_function(machine, call, function) == 0)
        return 0;
    shi_outgoing_clear(machine, out);
    return -1;
}

int shi_outgoing_info(Machine *machine, struct outgoing *out, PyObject *function,
                      PyObject *info)
{
    int err = of_info(machine, out, function, info);
    if (err < 0)
        shi_call_said(machine);
    return err;
}

int shi_outgoing_inline(Machine *machine, struct outgoing *out, PyObject *function,
                        PyObject *info)
{
    struct shi_call *call = &out->call;
    if (!shi_function_by_number(function) ||
        !shi_encode_inline(info, &call->kind, &call->length, &call->value))
        return 0;
    shi_say_call(machine, function);
    call->apply = SHI_A_INFO;
    call->room = 0;
    call->payload = NULL;
    out->pickle = NULL;
    return number_function(machine, call, function) < 0 ? -1 : 1;
}

static int of_call(Machine *machine, struct outgoing *out, PyObject *function, PyObject *args,
                   PyObject *kwargs)
{
    Py_ssize_t n = PyTuple_GET_SIZE(args), nkw = kwargs ? PyDict_GET_SIZE(kwargs) : 0;
    struct shi_call *call = &out->call;
    memset(out, 0, sizeof *out);
    shi_say_call(machine, function);
    if (Py_TYPE(function) == shi_native_type) {
        if (n > 1 || nkw) {
            PyErr_SetString(PyExc_TypeError, "a native handler takes one argument: info");
            return -1;
        }
        call->apply = SHI_A_INFO;
        return native_function(machine, call, function) < 0
                   ? -1
                   : native_info(machine, call, n ? PyTuple_GET_ITEM(args, 0) : Py_None);
    }
    if (check_callable(function) < 0)
        return -1;
    call->room = SHI_REPLY_ROOM;
    if (!shi_function_by_number(function)) {
        call->apply = SHI_A_ARGS | SHI_A_INLINE_FUNC;
        return pickle(machine, out, PyTuple_Pack(3, function, args, nkw ? kwargs : Py_None));
    }
    if (!nkw && n == 0) {
        call->apply = SHI_A_VOID;
    } else if (!nkw && n == 1 &&
               shi_encode_inline(PyTuple_GET_ITEM(args, 0), &call->kind, &call->length,
                                 &call->value)) {
        call->apply = SHI_A_ONE;
    } else {
        call->apply = SHI_A_ARGS;
        if (pickle(machine, out, PyTuple_Pack(2, args, nkw ? kwargs : Py_None)) < 0)
            return -1;
    }
    if (number_function(machine, call, function) == 0)
        return 0;
    shi_outgoing_clear(machine, out);
    return -1;
}

int shi_outgoing_call(Machine *machine, struct outgoing *out, PyObject *function,
                      PyObject *args, PyObject *kwargs)
{
    int err = of_call(machine, out, function, args, kwargs);
    if (err < 0)
        shi_call_said(machine);
    return err;
}

void shi_outgoing_clear(Machine *machine, struct outgoing *out)
{
    Py_CLEAR(out->pickle);
    shi_call_said(machine);
}

void shi_raise_post(Machine *machine, const struct outgoing *out, int err, int cpu)
{
    switch (err) {
    case -ENXIO:
    case -EOWNERDEAD:
    case -ESHUTDOWN:
        shi_raise_errno(machine, err, cpu);
        return;
    case -ENOBUFS: /* what did not fit, and into what */
        if (!out->pickle)
            break;
        shi_raise(
            shi_py.ArenaError, ENOBUFS, -1,
            "the arena of this sender (%llu bytes) is full of payloads not yet taken: %zd "
            "bytes more, in a block of the next power of two, do not fit. Wait for some, "
            "or put large data in cluster.shared()",
            (unsigned long long)machine->m.arena_bytes, PyBytes_GET_SIZE(out->pickle));
        return;
    default:
        break;
    }
    shi_raise_errno(machine, err, -1);
}

/* While somebody waits for room Python code runs: the function's number stays its own. */
static void hold(Machine *machine, const struct outgoing *out, bool on)
{
    struct shi_self *self = &machine->self;
    if (!shi_call_by_number(&out->call))
        return;
    shi_enter(self);
    if (on)
        shi_func_hold(self, out->call.func);
    else
        shi_func_drop(self, out->call.func);
    shi_leave(self);
}

static int64_t again(Machine *machine, const struct outgoing *out, bool prepare, uint64_t type,
                     uint32_t dst)
{
    struct shi_self *self = &machine->self;
    int64_t local = -EAGAIN;
    hold(machine, out, true);
    while (local == -EAGAIN) {
        if (shi_wait_for_room(machine) < 0)
            local = -EINTR; /* an exception is set */
        else
            local = prepare ? shi_call_prepare(self, &out->call)
                            : shi_call_post(self, &out->call, type, dst);
    }
    hold(machine, out, false);
    return local;
}

int64_t shi_outgoing_post(Machine *machine, const struct outgoing *out, uint64_t type,
                          uint32_t dst)
{
    int64_t local = shi_call_post(&machine->self, &out->call, type, dst);
    if (__builtin_expect(local == -EAGAIN, 0))
        local = again(machine, out, false, type, dst);
    if (__builtin_expect(local < 0, 0) && local != -EINTR)
        shi_raise_post(machine, out, (int)local, (int)dst);
    return local < 0 ? -1 : local;
}

int64_t shi_outgoing_prepare(Machine *machine, const struct outgoing *out)
{
    int64_t local = shi_call_prepare(&machine->self, &out->call);
    if (local == -EAGAIN)
        local = again(machine, out, true, 0, 0);
    if (local < 0 && local != -EINTR)
        shi_raise_post(machine, out, (int)local, -1);
    return local < 0 ? -1 : local;
}
