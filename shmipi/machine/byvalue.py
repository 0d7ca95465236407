"""Functions and classes that have no import path, as they travel between processes.

cloudpickle takes them apart. Here is what it leaves open: what belongs together when
they are sent one by one, and when to send them again.

- Functions of one module share one dict of globals on each CPU (for ``__main__`` of the
  host that booted the machine it is ``sys.modules["__main__"].__dict__`` there; the
  modules of a host that attached are other ones), and a class is one class. The value
  of a global, or the attributes of a class, are sent along with what uses them, each
  with a *stamp*: who bound it, and a number that grows with every new binding. A CPU
  takes what is newer than all that it had from the same origin. So an assignment on the
  host wins, and what the host left alone does not undo what the CPU has made of it.
- Whatever was taken by value is noted, by identity, for the core to compare at each
  call (``py/guard.c``): the function is sent anew when one of it has changed.

The host's own globals and classes are never changed by what comes in.
"""

from __future__ import annotations

import builtins
import dis
import functools
import hashlib
import io
import itertools
import operator
import os
import pickle
import sys
import threading
import types
import typing
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from types import CellType, CodeType, FunctionType
from typing import Any

import cloudpickle

from shmipi import _core

__all__ = ["adopt_main", "dumps", "forget", "publish", "whose_main"]

_PROTOCOL = 5
_TRIES = 3
_ATOMS = (str, bytes, int, float, complex, bool, type(None))


class _Absent:
    """In place of a value: the name is not bound."""


_ABSENT = _Absent()

#: (who bound it, the binding's number there)
_Stamp = tuple[bytes, int]
#: A module, and whose: several hosts of a machine each have a ``__main__``.
_Space = tuple[bytes, str]

# ---- where bindings come from --------------------------------------------------------

_versions = itertools.count(1)
_lock = threading.RLock()
_origin: tuple[int, bytes] = (0, b"")


def _renew_lock() -> None:
    """In a fork's child: no thread that might hold it is there."""
    global _lock
    _lock = threading.RLock()


os.register_at_fork(after_in_child=_renew_lock)


def _here() -> bytes:
    """A name for this process: CPUs are forks of one that has imported this."""
    global _origin
    if _origin[0] != os.getpid():
        _origin = (os.getpid(), os.urandom(8))
    return _origin[1]


def _reference(value: object) -> Callable[[], object]:
    """Weak where possible: to know a value must not keep it."""
    try:
        return weakref.ref(value)
    except TypeError:
        return lambda: value


@dataclass(slots=True)
class _Binding:
    value: Callable[[], object]
    digest: bytes | None  # of its pickle; None: not pickled here yet
    stamp: _Stamp


class _Table:
    """What is known of the bindings of one module's globals, or of one class."""

    def __init__(self) -> None:
        self.bound: dict[str, _Binding] = {}
        self.seen: dict[str, dict[bytes, int]] = {}
        self.digest: bytes | None = None  # of a class: all attributes together

    def same(self, name: str, value: object) -> bool:
        known = self.bound.get(name)
        return known is not None and known.value() is value

    def stamp(
        self, name: str, value: object, digest: bytes | None, fresh: bool = False
    ) -> _Stamp:
        """The stamp of a binding of this process: its old one if nothing changed."""
        known = self.bound.get(name)
        if (
            not fresh
            and known is not None
            and known.value() is value
            and known.digest in (None, digest)
        ):
            known.digest = digest
            return known.stamp
        stamp = (_here(), next(_versions))
        self.note(name, value, stamp, digest)
        return stamp

    def note(
        self, name: str, value: object, stamp: _Stamp, digest: bytes | None = None
    ) -> None:
        if name in self.bound:
            # What was sent with the old one is not what CPUs have any more, also when
            # the old value comes back.
            _core.functions_rebound()
        self.bound[name] = _Binding(_reference(value), digest, stamp)
        self.seen.setdefault(name, {})[stamp[0]] = stamp[1]

    def newer(self, name: str, stamp: _Stamp) -> bool:
        return self.seen.get(name, {}).get(stamp[0], 0) < stamp[1]


_tables: dict[_Space, _Table] = {}
_class_tables: weakref.WeakKeyDictionary[type, _Table] = weakref.WeakKeyDictionary()
#: By cloudpickle's id, which goes with a class from process to process.
_classes: weakref.WeakValueDictionary[str, type] = weakref.WeakValueDictionary()
_received: weakref.WeakSet[type] = weakref.WeakSet()

