"""Storms of calls, in the patterns of the kernel module ipistorm."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from shmipi import _core
from shmipi.bench import option, tasks
from shmipi.bench.hist import described
from shmipi.bench.runner import (
    Disturbance,
    Rig,
    Seen,
    Steps,
    machine_facts,
    median,
    spread,
)
from shmipi.errors import CommandError
from shmipi.irq.chips import Chip
from shmipi.machine import topology
from shmipi.report.cells import Cells, Table, span, valid_for

__all__ = [
    "EXAMPLE",
    "HELP",
    "PATTERNS",
    "WAITS",
    "Options",
    "plan",
    "run",
    "table",
    "targets",
]

HELP = """\
Many CPUs call at once, for a while: all call CPU 0, all call all others, each
the one at an offset, each within its group, or only those of a list call all
others. Once each waits for its call, which gives latency under load, and once
nobody waits, which gives the rate; how many doorbells were rung, how many
calls were coalesced with others that the target had not taken yet, and how
many it saw without one."""
EXAMPLE = """\
shmipi bench storm
shmipi bench storm --cpus 16 --pattern all_to_all,groups --group 4 --ms 500"""

PATTERNS: Final = ("all_to_one", "all_to_all", "offset", "groups", "cpulist")
WAITS: Final = ("wait", "nowait")


@dataclass(frozen=True)
class Options:
    """What to measure: each pattern for ``ms`` in each of ``blocks``."""

    ncpus: Sequence[int] = option.sizes((max(4, topology.default_ncpus()),))
    patterns: Sequence[str] = option.several(
        "pattern", PATTERNS, f"only these: {', '.join(PATTERNS)}"
    )
    waits: Sequence[str] = option.several("wait", WAITS, "only: wait, nowait")
    offset: int = option.number("offset", 1, "how far each calls", most=option.MAX_CPUS)
    group: int = option.number(
        "group", 2, "CPUs of a group, a power of two", least=2, most=option.MAX_CPUS
    )
    cpulist: str | Sequence[int] = option.cpus(
        "cpulist", "the CPUs that call all others, by default the first half"
    )
    ms: int = option.number("ms", 100, "of each block, in ms", most=60_000)
    blocks: int = option.blocks(5)
    cores: str | Sequence[int] = option.cores()
    doorbell: str = option.doorbell()
    controller: str | type[Chip] = option.controller()


def targets(ncpus: int, offset: int, mask: int = -1) -> list[int]:
    """Return whom each CPU calls: the one at an offset, within the bits of ``mask``."""
    return [(a & ~mask | (a + offset) & mask) % ncpus for a in range(ncpus)]


def plan(pattern: str, ncpus: int, options: Options) -> dict[int, list[int]]:
    """Return whom each caller calls in a pattern. ``CommandError``: nobody would."""
    every = range(ncpus)
    if pattern == "all_to_one":
        found = {cpu: [0] for cpu in every[1:]}
    elif pattern == "all_to_all":
        found = {cpu: [other for other in every if other != cpu] for cpu in every}
    elif pattern == "cpulist":
        callers: Sequence[int] = every[: max(1, ncpus // 2)]
        if not isinstance(options.cpulist, str):
            callers = [cpu for cpu in options.cpulist if cpu < ncpus]
        found = {cpu: [other for other in every if other != cpu] for cpu in callers}
    else:
        if pattern == "groups":
            if options.group & (options.group - 1):
                raise CommandError("--group is a power of two", status=2)
            whom = targets(ncpus, 1, options.group - 1)
        else:
            whom = targets(ncpus, options.offset)
        found = {cpu: [whom[cpu]] for cpu in every if whom[cpu] != cpu}
    if not found:
        raise CommandError(f"no CPU of {ncpus} calls another: {pattern}", status=2)
    return found


@dataclass
class Storm:
    """What was measured of one pattern."""

    pattern: str
    wait: str
    plan: dict[int, list[int]]
    rtt: _core.Hist = field(default_factory=_core.Hist)
    rates: list[float] = field(default_factory=list)
    seen: Seen = field(default_factory=Seen)
    calls: int = 0
    rung: int = 0
    coalesced: int = 0
    elided: int = 0

    def measure(self, rig: Rig, options: Options) -> None:
        """Measure one block."""
        many = self.pattern in ("all_to_all", "cpulist")
        rig.flags[tasks.MET] = 0
        before = rig.cluster.counters()
        with Disturbance(rig, 0, self.seen, every=True):
            jobs = [
                rig.start(
                    cpu,
                    tasks.storm,
                    whom,
                    options.ms / 1000,
                    many,
                    self.wait == "wait",
                    len(self.plan),
                )
                for cpu, whom in self.plan.items()
            ]
            found = [job.result() for job in jobs]
        after = rig.cluster.counters()
        calls = sum(made for _, made, _ in found)
        for rtt, _, _ in found:
            self.rtt.merge(rtt)
        self.rates.append(calls / max(ns for _, _, ns in found) * 1e9)
        self.calls += calls

        def grown(name: str) -> int:
            return sum(int(after[name][cpu] - before[name][cpu]) for cpu in self.plan)

        self.rung += grown("doorbells_sent") + grown("kicks_sent")
        self.coalesced += grown("coalesced")
        self.elided += grown("elided")

    def as_json(self, rig: Rig) -> dict[str, Any]:
        """Return the row of a document."""
        return {
            "bench": "storm",
            "pattern": self.pattern,
            "wait": self.wait,
            "ncpus": len(rig.cores),
            "senders": len(self.plan),
            "doorbell": rig.doorbell,
            "handler": "native",
            "calls": self.calls,
            "calls_per_s": median(self.rates),
            "calls_per_s_spread": spread(self.rates),
            "calls_per_s_blocks": self.rates,
            "rtt_ns": described(self.rtt) if self.rtt.count else None,
            "doorbells_per_call": self.rung / self.calls,
            "coalesced_per_call": self.coalesced / self.calls,
            "elided_per_call": self.elided / self.calls,
            **self.seen.ending(self.calls, self.seen.why(None)),
        }


def run(
    options: Options, progress: Callable[..., None] | None = None
) -> dict[str, Any]:
    """Measure and return the document of ``bench storm``, without its schema.

    A call to many CPUs at once counts once for each; its round trip is that of all.
    Raises ``CommandError`` for a pattern in which nobody calls, and what a boot raises.
    """
    plans = {
        ncpus: {name: plan(name, ncpus, options) for name in options.patterns}
        for ncpus in options.ncpus
    }
    rows: list[dict[str, Any]] = []
    kinds = len(options.patterns) * len(options.waits)
    steps = Steps(progress, kinds * options.blocks * len(options.ncpus))
    clock = {}
    for ncpus, of_size in plans.items():
        cores = topology.place(ncpus, options.cores)
        with Rig(
            cores, doorbell=options.doorbell, controller=options.controller
        ) as rig:
            clock = {"timer_ns": rig.timer_ns, "clock": rig.clock}
            found = [
                Storm(pattern, wait, whom)
                for pattern, whom in of_size.items()
                for wait in options.waits
            ]
            for block in range(options.blocks):
                for storm in found:
                    steps(f"{ncpus} CPUs, {storm.pattern}, {storm.wait}, {block + 1}")
                    storm.measure(rig, options)
            rows += [storm.as_json(rig) for storm in found]
    return {
        "bench": "storm",
        "machine": machine_facts(),
        **clock,
        "ms": options.ms,
        "blocks": options.blocks,
        "offset": options.offset,
        "group": options.group,
        "gc": False,
        "rows": rows,
    }


def table(result: dict[str, Any]) -> Table:
    """Return the document as a table for people."""
    rows: list[Cells] = []
    notes: list[str] = []
    for row in result["rows"]:
        rtt = row["rtt_ns"] or {}
        real = row["real_ipis_per_call"]
        rows.append(
            [
                row["pattern"],
                row["wait"],
                str(row["ncpus"]),
                str(row["senders"]),
                f"{row['calls_per_s'] / 1e3:.4g} k",
                *(span(rtt.get(key)) for key in ("p50", "p99", "max")),
                f"{row['doorbells_per_call']:.3f}",
                f"{row['coalesced_per_call']:.3f}",
                f"{row['elided_per_call']:.3f}",
                "-" if real is None else f"{real:.3f}",
                valid_for(row, notes),
            ]
        )
    notes.append(
        "a call to n CPUs at once counts n times, and its round trip is until all have"
        " answered; coalesced: the target had not taken those before; elided: it"
        " polled"
    )
    header = ["pattern", "mode", "CPUs", "senders", "calls/s", "p50", "p99", "max"]
    header += ["rung/call", "coalesced", "elided", "real IPIs", "valid"]
    return header, rows, notes
