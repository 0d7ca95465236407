/* SPDX-License-Identifier: MIT */
/*
 * Functions travel as numbers.
 *
 * Sender: a function object is known by identity.  What its pickle was made of is compared,
 * by identity too, at each call (py/guard.c); a change publishes it anew.  The number is
 * freed with the object.
 *
 * Target: a number met for the first time is looked up in the sender's table, in shared
 * memory, and unpickled once.
 *
 * Pickling, weak references and letting go of objects run Python code, and that may call the
 * same function.  So an entry is made in full before it is in the table and never changes
 * there; another one takes its place.  And a number is good only until the next of those:
 * whoever asks for one holds it before (shi_func_hold).
 */
#include "py/func.h"

#include <errno.h>

#include "py/guard.h"

struct func_entry {
    PyObject_HEAD     /* it is its own weakref callback */
    Machine *machine; /* borrowed; NULL when it is not in the table */
    PyObject *key;    /* borrowed: the weakref says when it is gone */
    PyObject *weak;
    uint32_t index;
    struct shi_guards *guards;
};

/* ---- the table ------------------------------------------------------------------- */

#define TRIES 3
#define SWEEP 8 /* entries looked at for each that is made */

static struct func_entry tombstone;
static uint32_t senders; /* machines that have been sent functions, and are open */

static uint32_t hash_of(const void *p)
{
    uint64_t h = (uint64_t)(uintptr_t)p >> 4;
    return (uint32_t)((h * 0x9e3779b97f4a7c15ull) >> 32);
}

static struct func_entry *table_find(const struct func_table *t, PyObject *key)
{
    uint32_t i;
    if (!t->size)
        return NULL;
    for (i = hash_of(key) & (t->size - 1); t->slots[i]; i = (i + 1) & (t->size - 1))
        if (t->slots[i] != &tombstone && t->slots[i]->key == key)
            return t->slots[i];
    return NULL;
}

static int table_grow(struct func_table *t)
{
    uint32_t size = t->size ? t->size : 64, live = 0, i, j;
    for (i = 0; i < t->size; i++)
        live += t->slots[i] && t->slots[i] != &tombstone;
    while (size < 4 * (live + 1))
        size *= 2;
    struct func_entry **slots = PyMem_Calloc(size, sizeof *slots);
    if (!slots) {
        PyErr_NoMemory();
        return -1;
    }
    for (i = 0; i < t->size; i++) {
        if (!t->slots[i] || t->slots[i] == &tombstone)
            continue;
        for (j = hash_of(t->slots[i]->key) & (size - 1); slots[j]; j = (j + 1) & (size - 1))
            ;
        slots[j] = t->slots[i];
    }
    PyMem_Free(t->slots);
    *t = (struct func_table){ slots, size, live, 0 };
    return 0;
}

/* The place of `key`, which is there. */
static struct func_entry **table_slot(const struct func_table *t, const PyObject *key)
{
    uint32_t i;
    for (i = hash_of(key) & (t->size - 1); t->slots[i] == &tombstone || t->slots[i]->key != key;
         i = (i + 1) & (t->size - 1))
        ;
    return &t->slots[i];
}

static int table_add(struct func_table *t, struct func_entry *entry)
{
    uint32_t i;
    if (2 * (t->used + 1) > t->size && table_grow(t) < 0)
        return -1;
    for (i = hash_of(entry->key) & (t->size - 1); t->slots[i]; i = (i + 1) & (t->size - 1))
        ;
    t->slots[i] = entry;
    t->used++;
    return 0;
}

PyObject *shi_function_name(Machine *machine, uint32_t number)
{
    const struct func_table *t = &machine->sent;
    uint32_t i;
    for (i = 0; i < t->size; i++)
        if (t->slots[i] && t->slots[i] != &tombstone && t->slots[i]->index == number) {
            PyObject *key = Py_NewRef(t->slots[i]->key);
            PyObject *name = PyObject_GetAttrString(key, "__qualname__");
            if (!name) {
                PyErr_Clear();
                name = PyObject_Repr(key);
            }
            Py_DECREF(key);
            return name;
        }
    Py_RETURN_NONE;
}

