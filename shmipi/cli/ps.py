"""``shmipi ps``: the machines of this user and what they are doing."""

from __future__ import annotations

import argparse
import textwrap
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, TextIO

from shmipi.cli.console import span
from shmipi.cli.options import add_json_option, document, human_stream, write_json
from shmipi.report.table import Listing, columns_of, write

if TYPE_CHECKING:
    from shmipi.machine.inspect import MachineView
    from shmipi.machine.segment import Found

HELP = """\
Lists the machines of this user on this computer: live ones with what they are, dead
ones that left their memory behind, and those of other versions of shmipi, which are
named but not opened. Looking changes nothing and interrupts nobody."""
EXAMPLE = """\
shmipi ps
shmipi ps -v
shmipi ps --json -"""


def prepare_parser(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command."""
    parser.add_argument(
        "-v", "--verbose", action="store_true", help="show each CPU of live machines"
    )
    add_json_option(parser)


def run(args: argparse.Namespace) -> int:
    """List the machines; none is no error."""
    entries = [_look(found) for found in _find()]
    if args.json != "-":
        _print(entries, args.verbose, human_stream(args))
    write_json(args.json, document("ps", machines=[_plain(*e) for e in entries]))
    return 0


_Entry = tuple["Found", str, "MachineView | None", str]


def _find() -> list[Found]:
    from shmipi.machine import inspect, segment

    dead = {found.name: found for found in inspect.leftovers()}
    live = {found.name: found for found in segment.find()}
    return [found for _, found in sorted({**dead, **live}.items())]


def _look(found: Found) -> _Entry:
    """Return the object, its state, what is in it, or words for why that is unknown."""
    from shmipi.errors import LayoutError
    from shmipi.machine.inspect import Inspector

    if not found.alive:
        words = "left by a dead machine: `shmipi clean` removes it"
        return found, "dead", None, words
    if found.abi is None:
        return found, "starting", None, "its memory is just being made"
    try:
        with Inspector(found.name) as inspector:
            view = inspector.view()
            state = view.state if inspector.alive else "dead"
            return found, state, view, ""
    except FileNotFoundError:
        return found, "dead", None, "it ended just now"
    except LayoutError as error:
        return found, "foreign", None, str(error)
    except OSError as error:
        return found, "foreign", None, f"it cannot be opened: {error.strerror}"


def _plain(
    found: Found, state: str, view: MachineView | None, words: str
) -> dict[str, Any]:
    """Return an entry for JSON; what is not known is null."""
    entry: dict[str, Any] = {
        "name": found.name,
        "state": state,
        "alive": found.alive,
        "abi": found.abi,
        "path": found.path,
        "message": words or None,
    }
    fields = (
        "ncpus idle doorbell controller kick_signal host_pid firmware_pid uptime_s"
        " memory_bytes"
    )
    for name in fields.split():
        entry[name] = getattr(view, name, None)
    entry["attached"] = [] if view is None else list(view.attached)
    entry["online"] = None if view is None else view.online
    entry["cpus"] = [] if view is None else [asdict(cpu) for cpu in view.cpus]
    return entry


def _print(entries: list[_Entry], verbose: bool, stream: TextIO) -> None:
    if not entries:
        print("no machines", file=stream)
        return
    width = columns_of(stream)
    known = [(state, view) for _, state, view, _ in entries if view is not None]
    if known:
        write(_machines(known).lines(width), stream)
    for found, state, nothing, words in entries:
        if nothing is None:
            text = f"{found.name}: {state}: {words}"
            print(text if width is None else textwrap.fill(text, width), file=stream)
    for _, view in known if verbose else ():
        print(file=stream)
        write(_cpus(view).lines(width), stream)
        if view.attached:
            print(f"attached: {', '.join(map(str, view.attached))}", file=stream)


def _machines(known: list[tuple[str, MachineView]]) -> Listing:
    listing = Listing(
        (
            *("NAME", "STATE", "CPUS", "ONLINE", "IDLE", "DOORBELL", "CONTROLLER"),
            *("HOST", "FIRMWARE", "UPTIME", "MEMORY"),
        ),
        right=("CPUS", "HOST", "FIRMWARE", "MEMORY"),
    )
    for state, view in known:
        listing.add_row(
            *(view.name, state, str(view.ncpus), str(view.online) or "none"),
            *(view.idle, view.doorbell, view.controller),
            *(str(view.host_pid), str(view.firmware_pid), span(view.uptime_s)),
            f"{view.memory_bytes / 1024:.0f} KiB",
        )
    return listing


def _cpus(view: MachineView) -> Listing:
    listing = Listing(
        ("CPU", "PID", "CORE", "STATE", "GENERATION", "IDLE", "DOING"),
        right=("CPU", "PID", "CORE", "GENERATION"),
        title=view.name,
    )
    for cpu in view.cpus:
        doing = [] if cpu.task is None else [f"runs {cpu.task}"]
        if cpu.handler is not None:
            spent = "" if cpu.since is None else f" for {span(cpu.since)}"
            doing.append(f"handles {cpu.handler}{spent}")
        if cpu.ended is not None:
            doing.append(cpu.ended)
        if cpu.waits_for is not None:
            doing.append(f"waits for CPU {cpu.waits_for}")
        if cpu.queued:
            doing.append("has calls queued")
        listing.add_row(
            *(str(cpu.id), str(cpu.pid), str(cpu.core), cpu.state),
            *(str(cpu.generation), cpu.idle, ", ".join(doing)),
        )
    return listing
