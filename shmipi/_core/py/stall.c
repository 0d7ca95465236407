/* SPDX-License-Identifier: MIT */
#include "py/stall.h"

#include "base/clock.h"
#include "base/native.h"
#include "smp/stall.h"
#include "py/codec.h"
#include "py/func.h"
#include "py/tables.h"

/* What shmipi/smp/csdlock.py gives: (machine, bug, messages, cpu, seconds, index of the csd),
 * and (machine, bug, cpu, seconds). */
static PyObject *say_stalled, *say_unstuck;

static double seconds(uint64_t ns)
{
    return (double)ns / 1e9;
}

int shi_stalled(void *arg, const struct shi_stall *stall, uint32_t index, uint32_t dst)
{
    Machine *machine = arg;
    uint64_t waited = shi_now_ns() - stall->begun_ns;
    if (!say_stalled)
        return 0;
    PyObject *done = PyObject_CallFunction(say_stalled, "OIIIdI", (PyObject *)machine,
                                           stall->bug, stall->messages, dst, seconds(waited),
                                           index);
    Py_XDECREF(done);
    return done ? 0 : -EINTR;
}

void shi_unstuck(void *arg, const struct shi_stall *stall, uint32_t index, uint32_t dst)
{
    Machine *machine = arg;
    (void)index;
    if (!say_unstuck)
        return;
    PyObject *pending = PyErr_Occurred() ? shi_take_exception() : NULL;
    PyObject *done = PyObject_CallFunction(say_unstuck, "OIId", (PyObject *)machine, stall->bug,
                                           dst, seconds(shi_now_ns() - stall->begun_ns));
    if (!done)
        PyErr_WriteUnraisable(NULL);
    Py_XDECREF(done);
    shi_put_exception(pending);
}

/* ---- what there is to say ---------------------------------------------------------- */

/* The name of a machine's native handler; NULL: it has none of that number. */
static const char *native_name(const Machine *machine, uint32_t func)
{
    uint32_t number = func & ~SHI_FUNC_NATIVE, i;
    for (i = 0; machine->natives && i < SHI_NATIVE_MAX; i++)
        if (machine->natives[i] == number + 1)
            return shi_native_name_of(i);
    return machine->natives ? NULL : shi_native_name_of(number);
}

static PyObject *info_text(uint32_t kind, uint64_t info)
{
    switch (kind) {
    case SHI_K_NONE:
        return PyUnicode_FromString("None");
    case SHI_K_INT:
        return PyUnicode_FromFormat("%lld", (long long)info);
    case SHI_K_BOOL:
        return PyUnicode_FromString(info ? "True" : "False");
    case SHI_K_POINTER:
        return PyUnicode_FromFormat("segment+0x%llx", (unsigned long long)info);
    default:
        return PyUnicode_FromString("...");
    }
}

/* Of what travels by value: its name is in the payload, which is the sender's own. */
static PyObject *pickled_name(Machine *machine, const struct shi_csd *csd)
{
    PyObject *bytes = csd->kind == SHI_K_PICKLE
                          ? shi_payload_bytes(machine, machine->self.id, &csd->value.ref)
                          : NULL;
    PyObject *value = bytes ? PyObject_CallOneArg(shi_py.loads, bytes) : NULL, *name = NULL;
    if (value && PyTuple_Check(value) && PyTuple_GET_SIZE(value)) {
        name = PyObject_GetAttrString(PyTuple_GET_ITEM(value, 0), "__qualname__");
        if (!name) {
            PyErr_Clear();
            name = PyObject_Repr(PyTuple_GET_ITEM(value, 0));
        }
    }
    Py_XDECREF(value);
    Py_XDECREF(bytes);
    PyErr_Clear();
    return name ? name : Py_NewRef(Py_None);
}

/* csd_what(index) -> (name of the function of that csd or None, its argument): by its sender. */
METHOD(csd_what)
{
    Machine *machine = MACHINE(object);
    uint32_t index;
    if (shi_as_slot(arg, machine->m.ncsds, &index) < 0)
        return NULL;
    const struct shi_csd *csd = shi_csd(&machine->m, index);
    uint32_t func = csd->func;
    PyObject *info = info_text(csd->kind, csd->value.u);
    if (func & SHI_FUNC_NATIVE)
        return Py_BuildValue("zN", native_name(machine, func), info);
    if (index >> machine->m.csd_shift != machine->self.id)
        return Py_BuildValue("zN", NULL, info);
    if (csd->apply & SHI_A_INLINE_FUNC)
        return Py_BuildValue("NN", pickled_name(machine, csd), info);
    return Py_BuildValue("NN", shi_function_name(machine, func), info);
}

