"""The hosts that are attached to a machine, as its firmware keeps them.

The firmware listens on an abstract socket, which leaves no file behind and is named
after the machine and its object in /dev/shm. Who connects and is of the same user gets
one of a few slots of its own, and what can not be opened by name any more: descriptors
of doorbells. Its death, or its word that it has left, gives the slot back: its tasks
are cancelled, and what it had queued keeps its memory until the CPUs are done with it.
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
import struct
import time
from collections.abc import Callable
from typing import Any

from shmipi import _core
from shmipi.machine import doorbells
from shmipi.machine.orders import MESSAGE_MAX

__all__ = ["FDS_AT_ONCE", "Guests", "address", "peer"]

FDS_AT_ONCE = 200  # the kernel takes 253 in a message (SCM_MAX_FD)

_WAITING = 16  # connections that have not asked for a slot
_CLEAR_S = 0.05
_UCRED = struct.Struct("3i")  # pid, uid, gid


def address(full: str, which: tuple[int, int]) -> bytes:
    """Return the abstract address of the machine whose object is ``which``.

    The object is part of it: two containers may share the network, and not /dev/shm.
    """
    return f"\0{full}.{which[0]:x}.{which[1]:x}".encode()


def peer(connection: socket.socket) -> tuple[int, int]:
    """Return pid and uid of the other end; pid 0: it has no number here."""
    raw = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size)
    pid, uid, _ = _UCRED.unpack(raw)
    return pid, uid


def _understood(data: bytes) -> dict[str, Any] | None:
    """Return a message, None if it is none: whoever connects may send anything."""
    # What is nested deeply is no message either, though it can be JSON.
    with contextlib.suppress(ValueError, RecursionError):
        message = json.loads(data)
        if isinstance(message, dict) and isinstance(message.get("id", 0), int):
            return message
    return None


def _receive(connection: socket.socket) -> tuple[bytes, list[int]]:
    """Return a message and what came with it; b"": there are no more of them.

    One who closes his end without having read all of ours resets the connection, and
    the kernel says so once, before it hands out what he had sent until then: his word
    that he leaves, for example. ``BlockingIOError`` when nothing has come.
    """
    for _ in range(2):
        try:
            data, fds, *_ = socket.recv_fds(connection, MESSAGE_MAX, 1)
            return data, fds
        except ConnectionResetError:
            continue
        except BlockingIOError:
            raise
        except OSError:
            break
    return b"", []


class _Guest:
    """A connection; with a slot, an attached host."""

    def __init__(self, connection: socket.socket, pid: int) -> None:
        self.connection: socket.socket | None = connection
        self.pid = pid
        self.pidfd = -1
        self.slot = -1

    def send(self, message: dict[str, Any], fds: list[int] | None = None) -> None:
        if self.connection is not None:
            with contextlib.suppress(OSError):  # its pidfd tells
                socket.send_fds(
                    self.connection, [json.dumps(message).encode()], fds or []
                )


class Guests:
    """Gives out the slots of attached hosts. ``orders`` are those of the firmware.

    ``orders(message, send)`` does what a guest asked for.
    """

    def __init__(
        self,
        machine: _core.Machine,
        selector: selectors.BaseSelector,
        config: dict[str, Any],
        which: tuple[int, int],
        orders: Callable[[dict[str, Any], Callable[[dict[str, Any]], None]], None],
    ) -> None:
        self._machine = machine
        self._selector = selector
        self._config = config
        self._orders = orders
        self._guests: list[_Guest] = []
        self._bell = doorbells.BY_NAME[config["doorbell"]]
        self._kept: list[int] = []  # descriptors of doorbells, for them alone
        first = machine.nslots - _core.GUESTS
        self._free = list(range(first, machine.nslots))  # the one freed first, first
        self._unclear: set[int] = set()  # of those, with csds that others still have
        self._heirs: set[int] = set()  # slots with csds of processes that ended
        self._next_look = 0.0
        self._listener: socket.socket | None = None
        self.closed = False
        with contextlib.suppress(OSError):  # no such sockets: then nobody attaches
            listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            self._listener = listener
            listener.setblocking(False)
            listener.bind(address(config["segment"], which))
            listener.listen(_WAITING)
            selector.register(listener, selectors.EVENT_READ, self._accept)

    def keep_doorbells(self) -> None:
        """Open what can be opened while it has a name: a guest comes later.

        Not when descriptors are so few that the machine's CPUs would miss them.
        """
        count = self._config["ncpus"]
        room = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        if self._bell.is_descriptor or not self._bell.is_handed or 4 * count > room:
            return
        for cpu in range(count):
            self._kept.append(self._bell.keep(f"{self._config['segment']}.{cpu}"))

    def private(self) -> list[int]:
        """Return the descriptors that are no child's business."""
        found = [] if self._listener is None else [self._listener.fileno()]
        for guest in self._guests:
            if guest.connection is not None:
                found.append(guest.connection.fileno())
            if guest.pidfd >= 0:
                found.append(guest.pidfd)
        return found

    def timeout(self) -> float | None:
        """Return how soon ``look`` has something to do, in seconds."""
        if not self._unclear and not self._heirs:
            return None
        return max(0.0, self._next_look - time.monotonic())

    def look(self) -> None:
        """Give back csds that nobody has, and the memory of slots without any."""
        if self.timeout() == 0.0:
            self._unclear = {s for s in self._unclear if self._machine.guest_clear(s)}
            self._heirs = {s for s in self._heirs if self._machine.reap_orphans(s)}
            self._next_look = time.monotonic() + _CLEAR_S

    def sender_ended(self, slot: int) -> None:
        """Look after what it had begun to queue, also when another has the slot."""
        self._heirs.add(slot)
        self._next_look = 0.0

    def has(self, send: Callable[[dict[str, Any]], None]) -> bool:
        """Is the host whose orders are answered by ``send`` still attached?"""
        return any(guest.send == send for guest in self._guests)

    def tell(self, message: dict[str, Any]) -> None:
        """Send something to every attached host."""
        for guest in self._guests:
            if guest.slot >= 0:
                guest.send(message)

    def close(self) -> None:
        """Take no more."""
        self.closed = True
        if self._listener is not None:
            with contextlib.suppress(KeyError):
                self._selector.unregister(self._listener)
            self._listener.close()
            self._listener = None

    # ---- a guest comes --------------------------------------------------------------

    def _accept(self) -> None:
        if self._listener is None:
            return  # closed by what was found at the same time: the order to stop
        try:
            connection, _ = self._listener.accept()
        except OSError:
            return
        connection.setblocking(False)
        pid, uid = peer(connection)
        if uid != os.geteuid():
            connection.close()
            return
        waiting = [guest for guest in self._guests if guest.slot < 0]
        if len(waiting) >= _WAITING:  # who connects means to ask, and at once
            self._release(waiting[0])
        guest = _Guest(connection, pid)
        try:
            self._selector.register(
                connection, selectors.EVENT_READ, lambda: self._on_message(guest)
            )
        except OSError:  # no memory for it in the kernel, or no more of it for us
            connection.close()
            return
        self._guests.append(guest)

    def _on_message(self, guest: _Guest) -> None:
        if guest.connection is None:
            return
        try:
            data, fds = _receive(guest.connection)
        except BlockingIOError:
            return
        for fd in fds:
            os.close(fd)
        message = _understood(data)
        if message is None:
            self._hang_up(guest)
            if guest.slot < 0:
                self._guests.remove(guest)
            # One that has a slot goes on using it until its process has ended.
        elif message.get("op") == "attach" and guest.slot < 0:
            self._admit(guest)
        elif message.get("op") == "detach":
            self._release(guest)
        elif guest.slot >= 0:
            self._orders(message, guest.send)

    def _admit(self, guest: _Guest) -> None:
        try:
            if self.closed:
                raise OSError(errno.ESHUTDOWN, "it is being shut down")
            if guest.pid <= 0:
                raise OSError(errno.EOPNOTSUPP, "you are in another PID namespace")
            if not self._free:
                full = f"{_core.GUESTS} hosts are attached already"
                raise OSError(errno.EAGAIN, full)
            fds = self._kept or self._machine.doorbell_fds()
            if self._bell.is_handed and not fds:
                raise OSError(
                    errno.EMFILE,
                    f"its firmware could not keep each CPU's {self._bell.name} for"
                    " you: raise ulimit -n before it boots, or boot it with another"
                    " doorbell",
                )
            guest.pidfd = os.pidfd_open(guest.pid)
            self._selector.register(
                guest.pidfd, selectors.EVENT_READ, lambda: self._release(guest)
            )
            blob = self._blob()
        except OSError as error:
            guest.send({"error": error.strerror or str(error), "errno": error.errno})
            self._release(guest)
            return
        self.look()
        # One whose memory is all its own if there is; else what is in flight stays.
        free = [slot for slot in self._free if slot not in self._unclear] or self._free
        guest.slot = free[0]
        self._free.remove(guest.slot)
        self._unclear.discard(guest.slot)
        self._machine.guest_admit(guest.slot, guest.pid)
        guest.send({"slot": guest.slot, "fds": len(fds)}, [blob])
        os.close(blob)
        for at in range(0, len(fds), FDS_AT_ONCE):
            guest.send({}, fds[at : at + FDS_AT_ONCE])

    def _blob(self) -> int:
        """Return a file with what a guest has to know of the machine."""
        fd = os.memfd_create("shmipi-attach", os.MFD_CLOEXEC)
        with os.fdopen(os.dup(fd), "wb") as stream:
            pickle.dump(
                {
                    "controller": self._config["controller"],
                    "natives": _core.native_names(),
                },
                stream,
            )
        return fd

    # ---- and goes -------------------------------------------------------------------

    def _release(self, guest: _Guest) -> None:
        """Take back what a guest had: it has ended, or said that it left."""
        if guest not in self._guests:
            return
        self._guests.remove(guest)
        self._hang_up(guest)
        if guest.pidfd >= 0:
            with contextlib.suppress(KeyError):  # there was no memory to watch it
                self._selector.unregister(guest.pidfd)
            os.close(guest.pidfd)
        if guest.slot >= 0:
            self._machine.guest_bury(guest.slot)
            self._free.append(guest.slot)
            self._unclear.add(guest.slot)
            self.sender_ended(guest.slot)

    def _hang_up(self, guest: _Guest) -> None:
        if guest.connection is not None:
            self._selector.unregister(guest.connection)
            guest.connection.close()
            guest.connection = None
