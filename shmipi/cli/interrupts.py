"""``shmipi interrupts``: a machine's ``/proc/interrupts``."""

from __future__ import annotations

import argparse
import contextlib
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TextIO

from shmipi.cli.options import (
    add_json_option,
    cpu_mask,
    document,
    duration,
    human_stream,
    write_json,
)
from shmipi.errors import CommandError
from shmipi.report.table import can_redraw, columns_of

if TYPE_CHECKING:
    from shmipi.cpumask import CpuMask
    from shmipi.machine.inspect import Inspector
    from shmipi.trace.counters import InterruptRow

__all__ = ["interval", "opened"]

HELP = """\
Shows the interrupt counts of a running machine in the shape of /proc/interrupts, a
column for each CPU. Calls to a CPU that was polling needed no interrupt: they are in a
row of their own (ELI). Looking changes nothing and interrupts nobody. Where a line is
too short for all CPUs, they stand below each other; a pipe's line never is."""
EXAMPLE = """\
shmipi interrupts mymachine
shmipi interrupts mymachine --watch --interval 500ms
shmipi interrupts mymachine --delta --nonzero --cpus 0-3
shmipi interrupts mymachine --json -"""

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
        type=interval,
        default=1.0,
        metavar="TIME",
        help="between two looks, such as 500ms (default: 1s)",
    )
    parser.add_argument(
        "--delta",
        action="store_true",
        help="show what came during an --interval, and not since boot: with --watch"
        " during each, else one is waited for",
    )
    parser.add_argument(
        "--cpus", type=cpu_mask, metavar="LIST", help="only these CPUs, such as 0-3,8"
    )
    parser.add_argument(
        "--nonzero", action="store_true", help="leave out rows without any count"
    )
    add_json_option(parser)


def interval(text: str) -> float:
    """Parse ``--interval``: no look follows another in less than 20 ms."""
    seconds = duration(text)
    if seconds < 0.02:
        raise argparse.ArgumentTypeError(f"{text} is too short: at least 20ms")
    return seconds


def run(args: argparse.Namespace) -> int:
    """Print the counts, once or until the machine ends; its end is no error."""
    if args.watch and args.json is not None:
        raise CommandError("--json is one document: not with --watch", status=2)
    with opened(args.name) as inspector:
        cpus = _chosen(args, inspector.ncpus)
        if not args.watch:
            look = _once(inspector, cpus, args)
            if args.json != "-":
                stream = human_stream(args)
                stream.write(look.text(columns_of(stream)))
            write_json(args.json, look.document(args.name, inspector.ncpus))
            return 0
        looks = _looks(inspector, cpus, args)
        try:
            _watch(looks, sys.stdout)
        except KeyboardInterrupt:
            return 0  # the way to end it: nothing was interrupted
    print(f"machine {args.name} ended", file=sys.stderr)
    return 0


@contextlib.contextmanager
def opened(name: str) -> Iterator[Inspector]:
    """Look at the live machine of this name. ``CommandError`` where there is none."""
    from shmipi.errors import LayoutError
    from shmipi.machine.inspect import Inspector

    try:
        inspector = Inspector(name)
    except ValueError as error:
        if isinstance(error, LayoutError):
            raise CommandError(f"{name}: {error}") from None
        raise CommandError(str(error), status=2) from None
    except FileNotFoundError:
        raise CommandError(f"there is no machine {name}; {_others()}") from None
    with inspector:
        if not inspector.alive:
            raise CommandError(
                f"machine {name} is dead: `shmipi clean` removes what it left"
            )
        yield inspector


def _chosen(args: argparse.Namespace, ncpus: int) -> list[int]:
    mask: CpuMask | None = args.cpus
    if mask is None:
        return list(range(ncpus))
    if not mask or max(mask) >= ncpus:
        raise CommandError(
            f"--cpus is {str(mask) or 'empty'}: machine {args.name} has CPUs"
            f" 0-{ncpus - 1}",
            status=2,
        )
    return list(mask)


