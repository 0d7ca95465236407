"""What all measurements share: a rig, tasks on it, what was disturbed, and blocks."""

from __future__ import annotations

import itertools
import os
import secrets
import statistics
import sys
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self, TextIO

from shmipi import _core
from shmipi.bench import tasks
from shmipi.cluster import Cluster
from shmipi.errors import CommandError
from shmipi.irq.chips import Chip
from shmipi.machine import topology
from shmipi.machine.facts import gather, steal_seconds
from shmipi.names import IDLE
from shmipi.report.table import can_redraw, columns_of

__all__ = [
    "Disturbance",
    "Job",
    "Progress",
    "Rig",
    "Seen",
    "choose_cores",
    "core_interrupts",
    "machine_facts",
    "median",
    "middle",
    "next_session",
    "preemptions",
    "split",
    "spread",
    "unused_name",
]

#: More stolen time than this share of a measurement makes it invalid; one tick of the
#: kernel's clock, in which it is counted, is no evidence.
STOLEN_SHARE: Final = 0.02
TICK_S: Final = 1.01 / os.sysconf("SC_CLK_TCK")
#: More preemptions of the target than this share of the samples likewise.
PREEMPTED_SHARE: Final = 0.01
#: More calls than this share that had to wait for the target's state likewise.
MISSED_SHARE: Final = 0.2

_sessions = itertools.count(1)


def median(values: Iterable[float]) -> float:
    """Return the median; NaN of nothing."""
    found = list(values)
    return statistics.median(found) if found else float("nan")


def middle(hist: _core.Hist) -> float:
    """Return the mean of the middle half of the values; infinity of nothing.

    For clocked calls to a CPU that polls: they take so short that the counters of some
    processors, which move in steps of 10 ns, would make every median one of few.
    """
    from_, until, below, total = hist.count / 4, hist.count * 3 / 4, 0, 0.0
    for low, high, count in hist.buckets():
        inside = min(until, below + count) - max(from_, below)
        total += max(0.0, inside) * (low + high) / 2
        below += count
    return total / (until - from_) if hist.count else float("inf")


def spread(values: Sequence[float]) -> list[float]:
    """Return [lowest, highest]."""
    return [min(values), max(values)]


def split(total: int, parts: int) -> list[int]:
    """Cut ``total`` calls into ``parts`` blocks, about the same and none empty."""
    whole, rest = divmod(total, parts)
    return [max(1, whole + (part < rest)) for part in range(parts)]


def choose_cores(cores: str | Sequence[int]) -> tuple[int, int]:
    """Return the sender's and the target's core.

    ``"auto"`` takes two physical cores where there are. Raises ``CommandError``: status
    2 for a list that is not two different usable cores, status 1 where there is one.
    """
    usable = topology.usable_cores()
    if len(usable) < 2:
        raise CommandError(
            f"this process may run on core {usable[0]} only, and sender and target need"
            " a core each: allow a second one (taskset, docker --cpuset-cpus)"
        )
    if isinstance(cores, str) and cores == "auto":
        sender, target = topology.place(2)
        return sender, target
    try:
        chosen = topology.place(len(list(cores)), cores)
    except ValueError as error:
        raise CommandError(str(error), status=2) from None
    if len(chosen) != 2 or chosen[0] == chosen[1]:
        raise CommandError(
            "--cores names the sender's core and the target's, two different ones,"
            " such as 0,1",
            status=2,
        )
    return chosen[0], chosen[1]


def machine_facts(**more: Any) -> dict[str, Any]:
    """Return what is known of this computer, for the ``machine`` of a document."""
    return {**gather().as_dict(), **more}


@dataclass(frozen=True)
class Job:
    """A task that was started on a CPU of a rig."""

    rig: Rig
    call: int
    cpu: int

    def result(self) -> Any:
        """Wait for it, asleep: the cores that are measured are left alone."""
        machine = self.rig.machine
        while True:
            seen = machine.event
            if machine.done(self.call):
                return machine.collect(self.call, self.cpu, None)
            if machine.state == _core.DEAD:
                return machine.collect(self.call, self.cpu, 0.0)
            machine.wait_event(seen, 1.0)


