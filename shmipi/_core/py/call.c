/* SPDX-License-Identifier: MIT */
/* kernel/smp.c for Python: the smp_call_function family, and calls with a result. */
#include "py/shi.h"

#include <math.h>

#include "irq/chip.h"
#include "base/clock.h"
#include "irq/doorbell.h"
#include "base/native.h"
#include "smp/watch.h"

static bool warned_irqs_off, warned_in_interrupt;

static const char irqs_off_text[] =
    "an IPI is sent and waited for with interrupts disabled: two CPUs that do this to each "
    "other wait for ever";
static const char in_interrupt_text[] =
    "an IPI is sent and waited for in interrupt context (an IPI handler): use "
    "smp_call_function_single_async there";

/* The kernel's WARN_ON_ONCEs at the head of the cross calls. */
int shi_check_context(const Machine *machine)
{
    const struct shi_self *self = &machine->self;
    if (self->host)
        return 0;
    if (self->in_irq)
        return shi_warn_once(&warned_in_interrupt, in_interrupt_text);
    if (self->irqs_off)
        return shi_warn_once(&warned_irqs_off, irqs_off_text);
    return 0;
}

/* ---- waiting --------------------------------------------------------------------- */

void shi_give_back(Machine *machine, uint32_t local)
{
    shi_enter(&machine->self);
    shi_csd_put(&machine->self, local);
    shi_leave(&machine->self);
}

void shi_leave_behind(Machine *machine, uint32_t local)
{
    shi_drop_early(machine, local);
    shi_enter(&machine->self);
    shi_csd_abandon(&machine->self, local);
    shi_leave(&machine->self);
}

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

void shi_take_back(Machine *machine, PyThreadState *mine)
{
    if (mine) {
        PyEval_RestoreThread(mine);
        machine->waiters--;
    } else if (machine->released) {
        PyThreadState *state = machine->released;
        machine->released = NULL;
        PyEval_RestoreThread(state);
    }
}

/*
 * A CPU in a wait polls, and has run what a kick put off before: its sender may be the one
 * that is waited for.  Python that runs inside the wait (handlers of other signals, of
 * IPIs) may have left the CPU RUNNING, so this is asked again at every turn.
 */
void shi_wait_settle(Machine *machine)
{
    struct shi_self *self = &machine->self;
    if (self->host)
        return;
    self->inline_python = true;
    if (shi_masked(self))
        return;
    if (shi_word_state(shi_load_relaxed(&self->slot->word)) == SHI_RUNNING)
        shi_set_polling(self);
    if (shi_python_waits(self)) {
        /* POLLING, so the kick handler puts off nothing more. */
        shi_fetch_and_full(&self->slot->word, ~SHI_W_ASKED);
        shi_run_deferred(machine);
    }
}

/* Wait until the csd is unlocked.  0, or -errno (-EINTR: a Python exception is set). */
static int wait_unlocked(Machine *machine, uint32_t index, uint32_t dst, uint64_t deadline_ns)
{
    struct shi_self *self = &machine->self;
    struct shi_wait wait;
    bool inlined = self->inline_python;
    shi_wait_begin(self, &wait, index, dst, deadline_ns);
    shi_wait_settle(machine);
    uint64_t budget = shi_wait_budget(self, dst);
    int rc = shi_wait_spin(self, &wait, budget < SHI_GIL_SPIN_NS ? budget : SHI_GIL_SPIN_NS);
    bool spun = budget <= SHI_GIL_SPIN_NS;
    while (rc > 0) {
        shi_wait_settle(machine);
        if (rc == SHI_WAIT_PYTHON)
            shi_wait_python(machine);
        if ((rc == SHI_WAIT_SIGNAL ? PyErr_CheckSignals() : shi_signals_check(machine)) < 0 ||
            shi_task_interrupt(machine) < 0) {
            rc = -EINTR;
            break;
        }
        if (self->host && shi_load_acquire(&shi_slot(self->m, dst)->starved))
            shi_read_early(machine, dst);
        PyThreadState *mine = shi_give_up(machine);
        rc = spun ? shi_wait_sleep(self, &wait)
                  : shi_wait_spin(self, &wait, budget - SHI_GIL_SPIN_NS);
        spun = true;
        shi_take_back(machine, mine);
    }
    self->inline_python = inlined;
    shi_wait_end(self, &wait);
    if (!self->host)
        shi_take_deferred(machine);
    return rc;
}

int shi_wait_csd(Machine *machine, uint32_t local, uint32_t dst, uint64_t deadline_ns)
{
    int err = wait_unlocked(machine, shi_own_index(&machine->self, local), dst, deadline_ns);
    SHI_TRACE(&machine->self, call_end, dst, shi_own_index(&machine->self, local) + 1, 0,
              (uint32_t)-err);
    if (!err)
        return 0;
    shi_leave_behind(machine, local);
    if (err != -EINTR)
        shi_raise_errno(machine, err, (int)dst);
    return -1;
}

#define ROOM_LOOK_NS 1000000u
#define ROOM_LOOKS 16u

