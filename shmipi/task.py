"""Tasks: what ``Cluster.start`` hands back, and ``Cluster.run`` waits for."""

from __future__ import annotations

import contextlib
import math
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Generic, Protocol, TypeVar, overload

from shmipi import _core
from shmipi.cpumask import CpuMask
from shmipi.errors import (
    ClusterStateError,
    CpuDiedError,
    CpusFailedError,
    IpiTimeoutError,
    ShmipiError,
    TaskCancelledError,
)
from shmipi.smp.csdlock import Stall

__all__ = ["Task", "Tasks", "check_timeout"]

_Result = TypeVar("_Result")
_Result_co = TypeVar("_Result_co", covariant=True)

#: A wait looks this often for what no doorbell tells: a task that was withdrawn.
_LOOK_S = 0.05
#: How long a cancelled task has before its CPU is killed, and `run` waits for one.
_GRACE_S = 1.0
_DEATH_S = 5.0

# What machine.cancel says.
_ENDED, _WITHDRAWN, _ASKED = range(3)


class _Cluster(Protocol):
    """What tasks want of the cluster that started them."""

    _machine: _core.Machine

    def _generation(self, cpu: int) -> int: ...
    def _kill(self, cpu: int, generation: int) -> bool: ...
    def _revive(self, cpu: int) -> None: ...


