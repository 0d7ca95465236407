"""A recording for other programs: ftrace text, Chrome's JSON, Perfetto's protobuf."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import IO, Any, Final

from shmipi.trace import trace_dat
from shmipi.trace.kernel import Pointer, events, text_of
from shmipi.trace.record import Trace
from shmipi.trace.timeline import Span, Timeline, timeline

__all__ = ["FORMATS", "chrome", "ftrace", "perfetto", "write"]

_HEAD: Final = """\
# tracer: nop
#
# entries-in-buffer/entries-written: {held}/{written}   #P:{ncpus}
#
#                                _-----=> irqs-off/BH-disabled
#                               / _----=> need-resched
#                              | / _---=> hardirq/softirq
#                              || / _--=> preempt-depth
#                              ||| / _-=> migrate-disable
#                              |||| /     delay
#           TASK-PID     CPU#  |||||  TIMESTAMP  FUNCTION
#              | |         |   |||||     |         |
"""
#: The least that a mark lasts in Chrome's JSON: arrows begin in slices.
_MARK_NS: Final = 100


def ftrace(trace: Trace) -> Iterator[str]:
    """Yield the lines of tracefs's ``trace`` file, times in ns."""
    found = list(events(trace))
    highest = max((event.cpu for event in found), default=-1)
    yield from _HEAD.format(
        held=len(found),
        written=len(found) + sum(trace.lost.values()),
        ncpus=max(trace.ncpus, highest + 1),
    ).splitlines()
    for event in found:
        seconds, ns = divmod(event.time_ns, 10**9)
        yield (
            f"{event.task:>16s}-{event.pid:<7d} [{event.cpu:03d}] {event.flags}"
            f" {seconds:5d}.{ns:09d}: {event.name}: {text_of(event)}"
        )


def _args(fields: dict[str, Any]) -> dict[str, str | int]:
    return {
        name: value.name
        if isinstance(value, Pointer)
        else f"{value:#x}"
        if name in ("csd", "cpumask")
        else value
        for name, value in fields.items()
        if name != "ncpus"
    }


def _of(trace: Trace) -> Timeline:
    return timeline(events(trace), trace.ncpus)


def chrome(trace: Trace) -> dict[str, Any]:
    """Return Chrome's JSON: a row for each CPU, arrows from a send to its handler.

    ``ts`` is in us of CLOCK_MONOTONIC. A call that is queued and an IPI that is sent
    are slices of at most 0.1 us: arrows begin in slices.
    """
    found = _of(trace)
    name = str(trace.about["machine"])
    rows: list[dict[str, Any]] = [
        {"ph": "M", "name": "process_name", "pid": 1, "args": {"name": name}}
    ]
    for cpu, who in sorted(found.cpus.items()):
        about = {"ph": "M", "pid": 1, "tid": cpu + 1}
        rows.append({**about, "name": "thread_name", "args": {"name": who}})
        rows.append({**about, "name": "thread_sort_index", "args": {"sort_index": cpu}})
    lasts = _until_next(found)
    slices: list[tuple[int, int, dict[str, Any]]] = []
    for span in found.spans:
        slices.append(_slice(span.cpu, span.start_ns, span.end_ns, span.name, span))
    for mark, ns in zip(found.marks, lasts, strict=True):
        row = _slice(mark.cpu, mark.time_ns, mark.time_ns + ns, mark.name, None)
        row[2].update(cat="send", args=_args(mark.fields))
        slices.append(row)
    # A slice before those inside of it.
    slices.sort(key=lambda entry: entry[:2])
    rows += [row for _, _, row in slices]
    for number, arrow in enumerate(found.arrows, 1):
        common = {"cat": "ipi", "name": "ipi", "id": number, "pid": 1}
        mark, span = arrow.mark, arrow.span
        rows.append({**common, "ph": "s", "tid": mark.cpu + 1, "ts": _us(mark.time_ns)})
        rows.append(
            {
                **common,
                "ph": "f",
                "bp": "e",
                "tid": span.cpu + 1,
                "ts": _us(span.start_ns),
            }
        )
    return {
        "traceEvents": rows,
        "displayTimeUnit": "ns",
        "otherData": {
            "machine": name,
            "controller": trace.about["controller"],
            "lost": sum(trace.lost.values()),
        },
    }


def _us(ns: int) -> float:
    return ns / 1000


def _slice(
    cpu: int, start: int, end: int, name: str, span: Span | None
) -> tuple[int, int, dict[str, Any]]:
    row = {
        "ph": "X",
        "pid": 1,
        "tid": cpu + 1,
        "ts": _us(start),
        "dur": _us(end - start),
        "name": name,
    }
    if span is not None:
        row.update(cat=span.kind, args=_args(span.fields))
    return start, start - end, row


