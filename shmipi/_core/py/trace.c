/* SPDX-License-Identifier: MIT */
#include "py/trace.h"

#include "measure/bench.h"
#include "py/native.h"
#include "py/stack.h"
#include "py/tables.h"

/* ---- names ----------------------------------------------------------------------------- */

/*
 * What was named already, by identity: kept alive, so that no other object has its address.
 * Direct mapped: two that want one place are named again in turn, and a reader puts equal
 * names together.
 */
static struct known {
    PyObject *object;        /* owned: code, or a callable that has none */
    const void *instruction; /* of a line that calls; NULL: a function */
    uint64_t area;           /* in which the number is one: offset, and the machine's cookie */
    uint32_t number;
    bool own; /* of this package */
} known[512];

static struct known *place_of(const void *object, const void *instruction)
{
    uint64_t h = (uint64_t)(uintptr_t)object >> 4 ^ (uint64_t)(uintptr_t)instruction;
    return &known[(h * 0x9e3779b97f4a7c15ull) >> 55];
}

static uint64_t area_of(const Machine *machine)
{
    return shi_load_relaxed(&machine->m.header->users[SHI_USER_trace]) ^
           (uint64_t)machine->m.cookie << 32;
}

/* Its name in the rings, made if it is new.  Keeps what exception is set. */
static struct known *learn(Machine *machine, PyObject *object, const void *instruction,
                           PyObject *(*text)(PyObject *, const void *))
{
    struct known *k = place_of(object, instruction);
    uint64_t area = area_of(machine);
    if (__builtin_expect(
            k->object == object && k->instruction == instruction && k->area == area, 1))
        return k;
    PyObject *pending = PyErr_Occurred() ? shi_take_exception() : NULL;
    PyObject *name = text(object, instruction);
    Py_ssize_t length = 0;
    const char *utf8 = name ? PyUnicode_AsUTF8AndSize(name, &length) : NULL;
    PyErr_Clear();
    Py_XSETREF(k->object, Py_NewRef(object));
    k->instruction = instruction;
    k->area = area;
    k->number = utf8 ? shi_trace_name(&machine->self, utf8, (size_t)length) : 0;
    k->own = false;
    Py_XDECREF(name);
    shi_put_exception(pending);
    return k;
}

static PyObject *function_text(PyObject *object, const void *unused)
{
    (void)unused;
    if (PyCode_Check(object))
        return Py_NewRef(((PyCodeObject *)object)->co_qualname);
    if (PyCFunction_Check(object))
        return PyUnicode_FromString(((PyCFunctionObject *)object)->m_ml->ml_name);
    if (PyType_Check(object))
        return PyUnicode_FromString(((PyTypeObject *)object)->tp_name);
    return PyUnicode_FromString(Py_TYPE(object)->tp_name);
}

static PyObject *code_of(PyObject *function)
{
    if (PyMethod_Check(function))
        function = PyMethod_GET_FUNCTION(function);
    return PyFunction_Check(function) ? PyFunction_GET_CODE(function) : function;
}

uint32_t shi_called(Machine *machine, PyObject *function)
{
    if (!SHI_TRACING_ANY(&machine->self, ~0ull))
        return 0;
    if (Py_TYPE(function) == shi_native_type)
        return SHI_FUNC_NATIVE | ((NativeHandler *)function)->index;
    uint32_t number = learn(machine, code_of(function), NULL, function_text)->number;
    return number ? SHI_TRACE_NAMED | number : 0;
}

/* file.py:line(function), without blanks: as a symbol is. */
static PyObject *line_text(PyObject *object, const void *instruction)
{
    PyCodeObject *code = (PyCodeObject *)object;
    int line = PyCode_Addr2Line(
        code, (int)((const char *)instruction - (const char *)shi_code_begin(code)));
    PyObject *folders = PyUnicode_FromString("/"), *parts = NULL, *text = NULL;
    if (folders)
        parts = PyUnicode_RPartition(code->co_filename, folders);
    if (parts)
        text = PyUnicode_FromFormat("%U:%d(%U)", PyTuple_GET_ITEM(parts, 2), line,
                                    code->co_qualname);
    Py_XDECREF(folders);
    Py_XDECREF(parts);
    return text;
}