/* cur_csd(cpu) -> None, or (index of the csd that it executes, name of its function or None,
 * its argument): cur_csd, cur_csd_func and cur_csd_info. */
METHOD(cur_csd)
{
    Machine *machine = MACHINE(object);
    char name[SHI_HANDLER_NAME + 1] = { 0 };
    uint32_t cpu;
    if (shi_as_slot(arg, machine->m.ncpus, &cpu) < 0)
        return NULL;
    const struct shi_slot *slot = shi_slot(&machine->m, cpu);
    /* Acquire pairs with shi_csd_record. */
    uint32_t number = shi_load_acquire(&slot->cur_csd);
    uint32_t func = shi_load_relaxed(&slot->cur_csd_func);
    if (!number)
        Py_RETURN_NONE;
    PyObject *info =
        info_text(shi_load_relaxed(&slot->cur_csd_kind), shi_load_relaxed(&slot->cur_csd_info));
    if (func & SHI_FUNC_NATIVE)
        return Py_BuildValue("IzN", number - 1, native_name(machine, func), info);
    if (!shi_load_acquire(&slot->handler)) /* being unpickled */
        return Py_BuildValue("IzN", number - 1, NULL, info);
    memcpy(name, slot->handler_name, SHI_HANDLER_NAME);
    return Py_BuildValue("INN", number - 1,
                         PyUnicode_DecodeUTF8(name, (Py_ssize_t)strlen(name), "replace"), info);
}

/* masked(cpu) -> bool: has a kick found its interrupts off, that have not come on since? */
METHOD(masked)
{
    Machine *machine = MACHINE(object);
    uint32_t cpu;
    if (shi_as_slot(arg, machine->m.ncpus, &cpu) < 0)
        return NULL;
    return PyBool_FromLong(shi_load_acquire(&shi_slot(&machine->m, cpu)->masked) != 0);
}

METHOD(csd_lock_is_stuck)
{
    (void)arg;
    if (shi_use(MACHINE(object)) < 0)
        return NULL;
    return PyBool_FromLong(shi_stall_any(&MACHINE(object)->m));
}

METHOD(csd_may_dump)
{
    Machine *machine = MACHINE(object);
    uint32_t cpu;
    if (shi_as_slot(arg, machine->m.ncpus, &cpu) < 0)
        return NULL;
    return PyBool_FromLong(shi_stall_may_dump(&machine->self, cpu));
}

METHOD(csd_resend)
{
    Machine *machine = MACHINE(object);
    uint32_t cpu;
    if (shi_as_slot(arg, machine->m.ncpus, &cpu) < 0 || shi_use(machine) < 0)
        return NULL;
    shi_stall_resend(&machine->self, cpu);
    Py_RETURN_NONE;
}

/* csd_lock_params() -> (csd_lock_timeout, panic_on_ipistall), in ms. */
METHOD(csd_lock_params)
{
    const struct shi_header *h = MACHINE(object)->m.header;
    (void)arg;
    return Py_BuildValue("II", shi_load_relaxed(&h->csd_lock_timeout),
                         shi_load_relaxed(&h->panic_on_ipistall));
}

METHOD(set_csd_lock_params)
{
    struct shi_header *h = MACHINE(object)->m.header;
    unsigned timeout, panic;
    if (!PyArg_ParseTuple(arg, "II", &timeout, &panic) || shi_use(MACHINE(object)) < 0)
        return NULL;
    shi_store_full(&h->csd_lock_timeout, timeout);
    shi_store_full(&h->panic_on_ipistall, panic);
    Py_RETURN_NONE;
}

/* csd_index(call) -> through all slots; where a posted call lies. */
METHOD(csd_index)
{
    const struct shi_self *self = &MACHINE(object)->self;
    unsigned long long call = PyLong_AsUnsignedLongLong(arg);
    if (PyErr_Occurred())
        return NULL;
    if ((uint32_t)call >= self->sender.csd_top)
        return PyErr_Format(PyExc_ValueError, "no such call");
    return PyLong_FromUnsignedLong(shi_own_index(self, (uint32_t)call));
}

/* ---- waits that are Python's: of a future, of a task --------------------------------- */

/* stall_due(stall, call, task) -> bool, as shi_stall_due: `stall` is a bytearray of STALL_BYTES.
 * Of a task it is due while the call stands in the target's queue: once it was taken, who has
 * not begun waits for the task before it. */
