"""What the firmware writes of a machine that has crashed: one JSON file.

The firmware outlives the CPUs, so it is in the place of the kernel that a crash boots:
it has every other CPU save itself and stop, and then reads what the segment says of
all of them, the dead included.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

from shmipi import _core
from shmipi.machine import inspect, remote
from shmipi.machine.ending import ending

__all__ = ["FORMAT", "VERSION", "crash"]

FORMAT: Final = "shmipi-crash"
VERSION: Final = 1

_WAIT_S = 0.9  # nmi_shootdown_cpus waits for a second: the file is there within one
_LOOK_S = 0.001
_TYPES = {0x00: "async", 0x10: "sync", 0x20: "irq_work", 0x30: "task"}


def crash(
    machine: _core.Machine,
    chip: Any,
    ends: dict[int, int],
    end_of: Callable[[int], int | None],
    stops: Callable[[int], bool],
) -> str:
    """Stop the others, write the file; return what is to be said of it.

    ``ends`` has how CPUs have ended that died by a signal; none: a host's panic.
    ``end_of`` asks how a CPU's process has ended (None: it has not), ``stops`` whether
    it is stopped. ""
    when there was a crash before: only the first one counts, and the caller warns.
    """
    begun = time.monotonic()
    when = time.time()
    asked = machine.crash_shootdown()
    if asked < 0:
        return ""
    cpus = range(machine.ncpus)
    told = [cpu for cpu in cpus if machine.crash_asked(cpu)]
    deadline = begun + _WAIT_S
    while machine.crash_waiting() and time.monotonic() < deadline:
        told = [cpu for cpu in told if machine.crash_asked(cpu) and end_of(cpu) is None]
        if not told:
            break
        time.sleep(_LOOK_S)
    missing = []
    for cpu in cpus:
        if machine.crash_asked(cpu):  # it has not answered: it died meanwhile, or hangs
            end = end_of(cpu)
            if end is None:
                missing.append(cpu)
            elif end:
                ends.setdefault(cpu, end)
    panicked = machine.crash_panic()
    document = {
        "format": FORMAT,
        "version": VERSION,
        "machine": machine.name,
        "controller": chip.name,
        "nmi": not machine.has_no_nmi(),
        "ncpus": machine.ncpus,
        "time": when,
        "waited_s": round(time.monotonic() - begun, 6),
        "cause": _cause(machine, ends, panicked),
        "dead": sorted(ends),
        "missing": missing,
        "cpus": _cpus(machine, chip, ends, missing, stops),
    }
    path = machine.crash_path()
    assert path is not None
    text = _write(os.fsdecode(path), document)
    machine.crash_disarm()
    words = f"{document['cause']['text']}: {text}"
    if missing:
        words += f"; CPUs that did not answer: {', '.join(map(str, missing))}"
    return words


def _cause(
    machine: _core.Machine,
    ends: Mapping[int, int],
    panicked: tuple[int, str] | None,
) -> dict[str, Any]:
    if panicked is not None:
        slot, message = panicked
        cpu = slot if slot < machine.ncpus else None
        who = "the host" if cpu is None else f"CPU {cpu}"
        text = f"{who} called panic(): {message}"
        return {"kind": "panic", "cpu": cpu, "message": message, "text": text}
    cpu = next(iter(ends))
    how = ending(ends[cpu])
    text = f"CPU {cpu} was {how}"
    return {"kind": "signal", "cpu": cpu, "message": how, "text": text}


def _write(path: str, document: dict[str, Any]) -> str:
    """Write the file whole, or not at all; say where it is, or why not."""
    part = f"{path}.{os.getpid()}"
    try:
        file = os.open(
            part, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600
        )
        with os.fdopen(file, "w", encoding="utf-8") as stream:
            json.dump(document, stream, indent=1)
            stream.write("\n")
        Path(part).replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            Path(part).unlink()
        return f"no crash dump, {path}: {error.strerror}"
    return f"crash dump in {path}"


def _cpus(
    machine: _core.Machine,
    chip: Any,
    ends: Mapping[int, int],
    missing: list[int],
    stops: Callable[[int], bool],
) -> list[dict[str, Any]]:
    calls = _calls(machine)
    counters = inspect.counters_of(machine)
    names = {line.number: line.name for line in chip.lines(machine.ncpus)}
    return [
        _cpu(machine, chip, cpu, ends, missing, stops, calls, counters[cpu], names)
        for cpu in range(machine.ncpus)
    ]


def _cpu(
    machine: _core.Machine,
    chip: Any,
    cpu: int,
    ends: Mapping[int, int],
    missing: list[int],
    stops: Callable[[int], bool],
    calls: list[dict[str, Any]],
    counters: Any,
    names: dict[int, str],
) -> dict[str, Any]:
    slot = machine.slot(cpu)
    waiting, _, masked = machine.crash_slot(cpu)
    kind, handler, begun, task = machine.doing(cpu)
    executing = machine.cur_csd(cpu)
    save = machine.crash_save(cpu)
    state = "stopped" if machine.stopped(cpu) else "running"
    if cpu in ends:
        state = ending(ends[cpu])
    elif cpu in missing:
        state = "missing"
    elif slot.state in (_core.OFFLINE, _core.CPU_DEAD) and state != "stopped":
        state = "offline"
    entry: dict[str, Any] = {
        "cpu": cpu,
        "pid": slot.pid,
        "generation": slot.generation,
        "state": state,
        "task": task,
        "handler": handler,
        "handler_s": max(0, time.monotonic_ns() - begun) / 1e9
        if kind and begun
        else None,
        "executing": None,
        "waits_for": _waits_for(machine, waiting, calls),
        "queue": [call for call in calls if call["to"] == cpu],
        "pending_lines": [names.get(n, str(n)) for n in chip.pending_lines(cpu)],
        "in_service": [names.get(n, str(n)) for n in chip.in_service(cpu)],
        "counters": {
            name: int(n) for name, n in zip(_core.COUNTERS, counters, strict=False) if n
        },
        "interrupts_disabled": bool(masked),
        "saved": save is not None,
        "stack": None,
    }
    if executing is not None:
        found = next((call for call in calls if call["csd"] == executing[0]), None)
        entry["executing"] = {
            "function": executing[1],
            "info": executing[2],
            "csd": executing[0],
            "from": found["from"] if found else None,
        }
    if save is not None:
        entry["stack"] = (save.pop("text") or "").splitlines()
        entry.update(save)
    elif cpu in missing:
        entry["process_stopped"] = stops(cpu)
        stack = machine.stack_of(cpu)
        if stack:
            entry["stack"] = ["read from outside:", *stack.splitlines()]
    return entry


def _who(machine: _core.Machine, slot: int) -> str:
    if slot < machine.ncpus:
        return f"CPU {slot}"
    return "host" if slot == machine.ncpus else f"host {slot - machine.ncpus}"


def _waits_for(
    machine: _core.Machine, word: int, calls: list[dict[str, Any]]
) -> dict[str, Any] | None:
    target, csd = (word & 0xFFFF) - 1, (word >> 32) - 1
    if target < 0:
        return None
    found = next((call for call in calls if call["csd"] == csd), None)
    return {
        "cpu": target,
        "function": found["function"] if found else None,
        "interrupts_disabled": bool(word & 0x10000),
        "answered": found is None,
    }


def _calls(machine: _core.Machine) -> list[dict[str, Any]]:
    """Return every call that a CPU has in hand, or in its queue."""
    found = []
    for to, sender, csd, kind, begun, native, pickled in machine.crash_calls():
        found.append(
            {
                "to": to,
                "from": _who(machine, sender),
                "csd": csd,
                "type": _TYPES.get(kind, "?"),
                "begun": bool(begun),
                "function": native or _name_in(pickled),
            }
        )
    return found


def _name_in(pickled: bytes | None) -> str | None:
    """Return the name of the function that a pickle is of: that is not unpickled."""
    _, mark, name = (pickled or b"").rpartition(remote.NAME_MARK)
    if not mark:
        return None
    return name.decode("utf-8", "replace") or None
