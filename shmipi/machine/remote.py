"""What travels between processes: pickles of functions, values and exceptions.

The C core calls the functions of this module: it imports it with the first Machine.
"""

from __future__ import annotations

import pickle
import traceback
from collections.abc import Coroutine
from typing import Any, Final

import numpy as np

from shmipi import _core, errors
from shmipi.cpumask import CpuMask, MaskLike
from shmipi.errors import RemoteCallError, TaskInterrupt
from shmipi.machine import byvalue
from shmipi.machine.ending import ending

__all__ = [
    "dump_exception",
    "dumps",
    "ending",
    "forget",
    "load_exception",
    "loads",
    "publish",
    "run_coroutine",
    "task_name",
]

forget = byvalue.forget

#: What stands between a function's pickle and its name.
NAME_MARK: Final = b"\0name:"

_PROTOCOL = 5
_PLAIN = frozenset({str, bytes, bytearray, int, float, complex, bool, type(None)})


def loads(data: bytes) -> Any:
    """Unpickle. Raises what unpickling raises.

    In a frame of its own: a handler may interrupt code whose builtins are not the usual
    ones (a namedtuple's ``__new__`` has none), and ``pickle.loads`` called from C would
    import with those.
    """
    return pickle.loads(data)


def _is_plain(value: object) -> bool:
    kind = type(value)
    if kind in _PLAIN:
        return True
    if kind is np.ndarray:
        return not value.dtype.hasobject  # type: ignore[attr-defined]
    return kind is tuple and all(map(_is_plain, value))  # type: ignore[call-overload]


def dumps(value: object) -> bytes:
    """Pickle ``value``; what has no import path (lambdas, ``__main__``) by value.

    Raises what pickling raises: ``TypeError`` or ``pickle.PicklingError``, with a note
    that says what to do.
    """
    try:
        if _is_plain(value):
            return pickle.dumps(value, _PROTOCOL)
        return byvalue.dumps(value)
    except Exception as error:
        _add_advice(error)
        raise


def publish(function: object) -> tuple[bytes, list[Any], list[Any], list[Any]]:
    """Pickle a function that gets a number; with it what it was made of.

    See ``byvalue.publish``. Raises as ``dumps``.
    """
    try:
        data, cells, names, values = byvalue.publish(function)
    except Exception as error:
        _add_advice(error)
        raise
    # Behind the end of the pickle, where nobody unpickles: for a crash dump.
    name = getattr(function, "__qualname__", "")
    data += NAME_MARK + str(name).encode("utf-8", "replace")
    return data, cells, names, values


def _add_advice(error: Exception) -> None:
    error.add_note(
        "shmipi: a function, its arguments and its result are pickled to reach"
        " another CPU; pass what can be pickled, or names to look it up by there"
    )


def dump_exception(error: BaseException) -> bytes:
    """Pickle an exception with its traceback's text, whatever it holds."""
    text = "".join(traceback.format_exception(error))
    try:
        original: bytes | None = dumps(error)
    except Exception:
        original = None
    return pickle.dumps((original, _safe_repr(error), text), _PROTOCOL)


def load_exception(data: bytes, cpu: int) -> RemoteCallError:
    """Make the ``RemoteCallError`` that a waiting caller gets."""
    original, text_repr, text = pickle.loads(data)
    error = RemoteCallError(
        f"CPU {cpu}: {text_repr}\n\nthe traceback there:\n{text.rstrip()}",
        cpu=cpu,
        remote_repr=text_repr,
    )
    if original is not None:
        try:
            cause = pickle.loads(original)
        except Exception:
            cause = None
        if isinstance(cause, BaseException):
            error.__cause__ = cause
    return error


def task_name(function: object) -> str:
    """Return the name of a task's function for messages."""
    module = getattr(function, "__module__", None)
    name = getattr(function, "__qualname__", None) or _safe_repr(function)
    return f"{module}.{name}" if module else str(name)


def run_coroutine(coroutine: Coroutine[Any, Any, Any]) -> Any:
    """Run what a task's ``async def`` function returned, in a loop of its own.

    As ``asyncio.run`` does with Ctrl-C: the first cancel is the coroutine's, at its
    next ``await``, because an exception in the midst of the loop may lose what it was
    about to run. A second one is raised wherever the task is.
    """
    try:
        return _run(coroutine)
    finally:
        coroutine.close()  # where it was not begun


def _run(coroutine: Coroutine[Any, Any, Any]) -> Any:
    import asyncio

    asked = False
    running: asyncio.Task[Any] | None = None

    def cancel() -> None:
        nonlocal asked
        if asked:
            raise TaskInterrupt("this task was cancelled again")
        asked = True
        if running is not None:
            running.cancel()
            running.get_loop().call_soon_threadsafe(lambda: None)  # out of its sleep

    async def main() -> Any:
        nonlocal running
        running = asyncio.current_task()
        if asked:
            raise asyncio.CancelledError
        return await coroutine

    _core.on_task_cancel(cancel)
    try:
        return asyncio.run(main())
    except asyncio.CancelledError:
        if not asked:
            raise
        raise TaskInterrupt from None


def _safe_repr(value: object) -> str:
    try:
        return repr(value)
    except Exception:
        return f"<{type(value).__name__} whose repr() raises>"


def _mask_cpus(mask: MaskLike, ncpus: int) -> list[int]:
    return list(CpuMask.of(mask, ncpus))


_core.bind(errors, __import__(__name__, fromlist=["dumps"]), _mask_cpus)
