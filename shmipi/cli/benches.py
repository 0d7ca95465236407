"""``shmipi bench all``: every bench, a document of each in one directory."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from shmipi.cli.options import save_json
from shmipi.errors import CommandError
from shmipi.names import BENCHES

if TYPE_CHECKING:
    from shmipi.cli import Parser

HELP = """\
Runs every bench with as many calls as fit into five minutes on two cores, and
writes what each found, and what `shmipi doctor` says, to a directory of its own. A
bench that fails, or that cannot be had here, is listed in all.json with the reason,
and the others go on. Ctrl-C leaves what is there, whole. `shmipi report`, `compare`
and `check` take such a directory. Exit status 1 where a bench is missing."""
EXAMPLE = """\
shmipi bench all --out before
shmipi bench all --out after && shmipi compare before after
shmipi bench all --out results --only latency,users"""

_DOCTOR: Final = "doctor"


def prepare_parser(parser: Parser) -> None:
    """Add the arguments of the command."""
    parser.describe(HELP, EXAMPLE)
    parser.add_argument(
        "--out",
        required=True,
        type=Path,
        metavar="DIR",
        help="where the documents go; made if it is not there",
    )
    parser.add_argument(
        "--only",
        type=_benches,
        default=tuple(BENCHES),
        metavar="LIST",
        help="only these benches, such as latency,users (default: all)",
    )
    parser.add_argument(
        "--force",
        action="store_true",
        help="remove first what an earlier one has left in DIR",
    )


def _benches(text: str) -> tuple[str, ...]:
    words = text.split(",")
    for word in words:
        if word not in BENCHES:
            raise argparse.ArgumentTypeError(
                f"{word[:40]!r} is not one of {', '.join(BENCHES)}"
            )
    return tuple(name for name in BENCHES if name in words)


def run(args: argparse.Namespace) -> int:
    """Measure all, write each, say what is missing."""
    from shmipi.bench import record
    from shmipi.bench.runner import Progress

    folder: Path = args.out
    _prepare(folder, args.force)
    plan = {name: part for name, part in record.PLAN.items() if name in args.only}
    seconds = sum(part.seconds for part in plan.values())
    print(f"{_several(len(plan), 'bench', 'es')}, {_about(seconds)}, to {folder}")
    progress = Progress("bench all")
    listing: dict[str, Any] = {}

    def save(name: str, content: dict[str, Any]) -> None:
        if name == record.LISTING:
            listing.update(content)
        save_json(folder / record.file_of(name), content)

    def told(name: str, entry: dict[str, Any]) -> None:
        progress.clear()
        words = entry.get("file") or f"missing: {entry['missing']}"
        print(f"{name:12} {entry['took_s']:5.1f} s  {words}", flush=True)

    try:
        save(_DOCTOR, _examined())
        found = record.run(save, plan=plan, progress=progress, told=told)
    except KeyboardInterrupt:
        progress.clear()
        _complain(listing, folder)
        raise
    finally:
        progress.clear()
    missing = _missing(found)
    there = len(plan) - len(missing)
    print(
        f"{_several(there, 'document')} in {folder} after {found['took_s']:.0f} s:"
        f" shmipi report {folder}"
    )
    _complain(found, folder)
    return 1 if missing else 0


def _complain(listing: dict[str, Any], folder: Path) -> None:
    missing = _missing(listing)
    if missing:
        print(
            f"shmipi bench all: {folder} lacks {', '.join(missing)} (all.json has the"
            " reasons)",
            file=sys.stderr,
        )


def _missing(listing: dict[str, Any]) -> list[str]:
    entries = listing.get("benches", {})
    return [name for name, entry in entries.items() if "missing" in entry]


def _several(number: int, what: str, more: str = "s") -> str:
    return f"{number} {what}{'' if number == 1 else more}"


def _about(seconds: float) -> str:
    if seconds < 90:
        return f"about {seconds:.0f} s"
    minutes, rest = divmod(round(seconds / 10) * 10, 60)
    return f"about {minutes} min" + (f" {rest} s" if rest else "")


def _examined() -> dict[str, Any]:
    from shmipi.cli.doctor import DEFAULT_CPUS, as_document
    from shmipi.machine.facts import gather
    from shmipi.report.doctor import examine

    facts = gather()
    return as_document(facts, examine(facts, DEFAULT_CPUS))


# ---- the directory -------------------------------------------------------------------


def _prepare(folder: Path, force: bool) -> None:
    """Make the directory, empty of documents. ``CommandError``, status 2."""
    try:
        folder.mkdir(exist_ok=True)
        there = sorted(folder.glob("*.json"))
    except OSError as error:
        raise CommandError(f"--out {folder}: {error.strerror}", status=2) from None
    if not there:
        return
    if not force:
        raise CommandError(
            f"{folder} has {_several(len(there), 'document')} already: --force replaces"
            " what an earlier `shmipi bench all` has left, or give another --out",
            status=2,
        )
    # A document that is not replaced would pass for one of this run.
    for file in there:
        if not _ours(file):
            raise CommandError(
                f"{folder} has {file.name}, which `shmipi bench all` has not written:"
                " give another --out",
                status=2,
            )
    for file in there:
        file.unlink()


def _ours(file: Path) -> bool:
    from shmipi.bench.record import LISTING, SCHEMA

    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    if not isinstance(found, dict):
        return False
    schema = found.get("schema")
    if file.stem in (LISTING, _DOCTOR):
        return schema in (SCHEMA, f"shmipi.{_DOCTOR}/1")
    return schema == "shmipi.bench/1" and file.stem == found.get("bench")
