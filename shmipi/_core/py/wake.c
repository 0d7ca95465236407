/* SPDX-License-Identifier: MIT */
/* wake_up_if_idle, wake_up_all_idle_cpus, cpus_peek_for_pending_ipi; IPIs that are put off. */
#include "py/wake.h"

#include <errno.h>

#include "smp/flag_ipi.h"
#include "smp/sched.h"
#include "py/trace.h"

/* is_idle_task(rq->curr): nothing is on it, so its idle loop polls or sleeps. */
static bool runs_idle(const struct shi_machine *m, uint32_t cpu)
{
    const struct shi_slot *slot = shi_slot(m, cpu);
    enum shi_state state = shi_word_state(shi_load_acquire(&slot->word));
    return (state == SHI_POLLING || state == SHI_HALTED || state == SHI_RUNG) &&
           !shi_load_relaxed(&slot->task);
}

static void wake_if_idle(struct shi_self *self, uint32_t cpu)
{
    if (!runs_idle(self->m, cpu))
        return;
    shi_enter(self);
    shi_irq_resched_cpu(self, cpu);
    shi_leave(self);
}

PyObject *shi_wake_if_idle(Machine *machine, PyObject *const *args, Py_ssize_t nargs,
                           PyObject *kwnames)
{
    static const char *const names[] = { "cpu" };
    PyObject *a[1];
    int64_t cpu;
    if (shi_parse("wake_up_if_idle", names, 1, 1, args, nargs, kwnames, a) < 0 ||
        shi_as_cpu(a[0], &cpu) < 0)
        return NULL;
    if (cpu < 0 || cpu >= machine->m.ncpus)
        return shi_raise_errno(machine, -ENXIO, (int)cpu);
    shi_say_call(machine, NULL);
    wake_if_idle(&machine->self, (uint32_t)cpu);
    shi_call_said(machine);
    Py_RETURN_NONE;
}

PyObject *shi_wake_all_idle(Machine *machine, PyObject *const *args, Py_ssize_t nargs,
                            PyObject *kwnames)
{
    struct shi_self *self = &machine->self;
    uint32_t cpu;
    if (shi_parse("wake_up_all_idle_cpus", NULL, 0, 0, args, nargs, kwnames, NULL) < 0)
        return NULL;
    shi_say_call(machine, NULL);
    for (cpu = 0; cpu < machine->m.ncpus; cpu++)
        if (self->host || cpu != self->id)
            wake_if_idle(self, cpu);
    shi_call_said(machine);
    Py_RETURN_NONE;
}

PyObject *shi_peek_for_pending(Machine *machine, PyObject *const *args, Py_ssize_t nargs,
                               PyObject *kwnames)
{
    static const char *const names[] = { "mask" };
    PyObject *a[1];
    uint32_t *cpus, n, i;
    bool found = false;
    if (shi_parse("cpus_peek_for_pending_ipi", names, 1, 1, args, nargs, kwnames, a) < 0 ||
        shi_as_mask(machine, a[0], &cpus, &n) < 0)
        return NULL;
    for (i = 0; i < n && !found; i++)
        found = shi_word_head(shi_load_relaxed(&shi_slot(&machine->m, cpus[i])->word)) != 0;
    PyMem_Free(cpus);
    return PyBool_FromLong(found);
}

PyObject *shi_flag_ipis(Machine *machine, PyObject *const *args, Py_ssize_t nargs,
                        PyObject *kwnames)
{
    static const char *const names[] = { "mask" };
    uint64_t words[SHI_MAX_CPUS / 64] = { 0 };
    PyObject *a[1];
    uint32_t *cpus, n, i;
    if (shi_parse("flag_ipi", names, 1, 1, args, nargs, kwnames, a) < 0 ||
        shi_as_mask(machine, a[0], &cpus, &n) < 0)
        return NULL;
    for (i = 0; i < n; i++)
        words[cpus[i] / 64] |= 1ull << (cpus[i] % 64);
    PyMem_Free(cpus);
    shi_flag_ipi(&machine->self, words);
    Py_RETURN_NONE;
}

PyObject *shi_signal_pending(Machine *machine, PyObject *const *args, Py_ssize_t nargs,
                             PyObject *kwnames)
{
    if (shi_parse("signal_pending_ipi", NULL, 0, 0, args, nargs, kwnames, NULL) < 0)
        return NULL;
    if (machine->self.in_nmi)
        return shi_raise(shi_py.StateError, 0, (int)machine->self.id,
                         "an NMI handler is no schedule point: flag_ipi() alone");
    return PyLong_FromUnsignedLong(shi_signal_pending_ipi(&machine->self));
}
