/* SPDX-License-Identifier: MIT */
/*
 * A task's own signal handlers raise into the task, never into an IPI handler on top of it.
 */
#include "py/signals.h"

#include <pthread.h>
#include <signal.h>
#include <structmember.h>
#include <unistd.h>
#include <errno.h>

Machine *shi_own_cpu(void)
{
    Machine *machine = shi_current;
    return machine && !machine->self.host && !machine->self.left &&
                   pthread_equal(pthread_self(), machine->self.thread)
               ? machine
               : NULL;
}

/*
 * CPython calls a signal's handler in whatever frame runs: also in that of an IPI handler
 * on top of the task, whose caller would get what it raises.  Which signals may come when,
 * and on which thread, cannot be bounded by masks without a gap.  So the handler that a
 * task installs is wrapped: on top of the task it only notes the signal, which is raised
 * again when the IPI handler has returned.
 */
typedef struct {
    PyObject_HEAD
    vectorcallfunc vectorcall;
    PyObject *handler;
} TaskSignal;

static PyTypeObject *task_signal_type, *entry_type;
static PyObject *original_signal, *original_getsignal, *original_set_wakeup_fd;

static PyObject *task_signal_call(PyObject *object, PyObject *const *args, size_t nargsf,
                                  PyObject *kwnames)
{
    PyObject *handler = ((TaskSignal *)object)->handler;
    Machine *machine = shi_own_cpu();
    if (machine && machine->self.in_task &&
        (!shi_in_task(&machine->self) || machine->self.in_stop) &&
        PyVectorcall_NARGS(nargsf) > 0) {
        long number = PyLong_AsLong(args[0]);
        if (number > 0 && number <= 64) {
            machine->put_off |= 1ull << (number - 1);
            Py_RETURN_NONE;
        }
        PyErr_Clear();
    }
    Py_INCREF(handler); /* it may install another one */
    PyObject *result = PyObject_Vectorcall(handler, args, nargsf, kwnames);
    if (!result && machine && !machine->self.left && !machine->self.in_task) {
        PyErr_WriteUnraisable(handler); /* an idle CPU: nobody is there to raise it in */
        result = Py_NewRef(Py_None);
    }
    Py_DECREF(handler);
    return result;
}

static int task_signal_traverse(PyObject *object, visitproc visit, void *arg)
{
    Py_VISIT(Py_TYPE(object));
    Py_VISIT(((TaskSignal *)object)->handler);
    return 0;
}

static int task_signal_clear(PyObject *object)
{
    Py_CLEAR(((TaskSignal *)object)->handler);
    return 0;
}

static void task_signal_dealloc(PyObject *object)
{
    PyTypeObject *type = Py_TYPE(object);
    PyObject_GC_UnTrack(object);
    task_signal_clear(object);
    type->tp_free(object);
    Py_DECREF(type);
}

static PyMemberDef task_signal_members[] = {
    { "__vectorcalloffset__", T_PYSSIZET, offsetof(TaskSignal, vectorcall), READONLY, NULL },
    { NULL, 0, 0, 0, NULL },
};
static PyType_Slot task_signal_slots[] = {
    { Py_tp_dealloc, task_signal_dealloc }, { Py_tp_traverse, task_signal_traverse },
    { Py_tp_clear, task_signal_clear },     { Py_tp_call, PyVectorcall_Call },
    { Py_tp_members, task_signal_members }, { 0, NULL },
};
static PyType_Spec task_signal_spec = {
    .name = "shmipi._core._TaskSignal",
    .basicsize = sizeof(TaskSignal),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC | Py_TPFLAGS_HAVE_VECTORCALL |
             Py_TPFLAGS_DISALLOW_INSTANTIATION,
    .slots = task_signal_slots,
};

/* What the user installed, of what the interpreter has: consumes and returns a reference. */
static PyObject *unwrap(PyObject *installed)
{
    if (!installed || !Py_IS_TYPE(installed, task_signal_type))
        return installed;
    PyObject *handler = Py_NewRef(((TaskSignal *)installed)->handler);
    Py_DECREF(installed);
    return handler;
}

/*
 * Not a builtin function: to call one counts against the recursion limit on 3.11, and a
 * task at its limit would be raised RecursionError in, and the kick be lost.
 */
typedef struct {
    PyObject_HEAD
    vectorcallfunc vectorcall;
} Entry;

