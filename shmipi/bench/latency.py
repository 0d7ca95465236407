"""The latency of the full path: waiting calls from CPU 0 to one other CPU.

Every row stands beside the raw limit of the same two processes: a block of the limit, a
block of the row, and so on in turn. A row's ratio is the median over the blocks of (the
row's median / the limit's median in that block), each call of both clocked. A polling
row has a second one, for calls and a limit in batches without a clock inside.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any, Final

from shmipi import _core
from shmipi.bench import limits, option, tasks
from shmipi.bench.breaks import Broke, around, lines
from shmipi.bench.clocks import Clocks
from shmipi.bench.hist import described
from shmipi.bench.limits import BATCH, PLACEMENTS, Limit, batches_for
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
    middle,
    split,
    spread,
    unused_name,
)
from shmipi.errors import BootError
from shmipi.irq.chips import Chip
from shmipi.machine import doorbells
from shmipi.report.cells import (
    PERCENTILES,
    Cells,
    Table,
    percentiles,
    ratio,
    span,
    valid,
)

__all__ = ["DOORBELLS", "EXAMPLE", "HANDLERS", "HELP", "Options", "run", "table"]

HELP = """\
One row for each state of the target (polling, halted, running), doorbell
and kind of handler. A native row is a C no-op called by a C loop; a python
row is smp_call_function_single() of a Python function, called and timed in
Python. Limits and rows take turns in blocks, and a ratio is the median over
these.

With --rate calls are due on a schedule, and each row has two distributions:
from when a call was sent, and from when it was due. One that is slow makes
those after it late, and their senders would have waited: what a sender that
waits for each answer leaves out (coordinated omission) is in the second.

With --break it stops at the first call that takes longer, and prints what both
CPUs did around it; the tracepoints that show it cost some 30 ns each."""
EXAMPLE = """\
shmipi bench latency
shmipi bench latency --doorbell none --handler native"""

#: What the rows can be chosen by: how the target is rung. "none" is the polling one.
DOORBELLS: Final = ("none", *(bell.name for bell in limits.BELLS))
#: How long a Python sender spins before it would sleep: for ever, or not at all.
_SPIN_NS: Final = {"spin": 10**9, "park": 0}
_PIPE_CALLS: Final = 200
_STATES: Final = {
    "polling": _core.POLLING,
    "halted": _core.HALTED,
    "running": _core.RUNNING,
}


@dataclass(frozen=True)
class Options:
    """What to measure. ``calls`` is for each row, cut into ``blocks``."""

    calls: int = option.calls(10_000, "clocked calls of each row")
    warmup: int = option.warmup()
    doorbells: Sequence[str] = option.several(
        "doorbell",
        DOORBELLS,
        f"only these rows: {', '.join(DOORBELLS)}; none is the polling target",
    )
    handlers: Sequence[str] = option.handlers()
    cores: str | Sequence[int] = option.pair_of_cores()
    gap_us: float = option.gap_of_calls()
    blocks: int = option.blocks()
    controller: str | type[Chip] = option.controller()
    rate: int = option.number(
        "rate",
        0,
        "calls a second, on a schedule; 0: a pause before each",
        least=0,
        most=10_000_000,
    )
    break_us: float = option.microseconds(
        "break", 0.0, "stop at the first call that takes longer (default: at none)"
    )

    @property
    def gap_ns(self) -> int:
        """The pause before each call, but for polling rows, in ns."""
        return round(self.gap_us * 1000)

    @property
    def period_ns(self) -> int:
        """From one call of a schedule to the next, in ns; 0: there is none."""
        return round(1e9 / self.rate) if self.rate else 0

    @property
    def batches(self) -> int:
        """Batches of calls to a polling target, at each placement of each block."""
        return batches_for(self.calls)


@dataclass
class Row:
    """One line of the result while it is being measured."""

    handler: str
    rtt: _core.Hist = field(default_factory=_core.Hist)
    one_way: _core.Hist = field(default_factory=_core.Hist)
    #: With a schedule: from when each call was due.
    scheduled: _core.Hist = field(default_factory=_core.Hist)
    clocks: Clocks = field(default_factory=Clocks)
    ratios: list[float] = field(default_factory=list)
    #: Batches beside batches, of rows to a polling target.
    floor_ratios: list[float] = field(default_factory=list)
    batches: list[float] = field(default_factory=list)
    samples: int = 0
    seen: Seen = field(default_factory=Seen)
    #: Calls in the blocks that ``seen`` looked at, warm-up included.
    calls: int = 0
    #: Calls for which the target was not in its state when they were due.
    missed: int = 0
    moved: bool = False


@dataclass
class Group:
    """Rows that share a target's state, a doorbell and the limit of a clocked call."""

    state: str
    doorbell: str
    wait: str
    limit: str
    rows: list[Row]
    pipe: _core.Hist = field(default_factory=_core.Hist)

    @property
    def name(self) -> str:
        """What to call it in a progress line."""
        return " ".join(
            word for word in (self.state, self.doorbell, self.wait) if word != "none"
        )

    def why(self, row: Row, limit: Limit) -> list[str]:
        """Return why a row's figures are not what they claim to be."""
        # A batch is one sample: whatever happens in it moves it and no other.
        found = row.seen.why(row.rtt.count + row.samples)
        found += limit.why()
        if row.moved:
            found.append("the sender changed its core")
        if row.missed > MISSED_SHARE * row.calls:
            found.append(
                f"the target was not {self.state} at {row.missed} of {row.calls} calls"
                " and was waited for"
            )
        counted = row.seen.counted
        rung = {
            "polling": counted.get("elided", 0),
            "halted": counted.get("doorbells_sent", 0),
            "running": counted.get("kicks_sent", 0),
        }[self.state]
        if rung < (1 - MISSED_SHARE) * row.calls:
            found.append(
                f"only {rung} of {row.calls} calls found the target {self.state}"
            )
        return found


