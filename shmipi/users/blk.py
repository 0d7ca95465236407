"""Completion of block requests (``block/blk-mq.c``).

A CPU submits requests; the device's interrupt for one may come to any CPU. There
``complete`` finds whether the request completes where it is (its submitter's CPU, one
that shares its cache, or where the submitter's CPU is gone), or has to go back: it is
put on the list of its CPU, and who finds that empty sends one IPI, which raises the
BLOCK softirq. The submitter ends its requests, and has their tags again.

Each CPU has 64 tags. Requests of a CPU that was killed complete where their interrupt
comes, and are reported.
"""

from __future__ import annotations

from typing import Final, NamedTuple

from shmipi import _core
from shmipi.machine.arrays import Arrays
from shmipi.users import net
from shmipi.users.state import state

__all__ = [
    "DEPTH",
    "QUEUE_FLAG_SAME_COMP",
    "QUEUE_FLAG_SAME_FORCE",
    "BlkStats",
    "BoundBlk",
    "Request",
    "complete",
    "end",
    "generate",
    "interrupt",
    "submit",
]

#: Tags of a CPU.
DEPTH: Final = 64
QUEUE_FLAG_SAME_COMP: Final = 1
QUEUE_FLAG_SAME_FORCE: Final = 2
_EAGAIN: Final = -11


class Request(NamedTuple):
    """A request that is done."""

    tag: int
    data: int
    cpu: int  #: on which it completed


class BlkStats(NamedTuple):
    """Counts of a CPU, or of all."""

    submitted: int
    completed: int  #: here, of whichever CPU
    ended: int
    elsewhere: int  #: of those completed here: submitted by another
    wrong: int  #: of those: although nothing excuses it
    ipis: int  #: sent from here
    interrupts: int  #: of the device, that came here
    reported: int  #: of this CPU's requests: completed when it was dead or offline
    in_flight: int
    waiting: int  #: their interrupt has come
    doubles: int  #: completed more than once


class BoundBlk:
    """``cluster.users.blk``: the device's queue, and counts."""

    def __init__(self, home: Arrays) -> None:
        self._machine: _core.Machine = home.machine
        state(home, "blk", self._machine.blk_bytes())
        self.set()

    def set(
        self,
        flags: int = QUEUE_FLAG_SAME_COMP | QUEUE_FLAG_SAME_FORCE,
        nr_hw_queues: int = 2,
    ) -> None:
        """Say how requests complete.

        ``flags``: with neither flag where their interrupt comes; with
        ``QUEUE_FLAG_SAME_COMP`` on the submitter's CPU or one that shares its cache;
        with both on the submitter's. ``nr_hw_queues``: with 1, what completes where it
        came does so in the BLOCK softirq. ``SteeringError`` (EINVAL).
        """
        good = flags >= 0 and nr_hw_queues > 0
        done = self._machine.blk_set(flags, nr_hw_queues) if good else -22
        if done < 0:
            net.refuse(done, f"no queue has flags {flags} and {nr_hw_queues} queues")

    def stats(self, cpu: int | None = None) -> BlkStats:
        """Return the counts of one CPU, or of all together."""
        machine = self._machine
        if cpu is not None:
            return BlkStats(*machine.blk_counts(cpu))
        rows = [machine.blk_counts(n) for n in range(machine.ncpus)]
        return BlkStats(*map(sum, zip(*rows, strict=True)))


def submit(data: int = 0) -> int | None:
    """Submit a request: its tag, or None: all of this CPU are in use."""
    done = _core.current_machine().blk_submit(data)
    if done == _EAGAIN:
        return None
    return done if done >= 0 else net.refuse(done, "submit")


def complete(tag: int) -> bool:
    """Take the device's interrupt for a request here: has it completed by now?

    ``SteeringError``: EINVAL (no such tag), EALREADY (it is not in flight).
    ``blk_mq_complete_request``.
    """
    done = _core.current_machine().blk_complete(tag) if tag >= 0 else -22
    return done == 0 if done >= 0 else net.refuse(done, f"request {tag}")


def interrupt(most: int = DEPTH) -> int:
    """Take the device's interrupt for what is in flight, others' first: how many."""
    return _core.current_machine().blk_interrupt(most)


def end() -> list[Request]:
    """End this CPU's requests that are done, and have their tags again."""
    return [Request(*one) for one in _core.current_machine().blk_end()]


def generate(rounds: int) -> int:
    """Submit, take interrupts, end what is done: so many times, in C. How many."""
    return _core.current_machine().blk_generate(rounds)
