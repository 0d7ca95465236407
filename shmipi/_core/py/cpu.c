/* SPDX-License-Identifier: MIT */
/* Being a CPU: how it begins, the idle loop, and tasks. */
#include "py/base.h"

#include <sched.h>
#include <signal.h>
#include <stdlib.h>
#include <sys/prctl.h>
#include <unistd.h>

#include "base/clock.h"
#include "irq/doorbell.h"
#include "irq/remind.h"
#include "irq/signal.h"
#include "smp/cpu.h"
#include "smp/idle.h"
#include "smp/queue.h"
#include "smp/entry.h"
#include "smp/reap.h"
#include "smp/sched.h"
#include "users/users.h"
#include "users/crash.h"
#include "py/entry.h"
#include "py/handler.h"
#include "py/incoming.h"
#include "py/sched.h"
#include "py/signals.h"
#include "py/stack.h"
#include "py/tables.h"
#include "py/title.h"

/* ---- tasks ----------------------------------------------------------------------- */

static int complain(const char *format, Machine *machine)
{
    const char *name = machine->self.slot->task_name;
    if (PyErr_WarnFormat(shi_py.Warning, 1, format, (int)machine->self.id,
                         *name ? name : "of the scheduler") < 0)
        PyErr_WriteUnraisable(NULL);
    return 0;
}

