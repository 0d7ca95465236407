"""What the check of a user of IPIs has: work for every CPU, and an invariant.

The check of user ``tlb`` is the class ``Check`` of ``shmipi/stress/users/tlb.py``::

    class Check(UserCheck):
        name = "tlb"

        def __init__(self, cluster: Cluster, seed: int) -> None:
            super().__init__(cluster, seed)
            self.tally = self.percpu("tally", "i8", 4)

        def work(self) -> Worker:
            return partial(worker, self.tally, self.violations)

        def outcome(self) -> Outcome:
            done, stale = self.tally.sum(axis=0)[:2]
            return Outcome({"loads": int(done)}, {"stale": int(stale)})


    def worker(
        tally: SharedArray, violations: Violations, cpu: int, seed: int
    ) -> Iterator[None]:
        random = Random(seed)
        while True:
            ...
            tally[cpu, 0] += 1
            yield

All users that were chosen work on one machine at the same time: on each CPU one task
takes a turn of each worker, again and again.
"""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Final, TypeAlias

import numpy as np

from shmipi import atomic
from shmipi.machine.process import LOOKED_NS, core_time

if TYPE_CHECKING:
    from shmipi.cluster import Cluster
    from shmipi.machine.arrays import SharedArray

__all__ = [
    "LOOKED_NS",
    "Beside",
    "Outcome",
    "UserCheck",
    "Violations",
    "Worker",
    "core_time",
    "had_no_core",
]


def had_no_core(before: tuple[str, int], now: tuple[str, int]) -> bool:
    """Was a CPU kept from its core between two looks at ``core_time``?

    What it was told meanwhile it has not seen, though it does not sleep. Another
    process in its place counts as one that had it.
    """
    state, ran = now
    return state != "S" and 0 <= ran - before[1] < LOOKED_NS


#: ``worker(cpu, seed)``: a generator that runs on ``cpu``.
Worker: TypeAlias = Callable[[int, int], Iterator[None]]

_TEXTS: Final = 16  # of a user are kept; all are counted
_TEXT_BYTES: Final = 512


@dataclass
class Outcome:
    """What a user did, what its invariant counted, and each thing that was wrong."""

    done: dict[str, int] = field(default_factory=dict)
    invariant: dict[str, int] = field(default_factory=dict)
    violations: list[str] = field(default_factory=list)


class Violations:
    """What was seen to be wrong: texts in shared memory, from anywhere on the machine.

    It travels to CPUs as the arrays in it do. ``report`` may be called in a worker, in
    a handler, and on the host; a CPU that is killed in it leaves half a text at worst.
    """

    def __init__(self, counts: SharedArray, texts: SharedArray) -> None:
        self._counts, self._texts = counts, texts

    def report(self, text: str) -> None:
        """Count a violation; the first few are kept with their text.

        Say what was violated, on which CPU, and by which interleaving as far as known.
        """
        place = atomic.fetch_add(self._counts, 0, 1)
        if place < len(self._texts):
            data = text.encode(errors="backslashreplace")[:_TEXT_BYTES]
            self._texts[place, : len(data)] = np.frombuffer(data, "u1")
            atomic.store(self._counts, place + 1, len(data))

    @property
    def count(self) -> int:
        """How many there were so far."""
        return atomic.load(self._counts, 0)

    def texts(self) -> list[str]:
        """Return those that are kept, and how many more there were."""
        count, kept = self.count, []
        for place in range(min(count, len(self._texts))):
            length = atomic.load(self._counts, place + 1)
            data = bytes(self._texts[place, :length])
            kept.append(data.decode(errors="replace") or "(its CPU died as it said it)")
        if count > len(kept):
            kept.append(f"and {count - len(kept)} more")
        return kept


class UserCheck(ABC):
    """A user of IPIs under stress; made on the host before the CPUs begin.

    ``cluster`` is the machine, every CPU online and idle; ``seed`` makes the choices
    the same again. ``violations`` is where anybody says what is wrong, at once: a run
    with a rule broken ends soon after the first. An exception out of any method, or out
    of a worker, is an error of the check.
    """

    #: That of the module.
    name: ClassVar[str]

    def __init__(self, cluster: Cluster, seed: int) -> None:
        self.cluster = cluster
        self.seed = seed
        self.violations = Violations(
            self.shared("violations", "u8", 1 + _TEXTS),
            self.shared("texts", "u1", (_TEXTS, _TEXT_BYTES)),
        )

    def shared(
        self, what: str, dtype: Any, shape: int | tuple[int, ...]
    ) -> SharedArray:
        """Return a shared array of this check, zeroed also on a machine that has it."""
        array = self.cluster.shared(f"stress.{self.name}.{what}", dtype, shape)
        array[...] = 0
        return array

    def percpu(
        self, what: str, dtype: Any, shape: int | tuple[int, ...] = ()
    ) -> SharedArray:
        """Return the same with a row for each CPU, on lines of its own."""
        array = self.cluster.percpu(f"stress.{self.name}.{what}", dtype, shape)
        array[...] = 0
        return array

    def core_time(self, cpu: int) -> tuple[str, int]:
        """Return the state of a CPU's process, and how many ns it has had a core.

        "T": it is stopped, or gone. Where many CPUs share few cores, who waits for its
        core ("R") and has had less than ``LOOKED_NS`` since is not to blame.
        """
        return core_time(self.cluster.cpus[cpu].pid)

    def core_times(self) -> list[tuple[str, int]]:
        """Return the same of every CPU: see ``had_no_core``."""
        return [core_time(cpu.pid) for cpu in self.cluster.cpus]

    @abstractmethod
    def work(self) -> Worker:
        """Return what runs on every CPU; it is pickled.

        ``worker(cpu, seed)`` yields at least every ms or so, never blocks longer than
        50 ms, and leaves neither interrupts nor preemption disabled at a ``yield``. It
        keeps its tallies in shared arrays: its CPU may be killed at any moment, and
        booted anew with a new worker; or taken offline and back, or stopped, in the
        midst of it. It ends by itself or at ``GeneratorExit``. What other CPUs do to it
        (``CpuOfflineError``, ``CpuDiedError``) is its to catch.
        """

    # Most checks have nothing to do here.

    def host(self) -> None:  # noqa: B027
        """Act from the host: called some 50 times a second; never blocks for long."""

    def died(self, cpu: int) -> None:  # noqa: B027
        """Learn that ``cpu`` was killed, is up again, and gets a new worker next.

        Called from another thread than the rest, but never at the same time as those.
        """

    def finish(self) -> None:  # noqa: B027
        """Come to rest: workers have ended, every CPU is online, no rule is broken."""

    def close(self) -> None:  # noqa: B027
        """Let go of what is not the machine's: last of all, whatever has happened."""

    @abstractmethod
    def outcome(self) -> Outcome:
        """Return the account; after ``finish()``. Its violations add to the others."""


class Beside(threading.Thread):
    """What a check does beside the machine; what is raised there is raised by look().

    ``what(ends)`` returns soon after ``ends`` was set.
    """

    def __init__(self, what: Callable[[threading.Event], None]) -> None:
        super().__init__(daemon=True)
        self._what = what
        self._ends = threading.Event()
        self._failure: Exception | None = None

    def run(self) -> None:
        """Do it."""
        try:
            self._what(self._ends)
        except Exception as failure:
            self._failure = failure

    def look(self) -> None:
        """Raise what it has raised, once."""
        failure, self._failure = self._failure, None
        if failure is not None:
            raise failure

    def end(self) -> None:
        """Have it end, if it has begun."""
        self._ends.set()
        if self.ident is not None:
            self.join()
