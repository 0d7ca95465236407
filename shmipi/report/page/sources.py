"""The documents that are reported, compared and checked: files, and directories."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from shmipi.errors import CommandError
from shmipi.names import BENCHES
from shmipi.report import compare

__all__ = ["REPLAY", "Recorded", "documents", "missing", "recorded"]

#: What `shmipi replay --json` writes.
REPLAY: Final = "shmipi.replay/1"
_BENCH: Final = "shmipi.bench/1"
_LISTING: Final = "all.json"  # of `shmipi bench all`


def documents(paths: Sequence[str | Path]) -> list[dict[str, Any]]:
    """Return the documents of files and directories, in the order of the benches.

    Those of `shmipi bench`, and of `shmipi replay` after them, each of which is one row
    that its trace names. Of a directory all that are such, other JSON there is left
    alone. Raises ``CommandError``, status 2: a file that is no such document, a
    directory without.
    """
    found: list[dict[str, Any]] = []
    for path in map(Path, paths):
        if path.is_dir():
            found += [_load(file) for file in _inside(path, (_BENCH, REPLAY))]
        else:
            found.append(_load(path))
    order = list(BENCHES)
    return sorted(found, key=lambda one: _place(str(one.get("bench")), order))


def missing(paths: Sequence[str | Path]) -> list[str]:
    """Return what directories of `shmipi bench all` lack, a sentence each."""
    return [
        f"{name} is missing: {why}"
        for path in map(Path, paths)
        if path.is_dir()
        for name, why in _listed(path)
    ]


@dataclass(frozen=True)
class Recorded:
    """The documents of a file or a directory, by bench.

    ``several`` says that it is a directory, ``missing`` why a bench is not in it.
    """

    path: Path
    documents: dict[str, dict[str, Any]]
    several: bool = False
    missing: dict[str, str] = field(default_factory=dict)


def recorded(path: str | Path) -> Recorded:
    """Read the document of a bench, or a directory with one of each.

    Raises ``CommandError``, status 2, also for two documents of one bench.
    """
    path = Path(path)
    if not path.is_dir():
        document = compare.load(path)
        return Recorded(path, {str(document.get("bench")): document})
    found: dict[str, dict[str, Any]] = {}
    files: dict[str, Path] = {}
    for file in _inside(path, (_BENCH,)):
        document = compare.load(file)
        bench = str(document.get("bench"))
        if bench in found:
            raise CommandError(
                f"{path} has two documents of bench {bench}: {files[bench].name} and"
                f" {file.name}",
                status=2,
            )
        found[bench], files[bench] = document, file
    order = list(BENCHES)
    ordered = sorted(found.items(), key=lambda one: _place(one[0], order))
    return Recorded(path, dict(ordered), True, dict(_listed(path)))


def _place(bench: str, order: Sequence[str]) -> int:
    return order.index(bench) if bench in order else len(order)


def _inside(folder: Path, schemas: Sequence[str]) -> list[Path]:
    files = [file for file in sorted(folder.glob("*.json")) if _schema(file) in schemas]
    if not files:
        raise CommandError(
            f"{folder}: no document of `shmipi bench` in it (*.json)", status=2
        )
    return files


def _schema(file: Path) -> str | None:
    found = _json(file)
    return str(found.get("schema")) if isinstance(found, dict) else None


def _json(file: Path) -> Any:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def _listed(folder: Path) -> Iterator[tuple[str, str]]:
    """Yield each bench that the list of a directory says is missing, and why."""
    found = _json(folder / _LISTING)
    benches = found.get("benches") if isinstance(found, dict) else None
    if not isinstance(benches, dict):
        return
    for name, entry in benches.items():
        if isinstance(entry, dict) and "missing" in entry:
            yield str(name), str(entry["missing"])


def _load(path: Path) -> dict[str, Any]:
    if _schema(path) != REPLAY:
        return compare.load(path)
    found: dict[str, Any] = _json(path)
    sides = [found.get("kernel"), found.get("replay"), found.get("machine")]
    if not all(isinstance(side, dict) for side in sides):
        raise CommandError(f"{path}: a document of `shmipi replay`, damaged", status=2)
    row = {key: found[key] for key in ("file", "valid", "why") if key in found}
    return {**found, "bench": "replay", "rows": [row]}
