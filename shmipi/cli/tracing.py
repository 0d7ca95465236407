"""``shmipi trace record|export|summary|start|stop``: what machines record."""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TextIO, cast

from shmipi.cli.options import (
    above_zero,
    add_json_option,
    count,
    document,
    human_stream,
    output_path,
    usage_errors,
    write_json,
)
from shmipi.cli.program import Program
from shmipi.errors import CommandError, ShmipiError, TraceFormatError

if TYPE_CHECKING:
    from shmipi.cli import Parser
    from shmipi.cluster import Cluster
    from shmipi.trace.record import Trace

__all__ = ["ACTIONS", "add_actions", "run"]

_TO: Final = ("perfetto", "chrome", "ftrace", "trace.dat")
_DEFAULT: Final = "shmipi.trace"
_LOOK_S: Final = 0.01
_RECORD_HELP = """\
Records what a machine's CPUs and hosts do, in a file for `shmipi trace export` and
`summary`: of a machine that runs, by its name, until Ctrl-C, its end or --duration; or
of each machine that COMMAND boots, from its boot to its end (a second one's file has a
number behind its name). With COMMAND the exit status is its own. Rings are lossless:
what did not fit because the recorder came too late is counted and said. The file is
written at the end: a recorder that is killed (SIGKILL) leaves none."""
_RECORD_EXAMPLE = """\
shmipi trace record lab --duration 5s -o lab.trace
shmipi trace record -- shmipi run work.py
shmipi trace record --records 1M -- python3 program.py"""
_EXPORT_HELP = """\
Writes a recording for another program: `perfetto` (ui.perfetto.dev; needs the package
perfetto, shmipi[trace]), `chrome` (the same place, or chrome://tracing), `ftrace` (text
as of tracefs, which `shmipi trace import` reads), `trace.dat` (trace-cmd, KernelShark).
The names of events and fields are the kernel's."""
_EXPORT_EXAMPLE = """\
shmipi trace export lab.trace --to perfetto
shmipi trace export lab.trace --to ftrace -o -"""
_SUMMARY_HELP = """\
Says who interrupts whom, for what, how long it took, and what needed no IPI: coalesced
with another, or elided because the target polled."""
_SUMMARY_EXAMPLE = """\
shmipi trace summary lab.trace"""
_START_HELP = """\
Switches a machine's tracepoints on while it runs. `record`, or cluster.tracing.read()
in a host of it, takes what they record; its rings keep the newest."""
_START_EXAMPLE = """\
shmipi trace start lab --records 64k"""
_STOP_HELP = """\
Switches them off. What is in the rings stays there."""
_STOP_EXAMPLE = """\
shmipi trace stop lab"""


def add_actions(actions: Any) -> None:
    """Add the subcommands."""

    def add(name: str, short: str, text: str, example: str) -> Parser:
        parser = cast("Parser", actions.add_parser(name, help=short))
        parser.describe(text, example)
        return parser

    record = add("record", "record a machine", _RECORD_HELP, _RECORD_EXAMPLE)
    record.usage = "%(prog)s [OPTIONS] NAME | -- COMMAND ..."
    record.add_argument(
        "words", nargs=argparse.REMAINDER, metavar="NAME | -- COMMAND", help="which"
    )
    record.add_argument(
        "-o",
        "--output",
        default=_DEFAULT,
        metavar="FILE",
        help=f"the file (default {_DEFAULT})",
    )
    record.add_argument(
        "-f", "--force", action="store_true", help="overwrite a file that is there"
    )
    record.add_argument(
        "--duration", type=above_zero, metavar="TIME", help="of NAME: for so long"
    )
    _add_ring_options(record, "64k")
    export = add(
        "export", "a recording for other programs", _EXPORT_HELP, _EXPORT_EXAMPLE
    )
    export.add_argument("file", metavar="FILE", help="the recording")
    export.add_argument(
        "--to", choices=_TO, default="perfetto", help="the format (default perfetto)"
    )
    export.add_argument(
        "-o", "--output", metavar="FILE", help="where to; - is standard output"
    )
    export.add_argument(
        "-f", "--force", action="store_true", help="overwrite a file that is there"
    )
    summary = add(
        "summary", "who interrupts whom, and why", _SUMMARY_HELP, _SUMMARY_EXAMPLE
    )
    summary.add_argument("file", metavar="FILE", help="the recording")
    add_json_option(summary)
    start = add("start", "switch tracepoints on", _START_HELP, _START_EXAMPLE)
    start.add_argument("name", metavar="NAME", help="the machine")
    _add_ring_options(start, "8k")
    start.add_argument(
        "--lossless",
        action="store_true",
        help="a full ring records no more, instead of overwriting what is oldest",
    )
    stop = add("stop", "switch them off", _STOP_HELP, _STOP_EXAMPLE)
    stop.add_argument("name", metavar="NAME", help="the machine")


