/* SPDX-License-Identifier: MIT */
/* struct irq_work: a function for hard-irq context that may be queued from anywhere. */
#include "py/base.h"

#include <errno.h>

#include "base/clock.h"
#include "smp/irq_work.h"
#include "py/entry.h"
#include "py/outgoing.h"
#include "py/tables.h"
#include "py/trace.h"
#include "py/wait.h"

#define LAZY 4u /* linux/irq_work.h: IRQ_WORK_LAZY, IRQ_WORK_HARD_IRQ */
#define HARD 8u
#define NAP_NS 50000

typedef struct {
    PyObject_HEAD
    Machine *machine;
    uint32_t local;
    uint32_t flags;
    int cpu; /* that it was queued on last */
    PyObject *function, *info;
} IrqWork;

static PyTypeObject *work_type;

static PyObject *work_new(PyTypeObject *type, PyObject *args, PyObject *kwargs)
{
    static char *names[] = { "func", "info", "flags", "machine", NULL };
    PyObject *function, *info = Py_None, *machine = NULL;
    unsigned flags = 0;
    struct outgoing out;
    (void)type;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "O|OI$O:irq_work", names, &function, &info,
                                     &flags, &machine))
        return NULL;
    if (flags & ~(LAZY | HARD))
        return PyErr_Format(PyExc_ValueError,
                            "flags are IRQ_WORK_LAZY and IRQ_WORK_HARD_IRQ, not %u", flags);
    if (machine == Py_None)
        machine = NULL;
    if (machine && Py_TYPE(machine) != shi_machine_type)
        return PyErr_Format(PyExc_TypeError, "machine is a Machine or None, not %R",
                            Py_TYPE(machine));
    Machine *m = machine ? (Machine *)machine : shi_use_current();
    if (!m || shi_use(m) < 0 || shi_outgoing_info(m, &out, function, info) < 0)
        return NULL;
    int64_t local = shi_outgoing_prepare(m, &out);
    shi_outgoing_clear(m, &out);
    if (local < 0)
        return NULL;
    IrqWork *work = PyObject_GC_New(IrqWork, work_type);
    if (!work) {
        shi_call_end(&m->self, (uint32_t)local);
        return NULL;
    }
    work->machine = (Machine *)Py_NewRef((PyObject *)m);
    work->local = (uint32_t)local;
    work->flags = flags;
    work->cpu = -1;
    work->function = Py_NewRef(function);
    work->info = Py_NewRef(info);
    PyObject_GC_Track(work);
    return (PyObject *)work;
}

static int work_traverse(PyObject *self, visitproc visit, void *arg)
{
    IrqWork *work = (IrqWork *)self;
    Py_VISIT(Py_TYPE(self));
    Py_VISIT(work->machine);
    Py_VISIT(work->function);
    Py_VISIT(work->info);
    return 0;
}

static struct shi_csd *csd_of(const IrqWork *work)
{
    return shi_own_csd(&work->machine->self, work->local);
}

static void work_dealloc(PyObject *self)
{
    IrqWork *work = (IrqWork *)self;
    PyTypeObject *type = Py_TYPE(self);
    PyObject_GC_UnTrack(self);
    if (!shi_gone(work->machine)) {
        if (shi_other_thread(work->machine))
            shi_late(work->machine, work->local, true);
        else if (shi_csd_locked(csd_of(work)))
            shi_leave_behind(work->machine, work->local);
        else
            shi_call_end(&work->machine->self, work->local);
    }
    Py_XDECREF(work->machine);
    Py_XDECREF(work->function);
    Py_XDECREF(work->info);
    type->tp_free(self);
    Py_DECREF(type);
}

static uint64_t lock_of(const IrqWork *work)
{
    return shi_gone(work->machine) ? 0 : shi_load_acquire(&csd_of(work)->lock);
}

static PyObject *work_pending(PyObject *self, void *unused)
{
    (void)unused;
    return PyBool_FromLong((lock_of((IrqWork *)self) & SHI_CSD_LOCK) != 0);
}

static PyObject *work_busy(PyObject *self, void *unused)
{
    (void)unused;
    return PyBool_FromLong((lock_of((IrqWork *)self) & SHI_CSD_BUSY) != 0);
}

