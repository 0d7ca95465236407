/* SPDX-License-Identifier: MIT */
/* Being a CPU: the idle loop, handlers, tasks, and the soft interrupt mask. */
#include "py/shi.h"

#include <sched.h>
#include <signal.h>
#include <stdlib.h>
#include <sys/prctl.h>
#include <time.h>
#include <unistd.h>

#include "irq/chip.h"
#include "base/clock.h"
#include "irq/doorbell.h"
#include "smp/idle.h"
#include "irq/irqdesc.h"
#include "smp/queue.h"
#include "smp/remind.h"
#include "base/trace.h"

/* ---- hooks of the core ----------------------------------------------------------- */

static void hold_interpreter(Machine *machine)
{
    if (machine->released) {
        PyThreadState *state = machine->released;
        machine->released = NULL;
        PyEval_RestoreThread(state);
    }
}

static void hook_release(struct shi_self *self)
{
    Machine *machine = self->hooks.arg;
    if (!machine->released)
        machine->released = PyEval_SaveThread();
}

static void hook_interrupt(struct shi_self *self)
{
    /* Async-signal-safe, unlike Py_AddPendingCall, which takes a lock: the handler of
     * this signal (irq_entry, below) runs at the next bytecode boundary. */
    PyErr_SetInterruptEx((int)self->m->kick_signal);
}

static void hook_nmi(struct shi_self *self)
{
    PyErr_SetInterruptEx((int)self->m->nmi_signal); /* its handler is nmi_entry, below */
}

static void flush_standard_files(void)
{
    const char *const names[] = { "stdout", "stderr" };
    size_t i;
    for (i = 0; i < 2; i++) {
        PyObject *file = PySys_GetObject(names[i]); /* borrowed */
        PyObject *done = file && file != Py_None ? PyObject_CallMethod(file, "flush", NULL)
                                                 : NULL;
        Py_XDECREF(done);
        PyErr_Clear();
    }
}

/* The function forked and its child came back here: the child is no second CPU, and ends
 * where the function does. */
void shi_leave_if_forked(Machine *machine, PyObject *result)
{
    int status = 0;
    if (__builtin_expect(!machine->foreign, 1))
        return;
    if (!result) {
        PyObject *code = NULL, *error = shi_take_exception();
        if (PyErr_GivenExceptionMatches(error, PyExc_SystemExit)) {
            code = PyObject_GetAttrString(error, "code");
            status = code && PyLong_Check(code) ? (int)PyLong_AsLong(code) : code != Py_None;
        } else {
            PyErr_SetObject((PyObject *)Py_TYPE(error), error);
            PyErr_Print();
            status = 1;
        }
    }
    flush_standard_files();
    _exit(status);
}

/* A function's own name: nothing is formatted, and no Python runs. */
static const char *name_of(PyObject *function, size_t *length)
{
    const char *name = NULL;
    if (PyMethod_Check(function))
        function = PyMethod_GET_FUNCTION(function);
    if (PyFunction_Check(function)) {
        Py_ssize_t n = 0;
        name = PyUnicode_AsUTF8AndSize(((PyFunctionObject *)function)->func_qualname, &n);
        if (!name)
            PyErr_Clear(); /* a name that is no text */
        *length = (size_t)n;
    }
    if (!name) {
        name = PyCFunction_Check(function) ? ((PyCFunctionObject *)function)->m_ml->ml_name
               : PyType_Check(function)    ? ((PyTypeObject *)function)->tp_name
                                           : Py_TYPE(function)->tp_name;
        *length = strlen(name);
    }
    return name;
}

/* The name that stands in the slot, if it is a function's: a process is one CPU. */
static PyObject *said;

void shi_say_handler(struct shi_self *self, PyObject *function, enum shi_handler kind)
{
    struct shi_slot *slot = self->slot;
    PyObject *text = PyFunction_Check(function) ? ((PyFunctionObject *)function)->func_qualname
                                                : NULL;
    /* The name is written when it is another one than the last time: what is held is alive,
     * so the same object is the same name. */
    if (!text || text != said) {
        size_t length;
        const char *name = name_of(function, &length);
        if (length >= sizeof slot->handler_name) { /* its end tells more than its begin */
            name += length - (sizeof slot->handler_name - 1);
            length = sizeof slot->handler_name - 1;
        }
        memcpy(slot->handler_name, name, length);
        slot->handler_name[length] = 0;
        Py_XSETREF(said, Py_XNewRef(text));
    }
    shi_store_relaxed(&slot->since, shi_stamp_early());
    /* Release: who finds the kind finds name and time.  One that has been overtaken since
     * finds another time when it looks again. */
    shi_store_release(&slot->handler, kind);
}

