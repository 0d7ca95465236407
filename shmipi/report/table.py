"""Tables for people: whole on every terminal, and in a file."""

from __future__ import annotations

import os
import re
import textwrap
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TextIO

__all__ = ["Listing", "Text", "can_redraw", "columns_of", "folded", "write"]

#: A line and its style, a name that rich knows, or "".
Text = tuple[str, str]

_GAP = "  "
_LEAST = 8  # columns that a wrapped cell gets, however narrow the terminal


def columns_of(stream: TextIO) -> int | None:
    """Return how long a line may be; None: as long as it gets.

    $COLUMNS says it for everything. Else a terminal has its width, and a file or a pipe
    has none: what a program reads is not folded.
    """
    given = os.environ.get("COLUMNS", "")
    if given.isascii() and given.isdigit() and 0 < len(given) < 6 and int(given):
        return int(given)
    try:
        return os.get_terminal_size(stream.fileno()).columns or 80
    except (OSError, ValueError):
        return None


def can_redraw(stream: TextIO) -> bool:
    """Is it a terminal where what was printed can be printed over?"""
    return stream.isatty() and os.environ.get("TERM", "") not in ("", "dumb", "unknown")


def write(lines: Sequence[Text], stream: TextIO) -> None:
    """Print lines, with their styles where that means something."""
    if can_redraw(stream):
        from rich.console import Console

        out = Console(file=stream)
        for text, style in lines:
            out.out(text, style=style or None, highlight=False)
        return
    for text, _ in lines:
        print(text, file=stream)


def folded(line: str, width: int | None) -> str:
    """Return a line of prose in lines of ``width``, under where its words begin."""
    if width is None or len(line) <= width:
        return line
    lead = re.match(r"\s*(\S+\s{2,}|\[\d+\] )?", line)
    indent = len(lead[0]) if lead and len(lead[0]) < width // 2 else 0
    return textwrap.fill(
        line, width, subsequent_indent=" " * indent, break_on_hyphens=False
    )


@dataclass
class Listing:
    """A table under a header. Columns named in ``right`` are right aligned.

    Where a line has no room for all columns, they are split into several tables, each
    of which begins with the first ``keys`` columns; where not even two fit side by
    side, each row becomes a block of lines. Nothing is ever cut.
    """

    columns: Sequence[str]
    right: Collection[str] = ()
    keys: int = 1
    title: str = ""
    rows: list[tuple[Sequence[str], str]] = field(default_factory=list)

    def add_row(self, *cells: str, style: str = "") -> None:
        """Add a row: a cell for each column."""
        self.rows.append((cells, style))

    def lines(self, width: int | None = None) -> list[Text]:
        """Return the table in lines of at most ``width`` characters."""
        groups = self._groups(width)
        title = [(self.title, "bold")] if self.title else []
        if groups is None:
            assert width is not None
            return title + list(self._blocks(width))
        lines: list[Text] = []
        for group in groups:
            lines += [("", "")] if lines else []
            lines += self._table(group)
        return title + lines

    def tables(self, width: int | None) -> int:
        """Return how many tables there are at ``width``, each with all rows."""
        groups = self._groups(width)
        return len(self.columns) if groups is None else len(groups)

    def _widths(self) -> list[int]:
        return [
            max([len(name), *(len(cells[i]) for cells, _ in self.rows)])
            for i, name in enumerate(self.columns)
        ]

    def _groups(self, width: int | None) -> list[list[int]] | None:
        """Return the columns of each table; None: there is no room for tables."""
        widths, everything = self._widths(), list(range(len(self.columns)))
        if width is None or _total(widths) <= width:
            return [everything]
        keys = self.keys
        while keys > 1 and _total(widths[:keys]) > width // 2:
            keys -= 1
        groups: list[list[int]] = []
        for column in everything[keys:]:
            if groups and _total(widths[i] for i in [*groups[-1], column]) <= width:
                groups[-1].append(column)
            else:
                groups.append([*everything[:keys], column])
                if _total(widths[i] for i in groups[-1]) > width:
                    return None
        return groups

    def _table(self, group: list[int]) -> Iterator[Text]:
        widths = self._widths()
        for cells, style in [(self.columns, "bold"), *self.rows]:
            padded = [
                cells[i].rjust(widths[i])
                if self.columns[i] in self.right
                else cells[i].ljust(widths[i])
                for i in group
            ]
            yield _GAP.join(padded).rstrip(), style

    def _blocks(self, width: int) -> Iterator[Text]:
        names = max(map(len, self.columns))
        room = max(_LEAST, width - names - len(_GAP))
        for number, (cells, style) in enumerate(self.rows):
            if number:
                yield "", ""
            for name, cell in zip(self.columns, cells, strict=True):
                first, *rest = textwrap.wrap(cell, room) or [""]
                yield f"{name:{names}}{_GAP}{first}".rstrip(), style
                for text in rest:
                    yield " " * names + _GAP + text, style


def _total(widths: Iterable[int]) -> int:
    listed = list(widths)
    return sum(listed) + len(_GAP) * (len(listed) - 1)
