"""The Arm Generic Interrupt Controller, versions 2 and 3: its SGIs.

A software generated interrupt (SGI) is one of 16 that each CPU has for itself. arm64
gives the first eight of them to its IPIs (``enum ipi_msg_type``); 8 to 15 are free for
IPI domains. An SGI is taken when its priority is above the CPU's mask (PMR) and above
the priority of what was acknowledged there and not ended; a smaller number is a higher
priority.

Registers are methods under their names of the architecture (IHI 0048 for GICv2, IHI
0069 for GICv3), in lower case. Without a value they read, with one they write; either
way they return what the register reads then. Registers that a CPU has for itself are
those of this CPU; ``cpu=`` names another one, and the host, which is no CPU, always has
to name one.

What differs from the hardware, because handlers do not nest here: the core acknowledges
an SGI before its handler and ends it after it, as with EOImode 0: EOIR drops the
running priority and deactivates in one, and there is no DIR. Priorities decide what is
taken next, and do not interrupt a handler; there are no group priorities (BPR).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import ClassVar, Final

from shmipi.cpumask import CpuMask, MaskLike
from shmipi.irq.chips import chain
from shmipi.irq.chips.base import Chip, Line, Row

__all__ = ["Gicv2", "Gicv3"]

# enum ipi_msg_type (arch/arm64/kernel/smp.c): an SGI each.
IPI_RESCHEDULE = 0
IPI_CALL_FUNC = 1
IPI_CPU_STOP = 2
IPI_CPU_STOP_NMI = 3
IPI_TIMER = 4
IPI_IRQ_WORK = 5
IPI_CPU_BACKTRACE = 6
IPI_KGDB_ROUNDUP = 7
MAX_IPI = 8

_IPIS = (
    ("IPI_RESCHEDULE", "reschedule", "Rescheduling interrupts"),
    ("IPI_CALL_FUNC", "call", "Function call interrupts"),
    ("IPI_CPU_STOP", "stop", "CPU stop interrupts"),
    ("IPI_CPU_STOP_NMI", "count", "CPU stop NMIs"),
    ("IPI_TIMER", "timer", "Timer broadcast interrupts"),
    ("IPI_IRQ_WORK", "irq_work", "IRQ work interrupts"),
    # The maskable stand-in for an NMI: a backtrace is what the kernel needs them for.
    ("IPI_CPU_BACKTRACE", "nmi", "CPU backtrace interrupts"),
    ("IPI_KGDB_ROUNDUP", "count", "KGDB roundup interrupts"),
)
_NMI_IPIS = (IPI_CPU_STOP_NMI, IPI_CPU_BACKTRACE, IPI_KGDB_ROUNDUP)

NR_SGIS = 16
_SGIS = (1 << NR_SGIS) - 1
#: What an acknowledge reads when there is nothing to take.
INTID_SPURIOUS = 1023
#: The priority of every SGI of a GICv2, as its driver sets them up.
GICD_INT_DEF_PRI = 0xA0
#: Of a GICv3, and of its pseudo-NMIs (linux/irqchip/arm-gic-v3-prio.h, since 6.11).
GICV3_PRIO_IRQ = 0xC0
GICV3_PRIO_NMI = 0x80
_IDLE_PRIORITY = 0xFF

# GICD_SGIR: who a write is for.
GIC_SGI_LIST = 0
GIC_SGI_ALL_BUT_SELF = 1
GIC_SGI_SELF = 2


# ---- for explain: arch/arm64/kernel/smp.c, irq-gic.c, irq-gic-v3.c -------------------

_ARM64_ENTRY: Final = (
    chain.at("ipi_entry", "gic_handle_irq(regs)"),
    chain.at("line_ack", "  ipi_handler(irq, data)", "    do_handle_IPI({line})"),
)
_ARM64_EOI: Final = chain.at("line_eoi", "  gic_eoi_irq(d)")


def _arm64(*write: str) -> dict[str, chain.Chain]:
    """``write`` is the controller's part: how an SGI is sent."""

    def written(depth: int) -> tuple[str, ...]:
        return tuple(" " * depth + function for function in write)

    return chain.of(
        call=(
            chain.at(
                "call_ipi",
                *chain.SEND_ONE,
                "          smp_cross_call(cpumask_of({cpu}), {line})",
                "            __ipi_send_mask(desc, cpumask_of({cpu}))",
            ),
            chain.at(
                "ipi_send_cpumask",
                *chain.SEND_MASK,
                "        smp_cross_call(mask, {line})",
                "          __ipi_send_mask(desc, mask)",
                *written(12),
            ),
            chain.at("ipi_send_cpu", *written(14), when="one"),
            *_ARM64_ENTRY,
            chain.at("call_interrupt", "      generic_smp_call_function_interrupt()"),
            _ARM64_EOI,
        ),
        resched=(
            chain.at(
                "ipi_send_cpu",
                "  arch_smp_send_reschedule({cpu})",
                "    smp_cross_call(cpumask_of({cpu}), {line})",
                "      __ipi_send_mask(desc, cpumask_of({cpu}))",
                *written(8),
            ),
            *_ARM64_ENTRY,
            chain.at("scheduler_ipi", "      scheduler_ipi()"),
            _ARM64_EOI,
        ),
        nmi=(
            chain.at(
                "nmi_send",
                "nmi_trigger_cpumask_backtrace(mask, exclude_cpu, raise)",
                "  arm64_backtrace_ipi(mask)",
            ),
            chain.at("ipi_send_cpu", "    __ipi_send_mask(desc, mask)", *written(6)),
            *_ARM64_ENTRY,
            chain.at("nmi_handler", "      nmi_cpu_backtrace(regs)"),
            _ARM64_EOI,
        ),
    )