/* Every csd for wait=0 calls is in flight: wait for the oldest.  0: look again, or -1. */
int shi_wait_for_room(Machine *machine)
{
    shi_enter(&machine->self);
    uint32_t oldest = shi_csd_oldest(&machine->self);
    shi_leave(&machine->self);
    if (oldest == UINT32_MAX) {
        /* All belong to futures, tasks and CallSingleData: only their owners free them. */
        shi_raise_errno(machine, -EAGAIN, -1);
        return -1;
    }
    uint64_t lock = shi_load_relaxed(&shi_own_csd(&machine->self, oldest)->lock);
    uint32_t dst = (uint16_t)(lock >> SHI_CSD_DST_SHIFT);
    if (dst >= machine->m.ncpus) {
        shi_enter(&machine->self);
        shi_csd_collect(&machine->self); /* damaged: dropped there */
        shi_leave(&machine->self);
        return 0;
    }
    /* Not for long: its target may be stopped, and others have ended since. */
    int err = wait_unlocked(machine, shi_own_index(&machine->self, oldest), dst,
                            shi_now_ns() + ROOM_LOOK_NS);
    if (err == -ETIMEDOUT) {
        if (++machine->room_looks % ROOM_LOOKS == 0) {
            /* Each look is too short to notice that a ring was lost: ring again. */
            shi_enter(&machine->self);
            shi_watch_ring(&machine->self, dst);
            shi_leave(&machine->self);
        }
        return 0;
    }
    machine->room_looks = 0;
    if (err == -EBADMSG)
        return 0; /* damaged: collected as such */
    if (err && err != -EINTR)
        shi_raise_errno(machine, err, (int)dst);
    return err ? -1 : 0;
}

/* An error of filling a csd: what did not fit, and into what. */
static void raise_full(Machine *machine, const struct outgoing *out, int err)
{
    if (err != -ENOBUFS || !out->pickle) {
        shi_raise_errno(machine, err, -1);
        return;
    }
    shi_raise(
        shi_py.ArenaError, ENOBUFS, -1,
        "the arena of this sender (%llu bytes) is full of payloads not yet taken: %zd bytes "
        "more, in a block of the next power of two, do not fit. Wait for some, or put large "
        "data in cluster.shared()",
        (unsigned long long)machine->m.arena_bytes, PyBytes_GET_SIZE(out->pickle));
}

/* A csd that holds `out`.  `nowait`: from the pool.  Local index, or -1. */
int64_t shi_get_filled(Machine *machine, const struct outgoing *out, bool nowait)
{
    struct shi_self *self = &machine->self;
    for (;;) {
        shi_enter(self);
        int64_t local = nowait ? shi_nowait_get(self) : shi_csd_get(self);
        int err = 0;
        if (local >= 0 && (err = shi_outgoing_fill(machine, out, (uint32_t)local))) {
            shi_csd_put(self, (uint32_t)local);
            local = err;
        }
        shi_leave(self);
        if (local >= 0)
            return local;
        if (local != -EAGAIN) {
            raise_full(machine, out, (int)local);
            return -1;
        }
        if (shi_wait_for_room(machine) < 0)
            return -1;
    }
}

/* Give back csds that were filled and never queued. */
static void put_all(Machine *machine, const uint32_t *locals, uint32_t n)
{
    struct shi_self *self = &machine->self;
    shi_enter(self);
    while (n)
        shi_csd_put(self, locals[--n]);
    shi_leave(self);
}

/* ---- arguments ------------------------------------------------------------------- */

int shi_as_cpu(PyObject *object, int64_t *cpu)
{
    int overflow;
    PyObject *index = PyNumber_Index(object);
    if (!index)
        return -1;
    long long value = PyLong_AsLongLongAndOverflow(index, &overflow);
    Py_DECREF(index);
    *cpu = overflow || value > INT32_MAX || value < INT32_MIN ? -1 : value;
    return 0;
}

int shi_as_bool(PyObject *object, int otherwise)
{
    return object ? PyObject_IsTrue(object) : otherwise;
}

/* CPU numbers of a mask argument, ascending, in machine memory to be freed. */
int shi_as_mask(Machine *machine, PyObject *mask, uint32_t **cpus, uint32_t *n)
{
    *cpus = NULL;
    *n = 0;
    PyObject *list =
        mask ? PyObject_CallFunction(shi_py.mask_cpus, "OI", mask, (unsigned)machine->m.ncpus)
             : NULL;
    if (mask && !list)
        return -1;
    Py_ssize_t count = list ? PyList_GET_SIZE(list) : (Py_ssize_t)machine->m.ncpus, i;
    *cpus = PyMem_Malloc(sizeof **cpus * (size_t)(count ? count : 1));
    if (!*cpus) {
        Py_XDECREF(list);
        PyErr_NoMemory();
        return -1;
    }
    for (i = 0; i < count; i++) {
        long value = list ? PyLong_AsLong(PyList_GET_ITEM(list, i)) : (long)i;
        if (value >= 0 && value < (long)machine->m.ncpus)
            (*cpus)[(*n)++] = (uint32_t)value;
    }
    Py_XDECREF(list);
    return PyErr_Occurred() ? -1 : 0;
}

/* ---- the self branch ------------------------------------------------------------- */

