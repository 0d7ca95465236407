"""``shmipi report``: what benches found, on one page."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from shmipi.errors import CommandError

HELP = """\
Makes one page of what benches wrote with --json: first the finding, then the computer,
what is not to be trusted, and each row beside its limit. The page needs nothing else
(no script, no request), and can be printed, read on a phone and sent by mail. Pictures
need the extra `report` (pip install 'shmipi[report]'); --text does without."""
EXAMPLE = """\
shmipi report latency.json
shmipi report results/ -o results.html --png
shmipi report latency.json --text"""


def prepare_parser(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command."""
    parser.add_argument(
        "paths",
        nargs="+",
        metavar="FILE",
        help="documents of `shmipi bench --json`, or directories of them",
    )
    parser.add_argument(
        "-o",
        "--output",
        metavar="FILE",
        help="the page to write; - is standard output (default: report.html in the"
        " directory that was given, else here)",
    )
    parser.add_argument(
        "--png", action="store_true", help="write each picture as a PNG beside it, too"
    )
    parser.add_argument(
        "--text",
        action="store_true",
        help="print it as plain text, with histograms, and write no page",
    )


def run(args: argparse.Namespace) -> int:
    """Read, draw, write."""
    from shmipi.report.page import sources

    if args.text and (args.png or args.output is not None):
        raise CommandError("--text prints: it takes no --output and no --png", status=2)
    documents = sources.documents(args.paths)
    missing = sources.missing(args.paths)
    if args.text:
        from shmipi.report.page.text import render

        render(documents, sys.stdout, missing)
        return 0
    from shmipi.report.page import html

    target = _target(args)
    if target is None and args.png:
        raise CommandError("--png needs the name of a file: --output FILE", status=2)
    if target is not None:
        _refuse(target)
    text = html.page(documents, missing)
    if target is None:
        sys.stdout.write(text)
        return 0
    written = [_write(target, text.encode())]
    if args.png:
        for name, png in html.pictures(documents):
            written.append(_write(target.with_name(f"{target.stem}-{name}.png"), png))
    for path, size in written:
        print(f"{path} ({size / 1024:.0f} KiB)")
    return 0


def _target(args: argparse.Namespace) -> Path | None:
    """Return the file to write; None for standard output."""
    if args.output == "-":
        return None
    if args.output is not None:
        return Path(args.output)
    first = Path(args.paths[0])
    return (
        first if len(args.paths) == 1 and first.is_dir() else Path()
    ) / "report.html"


def _refuse(target: Path) -> None:
    """Raise ``CommandError`` for a file that is no report: it is somebody's work."""
    from shmipi.report.page.html import GENERATOR

    if target.is_dir() or not target.parent.is_dir():
        raise CommandError(f"{target} is no name of a file to write", status=2)
    if target.exists() and target.stat().st_size:
        with open(target, "rb") as file:
            head = file.read(2000)
        if f'content="{GENERATOR} '.encode() not in head:
            raise CommandError(
                f"{target} is there already and is no report: give another --output",
                status=2,
            )


def _write(path: Path, content: bytes) -> tuple[Path, int]:
    try:
        path.write_bytes(content)
    except OSError as error:
        raise CommandError(f"cannot write {path}: {error.strerror}") from None
    return path, len(content)
