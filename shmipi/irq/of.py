"""irq domains that a description asks for, as a device tree has them (``drivers/of``).

The kinds of domain, and the ``compatible`` of a description that asks for them:

=====================  ===============================================================
shmipi,ipi             an IPI domain of the kind that suits the controller
shmipi,ipi-single      one hwirq for all CPUs (IRQ_DOMAIN_FLAG_IPI_SINGLE): where each
                       CPU has every line for itself, which is all but mips-gic
shmipi,ipi-per-cpu     a block of consecutive hwirqs, one for each CPU
                       (IRQ_DOMAIN_FLAG_IPI_PER_CPU): mips-gic has to, others can
shmipi,ipi-cpumap      a hwirq for each CPU, of any number, for any set of CPUs
shmipi,ppi             no IPIs: interrupts that a device raises at a CPU. They are
                       mapped with ``irq_create_mapping``; their chip has no send_ipi
=====================  ===============================================================
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final, TypeAlias

from shmipi import _core
from shmipi.errors import DeviceTreeError
from shmipi.irq.chips.base import Chip
from shmipi.irq.table import IrqDomainFlags

__all__ = [
    "Description",
    "DomainNode",
    "check_tree",
    "checked_name",
    "parse_tree",
    "root_name",
]

#: What ``Cluster(domains=...)`` takes: see ``parse_tree``.
Description: TypeAlias = str | Mapping[str, Mapping[str, Any]]

_SHAPES: Final = {
    "single": IrqDomainFlags.IRQ_DOMAIN_FLAG_IPI_SINGLE,
    "block": IrqDomainFlags.IRQ_DOMAIN_FLAG_IPI_PER_CPU,
    "cpumap": IrqDomainFlags.IRQ_DOMAIN_FLAG_IPI_PER_CPU | IrqDomainFlags.IPI_CPUMAP,
    "none": IrqDomainFlags(0),
}
_COMPATIBLE: Final = {
    "shmipi,ipi": "",
    "shmipi,ipi-single": "single",
    "shmipi,ipi-per-cpu": "block",
    "shmipi,ipi-cpumap": "cpumap",
    "shmipi,ppi": "none",
}


@dataclass(frozen=True)
class DomainNode:
    """A domain that a description asks for; ``parent`` None is the root.

    ``shape`` is single, block, cpumap, none (no IPIs) or "" (what suits the chip).
    """

    name: str
    shape: str = ""
    parent: str | None = None
    lines: frozenset[int] = frozenset()
    default: bool = False

    def flags(self, chip: Chip) -> IrqDomainFlags:
        """Return the domain's flags under ``chip``. ``DeviceTreeError``."""
        routed = chip.flow in _core.ROUTED_FLOWS
        shape = self.shape or ("block" if routed or chip.per_cpu else "single")
        if shape == "single" and routed:
            raise DeviceTreeError(
                f"{self.name}: on {chip.name} a line interrupts one CPU: its IPIs are"
                " of compatible shmipi,ipi-per-cpu or shmipi,ipi-cpumap",
                node=self.name,
            )
        flags = _SHAPES[shape] | IrqDomainFlags.IRQ_DOMAIN_FLAG_HIERARCHY
        return flags | IrqDomainFlags.DEFAULT if self.default else flags


def root_name(chip: Chip) -> str:
    """Return the name of a chip's root domain."""
    return chip.domain_name or chip.name


