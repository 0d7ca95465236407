"""CPU hotplug as states with callbacks: ``kernel/cpu.c``, ``linux/cpuhotplug.h``.

A CPU goes up through the states in ascending order, and down in descending order. In
the PREPARE section (below ``CPUHP_BRINGUP_CPU``) callbacks run on the control CPU,
which is the host that asks: before the CPU is there, and when it is gone. In the
STARTING section they run on the CPU, with interrupts off: just before it is online, and
just after it is not any more, while all others are stopped; they can not fail. In the
ONLINE section they run on the CPU in task context, above its task, and may sleep. A
callback that fails (it returns something but 0 and None, or raises) has what was done
undone, and the CPU stays as it was.

Of a CPU that is killed only the PREPARE section's teardowns run, as soon as one of the
hosts that have set up such states has noticed, and at the latest before it is booted;
those of the machine's own users at once, by the firmware.
``cpuhp_states()`` lists the states that have something to do, as the kernel's
``/sys/devices/system/cpu/hotplug/states`` does.

The controller knows of none of this. A raw INIT resets its target, which is then as
one that was killed; a raw STARTUP starts it without asking whether it is its turn: the
hotplug lock is not taken, and no callback of the PREPARE or ONLINE section runs (those
of the STARTING section do: it is the CPU itself that runs them). In the kernel such a
CPU would come to ``wait_for_master_cpu()``; who starts CPUs so stands for the kernel.
Callbacks run with the hotplug lock held: they must not take ``cpus_read_lock()``, nor
call ``stop_machine()`` (``stop_machine_cpuslocked()`` is for them).

Callbacks get the CPU's number. They are Python functions, which travel as those of
calls do, or in the other two sections native handlers, whose result is 0. States are
set up by hosts and belong to the machine: whoever takes a CPU down runs them.
"""

from __future__ import annotations

import contextlib
import errno
import pickle
import threading
import warnings
import weakref
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from enum import IntEnum
from functools import partial
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from shmipi import _core
from shmipi.errors import (
    ClusterStateError,
    CpuDiedError,
    CpuOfflineError,
    HotplugError,
    ShmipiError,
    ShmipiWarning,
)
from shmipi.machine import byvalue
from shmipi.machine.arrays import Arrays, find
from shmipi.machine.limits import start_thread
from shmipi.smp import cpus as _cpus

__all__ = [
    "CpuHotplug",
    "CpuhpState",
    "cpuhp_remove_state",
    "cpuhp_remove_state_nocalls",
    "cpuhp_setup_state",
    "cpuhp_setup_state_nocalls",
    "cpuhp_states",
]


class CpuhpState(IntEnum):
    """``enum cpuhp_state``: those that mean something here, numbered as in Linux 6.12.

    Every number between ``CPUHP_OFFLINE`` and ``CPUHP_ONLINE`` can be used.
    """

    CPUHP_OFFLINE = 0
    CPUHP_CREATE_THREADS = 1
    CPUHP_SOFTIRQ_DEAD = 15
    CPUHP_IRQ_POLL_DEAD = 20
    CPUHP_BLOCK_SOFTIRQ_DEAD = 21
    CPUHP_NET_DEV_DEAD = 32
    CPUHP_WORKQUEUE_PREP = 38
    CPUHP_HRTIMERS_PREPARE = 40
    CPUHP_X2APIC_PREPARE = 41
    CPUHP_SMPCFD_PREPARE = 42
    CPUHP_RCUTREE_PREP = 45
    CPUHP_TIMERS_PREPARE = 61
    CPUHP_BP_PREPARE_DYN = 64
    CPUHP_BP_PREPARE_DYN_END = 84
    CPUHP_BRINGUP_CPU = 86
    CPUHP_AP_IDLE_DEAD = 87
    CPUHP_AP_OFFLINE = 88
    CPUHP_AP_SCHED_STARTING = 90
    CPUHP_AP_RCUTREE_DYING = 91
    CPUHP_AP_IRQ_GIC_STARTING = 93
    CPUHP_AP_DUMMY_TIMER_STARTING = 134
    CPUHP_AP_SMPCFD_DYING = 140
    CPUHP_AP_HRTIMERS_DYING = 141
    CPUHP_AP_TICK_DYING = 142
    CPUHP_AP_ONLINE = 145
    CPUHP_TEARDOWN_CPU = 146
    CPUHP_AP_ONLINE_IDLE = 147
    CPUHP_AP_SMPBOOT_THREADS = 151
    CPUHP_AP_IRQ_AFFINITY_ONLINE = 152
    CPUHP_AP_BLK_MQ_ONLINE = 153
    CPUHP_AP_PERF_ONLINE = 156
    CPUHP_AP_WORKQUEUE_ONLINE = 188
    CPUHP_AP_RCUTREE_ONLINE = 190
    CPUHP_AP_ONLINE_DYN = 192
    CPUHP_AP_ONLINE_DYN_END = 232
    CPUHP_AP_ACTIVE = 235
    CPUHP_ONLINE = 236


