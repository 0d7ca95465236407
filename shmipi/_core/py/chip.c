/* SPDX-License-Identifier: MIT */
/* Interrupt controllers as Python describes and drives them. */
#include "py/chip.h"

#include "irq/chip.h"
#include "irq/nmi.h"
#include "irq/startup.h"
#include "py/entry.h"
#include "py/tables.h"

/* ---- the chip's description ------------------------------------------------------ */

static int number(PyObject *dict, const char *key, uint32_t *out)
{
    PyObject *value = PyDict_GetItemString(dict, key); /* borrowed */
    if (!value) {
        PyErr_Format(PyExc_KeyError, "a chip's description needs '%s'", key);
        return -1;
    }
    if (value == Py_None) {
        *out = SHI_NO_LINE;
        return 0;
    }
    unsigned long n = PyLong_AsUnsignedLong(value);
    if (PyErr_Occurred())
        return -1;
    *out = (uint32_t)n;
    return 0;
}

static int bytes_of(PyObject *dict, const char *key, uint8_t *out, Py_ssize_t size)
{
    PyObject *value = PyDict_GetItemString(dict, key);
    if (!value || !PyBytes_Check(value) || PyBytes_GET_SIZE(value) != size) {
        PyErr_Format(PyExc_ValueError, "a chip's '%s' is %zd bytes", key, size);
        return -1;
    }
    memcpy(out, PyBytes_AS_STRING(value), (size_t)size);
    return 0;
}

int shi_chip_from_python(PyObject *dict, struct shi_chip *chip)
{
    const struct {
        const char *key;
        uint32_t *out;
    } numbers[] = {
        { "flow", &chip->flow },
        { "nlines", &chip->nlines },
        { "call_single", &chip->call_single },
        { "call", &chip->call },
        { "reschedule", &chip->reschedule },
        { "nmi", &chip->nmi },
        { "per_cpu", &chip->per_cpu },
        { "group", &chip->group },
        { "shorthand", &chip->shorthand },
        { "startup", &chip->startup },
        { "banked", &chip->banked },
        { "siblings", &chip->siblings },
        { "decrementer", &chip->decrementer },
    };
    size_t i;
    memset(chip, 0, sizeof *chip);
    if (!PyDict_Check(dict)) {
        PyErr_SetString(PyExc_TypeError, "a chip's description is a dict");
        return -1;
    }
    for (i = 0; i < sizeof numbers / sizeof *numbers; i++)
        if (number(dict, numbers[i].key, numbers[i].out) < 0)
            return -1;
    if (bytes_of(dict, "use", chip->use, SHI_NLINES) < 0 ||
        bytes_of(dict, "row", chip->row, SHI_NLINES) < 0)
        return -1;
    PyObject *name = PyDict_GetItemString(dict, "name");
    PyObject *rows = PyDict_GetItemString(dict, "rows");
    const char *text = name ? PyUnicode_AsUTF8(name) : NULL;
    if (!text || strlen(text) >= sizeof chip->name || !rows || !PyList_Check(rows) ||
        PyList_GET_SIZE(rows) > SHI_NROWS) {
        PyErr_SetString(PyExc_ValueError, "a chip has a short name and a list of rows");
        return -1;
    }
    strcpy(chip->name, text);
    chip->nrows = (uint32_t)PyList_GET_SIZE(rows);
    for (i = 0; i < chip->nrows; i++) {
        const char *label;
        unsigned counter;
        if (!PyArg_ParseTuple(PyList_GET_ITEM(rows, (Py_ssize_t)i), "ssI", &label, &text,
                              &counter))
            return -1;
        chip->rows[i].counter = counter;
        snprintf(chip->rows[i].label, sizeof chip->rows[i].label, "%s", label);
        snprintf(chip->rows[i].text, sizeof chip->rows[i].text, "%s", text);
    }
    return 0;
}

/* ---- methods of Machine ---------------------------------------------------------- */

int shi_check_line(const Machine *machine, unsigned line)
{
    if (line < machine->m.chip.nlines)
        return 0;
    PyErr_Format(PyExc_ValueError, "%s has no line %u", machine->m.chip.name, line);
    return -1;
}

static int check_cpu(Machine *machine, unsigned cpu)
{
    if (cpu < machine->m.ncpus)
        return 0;
    shi_raise_errno(machine, -ENXIO, (int)cpu);
    return -1;
}

