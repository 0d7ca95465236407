/* SPDX-License-Identifier: MIT */
/*
 * What a published function was made of, to be compared with what it is made of now.
 *
 * shmipi/machine/byvalue.py lists the functions and classes that it took by value.  Each is
 * compared by identity at each call: code, defaults, names, cells, attributes, and what its
 * globals are bound to; of a class, its dict.  Nothing of this runs Python code.
 *
 * CPUs share globals and classes among functions, so it also matters what was sent last of
 * them, with whatever function: the tables of byvalue.py say so.  They are compared only when
 * one of them has changed.
 *
 * An identity says something only as long as the object lives, so it is held: weakly where
 * possible, since what is held strongly may lead back to the function, which would then
 * live for ever.
 */
#include "py/guard.h"

#include "py/tables.h"

struct guard {
    PyObject *key;   /* of a dict; NULL for a cell or a field */
    PyObject *value; /* owned, unless `weak` is there or `lent`; NULL: not bound */
    PyObject *weak;
    bool lent; /* only compared, never followed */
};

#define FIELDS 7

/* Ranges of the guards of one function; of a class, only `attributes`. */
struct taken {
    PyObject *weak;   /* of the function or class; NULL: the one that was published */
    bool type;        /* a class */
    unsigned version; /* of the class when its dict was last found unchanged, or 0 */
    Py_ssize_t cells, globals, attributes, kwdefaults; /* how many */
    Py_ssize_t n;                                      /* all together */
    struct guard *guards;                              /* FIELDS, then those */
};

/* What one of the tables said of the names that were used. */
struct told {
    PyObject *table; /* owned: a dict that no user has */
    Py_ssize_t n;
    struct guard *guards;
};

struct shi_guards {
    Py_ssize_t n, ntold;
    uint64_t rebindings; /* when the tables were last found to say the same */
    struct told *told;
    struct taken taken[];
};

/* Counts changes of bindings in all tables. */
static uint64_t rebindings = 1;

static PyObject *functions_rebound(PyObject *module, PyObject *unused)
{
    (void)module;
    (void)unused;
    rebindings++;
    Py_RETURN_NONE;
}

static PyObject *cell_content(PyObject *cell)
{
    return PyCell_GET(cell); /* borrowed, NULL when empty */
}

/* ---- taking ---------------------------------------------------------------------- */

static int hold(struct guard *g, PyObject *key, PyObject *value)
{
    g->key = Py_XNewRef(key);
    if (value && PyType_SUPPORTS_WEAKREFS(Py_TYPE(value))) {
        g->weak = PyWeakref_NewRef(value, NULL);
        if (!g->weak)
            return -1;
        g->value = value;
    } else {
        g->value = Py_XNewRef(value);
    }
    return 0;
}

static struct guard *hold_dict(struct guard *g, PyObject *dict)
{
    Py_ssize_t at = 0;
    PyObject *key, *value;
    /* Nobody else has this dict: it stays as it is while weak references are made. */
    while (PyDict_Next(dict, &at, &key, &value))
        if (hold(g++, key, value) < 0)
            return NULL;
    return g;
}

static int take(struct taken *t, PyObject *object, PyObject *published, Py_ssize_t n)
{
    t->guards = PyMem_Calloc((size_t)n + 1, sizeof *t->guards);
    t->n = t->guards ? n : 0;
    if (!t->guards) {
        PyErr_NoMemory();
        return -1;
    }
    if (object != published && !(t->weak = PyWeakref_NewRef(object, NULL)))
        return -1;
    return 0;
}

static int take_function(struct taken *t, PyObject *item, PyObject *published)
{
    PyObject *function, *fields, *cells, *globals, *absent, *attributes, *kwdefaults;
    Py_ssize_t i;
    if (!PyArg_ParseTuple(item, "O!O!O!O!O!O!O!", &PyFunction_Type, &function, &PyTuple_Type,
                          &fields, &PyTuple_Type, &cells, &PyDict_Type, &globals, &PyTuple_Type,
                          &absent, &PyDict_Type, &attributes, &PyDict_Type, &kwdefaults))
        return -1;
    if (PyTuple_GET_SIZE(fields) != FIELDS) {
        PyErr_SetString(PyExc_SystemError, "byvalue.py and py/guard.c do not agree");
        return -1;
    }
    Py_ssize_t ncells = PyTuple_GET_SIZE(cells), nabsent = PyTuple_GET_SIZE(absent);
    Py_ssize_t nglobals = PyDict_GET_SIZE(globals) + nabsent;
    Py_ssize_t nattributes = PyDict_GET_SIZE(attributes);
    Py_ssize_t nkwdefaults = PyDict_GET_SIZE(kwdefaults);
    if (take(t, function, published, FIELDS + ncells + nglobals + nattributes + nkwdefaults) <
        0)
        return -1;
    struct guard *g = t->guards;
    for (i = 0; i < FIELDS; i++)
        if (hold(g++, NULL, PyTuple_GET_ITEM(fields, i)) < 0)
            return -1;
    for (i = 0; i < ncells; i++)
        if (hold(g++, NULL, cell_content(PyTuple_GET_ITEM(cells, i))) < 0)
            return -1;
    if (!(g = hold_dict(g, globals)))
        return -1;
    for (i = 0; i < nabsent; i++)
        if (hold(g++, PyTuple_GET_ITEM(absent, i), NULL) < 0)
            return -1;
    if (!(g = hold_dict(g, attributes)) || !hold_dict(g, kwdefaults))
        return -1;
    t->cells = ncells;
    t->globals = nglobals;
    t->attributes = nattributes;
    t->kwdefaults = nkwdefaults;
    return 0;
}