/* func(info) here, with interrupts off: no csd, no doorbell.  The exception, if any, is
 * the waiter's as it would be from another CPU. */
int shi_run_local(Machine *machine, PyObject *function, PyObject *info, bool wait)
{
    struct shi_self *self = &machine->self;
    shi_count(self, SHI_C_calls_self);
    uint8_t flags = shi_irq_save(self);
    int err = 0;
    if (Py_TYPE(function) == shi_native_type) {
        struct outgoing out;
        err = shi_outgoing_info(machine, &out, function, info);
        shi_native_handler *native = shi_native_get(((NativeHandler *)function)->index);
        if (!err && native)
            native(out.kind == SHI_K_INT       ? (void *)(intptr_t)out.value.i
                   : out.kind == SHI_K_POINTER ? (void *)(machine->m.base + out.value.u)
                   : out.kind == SHI_K_BYTES   ? (void *)out.value.bytes
                                               : NULL);
    } else {
        PyObject *result = PyObject_CallOneArg(function, info);
        if (!result) {
            PyObject *error = shi_take_exception();
            if (wait) {
                PyObject *bytes = PyObject_CallOneArg(shi_py.dump_exception, error);
                PyObject *remote = bytes ? PyObject_CallFunction(shi_py.load_exception, "Ni",
                                                                 bytes, (int)self->id)
                                         : NULL;
                if (remote) {
                    PyErr_SetObject((PyObject *)Py_TYPE(remote), remote);
                    Py_DECREF(remote);
                }
                err = -1;
            } else {
                PyErr_SetObject((PyObject *)Py_TYPE(error), error);
                shi_count(self, SHI_C_unraisable);
                PyErr_WriteUnraisable(function);
            }
            Py_XDECREF(error);
        }
        Py_XDECREF(result);
    }
    shi_irq_restore(self, flags);
    if (shi_python_waits(self) && !shi_masked(self)) {
        PyObject *error = err ? shi_take_exception() : NULL;
        shi_take_deferred(machine);
        if (error) {
            PyErr_SetObject((PyObject *)Py_TYPE(error), error);
            Py_DECREF(error);
        }
    }
    return err;
}

/* ---- smp_call_function_single ---------------------------------------------------- */

/* What is left of a waiting call once it is queued. */
static PyObject *finish_single(Machine *machine, uint32_t local, uint32_t cpu)
{
    if (shi_wait_csd(machine, local, cpu, 0) < 0)
        return NULL;
    PyObject *result = shi_result(machine, local, cpu, SHI_A_INFO);
    shi_give_back(machine, local);
    return result;
}

/*
 * The common call: plain positional arguments, a function that is known, an argument that
 * fits the csd.  One core section from getting the csd to ringing.  1: done, `result` is
 * the answer; 0: the general way has to do it.
 */
static int quick_single(Machine *machine, PyObject *const *args, Py_ssize_t nargs,
                        PyObject **result)
{
    struct shi_self *self = &machine->self;
    struct outgoing out;
    bool wait = nargs < 4 || args[3] == Py_True;
    *result = NULL;
    if (nargs < 2 || nargs > 4 || (!wait && args[3] != Py_False) ||
        !PyLong_CheckExact(args[0]) || self->in_irq || self->irqs_off)
        return 0;
    long cpu = PyLong_AsLong(args[0]);
    if (cpu < 0 || cpu >= (long)machine->m.ncpus || (!self->host && cpu == (long)self->id)) {
        PyErr_Clear();
        return 0;
    }
    int ready = shi_outgoing_inline(machine, &out, args[1], nargs > 2 ? args[2] : Py_None);
    if (ready <= 0)
        return ready < 0;
    SHI_TRACE(self, call_entry, (uint32_t)cpu, 0, 0, SHI_E_SINGLE);
    shi_enter(self);
    int64_t local = wait ? shi_csd_get(self) : shi_nowait_get(self);
    if (local < 0) {
        shi_leave(self);
        return 0;
    }
    int err = shi_outgoing_fill(machine, &out, (uint32_t)local);
    if (!err)
        err = shi_call_single(self, (uint32_t)local, wait ? SHI_CSD_SYNC : SHI_CSD_ASYNC,
                              (uint32_t)cpu);
    if (err)
        shi_csd_put(self, (uint32_t)local);
    else if (!wait)
        shi_csd_leave(self, (uint32_t)local);
    shi_count(self, SHI_C_calls_single);
    shi_leave(self);
    if (err)
        shi_raise_errno(machine, err, (int)cpu);
    else
        *result = wait ? finish_single(machine, (uint32_t)local, (uint32_t)cpu)
                       : Py_NewRef(Py_None);
    return 1;
}

