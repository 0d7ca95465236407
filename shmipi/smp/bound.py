"""The call-function layer bound to one machine: ``cluster.smp``."""

from __future__ import annotations

from functools import partial
from typing import Any, NoReturn

from shmipi import _core
from shmipi.cpumask import CpuMask
from shmipi.errors import ClusterStateError
from shmipi.smp import cpus, nmi

__all__ = ["BoundSmp"]


class BoundSmp:
    """``shmipi.smp`` for the host of one machine.

    The host is an initiator and no CPU: it is in no mask, "others" means all CPUs, it
    has no processor id and no interrupts to disable.
    """

    def __init__(self, machine: _core.Machine) -> None:
        self._machine = machine
        # The core's own methods, bound: nothing stands between them and the caller.
        self.smp_call_function_single = machine.smp_call_function_single
        self.smp_call_function_single_async = machine.smp_call_function_single_async
        self.smp_call_function_many = machine.smp_call_function_many
        self.smp_call_function = machine.smp_call_function
        self.on_each_cpu = machine.on_each_cpu
        self.on_each_cpu_mask = machine.on_each_cpu_mask
        self.on_each_cpu_cond_mask = machine.on_each_cpu_cond_mask
        self.smp_send_reschedule = machine.smp_send_reschedule
        self.resched_cpu = machine.resched_cpu
        self.cpu_online = partial(cpus.cpu_online, machine=machine)
        self.cpus_read_lock = partial(cpus.cpus_read_lock, machine=machine)
        self.cpus_read_unlock = partial(cpus.cpus_read_unlock, machine=machine)
        self.kick_process = cpus.kick_process
        self.INIT_CSD = _core.INIT_CSD
        self.register_nmi_handler = partial(nmi.register_nmi_handler, machine=machine)
        self.unregister_nmi_handler = partial(
            nmi.unregister_nmi_handler, machine=machine
        )
        self.smp_send_nmi_ipi = partial(nmi.smp_send_nmi_ipi, machine=machine)
        self.smp_send_safe_nmi_ipi = partial(nmi.smp_send_safe_nmi_ipi, machine=machine)

    def __repr__(self) -> str:
        return f"<smp of Cluster {self._machine.name!r}>"

    def CallSingleData(self, func: Any, info: Any = None) -> _core.CallSingleData:
        """Make a caller-owned request for this machine."""
        return _core.CallSingleData(func, info, machine=self._machine)

    @property
    def cpu_online_mask(self) -> CpuMask:
        """The CPUs that are online now."""
        mask: CpuMask = cpus.variable("cpu_online_mask", self._machine)
        return mask

    @property
    def nr_cpu_ids(self) -> int:
        """How many CPUs the machine has, online or not."""
        return self._machine.ncpus

    def smp_processor_id(self) -> NoReturn:
        """Raise ``ClusterStateError``: the host is no CPU."""
        raise _no_cpu()

    def local_irq_disable(self) -> NoReturn:
        """Raise ``ClusterStateError``: the host takes no interrupts."""
        raise _no_cpu()

    raw_smp_processor_id = smp_processor_id
    local_irq_enable = local_irq_save = local_irq_disable
    get_cpu = put_cpu = flush_smp_call_function_queue = local_irq_disable
    preempt_disable = preempt_enable = cond_resched = local_irq_disable
    need_resched = local_irq_disable

    def local_irq_restore(self, flags: int) -> NoReturn:
        """Raise ``ClusterStateError``: the host takes no interrupts."""
        raise _no_cpu()

    def wait_for_interrupt(self, timeout: float | None = None) -> NoReturn:
        """Raise ``ClusterStateError``: the host takes no interrupts."""
        raise _no_cpu()

    def irqs_disabled(self) -> NoReturn:
        """Raise ``ClusterStateError``: the host takes no interrupts."""
        raise _no_cpu()

    def in_task(self) -> bool:
        """Return True: host code is never a handler."""
        return True

    def in_hardirq(self) -> bool:
        """Return False."""
        return False

    in_interrupt = in_nmi = in_hardirq


def _no_cpu() -> ClusterStateError:
    return ClusterStateError(
        "the host is no CPU: this only means something on a CPU of the machine"
    )
