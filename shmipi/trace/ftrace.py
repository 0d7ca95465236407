"""Reading what a kernel recorded: the text of tracefs and of ``trace-cmd report``.

The order of the lines is the order of events. The times printed are not looked at for
it: they are rounded, and those of one microsecond may have any order.
"""

from __future__ import annotations

import gzip
import lzma
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Set
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Final, NamedTuple, cast

from shmipi.errors import TraceFormatError

__all__ = ["Ftrace", "Record", "fields_of", "read", "read_lines"]

#: `task-pid [(tgid)] [cpu] [flags] seconds.fraction: event: fields`
_LINE: Final = re.compile(
    r"\s*(?P<task>.+)-(?P<pid>\d{1,10})\s+(?:\(\s*[-\d]+\s*\)\s+)?\[(?P<cpu>\d{1,5})\]\s+"
    r"(?:(?P<flags>[^\s\d][^\s]{2,6})\s+)?(?P<s>\d{1,10})\.(?P<fraction>\d{3,9}):\s+"
    r"(?P<event>\w+):(?:\s+(?P<fields>.*?))?\s*"
)
#: The same with `trace_options` latency-format: `task-pid cpuflags time us: event: ...`
_LATENCY_LINE: Final = re.compile(
    r"\s*(?P<task>.+)-(?P<pid>\d{1,10})\s+(?P<cpu>\d{1,5})(?P<flags>[^\s\d][^\s]{2,6})\s+"
    r"(?P<us>\d{1,18})us[!+#*@$ ]?\s*:\s+(?P<event>\w+):(?:\s+(?P<fields>.*?))?\s*"
)
_FIELD: Final = re.compile(r"(\w+)=(.*?)(?:,?\s+(?=\w+=)|$)")
_WRITTEN: Final = re.compile(
    r"# entries-in-buffer/entries-written: (\d{1,18})/(\d{1,18})\s+#P:(\d{1,5})"
)
_LOST: Final = re.compile(r"CPU:(\d+) \[(?:LOST )?(\d{1,18}) EVENTS(?: DROPPED)?\]")
#: Bytes that are in no text.
_BINARY: Final = re.compile("[\0\ud800-\udfff]")
#: What stands between events and is none.
_OTHER: Final = re.compile(
    r"cpus=(\d{1,5})$|CPU \d+ is empty|version = \d+|#{5} CPU \d+ buffer started #{4}"
)
#: What an IPI's entry has before it, and no entry without it for long.
_SENDS: Final = frozenset(("ipi_send_cpu", "ipi_send_cpumask"))
_TAKEN: Final = frozenset(
    ("call_function_entry", "call_function_single_entry", "reschedule_entry")
)
_CPU: Final = re.compile(r"\d{1,5}")
_MASK: Final = re.compile(r"(?=.{1,18000}$)[0-9a-fA-F]+(?:,[0-9a-fA-F]+)*")
_CSD: Final = re.compile(r"(?:0x)?[0-9a-fA-F]{1,16}|\((?:null|nil)\)")
_WORD: Final = re.compile(r".+")
#: What is looked at in events that are followed.
_FOLLOWED: Final = {
    "csd_queue_cpu": {"cpu": _CPU, "func": _WORD, "csd": _CSD},
    "csd_function_entry": {"func": _WORD, "csd": _CSD},
    "csd_function_exit": {"func": _WORD, "csd": _CSD},
    "ipi_send_cpu": {"cpu": _CPU, "callback": _WORD},
    "ipi_send_cpumask": {"cpumask": _MASK, "callback": _WORD},
}


class Record(NamedTuple):
    """An event: where it stands in the file, and what it says."""

    line: int
    task: str
    pid: int
    cpu: int
    #: Columns of irqs-off, need-resched, context and preempt-depth, or "".
    flags: str
    time_ns: int
    event: str
    text: str


@dataclass
class Ftrace:
    """A trace as it was read; every line of its file is counted somewhere."""

    name: str
    records: list[Record] = field(default_factory=list)
    #: How many CPUs: the header's number, or one more than the highest that is named.
    ncpus: int = 0
    #: How often each event is there.
    events: Counter[str] = field(default_factory=Counter)
    lines: int = 0
    comments: int = 0
    blank: int = 0
    #: Lines that say how many events were lost, and how many those were.
    lost_lines: int = 0
    lost: int = 0
    other: int = 0
    #: Of the header: events in the buffer, and written to it. None: it does not say.
    in_buffer: int | None = None
    written: int | None = None
    warnings: list[str] = field(default_factory=list)


def fields_of(record: Record) -> dict[str, str]:
    """Return the event's ``name=value`` pairs."""
    return dict(_FIELD.findall(record.text))


def read(path: str | Path) -> Ftrace:
    """Read a trace: text, or text compressed as ``.xz`` or ``.gz``.

    Raises ``TraceFormatError`` with the number of the line that is no part of a trace,
    and what opening a file raises.
    """
    path = Path(path)
    try:
        with _opened(path) as file:
            return read_lines(file, path.name)
    except (lzma.LZMAError, gzip.BadGzipFile, EOFError) as error:
        raise TraceFormatError(f"{path.name}: {error}", line=None) from None


