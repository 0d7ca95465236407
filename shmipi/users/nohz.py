"""CPUs left alone: ``nohz_full``; kernel/time/tick-sched.c, sched/isolation.c.

``cluster.users.nohz.tick_nohz_full_setup("1-3")`` isolates CPUs: timers that are not
pinned, and tasks of the scheduler that may run anywhere, go to the housekeeping CPUs
(of those that begin after it: ``Cluster(nohz_full="1-3")`` is before all). What does
have to interrupt an isolated CPU is a kick, an irq_work with an empty function, and
each is counted by its cause: what the CPU's tick is needed for (TICK_DEP_*), or a timer
that it asked for. Whatever else reaches one is counted by its cause too, where it is
known what it is for (``NohzCpu.interrupts``), and adds up to what the CPU's counters
say has come.
"""

from __future__ import annotations

import errno
from dataclasses import dataclass
from typing import Any, Final, Protocol

from shmipi import _core, atomic
from shmipi.cpumask import CpuMask, MaskLike
from shmipi.errors import ClusterStateError
from shmipi.machine import arrays
from shmipi.machine.arrays import Arrays, SharedArray
from shmipi.users.state import state

__all__ = [
    "TICK_DEP_BIT_CLOCK_UNSTABLE",
    "TICK_DEP_BIT_PERF_EVENTS",
    "TICK_DEP_BIT_POSIX_TIMER",
    "TICK_DEP_BIT_RCU",
    "TICK_DEP_BIT_RCU_EXP",
    "TICK_DEP_BIT_SCHED",
    "BoundNohz",
    "NohzCpu",
    "can_stop_full_tick",
    "housekeeping_any_cpu",
    "housekeeping_cpumask",
    "tick_nohz_dep_clear_cpu",
    "tick_nohz_dep_set",
    "tick_nohz_dep_set_cpu",
    "tick_nohz_full_cpu",
    "tick_nohz_full_enabled",
    "tick_nohz_full_kick_all",
    "tick_nohz_full_kick_cpu",
    "tick_nohz_kick_task",
    "wake_up_nohz_cpu",
]

# enum tick_dep_bits
TICK_DEP_BIT_POSIX_TIMER: Final = 0
TICK_DEP_BIT_PERF_EVENTS: Final = 1
TICK_DEP_BIT_SCHED: Final = 2
TICK_DEP_BIT_CLOCK_UNSTABLE: Final = 3
TICK_DEP_BIT_RCU: Final = 4
TICK_DEP_BIT_RCU_EXP: Final = 5

_TIMER: Final = 6  # wake_up_nohz_cpu: somebody has queued a timer there
_TASK: Final = 7
_KICK: Final = 8  # no cause given
_CAUSES: Final = (
    "posix_timer",
    "perf_events",
    "sched",
    "clock_unstable",
    "rcu",
    "rcu_exp",
    "timer",
    "task",
    "kick",
)

# Words: 64 of the mask, then of each CPU: dependencies, kicks taken and by cause.
_MASK: Final = 64
_DEPS, _TAKEN, _BY_CAUSE = 0, 1, 2
_STRIDE: Final = 16
_ALL: Final = (1 << 64) - 1

_RULES: Final = [rule[:2] for rule in _core.RULES]
_RULE_HOUSEKEEPING: Final = _RULES.index(("nohz", "housekeeping"))
_RULE_CAUSE: Final = _RULES.index(("nohz", "cause"))

_works: dict[tuple[str, int], _core.irq_work] = {}


class _Task(Protocol):
    cpu: int
    _cluster: Any

    def running(self) -> bool: ...


def _bytes(ncpus: int) -> int:
    return 8 * (_MASK + ncpus * _STRIDE)


def _words(machine: _core.Machine, home: Arrays | None = None) -> SharedArray | None:
    """None: no CPU of this machine is isolated."""
    if not machine.user_offset("nohz"):
        return None
    memory = home.find("user", "nohz") if home else arrays.find("user", "nohz")
    words: SharedArray = memory.view("u8")  # type: ignore[assignment]
    return words


def _isolated(machine: _core.Machine, words: SharedArray | None) -> list[int]:
    if words is None:
        return []
    return [cpu for cpu in range(machine.ncpus) if _is_isolated(words, cpu)]


