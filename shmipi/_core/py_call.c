/* SPDX-License-Identifier: MIT */
/* kernel/smp.c for Python: the smp_call_function family, and calls with a result. */
#include "py_shi.h"

#include <math.h>

#include "clock.h"
#include "doorbell.h"
#include "native.h"

static bool warned_irqs_off, warned_in_interrupt;

static const char irqs_off_text[] =
    "an IPI is sent and waited for with interrupts disabled: two CPUs that do this to each "
    "other wait for ever";
static const char in_interrupt_text[] =
    "an IPI is sent and waited for in interrupt context (an IPI handler): use "
    "smp_call_function_single_async there";

/* The kernel's WARN_ON_ONCEs at the head of the cross calls. */
static int check_context(const Machine *machine)
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

/* ---- waiting -------------------------------------------------------------------------------- */

void shi_give_back(Machine *machine, uint32_t local)
{
    shi_enter(&machine->self);
    shi_csd_put(&machine->self, local);
    shi_leave(&machine->self);
}

static void leave_behind(Machine *machine, uint32_t local)
{
    shi_enter(&machine->self);
    shi_csd_leave(&machine->self, local);
    shi_leave(&machine->self);
}

/* The interpreter, given up for a while: by this thread (host) or for the core's hooks
 * to take back when Python work arrives (CPU). */
static PyThreadState *give_up(Machine *machine)
{
    if (machine->self.host)
        return PyEval_SaveThread();
    if (!machine->released)
        machine->released = PyEval_SaveThread();
    return NULL;
}

static void take_back(Machine *machine, PyThreadState *mine)
{
    if (mine) {
        PyEval_RestoreThread(mine);
    } else if (machine->released) {
        PyThreadState *state = machine->released;
        machine->released = NULL;
        PyEval_RestoreThread(state);
    }
}

/* Wait until the csd is unlocked.  0, or -errno (-EINTR: a Python exception is set). */
static int wait_unlocked(Machine *machine, uint32_t index, uint32_t dst, uint64_t deadline_ns)
{
    struct shi_self *self = &machine->self;
    struct shi_wait wait;
    bool inlined = self->inline_python;
    shi_wait_begin(self, &wait, index, dst, deadline_ns);
    if (!self->host)
        self->inline_python = true;
    uint64_t budget = shi_wait_budget(self, dst);
    int rc = shi_wait_spin(self, &wait, budget < SHI_GIL_SPIN_NS ? budget : SHI_GIL_SPIN_NS);
    bool spun = budget <= SHI_GIL_SPIN_NS;
    while (rc > 0) {
        if (rc == SHI_WAIT_PYTHON)
            shi_run_deferred(machine);
        if (rc == SHI_WAIT_SIGNAL && PyErr_CheckSignals() < 0) {
            rc = -EINTR;
            break;
        }
        PyThreadState *mine = give_up(machine);
        rc = spun ? shi_wait_sleep(self, &wait)
                  : shi_wait_spin(self, &wait, budget - SHI_GIL_SPIN_NS);
        spun = true;
        take_back(machine, mine);
    }
    self->inline_python = inlined;
    shi_wait_end(self, &wait);
    if (!self->host && self->deferred.head && !self->irqs_off)
        shi_run_deferred(machine);
    return rc;
}

int shi_wait_csd(Machine *machine, uint32_t local, uint32_t dst, uint64_t deadline_ns)
{
    int err = wait_unlocked(machine, shi_own_index(&machine->self, local), dst, deadline_ns);
    if (!err)
        return 0;
    leave_behind(machine, local);
    if (err != -EINTR)
        shi_raise_errno(machine, err, (int)dst);
    return -1;
}

