"""How long calls wait for their CPU, read out of a live machine's trace rings.

From outside, by ``pread``, as all of an ``Inspector``: the rings are not drained, and
nobody is told. Only the newest records of each ring are looked at, so that a look costs
the same however much is recorded.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from shmipi.machine.inspect import Inspector
from shmipi.trace.events import RECORD, TraceEvent

__all__ = ["KEPT", "Quantiles", "Waits"]

#: Of each CPU the newest so many waits are what is spoken of.
KEPT: Final = 256
#: Records that one look takes, at most, of all rings; but of each at least so many.
_MOST: Final = 2048
_LEAST: Final = 32
#: The newest may be half written: the owner's own, and its handlers' on top of it.
_UNDER_WAY: Final = 8
_UNMATCHED: Final = 1024
_EVENTS: Final = (TraceEvent.csd_queue_cpu, TraceEvent.csd_function_entry)
_BITS: Final = sum(1 << event for event in _EVENTS)


@dataclass(frozen=True)
class Quantiles:
    """Of each CPU, in ns, from when a call was queued until its function began.

    Of the newest ``KEPT`` calls at most; NaN where there were none.
    """

    p50: NDArray[np.float64]
    p99: NDArray[np.float64]


class Waits:
    """Looks at a machine's rings now and then."""

    def __init__(self, inspector: Inspector) -> None:
        self._inspector = inspector
        self._ncpus = inspector.ncpus
        self._area = 0
        #: Of each slot: what was read, and what had been begun at the last look.
        self._done = self._seen = np.zeros(0, np.int64)
        self._open = np.zeros(0, _EVENT)
        self._kept = np.full((self._ncpus, KEPT), np.inf)
        self._count = np.zeros(self._ncpus, np.int64)

    def look(self) -> Quantiles | None:
        """Read what is new. None: nothing is recorded in this machine.

        Raises ``LayoutError`` as the inspector does.
        """
        rings = self._inspector.trace_rings()
        if rings is None or ~rings.events & _BITS:
            return None
        if rings.at != self._area:  # others than before: their positions begin anew
            self._area = rings.at
            self._done = self._seen = rings.heads()
            return self.quantiles()
        heads, seen = rings.heads(), self._seen
        self._seen = heads
        # What was half written at the last look is written by now, or never will be.
        until = np.where(heads == seen, heads, heads - _UNDER_WAY)
        slots = np.flatnonzero(until > self._done)
        most = max(_LEAST, _MOST // max(1, len(slots)))
        first = np.maximum(self._done, until - most)
        data = b"".join(
            rings.records(slot, int(first[slot]), int(until[slot]))
            for slot in slots.tolist()
        )
        self._done = np.maximum(self._done, until)
        # What was overwritten while it was copied is older than a ring by now.
        oldest = rings.heads() - rings.size
        counts = (until - first)[slots]
        whose = np.repeat(slots, counts)
        positions = np.arange(len(whose)) + np.repeat(
            first[slots] - np.cumsum(counts) + counts, counts
        )
        records = np.frombuffer(data, RECORD)
        events = _events(whose, positions, records, oldest)
        self._match(np.concatenate([self._open, events]), rings.ns_per_stamp)
        return self.quantiles()

    def kept(self, cpu: int) -> int:
        """Return of how many calls to a CPU is known how long they waited."""
        return min(KEPT, int(self._count[cpu]))

    def _match(self, events: NDArray[np.void], ns_per_stamp: float) -> None:
        """Pair each begin of a function with the queueing of its csd before it."""
        events = events[np.lexsort((events["stamp"], events["csd"]))]
        before, after = events[:-1], events[1:]
        pairs = (
            (before["csd"] == after["csd"])
            & (before["cpu"] == after["cpu"])
            & ~before["entry"]
            & after["entry"]
        )
        passed = (after["stamp"] - before["stamp"])[pairs]
        cpus = after["cpu"][pairs]
        # What was queued again since has run without having been seen.
        last = np.ones(len(events), bool)
        last[:-1] = before["csd"] != after["csd"]
        self._open = events[last & ~events["entry"]]
        if len(self._open) > _UNMATCHED:
            newest = np.argsort(self._open["stamp"])[-_UNMATCHED:]
            self._open = self._open[newest]
        self._keep(cpus, passed * ns_per_stamp)

    def _keep(self, cpus: NDArray[np.uint16], ns: NDArray[np.float64]) -> None:
        """Put each in the place of its CPU's oldest."""
        known = cpus < self._ncpus
        order = np.argsort(cpus[known], kind="stable")
        cpus, ns = cpus[known][order].astype(np.int64), ns[known][order]
        more = np.bincount(cpus, minlength=self._ncpus)
        place = np.arange(len(cpus)) - np.repeat(np.cumsum(more) - more, more)
        self._kept[cpus, (self._count[cpus] + place) % KEPT] = ns
        self._count += more

    def quantiles(self) -> Quantiles:
        """Return those of what was read: the smallest with at least that share."""
        ordered = np.sort(self._kept, axis=1)  # those that are not there are last
        counts = np.minimum(self._count, KEPT)
        nothing = counts == 0
        found = []
        for share in (0.5, 0.99):
            at = np.maximum(np.ceil(share * counts).astype(np.int64) - 1, 0)
            values = ordered[np.arange(len(counts)), at]
            found.append(np.where(nothing, math.nan, values))
        return Quantiles(*found)


_EVENT: Final = np.dtype(
    [("csd", "u4"), ("cpu", "u2"), ("entry", "?"), ("stamp", "u8")]
)


def _events(
    slots: NDArray[np.int64],
    positions: NDArray[np.int64],
    records: NDArray[np.void],
    oldest: NDArray[np.int64],
) -> NDArray[np.void]:
    """Return what of the records is of calls, and whole; each has its slot."""
    kinds = records["event"]
    entered = kinds == _EVENTS[1]
    wanted = (
        ((kinds == _EVENTS[0]) | entered)
        & (records["csd"] != 0)
        & (records["seq"] == ((positions + 1) & 0xFFFFFFFF))
        & (positions >= oldest[slots])
    )
    chosen = records[wanted]
    found = np.empty(len(chosen), _EVENT)
    found["csd"], found["stamp"] = chosen["csd"], chosen["stamp"]
    found["entry"] = entered[wanted]
    found["cpu"] = np.where(found["entry"], slots[wanted], chosen["cpu"])
    return found
