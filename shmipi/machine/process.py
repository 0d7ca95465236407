"""What this process is in a machine, and whether it may make one of its own."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from types import FrameType
from typing import Final

from shmipi import _core
from shmipi.errors import ClusterStateError, ImportBootError

__all__ = ["LOOKED_NS", "check_may_boot", "core_time", "enter", "is_part", "is_stopped"]

#: So long on a core is enough for a CPU to look at what it has been told.
LOOKED_NS: Final = 30_000_000

_inside = False  # in the firmware, and for good in all that is forked from it
_member = 0  # the pid of a firmware or coprocessor; a CPU is known to the core


def enter() -> None:
    """This process is the firmware or a coprocessor of a machine."""
    global _inside, _member
    _inside, _member = True, os.getpid()


def is_part() -> bool:
    """Is this process part of a machine, and not the child of one that is?"""
    return _member == os.getpid() or _core.cpu_context() != _core.NO_CPU


def is_stopped(pid: int) -> bool:
    """Is the process stopped, by SIGSTOP or a debugger?"""
    try:
        state = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()[0]
    except (OSError, IndexError):
        return False
    return state in (b"T", b"t")


def core_time(pid: int) -> tuple[str, int]:
    """Return the state of a process, and how many ns it has had a core.

    "T": it is stopped, or gone.
    """
    try:
        with open(f"/proc/{pid}/stat") as stat:
            state = stat.read().rpartition(")")[2].split()[0]
        with open(f"/proc/{pid}/schedstat") as schedstat:
            had = int(schedstat.read().split()[0])
    except (OSError, IndexError, ValueError):
        return "T", 0
    # Dead, and its parent, which waits for a core as well, has not looked yet.
    return ("T" if state in "ZX" else state), had


def check_may_boot() -> None:
    """Refuse a machine where none may be made. ``ClusterStateError``.

    The top level of a program, imported on a CPU for the sake of a function in it,
    would boot the machine again whose CPUs import it again, and so on without end.
    """
    if not _inside:
        return
    culprit = _imported()
    if culprit is not None:
        raise ImportBootError(
            f"{culprit} makes a Cluster at its top level, and is being imported on a"
            " CPU: a CPU imports the file or module whose function it is to run, so"
            " what boots a machine belongs under\n\n"
            '    if __name__ == "__main__":\n'
            "        with Cluster(4) as cluster:\n"
            "            ..."
        )
    if _core.cpu_context() == _core.CPU_HANDLER:
        raise ClusterStateError(
            "an interrupt handler cannot boot a machine, which takes long and sleeps:"
            " do it in a task (cluster.run)"
        )


def _imported() -> str | None:
    """Return "FILE, line N" of the innermost module that this thread imports."""
    frame: FrameType | None = sys._getframe(1)
    where = None
    while frame is not None:
        code = frame.f_code
        if where is None and code.co_name == "<module>":
            where = f"{code.co_filename}, line {frame.f_lineno},"
        elif code.co_filename.startswith("<frozen importlib"):
            return where or "a module"
        frame = frame.f_back
    return None
