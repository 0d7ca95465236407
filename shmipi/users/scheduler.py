"""The scheduler: tasks that sleep, are woken, move; ``kernel/sched/core.c``.

Each CPU has a run queue of tasks. A task is a generator function, whose every ``yield``
is the kernel's ``schedule()``, or an iterator that pickles::

    def worker(n):
        for _ in range(n):
            scheduler.set_current_state(scheduler.TASK_INTERRUPTIBLE)
            if ready():
                scheduler.set_current_state(scheduler.TASK_RUNNING)
            else:
                yield  # sleeps, unless it was woken since the state was set
            ...
        return n

    task = scheduler.spawn(worker, 5)
    scheduler.wake_up_process(task)

A task is woken from any CPU, the host, a handler or another task: by the wake list of
its CPU (a call_single_data of type TTWU) or on its run queue and, where that is called
for, by a reschedule IPI. What runs is preempted at its next bytecode, when it may be
(no ``preempt_disable()``, interrupts on), else at its next ``yield``.

A generator that has begun stays on its CPU, as after ``migrate_disable()``, because no
pickle can take it elsewhere: when that CPU dies it has died, too. An iterator is
pickled after each step and moves freely: it dies only with a CPU on which its step
runs. A task that is preempted by others lies below them on its CPU's stack, and goes on
when they yield: so what holds a lock that they want too disables preemption, as in
the kernel.

On a CPU these functions act on its machine; the host has ``cluster.users.scheduler``.
"""

from __future__ import annotations

import contextlib
import inspect
import math
import time
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, NamedTuple

from shmipi import _core
from shmipi._core import kthread_should_stop, set_current_state, wake_up_process
from shmipi.cpumask import CpuMask, MaskLike
from shmipi.errors import (
    CpuDiedError,
    IpiTimeoutError,
    NoTaskError,
)
from shmipi.machine import remote

__all__ = [
    "TASK_DEAD",
    "TASK_INTERRUPTIBLE",
    "TASK_NEW",
    "TASK_NORMAL",
    "TASK_RUNNING",
    "TASK_UNINTERRUPTIBLE",
    "TASK_WAKING",
    "RunQueue",
    "SchedTask",
    "Scheduler",
    "TaskInfo",
    "clear_tsk_need_resched",
    "current",
    "idle_cpu",
    "kick_process",
    "kthread_create",
    "kthread_run",
    "kthread_should_stop",
    "kthread_stop",
    "ps",
    "rq",
    "sched_getaffinity",
    "sched_setaffinity",
    "schedule_timeout",
    "set_current_state",
    "set_tsk_need_resched",
    "sleep",
    "spawn",
    "test_tsk_need_resched",
    "try_to_wake_up",
    "tsk_is_polling",
    "wake_up_process",
]

TASK_NEW: Final = 2
TASK_RUNNING: Final = 3
TASK_INTERRUPTIBLE: Final = 4
TASK_UNINTERRUPTIBLE: Final = 5
TASK_WAKING: Final = 6
TASK_DEAD: Final = 7
#: For ``try_to_wake_up``: states, a bit each.
TASK_NORMAL: Final = 1 << TASK_INTERRUPTIBLE | 1 << TASK_UNINTERRUPTIBLE
_ASLEEP: Final = TASK_NORMAL | 1 << TASK_NEW
_STATES: Final = (
    "",
    "claimed",
    "new",
    "running",
    "sleeping",
    "sleeping",
    "waking",
    "dead",
)

# Of a task's word, and of its entry.
_ON_CPU, _PINNED, _DIED, _STOP, _RAISED = 0x20, 0x40, 0x80, 0x100, 0x200
_PF_BOUND, _PF_RT, _PF_REAP, _PF_MIGRATES = 2, 4, 8, 16

# What a step says.
_SLEEP, _EXIT = 1, 2

_LOOK_S = 0.0002
_LOOK_MOST_S = 0.01


