"""The shared-memory object of a machine: made, found, locked, removed.

A machine is one object ``/shmipi.UID.NAME`` of mode 0600. It is alive while somebody
holds a shared ``flock`` on it: the host, the firmware and its CPUs do, and the kernel
drops the locks of a dead process. So liveness never depends on a pid, which means
nothing in another PID namespace that shares /dev/shm.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
import struct
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from shmipi.errors import BootError
from shmipi.machine import doorbells

__all__ = [
    "SHM",
    "Found",
    "check_name",
    "create",
    "find",
    "open_segment",
    "publish",
    "remove",
]

SHM = Path("/dev/shm")
_PREFIX = "shmipi"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,31}")
_MAGIC = b"shmipi\n\x1a"
_HEAD = struct.Struct("<8sII64s")  # the first 80 bytes: the same in every version
_YOUNG_S = 10.0  # of another version, without a header: it may be about to get one


@dataclass(frozen=True)
class Found:
    """A machine's object in /dev/shm, of any version of shmipi."""

    name: str
    uid: int
    path: Path
    abi: int | None  #: layout version; None: not (yet) a machine
    alive: bool  #: somebody holds its lock

    @property
    def full_name(self) -> str:
        """``shmipi.UID.NAME``: also the prefix of its semaphores and queues."""
        return self.path.name


def check_name(name: str | None) -> str:
    """Return ``name``, or a random one for None. ``ValueError`` for an unusable one."""
    if name is None:
        return os.urandom(4).hex()
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise ValueError(
            f"name is {name!r}: a machine's name has 1 to 32 letters, digits, '-' or"
            " '_'"
        )
    return name


def full_name(name: str) -> str:
    """Return ``shmipi.UID.NAME`` for a machine of this user."""
    return f"{_PREFIX}.{os.getuid()}.{name}"


def create(name: str) -> int:
    """Make and lock the object of a machine, without a name yet: its descriptor.

    ``publish`` gives it one when there is somebody to take it away again; until then it
    ends with the last who has it open. Raises ``BootError``: EEXIST when the name is
    taken, another errno when there is no usable /dev/shm.
    """
    if (SHM / full_name(name)).exists():
        raise BootError(name_is_taken(name), errno=errno.EEXIST)
    try:
        return _locked(SHM, os.O_TMPFILE)
    except OSError as error:
        raise BootError(
            f"no shared memory ({error.strerror}): shmipi needs a writable tmpfs at"
            " /dev/shm (mount -t tmpfs tmpfs /dev/shm)",
            errno=error.errno,
        ) from None


def _locked(path: Path, flags: int) -> int:
    """Open it with these flags besides, and lock it shared: the descriptor."""
    fd = -1
    try:
        fd = os.open(path, flags | os.O_RDWR | os.O_CLOEXEC, 0o600)
        fcntl.flock(fd, fcntl.LOCK_SH)
        return fd
    except BaseException:  # Ctrl-C, too
        if fd != -1:
            os.close(fd)
        raise


def publish(fd: int, full: str) -> None:
    """Give what ``create`` made the machine's full name. ``FileExistsError``.

    So what bears a machine's name is complete and locked from its first moment.
    """
    # With a directory's descriptor, which is not looked at: else Python calls link(),
    # which would make a link to the link in /proc.
    os.link(f"/proc/self/fd/{fd}", SHM / full, src_dir_fd=fd, follow_symlinks=True)


def name_is_taken(name: str) -> str:
    """Return what is said to who wants the name of another machine."""
    return (
        f"a machine named {name} exists already: choose another name, or remove it"
        " with `shmipi clean` if it is dead (`shmipi ps` shows)"
    )


def open_segment(full: str) -> int:
    """Open a machine's object by its full name; the descriptor is locked shared.

    A new open file description: its lock is not the creator's. ``FileNotFoundError``
    when it is gone.
    """
    return _locked(SHM / full, os.O_NOFOLLOW)


def find(*, every_user: bool = False) -> Iterator[Found]:
    """Yield the machines in /dev/shm, by name; those of others only if readable."""
    pattern = re.compile(rf"{_PREFIX}\.(\d+)\.([^.]+)")
    try:
        entries = sorted(SHM.iterdir())
    except OSError:
        return
    for path in entries:
        match = pattern.fullmatch(path.name)
        if not match or not (every_user or int(match[1]) == os.getuid()):
            continue
        with contextlib.suppress(OSError):
            yield _look(path, int(match[1]), match[2])


