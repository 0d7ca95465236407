"""Looks at machines from outside: which there are, and what a live one is doing.

An inspector must never be able to change a machine, nor to die with it. So it opens the
object for reading, maps nothing (a mapping of a file that somebody truncates is a
SIGBUS, a hole that is looked at becomes a page), registers nowhere, and holds no lock
longer than it takes to try one. What it opened stays readable after the machine's end.
"""

from __future__ import annotations

import fcntl
import os
import time
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Final, Self

import numpy as np
from numpy.typing import NDArray

from shmipi import _core
from shmipi.cpumask import CpuMask
from shmipi.errors import LayoutError
from shmipi.machine import segment
from shmipi.machine.ending import ending
from shmipi.names import DOORBELLS, IDLE

__all__ = [
    "CpuView",
    "Glance",
    "Inspector",
    "IrqView",
    "MachineView",
    "RingsView",
    "RowView",
    "counters_of",
    "irq_area_bytes",
    "irq_views",
    "leftovers",
    "row_views",
]

#: Words for ``enum shi_state``; a rung CPU is a halted one still.
_CPU_STATES: Final = ("offline", "running", "polling", "halted", "halted", "dead")
#: The states of a CPU that runs a handler.
_HANDLER_STATES: Final = {
    _core.HANDLER_IRQ: "irq",
    _core.HANDLER_NMI: "nmi",
    _core.HANDLER_SOFTIRQ: "softirq",
}
#: Words for ``enum shi_machine_state``.
_STATES: Final = ("starting", "booting", "up", "stopping", "dead")
_ABI_BYTES: Final = 16  # magic, ABI, size of the header: the same in every version


def _dtype(fields: tuple[tuple[str, int, int], ...], size: int) -> np.dtype[Any]:
    """Build a dtype from what the core says of a struct; other sizes are text."""
    formats = {2: "<u2", 4: "<u4", 8: "<u8"}
    texts = ("magic", "name", "chip", "task_name", "handler_name")
    return np.dtype(
        {
            "names": [name for name, _, _ in fields],
            "offsets": [offset for _, offset, _ in fields],
            "formats": [
                f"S{length}" if name in texts else formats.get(length, f"V{length}")
                for name, _, length in fields
            ],
            "itemsize": size,
        }
    )


_HEADER: Final = _dtype(_core.HEADER_FIELDS, _core.HEADER_BYTES)
_SLOT: Final = _dtype(_core.SLOT_FIELDS, _core.SLOT_BYTES)


_IRQDESC: Final = _dtype(_core.IRQDESC_FIELDS, _core.IRQDESC_BYTES)
_IRQDOMAIN: Final = _dtype(_core.IRQDOMAIN_FIELDS, _core.IRQDOMAIN_BYTES)

_ROW: Final = np.dtype([("label", "S8"), ("text", "S52"), ("counter", "<u4")])


@dataclass(frozen=True)
class RowView:
    """A row of ``/proc/interrupts`` that the machine's controller has.

    ``counter`` is an index of ``_core.COUNTERS``, or None: its own counts.
    """

    label: str
    text: str
    counter: int | None


def row_views(header: Any) -> list[RowView]:
    """Return the rows that a machine's header names; damaged ones are left out."""
    count = min(int(header["chip_nrows"]), _core.NROWS)
    rows = np.frombuffer(bytes(header["chip_rows"]), _ROW)[:count]
    return [
        RowView(
            _text(row["label"]),
            _text(row["text"]),
            None if row["counter"] >= len(_core.COUNTERS) else int(row["counter"]),
        )
        for row in rows
    ]


@dataclass(frozen=True)
class IrqView:
    """A requested irq: its virq, what it is, and counts of shape (ncpus,)."""

    virq: int
    text: str
    counts: NDArray[np.uint64]


def irq_area_bytes(ncpus: int) -> int:
    """Return the size of what ``irq_views`` wants."""
    counts = ncpus * _core.NLINES * 8
    return _core.IRQ_AREA_BYTES + counts + _core.NR_IRQS * 8 * _mask_words(ncpus)


