"""The interrupt controllers that a machine can be booted with, by name."""

from shmipi.irq.chips.apic import Apic
from shmipi.irq.chips.base import Chip, Line, Row
from shmipi.irq.chips.gic import Gicv2, Gicv3
from shmipi.irq.chips.mips import Mips
from shmipi.irq.chips.mips_gic import MipsGic
from shmipi.irq.chips.riscv import Riscv
from shmipi.irq.chips.xive import Xive

__all__ = [
    "CHIPS",
    "Apic",
    "Chip",
    "Gicv2",
    "Gicv3",
    "Line",
    "Mips",
    "MipsGic",
    "Riscv",
    "Row",
    "Xive",
]

#: By the name that ``Cluster(controller=...)`` takes.
CHIPS: dict[str, type[Chip]] = {
    chip.name: chip for chip in (Apic, Xive, Mips, MipsGic, Gicv2, Gicv3, Riscv)
}
