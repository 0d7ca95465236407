"""A recording as spans, marks and arrows: what viewers draw and a summary counts."""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Final

from shmipi.trace.kernel import Event, Pointer
from shmipi.trace.matching import distribution

__all__ = ["Arrow", "Mark", "Span", "Timeline", "summary", "timeline"]

#: One in service, and one pending: more are one with the latter.
_UNDER_WAY: Final = 2
_SINGLE: Final = "generic_smp_call_function_single_interrupt"


@dataclass(eq=False)
class Span:
    """Something that lasted, on a CPU: a function, an interrupt, a sleep."""

    cpu: int
    start_ns: int
    end_ns: int
    name: str
    #: "function", "interrupt", "softirq" or "idle".
    kind: str
    fields: dict[str, Any]
    #: It had not ended when the recording did, or its CPU died.
    cut: bool = False


@dataclass(eq=False)
class Mark:
    """Something that was done at once, on a CPU: a call queued, an IPI sent."""

    cpu: int
    time_ns: int
    name: str
    fields: dict[str, Any]
    targets: tuple[int, ...] = ()


@dataclass(eq=False)
class Arrow:
    """From who sent to what it caused."""

    mark: Mark
    span: Span


@dataclass
class Timeline:
    """The whole recording."""

    spans: list[Span] = field(default_factory=list)
    marks: list[Mark] = field(default_factory=list)
    arrows: list[Arrow] = field(default_factory=list)
    #: Who had which CPU number: its name.
    cpus: dict[int, str] = field(default_factory=dict)
    begin_ns: int = 0
    end_ns: int = 0


_KINDS: Final = {
    "csd_function": "function",
    "softirq": "softirq",
}


def _split(name: str) -> tuple[str, str] | None:
    for end in ("_entry", "_exit"):
        if name.endswith(end):
            return name.removesuffix(end), end
    return None


def _label(base: str, fields: dict[str, Any]) -> str:
    if base == "csd_function":
        return str(fields["func"].name)
    if base == "ipi":
        return str(fields["reason"])
    if base == "softirq":
        return f"softirq {fields['vec']}"
    if base == "irq_handler":
        return f"irq {fields['irq']}"
    return base


