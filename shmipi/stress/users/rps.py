"""RPS and RFS under stress: flows stay in order, and in = delivered + dropped + died.

Each CPU hands in packets of flows of its own; their readers move from CPU to CPU, so
RFS moves the flows. Now and then everybody rests: then no backlog may hold anything.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from functools import partial
from random import Random
from typing import TYPE_CHECKING, Any, ClassVar, Final

from shmipi import _core
from shmipi.stress.users.base import (
    Outcome,
    UserCheck,
    Violations,
    Worker,
    had_no_core,
)

if TYPE_CHECKING:
    from shmipi.cluster import Cluster

__all__ = ["Check"]

_FLOWS: Final = 2  # of each CPU
_LOAD_S: Final = 0.2
_STUCK_S: Final = 1.0
_GOLDEN_RATIO_32: Final = 0x61C88647
_LOOKS: Final = 64  # flows at a time


def _hash(cpu: int, number: int) -> int:
    """Return the hash of a flow: an entry of its own in both flow tables.

    Its low bits are its place in the first; in the second it is hash_32()'s. Flows that
    share an entry there may come out of order, as in the kernel.
    """
    flow = cpu * _FLOWS + number + 1
    high = ((flow << 20) + (1 << 19) - flow * _GOLDEN_RATIO_32) % (1 << 32) >> 12
    return high * pow(_GOLDEN_RATIO_32, -1, 1 << 20) % (1 << 20) << 12 | flow


def worker(
    tally: Any, rest: Any, violations: Violations, cpu: int, seed: int
) -> Iterator[None]:
    """Hand in packets, in polls of random length."""
    random = Random(seed)
    machine = _core.current_machine()
    while True:
        if not rest[0]:
            for number in range(_FLOWS):
                hash, count = _hash(cpu, number), random.randint(1, 100)
                receive = random.randrange(2)
                tally[cpu, 0] += machine.rps_generate(hash, 1, count, receive)
                if random.random() < 0.3:
                    machine.rps_record(hash, random.randrange(len(tally)))
        yield


class Check(UserCheck):
    """Flows whose readers move."""

    name: ClassVar[str] = "rps"

    def __init__(self, cluster: Cluster, seed: int) -> None:
        super().__init__(cluster, seed)
        self.tally = self.percpu("tally", "i8", 1)
        self.rest = self.shared("rest", "i8", 1)
        self.random = Random(seed)
        self.rps = cluster.users.rps
        self.rps.set_map(range(cluster.ncpus))
        self.rps.set_sock_flow_entries(4096)
        self.rps.set_flow_cnt(4096)
        self.rps.set_max_backlog(300)
        self.wrong = {flow: self._wrong(flow) for flow in self._flows()}
        self.begun = self._owed()
        self.changed = time.monotonic()
        self.stuck: float | None = None
        self.seen: tuple[int, ...] | None = None
        self.had: list[tuple[str, int]] = []
        self.next = 0

    def _flows(self) -> list[int]:
        cpus = range(self.cluster.ncpus)
        return [_hash(cpu, number) for cpu in cpus for number in range(_FLOWS)]

    def _wrong(self, flow: int) -> tuple[int, int]:
        counted = self.rps.flow(flow)
        return counted.disorder, counted.doubles

    def _owed(self) -> int:
        stats = self.rps.stats()
        return stats.in_ - stats.delivered - stats.dropped - stats.died - stats.queued

    def work(self) -> Worker:
        """Return the worker of every CPU."""
        return partial(worker, self.tally, self.rest, self.violations)

    def host(self) -> None:
        """Look at flows; now and then let all rest, and look at backlogs."""
        flows = list(self.wrong)
        for _ in range(min(_LOOKS, len(flows))):
            self.next = (self.next + 1) % len(flows)
            self._look(flows[self.next])
        now = time.monotonic()
        if not self.rest[0]:
            if now - self.changed > _LOAD_S:
                self.rest[0], self.changed = 1, now
                self.stuck = self.seen = None
            return
        stats = self.rps.stats()
        if tuple(stats) != self.seen:  # not at rest yet
            self.seen, self.stuck = tuple(stats), now
            self.had = []
            return
        if stats.queued and not self.had:
            self.had = self.core_times()
        if stats.queued and now - (self.stuck or now) < _STUCK_S:
            return
        if stats.queued and len(self.cluster.online_mask) == self.cluster.ncpus:
            # Who had no core is not to blame, nor who may wait for such a one.
            if any(map(had_no_core, self.had, self.core_times())):
                self.seen = None
                return
            self._report_stuck()
        self._count()
        self.rest[0], self.changed = 0, now

    def _report_stuck(self) -> None:
        held = {
            cpu: stats.queued
            for cpu in range(self.cluster.ncpus)
            if (stats := self.rps.stats(cpu)).queued
        }
        self.violations.report(
            f"rps: backlogs (by CPU) of {held} packets, and nobody empties them: the"
            " CPU was not told, or NAPI_STATE_SCHED says that it was"
        )

    def _look(self, flow: int) -> None:
        wrong = self._wrong(flow)
        disorder, doubles = (
            b - a for a, b in zip(self.wrong[flow], wrong, strict=True)
        )
        if disorder or doubles:
            self.violations.report(
                f"rps: of flow {flow:#x} {disorder} packets were delivered behind later"
                f" ones, {doubles} twice: it had moved to another CPU while its packets"
                " were in the old one's backlog"
            )
            self.wrong[flow] = wrong

    def _count(self) -> None:
        owed = self._owed() - self.begun
        if owed:
            self.violations.report(
                f"rps: {abs(owed)} packets are"
                f" {'nowhere' if owed > 0 else 'there twice'}: neither delivered,"
                " dropped nor queued"
            )
            self.begun += owed

    def finish(self) -> None:
        """Wait until the backlogs are empty."""
        self.rest[0] = 1
        end = time.monotonic() + (0.2 if self.violations.count else 10)
        while self.rps.stats().queued and time.monotonic() < end:
            time.sleep(0.01)
        if self.rps.stats().queued and not self.violations.count:
            self._report_stuck()
        self._count()
        for flow in self.wrong:
            self._look(flow)
        self.rps.set_map([])
        self.rps.set_sock_flow_entries(0)
        self.rps.set_flow_cnt(0)
        self.rps.set_max_backlog(1000)

    def outcome(self) -> Outcome:
        """Return the account."""
        stats = self.rps.stats()
        return Outcome(
            {"packets": int(self.tally.sum()), "ipis": stats.ipis},
            {
                "in": stats.in_,
                "delivered": stats.delivered,
                "dropped": stats.dropped,
                "died": stats.died,
                "requeued": stats.requeued,
            },
        )
