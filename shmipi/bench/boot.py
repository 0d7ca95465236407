"""How fast a machine boots and ends, and what memory each of its CPUs takes."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

from shmipi.bench.runner import machine_facts
from shmipi.cluster import Cluster
from shmipi.irq.chips import Chip
from shmipi.machine import segment

__all__ = ["SIZES", "private_kib", "run", "shared_kib"]

#: CPUs of the machines that are booted by default.
SIZES: Final = (2, 16, 256, 1024)
#: So many CPUs are looked at for their private memory, spread over the machine.
SAMPLE: Final = 32


def run(
    *,
    sizes: Sequence[int] = SIZES,
    idle: str = "halt",
    doorbell: str = "futex",
    controller: str | type[Chip] = "apic",
    cores: str | Sequence[int] = "auto",
    progress: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """Boot machines of ``sizes`` CPUs and return the document of ``bench boot``.

    ``boot_s`` is until every CPU is online, ``shutdown_s`` until every process is gone
    and nothing is left. Raises what a boot raises.
    """
    rows = []
    for size in sizes:
        if progress is not None:
            progress(f"{size} CPUs")
        started = time.perf_counter()
        cluster = Cluster(
            size, idle=idle, doorbell=doorbell, controller=controller, cores=cores
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
            "idle": idle,
            "doorbell": doorbell,
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
