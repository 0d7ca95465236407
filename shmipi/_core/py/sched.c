/* SPDX-License-Identifier: MIT */
/* Tasks of the scheduler where Python runs, and what shmipi/users/scheduler.py is made of. */
#include "py/sched.h"

#include <string.h>
#include <time.h>

#include "base/clock.h"
#include "smp/sched.h"
#include "py/handler.h"
#include "py/signals.h"
#include "py/tables.h"
#include "py/trace.h"

#define SLICE_NS 3000000u
#define LONG_NS 10000000u

/* ---- running them ----------------------------------------------------------------- */

static bool may_run_others(const Machine *machine)
{
    const struct shi_self *self = &machine->self;
    return self->in_task && !self->preempt && !shi_masked(self) && !shi_in_interrupt(self) &&
           !self->held && !machine->pickling;
}

/*
 * Does a task wait behind a step that takes long?  It may take for ever itself, and what it comes
 * on top of goes on when it has ended: so by what this CPU has run since, and not by the time
 * that a step was stopped or had no core; and longer on top of what is on top of others.
 */
static bool waits_long(struct shi_self *self)
{
    struct timespec t;
    if (!shi_task_waits(self))
        return false;
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &t);
    uint64_t now = (uint64_t)t.tv_sec * 1000000000 + (uint64_t)t.tv_nsec + 1;
    if (!self->behind_ns)
        self->behind_ns = now;
    return now - self->behind_ns >= (uint64_t)LONG_NS * self->sched_depth;
}

static void let_run(Machine *machine, uint32_t depth)
{
    struct shi_self *self = &machine->self;
    struct shi_trace_said said = self->said; /* what they send is not of this one's call */
    bool ran = false;
    self->said = (struct shi_trace_said){ 0 };
    if (may_run_others(machine) && waits_long(self))
        self->hooks.above(self);
    uint64_t began = shi_now_ns(), end = began + SLICE_NS;
    while (may_run_others(machine) && self->sched_depth < depth && shi_sched_work(self) &&
           shi_schedule_one(self, false)) {
        ran = true;
        if (shi_now_ns() >= end)
            break; /* whom this is on top of has its turn */
    }
    self->said = said;
    if (ran) {
        shi_turn_begin(self, began);
        shi_signals_let_go(machine); /* what came into a softirq of ksoftirqd's */
    }
    if (self->in_task && (shi_sched_work(self) || shi_task_waits(self)))
        shi_sched_tick(self);
}

void shi_let_others_run(Machine *machine)
{
    let_run(machine, SHI_SCHED_DEPTH);
}

void shi_run_works(Machine *machine)
{
    let_run(machine, SHI_WORK_DEPTH);
}

void shi_preempt_python(Machine *machine)
{
    if (shi_turn_lasts(&machine->self))
        shi_sched_tick(&machine->self);
    else
        shi_let_others_run(machine);
}

/* ---- methods of Machine ----------------------------------------------------------- */

#define METHOD_FAST(name)                                                                      \
    static PyObject *name(Machine *machine, PyObject *const *args, Py_ssize_t nargs)

static PyObject *no_such(Machine *machine, int err, uint64_t id)
{
    (void)machine;
    return shi_raise(shi_py.NoTaskError, -err, -1,
                     "there is no task %llu.%llu: it has ended, or never was",
                     (unsigned long long)(id & 0xffffffff), (unsigned long long)(id >> 32));
}

/* The id in args[0], of `n` more: 0 and an exception. */
static uint64_t id_arg(Machine *machine, PyObject *const *args, Py_ssize_t nargs, Py_ssize_t n)
{
    if (shi_use(machine) < 0)
        return 0;
    if (nargs != n + 1) {
        PyErr_Format(PyExc_TypeError, "a task and %zd more arguments", n);
        return 0;
    }
    uint64_t id = PyLong_AsUnsignedLongLong(args[0]);
    if (PyErr_Occurred())
        return 0;
    if (!id)
        no_such(machine, -ESRCH, 0);
    return id;
}

static uint8_t *room_of(const struct shi_machine *m, uint64_t id)
{
    return m->base + m->task_offset + ((uint32_t)id - 1) * (uint64_t)SHI_TASK_ROOM;
}