METHOD(stall_due)
{
    Machine *machine = MACHINE(object);
    struct shi_self *self = &machine->self;
    unsigned long long call;
    PyObject *memory;
    struct shi_stall stall;
    int task;
    if (!PyArg_ParseTuple(arg, "O!Kp", &PyByteArray_Type, &memory, &call, &task) ||
        shi_use(machine) < 0)
        return NULL;
    if (PyByteArray_GET_SIZE(memory) != sizeof stall || (uint32_t)call >= self->sender.csd_top)
        return PyErr_Format(PyExc_ValueError, "stall_due(stall, call, task)");
    memcpy(&stall, PyByteArray_AS_STRING(memory), sizeof stall);
    const struct shi_csd *csd = shi_own_csd(self, (uint32_t)call);
    uint64_t lock = shi_load_acquire(&csd->lock);
    uint32_t dst = (uint16_t)(lock >> SHI_CSD_DST_SHIFT);
    struct shi_csd seen = { 0 };
    if (task && (lock & SHI_CSD_BEGUN || dst >= machine->m.ncpus ||
                 !shi_word_head(shi_load_acquire(&shi_slot(&machine->m, dst)->word))))
        lock = 0;
    shi_store_relaxed(&seen.lock, task ? lock & ~SHI_CSD_TYPE : lock);
    bool due = shi_stall_due(self, &stall, &seen);
    memcpy(PyByteArray_AS_STRING(memory), &stall, sizeof stall);
    return due ? Py_BuildValue("IId", stall.bug, stall.messages,
                               seconds(shi_now_ns() - stall.begun_ns))
               : Py_NewRef(Py_None);
}

/* stall_over(stall) -> None, or (bug, how long it was waited for, in s). */
METHOD(stall_over)
{
    Machine *machine = MACHINE(object);
    struct shi_stall stall;
    if (!PyByteArray_Check(arg) || PyByteArray_GET_SIZE(arg) != sizeof stall)
        return PyErr_Format(PyExc_ValueError, "stall_over(stall)");
    memcpy(&stall, PyByteArray_AS_STRING(arg), sizeof stall);
    memset(PyByteArray_AS_STRING(arg), 0, sizeof stall);
    if (!stall.bug || shi_gone(machine))
        Py_RETURN_NONE;
    shi_stall_over(&machine->self, &stall);
    return Py_BuildValue("Id", stall.bug, seconds(shi_now_ns() - stall.begun_ns));
}

/* on_csd_stall(stalled, unstuck): who says so. */
static PyObject *on_csd_stall(PyObject *module, PyObject *args)
{
    PyObject *stalled, *unstuck;
    (void)module;
    if (!PyArg_ParseTuple(args, "OO", &stalled, &unstuck))
        return NULL;
    Py_XSETREF(say_stalled, Py_NewRef(stalled));
    Py_XSETREF(say_unstuck, Py_NewRef(unstuck));
    Py_RETURN_NONE;
}

PyMethodDef shi_stall_functions[] = {
    { "on_csd_stall", on_csd_stall, METH_VARARGS,
      "on_csd_stall(stalled, unstuck): who says that a wait is stalled, and that it is over" },
    { NULL, NULL, 0, NULL },
};

PyMethodDef shi_stall_methods[] = {
    ONE(csd_what, "csd_what(index) -> (name of its function or None, its argument)"),
    ONE(csd_index, "csd_index(call) -> index of its csd through all slots"),
    ONE(cur_csd, "cur_csd(cpu) -> (csd, function or None, argument), or None"),
    ONE(masked, "masked(cpu) -> bool: a kick found its interrupts off"),
    NOARGS(csd_lock_is_stuck, "Is there a wait that was complained of?"),
    ONE(csd_may_dump, "csd_may_dump(cpu) -> bool: once each time that it takes its queue"),
    ONE(csd_resend, "csd_resend(cpu): send its IPI again"),
    NOARGS(csd_lock_params, "(csd_lock_timeout, panic_on_ipistall), in ms; 0: never."),
    MANY(set_csd_lock_params, "set_csd_lock_params(csd_lock_timeout, panic_on_ipistall)"),
    MANY(stall_due, "stall_due(stall, call, task) -> (bug, messages, seconds) or None"),
    ONE(stall_over, "stall_over(stall) -> (bug, seconds) or None"),
    { NULL, NULL, 0, NULL },
};
