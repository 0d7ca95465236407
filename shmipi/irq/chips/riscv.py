"""RISC-V: up to 32 IPIs over one software interrupt (the kernel's ipi-mux).

A hart has one software interrupt for all other harts: a bit, which the SBI's
``send_ipi`` or a store to the hart's ``msip`` register (CLINT, ACLINT) sets. The kernel
puts IPIs over it with kernel/irq/ipi-mux.c. For each CPU there are two words, ``bits``
and ``enable``:

- sending sets a bit; if it was clear before, and is enabled there, the software
  interrupt is raised. So two different bits cost two, and the same one twice costs one.
- the software interrupt reads and clears all bits that are enabled, and handles them,
  least first. Others stay.
- unmasking enables a bit, and raises the CPU's own software interrupt if the bit was
  sent meanwhile.

IPIs 0 to 7 are the kernel's (arch/riscv/kernel/smp.c), in its order.
"""

from __future__ import annotations

import copy
import errno
import operator
from collections.abc import Callable, Iterable
from typing import Any, ClassVar, Final, NamedTuple, Self

from shmipi import _core
from shmipi.cpumask import CpuMask, MaskLike
from shmipi.errors import IrqError
from shmipi.irq.chips import chain
from shmipi.irq.chips.base import Chip, Line, Row

__all__ = ["SBI_ERR_INVALID_PARAM", "SBI_SUCCESS", "Riscv"]

#: What an SBI call returns as its error (RISC-V SBI specification, "Binary Encoding").
SBI_SUCCESS = 0
SBI_ERR_INVALID_PARAM = -3
#: ``hart_mask_base`` that means every hart.
_ALL_HARTS = (1 << 64) - 1
#: Bits of a hart mask, and of ``bits``.
_XLEN = 64
_MUX_BITS = 32
_FIRST_VIRQ = 1


class _Ipi(NamedTuple):
    name: str
    use: str
    text: str


_IPIS = (
    _Ipi("IPI_RESCHEDULE", "reschedule", "Rescheduling interrupts"),
    _Ipi("IPI_CALL_FUNC", "call", "Function call interrupts"),
    _Ipi("IPI_CPU_STOP", "stop", "CPU stop interrupts"),
    _Ipi("IPI_CPU_CRASH_STOP", "count", "CPU stop (for crash dump) interrupts"),
    _Ipi("IPI_IRQ_WORK", "irq_work", "IRQ work interrupts"),
    _Ipi("IPI_TIMER", "timer", "Timer broadcast interrupts"),
    _Ipi("IPI_CPU_BACKTRACE", "nmi", "CPU backtrace interrupts"),
    _Ipi("IPI_KGDB_ROUNDUP", "count", "KGDB roundup interrupts"),
)
_RESCHEDULE = 0
_CALL_FUNC = 1
#: The software interrupt raised by itself, with no IPI behind it: no bit of the mux.
_SOFTWARE = _MUX_BITS


# ---- for explain: arch/riscv/kernel/{smp,sbi-ipi}.c, ipi-mux.c -----------------------

#: ipi_mux_send_mask() rings for a bit that goes from 0 to 1 and is not masked there.
_MUX_RING: Final = chain.at(
    "line_set",
    "                ipi_mux_send({cpu})",
    "                  sbi_send_ipi({cpu})",
)
_MUX_ENTRY: Final = (
    chain.at("ipi_entry", "sbi_ipi_handle(desc)", "  ipi_mux_process()"),
    chain.at("line_ack", "    handle_IPI(irq, data)"),
)

