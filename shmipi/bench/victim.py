"""What a busy CPU loses to the interrupts that others send it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any, Final

from shmipi import _core, names
from shmipi.bench import option, tasks
from shmipi.bench.option import HANDLERS
from shmipi.bench.runner import (
    Disturbance,
    Rig,
    Seen,
    Steps,
    choose_cores,
    machine_facts,
    median,
    spread,
)
from shmipi.errors import BootError, CommandError, RemoteCallError
from shmipi.irq.chips import Chip
from shmipi.report.cells import Cells, Table, span, valid_for

__all__ = ["DOORBELLS", "EXAMPLE", "HELP", "RATES", "Options", "run", "table"]

HELP = """\
A CPU works, and is interrupted so many times a second: which share of its
work is lost, and how much time an interrupt takes from it, by doorbell and
handler. Beside it the kernel's own interrupt: a membarrier() that reaches a
thread which works as much. Work with and without interrupts takes turns, and
time for which other processes had the core counts as neither."""
EXAMPLE = """\
shmipi bench victim
shmipi bench victim --doorbell futex --rate 1000,50000 --ms 200"""

#: "none" kicks nobody: calls are taken where the work has a schedule point.
DOORBELLS: Final = (*names.DOORBELLS, "none")
RATES: Final = (1000, 10_000, 100_000)
#: Work between two moments at which a Python handler can run.
CHUNK_NS: Final = 20_000
#: Fewer than this share of what was asked for arrived.
_RATE_SHARE: Final = 0.9


@dataclass(frozen=True)
class Options:
    """What to measure: each row for ``ms`` in each of ``blocks``."""

    rates: Sequence[int] = option.numbers(
        "rate", RATES, "interrupts a second", most=1_000_000
    )
    doorbells: Sequence[str] = option.several(
        "doorbell",
        DOORBELLS,
        "only these; none: no kick, calls are taken at schedule points",
    )
    handlers: Sequence[str] = option.handlers()
    ms: int = option.number("ms", 50, "of each block, in ms", most=10_000)
    blocks: int = option.blocks(5)
    cores: str | Sequence[int] = option.pair_of_cores()
    controller: str | type[Chip] = option.controller()


@dataclass
class Row:
    """What was measured of one kind of interrupt at one rate."""

    source: str
    doorbell: str
    handler: str
    rate: int
    work: list[float] = field(default_factory=list)
    alone: list[float] = field(default_factory=list)
    seen: Seen = field(default_factory=Seen)
    ran: int = 0
    seconds: float = 0.0

    def add(
        self, units: tuple[int, int], alone: tuple[int, int], ran: int, ns: int
    ) -> None:
        """Add a block: units of work, and ns for which others had the core."""
        self.work.append(units[0] / max(1, ns - units[1]) * 1e9)
        self.alone.append(alone[0] / max(1, ns - alone[1]) * 1e9)
        self.ran += ran
        self.seconds += ns / 1e9

    def as_json(self) -> dict[str, Any]:
        """Return the row of a document."""
        lost = [
            1 - work / alone for work, alone in zip(self.work, self.alone, strict=True)
        ]
        achieved = self.ran / self.seconds
        why = self.seen.why(None)
        if achieved < _RATE_SHARE * self.rate:
            why.append(f"only {achieved:.0f} of {self.rate} a second arrived")
        if achieved * _RATE_SHARE > self.rate:  # late, they came in bursts
            why.append(f"{achieved:.0f} arrived a second in place of {self.rate}")
        return {
            "bench": "victim",
            "source": self.source,
            "doorbell": self.doorbell,
            "handler": self.handler,
            "rate": self.rate,
            "achieved": achieved,
            "lost_share": median(lost),
            "lost_share_spread": spread(lost),
            "lost_share_blocks": lost,
            "lost_ns_per_ipi": median(lost) / achieved * 1e9 if achieved else None,
            "work": median(self.work),
            "work_alone": median(self.alone),
            **self.seen.ending(self.ran, why),
        }


def _measure(rig: Rig, rows: Sequence[Row], ns: int, steps: Steps) -> None:
    """Measure one block of each row of a doorbell: work alone before each."""
    point = rows[0].doorbell == "none"
    for row in rows:
        steps(f"{row.source} {row.doorbell}, {row.handler}, {row.rate} a second")
        counter = "native_run" if row.handler == "native" else "python_run"
        alone = rig.run(1, tasks.work, ns, CHUNK_NS, point)
        before = rig.counters(1)[counter]
        with Disturbance(rig, 1, row.seen):
            job = rig.start(1, tasks.work, ns, CHUNK_NS, point)
            rig.run(0, tasks.pace, 1, row.handler, round(1e9 / row.rate), ns)
            units = job.result()
        row.add(units, alone, rig.counters(1)[counter] - before, ns)


def _measure_kernel(rig: Rig, rows: Sequence[Row], ns: int, steps: Steps) -> None:
    """Measure one block of membarrier() at each rate."""
    core = rig.cores[1]
    for row in rows:
        steps(f"{row.source}, {row.rate} a second")
        alone, _, idle = rig.run(0, _core.bench_membarrier, core, 0, ns)
        with Disturbance(rig, 1, row.seen):
            units, calls, waited = rig.run(
                0, _core.bench_membarrier, core, round(1e9 / row.rate), ns
            )
        row.add((units, waited), (alone, idle), calls, ns)


def run(
    options: Options, progress: Callable[..., None] | None = None
) -> dict[str, Any]:
    """Measure and return the document of ``bench victim``, without its schema.

    ``lost_share`` is the median over blocks of 1 - work / work alone, ``work`` in units
    a second. Raises ``CommandError`` for cores that cannot be used, and what a boot
    raises; what cannot be had here is listed under ``unavailable``.
    """
    cores = choose_cores(options.cores)
    handlers = [name for name in HANDLERS if name in options.handlers]
    unavailable: dict[str, str] = {}
    kernel = [Row("membarrier", "none", "kernel", rate) for rate in options.rates]
    rows: list[Row] = []
    ns = options.ms * 1_000_000
    with ExitStack() as stack:
        rigs: dict[str, tuple[Rig, list[Row]]] = {}
        for doorbell in options.doorbells:
            try:
                rig = Rig(
                    cores,
                    doorbell="futex" if doorbell == "none" else doorbell,
                    controller=options.controller,
                    kick=doorbell != "none",
                )
            except BootError as error:
                unavailable[doorbell] = str(error)
                continue
            rigs[doorbell] = (
                stack.enter_context(rig),
                [
                    Row("shmipi", doorbell, handler, rate)
                    for handler in handlers
                    for rate in options.rates
                ],
            )
        if not rigs:
            raise CommandError("; ".join(unavailable.values()))
        base = next(iter(rigs.values()))[0]
        each = sum(len(found) for _, found in rigs.values()) + len(kernel)
        steps = Steps(progress, each * options.blocks)
        for _ in range(options.blocks):
            for rig, found in rigs.values():
                _measure(rig, found, ns, steps)
            if "membarrier" in unavailable:
                continue
            try:
                _measure_kernel(base, kernel, ns, steps)
            except RemoteCallError as error:
                unavailable["membarrier"] = error.remote_repr
                kernel = []
        for _, found in rigs.values():
            rows += found
        result = {
            "bench": "victim",
            "machine": machine_facts(sender_core=cores[0], target_core=cores[1]),
            "timer_ns": base.timer_ns,
            "clock": base.clock,
            "ms": options.ms,
            "blocks": options.blocks,
            "gc": False,
            "rows": [row.as_json() for row in (*rows, *kernel)],
        }
    if unavailable:
        result["unavailable"] = unavailable
    return result


def table(result: dict[str, Any]) -> Table:
    """Return the document as a table for people."""
    rows: list[Cells] = []
    notes: list[str] = []
    for row in result["rows"]:
        low, high = row["lost_share_spread"]
        real = row["real_ipis_per_call"]
        rows.append(
            [
                row["source"],
                row["doorbell"],
                row["handler"],
                str(row["rate"]),
                f"{row['achieved']:.0f}",
                f"{row['lost_share']:.2%}",
                f"{low:.2%} - {high:.2%}",
                "-"
                if row["lost_ns_per_ipi"] is None
                else span(max(0.0, row["lost_ns_per_ipi"])),
                "-" if real is None else f"{real:.2f}",
                valid_for(row, notes),
            ]
        )
    notes.append(
        "lost: the share of the work that is done without interrupts, the median of"
        " blocks; none: no kick, calls are taken at schedule points, every"
        f" {CHUNK_NS // 1000} us"
    )
    notes += [f"{name}: {why}" for name, why in result.get("unavailable", {}).items()]
    header = ["source", "doorbell", "handler", "asked/s", "arrived/s", "lost"]
    return [*header, "spread", "per IPI", "real IPIs", "valid"], rows, notes