static PyObject *work_get(PyObject *self, void *which)
{
    const IrqWork *work = (IrqWork *)self;
    return Py_NewRef(which ? work->info : work->function);
}

static PyObject *work_repr(PyObject *self)
{
    const IrqWork *work = (IrqWork *)self;
    uint64_t lock = lock_of(work);
    return PyUnicode_FromFormat("<irq_work func=%R%s%s>", work->function,
                                lock & SHI_CSD_LOCK ? " pending" : "",
                                lock & SHI_CSD_BUSY ? " busy" : "");
}

static PyGetSetDef work_getset[] = {
    { "pending", work_pending, NULL, "Queued, and its function not begun.", NULL },
    { "busy", work_busy, NULL, "Queued, or its function runs.", NULL },
    { "func", work_get, NULL, "The function.", NULL },
    { "info", work_get, NULL, "Its argument, as it was when this was made.", (void *)1 },
    { NULL, NULL, NULL, NULL, NULL },
};

static PyType_Slot work_slots[] = {
    { Py_tp_new, work_new },
    { Py_tp_dealloc, work_dealloc },
    { Py_tp_traverse, work_traverse },
    { Py_tp_repr, work_repr },
    { Py_tp_getset, work_getset },
    { Py_tp_doc,
      "irq_work(func, info=None, flags=0, *, machine=None)\n--\n\n"
      "func(info), to run in hard-irq context (the kernel's struct irq_work).\n\n"
      "`func` and `info` are pickled and registered now, so that irq_work_queue() may be\n"
      "called anywhere, in NMIs too.  It is this process's alone to queue.  `flags`:\n"
      "IRQ_WORK_LAZY, to wait for the CPU's tick; IRQ_WORK_HARD_IRQ means something on\n"
      "PREEMPT_RT only." },
    { 0, NULL },
};
static PyType_Spec work_spec = {
    .name = "shmipi._core.irq_work",
    .basicsize = sizeof(IrqWork),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC,
    .slots = work_slots,
};

int shi_irq_work_types(PyObject *module)
{
    if (!work_type)
        work_type = (PyTypeObject *)PyType_FromSpec(&work_spec);
    return work_type ? PyModule_AddObjectRef(module, "irq_work", (PyObject *)work_type) : -1;
}

/* ---- queueing -------------------------------------------------------------------- */

static IrqWork *as_work(PyObject *object)
{
    if (Py_TYPE(object) != work_type) {
        PyErr_Format(PyExc_TypeError, "an irq_work, not %R", Py_TYPE(object));
        return NULL;
    }
    return shi_use(((IrqWork *)object)->machine) < 0 ? NULL : (IrqWork *)object;
}

static PyObject *queue(PyObject *Py_UNUSED(module), PyObject *object)
{
    IrqWork *work = as_work(object);
    if (!work || shi_refuse_host(work->machine, SHI_ONLY_CPU) < 0)
        return NULL;
    struct shi_self *self = &work->machine->self;
    shi_say_call(work->machine, work->function);
    int queued = shi_irq_work_queue(self, work->local, work->flags & LAZY);
    shi_call_said(work->machine);
    if (queued)
        work->cpu = (int)self->id;
    shi_after_enable(work->machine); /* it has come already, where interrupts are on */
    return PyBool_FromLong(queued);
}

static PyObject *queue_on(PyObject *Py_UNUSED(module), PyObject *const *args, Py_ssize_t nargs,
                          PyObject *kwnames)
{
    static const char *const names[] = { "work", "cpu" };
    static bool warned_nmi;
    PyObject *a[2];
    int64_t cpu;
    if (shi_parse("irq_work_queue_on", names, 2, 2, args, nargs, kwnames, a) < 0 ||
        shi_as_cpu(a[1], &cpu) < 0)
        return NULL;
    IrqWork *work = as_work(a[0]);
    if (!work)
        return NULL;
    Machine *machine = work->machine;
    struct shi_self *self = &machine->self;
    if (cpu < 0 || cpu >= machine->m.ncpus)
        return shi_raise_errno(machine, -ENXIO, (int)cpu);
    if (self->in_nmi && cpu != self->id &&
        shi_warn_once(&warned_nmi, "irq_work_queue_on() another CPU in an NMI: sending "
                                   "interrupts is not safe there") < 0)
        return NULL;
    shi_say_call(machine, work->function);
    int err = shi_irq_work_queue_on(self, work->local, work->flags & LAZY, (uint32_t)cpu);
    shi_call_said(machine);
    if (err == -ENXIO) {
        if (PyErr_WarnFormat(shi_py.Warning, 1, "irq_work for offline CPU %d: not queued",
                             (int)cpu) < 0)
            return NULL;
        Py_RETURN_FALSE;
    }
    if (err < 0)
        return shi_raise_errno(machine, err, (int)cpu);
    if (err)
        work->cpu = (int)cpu;
    shi_after_enable(machine);
    return PyBool_FromLong(err);
}

