"""What the kernel's own inter-processor interrupts cost on this computer."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

from shmipi import _core
from shmipi.bench import limits, option
from shmipi.bench.hist import described
from shmipi.bench.limits import ABOUT, Limit
from shmipi.bench.runner import (
    KINDS,
    Rig,
    Seen,
    Steps,
    Watch,
    choose_cores,
    machine_facts,
    split,
)
from shmipi.errors import TraceFormatError
from shmipi.report.cells import Cells, Table, percentiles, valid_for
from shmipi.trace.ftrace import Ftrace, read_lines
from shmipi.trace.matching import match
from shmipi.trace.tracefs import IPI_EVENTS, Instance

__all__ = ["EXAMPLE", "HELP", "ROWS", "Options", "run", "table"]

HELP = """\
What a real inter-processor interrupt takes here: a private expedited
membarrier(), and a shootdown of other cores' TLBs by mprotect() of one page
and of 64, each with a busy thread of the process on the other core. Where
tracefs can be had (root), they are made once more under its tracepoints: how
long the kernel's interrupts, of each vector, took from being sent to their
entry, in whole microseconds, as it prints them. Nothing global is written."""
EXAMPLE = """\
shmipi bench kernel
shmipi bench kernel --calls 20k --json kernel.json"""

ROWS: Final = ("membarrier", "mprotect", "mprotect64")


@dataclass(frozen=True)
class Options:
    """What to measure: ``calls`` of each, in ``blocks``."""

    calls: int = option.calls(2000, "calls of each")
    warmup: int = option.warmup()
    gap_us: float = option.gap_of_calls()
    blocks: int = option.blocks()
    cores: str | Sequence[int] = option.pair_of_cores()

    @property
    def gap_ns(self) -> int:
        """The pause before each call, in ns."""
        return round(self.gap_us * 1000)


def run(
    options: Options, progress: Callable[..., None] | None = None
) -> dict[str, Any]:
    """Measure and return the document of ``bench kernel``, without its schema.

    Rows take turns in blocks. Raises ``CommandError`` for cores that cannot be used,
    and what a boot raises; what the system forbids is listed under ``unavailable``.
    """
    cores = choose_cores(options.cores)
    unavailable: dict[str, str] = {}
    rows: list[dict[str, Any]] = []
    with Rig(cores) as rig:
        found = [Limit(name) for name in ROWS]
        steps = Steps(progress, len(found) * options.blocks)
        for part in split(options.calls, options.blocks):
            for limit in found:
                steps(limit.name)
                took = limits.measure(
                    rig, limit, part, gap_ns=options.gap_ns, warmup=options.warmup
                )
                limit.blocks.append(took)
        for limit in found:
            if limit.unavailable is None:
                rows.append(_row(limit))
            else:
                unavailable[limit.name] = limit.unavailable
        try:
            rows += _traced(rig, found, min(options.calls, 2000), options)
        except (OSError, TraceFormatError) as error:
            unavailable["send_to_entry"] = f"tracefs: {error}"
        result = {
            "bench": "kernel",
            "machine": machine_facts(sender_core=cores[0], target_core=cores[1]),
            "timer_ns": rig.timer_ns,
            "clock": rig.clock,
            "gap_us": options.gap_us,
            "calls": options.calls,
            "blocks": options.blocks,
            "gc": False,
            "rows": rows,
        }
    if unavailable:
        result["unavailable"] = unavailable
    return result


def _traced(
    rig: Rig, made: Sequence[Limit], calls: int, options: Options
) -> list[dict[str, Any]]:
    """Make the calls once more, traced: a row for each vector that was taken.

    Raises OSError and TraceFormatError: there is no trace.
    """
    instance = Instance()
    try:
        if not instance.enable(IPI_EVENTS):
            raise OSError("the kernel has no tracepoints of IPIs")
        seen = Seen()
        with Watch(rig.cores, seen), instance:
            for limit in made:
                limits.measure(rig, Limit(limit.name), calls, gap_ns=options.gap_ns)
        trace = read_lines(instance.text().splitlines(keepends=True), "tracefs")
    finally:
        instance.close()
    found: dict[str, _core.Hist] = {}
    sent: Counter[str] = Counter()
    for one in match(trace).sent:
        if one.cpu not in rig.cores:
            continue
        sent[one.vector] += 1
        if one.entry is not None:
            ns = max(0, one.entry.time_ns - one.record.time_ns)
            found.setdefault(one.vector, _core.Hist()).record(ns)
    rows: list[dict[str, Any]] = []
    for vector, took in sorted(found.items()):
        told = seen.ending(0, [*seen.why(None), *_lost(trace)])
        told["real_ipis_note"] = "its IPIs are real ones"
        row: dict[str, Any] = {
            "bench": "kernel",
            "what": "send_to_entry",
            "vector": vector,
            "calls": sent[vector],
            "rtt_ns": described(took),
        }
        rows.append(row | told)
    return rows


def _lost(trace: Ftrace) -> list[str]:
    if trace.in_buffer is None or trace.written in (None, trace.in_buffer):
        return []
    return [f"the trace has {trace.in_buffer} of {trace.written} events"]


def _row(limit: Limit) -> dict[str, Any]:
    told = limit.as_json()
    keys = ("min", "p50", "p90", "p99", "p999", "max", "mean", "count", "hist")
    return {
        "bench": "kernel",
        "what": limit.name,
        "calls": told.pop("calls"),
        "rtt_ns": {key: told.pop(key) for key in keys},
        "rtt_ns_blocks": limit.blocks,
        **told,
    }


def table(result: dict[str, Any]) -> Table:
    """Return the document as a table for people."""
    rows: list[Cells] = []
    notes: list[str] = []
    for row in result["rows"]:
        real = row["real_ipis"]
        rows.append(
            [
                " ".join((row["what"], row.get("vector", ""))).strip(),
                *percentiles(row["rtt_ns"]),
                *("-" if real is None else f"{real[kind]:.2f}" for kind in KINDS),
                valid_for(row, notes),
            ]
        )
    notes += [f"{name}: {ABOUT[name]}" for name in ROWS]
    if any(row["what"] == "send_to_entry" for row in result["rows"]):
        notes.append(
            "send_to_entry: from the kernel's ipi_send_cpu or ipi_send_cpumask to the"
            " entry of the vector, of all IPIs to these cores meanwhile"
        )
    notes += [f"{name}: {why}" for name, why in result.get("unavailable", {}).items()]
    header = ["what", "p50", "p90", "p99", "p99.9", "max", *KINDS, "valid"]
    return header, rows, notes
