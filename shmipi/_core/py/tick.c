/* SPDX-License-Identifier: MIT */
/* Timers and tick broadcast: what shmipi/users/tick.py is made of. */
#include "py/tick.h"

#include <errno.h>

#include "py/handler.h"
#include "py/line.h"
#include "py/native.h"
#include "py/tables.h"
#include "users/tick.h"

/* ---- running them ------------------------------------------------------------------ */

/* shmipi.users.tick._expire(index) -> whether it is to be queued again. */
static PyObject *expire_function(void)
{
    static PyObject *function;
    if (!function) {
        PyObject *module = shi_import("shmipi.users.tick");
        function = module ? PyObject_GetAttrString(module, "_expire") : NULL;
        Py_XDECREF(module);
    }
    return function;
}

void shi_run_timers(Machine *machine)
{
    struct shi_self *self = &machine->self;
    int64_t index;
    while ((index = shi_tick_pop(self)) >= 0) {
        struct handler_scope scope;
        shi_handler_begin(machine, &scope);
        PyObject *function = expire_function();
        PyObject *number = PyLong_FromLongLong(index);
        PyObject *result =
            shi_handler_apply(machine, number ? function : NULL, &number, 1, SHI_H_IRQ);
        bool restart = result == Py_True;
        Py_XDECREF(result);
        Py_XDECREF(number);
        shi_handler_end(machine, &scope);
        shi_tick_done(self, (uint32_t)index, restart);
    }
}

/* ---- methods ----------------------------------------------------------------------- */

METHOD(tick_bytes)
{
    (void)arg;
    return PyLong_FromUnsignedLongLong(shi_tick_bytes(&MACHINE(object)->m));
}

/* timer_setup(name, handler or None, info_kind, info) -> index */
METHOD(timer_setup)
{
    Machine *machine = MACHINE(object);
    const char *name;
    PyObject *handler;
    unsigned kind;
    unsigned long long info;
    int64_t func = 0;
    if (!PyArg_ParseTuple(arg, "sOIK", &name, &handler, &kind, &info) || shi_use(machine) < 0)
        return NULL;
    if (shi_native_or_none(machine, handler, &func) < 0)
        return NULL;
    int64_t index = shi_hrtimer_setup(&machine->m,
                                      handler == Py_None ? SHI_TK_PYTHON : SHI_TK_NATIVE,
                                      (uint32_t)func, kind, info, name);
    if (index < 0)
        return shi_raise(shi_py.BusyError, ENOSPC, -1,
                         "no timer is left: a machine of %u CPUs has %u",
                         (unsigned)machine->m.ncpus, 1024 + 4 * (unsigned)machine->m.ncpus);
    return PyLong_FromLongLong(index);
}

static PyObject *failed(Machine *machine, int err, uint32_t index, uint32_t cpu)
{
    switch (-err) {
    case ENXIO:
        return shi_raise_errno(machine, err, (int)cpu);
    case ENOSPC:
        return shi_raise(shi_py.BusyError, ENOSPC, (int)cpu,
                         "CPU %u has %u timers queued: cancel some, or start this one on "
                         "another CPU",
                         (unsigned)cpu, SHI_TIMER_QUEUE / 2);
    case EPERM:
        return shi_raise(shi_py.StateError, EPERM, (int)machine->self.id,
                         "an NMI handler cannot start a timer");
    default:
        PyErr_Format(PyExc_LookupError, "there is no timer %u", (unsigned)index);
        return NULL;
    }
}

/* timer_start(index, expires, interval, cpu) */
static PyObject *timer_start(Machine *machine, PyObject *const *args, Py_ssize_t nargs)
{
    if (nargs != 4) {
        PyErr_SetString(PyExc_TypeError, "timer_start(index, expires, interval, cpu)");
        return NULL;
    }
    if (shi_use(machine) < 0)
        return NULL;
    uint32_t index = (uint32_t)PyLong_AsUnsignedLong(args[0]);
    uint64_t expires = PyLong_AsUnsignedLongLong(args[1]);
    uint64_t interval = PyLong_AsUnsignedLongLong(args[2]);
    int64_t cpu;
    if (PyErr_Occurred() || shi_as_cpu(args[3], &cpu) < 0)
        return NULL;
    if (cpu < 0 || cpu >= (int64_t)machine->m.ncpus)
        return shi_raise_errno(machine, -ENXIO, (int)cpu);
    int err = shi_hrtimer_start(&machine->self, index, expires, interval, (uint32_t)cpu);
    if (err)
        return failed(machine, err, index, (uint32_t)cpu);
    Py_RETURN_NONE;
}

/* timer_cancel(index) -> 1, 0 or -1 */
METHOD(timer_cancel)
{
    Machine *machine = MACHINE(object);
    uint32_t index = (uint32_t)PyLong_AsUnsignedLong(arg);
    if (PyErr_Occurred() || shi_use(machine) < 0)
        return NULL;
    int err = shi_hrtimer_try_to_cancel(&machine->self, index);
    return err < -1 ? failed(machine, err, index, 0) : PyLong_FromLong(err);
}

