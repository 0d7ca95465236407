"""The host's side of a machine's life: make it, start its firmware, watch, end it."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import io
import json
import os
import pickle
import resource
import secrets
import select
import signal
import socket
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from shmipi import _core
from shmipi.errors import BootError, MachineDiedError, ShmipiError
from shmipi.machine import byvalue, doorbells, limits, process, remote, rings, segment
from shmipi.machine.controller import Controller
from shmipi.machine.doorbells import Doorbell
from shmipi.machine.limits import start_thread
from shmipi.machine.orders import BOOT_S, Orders, machine_died
from shmipi.names import DOORBELLS, IDLE

__all__ = ["Host", "Plan"]

_STOP_GRACE_S = 2.0
_PATH_MAX = 64 << 10

# One thread each, in the firmware and so in the CPUs: a library's thread pool makes
# fork unsafe, and thousands of pools on a few cores help nobody.
_SINGLE_THREADED = ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS")


@dataclass(frozen=True)
class Plan:
    """A machine to boot; every field has been checked."""

    name: str
    cores: Sequence[int]
    idle: str
    doorbell: str
    kick: bool
    kick_signal: int
    nmi_signal: int
    controller: Controller
    handlers: Sequence[str]
    oversubscribed: bool
    trace: int  # records of each trace ring from the start on; 0: none
    steps: bool = False
    arena_bytes: int = 0
    domains: tuple[Any, ...] = ()  # irq domains: the layer above makes them
    preload: Sequence[str] = ()

    @property
    def ncpus(self) -> int:
        return len(self.cores)

    @property
    def bell(self) -> Doorbell:
        return doorbells.BY_NAME[self.doorbell]


class Host(Orders):
    """A machine as its host process holds it.

    ``open()`` boots it; ``machine`` is the core's view then; ``close()`` ends it, from
    whatever state an interrupted ``open()`` or ``close()`` left. In a fork's child
    nothing here does anything: the machine is the parent's.
    """

    machine: _core.Machine

    def __init__(self, plan: Plan) -> None:
        super().__init__(plan.name)
        self.plan = plan
        self.full = segment.full_name(plan.name)
        self.owner = os.getpid()
        self._doorbells: list[io.FileIO] = []  # those that are inherited
        self._closing = threading.RLock()
        self._hurry = False
        self._up = False
        self._process: subprocess.Popen[bytes] | None = None
        self._pidfd: io.FileIO | None = None
        self._segment: io.FileIO | None = None
        self._identity: tuple[int, int] | None = None
        self._watcher: threading.Thread | None = None

    # ---- boot -----------------------------------------------------------------------

    def open(self) -> None:
        """Boot it. ``BootError``; what has begun then is ended by ``close()``."""
        process.check_may_boot()
        try:
            self._boot()
        except ShmipiError:
            raise
        except OSError as error:
            raise _refused(error) from None

    def _boot(self) -> None:
        plan = self.plan
        for spec in plan.handlers:
            _core.native_name(spec)
        size = _core.segment_bytes(plan.ncpus, plan.arena_bytes)
        too_much = limits.no_address_space(size)
        if too_much is not None:
            raise BootError(too_much, errno=errno.ENOMEM)
        self._segment = _keep(lambda: segment.create(plan.name))
        self._identity = segment.identity(self._segment.fileno())
        try:
            _core.format_segment(
                fd=self._segment.fileno(),
                name=plan.name,
                cores=list(plan.cores),
                idle=IDLE.index(plan.idle),
                doorbell=DOORBELLS.index(plan.doorbell),
                kick=plan.kick,
                kick_signal=plan.kick_signal,
                nmi_signal=plan.nmi_signal,
                chip=plan.controller.describe(plan.ncpus),
                cookie=secrets.randbits(32),
                sum_key=secrets.randbits(64),
                oversubscribed=plan.oversubscribed,
                boot_time=time.time_ns(),
                steps=plan.steps,
                arena_bytes=plan.arena_bytes,
            )
        except OSError as error:
            raise BootError(
                "the machine's shared memory could not be set up:"
                f" {limits.explain(error.errno)}",
                errno=error.errno,
            ) from None
        made = _core.Machine(self._segment.fileno(), plan.ncpus)
        plan.controller.prepare(made)
        if plan.trace:
            rings.prepare(made, plan.trace)
        if plan.kick or plan.bell.by_signal:
            _check_signal_queue(plan.ncpus)
        if plan.bell.is_inherited:
            self._make_doorbells()
        self._start_firmware()
        self._await_boot()
        self._up = True
        self._join()
        self._watcher = threading.Thread(
            target=self._watch, name=f"shmipi-{plan.name}-watch", daemon=True
        )
        start_thread(self._watcher)

    def _make_doorbells(self) -> None:
        bell = self.plan.bell
        try:
            for _ in range(self.plan.ncpus):
                self._doorbells.append(_keep(bell.make))
        except OSError as error:
            raise _doorbell_error(bell, self.plan.ncpus, error.errno) from None

    def _join(self) -> None:
        """Open the machine that the firmware has booted."""
        plan = self.plan
        before = self._segment
        assert before is not None
        try:
            # By its name, so that it bears it in /proc/PID/maps.
            self._segment = _keep(lambda: segment.open_segment(self.full))
        except FileNotFoundError:
            raise machine_died(plan.name) from None
        before.close()
        self.machine = _core.Machine(self._segment.fileno(), plan.ncpus)
        self.machine.open_doorbells(self.full, [f.fileno() for f in self._doorbells])
        if plan.bell.folder is not None:
            # Every process has them open: their names are needed no more.
            doorbells.unlink(self.full, plan.ncpus)

    def _start_firmware(self) -> None:
        plan = self.plan
        assert self._segment is not None
        environment = dict(os.environ)
        saved = {key: environment.get(key) for key in _SINGLE_THREADED}
        environment.update(dict.fromkeys(_SINGLE_THREADED, "1"))
        inherited = [file.fileno() for file in self._doorbells]
        config = {
            "segment": self.full,
            "ncpus": plan.ncpus,
            "doorbell": plan.doorbell,
            "handlers": list(plan.handlers),
            "preload": list(plan.preload),
            "handler_names": _core.native_names(),
            "kick_signal": plan.kick_signal,
            "nmi_signal": plan.nmi_signal,
            "controller": remote.dumps(plan.controller),
            "inherited": inherited,
            "host_pid": self.owner,
            "main": byvalue.whose_main(),
            "path": list(sys.path),
            "argv": list(sys.argv),
            "filters": _pickled_filters(),
            "environment": saved,
        }
        # All is found as it was found here, whatever the working directory holds, and
        # also if the program itself said where (a PEX file, a folder of its own).
        home = os.path.dirname(os.path.dirname(os.path.dirname(__file__)))
        start = (
            f"import sys; sys.path[:] = {_path_text(home)};"
            " from shmipi.machine.firmware import main; main()"
        )
        with contextlib.ExitStack() as stack:
            pair = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            ours, theirs = map(stack.enter_context, pair)
            self._control = _copy(ours)
            theirs = stack.enter_context(_copy(theirs))
            ends = zip(os.pipe2(os.O_CLOEXEC), ("rb", "wb"), strict=True)
            pipe = [stack.enter_context(io.FileIO(fd, mode)) for fd, mode in ends]
            reading = stack.enter_context(io.FileIO(_above(pipe[0].fileno()), "rb"))
            shared = [reading.fileno(), theirs.fileno(), self._segment.fileno()]
            here = _folder_that_is_gone()
            if here is not None:
                stack.callback(os.close, here)
                shared.append(here)
            command = [sys.executable, *_interpreter_flags(), "-c", start]
            try:
                self._process = subprocess.Popen(
                    [*command, *map(str, shared)],
                    stdin=subprocess.DEVNULL,
                    stdout=_standard(sys.__stdout__, 1),
                    stderr=_standard(sys.__stderr__, 2),
                    pass_fds=[*shared, *inherited],
                    cwd=None if here is None else "/",
                    env=environment,
                    start_new_session=True,  # a terminal's signals are the host's
                )
            except OSError as error:
                raise BootError(
                    "the firmware process could not be started:"
                    f" {limits.explain(error.errno)}",
                    errno=error.errno,
                ) from None
            pid = self._process.pid
            self._pidfd = _keep(lambda: os.pidfd_open(pid))
            reading.close()
            pipe[0].close()
            with contextlib.suppress(BrokenPipeError):  # it has ended: we hear of that
                data = memoryview(pickle.dumps(config))
                while data:
                    data = data[pipe[1].write(data) :]

    def _await_boot(self) -> None:
        assert self._control is not None
        limit = BOOT_S + 0.05 * self.plan.ncpus
        if not _readable(self._control, limit):
            raise BootError(
                f"the CPUs are not online in {limit:.0f} s: is the computer"
                " overloaded?",
                errno=errno.ETIMEDOUT,
            )
        try:
            data = self._control.recv(1 << 16)
        except ConnectionResetError:  # it ended with its orders unread
            data = b""
        if not data:
            raise BootError(
                "the firmware process ended while it booted; if it had a message, that"
                " is above",
                errno=errno.ECHILD,
            )
        reply = json.loads(data)
        if "error" in reply:
            raise self._boot_error(reply["error"], reply["errno"], reply.get("what"))

    def _boot_error(self, text: str, code: int | None, what: str | None) -> BootError:
        """Make an error of the firmware's reply."""
        plan = self.plan
        if what == "name" and code == errno.EEXIST:
            return BootError(segment.name_is_taken(plan.name), errno=code)
        if what == "doorbell":
            return _doorbell_error(plan.bell, plan.ncpus, code, text)
        if code == errno.EPERM:
            text += ": may this process pin itself (sched_setaffinity)?"
        return BootError(
            f"the machine did not boot: {limits.why(text, code)}",
            errno=code or errno.EIO,
        )

    # ---- while it is up -------------------------------------------------------------

    def _watch(self) -> None:
        """Thread: notices the firmware's death, and hands out its answers."""
        assert self._control is not None
        assert self._pidfd is not None
        died, control = self._pidfd.fileno(), self._control.fileno()
        poll = select.poll()  # needs no descriptor
        poll.register(died, select.POLLIN)
        poll.register(control, select.POLLIN)
        while True:
            for fd, _ in poll.poll():
                if fd == died:
                    self._firmware_died()
                    return
                try:
                    data = self._control.recv(1 << 16)
                except OSError:
                    data = b""
                if not data:
                    poll.unregister(control)
                    continue
                self._take_answer(json.loads(data))

    def _firmware_died(self) -> None:
        with contextlib.suppress(Exception):
            self.machine.set_state(_core.DEAD)  # and wakes every waiter
        self.died = True
        if not self.closing:
            self._remove()
        with self._answered:
            self._answered.notify_all()

    # ---- the end --------------------------------------------------------------------

    def close(self, grace: float = _STOP_GRACE_S) -> None:
        """End the machine: in order, and by force what has not ended in ``grace`` s.

        Called again after an interruption, wherever that came, it does what is left.
        """
        if os.getpid() != self.owner:
            return
        with self._closing:
            self.closing = True
            if hasattr(self, "machine"):
                self.machine.set_ending()
            if self._process is not None:
                self._end(0.0 if self._hurry else grace)
            watcher = self._watcher
            if (
                watcher is not None
                and watcher.ident is not None  # it was started
                and watcher is not threading.current_thread()
            ):
                watcher.join(5.0)
            self._remove()
            self._release()

    def hurry(self) -> None:
        """From now on ``close()`` has no patience with a CPU that is busy."""
        self._hurry = True

    def _end(self, grace: float) -> None:
        """Have the firmware end, CPUs first, and wait for it."""
        assert self._process is not None
        assert self._control is not None
        if not self._up:
            self._control.close()  # by which it ends, as if the host had died
        elif not self.died:
            with contextlib.suppress(MachineDiedError):
                self._order({"op": "stop", "grace": grace})
        limit = grace + (1.0 if self._hurry else 6.0)
        if self._pidfd is None or self._pidfd.closed:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(limit)
                return
            self._process.kill()
        elif not _readable(self._pidfd, limit):
            signal.pidfd_send_signal(self._pidfd.fileno(), signal.SIGKILL)
            # PDEATHSIG takes the CPUs along.
        self._process.wait()

    def _remove(self) -> None:
        """Remove what may be left of the machine outside processes."""
        if self._identity is not None:
            segment.remove(self.full, self._identity, self.plan.ncpus)

    def _release(self) -> None:
        """Close this process's descriptors."""
        if self._control is not None:
            self._control.close()
        for file in (self._segment, self._pidfd, *self._doorbells):
            if file is not None:
                with contextlib.suppress(OSError):
                    file.close()

    def disown(self) -> None:
        """In a fork's child: drop the lock and everything else, end nothing."""
        self.closing = True
        machine = getattr(self, "machine", None)
        if machine is not None:
            machine.disown()
        if self._process is not None:
            self._process.returncode = 0  # not our child: never wait for it
        self._release()


