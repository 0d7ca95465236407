/* SPDX-License-Identifier: MIT */
/* Read-copy update: what shmipi/users/rcu.py is made of. */
#include "py/base.h"

#include <errno.h>

#include "py/native.h"
#include "py/tables.h"
#include "users/rcu.h"

static struct shi_rcu *state_of(Machine *machine)
{
    struct shi_rcu *st = machine ? shi_rcu_state(&machine->m) : NULL;
    if (machine && !st)
        shi_raise(shi_py.StateError, 0, -1,
                  "this machine has no RCU yet: its host begins with cluster.users.rcu");
    return st;
}

static PyObject *rcu_read_lock(PyObject *Py_UNUSED(module), PyObject *Py_UNUSED(unused))
{
    Machine *machine = shi_use_cpu("the host is no CPU, and no grace period waits for it");
    struct shi_rcu *st = state_of(machine);
    if (!st)
        return NULL;
    shi_rcu_read_lock(&machine->self, st);
    Py_RETURN_NONE;
}

static PyObject *rcu_read_unlock(PyObject *Py_UNUSED(module), PyObject *Py_UNUSED(unused))
{
    Machine *machine = shi_use_cpu("the host is no CPU, and no grace period waits for it");
    struct shi_rcu *st = state_of(machine);
    if (!st)
        return NULL;
    if (shi_rcu_read_unlock(&machine->self, st))
        return shi_raise(shi_py.StateError, 0, (int)machine->self.id,
                         "rcu_read_unlock() without rcu_read_lock()");
    Py_RETURN_NONE;
}

static PyObject *rcu_read_lock_held(PyObject *Py_UNUSED(module), PyObject *Py_UNUSED(unused))
{
    Machine *machine = shi_use_cpu(SHI_ONLY_CPU);
    struct shi_rcu *st = state_of(machine);
    return st ? PyBool_FromLong(shi_load_relaxed(&st->cpu[machine->self.id].nesting) != 0)
              : NULL;
}

METHOD(rcu_bytes)
{
    (void)arg;
    return PyLong_FromUnsignedLongLong(shi_rcu_bytes(&MACHINE(object)->m));
}

METHOD(rcu_set_waitq)
{
    struct shi_rcu *st = state_of(MACHINE(object));
    unsigned long long at = PyLong_AsUnsignedLongLong(arg);
    if (!st || PyErr_Occurred())
        return NULL;
    shi_store_full(&st->waitq, at);
    Py_RETURN_NONE;
}

/* A context that may wait for a grace period: 0, or -1 with an exception. */
static int may_wait(Machine *machine, struct shi_rcu *st)
{
    const struct shi_self *self = &machine->self;
    if (self->host)
        return 0;
    if (shi_load_relaxed(&st->cpu[self->id].nesting)) {
        shi_raise(shi_py.DeadlockError, EDEADLK, (int)self->id,
                  "a grace period waits for this read-side section: call it after "
                  "rcu_read_unlock()");
        return -1;
    }
    if (self->in_task && !self->in_irq && !self->in_nmi && !self->irqs_off && !self->preempt)
        return 0;
    /* Says which context it is, if it may not. */
    PyObject *done = PyObject_CallMethod((PyObject *)machine, "might_sleep", NULL);
    Py_XDECREF(done);
    return done ? 0 : -1;
}

/* rcu_synchronize(expedited) -> 0, or the grace period whose end is to be waited for */
METHOD(rcu_synchronize)
{
    Machine *machine = MACHINE(object);
    struct shi_rcu *st = shi_use(machine) < 0 ? NULL : state_of(machine);
    if (!st || may_wait(machine, st) < 0)
        return NULL;
    uint64_t seq = shi_rcu_snap(st);
    bool expedited = arg == Py_True;
    if (expedited ? shi_rcu_spin(&machine->self, seq, true)
                  : shi_rcu_advance(&machine->self, seq, false))
        seq = 0;
    return PyLong_FromUnsignedLongLong(seq);
}

/* rcu_advance(seq, expedited) -> is it over? */
METHOD(rcu_advance)
{
    Machine *machine = MACHINE(object);
    unsigned long long seq;
    int expedited;
    if (!PyArg_ParseTuple(arg, "Kp", &seq, &expedited) || shi_use(machine) < 0 ||
        !state_of(machine))
        return NULL;
    return PyBool_FromLong(shi_rcu_advance(&machine->self, seq, expedited));
}

/* rcu_stall(after_ns) -> None, or [CPUs that hold it up]: once in so long */
METHOD(rcu_stall)
{
    Machine *machine = MACHINE(object);
    struct shi_rcu *st = shi_use(machine) < 0 ? NULL : state_of(machine);
    unsigned long long after = PyLong_AsUnsignedLongLong(arg);
    int64_t cpu = -1;
    if (!st || PyErr_Occurred())
        return NULL;
    if (!shi_rcu_stalled(st, after))
        Py_RETURN_NONE;
    PyObject *list = PyList_New(0);
    while (list && (cpu = shi_rcu_holdout(&machine->m, (uint32_t)(cpu + 1))) >= 0) {
        PyObject *one = Py_BuildValue("II", (unsigned)cpu,
                                      (unsigned)shi_load_relaxed(&st->cpu[cpu].nesting));
        if (!one || PyList_Append(list, one) < 0)
            Py_CLEAR(list);
        Py_XDECREF(one);
    }
    return list;
}

