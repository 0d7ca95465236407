"""cpumap under stress: in = delivered + dropped + died, whatever is replaced or killed.

In one map, each CPU sends bursts to its neighbour, whom nobody else tells, and waits
until they have arrived: a wake-up that is lost is seen. In another all send to all
while the host replaces and deletes entries, and in a third to programs, which pass,
drop, abort, or redirect into a fourth; now and then everybody rests, and what was
handed in has to be accounted for.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from functools import partial
from random import Random
from typing import TYPE_CHECKING, Any, ClassVar, Final

from shmipi import _core
from shmipi.errors import NoTaskError, SteeringError
from shmipi.smp import smp_processor_id
from shmipi.stress.users.base import Outcome, UserCheck, Violations, Worker
from shmipi.users.cpumap import (
    XDP_ABORTED,
    XDP_DROP,
    XDP_PASS,
    CpuMap,
    bpf_redirect_map,
    cpu_map,
)
from shmipi.users.scheduler import TASK_INTERRUPTIBLE

if TYPE_CHECKING:
    from shmipi.cluster import Cluster

__all__ = ["Check"]

_PAIR_FLOW: Final = 1024
_FLOOD_FLOW: Final = 2048
_PROGRAM_FLOW: Final = 3072
_LOST_S: Final = 1.0
_TURN_S: Final = 0.001
_LOAD_S: Final = 0.25
_REST_S: Final = 0.04
_RUNS: Final = 0x30  # of a task's word: on a run queue, in a step


def _there(machine: _core.Machine, cpu: int) -> tuple[int, bool]:
    slot = machine.slot(cpu)
    return slot.generation, slot.state not in (_core.OFFLINE, _core.CPU_DEAD)


def _sleeps(machine: _core.Machine, task: int | None) -> bool:
    """Does it sleep, and has nobody woken it?"""
    try:
        state, flags = (0, 0) if task is None else machine.sched_task(task)[1:3]
    except NoTaskError:  # it died with its CPU
        return False
    return state == TASK_INTERRUPTIBLE and not flags & _RUNS


def program(flow: int, data: int) -> int:
    """Give every verdict; what it redirects goes to the CPU that runs it."""
    verdict = data % 4
    if verdict == 3:
        sink = cpu_map("stress.sink")
        return bpf_redirect_map(sink, smp_processor_id(), XDP_DROP)
    return (XDP_ABORTED, XDP_DROP, XDP_PASS)[verdict]


def worker(
    tally: Any,
    rest: Any,
    pairs: CpuMap,
    flood: CpuMap,
    programs: CpuMap,
    violations: Violations,
    cpu: int,
    seed: int,
) -> Iterator[None]:
    """Send bursts to the neighbour, and floods to anybody."""
    random = Random(seed)
    machine = _core.current_machine()
    peer = (cpu + 1) % len(tally)
    flow = _PAIR_FLOW + cpu % 1024
    while True:
        before = _there(machine, peer)
        sent, arrived, _, _ = machine.net_flow(flow)
        late = sent - arrived  # those that died on the way, ever
        gone = pairs.stats.dropped + pairs.stats.died
        turn = time.monotonic() + _TURN_S
        end = 0.0
        while True:
            sent, arrived, _, _ = machine.net_flow(flow)
            if sent - arrived <= late:
                if time.monotonic() > turn:
                    break
                # The next burst comes as the thread is about to sleep.
                tally[cpu, 0] += pairs.generate(peer, flow, 64 * random.randint(1, 6))
                continue
            if time.monotonic() < turn:
                continue
            now = time.monotonic()
            # Many CPUs on few cores: it may be long until its turn comes.
            end = end or now + _LOST_S + 0.2 * max(0, len(tally) - 4)
            if now > end:
                asleep = _sleeps(machine, pairs.kthread(peer))
                missing = machine.net_flow(flow)[1] == arrived  # after it slept
                stats = pairs.stats
                same = before == _there(machine, peer) and before[1]
                if same and gone == stats.dropped + stats.died:
                    if not (asleep and missing):  # it waits for its turn, or its core
                        yield
                        continue
                    violations.report(
                        f"CPU {cpu} has put {sent - arrived - late} packets into the"
                        f" ring of CPU {peer} and woken its thread, which sleeps:"
                        f" the wake-up fell between its look and its sleep"
                    )
                break
            yield
        if not rest[0]:
            turn = time.monotonic() + _TURN_S
            while (now := time.monotonic()) < turn:
                key = int(now / _TURN_S) % len(tally)  # all to one at a time
                tally[cpu, 1] += flood.generate(key, _FLOOD_FLOW + cpu % 1024, 64)
            key = random.randrange(len(tally))
            tally[cpu, 2] += programs.generate(key, _PROGRAM_FLOW + cpu % 1024, 16)
        yield


def _owed(map: CpuMap) -> int:
    stats = map.stats
    return stats.in_ - stats.delivered - stats.dropped - stats.died - stats.queued


class Check(UserCheck):
    """Bursts and floods, replaced entries, and rests in which all is counted."""

    name: ClassVar[str] = "cpumap"

    def __init__(self, cluster: Cluster, seed: int) -> None:
        super().__init__(cluster, seed)
        self.tally = self.percpu("tally", "i8", 3)
        self.rest = self.shared("rest", "i8", 1)
        self.random = Random(seed)
        create = cluster.users.cpumap.create
        self.pairs, self.flood = create("stress.pairs"), create("stress.flood")
        self.programs, self.sink = create("stress.programs"), create("stress.sink")
        for cpu in range(cluster.ncpus):
            self.pairs.update_elem(cpu, 1024)
            self.flood.update_elem(cpu, 192)
            self.programs.update_elem(cpu, 64, prog=program)
            self.sink.update_elem(cpu, 64)
        #: Those that are accounted for, and how many of each were nowhere before.
        self.begun = {map: _owed(map) for map in (self.flood, self.programs, self.sink)}
        self.changed = time.monotonic()
        self.seen: list[tuple[int, ...]] | None = None
        self.corrupt = self._corrupt()
        self.deaths = 0
        self.replaced = 0

    def _corrupt(self) -> int:
        return int(self.cluster.counters()["corrupt"].sum())

    def work(self) -> Worker:
        """Return the worker of every CPU."""
        return partial(
            worker,
            self.tally,
            self.rest,
            self.pairs,
            self.flood,
            self.programs,
            self.violations,
        )

    def host(self) -> None:
        """Replace entries; now and then let all rest, and count."""
        now = time.monotonic()
        if not self.rest[0]:
            key = self.random.randrange(self.cluster.ncpus)
            self._replace(key)
            if now - self.changed > _LOAD_S:
                self.rest[0], self.changed, self.seen = 1, now, None
                self._look_for_damage()
            return
        if now - self.changed < _REST_S:
            return
        # Of a damaged ring the thread never rests.
        stats = [tuple(map.stats)[:5] for map in self.begun]
        if stats != self.seen:  # somebody is not at rest yet
            self.seen, self.changed = stats, now
            return
        self._count()
        self.rest[0], self.changed = 0, now

    def _replace(self, key: int) -> None:
        size = self.random.choice((24, 64, 192))
        try:
            match self.random.randrange(10):
                case 0 | 1:
                    self.flood.delete_elem(key)
                case 2:
                    self.programs.update_elem(key, size, prog=program)
                case 3:
                    self.sink.update_elem(key, size)
                case _:
                    self.flood.update_elem(key, size)
        except SteeringError:
            for map in self.begun:
                map.collect()  # too many end at once
        self.replaced += 1

    def _look_for_damage(self) -> None:
        grown = self._corrupt() - self.corrupt
        if grown:
            self.corrupt += grown
            self.violations.report(
                "cpumap: the entry that is next in a ring has another's number: two"
                " producers have filled the ring at the same time, and one of them has"
                " counted what the other has overwritten"
            )

    def _count(self) -> None:
        for map, before in self.begun.items():
            if owed := _owed(map) - before:
                self.violations.report(
                    f"cpumap: of {map.stats.in_} packets handed in {abs(owed)} are"
                    f" {'nowhere' if owed > 0 else 'there twice'}: neither delivered,"
                    " dropped nor queued"
                )
                self.begun[map] += owed

    def died(self, cpu: int) -> None:
        """Count: what it had in hand is accounted as died."""
        self.deaths += 1

    def finish(self) -> None:
        """Wait until the rings are empty."""
        self.rest[0] = 1
        end = time.monotonic() + (0.2 if self.violations.count else 10)
        maps = (self.pairs, *self.begun)
        while sum(map.stats.queued for map in maps):
            if time.monotonic() > end:
                if not self.violations.count:
                    self.violations.report("cpumap: rings are not emptied")
                break
            for map in maps:
                map.collect()
            time.sleep(0.01)
        self._count()
        for cpu in range(self.cluster.ncpus):
            for map in maps:
                map.delete_elem(cpu)

    def outcome(self) -> Outcome:
        """Return the account."""
        stats = [map.stats for map in (self.pairs, *self.begun)]
        programs = self.programs.stats
        return Outcome(
            {
                "packets": int(self.tally.sum()),
                "replaced": self.replaced,
                "wakes": sum(of.wakes for of in stats),
            },
            {
                "in": sum(of.in_ for of in stats),
                "delivered": sum(of.delivered for of in stats),
                "dropped": sum(of.dropped for of in stats),
                "died": sum(of.died for of in stats),
                "redirected": programs.xdp_redirect,
                "aborted": programs.xdp_aborted,
            },
        )
