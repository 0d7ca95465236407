/* SPDX-License-Identifier: MIT */
/* The users that look at CPUs by an NMI, or end them: backtrace, stop, crash. */
#include "py/base.h"

#include <signal.h>
#include <unistd.h>

#include "base/native.h"
#include "irq/signal.h"
#include "users/backtrace.h"
#include "users/crash.h"
#include "users/stop.h"
#include "py/stack.h"
#include "py/tables.h"

static PyObject *text_of(const char *text, uint32_t length)
{
    if (!text)
        Py_RETURN_NONE;
    return PyUnicode_DecodeUTF8(text, length, "replace");
}

static int as_cpu(Machine *machine, PyObject *arg, uint32_t *cpu)
{
    return shi_use(machine) < 0 ? -1 : shi_as_slot(arg, machine->m.ncpus, cpu);
}

#define OF_CPU(name, expression)                                                               \
    METHOD(name)                                                                               \
    {                                                                                          \
        Machine *machine = MACHINE(object);                                                    \
        uint32_t cpu;                                                                          \
        if (as_cpu(machine, arg, &cpu) < 0)                                                    \
            return NULL;                                                                       \
        expression;                                                                            \
    }
#define OF_NONE(name, expression)                                                              \
    METHOD(name)                                                                               \
    {                                                                                          \
        Machine *machine = MACHINE(object);                                                    \
        (void)arg;                                                                             \
        if (shi_use(machine) < 0)                                                              \
            return NULL;                                                                       \
        expression;                                                                            \
    }

/* Began, or -EBUSY. */
static PyObject *began(Machine *machine, int err)
{
    if (err && err != -EBUSY)
        return shi_raise_errno(machine, err, -1);
    return PyBool_FromLong(!err);
}

/* ---- backtrace ------------------------------------------------------------------------- */

OF_NONE(backtrace_bytes,
        return PyLong_FromUnsignedLongLong(shi_backtrace_bytes(machine->m.ncpus)))
METHOD(backtrace_init)
{
    const struct shi_machine *m = &MACHINE(object)->m;
    struct shi_backtrace *state =
        shi_user(m, SHI_USER_backtrace, shi_backtrace_bytes(m->ncpus));
    (void)arg;
    if (state)
        shi_backtrace_init(state, m->ncpus);
    Py_RETURN_NONE;
}
OF_NONE(backtrace_begin, return began(machine, shi_backtrace_begin(&machine->self)))
OF_NONE(backtrace_end, shi_backtrace_end(&machine->self); Py_RETURN_NONE)
OF_NONE(backtrace_here, shi_backtrace_here(&machine->self); Py_RETURN_NONE)
OF_CPU(backtrace_ask, return PyBool_FromLong(!shi_backtrace_ask(&machine->self, cpu)))
OF_CPU(backtrace_asked, return PyBool_FromLong(shi_backtrace_asked(&machine->m, cpu)))
OF_CPU(backtrace_text, uint32_t length;
       const char *text = shi_backtrace_text(&machine->m, cpu, &length);
       return text_of(text, length))

/* stack_of(cpu) -> its Python stack, read from outside; None: that is not permitted. */
METHOD(stack_of)
{
    Machine *machine = MACHINE(object);
    char text[SHI_DUMP_TEXT];
    struct shi_text out = { .at = text, .room = sizeof text };
    uint32_t cpu;
    if (shi_as_slot(arg, machine->m.ncpus, &cpu) < 0)
        return NULL;
    const struct shi_slot *slot = shi_slot(&machine->m, cpu);
    bool read = shi_stack_write(slot, (pid_t)shi_load_relaxed(&slot->pid), &out);
    return text_of(read ? text : NULL, (uint32_t)out.used);
}

static PyObject *has_no_nmi(PyObject *object, PyObject *arg)
{
    (void)arg;
    return PyBool_FromLong(MACHINE(object)->m.chip.nmi != SHI_NO_LINE);
}

