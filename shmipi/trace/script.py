"""What each CPU of a recorded machine did, as a script that another machine can follow.

A script is a list of steps in shared memory, which the core runs natively
(``_core.replay``). Between two the CPU waits in the state that the trace shows at its
interrupts: an idle task's entry means that it was halted, a call that was elided that
it polled, any other that it ran. A policy (``Policy``) changes what is sent.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from shmipi import _core
from shmipi.trace.ftrace import Ftrace, Record, fields_of
from shmipi.trace.matching import FLUSHES, TTWU, Queued, Sent, Traffic

__all__ = ["CALL", "ENTRY", "IDLE", "STEP", "How", "Op", "Policy", "Script", "write"]


class Op(IntEnum):
    """``enum shi_replay_op``."""

    WAIT = 0
    CALL = 1
    MANY = 2
    JOIN = 3
    RESCHED = 4
    LAZY = 5
    LOCAL = 6
    BATCH = 7
    RAISE = 8


class How(IntEnum):
    """``enum shi_replay_how``."""

    UNSENT = 0
    RUNG = 1
    COALESCED = 2
    ELIDED = 3
    NOT_QUEUED = 4


#: As the core has them (``measure/replay.h``).
STEP: Final = np.dtype(
    [
        ("at_ns", "u8"),
        ("run_ns", "u8"),
        ("over_ns", "u8"),
        ("call", "u4"),
        ("count", "u4"),
        ("cpu", "u2"),
        ("op", "u1"),
        ("state", "u1"),
        ("reserved", "u4"),
    ]
)
CALL: Final = np.dtype(
    [
        ("due", "u8"),
        ("queued", "u8"),
        ("entered", "u8"),
        ("left", "u8"),
        ("burn_ns", "u4"),
        ("cpu", "u2"),
        ("how", "u1"),
        ("unseen", "u1"),
    ]
)
ENTRY: Final = np.dtype(
    [("entered", "u8"), ("left", "u8"), ("use", "u4"), ("state", "u4")]
)
assert (STEP.itemsize, CALL.itemsize, ENTRY.itemsize) == (40, 40, 24)

_NONE: Final = 0xFFFFFFFF
#: In the place of a state: idle as the policy has it (``SHI_RP_HALTPOLL``).
HALTPOLL: Final = 0xFF
_SYNC, _ASYNC, _WAKE = 0, 1, 2
#: A sleeping CPU is up this long before it has to do something: the time of a wake-up,
#: and some more.
_UP_NS: Final = 120_000
#: The same where an interrupt should wake it before, of the time that is left at most.
_UP_SOON_NS: Final = 60_000
_BATCH_NS: Final = 1_000_000  # a call is held back for no longer
_BURN_NS: Final = 1_000  # of a function that is never seen to run

#: What an idle CPU does: as the trace shows, or always the same.
_STATES: Final = {"poll": _core.POLLING, "halt": _core.HALTED, "haltpoll": HALTPOLL}
IDLE: Final = ("trace", *_STATES)

#: Functions of the kernel that their sender waits for, and that it does not.
_WAITED: Final = frozenset(
    (
        "clear_tasks_mm_cpumask",
        "do_flush_tlb_all",
        "do_kernel_range_flush",
        "do_nothing",
        "do_sync_core",
        "flush_tlb_func",
        "ipi_mb",
        "ipi_rseq",
        "ipi_sync_core",
        "ipi_sync_rq_state",
        "tlb_remove_table_smp_sync",
    )
)
_NOT_WAITED: Final = frozenset(
    (
        "__blk_mq_complete_request_remote",
        "__hrtick_start",
        "nohz_csd_func",
        "rcu_exp_handler",
        "rps_trigger_softirq",
        "tick_broadcast_oneshot_control",
        "trigger_load_balance",
    )
)


@dataclass(frozen=True)
class Policy:
    """What is done otherwise than the recorded kernel did it."""

    #: Reschedules of a CPU that runs something set a flag, which it sees by itself.
    lazy_resched: bool = False
    #: So many calls that nobody waits for share an IPI; none is held for over 1 ms.
    batch: int | None = None
    #: CPUs that are sent no IPI: wake-ups go to the sender or another CPU, other calls
    #: run when the CPU enters the kernel by itself, and nobody waits for them.
    isolate: frozenset[int] = frozenset()

    def __post_init__(self) -> None:
        if self.batch is not None and not 2 <= self.batch <= _MOST_BATCH:
            raise ValueError(
                f"a batch is of 2 to {_MOST_BATCH} calls, not {self.batch}"
            )


_MOST_BATCH: Final = 32


@dataclass
class Script:
    """The steps of each CPU, and the calls that they are about."""

    ncpus: int
    steps: list[NDArray[Any]]
    calls: NDArray[Any]
    #: Of each call: what is done with it, and whether that is later than it was there,
    #: or elsewhere, because of the policy.
    ops: list[Op]
    moved: list[bool]
    #: When it was queued there, ns since the start.
    wanted: list[int]
    resched_ns: int = 0
    #: How long the trace takes, and how many interrupts a CPU may get.
    duration_ns: int = 0
    expected: list[int] = field(default_factory=list)
    #: Functions, by whether their sender waits.
    waited: dict[str, bool] = field(default_factory=dict)
    #: IPIs that the policy has left out.
    spared: int = 0


def write(
    trace: Ftrace,
    traffic: Traffic,
    *,
    speed: float = 1.0,
    idle: str = "trace",
    policy: Policy | None = None,
) -> Script:
    """Write the script of a trace that was matched.

    ``speed`` 2 plays it in half the time; how long functions take stays. Raises
    ``ValueError`` for a speed that is not above 0, another ``idle`` than ``IDLE`` has,
    and a policy that isolates every CPU.
    """
    if not 0 < speed < float("inf"):
        raise ValueError(f"a speed is above 0, not {speed:g}")
    if idle not in IDLE:
        raise ValueError(f"an idle CPU does one of {', '.join(IDLE)}, not {idle!r}")
    policy = policy or Policy()
    return _Writer(trace, traffic, speed, idle, policy).write()


@dataclass(eq=False)
class _Item:
    """Something that a CPU does by itself, in the order of ``key``."""

    key: tuple[int, int]
    at_ns: int
    op: Op
    cpu: int
    type: int = 0
    #: The calls that it is about: burn, target, when each was to be queued.
    calls: list[_Call] = field(default_factory=list)
    function: str = ""
    #: When it was over there, by line and ns, for what is waited for.
    over_line: int = 0
    over_ns: int = 0
    pid: int = 0
    moved: bool = False
    first: int = 0  # number of its first call, once that is known


@dataclass(eq=False)
class _Call:
    cpu: int
    burn_ns: int
    wanted_ns: int


@dataclass(eq=False)
class _Arrival:
    """An interrupt, or a call without one, that comes to a CPU."""

    key: tuple[int, int]
    at_ns: int  # it is sent
    over_ns: int  # it was over
    state: int
    item: _Item
    call: _Call


class _Writer:
    def __init__(
        self, trace: Ftrace, traffic: Traffic, speed: float, idle: str, policy: Policy
    ) -> None:
        self._trace, self._traffic = trace, traffic
        self._speed, self._idle, self._policy = speed, idle, policy
        self._first = trace.records[0].time_ns if trace.records else 0
        # Also those that only were sent to.
        named = [queued.cpu for queued in traffic.queued]
        named += [sent.cpu for sent in traffic.sent]
        self._ncpus = max(trace.ncpus, max(named, default=0) + 1)
        self._own: list[list[_Item]] = [[] for _ in range(self._ncpus)]
        self._arrivals: list[list[_Arrival]] = [[] for _ in range(self._ncpus)]
        self._times: list[int] = []  # of each line that is an event, never going back
        self._lines: list[int] = []
        latest = 0
        for record in trace.records:
            latest = max(latest, self._ns(record))
            self._lines.append(record.line)
            self._times.append(latest)
        self._waited = _waited(trace, traffic)
        self._burns = self._usual_burns()
        self._spared = 0
        self._numbers: dict[int, int] = {}

    def _ns(self, record: Record) -> int:
        return max(0, round((record.time_ns - self._first) / self._speed))

    def _burn(self, entry: Record | None) -> int | None:
        leave = self._traffic.exits.get(entry.line) if entry is not None else None
        if entry is None or leave is None:
            return None
        return max(0, leave.time_ns - entry.time_ns)

    def _usual_burns(self) -> dict[str, int]:
        """Return how long each function takes as a rule: the median."""
        ran: defaultdict[str, list[int]] = defaultdict(list)
        for queued in self._traffic.queued:
            burn = self._burn(queued.entry)
            if burn is not None:
                ran[queued.function].append(burn)
        return {name: sorted(each)[len(each) // 2] for name, each in ran.items()}

    def write(self) -> Script:
        self._collect()
        self._apply()
        return self._number()

    # ---- what was done -------------------------------------------------------------

    def _collect(self) -> None:
        traffic = self._traffic
        interrupts = _interrupts(traffic)
        many = _many(self._trace)
        items: dict[int, _Item] = {}
        for queued in traffic.queued:
            self._collect_call(queued, interrupts.get(id(queued)), many, items)
        explained = {id(sent) for sent in interrupts.values()}
        for sent in traffic.sent:
            if sent.vector == "reschedule" or (
                sent.vector in FLUSHES and id(sent) not in explained
            ):
                self._collect_interrupt(sent)
        for entry in traffic.local:
            burn = self._burn(entry)
            self._own[entry.cpu].append(
                _Item(
                    (entry.line, 0),
                    self._ns(entry),
                    Op.LOCAL,
                    entry.cpu,
                    calls=[
                        _Call(
                            entry.cpu,
                            _BURN_NS if burn is None else burn,
                            self._ns(entry),
                        )
                    ],
                    function=fields_of(entry).get("func", ""),
                    pid=entry.pid,
                )
            )

    def _collect_call(
        self,
        queued: Queued,
        sent: Sent | None,
        many: dict[int, int],
        items: dict[int, _Item],
    ) -> None:
        record = queued.record
        at = self._ns(record)
        burn = self._burn(queued.entry)
        if burn is None:
            burn = self._burns.get(queued.function, _BURN_NS)
        call = _Call(queued.cpu, burn, at)
        waited = self._waited.get(queued.function, False)
        leave = (
            self._traffic.exits.get(queued.entry.line)
            if queued.entry is not None
            else None
        )
        group = many.get(record.line) if waited else None
        item = items.get(group) if group is not None else None
        if item is not None:
            item.calls.append(call)
        else:
            item = _Item(
                (record.line, 0),
                at,
                Op.CALL if group is None else Op.MANY,
                queued.cpu,
                _WAKE if queued.function == TTWU else _SYNC if waited else _ASYNC,
                [call],
                queued.function,
                pid=record.pid,
            )
            self._own[record.cpu].append(item)
            if group is not None:
                items[group] = item
        if leave is not None and leave.line > item.over_line:
            item.over_line, item.over_ns = leave.line, self._ns(leave)
        if queued.how == "coalesced":
            return  # it comes with another
        entry = queued.entry or (sent.entry if sent is not None else None)
        if queued.how == "elided":
            state = _core.POLLING
        elif entry is None or entry.pid == 0:
            state = _core.HALTED
        else:
            state = _core.RUNNING
        last = leave or entry
        over = self._ns(last) if last is not None else at
        self._arrivals[queued.cpu].append(
            _Arrival((record.line, 0), at, over, state, item, call)
        )

    def _collect_interrupt(self, sent: Sent) -> None:
        at = self._ns(sent.record)
        op = Op.RESCHED if sent.vector == "reschedule" else Op.RAISE
        item = _Item(
            (sent.record.line, sent.cpu),
            at,
            op,
            sent.cpu,
            calls=[_Call(sent.cpu, 0, at)],
            pid=sent.record.pid,
        )
        self._own[sent.record.cpu].append(item)
        if sent.entry is None:
            return  # one with another
        over = self._ns(self._traffic.exits.get(sent.entry.line, sent.entry))
        state = _core.RUNNING if sent.entry.pid else _core.HALTED
        self._arrivals[sent.cpu].append(
            _Arrival(item.key, at, over, state, item, item.calls[0])
        )

    # ---- what is done otherwise ----------------------------------------------------

    def _apply(self) -> None:
        if self._policy.isolate:
            self._isolate(self._policy.isolate)
        if self._policy.lazy_resched:
            self._make_lazy()
        if self._policy.batch:
            self._make_batches(self._policy.batch)

    def _make_lazy(self) -> None:
        for arrivals in self._arrivals:
            for arrival in list(arrivals):
                item = arrival.item
                # Of the idle task nothing is put off (__resched_curr).
                if item.op == Op.RESCHED and arrival.state == _core.RUNNING:
                    item.op = Op.LAZY
                    arrivals.remove(arrival)
                    self._spared += 1

    def _isolate(self, isolated: frozenset[int]) -> None:
        keepers = [cpu for cpu in range(self._ncpus) if cpu not in isolated]
        if not keepers:
            raise ValueError("no CPU is left that is not isolated")
        gone: set[int] = set()
        later: list[tuple[int, _Item]] = []
        for sender, own in enumerate(self._own):
            kept = []
            for item in own:
                if item.op == Op.LOCAL or item.cpu == sender:
                    kept.append(item)
                elif item.op == Op.MANY:
                    self._isolate_many(item, isolated, later)
                    if item.calls:
                        kept.append(item)
                elif item.cpu not in isolated:
                    kept.append(item)
                elif item.op != Op.CALL:
                    gone.add(id(item))  # there is no task to preempt
                    self._spared += 1
                elif item.type == _WAKE:
                    gone.add(id(item))
                    self._spared += 1
                    kept.append(self._wake_elsewhere(item, sender, keepers))
                else:
                    gone.add(id(item))
                    self._spared += 1
                    later.append((item.cpu, item))
            self._own[sender] = kept
        for cpu in isolated & set(range(self._ncpus)):
            self._arrivals[cpu] = []
        for arrivals in self._arrivals:
            arrivals[:] = [each for each in arrivals if id(each.item) not in gone]
        self._defer(later)

    def _isolate_many(
        self, item: _Item, isolated: frozenset[int], later: list[tuple[int, _Item]]
    ) -> None:
        for call in [each for each in item.calls if each.cpu in isolated]:
            item.calls.remove(call)
            self._spared += 1
            one = _Item(item.key, item.at_ns, Op.CALL, call.cpu, calls=[call])
            later.append((call.cpu, one))

    def _wake_elsewhere(self, item: _Item, sender: int, keepers: list[int]) -> _Item:
        """Return the same wake-up of a task that runs on a CPU that keeps house."""
        cpu = sender if sender in keepers else keepers[0]
        call = item.calls[0]
        call.cpu = cpu
        other = _Item(item.key, item.at_ns, Op.CALL, cpu, _WAKE, [call], moved=True)
        if cpu == sender:
            other.op = Op.LOCAL
        else:
            self._arrivals[cpu].append(
                _Arrival(item.key, item.at_ns, item.at_ns, _core.HALTED, other, call)
            )
        return other

    def _defer(self, later: list[tuple[int, _Item]]) -> None:
        """Let calls run where they are for, when that CPU does something itself."""
        own = [sorted(items, key=lambda item: item.key) for items in self._own]
        for cpu, item in later:
            keys = [each.key for each in own[cpu]]
            at = bisect_left(keys, item.key)
            if at < len(own[cpu]):
                key, ns = own[cpu][at].key, own[cpu][at].at_ns
            else:
                key, ns = (self._lines[-1] + 1, 0), self._times[-1]
            deferred = _Item(
                (key[0], key[1] - 1), ns, Op.LOCAL, cpu, calls=item.calls, moved=True
            )
            self._own[cpu].append(deferred)

    def _make_batches(self, most: int) -> None:
        """Gather calls that nobody waits for: one IPI for as many, 1 ms at most."""
        joined: dict[int, _Item] = {}
        for sender, own in enumerate(self._own):
            own.sort(key=lambda item: item.key)
            held: dict[int, list[_Item]] = {}
            kept: list[_Item] = []
            for item in own:
                for cpu, members in list(held.items()):
                    end = members[0].at_ns + _BATCH_NS
                    if item.at_ns > end:
                        kept.append(
                            _batch(held.pop(cpu), self._key_at(end), end, joined)
                        )
                    elif item.cpu == cpu and (
                        item.op in (Op.MANY, Op.RAISE)
                        or (item.op == Op.CALL and item.type != members[0].type)
                    ):
                        key = item.key[0], item.key[1] - 1
                        kept.append(_batch(held.pop(cpu), key, item.at_ns, joined))
                if item.op != Op.CALL or item.type == _SYNC or item.cpu == sender:
                    kept.append(item)
                    continue
                held.setdefault(item.cpu, []).append(item)
                if len(held[item.cpu]) == most:
                    kept.append(
                        _batch(held.pop(item.cpu), item.key, item.at_ns, joined)
                    )
            for members in held.values():
                last = max(self._times[-1], members[-1].at_ns)
                end = min(members[0].at_ns + _BATCH_NS, last)
                kept.append(_batch(members, self._key_at(end), end, joined))
            self._own[sender] = kept
        for arrivals in self._arrivals:
            self._join(arrivals, joined)

    def _join(self, arrivals: list[_Arrival], joined: dict[int, _Item]) -> None:
        seen: set[int] = set()
        kept = []
        for arrival in arrivals:
            batch = joined.get(id(arrival.item))
            if batch is not None:
                if id(batch) in seen:
                    self._spared += arrival.state != _core.POLLING
                    continue
                seen.add(id(batch))
                arrival.over_ns += max(0, batch.at_ns - arrival.at_ns)
                arrival.item = batch
                arrival.key, arrival.at_ns = batch.key, batch.at_ns
            kept.append(arrival)
        arrivals[:] = kept

    def _key_at(self, ns: int) -> tuple[int, int]:
        """Return the place in the file of a time at which nothing is recorded."""
        at = bisect_left(self._times, ns)
        return (self._lines[at], -1) if at < len(self._lines) else (self._lines[-1], 1)

    # ---- the steps -----------------------------------------------------------------

    def _number(self) -> Script:
        calls: list[_Call] = []
        ops: list[Op] = []
        moved: list[bool] = []
        for own in self._own:
            own.sort(key=lambda item: item.key)
            for item in own:
                if item.op == Op.MANY:
                    item.calls.sort(key=lambda call: call.cpu)
                item.first = len(calls)
                calls += item.calls
                ops += [item.op] * len(item.calls)
                moved += [item.moved] * len(item.calls)
        self._numbers = {id(call): number for number, call in enumerate(calls)}
        steps = [
            np.array(list(self._steps(cpu)), dtype=STEP) for cpu in range(self._ncpus)
        ]
        table = np.zeros(max(1, len(calls)), CALL)
        for number, call in enumerate(calls):
            table[number]["burn_ns"] = min(call.burn_ns, 10**9)
            table[number]["cpu"] = call.cpu
        return Script(
            self._ncpus,
            steps,
            table,
            ops,
            moved,
            [call.wanted_ns for call in calls],
            self._resched_ns(),
            self._times[-1] if self._times else 0,
            [sum(call.cpu == cpu for call in calls) for cpu in range(len(self._own))],
            self._waited,
            self._spared,
        )

    def _resched_ns(self) -> int:
        ran = sorted(
            leave.time_ns - sent.entry.time_ns
            for sent in self._traffic.sent
            if sent.vector == "reschedule"
            and sent.entry is not None
            and (leave := self._traffic.exits.get(sent.entry.line)) is not None
        )
        return max(0, ran[len(ran) // 2]) if ran else 0

    def _steps(self, cpu: int) -> Iterator[tuple[Any, ...]]:
        own = self._own[cpu]
        arrivals = sorted(self._arrivals[cpu], key=lambda each: each.key)
        merged: list[_Item | _Arrival] = sorted(
            [*own, *arrivals], key=lambda each: each.key
        )
        state = self._states(merged)
        rescheds = at = 0
        skip: set[int] = set()
        for number, each in enumerate(merged):
            before, at = at, max(at, each.at_ns)
            if isinstance(each, _Arrival):
                rescheds += each.item.op == Op.RESCHED
                yield self._wait_for(each, merged, number, rescheds)
                continue
            if id(each) in skip:
                continue
            if at > before:
                sleeps = state[number] in (_core.HALTED, HALTPOLL)
                up = at - _UP_NS if sleeps else at
                yield _step(Op.WAIT, at, max(up, 0), state=state[number])
            yield self._act(each, at)
            if each.op == Op.MANY or (each.op == Op.CALL and each.type == _SYNC):
                # Its own part runs while the others do, before it waits.
                for other in merged[number + 1 :]:
                    if isinstance(other, _Arrival):
                        continue
                    if other.op != Op.LOCAL or (
                        (other.function, other.pid) != (each.function, each.pid)
                        or not other.key[0] < each.over_line
                    ):
                        break
                    skip.add(id(other))
                    yield self._act(other, at)
                yield _step(Op.JOIN, at, over=each.over_ns)

    def _wait_for(
        self,
        arrival: _Arrival,
        merged: Sequence[_Item | _Arrival],
        number: int,
        rescheds: int,
    ) -> tuple[Any, ...]:
        """Return the wait for an interrupt: until the next thing is due at most."""
        following = merged[number + 1] if number + 1 < len(merged) else None
        limit = max(
            following.at_ns if following is not None else self._times[-1], arrival.at_ns
        )
        run = limit
        if isinstance(following, _Item):
            run -= min(_UP_SOON_NS, (limit - arrival.at_ns) // 2)
        state = self._as_told(arrival.state)
        item = arrival.item
        if item.op in (Op.RESCHED, Op.RAISE):
            count = rescheds if item.op == Op.RESCHED else 0
            return _step(Op.WAIT, limit, run, arrival.over_ns, count=count, state=state)
        call = self._numbers[id(arrival.call)]
        return _step(Op.WAIT, limit, run, arrival.over_ns, call, state=state)

    def _act(self, item: _Item, at: int) -> tuple[Any, ...]:
        count = len(item.calls) if item.op in (Op.MANY, Op.BATCH) else 0
        return _step(
            item.op, at, call=item.first, count=count, cpu=item.cpu, state=item.type
        )

    def _as_told(self, state: int) -> int:
        if self._idle == "trace" or state == _core.RUNNING:
            return state
        return _STATES[self._idle]

    def _states(self, merged: Sequence[_Item | _Arrival]) -> list[int]:
        """Return what the CPU is in before each: as at the next arrival."""
        found, state = [], _core.RUNNING
        for each in reversed(merged):
            if isinstance(each, _Arrival):
                state = self._as_told(each.state)
            found.append(state)
        return found[::-1]


def _batch(
    members: list[_Item], key: tuple[int, int], ns: int, joined: dict[int, _Item]
) -> _Item:
    """Return what queues these calls at once; ``joined`` says which went into it."""
    first = members[0]
    batch = _Item(key, ns, Op.BATCH, first.cpu, first.type, moved=True)
    batch.calls = [call for member in members for call in member.calls]
    joined.update((id(member), batch) for member in members)
    return batch


def _step(
    op: Op,
    at: int,
    run: int = 0,
    over: int = 0,
    call: int = _NONE,
    count: int = 0,
    cpu: int = 0,
    state: int = 0,
) -> tuple[Any, ...]:
    return at, run, over, call, count, cpu, int(op), state, 0


def _interrupts(traffic: Traffic) -> dict[int, Sent]:
    """Return the IPI of each call that was rung, by the call's identity."""
    found: dict[int, Sent] = {}
    waiting: defaultdict[tuple[int, int], list[Sent]] = defaultdict(list)
    for sent in reversed(traffic.sent):
        if sent.vector in FLUSHES:
            waiting[sent.record.cpu, sent.cpu].append(sent)
    for queued in traffic.queued:
        sents = waiting[queued.record.cpu, queued.cpu]
        if queued.how != "rung":
            continue
        # The next that follows; what came between has no call in the trace.
        while sents and sents[-1].record.line < queued.record.line:
            sents.pop()
        if sents:
            found[id(queued)] = sents.pop()
    return found


