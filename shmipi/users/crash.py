"""Crash dump: a CPU's death by a signal, or ``panic``, stops the others.

``arm(PATH)``, or ``Cluster(crash=PATH)``: from then on the first CPU that a signal
kills (a native handler's SIGSEGV, ``kill -9``), or that calls ``panic``, makes the
firmware send an NMI to all others (``nmi_shootdown_cpus``). Each saves what it was
doing, and stops. One JSON file says it all, within a second, also of the dead and of
those that did not answer, who are named as missing; ``shmipi crash FILE`` reads it. By
default the death of a CPU is its own.
"""

from __future__ import annotations

import errno
import logging
import os
import time
from functools import partial
from pathlib import Path

from shmipi.machine.arrays import Arrays, here
from shmipi.users.state import state
from shmipi.users.stop import smp_send_stop

__all__ = ["Crash", "arm", "armed", "disarm", "panic"]

_log = logging.getLogger("shmipi.crash")
_PATH_MOST = 900


def arm(path: str | os.PathLike[str], *, home: Arrays | None = None) -> Path:
    """Make a crash dump from now on; return the file that it will be.

    ``path`` is a file, or a folder in which it gets the machine's name. After a crash
    it has to be armed again. Raises ``OSError`` (ENOENT, EACCES, ENOTDIR ...) where
    there can be no such file, ENAMETOOLONG for a path of more than 900 bytes.
    """
    home = here() if home is None else home
    machine = home.machine
    file = Path(os.path.abspath(path))
    if len(os.fsencode(file)) > _PATH_MOST:
        raise OSError(errno.ENAMETOOLONG, os.strerror(errno.ENAMETOOLONG), str(path))
    if file.is_dir():
        file /= f"shmipi-crash-{machine.name}.json"
    if not os.access(file.parent, os.W_OK | os.X_OK):
        code = errno.EACCES if file.parent.is_dir() else errno.ENOENT
        raise OSError(code, os.strerror(code), str(file.parent))
    for user, nbytes in (
        ("crash", machine.crash_bytes()),
        ("stop", machine.send_stop_bytes()),
    ):
        if not machine.user_offset(user):
            state(home, user, nbytes)
    machine.crash_arm(os.fsencode(file))
    return file


def disarm(*, home: Arrays | None = None) -> None:
    """Make no crash dump any more."""
    (here() if home is None else home).machine.crash_disarm()


def armed(*, home: Arrays | None = None) -> Path | None:
    """Return the file that a crash would make, or None."""
    path = (here() if home is None else home).machine.crash_path()
    return None if path is None else Path(os.fsdecode(path))


def panic(message: str, *, home: Arrays | None = None) -> None:
    """End the machine's CPUs: this one by SIGABRT, after it has stopped the others.

    Armed, the firmware stops them and writes the crash dump, with the message; of two
    that panic the first counts. Not armed, this is ``smp_send_stop``. In the host it
    returns then, when all CPUs have been told; on a CPU it does not return.
    """
    home = here() if home is None else home
    machine = home.machine
    me = f"CPU {machine.id}" if machine.is_cpu else "the host"
    _log.critical(f"Kernel panic - not syncing: {message} ({me})")
    if not machine.crash_armed():
        smp_send_stop(home=home)
    elif not machine.panic(message):
        while machine.is_cpu:  # panic_smp_self_stop(): the first one stops this CPU
            time.sleep(1)
    if machine.is_cpu:
        os.abort()


class Crash:
    """The module, for the host of one machine: ``cluster.users.crash``."""

    def __init__(self, home: Arrays) -> None:
        self.arm = partial(arm, home=home)
        self.disarm = partial(disarm, home=home)
        self.armed = partial(armed, home=home)
        self.panic = partial(panic, home=home)
