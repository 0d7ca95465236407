"""``shmipi check``: whether a run of a bench is to be trusted."""

from __future__ import annotations

import argparse

from shmipi.cli.options import add_json_option, document, human_stream, write_json

HELP = """\
Reads what a bench wrote with --json and says in words why it is not to be trusted: time
stolen by a hypervisor, other work, a slow clock, rows that something disturbed, too few
samples for a quantile, distributions of several modes; of a directory (`shmipi bench
all`) also which bench is missing. Exit status 1 when it found anything."""
EXAMPLE = """\
shmipi check latency.json
shmipi check results/"""


def prepare_parser(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command."""
    parser.add_argument("file", metavar="FILE", help="the document, or a directory")
    add_json_option(parser)


def run(args: argparse.Namespace) -> int:
    """Read, look, say."""
    from shmipi.report import compare
    from shmipi.report.page.sources import recorded
    from shmipi.report.table import columns_of, folded

    found = recorded(args.file)
    benches = {bench: compare.doubts(one) for bench, one in found.documents.items()}
    missing = [f"{bench} is missing: {why}" for bench, why in found.missing.items()]
    # What is said of the computer is said of each, and stands there once.
    said = [
        *missing,
        *dict.fromkeys(
            text
            if compare.of_machine(text) or not found.several
            else f"{bench}: {text}"
            for bench, doubts in benches.items()
            for text in doubts
        ),
    ]
    if args.json != "-":
        stream = human_stream(args)
        for text in said or ["nothing was found that speaks against it"]:
            print(
                folded(f"- {text}" if said else text, columns_of(stream)), file=stream
            )
    if found.several:
        content = document("check", benches=benches, missing=found.missing)
    else:
        ((bench, doubts),) = benches.items()
        content = document("check", bench=bench, doubts=doubts)
    write_json(args.json, content)
    return 1 if said else 0
