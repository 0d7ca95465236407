"""What all measurements share: a rig, tasks on it, what was disturbed, and blocks."""

from __future__ import annotations

import itertools
import os
import secrets
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
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
from shmipi.machine.facts import gather, steal_seconds, throttled
from shmipi.names import IDLE
from shmipi.report.table import can_redraw, columns_of

__all__ = [
    "Disturbance",
    "Job",
    "Progress",
    "Rig",
    "Seen",
    "Steps",
    "Watch",
    "choose_cores",
    "core_interrupts",
    "machine_facts",
    "median",
    "middle",
    "next_session",
    "preemptions",
    "silent",
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

#: The rows of /proc/interrupts that are inter-processor interrupts, and what each is
#: called here: x86's reschedule, function call and TLB shootdown, aarch64's first two.
KINDS: Final = ("RES", "CAL", "TLB")
_ROWS: Final = {**{kind: kind for kind in KINDS}, "IPI0": "RES", "IPI1": "CAL"}

#: How long the bar of progress is, and what share says how long the rest takes.
BAR: Final = 20
LEAST_SHARE: Final = 0.02

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
        trace: bool = False,
    ) -> None:
        self.cluster = Cluster(
            len(cores),
            idle="halt",
            doorbell=doorbell,
            controller=controller,
            cores=list(cores),
            kick=kick,
            trace=trace,
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

    @contextmanager
    def in_state(self, cpus: Sequence[int], state: str) -> Iterator[None]:
        """Have CPUs poll, halt, or run Python that takes interrupts; then halt."""
        jobs = []
        if state == "running":
            self.flags[0] = 0
            jobs = [self.start(cpu, tasks.busy, 0) for cpu in cpus]
        else:
            for cpu in cpus:
                self.idle(cpu, "poll" if state == "polling" else "halt")
        try:
            yield
        finally:
            # Ctrl-C may keep this from being ended before the machine is.
            if self.cluster.closed:
                pass
            elif state == "running":
                self.flags[0] = 1
                for job in jobs:
                    job.result()
            else:
                for cpu in cpus:
                    self.idle(cpu, "halt")

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


class Watch:
    """Looks at cores before and after: interrupts, stolen time, a used-up quota.

    Used as a context manager; what it found is added to ``seen``, the interrupts as
    those of targets, but of ``sender``, a core, as the sender's.
    """

    def __init__(
        self, cores: Iterable[int], seen: Seen, *, sender: int | None = None
    ) -> None:
        self._cores, self._seen, self._sending = set(cores), seen, sender

    def _look(self) -> tuple[dict[int, dict[str, int]] | None, float | None, int]:
        cores = self._cores
        return core_interrupts(cores), steal_seconds(cores), throttled()

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
        (ipis, stolen, held), (old, stolen_before, held_before) = (
            self._look(),
            self._before,
        )
        if ipis is not None and old is not None:
            for core, kinds in ipis.items():
                sends = core == self._sending
                counted = seen.sender_real if sends else seen.target_real
                for name, value in kinds.items():
                    counted[name] += value - old[core][name]
        else:
            seen.ipis_known = False
        if stolen is not None and stolen_before is not None:
            seen.stolen_s += stolen - stolen_before
        seen.throttled += max(0, held - held_before)


class Disturbance(Watch):
    """Looks also at CPUs of a rig: preemptions, collections, what the sender counts.

    ``sender`` and ``target`` are CPUs. With ``every`` all CPUs are targets, which may
    push each other off their cores.
    """

    def __init__(
        self,
        rig: Rig,
        target: int,
        seen: Seen,
        *,
        sender: int = 0,
        every: bool = False,
    ) -> None:
        pair = (rig.cores[sender], rig.cores[target])
        super().__init__(
            rig.cores if every else pair, seen, sender=None if every else pair[0]
        )
        self._rig, self._sender = rig, sender
        self._targets = list(range(len(rig.cores))) if every else [target]
        self._alone = not every

    def _cpus(self) -> tuple[int, int, dict[str, int]]:
        pushed = 0
        if self._alone:
            pushed = preemptions(self._rig.ids(self._targets[0])[0])
        collections = int(self._rig.flags[tasks.COLLECTIONS])
        return pushed, collections, self._rig.counters(self._sender)

    def __enter__(self) -> Self:
        self._were = self._cpus()
        return super().__enter__()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        super().__exit__(kind, error, trace)
        seen, (pushed, collections, counters) = self._seen, self._cpus()
        # Up to two are our own: the host runs before and after, and a CPU that polls
        # has to leave it the core for that.
        seen.preempted += max(0, pushed - self._were[0] - 2)
        seen.collections += collections - self._were[1]
        for name, value in counters.items():
            seen.counted[name] += value - self._were[2][name]
        for cpu in self._targets:
            try:
                where = os.sched_getaffinity(self._rig.ids(cpu)[0])
            except OSError:
                continue
            seen.moved |= where != {self._rig.cores[cpu]}


@dataclass
class Seen:
    """What disturbed the blocks of a row, and what its sender counted in them."""

    seconds: float = 0.0
    #: Real inter-processor interrupts that the sender's core took, and the target's.
    sender_real: Counter[str] = field(default_factory=Counter)
    target_real: Counter[str] = field(default_factory=Counter)
    ipis_known: bool = True
    stolen_s: float = 0.0
    preempted: int = 0
    #: Periods in which the control group had used up its quota.
    throttled: int = 0
    #: Garbage collections of the CPUs.
    collections: int = 0
    moved: bool = False
    counted: Counter[str] = field(default_factory=Counter)

    def merged(self, other: Seen) -> Seen:
        """Return what was seen by both."""
        return Seen(
            self.seconds + other.seconds,
            self.sender_real + other.sender_real,
            self.target_real + other.target_real,
            self.ipis_known and other.ipis_known,
            self.stolen_s + other.stolen_s,
            self.preempted + other.preempted,
            self.throttled + other.throttled,
            self.collections + other.collections,
            self.moved or other.moved,
            self.counted + other.counted,
        )

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
        if self.throttled:
            found.append(
                f"the control group was held back in {self.throttled} periods: its"
                " quota was used up"
            )
        if samples is not None and self.preempted > max(2.0, PREEMPTED_SHARE * samples):
            found.append(f"the target was preempted {self.preempted} times")
        return found

    def real(self, ipis: int, *, both: bool = False) -> dict[str, float] | None:
        """Return the real IPIs, by kind, that one of ``ipis`` emulated ones cost.

        x86 counts a TLB shootdown as a function call too: ``CAL`` has those of ``TLB``.
        Those of the targets' cores; with ``both`` also the sender's, which is woken by
        the answer. None where they cannot be counted.
        """
        if not self.ipis_known or ipis <= 0:
            return None
        total = self.target_real + self.sender_real if both else self.target_real
        return {kind: total[kind] / ipis for kind in KINDS}

    def ending(
        self, ipis: int, why: Sequence[str], *, both: bool = False
    ) -> dict[str, Any]:
        """Return how every row of a document ends: what it cost, if it is valid."""
        real = self.real(ipis, both=both)
        row: dict[str, Any] = {
            "real_ipis": real,
            # A shootdown is a function call, and is counted as one too.
            "real_ipis_per_call": None if real is None else real["RES"] + real["CAL"],
            "stolen_s": self.stolen_s,
            "throttled": self.throttled,
            "gc_runs": self.collections,
            "valid": not why,
        }
        if why:
            row["why"] = list(why)
        if real is None:
            row["real_ipis_note"] = (
                "/proc/interrupts cannot be read here or has no rows RES and CAL"
                if ipis
                else "it sends no IPI"
            )
        return row


def core_interrupts(
    cores: Iterable[int], *, proc: Path = Path("/proc")
) -> dict[int, dict[str, int]] | None:
    """Return the inter-processor interrupts that each core took since boot, by kind.

    ``None`` where /proc/interrupts cannot be read or has no such rows.
    """
    try:
        lines = (proc / "interrupts").read_text().splitlines()
    except OSError:
        return None
    columns = {
        word: i for i, word in enumerate(lines[0].split() if lines else (), start=1)
    }
    rows = [
        (kind, words)
        for line in lines[1:]
        if (words := line.split()) and (kind := _ROWS.get(words[0].rstrip(":")))
    ]
    if not rows:
        return None
    found = {core: dict.fromkeys(KINDS, 0) for core in cores}
    try:
        for core, kinds in found.items():
            for kind, words in rows:
                kinds[kind] += int(words[columns[f"CPU{core}"]])
    except (KeyError, IndexError, ValueError):
        return None
    return found


def preemptions(pid: int, *, proc: Path = Path("/proc")) -> int:
    """Return how often a process was pushed off its core; 0 where that is not known."""
    with suppress(OSError, ValueError):
        for line in (proc / str(pid) / "status").read_text().splitlines():
            if line.startswith("nonvoluntary_ctxt_switches:"):
                return int(line.split()[1])
    return 0


# --- progress


class Progress:
    """A line on a terminal's standard error: what is measured, and a bar of how much.

    Nothing where standard error is no terminal.
    """

    def __init__(self, command: str, stream: TextIO | None = None) -> None:
        self._stream = sys.stderr if stream is None else stream
        self._on = can_redraw(self._stream)
        self._command = command
        self._started = time.monotonic()

    def __call__(
        self, text: str, share: float | None = None, keep: bool = False
    ) -> None:
        """Show ``text`` in place of the last, with a bar of the ``share`` that is done.

        With ``keep`` it stays where it is.
        """
        if not self._on:
            return
        # One line of the terminal: what folds is not rubbed out again.
        room = (columns_of(self._stream) or 80) - 1
        line = f"{self._command}: {text}"
        if share is not None:
            line = f"{self._bar(share)} {line}"
        if len(line) > room:
            line = f"{line[: room - 3]}..."
        self._stream.write(f"\r\x1b[K{line}" + ("\n" if keep else ""))
        self._stream.flush()

    def _bar(self, share: float) -> str:
        done = round(min(1.0, max(0.0, share)) * BAR)
        bar = f"[{'#' * done}{'.' * (BAR - done)}] {share:4.0%}"
        took = time.monotonic() - self._started
        if share < LEAST_SHARE or took < 1:
            return bar
        return f"{bar}, {took * (1 - share) / share:.0f} s left"

    def clear(self) -> None:
        """Leave no line behind."""
        if self._on:
            self._stream.write("\r\x1b[K")
            self._stream.flush()


def silent(text: str, share: float | None = None, keep: bool = False) -> None:
    """Show nothing: the progress of who asks for none."""
    del text, share, keep


class Steps:
    """Tells of each of so many steps, and what share of them is done."""

    def __init__(self, tell: Callable[..., None] | None, total: int) -> None:
        self._tell, self._total, self._done = tell, max(1, total), 0

    def __call__(self, text: str) -> None:
        """Tell that the next step begins."""
        if self._tell is not None:
            self._tell(text, share=min(1.0, self._done / self._total))
        self._done += 1

    def keep(self, text: str) -> None:
        """Tell what stays to be read."""
        if self._tell is not None:
            self._tell(text, keep=True)