def _until_next(found: Timeline) -> list[int]:
    """Return how long each mark may last: until something else is there on its CPU."""
    times: dict[int, list[int]] = {}
    for span in found.spans:
        times.setdefault(span.cpu, []).extend((span.start_ns, span.end_ns))
    for mark in found.marks:
        times.setdefault(mark.cpu, []).append(mark.time_ns)
    after: dict[tuple[int, int], int] = {}
    for cpu, moments in times.items():
        moments = sorted(set(moments))
        for at, following in zip(moments, [*moments[1:], None], strict=True):
            ns = _MARK_NS if following is None else min(_MARK_NS, following - at)
            after[cpu, at] = ns
    return [after[mark.cpu, mark.time_ns] for mark in found.marks]


def perfetto(trace: Trace) -> bytes:
    """Return a Perfetto trace: track events, with flows from a send to its handler.

    Raises ``ImportError`` without the package perfetto (``shmipi[trace]``).
    """
    try:
        from perfetto.protos.perfetto.trace.perfetto_trace_pb2 import TrackEvent
        from perfetto.trace_builder.proto_builder import TraceProtoBuilder
    except ImportError:
        raise ImportError(
            "Perfetto's format needs the package perfetto: pip install 'shmipi[trace]'"
        ) from None
    found = _of(trace)
    flows: dict[int, list[int]] = {}
    for number, arrow in enumerate(found.arrows, 1):
        flows.setdefault(id(arrow.mark), []).append(number)
        flows.setdefault(id(arrow.span), []).append(number)
    builder = TraceProtoBuilder()

    def packet(at: int) -> Any:
        made = builder.add_packet()
        made.timestamp = at
        made.trusted_packet_sequence_id = 1
        return made

    first = packet(found.begin_ns)
    first.track_descriptor.uuid = 1
    first.track_descriptor.process.pid = 1
    first.track_descriptor.process.process_name = str(trace.about["machine"])
    for cpu, who in sorted(found.cpus.items()):
        row = packet(found.begin_ns).track_descriptor
        row.uuid, row.parent_uuid = cpu + 2, 1
        row.thread.pid, row.thread.tid, row.thread.thread_name = 1, cpu + 2, who
    made: list[tuple[int, int, int, Any]] = []
    for n, span in enumerate(found.spans):
        # What ends at one time ends from within, what begins begins from without.
        made.append((span.start_ns, 1, n, span))
        made.append((span.end_ns, 0 if span.end_ns > span.start_ns else 2, -n, span))
    made += [(mark.time_ns, 1, len(made), mark) for mark in found.marks]
    for at, order, _, what in sorted(made, key=lambda entry: entry[:3]):
        event = packet(at).track_event
        event.track_uuid = what.cpu + 2
        if isinstance(what, Span):
            if order != 1:
                event.type = TrackEvent.TYPE_SLICE_END
                continue
            event.type = TrackEvent.TYPE_SLICE_BEGIN
            event.categories.append(what.kind)
        else:
            event.type = TrackEvent.TYPE_INSTANT
            event.categories.append("send")
        event.name = what.name
        event.flow_ids.extend(flows.get(id(what), []))
        for name, value in _args(what.fields).items():
            note = event.debug_annotations.add()
            note.name = name
            if isinstance(value, int):
                note.int_value = value
            else:
                note.string_value = value
    data: bytes = builder.serialize()
    return data


def _write_ftrace(trace: Trace, file: IO[bytes]) -> None:
    for line in ftrace(trace):
        file.write(line.encode() + b"\n")


def _write_chrome(trace: Trace, file: IO[bytes]) -> None:
    file.write(json.dumps(chrome(trace), separators=(",", ":")).encode())


def _write_perfetto(trace: Trace, file: IO[bytes]) -> None:
    file.write(perfetto(trace))


def _write_dat(trace: Trace, file: IO[bytes]) -> None:
    file.write(trace_dat.made(trace))


#: What ``shmipi trace export --to`` knows: who writes it, and what its files end with.
FORMATS: Final = {
    "perfetto": (_write_perfetto, ".perfetto-trace"),
    "chrome": (_write_chrome, ".json"),
    "ftrace": (_write_ftrace, ".ftrace"),
    "trace.dat": (_write_dat, ".dat"),
}


def write(trace: Trace, to: str, file: IO[bytes]) -> None:
    """Write a recording in one of ``FORMATS``. ``KeyError``, ``ImportError``."""
    FORMATS[to][0](trace, file)
