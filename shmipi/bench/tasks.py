"""What runs on the CPUs of a machine that is measured: tasks and handlers.

Each is found by name on the CPU, so none of them holds state but this module's: the
shared arrays that ``prepare`` looks up. Times are integers in ns.
"""

from __future__ import annotations

import gc
import itertools
import os
import time
from collections.abc import Callable
from typing import Any

from shmipi import _core, atomic, irq, smp
from shmipi.errors import CpuOfflineError
from shmipi.machine.arrays import SharedArray, shared

__all__ = [
    "broadcasts",
    "busy",
    "fake_target",
    "flood_native",
    "flood_python",
    "irq_sends",
    "limit_ping",
    "limit_pong",
    "local",
    "native_calls",
    "native_raises",
    "noop",
    "pace",
    "pipe_ping",
    "pipe_pong",
    "prepare",
    "prepare_irqs",
    "python_batches",
    "python_calls",
    "python_one_way",
    "rounds",
    "settle",
    "stamp_entry",
    "storm",
    "take_call",
    "take_irq",
    "timed",
    "timed_fake",
    "work",
]

#: Names of the shared arrays of a rig.
AREA, STAMPS, FLAGS = "bench.area", "bench.stamps", "bench.flags"
#: Of a machine for irqs: interrupts and calls that handlers have counted.
TAKEN, CALLED = "bench.taken", "bench.called"
#: Where the collections of the CPUs' garbage are counted: in FLAGS.
COLLECTIONS = 7
#: Where senders meet.
MET = 1
_PATIENCE = 2_000  # times so many looks at a count, each some 50 ns:
_LOOKS = 50_000  # then, is the CPU there that should count?

_stamps: SharedArray
_flags: SharedArray
_taken: SharedArray
_called: SharedArray


def prepare() -> tuple[float, str]:
    """Make this CPU ready to be measured: what a stamp costs in ns, and by which clock.

    Its garbage collector is off from now on: a collection is no interrupt's latency.
    """
    global _stamps, _flags
    _stamps, _flags = shared(STAMPS), shared(FLAGS)
    gc.collect()
    gc.disable()
    gc.callbacks.append(_collects)
    return _core.timer_cost_ns(), _core.clock_source()


def _collects(phase: str, info: dict[str, int]) -> None:
    """Count a collection all the same: what a task does may begin one."""
    if phase == "start":
        atomic.fetch_add(_flags, COLLECTIONS, 1)


def settle() -> int:
    """Do nothing as a task; return the core that it ran on."""
    return sorted(os.sched_getaffinity(0))[0]


# --- handlers


def noop(info: object) -> None:
    """Do nothing: what a latency row measures is the interrupt."""


def stamp_entry(index: int) -> None:
    """Say when the handler was entered."""
    now = _core.stamp()
    _stamps[index] = now


# --- the raw limits


def limit_ping(
    kind: str, session: int, calls: int, options: dict[str, Any]
) -> tuple[_core.Hist, _core.Hist, list[float], int, int]:
    """Be the sender of a raw limit."""
    return _core.limit_ping(shared(AREA), kind, session, calls, **options)


def limit_pong(kind: str, session: int, calls: int, options: dict[str, Any]) -> None:
    """Be its target."""
    _core.limit_pong(shared(AREA), kind, session, calls, **options)


# --- waiting calls


def native_calls(
    cpu: int, calls: int, options: dict[str, Any]
) -> tuple[_core.Hist, _core.Hist, list[float], int, int, bool]:
    """Call a native handler of ``cpu`` from a native loop."""
    return _core.bench_calls(cpu, calls, **options)


def timed(cpu: int, calls: int, options: dict[str, Any]) -> dict[str, Any]:
    """Call a native handler of ``cpu``, each call clocked."""
    return _core.bench_timed(cpu, calls, **options)


def timed_fake(cpu: int, calls: int, options: dict[str, Any]) -> dict[str, Any]:
    """As ``timed``, of a fake target: what runs there is ``fake_target``."""
    return _core.bench_timed(cpu, calls, fake=shared(AREA), **options)


def fake_target(calls: int, delay_ns: int) -> _core.Hist:
    """Answer so many times, each after so long; ns for which it really waited."""
    return _core.bench_fake(shared(AREA), calls, delay_ns)


def local(calls: int, itself: bool) -> _core.Hist:
    """Call a native no-op as a function, or as a CPU calls itself."""
    return _core.bench_local(calls, itself)


def storm(
    cpus: list[int], seconds: float, many: bool, wait: bool, callers: int
) -> tuple[_core.Hist, int, int]:
    """Call others for so long, when all ``callers`` are there."""
    _meet(MET, callers)
    return _core.bench_storm(cpus, seconds, many, wait)


def rounds(calls: int, callers: int) -> tuple[_core.Hist, int, int]:
    """Broadcast so many times, when all callers are there: round trips, from, to."""
    cpus = [cpu for cpu in smp.cpu_online_mask if cpu != smp.smp_processor_id()]
    flags = shared(FLAGS)  # this CPU may not be prepared
    atomic.fetch_add(flags, MET, 1)
    while atomic.load(flags, MET) < callers:
        time.sleep(0.00005)
    begun = _core.stamp()
    took, _, _ = _core.bench_storm(cpus, 60.0, True, True, calls)
    return took, begun, _core.stamp()