/* ---- stop ------------------------------------------------------------------------------ */

OF_NONE(send_stop_bytes, return PyLong_FromSize_t(sizeof(struct shi_stop)))
OF_NONE(send_stop_begin, return began(machine, shi_send_stop_begin(&machine->self)))
OF_NONE(send_stop_end, shi_send_stop_end(&machine->self); Py_RETURN_NONE)
OF_CPU(send_stop_line, return PyBool_FromLong(shi_send_stop_by_line(&machine->self, cpu)))
OF_CPU(send_stop_nmi, shi_send_stop_by_nmi(&machine->self, cpu); Py_RETURN_NONE)
OF_CPU(send_stop_asked, return PyBool_FromLong(shi_send_stop_asked(&machine->m, cpu)))
/* stopped(cpu) -> bool: has smp_send_stop, or a crash, ended its process? */
METHOD(stopped)
{
    uint32_t cpu;
    if (shi_as_slot(arg, MACHINE(object)->m.ncpus, &cpu) < 0)
        return NULL;
    return PyBool_FromLong(shi_load_acquire(&shi_slot(&MACHINE(object)->m, cpu)->stopped) != 0);
}

/* ---- crash ----------------------------------------------------------------------------- */

OF_NONE(crash_bytes, return PyLong_FromUnsignedLongLong(shi_crash_bytes(machine->m.ncpus)))
/* crash_arm(path): bytes, less than 1024 of them */
METHOD(crash_arm)
{
    Machine *machine = MACHINE(object);
    struct shi_crash *state = shi_crash_state(&machine->m);
    const char *path = PyBytes_AsString(arg);
    if (!path || shi_use(machine) < 0)
        return NULL;
    if (!state || strlen(path) >= SHI_CRASH_PATH)
        return PyErr_Format(PyExc_ValueError, "crash_arm(path)");
    shi_store_full(&state->armed, 0);
    strcpy(state->path, path);
    shi_crash_arm(state, machine->m.ncpus);
    Py_RETURN_NONE;
}
/* crash_path() -> bytes, or None: it is not armed */
METHOD(crash_path)
{
    const struct shi_crash *state = shi_crash_state(&MACHINE(object)->m);
    char path[SHI_CRASH_PATH + 1] = { 0 };
    (void)arg;
    if (!state || !shi_load_acquire(&state->armed))
        Py_RETURN_NONE;
    memcpy(path, state->path, SHI_CRASH_PATH);
    return PyBytes_FromString(path);
}
/* Not by shi_use: the firmware, whose machine is about to end, asks as well. */
METHOD(crash_armed)
{
    const struct shi_crash *state = shi_crash_state(&MACHINE(object)->m);
    (void)arg;
    return PyBool_FromLong(state && shi_load_acquire(&state->armed));
}
METHOD(crash_disarm)
{
    struct shi_crash *state = shi_crash_state(&MACHINE(object)->m);
    (void)arg;
    if (state)
        shi_store_full(&state->armed, 0);
    Py_RETURN_NONE;
}
/* crash_shootdown() -> how many CPUs are asked; -1: there was a crash before. */
METHOD(crash_shootdown)
{
    int asked = shi_crash_shootdown(&MACHINE(object)->self);
    (void)arg;
    return PyLong_FromLong(asked < 0 ? -1 : asked);
}
/* crash_waiting() -> waiting_for_crash_ipi */
METHOD(crash_waiting)
{
    const struct shi_crash *state = shi_crash_state(&MACHINE(object)->m);
    (void)arg;
    return PyLong_FromUnsignedLong(state ? shi_load_acquire(&state->waiting) : 0);
}
/* crash_asked(cpu) -> bool: it has not answered */
METHOD(crash_asked)
{
    const struct shi_crash *state = shi_crash_state(&MACHINE(object)->m);
    uint32_t cpu;
    if (shi_as_slot(arg, MACHINE(object)->m.ncpus, &cpu) < 0)
        return NULL;
    return PyBool_FromLong(state && shi_crash_asked(state, cpu));
}
/* crash_save(cpu) -> None, or what it saved: a dict */
METHOD(crash_save)
{
    const struct shi_machine *m = &MACHINE(object)->m;
    struct shi_crash *state = shi_crash_state(m);
    uint32_t cpu, length = 0;
    if (shi_as_slot(arg, m->ncpus, &cpu) < 0)
        return NULL;
    const struct shi_crash_save *save = state ? &state->save[cpu] : NULL;
    /* Acquire pairs with the release of who saved it. */
    if (!save || !shi_load_acquire(&save->saved))
        Py_RETURN_NONE;
    const char *text = shi_dump_text(shi_crash_dump(m, state), cpu, &length);
    return Py_BuildValue(
        "{sI,sK,sN,sI,sI,sI,sN,sN}", "signal", (unsigned)shi_load_relaxed(&save->signal),
        "address", (unsigned long long)shi_load_relaxed(&save->address), "interrupts_disabled",
        PyBool_FromLong(shi_load_relaxed(&save->irqs_off) != 0), "in_irq",
        (unsigned)shi_load_relaxed(&save->in_irq), "in_nmi",
        (unsigned)shi_load_relaxed(&save->in_nmi), "preempt_count",
        (unsigned)shi_load_relaxed(&save->preempt), "in_task",
        PyBool_FromLong(shi_load_relaxed(&save->in_task) != 0), "text", text_of(text, length));
}
/* crash_panic() -> None, or (slot, text): who has called panic() first. */
METHOD(crash_panic)
{
    struct shi_crash *state = shi_crash_state(&MACHINE(object)->m);
    char text[SHI_PANIC_TEXT + 1] = { 0 };
    uint64_t who = state ? shi_load_acquire(&state->panic_cpu) : 0;
    (void)arg;
    if (!who || who >> 32)
        Py_RETURN_NONE;
    memcpy(text, state->panic, SHI_PANIC_TEXT);
    return Py_BuildValue("IN", (unsigned)(who - 1),
                         PyUnicode_DecodeUTF8(text, (Py_ssize_t)strlen(text), "replace"));
}
/* panic(text) -> bool: is this the first?  Its crash is the firmware's to make. */
METHOD(panic)
{
    Machine *machine = MACHINE(object);
    const char *text = PyUnicode_AsUTF8(arg);
    if (!text || shi_use(machine) < 0)
        return NULL;
    int err = shi_crash_panic(&machine->self, text);
    if (!err && machine->self.host)
        shi_firmware_look(&machine->self);
    return began(machine, err);
}