static PyObject *call_single(Machine *machine, PyObject *const *args, Py_ssize_t nargs,
                             PyObject *kwnames)
{
    static const char *const names[] = { "cpu", "func", "info", "wait" };
    PyObject *a[4], *quick;
    struct outgoing out;
    int64_t cpu;
    if (!kwnames && quick_single(machine, args, nargs, &quick))
        return quick;
    if (shi_parse("smp_call_function_single", names, 2, 4, args, nargs, kwnames, a) < 0)
        return NULL;
    PyObject *info = a[2] ? a[2] : Py_None;
    int wait = shi_as_bool(a[3], 1);
    if (wait < 0 || shi_as_cpu(a[0], &cpu) < 0 || shi_check_context(machine) < 0)
        return NULL;
    struct shi_self *self = &machine->self;
    shi_count(self, SHI_C_calls_single);
    if (!self->host && cpu == self->id) {
        if (!PyCallable_Check(a[1]) && Py_TYPE(a[1]) != shi_native_type)
            return PyErr_Format(PyExc_TypeError, "%R is not callable", a[1]);
        if (shi_run_local(machine, a[1], info, wait) < 0)
            return NULL;
        Py_RETURN_NONE;
    }
    if (cpu < 0 || cpu >= machine->m.ncpus)
        return shi_raise_errno(machine, -ENXIO, (int)cpu);
    SHI_TRACE(self, call_entry, (uint32_t)cpu, 0, 0, SHI_E_SINGLE);
    if (shi_outgoing_info(machine, &out, a[1], info) < 0)
        return NULL;
    int64_t local = shi_get_filled(machine, &out, !wait);
    shi_outgoing_clear(&out);
    if (local < 0)
        return NULL;
    shi_enter(self);
    int err = shi_call_single(self, (uint32_t)local, wait ? SHI_CSD_SYNC : SHI_CSD_ASYNC,
                              (uint32_t)cpu);
    if (err)
        shi_csd_put(self, (uint32_t)local);
    else if (!wait)
        shi_csd_leave(self, (uint32_t)local);
    shi_leave(self);
    if (err)
        return shi_raise_errno(machine, err, (int)cpu);
    if (!wait)
        Py_RETURN_NONE;
    return finish_single(machine, (uint32_t)local, (uint32_t)cpu);
}

/* ---- smp_send_reschedule --------------------------------------------------------- */

static PyObject *send_reschedule(Machine *machine, PyObject *const *args, Py_ssize_t nargs,
                                 PyObject *kwnames)
{
    static const char *const names[] = { "cpu" };
    PyObject *a[1];
    int64_t cpu;
    if (shi_parse("smp_send_reschedule", names, 1, 1, args, nargs, kwnames, a) < 0 ||
        shi_as_cpu(a[0], &cpu) < 0)
        return NULL;
    struct shi_self *self = &machine->self;
    if (!self->host && cpu == self->id)
        Py_RETURN_NONE; /* the flag alone: it is looked at before the next sleep */
    if (cpu < 0 || cpu >= machine->m.ncpus)
        return shi_raise_errno(machine, -ENXIO, (int)cpu);
    shi_enter(self);
    int err = shi_irq_send_reschedule(self, (uint32_t)cpu);
    shi_leave(self);
    if (err == -ENXIO) {
        /* "Worst case is that we lose a reschedule": warned of, and not sent. */
        if (PyErr_WarnFormat(shi_py.Warning, 1,
                             "sched: Unexpected reschedule of offline CPU#%d!", (int)cpu) < 0)
            return NULL;
    }
    Py_RETURN_NONE;
}

/* ---- calls with a result --------------------------------------------------------- */

static PyObject *as_args(PyObject *args, PyObject *kwargs)
{
    if (!PyTuple_CheckExact(args) || (kwargs != Py_None && !PyDict_CheckExact(kwargs))) {
        PyErr_SetString(PyExc_TypeError, "args is a tuple, kwargs a dict or None");
        return NULL;
    }
    return args;
}

int shi_as_deadline(PyObject *timeout, uint64_t *deadline)
{
    *deadline = 0;
    if (timeout == Py_None)
        return 0;
    double seconds = PyFloat_AsDouble(timeout);
    if (PyErr_Occurred())
        return -1;
    if (isnan(seconds) || seconds < 0) {
        PyErr_Format(PyExc_ValueError, "timeout is %R: give seconds >= 0, or None", timeout);
        return -1;
    }
    if (seconds < 1e9)
        *deadline = shi_now_ns() + (uint64_t)(seconds * 1e9) + 1;
    return 0;
}

/* Room for a task's result.  One for each CPU leaves most of the arena to payloads; a
 * result that is larger lies in its CPU's arena. */
static uint32_t reply_room(const Machine *machine)
{
    uint32_t room = SHI_REPLY_ROOM;
    while (room && (uint64_t)room * machine->m.ncpus > machine->m.arena_bytes / 4)
        room /= 2;
    return room;
}

