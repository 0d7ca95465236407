/* SPDX-License-Identifier: MIT */
/* What every file of the binding needs: errors, arguments, the machine that is used. */
#include "py/base.h"

#include <math.h>
#include <stdarg.h>
#include <unistd.h>

#include "base/clock.h"

struct shi_python shi_py;
PyTypeObject *shi_machine_type;
Machine *shi_current;
const char *shi_absence = SHI_NO_CLUSTER;

PyObject *shi_unmixed(Machine *machine, PyObject *function, PyObject *object)
{
    bool own = !machine->self.host && !shi_other_thread(machine);
    machine->pickling += own;
    PyObject *result = PyObject_CallOneArg(function, object);
    machine->pickling -= own;
    return result;
}

PyObject *shi_import(const char *name)
{
    /* PyImport_Import() asks the builtins of the frame that runs for __import__: of the one that
     * was interrupted, and that of a namedtuple's __new__ has none. */
    PyObject *text = PyUnicode_InternFromString(name), *module = NULL;
    PyObject *top = text ? PyImport_ImportModuleLevelObject(text, NULL, NULL, NULL, 0) : NULL;
    if (top && !(module = PyImport_GetModule(text)) && !PyErr_Occurred())
        PyErr_Format(PyExc_ImportError, "%s is not there once it was imported", name);
    Py_XDECREF(top);
    Py_XDECREF(text);
    return module;
}

int shi_bound(void)
{
    if (shi_py.dumps)
        return 0;
    PyObject *remote = shi_import("shmipi.machine.remote"); /* calls bind() */
    Py_XDECREF(remote);
    return remote ? 0 : -1;
}

/* bind(errors, remote, mask_cpus): the Python this module calls back. */
static PyObject *bind(PyObject *module, PyObject *args)
{
    PyObject *errors, *remote, *mask_cpus;
    (void)module;
    if (!PyArg_ParseTuple(args, "OOO", &errors, &remote, &mask_cpus))
        return NULL;
    const struct {
        PyObject **where, *from;
        const char *name;
    } wanted[] = {
        { &shi_py.dumps, remote, "dumps" },
        { &shi_py.loads, remote, "loads" },
        { &shi_py.publish, remote, "publish" },
        { &shi_py.forget, remote, "forget" },
        { &shi_py.dump_exception, remote, "dump_exception" },
        { &shi_py.load_exception, remote, "load_exception" },
        { &shi_py.task_name, remote, "task_name" },
        { &shi_py.ending, remote, "ending" },
        { &shi_py.run_coroutine, remote, "run_coroutine" },
        { &shi_py.OfflineError, errors, "CpuOfflineError" },
        { &shi_py.UnknownError, errors, "UnknownCpuError" },
        { &shi_py.DiedError, errors, "CpuDiedError" },
        { &shi_py.MachineDiedError, errors, "MachineDiedError" },
        { &shi_py.BusyError, errors, "CsdBusyError" },
        { &shi_py.DeadlockError, errors, "IpiDeadlockError" },
        { &shi_py.TimeoutError, errors, "IpiTimeoutError" },
        { &shi_py.ArenaError, errors, "ArenaFullError" },
        { &shi_py.TableError, errors, "FunctionTableFullError" },
        { &shi_py.MmError, errors, "AddressSpaceError" },
        { &shi_py.FaultError, errors, "PageFaultError" },
        { &shi_py.LayoutError, errors, "LayoutError" },
        { &shi_py.NoTaskError, errors, "NoTaskError" },
        { &shi_py.AffinityError, errors, "AffinityError" },
        { &shi_py.StateError, errors, "ClusterStateError" },
        { &shi_py.NoMachineError, errors, "NoMachineError" },
        { &shi_py.CancelledError, errors, "TaskCancelledError" },
        { &shi_py.TaskInterrupt, errors, "TaskInterrupt" },
        { &shi_py.GroupError, errors, "CpusFailedError" },
        { &shi_py.Warning, errors, "ShmipiWarning" },
        { &shi_py.BootError, errors, "BootError" },
    };
    size_t i;
    for (i = 0; i < sizeof wanted / sizeof *wanted; i++) {
        PyObject *found = PyObject_GetAttrString(wanted[i].from, wanted[i].name);
        if (!found)
            return NULL;
        Py_XSETREF(*wanted[i].where, found);
    }
    Py_XSETREF(shi_py.mask_cpus, Py_NewRef(mask_cpus));
    Py_RETURN_NONE;
}