#: On a CPU: the globals of functions that came by value.
_spaces: dict[_Space, dict[str, Any]] = {}
_used: dict[_Space, int] = {}  # when; not the main program's own
_USED_MOST = 1024  # hosts come and go: the spaces of the oldest are dropped
_uses = itertools.count()
_home = True  # this process is a host: what comes in changes nothing of it


def adopt_main(host: bytes) -> None:
    """In the firmware: what it forks gets the ``__main__`` of ``host`` for its own."""
    global _home
    _home = False
    main = types.ModuleType("__main__")
    main.__dict__["__builtins__"] = builtins
    sys.modules["__main__"] = main
    _spaces[host, "__main__"] = main.__dict__


def forget() -> None:
    """No machine is open any more: keep nothing of what was sent to one."""
    _tables.clear()
    _class_tables.clear()


def _table_of(cls: type) -> _Table:
    return _class_tables.setdefault(cls, _Table())


# ---- sending -------------------------------------------------------------------------

_names_of: weakref.WeakKeyDictionary[CodeType, tuple[str, ...]] = (
    weakref.WeakKeyDictionary()
)


def _global_names(code: CodeType) -> tuple[str, ...]:
    """The globals that ``code``, or code inside it, reads or writes."""
    names = _names_of.get(code)
    if names is None:
        names = _names_of[code] = tuple(dict.fromkeys(_walk_globals(code)))
    return names


def _walk_globals(code: CodeType) -> Iterator[str]:
    for instruction in dis.get_instructions(code):
        name = instruction.opname
        if name.endswith("_GLOBAL") or name == "LOAD_FROM_DICT_OR_GLOBALS":
            yield instruction.argval
        elif name == "LOAD_NAME" and instruction.argval != "__name__":
            yield instruction.argval  # in the body of a class
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _global_names(constant)


def _space_of(globals_: dict[str, Any]) -> _Space | None:
    """The module whose globals these are; None: nobody's, they travel as they are."""
    name = globals_.get("__name__")
    if type(name) is not str:
        return None
    for space, theirs in _spaces.items():
        if theirs is globals_:
            return space
    module = sys.modules.get(name)
    return (_here(), name) if getattr(module, "__dict__", None) is globals_ else None


def whose_main() -> bytes:
    """Whose ``__main__`` this process has: on a CPU, that of its host."""
    space = _space_of(vars(sys.modules["__main__"]))
    return _here() if space is None else space[0]


class _SpaceName:
    """In a pickle, in place of a module's globals."""

    def __init__(self, space: _Space, base: dict[str, Any]) -> None:
        self.space = space
        self.base = base


class _Names:
    """In a pickle, in place of the globals that a function uses.

    They are bound where it is met, so that what unpickling runs (``__init_subclass__``,
    ``__setstate__``) finds them.
    """

    def __init__(self, space: _Space, names: tuple[str, ...]) -> None:
        self.space = space
        self.names = names


class _Changed(Exception):
    """A binding changed while it was pickled."""


class _Parcel:
    """A value, with the bindings and classes that it needs on the other side."""

    def __init__(self, *parts: Any) -> None:
        self.parts = parts

    def __reduce__(self) -> tuple[Any, ...]:
        return _open, self.parts


