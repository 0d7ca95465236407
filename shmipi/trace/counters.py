"""The counters of a machine: one copy per context, summed by readers."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Iterator, Sequence
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from shmipi import _core
from shmipi.machine.inspect import (
    IrqView,
    RowView,
    header_of,
    irq_area_bytes,
    irq_views,
    row_views,
)

__all__ = ["Counters", "InterruptRow", "as_text", "interrupt_rows", "interrupts"]

_OWNERS = 2  # slots behind the CPUs: the host that booted, the firmware


class Counters:
    """Reads the counters of all slots of a machine; never writes.

    Each slot keeps a row per context (task, irq, NMI) so that an interrupt never writes
    a word its task was adding to; what is read here is their sum.
    """

    _irqs: Callable[[], list[IrqView]]

    def __init__(self, machine: _core.Machine) -> None:
        self._ncpus = machine.ncpus
        # The owner's slot and its firmware's; an attached host's own.
        own = slice(machine.id, machine.id + 1)
        owner = slice(self._ncpus, self._ncpus + _OWNERS)
        self._hosts = own if machine.id >= owner.stop else owner
        self._rows: NDArray[np.uint64] = np.ndarray(
            (machine.nslots, _core.CONTEXTS, _core.COUNTER_ROOM),
            np.uint64,
            memoryview(machine),
            machine.slot_offset + _core.COUNTER_OFFSET,
            (_core.SLOT_BYTES, _core.COUNTER_ROOM * 8, 8),
        )
        self._interrupts: NDArray[np.uint64] = np.ndarray(
            (machine.nslots, _core.NROWS),
            np.uint64,
            memoryview(machine),
            machine.slot_offset + _core.ROWS_OFFSET,
            (_core.SLOT_BYTES, 8),
        )
        self._row_views = row_views(header_of(machine))
        memory, ncpus = memoryview(machine), machine.ncpus
        start, size = machine.irq_offset, irq_area_bytes(ncpus)
        self._irqs = lambda: irq_views(bytes(memory[start : start + size]), ncpus)

    @classmethod
    def of_rows(
        cls,
        rows: NDArray[np.uint64],
        ncpus: int,
        interrupts: NDArray[np.uint64],
        row_views: list[RowView],
        irqs: Sequence[IrqView] = (),
    ) -> Counters:
        """Read counts that were taken before.

        ``rows`` has shape (slots, contexts, counters), ``interrupts`` (slots, rows),
        ``irqs`` the requested irqs.
        """
        self = cls.__new__(cls)
        self._ncpus, self._rows = ncpus, rows
        self._hosts = slice(ncpus, ncpus + _OWNERS)
        self._interrupts, self._row_views = interrupts, row_views
        self._irqs = lambda: list(irqs)
        return self

    @property
    def ncpus(self) -> int:
        """How many CPUs are counted."""
        return self._ncpus

    def irqs(self) -> list[tuple[str, str, NDArray[np.uint64]]]:
        """Return the requested irqs: virq, words, counts of shape (ncpus,)."""
        return [(str(view.virq), view.text, view.counts) for view in self._irqs()]

    def interrupts(self) -> list[tuple[str, str, NDArray[np.uint64]]]:
        """Return the controller's rows: label, words, counts of shape (ncpus,)."""
        total = self._sum()
        return [
            (
                row.label,
                row.text,
                (
                    self._interrupts[: self._ncpus, number]
                    if row.counter is None
                    else total[: self._ncpus, row.counter]
                ).copy(),
            )
            for number, row in enumerate(self._row_views)
        ]

    def _sum(self) -> NDArray[np.uint64]:
        total: NDArray[np.uint64] = self._rows.sum(axis=1, dtype=np.uint64)
        return total

    def cpus(self) -> dict[str, NDArray[np.uint64]]:
        """Return each counter as an array of shape (ncpus,)."""
        total = self._sum()
        return {
            name: total[: self._ncpus, i].copy()
            for i, name in enumerate(_core.COUNTERS)
        }

    def host(self) -> dict[str, int]:
        """Return what the host (and its firmware, when it reaps) counted."""
        total = self._sum()[self._hosts].sum(axis=0)
        return {name: int(total[i]) for i, name in enumerate(_core.COUNTERS)}


#: A row of interrupts: label, words, counts of shape (CPUs,).
InterruptRow: TypeAlias = tuple[str, str, NDArray[np.uint64]]


def interrupt_rows(counters: Counters) -> list[InterruptRow]:
    """Return what ``interrupts`` shows, in its order."""
    now = counters.cpus()
    rows = counters.irqs() + counters.interrupts()
    tlb = ("TLB", "TLB shootdowns", now["irq_tlb"])
    if all(label != "TLB" for label, _, _ in rows):
        rows.append(tlb)
    return [
        *rows,
        ("ELI", "Calls sent without interrupt, target polling", now["elided"]),
        ("COA", "Calls sent without interrupt, queue not empty", now["coalesced"]),
        ("WAK", "Doorbells taken while halted", now["doorbells_received"]),
        ("KIC", "Kick signals taken while running", now["kicks_received"]),
        ("BAD", "Interrupts that nobody handled", now["irq_other"]),
    ]


def interrupts(counters: Counters) -> str:
    """Return the counts in the shape of ``/proc/interrupts``.

    Requested irqs first, by number, then the controller's rows. Calls that needed no
    interrupt because the target was polling are in a row of their own (``ELI``), never
    in those; so are coalesced ones (``COA``), which the CPU that sent them counts.
    """
    return as_text(interrupt_rows(counters), range(counters.ncpus))


def as_text(
    rows: Sequence[InterruptRow], cpus: Sequence[int], width: int | None = None
) -> str:
    """Return rows of interrupts as text; ``cpus`` are the numbers of their columns.

    Where lines of ``width`` characters are too short for it, the CPUs stand in several
    tables below each other, and what the rows are is said once, behind them.
    """
    first = max([3, *(len(label) for label, _, _ in rows)])
    cell = max([10, *(len(str(n)) for _, _, row in rows for n in row.tolist())]) + 1
    words = max((len(text) for _, text, _ in rows), default=0)
    whole = first + 1 + len(cpus) * cell + 3 + words
    if width is None or whole <= width:
        return "".join(_block(rows, cpus, first, cell, slice(None), words=True))
    many = max(1, (width - first - 1) // cell)
    blocks = [
        "".join(_block(rows, cpus, first, cell, slice(at, at + many), words=False))
        for at in range(0, len(cpus), many)
    ]
    legend = [
        textwrap.fill(
            text,
            max(width, first + 20),
            initial_indent=f"{label:>{first}}: ",
            subsequent_indent=" " * (first + 2),
        )
        for label, text, _ in rows
    ]
    return "\n".join([*blocks, "\n".join(legend) + "\n" if legend else ""])


def _block(
    rows: Sequence[InterruptRow],
    cpus: Sequence[int],
    first: int,
    cell: int,
    part: slice,
    *,
    words: bool,
) -> Iterator[str]:
    header = "".join(f"{f'CPU{n}':>{cell}}" for n in cpus[part])
    yield f"{'':{first + 1}}{header}\n"
    for label, text, row in rows:
        counts = "".join(f"{int(n):>{cell}}" for n in row[part])
        behind = f"   {text}" if words else ""
        yield f"{label:>{first}}:{counts}{behind}\n"
