"""Which CPUs there are, and staying one: ``linux/cpumask.h``, ``linux/cpu.h``.

``cpu_online_mask`` and ``nr_cpu_ids`` are variables in the kernel: they are attributes
of ``shmipi.smp`` and ``cluster.smp``, as of the moment at which they are read.

A CPU goes offline between any two steps of others, unless they hold it off:
``cpus_read_lock()`` holds off all CPU hotplug (but no kill), for tasks and hosts;
``preempt_disable()`` holds off that of the own CPU, as it does the stopper.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator
from typing import Any, Protocol

from shmipi import _core
from shmipi.cpumask import CpuMask
from shmipi.errors import ClusterStateError, NoMachineError

__all__ = [
    "cpu_online",
    "cpus_read_lock",
    "cpus_read_unlock",
    "kick_process",
    "variable",
]

_LOOK_S = 0.0005
_LOOK_MOST_S = 0.02


class _Task(Protocol):
    cpu: int
    _cluster: Any

    def running(self) -> bool: ...


def _here(machine: _core.Machine | None) -> _core.Machine:
    return _core.current_machine() if machine is None else machine


def _is_online(machine: _core.Machine, cpu: int) -> bool:
    return machine.slot(cpu).state not in (_core.OFFLINE, _core.CPU_DEAD)


def cpu_online(cpu: int, *, machine: _core.Machine | None = None) -> bool:
    """Is CPU ``cpu`` online?  False for one that does not exist."""
    here = _here(machine)
    return 0 <= cpu < here.ncpus and _is_online(here, cpu)


class _NoMachine(NoMachineError, AttributeError):
    """As of a function; tools that list a module's attributes find none."""


def variable(name: str, machine: _core.Machine | None = None) -> Any:
    """Return ``cpu_online_mask`` or ``nr_cpu_ids`` of a machine as it is now."""
    if name not in ("cpu_online_mask", "nr_cpu_ids"):
        raise AttributeError(f"module 'shmipi.smp' has no attribute {name!r}")
    try:
        here = _here(machine)
    except NoMachineError as error:
        raise _NoMachine(str(error)) from None
    if name == "nr_cpu_ids":
        return here.ncpus
    return CpuMask(cpu for cpu in range(here.ncpus) if _is_online(here, cpu))


class _Holder(threading.local):
    """Does this thread run a callback, with the hotplug lock held for it?"""

    depth = 0


_holder = _Holder()


@contextlib.contextmanager
def hotplug_locked() -> Iterator[None]:
    """Run what is called with the hotplug lock held, here or by a host."""
    _holder.depth += 1
    try:
        yield
    finally:
        _holder.depth -= 1


def cpus_read_lock(*, machine: _core.Machine | None = None) -> None:
    """Hold off CPU hotplug until ``cpus_read_unlock()``: nobody goes off- or online.

    It may wait for a change that is under way, so it raises ``ClusterStateError`` in a
    handler, and with interrupts disabled. A holder that is killed loses it; a task that
    ends with it held is warned of (``ShmipiWarning``), and loses it. It may be taken
    again inside.
    """
    here = _here(machine)
    if here.is_cpu and (_core.in_interrupt() or _core.irqs_disabled()):
        raise ClusterStateError(
            "cpus_read_lock() may have to wait: not in an interrupt handler, nor with"
            " interrupts disabled"
        )
    if _holder.depth:
        raise ClusterStateError(
            "cpus_read_lock() in a CPU hotplug callback waits for itself: who calls it"
            " holds the lock"
        )
    look = _LOOK_S
    while not here.cpus_read_trylock():
        time.sleep(look)
        look = min(2 * look, _LOOK_MOST_S)


def cpus_read_unlock(*, machine: _core.Machine | None = None) -> None:
    """Undo one ``cpus_read_lock()``. ``ClusterStateError`` when it is not held."""
    if not _here(machine).cpus_read_unlock():
        raise ClusterStateError("cpus_read_unlock() without cpus_read_lock()")


def kick_process(task: _Task) -> None:
    """Send the CPU that runs ``task`` now a reschedule IPI; ``kernel/sched/core.c``.

    ``task`` is a ``Task`` of ``cluster.start``: where those are, in the host. One that
    does not run yet, or has ended, is not kicked.
    """
    if task.running():
        task._cluster._machine.smp_send_reschedule(task.cpu)
