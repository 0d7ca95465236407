"""Timers and tick broadcast: ``kernel/time/hrtimer.c``, ``tick-broadcast.c``.

A timer is made on the host, by name, and started on the CPU whose queue it is to stand
in; its function runs there, in hard interrupt context, when CLOCK_MONOTONIC has reached
its expiry and not before. A CPU that sleeps has stopped its own timer, as in a deep C
state: another one, to which the broadcast device is bound, wakes it by the timer's
interrupt line (``LOCAL_TIMER_VECTOR``, ``PPC_MSG_TICK_BROADCAST``, ``IPI_TIMER``; a
function call on controllers without one). When that one goes offline, dies or is
stopped, another takes the broadcast over; timers of a CPU that goes offline or dies
move to others. On a CPU that runs a task with ``kick=False`` a timer waits until the
task does.
"""

from __future__ import annotations

import errno
import pickle
import struct
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from shmipi import _core
from shmipi.errors import (
    ClusterStateError,
    CpuOfflineError,
    IpiDeadlockError,
    IrqError,
)
from shmipi.machine import arrays, byvalue
from shmipi.machine.arrays import Arrays, SharedArray
from shmipi.users.nohz import housekeeping_any_cpu
from shmipi.users.state import state

__all__ = [
    "HRTIMER_MODE_ABS",
    "HRTIMER_MODE_ABS_PINNED",
    "HRTIMER_MODE_PINNED",
    "HRTIMER_MODE_REL",
    "HRTIMER_MODE_REL_PINNED",
    "HRTIMER_NORESTART",
    "HRTIMER_RESTART",
    "BoundTick",
    "HrTimer",
    "TickCpu",
    "TickStats",
    "hrtimer",
    "hrtimer_active",
    "hrtimer_cancel",
    "hrtimer_forward",
    "hrtimer_forward_now",
    "hrtimer_start",
    "hrtimer_try_to_cancel",
    "ktime_get",
    "tick_receive_broadcast",
]

HRTIMER_MODE_ABS: Final = 0
HRTIMER_MODE_REL: Final = 1
HRTIMER_MODE_PINNED: Final = 2  #: or'ed: not moved off an isolated CPU
HRTIMER_MODE_ABS_PINNED: Final = 2
HRTIMER_MODE_REL_PINNED: Final = 3
HRTIMER_NORESTART: Final = False
HRTIMER_RESTART: Final = True

_KIND: Final = "hrtimer"
_HEAD: Final = struct.Struct("<q")
_NAME_MAX: Final = 39
_INACTIVE, _RUNNING = 0, 2
_NONE, _INT, _POINTER = 0, 1, 6  # enum shi_kind
_RELAX_S: Final = 0.00005

ktime_get = time.monotonic_ns


class HrTimer:
    """A timer of a machine: the same on all its CPUs and the host, found by name.

    Made by ``cluster.users.tick.hrtimer()``.
    """

    def __init__(self, memory: SharedArray) -> None:
        home = arrays.home_of(memory)
        self._memory = memory
        self._machine: _core.Machine = home.machine
        (self.index,) = _HEAD.unpack(bytes(memory[: _HEAD.size]))
        self.name = memory._key[1] if memory._key is not None else "?"
        self._function: Callable[[HrTimer], object] | None = None

    def __reduce__(self) -> Any:
        return type(self), (self._memory,)

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, HrTimer)
            and self._machine.name == other._machine.name
            and self.index == other.index
        )

    def __hash__(self) -> int:
        return hash((self._machine.name, self.index))

    def __repr__(self) -> str:
        if self._machine.closed:
            return f"<HrTimer {self.name!r}>"
        text = ("inactive", "queued", "running")[self._look()[0]]
        return f"<HrTimer {self.name!r} {text} fired={self.fired}>"

    def _look(self) -> tuple[int, int, int, int, int, int, str, int]:
        return self._machine.timer_look(self.index)

    @property
    def expires(self) -> int:
        """When it expires, or did: CLOCK_MONOTONIC, ns."""
        return self._look()[2]

    @property
    def due(self) -> int:
        """The expiry that its function was called for last (in it: is called for)."""
        return self._look()[7]

    @property
    def fired(self) -> int:
        """How often its function was called."""
        return self._look()[4]

    @property
    def cpu(self) -> int | None:
        """The CPU in whose queue it stands, or whose function runs; None: inactive."""
        now, cpu = self._look()[:2]
        return None if now == _INACTIVE else cpu

    def _call(self) -> object:
        if self._function is None:
            self._function = pickle.loads(bytes(self._memory[_HEAD.size :]))
        return self._function(self)


