"""What a replay found, beside what the kernel's trace says: ``shmipi.replay/1``.

``play`` is the task that each CPU runs, ``on`` runs it on a machine, and ``measured``
reads what was stamped. Nothing
of what it reports is taken from the trace.
"""

from __future__ import annotations

import ctypes
import gc
import os
import resource
from collections import Counter, defaultdict, deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from shmipi import _core
from shmipi.errors import CpuDiedError, CpusFailedError
from shmipi.machine.arrays import SharedArray, shared
from shmipi.trace.matching import distribution, quantile
from shmipi.trace.script import CALL, ENTRY, STEP, How, Op, Script

__all__ = [
    "CALLS",
    "CONTROL",
    "ENTRIES",
    "ON_TIME_US",
    "PACES",
    "STEPS",
    "Played",
    "Ran",
    "late",
    "measured",
    "on",
    "play",
    "victims",
]

#: Names of the shared arrays.
STEPS: Final = "replay.steps"
CALLS: Final = "replay.calls"
ENTRIES: Final = "replay.entries"
CONTROL: Final = "replay.control"
#: How time passes, by its number in the core.
PACES: Final = ("timed", "causal", "asap")
#: A send that is later is not on time.
ON_TIME_US: Final = 10.0

_USES: Final = {
    _core.USE_RESCHEDULE: "reschedule",
    _core.USE_CALL: "call_function",
    _core.USE_CALL_SINGLE: "call_function_single",
}
_PR_SET_TIMERSLACK: Final = 29
_PRIORITY: Final = 1
#: From the stamp of a send until it is pending, and from its acknowledge to its entry.
_ACK_NS: Final = 1_000
#: Causal: an interrupt that has not come by then does not come.
_PATIENCE_NS: Final = 20_000_000
_QUEUED: Final = frozenset((Op.CALL, Op.MANY, Op.BATCH))
_SENT: Final = {Op.MANY: "call_function", Op.RESCHED: "reschedule"}
#: Of ``struct shi_replay_control``: of all, then of each CPU.
_ALL: Final = 256
_OF_CPU: Final = np.dtype(
    {
        "names": ["nentries", "missed", "lost_ns", "step"],
        "formats": ["u4", "u4", "u8", "u8"],
        "offsets": [0, 4, 8, 16],
        "itemsize": 128,
    }
)
_START: Final = 128


class Ran(NamedTuple):
    """How a CPU's script ran."""

    #: Why it had no real-time priority; "": it had.
    why: str
    #: Seconds of its core that it had, waiting awake included.
    busy_s: float
    #: How often another was let run in its place.
    preempted: int


def play(
    bounds: Sequence[tuple[int, int]],
    room: int,
    pace: int,
    resched_ns: int,
    patience_ns: int,
    fifo: bool,
) -> Ran:
    """Task: run the script of this CPU.

    ``bounds`` are where each CPU's steps begin and end, ``room`` the entries of each.
    """
    cpu = _core.smp_processor_id()
    first, last = bounds[cpu]
    steps, calls, entries, control = map(shared, (STEPS, CALLS, ENTRIES, CONTROL))
    mine = entries[cpu * room * ENTRY.itemsize : (cpu + 1) * room * ENTRY.itemsize]
    # A page that is touched for the first time takes longer than an interrupt.
    for array in (steps, calls, mine, control):
        array.sum()
    mine[:] = 0
    # Before: awake and first on its core, it would keep from coming whoever needs that.
    _core.replay_meet(control)
    gc.disable()
    why = _be_first() if fifo else "not asked for"
    before = resource.getrusage(resource.RUSAGE_THREAD)
    try:
        _core.replay(
            steps[first:last], calls, mine, control, pace, resched_ns, patience_ns
        )
    finally:
        if not why:
            os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))
        gc.enable()
    after = resource.getrusage(resource.RUSAGE_THREAD)
    return Ran(
        why,
        after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime,
        after.ru_nivcsw - before.ru_nivcsw,
    )


def _be_first() -> str:
    """Ask for SCHED_FIFO, and for timers without slack: "" if it was given."""
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_TIMERSLACK, 1, 0, 0, 0)
    try:
        os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(_PRIORITY))
    except OSError as error:
        return str(error.strerror)
    return ""


