/* SPDX-License-Identifier: MIT */
/*
 * Functions travel as numbers.
 *
 * Sender: a function object is known by identity.  Its code, defaults and the contents
 * of its closure cells are compared, by identity too, at each call; a change publishes
 * it anew.  The number is freed with the object.
 *
 * Target: a number met for the first time is looked up in the sender's table, in shared
 * memory, and unpickled once.
 */
#include "py_shi.h"

struct func_entry {
    PyObject_HEAD /* it is its own weakref callback */
    Machine *machine; /* borrowed; NULL when the machine is closed */
    PyObject *key;    /* borrowed: the weakref says when it is gone */
    PyObject *weak;
    uint32_t index;
    PyObject *code, *defaults, *kwdefaults;
    Py_ssize_t ncells;
    PyObject **cells; /* contents: a weak reference where possible, else strong */
};

/* ---- the table ------------------------------------------------------------------- */

static struct func_entry tombstone;

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
    *t = (struct func_table){slots, size, live};
    return 0;
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

static void table_drop(struct func_table *t, const struct func_entry *entry)
{
    uint32_t i;
    for (i = hash_of(entry->key) & (t->size - 1); t->slots[i]; i = (i + 1) & (t->size - 1))
        if (t->slots[i] == entry) {
            t->slots[i] = &tombstone;
            return;
        }
}

/* ---- entries --------------------------------------------------------------------- */

static void entry_forget_snapshot(struct func_entry *e)
{
    Py_ssize_t i;
    Py_CLEAR(e->code);
    Py_CLEAR(e->defaults);
    Py_CLEAR(e->kwdefaults);
    for (i = 0; i < e->ncells; i++)
        Py_XDECREF(e->cells[i]);
    PyMem_Free(e->cells);
    e->cells = NULL;
    e->ncells = 0;
}

static void entry_dealloc(PyObject *self)
{
    struct func_entry *e = (struct func_entry *)self;
    PyTypeObject *type = Py_TYPE(self);
    entry_forget_snapshot(e);
    Py_XDECREF(e->weak);
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
    if (machine && !machine->closed && !machine->foreign) {
        table_drop(&machine->sent, e);
        if (shi_other_thread(machine)) {
            shi_late(machine, e->index, false);
        } else {
            shi_enter(&machine->self);
            shi_func_retire(&machine->self, e->index);
            shi_leave(&machine->self);
        }
        e->machine = NULL;
        Py_DECREF(self); /* the table's reference */
    }
    Py_RETURN_NONE;
}

static PyType_Slot entry_slots[] = {
    {Py_tp_dealloc, entry_dealloc},
    {Py_tp_call, entry_call},
    {0, NULL},
};
static PyType_Spec entry_spec = {
    .name = "shmipi._core._SentFunction",
    .basicsize = sizeof(struct func_entry),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_DISALLOW_INSTANTIATION,
    .slots = entry_slots,
};
static PyTypeObject *entry_type;

static PyObject *cell_content(PyObject *closure, Py_ssize_t i)
{
    return PyCell_GET(PyTuple_GET_ITEM(closure, i)); /* borrowed, NULL when empty */
}

static int entry_snapshot(struct func_entry *e, PyObject *function)
{
    Py_ssize_t i;
    entry_forget_snapshot(e);
    if (!PyFunction_Check(function))
        return 0;
    PyObject *closure = PyFunction_GET_CLOSURE(function);
    e->code = Py_NewRef(PyFunction_GET_CODE(function));
    e->defaults = Py_XNewRef(PyFunction_GET_DEFAULTS(function));
    e->kwdefaults = Py_XNewRef(PyFunction_GET_KW_DEFAULTS(function));
    if (!closure)
        return 0;
    e->cells = PyMem_Calloc((size_t)PyTuple_GET_SIZE(closure), sizeof *e->cells);
    if (!e->cells) {
        PyErr_NoMemory();
        return -1;
    }
    e->ncells = PyTuple_GET_SIZE(closure);
    for (i = 0; i < e->ncells; i++) {
        PyObject *content = cell_content(closure, i);
        if (!content)
            continue;
        /* Weak where possible: a strong reference to something that leads back to the
         * function would keep it alive for ever. */
        e->cells[i] = PyWeakref_NewRef(content, NULL);
        if (!e->cells[i]) {
            PyErr_Clear();
            e->cells[i] = Py_NewRef(content);
        }
    }
    return 0;
}

static bool same_content(PyObject *kept, PyObject *now)
{
    if (!kept || !now)
        return kept == now;
    if (kept == now)
        return true;
    if (!PyWeakref_CheckRef(kept))
        return false;
#if PY_VERSION_HEX >= 0x030d0000
    PyObject *alive;
    if (PyWeakref_GetRef(kept, &alive) < 0) {
        PyErr_Clear();
        return false;
    }
    Py_XDECREF(alive); /* `now` is alive anyway if it is the same */
    return alive == now;
#else
    /* A dead reference says None; None itself is never kept as a weak one. */
    return now != Py_None && PyWeakref_GET_OBJECT(kept) == now;
#endif
}