def _check_name(name: str) -> None:
    if not isinstance(name, str) or not 0 < len(name.encode()) <= _NAME_MAX:
        raise ValueError(f"name is {name!r}: give a string of 1 to {_NAME_MAX} bytes")


def _make(
    home: Arrays,
    name: str,
    function: Callable[[HrTimer], object] | _core.NativeHandler,
    info: Any,
) -> HrTimer:
    """hrtimer_setup."""
    _check_name(name)
    native = function if isinstance(function, _core.NativeHandler) else None
    if native is None and not callable(function):
        raise TypeError(f"function is {function!r}: give a callable or a NativeHandler")
    blob = byvalue.dumps(function) if native is None else b""
    try:
        home.find(_KIND, name)
    except KeyError:
        pass
    else:
        raise FileExistsError(errno.EEXIST, "there is a timer of this name", name)
    kind, value = (_NONE, 0) if native is None else _info(home, info)
    memory = home.make(_KIND, name, "u1", _HEAD.size + len(blob))
    memory[_HEAD.size :] = np.frombuffer(blob, "u1")
    index = home.machine.timer_setup(name, native, kind, value)
    memory[: _HEAD.size] = np.frombuffer(_HEAD.pack(index), "u1")
    return HrTimer(memory)


def _info(home: Arrays, info: Any) -> tuple[int, int]:
    if info is None:
        return _NONE, 0
    if isinstance(info, int):
        return _INT, info & (1 << 64) - 1
    if isinstance(info, SharedArray):
        offset = home.offset_of(info)
        if offset is not None:
            return _POINTER, offset
    raise TypeError(
        f"info is {info!r}: of a native handler None, an int or a shared array"
    )


_timers: dict[tuple[str, int], HrTimer] = {}


def _expire(index: int) -> bool:
    """Call the function of a timer that has expired on this CPU: by the core."""
    machine = _core.current_machine()
    timer = _timers.get((machine.name, index))
    if timer is None:
        name = machine.timer_look(index)[6]
        timer = _timers[machine.name, index] = HrTimer(arrays.find(_KIND, name))
    return bool(timer._call())


def hrtimer(name: str) -> HrTimer:
    """Return the timer made by ``cluster.users.tick.hrtimer(name, ...)``.

    ``KeyError`` when there is none, ``NoMachineError`` outside a machine.
    """
    return HrTimer(arrays.find(_KIND, name))


def hrtimer_start(
    timer: HrTimer,
    tim: int,
    mode: int = HRTIMER_MODE_REL,
    *,
    interval: int = 0,
    cpu: int | None = None,
) -> None:
    """Start a timer, or start it anew: on this CPU, or on ``cpu`` (``add_timer_on``).

    ``tim`` and ``interval`` are ns, ``tim`` from now on or with ``HRTIMER_MODE_ABS`` of
    CLOCK_MONOTONIC. With an interval it expires again and again. One that runs is
    queued where it runs when its function has ended. For tasks and handlers; the host
    has no queue and names a CPU. On an isolated CPU (``nohz``) one that is not
    ``HRTIMER_MODE_PINNED`` goes to a housekeeping CPU. Raises ``CpuOfflineError``
    (ENXIO), ``CsdBusyError`` (ENOSPC: that many timers are in the queue),
    ``ClusterStateError`` in an NMI.
    """
    if mode not in range(HRTIMER_MODE_REL_PINNED + 1):
        raise ValueError(f"mode is {mode!r}: one of HRTIMER_MODE_*")
    relative = mode & HRTIMER_MODE_REL
    if interval < 0 or (not relative and tim < 0):
        raise ValueError(f"tim is {tim}, interval is {interval}: ns, not negative")
    machine = timer._machine
    chosen = cpu is None
    if cpu is None:
        if not machine.is_cpu:
            raise ClusterStateError(
                "the host is no CPU and has no timers: say on which CPU (cpu=)"
            )
        cpu = machine.id
        if not mode & HRTIMER_MODE_PINNED and machine.user_offset("nohz"):
            cpu = housekeeping_any_cpu()  # get_nohz_timer_target
    expires = time.monotonic_ns() + max(tim, 0) if relative else tim
    try:
        machine.timer_start(timer.index, expires, interval, cpu)
    except CpuOfflineError:
        if not chosen or cpu == machine.id:
            raise
        # It went offline since it was chosen.
        machine.timer_start(timer.index, expires, interval, machine.id)


