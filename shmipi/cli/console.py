"""Tables for people, the same on a terminal and in a file."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

__all__ = ["console", "count_of", "span", "table"]

_WIDE = 100_000


def console(stream: TextIO | None = None) -> Console:
    """Return a console on ``stream`` (default: standard output), without highlighting.

    It never cuts a table: a terminal that is too narrow folds the line itself.
    """
    from rich.console import Console

    stream = stream or sys.stdout
    return Console(file=stream, width=_WIDE, highlight=False, markup=False)


def table(*columns: str, right: str = "", title: str | None = None) -> Table:
    """Make a plain table; columns named in ``right`` (words) are right aligned."""
    from rich.table import Table

    made = Table(
        box=None,
        pad_edge=False,
        padding=(0, 2, 0, 0),
        header_style="bold",
        title=title,
        title_justify="left",
        title_style="bold",
    )
    numbers = set(right.split())
    for name in columns:
        made.add_column(
            name, justify="right" if name in numbers else "left", no_wrap=True
        )
    return made


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