void shi_handler_outer(const struct shi_self *self, struct handler_said *outer)
{
    const struct shi_slot *slot = self->slot;
    outer->kind = shi_load_relaxed(&slot->handler);
    outer->since = shi_load_relaxed(&slot->since);
    if (outer->kind)
        memcpy(outer->name, slot->handler_name, sizeof outer->name);
}

void shi_say_outer(struct shi_self *self, const struct handler_said *outer)
{
    struct shi_slot *slot = self->slot;
    if (outer->kind) {
        memcpy(slot->handler_name, outer->name, sizeof outer->name);
        Py_CLEAR(said);
        shi_store_relaxed(&slot->since, outer->since);
    }
    shi_store_release(&slot->handler, outer->kind);
}

/* Run one Python csd in interrupt context: soft-masked throughout, and whatever it
 * raises goes to its sender or to sys.unraisablehook, never into what it interrupted. */
static void run_handler(Machine *machine, uint32_t index)
{
    struct shi_self *self = &machine->self;
    struct shi_csd *csd = shi_csd(&machine->m, index);
    bool async = (shi_load_relaxed(&csd->lock) & SHI_CSD_TYPE) != SHI_CSD_SYNC;
    struct incoming in;
    uint8_t flags = self->irqs_off;
    uint32_t func = csd->func;
    int limit = shi_headroom_begin(machine);
    /* What it interrupts may be about to raise: that stays its own. */
    PyObject *pending = PyErr_Occurred() ? shi_take_exception() : NULL;
    self->irqs_off = 1;
    self->in_irq++;
    shi_store_relaxed(&self->slot->cur_csd, index + 1);
    if (shi_incoming(machine, &in, csd, async) < 0)
        goto out;
    shi_count(self, async ? SHI_C_csd_async : SHI_C_csd_sync);
    shi_count(self, SHI_C_python_run);
    SHI_TRACE(self, csd_function_entry, self->id, index + 1, func, 0);
    shi_say_handler(self, in.function, SHI_H_IRQ);
    if (async) /* the kernel's order: unlock, then run */
        shi_csd_unlock(self, csd);
    PyObject *result = shi_incoming_apply(&in);
    shi_leave_if_forked(machine, result);
    SHI_TRACE(self, csd_function_exit, self->id, index + 1, func, 0);
    if (!async) {
        if (shi_outcome(machine, csd, result, in.apply != SHI_A_INFO))
            shi_csd_unlock(self, csd);
    } else if (!result) {
        shi_count(self, SHI_C_unraisable);
        PyErr_WriteUnraisable(in.function);
    }
    Py_XDECREF(result);
    shi_incoming_clear(&in);
out:
    shi_store_relaxed(&self->slot->handler, SHI_H_NONE);
    shi_store_relaxed(&self->slot->cur_csd, 0);
    shi_headroom_end(limit);
    self->in_irq--;
    self->irqs_off = flags;
    shi_signals_let_go(machine);
    if (pending) {
        PyErr_SetObject((PyObject *)Py_TYPE(pending), pending);
        Py_DECREF(pending);
    }
}

static void hook_run(struct shi_self *self, uint32_t index)
{
    Machine *machine = self->hooks.arg;
    hold_interpreter(machine);
    run_handler(machine, index);
}

static void hook_irq(struct shi_self *self, uint32_t line)
{
    Machine *machine = self->hooks.arg;
    hold_interpreter(machine);
    shi_run_line(machine, line);
}

void shi_cpu_hooks(Machine *machine)
{
    machine->self.hooks = (struct shi_hooks){
        .arg = machine,
        .run = hook_run,
        .release = hook_release,
        .interrupt = hook_interrupt,
        .irq = hook_irq,
        .nmi = hook_nmi,
    };
}

