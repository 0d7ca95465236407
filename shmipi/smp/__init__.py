"""The call-function layer, with the names of ``kernel/smp.c``.

On a CPU these act on the machine it is part of. In the host they act on the only open
``Cluster``; with none or several they raise ``NoMachineError``: use ``cluster.smp``.
"""

from typing import Any

from shmipi._core import (
    INIT_CSD,
    CallSingleData,
    NativeHandler,
    cond_resched,
    flush_smp_call_function_queue,
    get_cpu,
    in_hardirq,
    in_interrupt,
    in_nmi,
    in_task,
    irqs_disabled,
    local_irq_disable,
    local_irq_enable,
    local_irq_restore,
    local_irq_save,
    need_resched,
    on_each_cpu,
    on_each_cpu_cond_mask,
    on_each_cpu_mask,
    preempt_disable,
    preempt_enable,
    put_cpu,
    resched_cpu,
    smp_call_function,
    smp_call_function_many,
    smp_call_function_single,
    smp_call_function_single_async,
    smp_load_acquire,
    smp_mb,
    smp_processor_id,
    smp_rmb,
    smp_send_reschedule,
    smp_store_release,
    smp_wmb,
    wait_for_interrupt,
)
from shmipi.cpumask import CpuMask
from shmipi.smp.bound import BoundSmp
from shmipi.smp.cpus import (
    cpu_online,
    cpus_read_lock,
    cpus_read_unlock,
    kick_process,
    variable,
)
from shmipi.smp.nmi import (
    NMI_DONE,
    NMI_FLAG_FIRST,
    NMI_HANDLED,
    NMI_IO_CHECK,
    NMI_IPI_ALL_OTHERS,
    NMI_LOCAL,
    NMI_REASON_IOCHK,
    NMI_REASON_SERR,
    NMI_SERR,
    NMI_UNKNOWN,
    register_nmi_handler,
    smp_send_nmi_ipi,
    smp_send_safe_nmi_ipi,
    unregister_nmi_handler,
)
from shmipi.smp.waitqueue import Completion, WaitQueue, completion, wait_queue

#: The kernel's debug check is in both: a task stays where it is.
raw_smp_processor_id = smp_processor_id

# Variables of the kernel: not in __all__, because `import *` would keep what they were.
cpu_online_mask: CpuMask
nr_cpu_ids: int

__all__ = [
    "INIT_CSD",
    "NMI_DONE",
    "NMI_FLAG_FIRST",
    "NMI_HANDLED",
    "NMI_IO_CHECK",
    "NMI_IPI_ALL_OTHERS",
    "NMI_LOCAL",
    "NMI_REASON_IOCHK",
    "NMI_REASON_SERR",
    "NMI_SERR",
    "NMI_UNKNOWN",
    "BoundSmp",
    "CallSingleData",
    "Completion",
    "NativeHandler",
    "WaitQueue",
    "completion",
    "cond_resched",
    "cpu_online",
    "cpus_read_lock",
    "cpus_read_unlock",
    "flush_smp_call_function_queue",
    "get_cpu",
    "in_hardirq",
    "in_interrupt",
    "in_nmi",
    "in_task",
    "irqs_disabled",
    "kick_process",
    "local_irq_disable",
    "local_irq_enable",
    "local_irq_restore",
    "local_irq_save",
    "need_resched",
    "on_each_cpu",
    "on_each_cpu_cond_mask",
    "on_each_cpu_mask",
    "preempt_disable",
    "preempt_enable",
    "put_cpu",
    "raw_smp_processor_id",
    "register_nmi_handler",
    "resched_cpu",
    "smp_call_function",
    "smp_call_function_many",
    "smp_call_function_single",
    "smp_call_function_single_async",
    "smp_load_acquire",
    "smp_mb",
    "smp_processor_id",
    "smp_rmb",
    "smp_send_nmi_ipi",
    "smp_send_reschedule",
    "smp_send_safe_nmi_ipi",
    "smp_store_release",
    "smp_wmb",
    "unregister_nmi_handler",
    "wait_for_interrupt",
    "wait_queue",
]


def __getattr__(name: str) -> Any:
    return variable(name)


def __dir__() -> list[str]:
    return sorted({*globals(), "cpu_online_mask", "nr_cpu_ids"})
