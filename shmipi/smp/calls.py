"""The functions of ``kernel/smp.c`` that are made of its others.

What each takes beyond the kernel's arguments is ``info`` and ``wait`` by name, as
``smp_call_function_single`` does.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from shmipi import _core
from shmipi.cpumask import CpuMask, MaskLike
from shmipi.errors import ClusterStateError, CpuOfflineError
from shmipi.machine import topology

__all__ = [
    "kick_all_cpus_sync",
    "on_each_cpu_cond",
    "smp_call_function_any",
    "smp_call_on_cpu",
]

_Result = TypeVar("_Result")
_NOTHING = _core.NativeHandler("noop")


def _here(machine: _core.Machine | None) -> _core.Machine:
    return _core.current_machine() if machine is None else machine


def _distance(here: _core.Machine, cpu: int) -> int:
    """How far ``cpu`` is from this one; the host is on no node."""
    if not here.is_cpu:
        return 0
    return topology.numa_distance(here.slot(here.id).core, here.slot(cpu).core)


def smp_call_function_any(
    mask: MaskLike,
    func: Callable[[Any], Any] | _core.NativeHandler,
    info: Any = None,
    wait: bool = True,
    *,
    machine: _core.Machine | None = None,
) -> None:
    """Run ``func(info)`` on one CPU of ``mask``: on this one if it is in it, else near.

    Of those that are online the nearest by NUMA distance, of several the first. As
    ``smp_call_function_single`` then. ``CpuOfflineError`` (ENXIO) when none is online.
    """
    here = _here(machine)
    cpus = CpuMask.of(mask, here.ncpus)
    if here.is_cpu and here.id in cpus:
        here.smp_call_function_single(here.id, func, info, wait)
        return
    offline = (_core.OFFLINE, _core.CPU_DEAD)
    there = [cpu for cpu in cpus if here.slot(cpu).state not in offline]
    if not there:
        raise CpuOfflineError(
            f"no CPU of {cpus} is online", cpu=min(cpus, default=None)
        )
    cpu = min(there, key=lambda cpu: (_distance(here, cpu), cpu))
    here.smp_call_function_single(cpu, func, info, wait)


def on_each_cpu_cond(
    cond_func: Callable[[int, Any], Any],
    func: Callable[[Any], Any] | _core.NativeHandler,
    info: Any = None,
    wait: bool = True,
    *,
    machine: _core.Machine | None = None,
) -> None:
    """Run ``func(info)`` on the online CPUs for which ``cond_func(cpu, info)`` is true.

    ``on_each_cpu_cond_mask`` of all of them.
    """
    _here(machine).on_each_cpu_cond_mask(cond_func, func, info, wait)


def smp_call_on_cpu(
    cpu: int,
    func: Callable[[Any], _Result],
    par: Any = None,
    phys: bool = False,
    *,
    machine: _core.Machine | None = None,
) -> _Result:
    """Run ``func(par)`` on ``cpu`` in task context, where it may wait; its result.

    No IPI handler but a kworker of that CPU, a task of its scheduler: it runs although
    others wait there, or can be preempted. Who waits here lets others run: two tasks
    may ask each other's CPU at once. On this CPU itself at once. A CPU is on its core
    already, so ``phys`` changes nothing.

    Raises ``CpuOfflineError`` (ENXIO) for a CPU that is offline or does not exist,
    ``RemoteCallError`` with what ``func`` raised, ``CpuDiedError``, and
    ``ClusterStateError`` where nothing may wait.
    """
    here = _here(machine)
    if not 0 <= cpu < here.ncpus:
        raise CpuOfflineError(f"CPU {cpu} does not exist", cpu=cpu)
    if here.is_cpu and not _core.preemptible():
        raise ClusterStateError(
            "smp_call_on_cpu() waits: not in a handler or softirq, nor with interrupts"
            " or preemption disabled"
        )
    if here.is_cpu and cpu == here.id:
        return func(par)
    result: _Result = here.call_on_cpu(cpu, func, par)
    return result


def kick_all_cpus_sync(*, machine: _core.Machine | None = None) -> None:
    """Wait until every other CPU has been interrupted: in a handler or after it.

    What this CPU stored before it is seen by all when it returns.
    """
    _core.smp_mb()
    _here(machine).smp_call_function(_NOTHING, None, True)
