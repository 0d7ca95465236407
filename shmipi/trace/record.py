"""Tracing a machine: on and off while it runs, and what was recorded."""

from __future__ import annotations

import io
import itertools
import json
import os
import threading
import time
import zipfile
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

import numpy as np
from numpy.typing import NDArray

from shmipi import _core
from shmipi.errors import ClusterStateError, TraceFormatError
from shmipi.irq.chips import Chip
from shmipi.machine import rings
from shmipi.machine.arrays import Arrays
from shmipi.trace.events import FOUND, TraceEvent, in_order, with_slot

__all__ = [
    "ENVIRONMENT",
    "KERNEL_EVENTS",
    "Asked",
    "Recorder",
    "RingCount",
    "Trace",
    "Tracing",
    "load",
    "mask_of",
]

#: What `shmipi trace record -- COMMAND` leaves for the machines that it boots.
ENVIRONMENT: Final = "SHMIPI_TRACE"

#: What the kernel has tracepoints for too: ``events="kernel"``.
KERNEL_EVENTS: Final = (
    TraceEvent.csd_queue_cpu,
    TraceEvent.csd_function_entry,
    TraceEvent.csd_function_exit,
    TraceEvent.call_ipi,
    TraceEvent.ipi_send_cpumask,
    TraceEvent.cpumask,
    TraceEvent.reschedule_ipi,
    TraceEvent.irq_work_ipi,
    TraceEvent.wake_idle_without_ipi,
    TraceEvent.vector_entry,
    TraceEvent.vector_exit,
    TraceEvent.cpu_halt,
    TraceEvent.cpu_wake,
    TraceEvent.softirq_raise,
    TraceEvent.softirq_entry,
    TraceEvent.softirq_exit,
    TraceEvent.cpu_online,
    TraceEvent.cpu_offline,
    TraceEvent.cpu_dead,
)
_LAST_S = 0.2  # for a record that is being written when tracing is switched off
_LOOK_S = 0.002
_FORMAT = "shmipi.trace/1"
_ZIP = b"PK\3\4"


@dataclass(frozen=True)
class RingCount:
    """What became of the records of one slot. ``slot``: a CPU, or a host's number."""

    slot: int
    recorded: int
    #: Not there any more (overwritten), or never recorded (a lossless ring was full).
    lost: int


@dataclass
class Trace:
    """What was recorded of a machine, oldest first.

    ``records`` are as ``Cluster.trace_events()`` has them, ``about`` says what the
    numbers in them mean: names of functions and call sites, what each line is for, who
    had which slot. ``lost`` counts, by slot, what is missing: overwritten, dropped, or
    begun by a CPU that died in the middle of it (``torn`` counts these alone).
    """

    records: NDArray[Any]
    about: dict[str, Any]
    lost: dict[int, int] = field(default_factory=dict)
    torn: dict[int, int] = field(default_factory=dict)

    @property
    def ncpus(self) -> int:
        """How many CPUs the machine had."""
        return int(self.about["ncpus"])

    @property
    def complete(self) -> bool:
        """Is nothing missing between the first record and the last?"""
        return not any(self.lost.values())

    def save(self, path: str | Path) -> None:
        """Write it to a file, for ``load()`` and ``shmipi trace export``."""
        about = {
            "format": _FORMAT,
            "about": self.about,
            "lost": {str(slot): lost for slot, lost in self.lost.items()},
            "torn": {str(slot): torn for slot, torn in self.torn.items()},
        }
        with Path(path).open("wb") as file:
            np.savez_compressed(
                file,
                records=self.records,
                about=np.frombuffer(json.dumps(about).encode(), np.uint8),
            )


