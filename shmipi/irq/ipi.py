"""Reserving, sending and destroying IPIs (``kernel/irq/ipi.c`` and what it grew from).

Two families of names. The kernel's: ``irq_reserve_ipi``, ``irq_destroy_ipi``,
``ipi_get_hwirq``, ``ipi_send_single``, ``ipi_send_mask``, always verified, and
``__ipi_send_single``, ``__ipi_send_mask``, never. The older proposal's:
``irq_send_ipi(virq, mask)``, ``irq_send_ipi_all(virq)``, ``irq_desc_send_ipi(desc,
mask)``, which verify the mask against the reserved one, except for IPIs marked global:
those are for every CPU.

As in the kernel nobody asks whether a CPU is online: what is sent to one that is not is
lost. A mask without CPUs is sent to nobody. Every refusal is an ``IrqError`` with the
kernel's errno that names the irq, the domain and the CPU.
"""

from __future__ import annotations

import errno
from typing import NoReturn

import numpy as np

from shmipi.cpumask import CpuMask, MaskLike
from shmipi.errors import IrqError
from shmipi.irq.irqdesc import (
    IrqDesc,
    IrqDomain,
    irq_data_get_affinity_mask,
    irq_desc_get_irq_data,
    irqd_is_global_ipi,
    refuse,
)
from shmipi.irq.irqdomain import (
    PERCPU_FLAGS,
    SYNCHRONIZE_S,
    DomainCalls,
    DomainLike,
)
from shmipi.irq.table import INVALID_HWIRQ, IrqFlags

__all__ = [
    "IpiCalls",
    "__ipi_send_mask",
    "__ipi_send_single",
    "irq_desc_send_ipi",
]


def irq_desc_send_ipi(desc: IrqDesc, mask: MaskLike) -> None:
    """Send the IPI of ``desc`` to the CPUs of ``mask``.

    The mask is verified against the reserved one, but not for an IPI marked global.
    ``IrqError`` EINVAL: the chip has no send_ipi, the mask has other CPUs, the irq was
    destroyed.
    """
    _check_alive(desc)
    data = irq_desc_get_irq_data(desc)
    send = data.chip.send_ipi
    if send is None:
        refuse(desc, f"the chip of domain {data.domain.name} has no send_ipi")
    cpus = desc.table.cpus(mask)
    if not irqd_is_global_ipi(data):
        _check_mask(desc, cpus)
    send(data, cpus)


def __ipi_send_single(desc: IrqDesc, cpu: int) -> None:
    """Send to one CPU, unverified: for those who know that it is right.

    A chip without an operation for one CPU is given a mask of one. ``desc`` must be
    alive and ``cpu`` in its mask: otherwise the interrupt goes astray.
    """
    data = desc.irq_data
    chip = data.chip
    if chip.ipi_send_single is not None:
        chip.ipi_send_single(data, cpu)
    elif chip.ipi_send_mask is not None:
        chip.ipi_send_mask(data, CpuMask.from_bits(1 << cpu))


def __ipi_send_mask(desc: IrqDesc, mask: MaskLike) -> None:
    """Send to the CPUs of a mask, unverified, as ``__ipi_send_single``.

    A chip without an operation for masks is asked for each CPU.
    """
    data = desc.irq_data
    chip = data.chip
    cpus = desc.table.cpus(mask)
    if chip.ipi_send_mask is not None:
        chip.ipi_send_mask(data, cpus)
    elif chip.ipi_send_single is not None:
        for cpu in cpus:
            chip.ipi_send_single(data, cpu)


# Inside a class a name with two leading underscores would be the class's own.
_send_single, _send_mask = __ipi_send_single, __ipi_send_mask


def _ipi_send_verify(desc: IrqDesc, mask: CpuMask) -> None:
    chip = desc.irq_data.chip
    _check_alive(desc)
    if chip.ipi_send_single is None and chip.ipi_send_mask is None:
        refuse(desc, f"the chip of domain {desc.domain.name} sends no IPIs")
    _check_mask(desc, mask)


def _check_alive(desc: IrqDesc) -> None:
    if not desc.alive:
        refuse(desc, "it was destroyed: reserve another one")
    if desc.irq != desc.ipi_base:
        refuse(desc, f"it is part of the block of irq {desc.ipi_base}: send by that")


def _check_mask(desc: IrqDesc, mask: CpuMask) -> None:
    foreign = mask - irq_data_get_affinity_mask(desc.irq_data)
    if foreign:
        refuse(desc, f"it is not for CPUs {foreign}", foreign.first)