static void name_task(Machine *machine, PyObject *function)
{
    char *name = machine->self.slot->task_name;
    name[0] = 0;
    if (!function)
        return;
    PyObject *text = PyObject_CallOneArg(shi_py.task_name, function);
    const char *utf8 = text ? PyUnicode_AsUTF8(text) : NULL;
    PyErr_Clear();
    if (utf8)
        snprintf(name, sizeof machine->self.slot->task_name, "%s", utf8);
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
    PyObject *module = shi_import("signal");
    PyObject *core = shi_import("shmipi._core");
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

/* From here on the CPU is RUNNING, and is kicked. */
static void begin_task(Machine *machine, PyObject *function)
{
    struct shi_self *self = &machine->self;
    name_task(machine, function);
    shi_store_relaxed(&self->slot->task, 1);
    shi_schedule(self);
    self->in_task = true;
    self->inline_python = false;
    /* Only a sleep whose doorbell is the kick itself leaves it blocked. */
    if (shi_doorbell_of(&machine->m)->by_signal)
        shi_kick_block(self, false);
    shi_irq_window(machine); /* serves what came meanwhile, then RUNNING */
}

/* What a task did to the kick's signal and the NMI's is undone. */
static void check_signals(Machine *machine)
{
    machine->checked_ns = 0;
    switch (shi_kick_check(&machine->self)) {
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
}

#define CHECK_NS 1000000u

/* After steps of scheduler tasks, which may be short: three system calls each would be most of
 * what they cost.  Not later than a millisecond after the first, or before the next task. */
static bool check_later(Machine *machine)
{
    uint64_t now;
    if (shi_doorbell_of(&machine->m)->by_signal)
        return false; /* the CPU sleeps by it */
    now = shi_now_ns();
    if (!machine->checked_ns)
        machine->checked_ns = now;
    return now - machine->checked_ns < CHECK_NS;
}

/* What the task left behind must not outlive it. */
static void tidy_up(Machine *machine)
{
    struct shi_self *self = &machine->self;
    if (self->irqs_off) {
        complain("CPU %d: the task %s ended with interrupts disabled", machine);
        self->irqs_off = 0;
    }
    self->preempt = 0;
    if (self->softirq) {
        complain("CPU %d: the task %s ended with local_bh_disable() in force", machine);
        self->softirq = 0;
    }
    if (shi_xchg_full(&self->slot->cpus_read, 0))
        complain("CPU %d: the task %s ended with cpus_read_lock() held", machine);
}

static void end_task(Machine *machine, bool steps)
{
    struct shi_self *self = &machine->self;
    tidy_up(machine);
    if (!steps || !check_later(machine))
        check_signals(machine);
    shi_set_polling(self);
    shi_fetch_and_full(&self->slot->word, ~(SHI_W_ASKED | SHI_W_NEED_RESCHED | SHI_W_LAZY));
    self->in_task = false;
    self->inline_python = true;
    shi_store_relaxed(&self->slot->task, 0);
    self->slot->task_name[0] = 0;
    self->happened = 0;
    shi_run_deferred(machine);
}

/* Or it was cancelled before: it never runs. */
static bool begins(struct shi_self *self, struct shi_csd *csd)
{
    /* Full: of this and the canceller's swap one is first.  Either it sees BEGUN, and the
     * task will be interrupted, or we see CANCEL, and the task never runs. */
    if (!(shi_fetch_or_full(&csd->lock, SHI_CSD_BEGUN) & SHI_CSD_CANCEL))
        return true;
    shi_store_relaxed(&csd->status, SHI_S_CANCELLED);
    shi_csd_unlock(self, csd);
    return false;
}

/* False: the result waits for room, and the csd with it. */
static bool task_outcome(Machine *machine, const struct incoming *in, struct shi_csd *csd,
                         PyObject *result)
{
    if (!result && PyErr_ExceptionMatches(shi_py.TaskInterrupt)) {
        PyErr_Clear();
        shi_store_relaxed(&csd->status, SHI_S_CANCELLED);
        return true;
    }
    return shi_outcome(machine, csd, result, in->apply != SHI_A_INFO);
}

/* Its step is all that it does, maybe on top of a task, which goes on as it was. */
static void run_work(struct shi_self *self, uint32_t index)
{
    Machine *machine = self->hooks.arg;
    struct incoming in;
    if (!shi_csd_is_ours(self, index)) {
        shi_count(self, SHI_C_corrupt);
        return;
    }
    struct shi_csd *csd = shi_csd(&machine->m, index);
    if (!begins(self, csd) || shi_incoming(machine, &in, csd, false) < 0)
        return;
    PyObject *outer = machine->on_cancel;
    machine->on_cancel = NULL;
    shi_count(self, SHI_C_tasks_run);
    PyObject *result = apply_task(machine, &in, csd);
    machine->on_cancel = outer;
    shi_leave_if_forked(machine, result);
    bool sent = task_outcome(machine, &in, csd, result);
    Py_XDECREF(result);
    if (sent)
        shi_csd_unlock(self, csd);
    shi_incoming_clear(&in);
}

/* The first that has not been cancelled, or NULL. */
static struct shi_csd *next_task(Machine *machine, struct incoming *in)
{
    struct shi_self *self = &machine->self;
    self->behind_ns = 0;
    shi_enter(self);
    uint32_t index = shi_list_pop(self, &self->tasks);
    shi_leave(self);
    if (index == UINT32_MAX)
        return NULL;
    struct shi_csd *csd = shi_csd(&machine->m, index);
    if (!begins(self, csd) || shi_incoming(machine, in, csd, false) < 0)
        return NULL;
    shi_count(self, SHI_C_tasks_run);
    return csd;
}

static void run_task(Machine *machine)
{
    struct shi_self *self = &machine->self;
    struct incoming in;
    struct shi_csd *csd = next_task(machine, &in);
    if (!csd)
        return;
    if (machine->checked_ns)
        check_signals(machine); /* of steps before it */
    begin_task(machine, in.function);
    shi_turn_reset(self);
    self->task_runs = true;
    if (shi_sched_work(self))
        shi_sched_tick(self); /* others wait */
    PyObject *result = apply_task(machine, &in, csd);
    shi_leave_if_forked(machine, result);
    bool sent = task_outcome(machine, &in, csd, result);
    Py_XDECREF(result);
    self->task_runs = false;
    end_task(machine, false);
    if (sent)
        shi_csd_unlock(self, csd);
    shi_incoming_clear(&in);
}

/* A task that waits behind the step that runs here, on top of it. */
static void run_task_above(struct shi_self *self)
{
    Machine *machine = self->hooks.arg;
    char below[sizeof self->slot->task_name];
    struct shi_csd *cancellable = self->cancellable, *csd;
    PyObject *pending = PyErr_Occurred() ? shi_take_exception() : NULL;
    PyObject *on_cancel = machine->on_cancel;
    struct shi_turn turn;
    struct incoming in;
    if ((csd = next_task(machine, &in))) {
        memcpy(below, self->slot->task_name, sizeof below);
        machine->on_cancel = NULL;
        shi_turn_above(self, &turn);
        self->task_runs = true;
        name_task(machine, in.function);
        PyObject *result = apply_task(machine, &in, csd);
        shi_leave_if_forked(machine, result);
        bool sent = task_outcome(machine, &in, csd, result);
        Py_XDECREF(result);
        tidy_up(machine);
        check_signals(machine);
        self->task_runs = false;
        shi_turn_below(self, &turn);
        self->cancellable = cancellable;
        machine->on_cancel = on_cancel;
        memcpy(self->slot->task_name, below, sizeof below);
        if (sent)
            shi_csd_unlock(self, csd);
        shi_incoming_clear(&in);
    }
    shi_put_exception(pending);
}

#define WINDOW_NS 20000000u /* then others look: signals, the end of the machine */

/* Python tasks of the scheduler, one after the other as they come, for a while. */
static void run_scheduled(Machine *machine)
{
    struct shi_self *self = &machine->self;
    uint64_t end = 0;
    begin_task(machine, NULL); /* who waits behind the first is looked at in its step */
    while (shi_schedule_one(self, false) && shi_sched_work(self) && !self->tasks.head &&
           !shi_hotplug_asked(self)) {
        uint64_t now = shi_now_ns();
        if (!end)
            end = now + WINDOW_NS; /* not before the first: who woke it waits for that */
        if (now >= end)
            break;
        shi_take_deferred(machine);
    }
    end_task(machine, true);
}

/* Until the machine ends. */
static void cpu_loop(Machine *machine)
{
    struct shi_self *self = &machine->self;
    self->inline_python = true;
    for (;;) {
        shi_remind_stop(self);
        enum shi_idle_why why = shi_idle(self);
        /* A signal that came just before it slept has interrupted no sleep. */
        if (why == SHI_IDLE_STOP && machine->newborn && !shi_signals_came())
            return;
        shi_take_back(machine, NULL);
        switch (why) {
        case SHI_IDLE_PYTHON:
            shi_run_deferred(machine);
            break;
        case SHI_IDLE_TASK:
            run_task(machine);
            break;
        case SHI_IDLE_SCHED:
            run_scheduled(machine);
            if (self->tasks.head)
                run_task(machine); /* in turn */
            break;
        case SHI_IDLE_OFFLINE:
            shi_go_offline(machine);
            break;
        case SHI_IDLE_SIGNAL:
            if (PyErr_CheckSignals() < 0)
                PyErr_WriteUnraisable(NULL);
            break;
        case SHI_IDLE_STOP:
            if (PyErr_CheckSignals() < 0)
                PyErr_WriteUnraisable(NULL);
            shi_flush_standard_files();
            return;
        }
    }
}

#define SHI_FORKS 64u /* at most at once: the firmware looks after its host in between */

/* ---- becoming one ---------------------------------------------------------------- */

/*
 * From here to the idle loop in C, without Python: what the interpreter touches (reference
 * counts, inline caches, locks that it makes anew) is a private copy of a page, times the
 * number of CPUs.  What it has to do after a fork is done when it is first needed (shi_take_back).
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
    shi_cpu_hooks(machine);
    shi_stack_note(self->slot);
    self->hooks.step = shi_python_step;
    self->hooks.work = run_work;
    self->hooks.above = run_task_above;
    err = shi_remind_open(self);
    /* Without kicks only NMIs need it: a machine that queues no signals boots without. */
    if (!err ||
        (err == -EAGAIN && !machine->m.kick && !shi_doorbell_of(&machine->m)->by_signal))
        err = shi_kick_install(self);
    if (!err)
        err = shi_crash_install();
    if (!err)
        err = shi_self_online(self);
    if (err)
        return err;
    shi_users_online(self, true);
    /* Signals were blocked across the fork: a kick in that window had killed us. */
    sigemptyset(&all);
    pthread_sigmask(SIG_SETMASK, &all, NULL);
    return 0;
}

/* In the child: it takes the slot, and never returns. */
static _Noreturn void be_cpu(Machine *machine, uint32_t number, pid_t firmware, const int *fds,
                             size_t nfds)
{
    machine->newborn = true;
    shi_current = machine; /* before its signals are let in */
    shi_title_show(machine->m.header->name, number);
    int err = become(machine, number, firmware, fds, nfds);
    if (err) {
        shi_store_release(&shi_slot(&machine->m, number)->boot_error, (uint32_t)-err);
        _exit(1);
    }
    cpu_loop(machine);
    _exit(0);
}

/*
 * fork_cpus(cpus, firmware_pid, fds) -> ([(pid, generation), ...], errno): a process for each
 * of `cpus`, as far as the system lets; errno is 0, or of the fork that it refused.  A child
 * closes `fds`.
 *
 * All in a row, without Python in between: after each fork, what the firmware writes to is a
 * copied page again.
 */
static PyObject *fork_cpus(PyObject *object, PyObject *args)
{
    Machine *machine = (Machine *)object;
    struct shi_self *self = &machine->self;
    int firmware, fds[128], err = 0;
    PyObject *cpus, *list;
    Py_ssize_t i, n, nfds;
    struct {
        uint32_t number, generation;
        pid_t pid;
    } cpu[SHI_FORKS];
    if (!PyArg_ParseTuple(args, "O!iO!", &PyList_Type, &cpus, &firmware, &PyList_Type, &list))
        return NULL;
    n = PyList_GET_SIZE(cpus);
    nfds = PyList_GET_SIZE(list);
    for (i = 0; i < nfds && i < 128; i++)
        fds[i] = (int)PyLong_AsLong(PyList_GET_ITEM(list, i));
    for (i = 0; i < n && i < (Py_ssize_t)SHI_FORKS; i++)
        if (shi_as_slot(PyList_GET_ITEM(cpus, i), machine->m.ncpus, &cpu[i].number) < 0)
            return NULL;
    if (PyErr_Occurred())
        return NULL;
    if (nfds > 128 || n > (Py_ssize_t)SHI_FORKS) {
        PyErr_SetString(PyExc_ValueError, "fork_cpus");
        return NULL;
    }
    shi_title_find();
    PyOS_BeforeFork();
    for (i = 0; i < n; i++) {
        cpu[i].generation = shi_reap_reset(self, cpu[i].number);
        cpu[i].pid = fork();
        if (!cpu[i].pid)
            be_cpu(machine, cpu[i].number, firmware, fds, (size_t)nfds);
        if (cpu[i].pid < 0) {
            err = errno;
            shi_reap_mark(self, cpu[i].number, 0); /* dead as before, not coming up */
            break;
        }
    }
    n = i;
    PyOS_AfterFork_Parent();
    PyObject *found = PyList_New(n);
    for (i = 0; found && i < n; i++) {
        PyObject *one = Py_BuildValue("iI", (int)cpu[i].pid, cpu[i].generation);
        if (!one)
            Py_CLEAR(found);
        else
            PyList_SET_ITEM(found, i, one);
    }
    return found ? Py_BuildValue("Ni", found, err) : NULL;
}

/* Run in the child of every fork: a CPU's is no CPU.  (In the firmware's it is one; a CPU's own
 * fork runs this when the CPU first needs the interpreter.) */
static PyObject *forked(PyObject *object, PyObject *unused)
{
    Machine *machine = (Machine *)object;
    (void)unused;
    if (!machine->self.host && !machine->newborn) {
        machine->foreign = 1;
        machine->self.left = 1;
        if (shi_current == machine)
            shi_current = NULL;
        shi_kick_remove();
        shi_absence = SHI_CHILD;
        shi_machine_close(&machine->m); /* its lock says that the machine lives */
    }
    Py_RETURN_NONE;
}

PyMethodDef shi_cpu_methods[] = {
    { "fork_cpus", fork_cpus, METH_VARARGS,
      "fork_cpus(cpus, firmware_pid, fds) -> ([(pid, generation), ...], errno)" },
    { "forked", forked, METH_NOARGS, "forked()\n--\n\nA fork's child of a CPU is no CPU." },
    { NULL, NULL, 0, NULL },
};
