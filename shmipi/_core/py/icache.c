/* SPDX-License-Identifier: MIT */
/* Code that is replaced while it runs: shmipi/users/icache.py. */
#include "py/base.h"

#include <errno.h>

#include "base/clock.h"
#include "base/native.h"
#include "py/native.h"
#include "py/tables.h"
#include "py/wait.h"
#include "users/icache.h"

#define LIMIT_NS 5000000000ull
#define PROD_NS 10000000ull

static struct shi_icache *table(Machine *machine)
{
    struct shi_icache *ic = shi_use(machine) < 0 ? NULL : shi_icache(&machine->m);
    if (!ic && !PyErr_Occurred())
        shi_raise(shi_py.StateError, 0, -1,
                  "this machine has no table of functions: make it with cluster.users.icache");
    return ic;
}

static int as_text(PyObject *object, uint32_t *text)
{
    return shi_as_slot(object, SHI_TEXTS, text);
}

METHOD(icache_bytes)
{
    (void)arg;
    return PyLong_FromUnsignedLongLong(shi_icache_bytes(&MACHINE(object)->m));
}

/* icache_find(name) -> its number, or -1 */
METHOD(icache_find)
{
    const struct shi_icache *ic = table(MACHINE(object));
    const char *name = ic ? PyUnicode_AsUTF8(arg) : NULL;
    long i;
    if (!name)
        return NULL;
    for (i = 0; i < (long)SHI_TEXTS; i++)
        if (shi_load_acquire(&ic->texts[i].named) && shi_load_full(&ic->texts[i].version) &&
            !strncmp(ic->texts[i].name, name, sizeof ic->texts[i].name))
            return PyLong_FromLong(i);
    return PyLong_FromLong(-1);
}

/* ---- a call -------------------------------------------------------------------------------- */

/* icache_call(text, decode, args): decode(version) gives the function that this CPU runs.  In
 * one call of C: however the function ends, its call is over. */
static PyObject *icache_call(Machine *machine, PyObject *const *args, Py_ssize_t nargs)
{
    struct shi_icache *ic = table(machine);
    uint32_t text;
    if (!ic)
        return NULL;
    if (nargs != 3 || !PyTuple_Check(args[2])) {
        PyErr_SetString(PyExc_TypeError, "icache_call(text, decode, args)");
        return NULL;
    }
    if (as_text(args[0], &text) < 0 ||
        shi_refuse_host(machine, "a function of the table runs on a CPU") < 0)
        return NULL;
    uint64_t version = shi_icache_enter(&machine->self, ic, text);
    if (!version)
        return shi_raise(shi_py.MmError, ENOENT, -1, "the table has no such function");
    PyObject *number = PyLong_FromUnsignedLongLong(version), *result = NULL;
    PyObject *function = number ? PyObject_CallOneArg(args[1], number) : NULL;
    if (function)
        result = PyObject_Call(function, args[2], NULL);
    Py_XDECREF(function);
    Py_XDECREF(number);
    if (!shi_gone(machine))
        shi_icache_exit(&machine->self);
    return result;
}

/* icache_code(text, version) -> the pickle of a Python function, or the number of a native one;
 * inside a call, so that nobody writes over it */
static PyObject *icache_code(Machine *machine, PyObject *const *args, Py_ssize_t nargs)
{
    const struct shi_icache *ic = table(machine);
    uint32_t text;
    if (!ic)
        return NULL;
    if (nargs != 2) {
        PyErr_SetString(PyExc_TypeError, "icache_code(text, version)");
        return NULL;
    }
    if (as_text(args[0], &text) < 0)
        return NULL;
    uint64_t version = PyLong_AsUnsignedLongLong(args[1]);
    if (PyErr_Occurred())
        return NULL;
    uint32_t native = ic->texts[text].code[version & 1].native;
    uint32_t bytes = ic->texts[text].code[version & 1].bytes;
    if (native)
        return PyLong_FromUnsignedLong(native - 1);
    return PyBytes_FromStringAndSize(
        (const char *)ic->texts[text].code[version & 1].pickle,
        (Py_ssize_t)(bytes < SHI_TEXT_BYTES ? bytes : SHI_TEXT_BYTES));
}

/* icache_native(text, number): a native function of the table, with interrupts masked, as it
 * runs in a handler */
static PyObject *icache_native(Machine *machine, PyObject *const *args, Py_ssize_t nargs)
{
    int64_t offset;
    if (!table(machine))
        return NULL;
    if (nargs != 2) {
        PyErr_SetString(PyExc_TypeError, "icache_native(number, offset)");
        return NULL;
    }
    shi_native_handler *function = shi_native_get((uint32_t)PyLong_AsUnsignedLong(args[0]));
    offset = PyLong_AsLongLong(args[1]);
    if (PyErr_Occurred())
        return NULL;
    if (!function || (offset >= 0 && (uint64_t)offset >= shi_array_end(&machine->m)))
        return shi_raise(shi_py.LayoutError, 0, -1, "the table of functions is damaged");
    shi_enter(&machine->self);
    function(offset < 0 ? NULL : machine->m.base + offset);
    shi_leave(&machine->self);
    Py_RETURN_NONE;
}

/* ---- replacing ------------------------------------------------------------------------------- */

static int wait_for_all(Machine *machine, struct shi_icache *ic, uint64_t epoch)
{
    struct shi_allowance allowed = shi_allow(LIMIT_NS);
    uint64_t now, prod = shi_now_ns() + PROD_NS;
    uint32_t turn = 0;
    int64_t cpu;
    while ((cpu = shi_icache_behind(&machine->self, ic, epoch)) >= 0) {
        if (shi_wait_turn(machine, ++turn) < 0)
            return -1;
        now = shi_now_ns();
        if (now > prod) {
            shi_icache_prod(&machine->self, (uint32_t)cpu);
            prod = now + PROD_NS;
        }
        if (shi_allowance_over(&allowed)) {
            shi_raise(shi_py.TimeoutError, ETIMEDOUT, (int)cpu,
                      "CPU %d has been in a function that began before its replacement for 5 "
                      "s: later calls run the new one",
                      (int)cpu);
            return -1;
        }
    }
    return 0;
}

