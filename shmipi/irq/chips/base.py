"""What an interrupt controller is: the base class of every chip.

A chip is a description and an interface. The description says which lines the
controller has, what each is for, in which of the core's flows they are taken and ended,
and how they are counted; it is written into the machine when it boots, and from then on
the core acts on it without Python. The interface is what the hardware lets software do:
methods under the hardware's own names, on a chip that is bound to a machine
(``cluster.chip`` in the host, ``shmipi.irq.chip()`` on a CPU).

The flows, and what a line number is in each:

==========  ============================================================================
vector      vectors by priority class, in service until EOI (local APIC)
mailbox     action bits, read and cleared all at once, least first (MIPS mailbox)
mux         the same, with a doorbell for each bit that goes from 0 to 1 (ipi-mux)
sgi         by priority, active until deactivated (Arm GIC)
shared      interrupts of the machine, each routed to one CPU (MIPS GIC)
esb         0 to 4: messages behind source 5; 6: doorbell; 8 to 27: sources (XIVE)
==========  ============================================================================
"""

from __future__ import annotations

import copy
import errno
import functools
import operator
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self, TypeVar

from shmipi import _core
from shmipi.cpumask import CpuMask, MaskLike
from shmipi.errors import ClusterStateError, ControllerError, IrqError
from shmipi.irq.chips.chain import Chain

__all__ = ["Chip", "Line", "Row"]

_Chip = TypeVar("_Chip", bound="Chip")

_USES = {
    "none": _core.USE_NONE,
    "reschedule": _core.USE_RESCHEDULE,
    "call": _core.USE_CALL,
    "call_single": _core.USE_CALL_SINGLE,
    "nmi": _core.USE_NMI,
    "irq": _core.USE_IRQ,
    "count": _core.USE_COUNT,
    "irq_work": _core.USE_IRQ_WORK,
    "timer": _core.USE_TIMER,
    "stop": _core.USE_STOP,
    "icache": _core.USE_ICACHE,
}
#: What the core's layout has room for.
_NAME_MAX = 15
_LABEL_MAX = 7
#: Numbers below are a matter of the flow.
_ROOM = 256


@dataclass(frozen=True)
class Line:
    """A line of a controller: its number, its name in the kernel, what it is for.

    ``use`` is one of reschedule, call (function calls to several CPUs), call_single,
    nmi (stands in for an NMI where there is none), irq (free for IPI domains), irq_work
    (what a CPU sends itself for ``smp.irq_work_queue``) and count (counted when it
    arrives, nothing else). ``row`` is the label of the row of
    ``/proc/interrupts`` that counts it, or None.
    """

    number: int
    name: str
    use: str
    row: str | None = None


@dataclass(frozen=True)
class Row:
    """A row of ``/proc/interrupts``: its label (at most 7 characters) and its words.

    ``counter`` names a counter of the core to show; None: lines counted in this row.
    """

    label: str
    text: str
    counter: str | None = None


