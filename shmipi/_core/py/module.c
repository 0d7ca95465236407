/* SPDX-License-Identifier: MIT */
/* shmipi._core: the module itself, its errors and argument parsing. */
#include "py/shi.h"

#include <stdarg.h>

#include "base/trace.h"

struct shi_python shi_py;

int shi_bound(void)
{
    if (shi_py.dumps)
        return 0;
    PyObject *remote = PyImport_ImportModule("shmipi.machine.remote"); /* calls bind() */
    Py_XDECREF(remote);
    return remote ? 0 : -1;
}

/* ---- errors ---------------------------------------------------------------------- */

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
    if (error) {
        PyErr_SetObject((PyObject *)Py_TYPE(error), error);
        Py_DECREF(error);
    }
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
        return shi_raise(shi_py.StateError, 0, cpu, "this cluster is closed");
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

/* ---- arguments ------------------------------------------------------------------- */

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

/* ---- the module ------------------------------------------------------------------ */

static int add_methods(PyObject *module, PyMethodDef *const *parts, size_t n)
{
    size_t i;
    for (i = 0; i < n; i++)
        if (PyModule_AddFunctions(module, parts[i]) < 0)
            return -1;
    return 0;
}

static PyObject *name_list(const char *const *names, size_t n)
{
    size_t i;
    PyObject *tuple = PyTuple_New((Py_ssize_t)n);
    for (i = 0; tuple && i < n; i++) {
        PyObject *name = PyUnicode_FromString(names[i]);
        if (!name)
            Py_CLEAR(tuple);
        else
            PyTuple_SET_ITEM(tuple, (Py_ssize_t)i, name);
    }
    return tuple;
}

static int add_names(PyObject *module, const char *attribute, const char *const *names,
                     size_t n)
{
    PyObject *tuple = name_list(names, n);
    int err = tuple ? PyModule_AddObjectRef(module, attribute, tuple) : -1;
    Py_XDECREF(tuple);
    return err;
}

static const char *const counter_names[] = {
#define X(name) #name,
    SHI_COUNTERS(X)
#undef X
};

/* Where a reader that maps nothing finds things: (name, offset, bytes), see inspect.py. */
struct field {
    const char *name;
    size_t offset, size;
};
#define FIELD(type, name) { #name, offsetof(type, name), sizeof(((type *)0)->name) }

static const struct field header_fields[] = {
    FIELD(struct shi_header, magic),
    FIELD(struct shi_header, abi),
    FIELD(struct shi_header, header_bytes),
    FIELD(struct shi_header, name),
    FIELD(struct shi_header, slot_offset),
    FIELD(struct shi_header, ncpus),
    FIELD(struct shi_header, doorbell),
    FIELD(struct shi_header, kick_signal),
    FIELD(struct shi_header, kick),
    FIELD(struct shi_header, boot_time_ns),
    FIELD(struct shi_header, machine_state),
    FIELD(struct shi_header, irq_offset),
    { "chip", offsetof(struct shi_header, chip.name), sizeof((struct shi_chip *)0)->name },
    { "chip_nrows", offsetof(struct shi_header, chip.nrows), sizeof(uint32_t) },
    { "chip_rows", offsetof(struct shi_header, chip.rows), sizeof((struct shi_chip *)0)->rows },
    FIELD(struct shi_header, firmware_pid),
    FIELD(struct shi_header, host_pid),
    { "clock_source", offsetof(struct shi_header, clock.source), sizeof(uint32_t) },
    { "clock_shift", offsetof(struct shi_header, clock.shift), sizeof(uint32_t) },
    { "clock_mult", offsetof(struct shi_header, clock.mult), sizeof(uint64_t) },
    { "clock_base_stamp", offsetof(struct shi_header, clock.base_stamp), sizeof(uint64_t) },
    { "clock_base_ns", offsetof(struct shi_header, clock.base_ns), sizeof(uint64_t) },
};

static const struct field slot_fields[] = {
    FIELD(struct shi_slot, word),
    FIELD(struct shi_slot, pid),
    FIELD(struct shi_slot, generation),
    FIELD(struct shi_slot, core),
    FIELD(struct shi_slot, idle),
    FIELD(struct shi_slot, waiting_for),
    FIELD(struct shi_slot, task),
    FIELD(struct shi_slot, counters),
    FIELD(struct shi_slot, task_name),
    FIELD(struct shi_slot, end),
    FIELD(struct shi_slot, lends),
    FIELD(struct shi_slot, cur_csd),
    FIELD(struct shi_slot, handler),
    FIELD(struct shi_slot, since),
    FIELD(struct shi_slot, handler_name),
    { "rows", offsetof(struct shi_slot, pic.rows), sizeof((struct shi_pic *)0)->rows },
};

