"""powerpc: muxed messages over XIVE, and the core doorbell."""

from __future__ import annotations

from collections.abc import Iterable

from shmipi.irq.chips.base import Chip, Line, Row

__all__ = ["Xive"]

PPC_MSG_CALL_FUNCTION = 0
PPC_MSG_RESCHEDULE = 1
PPC_MSG_TICK_BROADCAST = 2
PPC_MSG_NMI_IPI = 3
PPC_MSG_RM_HOST_ACTION = 4
_FIRST_SOURCE = 8


class Xive(Chip):
    """XIVE with one IPI a CPU, and powerpc's messages behind it."""

    name = "xive"
    description = "powerpc XIVE: one IPI a CPU with messages behind it, core doorbells"
    flow = "esb"
    rows = (
        Row("IPI", "Function call interrupts"),
        Row("RES", "Rescheduling interrupts"),
        Row("TBI", "Tick broadcast interrupts"),
        Row("RMH", "Host actions"),
        Row("NMI", "System reset interrupts", "nmi"),
    )

    def lines(self, ncpus: int) -> Iterable[Line]:
        """Return the messages, and the sources for IPI domains."""
        yield Line(PPC_MSG_CALL_FUNCTION, "PPC_MSG_CALL_FUNCTION", "call", "IPI")
        yield Line(PPC_MSG_RESCHEDULE, "PPC_MSG_RESCHEDULE", "reschedule", "RES")
        yield Line(PPC_MSG_TICK_BROADCAST, "PPC_MSG_TICK_BROADCAST", "count", "TBI")
        yield Line(PPC_MSG_RM_HOST_ACTION, "PPC_MSG_RM_HOST_ACTION", "count", "RMH")
        for source in range(_FIRST_SOURCE, 31):
            yield Line(source, f"source {source}", "irq")
