"""BPF's cpumap: packets redirected to other CPUs (``kernel/bpf/cpumap.c``).

Each entry of a map is a CPU with a bounded ring (the kernel's ``ptr_ring``) and a
kernel thread that empties it. A CPU collects packets for an entry in a bulk of 8, puts
a bulk into the ring when it is full, and at the end of a poll (``flush``) wakes the
threads: one wake-up for each entry, however many packets. A full ring drops what comes,
and counts.

::

    on the host:  map = cluster.users.cpumap.create("eth0")
                  map.update_elem(1, 192)
    on a CPU:     map.enqueue(1, flow, data); ...; map.flush()

It is made by name on the host, found by name on CPUs (``cpu_map(name)``), and may be
sent in a closure or an argument. Every packet is accounted for: in = delivered +
dropped + died (in the hand of a CPU that was killed) + queued.

An entry may have a program, which its thread runs on each packet before it is
delivered, with softirqs disabled (``cpu_map_bpf_prog_run``)::

    def program(flow: int, data: int) -> int:
        if data > 1500:
            return XDP_DROP
        return XDP_PASS if flow % 2 else bpf_redirect_map(cpu_map("eth0"), 2)

    map.update_elem(1, 192, prog=program)

What is redirected has left this entry, and is handed in once more at the other. What
a program raises is reported (``sys.unraisablehook``), and drops the packet as aborted.
"""

from __future__ import annotations

import errno
import itertools
import pickle
from collections.abc import Callable
from typing import Any, Final, NamedTuple

import numpy as np

from shmipi import _core
from shmipi.errors import ArenaFullError
from shmipi.machine import arrays, byvalue
from shmipi.machine.arrays import Arrays, SharedArray
from shmipi.users import net
from shmipi.users.state import state

__all__ = [
    "BPF_ANY",
    "BPF_EXIST",
    "BPF_NOEXIST",
    "CPU_MAP_BULK_SIZE",
    "XDP_ABORTED",
    "XDP_DROP",
    "XDP_PASS",
    "XDP_REDIRECT",
    "BoundCpumap",
    "CpuMap",
    "CpuMapStats",
    "bpf_redirect_map",
    "cpu_map",
    "cpu_map_delete_elem",
    "cpu_map_enqueue",
    "cpu_map_flush",
    "cpu_map_lookup_elem",
    "cpu_map_update_elem",
]

BPF_ANY: Final = 0
BPF_NOEXIST: Final = 1
BPF_EXIST: Final = 2
CPU_MAP_BULK_SIZE: Final = 8
# enum xdp_action
XDP_ABORTED: Final = 0
XDP_DROP: Final = 1
XDP_PASS: Final = 2
XDP_REDIRECT: Final = 4

_KIND: Final = "cpumap"
_PROG: Final = "cpumap_prog"
_PROG_BYTES: Final = 16384
_STATE_BYTES: Final = 8 + 16 * 8
_EALREADY: Final = -114
_ENOENT: Final = -2


class CpuMapStats(NamedTuple):
    """Counts of a map, of all its entries together."""

    in_: int  #: packets handed in
    delivered: int
    dropped: int  #: full ring, or an entry that ended without a CPU to empty it
    died: int  #: in the hand of a CPU that was killed: may or may not be delivered
    queued: int  #: in bulks and rings now
    flushes: int  #: of bulks into rings
    wakes: int  #: wake_up_process
    sleeps: int  #: of the threads
    runs: int  #: of the threads' steps
    entries: int  #: in the map, or about to end
    xdp_pass: int  #: verdicts of programs: delivered
    xdp_drop: int  #: dropped, also for want of room where it was redirected to
    xdp_redirect: int  #: delivered to another entry, where it is handed in
    xdp_aborted: int  #: dropped: the program raised, or returned no verdict


