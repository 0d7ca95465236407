"""What ``shmipi top`` shows: a line for each CPU, with its interrupts a second."""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from shmipi import _core
from shmipi.machine.inspect import Glance
from shmipi.trace.waits import Quantiles

__all__ = [
    "COLUMNS",
    "SORTS",
    "Heading",
    "Line",
    "Rates",
    "View",
    "clean",
    "picture",
    "room",
    "short",
    "soon",
    "table",
    "untraced",
]

#: Each column: what stands above it, the counters it is the sum of, and words.
COLUMNS: Final = {
    "res_in": ("RES", ("irq_resched",), "reschedule interrupts taken"),
    "cal_in": ("CAL", ("irq_call_single", "irq_call"), "call interrupts taken"),
    "tlb_in": ("TLB", ("irq_tlb",), "TLB flushes taken"),
    "irq_in": ("IRQ", ("irq_handled",), "interrupts of requested irqs taken"),
    "nmi_in": ("NMI", ("nmi",), "NMIs taken"),
    "ran": ("RAN", ("native_run", "python_run"), "functions run, polled ones too"),
    "calls_out": ("CALLS", ("csd_queued",), "calls sent, one for each target"),
    "res_out": ("RESCH", ("resched_sent",), "reschedules sent"),
    "nmi_out": ("NMIS", ("nmi_sent",), "NMIs sent"),
    "rung": ("RUNG", ("doorbells_sent", "kicks_sent"), "doorbells and signals sent"),
    "elided": ("ELID", ("elided", "resched_elided"), "needed none: target polling"),
    "coalesced": ("COAL", ("coalesced",), "needed none: the queue was not empty"),
    "halts": ("HALTS", ("halts",), "times it went to sleep"),
}
#: How long calls wait, and what stands above it.
_WAITS: Final = {"p50": "P50", "p99": "P99"}
#: In a terminal that is too narrow for all, these go first.
_LESS: Final = ("halts", "irq_in", "nmi_out", "nmi_in", "res_out", "tlb_in", "ran")
_IN: Final = ("res_in", "cal_in", "tlb_in", "irq_in", "nmi_in")
_OUT: Final = ("calls_out", "res_out", "nmi_out")
#: What lines can be sorted by; the busiest first, but for the number.
SORTS: Final = ("cpu", "in", "out", "elided", "coalesced", "state")

_STATES: Final = ("running", "irq", "nmi", "softirq", "polling", "halted")
_CELL: Final = 6
_DOING: Final = 12
_INDEX: Final = {name: at for at, name in enumerate(_core.COUNTERS)}


@dataclass(frozen=True)
class Rates:
    """What came in ``seconds``: a number a second for each CPU and column.

    ``counters`` has the rate of every counter of the core, of shape (CPUs, counters).
    """

    glance: Glance
    seconds: float
    counters: NDArray[np.float64]
    columns: dict[str, NDArray[np.float64]]
    #: How long calls wait for each CPU; None: it is recorded nowhere.
    waits: Quantiles | None = None

    @classmethod
    def between(
        cls, before: Glance, after: Glance, waits: Quantiles | None = None
    ) -> Rates:
        """Compare two looks. What a CPU that was booted anew counts begins at 0."""
        seconds = max(after.at - before.at, 1e-6)
        grown = (after.counters - before.counters).view(np.int64)
        counters = np.where(grown < 0, after.counters, grown) / seconds
        columns = {
            key: counters[:, [_INDEX[name] for name in names]].sum(axis=1)
            for key, (_, names, _) in COLUMNS.items()
        }
        for key, parts in (("in", _IN), ("out", _OUT)):
            columns[key] = np.sum([columns[part] for part in parts], axis=0)
        return cls(after, seconds, counters, columns, waits)

    def as_json(self) -> list[dict[str, Any]]:
        """Return a dict for each CPU."""
        glance = self.glance
        found: list[dict[str, Any]] = []
        for cpu, state in enumerate(glance.states):
            row: dict[str, Any] = {
                "cpu": cpu,
                "core": glance.cores[cpu],
                "state": state,
                "task": glance.tasks[cpu],
                "handler": glance.handlers[cpu],
            }
            row |= {
                f"{key}_per_s": round(float(values[cpu]), 3)
                for key, values in self.columns.items()
            }
            row |= {f"{name}_ns": self.wait(name, cpu) for name in _WAITS}
            found.append(row)
        return found

    def wait(self, name: str, cpu: int) -> float | None:
        """Return a quantile of how long calls wait for a CPU, in ns; None: unknown."""
        if self.waits is None:
            return None
        ns = float(getattr(self.waits, name)[cpu])
        return None if math.isnan(ns) else ns


