"""``shmipi interrupts``: a machine's ``/proc/interrupts``."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING

from shmipi.cli.options import duration
from shmipi.errors import CommandError

if TYPE_CHECKING:
    from shmipi.machine.inspect import Inspector

HELP = """\
Shows the interrupt counts of a running machine in the shape of /proc/interrupts, a
column for each CPU. Calls to a CPU that was polling needed no interrupt: they are in a
row of their own (ELI). Looking changes nothing and interrupts nobody."""
EXAMPLE = """\
shmipi interrupts mymachine
shmipi interrupts mymachine --watch --interval 500ms"""

_LOOK_S = 0.2  # how soon the machine's end is noticed


def prepare_parser(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command."""
    parser.add_argument(
        "name", metavar="NAME", help="the machine, as `shmipi ps` lists it"
    )
    parser.add_argument(
        "--watch",
        action="store_true",
        help="show the counts again and again, until Ctrl-C or the machine's end",
    )
    parser.add_argument(
        "--interval",
        type=_interval,
        default=1.0,
        metavar="TIME",
        help="between two looks, such as 500ms (default: 1s)",
    )


def _interval(text: str) -> float:
    seconds = duration(text)
    if seconds < 0.02:
        raise argparse.ArgumentTypeError(f"{text} is too short: at least 20ms")
    return seconds


def run(args: argparse.Namespace) -> int:
    """Print the counts, once or until the machine ends; its end is no error."""
    from shmipi.errors import LayoutError
    from shmipi.machine.inspect import Inspector

    try:
        inspector = Inspector(args.name)
    except ValueError as error:
        if isinstance(error, LayoutError):
            raise CommandError(f"{args.name}: {error}") from None
        raise CommandError(str(error), status=2) from None
    except FileNotFoundError:
        raise CommandError(f"there is no machine {args.name}; {_others()}") from None
    with inspector:
        if not inspector.alive:
            raise CommandError(
                f"machine {args.name} is dead: `shmipi clean` removes what it left"
            )
        if not args.watch:
            sys.stdout.write(_text(inspector))
            return 0
        try:
            if sys.stdout.isatty():
                _watch_live(inspector, args.interval)
            else:
                _watch_plain(inspector, args.interval)
        except KeyboardInterrupt:
            return 0  # the way to end it: nothing was interrupted
    print(f"machine {args.name} ended", file=sys.stderr)
    return 0


def _text(inspector: Inspector) -> str:
    from shmipi.trace.counters import Counters, interrupts

    counters = Counters.of_rows(
        inspector.counter_rows(),
        inspector.ncpus,
        inspector.interrupt_counts(),
        inspector.rows(),
        inspector.irqs(),
    )
    return interrupts(counters)


def _looks(inspector: Inspector, interval: float) -> Iterator[str]:
    """The counts every ``interval`` seconds until the machine ends, and at its end."""
    due = time.monotonic()
    while inspector.alive:
        yield _text(inspector)
        due = max(due + interval, time.monotonic())
        while inspector.alive and (left := due - time.monotonic()) > 0:
            time.sleep(min(left, _LOOK_S))
    yield _text(inspector)


def _watch_plain(inspector: Inspector, interval: float) -> None:
    for number, text in enumerate(_looks(inspector, interval)):
        sys.stdout.write(("\n" if number else "") + text)
        sys.stdout.flush()


def _watch_live(inspector: Inspector, interval: float) -> None:
    from rich.console import Console
    from rich.live import Live
    from rich.text import Text

    # Refreshed from here only: Ctrl-C then never meets a thread that is drawing.
    with Live(console=Console(), auto_refresh=False) as live:
        for text in _looks(inspector, interval):
            shown = Text(text.rstrip("\n"), no_wrap=True, overflow="crop")
            live.update(shown, refresh=True)


def _others() -> str:
    from shmipi.machine import segment

    names = [found.name for found in segment.find() if found.alive]
    if not names:
        return "no machine of yours is running"
    return "running: " + ", ".join(names)
