"""Timers on every CPU, most of which sleep: none is early, none is lost.

Each CPU starts its timers over and over, short ones and long ones, and sleeps. What
fires looks at the clock. From the host: a CPU that sleeps with its own timer stopped
must have the broadcast device set for it, or be about to wake up.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from random import Random
from typing import TYPE_CHECKING, ClassVar, Final

from shmipi import atomic, smp
from shmipi.stress.users.base import Outcome, UserCheck, Violations, Worker
from shmipi.users.tick import (
    HRTIMER_MODE_ABS,
    HrTimer,
    hrtimer,
    hrtimer_start,
    hrtimer_try_to_cancel,
    ktime_get,
)

if TYPE_CHECKING:
    from shmipi.cluster import Cluster
    from shmipi.machine.arrays import SharedArray

__all__ = ["Check"]

_TIMERS: Final = 2
_STARTED, _FIRED, _EARLY, _LATE_US = range(4)
_LONG: Final = 16  # of so many turns one sleeps for long
_LOST_NS: Final = 1_500_000_000
_LOST_LOOKS: Final = 50


class Check(UserCheck):
    """Timers: ``hrtimer_start`` everywhere, the broadcast, and sleeping CPUs."""

    name: ClassVar[str] = "tick"

    def __init__(self, cluster: Cluster, seed: int) -> None:
        super().__init__(cluster, seed)
        self.tally = self.percpu("tally", "i8", (_TIMERS, 4))
        self.unset = 0
        tick = cluster.users.tick
        for cpu in range(cluster.ncpus):
            for number in range(_TIMERS):
                function = partial(fired, self.tally, self.violations, cpu, number)
                try:
                    tick.hrtimer(_name(cpu, number), function)
                except FileExistsError:
                    hrtimer_try_to_cancel(tick.hrtimer(_name(cpu, number)))

    def work(self) -> Worker:
        """Return the worker."""
        return partial(worker, self.tally, self.violations)

    def host(self) -> None:
        """Look whether a CPU sleeps that nobody will wake in time."""
        cpu = self.cluster._machine.tick_check()
        if cpu >= 0:
            self.unset += 1
            bound = self.cluster.users.tick.stats().bound_on
            self.violations.report(
                f"CPU {cpu} sleeps with its timer stopped, and the broadcast device,"
                f" bound to CPU {bound}, is not set for it: its timers fire when"
                " something else wakes it"
            )

    def outcome(self) -> Outcome:
        """Return what was started and fired."""
        started, fires, early, _ = (int(n) for n in self.tally.sum(axis=(0, 1)))
        stats = self.cluster.users.tick.stats()
        return Outcome(
            {
                "started": started,
                "fired": fires,
                "broadcasts": sum(cpu.sent for cpu in stats.cpus),
                "handovers": stats.handovers,
                "moved": stats.moved,
                "latest_us": int(self.tally[:, :, _LATE_US].max()),
            },
            {"early": early, "unset": self.unset},
        )


def _name(cpu: int, number: int) -> str:
    return f"stress.tick.{cpu}.{number}"


def fired(
    tally: SharedArray, violations: Violations, cpu: int, number: int, timer: HrTimer
) -> None:
    """Handler: the timer has expired, on whatever CPU it stood in the queue of."""
    now, due = ktime_get(), timer.due
    if now < due:
        tally[cpu, number, _EARLY] += 1
        violations.report(
            f"timer {timer.name} fired on CPU {smp.smp_processor_id()}"
            f" {due - now} ns before its expiry"
        )
    late = (now - due) // 1000
    tally[cpu, number, _LATE_US] = max(tally[cpu, number, _LATE_US], late)
    atomic.fetch_add(tally, (cpu, number, _FIRED), 1)


def worker(
    tally: SharedArray, violations: Violations, cpu: int, seed: int
) -> Iterator[None]:
    """Start timers, sleep, and see that they have fired."""
    random = Random(seed)
    timers = [hrtimer(_name(cpu, number)) for number in range(_TIMERS)]
    due = [0] * _TIMERS  # 0: it has fired
    before = [0] * _TIMERS
    looks = [0] * _TIMERS
    for timer in timers:
        hrtimer_try_to_cancel(timer)
    while True:
        for number, timer in enumerate(timers):
            fires, now = timer.fired, ktime_get()
            if due[number] and fires != before[number]:
                due[number] = looks[number] = 0
            if not due[number]:
                spread = 4_000_000 if number == 0 else 150_000_000
                before[number] = fires
                due[number] = now + random.randrange(spread)
                hrtimer_start(timer, due[number], HRTIMER_MODE_ABS)
                tally[cpu, number, _STARTED] += 1
            elif now > due[number]:
                looks[number] += 1
                if looks[number] > _LOST_LOOKS and now > due[number] + _LOST_NS:
                    violations.report(
                        f"timer {timer.name} is lost: {timer!r}, on CPU {timer.cpu},"
                        f" should have fired {(now - due[number]) / 1e9:.1f} s ago"
                    )
                    due[number] = looks[number] = 0
        yield
        if not random.randrange(_LONG):
            # With the long one alone, so that the CPU sleeps on when others wake up.
            if due[0]:
                hrtimer_try_to_cancel(timers[0])
                due[0] = 0
            smp.wait_for_interrupt(0.025)
        else:
            smp.wait_for_interrupt(random.random() * 0.004)
        yield