class _Session:
    """One value on its way: collects what it needs, and what was taken by value."""

    def __init__(self) -> None:
        self.spaces: dict[_Space, dict[str, Any]] = {}
        self.names: dict[tuple[_Space, str], Any] = {}
        self.classes: dict[str, tuple[type, Any, dict[str, Any], Any]] = {}
        #: For py/guard.c: functions, classes, and what the tables then said.
        self.functions: list[tuple[Any, ...]] = []
        self.types: list[tuple[type, dict[str, Any]]] = []
        self.tables: list[tuple[dict[str, _Binding], dict[str, _Binding]]] = []
        self._guarded: set[tuple[int, str]] = set()

    def dump(self, value: object) -> bytes:
        if type(value) in _ATOMS:
            return pickle.dumps(value, _PROTOCOL)
        buffer = io.BytesIO()
        _Pickler(buffer, self).dump(value)
        return buffer.getvalue()

    def pack(self, value: object, last: bool) -> bytes:
        """Raises ``_Changed`` when ``value`` has to be pickled again."""
        root = self.dump(value)
        if not self.functions and not self.types:
            return root
        named: dict[tuple[_Space, str], bytes | None] = {}
        made: dict[str, tuple[bytes, bytes]] = {}
        while len(named) < len(self.names) or len(made) < len(self.classes):
            for where in self.names.keys() - named.keys():
                bound = self.names[where]
                named[where] = None if bound is _ABSENT else self.dump(bound)
            for known in self.classes.keys() - made.keys():
                _, skeleton, attributes, setstate = self.classes[known]
                state = self.dump((attributes, setstate))
                made[known] = (self.dump(skeleton), state)
        with _lock:
            # Under the lock, so that of two threads the one that saw the later binding
            # gives the higher number.
            if not last and not self.unchanged():
                raise _Changed
            names = {
                where: (self.stamp(where, self.names[where], blob), blob)
                for where, blob in named.items()
            }
            classes = {
                known: (skeleton, self.stamp_class(known, state), state)
                for known, (skeleton, state) in made.items()
            }
            self.note_tables()
        return pickle.dumps(_Parcel(root, names, classes), _PROTOCOL)

    def unchanged(self) -> bool:
        return all(
            self.spaces[space].get(name, _ABSENT) is value
            for (space, name), value in self.names.items()
        )

    def note_tables(self) -> None:
        for space in self.spaces:
            bound = _tables.setdefault(space, _Table()).bound
            used = [name for where, name in self.names if where == space]
            self.tables.append((bound, {name: bound[name] for name in used}))
        for cls, *_ in self.classes.values():
            bound = _table_of(cls).bound
            self.tables.append((bound, bound.copy()))

    def stamp(
        self, where: tuple[_Space, str], value: object, blob: bytes | None
    ) -> _Stamp:
        space, name = where
        table = _tables.setdefault(space, _Table())
        return table.stamp(name, value, None if blob is None else _digest(blob))

    def stamp_class(self, known: str, state: bytes) -> dict[str, _Stamp]:
        cls, _, attributes, _ = self.classes[known]
        table, digest = _table_of(cls), _digest(state)
        inside = table.digest not in (None, digest)
        table.digest = digest
        rebound = {
            name
            for name, value in attributes.items()
            if not table.same(name, value) and name != "_abc_impl"
        }
        stamps = {}
        for name, value in attributes.items():
            # What changed inside a value is not known by name: it may be a default of a
            # method, or, where nothing else was assigned, anything.
            fresh = inside and (
                hasattr(type(value), "__get__")
                or (not rebound and type(value) not in _ATOMS)
            )
            stamps[name] = table.stamp(name, value, None, fresh)
        for name in table.bound.keys() - attributes.keys():
            stamps[name] = table.stamp(name, _ABSENT, None)
        return stamps

    def guard(
        self,
        func: FunctionType,
        code: CodeType,
        slots: dict[str, Any],
        cells: tuple[CellType, ...],
        attributes: dict[str, Any],
        names: dict[str, Any],
    ) -> None:
        """Note what was taken of ``func``, for the core to compare with."""
        globals_ = id(func.__globals__)  # alive: `func` is in the list
        new = [n for n in _global_names(code) if (globals_, n) not in self._guarded]
        self._guarded.update((globals_, name) for name in new)
        self.functions.append(
            (
                func,
                (
                    code,
                    slots["__defaults__"],
                    slots["__name__"],
                    slots["__qualname__"],
                    slots["__doc__"],
                    slots["__module__"],
                    slots["__annotations__"],
                ),
                cells,
                {name: names[name] for name in new if name in names},
                tuple(name for name in new if name not in names),
                attributes,
                slots["__kwdefaults__"] or {},
            )
        )


def _digest(blob: bytes) -> bytes:
    return hashlib.blake2b(blob, digest_size=16).digest()