_RISCV: Final = chain.of(
    call=(
        chain.at(
            "call_ipi",
            *chain.SEND_ONE,
            "          send_ipi_single({cpu}, {line})",
            "            __ipi_send_mask(ipi_desc[op], cpumask_of({cpu}))",
        ),
        chain.at(
            "ipi_send_cpumask",
            *chain.SEND_MASK,
            "        send_ipi_mask(mask, {line})",
            "          __ipi_send_mask(ipi_desc[op], mask)",
            "            ipi_mux_send_mask(d, mask)",
        ),
        chain.at(
            "ipi_send_cpu", "              ipi_mux_send_mask(d, mask)", when="one"
        ),
        _MUX_RING,
        *_MUX_ENTRY,
        chain.at("call_interrupt", "      generic_smp_call_function_interrupt()"),
    ),
    resched=(
        chain.at(
            "ipi_send_cpu",
            "  arch_smp_send_reschedule({cpu})",
            "    send_ipi_single({cpu}, {line})",
            "      __ipi_send_mask(ipi_desc[op], cpumask_of({cpu}))",
            "        ipi_mux_send_mask(d, mask)",
        ),
        _MUX_RING,
        *_MUX_ENTRY,
        chain.at("scheduler_ipi", "      scheduler_ipi()"),
    ),
    nmi=(
        chain.at(
            "nmi_send",
            "nmi_trigger_cpumask_backtrace(mask, exclude_cpu, raise)",
            "  riscv_backtrace_ipi(mask)",
        ),
        chain.at(
            "ipi_send_cpu",
            "    __ipi_send_mask(ipi_desc[op], mask)",
            "      ipi_mux_send_mask(d, mask)",
        ),
        _MUX_RING,
        *_MUX_ENTRY,
        chain.at("nmi_handler", "      nmi_cpu_backtrace(regs)"),
    ),
)


