"""Which call was run where, and which interrupt was whose: a kernel's trace, matched.

The tracepoints name a csd by its address, which says little: a csd is used again as
soon as it is unlocked, an idle task that polls records nothing of what it runs, and a
wake-up names only the first of its list. So a queue is followed as the kernel has it
(``llist``, ``__flush_smp_call_function_queue`` in kernel/smp.c):

- csd=0 at a function's entry: it ran locally and was in no queue.
- A queueing that its sender follows with an IPI found the list empty: it begins a new
  list, and those before it had been taken. One without an IPI joins a list that is not
  known to be taken, or else found its target polling (elided).
- The first function of a list that is seen means that the list was taken whole;
  ``sched_ttwu_pending`` runs all wake-ups of its list and names the first.
- A csd that is queued again has run, and so has one that was queued before an interrupt
  which has returned: unseen, where no entry says it.
- IPIs of one CPU and vector are taken first in, first out, and two at most are under
  way: one in service and one pending. A third is one with the pending one.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict, deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from shmipi.trace.ftrace import Ftrace, Record, fields_of

__all__ = [
    "FLUSHES",
    "TTWU",
    "Queued",
    "Sent",
    "Traffic",
    "distribution",
    "match",
    "quantile",
    "targets_of",
]

_CALL: Final = "generic_smp_call_function"
_NONE: Final = frozenset(("0x0", "0", "(null)", "(nil)", ""))
_UNDER_WAY: Final = 2
#: `ipi_entry: (reason)` of arm64, by what x86 calls the same.
_REASONS: Final = {
    "Rescheduling interrupts": "reschedule",
    "Function call interrupts": "call_function",
    "CPU stop interrupts": "stop",
    "CPU stop NMIs": "stop_nmi",
    "Timer broadcast interrupts": "timer",
    "IRQ work interrupts": "irq_work",
}
#: The function that a list of wake-ups is run by.
TTWU: Final = "sched_ttwu_pending"
#: Vectors whose handler empties the call_single_queue.
FLUSHES: Final = frozenset(("call_function", "call_function_single"))
#: Entries and exits of these are IPIs; of others (local_timer ...) they are not.
_VECTORS: Final = frozenset((*FLUSHES, "reschedule", "irq_work"))


@dataclass(eq=False)
class Queued:
    """A csd on its way: ``how`` it got there, and what became of it."""

    record: Record
    cpu: int
    csd: str
    function: str
    #: "rung", "coalesced" or "elided".
    how: str
    #: The entry that ran it, of a list of wake-ups the first one's; None: unseen.
    entry: Record | None = None


@dataclass(eq=False)
class Sent:
    """An IPI: its entry is None when it was one with another that was pending."""

    record: Record
    cpu: int
    vector: str
    entry: Record | None = None


@dataclass
class _List:
    """What stands in a CPU's queue since it was empty."""

    members: list[Queued] = field(default_factory=list)
    taken: bool = False


@dataclass
class Traffic:
    """What was sent in a trace, and what came of it."""

    queued: list[Queued] = field(default_factory=list)
    sent: list[Sent] = field(default_factory=list)
    #: Vectors taken, and those of them that no send in the trace explains.
    entered: Counter[str] = field(default_factory=Counter)
    entries_without_send: Counter[str] = field(default_factory=Counter)
    entries_local: int = 0
    entries_matched: int = 0
    entries_unmatched: int = 0
    entries_without_exit: int = 0
    largest_batch: int = 0
    #: How long functions ran that were queued, ns.
    ran_ns: list[int] = field(default_factory=list)
    #: Entries of functions that ran locally.
    local: list[Record] = field(default_factory=list)
    #: What ends an entry, of a function or a vector, by the line of that.
    exits: dict[int, Record] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """Return counts, and distributions in us: count, p50, p99, max, sum."""
        how = Counter(queued.how for queued in self.queued)
        run = [queued for queued in self.queued if queued.entry is not None]
        return {
            "queued": len(self.queued),
            **{name: how[name] for name in ("rung", "coalesced", "elided")},
            "run": len(run),
            "unseen": len(self.queued) - len(run),
            "entries_local": self.entries_local,
            "entries_matched": self.entries_matched,
            "entries_unmatched": self.entries_unmatched,
            "entries_without_exit": self.entries_without_exit,
            "largest_batch": self.largest_batch,
            "queue_to_function_us": distribution(
                entry.time_ns - queued.record.time_ns
                for queued in run
                if (entry := queued.entry) is not None
            ),
            "function_run_us": distribution(self.ran_ns),
            "ipi": {vector: self._vector(vector) for vector in self._vectors()},
        }

    def _vectors(self) -> list[str]:
        return sorted({*self.entered, *(sent.vector for sent in self.sent)})

    def _vector(self, vector: str) -> dict[str, Any]:
        sent = [one for one in self.sent if one.vector == vector]
        return {
            "sent": len(sent),
            "entered": self.entered[vector],
            "entries_without_send": self.entries_without_send[vector],
            "send_to_entry_us": distribution(
                entry.time_ns - one.record.time_ns
                for one in sent
                if (entry := one.entry) is not None
            ),
        }


