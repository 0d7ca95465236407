"""``shmipi launch``: a machine that stays up."""

from __future__ import annotations

import argparse
import contextlib
import signal
import sys
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from shmipi.cli.console import console, table
from shmipi.cli.options import add_machine_options, boot

if TYPE_CHECKING:
    from shmipi.cluster import Cluster

HELP = """\
Boots a machine and keeps it up, with a table of its CPUs, until Ctrl-C or SIGTERM; then
ends it in order, and its exit status is 0. When the machine dies of something else (its
firmware is killed), it ends at once with a message and status 1. `shmipi ps` and
`shmipi interrupts` look at it from another terminal."""
EXAMPLE = """\
shmipi launch --name lab
shmipi launch --name big --cpus 64 --idle halt --doorbell eventfd"""

_LOOK_S = 0.1  # how soon the machine's death and a CPU's are noticed
_REFRESH_S = 0.5


def prepare_parser(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command."""
    parser.add_argument(
        "--name",
        metavar="X",
        help="1 to 32 letters, digits, '-' or '_' (default: a random one)",
    )
    add_machine_options(parser)


def run(args: argparse.Namespace) -> int:
    """Boot, stay up, end in order. ``MachineDiedError`` when it died by itself."""
    # From here on SIGTERM and a terminal that goes away are a Ctrl-C.
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, signal.default_int_handler)
    with boot(args, name=args.name) as cluster:
        try:
            if sys.stdout.isatty():
                _show_live(cluster)
            else:
                _show_plain(cluster)
        except KeyboardInterrupt:
            _deaf()
        name = cluster.name
    with contextlib.suppress(OSError):  # the terminal may be gone
        print(f"machine {name} ended", flush=True)
    return 0


def _deaf() -> None:
    """The end has begun and takes seconds at most: nothing cuts it short now."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)


def _looks(cluster: Cluster) -> Iterator[tuple[Any, ...]]:
    while True:
        yield cluster.cpus  # raises MachineDiedError
        time.sleep(_LOOK_S)


def _title(cluster: Cluster) -> str:
    return (
        f"machine {cluster.name}: {cluster.ncpus} CPUs, idle={cluster.idle},"
        f" doorbell={cluster.doorbell}, controller={cluster.controller}"
    )


def _table(cluster: Cluster, limit: int | None = None) -> Any:
    listing = table(
        *("CPU", "PID", "CORE", "STATE", "GENERATION"),
        *("CALLS", "DOORBELLS", "KICKS", "HALTS"),
        right="CPU PID CORE GENERATION CALLS DOORBELLS KICKS HALTS",
    )
    now = cluster.counters()
    for cpu in cluster.cpus[:limit]:
        calls = now["native_run"][cpu.id] + now["python_run"][cpu.id]
        listing.add_row(
            *(str(cpu.id), str(cpu.pid), str(cpu.core), cpu.state, str(cpu.generation)),
            *(str(calls), str(now["doorbells_received"][cpu.id])),
            *(str(now["kicks_received"][cpu.id]), str(now["halts"][cpu.id])),
        )
    return listing


def _show_plain(cluster: Cluster) -> None:
    """Print one table, then a line for each CPU that leaves or comes back."""
    out = console()
    out.print(_title(cluster))
    out.print(_table(cluster))
    print("Ctrl-C ends it", flush=True)
    gone = {cpu.id: cpu.state in ("offline", "dead") for cpu in cluster.cpus}
    for cpus in _looks(cluster):
        for cpu in cpus:
            if (cpu.state in ("offline", "dead")) != gone[cpu.id]:
                gone[cpu.id] = not gone[cpu.id]
                print(f"CPU {cpu.id} is {cpu.state} (pid {cpu.pid})", flush=True)


def _show_live(cluster: Cluster) -> None:
    from rich.console import Console, Group
    from rich.live import Live

    screen = Console(highlight=False, markup=False)
    due = 0.0
    # Refreshed from here only: Ctrl-C then never meets a thread that is drawing.
    with Live(console=screen, auto_refresh=False) as live:
        for _ in _looks(cluster):
            if time.monotonic() < due:
                continue
            due = time.monotonic() + _REFRESH_S
            room = max(1, screen.height - 5)
            more = cluster.ncpus - room
            rest = f"and {more} more (shmipi ps -v)" if more > 0 else ""
            live.update(
                Group(
                    _title(cluster),
                    _table(cluster, room),
                    *([rest] if rest else []),
                    "Ctrl-C ends it",
                ),
                refresh=True,
            )