/* Set from here on to look at what an operation on the own CPU let through. */
static void settle(Machine *machine)
{
    if (!machine->self.host)
        shi_after_enable(machine);
}

/* irq_raise(line, cpus, writes): make it pending at each of `cpus`, a list. */
METHOD(irq_raise)
{
    Machine *machine = MACHINE(object);
    struct shi_self *self = &machine->self;
    unsigned line, writes;
    PyObject *cpus;
    Py_ssize_t i;
    if (!PyArg_ParseTuple(arg, "IO!I", &line, &PyList_Type, &cpus, &writes) ||
        shi_use(machine) < 0 || shi_check_line(machine, line) < 0)
        return NULL;
    for (i = 0; i < PyList_GET_SIZE(cpus); i++) {
        unsigned long cpu = PyLong_AsUnsignedLong(PyList_GET_ITEM(cpus, i));
        if (PyErr_Occurred() || check_cpu(machine, (unsigned)cpu) < 0)
            return NULL;
    }
    shi_enter(self);
    shi_count_n(self, SHI_C_chip_writes, writes);
    for (i = 0; i < PyList_GET_SIZE(cpus); i++)
        shi_irq_raise(self, (uint32_t)PyLong_AsUnsignedLong(PyList_GET_ITEM(cpus, i)), line);
    shi_leave(self);
    settle(machine);
    Py_RETURN_NONE;
}

/* irq_enable_line(cpu, line, on) */
METHOD(irq_enable_line)
{
    Machine *machine = MACHINE(object);
    unsigned cpu, line;
    int on;
    if (!PyArg_ParseTuple(arg, "IIp", &cpu, &line, &on) || shi_use(machine) < 0 ||
        shi_check_line(machine, line) < 0 || check_cpu(machine, cpu) < 0)
        return NULL;
    shi_enter(&machine->self);
    shi_chip_enable(&machine->self, cpu, line, on);
    shi_leave(&machine->self);
    settle(machine);
    Py_RETURN_NONE;
}

/* irq_clear(cpu, line): take back what is pending there. */
METHOD(irq_clear)
{
    Machine *machine = MACHINE(object);
    unsigned cpu, line;
    if (!PyArg_ParseTuple(arg, "II", &cpu, &line) || shi_use(machine) < 0 ||
        shi_check_line(machine, line) < 0 || check_cpu(machine, cpu) < 0)
        return NULL;
    shi_enter(&machine->self);
    shi_chip_clear(&machine->self, cpu, line);
    shi_leave(&machine->self);
    Py_RETURN_NONE;
}

/* irq_mailbox(cpu, bits): all of `bits` pending in one store. */
METHOD(irq_mailbox)
{
    Machine *machine = MACHINE(object);
    unsigned cpu;
    unsigned long long bits;
    if (!PyArg_ParseTuple(arg, "IK", &cpu, &bits) || shi_use(machine) < 0 ||
        check_cpu(machine, cpu) < 0)
        return NULL;
    if (machine->m.flow != &shi_flow_mailbox ||
        (machine->m.chip.nlines < 64 && bits >> machine->m.chip.nlines)) {
        /* PyErr_Format knows neither '#' nor, before 3.12, "llx". */
        char text[2 + 16 + 1];
        snprintf(text, sizeof text, "%#llx", bits);
        return PyErr_Format(PyExc_ValueError, "%s has no mailbox with bits %s",
                            machine->m.chip.name, text);
    }
    shi_enter(&machine->self);
    shi_count(&machine->self, SHI_C_chip_writes);
    shi_mailbox_write(&machine->self, cpu, bits);
    shi_leave(&machine->self);
    settle(machine);
    Py_RETURN_NONE;
}

/* irq_threshold(value): of this CPU. */
METHOD(irq_threshold)
{
    Machine *machine = MACHINE(object);
    unsigned long value = PyLong_AsUnsignedLong(arg);
    if (PyErr_Occurred() || shi_use(machine) < 0 ||
        shi_refuse_host(machine, "it masks nothing") < 0)
        return NULL;
    shi_enter(&machine->self);
    shi_chip_threshold(&machine->self, (uint32_t)value);
    shi_leave(&machine->self);
    settle(machine);
    Py_RETURN_NONE;
}

