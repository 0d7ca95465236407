"""RISC-V: up to 32 IPIs over one software interrupt (the kernel's ipi-mux)."""

from __future__ import annotations

from collections.abc import Iterable

from shmipi.irq.chips.base import Chip, Line, Row

__all__ = ["Riscv"]


class Riscv(Chip):
    """The hart's software interrupt, with ipi-mux over it."""

    name = "riscv"
    description = "RISC-V software interrupt with the kernel's ipi-mux: 32 IPIs a hart"
    flow = "mux"
    rows = (
        Row("IPI0", "Rescheduling interrupts"),
        Row("IPI1", "Function call interrupts"),
        Row("IPI2", "CPU stop interrupts"),
        Row("IPI3", "CPU stop (for crash dump) interrupts"),
        Row("IPI4", "IRQ work interrupts"),
        Row("IPI5", "Timer broadcast interrupts"),
        Row("IPI6", "CPU backtrace interrupts"),
        Row("IPI7", "KGDB roundup interrupts"),
    )

    def lines(self, ncpus: int) -> Iterable[Line]:
        """Return a line for each IPI of the mux."""
        yield Line(0, "IPI_RESCHEDULE", "reschedule", "IPI0")
        yield Line(1, "IPI_CALL_FUNC", "call", "IPI1")
        yield Line(2, "IPI_CPU_STOP", "count", "IPI2")
        yield Line(3, "IPI_CPU_CRASH_STOP", "count", "IPI3")
        yield Line(4, "IPI_IRQ_WORK", "count", "IPI4")
        yield Line(5, "IPI_TIMER", "count", "IPI5")
        yield Line(6, "IPI_CPU_BACKTRACE", "nmi", "IPI6")
        yield Line(7, "IPI_KGDB_ROUNDUP", "count", "IPI7")
        for ipi in range(8, 32):
            yield Line(ipi, f"ipi-mux {ipi}", "irq")