PyMethodDef shi_base_functions[] = {
    { "bind", bind, METH_VARARGS, "bind(errors, remote, mask_cpus)" },
    { NULL, NULL, 0, NULL },
};

/* ---- errors ---------------------------------------------------------------------------- */

PyObject *shi_take_exception(void)
{
#if PY_VERSION_HEX >= 0x030c0000
    return PyErr_GetRaisedException();
#else
    PyObject *type, *error, *traceback;
    PyErr_Fetch(&type, &error, &traceback);
    PyErr_NormalizeException(&type, &error, &traceback);
    if (error && traceback)
        PyException_SetTraceback(error, traceback);
    Py_XDECREF(type);
    Py_XDECREF(traceback);
    return error;
#endif
}

void shi_put_exception(PyObject *error)
{
    if (error) {
        PyErr_SetObject((PyObject *)Py_TYPE(error), error);
        Py_DECREF(error);
    }
}

PyObject *shi_os_error(int err, const char *what)
{
    errno = err;
    return PyErr_SetFromErrnoWithFilename(PyExc_OSError, what);
}

/* Raise `kind` with a message; OSErrors of ours take cpu and errno by keyword. */
PyObject *shi_raise(PyObject *kind, int err, int cpu, const char *format, ...)
{
    va_list arguments;
    va_start(arguments, format);
    PyObject *message = PyUnicode_FromFormatV(format, arguments);
    va_end(arguments);
    if (!message)
        return NULL;
    PyObject *error = NULL, *kwargs = NULL, *args = PyTuple_Pack(1, message);
    if (args && PyObject_IsSubclass(kind, PyExc_OSError) == 1) {
        kwargs = PyDict_New();
        PyObject *number = PyLong_FromLong(cpu), *code = PyLong_FromLong(err);
        if (kwargs && number && code) {
            if (cpu >= 0)
                PyDict_SetItemString(kwargs, "cpu", number);
            if (err)
                PyDict_SetItemString(kwargs, "errno", code);
        }
        Py_XDECREF(number);
        Py_XDECREF(code);
    }
    if (args)
        error = PyObject_Call(kind, args, kwargs);
    shi_put_exception(error);
    Py_XDECREF(kwargs);
    Py_XDECREF(args);
    Py_DECREF(message);
    return NULL;
}

/* Words for how a process ended, such as "killed by SIGKILL": new reference, or NULL. */
static PyObject *ending(uint32_t end)
{
    PyObject *number = PyLong_FromUnsignedLong(end);
    PyObject *text = number ? PyObject_CallOneArg(shi_py.ending, number) : NULL;
    Py_XDECREF(number);
    return text;
}

/* For a call that its target died with; `end` is how. */
static PyObject *raise_died(int cpu, uint32_t end, const char *what)
{
    PyObject *text = ending(end);
    if (text)
        shi_raise(shi_py.DiedError, EOWNERDEAD, cpu, "CPU %d died%s%U%s %s", cpu,
                  PyUnicode_GET_LENGTH(text) ? " (" : "", text,
                  PyUnicode_GET_LENGTH(text) ? ")" : "", what);
    Py_XDECREF(text);
    return NULL;
}

PyObject *shi_raise_died(Machine *machine, int cpu, uint64_t lock)
{
    uint32_t state = shi_load_acquire(&machine->m.header->machine_state);
    uint32_t end = (uint32_t)(lock >> SHI_CSD_END_SHIFT);
    if (state == SHI_M_DEAD || state == SHI_M_STOPPING)
        return shi_raise_errno(machine, -EOWNERDEAD, cpu);
    if ((lock & SHI_CSD_TYPE) == SHI_CSD_TTWU)
        return raise_died(cpu, end,
                          lock & SHI_CSD_BEGUN ? "while it ran this task"
                                               : "with this task queued: it has not run");
    return raise_died(cpu, end, "with this call in hand: it may or may not have run");
}

