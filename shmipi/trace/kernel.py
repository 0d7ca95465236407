"""A recording in the kernel's words: the names and the fields of its tracepoints.

``include/trace/events/`` of Linux has them: csd.h, ipi.h, sched.h, power.h, irq.h and
cpuhp.h, and x86's irq_vectors.h. The host, which is no CPU of the machine, and other
processes that send have CPU numbers after the last one.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Final, NamedTuple

from shmipi.smp.cpuhp import CpuhpState
from shmipi.trace.events import TraceEvent as E
from shmipi.trace.record import Trace

__all__ = ["FORMATS", "Event", "Pointer", "events", "text_of"]

_NATIVE: Final = 0x80000000
_NAMED: Final = 0x40000000
_IRQS_OFF, _HARDIRQ, _SOFTIRQ, _NMI, _TASK = 1, 2, 4, 8, 16
#: Where csds lie, as it were: an address for each, which its number makes.
_CSD_BASE: Final = 0xFFFF888000000000
#: Where functions and call sites lie: a place for each name, in order of appearance.
_TEXT_BASE: Final = 0xFFFFFFFF81000000
_TEXT_STEP: Final = 0x100
_ONLINE: Final = int(CpuhpState.CPUHP_ONLINE)
SOFTIRQS: Final = (
    *("HI", "TIMER", "NET_TX", "NET_RX", "BLOCK", "IRQ_POLL"),
    *("TASKLET", "SCHED", "HRTIMER", "RCU"),
)


class Pointer(NamedTuple):
    """An address that has a name, as ``%ps`` prints it; 0: none."""

    address: int
    name: str


class Event(NamedTuple):
    """A tracepoint of the kernel, as it would have recorded it."""

    time_ns: int
    cpu: int
    task: str
    pid: int
    #: Columns of irqs-off, need-resched, context, preempt-depth and migrate-disable.
    flags: str
    name: str
    #: In the order of its format.
    fields: dict[str, Any]


def _name(pointer: Pointer) -> str:
    return pointer.name if pointer.address else "0x0"


def _site(pointer: Pointer) -> str:
    return f"{pointer.name}+0x0" if pointer.address else "0x0"


def _hex(address: int) -> str:
    return f"{address:016x}"


def _mask(mask: int, ncpus: int) -> str:
    words = max(1, -(-ncpus // 32))
    return ",".join(
        f"{mask >> 32 * n & 0xFFFFFFFF:08x}" for n in reversed(range(words))
    )


def _vector(fields: dict[str, Any]) -> str:
    return f"vector={fields['vector']}"


def _reason(fields: dict[str, Any]) -> str:
    return f"({fields['reason']})"


#: How the kernel prints each one (TP_printk); those of vectors are ``_vector``.
FORMATS: Final[dict[str, Callable[[dict[str, Any]], str]]] = {
    "csd_queue_cpu": lambda f: (
        f"cpu={f['cpu']} callsite={_site(f['callsite'])} func={_name(f['func'])}"
        f" csd={_hex(f['csd'])}"
    ),
    "csd_function_entry": lambda f: f"func={_name(f['func'])}, csd={_hex(f['csd'])}",
    "csd_function_exit": lambda f: f"func={_name(f['func'])}, csd={_hex(f['csd'])}",
    "ipi_send_cpu": lambda f: (
        f"cpu={f['cpu']} callsite={_site(f['callsite'])}"
        f" callback={_site(f['callback'])}"
    ),
    "ipi_send_cpumask": lambda f: (
        f"cpumask={_mask(f['cpumask'], f['ncpus'])}"
        f" callsite={_site(f['callsite'])} callback={_site(f['callback'])}"
    ),
    "ipi_entry": _reason,
    "ipi_exit": _reason,
    "sched_wake_idle_without_ipi": lambda f: f"cpu={f['cpu']}",
    "cpu_idle": lambda f: f"state={f['state']} cpu_id={f['cpu_id']}",
    "softirq_raise": lambda f: f"vec={f['vec']} [action={SOFTIRQS[f['vec']]}]",
    "softirq_entry": lambda f: f"vec={f['vec']} [action={SOFTIRQS[f['vec']]}]",
    "softirq_exit": lambda f: f"vec={f['vec']} [action={SOFTIRQS[f['vec']]}]",
    "irq_handler_entry": lambda f: f"irq={f['irq']} name={f['name']}",
    "irq_handler_exit": lambda f: f"irq={f['irq']} ret=handled",
    "cpuhp_enter": lambda f: (
        f"cpu: {f['cpu']:04d} target: {f['target']:3d} step: {f['idx']:3d}"
        f" ({_name(f['fun'])})"
    ),
}


def text_of(event: Event) -> str:
    """Return what stands behind the event's name in a line of ftrace."""
    return FORMATS.get(event.name, _vector)(event.fields)


