"""A recording as ``trace.dat``, version 6: what trace-cmd and KernelShark read.

trace-cmd.dat.v6(5) describes the file: formats of events, names of addresses and
processes, then for each CPU pages of the kernel's ring buffer. There is no library for
writing it; the formats of events are the kernel's own text, cut to what is recorded.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Final, NamedTuple

from shmipi.trace.kernel import SOFTIRQS, Event, Pointer, events
from shmipi.trace.record import Trace

__all__ = ["made"]

_PAGE: Final = 4096
_PAGE_HEAD: Final = struct.Struct("<QQ")
_ROOM: Final = _PAGE - _PAGE_HEAD.size
_TIME_EXTEND: Final = 30
_DELTA_BITS: Final = 27
_COMMON: Final = struct.Struct("<HBBi")
_MISSED: Final = 1 << 31
_MISSED_STORED: Final = 1 << 30

_HEADER_PAGE: Final = f"""\
\tfield: u64 timestamp;\toffset:0;\tsize:8;\tsigned:0;
\tfield: local_t commit;\toffset:8;\tsize:8;\tsigned:1;
\tfield: int overwrite;\toffset:8;\tsize:1;\tsigned:1;
\tfield: char data;\toffset:16;\tsize:{_ROOM};\tsigned:1;
"""
_HEADER_EVENT: Final = """\
# compressed entry header
\ttype_len    :    5 bits
\ttime_delta  :   27 bits
\tarray       :   32 bits

