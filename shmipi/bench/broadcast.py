"""``on_each_cpu(wait=True)`` of a native handler over many halted CPUs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Final

from shmipi import _core
from shmipi.bench.boot import shared_kib
from shmipi.bench.runner import Disturbance, Rig, Seen, machine_facts, median
from shmipi.irq.chips import Chip
from shmipi.machine import topology

__all__ = ["SIZES", "broadcasts", "run"]

#: How many halted CPUs are called.
SIZES: Final = (16, 64, 128, 256, 512)


def broadcasts(calls: int, gap_ns: int) -> tuple[list[float], int]:
    """Task: call all other CPUs ``calls`` times: ns of each, how often one was up."""
    return _core.bench_broadcast(
        calls, warmup=3, gap_ns=gap_ns, state=_core.HALTED, deadline=300.0
    )


def run(
    *,
    sizes: Sequence[int] = SIZES,
    calls: int = 30,
    gap_us: float = 1000.0,
    doorbell: str = "futex",
    controller: str | type[Chip] = "apic",
    cores: str | Sequence[int] = "auto",
    progress: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """Measure ``calls`` broadcasts over ``sizes`` CPUs each: ``bench broadcast``.

    CPU 0 sends, and every other CPU has halted before each broadcast: the machine has
    one CPU more than are called. ``ns_per_cpu`` is the median.

    Raises what a boot raises.
    """
    rows = []
    for size in sizes:
        if progress is not None:
            progress(f"{size} halted CPUs")
        placement = topology.place(size + 1, cores)
        seen = Seen()
        with Rig(placement, doorbell=doorbell, controller=controller) as rig:
            before = shared_kib(rig.cluster)
            with Disturbance(rig, 1, seen):
                spans, missed = rig.run(0, broadcasts, calls, round(gap_us * 1000))
            after = shared_kib(rig.cluster)
            why = seen.why(None)  # CPUs of one core push each other off it: as meant
            row: dict[str, Any] = {
                "bench": "broadcast",
                "ncpus": size,
                "calls": calls,
                "handler": "native",
                "target_state": "halted",
                "doorbell": doorbell,
                "controller": rig.cluster.controller,
                "ns_per_cpu": median(spans) / size,
                "total_ns": median(spans),
                "ns_per_cpu_spread": [min(spans) / size, max(spans) / size],
                "missed_state": missed,
                "shared_kib": after,
                "touched_kib": None
                if before is None or after is None
                else after - before,
                "valid": not why,
            }
            if why:
                row["why"] = why
            rows.append(row)
    return {
        "bench": "broadcast",
        "machine": machine_facts(),
        "gap_us": gap_us,
        "gc": False,
        "rows": rows,
    }