/* Every csd for wait=0 calls is in flight: wait for the oldest.  0, or -1. */
static int wait_for_room(Machine *machine)
{
    shi_enter(&machine->self);
    uint32_t oldest = shi_csd_oldest(&machine->self);
    shi_leave(&machine->self);
    if (oldest == UINT32_MAX)
        return 0;
    uint64_t lock = shi_load_relaxed(&shi_own_csd(&machine->self, oldest)->lock);
    uint32_t dst = (uint16_t)(lock >> SHI_CSD_DST_SHIFT);
    if (dst >= machine->m.ncpus)
        return 0;
    int err = wait_unlocked(machine, shi_own_index(&machine->self, oldest), dst, 0);
    if (err && err != -EINTR)
        shi_raise_errno(machine, err, (int)dst);
    return err ? -1 : 0;
}

/* A csd that holds `out`.  `nowait`: from the pool.  Local index, or -1. */
static int64_t get_filled(Machine *machine, const struct outgoing *out, bool nowait)
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
            shi_raise_errno(machine, (int)local, -1);
            return -1;
        }
        if (wait_for_room(machine) < 0)
            return -1;
    }
}

/* ---- arguments ---------------------------------------------------------------------------------- */

static int as_cpu(PyObject *object, int64_t *cpu)
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

static int as_bool(PyObject *object, int otherwise)
{
    return object ? PyObject_IsTrue(object) : otherwise;
}

/* CPU numbers of a mask argument, ascending, in machine memory to be freed. */
static int as_mask(Machine *machine, PyObject *mask, uint32_t **cpus, uint32_t *n)
{
    *cpus = NULL;
    *n = 0;
    PyObject *list = mask ? PyObject_CallFunction(shi_py.mask_cpus, "OI", mask,
                                                  (unsigned)machine->m.ncpus)
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

/* ---- the self branch ------------------------------------------------------------------------------ */

/* func(info) here, with interrupts off: no csd, no doorbell.  The exception, if any, is
 * the waiter's as it would be from another CPU. */
static int run_local(Machine *machine, PyObject *function, PyObject *info, bool wait)
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
                PyObject *remote =
                    bytes ? PyObject_CallFunction(shi_py.load_exception, "Ni", bytes,
                                                  (int)self->id)
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
    if (self->deferred.head && !self->irqs_off) {
        PyObject *error = err ? shi_take_exception() : NULL;
        shi_run_deferred(machine);
        if (error) {
            PyErr_SetObject((PyObject *)Py_TYPE(error), error);
            Py_DECREF(error);
        }
    }
    return err;
}

/* ---- smp_call_function_single ----------------------------------------------------------------------- */

static PyObject *call_single(Machine *machine, PyObject *const *args, Py_ssize_t nargs,
                             PyObject *kwnames)
{
    static const char *const names[] = {"cpu", "func", "info", "wait"};
    PyObject *a[4];
    struct outgoing out;
    int64_t cpu;
    if (shi_parse("smp_call_function_single", names, 2, 4, args, nargs, kwnames, a) < 0)
        return NULL;
    PyObject *info = a[2] ? a[2] : Py_None;
    int wait = as_bool(a[3], 1);
    if (wait < 0 || as_cpu(a[0], &cpu) < 0 || check_context(machine) < 0)
        return NULL;
    struct shi_self *self = &machine->self;
    shi_count(self, SHI_C_calls_single);
    if (!self->host && cpu == self->id) {
        if (!PyCallable_Check(a[1]) && Py_TYPE(a[1]) != shi_native_type)
            return PyErr_Format(PyExc_TypeError, "%R is not callable", a[1]);
        if (run_local(machine, a[1], info, wait) < 0)
            return NULL;
        Py_RETURN_NONE;
    }
    if (cpu < 0 || cpu >= machine->m.ncpus)
        return shi_raise_errno(machine, -ENXIO, (int)cpu);
    if (shi_outgoing_info(machine, &out, a[1], info) < 0)
        return NULL;
    int64_t local = get_filled(machine, &out, !wait);
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
    if (shi_wait_csd(machine, (uint32_t)local, (uint32_t)cpu, 0) < 0)
        return NULL;
    PyObject *result = shi_result(machine, (uint32_t)local, (uint32_t)cpu, SHI_A_INFO);
    shi_give_back(machine, (uint32_t)local);
    return result;
}

