"""The irq tables of a machine in its shared memory: descriptors, domains, lines.

The host and every CPU see the same irqs. What is here reads and writes records, plain
values; ``irqdesc.py`` makes of them what users hold.

Changes are made under a lock that survives its holder. While several descriptors and
lines change together, ``undo`` names them: whoever takes the lock after a holder that
died frees what he was about to make, or to free.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import IntEnum, IntFlag
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from shmipi import _core
from shmipi.cpumask import CpuMask, MaskLike
from shmipi.errors import IrqError, LayoutError
from shmipi.irq.chips.base import Chip

__all__ = [
    "INVALID_HWIRQ",
    "IRQ_HANDLED",
    "IRQ_NONE",
    "IRQ_TYPE_EDGE_BOTH",
    "IRQ_TYPE_EDGE_FALLING",
    "IRQ_TYPE_EDGE_RISING",
    "IRQ_TYPE_LEVEL_HIGH",
    "IRQ_TYPE_LEVEL_LOW",
    "IRQ_TYPE_LEVEL_MASK",
    "IRQ_TYPE_NONE",
    "IRQ_TYPE_SENSE_MASK",
    "IRQ_WAKE_THREAD",
    "NR_IRQS",
    "DescRecord",
    "DomainRecord",
    "IrqDomainFlags",
    "IrqFlags",
    "IrqReturn",
    "IrqTable",
    "IrqType",
    "irq_name",
]

#: No hardware irq number: a CPU that an IPI does not reach.
INVALID_HWIRQ: Final = _core.NO_LINE
#: How many descriptors a machine has; virq 0 is none.
NR_IRQS: Final = _core.NR_IRQS


class IrqReturn(IntEnum):
    """What a handler returns (``linux/irqreturn.h``)."""

    IRQ_NONE = 0
    IRQ_HANDLED = 1
    IRQ_WAKE_THREAD = 2


class IrqType(IntFlag):
    """How a line is triggered (``linux/irq.h``)."""

    IRQ_TYPE_NONE = 0
    IRQ_TYPE_EDGE_RISING = 1
    IRQ_TYPE_EDGE_FALLING = 2
    IRQ_TYPE_EDGE_BOTH = 3
    IRQ_TYPE_LEVEL_HIGH = 4
    IRQ_TYPE_LEVEL_LOW = 8
    IRQ_TYPE_LEVEL_MASK = 12
    IRQ_TYPE_SENSE_MASK = 15


IRQ_NONE: Final = IrqReturn.IRQ_NONE
IRQ_HANDLED: Final = IrqReturn.IRQ_HANDLED
IRQ_WAKE_THREAD: Final = IrqReturn.IRQ_WAKE_THREAD
IRQ_TYPE_NONE: Final = IrqType.IRQ_TYPE_NONE
IRQ_TYPE_EDGE_RISING: Final = IrqType.IRQ_TYPE_EDGE_RISING
IRQ_TYPE_EDGE_FALLING: Final = IrqType.IRQ_TYPE_EDGE_FALLING
IRQ_TYPE_EDGE_BOTH: Final = IrqType.IRQ_TYPE_EDGE_BOTH
IRQ_TYPE_LEVEL_HIGH: Final = IrqType.IRQ_TYPE_LEVEL_HIGH
IRQ_TYPE_LEVEL_LOW: Final = IrqType.IRQ_TYPE_LEVEL_LOW
IRQ_TYPE_LEVEL_MASK: Final = IrqType.IRQ_TYPE_LEVEL_MASK
IRQ_TYPE_SENSE_MASK: Final = IrqType.IRQ_TYPE_SENSE_MASK


class IrqFlags(IntFlag):
    """What an irq is, with the kernel's values (``linux/irq.h``)."""

    IRQ_PER_CPU = 1 << 9
    IRQ_NOREQUEST = 1 << 11
    IRQ_NO_BALANCING = 1 << 13
    IRQ_PER_CPU_DEVID = 1 << 17
    #: Reserved for every CPU: masks need not be verified (``irqd_is_global_ipi`` of the
    #: proposal for IPI domains; the kernel's tree has no such bit).
    IRQD_GLOBAL_IPI = 1 << 31