\tpadding     : type == 29
\ttime_extend : type == 30
\ttime_stamp : type == 31
\tdata max type_len  == 28
"""
_COMMON_FORMAT: Final = """\
\tfield:unsigned short common_type;\toffset:0;\tsize:2;\tsigned:0;
\tfield:unsigned char common_flags;\toffset:2;\tsize:1;\tsigned:0;
\tfield:unsigned char common_preempt_count;\toffset:3;\tsize:1;\tsigned:0;
\tfield:int common_pid;\toffset:4;\tsize:4;\tsigned:1;
"""
#: enum trace_flag_type, by our columns.
_FLAGS: Final = {"d": 0x01, "h": 0x08, "s": 0x10, "H": 0x18, "z": 0x40, "Z": 0x48}


class _Field(NamedTuple):
    name: str
    declared: str
    #: "i" and "I" 4 bytes, "Q" 8 (also an address), "s" text, "m" a mask of CPUs.
    code: str


class _Format(NamedTuple):
    system: str
    fields: tuple[_Field, ...]
    printed: str


def _int(name: str, kind: str = "int") -> _Field:
    return _Field(name, f"{kind} {name}", "i" if kind == "int" else "I")


def _address(name: str, kind: str = "void *") -> _Field:
    return _Field(name, f"{kind} {name}", "Q")


_CSD: Final = (_address("func"), _address("csd"))
_VEC: Final = "".join(f'{{ {n}, "{name}" }}, ' for n, name in enumerate(SOFTIRQS))
_SOFTIRQ: Final = _Format(
    "irq",
    (_int("vec", "unsigned int"),),
    '"vec=%u [action=%s]", REC->vec, __print_symbolic(REC->vec, '
    + _VEC.removesuffix(", ")
    + ")",
)
_VECTOR: Final = _Format("irq_vectors", (_int("vector"),), '"vector=%d", REC->vector')
_REASON: Final = _Format(
    "ipi", (_address("reason", "const char *"),), '"(%s)", REC->reason'
)
_FUNCTION: Final = _Format("csd", _CSD, '"func=%ps, csd=%p", REC->func, REC->csd')
_FORMATS: Final = {
    "csd_queue_cpu": _Format(
        "csd",
        (_int("cpu", "unsigned int"), _address("callsite"), *_CSD),
        '"cpu=%d callsite=%pS func=%ps csd=%p", REC->cpu, REC->callsite, REC->func,'
        " REC->csd",
    ),
    "csd_function_entry": _FUNCTION,
    "csd_function_exit": _FUNCTION,
    "ipi_send_cpu": _Format(
        "ipi",
        (_int("cpu", "unsigned int"), _address("callsite"), _address("callback")),
        '"cpu=%d callsite=%pS callback=%pS", REC->cpu, REC->callsite, REC->callback',
    ),
    "ipi_send_cpumask": _Format(
        "ipi",
        (
            _Field("cpumask", "__data_loc cpumask_t cpumask", "m"),
            _address("callsite"),
            _address("callback"),
        ),
        '"cpumask=%s callsite=%pS callback=%pS", __get_bitmask(cpumask),'
        " REC->callsite, REC->callback",
    ),
    "ipi_entry": _REASON,
    "ipi_exit": _REASON,
    "sched_wake_idle_without_ipi": _Format(
        "sched", (_int("cpu"),), '"cpu=%d", REC->cpu'
    ),
    "cpu_idle": _Format(
        "power",
        (_int("state", "u32"), _int("cpu_id", "u32")),
        '"state=%lu cpu_id=%lu", (unsigned long)REC->state, (unsigned long)REC->cpu_id',
    ),
    "softirq_raise": _SOFTIRQ,
    "softirq_entry": _SOFTIRQ,
    "softirq_exit": _SOFTIRQ,
    "irq_handler_entry": _Format(
        "irq",
        (_int("irq"), _Field("name", "__data_loc char[] name", "s")),
        '"irq=%d name=%s", REC->irq, __get_str(name)',
    ),
    "irq_handler_exit": _Format(
        "irq",
        (_int("irq"), _int("ret")),
        '"irq=%d ret=%s", REC->irq, REC->ret ? "handled" : "unhandled"',
    ),
    "cpuhp_enter": _Format(
        "cpuhp",
        (
            _int("cpu", "unsigned int"),
            _int("target"),
            _int("idx"),
            _address("fun"),
        ),
        '"cpu: %04u target: %3d step: %3d (%ps)", REC->cpu, REC->target, REC->idx,'
        " REC->fun",
    ),
}


def _format_of(name: str) -> _Format:
    return _FORMATS.get(name, _VECTOR)


def _offsets(form: _Format) -> list[tuple[_Field, int, int]]:
    """Return each field with its offset and size, aligned as the compiler does it."""
    found, at = [], _COMMON.size
    for one in form.fields:
        size = 8 if one.code == "Q" else 4
        at = -(-at // size) * size
        found.append((one, at, size))
        at += size
    return found


def _described(name: str, number: int) -> str:
    form = _format_of(name)
    fields = "".join(
        f"\tfield:{one.declared};\toffset:{at};\tsize:{size};"
        f"\tsigned:{int(one.code == 'i' or one.code in 'sm')};\n"
        for one, at, size in _offsets(form)
    )
    return (
        f"name: {name}\nID: {number}\nformat:\n{_COMMON_FORMAT}\n{fields}\n"
        f"print fmt: {form.printed}\n"
    )


class _Strings:
    """Addresses of texts that an event names by their address (``%s``)."""

    def __init__(self) -> None:
        self.places: dict[str, int] = {}

    def at(self, text: str) -> int:
        return self.places.setdefault(
            text, 0xFFFFFFFF82000000 + 0x40 * len(self.places)
        )


def _packed(event: Event, number: int, strings: _Strings) -> bytes:
    """Return an event as the kernel lays it out."""
    form = _offsets(_format_of(event.name))
    end = max((at + size for _, at, size in form), default=_COMMON.size)
    fixed, tail = bytearray(end), bytearray()
    flags = _FLAGS.get(event.flags[0], 0) | _FLAGS.get(event.flags[2], 0)
    _COMMON.pack_into(fixed, 0, number, flags, 0, event.pid)
    for one, at, _ in form:
        value: Any = event.fields.get(one.name, 1)  # irq_handler_exit: handled
        if one.code in "sm":
            if one.code == "s":
                data = str(value).encode() + b"\0"
            else:
                most = max(event.fields["ncpus"], value.bit_length())
                words = max(1, -(-most // 64))
                data = value.to_bytes(8 * words, "little")
            value = end + len(tail) | len(data) << 16
            tail += data
        elif isinstance(value, Pointer):
            value = value.address
        elif isinstance(value, str):
            value = strings.at(value)
        code = one.code if one.code not in "sm" else "I"
        struct.pack_into(f"<{code}", fixed, at, value)
    return bytes(fixed + tail)


class _Pages:
    """The ring buffer of one CPU, in pages."""

    def __init__(self, lost: int) -> None:
        self.done: list[bytes] = []
        self._lost = lost
        self._data = bytearray()
        self._begin = self._last = 0

    def add(self, at: int, payload: bytes) -> None:
        padded = payload + b"\0" * (-len(payload) % 4)
        delta = at - self._last
        # A page begins with the whole time; within it a record may be 2 ** 59 ns later.
        anew = not self._data or bool(delta >> _DELTA_BITS + 32)
        entry = self._entry(0 if anew else delta, padded)
        if anew or len(self._data) + len(entry) > _ROOM - 8:
            self._end()
            self._begin = at
            entry = self._entry(0, padded)
        self._data += entry
        self._last = at

    @staticmethod
    def _entry(delta: int, data: bytes) -> bytes:
        head = b""
        if delta >> _DELTA_BITS:
            low = delta & (1 << _DELTA_BITS) - 1
            head = struct.pack("<II", _TIME_EXTEND | low << 5, delta >> _DELTA_BITS)
            delta = 0
        words = len(data) // 4
        if words <= 28:
            return head + struct.pack("<I", words | delta << 5) + data
        return head + struct.pack("<II", delta << 5, len(data) + 4) + data

    def _end(self) -> None:
        if not self._data:
            return
        commit, data = len(self._data), bytes(self._data)
        if self._lost:
            # How many are missing before this page stands behind its data.
            commit |= _MISSED | _MISSED_STORED
            data += struct.pack("<Q", self._lost)
            self._lost = 0
        page = _PAGE_HEAD.pack(self._begin, commit) + data
        self.done.append(page.ljust(_PAGE, b"\0"))
        self._data.clear()

    def whole(self) -> bytes:
        self._end()
        return b"".join(self.done)


def _text(text: str) -> bytes:
    data = text.encode()
    return struct.pack("<I", len(data)) + data


def _long_text(text: str) -> bytes:
    data = text.encode()
    return struct.pack("<Q", len(data)) + data


def made(trace: Trace) -> bytes:
    """Return a recording as the bytes of a trace.dat file."""
    return _file(list(events(trace)), trace.ncpus, trace.lost)


def _symbols(found: Iterable[Event]) -> dict[int, str]:
    return {
        value.address: value.name
        for event in found
        for value in event.fields.values()
        if isinstance(value, Pointer) and value.address
    }


def _file(found: Sequence[Event], ncpus: int, lost: dict[int, int]) -> bytes:
    names = sorted({event.name for event in found})
    numbers = {name: 100 + n for n, name in enumerate(names)}
    strings = _Strings()
    cpus = max([ncpus, *(event.cpu + 1 for event in found)])
    pages = [_Pages(lost.get(cpu, 0)) for cpu in range(cpus)]
    for event in found:
        pages[event.cpu].add(
            event.time_ns, _packed(event, numbers[event.name], strings)
        )
    out = bytearray(b"\x17\x08\x44tracing6\0")
    out += struct.pack("<BBI", 0, 8, _PAGE)
    out += b"header_page\0" + _long_text(_HEADER_PAGE)
    out += b"header_event\0" + _long_text(_HEADER_EVENT)
    out += struct.pack("<I", 0)  # formats of ftrace's own events: none is in it
    systems: dict[str, list[str]] = {}
    for name in names:
        systems.setdefault(_format_of(name).system, []).append(name)
    out += struct.pack("<I", len(systems))
    for system, members in systems.items():
        out += system.encode() + b"\0" + struct.pack("<I", len(members))
        for name in members:
            out += _long_text(_described(name, numbers[name]))
    symbols = _symbols(found)
    out += _text("".join(f"{at:016x} T {symbols[at]}\n" for at in sorted(symbols)))
    out += _text(
        "".join(f'0x{at:x} : "{text}"\n' for text, at in strings.places.items())
    )
    tasks = {event.pid: event.task for event in found}
    out += _long_text("".join(f"{pid} {tasks[pid]}\n" for pid in sorted(tasks)))
    out += struct.pack("<I", cpus)
    out += b"options  \0" + struct.pack("<H", 0)
    out += b"flyrecord\0"
    return _with_data(bytes(out), [page.whole() for page in pages])


def _with_data(head: bytes, data: Sequence[bytes]) -> bytes:
    aligned: Callable[[int], int] = lambda at: -(-at // _PAGE) * _PAGE  # noqa: E731
    at = aligned(len(head) + 16 * len(data))
    table, body = bytearray(), bytearray()
    start = at
    for part in data:
        table += struct.pack("<QQ", start + len(body), len(part))
        body += part
    return (head + bytes(table)).ljust(at, b"\0") + bytes(body)
