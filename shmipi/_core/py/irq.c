/* SPDX-License-Identifier: MIT */
/* irq descriptors and coprocessors as Python drives them. */
#include "py/base.h"

#include "base/event.h"
#include "irq/chip.h"
#include "irq/ipi.h"
#include "irq/irqdesc.h"
#include "py/entry.h"
#include "py/chip.h"
#include "py/func.h"
#include "py/irq.h"
#include "py/line.h"
#include "py/native.h"
#include "py/outgoing.h"
#include "py/tables.h"

/* ---- descriptors ----------------------------------------------------------------- */

/* irq_free_undo(): free the descriptors that `undo` names.  The tables are locked. */
METHOD(irq_free_undo)
{
    Machine *machine = MACHINE(object);
    (void)arg;
    if (shi_use(machine) < 0)
        return NULL;
    shi_enter(&machine->self);
    shi_irq_free_undo(&machine->self);
    shi_leave(&machine->self);
    Py_RETURN_NONE;
}

/* What a native handler gets: 0, or -1 with an exception. */
int shi_native_request(Machine *machine, struct shi_irqdesc *desc, PyObject *handler,
                       PyObject *info, uint32_t stride)
{
    int64_t number = shi_native_number(machine, handler);
    uint32_t native = (uint32_t)number;
    struct outgoing out;
    if (number < 0)
        return -1;
    if (info == Py_None) {
        shi_irqdesc_set_native(desc, native, SHI_K_NONE, 0, 0);
        return 0;
    }
    if (shi_outgoing_info(machine, &out, handler, info) < 0)
        return -1;
    int err = 0;
    if (out.call.kind == SHI_K_INT || out.call.kind == SHI_K_POINTER) {
        shi_irqdesc_set_native(desc, native, out.call.kind, out.call.value.u, stride);
    } else {
        PyErr_SetString(PyExc_TypeError, "a native irq handler takes None, an int, or a shared "
                                         "array");
        err = -1;
    }
    shi_outgoing_clear(machine, &out);
    return err;
}

/* Behind the irqs, the handlers of NMIs; behind those, the actions of softirqs. */
#define HELD_SOFTIRQ (SHI_NR_IRQS + SHI_NMI_MAX * SHI_NMI_ACTIONS)
#define HELD (HELD_SOFTIRQ + SHI_NR_SOFTIRQS)

static struct shi_irqdesc *held_for(const struct shi_machine *m, uint32_t place)
{
    if (place >= HELD_SOFTIRQ)
        return &shi_irq_area(m)->softirq[place - HELD_SOFTIRQ];
    return place < SHI_NR_IRQS ? &shi_irq_area(m)->desc[place]
                               : &shi_irq_area(m)->nmi.action[0][0] + (place - SHI_NR_IRQS);
}

static uint32_t place_of(const struct shi_machine *m, const struct shi_irqdesc *desc)
{
    const struct shi_irqdesc *first = &shi_irq_area(m)->desc[0];
    const struct shi_irqdesc *softirq = &shi_irq_area(m)->softirq[0];
    if (desc >= softirq && desc < softirq + SHI_NR_SOFTIRQS)
        return HELD_SOFTIRQ + (uint32_t)(desc - softirq);
    return desc >= first && desc < first + SHI_NR_IRQS
               ? (uint32_t)(desc - first)
               : SHI_NR_IRQS + (uint32_t)(desc - &shi_irq_area(m)->nmi.action[0][0]);
}

void shi_irq_let_go(Machine *machine)
{
    struct shi_self *self = &machine->self;
    uint32_t place;
    for (place = 0; machine->irq_held && place < HELD; place++) {
        uint32_t held = machine->irq_held[place];
        const struct shi_irqdesc *desc = held_for(&machine->m, place);
        if (!held)
            continue;
        uint32_t serial =
            shi_load_relaxed(&shi_func_entry(&machine->m, self->id, held - 1)->serial);
        const struct shi_irqdesc mine = {
            .func = held - 1, .serial = serial, .src = (uint16_t)self->id, .src_gen = self->gen
        };
        if (shi_load_acquire(&desc->action) == SHI_IA_PYTHON && shi_same_handler(desc, &mine))
            continue;
        machine->irq_held[place] = 0;
        shi_enter(self);
        shi_func_drop(self, held - 1);
        shi_leave(self);
    }
}

