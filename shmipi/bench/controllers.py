"""The same calls through each interrupt controller, and a line of each chip raised raw.

All controllers' machines are up at once, and every row goes round them block by block:
A B C A B C ..., so that what disturbs the computer for a while disturbs all alike. The
fastest controller of a row is the one with the lowest median; a controller's ratio is
the median over the blocks of (its figure / the fastest's in that block).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any, Final

from shmipi import _core
from shmipi.bench import limits, option, tasks
from shmipi.bench.limits import BATCH, PLACEMENTS, Limit
from shmipi.bench.option import HANDLERS
from shmipi.bench.runner import (
    MISSED_SHARE,
    Disturbance,
    Rig,
    Seen,
    Steps,
    choose_cores,
    machine_facts,
    median,
    silent,
    split,
    spread,
)
from shmipi.irq.chips import CHIPS
from shmipi.report.cells import Cells, Table, span, valid_for

__all__ = [
    "AT_MOST",
    "EXAMPLE",
    "HANDLERS",
    "HELP",
    "OF_LIMIT",
    "Options",
    "run",
    "table",
]

HELP = """\
Polling and running targets, native and python handlers, and a line of
the chip raised raw, which nothing elides. The machines of all controllers
are up at once and take turns in blocks; a ratio is the median over these,
to the fastest. For native calls to a polling target there is a verdict:
how much slower than the fastest a controller may be."""
EXAMPLE = """\
shmipi bench controllers
shmipi bench controllers --controllers apic,xive --handler native"""

#: Native calls to a polling target: the most times the fastest that a controller may
#: take (``Chip.at_most``).
AT_MOST: Final = {name: chip.at_most for name, chip in CHIPS.items()}
#: And the most times the limit ``floor``, in batches as they are, that the fastest may.
OF_LIMIT: Final = 1.6

#: Target CPUs of a machine: the line that calls them lies at another place for each.
_TARGETS: Final = 4
_SPIN_NS: Final = 10**9
_COUNT: Final = "bench.lines"


@dataclass(frozen=True)
class Options:
    """What to measure. ``calls`` is for each row of each controller, in ``blocks``."""

    calls: int = option.calls(20_000, "calls of each row of each controller")
    warmup: int = option.warmup()
    controllers: Sequence[str] = option.several(
        "controllers", tuple(CHIPS), f"only these: {', '.join(CHIPS)}"
    )
    handlers: Sequence[str] = option.handlers()
    cores: str | Sequence[int] = option.pair_of_cores()
    gap_us: float = option.gap_of_calls()
    blocks: int = option.blocks()

    @property
    def gap_ns(self) -> int:
        """The pause before each call to a running target, in ns."""
        return round(self.gap_us * 1000)


@dataclass(frozen=True)
class Kind:
    """A row of every controller: a call, or a line of the chip raised."""

    what: str
    state: str
    handler: str

    @property
    def name(self) -> str:
        """What to call it."""
        return f"{self.what} {self.state} {self.handler}"


@dataclass
class Row:
    """What was measured of one kind through one controller: ns of each block."""

    kind: Kind
    controller: str
    blocks: list[float] = field(default_factory=list)
    seen: Seen = field(default_factory=Seen)
    #: Calls, warm-up included, and batches or single calls that were clocked.
    calls: int = 0
    samples: int = 0
    missed: int = 0
    moved: bool = False

    @property
    def ns(self) -> float:
        """The median over the blocks."""
        return median(self.blocks)

    def why(self) -> list[str]:
        """Return why its figures are not what they claim to be."""
        # A batch is one sample: whatever happens in it moves it and no other.
        found = self.seen.why(self.samples)
        if self.moved:
            found.append("the sender changed its core")
        if self.missed > MISSED_SHARE * self.calls:
            found.append(
                f"the target was not {self.kind.state} at {self.missed} of"
                f" {self.calls} calls and was waited for"
            )
        counter = (
            "chip_writes"
            if self.kind.what == "line"
            else {"polling": "elided", "running": "kicks_sent"}[self.kind.state]
        )
        counted = self.seen.counted.get(counter, 0)
        if counted < (1 - MISSED_SHARE) * self.calls:
            found.append(
                f"only {counted} of {self.calls} calls were counted as {counter}"
            )
        return found


def _kinds(options: Options) -> list[Kind]:
    handlers = [handler for handler in HANDLERS if handler in options.handlers]
    found = [
        Kind("call", state, handler)
        for state in ("polling", "running")
        for handler in handlers
    ]
    if "native" in handlers:
        found.append(Kind("line", "polling", "native"))
    return found


# ---- one controller's machine --------------------------------------------------------


class _Bench:
    """A machine with one controller, and a free line of each target with a handler."""

    def __init__(self, rig: Rig, controller: str) -> None:
        self.rig = rig
        self.controller = controller
        self.lines = _listen(rig)

    def measure(self, row: Row, block: int, calls: int, options: Options) -> None:
        """Measure one block of a row."""
        if row.kind.state == "running":
            row.blocks.append(self._running(row, calls, options))
            return
        found = []
        for place, part in enumerate(split(calls, _TARGETS)):
            cpu = 1 + place
            self.rig.idle(cpu, "poll")
            try:
                with Disturbance(self.rig, cpu, row.seen):
                    found.append(
                        self._polling(row, cpu, part, block * _TARGETS + place)
                    )
            finally:
                self.rig.idle(cpu, "halt")
        row.blocks.append(median(found))

    def _polling(self, row: Row, cpu: int, calls: int, place: int) -> float:
        """Batches without a clock inside; return ns per call."""
        batch = min(BATCH, calls)
        number, warmup = calls // batch, max(1, batch // 2)
        if row.kind.handler == "python":
            batches = self.rig.run(
                0, tasks.python_batches, cpu, number, batch, warmup, _core.POLLING
            )
        else:
            options = {
                "batch": batch,
                "warmup": warmup,
                "state": _core.POLLING,
                "skip": place % PLACEMENTS,
            }
            if row.kind.what == "line":
                found = self.rig.run(
                    0,
                    tasks.native_raises,
                    _COUNT,
                    cpu,
                    batch * number,
                    {**options, "line": self.lines[cpu]},
                )
            else:
                found = self.rig.run(
                    0, tasks.native_calls, cpu, batch * number, options
                )
            *_, batches, _, _, moved = found
            row.moved |= bool(moved)
        row.calls += batch * number + warmup
        row.samples += number
        return median(batches)

    def _running(self, row: Row, calls: int, options: Options) -> float:
        """Calls with a clock around each, to a CPU that runs Python."""
        rig = self.rig
        with rig.in_state([1], "running"), Disturbance(rig, 1, row.seen):
            if row.kind.handler == "native":
                rtt, _, _, missed, _, moved = rig.run(
                    0,
                    tasks.native_calls,
                    1,
                    calls,
                    {
                        "warmup": options.warmup,
                        "gap_ns": options.gap_ns,
                        "state": _core.RUNNING,
                    },
                )
                row.moved |= bool(moved)
            else:
                rtt, missed, *_ = rig.run(
                    0,
                    tasks.python_calls,
                    1,
                    calls,
                    options.warmup,
                    options.gap_ns,
                    _core.RUNNING,
                    _SPIN_NS,
                )
        row.calls += calls + options.warmup
        row.samples += calls
        row.missed += missed
        return float(rtt.quantile(0.5))


def _listen(rig: Rig) -> dict[int, int]:
    """Give each target a line of its own whose native handler counts: its number."""
    cluster, machine = rig.cluster, rig.machine
    count = cluster.shared(_COUNT, "u8", 1)
    free = [
        line.number for line in cluster.chip.lines(cluster.ncpus) if line.use == "irq"
    ]
    targets = range(1, cluster.ncpus)
    chosen = dict(zip(targets, free, strict=False))
    with machine.irq_lock():
        for target, line in chosen.items():
            virq = _core.NR_IRQS - target
            machine.irq_request(virq, _core.NativeHandler("count"), count)
            machine.pic_write(0, "line_virq", line, virq)
            machine.pic_write(0, "route", line, target + 1)
    for target, line in chosen.items():
        machine.irq_enable_line(target, line, True)
    return chosen


# ---- the run -------------------------------------------------------------------------


def run(
    options: Options, progress: Callable[[str], None] | None = None
) -> dict[str, Any]:
    """Measure and return the document of ``bench controllers``, without its schema.

    Raises ``CommandError`` for cores that cannot be used, and what a boot raises.
    """
    progress = progress or silent
    sender, target = choose_cores(options.cores)
    cores = [sender] + [target] * _TARGETS
    limit = Limit("floor")
    with ExitStack() as stack:
        benches = []
        for name in options.controllers:
            progress(f"booting {name}")
            benches.append(
                _Bench(stack.enter_context(Rig(cores, controller=name)), name)
            )
        kinds = _kinds(options)
        rows = {
            (kind, bench.controller): Row(kind, bench.controller)
            for kind in kinds
            for bench in benches
        }
        parts = split(options.calls, options.blocks)
        steps = Steps(progress, len(parts) * (1 + len(kinds)))
        for block, part in enumerate(parts):
            steps(f"limit floor, block {block + 1} of {len(parts)}")
            # Of another machine each time: the limit is no controller's.
            _limit(benches[block % len(benches)].rig, limit, block)
            for kind in kinds:
                steps(f"{kind.name}, block {block + 1} of {len(parts)}")
                for bench in benches:
                    bench.measure(rows[kind, bench.controller], block, part, options)
        rig = benches[0].rig
        document: dict[str, Any] = {
            "bench": "controllers",
            "machine": machine_facts(sender_core=sender, target_core=target),
            "timer_ns": rig.timer_ns,
            "clock": rig.clock,
            "gap_us": options.gap_us,
            "calls": options.calls,
            "blocks": options.blocks,
            "targets": _TARGETS,
            "gc": False,
            "limits": {"floor": limit.as_json()},
        }
    found = [
        _row_json(row, [rows[kind, bench.controller] for bench in benches], limit)
        for kind in kinds
        for bench in benches
        for row in [rows[kind, bench.controller]]
    ]
    document["rows"] = found
    document["foundation"] = _foundation(found)
    return document


def _limit(rig: Rig, limit: Limit, block: int) -> None:
    found = [
        limits.measure_batches(
            rig,
            limit,
            cpu=1 + place % _TARGETS,
            placement=block * PLACEMENTS + place,
        )
        for place in range(PLACEMENTS)
    ]
    limit.blocks.append(limits.best(found))


# ---- the result ----------------------------------------------------------------------


def _row_json(row: Row, beside: Sequence[Row], limit: Limit) -> dict[str, Any]:
    fastest = min(beside, key=lambda other: other.ns)
    ratios = _ratios(row.blocks, fastest.blocks)
    kind = row.kind
    is_judged = kind == Kind("call", "polling", "native")
    at_most = AT_MOST.get(row.controller) if is_judged and len(beside) > 1 else None
    why = row.why()
    result: dict[str, Any] = {
        "bench": "controllers",
        "what": kind.what,
        "target_state": kind.state,
        "handler": kind.handler,
        "controller": row.controller,
        "calls": row.calls,
        "ns": row.ns,
        "ns_blocks": row.blocks,
        "fastest": fastest.controller,
        "ratio": median(ratios),
        "ratio_spread": spread(ratios),
        "ratio_blocks": ratios,
        "at_most": at_most,
        "met": None if at_most is None else median(ratios) <= at_most,
    }
    if kind.state == "polling":
        of_limit = _ratios(row.blocks, limit.blocks)
        result["limit"] = limit.name
        result["limit_ratio"] = median(of_limit)
        result["limit_ratio_spread"] = spread(of_limit)
        why += limit.why()
    return result | row.seen.ending(row.calls, why)


def _ratios(blocks: Sequence[float], beside: Sequence[float]) -> list[float]:
    return [mine / theirs for mine, theirs in zip(blocks, beside, strict=True)]


def _foundation(rows: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """Does the fastest controller keep to the machine's own target?"""
    for row in rows:
        kind = (row["what"], row["target_state"], row["handler"])
        if (
            kind == ("call", "polling", "native")
            and row["controller"] == row["fastest"]
        ):
            return {
                "controller": row["controller"],
                "limit": row["limit"],
                "ratio": row["limit_ratio"],
                "ratio_spread": row["limit_ratio_spread"],
                "at_most": OF_LIMIT,
                "met": row["limit_ratio"] <= OF_LIMIT,
            }
    return None