/* ---- smp_call_function_many_cond ---------------------------------------------------------------------- */

struct many {
    uint32_t *cpus, *locals, *ipis;
    uint32_t n, queued, nipis;
    int64_t owner; /* csd that owns the payload, or -1 */
};

static int many_queue(Machine *machine, const struct outgoing *out, struct many *many,
                      uint32_t cpu, bool wait)
{
    struct shi_self *self = &machine->self;
    for (;;) {
        shi_enter(self);
        int64_t local = wait ? shi_csd_get(self) : shi_nowait_get(self);
        int err = 0;
        if (local >= 0) {
            if (many->owner < 0)
                err = shi_outgoing_fill(machine, out, (uint32_t)local);
            else
                shi_outgoing_share(machine, out, (uint32_t)local, (uint32_t)many->owner);
            if (!err)
                err = shi_call_queue(self, (uint32_t)local,
                                     wait ? SHI_CSD_SYNC : SHI_CSD_ASYNC, cpu);
            if (err < 0) {
                shi_csd_put(self, (uint32_t)local);
            } else {
                if (err > 0)
                    many->ipis[many->nipis++] = cpu;
                if (!wait)
                    shi_csd_leave(self, (uint32_t)local);
                many->cpus[many->queued] = cpu;
                many->locals[many->queued++] = (uint32_t)local;
            }
        } else {
            err = (int)local;
            /* About to wait: nobody must wait for doorbells not yet rung. */
            shi_call_ipi_mask(self, many->ipis, many->nipis);
            many->nipis = 0;
        }
        shi_leave(self);
        if (err == -EAGAIN) {
            if (wait_for_room(machine) < 0)
                return -1;
            continue;
        }
        if (err < 0 && err != -ENXIO) { /* offline since: skipped, as the kernel does */
            shi_raise_errno(machine, err, (int)cpu);
            return -1;
        }
        return 0;
    }
}

/* The payload's own csd: it is in nobody's queue, and goes with the last that shares. */
static int many_payload(Machine *machine, const struct outgoing *out, struct many *many)
{
    if (!out->pickle)
        return 0;
    many->owner = get_filled(machine, out, false);
    return many->owner < 0 ? -1 : 0;
}

static void many_drop_payload(Machine *machine, const struct many *many)
{
    if (many->owner < 0)
        return;
    shi_enter(&machine->self);
    shi_csd_end_sharing(&machine->self, (uint32_t)many->owner);
    shi_leave(&machine->self);
}

static int many_wait(Machine *machine, struct many *many)
{
    uint32_t i;
    PyObject *first = NULL;
    int err = 0;
    for (i = 0; i < many->queued; i++) {
        uint32_t local = many->locals[i], cpu = many->cpus[i];
        if (err) { /* interrupted: leave the rest behind, safely */
            leave_behind(machine, local);
            continue;
        }
        if (shi_wait_csd(machine, local, cpu, 0) < 0) {
            err = -1;
            continue;
        }
        PyObject *none = shi_result(machine, local, cpu, SHI_A_INFO);
        shi_give_back(machine, local);
        if (none) {
            Py_DECREF(none);
        } else if (!first) {
            first = shi_take_exception(); /* all have run; the first failure is told */
        } else {
            PyErr_Clear();
        }
    }
    if (first && !err)
        PyErr_SetObject((PyObject *)Py_TYPE(first), first);
    err = err || first ? -1 : 0;
    Py_XDECREF(first);
    return err;
}

