"""The Arm Generic Interrupt Controller, versions 2 and 3: its SGIs."""

from __future__ import annotations

from collections.abc import Iterable

from shmipi.irq.chips.base import Chip, Line, Row

__all__ = ["Gicv2", "Gicv3"]

_IPIS = (
    ("IPI_RESCHEDULE", "reschedule", "Rescheduling interrupts"),
    ("IPI_CALL_FUNC", "call", "Function call interrupts"),
    ("IPI_CPU_STOP", "count", "CPU stop interrupts"),
    ("IPI_CPU_STOP_NMI", "count", "CPU stop NMIs"),
    ("IPI_TIMER", "count", "Timer broadcast interrupts"),
    ("IPI_IRQ_WORK", "count", "IRQ work interrupts"),
    ("IPI_CPU_BACKTRACE", "count", "CPU backtrace interrupts"),
    ("IPI_KGDB_ROUNDUP", "count", "KGDB roundup interrupts"),
)


class _Gic(Chip):
    flow = "sgi"
    rows = tuple(Row(f"IPI{n}", text) for n, (_, _, text) in enumerate(_IPIS))

    def lines(self, ncpus: int) -> Iterable[Line]:
        """Return the 16 SGIs."""
        for number, (name, use, _) in enumerate(_IPIS):
            yield Line(number, name, use, f"IPI{number}")
        for sgi in range(len(_IPIS), 16):
            yield Line(sgi, f"SGI {sgi}", "irq")


class Gicv2(_Gic):
    """GICv2: 8 CPUs, SGIs pending for each source apart."""

    name = "gicv2"
    description = "Arm GICv2: 16 SGIs, pending for each sender apart, 8 CPUs"
    max_cpus = 8
    group = 0
    banked = True


class Gicv3(_Gic):
    """GICv3: SGIs by affinity, one pending bit each."""

    name = "gicv3"
    description = "Arm GICv3: 16 SGIs by affinity, priorities, pseudo-NMI"
    group = 16
    shorthand = True
