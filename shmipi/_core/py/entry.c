/* SPDX-License-Identifier: MIT */
/* Interrupts of a CPU where Python runs: the core's hooks, and what a kick puts off. */
#include "py/entry.h"

#include <signal.h>
#include <time.h>

#include "irq/chip.h"
#include "irq/irqdesc.h"
#include "smp/cpu.h"
#include "smp/queue.h"
#include "users/users.h"
#include "py/handler.h"
#include "py/incoming.h"
#include "py/line.h"
#include "py/net.h"
#include "py/nmi.h"
#include "py/sched.h"
#include "py/signals.h"
#include "py/stack.h"
#include "py/stopper.h"
#include "py/tick.h"
#include "py/trace.h"

/* The interpreter, given up for a while: by this thread (host) or for the core's hooks
 * to take back when Python work arrives (CPU). */
PyThreadState *shi_give_up(Machine *machine)
{
    if (machine->self.host) {
        machine->waiters++; /* the interpreter is ours */
        return PyEval_SaveThread();
    }
    if (!machine->released)
        machine->released = PyEval_SaveThread();
    return NULL;
}

/* Forked generators are alike: `random` reseeds itself, numpy's must be told. */
static void own_randomness(void)
{
    PyObject *modules = PySys_GetObject("modules"); /* borrowed */
    PyObject *module = modules ? PyDict_GetItemString(modules, "numpy.random") : NULL;
    PyObject *done = module ? PyObject_CallMethod(module, "seed", NULL) : NULL;
    if (module && !done)
        PyErr_WriteUnraisable(module);
    Py_XDECREF(done);
}

/*
 * The interpreter hears that it was forked, before it runs anything here.  Most CPUs of a large
 * machine never get here, or long after boot: it writes to 200 pages, each a copy of its own.
 *
 * Until now it was held by this thread, as at the fork, and nothing of it was used; the kick's
 * handler may have asked it to look (PyErr_SetInterruptEx), which it forgets here.  That is no
 * loss: what waits for our kicks and NMIs is in this CPU's own books, and who calls this looks.
 */
static void adopt(Machine *machine)
{
    sigset_t all, mask;
    sigfillset(&all);
    /* One that comes in the middle would be both noted here and known to the interpreter. */
    pthread_sigmask(SIG_SETMASK, &all, &mask);
    /* Hooks of a fork find no machine, as in any child: one that waited here for another CPU
     * would take the interpreter back, and be called again in its own middle. */
    shi_current = NULL;
    PyOS_AfterFork_Child();
    shi_current = machine;
    machine->newborn = false; /* not before: see forked() */
    shi_signals_early();
    pthread_sigmask(SIG_SETMASK, &mask, NULL);
    own_randomness();
}

void shi_take_back(Machine *machine, PyThreadState *mine)
{
    if (mine) {
        PyEval_RestoreThread(mine);
        machine->waiters--;
    } else if (machine->released) {
        PyThreadState *state = machine->released;
        machine->released = NULL;
        PyEval_RestoreThread(state);
    } else if (__builtin_expect(machine->newborn, 0)) {
        adopt(machine);
    }
}

/* ---- hooks of the core ----------------------------------------------------------- */

static void hook_release(struct shi_self *self)
{
    Machine *machine = self->hooks.arg;
    if (!machine->released && !machine->newborn)
        machine->released = PyEval_SaveThread();
}

static void hook_interrupt(struct shi_self *self)
{
    /* Async-signal-safe, unlike Py_AddPendingCall, which takes a lock: the handler of
     * this signal (irq_entry, py/shield.c) runs at the next bytecode boundary. */
    PyErr_SetInterruptEx((int)self->m->kick_signal);
}

static void hook_nmi(struct shi_self *self)
{
    PyErr_SetInterruptEx((int)self->m->nmi_signal); /* its handler is nmi_entry there */
}

/* Run one Python csd in interrupt context: soft-masked throughout, and whatever it
 * raises goes to its sender or to sys.unraisablehook, never into what it interrupted. */