static int call_many(Machine *machine, uint32_t *mask, uint32_t n, PyObject *function,
                     PyObject *info, bool wait, bool run_self, PyObject *cond)
{
    struct shi_self *self = &machine->self;
    struct outgoing out;
    struct many many = {.n = n, .owner = -1};
    bool self_in_mask = false;
    int err = -1;
    uint32_t i;
    if (check_context(machine) < 0)
        return -1;
    shi_count(self, SHI_C_calls_many);
    if (shi_outgoing_info(machine, &out, function, info) < 0)
        return -1;
    many.cpus = PyMem_Malloc(sizeof(uint32_t) * (3 * (size_t)n + 1));
    if (!many.cpus) {
        PyErr_NoMemory();
        goto done;
    }
    many.locals = many.cpus + n;
    many.ipis = many.locals + n;
    if (many_payload(machine, &out, &many) < 0)
        goto done;
    err = 0;
    for (i = 0; i < n && !err; i++) {
        if (!self->host && mask[i] == self->id) {
            self_in_mask = true;
            continue;
        }
        if (!shi_word_online(shi_load_relaxed(&shi_slot(&machine->m, mask[i])->word)))
            continue;
        if (cond) {
            PyObject *yes = PyObject_CallFunction(cond, "IO", (unsigned)mask[i], info);
            int truth = yes ? PyObject_IsTrue(yes) : -1;
            Py_XDECREF(yes);
            if (truth < 0)
                err = -1;
            if (truth <= 0)
                continue;
        }
        err = many_queue(machine, &out, &many, mask[i], wait);
    }
    /* The doorbells once, after everything is queued. */
    shi_enter(self);
    shi_call_ipi_mask(self, many.ipis, many.nipis);
    shi_leave(self);
    PyObject *failure = NULL;
    if (!err && run_self && self_in_mask) {
        int truth = 1;
        if (cond) {
            PyObject *yes = PyObject_CallFunction(cond, "IO", (unsigned)self->id, info);
            truth = yes ? PyObject_IsTrue(yes) : -1;
            Py_XDECREF(yes);
        }
        /* Runs while the others do: after the doorbells, before the wait. */
        if (truth < 0 || (truth && run_local(machine, function, info, wait) < 0))
            failure = shi_take_exception();
    } else if (err) {
        failure = shi_take_exception();
    }
    if (wait)
        err = many_wait(machine, &many);
    if (failure) {
        PyErr_Clear();
        PyErr_SetObject((PyObject *)Py_TYPE(failure), failure);
        Py_DECREF(failure);
        err = -1;
    }
    many_drop_payload(machine, &many);
done:
    PyMem_Free(many.cpus);
    shi_outgoing_clear(&out);
    return err;
}

static PyObject *run_many(Machine *machine, PyObject *mask, PyObject *function, PyObject *info,
                          PyObject *wait_arg, bool run_self, PyObject *cond)
{
    uint32_t *cpus, n;
    int wait = as_bool(wait_arg, 1);
    if (wait < 0)
        return NULL;
    if (!PyCallable_Check(function) && Py_TYPE(function) != shi_native_type)
        return PyErr_Format(PyExc_TypeError, "%R is not callable", function);
    if (cond && !PyCallable_Check(cond))
        return PyErr_Format(PyExc_TypeError, "cond_func: %R is not callable", cond);
    if (as_mask(machine, mask, &cpus, &n) < 0)
        return NULL;
    int err = call_many(machine, cpus, n, function, info ? info : Py_None, wait, run_self, cond);
    PyMem_Free(cpus);
    if (err < 0)
        return NULL;
    Py_RETURN_NONE;
}

static PyObject *call_mask(Machine *machine, PyObject *const *args, Py_ssize_t nargs,
                           PyObject *kwnames)
{
    static const char *const names[] = {"mask", "func", "info", "wait"};
    PyObject *a[4];
    if (shi_parse("smp_call_function_many", names, 2, 4, args, nargs, kwnames, a) < 0)
        return NULL;
    return run_many(machine, a[0], a[1], a[2], a[3], false, NULL);
}

static PyObject *call_others(Machine *machine, PyObject *const *args, Py_ssize_t nargs,
                             PyObject *kwnames)
{
    static const char *const names[] = {"func", "info", "wait"};
    PyObject *a[3];
    if (shi_parse("smp_call_function", names, 1, 3, args, nargs, kwnames, a) < 0)
        return NULL;
    return run_many(machine, NULL, a[0], a[1], a[2], false, NULL);
}

