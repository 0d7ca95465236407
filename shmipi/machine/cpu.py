"""What a forked process does to be a CPU."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from typing import TYPE_CHECKING, NoReturn

from shmipi import _core

if TYPE_CHECKING:
    from shmipi.machine.firmware import Firmware

__all__ = ["become"]


def become(firmware: Firmware, number: int) -> NoReturn:
    """Turn this freshly forked child of the firmware into CPU ``number``.

    The kick signal is blocked here; ``online()`` unblocks it once the slot is taken.
    """
    status = 1
    try:
        _core.die_with_parent(firmware.config["firmware_pid"])
        _let_go(firmware)
        machine = firmware.machine
        machine.become(number)
        os.sched_setaffinity(0, {machine.slot(number)[2]})
        _own_randomness()
        firmware.arrays.make_current()
        machine.set_current(True)
        # A task may fork: its child is no CPU.
        os.register_at_fork(after_in_child=machine.disown)
        machine.online()
        machine.cpu_loop()
        status = 0
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError, AttributeError):
                stream.flush()
        os._exit(status)


def _let_go(firmware: Firmware) -> None:
    """Give up what is the firmware's alone. The segment stays open: its lock is ours."""
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    firmware.selector.close()
    os.close(firmware.wake_r)
    os.close(firmware.wake_w)
    os.close(firmware.host)
    firmware.control.close()


def _own_randomness() -> None:
    """Forked generators are alike; `random` reseeds itself, numpy's must be told."""
    module = sys.modules.get("numpy.random")
    if module is not None:
        module.seed()
