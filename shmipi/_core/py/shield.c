/* SPDX-License-Identifier: MIT */
/*
 * What keeps a handler and the task beneath it out of each other's way, where the
 * interpreter has one of a thing for both.
 *
 *   signals     the task's own signal handlers raise into the task, never into the handler
 *   imports     a task in the middle of an import is not interrupted by Python handlers
 *   recursion   a handler on top of a deep task has frames of its own left
 */
#include "py/base.h"

#include "py/entry.h"
#include "py/signals.h"
#include "py/tables.h"

/* ---- the entries of kick and NMI ------------------------------------------------- */

#define ENTRY(name, body)                                                                      \
    static PyObject *name##_call(PyObject *Py_UNUSED(object), PyObject *const *args,           \
                                 size_t nargsf, PyObject *kwnames)                             \
    {                                                                                          \
        Machine *machine = shi_own_cpu();                                                      \
        (void)args;                                                                            \
        (void)nargsf;                                                                          \
        (void)kwnames;                                                                         \
        if (machine && body(machine) < 0)                                                      \
            return NULL;                                                                       \
        Py_RETURN_NONE;                                                                        \
    }
ENTRY(irq_entry, shi_irq_entry_python)
ENTRY(nmi_entry, shi_nmi_entry_python)
#undef ENTRY

/* ---- imports --------------------------------------------------------------------- */

/*
 * In the place of importlib's functions that take a module's lock: _find_and_load, which does
 * the work of an import of what is not there yet, _lock_unlock_module, which waits for what
 * another thread imports, and _exec, which is a reload.  A handler in the middle of one would
 * see modules that are half there, and on 3.11 break importlib's own books when it imports
 * itself.
 */
static PyObject *hold(PyObject *original, PyObject *const *args, Py_ssize_t nargs,
                      PyObject *kwnames)
{
    Machine *machine = shi_own_cpu();
    if (!machine || !machine->self.in_task || machine->self.in_irq)
        return PyObject_Vectorcall(original, args, (size_t)nargs, kwnames);
    machine->self.held++;
    PyObject *result = PyObject_Vectorcall(original, args, (size_t)nargs, kwnames);
    if (--machine->self.held || machine->self.left)
        return result;
    PyObject *error = result ? NULL : shi_take_exception();
    shi_take_deferred(machine);
    shi_put_exception(error);
    return result;
}

#define HELD(name)                                                                             \
    static PyObject *original_##name;                                                          \
    static PyObject *name(PyObject *module, PyObject *const *args, Py_ssize_t nargs,           \
                          PyObject *kwnames)                                                   \
    {                                                                                          \
        (void)module;                                                                          \
        return hold(original_##name, args, nargs, kwnames);                                    \
    }
HELD(find_and_load)
HELD(lock_unlock_module)
HELD(exec)
#undef HELD

/* ---- putting it in place --------------------------------------------------------- */

static PyMethodDef replacements[] = {
#define HELD(name, text)                                                                       \
    { "_" #name, (PyCFunction)(void (*)(void))name, METH_FASTCALL | METH_KEYWORDS, text }
    HELD(find_and_load, "_find_and_load(name, import_)"),
    HELD(lock_unlock_module, "_lock_unlock_module(name)"),
    HELD(exec, "_exec(spec, module)"),
#undef HELD
};

/* shield(): from here on in this process and in those it forks.  The firmware calls it. */
static PyObject *shield(PyObject *module, PyObject *unused)
{
    (void)module;
    (void)unused;
    if (shi_signals_shield() < 0 ||
        shi_replace("_frozen_importlib", "_find_and_load", &original_find_and_load,
                    &replacements[0]) < 0 ||
        shi_replace("_frozen_importlib", "_lock_unlock_module", &original_lock_unlock_module,
                    &replacements[1]) < 0 ||
        shi_replace("_frozen_importlib", "_exec", &original_exec, &replacements[2]) < 0)
        return NULL;
    Py_RETURN_NONE;
}

PyMethodDef shi_shield_functions[] = {
    { "shield", shield, METH_NOARGS,
      "shield()\n--\n\nKeep handlers and tasks of this process's CPU out of each other's "
      "way." },
    { NULL, NULL, 0, NULL },
};

int shi_shield_types(PyObject *module)
{
    if (shi_signals_types() < 0)
        return -1;
    return shi_signal_entry(module, "irq_entry", irq_entry_call) < 0 ||
                   shi_signal_entry(module, "nmi_entry", nmi_entry_call) < 0
               ? -1
               : 0;
}