void shi_run_deferred(Machine *machine)
{
    struct shi_self *self = &machine->self;
    uint32_t index, line;
    hold_interpreter(machine);
    if (self->nmi_waits)
        shi_run_nmi(machine);
    self->in_core++;
    while ((line = shi_irqdesc_pop(self)) != SHI_NO_LINE) {
        if (shi_irqdesc_still(self, line)) {
            shi_run_line(machine, line);
        } else { /* destroyed meanwhile, and what has the line now was not sent to */
            shi_count(self, SHI_C_irq_other);
            shi_chip_end(self, line);
        }
    }
    while ((index = shi_list_pop(self, &self->deferred)) != UINT32_MAX)
        run_handler(machine, index);
    if (__builtin_expect(self->unsent && shi_python_waits(self), 0))
        shi_send_unsent(machine);
    self->in_core--;
    if (self->happened)
        shi_leave_slow(self);
}

#define ROOM_NAP_NS 1000000

/* ---- interrupts while a task runs ------------------------------------------------ */

static bool hotplug_asked(const struct shi_self *self)
{
    return shi_load_acquire(&self->slot->hotplug) == SHI_HP_OFFLINE;
}

/* Calls have run here whose results wait for room: a parked CPU could not send them.
 * -EBUSY: look again, or as shi_cpu_offline. */
static int await_room(struct shi_self *self)
{
    const struct timespec nap = { .tv_nsec = ROOM_NAP_NS };
    if (!hotplug_asked(self))
        return 0; /* the request was withdrawn */
    if (shi_load_relaxed(&self->m->header->machine_state) >= SHI_M_STOPPING)
        return -ECANCELED;
    nanosleep(&nap, NULL);
    self->in_core++;
    shi_service(self);
    self->in_core--;
    if (self->happened)
        shi_leave_slow(self);
    return -EBUSY;
}

static int go_offline(Machine *machine)
{
    struct shi_self *self = &machine->self;
    int err;
    for (;;) {
        hook_release(self); /* by the hook: a handler run on the way can take it back */
        err = self->unsent ? await_room(self) : shi_cpu_offline(self);
        hold_interpreter(machine);
        if (err != -EBUSY)
            return err;
        shi_run_deferred(machine);
    }
}

void shi_wait_python(Machine *machine)
{
    shi_run_deferred(machine);
    if (hotplug_asked(&machine->self) && !shi_masked(&machine->self))
        go_offline(machine);
}

/* Serve everything, Python included, then let the task go on. */
static void irq_window(Machine *machine)
{
    struct shi_self *self = &machine->self;
    bool inlined = self->inline_python;
    shi_set_polling(self);
    shi_fetch_and_full(&self->slot->word, ~SHI_W_ASKED);
    for (;;) {
        shi_run_deferred(machine);
        self->inline_python = true;
        self->in_core++;
        shi_service(self);
        self->in_core--;
        self->inline_python = inlined;
        hold_interpreter(machine);
        if (self->happened)
            shi_leave_slow(self);
        if (hotplug_asked(self)) {
            if (go_offline(machine) == -ECANCELED)
                break;
            continue;
        }
        if (shi_python_waits(self))
            continue;
        shi_set_running(self);
        if (!shi_python_waits(self))
            return;
        shi_set_polling(self);
    }
}

void shi_take_deferred(Machine *machine)
{
    struct shi_self *self = &machine->self;
    bool offline = self->in_task && hotplug_asked(self);
    /* ASKED with nothing there: what was asked for was an NMI's handler, which has run, and
     * an import has kept everything else away.  It keeps senders from kicking. */
    bool asked = self->in_task && shi_load_relaxed(&self->slot->word) & SHI_W_ASKED;
    if (!(shi_python_waits(self) || offline || asked) || shi_masked(self))
        return;
    if (self->in_task)
        irq_window(machine); /* takes ASKED back, which keeps senders from kicking */
    else
        shi_run_deferred(machine);
}

/* The Python-level handler of the kick signal. */
int shi_irq_entry_python(Machine *machine)
{
    struct shi_self *self = &machine->self;
    if (shi_masked(self) || !self->in_task) {
        self->happened = 1; /* local_irq_enable looks again */
        return 0;
    }
    if (!self->held) /* else the end of the import takes what waits */
        irq_window(machine);
    /* Into the task, at the bytecode where it stands. */
    return shi_task_interrupt(machine) < 0 ? -1 : shi_signals_check(machine);
}