def _look(path: Path, uid: int, name: str) -> Found:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    try:
        head = os.pread(fd, _HEAD.size, 0)
        magic, abi = (b"", 0)
        if len(head) == _HEAD.size:
            magic, abi, _, _ = _HEAD.unpack(head)
        is_machine = magic == _MAGIC
        alive = not _try_lock(fd)
        if not is_machine and time.time() - os.fstat(fd).st_mtime < _YOUNG_S:
            alive = True
        return Found(name, uid, path, abi if is_machine else None, alive)
    finally:
        os.close(fd)


def _try_lock(fd: int) -> bool:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def identity(fd: int) -> tuple[int, int]:
    """Return what tells a machine's object from a later one of the same name."""
    status = os.fstat(fd)
    return status.st_dev, status.st_ino


def remove(full: str, which: tuple[int, int], ncpus: int = 0) -> None:
    """Unlink a machine's object and the semaphores and queues that bear its name.

    Only if the name still stands for the object ``which`` (see ``identity``): another
    machine may have taken the name since this one was removed.
    """
    import posix_ipc

    with contextlib.suppress(OSError, posix_ipc.Error):
        status = os.stat(SHM / full)
        if (status.st_dev, status.st_ino) != which:
            return
        doorbells.unlink(full, ncpus)
        posix_ipc.unlink_shared_memory("/" + full)


def clean(*, every_user: bool = False) -> list[Found]:
    """Remove what dead machines left; return them. Live ones are never touched.

    The object is removed while its exclusive lock is held, so one cleaner wins and a
    machine that is being booted under the name is not hit.
    """
    removed = []
    for found in find(every_user=every_user):
        if found.alive:
            continue
        with contextlib.suppress(OSError):
            fd = os.open(found.path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
            try:
                if _try_lock(fd) and _still_dead(fd, found.path):
                    head = os.pread(fd, 4096, 0)
                    os.unlink(found.path)
                    doorbells.unlink(found.full_name, _ncpus(head))
                    removed.append(found)
            finally:
                os.close(fd)
    removed += _remove_orphans(every_user)
    return removed


def _still_dead(fd: int, path: Path) -> bool:
    """Is what we hold the exclusive lock of what the name stands for, and not newborn?

    Between the look and the lock another cleaner may have removed the object and a new
    machine taken the name; until its host has locked it, its age protects it.
    """
    ours, named = os.fstat(fd), path.stat()
    if (ours.st_dev, ours.st_ino) != (named.st_dev, named.st_ino):
        return False
    return os.pread(fd, 8, 0) == _MAGIC or time.time() - ours.st_mtime >= _YOUNG_S


def _ncpus(head: bytes) -> int:
    """CPUs in a header of this version's layout, else 0: only a hint for names."""
    from shmipi import _core

    if (
        len(head) < 256
        or head[:8] != _MAGIC
        or head[8:12] != struct.pack("<I", _core.ABI)
    ):
        return 0
    (ncpus,) = struct.unpack_from("<I", head, _core.NCPUS_OFFSET)
    return min(int(ncpus), _core.MAX_CPUS)


def orphans(*, every_user: bool = False) -> dict[str, Path]:
    """Return what has a doorbell's name although its machine's object is gone.

    By the machine's full name, one file of each; nothing that is young.
    """
    user = r"\d+" if every_user else str(os.getuid())
    found = {}
    for full, path in doorbells.named(rf"{_PREFIX}\.{user}\.[^.]+"):
        with contextlib.suppress(OSError):
            old = time.time() - path.stat().st_mtime >= _YOUNG_S
            if old and not (SHM / full).exists():
                found[full] = path
    return found


def _remove_orphans(every_user: bool) -> list[Found]:
    removed = []
    for full in orphans(every_user=every_user):
        if doorbells.unlink(full):
            _, uid, name = full.split(".", 2)
            removed.append(Found(name, int(uid), SHM / full, None, alive=False))
    return removed
