"""Locks between the hosts of a machine, in its shared memory.

A holder that died loses its lock (``shi_lock_try``), so what it protects has to be
whole at each moment at which its holder can be killed.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator

from shmipi import _core
from shmipi.errors import IpiTimeoutError

__all__ = ["held"]

_LOOK_S = 0.0005
_LOOK_MOST_S = 0.02


@contextlib.contextmanager
def held(
    machine: _core.Machine,
    name: str,
    timeout: float | None,
    check: Callable[[], None] = lambda: None,
) -> Iterator[None]:
    """Hold lock ``name`` ("array", "hotplug", "stop" or "tool") of a machine.

    Threads of one host need a lock of their own before it. ``IpiTimeoutError`` after
    ``timeout`` seconds; while it waits, ``check`` may raise.
    """
    deadline = None if timeout is None else time.monotonic() + timeout
    look = _LOOK_S
    while not machine.trylock(name):
        check()
        if deadline is not None and time.monotonic() >= deadline:
            raise IpiTimeoutError(
                f"another host of machine {machine.name} holds its {name} lock for more"
                f" than {timeout:g} s: is it stopped?"
            )
        time.sleep(look)
        look = min(2 * look, _LOOK_MOST_S)
    try:
        yield
    finally:
        machine.unlock(name)
