"""Tasks that wait for each other: the kernel's wait queues and completions.

Both lie in the machine's shared memory, by name, and are the same on every CPU and in
the host: made by ``cluster.wait_queue(name)`` and ``cluster.completion(name)``, found
by ``smp.wait_queue(name)`` and ``smp.completion(name)``, or sent in a closure or an
argument. Who waits sleeps: a CPU halts, taking interrupts meanwhile, and is rung by who
wakes it; nothing polls.

A wake-up is given to who waits; nobody who waits is missed because another was killed,
stopped or taken offline with a wake-up in hand, or before giving it: those who wait
look again when a CPU has died, and by their own clock: after 10 ms at first (100 where
a wake-up is for one of many), then after an eighth of what they have waited, a second
at most.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, Final, Self

from shmipi import _core
from shmipi.machine import arrays
from shmipi.machine.arrays import Arrays, SharedArray

__all__ = ["Completion", "WaitQueue", "completion", "wait_queue"]

_LOOK_S = 0.01
_LOOK_EXCLUSIVE_S = 0.1  # later: it would come before who was chosen
_LOOK_MAX_S = 1.0
_LOOK_SHARE: Final = 1 / 8
_LEFT_MIN_S: Final = 1e-9  # what is left when the wait succeeded in the last moment
_WAKE_ALL: Final = 0xFFFFFFFF


class _Queue:
    """A place in shared memory where tasks and the host can wait."""

    _kind: str

    def __init__(self, memory: SharedArray) -> None:
        home = arrays.home_of(memory)
        self._memory = memory
        self._machine: _core.Machine = home.machine
        self._at = home.machine.offset_of(memory.__array_interface__["data"][0])
        self.name = memory._key[1] if memory._key is not None else "?"

    @classmethod
    def make(cls, home: Arrays, name: str) -> Self:
        """Return the one called ``name``, made if it is new: what ``Cluster`` calls."""
        return cls(home.make(cls._kind, name, "u8", home.machine.waitq_words()))

    @classmethod
    def _find(cls, name: str) -> Self:
        return cls(arrays.find(cls._kind, name))

    def __reduce__(self) -> Any:
        return type(self), (self._memory,)

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, type(self))
            and self._machine is other._machine
            and self._at == other._at
        )

    def __hash__(self) -> int:
        return hash((self._machine.name, self._at))

    def _wait(
        self, ready: Callable[[], object], exclusive: bool, timeout: float | None
    ) -> float:
        """Wait until ``ready()``: what is left of the timeout, more than 0; else 0."""
        machine, at = self._machine, self._at
        if timeout is not None and not timeout >= 0:
            raise ValueError(f"timeout is {timeout!r}: give seconds >= 0, or None")
        machine.might_sleep()
        if ready():
            return _left(timeout)
        began = time.monotonic()
        end = None if timeout is None else began + timeout
        first = _LOOK_EXCLUSIVE_S if exclusive else _LOOK_S
        ticket = 0
        try:
            while True:
                # 0 until it is known: an exception of a signal may come in between.
                before, ticket = ticket, 0
                ticket = machine.waitq_prepare(at, before, exclusive)
                if ready():
                    return _left(None if end is None else end - time.monotonic())
                now = time.monotonic()
                if end is not None and now >= end:
                    return 0.0
                look = min(max(first, (now - began) * _LOOK_SHARE), _LOOK_MAX_S)
                machine.waitq_sleep(
                    at, ticket, look if end is None else min(look, end - now)
                )
        finally:
            # One call of C, and nothing before it, where a signal's handler could run.
            machine.waitq_finish(at, ticket, exclusive)


def _left(seconds: float | None) -> float:
    return _LEFT_MIN_S if seconds is None else max(float(seconds), _LEFT_MIN_S)


class WaitQueue(_Queue):
    """Waiting until a condition is true (``include/linux/wait.h``).

    Who changes what the condition looks at calls ``wake_up()`` afterwards, also from a
    handler. Waits are for tasks and the host; elsewhere they raise
    ``ClusterStateError``, as in tasks with interrupts or preemption disabled. Ctrl-C
    and other exceptions end them; ``MachineDiedError`` when the machine ends.
    """

    _kind = "wait_queue"

    def __repr__(self) -> str:
        active = "" if self._machine.closed else f" active={self.waitqueue_active()}"
        return f"<WaitQueue {self.name!r}{active}>"

    def wait_event(self, condition: Callable[[], object]) -> None:
        """Sleep until ``condition()`` is true; it is called again at every wake-up.

        Every ``wake_up()`` wakes all who wait so.
        """
        self._wait(condition, False, None)

    def wait_event_timeout(
        self, condition: Callable[[], object], timeout: float
    ) -> float:
        """As ``wait_event``, for ``timeout`` seconds at most.

        Returns what is left of them, more than 0, or 0.0 if the condition is false yet.
        """
        return self._wait(condition, False, timeout)

    def wait_event_interruptible_exclusive(
        self, condition: Callable[[], object]
    ) -> None:
        """As ``wait_event``, for one of many: a ``wake_up()`` wakes only one of these.

        Who has waited longest is woken first.
        """
        self._wait(condition, True, None)

    def wake_up(self) -> int:
        """Wake everybody but exclusive waiters, and one of those; return how many."""
        return self._machine.waitq_wake(self._at, 1)

    def wake_up_nr(self, nr: int) -> int:
        """Wake everybody but exclusive waiters, and ``nr`` of those."""
        if nr < 0:
            raise ValueError(f"nr is {nr}: give a number of waiters")
        return self._machine.waitq_wake(self._at, min(nr, _WAKE_ALL - 1))

    def wake_up_all(self) -> int:
        """Wake everybody who waits; return how many."""
        return self._machine.waitq_wake(self._at, _WAKE_ALL)

    def waitqueue_active(self) -> bool:
        """Return whether anybody waits."""
        return self._machine.waitq_active(self._at)


class Completion(_Queue):
    """Waiting until something is done (``include/linux/completion.h``).

    ``complete()`` counts, each wait takes one: it may come first, and none is lost.
    Who waits, and where, is as with ``WaitQueue``.
    """

    _kind = "completion"

    def __repr__(self) -> str:
        if self._machine.closed:
            return f"<Completion {self.name!r}>"
        done = self._machine.completion_count(self._at)
        return f"<Completion {self.name!r} done={'all' if done >= _WAKE_ALL else done}>"

    def complete(self) -> None:
        """Let one waiter go on, who has waited longest, or the next to come.

        Never sleeps: for handlers too. What was stored before is seen by the waiter.
        """
        self._machine.complete(self._at, False)

    def complete_all(self) -> None:
        """Let everybody go on, and all who come, until ``reinit_completion()``."""
        self._machine.complete(self._at, True)

    def wait_for_completion(self) -> None:
        """Sleep until it is done."""
        self._wait(self.try_wait_for_completion, True, None)

    def wait_for_completion_timeout(self, timeout: float) -> float:
        """As ``wait_for_completion``, for ``timeout`` seconds at most.

        Returns what is left of them, more than 0, or 0.0 if it is not done.
        """
        return self._wait(self.try_wait_for_completion, True, timeout)

    def try_wait_for_completion(self) -> bool:
        """Return True, with one taken, where a wait would not have slept."""
        return self._machine.completion_take(self._at)

    def completion_done(self) -> bool:
        """Return False if a wait would sleep."""
        return self._machine.completion_count(self._at) != 0

    def reinit_completion(self) -> None:
        """Make it not done: before it is used again, and nobody waits."""
        self._machine.completion_reinit(self._at)


def completion(name: str) -> Completion:
    """Return the machine's completion made by ``cluster.completion(name)``.

    ``KeyError`` when there is none, ``NoMachineError`` outside a machine.
    """
    return Completion._find(name)


def wait_queue(name: str) -> WaitQueue:
    """Return the machine's wait queue made by ``cluster.wait_queue(name)``.

    ``KeyError`` when there is none, ``NoMachineError`` outside a machine.
    """
    return WaitQueue._find(name)
