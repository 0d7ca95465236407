/* SPDX-License-Identifier: MIT */
/* Who calls the stopper: stop_one_cpu, and multi_cpu_stop over several (smp/stop.h). */
#include "py/base.h"

#include <errno.h>

#include "base/clock.h"
#include "base/native.h"
#include "base/step.h"
#include "smp/stop.h"
#include "py/csd.h"
#include "py/entry.h"
#include "py/outgoing.h"
#include "py/result.h"
#include "py/tables.h"
#include "py/wait.h"

#define LOCK_NAP_NS 100000
#define GRACE_NS 20000000u /* those that give it up unlock their csds */
#define LEAVE_NS 500000000u
#define NAMED 8u /* CPUs that an error names */

struct stopping {
    uint32_t *cpus, *locals; /* ascending; UINT32_MAX: none (any more) */
    uint8_t *active;
    uint32_t n, nactive;
    uint64_t began, deadline;
    bool queued;
};

static uint8_t late_state(uint32_t word)
{
    return (uint8_t)((word & 0xf) > SHI_MS_EXIT ? word >> 4 & 0xf : word & 0xf);
}

/* ---- errors -------------------------------------------------------------------------- */

static PyObject *names_of(const Machine *machine, const struct stopping *s, uint32_t *first,
                          bool active)
{
    char text[NAMED * 8 + 8];
    size_t at = 0;
    uint32_t i, named = 0;
    text[0] = 0;
    for (i = 0; i < s->n; i++) {
        if ((active && !s->active[i]) || !shi_multi_is_late(&machine->self, s->cpus[i]))
            continue;
        if (!named)
            *first = s->cpus[i];
        if (named++ < NAMED)
            at += (size_t)snprintf(text + at, sizeof text - at, "%s%u", at ? ", " : "",
                                   s->cpus[i]);
        else
            snprintf(text + at, sizeof text - at, " ...");
    }
    return PyUnicode_FromFormat("CPU%s %s", named > 1 ? "s" : "", named ? text : "?");
}

static void raise_late(Machine *machine, const struct stopping *s, uint32_t word)
{
    bool runs = late_state(word) >= SHI_MS_RUN;
    uint32_t cpu = UINT32_MAX;
    PyObject *names = names_of(machine, s, &cpu, runs);
    long ms = (long)((shi_now_ns() - s->began) / 1000000);
    if (names)
        shi_raise(shi_py.TimeoutError, ETIMEDOUT, (int)cpu,
                  runs
                      ? "%U ran the function for more than %ld ms: the others go on, and what "
                        "it protects may be torn"
                      : "%U did not stop in %ld ms: is it stopped itself (SIGSTOP), or running "
                        "with interrupts disabled, or preemption, or (kick=False) without "
                        "cond_resched()?  The function has not run",
                  names, ms);
    Py_XDECREF(names);
}

static void raise_dead(const struct stopping *s, Machine *machine, uint32_t word)
{
    bool runs = late_state(word) >= SHI_MS_RUN;
    uint32_t i;
    for (i = 0; i < s->n; i++) {
        uint64_t w = shi_load_acquire(&shi_slot(&machine->m, s->cpus[i])->word);
        if (shi_word_state(w) == SHI_DEAD)
            break;
    }
    int cpu = i < s->n ? (int)s->cpus[i] : -1;
    shi_raise(shi_py.DiedError, EOWNERDEAD, cpu,
              runs ? "CPU %d died while it ran the function: it may be half done"
                   : "CPU %d died before all had stopped: the function has not run",
              cpu);
}

static void raise_given_up(Machine *machine, const struct stopping *s, uint32_t word)
{
    switch (word & 0xf) {
    case SHI_MS_DIED:
        raise_dead(s, machine, word);
        break;
    case SHI_MS_GONE:
        shi_raise(shi_py.OfflineError, ENOENT, -1,
                  "a CPU went offline before all had stopped: the function has not run");
        break;
    default:
        raise_late(machine, s, word);
        break;
    }
}

