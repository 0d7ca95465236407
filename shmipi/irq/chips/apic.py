"""The x86 local APIC, as far as the generic IPIs need it: fixed vectors and the IRR.

Vectors are those of ``arch/x86/include/asm/irq_vectors.h``; a vector is a bit of the
target's interrupt request register, so it is pending at most once, and the highest is
taken first.
"""

from shmipi.irq.chips.base import Chip, Row

__all__ = ["APIC"]

RESCHEDULE_VECTOR = 0xFD
CALL_FUNCTION_VECTOR = 0xFC
CALL_FUNCTION_SINGLE_VECTOR = 0xFB

APIC = Chip(
    name="apic",
    description="x86 local APIC (x2APIC): 256 vectors a CPU, one pending bit each",
    max_cpus=4096,
    lines={
        "RESCHEDULE_VECTOR": RESCHEDULE_VECTOR,
        "CALL_FUNCTION_VECTOR": CALL_FUNCTION_VECTOR,
        "CALL_FUNCTION_SINGLE_VECTOR": CALL_FUNCTION_SINGLE_VECTOR,
    },
    rows=(
        Row("NMI", ("nmi",), "Non-maskable interrupts"),
        Row("RES", ("irq_resched",), "Rescheduling interrupts"),
        Row("CAL", ("irq_call_single", "irq_call"), "Function call interrupts"),
        Row("SPU", ("irq_other",), "Spurious interrupts"),
    ),
)
