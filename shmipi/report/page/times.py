"""Times as a report writes them."""

from __future__ import annotations

__all__ = ["times"]


def times(ns: float) -> str:
    """Return a time for people, short: ``324 ns``, ``20.6 µs``."""
    for limit, unit, scale in ((1e3, "ns", 1.0), (1e6, "µs", 1e3), (1e9, "ms", 1e6)):
        if ns < limit * 0.9995:
            value = ns / scale
            if unit == "ns" and value >= 10:
                return f"{value:.0f} ns"
            return f"{_three(value)} {unit}"
    return f"{_three(ns / 1e9)} s"


def _three(value: float) -> str:
    """Return a number with three digits, without noughts behind the point."""
    digits = 0 if value >= 100 else 1 if value >= 10 else 2
    text = f"{value:.{digits}f}"
    return text.rstrip("0").rstrip(".") if "." in text else text
