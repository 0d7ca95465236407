"""Packets: what RPS and cpumap hand from CPU to CPU.

A packet is a number in shared memory that knows its flow (a hash, as a device computes
it) and carries 64 bits. It belongs to the CPU that made it, which uses it again when it
has been delivered; each CPU has ``SLICE`` of them.

Where packets are made by ``generate``, their 64 bits are their number in their flow,
and what delivers them checks that they only go up: ``flow(hash)`` says what it found.
"""

from __future__ import annotations

import errno
import os
from typing import Final, NamedTuple, NoReturn

from shmipi import _core
from shmipi.errors import ArenaFullError, SteeringError
from shmipi.machine.arrays import Arrays
from shmipi.users.state import state

__all__ = ["FLOWS", "SLICE", "Flow", "flow", "make", "recv", "refuse", "sockets"]

#: Packets that each CPU has.
SLICE: Final = 4096
#: Flows that are told apart, by the low bits of their hash.
FLOWS: Final = 4096


class Flow(NamedTuple):
    """What became of a flow's packets that ``generate`` has made."""

    sent: int
    delivered: int  #: each once
    disorder: int  #: delivered after a later one, although nothing excuses it
    doubles: int  #: delivered twice in a row


def make(home: Arrays) -> None:
    """Give a machine its packets, if it has none."""
    machine = home.machine
    state(home, "net", machine.net_bytes(SLICE, FLOWS))
    done = machine.net_init(machine.user_offset("net"), SLICE, FLOWS)
    if done < 0:
        refuse(done, "the machine's packets are damaged")


def refuse(code: int, text: str, cpu: int | None = None) -> NoReturn:
    """Raise what ``-errno`` stands for."""
    if -code == errno.ENOBUFS:
        raise ArenaFullError(
            f"all {SLICE} packets of this CPU are on their way: let others deliver",
            cpu=cpu,
        )
    raise SteeringError(f"{text} ({os.strerror(-code)})", cpu=cpu, errno=-code)


def flow(hash: int, machine: _core.Machine | None = None) -> Flow:
    """Return what became of the packets of a flow."""
    return Flow(*(machine or _core.current_machine()).net_flow(hash))


def sockets(on: bool = True, machine: _core.Machine | None = None) -> None:
    """Keep what is delivered for tasks of its CPU to read, or no longer.

    A CPU keeps 256 packets that nobody has read; more are not kept.
    """
    (machine or _core.current_machine()).net_sockets(on)


def recv(most: int = 64) -> list[tuple[int, int]]:
    """Return (hash, data) of packets delivered on this CPU, in order; it may be empty.

    Without RFS's half of ``recvmsg``: see ``shmipi.users.rps.recv``.
    """
    return _core.current_machine().net_recv(most)
