/* SPDX-License-Identifier: MIT */
/* shmipi._core: the module, put together. */
#include "py/base.h"

#include "base/step.h"
#include "base/trace.h"
#include "irq/chip.h"
#include "irq/flows.h"
#include "irq/irqdesc.h"
#include "measure/limit.h"
#include "py/csd.h"
#include "py/func.h"
#include "py/hist.h"
#include "py/machine.h"
#include "py/native.h"
#include "py/tables.h"

/* ---- the Machine type ------------------------------------------------------------------ */

/* The type's methods come from several files. */
static PyMethodDef *all_methods(void)
{
    static PyMethodDef all[384];
    PyMethodDef *const parts[] = {
        shi_machine_methods, shi_smp_methods,      shi_post_methods,     shi_cpu_methods,
        shi_chip_methods,    shi_irq_methods,      shi_waitq_methods,    shi_slot_methods,
        shi_segment_methods, shi_doorbell_methods, shi_native_methods,   shi_hotplug_methods,
        shi_reap_methods,    shi_lock_methods,     shi_step_methods,     shi_irqlock_methods,
        shi_irqsync_methods, shi_nmi_ipi_methods,  shi_nmi_list_methods, shi_users_methods,
        shi_trace_methods,   shi_softirq_methods,  shi_stall_methods,    shi_stop_methods,
        shi_tick_methods,    shi_mm_methods,       shi_icache_methods,   shi_net_methods,
        shi_rps_methods,     shi_blk_methods,      shi_dump_methods,     shi_sched_methods,
        shi_rcu_methods,
    };
    size_t n = 0, p;
    for (p = 0; p < sizeof parts / sizeof *parts; p++) {
        PyMethodDef *def;
        for (def = parts[p]; def->ml_name && n < sizeof all / sizeof *all - 1; def++)
            all[n++] = *def;
    }
    return all;
}

static int machine_type(PyObject *module)
{
    PyType_Slot slots[] = {
        { Py_tp_new, shi_machine_new },
        { Py_tp_dealloc, shi_machine_dealloc },
        { Py_tp_methods, all_methods() },
        { Py_tp_getset, shi_machine_getset },
        { Py_bf_getbuffer, shi_machine_getbuffer },
        { Py_tp_doc, "Machine(fd, slot)\n--\n\nThis process's view of a machine." },
        { 0, NULL },
    };
    PyType_Spec spec = {
        .name = "shmipi._core.Machine",
        .basicsize = sizeof(Machine),
        .flags = Py_TPFLAGS_DEFAULT,
        .slots = slots,
    };
    if (!shi_machine_type)
        shi_machine_type = (PyTypeObject *)PyType_FromSpec(&spec);
    return shi_machine_type
               ? PyModule_AddObjectRef(module, "Machine", (PyObject *)shi_machine_type)
               : -1;
}

/* ---- constants ------------------------------------------------------------------------- */

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

static const char *const cause_names[] = {
#define X(name) #name,
    SHI_CAUSES(X)
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
    FIELD(struct shi_header, tracing),
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
    FIELD(struct shi_irqdesc, next),
};

static const struct field irqdomain_fields[] = {
    FIELD(struct shi_irqdomain, used),   FIELD(struct shi_irqdomain, flags),
    FIELD(struct shi_irqdomain, parent), FIELD(struct shi_irqdomain, coproc),
    FIELD(struct shi_irqdomain, name),   FIELD(struct shi_irqdomain, lines),
};

static int add_flows(PyObject *module)
{
    const char *names[SHI_NFLOWS], *routed[SHI_NFLOWS], *banked[SHI_NFLOWS];
    size_t i, nrouted = 0, nbanked = 0;
    PyObject *lines = PyDict_New();
    int err = lines ? 0 : -1;
    for (i = 0; i < SHI_NFLOWS && !err; i++) {
        const struct shi_flow *flow = shi_flow_of((uint32_t)i);
        PyObject *most = PyLong_FromUnsignedLong(flow->max_lines);
        names[i] = flow->name;
        if (flow->routed)
            routed[nrouted++] = flow->name;
        if (flow->banked)
            banked[nbanked++] = flow->name;
        err = most ? PyDict_SetItemString(lines, flow->name, most) : -1;
        Py_XDECREF(most);
    }
    if (!err)
        err = PyModule_AddObjectRef(module, "FLOW_LINES", lines);
    Py_XDECREF(lines);
    return err || add_names(module, "FLOWS", names, SHI_NFLOWS) < 0 ||
                   add_names(module, "ROUTED_FLOWS", routed, nrouted) < 0 ||
                   add_names(module, "BANKED_FLOWS", banked, nbanked) < 0
               ? -1
               : 0;
}

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

/* ---- the module ------------------------------------------------------------------------ */

static int add_methods(PyObject *module, PyMethodDef *const *parts, size_t n)
{
    size_t i;
    for (i = 0; i < n; i++)
        if (PyModule_AddFunctions(module, parts[i]) < 0)
            return -1;
    return 0;
}

