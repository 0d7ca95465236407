/* SPDX-License-Identifier: MIT */
/* What a call is made of, into a csd. */
#include "py/outgoing.h"

#include <string.h>

#include "py/codec.h"
#include "py/func.h"
#include "py/native.h"
#include "py/wait.h"

static int name_function(Machine *machine, struct outgoing *out, PyObject *function)
{
    memset(out, 0, sizeof *out);
    out->number = -1;
    if (Py_TYPE(function) == shi_native_type) {
        int64_t native = shi_native_number(machine, function);
        if (native < 0)
            return -1;
        out->func = SHI_FUNC_NATIVE | (uint32_t)native;
        return 0;
    }
    if (!PyCallable_Check(function)) {
        PyErr_Format(PyExc_TypeError, "%R is not callable", function);
        return -1;
    }
    out->number = shi_function_number(machine, function);
    if (out->number == -2)
        return -1;
    if (out->number >= 0) {
        out->func = (uint32_t)out->number;
        out->serial =
            shi_load_relaxed(&shi_func_entry(&machine->m, machine->self.id, out->func)->serial);
        /* Held from here: pickling the arguments may run code that frees it. */
        shi_enter(&machine->self);
        shi_func_hold(&machine->self, out->func);
        shi_leave(&machine->self);
        out->holder = machine;
    }
    return 0;
}

static int native_info(Machine *machine, struct outgoing *out, PyObject *info)
{
    if (shi_encode_inline(info, &out->kind, &out->length, &out->value) &&
        out->kind != SHI_K_FLOAT)
        return 0;
    if (PyObject_CheckBuffer(info) && !PyBytes_Check(info)) {
        Py_buffer view;
        if (PyObject_GetBuffer(info, &view, PyBUF_STRIDES) < 0)
            return -1;
        const uint8_t *p = view.buf;
        PyBuffer_Release(&view);
        if (p >= machine->m.base && p < machine->m.base + machine->m.total_bytes) {
            out->kind = SHI_K_POINTER;
            out->value.u = (uint64_t)(p - machine->m.base);
            return 0;
        }
    }
    PyErr_Format(PyExc_TypeError,
                 "a native handler takes None, an int of 64 bits, bytes up to %u or an array "
                 "made by cluster.shared() or cluster.percpu(), not %R",
                 SHI_INLINE, Py_TYPE(info));
    return -1;
}

int shi_outgoing_info(Machine *machine, struct outgoing *out, PyObject *function,
                      PyObject *info)
{
    if (name_function(machine, out, function) < 0)
        return -1;
    out->apply = SHI_A_INFO;
    if (out->func & SHI_FUNC_NATIVE) {
        if (native_info(machine, out, info) < 0)
            goto fail;
        return 0;
    }
    if (out->number < 0) {
        PyObject *both = PyTuple_Pack(2, function, info);
        out->apply |= SHI_A_INLINE_FUNC;
        out->kind = SHI_K_PICKLE;
        out->pickle = both ? shi_pickled(machine, both) : NULL;
        Py_XDECREF(both);
    } else if (!shi_encode_inline(info, &out->kind, &out->length, &out->value)) {
        out->kind = SHI_K_PICKLE;
        out->pickle = shi_pickled(machine, info);
    } else {
        return 0;
    }
    if (out->pickle)
        return 0;
fail:
    shi_outgoing_clear(out);
    return -1;
}

int shi_outgoing_inline(Machine *machine, struct outgoing *out, PyObject *function,
                        PyObject *info)
{
    if (Py_TYPE(function) == shi_native_type || !PyCallable_Check(function) ||
        !shi_encode_inline(info, &out->kind, &out->length, &out->value))
        return 0;
    out->number = shi_function_number(machine, function);
    if (out->number < 0)
        return out->number == -2 ? -1 : 0;
    out->func = (uint32_t)out->number;
    out->serial =
        shi_load_relaxed(&shi_func_entry(&machine->m, machine->self.id, out->func)->serial);
    out->apply = SHI_A_INFO;
    out->room = 0;
    out->pickle = NULL;
    out->holder = NULL; /* no Python runs before the csd holds the function */
    return 1;
}

