"""A report as plain text: the same words, the tables, and histograms of letters."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, Final, TextIO

from shmipi.names import BENCHES
from shmipi.report import bench, replay
from shmipi.report.export import distributions, name_of
from shmipi.report.hist import Counts
from shmipi.report.page import html
from shmipi.report.page.rows import rows_of
from shmipi.report.page.sections import sections
from shmipi.report.page.times import times
from shmipi.report.table import columns_of, folded

__all__ = ["histograms", "render"]

_PER_OCTAVE: Final = 2
_BAR: Final = 40


def render(
    documents: Sequence[dict[str, Any]], stream: TextIO, missing: Sequence[str] = ()
) -> None:
    """Print the report: what it says first, then each document and its histograms.

    ``missing`` says what should be there and is not, a sentence each.
    """
    width = columns_of(stream)

    def say(text: str = "") -> None:
        print(folded(text, width), file=stream)

    found = sections(documents)
    say(html.title(found))
    say()
    say(html.finding(found).replace("**", ""))
    say()
    for name, words in html.facts(documents):
        say(f"{name:18}{words}")
    said = html.doubts(documents, missing)
    if said.everything:
        say()
        say(said.sentence)
        for text in said.everything:
            say(f"- {text}")
    for one in found:
        say()
        say(f"{one.bench}: {one.finding.replace('**', '')}")
        say()
        if one.bench in BENCHES:
            bench.tabulate(one.document, stream)
        elif one.bench == "replay":
            replay.render(one.document, stream)
        histograms(one.document, stream)


def histograms(
    document: dict[str, Any], stream: TextIO, *, everything: bool = False
) -> None:
    """Print a histogram of each row that has a distribution; letters, no control.

    Of a bench whose rows stand beside nothing, only with ``everything``.
    """
    width = columns_of(stream) or 100
    found = [(row.name, row.counts()) for row in rows_of(document)]
    if everything and not any(counts for _, counts in found):
        found = [
            (f"{name_of(row)} {key.removesuffix('_ns')}".strip(), Counts.of(one))
            for row in document["rows"]
            for key, one in distributions(row)
        ]
    for name, counts in found:
        if counts is not None and counts.steps:
            print(f"\n{name}: {counts.total:,} in all", file=stream)
            for line in lines(counts, width):
                print(line, file=stream)
    if everything and not any(counts for _, counts in found):
        print("\nno row has a distribution", file=stream)


def lines(counts: Counts, width: int) -> Iterator[str]:
    """Yield the lines of a histogram: from when, how many, and a bar of their share.

    Each is half an octave; empty ones in a row become one line of dots.
    """
    heights: dict[int, int] = {}
    for value, count in counts.steps:
        at = math.floor(math.log2(max(1, value)) * _PER_OCTAVE)
        heights[at] = heights.get(at, 0) + count
    most = max(heights.values())
    digits = max(len(f"{most:,}"), 5)
    room = max(8, min(_BAR, width - 10 - digits - 12))
    before = None
    for at in sorted(heights):
        if before is not None and at > before + 1:
            yield f"{'...':>9}"
        before = at
        count = heights[at]
        bar = "#" * max(1, round(room * count / most))
        share = 100 * count / counts.total
        from_ = times(2 ** (at / _PER_OCTAVE))
        yield f"{from_:>9} {count:>{digits},} {share:5.1f} % {bar}"
