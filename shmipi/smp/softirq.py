"""Softirqs: what a handler leaves for later; ``kernel/softirq.c``.

A handler runs with interrupts off, and says with ``raise_softirq`` what is left to
do. That runs when the interrupt has ended, with interrupts on: lowest number first,
never on top of another softirq of its CPU, at most ten times or for 2 ms in a row; the
rest is left to ksoftirqd, a kernel thread of the CPU that takes turns with its tasks.
"""

from __future__ import annotations

import errno
from collections.abc import Callable
from types import FunctionType
from typing import Any

from shmipi import _core
from shmipi.errors import IrqError

__all__ = [
    "BLOCK_SOFTIRQ",
    "HI_SOFTIRQ",
    "HRTIMER_SOFTIRQ",
    "IRQ_POLL_SOFTIRQ",
    "NET_RX_SOFTIRQ",
    "NET_TX_SOFTIRQ",
    "NR_SOFTIRQS",
    "RCU_SOFTIRQ",
    "SCHED_SOFTIRQ",
    "TASKLET_SOFTIRQ",
    "TIMER_SOFTIRQ",
    "kstat_softirqs_cpu",
    "open_softirq",
]

# linux/interrupt.h: the lowest runs first.
HI_SOFTIRQ = 0
TIMER_SOFTIRQ = 1
NET_TX_SOFTIRQ = 2
NET_RX_SOFTIRQ = 3
BLOCK_SOFTIRQ = 4
IRQ_POLL_SOFTIRQ = 5
TASKLET_SOFTIRQ = 6
SCHED_SOFTIRQ = 7
HRTIMER_SOFTIRQ = 8
RCU_SOFTIRQ = 9
NR_SOFTIRQS = 10

_LOCK_S = 5.0


def open_softirq(
    nr: int,
    action: Callable[[], Any] | _core.NativeHandler,
    info: Any = None,
    *,
    machine: _core.Machine | None = None,
) -> None:
    """Let ``action()`` be what softirq ``nr`` does, on every CPU of the machine.

    A Python function runs at the next bytecode boundary after the interrupt, or at once
    on an idle CPU; what it raises goes to ``sys.unraisablehook``. A ``NativeHandler``
    runs where the interrupt has ended, with ``info`` (None, an int or a shared array).
    The next action takes the place of this one, as in the kernel. It is as it was when
    this was called; a Python action goes with the process that has opened it.

    Raises ``IrqError``: EINVAL for a number that is none or what cannot be called,
    EBUSY for a softirq that a user of this package has (RPS: NET_RX).
    ``IpiTimeoutError`` when the irq tables are not free in 5 s.
    """
    here = _core.current_machine() if machine is None else machine
    if not 0 <= nr < NR_SOFTIRQS:
        raise _refused(nr, "there is no such softirq", errno.EINVAL)
    if not callable(action) and not isinstance(action, _core.NativeHandler):
        raise _refused(nr, f"{action!r} is no action", errno.EINVAL)
    if not isinstance(action, _core.NativeHandler | FunctionType):
        call = action

        def action() -> None:
            call()

    with here.irq_lock(_LOCK_S, True, True):
        try:
            here.softirq_open(nr, action, info)
        except OSError as error:
            if error.errno != errno.EBUSY:
                raise
            raise _refused(
                nr, "it has an action of this package", errno.EBUSY
            ) from None


def kstat_softirqs_cpu(
    nr: int, cpu: int, *, machine: _core.Machine | None = None
) -> int:
    """Return how often ``cpu`` has run softirq ``nr``: ``/proc/softirqs``."""
    here = _core.current_machine() if machine is None else machine
    if not 0 <= nr < NR_SOFTIRQS or not 0 <= cpu < here.ncpus:
        raise ValueError(f"there is no softirq {nr} of a CPU {cpu}")
    return here.softirq_count(cpu, nr)


def _refused(nr: int, why: str, code: int) -> IrqError:
    return IrqError(f"softirq {nr}: {why}", errno=code)