class _Pickler(cloudpickle.Pickler):  # type: ignore[misc]
    def __init__(self, file: io.BytesIO, session: _Session) -> None:
        super().__init__(file, _PROTOCOL)
        self.session = session
        self.space_names: dict[_Space, _SpaceName] = {}

    def reducer_override(self, obj: Any) -> Any:
        kind = type(obj)
        if kind is FunctionType:
            return self.reduce_function(obj)
        if issubclass(kind, type):
            return self.reduce_class(obj)
        if kind in _NAMED:
            return _reduce_named(obj)
        if kind is _SpaceName:
            return _space, (obj.space, obj.base)
        if kind is _Names:
            return _bind_names, (obj.space, obj.names)
        return NotImplemented

    def reduce_function(self, func: FunctionType) -> Any:
        reduced = super().reducer_override(func)
        if reduced is NotImplemented:
            return reduced  # it has an import path
        make, (code, base, *rest), (attributes, slots), *between, setstate = reduced
        globals_ = func.__globals__
        names = {}
        for name in _global_names(code):
            value = globals_.get(name, _ABSENT)
            if value is not _ABSENT:
                names[name] = value
        # Cells of our own: what is noted of them is what is pickled, whatever happens
        # to the function's meanwhile.
        cells = tuple(map(_copy_cell, func.__closure__ or ()))
        slots = {
            **slots,
            "__closure__": cells if func.__closure__ is not None else None,
            "__globals__": names,
            "__name__": func.__name__,
            "__qualname__": func.__qualname__,
            "__kwdefaults__": func.__kwdefaults__ and dict(func.__kwdefaults__),
        }
        self.session.guard(func, code, slots, cells, attributes, names)
        space = _space_of(globals_)
        if space is not None:
            if space not in self.space_names:
                self.space_names[space] = _SpaceName(space, dict(base))
            base = self.space_names[space]
            slots["__globals__"] = _Names(space, tuple(names)) if names else {}
            self.need(space, globals_, code, names)
        return make, (code, base, *rest), (attributes, slots), *between, setstate

    def need(
        self,
        space: _Space,
        globals_: dict[str, Any],
        code: CodeType,
        names: dict[str, Any],
    ) -> None:
        session = self.session
        session.spaces[space] = globals_
        known = _tables.get(space)
        for name in _global_names(code):
            if name in names:
                session.names.setdefault((space, name), names[name])
            elif known and name in known.bound:
                session.names.setdefault((space, name), _ABSENT)  # deleted since

    def reduce_class(self, cls: type) -> Any:
        before = dict(vars(cls))
        reduced = super().reducer_override(cls)
        if type(reduced) is not tuple or len(reduced) < 6:
            return reduced  # it has an import path, or is a builtin
        make, args, (attributes, _), _, _, setstate = reduced
        known = args[-2]  # cloudpickle's id, which it gives each class by value
        _classes.setdefault(known, cls)
        self.session.types.append((cls, before))
        self.session.classes[known] = (cls, (make, args), attributes, setstate)
        return _class_of, (known,)


def _cached(function: FunctionType, parameters: dict[str, Any]) -> Any:
    return functools.lru_cache(**parameters)(function)


def _new_type(module: str, name: str, supertype: Any) -> Any:
    made: Any = typing.NewType(name, supertype)  # type: ignore[misc]
    made.__module__ = module
    return made


#: What pickles itself as a name, also where no import leads to that name.
_NAMED = frozenset(
    {
        functools._lru_cache_wrapper,
        typing.NewType,
        typing.ParamSpec,
        typing.TypeVarTuple,
        getattr(typing, "TypeAliasType", typing.NewType),  # of Python 3.12
    }
)


def _reduce_named(obj: Any) -> Any:
    """Taken apart, unless it has an import path: each CPU has a cache of its own."""
    kind: Any = type(obj)
    module: Any = getattr(obj, "__module__", None)
    try:
        name = getattr(obj, "__qualname__", None) or obj.__name__
        found = operator.attrgetter(name)(sys.modules.get(module))
        if found is obj and module != "__main__":
            return NotImplemented
    except AttributeError:
        pass
    try:
        if kind is typing.NewType:
            return _new_type, (module, obj.__qualname__, obj.__supertype__)
        if kind in (typing.ParamSpec, typing.TypeVarTuple):
            return kind, (obj.__name__,)
        if kind is not functools._lru_cache_wrapper:
            return kind, (obj.__name__, obj.__value__)
        return _cached, (obj.__wrapped__, obj.cache_parameters())
    except (AttributeError, NameError):  # a raw one; an alias of what is not there
        return NotImplemented


def _copy_cell(cell: CellType) -> CellType:
    try:
        return CellType(cell.cell_contents)
    except ValueError:
        return CellType()


def _travel(value: object) -> tuple[bytes, _Session]:
    for left in reversed(range(_TRIES)):
        session = _Session()
        try:
            return session.pack(value, last=not left), session
        except _Changed:
            continue
    raise AssertionError("the last try is taken as it is")


def dumps(value: object) -> bytes:
    """Pickle ``value``: ``pickle.loads`` opens it."""
    return _travel(value)[0]


