"""How a CPU's process ended, as number and in words."""

from __future__ import annotations

import os
import signal

from shmipi import _core

__all__ = ["ending", "ending_number"]


def ending_number(info: os.waitid_result) -> int:
    """Return what ``waitid`` told of a child that has ended, as a slot holds it."""
    if info.si_code == os.CLD_EXITED:
        return _core.END_EXITED | info.si_status & 0xFF
    return info.si_status


def ending(number: int) -> str:
    """Say it, such as "killed by SIGKILL" or "exited with status 3"; "": not known."""
    if number & _core.END_STOPPED:
        return "stopped by smp_send_stop or a crash"
    if number & _core.END_EXITED:
        return f"exited with status {number & 0xFF}"
    if not number:
        return ""
    try:
        return f"killed by {signal.Signals(number).name}"
    except ValueError:
        return f"killed by signal {number}"
