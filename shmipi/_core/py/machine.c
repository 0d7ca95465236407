/* SPDX-License-Identifier: MIT */
/* The Machine type: a process's mapping of a segment. */
#include "py/machine.h"

#include <fcntl.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <unistd.h>

#include "base/clock.h"
#include "base/event.h"
#include "irq/doorbell.h"
#include "irq/irqdesc.h"
#include "smp/cpu.h"
#include "py/func.h"
#include "py/segment.h"
#include "py/sched.h"
#include "py/tables.h"
#include "users/users.h"

PyObject *shi_machine_new(PyTypeObject *type, PyObject *args, PyObject *kwargs)
{
    static char *names[] = { "fd", "slot", NULL };
    int fd, slot;
    struct shi_header *head;
    if (shi_bound() < 0)
        return NULL;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "ii:Machine", names, &fd, &slot))
        return NULL;
    head = PyMem_Calloc(1, sizeof *head);
    if (!head)
        return PyErr_NoMemory();
    ssize_t n = pread(fd, head, sizeof *head, 0);
    uint64_t total = head->total_bytes;
    bool ok = n == (ssize_t)sizeof *head && !memcmp(head->magic, SHI_MAGIC, sizeof head->magic);
    uint32_t abi = head->abi;
    PyMem_Free(head);
    if (!ok)
        return shi_raise(shi_py.LayoutError, 0, -1, "this is not a shmipi machine");
    if (abi != SHI_ABI)
        return shi_raise(shi_py.LayoutError, 0, -1,
                         "this machine was booted by another version of shmipi (layout %u, "
                         "here %u)",
                         abi, SHI_ABI);
    if (total > (1ull << 46) || total < sizeof(struct shi_header))
        return shi_raise(shi_py.LayoutError, 0, -1, "the header of this machine is damaged");
    /* Its own number for the file: the caller may close his, and another file get it. */
    fd = fcntl(fd, F_DUPFD_CLOEXEC, 3);
    if (fd < 0)
        return shi_os_error(errno, "the machine's segment");
    void *base = mmap(NULL, total, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_NORESERVE, fd, 0);
    if (base == MAP_FAILED) {
        shi_os_error(errno, "mapping the machine's segment");
        close(fd);
        return NULL;
    }
    Machine *machine = (Machine *)type->tp_alloc(type, 0);
    if (!machine) {
        munmap(base, total);
        close(fd);
        return NULL;
    }
    int err = shi_machine_attach(&machine->m, base, total, fd);
    shi_users_register(&machine->m);
    if (!err)
        err = shi_self_init(&machine->self, &machine->m, (uint32_t)slot);
    if (err) {
        munmap(base, total);
        close(fd);
        Py_DECREF(machine);
        if (err == -ENOMEM)
            return PyErr_NoMemory();
        return shi_raise(shi_py.LayoutError, 0, -1, "the header of this machine is damaged");
    }
    machine->attached = 1;
    return (PyObject *)machine;
}

void shi_machine_dealloc(PyObject *object)
{
    Machine *machine = (Machine *)object;
    PyTypeObject *type = Py_TYPE(object);
    if (shi_current == machine)
        shi_current = NULL;
    if (machine->attached) {
        machine->closed = 1;
        shi_functions_clear(machine);
        shi_begun_clear(machine);
        shi_doorbell_close(&machine->m);
        shi_self_fini(&machine->self);
        munmap(machine->m.base, machine->m.total_bytes);
        shi_machine_close(&machine->m);
        PyMem_Free(machine->late);
        PyMem_Free(machine->irq_held);
        PyMem_Free(machine->natives);
        while (machine->self.unsent)
            Py_DECREF(machine->unsent[--machine->self.unsent].bytes);
        PyMem_Free(machine->unsent);
    }
    Py_XDECREF(machine->early);
    Py_XDECREF(machine->on_cancel);
    free(machine->watch);
    type->tp_free(object);
    Py_DECREF(type);
}

/* The whole mapping as a buffer: views of it keep the Machine, and so the mapping. */
int shi_machine_getbuffer(PyObject *object, Py_buffer *view, int flags)
{
    Machine *machine = (Machine *)object;
    return PyBuffer_FillInfo(view, object, machine->m.base, (Py_ssize_t)machine->m.total_bytes,
                             0, flags);
}

