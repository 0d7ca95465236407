"""The interrupt controllers that a machine can be booted with, by name."""

from shmipi.irq.chips.apic import APIC
from shmipi.irq.chips.base import Chip

__all__ = ["APIC", "CHIPS", "Chip"]

#: By the name that ``Cluster(controller=...)`` takes.
CHIPS: dict[str, Chip] = {chip.name: chip for chip in (APIC,)}
