/* SPDX-License-Identifier: MIT */
/*
 * The lock of a machine's irq tables, as a context manager.  All who change the tables take
 * it here, with one policy: a bounded wait, interrupts off on the CPU that holds it (so that
 * it neither runs a handler nor goes offline), and what was left half made is freed.
 *
 * It is taken and given back in C, where no signal's handler runs.  Between __enter__ and
 * the block the interpreter looks at no signal either; who raises there all the same (a
 * tracer) drops the last reference to this object, which gives the lock back.
 */
#include "py/base.h"

#include <errno.h>
#include <math.h>

#include "irq/chip.h"
#include "irq/irqdesc.h"
#include "py/entry.h"
#include "py/tables.h"

#define LOCK_S 5.0
#define LOOK_NS 500000

typedef struct {
    PyObject_HEAD
    Machine *machine;
    double seconds;
    bool must, anywhere, held;
    uint8_t flags;
} IrqLock;

static PyTypeObject *lock_type;

static const char *domain_of(const struct shi_machine *m, uint32_t pid)
{
    const struct shi_irq_area *area = shi_irq_area(m);
    uint32_t i, d;
    for (i = 0; i < SHI_NCOPROC; i++) {
        if (shi_load_relaxed(&area->coproc[i].pid) != pid)
            continue;
        for (d = 0; d < SHI_NDOMAINS; d++)
            if (shi_load_acquire(&area->domain[d].used) && area->domain[d].coproc == i + 1)
                return area->domain[d].name;
    }
    return NULL;
}

/* Who that is, for people: new reference, or NULL with an exception. */
static PyObject *holder_text(const struct shi_machine *m, uint64_t held)
{
    uint32_t slot = shi_holder_slot(held), pid = shi_holder_pid(held);
    const char *name;
    if (!held || slot >= m->nslots)
        return PyUnicode_FromString("one after another");
    if (slot < m->ncpus)
        return PyUnicode_FromFormat("CPU %u (pid %u)", slot, pid);
    if (slot == m->ncpus)
        return PyUnicode_FromFormat("the host (pid %u)", pid);
    if (slot != m->ncpus + 1)
        return PyUnicode_FromFormat("an attached host (pid %u)", pid);
    if ((name = domain_of(m, pid))) {
        size_t length = strnlen(name, sizeof((struct shi_irqdomain *)0)->name);
        PyObject *text = PyUnicode_DecodeUTF8(name, (Py_ssize_t)length, "replace");
        PyObject *full = text ? PyUnicode_FromFormat("coprocessor %U (pid %u)", text, pid)
                              : NULL;
        Py_XDECREF(text);
        return full;
    }
    return PyUnicode_FromFormat("the firmware (pid %u)", pid);
}

static PyObject *timed_out(const IrqLock *lock)
{
    const struct shi_machine *m = &lock->machine->m;
    uint64_t held = shi_load_relaxed(&shi_irq_area(m)->lock);
    uint32_t slot = shi_holder_slot(held);
    PyObject *who = holder_text(m, held);
    PyObject *seconds = who ? PyFloat_FromDouble(lock->seconds) : NULL;
    if (seconds)
        shi_raise(shi_py.TimeoutError, ETIMEDOUT, held && slot < m->ncpus ? (int)slot : -1,
                  "the irq tables of machine %s are not free in %S s: %U holds their lock; is"
                  " it stopped?",
                  m->header->name, seconds, who);
    Py_XDECREF(seconds);
    Py_XDECREF(who);
    return NULL;
}

static int may_wait(const Machine *machine, bool anywhere)
{
    const struct shi_self *self = &machine->self;
    if (self->host)
        return 0;
    if (shi_other_thread(machine)) {
        shi_raise(shi_py.StateError, 0, -1,
                  "the irq tables are changed by a CPU's own thread, not by others of its "
                  "process");
        return -1;
    }
    if (shi_lock_mine(self, &shi_irq_area(self->m)->lock)) {
        shi_raise(shi_py.DeadlockError, EDEADLK, (int)self->id,
                  "CPU %d holds the lock of the irq tables, beneath what asks for it now",
                  (int)self->id);
        return -1;
    }
    if (anywhere || (!self->in_irq && !self->in_nmi && !self->irqs_off))
        return 0;
    shi_raise(shi_py.StateError, 0, -1,
              "irqs are reserved, destroyed, requested and freed under a lock that may have to "
              "wait: not in interrupt handlers, nor with interrupts disabled");
    return -1;
}