def _check_signal_queue(ncpus: int) -> None:
    """Is there room for each CPU's timer, and for a kick? ``BootError``."""
    soft, _ = resource.getrlimit(resource.RLIMIT_SIGPENDING)
    used = _queued_signals()
    need = 2 * ncpus
    if soft == resource.RLIM_INFINITY or soft - used >= need:
        return
    raise BootError(
        f"no room in the queue of signals for {ncpus} CPUs: RLIMIT_SIGPENDING is"
        f" {soft}, your processes use {used} of it, and each CPU needs 2, for its"
        f" timer and for a kick; raise it (ulimit -i {used + need}), or use kick=False"
        " with another doorbell than 'signal'",
        errno=errno.EAGAIN,
    )


def _queued_signals() -> int:
    """Count what RLIMIT_SIGPENDING counts: of all processes of this user."""
    with contextlib.suppress(OSError), open("/proc/self/status") as stream:
        for line in stream:
            if line.startswith("SigQ:"):
                return int(line.split()[1].split("/")[0])
    return 0


# A process that runs without standard files (`prog >&-`) gets their numbers for the
# next files that it opens, and files that a task opens get low ones: what is the
# machine's keeps out of the way of both.
_FIRST_FD = 512


def _above(fd: int) -> int:
    """Return a copy of ``fd`` with a high number."""
    soft = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    for first in (min(_FIRST_FD, soft // 2), 3):
        try:
            return fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, first)
        except OSError as error:
            if first == 3 or error.errno not in (errno.EMFILE, errno.EINVAL):
                raise
    raise AssertionError


def _keep(make: Callable[[], int]) -> io.FileIO:
    """Make a descriptor: as a file, which is closed once, whatever interrupts that.

    It is made in here: one that is handed over belongs to nobody on the way.
    """
    with io.FileIO(make(), "rb") as made:
        mode = "rb+" if _writable(made.fileno()) else "rb"
        return io.FileIO(_above(made.fileno()), mode)


def _writable(fd: int) -> bool:
    return fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE != os.O_RDONLY


def _copy(end: socket.socket) -> socket.socket:
    return socket.socket(fileno=_above(end.fileno()))


def _path_text(first: str) -> str:
    """Return sys.path, behind ``first``, as what stands in an argument of a program.

    The kernel takes no argument of more than 128 KiB. A path that is cut is made whole
    with the rest of what the firmware is told.
    """
    entries, room = [first], _PATH_MAX
    for entry in sys.path:
        if isinstance(entry, str):
            room -= len(ascii(entry))
            if room < 0:
                break
            entries.append(entry)
    return ascii(entries)


def _standard(stream: object, number: int) -> int | None:
    """What the firmware, and so the CPUs, have as a standard file."""
    try:
        os.fstat(number)
    except OSError:
        stream = None
    # Closed when the program began: what has the number now is some other file.
    return subprocess.DEVNULL if stream is None else None


def _readable(file: socket.socket | io.FileIO, seconds: float) -> bool:
    """Is there something to read, or an end, within so many seconds?"""
    poll = select.poll()
    poll.register(file, select.POLLIN)
    return bool(poll.poll(1000 * seconds))


def _folder_that_is_gone() -> int | None:
    """Return a descriptor of the working directory if it has no name any more.

    Python 3.13.0 cannot import its own modules there, so the firmware starts elsewhere
    and comes back when it has what it needs.
    """
    try:
        os.getcwd()
    except FileNotFoundError:
        fd = os.open(".", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            return _above(fd)
        finally:
            os.close(fd)
    return None


def _pickled_filters() -> bytes:
    """The warnings filters, without those whose category cannot be pickled."""
    kept = []
    for entry in warnings.filters:
        with contextlib.suppress(Exception):
            pickle.loads(pickle.dumps(entry))
            if entry[2].__module__ != "__main__":
                kept.append(entry)
    return pickle.dumps(kept)


def _interpreter_flags() -> list[str]:
    return list(subprocess._args_from_interpreter_flags())  # type: ignore[attr-defined]


def _refused(error: OSError) -> BootError:
    if error.errno is None:
        return BootError(f"the machine did not boot: {error}")
    return BootError(
        f"the machine did not boot: {limits.explain(error.errno)}", errno=error.errno
    )


def _doorbell_error(
    bell: Doorbell, ncpus: int, code: int | None, text: str | None = None
) -> BootError:
    return BootError(
        f"no {bell.name} for each of {ncpus} CPUs: {text or limits.explain(code)}"
        f"{bell.remedy}; or use doorbell='futex', which needs none",
        errno=code or errno.ENOSPC,
    )
