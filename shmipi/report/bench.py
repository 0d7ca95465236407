"""The results of ``shmipi bench`` for people: a table, on a terminal or as text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TextIO

from shmipi.bench import registry
from shmipi.report.cells import Cells
from shmipi.report.table import Listing, columns_of, folded, write

__all__ = ["render", "table", "tabulate"]


def render(result: dict[str, Any], stream: TextIO) -> None:
    """Print the document of a ``bench`` command."""
    machine = result["machine"]
    width = columns_of(stream)

    def say(text: str) -> None:
        print(folded(text, width), file=stream)

    say(
        f"{machine['cpu_model']}, {machine['cores']} usable,"
        f" {machine['kernel']}, {machine['python']}"
    )
    if "timer_ns" in result:
        gap = f"; pause {result['gap_us']:g} us" if "gap_us" in result else ""
        say(
            f"a stamp ({result['clock']}) costs {result['timer_ns']:.0f} ns, which is"
            f" not subtracted{gap}; gc is off on the CPUs"
        )
    print(file=stream)
    tabulate(result, stream)


def tabulate(result: dict[str, Any], stream: TextIO) -> None:
    """Print the rows of a document and what is noted below them."""
    header, rows, notes = registry.load(result["bench"]).table(result)
    table(header, rows, stream)
    for note in notes:
        print(folded(note, columns_of(stream)), file=stream)


def table(header: Sequence[str], rows: Sequence[Cells], stream: TextIO) -> None:
    """Print rows under a header: numbers to the right, words to the left."""
    numeric = [
        all(_is_number(row[column]) for row in rows) for column in range(len(header))
    ]
    listing = Listing(
        header,
        right=[name for name, right in zip(header, numeric, strict=True) if right],
        keys=max(1, numeric.index(True)) if any(numeric) else 1,
    )
    for row in rows:
        listing.add_row(*row, style="yellow" if row[-1].startswith("no") else "")
    write(listing.lines(columns_of(stream)), stream)


def _is_number(text: str) -> bool:
    return not text or text == "-" or text[0].isdigit()