/* ---- entries --------------------------------------------------------------------- */

static void retire(Machine *machine, uint32_t index)
{
    if (shi_other_thread(machine)) {
        shi_late(machine, index, false);
        return;
    }
    shi_enter(&machine->self);
    shi_func_retire(&machine->self, index);
    shi_leave(&machine->self);
}

static void entry_dealloc(PyObject *self)
{
    struct func_entry *e = (struct func_entry *)self;
    PyTypeObject *type = Py_TYPE(self);
    Py_XDECREF(e->weak);
    shi_guards_free(e->guards);
    type->tp_free(self);
    Py_DECREF(type);
}

/* The weakref callback: the function object is gone. */
static PyObject *entry_call(PyObject *self, PyObject *args, PyObject *kwargs)
{
    struct func_entry *e = (struct func_entry *)self;
    Machine *machine = e->machine;
    (void)args;
    (void)kwargs;
    e->machine = NULL;
    /* It holds the entry, as its callback: the collector, other than a last reference that
     * goes, leaves that in place.  Who calls has a reference to it yet. */
    Py_CLEAR(e->weak);
    if (machine && !shi_gone(machine)) {
        *table_slot(&machine->sent, e->key) = &tombstone;
        retire(machine, e->index);
        Py_DECREF(self); /* the table's reference */
    }
    Py_RETURN_NONE;
}

static PyType_Slot entry_slots[] = {
    { Py_tp_dealloc, entry_dealloc },
    { Py_tp_call, entry_call },
    { 0, NULL },
};
static PyType_Spec entry_spec = {
    .name = "shmipi._core._SentFunction",
    .basicsize = sizeof(struct func_entry),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_DISALLOW_INSTANTIATION,
    .slots = entry_slots,
};
static PyTypeObject *entry_type;

/* Let go of one that is in no table (any more).  Runs Python code. */
static void entry_discard(Machine *machine, struct func_entry *e)
{
    e->machine = NULL;
    if (!machine->closed)
        retire(machine, e->index);
    Py_CLEAR(e->weak); /* it holds the entry, as its callback */
    Py_DECREF(e);
}

static inline bool entry_is_current(struct func_entry *e, PyObject *function)
{
    return !e->guards || shi_guards_hold(e->guards, function);
}

/* What has changed since it was sent may hold, by what is held of it, itself alive. */
static void sweep(Machine *machine)
{
    struct func_table *t = &machine->sent;
    uint32_t looks;
    for (looks = 0; looks < SWEEP && t->size; looks++) {
        struct func_entry *e = t->slots[t->hand++ & (t->size - 1)];
        if (!e || e == &tombstone || entry_is_current(e, e->key))
            continue;
        *table_slot(t, e->key) = &tombstone;
        entry_discard(machine, e);
    }
}

/* Into shared memory: its index, or -2. */
static int64_t publish(Machine *machine, PyObject *pickle)
{
    struct shi_self *self = &machine->self;
    int64_t index;
    bool again = false;
    if (!PyBytes_Check(pickle) || PyBytes_GET_SIZE(pickle) > UINT32_MAX) {
        PyErr_SetString(PyExc_TypeError, "a pickle is bytes of less than 4 GiB");
        return -2;
    }
    for (;;) {
        shi_enter(self);
        if (again)
            shi_csd_collect(self); /* calls that have ended hold numbers as well */
        index = shi_func_publish(self, PyBytes_AS_STRING(pickle),
                                 (uint32_t)PyBytes_GET_SIZE(pickle));
        shi_leave(self);
        if (index != -EMFILE || again)
            break;
        again = true;
        PyGC_Collect(); /* functions in circles */
        if (machine->closed)
            break;
    }
    if (index == -EMFILE)
        shi_raise(shi_py.TableError, EMFILE, -1,
                  "this process has sent %u functions that still exist, the most there can be: "
                  "let go of those not needed any more, or send one function and pass what "
                  "varies as an argument",
                  SHI_FUNCS);
    else if (index < 0)
        shi_raise_errno(machine, (int)index, -1);
    return index < 0 ? -2 : index;
}