class Riscv(Chip):
    """The hart's software interrupt, with ipi-mux over it. Hart n is CPU n.

    The mux is made once, before the machine: by ``ipi_mux_create``, or with 32 IPIs
    when the machine boots. IPIs that are not the kernel's are for IPI domains.
    """

    name = "riscv"
    stops_by = "line"
    description = "RISC-V software interrupt with the kernel's ipi-mux: 32 IPIs a hart"
    flow = "mux"
    chains = _RISCV
    hardware: ClassVar = {
        "line_set": "bit of {line} went from 0 to 1: software interrupt at CPU {cpu}",
        "line_ack": "bit of {line} taken",
        "line_eoi": "{line} handled",
    }
    rows = (
        *(Row(f"IPI{n}", ipi.text) for n, ipi in enumerate(_IPIS)),
        Row("SSI", "Software interrupts without an IPI"),
    )

    #: IPIs of the mux; 0 until it is made.
    nr_ipi: int = 0

    # ---- the description ------------------------------------------------------------

    def for_cpus(self, ncpus: int) -> Self:
        """Return it with its mux made, if nobody has made one."""
        chip = copy.copy(super().for_cpus(ncpus))
        if not chip.nr_ipi:
            chip.ipi_mux_create(_MUX_BITS, chip.sbi_send_ipi)
        return chip

    def lines(self, ncpus: int) -> Iterable[Line]:
        """Return a line for each IPI of the mux, and one for what is not an IPI."""
        for number, ipi in enumerate(_IPIS):
            yield Line(number, ipi.name, ipi.use, f"IPI{number}")
        for number in range(len(_IPIS), self.nr_ipi or _MUX_BITS):
            yield Line(number, f"ipi-mux {number}", "irq")
        yield Line(_SOFTWARE, "software interrupt", "count", "SSI")

    # ---- kernel/irq/ipi-mux.c -------------------------------------------------------

    def ipi_mux_create(
        self, nr_ipi: int, mux_send: Callable[..., object] | None
    ) -> int:
        """Make the mux, with ``nr_ipi`` IPIs; return the first virq.

        ``mux_send`` is what raises a hart's software interrupt: ``sbi_send_ipi`` or
        ``clint_send_ipi`` of this chip (the core then does what they do: no Python runs
        when an IPI is sent). IPI n has virq first + n; these numbers are the mux's own,
        as the kernel's IPIs need no irq descriptor here.

        Raises ``IrqError``: EEXIST when there is one, as on every machine that has
        booted; EINVAL for more than 32, for fewer than the kernel's 8 (which then warns
        and has no IPIs), and for a ``mux_send`` that is not one of the two.
        """
        if self.nr_ipi:
            raise IrqError(
                f"{self.name}: the mux is there already, with {self.nr_ipi} IPIs: make"
                " it on a controller that no machine has yet",
                errno=errno.EEXIST,
                domain=self.name,
            )
        nr_ipi = operator.index(nr_ipi)
        if not len(_IPIS) <= nr_ipi <= _MUX_BITS:
            raise self.invalid(
                f"ipi_mux_create: {len(_IPIS)} to {_MUX_BITS} IPIs, not {nr_ipi}"
            )
        if mux_send not in (self.sbi_send_ipi, self.clint_send_ipi):
            raise self.invalid(
                "ipi_mux_create: mux_send is sbi_send_ipi or clint_send_ipi of this"
                f" controller, not {mux_send!r}"
            )
        self.nr_ipi = nr_ipi
        return _FIRST_VIRQ

    def ipi_mux_send_mask(self, ipi: int, mask: MaskLike) -> None:
        """Send IPI ``ipi`` to each CPU of ``mask``.

        Raises ``IrqError`` EINVAL for an IPI that the mux has not, and for a CPU that
        does not exist; nothing was sent then.
        """
        ipi = self._ipi(ipi)
        cpus = list(self.cpus(mask))
        self.machine.irq_raise(ipi, cpus, len(cpus))

    def ipi_mux_mask(self, ipi: int) -> None:
        """Mask an IPI of this CPU: it stays pending when it is sent."""
        self.mask_line(self._ipi(ipi), self.cpu())

    def ipi_mux_unmask(self, ipi: int) -> None:
        """Unmask an IPI of this CPU; one that was sent meanwhile is taken now, once."""
        self.unmask_line(self._ipi(ipi), self.cpu())

    def bits(self, cpu: int) -> int:
        """Return a CPU's ``bits``: the IPIs that were sent and not taken."""
        return self.read("irr", self.one_cpu(cpu)) & self._all()

    def enable(self, cpu: int) -> int:
        """Return a CPU's ``enable``: the IPIs that are not masked."""
        return self.read("enable", self.one_cpu(cpu)) & self._all()

    # ---- the software interrupt -----------------------------------------------------

    def sbi_send_ipi(self, hart_mask: int, hart_mask_base: int = 0) -> int:
        """Make the SBI call send_ipi; return its error: 0 or a negative number.

        Raises the software interrupt of hart ``hart_mask_base + n`` for each bit n of
        ``hart_mask``; -1 as the base means all harts. ``SBI_ERR_INVALID_PARAM`` if one
        of them does not exist, and nothing is sent; no hart at all is ``SBI_SUCCESS``.
        With no IPI sent the interrupt is counted (row SSI) and nothing else. Raises
        ``ValueError`` for a mask of more than 64 bits.
        """
        hart_mask = operator.index(hart_mask)
        base = operator.index(hart_mask_base) & _ALL_HARTS
        if hart_mask < 0 or hart_mask >> _XLEN:
            raise ValueError(f"a hart mask has {_XLEN} bits: {hart_mask:#x}")
        if base == _ALL_HARTS:
            harts = list(range(self.ncpus))
        else:
            harts = [base + n for n in CpuMask.from_bits(hart_mask)]
        if harts and harts[-1] >= self.ncpus:
            return SBI_ERR_INVALID_PARAM
        self.machine.irq_raise(_SOFTWARE, harts, len(harts))
        return SBI_SUCCESS

    def clint_send_ipi(self, cpu: int) -> None:
        """Store 1 to a hart's ``msip``. ``IrqError`` EINVAL when it does not exist."""
        self.machine.irq_raise(_SOFTWARE, [self.one_cpu(cpu)], 1)

    def msip(self, cpu: int) -> int:
        """Return 1 while a hart's software interrupt is pending (``msip``), else 0.

        A hart that has interrupts disabled has it pending until they are on again. It
        is not pending for IPIs that are masked.
        """
        word = self.machine.slot(self.one_cpu(cpu)).word
        return int(bool(word & _core.W_PENDING))

    # ---- arch/riscv/kernel/smp.c ----------------------------------------------------

    def smp_send_reschedule(self, cpu: int) -> None:
        """Send IPI_RESCHEDULE, whatever the CPU does: never elided."""
        self.ipi_mux_send_mask(_RESCHEDULE, [cpu])

    def arch_send_call_function_single_ipi(self, cpu: int) -> None:
        """Send IPI_CALL_FUNC to one CPU: it runs what its queue holds."""
        self.ipi_mux_send_mask(_CALL_FUNC, [cpu])

    def arch_send_call_function_ipi_mask(self, mask: MaskLike) -> None:
        """Send IPI_CALL_FUNC to each CPU of ``mask``."""
        self.ipi_mux_send_mask(_CALL_FUNC, mask)

    # ---- arguments ------------------------------------------------------------------

    def _all(self) -> int:
        return (1 << self.nr_ipi) - 1

    def _ipi(self, ipi: Any) -> int:
        number = operator.index(ipi)
        if not 0 <= number < self.nr_ipi:
            raise self.invalid(f"no IPI {number}: the mux has 0 to {self.nr_ipi - 1}")
        return number