METHOD(close)
{
    Machine *machine = MACHINE(object);
    (void)arg;
    if (!machine->closed) {
        machine->closed = 1;
        shi_functions_clear(machine);
        if (shi_current == machine)
            shi_current = NULL;
    }
    Py_RETURN_NONE;
}

#define LEAVE_LOOK_NS 1000000

/* leave(seconds): a guest detaches.  Waits end with "closed"; then the slot is given up.
 * False: threads are still inside, or it cannot be given up, and it stays this process's. */
METHOD(leave)
{
    Machine *machine = MACHINE(object);
    struct shi_self *self = &machine->self;
    double seconds = PyFloat_AsDouble(arg);
    if (PyErr_Occurred())
        return NULL;
    if (!self->guest || machine->foreign || self->left)
        return PyBool_FromLong(self->left && !machine->foreign);
    machine->closed = 1;
    shi_functions_clear(machine);
    if (shi_current == machine)
        shi_current = NULL;
    self->leaving = 1;
    uint64_t end = shi_now_ns() + (uint64_t)(seconds * 1e9);
    while (machine->waiters && shi_now_ns() < end) {
        Py_BEGIN_ALLOW_THREADS
        shi_event_ring(&self->slot->event);
        shi_event_wait(&self->slot->event, shi_load_acquire(&self->slot->event), LEAVE_LOOK_NS);
        Py_END_ALLOW_THREADS
    }
    return PyBool_FromLong(!machine->waiters && shi_self_leave(self) == 0);
}

/* What is cut short from now on is so by an orderly end. */
METHOD(set_ending)
{
    (void)arg;
    MACHINE(object)->ending = 1;
    Py_RETURN_NONE;
}

/* In a fork's child: it is the parent's machine. */
METHOD(disown)
{
    (void)arg;
    MACHINE(object)->foreign = 1;
    MACHINE(object)->self.left = 1;
    shi_absence = SHI_CHILD;
    shi_machine_close(&MACHINE(object)->m); /* and with it our hold on the lock */
    if (shi_current == MACHINE(object))
        shi_current = NULL;
    shi_kick_remove();
    Py_RETURN_NONE;
}

METHOD(set_state)
{
    unsigned long state = PyLong_AsUnsignedLong(arg);
    if (PyErr_Occurred())
        return NULL;
    struct shi_header *h = MACHINE(object)->m.header;
    shi_store_full(&h->machine_state, (uint32_t)state);
    shi_hosts_ring(&MACHINE(object)->m);
    shi_event_ring(&h->hotplug_event);
    Py_RETURN_NONE;
}

/* The owner ends the machine in order: what its guests are told. */
METHOD(set_shut_down)
{
    (void)arg;
    shi_store_full(&MACHINE(object)->m.header->shut_down, 1);
    Py_RETURN_NONE;
}

METHOD(set_current)
{
    int on = PyObject_IsTrue(arg);
    if (on < 0)
        return NULL;
    if (on)
        shi_current = MACHINE(object);
    else if (shi_current == MACHINE(object))
        shi_current = NULL;
    Py_RETURN_NONE;
}

PyMethodDef shi_machine_methods[] = {
    NOARGS(close, "Refuse every further use."),
    ONE(leave, "leave(seconds) -> bool: a guest gives its slot up"),
    NOARGS(set_ending, "The host ends the machine in order."),
    NOARGS(disown, "After a fork, in the child: not ours."),
    ONE(set_state, "set_state(state)"),
    NOARGS(set_shut_down, "The owner ends the machine in order."),
    ONE(set_current, "set_current(on): module-level shmipi.smp acts on this machine"),
    { NULL, NULL, 0, NULL },
};

/* ---- getters --------------------------------------------------------------------- */

#define GETTER(name, expression)                                                               \
    static PyObject *get_##name(PyObject *object, void *unused)                                \
    {                                                                                          \
        Machine *machine = MACHINE(object);                                                    \
        (void)unused;                                                                          \
        return expression;                                                                     \
    }