def load(path: str | Path) -> Trace:
    """Read what ``Trace.save()`` wrote. ``TraceFormatError``."""
    data = Path(path).read_bytes()
    try:
        if not data.startswith(_ZIP):
            raise ValueError("it is a file of another kind, or empty")
        with np.load(io.BytesIO(data), allow_pickle=False) as file:
            about = json.loads(bytes(file["about"]))
            records = file["records"]
        if about["format"] != _FORMAT or records.dtype != FOUND:
            raise ValueError("of another version of shmipi")
        _check_about(about["about"])
        return Trace(
            records,
            about["about"],
            *(
                {int(slot): int(n) for slot, n in about[key].items()}
                for key in ("lost", "torn")
            ),
        )
    except (
        *(ValueError, KeyError, TypeError, AttributeError, OSError, EOFError),
        *(zipfile.BadZipFile, zlib.error),
    ) as error:
        raise TraceFormatError(
            f"{Path(path).name} is no recording of `shmipi trace record`: {error}",
            line=None,
        ) from None


def _check_about(about: dict[str, Any]) -> None:
    """Raise some error unless it is as ``_about`` makes it."""
    parts = (
        [about["machine"], about["controller"], *about["natives"]],
        [name for name in about["names"] if name is not None],
        [word for name, use in about["lines"].values() for word in (name, use)],
    )
    numbers = [about["ncpus"], *about["pids"].values()]
    keys = [int(key) for part in ("lines", "pids") for key in about[part]]
    if (
        not all(isinstance(text, str) for part in parts for text in part)
        or not all(type(number) is int for number in numbers)
        or min([*numbers, *keys]) < 0
        or not about["ncpus"]
    ):
        raise ValueError("what it says of its machine is damaged")


class Tracing:
    """The tracepoints of a machine: ``cluster.tracing``.

    Every CPU, and every host, records in a ring of its own. Whether an event is
    recorded is a bit of one word that all of them read: off, a tracepoint is one
    predictable branch.
    """

    def __init__(self, home: Arrays, chip: Chip) -> None:
        self._home = home
        self._machine = home.machine
        self._chip = chip

    def start(
        self,
        records: int | None = None,
        *,
        lossless: bool = False,
        events: str | Iterable[TraceEvent | str] = "kernel",
    ) -> None:
        """Record from now on, on every CPU and host of the machine that runs.

        ``records`` is the size of each ring (a power of two, or the next one; 8,192 of
        32 bytes where nobody says); what other rings hold is lost. A full ring
        overwrites its oldest records; ``lossless``, it records no more until a
        ``recorder()`` has taken some. No CPU ever waits for that. Both are counted.
        ``events``: "kernel" (those that the kernel has), "all" (each step of a call,
        as ``shmipi explain`` shows them), or which.

        Raises ``ArenaFullError`` when /dev/shm is full, ``ClusterStateError`` while a
        recorder takes what rings of another size hold, ``ValueError``, ``TypeError``.
        """
        mask = mask_of(events)
        self.prepare(records)
        self._machine.set_trace_lossless(bool(lossless))
        self._machine.set_tracing(mask)

    def prepare(self, records: int | None = None) -> None:
        """Make the rings, see ``start()``, and leave what is recorded as it is."""
        if records is not None or self._machine.trace_rings() is None:
            size = rings.check_records(rings.RECORDS if records is None else records)
            rings.make(self._home, size)

    def stop(self) -> None:
        """Record nothing more. What was recorded stays readable."""
        self._machine.set_tracing(0)

    @property
    def on(self) -> bool:
        """Is anything recorded now?"""
        return self._machine.tracing() != 0

    @property
    def events(self) -> tuple[str, ...]:
        """The names of the events that are recorded now."""
        mask = self._machine.tracing()
        return tuple(
            name for n, name in enumerate(_core.TRACE_EVENTS) if n and mask >> n & 1
        )

    @property
    def size(self) -> int:
        """Records of each ring; 0: there are none yet."""
        return (self._machine.trace_rings() or (0,))[0]

    @property
    def lossless(self) -> bool:
        """Does a full ring keep what it has?"""
        found = self._machine.trace_rings()
        return found is not None and found[1]

    def counts(self) -> list[RingCount]:
        """Return what each slot has recorded since the rings were made."""
        found = self._machine.trace_rings()
        if found is None:
            return []
        size, _ = found
        counts = []
        for slot in range(self._machine.nslots):
            head, dropped, tail = self._machine.trace_head(slot)
            overwritten = max(0, head - size - tail)
            counts.append(RingCount(slot, head, overwritten + dropped))
        return counts

    def read(self) -> Trace:
        """Return what the rings hold now; it stays there, also while CPUs record."""
        drained = _Drain(self._machine, self._chip, from_start=True)
        drained.look(final=True)
        return drained.trace()

    def recorder(self, *, from_start: bool = False) -> Recorder:
        """Take everything that is recorded from now on: one at a time in a machine.

        ``with cluster.tracing.recorder() as recorder: ...``; then ``recorder.trace``.
        ``from_start``: also what the rings hold already. Raises ``ClusterStateError``
        when there are no rings, or somebody has one.
        """
        return Recorder(self._machine, self._chip, from_start=from_start)


