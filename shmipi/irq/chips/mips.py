"""The mailbox of MIPS multiprocessors: a word of action bits for each CPU.

Each CPU has one (Loongson-3: four registers of 32 bits at its IPI block; Octeon:
CIU_MBOX_SET and CIU_MBOX_CLR), with four registers:

========  ==============================================================================
SET       writing ones sets these bits of STATUS
CLEAR     writing ones clears them
STATUS    the actions that were sent and not taken yet; read only
EN        the bits that interrupt: the CPU is interrupted while STATUS & EN is not 0
========  ==============================================================================

The CPU that is interrupted reads STATUS, clears all that it has read, and then acts on
each bit, the least first (arch/mips/kernel/smp.c, loongson64/smp.c,
cavium-octeon/smp.c). So the same action sent twice before it is taken is taken once,
and what is sent while it acts is taken afterwards. What is sent while a CPU has
interrupts disabled, or the bit cleared in EN, stays in STATUS and is taken on enable.
"""

from __future__ import annotations

import operator
import warnings
from collections.abc import Iterable
from typing import ClassVar, Final, NamedTuple, Protocol

from shmipi.cpumask import MaskLike
from shmipi.errors import IrqError, ShmipiWarning
from shmipi.irq.chips import chain
from shmipi.irq.chips.base import Chip, Line, Row

__all__ = [
    "SMP_CALL_FUNCTION",
    "SMP_DUMP",
    "SMP_ICACHE_FLUSH",
    "SMP_IPI_TIMER",
    "SMP_RESCHEDULE_YOURSELF",
    "Mailbox",
    "Mips",
    "MipsSmp",
    "PlatSmpOps",
]

#: Look at the run queue again (arch/mips/include/asm/smp.h, as are all of these).
SMP_RESCHEDULE_YOURSELF = 0x1
#: Run the functions that are on the call_single_queue.
SMP_CALL_FUNCTION = 0x2
#: Octeon: flush the instruction cache.
SMP_ICACHE_FLUSH = 0x4
#: kexec: save the registers for the crash dump, and stop.
SMP_DUMP = 0x8
#: Timer broadcast, in trees that have it. It is no bit of its own: a mailbox ORs, so
#: 0xC arrives as SMP_ICACHE_FLUSH and SMP_DUMP, and nobody can tell it from them.
SMP_IPI_TIMER = 0xC

_ACTIONS = SMP_RESCHEDULE_YOURSELF | SMP_CALL_FUNCTION | SMP_ICACHE_FLUSH | SMP_DUMP
_WORD = 0xFFFF_FFFF
_FIRST_FREE_BIT = 5
_FIRST_UNKNOWN_BIT = 24


class _SendSingle(Protocol):
    def __call__(self, cpu: int, action: int) -> None: ...


class _SendMask(Protocol):
    def __call__(self, mask: MaskLike, action: int) -> None: ...


class PlatSmpOps(NamedTuple):
    """``struct plat_smp_ops``: how a platform sends its IPIs.

    ``send_ipi_single(cpu, action)`` sends to one CPU, ``send_ipi_mask(mask, action)``
    to each of a set; what ``action`` may be is the platform's.
    """

    send_ipi_single: _SendSingle
    send_ipi_mask: _SendMask


class MipsSmp(Chip):
    """What arch/mips/include/asm/smp.h makes of ``mp_ops``, on whatever sends."""

    @property
    def mp_ops(self) -> PlatSmpOps:
        """The platform's operations (``struct plat_smp_ops *mp_ops``)."""
        raise NotImplementedError

    def smp_send_reschedule(self, cpu: int) -> None:
        """Send SMP_RESCHEDULE_YOURSELF, whatever the CPU does: never elided."""
        self.mp_ops.send_ipi_single(cpu, SMP_RESCHEDULE_YOURSELF)

    def arch_send_call_function_single_ipi(self, cpu: int) -> None:
        """Send SMP_CALL_FUNCTION to one CPU: it runs what its queue holds."""
        self.mp_ops.send_ipi_mask([cpu], SMP_CALL_FUNCTION)

    def arch_send_call_function_ipi_mask(self, mask: MaskLike) -> None:
        """Send SMP_CALL_FUNCTION to each CPU of ``mask``."""
        self.mp_ops.send_ipi_mask(mask, SMP_CALL_FUNCTION)

    def bug(self, action: int, why: str) -> IrqError:
        """Return EINVAL for an action where the kernel has BUG()."""
        return self.invalid(f"action {action:#x}: {why}")