def work(ns: int, chunk_ns: int, point: bool) -> tuple[int, int]:
    """Work for so long: units done, ns that it waited for its core meanwhile.

    A Python handler can run after each chunk. With ``point`` each chunk ends at a
    schedule point, for what does not kick.
    """
    clock, units = _core.stamp, 0
    before = _core.thread_waited()
    end = clock() + ns
    while (left := end - clock()) > 0:
        units += _core.bench_work(min(left, chunk_ns))
        if point:
            smp.cond_resched()
    return units, _core.thread_waited() - before


def pace(cpu: int, handler: str, period_ns: int, ns: int) -> int:
    """Send calls that nobody waits for on a schedule: how many."""
    func: Any = _core.NativeHandler("noop") if handler == "native" else noop
    call, clock = smp.smp_call_function_single, _core.stamp
    begun = clock()
    sent = 0
    while (now := clock() - begun) < ns:
        if now >= sent * period_ns:
            call(cpu, func, None, False)
            sent += 1
    return sent


def native_raises(
    array: str, cpu: int, calls: int, options: dict[str, Any]
) -> tuple[_core.Hist, _core.Hist, list[float], int, int, bool]:
    """Raise a line of the chip at ``cpu``, whose handler counts in a shared array."""
    return _core.bench_calls(cpu, calls, count=shared(array), **options)


def python_calls(
    cpu: int,
    calls: int,
    warmup: int,
    gap_ns: int,
    state: int,
    spin_ns: int | None,
    period_ns: int = 0,
    break_ns: int = 0,
) -> tuple[_core.Hist, int, _core.Hist, tuple[int, int, int, int] | None]:
    """Call a Python handler from Python: round trips; how often ``cpu`` was late.

    With a period, call k is due k of them after the first, and the third is from when
    each was due; the fourth says which call took longer than ``break_ns``, the last.
    """
    call, pause, clock = (
        smp.smp_call_function_single,
        _core.bench_await,
        time.perf_counter_ns,
    )
    rtt, scheduled = _core.Hist(), _core.Hist()
    record = rtt.record
    missed = 0
    broke = None
    longest = break_ns or 1 << 62
    _core.bench_spin(spin_ns)
    try:
        for _ in range(warmup):
            pause(cpu, state, gap_ns)
            call(cpu, noop)
        begun = clock()
        for number in range(calls):
            if period_ns:
                due = begun + number * period_ns
                while clock() < due:
                    pass
            else:
                missed += pause(cpu, state, gap_ns) > 0
            start = clock()
            call(cpu, noop)
            took = clock() - start
            record(took)
            if period_ns:
                scheduled.record(start + took - due)
            if took > longest:
                broke = (number, start, 0, start + took)
                break
    finally:
        _core.bench_spin(None)
    return rtt, missed, scheduled, broke


def python_one_way(
    cpu: int, calls: int, warmup: int, gap_ns: int, state: int, spin_ns: int | None
) -> tuple[_core.Hist, tuple[int, int] | None]:
    """Time from before a call in Python to the entry of its Python handler.

    The second is by how much the target's clock is ahead: at least, at most.
    """
    call, pause, clock = smp.smp_call_function_single, _core.bench_await, _core.stamp
    there = _core.Hist()
    forth = back = 1 << 62
    _core.bench_spin(spin_ns)
    try:
        for _ in range(warmup):
            pause(cpu, state, gap_ns)
            call(cpu, stamp_entry, 0)
        for _ in range(calls):
            pause(cpu, state, gap_ns)
            start = clock()
            call(cpu, stamp_entry, 0)
            end = clock()
            entered = int(_stamps[0])
            there.record(max(0, entered - start))
            forth, back = min(forth, entered - start), min(back, end - entered)
    finally:
        _core.bench_spin(None)
    return there, (-back, forth) if calls else None


def python_batches(
    cpu: int, batches: int, batch: int, warmup: int, state: int
) -> list[float]:
    """Call a Python handler without a clock inside: ns per call of each batch."""
    call, clock = smp.smp_call_function_single, time.perf_counter_ns
    found = []
    _core.bench_await(cpu, state, 0)
    for _ in range(warmup):
        call(cpu, noop)
    for _ in range(batches):
        _core.bench_await(cpu, state, 0)
        start = clock()
        for _ in itertools.repeat(None, batch):
            call(cpu, noop)
        found.append((clock() - start) / batch)
    return found


def broadcasts(flavour: str, calls: int, gap_ns: int, state: int) -> list[float]:
    """Call a no-op on all other CPUs, ``calls`` times: ns of each."""
    warmup = 3
    if flavour == "native":
        found, *_ = _core.bench_broadcast(
            calls, warmup=warmup, gap_ns=gap_ns, state=state, deadline=300.0
        )
        return found
    call, pause, clock = smp.smp_call_function, _core.bench_await, time.perf_counter_ns
    took = []
    for _ in range(warmup + calls):
        pause(1, state, gap_ns)
        start = clock()
        call(noop)
        took.append(float(clock() - start))
    return took[warmup:]


