"""Readers everywhere, and memory that is used again: no reader sees freed memory.

Objects are words, 0 while they are free, 2 while a native callback is to free them, of
this CPU or, when it is gone, of another. Each CPU has a pointer to one of its own
objects, which all read: in their tasks, in native handlers and in Python's. It
publishes another one, waits for a grace period, or has a callback called after one,
and frees the old one, which it publishes again later.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from random import Random
from typing import TYPE_CHECKING, ClassVar, Final

from shmipi import NativeHandler, atomic, smp
from shmipi.errors import CpuDiedError, CpuOfflineError, CsdBusyError
from shmipi.stress.users.base import Outcome, UserCheck, Violations, Worker
from shmipi.users import rcu

if TYPE_CHECKING:
    from shmipi.cluster import Cluster
    from shmipi.machine.arrays import SharedArray

__all__ = ["Check"]

_OBJECTS: Final = 64
_POINTER, _NATIVE_READS, _NATIVE_FREED, _FIRST = range(4)
_READS, _HANDLER_READS, _FREED_SEEN, _GRACE, _CALLBACKS = range(5)
_LOOKS: Final = 6
_USED, _LEFT = 1, 2


class Check(UserCheck):
    """RCU: readers in tasks and handlers, grace periods, callbacks."""

    name: ClassVar[str] = "rcu"

    def __init__(self, cluster: Cluster, seed: int) -> None:
        super().__init__(cluster, seed)
        self.tally = self.percpu("tally", "i8", 5)
        self.objects = self.percpu("objects", "u8", _FIRST + _OBJECTS)
        self.objects[:, _FIRST] = _USED
        self.native = 0
        assert cluster.users.rcu is not None

    def work(self) -> Worker:
        """Return the worker."""
        return partial(worker, self.tally, self.objects, self.violations)

    def died(self, cpu: int) -> None:
        """Take back what its death left between the object and its callback."""
        if not self.cluster.users.rcu.stats().cpus[cpu].natives:
            objects = self.objects[cpu, _FIRST:]
            objects[objects == _LEFT] = 0

    def finish(self) -> None:
        """Have all callbacks run: a native one is never lost."""
        users = self.cluster.users.rcu
        users.rcu_barrier()
        left = [cpu for cpu, one in enumerate(users.stats().cpus) if one.natives]
        if left:
            self.violations.report(
                f"native callbacks of CPUs {left} have not run: rcu_barrier() did not"
                " wait for them, or nobody has taken them over"
            )

    def host(self) -> None:
        """Look what native readers have found."""
        freed = int(self.objects[:, _NATIVE_FREED].sum())
        if freed > self.native:
            self.native = freed
            self.violations.report(
                f"{freed} native readers, in hard interrupt context, saw a freed"
                " object: a grace period ended before they did"
            )

    def outcome(self) -> Outcome:
        """Return what was read and freed."""
        sums = [int(n) for n in self.tally.sum(axis=0)]
        stats = self.cluster.users.rcu.stats()
        return Outcome(
            {
                "reads": sums[_READS],
                "handler_reads": sums[_HANDLER_READS],
                "native_reads": int(self.objects[:, _NATIVE_READS].sum()),
                "grace_periods": sums[_GRACE],
                "callbacks": sums[_CALLBACKS],
                "migrated": stats.migrated,
                "ipis": stats.ipis,
                "idle": stats.idle,
                "died_readers": stats.died_readers,
            },
            {
                "freed_seen": sums[_FREED_SEEN]
                + int(self.objects[:, _NATIVE_FREED].sum())
            },
        )


def look(
    tally: SharedArray, objects: SharedArray, violations: Violations, of: int, kind: int
) -> None:
    """Read the object of CPU ``of`` for a while, in a read-side section."""
    me = smp.smp_processor_id()
    rcu.rcu_read_lock()
    index = atomic.load(objects, (of, _POINTER))
    for _ in range(_LOOKS):
        if not atomic.load(objects, (of, _FIRST + index)):
            tally[me, _FREED_SEEN] += 1
            where = "task" if kind == _READS else "handler"
            violations.report(
                f"CPU {me}, {where}: object {index} of CPU {of} was freed in the midst"
                " of a read-side section that had found it: the grace period did not"
                " wait for this reader"
            )
            break
    rcu.rcu_read_unlock()
    tally[me, kind] += 1


def handler(
    tally: SharedArray, objects: SharedArray, violations: Violations, of: int
) -> None:
    """Handler: the same."""
    look(tally, objects, violations, of, _HANDLER_READS)


def free(tally: SharedArray, objects: SharedArray, of: int, index: int) -> None:
    """Free an object."""
    atomic.store(objects, (of, _FIRST + index), 0)
    tally[of, _CALLBACKS] += 1


def worker(
    tally: SharedArray,
    objects: SharedArray,
    violations: Violations,
    cpu: int,
    seed: int,
) -> Iterator[None]:
    """Read, be read in handlers, publish, wait, free."""
    random = Random(seed)
    native, end = NativeHandler("rcu_read_object"), NativeHandler("rcu_free_object")
    read = partial(handler, tally, objects, violations)
    waiting: set[int] = set()
    # Of the worker before, which may have died between two of its steps.
    current = atomic.load(objects, (cpu, _POINTER))
    atomic.store(objects, (cpu, _FIRST + current), _USED)
    while True:
        for _ in range(4):
            look(tally, objects, violations, random.randrange(len(objects)), _READS)
        yield
        other, of = (random.randrange(len(objects)) for _ in range(2))
        try:
            if random.randrange(2):
                smp.smp_call_function_single(other, native, objects[of], False)
            else:
                smp.smp_call_function_single(other, read, of, False)
        except (CpuOfflineError, CpuDiedError):
            pass
        yield
        words = [atomic.load(objects, (cpu, _FIRST + n)) for n in range(_OBJECTS)]
        waiting = {n for n in waiting if words[n]}
        free_ones = [
            n
            for n, word in enumerate(words)
            if n not in waiting and n != current and word != _LEFT
        ]
        if not free_ones:
            yield
            continue
        old, current = current, random.choice(free_ones)
        atomic.store(objects, (cpu, _FIRST + current), _USED)
        atomic.store(objects, (cpu, _POINTER), current)
        what = random.randrange(8)
        try:
            if what == 0:
                atomic.store(objects, (cpu, _FIRST + old), _LEFT)
                rcu.call_rcu(end, objects[cpu, _FIRST + old : _FIRST + old + 1])
                tally[cpu, _CALLBACKS] += 1
                yield
                continue
            if what == 1:
                rcu.call_rcu(partial(free, tally, objects, cpu), old)
                waiting.add(old)
                yield
                continue
        except CsdBusyError:
            pass
        if what == 7:
            rcu.synchronize_rcu()
        else:
            rcu.synchronize_rcu_expedited()
        atomic.store(objects, (cpu, _FIRST + old), 0)
        tally[cpu, _GRACE] += 1
        yield