/* Of the task itself, or before it is woken: what it is made of, or has returned. */
static int save(Machine *machine, uint64_t id, const void *data, Py_ssize_t length)
{
    const struct shi_machine *m = &machine->m;
    uint64_t w;
    struct shi_task *task = shi_task_find(m, id, &w);
    if (!task) {
        no_such(machine, -ESRCH, id);
        return -1;
    }
    if (length > (Py_ssize_t)SHI_TASK_ROOM) {
        shi_raise(shi_py.ArenaError, E2BIG, -1,
                  "what a task of the scheduler is made of, or returns, is at most %u bytes "
                  "pickled, not %zd: put large data in cluster.shared()",
                  SHI_TASK_ROOM, length);
        return -1;
    }
    int err = shi_machine_back(m, (uint64_t)(room_of(m, id) - m->base),
                               ((uint64_t)length + SHI_PAGE - 1) / SHI_PAGE * SHI_PAGE +
                                   (length ? 0 : SHI_PAGE));
    if (err) {
        shi_raise(shi_py.ArenaError, -err, -1, "there is no room for a task's pickle: %s",
                  strerror(-err));
        return -1;
    }
    memcpy(room_of(m, id), data, (size_t)length);
    shi_store_release(&task->length, (uint32_t)length);
    return 0;
}

/* sched_create(comm, flags, cpus or None, pickle) -> id: NEW. */
METHOD_FAST(sched_create)
{
    Py_buffer cpus = { 0 }, pickle;
    if (shi_use(machine) < 0)
        return NULL;
    if (nargs != 4) {
        PyErr_SetString(PyExc_TypeError, "sched_create");
        return NULL;
    }
    const char *comm = PyUnicode_AsUTF8(args[0]);
    unsigned long flags = comm ? PyLong_AsUnsignedLong(args[1]) : 0;
    if (PyErr_Occurred())
        return NULL;
    if (args[2] != Py_None && PyObject_GetBuffer(args[2], &cpus, PyBUF_SIMPLE) < 0)
        return NULL;
    if (PyObject_GetBuffer(args[3], &pickle, PyBUF_SIMPLE) < 0) {
        if (cpus.obj)
            PyBuffer_Release(&cpus);
        return NULL;
    }
    PyObject *result = NULL;
    int64_t id =
        shi_kthread_create(&machine->self, comm, -1, 0, -1, (uint32_t)flags | SHI_PF_PYTHON);
    if (id < 0) {
        shi_raise(shi_py.ArenaError, (int)-id, -1,
                  "the machine's task table is full: %u tasks, some perhaps ended and not "
                  "asked for their result",
                  machine->m.ntasks);
        goto out;
    }
    int err = save(machine, (uint64_t)id, pickle.buf, pickle.len);
    if (!err && cpus.obj) {
        err = (size_t)cpus.len != shi_affinity_words(machine->m.ncpus) * sizeof(uint64_t)
                  ? -EINVAL
                  : shi_set_cpus_allowed(&machine->self, (uint64_t)id, cpus.buf);
        if (err)
            shi_raise(shi_py.AffinityError, -err, -1,
                      "no CPU that is online is among those that the task may run on");
    }
    if (err)
        shi_task_release(&machine->self, (uint64_t)id);
    else
        result = PyLong_FromLongLong(id);
out:
    if (cpus.obj)
        PyBuffer_Release(&cpus);
    PyBuffer_Release(&pickle);
    return result;
}

static PyObject *wake(Machine *machine, uint64_t id, uint32_t states)
{
    struct shi_self *self = &machine->self;
    if (self->in_nmi)
        return shi_raise(shi_py.StateError, 0, (int)self->id,
                         "an NMI handler cannot wake a task: queue an irq_work that does");
    shi_say_call(machine, NULL);
    int rc = shi_try_to_wake_up(self, id, states);
    shi_call_said(machine);
    if (rc < 0)
        return no_such(machine, rc, id);
    if (!self->host && self->in_task)
        shi_preempt_check(machine);
    return PyBool_FromLong(rc);
}

/* sched_wake(id, states): True if it slept, or was new. */
METHOD_FAST(sched_wake)
{
    uint64_t id = id_arg(machine, args, nargs, 1);
    unsigned long states = id ? PyLong_AsUnsignedLong(args[1]) : 0;
    return !id || PyErr_Occurred() ? NULL : wake(machine, id, (uint32_t)states);
}

