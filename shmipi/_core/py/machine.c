/* SPDX-License-Identifier: MIT */
/* The Machine type: a process's mapping of a segment, and what boot and reaping need. */
#include "py/shi.h"

#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/signalfd.h>
#include <sys/stat.h>
#include <unistd.h>

#include "irq/chip.h"
#include "base/clock.h"
#include "irq/doorbell.h"
#include "irq/irqdesc.h"
#include "base/native.h"
#include "smp/reap.h"
#include "base/step.h"
#include "base/trace.h"
#include "smp/watch.h"

PyTypeObject *shi_machine_type;
Machine *shi_current;
const char *shi_absence = SHI_NO_CLUSTER;

/* ---- the type -------------------------------------------------------------------- */

static PyObject *machine_new(PyTypeObject *type, PyObject *args, PyObject *kwargs)
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

static void machine_dealloc(PyObject *object)
{
    Machine *machine = (Machine *)object;
    PyTypeObject *type = Py_TYPE(object);
    if (shi_current == machine)
        shi_current = NULL;
    if (machine->attached) {
        machine->closed = 1;
        shi_functions_clear(machine);
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
static int machine_getbuffer(PyObject *object, Py_buffer *view, int flags)
{
    Machine *machine = (Machine *)object;
    return PyBuffer_FillInfo(view, object, machine->m.base, (Py_ssize_t)machine->m.total_bytes,
                             0, flags);
}

int shi_use(Machine *machine)
{
    if (machine->closed || machine->foreign) {
        shi_raise(shi_py.StateError, 0, -1,
                  machine->foreign ? "this machine belongs to the parent process: a fork's "
                                     "child can not use it"
                                   : "this cluster is closed");
        return -1;
    }
    if (!machine->self.host && !pthread_equal(pthread_self(), machine->self.thread)) {
        PyErr_SetString(PyExc_RuntimeError,
                        "on a CPU only the main thread is the CPU: call shmipi.smp there");
        return -1;
    }
    if (__builtin_expect(machine->nlate != 0, 0))
        shi_late_done(machine);
    return 0;
}

Machine *shi_use_current(void)
{
    if (shi_bound() < 0)
        return NULL;
    if (!shi_current || shi_current->foreign) {
        shi_raise(shi_py.NoMachineError, 0, -1,
                  "shmipi.smp and shmipi.irq have no machine here: "
                  "%s",
                  shi_absence);
        return NULL;
    }
    return shi_use(shi_current) < 0 ? NULL : shi_current;
}

/* Freed by another thread of a CPU's process, which may not touch the sender. */
void shi_late(Machine *machine, uint32_t index, bool csd)
{
    if (machine->nlate == machine->late_room) {
        uint32_t room = machine->late_room ? 2 * machine->late_room : 16;
        uint64_t *grown = PyMem_Realloc(machine->late, room * sizeof *grown);
        if (!grown)
            return; /* a number less: no harm but its place */
        machine->late = grown;
        machine->late_room = room;
    }
    machine->late[machine->nlate++] = (uint64_t)index << 1 | csd;
}

void shi_late_done(Machine *machine)
{
    while (machine->nlate) {
        uint64_t entry = machine->late[--machine->nlate];
        uint32_t index = (uint32_t)(entry >> 1);
        shi_enter(&machine->self);
        if (!(entry & 1))
            shi_func_retire(&machine->self, index);
        else
            shi_csd_leave(&machine->self, index);
        shi_leave(&machine->self);
    }
}

bool shi_other_thread(const Machine *machine)
{
    return !machine->self.host && !pthread_equal(pthread_self(), machine->self.thread);
}

#define MACHINE(object) ((Machine *)(object))
#define METHOD(name) static PyObject *machine_##name(PyObject *object, PyObject *arg)

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
        return PyBool_FromLong(self->left);
    machine->closed = 1;
    shi_functions_clear(machine);
    if (shi_current == machine)
        shi_current = NULL;
    self->leaving = 1;
    uint64_t end = shi_now_ns() + (uint64_t)(seconds * 1e9);
    while (machine->waiters && shi_now_ns() < end) {
        Py_BEGIN_ALLOW_THREADS shi_event_ring(&self->slot->event);
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
    shi_absence = SHI_CHILD;
    shi_machine_close(&MACHINE(object)->m); /* and with it our hold on the lock */
    if (shi_current == MACHINE(object))
        shi_current = NULL;
    shi_kick_remove();
    Py_RETURN_NONE;
}

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

METHOD(open_doorbells)
{
    Machine *machine = MACHINE(object);
    const char *prefix;
    PyObject *list;
    int *fds = NULL;
    Py_ssize_t i;
    if (!PyArg_ParseTuple(arg, "sO!", &prefix, &PyList_Type, &list))
        return NULL;
    if (machine->m.doorbell == SHI_DB_EVENTFD) {
        if (PyList_GET_SIZE(list) != (Py_ssize_t)machine->m.ncpus) {
            PyErr_SetString(PyExc_ValueError, "one eventfd per CPU");
            return NULL;
        }
        fds = PyMem_Malloc(sizeof *fds * machine->m.ncpus);
        if (!fds)
            return PyErr_NoMemory();
        for (i = 0; i < (Py_ssize_t)machine->m.ncpus; i++)
            fds[i] = (int)PyLong_AsLong(PyList_GET_ITEM(list, i));
    }
    int err = PyErr_Occurred() ? -EINVAL : shi_doorbell_open(&machine->m, prefix, fds);
    PyMem_Free(fds);
    if (err)
        return PyErr_Occurred() ? NULL : shi_os_error(-err, prefix);
    Py_RETURN_NONE;
}

/* adopt_doorbells(fds): of a machine that runs.  Those of queues are ours from now on. */
METHOD(adopt_doorbells)
{
    Machine *machine = MACHINE(object);
    Py_ssize_t i, n = PyList_Check(arg) ? PyList_GET_SIZE(arg) : -1;
    bool wanted = machine->m.doorbell == SHI_DB_EVENTFD || machine->m.doorbell == SHI_DB_SEM ||
                  machine->m.doorbell == SHI_DB_MQUEUE;
    if (n != (wanted ? (Py_ssize_t)machine->m.ncpus : 0)) {
        PyErr_SetString(PyExc_ValueError, "one descriptor for each CPU that needs one");
        return NULL;
    }
    int *fds = PyMem_Calloc((size_t)n + 1, sizeof *fds);
    if (!fds)
        return PyErr_NoMemory();
    for (i = 0; i < n; i++)
        fds[i] = (int)PyLong_AsLong(PyList_GET_ITEM(arg, i));
    int err = PyErr_Occurred() ? -EINVAL : shi_doorbell_adopt(&machine->m, fds);
    PyMem_Free(fds);
    if (err)
        return PyErr_Occurred() ? NULL : shi_os_error(-err, "the machine's doorbells");
    Py_RETURN_NONE;
}

/* doorbell_fds() -> descriptors that stand for doorbells here, one for each CPU, or none. */
METHOD(doorbell_fds)
{
    const struct shi_machine *m = &MACHINE(object)->m;
    const int *fds = m->eventfds ? m->eventfds : m->mqueues;
    Py_ssize_t i, n = fds ? (Py_ssize_t)m->ncpus : 0;
    (void)arg;
    PyObject *list = PyList_New(n);
    for (i = 0; list && i < n; i++) {
        PyObject *fd = PyLong_FromLong(fds[i]);
        if (!fd)
            Py_CLEAR(list);
        else
            PyList_SET_ITEM(list, i, fd);
    }
    return list;
}

/* map_natives(numbers): numbers[n] is ours of what the machine calls native handler n. */
METHOD(map_natives)
{
    Machine *machine = MACHINE(object);
    Py_ssize_t i, n = PyList_Check(arg) ? PyList_GET_SIZE(arg) : -1;
    if (n < 0 || n > SHI_NATIVE_MAX) {
        PyErr_SetString(PyExc_ValueError, "a list of numbers");
        return NULL;
    }
    uint32_t *natives = PyMem_Calloc(SHI_NATIVE_MAX, sizeof *natives);
    if (!natives)
        return PyErr_NoMemory();
    for (i = 0; i < n; i++) {
        unsigned long ours = PyLong_AsUnsignedLong(PyList_GET_ITEM(arg, i));
        if (!PyErr_Occurred() && ours < SHI_NATIVE_MAX)
            natives[ours] = (uint32_t)i + 1;
    }
    PyMem_Free(machine->natives);
    machine->natives = natives;
    if (PyErr_Occurred())
        return NULL;
    Py_RETURN_NONE;
}

static int slot_arg(Machine *machine, PyObject *arg, uint32_t limit, uint32_t *slot)
{
    unsigned long value = PyLong_AsUnsignedLong(arg);
    if (PyErr_Occurred())
        return -1;
    (void)machine;
    if (value >= limit) {
        PyErr_Format(PyExc_ValueError, "no slot %lu", value);
        return -1;
    }
    *slot = (uint32_t)value;
    return 0;
}
#define CPU_ARG(machine, arg, cpu) slot_arg(machine, arg, (machine)->m.ncpus, cpu)

/* (pid, tid, core, state, generation, start_time, task, registered, halted_on) */
METHOD(slot)
{
    Machine *machine = MACHINE(object);
    uint32_t id;
    if (slot_arg(machine, arg, machine->m.nslots, &id) < 0)
        return NULL;
    struct shi_slot *s = shi_slot(&machine->m, id);
    char task[sizeof s->task_name + 1] = { 0 };
    memcpy(task, s->task_name, sizeof s->task_name);
    uint64_t w = shi_load_acquire(&s->word);
    PyObject *name = PyUnicode_DecodeUTF8(task, (Py_ssize_t)strlen(task), "replace");
    return Py_BuildValue("(IIIIIKNIKI)", shi_load_relaxed(&s->pid), shi_load_relaxed(&s->tid),
                         shi_load_relaxed(&s->core), (unsigned)shi_word_state(w),
                         shi_load_relaxed(&s->generation),
                         (unsigned long long)shi_load_relaxed(&s->start_time), name,
                         shi_load_relaxed(&s->registered), (unsigned long long)w,
                         shi_load_relaxed(&s->task));
}

/* doing(cpu) -> (handler: 0 or HANDLER_*, its name or None, CLOCK_MONOTONIC ns of its begin or
 * 0, the task's name or None). */
METHOD(doing)
{
    Machine *machine = MACHINE(object);
    uint32_t id, kind, looks = 0;
    uint64_t since;
    char name[SHI_HANDLER_NAME], task[sizeof((struct shi_slot *)0)->task_name];
    if (slot_arg(machine, arg, machine->m.ncpus, &id) < 0)
        return NULL;
    const struct shi_slot *s = shi_slot(&machine->m, id);
    do { /* acquire pairs with shi_say_handler: name and time are this handler's, or newer */
        kind = shi_load_acquire(&s->handler);
        since = shi_load_acquire(&s->since);
        memcpy(name, s->handler_name, sizeof name);
    } while ((shi_load_acquire(&s->since) != since || shi_load_acquire(&s->handler) != kind) &&
             ++looks < 8);
    memcpy(task, s->task_name, sizeof task);
    task[sizeof task - 1] = name[sizeof name - 1] = 0;
    const char *text = kind ? name : NULL;
    uint32_t running = shi_load_acquire(&s->cur_csd);
    if (!kind && running && running <= machine->m.ncsds) {
        uint32_t func = shi_csd(&machine->m, running - 1)->func, i = func & ~SHI_FUNC_NATIVE;
        kind = SHI_H_IRQ;
        since = 0;
        if (machine->natives) { /* a guest has numbers of its own */
            uint32_t number = i + 1;
            for (i = 0; i < SHI_NATIVE_MAX && machine->natives[i] != number; i++)
                ;
        }
        text = func & SHI_FUNC_NATIVE ? shi_native_name_of(i) : NULL;
    }
    return Py_BuildValue("(INKN)", kind,
                         text ? PyUnicode_DecodeUTF8(text, (Py_ssize_t)strlen(text), "replace")
                              : Py_NewRef(Py_None),
                         kind && since ? (unsigned long long)shi_stamp_to_mono(since) : 0ull,
                         shi_load_acquire(&s->task)
                             ? PyUnicode_DecodeUTF8(task, (Py_ssize_t)strlen(task), "replace")
                             : Py_NewRef(Py_None));
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

METHOD(set_firmware)
{
    unsigned long pid = PyLong_AsUnsignedLong(arg);
    if (PyErr_Occurred())
        return NULL;
    shi_store_full(&MACHINE(object)->m.header->firmware_pid, (uint32_t)pid);
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

/* set_idle(cpu, policy): takes effect at the CPU's next look. */
METHOD(set_idle)
{
    Machine *machine = MACHINE(object);
    unsigned cpu, idle;
    if (!PyArg_ParseTuple(arg, "II", &cpu, &idle))
        return NULL;
    if (cpu >= machine->m.ncpus || idle > SHI_IDLE_HALT) {
        PyErr_SetString(PyExc_ValueError, "no such CPU or policy");
        return NULL;
    }
    shi_store_full(&shi_slot(&machine->m, cpu)->idle, idle);
    shi_enter(&machine->self);
    shi_chip_prod(&machine->self, cpu);
    shi_leave(&machine->self);
    Py_RETURN_NONE;
}

/* hotplug(cpu, offline) -> state of the CPU's word: ask it to park, or to come back. */
METHOD(hotplug)
{
    Machine *machine = MACHINE(object);
    unsigned cpu;
    int offline;
    if (!PyArg_ParseTuple(arg, "Ip", &cpu, &offline) || shi_use(machine) < 0)
        return NULL;
    if (cpu >= machine->m.ncpus)
        return shi_raise_errno(machine, -ENXIO, (int)cpu);
    struct shi_slot *slot = shi_slot(&machine->m, cpu);
    uint32_t want = offline ? SHI_HP_OFFLINE : SHI_HP_ONLINE,
             old = shi_load_acquire(&slot->hotplug);
    while (old != SHI_HP_STOP && !shi_cas_full(&slot->hotplug, &old, want))
        ;
    shi_event_wake(&slot->hotplug);
    if (!offline && machine->m.chip.startup)
        shi_chip_let_start(&machine->self, cpu);
    if (offline) {
        if (machine->self.host && shi_load_acquire(&slot->starved))
            shi_read_early(machine, cpu); /* it goes when it has sent everything */
        /* Any interrupt makes it look. */
        shi_enter(&machine->self);
        shi_chip_prod(&machine->self, cpu);
        shi_leave(&machine->self);
    }
    Py_RETURN_NONE;
}

static PyObject *wait_word(shi_a32 *word, PyObject *arg)
{
    unsigned long seen;
    double seconds;
    if (!PyArg_ParseTuple(arg, "kd", &seen, &seconds))
        return NULL;
    int err;
    Py_BEGIN_ALLOW_THREADS err =
        shi_load_acquire(word) == (uint32_t)seen
            ? shi_event_wait(word, (uint32_t)seen, seconds < 0 ? -1 : (int64_t)(seconds * 1e9))
            : 0;
    Py_END_ALLOW_THREADS if (err == -EINTR && PyErr_CheckSignals() < 0) return NULL;
    return PyLong_FromUnsignedLong(shi_load_acquire(word));
}

/* Event counts: `seen = m.event`, look, `m.wait_event(seen, seconds)`. */
METHOD(wait_event)
{
    return wait_word(&MACHINE(object)->self.slot->event, arg);
}

METHOD(ring_event)
{
    (void)arg;
    shi_event_ring(&MACHINE(object)->self.slot->event);
    Py_RETURN_NONE;
}

METHOD(wait_hotplug)
{
    return wait_word(&MACHINE(object)->m.header->hotplug_event, arg);
}

/* ---- the firmware's work --------------------------------------------------------- */

#define CPU_METHOD(name, expression)                                                           \
    METHOD(name)                                                                               \
    {                                                                                          \
        Machine *machine = MACHINE(object);                                                    \
        uint32_t cpu;                                                                          \
        if (CPU_ARG(machine, arg, &cpu) < 0)                                                   \
            return NULL;                                                                       \
        expression;                                                                            \
    }
CPU_METHOD(boot_error, return PyLong_FromUnsignedLong(
                           shi_load_acquire(&shi_slot(&machine->m, cpu)->boot_error)))
CPU_METHOD(ended,
           return PyLong_FromUnsignedLong(shi_load_acquire(&shi_slot(&machine->m, cpu)->end)))
CPU_METHOD(reap_complete,
           return PyLong_FromUnsignedLong(shi_reap_complete(&machine->self, cpu)))
METHOD(reap_orphans)
{
    Machine *machine = MACHINE(object);
    unsigned long id = PyLong_AsUnsignedLong(arg);
    if (PyErr_Occurred())
        return NULL;
    if (id >= machine->m.nslots)
        return PyErr_Format(PyExc_ValueError, "no slot %lu", id);
    return PyLong_FromUnsignedLong(shi_reap_orphans(&machine->self, (uint32_t)id));
}

CPU_METHOD(reap_unguarded, return PyBool_FromLong(shi_reap_unguarded(&machine->self, cpu)))
CPU_METHOD(reap_reset, return PyLong_FromUnsignedLong(shi_reap_reset(&machine->self, cpu)))

/* guest_admit(slot, pid), guest_bury(slot), guest_clear(slot) -> csds others still have. */
METHOD(guest_admit)
{
    Machine *machine = MACHINE(object);
    unsigned id, pid;
    if (!PyArg_ParseTuple(arg, "II", &id, &pid))
        return NULL;
    if (id < shi_first_guest(&machine->m) || id >= machine->m.nslots) {
        PyErr_SetString(PyExc_ValueError, "no slot of a guest");
        return NULL;
    }
    shi_guest_admit(&machine->self, id, pid);
    Py_RETURN_NONE;
}

static int guest_arg(const Machine *machine, PyObject *arg, uint32_t *id)
{
    unsigned long value = PyLong_AsUnsignedLong(arg);
    if (PyErr_Occurred())
        return -1;
    if (value < shi_first_guest(&machine->m) || value >= machine->m.nslots) {
        PyErr_SetString(PyExc_ValueError, "no slot of a guest");
        return -1;
    }
    *id = (uint32_t)value;
    return 0;
}

METHOD(guest_bury)
{
    uint32_t id;
    if (guest_arg(MACHINE(object), arg, &id) < 0)
        return NULL;
    shi_guest_bury(&MACHINE(object)->self, id);
    Py_RETURN_NONE;
}

METHOD(guest_clear)
{
    uint32_t id;
    if (guest_arg(MACHINE(object), arg, &id) < 0)
        return NULL;
    return PyLong_FromUnsignedLong(shi_guest_clear(&MACHINE(object)->self, id));
}

/* reap_mark(cpu, end=0): it is dead; `end` is what ended() says from now on. */
METHOD(reap_mark)
{
    Machine *machine = MACHINE(object);
    unsigned cpu, end = 0;
    if (!PyArg_ParseTuple(arg, "I|I", &cpu, &end))
        return NULL;
    if (cpu >= machine->m.ncpus)
        return PyErr_Format(PyExc_ValueError, "no slot %u", cpu);
    shi_reap_mark(&machine->self, cpu, end);
    Py_RETURN_NONE;
}

METHOD(reap_ring_all)
{
    (void)arg;
    shi_reap_ring_all(&MACHINE(object)->self);
    Py_RETURN_NONE;
}

/* The watchdog's look, if 10 ms have gone by since the last.  1: the firmware has something
 * to do, 0, or -1. */
static int look_after(Machine *machine)
{
    uint64_t now = shi_now_ns();
    if (!machine->watch && !(machine->watch = shi_watch_new(&machine->m))) {
        PyErr_NoMemory();
        return -1;
    }
    if (now - machine->looked_ns < SHI_WATCH_NS)
        return 0;
    machine->looked_ns = now;
    return shi_watch_look(&machine->self, machine->watch);
}

METHOD(look_after)
{
    (void)arg;
    if (look_after(MACHINE(object)) < 0)
        return NULL;
    Py_RETURN_NONE;
}

/* init_order(cpu) -> generation of the process that INIT ends, 0: none */
CPU_METHOD(init_order, return PyLong_FromUnsignedLong(
                           shi_load_acquire(&shi_slot(&machine->m, cpu)->pic.init)))

/* watch(fd, seconds): look after the CPUs until `fd` can be read, a CPU is to be ended or
 * started, or time is up (< 0: never).  In C, because it is the firmware's life: 100 times a second. */
METHOD(watch)
{
    Machine *machine = MACHINE(object);
    int fd, ready = 0;
    double seconds;
    if (!PyArg_ParseTuple(arg, "id", &fd, &seconds))
        return NULL;
    uint64_t end = seconds < 0 ? UINT64_MAX : shi_now_ns() + (uint64_t)(seconds * 1e9);
    do {
        int asked = look_after(machine);
        if (asked < 0)
            return NULL;
        if (asked)
            break;
        uint64_t now = shi_now_ns(), next = machine->looked_ns + SHI_WATCH_NS;
        uint64_t until = next < end ? next : end;
        uint64_t ns = until > now ? until - now : 0;
        struct timespec t = { .tv_sec = (time_t)(ns / 1000000000),
                              .tv_nsec = (long)(ns % 1000000000) };
        struct pollfd p = { .fd = fd, .events = POLLIN };
        Py_BEGIN_ALLOW_THREADS ready = ppoll(&p, 1, &t, NULL);
        Py_END_ALLOW_THREADS if (ready < 0 && (errno != EINTR || PyErr_CheckSignals() <
                                                                     0)) return PyErr_Occurred()
            ? NULL
            : PyErr_SetFromErrno(PyExc_OSError);
    } while (ready <= 0 && shi_now_ns() < end);
    Py_RETURN_NONE;
}

METHOD(stop_all)
{
    (void)arg;
    shi_reap_stop_all(&MACHINE(object)->self);
    Py_RETURN_NONE;
}

/* trylock(name) -> bool: take a lock between hosts; unlock(name). */
static shi_a64 *lock_named(Machine *machine, PyObject *arg)
{
    struct shi_header *h = machine->m.header;
    const char *name = PyUnicode_AsUTF8(arg);
    if (name && !strcmp(name, "array"))
        return &h->array_lock;
    if (name && !strcmp(name, "hotplug"))
        return &h->hotplug_lock;
    if (name && !strcmp(name, "tool"))
        return &h->tool_lock;
    if (name)
        PyErr_Format(PyExc_ValueError, "there is no lock %s", name);
    return NULL;
}

METHOD(trylock)
{
    Machine *machine = MACHINE(object);
    shi_a64 *lock = shi_use(machine) < 0 ? NULL : lock_named(machine, arg);
    if (!lock)
        return NULL;
    /* This host's already: its threads come here one at a time, so one of them left it,
     * interrupted (Ctrl-C) between taking it and the block that gives it back. */
    if (lock != &machine->m.header->tool_lock && shi_lock_mine(&machine->self, lock))
        Py_RETURN_TRUE;
    return PyBool_FromLong(shi_lock_try(&machine->self, lock) == 0);
}

METHOD(unlock)
{
    shi_a64 *lock = lock_named(MACHINE(object), arg);
    if (!lock)
        return NULL;
    shi_lock_release(&MACHINE(object)->self, lock);
    Py_RETURN_NONE;
}

/* back(offset, length): allocate a range of the file, OSError ENOSPC when it is full. */
METHOD(back)
{
    unsigned long long offset, length;
    if (!PyArg_ParseTuple(arg, "KK", &offset, &length))
        return NULL;
    int err = shi_machine_back(&MACHINE(object)->m, offset, length);
    if (err)
        return shi_os_error(-err, "/dev/shm");
    Py_RETURN_NONE;
}

/* Arrays are allocated one after the other at the end of the file: where it ends now. */
static uint64_t file_end(const struct shi_machine *m)
{
    struct stat file;
    if (m->fd < 0) /* a fork's child has closed it */
        return m->total_bytes;
    return fstat(shi_machine_fd(m), &file) ? 0 : (uint64_t)file.st_size;
}

/* Where the arrays end, as the header says, but not beyond the file: a look there is a
 * SIGBUS. */
static uint64_t array_end(const struct shi_machine *m)
{
    uint64_t end = shi_array_end(m), file = file_end(m);
    return end < file ? end : file;
}

/* add_array(nbytes) -> (index, offset) of a new, zeroed, page-aligned range. */
METHOD(add_array)
{
    struct shi_machine *m = &MACHINE(object)->m;
    unsigned long long bytes = PyLong_AsUnsignedLongLong(arg);
    if (PyErr_Occurred())
        return NULL;
    uint64_t used = shi_load_acquire(&m->header->array_used);
    uint32_t n = shi_load_acquire(&m->header->narrays);
    /* Anything else is damage, and would put this array where another one is, or leave a
     * hole before it. */
    if (used % SHI_PAGE || used > m->array_bytes || used < MACHINE(object)->array_top ||
        (used && m->array_offset + used > file_end(m)))
        return shi_raise(
            shi_py.LayoutError, 0, -1,
            "no array can be made any more: the header of this machine is damaged");
    if (bytes > m->array_bytes || used > m->array_bytes - bytes) {
        PyErr_Format(PyExc_MemoryError, "arrays of a machine may have %llu bytes together",
                     (unsigned long long)m->array_bytes);
        return NULL;
    }
    if (n >= SHI_MAX_ARRAYS) {
        PyErr_Format(PyExc_MemoryError, "a machine may have %u arrays", SHI_MAX_ARRAYS);
        return NULL;
    }
    uint64_t end = (used + bytes + SHI_PAGE - 1) / SHI_PAGE * SHI_PAGE;
    int err = shi_machine_back(m, m->array_offset + used, end - used);
    if (err)
        return shi_os_error(-err, "/dev/shm");
    MACHINE(object)->array_top = end;
    shi_store_relaxed(&m->header->array_used, end);
    return Py_BuildValue("(IK)", n, (unsigned long long)(m->array_offset + used));
}

/* publish_array(index, offset): after its descriptor is written. */
METHOD(publish_array)
{
    struct shi_machine *m = &MACHINE(object)->m;
    unsigned index;
    unsigned long long offset;
    if (!PyArg_ParseTuple(arg, "IK", &index, &offset))
        return NULL;
    if (index >= SHI_MAX_ARRAYS) {
        PyErr_SetString(PyExc_ValueError, "index");
        return NULL;
    }
    shi_store_relaxed(&m->header->arrays[index], offset);
    /* Release: who reads the count finds the descriptors. */
    shi_store_release(&m->header->narrays, index + 1);
    Py_RETURN_NONE;
}

METHOD(array_offsets)
{
    struct shi_machine *m = &MACHINE(object)->m;
    uint32_t n = shi_load_acquire(&m->header->narrays), i;
    (void)arg;
    if (n > SHI_MAX_ARRAYS)
        n = SHI_MAX_ARRAYS;
    PyObject *list = PyList_New(n);
    for (i = 0; list && i < n; i++) {
        PyObject *offset = PyLong_FromUnsignedLongLong(shi_load_relaxed(&m->header->arrays[i]));
        if (!offset)
            Py_CLEAR(list);
        else
            PyList_SET_ITEM(list, i, offset);
    }
    return list;
}

/* Offset of an address in the mapping, or -1. */
METHOD(offset_of)
{
    struct shi_machine *m = &MACHINE(object)->m;
    unsigned long long address = PyLong_AsUnsignedLongLong(arg);
    if (PyErr_Occurred())
        return NULL;
    uint64_t base = (uint64_t)(uintptr_t)m->base;
    if (address < base || address >= base + m->total_bytes)
        return PyLong_FromLong(-1);
    return PyLong_FromUnsignedLongLong(address - base);
}

/* ---- fault tests ----------------------------------------------------------------- */

METHOD(arm_step)
{
    Machine *machine = MACHINE(object);
    unsigned slot, action, skip = 0;
    const char *name;
    int step;
    if (!PyArg_ParseTuple(arg, "IsI|I", &slot, &name, &action, &skip))
        return NULL;
    for (step = 1; step < SHI_STEP_COUNT; step++)
        if (!strcmp(shi_step_names[step], name))
            break;
    if (step == SHI_STEP_COUNT || slot >= machine->m.nslots)
        return PyErr_Format(PyExc_ValueError, "no step %s or slot %u", name, slot);
    struct shi_slot *s = shi_slot(&machine->m, slot);
    shi_store_relaxed(&s->step_action, action);
    shi_store_relaxed(&s->step_skip, skip);
    shi_store_relaxed(&s->step_hit, 0);
    shi_store_release(&s->step, (uint32_t)step);
    Py_RETURN_NONE;
}

METHOD(step_hit)
{
    Machine *machine = MACHINE(object);
    uint32_t slot;
    if (slot_arg(machine, arg, machine->m.nslots, &slot) < 0)
        return NULL;
    uint32_t hit = shi_load_acquire(&shi_slot(&machine->m, slot)->step_hit);
    return PyUnicode_FromString(hit < SHI_STEP_COUNT ? shi_step_names[hit] : "?");
}

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
GETTER(array_end, PyLong_FromUnsignedLongLong(array_end(&machine->m)))
GETTER(array_bytes, PyLong_FromUnsignedLongLong(machine->m.array_bytes))
GETTER(state, PyLong_FromUnsignedLong(shi_load_acquire(&machine->m.header->machine_state)))
GETTER(shut_down, PyBool_FromLong(shi_load_acquire(&machine->m.header->shut_down) != 0))
GETTER(event, PyLong_FromUnsignedLong(shi_load_acquire(&machine->self.slot->event)))
GETTER(hotplug_event,
       PyLong_FromUnsignedLong(shi_load_acquire(&machine->m.header->hotplug_event)))
GETTER(firmware_pid,
       PyLong_FromUnsignedLong(shi_load_acquire(&machine->m.header->firmware_pid)))
GETTER(host_pid, PyLong_FromUnsignedLong(shi_load_acquire(&machine->m.header->host_pid)))
GETTER(boot_time, PyLong_FromUnsignedLongLong(machine->m.header->boot_time_ns))
GETTER(doorbell, PyLong_FromUnsignedLong(machine->m.doorbell))
GETTER(kick_signal, PyLong_FromUnsignedLong(machine->m.kick_signal))
GETTER(nmi_signal, PyLong_FromUnsignedLong(machine->m.nmi_signal))
GETTER(kick, PyBool_FromLong(machine->m.kick))
GETTER(oversubscribed, PyBool_FromLong(machine->m.oversubscribed))
GETTER(chip, PyUnicode_FromString(machine->m.chip.name))
GETTER(closed, PyBool_FromLong(machine->closed || machine->foreign))
GETTER(irq_offset, PyLong_FromUnsignedLongLong(machine->m.irq_offset))
GETTER(line_count_offset, PyLong_FromUnsignedLongLong(shi_line_count_offset(&machine->m)))
GETTER(affinity_offset, PyLong_FromUnsignedLongLong(shi_affinity_offset(&machine->m)))
GETTER(slot_offset, PyLong_FromUnsignedLongLong(machine->m.slot_offset))
GETTER(trace_offset, PyLong_FromUnsignedLongLong(machine->m.trace_offset))
GETTER(trace_records, PyLong_FromUnsignedLong(machine->m.trace_records))

#define GET(name) { #name, get_##name, NULL, NULL, NULL }
static PyGetSetDef machine_getset[] = {
    GET(ncpus),
    GET(nslots),
    GET(id),
    GET(is_cpu),
    GET(name),
    GET(payload_max),
    GET(array_bytes),
    GET(array_offset),
    GET(array_end),
    GET(state),
    GET(event),
    GET(hotplug_event),
    GET(firmware_pid),
    GET(host_pid),
    GET(boot_time),
    GET(doorbell),
    GET(kick_signal),
    GET(kick),
    GET(oversubscribed),
    GET(chip),
    GET(closed),
    GET(slot_offset),
    GET(trace_offset),
    GET(trace_records),
    GET(nmi_signal),
    GET(irq_offset),
    GET(affinity_offset),
    GET(line_count_offset),
    GET(shut_down),
    { NULL, NULL, NULL, NULL, NULL },
};

#define NOARGS(name, text) { #name, machine_##name, METH_NOARGS, #name "()\n--\n\n" text }
#define ONE(name, text) { #name, machine_##name, METH_O, text }
#define MANY(name, text) { #name, machine_##name, METH_VARARGS, text }
PyMethodDef shi_machine_methods[] = {
    NOARGS(close, "Refuse every further use."),
    ONE(leave, "leave(seconds) -> bool: a guest gives its slot up"),
    NOARGS(set_ending, "The host ends the machine in order."),
    NOARGS(disown, "After a fork, in the child: not ours."),
    MANY(open_doorbells, "open_doorbells(prefix, eventfds)"),
    ONE(adopt_doorbells, "adopt_doorbells(fds): a guest's"),
    NOARGS(doorbell_fds, "Descriptors that stand for doorbells here."),
    ONE(map_natives, "map_natives(numbers): ours of the machine's native handlers, in order"),
    ONE(slot, "slot(id) -> (pid, tid, core, state, generation, start_time, task, registered, "
              "word, busy)"),
    ONE(doing, "doing(cpu) -> (handler's kind, its name, ns of its begin, task's name)"),
    ONE(set_state, "set_state(state)"),
    NOARGS(set_shut_down, "The owner ends the machine in order."),
    ONE(set_firmware, "set_firmware(pid)"),
    ONE(set_current, "set_current(on): module-level shmipi.smp acts on this machine"),
    MANY(set_idle, "set_idle(cpu, policy)"),
    MANY(hotplug, "hotplug(cpu, offline)"),
    MANY(wait_event, "wait_event(seen, seconds) -> count"),
    NOARGS(ring_event, "Wake whoever waits for an event of this slot."),
    MANY(wait_hotplug, "wait_hotplug(seen, seconds) -> count"),
    ONE(boot_error, "boot_error(cpu) -> errno"),
    ONE(ended, "ended(cpu) -> how its process ended: a signal, END_EXITED | status, or 0"),
    MANY(reap_mark, "reap_mark(cpu, end=0)"),
    ONE(reap_complete, "reap_complete(cpu) -> how many"),
    ONE(reap_orphans, "reap_orphans(slot) -> csds of its earlier processes that are out"),
    ONE(reap_unguarded, "reap_unguarded(cpu) -> bool"),
    ONE(reap_reset, "reap_reset(cpu) -> generation"),
    MANY(guest_admit, "guest_admit(slot, pid)"),
    ONE(guest_bury, "guest_bury(slot)"),
    ONE(guest_clear, "guest_clear(slot) -> how many csds others still have"),
    ONE(trylock, "trylock(name) -> bool: a lock between hosts (shi_header)"),
    ONE(unlock, "unlock(name)"),
    NOARGS(reap_ring_all, "Ring every CPU that has work."),
    NOARGS(look_after, "The watchdog's look, if 10 ms have gone by since the last."),
    ONE(init_order, "init_order(cpu) -> generation of the process that INIT ends"),
    MANY(watch, "watch(fd, seconds): look after the CPUs until fd can be read"),
    NOARGS(stop_all, "The machine stops."),
    MANY(back, "back(offset, length)"),
    ONE(add_array, "add_array(nbytes) -> (index, offset)"),
    MANY(publish_array, "publish_array(index, offset)"),
    NOARGS(array_offsets, "Offsets of all array descriptors."),
    ONE(offset_of, "offset_of(address) -> offset or -1"),
    MANY(arm_step, "arm_step(slot, name, action, skip=0)"),
    ONE(step_hit, "step_hit(slot) -> name"),
    { NULL, NULL, 0, NULL },
};

static PyObject *kick_block(PyObject *module, PyObject *arg)
{
    unsigned signo;
    int block;
    sigset_t set;
    (void)module;
    if (!PyArg_ParseTuple(arg, "Ip", &signo, &block))
        return NULL;
    sigemptyset(&set);
    sigaddset(&set, (int)signo);
    pthread_sigmask(block ? SIG_BLOCK : SIG_UNBLOCK, &set, NULL);
    Py_RETURN_NONE;
}

/* signal_fd(signals): block them here and read them from the descriptor instead. */
static PyObject *signal_fd(PyObject *module, PyObject *arg)
{
    sigset_t set;
    Py_ssize_t i;
    (void)module;
    sigemptyset(&set);
    PyObject *list = PySequence_Fast(arg, "signals");
    if (!list)
        return NULL;
    for (i = 0; i < PySequence_Fast_GET_SIZE(list); i++)
        sigaddset(&set, (int)PyLong_AsLong(PySequence_Fast_GET_ITEM(list, i)));
    Py_DECREF(list);
    if (PyErr_Occurred())
        return NULL;
    pthread_sigmask(SIG_BLOCK, &set, NULL);
    int fd = signalfd(-1, &set, SFD_NONBLOCK | SFD_CLOEXEC);
    return fd < 0 ? shi_os_error(errno, "signalfd") : PyLong_FromLong(fd);
}

/* stamp_to_mono(stamp): CLOCK_MONOTONIC ns of a stamp of this machine's clock. */
static PyObject *stamp_to_mono(PyObject *module, PyObject *arg)
{
    unsigned long long stamp = PyLong_AsUnsignedLongLong(arg);
    (void)module;
    return PyErr_Occurred() ? NULL : PyLong_FromUnsignedLongLong(shi_stamp_to_mono(stamp));
}

PyMethodDef shi_machine_functions[] = {
    { "stamp_to_mono", stamp_to_mono, METH_O, "stamp_to_mono(stamp) -> ns" },
    { "set_open", set_open, METH_O, "set_open(count): so many Clusters are open here" },
    { "signal_fd", signal_fd, METH_O, "signal_fd(signals) -> fd" },
    { "kick_block", kick_block, METH_VARARGS, "kick_block(signo, block)" },
    { NULL, NULL, 0, NULL },
};

/* The type's methods come from several files. */
static PyMethodDef *all_methods(void)
{
    static PyMethodDef all[192];
    PyMethodDef *const parts[] = { shi_machine_methods, shi_call_methods, shi_cpu_methods,
                                   shi_bench_methods,   shi_chip_methods, shi_wait_methods,
                                   shi_irq_methods };
    size_t n = 0, p;
    for (p = 0; p < sizeof parts / sizeof *parts; p++) {
        PyMethodDef *def;
        for (def = parts[p]; def->ml_name && n < sizeof all / sizeof *all - 1; def++)
            all[n++] = *def;
    }
    return all;
}

int shi_machine_types(PyObject *module)
{
    PyType_Slot slots[] = {
        { Py_tp_new, machine_new },
        { Py_tp_dealloc, machine_dealloc },
        { Py_tp_methods, all_methods() },
        { Py_tp_getset, machine_getset },
        { Py_bf_getbuffer, machine_getbuffer },
        { Py_tp_doc, "Machine(fd, slot)\n--\n\nThis process's view of a machine." },
        { 0, NULL },
    };
    PyType_Spec spec = {
        .name = "shmipi._core.Machine",
        .basicsize = sizeof(Machine),
        .flags = Py_TPFLAGS_DEFAULT,
        .slots = slots,
    };
    if (!shi_machine_type)
        shi_machine_type = (PyTypeObject *)PyType_FromSpec(&spec);
    return shi_machine_type
               ? PyModule_AddObjectRef(module, "Machine", (PyObject *)shi_machine_type)
               : -1;
}