/* A new entry, in no table yet.  Runs Python code. */
static struct func_entry *entry_new(Machine *machine, PyObject *function)
{
    PyObject *pickle, *functions, *types, *tables;
    PyObject *made = shi_unmixed(machine, shi_py.publish, function);
    struct func_entry *e = NULL;
    int64_t index;
    if (!made)
        return NULL;
    if (!PyArg_ParseTuple(made, "OOOO", &pickle, &functions, &types, &tables) ||
        shi_use(machine) < 0 || (index = publish(machine, pickle)) < 0)
        goto out;
    e = PyObject_New(struct func_entry, entry_type);
    if (!e) {
        retire(machine, (uint32_t)index);
        goto out;
    }
    memset((char *)e + sizeof(PyObject), 0, sizeof *e - sizeof(PyObject));
    e->key = function;
    e->index = (uint32_t)index;
    if ((PyObject_IsTrue(functions) || PyObject_IsTrue(types)) &&
        !(e->guards = shi_guards_new(functions, types, tables, function))) {
        entry_discard(machine, e);
        e = NULL;
        goto out;
    }
    e->weak = PyWeakref_NewRef(function, (PyObject *)e);
    if (!e->weak || shi_use(machine) < 0) {
        entry_discard(machine, e);
        e = NULL;
    }
out:
    Py_DECREF(made);
    return e;
}

/* In place of what the table has for this function.  0, or -1: `e` is discarded. */
static int entry_put(Machine *machine, struct func_entry *e)
{
    struct func_entry *old = table_find(&machine->sent, e->key);
    senders += !machine->sending;
    machine->sending = true;
    e->machine = machine;
    if (old) {
        *table_slot(&machine->sent, e->key) = e;
        entry_discard(machine, old);
    } else if (table_add(&machine->sent, e) < 0) {
        entry_discard(machine, e);
        return -1;
    }
    return 0;
}

bool shi_function_by_number(PyObject *function)
{
    return PyFunction_Check(function) || PyType_Check(function) ||
           (PyCFunction_Check(function) && (!PyCFunction_GET_SELF(function) ||
                                            PyModule_Check(PyCFunction_GET_SELF(function))));
}

int64_t shi_function_number(Machine *machine, PyObject *function)
{
    int tries;
    for (tries = 0;; tries++) {
        struct func_entry *e = table_find(&machine->sent, function);
        /* No Python code runs between this look and the caller's hold. */
        if (__builtin_expect(e && entry_is_current(e, function), 1))
            return e->index;
        if (e && tries >= TRIES)
            return e->index; /* it changes faster than it is pickled: anew next time */
        sweep(machine);
        struct func_entry *fresh = entry_new(machine, function);
        if (!fresh)
            return -1;
        /* Another thread, or what the pickling ran, may have published it meanwhile, and
         * with what is there now. */
        e = table_find(&machine->sent, function);
        if (e && entry_is_current(e, function))
            entry_discard(machine, fresh);
        else if (entry_put(machine, fresh) < 0)
            return -1;
        if (shi_use(machine) < 0)
            return -1;
    }
}

/* ---- target side ----------------------------------------------------------------- */

static void cache_sweep(Machine *machine, uint32_t src, struct func_cache *c)
{
    uint32_t i;
    for (i = 0; i < c->size; i++) {
        struct shi_func *f = shi_func_entry(&machine->m, src, i);
        if (c->entries[i].function && shi_load_acquire(&f->serial) != c->entries[i].serial) {
            Py_CLEAR(c->entries[i].function);
            c->live--;
        }
    }
    c->misses = 0;
}

static void cache_clear(struct func_cache *c)
{
    uint32_t i;
    for (i = 0; i < c->size; i++)
        Py_CLEAR(c->entries[i].function);
    PyMem_Free(c->entries);
    *c = (struct func_cache){ 0 };
}

/* Copied first and checked after: nothing that does not bear the machine's checksum is
 * unpickled. */
