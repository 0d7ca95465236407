"""IPIs of a domain: what sending one costs, and when the handler of its irq has run.

An IPI is reserved for sender and target, requested, and sent by
``shmipi.irq.ipi_send_single`` from a task in Python. Beside each send stands
``smp_call_function_single(wait=False)`` of the same task to the same CPU, one after the
other in turns: ``send_ratio`` is send against that, block by block. A round trip ends
when the sender sees in shared memory that the handler has counted.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any, Final

from shmipi import _core, names
from shmipi.bench import option, tasks
from shmipi.bench.hist import described
from shmipi.bench.limits import BATCH, PLACEMENTS
from shmipi.bench.option import HANDLERS
from shmipi.bench.runner import (
    MISSED_SHARE,
    Disturbance,
    Rig,
    Seen,
    Steps,
    choose_cores,
    machine_facts,
    median,
    silent,
    split,
    spread,
)
from shmipi.report.cells import Cells, Table, ratio, span, valid_for

__all__ = ["AT_MOST", "EXAMPLE", "HELP", "STATES", "Options", "run", "table"]

HELP = """\
What sending an IPI of a domain costs its sender, beside a call that nobody
waits for by the same Python caller, and the round trip to the handler of
the requested irq. The machines of all controllers are up at once and take
turns in blocks. Native handlers of polling targets stand beside the line
raised raw, as `shmipi bench controllers` has it."""
EXAMPLE = """\
shmipi bench irq
shmipi bench irq --controller gicv3 --handler native --state polling,running"""

STATES: Final = ("polling", "halted", "running")
#: The most times a call with wait=False that a send may cost.
AT_MOST: Final = 2.0

_ALL: Final = "all"
_STATE: Final = {
    "polling": _core.POLLING,
    "halted": _core.HALTED,
    "running": _core.RUNNING,
}
_TARGET: Final = 1


@dataclass(frozen=True)
class Options:
    """What to measure. ``calls`` is for each row of each controller, in ``blocks``."""

    calls: int = option.calls(2000, "sends of each row of each controller")
    warmup: int = option.warmup()
    which: str = option.choice(
        "controller", (_ALL, *names.CONTROLLERS), _ALL, "the interrupt controller"
    )
    handlers: Sequence[str] = option.handlers()
    states: Sequence[str] = option.several(
        "state", STATES, f"only targets in these states: {', '.join(STATES)}"
    )
    cores: str | Sequence[int] = option.pair_of_cores()
    gap_us: float = option.gap_of_calls()
    blocks: int = option.blocks()
    doorbell: str = option.doorbell()

    @property
    def gap_ns(self) -> int:
        """The pause before each send, in ns."""
        return round(self.gap_us * 1000)

    @property
    def controllers(self) -> Sequence[str]:
        """The names of the controllers to measure."""
        return names.CONTROLLERS if self.which == _ALL else (self.which,)


@dataclass
class Row:
    """What was measured of one state and kind of handler through one controller."""

    controller: str
    state: str
    handler: str
    send: _core.Hist = field(default_factory=_core.Hist)
    nowait: _core.Hist = field(default_factory=_core.Hist)
    rtt: _core.Hist = field(default_factory=_core.Hist)
    ratios: list[float] = field(default_factory=list)
    #: ns of the raw line, of each block; and the round trip against it.
    line: list[float] = field(default_factory=list)
    of_line: list[float] = field(default_factory=list)
    seen: Seen = field(default_factory=Seen)
    calls: int = 0
    missed: int = 0

    @property
    def name(self) -> str:
        """What to call it."""
        return f"{self.controller} {self.state} {self.handler}"

    def why(self) -> list[str]:
        """Return why its figures are not what they claim to be."""
        found = self.seen.why(2 * self.calls)  # sends and calls
        if self.missed > MISSED_SHARE * 2 * self.calls:
            found.append(
                f"the target was not {self.state} at {self.missed} of"
                f" {2 * self.calls} sends and calls and was waited for"
            )
        return found

    def as_json(self) -> dict[str, Any]:
        """Return the row of a document."""
        why = self.why()
        row: dict[str, Any] = {
            "bench": "irq",
            "controller": self.controller,
            "target_state": self.state,
            "handler": self.handler,
            "calls": self.calls,
            "send_ns": described(self.send),
            "nowait_ns": described(self.nowait),
            "send_ratio": median(self.ratios),
            "send_ratio_spread": spread(self.ratios),
            "at_most": AT_MOST,
            "met": median(self.ratios) <= AT_MOST,
            "rtt_ns": described(self.rtt),
        }
        if self.line:
            row["line_ns"] = median(self.line)
            row["line_ratio"] = median(self.of_line)
            row["line_ratio_spread"] = spread(self.of_line)
        return row | self.seen.ending(2 * self.calls, why)  # sends and calls


# ---- one controller's machine --------------------------------------------------------


class _Bench:
    """A machine with one controller, and an IPI for each kind of handler."""

    def __init__(self, rig: Rig, handlers: Sequence[str]) -> None:
        self.rig = rig
        cluster, irq = rig.cluster, rig.cluster.irq
        taken = cluster.shared(tasks.TAKEN, "i8", 1)
        cluster.shared(tasks.CALLED, "i8", 1)
        cluster.run(tasks.prepare_irqs)
        self.virq = {}
        for handler in handlers:
            virq = self.virq[handler] = irq.irq_reserve_ipi(None, "all")
            native = handler == "native"
            func: Any = _core.NativeHandler("count") if native else tasks.take_irq
            irq.request_percpu_irq(virq, func, f"bench {handler}", taken)
            irq.enable_percpu_irq_mask(virq)

    def measure(self, row: Row, block: int, calls: int, options: Options) -> None:
        """Measure one block of a row."""
        with self.rig.in_state([_TARGET], row.state):
            self._block(row, block, calls, options)

    def _block(self, row: Row, block: int, calls: int, options: Options) -> None:
        with Disturbance(self.rig, _TARGET, row.seen):
            send, nowait, rtt, missed = self.rig.run(
                0,
                tasks.irq_sends,
                _TARGET,
                self.virq[row.handler],
                row.handler,
                calls,
                options.warmup,
                options.gap_ns,
                _STATE[row.state],
            )
            row.ratios.append(send.quantile(0.5) / max(1, nowait.quantile(0.5)))
            if row.state == "polling" and row.handler == "native":
                row.line.append(self._line(calls, block))
                row.of_line.append(rtt.quantile(0.5) / row.line[-1])
        for hist, more in ((row.send, send), (row.nowait, nowait), (row.rtt, rtt)):
            hist.merge(more)
        row.calls += calls
        row.missed += missed

    def _line(self, calls: int, block: int) -> float:
        """The same line raised raw, in batches from C: ns until it has counted."""
        batch = min(BATCH, calls)
        number = max(1, calls // batch)
        *_, batches, _, _, _ = self.rig.run(
            0,
            tasks.native_raises,
            tasks.TAKEN,
            _TARGET,
            batch * number,
            {
                "batch": batch,
                "warmup": max(1, batch // 2),
                "state": _core.POLLING,
                "skip": block % PLACEMENTS,
                "line": self.rig.cluster.irq.ipi_get_hwirq(
                    self.virq["native"], _TARGET
                ),
            },
        )
        return median(batches)


# ---- the run -------------------------------------------------------------------------


def run(
    options: Options, progress: Callable[[str], None] | None = None
) -> dict[str, Any]:
    """Measure and return the document of ``bench irq``, without its schema.

    Raises ``CommandError`` for cores that cannot be used, and what a boot raises.
    """
    progress = progress or silent
    cores = choose_cores(options.cores)
    handlers = [handler for handler in HANDLERS if handler in options.handlers]
    with ExitStack() as stack:
        benches = {}
        for name in options.controllers:
            progress(f"booting {name}")
            rig = Rig(cores, controller=name, doorbell=options.doorbell)
            benches[name] = _Bench(stack.enter_context(rig), handlers)
        rows = [
            Row(name, state, handler)
            for state in STATES
            if state in options.states
            for handler in handlers
            for name in benches
        ]
        parts = split(options.calls, options.blocks)
        steps = Steps(progress, len(parts) * len(rows))
        for block, part in enumerate(parts):
            for row in rows:
                steps(f"{row.name}, block {block + 1} of {len(parts)}")
                benches[row.controller].measure(row, block, part, options)
        rig = benches[options.controllers[0]].rig
        return {
            "bench": "irq",
            "machine": machine_facts(sender_core=cores[0], target_core=cores[1]),
            "timer_ns": rig.timer_ns,
            "clock": rig.clock,
            "doorbell": options.doorbell,
            "gap_us": options.gap_us,
            "calls": options.calls,
            "blocks": options.blocks,
            "gc": False,
            "rows": [row.as_json() for row in rows],
        }


def table(result: dict[str, Any]) -> Table:
    """Return the document as a table for people."""
    rows: list[Cells] = []
    notes: list[str] = []
    for row in result["rows"]:
        times = ratio(row, "send_ratio")
        rows.append(
            [
                row["controller"],
                row["target_state"],
                row["handler"],
                span(row["send_ns"]["p50"]),
                span(row["nowait_ns"]["p50"]),
                times if row["met"] else f"{times} missed",
                span(row["rtt_ns"]["p50"]),
                span(row["rtt_ns"]["p99"]),
                span(row.get("line_ns")),
                ratio(row, "line_ratio") if "line_ns" in row else "-",
                valid_for(row, notes),
            ]
        )
    notes.append(
        "send: ipi_send_single() of an IPI domain; nowait:"
        " smp_call_function_single(wait=False) beside it, of which a send may be"
        f" {AT_MOST:g} times; rtt: until the handler of the requested irq has counted"
    )
    if any("line_ns" in row for row in result["rows"]):
        notes.append(
            "line: the same line raised raw in a loop in C, until it has counted"
        )
    header = ["controller", "target", "handler", "send p50", "nowait p50"]
    header += ["send/nowait (spread)", "rtt p50", "p99", "line", "rtt/line (spread)"]
    return [*header, "valid"], rows, notes
