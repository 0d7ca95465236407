"""Words for people."""

from __future__ import annotations

__all__ = ["count_of", "span"]


def span(seconds: float) -> str:
    """Return a time for people: ``12 s``, ``3 m 20 s``, ``2 h 5 m``, ``4 d 1 h``."""
    whole = int(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} m {whole % 60} s"
    if whole < 86400:
        return f"{whole // 3600} h {whole % 3600 // 60} m"
    return f"{whole // 86400} d {whole % 86400 // 3600} h"


def count_of(number: int, noun: str) -> str:
    """Return ``1 CPU``, ``2 CPUs``."""
    return f"{number} {noun}{'' if number == 1 else 's'}"
