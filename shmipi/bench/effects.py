"""How large the effects are, here and now, of what ``shmipi doctor`` finds."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import Any, Final

from shmipi import _core
from shmipi.bench import tasks
from shmipi.bench.runner import Rig, Seen, Steps, Watch, choose_cores, median, middle
from shmipi.errors import CommandError
from shmipi.machine import topology
from shmipi.report.cells import span

__all__ = ["measure"]

_CALLS: Final = 200
_WATCH_NS: Final = 400_000_000
#: A pause of a task that does nothing but look at the clock, longer than which it was
#: interrupted.
_HICCUP_NS: Final = 5_000
_WORK_NS: Final = 500_000


def measure(progress: Callable[..., None] | None = None) -> dict[str, str]:
    """Return the effect of findings by their names, in words; takes some seconds.

    What cannot be measured here is missing. Raises what a boot raises.
    """
    found = {
        "mitigations": f"a system call takes {span(_system_call())}",
        "timer slack": f"a sleep of 100 us ends {span(_oversleep())} late",
    }
    try:
        cores = choose_cores("auto")
    except CommandError:  # one core only
        return found
    steps = Steps(progress, 6)
    seen = Seen()
    with Rig(cores) as rig, Watch(cores, seen):
        steps("clocks")
        found["clocksource"] = f"a stamp takes {span(rig.timer_ns)} ({rig.clock})"
        steps("calls")
        polling = _call(rig, "poll", _core.POLLING, 0, _CALLS * 5)
        halted = _call(rig, "halt", _core.HALTED, 30_000, _CALLS)
        found["virtualisation"] = (
            f"to call a halted CPU takes {span(halted)}, one that polls"
            f" {span(polling)}: {halted / max(1.0, polling):.0f} times"
        )
        steps("sleep")
        soon = _call(rig, "halt", _core.HALTED, 10_000, 50)
        late = _call(rig, "halt", _core.HALTED, 20_000_000, 15)
        found["idle states"] = (
            f"to wake a core that has slept 10 us takes {span(soon)}, 20 ms"
            f" {span(late)}: {late / max(1.0, soon):.1f} times"
        )
        steps("hiccups")
        longest, lost, number = rig.run(1, hiccups, _WATCH_NS)
        a_second = number * 1e9 / _WATCH_NS
        hiccup = (
            "a task that only looks at the clock was interrupted"
            f" {a_second:.0f} times a second, {lost / _WATCH_NS:.2%} of its time, for"
            f" {span(longest)} at most"
        )
        found["load"] = found["isolated cores"] = hiccup
        steps("frequency")
        first, steady = rig.run(1, speeds)
        slower = f"after 100 ms of sleep work goes at {first / steady:.0%} of its speed"
        found["governor"] = found["turbo"] = slower
        if _siblings(cores):
            steps("threads of one core")
            alone, both = _shared_core(rig)
            found["SMT"] = (
                "with the other thread of the core busy work goes at"
                f" {both / alone:.0%} of its speed"
            )
    found["steal"] = (
        f"{seen.stolen_s * 1000:.0f} ms of {seen.seconds:.1f} s were taken meanwhile"
    )
    held = f"held back in {seen.throttled} periods in {seen.seconds:.1f} s of measuring"
    found["cgroup quota"] = found["throttling"] = held
    return found


def _system_call() -> float:
    call, clock = os.getppid, time.perf_counter_ns
    best = []
    for _ in range(5):
        start = clock()
        for _ in range(1000):
            call()
        best.append((clock() - start) / 1000)
    return min(best)


def _oversleep() -> float:
    late = []
    for _ in range(20):
        start = time.perf_counter_ns()
        time.sleep(1e-4)
        late.append(time.perf_counter_ns() - start - 100_000)
    return median(late)


def _call(rig: Rig, idle: str, state: int, gap_ns: int, calls: int) -> float:
    rig.idle(1, idle)
    try:
        how = {"warmup": min(20, calls), "gap_ns": gap_ns, "state": state}
        return middle(rig.run(0, tasks.timed, 1, calls, how)["rtt"])
    finally:
        rig.idle(1, "halt")


def hiccups(ns: int) -> tuple[int, int, int]:
    """Task: look at the clock for so long: the longest pause, their sum and number."""
    clock = _core.stamp
    last = clock()
    end = last + ns
    longest = lost = number = 0
    while last < end:
        now = clock()
        pause = now - last
        if pause > _HICCUP_NS:
            longest, lost, number = max(longest, pause), lost + pause, number + 1
        last = now
    return longest, lost, number


def speeds() -> tuple[float, float]:
    """Task: units of work in the first moments after a sleep, and a while later."""
    first, steady = [], []
    for _ in range(3):
        time.sleep(0.1)
        first.append(_core.bench_work(_WORK_NS))
        for _ in range(50):
            _core.bench_work(_WORK_NS)
        steady.append(median([_core.bench_work(_WORK_NS) for _ in range(9)]))
    return median(first), max(1.0, median(steady))


def _siblings(cores: tuple[int, int]) -> bool:
    first, second = topology.read_cores(cores)
    return second.number in first.siblings


def _shared_core(rig: Rig) -> tuple[float, float]:
    work: tuple[Any, ...] = (tasks.work, 20_000_000, 1_000_000, False)
    alone, _ = rig.run(1, *work)
    other = rig.start(0, *work)
    both, _ = rig.run(1, *work)
    other.result()
    return max(1.0, alone), both
