/* SPDX-License-Identifier: MIT */
/* Tasks that wait: for an interrupt (hlt), and in the wait queues of shmipi/smp/waitqueue.py. */
#include "py/base.h"

#include <errno.h>

#include "base/clock.h"
#include "base/event.h"
#include "irq/remind.h"
#include "smp/idle.h"
#include "smp/irq_work.h"
#include "smp/sched.h"
#include "smp/waitq.h"
#include "py/entry.h"
#include "py/signals.h"
#include "py/sched.h"
#include "py/tables.h"
#include "py/wait.h"

/* ---- a CPU whose task waits is idle ---------------------------------------------- */

/* May this context sleep?  (the kernel's might_sleep)  0, or -1. */
static int may_sleep(const Machine *machine, bool irqs_off)
{
    const struct shi_self *self = &machine->self;
    const char *why = self->in_nmi                   ? "an NMI handler"
                      : self->in_irq                 ? "an IPI handler"
                      : shi_in_serving_softirq(self) ? "a softirq"
                      : !self->in_task               ? "a CPU that runs no task"
                      : irqs_off                     ? NULL
                      : self->irqs_off               ? "a task that has interrupts disabled"
                      : self->softirq                ? "a task that has softirqs disabled"
                      : self->preempt                ? "a task that has preemption disabled"
                                                     : NULL;
    if (self->host || !why)
        return 0;
    shi_raise(shi_py.StateError, 0, (int)self->id,
              "%s cannot wait: it would hold up what it waits for", why);
    return -1;
}

struct idling {
    uint8_t irqs_off;
    bool inlined;
    uint32_t served; /* self->served when it began */
};

/* Polling, and interrupts on: from here on nothing is taken behind the waiter's back. */
static struct idling begin(struct shi_self *self)
{
    struct idling was = { self->irqs_off, self->inline_python, self->served };
    /* What comes from here on comes to an idle CPU, in lazy TLB mode. */
    if (self->has_mm)
        self->m->mm_idle(self, SHI_MM_SLEEPS);
    self->pausing = true;
    shi_set_polling(self);
    if (!shi_irq_work_waits(self))
        shi_remind_stop(
            self); /* what waits is taken now, and the sleep is not to be disturbed */
    self->irqs_off = 0;
    shi_signal_fence();
    return was;
}

/* -1, with an exception, in a child that a signal's handler has forked: it is no CPU. */
static int is_here(Machine *machine)
{
    if (__builtin_expect(!machine->self.left, 1))
        return 0;
    shi_raise_errno(machine, -ESHUTDOWN, (int)machine->self.id);
    return -1;
}

/* Take what is there, Python included.  0, or -1 with an exception for the task. */
static int take(Machine *machine)
{
    struct shi_self *self = &machine->self;
    /* First: handlers of the task's own signals may leave the CPU RUNNING. */
    if (PyErr_CheckSignals() < 0 || is_here(machine) < 0)
        return -1;
    self->served += shi_python_waits(self); /* taken by a kick, its handler not run yet */
    shi_wait_settle(machine);
    self->in_core++;
    shi_service(self);
    self->in_core--;
    shi_take_back(machine, NULL);
    if (self->happened)
        shi_leave_slow(self);
    shi_wait_python(machine);
    if (shi_load_acquire(&machine->m.header->machine_state) >= SHI_M_STOPPING) {
        shi_raise_errno(machine, -EOWNERDEAD, (int)self->id);
        return -1;
    }
    /* The task's, that came during a handler. */
    if (shi_signals_check(machine) < 0 || is_here(machine) < 0)
        return -1;
    return shi_task_interrupt(machine); /* cancelled? */
}

/* As before, and RUNNING.  What came since the last look stays pending if interrupts are off
 * again. */
static void end(Machine *machine, struct idling was)
{
    struct shi_self *self = &machine->self;
    self->pausing = false;
    self->inline_python = was.inlined;
    self->irqs_off = was.irqs_off;
    if (self->left)
        return; /* the state is another's */
    shi_signal_fence();
    shi_set_running(self);
    if (self->has_mm)
        self->m->mm_idle(self, SHI_MM_WAKES);
    shi_take_deferred(machine);
}

/* schedule(), before a task halts: whom an interrupt has woken, or who waited before. */
static void let_run(Machine *machine, struct idling *was)
{
    struct shi_self *self = &machine->self;
    uint32_t served = was->served;
    if (was->irqs_off || !shi_sched_work(self))
        return;
    end(machine, *was);
    shi_let_others_run(machine);
    *was = begin(self);
    was->served = served;
}