class Rig:
    """A machine that is measured: all its CPUs halt but the one in use.

    ``cores`` is the core of each CPU: CPU 0 sends, the others are targets. ``timer_ns``
    is what a stamp costs on CPU 0, ``clock`` where it comes from. ``cpus`` are those
    that run Python, CPU 0 among them (default: all): the others stay as they booted.
    """

    def __init__(
        self,
        cores: Sequence[int],
        *,
        doorbell: str = "futex",
        controller: str | type[Chip] = "apic",
        kick: bool | int = True,
        cpus: Sequence[int] | None = None,
    ) -> None:
        self.cluster = Cluster(
            len(cores),
            idle="halt",
            doorbell=doorbell,
            controller=controller,
            cores=list(cores),
            kick=kick,
        )
        self.cores = list(cores)
        self.doorbell = doorbell
        self.machine = self.cluster._machine
        try:
            self.cluster.shared(tasks.AREA, "u1", _core.LIMIT_AREA_BYTES)
            self.stamps = self.cluster.shared(tasks.STAMPS, "i8", 8)
            self.flags = self.cluster.shared(tasks.FLAGS, "i8", 8)
            # A collector that runs on a target would be in a sender's figure.
            prepared = self.cluster.run(tasks.prepare, cpus=cpus)
        except BaseException:
            self.cluster.shutdown()
            raise
        self.timer_ns, self.clock = prepared[0]

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.cluster.shutdown()

    def start(self, cpu: int, task: Callable[..., Any], *args: Any) -> Job:
        """Start ``task(*args)`` on ``cpu``."""
        return Job(self, self.machine.post(cpu, task, args, None, True), cpu)

    def run(self, cpu: int, task: Callable[..., Any], *args: Any) -> Any:
        """Run ``task(*args)`` on ``cpu``."""
        return self.start(cpu, task, *args).result()

    def ids(self, cpu: int) -> tuple[int, int]:
        """Return the process and thread id of a CPU."""
        slot = self.machine.slot(cpu)
        return slot.pid, slot.tid

    def idle(self, cpu: int, policy: str) -> None:
        """Let a CPU poll or halt when it has nothing to do, from now on."""
        self.machine.set_idle(cpu, IDLE.index(policy))

    def bell(self, cpu: int) -> int:
        """Return the descriptor that a CPU's doorbell is, -1 if it is none."""
        bells = [] if self.cluster.attached else self.machine.doorbell_fds()
        return bells[cpu] if bells else -1

    def counters(self, cpu: int) -> dict[str, int]:
        """Return the counters of one CPU."""
        return {name: int(row[cpu]) for name, row in self.cluster.counters().items()}


def next_session() -> int:
    """Return a number that no other run of a raw limit has."""
    return next(_sessions)


def unused_name(prefix: str) -> str:
    """Return a name that nobody else uses."""
    return f"{prefix}.{os.getpid()}.{secrets.token_hex(4)}"


# --- what disturbed a measurement


class Disturbance:
    """Looks before and after: interrupts of the cores, stolen time, preemptions.

    Used as a context manager around a measurement on a rig; what it found is added to
    ``seen``.
    """

    def __init__(self, rig: Rig, target: int, seen: Seen) -> None:
        self._rig, self._target, self._seen = rig, target, seen
        self._cores = (rig.cores[0], rig.cores[target])

    def _look(self) -> tuple[dict[int, int] | None, float | None, int, dict[str, int]]:
        return (
            core_interrupts(self._cores),
            steal_seconds(self._cores),
            preemptions(self._rig.ids(self._target)[0]),
            self._rig.counters(0),
        )

    def __enter__(self) -> Self:
        self._before = self._look()
        self._started = _core.stamp()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        seen = self._seen
        seen.seconds += (_core.stamp() - self._started) / 1e9
        ipis, stolen, preempted, counters = self._look()
        if ipis is not None and self._before[0] is not None:
            seen.sender_ipis += ipis[self._cores[0]] - self._before[0][self._cores[0]]
            seen.target_ipis += ipis[self._cores[1]] - self._before[0][self._cores[1]]
        else:
            seen.ipis_known = False
        if stolen is not None and self._before[1] is not None:
            seen.stolen_s += stolen - self._before[1]
        # Up to two are our own: the host runs before and after, and a CPU that polls
        # has to leave it the core for that.
        seen.preempted += max(0, preempted - self._before[2] - 2)
        for name, value in counters.items():
            seen.counted[name] = (
                seen.counted.get(name, 0) + value - self._before[3][name]
            )
        try:
            where = os.sched_getaffinity(self._rig.ids(self._target)[0])
        except OSError:
            return
        if where != {self._cores[1]}:
            seen.moved = True