int shi_python_request(Machine *machine, struct shi_irqdesc *desc, PyObject *handler)
{
    struct shi_self *self = &machine->self;
    uint32_t place = place_of(&machine->m, desc);
    if (!machine->irq_held) {
        machine->irq_held = PyMem_Calloc(HELD, sizeof *machine->irq_held);
        if (!machine->irq_held) {
            PyErr_NoMemory();
            return -1;
        }
    }
    if (!shi_function_by_number(handler)) {
        PyErr_SetString(PyExc_TypeError, "an irq handler is a function or a NativeHandler");
        return -1;
    }
    int64_t index = shi_function_number(machine, handler);
    if (index < 0)
        return -1;
    uint32_t old = machine->irq_held[place];
    shi_enter(self);
    shi_func_hold(self, (uint32_t)index);
    shi_irqdesc_set_python(
        self, desc, (uint32_t)index,
        shi_load_relaxed(&shi_func_entry(&machine->m, self->id, (uint32_t)index)->serial));
    machine->irq_held[place] = (uint32_t)index + 1;
    if (old)
        shi_func_drop(self, old - 1); /* after: whoever takes the irq now finds the new one */
    shi_leave(self);
    return 0;
}

/* irq_request(virq, handler, info, stride=0): publish the handler; a number: do what taking
 * that line of the chip means.  With a stride, the native handler of CPU n gets what lies n
 * strides after `info`.  The table is locked. */
METHOD(irq_request)
{
    Machine *machine = MACHINE(object);
    unsigned virq, stride = 0;
    PyObject *handler, *info;
    if (!PyArg_ParseTuple(arg, "IOO|I", &virq, &handler, &info, &stride) ||
        shi_use(machine) < 0)
        return NULL;
    struct shi_irqdesc *desc = shi_irqdesc(&machine->m, virq);
    if (!desc) {
        PyErr_Format(PyExc_ValueError, "no virq %u", virq);
        return NULL;
    }
    if (Py_IS_TYPE(handler, shi_native_type)) {
        if (shi_native_request(machine, desc, handler, info, stride) < 0)
            return NULL;
        shi_irq_let_go(machine);
        Py_RETURN_NONE;
    }
    if (PyLong_Check(handler)) {
        unsigned long line = PyLong_AsUnsignedLong(handler);
        if (PyErr_Occurred() || shi_check_line(machine, (unsigned)line) < 0)
            return NULL;
        shi_irqdesc_set_line(desc, (uint32_t)line);
        shi_irq_let_go(machine);
        Py_RETURN_NONE;
    }
    if (shi_python_request(machine, desc, handler) < 0)
        return NULL;
    shi_irq_let_go(machine);
    Py_RETURN_NONE;
}

/* irq_free(virq): withdraw it. */
METHOD(irq_free)
{
    Machine *machine = MACHINE(object);
    unsigned long virq = PyLong_AsUnsignedLong(arg);
    struct shi_irqdesc *desc = PyErr_Occurred() ? NULL
                                                : shi_irqdesc(&machine->m, (uint32_t)virq);
    if (PyErr_Occurred())
        return NULL;
    if (desc)
        shi_irqdesc_clear(desc);
    if (!shi_gone(machine))
        shi_irq_let_go(machine);
    Py_RETURN_NONE;
}

/* irq_reset_line(line, virq): masked, not pending, counted from zero: at every CPU, or at
 * those of the irq where others have the line elsewhere. */
METHOD(irq_reset_line)
{
    Machine *machine = MACHINE(object);
    unsigned line, virq;
    if (!PyArg_ParseTuple(arg, "II", &line, &virq) || shi_use(machine) < 0 ||
        shi_check_line(machine, line) < 0)
        return NULL;
    if (virq >= SHI_NR_IRQS)
        return PyErr_Format(PyExc_ValueError, "there is no irq %u", virq);
    shi_enter(&machine->self);
    shi_irqdesc_reset_line(&machine->self, line, virq);
    shi_leave(&machine->self);
    Py_RETURN_NONE;
}

/* ---- sending --------------------------------------------------------------------- */

/* A number of CPU or irq: false for what is none, or no plain int. */
static bool as_number(PyObject *object, uint32_t *number)
{
    int overflow;
    if (!PyLong_CheckExact(object))
        return false;
    long value = PyLong_AsLongAndOverflow(object, &overflow);
    *number = (uint32_t)value;
    return !overflow && value >= 0 && value <= INT32_MAX;
}

/* What was sent to this CPU itself is taken now. */
static PyObject *sent(Machine *machine, int err)
{
    if (!machine->self.host)
        shi_after_enable(machine);
    return PyBool_FromLong(!err);
}

