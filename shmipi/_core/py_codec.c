/* SPDX-License-Identifier: MIT */
/* Arguments into a csd and results out of one. */
#include "py_shi.h"

#include <string.h>

/* ---- values ---------------------------------------------------------------------- */

/* Inline when it fits the csd's own cache line: 1, else 0. */
static int encode_inline(PyObject *object, uint8_t *kind, uint8_t *length, union shi_value *v)
{
    if (object == Py_None) {
        *kind = SHI_K_NONE;
        return 1;
    }
    if (PyBool_Check(object)) {
        *kind = SHI_K_BOOL;
        v->i = object == Py_True;
        return 1;
    }
    if (PyLong_CheckExact(object)) {
        int overflow;
        long long value = PyLong_AsLongLongAndOverflow(object, &overflow);
        if (overflow)
            return 0;
        *kind = SHI_K_INT;
        v->i = value;
        return 1;
    }
    if (PyFloat_CheckExact(object)) {
        *kind = SHI_K_FLOAT;
        v->f = PyFloat_AS_DOUBLE(object);
        return 1;
    }
    if (PyBytes_CheckExact(object) && PyBytes_GET_SIZE(object) <= (Py_ssize_t)SHI_INLINE) {
        *kind = SHI_K_BYTES;
        *length = (uint8_t)PyBytes_GET_SIZE(object);
        memcpy(v->bytes, PyBytes_AS_STRING(object), *length);
        return 1;
    }
    return 0;
}

static PyObject *pickled(Machine *machine, PyObject *object)
{
    PyObject *bytes = PyObject_CallOneArg(shi_py.dumps, object);
    if (bytes && (!PyBytes_Check(bytes) ||
                  (uint64_t)PyBytes_GET_SIZE(bytes) > shi_payload_max(&machine->m))) {
        shi_raise(shi_py.ArenaError, E2BIG, -1,
                  "%zd bytes pickled: an argument or result may have %llu at most (half "
                  "the sender's arena); put large data in cluster.shared()",
                  PyBytes_GET_SIZE(bytes), (unsigned long long)shi_payload_max(&machine->m));
        Py_CLEAR(bytes);
    }
    return bytes;
}

/* The payload behind `ref` in src's arena, copied first and checked after: nothing that
 * does not bear the machine's checksum is unpickled. */
static PyObject *payload(Machine *machine, uint32_t src, const struct shi_ref *ref)
{
    struct shi_ref mine = *ref;
    const void *at = shi_payload(&machine->m, src, &mine);
    if (!at)
        return shi_raise(shi_py.LayoutError, 0, -1, "a payload lies outside its arena");
    PyObject *copy = PyBytes_FromStringAndSize(at, mine.length);
    if (copy && shi_checksum(&machine->m, PyBytes_AS_STRING(copy), mine.length) != mine.sum) {
        Py_DECREF(copy);
        return shi_raise(shi_py.LayoutError, 0, -1, "a payload is damaged (checksum)");
    }
    return copy;
}

static PyObject *decode(Machine *machine, uint32_t src, uint8_t kind, uint8_t length,
                        const union shi_value *v)
{
    switch (kind) {
    case SHI_K_NONE:
        Py_RETURN_NONE;
    case SHI_K_BOOL:
        return PyBool_FromLong(v->i != 0);
    case SHI_K_INT:
        return PyLong_FromLongLong(v->i);
    case SHI_K_FLOAT:
        return PyFloat_FromDouble(v->f);
    case SHI_K_BYTES:
        if (length <= SHI_INLINE)
            return PyBytes_FromStringAndSize((const char *)v->bytes, length);
        break;
    case SHI_K_PICKLE: {
        PyObject *bytes = payload(machine, src, &v->ref);
        if (!bytes)
            return NULL;
        PyObject *object = PyObject_CallOneArg(shi_py.loads, bytes);
        Py_DECREF(bytes);
        return object;
    }
    default:
        break;
    }
    return shi_raise(shi_py.LayoutError, 0, -1, "a call_single_data is damaged (kind %d)",
                     kind);
}