#define ASLEEP                                                                                 \
    (1u << SHI_TASK_NEW | 1u << SHI_TASK_INTERRUPTIBLE | 1u << SHI_TASK_UNINTERRUPTIBLE)

/* Of the module: a wake-up is an interrupt, and its caller's way to here is part of it. */
static PyObject *wake_up_process(PyObject *Py_UNUSED(module), PyObject *task)
{
    Machine *machine = shi_use_current();
    if (!machine)
        return NULL;
    PyObject *number = PyLong_Check(task) ? Py_NewRef(task)
                                          : PyObject_GetAttrString(task, "id");
    uint64_t id = number ? id_arg(machine, &number, 1, 0) : 0;
    Py_XDECREF(number);
    return id ? wake(machine, id, ASLEEP) : NULL;
}

METHOD_FAST(sched_stop)
{
    uint64_t id = id_arg(machine, args, nargs, 0);
    int rc = id ? shi_kthread_stop(&machine->self, id) : 0;
    if (!id)
        return NULL;
    return rc < 0 ? no_such(machine, rc, id) : Py_NewRef(Py_None);
}

METHOD_FAST(sched_release)
{
    uint64_t id = id_arg(machine, args, nargs, 0);
    int rc = id ? shi_task_release(&machine->self, id) : 0;
    if (!id)
        return NULL;
    if (rc == -EBUSY)
        return shi_raise(shi_py.StateError, 0, -1, "the task has not ended");
    return rc < 0 ? no_such(machine, rc, id) : Py_NewRef(Py_None);
}

static PyObject *describe(const struct shi_machine *m, const struct shi_task *task, uint64_t id,
                          uint64_t w)
{
    char comm[SHI_COMM + 1] = { 0 };
    memcpy(comm, task->comm, SHI_COMM);
    return Py_BuildValue("KIKIIsKKKKK", (unsigned long long)id, (unsigned)shi_tw_state(w),
                         (unsigned long long)(w & 0x3ff0), (unsigned)shi_tw_cpu(w),
                         (unsigned)task->flags, comm,
                         (unsigned long long)shi_load_relaxed(&task->runtime_ns),
                         (unsigned long long)shi_load_relaxed(&task->wakeups),
                         (unsigned long long)shi_load_relaxed(&task->switches),
                         (unsigned long long)shi_load_relaxed(&task->migrations),
                         (unsigned long long)(m->ncpus));
}

/* sched_task(id) -> (id, state, word's flags, cpu, flags, comm, runtime, wakeups, ...) */
METHOD_FAST(sched_task)
{
    uint64_t id = id_arg(machine, args, nargs, 0), w;
    if (!id)
        return NULL;
    const struct shi_task *task = shi_task_find(&machine->m, id, &w);
    return task ? describe(&machine->m, task, id, w) : no_such(machine, -ESRCH, id);
}

static PyObject *sched_list(Machine *machine, PyObject *Py_UNUSED(unused))
{
    const struct shi_machine *m = &machine->m;
    if (shi_use(machine) < 0)
        return NULL;
    PyObject *list = PyList_New(0);
    uint32_t i, top = shi_load_acquire(&shi_sched(m)->top);
    for (i = 0; list && i < top && i < m->ntasks; i++) {
        const struct shi_task *task = shi_task(m, i);
        uint64_t w = shi_load_acquire(&task->word);
        if (shi_tw_state(w) <= SHI_TASK_CLAIMED)
            continue;
        PyObject *one = describe(m, task, shi_task_id(i, w), w);
        if (!one || PyList_Append(list, one) < 0)
            Py_CLEAR(list);
        Py_XDECREF(one);
    }
    return list;
}

METHOD_FAST(sched_load)
{
    uint64_t id = id_arg(machine, args, nargs, 0), w;
    if (!id)
        return NULL;
    const struct shi_task *task = shi_task_find(&machine->m, id, &w);
    if (!task)
        return no_such(machine, -ESRCH, id);
    uint32_t length = shi_load_acquire(&task->length);
    if (!(task->flags & SHI_PF_PYTHON) || length > SHI_TASK_ROOM)
        return shi_raise(shi_py.LayoutError, 0, -1, "a task's entry is damaged");
    return PyBytes_FromStringAndSize((const char *)room_of(&machine->m, id), length);
}

