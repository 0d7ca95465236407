"""How soon the death of a CPU is told to who waits for it."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Final

import psutil

from shmipi import smp
from shmipi.bench import option
from shmipi.bench.runner import Seen, Steps, Watch, machine_facts, median
from shmipi.cluster import Cluster
from shmipi.errors import CpuDiedError
from shmipi.irq.chips import Chip
from shmipi.machine import topology
from shmipi.names import IDLE_POLICIES
from shmipi.report.cells import Table, span

__all__ = ["EXAMPLE", "HELP", "SIZES", "Options", "run", "senders", "table"]

HELP = """\
CPUs broadcast, so that the reaper has calls of each to look through. Then one after the
other runs a task that the host waits for, is killed, and booted anew."""
EXAMPLE = """\
shmipi bench death
shmipi bench death --cpus 1024"""

#: CPUs of the machines by default.
SIZES: Final = (16, 256)
_PAGE: Final = 4096
_WAIT_S: Final = 60.0


@dataclass(frozen=True)
class Options:
    """What to measure: ``calls`` deaths in a machine of each of ``sizes`` CPUs."""

    sizes: Sequence[int] = option.sizes(SIZES)
    calls: int = option.calls(5, "CPUs killed, one after the other", like="", most=1000)
    idle: str = option.choice("idle", IDLE_POLICIES, "halt", "what an idle CPU does")
    doorbell: str = option.doorbell()
    cores: str | Sequence[int] = option.cores()
    controller: str | type[Chip] = option.controller()


def senders(ncpus: int, available: int) -> int:
    """Return how many CPUs may broadcast, with so many bytes of memory available.

    Who takes a call looks into a page of its sender's, and no two senders' lie near: a
    page of page tables for each pair, half of the memory at most.
    """
    return max(1, min(ncpus, available // 2 // (_PAGE * ncpus)))


def run(
    options: Options, progress: Callable[[str], None] | None = None
) -> dict[str, Any]:
    """Measure what deaths cost and return the document of ``bench death``.

    ``told_s`` is the median, ``told_max_s`` the longest, from the signal that killed a
    CPU until the host, which waited for its task, was told. Before it ``broadcasters``
    CPUs, all if memory allows, have broadcast all at once, which took ``broadcast_s``.

    Raises what a boot raises.
    """
    rows: list[dict[str, Any]] = []
    steps = Steps(progress, len(options.sizes))
    for size in options.sizes:
        steps(f"{size} CPUs")
        with Cluster(
            size,
            idle=options.idle,
            doorbell=options.doorbell,
            controller=options.controller,
            cores=options.cores,
        ) as cluster:
            count = senders(size, psutil.virtual_memory().available)
            noop = smp.NativeHandler("noop")
            started = time.perf_counter()
            cluster.run(smp.on_each_cpu, noop, None, True, cpus=range(count))
            took = time.perf_counter() - started
            seen = Seen()
            with Watch(topology.usable_cores(), seen):
                told = [_death(cluster, -1 - n % size) for n in range(options.calls)]
            rows.append(
                {
                    "bench": "death",
                    "ncpus": size,
                    "kills": len(told),
                    "told_s": median(told),
                    "told_max_s": max(told),
                    "broadcasters": count,
                    "broadcast_s": took,
                    "idle": options.idle,
                    "doorbell": options.doorbell,
                    "controller": cluster.controller,
                    # To kill one and to start it anew: its task, and its start.
                    **seen.ending(2 * len(told), seen.why(None)),
                }
            )
    return {"bench": "death", "machine": machine_facts(), "rows": rows}


def _death(cluster: Cluster, number: int) -> float:
    """Kill a CPU, counted from the last, in its task: seconds until that is told."""
    cpu = number % len(cluster.cpus)
    task = cluster.start(time.sleep, _WAIT_S, cpus=[cpu])
    deadline = time.monotonic() + _WAIT_S
    while cluster.cpus[cpu].state != "running" and time.monotonic() < deadline:
        time.sleep(0.001)
    victim = cluster.cpus[cpu].pid
    time.sleep(0.02)  # until the machine has nothing else to do
    killed = time.perf_counter()
    os.kill(victim, signal.SIGKILL)
    with suppress(CpuDiedError):
        task.results(_WAIT_S)
    told = time.perf_counter() - killed
    cluster.online(cpu)
    return told


def table(result: dict[str, Any]) -> Table:
    """Return the document as a table for people."""
    rows = [
        [
            str(row["ncpus"]),
            span(row["told_s"] * 1e9),
            span(row["told_max_s"] * 1e9),
            str(row["kills"]),
            str(row["broadcasters"]),
            f"{row['broadcast_s']:.2f} s",
        ]
        for row in result["rows"]
    ]
    header = ["CPUs", "told after", "longest", "kills", "CPUs that broadcast", "in"]
    return header, rows, []