/* rcu_call(handler or None, pointer, info) */
METHOD(rcu_call)
{
    Machine *machine = MACHINE(object);
    struct shi_rcu *st = shi_use(machine) < 0 ? NULL : state_of(machine);
    PyObject *handler;
    int pointer;
    unsigned long long info;
    int64_t func = 0;
    if (!st || !PyArg_ParseTuple(arg, "OpK", &handler, &pointer, &info) ||
        shi_refuse_host(machine, "callbacks run on the CPU that has queued them") < 0)
        return NULL;
    if (machine->self.in_nmi)
        return shi_raise(shi_py.StateError, EPERM, (int)machine->self.id,
                         "an NMI handler cannot queue a callback");
    if (shi_native_or_none(machine, handler, &func) < 0)
        return NULL;
    if (shi_call_rcu(&machine->self,
                     handler == Py_None ? SHI_RCU_PYTHON
                     : pointer          ? SHI_RCU_POINTER
                                        : SHI_RCU_INT,
                     (uint32_t)func, info))
        return shi_raise(shi_py.BusyError, ENOSPC, (int)machine->self.id,
                         "%u callbacks of CPU %u wait for their grace periods: wait, with "
                         "rcu_barrier()",
                         SHI_RCU_RING, (unsigned)machine->self.id);
    Py_RETURN_NONE;
}

/* rcu_core() -> None: all done; -1: some wait; else the number of a Python one that is ready */
METHOD(rcu_core)
{
    Machine *machine = MACHINE(object);
    uint64_t python;
    (void)arg;
    if (shi_use(machine) < 0 || shi_refuse_host(machine, SHI_ONLY_CPU) < 0)
        return NULL;
    int found = shi_rcu_core(&machine->self, &python);
    if (!found)
        Py_RETURN_NONE;
    return found < 0 ? PyLong_FromLong(-1) : PyLong_FromUnsignedLongLong(python);
}

/* The Python callback that rcu_core() gave has run. */
METHOD(rcu_done)
{
    Machine *machine = MACHINE(object);
    struct shi_rcu *st = shi_use(machine) < 0 ? NULL : state_of(machine);
    (void)arg;
    if (!st || shi_refuse_host(machine, SHI_ONLY_CPU) < 0)
        return NULL;
    shi_rcu_done(&machine->self);
    Py_RETURN_NONE;
}

/* rcu_look() -> (seq, ipis, idle, offline, retried, gone, died_readers, stalls,
 * migrated), [(nesting, reports, queued, done, lost, native ones that are left) of each CPU] */
METHOD(rcu_retell)
{
    Machine *machine = MACHINE(object);
    (void)arg;
    if (shi_use(machine) < 0)
        return NULL;
    shi_rcu_retell(&machine->self);
    Py_RETURN_NONE;
}

METHOD(rcu_look)
{
    Machine *machine = MACHINE(object);
    struct shi_rcu *st = shi_use(machine) < 0 ? NULL : state_of(machine);
    uint32_t cpu, n = machine->m.ncpus;
    (void)arg;
    if (!st)
        return NULL;
#define N(word) (unsigned long long)shi_load_relaxed(&(word))
    PyObject *list = PyList_New(n);
    for (cpu = 0; list && cpu < n; cpu++) {
        const struct shi_rcu_cpu *c = &st->cpu[cpu];
        PyObject *one = Py_BuildValue("IKKKKI", (unsigned)shi_load_relaxed(&c->nesting),
                                      N(c->reports), N(c->queued), N(c->done), N(c->lost),
                                      (unsigned)shi_rcu_natives_left(&machine->m, cpu));
        if (!one)
            Py_CLEAR(list);
        else
            PyList_SET_ITEM(list, cpu, one);
    }
    return list ? Py_BuildValue("(KKKKKKKKK)N", N(st->seq), N(st->ipis), N(st->idle),
                                N(st->offline), N(st->retried), N(st->gone),
                                N(st->died_readers), N(st->stalls), N(st->migrated), list)
                : NULL;
#undef N
}

PyMethodDef shi_rcu_methods[] = {
    NOARGS(rcu_bytes, "Bytes of the state that RCU has."),
    ONE(rcu_set_waitq, "rcu_set_waitq(offset): where who waits for a grace period stands."),
    ONE(rcu_synchronize, "rcu_synchronize(expedited) -> 0, or what is to be waited for."),
    MANY(rcu_advance, "rcu_advance(seq, expedited) -> is it over?"),
    ONE(rcu_stall, "rcu_stall(after_ns) -> None, or [(CPU, depth)] that hold it up."),
    MANY(rcu_call, "rcu_call(handler, pointer, info)"),
    NOARGS(rcu_core, "Invoke callbacks: None, -1: some wait, or a Python one's number."),
    NOARGS(rcu_done, "The Python callback that rcu_core() gave has run."),
    NOARGS(rcu_retell, "Have somebody invoke what CPUs left that are gone."),
    NOARGS(rcu_look, "Counts of the machine and of each CPU."),
    { NULL, NULL, 0, NULL },
};

PyMethodDef shi_rcu_functions[] = {
    { "rcu_read_lock", rcu_read_lock, METH_NOARGS,
      "rcu_read_lock($module, /)\n--\n\n"
      "Begin to read: what is found from here on is not freed before rcu_read_unlock().\n\n"
      "Nests; in tasks, handlers and softirqs.  ClusterStateError on the host." },
    { "rcu_read_unlock", rcu_read_unlock, METH_NOARGS,
      "rcu_read_unlock($module, /)\n--\n\n"
      "End what rcu_read_lock() began.  ClusterStateError without one." },
    { "rcu_read_lock_held", rcu_read_lock_held, METH_NOARGS,
      "rcu_read_lock_held($module, /)\n--\n\nIs this CPU in a read-side section?" },
    { NULL, NULL, 0, NULL },
};
