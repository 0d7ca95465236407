"""What ``shmipi bench`` writes for other programs: CSV, Markdown, percentile tables."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from shmipi.errors import CommandError

__all__ = ["as_csv", "as_markdown", "distributions", "name_of", "write_hgrm"]

#: Numbers that say which row it is; all words do.
NAMES: Final = frozenset(
    (
        *("ncpus", "cpus", "pages", "senders", "sender_core", "target_core"),
        *("gap_us", "rate"),
    )
)
#: Words of a row that say how it was, not which.
NO_NAMES: Final = frozenset(("fastest", "bench", "real_ipis_note", "version"))


def name_of(row: dict[str, Any]) -> str:
    """Return what tells a row from the others of its document."""
    words = (
        str(value) if isinstance(value, str) else f"{name} {value}"
        for name, value in row.items()
        if (isinstance(value, str) and name not in NO_NAMES) or name in NAMES
    )
    return " ".join(words)


def distributions(row: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Return each distribution of a row with its key; "" where the row is one."""
    if "p50" in row and "hist" in row:
        yield "", row
    for key, value in row.items():
        if isinstance(value, dict) and "p50" in value and "hist" in value:
            yield key, value


def as_csv(document: dict[str, Any]) -> str:
    """Return the rows as CSV, the limits after them; what a row has not is empty.

    A distribution is a column for each of its figures, ``rtt_ns.p50`` for example.
    """
    rows = [_flat(row) for row in document["rows"]]
    rows += [
        {"limit": name, **_flat(limit)}
        for name, limit in (document.get("limits") or {}).items()
    ]
    header = list(dict.fromkeys(key for row in rows for key in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, header, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def _flat(row: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in row.items():
        if key == "hist":
            continue
        if isinstance(value, dict):
            for inner, each in _flat(value).items():
                found[f"{key}.{inner}"] = each
        elif isinstance(value, list):
            found[key] = "; ".join(map(str, value))
        else:
            found[key] = value
    return found


def as_markdown(header: list[str], rows: list[list[str]], notes: list[str]) -> str:
    """Return a bench's table in Markdown, its notes below."""
    lines = [_line(header), _line(["---"] * len(header))]
    lines += [_line(row) for row in rows]
    if notes:
        lines += ["", *(f"- {note.strip()}" for note in notes if note.strip())]
    return "\n".join(lines) + "\n"


def _line(cells: list[str]) -> str:
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


def write_hgrm(document: dict[str, Any], folder: str | Path) -> list[Path]:
    """Write each distribution's percentiles, in us, as HdrHistogram's ``.hgrm``.

    A file for each in ``folder``, which is made; returns them. ``CommandError`` where
    they cannot be written.
    """
    from hdrh.histogram import HdrHistogram

    folder = Path(folder)
    written: list[Path] = []
    rows = [(name_of(row), row) for row in document["rows"]]
    rows += [
        (f"limit {name}", limit)
        for name, limit in (document.get("limits") or {}).items()
    ]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, row in rows:
            for key, one in distributions(row):
                stem = f"{document['bench']} {name} {key}".strip()
                stem = re.sub(r"[^\w.-]+", "-", stem).strip("-")
                path = folder / f"{stem}.hgrm"
                for number in range(2, 1000):
                    if path not in written:
                        break
                    path = folder / f"{stem}.{number}.hgrm"
                with path.open("wb") as file:
                    hist = HdrHistogram.decode(one["hist"])
                    hist.output_percentile_distribution(file, 1000.0)
                written.append(path)
    except OSError as error:
        raise CommandError(f"cannot write {folder}: {error.strerror}") from None
    return written