/* Of a code object: is it this package's own? */
static PyObject *own_text(PyObject *object, const void *unused)
{
    (void)object;
    (void)unused;
    return NULL;
}

static bool is_own(Machine *machine, PyObject *code)
{
    static const char inside; /* a key of its own: an instruction that no code has */
    struct known *k = place_of(code, &inside);
    if (k->object == code && k->instruction == &inside && k->area == area_of(machine))
        return k->own;
    k = learn(machine, code, &inside, own_text);
    const char *file = PyUnicode_AsUTF8(((PyCodeObject *)code)->co_filename);
    if (!file)
        PyErr_Clear();
    k->own = file && strstr(file, "/shmipi/") &&
             !strstr(file, "/tests/"); /* wherever it is installed */
    return k->own;
}

void shi_say_call_slow(Machine *machine, PyObject *function)
{
    struct shi_trace_said *said = shi_trace_said(&machine->self);
    uint32_t called = function ? shi_called(machine, function) : 0;
    said->called = called & SHI_TRACE_NAMED ? called & ~SHI_TRACE_NAMED : 0;
    said->site = 0;
    struct shi_frame at;
    for (shi_frame_begin(&at); at.code; shi_frame_next(&at)) {
        if (is_own(machine, at.code))
            continue;
        said->site = learn(machine, at.code, at.instruction, line_text)->number;
        return;
    }
}

/* ---- the rings ------------------------------------------------------------------------- */

METHOD(trace_bytes)
{
    unsigned long records = PyLong_AsUnsignedLong(arg);
    if (PyErr_Occurred())
        return NULL;
    return PyLong_FromUnsignedLongLong(
        records > UINT32_MAX ? 0 : shi_trace_bytes(&MACHINE(object)->m, (uint32_t)records));
}

METHOD(tracing)
{
    (void)arg;
    return PyLong_FromUnsignedLongLong(shi_load_relaxed(MACHINE(object)->self.tracing));
}

METHOD(set_tracing)
{
    unsigned long long events = PyLong_AsUnsignedLongLong(arg);
    if (PyErr_Occurred())
        return NULL;
    shi_store_full(&MACHINE(object)->m.header->tracing, events);
    Py_RETURN_NONE;
}

static struct shi_trace_area *area_or_raise(Machine *machine)
{
    struct shi_trace_area *area = shi_trace_area(&machine->m);
    if (!area)
        shi_raise(shi_py.LayoutError, 0, -1,
                  "this machine has no trace rings, or damaged ones");
    return area;
}

/* trace_rings() -> None, or (records of each, lossless). */
METHOD(trace_rings)
{
    (void)arg;
    const struct shi_trace_area *area = shi_trace_area(&MACHINE(object)->m);
    if (!area)
        Py_RETURN_NONE;
    return Py_BuildValue("IN", area->records,
                         PyBool_FromLong(shi_load_relaxed(&area->lossless) != 0));
}

METHOD(set_trace_lossless)
{
    struct shi_trace_area *area = area_or_raise(MACHINE(object));
    int on = PyObject_IsTrue(arg);
    if (!area || on < 0)
        return NULL;
    shi_store_full(&area->lossless, (uint32_t)on);
    Py_RETURN_NONE;
}

/* trace_head(slot) -> (records begun, dropped, taken by a reader) */
METHOD(trace_head)
{
    Machine *machine = MACHINE(object);
    struct shi_trace_area *area = area_or_raise(machine);
    uint32_t id;
    if (!area || shi_as_slot(arg, machine->m.nslots, &id) < 0)
        return NULL;
    const struct shi_trace_head *head = shi_trace_head(area, id);
    return Py_BuildValue("KKK", (unsigned long long)shi_load_acquire(&head->head),
                         (unsigned long long)shi_load_relaxed(&head->dropped),
                         (unsigned long long)shi_load_relaxed(&head->tail));
}

/* set_trace_tail(slot, position): what stands before it has been taken. */
METHOD(set_trace_tail)
{
    Machine *machine = MACHINE(object);
    struct shi_trace_area *area = area_or_raise(machine);
    unsigned long long tail;
    unsigned id;
    if (!area || !PyArg_ParseTuple(arg, "IK", &id, &tail))
        return NULL;
    if (id >= machine->m.nslots)
        return PyErr_Format(PyExc_ValueError, "slot %u does not exist", id);
    /* Release: who finds room for a record finds that the old one has been copied. */
    shi_store_release(&shi_trace_head(area, id)->tail, tail);
    Py_RETURN_NONE;
}