class IpiCalls(DomainCalls):
    """IPIs of one machine: a part of ``cluster.irq``."""

    # ---- reserving ------------------------------------------------------------------

    def irq_reserve_ipi(
        self,
        domain: DomainLike,
        dest: MaskLike,
        *,
        hwirq: int | None = None,
        name: str = "",
    ) -> int:
        """Reserve an IPI to the CPUs of ``dest`` from an IPI domain: its virq.

        Where the CPUs have hwirqs of their own, virqs are reserved for all from the
        first to the last of them, and the first stands for all. ``hwirq`` asks for that
        one, or for the block that starts with it. An IPI for every CPU is marked
        global.

        ``IrqError``: EINVAL (no IPI domain, ``dest`` is empty or names CPUs that do not
        exist, or has holes in a domain of consecutive hwirqs, ``hwirq`` is not the
        domain's), EBUSY (no hwirqs left, or not the ones asked for), ENOMEM (no
        descriptors left).
        """
        found = self.domain(domain)
        cpus = self.table.cpus(dest)
        self._check_dest(found, cpus)
        with self.table.locked():
            offset, hwirqs = self._choose(found, cpus, hwirq)
            flags = PERCPU_FLAGS
            if found.is_coprocessor:
                flags = IrqFlags.IRQ_NOREQUEST | IrqFlags.IRQ_NO_BALANCING
            elif cpus == found.possible:
                flags |= IrqFlags.IRQD_GLOBAL_IPI
            first = self._find_descs(found, len(hwirqs))
            self.table.make(found.index, first, offset, hwirqs, cpus, flags, name)
        return first

    def _check_dest(self, domain: IrqDomain, cpus: CpuMask) -> None:
        def wrong(why: str, cpu: int | None = None) -> NoReturn:
            raise IrqError(f"domain {domain.name}: {why}", cpu=cpu, domain=domain.name)

        if not domain.is_ipi:
            wrong("it is no IPI domain")
        beyond = cpus - domain.possible
        if beyond:
            wrong(
                f"CPUs {beyond} are not possible: it has {domain.possible}",
                beyond.first,
            )
        if not cpus:
            wrong("the mask of CPUs is empty")
        first, last = cpus.first, cpus.last
        assert first is not None
        assert last is not None
        if domain.mapping == "block" and last - first + 1 != cpus.weight:
            holes = CpuMask(range(first, last)) - cpus
            wrong(
                f"CPUs {cpus} have holes ({holes}), and its hwirqs are consecutive",
                holes.first,
            )

    def _choose(
        self, domain: IrqDomain, cpus: CpuMask, wanted: int | None
    ) -> tuple[int, list[int]]:
        """The block's first CPU and its hwirqs. ``IrqError`` EBUSY, EINVAL."""
        free = domain.free_hwirqs(cpus)
        first, last = cpus.first or 0, cpus.last or 0
        if wanted is not None:
            if isinstance(wanted, bool) or not isinstance(wanted, int | np.integer):
                raise TypeError(f"a hwirq is an integer, not {wanted!r}")
            if wanted not in domain.hwirqs():
                raise IrqError(
                    f"hwirq {wanted} is not domain {domain.name}'s",
                    domain=domain.name,
                )
            # That one first, or none at all.
            free = free[free.index(wanted) :] if wanted in free else []
        if not domain.is_per_cpu:
            if free:
                return first, free[:1]
            raise self._busy(domain, 1, wanted, cpus)
        if domain.mapping == "block":
            left = set(domain.free_hwirqs())
            for base in free[:1] if wanted is not None else free:
                block = list(range(base, base + cpus.weight))
                if left.issuperset(block):
                    return first, block
            raise self._busy(domain, cpus.weight, wanted, cpus)
        if len(free) < cpus.weight:
            raise self._busy(domain, cpus.weight, wanted, cpus)
        lines = iter(free)
        return first, [
            next(lines) if cpu in cpus else INVALID_HWIRQ
            for cpu in range(first, last + 1)
        ]

    def _busy(
        self, domain: IrqDomain, count: int, wanted: int | None, cpus: CpuMask
    ) -> IrqError:
        if wanted is None:
            row = " in a row" if domain.mapping == "block" else ""
            some = f"{count} hwirqs{row}" if count > 1 else "hwirq"
            text = f"domain {domain.name} has no {some} left"
        else:
            text = (
                f"domain {domain.name}: of the {count} hwirqs from {wanted} on some are"
                " reserved already, still handled by a CPU, or not its own"
            )
        owner = None
        if wanted is not None and not domain.is_coprocessor:
            owner = self._owner(wanted, cpus) or None
        return IrqError(text, errno=errno.EBUSY, irq=owner, domain=domain.name)

    def irq_destroy_ipi(
        self,
        virq: int,
        dest: MaskLike | None = None,
        *,
        timeout: float = SYNCHRONIZE_S,
    ) -> None:
        """Give back an IPI, or in a domain with a hwirq for each CPU those of ``dest``.

        None is all that it was reserved for. A hwirq that all CPUs share is given back
        whatever the mask. What was sent and not taken yet is dropped. virqs of a block
        stay reserved until the last of its CPUs is gone. Returns when no handler of it
        is in progress there any more (``synchronize_irq``); what a CPU has taken and
        not begun to handle is dropped, and until it has been its hwirq is not given to
        another irq.

        ``IrqError`` EINVAL: no such irq, not of an IPI domain, ``dest`` is empty or has
        other CPUs than it was reserved for. A handler that is still there is withdrawn,
        with a warning. ``IpiTimeoutError``: it is given back, but a handler is still in
        progress after ``timeout`` seconds.
        """
        with self.table.locked():
            desc = self._desc(virq)
            if not desc.domain.is_ipi:
                refuse(desc, "its domain is no IPI domain: irq_dispose_mapping is its")
            if desc.irq != desc.ipi_base:
                refuse(desc, f"it is part of the block of irq {desc.ipi_base}")
            mask = self.table.affinity(desc.irq)
            gone = mask if dest is None else self.table.cpus(dest)
            _check_mask(desc, gone)
            if not gone:
                refuse(desc, "the mask of CPUs is empty")
            whole = not desc.domain.is_per_cpu or gone == mask
            requested = whole and bool(self.table.action(desc.irq))
            places = self._places(desc, gone)
            if whole:
                self.table.destroy(desc.ipi_base, desc.ipi_nr)
            else:
                lines = {cpu: desc.mapping.hwirq(cpu) for cpu in gone}
                self.table.shrink(desc.ipi_base, lines)
        self._let_end(virq, places, timeout)
        if requested:
            self._was_requested(desc)

    def ipi_get_hwirq(self, virq: int, cpu: int) -> int:
        """Return the hwirq by which an IPI reaches a CPU.

        ``INVALID_HWIRQ`` for a CPU that is not in its mask, or for no such irq.
        """
        desc = self.irq_to_desc(virq)
        if isinstance(cpu, bool) or not isinstance(cpu, int | np.integer):
            raise TypeError(f"a CPU number is an integer, not {cpu!r}")
        if desc is None or desc.irq != desc.ipi_base or cpu < 0:
            return INVALID_HWIRQ
        if cpu not in self.table.affinity(desc.irq):
            return INVALID_HWIRQ
        return desc.mapping.hwirq(cpu)

    # ---- sending --------------------------------------------------------------------

    def ipi_send_single(self, virq: int, cpu: int) -> None:
        """Send an IPI to one CPU. ``IrqError`` EINVAL when it is not for that CPU."""
        if self.table.send_single(virq, cpu):
            return
        desc = self._desc(virq)
        _ipi_send_verify(desc, CpuMask([cpu]))
        _send_single(desc, cpu)

    def ipi_send_mask(self, virq: int, dest: MaskLike) -> None:
        """Send an IPI to the CPUs of ``dest``. ``IrqError`` EINVAL for others."""
        table = self.table
        if table.send_mask(virq, dest, table.by_groups):
            return
        desc = self._desc(virq)
        cpus = table.cpus(dest)
        _ipi_send_verify(desc, cpus)
        if not table.send_mask(virq, cpus, table.by_groups):
            _send_mask(desc, cpus)

    def irq_send_ipi(self, virq: int, mask: MaskLike) -> None:
        """Send an IPI to the CPUs of ``mask``: ``irq_desc_send_ipi`` by number."""
        if not self.table.send_mask(virq, mask, self.table.by_groups):
            irq_desc_send_ipi(self._desc(virq), mask)

    def irq_send_ipi_all(self, virq: int) -> None:
        """Send an IPI to all CPUs that it was reserved for."""
        if self.table.send_all(virq, self.table.by_groups):
            return
        desc = self._desc(virq)
        irq_desc_send_ipi(desc, irq_data_get_affinity_mask(desc.irq_data))
