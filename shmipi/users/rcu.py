"""Read-copy update: ``kernel/rcu/tree.c``, ``tree_exp.h``.

Who reads takes no lock: ``rcu_read_lock()`` and ``rcu_read_unlock()`` change one word
of their own CPU, in tasks, handlers and softirqs. Who removes something from where it
can be found waits for a grace period before freeing it: until all who read when it
began have ended. ``synchronize_rcu_expedited()`` interrupts every CPU that is neither
offline nor asleep; ``synchronize_rcu()`` lets them report by themselves for 5 ms first;
``call_rcu()`` does not wait, and its callback runs in RCU_SOFTIRQ of the same CPU.

A section in which interrupts or preemption are disabled is a read-side section, too. A
task that waits in one, and one whose CPU is taken offline in it, read on: grace periods
wait. A reader that dies ends. Native callbacks that a CPU leaves which goes offline or
dies are called by another (``rcutree_migrate_callbacks``); Python ones wait until it is
back, or, when it dies, are lost and counted, as is what its death has cut off.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

from shmipi import _core
from shmipi._core import rcu_read_lock, rcu_read_lock_held, rcu_read_unlock
from shmipi.errors import ShmipiWarning
from shmipi.machine import arrays
from shmipi.machine.arrays import Arrays, SharedArray
from shmipi.smp.softirq import RCU_SOFTIRQ, open_softirq
from shmipi.smp.waitqueue import WaitQueue
from shmipi.users.state import state

__all__ = [
    "BoundRcu",
    "RcuCpu",
    "RcuStats",
    "call_rcu",
    "rcu_barrier",
    "rcu_read_lock",
    "rcu_read_lock_held",
    "rcu_read_unlock",
    "synchronize_rcu",
    "synchronize_rcu_expedited",
]

#: A grace period that takes so long is reported, with who holds it up (seconds).
rcu_cpu_stall_timeout = 21.0

_TICK_S: Final = 0.002
_TICK_NS: Final = 2_000_000
_LOOK_S: Final = 0.0005
_RETELL_S: Final = 0.02
_GONE: Final = (_core.OFFLINE, _core.CPU_DEAD)
_TIMERS: Final = "rcu.timers"
_WAITERS: Final = "rcu.exp_wq"

_callbacks: dict[int, tuple[Callable[[Any], object], Any]] = {}
_numbers = 0


def synchronize_rcu_expedited() -> None:
    """Wait for a grace period, by interrupting all who may read.

    For tasks and the host. ``ClusterStateError`` where a wait would be wrong,
    ``IpiDeadlockError`` in a read-side section.
    """
    machine = _core.current_machine()
    if seq := machine.rcu_synchronize(True):
        _wait(machine, WaitQueue._find(_WAITERS), seq, True)


def synchronize_rcu() -> None:
    """Wait for a grace period. Raises what ``synchronize_rcu_expedited`` raises."""
    machine = _core.current_machine()
    if seq := machine.rcu_synchronize(False):
        _wait(machine, WaitQueue._find(_WAITERS), seq, False)


def _wait(
    machine: _core.Machine, waiters: WaitQueue, seq: int, expedited: bool
) -> None:
    while not waiters.wait_event_timeout(
        lambda: machine.rcu_advance(seq, expedited), _TICK_S
    ):
        holdouts = machine.rcu_stall(int(rcu_cpu_stall_timeout * 1e9))
        if holdouts is not None:
            warnings.warn(_stalled(machine, holdouts, seq, expedited), ShmipiWarning, 3)


def _stalled(
    machine: _core.Machine, holdouts: list[tuple[int, int]], seq: int, expedited: bool
) -> str:
    """As synchronize_rcu_expedited_wait() prints it, and who they are."""
    cpus, lines = [], []
    for cpu, depth in holdouts:
        state = machine.slot(cpu).state
        online = state not in (_core.OFFLINE, _core.CPU_DEAD)
        cpus.append(f"{cpu}-{'.' if online else 'O'}..")
        why = (
            f"in a read-side section, {depth} deep"
            if depth
            else "does not take the interrupt: interrupts or preemption are disabled,"
            " a handler runs on, or it is stopped"
        )
        lines.append(f"CPU {cpu}{'' if online else ' (offline)'}: {why}")
    kind = "expedited stalls" if expedited else "stalls"
    return (
        f"INFO: rcu_preempt detected {kind} on CPUs/tasks: {{ {' '.join(cpus)} }}"
        f" after {rcu_cpu_stall_timeout:g} s, s: {seq}; " + "; ".join(lines)
    )


def call_rcu(
    func: Callable[[Any], object] | _core.NativeHandler, info: Any = None
) -> None:
    """Have ``func(info)`` called on this CPU when a grace period has gone by.

    In RCU_SOFTIRQ. For tasks, handlers and softirqs; of a native handler ``info`` is
    None, an int or a part of a shared array. ``CsdBusyError`` (ENOSPC): 256 of this CPU
    wait already.
    """
    global _numbers
    machine = _core.current_machine()
    if isinstance(func, _core.NativeHandler):
        pointer, value = _info(info)
        machine.rcu_call(func, pointer, value)
    else:
        if not callable(func):
            raise TypeError(f"func is {func!r}: give a callable or a NativeHandler")
        number = _numbers = _numbers + 1
        _callbacks[number] = (func, info)
        try:
            machine.rcu_call(None, False, number)
        except BaseException:
            del _callbacks[number]
            raise
    _look_again(machine)


def _info(info: Any) -> tuple[bool, int]:
    if info is None:
        return False, 0
    if isinstance(info, int):
        return False, info & (1 << 64) - 1
    if isinstance(info, SharedArray):
        offset = arrays.home_of(info).offset_of(info)
        if offset is not None:
            return True, offset
    raise TypeError(
        f"info is {info!r}: of a native handler None, an int or a shared array"
    )


def _look_again(machine: _core.Machine) -> None:
    """In a tick; what is asked for sooner stays so."""
    index = int(arrays.find("shared", _TIMERS)[machine.id])
    if not machine.timer_look(index)[0]:
        machine.timer_start(index, time.monotonic_ns() + _TICK_NS, 0, machine.id)


def _core_softirq() -> None:
    """RCU_SOFTIRQ: rcu_core()."""
    machine = _core.current_machine()
    while (found := machine.rcu_core()) is not None:
        if found < 0:
            _look_again(machine)
            return
        func, info = _callbacks.pop(found, (None, None))
        try:
            if func is not None:
                func(info)
        finally:
            machine.rcu_done()


def rcu_barrier() -> None:
    """Wait until every callback that was queued so far, on any CPU, has run.

    Not for Python ones of CPUs that are offline, which run when they are back, nor for
    any while no CPU is online.
    """
    machine = _core.current_machine()
    machine.might_sleep()
    _barrier(machine)


def _barrier(machine: _core.Machine) -> None:
    queued = [one[2] for one in machine.rcu_look()[1]]
    waiting = set(range(len(queued)))
    retell = time.monotonic() + _RETELL_S
    while waiting:
        now = machine.rcu_look()[1]
        states = [machine.slot(cpu).state for cpu in range(machine.ncpus)]
        gone = {cpu for cpu, at in enumerate(states) if at in _GONE}
        waiting = {cpu for cpu in waiting if now[cpu][3] < queued[cpu]}
        waiting -= {cpu for cpu in waiting & gone if not now[cpu][5]}
        if len(gone) == machine.ncpus:
            return
        if waiting & gone and time.monotonic() > retell:
            machine.rcu_retell()  # who was told is stopped, or could not be told
            retell = time.monotonic() + _RETELL_S
        if waiting:
            if machine.is_cpu:
                _core.wait_for_interrupt(_TICK_S)
            else:
                time.sleep(_LOOK_S)


@dataclass(frozen=True)
class RcuCpu:
    """What RCU knows of a CPU."""

    nesting: int  #: depth of its read-side section; 0: it does not read
    reports: int  #: quiescent states that it reported by itself
    queued: int  #: callbacks so far
    invoked: int  #: of those, that were called, or lost
    lost: int  #: of those, that the CPU's death has taken
    natives: int  #: native ones that have not been called


@dataclass(frozen=True)
class RcuStats:
    """What grace periods did."""

    seq: int  #: twice their number; odd: one runs
    ipis: int  #: interrupts sent
    idle: int  #: CPUs not sent to because they slept
    offline: int  #: ... because they were offline
    retried: int  #: ENXIO from a CPU that was online when looked at again
    gone: int  #: ENXIO from a CPU that was offline: reported in its place
    died_readers: int  #: CPUs that died in a read-side section
    stalls: int  #: reports of grace periods that took too long
    migrated: int  #: callbacks of CPUs that are gone, called by others
    cpus: tuple[RcuCpu, ...]


class BoundRcu:
    """``shmipi.users.rcu`` for the host of one machine: ``cluster.users.rcu``.

    The host is no CPU: it waits for grace periods, reads nothing, has no callbacks.
    """

    def __init__(self, home: Arrays) -> None:
        machine = self._machine = home.machine
        new = not machine.user_offset("rcu")
        state(home, "tick", machine.tick_bytes())
        state(home, "rcu", machine.rcu_bytes())
        self._waiters = WaitQueue.make(home, _WAITERS)
        timers = home.make("shared", _TIMERS, "u4", machine.ncpus)
        if new:
            machine.rcu_set_waitq(self._waiters._at)
            tick = _core.NativeHandler("rcu_tick")
            timers[:] = [
                machine.timer_setup("rcu", tick, 0, 0) for _ in range(machine.ncpus)
            ]
            open_softirq(RCU_SOFTIRQ, _core_softirq, machine=machine)

    def synchronize_rcu_expedited(self) -> None:
        """Wait for a grace period, by interrupting all who may read."""
        if seq := self._machine.rcu_synchronize(True):
            _wait(self._machine, self._waiters, seq, True)

    def synchronize_rcu(self) -> None:
        """Wait for a grace period."""
        if seq := self._machine.rcu_synchronize(False):
            _wait(self._machine, self._waiters, seq, False)

    def rcu_barrier(self) -> None:
        """Wait until every callback that was queued so far has run."""
        _barrier(self._machine)

    def stats(self) -> RcuStats:
        """Return what was counted."""
        counts, cpus = self._machine.rcu_look()
        return RcuStats(*counts, cpus=tuple(RcuCpu(*one) for one in cpus))