/* ipi_sends(on): may the core send IPIs of domains in the controller's place? */
METHOD(ipi_sends)
{
    int on = PyObject_IsTrue(arg);
    if (on < 0)
        return NULL;
    MACHINE(object)->sends_ipis = on;
    Py_RETURN_NONE;
}

static PyObject *send_single(Machine *machine, PyObject *const *args, Py_ssize_t nargs)
{
    uint32_t virq, cpu;
    if (!machine->sends_ipis || nargs != 2 || !as_number(args[0], &virq) ||
        !as_number(args[1], &cpu))
        Py_RETURN_FALSE;
    shi_enter(&machine->self);
    int err = shi_ipi_send_single(&machine->self, virq, cpu);
    shi_leave(&machine->self);
    return sent(machine, err);
}

/* ipi_send_single(virq, cpu) -> bool: sent, or not plainly right. */
static PyObject *machine_ipi_send_single(PyObject *object, PyObject *const *args,
                                         Py_ssize_t nargs)
{
    return shi_use(MACHINE(object)) < 0 ? NULL : send_single(MACHINE(object), args, nargs);
}

/* The same on the machine of this process: a sender's time counts. */
static PyObject *current_ipi_send_single(PyObject *module, PyObject *const *args,
                                         Py_ssize_t nargs)
{
    Machine *machine = shi_use_current();
    (void)module;
    return machine ? send_single(machine, args, nargs) : NULL;
}

/* The bits of an int: false without an exception for CPUs that no machine has. */
static bool bits_of_int(PyObject *bits, uint64_t *words, uint32_t n)
{
    words[0] = PyLong_AsUnsignedLongLong(bits);
    if (words[0] != UINT64_MAX || !PyErr_Occurred())
        return true;
    PyErr_Clear();
    PyObject *bytes = PyObject_CallMethod(bits, "to_bytes", "ns", (Py_ssize_t)n * 8, "little");
    if (bytes)
        memcpy(words, PyBytes_AS_STRING(bytes), (size_t)n * 8); /* as the segment: little */
    PyErr_Clear();
    Py_XDECREF(bytes);
    return bytes != NULL;
}

static bool set_bits(uint64_t *words, uint32_t n, uint64_t first, uint64_t last)
{
    if (first > last || last / 64 >= n)
        return false;
    for (; first <= last; first++)
        words[first / 64] |= 1ull << (first % 64);
    return true;
}

static bool number_at(const char **at, uint64_t *number)
{
    const char *begin = *at;
    for (*number = 0; **at >= '0' && **at <= '9' && *at - begin < 9; ++*at)
        *number = *number * 10 + (uint64_t)(**at - '0');
    return *at != begin;
}

/* Numbers and ranges; what else a cpulist can be is not read here. */
static bool bits_of_text(PyObject *text, uint64_t *words, uint32_t n, uint32_t ncpus)
{
    const char *at = PyUnicode_AsUTF8(text);
    uint64_t first, last;
    if (!at) {
        PyErr_Clear();
        return false;
    }
    if (!strcmp(at, "all"))
        return set_bits(words, n, 0, ncpus - 1);
    do {
        if (!number_at(&at, &first))
            return false;
        last = first;
        if (*at == '-' && (at++, !number_at(&at, &last)))
            return false;
        if (!set_bits(words, n, first, last))
            return false;
    } while (*at == ',' && *++at);
    return !*at && at[-1] != ',';
}

static bool bits_of_numbers(PyObject *sequence, uint64_t *words, uint32_t n)
{
    Py_ssize_t i;
    for (i = 0; i < PySequence_Fast_GET_SIZE(sequence); i++) {
        uint32_t cpu;
        if (!as_number(PySequence_Fast_GET_ITEM(sequence, i), &cpu) ||
            !set_bits(words, n, cpu, cpu))
            return false;
    }
    return true;
}

/* shmipi.CpuMask, borrowed; NULL with an exception. */
static PyTypeObject *cpumask_type(void)
{
    static PyObject *type;
    PyObject *module = type ? NULL : shi_import("shmipi.cpumask");
    if (module)
        type = PyObject_GetAttrString(module, "CpuMask");
    Py_XDECREF(module);
    return (PyTypeObject *)type;
}