def _groups(options: Options) -> list[Group]:
    wanted: list[tuple[str, str, str, str]] = []
    for doorbell in DOORBELLS:
        if doorbell not in options.doorbells:
            continue
        if doorbell == "none":
            wanted.append(("polling", "none", "spin", "mailbox"))
            continue
        wanted.append(("halted", doorbell, "spin", doorbells.BY_NAME[doorbell].limit))
        if doorbell == "futex":
            wanted.append(("halted", doorbell, "park", "futex_park"))
        if doorbell == "signal":
            wanted.append(("running", doorbell, "spin", "signal"))
    handlers = [handler for handler in HANDLERS if handler in options.handlers]
    return [Group(*parts, [Row(handler) for handler in handlers]) for parts in wanted]


class _Run:
    """A run: its rigs, its limits, and the passes over a group."""

    def __init__(
        self, options: Options, progress: Callable[[str], None] | None
    ) -> None:
        self.options = options
        alone = set(limits.ROUND_TRIPS) - {group.limit for group in _groups(options)}
        steps = len(_groups(options)) * options.blocks + len(alone)
        self.progress = Steps(progress, steps)
        self.limits: dict[str, Limit] = {}
        self.unavailable: dict[str, str] = {}
        self.broke: dict[str, Any] | None = None

    def _limit(self, name: str) -> Limit:
        return self.limits.setdefault(name, Limit(name))

    def measure(self, group: Group, rig: Rig) -> None:
        """Measure all blocks of a group."""
        one_block = self._polling if group.state == "polling" else self._rung
        parts = split(self.options.calls, self.options.blocks)
        for block, part in enumerate(parts):
            self.progress(f"{group.name}, block {block + 1} of {len(parts)}")
            one_block(group, rig, block, part)

    # ---- a target that sleeps or is busy: every call is clocked ----------------------

    def _rung(self, group: Group, rig: Rig, block: int, calls: int) -> None:
        options, limit = self.options, self._limit(group.limit)
        beside = limits.measure(
            rig, limit, calls, gap_ns=options.gap_ns, warmup=options.warmup
        )
        limit.blocks.append(beside)
        with ExitStack() as stack:
            if group.state == "running":
                stack.enter_context(rig.in_state([1], "running"))
            for row in group.rows:
                middle = self._pass(group, row, rig, calls)
                if beside > 0:
                    row.ratios.append(middle / beside)

    def _pass(
        self, group: Group, row: Row, rig: Rig, calls: int, cpu: int = 1
    ) -> float:
        """One block of a row, each call clocked; return the typical ns."""
        passes = _native if row.handler == "native" else _python
        before, row.seen = row.seen, Seen()
        try:
            return passes(group, row, rig, calls, self.options, cpu)
        except Broke as broke:
            name = f"{group.name} {row.handler}"
            us = self.options.break_us
            self.broke = around(broke, rig, name, cpu, row.seen, us)
            raise
        finally:
            row.seen = before.merged(row.seen)

    # ---- a polling target: batches over placements, the distribution apart -----------

    def _polling(self, group: Group, rig: Rig, block: int, calls: int) -> None:
        floor, mailbox = self._limit("floor"), self._limit("mailbox")
        beside: dict[str, list[dict[int, float]]] = {"floor": [], "mailbox": []}
        found: dict[str, list[float]] = {row.handler: [] for row in group.rows}
        for place in range(PLACEMENTS):
            cpu = 1 + place
            placement = block * PLACEMENTS + place
            for limit in (floor, mailbox):
                beside[limit.name].append(
                    limits.measure_batches(
                        rig,
                        limit,
                        cpu=cpu,
                        placement=placement,
                        batches=self.options.batches,
                    )
                )
            with _polls(rig, cpu):
                for row in group.rows:
                    with Disturbance(rig, cpu, row.seen):
                        ns = _batch(row, rig, cpu, place, self.options.batches)
                        found[row.handler].append(ns)
        for limit in (floor, mailbox):
            limit.blocks.append(limits.best(beside[limit.name]))
        for row in group.rows:
            if floor.blocks[-1] > 0:
                row.floor_ratios.append(median(found[row.handler]) / floor.blocks[-1])
        # With a clock around each call, of limits and rows alike.
        cpu = 1 + block % PLACEMENTS
        clocked = {
            limit.name: limits.measure(
                rig,
                limit,
                calls,
                cpu=cpu,
                placement=block * PLACEMENTS,
                gap_ns=0,
                warmup=self.options.warmup,
            )
            for limit in (floor, mailbox)
        }
        with _polls(rig, cpu):
            for row in group.rows:
                took = self._pass(group, row, rig, calls, cpu)
                if clocked[group.limit] > 0:
                    row.ratios.append(took / clocked[group.limit])
        if any(row.handler == "python" for row in group.rows):
            group.pipe.merge(_pipe(rig))


