/* SPDX-License-Identifier: MIT */
/* Arguments into a csd and results out of one. */
#include "py/shi.h"

#include <string.h>
#include <unistd.h>

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
    if (bytes &&
        (!PyBytes_Check(bytes) || (uint64_t)PyBytes_GET_SIZE(bytes) > machine->m.payload_max)) {
        shi_raise(shi_py.ArenaError, E2BIG, -1,
                  "%zd bytes pickled: an argument or result may have %llu at most (half "
                  "the sender's arena); put large data in cluster.shared()",
                  PyBytes_GET_SIZE(bytes), (unsigned long long)machine->m.payload_max);
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
    if (encode_inline(info, &out->kind, &out->length, &out->value) && out->kind != SHI_K_FLOAT)
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

/* Copied by a system call: what was lent by a process that is dead may be a hole in the
 * file by now, and touching one when /dev/shm is full is a SIGBUS. */
static PyObject *read_arena(const struct shi_machine *m, const struct shi_ref *ref)
{
    uint64_t at = m->region_offset + ref->cpu * m->region_bytes + m->arena_offset + ref->offset;
    PyObject *copy = PyBytes_FromStringAndSize(NULL, ref->length);
    uint32_t done = 0;
    int fd = shi_machine_fd(m);
    while (copy && done < ref->length) {
        ssize_t n =
            pread(fd, PyBytes_AS_STRING(copy) + done, ref->length - done, (off_t)(at + done));
        if (n > 0) {
            done += (uint32_t)n;
        } else if (n == 0 || errno != EINTR) {
            int err = errno;
            Py_DECREF(copy);
            return n ? shi_os_error(err, "the machine's segment")
                     : shi_raise(shi_py.LayoutError, 0, ref->cpu,
                                 "a result is damaged (length)");
        }
    }
    return copy;
}

/* A result that `dst` lends. */
static PyObject *lent(Machine *machine, uint32_t dst, const struct shi_ref *ref)
{
    const struct shi_machine *m = &machine->m;
    struct shi_ref mine = *ref;
    if (mine.cpu != dst || !shi_payload(m, dst, &mine))
        return shi_raise(shi_py.LayoutError, 0, (int)dst, "a result lies outside its arena");
    PyObject *copy = read_arena(m, &mine);
    /* Copied first, checked second: another process in the slot writes where it likes. */
    if (!copy || shi_checksum(m, PyBytes_AS_STRING(copy), mine.length) == mine.sum)
        return copy;
    Py_DECREF(copy);
    if ((uint16_t)shi_load_acquire(&shi_slot(m, dst)->generation) != mine.gen)
        return shi_raise(shi_py.DiedError, EOWNERDEAD, (int)dst,
                         "CPU %u died after this call had run, and its result with it", dst);
    return shi_raise(shi_py.LayoutError, 0, (int)dst, "a result is damaged (checksum)");
}

/* Under the GIL from the look at the csd to the end of its copy, as whoever collects it:
 * no thread reads a block that another gives back. */
void shi_read_early(Machine *machine, uint32_t dst)
{
    struct shi_self *self = &machine->self;
    uint32_t i, top = self->sender.csd_top;
    shi_enter(self);
    shi_csd_collect(self); /* what nobody will ask for */
    shi_leave(self);
    if (!machine->early && !(machine->early = PyDict_New()))
        PyErr_Clear();
    for (i = 0; machine->early && i < top; i++) {
        struct shi_csd *csd = shi_own_csd(self, i);
        if (shi_load_acquire(&csd->lock) & (SHI_CSD_LOCK | SHI_CSD_DIED) ||
            !(shi_load_relaxed(&csd->status) & SHI_S_LENT) || csd->kind != SHI_K_PICKLE ||
            csd->value.ref.cpu != dst ||
            self->sender.notes[i]
                .left) /* unlocked since the look above: nobody would take it */
            continue;
        PyObject *bytes = lent(machine, dst, &csd->value.ref);
        PyObject *key = bytes ? PyLong_FromUnsignedLong(i) : NULL;
        if (key && PyDict_SetItem(machine->early, key, bytes) == 0) {
            csd->kind = SHI_K_EARLY;
            shi_enter(self);
            shi_lend_done(self, csd);
            shi_leave(self);
        }
        PyErr_Clear(); /* damaged, or no memory: for whoever asks for it */
        Py_XDECREF(key);
        Py_XDECREF(bytes);
    }
}

static PyObject *take_early(Machine *machine, uint32_t local)
{
    PyObject *key = machine->early ? PyLong_FromUnsignedLong(local) : NULL;
    PyObject *bytes = key ? Py_XNewRef(PyDict_GetItemWithError(machine->early, key)) : NULL;
    if (bytes && PyDict_DelItem(machine->early, key) < 0)
        Py_CLEAR(bytes);
    Py_XDECREF(key);
    return bytes;
}

void shi_drop_early(Machine *machine, uint32_t local)
{
    if (__builtin_expect(machine->early && PyDict_GET_SIZE(machine->early), 0)) {
        PyObject *pending = PyErr_Occurred() ? shi_take_exception() : NULL;
        Py_XDECREF(take_early(machine, local));
        PyErr_Clear();
        if (pending) {
            PyErr_SetObject((PyObject *)Py_TYPE(pending), pending);
            Py_DECREF(pending);
        }
    }
}

static PyObject *result_bytes(Machine *machine, uint32_t local, uint8_t status, uint32_t dst)
{
    const struct shi_csd *csd = shi_own_csd(&machine->self, local);
    if (csd->kind == SHI_K_EARLY) {
        PyObject *bytes = take_early(machine, local);
        if (bytes || PyErr_Occurred())
            return bytes;
    }
    if (csd->kind != SHI_K_PICKLE)
        return shi_raise(shi_py.LayoutError, 0, (int)dst, "a result is damaged");
    return status & SHI_S_LENT ? lent(machine, dst, &csd->value.ref)
                               : payload(machine, machine->self.id, &csd->value.ref);
}

PyObject *shi_result(Machine *machine, uint32_t local, uint32_t dst, uint8_t apply)
{
    struct shi_csd *csd = shi_own_csd(&machine->self, local);
    uint64_t lock = shi_load_relaxed(&csd->lock);
    if (lock & SHI_CSD_DIED)
        return shi_raise_died(machine, (int)dst, lock);
    uint8_t status = shi_load_relaxed(&csd->status);
    switch (status & ~SHI_S_LENT) {
    case SHI_S_DONE:
        break;
    case SHI_S_RAISED: {
        PyObject *bytes = result_bytes(machine, local, status, dst);
        if (!bytes)
            return NULL;
        PyObject *error = PyObject_CallFunction(shi_py.load_exception, "Ni", bytes, (int)dst);
        if (error) {
            PyErr_SetObject((PyObject *)Py_TYPE(error), error);
            Py_DECREF(error);
        }
        return NULL;
    }
    case SHI_S_CANCELLED:
        return shi_raise(shi_py.CancelledError, ECANCELED, (int)dst,
                         "the task on CPU %u was cancelled", dst);
    case SHI_S_NOFUNC:
        return shi_raise(shi_py.LayoutError, 0, (int)dst, "CPU %u does not know this function",
                         dst);
    case SHI_S_UNSENT:
        return shi_raise(
            shi_py.ArenaError, ENOSPC, (int)dst,
            "the call has run on CPU %u, but there is no memory to send its result "
            "in: put large data in cluster.shared(), or make /dev/shm larger (mount "
            "-o remount,size=... /dev/shm, docker run --shm-size=...)",
            dst);
    case SHI_S_NOMEM:
        return shi_raise(
            shi_py.ArenaError, ENOMEM, (int)dst,
            "CPU %u has no memory left to take the call, or to say what it raised: "
            "it may or may not have run",
            dst);
    default:
        return shi_raise(shi_py.LayoutError, 0, (int)dst,
                         "CPU %u could not read the call: the segment is damaged", dst);
    }
    if ((apply & ~SHI_A_INLINE_FUNC) == SHI_A_INFO)
        Py_RETURN_NONE;
    if (!(status & SHI_S_LENT) && csd->kind != SHI_K_EARLY)
        return decode(machine, machine->self.id, csd->kind, csd->length, &csd->value);
    PyObject *bytes = result_bytes(machine, local, status, dst);
    PyObject *object = bytes ? PyObject_CallOneArg(shi_py.loads, bytes) : NULL;
    Py_XDECREF(bytes);
    return object;
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
        if (shi_outcome(machine, csd, NULL, true))
            shi_csd_unlock(&machine->self, csd);
    }
}