static PyMemberDef entry_members[] = {
    { "__vectorcalloffset__", T_PYSSIZET, offsetof(Entry, vectorcall), READONLY, NULL },
    { NULL, 0, 0, 0, NULL },
};
static PyType_Slot entry_slots[] = {
    { Py_tp_call, PyVectorcall_Call },
    { Py_tp_members, entry_members },
    { Py_tp_doc, "The Python-level handler of the kick signal, or of the NMI's." },
    { 0, NULL },
};
static PyType_Spec entry_spec = {
    .name = "shmipi._core._SignalEntry",
    .basicsize = sizeof(Entry),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_VECTORCALL |
             Py_TPFLAGS_DISALLOW_INSTANTIATION,
    .slots = entry_slots,
};

int shi_signal_entry(PyObject *module, const char *name, vectorcallfunc function)
{
    Entry *entry = (Entry *)entry_type->tp_alloc(entry_type, 0);
    if (!entry)
        return -1;
    entry->vectorcall = function;
    int err = PyModule_AddObjectRef(module, name, (PyObject *)entry);
    Py_DECREF(entry);
    return err;
}

/*
 * Who has set a wakeup descriptor (asyncio) reads the numbers of his signals from it.  The
 * interpreter writes there whatever it is asked for: also our kicks, which fill it while its
 * reader is busy, so that a signal of the task's is lost, and a signal that was put off a
 * second time.  So it has none, and this handler, over the interpreter's, writes what came.
 */
static shi_a32 wakeup_fd = UINT32_MAX; /* an int: -1 */
static void (*python_handler)(int);    /* the same for every signal */

/* What came before the CPU's interpreter knew of its fork: then it forgets what was asked. */
static shi_a64 early;

static void on_task_signal(int number)
{
    int saved = errno;
    if (shi_current && shi_current->newborn)
        shi_fetch_or_full(&early, 1ull << (number - 1));
    unsigned char byte = (unsigned char)number;
    python_handler(number); /* first, as in the interpreter: who is woken finds it noted */
    int fd = (int)shi_load_acquire(&wakeup_fd);
    while (fd >= 0 && write(fd, &byte, 1) < 0 && errno == EINTR)
        ;
    errno = saved;
}

static PyObject *set_wakeup_fd(PyObject *module, PyObject *args, PyObject *kwargs)
{
    (void)module;
    PyObject *none = PyObject_Call(original_set_wakeup_fd, args, kwargs); /* checks it all */
    if (!none)
        return NULL;
    Py_DECREF(none);
    PyObject *given = PyObject_CallFunction(original_set_wakeup_fd, "i", -1);
    if (!given)
        return NULL;
    int fd = (int)PyLong_AsLong(given);
    Py_DECREF(given);
    return PyLong_FromLong((int)shi_xchg_full(&wakeup_fd, (uint32_t)fd));
}

/* The interpreter's handler of `number` is in place: ours over it.  The flags stay. */
static void cover(int number)
{
    struct sigaction now;
    if (sigaction(number, NULL, &now) || now.sa_flags & SA_SIGINFO ||
        now.sa_handler == SIG_DFL || now.sa_handler == SIG_IGN ||
        now.sa_handler == on_task_signal)
        return;
    python_handler = now.sa_handler;
    now.sa_handler = on_task_signal;
    sigaction(number, &now, NULL);
}

/* signal(number, wrapped).  Blocked meanwhile: one that comes between the interpreter's
 * handler and ours would not be written. */
static PyObject *install(PyObject *number, PyObject *wrapped)
{
    sigset_t one, mask;
    long n = PyLong_Check(number) ? PyLong_AsLong(number) : -1;
    if (n < 1 || n > 64)
        PyErr_Clear(); /* the interpreter knows what to say */
    sigemptyset(&one);
    bool valid = n >= 1 && n <= 64 && sigaddset(&one, (int)n) == 0;
    if (valid)
        pthread_sigmask(SIG_BLOCK, &one, &mask);
    PyObject *old = PyObject_CallFunctionObjArgs(original_signal, number, wrapped, NULL);
    if (valid && old)
        cover((int)n);
    if (valid)
        pthread_sigmask(SIG_SETMASK, &mask, NULL);
    return old;
}

