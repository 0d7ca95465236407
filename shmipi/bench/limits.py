"""The physical limits of this computer: raw round trips without anything of shmipi.

Each runs between the same two pinned processes as the rows it stands beside: CPU 0 of a
rig sends, another CPU answers, both in C.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
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
    choose_cores,
    machine_facts,
    median,
    middle,
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
    "BACKOFFS",
    "BATCH",
    "BATCHES",
    "BELLS",
    "BORROWED",
    "EXAMPLE",
    "HELP",
    "PLACEMENTS",
    "ROUND_TRIPS",
    "Limit",
    "Options",
    "batches_for",
    "best",
    "measure",
    "measure_batches",
    "measure_queue",
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
#: The one whose raw round trip is over a machine's doorbells: the rig of all limits.
BORROWED: Final = next(bell for bell in BELLS if bell.limit_borrows)
#: Every limit, and what its round trip is.
ABOUT: Final = {
    "floor": "payload, ring and answer in one line, 10 ns of work on each side, the"
    " best of four back-offs before the sender looks for the answer",
    "mailbox": "the same on the two lines that a call uses: the target's word, the"
    " sender's csd",
    "queue": "no round trip: csds pushed on a list, taken all at once, unlocked each",
    "cacheline": "a curiosity, no limit of calls: a tight loop on one line, a store,"
    " the other spins on loads, back; with 2 ns of anything between receiving and"
    " sending the same line may take twice as long",
    "cacheline_cas": "the same where both poll by compare-and-swap: half the transfers",
    **{bell.limit: bell.limit_about for bell in BELLS},
    "futex_park": "FUTEX_WAKE there and back, both sleep",
    "signal": "tgkill to a busy process, its handler stores, the sender spins",
    "membarrier": "a private expedited membarrier: a real kernel IPI to the other core",
    "mprotect": "mprotect takes the right to write from a page just written to,"
    " with a busy thread of the process on the other core: a real TLB shootdown",
    "mprotect64": "the same of 64 pages: a whole flush there, as of more than 33",
    "pipe_park": "one byte there and back on two pipes, both sleep: what `perf bench"
    " sched pipe` does",
}

#: Those of which one round trip can be clocked.
ROUND_TRIPS: Final = tuple(name for name in ABOUT if name != "queue")

#: Lines that figures of lines are taken over: they differ by where a line lies.
PLACEMENTS: Final = 16
#: For how many ns the sender leaves the line to the target before it looks for the
#: answer: of ``floor`` and ``mailbox`` the best counts.
BACKOFFS: Final = (0, 25, 50, 100)
#: Round trips without a clock inside, and how many such batches at each placement: a
#: limit's back-offs share them.
BATCH, BATCHES = 250, 12

_ON_LINES: Final = ("floor", "mailbox", "cacheline", "cacheline_cas")
_SLEEPING: Final = (*(bell.limit for bell in BELLS), "futex_park", "pipe_park")
#: A thread of the sender's is busy on the other core: nobody notes an arrival.
_BUSY: Final = ("membarrier", "mprotect", "mprotect64")
#: More than this share of round trips to a target that was still awake: no limit.
_AWAKE_SHARE: Final = 0.2
_BOTH_SLEEP: Final = ("futex_park", "pipe_park")


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
class Try:
    """What was measured of a limit with one back-off."""

    rtt: _core.Hist = field(default_factory=_core.Hist)
    one_way: _core.Hist = field(default_factory=_core.Hist)
    batches: list[float] = field(default_factory=list)


@dataclass
class Limit:
    """A raw limit as it was measured: its distribution, and what disturbed it.

    ``tries`` are by back-off in ns; all but ``floor`` and ``mailbox`` have one, 0.
    ``blocks`` are the medians of the blocks in ns, in their order; those of limits on
    lines are over its placements, in batches.
    """

    name: str
    tries: dict[int, Try] = field(default_factory=dict)
    blocks: list[float] = field(default_factory=list)
    calls: int = 0
    #: Batches, each of which is one sample: what happens in it moves no other.
    samples: int = 0
    #: Round trips that were not counted.
    warmups: int = 0
    slept: int = 0
    preempted: int = 0
    unavailable: str | None = None
    seen: Seen = field(default_factory=Seen)

    def __post_init__(self) -> None:
        has_backoff = self.name in ("floor", "mailbox")
        self.tries = {ns: Try() for ns in (BACKOFFS if has_backoff else (0,))}

    @property
    def rtt(self) -> _core.Hist:
        """Its round trips, each clocked, with the back-off that is best for these."""
        return self.tries[self.clocked_backoff].rtt

    @property
    def clocked_backoff(self) -> int:
        """The back-off in ns with which a clocked round trip is fastest."""
        return min(self.tries, key=lambda ns: middle(self.tries[ns].rtt))

    @property
    def batch_backoff(self) -> int:
        """The same of round trips in batches."""
        return min(self.tries, key=lambda ns: median(self.tries[ns].batches))

    @property
    def batch_ns(self) -> float | None:
        """A round trip in batches with the best back-off, ``None`` without any."""
        batches = self.tries[self.batch_backoff].batches
        return median(batches) if batches else None

    def why(self) -> list[str]:
        """Return why its figures are not the box's own; empty if they are."""
        self.seen.preempted = self.preempted  # counted by the very thread that answers
        found = self.seen.why(self.calls * len(self.tries) + self.samples)
        awake = self.calls - self.slept
        if self.name in _SLEEPING and awake > _AWAKE_SHARE * self.calls:
            found.append(f"the target was awake at {awake} of {self.calls} calls")
        return [f"limit {self.name}: {text}" for text in found]

    def as_json(self) -> dict[str, Any]:
        """Return it for the ``limits`` of a document."""
        if self.unavailable is not None:
            return {"unavailable": self.unavailable}
        why = self.why()
        row: dict[str, Any] = {"calls": self.calls}
        if self.rtt.count:
            row |= described(self.rtt)
        there = self.tries[self.clocked_backoff].one_way
        if there.count:
            row["one_way_ns"] = described(there)
        if self.batch_ns is not None:
            row["batch_ns"] = self.batch_ns
        if len(self.tries) > 1:
            row["backoff_ns"] = self.clocked_backoff
            row["batch_backoff_ns"] = self.batch_backoff
            row["batch_ns_by_backoff"] = {
                str(ns): median(tried.batches)
                for ns, tried in self.tries.items()
                if tried.batches
            }
        trips = self.calls * len(self.tries) + self.warmups
        return row | self.seen.ending(trips, why, both=self.name in _BOTH_SLEEP)