/* irq_end(line): EOI before the handler has returned; NO_LINE: of the one that runs. */
METHOD(irq_end)
{
    Machine *machine = MACHINE(object);
    unsigned long line = PyLong_AsUnsignedLong(arg);
    if (PyErr_Occurred() || shi_use(machine) < 0 ||
        shi_refuse_host(machine, "it takes no interrupts") < 0)
        return NULL;
    if (line == SHI_NO_LINE) {
        if (!machine->self.handling)
            Py_RETURN_NONE; /* nothing is in service */
        line = machine->self.handling - 1;
    }
    if (shi_check_line(machine, (unsigned)line) < 0)
        return NULL;
    shi_enter(&machine->self);
    shi_chip_eoi(&machine->self, (uint32_t)line);
    shi_leave(&machine->self);
    settle(machine);
    Py_RETURN_NONE;
}

/* esb_access(cpu, line, offset, store) -> int: to a source's ESB page. */
METHOD(esb_access)
{
    Machine *machine = MACHINE(object);
    unsigned cpu, line, offset;
    int store;
    if (!PyArg_ParseTuple(arg, "IIIp", &cpu, &line, &offset, &store) || shi_use(machine) < 0 ||
        shi_check_line(machine, line) < 0 || check_cpu(machine, cpu) < 0)
        return NULL;
    shi_enter(&machine->self);
    int value = store ? shi_esb_store(&machine->self, cpu, line, offset)
                      : shi_esb_load(&machine->self, cpu, line, offset);
    shi_leave(&machine->self);
    settle(machine);
    if (value >= 0)
        return PyLong_FromLong(value);
    PyErr_Format(PyExc_ValueError, "no ESB of line %u at offset %#x", line, offset);
    return NULL;
}

/* esb_message(cpu, message): store it, and trigger nothing. */
METHOD(esb_message)
{
    Machine *machine = MACHINE(object);
    unsigned cpu, message;
    if (!PyArg_ParseTuple(arg, "II", &cpu, &message) || shi_use(machine) < 0 ||
        check_cpu(machine, cpu) < 0)
        return NULL;
    if (machine->m.flow != &shi_flow_esb || message >= SHI_PPC_MSGS)
        return PyErr_Format(PyExc_ValueError, "no message %u", message);
    shi_enter(&machine->self);
    shi_esb_message(&machine->self, cpu, message);
    shi_leave(&machine->self);
    Py_RETURN_NONE;
}

/* esb_demux(): smp_ipi_demux, of this CPU. */
METHOD(esb_demux)
{
    Machine *machine = MACHINE(object);
    (void)arg;
    if (shi_use(machine) < 0)
        return NULL;
    if (machine->self.host || machine->m.flow != &shi_flow_esb)
        return shi_raise(shi_py.StateError, 0, -1, "no messages here: not a CPU with a xive");
    shi_enter(&machine->self);
    shi_esb_demux(&machine->self);
    shi_leave(&machine->self);
    settle(machine);
    Py_RETURN_NONE;
}

/* nmi_send(cpu, writes=1) -> bool: False when as many as can be were pending already. */
METHOD(nmi_send)
{
    Machine *machine = MACHINE(object);
    unsigned cpu, writes = 1;
    if (!PyArg_ParseTuple(arg, "I|I", &cpu, &writes) || shi_use(machine) < 0 ||
        check_cpu(machine, cpu) < 0)
        return NULL;
    shi_enter(&machine->self);
    int sent = shi_nmi_send(&machine->self, cpu);
    if (sent >= 0)
        shi_count_n(&machine->self, SHI_C_chip_writes, writes);
    shi_leave(&machine->self);
    settle(machine);
    return sent < 0 ? shi_raise_errno(machine, sent, (int)cpu) : PyBool_FromLong(sent);
}

/* startup_ipi(cpu, vector) -> bool: did it wait for one?  Counts no register write. */
METHOD(startup_ipi)
{
    Machine *machine = MACHINE(object);
    unsigned cpu, vector;
    if (!PyArg_ParseTuple(arg, "II", &cpu, &vector) || shi_use(machine) < 0 ||
        check_cpu(machine, cpu) < 0)
        return NULL;
    shi_enter(&machine->self);
    int started = shi_chip_startup(&machine->self, cpu, vector);
    shi_leave(&machine->self);
    return PyBool_FromLong(started);
}

