/* SPDX-License-Identifier: MIT */
/* Labelled steps, for fault tests. */
#include "py/base.h"

#include <string.h>

#include "base/step.h"
#include "py/tables.h"

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
    if (shi_as_slot(arg, machine->m.nslots, &slot) < 0)
        return NULL;
    uint32_t hit = shi_load_acquire(&shi_slot(&machine->m, slot)->step_hit);
    return PyUnicode_FromString(hit < SHI_STEP_COUNT ? shi_step_names[hit] : "?");
}

PyMethodDef shi_step_methods[] = {
    MANY(arm_step, "arm_step(slot, name, action, skip=0)"),
    ONE(step_hit, "step_hit(slot) -> name"),
    { NULL, NULL, 0, NULL },
};