/* The CPUs that a mask names, where it is one that is read without Python code. */
static bool mask_bits(PyObject *mask, uint64_t *words, uint32_t n, uint32_t ncpus)
{
    if (Py_IS_TYPE(mask, cpumask_type())) {
        PyObject *bits = PyObject_GetAttrString(mask, "_bits");
        bool good = bits && PyLong_CheckExact(bits) && bits_of_int(bits, words, n);
        PyErr_Clear();
        Py_XDECREF(bits);
        return good;
    }
    if (PyUnicode_CheckExact(mask))
        return bits_of_text(mask, words, n, ncpus);
    return (PyList_CheckExact(mask) || PyTuple_CheckExact(mask)) &&
           bits_of_numbers(mask, words, n);
}

/* ipi_send_all(virq, by_groups) -> bool: to all that it was reserved for. */
static PyObject *machine_ipi_send_all(PyObject *object, PyObject *const *args, Py_ssize_t nargs)
{
    Machine *machine = MACHINE(object);
    uint32_t virq;
    if (shi_use(machine) < 0)
        return NULL;
    if (!machine->sends_ipis || nargs != 2 || !as_number(args[0], &virq))
        Py_RETURN_FALSE;
    shi_enter(&machine->self);
    int err = shi_ipi_send_mask(&machine->self, virq, NULL, 0, args[1] == Py_True);
    shi_leave(&machine->self);
    return sent(machine, err);
}

/* ipi_send_mask(virq, mask, by_groups) -> bool: sent, or not plainly right.  `by_groups`: one
 * write for each group of CPUs. */
static PyObject *machine_ipi_send_mask(PyObject *object, PyObject *const *args,
                                       Py_ssize_t nargs)
{
    Machine *machine = MACHINE(object);
    uint32_t virq, n = shi_affinity_words(machine->m.ncpus);
    uint64_t few[4] = { 0 }, *words = few;
    int err = -EINVAL;
    if (shi_use(machine) < 0 || !cpumask_type())
        return NULL;
    if (!machine->sends_ipis || nargs != 3 || !as_number(args[0], &virq))
        Py_RETURN_FALSE;
    if (n > sizeof few / sizeof *few && !(words = PyMem_Calloc(n, sizeof *words)))
        return PyErr_NoMemory();
    if (mask_bits(args[1], words, n, machine->m.ncpus)) {
        shi_enter(&machine->self);
        err = shi_ipi_send_mask(&machine->self, virq, words, n, args[2] == Py_True);
        shi_leave(&machine->self);
    }
    if (words != few)
        PyMem_Free(words);
    return sent(machine, err);
}

/* ---- coprocessors ---------------------------------------------------------------- */

static struct shi_coproc *coproc_arg(Machine *machine, unsigned number)
{
    if (number < SHI_NCOPROC)
        return &shi_irq_area(&machine->m)->coproc[number];
    PyErr_Format(PyExc_ValueError, "no coprocessor %u", number);
    return NULL;
}

/* coproc_raise(number, virq): OSError ENXIO when it is not there (any more). */
METHOD(coproc_raise)
{
    Machine *machine = MACHINE(object);
    unsigned which, virq;
    if (!PyArg_ParseTuple(arg, "II", &which, &virq) || shi_use(machine) < 0)
        return NULL;
    shi_enter(&machine->self);
    int err = shi_coproc_raise(&machine->self, which, virq);
    shi_leave(&machine->self);
    if (err)
        return shi_os_error(-err, "coprocessor");
    Py_RETURN_NONE;
}

/* coproc_take(number) -> bool: was its line pending?  It is not any more. */
METHOD(coproc_take)
{
    unsigned long which = PyLong_AsUnsignedLong(arg);
    struct shi_coproc *c = PyErr_Occurred() ? NULL
                                            : coproc_arg(MACHINE(object), (unsigned)which);
    return c ? PyBool_FromLong(shi_xchg_full(&c->pending, 0)) : NULL;
}

/* coproc_wait(number, seen, seconds) -> count of its doorbell. */
METHOD(coproc_wait)
{
    unsigned which;
    unsigned long seen;
    double seconds;
    if (!PyArg_ParseTuple(arg, "Ikd", &which, &seen, &seconds))
        return NULL;
    struct shi_coproc *c = coproc_arg(MACHINE(object), which);
    if (!c)
        return NULL;
    int err = 0;
    Py_BEGIN_ALLOW_THREADS
    if (seconds != 0 && shi_load_acquire(&c->event) == (uint32_t)seen)
        err = shi_event_wait(&c->event, (uint32_t)seen,
                             seconds < 0 ? -1 : (int64_t)(seconds * 1e9));
    Py_END_ALLOW_THREADS
    if (err == -EINTR && PyErr_CheckSignals() < 0)
        return NULL;
    return PyLong_FromUnsignedLong(shi_load_acquire(&c->event));
}