/* sched_save(id, pickle, raised): of the task whose step runs here. */
METHOD_FAST(sched_save)
{
    Py_buffer pickle;
    uint64_t id = id_arg(machine, args, nargs, 2), w;
    int raised = id ? PyObject_IsTrue(args[2]) : -1;
    if (raised < 0 || PyObject_GetBuffer(args[1], &pickle, PyBUF_SIMPLE) < 0)
        return NULL;
    int err = save(machine, id, pickle.buf, pickle.len);
    PyBuffer_Release(&pickle);
    if (err)
        return NULL;
    struct shi_task *task = shi_task_find(&machine->m, id, &w);
    while (raised && task && !shi_cas_full(&task->word, &w, w | SHI_TW_RAISED))
        ;
    Py_RETURN_NONE;
}

/* sched_pin(id): what it has begun is in this process from now on (migrate_disable). */
METHOD_FAST(sched_pin)
{
    uint64_t id = id_arg(machine, args, nargs, 0), w;
    struct shi_task *task = id ? shi_task_find(&machine->m, id, &w) : NULL;
    if (!id)
        return NULL;
    if (!task)
        return no_such(machine, -ESRCH, id);
    while (!shi_cas_full(&task->word, &w, w | SHI_TW_PINNED))
        ;
    Py_RETURN_NONE;
}

static PyObject *sched_current(Machine *machine, PyObject *Py_UNUSED(unused))
{
    if (shi_use(machine) < 0)
        return NULL;
    bool task = !machine->self.host && !machine->self.in_irq && !machine->self.in_nmi;
    return PyLong_FromUnsignedLongLong(task ? shi_current_task(&machine->self) : 0);
}

/* The task whose step runs here; 0 and an exception. */
static uint64_t current(Machine *machine)
{
    uint64_t id = shi_use(machine) < 0 ? 0 : shi_current_task(&machine->self);
    if (!PyErr_Occurred() && (!id || machine->self.in_irq || machine->self.in_nmi)) {
        shi_raise(shi_py.StateError, 0, -1,
                  "this is for a task of the scheduler, and what runs here is none");
        return 0;
    }
    return PyErr_Occurred() ? 0 : id;
}

static PyObject *set_state(Machine *machine, PyObject *arg)
{
    uint64_t id = current(machine);
    long state = id ? PyLong_AsLong(arg) : -1;
    if (!id || PyErr_Occurred())
        return NULL;
    if (state < SHI_TASK_RUNNING || state > SHI_TASK_UNINTERRUPTIBLE) {
        PyErr_SetString(PyExc_ValueError, "a task sets TASK_RUNNING, TASK_INTERRUPTIBLE or "
                                          "TASK_UNINTERRUPTIBLE of itself");
        return NULL;
    }
    shi_set_current_state(&machine->self, id, (enum shi_task_state)state);
    Py_RETURN_NONE;
}

METHOD(sched_set_state)
{
    return set_state(MACHINE(object), arg);
}

static PyObject *set_current_state(PyObject *Py_UNUSED(module), PyObject *state)
{
    Machine *machine = shi_use_current();
    return machine ? set_state(machine, state) : NULL;
}

METHOD(sched_timeout)
{
    Machine *machine = MACHINE(object);
    uint64_t id = current(machine), deadline;
    if (!id || shi_as_deadline(arg, &deadline) < 0)
        return NULL;
    shi_schedule_timeout(&machine->self, id, deadline);
    Py_RETURN_NONE;
}

static PyObject *kthread_should_stop(PyObject *Py_UNUSED(module), PyObject *Py_UNUSED(unused))
{
    Machine *machine = shi_use_current();
    uint64_t id = machine ? current(machine) : 0;
    return id ? PyBool_FromLong(shi_kthread_should_stop(&machine->self, id)) : NULL;
}