static PyObject *each_cpu(Machine *machine, PyObject *const *args, Py_ssize_t nargs,
                          PyObject *kwnames)
{
    static const char *const names[] = {"func", "info", "wait"};
    PyObject *a[3];
    if (shi_parse("on_each_cpu", names, 1, 3, args, nargs, kwnames, a) < 0)
        return NULL;
    return run_many(machine, NULL, a[0], a[1], a[2], true, NULL);
}

static PyObject *each_cpu_mask(Machine *machine, PyObject *const *args, Py_ssize_t nargs,
                               PyObject *kwnames)
{
    static const char *const names[] = {"mask", "func", "info", "wait"};
    PyObject *a[4];
    if (shi_parse("on_each_cpu_mask", names, 2, 4, args, nargs, kwnames, a) < 0)
        return NULL;
    return run_many(machine, a[0], a[1], a[2], a[3], true, NULL);
}

static PyObject *each_cpu_cond_mask(Machine *machine, PyObject *const *args, Py_ssize_t nargs,
                                    PyObject *kwnames)
{
    static const char *const names[] = {"cond_func", "func", "info", "wait", "mask"};
    PyObject *a[5];
    if (shi_parse("on_each_cpu_cond_mask", names, 2, 5, args, nargs, kwnames, a) < 0)
        return NULL;
    return run_many(machine, a[4], a[1], a[2], a[3], true, a[0]);
}

static PyObject *send_reschedule(Machine *machine, PyObject *const *args, Py_ssize_t nargs,
                                 PyObject *kwnames)
{
    static const char *const names[] = {"cpu"};
    PyObject *a[1];
    int64_t cpu;
    if (shi_parse("smp_send_reschedule", names, 1, 1, args, nargs, kwnames, a) < 0 ||
        as_cpu(a[0], &cpu) < 0)
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
        if (PyErr_WarnFormat(shi_py.Warning, 1, "sched: Unexpected reschedule of offline CPU#%d!",
                             (int)cpu) < 0)
            return NULL;
    }
    Py_RETURN_NONE;
}

/* ---- calls with a result ------------------------------------------------------------------------------ */

static PyObject *as_args(PyObject *args, PyObject *kwargs)
{
    if (!PyTuple_CheckExact(args) || (kwargs != Py_None && !PyDict_CheckExact(kwargs))) {
        PyErr_SetString(PyExc_TypeError, "args is a tuple, kwargs a dict or None");
        return NULL;
    }
    return args;
}

static int as_deadline(PyObject *timeout, uint64_t *deadline)
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
    *apply = out.apply;
    int64_t local = get_filled(machine, &out, false);
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
    if (as_cpu(args[0], &cpu) < 0 || as_deadline(args[4], &deadline) < 0)
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
    if (task < 0 || as_cpu(args[0], &cpu) < 0)
        return NULL;
    /* PARKED from the start: the unlock rings, and whoever collects it is woken. */
    int64_t local = post(machine, cpu, args[1], args[2], args[3],
                         (task ? SHI_CSD_TTWU : SHI_CSD_SYNC) | SHI_CSD_PARKED, &apply);
    return local < 0 ? NULL : PyLong_FromLongLong(local);
}

static int as_local(const Machine *machine, PyObject *object, uint32_t *local)
{
    unsigned long value = PyLong_AsUnsignedLong(object);
    if (PyErr_Occurred())
        return -1;
    if (value >= machine->self.sender.csd_top) {
        PyErr_SetString(PyExc_ValueError, "no such call");
        return -1;
    }
    *local = (uint32_t)value;
    return 0;
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
    if (as_local(machine, args[0], &local) < 0 || as_cpu(args[1], &cpu) < 0 ||
        as_deadline(args[2], &deadline) < 0)
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
    leave_behind(machine, local);
    Py_RETURN_NONE;
}

/* ---- CallSingleData -------------------------------------------------------------------------------------- */

typedef struct {
    PyObject_HEAD
    Machine *machine;
    uint32_t local;
    PyObject *function, *info;
} CallSingleData;

PyTypeObject *shi_csd_type;