def publish(
    function: object,
) -> tuple[bytes, list[tuple[Any, ...]], list[Any], list[Any]]:
    """Pickle ``function``; also what went by value, as py/guard.c takes it.

    These are lists of functions, classes and tables; all are empty for a function that
    has an import path.
    """
    data, session = _travel(function)
    return data, session.functions, session.types, session.tables


# ---- receiving -----------------------------------------------------------------------


@dataclass
class _Opening:
    """A parcel that is being opened."""

    names: dict[tuple[_Space, str], tuple[_Stamp, bytes | None]]
    classes: dict[str, tuple[bytes, dict[str, _Stamp], bytes]]
    spaces: dict[_Space, dict[str, Any]] = field(default_factory=dict)  # a host's
    done: set[str] = field(default_factory=set)


class _Stack(threading.local):
    def __init__(self) -> None:
        self.openings: list[_Opening] = []


_stack = _Stack()


def _open(
    root: bytes,
    names: dict[tuple[_Space, str], tuple[_Stamp, bytes | None]],
    classes: dict[str, tuple[bytes, dict[str, _Stamp], bytes]],
) -> Any:
    _stack.openings.append(_Opening(names, classes))
    try:
        for known in classes.keys() & _classes.keys():
            _class_of(known)  # what is there already; others when they are met
        value = pickle.loads(root)
        while names:
            (space, name), binding = names.popitem()
            _bind(space, name, *binding)
        return value
    finally:
        _stack.openings.pop()


def _bind_names(space: _Space, names: tuple[str, ...]) -> dict[str, Any]:
    """Bind what a function that is being unpickled uses; nothing is left for itself."""
    waiting = _stack.openings[-1].names
    for name in names:
        binding = waiting.pop((space, name), None)  # before: it may lead back here
        if binding is not None:
            _bind(space, name, *binding)
    return {}


def _space(which: _Space, base: dict[str, Any]) -> dict[str, Any]:
    """The globals of the functions of a module in this process."""
    spaces = _spaces
    if _home:  # the host's own are not touched
        spaces = _stack.openings[-1].spaces if _stack.openings else {}
    space = spaces.setdefault(which, {"__builtins__": builtins})
    for key, value in base.items():
        space.setdefault(key, value)
    if not _home and space is not vars(sys.modules["__main__"]):
        _used[which] = next(_uses)
        if len(_used) > _USED_MOST:
            # Functions that are still there keep their globals; no others get them.
            oldest = min(_used.copy().items(), key=operator.itemgetter(1))[0]
            for known in (_used, _spaces, _tables):
                known.pop(oldest, None)
    return space


def _bind(space: _Space, name: str, stamp: _Stamp, blob: bytes | None) -> None:
    table = _Table() if _home else _tables.setdefault(space, _Table())
    if not table.newer(name, stamp):
        return
    value = _ABSENT if blob is None else pickle.loads(blob)
    if not table.newer(name, stamp):
        return  # a handler came in between, and brought it or a later one
    globals_ = _space(space, {})
    if blob is None:
        globals_.pop(name, None)
    else:
        globals_[name] = value
    table.note(name, value, stamp)


def _class_of(known: str) -> type:
    """The class of that id in this process, with what the parcel has of news of it."""
    cls = _classes.get(known)
    opening = _stack.openings[-1] if _stack.openings else None
    if opening is None or known not in opening.classes or known in opening.done:
        if cls is None:
            raise pickle.UnpicklingError("a class is missing from its parcel")
        return cls
    skeleton, stamps, state = opening.classes[known]
    if cls is None:
        make, args = pickle.loads(skeleton)
        cls = _classes.get(known)
        if cls is None:
            cls = make(*args)
            _classes[known] = cls
            _received.add(cls)
    elif cls not in _received:
        return cls  # it is this process's own
    opening.done.add(known)  # now: its methods lead back to it
    table = _table_of(cls)
    if any(table.newer(name, stamp) for name, stamp in stamps.items()):
        attributes, setstate = pickle.loads(state)
        news = {n: s for n, s in stamps.items() if table.newer(n, s)}
        setstate(cls, ({n: attributes[n] for n in news if n in attributes}, {}))
        for name, stamp in news.items():
            if name not in attributes and name in vars(cls):
                delattr(cls, name)  # deleted by the sender as well
            table.note(name, vars(cls).get(name, _ABSENT), stamp)
    return cls