/* trace_take(slot, from, final) -> (records as bytes, next, lost, torn of those) */
METHOD(trace_take)
{
    Machine *machine = MACHINE(object);
    struct shi_trace_area *area = area_or_raise(machine);
    struct shi_trace_read read;
    unsigned long long from;
    unsigned id;
    int final;
    if (!area || !PyArg_ParseTuple(arg, "IKp", &id, &from, &final))
        return NULL;
    if (id >= machine->m.nslots)
        return PyErr_Format(PyExc_ValueError, "slot %u does not exist", id);
    uint64_t head = shi_load_acquire(&shi_trace_head(area, id)->head);
    uint64_t room = from < head ? head - from : 0;
    if (room > area->records)
        room = area->records;
    PyObject *bytes =
        PyBytes_FromStringAndSize(NULL, (Py_ssize_t)(room * sizeof(struct shi_trace_record)));
    if (!bytes)
        return NULL;
    uint32_t n = shi_trace_take(&machine->m, area, id, from,
                                (struct shi_trace_record *)(void *)PyBytes_AS_STRING(bytes),
                                (uint32_t)room, final, &read);
    if (_PyBytes_Resize(&bytes, (Py_ssize_t)(n * sizeof(struct shi_trace_record))) < 0)
        return NULL;
    return Py_BuildValue("NKKK", bytes, (unsigned long long)read.next,
                         (unsigned long long)read.lost, (unsigned long long)read.torn);
}

/* trace_reader(on) -> bool: who drains the rings, one at a time. */
METHOD(trace_reader)
{
    Machine *machine = MACHINE(object);
    struct shi_trace_area *area = area_or_raise(machine);
    int on = PyObject_IsTrue(arg);
    if (!area || on < 0)
        return NULL;
    if (!on)
        shi_lock_release(&machine->self, &area->reader);
    return PyBool_FromLong(!on || shi_lock_try(&machine->self, &area->reader) == 0);
}

/* trace_names() -> [name]: number i is at i - 1; None: it is being written. */
METHOD(trace_names)
{
    struct shi_trace_area *area = area_or_raise(MACHINE(object));
    uint32_t i, n;
    (void)arg;
    if (!area)
        return NULL;
    n = shi_load_relaxed(&area->nnames);
    if (n > SHI_TRACE_NAMES)
        n = SHI_TRACE_NAMES;
    PyObject *list = PyList_New(n);
    for (i = 0; list && i < n; i++) {
        struct shi_trace_name *name = &area->names[i];
        /* Acquire pairs with the release of who has written the text. */
        uint32_t length = shi_load_acquire(&name->length);
        PyObject *text = length && length <= sizeof name->text
                             ? PyUnicode_DecodeUTF8(name->text, length, "replace")
                             : Py_NewRef(Py_None);
        if (!text)
            Py_CLEAR(list);
        else
            PyList_SET_ITEM(list, i, text);
    }
    return list;
}

PyMethodDef shi_trace_methods[] = {
    ONE(trace_bytes, "trace_bytes(records) -> bytes of rings of so many each, 0: not possible"),
    NOARGS(tracing, "The events that are recorded: bits, by index in TRACE_EVENTS."),
    ONE(set_tracing, "set_tracing(mask): record these events, and no others."),
    NOARGS(trace_rings, "(records of each ring, lossless), or None: there are no rings."),
    ONE(set_trace_lossless, "set_trace_lossless(on): a full ring records no more."),
    ONE(trace_head, "trace_head(slot) -> (records begun, dropped, taken by a reader)"),
    MANY(set_trace_tail, "set_trace_tail(slot, position): taken so far."),
    MANY(trace_take, "trace_take(slot, from, final) -> (bytes, next, lost, torn of those)"),
    ONE(trace_reader, "trace_reader(on) -> bool: be who drains the rings."),
    NOARGS(trace_names, "Names by their number - 1."),
    { NULL, NULL, 0, NULL },
};
