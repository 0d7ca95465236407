/* SPDX-License-Identifier: MIT */
/* What py/module.c puts together: methods of Machine, functions and types of the module. */
#ifndef SHI_PY_TABLES_H
#define SHI_PY_TABLES_H

#include "py/base.h"

/* Methods of Machine. */
extern PyMethodDef shi_mm_methods[], shi_mm_functions[], shi_membarrier_functions[];
extern PyMethodDef shi_icache_methods[];
extern PyMethodDef shi_smp_methods[], shi_post_methods[], shi_cpu_methods[];
extern PyMethodDef shi_chip_methods[], shi_irq_methods[], shi_waitq_methods[];
extern PyMethodDef shi_machine_methods[], shi_slot_methods[], shi_segment_methods[];
extern PyMethodDef shi_doorbell_methods[], shi_native_methods[], shi_hotplug_methods[];
extern PyMethodDef shi_reap_methods[], shi_lock_methods[], shi_step_methods[];
extern PyMethodDef shi_irqlock_methods[], shi_irqsync_methods[];
extern PyMethodDef shi_nmi_ipi_methods[], shi_nmi_list_methods[], shi_dump_methods[];
extern PyMethodDef shi_sched_methods[], shi_trace_methods[];
extern PyMethodDef shi_users_methods[], shi_softirq_methods[], shi_softirq_functions[];
extern PyMethodDef shi_stall_methods[], shi_stop_methods[];
extern PyMethodDef shi_tick_methods[], shi_rcu_methods[], shi_rcu_functions[];
extern PyMethodDef shi_irq_work_functions[];
extern PyMethodDef shi_stopper_functions[];
extern PyMethodDef shi_net_methods[], shi_rps_methods[], shi_blk_methods[];

/* Functions of the module. */
extern PyMethodDef shi_guard_functions[], shi_smp_functions[], shi_stall_functions[];
extern PyMethodDef shi_context_functions[], shi_machine_functions[], shi_barrier_functions[];
extern PyMethodDef shi_waitq_functions[], shi_native_functions[], shi_segment_functions[];
extern PyMethodDef shi_bench_functions[], shi_limit_functions[], shi_clock_functions[];
extern PyMethodDef shi_process_functions[], shi_shield_functions[], shi_csd_functions[];
extern PyMethodDef shi_irq_functions[], shi_sched_functions[], shi_replay_functions[];

/* What cpu_context() returns. */
enum { SHI_NO_CPU, SHI_CPU_TASK, SHI_CPU_HANDLER };

int shi_atomic_add(PyObject *module);
int shi_shield_types(PyObject *module);
int shi_irqlock_types(PyObject *module);
int shi_slot_types(PyObject *module);
int shi_irq_types(PyObject *module);
int shi_doorbell_names(PyObject *module);
int shi_users_add(PyObject *module);
int shi_irq_work_types(PyObject *module);

#endif
