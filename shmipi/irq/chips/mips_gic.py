"""The MIPS Global Interrupt Controller: shared interrupts, two of them an IPI a CPU.

Interrupts 0 to 255 are shared: they belong to the machine, and each is routed to one
CPU. An interrupt that is triggered by an edge can be made pending by software, which
makes an IPI of it (drivers/irqchip/irq-mips-gic.c):

==============  ========================================================================
SH_WEDGE        write the number with bit 31: pending; without it: not any more
SH_SMASK        write the number: unmask it
SH_RMASK        write the number: mask it; what comes meanwhile stays pending
SH_MASK         reads as the interrupts that are not masked
SH_PEND         reads as the interrupts that are pending, masked or not
SH_MAPi_VPj     one for each interrupt: the CPU that it goes to
==============  ========================================================================

The CPU clears the pending bit before it handles the interrupt, so the same one sent
once more meanwhile is taken once more afterwards; of two that are pending the lower
number is taken first.

A range is reserved for IPIs: what the device tree says in ``mti,reserved-ipi-vectors``,
else the last two for each CPU. Two blocks in it are the kernel's own, as
``mips_smp_ipi_allocate`` reserves them: first a "call" for each CPU, then a "resched"
for each. IPI domains take what is left of the range, and nothing else: when that is
used up there are no more (gic_ipi_domain_alloc), and a device cannot have one of them.
The driver's default leaves none, so here IPI domains then have the upper half of the
other interrupts.

Each CPU has seven local interrupts besides (GIC_LOCAL_INT_*, lines 256 to 262): the
watchdog, two timers, the performance counters, two that software raises, and the debug
channel. They are no IPIs: other CPUs cannot raise them, and what raises one here is
whoever stands in for the device. They are masked by VL_SMASK and VL_RMASK, a bit each.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Sequence
from typing import ClassVar, Final

from shmipi import _core
from shmipi.cpumask import MaskLike
from shmipi.irq.chips import chain
from shmipi.irq.chips.base import Line, Row
from shmipi.irq.chips.mips import (
    MIPS_NMI,
    MIPS_RESCHED,
    MIPS_SEND,
    SMP_CALL_FUNCTION,
    SMP_RESCHEDULE_YOURSELF,
    MipsSmp,
    PlatSmpOps,
)

__all__ = [
    "GIC_LOCAL_INT_COMPARE",
    "GIC_LOCAL_INT_FDC",
    "GIC_LOCAL_INT_PERFCTR",
    "GIC_LOCAL_INT_SWINT0",
    "GIC_LOCAL_INT_SWINT1",
    "GIC_LOCAL_INT_TIMER",
    "GIC_LOCAL_INT_WD",
    "GIC_NUM_LOCAL_INTRS",
    "GIC_WEDGE_RW",
    "MipsGic",
]

#: The bit of WEDGE that says: make it pending.
GIC_WEDGE_RW = 1 << 31

_SHARED = 256

#: A CPU's own interrupts (dt-bindings/interrupt-controller/mips-gic.h, asm/mips-gic.h).
GIC_LOCAL_INT_WD = 0
GIC_LOCAL_INT_COMPARE = 1
GIC_LOCAL_INT_TIMER = 2
GIC_LOCAL_INT_PERFCTR = 3
GIC_LOCAL_INT_SWINT0 = 4
GIC_LOCAL_INT_SWINT1 = 5
GIC_LOCAL_INT_FDC = 6
GIC_NUM_LOCAL_INTRS = 7
_LOCAL = ("WD", "COMPARE", "TIMER", "PERFCTR", "SWINT0", "SWINT1", "FDC")


# ---- for explain: arch/mips/kernel/smp.c, irq-mips-gic.c -----------------------------

#: The IPIs are irqs of a domain over the GIC's: __ipi_send_mask() finds the hwirqs.
_GIC_ENTRY: Final = (
    chain.at("ipi_entry", "gic_irq_dispatch(desc)", "  gic_handle_shared_int(true)"),
    chain.at("line_ack", "    gic_ack_irq(d)"),
)

_MIPS_GIC: Final = chain.of(
    call=(
        *MIPS_SEND,
        chain.at(
            "ipi_send_cpu",
            "            mips_smp_send_ipi_mask(mask, SMP_CALL_FUNCTION)",
            "              __ipi_send_mask(call_desc, mask)",
            "                gic_send_ipi(d, {cpu})",
            when="one",
        ),
        chain.at("ipi_send_cpu", "                gic_send_ipi(d, {cpu})", when="mask"),
        *_GIC_ENTRY,
        chain.at(
            "call_interrupt",
            "    ipi_call_interrupt(irq, dev_id)",
            "      generic_smp_call_function_interrupt()",
        ),
    ),
    resched=(
        chain.at(
            "ipi_send_cpu",
            MIPS_RESCHED,
            "    mips_smp_send_ipi_single({cpu}, SMP_RESCHEDULE_YOURSELF)",
            "      __ipi_send_mask(sched_desc, mask)",
            "        gic_send_ipi(d, {cpu})",
        ),
        *_GIC_ENTRY,
        chain.at(
            "scheduler_ipi",
            "    ipi_resched_interrupt(irq, dev_id)",
            "      scheduler_ipi()",
        ),
    ),
    nmi=MIPS_NMI,
)


class MipsGic(MipsSmp):
    """The MIPS GIC: 256 shared interrupts, seven local ones a CPU, and NMIs.

    ``reserved_ipi_vectors`` is ``(base, count)``, the two cells of the device tree's
    ``mti,reserved-ipi-vectors``; None: the last 2 x CPUs. ``ValueError`` for a range
    that does not lie within 0 to 255, and, as soon as it is known how many CPUs there
    are, for one that has not two for each of them.
    """

    name = "mips-gic"
    description = "MIPS GIC: 256 shared interrupts, two of them an IPI each CPU has"
    flow = "shared"
    chains = _MIPS_GIC
    hardware: ClassVar = {
        "line_set": "WEDGE written: {line} is pending",
        "line_ack": "WEDGE written: {line} cleared",
        "line_eoi": "{line} handled",
    }
    max_cpus = _SHARED // 2
    per_cpu = True
    rows = (
        Row("RES", "Rescheduling interrupts"),
        Row("CAL", "Function call interrupts"),
        Row("NMI", "Non-maskable interrupts", "nmi"),
    )

    def __init__(self, reserved_ipi_vectors: tuple[int, int] | None = None) -> None:
        if reserved_ipi_vectors is not None:
            base, count = map(operator.index, reserved_ipi_vectors)
            if base < 0 or count < 1 or base + count > _SHARED:
                raise ValueError(
                    f"reserved_ipi_vectors=({base}, {count}): the interrupts are 0 to"
                    f" {_SHARED - 1}"
                )
            reserved_ipi_vectors = base, count
        self.reserved_ipi_vectors = reserved_ipi_vectors

    # ---- the description ------------------------------------------------------------

    def check(self, ncpus: int) -> None:
        """Raise ``ControllerError`` EINVAL if the reserved range is too small."""
        super().check(ncpus)
        self.ipi_range(ncpus)

    def ipi_range(self, ncpus: int) -> range:
        """Return the reserved interrupts of a machine of ``ncpus`` CPUs."""
        if self.reserved_ipi_vectors is None:
            return range(_SHARED - 2 * ncpus, _SHARED)
        base, count = self.reserved_ipi_vectors
        if count < 2 * ncpus:
            raise self.too_many(
                count // 2,
                f"reserved_ipi_vectors=({base}, {count}): {ncpus} CPUs need"
                f" {2 * ncpus} vectors, not {count}",
            )
        return range(base, base + count)

    def lines(self, ncpus: int) -> Iterable[Line]:
        """Return the shared interrupts: two blocks of IPIs, the others are free."""
        first = self.ipi_range(ncpus).start
        for intr in range(_SHARED):
            cpu = (intr - first) % ncpus
            if first <= intr < first + ncpus:
                yield Line(intr, f"IPI call {cpu}", "call", "CAL")
            elif first + ncpus <= intr < first + 2 * ncpus:
                yield Line(intr, f"IPI resched {cpu}", "reschedule", "RES")
            else:
                yield Line(intr, f"shared {intr}", "irq")
        for intr, name in enumerate(_LOCAL):
            yield Line(_SHARED + intr, f"GIC_LOCAL_INT_{name}", "irq")

    def ipi_lines(self, ncpus: int) -> Sequence[int]:
        """Return what is left of the reserved range."""
        shared = [n for n in self.irq_lines(ncpus) if n < _SHARED]
        if self.reserved_ipi_vectors is None:
            return shared[len(shared) // 2 :]
        reserved = self.ipi_range(ncpus)
        return [n for n in shared if n in reserved]

    def is_routed(self, line: int) -> bool:
        """The shared ones are; local ones are each CPU's."""
        return line < _SHARED

    def prepare(self, machine: _core.Machine) -> None:
        """Route each IPI to its CPU."""
        first = self.ipi_range(machine.ncpus).start
        for block in (first, first + machine.ncpus):
            for cpu in range(machine.ncpus):
                machine.pic_write(0, "route", block + cpu, cpu + 1)

    # ---- the registers --------------------------------------------------------------

    def write_gic_wedge(self, value: int) -> None:
        """Write WEDGE: with ``GIC_WEDGE_RW`` make a number pending, else clear it.

        It goes to the CPU that it is routed to; routed to none, it stays pending.
        """
        value = operator.index(value)
        intr = self._intr(value & ~GIC_WEDGE_RW)
        if value & GIC_WEDGE_RW:
            # Which CPU: the core asks the map again, it may change meanwhile.
            self.machine.irq_raise(intr, [max(0, self._routed_to(intr))], 1)
        else:
            self.machine.irq_clear(0, intr)

    def write_gic_smask(self, intr: int) -> None:
        """Unmask an interrupt; one that is pending is taken now, once."""
        intr = self._intr(intr)
        self.machine.irq_enable_line(max(0, self._routed_to(intr)), intr, True)

    def write_gic_rmask(self, intr: int) -> None:
        """Mask an interrupt: what comes stays pending."""
        intr = self._intr(intr)
        self.machine.irq_enable_line(max(0, self._routed_to(intr)), intr, False)

    def map_to_vp(self, intr: int, cpu: int) -> None:
        """Route an interrupt to a CPU (SH_MAPi_VPj); one that is pending goes with it.

        One at a time for one interrupt, as under the driver's ``gic_lock``.
        """
        self.route_line(intr, cpu)

    def route_line(self, line: int, cpu: int | None) -> None:
        """Route an interrupt to a CPU; None: to nobody, and it stays pending."""
        intr = self._intr(line)
        value = 0 if cpu is None else self.one_cpu(cpu) + 1
        self.machine.pic_write(0, "route", intr, value)

    def map_vp(self, intr: int) -> int | None:
        """Return the CPU that an interrupt is routed to, or None."""
        cpu = self._routed_to(self._intr(intr))
        return None if cpu < 0 else cpu

    # The registers of a CPU's local interrupts: of this CPU, or of ``cpu``.

    def read_gic_vl_pend(self, cpu: int | None = None) -> int:
        """Return VL_PEND: bit n is set while local interrupt n is pending."""
        return self.read("irr", self._vl(cpu), _SHARED // 64)

    def read_gic_vl_mask(self, cpu: int | None = None) -> int:
        """Return VL_MASK: bit n is set while local interrupt n is not masked."""
        return self.read("enable", self._vl(cpu), _SHARED // 64)

    def write_gic_vl_smask(self, bits: int, cpu: int | None = None) -> None:
        """Write VL_SMASK: unmask these; one that is pending is taken now, once."""
        self._vl_switch(bits, cpu, True)

    def write_gic_vl_rmask(self, bits: int, cpu: int | None = None) -> None:
        """Write VL_RMASK: mask these; what comes stays pending."""
        self._vl_switch(bits, cpu, False)

    def raise_local(self, intr: int, cpu: int | None = None) -> None:
        """Be the device of local interrupt ``intr`` (GIC_LOCAL_INT_*) of a CPU."""
        if not 0 <= operator.index(intr) < GIC_NUM_LOCAL_INTRS:
            raise self.invalid(f"no local interrupt {intr}: they are 0 to 6")
        self.machine.irq_raise(_SHARED + intr, [self._vl(cpu)], 0)

    def _vl(self, cpu: int | None) -> int:
        return self.cpu() if cpu is None else self.one_cpu(cpu)

    def _vl_switch(self, bits: int, cpu: int | None, on: bool) -> None:
        bits = operator.index(bits)
        if not 0 <= bits < 1 << GIC_NUM_LOCAL_INTRS:
            raise self.invalid(f"no local interrupts {bits:#x}: they are bits 0 to 6")
        for intr in range(GIC_NUM_LOCAL_INTRS):
            if bits >> intr & 1:
                self.machine.irq_enable_line(self._vl(cpu), _SHARED + intr, on)

    def _line(self, line: int) -> int:
        if operator.index(line) >= _SHARED:
            raise self.invalid(
                f"there is no line {line} that another CPU could raise or mask: they"
                f" are 0 to {_SHARED - 1}"
            )
        return super()._line(line)

    @property
    def PEND(self) -> int:
        """SH_PEND: bit n is set while interrupt n is pending."""
        return self._register("shared")

    @property
    def MASK(self) -> int:
        """SH_MASK: bit n is set while interrupt n is not masked."""
        return self._register("mask")

    def pending_lines(self, cpu: int) -> list[int]:
        """Return the interrupts that are pending and routed to a CPU, least first."""
        pend = self.PEND & self._register("routed", cpu)
        local = self.read("irr", cpu, _SHARED // 64)
        return [n for n in range(_SHARED) if pend >> n & 1] + [
            _SHARED + n for n in range(GIC_NUM_LOCAL_INTRS) if local >> n & 1
        ]

    def _register(self, name: str, cpu: int = 0) -> int:
        words = (self.read(name, cpu, i) << 64 * i for i in range(_SHARED // 64))
        return sum(words)

    def _routed_to(self, intr: int) -> int:
        return self.read("route", 0, intr) - 1

    def _intr(self, intr: int) -> int:
        intr = operator.index(intr)
        if not 0 <= intr < _SHARED:
            raise self.invalid(f"no interrupt {intr}: they are 0 to {_SHARED - 1}")
        return intr

    # ---- the kernel's IPIs ----------------------------------------------------------

    def ipi(self, cpu: int, action: int) -> int:
        """Return the interrupt of an action of a CPU. ``IrqError`` EINVAL.

        The generic kernel (mips_smp_send_ipi_mask) has two: SMP_CALL_FUNCTION and
        SMP_RESCHEDULE_YOURSELF, one at a time; anything else is BUG().
        """
        first = self.ipi_range(self.ncpus).start
        cpu = self.one_cpu(cpu)
        if action == SMP_CALL_FUNCTION:
            return first + cpu
        if action == SMP_RESCHEDULE_YOURSELF:
            return first + self.ncpus + cpu
        raise self.bug(
            action, "known are SMP_CALL_FUNCTION 0x2 and SMP_RESCHEDULE_YOURSELF 0x1"
        )

    @property
    def mp_ops(self) -> PlatSmpOps:
        """Sends by one write to WEDGE for each target; see ``ipi`` for the errors."""
        return PlatSmpOps(
            lambda cpu, action: self._send_ipi_mask([cpu], action), self._send_ipi_mask
        )

    def _send_ipi_mask(self, mask: MaskLike, action: int) -> None:
        self.ipi(0, action)  # also for an empty mask
        for intr in [self.ipi(cpu, action) for cpu in self.cpus(mask)]:
            self.write_gic_wedge(GIC_WEDGE_RW | intr)
