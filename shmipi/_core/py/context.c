/* SPDX-License-Identifier: MIT */
/* Where am I, and what may interrupt: the soft mask of this CPU. */
#include "py/base.h"

#include "irq/remind.h"
#include "smp/entry.h"
#include "smp/flag_ipi.h"
#include "smp/sched.h"
#include "py/entry.h"
#include "py/sched.h"
#include "py/tables.h"

/* What this process, and this thread of it, is: the NO_CPU, CPU_TASK or CPU_HANDLER. */
static PyObject *cpu_context(PyObject *Py_UNUSED(module), PyObject *Py_UNUSED(unused))
{
    const Machine *machine = shi_current;
    if (!machine || machine->self.left || machine->self.host)
        return PyLong_FromLong(SHI_NO_CPU);
    bool handler = pthread_equal(pthread_self(), machine->self.thread) &&
                   !shi_in_task(&machine->self);
    return PyLong_FromLong(handler ? SHI_CPU_HANDLER : SHI_CPU_TASK);
}

static PyObject *smp_processor_id(PyObject *Py_UNUSED(module), PyObject *Py_UNUSED(unused))
{
    Machine *machine = shi_use_cpu(SHI_ONLY_CPU);
    return machine ? PyLong_FromUnsignedLong(machine->self.id) : NULL;
}

/* A handler runs with interrupts off to its end; the kernel warns of one that does not. */
static int refuse_in_handler(const Machine *machine)
{
    static bool given;
    if (!machine->self.in_irq)
        return 0;
    return shi_warn_once(&given,
                         "an IPI handler enables interrupts: they stay disabled until it "
                         "has returned");
}

static PyObject *irq_disable(PyObject *Py_UNUSED(module), PyObject *Py_UNUSED(unused))
{
    Machine *machine = shi_use_cpu(SHI_ONLY_CPU);
    if (!machine)
        return NULL;
    shi_irq_save(&machine->self);
    Py_RETURN_NONE;
}

static PyObject *irq_enable(PyObject *Py_UNUSED(module), PyObject *Py_UNUSED(unused))
{
    Machine *machine = shi_use_cpu(SHI_ONLY_CPU);
    if (!machine || refuse_in_handler(machine) < 0)
        return NULL;
    if (!machine->self.in_irq)
        shi_irq_restore(&machine->self, 0);
    shi_after_enable(machine);
    if (shi_task_interrupt(machine) < 0)
        return NULL;
    Py_RETURN_NONE;
}

static PyObject *irq_save(PyObject *Py_UNUSED(module), PyObject *Py_UNUSED(unused))
{
    Machine *machine = shi_use_cpu(SHI_ONLY_CPU);
    return machine ? PyLong_FromLong(shi_irq_save(&machine->self)) : NULL;
}

static PyObject *irq_restore(PyObject *Py_UNUSED(module), PyObject *flags)
{
    Machine *machine = shi_use_cpu(SHI_ONLY_CPU);
    if (!machine)
        return NULL;
    long value = PyLong_AsLong(flags);
    if (PyErr_Occurred())
        return NULL;
    if (value != 0 && value != 1) {
        PyErr_SetString(PyExc_ValueError, "flags come from local_irq_save()");
        return NULL;
    }
    if (!value && refuse_in_handler(machine) < 0)
        return NULL;
    if (value || !machine->self.in_irq)
        shi_irq_restore(&machine->self, (uint8_t)value);
    shi_after_enable(machine);
    if (shi_task_interrupt(machine) < 0)
        return NULL;
    Py_RETURN_NONE;
}

static PyObject *preempt_disable(PyObject *Py_UNUSED(module), PyObject *Py_UNUSED(unused))
{
    Machine *machine = shi_use_cpu(SHI_ONLY_CPU);
    if (!machine)
        return NULL;
    machine->self.preempt++;
    Py_RETURN_NONE;
}

static PyObject *preempt_enable(PyObject *Py_UNUSED(module), PyObject *Py_UNUSED(unused))
{
    Machine *machine = shi_use_cpu(SHI_ONLY_CPU);
    if (!machine)
        return NULL;
    if (!machine->self.preempt)
        return shi_raise(shi_py.StateError, 0, (int)machine->self.id,
                         "preempt_enable() without preempt_disable()");
    if (!--machine->self.preempt) {
        shi_ipi_point(&machine->self); /* k_sched_unlock() */
        shi_after_enable(machine); /* the section may have held its own CPU's takedown off */
        shi_preempt_check(machine);
    }
    Py_RETURN_NONE;
}

static PyObject *get_cpu(PyObject *Py_UNUSED(module), PyObject *Py_UNUSED(unused))
{
    Machine *machine = shi_use_cpu(SHI_ONLY_CPU);
    if (!machine)
        return NULL;
    machine->self.preempt++;
    return PyLong_FromUnsignedLong(machine->self.id);
}

/* Is it so?  `current`: the machine that is asked. */
#define QUESTION(name, current, answer)                                                        \
    static PyObject *name(PyObject *Py_UNUSED(module), PyObject *Py_UNUSED(unused))            \
    {                                                                                          \
        const Machine *machine = current;                                                      \
        return machine ? PyBool_FromLong(answer) : NULL;                                       \
    }
