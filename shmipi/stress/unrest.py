"""What a stress run does to CPUs: hotplug, ``kill -9``, SIGSTOP, at random moments."""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from random import Random
from typing import Any, Final, Protocol

from shmipi.cluster import Cluster
from shmipi.cpumask import CpuMask
from shmipi.errors import (
    ClusterStateError,
    CpuDiedError,
    HotplugError,
    IpiTimeoutError,
    MachineDiedError,
    ShmipiError,
)
from shmipi.stress.report import Hotplug

__all__ = ["Intervals", "Subject", "Unrest", "driver_word", "facts", "taken"]

_LOOK_S: Final = 0.01
#: The longest that a CPU is stopped, in seconds; at least a hundredth of it.
_STOPPED_S: Final = 0.1


def facts(cluster: Cluster) -> dict[str, Any]:
    """Return what a report says of the machine."""
    names = ("name", "ncpus", "idle", "doorbell", "controller")
    return {name: getattr(cluster, name) for name in names}


def driver_word(cluster: Cluster) -> int:
    """Return who drives a run, for those who look whether that is gone."""
    machine = cluster._machine
    return machine.id + 1 | machine.slot(machine.id).generation << 32


@contextlib.contextmanager
def taken(
    cluster: Cluster | None, machine: Mapping[str, Any], seconds: float
) -> Iterator[Cluster]:
    """Give a run its machine: ``cluster``, ``alone``, or one of its own."""
    if cluster is None:
        with Cluster(**machine) as booted:
            yield booted
    else:
        with alone(cluster, seconds):
            yield cluster


@contextlib.contextmanager
def alone(cluster: Cluster, seconds: float) -> Iterator[None]:
    """Take a machine that may have other hosts: one run at a time, on idle CPUs.

    Tasks of a host that was killed have ``seconds`` to notice. Raises
    ``ClusterStateError``.
    """
    machine = cluster._machine
    if not machine.trylock("tool"):
        raise ClusterStateError(
            f"another host has the whole machine {cluster.name} for a stress run or a"
            " measurement: wait until it has ended"
        )
    try:
        deadline = time.monotonic() + seconds
        while busy := [n for n in range(cluster.ncpus) if machine.slot(n).busy]:
            cluster._check()
            if time.monotonic() > deadline:
                raise ClusterStateError(
                    f"CPUs {CpuMask(busy)} of machine {cluster.name} run tasks: a"
                    " stress run needs them idle (`shmipi ps -v` shows what they run)"
                )
            time.sleep(_LOOK_S)
        yield
    finally:
        machine.unlock("tool")


class Intervals(Protocol):
    """The options that say how often, in seconds; 0: never."""

    @property
    def onoff_interval(self) -> float: ...
    @property
    def kill_interval(self) -> float: ...
    @property
    def stall_interval(self) -> float: ...


class Subject(Protocol):
    """The run that is disturbed: what it is told, in the thread that does it."""

    def leaving(self, cpu: int) -> None:
        """It may not be online from now on."""

    def back(self, cpu: int) -> None:
        """It is online again, and stays so."""

    def dying(self, cpu: int) -> None:
        """It is killed next."""

    def died(self, cpu: int) -> None:
        """It is marked dead, and what ran there has ended."""

    def booted(self, cpu: int) -> None:
        """A new process is this CPU, with nothing to do."""

    def who(self, cpu: int) -> str:
        """Say what it does, for who reads that it does not get on."""

    def error(self, kind: str, text: str) -> None:
        """Count an error."""

    def patience(self) -> float:
        """Return after how many seconds a CPU does not get on."""