def _add_ring_options(parser: argparse.ArgumentParser, records: str) -> None:
    parser.add_argument(
        "--records",
        type=count,
        default=count(records),
        metavar="N",
        help=f"of 32 bytes, for each CPU and host, at least (default {records})",
    )
    parser.add_argument(
        "--events",
        default="kernel",
        metavar="LIST",
        help="kernel (those that the kernel has, default), all, or names of"
        " shmipi.TraceEvent",
    )


def run(args: argparse.Namespace) -> int:
    """Do what one of them says."""
    return ACTIONS[args.action](args)


# ---- record --------------------------------------------------------------------------


def _record(args: argparse.Namespace) -> int:
    options, words = _words(args)
    if not words:
        raise CommandError("name a machine, or give -- and a command", status=2)
    path = output_path(options.output, force=options.force)
    if words[0] != "--":
        if len(words) > 1:
            raise CommandError(
                f"{words[1]!r}: one machine's name, or -- before a command", status=2
            )
        return _record_machine(options, words[0], path)
    if not words[1:]:
        raise CommandError("there is no command behind --", status=2)
    if options.duration is not None:
        raise CommandError("--duration is for a machine's name", status=2)
    return _record_command(options, words[1:], path)


def _there(path: Path) -> str:
    return f"{path} is there already: -f overwrites it"


def _words(args: argparse.Namespace) -> tuple[argparse.Namespace, list[str]]:
    """Options also behind the machine's name: argparse leaves them in the rest."""
    words = list(args.words)
    if not words or words[0] == "--":
        return args, words
    if "--" in words:
        raise CommandError("a machine's name, or -- and a command: not both", status=2)
    from shmipi.cli import Parser

    parser = Parser(prog="shmipi trace record")
    parser.add_argument("-o", "--output")
    parser.add_argument("-f", "--force", action="store_true")
    parser.add_argument("--duration", type=above_zero)
    parser.add_argument("--records", type=count)
    parser.add_argument("--events")
    _, strays = parser.parse_known_args(words[1:], args)
    return args, [words[0], *strays]


@contextlib.contextmanager
def _attached(name: str) -> Iterator[Cluster]:
    from shmipi.cluster import Cluster

    with usage_errors(), Cluster.attach(name) as cluster:
        yield cluster


def _record_machine(args: argparse.Namespace, name: str, path: Path) -> int:
    from shmipi.trace.record import mask_of

    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, signal.default_int_handler)
    with _attached(name) as cluster:
        tracing = cluster.tracing
        mask_of(args.events)
        tracing.prepare(args.records)
        recorder = tracing.recorder()  # who has one already is not disturbed
        try:
            tracing.start(lossless=True, events=args.events)
            print(f"recording {name}: Ctrl-C ends it", file=sys.stderr, flush=True)
            end = None if args.duration is None else time.monotonic() + args.duration
            while end is None or time.monotonic() < end:
                recorder.poll()
                cluster.online_mask  # noqa: B018  (raises when the machine has ended)
                time.sleep(_LOOK_S)
        except (KeyboardInterrupt, ShmipiError):
            pass
        finally:
            tracing.stop()
        trace = recorder.finish()
    _save(trace, path)
    print(_said(trace, path))
    return 0


def _save(trace: Trace, path: Path) -> None:
    try:
        trace.save(path)
    except OSError as error:
        raise CommandError(f"cannot write {path}: {error.strerror}") from None


def _said(trace: Trace, path: Path) -> str:
    lost = sum(trace.lost.values())
    missing = f", {lost} lost: give more --records" if lost else ""
    return (
        f"{path}: {len(trace.records)} records of machine {trace.about['machine']}"
        f"{missing}"
    )


def _record_command(args: argparse.Namespace, command: list[str], path: Path) -> int:
    from shmipi.machine.rings import check_records
    from shmipi.trace import record

    with usage_errors():
        asked = record.Asked(
            str(path.absolute()), check_records(args.records), args.events
        )
        record.mask_of(args.events)
    path.unlink(missing_ok=True)  # each machine that ends makes the first that is free
    environment = {**os.environ, record.ENVIRONMENT: asked.as_text()}
    before = time.time()
    # Ctrl-C is the command's: it ends its machine, and this tells of it.
    with Program() as program:
        status = program.run(command, environment)
    made = _made(path.absolute(), before - 1)
    if not made:
        print(
            f"{command[0]} has ended no machine of its own: nothing was recorded",
            file=sys.stderr,
        )
    for found in made:
        try:
            print(_said(record.load(found), found), file=sys.stderr)
        except (TraceFormatError, OSError) as error:  # the status is the command's
            print(f"{found}: {error}", file=sys.stderr)
    return status


def _made(path: Path, since: float) -> list[Path]:
    """Return what machines have written: FILE, FILE.2, FILE.3 and so on."""
    behind = len(path.name) + 1
    found = []
    for other in path.parent.iterdir():
        number = other.name[behind:]
        if other.name not in (path.name, f"{path.name}.{number}"):
            continue
        with contextlib.suppress(OSError):  # it has gone
            if (other == path or number.isdecimal()) and other.stat().st_mtime >= since:
                found.append((int(number or 1), other))
    return [other for _, other in sorted(found)]


