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
from shmipi.bench.runner import machine_facts
from shmipi.cluster import Cluster
from shmipi.irq.chips import Chip
from shmipi.machine import segment
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
Each machine is booted once, measured and shut down."""
EXAMPLE = """\
shmipi bench boot
shmipi bench boot --cpus 4,64"""

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
    and nothing is left. Raises what a boot raises.
    """
    rows = []
    for size in options.sizes:
        if progress is not None:
            progress(f"{size} CPUs")
        started = time.perf_counter()
        cluster = Cluster(
            size,
            idle=options.idle,
            doorbell=options.doorbell,
            controller=options.controller,
            cores=options.cores,
        )
        try:
            booted = time.perf_counter()
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
            "shutdown_s": time.perf_counter() - ending,
            "private_kib_per_cpu": sum(private) / len(private) if private else None,
            "sampled": len(private),
            "shared_kib": memory,
            "idle": options.idle,
            "doorbell": options.doorbell,
            "controller": cluster.controller,
        }
        if not private:
            row["private_note"] = "/proc/PID/smaps_rollup cannot be read here"
        rows.append(row)
    return {"bench": "boot", "machine": machine_facts(), "rows": rows}


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
                f"{row['shutdown_s']:.3f} s",
                "-" if private is None else f"{private / 1024:.2f} MiB",
                "-"
                if row["shared_kib"] is None
                else f"{row['shared_kib'] / 1024:.2f} MiB",
            ]
        )
    return ["CPUs", "boot", "shutdown", "private per CPU", "shared"], rows, []
