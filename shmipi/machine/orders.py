"""What a host orders of a machine's firmware: over a socket, one JSON object each way.

The machine's owner has one end of a socket pair; an attached host has connected to the
socket that the firmware listens on.
"""

from __future__ import annotations

import errno
import json
import os
import socket
import threading
from collections.abc import Sequence
from typing import Any

from shmipi.errors import BootError, MachineDiedError, ShmipiError
from shmipi.machine.limits import why

__all__ = ["BOOT_S", "MESSAGE_MAX", "Orders", "machine_died"]

BOOT_S = 60.0  # until something has been booted, and a little more for each CPU
MESSAGE_MAX = 1 << 16


class Orders:
    """One host's connection to the firmware."""

    def __init__(self, name: str) -> None:
        self._name = name
        #: The machine has ended, in order or not: nothing is ordered any more.
        self.died = False
        #: Held while a coprocessor is added, or the dead are buried.
        self.coprocessor_lock = threading.Lock()
        #: Its end, or ours in it, has begun.
        self.closing = False
        #: It goes on without this host, which reads no more answers.
        self.left = False
        self._lock = threading.Lock()
        self._control: socket.socket | None = None
        self._orders = 0
        self._answers: list[dict[str, Any]] = []
        self._answered = threading.Condition()

    def end_error(self) -> ShmipiError:
        """Return what says why there is no machine any more."""
        if self.closing:
            return MachineDiedError(f"the machine {self._name} was shut down meanwhile")
        return machine_died(self._name)

    def hurry(self) -> None:
        """Have no patience with what is busy in an end that is under way."""

    def boot_cpu(self, cpu: int) -> None:
        """Have a dead CPU's slot booted anew. ``BootError``, ``MachineDiedError``."""
        reply = self._ask({"op": "boot", "cpu": cpu})
        if reply is None:
            raise BootError(
                f"CPU {cpu} did not boot in {BOOT_S:.0f} s: is the computer"
                " overloaded?",
                cpu=cpu,
                errno=errno.ETIMEDOUT,
            )
        if "error" in reply:
            raise BootError(
                f"CPU {cpu} did not boot: {why(reply['error'], reply['errno'])}",
                cpu=cpu,
                errno=reply["errno"],
            )

    def kill_cpu(self, cpu: int, generation: int) -> None:
        """Have a CPU's process killed, if it is of that generation still.

        Returns before it is dead. ``MachineDiedError``.
        """
        with self._lock:
            self._order({"op": "kill", "cpu": cpu, "generation": generation})

    def measure_fork(self, cores: Sequence[int]) -> tuple[float, float]:
        """Have the firmware fork a child for each of ``cores`` that does nothing there.

        Seconds until all have run, and until all have ended again: what a boot of so
        many CPUs and its end cannot be faster than. ``BootError``,
        ``MachineDiedError``.
        """
        reply = self._ask({"op": "fork", "cores": list(cores)})
        if reply is None or "error" in reply:
            reply = reply or {"error": "no answer", "errno": errno.ETIMEDOUT}
            raise BootError(
                f"the firmware could not fork {len(cores)} times:"
                f" {why(reply['error'], reply['errno'])}",
                errno=reply["errno"],
            )
        return float(reply["fork_s"]), float(reply["exit_s"])

    def start_coprocessor(self, number: int, virq: int, start: bytes) -> int:
        """Have a coprocessor forked that runs ``start``: its pid. ``OSError``.

        ``start`` is the pickle of a callable that takes the machine and ``number``.
        """
        fd = os.memfd_create("shmipi-coprocessor", os.MFD_CLOEXEC)
        with os.fdopen(fd, "wb", buffering=0) as stream:
            view = memoryview(start)
            while view:
                view = view[stream.write(view) :]
            reply = self._ask(
                {"op": "coprocessor", "number": number, "virq": virq}, [fd]
            )
        if reply is None or "error" in reply:
            reply = reply or {"error": "no answer", "errno": errno.ETIMEDOUT}
            raise BootError(
                "a coprocessor could not be started:"
                f" {why(reply['error'], reply['errno'])}",
                errno=reply["errno"],
            )
        return int(reply["pid"])

    def kill_coprocessor(self, pid: int) -> None:
        """Have a coprocessor killed, if it still runs. ``MachineDiedError``."""
        self._ask({"op": "kill_coprocessor", "pid": pid})

    def _ask(
        self, message: dict[str, Any], fds: Sequence[int] = ()
    ) -> dict[str, Any] | None:
        """Order something and wait for the answer; None: there was none in time."""
        with self._lock:
            self._orders += 1
            number = self._orders
            self._order({**message, "id": number}, fds)
            with self._answered:
                self._answered.wait_for(
                    lambda: self.died or self.left or self._answer(number) is not None,
                    BOOT_S,
                )
                reply = self._answer(number)
                self._answers.clear()
        if self.died or (self.left and reply is None):
            raise self.end_error()
        return reply

    def _answer(self, number: int) -> dict[str, Any] | None:
        return next((a for a in self._answers if a.get("id") == number), None)

    def _take_answer(self, answer: dict[str, Any]) -> None:
        """Of the thread that reads the socket."""
        with self._answered:
            self._answers.append(answer)
            self._answered.notify_all()

    def _order(self, message: dict[str, Any], fds: Sequence[int] = ()) -> None:
        assert self._control is not None
        try:
            socket.send_fds(self._control, [json.dumps(message).encode()], list(fds))
        except OSError:
            raise self.end_error() from None


def machine_died(name: str) -> MachineDiedError:
    """Return the error of a machine that did not end in order."""
    return MachineDiedError(
        f"the machine {name} died: its firmware process is gone, and all its CPUs with"
        " it"
    )