#: x86: what traps are called and their numbers (arch/x86/include/asm/irq_vectors.h).
_X86: Final = {
    "reschedule": ("reschedule", 253),
    "call": ("call_function", 252),
    "call_single": ("call_function_single", 251),
    "irq_work": ("irq_work", 246),
    "timer": ("local_timer", 236),
}
#: arm64 and others: what their only two events of IPIs say (arch/arm64/kernel/smp.c).
_REASONS: Final = {
    "reschedule": "Rescheduling interrupts",
    "call": "Function call interrupts",
    "call_single": "Function call interrupts",
    "irq_work": "IRQ work interrupts",
    "timer": "Timer broadcast interrupts",
    "stop": "CPU stop interrupts",
    "nmi": "CPU backtrace interrupts",
    "icache": "Instruction cache interrupts",
}
_SINGLE: Final = "generic_smp_call_function_single_interrupt"
_MANY: Final = "generic_smp_call_function_interrupt"


@dataclass
class _Mask:
    """An ipi_send_cpumask whose words follow: of the innermost that is open first."""

    record: Any
    left: int
    mask: int = 0


@dataclass
class _Kernel:
    """Turns records into events; knows the names that it gave out."""

    trace: Trace
    places: dict[str, int] = field(default_factory=dict)
    masks: defaultdict[int, list[_Mask]] = field(
        default_factory=lambda: defaultdict(list)
    )

    def __post_init__(self) -> None:
        about = self.trace.about
        self.ncpus = int(about["ncpus"])
        self.names: list[str | None] = about["names"]
        self.natives: list[str] = about["natives"]
        self.pids = {int(slot): int(pid) for slot, pid in about["pids"].items()}
        self.lines = {int(n): tuple(line) for n, line in about["lines"].items()}
        self.x86 = about["controller"] == "apic"

    def pointer(self, name: str) -> Pointer:
        at = self.places.setdefault(name, len(self.places))
        return Pointer(_TEXT_BASE + _TEXT_STEP * at, name)

    def _named(self, number: int) -> str | None:
        return self.names[number - 1] if 0 < number <= len(self.names) else None

    def _function(self, func: int) -> Pointer:
        if func & _NATIVE:
            index = func & ~_NATIVE
            if index < len(self.natives):
                return self.pointer(self.natives[index])
            return self.pointer(f"native_{index}")
        return self.pointer(self._named(func & ~_NAMED) or "python_function")

    def _callsite(self, record: Any, otherwise: str) -> Pointer:
        return self.pointer(self._named(int(record["site"])) or otherwise)

    @staticmethod
    def _csd(number: int) -> int:
        return _CSD_BASE + 64 * number if number else 0

    def event(self, record: Any, name: str, /, **fields: Any) -> Event:
        slot, flags = int(record["slot"]), int(record["flags"])
        pid = self.pids.get(slot, 0)
        if slot >= self.ncpus:
            task = ("host", "firmware", "guest")[min(slot - self.ncpus, 2)]
        elif flags & _TASK:
            task = f"cpu{slot}"
        else:
            task, pid = "<idle>", 0
        context = (
            "Z"
            if flags & _NMI and flags & _HARDIRQ
            else "z"
            if flags & _NMI
            else "H"
            if flags & _HARDIRQ and flags & _SOFTIRQ
            else "h"
            if flags & _HARDIRQ
            else "s"
            if flags & _SOFTIRQ
            else "."
        )
        off = "d" if flags & _IRQS_OFF else "."
        return Event(
            int(record["stamp"]), slot, task, pid, f"{off}.{context}..", name, fields
        )

    def take(self, record: Any) -> Event | None:
        """Return the event that this record is, None: it is none, or not yet."""
        kind, cpu = int(record["event"]), int(record["cpu"])
        arg = int(record["arg"])
        if kind == E.csd_queue_cpu:
            return self.event(
                record,
                "csd_queue_cpu",
                cpu=cpu,
                callsite=self._callsite(record, "__smp_call_single_queue"),
                func=self._function(int(record["func"])),
                csd=self._csd(int(record["csd"])),
            )
        if kind in (E.csd_function_entry, E.csd_function_exit):
            return self.event(
                record,
                E(kind).name,
                func=self._function(int(record["func"])),
                csd=self._csd(int(record["csd"])),
            )
        if kind in (E.call_ipi, E.reschedule_ipi, E.irq_work_ipi):
            site, callback = {
                E.call_ipi: (
                    "send_call_function_single_ipi",
                    self.pointer(_SINGLE),
                ),
                E.reschedule_ipi: ("smp_send_reschedule", Pointer(0, "0x0")),
                E.irq_work_ipi: (
                    "irq_work_raise",
                    self._function(int(record["func"])),
                ),
            }[E(kind)]
            return self.event(
                record,
                "ipi_send_cpu",
                cpu=cpu,
                callsite=self._callsite(record, site),
                callback=callback,
            )
        if kind == E.ipi_send_cpumask:
            self.masks[int(record["slot"])].append(_Mask(record, int(record["csd"])))
            return None
        if kind == E.cpumask:
            return self._mask_word(record)
        if kind in (E.vector_entry, E.vector_exit):
            return self._vector(record, arg & 0xFFFF)
        if kind == E.wake_idle_without_ipi:
            return self.event(record, "sched_wake_idle_without_ipi", cpu=cpu)
        if kind in (E.cpu_halt, E.cpu_wake):
            state = 1 if kind == E.cpu_halt else 0xFFFFFFFF
            return self.event(record, "cpu_idle", state=state, cpu_id=cpu)
        if kind in (E.softirq_raise, E.softirq_entry, E.softirq_exit):
            if arg >= len(SOFTIRQS):
                return None
            return self.event(record, E(kind).name, vec=arg)
        if kind in (E.cpu_online, E.cpu_offline, E.cpu_dead):
            return self._hotplug(record, E(kind), cpu)
        return None

    def _mask_word(self, record: Any) -> Event | None:
        open_masks = self.masks[int(record["slot"])]
        if not open_masks:
            return None  # its begin was overwritten
        mask = open_masks[-1]
        bits = int(record["func"]) | int(record["arg"]) << 32
        mask.mask |= bits << int(record["csd"])
        mask.left -= 1
        if mask.left > 0:
            return None
        open_masks.pop()
        return self.event(
            mask.record,
            "ipi_send_cpumask",
            cpumask=mask.mask,
            callsite=self._callsite(mask.record, "send_call_function_ipi_mask"),
            callback=self.pointer(_MANY),
            ncpus=self.ncpus,
        )

    def _vector(self, record: Any, line: int) -> Event | None:
        end = "entry" if int(record["event"]) == E.vector_entry else "exit"
        name, use = self.lines.get(line, (f"line{line}", "none"))
        if use == "irq":
            more = {"irq": line, "name": name.replace(" ", "_")}
            return self.event(record, f"irq_handler_{end}", **more)
        if self.x86:
            if use not in _X86:
                return None
            name, vector = _X86[use]
            return self.event(record, f"{name}_{end}", vector=vector)
        if use not in _REASONS:
            return None
        return self.event(record, f"ipi_{end}", reason=_REASONS[use])

    def _hotplug(self, record: Any, kind: E, cpu: int) -> Event:
        target, step, function = {
            E.cpu_online: (_ONLINE, CpuhpState.CPUHP_BRINGUP_CPU, "bringup_cpu"),
            E.cpu_offline: (0, CpuhpState.CPUHP_TEARDOWN_CPU, "takedown_cpu"),
            E.cpu_dead: (0, CpuhpState.CPUHP_AP_IDLE_DEAD, "cpuhp_report_idle_dead"),
        }[kind]
        return self.event(
            record,
            "cpuhp_enter",
            cpu=cpu,
            target=target,
            idx=int(step),
            fun=self.pointer(function),
        )


def events(trace: Trace) -> Iterator[Event]:
    """Yield a recording as the kernel's events, in order of time.

    Of records that are no event of the kernel's (a step of the core, an
    interrupt that this architecture has no tracepoint for) nothing is yielded.
    """
    kernel = _Kernel(trace)
    # An event of several records stands where its first one does.
    waiting: list[Event] = []
    for record in trace.records:
        event = kernel.take(record)
        if event is not None:
            waiting.append(event)
        if waiting and not any(kernel.masks.values()):
            waiting.sort(key=lambda event: event.time_ns)
            yield from waiting
            waiting.clear()
    waiting.sort(key=lambda event: event.time_ns)
    yield from waiting
