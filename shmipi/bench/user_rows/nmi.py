"""NMI backtraces: each CPU that is asked writes its Python stack.

Who asks looks each millisecond whether all have answered, as the kernel does: of few
CPUs that is what it takes.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from shmipi import _core
from shmipi.bench.user_rows.base import Took, UserRow
from shmipi.users import backtrace

if TYPE_CHECKING:
    from shmipi.bench.runner import Rig


def traces(ncpus: int, state: int, calls: int, warmup: int, gap_ns: int) -> _core.Hist:
    """Task: ask all the others; ns of each time."""
    took, clock = _core.Hist(), time.perf_counter_ns
    for number in range(-warmup, calls):
        _core.bench_await(1, state, gap_ns)
        begun = clock()
        texts = backtrace.backtraces(range(1, ncpus))
        if number >= 0:
            took.record(clock() - begun)
        if texts is None or len(texts) != ncpus - 1:
            raise RuntimeError(f"{ncpus - 1} CPUs were asked where they are: {texts}")
    return took


class Backtrace(UserRow):
    """nmi_trigger_cpumask_backtrace() but for the printing."""

    flavour = "python"
    at_most = None
    share = 0.05

    def __init__(self, ncpus: int) -> None:
        self.ncpus = ncpus
        self.state = "running" if ncpus == 2 else "halted"
        self.raw = "single" if ncpus == 2 else "broadcast"
        self.what = f"nmi_trigger_cpumask_backtrace of {ncpus - 1}, all answers"

    def prepare(self, rig: Rig) -> None:
        """Make what they write to."""
        assert rig.cluster.users.backtrace.backtraces([0])

    def block(self, rig: Rig, calls: int, warmup: int, gap_ns: int) -> Took:
        """Ask again and again."""
        state = _core.RUNNING if self.state == "running" else _core.HALTED
        took: _core.Hist = rig.run(
            0, traces, self.ncpus, state, calls, min(warmup, 2), gap_ns
        )
        return took


def rows() -> list[UserRow]:
    """Return the rows."""
    return [Backtrace(2), Backtrace(64)]