def _options(rig: Rig, cpu: int, kind: str, **more: Any) -> dict[str, Any]:
    return {
        "core": rig.cores[cpu],
        "fd": rig.bell(cpu) if kind == BORROWED.limit else -1,
        "name": "/" + unused_name("shmipi.limit"),
        **more,
    }


def _pair(
    rig: Rig, cpu: int, kind: str, calls: int, options: dict[str, Any]
) -> tuple[_core.Hist, _core.Hist, list[float], int, int]:
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
        result: tuple[_core.Hist, _core.Hist, list[float], int, int] = rig.run(
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
    rig: Rig,
    limit: Limit,
    calls: int,
    *,
    cpu: int = 1,
    placement: int = 0,
    gap_ns: int,
    warmup: int = 20,
) -> float:
    """Measure one block of ``calls`` clocked round trips; return what one takes in ns.

    With each back-off that the limit has; the best is returned. The block is added to
    ``limit``. Where the system forbids it, ``limit.unavailable`` says why and the
    result is NaN.
    """
    if limit.unavailable is not None:
        return float("nan")
    kind, _, way = limit.name.partition("_cas")
    del way
    found = []
    for backoff, tried in limit.tries.items():
        options = _options(
            rig,
            cpu,
            kind,
            warmup=warmup,
            gap_ns=gap_ns,
            backoffs=(backoff,),
            placement=placement % _core.LIMIT_PLACEMENTS,
            clocked=True,
            plain=limit.name == "cacheline",
            one_way=kind not in _BUSY,
            deadline=_patience(calls + warmup, gap_ns),
        )
        if kind == BORROWED.limit and options["fd"] < 0:
            limit.unavailable = f"no {kind}s: the limit of open files (ulimit -n)"
            return float("nan")
        try:
            with Disturbance(rig, cpu, limit.seen):
                rtt, there, _, slept, preempted = _pair(rig, cpu, kind, calls, options)
        except OSError as error:
            limit.unavailable = error.strerror or str(error)
            return float("nan")
        tried.rtt.merge(rtt)
        tried.one_way.merge(there)
        limit.slept += slept
        limit.preempted += preempted
        found.append(
            middle(rtt) if limit.name in _ON_LINES else float(rtt.quantile(0.5))
        )
    limit.calls += calls
    limit.warmups += warmup * len(limit.tries)
    return min(found)