def distribution(values_ns: Iterable[int]) -> dict[str, float | None]:
    """Return count, p50, p99, max and sum, in us.

    A quantile is the smallest value that at least that share of all does not exceed.
    """
    values = sorted(values_ns)
    if not values:
        return {"count": 0, "p50": None, "p99": None, "max": None, "sum": 0.0}
    return {
        "count": len(values),
        **{f"p{percent}": quantile(values, percent) / 1000 for percent in (50, 99)},
        "max": values[-1] / 1000,
        "sum": sum(values) / 1000,
    }


def quantile(ordered: Sequence[int], percent: int) -> int:
    """Return the smallest value that at least ``percent`` of all do not exceed."""
    return ordered[math.ceil(len(ordered) * percent / 100) - 1]


def match(trace: Ftrace) -> Traffic:
    """Follow every call and every IPI of a trace."""
    return _Matcher(trace).match()


@dataclass
class _Interrupt:
    """A vector in service, and how many lists its CPU had queued when it began."""

    vector: str
    at: int


class _Matcher:
    def __init__(self, trace: Ftrace) -> None:
        self._records = trace.records
        # One SGI is for both kinds of call there.
        self._arm = "ipi_entry" in trace.events
        self._traffic = Traffic()
        self._lists: defaultdict[int, list[_List]] = defaultdict(list)
        self._under_way: defaultdict[tuple[int, str], deque[Sent]] = defaultdict(deque)
        self._inside: defaultdict[int, list[_Interrupt]] = defaultdict(list)
        self._open: defaultdict[int, list[tuple[Record, bool]]] = defaultdict(list)
        self._rung = self._which_were_rung()

    def match(self) -> Traffic:
        for at, record in enumerate(self._records):
            if record.event == "csd_queue_cpu":
                self._queue(at, record)
            elif record.event == "csd_function_entry":
                self._begin(record)
            elif record.event == "csd_function_exit":
                self._end(record)
            elif record.event in ("ipi_send_cpu", "ipi_send_cpumask"):
                self._send(record)
            elif vector := self._vector_of(record, "_entry"):
                self._enter(at, record, vector)
            elif vector := self._vector_of(record, "_exit"):
                self._leave(record, vector)
        self._traffic.entries_without_exit = sum(map(len, self._open.values()))
        return self._traffic

    # ---- who rang ------------------------------------------------------------------

    def _which_were_rung(self) -> set[int]:
        """Return the positions of the queueings that an IPI of their sender followed.

        A sender may be interrupted between the two, and its interrupt queue and send,
        too: each depth is looked at by itself.
        """
        rung: set[int] = set()
        depth: Counter[int] = Counter()
        waiting: defaultdict[tuple[int, int], list[int]] = defaultdict(list)
        for at, record in enumerate(self._records):
            here = record.cpu, depth[record.cpu]
            if record.event == "csd_queue_cpu":
                waiting[here].append(at)
            elif record.event in ("ipi_send_cpu", "ipi_send_cpumask"):
                fields = fields_of(record)
                if fields.get("callback", "").startswith(_CALL):
                    targets = set(targets_of(fields))
                    for queued in reversed(waiting[here]):
                        cpu = int(fields_of(self._records[queued])["cpu"])
                        if cpu in targets:
                            targets.discard(cpu)
                            rung.add(queued)
                    waiting[here].clear()
            elif self._vector_of(record, "_entry"):
                depth[record.cpu] += 1
                waiting[record.cpu, depth[record.cpu]].clear()
            elif self._vector_of(record, "_exit"):
                depth[record.cpu] = max(0, depth[record.cpu] - 1)
        return rung

    def _vector_of(self, record: Record, end: str) -> str | None:
        """Return the vector that this event enters (or leaves), None: no IPI's."""
        if record.event == f"ipi{end}":
            reason = record.text.strip("()")
            return _REASONS.get(reason, reason)
        vector = record.event.removesuffix(end)
        return vector if vector in _VECTORS and record.event.endswith(end) else None

    # ---- calls ---------------------------------------------------------------------

    def _queue(self, at: int, record: Record) -> None:
        fields = fields_of(record)
        cpu, csd = int(fields["cpu"]), fields["csd"]
        lists = self._lists[cpu]
        for before in lists:  # it is queued again: it has run
            for queued in before.members:
                if queued.csd == csd:
                    before.members.remove(queued)
                    before.taken = True
                    break
        queued = Queued(record, cpu, csd, fields["func"], "rung")
        if at in self._rung:
            for before in lists:
                before.taken = True
            lists.append(_List())
        elif lists and not lists[-1].taken:
            queued.how = "coalesced"
        else:
            queued.how = "elided"
            lists.append(_List())
        lists[-1].members.append(queued)
        self._traffic.queued.append(queued)

    def _begin(self, record: Record) -> None:
        csd = fields_of(record)["csd"]
        if csd in _NONE or int(csd, 16) == 0:
            self._traffic.entries_local += 1
            self._traffic.local.append(record)
            self._open[record.cpu].append((record, False))
            return
        # The newest of this address: an older one that is still there ran unseen.
        for taken in reversed(self._lists[record.cpu]):
            first = next((q for q in taken.members if q.csd == csd), None)
            if first is not None:
                break
        else:
            self._traffic.entries_unmatched += 1
            self._open[record.cpu].append((record, True))
            return
        taken.taken = True
        batch = [first]
        if first.function == TTWU:
            batch = [q for q in taken.members if q.function == first.function]
        for queued in batch:
            queued.entry = record
            taken.members.remove(queued)
        self._traffic.entries_matched += 1
        self._traffic.largest_batch = max(self._traffic.largest_batch, len(batch))
        self._open[record.cpu].append((record, True))

    def _end(self, record: Record) -> None:
        began = self._open[record.cpu]
        if not began:
            return
        entry, queued = began.pop()
        self._traffic.exits[entry.line] = record
        if queued:
            self._traffic.ran_ns.append(record.time_ns - entry.time_ns)

    # ---- interrupts ----------------------------------------------------------------

    def _send(self, record: Record) -> None:
        fields = fields_of(record)
        callback = fields.get("callback", "")
        if callback in _NONE:
            vector = "reschedule"
        elif not callback.startswith(_CALL):
            vector = "irq_work"  # it raises itself, and says the work's function
        elif self._arm or record.event == "ipi_send_cpumask":
            vector = "call_function"
        else:
            vector = "call_function_single"
        for cpu in targets_of(fields):
            sent = Sent(record, cpu, vector)
            self._traffic.sent.append(sent)
            under_way = self._under_way[cpu, vector]
            if len(under_way) < _UNDER_WAY:
                under_way.append(sent)

    def _enter(self, at: int, record: Record, vector: str) -> None:
        self._traffic.entered[vector] += 1
        under_way = self._under_way[record.cpu, vector]
        if under_way:
            under_way.popleft().entry = record
        else:
            self._traffic.entries_without_send[vector] += 1
        self._inside[record.cpu].append(_Interrupt(vector, at))

    def _leave(self, record: Record, vector: str) -> None:
        cpu, inside = record.cpu, self._inside[record.cpu]
        began = 0
        if inside:
            began = inside.pop().at
            self._traffic.exits[self._records[began].line] = record
        if vector not in FLUSHES:
            return
        line = self._records[began].line
        for taken in self._lists[cpu]:
            taken.members = [q for q in taken.members if q.record.line >= line]
        # The last one stays: what comes without an IPI may join it.
        self._lists[cpu] = [
            *(taken for taken in self._lists[cpu][:-1] if taken.members),
            *self._lists[cpu][-1:],
        ]


def targets_of(fields: dict[str, str]) -> Sequence[int]:
    """Return the CPUs of `cpu=1`, or of a mask in hexadecimal words."""
    if "cpu" in fields:
        return [int(fields["cpu"])]
    mask = int(fields["cpumask"].replace(",", ""), 16)
    return [cpu for cpu in range(mask.bit_length()) if mask >> cpu & 1]