class CpuMap:
    """A map of CPUs with rings, in the machine's shared memory."""

    def __init__(self, memory: SharedArray) -> None:
        self._memory = memory
        self._home = arrays.home_of(memory)
        self._machine: _core.Machine = self._home.machine
        self._at = self._machine.offset_of(memory.__array_interface__["data"][0])
        self.name = memory._key[1] if memory._key is not None else "?"
        self._made: dict[int, int] = {}  # entries by size, of which this knows
        # The core's own: nothing but the map's place is added.
        self._enqueue = self._machine.cpumap_enqueue
        self._generate = self._machine.cpumap_generate

    def __reduce__(self) -> Any:
        return type(self), (self._memory,)

    def __repr__(self) -> str:
        return f"<CpuMap {self.name!r}>"

    @classmethod
    def make(cls, home: Arrays, name: str, max_entries: int | None) -> CpuMap:
        """Return the map ``name``, made if it is new: what ``create`` calls."""
        machine = home.machine
        most = machine.ncpus if max_entries is None else max_entries
        if most <= 0:
            net.refuse(-22, f"max_entries is {most}: give 1 to {machine.ncpus}")
        if most > machine.ncpus:
            net.refuse(-7, f"max_entries is {most}: there are {machine.ncpus} CPUs")
        net.make(home)
        state(home, "cpumap", _STATE_BYTES)
        made = cls(home.make(_KIND, name, "u1", machine.cpumap_bytes(most)))
        done = machine.cpumap_init(made._at, most)
        if done < 0:
            net.refuse(done, f"cpumap {name!r} cannot be made")
        return made

    def update_elem(
        self,
        cpu: int,
        qsize: int,
        flags: int = BPF_ANY,
        *,
        prog: Callable[[int, int], int] | None = None,
    ) -> None:
        """Give ``cpu`` a ring of ``qsize`` packets and a thread; 0 deletes.

        ``prog(flow, data)`` says what becomes of each packet: ``XDP_PASS``,
        ``XDP_DROP``, ``bpf_redirect_map(...)``; it is sent once, pickled.
        One that it had is replaced: its thread empties its ring and ends. Raises
        ``SteeringError`` with the kernel's errno: EINVAL (flags), E2BIG (no such key),
        EEXIST (``BPF_NOEXIST``: an array's entries all exist), EOVERFLOW (more than
        16384), ENODEV (no such CPU); ``ArenaFullError`` (E2BIG) for a program of more
        than 16 KiB. ``cpu_map_update_elem``.
        """
        if prog is not None and not callable(prog):
            raise TypeError(f"prog is {prog!r}: give a function of a flow and its data")
        machine, at = self._machine, self._at
        if cpu < 0 or qsize < 0 or flags < 0:
            net.refuse(-22, f"cpumap {self.name!r}: numbers are not negative", cpu)
        done = machine.cpumap_check(at, cpu, qsize, flags)
        if done < 0:
            net.refuse(done, f"cpumap {self.name!r} takes no CPU {cpu}, {qsize}", cpu)
        if qsize == 0:
            machine.cpumap_delete(at, cpu)
            return
        blob = b"" if prog is None else byvalue.dumps(prog)
        if len(blob) > _PROG_BYTES:
            raise ArenaFullError(
                f"a program is at most {_PROG_BYTES} bytes pickled, not {len(blob)}",
                errno=errno.E2BIG,
            )
        while (entry := machine.cpumap_claim(at, qsize)) == _ENOENT:
            self._add(qsize)
        if entry < 0:
            net.refuse(entry, f"cpumap {self.name!r} has no room for an entry", cpu)
        if blob:  # nobody reads it now: the entry is claimed
            memory = self._home.make(_PROG, str(entry), "u1", _PROG_BYTES)
            memory[: len(blob)] = np.frombuffer(blob, "u1")
        done = machine.cpumap_install(at, cpu, entry, qsize, bool(blob))
        if done < 0:
            net.refuse(done, f"cpumap {self.name!r}: no thread for CPU {cpu}", cpu)

    def _add(self, qsize: int) -> None:
        """Make memory for one entry more, of a size that others may use again."""
        machine = self._machine
        size = min(max(256, 1 << (qsize - 1).bit_length()), 16384)
        nbytes = machine.cpumap_entry_bytes(size)
        for number in itertools.count(self._made.get(size, 0)):
            name = f"{self.name}.{size}.{number}"
            memory = self._home.make(_KIND + "_entry", name, "u1", nbytes)
            offset = self._home.offset_of(memory)
            assert offset is not None
            done = machine.cpumap_add(self._at, offset, size)
            self._made[size] = number + 1
            if done == _EALREADY:
                continue  # it was there before
            if done < 0:
                net.refuse(done, f"cpumap {self.name!r} has too many entries that end")
            return

    def delete_elem(self, cpu: int) -> None:
        """Take ``cpu`` off the map; what is in its ring is delivered yet.

        ``SteeringError`` (EINVAL) when there is no such key. ``cpu_map_delete_elem``.
        """
        done = self._machine.cpumap_delete(self._at, cpu) if cpu >= 0 else -22
        if done < 0:
            net.refuse(done, f"cpumap {self.name!r} has no key {cpu}", cpu)

    def lookup_elem(self, cpu: int) -> int | None:
        """Return the size of the ring of ``cpu``, or None."""
        return self._lookup(cpu)[0] or None

    def kthread(self, cpu: int) -> int | None:
        """Return the scheduler's task that empties the ring of ``cpu``, or None."""
        return self._lookup(cpu)[1] or None

    def _lookup(self, cpu: int) -> tuple[int, int]:
        return self._machine.cpumap_lookup(self._at, cpu) if cpu >= 0 else (0, 0)

    def enqueue(self, cpu: int, flow: int, data: int = 0) -> bool:
        """Redirect a packet of this CPU to ``cpu``: into its bulk, see ``flush``.

        False: the map has no such entry, and there is no packet. ``ArenaFullError``
        (ENOBUFS) when all packets of this CPU are on their way. ``cpu_map_enqueue``.
        """
        done = self._enqueue(self._at, cpu, flow, data)
        if done == 0:
            return True
        if done == _ENOENT:
            return False
        net.refuse(done, f"cpumap {self.name!r}", cpu)

    def flush(self) -> int:
        """Put this CPU's bulks into their rings and wake the threads; return how many.

        At the end of a poll (``__cpu_map_flush``): packets wait in bulks until then.
        """
        return self._machine.cpumap_flush(self._at)

    def generate(self, cpu: int, flow: int, count: int) -> int:
        """Redirect ``count`` numbered packets of a flow, with a flush after each 64.

        Returns how many: fewer where all packets of this CPU are on their way, 0 where
        the map has no such entry.
        """
        done = self._generate(self._at, cpu, flow, count)
        return max(done, 0)

    def collect(self) -> None:
        """End entries that were taken off and whose CPU is gone; others end alone."""
        self._machine.cpumap_collect(self._at)

    @property
    def stats(self) -> CpuMapStats:
        """What was counted so far."""
        return CpuMapStats(*self._machine.cpumap_stats(self._at))