_S = CpuhpState
#: The machine's own: what they do is not a callback here, and can not be replaced.
_TAKEN: Final = {
    _S.CPUHP_CREATE_THREADS: "threads:prepare",
    _S.CPUHP_SMPCFD_PREPARE: "smpcfd:prepare",
    _S.CPUHP_BRINGUP_CPU: "cpu:bringup",
    _S.CPUHP_AP_IDLE_DEAD: "idle:dead",
    _S.CPUHP_AP_OFFLINE: "ap:offline",
    _S.CPUHP_AP_SMPCFD_DYING: "smpcfd:dying",
    _S.CPUHP_AP_ONLINE: "ap:online",
    _S.CPUHP_TEARDOWN_CPU: "cpu:teardown",
    _S.CPUHP_AP_ACTIVE: "sched:active",
}
_DYNAMIC: Final = {
    int(_S.CPUHP_BP_PREPARE_DYN): int(_S.CPUHP_BP_PREPARE_DYN_END),
    int(_S.CPUHP_AP_ONLINE_DYN): int(_S.CPUHP_AP_ONLINE_DYN_END),
}

Callback = Callable[[int], Any] | _core.NativeHandler

_STEPS = 64  # that can be set up at a time
_BLOB = 4080
_ENTRY = np.dtype(
    [("state", "u4"), ("length", "u4"), ("spare", "u8"), ("blob", "u1", (_BLOB,))]
)
_LOOK_S = 1.0


@dataclass(frozen=True)
class _Step:
    state: int
    name: str
    startup: Callback | None
    teardown: Callback | None


def _prepares(state: int) -> bool:
    return state < _S.CPUHP_BRINGUP_CPU


def _starts(state: int) -> bool:
    return _S.CPUHP_BRINGUP_CPU < state < _S.CPUHP_TEARDOWN_CPU


# ---- on CPUs -------------------------------------------------------------------------


def _call(function: Callback, cpu: int) -> Any:
    if isinstance(function, _core.NativeHandler):
        return _core.current_machine().run_here(function, cpu)
    return function(cpu)


def _on_cpu(function: Callback, cpu: int, atomic: bool) -> Any:
    """Run a callback of the ONLINE section, or (`atomic`) of the STARTING one."""
    with _cpus.hotplug_locked():
        if not atomic:
            return _call(function, cpu)
        flags = _core.local_irq_save()
        try:
            return _call(function, cpu)
        finally:
            _core.local_irq_restore(flags)


def _nofail(steps: Iterable[tuple[str, Callback]], cpu: int) -> None:
    """Run callbacks that can not fail: one that does is told of."""
    with _cpus.hotplug_locked():
        for name, function in steps:
            try:
                result = _call(function, cpu)
                if result:
                    raise HotplugError(
                        f"callback {name} of CPU {cpu} can not fail, and returned"
                        f" {result!r}",
                        cpu=cpu,
                    )
            except Exception as error:
                _core.write_unraisable(error, f"CPU hotplug callback {name}")