@dataclass
class Played:
    """The arrays of a replay, copied when it was over."""

    calls: NDArray[Any]
    entries: list[NDArray[Any]]
    #: Interrupts that the log had no room for.
    unlogged: int
    #: By CPU: waits that no interrupt ended, and ns that interrupts took from it.
    missed: list[int]
    lost_ns: list[int]
    start_ns: int

    @classmethod
    def of(
        cls, calls: SharedArray, entries: SharedArray, control: SharedArray, room: int
    ) -> Played:
        """Copy them."""
        raw = bytes(control)
        cpus = np.frombuffer(raw, _OF_CPU, offset=_ALL)
        logged = np.frombuffer(bytes(entries), ENTRY).reshape(len(cpus), room)
        taken = [int(count) for count in cpus["nentries"]]
        return cls(
            np.frombuffer(bytes(calls), CALL).copy(),
            [
                log[: min(room, count)].copy()
                for log, count in zip(logged, taken, strict=True)
            ],
            sum(max(0, count - room) for count in taken),
            [int(count) for count in cpus["missed"]],
            [int(ns) for ns in cpus["lost_ns"]],
            int(np.frombuffer(raw, "u8", 1, _START)[0]),
        )


def on(
    cluster: Any,
    script: Script,
    *,
    pace: str = "timed",
    fifo: bool = True,
    timeout: float | None = None,
) -> tuple[Played, list[Ran]]:
    """Play a script on a ``Cluster`` of as many CPUs that does nothing else.

    Returns what was stamped, and how each CPU's script ran. Raises what ``Cluster.run``
    raises; ``CpuDiedError`` when a CPU was killed: the others give up then.
    """
    room = 2 * max(script.expected, default=0) + 1024
    bounds, size = [], 0
    for own in script.steps:
        bounds.append((size, size + own.nbytes))
        size += own.nbytes
    steps = cluster.shared(STEPS, "u1", max(size, STEP.itemsize))
    for (first, last), own in zip(bounds, script.steps, strict=True):
        steps[first:last] = np.frombuffer(own.tobytes(), "u1")
    calls = cluster.shared(CALLS, "u1", script.calls.nbytes)
    calls[:] = np.frombuffer(script.calls.tobytes(), "u1")
    entries = cluster.shared(ENTRIES, "u1", room * ENTRY.itemsize * script.ncpus)
    control = cluster.shared(CONTROL, "u1", _core.replay_control_bytes(script.ncpus))
    control[:] = 0
    cores = [cpu.core for cpu in cluster.cpus]
    # Of two on one core the first would keep the other from running at all.
    shared = len(set(cores)) < len(cores)
    try:
        ran = cluster.run(
            play,
            bounds,
            room,
            PACES.index(pace),
            script.resched_ns,
            _PATIENCE_NS,
            fifo and not shared,
            timeout=timeout,
        )
    except CpusFailedError as errors:
        # The others gave up because of it.
        for error in errors.exceptions:
            if isinstance(error, CpuDiedError):
                raise error from None
        raise
    if shared and fifo:
        ran = [own._replace(why="CPUs share cores") for own in ran]
    return Played.of(calls, entries, control, room), ran


def measured(script: Script, played: Played, single: str) -> dict[str, Any]:
    """Return what the replay's own stamps say, in the matcher's words.

    ``single`` is the vector of a call to one CPU: not every controller has one of its
    own. As in the kernel's trace, what an idle CPU runs outside an interrupt is
    ``unseen``, and no part of ``queue_to_function_us``.
    """
    calls, ops = played.calls, script.ops
    queued = [number for number, op in enumerate(ops) if op in _QUEUED]
    how = Counter(How(int(calls[number]["how"])) for number in queued)
    ran = [number for number in queued if calls[number]["left"]]
    seen = [number for number in ran if not calls[number]["unseen"]]
    deferred = [
        number
        for number, op in enumerate(ops)
        if op == Op.LOCAL and script.moved[number] and calls[number]["left"]
    ]
    local = sum(
        op == Op.LOCAL and bool(calls[number]["left"]) for number, op in enumerate(ops)
    ) - len(deferred)
    found: dict[str, Any] = {
        "queued": len(queued) - how[How.UNSENT],
        "rung": how[How.RUNG],
        "coalesced": how[How.COALESCED],
        "elided": how[How.ELIDED],
        "run": len(seen),
        "unseen": len(queued) - how[How.UNSENT] - len(seen),
        "entries_local": local,
        "queue_to_function_us": distribution(
            _waited(script, played, number) for number in seen
        ),
        "unseen_us": distribution(
            _waited(script, played, number) for number in ran if number not in set(seen)
        ),
        "function_run_us": distribution(_ran(calls, ran)),
        "ipi": _vectors(script, played, single),
    }
    if deferred:
        found["deferred"] = len(deferred)
        found["deferred_us"] = distribution(
            _waited(script, played, number) for number in deferred
        )
    return found