_GICV2: Final = _arm64("gic_ipi_send_mask(d, mask)")
_GICV3: Final = _arm64(
    "gic_ipi_send_mask(d, mask)", "  gic_send_sgi(cluster_id, tlist, irq)"
)


class _Gic(Chip):
    """What both versions have."""

    flow = "sgi"
    core_raises = "groups"  # no pseudo-NMI is a domain's
    rows = tuple(Row(f"IPI{n}", text) for n, (_, _, text) in enumerate(_IPIS))

    def lines(self, ncpus: int) -> Iterable[Line]:
        """Return the 16 SGIs: arm64's IPIs, and the rest for IPI domains."""
        for number, (name, use, _) in enumerate(_IPIS):
            if self.ipi_should_be_nmi(number):
                yield Line(number, name, "none")
            else:
                yield Line(number, name, use, f"IPI{number}")
        for sgi in range(MAX_IPI, NR_SGIS):
            yield Line(sgi, f"SGI {sgi}", "irq")

    # ---- the kernel's way in --------------------------------------------------------

    def ipi_should_be_nmi(self, ipi: int) -> bool:
        """Is this IPI a pseudo-NMI on this controller?"""
        return False

    def smp_cross_call(self, target: MaskLike | int, ipi: int) -> None:
        """Send an IPI (``IPI_RESCHEDULE`` to ``IPI_KGDB_ROUNDUP``) to the CPUs.

        Raises ``IrqError`` EINVAL for a message that arm64 does not have, or a CPU that
        the machine does not have.
        """
        if not 0 <= ipi < MAX_IPI:
            raise self.invalid(
                f"there is no IPI message {ipi:#x}: arm64 has 0 to {MAX_IPI - 1}"
            )
        self.raise_line(ipi, self.cpus(target))

    def arch_smp_send_reschedule(self, cpu: int) -> None:
        """Send IPI_RESCHEDULE."""
        self.smp_cross_call(cpu, IPI_RESCHEDULE)

    def arch_send_call_function_single_ipi(self, cpu: int) -> None:
        """Send IPI_CALL_FUNC: ``cpu`` looks at its call-function queue."""
        self.smp_cross_call(cpu, IPI_CALL_FUNC)

    def arch_send_call_function_ipi_mask(self, mask: MaskLike) -> None:
        """Send IPI_CALL_FUNC to each of ``mask``."""
        self.smp_cross_call(mask, IPI_CALL_FUNC)

    def raise_line(
        self, line: int, cpus: MaskLike | int, writes: int | None = None
    ) -> None:
        """Send SGI ``line`` to each of ``cpus``; those that do not exist ignore it.

        One that is a pseudo-NMI takes the way of NMIs. Raises ``IrqError`` EINVAL for
        an SGI above 15.
        """
        if not 0 <= line < NR_SGIS:
            raise self.invalid(f"there is no SGI {line}: they are 0 to {NR_SGIS - 1}")
        mask = self._named(cpus)
        targets = CpuMask(cpu for cpu in mask if cpu < self.ncpus)
        if self.ipi_should_be_nmi(line):
            self.send_nmi(targets)
        else:
            if writes is None:
                writes = self._writes(targets)
            self.machine.irq_raise(line, list(targets), writes)

    def _writes(self, targets: CpuMask) -> int:
        raise NotImplementedError

    # ---- registers of both, under names of their own --------------------------------

    def _of(self, cpu: int | None) -> int:
        if cpu is None:
            return self.cpu()
        if not 0 <= cpu < self.ncpus:
            raise self.invalid(f"there is no CPU {cpu}")
        return cpu

    def _word(self, register: str, value: int, valid: int = 0xFFFFFFFF) -> int:
        if value & ~valid:
            raise self.invalid(
                f"{register} has no bits {value & ~valid:#x} that could be written"
            )
        return value

    def _enable(
        self, register: str, on: bool, value: int | None, cpu: int | None
    ) -> int:
        of = self._of(cpu)
        for sgi in _set_bits(self._word(register, value or 0, _SGIS)):
            self.machine.irq_enable_line(of, sgi, on)
        return self.read("enable", of) & _SGIS

    def _priority(
        self, register: str, n: int, value: int | None, cpu: int | None
    ) -> int:
        of = self._of(cpu)
        if not 0 <= n < NR_SGIS // 4:
            raise self.invalid(f"{register}{n} is not of SGIs: those have 0 to 3")
        if value is not None:
            self._word(register, value)
            fields = [(4 * n + i, value >> 8 * i & 0xFF) for i in range(4)]
            for sgi, priority in fields:
                self._check_priority(sgi, priority)
            for sgi, priority in fields:
                if not self.ipi_should_be_nmi(sgi):
                    self.machine.pic_write(of, "priority", sgi, priority)
            self._look(of)
        return sum(self.priority(4 * n + i, of) << 8 * i for i in range(4))

    def _check_priority(self, sgi: int, priority: int) -> None:
        """Raise ``IrqError`` for a priority that this SGI cannot have."""

    def _look(self, cpu: int) -> None:
        """Have taken what a change of the registers let through."""
        self.machine.pic_change(cpu, "irr", 0, 0, 0)

    def priority(self, sgi: int, cpu: int | None = None) -> int:
        """Return the priority of an SGI at a CPU: 0 (highest) to 255."""
        if self.ipi_should_be_nmi(sgi):
            return GICV3_PRIO_NMI
        return self.read("priority", self._of(cpu), sgi)

    def _pmr(self, register: str, value: int | None, cpu: int | None) -> int:
        of = self._of(cpu)
        if value is not None:
            self._word(register, value, 0xFF)
            if of != self.cpu():
                raise self.invalid(f"{register} is written by its own CPU")
            self.machine.irq_threshold(0xFF - value)
        return 0xFF - self.read("threshold", of)

    def _running(self, cpu: int | None) -> int:
        of = self._of(cpu)
        acknowledged = _set_bits(self.read("running", of))
        return min((self.priority(n, of) for n in acknowledged), default=_IDLE_PRIORITY)

    def _deactivate(self, register: str, value: int | None) -> int:
        own = self.cpu()
        bits = self._word(register, value or 0, _SGIS)
        if bits:
            self.machine.pic_change(own, "isr", 0, bits, 0)
        return sum(1 << sgi for sgi in self.in_service(own))

    def _eoi(self, register: str, value: int, valid: int) -> None:
        intid = self._word(register, value, valid) & 0x3FF
        if intid == INTID_SPURIOUS:
            return  # nothing was acknowledged, so there is nothing to end
        if intid >= NR_SGIS:
            raise self.invalid(f"{register}: INTID {intid} is no SGI")
        if self.read("running", self.cpu()) >> intid & 1:
            self.machine.irq_end(intid)