class Task(Generic[_Result_co]):
    """A function that runs on one CPU as a task; made by ``Cluster.start``.

    The methods mean what they do of ``concurrent.futures.Future``, but a task can be
    cancelled while it runs. A task goes on when nobody holds its handle any more, and
    ends with the host that started it; all methods may be called by several threads.
    """

    __slots__ = (
        "__weakref__",
        "_call",
        "_cluster",
        "_error",
        "_killed",
        "_mutex",
        "_name",
        "_state",
        "_turn",
        "_value",
        "cpu",
    )

    def __init__(self, cluster: _Cluster, cpu: int, call: int, name: str) -> None:
        #: The number of the CPU that it was started on.
        self.cpu = cpu
        self._cluster = cluster
        self._call = call
        self._name = name
        self._state = "posted"  # then "taken", while its result is, then "ended"
        self._value: Any = None
        self._error: BaseException | None = None
        self._killed = False
        self._turn = threading.Lock()  # whose thread waits in the core
        self._mutex = threading.Lock()  # of _state
        if call < 0:  # its CPU went offline just before
            self._state = "ended"
            try:
                cluster._machine.refuse(cpu)
            except ShmipiError as error:
                self._error = error

    def __repr__(self) -> str:
        return f"<Task {self._name} on CPU {self.cpu}: {self._word()}>"

    def _word(self) -> str:
        if self._state != "ended":
            return "done" if self.done() else "running" if self.running() else "pending"
        if isinstance(self._error, TaskCancelledError):
            return "cancelled"
        return "done" if self._error is None else f"raised {type(self._error).__name__}"

    def __del__(self) -> None:
        # Also of one whose __init__ was interrupted, and at the interpreter's end.
        if getattr(self, "_state", "ended") == "posted" and self._call >= 0:
            with contextlib.suppress(Exception):
                self._cluster._machine.abandon(self._call)

    # ---- how it goes -----------------------------------------------------------------

    def done(self) -> bool:
        """Return True when it has ended: returned, raised, was cancelled, or died."""
        if self._state != "posted":
            return True
        machine = self._cluster._machine
        if machine.closed:
            return True
        try:
            return machine.done(self._call)
        except ValueError:  # taken by another thread just now
            return True

    def running(self) -> bool:
        """Return True while its CPU runs it: not while it is queued, and not after."""
        if self.done():
            return False
        with contextlib.suppress(ValueError):
            return self._cluster._machine.begun(self._call) and not self.done()
        return False

    def cancelled(self) -> bool:
        """Return True when it has ended by being cancelled."""
        return self._settle(0) and isinstance(self._error, TaskCancelledError)

    def result(self, timeout: float | None = None) -> _Result_co:
        """Wait for its end, ``timeout`` seconds at most: what the function returned.

        Raises what ``Cluster.call`` raises, ``TaskCancelledError`` when it was
        cancelled, ``IpiTimeoutError`` when it has not ended: it goes on.
        """
        check_timeout(timeout)
        if not self._settle(timeout):
            raise IpiTimeoutError(
                f"the task on CPU {self.cpu} has not ended in {timeout:g} s: it goes"
                " on; its cancel() ends it",
                cpu=self.cpu,
            )
        if self._error is not None:
            raise self._error
        result: _Result_co = self._value
        return result

    def exception(self, timeout: float | None = None) -> BaseException | None:
        """Wait as ``result`` does: what it would raise, or None.

        Raises ``TaskCancelledError`` and ``IpiTimeoutError`` as ``result`` does.
        """
        try:
            self.result(timeout)
        except (TaskCancelledError, IpiTimeoutError):
            if self._state != "ended" or isinstance(self._error, TaskCancelledError):
                raise
        except BaseException:
            if self._state != "ended":
                raise
        return self._error

    # ---- ending it -------------------------------------------------------------------

    def cancel(self, *, kill: bool = False, grace: float = _GRACE_S) -> bool:
        """Ask it to end; return False when it has ended already.

        One that has not begun never will, and has ended at once. In one that runs,
        ``TaskInterrupt`` is raised at its next bytecode boundary, also out of a sleep
        or a blocking system call: a call that does not return to Python for long ends
        first. In an ``async def`` function the coroutine is cancelled, as asyncio does
        at Ctrl-C, and a second ``cancel()`` raises. With interrupts disabled it is
        raised when they are enabled; on a machine with ``kick=False``, when it waits or
        calls ``smp.cond_resched()``; on a CPU that is offline or stopped, when that
        goes on. No wait: ``result()`` tells how it ended.

        ``kill=True`` waits ``grace`` seconds for its end and then has the CPU's process
        killed and booted anew (an offline CPU stays dead), which ends everything else
        that CPU was asked for with ``CpuDiedError``; the task has ended on return.
        """
        check_timeout(grace)
        return bool(_cancel([self], kill, grace))

    def _ask(self) -> int:
        """Ask once: what became of it."""
        if self._state != "posted":
            return _ENDED
        try:
            how = self._cluster._machine.cancel(self._call, self.cpu)
        except ValueError:  # taken by another thread just now
            return _ENDED
        if how == _WITHDRAWN:
            with self._mutex:
                if self._state == "posted":
                    self._error = TaskCancelledError(
                        f"the task on CPU {self.cpu} was cancelled before it began",
                        cpu=self.cpu,
                    )
                    self._state = "ended"
                    self._abandon()
        return how

    def _abandon(self) -> None:
        """Nobody takes its end any more. A closed machine has taken all."""
        with contextlib.suppress(ClusterStateError):
            self._cluster._machine.abandon(self._call)

    # ---- taking its end --------------------------------------------------------------

    def _settle(self, timeout: float | None) -> bool:
        """Wait for the end and take it: True when it is known."""
        if self._state == "ended":
            return True
        limit = math.inf if timeout is None else time.monotonic() + timeout
        left = threading.TIMEOUT_MAX if timeout is None else timeout
        if not self._turn.acquire(timeout=min(left, threading.TIMEOUT_MAX)):
            return self._state == "ended"
        stall = Stall(self._cluster._machine, self._call, self.cpu, task=True)
        try:
            while self._state == "posted":
                left = max(0.0, limit - time.monotonic())
                if self._await(min(left, _LOOK_S)):
                    self._take()
                    stall.over()
                elif left <= 0.0:
                    break
                elif self._state == "posted":
                    stall.look()
        finally:
            stall.over(False)
            self._turn.release()
        return self._state == "ended"

    def _await(self, seconds: float) -> bool:
        machine = self._cluster._machine
        try:
            return machine.await_call(self._call, self.cpu, seconds)
        except ClusterStateError:
            raise
        except ValueError:
            if self._state == "ended":  # withdrawn
                return False
            raise
        except ShmipiError as error:  # the machine died, or its memory is damaged
            with self._mutex:
                if self._state == "posted":
                    self._abandon()
                    self._end(error)
            return False

    def _take(self) -> None:
        with self._mutex:
            if self._state != "posted":
                return
            self._state = "taken"
        try:
            self._value = self._cluster._machine.collect(self._call, self.cpu, None)
        except CpuDiedError as error:
            self._end(self._as_killed() if self._killed else error)
        except Exception as error:
            self._end(error)
        except BaseException:
            self._end(
                ClusterStateError(
                    f"the result of the task on CPU {self.cpu} is lost: taking it was"
                    " interrupted"
                )
            )
            raise
        else:
            self._end(None)

    def _end(self, error: BaseException | None) -> None:
        self._error = error
        self._state = "ended"

    def _as_killed(self) -> TaskCancelledError:
        return TaskCancelledError(
            f"the task on CPU {self.cpu} was cancelled, and its CPU killed for it",
            cpu=self.cpu,
        )


