"""irq domains: who gives hardware irq numbers out (``kernel/irq/irqdomain.c``).

A machine has a hierarchy of them. The root is the controller that its CPUs have; its
hwirqs are the controller's lines of use "irq". IPI domains are its children, as MSI
domains are of the vector domain on x86::

    [apic-ipi]  ---> [apic vector]
    [your own]  --->       |

There is one root, because a CPU has one controller. Several IPI controllers are several
IPI domains: with lines of their own (``reserved-ipi-vectors``), which nobody else gets,
or out of what is left of their parent's. A coprocessor is a controller of its own: a
domain without a parent, with one hwirq (see ``coprocessor.py``).
"""

from __future__ import annotations

import errno
from collections.abc import Mapping
from typing import Any, TypeAlias

from shmipi.cpumask import CpuMask
from shmipi.errors import IrqError
from shmipi.irq.irqdesc import (
    IrqData,
    IrqDesc,
    IrqDomain,
    domain_at,
    domains_of,
    irq_to_desc,
    refuse,
)
from shmipi.irq.of import DomainNode, root_name
from shmipi.irq.table import (
    INVALID_HWIRQ,
    NR_IRQS,
    IrqDomainFlags,
    IrqFlags,
    IrqTable,
)

__all__ = ["PERCPU_FLAGS", "SYNCHRONIZE_S", "DomainCalls", "DomainLike"]

#: A domain, its name, a consumer's description (``{"interrupt-parent": name}``), or
#: None: the default IPI domain.
DomainLike: TypeAlias = IrqDomain | str | Mapping[str, Any] | None

#: How many seconds the end of handlers is waited for.
SYNCHRONIZE_S = 10.0
#: What every irq is that CPUs take.
PERCPU_FLAGS = (
    IrqFlags.IRQ_PER_CPU | IrqFlags.IRQ_PER_CPU_DEVID | IrqFlags.IRQ_NO_BALANCING
)


