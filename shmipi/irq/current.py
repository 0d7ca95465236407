"""The controller, and the irqs, of the machine that this process is part of.

The functions are those of ``cluster.irq``, for the machine of this process: on a CPU
its own; in the host that of the only open ``Cluster``, else they raise
``NoMachineError``.
"""

from __future__ import annotations

from typing import Any, NoReturn, cast

from shmipi import _core
from shmipi.cpumask import MaskLike
from shmipi.irq.bound import BoundIrq
from shmipi.irq.chips.base import Chip
from shmipi.irq.irqdesc import IrqData, IrqDesc
from shmipi.irq.irqdomain import SYNCHRONIZE_S, DomainLike
from shmipi.irq.manage import IrqHandler
from shmipi.irq.table import IRQ_TYPE_NONE
from shmipi.machine import controller

__all__ = [
    "chip",
    "disable_percpu_irq",
    "disable_percpu_irq_mask",
    "enable_percpu_irq",
    "enable_percpu_irq_mask",
    "forget",
    "free_percpu_irq",
    "ipi_get_hwirq",
    "ipi_send_mask",
    "ipi_send_single",
    "irq",
    "irq_create_mapping",
    "irq_destroy_ipi",
    "irq_dispose_mapping",
    "irq_find_mapping",
    "irq_get_irq_data",
    "irq_percpu_is_enabled",
    "irq_reserve_ipi",
    "irq_send_ipi",
    "irq_send_ipi_all",
    "irq_to_desc",
    "register",
    "request_percpu_irq",
    "request_percpu_nmi",
    "synchronize_hardirq",
    "synchronize_irq",
]

_known: list[tuple[_core.Machine, BoundIrq]] = []


def chip() -> Chip:
    """Return the interrupt controller of this machine, bound to it.

    On a CPU that of its machine; in the host that of the only open ``Cluster``, else
    ``NoMachineError``: use ``cluster.chip``.
    """
    return cast(Chip, controller.of(_core.current_machine()))


def irq() -> BoundIrq:
    """Return the irqs of this machine: what ``cluster.irq`` is in the host."""
    machine = _core.current_machine()
    for known, bound in _known:
        if known is machine:
            return bound
    return register(machine, BoundIrq(machine, chip()))


def register(machine: _core.Machine, bound: BoundIrq) -> BoundIrq:
    """Remember the irqs of a machine; return them."""
    _known.append((machine, bound))
    return bound


def forget(machine: _core.Machine) -> None:
    """Undo ``register``: the machine has ended."""
    _known[:] = [known for known in _known if known[0] is not machine]


def irq_to_desc(virq: int) -> IrqDesc | None:
    """Return the descriptor of a virq, or None."""
    return irq().irq_to_desc(virq)


def irq_reserve_ipi(
    domain: DomainLike, dest: MaskLike, *, hwirq: int | None = None, name: str = ""
) -> int:
    """Reserve an IPI to the CPUs of ``dest``; see ``IpiCalls``."""
    return irq().irq_reserve_ipi(domain, dest, hwirq=hwirq, name=name)


def irq_destroy_ipi(
    virq: int, dest: MaskLike | None = None, *, timeout: float = SYNCHRONIZE_S
) -> None:
    """Give an IPI back; see ``IpiCalls``."""
    irq().irq_destroy_ipi(virq, dest, timeout=timeout)


def ipi_get_hwirq(virq: int, cpu: int) -> int:
    """Return the hwirq by which an IPI reaches a CPU, or ``INVALID_HWIRQ``."""
    return irq().ipi_get_hwirq(virq, cpu)


def ipi_send_single(virq: int, cpu: int) -> None:
    """Send an IPI to one CPU; see ``IpiCalls``."""
    if not _core.ipi_send_single(virq, cpu):  # a sender's time counts
        irq().ipi_send_single(virq, cpu)


def ipi_send_mask(virq: int, dest: MaskLike) -> None:
    """Send an IPI to several CPUs; see ``IpiCalls``."""
    machine = _core.current_machine()
    bound = _known[-1][1] if _known and _known[-1][0] is machine else irq()
    table = bound.table
    if not table.send_mask(virq, dest, table.by_groups):
        bound.ipi_send_mask(virq, dest)


