"""The IPI unit of LoongArch processors: a word of action bits for each core.

Each core has it among its IOCSRs (arch/loongarch/include/asm/loongarch.h):

=============  ===========  ============================================================
IPI_STATUS     0x1000       the actions that were sent and not taken yet; read only
IPI_EN         0x1004       the bits that interrupt, while STATUS & EN is not 0
IPI_SET        0x1008       writing ones sets these bits of the own STATUS
IPI_CLEAR      0x100c       writing ones clears them
MBUF0 to 3     0x1020 ...   four mailboxes of 64 bits, for data that goes with an action
IPI_SEND       0x1040       sends an action to a core: its number in bits 4 to 0, the
                            core in bits 25 to 16, bit 31: return when it is there
MBUF_SEND      0x1048       64 bits: bits 63 to 32 go into the half of a mailbox that
                            bits 4 to 2 name, of the core in bits 25 to 16
=============  ===========  ============================================================

The core that is interrupted reads STATUS, clears what it has read, and then acts on
each bit: reschedule, function calls, irq_work, clear vector (loongson_ipi_interrupt in
arch/loongarch/kernel/smp.c); the same action sent twice before it is taken is taken
once. SMP_BOOT_CPU is none of these: it starts a core that waits for it, with the
address in its mailbox 0, and a core that runs ignores it.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable
from typing import ClassVar, Final, NamedTuple, Protocol

from shmipi import _core
from shmipi.cpumask import MaskLike
from shmipi.irq.chips import chain
from shmipi.irq.chips.base import Chip, Line, Row

__all__ = [
    "ACTION_BOOT_CPU",
    "ACTION_CALL_FUNCTION",
    "ACTION_CLEAR_VECTOR",
    "ACTION_IRQ_WORK",
    "ACTION_RESCHEDULE",
    "SMP_BOOT_CPU",
    "SMP_CALL_FUNCTION",
    "SMP_CLEAR_VECTOR",
    "SMP_IRQ_WORK",
    "SMP_RESCHEDULE",
    "Loongarch",
    "SmpOps",
]

# arch/loongarch/include/asm/smp.h
ACTION_BOOT_CPU: Final = 0
ACTION_RESCHEDULE: Final = 1
ACTION_CALL_FUNCTION: Final = 2
ACTION_IRQ_WORK: Final = 3
#: An interrupt has moved to another core, and its old vector here is free (AVEC).
ACTION_CLEAR_VECTOR: Final = 4
SMP_BOOT_CPU: Final = 1 << ACTION_BOOT_CPU
SMP_RESCHEDULE: Final = 1 << ACTION_RESCHEDULE
SMP_CALL_FUNCTION: Final = 1 << ACTION_CALL_FUNCTION
SMP_IRQ_WORK: Final = 1 << ACTION_IRQ_WORK
SMP_CLEAR_VECTOR: Final = 1 << ACTION_CLEAR_VECTOR

# arch/loongarch/include/asm/loongarch.h
LOONGARCH_IOCSR_IPI_STATUS: Final = 0x1000
LOONGARCH_IOCSR_IPI_EN: Final = 0x1004
LOONGARCH_IOCSR_IPI_SET: Final = 0x1008
LOONGARCH_IOCSR_IPI_CLEAR: Final = 0x100C
LOONGARCH_IOCSR_MBUF0: Final = 0x1020
LOONGARCH_IOCSR_IPI_SEND: Final = 0x1040
IOCSR_IPI_SEND_CPU_SHIFT: Final = 16
IOCSR_IPI_SEND_BLOCKING: Final = 1 << 31
LOONGARCH_IOCSR_MBUF_SEND: Final = 0x1048
IOCSR_MBUF_SEND_BLOCKING: Final = 1 << 31
IOCSR_MBUF_SEND_BOX_SHIFT: Final = 2
IOCSR_MBUF_SEND_CPU_SHIFT: Final = 16
IOCSR_MBUF_SEND_BUF_SHIFT: Final = 32

_MBUFS: Final = range(LOONGARCH_IOCSR_MBUF0, LOONGARCH_IOCSR_MBUF0 + 32, 8)
_CORES: Final = 0x3FF
_WORD: Final = 0xFFFF_FFFF
#: Where a secondary core begins: the kernel's smpboot_entry, wherever that is linked.
_SMPBOOT_ENTRY: Final = 0x9000_0000_0020_0000
_BACKTRACE: Final = 5
_FIRST_FREE: Final = 6
_FIRST_UNKNOWN: Final = 24


# ---- for explain: arch/loongarch/kernel/smp.c ----------------------------------------

_ENTRY: Final = chain.at(
    "ipi_entry", "loongson_ipi_interrupt(irq, dev)", "  ipi_read_clear({cpu})"
)
_LOONGARCH: Final = chain.of(
    call=(
        chain.at(
            "call_ipi",
            *chain.SEND_ONE,
            "          mp_ops.send_ipi_single({cpu}, ACTION_CALL_FUNCTION)",
        ),
        chain.at(
            "ipi_send_cpumask",
            *chain.SEND_MASK,
            "        mp_ops.send_ipi_mask(mask, ACTION_CALL_FUNCTION)",
            "          loongson_send_ipi_mask(mask, ACTION_CALL_FUNCTION)",
        ),
        chain.at(
            "ipi_send_cpu",
            "            loongson_send_ipi_single({cpu}, ACTION_CALL_FUNCTION)",
            "              ipi_write_action({cpu}, ACTION_CALL_FUNCTION)",
            when="one",
        ),
        chain.at(
            "ipi_send_cpu",
            "            ipi_write_action({cpu}, ACTION_CALL_FUNCTION)",
            when="mask",
        ),
        _ENTRY,
        chain.at("call_interrupt", "  generic_smp_call_function_interrupt()"),
    ),
    resched=(
        chain.at(
            "ipi_send_cpu",
            "  arch_smp_send_reschedule({cpu})",
            "    mp_ops.send_ipi_single({cpu}, ACTION_RESCHEDULE)",
            "      loongson_send_ipi_single({cpu}, ACTION_RESCHEDULE)",
            "        ipi_write_action({cpu}, ACTION_RESCHEDULE)",
        ),
        _ENTRY,
        chain.at("scheduler_ipi", "  scheduler_ipi()"),
    ),
    nmi=(
        chain.at(
            "nmi_send",
            "nmi_trigger_cpumask_backtrace(mask, exclude_cpu, raise)",
            "  raise_backtrace(mask)",
        ),
        chain.at("nmi_handler", "handle_backtrace(info)"),
    ),
)


class _SendSingle(Protocol):
    def __call__(self, cpu: int, action: int) -> None: ...


class _SendMask(Protocol):
    def __call__(self, mask: MaskLike, action: int) -> None: ...


class SmpOps(NamedTuple):
    """``struct smp_ops``: ``action`` is a number, ACTION_*, and no mask of bits."""

    send_ipi_single: _SendSingle
    send_ipi_mask: _SendMask


class Loongarch(Chip):
    """The IPI unit of Loongson's LoongArch processors: 32 action bits a core.

    Bits 0 to 4 are the kernel's actions. Bit 5 is not: LoongArch has no NMI that a core
    could send, and its kernel asks for a backtrace by an ordinary function call, so
    that a core with interrupts disabled does not answer. Here that call has a bit of
    its own, masked like any other. Bits 6 to 23 are for IPI domains: EN has them off
    until somebody requests them. Bits 24 to 31 are nobody's, and are reported when one
    arrives (row ERR, counter ``irq_other``), where the kernel drops them silently.

    A secondary core waits for SMP_BOOT_CPU when it comes up, as x86's do for STARTUP.
    """

    name = "loongarch"
    description = "LoongArch IPI unit: a word of action bits a core, four mailboxes"
    flow = "mailbox"
    max_cpus = _CORES + 1
    startup = True
    chains = _LOONGARCH
    hardware: ClassVar = {
        "line_set": "IPI_SEND written: {line} in IPI_STATUS of CPU {cpu}",
        "line_ack": "{line} read from IPI_STATUS, and cleared",
        "line_eoi": "{line} handled",
    }
    rows = (
        Row("IPI0", "Rescheduling interrupts"),
        Row("IPI1", "Function call interrupts"),
        Row("IPI2", "IRQ work interrupts"),
        Row("IPI3", "Clear vector interrupts"),
        Row("NMI", "Backtrace interrupts (maskable)", "nmi"),
        Row("ERR", "Unknown actions"),
    )

    # ---- the description ------------------------------------------------------------

    def lines(self, ncpus: int) -> Iterable[Line]:
        """Return a line for each bit of STATUS."""
        yield Line(ACTION_BOOT_CPU, "SMP_BOOT_CPU", "count")
        yield Line(ACTION_RESCHEDULE, "SMP_RESCHEDULE", "reschedule", "IPI0")
        yield Line(ACTION_CALL_FUNCTION, "SMP_CALL_FUNCTION", "call", "IPI1")
        yield Line(ACTION_IRQ_WORK, "SMP_IRQ_WORK", "irq_work", "IPI2")
        yield Line(ACTION_CLEAR_VECTOR, "SMP_CLEAR_VECTOR", "count", "IPI3")
        yield Line(_BACKTRACE, "backtrace (not an action of the kernel)", "nmi")
        for bit in range(_FIRST_FREE, _FIRST_UNKNOWN):
            yield Line(bit, f"action {bit}", "irq")
        for bit in range(_FIRST_UNKNOWN, 32):
            yield Line(bit, f"action {bit}", "none", "ERR")

    def bring_up(self, cpu: int) -> None:
        """Start a core that waits for it (loongson_boot_secondary)."""
        if self.read("startup", cpu) != _core.STARTUP_WAITING:
            return
        self.csr_mail_send(_SMPBOOT_ENTRY, cpu, 0)
        self.mp_ops.send_ipi_single(cpu, ACTION_BOOT_CPU)

    # ---- the registers --------------------------------------------------------------

    def iocsr_read32(self, register: int, cpu: int | None = None) -> int:
        """Read IPI_STATUS, IPI_EN, or half a mailbox (``LOONGARCH_IOCSR_*``).

        Of this core; ``cpu=`` looks at another one's, as a debugger would. ``IrqError``
        EINVAL for a register that is not there or not to be read, or no such CPU;
        ``ClusterStateError`` in the host without ``cpu``.
        """
        of = self._of(cpu)
        if register == LOONGARCH_IOCSR_IPI_STATUS:
            return self.read("irr", of) & _WORD
        if register == LOONGARCH_IOCSR_IPI_EN:
            return self.read("enable", of) & _WORD
        if register & ~4 in _MBUFS:
            at = register - LOONGARCH_IOCSR_MBUF0
            values = [self.read("priority", of, at + n) for n in range(4)]
            return int.from_bytes(values, "little")
        raise self.invalid(f"there is no IOCSR {register:#x} of 32 bits to be read")

    def iocsr_read64(self, register: int, cpu: int | None = None) -> int:
        """Read a mailbox, MBUF0 to MBUF3; else as ``iocsr_read32``."""
        if register not in _MBUFS:
            raise self.invalid(f"there is no IOCSR {register:#x} of 64 bits to be read")
        low = self.iocsr_read32(register, cpu)
        return low | self.iocsr_read32(register + 4, cpu) << 32

    def iocsr_write32(self, value: int, register: int, cpu: int | None = None) -> None:
        """Write IPI_SEND, IPI_EN, IPI_SET, IPI_CLEAR or half a mailbox.

        IPI_SEND is anybody's, also the host's; of the others ``cpu`` is whose
        (default: this core's). A core that does not exist is sent nothing. ``IrqError``
        EINVAL for another register, a value that is not of 32 bits, reserved bits.
        """
        value = self._value(value, 32)
        if register == LOONGARCH_IOCSR_IPI_SEND:
            self._send(value)
            return
        of = self._of(cpu)
        if register == LOONGARCH_IOCSR_IPI_SET:
            self.machine.irq_mailbox(of, value)
        elif register == LOONGARCH_IOCSR_IPI_CLEAR:
            for bit in _bits(value):
                self.clear_line(bit, of)
        elif register == LOONGARCH_IOCSR_IPI_EN:
            for bit in _bits(value ^ self.iocsr_read32(register, of)):
                self.machine.irq_enable_line(of, bit, bool(value >> bit & 1))
        elif register & ~4 in _MBUFS:
            self._mail(of, register - LOONGARCH_IOCSR_MBUF0, value)
        else:
            raise self.invalid(
                f"there is no IOCSR {register:#x} of 32 bits to be written"
            )

    def iocsr_write64(self, value: int, register: int, cpu: int | None = None) -> None:
        """Write MBUF_SEND, or a mailbox (``cpu``: whose); else as ``iocsr_write32``."""
        value = self._value(value, 64)
        if register == LOONGARCH_IOCSR_MBUF_SEND:
            to = value >> IOCSR_MBUF_SEND_CPU_SHIFT & _CORES
            box = value >> IOCSR_MBUF_SEND_BOX_SHIFT & 7
            if value & 0x7C00_FFE3:
                raise self.invalid(f"MBUF_SEND {value:#x} has reserved bits")
            if to < self.ncpus:
                self._mail(to, 4 * box, value >> IOCSR_MBUF_SEND_BUF_SHIFT)
        elif register in _MBUFS:
            self.iocsr_write32(value & _WORD, register, cpu)
            self.iocsr_write32(value >> 32, register + 4, cpu)
        else:
            raise self.invalid(
                f"there is no IOCSR {register:#x} of 64 bits to be written"
            )

    def _send(self, value: int) -> None:
        to = value >> IOCSR_IPI_SEND_CPU_SHIFT & _CORES
        action = value & 0x1F
        if value & 0x7C00_FFE0:
            raise self.invalid(f"IPI_SEND {value:#x} has reserved bits")
        if to >= self.ncpus:
            return
        # A core that waits for it takes it as a reset; any other one as an action.
        if action == ACTION_BOOT_CPU and self.machine.startup_ipi(to, 0):
            self.machine.irq_raise(action, [], 1)  # counts the write
        else:
            self.machine.irq_raise(action, [to], 1)

    def _mail(self, cpu: int, at: int, half: int) -> None:
        # Four bytes each; the core has them for the priorities of other flows' lines.
        for n, byte in enumerate(half.to_bytes(4, "little")):
            self.machine.pic_write(cpu, "priority", at + n, byte)

    # ---- arch/loongarch/kernel/smp.c ------------------------------------------------

    def csr_mail_send(self, data: int, cpu: int, mailbox: int) -> None:
        """Send 64 bits to a mailbox of a core: the high half, then the low one."""
        for half in (1, 0):
            value = IOCSR_MBUF_SEND_BLOCKING
            value |= (2 * mailbox + half) << IOCSR_MBUF_SEND_BOX_SHIFT
            value |= self.one_cpu(cpu) << IOCSR_MBUF_SEND_CPU_SHIFT
            value |= (data >> 32 * half & _WORD) << IOCSR_MBUF_SEND_BUF_SHIFT
            self.iocsr_write64(value, LOONGARCH_IOCSR_MBUF_SEND)

    @property
    def mp_ops(self) -> SmpOps:
        """Sends by one write of IPI_SEND for each target.

        ``action`` is ACTION_BOOT_CPU to ACTION_CLEAR_VECTOR. Both raise ``IrqError``
        EINVAL for another one and for a CPU that does not exist; nothing was sent then.
        """
        return SmpOps(
            lambda cpu, action: self._send_ipi_mask([cpu], action), self._send_ipi_mask
        )

    def _send_ipi_mask(self, mask: MaskLike, action: int) -> None:
        action = operator.index(action)
        if not ACTION_BOOT_CPU <= action <= ACTION_CLEAR_VECTOR:
            raise self.invalid(
                f"there is no action {action}: they are ACTION_*, 0 to 4"
            )
        for cpu in self.cpus(mask):
            self.iocsr_write32(
                IOCSR_IPI_SEND_BLOCKING | cpu << IOCSR_IPI_SEND_CPU_SHIFT | action,
                LOONGARCH_IOCSR_IPI_SEND,
            )

    def arch_smp_send_reschedule(self, cpu: int) -> None:
        """Send ACTION_RESCHEDULE, whatever the CPU does: never elided."""
        self.mp_ops.send_ipi_single(cpu, ACTION_RESCHEDULE)

    def arch_send_call_function_single_ipi(self, cpu: int) -> None:
        """Send ACTION_CALL_FUNCTION to one CPU: it runs what its queue holds."""
        self.mp_ops.send_ipi_single(cpu, ACTION_CALL_FUNCTION)

    def arch_send_call_function_ipi_mask(self, mask: MaskLike) -> None:
        """Send ACTION_CALL_FUNCTION to each CPU of ``mask``."""
        self.mp_ops.send_ipi_mask(mask, ACTION_CALL_FUNCTION)

    def arch_irq_work_raise(self) -> None:
        """Send ACTION_IRQ_WORK to this CPU, which runs its irq_work."""
        self.mp_ops.send_ipi_single(self.cpu(), ACTION_IRQ_WORK)

    # ---- arguments ------------------------------------------------------------------

    def _of(self, cpu: int | None) -> int:
        return self.cpu() if cpu is None else self.one_cpu(cpu)

    def _value(self, value: int, bits: int) -> int:
        value = operator.index(value)
        if not 0 <= value < 1 << bits:
            raise self.invalid(f"a register has {bits} bits, {value:#x} does not fit")
        return value


def _bits(value: int) -> list[int]:
    return [bit for bit in range(value.bit_length()) if value >> bit & 1]