class Tasks(Sequence[Task[_Result_co]]):
    """One function's tasks on several CPUs, in CPU order; made by ``Cluster.start``."""

    def __init__(self, cluster: _Cluster, func: Callable[..., Any]) -> None:
        self._cluster = cluster
        self._name = getattr(func, "__qualname__", None) or type(func).__qualname__
        self._cpus: list[int] = []
        self._calls: list[int] = []
        self._tasks: list[Task[_Result_co]] = []

    def _start(
        self,
        cpus: CpuMask,
        func: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> None:
        # Into lists that are there before: a KeyboardInterrupt anywhere in here leaves
        # no task that nobody knows of.
        self._cpus = list(cpus)
        self._cluster._machine.start_tasks(
            self._cpus, func, args, kwargs or None, self._calls
        )
        self._made()

    def _made(self) -> list[Task[_Result_co]]:
        while (done := len(self._tasks)) < len(self._calls):
            self._tasks.append(
                Task(self._cluster, self._cpus[done], self._calls[done], self._name)
            )
        return self._tasks

    @overload
    def __getitem__(self, index: int, /) -> Task[_Result_co]: ...
    @overload
    def __getitem__(self, index: slice, /) -> list[Task[_Result_co]]: ...
    def __getitem__(
        self, index: int | slice, /
    ) -> Task[_Result_co] | list[Task[_Result_co]]:
        return self._tasks[index]

    def __len__(self) -> int:
        return len(self._tasks)

    def __repr__(self) -> str:
        words: dict[str, list[int]] = {}
        for task in self._tasks:
            words.setdefault(task._word(), []).append(task.cpu)
        state = ", ".join(f"{word} on {_cpus(cpus)}" for word, cpus in words.items())
        return f"<Tasks {self._name}: {state or 'none'}>"

    def done(self) -> bool:
        """Return True when all have ended."""
        return all(task.done() for task in self._tasks)

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until all have ended, ``timeout`` seconds at most: have they?"""
        check_timeout(timeout)
        return _settle(self._tasks, timeout)

    def results(self, timeout: float | None = None) -> list[_Result_co]:
        """Wait for all: what they returned, in CPU order.

        Raises what one task failed with, or a ``CpusFailedError`` of several, after all
        have ended; its ``results`` has what the others returned, by CPU.
        ``IpiTimeoutError`` when some have not ended in ``timeout`` seconds, with the
        ``results`` of the others, and what others raised as its cause: those that have
        not ended go on, until ``cancel()``.
        """
        if not self.wait(timeout):
            late = _late(self._tasks, f"in {timeout:g} s: it goes on, until cancel()")
            if late is not None:
                raise late
        results, failures = _outcomes(self._tasks)
        if failures:
            raise _failure(failures, results)
        return list(results.values())

    def cancel(self, *, kill: bool = False, grace: float = _GRACE_S) -> bool:
        """``Task.cancel`` of each: return False when all had ended already.

        All are asked before one is waited for; ``grace`` is for all together.
        """
        check_timeout(grace)
        return bool(_cancel(self._tasks, kill, grace))

    # ---- for Cluster.run -------------------------------------------------------------

    def _run(self, timeout: float | None) -> list[_Result_co]:
        late = None
        if not self.wait(timeout):
            # First: one that has not begun has ended as soon as it is cancelled.
            late = _late(self._tasks, f"in {timeout:g} s and was cancelled")
        if late is None:
            return self.results()
        _cancel(self._tasks, False, 0.0)
        if not _settle(self._tasks, _GRACE_S):
            late.add_note(_still(self._tasks))
        raise late

    def _give_up(self, error: BaseException) -> None:
        """What waited was interrupted: so are the tasks, and have a while to end."""
        tasks = self._made()
        _cancel(tasks, False, 0.0)
        if not _settle(tasks, _GRACE_S):
            error.add_note(_still(tasks))


def check_timeout(timeout: float | None) -> None:
    """Raise ``ValueError`` or ``TypeError`` for what is no time to wait."""
    if timeout is not None and not timeout >= 0:
        raise ValueError(f"timeout is {timeout!r}: give seconds >= 0, or None")


def _cancel(tasks: Sequence[Task[Any]], kill: bool, grace: float) -> int:
    """Cancel them: how many had not ended."""
    asked = [(task, task._ask()) for task in tasks]
    left = [task for task, how in asked if how == _ASKED]
    if kill and not _settle(left, grace):
        _kill([task for task in left if not task.done()])
    return sum(how != _ENDED for _, how in asked)


def _kill(tasks: Sequence[Task[Any]]) -> None:
    """Kill the CPUs that run these tasks, and boot anew those that were online."""
    revive: list[Task[Any]] = []
    for task in tasks:
        cluster = task._cluster
        # First, and only then the look at the task: while it has not ended, its CPU
        # is that of this generation.
        generation = cluster._generation(task.cpu)
        if task.done():
            continue
        task._killed = True
        if cluster._kill(task.cpu, generation):
            revive.append(task)
    _settle(tasks, _DEATH_S)
    for task in revive:
        task._cluster._revive(task.cpu)


def _settle(tasks: Iterable[Task[Any]], timeout: float | None) -> bool:
    """Wait for all, ``timeout`` seconds together: have all ended?"""
    limit = math.inf if timeout is None else time.monotonic() + timeout
    ended = True
    for task in tasks:
        left = None if timeout is None else max(0.0, limit - time.monotonic())
        ended = task._settle(left) and ended
    return ended


def _outcomes(
    tasks: Iterable[Task[_Result]],
) -> tuple[dict[int, _Result], list[BaseException]]:
    """What those that have ended returned, by CPU, and what they raised."""
    results: dict[int, _Result] = {}
    failures: list[BaseException] = []
    for task in tasks:
        if task._state != "ended":
            continue
        if task._error is None:
            results[task.cpu] = task._value
        else:
            failures.append(task._error)
    return results, failures


def _failure(failures: list[Any], results: dict[int, Any]) -> Any:
    """Make what ``run`` raises of what its tasks did."""
    error: Any = failures[0]
    if len(failures) > 1:
        error = CpusFailedError("several CPUs failed", failures)
    elif getattr(error, "results", None) is not None:
        return error  # told before
    error.results = results
    if results:
        error.add_note(
            f"shmipi: it ended well on {_cpus(results)}: what it returned there is in"
            " `results` of this error"
        )
    return error


def _late(tasks: Sequence[Task[Any]], what: str) -> IpiTimeoutError | None:
    """Make the error of those that have not ended; its cause is what others raised.

    None: all have, the last of them taken by another thread just now.
    """
    late = [task.cpu for task in tasks if task._state != "ended"]
    if not late:
        return None
    error = IpiTimeoutError(
        f"the task on {_cpus(late)} has not ended {what}", cpu=late[0]
    )
    error.results, failures = _outcomes(tasks)
    if failures:
        error.__cause__ = _failure(failures, error.results)
    return error


def _still(tasks: Sequence[Task[Any]]) -> str:
    late = [task.cpu for task in tasks if task._state != "ended"]
    return (
        f"shmipi: cancelled, and not ended yet on {_cpus(late)}: it is in C code, has"
        " interrupts disabled or catches TaskInterrupt. Tasks that are started there"
        " wait for it; with cluster.start() there is cancel(kill=True)"
    )


def _cpus(cpus: Iterable[int]) -> str:
    mask = CpuMask(cpus)
    return f"CPU{'' if len(mask) == 1 else 's'} {mask}"