static void run_handler(Machine *machine, uint32_t index)
{
    struct shi_self *self = &machine->self;
    struct shi_csd *csd = shi_csd(&machine->m, index);
    bool async = (shi_load_relaxed(&csd->lock) & SHI_CSD_TYPE) != SHI_CSD_SYNC;
    bool work = shi_csd_is_irq_work(csd);
    uint64_t flags = 0;
    struct incoming in;
    struct handler_scope scope;
    struct handler_said outer; /* of a softirq that this is on top of */
    uint32_t func = csd->func;
    shi_handler_outer(self, &outer);
    shi_handler_begin(machine, &scope);
    shi_csd_record(self->slot, index + 1, csd);
    if (shi_incoming(machine, &in, csd, async) < 0)
        goto out;
    shi_count(self, work ? SHI_C_irq_work : async ? SHI_C_csd_async : SHI_C_csd_sync);
    shi_count(self, SHI_C_python_run);
    uint32_t called = shi_called(machine, in.function);
    if (called)
        func = called;
    SHI_TRACE(self, csd_function_entry, self->id, index + 1, func, 0);
    shi_say_handler(self, in.function, SHI_H_IRQ);
    if (work)
        flags = shi_irq_work_begin(self->m, csd);
    else if (async) /* the kernel's order: unlock, then run */
        shi_csd_unlock(self, csd);
    PyObject *result = shi_incoming_apply(&in);
    shi_leave_if_forked(machine, result);
    SHI_TRACE(self, csd_function_exit, self->id, index + 1, func, 0);
    if (work)
        shi_irq_work_end(csd, flags);
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
    shi_store_relaxed(&self->slot->cur_csd, 0);
    shi_say_outer(self, &outer);
    shi_handler_end(machine, &scope);
}

static void hook_run(struct shi_self *self, uint32_t index)
{
    Machine *machine = self->hooks.arg;
    shi_take_back(machine, NULL);
    run_handler(machine, index);
}

static void hook_irq(struct shi_self *self, uint32_t line)
{
    Machine *machine = self->hooks.arg;
    shi_take_back(machine, NULL);
    shi_run_line(machine, line);
}

/* Interrupts are on: what comes runs on top of it, between its bytecodes. */
static void hook_softirq(struct shi_self *self, uint32_t nr)
{
    Machine *machine = self->hooks.arg;
    shi_take_back(machine, NULL);
    shi_run_softirq(machine, nr);
    shi_take_back(machine, NULL); /* a handler on top of it may have waited */
}

static uint32_t hook_xdp(struct shi_self *self, uint64_t entry, uint32_t hash, uint64_t data)
{
    Machine *machine = self->hooks.arg;
    shi_take_back(machine, NULL);
    uint32_t verdict = shi_run_xdp(machine, entry, hash, data);
    shi_take_back(machine, NULL); /* a handler on top of it may have waited */
    return verdict;
}

static void hook_starting(struct shi_self *self)
{
    Machine *machine = self->hooks.arg;
    shi_take_back(machine, NULL);
    PyObject *module = shi_import("shmipi.smp.cpuhp");
    PyObject *done = module ? PyObject_CallMethod(module, "starting", "I", self->id) : NULL;
    if (!done)
        PyErr_WriteUnraisable(module);
    Py_XDECREF(done);
    Py_XDECREF(module);
}

void shi_cpu_hooks(Machine *machine)
{
    machine->self.hooks = (struct shi_hooks){
        .arg = machine,
        .run = hook_run,
        .release = hook_release,
        .interrupt = hook_interrupt,
        .irq = hook_irq,
        .starting = hook_starting,
        .nmi = hook_nmi,
        .stack = shi_stack_hook,
        .softirq = hook_softirq,
        .xdp = hook_xdp,
    };
}

/* `softirqs`: an interrupt has ended, or may have. */
static void run_all(Machine *machine, bool softirqs)
{
    struct shi_self *self = &machine->self;
    uint32_t index, line;
    shi_take_back(machine, NULL);
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
    if (self->expired)
        shi_run_timers(machine);
    if (__builtin_expect(self->unsent && shi_python_waits(self), 0))
        shi_send_unsent(machine);
    self->in_core--;
    if (self->happened)
        shi_leave_slow(self);
    if (__builtin_expect(shi_load_relaxed(&self->softirqs) != 0, 0) && softirqs) {
        shi_do_softirq(self, true);
        shi_take_back(machine, NULL);
        shi_signals_let_go(machine);
    }
}

static void run_waiting(Machine *machine)
{
    run_all(machine, true);
}