def table(result: dict[str, Any]) -> Table:
    """Return the document as a table for people."""
    rows: list[Cells] = []
    notes: list[str] = []
    for row in result["rows"]:
        name = f"{row['what']} {row['target_state']} {row['handler']}"
        low, high = row["ratio_spread"]
        at_most, of_limit = row["at_most"], row.get("limit_ratio")
        rows.append(
            [
                name,
                row["controller"],
                span(row["ns"]),
                f"{row['ratio']:.2f} ({low:.2f}-{high:.2f})",
                "-" if at_most is None else f"{at_most:.1f}",
                {None: "-", True: "met", False: "missed"}[row["met"]],
                "-" if of_limit is None else f"{of_limit:.2f}",
                valid_for(row, notes),
            ]
        )
    header = ["what, target, handler", "controller", "typical"]
    header += ["of the fastest (spread)", "at most", "verdict", "of floor", "valid"]
    more = [
        f"floor: {span(result['limits']['floor'].get('batch_ns'))} in batches",
        "call: smp_call_function_single(), waiting; line: a free line of the chip,"
        " raised, until its handler has counted",
        "typical: the median over blocks; of polling rows over batches without a clock"
        " inside",
    ]
    base = result["foundation"]
    if base is not None:
        low, high = base["ratio_spread"]
        more.append(
            f"the fastest, {base['controller']}, takes {base['ratio']:.2f}"
            f" ({low:.2f}-{high:.2f}) times floor, at most {base['at_most']}:"
            f" {'met' if base['met'] else 'missed'}"
        )
    return header, rows, notes + more