/* The irq descriptors, as shmipi/irq/table.py reads and fills them. */
static const struct field irqdesc_fields[] = {
    FIELD(struct shi_irqdesc, used),       FIELD(struct shi_irqdesc, flags),
    FIELD(struct shi_irqdesc, domain),     FIELD(struct shi_irqdesc, hwirq),
    FIELD(struct shi_irqdesc, ipi_base),   FIELD(struct shi_irqdesc, ipi_nr),
    FIELD(struct shi_irqdesc, ipi_offset), FIELD(struct shi_irqdesc, action),
    FIELD(struct shi_irqdesc, name),       FIELD(struct shi_irqdesc, epoch),
    FIELD(struct shi_irqdesc, src),        FIELD(struct shi_irqdesc, src_gen),
};

static const struct field irqdomain_fields[] = {
    FIELD(struct shi_irqdomain, used),   FIELD(struct shi_irqdomain, flags),
    FIELD(struct shi_irqdomain, parent), FIELD(struct shi_irqdomain, coproc),
    FIELD(struct shi_irqdomain, name),   FIELD(struct shi_irqdomain, lines),
};

static const char *const flow_names[SHI_NFLOWS] = {
    [SHI_FLOW_VECTOR] = "vector", [SHI_FLOW_MAILBOX] = "mailbox", [SHI_FLOW_MUX] = "mux",
    [SHI_FLOW_SGI] = "sgi",       [SHI_FLOW_SHARED] = "shared",   [SHI_FLOW_ESB] = "esb",
};