static PyObject *copy_pickle(Machine *machine, uint32_t src, uint32_t index, uint32_t serial)
{
    const void *pickle;
    uint32_t length;
    uint64_t sum;
    PyObject *copy = NULL;
    int err = shi_func_find(&machine->m, src, index, serial, &pickle, &length, &sum);
    if (!err) {
        copy = PyBytes_FromStringAndSize(pickle, length);
        if (!copy)
            return NULL;
        if (shi_checksum(&machine->m, PyBytes_AS_STRING(copy), length) == sum)
            return copy;
        Py_DECREF(copy);
        /* Freed and used again meanwhile, or damaged? */
        err = shi_load_acquire(&shi_func_entry(&machine->m, src, index)->serial) == serial
                  ? -EBADMSG
                  : -ENOENT;
    }
    return shi_raise(shi_py.LayoutError, 0, -1, "function %u of slot %u is %s", index, src,
                     err == -ENOENT ? "not published any more" : "damaged");
}

PyObject *shi_function_received(Machine *machine, uint32_t src, uint16_t src_gen,
                                uint32_t index, uint32_t serial)
{
    if (!machine->received) {
        machine->received = PyMem_Calloc(machine->m.nslots, sizeof *machine->received);
        if (!machine->received)
            return PyErr_NoMemory();
    }
    if (src >= machine->m.nslots)
        return shi_raise(shi_py.LayoutError, 0, -1, "slot %u does not exist", src);
    struct func_cache *c = &machine->received[src];
    if (__builtin_expect(index < c->size && c->gen == src_gen && c->entries[index].function &&
                             c->entries[index].serial == serial,
                         1))
        return Py_NewRef(c->entries[index].function);
    PyObject *copy = copy_pickle(machine, src, index, serial);
    if (!copy)
        return NULL;
    PyObject *function = shi_unmixed(machine, shi_py.loads, copy);
    Py_DECREF(copy);
    if (!function || !machine->received) /* closed by what ran */
        return function;
    c = &machine->received[src];
    if (c->gen != src_gen) {
        cache_clear(c);
        c->gen = src_gen;
    }
    /* What the sender has freed since is dropped here, a sweep for as many misses as
     * there are entries. */
    if (++c->misses > c->live)
        cache_sweep(machine, src, c);
    if (index >= c->size) {
        uint32_t size = c->size ? c->size : 8;
        while (size <= index)
            size *= 2;
        struct func_cached *entries = PyMem_Realloc(c->entries, size * sizeof *entries);
        if (!entries) {
            Py_DECREF(function);
            return PyErr_NoMemory();
        }
        memset(entries + c->size, 0, (size - c->size) * sizeof *entries);
        c->entries = entries;
        c->size = size;
    }
    PyObject *old = c->entries[index].function;
    c->live += !old;
    c->entries[index].function = Py_NewRef(function);
    c->entries[index].serial = serial;
    Py_XDECREF(old);
    return function;
}

void shi_functions_clear(Machine *machine)
{
    uint32_t i;
    struct func_table t = machine->sent;
    machine->sent = (struct func_table){ 0 };
    for (i = 0; i < t.size; i++) {
        struct func_entry *e = t.slots[i];
        if (!e || e == &tombstone)
            continue;
        e->machine = NULL;
        Py_CLEAR(e->weak); /* it holds the entry, as its callback */
        Py_DECREF(e);
    }
    PyMem_Free(t.slots);
    if (machine->received) {
        for (i = 0; i < machine->m.nslots; i++)
            cache_clear(&machine->received[i]);
        PyMem_Free(machine->received);
        machine->received = NULL;
    }
    if (machine->sending && --senders == 0) {
        PyObject *pending = PyErr_Occurred() ? shi_take_exception() : NULL;
        PyObject *done = PyObject_CallNoArgs(shi_py.forget);
        if (!done)
            PyErr_WriteUnraisable(shi_py.forget);
        Py_XDECREF(done);
        shi_put_exception(pending);
    }
    machine->sending = false;
}

int shi_function_types(void)
{
    if (!entry_type)
        entry_type = (PyTypeObject *)PyType_FromSpec(&entry_spec);
    return entry_type ? 0 : -1;
}
