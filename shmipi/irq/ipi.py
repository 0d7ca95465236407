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
from collections.abc import Mapping
from typing import Any, NoReturn, TypeAlias

import numpy as np

from shmipi.cpumask import CpuMask, MaskLike
from shmipi.errors import IrqError
from shmipi.irq.desc import (
    INVALID_HWIRQ,
    NR_IRQS,
    IrqDesc,
    IrqFlags,
    IrqTable,
    irq_data_get_affinity_mask,
    irq_desc_get_irq_data,
    irqd_is_global_ipi,
)
from shmipi.irq.domain import DomainNode, IrqDomain, IrqDomainFlags, root_name

__all__ = [
    "DomainLike",
    "IpiCalls",
    "__ipi_send_mask",
    "__ipi_send_single",
    "irq_desc_send_ipi",
    "refuse",
]

#: A domain, its name, a consumer's description (``{"interrupt-parent": name}``), or
#: None: the default IPI domain.
DomainLike: TypeAlias = IrqDomain | str | Mapping[str, Any] | None

_PERCPU = IrqFlags.IRQ_PER_CPU | IrqFlags.IRQ_PER_CPU_DEVID | IrqFlags.IRQ_NO_BALANCING


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


class IpiCalls:
    """irq domains and IPIs of one machine: a part of ``cluster.irq``."""

    table: IrqTable

    # ---- domains --------------------------------------------------------------------

    @property
    def domains(self) -> list[IrqDomain]:
        """All irq domains of the machine, the controller's root first."""
        return self.table.domains()

    @property
    def root(self) -> IrqDomain:
        """The domain of the controller that the CPUs have."""
        root = self.table.domain(0)
        assert root is not None
        return root

    def domain(self, which: DomainLike = None) -> IrqDomain:
        """Return a domain: by name, by a description's reference, or the default.

        ``IrqError`` EINVAL when there is none.
        """
        if isinstance(which, Mapping):
            which = which.get("interrupt-parent")
            if not isinstance(which, str):
                raise IrqError('an irq\'s description needs an "interrupt-parent"')
        if which is None:
            for domain in self.domains:
                if domain.flags & IrqDomainFlags.DEFAULT:
                    return domain
            raise IrqError("this machine has no default IPI domain")
        if isinstance(which, IrqDomain):
            # Its own machine's, and not removed since.
            if which.table.machine.name == self.table.machine.name:
                found = self.table.domain(which.index)
                if found == which:
                    return which
            which = which.name
        elif not isinstance(which, str):
            raise TypeError(
                f"a domain is an IrqDomain, its name or None, not {which!r}"
            )
        for domain in self.domains:
            if domain.name == which or (which == "root" and domain.parent_index < 0):
                return domain
        names = ", ".join(domain.name for domain in self.domains)
        raise IrqError(
            f"there is no irq domain {which}; there are {names}", domain=which
        )

    def irq_domain_create(
        self, node: DomainNode, parent: IrqDomain | None = None
    ) -> IrqDomain:
        """Make a domain while the machine runs, as a description's node says.

        ``IrqError``: EEXIST (the name is taken), EINVAL (no such parent, hwirqs that it
        does not have), EBUSY (hwirqs that are another domain's or an irq's), ENOMEM.
        """
        if not isinstance(node, DomainNode):
            raise TypeError(f"a domain is made from a DomainNode, not {node!r}")
        with self.table.locked():
            names = [domain.name for domain in self.domains]
            if node.name in names or node.name == "root":
                raise IrqError(
                    f"there is an irq domain {node.name} already",
                    errno=errno.EEXIST,
                    domain=node.name,
                )
            above = parent or self.domain(node.parent or "root")
            flags = node.flags(self.table.chip)
            if above.is_coprocessor:
                raise IrqError(
                    f"{above.name} is a coprocessor's domain: it has no hwirqs to give",
                    domain=node.name,
                )
            self._check_lines(node, above)
            return self.table.add_domain(node.name, flags, above.index, -1, node.lines)

    def _check_lines(self, node: DomainNode, above: IrqDomain) -> None:
        if above.own and not node.lines:
            raise IrqError(
                f"{node.name}: say which of {above.name}'s hwirqs it gets",
                domain=node.name,
            )
        whole = above.own or frozenset(self.table.irq_lines())
        for line in sorted(node.lines):
            if line not in whole:
                raise IrqError(
                    f"{node.name}: hwirq {line} is not {above.name}'s to give",
                    domain=node.name,
                )
            others = [d.name for d in above.children if line in d.own]
            if others or not self.table.line_is_free(line):
                owner = others[0] if others else f"irq {self._owner(line)}"
                raise IrqError(
                    f"{node.name}: hwirq {line} is {owner}'s",
                    errno=errno.EBUSY,
                    domain=node.name,
                )

    def _owner(self, line: int) -> int:
        return int(self.table._line_virq[line])

    def irq_domain_remove(self, domain: DomainLike) -> None:
        """Remove a domain that has no irqs and no children left.

        ``IrqError``: EBUSY (it has some), EINVAL (no such domain, or the root).
        """
        with self.table.locked():
            found = self.domain(domain)
            if found.parent_index < 0 and not found.is_coprocessor:
                raise IrqError(
                    f"{found.name} is the controller's own domain: it stays",
                    domain=found.name,
                )
            virqs, children = self.table.virqs_of(found), found.children
            if virqs or children:
                what = f"irq {virqs[0]}" if virqs else f"domain {children[0].name}"
                raise IrqError(
                    f"{found.name} still has {what}",
                    errno=errno.EBUSY,
                    irq=virqs[0] if virqs else None,
                    domain=found.name,
                )
            self.table.drop_domain(found.index)

    def set_up(self, nodes: tuple[DomainNode, ...]) -> None:
        """Make the controller's domains and those of a description: once, at boot."""
        chip = self.table.chip
        with self.table.locked():
            root = self.table.add_domain(
                root_name(chip),
                IrqDomainFlags.IRQ_DOMAIN_FLAG_HIERARCHY,
                -1,
                -1,
                frozenset(),
            )
        own = DomainNode(
            f"{chip.name}-ipi", default=not any(node.default for node in nodes)
        )
        for node in (own, *nodes):
            self.irq_domain_create(node, root if node is own else None)

    # ---- descriptors ----------------------------------------------------------------

    def irq_to_desc(self, virq: int) -> IrqDesc | None:
        """Return the descriptor of a virq, or None when there is no such irq."""
        return self.table.lookup(virq)

    def _desc(self, virq: int) -> IrqDesc:
        desc = self.table.lookup(virq)
        if desc is None:
            raise IrqError(
                f"there is no irq {virq}: it was never reserved, or was destroyed",
                irq=virq,
            )
        return desc

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
            flags = _PERCPU
            if found.is_coprocessor:
                flags = IrqFlags.IRQ_NOREQUEST | IrqFlags.IRQ_NO_BALANCING
            elif cpus == found.possible:
                flags |= IrqFlags.IRQD_GLOBAL_IPI
            first = self._find_descs(found, len(hwirqs))
            self.table.make(found, first, offset, hwirqs, cpus, flags, name)
        return first

    def _find_descs(self, domain: IrqDomain, count: int) -> int:
        first = self.table.find_descs(count)
        if first < 0:
            raise IrqError(
                f"no {count} irq descriptors in a row are free: a machine has"
                f" {NR_IRQS - 1}",
                errno=errno.ENOMEM,
                domain=domain.name,
            )
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
        free = domain.free_hwirqs()
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
            raise self._busy(domain, 1, wanted)
        if domain.mapping == "block":
            left = set(domain.free_hwirqs())
            for base in free[:1] if wanted is not None else free:
                block = list(range(base, base + cpus.weight))
                if left.issuperset(block):
                    return first, block
            raise self._busy(domain, cpus.weight, wanted)
        if len(free) < cpus.weight:
            raise self._busy(domain, cpus.weight, wanted)
        lines = iter(free)
        return first, [
            next(lines) if cpu in cpus else INVALID_HWIRQ
            for cpu in range(first, last + 1)
        ]

    def _busy(self, domain: IrqDomain, count: int, wanted: int | None) -> IrqError:
        if wanted is None:
            row = " in a row" if domain.mapping == "block" else ""
            some = f"{count} hwirqs{row}" if count > 1 else "hwirq"
            text = f"domain {domain.name} has no {some} left"
        else:
            text = (
                f"domain {domain.name}: of the {count} hwirqs from {wanted} on some are"
                " reserved already, or not its own"
            )
        owner = None
        if wanted is not None and not domain.is_coprocessor:
            owner = self._owner(wanted) or None
        return IrqError(text, errno=errno.EBUSY, irq=owner, domain=domain.name)

    def irq_destroy_ipi(self, virq: int, dest: MaskLike | None = None) -> None:
        """Give back an IPI, or in a domain with a hwirq for each CPU those of ``dest``.

        None is all that it was reserved for. A hwirq that all CPUs share is given back
        whatever the mask. What was sent and not taken yet is dropped. virqs of a block
        stay reserved until the last of its CPUs is gone.

        ``IrqError`` EINVAL: no such irq, not of an IPI domain, ``dest`` is empty or has
        other CPUs than it was reserved for. A handler that is still there is withdrawn,
        with a warning.
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
            if whole:
                self.table.destroy(desc)
            else:
                self.table.shrink(desc, gone)
        if requested:
            self._was_requested(desc)

    def _was_requested(self, desc: IrqDesc) -> None:
        raise NotImplementedError

    def ipi_get_hwirq(self, virq: int, cpu: int) -> int:
        """Return the hwirq by which an IPI reaches a CPU.

        ``INVALID_HWIRQ`` for a CPU that is not in its mask, or for no such irq.
        """
        desc = self.table.lookup(virq)
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
        desc = self._desc(virq)
        _ipi_send_verify(desc, CpuMask([cpu]))
        _send_single(desc, cpu)

    def ipi_send_mask(self, virq: int, dest: MaskLike) -> None:
        """Send an IPI to the CPUs of ``dest``. ``IrqError`` EINVAL for others."""
        desc = self._desc(virq)
        cpus = self.table.cpus(dest)
        _ipi_send_verify(desc, cpus)
        _send_mask(desc, cpus)

    def irq_send_ipi(self, virq: int, mask: MaskLike) -> None:
        """Send an IPI to the CPUs of ``mask``: ``irq_desc_send_ipi`` by number."""
        irq_desc_send_ipi(self._desc(virq), mask)

    def irq_send_ipi_all(self, virq: int) -> None:
        """Send an IPI to all CPUs that it was reserved for."""
        desc = self._desc(virq)
        irq_desc_send_ipi(desc, irq_data_get_affinity_mask(desc.irq_data))

    # ---- interrupts of devices ------------------------------------------------------

    def irq_create_mapping(self, domain: DomainLike, hwirq: int, name: str = "") -> int:
        """Give a hwirq of a domain without IPIs a virq; one that has one keeps it.

        Every CPU has the line (on a mips-gic it is routed to CPU 0). A device raises it
        with ``chip.raise_line(hwirq, cpu)``. ``IrqError``: EINVAL (an IPI domain, or
        not its hwirq), EBUSY (an IPI has it), ENOMEM.
        """
        found = self.domain(domain)
        if found.is_ipi:
            raise IrqError(
                f"{found.name} is an IPI domain: irq_reserve_ipi is its",
                domain=found.name,
            )
        with self.table.locked():
            if hwirq not in found.hwirqs():
                raise IrqError(
                    f"hwirq {hwirq} is not domain {found.name}'s", domain=found.name
                )
            owner = self._owner(hwirq)
            if owner:
                desc = self._desc(owner)
                if desc.domain == found:
                    return owner
                refuse(desc, f"it has hwirq {hwirq}", code=errno.EBUSY)
            first = self._find_descs(found, 1)
            routed = self.table.chip.flow == "shared"
            cpus = CpuMask([0]) if routed else found.possible
            self.table.make(found, first, 0, [hwirq], cpus, _PERCPU, name)
        return first

    def irq_dispose_mapping(self, virq: int) -> None:
        """Undo ``irq_create_mapping``. ``IrqError`` EINVAL for others' irqs."""
        with self.table.locked():
            desc = self._desc(virq)
            if desc.domain.is_ipi:
                refuse(desc, "it is an IPI: irq_destroy_ipi is its")
            requested = bool(self.table.action(virq))
            self.table.destroy(desc)
        if requested:
            self._was_requested(desc)