int shi_task_interrupt(Machine *machine)
{
    struct shi_self *self = &machine->self;
    struct shi_csd *csd = self->cancellable;
    if (__builtin_expect(!shi_cancel_asked(self), 1) || shi_masked(self) || self->in_irq ||
        self->in_nmi)
        return 0;
    /* Taken: one exception for each time that it was asked for. */
    shi_fetch_and_full(&csd->lock, ~SHI_CSD_CANCEL);
    if (machine->on_cancel) {
        PyObject *done = PyObject_CallNoArgs(machine->on_cancel);
        Py_XDECREF(done);
        return done ? 0 : -1;
    }
    PyErr_SetString(shi_py.TaskInterrupt, "this task was cancelled");
    return -1;
}

/* After interrupts came on again: run what the replay left for the interpreter. */
void shi_after_enable(Machine *machine)
{
    struct shi_self *self = &machine->self;
    if (self->in_task && !shi_masked(self) && (shi_python_waits(self) || hotplug_asked(self)))
        irq_window(machine);
}

/* The Python-level handler of the NMI signal: nothing holds it up. */
int shi_nmi_entry_python(Machine *machine)
{
    shi_run_nmi(machine);
    /* Kicks that its handler held up are acknowledged: nobody sends them again. */
    if (machine->self.happened)
        shi_leave_slow(&machine->self);
    return shi_masked(&machine->self) ? 0 : shi_signals_check(machine);
}

/* ---- tasks ----------------------------------------------------------------------- */

static int complain(const char *format, Machine *machine)
{
    if (PyErr_WarnFormat(shi_py.Warning, 1, format, (int)machine->self.id,
                         machine->self.slot->task_name) < 0)
        PyErr_WriteUnraisable(NULL);
    return 0;
}

static void name_task(Machine *machine, PyObject *function)
{
    char *name = machine->self.slot->task_name;
    PyObject *text = function ? PyObject_CallOneArg(shi_py.task_name, function) : NULL;
    const char *utf8 = text ? PyUnicode_AsUTF8(text) : NULL;
    PyErr_Clear();
    snprintf(name, sizeof machine->self.slot->task_name, "%s", utf8 ? utf8 : "");
    Py_XDECREF(text);
}

/* The interpreter has a handler of its own for each signal: put ours back there, and then
 * the core's over it, because signal.signal installs the interpreter's. */
static void restore_handlers(Machine *machine)
{
    const struct {
        uint32_t signal;
        const char *entry;
    } handlers[] = { { machine->m.kick_signal, "irq_entry" },
                     { machine->m.nmi_signal, "nmi_entry" } };
    PyObject *module = PyImport_ImportModule("signal");
    PyObject *core = PyImport_ImportModule("shmipi._core");
    size_t i;
    for (i = 0; i < 2; i++) {
        PyObject *entry = core ? PyObject_GetAttrString(core, handlers[i].entry) : NULL;
        PyObject *old = module && entry ? PyObject_CallMethod(module, "signal", "IO",
                                                              handlers[i].signal, entry)
                                        : NULL;
        if (!old)
            PyErr_WriteUnraisable(NULL);
        Py_XDECREF(old);
        Py_XDECREF(entry);
    }
    Py_XDECREF(core);
    Py_XDECREF(module);
    shi_kick_install(&machine->self);
}

/* The task's function, and what an `async def` one returns.  Here alone it can be cancelled:
 * not while its arguments or its result are pickled, and not the task after it. */
static PyObject *apply_task(Machine *machine, const struct incoming *in, struct shi_csd *csd)
{
    struct shi_self *self = &machine->self;
    self->cancellable = csd;
    PyObject *result = NULL;
    /* Asked for between BEGUN and here: that kick found nothing to interrupt. */
    if (shi_task_interrupt(machine) == 0)
        result = shi_incoming_apply(in);
    if (result && PyCoro_CheckExact(result))
        Py_SETREF(result, PyObject_CallOneArg(shi_py.run_coroutine, result));
    self->cancellable = NULL;
    Py_CLEAR(machine->on_cancel);
    return result;
}