def _take_cpu_down(dying: list[tuple[str, Callback]], cpu: int) -> int:
    """Be offline, and run the dying callbacks, with all others stopped."""
    code = _core.cpu_disable()
    if not code:
        _nofail(dying, cpu)
    return code


def starting(cpu: int) -> None:
    """Run the STARTING section's startups: this CPU is about to be online."""
    try:
        entries = _entries(find("user", "cpuhp"))
    except KeyError:
        return
    steps = sorted(_load(entries), key=lambda step: step.state)
    _nofail([(s.name, s.startup) for s in steps if _starts(s.state) and s.startup], cpu)


# ---- the table -----------------------------------------------------------------------


def _entries(memory: NDArray[Any]) -> NDArray[Any]:
    table: NDArray[Any] = np.asarray(memory)[: _STEPS * _ENTRY.itemsize].view(_ENTRY)
    return table


def _load(entries: NDArray[Any]) -> list[_Step]:
    steps = []
    for entry in entries[entries["state"] != 0]:
        blob = entry["blob"][: int(entry["length"])].tobytes()
        steps.append(_Step(int(entry["state"]), *pickle.loads(blob)))
    return steps


class CpuHotplug:
    """The states of one machine, as a host sees them: what ``Cluster`` goes through."""

    def __init__(
        self,
        home: Arrays,
        hold: Callable[[float | None], AbstractContextManager[None]],
    ) -> None:
        self._home = home
        self._machine = home.machine
        self._hold = weakref.WeakMethod(hold)
        self._watcher: threading.Thread | None = None
        self._closed = False
        #: What users of IPIs do when a CPU is gone: native, and there without a table.
        self._users = [
            _Step(state, name, None, partial(self._machine.users_teardown, state))
            for state, name in self._machine.users_states()
        ]

    # ---- the table ------------------------------------------------------------------

    def _memory(self, make: bool) -> NDArray[Any] | None:
        home, nbytes = self._home, _STEPS * _ENTRY.itemsize + 4 * self._machine.ncpus
        if not make and not self._machine.user_offset("cpuhp"):
            return None
        memory = home.make("user", "cpuhp", "u1", nbytes)
        if not self._machine.user_offset("cpuhp"):
            offset = home.offset_of(memory)
            assert offset is not None
            self._reached(memory)[:] = [
                _S.CPUHP_ONLINE if self._online(cpu) else _S.CPUHP_OFFLINE
                for cpu in range(self._machine.ncpus)
            ]
            self._machine.publish_user("cpuhp", offset)
        return np.asarray(memory)

    def _reached(self, memory: NDArray[Any]) -> NDArray[Any]:
        """Return how far each CPU has come (``cpuhp_cpu_state.state``)."""
        view: NDArray[Any] = np.asarray(memory)[_STEPS * _ENTRY.itemsize :].view("u4")
        return view

    def _online(self, cpu: int) -> bool:
        return _cpus.cpu_online(cpu, machine=self._machine)

    def _steps(self) -> list[_Step]:
        memory = self._memory(False)
        return self._users + ([] if memory is None else _load(_entries(memory)))

    def states(self) -> dict[int, str]:
        """Return the states that have something to do, by number."""
        own = {int(state): name for state, name in _TAKEN.items()}
        return dict(sorted({**own, **{s.state: s.name for s in self._steps()}}.items()))

    def _of_users(self) -> set[int]:
        return {step.state for step in self._users}

    def _set(self, cpu: int, state: int) -> None:
        memory = self._memory(False)
        if memory is not None:
            self._reached(memory)[cpu] = state

    def _up(self, chosen: Callable[[int], bool]) -> list[_Step]:
        return sorted(
            (s for s in self._steps() if chosen(s.state)), key=lambda s: s.state
        )

    # ---- calling --------------------------------------------------------------------

    def _invoke(self, step: _Step, function: Callback | None, cpu: int) -> None:
        """Call one callback where it belongs. ``HotplugError``, ``CpuDiedError``."""
        if function is None:
            return
        try:
            if _prepares(step.state):
                with _cpus.hotplug_locked():
                    result = _call(function, cpu)
            else:
                call = self._machine.stop_post(
                    cpu, _on_cpu, (function, cpu, _starts(step.state)), True
                )
                result = self._machine.collect(call, cpu, None)
        except (CpuDiedError, CpuOfflineError, ClusterStateError):
            raise
        except Exception as error:
            raise HotplugError(
                f"callback {step.name!r} (state {step.state}) of CPU {cpu} raised"
                f" {type(error).__name__}",
                cpu=cpu,
                errno=errno.EIO,
            ) from error
        if result:
            code = -result if isinstance(result, int) and result < 0 else errno.EIO
            raise HotplugError(
                f"callback {step.name!r} (state {step.state}) of CPU {cpu} returned"
                f" {result!r}",
                cpu=cpu,
                errno=code,
            )

    def _quietly(self, step: _Step, function: Callback | None, cpu: int) -> None:
        """Undo, or take down what is dead: what fails there is told of."""
        try:
            self._invoke(step, function, cpu)
        except (CpuDiedError, CpuOfflineError):
            pass
        except ShmipiError as error:
            if self._closed or self._machine.closed:
                return  # this host is not there any more
            warnings.warn(f"CPU {cpu}: {error}", ShmipiWarning, stacklevel=3)

    def _all_or_none(self, steps: list[_Step], cpu: int, up: bool) -> None:
        done: list[_Step] = []
        for step in steps:
            try:
                self._invoke(step, step.startup if up else step.teardown, cpu)
            except BaseException:
                for other in reversed(done):
                    self._quietly(other, other.teardown if up else other.startup, cpu)
                raise
            done.append(step)

    # ---- a CPU goes up or down: with the hotplug lock held --------------------------

    def prepare(self, cpu: int) -> None:
        """Before it is brought up. ``HotplugError``: nothing is left of it."""
        self.dead_ones()
        self._all_or_none(self._up(_prepares), cpu, True)

    def came(self, cpu: int) -> None:
        """It is online: the ONLINE section's startups, all or none."""
        self._all_or_none(
            self._up(lambda state: state > _S.CPUHP_TEARDOWN_CPU), cpu, True
        )
        self._set(cpu, _S.CPUHP_ONLINE)

    def leave(self, cpu: int) -> None:
        """Before it is taken down: the ONLINE section's teardowns, all or none."""
        steps = self._up(lambda state: state > _S.CPUHP_TEARDOWN_CPU)
        self._all_or_none(steps[::-1], cpu, False)

    def stays(self, cpu: int) -> None:
        """It was not taken down: the ONLINE section's startups again."""
        for step in self._up(lambda state: state > _S.CPUHP_TEARDOWN_CPU):
            self._quietly(step, step.startup, cpu)

    def dying(self, cpu: int) -> tuple[Any, tuple[Any, ...]]:
        """Return what it runs when it leaves: (None, ()) is only that."""
        steps = [(s.name, s.teardown) for s in self._up(_starts)[::-1] if s.teardown]
        return (_take_cpu_down, (steps, cpu)) if steps else (None, ())

    def gone(self, cpu: int) -> None:
        """It is offline, or dead: the PREPARE section's teardowns."""
        for step in self._up(_prepares)[::-1]:
            self._quietly(step, step.teardown, cpu)
        self._set(cpu, _S.CPUHP_OFFLINE)

    def dead_ones(self) -> None:
        """Do so for those that were killed since."""
        memory = self._memory(False)
        if memory is None:
            return
        for cpu in np.flatnonzero(self._reached(memory) != _S.CPUHP_OFFLINE):
            if self._machine.slot(int(cpu)).state == _core.CPU_DEAD:
                self.gone(int(cpu))

    # ---- the kernel's functions -----------------------------------------------------

    def setup(
        self,
        state: int,
        name: str,
        startup: Callback | None,
        teardown: Callback | None,
        invoke: bool,
    ) -> int:
        """``__cpuhp_setup_state``: see ``cpuhp_setup_state``."""
        state = _checked(state, name)
        for function in (startup, teardown):
            _check_callback(state, function)
        blob = byvalue.dumps((name, startup, teardown))
        if len(blob) > _BLOB:
            raise HotplugError(
                f"callbacks of {name!r} take {len(blob)} bytes, and there is room for"
                f" {_BLOB}: give functions of a module",
                errno=errno.E2BIG,
            )
        with self._locked():
            self.dead_ones()
            memory = self._memory(True)
            assert memory is not None
            entries = _entries(memory)
            used = set(entries["state"].tolist())
            dynamic = _DYNAMIC.get(state)
            if dynamic is not None:
                state = next((s for s in range(state, dynamic + 1) if s not in used), 0)
            if not state or 0 not in used:
                raise HotplugError(
                    "No more dynamic states available for CPU hotplug",
                    errno=errno.ENOSPC,
                )
            if state in used or state in _TAKEN or state in self._of_users():
                raise HotplugError(
                    f"state {state} has a callback already", errno=errno.EBUSY
                )
            step = _Step(state, name, startup, teardown)
            if invoke:
                self._invoke_all(step)
            entry = entries[int(np.flatnonzero(entries["state"] == 0)[0])]
            entry["blob"][: len(blob)] = np.frombuffer(blob, "u1")
            entry["length"] = len(blob)
            entry["state"] = state  # last: who looks sees all of it, or none
            self._tell_starting()
            if _prepares(state) and teardown is not None:
                self._watch()
        return state if dynamic is not None else 0

    def remove(self, state: int, invoke: bool) -> None:
        """``__cpuhp_remove_state``: see ``cpuhp_remove_state``."""
        state = _checked(state, "")
        with self._locked():
            self.dead_ones()
            memory = self._memory(False)
            entries = None if memory is None else _entries(memory)
            at = np.flatnonzero(() if entries is None else entries["state"] == state)
            if entries is None or not len(at):
                raise HotplugError(f"state {state} has no callback", errno=errno.EINVAL)
            (step,) = _load(entries[at[:1]])
            if invoke:
                for cpu in self._come(step):
                    self._quietly(step, step.teardown, cpu)
            entries[at[0]]["state"] = 0
            self._tell_starting()

    def _come(self, step: _Step) -> list[int]:
        """Return the CPUs that have reached its state."""
        return [cpu for cpu in range(self._machine.ncpus) if self._online(cpu)]

    def _invoke_all(self, step: _Step) -> None:
        done: list[int] = []
        for cpu in self._come(step):
            try:
                self._invoke(step, step.startup, cpu)
            except (CpuDiedError, CpuOfflineError):
                continue
            except BaseException:
                for other in done:
                    self._quietly(step, step.teardown, other)
                raise
            done.append(cpu)

    def _tell_starting(self) -> None:
        """CPUs look for STARTING callbacks, in Python, only where there are some."""
        some = any(_starts(s.state) and s.startup for s in self._steps())
        self._machine.set_starting(some)

    @contextlib.contextmanager
    def _locked(self) -> Any:
        hold = self._hold()
        if hold is None:
            raise ClusterStateError("this cluster is closed")
        with hold(None):
            yield

    # ---- the dead -------------------------------------------------------------------

    def _watch(self) -> None:
        if self._watcher is None:
            self._watcher = threading.Thread(
                target=_watch,
                args=(weakref.ref(self), self._machine),
                name="shmipi-cpuhp",
                daemon=True,
            )
            start_thread(self._watcher)

    def close(self) -> None:
        """End the thread that looks for the dead."""
        self._closed = True
        watcher = self._watcher
        if watcher is not None and watcher is not threading.current_thread():
            while watcher.is_alive():
                with contextlib.suppress(ClusterStateError):
                    self._machine.ring_hotplug()
                watcher.join(0.05)


