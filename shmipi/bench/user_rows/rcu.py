"""Grace periods: waited for with interrupts, and callbacks after them.

A CPU that computes is interrupted; those that sleep do not read and are looked at only.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from shmipi import _core, smp
from shmipi.bench.user_rows.base import Took, UserRow
from shmipi.users import rcu

if TYPE_CHECKING:
    from shmipi.bench.runner import Rig

_BATCH = 200  # callbacks; 256 of a CPU may wait


def expedited(state: int, calls: int, warmup: int, gap_ns: int) -> _core.Hist:
    """Task: wait for a grace period; ns of each."""
    took, clock = _core.Hist(), time.perf_counter_ns
    for number in range(-warmup, calls):
        _core.bench_await(1, state, gap_ns)
        begun = clock()
        rcu.synchronize_rcu_expedited()
        if number >= 0:
            took.record(clock() - begun)
    return took


def callbacks(batches: int) -> list[float]:
    """Task: have callbacks called, until all have been; ns of each, by batch."""
    took, noop = [], smp.NativeHandler("noop")
    for _ in range(batches):
        begun = time.perf_counter_ns()
        for _ in range(_BATCH):
            rcu.call_rcu(noop)
        rcu.rcu_barrier()
        took.append((time.perf_counter_ns() - begun) / _BATCH)
    return took


class Expedited(UserRow):
    """synchronize_rcu_expedited()."""

    raw = "broadcast"
    share = 0.25

    def __init__(self, state: str, ncpus: int) -> None:
        self.state, self.ncpus = state, ncpus
        self.what = "synchronize_rcu_expedited"

    def prepare(self, rig: Rig) -> None:
        """Make what it keeps."""
        assert rig.cluster.users.rcu

    def block(self, rig: Rig, calls: int, warmup: int, gap_ns: int) -> Took:
        """Wait again and again."""
        state = _core.RUNNING if self.state == "running" else _core.HALTED
        took: _core.Hist = rig.run(0, expedited, state, calls, min(warmup, 20), gap_ns)
        return took


class Callbacks(UserRow):
    """call_rcu()."""

    what = "call_rcu, until the callback has run"
    raw = "nowait"
    at_most = None
    rate = True

    def prepare(self, rig: Rig) -> None:
        """Make what it keeps."""
        assert rig.cluster.users.rcu

    def block(self, rig: Rig, calls: int, warmup: int, gap_ns: int) -> Took:
        """Call it."""
        took: list[float] = rig.run(0, callbacks, max(1, calls // _BATCH))
        return took


def rows() -> list[UserRow]:
    """Return the rows."""
    return [
        Expedited("running", 2),
        Expedited("halted", 2),
        Expedited("halted", 64),
        Callbacks(),
    ]