/* -1, with an exception: its CPU died with it.  1: it goes on. */
static int look(const IrqWork *work)
{
    const struct shi_machine *m = &work->machine->m;
    uint64_t lock = shi_load_acquire(&csd_of(work)->lock);
    uint32_t cpu = (uint16_t)(lock >> SHI_CSD_DST_SHIFT);
    if (lock & SHI_CSD_DIED) {
        shi_raise_died(work->machine, work->cpu, lock);
        return -1;
    }
    if (!(lock & SHI_CSD_BUSY))
        return 0;
    if (shi_ended(&work->machine->self)) {
        shi_raise_errno(work->machine, -EOWNERDEAD, -1);
        return -1;
    }
    /* It runs, and the reaper completes what has not begun: of a CPU that died in it nobody
     * says so. */
    if (!(lock & SHI_CSD_LOCK) && cpu < m->ncpus) {
        uint64_t w = shi_load_acquire(&shi_slot(m, cpu)->word);
        if (shi_word_state(w) == SHI_DEAD ||
            shi_word_gen(w) != (uint16_t)(lock >> SHI_CSD_GEN_SHIFT)) {
            shi_irq_work_end(csd_of(work), lock);
            shi_raise_died(work->machine, (int)cpu, 0);
            return -1;
        }
    }
    return 1;
}

static PyObject *wait_for(PyObject *Py_UNUSED(module), PyObject *object)
{
    static bool warned;
    IrqWork *work = as_work(object);
    if (!work)
        return NULL;
    const struct shi_self *self = &work->machine->self;
    int busy;
    if (!self->host && !shi_preemptible(self) &&
        shi_warn_once(&warned, "irq_work_sync() may have to wait: not in a handler, nor with "
                               "interrupts or preemption disabled") < 0)
        return NULL;
    while ((busy = look(work)) > 0) {
        uint32_t cpu = (uint16_t)(shi_load_acquire(&csd_of(work)->lock) >> SHI_CSD_DST_SHIFT);
        if (!self->host && cpu == self->id && (shi_masked(self) || self->in_nmi))
            return shi_raise_errno(work->machine, -EDEADLK, (int)cpu);
        if (shi_nap(work->machine, NAP_NS) < 0)
            return NULL;
    }
    if (busy < 0)
        return NULL;
    Py_RETURN_NONE;
}

PyMethodDef shi_irq_work_functions[] = {
    { "irq_work_queue", queue, METH_O,
      "irq_work_queue(work)\n--\n\n"
      "Have `work` run on this CPU as soon as interrupts are on: True, or False when it is\n"
      "pending already.  In any context, NMIs too.  kernel/irq_work.c." },
    { "irq_work_queue_on", FAST(queue_on), METH_FASTCALL | METH_KEYWORDS,
      "irq_work_queue_on(work, cpu)\n--\n\n"
      "The same on `cpu`, by its call_single_queue where it is another one.  For an offline\n"
      "CPU ShmipiWarning, and False; a warning, once, in an NMI.  CpuOfflineError (ENXIO) for\n"
      "one that does not exist." },
    { "irq_work_sync", wait_for, METH_O,
      "irq_work_sync(work)\n--\n\n"
      "Wait until `work` is neither pending nor running.  CpuDiedError when its CPU died with\n"
      "it, IpiDeadlockError where this CPU itself holds it up; ShmipiWarning, once, where\n"
      "nothing may wait." },
    { NULL, NULL, 0, NULL },
};