/* ---- queueing ------------------------------------------------------------------------- */

/* Nobody waits for `i` any more. */
static void give_up(Machine *machine, struct stopping *s, uint32_t i)
{
    shi_drop_early(machine, s->locals[i]);
    shi_leave_behind(machine, s->locals[i]);
    s->locals[i] = UINT32_MAX;
}

static void abandon_all(Machine *machine, struct stopping *s)
{
    uint32_t i;
    for (i = 0; i < s->n; i++) {
        if (s->locals[i] == UINT32_MAX)
            continue;
        if (s->queued) {
            give_up(machine, s, i);
        } else {
            shi_enter(&machine->self);
            shi_csd_put(&machine->self, s->locals[i]);
            shi_leave(&machine->self);
        }
        s->locals[i] = UINT32_MAX;
    }
}

/* A csd for each, filled.  0, or -1 with an exception. */
static int fill(Machine *machine, struct stopping *s, const struct outgoing *out)
{
    const struct outgoing noop = { .call = { .func = SHI_FUNC_NATIVE } };
    uint32_t i;
    for (i = 0; i < s->n; i++) {
        int64_t local = shi_outgoing_prepare(machine, s->active[i] ? out : &noop);
        if (local < 0)
            return -1;
        s->locals[i] = (uint32_t)local;
    }
    return 0;
}

/* Is it too late?  With an exception then. */
static bool is_late(Machine *machine, const struct stopping *s, const char *what)
{
    if (!s->deadline || shi_now_ns() < s->deadline)
        return false;
    (void)machine;
    shi_raise(shi_py.TimeoutError, ETIMEDOUT, -1, "%s: the function has not run", what);
    return true;
}

/* The sender's struct shi_multi, and the lock: 0, or -1 with an exception. */
static int take(Machine *machine, const struct stopping *s)
{
    struct shi_self *self = &machine->self;
    while (shi_multi_begin(self, s->n, s->nactive, s->cpus[0], s->cpus[s->n - 1], s->deadline) <
           0)
        if (is_late(machine, s, "the last one of this sender is not over yet") ||
            shi_nap(machine, LOCK_NAP_NS) < 0)
            return -1;
    while (shi_lock_try(self, &machine->m.header->stop_lock) < 0)
        if (is_late(machine, s, "another sender stops CPUs, and does not go on") ||
            shi_nap(machine, LOCK_NAP_NS) < 0) {
            shi_multi_cancel(self, false);
            return -1;
        }
    return 0;
}

/* All at once for who else does this: in one order at every CPU.  Nobody preempts the sender
 * meanwhile: a stopper here might wait for what it has not queued yet. */
static void queue(Machine *machine, struct stopping *s)
{
    struct shi_self *self = &machine->self;
    uint32_t i, missing = 0;
    bool void_ = false;
    for (i = 0; i < s->n; i++) {
        shi_enter(self);
        int err = shi_multi_queue(self, s->locals[i], s->cpus[i], s->active[i]);
        if (err)
            shi_csd_put(self, s->locals[i]);
        shi_leave(self);
        SHI_STEP(self, multi_queue);
        if (err) {
            s->locals[i] = UINT32_MAX;
            missing++;
            void_ |= s->active[i];
        }
    }
    shi_enter(self);
    shi_multi_go(self, missing, void_);
    shi_leave(self);
}

/* Until CPU `i` has left it: 0 or -errno.  When the function has run everywhere, others that
 * do not go on (SIGSTOP) are not waited for much longer. */
static int wait_one(Machine *machine, struct stopping *s, uint32_t i)
{
    struct shi_self *self = &machine->self;
    uint64_t end = s->deadline ? s->deadline + GRACE_NS : UINT64_MAX;
    for (;;) {
        uint64_t look = shi_now_ns() + LEAVE_NS;
        bool over = !s->active[i] && (shi_multi_word(self) & 0xf) == SHI_MS_EXIT;
        int err = shi_csd_wait(self, s->locals[i], s->cpus[i], look < end ? look : end,
                               &shi_python_waiter, machine, NULL);
        if (err == -ETIMEDOUT && over) {
            give_up(machine, s, i);
            return 0;
        }
        if (err != -ETIMEDOUT || shi_now_ns() >= end)
            return err;
    }
}

