"""The rows of the kernel's IPI benchmark by Yury Norov, printed as it prints them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from shmipi import _core, smp
from shmipi.bench import option, tasks
from shmipi.bench.hist import described
from shmipi.bench.option import HANDLERS
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
from shmipi.bench.user_rows import smp as way
from shmipi.irq.chips import Chip
from shmipi.machine import topology
from shmipi.machine.arrays import shared
from shmipi.report.cells import Cells, Table, span, valid_for

__all__ = ["EXAMPLE", "HELP", "ROWS", "Options", "run", "table"]

HELP = """\
Dry run (the handler called as any function), self (this CPU calls itself,
which sends no IPI: the handler runs at once with interrupts off), normal (one
other CPU), broadcast (all others), broadcast with a lock that all handlers
take. As the kernel's benchmark has it, two sums of each: until the handler was
entered, and in all."""
EXAMPLE = """\
shmipi bench norov
shmipi bench norov --cpus 2,16 --handler native"""

#: What it is called in the kernel's log, by what it is called here.
ROWS: Final = {
    "dry run": "Dry-run",
    "self-IPI": "Self-IPI",
    "normal IPI": "Normal IPI",
    "broadcast IPI": "Broadcast IPI",
    "broadcast lock": "Broadcast lock",
}
_WAYS: Final = {
    "dry run": way.dry,
    "self-IPI": way.itself,
    "normal IPI": way.normal,
    "broadcast IPI": way.broadcast,
    "broadcast lock": way.broadcast,
}


@dataclass(frozen=True)
class Options:
    """What to measure: ``calls`` of each row, on machines of ``sizes`` CPUs."""

    calls: int = option.calls(2000, "calls of each row")
    warmup: int = option.warmup()
    sizes: Sequence[int] = option.sizes((2, 8))
    handlers: Sequence[str] = option.handlers()
    gap_us: float = option.gap_of_calls()
    blocks: int = option.blocks()
    cores: str | Sequence[int] = option.cores()
    doorbell: str = option.doorbell()
    controller: str | type[Chip] = option.controller()

    @property
    def gap_ns(self) -> int:
        """The pause before each call, in ns."""
        return round(self.gap_us * 1000)


@dataclass
class Row:
    """What was measured of one row."""

    what: str
    flavour: str
    ncpus: int
    ns: _core.Hist = field(default_factory=_core.Hist)
    #: Until the handler was entered; of one IPI only.
    there: _core.Hist = field(default_factory=_core.Hist)
    typical: list[float] = field(default_factory=list)
    seen: Seen = field(default_factory=Seen)
    calls: int = 0
    warmups: int = 0

    @property
    def ipis(self) -> int:
        """How many IPIs one call is."""
        local = self.what in ("dry run", "self-IPI")
        return 0 if local else self.ncpus - 1 if "broadcast" in self.what else 1

    def measure(self, rig: Rig, lock: Any, calls: int, options: Options) -> None:
        """Measure one block."""
        warmup = min(options.warmup, calls)
        with Disturbance(rig, 1, self.seen, every=self.ncpus > 2):
            if self.flavour == "native":
                took, warmed = self._native(rig, calls, warmup, options)
            else:
                took, warmed = self._python(rig, lock, calls, warmup, options), warmup
        self.ns.merge(took)
        self.typical.append(float(took.quantile(0.5)))
        self.calls += calls
        self.warmups += warmed

    def _native(
        self, rig: Rig, calls: int, warmup: int, options: Options
    ) -> tuple[_core.Hist, int]:
        """Measure a row from C; also how many calls were to warm up."""
        if self.what in ("dry run", "self-IPI"):
            rig.run(0, tasks.local, warmup, self.what == "self-IPI")
            return rig.run(0, tasks.local, calls, self.what == "self-IPI"), warmup
        took = _core.Hist()
        if self.what == "broadcast IPI":
            how = ("native", calls, options.gap_ns, _core.HALTED)
            for ns in rig.run(0, tasks.broadcasts, *how):
                took.record(round(ns))
            return took, 3
        state = {"warmup": warmup, "gap_ns": options.gap_ns, "state": _core.HALTED}
        found = rig.run(0, tasks.timed, 1, calls, {**state, "stamp": True})
        self.there.merge(found["one_way"])
        return found["rtt"], warmup

    def _python(
        self, rig: Rig, lock: Any, calls: int, warmup: int, options: Options
    ) -> _core.Hist:
        took: _core.Hist
        if self.what == "normal IPI":
            took, there = rig.run(0, there_and_back, calls, warmup, options.gap_ns)
            self.there.merge(there)
            return took
        handler: Any = way.locked if "lock" in self.what else tasks.noop
        info = lock if "lock" in self.what else None
        how = (_WAYS[self.what], handler, info, calls, warmup, options.gap_ns)
        took = rig.run(0, way.clocked, *how)
        return took

    def as_json(self, doorbell: str, dry: Row) -> dict[str, Any]:
        """Return the row of a document, beside the dry run of its flavour."""
        ns = median(self.typical)
        there = self.there.stats()["mean"] if self.there.count else 0.0
        mean = self.ns.stats()["mean"]
        why = self.seen.why(self.calls if self.ncpus == 2 and self.ipis else None)
        row: dict[str, Any] = {
            "bench": "norov",
            "what": self.what,
            "flavour": self.flavour,
            "ncpus": self.ncpus,
            "doorbell": doorbell,
            "calls": self.calls,
            "ns": described(self.ns),
            "typical_ns": ns,
            "typical_ns_spread": spread(self.typical),
            "typical_ns_blocks": self.typical,
            "times_dry": ns / max(1.0, median(dry.typical)),
            "ipis_per_call": self.ipis,
            # As the kernel's benchmark: sums over all calls.
            "ipi_sum_ns": round(there * self.calls),
            "total_sum_ns": round(mean * self.calls),
            **self.seen.ending(self.ipis * (self.calls + self.warmups), why),
        }
        return row


def there_and_back(
    calls: int, warmup: int, gap_ns: int
) -> tuple[_core.Hist, _core.Hist]:
    """Task: call CPU 1, when it has halted; ns there and back, and ns there."""
    took, there, clock = _core.Hist(), _core.Hist(), _core.stamp
    entered = shared(tasks.STAMPS)
    for number in range(-warmup, calls):
        _core.bench_await(1, _core.HALTED, gap_ns)
        start = clock()
        smp.smp_call_function_single(1, tasks.stamp_entry, 0)
        end = clock()
        if number >= 0:
            took.record(end - start)
            there.record(max(0, int(entered[0]) - start))
    return took, there


def run(
    options: Options, progress: Callable[..., None] | None = None
) -> dict[str, Any]:
    """Measure and return the document of ``bench norov``, without its schema.

    A lock is taken by handlers in Python only. Raises what a boot raises.
    """
    sizes = [size for size in options.sizes if size > 1] or [2]
    wanted = [
        (flavour, what)
        for flavour in HANDLERS
        if flavour in options.handlers
        for what in ROWS
        if (flavour, what) != ("native", "broadcast lock")
    ]
    steps = Steps(progress, len(sizes) * len(wanted) * options.blocks)
    rows: list[dict[str, Any]] = []
    clock = {}
    for ncpus in sizes:
        with Rig(
            topology.place(ncpus, options.cores),
            doorbell=options.doorbell,
            controller=options.controller,
        ) as rig:
            clock = {"timer_ns": rig.timer_ns, "clock": rig.clock}
            lock = rig.cluster.shared(way.LOCK, "i8", 1)
            found = [Row(what, flavour, ncpus) for flavour, what in wanted]
            for block, part in enumerate(split(options.calls, options.blocks)):
                for row in found:
                    steps(f"{ncpus} CPUs, {row.what}, {row.flavour}, {block + 1}")
                    row.measure(rig, lock, part, options)
            for row in found:
                [dry] = [
                    one
                    for one in found
                    if one.what == "dry run" and one.flavour == row.flavour
                ]
                rows.append(row.as_json(options.doorbell, dry))
    return {
        "bench": "norov",
        "machine": machine_facts(),
        **clock,
        "gap_us": options.gap_us,
        "calls": options.calls,
        "blocks": options.blocks,
        "gc": False,
        "rows": rows,
    }


def table(result: dict[str, Any]) -> Table:
    """Return the document as a table for people, and as the kernel prints it."""
    rows: list[Cells] = []
    notes: list[str] = []
    for row in result["rows"]:
        real = row["real_ipis_per_call"]
        rows.append(
            [
                row["what"],
                row["flavour"],
                str(row["ncpus"]),
                str(row["ipis_per_call"]),
                *(span(row["ns"][key]) for key in ("p50", "p99", "max")),
                f"{row['times_dry']:.1f}",
                "-" if real is None else f"{real:.2f}",
                valid_for(row, notes),
            ]
        )
    notes.append("a self call sends no IPI: the handler runs at once, interrupts off")
    machines = dict.fromkeys((row["ncpus"], row["flavour"]) for row in result["rows"])
    for ncpus, flavour in machines:
        notes += ["", f"{ncpus} CPUs, {flavour}, {result['calls']} calls:"]
        for row in result["rows"]:
            if (row["ncpus"], row["flavour"]) == (ncpus, flavour):
                name = f"{ROWS[row['what']]}:"
                notes.append(
                    f"  {name:15}{row['ipi_sum_ns']:18}, {row['total_sum_ns']:18} ns"
                )
    header = ["what", "handler", "CPUs", "IPIs", "p50", "p99", "max", "times dry"]
    return [*header, "real/IPI", "valid"], rows, notes