class IrqDomainFlags(IntFlag):
    """What a domain is, with the kernel's values (``linux/irqdomain.h``)."""

    IRQ_DOMAIN_FLAG_HIERARCHY = 1 << 0
    IRQ_DOMAIN_FLAG_IPI_PER_CPU = 1 << 2
    IRQ_DOMAIN_FLAG_IPI_SINGLE = 1 << 3
    #: Ours: hwirqs for each CPU that need not be consecutive.
    IPI_CPUMAP = 1 << 16
    #: Ours: where an IPI comes from when no domain is named.
    DEFAULT = 1 << 17


@dataclass(frozen=True)
class DescRecord:
    """A descriptor's record, and the hwirqs of the block that it is part of.

    ``domain`` is the domain's place in the machine's list.
    """

    irq: int
    epoch: int
    flags: IrqFlags
    domain: int
    hwirq: int
    ipi_base: int
    ipi_nr: int
    ipi_offset: int
    name: str
    hwirqs: tuple[int, ...]


@dataclass(frozen=True)
class DomainRecord:
    """A domain's record; ``parent`` and ``coprocessor`` are -1 where there is none.

    ``own`` are the lines that only it gives out.
    """

    index: int
    name: str
    flags: IrqDomainFlags
    parent: int
    coprocessor: int
    own: frozenset[int]


def _dtype(fields: tuple[tuple[str, int, int], ...], size: int) -> np.dtype[Any]:
    formats = {2: "<u2", 4: "<u4"}
    return np.dtype(
        {
            "names": [name for name, _, _ in fields],
            "offsets": [offset for _, offset, _ in fields],
            "formats": [
                "S32" if name == "name" else formats.get(length, f"({length // 8},)<u8")
                for name, _, length in fields
            ],
            "itemsize": size,
        }
    )


_DESC: Final = _dtype(_core.IRQDESC_FIELDS, _core.IRQDESC_BYTES)
_DOMAIN: Final = _dtype(_core.IRQDOMAIN_FIELDS, _core.IRQDOMAIN_BYTES)


def irq_name(name: str) -> bytes:
    """Return a name as a descriptor holds it: its first 31 bytes.

    Raises ``TypeError`` if it is no string, ``ValueError`` for what would spoil a table
    that shows it (a line feed, for example).
    """
    if not isinstance(name, str):
        raise TypeError(f"an irq's name is a string, not {name!r}")
    if not name.isprintable():
        raise ValueError(f"an irq's name is printable characters, not {name!r}")
    return name.encode()[:31]


