"""What a shootdown costs: of 1 and 64 pages, over 2 and 64 CPUs.

Of the kernel's half all CPUs are asked, idle ones too, so it is one broadcast; of an
address space those that run it: there one CPU computes in it, as beside it a thread
does in a process whose main thread calls mprotect().
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from shmipi import _core
from shmipi.bench.user_rows.base import Took, UserRow
from shmipi.machine.arrays import SharedArray, shared
from shmipi.users import tlb

if TYPE_CHECKING:
    from shmipi.bench.runner import Rig

_NAME, _STOP = "bench.tlb", "bench.tlb.stop"


class KernelFlush(UserRow):
    """flush_tlb_kernel_range() of idle CPUs."""

    raw = "broadcast"

    def __init__(self, pages: int, ncpus: int) -> None:
        self.pages, self.ncpus = pages, ncpus
        self.what = f"flush_tlb_kernel_range, {pages} page{'s' * (pages > 1)}"
        if ncpus > 2:
            self.share = 0.1

    def prepare(self, rig: Rig) -> None:
        """Make the memory."""
        assert rig.cluster.users.tlb

    def block(self, rig: Rig, calls: int, warmup: int, gap_ns: int) -> Took:
        """Flush again and again."""
        took: _core.Hist = rig.run(0, kernel_flushes, self.pages, calls, warmup, gap_ns)
        return took


class Shootdown(UserRow):
    """mprotect() of pages that another CPU, which computes, has in its TLB."""

    state = "running"

    def __init__(self, pages: int) -> None:
        self.pages = pages
        self.what = f"mprotect, {pages} page{'s' * (pages > 1)}"
        self.beside = "mprotect" if pages == 1 else "mprotect64"

    def prepare(self, rig: Rig) -> None:
        """Make the address space."""
        self.mm = rig.cluster.users.tlb.mm(f"{_NAME}.{self.pages}")
        self.at = self.mm.mmap(self.pages * tlb.PAGE_SIZE)
        self.stop = rig.cluster.shared(_STOP, "i8", 1)

    def block(self, rig: Rig, calls: int, warmup: int, gap_ns: int) -> Took:
        """Narrow and widen the rights; the narrowing is clocked."""
        with_busy = Busy(rig, self.mm, self.at, self.pages, self.stop)
        try:
            took: _core.Hist = rig.run(
                0, narrowings, self.mm, self.at, self.pages, calls, warmup, gap_ns
            )
        finally:
            with_busy.end()
        return took

    def finish(self, rig: Rig) -> None:
        """Free the pages."""
        self.mm.exit_mmap()


class Busy:
    """CPU 1 computes in an address space, in the place of the rig's busy task."""

    def __init__(
        self, rig: Rig, mm: tlb.Mm, at: int, pages: int, stop: SharedArray
    ) -> None:
        self._stop, self._rig = stop, rig
        stop[0] = 0
        rig.flags[0] = 1  # the rig's own ends
        self._job: Any = rig.start(1, busy_in, mm, at, pages)
        end = time.monotonic() + 5
        while not stop[0] and time.monotonic() < end:
            time.sleep(0.001)

    def end(self) -> None:
        """Let it go."""
        self._stop[0] = 2
        self._job.result()


def busy_in(mm: tlb.Mm, at: int, pages: int) -> None:
    """Task: use the pages until it is told to stop."""
    stop = shared(_STOP)
    tlb.use_mm(mm)
    stop[0] = 1
    while stop[0] == 1:
        for page in range(pages):
            tlb.load(at + page * tlb.PAGE_SIZE)


def kernel_flushes(pages: int, calls: int, warmup: int, gap_ns: int) -> _core.Hist:
    """Task: clock each flush."""
    took, clock = _core.Hist(), time.perf_counter_ns
    start = 0xFFFF_8000_0000_0000
    for number in range(-warmup, calls):
        _core.bench_await(1, _core.HALTED, gap_ns)
        begun = clock()
        tlb.flush_tlb_kernel_range(start, pages)
        if number >= 0:
            took.record(clock() - begun)
    return took


def narrowings(
    mm: tlb.Mm, at: int, pages: int, calls: int, warmup: int, gap_ns: int
) -> _core.Hist:
    """Task: clock each mprotect() that takes rights away."""
    took, clock = _core.Hist(), time.perf_counter_ns
    size = pages * tlb.PAGE_SIZE
    for number in range(-warmup, calls):
        _core.bench_await(1, _core.RUNNING, gap_ns)
        begun = clock()
        mm.mprotect(at, size, tlb.PROT_READ)
        if number >= 0:
            took.record(clock() - begun)
        mm.mprotect(at, size, tlb.PROT_READ | tlb.PROT_WRITE)
    return took


def rows() -> list[UserRow]:
    """Return the rows."""
    return [
        Shootdown(1),
        Shootdown(64),
        *(KernelFlush(pages, ncpus) for ncpus in (2, 64) for pages in (1, 64)),
    ]
