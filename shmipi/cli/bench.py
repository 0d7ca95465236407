"""``shmipi bench``: latency, throughput, boot time, and the limits beside them."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Final, TypeAlias

from shmipi.cli import Parser
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
shmipi bench boot --cpus 2,256"""


def prepare_parser(parser: argparse.ArgumentParser) -> None:
    """Add the subcommands; each gets its arguments when it is the one asked for."""
    commands = parser.add_subparsers(
        dest="what", metavar="WHAT", required=True, parser_class=_BenchParser
    )
    for name, text in BENCHES.items():
        commands.add_parser(name, help=text, bench=name)


def run(args: argparse.Namespace) -> int:
    """Measure, print, write. Rows that are not valid are marked; the status is 0."""
    from shmipi.bench import option, registry
    from shmipi.bench.runner import Progress
    from shmipi.report.bench import render

    progress = Progress(f"bench {args.what}")
    bench = registry.load(args.what)
    given = {name: getattr(args, name) for name in option.options_of(bench.Options)}
    if "controller" in given:
        given["controller"] = load_controller(given["controller"])
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
    if args.json != "-":
        render(result, human_stream(args))
    write_json(args.json, document("bench", **result))
    return 0


class _BenchParser(Parser):
    """The parser of one bench: it imports the module when it has something to parse."""

    def __init__(self, *, bench: str, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._bench = bench

    def parse_known_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, namespace: Any = None
    ) -> tuple[argparse.Namespace, list[str]]:
        """Add what the bench takes, and parse."""
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
        add_json_option(self)
        return super().parse_known_args(args, namespace)


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
