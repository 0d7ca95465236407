"""Packets a second through cpumap, and doorbells for each."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from shmipi.bench.user_rows.base import PACKETS, PacketRow, UserRow
from shmipi.users.cpumap import CpuMap, cpu_map

if TYPE_CHECKING:
    from shmipi.bench.runner import Rig

_NAME = "bench.users"
_FLOW = 3001


def redirect(name: str, batches: int) -> list[float]:
    """Task: packets to CPU 1 until all have been delivered; ns of each, by batch."""
    there: CpuMap = cpu_map(name)
    took = []
    for _ in range(batches):
        wanted = there.stats.delivered + PACKETS
        begin = time.perf_counter_ns()
        done = 0
        while done < PACKETS:
            done += there.generate(1, _FLOW, PACKETS - done)
        while there.stats.delivered < wanted:
            pass
        took.append((time.perf_counter_ns() - begin) / PACKETS)
    return took


class Packets(PacketRow):
    """From one CPU to another, until the protocol has them."""

    what = "cpumap, packets redirected and delivered"
    least_rate = 10e6

    def prepare(self, rig: Rig) -> None:
        """Make a map with an entry for CPU 1: no packet is dropped."""
        made = rig.cluster.users.cpumap.create(_NAME)
        made.update_elem(1, 8192)

    def send(self, rig: Rig, batches: int) -> list[float]:
        """Redirect."""
        took: list[float] = rig.run(0, redirect, _NAME, batches)
        return took

    def finish(self, rig: Rig) -> None:
        """End the thread."""
        rig.cluster.users.cpumap.create(_NAME).delete_elem(1)


def rows() -> list[UserRow]:
    """Return the rows."""
    return [Packets()]