static void run_task(Machine *machine)
{
    struct shi_self *self = &machine->self;
    struct incoming in;
    self->in_core++;
    uint32_t index = shi_list_pop(self, &self->tasks);
    self->in_core--;
    if (index == UINT32_MAX)
        return;
    struct shi_csd *csd = shi_csd(&machine->m, index);
    /* Full: of this and the canceller's swap one is first.  Either it sees BEGUN, and the
     * task will be interrupted, or we see CANCEL, and the task never runs. */
    if (shi_fetch_or_full(&csd->lock, SHI_CSD_BEGUN) & SHI_CSD_CANCEL) {
        shi_store_relaxed(&csd->status, SHI_S_CANCELLED);
        shi_csd_unlock(self, csd);
        return;
    }
    if (shi_incoming(machine, &in, csd, false) < 0)
        return;
    shi_count(self, SHI_C_tasks_run);
    name_task(machine, in.function);
    shi_store_relaxed(&self->slot->task, 1);
    self->in_task = true;
    self->inline_python = false;
    shi_kick_block(self, false);
    irq_window(machine); /* serves what came meanwhile, then RUNNING */
    PyObject *result = apply_task(machine, &in, csd);
    shi_leave_if_forked(machine, result);
    bool sent = true;
    if (!result && PyErr_ExceptionMatches(shi_py.TaskInterrupt)) {
        PyErr_Clear();
        shi_store_relaxed(&csd->status, SHI_S_CANCELLED);
    } else {
        sent = shi_outcome(machine, csd, result, in.apply != SHI_A_INFO);
    }
    Py_XDECREF(result);
    /* What the task left behind must not outlive it. */
    if (self->irqs_off) {
        complain("CPU %d: the task %s ended with interrupts disabled", machine);
        self->irqs_off = 0;
    }
    self->preempt = 0;
    switch (shi_kick_check(self)) {
    case -EEXIST:
        restore_handlers(machine);
        complain("CPU %d: the task %s replaced the handler of the kick signal or the NMI's: "
                 "calls or NMIs waited until it ended",
                 machine);
        break;
    case -EPERM:
        complain("CPU %d: the task %s blocked the kick signal or the NMI's: calls or NMIs "
                 "waited until it ended",
                 machine);
        break;
    default:
        break;
    }
    shi_set_polling(self);
    shi_fetch_and_full(&self->slot->word, ~SHI_W_ASKED);
    self->in_task = false;
    self->inline_python = true;
    shi_store_relaxed(&self->slot->task, 0);
    self->slot->task_name[0] = 0;
    self->happened = 0;
    shi_run_deferred(machine);
    if (sent)
        shi_csd_unlock(self, csd);
    shi_incoming_clear(&in);
}

static PyObject *cpu_loop(PyObject *object, PyObject *unused)
{
    Machine *machine = (Machine *)object;
    struct shi_self *self = &machine->self;
    (void)unused;
    if (shi_use(machine) < 0)
        return NULL;
    if (self->host)
        return shi_raise(shi_py.StateError, 0, -1, "the host is no CPU");
    self->inline_python = true;
    for (;;) {
        shi_remind_stop(self);
        enum shi_idle_why why = shi_idle(self);
        hold_interpreter(machine);
        switch (why) {
        case SHI_IDLE_PYTHON:
            shi_run_deferred(machine);
            break;
        case SHI_IDLE_TASK:
            run_task(machine);
            break;
        case SHI_IDLE_OFFLINE:
            go_offline(machine);
            break;
        case SHI_IDLE_SIGNAL:
            if (PyErr_CheckSignals() < 0)
                PyErr_WriteUnraisable(NULL);
            break;
        case SHI_IDLE_STOP:
            Py_RETURN_NONE;
        }
    }
}

/* ---- the soft mask, and where am I ----------------------------------------------- */

static Machine *this_cpu(void)
{
    Machine *machine = shi_use_current();
    if (machine && machine->self.host) {
        shi_raise(shi_py.StateError, 0, -1,
                  "the host is no CPU: this only means something on a CPU of the machine");
        return NULL;
    }
    return machine;
}

/* What this process, and this thread of it, is: the NO_CPU, CPU_TASK or CPU_HANDLER. */
static PyObject *cpu_context(PyObject *module, PyObject *unused)
{
    const Machine *machine = shi_current;
    (void)module;
    (void)unused;
    if (!machine || machine->foreign || machine->self.host)
        return PyLong_FromLong(SHI_NO_CPU);
    bool handler = pthread_equal(pthread_self(), machine->self.thread) &&
                   (machine->self.in_irq || machine->self.in_nmi);
    return PyLong_FromLong(handler ? SHI_CPU_HANDLER : SHI_CPU_TASK);
}

static PyObject *smp_processor_id(PyObject *module, PyObject *unused)
{
    Machine *machine = this_cpu();
    (void)module;
    (void)unused;
    return machine ? PyLong_FromUnsignedLong(machine->self.id) : NULL;
}

