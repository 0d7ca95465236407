"""Throughput: calls per second that nobody waits for, each proven to have run.

A row of one sender stands beside the limit ``queue`` of the same two processes, block
by block: a pool of csds, push, take all, unlock, and nothing else.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final

from shmipi import _core
from shmipi.bench import limits, option, tasks
from shmipi.bench.limits import Limit
from shmipi.bench.option import HANDLERS
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
from shmipi.irq.chips import Chip
from shmipi.machine import topology
from shmipi.report.cells import Cells, Table, ratio, valid

__all__ = [
    "EXAMPLE",
    "HANDLERS",
    "HELP",
    "PATTERNS",
    "STATES",
    "Options",
    "run",
    "table",
]

HELP = """\
The clock stops when the last handler has returned."""
EXAMPLE = """\
shmipi bench throughput
shmipi bench throughput --calls 5M --handler native"""

PATTERNS: Final = ("one_to_one", "all_to_one")
STATES: Final = ("polling", "running")

_COUNTER: Final = {"native": "native_run", "python": "python_run"}
_TARGET: Final = 1


@dataclass(frozen=True)
class Options:
    """What to measure.

    ``calls`` is for each row, all senders together, in ``blocks`` parts; a row's figure
    is the median over these. ``all_to_one`` has a sender on every usable core but the
    target's, at least two.
    """

    calls: int = option.calls(
        500_000,
        "calls of each row, all senders together",
        like=", such as 20000 or 1M",
        shown="500k",
        most=1_000_000_000,
    )
    handlers: Sequence[str] = option.handlers()
    cores: str | Sequence[int] = option.pair_of_cores()
    blocks: int = option.blocks(5)
    doorbell: str = option.doorbell()
    controller: str | type[Chip] = option.controller()
    patterns: Sequence[str] = PATTERNS


def run(
    options: Options, progress: Callable[[str], None] | None = None
) -> dict[str, Any]:
    """Measure and return the document of ``bench throughput``, without its schema.

    The clock stops when the last handler has returned. Raises ``CommandError`` for
    cores that cannot be used, and what a boot raises.
    """
    sender, target = choose_cores(options.cores)
    others = [core for core in topology.usable_cores() if core not in (sender, target)]
    if not isinstance(options.cores, str) or not others:
        others = [sender]  # the two that were named, or all there are
    rows = []
    kinds = len(options.patterns) * len(STATES) * len(options.handlers)
    steps = Steps(progress, kinds)
    limit = Limit("queue")
    placement = [sender, target, *others]
    with Rig(
        placement, doorbell=options.doorbell, controller=options.controller
    ) as rig:
        for pattern in options.patterns:
            senders = [0] if pattern == "one_to_one" else [0, *range(2, len(placement))]
            for state in STATES:
                for handler in options.handlers:
                    steps(f"{pattern}, target {state}, {handler}")
                    parts = split(options.calls, options.blocks)
                    beside = limit if len(senders) == 1 else None
                    row = _row(rig, senders, state, handler, parts, beside)
                    row.update(
                        pattern=pattern,
                        doorbell=options.doorbell,
                        controller=rig.cluster.controller,
                    )
                    rows.append(row)
        return {
            "bench": "throughput",
            "machine": machine_facts(
                sender_cores=[placement[cpu] for cpu in (0, *range(2, len(placement)))],
                target_core=target,
            ),
            "timer_ns": rig.timer_ns,
            "clock": rig.clock,
            "calls": options.calls,
            "blocks": options.blocks,
            "gc": False,
            "limits": {"queue": limit.as_json()},
            "rows": rows,
        }


def _row(
    rig: Rig,
    senders: Sequence[int],
    state: str,
    handler: str,
    parts: Sequence[int],
    limit: Limit | None,
) -> dict[str, Any]:
    seen = Seen()
    rates: list[float] = []
    beside: list[float] = []
    sent = rung = elided = coalesced = 0
    for part in parts:
        if limit is not None:
            beside.append(1e9 / limits.measure_queue(rig, limit, part, cpu=_TARGET))
        with _target(rig, state):
            _block(rig, senders, handler, max(1000, parts[0] // 10))  # warm-up
            before = rig.cluster.counters()
            with Disturbance(rig, _TARGET, seen):
                calls, seconds = _block(rig, senders, handler, part)
            after = rig.cluster.counters()
            rates.append(calls / seconds)
            sent += calls

            def grown(name: str, was: Any = before, now: Any = after) -> int:
                return sum(int(now[name][cpu] - was[name][cpu]) for cpu in senders)

            rung += grown("doorbells_sent") + grown("kicks_sent")
            elided += grown("elided")
            coalesced += grown("coalesced")
    why = seen.why(sent)
    if state == "polling" and elided + coalesced < 0.8 * sent:
        why.append(f"only {elided + coalesced} of {sent} found the target polling")
    row: dict[str, Any] = {
        "bench": "throughput",
        "target_state": state,
        "handler": handler,
        "senders": len(senders),
        "calls": sent,
        "calls_per_s": median(rates),
        "calls_per_s_spread": spread(rates),
        "ns_per_call": 1e9 / median(rates),
        "doorbells_per_call": rung / sent,
        "coalesced_per_call": coalesced / sent,
    }
    if limit is not None and limit.unavailable is None:
        limit.blocks += beside
        ratios = [rate / other for rate, other in zip(rates, beside, strict=True)]
        row["limit"] = limit.name
        row["limit_per_s"] = median(beside)
        row["ratio"] = median(ratios)
        row["ratio_spread"] = spread(ratios)
        why += limit.why()
    return row | seen.ending(sent, why)


def _block(
    rig: Rig, senders: Sequence[int], handler: str, calls: int
) -> tuple[int, float]:
    """Send ``calls`` calls, share and share alike; return how many and in what time."""
    shares = split(calls, len(senders))
    counter = _COUNTER[handler]
    task = tasks.flood_native if handler == "native" else tasks.flood_python
    until = rig.counters(_TARGET)[counter] + sum(shares)
    rig.flags[1] = 0
    jobs = [
        rig.start(cpu, task, _TARGET, share, until, 1, len(senders))
        for cpu, share in zip(senders, shares, strict=True)
    ]
    spans = [job.result() for job in jobs]
    started = min(start for start, _ in spans)
    ended = max(end for _, end in spans)
    return sum(shares), (ended - started) / 1e9


@contextmanager
def _target(rig: Rig, state: str) -> Iterator[None]:
    """Keep the target polling, or running Python bytecode."""
    word = _core.POLLING if state == "polling" else _core.RUNNING
    with rig.in_state([_TARGET], state):
        rig.run(0, _reach, _TARGET, word)
        yield


def _reach(cpu: int, state: int) -> int:
    """Task: wait until ``cpu`` is in ``state``."""
    return _core.bench_await(cpu, state, 1000)


def table(result: dict[str, Any]) -> Table:
    """Return the document as a table for people."""
    rows: list[Cells] = []
    notes: list[str] = []
    for row in result["rows"]:
        name = f"{row['pattern']} {row['target_state']}"
        low, high = row["calls_per_s_spread"]
        rows.append(
            [
                name,
                row["handler"],
                str(row["senders"]),
                f"{row['calls_per_s'] / 1e6:.2f} M",
                f"{low / 1e6:.2f}-{high / 1e6:.2f} M",
                f"{row['ns_per_call']:.0f} ns",
                f"{row['doorbells_per_call']:.4f}",
                f"{row['limit_per_s'] / 1e6:.2f} M" if "limit_per_s" in row else "-",
                ratio(row, "ratio") if "ratio" in row else "-",
                valid(row, notes, f"{name} {row['handler']}"),
            ]
        )
    notes.append(
        "queue: a pool of csds, push, take all, unlock, and nothing else, from the same"
        " sender to the same target"
    )
    header = ["pattern, target", "handler", "senders", "calls/s", "spread"]
    header += ["per call", "doorbells/call", "queue", "ratio (spread)", "valid"]
    return header, rows, notes
