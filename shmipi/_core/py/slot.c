/* SPDX-License-Identifier: MIT */
/* What the slot of a CPU says. */
#include "py/base.h"

#include "base/clock.h"
#include "base/native.h"
#include "py/tables.h"

static PyTypeObject *slot_type;

static PyStructSequence_Field slot_fields[] = {
    { "pid", "of its process, 0: none" },
    { "tid", "of its thread" },
    { "core", "of the computer" },
    { "state", "RUNNING, POLLING, HALTED, OFFLINE, CPU_DEAD" },
    { "generation", "counts the processes that it has had" },
    { "start_time", "of the process, as the kernel says it" },
    { "task", "the name of the task that runs" },
    { "registered", "it has come up since its slot was reset" },
    { "word", "state, pending bits and head of the queue" },
    { "busy", "a task runs" },
    { NULL, NULL },
};
static PyStructSequence_Desc slot_desc = {
    .name = "shmipi._core.Slot",
    .doc = "What the slot of a CPU, or of a host, says.",
    .fields = slot_fields,
    .n_in_sequence = sizeof slot_fields / sizeof *slot_fields - 1,
};

/* slot(id) -> Slot */
METHOD(slot)
{
    Machine *machine = MACHINE(object);
    uint32_t id;
    Py_ssize_t i;
    if (shi_as_slot(arg, machine->m.nslots, &id) < 0)
        return NULL;
    struct shi_slot *s = shi_slot(&machine->m, id);
    char task[sizeof s->task_name + 1] = { 0 };
    memcpy(task, s->task_name, sizeof s->task_name);
    uint64_t w = shi_load_acquire(&s->word);
    PyObject *slot = PyStructSequence_New(slot_type);
    if (!slot)
        return NULL;
    PyObject *const fields[] = {
        PyLong_FromUnsignedLong(shi_load_relaxed(&s->pid)),
        PyLong_FromUnsignedLong(shi_load_relaxed(&s->tid)),
        PyLong_FromUnsignedLong(shi_load_relaxed(&s->core)),
        PyLong_FromUnsignedLong(shi_word_state(w)),
        PyLong_FromUnsignedLong(shi_load_relaxed(&s->generation)),
        PyLong_FromUnsignedLongLong(shi_load_relaxed(&s->start_time)),
        PyUnicode_DecodeUTF8(task, (Py_ssize_t)strlen(task), "replace"),
        PyBool_FromLong(shi_load_relaxed(&s->registered) != 0),
        PyLong_FromUnsignedLongLong(w),
        PyBool_FromLong(shi_load_relaxed(&s->task) != 0),
    };
    for (i = 0; i < slot_desc.n_in_sequence; i++)
        PyStructSequence_SetItem(slot, i, fields[i]);
    if (PyErr_Occurred())
        Py_CLEAR(slot);
    return slot;
}

/* doing(cpu) -> (handler: 0 or HANDLER_*, its name or None, CLOCK_MONOTONIC ns of its begin or
 * 0, the task's name or None). */
METHOD(doing)
{
    Machine *machine = MACHINE(object);
    uint32_t id, kind, looks = 0;
    uint64_t since;
    char name[SHI_HANDLER_NAME], task[sizeof((struct shi_slot *)0)->task_name];
    if (shi_as_slot(arg, machine->m.ncpus, &id) < 0)
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

PyMethodDef shi_slot_methods[] = {
    ONE(slot, "slot(id) -> Slot"),
    ONE(doing, "doing(cpu) -> (handler's kind, its name, ns of its begin, task's name)"),
    { NULL, NULL, 0, NULL },
};

int shi_slot_types(PyObject *module)
{
    if (!slot_type)
        slot_type = PyStructSequence_NewType(&slot_desc);
    return slot_type ? PyModule_AddObjectRef(module, "Slot", (PyObject *)slot_type) : -1;
}
