"""The host's side of a machine's life: make it, start its firmware, watch, end it."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import pickle
import resource
import secrets
import selectors
import signal
import socket
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from shmipi import _core
from shmipi.errors import BootError, MachineDiedError, ShmipiError
from shmipi.machine import byvalue, process, remote, segment
from shmipi.machine.controller import Controller
from shmipi.machine.orders import BOOT_S, Orders, process_limits

__all__ = ["DOORBELLS", "IDLE", "Host", "Plan"]

#: Names of the doorbells and idle policies, by their number in the segment.
DOORBELLS = ("futex", "sem", "signal", "eventfd", "mqueue")
IDLE = ("poll", "haltpoll", "halt")

_STOP_GRACE_S = 2.0
_TRACE_RECORDS = 8192

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
    trace: bool
    steps: bool = False
    arena_bytes: int = 0
    domains: tuple[Any, ...] = ()  # irq domains: the layer above makes them

    @property
    def ncpus(self) -> int:
        return len(self.cores)


class Host(Orders):
    """A booted machine as its host process holds it.

    ``machine`` is the core's view; ``close()`` ends the machine. In a fork's child
    nothing here does anything: the machine is the parent's.
    """

    def __init__(self, plan: Plan) -> None:
        process.check_may_boot()
        super().__init__(plan.name)
        self.plan = plan
        self.full = segment.full_name(plan.name)
        self.owner = os.getpid()
        self._eventfds: list[int] = []
        self._closed = False
        self._process: subprocess.Popen[bytes] | None = None
        self._fd = segment.create(plan.name)
        self._identity = segment.identity(self._fd)
        try:
            self._boot()
        except BaseException as error:
            self._abort()
            if isinstance(error, OSError) and not isinstance(error, ShmipiError):
                raise _refused(error) from None
            raise

    # ---- boot -----------------------------------------------------------------------

    def _boot(self) -> None:
        plan = self.plan
        for spec in plan.handlers:
            _core.native_name(spec)
        try:
            _core.format_segment(
                fd=self._fd,
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
                trace_records=_TRACE_RECORDS if plan.trace else 0,
                boot_time=time.time_ns(),
                steps=plan.steps,
                arena_bytes=plan.arena_bytes,
            )
        except OSError as error:
            raise _no_room(error) from None
        self.machine = _core.Machine(self._fd, plan.ncpus)
        plan.controller.prepare(self.machine)
        self._make_doorbells()
        self._start_firmware()
        self._await_boot()
        self.machine.open_doorbells(self.full, self._eventfds)
        if plan.doorbell in ("sem", "mqueue"):
            # Every process has them open: their names are needed no more.
            segment.unlink_doorbells(self.full, plan.ncpus)
        self._watcher = threading.Thread(
            target=self._watch, name=f"shmipi-{plan.name}-watch", daemon=True
        )
        self._watcher.start()

    def _make_doorbells(self) -> None:
        plan = self.plan
        if plan.kick or plan.doorbell == "signal":
            _check_signal_queue(plan.ncpus)
        if plan.doorbell == "eventfd":
            try:
                for _ in range(plan.ncpus):
                    self._eventfds.append(os.eventfd(0, os.EFD_CLOEXEC))
            except OSError as error:
                raise _doorbell_error("eventfd", plan.ncpus, error) from None
        elif plan.doorbell in ("sem", "mqueue"):
            self._make_named_doorbells()

    def _make_named_doorbells(self) -> None:
        import posix_ipc

        plan = self.plan
        try:
            for cpu in range(plan.ncpus):
                name = f"/{self.full}.{cpu}"
                if plan.doorbell == "sem":
                    posix_ipc.Semaphore(name, posix_ipc.O_CREX, mode=0o600).close()
                else:
                    posix_ipc.MessageQueue(
                        name,
                        posix_ipc.O_CREX,
                        mode=0o600,
                        max_messages=1,
                        max_message_size=8,
                    ).close()
        except (OSError, posix_ipc.Error) as error:
            raise _doorbell_error(plan.doorbell, plan.ncpus, error) from None

    def _start_firmware(self) -> None:
        plan = self.plan
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._control = ours
        config_r, config_w = os.pipe()
        environment = dict(os.environ)
        saved = {key: environment.get(key) for key in _SINGLE_THREADED}
        environment.update(dict.fromkeys(_SINGLE_THREADED, "1"))
        config = {
            "segment": self.full,
            "ncpus": plan.ncpus,
            "handlers": list(plan.handlers),
            "handler_names": _core.native_names(),
            "kick_signal": plan.kick_signal,
            "nmi_signal": plan.nmi_signal,
            "controller": remote.dumps(plan.controller),
            "eventfds": self._eventfds,
            "host_pid": self.owner,
            "main": byvalue.whose_main(),
            "path": list(sys.path),
            "argv": list(sys.argv),
            "cwd": os.getcwd(),
            "filters": _pickled_filters(),
            "environment": saved,
        }
        # Found as it was found here, whatever the working directory holds.
        home = os.path.dirname(os.path.dirname(os.path.dirname(__file__)))
        start = (
            "import sys; sys.path.insert(0, sys.argv.pop(1));"
            " from shmipi.machine.firmware import main; main()"
        )
        try:
            self._process = subprocess.Popen(
                [
                    sys.executable,
                    *_interpreter_flags(),
                    "-c",
                    start,
                    home,
                    str(config_r),
                    str(theirs.fileno()),
                ],
                stdin=subprocess.DEVNULL,
                pass_fds=[config_r, theirs.fileno(), *self._eventfds],
                env=environment,
                start_new_session=True,  # a terminal's signals are the host's
            )
        except OSError as error:
            raise BootError(
                f"the firmware process could not be started: {error.strerror}"
                f" ({process_limits()})",
                errno=error.errno,
            ) from None
        finally:
            os.close(config_r)
            theirs.close()
            if self._process is None:
                os.close(config_w)
        config["firmware_pid"] = self._process.pid
        with contextlib.suppress(BrokenPipeError), os.fdopen(config_w, "wb") as stream:
            pickle.dump(config, stream)
        self._pidfd = os.pidfd_open(self._process.pid)

    def _await_boot(self) -> None:
        assert self._control is not None
        limit = BOOT_S + 0.05 * self.plan.ncpus
        with selectors.DefaultSelector() as selector:
            selector.register(self._control, selectors.EVENT_READ)
            if not selector.select(limit):
                raise BootError(
                    f"the CPUs are not online in {limit:.0f} s: is the computer"
                    " overloaded?",
                    errno=errno.ETIMEDOUT,
                )
        data = self._control.recv(1 << 16)
        if not data:
            raise BootError(
                "the firmware process ended while it booted; its message is above",
                errno=errno.ECHILD,
            )
        reply = json.loads(data)
        if "error" in reply:
            code = reply["errno"] or errno.EIO
            text = reply["error"]
            if code in (errno.EAGAIN, errno.ENOMEM) and "RLIMIT" not in text:
                text += f": {process_limits()}"
            elif code == errno.EPERM:
                text += ": may this process pin itself (sched_setaffinity)?"
            raise BootError(f"the machine did not boot: {text}", errno=code)

    # ---- while it is up -------------------------------------------------------------

    def _watch(self) -> None:
        """Thread: notices the firmware's death, and hands out its answers."""
        assert self._control is not None
        with selectors.DefaultSelector() as selector:
            selector.register(self._pidfd, selectors.EVENT_READ, "died")
            selector.register(self._control, selectors.EVENT_READ, "answer")
            while True:
                for key, _ in selector.select():
                    if key.data == "died":
                        self._firmware_died()
                        return
                    try:
                        data = self._control.recv(1 << 16)
                    except OSError:
                        data = b""
                    if not data:
                        selector.unregister(self._control)
                        continue
                    self._take_answer(json.loads(data))

    def _firmware_died(self) -> None:
        with contextlib.suppress(Exception):
            self.machine.set_state(_core.DEAD)  # and wakes every waiter
        self.died = True
        if not self._closed:
            segment.remove(self.full, self._identity, self.plan.ncpus)
            if self.on_death is not None:
                self.on_death()
        with self._answered:
            self._answered.notify_all()

    # ---- the end --------------------------------------------------------------------

    def close(self, grace: float = _STOP_GRACE_S) -> None:
        """End the machine: in order, and by force what has not ended in ``grace`` s."""
        if os.getpid() != self.owner:
            return
        with self._lock:
            if self._closed:
                return
            self._closed = True
        if not self.died:
            with contextlib.suppress(MachineDiedError):
                self._order({"op": "stop", "grace": grace})
        self._end(grace + 6.0)

    def _end(self, timeout: float) -> None:
        process = self._process
        if process is not None:
            try:
                process.wait(timeout)
            except subprocess.TimeoutExpired:
                process.send_signal(signal.SIGKILL)  # PDEATHSIG takes the CPUs along
                process.wait()
        watcher = getattr(self, "_watcher", None)
        if watcher is not None and watcher is not threading.current_thread():
            watcher.join(5.0)
        segment.remove(self.full, self._identity, self.plan.ncpus)
        self._release()

    def _abort(self) -> None:
        """Undo a boot that failed half way."""
        self._closed = True
        if self._process is not None and self._process.poll() is None:
            # The firmware ends by itself when its socket closes, CPUs first.
            assert self._control is not None
            self._control.close()
        if self._process is not None:
            try:
                self._process.wait(5.0)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
        segment.remove(self.full, self._identity, self.plan.ncpus)
        self._release()

    def _release(self) -> None:
        """Close this process's descriptors."""
        if self._control is not None:
            self._control.close()
        for fd in (self._fd, getattr(self, "_pidfd", -1), *self._eventfds):
            if fd >= 0:
                with contextlib.suppress(OSError):
                    os.close(fd)
        self._eventfds.clear()
        self._fd = -1

    def disown(self) -> None:
        """In a fork's child: drop the lock and everything else, end nothing."""
        self._closed = True
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
    return BootError(
        f"the machine did not boot: {error.strerror or error}; it needs pidfd_open"
        " (Linux 5.3), eventfd, sockets and pipes: is a sandbox (seccomp) or the limit"
        " of open files (ulimit -n) in the way? `shmipi doctor` shows limits",
        errno=error.errno,
    )


def _no_room(error: OSError) -> BootError:
    if error.errno == errno.ENOSPC:
        return BootError(
            "/dev/shm is full or too small for this machine: make it larger"
            " (mount -o remount,size=1g /dev/shm, docker run --shm-size=1g) or boot"
            " fewer CPUs",
            errno=errno.ENOSPC,
        )
    return BootError(
        f"the machine's shared memory could not be set up: {error.strerror}"
        + (" (ulimit -f limits it)" if error.errno == errno.EFBIG else ""),
        errno=error.errno,
    )


def _doorbell_error(kind: str, ncpus: int, error: Exception) -> BootError:
    code = getattr(error, "errno", None) or errno.ENOSPC
    text = getattr(error, "strerror", None) or str(error)
    remedy = {
        "eventfd": "raise the limit of open files (ulimit -n)",
        "sem": "make /dev/shm larger",
        "mqueue": "raise fs.mqueue.queues_max (sysctl) and RLIMIT_MSGQUEUE (ulimit -q)",
    }[kind]
    return BootError(
        f"no {kind} for each of {ncpus} CPUs: {text}; {remedy}, or use"
        " doorbell='futex', which needs none",
        errno=code,
    )
