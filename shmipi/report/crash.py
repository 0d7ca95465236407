"""A crash dump in words: what every CPU was doing, and who waited for whom."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any, Final

from shmipi.errors import CommandError

__all__ = ["read", "text", "waits"]

_FORMAT: Final = "shmipi-crash"
_VERSION: Final = 1
_MOST = 1 << 30  # bytes of a file that is one

#: What has to be there, and of which kind it is.
_DOCUMENT: Final[dict[str, Any]] = {
    "machine": str,
    "controller": str,
    "ncpus": int,
    "waited_s": (int, float),
    "cause": dict,
    "dead": list,
    "missing": list,
    "cpus": list,
}
_CPU: Final[dict[str, Any]] = {
    "cpu": int,
    "state": str,
    "task": (str, type(None)),
    "handler": (str, type(None)),
    "executing": (dict, type(None)),
    "queue": list,
    "pending_lines": list,
    "counters": dict,
    "saved": bool,
    "interrupts_disabled": bool,
    "stack": (list, type(None)),
}
_CALL: Final[dict[str, Any]] = {
    "to": int,
    "from": str,
    "type": str,
    "function": (str, type(None)),
}


def read(path: str) -> dict[str, Any]:
    """Return what is in the file. ``CommandError`` of one line for what is no dump."""
    try:
        with open(path, "rb") as file:
            data = file.read(_MOST + 1)
    except OSError as error:
        raise CommandError(f"{path} cannot be read: {error.strerror}") from None
    try:
        found = json.loads(data)
    except (ValueError, RecursionError):
        raise CommandError(f"{path} is no crash dump, or is cut short") from None
    if not isinstance(found, dict) or found.get("format") != _FORMAT:
        raise CommandError(f"{path} is no crash dump of shmipi")
    if found.get("version") != _VERSION:
        raise CommandError(
            f"{path} is a crash dump of version {found.get('version')!r}, this shmipi"
            f" reads {_VERSION}"
        )
    try:
        _check(found)
    except _Damaged as error:
        raise CommandError(f"{path} is damaged: {error}") from None
    return found


class _Damaged(Exception):
    pass


def _check(found: dict[str, Any]) -> None:
    _has(found, _DOCUMENT, "")
    _has(found["cause"], {"text": str}, "cause: ")
    for number, cpu in enumerate(found["cpus"]):
        where = f"CPU {number}: "
        if not isinstance(cpu, dict):
            raise _Damaged(f"{where}it is no object")
        _has(cpu, _CPU, where)
        for call in cpu["queue"]:
            if not isinstance(call, dict):
                raise _Damaged(f"{where}a call is no object")
            _has(call, _CALL, where)
        for line in cpu["stack"] or ():
            if not isinstance(line, str):
                raise _Damaged(f"{where}its stack is no text")


def _has(found: dict[str, Any], kinds: dict[str, Any], where: str) -> None:
    for name, kind in kinds.items():
        value = found.get(name)
        if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
            raise _Damaged(f"{where}{name} is {value!r}"[:120])


def waits(found: dict[str, Any]) -> Iterator[tuple[str, int, str | None]]:
    """Yield who waited for which CPU, for what function."""
    for cpu in found["cpus"]:
        for call in cpu["queue"]:
            if call["type"] == "sync":
                yield call["from"], call["to"], call["function"]


def text(found: dict[str, Any]) -> str:
    """Return it as a person reads it."""
    cpus = {cpu["cpu"]: cpu for cpu in found["cpus"]}
    lines = [
        f"machine {found['machine']} ({found['controller']}, {found['ncpus']} CPUs):"
        f" {found['cause']['text']}",
        f"missing: {', '.join(map(str, found['missing'])) or 'none'}"
        f" (waited {found['waited_s']:.3f} s)",
        "",
        "who waited for whom:",
    ]
    found_waits = [
        f"  {who} waited for CPU {cpu}: {function or '?'}"
        f" ({_doing(cpus[cpu]) if cpu in cpus else '?'})"
        for who, cpu, function in waits(found)
    ]
    lines += found_waits or ["  nobody"]
    for cpu in found["cpus"]:
        lines += ["", f"CPU {cpu['cpu']}: {cpu['state']}, {_doing(cpu)}"]
        executing = cpu["executing"]
        if executing is not None:
            lines.append(
                f"  executes {executing.get('function')}({executing.get('info')}) for"
                f" {executing.get('from')}"
            )
        if cpu["queue"]:
            lines.append(f"  has in hand: {', '.join(map(_call, cpu['queue']))}")
        if cpu["pending_lines"]:
            lines.append(f"  pending: {', '.join(map(str, cpu['pending_lines']))}")
        lines += [f"  {line.strip()}" for line in (cpu["stack"] or ())[1:]]
        if not cpu["saved"]:
            lines.append("  (it has saved nothing)")
    return "\n".join(_plain(line) for line in lines) + "\n"


def _call(call: dict[str, Any]) -> str:
    return f"{call['function'] or '?'} ({call['type']}, from {call['from']})"


def _doing(cpu: dict[str, Any]) -> str:
    words = []
    if cpu["handler"]:
        words.append(f"handler {cpu['handler']}")
    elif cpu["executing"] is not None:
        words.append(f"native handler {cpu['executing'].get('function')}")
    if cpu["task"]:
        words.append(f"task {cpu['task']}")
    if cpu["interrupts_disabled"]:
        words.append("interrupts disabled")
    return ", ".join(words) or "idle"


def _plain(line: str) -> str:
    return "".join(c if c.isprintable() else "?" for c in line)