# ---- export and summary --------------------------------------------------------------


def _load(name: str) -> Trace:
    from shmipi.trace.record import load

    try:
        return load(name)
    except TraceFormatError as error:
        raise CommandError(str(error)) from None
    except OSError as error:
        raise CommandError(f"{name}: {error.strerror}", status=2) from None


def _export(args: argparse.Namespace) -> int:
    from shmipi.trace import export

    trace = _load(args.file)
    try:
        if args.output == "-":
            export.write(trace, args.to, sys.stdout.buffer)
            return 0
        suffix = export.FORMATS[args.to][1]
        path = Path(args.output or Path(args.file).with_suffix(suffix))
        with path.open("wb" if args.force else "xb") as file:
            export.write(trace, args.to, file)
    except ImportError as error:
        raise CommandError(str(error)) from None
    except FileExistsError:
        raise CommandError(_there(path), status=2) from None
    except OSError as error:
        raise CommandError(f"cannot write {path}: {error.strerror}") from None
    print(path)
    return 0


def _summary(args: argparse.Namespace) -> int:
    from shmipi.trace import kernel, timeline

    trace = _load(args.file)
    found = timeline.summary(timeline.timeline(kernel.events(trace), trace.ncpus))
    if args.json != "-":
        _print(trace, found, human_stream(args))
    write_json(
        args.json,
        document(
            "trace-summary",
            machine=trace.about["machine"],
            controller=trace.about["controller"],
            ncpus=trace.ncpus,
            records=len(trace.records),
            lost={str(slot): n for slot, n in trace.lost.items()},
            **found,
        ),
    )
    return 0


def _print(trace: Trace, found: dict[str, Any], stream: TextIO) -> None:
    from shmipi.report import bench
    from shmipi.report.table import columns_of, folded

    def say(text: str) -> None:
        print(folded(text, columns_of(stream)), file=stream)

    calls = found["calls"]
    total = {
        name: sum(row[name] for row in calls)
        for name in ("queued", "rung", "coalesced", "elided", "run")
    }
    say(
        f"machine {trace.about['machine']}: {trace.ncpus} CPUs, controller"
        f" {trace.about['controller']}, {found['seconds']:.3f} s"
    )
    if trace.lost:
        say(f"warning: {sum(trace.lost.values())} records are missing")
    say(
        f"{total['queued']} calls queued: {total['rung']} with an IPI,"
        f" {total['coalesced']} behind another (coalesced), {total['elided']} for a CPU"
        f" that polled (elided); {found['local']} functions ran locally"
    )
    print(file=stream)
    names = {int(cpu): name for cpu, name in found["cpus"].items()}
    rows = [
        [
            _who(row["from"], names, trace.ncpus),
            str(row["to"]),
            row["function"],
            *(str(row[name]) for name in ("queued", "rung", "coalesced", "elided")),
            *_times(row["queue_to_function_us"]),
            *_times(row["function_us"])[:1],
        ]
        for row in calls
    ]
    heads = ["from", "to", "function", "queued", "rung", "coal.", "elided"]
    bench.table([*heads, "to start p50", "p99", "runs p50"], rows, stream)
    if found["interrupts"]:
        print(file=stream)
        rows = [
            [
                str(row["cpu"]),
                row["vector"],
                str(row["sent"]),
                str(row["taken"]),
                *_times(row["send_to_entry_us"]),
                *_times(row["interrupt_us"])[:1],
            ]
            for row in found["interrupts"]
        ]
        heads = ["CPU", "interrupt", "sent", "taken"]
        bench.table([*heads, "to entry p50", "p99", "takes p50"], rows, stream)


def _who(cpu: int, names: dict[int, str], ncpus: int) -> str:
    return str(cpu) if cpu < ncpus else names.get(cpu, str(cpu)).split()[0]


def _times(times: dict[str, Any]) -> list[str]:
    from shmipi.report.cells import span

    return [
        "-" if times[name] is None else span(times[name] * 1000)
        for name in ("p50", "p99")
    ]


# ---- start and stop ------------------------------------------------------------------


def _start(args: argparse.Namespace) -> int:
    with _attached(args.name) as cluster, usage_errors():
        cluster.tracing.start(args.records, lossless=args.lossless, events=args.events)
        size = cluster.tracing.size
    print(f"{args.name} records: rings of {size} records")
    return 0


def _stop(args: argparse.Namespace) -> int:
    with _attached(args.name) as cluster:
        cluster.tracing.stop()
        counts = cluster.tracing.counts()
    print(
        f"{args.name} records no more: {sum(one.recorded for one in counts)} records,"
        f" {sum(one.lost for one in counts)} lost"
    )
    return 0


ACTIONS: Final = {
    "record": _record,
    "export": _export,
    "summary": _summary,
    "start": _start,
    "stop": _stop,
}
