"""The physical limits of this computer: raw round trips without anything of shmipi.

Each runs between the same two pinned processes as the rows it stands beside: CPU 0 of a
rig sends, another CPU answers, both in C.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from shmipi import _core
from shmipi.bench import option, tasks
from shmipi.bench.runner import (
    Disturbance,
    Rig,
    Seen,
    choose_cores,
    machine_facts,
    median,
    next_session,
    split,
    unused_name,
)
from shmipi.errors import BootError
from shmipi.irq.chips import Chip
from shmipi.machine import doorbells
from shmipi.report.cells import PERCENTILES, Cells, Table, percentiles, span, valid

__all__ = [
    "ABOUT",
    "BATCH",
    "BATCHES",
    "BELLS",
    "EXAMPLE",
    "HELP",
    "PLACEMENTS",
    "Limit",
    "Options",
    "measure",
    "run",
    "table",
]

HELP = """\
What this computer and its kernel can do at best: the figures that every row
of the other measurements stands beside."""
EXAMPLE = """\
shmipi bench limits
shmipi bench limits --gap 1000 --json -"""

#: The doorbells, in the order of the tables: the one that is the kick signal last.
BELLS: Final = sorted(doorbells.BY_NAME.values(), key=lambda bell: bell.by_signal)
#: Every limit, and what its round trip is.
ABOUT: Final = {
    "cacheline": "a flag in shared memory: a store, the other spins on loads, back",
    "cacheline_cas": "the same where both poll by compare-and-swap: half the transfers",
    **{bell.limit: bell.limit_about for bell in BELLS},
    "futex_park": "FUTEX_WAKE there and back, both sleep",
    "signal": "tgkill to a busy process, its handler stores, the sender spins",
    "membarrier": "a private expedited membarrier: a real kernel IPI to the other core",
}

#: Lines that the cache-line figures are taken over: they differ by where a line lies.
PLACEMENTS: Final = 16
#: Round trips without a clock inside, and how many such batches at each placement.
BATCH, BATCHES = 250, 12

_SLEEPING: Final = (*(bell.limit for bell in BELLS), "futex_park")
#: More than this share of round trips to a target that was still awake: no limit.
_AWAKE_SHARE: Final = 0.2


@dataclass(frozen=True)
class Options:
    """What to measure. ``calls`` is for each limit, cut into ``blocks``."""

    calls: int = option.calls(2_000, "round trips of each limit")
    warmup: int = option.warmup()
    cores: str | Sequence[int] = option.pair_of_cores()
    gap_us: float = option.gap_of_calls()
    blocks: int = option.blocks()
    names: Sequence[str] = tuple(ABOUT)

    @property
    def gap_ns(self) -> int:
        """The pause before each round trip but those of cache lines, in ns."""
        return round(self.gap_us * 1000)


@dataclass
class Limit:
    """A raw limit as it was measured: its distribution, and what disturbed it.

    ``blocks`` are the medians of the blocks in ns, in their order; those of
    ``cacheline`` are over its placements, in batches.
    """

    name: str
    rtt: _core.Hist = field(default_factory=_core.Hist)
    one_way: _core.Hist = field(default_factory=_core.Hist)
    blocks: list[float] = field(default_factory=list)
    batches: list[float] = field(default_factory=list)
    calls: int = 0
    slept: int = 0
    preempted: int = 0
    unavailable: str | None = None
    seen: Seen = field(default_factory=Seen)

    def why(self) -> list[str]:
        """Return why its figures are not the box's own; empty if they are."""
        self.seen.preempted = self.preempted  # counted by the very thread that answers
        found = self.seen.why(self.calls + len(self.batches) * BATCHES)
        awake = self.calls - self.slept
        if self.name in _SLEEPING and awake > _AWAKE_SHARE * self.calls:
            found.append(f"the target was awake at {awake} of {self.calls} calls")
        return [f"limit {self.name}: {text}" for text in found]

    def as_json(self) -> dict[str, Any]:
        """Return it for the ``limits`` of a document."""
        if self.unavailable is not None:
            return {"unavailable": self.unavailable}
        why = self.why()
        row: dict[str, Any] = {**self.rtt.stats(), "calls": self.calls}
        if self.one_way.count:
            row["one_way_ns"] = self.one_way.stats()
        if self.batches:
            row["batch_ns"] = median(self.batches)
        row["valid"] = not why
        if why:
            row["why"] = why
        return row


def _options(rig: Rig, cpu: int, kind: str, **more: Any) -> dict[str, Any]:
    return {
        "core": rig.cores[cpu],
        "eventfd": rig.eventfd(cpu) if kind == "eventfd" else -1,
        "mq_name": "/" + unused_name("shmipi.limit") if kind == "mqueue" else "",
        **more,
    }


def _pair(
    rig: Rig, cpu: int, kind: str, calls: int, options: dict[str, Any]
) -> tuple[_core.Hist, _core.Hist, float, int, int]:
    """Run both roles once. Raises OSError: what the system forbids."""
    session = next_session()
    sender, target = rig.ids(0), rig.ids(cpu)
    pong = rig.start(
        cpu,
        tasks.limit_pong,
        kind,
        session,
        calls,
        {**options, "peer_pid": sender[0], "peer_tid": sender[1]},
    )
    error: OSError | None = None
    try:
        result: tuple[_core.Hist, _core.Hist, float, int, int] = rig.run(
            0,
            tasks.limit_ping,
            kind,
            session,
            calls,
            {**options, "peer_pid": target[0], "peer_tid": target[1]},
        )
    except Exception as failure:
        error = _cause(failure)
    try:
        pong.result()
    except Exception as failure:
        error = error or _cause(failure)
    if error is not None:
        raise error
    return result


