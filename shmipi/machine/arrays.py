"""numpy arrays in a machine's shared memory, found by name and pickled by name."""

from __future__ import annotations

import json
import struct
import threading
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from shmipi import _core
from shmipi.errors import ArenaFullError, LayoutError, NoMachineError
from shmipi.machine.locks import held

__all__ = [
    "Arrays",
    "SharedArray",
    "find",
    "here",
    "home_of",
    "machine_named",
    "of_machine",
    "percpu",
    "shared",
]

_HEAD = struct.Struct("<QQI")  # data offset, data bytes, length of the description
_LINE = 128  # two cache lines: neighbours are fetched in pairs
_KINDS = ("shared", "percpu")  # arrays of users; others are of the layers above
_LOCK_S = 5.0

# Machines of this process by name: what an array pickled by name is found through.
# It may have a machine open more than once (booted, and attached to): the last counts.
_machines: list[Arrays] = []
_current: Arrays | None = None


class SharedArray(np.ndarray[Any, Any]):
    """A view of a machine's shared memory; otherwise an ordinary numpy array.

    It pickles as its name and position: what arrives on another CPU, also in a closure,
    is the same memory and never a copy. Results of arithmetic are ordinary arrays in
    private memory and travel by value.
    """

    _home: Arrays | None
    _key: tuple[str, str] | None

    def __array_finalize__(self, base: object) -> None:
        self._home = getattr(base, "_home", None)
        self._key = getattr(base, "_key", None)

    def __array_wrap__(
        self, array: Any, context: Any = None, return_scalar: bool = False
    ) -> Any:
        if array is self:
            return array
        plain = np.asarray(array)
        return plain[()] if return_scalar or plain.ndim == 0 else plain

    def __reduce__(self) -> Any:
        home, key = self._home, self._key
        if home is not None and key is not None:
            offset = home.offset_of(self)
            if offset is not None:
                return _attach, (
                    home.machine.name,
                    key,
                    offset,
                    self.shape,
                    self.strides,
                    self.dtype,
                )
        return np.asarray(self).__reduce__()

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.__reduce__()

    def __deepcopy__(self, memo: Any) -> Any:
        return np.array(self, copy=True, subok=False)


