"""Stopping CPUs: ``kernel/stop_machine.c``.

Each CPU has a stopper, above every task: what is queued for it runs as soon as what
runs there can be preempted (preemption and interrupts enabled, in no handler), at an
interrupt's exit, in the idle loop, in waits, at ``cond_resched()``, and when preemption
is enabled again. A task that runs Python code is preempted between two bytecodes, and
where the work needs no Python (``stop_machine`` on the CPUs that do not run its
function, native handlers) at any instruction. Threads that a task has started are not
the CPU: nothing stops those.

Works run in task context with preemption disabled: they may send and wait for calls,
but not sleep. Functions get one argument, as the kernel's ``cpu_stop_fn_t``; what they
raise comes as ``RemoteCallError``. A native handler's result is 0.
"""

from __future__ import annotations

import contextlib
import errno
import os
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from shmipi import _core
from shmipi.cpumask import CpuMask, MaskLike
from shmipi.errors import CpuOfflineError
from shmipi.machine import locks
from shmipi.smp import cpus as _cpus

__all__ = [
    "STOP_TIMEOUT_S",
    "stop_cpus",
    "stop_machine",
    "stop_machine_cpuslocked",
    "stop_one_cpu",
    "stop_one_cpu_nowait",
    "stop_two_cpus",
]

#: How long CPUs are given to stop, unless the caller says otherwise.
STOP_TIMEOUT_S = 10.0

_Function = Callable[[Any], Any] | _core.NativeHandler

#: One at a time of a host's threads: they share a slot. (A CPU has one.)
_turn = threading.Lock()


def _after_fork_in_child() -> None:
    global _turn
    _turn = threading.Lock()


os.register_at_fork(after_in_child=_after_fork_in_child)


@contextlib.contextmanager
def _queueing(here: _core.Machine, timeout: float | None) -> Iterator[None]:
    """Queue works for several CPUs in one order everywhere.

    Preempted meanwhile, a CPU might run one that waits for those not yet queued.
    """
    with locks.held(here, "stop", timeout):
        if here.is_cpu:
            _core.preempt_disable()
        try:
            yield
        finally:
            if here.is_cpu:
                _core.preempt_enable()


def _here(machine: _core.Machine | None) -> _core.Machine:
    here = _core.current_machine() if machine is None else machine
    here.might_sleep()
    return here


def _online(here: _core.Machine) -> list[int]:
    return [cpu for cpu in range(here.ncpus) if _cpus.cpu_online(cpu, machine=here)]


def _exists(here: _core.Machine, *cpus: int) -> None:
    for cpu in cpus:
        if not 0 <= cpu < here.ncpus:
            here.refuse(cpu)


def _no_such(cpu: int) -> CpuOfflineError:
    return CpuOfflineError(
        f"CPU {cpu} is offline: its stopper takes no work", cpu=cpu, errno=errno.ENOENT
    )


def _one_of(results: Iterable[tuple[int, Any]]) -> Any:
    """Return any that is not zero, as the kernel does: the first; else 0."""
    return next((result for _, result in results if result), 0)


def _multi(
    here: _core.Machine,
    cpus: list[int],
    active: Iterable[int],
    fn: _Function,
    arg: Any,
    timeout: float | None,
) -> Any:
    with _turn:
        return _one_of(here.stop_multi(cpus, set(active), fn, (arg,), timeout))


def stop_machine(
    fn: _Function,
    data: Any = None,
    cpus: MaskLike | None = None,
    *,
    timeout: float | None = STOP_TIMEOUT_S,
    machine: _core.Machine | None = None,
) -> Any:
    """Stop all CPUs and run ``fn(data)``: on the first online, or on those of ``cpus``.

    While it runs, no other task, handler or softirq runs on any CPU, and interrupts are
    off everywhere; NMIs are taken. Returns a result that is not zero, if any is, else
    0. No CPU goes on- or offline meanwhile (``cpus_read_lock``). From tasks and hosts.

    Every CPU has to come, and ``fn`` to return, within ``timeout`` seconds (None: no
    limit): else ``IpiTimeoutError`` names those that did not (``cpu`` is the first) and
    all go on. A CPU that is killed meanwhile ends it as well (``CpuDiedError``). The
    text says whether ``fn`` has begun. Raises ``ClusterStateError`` in handlers, and
    with interrupts or preemption disabled.
    """
    here = _here(machine)
    _cpus.cpus_read_lock(machine=here)
    try:
        return stop_machine_cpuslocked(fn, data, cpus, timeout=timeout, machine=here)
    finally:
        _cpus.cpus_read_unlock(machine=here)