/* post(cpu, func, args, kwargs, task): start a call, its number back. */
static int64_t post(Machine *machine, int64_t cpu, PyObject *function, PyObject *args,
                    PyObject *kwargs, uint64_t type, uint8_t *apply)
{
    struct shi_self *self = &machine->self;
    struct outgoing out;
    if (!as_args(args, kwargs))
        return -1;
    if (cpu < 0 || cpu >= machine->m.ncpus) {
        shi_raise_errno(machine, -ENXIO, (int)cpu);
        return -1;
    }
    if (shi_outgoing_call(machine, &out, function, args, kwargs == Py_None ? NULL : kwargs) < 0)
        return -1;
    if (out.room && (type & SHI_CSD_TYPE) == SHI_CSD_TTWU)
        out.room = reply_room(machine);
    *apply = out.apply;
    int64_t local = shi_get_filled(machine, &out, false);
    shi_outgoing_clear(&out);
    if (local < 0)
        return -1;
    shi_enter(self);
    shi_count(self, SHI_C_calls_single);
    int err = shi_call_single(self, (uint32_t)local, type, (uint32_t)cpu);
    if (err)
        shi_csd_put(self, (uint32_t)local);
    shi_leave(self);
    if (err) {
        shi_raise_errno(machine, err, (int)cpu);
        return -1;
    }
    return local;
}

static PyObject *machine_call(Machine *machine, PyObject *const *args, Py_ssize_t nargs)
{
    int64_t cpu;
    uint64_t deadline;
    uint8_t apply;
    if (shi_use(machine) < 0)
        return NULL;
    if (nargs != 5) {
        PyErr_SetString(PyExc_TypeError, "call(cpu, func, args, kwargs, timeout)");
        return NULL;
    }
    if (shi_as_cpu(args[0], &cpu) < 0 || shi_as_deadline(args[4], &deadline) < 0)
        return NULL;
    int64_t local = post(machine, cpu, args[1], args[2], args[3], SHI_CSD_SYNC, &apply);
    if (local < 0 || shi_wait_csd(machine, (uint32_t)local, (uint32_t)cpu, deadline) < 0)
        return NULL;
    PyObject *result = shi_result(machine, (uint32_t)local, (uint32_t)cpu, apply);
    shi_give_back(machine, (uint32_t)local);
    return result;
}

static PyObject *machine_post(Machine *machine, PyObject *const *args, Py_ssize_t nargs)
{
    int64_t cpu;
    uint8_t apply;
    if (shi_use(machine) < 0)
        return NULL;
    if (nargs != 5) {
        PyErr_SetString(PyExc_TypeError, "post(cpu, func, args, kwargs, task)");
        return NULL;
    }
    int task = PyObject_IsTrue(args[4]);
    if (task < 0 || shi_as_cpu(args[0], &cpu) < 0)
        return NULL;
    /* PARKED from the start: the unlock rings, and whoever collects it is woken. */
    int64_t local = post(machine, cpu, args[1], args[2], args[3],
                         (task ? SHI_CSD_TTWU : SHI_CSD_SYNC) | SHI_CSD_PARKED, &apply);
    return local < 0 ? NULL : PyLong_FromLongLong(local);
}

/* ---- tasks on several CPUs ------------------------------------------------------- */

/* The number of a posted task: its csd, and of which use.  A number that is kept for too
 * long is not the next call's. */
#define TASK_SEQ_SHIFT 32
#define TASK_TAG (1ull << 48)

static uint64_t task_number(const Machine *machine, uint32_t local)
{
    uint64_t lock = shi_load_relaxed(&shi_own_csd(&machine->self, local)->lock);
    return TASK_TAG | lock >> SHI_CSD_SEQ_SHIFT << TASK_SEQ_SHIFT | local;
}

/* A csd for each of `n` CPUs, filled with one payload for all.  0, or -1: none is taken. */
static int fill_many(Machine *machine, struct outgoing *out, uint32_t *locals, uint32_t n)
{
    struct shi_self *self = &machine->self;
    int64_t owner = -1;
    uint32_t i;
    if (out->room)
        out->room = reply_room(machine);
    if (out->pickle && n > 1 && PyBytes_GET_SIZE(out->pickle) > (Py_ssize_t)out->room) {
        out->room = 0;
        owner = shi_get_filled(machine, out, false);
        if (owner < 0)
            return -1;
    }
    for (i = 0; i < n; i++) {
        int64_t local;
        if (owner < 0) {
            local = shi_get_filled(machine, out, false);
        } else {
            shi_enter(self);
            while ((local = shi_csd_get(self)) == -EAGAIN) {
                shi_leave(self);
                if (shi_wait_for_room(machine) < 0)
                    goto fail;
                shi_enter(self);
            }
            if (local >= 0)
                shi_outgoing_share(machine, out, (uint32_t)local, (uint32_t)owner);
            shi_leave(self);
            if (local < 0)
                shi_raise_errno(machine, (int)local, -1);
        }
        if (local < 0)
            goto fail;
        locals[i] = (uint32_t)local;
    }
    if (owner >= 0) { /* it goes with the last that shares */
        shi_enter(self);
        shi_csd_end_sharing(self, (uint32_t)owner);
        shi_leave(self);
    }
    return 0;
fail:
    put_all(machine, locals, i);
    if (owner >= 0)
        put_all(machine, &(uint32_t){ (uint32_t)owner }, 1);
    return -1;
}

/*
 * start_tasks(cpus, func, args, kwargs, numbers): one task on each CPU of the list, their
 * numbers appended to `numbers`; in the place of one whose CPU went offline meanwhile,
 * -errno.  Everything that can fail does before the first is queued.
 */