static PyObject *raise_offline(Machine *machine, int cpu)
{
    unsigned last = machine->m.ncpus - 1;
    if (cpu < 0 || (unsigned)cpu > last)
        return last ? shi_raise(shi_py.UnknownError, ENXIO, cpu,
                                "CPU %d does not exist: this machine has CPUs 0-%u", cpu, last)
                    : shi_raise(shi_py.UnknownError, ENXIO, cpu,
                                "CPU %d does not exist: this machine has only CPU 0", cpu);
    const struct shi_slot *slot = shi_slot(&machine->m, (uint32_t)cpu);
    /* Acquire: `end` was stored before the state. */
    if (shi_word_state(shi_load_acquire(&slot->word)) != SHI_DEAD)
        return shi_raise(shi_py.OfflineError, ENXIO, cpu,
                         "CPU %d is offline: bring it back with cluster.online(%d)", cpu, cpu);
    PyObject *text = ending(shi_load_relaxed(&slot->end));
    if (text)
        shi_raise(shi_py.OfflineError, ENXIO, cpu,
                  "CPU %d is dead%s%U: cluster.online(%d) boots it anew", cpu,
                  PyUnicode_GET_LENGTH(text) ? ", " : "", text, cpu);
    Py_XDECREF(text);
    return NULL;
}

PyObject *shi_raise_errno(Machine *machine, int err, int cpu)
{
    switch (-err) {
    case ENXIO:
        return raise_offline(machine, cpu);
    case ESHUTDOWN:
        return shi_raise(shi_py.StateError, 0, cpu,
                         machine->foreign || machine->self.pid != getpid()
                             ? "this machine belongs to the parent process: a "
                               "fork's child can not use it"
                             : "this cluster is closed");
    case EOWNERDEAD: {
        uint32_t state = shi_load_acquire(&machine->m.header->machine_state);
        if (machine->self.guest && shi_load_acquire(&machine->m.header->shut_down))
            return shi_raise(shi_py.StateError, 0, cpu,
                             "the machine %s was shut down by its owner",
                             machine->m.header->name);
        if (machine->ending || state == SHI_M_STOPPING)
            return shi_raise(
                shi_py.MachineDiedError, EOWNERDEAD, cpu,
                "the machine %s was shut down with this call in hand: it may or may "
                "not have run",
                machine->m.header->name);
        if (state == SHI_M_DEAD)
            return shi_raise(shi_py.MachineDiedError, EOWNERDEAD, cpu,
                             "the machine %s died: its firmware process is gone, and all its "
                             "CPUs with it",
                             machine->m.header->name);
        uint32_t end = cpu >= 0 && (uint32_t)cpu < machine->m.ncpus
                           ? shi_load_acquire(&shi_slot(&machine->m, (uint32_t)cpu)->end)
                           : 0;
        return raise_died(cpu, end, "with this call in hand: it may or may not have run");
    }
    case EBUSY:
        return shi_raise(shi_py.BusyError, EBUSY, cpu,
                         "this CallSingleData is still in use: look at its `locked`, or use "
                         "another one");
    case EDEADLK:
        return shi_raise(shi_py.DeadlockError, EDEADLK, cpu,
                         "CPUs wait for each other in a circle through CPU %d, all with "
                         "interrupts disabled: enable them before a waiting call",
                         cpu);
    case ETIMEDOUT:
        return shi_raise(shi_py.TimeoutError, ETIMEDOUT, cpu,
                         "no answer from CPU %d in time: the call stays queued and may still "
                         "run",
                         cpu);
    case EBADMSG:
        return shi_raise(shi_py.LayoutError, 0, cpu,
                         "CPU %d dropped calls: the segment is damaged", cpu);
    case ENOBUFS:
        return shi_raise(shi_py.ArenaError, ENOBUFS, cpu,
                         "the arena of this sender (%llu bytes) is full of payloads not yet "
                         "taken: wait for some, or put large data in cluster.shared()",
                         (unsigned long long)machine->m.arena_bytes);
    case E2BIG:
        return shi_raise(shi_py.ArenaError, E2BIG, cpu,
                         "more than the %llu bytes that one payload may have: put large data "
                         "in cluster.shared()",
                         (unsigned long long)machine->m.payload_max);
    case ENOSPC:
        return shi_raise(
            shi_py.ArenaError, ENOSPC, cpu,
            "/dev/shm is full: make it larger (mount -o remount,size=... /dev/shm, "
            "docker run --shm-size=...)");
    case EAGAIN:
        return shi_raise(shi_py.ArenaError, EAGAIN, cpu,
                         "all %u requests of this sender are in flight",
                         machine->m.csds_per_slot);
    default:
        return shi_raise(shi_py.ArenaError, -err, cpu, "shared memory: %s", strerror(-err));
    }
}