class Gicv2(_Gic):
    """GICv2: up to 8 CPUs, an SGI pending for each sending CPU apart.

    Two CPUs that send the same SGI are two interrupts, and the acknowledge of each
    names its sender (``sender``, ``gicc_iar``). The host is no CPU and has no CPU
    interface: what it sends is pending in CPU 0's name, as GICD_SPENDSGIR lets
    software do it. So an SGI of the host and the same SGI of CPU 0 are one, and a
    handler cannot tell them apart.

    There are no pseudo-NMIs: IPI_CPU_BACKTRACE, which stands in for an NMI, can be
    masked, and ``local_irq_disable`` holds it up, as in the kernel.
    """

    name = "gicv2"
    stops_by = "line"
    description = "Arm GICv2: 16 SGIs, pending for each sender apart, 8 CPUs"
    max_cpus = 8
    group = 0
    banked = True
    chains = _GICV2
    hardware: ClassVar = {
        "line_set": "GICD_SGIR written: {line} is pending at CPU {cpu}",
        "line_ack": "GICC_IAR read: {line}",
        "line_eoi": "GICC_EOIR written: {line} not active",
    }
    at_most = 2.0

    def _writes(self, targets: CpuMask) -> int:
        return int(bool(targets))

    def gicd_sgir(self, value: int) -> None:
        """Write GICD_SGIR: send an SGI.

        Bits 25 to 24 say to whom: 0, the CPUs in bits 23 to 16; 1, all CPUs but this
        one; 2, this CPU. Bits 3 to 0 are the SGI. NSATT (15) has no meaning here.
        Written by the host, "all but this one" is every CPU. Raises ``IrqError``
        EINVAL for filter 3 and for reserved bits: an SGI above 15 sets one.
        """
        self._word("GICD_SGIR", value, 0x03FF800F)
        which, listed = value >> 24 & 3, value >> 16 & 0xFF
        if which == GIC_SGI_LIST:
            targets = CpuMask(_set_bits(listed))
        elif which == GIC_SGI_ALL_BUT_SELF:
            own = {self.cpu()} if self.machine.is_cpu else set()
            targets = CpuMask(n for n in range(self.ncpus) if n not in own)
        elif which == GIC_SGI_SELF:
            targets = CpuMask([self.cpu()])
        else:
            raise self.invalid("GICD_SGIR: target list filter 3 is reserved")
        self.raise_line(value & 0xF, targets, 1)

    def gicd_spendsgir(
        self, n: int, value: int | None = None, cpu: int | None = None
    ) -> int:
        """GICD_SPENDSGIRn: SGIs 4n to 4n+3, a byte each, a bit for each sending CPU.

        Written: those become pending in those CPUs' names.
        """
        return self._bank("GICD_SPENDSGIR", n, 0, value or 0, cpu)

    def gicd_cpendsgir(
        self, n: int, value: int | None = None, cpu: int | None = None
    ) -> int:
        """GICD_CPENDSGIRn: as GICD_SPENDSGIRn; written, those are pending no more."""
        return self._bank("GICD_CPENDSGIR", n, value or 0, 0, cpu)

    def _bank(self, name: str, n: int, clear: int, on: int, cpu: int | None) -> int:
        of = self._of(cpu)
        if not 0 <= n < NR_SGIS // 4:
            raise self.invalid(f"there is no {name}{n}: they are 0 to 3")
        sources = (1 << self.ncpus) - 1
        valid = sum(sources << 8 * i for i in range(4))
        self._word(name, clear | on, valid)
        word, shift = n // 2, 32 * (n % 2)
        if clear or on:
            self.machine.pic_change(of, "bank", word, clear << shift, on << shift)
        return self.read("bank", of, word) >> shift & 0xFFFFFFFF

    def pending_lines(self, cpu: int) -> list[int]:
        """Return the SGIs that are pending at a CPU, least first."""
        return [
            sgi
            for sgi in range(NR_SGIS)
            if self.gicd_spendsgir(sgi // 4, cpu=cpu) >> 8 * (sgi % 4) & 0xFF
        ]

    def sender(self, sgi: int, cpu: int | None = None) -> int:
        """Return who sent the SGI that a CPU has acknowledged last: in its handler.

        This, and not GICC_IAR, is what a Python handler asks: other SGIs may have been
        acknowledged between its own acknowledge and the moment it runs.
        """
        if not 0 <= sgi < NR_SGIS:
            raise self.invalid(f"there is no SGI {sgi}: they are 0 to {NR_SGIS - 1}")
        return self.read("senders", self._of(cpu)) >> 4 * sgi & 0xF

    def gicd_isenabler(self, value: int | None = None, cpu: int | None = None) -> int:
        """GICD_ISENABLER0: which SGIs are forwarded. Written: those, too."""
        return self._enable("GICD_ISENABLER0", True, value, cpu)

    def gicd_icenabler(self, value: int | None = None, cpu: int | None = None) -> int:
        """GICD_ICENABLER0. Written: those are held pending and not forwarded."""
        return self._enable("GICD_ICENABLER0", False, value, cpu)

    def gicd_ipriorityr(
        self, n: int, value: int | None = None, cpu: int | None = None
    ) -> int:
        """GICD_IPRIORITYRn: the priorities of SGIs 4n to 4n+3, a byte each."""
        return self._priority("GICD_IPRIORITYR", n, value, cpu)

    def gicd_icactiver(self, value: int | None = None) -> int:
        """GICD_ICACTIVER0 of this CPU: which SGIs are active. Written: those not.

        The running priority stays until EOIR is written, by the core at the latest.
        """
        return self._deactivate("GICD_ICACTIVER0", value)

    def gicc_pmr(self, value: int | None = None, cpu: int | None = None) -> int:
        """GICC_PMR: only priorities above (numbers below) it are taken; 0xff: any.

        It is written by its own CPU. Of 0xff, priority 0xff is still held back.
        """
        return self._pmr("GICC_PMR", value, cpu)

    def gicc_rpr(self, cpu: int | None = None) -> int:
        """GICC_RPR: the highest priority acknowledged and not ended; 0xff: idle."""
        return self._running(cpu)

    def gicc_iar(self, cpu: int | None = None) -> int:
        """GICC_IAR as it was read last: INTID, and the sender in bits 12 to 10.

        The core reads it, before it runs the handler; 1023 is a spurious one.
        """
        return self.read("iar", self._of(cpu))

    def gicc_eoir(self, value: int) -> None:
        """Write GICC_EOIR (EOImode 0) in an SGI's handler: it is active no more.

        The core does the same when the handler returns. What was not acknowledged, or
        was ended already, is ignored.
        """
        self._eoi("GICC_EOIR", value, 0x1FFF)


class Gicv3(_Gic):
    """GICv3: SGIs by affinity, one pending bit each.

    CPU n has affinity 0.0.(n // ``aff0``).(n % ``aff0``). Who sent an SGI is not known,
    and two senders of one SGI are one interrupt unless the first was taken before.

    Args:
        pseudo_nmi: IPI_CPU_STOP_NMI, IPI_CPU_BACKTRACE and IPI_KGDB_ROUNDUP have a
            priority that ``local_irq_disable`` does not mask (the kernel's
            ``irqchip.gicv3_pseudo_nmi=1``): they are the machine's NMI, which is one
            for all three, and counted in one row. Otherwise they are normal IPIs, as
            silently as in the kernel.
        aff0: how many CPUs there are to a value of Aff1: 1 to 16, or a multiple of 16
            up to 256, where the range selector is needed to reach them all.
    """

    name = "gicv3"
    stops_by = "line_nmi"
    description = "Arm GICv3: 16 SGIs by affinity, priorities, pseudo-NMI"
    chains = _GICV3
    hardware: ClassVar = {
        "line_set": "ICC_SGI1R_EL1 written: {line} is pending at CPU {cpu}",
        "line_ack": "ICC_IAR1_EL1 read: {line}",
        "line_eoi": "ICC_EOIR1_EL1 written: {line} not active",
    }

    def __init__(self, *, pseudo_nmi: bool = False, aff0: int = 16) -> None:
        if not (1 <= aff0 <= 16 or (aff0 % 16 == 0 and 16 <= aff0 <= 256)):
            raise ValueError(
                f"aff0 is {aff0}: give 1 to 16, or a multiple of 16 up to 256"
            )
        self.pseudo_nmi = pseudo_nmi
        self.aff0 = aff0
        self.group = min(aff0, 16)
        if pseudo_nmi:
            self.rows = (
                *(row for n, row in enumerate(_Gic.rows) if n not in _NMI_IPIS),
                Row("NMI", "Pseudo-NMIs (IPI3, IPI6, IPI7)", "nmi"),
            )

    def check(self, ncpus: int) -> None:
        """Raise ``ControllerError`` EINVAL if it cannot address so many CPUs."""
        super().check(ncpus)
        limit = 256 * self.aff0
        if ncpus > limit:
            raise self.too_many(
                limit,
                f"controller gicv3 with aff0={self.aff0} can address {limit} CPUs (Aff1"
                f" has 8 bits), not {ncpus}",
            )

    def ipi_should_be_nmi(self, ipi: int) -> bool:
        """Is this IPI a pseudo-NMI: if there are any, CPU_STOP_NMI and the last two."""
        return self.pseudo_nmi and ipi in _NMI_IPIS

    def _writes(self, targets: CpuMask) -> int:
        """Count the writes of gic_compute_target_list: one for up to 16 neighbours."""
        return len({cpu // self.group for cpu in targets})

    def mpidr(self, cpu: int) -> tuple[int, int, int, int]:
        """Return the affinity of a CPU: Aff3, Aff2, Aff1, Aff0."""
        of = self._of(cpu)
        return 0, 0, of // self.aff0, of % self.aff0

    def icc_sgi1r_el1(self, value: int) -> None:
        """Write ICC_SGI1R_EL1: send an SGI, to the CPUs that there are of those named.

        Bits 27 to 24 are the INTID. IRM (40): all CPUs but this one (written by the
        host: all). Otherwise the target list, bits 15 to 0: CPUs with Aff0 of 16 x RS
        (47 to 44) and up, in the cluster Aff3.Aff2.Aff1 (55 to 48, 39 to 32, 23 to 16).
        Raises ``IrqError`` EINVAL for reserved bits: an INTID above 15 sets one.
        """
        self._word("ICC_SGI1R_EL1", value, 0x00FF_F1FF_0FFF_FFFF)
        sgi = value >> 24 & 0xF
        if value >> 40 & 1:
            own = {self.cpu()} if self.machine.is_cpu else set()
            targets = CpuMask(n for n in range(self.ncpus) if n not in own)
        else:
            aff1 = value >> 16 & 0xFF
            base = 16 * (value >> 44 & 0xF)
            named = [base + bit for bit in _set_bits(value & 0xFFFF)]
            elsewhere = value >> 32 & 0xFF or value >> 48 & 0xFF  # Aff2, Aff3
            targets = CpuMask(
                aff1 * self.aff0 + aff0
                for aff0 in named
                if not elsewhere and aff0 < self.aff0
            )
        self.raise_line(sgi, targets, 1)

    def gicr_ispendr0(self, value: int | None = None, cpu: int | None = None) -> int:
        """GICR_ISPENDR0: which SGIs are pending. Written: those, too."""
        return self._pend("GICR_ISPENDR0", 0, value or 0, cpu)

    def gicr_icpendr0(self, value: int | None = None, cpu: int | None = None) -> int:
        """GICR_ICPENDR0: which SGIs are pending. Written: those not any more."""
        return self._pend("GICR_ICPENDR0", value or 0, 0, cpu)

    def _pend(self, name: str, clear: int, on: int, cpu: int | None) -> int:
        of = self._of(cpu)
        self._word(name, clear | on, _SGIS)
        nmis = [sgi for sgi in _set_bits(clear | on) if self.ipi_should_be_nmi(sgi)]
        if nmis:
            raise self.invalid(
                f"{name}: SGI {nmis[0]} is a pseudo-NMI: send it with smp_cross_call"
            )
        if clear or on:
            self.machine.pic_change(of, "irr", 0, clear, on)
        return self.read("irr", of) & _SGIS

    def gicr_isenabler0(self, value: int | None = None, cpu: int | None = None) -> int:
        """GICR_ISENABLER0: which SGIs are forwarded. Written: those, too."""
        return self._enable("GICR_ISENABLER0", True, value, cpu)

    def gicr_icenabler0(self, value: int | None = None, cpu: int | None = None) -> int:
        """GICR_ICENABLER0. Written: those are held pending and not forwarded.

        A pseudo-NMI is not held up by it.
        """
        return self._enable("GICR_ICENABLER0", False, value, cpu)

    def gicr_ipriorityr(
        self, n: int, value: int | None = None, cpu: int | None = None
    ) -> int:
        """GICR_IPRIORITYRn: the priorities of SGIs 4n to 4n+3, a byte each.

        With ``pseudo_nmi`` the NMIs keep ``GICV3_PRIO_NMI``, and no other SGI can have
        that or a higher one: ``IrqError`` EINVAL.
        """
        return self._priority("GICR_IPRIORITYR", n, value, cpu)

    def _check_priority(self, sgi: int, priority: int) -> None:
        nmi = self.ipi_should_be_nmi(sgi)
        if self.pseudo_nmi and (
            priority != GICV3_PRIO_NMI if nmi else priority <= GICV3_PRIO_NMI
        ):
            raise self.invalid(
                f"SGI {sgi} {'is' if nmi else 'is not'} a pseudo-NMI: priority"
                f" {priority:#x} is not for it"
            )

    def gicr_icactiver0(self, value: int | None = None) -> int:
        """GICR_ICACTIVER0 of this CPU: which SGIs are active. Written: those not.

        The running priority stays until EOIR is written, by the core at the latest.
        """
        return self._deactivate("GICR_ICACTIVER0", value)

    def icc_pmr_el1(self, value: int | None = None, cpu: int | None = None) -> int:
        """ICC_PMR_EL1: only priorities above (numbers below) it are taken; 0xff: any.

        It is written by its own CPU, and does not hold up pseudo-NMIs.
        """
        return self._pmr("ICC_PMR_EL1", value, cpu)

    def icc_rpr_el1(self, cpu: int | None = None) -> int:
        """ICC_RPR_EL1: the highest priority acknowledged and not ended; 0xff: idle."""
        return self._running(cpu)

    def icc_iar1_el1(self, cpu: int | None = None) -> int:
        """ICC_IAR1_EL1 as it was read last: the INTID; 1023 is a spurious one.

        The core reads it, before it runs the handler.
        """
        return self.read("iar", self._of(cpu))

    def icc_eoir1_el1(self, value: int) -> None:
        """Write ICC_EOIR1_EL1 (EOImode 0) in an SGI's handler: it is active no more.

        The core does the same when the handler returns. What was not acknowledged, or
        was ended already, is ignored.
        """
        self._eoi("ICC_EOIR1_EL1", value, 0xFFFFFF)


def _set_bits(value: int) -> list[int]:
    return [bit for bit in range(value.bit_length()) if value >> bit & 1]
