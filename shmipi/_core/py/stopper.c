/* SPDX-License-Identifier: MIT */
#include "py/stopper.h"

#include "base/native.h"
#include "smp/cpu.h"
#include "smp/entry.h"
#include "smp/queue.h"
#include "smp/smp.h"
#include "smp/stop.h"
#include "py/handler.h"
#include "py/incoming.h"
#include "py/signals.h"
#include "py/tables.h"

/* What stands around a function of the user's, beside what it interrupts. */
struct work {
    struct shi_csd *csd;
    uint64_t type;
    struct incoming in;
    PyObject *pending; /* what is about to be raised where the stopper came in */
    bool runs;         /* there is a function */
    bool unlocks;      /* and it is for this to unlock the csd */
};

/* What runs what waits for the interpreter, while the stopper runs. */
static void (*run_what_waits)(Machine *);

static bool is_takedown(const struct shi_csd *csd)
{
    return csd->func == (SHI_FUNC_NATIVE | SHI_NATIVE_TAKEDOWN);
}

/* take_cpu_down: what is queued here runs now, and then this CPU is offline. */
static int take_down(Machine *machine, void (*waiting)(Machine *))
{
    int err;
    while ((err = shi_cpu_disable(&machine->self)) == -EBUSY)
        waiting(machine);
    return err;
}

static void call(Machine *machine, struct work *w)
{
    struct shi_self *self = &machine->self;
    bool async = w->type == SHI_CSD_STOP_NOWAIT;
    shi_count(self, SHI_C_python_run);
    shi_store_relaxed(&self->slot->cur_csd, shi_csd_number(self->m, w->csd));
    if (async)
        shi_csd_unlock(self, w->csd);
    PyObject *result = shi_incoming_apply(&w->in);
    shi_leave_if_forked(machine, result);
    if (!async) {
        if (!shi_outcome(machine, w->csd, result, w->in.apply != SHI_A_INFO))
            w->unlocks = false; /* it waits for room */
    } else if (!result) {
        shi_count(self, SHI_C_unraisable);
        PyErr_WriteUnraisable(w->in.function);
    }
    Py_XDECREF(result);
    shi_store_relaxed(&self->slot->cur_csd, 0);
}

static void run(Machine *machine, struct work *w, void (*waiting)(Machine *))
{
    if (is_takedown(w->csd)) {
        int err = take_down(machine, waiting);
        w->csd->kind = SHI_K_INT;
        w->csd->value.i = err;
    } else if (w->runs) {
        call(machine, w);
    }
}

static void run_multi(Machine *machine, struct work *w, void (*waiting)(Machine *))
{
    struct shi_self *self = &machine->self;
    for (;;) {
        enum shi_step_of_stop step = shi_multi_step(self);
        if (step == SHI_MULTI_DONE)
            return;
        if (step == SHI_MULTI_PYTHON) {
            waiting(machine);
            continue;
        }
        run(machine, w, waiting);
        shi_multi_ran(self);
    }
}

/*
 * As a kernel thread would run: above the CPU's task, if it has one, but it can be preempted,
 * by the next work of the stopper, and may sleep.
 */
static void run_thread(Machine *machine, struct work *w, void (*waiting)(Machine *))
{
    struct shi_self *self = &machine->self;
    struct shi_csd *cancellable = self->cancellable;
    bool task = self->in_task;
    self->in_task = true;
    self->cancellable = NULL;
    self->preempt--;
    self->in_stop = 0;
    run(machine, w, waiting);
    self->in_stop = 1;
    self->preempt++;
    self->cancellable = cancellable;
    self->in_task = task;
}

/* With interrupts on: who calls this CPU kicks it, as any that runs Python. */
static void run_alone(Machine *machine, struct work *w, void (*waiting)(Machine *))
{
    struct shi_self *self = &machine->self;
    bool polled = shi_word_state(shi_load_relaxed(&self->slot->word)) == SHI_POLLING;
    bool inlined = self->inline_python;
    self->inline_python = false;
    if (polled)
        shi_set_running(self);
    if (w->csd->apply & SHI_A_THREAD)
        run_thread(machine, w, waiting);
    else
        run(machine, w, waiting);
    if (polled)
        shi_set_polling(self);
    self->inline_python = inlined;
}

