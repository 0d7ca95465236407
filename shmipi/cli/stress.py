"""``shmipi stress``: scftorture on processes."""

from __future__ import annotations

import argparse
import contextlib
import re
import signal
import sys
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, TypeAlias

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
from shmipi.stress.users import registry

HELP = """\
Tortures a machine with calls of every kind, as the kernel's scftorture does: an invoker
on each CPU makes random calls to random CPUs, and every call checks that it ran on the
right CPU, that the sender's stores before the call were seen by the handler, and the
handler's stores by a waiting sender. Beyond scftorture every call is accounted for:
none lost, none run twice. Optionally CPUs go off- and online, or are killed with
SIGKILL and booted anew, or are stopped for a moment, under fire. Exit status 1 when
anything was wrong.

With --users, the CPUs do what IPIs are for instead: each user works on every CPU, and
its invariant is watched. --break switches one of its rules off, to see that it is."""
EXAMPLE = """\
shmipi stress --cpus 4 --duration 10s
shmipi stress --cpus 8 --onoff-interval 100ms --kill-interval 500ms --duration 1m
shmipi stress --attach lab --duration 1m
shmipi stress --weight-all-wait 1 --handler native --json result.json
shmipi stress --users all --cpus 4 --kill-interval 200ms
shmipi stress --break help"""

_SIGINT_STATUS = 130

#: What both kinds of run are called with here; they return a report each.
_Stress: TypeAlias = Callable[..., Any]


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
        "--stall-interval",
        type=duration,
        default=0.0,
        metavar="TIME",
        help="stop (SIGSTOP) a random CPU for up to 100 ms this often (default: 0,"
        " never)",
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
    users = parser.add_argument_group(
        "users of IPIs", "In the place of calls: the options above, but for theirs."
    )
    users.add_argument(
        "--users",
        type=_names,
        metavar="LIST",
        help=f"run these, or all: {', '.join(registry.names())}",
    )
    users.add_argument(
        "--break",
        dest="broken",
        action="append",
        default=[],
        metavar="RULE",
        help="switch a rule off, and end at the first violation; more than once for"
        " several; help: list the rules",
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


def _names(text: str) -> tuple[str, ...]:
    """Parse a list of users."""
    known = registry.names()
    given = text.split(",")
    for name in given:
        if name not in (*known, "all"):
            raise argparse.ArgumentTypeError(
                f"{name[:40]!r} is not one of {', '.join(known)}, or all"
            )
    return known if "all" in given else tuple(given)


def run(args: argparse.Namespace) -> int:
    """Run the test and print its lines; 0: SUCCESS, 1: FAILURE, 130: interrupted."""
    if "help" in args.broken:
        return _list_rules(args)
    stress = _users(args) if args.users or args.broken else _calls(args)

    # Who ends it so wants the account of what was done, as after Ctrl-C.
    if signal.getsignal(signal.SIGTERM) is not signal.SIG_IGN:
        signal.signal(signal.SIGTERM, signal.default_int_handler)
    stream = human_stream(args)
    with _progress(args.duration) as (line, progress):

        def show(text: str) -> None:
            line(text, stream)

        with usage_errors():  # no such machine here
            if args.attach is None:
                report = stress(line=show, progress=progress)
            else:
                with attached(args) as cluster:
                    report = stress(cluster=cluster, line=show, progress=progress)
    for text in report.explain():
        print(f"shmipi-stress: {text}", file=stream)
    write_json(args.json, document("stress", **report.as_dict()))
    if report.verdict != "SUCCESS":
        return 1
    return _SIGINT_STATUS if report.interrupted else 0


def _list_rules(args: argparse.Namespace) -> int:
    """Print the rules that can be broken."""
    from shmipi.report.bench import table
    from shmipi.stress.rules import rules

    found = rules().values()
    rows = [[rule.name, rule.function, rule.what] for rule in found]
    table(["rule", "kernel function", "with it broken"], rows, human_stream(args))
    listed = [
        {"user": r.user, "rule": r.rule, "function": r.function, "what": r.what}
        for r in found
    ]
    write_json(args.json, document("stress", rules=listed))
    return 0


def _calls(args: argparse.Namespace) -> _Stress:
    options = _options(args)
    from shmipi.stress import run as stress

    return partial(stress, options)


#: Options that are about calls alone, and those that every run has.
_OF_CALLS = ("nthreads", "longwait", "stutter", "handler")
_OF_BOTH = (
    *("duration", "stat_interval", "seed"),
    *("onoff_interval", "kill_interval", "stall_interval"),
)


def _of_both(args: argparse.Namespace) -> dict[str, Any]:
    return {name: getattr(args, name) for name in _OF_BOTH} | {
        "machine": machine_kwargs(args)
    }


def _users(args: argparse.Namespace) -> _Stress:
    parser = argparse.ArgumentParser()
    prepare_parser(parser)
    usual = vars(parser.parse_args([]))
    for name in (*_OF_CALLS, *(f"weight_{name}" for name in PRIMITIVES)):
        if getattr(args, name) != usual[name]:
            raise CommandError(
                f"--{name.replace('_', '-')} is for calls: with --users and --break the"
                " users choose what is sent",
                status=2,
            )
    from shmipi.stress.crew import UserOptions, run_users

    try:
        options = UserOptions(
            users=args.users or (), broken=tuple(args.broken), **_of_both(args)
        )
    except ValueError as error:
        raise CommandError(str(error), status=2) from None
    return partial(run_users, options)


def _options(args: argparse.Namespace) -> Options:
    weights = {name: getattr(args, f"weight_{name}") for name in PRIMITIVES}
    try:
        selection(weights, 2)
        options = Options(
            **{name: getattr(args, name) for name in _OF_CALLS},
            weights=weights,
            **_of_both(args),
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