@dataclass(frozen=True)
class _Look:
    """Rows of interrupts of some CPUs; ``seconds``: they came in that time."""

    cpus: list[int]
    rows: list[InterruptRow]
    seconds: float | None

    def text(self, width: int | None) -> str:
        from shmipi.trace.counters import as_text

        above = "" if self.seconds is None else f"in {self.seconds:.2f} s:\n"
        return above + as_text(self.rows, self.cpus, width)

    def document(self, name: str, ncpus: int) -> dict[str, Any]:
        return document(
            "interrupts",
            name=name,
            ncpus=ncpus,
            cpus=self.cpus,
            seconds=self.seconds,
            rows=[
                {"label": label, "text": text, "counts": counts}
                for label, text, counts in self.rows
            ],
        )


class _Eye:
    """Looks at a machine: counts since boot, or since the look before."""

    def __init__(
        self, inspector: Inspector, cpus: list[int], args: argparse.Namespace
    ) -> None:
        self._inspector, self._cpus = inspector, cpus
        self._delta, self._nonzero = args.delta, args.nonzero
        self._before = self._rows() if args.delta else []
        self._at = time.monotonic()

    def look(self) -> _Look:
        rows, now, seconds = self._rows(), time.monotonic(), None
        if self._delta:
            seconds = round(now - self._at, 3)
            before = {label: counts for label, _, counts in self._before}
            self._before, self._at = rows, now
            rows = [
                (label, text, _grown(counts, before.get(label)))
                for label, text, counts in rows
            ]
        if self._nonzero:
            rows = [row for row in rows if row[2].any()]
        return _Look(self._cpus, rows, seconds)

    def _rows(self) -> list[InterruptRow]:
        from shmipi.trace.counters import Counters, interrupt_rows

        inspector = self._inspector
        counters = Counters.of_rows(
            inspector.counter_rows(),
            inspector.ncpus,
            inspector.interrupt_counts(),
            inspector.rows(),
            inspector.irqs(),
        )
        rows = interrupt_rows(counters)
        return [(label, text, counts[self._cpus]) for label, text, counts in rows]


def _grown(now: Any, before: Any) -> Any:
    """Return by how much counts grew; what begins anew, with a new irq, grew from 0."""
    if before is None:
        return now
    return now - (before * (before <= now)).astype(now.dtype)


def _once(inspector: Inspector, cpus: list[int], args: argparse.Namespace) -> _Look:
    eye = _Eye(inspector, cpus, args)
    if args.delta:
        _wait(inspector, time.monotonic() + args.interval)
    return eye.look()


def _looks(
    inspector: Inspector, cpus: list[int], args: argparse.Namespace
) -> Iterator[_Look]:
    """A look every ``interval`` until the machine ends, and one at its end."""
    eye = _Eye(inspector, cpus, args)
    due = time.monotonic()
    if args.delta:
        due += args.interval
        _wait(inspector, due)
    while inspector.alive:
        yield eye.look()
        due = max(due + args.interval, time.monotonic())
        _wait(inspector, due)
    yield eye.look()


def _wait(inspector: Inspector, until: float) -> None:
    while inspector.alive and (left := until - time.monotonic()) > 0:
        time.sleep(min(left, _LOOK_S))


def _watch(looks: Iterator[_Look], stream: TextIO) -> None:
    if can_redraw(stream):
        _watch_live(looks)
        return
    for number, look in enumerate(looks):
        stream.write(("\n" if number else "") + look.text(columns_of(stream)))
        stream.flush()


def _watch_live(looks: Iterator[_Look]) -> None:
    from rich.console import Console
    from rich.live import Live
    from rich.text import Text

    screen = Console()
    # Refreshed from here only: Ctrl-C then never meets a thread that is drawing.
    with Live(console=screen, auto_refresh=False) as live:
        for look in looks:
            width, height = screen.size
            lines = look.text(width).splitlines()
            if len(lines) > height - 1:
                more = len(lines) - (height - 2)
                lines[height - 2 :] = [f"and {more} more lines: --cpus, --nonzero"]
            live.update(Text("\n".join(lines), no_wrap=True), refresh=True)


def _others() -> str:
    from shmipi.machine import segment

    names = [found.name for found in segment.find() if found.alive]
    if not names:
        return "no machine of yours is running"
    return "running: " + ", ".join(names)
