"""What a call costs after the target was left alone for a while: the curve of sleep."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any, Final

from shmipi import _core, names
from shmipi.bench import limits, option, tasks
from shmipi.bench.hist import described
from shmipi.bench.limits import Limit
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
from shmipi.errors import BootError
from shmipi.irq.chips import Chip
from shmipi.machine import doorbells
from shmipi.report.cells import Cells, Table, ratio, span, valid_for

__all__ = ["EXAMPLE", "GAPS_US", "HELP", "Options", "run", "table"]

HELP = """\
The idle time before each call is swept, for each doorbell and idle policy: a
core that sleeps longer may sleep deeper (C-states) and wakes more slowly, a
hypervisor polls for a while before it lets go of the core (halt polling), and
haltpoll spins for a while before it halts at all. Rows that halt stand beside
the raw limit of their doorbell at the same gap."""
EXAMPLE = """\
shmipi bench gap
shmipi bench gap --doorbell futex,eventfd --gaps 1,10,100,1000 --seconds 20"""

GAPS_US: Final = (1, 3, 10, 30, 100, 300, 1000, 3000, 10_000, 30_000, 100_000)
#: Fewer calls in a block have no median.
_LEAST: Final = 3
_CALL_S: Final = 60e-6


@dataclass(frozen=True)
class Options:
    """What to measure: at most ``calls`` at each gap, in about ``seconds``."""

    gaps_us: Sequence[int] = option.numbers(
        "gaps", GAPS_US, "idle times before a call, in microseconds", most=10_000_000
    )
    doorbells: Sequence[str] = option.several(
        "doorbell", names.DOORBELLS, "only these doorbells"
    )
    idles: Sequence[str] = option.several(
        "idle", names.IDLE, f"only these policies: {', '.join(names.IDLE)}"
    )
    calls: int = option.calls(500, "calls at each gap, at most")
    seconds: int = option.seconds(
        60, "about so long; long gaps get fewer calls, so that all have as much time"
    )
    warmup: int = option.number(
        "warmup", 2, "calls before each block that are not counted", most=1000, least=0
    )
    blocks: int = option.blocks(5)
    cores: str | Sequence[int] = option.pair_of_cores()
    controller: str | type[Chip] = option.controller()


@dataclass
class Point:
    """What was measured at one gap of one curve."""

    doorbell: str
    idle: str
    gap_us: int
    calls: int
    rtt: _core.Hist = field(default_factory=_core.Hist)
    limit: Limit | None = None
    ratios: list[float] = field(default_factory=list)
    seen: Seen = field(default_factory=Seen)
    made: int = 0
    rung: int = 0
    sender_moved: bool = False

    def measure(self, rig: Rig, calls: int, options: Options) -> None:
        """Measure one block, the limit first."""
        gap_ns = self.gap_us * 1000
        beside = 0.0
        if self.limit is not None:
            beside = limits.measure(
                rig, self.limit, calls, gap_ns=gap_ns, warmup=options.warmup
            )
            self.limit.blocks.append(beside)
        rig.idle(1, self.idle)
        try:
            with Disturbance(rig, 1, self.seen):
                # Whatever state it is in by then: that is the question.
                how = {"warmup": options.warmup, "gap_ns": gap_ns, "state": -1}
                deadline = 15 + 10 * calls * (gap_ns / 1e9 + 0.001)
                found = rig.run(0, tasks.timed, 1, calls, {**how, "deadline": deadline})
        finally:
            rig.idle(1, "halt")
        self.rtt.merge(found["rtt"])
        self.made += calls + options.warmup
        self.rung += found["rung"]
        self.sender_moved |= found["moved"]
        if beside > 0:
            self.ratios.append(found["rtt"].quantile(0.5) / beside)

    def as_json(self) -> dict[str, Any]:
        """Return the row of a document."""
        # One that polls is pushed off its core by every interrupt's kernel thread.
        why = self.seen.why(self.made)
        if self.sender_moved:
            why.append("the sender changed its core")
        row: dict[str, Any] = {
            "bench": "gap",
            "doorbell": self.doorbell,
            "idle": self.idle,
            "gap_us": self.gap_us,
            "handler": "native",
            "calls": self.rtt.count,
            "rtt_ns": described(self.rtt),
            "rung_per_call": self.rung / self.rtt.count,
        }
        if self.limit is not None and self.ratios:
            row |= {
                "limit": self.limit.name,
                "limit_ns": described(self.limit.rtt),
                "ratio": median(self.ratios),
                "ratio_spread": spread(self.ratios),
                "ratio_blocks": self.ratios,
            }
            why += self.limit.why()
        return row | self.seen.ending(self.made, why)


def points(options: Options) -> list[Point]:
    """Return what is measured: each curve's gaps, and how many calls there is time for.

    A CPU that polls is rung by nothing: that curve is one, whatever the doorbells.
    """
    curves = []
    if "poll" in options.idles:
        curves.append(("none", "poll"))
    curves += [
        (doorbell, idle)
        for idle in options.idles
        if idle != "poll"
        for doorbell in options.doorbells
    ]
    rounds = sum(1 + (idle == "halt") for _, idle in curves) * len(options.gaps_us)
    share = options.seconds / max(1, rounds)
    found = []
    for doorbell, idle in curves:
        for gap in options.gaps_us:
            fit = int(share / (gap / 1e6 + _CALL_S))
            calls = max(_LEAST * options.blocks, min(options.calls, fit))
            point = Point(doorbell, idle, gap, calls)
            if idle == "halt":
                point.limit = Limit(doorbells.BY_NAME[doorbell].limit)
            found.append(point)
    return found


def run(
    options: Options, progress: Callable[..., None] | None = None
) -> dict[str, Any]:
    """Measure and return the document of ``bench gap``, without its schema.

    Before anything is measured ``progress`` is told how long it takes; ``estimated_s``.
    Raises ``CommandError`` for cores that cannot be used, and what a boot raises; but a
    doorbell that cannot be had here is listed under ``unavailable``.
    """
    cores = choose_cores(options.cores)
    wanted = points(options)
    estimate = sum(
        (1 + (point.limit is not None))
        * (point.calls + options.blocks * options.warmup)
        * (point.gap_us / 1e6 + _CALL_S)
        for point in wanted
    )
    steps = Steps(progress, len(wanted) * options.blocks)
    steps.keep(f"{len(wanted)} points, about {estimate:.0f} s")
    started = _core.stamp()
    unavailable: dict[str, str] = {}
    with ExitStack() as stack:
        rigs: dict[str, Rig] = {}
        for doorbell in dict.fromkeys(point.doorbell for point in wanted):
            if doorbell == "none":
                continue
            try:
                rigs[doorbell] = stack.enter_context(
                    Rig(cores, doorbell=doorbell, controller=options.controller)
                )
            except BootError as error:
                unavailable[doorbell] = str(error)
        base = next(iter(rigs.values()), None) or stack.enter_context(
            Rig(cores, controller=options.controller)
        )
        rigs["none"] = base
        wanted = [point for point in wanted if point.doorbell in rigs]
        for block in range(options.blocks):
            for point in wanted:
                steps(
                    f"{point.idle} {point.doorbell}, {span(point.gap_us * 1000)},"
                    f" block {block + 1} of {options.blocks}"
                )
                part = split(point.calls, options.blocks)[block]
                point.measure(rigs[point.doorbell], part, options)
        found = {
            "bench": "gap",
            "machine": machine_facts(sender_core=cores[0], target_core=cores[1]),
            "timer_ns": base.timer_ns,
            "clock": base.clock,
            "calls": options.calls,
            "blocks": options.blocks,
            "gc": False,
            "estimated_s": estimate,
            "took_s": (_core.stamp() - started) / 1e9,
            "rows": [point.as_json() for point in wanted],
        }
    if unavailable:
        found["unavailable"] = unavailable
    return found


def table(result: dict[str, Any]) -> Table:
    """Return the document as a table for people."""
    rows: list[Cells] = []
    notes: list[str] = []
    for row in result["rows"]:
        real = row["real_ipis_per_call"]
        rows.append(
            [
                row["idle"],
                row["doorbell"],
                span(row["gap_us"] * 1000),
                *(span(row["rtt_ns"][key]) for key in ("p50", "p90", "p99", "max")),
                f"{row['rung_per_call']:.2f}",
                "-" if real is None else f"{real:.2f}",
                row.get("limit", "-"),
                span(row["limit_ns"]["p50"] if "limit_ns" in row else None),
                ratio(row, "ratio") if "ratio" in row else "-",
                valid_for(row, notes),
            ]
        )
    notes.append("rung: doorbells a call; none is rung for a CPU that still polls")
    notes += [f"{name}: {why}" for name, why in result.get("unavailable", {}).items()]
    header = ["idle", "doorbell", "gap", "p50", "p90", "p99", "max", "rung"]
    return [*header, "real IPIs", "limit", "its p50", "ratio", "valid"], rows, notes