# ---- programs ------------------------------------------------------------------------

_programs: dict[tuple[str, int], tuple[int, Callable[[int, int], int]]] = {}
_redirect: list[tuple[CpuMap, int]] = []  # of the program that runs: bpf_redirect_info


def bpf_redirect_map(map: CpuMap, cpu: int, flags: int = XDP_ABORTED) -> int:
    """Return the verdict by which a program hands its packet in at ``cpu``.

    Without such an entry ``flags`` is what it returns: XDP_ABORTED, XDP_DROP, XDP_PASS.
    """
    if map.lookup_elem(cpu) is None:
        return flags & 3
    _redirect[:] = [(map, cpu)]
    return XDP_REDIRECT


def _run(machine: _core.Machine, entry: int, hash: int, data: int) -> int:
    """Run the program of an entry on a packet: by the core, on its CPU."""
    number, key = machine.cpumap_program(entry), (machine.name, entry)
    found = _programs.get(key)
    if found is None or found[0] != number:
        memory = arrays.find(_PROG, str(entry))
        found = _programs[key] = number, pickle.loads(bytes(memory))
    _redirect.clear()
    verdict = found[1](hash, data)
    if verdict in (XDP_PASS, XDP_DROP, XDP_ABORTED):
        return verdict
    if verdict != XDP_REDIRECT or not _redirect:
        raise ValueError(
            f"a program of a cpumap returned {verdict!r}: XDP_PASS, XDP_DROP,"
            " XDP_ABORTED, or what bpf_redirect_map() gives"
        )
    map, cpu = _redirect[0]
    try:
        return XDP_REDIRECT if map.enqueue(cpu, hash, data) else XDP_DROP
    except ArenaFullError:
        return XDP_DROP


class BoundCpumap:
    """``cluster.users.cpumap``."""

    def __init__(self, home: Arrays) -> None:
        self._home = home

    def create(self, name: str, max_entries: int | None = None) -> CpuMap:
        """Return the map ``name`` of this machine, made if it is new.

        ``max_entries``: keys 0 to that - 1, None: of each CPU. ``SteeringError``:
        EINVAL (0), E2BIG (more than there are CPUs), EMFILE (16 maps are there).
        """
        return CpuMap.make(self._home, name, max_entries)

    def flow(self, hash: int) -> net.Flow:
        """Return what became of the packets of a flow."""
        return net.flow(hash, self._home.machine)


def cpu_map(name: str) -> CpuMap:
    """Return the machine's map made by ``cluster.users.cpumap.create(name)``.

    ``KeyError`` when there is none, ``NoMachineError`` outside a machine.
    """
    try:
        return CpuMap(arrays.find(_KIND, name))
    except KeyError:
        raise KeyError(
            f"there is no cpumap {name!r}: make it with"
            f" cluster.users.cpumap.create({name!r})"
        ) from None


def cpu_map_update_elem(
    map: CpuMap,
    cpu: int,
    qsize: int,
    flags: int = BPF_ANY,
    *,
    prog: Callable[[int, int], int] | None = None,
) -> None:
    """As ``map.update_elem``."""
    map.update_elem(cpu, qsize, flags, prog=prog)


def cpu_map_delete_elem(map: CpuMap, cpu: int) -> None:
    """As ``map.delete_elem``."""
    map.delete_elem(cpu)


def cpu_map_lookup_elem(map: CpuMap, cpu: int) -> int | None:
    """As ``map.lookup_elem``."""
    return map.lookup_elem(cpu)


def cpu_map_enqueue(map: CpuMap, cpu: int, flow: int, data: int = 0) -> bool:
    """As ``map.enqueue``."""
    return map.enqueue(cpu, flow, data)


def cpu_map_flush(map: CpuMap) -> int:
    """As ``map.flush``."""
    return map.flush()