int shi_outgoing_call(Machine *machine, struct outgoing *out, PyObject *function,
                      PyObject *args, PyObject *kwargs)
{
    Py_ssize_t n = PyTuple_GET_SIZE(args), nkw = kwargs ? PyDict_GET_SIZE(kwargs) : 0;
    if (name_function(machine, out, function) < 0)
        return -1;
    out->room = SHI_REPLY_ROOM;
    if (out->func & SHI_FUNC_NATIVE) {
        if (n > 1 || nkw) {
            PyErr_SetString(PyExc_TypeError, "a native handler takes one argument: info");
            goto fail;
        }
        out->apply = SHI_A_INFO;
        out->room = 0;
        if (native_info(machine, out, n ? PyTuple_GET_ITEM(args, 0) : Py_None) < 0)
            goto fail;
        return 0;
    }
    if (out->number >= 0 && !nkw && n == 0) {
        out->apply = SHI_A_VOID;
        return 0;
    }
    if (out->number >= 0 && !nkw && n == 1 &&
        shi_encode_inline(PyTuple_GET_ITEM(args, 0), &out->kind, &out->length, &out->value)) {
        out->apply = SHI_A_ONE;
        return 0;
    }
    out->apply = SHI_A_ARGS;
    out->kind = SHI_K_PICKLE;
    PyObject *all;
    if (out->number < 0) {
        out->apply |= SHI_A_INLINE_FUNC;
        all = PyTuple_Pack(3, function, args, nkw ? kwargs : Py_None);
    } else {
        all = PyTuple_Pack(2, args, nkw ? kwargs : Py_None);
    }
    out->pickle = all ? shi_pickled(machine, all) : NULL;
    Py_XDECREF(all);
    if (out->pickle)
        return 0;
fail:
    shi_outgoing_clear(out);
    return -1;
}

void shi_outgoing_clear(struct outgoing *out)
{
    Py_CLEAR(out->pickle);
    if (out->holder) {
        shi_enter(&out->holder->self);
        shi_func_drop(&out->holder->self, (uint32_t)out->number);
        shi_leave(&out->holder->self);
        out->holder = NULL;
    }
}

static void fill_head(Machine *machine, const struct outgoing *out, uint32_t local,
                      struct shi_csd *csd)
{
    csd->func = out->func;
    csd->serial = out->serial;
    csd->kind = out->kind;
    csd->length = out->length;
    csd->apply = out->apply;
    csd->room = 0;
    csd->value = out->value;
    if (out->number >= 0) {
        shi_func_hold(&machine->self, (uint32_t)out->number);
        machine->self.sender.notes[local].func = (uint32_t)out->number + 1;
    }
}

int shi_outgoing_fill(Machine *machine, const struct outgoing *out, uint32_t local)
{
    struct shi_self *self = &machine->self;
    struct shi_csd *csd = shi_own_csd(self, local);
    uint64_t length = out->pickle ? (uint64_t)PyBytes_GET_SIZE(out->pickle) : 0;
    fill_head(machine, out, local, csd);
    if (!out->pickle && !out->room)
        return 0;
    int64_t at = shi_csd_block(self, local, length > out->room ? length : out->room);
    if (at < 0)
        return (int)at;
    if (out->room) {
        csd->reply = (uint64_t)at;
        csd->room = out->room;
    }
    if (out->pickle) {
        memcpy(shi_arena_base(&machine->m, self->id) + at, PyBytes_AS_STRING(out->pickle),
               length);
        csd->value.ref = (struct shi_ref){
            .offset = (uint64_t)at,
            .length = (uint32_t)length,
            .sum = shi_checksum(&machine->m, PyBytes_AS_STRING(out->pickle), length),
        };
    }
    return 0;
}

void shi_outgoing_share(Machine *machine, const struct outgoing *out, uint32_t local,
                        uint32_t owner)
{
    struct shi_csd *csd = shi_own_csd(&machine->self, local);
    fill_head(machine, out, local, csd);
    if (out->pickle) {
        csd->value = shi_own_csd(&machine->self, owner)->value;
        shi_csd_share(&machine->self, local, owner);
    }
}

/* An error of filling a csd: what did not fit, and into what. */
static void raise_full(Machine *machine, const struct outgoing *out, int err)
{
    if (err != -ENOBUFS || !out->pickle) {
        shi_raise_errno(machine, err, -1);
        return;
    }
    shi_raise(
        shi_py.ArenaError, ENOBUFS, -1,
        "the arena of this sender (%llu bytes) is full of payloads not yet taken: %zd bytes "
        "more, in a block of the next power of two, do not fit. Wait for some, or put large "
        "data in cluster.shared()",
        (unsigned long long)machine->m.arena_bytes, PyBytes_GET_SIZE(out->pickle));
}

/* A csd that holds `out`.  `nowait`: from the pool.  Local index, or -1. */
int64_t shi_get_filled(Machine *machine, const struct outgoing *out, bool nowait)
{
    struct shi_self *self = &machine->self;
    for (;;) {
        shi_enter(self);
        int64_t local = nowait ? shi_nowait_get(self) : shi_csd_get(self);
        int err = 0;
        if (local >= 0 && (err = shi_outgoing_fill(machine, out, (uint32_t)local))) {
            shi_csd_put(self, (uint32_t)local);
            local = err;
        }
        shi_leave(self);
        if (local >= 0)
            return local;
        if (local != -EAGAIN) {
            raise_full(machine, out, (int)local);
            return -1;
        }
        if (shi_wait_for_room(machine) < 0)
            return -1;
    }
}
