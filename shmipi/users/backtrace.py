"""Backtraces: every CPU says by an NMI where it is (lib/nmi_backtrace.c).

A CPU writes its Python stack, and the C function it is in, in its NMI handler: at once,
whatever it executes and with interrupts disabled. Where the controller has no NMIs, a
line that can be masked stands in for it, as on the architecture, and the text says so.
An idle CPU is skipped. Of a CPU that does not answer (it is stopped, or has masked the
line), the Python stack is read from outside its process, where the system permits it.

The texts are logged (critical, logger "shmipi.nmi"): on standard error, unless
``logging`` is configured otherwise. ``backtraces`` returns them.
"""

from __future__ import annotations

import logging
import time
from functools import partial

from shmipi import _core
from shmipi.cpumask import CpuMask, MaskLike
from shmipi.machine import controller
from shmipi.machine.arrays import Arrays, here, of_machine
from shmipi.machine.process import is_stopped
from shmipi.smp import csdlock
from shmipi.smp.cpus import cpu_online
from shmipi.users.state import state

__all__ = [
    "Backtrace",
    "backtraces",
    "nmi_trigger_cpumask_backtrace",
    "trigger_all_cpu_backtrace",
    "trigger_allbutcpu_cpu_backtrace",
    "trigger_cpumask_backtrace",
    "trigger_single_cpu_backtrace",
]

_log = logging.getLogger("shmipi.nmi")
_TIMEOUT_S = 10.0
_LOOK_S = 0.001
_STALL_S = 1.0  # a waiter's own look at who does not answer


def backtraces(
    mask: MaskLike | None = None,
    exclude_cpu: int = -1,
    timeout: float = _TIMEOUT_S,
    *,
    home: Arrays | None = None,
) -> dict[int, str] | None:
    """Return what the CPUs of ``mask`` (None: all online) say of themselves, by CPU.

    None: another such round is under way, on whichever CPU. ``exclude_cpu`` is left
    out. This CPU says it directly, the others are sent an NMI and have ``timeout``
    seconds. Raises ``CpuOfflineError`` for what is no CPU, and ``ArenaFullError`` when
    there is no memory for the first one.
    """
    home = here() if home is None else home
    machine = home.machine
    asked = _targets(machine, mask, exclude_cpu)
    _make_state(home)
    if not machine.backtrace_begin():
        return None
    try:
        return _round(machine, asked, timeout)
    finally:
        machine.backtrace_end()


def _targets(machine: _core.Machine, mask: MaskLike | None, exclude: int) -> list[int]:
    cpus = range(machine.ncpus) if mask is None else CpuMask.of(mask, machine.ncpus)
    online = [cpu for cpu in cpus if cpu_online(cpu, machine=machine)]
    return [cpu for cpu in online if cpu != exclude]


def _make_state(home: Arrays) -> None:
    machine = home.machine
    if not machine.user_offset("backtrace"):
        state(home, "backtrace", machine.backtrace_bytes())
    machine.backtrace_init()


def _round(
    machine: _core.Machine, cpus: list[int], timeout: float
) -> dict[int, str] | None:
    texts: dict[int, str] = {}
    if machine.is_cpu and machine.id in cpus:
        machine.backtrace_here()
        texts[machine.id] = machine.backtrace_text(machine.id) or ""
    waiting = []
    for cpu in (cpu for cpu in cpus if cpu not in texts):
        if is_stopped(machine.slot(cpu).pid):
            texts[cpu] = _outside(machine, cpu, "is stopped by a signal")
        elif machine.backtrace_ask(cpu):
            waiting.append(cpu)
    deadline = time.monotonic() + timeout
    while waiting:
        now = time.monotonic()
        for cpu in list(waiting):
            if not machine.backtrace_asked(cpu):
                texts[cpu] = (
                    machine.backtrace_text(cpu)
                    or f"NMI backtrace for cpu {cpu}: cut off\n"
                )
            elif not cpu_online(cpu, machine=machine):
                texts[cpu] = f"NMI backtrace for cpu {cpu}: it went offline\n"
            elif now >= deadline:
                texts[cpu] = _outside(machine, cpu, f"did not answer in {timeout:g} s")
        waiting = [cpu for cpu in waiting if cpu not in texts]
        if waiting:
            time.sleep(_LOOK_S)
    return dict(sorted(texts.items()))