/* Until every CPU has left it.  0, or -1 with an exception. */
static int wait_all(Machine *machine, struct stopping *s)
{
    struct shi_self *self = &machine->self;
    uint32_t i;
    for (i = 0; i < s->n; i++) {
        int err = s->locals[i] == UINT32_MAX ? 0 : wait_one(machine, s, i);
        if (!err)
            continue;
        if (self->left) {
            if (err != -EINTR)
                shi_raise_errno(machine, err, (int)s->cpus[i]);
            return -1;
        }
        shi_enter(self);
        shi_multi_cancel(self, err == -ETIMEDOUT);
        shi_leave(self);
        if (err == -ETIMEDOUT) {
            uint32_t word = shi_multi_word(self);
            if ((word & 0xf) == SHI_MS_EXIT && !s->active[i]) {
                give_up(machine, s, i);
                continue;
            }
            raise_given_up(machine, s, word);
        } else if (err != -EINTR) {
            shi_raise_errno(machine, err, (int)s->cpus[i]);
        }
        return -1;
    }
    return 0;
}

/* [(cpu, result), ...] of those that ran it; the first exception, if there is any. */
static PyObject *results(Machine *machine, struct stopping *s, uint8_t apply)
{
    PyObject *list = PyList_New(0), *error = NULL;
    uint32_t i;
    for (i = 0; i < s->n; i++) {
        if (s->locals[i] == UINT32_MAX)
            continue;
        if (s->active[i]) {
            PyObject *value = shi_result(machine, s->locals[i], s->cpus[i], apply);
            PyObject *one = value ? Py_BuildValue("IN", s->cpus[i], value) : NULL;
            if ((!one || !list || PyList_Append(list, one) < 0) && !error)
                error = shi_take_exception();
            PyErr_Clear();
            Py_XDECREF(one);
        }
        shi_call_end(&machine->self, s->locals[i]);
        s->locals[i] = UINT32_MAX;
    }
    if (error) {
        Py_XDECREF(list);
        shi_put_exception(error);
        return NULL;
    }
    return list;
}

static PyObject *stop_all(Machine *machine, struct stopping *s, const struct outgoing *out)
{
    struct shi_self *self = &machine->self;
    PyObject *list = NULL;
    if (fill(machine, s, out) < 0 || take(machine, s) < 0)
        goto done;
    if (!self->host)
        self->preempt++;
    s->queued = true;
    queue(machine, s);
    shi_lock_release(self, &machine->m.header->stop_lock);
    if (!self->host)
        self->preempt--;
    if (wait_all(machine, s) < 0)
        goto done;
    uint32_t word = shi_multi_word(self);
    if ((word & 0xf) == SHI_MS_EXIT)
        list = results(machine, s, out->call.apply);
    else
        raise_given_up(machine, s, word);
done:
    if (!self->left && !machine->closed) {
        PyObject *error = PyErr_Occurred() ? shi_take_exception() : NULL;
        abandon_all(machine, s);
        if (!self->host)
            shi_after_enable(machine);
        shi_put_exception(error);
    }
    return list;
}

/* Room for a result of each. */
static uint32_t room_for(const Machine *machine, uint32_t n)
{
    uint32_t room = SHI_REPLY_ROOM;
    while (room && (uint64_t)room * n > machine->m.arena_bytes / 8)
        room /= 2;
    return room;
}

/*
 * stop_multi(cpus, active, func, args, timeout) -> [(cpu, result), ...]: multi_cpu_stop on
 * `cpus` (ascending), func(*args) on those of `active`.  `func` None: take_cpu_down.
 */