def late(played: Played, script: Script) -> dict[str, Any]:
    """Return ``late_us`` and ``on_time`` of what was sent; None of each without a due.

    Sends are not early: their CPUs wait.
    """
    values = sorted(
        max(0, _mono(int(call["queued"])) - int(call["due"]))
        for call, op in zip(played.calls, script.ops, strict=False)
        if op != Op.LOCAL and call["queued"] and call["due"]
    )
    if not values:
        return {"late_us": {"p50": None, "p99": None, "max": None}, "on_time": None}
    return {
        "late_us": {
            "p50": quantile(values, 50) / 1000,
            "p99": quantile(values, 99) / 1000,
            "max": values[-1] / 1000,
        },
        "on_time": sum(ns <= ON_TIME_US * 1000 for ns in values) / len(values),
    }


def _mono(stamp: int) -> int:
    return _core.stamp_to_mono(stamp)


def _waited(script: Script, played: Played, number: int) -> int:
    """Return how long a call waited: from when it was to be queued, if it was held."""
    call = played.calls[number]
    entered = _mono(int(call["entered"]))
    if script.moved[number]:
        return entered - played.start_ns - script.wanted[number]
    return entered - _mono(int(call["queued"]))


def _ran(calls: NDArray[Any], ran: Sequence[int]) -> list[int]:
    """Return how long functions ran, a list of wake-ups as the one run that it is."""
    runs = {
        (int(call["cpu"]), int(call["entered"])): int(call["left"])
        for call in calls[list(ran)]
    }
    return [_mono(left) - _mono(entered) for (_, entered), left in runs.items()]


def _vectors(script: Script, played: Played, single: str) -> dict[str, Any]:
    """Match the interrupts: of one CPU and vector first in, first out.

    One that is sent while another is pending is one with that: it has no entry.
    """
    events: list[tuple[int, int, int, str]] = []  # stamp, entered?, CPU, vector
    for call, op in zip(played.calls, script.ops, strict=False):
        if op != Op.LOCAL and call["how"] == How.RUNG:
            vector = _SENT.get(op, single)
            events.append((int(call["queued"]), 0, int(call["cpu"]), vector))
    for cpu, log in enumerate(played.entries):
        events += [
            (int(entry["entered"]), 1, cpu, _USES.get(int(entry["use"]), "other"))
            for entry in log
        ]
    sent: Counter[str] = Counter()
    entered: Counter[str] = Counter()
    unexplained: Counter[str] = Counter()
    took: defaultdict[str, list[int]] = defaultdict(list)
    waiting: defaultdict[tuple[int, str], deque[int]] = defaultdict(deque)
    merged: defaultdict[tuple[int, str], deque[int]] = defaultdict(deque)
    for stamp, is_entry, cpu, vector in sorted(events):
        under_way, passed = waiting[cpu, vector], merged[cpu, vector]
        if not is_entry:
            sent[vector] += 1
            under_way.append(stamp)
            continue
        entered[vector] += 1
        if under_way:
            took[vector].append(_mono(stamp) - _mono(under_way.popleft()))
        elif passed:  # its sender was held up between the stamp and the send
            took[vector].append(_mono(stamp) - _mono(passed.pop()))
        else:
            unexplained[vector] += 1
        # What was pending when this was acknowledged is one with it.
        while under_way and _mono(stamp) - _mono(under_way[0]) > _ACK_NS:
            passed.append(under_way.popleft())
    return {
        vector: {
            "sent": sent[vector],
            "entered": entered[vector],
            "entries_without_send": unexplained[vector],
            "send_to_entry_us": distribution(took[vector]),
        }
        for vector in sorted({*sent, *entered})
    }


def victims(played: Played) -> dict[str, float]:
    """Return what interrupts took: of running CPUs all, signals and returns included.

    ``handlers_us`` is what their handlers took, on whatever CPU.
    """
    handlers = sum(
        _mono(int(entry["left"])) - _mono(int(entry["entered"]))
        for log in played.entries
        for entry in log
    )
    return {
        "victim_us": sum(played.lost_ns) / 1000,
        "handlers_us": handlers / 1000,
    }