static PyObject *machine_start_tasks(Machine *machine, PyObject *const *args, Py_ssize_t nargs)
{
    struct shi_self *self = &machine->self;
    struct outgoing out;
    PyObject *result = NULL;
    if (shi_use(machine) < 0)
        return NULL;
    if (nargs != 5 || !PyList_CheckExact(args[0]) || !PyList_CheckExact(args[4])) {
        PyErr_SetString(PyExc_TypeError, "start_tasks(cpus, func, args, kwargs, numbers)");
        return NULL;
    }
    if (Py_TYPE(args[1]) == shi_native_type) {
        PyErr_SetString(PyExc_TypeError,
                        "a native handler is no task, it runs as an IPI handler: "
                        "give it to cluster.call() or the smp_call_function "
                        "family");
        return NULL;
    }
    uint32_t n = (uint32_t)PyList_GET_SIZE(args[0]), i;
    uint32_t *cpus = PyMem_Calloc(2 * (size_t)n + 1, sizeof *cpus), *locals = cpus + n;
    PyObject *numbers = PyList_New(n);
    if (!cpus || !numbers) {
        PyErr_NoMemory();
        goto done;
    }
    for (i = 0; i < n; i++) {
        int64_t cpu;
        if (shi_as_cpu(PyList_GET_ITEM(args[0], i), &cpu) < 0)
            goto done;
        if (cpu < 0 || cpu >= machine->m.ncpus) {
            shi_raise_errno(machine, -ENXIO, (int)cpu);
            goto done;
        }
        cpus[i] = (uint32_t)cpu;
    }
    if (!as_args(args[2], args[3]) ||
        shi_outgoing_call(machine, &out, args[1], args[2],
                          args[3] == Py_None ? NULL : args[3]) < 0)
        goto done;
    int err = fill_many(machine, &out, locals, n);
    shi_outgoing_clear(&out);
    if (err < 0)
        goto done;
    for (i = 0; i < n; i++) {
        shi_enter(self);
        shi_count(self, SHI_C_calls_single);
        /* PARKED from the start: the unlock rings, and whoever collects it is woken. */
        err = shi_call_single(self, locals[i], SHI_CSD_TTWU | SHI_CSD_PARKED, cpus[i]);
        if (err)
            shi_csd_put(self, locals[i]);
        shi_leave(self);
        PyObject *number = err ? PyLong_FromLong(err)
                               : PyLong_FromUnsignedLongLong(task_number(machine, locals[i]));
        if (!number) { /* out of memory: run, and be collected by nobody */
            if (!err)
                shi_leave_behind(machine, locals[i]);
            put_all(machine, locals + i + 1, n - i - 1);
            goto done;
        }
        PyList_SET_ITEM(numbers, i, number);
    }
    /* In C, where no signal's handler comes between: whoever is interrupted has them all. */
    if (PyList_SetSlice(args[4], PyList_GET_SIZE(args[4]), PyList_GET_SIZE(args[4]), numbers) ==
        0)
        result = Py_NewRef(Py_None);
done:
    Py_XDECREF(numbers);
    PyMem_Free(cpus);
    return result;
}

static int as_local(const Machine *machine, PyObject *object, uint32_t *local)
{
    unsigned long long value = PyLong_AsUnsignedLongLong(object);
    if (PyErr_Occurred())
        return -1;
    *local = (uint32_t)value;
    if (*local >= machine->self.sender.csd_top ||
        (value >= TASK_TAG ? value != task_number(machine, *local) : value > UINT32_MAX)) {
        PyErr_SetString(PyExc_ValueError, "no such call");
        return -1;
    }
    return 0;
}

/* await_call(call, cpu, timeout) -> has it ended?  It stays its owner's in either case. */
static PyObject *machine_await_call(Machine *machine, PyObject *const *args, Py_ssize_t nargs)
{
    uint32_t local;
    int64_t cpu;
    uint64_t deadline;
    if (shi_use(machine) < 0)
        return NULL;
    if (nargs != 3) {
        PyErr_SetString(PyExc_TypeError, "await_call(call, cpu, timeout)");
        return NULL;
    }
    if (as_local(machine, args[0], &local) < 0 || shi_as_cpu(args[1], &cpu) < 0 ||
        shi_as_deadline(args[2], &deadline) < 0)
        return NULL;
    int err =
        wait_unlocked(machine, shi_own_index(&machine->self, local), (uint32_t)cpu, deadline);
    if (err && err != -ETIMEDOUT)
        return err == -EINTR ? NULL : shi_raise_errno(machine, err, (int)cpu);
    return PyBool_FromLong(!err);
}

/*
 * cancel(call, cpu) -> what became of it: 0: the task has ended; 1: it had not begun, and
 * never will; 2: it runs, and gets TaskInterrupt where it next runs Python with interrupts
 * enabled.
 */
