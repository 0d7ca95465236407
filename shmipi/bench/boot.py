"""How fast a machine boots and ends, and what memory each of its CPUs takes."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from shmipi.bench import option
from shmipi.bench.runner import Seen, Steps, Watch, machine_facts
from shmipi.cluster import Cluster
from shmipi.irq.chips import Chip
from shmipi.machine import segment, topology
from shmipi.names import IDLE_POLICIES
from shmipi.report.cells import Table

__all__ = [
    "EXAMPLE",
    "HELP",
    "SIZES",
    "Options",
    "private_kib",
    "run",
    "shared_kib",
    "table",
]

HELP = """\
Each machine is booted once, measured and shut down. Beside it the limit: as many forks
of a warm firmware whose children do nothing."""
EXAMPLE = """\
shmipi bench boot
shmipi bench boot --cpus 4,64
shmipi bench boot --cpus 1024,4096"""

#: CPUs of the machines that are booted by default.
SIZES: Final = (2, 16, 256, 1024)
#: So many CPUs are looked at for their private memory, spread over the machine.
SAMPLE: Final = 32


@dataclass(frozen=True)
class Options:
    """What to boot: a machine for each of ``sizes``."""

    sizes: Sequence[int] = option.sizes(SIZES)
    idle: str = option.choice("idle", IDLE_POLICIES, "halt", "what an idle CPU does")
    doorbell: str = option.doorbell()
    cores: str | Sequence[int] = option.cores()
    controller: str | type[Chip] = option.controller()


def run(
    options: Options, progress: Callable[[str], None] | None = None
) -> dict[str, Any]:
    """Boot machines of ``sizes`` CPUs and return the document of ``bench boot``.

    ``boot_s`` is until every CPU is online, ``shutdown_s`` until every process is gone
    and nothing is left. ``fork_s`` is what as many forks of a firmware take whose
    children are pinned, say so and sleep, and ``exit_s`` their end; ``ratio`` is
    ``boot_s / fork_s``, ``shutdown_ratio`` ``shutdown_s / exit_s``, and ``growth`` and
    ``fork_growth`` are what a CPU, and a fork, takes compared with the row before:
    None in the first. Raises what a boot raises.
    """
    rows: list[dict[str, Any]] = []
    steps = Steps(progress, len(options.sizes))
    for size in options.sizes:
        steps(f"{size} CPUs")
        fork_s, exit_s = forks(size, options)
        seen = Seen()
        started = time.perf_counter()
        with Watch(topology.usable_cores(), seen):
            cluster = Cluster(
                size,
                idle=options.idle,
                doorbell=options.doorbell,
                controller=options.controller,
                cores=options.cores,
            )
            booted = time.perf_counter()
        try:
            step = max(1, size // SAMPLE)
            sample = [cpu.pid for cpu in cluster.cpus[::step]]
            private = [kib for pid in sample if (kib := private_kib(pid)) is not None]
            memory = shared_kib(cluster)
        finally:
            ending = time.perf_counter()
            cluster.shutdown()
        row: dict[str, Any] = {
            "bench": "boot",
            "ncpus": size,
            "boot_s": booted - started,
            "fork_s": fork_s,
            "ratio": (booted - started) / fork_s,
            "shutdown_s": (shutdown_s := time.perf_counter() - ending),
            "exit_s": exit_s,
            "shutdown_ratio": shutdown_s / exit_s,
            "growth": None,
            "fork_growth": None,
            "private_kib_per_cpu": sum(private) / len(private) if private else None,
            "sampled": len(private),
            "shared_kib": memory,
            "idle": options.idle,
            "doorbell": options.doorbell,
            "controller": cluster.controller,
            # A CPU is started by one IPI.
            **seen.ending(size, seen.why(None)),
        }
        if not private:
            row["private_note"] = "/proc/PID/smaps_rollup cannot be read here"
        if rows:
            more = size / rows[-1]["ncpus"]
            row["growth"] = row["boot_s"] / rows[-1]["boot_s"] / more
            row["fork_growth"] = fork_s / rows[-1]["fork_s"] / more
        rows.append(row)
    return {"bench": "boot", "machine": machine_facts(), "rows": rows}


def forks(count: int, options: Options) -> tuple[float, float]:
    """Return what so many forks of a warm firmware take, and their end, in seconds.

    The firmware is that of a small machine, whose CPUs are halted meanwhile.
    """
    cores = topology.place(count, options.cores)
    small = Cluster(2, idle="halt", cores=options.cores)
    try:
        return small._host.measure_fork(cores)
    finally:
        small.shutdown()


def private_kib(pid: int, *, proc: Path = Path("/proc")) -> int | None:
    """Return the memory that a process shares with none (its USS) in KiB.

    ``None`` where the kernel does not say.
    """
    total = None
    with suppress(OSError, ValueError):
        for line in (proc / str(pid) / "smaps_rollup").read_text().splitlines():
            if line.startswith(("Private_Clean:", "Private_Dirty:")):
                total = (total or 0) + int(line.split()[1])
    return total


def shared_kib(cluster: Cluster) -> int | None:
    """Return what a machine's segment really occupies in /dev/shm, in KiB."""
    with suppress(OSError):
        path = os.path.join("/dev/shm", segment.full_name(cluster.name))
        return os.stat(path).st_blocks // 2
    return None


def table(result: dict[str, Any]) -> Table:
    """Return the document as a table for people."""
    rows = []
    for row in result["rows"]:
        private = row["private_kib_per_cpu"]
        rows.append(
            [
                str(row["ncpus"]),
                f"{row['boot_s']:.3f} s",
                f"{row['fork_s']:.3f} s",
                f"{row['ratio']:.2f}",
                f"{row['shutdown_s']:.3f} s",
                f"{row['exit_s']:.3f} s",
                "-" if row["growth"] is None else f"{row['growth']:.2f}",
                "-" if private is None else f"{private / 1024:.2f} MiB",
                "-"
                if row["shared_kib"] is None
                else f"{row['shared_kib'] / 1024:.2f} MiB",
            ]
        )
    header = ["CPUs", "boot", "fork", "ratio", "shutdown", "exit", "growth per CPU"]
    return [*header, "private per CPU", "shared"], rows, []