GETTER(ncpus, PyLong_FromUnsignedLong(machine->m.ncpus))
GETTER(nslots, PyLong_FromUnsignedLong(machine->m.nslots))
GETTER(id, PyLong_FromUnsignedLong(machine->self.id))
GETTER(is_cpu, PyBool_FromLong(!machine->self.host))
GETTER(name, PyUnicode_DecodeUTF8(machine->m.header->name,
                                  (Py_ssize_t)strnlen(machine->m.header->name, SHI_NAME_MAX),
                                  "replace"))
GETTER(payload_max, PyLong_FromUnsignedLongLong(machine->m.payload_max))
GETTER(array_offset, PyLong_FromUnsignedLongLong(machine->m.array_offset))
GETTER(array_end, PyLong_FromUnsignedLongLong(shi_arrays_end(&machine->m)))
GETTER(state, PyLong_FromUnsignedLong(shi_load_acquire(&machine->m.header->machine_state)))
GETTER(shut_down, PyBool_FromLong(shi_load_acquire(&machine->m.header->shut_down) != 0))
GETTER(event, PyLong_FromUnsignedLong(shi_load_acquire(&machine->self.slot->event)))
GETTER(hotplug_event,
       PyLong_FromUnsignedLong(shi_load_acquire(&machine->m.header->hotplug_event)))
GETTER(firmware_pid,
       PyLong_FromUnsignedLong(shi_load_acquire(&machine->m.header->firmware_pid)))
GETTER(host_pid, PyLong_FromUnsignedLong(shi_load_acquire(&machine->m.header->host_pid)))
GETTER(doorbell, PyLong_FromUnsignedLong(machine->m.doorbell))
GETTER(kick_signal, PyLong_FromUnsignedLong(machine->m.kick_signal))
GETTER(nmi_signal, PyLong_FromUnsignedLong(machine->m.nmi_signal))
GETTER(kick, PyBool_FromLong(machine->m.kick))
GETTER(oversubscribed, PyBool_FromLong(machine->m.oversubscribed))
GETTER(chip, PyUnicode_FromString(machine->m.chip.name))
GETTER(closed, PyBool_FromLong(shi_gone(machine)))
GETTER(irq_offset, PyLong_FromUnsignedLongLong(machine->m.irq_offset))
GETTER(affinity_offset, PyLong_FromUnsignedLongLong(shi_affinity_offset(&machine->m)))
GETTER(slot_offset, PyLong_FromUnsignedLongLong(machine->m.slot_offset))

#define GET(name) { #name, get_##name, NULL, NULL, NULL }
PyGetSetDef shi_machine_getset[] = {
    GET(ncpus),
    GET(nslots),
    GET(id),
    GET(is_cpu),
    GET(name),
    GET(payload_max),
    GET(array_offset),
    GET(array_end),
    GET(state),
    GET(event),
    GET(hotplug_event),
    GET(firmware_pid),
    GET(host_pid),
    GET(doorbell),
    GET(kick_signal),
    GET(kick),
    GET(oversubscribed),
    GET(chip),
    GET(closed),
    GET(slot_offset),
    GET(nmi_signal),
    GET(irq_offset),
    GET(affinity_offset),
    GET(shut_down),
    { NULL, NULL, NULL, NULL, NULL },
};

/* ---- functions of the module ----------------------------------------------------------- */

/* set_open(count): Clusters of this process; what NoMachineError says of none, or several. */
static PyObject *set_open(PyObject *module, PyObject *arg)
{
    unsigned long count = PyLong_AsUnsignedLong(arg);
    (void)module;
    if (PyErr_Occurred())
        return NULL;
    shi_absence = count ? "several Clusters are open in this process: use cluster.smp and "
                          "cluster.irq, which are bound to the machine of one"
                        : SHI_NO_CLUSTER;
    Py_RETURN_NONE;
}

/* The machine of this process, or the only one open here. */
static PyObject *current(PyObject *module, PyObject *unused)
{
    Machine *machine = shi_use_current();
    (void)module;
    (void)unused;
    return machine ? Py_NewRef((PyObject *)machine) : NULL;
}

PyMethodDef shi_machine_functions[] = {
    { "set_open", set_open, METH_O, "set_open(count): so many Clusters are open here" },
    { "current_machine", current, METH_NOARGS,
      "current_machine()\n--\n\nThe Machine that module-level functions act on." },
    { NULL, NULL, 0, NULL },
};