#define SIGNALS_NS 500000000u /* the longest sleep between two looks for signals */

/* wait_for_interrupt(timeout=None) */
static PyObject *wait_for_interrupt(PyObject *module, PyObject *const *args, Py_ssize_t nargs,
                                    PyObject *kwnames)
{
    static const char *const names[] = { "timeout" };
    PyObject *timeout;
    uint64_t deadline;
    (void)module;
    Machine *machine = shi_use_cpu(SHI_ONLY_CPU);
    if (!machine)
        return NULL;
    struct shi_self *self = &machine->self;
    if (shi_parse("wait_for_interrupt", names, 0, 1, args, nargs, kwnames, &timeout) < 0 ||
        shi_as_deadline(timeout ? timeout : Py_None, &deadline) < 0 ||
        may_sleep(machine, true) < 0)
        return NULL;
    struct idling was = begin(self);
    int err;
    while (!(err = take(machine)) && self->served == was.served &&
           !(deadline && shi_now_ns() >= deadline)) {
        /* A signal that came since take() looked interrupts no sleep: look again then. */
        uint64_t look = shi_now_ns() + SIGNALS_NS;
        let_run(machine, &was);
        shi_idle_in_task(self, NULL, NULL, deadline && deadline < look ? deadline : look);
        shi_take_back(machine, NULL);
    }
    bool came = self->served != was.served;
    end(machine, was);
    return err ? NULL : PyBool_FromLong(came);
}

/* idle_until(until_ns, state) */
static PyObject *idle_until(PyObject *module, PyObject *const *args, Py_ssize_t nargs)
{
    (void)module;
    Machine *machine = shi_use_cpu(SHI_ONLY_CPU);
    if (!machine)
        return NULL;
    struct shi_self *self = &machine->self;
    if (nargs != 2) {
        PyErr_SetString(PyExc_TypeError, "idle_until(until_ns, state)");
        return NULL;
    }
    unsigned long long until = PyLong_AsUnsignedLongLong(args[0]);
    long state = PyErr_Occurred() ? -1 : PyLong_AsLong(args[1]);
    if (PyErr_Occurred())
        return NULL;
    if (state != SHI_RUNNING && state != SHI_POLLING && state != SHI_HALTED) {
        PyErr_SetString(PyExc_ValueError, "a CPU waits RUNNING, POLLING or HALTED");
        return NULL;
    }
    if (may_sleep(machine, false) < 0)
        return NULL;
    uint32_t served = self->served;
    if (state == SHI_RUNNING) {
        shi_run_until(self, until, NULL);
        /* Python's handlers, and the exception of a task that is cancelled. */
        if (PyErr_CheckSignals() < 0 || is_here(machine) < 0 || shi_task_interrupt(machine) < 0)
            return NULL;
        return PyBool_FromLong(self->served != served);
    }
    struct idling was = begin(self);
    int err;
    while (!(err = take(machine)) && self->served == was.served && shi_now_ns() < until) {
        shi_idle_until(self, (enum shi_state)state, until);
        shi_take_back(machine, NULL);
    }
    bool came = self->served != was.served;
    end(machine, was);
    return err ? NULL : PyBool_FromLong(came);
}

/* ---- wait queues ----------------------------------------------------------------- */

/* Where a queue is, checked: whoever may write the segment may have moved its description. */
static struct shi_waitq *queue_at(Machine *machine, PyObject *object)
{
    uint64_t at = PyLong_AsUnsignedLongLong(object);
    uint64_t bytes = shi_waitq_words(&machine->m) * sizeof(uint64_t);
    if (PyErr_Occurred())
        return NULL;
    uint64_t last = shi_array_end(&machine->m);
    if (at % sizeof(uint64_t) || at < machine->m.array_offset || at > last ||
        last - at < bytes) {
        PyErr_SetString(PyExc_ValueError, "no wait queue can be there");
        return NULL;
    }
    return (struct shi_waitq *)(machine->m.base + at);
}

/* Arguments of a method: the queue, and `n` more.  NULL with an exception. */
static struct shi_waitq *queue_arg(Machine *machine, PyObject *const *args, Py_ssize_t nargs,
                                   Py_ssize_t n)
{
    if (shi_use(machine) < 0)
        return NULL;
    if (nargs != n + 1) {
        PyErr_Format(PyExc_TypeError, "a queue and %zd more arguments", n);
        return NULL;
    }
    return queue_at(machine, args[0]);
}

#define METHOD_FAST(name)                                                                      \
    static PyObject *name(Machine *machine, PyObject *const *args, Py_ssize_t nargs)