static PyObject *machine_cancel(Machine *machine, PyObject *const *args, Py_ssize_t nargs)
{
    struct shi_self *self = &machine->self;
    uint32_t local;
    int64_t cpu;
    if (shi_use(machine) < 0)
        return NULL;
    if (nargs != 2) {
        PyErr_SetString(PyExc_TypeError, "cancel(call, cpu)");
        return NULL;
    }
    if (as_local(machine, args[0], &local) < 0 || shi_as_cpu(args[1], &cpu) < 0)
        return NULL;
    struct shi_csd *csd = shi_own_csd(self, local);
    uint64_t lock = shi_load_acquire(&csd->lock);
    do {
        if (!(lock & SHI_CSD_LOCK) || (lock & SHI_CSD_TYPE) != SHI_CSD_TTWU)
            return PyLong_FromLong(0);
        /* Full: see BEGUN in run_task.  And before the interrupt that makes it look. */
    } while (!shi_cas_full(&csd->lock, &lock, lock | SHI_CSD_CANCEL));
    if (!(lock & SHI_CSD_BEGUN))
        return PyLong_FromLong(1);
    if (cpu >= 0 && cpu < machine->m.ncpus) {
        shi_enter(self);
        shi_chip_prod(self, (uint32_t)cpu);
        shi_leave(self);
    }
    return PyLong_FromLong(2);
}

/* refuse(cpu): raise what a call to a CPU that is not online raises. */
static PyObject *machine_refuse(Machine *machine, PyObject *object)
{
    int64_t cpu;
    if (shi_as_cpu(object, &cpu) < 0)
        return NULL;
    return shi_raise_errno(machine, -ENXIO, (int)cpu);
}

/* begun(call) -> bool: does its CPU run it, or has it? */
static PyObject *machine_begun(Machine *machine, PyObject *object)
{
    uint32_t local;
    if (shi_use(machine) < 0 || as_local(machine, object, &local) < 0)
        return NULL;
    uint64_t lock = shi_load_acquire(&shi_own_csd(&machine->self, local)->lock);
    return PyBool_FromLong(!(lock & SHI_CSD_LOCK) || (lock & SHI_CSD_BEGUN));
}

static PyObject *machine_done(Machine *machine, PyObject *object)
{
    uint32_t local;
    if (shi_use(machine) < 0 || as_local(machine, object, &local) < 0)
        return NULL;
    return PyBool_FromLong(!shi_csd_locked(shi_own_csd(&machine->self, local)));
}

/* collect(call, cpu, timeout): wait for a posted call and take its result. */
static PyObject *machine_collect(Machine *machine, PyObject *const *args, Py_ssize_t nargs)
{
    uint32_t local;
    int64_t cpu;
    uint64_t deadline;
    if (shi_use(machine) < 0)
        return NULL;
    if (nargs != 3) {
        PyErr_SetString(PyExc_TypeError, "collect(call, cpu, timeout)");
        return NULL;
    }
    if (as_local(machine, args[0], &local) < 0 || shi_as_cpu(args[1], &cpu) < 0 ||
        shi_as_deadline(args[2], &deadline) < 0)
        return NULL;
    if (shi_wait_csd(machine, local, (uint32_t)cpu, deadline) < 0)
        return NULL;
    uint8_t apply = shi_own_csd(&machine->self, local)->apply;
    PyObject *result = shi_result(machine, local, (uint32_t)cpu, apply);
    shi_give_back(machine, local);
    return result;
}

static PyObject *machine_abandon(Machine *machine, PyObject *object)
{
    uint32_t local;
    if (shi_use(machine) < 0 || as_local(machine, object, &local) < 0)
        return NULL;
    shi_leave_behind(machine, local);
    Py_RETURN_NONE;
}

/* ---- methods, and the same on the current machine -------------------------------- */

#define SMP(name, impl)                                                                        \
    static PyObject *method_##name(PyObject *m, PyObject *const *args, Py_ssize_t nargs,       \
                                   PyObject *kwnames)                                          \
    {                                                                                          \
        return shi_use((Machine *)m) < 0 ? NULL : impl((Machine *)m, args, nargs, kwnames);    \
    }                                                                                          \
    static PyObject *function_##name(PyObject *module, PyObject *const *args,                  \
                                     Py_ssize_t nargs, PyObject *kwnames)                      \
    {                                                                                          \
        Machine *m = shi_use_current();                                                        \
        (void)module;                                                                          \
        return m ? impl(m, args, nargs, kwnames) : NULL;                                       \
    }
SMP(smp_call_function_single, call_single)
SMP(smp_call_function_single_async, shi_single_async)
SMP(smp_call_function_many, shi_call_mask)
SMP(smp_call_function, shi_call_others)
SMP(on_each_cpu, shi_each_cpu)
SMP(on_each_cpu_mask, shi_each_cpu_mask)
SMP(on_each_cpu_cond_mask, shi_each_cpu_cond_mask)
SMP(smp_send_reschedule, send_reschedule)
#undef SMP

#define FAST(function) ((PyCFunction)(void (*)(void))(function))

#define DOC_SINGLE                                                                             \
    "smp_call_function_single(cpu, func, info=None, wait=True)\n--\n\n"                        \
    "Run func(info) on `cpu` as an IPI handler.\n\n"                                           \
    "On the calling CPU itself func runs inline with interrupts off, without a doorbell.\n"    \
    "wait=True returns when func has returned; its exception is raised here as\n"              \
    "RemoteCallError.  wait=False draws from a pool of 64 requests per sender and waits\n"     \
    "only when that is empty (the kernel has one request and waits for that).\n\n"             \
    "Raises CpuOfflineError (ENXIO) for a CPU that is offline or does not exist,\n"            \
    "CpuDiedError when it dies meanwhile, IpiDeadlockError (EDEADLK).  kernel/smp.c."
