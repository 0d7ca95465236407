"""The rows of Norov's IPI benchmark: dry run, self, normal, broadcast, with a lock."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from shmipi import _core, atomic, smp
from shmipi.bench import tasks
from shmipi.bench.user_rows.base import Took, UserRow
from shmipi.machine.arrays import SharedArray

if TYPE_CHECKING:
    from shmipi.bench.runner import Rig

LOCK = "bench.users.lock"


def locked(lock: SharedArray) -> None:
    """The handler of a broadcast with a lock: take it, let it go."""
    while atomic.exchange(lock, 0, 1):
        pass
    atomic.store(lock, 0, 0)


def dry(handler: Callable[[Any], None], info: Any) -> None:
    """Call the handler as any function."""
    handler(info)


def itself(handler: Callable[[Any], None], info: Any) -> None:
    """Call oneself: with interrupts off, and no IPI."""
    smp.smp_call_function_single(0, handler, info, True)


def normal(handler: Callable[[Any], None], info: Any) -> None:
    """Call another CPU."""
    smp.smp_call_function_single(1, handler, info, True)


def broadcast(handler: Callable[[Any], None], info: Any) -> None:
    """Call all others."""
    smp.smp_call_function(handler, info, True)


def clocked(
    way: Callable[[Callable[[Any], None], Any], None],
    handler: Callable[[Any], None],
    info: Any,
    calls: int,
    warmup: int,
    gap_ns: int,
) -> _core.Hist:
    """Task: do it ``calls`` times, when CPU 1 has halted; ns of each."""
    took, clock = _core.Hist(), time.perf_counter_ns
    for number in range(-warmup, calls):
        _core.bench_await(1, _core.HALTED, gap_ns)
        start = clock()
        way(handler, info)
        if number >= 0:
            took.record(clock() - start)
    return took


class Norov(UserRow):
    """One of its rows."""

    flavour = "python"

    def __init__(
        self,
        what: str,
        way: Callable[[Callable[[Any], None], Any], None],
        *,
        lock: bool = False,
        ncpus: int = 2,
    ) -> None:
        self.what, self.ncpus = what, ncpus
        self._way, self._lock = way, lock
        self._info: SharedArray | None = None
        self.raw = "broadcast" if way is broadcast else "single"
        # What is one call is one call; a lock is no part of one.
        self.at_most = None if lock else 1.5

    def prepare(self, rig: Rig) -> None:
        """Make the lock."""
        if self._lock:
            self._info = rig.cluster.shared(LOCK, "i8", 1)

    def block(self, rig: Rig, calls: int, warmup: int, gap_ns: int) -> Took:
        """Do it."""
        handler: Any = locked if self._lock else tasks.noop
        way, info = self._way, self._info
        took: _core.Hist = rig.run(
            0, clocked, way, handler, info, calls, warmup, gap_ns
        )
        return took


def rows() -> list[UserRow]:
    """Return them, broadcasts over 2 and over 8 CPUs."""
    found: list[UserRow] = [
        Norov("dry run", dry),
        Norov("self-IPI", itself),
        Norov("normal IPI", normal),
    ]
    for ncpus in (2, 8):
        found += [
            Norov("broadcast IPI", broadcast, ncpus=ncpus),
            Norov("broadcast lock", broadcast, lock=True, ncpus=ncpus),
        ]
    return found
