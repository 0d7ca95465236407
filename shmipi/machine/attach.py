"""An attached host's side of a machine that another process booted.

It maps the machine's memory by name and is in it with a slot of its own that the
firmware gives out (``guests.py``). It holds no lock that says that the machine lives.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import pickle
import resource
import selectors
import socket
import threading
import time
from typing import Any

from shmipi import _core
from shmipi.errors import (
    AttachError,
    BootError,
    ClusterStateError,
    ShmipiError,
    ShmipiOSError,
)
from shmipi.machine import segment
from shmipi.machine.boot import Plan
from shmipi.machine.guests import FDS_AT_ONCE, address, peer
from shmipi.machine.inspect import Inspector, MachineView
from shmipi.machine.limits import start_thread
from shmipi.machine.orders import BOOT_S, MESSAGE_MAX, Orders
from shmipi.names import DOORBELLS, IDLE

__all__ = ["Guest"]

_YOUNG_S = 5.0  # a machine whose firmware does not listen yet
_LEAVE_S = 5.0


class Guest(Orders):
    """A machine of this user, attached to: what ``Host`` is to the process that booted.

    ``open()`` attaches, ``close()`` detaches; the machine goes on. In a fork's child
    nothing here does anything: the parent is attached.

    Raises ``AttachError``, whose errno says why, and ``LayoutError`` for a machine of
    another version of shmipi.
    """

    def __init__(self, name: str) -> None:
        if _core.cpu_context() == _core.CPU_HANDLER:
            raise ClusterStateError(
                "an interrupt handler cannot attach to a machine, which takes long and"
                " sleeps: do it in a task (cluster.run)"
            )
        if name is None:  # for a machine that is booted, that is a name of no matter
            raise ValueError("name is None: give the name of a machine that is up")
        super().__init__(segment.check_name(name))
        self.full = segment.full_name(name)
        self.owner = os.getpid()
        self._fds: list[int] = []
        self._fd = self._pidfd = -1
        self._watcher: threading.Thread | None = None

    def open(self) -> None:
        """Attach. Whatever it raises, and Ctrl-C at any step: ``close()`` is next."""
        name = self._name
        try:
            self._attach(name)
        except ShmipiOSError:
            raise
        except OSError as error:
            raise AttachError(
                f"machine {name} could not be attached to: {error.strerror}",
                errno=error.errno,
            ) from None
        self._watcher = threading.Thread(
            target=self._watch, name=f"shmipi-{name}-watch", daemon=True
        )
        try:
            start_thread(self._watcher)
        except BootError as error:
            raise _refused(name, str(error), errno.EAGAIN) from None

    # ---- coming ---------------------------------------------------------------------

    def _attach(self, name: str) -> None:
        flags = os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW
        try:
            with Inspector(name) as inspector:
                view, alive = inspector.view(), inspector.alive
            self._fd = os.open(segment.SHM / self.full, flags)
        except FileNotFoundError:
            raise AttachError(
                f"there is no machine {name} (`shmipi ps` lists yours)",
                errno=errno.ENOENT,
            ) from None
        if not alive:
            raise AttachError(
                f"the machine {name} is dead: `shmipi clean` removes what it left",
                errno=errno.EOWNERDEAD,
            )
        control = self._connect(name)
        self._control = control
        pid, uid = peer(control)
        if uid != os.geteuid():
            raise AttachError(
                f"who answers for machine {name} is another user's process",
                errno=errno.EPERM,
            )
        # Before it answers: what this is a descriptor of is the firmware and no other.
        with contextlib.suppress(OSError, OverflowError):
            self._pidfd = os.pidfd_open(pid)
        self._order({"op": "attach"})
        reply, fds = self._receive()
        self._fds += fds
        self._check_reply(name, reply)
        with os.fdopen(self._fds.pop(), "rb") as stream:
            stream.seek(0)
            about = pickle.load(stream)
        while len(self._fds) < reply["fds"]:
            _, fds = self._receive()
            if not fds:
                raise _refused(name, "too few doorbells arrived", errno.EPROTO)
            self._fds += fds
        self.machine = _core.Machine(self._fd, reply["slot"])
        # After the answer, when a machine that was booting is up: its number is there.
        if self._pidfd < 0 or pid != self.machine.firmware_pid:
            raise AttachError(
                f"machine {name} is in another PID namespace (another container): its"
                " CPUs cannot be signalled from here",
                errno=errno.EOPNOTSUPP,
            )
        self.machine.adopt_doorbells(self._fds)
        self.machine.map_natives([_core.native_name(n) for n in about["natives"]])
        with Inspector(name) as inspector:
            view = inspector.view()
        try:
            controller = pickle.loads(about["controller"])
        except Exception as error:  # a class of the owner's own, whose module runs
            why = f"{type(error).__name__}: {error}"
            raise _refused(
                name,
                f"its interrupt controller cannot be loaded here: {why} (the module is"
                " looked for on sys.path, $PYTHONPATH)",
                errno.ENOPKG,
            ) from None
        self.plan = _plan(view, self.machine, controller)

    def _connect(self, name: str) -> socket.socket:
        where = address(self.full, segment.identity(self._fd))
        begun = time.monotonic()
        while True:
            control = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            try:
                control.settimeout(BOOT_S)
                control.connect(where)
                return control
            except OSError as error:
                control.close()
                code = error.errno
                if code not in (errno.ECONNREFUSED, errno.EAGAIN):
                    raise
            waited = time.monotonic() - begun
            if code == errno.EAGAIN:  # it listens, and others stand in line
                if waited > BOOT_S:
                    raise _no_answer(name)
            elif code != errno.ECONNREFUSED or waited > _YOUNG_S:
                break
            else:
                with Inspector(name) as inspector:
                    state = inspector.view().state
                if state in ("stopping", "dead"):
                    raise _refused(name, "it is being shut down", errno.ESHUTDOWN)
                if state == "up":
                    break
            time.sleep(0.02)
        raise AttachError(
            f"the firmware of machine {name} cannot be reached: is it in another"
            " network namespace (another container)? Abstract sockets stay in theirs",
            errno=errno.ECONNREFUSED,
        )

    def _receive(self) -> tuple[dict[str, Any], list[int]]:
        assert self._control is not None
        try:
            data, fds, flags, _ = socket.recv_fds(
                self._control, MESSAGE_MAX, FDS_AT_ONCE, socket.MSG_CMSG_CLOEXEC
            )
        except TimeoutError:
            raise _no_answer(self._name) from None
        except ConnectionError:  # it stood in line, and nobody takes it any more
            raise self._hung_up() from None
        if flags & socket.MSG_CTRUNC:  # the kernel could not give us all of them
            self._fds += fds
            limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
            raise _refused(
                self._name,
                f"ulimit -n ({limit}) has no room for its CPUs' doorbells: raise it",
                errno.EMFILE,
            )
        if not data:
            raise self._hung_up()
        return json.loads(data), fds

    def _hung_up(self) -> AttachError:
        with contextlib.suppress(OSError, ShmipiError), Inspector(self._name) as found:
            if found.view().state == "stopping":
                return _refused(self._name, "it is being shut down", errno.ESHUTDOWN)
        return _refused(self._name, "it has ended just now", errno.EOWNERDEAD)

    def _check_reply(self, name: str, reply: dict[str, Any]) -> None:
        if "error" in reply:
            raise _refused(name, reply["error"], reply["errno"])

    # ---- while it is attached -------------------------------------------------------

    def end_error(self) -> ShmipiError:
        """Return what says why there is no machine any more."""
        if not hasattr(self, "machine"):
            return self._hung_up()
        if self.machine.shut_down:
            return ClusterStateError(
                f"the machine {self._name} was shut down by its owner"
            )
        if self.closing:
            return ClusterStateError("this host has detached")
        return super().end_error()

    def _watch(self) -> None:
        """Thread: notices the machine's end, and hands out the firmware's answers."""
        assert self._control is not None
        if self._pidfd < 0:  # closed already: it was interrupted as this thread began
            return
        self._control.settimeout(None)
        with selectors.DefaultSelector() as selector:
            selector.register(self._pidfd, selectors.EVENT_READ)
            selector.register(self._control, selectors.EVENT_READ)
            while True:
                ready = {key.fd for key, _ in selector.select()}
                if self.closing:
                    return
                if self._control.fileno() in ready:
                    try:
                        data = self._control.recv(MESSAGE_MAX)
                    except OSError:
                        data = b""
                    if data:
                        message = json.loads(data)
                        if message.get("op") == "shutdown":
                            self._ended()
                        else:
                            self._take_answer(message)
                        continue
                    selector.unregister(self._control)
                if self._pidfd in ready:
                    if not self.died:
                        with contextlib.suppress(Exception):
                            self.machine.set_state(_core.DEAD)  # and wakes every waiter
                        self._ended()
                    return

    def _ended(self) -> None:
        self.died = True
        with self._answered:
            self._answered.notify_all()

    # ---- going ----------------------------------------------------------------------

    def leave(self) -> None:
        """Begin to detach: threads that wait for another host, or the firmware, end."""
        self.closing = self.left = True
        with self._answered:
            self._answered.notify_all()

    def close(self) -> None:
        """Detach. Calls that were sent run, tasks are cancelled; results are lost.

        Called again after an interruption it does what is left.
        """
        if os.getpid() != self.owner:
            return
        self.leave()
        # Only a slot that no thread of this process can write to is anybody else's. One
        # that was asked for, and perhaps given, is given back too.
        unused = not hasattr(self, "machine") or self.machine.leave(_LEAVE_S)
        if self._control is not None:
            if unused and not self.died:
                with contextlib.suppress(ShmipiError):
                    self._order({"op": "detach"})
            with contextlib.suppress(OSError):
                self._control.shutdown(socket.SHUT_RDWR)  # wakes the thread that reads
        watcher = self._watcher
        if watcher not in (None, threading.current_thread()) and watcher.ident:
            watcher.join(5.0)
        self._release()

    def _release(self) -> None:
        """Close this process's descriptors."""
        if self._control is not None:
            self._control.close()
        self._fds += [fd for fd in (self._fd, self._pidfd) if fd >= 0]
        self._fd = self._pidfd = -1
        while self._fds:  # each is forgotten first: it is never closed twice
            fd = self._fds.pop()
            with contextlib.suppress(OSError):
                os.close(fd)

    def disown(self) -> None:
        """In a fork's child: the parent is attached, this process is not."""
        self.closing = True
        self.machine.disown()
        self._release()


def _plan(view: MachineView, machine: _core.Machine, controller: Any) -> Plan:
    return Plan(
        name=view.name,
        cores=[cpu.core for cpu in view.cpus],
        idle=view.idle if view.idle in IDLE else IDLE[0],
        doorbell=DOORBELLS[machine.doorbell],
        kick=machine.kick,
        kick_signal=machine.kick_signal,
        nmi_signal=machine.nmi_signal,
        controller=controller,
        handlers=(),
        oversubscribed=machine.oversubscribed,
        trace=(machine.trace_rings() or (0,))[0],
    )


def _refused(name: str, why: str, code: int) -> AttachError:
    return AttachError(f"machine {name} could not be attached to: {why}", errno=code)


def _no_answer(name: str) -> AttachError:
    return _refused(name, f"no answer in {BOOT_S:.0f} s", errno.ETIMEDOUT)
