/* SPDX-License-Identifier: MIT */
/* smp_call_function_single, smp_send_reschedule and resched_cpu. */
#ifndef SHI_PY_CALL_H
#define SHI_PY_CALL_H

#include "py/base.h"

/* The kernel's WARN_ON_ONCEs at the head of the cross calls. */
int shi_check_context(const Machine *machine);
/* func(info) here, with interrupts off: no csd, no doorbell. */
int shi_run_local(Machine *machine, PyObject *function, PyObject *info, bool wait);
shi_smp_function shi_single, shi_send_reschedule, shi_resched_cpu;

#endif