/* coproc_set(number, pid, virq): it is there (virq 0: gone). */
METHOD(coproc_set)
{
    unsigned which, pid, virq;
    if (!PyArg_ParseTuple(arg, "III", &which, &pid, &virq))
        return NULL;
    struct shi_coproc *c = coproc_arg(MACHINE(object), which);
    if (!c)
        return NULL;
    if (!virq) {
        shi_coproc_ended(&MACHINE(object)->self, shi_load_relaxed(&c->pid));
        shi_store_relaxed(&c->pending, 0);
    }
    shi_store_relaxed(&c->pid, pid);
    shi_store_release(&c->virq, virq);
    shi_event_ring(&MACHINE(object)->m.header->hotplug_event); /* whoever waits for its end */
    Py_RETURN_NONE;
}

static PyTypeObject *coproc_type;

static PyStructSequence_Field coproc_fields[] = {
    { "pid", "of its process, 0: none" },
    { "virq", "that it takes, 0: it is gone" },
    { "pending", "its line is" },
    { NULL, NULL },
};
static PyStructSequence_Desc coproc_desc = {
    .name = "shmipi._core.Coproc",
    .doc = "The place of a coprocessor.",
    .fields = coproc_fields,
    .n_in_sequence = sizeof coproc_fields / sizeof *coproc_fields - 1,
};

/* coproc(number) -> Coproc */
METHOD(coproc)
{
    unsigned long which = PyLong_AsUnsignedLong(arg);
    struct shi_coproc *c = PyErr_Occurred() ? NULL
                                            : coproc_arg(MACHINE(object), (unsigned)which);
    PyObject *coproc = c ? PyStructSequence_New(coproc_type) : NULL;
    if (!coproc)
        return NULL;
    PyStructSequence_SetItem(coproc, 0, PyLong_FromUnsignedLong(shi_load_relaxed(&c->pid)));
    PyStructSequence_SetItem(coproc, 1, PyLong_FromUnsignedLong(shi_load_acquire(&c->virq)));
    PyStructSequence_SetItem(coproc, 2, PyBool_FromLong(shi_load_acquire(&c->pending) != 0));
    if (PyErr_Occurred())
        Py_CLEAR(coproc);
    return coproc;
}

PyMethodDef shi_irq_methods[] = {
    { "irq_free_undo", machine_irq_free_undo, METH_NOARGS, "irq_free_undo()" },
    { "irq_request", machine_irq_request, METH_VARARGS,
      "irq_request(virq, handler, info, stride=0)" },
    { "irq_free", machine_irq_free, METH_O, "irq_free(virq)" },
    { "irq_reset_line", machine_irq_reset_line, METH_VARARGS,
      "irq_reset_line(line, virq): masked and not pending where it is the irq's" },
    { "ipi_sends", machine_ipi_sends, METH_O, "ipi_sends(on): may the core send them?" },
    { "ipi_send_single", FAST(machine_ipi_send_single), METH_FASTCALL,
      "ipi_send_single(virq, cpu) -> bool: sent, or not plainly right" },
    { "ipi_send_all", FAST(machine_ipi_send_all), METH_FASTCALL,
      "ipi_send_all(virq, by_groups) -> bool" },
    { "ipi_send_mask", FAST(machine_ipi_send_mask), METH_FASTCALL,
      "ipi_send_mask(virq, mask, by_groups) -> bool" },
    { "coproc_raise", machine_coproc_raise, METH_VARARGS, "coproc_raise(number, virq)" },
    { "coproc_take", machine_coproc_take, METH_O, "coproc_take(number) -> bool" },
    { "coproc_wait", machine_coproc_wait, METH_VARARGS,
      "coproc_wait(number, seen, seconds) -> count" },
    { "coproc_set", machine_coproc_set, METH_VARARGS, "coproc_set(number, pid, virq)" },
    { "coproc", machine_coproc, METH_O, "coproc(number) -> Coproc" },
    { NULL, NULL, 0, NULL },
};

int shi_irq_types(PyObject *module)
{
    if (!coproc_type)
        coproc_type = PyStructSequence_NewType(&coproc_desc);
    return coproc_type ? PyModule_AddObjectRef(module, "Coproc", (PyObject *)coproc_type) : -1;
}

PyMethodDef shi_irq_functions[] = {
    { "ipi_send_single", FAST(current_ipi_send_single), METH_FASTCALL,
      "ipi_send_single(virq, cpu) -> bool: by this process's machine" },
    { NULL, NULL, 0, NULL },
};