/* crash_calls() -> [(target, sender, csd, type, its generation is the target's, func, native or
 * None, bytes of its pickle or None), ...]: every call and task that is in somebody's hands. */
METHOD(crash_calls)
{
    const struct shi_machine *m = &MACHINE(object)->m;
    uint32_t s, i;
    PyObject *found = PyList_New(0);
    (void)arg;
    for (s = 0; found && s < m->nslots; s++) {
        const struct shi_slot *slot = shi_slot(m, s);
        uint32_t top = shi_load_acquire(&slot->csd_top);
        if (!shi_load_relaxed(&slot->csds_out))
            continue;
        if (top > m->csds_per_slot)
            top = m->csds_per_slot;
        const struct shi_csd *csd = (const struct shi_csd *)shi_region(m, s);
        for (i = 0; found && i < top; i++, csd++) {
            uint64_t lock = shi_load_acquire(&csd->lock), sum;
            uint32_t dst = (uint16_t)(lock >> SHI_CSD_DST_SHIFT), length;
            const void *pickle;
            if (!(lock & SHI_CSD_LOCK) || dst >= m->ncpus || shi_csd_unqueued(csd))
                continue;
            PyObject *bytes = NULL;
            const char *native = NULL;
            if (csd->func & SHI_FUNC_NATIVE)
                native = shi_native_name_of(csd->func & ~SHI_FUNC_NATIVE);
            else if (!(csd->apply & SHI_A_INLINE_FUNC) &&
                     !shi_func_find(m, s, csd->func, csd->serial, &pickle, &length, &sum))
                bytes = PyBytes_FromStringAndSize(pickle, length);
            PyErr_Clear();
            PyObject *one = Py_BuildValue("IIIIOzN", dst, s, (s << m->csd_shift) + i,
                                          (unsigned)(lock & SHI_CSD_TYPE),
                                          lock & SHI_CSD_BEGUN ? Py_True : Py_False, native,
                                          bytes ? bytes : Py_NewRef(Py_None));
            if (!one || PyList_Append(found, one) < 0)
                Py_CLEAR(found);
            Py_XDECREF(one);
        }
    }
    return found;
}

