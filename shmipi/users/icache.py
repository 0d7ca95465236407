"""Code that is replaced while CPUs run it, and the flush that makes them see it.

A table of functions lies in the machine's shared memory. What a CPU has fetched of it
stays in its process: that is its instruction cache. Who replaces a function publishes
the new one and has every CPU drop what it has fetched, by the interrupt that the
machine's architecture has for that (Octeon's ``SMP_ICACHE_FLUSH``), else by a function
call (``text_poke_sync()`` of x86), and waits for calls that began before. When
``text_poke`` returns, nobody runs the old function, and nobody will::

    price = cluster.users.icache.define("price", lambda n: 2 * n)
    cluster.run(price, 4)  # on every CPU: 8
    price.text_poke(lambda n: 3 * n)
    cluster.run(price, 4)  # 12

A function is anything that can be pickled, 4,000 bytes at most, or a
``smp.NativeHandler``.
"""

from __future__ import annotations

import errno
from collections.abc import Callable
from typing import Any

from shmipi import _core
from shmipi.errors import AddressSpaceError, ClusterStateError
from shmipi.machine import arrays, remote
from shmipi.machine.arrays import Arrays, SharedArray
from shmipi.users.state import state

__all__ = ["BoundIcache", "Text", "define", "text"]

_NAME_MAX = 47
#: What this process has decoded: its version, and the function.
_decoded: dict[tuple[str, int], tuple[int, Callable[..., Any]]] = {}


class Text:
    """A function of the table: call it on CPUs, replace it from anywhere.

    It pickles as its place in the table, so it can be sent to CPUs as it is.
    """

    def __init__(self, machine: _core.Machine, number: int, name: str) -> None:
        self._machine, self._number, self.name = machine, number, name
        self.__name__ = name

    def __reduce__(self) -> Any:
        return _attach, (self._machine.name, self._number, self.name)

    def __repr__(self) -> str:
        return f"<Text {self.name!r}>"

    def __call__(self, *args: Any) -> Any:
        """Run it as this CPU has it. A native one takes None or a shared array."""
        return self._machine.icache_call(self._number, self._fetch, args)

    def _fetch(self, version: int) -> Callable[..., Any]:
        key = self._machine.name, self._number
        known = _decoded.get(key)
        if known is not None and known[0] == version:
            return known[1]
        code = self._machine.icache_code(self._number, version)
        function: Callable[..., Any]
        if isinstance(code, bytes):
            function = remote.loads(code)
        else:
            function = _Native(self._machine, code)
        _decoded[key] = version, function
        return function

    def text_poke(self, function: Callable[..., Any] | _core.NativeHandler) -> int:
        """Replace it; when this returns no CPU runs the old one. Returns its version.

        IpiTimeoutError when a call that began before has not ended for 5 s: later calls
        run the new function. IpiDeadlockError (EDEADLK) in a function of the table.
        """
        return _poke(self._machine, self._number, function)


class _Native:
    """A native handler that is called by its number, with interrupts masked."""

    def __init__(self, machine: _core.Machine, number: int) -> None:
        self._machine, self._number = machine, number

    def __call__(self, info: SharedArray | None = None) -> None:
        offset = -1 if info is None else arrays.home_of(info).offset_of(info)
        self._machine.icache_native(self._number, -1 if offset is None else offset)


class BoundIcache:
    """``shmipi.users.icache`` for the host of one machine: ``cluster.users.icache``."""

    def __init__(self, home: Arrays) -> None:
        self._machine = home.machine
        if not home.machine.user_offset("icache"):
            state(home, "icache", home.machine.icache_bytes())

    def __repr__(self) -> str:
        return f"<icache of Cluster {self._machine.name!r}>"

    def define(
        self, name: str, function: Callable[..., Any] | _core.NativeHandler
    ) -> Text:
        """Put a function into the table. EEXIST: there is one of that name."""
        if not 0 < len(name.encode()) <= _NAME_MAX:
            raise AddressSpaceError(f"name is {name!r}: give 1 to {_NAME_MAX} bytes")
        _poke(self._machine, name, function)
        return self.text(name)

    def text(self, name: str) -> Text:
        """Return the function of that name. ``KeyError``."""
        return _text(self._machine, name)

    def cpu_state(self, cpu: int) -> dict[str, int]:
        """Return the flushes a CPU has taken, and how often it has fetched."""
        seen, running, flushes, fetches = self._machine.icache_state(cpu)
        return {
            "seen": seen,
            "running": running,
            "flushes": flushes,
            "fetches": fetches,
        }


def _poke(
    machine: _core.Machine,
    which: int | str,
    function: Callable[..., Any] | _core.NativeHandler,
) -> int:
    if isinstance(function, _core.NativeHandler):
        return machine.icache_poke(which, function, b"")
    if not callable(function):
        raise AddressSpaceError(f"{function!r} is not callable", errno=errno.EINVAL)
    return machine.icache_poke(which, None, remote.dumps(function))


def _text(machine: _core.Machine, name: str) -> Text:
    number = machine.icache_find(name)
    if number < 0:
        raise KeyError(
            f"machine {machine.name} has no function {name!r} in its table:"
            f" make it with cluster.users.icache.define({name!r}, ...)"
        )
    return Text(machine, number, name)


def _attach(machine: str, number: int, name: str) -> Text:
    return Text(arrays.machine_named(machine), number, name)


def _here() -> Arrays:
    home = arrays.here()
    if not home.machine.user_offset("icache"):
        raise ClusterStateError(
            "this machine has no table of functions: make it with cluster.users.icache"
        )
    return home


def define(name: str, function: Callable[..., Any] | _core.NativeHandler) -> Text:
    """Put a function into the table; see ``BoundIcache.define``."""
    return BoundIcache(_here()).define(name, function)


def text(name: str) -> Text:
    """Return the function of that name. ``KeyError``."""
    return _text(_here().machine, name)