int shi_warn_once(bool *given, const char *text)
{
    if (*given)
        return 0;
    *given = true;
    return PyErr_WarnEx(shi_py.Warning, text, 1);
}

/* ---- using a machine ------------------------------------------------------------------- */

/* Freed by another thread of a CPU's process, which may not touch the sender. */
void shi_late(Machine *machine, uint32_t index, bool csd)
{
    if (machine->nlate == machine->late_room) {
        uint32_t room = machine->late_room ? 2 * machine->late_room : 16;
        uint64_t *grown = PyMem_Realloc(machine->late, room * sizeof *grown);
        if (!grown)
            return; /* a number less: no harm but its place */
        machine->late = grown;
        machine->late_room = room;
    }
    machine->late[machine->nlate++] = (uint64_t)index << 1 | csd;
}

static void late_done(Machine *machine)
{
    while (machine->nlate) {
        uint64_t entry = machine->late[--machine->nlate];
        uint32_t index = (uint32_t)(entry >> 1);
        shi_enter(&machine->self);
        if (!(entry & 1))
            shi_func_retire(&machine->self, index);
        else
            shi_csd_leave(&machine->self, index);
        shi_leave(&machine->self);
    }
}

bool shi_other_thread(const Machine *machine)
{
    return !machine->self.host && !pthread_equal(pthread_self(), machine->self.thread);
}

int shi_use(Machine *machine)
{
    if (__builtin_expect(shi_gone(machine), 0)) {
        shi_raise_errno(machine, -ESHUTDOWN, -1);
        return -1;
    }
    if (!machine->self.host && !pthread_equal(pthread_self(), machine->self.thread)) {
        PyErr_SetString(PyExc_RuntimeError,
                        "on a CPU only the main thread is the CPU: call shmipi.smp there");
        return -1;
    }
    if (__builtin_expect(machine->nlate != 0, 0))
        late_done(machine);
    return 0;
}

Machine *shi_use_current(void)
{
    if (shi_bound() < 0)
        return NULL;
    if (!shi_current || shi_current->foreign) {
        shi_raise(shi_py.NoMachineError, 0, -1,
                  "shmipi.smp and shmipi.irq have no machine here: "
                  "%s",
                  shi_absence);
        return NULL;
    }
    return shi_use(shi_current) < 0 ? NULL : shi_current;
}

int shi_refuse_host(const Machine *machine, const char *why)
{
    if (!machine->self.host)
        return 0;
    shi_raise(shi_py.StateError, 0, -1, "the host is no CPU: %s", why);
    return -1;
}

Machine *shi_use_cpu(const char *why)
{
    Machine *machine = shi_use_current();
    return machine && shi_refuse_host(machine, why) == 0 ? machine : NULL;
}

/* ---- arguments ------------------------------------------------------------------------- */