@dataclass(frozen=True)
class View:
    """How it is looked at: order, which line is chosen, whether it stands still."""

    sort: str = "cpu"
    backwards: bool = False
    frozen: bool = False
    chosen: int = 0  #: the number of a line, not of a CPU
    top: int = 0  #: the first line that is shown
    open: int | None = None  #: the CPU whose counters are shown

    def order(self, rates: Rates) -> list[int]:
        """Return the CPUs from the first line to the last."""
        cpus = range(len(rates.glance.states))
        if self.sort == "cpu":
            found = list(cpus)
        elif self.sort == "state":
            found = sorted(cpus, key=lambda cpu: _rank(rates.glance.states[cpu]))
        else:
            values = rates.columns[self.sort]
            found = np.argsort(-values, kind="stable").tolist()
        return found[::-1] if self.backwards else found

    def moved(self, by: int, lines: int, room: int) -> View:
        """Choose another line; what is shown follows it."""
        chosen = max(0, min(lines - 1, self.chosen + by))
        top = max(min(self.top, chosen), chosen - room + 1, 0)
        return replace(self, chosen=chosen, top=min(top, max(0, lines - room)))


def _rank(state: str) -> int:
    return _STATES.index(state) if state in _STATES else len(_STATES)


@lru_cache(maxsize=4096)
def short(value: int) -> str:
    """Return a rate in five characters at most: ``999``, ``12.3k``, ``1.25M``."""
    if value < 1000:
        return str(value)
    for scale, unit in ((1e3, "k"), (1e6, "M"), (1e9, "G")):
        if value < scale * 999.5:
            number = value / scale
            digits = 2 if number < 9.995 else 1 if number < 99.95 else 0
            return f"{number:.{digits}f}{unit}"
    return "lots"


def soon(ns: float | None) -> str:
    """Return a time in five characters at most: ``130ns``, ``2.5us``, ``12ms``."""
    if ns is None:
        return "-"
    for limit, unit, scale in ((1e3, "ns", 1.0), (1e6, "us", 1e3), (1e9, "ms", 1e6)):
        if ns < limit * 0.9995:
            value = ns / scale
            digits = 1 if unit != "ns" and value < 9.95 else 0
            return f"{value:.{digits}f}{unit}"
    return f"{min(ns / 1e9, 9999):.0f}s"


def untraced(name: str) -> str:
    """Say why nothing is known of how long calls wait."""
    return f"shmipi trace start {name}"


@lru_cache(maxsize=1024)
def clean(text: str) -> str:
    """Return a name that a terminal shows in as many columns as it has letters."""
    return "".join(
        letter
        if letter.isprintable() and unicodedata.east_asian_width(letter) not in "WF"
        else "?"
        for letter in text
    )


# ---- lines ---------------------------------------------------------------------------

#: A line of a terminal, and whether it stands out.
Line = tuple[str, bool]


@dataclass(frozen=True)
class Heading:
    """What does not change while a machine is looked at."""

    name: str
    words: str


def picture(
    heading: Heading, rates: Rates, view: View, width: int, height: int
) -> list[Line]:
    """Return the lines of a terminal of this size, none longer than it is wide."""
    if view.open is not None:
        lines = _opened(heading, rates, view.open, height)
    else:
        lines = _listed(heading, rates, view, width, height)
    return [(text[:width].rstrip(), loud) for text, loud in lines[:height]]


def room(height: int) -> int:
    """Return how many CPUs a terminal of this height shows at once."""
    return max(1, height - 4)


def _listed(
    heading: Heading, rates: Rates, view: View, width: int, height: int
) -> list[Line]:
    shown = _shown(width, rates.waits is not None)
    doing = max(_DOING, width - 4 - 9 - len(shown) * _CELL - 1)
    header = f"{'CPU':>4} {'STATE':8}" + "".join(
        f"{_WAITS[key] if key in _WAITS else COLUMNS[key][0]:>{_CELL}}" for key in shown
    )
    order = view.order(rates)
    visible = order[view.top : view.top + room(height)]
    counted = [key for key in shown if key in COLUMNS]
    waits = [key for key in shown if key in _WAITS]
    cells = np.stack([rates.columns[key][visible] for key in counted], axis=1)
    texts = np.rint(cells).astype(np.int64).tolist()
    lines: list[Line] = [(_title(heading, rates, view), False)]
    lines.append((_totals(rates), False))
    lines.append((f"{header}  DOING", True))
    for at, (cpu, values) in enumerate(zip(visible, texts, strict=True)):
        state = rates.glance.states[cpu]
        row = "".join([f"{short(value):>{_CELL}}" for value in values])
        row += "".join([f"{soon(rates.wait(q, cpu)):>{_CELL}}" for q in waits])
        words = clean(_doing(rates.glance, cpu, doing))[:doing]
        chosen = view.top + at == view.chosen
        lines.append((f"{cpu:>4} {state:8}{row}  {words}", chosen))
    lines += [("", False)] * (height - 1 - len(lines))
    hidden = len(order) - len(visible)
    more = f"  {hidden} more CPUs" if hidden else ""
    if rates.waits is None:
        more += f"  P50 P99: {untraced(heading.name)}"
    lines.append(
        (f"q quit  s sort  r reverse  f freeze  j k enter: a CPU{more}", False)
    )
    return lines


