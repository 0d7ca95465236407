"""A softirq that a call's handler raises: until its action has run."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from shmipi import _core, smp
from shmipi.bench.user_rows.base import Took, UserRow
from shmipi.machine.arrays import shared

if TYPE_CHECKING:
    from shmipi.bench.runner import Rig

_NAME = "bench.users.softirqs"
_STATES = {"polling": _core.POLLING, "halted": _core.HALTED}


def raises(info: object) -> None:
    """The handler."""
    smp.raise_softirq_irqoff(smp.TASKLET_SOFTIRQ)


def action() -> None:
    """The softirq: count."""
    count = shared(_NAME).data
    count[0] = count[0] + 1


def calls_that_raise(state: int, calls: int, warmup: int, gap_ns: int) -> _core.Hist:
    """Task: call, and see that the softirq has run; ns of each."""
    took, clock, count = _core.Hist(), time.perf_counter_ns, shared(_NAME).data
    call = smp.smp_call_function_single
    for number in range(-warmup, calls):
        _core.bench_await(1, state, gap_ns)
        seen = count[0]
        begun = clock()
        call(1, raises, None, False)
        while count[0] == seen:
            pass
        if number >= 0:
            took.record(clock() - begun)
    return took


class Softirq(UserRow):
    """One interrupt, and what it leaves for after it."""

    what = "softirq raised by a call, until it has run"
    flavour = "python"
    at_most = None

    def __init__(self, state: str) -> None:
        self.state = state

    def prepare(self, rig: Rig) -> None:
        """Open it."""
        rig.cluster.shared(_NAME, "i8", 1)
        rig.cluster.smp.open_softirq(smp.TASKLET_SOFTIRQ, action)

    def block(self, rig: Rig, calls: int, warmup: int, gap_ns: int) -> Took:
        """Raise it again and again."""
        took: _core.Hist = rig.run(
            0, calls_that_raise, _STATES[self.state], calls, warmup, gap_ns
        )
        return took


def rows() -> list[UserRow]:
    """Return the rows."""
    return [Softirq("polling"), Softirq("halted")]