static PyObject *machine_stop_multi(Machine *machine, PyObject *const *args, Py_ssize_t nargs)
{
    struct stopping s = { .began = shi_now_ns() };
    struct outgoing out = { .call = { .func = SHI_FUNC_NATIVE | SHI_NATIVE_TAKEDOWN,
                                      .apply = SHI_A_VOID } };
    PyObject *list = NULL;
    uint32_t i;
    if (shi_use(machine) < 0)
        return NULL;
    if (nargs != 5 || !PyList_CheckExact(args[0]) || !PyAnySet_Check(args[1]) ||
        !PyTuple_CheckExact(args[3]) || !PyList_GET_SIZE(args[0])) {
        PyErr_SetString(PyExc_TypeError, "stop_multi(cpus, active, func, args, timeout)");
        return NULL;
    }
    s.n = (uint32_t)PyList_GET_SIZE(args[0]);
    s.cpus = PyMem_Calloc(s.n, 2 * sizeof *s.cpus + 1);
    if (!s.cpus)
        return PyErr_NoMemory();
    s.locals = s.cpus + s.n;
    s.active = (uint8_t *)(s.locals + s.n);
    for (i = 0; i < s.n; i++) {
        PyObject *cpu = PyList_GET_ITEM(args[0], i);
        int active = shi_as_slot(cpu, machine->m.ncpus, &s.cpus[i]) < 0
                         ? -1
                         : PySet_Contains(args[1], cpu);
        if (active < 0)
            goto done;
        s.locals[i] = UINT32_MAX;
        s.active[i] = (uint8_t)active;
        s.nactive += (uint32_t)active;
    }
    if (shi_as_deadline(args[4], &s.deadline) < 0)
        goto done;
    if (args[2] != Py_None) {
        if (shi_outgoing_call(machine, &out, args[2], args[3], NULL) < 0)
            goto done;
        if (out.call.room)
            out.call.room = room_for(machine, s.nactive);
    }
    list = stop_all(machine, &s, &out);
    shi_outgoing_clear(machine, &out);
done:
    PyMem_Free(s.cpus);
    return list;
}

/* stop_post(cpu, func, args, thread=False) -> the number of a call, to be collected. */
static PyObject *machine_stop_post(Machine *machine, PyObject *const *args, Py_ssize_t nargs)
{
    struct outgoing out;
    int64_t cpu;
    if (shi_use(machine) < 0)
        return NULL;
    if (nargs < 3 || nargs > 4 || !PyTuple_CheckExact(args[2])) {
        PyErr_SetString(PyExc_TypeError, "stop_post(cpu, func, args, thread=False)");
        return NULL;
    }
    int thread = nargs > 3 ? PyObject_IsTrue(args[3]) : 0;
    if (thread < 0 || shi_as_cpu(args[0], &cpu) < 0)
        return NULL;
    if (cpu < 0 || cpu >= machine->m.ncpus)
        return shi_raise_errno(machine, -ENXIO, (int)cpu);
    if (shi_outgoing_call(machine, &out, args[1], args[2], NULL) < 0)
        return NULL;
    if (thread)
        out.call.apply |= SHI_A_THREAD;
    int64_t local = shi_outgoing_post(machine, &out, SHI_CSD_STOP, (uint32_t)cpu);
    shi_outgoing_clear(machine, &out);
    return local < 0 ? NULL : PyLong_FromLongLong(local);
}

PyMethodDef shi_stop_methods[] = {
    { "stop_multi", FAST(machine_stop_multi), METH_FASTCALL,
      "stop_multi(cpus, active, func, args, timeout)\n--\n\nmulti_cpu_stop: [(cpu, result), "
      "...]." },
    { "stop_post", FAST(machine_stop_post), METH_FASTCALL,
      "stop_post(cpu, func, args)\n--\n\nStart a work of a CPU's stopper: its number." },
    { "stop_nowait", FAST(shi_stop_nowait), METH_FASTCALL,
      "stop_nowait(cpu, csd)\n--\n\nQueue a CallSingleData for a CPU's stopper: is it "
      "online?" },
    { NULL, NULL, 0, NULL },
};
