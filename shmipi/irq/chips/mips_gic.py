"""The MIPS Global Interrupt Controller: shared interrupts, two of them an IPI a CPU."""

from __future__ import annotations

from collections.abc import Iterable

from shmipi import _core
from shmipi.irq.chips.base import Chip, Line, Row

__all__ = ["MipsGic"]

_SHARED = 256


class MipsGic(Chip):
    """The MIPS GIC."""

    name = "mips-gic"
    description = "MIPS GIC: 256 shared interrupts, two of them an IPI each CPU has"
    flow = "shared"
    max_cpus = _SHARED // 2
    per_cpu = True
    rows = (
        Row("RES", "Rescheduling interrupts"),
        Row("CAL", "Function call interrupts"),
        Row("NMI", "Non-maskable interrupts", "nmi"),
    )

    def lines(self, ncpus: int) -> Iterable[Line]:
        """Return the shared interrupts: the last 2 x CPUs are the IPIs."""
        first = _SHARED - 2 * ncpus
        for intr in range(first):
            yield Line(intr, f"shared {intr}", "irq")
        for cpu in range(ncpus):
            yield Line(first + cpu, f"IPI call {cpu}", "call", "CAL")
        for cpu in range(ncpus):
            yield Line(first + ncpus + cpu, f"IPI resched {cpu}", "reschedule", "RES")

    def prepare(self, machine: _core.Machine) -> None:
        """Route each IPI to its CPU."""
        first = _SHARED - 2 * machine.ncpus
        for cpu in range(machine.ncpus):
            for line in (first + cpu, first + machine.ncpus + cpu):
                machine.pic_write(0, "route", line, cpu + 1)
