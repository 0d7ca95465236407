"""``shmipi launch``: a machine that stays up."""

from __future__ import annotations

import argparse
import contextlib
import signal
import sys
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from shmipi.cli.options import add_machine_options, boot
from shmipi.report.table import Listing, can_redraw, columns_of, write

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
    add_machine_options(parser)


def run(args: argparse.Namespace) -> int:
    """Boot, stay up, end in order. ``MachineDiedError`` when it died by itself."""
    # From here on SIGTERM and a terminal that goes away are a Ctrl-C.
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, signal.default_int_handler)
    with boot(args) as cluster:
        try:
            if can_redraw(sys.stdout):
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


def _table(cluster: Cluster, limit: int | None = None) -> Listing:
    listing = Listing(
        (
            *("CPU", "PID", "CORE", "STATE", "GENERATION"),
            *("CALLS", "DOORBELLS", "KICKS", "HALTS"),
        ),
        right=(
            *("CPU", "PID", "CORE", "GENERATION"),
            *("CALLS", "DOORBELLS", "KICKS", "HALTS"),
        ),
    )
    now = cluster.counters()
    for cpu in cluster.cpus[:limit]:
        state = cpu.state if cpu.handler is None else f"{cpu.state} {cpu.handler}"
        calls = now["native_run"][cpu.id] + now["python_run"][cpu.id]
        listing.add_row(
            *(str(cpu.id), str(cpu.pid), str(cpu.core), state, str(cpu.generation)),
            *(str(calls), str(now["doorbells_received"][cpu.id])),
            *(str(now["kicks_received"][cpu.id]), str(now["halts"][cpu.id])),
        )
    return listing


def _show_plain(cluster: Cluster) -> None:
    """Print one table, then a line for each CPU that leaves or comes back."""
    # Before the table: who dies while it is printed is told of.
    gone = {cpu.id: cpu.state in ("offline", "dead") for cpu in cluster.cpus}
    print(_title(cluster))
    write(_table(cluster).lines(columns_of(sys.stdout)), sys.stdout)
    print("Ctrl-C ends it", flush=True)
    for cpus in _looks(cluster):
        for cpu in cpus:
            if (cpu.state in ("offline", "dead")) != gone[cpu.id]:
                gone[cpu.id] = not gone[cpu.id]
                print(f"CPU {cpu.id} is {cpu.state} (pid {cpu.pid})", flush=True)


def _show_live(cluster: Cluster) -> None:
    from rich.console import Console
    from rich.live import Live

    screen = Console(highlight=False, markup=False)
    due = 0.0
    # Refreshed from here only: Ctrl-C then never meets a thread that is drawing.
    with Live(console=screen, auto_refresh=False) as live:
        for _ in _looks(cluster):
            if time.monotonic() >= due:
                due = time.monotonic() + _REFRESH_S
                live.update(_picture(cluster, *screen.size), refresh=True)


def _picture(cluster: Cluster, width: int, height: int) -> Any:
    """Return what fits a screen of this size; it says how much does not."""
    from rich.console import Group
    from rich.text import Text

    listing = _table(cluster)
    tables = listing.tables(width)
    # Above, below, and of each table its header and the line between it and the next.
    title = Text(_title(cluster))
    above = -(-len(title) // width)
    room = max(1, (height - above - 3) // tables - 2)
    more = cluster.ncpus - room
    if more > 0:
        listing = _table(cluster, room)
    lines = [Text(text, style) for text, style in listing.lines(width)]
    rest = [Text(f"and {more} more (shmipi ps -v)")] if more > 0 else []
    return Group(title, *lines, *rest, Text("Ctrl-C ends it"))
