"""stop_machine of a no-op over few and many CPUs, beside five broadcasts."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from shmipi import _core, smp
from shmipi.bench.user_rows.base import Took, UserRow

if TYPE_CHECKING:
    from shmipi.bench.runner import Rig


def stops(calls: int, warmup: int, gap_ns: int) -> _core.Hist:
    """Task: stop the machine ``calls`` times, when CPU 1 has halted; ns of each."""
    took, clock = _core.Hist(), time.perf_counter_ns
    noop = smp.NativeHandler("noop")
    for number in range(-warmup, calls):
        _core.bench_await(1, _core.HALTED, gap_ns)
        start = clock()
        smp.stop_machine(noop, timeout=None)
        if number >= 0:
            took.record(clock() - start)
    return took


class StopMachine(UserRow):
    """Four states, each acknowledged by all: five broadcasts would do as much."""

    what = "stop_machine"
    flavour = "native"
    state = "halted"
    raw = "broadcast"
    raw_times = 5.0
    at_most = 2.0

    def __init__(self, ncpus: int, share: float) -> None:
        self.ncpus, self.share = ncpus, share

    def block(self, rig: Rig, calls: int, warmup: int, gap_ns: int) -> Took:
        """Do it."""
        took: _core.Hist = rig.run(0, stops, calls, warmup, gap_ns)
        return took


def rows() -> list[UserRow]:
    """Return them; CPUs that share a core park while they are stopped."""
    return [StopMachine(2, 1.0), StopMachine(64, 0.2), StopMachine(512, 0.05)]