static int add_fields(PyObject *module, const char *attribute, const struct field *fields,
                      size_t n)
{
    size_t i;
    int err;
    PyObject *tuple = PyTuple_New((Py_ssize_t)n);
    for (i = 0; tuple && i < n; i++) {
        PyObject *entry = Py_BuildValue("(snn)", fields[i].name, (Py_ssize_t)fields[i].offset,
                                        (Py_ssize_t)fields[i].size);
        if (!entry)
            Py_CLEAR(tuple);
        else
            PyTuple_SET_ITEM(tuple, (Py_ssize_t)i, entry);
    }
    err = tuple ? PyModule_AddObjectRef(module, attribute, tuple) : -1;
    Py_XDECREF(tuple);
    return err;
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
        { &shi_py.LayoutError, errors, "LayoutError" },
        { &shi_py.StateError, errors, "ClusterStateError" },
        { &shi_py.NoMachineError, errors, "NoMachineError" },
        { &shi_py.RemoteError, errors, "RemoteCallError" },
        { &shi_py.CancelledError, errors, "TaskCancelledError" },
        { &shi_py.TaskInterrupt, errors, "TaskInterrupt" },
        { &shi_py.GroupError, errors, "CpusFailedError" },
        { &shi_py.Warning, errors, "ShmipiWarning" },
        { &shi_py.OSError, errors, "BootError" },
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

static PyMethodDef own_functions[] = {
    { "bind", bind, METH_VARARGS, "bind(errors, remote, mask_cpus)" },
    { "functions_rebound", shi_functions_rebound, METH_NOARGS,
      "functions_rebound(): compare the tables of byvalue.py again" },
    { NULL, NULL, 0, NULL },
};

static int module_exec(PyObject *module)
{
    PyMethodDef *const parts[] = {
        own_functions,         shi_call_functions, shi_cpu_functions,    shi_machine_functions,
        shi_barrier_functions, shi_wait_functions, shi_native_functions, shi_segment_functions,
        shi_bench_functions,   shi_irq_functions,  shi_shield_functions
    };
    if (add_methods(module, parts, sizeof parts / sizeof *parts) < 0 ||
        shi_atomic_add(module) < 0 || shi_function_types() < 0 ||
        shi_native_types(module) < 0 || shi_machine_types(module) < 0 ||
        shi_csd_types(module) < 0 || shi_bench_types(module) < 0 ||
        shi_shield_types(module) < 0)
        return -1;
    if (add_names(module, "COUNTERS", counter_names, SHI_NCOUNTERS) < 0 ||
        add_names(module, "TRACE_EVENTS", shi_trace_names, SHI_T_COUNT) < 0 ||
        add_fields(module, "HEADER_FIELDS", header_fields,
                   sizeof header_fields / sizeof *header_fields) < 0 ||
        add_names(module, "FLOWS", flow_names, SHI_NFLOWS) < 0 ||
        add_fields(module, "IRQDESC_FIELDS", irqdesc_fields,
                   sizeof irqdesc_fields / sizeof *irqdesc_fields) < 0 ||
        add_fields(module, "IRQDOMAIN_FIELDS", irqdomain_fields,
                   sizeof irqdomain_fields / sizeof *irqdomain_fields) < 0 ||
        add_fields(module, "SLOT_FIELDS", slot_fields,
                   sizeof slot_fields / sizeof *slot_fields) < 0)
        return -1;
    const struct {
        const char *name;
        long value;
    } numbers[] = {
        { "ABI", SHI_ABI },
        { "MAX_CPUS", SHI_MAX_CPUS },
        { "NAME_MAX", SHI_NAME_MAX },
        { "NOWAIT_POOL", SHI_NOWAIT_POOL },
        { "SLOT_BYTES", SHI_SLOT_BYTES },
        { "COUNTER_OFFSET", offsetof(struct shi_slot, counters) },
        { "COUNTER_ROOM", SHI_COUNTER_ROOM },
        { "CONTEXTS", SHI_NCTX },
        { "TRACE_HEAD_OFFSET", offsetof(struct shi_slot, trace_head) },
        { "TRACE_RECORD_BYTES", sizeof(struct shi_trace_record) },
        { "NCPUS_OFFSET", offsetof(struct shi_header, ncpus) },
        { "HEADER_BYTES", sizeof(struct shi_header) },
        { "EXTRA_SLOTS", SHI_EXTRA_SLOTS },
        { "GUESTS", SHI_GUESTS },
        { "W_PENDING", SHI_W_PENDING },
        { "OFFLINE", SHI_OFFLINE },
        { "CPU_DEAD", SHI_DEAD },
        { "END_EXITED", SHI_END_EXITED },
        { "HANDLER_IRQ", SHI_H_IRQ },
        { "HANDLER_NMI", SHI_H_NMI },
        { "NEW", SHI_M_NEW },
        { "BOOTING", SHI_M_BOOTING },
        { "UP", SHI_M_UP },
        { "STOPPING", SHI_M_STOPPING },
        { "DEAD", SHI_M_DEAD },
        { "NLINES", SHI_NLINES },
        { "NO_LINE", SHI_NO_LINE },
        { "NROWS", SHI_NROWS },
        { "NR_IRQS", SHI_NR_IRQS },
        { "NCOPROC", SHI_NCOPROC },
        { "IRQDESC_OFFSET", offsetof(struct shi_irq_area, desc) },
        { "IRQDESC_BYTES", sizeof(struct shi_irqdesc) },
        { "IRQDOMAIN_OFFSET", offsetof(struct shi_irq_area, domain) },
        { "IRQDOMAIN_BYTES", sizeof(struct shi_irqdomain) },
        { "NDOMAINS", SHI_NDOMAINS },
        { "LINE_VIRQ_OFFSET", offsetof(struct shi_irq_area, line_virq) },
        { "IRQ_AREA_BYTES", sizeof(struct shi_irq_area) },
        { "ROWS_OFFSET", offsetof(struct shi_slot, pic.rows) },
        { "USE_NONE", SHI_USE_NONE },
        { "USE_RESCHEDULE", SHI_USE_RESCHEDULE },
        { "USE_CALL", SHI_USE_CALL },
        { "USE_CALL_SINGLE", SHI_USE_CALL_SINGLE },
        { "USE_NMI", SHI_USE_NMI },
        { "USE_IRQ", SHI_USE_IRQ },
        { "USE_COUNT", SHI_USE_COUNT },
        { "STARTUP_NONE", SHI_SU_NONE },
        { "STARTUP_WAITING", SHI_SU_WAITING },
        { "STARTUP_STARTED", SHI_SU_STARTED },
        { "STARTUP_ASKED", SHI_SU_ASKED },
        { "STARTUP_RESET", SHI_SU_RESET },
        { "NO_CPU", SHI_NO_CPU },
        { "CPU_TASK", SHI_CPU_TASK },
        { "CPU_HANDLER", SHI_CPU_HANDLER },
        { "STEP_STOP", 1 },
        { "STEP_KILL", 2 },
    };
    size_t i;
    for (i = 0; i < sizeof numbers / sizeof *numbers; i++)
        if (PyModule_AddIntConstant(module, numbers[i].name, numbers[i].value) < 0)
            return -1;
    return PyModule_AddStringConstant(module, "MAGIC", SHI_MAGIC);
}

static PyModuleDef_Slot module_slots[] = {
    { Py_mod_exec, module_exec },
#if PY_VERSION_HEX >= 0x030c0000
    /* Signal handlers and the identity of a CPU are the process's. */
    { Py_mod_multiple_interpreters, Py_MOD_MULTIPLE_INTERPRETERS_NOT_SUPPORTED },
#endif
    { 0, NULL },
};

static struct PyModuleDef module_def = {
    PyModuleDef_HEAD_INIT,
    .m_name = "shmipi._core",
    .m_doc = "The C core of shmipi: mailboxes, queues, doorbells, and what binds them.",
    .m_slots = module_slots,
};

PyMODINIT_FUNC PyInit__core(void);

PyMODINIT_FUNC PyInit__core(void)
{
    return PyModuleDef_Init(&module_def);
}