static bool try_it(IrqLock *lock)
{
    struct shi_self *self = &lock->machine->self;
    lock->flags = self->host ? 0 : shi_irq_save(self);
    shi_enter(self);
    lock->held = shi_irq_trylock(self) == 0;
    shi_leave(self);
    if (!lock->held && !self->host)
        shi_irq_restore(self, lock->flags);
    return lock->held;
}

static PyObject *lock_enter(PyObject *object, PyObject *unused)
{
    IrqLock *lock = (IrqLock *)object;
    Machine *machine = lock->machine;
    (void)unused;
    if (lock->held)
        return shi_raise(shi_py.StateError, 0, -1, "this holds the lock already");
    if (shi_use(machine) < 0 || may_wait(machine, lock->anywhere) < 0)
        return NULL;
    uint64_t end = shi_now_ns() + (uint64_t)(lock->seconds * 1e9);
    while (!try_it(lock)) {
        if (shi_now_ns() >= end) {
            if (!lock->must)
                Py_RETURN_FALSE;
            return timed_out(lock);
        }
        if (shi_nap(machine, LOOK_NS) < 0)
            return NULL;
    }
    Py_RETURN_TRUE;
}

static void let_go(IrqLock *lock)
{
    struct shi_self *self = &lock->machine->self;
    lock->held = false;
    shi_enter(self);
    shi_irq_unlock(self);
    shi_leave(self);
    if (!self->host)
        shi_irq_restore(self, lock->flags);
}

static PyObject *lock_exit(PyObject *object, PyObject *const *args, Py_ssize_t nargs)
{
    IrqLock *lock = (IrqLock *)object;
    (void)args;
    (void)nargs;
    if (!lock->held)
        Py_RETURN_NONE;
    let_go(lock);
    shi_after_enable(lock->machine);
    if (shi_task_interrupt(lock->machine) < 0)
        return NULL;
    Py_RETURN_NONE;
}

static void lock_dealloc(PyObject *object)
{
    IrqLock *lock = (IrqLock *)object;
    PyTypeObject *type = Py_TYPE(object);
    if (lock->held)
        let_go(lock);
    Py_XDECREF(lock->machine);
    type->tp_free(object);
    Py_DECREF(type);
}

static PyMethodDef lock_methods[] = {
    { "__enter__", lock_enter, METH_NOARGS, "Take it: True, or False: not in time." },
    { "__exit__", (PyCFunction)(void (*)(void))lock_exit, METH_FASTCALL, "Give it back." },
    { NULL, NULL, 0, NULL },
};
static PyType_Slot lock_slots[] = {
    { Py_tp_dealloc, lock_dealloc },
    { Py_tp_methods, lock_methods },
    { Py_tp_doc, "The lock of a machine's irq tables: Machine.irq_lock()." },
    { 0, NULL },
};
static PyType_Spec lock_spec = {
    .name = "shmipi._core.IrqLock",
    .basicsize = sizeof(IrqLock),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_DISALLOW_INSTANTIATION,
    .slots = lock_slots,
};

/* irq_lock(seconds=5.0, must=True, anywhere=False): of the irq tables, for `with`. */
METHOD(irq_lock)
{
    double seconds = LOCK_S;
    int must = 1, anywhere = 0;
    if (!PyArg_ParseTuple(arg, "|dpp:irq_lock", &seconds, &must, &anywhere))
        return NULL;
    if (!(seconds >= 0) || !isfinite(seconds)) {
        PyErr_SetString(PyExc_ValueError, "a lock is waited for 0 or more seconds");
        return NULL;
    }
    IrqLock *lock = (IrqLock *)lock_type->tp_alloc(lock_type, 0);
    if (!lock)
        return NULL;
    lock->machine = (Machine *)Py_NewRef(object);
    lock->seconds = seconds;
    lock->must = must;
    lock->anywhere = anywhere;
    return (PyObject *)lock;
}

PyMethodDef shi_irqlock_methods[] = {
    { "irq_lock", machine_irq_lock, METH_VARARGS,
      "irq_lock(seconds=5.0, must=True, anywhere=False): of the irq tables, for `with`" },
    { NULL, NULL, 0, NULL },
};

int shi_irqlock_types(PyObject *module)
{
    if (!lock_type)
        lock_type = (PyTypeObject *)PyType_FromSpec(&lock_spec);
    return lock_type ? PyModule_AddObjectRef(module, "IrqLock", (PyObject *)lock_type) : -1;
}