class IrqTable:
    """The irq descriptors and domains of a machine, as one process sees them."""

    def __init__(self, machine: _core.Machine, chip: Chip) -> None:
        self.machine = machine
        self.chip = chip
        memory = memoryview(machine)
        area = machine.irq_offset
        self._desc: NDArray[Any] = np.ndarray(
            (NR_IRQS,), _DESC, memory, area + _core.IRQDESC_OFFSET
        )
        self._domain: NDArray[Any] = np.ndarray(
            (_core.NDOMAINS,), _DOMAIN, memory, area + _core.IRQDOMAIN_OFFSET
        )
        self._line_virq: NDArray[np.uint32] = np.ndarray(
            (_core.NLINES,), np.uint32, memory, area + _core.LINE_VIRQ_OFFSET
        )
        self._affinity: NDArray[np.uint64] = np.ndarray(
            (NR_IRQS, -(-machine.ncpus // 64)),
            np.uint64,
            memory,
            machine.affinity_offset,
        )
        #: The core's sends of IPIs; False where that is not plainly right.
        self.send_single: Callable[[int, int], bool] = machine.ipi_send_single
        self.send_mask: Callable[[int, MaskLike, bool], bool] = machine.ipi_send_mask
        self.send_all: Callable[[int, bool], bool] = machine.ipi_send_all
        machine.ipi_sends(bool(chip.core_raises))
        #: Does it write once for each group of CPUs that share a line?
        self.by_groups = chip.core_raises == "groups"
        self._lines: tuple[int, ...] | None = None
        self._ipi_lines: tuple[int, ...] | None = None
        self._domains: dict[tuple[int, str, IrqDomainFlags], DomainRecord] = {}

    # ---- the lock -------------------------------------------------------------------

    def locked(self) -> _core.IrqLock:
        """Hold the tables' lock, for ``with``: see ``_core.IrqLock``.

        Whoever takes it from a dead holder, and a holder that fails, frees what
        ``undo`` names. ``ClusterStateError`` in an interrupt handler or with interrupts
        disabled (the kernel's ``might_sleep``), ``IpiTimeoutError`` when a live holder
        does not let go.
        """
        return self.machine.irq_lock()

    # ---- stores ---------------------------------------------------------------------

    def _store(self, what: str, index: int, value: Any) -> None:
        """Every change of the table in shared memory: one of these each."""
        machine = self.machine
        if what in ("undo", "line_virq", "route"):
            machine.pic_write(0, what, index, value)
        elif what == "reset":
            machine.irq_reset_line(index, value)
        elif what == "affinity":
            self._affinity[index] = _words(value, self._affinity.shape[1])
        elif what in ("used", "flags", "epoch", "next"):
            _core.atomic_store(self._desc[what], index, value)
        elif what == "domain_used":
            _core.atomic_store(self._domain["used"], index, value)
        elif what.startswith("domain_"):
            self._domain[what.removeprefix("domain_")][index] = value
        else:
            self._desc[what][index] = value

    # ---- lines ----------------------------------------------------------------------

    def cpus(self, mask: MaskLike) -> CpuMask:
        """Return a mask of this machine's CPUs ("all", "2-N"), or of others.

        That there are no such CPUs is for the irq's errno to say: who asks, checks.
        """
        return CpuMask.of_any(mask, self.machine.ncpus)

    def irq_lines(self) -> tuple[int, ...]:
        """Return the controller's lines for irqs, in the order to take them."""
        if self._lines is None:
            self._lines = tuple(self.chip.irq_lines(self.machine.ncpus))
        return self._lines

    def lines_for(self, ipi: bool) -> tuple[int, ...]:
        """Return those of them that IPI domains take, or that devices do."""
        if self._ipi_lines is None:
            self._ipi_lines = tuple(self.chip.ipi_lines(self.machine.ncpus))
        if ipi or self._ipi_lines == self.irq_lines():
            return self._ipi_lines
        reserved = frozenset(self._ipi_lines)
        return tuple(line for line in self.irq_lines() if line not in reserved)

    def owners(self, line: int) -> list[int]:
        """Return the irqs that have this line, each for other CPUs.

        More than one only where each CPU has a table of its own (``Chip.vectors``).
        """
        found: list[int] = []
        virq = int(self._line_virq[line])
        while 0 < virq < NR_IRQS and virq not in found:
            found.append(virq)
            virq = int(self._desc["next"][virq])
        return found

    def line_is_free(self, line: int, cpus: CpuMask | None = None) -> bool:
        """Does no irq have this line? ``cpus``: on these, for one that has no other.

        The rule of the matrix allocator: a vector is available on all target CPUs.
        """
        owners = self.owners(line)
        if not owners or cpus is None or not self.chip.vectors:
            return not owners
        return all(
            # A block has a line for each CPU: which of them it is, only it knows.
            self._desc["ipi_nr"][virq] == 1 and not self.affinity(virq) & cpus
            for virq in owners
        )

    def in_progress(self, cpus: CpuMask | None = None) -> frozenset[int]:
        """Return the lines that CPUs have taken, and whose handlers have not ended.

        Without handlers that wait for the interpreter: they look whose the line is.
        ``cpus``: these, where each CPU has a table of its own (``Chip.vectors``).
        """
        on = cpus if self.chip.vectors else None
        return frozenset(CpuMask.from_bits(self.machine.irq_in_progress(on)))

    # ---- descriptors ----------------------------------------------------------------

    def lookup(self, virq: int) -> DescRecord | None:
        """Return the record of ``virq``, or None when there is no such irq.

        ``LayoutError`` for one that is damaged.
        """
        if isinstance(virq, bool) or not isinstance(virq, int | np.integer):
            raise TypeError(f"a virq is an integer, not {virq!r}")
        virq = int(virq)
        if not 0 < virq < NR_IRQS:
            return None
        row = self._row(virq)
        if not row["used"] or not row["domain"]:
            return None
        base, count = row["ipi_base"], row["ipi_nr"]
        if not 0 < base <= virq < base + count <= NR_IRQS:
            raise LayoutError(f"the descriptor of irq {virq} is damaged: its block")
        return DescRecord(
            irq=virq,
            epoch=row["epoch"],
            flags=IrqFlags(row["flags"]),
            domain=row["domain"] - 1,
            hwirq=row["hwirq"],
            ipi_base=base,
            ipi_nr=count,
            ipi_offset=row["ipi_offset"],
            name=row["name"].decode("utf-8", "replace"),
            hwirqs=tuple(self._desc["hwirq"][base : base + count].tolist()),
        )

    def _row(self, virq: int) -> dict[str, Any]:
        values = self._desc[virq].tolist()
        return dict(zip(_DESC.names or (), values, strict=True))

    def is_current(self, virq: int, epoch: int) -> bool:
        """Is it still the reservation that had this epoch?"""
        record = self._desc[virq]
        return bool(record["used"]) and int(record["epoch"]) == epoch

    def affinity(self, virq: int) -> CpuMask:
        """Return the CPUs of a block."""
        bits = int.from_bytes(self._affinity[virq].tobytes(), "little")
        return CpuMask.from_bits(bits & ((1 << self.machine.ncpus) - 1))

    def action(self, virq: int) -> int:
        """Return 0 when nobody has requested it."""
        return int(self._desc["action"][virq])

    def virqs(self) -> list[int]:
        """Return the first virqs of all blocks there are."""
        used, base = self._desc["used"], self._desc["ipi_base"]
        return [v for v in range(1, NR_IRQS) if used[v] and base[v] == v]

    def virqs_of(self, domain: int) -> list[int]:
        """Return the first virqs of the blocks of the domain at that place."""
        return [v for v in self.virqs() if self._desc["domain"][v] == domain + 1]

    # ---- changing them; the lock is held --------------------------------------------

    def find_descs(self, count: int) -> int:
        """Return the first of ``count`` consecutive free virqs. -1: there are none."""
        run = 0
        for virq, used in enumerate(self._desc["used"].tolist()):
            run = 0 if used or not virq else run + 1
            if run == count:
                return virq - count + 1
        return -1

    def make(
        self,
        domain: int,
        first: int,
        offset: int,
        hwirqs: list[int],
        affinity: CpuMask,
        flags: IrqFlags,
        name: str = "",
    ) -> None:
        """Make a block of descriptors of ``domain`` from ``first`` on, with its lines.

        ``hwirqs[n]`` is CPU ``offset + n``'s (``INVALID_HWIRQ``: a gap), or the only
        one there is.
        """
        label = irq_name(name)  # refused before there is anything to undo
        count = len(hwirqs)
        self._store("undo", 0, first | count << 32)
        for place, hwirq in enumerate(hwirqs):
            virq = first + place
            self._store("action", virq, 0)
            self._store("next", virq, 0)
            self._store("flags", virq, int(flags))
            self._store("domain", virq, domain + 1)
            self._store("hwirq", virq, hwirq)
            self._store("ipi_base", virq, first)
            self._store("ipi_nr", virq, count)
            self._store("ipi_offset", virq, offset)
            self._store("name", virq, label)
            epoch = int(self._desc["epoch"][virq])
            self._store("epoch", virq, (epoch + 1) & 0xFFFFFFFF)
        self._store("affinity", first, affinity)
        if not self._domain["coproc"][domain]:
            self._give_lines(first, offset, hwirqs)
        for place in reversed(range(count)):
            self._store("used", first + place, 1)
        self._store("undo", 0, 0)

    def _give_lines(self, first: int, offset: int, hwirqs: list[int]) -> None:
        for place, line in enumerate(hwirqs):
            if line == INVALID_HWIRQ:
                continue
            self._store("reset", line, first)  # nothing that was sent before is for it
            if self.chip.is_routed(line):
                self._store("route", line, offset + place + 1)
            others = int(self._line_virq[line])
            if others:
                self._store("next", first, others)
            self._store("line_virq", line, first)

    def destroy(self, first: int, count: int) -> None:
        """Free a whole block: its descriptors and lines."""
        self._store("undo", 0, first | count << 32)
        self.machine.irq_free_undo()

    def shrink(self, first: int, gone: Mapping[int, int]) -> None:
        """Free the lines of some CPUs of a block; its virqs stay taken.

        ``gone``: the CPUs, each with its hwirq.
        """
        row = self._row(first)
        # The mask first: from here on nobody sends to these CPUs.
        self._store("affinity", first, self.affinity(first) - CpuMask(gone))
        self._store("flags", first, row["flags"] & ~int(IrqFlags.IRQD_GLOBAL_IPI))
        for cpu, line in gone.items():
            if line != INVALID_HWIRQ and self._line_virq[line] == first:
                self._take_line(line)
            self._store("hwirq", first + cpu - row["ipi_offset"], INVALID_HWIRQ)

    def _take_line(self, line: int) -> None:
        self._store("reset", line, int(self._line_virq[line]))
        if self.chip.is_routed(line):
            self._store("route", line, 0)
        self._store("line_virq", line, 0)

    # ---- domains --------------------------------------------------------------------

    def domain(self, index: int) -> DomainRecord | None:
        """Return the domain at a place of the machine's list, or None."""
        if not 0 <= index < _core.NDOMAINS:
            return None
        record = self._domain[index]
        if not record["used"]:
            return None
        name = bytes(record["name"]).decode("utf-8", "replace")
        key = (index, name, IrqDomainFlags(int(record["flags"])))
        found = self._domains.get(key)
        if found is None:
            found = self._domains[key] = DomainRecord(
                index,
                name,
                key[2],
                int(record["parent"]) - 1,
                int(record["coproc"]) - 1,
                _bits(record["lines"].tobytes()),
            )
        return found

    def domains(self) -> list[DomainRecord]:
        """Return all domains, the controller's root first."""
        found = (self.domain(index) for index in range(_core.NDOMAINS))
        return [domain for domain in found if domain is not None]

    def add_domain(
        self,
        name: str,
        flags: IrqDomainFlags,
        parent: int,
        coproc: int,
        lines: frozenset[int],
    ) -> DomainRecord:
        """Write a domain's record; the lock is held. ``IrqError`` ENOMEM."""
        free = np.flatnonzero(self._domain["used"] == 0)
        if not len(free):
            raise IrqError(
                f"a machine has at most {_core.NDOMAINS} irq domains",
                errno=errno.ENOMEM,
                domain=name,
            )
        index = int(free[0])
        self._domains = {k: v for k, v in self._domains.items() if k[0] != index}
        self._store("domain_flags", index, int(flags))
        self._store("domain_parent", index, parent + 1)
        self._store("domain_coproc", index, coproc + 1)
        self._store("domain_name", index, name.encode())
        self._store("domain_lines", index, _words(lines, _core.NLINES // 64))
        self._store("domain_used", index, 1)
        made = self.domain(index)
        assert made is not None
        return made

    def drop_domain(self, index: int) -> None:
        """Remove a domain's record; the lock is held."""
        self._store("domain_used", index, 0)


def _words(members: Any, count: int) -> NDArray[np.uint64]:
    bits = (
        members.bits if isinstance(members, CpuMask) else sum(1 << n for n in members)
    )
    return np.frombuffer(bits.to_bytes(count * 8, "little"), "<u8").copy()


def _bits(data: bytes) -> frozenset[int]:
    return frozenset(CpuMask.from_bits(int.from_bytes(data, "little")))
