"""Block requests a second, completed by another CPU's interrupt."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from shmipi import _core
from shmipi.bench.user_rows.base import Took, UserRow
from shmipi.users import blk

if TYPE_CHECKING:
    from shmipi.bench.runner import Rig

_BATCH = 50  # tags at a time
_ROUNDS = 100


def requests(batches: int) -> list[float]:
    """Task: CPU 1's requests, their interrupts here; ns of each, by batch."""
    machine = _core.current_machine()
    took = []
    for _ in range(batches):
        begin = time.perf_counter_ns()
        for _ in range(_ROUNDS):
            _core.smp_call_function_single(1, _submit, None, True)
            blk.interrupt(_BATCH)
            while machine.blk_counts(1)[9]:
                pass
        took.append((time.perf_counter_ns() - begin) / (_ROUNDS * _BATCH))
    return took


def _submit(info: None) -> None:
    blk.end()
    for _ in range(_BATCH):
        blk.submit()


class Requests(UserRow):
    """Submitted on CPU 1, interrupts on CPU 0, completed on CPU 1."""

    what = "block requests completed on their CPU"
    flavour = "python"
    state = "polling"
    raw = "nowait"
    at_most = None
    rate = True

    def prepare(self, rig: Rig) -> None:
        """Have a device."""
        rig.cluster.users.blk.set()

    def block(self, rig: Rig, calls: int, warmup: int, gap_ns: int) -> Took:
        """Complete requests."""
        took: list[float] = rig.run(0, requests, max(3, calls // 2000))
        return took

    def finish(self, rig: Rig) -> None:
        """Leave no request behind."""
        rig.run(1, _rest)


def _rest() -> None:
    while blk.interrupt() + len(blk.end()):
        pass


def rows() -> list[UserRow]:
    """Return the rows."""
    return [Requests()]