METHOD_FAST(waitq_prepare)
{
    struct shi_waitq *q = queue_arg(machine, args, nargs, 2);
    uint64_t ticket = q ? PyLong_AsUnsignedLongLong(args[1]) : 0;
    int exclusive = q && !PyErr_Occurred() ? PyObject_IsTrue(args[2]) : -1;
    if (exclusive < 0 || may_sleep(machine, false) < 0)
        return NULL;
    ticket = shi_waitq_prepare(&machine->self, q, ticket, exclusive);
    shi_fence_full(); /* the condition may be plain loads (set_current_state's smp_store_mb) */
    return PyLong_FromUnsignedLongLong(ticket);
}

struct standing {
    const struct shi_self *self;
    const struct shi_waitq *q;
    uint64_t ticket;
};

static bool gone(const void *arg)
{
    const struct standing *s = arg;
    return !shi_waitq_stands(s->self, s->q, s->ticket);
}

static int sleep_host(Machine *machine, const struct standing *s, uint64_t until)
{
    struct shi_self *self = &machine->self;
    uint32_t seen = shi_load_full(&self->slot->event);
    uint64_t now = shi_now_ns();
    if (self->leaving || shi_ended(self)) {
        shi_raise_errno(machine, self->leaving ? -ESHUTDOWN : -EOWNERDEAD, -1);
        return -1;
    }
    /* The count was read before: a wake-up since has changed it. */
    if (!gone(s) && now < until) {
        PyThreadState *mine = shi_give_up(machine);
        shi_event_wait(&self->slot->event, seen, (int64_t)(until - now));
        shi_take_back(machine, mine);
    }
    return PyErr_CheckSignals();
}

static int sleep_cpu(Machine *machine, const struct standing *s, uint64_t until)
{
    struct shi_self *self = &machine->self;
    shi_let_others_run(machine); /* schedule() */
    struct idling was = begin(self);
    int err = take(machine);
    /* Any interrupt ends it, or a CPU that comes back from being offline: the condition may
     * have changed without a wake-up. */
    if (!err && self->served == was.served && !gone(s)) {
        shi_idle_in_task(self, gone, s, until);
        shi_take_back(machine, NULL);
        err = take(machine);
    }
    end(machine, was);
    return err;
}

/* waitq_sleep(queue, ticket, seconds): until woken, or for a little: look again then. */
METHOD_FAST(waitq_sleep)
{
    struct shi_waitq *q = queue_arg(machine, args, nargs, 2);
    struct standing s = { &machine->self, q, q ? PyLong_AsUnsignedLongLong(args[1]) : 0 };
    uint64_t until;
    if (!q || PyErr_Occurred() || shi_as_deadline(args[2], &until) < 0 ||
        may_sleep(machine, false) < 0)
        return NULL;
    if (!until)
        until = UINT64_MAX >> 1;
    if ((machine->self.host ? sleep_host : sleep_cpu)(machine, &s, until) < 0)
        return NULL;
    Py_RETURN_NONE;
}

/* waitq_finish(queue, ticket, exclusive): also of a machine that was closed meanwhile. */
METHOD_FAST(waitq_finish)
{
    if (shi_gone(machine))
        Py_RETURN_NONE;
    struct shi_waitq *q = queue_arg(machine, args, nargs, 2);
    uint64_t ticket = q ? PyLong_AsUnsignedLongLong(args[1]) : 0;
    int exclusive = q && !PyErr_Occurred() ? PyObject_IsTrue(args[2]) : -1;
    if (exclusive < 0)
        return NULL;
    /* A wake-up that came after its last look was for any one who waits: this one gives up,
     * or found its condition true before, by what another was woken for.  (The kernel takes
     * a completion under the queue's lock: nothing comes in between.) */
    if (shi_waitq_finish(&machine->self, q, ticket) && exclusive) {
        shi_fence_full(); /* as in waitq_wake */
        shi_waitq_wake(&machine->self, q, 1);
    }
    Py_RETURN_NONE;
}

METHOD_FAST(waitq_wake)
{
    struct shi_waitq *q = queue_arg(machine, args, nargs, 1);
    unsigned long nr = q ? PyLong_AsUnsignedLong(args[1]) : 0;
    if (!q || PyErr_Occurred())
        return NULL;
    shi_fence_full(); /* what the condition looks at may have been a plain store */
    nr = shi_waitq_wake(&machine->self, q, nr < SHI_WAKE_ALL ? (uint32_t)nr : SHI_WAKE_ALL);
    return PyLong_FromUnsignedLong(nr);
}