static PyObject *csd_make(Machine *machine, PyObject *function, PyObject *info)
{
    struct outgoing out;
    if (shi_outgoing_info(machine, &out, function, info) < 0)
        return NULL;
    int64_t local = get_filled(machine, &out, false);
    shi_outgoing_clear(&out);
    if (local < 0)
        return NULL;
    CallSingleData *csd = PyObject_GC_New(CallSingleData, shi_csd_type);
    if (!csd) {
        shi_give_back(machine, (uint32_t)local);
        return NULL;
    }
    csd->machine = (Machine *)Py_NewRef((PyObject *)machine);
    csd->local = (uint32_t)local;
    csd->function = Py_NewRef(function);
    csd->info = Py_NewRef(info);
    PyObject_GC_Track(csd);
    return (PyObject *)csd;
}

static PyObject *csd_new(PyTypeObject *type, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"func", "info", "machine", NULL};
    PyObject *function, *info = Py_None, *machine = NULL;
    (void)type;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "O|O$O!:CallSingleData", names, &function,
                                     &info, shi_machine_type, &machine))
        return NULL;
    Machine *m = machine ? (Machine *)machine : shi_use_current();
    if (!m || shi_use(m) < 0)
        return NULL;
    return csd_make(m, function, info);
}

static int csd_traverse(PyObject *self, visitproc visit, void *arg)
{
    CallSingleData *csd = (CallSingleData *)self;
    Py_VISIT(Py_TYPE(self));
    Py_VISIT(csd->machine);
    Py_VISIT(csd->function);
    Py_VISIT(csd->info);
    return 0;
}

static void csd_dealloc(PyObject *self)
{
    CallSingleData *csd = (CallSingleData *)self;
    PyTypeObject *type = Py_TYPE(self);
    PyObject_GC_UnTrack(self);
    if (csd->machine && !csd->machine->closed && !csd->machine->foreign) {
        if (shi_csd_locked(shi_own_csd(&csd->machine->self, csd->local)))
            leave_behind(csd->machine, csd->local);
        else
            shi_give_back(csd->machine, csd->local);
    }
    Py_XDECREF(csd->machine);
    Py_XDECREF(csd->function);
    Py_XDECREF(csd->info);
    type->tp_free(self);
    Py_DECREF(type);
}

static PyObject *csd_get_locked(PyObject *self, void *unused)
{
    CallSingleData *csd = (CallSingleData *)self;
    (void)unused;
    if (csd->machine->closed || csd->machine->foreign)
        Py_RETURN_FALSE;
    return PyBool_FromLong(shi_csd_locked(shi_own_csd(&csd->machine->self, csd->local)));
}

static PyObject *csd_get_func(PyObject *self, void *unused)
{
    (void)unused;
    return Py_NewRef(((CallSingleData *)self)->function);
}

static PyObject *csd_get_info(PyObject *self, void *unused)
{
    (void)unused;
    return Py_NewRef(((CallSingleData *)self)->info);
}

static PyGetSetDef csd_getset[] = {
    {"locked", csd_get_locked, NULL, "True while a submission of it has not been taken up.", NULL},
    {"func", csd_get_func, NULL, "The function.", NULL},
    {"info", csd_get_info, NULL, "Its argument, as it was when this was made.", NULL},
    {NULL, NULL, NULL, NULL, NULL},
};

static PyType_Slot csd_slots[] = {
    {Py_tp_new, csd_new},
    {Py_tp_dealloc, csd_dealloc},
    {Py_tp_traverse, csd_traverse},
    {Py_tp_getset, csd_getset},
    {Py_tp_doc,
     "CallSingleData(func, info=None)\n--\n\n"
     "A caller-owned request (the kernel's call_single_data_t).\n\n"
     "`func` and `info` are pickled and registered now, so that submitting it never\n"
     "allocates and never blocks.  It may be submitted again as soon as `locked` is False."},
    {0, NULL},
};
static PyType_Spec csd_spec = {
    .name = "shmipi._core.CallSingleData",
    .basicsize = sizeof(CallSingleData),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC,
    .slots = csd_slots,
};

