"""What tracepoints cost: switched off, and for each event that is recorded."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

from shmipi import _core
from shmipi.bench import option
from shmipi.bench.runner import (
    Seen,
    Watch,
    choose_cores,
    machine_facts,
    median,
    split,
    spread,
)
from shmipi.cluster import Cluster
from shmipi.report.cells import Table, span

__all__ = ["EXAMPLE", "HELP", "Options", "run", "table"]

HELP = """\
One tracepoint in a loop of C, less the loop: switched off (a branch), recorded in a
ring that overwrites its oldest, and in a lossless one that has room; beside one stamp
of the clock, which each record has. Then waiting calls of the native no-op to a CPU
that polls, with the kernel's events off and on."""
EXAMPLE = """\
shmipi bench trace"""

_RING: Final = 1 << 16
_OFF, _ON, _LOSSLESS = "off", "on", "on, lossless"
_EVENT: Final = "flush"  # whichever: all are recorded alike


@dataclass(frozen=True)
class Options:
    """What to measure: so many events a row, and a tenth as many calls."""

    calls: int = option.calls(200_000, "events of each row")
    blocks: int = option.blocks()
    cores: str | Sequence[int] = option.cores()


def run(
    options: Options, progress: Callable[[str], None] | None = None
) -> dict[str, Any]:
    """Measure, and return the document of ``bench trace``.

    ``ns`` is the median over blocks, of events less the empty loop, of calls the median
    round trip; ``spread`` the lowest and the highest block; ``stamp_ns`` one stamp.
    """
    events: dict[str, list[float]] = {_OFF: [], _ON: [], _LOSSLESS: []}
    calls: dict[str, list[float]] = {_OFF: [], _ON: []}
    seen = Seen()
    cores = choose_cores(options.cores)
    with Cluster(2, idle="poll", cores=list(cores)) as cluster, Watch(cores, seen):
        for number, count in enumerate(split(options.calls, options.blocks)):
            if progress is not None:
                progress(f"block {number + 1} of {options.blocks}")
            for row, found in events.items():
                most = min(count, _RING // 2) if row == _LOSSLESS else count
                _switch(cluster, row, _EVENT)
                (ns,) = cluster.run(_core.bench_trace, most, cpus=[0])
                found.append(ns)
            for row, found in calls.items():
                _switch(cluster, row, "kernel")
                (rtt,) = cluster.run(_median_call, max(10, count // 10), cpus=[0])
                found.append(rtt)
    rows = [
        {
            "bench": "trace",
            "what": what,
            "tracing": row,
            "ns": median(found),
            "spread": spread(found),
            **seen.ending(len(found), seen.why(None)),
        }
        for what, group in (("event", events), ("call", calls))
        for row, found in group.items()
    ]
    return {
        "bench": "trace",
        "machine": machine_facts(),
        "stamp_ns": _core.timer_cost_ns(),
        "rows": rows,
    }


def _switch(cluster: Cluster, row: str, events: str) -> None:
    cluster.tracing.start(_RING, lossless=row == _LOSSLESS, events=events)
    if row == _LOSSLESS:
        cluster.tracing.recorder().finish()  # all the room there is
    elif row == _OFF:
        cluster.tracing.stop()


def _median_call(calls: int) -> float:
    rtt = _core.bench_calls(1, calls, warmup=calls // 10, state=_core.POLLING)[0]
    return float(rtt.quantile(0.5))


def table(result: dict[str, Any]) -> Table:
    """Return the document as a table for people."""
    rows = [
        [
            "a tracepoint" if row["what"] == "event" else "a call, polling",
            row["tracing"],
            _time(row["ns"], row["what"]),
            " to ".join(_time(ns, row["what"]) for ns in row["spread"]),
        ]
        for row in result["rows"]
    ]
    notes = [f"one stamp of the clock: {span(result['stamp_ns'])}"]
    return ["what", "tracing", "median", "spread"], rows, notes


def _time(ns: float, what: str) -> str:
    """Return the time; of an event in parts of a ns, which it takes switched off."""
    return f"{ns:.2f} ns" if what == "event" else span(ns)