METHOD_FAST(sched_allow)
{
    Py_buffer cpus;
    uint64_t id = id_arg(machine, args, nargs, 1);
    if (!id || PyObject_GetBuffer(args[1], &cpus, PyBUF_SIMPLE) < 0)
        return NULL;
    int err = (size_t)cpus.len == shi_affinity_words(machine->m.ncpus) * sizeof(uint64_t)
                  ? shi_set_cpus_allowed(&machine->self, id, cpus.buf)
                  : -EINVAL;
    PyBuffer_Release(&cpus);
    if (err == -ESRCH)
        return no_such(machine, err, id);
    if (err == -EBUSY)
        return shi_raise(shi_py.AffinityError, EBUSY, -1,
                         "a generator that has begun stays on its CPU (migrate_disable), and "
                         "that is not among these; a picklable iterator can move");
    if (err)
        return shi_raise(shi_py.AffinityError, -err, -1,
                         "no CPU that is online is among these, or the task is a kernel "
                         "thread of one CPU");
    if (!machine->self.host && machine->self.in_task)
        shi_preempt_check(machine);
    Py_RETURN_NONE;
}

METHOD_FAST(sched_allowed)
{
    uint64_t id = id_arg(machine, args, nargs, 0), w;
    if (!id)
        return NULL;
    const struct shi_task *task = shi_task_find(&machine->m, id, &w);
    if (!task)
        return no_such(machine, -ESRCH, id);
    return PyBytes_FromStringAndSize(
        (const char *)task->allowed,
        (Py_ssize_t)(shi_affinity_words(machine->m.ncpus) * sizeof(uint64_t)));
}

static int cpu_of(Machine *machine, PyObject *object, uint32_t *cpu)
{
    int64_t number;
    if (shi_use(machine) < 0 || shi_as_cpu(object, &number) < 0)
        return -1;
    if (number < 0 || number >= machine->m.ncpus) {
        shi_raise_errno(machine, -ENXIO, (int)number);
        return -1;
    }
    *cpu = (uint32_t)number;
    return 0;
}

/* sched_rq(cpu) -> (queued, curr, active, ttwu_pending, wakelist, batches, switches, pulled,
 * tick, llc, idle, polling) */
METHOD(sched_rq)
{
    const struct shi_machine *m = &MACHINE(object)->m;
    uint32_t cpu;
    if (cpu_of(MACHINE(object), arg, &cpu) < 0)
        return NULL;
    const struct shi_rq *rq = shi_rq(m, cpu);
    return Py_BuildValue(
        "IIIIIIKIIIOO", shi_load_relaxed(&rq->queued), shi_load_relaxed(&rq->curr),
        (unsigned)shi_cpu_active(m, cpu), shi_load_relaxed(&rq->ttwu_pending),
        shi_load_relaxed(&rq->wakelist), shi_load_relaxed(&rq->batches),
        (unsigned long long)shi_load_relaxed(&rq->switches), shi_load_relaxed(&rq->pulled),
        shi_load_relaxed(&shi_slot(m, cpu)->tick), shi_load_relaxed(&rq->llc),
        shi_idle_cpu(m, cpu) ? Py_True : Py_False,
        shi_word_state(shi_load_acquire(&shi_slot(m, cpu)->word)) == SHI_POLLING ? Py_True
                                                                                 : Py_False);
}

/* sched_llc(cpu, id): whom it shares a cache with (sd_llc_id). */
METHOD(sched_llc)
{
    unsigned cpu, llc;
    if (!PyArg_ParseTuple(arg, "II", &cpu, &llc))
        return NULL;
    if (cpu >= MACHINE(object)->m.ncpus)
        return shi_raise_errno(MACHINE(object), -ENXIO, (int)cpu);
    shi_store_relaxed(&shi_rq(&MACHINE(object)->m, cpu)->llc, llc);
    Py_RETURN_NONE;
}

/* set_tsk_need_resched(cpu, on): the flag of what runs there, and nothing else. */
METHOD(set_tsk_need_resched)
{
    Machine *machine = MACHINE(object);
    PyObject *number;
    uint32_t cpu;
    int on;
    if (!PyArg_ParseTuple(arg, "Op", &number, &on) || cpu_of(machine, number, &cpu) < 0)
        return NULL;
    shi_a64 *word = &shi_slot(&machine->m, cpu)->word;
    if (on)
        shi_fetch_or_full(word, SHI_W_NEED_RESCHED);
    else
        shi_fetch_and_full(word, ~(SHI_W_NEED_RESCHED | SHI_W_LAZY));
    Py_RETURN_NONE;
}