def _many(trace: Ftrace) -> dict[int, int]:
    """Return the lines of queueings that one IPI to several was for, by that IPI's."""
    found: dict[int, int] = {}
    waiting: defaultdict[tuple[int, int], list[tuple[Record, str]]] = defaultdict(list)
    for record in trace.records:
        here = record.cpu, record.pid
        if record.event == "csd_queue_cpu":
            function = fields_of(record).get("func", "")
            if waiting[here] and waiting[here][-1][1] != function:
                waiting[here].clear()
            waiting[here].append((record, function))
        elif record.event == "ipi_send_cpumask":
            for queued, _ in waiting.pop(here, []):
                found[queued.line] = record.line
        elif record.event == "ipi_send_cpu":
            waiting.pop(here, None)
    return found


def _waited(trace: Ftrace, traffic: Traffic) -> dict[str, bool]:
    """Return of each function that was queued whether its sender waits for it.

    The trace does not say so. A sender that waits does nothing else before the function
    has ended; where one is seen to, nobody waits.
    """
    by_task: defaultdict[tuple[int, int], list[Record]] = defaultdict(list)
    for record in trace.records:
        if not _interrupted(record):
            by_task[record.cpu, record.pid].append(record)
    lines = {task: [each.line for each in own] for task, own in by_task.items()}
    went_on: Counter[str] = Counter()
    stayed: Counter[str] = Counter()
    for queued in traffic.queued:
        entry = queued.entry
        leave = traffic.exits.get(entry.line) if entry is not None else None
        task = queued.record.cpu, queued.record.pid
        if leave is None or task not in lines:
            continue
        at = bisect_left(lines[task], queued.record.line + 1)
        while at < len(lines[task]):
            record = by_task[task][at]
            if not _of_call(record, queued.function):
                break
            at += 1
        else:
            continue
        if lines[task][at] < leave.line:
            went_on[queued.function] += 1
        else:
            stayed[queued.function] += 1
    return {
        name: name in _WAITED
        or (
            name not in _NOT_WAITED
            and name != TTWU
            and not went_on[name]
            and stayed[name] > 0
        )
        for name in {queued.function for queued in traffic.queued}
    }


def _interrupted(record: Record) -> bool:
    """Is it of an interrupt or a softirq (the third of the flags)?"""
    return len(record.flags) > 2 and record.flags[2] in "hHsSzZ"


def _of_call(record: Record, function: str) -> bool:
    """Is it part of making the same call: others' csds, the IPI, the own part?"""
    if record.event in ("ipi_send_cpu", "ipi_send_cpumask"):
        return True
    if record.event in ("csd_queue_cpu", "csd_function_entry", "csd_function_exit"):
        return fields_of(record).get("func") == function
    return False