def mask_of(events: str | Iterable[TraceEvent | str]) -> int:
    """Return events as bits, see ``Tracing.start``. ``ValueError``."""
    every = range(1, len(_core.TRACE_EVENTS))
    if events == "all":
        return sum(1 << n for n in every)
    if events == "kernel":
        chosen: Iterable[TraceEvent | str] = KERNEL_EVENTS
    elif isinstance(events, str):
        chosen = events.split(",")
    else:
        chosen = events
    mask = 0
    for event in chosen:
        name = event.name if isinstance(event, TraceEvent) else str(event)
        if name not in TraceEvent.__members__ or name == "none":
            raise ValueError(
                f"there is no event {name!r}: give 'kernel', 'all', or names of"
                " shmipi.TraceEvent"
            )
        mask |= 1 << TraceEvent[name]
    if mask >> TraceEvent.ipi_send_cpumask & 1:
        mask |= 1 << TraceEvent.cpumask  # which CPUs: without it the event is none
    if not mask:
        raise ValueError("no event is named: stop() records none")
    return mask


class _Drain:
    """Takes records out of the rings of a machine, in the order of each ring."""

    def __init__(
        self, machine: _core.Machine, chip: Chip, *, from_start: bool = False
    ) -> None:
        self.machine = machine
        self._chip = chip
        heads = [machine.trace_head(slot) for slot in range(machine.nslots)] * (
            machine.trace_rings() is not None
        )
        self.at = [0 if from_start else head for head, _, _ in heads]
        self._dropped = [0 if from_start else dropped for _, dropped, _ in heads]
        self._parts: list[NDArray[Any]] = []
        self._lost = [0] * len(heads)
        self._torn = [0] * len(heads)
        self._who: dict[int, int] = {}

    def look(self, *, final: bool = False, take: bool = False) -> bool:
        """Take what is there. True: all that was begun is finished, and taken."""
        whole = True
        for slot, at in enumerate(self.at):
            raw, after, lost, torn = self.machine.trace_take(slot, at, final)
            self.at[slot] = after
            self._lost[slot] += lost
            self._torn[slot] += torn
            if raw:
                self._parts.append(with_slot(slot, raw))
                pid = self.machine.slot(slot).pid
                if pid:
                    self._who[slot] = pid
            if take and after != at:
                self.machine.set_trace_tail(slot, after)
            whole &= after == self.machine.trace_head(slot)[0]
        return whole

    def trace(self) -> Trace:
        machine = self.machine
        lost = {}
        for slot, before in enumerate(self._dropped):
            lost[slot] = self._lost[slot] + machine.trace_head(slot)[1] - before
        return Trace(
            in_order(self._parts),
            _about(machine, self._chip, self._who, bool(self.at)),
            {slot: n for slot, n in lost.items() if n},
            {slot: n for slot, n in enumerate(self._torn) if n},
        )


