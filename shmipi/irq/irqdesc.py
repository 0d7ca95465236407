"""irq descriptors: what a virq stands for (``linux/irq.h``, ``kernel/irq/irqdesc.c``).

A descriptor that was looked up is a snapshot with the number of its reservation
(``epoch``): once the irq has been destroyed it is stale, and sending through it is
refused (but for the unverified fast path, as in the kernel).

Its irq data, the chip of each level and the domains lead to each other, so they stand
in one file. hwirq numbers are the root domain's at every level: a domain decides who
gets which, it does not renumber.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Final, NoReturn

from shmipi import _core
from shmipi.cpumask import CpuMask
from shmipi.errors import IrqError
from shmipi.irq.chips.base import Chip
from shmipi.irq.table import (
    INVALID_HWIRQ,
    DomainRecord,
    IrqDomainFlags,
    IrqFlags,
    IrqTable,
)
from shmipi.machine import controller

__all__ = [
    "IpiMapping",
    "IrqChip",
    "IrqData",
    "IrqDesc",
    "IrqDomain",
    "domain_at",
    "domains_of",
    "irq_chip_send_ipi",
    "irq_data_get_affinity_mask",
    "irq_data_get_irq_chip",
    "irq_data_get_irq_chip_data",
    "irq_desc_get_irq_data",
    "irq_to_desc",
    "irqd_is_global_ipi",
    "irqd_to_hwirq",
    "refuse",
]

_IPI: Final = (
    IrqDomainFlags.IRQ_DOMAIN_FLAG_IPI_PER_CPU
    | IrqDomainFlags.IRQ_DOMAIN_FLAG_IPI_SINGLE
)


@dataclass(frozen=True)
class IpiMapping:
    """Which hwirq interrupts which CPU: the ``ipi_mapping`` of an IPI.

    Three shapes. ``single``: one hwirq for all CPUs, where the controller has vectors
    or lines of each CPU. ``block``: ``nr_hwirqs`` consecutive ones, ``hwirq =
    hwirq_base + cpu - cpu_offset``. ``cpumap``: any, with gaps (``INVALID_HWIRQ``);
    ``cpumap[cpu - cpu_offset]``.
    """

    shape: str
    cpu_offset: int
    cpumap: tuple[int, ...]

    @property
    def hwirq_base(self) -> int:
        """The first hwirq."""
        return self.cpumap[0]

    @property
    def nr_hwirqs(self) -> int:
        """How many hwirqs it takes."""
        return sum(hwirq != INVALID_HWIRQ for hwirq in self.cpumap)

    def hwirq(self, cpu: int) -> int:
        """Return the hwirq that interrupts ``cpu``, or ``INVALID_HWIRQ``."""
        if self.shape == "single":
            return self.cpumap[0]
        place = cpu - self.cpu_offset
        return self.cpumap[place] if 0 <= place < len(self.cpumap) else INVALID_HWIRQ


@dataclass(frozen=True, eq=False)
class IrqDesc:
    """The descriptor of ``irq``, as it was when it was looked up.

    ``ipi_base``, ``ipi_nr``, ``ipi_offset``: the block of virqs that was reserved with
    it, and the block's first CPU. A block is sent to, requested and destroyed by its
    first virq.
    """

    table: IrqTable
    irq: int
    epoch: int
    flags: IrqFlags
    domain: IrqDomain
    hwirq: int
    ipi_base: int
    ipi_nr: int
    ipi_offset: int
    name: str
    mapping: IpiMapping

    @property
    def irq_data(self) -> IrqData:
        """What the irq is in its own domain; ``parent_data`` leads on."""
        return IrqData(self, self.domain, self.hwirq)

    @property
    def alive(self) -> bool:
        """Is the reservation that this descriptor was looked up for still there?"""
        return self.table.is_current(self.irq, self.epoch)


@dataclass(frozen=True, eq=False)
class IrqData:
    """An irq at one level of the hierarchy of domains."""

    desc: IrqDesc
    domain: IrqDomain
    hwirq: int

    @property
    def irq(self) -> int:
        """The virq: the same at every level."""
        return self.desc.irq

    @property
    def chip(self) -> IrqChip:
        """What this level's controller can do with it."""
        return self.domain.irq_chip

    @property
    def chip_data(self) -> IpiMapping:
        """Which hwirq interrupts which CPU."""
        return self.desc.mapping

    @property
    def parent_data(self) -> IrqData | None:
        """The irq in the parent domain; None at the root."""
        return self.at_parent(self.hwirq)

    parent = parent_data

    def at_parent(self, hwirq: int) -> IrqData | None:
        """Return the same in the parent domain for one of the mapping's hwirqs."""
        parent = self.domain.parent
        return None if parent is None else IrqData(self.desc, parent, hwirq)


def irq_desc_get_irq_data(desc: IrqDesc) -> IrqData:
    """Return the irq data of a descriptor's own domain."""
    return desc.irq_data