/* ---- outgoing -------------------------------------------------------------------- */

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
        out->serial = shi_load_relaxed(
            &shi_func_entry(&machine->m, machine->self.id, out->func)->serial);
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
    if (encode_inline(info, &out->kind, &out->length, &out->value) &&
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
        out->pickle = both ? pickled(machine, both) : NULL;
        Py_XDECREF(both);
    } else if (!encode_inline(info, &out->kind, &out->length, &out->value)) {
        out->kind = SHI_K_PICKLE;
        out->pickle = pickled(machine, info);
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
        !encode_inline(info, &out->kind, &out->length, &out->value))
        return 0;
    out->number = shi_function_number(machine, function);
    if (out->number < 0)
        return out->number == -2 ? -1 : 0;
    out->func = (uint32_t)out->number;
    out->serial = shi_load_relaxed(
        &shi_func_entry(&machine->m, machine->self.id, out->func)->serial);
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
        encode_inline(PyTuple_GET_ITEM(args, 0), &out->kind, &out->length, &out->value)) {
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
    out->pickle = all ? pickled(machine, all) : NULL;
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

/* ---- results, on the sender ------------------------------------------------------ */

/* The target kept a result that was too large for its block: ask for it. */
static PyObject *fetch(Machine *machine, uint32_t dst, uint64_t token, uint32_t length,
                       uint64_t deadline_ns)
{
    struct shi_self *self = &machine->self;
    if (length > shi_payload_max(&machine->m))
        return shi_raise(shi_py.ArenaError, E2BIG, (int)dst,
                         "a result of %u bytes is more than the %llu that one may have", length,
                         (unsigned long long)shi_payload_max(&machine->m));
    shi_enter(self);
    int64_t local = shi_csd_get(self), at = 0;
    if (local >= 0) {
        at = shi_csd_block(self, (uint32_t)local, length ? length : 1);
        if (at < 0) {
            shi_csd_put(self, (uint32_t)local);
            local = at;
        }
    }
    int err = 0;
    if (local >= 0) {
        struct shi_csd *csd = shi_own_csd(self, (uint32_t)local);
        csd->func = 0;
        csd->serial = 0;
        csd->kind = SHI_K_FETCH;
        csd->apply = SHI_A_FETCH;
        csd->value.fetch.token = token;
        csd->value.fetch.length = length;
        csd->reply = (uint64_t)at;
        csd->room = length;
        err = shi_call_single(self, (uint32_t)local, SHI_CSD_SYNC, dst);
        if (err)
            shi_csd_put(self, (uint32_t)local);
    }
    shi_leave(self);
    if (local < 0 || err)
        return shi_raise_errno(machine, local < 0 ? (int)local : err, (int)dst);
    if (shi_wait_csd(machine, (uint32_t)local, dst, deadline_ns) < 0)
        return NULL;
    struct shi_csd *csd = shi_own_csd(self, (uint32_t)local);
    PyObject *bytes = NULL;
    if (shi_load_relaxed(&csd->lock) & SHI_CSD_DIED)
        shi_raise_errno(machine, -EOWNERDEAD, (int)dst);
    else if (csd->kind != SHI_K_PICKLE || shi_load_relaxed(&csd->status) != SHI_S_DONE)
        shi_raise(shi_py.LayoutError, 0, (int)dst, "CPU %u lost a large result", dst);
    else
        bytes = payload(machine, self->id, &csd->value.ref);
    shi_give_back(machine, (uint32_t)local);
    return bytes;
}

static PyObject *result_bytes(Machine *machine, const struct shi_csd *csd, uint32_t dst,
                              uint64_t deadline_ns)
{
    if (csd->kind == SHI_K_FETCH)
        return fetch(machine, dst, csd->value.fetch.token, csd->value.fetch.length,
                     deadline_ns);
    if (csd->kind != SHI_K_PICKLE)
        return shi_raise(shi_py.LayoutError, 0, (int)dst, "a result is damaged");
    return payload(machine, machine->self.id, &csd->value.ref);
}

PyObject *shi_result(Machine *machine, uint32_t local, uint32_t dst, uint8_t apply,
                     uint64_t deadline_ns)
{
    struct shi_csd *csd = shi_own_csd(&machine->self, local);
    if (shi_load_relaxed(&csd->lock) & SHI_CSD_DIED)
        return shi_raise_errno(machine, -EOWNERDEAD, (int)dst);
    switch (shi_load_relaxed(&csd->status)) {
    case SHI_S_DONE:
        break;
    case SHI_S_RAISED: {
        PyObject *bytes = result_bytes(machine, csd, dst, deadline_ns);
        if (!bytes)
            return NULL;
        PyObject *error = PyObject_CallFunction(shi_py.load_exception, "Ni", bytes, (int)dst);
        if (error) {
            PyErr_SetObject((PyObject *)Py_TYPE(error), error);
            Py_DECREF(error);
        }
        return NULL;
    }
    case SHI_S_NOFUNC:
        return shi_raise(shi_py.LayoutError, 0, (int)dst,
                         "CPU %u does not know this function", dst);
    default:
        return shi_raise(shi_py.LayoutError, 0, (int)dst,
                         "CPU %u could not read the call: the segment is damaged", dst);
    }
    if ((apply & ~SHI_A_INLINE_FUNC) == SHI_A_INFO)
        Py_RETURN_NONE;
    if (csd->kind == SHI_K_FETCH) {
        PyObject *bytes = result_bytes(machine, csd, dst, deadline_ns);
        if (!bytes)
            return NULL;
        PyObject *object = PyObject_CallOneArg(shi_py.loads, bytes);
        Py_DECREF(bytes);
        return object;
    }
    return decode(machine, machine->self.id, csd->kind, csd->length, &csd->value);
}

/* ---- incoming, on the target ----------------------------------------------------- */

static void broken(Machine *machine, struct shi_csd *csd, bool async)
{
    /* A damaged csd, or arguments that do not unpickle here. */
    if (async) {
        shi_csd_unlock(&machine->self, csd);
        shi_count(&machine->self, SHI_C_unraisable);
        PyErr_WriteUnraisable(NULL);
    } else {
        shi_outcome(machine, csd, NULL, true);
        shi_csd_unlock(&machine->self, csd);
    }
}

int shi_incoming(Machine *machine, struct incoming *in, struct shi_csd *csd, bool async)
{
    *in = (struct incoming){.apply = csd->apply & (uint8_t)~SHI_A_INLINE_FUNC};
    PyObject *value = NULL;
    uint32_t src = csd->src;
    if (!(csd->apply & SHI_A_INLINE_FUNC)) {
        in->function =
            shi_function_received(machine, src, csd->src_gen, csd->func, csd->serial);
        if (!in->function)
            goto fail;
    }
    if (in->apply == SHI_A_VOID && in->function) {
        in->args = PyTuple_New(0);
        if (in->args)
            return 0;
        goto fail;
    }
    union shi_value copy = csd->value;
    value = decode(machine, src, csd->kind, csd->length, &copy);
    if (!value)
        goto fail;
    if (in->apply == SHI_A_ARGS || csd->apply & SHI_A_INLINE_FUNC) {
        bool has_func = (csd->apply & SHI_A_INLINE_FUNC) != 0;
        Py_ssize_t want = (in->apply == SHI_A_ARGS ? 2 : 1) + has_func;
        if (!PyTuple_CheckExact(value) || PyTuple_GET_SIZE(value) != want) {
            shi_raise(shi_py.LayoutError, 0, -1, "a call_single_data is damaged (arguments)");
            goto fail;
        }
        if (has_func)
            in->function = Py_NewRef(PyTuple_GET_ITEM(value, 0));
        if (in->apply == SHI_A_ARGS) {
            in->args = Py_NewRef(PyTuple_GET_ITEM(value, has_func));
            if (PyTuple_GET_ITEM(value, has_func + 1) != Py_None)
                in->kwargs = Py_NewRef(PyTuple_GET_ITEM(value, has_func + 1));
        } else {
            in->args = PyTuple_Pack(1, PyTuple_GET_ITEM(value, has_func));
        }
        Py_DECREF(value);
        value = NULL;
        if (!in->args || !PyTuple_CheckExact(in->args) ||
            (in->kwargs && !PyDict_CheckExact(in->kwargs)))
            goto fail;
        return 0;
    }
    in->args = value; /* no tuple on the hot path */
    in->bare = true;
    return 0;
fail:
    if (!PyErr_Occurred())
        shi_raise(shi_py.LayoutError, 0, -1, "a call_single_data is damaged");
    Py_XDECREF(value);
    shi_incoming_clear(in);
    broken(machine, csd, async);
    return -1;
}

void shi_incoming_clear(struct incoming *in)
{
    Py_CLEAR(in->function);
    Py_CLEAR(in->args);
    Py_CLEAR(in->kwargs);
}

PyObject *shi_incoming_apply(const struct incoming *in)
{
    if (in->bare)
        return PyObject_CallOneArg(in->function, in->args);
    return PyObject_Call(in->function, in->args, in->kwargs);
}

/* Keep `bytes` until the sender asks; the oldest go when nobody ever does. */
#define KEPT_MAX 1024
#define KEPT_BYTES (64 << 20)

static void drop_oldest_kept(Machine *machine)
{
    Py_ssize_t at = 0;
    PyObject *token, *bytes;
    if (!PyDict_Next(machine->kept, &at, &token, &bytes))
        return;
    Py_INCREF(token);
    machine->kept_bytes -= PyBytes_GET_SIZE(bytes);
    PyDict_DelItem(machine->kept, token);
    Py_DECREF(token);
}

static int keep(Machine *machine, struct shi_csd *csd, PyObject *bytes)
{
    if (!machine->kept && !(machine->kept = PyDict_New()))
        return -1;
    while (PyDict_GET_SIZE(machine->kept) > 0 &&
           (PyDict_GET_SIZE(machine->kept) >= KEPT_MAX ||
            machine->kept_bytes + PyBytes_GET_SIZE(bytes) > KEPT_BYTES))
        drop_oldest_kept(machine);
    PyObject *token = PyLong_FromUnsignedLongLong(++machine->next_token);
    int err = token ? PyDict_SetItem(machine->kept, token, bytes) : -1;
    Py_XDECREF(token);
    if (err)
        return err;
    machine->kept_bytes += PyBytes_GET_SIZE(bytes);
    csd->kind = SHI_K_FETCH;
    csd->value.fetch.token = machine->next_token;
    csd->value.fetch.length = (uint32_t)PyBytes_GET_SIZE(bytes);
    return 0;
}

/* Into the block the sender gave, if it is there and large enough. */
static bool reply(Machine *machine, struct shi_csd *csd, PyObject *bytes)
{
    uint64_t length = (uint64_t)PyBytes_GET_SIZE(bytes);
    struct shi_ref ref = {.offset = csd->reply, .length = (uint32_t)length};
    if (length > csd->room)
        return false;
    void *at = shi_payload(&machine->m, csd->src, &ref);
    if (!at)
        return false;
    memcpy(at, PyBytes_AS_STRING(bytes), length);
    ref.sum = shi_checksum(&machine->m, PyBytes_AS_STRING(bytes), length);
    csd->kind = SHI_K_PICKLE;
    csd->value.ref = ref;
    return true;
}

void shi_outcome(Machine *machine, struct shi_csd *csd, PyObject *value, bool wanted)
{
    PyObject *bytes = NULL;
    if (value && !wanted)
        return;
    if (value) {
        uint8_t kind = 0, length = 0;
        union shi_value inlined;
        if (encode_inline(value, &kind, &length, &inlined)) {
            csd->kind = kind;
            csd->length = length;
            if (kind != SHI_K_NONE)
                csd->value = inlined;
            return;
        }
        bytes = pickled(machine, value);
        if (bytes && (reply(machine, csd, bytes) || keep(machine, csd, bytes) == 0)) {
            Py_DECREF(bytes);
            return;
        }
        Py_CLEAR(bytes); /* the result cannot be sent: that is the outcome */
    }
    PyObject *error = shi_take_exception();
    bytes = error ? PyObject_CallOneArg(shi_py.dump_exception, error) : NULL;
    Py_XDECREF(error);
    if (bytes && PyBytes_Check(bytes) &&
        (reply(machine, csd, bytes) || keep(machine, csd, bytes) == 0)) {
        shi_store_relaxed(&csd->status, SHI_S_RAISED);
    } else {
        PyErr_Clear();
        shi_store_relaxed(&csd->status, SHI_S_BROKEN);
    }
    Py_XDECREF(bytes);
}

void shi_outcome_fetch(Machine *machine, struct shi_csd *csd)
{
    PyObject *token = PyLong_FromUnsignedLongLong(csd->value.fetch.token);
    PyObject *bytes = token && machine->kept ? PyDict_GetItem(machine->kept, token) : NULL;
    if (!bytes || !PyBytes_Check(bytes) || !reply(machine, csd, bytes))
        shi_store_relaxed(&csd->status, SHI_S_NOFUNC);
    else {
        machine->kept_bytes -= PyBytes_GET_SIZE(bytes);
        PyDict_DelItem(machine->kept, token);
    }
    Py_XDECREF(token);
    PyErr_Clear();
}