class Chip:
    """An interrupt controller. Derive from it for one of your own.

    A class says what it is with the class attributes below and ``lines()``; then
    ``Cluster(controller=YourChip)`` boots with it, or with ``YourChip(...)`` where it
    has options. ``name``, ``flow``, and a line each for calls and for reschedule is all
    that there has to be: see ``scripts/own_controller.py`` for a whole example.

    What the core makes of the description:

    - The *flow* decides how a line becomes pending, which is taken next, and when it
      may come again (see the module). Limits: ``_core.FLOW_LINES``, 256 lines
      as a rule.
    - The *use* of a line decides what taking it means. Those of use "irq" are what IPI
      domains give out; they start masked, the others do not.
    - *Rows* are counted when a line is taken. A call that needs no interrupt because
      its target polls takes no line, and is in no row of the chip's.

    Further methods are the chip's registers. In them ``self.machine`` is the machine
    (the chip is copied for it, with all its attributes); ``raise_line``, ``read`` and
    the other methods of "the interface" are what they are made of. A chip travels to
    the CPUs by pickle: keep it small and without open files.
    """

    #: What ``Cluster(controller=...)`` calls it (at most 15 characters).
    name: ClassVar[str]
    #: One line for people.
    description: ClassVar[str] = ""
    #: Which of the core's flows takes and ends its lines.
    flow: ClassVar[str]
    #: What the core does for an IPI of a domain in ``raise_line``'s place, the same
    #: but quicker: a register write for each of "cpus", or for each of "groups". With
    #: "" it calls that. A class that has a ``raise_line`` is "" unless it says more.
    core_raises: ClassVar[str] = "cpus"
    #: The most CPUs that it can address.
    max_cpus: int = 4096
    #: The rows of ``/proc/interrupts``, in order.
    rows: Sequence[Row] = ()
    #: CPUs that one register write can reach: aligned groups of so many; 0: any.
    group: int = 1
    #: All CPUs but the sender are one register write.
    shorthand: bool = False
    #: Secondary CPUs wait for a STARTUP IPI when they come up.
    startup: bool = False
    #: Of a system IPI's lines, CPU n has the n-th from the number given.
    per_cpu: bool = False
    #: Lines stay pending for each sending CPU apart.
    banked: bool = False
    #: How ``smp_send_stop`` stops other CPUs (``shmipi.users.stop``): by a "call" that
    #: is not waited for, its "line" of use stop, that and an NMI ("line_nmi"), "nmi".
    stops_by: ClassVar[str] = "call"
    #: What its irq domain is called; None: as the controller.
    domain_name: ClassVar[str | None] = None
    #: Each CPU has its own table of the lines for IPI domains, so that one line may be
    #: given to several irqs, each for other CPUs.
    vectors: bool = False
    #: CPUs of a core, which ring each other's doorbells.
    siblings: int = 1
    #: Without a line of use "irq_work" a CPU sets its timer to 1 for it, as powerpc
    #: does; else such work waits for the tick.
    decrementer: bool = False
    #: The kernel functions that a call passes, for ``shmipi explain`` (see ``chain``).
    chains: ClassVar[Mapping[str, Chain]] = {}
    #: What the controller does at a tracepoint, by the tracepoint's name.
    hardware: ClassVar[Mapping[str, str]] = {}
    #: For ``shmipi bench controllers``: a native call to a polling target takes at most
    #: so many times what it takes by the fastest controller. One with more state of its
    #: own (a message behind a source, a bank for each sender) may take more.
    at_most: ClassVar[float] = 1.3

    _machine: _core.Machine | None = None

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        if "raise_line" in vars(cls) and "core_raises" not in vars(cls):
            cls.core_raises = ""

    def __repr__(self) -> str:
        where = "" if self._machine is None else f" of Cluster {self._machine.name!r}"
        about = self.description or f"controller {getattr(self, 'name', '?')!r}"
        return f"<{type(self).__name__}{where}: {about}>"

    # ---- the description ------------------------------------------------------------

    def lines(self, ncpus: int) -> Iterable[Line]:
        """Return the lines of a machine of ``ncpus`` CPUs.

        There must be one of use "call" and one of "reschedule"; without one of
        "call_single", the line of "call" serves for both. With none of use "nmi" the
        controller has real NMIs, which nothing masks. With ``per_cpu`` a system IPI has
        one line for each CPU, in a row.
        """
        raise NotImplementedError

    def check(self, ncpus: int) -> None:
        """Raise ``ControllerError`` EINVAL if it cannot address so many CPUs."""
        if ncpus > self.max_cpus:
            raise self.too_many(
                self.max_cpus,
                f"controller {self.name} can address {self.max_cpus} CPUs, not {ncpus}",
            )

    def too_many(self, limit: int, message: str) -> ControllerError:
        """Return the error of a machine with more than ``limit`` CPUs."""
        return ControllerError(message, cpu=limit, domain=self.name)

    def for_cpus(self, ncpus: int) -> Self:
        """Return the chip as a machine of ``ncpus`` CPUs gets it, or as ``check``."""
        self.check(ncpus)
        return self

    def describe(self, ncpus: int) -> dict[str, Any]:
        """Return what the core is told: the argument ``chip`` of format_segment.

        Raises ``ValueError`` for a description that cannot be.
        """
        lines = list(self.lines(ncpus))
        labels = self._check_description()
        most = _core.FLOW_LINES[self.flow]
        use = bytearray(_core.NLINES)
        row = bytearray([0xFF]) * _core.NLINES
        first: dict[str, int] = {}
        for line in lines:
            if not 0 <= line.number < max(most, _ROOM):
                raise ValueError(f"{self.name}: no line {line.number} ({line.name})")
            if line.use not in _USES:
                raise ValueError(f"{self.name}: {line.name}: no use {line.use!r}")
            if use[line.number]:
                raise ValueError(f"{self.name}: line {line.number} is there twice")
            use[line.number] = _USES[line.use]
            if line.row is not None:
                if line.row not in labels:
                    raise ValueError(
                        f"{self.name}: {line.name}: no row {line.row!r} in its rows"
                    )
                row[line.number] = labels.index(line.row)
            first.setdefault(line.use, line.number)
        if "call" not in first or "reschedule" not in first:
            raise ValueError(f"{self.name} has no line of use call or of reschedule")
        if self.per_cpu:
            for kind in ("call", "call_single", "reschedule", "nmi"):
                start = first.get(kind, 0)
                block = use[start : start + ncpus]
                if kind in first and block != bytes([_USES[kind]]) * ncpus:
                    raise ValueError(
                        f"{self.name}: per_cpu, but there are no {ncpus} lines of use"
                        f" {kind} in a row"
                    )
        nlines = max(line.number for line in lines) + 1
        if nlines > most:
            raise ValueError(f"{self.name}: flow {self.flow} has lines 0 to {most - 1}")
        return {
            "name": self.name,
            "flow": _core.FLOWS.index(self.flow),
            "nlines": nlines,
            "call_single": first.get("call_single", first["call"]),
            "call": first["call"],
            "reschedule": first["reschedule"],
            "nmi": first.get("nmi"),
            "per_cpu": int(self.per_cpu),
            "group": self.group,
            "shorthand": int(self.shorthand),
            "startup": int(self.startup),
            "banked": int(self.banked),
            "siblings": self.siblings,
            "decrementer": int(self.decrementer),
            "use": bytes(use),
            "row": bytes(row),
            "rows": [
                (
                    row.label,
                    row.text,
                    _core.NO_LINE
                    if row.counter is None
                    else _core.COUNTERS.index(row.counter),
                )
                for row in self.rows
            ],
        }

    def _check_description(self) -> list[str]:
        """Return the labels of its rows. ``ValueError`` for what the core can not."""
        for what in ("name", "flow"):
            if not isinstance(getattr(self, what, None), str):
                raise ValueError(f"{type(self).__name__} has no {what}: a string")
        if not 0 < len(self.name.encode()) <= _NAME_MAX:
            raise ValueError(f"{self.name!r}: a name has 1 to {_NAME_MAX} characters")
        if self.flow not in _core.FLOWS:
            raise ValueError(
                f"{self.name}: no flow {self.flow!r}; there are"
                f" {', '.join(_core.FLOWS)}"
            )
        if self.banked and self.flow not in _core.BANKED_FLOWS:
            can = ", ".join(_core.BANKED_FLOWS)
            raise ValueError(f"{self.name}: only flow {can} can be banked")
        if len(self.rows) > _core.NROWS:
            raise ValueError(f"{self.name}: {_core.NROWS} rows are the most")
        labels = [row.label for row in self.rows]
        for row in self.rows:
            if not 0 < len(row.label.encode()) <= _LABEL_MAX:
                raise ValueError(
                    f"{self.name}: row {row.label!r}: a label has 1 to {_LABEL_MAX}"
                    " characters"
                )
            if labels.count(row.label) > 1:
                raise ValueError(f"{self.name}: row {row.label!r} is there twice")
            if row.counter is not None and row.counter not in _core.COUNTERS:
                raise ValueError(
                    f"{self.name}: row {row.label}: no counter {row.counter!r}"
                )
        return labels

    def irq_lines(self, ncpus: int) -> Sequence[int]:
        """Return the lines of use "irq", in the order in which to take them."""
        return [line.number for line in self.lines(ncpus) if line.use == "irq"]

    def ipi_lines(self, ncpus: int) -> Sequence[int]:
        """Return those of them that IPI domains take, the others being for devices.

        Here all, for either.
        """
        return self.irq_lines(ncpus)

    def is_routed(self, line: int) -> bool:
        """Is it the machine's, and interrupts the one CPU that it is routed to?"""
        return self.flow in _core.ROUTED_FLOWS

    def prepare(self, machine: _core.Machine) -> None:
        """Set the controller up before the first CPU is made: routes, for example."""

    def bring_up(self, cpu: int) -> None:
        """Start a secondary CPU that waits for it; called until it is online."""

    # ---- the interface --------------------------------------------------------------

    def bind(self, machine: _core.Machine) -> Self:
        """Return this chip as the controller of ``machine``."""
        bound = copy.copy(self)
        bound._machine = machine
        return bound

    def as_a(self, kind: type[_Chip]) -> _Chip:
        """Return it as a ``kind``, a class of chips, for its registers and its type.

        Raises ``ControllerError`` when the machine has another controller.
        """
        if not isinstance(self, kind):
            raise ControllerError(
                f"the machine's controller is {self.name}, no {kind.__name__}",
                domain=self.name,
            )
        return self

    @property
    def machine(self) -> _core.Machine:
        """The machine that it is bound to; ``ClusterStateError`` for none."""
        if self._machine is None:
            raise ClusterStateError(
                f"this {self.name} is no machine's: use cluster.chip, or"
                " shmipi.irq.chip() on a CPU"
            )
        return self._machine

    @property
    def ncpus(self) -> int:
        """How many CPUs the machine has."""
        return self.machine.ncpus

    def cpu(self) -> int:
        """Return the number of this CPU; ``ClusterStateError`` in the host."""
        if not self.machine.is_cpu:
            raise ClusterStateError("the host is no CPU: this register is a CPU's own")
        return self.machine.id

    def line(self, name: str) -> Line:
        """Return a line by its name. ``KeyError``."""
        for line in self.lines(self.ncpus):
            if line.name == name:
                return line
        raise KeyError(f"controller {self.name} has no line {name}")

    def is_online(self, cpu: int) -> bool:
        """Is the CPU there and online?"""
        if not 0 <= cpu < self.ncpus:
            return False
        state = self.machine.slot(cpu).state
        return state not in (_core.OFFLINE, _core.CPU_DEAD)

    def cpus(self, mask: MaskLike | int) -> CpuMask:
        """Return CPUs as a mask. ``IrqError`` EINVAL for one that does not exist.

        ``ValueError`` and ``TypeError`` for what is no CPU mask.
        """
        cpus = self._named(mask)
        last = cpus.last
        if last is not None and last >= self.ncpus:
            raise IrqError(
                f"{self.name}: no CPU {last}: this machine has CPUs 0 to"
                f" {self.ncpus - 1}",
                cpu=last,
                errno=errno.EINVAL,
                domain=self.name,
            )
        return cpus

    def one_cpu(self, cpu: int) -> int:
        """Return the number of a CPU. ``IrqError`` EINVAL when it does not exist."""
        return next(iter(self.cpus([cpu])))

    def raise_line(
        self, line: int, cpus: MaskLike | int, writes: int | None = None
    ) -> None:
        """Make ``line`` pending at each of ``cpus``; those that do not exist ignore it.

        Never elided: what is polled is the pending line. ``writes`` is how many
        register writes it took, for the counters (default: one for each CPU).
        ``IrqError`` EINVAL for a line that the controller does not have.
        """
        targets = [cpu for cpu in self._named(cpus) if cpu < self.ncpus]
        self.machine.irq_raise(
            self._line(line), targets, len(targets) if writes is None else writes
        )

    def mask_line(self, line: int, cpu: int) -> None:
        """Let ``line`` of a CPU stay pending when it comes, until it is unmasked."""
        self.machine.irq_enable_line(self.one_cpu(cpu), self._line(line), False)

    def unmask_line(self, line: int, cpu: int) -> None:
        """Undo ``mask_line``; a line that is pending is taken now, once."""
        self.machine.irq_enable_line(self.one_cpu(cpu), self._line(line), True)

    def clear_line(self, line: int, cpu: int) -> None:
        """Take a line back that is pending at a CPU; one that was taken goes on."""
        self.machine.irq_clear(self.one_cpu(cpu), self._line(line))

    def route_line(self, line: int, cpu: int | None) -> None:
        """Let ``line`` interrupt ``cpu`` from now on; None: nobody.

        Does nothing on a controller whose lines are each CPU's own.
        """

    def read(self, register: str, cpu: int = 0, index: int = 0) -> int:
        """Read a word of a CPU's part of the controller, by the core's name for it."""
        return self.machine.pic_read(cpu, register, index)

    def pending_lines(self, cpu: int) -> list[int]:
        """Return the lines that are pending at a CPU, least first."""
        return self._bits("irr", cpu)

    def in_service(self, cpu: int) -> list[int]:
        """Return the lines that a CPU has taken and not ended, least first."""
        return self._bits("isr", cpu)

    def _bits(self, register: str, cpu: int) -> list[int]:
        words = [self.read(register, cpu, i) for i in range(_core.NLINES // 64)]
        return [
            64 * i + bit
            for i, word in enumerate(words)
            for bit in range(64)
            if word >> bit & 1
        ]

    def send_nmi(self, cpus: MaskLike | int, reason: int = 0) -> None:
        """Send an NMI to each of ``cpus``; CPUs that are offline do not take it.

        On a chip without NMIs a maskable line stands in for it. ``reason`` is why, if
        it is no CPU's own: NMI_REASON_SERR, NMI_REASON_IOCHK of ``shmipi.smp``, or
        both, as of port 0x61. Each stands until a CPU that takes an NMI, and whose
        handlers of NMI_LOCAL have handled nothing, has asked the handlers that are for
        it. ``IrqError`` EINVAL for a CPU that does not exist, ``ValueError`` for a
        reason that is none.
        """
        targets = self.cpus(cpus)
        if reason:
            self.machine.nmi_reason(reason)
        for cpu in targets:
            if self.is_online(cpu):
                self.machine.nmi_send(cpu)

    def invalid(self, message: str, *, irq: int | None = None) -> IrqError:
        """Return an ``IrqError`` with EINVAL that names this chip."""
        return IrqError(
            f"{self.name}: {message}", errno=errno.EINVAL, irq=irq, domain=self.name
        )

    def _line(self, line: int) -> int:
        number = operator.index(line)
        if not 0 <= number < self._nlines:
            raise self.invalid(
                f"there is no line {number}: they are 0 to {self._nlines - 1}"
            )
        return number

    @functools.cached_property
    def _nlines(self) -> int:
        return 1 + max(line.number for line in self.lines(self.ncpus))

    def _named(self, cpus: MaskLike | int) -> CpuMask:
        return CpuMask.of_any([cpus] if isinstance(cpus, int) else cpus, self.ncpus)