def _watch(ref: weakref.ref[CpuHotplug], machine: _core.Machine) -> None:
    while True:
        states = ref()
        if states is None or states._closed:
            return
        seen = machine.hotplug_event
        with contextlib.suppress(ShmipiError):
            memory = states._memory(False)
            if memory is not None and any(
                machine.slot(int(cpu)).state == _core.CPU_DEAD
                for cpu in np.flatnonzero(states._reached(memory))
            ):
                with states._locked():
                    states.dead_ones()
        del states
        machine.wait_hotplug(seen, _LOOK_S)


# ---- checks --------------------------------------------------------------------------


def _checked(state: int, name: str) -> int:
    """cpuhp_cb_check()."""
    state = int(state)
    if not _S.CPUHP_OFFLINE < state < _S.CPUHP_ONLINE:
        raise HotplugError(
            f"state {state}: states with callbacks lie between CPUHP_OFFLINE (0) and"
            f" CPUHP_ONLINE ({int(_S.CPUHP_ONLINE)})",
            errno=errno.EINVAL,
        )
    if not isinstance(name, str):
        raise TypeError(f"name is {name!r}: a string")
    return state


def _check_callback(state: int, function: object) -> None:
    native = isinstance(function, _core.NativeHandler)
    if function is not None and not native and not callable(function):
        raise TypeError(f"{function!r} is no callback")
    if native and _prepares(state):
        raise HotplugError(
            "callbacks of the PREPARE section run on a host: native handlers do not",
            errno=errno.EINVAL,
        )