/* init_ipi(cpu) -> bool: was it not in reset already?  Counts no register write. */
METHOD(init_ipi)
{
    Machine *machine = MACHINE(object);
    unsigned long cpu = PyLong_AsUnsignedLong(arg);
    if (PyErr_Occurred() || shi_use(machine) < 0 || check_cpu(machine, (unsigned)cpu) < 0)
        return NULL;
    shi_enter(&machine->self);
    int reset = shi_chip_init(&machine->self, (uint32_t)cpu);
    shi_leave(&machine->self);
    return PyBool_FromLong(reset);
}

/* Registers that can be read, and those of them that software may write. */
struct reg {
    const char *name;
    size_t offset;
    uint8_t bytes, common; /* common: of the machine, not of a CPU */
    uint16_t count;
    uint8_t writable;
};
#define PIC(name, count, writable)                                                             \
    { #name,                                                                                   \
      offsetof(struct shi_slot, pic) + offsetof(struct shi_pic, name),                         \
      sizeof(((struct shi_pic *)0)->name) / (count),                                           \
      0,                                                                                       \
      count,                                                                                   \
      writable }
#define AREA(name, count, writable)                                                            \
    { #name,                                                                                   \
      offsetof(struct shi_irq_area, name),                                                     \
      sizeof(((struct shi_irq_area *)0)->name) / (count),                                      \
      1,                                                                                       \
      count,                                                                                   \
      writable }
static const struct reg regs[] = {
    { "irr", offsetof(struct shi_slot, irr), 8, 0, SHI_NLINES / 64, 0 },
    PIC(enable, SHI_NLINES / 64, 0),
    PIC(messages, 1, 0),
    PIC(nmi, 1, 0),
    PIC(startup, 1, 1),
    PIC(sipi, 1, 0),
    PIC(routed, SHI_NLINES / 64, 0),
    PIC(bank, 2, 0),
    PIC(senders, 1, 0),
    PIC(isr, SHI_NLINES / 64, 0),
    PIC(nmi_request, 1, 0),
    PIC(nmi_service, 1, 0),
    PIC(threshold, 1, 0),
    PIC(happened, 1, 0),
    PIC(iar, 1, 0),
    PIC(running, 1, 0),
    PIC(priority, 32, 1),
    PIC(eq_at, 1, 0),
    PIC(eq_put, 1, 0),
    PIC(eq, SHI_EQ, 0),
    PIC(rows, SHI_NROWS, 0),
    AREA(shared, SHI_NLINES / 64, 0),
    AREA(mask, SHI_NLINES / 64, 0),
    AREA(route, SHI_NLINES, 1),
    AREA(line_virq, SHI_NLINES, 1),
    AREA(undo, 1, 1),
};

static void *find_reg(Machine *machine, unsigned cpu, const char *name, unsigned index,
                      bool write, const struct reg **found)
{
    size_t i;
    for (i = 0; i < sizeof regs / sizeof *regs; i++) {
        const struct reg *r = &regs[i];
        if (strcmp(r->name, name))
            continue;
        if (index >= r->count || (write && !r->writable))
            break;
        if (!r->common && check_cpu(machine, cpu) < 0)
            return NULL;
        uint8_t *base = r->common ? (uint8_t *)shi_irq_area(&machine->m)
                                  : (uint8_t *)shi_slot(&machine->m, cpu);
        *found = r;
        return base + r->offset + (size_t)index * r->bytes;
    }
    PyErr_Format(PyExc_ValueError, "no register %s[%u] to %s", name, index,
                 write ? "write" : "read");
    return NULL;
}

/* pic_read(cpu, name, index=0) -> int; `cpu` means nothing for registers of the machine. */
METHOD(pic_read)
{
    const struct reg *r;
    const char *name;
    unsigned cpu, index = 0;
    if (!PyArg_ParseTuple(arg, "Is|I", &cpu, &name, &index))
        return NULL;
    void *at = find_reg(MACHINE(object), cpu, name, index, false, &r);
    if (!at)
        return NULL;
    if (r->bytes == 8)
        return PyLong_FromUnsignedLongLong(shi_load_acquire((shi_a64 *)at));
    if (r->bytes == 4)
        return PyLong_FromUnsignedLong(shi_load_acquire((shi_a32 *)at));
    return PyLong_FromUnsignedLong(shi_load_acquire((shi_a8 *)at));
}

