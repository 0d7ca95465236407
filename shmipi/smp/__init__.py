"""The call-function layer, with the names of ``kernel/smp.c``.

On a CPU these act on the machine it is part of. In the host they act on the only open
``Cluster``; with none or several they raise ``NoMachineError``: use ``cluster.smp``.
"""

from shmipi._core import (
    CallSingleData,
    NativeHandler,
    cond_resched,
    in_hardirq,
    in_interrupt,
    in_nmi,
    in_task,
    irqs_disabled,
    local_irq_disable,
    local_irq_enable,
    local_irq_restore,
    local_irq_save,
    on_each_cpu,
    on_each_cpu_cond_mask,
    on_each_cpu_mask,
    preempt_disable,
    preempt_enable,
    smp_call_function,
    smp_call_function_many,
    smp_call_function_single,
    smp_call_function_single_async,
    smp_processor_id,
    smp_send_reschedule,
)
from shmipi.smp.bound import BoundSmp
from shmipi.smp.nmi import (
    NMI_IPI_ALL_OTHERS,
    register_nmi_handler,
    smp_send_nmi_ipi,
)

__all__ = [
    "NMI_IPI_ALL_OTHERS",
    "BoundSmp",
    "CallSingleData",
    "NativeHandler",
    "cond_resched",
    "in_hardirq",
    "in_interrupt",
    "in_nmi",
    "in_task",
    "irqs_disabled",
    "local_irq_disable",
    "local_irq_enable",
    "local_irq_restore",
    "local_irq_save",
    "on_each_cpu",
    "on_each_cpu_cond_mask",
    "on_each_cpu_mask",
    "preempt_disable",
    "preempt_enable",
    "register_nmi_handler",
    "smp_call_function",
    "smp_call_function_many",
    "smp_call_function_single",
    "smp_call_function_single_async",
    "smp_processor_id",
    "smp_send_nmi_ipi",
    "smp_send_reschedule",
]