class TaskInfo(NamedTuple):
    """What ``ps()`` knows of a task."""

    id: int
    name: str
    state: str
    cpu: int
    running: bool
    pinned: bool
    bound: bool
    runtime_ns: int
    wakeups: int
    switches: int
    migrations: int


class RunQueue(NamedTuple):
    """What a CPU's run queue says: of this moment, and counts since boot."""

    nr_queued: int
    curr: int
    active: int
    ttwu_pending: int
    wakelist: int
    batches: int
    switches: int
    pulled: int
    tick: int
    llc: int
    idle: bool
    polling: bool


@dataclass(frozen=True)
class _Call:
    func: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


# ---- on the CPUs ---------------------------------------------------------------------


@contextlib.contextmanager
def _unmixed(machine: _core.Machine) -> Iterator[None]:
    """While pickling: it takes locks, and who came on top would wait for them."""
    machine.sched_unmixed(1)
    try:
        yield
    finally:
        machine.sched_unmixed(-1)


def _begin(machine: _core.Machine, task: int) -> Any:
    """Begin a task, or run a step of one that moves: what the core calls.

    Returns what the core iterates over from now on, or what the step has to say.
    """
    try:
        with _unmixed(machine):
            made = remote.loads(machine.sched_load(task))
        if isinstance(made, _Call):
            machine.sched_pin(task)  # what it begins cannot leave this process
            value = made.func(*made.args, **made.kwargs)
            return value if hasattr(value, "__next__") else _end(machine, task, value)
        next(made)
        with _unmixed(machine):
            machine.sched_save(task, remote.dumps(made), False)
    except StopIteration as stop:
        return _end(machine, task, stop.value)
    except BaseException as error:
        return _fail(machine, task, error)
    return _SLEEP


def _end(machine: _core.Machine, task: int, value: Any) -> int:
    """It has returned: by the core, too."""
    try:
        with _unmixed(machine):
            machine.sched_save(task, remote.dumps(value), False)
    except Exception as error:
        return _fail(machine, task, error)
    return _EXIT


def _fail(machine: _core.Machine, task: int, error: BaseException) -> int:
    """It has raised: by the core, too."""
    with contextlib.suppress(NoTaskError):
        try:
            with _unmixed(machine):
                machine.sched_save(task, remote.dump_exception(error), True)
        except NoTaskError:
            raise
        except Exception as other:  # it does not fit, or cannot be pickled
            machine.sched_save(task, remote.dump_exception(other), True)
    return _EXIT


# ---- tasks ---------------------------------------------------------------------------


class SchedTask:
    """A task of the scheduler, wherever it is; made by ``spawn``. It pickles."""

    __slots__ = ("_machine", "_outcome", "id")

    def __init__(self, machine: _core.Machine, id: int) -> None:
        self._machine = machine
        #: Which use of which entry of the task table it is.
        self.id = id
        self._outcome: tuple[bool, Any] | None = None

    def __repr__(self) -> str:
        try:
            info = self.info()
        except NoTaskError:
            return f"<SchedTask {self.id:#x}: gone>"
        return f"<SchedTask {info.name!r} {self.id:#x} on CPU {info.cpu}: {info.state}>"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, SchedTask) and self.id == other.id

    def __hash__(self) -> int:
        return hash(self.id)

    def __reduce__(self) -> Any:
        return _task, (self.id,)

    def info(self) -> TaskInfo:
        """Return what is known of it. ``NoTaskError`` (ESRCH) when it is gone."""
        return _info(self._machine.sched_task(self.id))

    def done(self) -> bool:
        """Return True when it has ended: returned, raised, or died with its CPU."""
        if self._outcome is not None:
            return True
        return int(self._machine.sched_task(self.id)[1]) == TASK_DEAD

    def wake(self) -> bool:
        """``wake_up_process(self)``."""
        return self._machine.sched_wake(self.id, _ASLEEP)

    def result(self, timeout: float | None = None) -> Any:
        """Wait for its end: what it returned; its entry in the table is free then.

        What it raised is raised as ``RemoteCallError``; ``CpuDiedError`` when it died
        with its CPU; ``IpiTimeoutError`` when it has not ended; ``NoTaskError`` when
        another has asked before.
        """
        end = math.inf if timeout is None else time.monotonic() + timeout
        look = _LOOK_S
        while not self.done():
            left = end - time.monotonic()
            if left <= 0:
                raise IpiTimeoutError(
                    f"the task {self.id:#x} has not ended in {timeout:g} s: it goes on"
                )
            time.sleep(min(look, left))
            look = min(2 * look, _LOOK_MOST_S)
        return self._taken()

    def join(self) -> Generator[None, None, Any]:
        """``yield from task.join()`` in another task: sleep until it has ended."""
        while not self.done():
            sleep(_LOOK_S)
            yield
        return self._taken()

    def _taken(self) -> Any:
        if self._outcome is None:
            row = self._machine.sched_task(self.id)
            cpu = int(row[3])
            if row[2] & _DIED:
                self._outcome = (
                    True,
                    CpuDiedError(
                        f"CPU {cpu} died with the task {row[5]!r} of the scheduler",
                        cpu=cpu,
                    ),
                )
            elif row[2] & _RAISED:
                data = self._machine.sched_load(self.id)
                self._outcome = True, remote.load_exception(data, cpu)
            else:
                self._outcome = False, remote.loads(self._machine.sched_load(self.id))
            with contextlib.suppress(NoTaskError):
                self._machine.sched_release(self.id)
        raised, value = self._outcome
        if raised:
            raise value
        return value