/* timer_forward(index, now, interval) -> overruns */
METHOD(timer_forward)
{
    Machine *machine = MACHINE(object);
    unsigned index;
    unsigned long long now, interval;
    if (!PyArg_ParseTuple(arg, "IKK", &index, &now, &interval) || shi_use(machine) < 0)
        return NULL;
    return PyLong_FromUnsignedLongLong(
        shi_hrtimer_forward(&machine->self, index, now, interval));
}

/* timer_look(index) -> (state, cpu, expires, interval, fired, lost, name, due) */
METHOD(timer_look)
{
    Machine *machine = MACHINE(object);
    uint32_t index = (uint32_t)PyLong_AsUnsignedLong(arg);
    if (PyErr_Occurred() || shi_use(machine) < 0)
        return NULL;
    const struct shi_hrtimer *t = shi_hrtimer(&machine->m, index);
    if (!t)
        return failed(machine, -ENOENT, index, 0);
    uint64_t w = shi_load_full(&t->word);
    char name[SHI_TIMER_NAME + 1] = { 0 };
    memcpy(name, t->name, SHI_TIMER_NAME);
    return Py_BuildValue(
        "IIKKKIsK", (unsigned)(w & SHI_T_STATE), (unsigned)(uint16_t)(w >> SHI_T_CPU_SHIFT),
        (unsigned long long)shi_load_relaxed(&t->expires),
        (unsigned long long)shi_load_relaxed(&t->interval),
        (unsigned long long)shi_load_relaxed(&t->fired), (unsigned)shi_load_relaxed(&t->lost),
        name, (unsigned long long)shi_load_relaxed(&t->due));
}

/* tick_look() -> (bound_on, handovers, stalls, died, moved), [per CPU tuples] */
METHOD(tick_look)
{
    Machine *machine = MACHINE(object);
    struct shi_tick *st = shi_use(machine) < 0 ? NULL : shi_tick_state(&machine->m);
    uint32_t cpu, n = machine->m.ncpus;
    (void)arg;
    if (!st)
        return PyErr_Occurred() ? NULL : Py_NewRef(Py_None);
    PyObject *list = PyList_New(n);
    for (cpu = 0; list && cpu < n; cpu++) {
        const struct shi_tick_cpu *c = &st->cpu[cpu];
        uint64_t asleep = shi_load_relaxed(&st->oneshot[cpu / 64]) >> (cpu % 64) & 1;
        PyObject *one = Py_BuildValue(
            "KKKKKKO", (unsigned long long)shi_load_relaxed(&c->next_event),
            (unsigned long long)shi_load_relaxed(&c->local),
            (unsigned long long)shi_load_relaxed(&c->broadcast),
            (unsigned long long)shi_load_relaxed(&c->expired),
            (unsigned long long)shi_load_relaxed(&c->sent),
            (unsigned long long)shi_load_relaxed(&c->handlers), asleep ? Py_True : Py_False);
        if (!one)
            Py_CLEAR(list);
        else
            PyList_SET_ITEM(list, cpu, one);
    }
    return list ? Py_BuildValue("(iIIII)N", (int)shi_load_relaxed(&st->bound_on) - 1,
                                (unsigned)shi_load_relaxed(&st->handovers),
                                (unsigned)shi_load_relaxed(&st->stalls),
                                (unsigned)shi_load_relaxed(&st->died),
                                (unsigned)shi_load_relaxed(&st->moved), list)
                : NULL;
}

METHOD(tick_check)
{
    Machine *machine = MACHINE(object);
    (void)arg;
    return shi_use(machine) < 0 ? NULL : PyLong_FromLongLong(shi_tick_check(&machine->m));
}

METHOD(tick_receive_broadcast)
{
    Machine *machine = MACHINE(object);
    (void)arg;
    if (shi_use(machine) < 0 || shi_refuse_host(machine, SHI_ONLY_CPU) < 0)
        return NULL;
    shi_enter(&machine->self);
    int err = shi_tick_receive_broadcast(&machine->self);
    shi_leave(&machine->self);
    return PyLong_FromLong(err);
}

PyMethodDef shi_tick_methods[] = {
    NOARGS(tick_bytes, "Bytes of the state that timers have."),
    MANY(timer_setup, "timer_setup(name, handler, info_kind, info) -> index"),
    { "timer_start", FAST(timer_start), METH_FASTCALL,
      "timer_start(index, expires, interval, cpu)" },
    ONE(timer_cancel, "timer_cancel(index) -> 1: was queued, 0: was not, -1: runs"),
    MANY(timer_forward, "timer_forward(index, now, interval) -> overruns"),
    ONE(timer_look,
        "timer_look(index) -> (state, cpu, expires, interval, fired, lost, name, due)"),
    NOARGS(tick_look, "Where the broadcast is, and counts of each CPU; None: no timers yet."),
    NOARGS(tick_check, "A CPU whose timer nobody will fire though it sleeps, or -1."),
    NOARGS(tick_receive_broadcast, "As the timer's line: 0, -ENODEV or -EINVAL."),
    { NULL, NULL, 0, NULL },
};