/* In the place of _signal.signal, in the firmware and so in every CPU. */
static PyObject *set_signal(PyObject *module, PyObject *const *args, Py_ssize_t nargs)
{
    (void)module;
    if (nargs != 2 || !PyCallable_Check(args[1]) || Py_IS_TYPE(args[1], entry_type))
        return unwrap(PyObject_Vectorcall(original_signal, args, (size_t)nargs, NULL));
    TaskSignal *wrapped = (TaskSignal *)task_signal_type->tp_alloc(task_signal_type, 0);
    if (!wrapped)
        return NULL;
    wrapped->vectorcall = task_signal_call;
    wrapped->handler = Py_NewRef(args[1]);
    PyObject *old = install(args[0], (PyObject *)wrapped);
    Py_DECREF(wrapped);
    return unwrap(old);
}

static PyObject *get_signal(PyObject *module, PyObject *number)
{
    (void)module;
    return unwrap(PyObject_CallOneArg(original_getsignal, number));
}

void shi_signals_raise(Machine *machine)
{
    uint64_t set = machine->put_off;
    int number;
    machine->put_off = 0;
    for (number = 1; number <= 64; number++)
        if (set >> (number - 1) & 1)
            PyErr_SetInterruptEx(number);
    machine->raised = true;
}

bool shi_signals_came(void)
{
    return shi_load_acquire(&early) != 0;
}

void shi_signals_early(void)
{
    uint64_t set = shi_xchg_full(&early, 0);
    int number;
    for (number = 1; set; number++, set >>= 1)
        if (set & 1)
            PyErr_SetInterruptEx(number);
}

int shi_signals_check(Machine *machine)
{
    if (__builtin_expect(!machine->raised, 1) || shi_in_serving_softirq(&machine->self))
        return 0;
    machine->raised = false;
    return PyErr_CheckSignals();
}

/* ---- putting it in place --------------------------------------------------------------- */

int shi_replace(const char *in, const char *name, PyObject **original, PyMethodDef *by)
{
    PyObject *module = shi_import(in);
    PyObject *home = NULL, *function = NULL;
    int err = -1;
    if (module && !*original && !(*original = PyObject_GetAttrString(module, name)))
        goto out;
    home = module ? PyModule_GetNameObject(module) : NULL;
    function = home ? PyCFunction_NewEx(by, NULL, home) : NULL;
    if (function)
        err = PyObject_SetAttrString(module, name, function);
out:
    Py_XDECREF(function);
    Py_XDECREF(home);
    Py_XDECREF(module);
    return err;
}

static PyMethodDef replacements[] = {
    { "signal", (PyCFunction)(void (*)(void))set_signal, METH_FASTCALL,
      "signal(signalnum, handler, /)\n--\n\nSet the handler of a signal: what it was." },
    { "getsignal", get_signal, METH_O,
      "getsignal(signalnum, /)\n--\n\nThe handler of a signal." },
    { "set_wakeup_fd", (PyCFunction)(void (*)(void))set_wakeup_fd, METH_VARARGS | METH_KEYWORDS,
      "set_wakeup_fd(fd, *, warn_on_full_buffer=True)\n--\n\n"
      "Where the numbers of signals are written: what it was.  A full buffer is no error." },
};

/* Handlers that were installed before (sitecustomize, a library): as if it were now. */
static int install_again(void)
{
    int number;
    for (number = 1; number <= 64; number++) {
        PyObject *args[2] = { PyLong_FromLong(number), NULL }, *old = NULL;
        args[1] = args[0] ? PyObject_CallOneArg(original_getsignal, args[0]) : NULL;
        bool found = args[1] && PyCallable_Check(args[1]) &&
                     !Py_IS_TYPE(args[1], task_signal_type);
        if (found)
            old = set_signal(NULL, args, 2);
        Py_XDECREF(args[0]);
        Py_XDECREF(args[1]);
        Py_XDECREF(old);
        if (PyErr_Occurred())
            return -1;
    }
    return 0;
}

int shi_signals_shield(void)
{
    if (shi_replace("_signal", "signal", &original_signal, &replacements[0]) < 0 ||
        shi_replace("_signal", "getsignal", &original_getsignal, &replacements[1]) < 0 ||
        shi_replace("_signal", "set_wakeup_fd", &original_set_wakeup_fd, &replacements[2]) <
            0 ||
        shi_replace("signal", "set_wakeup_fd", &original_set_wakeup_fd, &replacements[2]) < 0)
        return -1;
    return install_again();
}

int shi_signals_types(void)
{
    task_signal_type = (PyTypeObject *)PyType_FromSpec(&task_signal_spec);
    entry_type = (PyTypeObject *)PyType_FromSpec(&entry_spec);
    return task_signal_type && entry_type ? 0 : -1;
}
