"""Core to core: waiting calls from each core to each other one."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from shmipi import _core
from shmipi.bench import option, tasks
from shmipi.bench.clocks import Clocks
from shmipi.bench.hist import described
from shmipi.bench.runner import (
    MISSED_SHARE,
    Disturbance,
    Rig,
    Seen,
    Steps,
    machine_facts,
    split,
)
from shmipi.errors import CommandError
from shmipi.irq.chips import Chip
from shmipi.machine import topology
from shmipi.report.cells import Cells, Table, span, valid_for

__all__ = ["EXAMPLE", "HELP", "STATES", "Options", "choose_pairs", "run", "table"]

HELP = """\
Every ordered pair of cores: the round trip of a waiting call of a native
no-op, and the way there, to a CPU that polls and to one that has halted. How
long it takes is said beforehand; where that is more than --seconds, as many
pairs are taken as fit, some of every distance and each core as often."""
EXAMPLE = """\
shmipi bench matrix
shmipi bench matrix --cores 0-7 --seconds 30 --csv -"""

STATES: Final = ("polling", "halted")
#: Of a pair: until one is measured, this is taken for what it costs beside its calls.
_PAIR_S: Final = 0.004
_STATE: Final = {"polling": _core.POLLING, "halted": _core.HALTED}
#: How far two cores are apart, the nearest first.
DISTANCES: Final = ("smt", "core", "package", "node")


@dataclass(frozen=True)
class Options:
    """What to measure: ``calls`` for each pair and state, in ``blocks``."""

    calls: int = option.calls(1000, "calls of each pair and state")
    warmup: int = option.warmup()
    states: Sequence[str] = option.several(
        "state", STATES, "only targets in these states: polling, halted"
    )
    cores: str | Sequence[int] = option.cores("the cores, one CPU on each")
    seconds: int = option.seconds(60, "as many pairs as fit in about so many")
    gap_us: float = option.gap_of_calls()
    blocks: int = option.blocks(5)
    doorbell: str = option.doorbell()
    controller: str | type[Chip] = option.controller()

    @property
    def gap_ns(self) -> int:
        """The pause before each call to a halted CPU, in ns."""
        return round(self.gap_us * 1000)


@dataclass
class Pair:
    """What was measured from one CPU to another."""

    sender: int
    target: int
    distance: str
    state: str
    rtt: _core.Hist = field(default_factory=_core.Hist)
    one_way: _core.Hist = field(default_factory=_core.Hist)
    typical: list[float] = field(default_factory=list)
    clocks: Clocks = field(default_factory=Clocks)
    seen: Seen = field(default_factory=Seen)
    calls: int = 0
    missed: int = 0
    sender_moved: bool = False
    #: Calls before the counted ones, which the kernel's IPIs are of too.
    warmups: int = 0

    def measure(self, rig: Rig, calls: int, options: Options) -> None:
        """Measure one block: round trips, then the way there."""
        how = {
            "warmup": min(options.warmup, calls),
            "gap_ns": 0 if self.state == "polling" else options.gap_ns,
            "state": _STATE[self.state],
        }
        if self.state == "polling":
            rig.idle(self.target, "poll")
        try:
            with Disturbance(rig, self.target, self.seen, sender=self.sender):
                found = rig.run(self.sender, tasks.timed, self.target, calls, how)
            there = rig.run(
                self.sender,
                tasks.timed,
                self.target,
                max(1, calls // 2),
                {**how, "stamp": True},
            )
        finally:
            rig.idle(self.target, "halt")
        self.rtt.merge(found["rtt"])
        self.typical.append(float(found["rtt"].quantile(0.5)))
        self.one_way.merge(there["one_way"])
        self.clocks.add(there["clock_ns"])
        self.calls += calls
        self.warmups += how["warmup"]
        self.missed += found["missed"]
        self.sender_moved |= found["moved"]

    def as_json(self, rig: Rig, clocks: Clocks) -> dict[str, Any]:
        """Return the row of a document."""
        why = self.seen.why(self.calls)
        if self.sender_moved:
            why.append("the sender changed its core")
        if self.missed > MISSED_SHARE * self.calls:
            why.append(
                f"the target was not {self.state} at {self.missed} of {self.calls}"
                " calls and was waited for"
            )
        return {
            "bench": "matrix",
            "sender_core": rig.cores[self.sender],
            "target_core": rig.cores[self.target],
            "distance": self.distance,
            "target_state": self.state,
            "handler": "native",
            "doorbell": rig.doorbell if self.state == "halted" else "none",
            "calls": self.calls,
            "rtt_ns": described(self.rtt),
            "rtt_ns_blocks": self.typical,
            **clocks.one_way(self.one_way),
            "missed_state": self.missed,
            **self.seen.ending(self.calls + self.warmups, why),
        }


def distance_of(first: topology.Core, second: topology.Core) -> str:
    """Return how far two cores are from each other: one of ``DISTANCES``."""
    if second.number in first.siblings:
        return "smt"
    if first.node != second.node:
        return "node"
    return "core" if first.package == second.package else "package"


def choose_pairs(
    cores: Sequence[topology.Core], most: int, seed: int = 1
) -> list[tuple[int, int, str]]:
    """Return ordered pairs of positions in ``cores``, at most ``most`` of them.

    All if they fit. Else some of each distance, the rarer ones first, and of these such
    as have cores that were least often in one before.
    """
    n = len(cores)
    every = [
        (a, b, distance_of(cores[a], cores[b]))
        for a in range(n)
        for b in range(n)
        if a != b
    ]
    if len(every) <= most:
        return every
    random.Random(seed).shuffle(every)
    by_distance = {
        name: [pair for pair in every if pair[2] == name] for name in DISTANCES
    }
    chosen: list[tuple[int, int, str]] = []
    left = [pairs for pairs in by_distance.values() if pairs]
    left.sort(key=len)
    for number, pairs in enumerate(left):
        room = (most - len(chosen)) // (len(left) - number)
        chosen += _evenly(pairs, n, room)
    return sorted(chosen)


def _evenly(
    pairs: list[tuple[int, int, str]], n: int, room: int
) -> list[tuple[int, int, str]]:
    """Take ``room``: in each round every core sends once, and is called once."""
    found: list[tuple[int, int, str]] = []
    rest = pairs
    while rest and len(found) < room:
        senders, targets = set(range(n)), set(range(n))
        later = []
        for pair in rest:
            if pair[0] in senders and pair[1] in targets and len(found) < room:
                senders.discard(pair[0])
                targets.discard(pair[1])
                found.append(pair)
            else:
                later.append(pair)
        rest = later
    return found


def run(
    options: Options, progress: Callable[..., None] | None = None
) -> dict[str, Any]:
    """Measure and return the document of ``bench matrix``, without its schema.

    Before anything is measured ``progress`` is told how long it takes; ``estimated_s``.

    Raises ``CommandError`` where there are not two cores, and what a boot raises.
    """
    cores = _cores(options)
    started = _core.stamp()
    with Rig(cores, doorbell=options.doorbell, controller=options.controller) as rig:
        layout = topology.read_cores(cores)
        known = {core.number: core for core in layout}
        ordered = [known[core] for core in cores]
        per_pair = _trial(rig, options) * len(options.states)
        most = max(len(cores), int(options.seconds / per_pair))
        pairs = choose_pairs(ordered, most)
        possible = len(cores) * (len(cores) - 1)
        estimate = len(pairs) * per_pair
        steps = Steps(progress, len(pairs) * len(options.states) * options.blocks)
        steps.keep(f"{len(pairs)} of {possible} pairs, about {estimate:.0f} s")
        found = [Pair(*pair, state) for pair in pairs for state in options.states]
        # What a round of blocks takes is spread over the run: what the computer does
        # meanwhile is in a part of each pair, and not in all of one.
        for number, part in enumerate(split(options.calls, options.blocks)):
            for pair in found:
                steps(
                    f"core {cores[pair.sender]} to {cores[pair.target]},"
                    f" {pair.state}, block {number + 1} of {options.blocks}"
                )
                pair.measure(rig, part, options)
        clocks = _clocks(found)
        return {
            "bench": "matrix",
            "machine": machine_facts(),
            "timer_ns": rig.timer_ns,
            "clock": rig.clock,
            "gap_us": options.gap_us,
            "calls": options.calls,
            "blocks": options.blocks,
            "gc": False,
            "cores": cores,
            "pairs": len(pairs),
            "pairs_of": possible,
            "sampled": len(pairs) < possible,
            "estimated_s": estimate,
            "took_s": (_core.stamp() - started) / 1e9,
            "rows": [
                pair.as_json(rig, clocks[pair.sender, pair.target]) for pair in found
            ],
        }


def _cores(options: Options) -> list[int]:
    usable = topology.usable_cores()
    if len(usable) < 2:
        raise CommandError(
            f"this process may run on core {usable[0]} only, and a pair is of two:"
            " allow a second one (taskset, docker --cpuset-cpus)"
        )
    if isinstance(options.cores, str) and options.cores == "auto":
        return usable
    try:
        named = topology.place(len(set(options.cores)), options.cores)
    except ValueError as error:
        raise CommandError(str(error), status=2) from None
    if len(set(named)) < 2:
        raise CommandError("--cores names two cores or more, such as 0-3", status=2)
    return list(dict.fromkeys(named))


def _trial(rig: Rig, options: Options) -> float:
    """Measure a pair short; return what one takes with all its calls, in seconds."""
    few = max(1, options.calls // 20)
    started = _core.stamp()
    for state in options.states:
        Pair(0, 1, "", state).measure(rig, few, options)
    took = (_core.stamp() - started) / 1e9 / len(options.states)
    calls = 1.5 * few + 2 * min(options.warmup, few)
    all_calls = 1.5 * options.calls + 2 * options.warmup * options.blocks
    fixed = min(took, _PAIR_S)
    return fixed * options.blocks + max(0.0, took - fixed) * all_calls / calls


def _clocks(pairs: Sequence[Pair]) -> dict[tuple[int, int], Clocks]:
    """Return what is known of the clocks of each two CPUs: of all calls there and back.

    Those to a CPU that polls say most.
    """
    found: dict[tuple[int, int], Clocks] = {}
    for pair in pairs:
        there = found.setdefault((pair.sender, pair.target), Clocks())
        back = found.setdefault((pair.target, pair.sender), Clocks())
        there.merge(pair.clocks)
        back.merge(pair.clocks.reversed())
    return found


def table(result: dict[str, Any]) -> Table:
    """Return the document as a table for people."""
    rows: list[Cells] = []
    notes: list[str] = []
    for row in result["rows"]:
        rows.append(
            [
                str(row["sender_core"]),
                str(row["target_core"]),
                row["distance"],
                row["target_state"],
                *(span(row["rtt_ns"][key]) for key in ("min", "p50", "p99", "max")),
                "-" if row["one_way_ns"] is None else span(row["one_way_ns"]["p50"]),
                span(row["one_way_error_ns"]),
                "-"
                if row["real_ipis_per_call"] is None
                else f"{row['real_ipis_per_call']:.2f}",
                valid_for(row, notes),
            ]
        )
    said = f"{result['pairs']} of {result['pairs_of']} ordered pairs"
    notes.append(f"{said}, in {result['took_s']:.1f} s")
    notes.append(
        "one way: to the handler, by the clocks of both cores; +-: what these may be"
        " apart, as the fastest ways there and back bound it"
    )
    header = ["from", "to", "apart", "target", "min", "p50", "p99", "max"]
    return [*header, "one way", "+-", "real IPIs", "valid"], rows, notes