static bool entry_is_current(const struct func_entry *e, PyObject *function)
{
    Py_ssize_t i;
    if (!e->code)
        return true; /* a builtin or a class */
    if (e->code != PyFunction_GET_CODE(function) ||
        e->defaults != PyFunction_GET_DEFAULTS(function) ||
        e->kwdefaults != PyFunction_GET_KW_DEFAULTS(function))
        return false;
    PyObject *closure = PyFunction_GET_CLOSURE(function);
    if ((closure ? PyTuple_GET_SIZE(closure) : 0) != e->ncells)
        return false;
    for (i = 0; i < e->ncells; i++)
        if (!same_content(e->cells[i], cell_content(closure, i)))
            return false;
    return true;
}

static int64_t publish(Machine *machine, PyObject *function)
{
    PyObject *pickle = PyObject_CallOneArg(shi_py.dumps, function);
    if (!pickle)
        return -2;
    if (!PyBytes_Check(pickle) || PyBytes_GET_SIZE(pickle) > UINT32_MAX) {
        Py_DECREF(pickle);
        PyErr_SetString(PyExc_TypeError, "a pickle is bytes of less than 4 GiB");
        return -2;
    }
    shi_enter(&machine->self);
    int64_t index = shi_func_publish(&machine->self, PyBytes_AS_STRING(pickle),
                                     (uint32_t)PyBytes_GET_SIZE(pickle));
    shi_leave(&machine->self);
    Py_DECREF(pickle);
    if (index < 0) {
        shi_raise_errno(machine, (int)index, -1);
        return -2;
    }
    return index;
}

int64_t shi_function_number(Machine *machine, PyObject *function)
{
    struct func_entry *e = table_find(&machine->sent, function);
    if (__builtin_expect(e != NULL, 1)) {
        if (entry_is_current(e, function))
            return e->index;
        int64_t index = publish(machine, function);
        if (index < 0)
            return index;
        shi_enter(&machine->self);
        shi_func_retire(&machine->self, e->index);
        shi_leave(&machine->self);
        e->index = (uint32_t)index;
        return entry_snapshot(e, function) < 0 ? -2 : index;
    }
    /* Other callables (bound methods, partials, objects) may change in ways that
     * identity does not show: they are pickled at each call. */
    if (!PyFunction_Check(function) && !PyType_Check(function) &&
        !(PyCFunction_Check(function) && (!PyCFunction_GET_SELF(function) ||
                                          PyModule_Check(PyCFunction_GET_SELF(function)))))
        return -1;
    int64_t index = publish(machine, function);
    if (index < 0)
        return index;
    e = PyObject_New(struct func_entry, entry_type);
    if (!e)
        goto fail;
    memset((char *)e + sizeof(PyObject), 0, sizeof *e - sizeof(PyObject));
    e->key = function;
    e->index = (uint32_t)index;
    e->machine = machine;
    e->weak = PyWeakref_NewRef(function, (PyObject *)e);
    if (!e->weak || entry_snapshot(e, function) < 0 || table_add(&machine->sent, e) < 0) {
        e->machine = NULL;
        Py_DECREF(e);
        goto fail;
    }
    return index;
fail:
    shi_enter(&machine->self);
    shi_func_retire(&machine->self, (uint32_t)index);
    shi_leave(&machine->self);
    return -2;
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
    *c = (struct func_cache){0};
}

PyObject *shi_function_received(Machine *machine, uint32_t src, uint16_t src_gen,
                                uint32_t index, uint32_t serial)
{
    const void *pickle;
    uint32_t length;
    if (!machine->received) {
        machine->received = PyMem_Calloc(machine->m.nslots, sizeof *machine->received);
        if (!machine->received)
            return PyErr_NoMemory();
    }
    if (src >= machine->m.nslots)
        return shi_raise(shi_py.LayoutError, 0, -1, "slot %u does not exist", src);
    struct func_cache *c = &machine->received[src];
    if (__builtin_expect(index < c->size && c->gen == src_gen &&
                             c->entries[index].function && c->entries[index].serial == serial,
                         1))
        return Py_NewRef(c->entries[index].function);
    int err = shi_func_find(&machine->m, src, index, serial, &pickle, &length);
    if (err)
        return shi_raise(shi_py.LayoutError, 0, -1,
                         "function %u of slot %u is %s", index, src,
                         err == -ENOENT ? "not published any more" : "damaged");
    PyObject *copy = PyBytes_FromStringAndSize(pickle, length);
    if (!copy)
        return NULL;
    PyObject *function = PyObject_CallOneArg(shi_py.loads, copy);
    Py_DECREF(copy);
    if (!function)
        return NULL;
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
    machine->sent = (struct func_table){0};
    for (i = 0; i < t.size; i++) {
        if (!t.slots[i] || t.slots[i] == &tombstone)
            continue;
        t.slots[i]->machine = NULL;
        Py_DECREF((PyObject *)t.slots[i]);
    }
    PyMem_Free(t.slots);
    if (machine->received) {
        for (i = 0; i < machine->m.nslots; i++)
            cache_clear(&machine->received[i]);
        PyMem_Free(machine->received);
        machine->received = NULL;
    }
}

int shi_function_types(void)
{
    if (!entry_type)
        entry_type = (PyTypeObject *)PyType_FromSpec(&entry_spec);
    return entry_type ? 0 : -1;
}
