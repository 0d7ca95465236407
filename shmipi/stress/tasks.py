"""A stress run's task on each CPU: begun, looked after, collected, ended.

What both kinds of run have: ``driver.py`` posts an invoker to each CPU, ``crew.py`` the
workers of users.
"""

from __future__ import annotations

import secrets
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar

from shmipi.errors import (
    CpuDiedError,
    IpiTimeoutError,
    MachineDiedError,
    RemoteCallError,
)
from shmipi.stress.unrest import Intervals, Unrest

if TYPE_CHECKING:
    from shmipi.cluster import Cluster

__all__ = ["Tasks"]


class Tasks(ABC):
    """The tasks, and what is done to the CPUs that they are on.

    A task that ends while the run goes on is an error, as is one that does not get on;
    but for one whose CPU was killed: that gets a new one when it is booted anew.
    ``seed`` None: one is chosen. ``kills`` is as of ``Unrest``.
    """

    #: What such a task is called in errors.
    noun: ClassVar[str]

    def __init__(
        self,
        cluster: Cluster,
        intervals: Intervals,
        seed: int | None,
        line: Callable[[str], None] | None,
        progress: Callable[[float], None] | None,
        kills: int | None = None,
    ) -> None:
        self.cluster = cluster
        self.machine = cluster._machine
        self.line = line or (lambda text: None)
        self.progress = progress or (lambda seconds: None)
        self.seed = secrets.randbits(32) if seed is None else seed
        self.unrest = Unrest(cluster, self, intervals, self.seed, kills)
        self.lock = threading.Lock()  # of everything below
        self.calls: dict[int, int] = {}  # CPU -> the call that is its task
        self.incarnation = [0] * cluster.ncpus
        self.beats: dict[int, tuple[int, float]] = {}

    # ---- what each kind of run says of its own ---------------------------------------

    @abstractmethod
    def task_of(self, incarnation: int) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        """Return the function of a CPU's task, the first or a later one; its arguments.

        They are pickled.
        """

    @abstractmethod
    def beat(self, cpu: int) -> int:
        """Return what changes while the CPU's task gets on."""

    @abstractmethod
    def excused(self, cpu: int) -> bool:
        """Need the CPU's task not get on now?"""

    @abstractmethod
    def patience(self) -> float:
        """Return after how many seconds a task does not get on."""

    def answer_s(self) -> float:
        """Return how many seconds the end of a dead CPU's task may take."""
        return self.patience()

    @abstractmethod
    def who(self, cpu: int) -> str:
        """Say what a CPU does."""

    @abstractmethod
    def error(self, kind: str, text: str) -> None:
        """Count an error, and keep its text."""

    @abstractmethod
    def by_itself(self, cpu: int, error: CpuDiedError) -> None:
        """A CPU has died that nobody killed."""

    @abstractmethod
    def failed(self, cpu: int, error: RemoteCallError) -> None:
        """Its task has raised."""

    def ended(self, cpu: int) -> None:  # noqa: B027
        """Its task has ended, not by a kill, and was collected."""

    def stuck(self, cpu: int) -> None:  # noqa: B027
        """Its task does not get on, which was said."""

    # ---- what is done with them ------------------------------------------------------

    def state(self, cpu: int) -> str:
        """Return a CPU's state, as ``Cpu.state``."""
        return self.cluster._cpu(cpu).state

    def start(self, cpu: int) -> None:
        """Post its task to ``cpu``; nobody waits for it."""
        self.incarnation[cpu] += 1
        func, args = self.task_of(self.incarnation[cpu])
        call = self.machine.post(cpu, func, args, None, True)
        with self.lock:
            self.calls[cpu] = call
            self.beats.pop(cpu, None)

    def collect(self, cpu: int, call: int, *, killed: bool) -> None:
        """Take the end of a CPU's task: all but a return or its murder is an error."""
        try:
            self.machine.collect(call, cpu, self.answer_s())
        except CpuDiedError as error:
            if not killed:
                self.by_itself(cpu, error)
        except MachineDiedError:
            raise
        except IpiTimeoutError:
            self.error(
                "stalled", f"CPU {cpu} died and its {self.noun}'s call is not done"
            )
        except RemoteCallError as error:
            self.failed(cpu, error)

    def watch(self, now: float) -> None:
        """Look for tasks that ended early, and for those that do not get on."""
        self.cluster._check()  # the machine may have died
        with self.lock:
            running = dict(self.calls)
        for cpu, call in running.items():
            if self.machine.done(call):
                with self.lock:
                    # Its killer may have taken it since.
                    if self.unrest.has(cpu) or self.calls.get(cpu) != call:
                        continue
                    del self.calls[cpu]
                self.collect(cpu, call, killed=False)
                self.ended(cpu)
                continue
            beat = self.beat(cpu)
            seen, since = self.beats.get(cpu, (-1, now))
            if beat != seen or self.excused(cpu):
                self.beats[cpu] = beat, now
            elif now - since > self.patience():
                self.beats[cpu] = beat, now
                self.error(
                    "stalled", f"no progress in {now - since:.0f} s: {self.who(cpu)}"
                )
                self.stuck(cpu)

    def end_all(self, seconds: float) -> set[int]:
        """Wait for the end of all, which were told to; on which CPUs did none come?"""
        self.unrest.all_online()  # a frozen one goes on, sees the word, ends
        deadline = time.monotonic() + seconds
        with self.lock:
            left, self.calls = self.calls, {}
        while left:
            seen = self.machine.event
            for cpu, call in list(left.items()):
                if self.machine.done(call):
                    del left[cpu]
                    self.collect(cpu, call, killed=False)
                    self.ended(cpu)
            if not left or time.monotonic() > deadline:
                break
            self.cluster._check()
            self.machine.wait_event(seen, 0.1)
        for cpu, call in left.items():
            self.error("stalled", f"its {self.noun} does not end: {self.who(cpu)}")
            self.machine.abandon(call)
        return set(left)

    # ---- what is done to CPUs, as told by Unrest -------------------------------------

    def leaving(self, cpu: int) -> None:  # noqa: B027
        """The CPU may not be online from now on."""

    def back(self, cpu: int) -> None:  # noqa: B027
        """It is online again, and stays so."""

    def dying(self, cpu: int) -> None:  # noqa: B027
        """It is killed next."""

    def died(self, cpu: int) -> None:
        """Take what has become of its task."""
        with self.lock:
            call = self.calls.pop(cpu, None)
        if call is not None:
            self.collect(cpu, call, killed=True)

    def booted(self, cpu: int) -> None:
        """It gets a new task."""
        self.start(cpu)