class _Builder:
    def __init__(self) -> None:
        self.found = Timeline()
        self._open: defaultdict[int, list[tuple[str, Span]]] = defaultdict(list)
        #: By csd: it is on one queue at a time.
        self._queued: dict[int, Mark] = {}
        #: By target: wake-ups, of which one handler takes all.
        self._woken: defaultdict[int, list[Mark]] = defaultdict(list)
        self._sent: defaultdict[tuple[int, str], deque[Mark]] = defaultdict(deque)

    def take(self, event: Event, ncpus: int) -> None:
        found, cpu = self.found, event.cpu
        found.begin_ns = found.begin_ns or event.time_ns
        found.end_ns = max(found.end_ns, event.time_ns)
        found.cpus.setdefault(
            cpu, f"CPU {cpu}" if cpu < ncpus else f"{event.task} {event.pid}"
        )
        parts = _split(event.name)
        if event.name == "cpu_idle":
            if event.fields["state"] == 0xFFFFFFFF:
                self._close(cpu, "idle", event.time_ns)
            else:
                self._begin(event, "idle", "idle", "idle")
        elif parts is not None and parts[1] == "_entry":
            base = parts[0]
            kind = _KINDS.get(base, "interrupt")
            span = self._begin(event, base, _label(base, event.fields), kind)
            if base == "csd_function":
                self._arrive(span)
            elif kind == "interrupt":
                self._interrupt(span, base)
        elif parts is not None:
            self._close(cpu, parts[0], event.time_ns)
        else:
            self._mark(event)

    def _begin(self, event: Event, base: str, name: str, kind: str) -> Span:
        span = Span(event.cpu, event.time_ns, -1, name, kind, event.fields)
        self._open[event.cpu].append((base, span))
        self.found.spans.append(span)
        return span

    def _close(self, cpu: int, base: str, now: int) -> None:
        """End the innermost of that kind; what is in it has ended unseen."""
        inside = self._open[cpu]
        if not any(name == base for name, _ in inside):
            return  # it began before the recording did
        while True:
            name, span = inside.pop()
            span.end_ns = now
            if name == base:
                return
            span.cut = True

    def _mark(self, event: Event) -> None:
        fields = event.fields
        targets: tuple[int, ...] = ()
        if "cpumask" in fields:
            mask = fields["cpumask"]
            targets = tuple(n for n in range(mask.bit_length()) if mask >> n & 1)
        elif "cpu" in fields:
            targets = (fields["cpu"],)
        mark = Mark(event.cpu, event.time_ns, event.name, fields, targets)
        self.found.marks.append(mark)
        if event.name == "csd_queue_cpu":
            self._queued[fields["csd"]] = mark
            if fields["func"].name == "sched_ttwu_pending":
                self._woken[fields["cpu"]].append(mark)
        elif event.name in ("ipi_send_cpu", "ipi_send_cpumask"):
            vector = _vector_of(fields["callback"], event.name)
            for cpu in targets:
                under_way = self._sent[cpu, vector]
                if len(under_way) < _UNDER_WAY:
                    under_way.append(mark)
        elif event.name == "cpuhp_enter" and event.cpu >= 0:
            self._gone(fields["cpu"], event)

    def _gone(self, cpu: int, event: Event) -> None:
        if event.fields["fun"].name != "cpuhp_report_idle_dead":
            return
        for _, span in self._open.pop(cpu, []):
            span.end_ns, span.cut = event.time_ns, True
        for csd in [c for c, m in self._queued.items() if m.fields["cpu"] == cpu]:
            del self._queued[csd]
        self._woken.pop(cpu, None)
        for key in [key for key in self._sent if key[0] == cpu]:
            del self._sent[key]

    def _arrive(self, span: Span) -> None:
        if span.name == "sched_ttwu_pending":
            for mark in self._woken.pop(span.cpu, []):
                self._queued.pop(mark.fields["csd"], None)
                self.found.arrows.append(Arrow(mark, span))
            return
        mark_of = self._queued.pop(span.fields["csd"], None)
        if mark_of is not None:
            self.found.arrows.append(Arrow(mark_of, span))

    def _interrupt(self, span: Span, base: str) -> None:
        vectors = [base]
        if base == "ipi":
            reason = span.fields["reason"]
            vectors = {
                "Rescheduling interrupts": ["reschedule"],
                "Function call interrupts": ["call_function_single", "call_function"],
                "IRQ work interrupts": ["irq_work"],
            }.get(reason, [])
        sent = [self._sent[span.cpu, vector] for vector in vectors]
        first = min(
            (queue for queue in sent if queue),
            key=lambda queue: queue[0].time_ns,
            default=None,
        )
        if first:
            self.found.arrows.append(Arrow(first.popleft(), span))

    def end(self) -> Timeline:
        for inside in self._open.values():
            for _, span in inside:
                span.end_ns, span.cut = self.found.end_ns, True
        return self.found


def _vector_of(callback: Pointer, name: str) -> str:
    if name == "ipi_send_cpumask":
        return "call_function"
    if not callback.address:
        return "reschedule"
    return "call_function_single" if callback.name == _SINGLE else "irq_work"


def timeline(events: Iterable[Event], ncpus: int) -> Timeline:
    """Make spans, marks and arrows of a recording's events (``kernel.events``)."""
    builder = _Builder()
    for event in events:
        builder.take(event, ncpus)
    return builder.end()


# ---- who interrupts whom -------------------------------------------------------------


