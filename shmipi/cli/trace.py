"""``shmipi trace``: what a real kernel's trace says of its IPIs."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any, Final, TextIO, cast

from shmipi.cli import trace_kernel, tracing
from shmipi.cli.options import add_json_option, document, human_stream, write_json
from shmipi.errors import CommandError, TraceFormatError

if TYPE_CHECKING:
    from shmipi.cli import Parser
    from shmipi.trace.ftrace import Ftrace

HELP = """\
Records a kernel's IPIs, or a machine's, and follows each call and each interrupt in
what was recorded: who queued it, whether an IPI was sent for it, when it ran."""
EXAMPLE = """\
shmipi trace kernel -o hackbench.ftrace.xz -- hackbench
shmipi trace import hackbench.ftrace.xz"""
_IMPORT_HELP = """\
FILE is the text of tracefs (its `trace` file, with any trace_options) or of `trace-cmd
report`, as it is or compressed (.xz, .gz), with the events csd:*, ipi:* and
irq_vectors:* (arm64: ipi:*). The order of its lines is the order of events. Exit status
1 when it is no trace."""
_IMPORT_EXAMPLE = """\
shmipi trace import hackbench.ftrace.xz"""


def prepare_parser(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command."""
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    action = cast(
        "Parser",
        actions.add_parser("import", help="read a trace and say what is in it"),
    )
    action.describe(_IMPORT_HELP, _IMPORT_EXAMPLE)
    action.add_argument("file", metavar="FILE", help="the trace")
    add_json_option(action)
    trace_kernel.add_action(actions)
    tracing.add_actions(actions)


def run(args: argparse.Namespace) -> int:
    """Do what the action is."""
    return _ACTIONS[args.action](args)


def _import(args: argparse.Namespace) -> int:
    """Read, match, print."""
    from shmipi.trace import ftrace, matching

    try:
        trace = ftrace.read(args.file)
    except TraceFormatError as error:
        raise CommandError(str(error)) from None
    except OSError as error:
        raise CommandError(f"{args.file!r}: {error.strerror}", status=2) from None
    kernel = matching.match(trace).as_dict()
    if args.json != "-":
        _print(trace, kernel, human_stream(args))
    write_json(
        args.json,
        document(
            "trace-import",
            file=trace.name,
            ncpus=trace.ncpus,
            lines={
                "all": trace.lines,
                "events": len(trace.records),
                "comments": trace.comments,
                "blank": trace.blank,
                "lost": trace.lost_lines,
                "other": trace.other,
            },
            lost_events=trace.lost,
            warnings=trace.warnings,
            events=dict(sorted(trace.events.items())),
            kernel=kernel,
        ),
    )
    return 0


def _print(trace: Ftrace, kernel: dict[str, Any], stream: TextIO) -> None:
    from shmipi.report import bench
    from shmipi.report.table import columns_of, folded

    def say(text: str) -> None:
        print(folded(text, columns_of(stream)), file=stream)

    records = trace.records
    seconds = (records[-1].time_ns - records[0].time_ns) / 1e9 if records else 0.0
    say(
        f"{trace.name}: {len(records)} events of {trace.ncpus} CPUs in {seconds:.3f} s,"
        f" {trace.lines} lines"
    )
    for warning in trace.warnings:
        say(f"warning: {warning}")
    print(file=stream)
    say(
        f"{kernel['queued']} calls queued: {kernel['rung']} with an IPI,"
        f" {kernel['coalesced']} behind another (coalesced), {kernel['elided']} for a"
        " CPU that polled (elided)"
    )
    say(
        f"{kernel['run']} seen to run, {kernel['unseen']} ran unseen in an idle task;"
        f" {kernel['entries_local']} functions ran locally; at most"
        f" {kernel['largest_batch']} wake-ups at once"
    )
    print(file=stream)
    rows = [
        ["queued to function", "", *_cells(kernel["queue_to_function_us"])],
        ["function", "", *_cells(kernel["function_run_us"])],
    ]
    for vector, counts in kernel["ipi"].items():
        entered = f"{counts['sent']} sent, {counts['entered']} taken"
        if counts["entries_without_send"]:
            entered += f", {counts['entries_without_send']} unexplained"
        rows.append([f"{vector} IPI", entered, *_cells(counts["send_to_entry_us"])])
    bench.table(["what", "how often", "count", "p50", "p99", "max"], rows, stream)


def _cells(times: dict[str, Any]) -> list[str]:
    from shmipi.report.cells import span

    return [
        str(times["count"]),
        *(
            "-" if times[name] is None else span(times[name] * 1000)
            for name in ("p50", "p99", "max")
        ),
    ]


_ACTIONS: Final = {"import": _import, "kernel": trace_kernel.run, **tracing.ACTIONS}