/* Is there more to do before the task goes on?  Not what is ksoftirqd's. */
static bool more_waits(const struct shi_self *self)
{
    return shi_python_waits(self) || (shi_softirqs_due(self) && !self->softirqd);
}

static void run_deferred(Machine *machine, bool softirqs)
{
    run_all(machine, softirqs);
    if (shi_stop_due(&machine->self))
        shi_stopper_run(machine, run_waiting);
}

void shi_run_deferred(Machine *machine)
{
    run_deferred(machine, true);
}

/* ---- interrupts while a task runs ------------------------------------------------ */

bool shi_hotplug_asked(const struct shi_self *self)
{
    return self->down;
}

int shi_go_offline(Machine *machine)
{
    hook_release(&machine->self);
    int err = shi_cpu_play_dead(&machine->self);
    shi_take_back(machine, NULL);
    if (!err)
        shi_users_online(&machine->self, false);
    return err;
}

void shi_wait_python(Machine *machine)
{
    shi_run_deferred(machine);
    if (shi_hotplug_asked(&machine->self) && !shi_masked(&machine->self))
        shi_go_offline(machine);
}

/* Serve everything, Python included, then let the task go on. */
void shi_irq_window(Machine *machine)
{
    struct shi_self *self = &machine->self;
    bool inlined = self->inline_python;
    shi_set_polling(self);
    shi_fetch_and_full(&self->slot->word, ~SHI_W_ASKED);
    for (;;) {
        /* For ksoftirqd alone it was not opened. */
        run_deferred(machine, !self->softirqd || shi_irqs_wait(self));
        self->inline_python = true;
        self->in_core++;
        shi_service(self);
        self->in_core--;
        self->inline_python = inlined;
        shi_take_back(machine, NULL);
        if (self->happened)
            shi_leave_slow(self);
        if (shi_hotplug_asked(self)) {
            if (shi_go_offline(machine) == -ECANCELED)
                break;
            continue;
        }
        if (more_waits(self))
            continue;
        shi_set_running(self);
        if (!more_waits(self))
            return;
        shi_set_polling(self);
    }
}

void shi_take_deferred(Machine *machine)
{
    struct shi_self *self = &machine->self;
    bool offline = self->in_task && shi_hotplug_asked(self);
    /* ASKED with nothing there: what was asked for was an NMI's handler, which has run, and
     * an import has kept everything else away.  It keeps senders from kicking. */
    bool asked = self->in_task && shi_load_relaxed(&self->slot->word) & SHI_W_ASKED;
    if (!(shi_python_waits(self) || offline || asked) || shi_masked(self))
        return;
    if (self->in_task)
        shi_irq_window(machine); /* takes ASKED back, which keeps senders from kicking */
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
        shi_irq_window(machine);
    shi_preempt_check(machine);
    /* Into the task, at the bytecode where it stands. */
    return shi_task_interrupt(machine) < 0 ? -1 : shi_signals_check(machine);
}

int shi_task_interrupt(Machine *machine)
{
    struct shi_self *self = &machine->self;
    struct shi_csd *csd = self->cancellable;
    if (__builtin_expect(!shi_cancel_asked(self), 1) || shi_masked(self) ||
        !shi_in_task(self) || self->in_stop)
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
    if (self->in_task && !shi_masked(self) &&
        (shi_python_waits(self) || shi_hotplug_asked(self)))
        shi_irq_window(machine);
}

int shi_nap(Machine *machine, long ns)
{
    const struct timespec pause = { 0, ns };
    shi_after_enable(machine);
    if (shi_task_interrupt(machine) < 0)
        return -1;
    Py_BEGIN_ALLOW_THREADS
    nanosleep(&pause, NULL);
    Py_END_ALLOW_THREADS
    return PyErr_CheckSignals() < 0 || shi_use(machine) < 0 ? -1 : 0;
}

/* The Python-level handler of the NMI signal: nothing holds it up. */
int shi_nmi_entry_python(Machine *machine)
{
    shi_run_nmi(machine);
    /* Kicks that its handler held up are acknowledged: nobody sends them again. */
    if (machine->self.happened)
        shi_leave_slow(&machine->self);
    return shi_masked(&machine->self) || shi_in_serving_softirq(&machine->self)
               ? 0
               : shi_signals_check(machine);
}