class Unrest:
    """Does it, in a thread for each kind, between ``start()`` and ``end()``.

    ``stop`` is set when it is to end, ``killed`` when as many CPUs as were asked for
    have been killed. ``failure`` is what ended a thread and must end the run.
    """

    def __init__(
        self,
        cluster: Cluster,
        subject: Subject,
        intervals: Intervals,
        seed: int,
        kills: int | None = None,
    ) -> None:
        self.cluster = cluster
        self.machine = cluster._machine
        self.subject = subject
        self.intervals = intervals
        self.seed = seed
        self.kills = kills
        self.hotplug = Hotplug()
        self.stop = threading.Event()
        self.killed = threading.Event()
        self.failure: BaseException | None = None
        self._lock = threading.Lock()
        self._claimed: set[int] = set()  # CPUs that a thread is taking away
        self._threads: list[threading.Thread] = []

    def start(self) -> None:
        """Begin."""
        jobs: tuple[tuple[str, float, Callable[[Random], None]], ...] = (
            ("onoff", self.intervals.onoff_interval, self._onoff),
            ("kill", self.intervals.kill_interval, self._kill),
            ("stall", self.intervals.stall_interval, self._stall),
        )
        for job in jobs:
            if job[1]:
                thread = threading.Thread(
                    target=self._repeat,
                    args=job,
                    name=f"shmipi-stress-{job[0]}",
                    daemon=True,
                )
                self._threads.append(thread)
                thread.start()

    def end(self) -> None:
        """Return when nothing more is done to any CPU."""
        self.stop.set()
        for thread in self._threads:
            thread.join()

    def has(self, cpu: int) -> bool:
        """Is this CPU being taken away, or being brought back?"""
        return cpu in self._claimed

    def all_online(self) -> None:
        """Bring every CPU that is offline back."""
        for cpu in range(self.cluster.ncpus):
            if self.state(cpu) == "offline":
                self._bring_online(cpu)

    def state(self, cpu: int) -> str:
        """Return a CPU's state, as ``Cpu.state``."""
        return self.cluster._cpu(cpu).state

    def _repeat(
        self, name: str, interval: float, work: Callable[[Random], None]
    ) -> None:
        random = Random(f"{self.seed}/{name}")
        try:
            while not self.stop.wait(interval):
                work(random)
        except MachineDiedError as error:
            self.failure = error
        except ShmipiError as error:
            self.subject.error("hotplug", f"{name}: {error}")
        except BaseException as error:
            self.failure = error

    @contextlib.contextmanager
    def _claim(self, cpu: int) -> Iterator[bool]:
        """Have a CPU to oneself, if nobody else has."""
        with self._lock:
            free = cpu not in self._claimed
            self._claimed.add(cpu)
        try:
            yield free
        finally:
            if free:
                with self._lock:
                    self._claimed.discard(cpu)

    # ---- hotplug ---------------------------------------------------------------------

    def _onoff(self, random: Random) -> None:
        """Take a random CPU offline, or bring it online if it is not."""
        cpu = random.randrange(self.cluster.ncpus)
        with self._claim(cpu) as mine:
            if not mine:
                return
            if self.state(cpu) != "offline":
                others = len(self.cluster.online_mask) - len(self._claimed - {cpu})
                if others > 1:
                    self._take_offline(cpu)
            else:
                self._bring_online(cpu)

    def _take_offline(self, cpu: int) -> None:
        self.hotplug.offline_attempts += 1
        self.subject.leaving(cpu)
        begun = time.monotonic()
        try:
            self.cluster.offline(cpu, timeout=self.subject.patience())
        except CpuDiedError as error:  # by itself: who watches reports it
            if self.state(cpu) != "dead":
                raise error
            return
        except IpiTimeoutError:
            self.subject.error(
                "hotplug", f"CPU {cpu} does not go offline: {self.subject.who(cpu)}"
            )
            self.subject.back(cpu)
            return
        except HotplugError as error:
            # The others were killed since they were counted: it is the last, and stays.
            if error.errno != errno.EBUSY or not self.intervals.kill_interval:
                raise
            self.subject.back(cpu)
            return
        self.hotplug.offline += 1
        self.hotplug.took("offline", time.monotonic() - begun)

    def _bring_online(self, cpu: int) -> None:
        self.hotplug.online_attempts += 1
        begun = time.monotonic()
        try:
            self.cluster.online(cpu, timeout=self.subject.patience())
        except IpiTimeoutError:
            self.subject.error("hotplug", f"CPU {cpu} does not come online")
            return
        self.subject.back(cpu)
        self.hotplug.online += 1
        self.hotplug.took("online", time.monotonic() - begun)

    # ---- signals ---------------------------------------------------------------------

    def _kill(self, random: Random) -> None:
        """SIGKILL a random CPU, parked ones too; boot it anew."""
        cpu = random.randrange(self.cluster.ncpus)
        with self._claim(cpu) as mine:
            if not mine:
                return
            self.subject.leaving(cpu)
            self.subject.dying(cpu)
            os.kill(self.cluster._cpu(cpu).pid, signal.SIGKILL)
            self.hotplug.kills += 1
            if not self._await_death(cpu):
                return
            self.subject.died(cpu)
            self.cluster.online(cpu)
            self.subject.back(cpu)
            self.subject.booted(cpu)
        if self.kills is not None and self.hotplug.kills >= self.kills:
            self.killed.set()
            self.stop.set()

    def _await_death(self, cpu: int) -> bool:
        deadline = time.monotonic() + self.subject.patience()
        while True:
            seen = self.machine.hotplug_event
            if self.state(cpu) == "dead":
                return True
            if time.monotonic() > deadline:
                self.subject.error(
                    "hotplug", f"CPU {cpu} was killed and is not marked dead"
                )
                return False
            self.machine.wait_hotplug(seen, 0.05)

    def _stall(self, random: Random) -> None:
        """SIGSTOP a random CPU, and let it go on a little later."""
        cpu = random.randrange(self.cluster.ncpus)
        seconds = random.uniform(_STOPPED_S / 100, _STOPPED_S)
        with self._claim(cpu) as mine, contextlib.ExitStack() as stack:
            if not mine or self.state(cpu) == "dead":
                return
            # By descriptor: it may die by itself, and its number be somebody else's.
            try:
                pidfd = os.pidfd_open(self.cluster._cpu(cpu).pid)
                stack.callback(os.close, pidfd)
                signal.pidfd_send_signal(pidfd, signal.SIGSTOP)
            except ProcessLookupError:
                return
            self.hotplug.stalls += 1
            stack.callback(_let_go, pidfd)
            self.stop.wait(seconds)


def _let_go(pidfd: int) -> Any:
    with contextlib.suppress(ProcessLookupError):
        signal.pidfd_send_signal(pidfd, signal.SIGCONT)