def irq_send_ipi(virq: int, mask: MaskLike) -> None:
    """Send an IPI, verified unless it is global; see ``IpiCalls``."""
    machine = _core.current_machine()
    bound = _known[-1][1] if _known and _known[-1][0] is machine else irq()
    table = bound.table
    if not table.send_mask(virq, mask, table.by_groups):
        bound.irq_send_ipi(virq, mask)


def irq_send_ipi_all(virq: int) -> None:
    """Send an IPI to all CPUs that it was reserved for; see ``IpiCalls``."""
    irq().irq_send_ipi_all(virq)


def request_percpu_irq(
    virq: int, handler: IrqHandler, name: str = "", dev_id: Any = None
) -> None:
    """Publish the handler of an irq; see ``PercpuCalls``."""
    irq().request_percpu_irq(virq, handler, name, dev_id)


def free_percpu_irq(
    virq: int, dev_id: Any = None, *, timeout: float = SYNCHRONIZE_S
) -> None:
    """Withdraw the handler of an irq; see ``PercpuCalls``."""
    irq().free_percpu_irq(virq, dev_id, timeout=timeout)


def synchronize_irq(virq: int, *, timeout: float = SYNCHRONIZE_S) -> None:
    """Wait until no handler of an irq is in progress; see ``DomainCalls``."""
    irq().synchronize_irq(virq, timeout=timeout)


def synchronize_hardirq(virq: int, *, timeout: float = SYNCHRONIZE_S) -> bool:
    """Do the same, also in handlers of other irqs; see ``DomainCalls``."""
    return irq().synchronize_hardirq(virq, timeout=timeout)


def request_percpu_nmi(
    virq: int, handler: IrqHandler, name: str = "", dev_id: Any = None
) -> NoReturn:
    """Raise ``IrqError`` EINVAL: no irq is an NMI here; see ``PercpuCalls``."""
    irq().request_percpu_nmi(virq, handler, name, dev_id)


def enable_percpu_irq(virq: int, type: int = IRQ_TYPE_NONE) -> None:
    """Let an irq through on this CPU; see ``PercpuCalls``."""
    irq().enable_percpu_irq(virq, type)


def disable_percpu_irq(virq: int) -> None:
    """Hold an irq back on this CPU; see ``PercpuCalls``."""
    irq().disable_percpu_irq(virq)


def enable_percpu_irq_mask(virq: int, cpus: MaskLike | None = None) -> None:
    """Let an irq through on several CPUs; see ``PercpuCalls``."""
    irq().enable_percpu_irq_mask(virq, cpus)


def disable_percpu_irq_mask(virq: int, cpus: MaskLike | None = None) -> None:
    """Hold an irq back on several CPUs; see ``PercpuCalls``."""
    irq().disable_percpu_irq_mask(virq, cpus)


def irq_percpu_is_enabled(virq: int, cpu: int | None = None) -> bool:
    """Is an irq let through on this CPU? See ``PercpuCalls``."""
    return irq().irq_percpu_is_enabled(virq, cpu)


def irq_create_mapping(domain: DomainLike, hwirq: int, name: str = "") -> int:
    """Give a hwirq of a domain without IPIs a virq; see ``IpiCalls``."""
    return irq().irq_create_mapping(domain, hwirq, name)


def irq_dispose_mapping(virq: int, *, timeout: float = SYNCHRONIZE_S) -> None:
    """Undo ``irq_create_mapping``; see ``IpiCalls``."""
    irq().irq_dispose_mapping(virq, timeout=timeout)


def irq_find_mapping(domain: DomainLike, hwirq: int) -> int:
    """Return the virq that a hwirq of a domain has, or 0; see ``IpiCalls``."""
    return irq().irq_find_mapping(domain, hwirq)


def irq_get_irq_data(virq: int) -> IrqData | None:
    """Return what an irq is in its own domain, or None; see ``IpiCalls``."""
    return irq().irq_get_irq_data(virq)
