"""A timer of a CPU that sleeps: another one wakes it through the timer's line.

What is clocked is by how much it is late. That is the sleep of the CPU that has the
broadcast, with the kernel's own timer slack, and an interrupt.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from shmipi import _core
from shmipi.bench.user_rows.base import Took, UserRow
from shmipi.machine.arrays import shared
from shmipi.users import tick

if TYPE_CHECKING:
    from shmipi.bench.runner import Rig

_NAME, _FIRED = "bench.users.timer", "bench.users.fired"
_AHEAD_NS = 200_000  # longer than CPU 1 takes to fall asleep
_PATIENCE_NS = 5_000_000_000


def fired(timer: tick.HrTimer) -> None:
    """The timer's function, on CPU 1: when it runs."""
    shared(_FIRED)[0] = time.monotonic_ns()


def late(calls: int, warmup: int, gap_ns: int) -> _core.Hist:
    """Task on CPU 0: start it on CPU 1, see when it has run; how late in ns."""
    took, timer, when = _core.Hist(), tick.hrtimer(_NAME), shared(_FIRED).data
    for number in range(-warmup, calls):
        _core.bench_await(1, _core.HALTED, gap_ns)
        when[0] = 0
        due = time.monotonic_ns() + _AHEAD_NS
        tick.hrtimer_start(timer, due, tick.HRTIMER_MODE_ABS_PINNED, cpu=1)
        while not when[0]:
            if time.monotonic_ns() > due + _PATIENCE_NS:
                raise RuntimeError("a timer has expired and its function does not run")
        if number >= 0:
            took.record(when[0] - due)
    return took


class Timer(UserRow):
    """A timer on CPU 1, which halts."""

    what = "hrtimer of a halted CPU, by how much it is late"
    flavour = "python"
    at_most = None
    share = 0.25

    def __init__(self) -> None:
        self._timers = self._broadcasts = 0

    def prepare(self, rig: Rig) -> None:
        """Make it."""
        self._tick = rig.cluster.users.tick
        rig.cluster.shared(_FIRED, "i8", 1)
        self._tick.hrtimer(_NAME, fired)

    def block(self, rig: Rig, calls: int, warmup: int, gap_ns: int) -> Took:
        """Start it again and again."""
        before = self._tick.stats().cpus[1].broadcast
        few = min(warmup, 5)
        took: _core.Hist = rig.run(0, late, calls, few, gap_ns)
        self._timers += calls + few
        self._broadcasts += self._tick.stats().cpus[1].broadcast - before
        return took

    def extra(self) -> dict[str, Any]:
        """Return how many came through the line, of each."""
        return {"broadcasts_per_timer": self._broadcasts / max(1, self._timers)}


def rows() -> list[UserRow]:
    """Return the row."""
    return [Timer()]
