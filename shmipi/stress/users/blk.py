"""Block completion under stress: each request completes once, on its CPU.

Every CPU submits, and takes the device's interrupts for the requests of others.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from functools import partial
from random import Random
from typing import TYPE_CHECKING, Any, ClassVar, Final

from shmipi.stress.users.base import (
    LOOKED_NS,
    Outcome,
    UserCheck,
    Violations,
    Worker,
)
from shmipi.users import blk

if TYPE_CHECKING:
    from shmipi.cluster import Cluster

__all__ = ["Check"]

_STUCK_S: Final = 1.0
_LOOKS: Final = 16  # CPUs at a time


def worker(tally: Any, violations: Violations, cpu: int, seed: int) -> Iterator[None]:
    """Submit, take interrupts, end what is done."""
    random = Random(seed)
    while True:
        tally[cpu, 0] += blk.generate(random.randint(1, 4))
        yield


class Check(UserCheck):
    """Requests of every CPU, completed by all."""

    name: ClassVar[str] = "blk"

    def __init__(self, cluster: Cluster, seed: int) -> None:
        super().__init__(cluster, seed)
        self.tally = self.percpu("tally", "i8", 1)
        self.blk = cluster.users.blk
        self.blk.set()
        self.seen: dict[int, tuple[int, float, int]] = {}
        self.wrong = {cpu: self._wrong(cpu) for cpu in range(cluster.ncpus)}
        self.next = 0

    def _wrong(self, cpu: int) -> tuple[int, int]:
        stats = self.blk.stats(cpu)
        return stats.wrong, stats.doubles

    def work(self) -> Worker:
        """Return the worker of every CPU."""
        return partial(worker, self.tally, self.violations)

    def host(self) -> None:
        """Look at some CPUs' counts."""
        for _ in range(min(_LOOKS, self.cluster.ncpus)):
            self.next = (self.next + 1) % self.cluster.ncpus
            self._look(self.next)

    def _look(self, cpu: int) -> None:
        stats = self.blk.stats(cpu)
        wrong, doubles = (
            b - a for a, b in zip(self.wrong[cpu], self._wrong(cpu), strict=True)
        )
        if wrong or doubles:
            self.violations.report(
                f"blk: CPU {cpu} has completed {wrong} requests of others, whose CPUs"
                f" were online; {doubles} of its own have completed twice"
            )
            self.wrong[cpu] = self._wrong(cpu)
        now = time.monotonic()
        if stats.waiting < blk.DEPTH // 2:
            self.seen.pop(cpu, None)
            return
        state, ran = self.core_time(cpu)
        before, since, had = self.seen.get(cpu, (-1, now, 0))
        if stats.submitted != before or state in "Tt":
            self.seen[cpu] = stats.submitted, now, ran
        elif state == "R" and ran - had < LOOKED_NS:
            pass  # it waits for its core: others have it
        elif now - since > _STUCK_S and cpu in self.cluster.online_mask:
            self.violations.report(
                f"blk: {stats.waiting} requests of CPU {cpu} wait on its list for"
                f" {now - since:.1f} s: it was not sent the IPI that it is told by"
            )
            self.seen[cpu] = stats.submitted, now, ran

    def finish(self) -> None:
        """Complete what is in flight."""
        end = time.monotonic() + (0.2 if self.violations.count else 10)
        while time.monotonic() < end:
            self.cluster.run(_settle)
            stats = self.blk.stats()
            if not stats.in_flight + stats.waiting:
                break
            time.sleep(0.005)
        else:
            stats = self.blk.stats()
            if not self.violations.count:
                self.violations.report(
                    f"blk: {stats.in_flight} requests are in flight and"
                    f" {stats.waiting} on lists, and do not complete"
                )
        for cpu in range(self.cluster.ncpus):
            self._look(cpu)

    def outcome(self) -> Outcome:
        """Return the account."""
        stats = self.blk.stats()
        return Outcome(
            {"requests": int(self.tally.sum()), "ipis": stats.ipis},
            {
                "submitted": stats.submitted,
                "completed": stats.completed,
                "reported": stats.reported,
                "wrong": stats.wrong,
                "doubles": stats.doubles,
            },
        )


def _settle() -> None:
    while blk.interrupt() + len(blk.end()):
        pass