def parse_tree(description: Description | None) -> tuple[DomainNode, ...]:
    """Read a description of irq domains, as a dict or as text.

    The text is a small part of the device tree's language: nodes, properties, comments;
    a value is a string, cells or a reference to a node by its name::

        fast {
            compatible = "shmipi,ipi-per-cpu";
            interrupt-parent = <&root>;         // or a node above; default: the root
            reserved-ipi-vectors = <0x40 16>;   // first, how many; any number
            shmipi,default;                     // where IPIs come from unless told
        };

    The dict has the same properties: ``{"fast": {"compatible": ..., "interrupt-parent":
    "root", "reserved-ipi-vectors": [0x40, 16], "shmipi,default": True}}``.
    ``mti,reserved-ipi-vectors`` is understood as well. Raises ``DeviceTreeError``,
    which names the node.
    """
    if description is None:
        return ()
    if isinstance(description, str):
        nodes: Mapping[str, Mapping[str, Any]] = _parse_text(description)
    elif isinstance(description, Mapping):
        nodes = description
    else:
        raise TypeError(
            f"domains is {description!r}: give a dict of nodes, or a description's text"
        )
    return tuple(_node(str(name), properties) for name, properties in nodes.items())


def _node(name: str, properties: Any) -> DomainNode:
    if not isinstance(properties, Mapping):
        raise DeviceTreeError(f"{name}: a node is a dict of properties", node=name)
    known = dict(properties)
    compatible = known.pop("compatible", None)
    if compatible not in _COMPATIBLE:
        raise DeviceTreeError(
            f"{name}: compatible is {compatible!r}: choose from"
            f" {', '.join(_COMPATIBLE)}",
            node=name,
        )
    parent = known.pop("interrupt-parent", None)
    if parent is not None and not isinstance(parent, str):
        raise DeviceTreeError(
            f"{name}: interrupt-parent is {parent!r}: give a node's name", node=name
        )
    cells: list[Any] = []
    for key in ("reserved-ipi-vectors", "mti,reserved-ipi-vectors"):
        value = known.pop(key, ())
        if isinstance(value, str) or not isinstance(value, Iterable):
            raise DeviceTreeError(f"{name}: {key} is cells: <first count>", node=name)
        cells += value
    default = known.pop("shmipi,default", False)
    if known:
        raise DeviceTreeError(
            f"{name}: no property {next(iter(known))!r} is known", node=name
        )
    return DomainNode(
        checked_name(name),
        _COMPATIBLE[compatible],
        None if parent in (None, "root") else parent,
        _ranges(name, cells),
        bool(default),
    )


def checked_name(name: str) -> str:
    """Return a domain's name. ``TypeError``, ``DeviceTreeError`` for what is none."""
    if not isinstance(name, str):
        raise TypeError(f"a domain's name is a string, not {name!r}")
    if not name.isprintable() or not 0 < len(name.encode()) < 32:
        raise DeviceTreeError(
            f"{name!r}: a domain's name is 1 to 31 printable bytes", node=name
        )
    return name


def _ranges(name: str, cells: list[Any]) -> frozenset[int]:
    whole = all(isinstance(n, int) and not isinstance(n, bool) for n in cells)
    if not whole or len(cells) % 2 or any(n < 0 for n in cells) or 0 in cells[1::2]:
        raise DeviceTreeError(
            f"{name}: reserved-ipi-vectors is pairs of a first hwirq and how many, not"
            f" {cells}",
            node=name,
        )
    if any(n > 4096 for n in cells):
        raise DeviceTreeError(
            f"{name}: no controller has hwirq {max(cells)}", node=name
        )
    lines: set[int] = set()
    for first, count in zip(cells[::2], cells[1::2], strict=True):
        lines.update(range(first, first + count))
    return frozenset(lines)


_TOKEN: Final = re.compile(
    r"\s+|//[^\n]*|/\*.*?\*/"
    r'|(?P<string>"[^"\n]*")|(?P<number>0[xX][0-9a-fA-F]+\b|\d+\b(?![\w,-]))'
    r"|(?P<word>[A-Za-z_][\w,.+@-]*)|(?P<sign>[{}=;<>&:])|(?P<bad>.)",
    re.DOTALL,
)


