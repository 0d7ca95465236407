"""XIVE, the interrupt controller of POWER9 and later, with powerpc's muxed IPIs.

XIVE has interrupt sources. Each has an event state buffer (ESB) of two bits and a page
or two of registers that change them; what a source notifies goes to the event queue of
a CPU, in memory, and interrupts it if it is more favoured than the CPU's own priority
(CPPR):

=====  =======  =====================  ==============================================
P Q    state    a trigger              an EOI
=====  =======  =====================  ==============================================
0 0    RESET    notifies: PENDING      nothing
1 0    PENDING  is kept: QUEUED        RESET
1 1    QUEUED   is absorbed            notifies again: PENDING
0 1    OFF      is lost                nothing
=====  =======  =====================  ==============================================

A CPU has one source for its IPIs, and powerpc's messages are behind it (see
``powerpc_smp``). The others are free for IPI domains: lines from 8, a source of each
CPU apiece. The kernel masks such an irq lazily, so what comes meanwhile is kept and
taken once when it is unmasked, where a source that was turned OFF loses it; masking the
IPI does nothing. All have one priority, 7: none is taken while another is being
handled, and one whose handler is Python's is, until that has returned. Doorbells know
no priority.

``cluster.chip`` for a CPU's view of it: ``chip.xive_cpu(1).ipi_data.esb_state``.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from enum import IntEnum
from typing import Any, ClassVar, Final

from shmipi import _core
from shmipi.errors import ClusterStateError
from shmipi.irq.chips import chain
from shmipi.irq.chips.base import Line, Row
from shmipi.irq.chips.powerpc_smp import (
    DOORBELL_LINE,
    PPC_MSG_CALL_FUNCTION,
    PPC_MSG_NMI_IPI,
    PPC_MSG_RESCHEDULE,
    PPC_MSG_RM_HOST_ACTION,
    PPC_MSG_TICK_BROADCAST,
    PowerpcSmp,
    SmpOps,
)

__all__ = ["EsbState", "Xive", "XiveCpu", "XiveIrqData", "XiveQueue"]

#: The line of a CPU's IPI: a trigger of it, whatever messages there are.
IPI_LINE = 5
#: Lines below are messages, the IPI and the doorbell.
FIRST_SOURCE_LINE = 8
NLINES = 28

XIVE_PRIORITY = 7
CPPR_ALL = 0xFF
CPPR_NONE = 0x00

# The ESB page (asm/xive-regs.h): each is where a range begins that means the same. GET
# and the SETs return what P and Q were: XIVE_ESB_VAL_P | XIVE_ESB_VAL_Q.
XIVE_ESB_STORE_EOI = 0x400
XIVE_ESB_LOAD_EOI = 0x000
XIVE_ESB_GET = 0x800
XIVE_ESB_SET_PQ_00 = 0xC00
XIVE_ESB_SET_PQ_01 = 0xD00
XIVE_ESB_SET_PQ_10 = 0xE00
XIVE_ESB_SET_PQ_11 = 0xF00
#: Added to a load's offset: it is ordered after the stores before it. All are, here.
XIVE_ESB_LD_ST_MO = 0x40
XIVE_ESB_VAL_P = 0x2
XIVE_ESB_VAL_Q = 0x1

_ESB_BYTES = 0x1000

# How the core keeps it: P, Q and N (notified, in the queue) of each source, and the
# doorbell in the last bit of irr[0]; a byte for the turn of each source behind it.
_SOURCES = 21
_ALL = (1 << _SOURCES) - 1
_TURNS = 128
_HELD = 0xFF
_EQ_ENTRIES = 64
_EQ_GENERATION = 1 << 31


class EsbState(IntEnum):
    """The states of a source: XIVE_ESB_VAL_P | XIVE_ESB_VAL_Q."""

    RESET = 0b00
    OFF = 0b01
    PENDING = 0b10
    QUEUED = 0b11


class TriggerPage:
    """The page of a source that triggers it."""

    def __init__(self, chip: Xive, cpu: int, line: int) -> None:
        self._chip, self._cpu, self._line = chip, cpu, line

    def write(self, value: int = 0, offset: int = 0) -> None:
        """Store 8 bytes (out_be64): whatever they are and wherever, it is a trigger."""
        self._chip.raise_line(self._line, self._cpu)


class EsbPage(TriggerPage):
    """The page of a source that changes P and Q."""

    def read(self, offset: int) -> int:
        """Load 8 bytes (in_be64): what it does depends on the offset's range.

        From 0 (XIVE_ESB_LOAD_EOI) on: an EOI; 1 if it notified again. From 0x800
        (XIVE_ESB_GET) on: what P and Q are. From 0xc00 on (XIVE_ESB_SET_PQ_*, 0x100
        each): what they were, before they are set. Raises ``IrqError`` (EINVAL) for an
        offset that is not in the page, or no multiple of 8.
        """
        return self._access("load", offset, False)

    def write(self, value: int = 0, offset: int = XIVE_ESB_STORE_EOI) -> None:
        """Store 8 bytes (out_be64), whatever they are, likewise.

        From 0 on: a trigger. From 0x400 (XIVE_ESB_STORE_EOI) on: an EOI. From 0xc00 on:
        P and Q are set. ``IrqError`` (EINVAL) as ``read``, and from 0x800 on, where a
        store is undefined.
        """
        self._access("store", offset, True)

    def _access(self, what: str, offset: int, store: bool) -> int:
        undefined = store and XIVE_ESB_GET <= offset < XIVE_ESB_SET_PQ_00
        if not 0 <= offset < _ESB_BYTES or offset % 8 or undefined:
            raise self._chip.invalid(
                f"an ESB page has no {what} of 8 bytes at offset {offset:#x}"
            )
        return self._chip.machine.esb_access(self._cpu, self._line, offset, store)


class XiveIrqData:
    """``struct xive_irq_data``: a source, as software reaches it.

    ``trig_mmio`` is its trigger page, ``eoi_mmio`` its ESB page, ``hw_irq`` its number:
    its line here.
    """

    def __init__(self, chip: Xive, cpu: int, line: int) -> None:
        self.hw_irq = line
        self.target = cpu
        self.trig_mmio = TriggerPage(chip, cpu, line)
        self.eoi_mmio = EsbPage(chip, cpu, line)

    @property
    def esb_state(self) -> EsbState:
        """The state of P and Q now."""
        return EsbState(self.eoi_mmio.read(XIVE_ESB_GET))


class XiveQueue:
    """``struct xive_q``: the event queue of a CPU, a ring of 64 words.

    An entry is written when a source notifies, and read first in, first out. That of a
    masked source stays at the end until it is unmasked, where the kernel takes it out
    and triggers the source again.
    """

    msk = _EQ_ENTRIES - 1

    def __init__(self, chip: Xive, cpu: int) -> None:
        self._chip, self._cpu = chip, cpu

    @property
    def idx(self) -> int:
        """The entry to be read next."""
        return self._chip.read("eq_at", self._cpu) & self.msk

    @property
    def toggle(self) -> int:
        """The generation of entries that are old: it flips when ``idx`` wraps."""
        return self._chip.read("eq_at", self._cpu) // _EQ_ENTRIES % 2

    @property
    def qpage(self) -> list[int]:
        """The 64 entries: generation << 31 | line."""
        entries = [self._chip.read("eq", self._cpu, i) for i in range(_EQ_ENTRIES)]
        # The core writes what has notified since when the CPU looks.
        put = self._chip.read("eq_put", self._cpu)
        for at, line in enumerate(self._chip.xive_cpu(self._cpu).notified, put):
            generation = 0 if at // _EQ_ENTRIES % 2 else _EQ_GENERATION
            entries[at % _EQ_ENTRIES] = generation | line
        return entries

    @property
    def produced(self) -> int:
        """How many entries were written since the CPU came up, modulo 2**32."""
        notified = self._chip.read("irr", self._cpu) >> 2 * _SOURCES & _ALL
        return self._chip.read("eq_put", self._cpu) + notified.bit_count() & 0xFFFFFFFF


class XiveCpu:
    """``struct xive_cpu``: what a CPU has of the controller."""

    def __init__(self, chip: Xive, cpu: int) -> None:
        self._chip, self._cpu = chip, cpu
        self.hw_ipi = IPI_LINE
        self.ipi_data = XiveIrqData(chip, cpu, IPI_LINE)
        self.queue = XiveQueue(chip, cpu)

    @property
    def cppr(self) -> int:
        """The current processor priority: 0xff lets all through, 0 none.

        Reading tells that of an interrupt that is being handled as well (7). It is
        written by the CPU itself, 0 to 255, else ``ClusterStateError``: interrupts of a
        number that is not lower stay in the queue, and what a higher value lets through
        is taken at once.
        """
        chip, cpu = self._chip, self._cpu
        serving = chip.read("iar", cpu)
        own = CPPR_ALL - (chip.read("threshold", cpu) & 0xFF)
        return min(own, serving) if serving else own

    @cppr.setter
    def cppr(self, value: int) -> None:
        if not 0 <= value <= CPPR_ALL:
            raise self._chip.invalid(f"CPPR is a byte, not {value}")
        if self._chip.cpu() != self._cpu:
            raise ClusterStateError(
                f"the CPPR of CPU {self._cpu} is its own to write: call() it there"
            )
        self._chip.machine.irq_threshold(CPPR_ALL - value)

    @property
    def notified(self) -> list[int]:
        """Lines whose notification the CPU has not looked at yet, or that is held.

        In the order in which they came, those that are held for a mask last.
        """
        chip, cpu = self._chip, self._cpu
        words = [chip.read("irr", cpu, i) for i in range(1, 4)]
        turns = b"".join(word.to_bytes(8, sys.byteorder) for word in words)
        notified = chip.read("irr", cpu) >> 2 * _SOURCES & _ALL
        given = turns[_SOURCES]  # by now; the next one's place

        def order(source: int) -> int:
            turn = turns[source]
            if turn in (0, _HELD):
                return _TURNS if turn else -_TURNS
            return (turn - 1 - given + _TURNS // 2) % _TURNS

        sources = [source for source in range(_SOURCES) if notified >> source & 1]
        return [_line_of(source) for source in sorted(sources, key=order)]

    @property
    def messages(self) -> list[int]:
        """The messages that are stored and not taken: PPC_MSG_*."""
        word = self._chip.read("messages", self._cpu)
        return [n for n in range(8) if word >> 8 * n & 0xFF]

    @property
    def doorbell(self) -> bool:
        """Has the doorbell rung, and not been taken?"""
        return bool(self._chip.read("irr", self._cpu) >> 63)


# ---- for explain: arch/powerpc/kernel/smp.c, arch/powerpc/sysdev/xive/common.c -------

#: arch_send_call_function_ipi_mask() does this for each CPU of the mask.
_PPC_PASS: Final = (
    chain.at(
        "ipi_send_cpu",
        "          do_message_pass({cpu}, {line})",
        "            smp_muxed_ipi_message_pass({cpu}, {line})",
    ),
    chain.at("chip_message", "              smp_muxed_ipi_set_message({cpu}, {line})"),
    chain.at(
        "chip_trigger",
        "              smp_ops->cause_ipi({cpu})",
        "                xive_cause_ipi({cpu})",
    ),
)
_PPC_DEMUX: Final = (
    # By the one IPI that a CPU has, or by the core doorbell: the way in for siblings.
    chain.at("line_ack", "xive_muxed_ipi_action(irq, dev_id)", when="=5"),
    chain.at("line_ack", "doorbell_exception(regs)", when="=6"),
    chain.at(
        "chip_demux", "  smp_ipi_demux()", "    smp_ipi_demux_relaxed()", when="first"
    ),
)
_PPC_EOI: Final = chain.at("chip_eoi", "xive_do_source_eoi(xd)")

_POWERPC: Final = chain.of(
    call=(
        chain.at("call_ipi", *chain.SEND_ONE),
        chain.at("ipi_send_cpumask", *chain.SEND_MASK),
        *_PPC_PASS,
        *_PPC_DEMUX,
        chain.at("call_interrupt", "      generic_smp_call_function_interrupt()"),
        _PPC_EOI,
    ),
    resched=(
        *_PPC_PASS,
        *_PPC_DEMUX,
        chain.at("scheduler_ipi", "      scheduler_ipi()"),
        _PPC_EOI,
    ),
    nmi=(
        chain.at(
            "nmi_send",
            "smp_send_nmi_ipi({cpu}, fn, delay_us)",
            "  do_smp_send_nmi_ipi({cpu}, safe)",
            "    smp_ops->cause_nmi_ipi({cpu})",
        ),
        chain.at("nmi_entry", "system_reset_exception(regs)"),
        chain.at("nmi_handler", "  smp_handle_nmi_ipi(regs)"),
    ),
)


class Xive(PowerpcSmp):
    """XIVE, native or under a hypervisor, with one IPI a CPU.

    ``Xive(threads_per_core=4)``: CPUs 0 to 3, 4 to 7 and so on are threads of a core,
    and reach each other by doorbells. ``Xive(nmi_ipi=False)``: without CONFIG_NMI_IPI.
    """

    name = "xive"
    stops_by = "nmi"
    description = "powerpc XIVE: one IPI a CPU with messages behind it, core doorbells"
    flow = "esb"
    decrementer = True
    chains = _POWERPC
    hardware: ClassVar = {
        "line_set": "the source of CPU {cpu} notifies",
        "ipi_entry": "external interrupt, vector 0x500",
        "line_ack": "{line} found in the messages",
        "line_ack=5": "source of the IPI taken from the event queue",
        "line_ack=6": "core doorbell",
        "line_eoi": "{line} handled",
    }
    at_most = 2.0
    rows = (
        Row("IPI", "XIVE-IPI, messages by the interrupt controller"),
        Row("DBL", "Doorbell interrupts"),
        Row("CAL", "ipi call function"),
        Row("RES", "ipi reschedule"),
        Row("TBI", "ipi tick-broadcast"),
        Row("NIP", "nmi ipi (maskable)"),
        Row("RMH", "Host actions"),
        Row("SPU", "Spurious interrupts", "irq_spurious"),
        Row("NMI", "System Reset interrupts, and NIP", "nmi"),
    )

    def lines(self, ncpus: int) -> Iterable[Line]:
        """Return the messages, the IPI, the doorbell, the sources for IPI domains."""
        yield Line(PPC_MSG_CALL_FUNCTION, "PPC_MSG_CALL_FUNCTION", "call", "CAL")
        yield Line(PPC_MSG_RESCHEDULE, "PPC_MSG_RESCHEDULE", "reschedule", "RES")
        yield Line(PPC_MSG_TICK_BROADCAST, "PPC_MSG_TICK_BROADCAST", "timer", "TBI")
        if self.nmi_ipi:
            yield Line(PPC_MSG_NMI_IPI, "PPC_MSG_NMI_IPI", "nmi", "NIP")
        yield Line(PPC_MSG_RM_HOST_ACTION, "PPC_MSG_RM_HOST_ACTION", "count", "RMH")
        yield Line(IPI_LINE, "XIVE-IPI", "count", "IPI")
        yield Line(DOORBELL_LINE, "doorbell", "count", "DBL")
        for line in range(FIRST_SOURCE_LINE, NLINES):
            yield Line(line, f"source {line}", "irq")

    def describe(self, ncpus: int) -> dict[str, Any]:
        """As every chip's; NMIs are system resets, not the message of that name."""
        return {**super().describe(ncpus), "nmi": None}

    def prepare(self, machine: _core.Machine) -> None:
        """Set the IPI of each CPU up (xive_smp_prepare_cpu)."""
        chip = self.bind(machine)
        for cpu in range(machine.ncpus):
            chip.xive_request_ipi(cpu)

    # ---- sending --------------------------------------------------------------------

    @property
    def smp_ops(self) -> SmpOps:
        """As pSeries_smp_probe: doorbells for siblings where there are any."""
        threads = self.siblings > 1
        return SmpOps(
            message_pass=None,
            cause_ipi=self.dbell_or_ic_cause_ipi if threads else self.xive_cause_ipi,
            cause_nmi_ipi=self.pseries_cause_nmi_ipi,
        )

    def xive_cause_ipi(self, cpu: int) -> None:
        """Trigger the IPI of ``cpu``: write 0 to its ESB's trigger page."""
        self.xive_cpu(cpu).ipi_data.trig_mmio.write(0)

    def dbell_or_ic_cause_ipi(self, cpu: int) -> None:
        """Ring a sibling's doorbell, and trigger the IPI of any other CPU."""
        if not self.doorbell_try_core_ipi(cpu):
            self.xive_cause_ipi(cpu)

    # ---- the hardware ---------------------------------------------------------------

    def xive_cpu(self, cpu: int | None = None) -> XiveCpu:
        """Return what ``cpu`` (default: this one) has of the controller."""
        return XiveCpu(self, self.cpu() if cpu is None else self._exists(cpu))

    def irq_data(self, line: int, cpu: int) -> XiveIrqData:
        """Return the source of ``line`` at ``cpu``: the IPI's, 5, or 8 to 27."""
        if line != IPI_LINE and not FIRST_SOURCE_LINE <= line < NLINES:
            raise self.invalid(
                f"line {line} has no source: {IPI_LINE} has, and"
                f" {FIRST_SOURCE_LINE} to {NLINES - 1}"
            )
        return XiveIrqData(self, self._exists(cpu), line)

    def xive_request_ipi(self, cpu: int) -> int:
        """Let the IPI of ``cpu`` be handled by xive_muxed_ipi_action; 0.

        That is the core's, as a CPU's handler of its first source; what is left is to
        unmask the source. Done for each CPU before it comes up, and again by hand it
        undoes ``xive_cleanup_cpu_ipi``; else it does nothing.
        """
        data = self.xive_cpu(cpu).ipi_data
        if data.esb_state is EsbState.OFF:
            data.eoi_mmio.read(XIVE_ESB_SET_PQ_00)
        return 0

    def xive_cleanup_cpu_ipi(self, cpu: int) -> None:
        """Mask the source of a CPU's IPI: what is sent to it from now on is lost."""
        self.xive_cpu(cpu).ipi_data.eoi_mmio.read(XIVE_ESB_SET_PQ_01)

    def xive_muxed_ipi_action(self, irq: int = IPI_LINE, dev_id: object = None) -> int:
        """What handles the IPI of this CPU: ``smp_ipi_demux``. IRQ_HANDLED."""
        return self.smp_ipi_demux()

    def interrupt_asserted(self, cpu: int | None = None) -> bool:
        """Does the controller, or a doorbell, ask for a CPU (default: this one)?"""
        cpu = self.cpu() if cpu is None else self._exists(cpu)
        irr = self.read("irr", cpu)
        if irr >> 63:
            return True
        enabled = self.read("enable", cpu) >> FIRST_SOURCE_LINE - 1 & _ALL | 1
        queued = self.read("eq_put", cpu) != self.read("eq_at", cpu)
        waiting = queued or bool(irr >> 2 * _SOURCES & enabled)
        return waiting and self.xive_cpu(cpu).cppr > XIVE_PRIORITY

    def pending_lines(self, cpu: int) -> list[int]:
        """Return the lines that are pending at a CPU, least first.

        Messages that are stored; sources with P that are not being handled, and those
        with Q, being handled or not.
        """
        irr, serving = self.read("irr", cpu), self.in_service(cpu)
        pending, queued = irr & _ALL, irr >> _SOURCES & irr & _ALL
        lines = {line for line in _lines(pending) if line not in serving}
        lines.update(self.xive_cpu(cpu).messages, _lines(queued))
        if irr >> 63:
            lines.add(DOORBELL_LINE)
        return sorted(lines)


def _lines(sources: int) -> list[int]:
    return [_line_of(source) for source in range(_SOURCES) if sources >> source & 1]


def _line_of(source: int) -> int:
    return IPI_LINE if source == 0 else source + FIRST_SOURCE_LINE - 1