QUESTION(irqs_disabled, shi_use_cpu(SHI_ONLY_CPU), machine->self.irqs_off)
QUESTION(in_hardirq, shi_use_current(), machine->self.in_irq)
QUESTION(in_interrupt, shi_use_current(), shi_in_interrupt(&machine->self))
QUESTION(in_nmi, shi_use_current(), machine->self.in_nmi)
QUESTION(in_task, shi_use_current(), shi_in_task(&machine->self))
QUESTION(in_softirq, shi_use_current(), machine->self.softirq != 0)
QUESTION(in_serving_softirq, shi_use_current(), shi_in_serving_softirq(&machine->self))
QUESTION(preemptible, shi_use_cpu(SHI_ONLY_CPU), shi_preemptible(&machine->self))

static PyObject *preempt_count(PyObject *Py_UNUSED(module), PyObject *Py_UNUSED(unused))
{
    Machine *machine = shi_use_cpu(SHI_ONLY_CPU);
    return machine ? PyLong_FromUnsignedLong(shi_preempt_count(&machine->self)) : NULL;
}

/* __might_sleep(): warned of each time, as the place is what matters. */
static PyObject *might_sleep(PyObject *Py_UNUSED(module), PyObject *Py_UNUSED(unused))
{
    Machine *machine = shi_use_current();
    if (!machine)
        return NULL;
    const struct shi_self *self = &machine->self;
    if (!self->host && !shi_preemptible(self) &&
        PyErr_WarnFormat(shi_py.Warning, 1,
                         "BUG: sleeping function called from invalid context: in_atomic(): %d, "
                         "irqs_disabled(): %d, preempt_count: %x on CPU %d",
                         shi_preempt_count(self) != 0, self->irqs_off != 0,
                         shi_preempt_count(self), (int)self->id) < 0)
        return NULL;
    Py_RETURN_NONE;
}

/* What is queued here runs now, in task context; what the chip has pending does not. */
static PyObject *flush_queue(PyObject *Py_UNUSED(module), PyObject *Py_UNUSED(unused))
{
    Machine *machine = shi_use_cpu(SHI_ONLY_CPU);
    if (!machine)
        return NULL;
    struct shi_self *self = &machine->self;
    if (!self->in_task || !shi_in_task(self))
        return shi_raise(shi_py.StateError, 0, (int)self->id,
                         "flush_smp_call_function_queue() is for tasks: a handler's queue is "
                         "emptied after it");
    uint8_t flags = shi_irq_save(self);
    bool inlined = self->inline_python;
    self->inline_python = true;
    self->in_core++;
    if (shi_word_head(shi_load_acquire(&self->slot->word)))
        self->m->drain(self);
    self->in_core--;
    self->inline_python = inlined;
    shi_run_deferred(machine); /* what stood behind one that a kick had put off */
    shi_irq_restore(self, flags);
    shi_do_softirq(self, true); /* do_softirq_post_smp_call_flush() */
    shi_after_enable(machine);
    if (shi_task_interrupt(machine) < 0)
        return NULL;
    Py_RETURN_NONE;
}

static PyObject *need_resched(PyObject *Py_UNUSED(module), PyObject *Py_UNUSED(unused))
{
    Machine *machine = shi_use_cpu(SHI_ONLY_CPU);
    return machine ? PyBool_FromLong((shi_load_relaxed(&machine->self.slot->word) &
                                      SHI_W_NEED_RESCHED) != 0)
                   : NULL;
}

/* A point at which a cooperative CPU (kick=False) takes what waits for it. */
static PyObject *cond_resched(PyObject *Py_UNUSED(module), PyObject *Py_UNUSED(unused))
{
    Machine *machine = shi_use_cpu(SHI_ONLY_CPU);
    if (!machine)
        return NULL;
    struct shi_self *self = &machine->self;
    if (self->in_task && !shi_in_interrupt(self) && !self->preempt) {
        shi_ipi_point(self);
        shi_sched_point(self);
        shi_let_others_run(machine);
        shi_schedule(self);
    }
    if (self->in_task && !shi_masked(self) &&
        (shi_softirqs_due(self) || shi_word_work(shi_load_acquire(&self->slot->word)) ||
         shi_python_waits(self) || shi_hotplug_asked(self)))
        shi_irq_window(machine);
    if (shi_task_interrupt(machine) < 0)
        return NULL;
    Py_RETURN_NONE;
}

/* on_task_cancel(function): called instead of raising TaskInterrupt in this task. */
static PyObject *on_task_cancel(PyObject *Py_UNUSED(module), PyObject *function)
{
    Machine *machine = shi_use_cpu(SHI_ONLY_CPU);
    if (!machine)
        return NULL;
    Py_XSETREF(machine->on_cancel, Py_NewRef(function));
    Py_RETURN_NONE;
}

/* TaskInterrupt was raised where nothing can be (a __del__, a callback) and thrown away: again,
 * when the task is out of there. */
