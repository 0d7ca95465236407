"""``shmipi bench``: latency, throughput, boot time, and the limits beside them."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Final, TypeAlias

from shmipi.cli import Parser
from shmipi.cli.compare import percent
from shmipi.cli.options import (
    add_json_option,
    controller,
    core_list,
    count,
    document,
    human_stream,
    integer,
    load_controller,
    write_json,
    write_text,
)
from shmipi.errors import CommandError, RemoteCallError
from shmipi.names import BENCHES

if TYPE_CHECKING:
    from shmipi.bench.option import Option

HELP = """\
Measures a machine's interrupts in wall-clock time, and beside each figure the physical
limit of this computer: the same round trip in C with nothing of shmipi in between.
Without a subcommand nothing is measured."""
EXAMPLE = """\
shmipi bench latency
shmipi bench latency --doorbell futex,sem --calls 20k --json latency.json
shmipi bench boot --cpus 2,256
shmipi bench all --out results"""
#: What is no bench but all of them.
ALL: Final = "all"


def prepare_parser(parser: argparse.ArgumentParser) -> None:
    """Add the subcommands; each gets its arguments when it is the one asked for."""
    commands = parser.add_subparsers(
        dest="what", metavar="WHAT", required=True, parser_class=_BenchParser
    )
    for name, text in BENCHES.items():
        commands.add_parser(name, help=text, bench=name)
    text = "all of them in under five minutes, a document of each in a directory"
    commands.add_parser(ALL, help=text, bench=ALL)


def run(args: argparse.Namespace) -> int:
    """Measure, print, write. Rows that are not valid are marked; the status is 0.

    But for ``--fail-above``.
    """
    if args.what == ALL:
        from shmipi.cli import benches

        return benches.run(args)
    from shmipi.bench import option, registry
    from shmipi.bench.runner import Progress
    from shmipi.report.bench import render

    progress = Progress(f"bench {args.what}")
    bench = registry.load(args.what)
    given = {name: getattr(args, name) for name in option.options_of(bench.Options)}
    if "controller" in given:
        given["controller"] = load_controller(given["controller"])
    baseline = _baseline(args, given)
    if [args.json, args.csv, args.markdown].count("-") > 1:
        raise CommandError("only one of them can be standard output", status=2)
    try:
        result = bench.run(bench.Options(**given), progress)
    except RemoteCallError as error:
        raise CommandError(
            f"measuring on CPU {error.cpu} failed: {error.remote_repr}"
        ) from None
    except ValueError as error:
        raise CommandError(str(error), status=2) from None
    finally:
        progress.clear()
    stream = sys.stderr if "-" in (args.csv, args.markdown) else human_stream(args)
    if args.json != "-":
        render(result, stream)
    found = document("bench", **result)
    if args.histogram and args.json != "-":
        from shmipi.report.page.text import histograms

        histograms(found, stream, everything=True)
    write_json(args.json, found)
    _export(args, found)
    return _compared(baseline, found, args) if baseline is not None else 0


def _export(args: argparse.Namespace, found: dict[str, Any]) -> None:
    """Write what else was asked for."""
    from shmipi.bench import registry
    from shmipi.report import export

    if args.csv is not None:
        write_text(args.csv, export.as_csv(found))
    if args.markdown is not None:
        table = registry.load(args.what).table(found)
        write_text(args.markdown, export.as_markdown(*table))
    if args.hgrm is not None:
        export.write_hgrm(found, args.hgrm)


def _baseline(args: argparse.Namespace, given: dict[str, Any]) -> dict[str, Any] | None:
    """Return the document of ``--baseline``: refused before anything is measured."""
    from shmipi.report import compare

    if args.baseline is None:
        if args.fail_above is not None:
            raise CommandError("--fail-above goes with --baseline FILE", status=2)
        return None
    found = compare.load(args.baseline)
    asked = {"bench": args.what, **given}
    for name, value in asked.items():
        if name in found and isinstance(value, str | int) and found[name] != value:
            raise CommandError(
                f"--baseline cannot be compared: {name} {found[name]}, and {value}",
                status=2,
            )
    return found


def _compared(
    baseline: dict[str, Any], found: dict[str, Any], args: argparse.Namespace
) -> int:
    from shmipi.cli.compare import show, worse
    from shmipi.report import compare

    if differences := compare.differences(baseline, found):
        raise CommandError(f"--baseline cannot be compared: {'; '.join(differences)}")
    changes = compare.changes(baseline, found)
    failed = worse(changes, args.fail_above)
    print(file=human_stream(args))
    show(changes, failed, human_stream(args))
    return 1 if failed else 0


class _BenchParser(Parser):
    """The parser of one bench: it imports the module when it has something to parse."""

    def __init__(self, *, bench: str, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._bench = bench

    def parse_known_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, namespace: Any = None
    ) -> tuple[argparse.Namespace, list[str]]:
        """Add what the bench takes, and parse."""
        if self._bench == ALL:
            from shmipi.cli import benches

            benches.prepare_parser(self)
        else:
            self._prepare()
        return super().parse_known_args(args, namespace)

    def _prepare(self) -> None:
        from shmipi.bench import option, registry

        bench = registry.load(self._bench)
        self.describe(f"{BENCHES[self._bench]}.\n\n{bench.HELP}", bench.EXAMPLE)
        for name, (one, default) in option.options_of(bench.Options).items():
            self.add_argument(
                one.flag,
                dest=name,
                default=default,
                metavar=one.metavar,
                help=one.help,
                **_KINDS[one.kind](one),
            )
        self.add_argument(
            "--baseline",
            metavar="FILE",
            help="compare with what an earlier run wrote with --json (shmipi compare)",
        )
        self.add_argument(
            "--fail-above",
            type=percent,
            metavar="PCT",
            help="exit with 1 if a figure is worse than the baseline's by more than PCT"
            " percent, and not by chance",
        )
        self.add_argument(
            "--histogram",
            action="store_true",
            help="print the distribution of each row as text, too",
        )
        add_json_option(self)
        for name, what in (("csv", "the rows as CSV"), ("markdown", "the table in it")):
            self.add_argument(
                f"--{name}",
                metavar="FILE",
                help=f"write {what}; - is standard output",
            )
        self.add_argument(
            "--hgrm",
            metavar="DIR",
            help="write a file of percentiles for each distribution, as HdrHistogram's"
            " plotter reads them",
        )


_Parse: TypeAlias = Callable[[str], Any]


def _count(option: Option) -> _Parse:
    def parse(text: str) -> int:
        value = count(text)
        if value > option.most:
            raise argparse.ArgumentTypeError(
                f"{value} is too large: at most {option.most}"
            )
        return value

    return parse


def _several(option: Option) -> _Parse:
    """Return a parser of ``a,b``: each one of the choices, in their order."""

    def parse(text: str) -> tuple[str, ...]:
        words = text.split(",")
        for word in words:
            if word not in option.choices:
                raise argparse.ArgumentTypeError(
                    f"{word[:40]!r} is not one of {', '.join(option.choices)}"
                )
        return tuple(choice for choice in option.choices if choice in words)

    return parse


def _sizes(option: Option) -> _Parse:
    number = integer(option.least, option.most)

    def parse(text: str) -> tuple[int, ...]:
        return tuple(number(word) for word in text.split(","))

    return parse


def _microseconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 100_000:
        raise argparse.ArgumentTypeError(
            f"{text[:40]!r} is no pause: give microseconds, 0 to 100000"
        )
    return value


#: What argparse is told of each kind of option.
_KINDS: Final[dict[str, Callable[[Option], dict[str, Any]]]] = {
    "choice": lambda option: {"choices": option.choices},
    "controller": lambda option: {"type": controller},
    "cores": lambda option: {"type": core_list},
    "count": lambda option: {"type": _count(option)},
    "integer": lambda option: {"type": integer(option.least, option.most)},
    "microseconds": lambda option: {"type": _microseconds},
    "several": lambda option: {"type": _several(option)},
    "sizes": lambda option: {"type": _sizes(option)},
}