def summary(found: Timeline) -> dict[str, Any]:
    """Say who interrupts whom, for what, how long it took, and what needed no IPI.

    ``calls``: a row for each sender, target and function: how often it was queued, how
    many of those were rung (an IPI was sent for it), coalesced (another had been sent)
    and elided (the target polled), how many were seen to run, and two distributions in
    us: from its queueing to the function's begin, and of the function itself.
    ``interrupts``: by target and vector how many were sent and taken, and from the one
    to the other. ``idle``: by CPU how often it slept, and how long.
    """
    how = _how(found)
    ran = {id(arrow.mark): arrow.span for arrow in found.arrows}
    rows: defaultdict[tuple[int, int, str], list[Mark]] = defaultdict(list)
    for mark in found.marks:
        if mark.name == "csd_queue_cpu":
            rows[mark.cpu, mark.fields["cpu"], mark.fields["func"].name].append(mark)
    calls: list[dict[str, Any]] = []
    for (source, target, function), marks in rows.items():
        spans = [(mark, ran[id(mark)]) for mark in marks if id(mark) in ran]
        kinds = [how[id(mark)] for mark in marks]
        calls.append(
            {
                "from": source,
                "to": target,
                "function": function,
                "queued": len(marks),
                **{kind: kinds.count(kind) for kind in ("rung", "coalesced", "elided")},
                "run": len(spans),
                "queue_to_function_us": distribution(
                    span.start_ns - mark.time_ns for mark, span in spans
                ),
                "function_us": distribution(
                    span.end_ns - span.start_ns for _, span in spans if not span.cut
                ),
                "callsites": sorted({m.fields["callsite"].name for m in marks}),
            }
        )
    calls.sort(key=lambda row: (-row["queued"], row["from"], row["to"]))
    return {
        "seconds": (found.end_ns - found.begin_ns) / 1e9,
        "cpus": {str(cpu): name for cpu, name in sorted(found.cpus.items())},
        "calls": calls,
        "local": sum(
            span.kind == "function" and not span.fields["csd"] for span in found.spans
        ),
        "interrupts": _interrupts(found),
        "idle": {
            str(cpu): distribution(
                span.end_ns - span.start_ns
                for span in found.spans
                if span.kind == "idle" and span.cpu == cpu
            )
            for cpu in sorted({s.cpu for s in found.spans if s.kind == "idle"})
        },
    }


def _how(found: Timeline) -> dict[int, str]:
    """Return by a queueing's identity what its sender did next: rang, or not."""
    how: dict[int, str] = {}
    waiting: defaultdict[tuple[int, int], list[Mark]] = defaultdict(list)
    for mark in found.marks:
        if mark.name == "csd_queue_cpu":
            how[id(mark)] = "coalesced"
            waiting[mark.cpu, mark.fields["cpu"]].append(mark)
        elif mark.name == "sched_wake_idle_without_ipi":
            _settle(how, waiting[mark.cpu, mark.fields["cpu"]], "elided")
        elif mark.name in ("ipi_send_cpu", "ipi_send_cpumask"):
            vector = _vector_of(mark.fields["callback"], mark.name)
            if vector.startswith("call_function"):
                for cpu in mark.targets:
                    _settle(how, waiting[mark.cpu, cpu], "rung")
    return how


def _settle(how: dict[int, str], waiting: list[Mark], kind: str) -> None:
    """Of one sender's queueings for one target the last is the one that is meant."""
    if waiting:
        how[id(waiting[-1])] = kind
        waiting.clear()


def _interrupts(found: Timeline) -> list[dict[str, Any]]:
    sent: defaultdict[tuple[int, str], int] = defaultdict(int)
    for mark in found.marks:
        if mark.name in ("ipi_send_cpu", "ipi_send_cpumask"):
            for cpu in mark.targets:
                sent[cpu, _vector_of(mark.fields["callback"], mark.name)] += 1
    source = {
        id(arrow.span): arrow.mark
        for arrow in found.arrows
        if arrow.span.kind == "interrupt"
    }
    spans: defaultdict[tuple[int, str], list[Span]] = defaultdict(list)
    for span in found.spans:
        if span.kind == "interrupt":
            by = source.get(id(span))
            name = span.name
            if by is not None:
                name = _vector_of(by.fields["callback"], by.name)
            spans[span.cpu, name].append(span)
    return [
        {
            "cpu": cpu,
            "vector": vector,
            "sent": sent.get((cpu, vector), 0),
            "taken": len(spans[cpu, vector]),
            "send_to_entry_us": distribution(
                span.start_ns - source[id(span)].time_ns
                for span in spans[cpu, vector]
                if id(span) in source
            ),
            "interrupt_us": distribution(
                span.end_ns - span.start_ns
                for span in spans[cpu, vector]
                if not span.cut
            ),
        }
        for cpu, vector in sorted({*sent, *spans})
    ]
