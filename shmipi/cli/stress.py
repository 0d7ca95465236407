"""``shmipi stress``: scftorture on processes."""

from __future__ import annotations

import argparse
import contextlib
import re
import signal
import sys
from collections.abc import Callable, Iterator
from typing import Any

from shmipi.cli.options import (
    above_zero,
    add_attach_option,
    add_json_option,
    add_machine_options,
    attached,
    document,
    duration,
    human_stream,
    integer,
    machine_kwargs,
    usage_errors,
    write_json,
)
from shmipi.errors import CommandError
from shmipi.report.table import can_redraw
from shmipi.stress.options import HANDLERS, PRIMITIVES, Options, selection

HELP = """\
Tortures a machine with calls of every kind, as the kernel's scftorture does: an invoker
on each CPU makes random calls to random CPUs, and every call checks that it ran on the
right CPU, that the sender's stores before the call were seen by the handler, and the
handler's stores by a waiting sender. Beyond scftorture every call is accounted for:
none lost, none run twice. Optionally CPUs go off- and online, or are killed with
SIGKILL and booted anew, under fire. Exit status 1 when anything was wrong."""
EXAMPLE = """\
shmipi stress --cpus 4 --duration 10s
shmipi stress --cpus 8 --onoff-interval 100ms --kill-interval 500ms --duration 1m
shmipi stress --attach lab --duration 1m
shmipi stress --weight-all-wait 1 --handler native --json result.json"""

_SIGINT_STATUS = 130


def prepare_parser(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command."""
    add_machine_options(parser)
    add_attach_option(parser)
    group = parser.add_argument_group("the test")
    group.add_argument(
        "--duration",
        type=above_zero,
        default=10.0,
        metavar="TIME",
        help="how long (default: 10s)",
    )
    group.add_argument(
        "--nthreads",
        type=integer(-1),
        default=-1,
        metavar="N",
        help="how many CPUs have an invoker, the first ones (default: -1, all)",
    )
    group.add_argument(
        "--longwait",
        type=duration,
        default=0.0,
        metavar="TIME",
        help="let handlers burn up to TIME once in a while (default: 0, never)",
    )
    group.add_argument(
        "--stutter",
        type=duration,
        default=0.02,
        metavar="TIME",
        help="run and pause for TIME each, in turn; 0: no pauses (default: 20ms)",
    )
    group.add_argument(
        "--stat-interval",
        type=above_zero,
        default=5.0,
        metavar="TIME",
        help="a line of statistics this often (default: 5s)",
    )
    group.add_argument(
        "--onoff-interval",
        type=duration,
        default=0.0,
        metavar="TIME",
        help="take a random CPU off- or online this often (default: 0, never)",
    )
    group.add_argument(
        "--kill-interval",
        type=duration,
        default=0.0,
        metavar="TIME",
        help="kill -9 a random CPU, and boot it anew, this often (default: 0, never)",
    )
    group.add_argument(
        "--seed",
        type=_seed,
        metavar="N",
        help="make each invoker's random choices those of an earlier run, which printed"
        " it: seed=N",
    )
    group.add_argument(
        "--handler",
        choices=HANDLERS,
        default="mix",
        help="python handlers check everything, native ones are counted (default: mix)",
    )
    weights = parser.add_argument_group(
        "weights",
        "How often each kind of call is chosen. -1 is the default: 2 for each CPU for"
        "\nresched and the singles, 2 for the manys, 1 for the alls; or 0 as soon as"
        "\none weight is above 0. An explicit 0 removes a kind.",
    )
    for name in PRIMITIVES:
        weights.add_argument(
            f"--weight-{name.replace('_', '-')}",
            type=integer(-1, 1_000_000_000),
            default=-1,
            metavar="W",
            help=f"of {name}",
        )
    add_json_option(parser)


def _seed(text: str) -> int:
    """Parse a seed as a run prints it (``seed=7``), its number, or that in hex."""
    digits = text.removeprefix("seed=")
    if re.fullmatch(r"0x[0-9a-fA-F]{1,16}", digits):
        return int(digits, 16)
    return integer(0, (1 << 64) - 1)(digits)


def run(args: argparse.Namespace) -> int:
    """Run the test and print its lines; 0: SUCCESS, 1: FAILURE, 130: interrupted."""
    options = _options(args)
    from shmipi.stress import run as stress

    # Who ends it so wants the account of what was done, as after Ctrl-C.
    if signal.getsignal(signal.SIGTERM) is not signal.SIG_IGN:
        signal.signal(signal.SIGTERM, signal.default_int_handler)
    stream = human_stream(args)
    with _progress(options.duration) as (line, progress):

        def show(text: str) -> None:
            line(text, stream)

        with usage_errors():  # no such machine here
            if args.attach is None:
                report = stress(options, line=show, progress=progress)
            else:
                with attached(args) as cluster:
                    report = stress(
                        options, cluster=cluster, line=show, progress=progress
                    )
    for text in report.explain():
        print(f"shmipi-stress: {text}", file=stream)
    write_json(args.json, document("stress", **report.as_dict()))
    if report.verdict != "SUCCESS":
        return 1
    return _SIGINT_STATUS if report.interrupted else 0


def _options(args: argparse.Namespace) -> Options:
    weights = {name: getattr(args, f"weight_{name}") for name in PRIMITIVES}
    try:
        selection(weights, 2)
        options = Options(
            duration=args.duration,
            nthreads=args.nthreads,
            longwait=args.longwait,
            stutter=args.stutter,
            stat_interval=args.stat_interval,
            onoff_interval=args.onoff_interval,
            kill_interval=args.kill_interval,
            seed=args.seed,
            handler=args.handler,
            weights=weights,
            machine=machine_kwargs(args),
        )
        if args.cpus is not None:
            options.senders(args.cpus)
    except ValueError as error:
        raise CommandError(str(error), status=2) from None
    return options


@contextlib.contextmanager
def _progress(
    seconds: float,
) -> Iterator[tuple[Callable[[str, Any], None], Callable[[float], None]]]:
    """Yield how to print a line, and how to move the bar: a bar only on a terminal."""
    if not can_redraw(sys.stderr):

        def plain(text: str, stream: Any) -> None:
            print(text, file=stream, flush=True)

        yield plain, lambda done: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    with Progress(
        TextColumn("stress"),
        BarColumn(),
        TimeRemainingColumn(),
        console=console,
        transient=True,
        redirect_stdout=False,
        redirect_stderr=False,
    ) as bar:
        task = bar.add_task("stress", total=seconds)

        def above(text: str, stream: Any) -> None:
            if stream is sys.stderr or stream.isatty():
                bar.console.out(text, highlight=False)
            else:
                print(text, file=stream, flush=True)

        yield above, lambda done: bar.update(task, completed=done)