/* A handler runs with interrupts off to its end; the kernel warns of one that does not. */
static int refuse_in_handler(const Machine *machine)
{
    static bool given;
    if (!machine->self.in_irq)
        return 0;
    return shi_warn_once(&given,
                         "an IPI handler enables interrupts: they stay disabled until it "
                         "has returned");
}

static PyObject *irq_disable(PyObject *module, PyObject *unused)
{
    Machine *machine = this_cpu();
    (void)module;
    (void)unused;
    if (!machine)
        return NULL;
    shi_irq_save(&machine->self);
    Py_RETURN_NONE;
}

static PyObject *irq_enable(PyObject *module, PyObject *unused)
{
    Machine *machine = this_cpu();
    (void)module;
    (void)unused;
    if (!machine || refuse_in_handler(machine) < 0)
        return NULL;
    if (!machine->self.in_irq)
        shi_irq_restore(&machine->self, 0);
    shi_after_enable(machine);
    if (shi_task_interrupt(machine) < 0)
        return NULL;
    Py_RETURN_NONE;
}

static PyObject *irq_save(PyObject *module, PyObject *unused)
{
    Machine *machine = this_cpu();
    (void)module;
    (void)unused;
    return machine ? PyLong_FromLong(shi_irq_save(&machine->self)) : NULL;
}

static PyObject *irq_restore(PyObject *module, PyObject *flags)
{
    Machine *machine = this_cpu();
    (void)module;
    if (!machine)
        return NULL;
    long value = PyLong_AsLong(flags);
    if (PyErr_Occurred())
        return NULL;
    if (value != 0 && value != 1) {
        PyErr_SetString(PyExc_ValueError, "flags come from local_irq_save()");
        return NULL;
    }
    if (!value && refuse_in_handler(machine) < 0)
        return NULL;
    if (value || !machine->self.in_irq)
        shi_irq_restore(&machine->self, (uint8_t)value);
    shi_after_enable(machine);
    if (shi_task_interrupt(machine) < 0)
        return NULL;
    Py_RETURN_NONE;
}

static PyObject *irqs_disabled(PyObject *module, PyObject *unused)
{
    Machine *machine = this_cpu();
    (void)module;
    (void)unused;
    return machine ? PyBool_FromLong(machine->self.irqs_off) : NULL;
}

static PyObject *preempt_disable(PyObject *module, PyObject *unused)
{
    Machine *machine = this_cpu();
    (void)module;
    (void)unused;
    if (!machine)
        return NULL;
    machine->self.preempt++;
    Py_RETURN_NONE;
}

static PyObject *preempt_enable(PyObject *module, PyObject *unused)
{
    Machine *machine = this_cpu();
    (void)module;
    (void)unused;
    if (!machine)
        return NULL;
    if (!machine->self.preempt)
        return shi_raise(shi_py.StateError, 0, (int)machine->self.id,
                         "preempt_enable() without preempt_disable()");
    machine->self.preempt--;
    Py_RETURN_NONE;
}

static PyObject *in_hardirq(PyObject *module, PyObject *unused)
{
    Machine *machine = shi_use_current();
    (void)module;
    (void)unused;
    return machine ? PyBool_FromLong(machine->self.in_irq) : NULL;
}

static PyObject *in_interrupt(PyObject *module, PyObject *unused)
{
    Machine *machine = shi_use_current();
    (void)module;
    (void)unused;
    return machine ? PyBool_FromLong(machine->self.in_irq || machine->self.in_nmi) : NULL;
}

static PyObject *in_nmi(PyObject *module, PyObject *unused)
{
    Machine *machine = shi_use_current();
    (void)module;
    (void)unused;
    return machine ? PyBool_FromLong(machine->self.in_nmi) : NULL;
}

static PyObject *in_task(PyObject *module, PyObject *unused)
{
    Machine *machine = shi_use_current();
    (void)module;
    (void)unused;
    return machine ? PyBool_FromLong(!machine->self.in_irq && !machine->self.in_nmi) : NULL;
}

/* A point at which a cooperative CPU (kick=False) takes what waits for it. */
static PyObject *cond_resched(PyObject *module, PyObject *unused)
{
    Machine *machine = this_cpu();
    (void)module;
    (void)unused;
    if (!machine)
        return NULL;
    struct shi_self *self = &machine->self;
    if (self->in_task && !shi_masked(self) &&
        (shi_word_work(shi_load_acquire(&self->slot->word)) || shi_python_waits(self) ||
         hotplug_asked(self)))
        irq_window(machine);
    if (shi_task_interrupt(machine) < 0)
        return NULL;
    Py_RETURN_NONE;
}

