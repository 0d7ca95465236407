"""Data that only stop_machine changes, read without a lock by everything else.

A pair of numbers is made unequal and equal again by a function that runs with all CPUs
stopped. Tasks look at it with preemption disabled, and handlers: neither ever sees it
half done, and none of the changes is lost.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from functools import partial
from random import Random
from typing import TYPE_CHECKING, Any, ClassVar, Final

from shmipi import atomic, smp
from shmipi._core import CallSingleData
from shmipi.errors import (
    CpuDiedError,
    CpuOfflineError,
    CsdBusyError,
    IpiTimeoutError,
    RemoteCallError,
    ShmipiError,
)
from shmipi.stress.users.base import Outcome, UserCheck, Violations, Worker

if TYPE_CHECKING:
    from shmipi.cluster import Cluster
    from shmipi.machine.arrays import SharedArray

__all__ = ["Check"]

_LEFT, _RIGHT, _CHANGER, _GIVEN_UP = range(4)
_CHANGES, _LOOKS, _HANDLERS, _REFUSED = range(4)
_HALF_S: Final = 0.0004  # between the two halves of a change
_HOLDER_S: Final = 0.03  # still half done then: who did it was killed, or is stopped
_TIMEOUT_S: Final = 0.2
_RARE: Final = 4  # of so many turns one stops the machine
_HOST: Final = 10


class Check(UserCheck):
    """stop_machine from CPUs and the host, under whatever else goes on."""

    name: ClassVar[str] = "stop"

    def __init__(self, cluster: Cluster, seed: int) -> None:
        super().__init__(cluster, seed)
        self.data = self.shared("data", "i8", 4)
        self.tally = self.percpu("tally", "i8", 4)
        self.calls = self.by_host = 0

    def work(self) -> Worker:
        """Return the worker."""
        return partial(worker, self.data, self.tally, self.violations)

    def host(self) -> None:
        """Stop the machine from here, now and then."""
        self.calls += 1
        if self.calls % _HOST:
            return
        try:
            timeout = _timeout(self.cluster.ncpus)
            self.cluster.smp.stop_machine(
                partial(change, self.data, self.tally, self.violations),
                time.monotonic() + timeout / 2,
                timeout=timeout,
            )
            self.by_host += 1
        except ShmipiError:
            atomic.fetch_add(self.data, _GIVEN_UP, 1)

    def outcome(self) -> Outcome:
        """Return what was changed and looked at."""
        changes, looks, handlers, refused = (int(n) for n in self.tally.sum(axis=0))
        left, right = (int(n) for n in self.data[:_CHANGER])
        given_up = int(self.data[_GIVEN_UP])
        wrong = []
        # More: who was killed had no time to count what it has changed.
        if not given_up and left < changes + self.by_host:
            wrong.append(
                f"{changes + self.by_host} changes were made with the machine stopped,"
                f" and the data has {left}: two functions ran at once"
            )
        return Outcome(
            {
                "changes": changes + self.by_host,
                "looks": looks,
                "handlers": handlers,
                "refused": refused,
            },
            {"left": left, "right": right, "given_up": given_up},
            wrong,
        )


#: Of this CPU: sent from where interrupts are off.
_csds: dict[int, CallSingleData] = {}


def _timeout(ncpus: int) -> float:
    """Return how long all CPUs may take to stop, on few cores."""
    return _TIMEOUT_S + 0.01 * max(0, ncpus - 8)


def change(
    data: SharedArray, tally: SharedArray, violations: Violations, late: float
) -> None:
    """Run with all CPUs stopped: plain stores, and a while in between.

    Meanwhile another CPU is interrupted, which must not take it before the end. Where
    it is ``late`` by then, the stop may be given up, and the others let go: who finds
    the change half done has to know that before it is whole.
    """
    value = int(data[_LEFT])
    me = smp.smp_processor_id()
    data[_CHANGER] = me
    data[_LEFT] = value + 1
    if me not in _csds:
        looks = partial(handler, data, tally, violations)
        _csds[me] = smp.CallSingleData(looks)
    with contextlib.suppress(CpuOfflineError, CsdBusyError):
        other = (me + 1 + value % max(1, smp.nr_cpu_ids - 1)) % smp.nr_cpu_ids
        if other != me:
            smp.smp_call_function_single_async(other, _csds[me])
    end = time.monotonic() + _HALF_S
    while time.monotonic() < end:
        pass
    if time.monotonic() > late:
        atomic.fetch_add(data, _GIVEN_UP, 1)
    data[_RIGHT] = value + 1


def look(data: SharedArray, violations: Violations, where: str) -> None:
    """Interrupts or preemption are off: nobody stops this CPU in between."""
    given_up = atomic.load(data, _GIVEN_UP)
    left, right = int(data[_LEFT]), int(data[_RIGHT])
    if left == right:
        return
    who = int(data[_CHANGER])
    time.sleep(_HOLDER_S)
    if (int(data[_LEFT]), int(data[_RIGHT])) == (left, right):
        return  # its changer was killed in it, or is stopped
    if atomic.load(data, _GIVEN_UP) != given_up:
        return  # its time was over, and the others were let go
    violations.report(
        f"CPU {smp.smp_processor_id()}, in {where}, saw {left} and {right}: CPU {who}"
        " was in a stop_machine function, and this CPU was not stopped"
    )


def handler(
    data: SharedArray, tally: SharedArray, violations: Violations, _: Any
) -> None:
    """Look, in an interrupt."""
    look(data, violations, "a handler")
    tally[smp.smp_processor_id(), _HANDLERS] += 1


def worker(
    data: SharedArray, tally: SharedArray, violations: Violations, cpu: int, seed: int
) -> Iterator[None]:
    """Look, interrupt others, and sometimes stop the machine."""
    random = Random(seed)
    looks = partial(handler, data, tally, violations)
    changes = partial(change, data, tally, violations)
    timeout = _timeout(len(tally))
    while True:
        smp.preempt_disable()
        for _ in range(20):
            look(data, violations, "a task")
        smp.preempt_enable()
        tally[cpu, _LOOKS] += 20
        other = random.randrange(smp.nr_cpu_ids)
        try:
            if other != cpu:
                smp.smp_call_function_single(other, looks, None, wait=False)
            if not random.randrange(_RARE):
                cpus = None if random.randrange(2) else [cpu]
                late = time.monotonic() + timeout / 2
                smp.stop_machine(changes, late, cpus, timeout=timeout)
                tally[cpu, _CHANGES] += 1
        except (CpuDiedError, IpiTimeoutError, RemoteCallError):
            atomic.fetch_add(data, _GIVEN_UP, 1)
        except ShmipiError:
            tally[cpu, _REFUSED] += 1
        yield
