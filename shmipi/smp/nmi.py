"""NMIs: functions that run on other CPUs whatever those have masked.

As powerpc's ``smp_send_nmi_ipi`` (arch/powerpc/kernel/smp.c): one function at a time
for the whole machine, and the sender waits until every target has *entered* it. On a
controller without NMIs the interrupt is a line that can be masked, as in the kernel.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from types import FunctionType
from typing import Any

from shmipi import _core
from shmipi.errors import ClusterStateError, CpuOfflineError, IrqError

__all__ = ["NMI_IPI_ALL_OTHERS", "register_nmi_handler", "smp_send_nmi_ipi"]

#: In place of a CPU: every online CPU but this one.
NMI_IPI_ALL_OTHERS = -2

_NMI_DESC = 0  # the descriptor of the NMI's handler
_LOOK_S = 0.0002
_AGAIN_S = 0.01
_AGAIN_MAX_S = 0.64
_LOCK_S = 5.0


def register_nmi_handler(
    handler: Callable[[None], object] | _core.NativeHandler | None,
    info: Any = None,
    *,
    machine: _core.Machine | None = None,
) -> None:
    """Let ``handler`` run for every NMI of this machine, on the CPU that takes it.

    A ``NativeHandler`` runs at once, inside the signal handler, with ``info`` (None, an
    int or a shared array); a Python function, called with None, at the next bytecode
    boundary, also in the middle of an IPI handler or with interrupts disabled. There is
    one handler, as it was when it was registered; a new one takes the place of the old,
    None removes it: NMIs are only counted then. Raises ``ClusterStateError`` in an
    interrupt handler.
    """
    here = _machine(machine)
    with here.irq_lock():
        _publish(here, handler, info)


def smp_send_nmi_ipi(
    cpu: int,
    func: Callable[[None], object] | _core.NativeHandler,
    delay_us: int = 0,
    info: Any = None,
    *,
    machine: _core.Machine | None = None,
) -> int:
    """Run ``func`` as an NMI on ``cpu``, or on all others (``NMI_IPI_ALL_OTHERS``).

    Returns 1 when every target has entered it, 0 after ``delay_us`` microseconds
    without (0: no limit but a target's death). What arrives later than that is counted
    and runs nothing. Raises ``IrqError`` EINVAL for this CPU itself (the kernel's
    BUG_ON), ``CpuOfflineError``, ``ClusterStateError`` in an interrupt handler.
    """
    here = _machine(machine)
    targets = _targets(here, cpu)
    deadline = time.monotonic() + delay_us / 1e6 if delay_us else None
    left = _LOCK_S if deadline is None else deadline - time.monotonic()
    with here.irq_lock(max(0.0, min(left, _LOCK_S)), left > _LOCK_S) as held:
        if not held:
            return 0
        try:
            _publish(here, func, info)
            return _send(here, targets, deadline)
        finally:
            _publish(here, None, None)


def _send(here: _core.Machine, targets: list[int], deadline: float | None) -> int:
    waiting = {target: _taken(here, target) for target in targets}
    for target in targets:
        with contextlib.suppress(CpuOfflineError):  # it has just gone
            here.nmi_send(target)
    pause = _AGAIN_S
    again = time.monotonic() + pause
    while True:
        waiting = {
            target: before
            for target, before in waiting.items()
            if _taken(here, target) == before and _online(here, target)
        }
        now = time.monotonic()
        if not waiting or (deadline is not None and now >= deadline):
            return int(not waiting)
        if now >= again:  # the signal may have died with somebody, or not fitted
            for target in waiting:
                here.nmi_resend(target)
            pause = min(2 * pause, _AGAIN_MAX_S)  # a stopped target's signals pile up
            again = now + pause
        time.sleep(_LOOK_S)


def _machine(machine: _core.Machine | None) -> _core.Machine:
    here = _core.current_machine() if machine is None else machine
    if here.is_cpu and _core.in_interrupt():
        raise ClusterStateError(
            "the NMI handler is changed under a lock: not in an interrupt handler"
        )
    return here


def _publish(machine: _core.Machine, handler: Any, info: Any) -> None:
    if handler is None:
        machine.irq_free(_NMI_DESC)
        return
    if not isinstance(handler, _core.NativeHandler):
        handler = _plain(handler)
    machine.irq_request(_NMI_DESC, handler, info)


def _plain(handler: Callable[[None], object]) -> Callable[[None], object]:
    """Return a function: only those travel by number."""
    if isinstance(handler, FunctionType):
        return handler
    return lambda regs: handler(regs)


def _targets(machine: _core.Machine, cpu: int) -> list[int]:
    online = [n for n in range(machine.ncpus) if _online(machine, n)]
    if cpu == NMI_IPI_ALL_OTHERS:
        return [n for n in online if not machine.is_cpu or n != machine.id]
    if machine.is_cpu and cpu == machine.id:
        raise IrqError(f"CPU {cpu} can not send an NMI IPI to itself", cpu=cpu)
    if cpu not in online:
        machine.refuse(cpu)
    return [cpu]


def _taken(machine: _core.Machine, cpu: int) -> int:
    return machine.pic_read(cpu, "nmi_entered")


def _online(machine: _core.Machine, cpu: int) -> bool:
    return machine.slot(cpu).state not in (_core.OFFLINE, _core.CPU_DEAD)
