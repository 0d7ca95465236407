/* SPDX-License-Identifier: MIT */
/* What the slot of a CPU says. */
#include "py/base.h"

#include "base/clock.h"
#include "base/native.h"
#include "py/tables.h"

/* (pid, tid, core, state, generation, start_time, task, registered, halted_on) */
METHOD(slot)
{
    Machine *machine = MACHINE(object);
    uint32_t id;
    if (shi_as_slot(arg, machine->m.nslots, &id) < 0)
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
    ONE(slot, "slot(id) -> (pid, tid, core, state, generation, start_time, task, registered, "
              "word, busy)"),
    ONE(doing, "doing(cpu) -> (handler's kind, its name, ns of its begin, task's name)"),
    { NULL, NULL, 0, NULL },
};