/* on_task_cancel(function): called instead of raising TaskInterrupt in this task. */
static PyObject *on_task_cancel(PyObject *module, PyObject *function)
{
    Machine *machine = this_cpu();
    (void)module;
    if (!machine)
        return NULL;
    Py_XSETREF(machine->on_cancel, Py_NewRef(function));
    Py_RETURN_NONE;
}

/* TaskInterrupt was raised where nothing can be (a __del__, a callback) and thrown away: again,
 * when the task is out of there. */
static PyObject *task_interrupt_lost(PyObject *module, PyObject *unused)
{
    Machine *machine = this_cpu();
    (void)module;
    (void)unused;
    if (!machine)
        return NULL;
    struct shi_self *self = &machine->self;
    if (self->cancellable) {
        shi_fetch_or_full(&self->cancellable->lock, SHI_CSD_CANCEL);
        shi_remind(self);
    }
    Py_RETURN_NONE;
}

/* ---- becoming one ---------------------------------------------------------------- */

/* Forked generators are alike: `random` reseeds itself, numpy's must be told. */
static int own_randomness(void)
{
    PyObject *modules = PySys_GetObject("modules"); /* borrowed */
    PyObject *module = modules ? PyDict_GetItemString(modules, "numpy.random") : NULL;
    if (!module)
        return 0;
    PyObject *done = PyObject_CallMethod(module, "seed", NULL);
    Py_XDECREF(done);
    return done ? 0 : -1;
}

/*
 * From here to the idle loop in C, with as little Python as can be: what the interpreter
 * touches (reference counts, inline caches) is a private copy of a page, times the
 * number of CPUs.
 */
static int become(Machine *machine, uint32_t number, pid_t firmware, const int *fds,
                  size_t nfds)
{
    struct shi_self *self = &machine->self;
    sigset_t all;
    cpu_set_t core;
    size_t i;
    if (prctl(PR_SET_PDEATHSIG, SIGKILL, 0, 0, 0))
        return -errno;
    if (getppid() != firmware)
        _exit(1); /* it ended before the request was in force */
    for (i = 0; i < nfds; i++)
        close(fds[i]);
    shi_self_fini(self);
    int err = shi_self_init(self, &machine->m, number);
    if (err)
        return err;
    CPU_ZERO(&core);
    CPU_SET(shi_load_relaxed(&self->slot->core) % CPU_SETSIZE, &core);
    if (sched_setaffinity(0, sizeof core, &core))
        return -errno;
    if (own_randomness() < 0)
        return -EIO;
    shi_cpu_hooks(machine);
    err = shi_remind_open(self);
    /* Without kicks only NMIs need it: a machine that queues no signals boots without. */
    if (!err || (err == -EAGAIN && !machine->m.kick && machine->m.doorbell != SHI_DB_SIGNAL))
        err = shi_kick_install(self);
    if (!err)
        err = shi_self_online(self);
    if (err)
        return err;
    /* Signals were blocked across the fork: a kick in that window had killed us. */
    sigemptyset(&all);
    pthread_sigmask(SIG_SETMASK, &all, NULL);
    return 0;
}

/* fork_cpu(cpu, firmware_pid, fds) -> pid.  The child closes `fds`, takes the slot, and
 * never returns. */
static PyObject *fork_cpu(PyObject *object, PyObject *args)
{
    Machine *machine = (Machine *)object;
    unsigned number;
    int firmware;
    PyObject *list;
    int fds[128];
    Py_ssize_t i;
    if (!PyArg_ParseTuple(args, "IiO!", &number, &firmware, &PyList_Type, &list))
        return NULL;
    if (number >= machine->m.ncpus || PyList_GET_SIZE(list) > 128) {
        PyErr_SetString(PyExc_ValueError, "fork_cpu");
        return NULL;
    }
    for (i = 0; i < PyList_GET_SIZE(list); i++)
        fds[i] = (int)PyLong_AsLong(PyList_GET_ITEM(list, i));
    if (PyErr_Occurred())
        return NULL;
    PyOS_BeforeFork();
    pid_t pid = fork();
    if (pid) {
        int saved = errno;
        PyOS_AfterFork_Parent();
        errno = saved;
        return pid < 0 ? PyErr_SetFromErrno(PyExc_OSError) : PyLong_FromLong(pid);
    }
    PyOS_AfterFork_Child();
    int err = become(machine, number, firmware, fds, (size_t)PyList_GET_SIZE(list));
    if (err) {
        if (PyErr_Occurred())
            PyErr_Print();
        shi_store_release(&shi_slot(&machine->m, number)->boot_error, (uint32_t)-err);
        _exit(1);
    }
    shi_current = machine;
    PyObject *done = cpu_loop(object, NULL);
    if (!done)
        PyErr_Print();
    flush_standard_files();
    _exit(done ? 0 : 1);
}