class _polls:
    """While it is entered, a CPU polls; before and after, it halts."""

    def __init__(self, rig: Rig, cpu: int) -> None:
        self._rig, self._cpu = rig, cpu

    def __enter__(self) -> None:
        self._rig.idle(self._cpu, "poll")

    def __exit__(self, *_: object) -> None:
        self._rig.idle(self._cpu, "halt")


def _batch(row: Row, rig: Rig, cpu: int, skip: int, batches: int) -> float:
    """Measure one placement in batches; return ns per call."""
    warmup = BATCH // 2
    if row.handler == "native":
        *_, each, _, _, moved = rig.run(
            0,
            tasks.native_calls,
            cpu,
            BATCH * batches,
            {
                "batch": BATCH,
                "warmup": warmup,
                "skip": skip,
                "state": _core.POLLING,
            },
        )
        row.moved |= bool(moved)
    else:
        each = rig.run(
            0, tasks.python_batches, cpu, batches, BATCH, warmup, _core.POLLING
        )
    row.calls += BATCH * batches + warmup
    row.samples += batches
    ns = median(each)
    row.batches.append(ns)
    return ns


def _native(
    group: Group, row: Row, rig: Rig, calls: int, options: Options, cpu: int = 1
) -> float:
    """One block of a native row: round trips, then one way; return the typical ns."""
    common = {
        "warmup": options.warmup,
        "gap_ns": 0 if group.state == "polling" else options.gap_ns,
        "state": _STATES[group.state],
        "park": group.wait == "park",
    }
    more = {"period_ns": options.period_ns, "break_ns": round(options.break_us * 1000)}
    with Disturbance(rig, cpu, row.seen):
        found = rig.run(0, tasks.timed, cpu, calls, {**common, **more})
    row.calls += found["rtt"].count + options.warmup
    row.missed += found["missed"]
    row.moved |= found["moved"]
    row.rtt.merge(found["rtt"])
    row.scheduled.merge(found["scheduled"])
    _broken(found["broke"])
    there = rig.run(0, tasks.timed, cpu, _half(calls), {**common, "stamp": True})
    row.one_way.merge(there["one_way"])
    row.clocks.add(there["clock_ns"])
    return _typical(group, found["rtt"])


def _broken(broke: tuple[int, int, int, int] | None) -> None:
    if broke is not None:
        raise Broke(*broke)


