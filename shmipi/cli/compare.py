"""``shmipi compare``: two runs of a bench beside each other."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self, TextIO, TypeAlias

from shmipi.cli.options import add_json_option, document, human_stream, write_json
from shmipi.errors import CommandError

if TYPE_CHECKING:
    from shmipi.report.compare import Change
    from shmipi.report.page.sources import Recorded

__all__ = ["percent", "show", "worse"]

HELP = """\
Compares what two runs of a bench wrote with --json: each figure before and after, and
whether the change is more than chance. Blocks of a row that was timed in turn with its
limit are compared as ratios to it, so that what the computer did meanwhile drops out.
Runs of different computers, cores or options are refused. Directories (`shmipi bench
all`) are compared bench by bench. Exit status 1 when a figure got worse by more than
--fail-above and not by chance."""
EXAMPLE = """\
shmipi compare before.json after.json
shmipi compare before.json after.json --fail-above 5
shmipi compare before/ after/"""


def prepare_parser(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command."""
    parser.add_argument(
        "before", metavar="BEFORE", help="the first document, or directory"
    )
    parser.add_argument("after", metavar="AFTER", help="the second one")
    parser.add_argument(
        "--force", action="store_true", help="also where they differ in more"
    )
    parser.add_argument(
        "--fail-above",
        type=percent,
        metavar="PCT",
        help="exit with 1 if a figure is worse by more than PCT percent, and not by"
        " chance",
    )
    add_json_option(parser)


def percent(text: str) -> float:
    """Return what ``--fail-above`` gave: a number, 0 or more."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < 1e6:
        raise argparse.ArgumentTypeError(f"{text[:40]!r} is no percentage, 0 or more")
    return value


def run(args: argparse.Namespace) -> int:
    """Read both, compare, print."""
    from shmipi.report.page.sources import recorded

    before, after = recorded(args.before), recorded(args.after)
    several = before.several or after.several
    pairs = _pairs(before, after)
    differences = _differences(pairs, several)
    if differences and not args.force:
        more = f" and {len(differences) - 3} more" if len(differences) > 3 else ""
        raise CommandError(
            f"they cannot be compared: {'; '.join(differences[:3])}{more} (--force)",
            status=2,
        )
    parts = [_Part.of(*pair, args.fail_above) for pair in pairs]
    if not any(part.changes for part in parts):
        raise CommandError("they have no row in common", status=2)
    alone = _alone(before, after) if several else []
    for text in [*differences, *alone]:
        print(f"warning: {text}", file=sys.stderr)
    if args.json != "-":
        _show_all(parts, several, human_stream(args))
    write_json(args.json, _document(parts, differences, alone, several))
    return 1 if any(part.failed for part in parts) else 0


@dataclass(frozen=True)
class _Part:
    """A bench that both have."""

    bench: str
    changes: list[Change]
    failed: list[Change]

    @classmethod
    def of(
        cls, before: dict[str, Any], after: dict[str, Any], fail_above: float | None
    ) -> Self:
        from shmipi.report import compare

        changes = compare.changes(before, after)
        return cls(str(after["bench"]), changes, worse(changes, fail_above))

    def as_json(self) -> dict[str, Any]:
        return {
            "changes": [
                {
                    "row": change.row,
                    "figure": change.figure,
                    "before": change.before,
                    "after": change.after,
                    "percent": change.percent,
                    "judged": change.judged,
                    "p": change.p,
                    "significant": change.significant,
                }
                for change in self.changes
            ],
            "worse": [f"{change.row}: {change.figure}" for change in self.failed],
        }


_Pair: TypeAlias = "tuple[dict[str, Any], dict[str, Any]]"


def _pairs(before: Recorded, after: Recorded) -> list[_Pair]:
    """Return the documents that belong together: those of two files, or by bench."""
    if not (before.several or after.several):
        return [(*before.documents.values(), *after.documents.values())]  # type: ignore[list-item]
    pairs = [
        (document, after.documents[bench])
        for bench, document in before.documents.items()
        if bench in after.documents
    ]
    if not pairs:
        raise CommandError(
            f"no bench is in both: {before.path} has {', '.join(before.documents)},"
            f" {after.path} {', '.join(after.documents)}",
            status=2,
        )
    return pairs


def _differences(pairs: Sequence[_Pair], several: bool) -> list[str]:
    """Return why they should not be compared; what is said of a computer, once."""
    from shmipi.report import compare

    found = []
    for before, after in pairs:
        for text in compare.differences(before, after):
            of_all = text.startswith("machine: ") or not several
            found.append(text if of_all else f"{after['bench']}: {text}")
    return list(dict.fromkeys(found))


def _alone(before: Recorded, after: Recorded) -> list[str]:
    """Return what only one of two directories has."""
    found = []
    for one, other in ((before, after), (after, before)):
        for bench in one.documents:
            if bench not in other.documents:
                why = other.missing.get(bench)
                said = f"{bench} is not in {other.path}"
                found.append(f"{said}: {why}" if why else said)
    return found


def _document(
    parts: Sequence[_Part], differences: list[str], alone: list[str], several: bool
) -> dict[str, Any]:
    from shmipi.report import compare

    about = {"differences": differences, "significant_below": compare.SIGNIFICANT}
    if not several:
        return document("compare", bench=parts[0].bench, **about, **parts[0].as_json())
    benches = {part.bench: part.as_json() for part in parts}
    return document("compare", benches=benches, alone=alone, **about)


def _show_all(parts: Sequence[_Part], several: bool, stream: TextIO) -> None:
    from shmipi.report import compare
    from shmipi.report.table import columns_of, folded

    for number, part in enumerate(part for part in parts if part.changes):
        if several:
            print(f"{chr(10) if number else ''}{part.bench}:", file=stream)
        show(part.changes, part.failed, stream)
    tested = [one for part in parts for one in part.changes if one.p is not None]
    if several and tested:
        found = sum(bool(one.significant) for one in tested)
        chance = compare.SIGNIFICANT * len(tested)
        text = (
            f"{found} of {len(tested)} figures that have blocks changed by more than"
            f" chance; by chance alone about {chance:.0f} would seem to"
        )
        print(f"\n{folded(text, columns_of(stream))}", file=stream)


def worse(changes: Sequence[Change], fail_above: float | None) -> list[Change]:
    """Return those that fail, by ``--fail-above``; None: nothing does."""
    if fail_above is None:
        return []
    return [change for change in changes if change.worse_than(fail_above)]


def show(changes: Sequence[Change], failed: Sequence[Change], stream: TextIO) -> None:
    """Print the changes as a table, and which of them fail."""
    from shmipi.report import bench
    from shmipi.report.table import columns_of, folded

    bench.table(
        ["row", "figure", "before", "after", "change", "chance", "significant"],
        [
            [
                *(change.row, change.figure),
                *(_figure(change, value) for value in (change.before, change.after)),
                f"{change.percent:+.1f} %",
                "-" if change.p is None else f"{change.p:.2g}",
                {True: "yes", False: "no", None: "-"}[change.significant],
            ]
            for change in changes
        ],
        stream,
    )
    for change in failed:
        text = f"worse: {change.row}: {change.figure} {change.percent:+.1f} %"
        print(folded(text, columns_of(stream)), file=stream)


def _figure(change: Change, value: float) -> str:
    from shmipi.report.cells import span

    if change.figure.endswith("ratio"):
        return f"{value:.3g}"
    if change.figure.endswith("per_s"):
        return f"{value:.4g}"
    return span(value * 1e9 if change.figure.endswith("_s") else value)