static int module_exec(PyObject *module)
{
    PyMethodDef *const parts[] = {
        shi_base_functions,    shi_guard_functions,   shi_smp_functions,
        shi_context_functions, shi_machine_functions, shi_barrier_functions,
        shi_waitq_functions,   shi_native_functions,  shi_segment_functions,
        shi_bench_functions,   shi_limit_functions,   shi_clock_functions,
        shi_process_functions, shi_shield_functions,  shi_csd_functions,
        shi_irq_functions,     shi_softirq_functions, shi_irq_work_functions,
        shi_stopper_functions, shi_stall_functions,   shi_rcu_functions,
        shi_sched_functions,   shi_replay_functions,
    };
    if (add_methods(module, parts, sizeof parts / sizeof *parts) < 0 ||
        shi_atomic_add(module) < 0 || shi_function_types() < 0 ||
        shi_native_types(module) < 0 || machine_type(module) < 0 || shi_csd_types(module) < 0 ||
        shi_hist_types(module) < 0 || shi_shield_types(module) < 0 ||
        shi_irq_work_types(module) < 0 || shi_irqlock_types(module) < 0 ||
        shi_slot_types(module) < 0 || shi_irq_types(module) < 0 ||
        shi_doorbell_names(module) < 0 || shi_users_add(module) < 0)
        return -1;
    if (add_names(module, "COUNTERS", counter_names, SHI_NCOUNTERS) < 0 ||
        add_names(module, "CAUSES", cause_names, SHI_NCAUSES) < 0 ||
        add_names(module, "TRACE_EVENTS", shi_trace_names, SHI_T_COUNT) < 0 ||
        add_fields(module, "HEADER_FIELDS", header_fields,
                   sizeof header_fields / sizeof *header_fields) < 0 ||
        add_flows(module) < 0 ||
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
        { "SLOT_BYTES", SHI_SLOT_BYTES },
        { "COUNTER_OFFSET", offsetof(struct shi_slot, counters) },
        { "COUNTER_ROOM", SHI_COUNTER_ROOM },
        { "CONTEXTS", SHI_NCTX },
        { "TRACE_RECORD_BYTES", sizeof(struct shi_trace_record) },
        { "TRACE_AREA_BYTES", sizeof(struct shi_trace_area) },
        { "TRACE_HEAD_BYTES", sizeof(struct shi_trace_head) },
        { "TRACE_AREA_OFFSET",
          offsetof(struct shi_header, users) + SHI_USER_trace * sizeof(shi_a64) },
        { "NCPUS_OFFSET", offsetof(struct shi_header, ncpus) },
        { "HEADER_BYTES", sizeof(struct shi_header) },
        { "EXTRA_SLOTS", SHI_EXTRA_SLOTS },
        { "GUESTS", SHI_GUESTS },
        { "W_PENDING", SHI_W_PENDING },
        { "OFFLINE", SHI_OFFLINE },
        { "CPU_DEAD", SHI_DEAD },
        { "END_EXITED", SHI_END_EXITED },
        { "END_STOPPED", SHI_END_STOPPED },
        { "HANDLER_IRQ", SHI_H_IRQ },
        { "HANDLER_NMI", SHI_H_NMI },
        { "HANDLER_SOFTIRQ", SHI_H_SOFTIRQ },
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
        { "STALL_BYTES", sizeof(struct shi_stall) },
        { "USE_NONE", SHI_USE_NONE },
        { "USE_RESCHEDULE", SHI_USE_RESCHEDULE },
        { "USE_CALL", SHI_USE_CALL },
        { "USE_CALL_SINGLE", SHI_USE_CALL_SINGLE },
        { "USE_NMI", SHI_USE_NMI },
        { "USE_IRQ", SHI_USE_IRQ },
        { "USE_COUNT", SHI_USE_COUNT },
        { "USE_IRQ_WORK", SHI_USE_IRQ_WORK },
        { "USE_TIMER", SHI_USE_TIMER },
        { "USE_STOP", SHI_USE_STOP },
        { "USE_ICACHE", SHI_USE_ICACHE },
        { "STARTUP_WAITING", SHI_SU_WAITING },
        { "STARTUP_STARTED", SHI_SU_STARTED },
        { "STARTUP_RESET", SHI_SU_RESET },
        { "NO_CPU", SHI_NO_CPU },
        { "CPU_TASK", SHI_CPU_TASK },
        { "CPU_HANDLER", SHI_CPU_HANDLER },
        { "RUNNING", SHI_RUNNING },
        { "POLLING", SHI_POLLING },
        { "HALTED", SHI_HALTED },
        { "LIMIT_AREA_BYTES", sizeof(struct shi_limit_area) },
        { "LIMIT_PLACEMENTS", SHI_LIMIT_PLACEMENTS },
        { "STEP_STOP", SHI_STEP_STOP },
        { "STEP_KILL", SHI_STEP_KILL },
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