/* pic_write(cpu, name, index, value) */
METHOD(pic_write)
{
    const struct reg *r;
    const char *name;
    unsigned cpu, index;
    unsigned long long value;
    if (!PyArg_ParseTuple(arg, "IsIK", &cpu, &name, &index, &value))
        return NULL;
    void *at = find_reg(MACHINE(object), cpu, name, index, true, &r);
    if (!at)
        return NULL;
    if (!strcmp(name, "route")) { /* 1 + the CPU, 0: nobody; it takes what is pending along */
        Machine *machine = MACHINE(object);
        if (shi_use(machine) < 0 ||
            (value > machine->m.ncpus && check_cpu(machine, UINT32_MAX) < 0))
            return NULL;
        shi_enter(&machine->self);
        shi_chip_route(&machine->self, index, (uint32_t)value - 1);
        shi_leave(&machine->self);
        settle(machine);
        Py_RETURN_NONE;
    }
    if (r->bytes == 8)
        shi_store_full((shi_a64 *)at, value);
    else if (r->bytes == 4)
        shi_store_full((shi_a32 *)at, (uint32_t)value);
    else
        shi_store_full((shi_a8 *)at, (uint8_t)value);
    Py_RETURN_NONE;
}

/* pic_change(cpu, name, index, clear, set) -> int: pending bits as software may change
 * them, in one step, or this CPU's own active bits; as they were before.  What is to be
 * taken now is. */
METHOD(pic_change)
{
    Machine *machine = MACHINE(object);
    const struct reg *r;
    const char *name;
    unsigned cpu, index;
    unsigned long long clear, set;
    if (!PyArg_ParseTuple(arg, "IsIKK", &cpu, &name, &index, &clear, &set) ||
        shi_use(machine) < 0)
        return NULL;
    shi_a64 *at = find_reg(machine, cpu, name, index, false, &r);
    if (!at)
        return NULL;
    /* isr is written without read-modify-writes, by its owner in core sections alone. */
    bool own = !strcmp(name, "isr") && machine->m.flow == &shi_flow_sgi &&
               !machine->self.host && cpu == machine->self.id;
    if (strcmp(name, "irr") && strcmp(name, "bank") && !own) {
        PyErr_Format(PyExc_ValueError, "no pending bits in register %s", name);
        return NULL;
    }
    shi_enter(&machine->self);
    uint64_t was = shi_load_relaxed(at);
    while (!shi_cas_full(at, &was, (was & ~(uint64_t)clear) | (uint64_t)set))
        ;
    shi_chip_look(&machine->self, cpu, false);
    shi_leave(&machine->self);
    settle(machine);
    return PyLong_FromUnsignedLongLong(was);
}

PyMethodDef shi_chip_methods[] = {
    { "irq_raise", machine_irq_raise, METH_VARARGS, "irq_raise(line, cpus, writes)" },
    { "irq_enable_line", machine_irq_enable_line, METH_VARARGS,
      "irq_enable_line(cpu, line, on)" },
    { "irq_clear", machine_irq_clear, METH_VARARGS, "irq_clear(cpu, line)" },
    { "irq_mailbox", machine_irq_mailbox, METH_VARARGS,
      "irq_mailbox(cpu, bits): in one store" },
    { "irq_threshold", machine_irq_threshold, METH_O, "irq_threshold(value): of this CPU" },
    { "irq_end", machine_irq_end, METH_O,
      "irq_end(line): EOI before the handler has returned" },
    { "esb_access", machine_esb_access, METH_VARARGS,
      "esb_access(cpu, line, offset, store) -> int" },
    { "esb_message", machine_esb_message, METH_VARARGS, "esb_message(cpu, message): store it" },
    { "esb_demux", machine_esb_demux, METH_NOARGS, "esb_demux(): take this CPU's messages" },
    { "nmi_send", machine_nmi_send, METH_VARARGS,
      "nmi_send(cpu, writes=1) -> bool: False when it collapsed" },
    { "startup_ipi", machine_startup_ipi, METH_VARARGS,
      "startup_ipi(cpu, vector) -> bool: did it wait for one?" },
    { "init_ipi", machine_init_ipi, METH_O,
      "init_ipi(cpu) -> bool: was it not in reset already?" },
    { "pic_read", machine_pic_read, METH_VARARGS, "pic_read(cpu, register, index=0) -> int" },
    { "pic_write", machine_pic_write, METH_VARARGS, "pic_write(cpu, register, index, value)" },
    { "pic_change", machine_pic_change, METH_VARARGS,
      "pic_change(cpu, register, index, clear, set) -> int: pending bits, as they were" },
    { NULL, NULL, 0, NULL },
};