#define DOC_ASYNC                                                                              \
    "smp_call_function_single_async(cpu, csd)\n--\n\n"                                         \
    "Submit a caller-owned CallSingleData.  Never allocates, never waits; legal with\n"        \
    "interrupts disabled and in handlers.  Raises CsdBusyError (EBUSY) while it is in use,\n"  \
    "CpuOfflineError (ENXIO)."
#define DOC_MANY                                                                               \
    "smp_call_function_many(mask, func, info=None, wait=True)\n--\n\n"                         \
    "Run func(info) on every online CPU of `mask` but the calling one.  Offline CPUs are\n"    \
    "skipped.  `mask`: CpuMask, cpulist string or iterable of CPU numbers.  What several\n"    \
    "CPUs fail with is raised as a CpusFailedError, when all have run."
#define DOC_ALL                                                                                \
    "smp_call_function(func, info=None, wait=True)\n--\n\n"                                    \
    "Run func(info) on all other online CPUs."
#define DOC_EACH                                                                               \
    "on_each_cpu(func, info=None, wait=True)\n--\n\n"                                          \
    "Run func(info) on all online CPUs, the calling one included: there it runs after the\n"   \
    "doorbells were rung and before the wait, with interrupts off.  What one CPU fails with\n" \
    "is raised when all have run, of several a CpusFailedError (an ExceptionGroup)."
#define DOC_EACH_MASK                                                                          \
    "on_each_cpu_mask(mask, func, info=None, wait=True)\n--\n\n"                               \
    "on_each_cpu for the CPUs of `mask`."
#define DOC_COND                                                                               \
    "on_each_cpu_cond_mask(cond_func, func, info=None, wait=True, mask=None)\n--\n\n"          \
    "on_each_cpu_mask for the CPUs for which cond_func(cpu, info) is true: asked once per\n"   \
    "CPU at send time, for the calling CPU after the IPIs went out.  mask=None: all."
#define DOC_RESCHED                                                                            \
    "smp_send_reschedule(cpu)\n--\n\n"                                                         \
    "Nudge `cpu`: a reschedule IPI, or only a flag where it is polling.  An offline CPU is\n"  \
    "warned about (ShmipiWarning) and not sent to."

#define ENTRY(kind, name, doc)                                                                 \
    { #name, FAST(kind##_##name), METH_FASTCALL | METH_KEYWORDS, doc }
#define ENTRIES(kind)                                                                          \
    ENTRY(kind, smp_call_function_single, DOC_SINGLE),                                         \
        ENTRY(kind, smp_call_function_single_async, DOC_ASYNC),                                \
        ENTRY(kind, smp_call_function_many, DOC_MANY),                                         \
        ENTRY(kind, smp_call_function, DOC_ALL), ENTRY(kind, on_each_cpu, DOC_EACH),           \
        ENTRY(kind, on_each_cpu_mask, DOC_EACH_MASK),                                          \
        ENTRY(kind, on_each_cpu_cond_mask, DOC_COND),                                          \
        ENTRY(kind, smp_send_reschedule, DOC_RESCHED)

PyMethodDef shi_call_methods[] = {
    ENTRIES(method),
    { "call", FAST(machine_call), METH_FASTCALL,
      "call(cpu, func, args, kwargs, timeout)\n--\n\nfunc(*args, **kwargs) on cpu: its "
      "result." },
    { "post", FAST(machine_post), METH_FASTCALL,
      "post(cpu, func, args, kwargs, task)\n--\n\nStart a call (or a task): its number." },
    { "start_tasks", FAST(machine_start_tasks), METH_FASTCALL,
      "start_tasks(cpus, func, args, kwargs, numbers)\n--\n\nOne payload, a task on each." },
    { "await_call", FAST(machine_await_call), METH_FASTCALL,
      "await_call(call, cpu, timeout)\n--\n\nWait for a posted call: has it ended?" },
    { "cancel", FAST(machine_cancel), METH_FASTCALL,
      "cancel(call, cpu)\n--\n\n0: the task has ended, 1: it will never run, 2: asked." },
    { "refuse", (PyCFunction)machine_refuse, METH_O, "refuse(cpu)\n--\n\nCpuOfflineError." },
    { "begun", (PyCFunction)machine_begun, METH_O, "begun(call)\n--\n\nHas a task begun?" },
    { "done", (PyCFunction)machine_done, METH_O, "done(call)\n--\n\nHas a posted call ended?" },
    { "collect", FAST(machine_collect), METH_FASTCALL,
      "collect(call, cpu, timeout)\n--\n\nWait for a posted call: its result." },
    { "abandon", (PyCFunction)machine_abandon, METH_O,
      "abandon(call)\n--\n\nNobody will collect this posted call." },
    { NULL, NULL, 0, NULL },
};

PyMethodDef shi_call_functions[] = {
    ENTRIES(function),
    { NULL, NULL, 0, NULL },
};
