/* SPDX-License-Identifier: MIT */
/* Where the users of IPIs keep their state, and which of their rules are off. */
#include "py/base.h"

#include "base/rules.h"
#include "py/net.h"
#include "py/tables.h"

static const char *const user_names[SHI_NUSERS] = {
#define X(name) #name,
    SHI_USERS(X)
#undef X
};

static int as_user(PyObject *name)
{
    const char *text = PyUnicode_AsUTF8(name);
    int i;
    if (!text)
        return -1;
    for (i = 0; i < SHI_NUSERS; i++)
        if (!strcmp(user_names[i], text))
            return i;
    PyErr_Format(PyExc_ValueError, "there is no user of IPIs called %R", name);
    return -1;
}

METHOD(user_offset)
{
    int user = as_user(arg);
    return user < 0 ? NULL
                    : PyLong_FromUnsignedLongLong(
                          shi_load_acquire(&MACHINE(object)->m.header->users[user]));
}

METHOD(publish_user)
{
    unsigned long long offset;
    PyObject *name;
    if (!PyArg_ParseTuple(arg, "UK", &name, &offset))
        return NULL;
    int user = as_user(name);
    if (user < 0)
        return NULL;
    /* Release: who finds the offset finds what was stored there before. */
    shi_store_release(&MACHINE(object)->m.header->users[user], offset);
    Py_RETURN_NONE;
}

METHOD(broken)
{
    (void)arg;
    return PyLong_FromUnsignedLongLong(shi_load_relaxed(&MACHINE(object)->m.header->broken));
}

METHOD(set_broken)
{
    unsigned long long mask = PyLong_AsUnsignedLongLong(arg);
    if (PyErr_Occurred())
        return NULL;
    shi_store_full(&MACHINE(object)->m.header->broken, mask);
    Py_RETURN_NONE;
}

/* irq_taken + irq_timer + nmi: what was counted where it came in. */
static uint64_t interrupts_of(const struct shi_machine *m, uint32_t cpu)
{
    const enum shi_counter all[] = { SHI_C_irq_taken, SHI_C_irq_timer, SHI_C_nmi };
    uint64_t sum = 0;
    uint32_t ctx, i;
    for (ctx = 0; ctx < SHI_NCTX; ctx++)
        for (i = 0; i < sizeof all / sizeof *all; i++)
            /* Acquire: the causes are read between two of these sums, and in this order. */
            sum += shi_load_acquire(&shi_slot(m, cpu)->counters[ctx][all[i]]);
    return sum;
}

/* interrupt_causes(cpu) -> (interrupts, by cause, interrupts): as they were before and after. */
METHOD(interrupt_causes)
{
    const struct shi_machine *m = &MACHINE(object)->m;
    unsigned long cpu = PyLong_AsUnsignedLong(arg);
    if (PyErr_Occurred())
        return NULL;
    if (cpu >= m->ncpus)
        return shi_raise_errno(MACHINE(object), -ENXIO, (int)cpu);
    unsigned long long before = interrupts_of(m, (uint32_t)cpu);
    uint64_t causes[SHI_NCAUSES];
    uint32_t i;
    for (i = 0; i < SHI_NCAUSES; i++)
        causes[i] = shi_load_acquire(&shi_slot(m, (uint32_t)cpu)->causes[i]);
    PyObject *words = shi_words(causes, SHI_NCAUSES);
    return words ? Py_BuildValue("KNK", before, words,
                                 (unsigned long long)interrupts_of(m, (uint32_t)cpu))
                 : NULL;
}

PyMethodDef shi_users_methods[] = {
    ONE(user_offset, "user_offset(name): where a user of IPIs has its state, 0: nowhere."),
    MANY(publish_user, "publish_user(name, offset): its state is there, and is made."),
    NOARGS(broken, "The rules that are switched off: bits, by index in RULES."),
    ONE(set_broken, "set_broken(mask): switch rules off, and all others on."),
    ONE(interrupt_causes, "interrupt_causes(cpu) -> (interrupts, by cause, interrupts)"),
    { NULL, NULL, 0, NULL },
};

int shi_users_add(PyObject *module)
{
    PyObject *rules = PyTuple_New(SHI_RULE_COUNT);
    Py_ssize_t i;
    for (i = 0; rules && i < SHI_RULE_COUNT; i++) {
        const struct shi_rule_text *text = &shi_rule_texts[i];
        PyObject *rule =
            Py_BuildValue("(ssss)", text->user, text->rule, text->function, text->what);
        if (!rule)
            Py_CLEAR(rules);
        else
            PyTuple_SET_ITEM(rules, i, rule);
    }
    int err = rules ? PyModule_AddObjectRef(module, "RULES", rules) : -1;
    Py_XDECREF(rules);
    return err < 0 ? err
           : PyModule_AddFunctions(module, shi_mm_functions) < 0
               ? -1
               : PyModule_AddFunctions(module, shi_membarrier_functions);
}