def _task(id: int) -> SchedTask:
    return SchedTask(_core.current_machine(), id)


def _info(row: Any) -> TaskInfo:
    id, state, word, cpu, flags, comm, runtime, wakeups, switches, migrations, _ = row
    return TaskInfo(
        id,
        comm,
        _STATES[state],
        cpu,
        bool(word & _ON_CPU),
        bool(word & _PINNED),
        bool(flags & _PF_BOUND),
        runtime,
        wakeups,
        switches,
        migrations,
    )


def _id(task: SchedTask | int) -> int:
    return task.id if isinstance(task, SchedTask) else task


class Scheduler:
    """``shmipi.users.scheduler`` of one machine: ``cluster.users.scheduler``."""

    def __init__(self, machine: _core.Machine) -> None:
        self._machine = machine

    def __repr__(self) -> str:
        return f"<scheduler of Cluster {self._machine.name!r}>"

    # ---- making tasks ----

    def kthread_create(
        self,
        func: Callable[..., Any] | Iterator[Any],
        /,
        *args: Any,
        cpus: MaskLike | int | None = None,
        name: str | None = None,
        rt: bool = False,
        daemon: bool = False,
        **kwargs: Any,
    ) -> SchedTask:
        """Make a task that does not run before it is woken.

        ``func(*args, **kwargs)`` is called on its CPU; what it returns is the task's
        result, or an iterator of its steps. Or an iterator that pickles. ``cpus``: a
        CPU or a mask, None: all. ``rt``: before all that are not. ``daemon``: nobody
        asks for its result.

        Raises ``AffinityError`` (EINVAL) when none of ``cpus`` is online,
        ``ArenaFullError`` (E2BIG) for what does not fit 16 KiB pickled, (EAGAIN) when
        the table is full.
        """
        machine = self._machine
        if inspect.isgenerator(func):
            raise TypeError(
                "a generator cannot be sent to a CPU: give the function that makes it,"
                " and its arguments"
            )
        moves = not callable(func)
        if moves and not hasattr(func, "__next__"):
            raise TypeError(f"a task is a function or an iterator, not {func!r}")
        if moves and (args or kwargs):
            raise TypeError("an iterator takes no arguments")
        made = func if moves else _Call(func, args, kwargs)  # type: ignore[arg-type]
        comm = name or getattr(func, "__name__", None) or type(func).__name__
        flags = rt * _PF_RT | daemon * _PF_REAP | moves * _PF_MIGRATES
        allowed = None if cpus is None else self._words(cpus)
        comm = comm.encode("ascii", "replace").decode()[:15]
        id = machine.sched_create(comm, flags, allowed, remote.dumps(made))
        return SchedTask(machine, id)

    def kthread_run(self, func: Any, /, *args: Any, **kwargs: Any) -> SchedTask:
        """``kthread_create``, and ``wake_up_process``."""
        task = self.kthread_create(func, *args, **kwargs)
        task.wake()
        return task

    spawn = kthread_run

    def kthread_stop(self, task: SchedTask | int, timeout: float | None = None) -> Any:
        """Ask it to end (``kthread_should_stop()`` is true there), and wait for it."""
        handle = SchedTask(self._machine, _id(task)) if isinstance(task, int) else task
        with contextlib.suppress(NoTaskError):  # it has ended by itself
            self._machine.sched_stop(_id(task))
        return handle.result(timeout)

    # ---- waking them ----

    def wake_up_process(self, task: SchedTask | int) -> bool:
        """Wake it: True if it slept, or was about to, or was new.

        ``NoTaskError`` (ESRCH) for one that has ended, or never was. For tasks, the
        host and handlers, but not for NMIs.
        """
        return self._machine.sched_wake(_id(task), _ASLEEP)

    def try_to_wake_up(self, task: SchedTask | int, states: int) -> bool:
        """The same, of a task in one of ``states``: bits, ``TASK_NORMAL`` say."""
        return self._machine.sched_wake(_id(task), states)

    def kick_process(self, task: SchedTask | int) -> None:
        """Send its CPU a reschedule IPI, if it is another and a step runs there."""
        row = self._machine.sched_task(_id(task))
        here = self._machine.id if self._machine.is_cpu else -1
        if row[2] & _ON_CPU and row[3] != here:
            self._machine.smp_send_reschedule(row[3])

    # ---- where they may run ----

    def sched_setaffinity(self, task: SchedTask | int, cpus: MaskLike | int) -> None:
        """Let it run on ``cpus`` only: it leaves where it may not be at its next yield.

        ``AffinityError``: EINVAL, none of them is online; EBUSY, it is a generator that
        has begun elsewhere. ``NoTaskError`` (ESRCH).
        """
        self._machine.sched_allow(_id(task), self._words(cpus))

    def sched_getaffinity(self, task: SchedTask | int) -> CpuMask:
        """Return the CPUs that it may run on."""
        bits = int.from_bytes(self._machine.sched_allowed(_id(task)), "little")
        return CpuMask.from_bits(bits & ((1 << self._machine.ncpus) - 1))

    def _words(self, cpus: MaskLike | int) -> bytes:
        mask: MaskLike = [cpus] if isinstance(cpus, int) else cpus
        bits = CpuMask.of(mask, self._machine.ncpus).bits
        return bits.to_bytes(-(-self._machine.ncpus // 64) * 8, "little")

    # ---- looking at them ----

    def ps(self) -> list[TaskInfo]:
        """Return all tasks, kernel threads too, that have not been forgotten."""
        return [_info(row) for row in self._machine.sched_list()]

    def rq(self, cpu: int) -> RunQueue:
        """Return what the run queue of ``cpu`` says."""
        return RunQueue(*self._machine.sched_rq(cpu))

    def idle_cpu(self, cpu: int) -> bool:
        """Does nothing run there, is nothing queued, nor about to be?"""
        return self.rq(cpu).idle

    def tsk_is_polling(self, cpu: int) -> bool:
        """Does it look at its flags before all else (TIF_POLLING_NRFLAG)?"""
        return self.rq(cpu).polling

    def set_tsk_need_resched(self, cpu: int) -> None:
        """Set NEED_RESCHED of what runs on ``cpu``, and nothing else: no IPI."""
        self._machine.set_tsk_need_resched(cpu, True)

    def clear_tsk_need_resched(self, cpu: int) -> None:
        """Clear it, the lazy one too."""
        self._machine.set_tsk_need_resched(cpu, False)

    def test_tsk_need_resched(self, cpu: int) -> bool:
        """Is it set?"""
        return self._machine.tsk_need_resched(cpu)[0]


# ---- on a CPU ------------------------------------------------------------------------


def _here() -> Scheduler:
    return Scheduler(_core.current_machine())


def kthread_create(func: Any, /, *args: Any, **kwargs: Any) -> SchedTask:
    """``Scheduler.kthread_create``."""
    return _here().kthread_create(func, *args, **kwargs)


def kthread_run(func: Any, /, *args: Any, **kwargs: Any) -> SchedTask:
    """``Scheduler.kthread_run``."""
    return _here().kthread_run(func, *args, **kwargs)


spawn = kthread_run


def kthread_stop(task: SchedTask | int, timeout: float | None = None) -> Any:
    """``Scheduler.kthread_stop``."""
    return _here().kthread_stop(task, timeout)


def try_to_wake_up(task: SchedTask | int, states: int) -> bool:
    """``Scheduler.try_to_wake_up``."""
    return _core.current_machine().sched_wake(_id(task), states)


def kick_process(task: SchedTask | int) -> None:
    """``Scheduler.kick_process``."""
    _here().kick_process(task)


def sched_setaffinity(task: SchedTask | int, cpus: MaskLike | int) -> None:
    """``Scheduler.sched_setaffinity``."""
    _here().sched_setaffinity(task, cpus)


def sched_getaffinity(task: SchedTask | int) -> CpuMask:
    """``Scheduler.sched_getaffinity``."""
    return _here().sched_getaffinity(task)


def ps() -> list[TaskInfo]:
    """``Scheduler.ps``."""
    return _here().ps()


def rq(cpu: int) -> RunQueue:
    """``Scheduler.rq``."""
    return _here().rq(cpu)


def idle_cpu(cpu: int) -> bool:
    """``Scheduler.idle_cpu``."""
    return _here().idle_cpu(cpu)


def tsk_is_polling(cpu: int) -> bool:
    """``Scheduler.tsk_is_polling``."""
    return _here().tsk_is_polling(cpu)


def set_tsk_need_resched(cpu: int) -> None:
    """``Scheduler.set_tsk_need_resched``."""
    _here().set_tsk_need_resched(cpu)


def clear_tsk_need_resched(cpu: int) -> None:
    """``Scheduler.clear_tsk_need_resched``."""
    _here().clear_tsk_need_resched(cpu)


def test_tsk_need_resched(cpu: int) -> bool:
    """``Scheduler.test_tsk_need_resched``."""
    return _here().test_tsk_need_resched(cpu)


def current() -> SchedTask | None:
    """Return the task whose step runs here; None in handlers and outside of tasks."""
    machine = _core.current_machine()
    id = machine.sched_current()
    return SchedTask(machine, id) if id else None


def schedule_timeout(seconds: float) -> None:
    """Have the current task woken after ``seconds`` at the latest, if it sleeps then.

    After ``set_current_state()`` and before the ``yield``.
    """
    _core.current_machine().sched_timeout(seconds)


def sleep(seconds: float) -> None:
    """``yield scheduler.sleep(seconds)``: sleep so long, or until it is woken."""
    machine = _core.current_machine()
    machine.sched_set_state(TASK_INTERRUPTIBLE)
    machine.sched_timeout(seconds)


# ---- caches --------------------------------------------------------------------------

_SYS = Path("/sys/devices/system/cpu")


def learn_caches(machine: _core.Machine) -> None:
    """Tell the core which CPUs share a last-level cache (``sd_llc_id``)."""
    known: dict[int, int] = {}
    for cpu in range(machine.ncpus):
        core = machine.slot(cpu).core
        if core not in known:
            known[core] = _llc(core)
        machine.sched_llc(cpu, known[core])


def _llc(core: int) -> int:
    best, first = -1, 0
    for index in _SYS.glob(f"cpu{core}/cache/index*"):
        with contextlib.suppress(OSError, ValueError):
            level = int((index / "level").read_text())
            shared = CpuMask.of((index / "shared_cpu_list").read_text().strip())
            if level > best and shared.first is not None:
                best, first = level, shared.first
    return first