def irqd_to_hwirq(data: IrqData) -> int:
    """Return the hwirq that an irq has in this level's domain."""
    return data.hwirq


def irq_data_get_irq_chip(data: IrqData) -> IrqChip:
    """Return what the controller at this level can do."""
    return data.chip


def irq_data_get_irq_chip_data(data: IrqData) -> IpiMapping:
    """Return what a domain keeps for the irq: which hwirq interrupts which CPU."""
    return data.chip_data


def irq_data_get_affinity_mask(data: IrqData) -> CpuMask:
    """Return the CPUs that the irq was reserved for and not destroyed for since."""
    return data.desc.table.affinity(data.desc.ipi_base)


def irqd_is_global_ipi(data: IrqData) -> bool:
    """Is it an IPI that reaches every CPU, so that masks need not be verified?"""
    return bool(data.desc.flags & IrqFlags.IRQD_GLOBAL_IPI)


@dataclass(frozen=True)
class IrqChip:
    """What a domain's controller can do with an irq: None for what it cannot.

    ``send_ipi(data, mask)`` is the operation as it was proposed;
    ``ipi_send_single(data, cpu)`` and ``ipi_send_mask(data, mask)`` are the two it
    became in the kernel, of which a controller has one.
    """

    name: str
    send_ipi: Callable[[IrqData, CpuMask], None] | None = None
    ipi_send_single: Callable[[IrqData, int], None] | None = None
    ipi_send_mask: Callable[[IrqData, CpuMask], None] | None = None


def irq_chip_send_ipi(data: IrqData, mask: CpuMask) -> None:
    """Send by the parent: to all CPUs at once where they share a hwirq, else to each.

    CPUs for which the mapping has a gap are left out.
    """
    mapping = irq_data_get_irq_chip_data(data)
    if mapping.shape == "single":
        _to_parent(data, mapping.hwirq_base, mask)
        return
    for cpu in mask:
        hwirq = mapping.hwirq(cpu)
        if hwirq != INVALID_HWIRQ:
            _to_parent(data, hwirq, CpuMask.from_bits(1 << cpu))


def _send_single(data: IrqData, cpu: int) -> None:
    irq_chip_send_ipi(data, CpuMask.from_bits(1 << cpu))


def _to_parent(data: IrqData, hwirq: int, mask: CpuMask) -> None:
    parent = data.at_parent(hwirq)
    if parent is None or parent.chip.send_ipi is None:
        raise IrqError(
            f"irq {data.irq}: no parent of domain {data.domain.name} can send",
            irq=data.irq,
            domain=data.domain.name,
        )
    parent.chip.send_ipi(parent, mask)


def _raise_line(data: IrqData, mask: CpuMask) -> None:
    data.desc.table.chip.raise_line(data.hwirq, mask)


def _raise_coprocessor(data: IrqData, mask: CpuMask) -> None:
    if not mask:
        return
    try:
        data.desc.table.machine.coproc_raise(data.domain.coprocessor, data.irq)
    except OSError as error:
        raise IrqError(
            f"irq {data.irq}: coprocessor {data.domain.name} has ended",
            errno=error.errno,
            irq=data.irq,
            domain=data.domain.name,
        ) from None


