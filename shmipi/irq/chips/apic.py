"""The x86 local APIC, as xAPIC and x2APIC."""

from __future__ import annotations

from collections.abc import Iterable

from shmipi.irq.chips.base import Chip, Line, Row

__all__ = ["Apic"]

NMI_VECTOR = 0x02
FIRST_EXTERNAL_VECTOR = 0x20
IRQ_WORK_VECTOR = 0xF6
REBOOT_VECTOR = 0xF8
CALL_FUNCTION_SINGLE_VECTOR = 0xFB
CALL_FUNCTION_VECTOR = 0xFC
RESCHEDULE_VECTOR = 0xFD
SPURIOUS_APIC_VECTOR = 0xFF


class Apic(Chip):
    """The x86 local APIC."""

    name = "apic"
    description = "x86 local APIC (xAPIC, x2APIC): 256 vectors in 16 priority classes"
    flow = "vector"
    shorthand = True
    startup = True
    rows = (
        Row("NMI", "Non-maskable interrupts", "nmi"),
        Row("SPU", "Spurious interrupts"),
        Row("IWI", "IRQ work interrupts"),
        Row("RES", "Rescheduling interrupts"),
        Row("CAL", "Function call interrupts"),
    )

    def bring_up(self, cpu: int) -> None:
        """Send INIT and STARTUP to a CPU that waits for them."""
        if self.read("startup", cpu) == 1:
            self.machine.startup_ipi(cpu)

    def lines(self, ncpus: int) -> Iterable[Line]:
        """Return the system vectors, and the rest for IPI domains."""
        system = {
            IRQ_WORK_VECTOR: Line(IRQ_WORK_VECTOR, "IRQ_WORK_VECTOR", "count", "IWI"),
            REBOOT_VECTOR: Line(REBOOT_VECTOR, "REBOOT_VECTOR", "count"),
            CALL_FUNCTION_SINGLE_VECTOR: Line(
                CALL_FUNCTION_SINGLE_VECTOR,
                "CALL_FUNCTION_SINGLE_VECTOR",
                "call_single",
                "CAL",
            ),
            CALL_FUNCTION_VECTOR: Line(
                CALL_FUNCTION_VECTOR, "CALL_FUNCTION_VECTOR", "call", "CAL"
            ),
            RESCHEDULE_VECTOR: Line(
                RESCHEDULE_VECTOR, "RESCHEDULE_VECTOR", "reschedule", "RES"
            ),
            SPURIOUS_APIC_VECTOR: Line(
                SPURIOUS_APIC_VECTOR, "SPURIOUS_APIC_VECTOR", "count", "SPU"
            ),
        }
        yield from system.values()
        for vector in range(FIRST_EXTERNAL_VECTOR, 256):
            if vector not in system:
                yield Line(vector, f"vector {vector:#x}", "irq")
