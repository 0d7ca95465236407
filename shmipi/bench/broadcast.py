"""``on_each_cpu(wait=True)`` of a native handler over many halted CPUs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

from shmipi import _core
from shmipi.bench import option
from shmipi.bench.boot import shared_kib
from shmipi.bench.runner import Disturbance, Rig, Seen, Steps, machine_facts, median
from shmipi.irq.chips import Chip
from shmipi.machine import topology
from shmipi.report.cells import Cells, Table, span, valid

__all__ = ["EXAMPLE", "HELP", "SIZES", "Options", "broadcasts", "run", "table"]

HELP = """\
CPU 0 calls a native no-op on every other CPU, all of which have halted."""
EXAMPLE = """\
shmipi bench broadcast
shmipi bench broadcast --cpus 16,512
shmipi bench broadcast --cpus 1024,4095"""

#: How many halted CPUs are called.
SIZES: Final = (16, 64, 128, 256, 512)


def broadcasts(calls: int, gap_ns: int) -> tuple[list[float], float, int]:
    """Task: call all other CPUs ``calls`` times.

    Returns ns of each, ns of the first (of three before them), how often one was up.
    """
    return _core.bench_broadcast(
        calls, warmup=3, gap_ns=gap_ns, state=_core.HALTED, deadline=300.0
    )


@dataclass(frozen=True)
class Options:
    """What to measure: ``calls`` broadcasts over each of ``sizes`` CPUs."""

    sizes: Sequence[int] = option.sizes(SIZES, most=option.MAX_CPUS - 1)
    calls: int = option.calls(30, "broadcasts over each machine", like="", most=100_000)
    gap_us: float = option.gap(1000.0, "pause before each, in microseconds")
    doorbell: str = option.doorbell()
    cores: str | Sequence[int] = option.cores()
    controller: str | type[Chip] = option.controller()

    @property
    def gap_ns(self) -> int:
        """The pause before each broadcast, in ns."""
        return round(self.gap_us * 1000)


def run(
    options: Options, progress: Callable[[str], None] | None = None
) -> dict[str, Any]:
    """Measure ``calls`` broadcasts over ``sizes`` CPUs each: ``bench broadcast``.

    CPU 0 sends, and every other CPU has halted before each broadcast: the machine has
    one CPU more than are called. ``ns_per_cpu`` is the median, and ``first_ns_per_cpu``
    the machine's very first, whose pages nobody has touched yet; ``first_ratio`` is how
    many times the median that is. ``growth`` is ``ns_per_cpu`` compared with the row
    before: None in the first.

    Raises what a boot raises.
    """
    rows: list[dict[str, Any]] = []
    steps = Steps(progress, len(options.sizes))
    for size in options.sizes:
        steps(f"{size} halted CPUs")
        placement = topology.place(size + 1, options.cores)
        seen = Seen()
        with Rig(
            placement,
            doorbell=options.doorbell,
            controller=options.controller,
            cpus=[0],  # what the others run is native
        ) as rig:
            before = shared_kib(rig.cluster)
            with Disturbance(rig, 1, seen, every=True):
                spans, first, missed = rig.run(
                    0, broadcasts, options.calls, options.gap_ns
                )
            after = shared_kib(rig.cluster)
            why = seen.why(None)  # CPUs of one core push each other off it: as meant
            row: dict[str, Any] = {
                "bench": "broadcast",
                "ncpus": size,
                "calls": options.calls,
                "handler": "native",
                "target_state": "halted",
                "doorbell": options.doorbell,
                "controller": rig.cluster.controller,
                "ns_per_cpu": median(spans) / size,
                "first_ns_per_cpu": first / size,
                "first_ratio": first / median(spans),
                "growth": median(spans) / size / rows[-1]["ns_per_cpu"]
                if rows
                else None,
                "total_ns": median(spans),
                "ns_per_cpu_spread": [min(spans) / size, max(spans) / size],
                "missed_state": missed,
                "shared_kib": after,
                "touched_kib": None
                if before is None or after is None
                else after - before,
                **seen.ending(size * (options.calls + 3), why),
            }
            rows.append(row)
    return {
        "bench": "broadcast",
        "machine": machine_facts(),
        "gap_us": options.gap_us,
        "gc": False,
        "rows": rows,
    }


def table(result: dict[str, Any]) -> Table:
    """Return the document as a table for people."""
    rows: list[Cells] = []
    notes: list[str] = []
    for row in result["rows"]:
        low, high = row["ns_per_cpu_spread"]
        rows.append(
            [
                str(row["ncpus"]),
                span(row["ns_per_cpu"]),
                f"{span(low)} - {span(high)}",
                span(row["total_ns"]),
                span(row["first_ns_per_cpu"]),
                f"{row['first_ratio']:.1f}",
                "-" if row["growth"] is None else f"{row['growth']:.2f}",
                f"{row['shared_kib']} KiB",
                valid(row, notes, f"{row['ncpus']} CPUs"),
            ]
        )
    header = ["halted CPUs", "per CPU", "spread", "broadcast", "first, per CPU"]
    return [*header, "ratio", "growth per CPU", "shared", "valid"], rows, notes