def _opened(path: Path) -> IO[str]:
    with path.open("rb") as file:
        magic = file.read(6)
    # The name of a task is any 15 bytes: also a part of a character.
    how: Any = {"mode": "rt", "encoding": "utf-8", "errors": "surrogateescape"}
    if magic == b"\xfd7zXZ\0":
        return cast("IO[str]", lzma.open(path, **how))
    if magic[:2] == b"\x1f\x8b":
        return cast("IO[str]", gzip.open(path, **how))
    return cast("IO[str]", path.open(**how))


def read_lines(lines: Iterable[str], name: str) -> Ftrace:
    """Read a trace from its lines. Raises ``TraceFormatError``."""
    trace = Ftrace(name)
    trace.records.extend(_records(trace, lines))
    if not trace.lines or not (trace.records or trace.written is not None):
        raise TraceFormatError(f"{name}: there is no event in it", line=None)
    highest = max((record.cpu for record in trace.records), default=-1)
    trace.ncpus = max(trace.ncpus, highest + 1)
    trace.warnings.extend(_warnings(trace))
    return trace


def _records(trace: Ftrace, lines: Iterable[str]) -> Iterator[Record]:
    for number, line in enumerate(lines, 1):
        trace.lines = number
        text = line.rstrip("\n")
        found = _LINE.fullmatch(text) or _LATENCY_LINE.fullmatch(text)
        if found is not None:
            trace.events[found["event"]] += 1
            record = Record(
                number,
                found["task"],
                int(found["pid"]),
                int(found["cpu"]),
                found["flags"] or "",
                _nanoseconds(found),
                found["event"],
                found["fields"] or "",
            )
            if damage := _damage(record):
                raise TraceFormatError(
                    f"{trace.name}:{number}: {record.event} {damage}", line=number
                )
            yield record
        elif not _accounted(trace, text.strip()):
            what = (
                f"this is no line of a kernel's trace: {text.strip()[:60]!r}"
                if not _BINARY.search(text)
                else "this is no text, or damaged"
            )
            raise TraceFormatError(f"{trace.name}:{number}: {what}", line=number)


def _damage(record: Record) -> str:
    """Say what is wrong with the fields that following an event takes, "": nothing."""
    wanted = _FOLLOWED.get(record.event)
    if wanted is None:
        return ""
    fields = fields_of(record)
    for name, pattern in wanted.items():
        if not pattern.fullmatch(fields.get(name, "")):
            return f"has no {name} that can be: {record.text[:60]!r}"
    return ""


def _nanoseconds(found: re.Match[str]) -> int:
    groups = found.groupdict()
    if "us" in groups:
        return int(groups["us"]) * 1000
    return int(groups["s"]) * 10**9 + int(groups["fraction"].ljust(9, "0"))


def _accounted(trace: Ftrace, text: str) -> bool:
    """Count a line that is no event: True if it belongs into a trace."""
    if not text:
        trace.blank += 1
    elif written := _WRITTEN.fullmatch(text):
        trace.comments += 1
        trace.in_buffer, trace.written = int(written[1]), int(written[2])
        trace.ncpus = int(written[3])
    elif lost := _LOST.fullmatch(text):
        trace.lost_lines += 1
        trace.lost += int(lost[2])
    elif other := _OTHER.match(text):
        trace.other += 1
        if other[1]:
            trace.ncpus = int(other[1])
    elif text.startswith("#"):
        trace.comments += 1
    else:
        return False
    return True


def _warnings(trace: Ftrace) -> Iterator[str]:
    if trace.in_buffer is not None and trace.written is not None:
        if trace.written > trace.in_buffer:
            yield (
                f"{trace.written - trace.in_buffer} of {trace.written} events were"
                " overwritten while it was recorded: its begin is missing"
            )
        if len(trace.records) < trace.in_buffer:
            yield (
                f"its header says {trace.in_buffer} events, and"
                f" {len(trace.records)} are there: the file was cut"
            )
    if trace.lost:
        yield f"{trace.lost} events were lost while it was recorded"
    last = {record.event: record.line for record in trace.records}
    for begin in sorted(last):
        end = begin.removesuffix("_entry") + "_exit"
        if begin.endswith("_entry") and end in last:
            # Each CPU may be inside one when the trace ends.
            yield from _ended(trace, last, {begin}, {end}, trace.ncpus)
            yield from _ended(trace, last, {end}, {begin}, trace.ncpus)
    # Of each vector one is in service and one pending, on each CPU.
    under_way = 2 * len(_TAKEN) * trace.ncpus
    yield from _ended(trace, last, _SENDS & set(last), _TAKEN & set(last), under_way)


def _ended(
    trace: Ftrace,
    last: Mapping[str, int],
    kinds: Set[str],
    others: Set[str],
    most: int,
) -> Iterator[str]:
    """Say so of kinds of event that stop while others, which follow them, go on."""
    if not kinds:
        return
    line = max(last[kind] for kind in kinds)
    since = sum(
        record.event in others and record.line > line for record in trace.records
    )
    if since > most:
        yield (
            f"{' and '.join(sorted(kinds))} ends at line {line}, and"
            f" {' or '.join(sorted(others))} is there {since} times after it: it was"
            " switched off earlier"
        )
