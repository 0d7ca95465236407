"""Interrupt controllers, irq descriptors, IPI domains, with the kernel's names.

The functions that take a virq act on this process's machine: on a CPU its own, in the
host the only open ``Cluster``'s; ``cluster.irq`` has them for one machine.
"""

from shmipi.irq.bound import BoundIrq
from shmipi.irq.coprocessor import Coprocessor, CoprocessorLine
from shmipi.irq.current import (
    chip,
    disable_percpu_irq,
    enable_percpu_irq,
    free_percpu_irq,
    ipi_get_hwirq,
    ipi_send_mask,
    ipi_send_single,
    irq,
    irq_destroy_ipi,
    irq_reserve_ipi,
    irq_send_ipi,
    irq_send_ipi_all,
    irq_to_desc,
    request_percpu_irq,
)
from shmipi.irq.ipi import __ipi_send_mask, __ipi_send_single, irq_desc_send_ipi
from shmipi.irq.irqdesc import (
    IpiMapping,
    IrqChip,
    IrqData,
    IrqDesc,
    IrqDomain,
    irq_chip_send_ipi,
    irq_data_get_affinity_mask,
    irq_data_get_irq_chip,
    irq_data_get_irq_chip_data,
    irq_desc_get_irq_data,
    irqd_is_global_ipi,
)
from shmipi.irq.of import DomainNode
from shmipi.irq.table import INVALID_HWIRQ, NR_IRQS, IrqDomainFlags, IrqFlags

__all__ = [
    "INVALID_HWIRQ",
    "NR_IRQS",
    "BoundIrq",
    "Coprocessor",
    "CoprocessorLine",
    "DomainNode",
    "IpiMapping",
    "IrqChip",
    "IrqData",
    "IrqDesc",
    "IrqDomain",
    "IrqDomainFlags",
    "IrqFlags",
    "__ipi_send_mask",
    "__ipi_send_single",
    "chip",
    "disable_percpu_irq",
    "enable_percpu_irq",
    "free_percpu_irq",
    "ipi_get_hwirq",
    "ipi_send_mask",
    "ipi_send_single",
    "irq",
    "irq_chip_send_ipi",
    "irq_data_get_affinity_mask",
    "irq_data_get_irq_chip",
    "irq_data_get_irq_chip_data",
    "irq_desc_get_irq_data",
    "irq_desc_send_ipi",
    "irq_destroy_ipi",
    "irq_reserve_ipi",
    "irq_send_ipi",
    "irq_send_ipi_all",
    "irq_to_desc",
    "irqd_is_global_ipi",
    "request_percpu_irq",
]
