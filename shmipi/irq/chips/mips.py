"""The mailbox of MIPS multiprocessors: a word of action bits for each CPU."""

from __future__ import annotations

from collections.abc import Iterable

from shmipi.irq.chips.base import Chip, Line, Row

__all__ = ["Mips"]

SMP_RESCHEDULE_YOURSELF = 0x1
SMP_CALL_FUNCTION = 0x2
SMP_ICACHE_FLUSH = 0x4
SMP_DUMP = 0x8
SMP_IPI_TIMER = 0xC


class Mips(Chip):
    """A mailbox for each CPU: Loongson-3, Cavium Octeon."""

    name = "mips"
    description = "MIPS mailbox (Loongson-3, Octeon): a word of action bits a CPU"
    flow = "mailbox"
    rows = (
        Row("RES", "Rescheduling interrupts"),
        Row("CAL", "Function call interrupts"),
        Row("ICF", "Icache flush interrupts"),
        Row("DMP", "Dump interrupts"),
        Row("NMI", "Backtrace interrupts (maskable)", "nmi"),
        Row("ERR", "Unknown actions", "irq_other"),
    )

    def lines(self, ncpus: int) -> Iterable[Line]:
        """Return a line for each action bit."""
        yield Line(0, "SMP_RESCHEDULE_YOURSELF", "reschedule", "RES")
        yield Line(1, "SMP_CALL_FUNCTION", "call", "CAL")
        yield Line(2, "SMP_ICACHE_FLUSH", "count", "ICF")
        yield Line(3, "SMP_DUMP", "count", "DMP")
        yield Line(4, "SMP_BACKTRACE", "nmi")
        for bit in range(5, 24):
            yield Line(bit, f"action {1 << bit:#x}", "irq")
        for bit in range(24, 32):
            yield Line(bit, f"action {1 << bit:#x}", "none")