/* `__dict__`, `__weakref__` and slots lead back to their class and know no weak references:
 * held, they would keep every class for ever.  They are as good as part of it. */
static void lend_own_slots(struct taken *t, PyObject *type)
{
    Py_ssize_t i;
    for (i = 0; i < t->n; i++) {
        struct guard *g = &t->guards[i];
        if ((Py_IS_TYPE(g->value, &PyGetSetDescr_Type) ||
             Py_IS_TYPE(g->value, &PyMemberDescr_Type)) &&
            (PyObject *)PyDescr_TYPE(g->value) == type) {
            g->lent = true;
            Py_DECREF(g->value); /* the dict that was taken has it yet */
        }
    }
}

static int take_type(struct taken *t, PyObject *item, PyObject *published)
{
    PyObject *type, *dict;
    if (!PyArg_ParseTuple(item, "O!O!", &PyType_Type, &type, &PyDict_Type, &dict) ||
        take(t, type, published, PyDict_GET_SIZE(dict)) < 0 || !hold_dict(t->guards, dict))
        return -1;
    lend_own_slots(t, type);
    t->attributes = PyDict_GET_SIZE(dict);
    t->type = true;
    return 0;
}

static int take_table(struct told *t, PyObject *item)
{
    PyObject *table, *used;
    if (!PyArg_ParseTuple(item, "O!O!", &PyDict_Type, &table, &PyDict_Type, &used))
        return -1;
    t->guards = PyMem_Calloc((size_t)PyDict_GET_SIZE(used) + 1, sizeof *t->guards);
    if (!t->guards) {
        PyErr_NoMemory();
        return -1;
    }
    t->n = PyDict_GET_SIZE(used);
    t->table = Py_NewRef(table);
    return hold_dict(t->guards, used) ? 0 : -1;
}

struct shi_guards *shi_guards_new(PyObject *functions, PyObject *types, PyObject *tables,
                                  PyObject *published)
{
    if (!PyList_CheckExact(functions) || !PyList_CheckExact(types) ||
        !PyList_CheckExact(tables)) {
        PyErr_SetString(PyExc_TypeError, "lists of functions, types and tables");
        return NULL;
    }
    Py_ssize_t i, nfunctions = PyList_GET_SIZE(functions), n = nfunctions;
    n += PyList_GET_SIZE(types);
    struct shi_guards *all = PyMem_Calloc(1, sizeof *all + (size_t)n * sizeof *all->taken);
    if (!all) {
        PyErr_NoMemory();
        return NULL;
    }
    all->n = n;
    all->told = PyMem_Calloc((size_t)PyList_GET_SIZE(tables) + 1, sizeof *all->told);
    if (!all->told) {
        PyErr_NoMemory();
        goto fail;
    }
    all->ntold = PyList_GET_SIZE(tables);
    for (i = 0; i < all->ntold; i++)
        if (take_table(&all->told[i], PyList_GET_ITEM(tables, i)) < 0)
            goto fail;
    for (i = 0; i < n; i++) {
        struct taken *t = &all->taken[i];
        int err = i < nfunctions
                      ? take_function(t, PyList_GET_ITEM(functions, i), published)
                      : take_type(t, PyList_GET_ITEM(types, i - nfunctions), published);
        if (err)
            goto fail;
    }
    return all;
fail:
    shi_guards_free(all);
    return NULL;
}

static void release(struct guard *g, Py_ssize_t n)
{
    Py_ssize_t i;
    for (i = 0; i < n; i++) {
        Py_XDECREF(g[i].key);
        if (!g[i].weak && !g[i].lent)
            Py_XDECREF(g[i].value);
        Py_XDECREF(g[i].weak);
    }
    PyMem_Free(g);
}

