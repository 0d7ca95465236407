/* SPDX-License-Identifier: MIT */
/* A call on its target: what to run, and what came of it. */
#include "py/incoming.h"

#include <string.h>

#include "py/codec.h"
#include "py/func.h"
#include "py/signals.h"
#include "smp/lend.h"

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
    *in =
        (struct incoming){ .apply = csd->apply & (uint8_t)~(SHI_A_INLINE_FUNC | SHI_A_THREAD) };
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
    value = shi_decode(machine, src, csd->kind, csd->length, &copy);
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
    shi_put_exception(pending);
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
        if (shi_encode_inline(value, &kind, &length, &inlined)) {
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
            bytes = shi_pickled(machine, value);
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
