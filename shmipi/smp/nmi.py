"""NMIs: functions that run on other CPUs whatever those have masked.

``register_nmi_handler`` is x86's (arch/x86/kernel/nmi.c): of each type a list, which
every NMI walks. ``smp_send_nmi_ipi`` is powerpc's (arch/powerpc/kernel/smp.c): one
function at a time for the whole machine, and the sender waits until every target has
*entered* it. On a controller without NMIs the interrupt is a line that can be masked,
as in the kernel.
"""

from __future__ import annotations

import errno
import operator
import time
import warnings
from collections.abc import Callable
from types import FunctionType
from typing import Any

from shmipi import _core
from shmipi.errors import ClusterStateError, IrqError, ShmipiWarning

__all__ = [
    "NMI_DONE",
    "NMI_FLAG_FIRST",
    "NMI_HANDLED",
    "NMI_IO_CHECK",
    "NMI_IPI_ALL_OTHERS",
    "NMI_LOCAL",
    "NMI_REASON_IOCHK",
    "NMI_REASON_SERR",
    "NMI_SERR",
    "NMI_UNKNOWN",
    "register_nmi_handler",
    "smp_send_nmi_ipi",
    "smp_send_safe_nmi_ipi",
    "unregister_nmi_handler",
]

#: In place of a CPU: every online CPU but this one.
NMI_IPI_ALL_OTHERS = -2

# asm/nmi.h: whose NMIs a handler is for, its flags, and what it returns.
NMI_LOCAL = 0
NMI_UNKNOWN = 1
NMI_SERR = 2
NMI_IO_CHECK = 3
NMI_FLAG_FIRST = 1
NMI_DONE = 0
NMI_HANDLED = 1

# asm/mach_traps.h: why an NMI came that is no CPU's own.
NMI_REASON_SERR = 0x80
NMI_REASON_IOCHK = 0x40

_TYPES = {
    NMI_LOCAL: "NMI_LOCAL",
    NMI_UNKNOWN: "NMI_UNKNOWN",
    NMI_SERR: "NMI_SERR",
    NMI_IO_CHECK: "NMI_IO_CHECK",
}
_REASONS = {
    errno.ENOSPC: "there is no room for one more: unregister another",
    errno.ENAMETOOLONG: "its name has more than 31 bytes",
    errno.EEXIST: "it is registered already, under this name",
}
_LOCK_S = 5.0
_LOOK_S = 0.0002
_LOOK_MOST_S = 0.01
_DELAY_MOST = 1 << 50  # us

_warned: set[int] = set()

NmiHandler = Callable[[int, None], int | None] | _core.NativeHandler


def register_nmi_handler(
    type: int,
    handler: NmiHandler,
    flags: int,
    name: str,
    info: Any = None,
    *,
    machine: _core.Machine | None = None,
) -> None:
    """Let ``handler`` be asked at each NMI of this machine, on the CPU that takes it.

    As default_do_nmi does it: those of NMI_LOCAL are asked, all of them in the order in
    which they were registered, NMI_FLAG_FIRST before all others. If they have handled
    nothing, those of NMI_SERR or NMI_IO_CHECK are where ``chip.send_nmi`` gave such a
    reason; else those of NMI_UNKNOWN. What nobody handles is counted (``nmi_unknown``).

    A Python function is called as ``handler(type, regs)`` (regs is None) at the next
    bytecode boundary, also in the middle of an IPI handler or with interrupts disabled.
    It returns NMI_DONE, NMI_HANDLED or how many events it has handled; None is
    NMI_HANDLED, and what raises has handled nothing. A ``NativeHandler`` runs inside
    the signal handler, before the Python ones of its type, with ``info`` (None, an int
    or a shared array); it is NMI_HANDLED. The function is as it was when it was
    registered, and stays registered when the process ends that did it, but no Python
    handler of such a process is asked.

    Raises ``IrqError``: EINVAL without a handler, for a type, flags or name (1 to 31
    bytes) that cannot be, and for what is registered under that name already; ENOSPC
    with 15 of the type. ``IpiTimeoutError`` when the irq tables are not free in 5 s;
    ``IpiDeadlockError`` in an NMI's handler that has interrupted who changes them. A
    second one for NMI_SERR or NMI_IO_CHECK is warned of (``ShmipiWarning``), once.
    """
    here = _here(machine)
    _check(type, name, flags)
    if not callable(handler) and not isinstance(handler, _core.NativeHandler):
        raise _invalid(type, name, f"{handler!r} is no handler")
    if not isinstance(handler, _core.NativeHandler | FunctionType):
        handler = _plain(handler, 2)
    with here.irq_lock(_LOCK_S, True, True):
        try:
            others = here.nmi_register(
                type, handler, bool(flags & NMI_FLAG_FIRST), name, info
            )
        except OSError as error:
            number = error.errno
            if number not in _REASONS:
                raise
            code = errno.ENOSPC if number == errno.ENOSPC else errno.EINVAL
            raise _invalid(type, name, _REASONS[number], code) from None
    if others and type in (NMI_SERR, NMI_IO_CHECK) and type not in _warned:
        _warned.add(type)
        warnings.warn(
            f"{_TYPES[type]} has several handlers, of which {name} is the last",
            ShmipiWarning,
            stacklevel=2,
        )


