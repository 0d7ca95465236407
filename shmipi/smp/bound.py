"""The call-function layer bound to one machine: ``cluster.smp``."""

from __future__ import annotations

from functools import partial
from typing import Any, NoReturn

from shmipi import _core
from shmipi.cpumask import CpuMask
from shmipi.errors import ClusterStateError
from shmipi.smp import calls, cpuhp, cpus, csdlock, nmi, softirq, stop

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
        self.wake_up_if_idle = machine.wake_up_if_idle
        self.wake_up_all_idle_cpus = machine.wake_up_all_idle_cpus
        self.cpus_peek_for_pending_ipi = machine.cpus_peek_for_pending_ipi
        self.flag_ipi = machine.flag_ipi
        self.signal_pending_ipi = machine.signal_pending_ipi
        self.smp_call_function_any = partial(
            calls.smp_call_function_any, machine=machine
        )
        self.on_each_cpu_cond = partial(calls.on_each_cpu_cond, machine=machine)
        self.smp_call_on_cpu = partial(calls.smp_call_on_cpu, machine=machine)
        self.kick_all_cpus_sync = partial(calls.kick_all_cpus_sync, machine=machine)
        self.cpu_online = partial(cpus.cpu_online, machine=machine)
        self.cpus_read_lock = partial(cpus.cpus_read_lock, machine=machine)
        self.cpus_read_unlock = partial(cpus.cpus_read_unlock, machine=machine)
        self.kick_process = cpus.kick_process
        self.INIT_CSD = _core.INIT_CSD
        self.cpuhp_setup_state = partial(cpuhp.cpuhp_setup_state, machine=machine)
        self.cpuhp_setup_state_nocalls = partial(
            cpuhp.cpuhp_setup_state_nocalls, machine=machine
        )
        self.cpuhp_states = partial(cpuhp.cpuhp_states, machine=machine)
        self.cpuhp_remove_state = partial(cpuhp.cpuhp_remove_state, machine=machine)
        self.cpuhp_remove_state_nocalls = partial(
            cpuhp.cpuhp_remove_state_nocalls, machine=machine
        )
        self.stop_cpus = partial(stop.stop_cpus, machine=machine)
        self.stop_machine = partial(stop.stop_machine, machine=machine)
        self.stop_machine_cpuslocked = partial(
            stop.stop_machine_cpuslocked, machine=machine
        )
        self.stop_one_cpu = partial(stop.stop_one_cpu, machine=machine)
        self.stop_one_cpu_nowait = partial(stop.stop_one_cpu_nowait, machine=machine)
        self.stop_two_cpus = partial(stop.stop_two_cpus, machine=machine)
        self.irq_work_queue = _core.irq_work_queue
        self.irq_work_queue_on = _core.irq_work_queue_on
        self.irq_work_sync = _core.irq_work_sync
        self.open_softirq = partial(softirq.open_softirq, machine=machine)
        self.kstat_softirqs_cpu = partial(softirq.kstat_softirqs_cpu, machine=machine)
        self.csd_lock_is_stuck = partial(csdlock.csd_lock_is_stuck, machine=machine)
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

    def irq_work(self, func: Any, info: Any = None, flags: int = 0) -> _core.irq_work:
        """Make an irq_work of this machine, to queue on its CPUs."""
        return _core.irq_work(func, info, flags, machine=self._machine)

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
    local_bh_disable = local_bh_enable = local_irq_disable
    local_softirq_pending = preempt_count = preemptible = local_irq_disable

    def raise_softirq(self, nr: int) -> NoReturn:
        """Raise ``ClusterStateError``: the host runs no softirqs."""
        raise _no_cpu()

    raise_softirq_irqoff = raise_softirq

    def might_sleep(self) -> None:
        """Do nothing: the host may always wait."""

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

    in_interrupt = in_nmi = in_softirq = in_serving_softirq = in_hardirq


def _no_cpu() -> ClusterStateError:
    return ClusterStateError(
        "the host is no CPU: this only means something on a CPU of the machine"
    )
