"""Packets a second through RPS to the backlog of another CPU."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from shmipi import _core
from shmipi.bench.user_rows.base import PACKETS, PacketRow, UserRow
from shmipi.users import rps

if TYPE_CHECKING:
    from shmipi.bench.runner import Rig

_FLOW = 0x80000FA1
_POLL = 64


def steer(batches: int) -> list[float]:
    """Task: packets to CPU 1, no more at a time than its backlog takes; ns of each."""
    machine = _core.current_machine()
    took = []
    for _ in range(batches):
        first = machine.rps_counts(1)[1]
        begin = time.perf_counter_ns()
        done = 0
        while done < PACKETS:
            if done - (machine.rps_counts(1)[1] - first) < 800:
                done += rps.generate(_FLOW, min(_POLL, PACKETS - done))
        while machine.rps_counts(1)[1] - first < PACKETS:
            pass
        took.append((time.perf_counter_ns() - begin) / PACKETS)
    return took


class Packets(PacketRow):
    """From one CPU to another's backlog, until the protocol has them."""

    what = "RPS, packets steered and delivered"
    least_batches = 3
    calls_per_batch = 1000

    def __init__(self) -> None:
        super().__init__()
        self._ipis = 0

    def prepare(self, rig: Rig) -> None:
        """Steer to CPU 1."""
        rig.cluster.users.rps.set_map([1])

    def send(self, rig: Rig, batches: int) -> list[float]:
        """Hand in."""
        before = rig.cluster.users.rps.stats(0).ipis
        took: list[float] = rig.run(0, steer, batches)
        self._ipis += rig.cluster.users.rps.stats(0).ipis - before
        return took

    def finish(self, rig: Rig) -> None:
        """Steer to nobody."""
        rig.cluster.users.rps.set_map([])

    def extra(self) -> dict[str, Any]:
        """Return the doorbells and the IPIs, rung for or not, for each packet."""
        ipis = self._ipis / max(1, self._packets)
        return {**super().extra(), "ipis_per_packet": ipis}


def rows() -> list[UserRow]:
    """Return the rows."""
    return [Packets()]