# ---- names of the kernel -------------------------------------------------------------

_machines: weakref.WeakValueDictionary[int, CpuHotplug] = weakref.WeakValueDictionary()


def register(machine: _core.Machine, states: CpuHotplug) -> None:
    """Let the functions below find the states of an open machine."""
    _machines[id(machine)] = states


def _here(machine: _core.Machine | None) -> CpuHotplug:
    here = _core.current_machine() if machine is None else machine
    states = _machines.get(id(here))
    if states is None:
        raise ClusterStateError("CPU hotplug states are set up and removed by hosts")
    return states


def cpuhp_setup_state(
    state: int,
    name: str,
    startup: Callback | None,
    teardown: Callback | None,
    *,
    machine: _core.Machine | None = None,
) -> int:
    """Have ``startup(cpu)`` and ``teardown(cpu)`` called as CPUs pass ``state``.

    ``startup`` is called now for every CPU that has reached it; if it fails for one,
    those that it was called for are torn down, and ``HotplugError`` says which it was.
    Returns 0, or of ``CPUHP_AP_ONLINE_DYN`` and ``CPUHP_BP_PREPARE_DYN`` the number
    that it was given. Raises ``HotplugError`` with EBUSY for a state that has a
    callback, ENOSPC when all dynamic ones have, EINVAL for what is no state.
    """
    return _here(machine).setup(state, name, startup, teardown, True)


def cpuhp_setup_state_nocalls(
    state: int,
    name: str,
    startup: Callback | None,
    teardown: Callback | None,
    *,
    machine: _core.Machine | None = None,
) -> int:
    """Do as ``cpuhp_setup_state``, and call nothing now."""
    return _here(machine).setup(state, name, startup, teardown, False)


def cpuhp_states(*, machine: _core.Machine | None = None) -> dict[int, str]:
    """Return the states that have something to do, with their names, ascending.

    The machine's own, those of its users ("net/dev:dead": a CPU that is gone gives its
    backlog to others), and those that were set up.
    """
    return _here(machine).states()


def cpuhp_remove_state(state: int, *, machine: _core.Machine | None = None) -> None:
    """Have nothing called for ``state`` any more, after its teardown for every CPU."""
    _here(machine).remove(state, True)


def cpuhp_remove_state_nocalls(
    state: int, *, machine: _core.Machine | None = None
) -> None:
    """Have nothing called for ``state`` any more."""
    _here(machine).remove(state, False)