static void run_work(Machine *machine, uint32_t index, void (*waiting)(Machine *))
{
    struct shi_self *self = &machine->self;
    struct work w = { .csd = shi_csd(&machine->m, index), .unlocks = true };
    w.type = shi_load_relaxed(&w.csd->lock) & SHI_CSD_TYPE;
    w.pending = PyErr_Occurred() ? shi_take_exception() : NULL;
    if (w.type >= SHI_CSD_MULTI && !self->multi.csd)
        shi_multi_enter(self, index);
    if (w.type != SHI_CSD_MULTI && !(w.csd->func & SHI_FUNC_NATIVE)) {
        w.runs = shi_incoming(machine, &w.in, w.csd, w.type == SHI_CSD_STOP_NOWAIT) == 0;
        w.unlocks = w.runs; /* else it has been */
    }
    if (w.type >= SHI_CSD_MULTI)
        run_multi(machine, &w, waiting);
    else
        run_alone(machine, &w, waiting);
    if (w.unlocks && w.type != SHI_CSD_STOP_NOWAIT)
        shi_csd_unlock(self, w.csd);
    if (w.runs)
        shi_incoming_clear(&w.in);
    shi_signals_let_go(machine);
    shi_put_exception(w.pending);
}

void shi_stopper_run(Machine *machine, void (*waiting)(Machine *))
{
    struct shi_self *self = &machine->self;
    run_what_waits = waiting;
    while (shi_stop_due(self) && shi_stop_run(self)) {
        uint32_t index;
        if (self->multi.csd) { /* begun in C, and Python has to run first */
            self->in_stop = 1;
            self->preempt++;
            index = self->multi.csd - 1;
        } else if ((index = shi_stop_take(self)) == UINT32_MAX) {
            continue;
        }
        run_work(machine, index, waiting);
        shi_stop_end(self);
    }
}

/* cpu_disable() -> 0 or -errno: take_cpu_down's, with all CPUs stopped. */
static PyObject *cpu_disable(PyObject *Py_UNUSED(module), PyObject *Py_UNUSED(unused))
{
    Machine *machine = shi_use_cpu(SHI_ONLY_CPU);
    if (!machine)
        return NULL;
    if (!machine->self.multi.csd || !machine->self.irqs_off || !machine->self.in_stop)
        return shi_raise(shi_py.StateError, 0, (int)machine->self.id,
                         "a CPU goes offline with all others stopped");
    return PyLong_FromLong(take_down(machine, run_what_waits));
}

/* write_unraisable(error, where): to sys.unraisablehook, which takes nothing made in Python. */
static PyObject *write_unraisable(PyObject *Py_UNUSED(module), PyObject *args)
{
    PyObject *error, *where;
    Machine *machine = shi_use_cpu(SHI_ONLY_CPU);
    if (!machine || !PyArg_ParseTuple(args, "OO", &error, &where))
        return NULL;
    if (!PyExceptionInstance_Check(error)) {
        PyErr_SetString(PyExc_TypeError, "an exception");
        return NULL;
    }
    shi_count(&machine->self, SHI_C_unraisable);
    PyErr_SetObject((PyObject *)Py_TYPE(error), error); /* with its traceback */
    PyErr_WriteUnraisable(where);
    Py_RETURN_NONE;
}

PyMethodDef shi_stopper_functions[] = {
    { "cpu_disable", cpu_disable, METH_NOARGS,
      "cpu_disable()\n--\n\nRun what is queued, and be offline: 0 or -errno." },
    { "write_unraisable", write_unraisable, METH_VARARGS,
      "write_unraisable(error, where)\n--\n\n"
      "Hand an exception that nobody can get to sys.unraisablehook, and count it." },
    { NULL, NULL, 0, NULL },
};