class Mailbox:
    """The registers of one CPU's mailbox: ``SET``, ``CLEAR``, ``STATUS``, ``EN``.

    Each is 32 bits; writing anything else is an ``IrqError`` with EINVAL. SET and CLEAR
    read as STATUS, as those of Octeon do. A bit that nobody defined is taken like any
    other and then reported (row ERR, counter ``irq_other``).
    """

    def __init__(self, chip: Mips, cpu: int) -> None:
        self._chip = chip
        self._cpu = cpu

    def _value(self, value: int) -> int:
        value = operator.index(value)
        if not 0 <= value <= _WORD:
            raise self._chip.invalid(f"a register has 32 bits, {value:#x} does not fit")
        return value

    @property
    def STATUS(self) -> int:
        """The actions that were sent and not taken yet."""
        return self._chip.read("irr", self._cpu) & _WORD

    @property
    def SET(self) -> int:
        """Write: make these bits pending, in one store."""
        return self.STATUS

    @SET.setter
    def SET(self, value: int) -> None:
        self._chip.machine.irq_mailbox(self._cpu, self._value(value))

    @property
    def CLEAR(self) -> int:
        """Write: take these bits back, as far as they have not been read yet."""
        return self.STATUS

    @CLEAR.setter
    def CLEAR(self, value: int) -> None:
        value = self._value(value)
        for bit in range(value.bit_length()):
            if value >> bit & 1:
                self._chip.clear_line(bit, self._cpu)

    @property
    def EN(self) -> int:
        """The bits that interrupt. What is pending and becomes enabled is taken."""
        return self._chip.read("enable", self._cpu) & _WORD

    @EN.setter
    def EN(self, value: int) -> None:
        value = self._value(value)
        changed = value ^ self.EN
        for bit in range(changed.bit_length()):
            if changed >> bit & 1:
                self._chip.machine.irq_enable_line(
                    self._cpu, bit, bool(value >> bit & 1)
                )

    def __repr__(self) -> str:
        return f"Mailbox(cpu={self._cpu}, STATUS={self.STATUS:#x}, EN={self.EN:#x})"


# ---- for explain: arch/mips/include/asm/smp.h, cavium-octeon/smp.c -------------------

MIPS_SEND: Final = (
    chain.at(
        "call_ipi",
        *chain.SEND_ONE,
        "          mp_ops->send_ipi_mask(&cpumask_of_cpu({cpu}), SMP_CALL_FUNCTION)",
    ),
    chain.at(
        "ipi_send_cpumask",
        *chain.SEND_MASK,
        "        mp_ops->send_ipi_mask(mask, SMP_CALL_FUNCTION)",
    ),
)
MIPS_RESCHED: Final = "  mp_ops->send_ipi_single({cpu}, SMP_RESCHEDULE_YOURSELF)"
MIPS_NMI: Final = (
    chain.at(
        "nmi_send",
        "nmi_trigger_cpumask_backtrace(mask, exclude_cpu, raise)",
        "  raise_backtrace(mask)",
    ),
    chain.at("nmi_handler", "handle_backtrace(info)"),
)

_MIPS: Final = chain.of(
    call=(
        *MIPS_SEND,
        chain.at("ipi_send_cpu", "            octeon_send_ipi_single({cpu}, {line})"),
        chain.at("ipi_entry", "mailbox_interrupt(irq, dev_id)"),
        chain.at("call_interrupt", "  generic_smp_call_function_interrupt()"),
    ),
    resched=(
        chain.at("ipi_send_cpu", MIPS_RESCHED),
        chain.at("ipi_entry", "mailbox_interrupt(irq, dev_id)"),
        chain.at("scheduler_ipi", "  scheduler_ipi()"),
    ),
    nmi=MIPS_NMI,
)