@dataclass
class Seen:
    """What disturbed the blocks of a row, and what its sender counted in them."""

    seconds: float = 0.0
    sender_ipis: int = 0
    target_ipis: int = 0
    ipis_known: bool = True
    stolen_s: float = 0.0
    preempted: int = 0
    moved: bool = False
    counted: dict[str, int] = field(default_factory=dict)

    def why(self, samples: int | None) -> list[str]:
        """Return why figures over so many samples are not the computer's own.

        Preemptions do not matter where ``samples`` is None.
        """
        found = []
        if self.moved:
            found.append("a CPU changed its core")
        if self.stolen_s > max(TICK_S, STOLEN_SHARE * self.seconds):
            found.append(
                f"the hypervisor took {self.stolen_s:.2f} s of {self.seconds:.2f} s"
            )
        if samples is not None and self.preempted > max(2.0, PREEMPTED_SHARE * samples):
            found.append(f"the target was preempted {self.preempted} times")
        return found


def core_interrupts(
    cores: Iterable[int], *, proc: Path = Path("/proc")
) -> dict[int, int] | None:
    """Return the inter-processor interrupts that each core took since boot.

    The sum of the rows RES and CAL (x86), IPI0 and IPI1 (aarch64) of /proc/interrupts:
    reschedule and function call. ``None`` where it cannot be read or has no such rows.
    """
    try:
        lines = (proc / "interrupts").read_text().splitlines()
    except OSError:
        return None
    columns = {
        word: i for i, word in enumerate(lines[0].split() if lines else (), start=1)
    }
    rows = [
        words
        for line in lines[1:]
        if (words := line.split()) and words[0] in ("RES:", "CAL:", "IPI0:", "IPI1:")
    ]
    if not rows:
        return None
    try:
        return {
            core: sum(int(row[columns[f"CPU{core}"]]) for row in rows) for core in cores
        }
    except (KeyError, IndexError, ValueError):
        return None


def preemptions(pid: int, *, proc: Path = Path("/proc")) -> int:
    """Return how often a process was pushed off its core; 0 where that is not known."""
    with suppress(OSError, ValueError):
        for line in (proc / str(pid) / "status").read_text().splitlines():
            if line.startswith("nonvoluntary_ctxt_switches:"):
                return int(line.split()[1])
    return 0


# --- progress


class Progress:
    """A line on a terminal's standard error that says what is being measured."""

    def __init__(self, command: str, stream: TextIO | None = None) -> None:
        self._stream = sys.stderr if stream is None else stream
        self._on = can_redraw(self._stream)
        self._command = command

    def __call__(self, text: str) -> None:
        """Show ``text`` in place of the last."""
        if self._on:
            # One line of the terminal: what folds is not rubbed out again.
            room = (columns_of(self._stream) or 80) - 1
            line = f"{self._command}: {text}"
            if len(line) > room:
                line = f"{line[: room - 3]}..."
            self._stream.write(f"\r\x1b[K{line}")
            self._stream.flush()

    def clear(self) -> None:
        """Leave no line behind."""
        if self._on:
            self._stream.write("\r\x1b[K")
            self._stream.flush()