@lru_cache(maxsize=16)
def _shown(width: int, traced: bool) -> tuple[str, ...]:
    """Return the columns that there is room for, those of waits last.

    Where nothing is known of waits, other columns need the room more.
    """
    shown = [*COLUMNS, *_WAITS]
    for key in (*_LESS, *_WAITS) if traced else (*_WAITS, *_LESS):
        if 4 + 9 + len(shown) * _CELL + 2 + _DOING <= width:
            break
        shown.remove(key)
    return tuple(shown)


def _title(heading: Heading, rates: Rates, view: View) -> str:
    online = sum(state not in ("offline", "dead") for state in rates.glance.states)
    order = f"sorted by {view.sort}{' backwards' if view.backwards else ''}"
    frozen = ", FROZEN" if view.frozen else ""
    return f"{heading.name}: {online} online, {heading.words}; {order}{frozen}"


def _totals(rates: Rates) -> str:
    total = {key: short(round(float(v.sum()))) for key, v in rates.columns.items()}
    return (
        f"a second, all CPUs: {total['in']} interrupts in, {total['out']} sent,"
        f" {total['rung']} rung, {total['elided']} elided,"
        f" {total['coalesced']} coalesced"
    )


def _doing(glance: Glance, cpu: int, room: int = 10_000) -> str:
    """Return what a CPU runs; where there is little room, without the modules."""
    words = _words(glance, cpu, str)
    return words if len(words) <= room else _words(glance, cpu, _last)


def _words(glance: Glance, cpu: int, named: Callable[[str], str]) -> str:
    task, handler = glance.tasks[cpu], glance.handlers[cpu]
    words = [named(task)] if task else []
    words += [f"handles {named(handler)}"] if handler else []
    waits = glance.waits_for[cpu]
    words += [f"waits for CPU {waits}"] if waits is not None else []
    return ", ".join(words)


def _last(name: str) -> str:
    return name.rpartition(".")[2] or name


def _opened(heading: Heading, rates: Rates, cpu: int, height: int) -> list[Line]:
    """Return a page about one CPU: everything that it counts."""
    glance = rates.glance
    doing = clean(_doing(glance, cpu)) or "nothing"
    lines: list[Line] = [
        (
            f"{heading.name}: CPU {cpu}, core {glance.cores[cpu]},"
            f" {glance.states[cpu]}, {doing}",
            False,
        ),
        (f"{'COUNTER':20}{'A SECOND':>10}{'SINCE BOOT':>16}", True),
    ]
    rate, total = rates.counters[cpu], glance.counters[cpu]
    known = [name for name in _core.COUNTERS if total[_INDEX[name]]]
    for name in known:
        at = _INDEX[name]
        lines.append(
            (
                f"{name:20}{short(round(float(rate[at]))):>10}{int(total[at]):>16,}",
                False,
            )
        )
    if len(lines) > height - 1:
        lines = [*lines[: height - 2], ("...", False)]
    lines += [("", False)] * (height - 1 - len(lines))
    lines.append(("enter back  q quit  f freeze", False))
    return lines


def table(rates: Rates) -> tuple[list[str], Sequence[list[str]]]:
    """Return a header and a row for each CPU, for a file or a pipe."""
    header = ["CPU", "CORE", "STATE", *(name for name, _, _ in COLUMNS.values())]
    header += [*_WAITS.values(), "DOING"]
    glance = rates.glance
    rows = [
        [
            *(str(cpu), str(glance.cores[cpu]), state),
            *(str(round(float(rates.columns[key][cpu]))) for key in COLUMNS),
            *(soon(rates.wait(name, cpu)) for name in _WAITS),
            clean(_doing(glance, cpu)),
        ]
        for cpu, state in enumerate(glance.states)
    ]
    return header, rows
