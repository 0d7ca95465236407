"""The counters of a machine: one copy per context, summed by readers."""

from __future__ import annotations

from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from shmipi import _core
from shmipi.irq.chips import CHIPS

__all__ = ["Counters", "CountersOf", "interrupts"]


class CountersOf(Protocol):
    """What the counts are of: a machine of this process, or an inspector of one."""

    @property
    def ncpus(self) -> int:
        """How many CPUs it has."""

    @property
    def chip(self) -> str:
        """The name of its interrupt controller."""


class Counters:
    """Reads the counters of all slots of a machine; never writes.

    Each slot keeps a row per context (task, irq, NMI) so that an interrupt never writes
    a word its task was adding to; what is read here is their sum.
    """

    def __init__(self, machine: _core.Machine) -> None:
        self._ncpus = machine.ncpus
        self._rows: NDArray[np.uint64] = np.ndarray(
            (machine.nslots, _core.CONTEXTS, _core.COUNTER_ROOM),
            np.uint64,
            memoryview(machine),
            machine.slot_offset + _core.COUNTER_OFFSET,
            (_core.SLOT_BYTES, _core.COUNTER_ROOM * 8, 8),
        )

    @classmethod
    def of_rows(cls, rows: NDArray[np.uint64], ncpus: int) -> Counters:
        """Read counts that were taken before: shape (slots, contexts, counters)."""
        self = cls.__new__(cls)
        self._ncpus, self._rows = ncpus, rows
        return self

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
        """Return what the host (and the firmware, when it reaps) counted."""
        total = self._sum()[self._ncpus :].sum(axis=0)
        return {name: int(total[i]) for i, name in enumerate(_core.COUNTERS)}


def interrupts(machine: CountersOf, counters: Counters) -> str:
    """Return the counts in the shape of ``/proc/interrupts``.

    Calls that needed no interrupt because the target was polling are in a row of their
    own (``ELI``), never in the controller's rows; so are coalesced ones (``COA``),
    which the CPU that sent them counts.
    """
    now = counters.cpus()
    zero = np.zeros(machine.ncpus, np.uint64)
    rows = [
        (row.label, sum((now[name] for name in row.counters), zero), row.text)
        for row in CHIPS[machine.chip].rows
    ]
    rows += [
        ("ELI", now["elided"], "Calls sent without interrupt, target polling"),
        ("COA", now["coalesced"], "Calls sent without interrupt, queue not empty"),
        ("DBL", now["doorbells_received"], "Doorbells taken while halted"),
        ("KIC", now["kicks_received"], "Kick signals taken while running"),
    ]
    width = max(10, *(len(str(n)) for _, row, _ in rows for n in row.tolist()))
    header = "".join(f"{f'CPU{cpu}':>{width + 1}}" for cpu in range(machine.ncpus))
    lines = [" " * 4 + header]
    for label, row, text in rows:
        counts = "".join(f"{int(n):>{width + 1}}" for n in row)
        lines.append(f"{label:>3}:{counts}   {text}")
    return "\n".join(lines) + "\n"
