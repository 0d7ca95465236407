"""What ``ps`` and ``top`` show of a machine's processes: ``shmipi[lab] CPU 3``."""

from __future__ import annotations

import os

import setproctitle

__all__ = ["show"]

_READY = False


def show(machine: str, role: str) -> None:
    """Let this process be shown as this part of the machine of that name."""
    global _READY
    if not _READY:
        _prepare()
        _READY = True
    setproctitle.setproctitle(f"shmipi[{machine}] {role}")


def _prepare() -> None:
    """Have titles written where the arguments were, and no further.

    The library would use the environment's place as well, and /proc/PID/environ, by
    which people and programs know processes, would be gone.
    """
    key = "SPT_NOENV"
    before = os.environ.get(key)
    os.environ[key] = "1"
    try:
        setproctitle.getproctitle()
    finally:
        if before is None:
            del os.environ[key]
        else:
            os.environ[key] = before