def unregister_nmi_handler(
    type: int, name: str, *, machine: _core.Machine | None = None
) -> None:
    """Ask the first handler of ``type`` that has this name no more, whoever did it.

    When it has returned, no CPU runs the handler any more: it waits for those that do
    (synchronize_rcu), and for a CPU that is stopped in one. If that is interrupted
    (Ctrl-C), the handler is unregistered nevertheless. Does nothing for a name that is
    not there. Raises ``ClusterStateError`` in an interrupt handler and with interrupts
    disabled (of an NMI's the kernel warns: "Trying to free NMI from NMI context"),
    ``IrqError`` EINVAL for a type that is none, ``MachineDiedError`` when the machine
    ends meanwhile, and as ``register_nmi_handler``.
    """
    here = _here(machine)
    _check(type, name)
    if here.is_cpu and (_core.in_interrupt() or _core.irqs_disabled()):
        raise ClusterStateError(
            f"unregister_nmi_handler({name!r}) waits until no CPU runs it: not in an"
            " interrupt handler, nor with interrupts disabled"
        )
    with here.irq_lock(_LOCK_S):
        found = here.nmi_unregister(type, name)
    if found:
        _synchronize(here)


def _synchronize(here: _core.Machine) -> None:
    """Wait until every NMI is over that is in service now."""
    before = here.nmi_services()
    look = _LOOK_S
    while before:
        time.sleep(look)
        look = min(2 * look, _LOOK_MOST_S)
        now = here.nmi_services()
        before = {cpu: n for cpu, n in before.items() if now.get(cpu) == n}


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
    without (0: no limit but a target's death): who has not entered it by then does not.
    One is sent at a time: another's is waited for, which counts for ``delay_us``.

    From everywhere: tasks, hosts, with interrupts disabled, in IPI and NMI handlers. A
    Python function is called with None, a native one with ``info`` (None, an int or a
    shared array). Raises ``IrqError`` EINVAL for this CPU itself (the kernel's BUG_ON),
    ``CpuOfflineError``, and what interrupts the wait (``KeyboardInterrupt``).
    """
    return _send(machine, cpu, func, delay_us, info, False)


def smp_send_safe_nmi_ipi(
    cpu: int,
    func: Callable[[None], object] | _core.NativeHandler,
    delay_us: int = 0,
    info: Any = None,
    *,
    machine: _core.Machine | None = None,
) -> int:
    """Do as ``smp_send_nmi_ipi``, by an interrupt from which any CPU recovers.

    On powerpc (``xive``) that is the message PPC_MSG_NMI_IPI, which interrupts disabled
    hold up, in place of a system reset, from which not every state can be recovered. On
    the other controllers an NMI always can, and it is the same.
    """
    return _send(machine, cpu, func, delay_us, info, True)


def _send(
    machine: _core.Machine | None,
    cpu: int,
    func: Callable[[None], object] | _core.NativeHandler,
    delay_us: int,
    info: Any,
    safe: bool,
) -> int:
    here = _here(machine)
    cpu, delay_us = operator.index(cpu), operator.index(delay_us)
    if delay_us < 0:
        raise ValueError(f"delay_us is {delay_us}: give microseconds, 0 for no limit")
    if cpu != NMI_IPI_ALL_OTHERS:
        if here.is_cpu and cpu == here.id:
            raise IrqError(f"CPU {cpu} can not send an NMI IPI to itself", cpu=cpu)
        if not 0 <= cpu < here.ncpus or not _online(here, cpu):
            here.refuse(cpu)
    if not isinstance(func, _core.NativeHandler | FunctionType):
        if not callable(func):
            raise TypeError(f"{func!r} is no function")
        func = _plain(func, 1)
    target = -1 if cpu == NMI_IPI_ALL_OTHERS else cpu
    return int(here.nmi_ipi(target, func, info, min(delay_us, _DELAY_MOST), safe))


def _here(machine: _core.Machine | None) -> _core.Machine:
    return _core.current_machine() if machine is None else machine


def _plain(handler: Callable[..., Any], nargs: int) -> Callable[..., Any]:
    """Return a function: only those travel by number."""
    if nargs == 1:
        return lambda regs: handler(regs)
    return lambda type, regs: handler(type, regs)


def _check(type: int, name: str, flags: int = 0) -> None:
    if type not in _TYPES:
        raise _invalid(type, name, f"types are 0 to {max(_TYPES)}")
    if flags not in (0, NMI_FLAG_FIRST):
        raise _invalid(type, name, f"flags are 0 or NMI_FLAG_FIRST, not {flags}")
    if not isinstance(name, str) or not name or "\0" in name:
        raise _invalid(type, name, "it has no name: a string")


def _invalid(type: int, name: object, why: str, code: int = errno.EINVAL) -> IrqError:
    what = f"NMI handler {name!r} of {_TYPES.get(type, f'type {type!r}')}"
    return IrqError(f"{what}: {why}", errno=code)


def _online(machine: _core.Machine, cpu: int) -> bool:
    return machine.slot(cpu).state not in (_core.OFFLINE, _core.CPU_DEAD)
