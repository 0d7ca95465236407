"""Half of the CPUs are isolated: what reaches them is theirs, and accounted for.

Timers that are not pinned are started everywhere, and stand in the queues of
housekeeping CPUs. Kicks have causes, which are counted before they are sent; no CPU
takes more than were sent to it. And what each isolated CPU takes has a cause: by cause
its interrupts add up to its counters.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from functools import partial
from random import Random
from typing import TYPE_CHECKING, ClassVar, Final

from shmipi import NativeHandler, smp
from shmipi.errors import CpuOfflineError, ShmipiWarning
from shmipi.stress.users.base import Outcome, UserCheck, Violations, Worker
from shmipi.users import nohz
from shmipi.users.tick import (
    HRTIMER_MODE_PINNED,
    HRTIMER_MODE_REL,
    hrtimer,
    hrtimer_start,
    hrtimer_try_to_cancel,
)

if TYPE_CHECKING:
    from shmipi.cluster import Cluster
    from shmipi.machine.arrays import SharedArray

__all__ = ["Check"]

_KICKS, _UNBOUND, _PINNED, _ASTRAY = range(4)
_NS: Final = 5_000_000
#: Interrupts that stand between their counter and their cause: a line, a timer, a tick
#: and an NMI on top of each other. A death leaves as many behind.
_BETWEEN: Final = 4


class Check(UserCheck):
    """nohz_full: where timers go, and kicks by their causes."""

    name: ClassVar[str] = "nohz"

    def __init__(self, cluster: Cluster, seed: int) -> None:
        super().__init__(cluster, seed)
        self.tally = self.percpu("tally", "i8", 4)
        self.more = 0
        self.before: dict[int, int] = {}
        self.deaths = [0] * cluster.ncpus
        self.unaccounted = 0
        self.kicks: dict[int, tuple[int, int]] = {}
        half = range(max(1, cluster.ncpus // 2), cluster.ncpus)
        cluster.users.nohz.tick_nohz_full_setup(half)
        tick, noop = cluster.users.tick, NativeHandler("noop")
        for cpu in range(cluster.ncpus):
            try:
                tick.hrtimer(_name(cpu), noop)
            except FileExistsError:
                hrtimer_try_to_cancel(tick.hrtimer(_name(cpu)))

    def work(self) -> Worker:
        """Return the worker."""
        return partial(worker, self.tally, self.violations)

    def host(self) -> None:
        """Look whether a CPU has taken more kicks than it was sent."""
        for one in self.cluster.users.nohz.stats():
            sent = sum(one.by_cause.values())
            if one.taken > sent and self.before.get(one.cpu) != one.taken:
                # Taken is read first: what is sent meanwhile makes it no more.
                self.before[one.cpu] = one.taken
                self.more += 1
                self.violations.report(
                    f"isolated CPU {one.cpu} took {one.taken} kicks, and {sent} have"
                    " a cause: something that is not its own interrupts it"
                )

            self._add_up(one.cpu)

    def _add_up(self, cpu: int) -> None:
        """Compare interrupts by cause with the counters, of one moment or another."""
        before, causes, after = self.cluster._machine.interrupt_causes(cpu)
        known, late = sum(causes), _BETWEEN * (1 + self.deaths[cpu])
        if before - late <= known <= after:
            return
        self.unaccounted += 1
        self.violations.report(
            f"isolated CPU {cpu}: {before} to {after} interrupts came, and {known} have"
            " a cause: they do not add up to its counters"
        )

    def died(self, cpu: int) -> None:
        """Expect what it has taken, and had no time to say for what."""
        self.deaths[cpu] += 1

    def finish(self) -> None:
        """Leave no CPU isolated."""
        self.host()
        stats = self.cluster.users.nohz.stats()
        self.kicks = {one.cpu: (one.taken, sum(one.by_cause.values())) for one in stats}
        self.interrupts = sum(one.counted for one in stats)
        self.cluster.users.nohz.tick_nohz_full_setup("")

    def outcome(self) -> Outcome:
        """Return what was sent and taken."""
        sums = [int(n) for n in self.tally.sum(axis=0)]
        return Outcome(
            {
                "kicks": sums[_KICKS],
                "taken": sum(taken for taken, _ in self.kicks.values()),
                "interrupts": self.interrupts,
                "unbound_timers": sums[_UNBOUND],
                "pinned_timers": sums[_PINNED],
            },
            {
                "without_cause": self.more,
                "unaccounted": self.unaccounted,
                "astray": sums[_ASTRAY],
            },
        )


def _name(cpu: int) -> str:
    return f"stress.nohz.{cpu}"


def worker(
    tally: SharedArray, violations: Violations, cpu: int, seed: int
) -> Iterator[None]:
    """Start timers, kick isolated CPUs for causes that come and go."""
    random = Random(seed)
    timer = hrtimer(_name(cpu))
    ncpus = len(tally)
    isolated, astray = nohz.tick_nohz_full_cpu(cpu), 0
    while True:
        try:
            if random.randrange(4):
                kept = isolated and _house_is_kept(cpu)
                hrtimer_start(timer, random.randrange(_NS), HRTIMER_MODE_REL)
                where = timer.cpu
                tally[cpu, _UNBOUND] += 1
                kept = kept and where == cpu and _house_is_kept(cpu)
                astray = astray + 1 if kept else 0
                # Once it may be that those who keep house were offline just then.
                if astray > 2:
                    astray = 0
                    tally[cpu, _ASTRAY] += 1
                    violations.report(
                        f"timer {timer.name} is not pinned, and stands in the queue of"
                        f" isolated CPU {cpu}, though others keep house"
                    )
            else:
                mode = HRTIMER_MODE_REL | HRTIMER_MODE_PINNED
                hrtimer_start(timer, random.randrange(_NS), mode)
                tally[cpu, _PINNED] += 1
        except CpuOfflineError:
            pass  # the housekeeping CPU that it was to go to
        yield
        hrtimer_try_to_cancel(timer)
        target, bit = random.randrange(ncpus), random.randrange(6)
        with contextlib.suppress(ShmipiWarning):  # it has just gone offline
            nohz.tick_nohz_dep_set_cpu(target, bit)
            tally[cpu, _KICKS] += 1
        yield
        nohz.tick_nohz_dep_clear_cpu(target, bit)
        if not random.randrange(8):
            with contextlib.suppress(ShmipiWarning):
                nohz.tick_nohz_full_kick_all()
        yield


def _house_is_kept(cpu: int) -> bool:
    """Is a CPU online, for sure, that is not isolated?"""
    keeps = [n for n in nohz.housekeeping_cpumask() if n in smp.cpu_online_mask]
    return bool(keeps) and cpu not in keeps
