"""What CPUs print, each line under its CPU's name and none torn: ``run --tag``.

Each CPU gets two pipes in the place of its standard output and standard error, so that
native code and programs that a task starts are tagged too. They are named pipes: a CPU
opens its own by their names, which are gone as soon as all have, so that a host that is
killed leaves none. The host reads them all and writes whole lines.
"""

from __future__ import annotations

import contextlib
import os
import resource
import selectors
import shutil
import signal
import sys
import tempfile
import threading
from dataclasses import dataclass, field
from types import TracebackType
from typing import TYPE_CHECKING, Final, Self, TextIO

from shmipi.errors import CommandError

if TYPE_CHECKING:
    from shmipi.cluster import Cluster
    from shmipi.cpumask import CpuMask

__all__ = ["Tagger"]

_STREAMS: Final = ("out", "err")
_READ: Final = 1 << 16
_LINE_MAX: Final = 1 << 20  # what has no end of line after that is a line
_SPARE_FILES: Final = 64


def redirect(folder: str) -> None:
    """Task: let a CPU's standard output and standard error go to the host's pipes."""
    from shmipi import smp

    cpu = smp.smp_processor_id()
    for number, (name, stream) in enumerate(
        zip(_STREAMS, (sys.stdout, sys.stderr), strict=True), start=1
    ):
        stream.flush()
        fd = os.open(os.path.join(folder, f"{cpu}.{name}"), os.O_WRONLY)
        os.dup2(fd, number)
        os.close(fd)
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(line_buffering=True)  # lines come when they are printed


@dataclass
class _Pipe:
    tag: bytes
    stream: TextIO
    data: bytearray = field(default_factory=bytearray)


class Tagger:
    """Reads the CPUs' pipes in a thread of its own; a context manager.

    ``join`` has the CPUs of a machine write into them. When the output cannot be
    written, what comes is thrown away, so that no task waits for room in its pipe, the
    main thread gets a SIGINT, and ``error`` says why.
    """

    def __init__(self) -> None:
        self.error: OSError | None = None
        self._selector = selectors.DefaultSelector()
        self._wake_r, self._wake_w = os.pipe()
        self._selector.register(self._wake_r, selectors.EVENT_READ)
        self._pipes: list[int] = []
        self._lock = threading.Lock()
        self._ending = False
        self._thread = threading.Thread(
            target=self._serve, name="shmipi-tag", daemon=True
        )

    def join(self, cluster: Cluster, cpus: CpuMask, timeout: float | None) -> None:
        """Make the pipes of these CPUs and have them opened there; what ``run`` raises.

        Once, before anything of the user's runs.
        """
        folder = tempfile.mkdtemp(prefix="shmipi-run-")
        try:
            self._open(folder, list(cpus))
            self._thread.start()
            cluster.run(redirect, folder, cpus=cpus, timeout=timeout)
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def _open(self, folder: str, cpus: list[int]) -> None:
        _allow_files(len(_STREAMS) * len(cpus) + _SPARE_FILES)
        digits = len(str(max(cpus, default=0)))
        for cpu in cpus:
            for name in _STREAMS:
                path = os.path.join(folder, f"{cpu}.{name}")
                os.mkfifo(path, 0o600)
                try:
                    fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
                except OSError as error:
                    raise CommandError(
                        f"--tag needs two open files for each of {len(cpus)} CPUs:"
                        f" {error.strerror} (ulimit -n)"
                    ) from None
                self._pipes.append(fd)
                stream = sys.stdout if name == "out" else sys.stderr
                tag = f"CPU {cpu:{digits}}| ".encode()
                self._selector.register(fd, selectors.EVENT_READ, _Pipe(tag, stream))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Write what the CPUs have left; they have ended, or have nothing to say."""
        with self._lock:
            self._ending = True  # no SIGINT from now on
        os.write(self._wake_w, b"\0")
        if self._thread.ident is not None:  # it was started
            self._thread.join()
        self._close()

    def _close(self) -> None:
        self._selector.close()
        for fd in (*self._pipes, self._wake_r, self._wake_w):
            os.close(fd)

    # ---- the thread ------------------------------------------------------------------

    def _serve(self) -> None:
        while not any(key.fd == self._wake_r for key in self._ready(None)):
            pass
        # Whatever was written before the end is in the pipes by now.
        while self._ready(0):
            pass
        for key in list(self._selector.get_map().values()):
            if key.data is not None and key.data.data:
                self._write(key.data, bytes(key.data.data) + b"\n")

    def _ready(self, timeout: float | None) -> list[selectors.SelectorKey]:
        """Read what there is; return where there was something."""
        keys = [key for key, _ in self._selector.select(timeout)]
        for key in keys:
            if key.data is not None:
                self._take(key.fd, key.data)
        return [key for key in keys if key.fd != self._wake_r or timeout is None]

    def _take(self, fd: int, pipe: _Pipe) -> None:
        try:
            data = os.read(fd, _READ)
        except OSError:
            data = b""
        if not data:  # nobody has it open any more
            self._selector.unregister(fd)
            if pipe.data:
                self._write(pipe, bytes(pipe.data) + b"\n")
            return
        pipe.data += data
        end = pipe.data.rfind(b"\n") + 1
        if end:
            self._write(pipe, bytes(pipe.data[:end]))
            del pipe.data[:end]
        elif len(pipe.data) > _LINE_MAX:
            self._write(pipe, bytes(pipe.data) + b"\n")
            pipe.data.clear()

    def _write(self, pipe: _Pipe, lines: bytes) -> None:
        if self.error is not None:
            return
        text = b"".join(pipe.tag + line + b"\n" for line in lines[:-1].split(b"\n"))
        try:
            pipe.stream.buffer.write(text)
            pipe.stream.flush()
        except OSError as error:
            self.error = error
            with self._lock:
                if not self._ending:
                    main = threading.main_thread().ident
                    assert main is not None
                    signal.pthread_kill(main, signal.SIGINT)


def _allow_files(wanted: int) -> None:
    """Raise the soft limit of open files, as far as it may be."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        most = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