/* Run in the child of every fork: a CPU's is no CPU.  (In the firmware's it is one.) */
static PyObject *forked(PyObject *object, PyObject *unused)
{
    Machine *machine = (Machine *)object;
    (void)unused;
    if (!machine->self.host) {
        machine->foreign = 1;
        if (shi_current == machine)
            shi_current = NULL;
        shi_kick_remove();
        shi_absence = SHI_CHILD;
        shi_machine_close(&machine->m); /* its lock says that the machine lives */
    }
    Py_RETURN_NONE;
}

PyMethodDef shi_cpu_methods[] = {
    { "fork_cpu", fork_cpu, METH_VARARGS, "fork_cpu(cpu, firmware_pid, fds) -> pid" },
    { "forked", forked, METH_NOARGS, "forked()\n--\n\nA fork's child of a CPU is no CPU." },
    { NULL, NULL, 0, NULL },
};

#define DOC(name, text) #name "()\n--\n\n" text
PyMethodDef shi_cpu_functions[] = {
    { "cpu_context", cpu_context, METH_NOARGS,
      DOC(cpu_context, "NO_CPU, CPU_TASK or CPU_HANDLER: what this process and thread is.") },
    { "smp_processor_id", smp_processor_id, METH_NOARGS,
      DOC(smp_processor_id, "The number of this CPU.  ClusterStateError on the host.") },
    { "local_irq_disable", irq_disable, METH_NOARGS,
      DOC(local_irq_disable, "No handler runs here until local_irq_enable(): a flag, not a "
                             "system call.  What arrives meanwhile stays pending.") },
    { "local_irq_enable", irq_enable, METH_NOARGS,
      DOC(local_irq_enable, "Let handlers run again, and run those that are pending now.") },
    { "local_irq_save", irq_save, METH_NOARGS,
      DOC(local_irq_save, "local_irq_disable(): returns the flags for local_irq_restore.") },
    { "local_irq_restore", irq_restore, METH_O,
      "local_irq_restore(flags)\n--\n\nBack to what local_irq_save() found." },
    { "irqs_disabled", irqs_disabled, METH_NOARGS,
      DOC(irqs_disabled, "True between local_irq_disable and _enable, and in handlers.") },
    { "preempt_disable", preempt_disable, METH_NOARGS,
      DOC(preempt_disable, "Tasks are not preempted here: this counts, as in a non-preemptible "
                           "kernel.") },
    { "preempt_enable", preempt_enable, METH_NOARGS,
      DOC(preempt_enable, "ClusterStateError without a preempt_disable().") },
    { "in_task", in_task, METH_NOARGS, DOC(in_task, "Not in an interrupt handler or NMI.") },
    { "in_hardirq", in_hardirq, METH_NOARGS, DOC(in_hardirq, "In an IPI handler.") },
    { "in_interrupt", in_interrupt, METH_NOARGS,
      DOC(in_interrupt, "In an IPI handler or NMI.") },
    { "in_nmi", in_nmi, METH_NOARGS, DOC(in_nmi, "In an NMI handler.") },
    { "on_task_cancel", on_task_cancel, METH_O,
      "on_task_cancel(function)\n--\n\nCalled when this task is cancelled, instead of "
      "raising." },
    { "task_interrupt_lost", task_interrupt_lost, METH_NOARGS,
      DOC(task_interrupt_lost, "Raise TaskInterrupt once more: it was raised in vain.") },
    { "cond_resched", cond_resched, METH_NOARGS,
      DOC(cond_resched,
          "Take pending interrupts now: for tasks of a machine with kick=False.") },
    { NULL, NULL, 0, NULL },
};