METHOD(tsk_need_resched)
{
    uint32_t cpu;
    if (cpu_of(MACHINE(object), arg, &cpu) < 0)
        return NULL;
    uint64_t w = shi_load_acquire(&shi_slot(&MACHINE(object)->m, cpu)->word);
    return Py_BuildValue("OO", w & SHI_W_NEED_RESCHED ? Py_True : Py_False,
                         w & SHI_W_LAZY ? Py_True : Py_False);
}

/* resched_curr(cpu, lazy) */
METHOD(resched_curr)
{
    Machine *machine = MACHINE(object);
    PyObject *number;
    uint32_t cpu;
    int lazy;
    if (!PyArg_ParseTuple(arg, "Op", &number, &lazy) || cpu_of(machine, number, &cpu) < 0)
        return NULL;
    shi_enter(&machine->self);
    shi_resched_curr(&machine->self, cpu, lazy);
    shi_leave(&machine->self);
    Py_RETURN_NONE;
}

/* sched_unmixed(+1 or -1): around pickling in Python. */
METHOD(sched_unmixed)
{
    long by = PyLong_AsLong(arg);
    if (PyErr_Occurred())
        return NULL;
    MACHINE(object)->pickling += (uint32_t)(by < 0 ? -1 : 1);
    Py_RETURN_NONE;
}

#define ENTRY(name, text) { #name, FAST(name), METH_FASTCALL, text }
PyMethodDef shi_sched_methods[] = {
    ENTRY(sched_create, "sched_create(comm, flags, cpus, pickle) -> id"),
    ENTRY(sched_wake, "sched_wake(id, states) -> bool: did it sleep?"),
    ENTRY(sched_stop, "sched_stop(id): ask it to end"),
    ENTRY(sched_release, "sched_release(id): nobody asks for it any more"),
    ENTRY(sched_task, "sched_task(id) -> what is known of it"),
    { "sched_list", FAST(sched_list), METH_NOARGS, "sched_list() -> the same of all" },
    ENTRY(sched_load, "sched_load(id) -> bytes"),
    ENTRY(sched_save, "sched_save(id, pickle, raised)"),
    ENTRY(sched_pin, "sched_pin(id): it stays on its CPU"),
    ENTRY(sched_allow, "sched_allow(id, cpus)"),
    ENTRY(sched_allowed, "sched_allowed(id) -> cpus"),
    { "sched_current", FAST(sched_current), METH_NOARGS, "sched_current() -> id, 0: none" },
    ONE(sched_unmixed, "sched_unmixed(by): no task comes on top of what pickles"),
    ONE(sched_set_state, "sched_set_state(state): of the current task"),
    ONE(sched_timeout, "sched_timeout(seconds): wake the current task then"),
    ONE(sched_rq, "sched_rq(cpu) -> what its run queue says"),
    MANY(sched_llc, "sched_llc(cpu, id): whom it shares a cache with"),
    MANY(set_tsk_need_resched, "set_tsk_need_resched(cpu, on)"),
    ONE(tsk_need_resched, "tsk_need_resched(cpu) -> (NEED_RESCHED, lazily)"),
    MANY(resched_curr, "resched_curr(cpu, lazy)"),
    { NULL, NULL, 0, NULL },
};

PyMethodDef shi_sched_functions[] = {
    { "wake_up_process", wake_up_process, METH_O,
      "wake_up_process(task, /)\n--\n\n"
      "Wake a task: True if it slept, or was about to, or was new.\n\nNoTaskError (ESRCH) for "
      "one that has ended, or never was.  For tasks, the host and\nhandlers, but not for "
      "NMIs." },
    { "set_current_state", set_current_state, METH_O,
      "set_current_state(state, /)\n--\n\n"
      "Set the state of the current task, with a full barrier: then look, then yield.\n\n"
      "Whoever makes true what it looks for, and wakes it then, is seen by the look, or\nsees "
      "the state: no wake-up is lost.  ClusterStateError outside of a task." },
    { "kthread_should_stop", kthread_should_stop, METH_NOARGS,
      "kthread_should_stop()\n--\n\nHas kthread_stop() asked the current task to end?" },
    { NULL, NULL, 0, NULL },
};