def _parse_text(text: str) -> dict[str, dict[str, Any]]:
    tokens: list[tuple[str, str]] = []
    for match in _TOKEN.finditer(text):
        if match.lastgroup == "bad":
            line = text.count("\n", 0, match.start()) + 1
            raise DeviceTreeError(f"line {line}: {match[0]!r} means nothing here")
        if match.lastgroup:
            tokens.append((match.lastgroup, match[0]))
    reader = _Reader(tokens)
    nodes: dict[str, dict[str, Any]] = {}
    while reader.left:
        name = reader.word("a node's name")
        if name in nodes:
            raise DeviceTreeError(
                f"{name}: there are two nodes of this name", node=name
            )
        reader.node = name
        reader.sign("{")
        nodes[name] = reader.properties()
        reader.optional(";")
        reader.node = None
    return nodes


class _Reader:
    def __init__(self, tokens: list[tuple[str, str]]) -> None:
        self.left = tokens[::-1]
        self.node: str | None = None

    def next(self, wanted: str) -> tuple[str, str]:
        if not self.left:
            raise DeviceTreeError(
                f"the text ends where {wanted} belongs", node=self.node
            )
        return self.left.pop()

    def word(self, wanted: str) -> str:
        kind, text = self.next(wanted)
        if kind != "word":
            raise DeviceTreeError(
                f"{text} stands where {wanted} belongs", node=self.node
            )
        return text

    def sign(self, wanted: str) -> None:
        _, text = self.next(wanted)
        if text != wanted:
            raise DeviceTreeError(
                f"{text} stands where {wanted} belongs", node=self.node
            )

    def optional(self, sign: str) -> bool:
        if self.left and self.left[-1] == ("sign", sign):
            self.left.pop()
            return True
        return False

    def properties(self) -> dict[str, Any]:
        found: dict[str, Any] = {}
        while not self.optional("}"):
            key = self.word("a property or }")
            found[key] = self.value() if self.optional("=") else True
            self.sign(";")
        return found

    def value(self) -> Any:
        kind, text = self.next("a value")
        if kind == "string":
            return text[1:-1]
        if text == "&":
            return self.word("a node's name")
        if text != "<":
            raise DeviceTreeError(
                f'{text} is no value: write "text", <cells> or &node', node=self.node
            )
        if self.optional("&"):
            name = self.word("a node's name")
            self.sign(">")
            return name
        cells: list[int] = []
        while not self.optional(">"):
            kind, text = self.next("a number or >")
            if kind != "number":
                raise DeviceTreeError(f"{text} is no number", node=self.node)
            cells.append(int(text, 0))
        return cells


def check_tree(nodes: Iterable[DomainNode], chip: Chip, ncpus: int) -> None:
    """Raise ``DeviceTreeError`` for nodes that ``chip`` cannot have."""
    seen: dict[str, DomainNode] = {}
    lines_of: dict[str | None, set[int]] = {None: set(chip.irq_lines(ncpus))}
    default = ""
    for node in nodes:
        if node.name in seen or node.name in (root_name(chip), "root"):
            raise DeviceTreeError(
                f"{node.name}: there is a domain of this name already", node=node.name
            )
        node.flags(chip)
        if node.parent is not None and node.parent not in seen:
            raise DeviceTreeError(
                f"{node.name}: interrupt-parent {node.parent} is no node above it",
                node=node.name,
            )
        if node.parent is not None and not seen[node.parent].lines:
            raise DeviceTreeError(
                f"{node.name}: its interrupt-parent {node.parent} has no"
                " reserved-ipi-vectors of its own to give",
                node=node.name,
            )
        wrong = node.lines - lines_of[node.parent]
        if wrong:
            raise DeviceTreeError(
                f"{node.name}: hwirq {min(wrong)} is not {node.parent or chip.name}'s"
                " to give: it is no free line, or another domain's",
                node=node.name,
            )
        if node.default and default:
            raise DeviceTreeError(
                f"{node.name}: {default} is the default already", node=node.name
            )
        if node.default:
            default = node.name
        lines_of[node.parent] -= node.lines
        lines_of[node.name] = set(node.lines)
        seen[node.name] = node
