"""irq descriptors, domains and IPIs bound to one machine: ``cluster.irq``."""

from __future__ import annotations

from typing import TYPE_CHECKING

from shmipi import _core
from shmipi.irq.chips.base import Chip
from shmipi.irq.coprocessor import CoprocessorCalls
from shmipi.irq.ipi import irq_desc_send_ipi
from shmipi.irq.irqdesc import (
    irq_chip_send_ipi,
    irq_data_get_affinity_mask,
    irq_data_get_irq_chip,
    irq_data_get_irq_chip_data,
    irq_desc_get_irq_data,
    irqd_is_global_ipi,
)
from shmipi.irq.table import IrqTable

if TYPE_CHECKING:
    from shmipi.machine.boot import Host

__all__ = ["BoundIrq"]


class BoundIrq(CoprocessorCalls):
    """``shmipi.irq`` for one machine.

    In the host it is ``cluster.irq``; on a CPU ``shmipi.irq.irq()`` and the functions
    of ``shmipi.irq``, which use it. All see the same irqs.
    """

    irq_desc_send_ipi = staticmethod(irq_desc_send_ipi)
    irq_chip_send_ipi = staticmethod(irq_chip_send_ipi)
    irq_desc_get_irq_data = staticmethod(irq_desc_get_irq_data)
    irq_data_get_irq_chip = staticmethod(irq_data_get_irq_chip)
    irq_data_get_irq_chip_data = staticmethod(irq_data_get_irq_chip_data)
    irq_data_get_affinity_mask = staticmethod(irq_data_get_affinity_mask)
    irqd_is_global_ipi = staticmethod(irqd_is_global_ipi)

    def __init__(
        self, machine: _core.Machine, chip: Chip, host: Host | None = None
    ) -> None:
        super().__init__()
        self.table = IrqTable(machine, chip)
        self._host = host

    def __repr__(self) -> str:
        return f"<irq of Cluster {self.table.machine.name!r}>"