def _about(
    machine: _core.Machine, chip: Chip, who: Mapping[int, int], has_rings: bool
) -> dict[str, Any]:
    lines = chip.lines(machine.ncpus)
    return {
        "machine": machine.name,
        "ncpus": machine.ncpus,
        "nslots": machine.nslots,
        "controller": machine.chip,
        "names": machine.trace_names() if has_rings else [],
        "natives": list(_core.native_names()),
        "lines": {str(line.number): [line.name, line.use] for line in lines},
        "pids": {
            str(machine.ncpus): machine.host_pid,
            str(machine.ncpus + 1): machine.firmware_pid,
            **{str(slot): pid for slot, pid in who.items()},
        },
        "clock": _core.clock_source(),
        "version": _core.ABI,
    }


class Recorder:
    """Takes what a machine records while it records, so that rings never fill."""

    def __init__(
        self, machine: _core.Machine, chip: Chip, *, from_start: bool = False
    ) -> None:
        self._machine = machine
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._trace: Trace | None = None
        if machine.trace_rings() is None:
            raise ClusterStateError(
                "nothing is recorded in this machine: tracing.start() first"
            )
        if not machine.trace_reader(True):
            raise ClusterStateError("another process records this machine already")
        self._drain = _Drain(machine, chip, from_start=from_start)
        for slot, at in enumerate(self._drain.at):
            machine.set_trace_tail(slot, at)

    def poll(self) -> None:
        """Take what is there now. A lossless ring has room again for as much."""
        self._drain.look(take=True)

    def run(self, interval: float = 0.01) -> None:
        """Take it every ``interval`` seconds, in a thread of this process."""
        self._thread = threading.Thread(
            target=self._loop, args=(interval,), name="shmipi-trace", daemon=True
        )
        self._thread.start()

    def _loop(self, interval: float) -> None:
        while not self._stop.wait(interval):
            self.poll()

    def finish(self) -> Trace:
        """Stop, and return everything since it was made. Switches nothing off."""
        if self._trace is not None:
            return self._trace
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
        end = time.monotonic() + _LAST_S
        while not self._drain.look(take=True) and time.monotonic() < end:
            if self._machine.tracing():
                break  # it goes on: there is no last one to wait for
            time.sleep(_LOOK_S)
        else:
            self._drain.look(final=True, take=True)
        self._trace = self._drain.trace()
        self._machine.trace_reader(False)
        return self._trace

    @property
    def trace(self) -> Trace:
        """What was recorded, once it has finished."""
        return self.finish()

    def __enter__(self) -> Self:
        self.run()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.finish()


# ---- for machines that another program boots -----------------------------------------


@dataclass(frozen=True)
class Asked:
    """What the environment asks of a machine that boots: to be recorded in a file."""

    path: str
    records: int
    events: str

    def as_text(self) -> str:
        """Return it for ``ENVIRONMENT``."""
        return json.dumps([self.path, self.records, self.events])

    @classmethod
    def here(cls) -> Asked | None:
        """Return what is asked of this process, or None."""
        try:
            path, records, events = json.loads(os.environ[ENVIRONMENT])
            return cls(str(path), rings.check_records(records), str(events))
        except (KeyError, ValueError, TypeError):
            return None

    def begin(self, tracing: Tracing) -> Recorder:
        """Record a machine that has just booted, from its boot on."""
        recorder = tracing.recorder(from_start=True)
        tracing.start(lossless=True, events=self.events)
        recorder.run()
        return recorder

    def end(self, recorder: Recorder) -> None:
        """Write the file: of a second machine with a number behind its name."""
        trace = recorder.finish()
        for number in itertools.count(1):
            path = Path(self.path if number == 1 else f"{self.path}.{number}")
            try:
                path.touch(exist_ok=False)
            except FileExistsError:
                continue
            trace.save(path)
            return