# --- what a target does meanwhile


def busy(flag: int) -> None:
    """Run Python bytecode until ``flag`` is set."""
    flags = _flags
    while not flags[flag]:
        for _ in range(200):
            pass


# --- multiprocessing.Pipe, for comparison


def pipe_pong(address: str, calls: int) -> None:
    """Answer on a connection of the kind that ``multiprocessing.Pipe()`` returns."""
    from multiprocessing.connection import Listener

    with (
        Listener(address, family="AF_UNIX") as listener,
        listener.accept() as connection,
    ):
        for _ in range(calls):
            connection.send_bytes(connection.recv_bytes())


def pipe_ping(address: str, calls: int, warmup: int) -> _core.Hist:
    """Send one byte there and back: round trips."""
    from multiprocessing.connection import Client

    clock = time.perf_counter_ns
    rtt = _core.Hist()
    deadline = time.monotonic() + 10
    while True:
        try:
            connection = Client(address, family="AF_UNIX")
            break
        except (ConnectionRefusedError, FileNotFoundError):
            if time.monotonic() > deadline:
                raise
            time.sleep(0.001)
    with connection:
        for number in range(-warmup, calls):
            start = clock()
            connection.send_bytes(b"x")
            connection.recv_bytes()
            if number >= 0:
                rtt.record(clock() - start)
    return rtt


# --- calls nobody waits for


def _meet(flag: int, senders: int) -> None:
    """Wait until all senders are here. They may share a core: no spinning for long."""
    atomic.fetch_add(_flags, flag, 1)
    while atomic.load(_flags, flag) < senders:
        time.sleep(0.0001)


def flood_native(
    cpu: int, calls: int, until: int, flag: int, senders: int
) -> tuple[int, int]:
    """Send native calls that nobody waits for; return when all senders' have run."""
    _meet(flag, senders)
    return _core.bench_flood(cpu, calls, until)


def flood_python(
    cpu: int, calls: int, until: int, flag: int, senders: int
) -> tuple[int, int]:
    """Send Python calls that nobody waits for; return when all senders' have run."""
    call: Callable[..., None] = smp.smp_call_function_single
    counter = _core.COUNTERS.index("python_run")
    _meet(flag, senders)
    start = _core.stamp()
    for _ in itertools.repeat(None, calls):
        call(cpu, noop, None, False)
    _core.bench_until(cpu, counter, until)
    # All have been entered. This one is served when the last of them has returned.
    call(cpu, noop)
    return start, _core.stamp()


# --- IPIs of a domain


def prepare_irqs() -> None:
    """Look the counts up that the handlers of irqs and calls keep."""
    global _taken, _called
    _taken, _called = shared(TAKEN), shared(CALLED)


def take_irq(virq: int, taken: SharedArray) -> None:
    """Count an interrupt: its sender waits for that."""
    atomic.fetch_add(taken, 0, 1)


def take_call(info: object) -> None:
    """Count a call."""
    atomic.fetch_add(_called, 0, 1)


def _counted(counts: SharedArray, before: int, cpu: int) -> None:
    load = atomic.load
    for _ in range(_PATIENCE):
        for _ in range(_LOOKS):
            if load(counts, 0) != before:
                return
        if not smp.cpu_online(cpu):
            raise CpuOfflineError(f"CPU {cpu} went offline or died", cpu=cpu)
    raise RuntimeError("an interrupt was sent, and its handler does not run")


def irq_sends(
    cpu: int,
    virq: int,
    handler: str,
    calls: int,
    warmup: int,
    gap_ns: int,
    state: int,
) -> tuple[_core.Hist, _core.Hist, _core.Hist, int]:
    """Send an IPI, and make a call that nobody waits for, in turns.

    Returns what the sends took, the calls, the ways to the irq's handler and back, and
    how often ``cpu`` was not in ``state`` in time.
    """
    pause, clock, load = _core.bench_await, time.perf_counter_ns, atomic.load
    sends, nowaits, rtts = _core.Hist(), _core.Hist(), _core.Hist()
    missed = 0
    func: Any = _core.NativeHandler("count") if handler == "native" else take_call
    info = _called if handler == "native" else None

    def send(counts: bool) -> int:
        late = pause(cpu, state, gap_ns) > 0
        before = load(_taken, 0)
        start = clock()
        irq.ipi_send_single(virq, cpu)
        sent = clock()
        _counted(_taken, before, cpu)
        if counts:
            rtts.record(clock() - start)
            sends.record(sent - start)
        return late

    def call(counts: bool) -> int:
        late = pause(cpu, state, gap_ns) > 0
        before = load(_called, 0)
        start = clock()
        smp.smp_call_function_single(cpu, func, info, False)
        sent = clock()
        _counted(_called, before, cpu)
        if counts:
            nowaits.record(sent - start)
        return late

    for number in range(-warmup, calls):
        first, second = (send, call) if number % 2 else (call, send)
        late = first(number >= 0) + second(number >= 0)
        missed += late if number >= 0 else 0
    return sends, nowaits, rtts, missed