static PyObject *task_interrupt_lost(PyObject *Py_UNUSED(module), PyObject *Py_UNUSED(unused))
{
    Machine *machine = shi_use_cpu(SHI_ONLY_CPU);
    if (!machine)
        return NULL;
    struct shi_self *self = &machine->self;
    if (self->cancellable) {
        shi_fetch_or_full(&self->cancellable->lock, SHI_CSD_CANCEL);
        shi_remind(self);
    }
    Py_RETURN_NONE;
}

#define DOC(name, text) #name "()\n--\n\n" text
PyMethodDef shi_context_functions[] = {
    { "cpu_context", cpu_context, METH_NOARGS,
      DOC(cpu_context, "NO_CPU, CPU_TASK or CPU_HANDLER: what this process and thread is.") },
    { "smp_processor_id", smp_processor_id, METH_NOARGS,
      DOC(smp_processor_id, "The number of this CPU.  ClusterStateError on the host.") },
    { "local_irq_disable", irq_disable, METH_NOARGS,
      DOC(local_irq_disable, "No handler runs here until local_irq_enable(): a flag, not a "
                             "system call.  What arrives meanwhile stays pending.") },
    { "local_irq_enable", irq_enable, METH_NOARGS,
      DOC(local_irq_enable, "Let handlers run again, and run those that are pending now.") },
    { "local_irq_save", irq_save, METH_NOARGS,
      DOC(local_irq_save, "local_irq_disable(): returns the flags for local_irq_restore.") },
    { "local_irq_restore", irq_restore, METH_O,
      "local_irq_restore(flags)\n--\n\nBack to what local_irq_save() found." },
    { "irqs_disabled", irqs_disabled, METH_NOARGS,
      DOC(irqs_disabled, "True between local_irq_disable and _enable, and in handlers.") },
    { "preempt_disable", preempt_disable, METH_NOARGS,
      DOC(preempt_disable, "Tasks are not preempted here, but a task can be taken offline with "
                           "its CPU: not\nbefore preempt_enable().") },
    { "preempt_enable", preempt_enable, METH_NOARGS,
      DOC(preempt_enable, "ClusterStateError without a preempt_disable().") },
    { "get_cpu", get_cpu, METH_NOARGS,
      DOC(get_cpu, "preempt_disable(): returns the number of this CPU.") },
    { "put_cpu", preempt_enable, METH_NOARGS, DOC(put_cpu, "preempt_enable().") },
    { "in_task", in_task, METH_NOARGS,
      DOC(in_task, "Not in an interrupt handler, NMI or softirq.") },
    { "in_hardirq", in_hardirq, METH_NOARGS, DOC(in_hardirq, "In an IPI handler.") },
    { "in_interrupt", in_interrupt, METH_NOARGS,
      DOC(in_interrupt, "In an IPI handler, NMI or softirq, or with softirqs disabled.") },
    { "in_softirq", in_softirq, METH_NOARGS,
      DOC(in_softirq, "In a softirq, or between local_bh_disable and _enable.") },
    { "in_serving_softirq", in_serving_softirq, METH_NOARGS,
      DOC(in_serving_softirq, "In a softirq, or in a handler on top of one.") },
    { "preempt_count", preempt_count, METH_NOARGS,
      DOC(preempt_count,
          "Depths, from bit 0: 8 of preempt_disable(), 8 of softirqs (1: runs, 2 "
          "for each\nlocal_bh_disable()), 4 of handlers, 4 of NMIs.") },
    { "preemptible", preemptible, METH_NOARGS,
      DOC(preemptible, "preempt_count() is 0, and interrupts are on.") },
    { "might_sleep", might_sleep, METH_NOARGS,
      DOC(might_sleep, "ShmipiWarning where nothing may wait: not preemptible().  Nothing on "
                       "the host.") },
    { "in_nmi", in_nmi, METH_NOARGS, DOC(in_nmi, "In an NMI handler.") },
    { "on_task_cancel", on_task_cancel, METH_O,
      "on_task_cancel(function)\n--\n\nCalled when this task is cancelled, instead of "
      "raising." },
    { "task_interrupt_lost", task_interrupt_lost, METH_NOARGS,
      DOC(task_interrupt_lost, "Raise TaskInterrupt once more: it was raised in vain.") },
    { "flush_smp_call_function_queue", flush_queue, METH_NOARGS,
      DOC(flush_smp_call_function_queue,
          "Run the calls that are queued on this CPU now, in this task's context, also with\n"
          "interrupts disabled.  ClusterStateError in a handler.  kernel/smp.c.") },
    { "need_resched", need_resched, METH_NOARGS,
      DOC(need_resched, "Was this CPU asked to reschedule (resched_cpu)?  A task sees it until "
                        "cond_resched(), a\nwait, or its end.") },
    { "cond_resched", cond_resched, METH_NOARGS,
      DOC(cond_resched, "Let others run: take pending interrupts now, which tasks of a machine "
                        "with kick=False\ndo only here; need_resched() is over.") },
    { NULL, NULL, 0, NULL },
};