def _outside(machine: _core.Machine, cpu: int, why: str) -> str:
    """Say where a CPU is that says nothing itself."""
    lines = [f"NMI backtrace for cpu {cpu}: it {why}"]
    if machine.masked(cpu):
        lines.append("  it has interrupts disabled")
    stack = machine.stack_of(cpu)
    if stack is None:
        lines.append("  (its process may not be read)")
    elif stack:
        lines += ["  read from outside:", stack.rstrip("\n")]
    else:
        lines.append("  it runs no Python")
    return "\n".join(lines) + "\n"


def nmi_trigger_cpumask_backtrace(
    mask: MaskLike, exclude_cpu: int = -1, *, home: Arrays | None = None
) -> None:
    """Log where the CPUs of ``mask`` are, but ``exclude_cpu``.

    One at a time for the machine: a second caller returns silently. Waits 10 s at most.
    """
    home = here() if home is None else home
    machine = home.machine
    others = CpuMask(
        cpu
        for cpu in _targets(machine, mask, exclude_cpu)
        if not (machine.is_cpu and cpu == machine.id)
    )
    texts = backtraces(mask, exclude_cpu, home=home)
    if texts is None:
        return
    me = f"CPU {machine.id}" if machine.is_cpu else "the host"
    if others:
        _log.critical(f"Sending {_kind(machine)} from {me} to CPUs {others}:")
    for text in texts.values():
        _log.critical(text.rstrip("\n"))


def _kind(machine: _core.Machine) -> str:
    if not machine.has_no_nmi():
        return "NMI"
    name = controller.of(machine).name
    return f"an interrupt that can be masked ({name} has no NMI)"


def trigger_all_cpu_backtrace(*, home: Arrays | None = None) -> bool:
    """Log where every online CPU is. True: it can be done."""
    home = here() if home is None else home
    nmi_trigger_cpumask_backtrace(range(home.machine.ncpus), home=home)
    return True


def trigger_allbutcpu_cpu_backtrace(
    exclude_cpu: int, *, home: Arrays | None = None
) -> bool:
    """Log where every online CPU but one is."""
    home = here() if home is None else home
    nmi_trigger_cpumask_backtrace(range(home.machine.ncpus), exclude_cpu, home=home)
    return True


def trigger_cpumask_backtrace(mask: MaskLike, *, home: Arrays | None = None) -> bool:
    """Log where the CPUs of ``mask`` are."""
    nmi_trigger_cpumask_backtrace(mask, home=home)
    return True


def trigger_single_cpu_backtrace(cpu: int, *, home: Arrays | None = None) -> bool:
    """Log where one CPU is."""
    nmi_trigger_cpumask_backtrace([cpu], home=home)
    return True


class Backtrace:
    """The module, for the host of one machine: ``cluster.users.backtrace``."""

    def __init__(self, home: Arrays) -> None:
        self._home = home
        self.backtraces = partial(backtraces, home=home)
        self.nmi_trigger_cpumask_backtrace = partial(
            nmi_trigger_cpumask_backtrace, home=home
        )
        self.trigger_all_cpu_backtrace = partial(trigger_all_cpu_backtrace, home=home)
        self.trigger_allbutcpu_cpu_backtrace = partial(
            trigger_allbutcpu_cpu_backtrace, home=home
        )
        self.trigger_cpumask_backtrace = partial(trigger_cpumask_backtrace, home=home)
        self.trigger_single_cpu_backtrace = partial(
            trigger_single_cpu_backtrace, home=home
        )


def _dump_cpu_task(machine: _core.Machine, cpu: int) -> str:
    """dump_cpu_task(), of who waits for ``cpu``: not longer than he can wait."""
    home = of_machine(machine)
    if home is None:
        return ""
    if machine.has_no_nmi() and machine.masked(cpu):
        return _outside(machine, cpu, "has masked the interrupt that asks it")
    texts = backtraces([cpu], timeout=_STALL_S, home=home) or {}
    return texts.get(cpu, "")


csdlock.dump_cpu_task = _dump_cpu_task
