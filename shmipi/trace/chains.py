"""How a trace shows the kernel functions that an IPI passed, by architecture.

The chains themselves are the controllers' (``Chip.chains``; ``irq/chips/chain.py`` says
how they are written). Here a trace is read by them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from shmipi import _core
from shmipi.irq.chips import CHIPS
from shmipi.irq.chips.chain import (
    CALLS,
    QUEUE_MANY,
    Chain,
    Stage,
    bare,
)
from shmipi.machine import doorbells

__all__ = ["CALLS", "CHAINS", "Chain", "Explained", "Stage", "Step", "read"]

#: By the controller's name, then by the call's (``CALLS``).
CHAINS: Final = {name: chip.chains for name, chip in CHIPS.items()}

# ---- what no function of the kernel stands for: the hardware, here -------------------

_HERE: Final[Mapping[str, str]] = {
    "call_entry": "called",
    "call_interrupt": "its handler is about the queue of CPU {cpu}",
    "call_begin": "a call_single_data is filled",
    "queue_push": "it is locked",
    "csd_queue_cpu": "one compare-and-swap of the word of CPU {cpu}",
    "csd_coalesced": "coalesced: the queue of CPU {cpu} was not empty",
    "wake_idle_without_ipi": "elided: CPU {cpu} polls",
    "call_ipi": "the chip is asked",
    "ipi_send_cpumask": "the chip is asked, once for all",
    "ipi_send_cpu": "{line} for CPU {cpu}",
    "line_set": "{line} is pending at CPU {cpu}",
    "line_kept": "{line} needs no ring: it was pending already, or is masked",
    "chip_message": "message byte of CPU {cpu}",
    "cpu_halt": "CPU {cpu} halts again",
    "cpu_wake": "CPU {cpu} wakes",
    "irq_entry": "in the signal's handler: the kick is acknowledged",
    "irq_masked": "interrupts are off: replayed when they are enabled",
    "irq_exit": "the signal's handler returns",
    "ipi_entry": "CPU {cpu} takes what is pending",
    "ipi_exit": "nothing more is pending",
    "line_ack": "{line} taken",
    "line_eoi": "{line} ended",
    "flush": "the whole queue is taken, in one exchange",
    "csd_function_entry": "func runs",
    "csd_function_exit": "func has returned",
    "csd_unlock": "after func: the caller waits for it",
    "call_end": "the caller saw it unlocked",
    "resched_idle": "the idle loop found NEED_RESCHED",
    "scheduler_ipi": "the nudge is all there is to it",
    "nmi_send": "pending at CPU {cpu}",
    "nmi_entry": "in the NMI's signal handler",
    "nmi_handler": "the handler begins",
    "nmi_exit": "the handler has returned",
}
_PQ: Final = (
    "00: it notifies",
    "01: off",
    "10: Q is set, EOI triggers again",
    "11: absorbed",
)


# ---- reading a trace -----------------------------------------------------------------


@dataclass(frozen=True)
class Step:
    """A record of the trace, and what it stands for.

    ``at_ns`` counts from the call's first record, ``stage_ns`` from the record before,
    whichever CPU wrote that. ``calls`` are the kernel functions as they are called,
    outermost first and indented; none where only hardware acts. ``note`` is what
    happened here.
    """

    at_ns: int
    stage_ns: int
    cpu: int
    target: int
    event: str
    calls: tuple[str, ...]
    note: str

    @property
    def functions(self) -> list[str]:
        """The bare names of ``calls``."""
        return [bare(call) for call in self.calls]


@dataclass
class Explained:
    """One call as it was recorded: its steps, and what did not happen."""

    steps: list[Step]
    #: CPUs that were sent no interrupt, and why: "elided" or "coalesced".
    spared: dict[int, str] = field(default_factory=dict)
    #: Functions that the call would have passed with an interrupt, and did not.
    not_passed: list[str] = field(default_factory=list)
    #: The same in sentences, with all that was not needed on the way.
    words: list[str] = field(default_factory=list)

    def functions(self, cpu: int | None = None) -> list[str]:
        """Return the functions passed, in order; on one CPU, or on all."""
        return [
            name
            for step in self.steps
            if cpu is None or step.cpu == cpu
            for name in step.functions
        ]


def read(
    records: Iterable[Any],
    *,
    controller: str,
    call: str,
    sender: int,
    lines: Mapping[int, tuple[str, str]],
    ncpus: int,
    doorbell: str = "futex",
) -> Explained:
    """Explain one call from its trace records (``Cluster.trace_events()``), in order.

    ``records`` are those of the time of the call; of other calls' call_single_data they
    may hold some, which are left out. ``lines`` gives each line's name and use.
    Raises ``KeyError`` for a controller or a call that there is no chain for.
    """
    hardware = CHIPS[controller].hardware
    reader = _Reader(CHAINS[controller][call], hardware, sender, lines, doorbell)
    reader.ncpus = ncpus
    records = list(records)
    begun = _core.TRACE_EVENTS.index("call_begin")
    own = {
        int(record["csd"])
        for record in records
        if int(record["event"]) == begun and int(record["slot"]) == sender
    }
    for record in records:
        if int(record["event"]) in _NO_STEP:
            continue
        if not own or int(record["csd"]) in {0, *own}:
            reader.take(record)
    return reader.result()


class _Reader:
    """Turns records into steps; remembers where each CPU is."""

    def __init__(
        self,
        chain: Chain,
        hardware: Mapping[str, str],
        sender: int,
        lines: Mapping[int, tuple[str, str]],
        doorbell: str,
    ) -> None:
        self.chain = chain
        self.sender = sender
        self.lines = lines
        self.hardware = hardware
        bell = doorbells.BY_NAME[doorbell]
        self.ring, self.sleep = bell.rings, bell.sleeps
        self.ncpus = 0
        self.steps: list[Step] = []
        self.first = self.last = 0
        self.asked = "one"  # how many CPUs the sender asked the chip for, last
        self.inside: set[tuple[int, str]] = set()  # a CPU, and what it is inside of
        self.demuxing: set[int] = set()
        self.states: dict[int, str] = {}  # of each target: what became of its IPI
        self.depths: dict[int, int] = {}  # indentation of what empties a CPU's queue
        self.by_line = False  # the NMI came by a line that can be masked
        self.more: list[str] = []

    def take(self, record: Any) -> None:
        """Add the step of one record."""
        event = _core.TRACE_EVENTS[int(record["event"])]
        at, cpu = int(record["stamp"]), int(record["slot"])
        if not self.steps:
            self.first = self.last = at
        words = self._words(event, cpu, record)
        fill = self._fill(event, record)
        stage = self._stage(event, words)
        note = self.hardware.get(event, _HERE.get(event, event))
        note = self.hardware.get(f"{event}={record['arg']}", note)
        if event == "rung":
            note = self._rung(record)
        elif event == "chip_trigger":
            note = f"0 written to trig_mmio: P and Q were {_PQ[int(record['arg']) & 3]}"
        elif event == "chip_eoi":
            note = "P and Q cleared" + (
                ": Q was set, triggered again" if int(record["arg"]) & 1 else ""
            )
        elif event == "chip_demux":
            note = (
                "messages exchanged with 0"
                if int(record["arg"])
                else "no more messages: the loop ends"
            )
        elif event == "cpu_wake":
            note = f"CPU {cpu} wakes: back from {self.sleep}"
        elif event == "nmi_entry" and self.by_line:
            note = "in the handler of the line that stands in for an NMI"
        calls = self._indented(event, stage.functions if stage is not None else (), cpu)
        self.steps.append(
            Step(
                at - self.first,
                at - self.last,
                cpu,
                int(fill["cpu"]),
                event,
                tuple(call.format(**fill) for call in calls),
                note.format(**fill),
            )
        )
        self.last = at
        self._follow(event, cpu, fill, note.format(**fill))

    def _words(self, event: str, cpu: int, record: Any) -> set[str]:
        """Return what ``Stage.when`` may ask for, as it is at this record."""
        arg = int(record["arg"])
        words = {f"={arg}"}
        if event in _BY_LINE and arg in self.lines:
            words.add(self.lines[arg][1])
        if event == "call_ipi":
            self.asked = "one"
        elif event == "ipi_send_cpu":
            words.add(self.asked)
        elif event == "ipi_send_cpumask":
            self.asked = "mask"
            # One register write for all that are not the sender.
            if int(record["func"]) == 1 and int(record["cpu"]) == self.ncpus - 1:
                words.add("all but self")
            words.add("mask")
        elif event == "flush":
            in_handler = any((cpu, end) in self.inside for end in _EXITS)
            words.add("interrupt" if in_handler else "idle")
        elif event == "chip_demux" and arg and cpu not in self.demuxing:
            words.add("first")
        return words

    def _stage(self, event: str, words: set[str]) -> Stage | None:
        for stage in self.chain.stages:
            if stage.event == event and (not stage.when or stage.when in words):
                return stage
        return None

    def _indented(
        self, event: str, calls: tuple[str, ...], cpu: int
    ) -> tuple[str, ...]:
        if event in ("flush", "csd_function_entry", "csd_unlock") and len(calls) == 1:
            return (" " * self.depths.get(cpu, 0) + calls[0],)
        if calls and event in ("flush", "call_interrupt"):
            deepest = len(calls[-1]) - len(calls[-1].lstrip())
            self.depths[cpu] = deepest + 2 * (event == "call_interrupt")
        return calls

    def _fill(self, event: str, record: Any) -> dict[str, Any]:
        arg = int(record["arg"])
        line = self.lines.get(arg, (f"line {arg}", ""))[0] if event in _BY_LINE else ""
        cpu = int(record["slot" if event == "ipi_send_cpumask" else "cpu"])
        return {"cpu": cpu, "line": line}

    def _rung(self, record: Any) -> str:
        way, cpu = int(record["arg"]), int(record["cpu"])
        if way == 1:
            return f"doorbell of CPU {cpu}: {self.ring}"
        if way == 2:
            return f"kick of CPU {cpu}: rt_tgsigqueueinfo, a real-time signal"
        if way == 3:
            return f"NMI of CPU {cpu}: a signal of its own, which nothing masks"
        return f"not rung: CPU {cpu} polls, or somebody has rung it already"

    def _follow(self, event: str, cpu: int, fill: dict[str, Any], note: str) -> None:
        if event == "line_ack":
            self.by_line = True
        elif event in _ENTRIES:
            self.inside.add((cpu, _ENTRIES[event]))
        elif event in _EXITS:
            self.inside.discard((cpu, event))
        elif event == "chip_demux":
            self.demuxing.add(cpu)
        elif event == "chip_eoi":
            self.demuxing.discard(cpu)
        if cpu != self.sender:
            return
        if event == "wake_idle_without_ipi":
            self.states[fill["cpu"]] = "elided"
        elif event == "csd_coalesced":
            self.states[fill["cpu"]] = "coalesced"
        elif event == "ipi_send_cpu":
            self.states[fill["cpu"]] = "sent"
        elif event == "line_kept" or note.startswith("not rung"):
            self.more.append(note)

    def result(self) -> Explained:
        """Say what did not happen, once all records are taken."""
        found = Explained(self.steps)
        found.spared = {
            cpu: state for cpu, state in self.states.items() if state != "sent"
        }
        if found.spared:
            passed = set(found.functions())
            found.not_passed = list(
                dict.fromkeys(
                    name
                    for stage in self.chain.interrupt
                    if self._could(stage)
                    for name in stage.names
                    if name not in passed
                )
            )
        for state, words in _WHY.items():
            cpus = [cpu for cpu, why in found.spared.items() if why == state]
            if cpus:
                found.words.append(words.format(cpus=_cpus(cpus)))
        if found.spared and found.not_passed:
            whom = "" if len(found.spared) == len(self.states) else " for them"
            found.words.append(f"Not passed{whom}: {', '.join(found.not_passed)}.")
        for note in self.more:
            found.words.append(note[0].upper() + note[1:] + ".")
        if not found.words and self.steps:
            found.words.append(
                "Nothing was elided and nothing coalesced: every step was taken."
            )
        return found

    def _could(self, stage: Stage) -> bool:
        """Would the interrupt have gone this way?  Of alternatives one is named."""
        several = self.chain.queue == QUEUE_MANY and len(self.states) > 1
        if stage.event in ("call_ipi", "ipi_send_cpumask") and several == (
            stage.event == "call_ipi"
        ):
            return False
        if stage.when in ("one", "call_single"):
            return not several
        if stage.when in ("all but self", "call"):
            return several
        if stage.when == "mask":
            return several and not any(
                other.when == "all but self" for other in self.chain.interrupt
            )
        return stage.when != "=6"


#: Not on the way of a call, or said by others: for exporters.
_NO_STEP: Final = {
    _core.TRACE_EVENTS.index(name)
    for name in (
        "vector_entry",
        "vector_exit",
        "reschedule_ipi",
        "irq_work_ipi",
        "cpumask",
        "cpu_online",
        "cpu_offline",
        "cpu_dead",
    )
}
#: What a CPU is inside of, from the one record to the other.
_ENTRIES: Final = {
    "irq_entry": "irq_exit",
    "ipi_entry": "ipi_exit",
    "call_interrupt": "flush",
}
_EXITS: Final = tuple(_ENTRIES.values())
#: Events whose ``arg`` is a line.
_BY_LINE: Final = {
    "call_interrupt",
    "call_ipi",
    "chip_message",
    "ipi_send_cpu",
    "ipi_send_cpumask",
    "line_ack",
    "line_eoi",
    "line_kept",
    "line_set",
    "scheduler_ipi",
}
_WHY: Final = {
    "elided": "Elided: {cpus} polling (TIF_POLLING_NRFLAG), which is a promise to look"
    " at the queue and at NEED_RESCHED. The store was the interrupt: the chip was not"
    " touched, nobody was rung.",
    "coalesced": "Coalesced: the queue of {cpus} not empty, so whoever queued first has"
    " sent the interrupt that this call is served by as well.",
}


def _cpus(cpus: Sequence[int]) -> str:
    if len(cpus) == 1:
        return f"CPU {cpus[0]} was"
    return f"CPUs {', '.join(map(str, cpus))} were"
