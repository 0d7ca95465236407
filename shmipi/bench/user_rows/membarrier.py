"""What membarrier() costs, with another CPU that computes in the same address space."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from shmipi import _core
from shmipi.bench.user_rows.base import Took, UserRow
from shmipi.bench.user_rows.tlb import Busy
from shmipi.users import tlb
from shmipi.users.membarrier import (
    MEMBARRIER_CMD_PRIVATE_EXPEDITED,
    MEMBARRIER_CMD_REGISTER_PRIVATE_EXPEDITED,
    membarrier,
)

if TYPE_CHECKING:
    from shmipi.bench.runner import Rig


class Membarrier(UserRow):
    """PRIVATE_EXPEDITED: one interrupt to the CPU that computes."""

    what = "membarrier(PRIVATE_EXPEDITED)"
    state = "running"
    beside = "membarrier"

    def prepare(self, rig: Rig) -> None:
        """Make the address space."""
        self.mm = rig.cluster.users.tlb.mm("bench.membarrier")
        self.at = self.mm.mmap(tlb.PAGE_SIZE)
        self.stop = rig.cluster.shared("bench.tlb.stop", "i8", 1)

    def block(self, rig: Rig, calls: int, warmup: int, gap_ns: int) -> Took:
        """Call it again and again."""
        busy = Busy(rig, self.mm, self.at, 1, self.stop)
        try:
            took: _core.Hist = rig.run(0, barriers, self.mm, calls, warmup, gap_ns)
        finally:
            busy.end()
        return took

    def finish(self, rig: Rig) -> None:
        """Free it."""
        self.mm.exit_mmap()


def barriers(mm: tlb.Mm, calls: int, warmup: int, gap_ns: int) -> _core.Hist:
    """Task: clock each membarrier()."""
    took, clock = _core.Hist(), time.perf_counter_ns
    tlb.use_mm(mm)
    membarrier(MEMBARRIER_CMD_REGISTER_PRIVATE_EXPEDITED)
    for number in range(-warmup, calls):
        _core.bench_await(1, _core.RUNNING, gap_ns)
        begun = clock()
        membarrier(MEMBARRIER_CMD_PRIVATE_EXPEDITED)
        if number >= 0:
            took.record(clock() - begun)
    return took


def rows() -> list[UserRow]:
    """Return the row."""
    return [Membarrier()]