def _mask_words(ncpus: int) -> int:
    return -(-ncpus // 64)


def irq_views(area: bytes, ncpus: int) -> list[IrqView]:
    """Return the irqs that are requested, or were taken, in a copy of the irq area.

    ``area`` is the area with the counts of lines taken, and the affinities, behind it.
    """
    descs = np.frombuffer(area, _IRQDESC, _core.NR_IRQS, _core.IRQDESC_OFFSET)
    domains = np.frombuffer(area, _IRQDOMAIN, _core.NDOMAINS, _core.IRQDOMAIN_OFFSET)
    owners = np.frombuffer(area, "<u4", _core.NLINES, _core.LINE_VIRQ_OFFSET)
    flat = np.frombuffer(area, "<u8", ncpus * _core.NLINES, _core.IRQ_AREA_BYTES)
    taken = flat.reshape(ncpus, _core.NLINES)
    at, words = _core.IRQ_AREA_BYTES + flat.nbytes, _mask_words(ncpus)
    masks = np.frombuffer(area, np.uint8, _core.NR_IRQS * words * 8, at)
    mine = np.unpackbits(masks.reshape(-1, words * 8), axis=1, bitorder="little")
    lines_of: dict[int, list[int]] = {}
    shared = set()
    for line in np.flatnonzero(owners).tolist():
        virq, several = int(owners[line]), 0
        while 0 < virq < len(descs) and several < len(descs):
            lines_of.setdefault(virq, []).append(line)
            virq, several = int(descs[virq]["next"]), several + 1
        if several > 1:
            shared.add(line)
    views = []
    for virq, lines in sorted(lines_of.items()):
        if not descs[virq]["used"]:
            continue
        desc = descs[virq]
        counts = taken[:, lines].sum(axis=1, dtype=np.uint64)
        if lines[0] in shared:  # of other CPUs it counts another irq
            counts *= mine[virq, :ncpus]
        if not desc["action"] and not counts.any():
            continue
        domain = int(desc["domain"]) - 1
        whose = _text(domains[domain]["name"]) if 0 <= domain < len(domains) else "?"
        span = str(lines[0]) if len(lines) == 1 else f"{lines[0]}-{lines[-1]}"
        text = f"{whose} {span} {_text(desc['name'])}".rstrip()
        views.append(IrqView(virq, text, counts))
    return views


def counters_of(machine: _core.Machine) -> NDArray[np.uint64]:
    """Return what each CPU of a machine that is mapped here has counted.

    Of shape (ncpus, counters), all contexts together.
    """
    slots = np.frombuffer(
        memoryview(machine), _SLOT, machine.ncpus, machine.slot_offset
    )
    raw = np.ascontiguousarray(slots["counters"]).view("<u8")
    rows = raw.reshape(machine.ncpus, _core.CONTEXTS, _core.COUNTER_ROOM)
    counts: NDArray[np.uint64] = rows.sum(axis=1)
    return counts


def header_of(machine: _core.Machine) -> Any:
    """Return a copy of the header of a machine that is mapped here."""
    return np.frombuffer(bytes(memoryview(machine)[: _HEADER.itemsize]), _HEADER)[0]


@dataclass(frozen=True)
class CpuView:
    """A CPU as it was when looked at, see ``Cluster.cpus``; None is for none.

    ``ended`` says how the process of a dead one did.
    """

    id: int
    pid: int
    core: int
    state: str
    generation: int
    idle: str
    queued: bool  #: calls are queued that it has not taken yet
    task: str | None  #: name of the task that it runs
    waits_for: int | None  #: the CPU whose answer it waits for
    handler: str | None = None  #: name of the handler that it runs
    since: float | None = None  #: for how long, in seconds
    ended: str | None = None


@dataclass(frozen=True)
class MachineView:
    """A machine as it was when looked at.

    ``uptime_s`` is in seconds, ``memory_bytes`` what its object takes of /dev/shm.
    ``kick_signal`` is None for cooperative CPUs.
    """

    name: str
    state: str
    ncpus: int
    idle: str
    doorbell: str
    controller: str
    kick_signal: int | None
    host_pid: int
    firmware_pid: int
    uptime_s: float
    memory_bytes: int
    cpus: tuple[CpuView, ...]
    attached: tuple[int, ...] = ()  #: pids of the hosts that are attached to it

    @property
    def online(self) -> CpuMask:
        """The CPUs that are online."""
        return CpuMask(
            cpu.id for cpu in self.cpus if cpu.state not in ("offline", "dead")
        )


@dataclass(frozen=True)
class Glance:
    """What the CPUs were doing, and what they had counted, at ``at`` (seconds).

    Cheaper than ``MachineView``: for who looks several times a second. ``counters`` has
    shape (CPUs, counters), in the order of ``_core.COUNTERS``.
    """

    at: float
    states: list[str]
    cores: list[int]
    tasks: list[str | None]
    handlers: list[str | None]
    waits_for: list[int | None]
    counters: NDArray[np.uint64]


@dataclass(frozen=True)
class RingsView:
    """The rings of a machine's tracepoints: ``size`` records each, the newest kept."""

    fd: int
    at: int
    size: int
    nslots: int
    events: int  #: what is recorded, a bit each
    ns_per_stamp: float

    @property
    def end(self) -> int:
        """Where they end in the object."""
        return self._records + self.nslots * self.size * _core.TRACE_RECORD_BYTES

    @property
    def _records(self) -> int:
        heads = self.nslots * _core.TRACE_HEAD_BYTES
        return self.at + _core.TRACE_AREA_BYTES + heads

    def heads(self) -> NDArray[np.int64]:
        """Return how many records each slot has begun."""
        at = self.at + _core.TRACE_AREA_BYTES
        data = os.pread(self.fd, self.nslots * _core.TRACE_HEAD_BYTES, at)
        heads: NDArray[np.int64] = np.frombuffer(data, "<i8")
        return heads[:: _core.TRACE_HEAD_BYTES // 8].copy()

    def records(self, slot: int, first: int, until: int) -> bytes:
        """Return the bytes of a slot's records from ``first`` on, before ``until``."""
        ring = self._records + slot * self.size * _core.TRACE_RECORD_BYTES
        parts = []
        while first < until:
            at = first % self.size
            count = min(until - first, self.size - at)
            where = ring + at * _core.TRACE_RECORD_BYTES
            parts.append(os.pread(self.fd, count * _core.TRACE_RECORD_BYTES, where))
            first += count
        return b"".join(parts)


class Inspector:
    """Reads a machine of this user by its name; a context manager.

    Raises ``FileNotFoundError`` when there is none of that name, ``LayoutError`` for
    one of another version of shmipi or with a damaged header.
    """

    def __init__(self, name: str) -> None:
        path = segment.SHM / segment.full_name(segment.check_name(name))
        self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        try:
            self._header()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the descriptor; calling it again does nothing."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    @property
    def alive(self) -> bool:
        """Is the machine's lock held by somebody, and its firmware not gone?"""
        if int(self._header()["machine_state"]) == _core.DEAD:
            return False
        try:
            # Only a try, and given back at once: nobody is kept waiting, and an
            # inspector never looks like a process of the machine.
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return True
        fcntl.flock(self._fd, fcntl.LOCK_UN)
        return False

    def view(self) -> MachineView:
        """Return the machine as it is now, or as its end left it. ``LayoutError``."""
        header = self._header()
        slots = self._slots(header)
        ncpus = int(header["ncpus"])
        guests = slots[len(slots) - _core.GUESTS :]
        status = os.fstat(self._fd)
        started = int(header["boot_time_ns"]) / 1e9
        return MachineView(
            name=_text(header["name"]),
            state=_word(_STATES, header["machine_state"]),
            ncpus=ncpus,
            idle=_word(IDLE, slots[0]["idle"]),
            doorbell=_word(DOORBELLS, header["doorbell"]),
            controller=_text(header["chip"]),
            kick_signal=int(header["kick_signal"]) if header["kick"] else None,
            host_pid=int(header["host_pid"]),
            firmware_pid=int(header["firmware_pid"]),
            uptime_s=max(0.0, time.time() - started),
            memory_bytes=status.st_blocks * 512,
            cpus=tuple(_cpu(number, slots[number], header) for number in range(ncpus)),
            attached=tuple(int(slot["pid"]) for slot in guests if slot["pid"]),
        )

    def glance(self) -> Glance:
        """Return what the CPUs do and have counted now. ``LayoutError``."""
        header = self._header()
        ncpus = int(header["ncpus"])
        slots = self._slots(header)[:ncpus]
        raw = np.ascontiguousarray(slots["counters"]).view("<u8")
        rooms = raw.reshape(ncpus, _core.CONTEXTS, _core.COUNTER_ROOM)
        words = zip(
            slots["word"].tolist(),
            slots["handler"].tolist(),
            (slots["cur_csd"] != 0).tolist(),
            strict=True,
        )
        handlers: list[str | None] = [None] * ncpus
        for cpu in np.flatnonzero(slots["handler"]).tolist():
            handlers[cpu] = _text(slots["handler_name"][cpu])
        tasks: list[str | None] = [None] * ncpus
        for cpu in np.flatnonzero(slots["task"]).tolist():
            tasks[cpu] = _text(slots["task_name"][cpu]) or "?"
        waiting = (slots["waiting_for"] & np.uint64(0xFFFF)).tolist()
        return Glance(
            at=time.monotonic(),
            states=[_state(*word) for word in words],
            cores=slots["core"].tolist(),
            tasks=tasks,
            handlers=handlers,
            waits_for=[cpu - 1 if cpu else None for cpu in waiting],
            counters=rooms.sum(axis=1, dtype=np.uint64)[:, : len(_core.COUNTERS)],
        )

    # What trace.counters needs of a machine.

    @property
    def ncpus(self) -> int:
        """How many CPUs the machine has."""
        return int(self._header()["ncpus"])

    def rows(self) -> list[RowView]:
        """Return the rows of its interrupt controller."""
        return row_views(self._header())

    def interrupt_counts(self) -> NDArray[np.uint64]:
        """Return what each CPU counted in them: shape (slots, rows)."""
        raw = np.ascontiguousarray(self._slots(self._header())["rows"])
        counts: NDArray[np.uint64] = raw.view("<u8").reshape(len(raw), _core.NROWS)
        return counts

    def irqs(self) -> list[IrqView]:
        """Return the irqs of its IPI domains. ``LayoutError``."""
        header = self._header()
        ncpus, offset = int(header["ncpus"]), int(header["irq_offset"])
        size = irq_area_bytes(ncpus)
        data = b""
        if offset + size <= os.fstat(self._fd).st_size:
            data = os.pread(self._fd, size, offset)
        if len(data) != size:
            raise LayoutError("the machine's header is damaged: where its irqs lie")
        return irq_views(data, ncpus)

    def counter_rows(self) -> NDArray[np.uint64]:
        """Return the counters now: shape (slots, contexts, counters)."""
        raw = np.ascontiguousarray(self._slots(self._header())["counters"])
        rows: NDArray[np.uint64] = raw.view("<u8").reshape(
            len(raw), _core.CONTEXTS, _core.COUNTER_ROOM
        )
        return rows

    def trace_rings(self) -> RingsView | None:
        """Return the rings of its tracepoints; None: none are recorded. LayoutError."""
        header = self._header()
        at = int.from_bytes(os.pread(self._fd, 8, _core.TRACE_AREA_OFFSET), "little")
        events = int(header["tracing"])
        if not at or not events:
            return None
        nslots = int(header["ncpus"]) + _core.EXTRA_SLOTS
        size = int.from_bytes(os.pread(self._fd, 4, at), "little")
        view = RingsView(self._fd, at, size, nslots, events, _ns_per_stamp(header))
        if size < 2 or size & (size - 1) or view.end > os.fstat(self._fd).st_size:
            raise LayoutError("the machine's header is damaged: where its rings lie")
        return view

    def _header(self) -> Any:
        data = os.pread(self._fd, _HEADER.itemsize, 0)
        if len(data) < _ABI_BYTES or not data.startswith(_core.MAGIC.encode()):
            raise LayoutError("this object is not a machine, or not one yet")
        abi = int.from_bytes(data[8:12], "little")
        if abi != _core.ABI:
            raise LayoutError(
                f"this machine has layout version {abi}, this shmipi reads"
                f" {_core.ABI}: use the shmipi that booted it"
            )
        if len(data) < _HEADER.itemsize:
            raise LayoutError("the machine's header is cut short")
        header = np.frombuffer(data, _HEADER)[0]
        if int(header["header_bytes"]) != _HEADER.itemsize:
            raise LayoutError("the machine's header is not of this build of shmipi")
        if not 1 <= int(header["ncpus"]) <= _core.MAX_CPUS:
            raise LayoutError("the machine's header is damaged: its number of CPUs")
        return header

    def _slots(self, header: Any) -> NDArray[Any]:
        count = int(header["ncpus"]) + _core.EXTRA_SLOTS
        offset, size = int(header["slot_offset"]), count * _SLOT.itemsize
        data = b""
        if offset + size <= os.fstat(self._fd).st_size:
            data = os.pread(self._fd, size, offset)
        if len(data) != size:
            raise LayoutError("the machine's header is damaged: where its slots lie")
        slots: NDArray[Any] = np.frombuffer(data, _SLOT)
        return slots


def _state(word: int, handler: int, busy: bool) -> str:
    """Return what a CPU does; ``busy``: it has a call in hand."""
    state = _word(_CPU_STATES, word & 7)
    if state not in ("dead", "offline") and (handler or busy):
        return _HANDLER_STATES.get(handler, "irq")
    return state


def _cpu(number: int, slot: Any, header: Any) -> CpuView:
    word, kind = int(slot["word"]), int(slot["handler"])
    waiting = int(slot["waiting_for"]) & 0xFFFF
    state = _state(word, kind, bool(slot["cur_csd"]))
    handler, since = None, None
    if state == "dead":
        ended = ending(int(slot["end"])) or None
    else:
        ended = None
        if kind:
            handler = _text(slot["handler_name"])
            begun = _mono_ns(header, int(slot["since"]))
            since = max(0, time.monotonic_ns() - begun) / 1e9
    return CpuView(
        id=number,
        pid=int(slot["pid"]),
        core=int(slot["core"]),
        state=state,
        generation=int(slot["generation"]),
        idle=_word(IDLE, slot["idle"]),
        queued=bool(word >> 32),
        task=(_text(slot["task_name"]) or "?") if slot["task"] else None,
        waits_for=waiting - 1 if waiting else None,
        handler=handler,
        since=since,
        ended=ended,
    )


def _mono_ns(header: Any, stamp: int) -> int:
    """Return the CLOCK_MONOTONIC time of a machine's stamp: as clock.h does it."""
    if not header["clock_source"]:
        return stamp
    passed = stamp - int(header["clock_base_stamp"])
    shift = min(int(header["clock_shift"]), 64)
    return int(header["clock_base_ns"]) + (passed * int(header["clock_mult"]) >> shift)


def _ns_per_stamp(header: Any) -> float:
    if not header["clock_source"]:
        return 1.0
    return float(header["clock_mult"]) / 2.0 ** min(int(header["clock_shift"]), 64)


def _word(words: tuple[str, ...], number: Any) -> str:
    return words[int(number)] if int(number) < len(words) else "?"


def _text(raw: Any) -> str:
    """Text of the segment for a terminal: nothing unprintable gets there."""
    text = bytes(raw).partition(b"\0")[0].decode("utf-8", "replace")
    return "".join(c if c.isprintable() else "?" for c in text)


def _orphan(full: str) -> segment.Found:
    name = full.split(".", 2)[2]
    return segment.Found(name, os.getuid(), segment.SHM / full, None, alive=False)


def leftovers() -> list[segment.Found]:
    """Return what ``segment.clean()`` would remove now: nothing is touched."""
    dead = [found for found in segment.find() if not found.alive]
    return dead + [_orphan(full) for full in sorted(segment.orphans())]
