/* SPDX-License-Identifier: MIT */
/* Interrupts of a CPU where Python runs. */
#ifndef SHI_PY_ENTRY_H
#define SHI_PY_ENTRY_H

#include "py/base.h"

void shi_cpu_hooks(Machine *machine);
/* The interpreter, given up for a wait by this thread (host: not NULL) or for the core's
 * hooks to take back when Python work arrives; and taken back. */
PyThreadState *shi_give_up(Machine *machine);
void shi_take_back(Machine *machine, PyThreadState *mine);
/* Is this CPU asked to go offline? */
bool shi_hotplug_asked(const struct shi_self *self);
/* Park until it is asked to come back: 0, or -ECANCELED. */
int shi_go_offline(Machine *machine);
/* Run Python csds that the kick handler put off.  Holds the interpreter. */
void shi_run_deferred(Machine *machine);
/* The same between two steps of a task: and senders kick again from then on. */
void shi_take_deferred(Machine *machine);
/* What interrupts a wait: Python csds, and the request to go offline. */
void shi_wait_python(Machine *machine);
/* Serve everything, Python included, then let the task go on. */
void shi_irq_window(Machine *machine);
/* Interrupts came on, or something was let through: take what is there now. */
void shi_after_enable(Machine *machine);
/* Sleep for a while, interrupts as they are: 0, or -1 with an exception. */
int shi_nap(Machine *machine, long ns);
/* Where an exception may enter the task: -1, TaskInterrupt set, when it was cancelled. */
int shi_task_interrupt(Machine *machine);
/* Bodies of the Python-level handlers of kick and NMI: 0, or -1 for an exception that is
 * the interrupted task's own. */
int shi_irq_entry_python(Machine *machine);
int shi_nmi_entry_python(Machine *machine);

#endif