void shi_guards_free(struct shi_guards *all)
{
    Py_ssize_t i;
    if (!all)
        return;
    for (i = 0; i < all->n; i++) {
        release(all->taken[i].guards, all->taken[i].n);
        Py_XDECREF(all->taken[i].weak);
    }
    for (i = 0; i < all->ntold; i++) {
        release(all->told[i].guards, all->told[i].n);
        Py_XDECREF(all->told[i].table);
    }
    PyMem_Free(all->told);
    PyMem_Free(all);
}

/* ---- comparing ------------------------------------------------------------------- */

/* What `weak` refers to, borrowed: it lives on, as somebody else holds it.  Or NULL. */
static PyObject *referent(PyObject *weak)
{
#if PY_VERSION_HEX >= 0x030d0000
    PyObject *alive = NULL;
    if (PyWeakref_GetRef(weak, &alive) < 0)
        PyErr_Clear();
    Py_XDECREF(alive);
    return alive;
#else
    PyObject *alive = PyWeakref_GET_OBJECT(weak);
    return alive == Py_None ? NULL : alive;
#endif
}

static inline bool same(const struct guard *g, PyObject *now)
{
    /* Another object may lie where one that has died lay. */
    return g->value == now && (!g->weak || referent(g->weak) == now);
}

static bool same_items(const struct guard *g, Py_ssize_t n, PyObject *dict)
{
    Py_ssize_t i;
    for (i = 0; i < n; i++) {
        PyObject *now = PyDict_GetItemWithError(dict, g[i].key);
        if (!same(&g[i], now)) {
            if (!now)
                PyErr_Clear();
            return false;
        }
    }
    return true;
}

static bool same_dict(const struct guard *g, Py_ssize_t n, PyObject *dict)
{
    if (!dict || dict == Py_None)
        return n == 0;
    return PyDict_GET_SIZE(dict) == n && same_items(g, n, dict);
}

static bool same_function(const struct taken *t, PyObject *function)
{
    const PyFunctionObject *f = (const PyFunctionObject *)function;
    PyObject *const fields[FIELDS] = { f->func_code,       f->func_defaults, f->func_name,
                                       f->func_qualname,   f->func_doc,      f->func_module,
                                       f->func_annotations };
    const struct guard *g = t->guards;
    Py_ssize_t i;
    for (i = 0; i < FIELDS; i++, g++)
        if (!same(g, fields[i] ? fields[i] : Py_None))
            return false;
    if ((f->func_closure ? PyTuple_GET_SIZE(f->func_closure) : 0) != t->cells)
        return false;
    for (i = 0; i < t->cells; i++, g++)
        if (!same(g, cell_content(PyTuple_GET_ITEM(f->func_closure, i))))
            return false;
    if (!same_items(g, t->globals, f->func_globals))
        return false;
    g += t->globals;
    return same_dict(g, t->attributes, f->func_dict) &&
           same_dict(g + t->attributes, t->kwdefaults, f->func_kwdefaults);
}

static bool same_type(struct taken *t, PyTypeObject *type)
{
    unsigned version = type->tp_version_tag;
    bool valid = PyType_HasFeature(type, Py_TPFLAGS_VALID_VERSION_TAG) && version;
    /* A tag is given out once, and taken from a type whose dict changes. */
    if (valid && version == t->version)
        return true;
    if (!same_dict(t->guards, t->attributes, type->tp_dict))
        return false;
#if PY_VERSION_HEX >= 0x030c0000
    PyUnstable_Type_AssignVersionTag(type);
    version = type->tp_version_tag;
    valid = PyType_HasFeature(type, Py_TPFLAGS_VALID_VERSION_TAG) && version;
#endif
    t->version = valid ? version : 0;
    return true;
}

static bool same_tables(struct shi_guards *all)
{
    Py_ssize_t i;
    if (all->rebindings == rebindings)
        return true;
    for (i = 0; i < all->ntold; i++)
        if (!same_items(all->told[i].guards, all->told[i].n, all->told[i].table))
            return false;
    all->rebindings = rebindings;
    return true;
}

bool shi_guards_hold(struct shi_guards *all, PyObject *published)
{
    Py_ssize_t i;
    for (i = 0; i < all->n; i++) {
        struct taken *t = &all->taken[i];
        PyObject *object = t->weak ? referent(t->weak) : published;
        if (!object ||
            !(t->type ? same_type(t, (PyTypeObject *)object) : same_function(t, object)))
            return false;
    }
    return same_tables(all);
}

PyMethodDef shi_guard_functions[] = {
    { "functions_rebound", functions_rebound, METH_NOARGS,
      "functions_rebound(): compare the tables of byvalue.py again" },
    { NULL, NULL, 0, NULL },
};