/* crash_slot(cpu) -> (waiting_for, cur_csd, masked): words of its slot. */
METHOD(crash_slot)
{
    uint32_t cpu;
    if (shi_as_slot(arg, MACHINE(object)->m.ncpus, &cpu) < 0)
        return NULL;
    const struct shi_slot *slot = shi_slot(&MACHINE(object)->m, cpu);
    return Py_BuildValue("KII", (unsigned long long)shi_load_relaxed(&slot->waiting_for),
                         (unsigned)shi_load_relaxed(&slot->cur_csd),
                         (unsigned)shi_load_relaxed(&slot->masked));
}

PyMethodDef shi_dump_methods[] = {
    { "has_no_nmi", has_no_nmi, METH_NOARGS,
      "bool: an interrupt that can be masked stands in for NMIs." },
    NOARGS(backtrace_bytes, "How much state it has."),
    NOARGS(backtrace_init, "Its state is new."),
    NOARGS(backtrace_begin, "bool: False: another is under way."),
    NOARGS(backtrace_end, "Nobody is asked any more."),
    NOARGS(backtrace_here, "This CPU's, without an NMI."),
    ONE(backtrace_ask, "backtrace_ask(cpu) -> bool: False: it is offline"),
    ONE(backtrace_asked, "backtrace_asked(cpu) -> bool: it has not answered"),
    ONE(backtrace_text, "backtrace_text(cpu) -> str or None"),
    ONE(stack_of, "stack_of(cpu) -> its Python stack, read from outside, or None"),
    NOARGS(send_stop_bytes, "How much state it has."),
    NOARGS(send_stop_begin, "bool: False: another stops CPUs."),
    NOARGS(send_stop_end, "Another may stop CPUs; who was asked still stops."),
    ONE(send_stop_line, "send_stop_line(cpu) -> bool: False: the controller has no such line"),
    ONE(send_stop_nmi, "send_stop_nmi(cpu)"),
    ONE(send_stop_asked, "send_stop_asked(cpu) -> bool: it has not stopped"),
    ONE(stopped, "stopped(cpu) -> bool: its process was ended by a stop"),
    NOARGS(crash_bytes, "How much state it has."),
    ONE(crash_arm, "crash_arm(path): from now on there is a crash dump"),
    NOARGS(crash_path, "bytes, or None."),
    NOARGS(crash_armed, "bool"),
    NOARGS(crash_disarm, "No crash dump any more."),
    NOARGS(crash_shootdown, "How many CPUs are asked; -1: there was a crash before."),
    NOARGS(crash_waiting, "How many of them have not answered."),
    ONE(crash_asked, "crash_asked(cpu) -> bool: it has not answered"),
    ONE(crash_save, "crash_save(cpu) -> dict or None"),
    NOARGS(crash_panic, "None, or (slot, text)."),
    NOARGS(crash_calls, "Every call and task that is in somebody's hands."),
    ONE(crash_slot, "crash_slot(cpu) -> (waiting_for, cur_csd, masked)"),
    ONE(panic, "panic(text) -> bool: is this the first?"),
    { NULL, NULL, 0, NULL },
};