class Arrays:
    """The named arrays of one machine, as one process sees them."""

    def __init__(self, machine: _core.Machine) -> None:
        self.machine = machine
        self._lock = threading.RLock()  # a signal handler may close it
        self._known: dict[tuple[str, str], SharedArray] = {}
        self._memory = memoryview(machine)
        _machines.append(self)

    def close(self) -> None:
        """Forget the machine; arrays that are still in use keep their memory."""
        global _current
        with self._lock:  # nobody is about to make one
            _machines[:] = [arrays for arrays in _machines if arrays is not self]
        if _current is self:
            _current = None
        self._known.clear()
        self._memory.release()

    def make_current(self, on: bool = True) -> None:
        """Let ``shmipi.shared(name)`` of this process look here, or no longer."""
        global _current
        if on:
            _current = self
        elif _current is self:
            _current = None

    def make(
        self, kind: str, name: str, dtype: DTypeLike, shape: int | tuple[int, ...]
    ) -> SharedArray:
        """Make array ``name``, zeroed, or return it if it is the same already.

        Raises ``ValueError`` for another dtype or shape under a used name,
        ``TypeError`` for object dtypes, ``ArenaFullError`` (ENOSPC) when /dev/shm is
        full.
        """
        if not isinstance(name, str) or not 0 < len(name.encode()) <= 255:
            raise ValueError(f"name is {name!r}: give a string of 1 to 255 bytes")
        dtype = np.dtype(dtype)
        if dtype.hasobject:
            raise TypeError("objects cannot live in shared memory: use a plain dtype")
        shape = (shape,) if isinstance(shape, int) else tuple(int(n) for n in shape)
        if any(n < 0 for n in shape):
            raise ValueError(f"shape is {shape}: sizes are not negative")
        with self._lock, held(self.machine, "array", _LOCK_S):
            known = self._look_up(kind, name)
            if known is not None:
                own = known.shape[1:] if kind == "percpu" else known.shape
                if known.dtype != dtype or own != shape:
                    raise ValueError(
                        f"{kind} {name!r} exists with dtype {known.dtype} and"
                        f" shape {own}"
                    )
                return known
            return self._add(kind, name, dtype, shape)

    def _add(
        self, kind: str, name: str, dtype: np.dtype[Any], shape: tuple[int, ...]
    ) -> SharedArray:
        row = dtype.itemsize * int(np.prod(shape, dtype=object))
        stride = -(-max(row, 1) // _LINE) * _LINE
        nbytes = stride * self.machine.ncpus if kind == "percpu" else row
        description = json.dumps(
            {
                "kind": kind,
                "name": name,
                "dtype": np.lib.format.dtype_to_descr(dtype),
                "shape": shape,
                "stride": stride,
            }
        ).encode()
        start = -(-(_HEAD.size + len(description)) // _LINE) * _LINE
        try:
            index, offset = self.machine.add_array(start + max(nbytes, 1))
        except OSError as error:
            raise ArenaFullError(
                f"{kind} {name!r} of {nbytes} bytes: /dev/shm is full"
                " (mount -o remount,size=... /dev/shm, docker run --shm-size=...)",
                errno=error.errno,
            ) from None
        data = offset + start
        head = _HEAD.pack(data, nbytes, len(description)) + description
        self._memory[offset : offset + len(head)] = head
        self.machine.publish_array(index, offset)
        made = self._look_up(kind, name)
        assert made is not None
        return made

    def find(self, kind: str, name: str) -> SharedArray:
        """Return array ``name``. ``KeyError`` when the machine has none."""
        # No lock: a handler may interrupt its own task right here and come again.
        found = self._look_up(kind, name)
        if found is None:
            more = ", dtype, shape" if kind in _KINDS else ""
            raise KeyError(
                f"machine {self.machine.name} has no {kind} {name!r}:"
                f" make it with cluster.{kind}({name!r}{more})"
            )
        return found

    def _look_up(self, kind: str, name: str) -> SharedArray | None:
        """Return it, described when it is first asked for; others are not."""
        found = self._known.get((kind, name))
        if found is None:
            begins = json.dumps({"kind": kind, "name": name})[:-1] + ","
            offset = self.machine.find_array(begins.encode())
            if offset >= 0:
                found = self._known.setdefault((kind, name), self._describe(offset))
        return found

    def _describe(self, offset: int) -> SharedArray:
        try:
            # Beyond the end the file may end, and a look there is a SIGBUS.
            start, end = self.machine.array_offset, self.machine.array_end
            if not start <= offset <= end - _HEAD.size:
                raise ValueError("outside the arrays")
            data, nbytes, length = _HEAD.unpack_from(self._memory, offset)
            text_end = offset + _HEAD.size + length
            if not (text_end <= data and data + nbytes <= end):
                raise ValueError("outside the arrays")
            text = bytes(self._memory[offset + _HEAD.size :][:length])
            about = json.loads(text)
            dtype = np.lib.format.descr_to_dtype(_tuples(about["dtype"]))
            shape = tuple(about["shape"])
            key = (str(about["kind"]), str(about["name"]))
            memory = self._memory[data : data + nbytes]
            if len(memory) != nbytes or dtype.hasobject:
                raise ValueError("outside the segment")
            if key[0] == "percpu":
                strides = np.empty(shape, dtype).strides if np.prod(shape) else ()
                array = np.ndarray(
                    (self.machine.ncpus, *shape),
                    dtype,
                    memory,
                    strides=(about["stride"], *strides)
                    if len(strides) == len(shape)
                    else None,
                )
            else:
                array = np.ndarray(shape, dtype, memory)
        except (ValueError, KeyError, TypeError, struct.error) as error:
            raise LayoutError(
                f"the description of a shared array is damaged: {error}"
            ) from None
        view = array.view(SharedArray)
        view._home, view._key = self, key
        return view

    def offset_of(self, array: SharedArray) -> int | None:
        """Return where the array's first element lies in the segment, or None."""
        offset = self.machine.offset_of(array.__array_interface__["data"][0])
        return offset if offset >= 0 else None

    def view(
        self,
        key: tuple[str, str],
        offset: int,
        shape: tuple[int, ...],
        strides: tuple[int, ...],
        dtype: np.dtype[Any],
    ) -> SharedArray:
        """Return the part of array ``key`` that was pickled."""
        whole = self.find(*key)
        first = self.offset_of(whole)
        assert first is not None
        if (offset, shape, strides, dtype) == (
            first,
            whole.shape,
            whole.strides,
            whole.dtype,
        ):
            return whole
        memory = np.ndarray(
            (_span(whole),), np.uint8, self._memory[first : first + _span(whole)]
        )
        part: NDArray[Any] = np.ndarray(shape, dtype, memory, offset - first, strides)
        view = part.view(SharedArray)
        view._home, view._key = self, key
        return view


def _span(array: NDArray[Any]) -> int:
    if array.size == 0:
        return 0
    steps = zip(array.shape, array.strides, strict=True)
    return int(array.itemsize + sum((n - 1) * step for n, step in steps))


def _tuples(descr: Any) -> Any:
    """JSON made lists of a structured dtype's tuples; undo it."""
    if isinstance(descr, str):
        return descr
    fields = []
    for field in descr:
        field = [*field[:1], _tuples(field[1]), *(tuple(part) for part in field[2:])]
        if isinstance(field[0], list):
            field[0] = tuple(field[0])
        fields.append(tuple(field))
    return fields


def _named(machine: str, what: str) -> Arrays:
    for home in reversed(_machines):
        if home.machine.name == machine:
            return home
    raise NoMachineError(f"{what} lives in machine {machine}, which is not open here")


def machine_named(machine: str) -> _core.Machine:
    """Return the machine of that name, open here. ``NoMachineError``."""
    return _named(machine, "what was sent").machine


def here() -> Arrays:
    """Return the arrays of this process's machine. ``NoMachineError``."""
    return _here()


def _attach(
    machine: str,
    key: tuple[str, str],
    offset: int,
    shape: tuple[int, ...],
    strides: tuple[int, ...],
    dtype: np.dtype[Any],
) -> SharedArray:
    home = _named(machine, f"{key[0]} array {key[1]!r}")
    return home.view(key, offset, shape, strides, dtype)


def shared(name: str) -> SharedArray:
    """Return the machine's array made by ``cluster.shared(name, ...)``.

    ``KeyError`` when there is none, ``NoMachineError`` outside a machine.
    """
    return _here().find("shared", name)


def percpu(name: str) -> SharedArray:
    """Return the machine's array made by ``cluster.percpu(name, ...)``: a row per CPU.

    ``KeyError`` when there is none, ``NoMachineError`` outside a machine.
    """
    return _here().find("percpu", name)


def find(kind: str, name: str) -> SharedArray:
    """Return what the machine has under that name. Raises what ``shared`` raises."""
    return _here().find(kind, name)


def home_of(array: SharedArray) -> Arrays:
    """Return the arrays of the machine that ``array`` is in. ``TypeError``."""
    home = array._home if isinstance(array, SharedArray) else None
    if home is None:
        raise TypeError(f"not an array in a machine's shared memory: {array!r}")
    return home


def of_machine(machine: _core.Machine) -> Arrays | None:
    """Return the arrays of a machine that this process has open, or None."""
    return next((home for home in _machines if home.machine is machine), None)


def _here() -> Arrays:
    if _current is None:
        raise NoMachineError(
            "this process is on no machine, or on several: use cluster.shared() and"
            " cluster.percpu()"
        )
    return _current