@dataclass(frozen=True, eq=False)
class IrqDomain:
    """A domain of the machine, as ``cluster.irq.domains`` lists it.

    ``own`` are the lines that only it gives out; without any it shares with its parent
    what that has left.
    """

    table: IrqTable
    record: DomainRecord

    def __repr__(self) -> str:
        parent = self.parent
        above = "" if parent is None else f" ---> {parent.name}"
        return f"<IrqDomain {self.name} ({self.mapping}){above}>"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, IrqDomain) and self._key() == other._key()

    def __hash__(self) -> int:
        return hash(self._key())

    def _key(self) -> tuple[str, int, str]:
        return self.table.machine.name, self.index, self.name

    def __reduce__(self) -> Any:
        # By name: what arrives on another CPU is that domain there.
        return _find, (self.name,)

    @property
    def index(self) -> int:
        """Its place in the machine's list."""
        return self.record.index

    @property
    def name(self) -> str:
        """What it is called."""
        return self.record.name

    @property
    def flags(self) -> IrqDomainFlags:
        """What it is."""
        return self.record.flags

    @property
    def parent_index(self) -> int:
        """Its parent's place in the machine's list; -1 for a root."""
        return self.record.parent

    @property
    def own(self) -> frozenset[int]:
        """The lines that only it gives out."""
        return self.record.own

    @property
    def coprocessor(self) -> int:
        """The coprocessor whose domain it is; -1: the CPUs'."""
        return self.record.coprocessor

    @property
    def parent(self) -> IrqDomain | None:
        """The domain that it gets its hwirqs from; None for a root."""
        return domain_at(self.table, self.parent_index)

    @property
    def children(self) -> list[IrqDomain]:
        """The domains that get their hwirqs from it."""
        return [d for d in domains_of(self.table) if d.parent_index == self.index]

    @property
    def is_ipi(self) -> bool:
        """Can IPIs be reserved here (``irq_domain_is_ipi``)?"""
        return bool(self.flags & _IPI)

    @property
    def is_per_cpu(self) -> bool:
        """Has each CPU a hwirq of its own (``irq_domain_is_ipi_per_cpu``)?"""
        return bool(self.flags & IrqDomainFlags.IRQ_DOMAIN_FLAG_IPI_PER_CPU)

    @property
    def is_coprocessor(self) -> bool:
        """Is it a coprocessor's, and not the CPUs'?"""
        return self.coprocessor >= 0

    @property
    def is_root(self) -> bool:
        """Is it the controller's that the CPUs have?"""
        return self.parent_index < 0 and not self.is_coprocessor

    @property
    def mapping(self) -> str:
        """The shape of its IPIs' mappings: single, block or cpumap."""
        if self.flags & IrqDomainFlags.IPI_CPUMAP:
            return "cpumap"
        return "block" if self.is_per_cpu else "single"

    @property
    def irq_chip(self) -> IrqChip:
        """What can be done with its irqs."""
        if self.is_coprocessor:
            return IrqChip(self.name, _raise_coprocessor, None, _raise_coprocessor)
        if self.is_root:
            return IrqChip(self.name, _raise_line, None, _raise_line)
        if not self.is_ipi:
            return IrqChip(self.name)
        if self.is_per_cpu:
            return IrqChip(self.name, irq_chip_send_ipi, _send_single, None)
        return IrqChip(self.name, irq_chip_send_ipi, None, irq_chip_send_ipi)

    @property
    def possible(self) -> CpuMask:
        """What its IPIs can be for: the CPUs; a coprocessor has one target, 0."""
        return CpuMask.full(1 if self.is_coprocessor else self.table.machine.ncpus)

    def hwirqs(self) -> list[int]:
        """Return the hwirqs that it may give out, taken or not, in that order."""
        if self.is_coprocessor:
            return [0]
        parent = self.parent
        if self.own:
            lines: Iterable[int] = sorted(self.own)
        elif parent is None:
            lines = self.table.irq_lines()
        else:
            mine = frozenset(self.table.lines_for(self.is_ipi))
            lines = [n for n in parent.hwirqs() if parent.own or n in mine]
        others = frozenset[int]().union(*(child.own for child in self.children))
        return [line for line in lines if line not in others]

    def free_hwirqs(self, cpus: CpuMask | None = None) -> list[int]:
        """Return those of them that no irq has, in the order in which to take them.

        That is the controller's. ``cpus``: that none has on these, where each CPU has
        hwirqs of its own (x86). One that a CPU still has in hand, for the irq that had
        it, is not free: what was taken for that one is not handled by the next.
        """
        if self.is_coprocessor:
            return [] if self.table.virqs_of(self.index) else [0]
        own, table = set(self.hwirqs()), self.table
        on = None if self.is_per_cpu else cpus
        own -= table.in_progress(on)
        return [n for n in table.irq_lines() if n in own and table.line_is_free(n, on)]


def _find(name: str) -> IrqDomain:
    machine = _core.current_machine()
    chip = controller.of(machine)
    assert isinstance(chip, Chip)
    for domain in domains_of(IrqTable(machine, chip)):
        if domain.name == name:
            return domain
    raise IrqError(f"there is no irq domain {name}", domain=name)


def domain_at(table: IrqTable, index: int) -> IrqDomain | None:
    """Return the domain at a place of the machine's list, or None."""
    record = table.domain(index)
    return None if record is None else IrqDomain(table, record)


def domains_of(table: IrqTable) -> list[IrqDomain]:
    """Return all domains of a machine, the controller's root first."""
    return [IrqDomain(table, record) for record in table.domains()]


def irq_to_desc(table: IrqTable, virq: int) -> IrqDesc | None:
    """Return the descriptor of a virq, or None when there is no such irq.

    ``LayoutError`` for one that is damaged.
    """
    record = table.lookup(virq)
    domain = None if record is None else domain_at(table, record.domain)
    if record is None or domain is None:
        return None
    return IrqDesc(
        table=table,
        irq=record.irq,
        epoch=record.epoch,
        flags=record.flags,
        domain=domain,
        hwirq=record.hwirq,
        ipi_base=record.ipi_base,
        ipi_nr=record.ipi_nr,
        ipi_offset=record.ipi_offset,
        name=record.name,
        mapping=IpiMapping(domain.mapping, record.ipi_offset, record.hwirqs),
    )


def refuse(
    desc: IrqDesc, why: str, cpu: int | None = None, code: int = errno.EINVAL
) -> NoReturn:
    """Raise the ``IrqError`` about an irq: ``code`` is its errno."""
    raise IrqError(
        f"irq {desc.irq} of domain {desc.domain.name}: {why}",
        cpu=cpu,
        errno=code,
        irq=desc.irq,
        domain=desc.domain.name,
    )
