"""What a broadcast costs as machines get larger, beside as many plain processes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import psutil

from shmipi import _core
from shmipi.bench import option, tasks
from shmipi.bench.boot import private_kib, shared_kib
from shmipi.bench.death import senders
from shmipi.bench.hist import described
from shmipi.bench.runner import (
    Disturbance,
    Rig,
    Seen,
    Steps,
    machine_facts,
    median,
    split,
    spread,
)
from shmipi.irq.chips import Chip
from shmipi.machine import topology
from shmipi.report.cells import Cells, Table, ratio, span, valid_for

__all__ = ["EXAMPLE", "HELP", "KINDS", "SIZES", "Options", "run", "switches", "table"]

HELP = """\
A waiting broadcast of a native no-op to all other CPUs, which have halted, and
all CPUs broadcasting at once (as many as memory allows), on machines of 2 to
1,024 CPUs: time for each CPU, memory, and context switches. Beside it, in
turns, as many plain processes that sleep on a futex each: all are woken and
all answer."""
EXAMPLE = """\
shmipi bench scale
shmipi bench scale --cpus 2,64,512 --kind broadcast --json -"""

KINDS: Final = ("broadcast", "all_to_all")
SIZES: Final = (2, 4, 16, 64, 256, 1024)
#: So many CPUs are looked at for their private memory, spread over the machine.
_SAMPLE: Final = 16
#: Before each, for each process: until all sleep.
_SETTLE_NS: Final = 15_000
#: Of all to all in a block, so that it does not matter who is the first to begin.
_LEAST_CALLS: Final = 4000


@dataclass(frozen=True)
class Options:
    """What to measure: ``calls`` broadcasts in ``blocks``, on machines of ``sizes``."""

    sizes: Sequence[int] = option.sizes(SIZES)
    kinds: Sequence[str] = option.several("kind", KINDS, "only: broadcast, all_to_all")
    calls: int = option.calls(30, "broadcasts over each machine", like="", most=100_000)
    gap_us: float = option.gap(1000.0, "pause before each, in microseconds")
    blocks: int = option.blocks(5)
    doorbell: str = option.doorbell()
    cores: str | Sequence[int] = option.cores()
    controller: str | type[Chip] = option.controller()

    @property
    def gap_ns(self) -> int:
        """The pause before each broadcast, in ns."""
        return round(self.gap_us * 1000)


def switches(pids: Sequence[int], *, proc: Path = Path("/proc")) -> int:
    """Return how often processes were switched away from, for whatever reason."""
    total = 0
    for pid in pids:
        with suppress(OSError, ValueError):
            for line in (proc / str(pid) / "status").read_text().splitlines():
                if line.startswith(
                    ("voluntary_ctxt_switches:", "nonvoluntary_ctxt_switches:")
                ):
                    total += int(line.split()[1])
    return total


class _Kind:
    """What was measured of one kind of broadcast on one machine."""

    def __init__(self, what: str, rig: Rig, options: Options) -> None:
        self.what, self.rig, self.options = what, rig, options
        self.size = len(rig.cores)
        self.callers = 1
        if what == "all_to_all":
            self.callers = senders(self.size, psutil.virtual_memory().available)
        self.ns = _core.Hist()
        self.per_cpu: list[float] = []
        self.raw: list[float] = []
        self.ratios: list[float] = []
        self.seen = Seen()
        self.rounds = self.switched = self.raw_switched = self.raw_rounds = 0

    def block(self, calls: int) -> None:
        """Measure one block: plain processes, then ours."""
        gap_ns = self.options.gap_ns + _SETTLE_NS * self.size
        raw, switched = self.rig.run(
            0, _core.limit_wakes, self.rig.cores[1:], calls, gap_ns
        )
        self.raw_switched += switched
        self.raw_rounds += calls + 1  # its first is not counted, and they end
        pids = [self.rig.ids(cpu)[0] for cpu in range(self.size)]
        before = switches(pids)
        with Disturbance(self.rig, 1, self.seen, every=True):
            took = self._broadcasts(calls, gap_ns)
        self.switched += switches(pids) - before
        # Of all to all each CPU is called by each caller: that many times as often.
        others = (self.size - 1) * self.callers
        self.raw.append(median(raw) / (self.size - 1))
        self.per_cpu.append(took / others)
        self.ratios.append(self.per_cpu[-1] / self.raw[-1])

    def _broadcasts(self, calls: int, gap_ns: int) -> float:
        if self.what == "broadcast":
            how = ("native", calls, gap_ns, _core.HALTED)
            found = self.rig.run(0, tasks.broadcasts, *how)
            for ns in found:
                self.ns.record(round(ns))
            self.rounds += calls + 3
            return float(median(found))
        self.rig.flags[tasks.MET] = 0
        jobs = [
            self.rig.start(cpu, tasks.rounds, calls, self.callers)
            for cpu in range(self.callers)
        ]
        ends = []
        for job in jobs:
            took, begun, ended = job.result()
            self.ns.merge(took)
            ends.append((begun, ended))
        self.rounds += calls
        first, last = min(begun for begun, _ in ends), max(end for _, end in ends)
        return float(last - first) / calls

    def as_json(self, before: dict[str, Any] | None) -> dict[str, Any]:
        """Return the row of a document, beside the same of the machine before."""
        step = max(1, self.size // _SAMPLE)
        sample = [self.rig.ids(cpu)[0] for cpu in range(0, self.size, step)]
        private = [kib for pid in sample if (kib := private_kib(pid)) is not None]
        ns = median(self.per_cpu)
        calls = self.rounds * self.callers * (self.size - 1)
        return {
            "bench": "scale",
            "what": self.what,
            "ncpus": self.size,
            "senders": self.callers,
            "handler": "native",
            "doorbell": self.rig.doorbell,
            "calls": self.ns.count,
            "ns": described(self.ns),
            "ns_per_cpu": ns,
            "ns_per_cpu_spread": spread(self.per_cpu),
            "ns_per_cpu_blocks": self.per_cpu,
            "raw_ns_per_cpu": median(self.raw),
            "ratio": median(self.ratios),
            "ratio_spread": spread(self.ratios),
            "ratio_blocks": self.ratios,
            "growth": None if before is None else ns / before["ns_per_cpu"],
            "shared_kib": shared_kib(self.rig.cluster),
            "private_kib_per_cpu": median(private) if private else None,
            "switches_per_cpu": self.switched / self.rounds / self.size,
            "raw_switches_per_cpu": self.raw_switched
            / self.raw_rounds
            / (self.size - 1),
            **self.seen.ending(calls, self.seen.why(None)),
        }


def run(
    options: Options, progress: Callable[..., None] | None = None
) -> dict[str, Any]:
    """Measure and return the document of ``bench scale``, without its schema.

    ``ns_per_cpu`` is a broadcast's time divided by how many it calls; of all to all the
    time of a round, in which each caller broadcasts once, divided by its calls.
    ``raw_ns_per_cpu`` is what a plain process takes to be woken and waited for.
    Raises what a boot raises.
    """
    rows: list[dict[str, Any]] = []
    sizes = [size for size in options.sizes if size > 1]
    steps = Steps(progress, len(sizes) * len(options.kinds) * options.blocks)
    clock: dict[str, Any] = {}
    for size in sizes:
        with Rig(
            topology.place(size, options.cores),
            doorbell=options.doorbell,
            controller=options.controller,
            cpus=[0],
        ) as rig:
            clock = {"timer_ns": rig.timer_ns, "clock": rig.clock}
            for what in options.kinds:
                kind = _Kind(what, rig, options)
                parts = split(options.calls, options.blocks)
                if what == "all_to_all":  # a round is as many as there are callers
                    least = _LEAST_CALLS // (kind.callers * size)
                    parts = [max(1, least, part // kind.callers) for part in parts]
                for part in parts:
                    steps(f"{size} CPUs, {what}")
                    kind.block(part)
                same = [row for row in rows if row["what"] == what]
                rows.append(kind.as_json(same[-1] if same else None))
    return {
        "bench": "scale",
        "machine": machine_facts(),
        **clock,
        "gap_us": options.gap_us,
        "calls": options.calls,
        "blocks": options.blocks,
        "gc": False,
        "rows": rows,
    }


def table(result: dict[str, Any]) -> Table:
    """Return the document as a table for people."""
    rows: list[Cells] = []
    notes: list[str] = []
    for row in sorted(result["rows"], key=lambda row: str(row["what"]), reverse=True):
        real = row["real_ipis_per_call"]
        rows.append(
            [
                row["what"],
                str(row["ncpus"]),
                str(row["senders"]),
                span(row["ns_per_cpu"]),
                span(row["raw_ns_per_cpu"]),
                ratio(row, "ratio"),
                span(row["ns"]["p50"]),
                span(row["ns"]["max"]),
                f"{row['switches_per_cpu']:.2f}",
                f"{row['raw_switches_per_cpu']:.2f}",
                _mib(row["shared_kib"]),
                _mib(row["private_kib_per_cpu"]),
                "-" if real is None else f"{real:.2f}",
                valid_for(row, notes),
            ]
        )
    notes.append(
        "per CPU: the time of a broadcast for each CPU that it calls; raw: as many"
        " plain processes, each woken by FUTEX_WAKE, all waited for; switches: of"
        " contexts, for each CPU and broadcast"
    )
    header = ["what", "CPUs", "senders", "per CPU", "raw", "times (spread)"]
    header += ["broadcast", "max", "switches", "raw switches", "shared"]
    return [*header, "private per CPU", "real IPIs", "valid"], rows, notes


def _mib(kib: float | None) -> str:
    return "-" if kib is None else f"{kib / 1024:.2f} MiB"