static PyObject *poke(Machine *machine, struct shi_icache *ic, uint32_t text, uint32_t native,
                      const void *pickle, Py_ssize_t bytes)
{
    int64_t version = shi_text_write(ic, text, native, pickle, (uint64_t)bytes);
    if (version < 0)
        return shi_raise(shi_py.ArenaError, E2BIG, -1,
                         "a function of the table has %u bytes at most, this one %zd",
                         SHI_TEXT_BYTES, bytes);
    struct shi_flusher by = { machine->natives, &shi_python_waiter, machine };
    int64_t epoch = shi_icache_flush(&machine->self, ic, &by);
    if (epoch < 0)
        return epoch == -EINTR ? NULL : shi_raise_errno(machine, (int)epoch, -1);
    return wait_for_all(machine, ic, (uint64_t)epoch) < 0 ? NULL : PyLong_FromLongLong(version);
}

/* icache_poke(text or name, native handler or None, pickle) -> version; a name: a new one */
static PyObject *icache_poke(Machine *machine, PyObject *const *args, Py_ssize_t nargs)
{
    struct shi_icache *ic = table(machine);
    const struct shi_self *self = &machine->self;
    uint32_t text, turn = 0;
    if (!ic)
        return NULL;
    if (nargs != 3 || !PyBytes_Check(args[2])) {
        PyErr_SetString(PyExc_TypeError, "icache_poke(text, native, pickle)");
        return NULL;
    }
    int64_t native = Py_TYPE(args[1]) == shi_native_type ? shi_native_number(machine, args[1])
                                                         : -1;
    if (PyErr_Occurred())
        return NULL;
    if (!self->host && (self->in_irq || self->in_nmi || self->irqs_off))
        return shi_raise(shi_py.StateError, 0, (int)self->id,
                         "code is replaced by tasks with interrupts enabled: others are waited "
                         "for");
    if (shi_icache_inside(self))
        return shi_raise(shi_py.DeadlockError, EDEADLK, (int)self->id,
                         "a function of the table cannot replace one: it would wait for its "
                         "own end");
    struct shi_allowance allowed = shi_allow(LIMIT_NS);
    while (shi_lock_try(&machine->self, &ic->lock)) {
        if (shi_wait_turn(machine, ++turn) < 0)
            return NULL;
        if (shi_allowance_over(&allowed))
            return shi_raise(shi_py.TimeoutError, ETIMEDOUT, -1,
                             "another replacement has been under way for 5 s");
    }
    PyObject *result = NULL;
    if (!PyUnicode_Check(args[0])) {
        if (as_text(args[0], &text) == 0)
            result = poke(machine, ic, text, native < 0 ? 0 : (uint32_t)native + 1,
                          PyBytes_AS_STRING(args[2]), PyBytes_GET_SIZE(args[2]));
    } else {
        const char *name = PyUnicode_AsUTF8(args[0]);
        for (text = 0; name && text < SHI_TEXTS && shi_load_full(&ic->texts[text].version);
             text++)
            if (!strncmp(ic->texts[text].name, name, sizeof ic->texts[text].name))
                break;
        if (!name) {
        } else if (text == SHI_TEXTS) {
            shi_raise(shi_py.TableError, EMFILE, -1, "the table has %u functions", SHI_TEXTS);
        } else if (shi_load_full(&ic->texts[text].version)) {
            shi_raise(shi_py.MmError, EEXIST, -1, "%s is in the table already", name);
        } else {
            strncpy(ic->texts[text].name, name, sizeof ic->texts[text].name - 1);
            shi_store_release(&ic->texts[text].named, 1);
            result = poke(machine, ic, text, native < 0 ? 0 : (uint32_t)native + 1,
                          PyBytes_AS_STRING(args[2]), PyBytes_GET_SIZE(args[2]));
        }
    }
    shi_lock_release(&machine->self, &ic->lock);
    return result;
}

/* icache_state(cpu) -> (seen, running, flushes, fetches) */
METHOD(icache_state)
{
    const struct shi_icache *ic = table(MACHINE(object));
    uint32_t cpu;
    if (!ic || shi_as_slot(arg, MACHINE(object)->m.ncpus, &cpu) < 0)
        return NULL;
    const struct shi_icache_cpu *row = &ic->cpus[cpu];
    return Py_BuildValue("KKKK", (unsigned long long)shi_load_full(&row->seen),
                         (unsigned long long)shi_load_full(&row->running),
                         (unsigned long long)shi_load_full(&row->flushes),
                         (unsigned long long)shi_load_full(&row->fetches));
}

#define ENTRY(name, text) { #name, FAST(name), METH_FASTCALL, text }
PyMethodDef shi_icache_methods[] = {
    NOARGS(icache_bytes, "What the table of functions takes."),
    ONE(icache_find, "icache_find(name) -> number, or -1"),
    ENTRY(icache_call, "icache_call(text, decode, args): decode(version)(*args)"),
    ENTRY(icache_code, "icache_code(text, version) -> pickle, or number of a native function"),
    ENTRY(icache_native, "icache_native(number, offset): run it"),
    ENTRY(icache_poke, "icache_poke(text or new name, native or None, pickle) -> version"),
    ONE(icache_state, "icache_state(cpu) -> (seen, running, flushes, fetches)"),
    { NULL, NULL, 0, NULL },
};