def _is_isolated(words: SharedArray, cpu: int) -> bool:
    return bool(int(words[cpu // 64]) >> cpu % 64 & 1)


def _online(machine: _core.Machine, cpu: int) -> bool:
    return machine.slot(cpu).state not in (_core.OFFLINE, _core.CPU_DEAD)


def tick_nohz_full_enabled() -> bool:
    """Return whether any CPU of this machine is isolated."""
    machine = _core.current_machine()
    return bool(_isolated(machine, _words(machine)))


def tick_nohz_full_cpu(cpu: int) -> bool:
    """Return whether ``cpu`` is isolated."""
    machine = _core.current_machine()
    words = _words(machine)
    return words is not None and 0 <= cpu < machine.ncpus and _is_isolated(words, cpu)


def housekeeping_cpumask() -> CpuMask:
    """Return the CPUs that are not isolated."""
    machine = _core.current_machine()
    isolated = set(_isolated(machine, _words(machine)))
    return CpuMask(cpu for cpu in range(machine.ncpus) if cpu not in isolated)


def housekeeping_any_cpu() -> int:
    """Return where work goes that may run anywhere: this CPU, if it is no isolated one.

    Else the next housekeeping CPU that is online; this CPU when there is none.
    """
    machine = _core.current_machine()
    words = _words(machine)
    here = machine.id if machine.is_cpu else 0
    if words is None or machine.broken() >> _RULE_HOUSEKEEPING & 1:
        return here
    for step in range(machine.ncpus):
        cpu = (here + step) % machine.ncpus
        if not _is_isolated(words, cpu) and _online(machine, cpu):
            return cpu
    return here


def _nohz_full_kick_func(here: object) -> None:
    """Empty in the kernel: the tick is looked at when the interrupt ends. Counts."""
    machine = _core.current_machine()
    words = _words(machine)
    if words is not None:
        atomic.fetch_add(words, _MASK + machine.id * _STRIDE + _TAKEN, 1)


def _kick(
    machine: _core.Machine, words: SharedArray, cpu: int, cause: int, count: bool = True
) -> bool:
    """irq_work_queue_on(nohz_full_kick_work); False: it pends, or the CPU is gone."""
    work = _works.get((machine.name, cpu))
    if work is None:
        work = _core.irq_work(_nohz_full_kick_func, None, machine=machine)
        work = _works.setdefault((machine.name, cpu), work)
    at = _MASK + cpu * _STRIDE + _BY_CAUSE + cause
    if count:
        atomic.fetch_add(words, at, 1)  # first: none is taken that is not accounted for
    sent = False
    try:
        sent = _core.irq_work_queue_on(work, cpu)
    except OSError as error:
        if error.errno != errno.ENXIO:
            raise
    finally:
        if count and not sent:
            atomic.fetch_sub(words, at, 1)
    return sent


def tick_nohz_full_kick_cpu(cpu: int, *, cause: int = _KICK) -> bool:
    """Interrupt ``cpu``, if it is isolated, so that it looks whether it needs its tick.

    Returns whether a kick was sent: not to other CPUs, nor while one is pending.
    """
    machine = _core.current_machine()
    words = _words(machine)
    if words is None or not 0 <= cpu < machine.ncpus or not _is_isolated(words, cpu):
        return False
    return _kick(machine, words, cpu, cause)


def tick_nohz_full_kick_all(*, cause: int = _KICK) -> int:
    """Kick every isolated CPU that is online; return how many were sent to."""
    machine = _core.current_machine()
    words = _words(machine)
    if words is None:
        return 0
    return sum(
        _kick(machine, words, cpu, cause)
        for cpu in _isolated(machine, words)
        if _online(machine, cpu)
    )


def tick_nohz_kick_task(task: _Task) -> bool:
    """Kick the CPU that ``task`` runs on, and only while it runs there."""
    machine = task._cluster._machine
    words = _words(machine, task._cluster._arrays)
    if words is None or not task.running() or not _is_isolated(words, task.cpu):
        return False
    return _kick(machine, words, task.cpu, _TASK)


def tick_nohz_dep_set_cpu(cpu: int, bit: int) -> None:
    """Say that ``cpu`` needs its tick, for cause ``bit``: the first one kicks it."""
    machine = _core.current_machine()
    words = _require(machine, cpu, bit)
    before = atomic.fetch_or(words, _MASK + cpu * _STRIDE + _DEPS, 1 << bit)
    if not before and _is_isolated(words, cpu):
        if machine.broken() >> _RULE_CAUSE & 1:  # all of them, and for no cause
            for other in _isolated(machine, words):
                if other != cpu:
                    _kick(machine, words, other, bit, count=False)
        _kick(machine, words, cpu, bit)


def tick_nohz_dep_set(bit: int) -> None:
    """The same of all CPUs."""
    machine = _core.current_machine()
    for cpu in range(machine.ncpus):
        tick_nohz_dep_set_cpu(cpu, bit)


def tick_nohz_dep_clear_cpu(cpu: int, bit: int) -> None:
    """Take that back: nobody is kicked, the tick stops when it is looked at next."""
    machine = _core.current_machine()
    words = _require(machine, cpu, bit)
    atomic.fetch_and(words, _MASK + cpu * _STRIDE + _DEPS, _ALL & ~(1 << bit))


def can_stop_full_tick(cpu: int) -> bool:
    """Return whether nothing needs the tick of ``cpu``: False for one not isolated."""
    machine = _core.current_machine()
    words = _words(machine)
    if words is None or not 0 <= cpu < machine.ncpus or not _is_isolated(words, cpu):
        return False
    return atomic.load(words, _MASK + cpu * _STRIDE + _DEPS) == 0


def wake_up_nohz_cpu(cpu: int) -> bool:
    """Have ``cpu`` look at its timers: kicked if it is isolated, else if it idles.

    Nothing is sent to one that is offline. Returns whether an isolated one was kicked.
    """
    machine = _core.current_machine()
    words = _words(machine)
    if not 0 <= cpu < machine.ncpus or not _online(machine, cpu):
        return False
    if words is not None and _is_isolated(words, cpu):
        return _kick(machine, words, cpu, _TIMER)
    if cpu != machine.id and not machine.slot(cpu).task:
        _core.resched_cpu(cpu)  # wake_up_idle_cpu
    return False


def _require(machine: _core.Machine, cpu: int, bit: int) -> SharedArray:
    words = _words(machine)
    if words is None:
        raise ClusterStateError(
            "no CPU of this machine is isolated: its host begins with"
            " cluster.users.nohz.tick_nohz_full_setup()"
        )
    if not 0 <= cpu < machine.ncpus:
        raise ValueError(f"cpu is {cpu}: there are {machine.ncpus}")
    if not 0 <= bit <= TICK_DEP_BIT_RCU_EXP:
        raise ValueError(f"bit is {bit}: one of TICK_DEP_BIT_*")
    return words


@dataclass(frozen=True)
class NohzCpu:
    """An isolated CPU's kicks and interrupts."""

    cpu: int
    dependencies: tuple[str, ...]  #: what its tick is needed for now
    taken: int  #: kicks that have reached it
    by_cause: dict[str, int]  #: kicks that were sent to it
    #: interrupts that it has taken since it was booted, by what they were for; kicks
    #: are in "irq_work"
    interrupts: dict[str, int]
    #: the same by its counters (irq_taken, irq_timer, nmi): the sum of ``interrupts``
    #: but for one that is just being taken, or in which the CPU was killed
    counted: int


class BoundNohz:
    """``shmipi.users.nohz`` for the host of one machine: ``cluster.users.nohz``."""

    def __init__(self, home: Arrays) -> None:
        self._home = home

    def tick_nohz_full_setup(self, mask: MaskLike) -> CpuMask:
        """Isolate the CPUs of ``mask``, and no others; return the mask.

        At least one CPU keeps house: ``ValueError`` otherwise.
        """
        machine = self._home.machine
        chosen = CpuMask(mask)
        cpus = list(chosen)
        if any(cpu >= machine.ncpus for cpu in cpus):
            raise ValueError(f"mask is {mask!r}: there are {machine.ncpus} CPUs")
        if len(cpus) == machine.ncpus:
            raise ValueError("mask is every CPU: one has to keep house")
        words = state(self._home, "nohz", _bytes(machine.ncpus)).view("u8")
        for word in range(_MASK):
            value = sum(1 << cpu % 64 for cpu in cpus if cpu // 64 == word)
            atomic.store(words, word, value)
        return chosen

    def stats(self) -> tuple[NohzCpu, ...]:
        """Return the kicks and interrupts of each isolated CPU, by their causes."""
        machine = self._home.machine
        words = _words(machine, self._home)
        found = []
        for cpu in _isolated(machine, words):
            assert words is not None
            row = words[_MASK + cpu * _STRIDE :][:_STRIDE]
            _, causes, counted = machine.interrupt_causes(cpu)
            deps = int(row[_DEPS])
            found.append(
                NohzCpu(
                    cpu,
                    tuple(c for n, c in enumerate(_CAUSES) if deps >> n & 1),
                    int(row[_TAKEN]),
                    {c: int(row[_BY_CAUSE + n]) for n, c in enumerate(_CAUSES)},
                    dict(zip(_core.CAUSES, causes, strict=True)),
                    counted,
                )
            )
        return tuple(found)