int shi_csd_types(PyObject *module)
{
    if (!shi_csd_type)
        shi_csd_type = (PyTypeObject *)PyType_FromSpec(&csd_spec);
    return shi_csd_type ? PyModule_AddObjectRef(module, "CallSingleData",
                                                (PyObject *)shi_csd_type)
                        : -1;
}

static PyObject *single_async(Machine *machine, PyObject *const *args, Py_ssize_t nargs,
                              PyObject *kwnames)
{
    static const char *const names[] = {"cpu", "csd"};
    PyObject *a[2];
    int64_t cpu;
    if (shi_parse("smp_call_function_single_async", names, 2, 2, args, nargs, kwnames, a) < 0 ||
        as_cpu(a[0], &cpu) < 0)
        return NULL;
    if (Py_TYPE(a[1]) != shi_csd_type)
        return PyErr_Format(PyExc_TypeError, "csd is a CallSingleData, not %R", Py_TYPE(a[1]));
    CallSingleData *csd = (CallSingleData *)a[1];
    struct shi_self *self = &machine->self;
    if (csd->machine != machine) {
        PyErr_SetString(PyExc_ValueError, "this CallSingleData belongs to another machine");
        return NULL;
    }
    if (shi_csd_locked(shi_own_csd(self, csd->local)))
        return shi_raise_errno(machine, -EBUSY, (int)cpu);
    shi_count(self, SHI_C_calls_single);
    if (!self->host && cpu == self->id) {
        if (run_local(machine, csd->function, csd->info, false) < 0)
            return NULL;
        Py_RETURN_NONE;
    }
    if (cpu < 0 || cpu >= machine->m.ncpus)
        return shi_raise_errno(machine, -ENXIO, (int)cpu);
    shi_enter(self);
    int err = shi_call_single(self, csd->local, SHI_CSD_ASYNC, (uint32_t)cpu);
    shi_leave(self);
    if (err)
        return shi_raise_errno(machine, err, (int)cpu);
    Py_RETURN_NONE;
}

/* ---- methods, and the same on the current machine -------------------------------------------------------- */


#define SMP(name, impl)                                                                          \
    static PyObject *method_##name(PyObject *m, PyObject *const *args, Py_ssize_t nargs,         \
                                   PyObject *kwnames)                                            \
    {                                                                                            \
        return shi_use((Machine *)m) < 0 ? NULL : impl((Machine *)m, args, nargs, kwnames);      \
    }                                                                                            \
    static PyObject *function_##name(PyObject *module, PyObject *const *args, Py_ssize_t nargs,  \
                                     PyObject *kwnames)                                          \
    {                                                                                            \
        Machine *m = shi_use_current();                                                          \
        (void)module;                                                                            \
        return m ? impl(m, args, nargs, kwnames) : NULL;                                         \
    }
SMP(smp_call_function_single, call_single)
SMP(smp_call_function_single_async, single_async)
SMP(smp_call_function_many, call_mask)
SMP(smp_call_function, call_others)
SMP(on_each_cpu, each_cpu)
SMP(on_each_cpu_mask, each_cpu_mask)
SMP(on_each_cpu_cond_mask, each_cpu_cond_mask)
SMP(smp_send_reschedule, send_reschedule)
#undef SMP

#define FAST(function) ((PyCFunction)(void (*)(void))(function))

#define DOC_SINGLE                                                                               \
    "smp_call_function_single(cpu, func, info=None, wait=True)\n--\n\n"                          \
    "Run func(info) on `cpu` as an IPI handler.\n\n"                                             \
    "On the calling CPU itself func runs inline with interrupts off, without a doorbell.\n"      \
    "wait=True returns when func has returned; its exception is raised here as\n"                \
    "RemoteCallError.  wait=False draws from a pool of 64 requests per sender and waits\n"       \
    "only when that is empty (the kernel has one request and waits for that).\n\n"               \
    "Raises CpuOfflineError (ENXIO) for a CPU that is offline or does not exist,\n"              \
    "CpuDiedError when it dies meanwhile, IpiDeadlockError (EDEADLK).  kernel/smp.c."