def stop_machine_cpuslocked(
    fn: _Function,
    data: Any = None,
    cpus: MaskLike | None = None,
    *,
    timeout: float | None = STOP_TIMEOUT_S,
    machine: _core.Machine | None = None,
) -> Any:
    """Do as ``stop_machine``, for who holds ``cpus_read_lock()`` already."""
    here = _here(machine)
    online = _online(here)
    active = set(online[:1]) if cpus is None else set(CpuMask(cpus)) & set(online)
    return _multi(here, online, active, fn, data, timeout) if online else 0


def stop_cpus(
    cpumask: MaskLike,
    fn: _Function,
    arg: Any = None,
    *,
    timeout: float | None = None,
    machine: _core.Machine | None = None,
) -> Any:
    """Run ``fn(arg)`` on the stoppers of all online CPUs of ``cpumask``, at once.

    Returns a result that is not zero, if any is, else 0; ``CpuOfflineError`` (ENOENT)
    when none of them is online. What else goes wrong is raised when all have ended.
    """
    here = _here(machine)
    mask = CpuMask(cpumask)
    _exists(here, *mask)
    calls: list[tuple[int, int]] = []
    results: list[tuple[int, Any]] = []
    errors: list[Exception] = []
    with _turn:
        try:
            with _queueing(here, timeout):
                for cpu in mask:
                    with contextlib.suppress(CpuOfflineError):
                        calls.append((cpu, here.stop_post(cpu, fn, (arg,))))
            while calls:
                cpu, call = calls.pop(0)
                try:
                    results.append((cpu, here.collect(call, cpu, timeout)))
                except Exception as error:
                    errors.append(error)
        finally:
            for _, call in calls:
                here.abandon(call)
    for failure in errors:
        if getattr(failure, "errno", 0) != errno.ENOENT:
            raise failure
    if not results:
        raise CpuOfflineError(
            f"no CPU of {mask} is online: no stopper takes the work",
            errno=errno.ENOENT,
        )
    return _one_of(results)


def stop_one_cpu(
    cpu: int,
    fn: _Function,
    arg: Any = None,
    *,
    timeout: float | None = None,
    machine: _core.Machine | None = None,
) -> Any:
    """Run ``fn(arg)`` on the stopper of ``cpu``, above its task: what it returns.

    Raises ``CpuOfflineError`` with ENOENT when it is offline, or goes offline before
    its stopper has come to this; ``IpiTimeoutError`` after ``timeout`` seconds, and it
    may still run; ``CpuDiedError``.
    """
    here = _here(machine)
    _exists(here, cpu)
    try:
        call = here.stop_post(cpu, fn, (arg,))
    except CpuOfflineError:
        raise _no_such(cpu) from None
    return here.collect(call, cpu, timeout)


def stop_one_cpu_nowait(
    cpu: int,
    fn: _Function,
    arg: Any,
    work_buf: _core.CallSingleData,
    *,
    machine: _core.Machine | None = None,
) -> bool:
    """Queue ``fn(arg)`` for the stopper of ``cpu``, and do not wait: is it online?

    ``work_buf`` is a ``CallSingleData`` of the caller's, made into one of ``fn`` and
    ``arg``; it can be used again when its ``locked`` is False, which is before ``fn``
    runs. From everywhere. Raises ``CsdBusyError`` while it is in use.
    """
    here = _core.current_machine() if machine is None else machine
    _exists(here, cpu)
    _core.INIT_CSD(work_buf, fn, arg)
    return here.stop_nowait(cpu, work_buf)


def stop_two_cpus(
    cpu1: int,
    cpu2: int,
    fn: _Function,
    arg: Any = None,
    *,
    timeout: float | None = STOP_TIMEOUT_S,
    machine: _core.Machine | None = None,
) -> Any:
    """Stop both CPUs and run ``fn(arg)`` on ``cpu1``, interrupts off on both.

    Returns what it returns. Raises ``CpuOfflineError`` with ENOENT when one of them is
    offline, else as ``stop_machine``.
    """
    here = _here(machine)
    _exists(here, cpu1, cpu2)
    for cpu in (cpu1, cpu2):
        if not _cpus.cpu_online(cpu, machine=here):
            raise _no_such(cpu)
    both = sorted({cpu1, cpu2})
    with _turn:
        results = here.stop_multi(both, {cpu1}, fn, (arg,), timeout)
    return dict(results)[cpu1]


def take_cpu_down(
    machine: _core.Machine,
    online: list[int],
    cpu: int,
    dying: tuple[_Function | None, tuple[Any, ...]],
    timeout: float | None,
) -> int:
    """Have ``cpu`` leave with all of ``online`` stopped: 0, or -errno (EAGAIN).

    ``dying`` is what it runs to that end, and its arguments; None: no more than that.
    """
    with _turn:
        return int(machine.stop_multi(online, {cpu}, *dying, timeout)[0][1])