def measure_batches(
    rig: Rig, limit: Limit, *, cpu: int, placement: int, batches: int = BATCHES
) -> dict[int, float]:
    """Measure a limit on lines at one placement: ns there and back by back-off.

    In ``batches`` without a clock inside, of each back-off in turn. NaN where it is
    unavailable.
    """
    found = dict.fromkeys(limit.tries, float("nan"))
    if limit.unavailable is not None:
        return found
    kind, _, way = limit.name.partition("_cas")
    del way
    calls = BATCH * max(batches, len(limit.tries))
    options = _options(
        rig,
        cpu,
        kind,
        warmup=BATCH // 2,
        batch=BATCH,
        placement=placement % _core.LIMIT_PLACEMENTS,
        backoffs=tuple(limit.tries),
        plain=limit.name == "cacheline",
        deadline=_patience(calls, 0),
    )
    try:
        *_, each, _, preempted = _pair(rig, cpu, kind, calls, options)
    except OSError as error:
        limit.unavailable = error.strerror or str(error)
        return found
    limit.preempted += preempted
    limit.samples += calls // BATCH
    for backoff, ns in zip(limit.tries, each, strict=True):
        limit.tries[backoff].batches.append(ns)
        found[backoff] = ns
    return found


def batches_for(calls: int) -> int:
    """Return how many batches at a placement, in a run of so many clocked calls."""
    return BATCHES if calls >= 1000 else BATCHES // 4


def best(placements: Sequence[Mapping[int, float]]) -> float:
    """Return the median over placements with the back-off with which it is lowest."""
    return min(median(at[backoff] for at in placements) for backoff in placements[0])


def measure_queue(rig: Rig, limit: Limit, calls: int, *, cpu: int = 1) -> float:
    """Measure one block of ``queue``: ns for each of ``calls`` calls, all in one go."""
    if limit.unavailable is not None:
        return float("nan")
    options = _options(
        rig,
        cpu,
        limit.name,
        warmup=BATCH,
        batch=calls,
        deadline=_patience(calls, 0),
    )
    try:
        with Disturbance(rig, cpu, limit.seen):
            *_, (ns,), _, preempted = _pair(rig, cpu, limit.name, calls, options)
    except OSError as error:
        limit.unavailable = error.strerror or str(error)
        return float("nan")
    limit.tries[0].batches.append(ns)
    limit.calls += calls
    limit.samples += 1
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
        if name == "queue":
            limit.blocks.append(measure_queue(rig, limit, part))
            continue
        if name in _ON_LINES:
            found = [
                measure_batches(
                    rig,
                    limit,
                    cpu=1,
                    placement=block * (PLACEMENTS + 1) + placement,
                    batches=batches_for(calls),
                )
                for placement in range(0, PLACEMENTS, 4)  # others in other blocks
            ]
            limit.blocks.append(best(found))
        ns = measure(
            rig,
            limit,
            part,
            placement=block * PLACEMENTS,
            gap_ns=0 if name in _ON_LINES else gap_ns,
            warmup=warmup,
        )
        if name not in _ON_LINES:
            limit.blocks.append(ns)
    return limit


def open_base(
    cores: Sequence[int],
    controller: str | type[Chip] = "apic",
    *,
    trace: bool = False,
) -> Rig:
    """Boot the rig that can run every limit: with what one borrows, if that may be."""
    try:
        return Rig(cores, doorbell=BORROWED.name, controller=controller, trace=trace)
    except BootError:
        return Rig(cores, controller=controller, trace=trace)


def run(
    options: Options, progress: Callable[[str], None] | None = None
) -> dict[str, Any]:
    """Measure the limits named and return the document of ``bench limits``.

    Raises ``CommandError`` for cores that cannot be used, and what a boot raises.
    """
    sender, target = choose_cores(options.cores)
    found = {}
    steps = Steps(progress, len(options.names))
    with open_base([sender, target]) as rig:
        for name in options.names:
            steps(name)
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
        shown = percentiles(limit) if "p50" in limit else ["-"] * len(PERCENTILES)
        rows.append([name, batch, *shown, valid(limit, notes, name)])
    about = ["", "each a round trip between two pinned processes:"]
    about += [f"  {name:14} {text}" for name, text in ABOUT.items()]
    return ["limit", "batched", *PERCENTILES, "valid"], rows, notes + missing + about