class Mips(MipsSmp):
    """A mailbox for each CPU: Loongson-3, Cavium Octeon.

    Bits 0 to 3 are the kernel's actions. Bit 4 is not: MIPS has no NMI that a CPU could
    send, and its kernel's ``raise_backtrace`` asks for a backtrace by an ordinary
    function call, so that a CPU with interrupts disabled does not answer. Here that
    call has a bit of its own, so that it is not counted among the function calls; it is
    masked like any other, and ``mp_ops`` does not know it. Bits 5 to 23 are for IPI
    domains: EN has them off until somebody requests them. Bits 24 to 31 are nobody's.
    """

    name = "mips"
    description = "MIPS mailbox (Loongson-3, Octeon): a word of action bits a CPU"
    flow = "mailbox"
    chains = _MIPS
    hardware: ClassVar = {
        "line_set": "mailbox{cpu}: action {line} written",
        "line_ack": "mailbox{cpu} read and cleared: action {line}",
        "line_eoi": "action {line} handled",
    }
    rows = (
        Row("RES", "Rescheduling interrupts"),
        Row("CAL", "Function call interrupts"),
        Row("ICF", "Icache flush interrupts"),
        Row("DMP", "Dump interrupts"),
        Row("NMI", "Backtrace interrupts (maskable)", "nmi"),
        Row("ERR", "Unknown actions"),
    )

    _timer_warned: ClassVar[bool] = False

    def lines(self, ncpus: int) -> Iterable[Line]:
        """Return a line for each bit of the mailbox."""
        yield Line(0, "SMP_RESCHEDULE_YOURSELF", "reschedule", "RES")
        yield Line(1, "SMP_CALL_FUNCTION", "call", "CAL")
        yield Line(2, "SMP_ICACHE_FLUSH", "icache", "ICF")
        yield Line(3, "SMP_DUMP", "count", "DMP")
        yield Line(4, "backtrace (not an action of the kernel)", "nmi")
        for bit in range(_FIRST_FREE_BIT, _FIRST_UNKNOWN_BIT):
            yield Line(bit, f"action {1 << bit:#x}", "irq")
        for bit in range(_FIRST_UNKNOWN_BIT, 32):
            yield Line(bit, f"action {1 << bit:#x}", "none", "ERR")

    def mailbox(self, cpu: int) -> Mailbox:
        """Return a CPU's mailbox. ``IrqError`` EINVAL when there is no such CPU."""
        return Mailbox(self, self.one_cpu(cpu))

    @property
    def mp_ops(self) -> PlatSmpOps:
        """Sends by one store to SET of each target.

        An action is one of SMP_* or several of them ORed: one store, taken least bit
        first. Both raise ``IrqError`` with EINVAL, where the kernel has BUG() or does
        not compile, for 0 and for an action with any other bit, and for a CPU that does
        not exist; nothing was sent then. An empty mask sends nothing. A CPU that is
        offline loses what it is sent.

        SMP_IPI_TIMER is taken as SMP_ICACHE_FLUSH and SMP_DUMP; its first use in a
        process gives a ``ShmipiWarning``.
        """
        return PlatSmpOps(self._send_ipi_single, self._send_ipi_mask)

    def _send_ipi_single(self, cpu: int, action: int) -> None:
        self._send_ipi_mask([cpu], action)

    def _send_ipi_mask(self, mask: MaskLike, action: int) -> None:
        action = operator.index(action)
        if not action or action & ~_ACTIONS:
            raise self.bug(action, f"known are the bits of {_ACTIONS:#x}")
        cpus = self.cpus(mask)
        if action == SMP_IPI_TIMER and not Mips._timer_warned:
            Mips._timer_warned = True
            warnings.warn(
                "SMP_IPI_TIMER 0xc has no bit of its own: it arrives as"
                " SMP_ICACHE_FLUSH 0x4 and SMP_DUMP 0x8",
                ShmipiWarning,
                stacklevel=3,
            )
        for cpu in cpus:
            self.machine.irq_mailbox(cpu, action)
