"""What each user of IPIs costs, beside the raw calls that it is made of.

Rows are in ``shmipi.bench.user_rows``, a module a user. Rows with as many CPUs share a
machine and take turns in blocks; in each block the raw call-function row comes first,
then the row, then its counterpart in the real world: ``ratio`` is the median over
blocks of row against raw row, ``beside_ratio`` of row against counterpart.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any, Final

from shmipi import _core
from shmipi.bench import limits, option, tasks
from shmipi.bench.hist import described
from shmipi.bench.limits import BATCH, Limit
from shmipi.bench.runner import (
    Disturbance,
    Rig,
    Seen,
    Steps,
    choose_cores,
    machine_facts,
    median,
    split,
    spread,
)
from shmipi.bench.user_rows import base
from shmipi.bench.user_rows.base import RAW, Took, UserRow
from shmipi.machine import topology
from shmipi.report.cells import Cells, Table, ratio, span, valid_for

__all__ = ["EXAMPLE", "HELP", "Options", "run", "table"]

HELP = """\
One row for each user of IPIs, where both exist a native and a Python one:
what an operation takes, beside the raw call-function row of the same run
and beside what does the same job on this computer. Rows, raw rows and
counterparts take turns in blocks, and a ratio is the median over these."""
EXAMPLE = """\
shmipi bench users
shmipi bench users --users tlb,rcu --most-cpus 64 --json -"""

_TARGET: Final = 1
_FOR_EVER: Final = 10**9  # ns that a Python sender spins before it would sleep
_STATE: Final = {
    "polling": _core.POLLING,
    "halted": _core.HALTED,
    "running": _core.RUNNING,
}


def users() -> tuple[str, ...]:
    """Return the users that have rows, without importing them."""
    files = {path.stem for path in Path(base.__file__).parent.glob("*.py")}
    return tuple(sorted(files - {"__init__", "base"}))


@dataclass(frozen=True)
class Options:
    """What to measure. ``calls`` is for each row, cut into ``blocks``."""

    calls: int = option.calls(2000, "operations of each row")
    warmup: int = option.warmup()
    which: Sequence[str] = option.several("users", users(), "only these users")
    handlers: Sequence[str] = option.handlers()
    most_cpus: int = option.most_cpus(512)
    cores: str | Sequence[int] = option.pair_of_cores()
    gap_us: float = option.gap_of_calls()
    blocks: int = option.blocks()
    doorbell: str = option.doorbell()

    @property
    def gap_ns(self) -> int:
        """The pause before each clocked operation, in ns."""
        return round(self.gap_us * 1000)


def load(options: Options) -> list[UserRow]:
    """Return the rows that ``options`` choose, by CPUs, then by user."""
    found: list[UserRow] = []
    for user in options.which:
        module: Any = import_module(f"{base.__package__}.{user}")
        for row in module.rows():
            type(row).user = user
            if row.ncpus <= options.most_cpus and row.flavour in options.handlers:
                found.append(row)
    return sorted(found, key=lambda row: row.ncpus)


@dataclass
class Measured:
    """A row while it is being measured."""

    row: UserRow
    #: ns of all clocked operations; or of batches, one number a block.
    ns: _core.Hist = field(default_factory=_core.Hist)
    raw: _core.Hist = field(default_factory=_core.Hist)
    typical: list[float] = field(default_factory=list)
    raw_typical: list[float] = field(default_factory=list)
    ratios: list[float] = field(default_factory=list)
    beside: Limit | None = None
    beside_ratios: list[float] = field(default_factory=list)
    seen: Seen = field(default_factory=Seen)
    calls: int = 0
    #: With those that warm up: what real IPIs are counted for.
    operations: int = 0

    def add(self, took: Took, raw: Took, beside: float | None) -> None:
        """Add a block."""
        ns, per_raw = _typical(took), _typical(raw) * self.row.raw_times
        for hist, one in ((self.ns, took), (self.raw, raw)):
            if isinstance(one, _core.Hist):
                hist.merge(one)
            else:
                for value in one:
                    hist.record(round(value))
        self.typical.append(ns)
        self.raw_typical.append(per_raw)
        self.ratios.append(ns / max(per_raw, 1e-3))
        if beside is not None and beside > 0:
            self.beside_ratios.append(ns / beside)

    def as_json(self) -> dict[str, Any]:
        """Return the row of a document."""
        row = self.row
        why = self.seen.why(self.calls if row.ncpus == 2 else None)
        ns = median(self.typical)
        result: dict[str, Any] = {
            "bench": "users",
            "user": row.user,
            "what": row.what,
            "flavour": row.flavour,
            "target_state": row.state,
            "ncpus": row.ncpus,
            "calls": self.calls,
            "ns": described(self.ns),
            "typical_ns": ns,
            "typical_spread": spread(self.typical),
            "per_s": 1e9 / max(ns, 1e-3) if row.rate else None,
            "least_per_s": row.least_rate,
            "raw": row.raw,
            "raw_times": row.raw_times,
            "raw_ns": median(self.raw_typical),
            "ratio": median(self.ratios),
            "ratio_spread": spread(self.ratios),
            "at_most": row.at_most,
            "most_ns": row.most_ns,
            "met": (row.at_most is None or median(self.ratios) <= row.at_most)
            and (row.least_rate is None or 1e9 / ns >= row.least_rate)
            and (row.most_ns is None or self.ns.quantile(1.0) <= row.most_ns),
            "beside": row.beside or None,
            "beside_ns": None,
            "beside_ratio": None,
            **row.extra(),
        }
        if not result["met"] and row.miss:
            result["missed_because"] = row.miss
        if self.beside is not None and self.beside_ratios:
            result["beside_ns"] = median(self.beside.blocks)
            result["beside_ratio"] = median(self.beside_ratios)
            result["beside_ratio_spread"] = spread(self.beside_ratios)
            why += self.beside.why()
        elif self.beside is not None:
            why.append(f"{row.beside} is unavailable: {self.beside.unavailable}")
        return result | self.seen.ending(self.operations, why)


def _typical(took: Took) -> float:
    if isinstance(took, _core.Hist):
        return float(took.quantile(0.5))
    return median(took)


# ---- the raw rows --------------------------------------------------------------------


def _raw(rig: Rig, row: UserRow, calls: int, options: Options) -> Took:
    """Measure a block of the raw row of ``row``."""
    state, gap_ns = _STATE[row.state], _gap(row, options)
    python = row.flavour == "python"
    took: Took
    if row.raw == "broadcast":
        took = rig.run(0, tasks.broadcasts, row.flavour, calls, gap_ns, state)
    elif row.raw == "nowait":
        took = [_flood(rig, python, calls)]
    elif row.raw == "batch":
        batches, warmup = max(1, calls // BATCH), BATCH // 2
        how = {"batch": BATCH, "warmup": warmup, "state": state}
        if python:
            task: Any = tasks.python_batches
            took = rig.run(0, task, _TARGET, batches, BATCH, warmup, state)
        else:
            took = rig.run(0, tasks.native_calls, _TARGET, BATCH * batches, how)[2]
    elif python:
        common = (options.warmup, gap_ns, state, _FOR_EVER)
        took, *_ = rig.run(0, tasks.python_calls, _TARGET, calls, *common)
    else:
        how = {"warmup": options.warmup, "gap_ns": gap_ns, "state": state}
        took = rig.run(0, tasks.native_calls, _TARGET, calls, how)[0]
    return took


def _flood(rig: Rig, python: bool, calls: int) -> float:
    """Send calls that nobody waits for; ns for each, until the last has run."""
    counter = "python_run" if python else "native_run"
    until = rig.counters(_TARGET)[counter] + calls
    rig.flags[2] = 0
    task = tasks.flood_python if python else tasks.flood_native
    begun, ended = rig.run(0, task, _TARGET, calls, until, 2, 1)
    return float(ended - begun) / calls


def _gap(row: UserRow, options: Options) -> int:
    return 0 if row.state == "polling" or row.rate else options.gap_ns


# ---- the run -------------------------------------------------------------------------


def _block(rig: Rig, found: Measured, calls: int, options: Options) -> None:
    row, gap_ns = found.row, _gap(found.row, options)
    targets = range(1, row.ncpus)
    with rig.in_state(targets, row.state):
        raw = _raw(rig, row, calls, options)
    with (
        rig.in_state(targets, row.state),
        Disturbance(rig, _TARGET, found.seen, every=row.ncpus > 2),
    ):
        took = row.block(rig, calls, options.warmup, gap_ns)
    beside = None
    if row.beside:
        limit = found.beside = found.beside or Limit(row.beside)
        beside = limits.measure(
            rig, limit, calls, gap_ns=options.gap_ns, warmup=options.warmup
        )
        limit.blocks.append(beside)
    found.add(took, raw, beside)
    found.calls += calls
    found.operations += calls + options.warmup


def run(
    options: Options, progress: Callable[[str], None] | None = None
) -> dict[str, Any]:
    """Measure and return the document of ``bench users``, without its schema.

    Raises ``CommandError`` for cores that cannot be used, and what a boot raises.
    """
    cores = choose_cores(options.cores)
    chosen = load(options)
    steps = Steps(progress, len(chosen) * options.blocks)
    if not chosen:
        raise ValueError("no row is of these users, handlers and numbers of CPUs")
    result: dict[str, Any] = {}
    rows: list[Measured] = []
    for ncpus in sorted({row.ncpus for row in chosen}):
        found = [Measured(row) for row in chosen if row.ncpus == ncpus]
        placement = cores if ncpus == 2 else topology.place(ncpus, list(cores))
        with Rig(placement, doorbell=options.doorbell, cpus=[0, 1]) as rig:
            result = {"timer_ns": rig.timer_ns, "clock": rig.clock}
            for one in found:
                one.row.prepare(rig)
            for block in range(options.blocks):
                for one in found:
                    steps(f"{one.row.user} {one.row.what}, block {block + 1}")
                    total = max(options.blocks, round(options.calls * one.row.share))
                    _block(rig, one, split(total, options.blocks)[block], options)
            for one in found:
                one.row.finish(rig)
        rows += found
    return {
        "bench": "users",
        "machine": machine_facts(sender_core=cores[0], target_core=cores[1]),
        **result,
        "doorbell": options.doorbell,
        "gap_us": options.gap_us,
        "calls": options.calls,
        "blocks": options.blocks,
        "gc": False,
        "rows": [row.as_json() for row in rows],
    }


def _mark(row: dict[str, Any], misses: list[str]) -> str:
    """Note why a row misses what is promised, once; return the mark of the note."""
    why = row.get("missed_because")
    if not why:
        return ""
    for number, note in enumerate(misses):
        if note.endswith(why):
            return f" ({chr(ord('a') + number)})"
    mark = f" ({chr(ord('a') + len(misses))})"
    misses.append(f"{mark.strip()} more than {row['at_most']:g} times: {why}")
    return mark


def table(result: dict[str, Any]) -> Table:
    """Return the document as a table for people."""
    rows: list[Cells] = []
    notes: list[str] = []
    misses: list[str] = []
    for row in result["rows"]:
        times = ratio(row, "ratio")
        rate = "-" if row["per_s"] is None else f"{row['per_s'] / 1e6:.3g} M/s"
        beside = "-"
        if row["beside_ratio"] is not None:
            beside = f"{row['beside']} {span(row['beside_ns'])}"
        rows.append(
            [
                row["user"],
                row["what"],
                row["flavour"],
                row["target_state"],
                str(row["ncpus"]),
                span(row["typical_ns"]),
                span(row["ns"]["p99"]),
                rate,
                f"{row['raw']} {span(row['raw_ns'])}",
                times if row["met"] else f"{times} missed{_mark(row, misses)}",
                beside,
                "-" if row["beside_ratio"] is None else ratio(row, "beside_ratio"),
                valid_for(row, notes),
            ]
        )
    notes += misses
    notes += [
        f"{row['what']}: {row['doorbells_per_packet']:.2g} doorbells a packet"
        for row in result["rows"]
        if "doorbells_per_packet" in row
    ]
    raws = dict.fromkeys(row["raw"] for row in result["rows"])
    notes += [f"{name}: {RAW[name]}" for name in raws]
    besides = dict.fromkeys(row["beside"] for row in result["rows"] if row["beside"])
    notes += [f"{name}: {limits.ABOUT[name]}" for name in besides]
    header = ["user", "what", "handler", "target", "CPUs", "p50", "p99", "rate"]
    header += ["raw row", "times (spread)", "beside it", "times (spread) ", "valid"]
    return header, rows, notes