class DomainCalls:
    """irq domains of one machine, and interrupts of devices: of ``cluster.irq``."""

    table: IrqTable

    # ---- domains --------------------------------------------------------------------

    @property
    def domains(self) -> list[IrqDomain]:
        """All irq domains of the machine, the controller's root first."""
        return domains_of(self.table)

    @property
    def root(self) -> IrqDomain:
        """The domain of the controller that the CPUs have."""
        root = domain_at(self.table, 0)
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
                found = domain_at(self.table, which.index)
                if found == which:
                    return which
            which = which.name
        elif not isinstance(which, str):
            raise TypeError(
                f"a domain is an IrqDomain, its name or None, not {which!r}"
            )
        for domain in self.domains:
            if domain.name == which or (which == "root" and domain.is_root):
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
            made = self.table.add_domain(node.name, flags, above.index, -1, node.lines)
        return IrqDomain(self.table, made)

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

    def _owner(self, line: int, cpus: CpuMask | None = None) -> int:
        """Whose a line is, on some of these CPUs: 0 if nobody's."""
        for virq in self.table.owners(line):
            if cpus is None or self.table.affinity(virq) & cpus:
                return virq
        return 0

    def irq_domain_remove(self, domain: DomainLike) -> None:
        """Remove a domain that has no irqs and no children left.

        ``IrqError``: EBUSY (it has some), EINVAL (no such domain, or the root).
        """
        with self.table.locked():
            found = self.domain(domain)
            if found.is_root:
                raise IrqError(
                    f"{found.name} is the controller's own domain: it stays",
                    domain=found.name,
                )
            virqs, children = self.table.virqs_of(found.index), found.children
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
            root = IrqDomain(
                self.table,
                self.table.add_domain(
                    root_name(chip),
                    IrqDomainFlags.IRQ_DOMAIN_FLAG_HIERARCHY,
                    -1,
                    -1,
                    frozenset(),
                ),
            )
        own = DomainNode(
            f"{chip.name}-ipi", default=not any(node.default for node in nodes)
        )
        for node in (own, *nodes):
            self.irq_domain_create(node, root if node is own else None)

    # ---- descriptors ----------------------------------------------------------------

    def irq_to_desc(self, virq: int) -> IrqDesc | None:
        """Return the descriptor of a virq, or None when there is no such irq."""
        return irq_to_desc(self.table, virq)

    def _desc(self, virq: int) -> IrqDesc:
        desc = irq_to_desc(self.table, virq)
        if desc is None:
            raise IrqError(
                f"there is no irq {virq}: it was never reserved, or was destroyed",
                irq=virq,
            )
        return desc

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

    # ---- interrupts of devices ------------------------------------------------------

    def irq_create_mapping(self, domain: DomainLike, hwirq: int, name: str = "") -> int:
        """Give a hwirq of a domain without IPIs a virq; one that has one keeps it.

        Every CPU has the line (a mips-gic's shared ones are routed to CPU 0). A device
        raises it with ``chip.raise_line(hwirq, cpu)``. ``IrqError``: EINVAL (an IPI
        domain, or not its hwirq), EBUSY (an IPI has it, or it is reserved for IPIs),
        ENOMEM.
        """
        found = self.domain(domain)
        if found.is_ipi:
            raise IrqError(
                f"{found.name} is an IPI domain: irq_reserve_ipi is its",
                domain=found.name,
            )
        with self.table.locked():
            if hwirq not in found.hwirqs():
                for_ipis = hwirq in self.table.lines_for(True)
                raise IrqError(
                    f"hwirq {hwirq} is not domain {found.name}'s"
                    f"{': it is reserved for IPIs' if for_ipis else ''}",
                    errno=errno.EBUSY if for_ipis else errno.EINVAL,
                    irq=(self._owner(hwirq) or None) if for_ipis else None,
                    domain=found.name,
                )
            owner = self._owner(hwirq)
            if owner:
                desc = self._desc(owner)
                if desc.domain == found:
                    return owner
                refuse(desc, f"it has hwirq {hwirq}", code=errno.EBUSY)
            if hwirq in self.table.in_progress():
                raise IrqError(
                    f"hwirq {hwirq}: a CPU still handles it for the irq that had it",
                    errno=errno.EBUSY,
                    domain=found.name,
                )
            first = self._find_descs(found, 1)
            routed = self.table.chip.is_routed(hwirq)
            cpus = CpuMask([0]) if routed else found.possible
            self.table.make(found.index, first, 0, [hwirq], cpus, PERCPU_FLAGS, name)
        return first

    def irq_find_mapping(self, domain: DomainLike, hwirq: int) -> int:
        """Return the virq that a hwirq of a domain has, or 0.

        A domain above has the hwirqs of its children's irqs, too.
        """
        found = self.domain(domain)
        if found.is_coprocessor:
            virqs = self.table.virqs_of(found.index)
            return virqs[0] if virqs and not hwirq else 0
        for virq in self.table.owners(hwirq):
            desc = self.irq_to_desc(virq)
            above = desc.domain if desc else None
            while above is not None and above != found:
                above = above.parent
            if desc is not None and above is not None:
                # A block's first virq has the line; each has its own hwirq.
                mapped = desc.mapping.cpumap
                place = mapped.index(hwirq) if hwirq in mapped else 0
                return desc.ipi_base + place
        return 0

    def irq_get_irq_data(self, virq: int) -> IrqData | None:
        """Return what an irq is in its own domain; None: there is no such irq."""
        desc = self.irq_to_desc(virq)
        return None if desc is None else desc.irq_data

    def irq_dispose_mapping(self, virq: int, *, timeout: float = SYNCHRONIZE_S) -> None:
        """Undo ``irq_create_mapping``. ``IrqError`` EINVAL for others' irqs.

        Waits for handlers as ``irq_destroy_ipi``.
        """
        with self.table.locked():
            desc = self._desc(virq)
            if desc.domain.is_ipi:
                refuse(desc, "it is an IPI: irq_destroy_ipi is its")
            requested = bool(self.table.action(virq))
            places = self._places(desc, self.table.affinity(virq))
            self.table.destroy(desc.ipi_base, desc.ipi_nr)
        self._let_end(virq, places, timeout)
        if requested:
            self._was_requested(desc)

    # ---- handlers in progress -------------------------------------------------------

    def synchronize_irq(self, virq: int, *, timeout: float = SYNCHRONIZE_S) -> None:
        """Wait until no handler of an irq is in progress on any CPU.

        That is, those that are in progress now: also one whose interrupt a CPU has
        taken and whose Python function it has not come to yet. What comes meanwhile
        is handled, and not waited for. A CPU that dies is in no handler. No such irq:
        nothing.

        ``IpiTimeoutError`` after ``timeout`` seconds (a CPU that is stopped);
        ``IpiDeadlockError`` in the handler itself, where the kernel hangs;
        ``ClusterStateError`` in other interrupt handlers and with interrupts disabled.
        """
        machine = self.table.machine
        machine.irq_synchronize(virq, self._places_of(virq), timeout, False, False)

    def synchronize_hardirq(self, virq: int, *, timeout: float = SYNCHRONIZE_S) -> bool:
        """Do the same, also in handlers of other irqs: True.

        No irq has a threaded handler here. Two handlers that wait for each other's end
        do so until ``IpiTimeoutError``.
        """
        machine = self.table.machine
        machine.irq_synchronize(virq, self._places_of(virq), timeout, True, False)
        return True

    def _places_of(self, virq: int) -> list[tuple[int, int]]:
        desc = self.irq_to_desc(virq)
        if desc is None:
            return []
        return self._places(desc, self.table.affinity(desc.ipi_base))

    def _places(self, desc: IrqDesc, cpus: CpuMask) -> list[tuple[int, int]]:
        """Return where a handler of it may be in progress: (CPU, line) each."""
        if desc.domain.is_coprocessor:
            return []
        found: list[tuple[int, int]] = []
        for cpu in cpus:
            line = desc.mapping.hwirq(cpu)
            if line == INVALID_HWIRQ:
                continue
            if self.table.chip.is_routed(line):  # it may have been another CPU's
                found += [(n, line) for n in range(self.table.machine.ncpus)]
            else:
                found.append((cpu, line))
        return found

    def _let_end(
        self, virq: int, places: list[tuple[int, int]], timeout: float
    ) -> None:
        """Wait for handlers that have begun, and that nobody can begin any more."""
        self.table.machine.irq_synchronize(virq, places, timeout, False, True)

    def _was_requested(self, desc: IrqDesc) -> None:
        raise NotImplementedError