int shi_incoming(Machine *machine, struct incoming *in, struct shi_csd *csd, bool async)
{
    *in = (struct incoming){ .apply = csd->apply & (uint8_t)~SHI_A_INLINE_FUNC };
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

/* Into the block the sender gave, if it is there and large enough. */
static bool reply(Machine *machine, struct shi_csd *csd, PyObject *bytes)
{
    uint64_t length = (uint64_t)PyBytes_GET_SIZE(bytes);
    struct shi_ref ref = { .offset = csd->reply, .length = (uint32_t)length };
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

/* The result goes where its sender can read it.  0, or -errno: there is no room. */
static int send(Machine *machine, struct shi_csd *csd, uint8_t status, PyObject *bytes)
{
    struct shi_self *self = &machine->self;
    if (reply(machine, csd, bytes)) {
        shi_store_relaxed(&csd->status, status);
        return 0;
    }
    shi_enter(self);
    int err = shi_lend(self, csd, status, PyBytes_AS_STRING(bytes),
                       (uint64_t)PyBytes_GET_SIZE(bytes));
    shi_leave(self);
    return err;
}

static PyObject *dumped_exception(void)
{
    PyObject *error = shi_take_exception();
    PyObject *bytes = error ? PyObject_CallOneArg(shi_py.dump_exception, error) : NULL;
    Py_XDECREF(error);
    if (bytes && !PyBytes_Check(bytes))
        Py_CLEAR(bytes);
    PyErr_Clear();
    return bytes;
}

/* There is no room for a result, and nothing is lent that would come back: that is the
 * outcome, in as many bytes as there are. */
static void send_refusal(Machine *machine, struct shi_csd *csd, PyObject *bytes, int err)
{
    PyObject *pending = PyErr_Occurred() ? shi_take_exception() : NULL;
    shi_raise(shi_py.ArenaError, -err, (int)machine->self.id,
              "the function has run, but its result of %zd bytes cannot be sent back: %s; put "
              "large data in cluster.shared()",
              PyBytes_GET_SIZE(bytes), err == -ENOSPC ? "/dev/shm is full" : strerror(-err));
    PyObject *refusal = dumped_exception();
    if (!refusal || send(machine, csd, SHI_S_RAISED, refusal))
        shi_store_relaxed(&csd->status, SHI_S_UNSENT);
    Py_XDECREF(refusal);
    if (pending) {
        PyErr_SetObject((PyObject *)Py_TYPE(pending), pending);
        Py_DECREF(pending);
    }
}

/*
 * What is lent fills the arena: this result waits in private memory until a sender has
 * read one, and its own sender waits meanwhile, for a csd that stays locked.
 */
static bool wait_for_room(Machine *machine, struct shi_csd *csd, uint8_t status,
                          PyObject *bytes)
{
    struct shi_self *self = &machine->self;
    if (self->unsent == machine->unsent_room) {
        uint32_t room = machine->unsent_room ? 2 * machine->unsent_room : 16;
        struct unsent *grown = PyMem_Realloc(machine->unsent, room * sizeof *grown);
        if (!grown)
            return false;
        machine->unsent = grown;
        machine->unsent_room = room;
    }
    machine->unsent[self->unsent++] = (struct unsent){
        .csd = shi_csd_number(&machine->m, csd) - 1, .status = status, .bytes = Py_NewRef(bytes)
    };
    return true;
}

/* 1: sent; 0: it waits for room; -1: it cannot be sent at all, and the sender is told so. */
static int send_one(Machine *machine, struct unsent *one)
{
    struct shi_self *self = &machine->self;
    struct shi_csd *csd = shi_csd(&machine->m, one->csd);
    if (shi_load_relaxed(&csd->lock) & SHI_CSD_LEFT)
        return 1; /* nobody waits for it any more */
    int err = send(machine, csd, one->status, one->bytes);
    if (err && self->sender.nloans)
        return 0;
    if (err)
        send_refusal(machine, csd, one->bytes, err);
    return 1;
}

void shi_send_unsent(Machine *machine)
{
    struct shi_self *self = &machine->self;
    uint32_t n = 0, i;
    if (__builtin_expect(!self->unsent, 1))
        return;
    self->in_core++; /* a handler must not add to the list meanwhile */
    self->in_irq++;  /* a refusal is pickled: what a task's signal raises is not for that */
    shi_lend_starve(self, true); /* first: a block that comes back from now on is told of */
    while (n < self->unsent && send_one(machine, &machine->unsent[n])) {
        shi_csd_unlock(self, shi_csd(&machine->m, machine->unsent[n].csd));
        Py_DECREF(machine->unsent[n++].bytes);
    }
    self->unsent -= n;
    for (i = 0; n && i < self->unsent; i++)
        machine->unsent[i] = machine->unsent[n + i];
    if (!self->unsent)
        shi_lend_starve(self, false);
    self->in_irq--;
    self->in_core--;
    if (self->happened)
        shi_leave_slow(self);
    shi_signals_let_go(machine);
}

bool shi_outcome(Machine *machine, struct shi_csd *csd, PyObject *value, bool wanted)
{
    struct shi_self *self = &machine->self;
    PyObject *bytes = NULL;
    uint8_t status = SHI_S_DONE;
    if (value && !wanted)
        return true;
    if (shi_load_relaxed(&csd->lock) & SHI_CSD_LEFT) {
        PyErr_Clear(); /* nobody waits for it any more */
        return true;
    }
    if (value) {
        uint8_t kind = 0, length = 0;
        union shi_value inlined;
        if (encode_inline(value, &kind, &length, &inlined)) {
            csd->kind = kind;
            csd->length = length;
            if (kind != SHI_K_NONE)
                csd->value = inlined;
            return true;
        }
        if (PyCoro_CheckExact(value)) { /* not silence, and no "was never awaited" later */
            Py_XDECREF(PyObject_CallMethod(value, "close", NULL));
            PyErr_SetString(PyExc_TypeError,
                            "an async function does not run as an IPI handler, which must not "
                            "wait: give it to cluster.run() or cluster.start()");
        } else {
            bytes = pickled(machine, value);
        }
    }
    if (!bytes) { /* it raised, or its result cannot be sent: that is the outcome */
        status = SHI_S_RAISED;
        bytes = dumped_exception();
    }
    if (!bytes) { /* any exception can be sent, unless there is no memory for it */
        shi_store_relaxed(&csd->status, SHI_S_NOMEM);
        return true;
    }
    /* Large ones in their order: none is overtaken for ever. */
    bool queue = self->unsent && PyBytes_GET_SIZE(bytes) > (Py_ssize_t)SHI_LEND_SMALL;
    int err = queue ? -ENOBUFS : send(machine, csd, status, bytes);
    bool now = true;
    if (err && (queue || self->sender.nloans) && wait_for_room(machine, csd, status, bytes)) {
        now = false;
        shi_send_unsent(machine); /* again, now that senders tell */
    } else if (err) {
        send_refusal(machine, csd, bytes, err);
    }
    Py_DECREF(bytes);
    return now;
}
