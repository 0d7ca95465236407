"""The kernel's own trace: an instance of tracefs that is nobody else's.

Nothing global is written: events are switched on in an instance alone, which is removed
in the end. Where tracefs is not mounted it is had by a mount that is in no directory
(``fsmount``), and gone with its descriptor.

Who has an instance holds a lock on its directory. Where that is free its owner is dead,
in whichever container it was: ``clean`` removes such instances.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import gzip
import lzma
import os
import re
import secrets
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Final, NamedTuple, Self, cast

from shmipi.errors import TracefsError

__all__ = ["IPI_EVENTS", "PREFIX", "Instance", "Saved", "clean", "leftovers"]

#: What the names of instances begin with; the pid of their owner follows.
PREFIX: Final = "shmipi"
#: What sends IPIs and calls, and what is entered and left because of them: x86's
#: vectors, and `ipi_entry` and `ipi_exit` of arm64 and others.
IPI_EVENTS: Final = (
    *("csd/csd_queue_cpu", "csd/csd_function_entry", "csd/csd_function_exit"),
    *("ipi/ipi_send_cpu", "ipi/ipi_send_cpumask", "ipi/ipi_entry", "ipi/ipi_exit"),
    *("irq_vectors/call_function_entry", "irq_vectors/call_function_exit"),
    "irq_vectors/call_function_single_entry",
    "irq_vectors/call_function_single_exit",
    *("irq_vectors/reschedule_entry", "irq_vectors/reschedule_exit"),
)
#: The same numbers on every architecture.
_FSOPEN, _FSCONFIG, _FSMOUNT = 430, 431, 432
_FSCONFIG_CMD_CREATE: Final = 6
_CLOEXEC: Final = 1
_MOUNTS: Final = Path("/proc/self/mounts")
_ROOT: Final = "it takes root (CAP_SYS_ADMIN), as with sudo"
_WHAT_TO_DO: Final = {
    errno.EPERM: _ROOT,
    errno.EACCES: _ROOT,
    errno.ENODEV: "this kernel has no tracefs (CONFIG_TRACING)",
    errno.ENOSYS: "mount it first: mount -t tracefs nodev /sys/kernel/tracing",
    errno.ENOMEM: "there is no memory for its buffers: give them less",
    errno.EBUSY: "somebody reads it",
}
_ESCAPED: Final = re.compile(r"\\([0-7]{3})")
_WRITTEN: Final = re.compile(rb"# entries-in-buffer/entries-written: (\d+)/")
#: Of `per_cpu/cpu*/stats`: what was recorded, and is not in the buffer.
_LOST: Final = re.compile(r"^(?:overrun|commit overrun|dropped events): (\d+)$", re.M)


def _refused(error: OSError, what: str) -> TracefsError:
    code = error.errno or errno.EIO
    why = _WHAT_TO_DO.get(code, os.strerror(code))
    return TracefsError(f"{what}: {why}", errno=code)


def _syscall(number: int, *args: object) -> int:
    libc = ctypes.CDLL(None, use_errno=True)
    found = int(libc.syscall(number, *args))
    if found < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    return found


def _mount() -> int:
    """Return a descriptor of tracefs, mounted nowhere. ``OSError``: not permitted."""
    context = _syscall(_FSOPEN, b"tracefs", _CLOEXEC)
    try:
        none = ctypes.c_void_p()
        _syscall(_FSCONFIG, context, _FSCONFIG_CMD_CREATE, none, none, 0)
        return _syscall(_FSMOUNT, context, _CLOEXEC, 0)
    finally:
        os.close(context)


def _mounted() -> Path | None:
    """Return where tracefs is mounted, if instances can be made there."""
    # Not by a look at /sys/kernel/debug/tracing: that would mount one, for everybody.
    for line in _MOUNTS.read_text(errors="replace").splitlines():
        words = line.split(" ")
        if len(words) > 2 and words[2] == "tracefs":
            path = _ESCAPED.sub(lambda found: chr(int(found[1], 8)), words[1])
            if os.access(Path(path, "instances"), os.W_OK):
                return Path(path)
    return None


def _opened() -> tuple[Path, int]:
    """Return the root of tracefs, and the descriptor that keeps it there or -1."""
    root = _mounted()
    if root is not None:
        return root, -1
    try:
        mount = _mount()
    except OSError as error:
        raise _refused(error, "the kernel's tracefs cannot be had") from None
    return Path(f"/proc/self/fd/{mount}"), mount


class Saved(NamedTuple):
    """How many events were written to a file, and how many are missing there."""

    events: int
    lost: int


class Instance:
    """An instance of tracefs: made, recording into its own buffers, and removed.

    Raises ``TracefsError`` where that is not permitted, or the kernel has no tracefs.
    """

    def __init__(self, *, buffer_kib: int = 4096, clock: str = "mono") -> None:
        self._fd = self._lock = -1
        root, self._fd = _opened()
        self._closed = False
        try:
            while self._lock < 0:  # a cleaner may have been faster than the lock
                name = f"{PREFIX}.{os.getpid()}.{secrets.token_hex(4)}"
                self.path = root / "instances" / name
                os.mkdir(self.path)
                self._lock = _locked(self.path)
            self.write("tracing_on", "0")
            self.write("trace_clock", clock)
            self.write("buffer_size_kb", str(buffer_kib))
        except OSError as error:
            self.close()
            raise _refused(error, "no instance of tracefs can be made") from None
        except BaseException:
            self.close()
            raise

    def write(self, name: str, text: str) -> None:
        """Write to one of its files."""
        (self.path / name).write_text(text)

    def enable(self, events: Iterable[str]) -> list[str]:
        """Switch events on, such as ``"ipi/ipi_send_cpu"``; return those there are."""
        found = []
        for event in events:
            try:
                self.write(f"events/{event}/enable", "1")
            except FileNotFoundError:
                continue
            found.append(event)
        return found

    def __enter__(self) -> Self:
        self.write("tracing_on", "1")
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.write("tracing_on", "0")

    def text(self) -> str:
        """Return what was recorded, as tracefs prints it."""
        return (self.path / "trace").read_text(errors="replace")

    def lost(self) -> int:
        """Return how many events were overwritten, or found no room."""
        stats = (self.path / "per_cpu").glob("cpu*/stats")
        return sum(int(n) for each in stats for n in _LOST.findall(each.read_text()))

    def save(self, target: Path) -> Saved:
        """Write what was recorded, compressed as the name says (``.xz``, ``.gz``)."""
        lost = self.lost()
        with (self.path / "trace").open("rb") as trace, _created(target) as file:
            head = trace.readline() + trace.readline() + trace.readline()
            file.write(head)
            shutil.copyfileobj(trace, file, 1 << 20)
        found = _WRITTEN.search(head)
        return Saved(int(found[1]) if found else 0, lost)

    def close(self) -> None:
        """Remove it. What was recorded is gone. ``TracefsError``: somebody reads it."""
        if self._closed:
            return
        self._closed = True
        try:
            os.rmdir(self.path)
        except FileNotFoundError:
            pass
        except OSError as error:
            raise _refused(error, f"{self.path.name} cannot be removed") from None
        finally:
            for fd in (self._lock, self._fd):
                if fd >= 0:
                    os.close(fd)


def _locked(path: Path) -> int:
    """Return a descriptor that holds an instance's lock, -1: it has been removed."""
    try:
        lock = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    except FileNotFoundError:
        return -1
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if path.exists():
            return lock
    except BaseException:
        os.close(lock)
        raise
    os.close(lock)
    return -1


def _created(target: Path) -> BinaryIO:
    if target.suffix == ".xz":
        return cast("BinaryIO", lzma.open(target, "wb", preset=1))
    if target.suffix == ".gz":
        return cast("BinaryIO", gzip.open(target, "wb"))
    return target.open("wb")


# ---- what the dead have left ---------------------------------------------------------


def leftovers() -> list[str]:
    """Return the instances whose owner is dead; none where there is no tracefs."""
    return list(_dead(remove=False))


def clean() -> list[str]:
    """Remove the instances whose owner is dead; return them."""
    return list(_dead(remove=True))


def _dead(*, remove: bool) -> Iterator[str]:
    try:
        root, mount = _opened()
    except TracefsError:
        return
    try:
        for path in sorted((root / "instances").glob(f"{PREFIX}.*")):
            with contextlib.suppress(OSError):
                lock = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
                try:
                    # BlockingIOError: its owner lives.
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    if remove:
                        os.rmdir(path)
                finally:
                    os.close(lock)
                yield path.name
    finally:
        if mount >= 0:
            os.close(mount)