def hrtimer_try_to_cancel(timer: HrTimer) -> int:
    """Return 1: it was queued and is not any more; 0: it was not; -1: it runs."""
    return timer._machine.timer_cancel(timer.index)


def hrtimer_cancel(timer: HrTimer) -> int:
    """Cancel a timer, and wait while its function runs: 1, or 0 if it was not queued.

    In its own function it would wait for itself: ``IpiDeadlockError``.
    """
    while (done := hrtimer_try_to_cancel(timer)) < 0:
        here = timer._machine.id
        if timer._look()[:2] == (_RUNNING, here) and not _core.in_task():
            raise IpiDeadlockError(
                f"timer {timer.name!r} cannot be cancelled by its own function",
                cpu=here,
                errno=errno.EDEADLK,
            )
        time.sleep(_RELAX_S)
    return done


def hrtimer_active(timer: HrTimer) -> bool:
    """Return whether it is queued or its function runs."""
    return timer._look()[0] != _INACTIVE


def hrtimer_forward(timer: HrTimer, now: int, interval: int) -> int:
    """Let it expire again after ``now``: by how many intervals that is later.

    In its function, which returns ``HRTIMER_RESTART`` then.
    """
    return timer._machine.timer_forward(timer.index, now, interval)


def hrtimer_forward_now(timer: HrTimer, interval: int) -> int:
    """As ``hrtimer_forward`` from this moment on."""
    return hrtimer_forward(timer, time.monotonic_ns(), interval)


def tick_receive_broadcast() -> None:
    """Do what the timer's line does, on this CPU: run what has expired.

    ``IrqError`` with ENODEV: this machine has no timers; EINVAL: none was ever queued
    on this CPU, so nothing handles its event device.
    """
    err = _core.current_machine().tick_receive_broadcast()
    if err:
        raise IrqError(
            "this machine has no timers: cluster.users.tick makes them"
            if err == -errno.ENODEV
            else "nothing handles the event device of this CPU",
            errno=-err,
        )


@dataclass(frozen=True)
class TickCpu:
    """What a CPU's timers did: see ``TickStats``."""

    next_event: int  #: when the first of its queue expires, ns; 0 or 2**64-1: never
    local: int  #: interrupts of its own event device
    broadcast: int  #: interrupts that came through the timer's line
    expired: int  #: timers
    sent: int  #: broadcast interrupts that it has sent
    handlers: int  #: interrupts of the broadcast device that it took
    stopped: bool  #: it sleeps with its local timer stopped


@dataclass(frozen=True)
class TickStats:
    """Where the broadcast is, and what it did."""

    bound_on: int | None  #: the CPU that the broadcast device is bound to
    handovers: int  #: times it went to another CPU because that was gone or stopped
    stalls: int  #: of those, because it was stopped
    died: int  #: timers whose function was cut off by its CPU's death
    moved: int  #: timers taken over from CPUs that were gone
    cpus: tuple[TickCpu, ...]


class BoundTick:
    """``shmipi.users.tick`` for the host of one machine: ``cluster.users.tick``."""

    def __init__(self, home: Arrays) -> None:
        self._home = home
        state(home, "tick", home.machine.tick_bytes())
        self.hrtimer_start = hrtimer_start
        self.hrtimer_cancel = hrtimer_cancel
        self.hrtimer_try_to_cancel = hrtimer_try_to_cancel
        self.hrtimer_active = hrtimer_active

    def hrtimer(
        self,
        name: str,
        function: Callable[[HrTimer], object] | _core.NativeHandler | None = None,
        info: Any = None,
    ) -> HrTimer:
        """Make timer ``name`` (``hrtimer_setup``), or return it: without a function.

        ``function(timer)`` is called when it expires and may return
        ``HRTIMER_RESTART``; it is sent once. Of a native handler ``info`` is the
        argument: None, an int or a shared array. ``FileExistsError``: there is one;
        ``CsdBusyError``, ENOSPC: a machine has 1024 and four a CPU.
        """
        if function is None:
            return HrTimer(self._home.find(_KIND, name))
        return _make(self._home, name, function, info)

    def stats(self) -> TickStats:
        """Return where the broadcast is, and what was counted."""
        look = self._home.machine.tick_look()
        assert look is not None
        (bound, handovers, stalls, died, moved), cpus = look
        return TickStats(
            bound_on=None if bound < 0 else bound,
            handovers=handovers,
            stalls=stalls,
            died=died,
            moved=moved,
            cpus=tuple(TickCpu(*one) for one in cpus),
        )
