"""Whether the clocks of two cores agree: without that nobody knows what one way takes.

A call is stamped where it is sent, where its handler is entered, and where its answer
is seen. The target's clock is ahead by no more than the way there seems to take, and
behind by no more than the way back: of all calls the shortest say most. Where zero is
not between these bounds the clocks are apart, and one-way figures are not given. Where
it is, a one-way figure may be wrong by the farther of the two.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from shmipi import _core
from shmipi.bench.hist import described

__all__ = ["Clocks"]


@dataclass
class Clocks:
    """By how much the target's clock is ahead of the sender's, in ns: from, to."""

    least: int | None = None
    most: int | None = None

    def add(self, bounds: tuple[int, int] | None) -> None:
        """Take what calls have shown: neither bound gets wider."""
        if bounds is not None:
            self.merge(Clocks(*bounds))

    def merge(self, other: Clocks) -> None:
        """Take what is known of the same two."""
        if other.least is None or other.most is None:
            return
        self.least = other.least if self.least is None else max(self.least, other.least)
        self.most = other.most if self.most is None else min(self.most, other.most)

    def reversed(self) -> Clocks:
        """Return the same from the target's side."""
        if self.least is None or self.most is None:
            return Clocks()
        return Clocks(-self.most, -self.least)

    @property
    def agree(self) -> bool:
        """Whether nothing shows that they are apart."""
        return (
            self.least is not None
            and self.most is not None
            and self.least <= 0 <= self.most
        )

    @property
    def error_ns(self) -> float | None:
        """How wrong a one-way figure may be; None where the clocks are apart."""
        if not self.agree or self.least is None or self.most is None:
            return None
        return float(max(self.most, -self.least))

    def one_way(self, hist: _core.Hist) -> dict[str, Any]:
        """Return a row's fields of a one-way distribution, and what is known of it."""
        bounds = None if self.least is None else [self.least, self.most]
        found: dict[str, Any] = {
            "one_way_ns": described(hist) if self.agree and hist.count else None,
            "one_way_error_ns": self.error_ns,
            "clock_offset_ns": bounds,
        }
        if bounds is not None and not self.agree:
            found["one_way_note"] = (
                "the clocks of the two cores are apart: that of the target is ahead by"
                f" {self.least} to {self.most} ns"
            )
        return found
