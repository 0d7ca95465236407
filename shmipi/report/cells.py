"""The cells of the tables that ``shmipi bench`` prints: times, percentiles, notes."""

from __future__ import annotations

from typing import Any, Final, TypeAlias

__all__ = [
    "PERCENTILES",
    "Cells",
    "Table",
    "percentiles",
    "ratio",
    "span",
    "valid",
    "valid_for",
]

Cells: TypeAlias = list[str]
#: A header, the rows under it, and the lines below.
Table: TypeAlias = tuple[Cells, list[Cells], list[str]]

PERCENTILES: Final = ("p50", "p90", "p99", "p99.9", "max")


def span(ns: float | None) -> str:
    """Return a time in the unit that suits it, three digits or so."""
    if ns is None:
        return "-"
    for limit, unit, scale in ((1e3, "ns", 1), (1e6, "us", 1e3), (1e9, "ms", 1e6)):
        if ns < limit:
            value = ns / scale
            return f"{value:.0f} {unit}" if unit == "ns" else f"{value:.3g} {unit}"
    return f"{ns / 1e9:.3g} s"


def percentiles(stats: dict[str, float]) -> Cells:
    """Return the cells of ``PERCENTILES``."""
    return [span(stats[key]) for key in ("p50", "p90", "p99", "p999", "max")]


def ratio(row: dict[str, Any], name: str) -> str:
    """Return a ratio of the row with its spread."""
    if row[name] is None:
        return "-"
    low, high = row[f"{name}_spread"]
    return f"{row[name]:.2f} ({low:.2f}-{high:.2f})"


def valid(row: dict[str, Any], notes: list[str], name: str) -> str:
    """Return yes, or no and the number of the note that says why."""
    if row.get("valid", True):
        return "yes"
    why = "; ".join(dict.fromkeys(row["why"]))
    notes.append(f"[{len(notes) + 1}] {name} is not valid: {why}")
    return f"no [{len(notes)}]"


def valid_for(row: dict[str, Any], notes: list[str]) -> str:
    """Do as ``valid`` where many rows have one reason: it is noted once."""
    if row.get("valid", True):
        return "yes"
    why = f"not valid: {'; '.join(dict.fromkeys(row['why']))}"
    for number, note in enumerate(notes, start=1):
        if note == f"[{number}] {why}":
            return f"no [{number}]"
    notes.append(f"[{len(notes) + 1}] {why}")
    return f"no [{len(notes)}]"
