"""Softirqs and irq_work on every CPU: in their time, one at a time, none lost.

Handlers that other CPUs send raise softirqs on top of tasks, and of softirqs, which
take a while. Each worker holds softirqs off, raises one, and lets them in; and it
queues its irq_work on another CPU again and again, also while it runs there: what was
written before the last time must have been seen by it in the end.
"""

from __future__ import annotations

import os
import time
import warnings
from collections.abc import Iterator
from functools import partial
from random import Random
from typing import TYPE_CHECKING, ClassVar, Final

from shmipi import atomic, smp
from shmipi.errors import CpuDiedError, CpuOfflineError, ShmipiWarning
from shmipi.stress.users.base import Outcome, UserCheck, Violations, Worker

if TYPE_CHECKING:
    from shmipi.cluster import Cluster
    from shmipi.machine.arrays import SharedArray

__all__ = ["Check"]

_DEPTH, _HI, _TASKLET, _QUEUED, _SEEN, _WORKS, _PID = range(7)
_TURNS: Final = 20  # bytecode boundaries within a softirq
_LOST_S: Final = 1.0
_BURST: Final = 3


class Check(UserCheck):
    """Softirqs: never nested, run by the last enable; irq_work: once more if queued."""

    name: ClassVar[str] = "softirq"

    def __init__(self, cluster: Cluster, seed: int) -> None:
        super().__init__(cluster, seed)
        self.tally = self.percpu("tally", "i8", 7)
        for nr, counter in ((smp.HI_SOFTIRQ, _HI), (smp.TASKLET_SOFTIRQ, _TASKLET)):
            action = partial(run, self.tally, self.violations, nr, counter)
            cluster.smp.open_softirq(nr, action)

    def work(self) -> Worker:
        """Return the worker."""
        return partial(worker, self.tally, self.violations)

    def outcome(self) -> Outcome:
        """Return what has run."""
        total = [int(n) for n in self.tally.sum(axis=0)]
        return Outcome(
            {"hi": total[_HI], "tasklet": total[_TASKLET], "irq_works": total[_WORKS]},
            {
                "in_softirq": sum(
                    int(row[_DEPTH])
                    for row, cpu in zip(self.tally, self.cluster.cpus, strict=True)
                    if row[_PID] == cpu.pid
                )
            },
        )


def run(tally: SharedArray, violations: Violations, nr: int, counter: int) -> None:
    """Act as a softirq that takes a while."""
    cpu = smp.smp_processor_id()
    if tally[cpu, _PID] != os.getpid():  # one that was killed does not end its softirq
        tally[cpu, _PID], tally[cpu, _DEPTH] = os.getpid(), 0
    tally[cpu, _DEPTH] += 1
    if tally[cpu, _DEPTH] != 1:
        violations.report(
            f"softirq {nr} runs on CPU {cpu} on top of another: what an interrupt in"
            " its midst has raised did not wait for its end"
        )
    for _ in range(_TURNS):
        smp.in_softirq()
    tally[cpu, counter] += 1
    tally[cpu, _DEPTH] -= 1


def raise_hi(info: None) -> None:
    """Handler: leave the rest to a softirq."""
    smp.raise_softirq(smp.HI_SOFTIRQ)


def catch_up(tally: SharedArray, owner: int) -> None:
    """Do the irq_work of ``owner``: see what it has written before it queued this."""
    seen = atomic.load(tally, (owner, _QUEUED))
    for _ in range(_TURNS):
        smp.in_hardirq()
    atomic.store(tally, (owner, _SEEN), seen)
    tally[owner, _WORKS] += 1


def worker(
    tally: SharedArray, violations: Violations, cpu: int, seed: int
) -> Iterator[None]:
    """Raise, queue, and look what has become of it."""
    random = Random(seed)
    ncpus = len(tally)
    work = smp.irq_work(partial(catch_up, tally), cpu)
    atomic.store(tally, (cpu, _SEEN), atomic.load(tally, (cpu, _QUEUED)))
    waits, queued_at = -1, 0.0  # the CPU on which the work is to catch up
    while True:
        before = int(tally[cpu, _TASKLET])
        smp.local_bh_disable()
        smp.raise_softirq(smp.TASKLET_SOFTIRQ)
        smp.local_bh_enable()
        if tally[cpu, _TASKLET] == before:
            violations.report(
                f"softirq {smp.TASKLET_SOFTIRQ}, raised on CPU {cpu} with softirqs"
                " disabled, has not run when local_bh_enable() returned"
            )
        other = random.randrange(ncpus)
        try:
            if other != cpu:
                smp.smp_call_function_single(other, raise_hi, None, False)
            if waits < 0 and other != cpu:
                waits, queued_at = other, time.monotonic()
                if not _queue(tally, work, cpu, other, random):
                    waits = -1
        except (CpuOfflineError, CpuDiedError):
            waits = -1
        yield
        if waits < 0:
            continue
        if _caught_up(tally, cpu) or not smp.cpu_online(waits) or _is_dead(work):
            waits = -1
        elif (
            time.monotonic() > queued_at + _LOST_S
            and not work.busy
            and not _caught_up(tally, cpu)  # since it is not busy any more
        ):
            violations.report(
                f"the irq_work that CPU {cpu} has queued on CPU {waits} has not seen"
                " what was written before: it was taken for pending when its function"
                " had begun"
            )
            waits = -1


def _caught_up(tally: SharedArray, cpu: int) -> bool:
    seen = atomic.load(tally, (cpu, _SEEN))
    return seen == atomic.load(tally, (cpu, _QUEUED))


def _queue(
    tally: SharedArray, work: smp.irq_work, cpu: int, other: int, random: Random
) -> bool:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ShmipiWarning)  # it has just gone offline
        for _ in range(_BURST):
            atomic.fetch_add(tally, (cpu, _QUEUED), 1)
            if not smp.irq_work_queue_on(work, other) and not work.busy:
                return False
            for _ in range(random.randrange(_TURNS)):
                smp.in_task()
    return True


def _is_dead(work: smp.irq_work) -> bool:
    if work.busy:
        return False
    try:
        smp.irq_work_sync(work)
    except CpuDiedError:
        return True
    return False
