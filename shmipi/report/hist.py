"""The distributions of a document: what was counted, quantile by quantile."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Self

from shmipi.errors import CommandError

__all__ = ["Counts"]


@lru_cache(maxsize=1024)
def _decoded(text: str) -> tuple[tuple[int, int], ...]:
    import numpy as np
    from hdrh.histogram import HdrHistogram

    try:
        hist = HdrHistogram.decode(text)
    except Exception:  # what it raises for a damaged one is no one type
        raise CommandError("a histogram in it is damaged", status=2) from None
    # Its own iterator looks at every bucket there is, which takes 0.1 s.
    counts = np.ctypeslib.as_array(hist.counts)
    return tuple(
        (
            int(hist.get_highest_equivalent_value(hist.get_value_from_index(at))),
            int(counts[at]),
        )
        for at in np.flatnonzero(counts).tolist()
    )


@dataclass(frozen=True)
class Counts:
    """What a distribution counted: (value in ns, how often), the lowest value first."""

    steps: tuple[tuple[int, int], ...]

    @classmethod
    def of(cls, times: dict[str, Any]) -> Self:
        """Decode the ``hist`` of a distribution. ``CommandError`` for a damaged one."""
        return cls(_decoded(times["hist"]))

    @property
    def total(self) -> int:
        """How many values were counted."""
        return sum(count for _, count in self.steps)

    def shares(self) -> list[tuple[int, float]]:
        """Return each value with the share of all values up to it, the last 1."""
        total, below = self.total, 0
        found = []
        for value, count in self.steps:
            below += count
            found.append((value, below / total))
        return found