int shi_parse(const char *function, const char *const *names, int required, int total,
              PyObject *const *args, Py_ssize_t nargs, PyObject *kwnames, PyObject **out)
{
    int i;
    if (nargs > total) {
        PyErr_Format(PyExc_TypeError, "%s() takes at most %d arguments (%zd given)", function,
                     total, nargs);
        return -1;
    }
    for (i = 0; i < total; i++)
        out[i] = i < nargs ? args[i] : NULL;
    Py_ssize_t nkw = kwnames ? PyTuple_GET_SIZE(kwnames) : 0, k;
    for (k = 0; k < nkw; k++) {
        PyObject *name = PyTuple_GET_ITEM(kwnames, k);
        for (i = 0; i < total; i++)
            if (PyUnicode_CompareWithASCIIString(name, names[i]) == 0)
                break;
        if (i == total) {
            PyErr_Format(PyExc_TypeError, "%s() got an unexpected keyword argument '%U'",
                         function, name);
            return -1;
        }
        if (out[i]) {
            PyErr_Format(PyExc_TypeError, "%s() got multiple values for argument '%U'",
                         function, name);
            return -1;
        }
        out[i] = args[nargs + k];
    }
    for (i = 0; i < required; i++)
        if (!out[i]) {
            PyErr_Format(PyExc_TypeError, "%s() missing required argument '%s'", function,
                         names[i]);
            return -1;
        }
    return 0;
}

int shi_as_cpu(PyObject *object, int64_t *cpu)
{
    int overflow;
    PyObject *index = PyNumber_Index(object);
    if (!index)
        return -1;
    long long value = PyLong_AsLongLongAndOverflow(index, &overflow);
    Py_DECREF(index);
    *cpu = overflow || value > INT32_MAX || value < INT32_MIN ? -1 : value;
    return 0;
}

int shi_as_slot(PyObject *object, uint32_t limit, uint32_t *slot)
{
    unsigned long value = PyLong_AsUnsignedLong(object);
    if (PyErr_Occurred())
        return -1;
    if (value >= limit) {
        PyErr_Format(PyExc_ValueError, "no slot %lu", value);
        return -1;
    }
    *slot = (uint32_t)value;
    return 0;
}

int shi_as_bool(PyObject *object, int otherwise)
{
    return object ? PyObject_IsTrue(object) : otherwise;
}

int shi_as_deadline(PyObject *timeout, uint64_t *deadline)
{
    *deadline = 0;
    if (timeout == Py_None)
        return 0;
    double seconds = PyFloat_AsDouble(timeout);
    if (PyErr_Occurred())
        return -1;
    if (isnan(seconds) || seconds < 0) {
        PyErr_Format(PyExc_ValueError, "timeout is %R: give seconds >= 0, or None", timeout);
        return -1;
    }
    if (seconds < 1e9)
        *deadline = shi_now_ns() + (uint64_t)(seconds * 1e9) + 1;
    return 0;
}

/* CPU numbers of a mask argument, ascending, in machine memory to be freed. */
int shi_as_mask(Machine *machine, PyObject *mask, uint32_t **cpus, uint32_t *n)
{
    *cpus = NULL;
    *n = 0;
    PyObject *list =
        mask ? PyObject_CallFunction(shi_py.mask_cpus, "OI", mask, (unsigned)machine->m.ncpus)
             : NULL;
    if (mask && !list)
        return -1;
    Py_ssize_t count = list ? PyList_GET_SIZE(list) : (Py_ssize_t)machine->m.ncpus, i;
    *cpus = PyMem_Malloc(sizeof **cpus * (size_t)(count ? count : 1));
    if (!*cpus) {
        Py_XDECREF(list);
        PyErr_NoMemory();
        return -1;
    }
    for (i = 0; i < count; i++) {
        long value = list ? PyLong_AsLong(PyList_GET_ITEM(list, i)) : (long)i;
        if (value >= 0 && value < (long)machine->m.ncpus)
            (*cpus)[(*n)++] = (uint32_t)value;
    }
    Py_XDECREF(list);
    return PyErr_Occurred() ? -1 : 0;
}