#define DOC_ASYNC                                                                                \
    "smp_call_function_single_async(cpu, csd)\n--\n\n"                                           \
    "Submit a caller-owned CallSingleData.  Never allocates, never waits; legal with\n"          \
    "interrupts disabled and in handlers.  Raises CsdBusyError (EBUSY) while it is in use,\n"    \
    "CpuOfflineError (ENXIO)."
#define DOC_MANY                                                                                 \
    "smp_call_function_many(mask, func, info=None, wait=True)\n--\n\n"                           \
    "Run func(info) on every online CPU of `mask` but the calling one.  Offline CPUs are\n"      \
    "skipped.  `mask`: CpuMask, cpulist string or iterable of CPU numbers."
#define DOC_ALL                                                                                  \
    "smp_call_function(func, info=None, wait=True)\n--\n\n"                                      \
    "Run func(info) on all other online CPUs."
#define DOC_EACH                                                                                 \
    "on_each_cpu(func, info=None, wait=True)\n--\n\n"                                            \
    "Run func(info) on all online CPUs, the calling one included: there it runs after the\n"     \
    "doorbells were rung and before the wait, with interrupts off."
#define DOC_EACH_MASK                                                                            \
    "on_each_cpu_mask(mask, func, info=None, wait=True)\n--\n\n"                                 \
    "on_each_cpu for the CPUs of `mask`."
#define DOC_COND                                                                                 \
    "on_each_cpu_cond_mask(cond_func, func, info=None, wait=True, mask=None)\n--\n\n"            \
    "on_each_cpu_mask for the CPUs for which cond_func(cpu, info) is true: asked once per\n"     \
    "CPU at send time, for the calling CPU after the IPIs went out.  mask=None: all."
#define DOC_RESCHED                                                                              \
    "smp_send_reschedule(cpu)\n--\n\n"                                                           \
    "Nudge `cpu`: a reschedule IPI, or only a flag where it is polling.  An offline CPU is\n"    \
    "warned about (ShmipiWarning) and not sent to."

#define ENTRY(kind, name, doc) {#name, FAST(kind##_##name), METH_FASTCALL | METH_KEYWORDS, doc}
#define ENTRIES(kind)                                                                            \
    ENTRY(kind, smp_call_function_single, DOC_SINGLE),                                           \
        ENTRY(kind, smp_call_function_single_async, DOC_ASYNC),                                  \
        ENTRY(kind, smp_call_function_many, DOC_MANY), ENTRY(kind, smp_call_function, DOC_ALL),  \
        ENTRY(kind, on_each_cpu, DOC_EACH), ENTRY(kind, on_each_cpu_mask, DOC_EACH_MASK),        \
        ENTRY(kind, on_each_cpu_cond_mask, DOC_COND), ENTRY(kind, smp_send_reschedule, DOC_RESCHED)

PyMethodDef shi_call_methods[] = {
    ENTRIES(method),
    {"call", FAST(machine_call), METH_FASTCALL,
     "call(cpu, func, args, kwargs, timeout)\n--\n\nfunc(*args, **kwargs) on cpu: its result."},
    {"post", FAST(machine_post), METH_FASTCALL,
     "post(cpu, func, args, kwargs, task)\n--\n\nStart a call (or a task): its number."},
    {"done", (PyCFunction)machine_done, METH_O, "done(call)\n--\n\nHas a posted call ended?"},
    {"collect", FAST(machine_collect), METH_FASTCALL,
     "collect(call, cpu, timeout)\n--\n\nWait for a posted call: its result."},
    {"abandon", (PyCFunction)machine_abandon, METH_O,
     "abandon(call)\n--\n\nNobody will collect this posted call."},
    {NULL, NULL, 0, NULL},
};

PyMethodDef shi_call_functions[] = {
    ENTRIES(function),
    {NULL, NULL, 0, NULL},
};