METHOD_FAST(waitq_active)
{
    struct shi_waitq *q = queue_arg(machine, args, nargs, 0);
    if (!q)
        return NULL;
    shi_fence_full();
    return PyBool_FromLong(shi_waitq_active(&machine->self, q));
}

METHOD_FAST(complete)
{
    struct shi_waitq *q = queue_arg(machine, args, nargs, 1);
    int all = q ? PyObject_IsTrue(args[1]) : -1;
    if (all < 0)
        return NULL;
    shi_complete(&machine->self, q, all);
    Py_RETURN_NONE;
}

METHOD_FAST(completion_take)
{
    struct shi_waitq *q = queue_arg(machine, args, nargs, 0);
    return q ? PyBool_FromLong(shi_completion_take(q)) : NULL;
}

METHOD_FAST(completion_count)
{
    struct shi_waitq *q = queue_arg(machine, args, nargs, 0);
    return q ? PyLong_FromUnsignedLongLong(shi_load_full(&q->done)) : NULL;
}

METHOD_FAST(completion_reinit)
{
    struct shi_waitq *q = queue_arg(machine, args, nargs, 0);
    if (!q)
        return NULL;
    shi_store_full(&q->done, 0);
    Py_RETURN_NONE;
}

static PyObject *waitq_words(Machine *machine, PyObject *unused)
{
    (void)unused;
    return shi_use(machine) < 0 ? NULL
                                : PyLong_FromUnsignedLongLong(shi_waitq_words(&machine->m));
}

static PyObject *might_sleep(Machine *machine, PyObject *unused)
{
    (void)unused;
    if (shi_use(machine) < 0 || may_sleep(machine, false) < 0)
        return NULL;
    Py_RETURN_NONE;
}

#define ENTRY(name, text) { #name, FAST(name), METH_FASTCALL, text }
PyMethodDef shi_waitq_methods[] = {
    { "waitq_words", (PyCFunction)waitq_words, METH_NOARGS, "64-bit words of a wait queue." },
    { "might_sleep", (PyCFunction)might_sleep, METH_NOARGS,
      "ClusterStateError where a wait would be wrong." },
    ENTRY(waitq_prepare, "waitq_prepare(queue, ticket, exclusive) -> ticket"),
    ENTRY(waitq_sleep, "waitq_sleep(queue, ticket, seconds): once, also for nothing"),
    ENTRY(waitq_finish, "waitq_finish(queue, ticket, exclusive): pass on what came too late"),
    ENTRY(waitq_wake, "waitq_wake(queue, nr) -> how many"),
    ENTRY(waitq_active, "waitq_active(queue) -> bool"),
    ENTRY(complete, "complete(queue, all)"),
    ENTRY(completion_take, "completion_take(queue) -> bool"),
    ENTRY(completion_count, "completion_count(queue) -> how often it can be taken"),
    ENTRY(completion_reinit, "completion_reinit(queue)"),
    { NULL, NULL, 0, NULL },
};

PyMethodDef shi_waitq_functions[] = {
    { "wait_for_interrupt", (PyCFunction)(void (*)(void))wait_for_interrupt,
      METH_FASTCALL | METH_KEYWORDS,
      "wait_for_interrupt($module, /, timeout=None)\n--\n\n"
      "Halt this CPU until it has taken an interrupt (hlt): True, or False after `timeout`\n"
      "seconds.\n\n"
      "For tasks.  Handlers run at once, as on an idle CPU.  With interrupts disabled it is\n"
      "sti; hlt; cli in one: it enables them for as long as it halts, and one that has come\n"
      "before makes it return at once.  So no wake-up is lost in::\n\n"
      "    smp.local_irq_disable()\n"
      "    while not condition():\n"
      "        smp.wait_for_interrupt()\n"
      "    smp.local_irq_enable()\n\n"
      "With interrupts enabled, one that comes between a look at a condition and the halt is\n"
      "not waited for again.  Raises ClusterStateError in a handler and on the host,\n"
      "MachineDiedError when the machine ends." },
    { "idle_until", (PyCFunction)(void (*)(void))idle_until, METH_FASTCALL,
      "idle_until(until_ns, state, /)\n--\n\n"
      "Timed idle: wait HALTED (on the doorbell), POLLING or RUNNING until CLOCK_MONOTONIC is\n"
      "`until_ns`, or an interrupt was taken: True, or False when it is time.  For tasks, "
      "with\n"
      "interrupts enabled.  Raises as wait_for_interrupt." },
    { NULL, NULL, 0, NULL },
};
