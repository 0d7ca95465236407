"""csd lock debugging: ``csd_lock_wait_toolong`` of kernel/smp.c.

Whoever waits for a call longer than ``csd_lock_timeout`` says so, in the words of the
kernel: who waits for whom, how long, for which function, and what the target does. It
goes to the logger "shmipi.csd", and so to standard error where nobody says otherwise.
The intervals grow as the kernel's do. The IPI is sent again if the target executes
nothing.

A CPU that is stopped (SIGSTOP), or keeps interrupts disabled, is stalled and not dead:
the wait goes on, until ``panic_on_ipistall``, if that is not 0.
"""

from __future__ import annotations

import logging
import time
import traceback
from collections.abc import Callable

from shmipi import _core
from shmipi.errors import IpiStallError
from shmipi.machine.process import is_stopped

__all__ = ["Stall", "csd_lock_is_stuck"]

_log = logging.getLogger("shmipi.csd")

#: dump_cpu_task(): the words of a CPU's stack, or "": set by the layer above.
dump_cpu_task: Callable[[_core.Machine, int], str] | None = None


def csd_lock_is_stuck(machine: _core.Machine | None = None) -> bool:
    """Is there a wait that lasts longer than ``csd_lock_timeout``, and was reported?"""
    here = _core.current_machine() if machine is None else machine
    return here.csd_lock_is_stuck()


class Stall:
    """What was said of a wait that is made of many looks, of a future or a task."""

    __slots__ = ("_call", "_cpu", "_machine", "_state", "_task")

    def __init__(
        self, machine: _core.Machine, call: int, cpu: int, task: bool = False
    ) -> None:
        self._machine = machine
        self._call = call
        self._cpu = cpu
        self._task = task
        self._state = bytearray(_core.STALL_BYTES)

    def look(self) -> None:
        """Report it if that is due. ``IpiStallError``: it is given up."""
        due = self._machine.stall_due(self._state, self._call, self._task)
        if due is not None:
            bug, messages, seconds = due
            index = self._machine.csd_index(self._call & 0xFFFFFFFF)
            try:
                _stalled(self._machine, bug, messages, self._cpu, seconds, index)
            except IpiStallError:
                self._machine.stall_over(self._state)
                raise

    def over(self, unlocked: bool = True) -> None:
        """Say that the wait has ended, if something was said of it."""
        said = self._machine.stall_over(self._state)
        if said is not None and unlocked:
            _unstuck(self._machine, said[0], self._cpu, said[1])


def _me(machine: _core.Machine) -> str:
    return f"CPU#{machine.id}" if machine.is_cpu else "the host"


def _call(what: tuple[str | None, str]) -> str:
    return f"{what[0] or '?'}({what[1]})"


def _stalled(
    machine: _core.Machine, bug: int, messages: int, cpu: int, seconds: float, csd: int
) -> None:
    """csd_lock_wait_toolong(), the part that speaks. ``IpiStallError``."""
    what = machine.csd_what(csd)
    running = machine.cur_csd(cpu)
    word = "Detected" if messages == 1 else "Continued"
    lines = [
        f"csd: {word} non-responsive CSD lock (#{bug}) on {_me(machine)}, waiting"
        f" {seconds * 1e9:.0f} ns for CPU#{cpu:02d} {_call(what)}."
    ]
    panic = machine.csd_lock_params()[1]
    if panic and seconds * 1000 > panic:
        _log.critical("\n".join(lines))
        raise IpiStallError(
            f"CPU {cpu} has not answered {_call(what)} in {seconds:.3g} s:"
            f" {_doing(csd, running)}. {' '.join([*_why(machine, cpu), ''])}"
            f"panic_on_ipistall is {panic} ms; the call stays queued and may still run",
            cpu=cpu,
            function=what[0],
        )
    lines.append(f"\tcsd: CSD lock (#{bug}) {_doing(csd, running)}.")
    lines += [f"\tcsd: {words}" for words in _why(machine, cpu)]
    if machine.csd_may_dump(cpu) and dump_cpu_task is not None:
        # The alert first: the dump waits for the CPU.
        _log.critical("\n".join(lines))
        lines = list(filter(None, [dump_cpu_task(machine, cpu).rstrip("\n")]))
    if running is None:
        lines.append(
            f"csd: Re-sending CSD lock (#{bug}) IPI from {_me(machine)} to"
            f" CPU#{cpu:02d}"
        )
        machine.csd_resend(cpu)
    if messages == 1:  # dump_stack()
        lines.append(f"csd: {_me(machine)} waits here:")
        lines.append("".join(traceback.format_stack()[:-1]).rstrip("\n"))
    if lines:
        _log.critical("\n".join(lines))


def _doing(csd: int, running: tuple[int, str | None, str] | None) -> str:
    if running is None:
        return "unresponsive"
    if running[0] != csd:
        return f"handling prior {_call(running[1:])} request"
    return "handling this request"


def _why(machine: _core.Machine, cpu: int) -> list[str]:
    """Say what the kernel cannot know: what keeps the target's process."""
    if is_stopped(machine.slot(cpu).pid):
        return [f"CPU#{cpu:02d} is stopped by a signal: it goes on with SIGCONT."]
    if machine.masked(cpu):
        return [f"CPU#{cpu:02d} has interrupts disabled."]
    kind, name, begun, task = machine.doing(cpu)
    if kind and name:
        spent = max(0, time.monotonic_ns() - begun) / 1e9
        return [f"CPU#{cpu:02d} has run {name} for {spent:.3g} s."]
    return [f"CPU#{cpu:02d} runs the task {task}."] if task else []


def _unstuck(machine: _core.Machine, bug: int, cpu: int, seconds: float) -> None:
    _log.critical(
        f"csd: CSD lock (#{bug}) got unstuck on {_me(machine)}, CPU#{cpu:02d} released"
        f" the lock after {seconds * 1e9:.0f} ns."
    )


_core.on_csd_stall(_stalled, _unstuck)