def _cause(failure: Exception) -> OSError:
    """Return the OSError behind a task's failure; anything else goes on."""
    if isinstance(failure.__cause__, OSError):
        return failure.__cause__
    raise failure


def measure(
    rig: Rig, limit: Limit, calls: int, *, cpu: int = 1, gap_ns: int, warmup: int = 20
) -> float:
    """Measure one block of ``calls`` clocked round trips; return its median in ns.

    The block is added to ``limit``. Where the system forbids it, ``limit.unavailable``
    says why and the result is NaN.
    """
    if limit.unavailable is not None:
        return float("nan")
    kind, _, way = limit.name.partition("_cas")
    del way
    options = _options(
        rig,
        cpu,
        kind,
        warmup=warmup,
        gap_ns=gap_ns,
        clocked=True,
        plain=limit.name == "cacheline",
        one_way=kind != "membarrier",
        deadline=_patience(calls + warmup, gap_ns),
    )
    if kind == "eventfd" and options["eventfd"] < 0:
        limit.unavailable = "no eventfds: the limit of open files (ulimit -n)"
        return float("nan")
    try:
        with Disturbance(rig, cpu, limit.seen):
            rtt, there, _, slept, preempted = _pair(rig, cpu, kind, calls, options)
    except OSError as error:
        limit.unavailable = error.strerror or str(error)
        return float("nan")
    limit.rtt.merge(rtt)
    limit.one_way.merge(there)
    limit.calls += calls
    limit.slept += slept
    limit.preempted += preempted
    return float(rtt.quantile(0.5))


def measure_batches(rig: Rig, limit: Limit, *, cpu: int, placement: int) -> float:
    """Measure a cache-line limit at one placement, in batches: ns there and back."""
    if limit.unavailable is not None:
        return float("nan")
    options = _options(
        rig,
        cpu,
        "cacheline",
        warmup=BATCH // 2,
        batch=BATCH,
        placement=placement % _core.LIMIT_PLACEMENTS,
        plain=limit.name == "cacheline",
        deadline=_patience(BATCH * BATCHES, 0),
    )
    try:
        *_, ns, _, preempted = _pair(rig, cpu, "cacheline", BATCH * BATCHES, options)
    except OSError as error:
        limit.unavailable = error.strerror or str(error)
        return float("nan")
    limit.batches.append(ns)
    limit.preempted += preempted
    return ns


def _patience(calls: int, gap_ns: int) -> float:
    """Return after how many seconds a run is given up."""
    return 15.0 + calls * (gap_ns + 200_000) * 10 / 1e9


def measure_alone(
    rig: Rig, name: str, *, calls: int, blocks: int, gap_ns: int, warmup: int = 20
) -> Limit:
    """Measure a limit that no row stands beside."""
    limit = Limit(name)
    for block, part in enumerate(split(calls, blocks)):
        if name.startswith("cacheline"):
            found = [
                measure_batches(
                    rig, limit, cpu=1, placement=block * PLACEMENTS + placement
                )
                for placement in range(PLACEMENTS)
            ]
            limit.blocks.append(median(found))
        ns = measure(rig, limit, part, gap_ns=gap_ns, warmup=warmup)
        if not name.startswith("cacheline"):
            limit.blocks.append(ns)
    return limit


def open_base(cores: Sequence[int], controller: str | type[Chip] = "apic") -> Rig:
    """Boot the rig that can run every limit: with eventfds, if there may be some."""
    try:
        return Rig(cores, doorbell="eventfd", controller=controller)
    except BootError:
        return Rig(cores, controller=controller)


def run(
    options: Options, progress: Callable[[str], None] | None = None
) -> dict[str, Any]:
    """Measure the limits named and return the document of ``bench limits``.

    Raises ``CommandError`` for cores that cannot be used, and what a boot raises.
    """
    sender, target = choose_cores(options.cores)
    found = {}
    with open_base([sender, target]) as rig:
        for name in options.names:
            if progress is not None:
                progress(name)
            found[name] = measure_alone(
                rig,
                name,
                calls=options.calls,
                blocks=options.blocks,
                gap_ns=options.gap_ns,
                warmup=options.warmup,
            )
        return {
            "bench": "limits",
            "machine": machine_facts(sender_core=sender, target_core=target),
            "timer_ns": rig.timer_ns,
            "clock": rig.clock,
            "gap_us": options.gap_us,
            "blocks": options.blocks,
            "gc": False,
            "limits": {name: limit.as_json() for name, limit in found.items()},
            "rows": [],
        }


def table(result: dict[str, Any]) -> Table:
    """Return the document as a table for people."""
    rows: list[Cells] = []
    notes: list[str] = []
    missing = []
    for name, limit in result["limits"].items():
        if "unavailable" in limit:
            missing.append(f"{name} is unavailable: {limit['unavailable']}")
            continue
        batch = span(limit["batch_ns"]) if "batch_ns" in limit else "-"
        rows.append([name, batch, *percentiles(limit), valid(limit, notes, name)])
    about = ["", "each a round trip between two pinned processes:"]
    about += [f"  {name:14} {text}" for name, text in ABOUT.items()]
    return ["limit", "batched", *PERCENTILES, "valid"], rows, notes + missing + about