def _python(
    group: Group, row: Row, rig: Rig, calls: int, options: Options, cpu: int = 1
) -> float:
    """One block of a Python row: round trips, then one way; return the typical ns."""
    gap_ns = 0 if group.state == "polling" else options.gap_ns
    common = (options.warmup, gap_ns, _STATES[group.state], _SPIN_NS[group.wait])
    more = (options.period_ns, round(options.break_us * 1000))
    with Disturbance(rig, cpu, row.seen):
        rtt, missed, scheduled, broke = rig.run(
            0, tasks.python_calls, cpu, calls, *common, *more
        )
    row.calls += rtt.count + options.warmup
    row.missed += missed
    row.rtt.merge(rtt)
    row.scheduled.merge(scheduled)
    _broken(broke)
    there, clock_ns = rig.run(0, tasks.python_one_way, cpu, _half(calls), *common)
    row.one_way.merge(there)
    row.clocks.add(clock_ns)
    return _typical(group, rtt)


def _typical(group: Group, rtt: _core.Hist) -> float:
    return middle(rtt) if group.state == "polling" else float(rtt.quantile(0.5))


def _half(calls: int) -> int:
    return max(1, calls // 2)


def _pipe(rig: Rig) -> _core.Hist:
    """Measure a round trip on a multiprocessing.Pipe between the same two processes."""
    address = "\0" + unused_name("shmipi.bench")
    warmup = 20
    job = rig.start(1, tasks.pipe_pong, address, _PIPE_CALLS + warmup)
    try:
        found: _core.Hist = rig.run(0, tasks.pipe_ping, address, _PIPE_CALLS, warmup)
    finally:
        job.result()
    return found


# ---- the result ----------------------------------------------------------------------


def _row_json(
    group: Group, row: Row, beside: Mapping[str, Limit], controller: str
) -> dict[str, Any]:
    limit = beside[group.limit]
    why = group.why(row, limit)
    if row.floor_ratios:
        why += beside["floor"].why()
    if not row.ratios and limit.unavailable is None:
        why.append("it was stopped before its first block was over")
    elif not row.ratios:
        why.append(f"its limit {group.limit} is unavailable: {limit.unavailable}")
    result: dict[str, Any] = {
        "bench": "latency",
        "target_state": group.state,
        "doorbell": group.doorbell,
        "sender_wait": group.wait,
        "handler": row.handler,
        "controller": controller,
        "calls": row.rtt.count,
        "rtt_ns": described(row.rtt),
        **row.clocks.one_way(row.one_way),
        "limit": group.limit,
        "ratio": median(row.ratios) if row.ratios else None,
        "ratio_spread": spread(row.ratios) if row.ratios else None,
        "ratio_blocks": row.ratios,
        "missed_state": row.missed,
    }
    if row.scheduled.count:
        result["scheduled_ns"] = described(row.scheduled)
    if row.batches:
        result["batch_ns"] = median(row.batches)
        result["placements"] = PLACEMENTS
        result["floor_ratio"] = median(row.floor_ratios) if row.floor_ratios else None
        result["floor_ratio_spread"] = (
            spread(row.floor_ratios) if row.floor_ratios else None
        )
        result["floor_ratio_blocks"] = row.floor_ratios
    if group.pipe.count and row.handler == "python":
        result["pipe_rtt_ns"] = described(group.pipe)
        times = group.pipe.quantile(0.5) / row.rtt.quantile(0.5)  # both clocked
        result["times_faster_than_pipe"] = times
    # Who sleeps for the answer is interrupted by it.
    return result | row.seen.ending(row.calls, why, both=group.wait == "park")


def run(
    options: Options, progress: Callable[[str], None] | None = None
) -> dict[str, Any]:
    """Measure and return the document of ``bench latency``, without its schema.

    Raises ``CommandError`` for cores that cannot be used, and what a boot raises; but a
    doorbell that cannot be had here is listed under ``unavailable``.
    """
    sender, target = choose_cores(options.cores)
    groups = _groups(options)
    state = _Run(options, progress)
    with ExitStack() as stack:
        # All CPUs of the base but one are on the target's core: the line that is
        # written to call a polling target lies at another place for each of them.
        base = stack.enter_context(
            limits.open_base(
                [sender] + [target] * PLACEMENTS,
                options.controller,
                trace=options.break_us > 0,
            )
        )
        rigs: dict[str, Rig] = {"none": base}
        for group in groups:
            rig = _rig_for(group, rigs, stack, state, [sender, target])
            if rig is not None:
                try:
                    state.measure(group, rig)
                except Broke:
                    break
        for name in limits.ROUND_TRIPS:
            if name not in state.limits and state.broke is None:
                state.progress(f"limit {name}")
                state.limits[name] = limits.measure_alone(
                    base,
                    name,
                    calls=min(options.calls, 2000),
                    blocks=5,
                    gap_ns=options.gap_ns,
                )
        document = {
            "bench": "latency",
            "machine": machine_facts(sender_core=sender, target_core=target),
            "timer_ns": base.timer_ns,
            "clock": base.clock,
            "gap_us": options.gap_us,
            "calls": options.calls,
            "blocks": options.blocks,
            "gc": False,
            "limits": {
                name: state.limits[name].as_json()
                for name in limits.ROUND_TRIPS
                if name in state.limits
                and (state.limits[name].calls or state.limits[name].unavailable)
            },
            "rows": [
                _row_json(group, row, state.limits, base.cluster.controller)
                for group in groups
                if group.limit in state.limits
                for row in group.rows
                if row.rtt.count
            ],
        }
    if options.rate:
        document["rate"] = options.rate
    if state.broke is not None:
        document["broke"] = state.broke
    if state.unavailable:
        document["unavailable"] = state.unavailable
    return document


def _rig_for(
    group: Group,
    rigs: dict[str, Rig],
    stack: ExitStack,
    state: _Run,
    cores: Sequence[int],
) -> Rig | None:
    """Return the machine with a group's doorbell, booted when it is first needed."""
    doorbell = "futex" if group.state == "running" else group.doorbell
    if doorbell in state.unavailable:
        return None
    if doorbell not in rigs:
        try:
            rigs[doorbell] = stack.enter_context(
                Rig(
                    cores,
                    doorbell=doorbell,
                    controller=state.options.controller,
                    trace=state.options.break_us > 0,
                )
            )
        except BootError as error:
            state.unavailable[doorbell] = str(error)
            return None
    return rigs[doorbell]


def _row_name(row: dict[str, Any]) -> str:
    words = [row["target_state"], row["doorbell"], row["sender_wait"]]
    return " ".join(word for word in words if word not in ("none", "spin"))


def table(result: dict[str, Any]) -> Table:
    """Return the document as a table for people."""
    rows: list[Cells] = []
    notes: list[str] = []
    more = []
    for row in result["rows"]:
        name = _row_name(row)
        limit = result["limits"][row["limit"]]
        rows.append(
            [
                name,
                row["handler"],
                *percentiles(row["rtt_ns"]),
                span((row["one_way_ns"] or {}).get("p50")),
                row["limit"],
                span(limit.get("p50")),
                ratio(row, "ratio"),
                valid(row, notes, f"{name} {row['handler']}"),
            ]
        )
        if "scheduled_ns" in row:
            late = row["scheduled_ns"]
            rows.append(
                [
                    f"{name}, from when it was due",
                    row["handler"],
                    *percentiles(late),
                    *["-"] * 4,
                    rows[-1][-1],
                ]
            )
        if "batch_ns" in row:
            rows.append(
                [
                    f"{name}, in batches",
                    row["handler"],
                    span(row["batch_ns"]),
                    *["-"] * len(PERCENTILES),
                    "floor",
                    span(result["limits"]["floor"].get("batch_ns")),
                    ratio(row, "floor_ratio"),
                    rows[-1][-1],
                ]
            )
        if "times_faster_than_pipe" in row:
            more.append(
                f"{name} {row['handler']}: {row['times_faster_than_pipe']:.0f} times"
                " faster than a multiprocessing.Pipe round trip between the same two"
                f" processes ({span(row['pipe_rtt_ns']['p50'])})"
            )
    header = ["target", "handler", *PERCENTILES, "one way"]
    header += ["limit", "its p50", "ratio (spread)", "valid"]
    more.append(
        "each call is clocked, and so is its limit; in batches: without a clock inside,"
        " of rows and limit alike"
    )
    more += [f"{name}: {why}" for name, why in result.get("unavailable", {}).items()]
    if "broke" in result:
        more += ["", *lines(result["broke"])]
    return header, rows, notes + more
