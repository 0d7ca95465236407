"""What the Python side knows of an interrupt controller."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Chip", "Row"]


@dataclass(frozen=True)
class Row:
    """A line of ``/proc/interrupts``: its label, the counters it sums, its words."""

    label: str
    counters: tuple[str, ...]
    text: str


@dataclass(frozen=True)
class Chip:
    """An interrupt controller: the core's chip object of this name does the work.

    ``lines`` are the interrupt lines it uses by the kernel's name; ``rows`` what
    ``cluster.interrupts()`` prints.
    """

    name: str
    description: str
    max_cpus: int
    lines: dict[str, int]
    rows: tuple[Row, ...]
