"""What runs on each CPU of a stress run of users: a turn of each worker, in turn."""

from __future__ import annotations

import time
from collections.abc import Generator, Iterator, Mapping
from random import Random
from typing import Final

from shmipi import _core, atomic, smp
from shmipi.machine import arrays
from shmipi.stress.users.base import Worker

__all__ = [
    "BOARD",
    "BOARD_WORDS",
    "B_BEAT",
    "B_DOING",
    "CONTROL",
    "CONTROL_WORDS",
    "K_DRIVER",
    "K_GO",
    "K_READY",
    "K_STOP",
    "WorkerError",
    "work",
]

CONTROL: Final = "stress.users.control"
BOARD: Final = "stress.users.board"

# K_DRIVER is slot + 1 and generation << 32 of the host that drives the run.
K_STOP, K_READY, K_GO, K_DRIVER = range(4)
CONTROL_WORDS: Final = 8
# Of each CPU: rounds done, and 1 + the index of the user whose turn it is.
B_BEAT, B_DOING = range(2)
BOARD_WORDS: Final = 8

_LOOK: Final = 64  # rounds between looks at whether the driver is still there
_NAP_S: Final = 0.002


class WorkerError(Exception):
    """A worker failed, or left its CPU in a state that the others cannot work in."""


def work(workers: Mapping[str, Worker], seed: int, incarnation: int) -> None:
    """Work until told to stop: the task of one CPU.

    ``incarnation`` tells those that this CPU has had apart: each makes choices of its
    own. Raises what a worker raises, with the user's name.
    """
    control, cpu = arrays.shared(CONTROL), smp.smp_processor_id()
    board = arrays.percpu(BOARD)[cpu]
    turns: dict[str, Iterator[None]] = {}
    for name, worker in workers.items():
        # A string: it is hashed, so that neighbours' choices have nothing in common.
        own = Random(f"{seed}/{name}/{cpu}/{incarnation}").getrandbits(63)
        turns[name] = worker(cpu, own)
    places = {name: place for place, name in enumerate(turns, start=1)}
    # Hundreds on a few cores that look all the time would leave nobody a core.
    nap = _NAP_S * max(1, len(arrays.percpu(BOARD)) // 8)
    # All begin at once: the first must not work on a machine that still imports.
    atomic.fetch_add(control, K_READY, 1)
    while not (control[K_GO] or control[K_STOP]):
        if _orphaned(int(control[K_DRIVER])):
            return
        time.sleep(nap)
    rounds = 0
    try:
        while turns and not control[K_STOP]:
            for name in list(turns):
                if control[K_STOP]:
                    break  # a round of all users on many CPUs takes long
                board[B_DOING] = places[name]
                _turn(name, turns)
            board[B_DOING] = 0
            board[B_BEAT] += 1
            rounds += 1
            if not rounds % _LOOK and _orphaned(int(control[K_DRIVER])):
                return
            smp.cond_resched()
    finally:
        for turn in turns.values():
            if isinstance(turn, Generator):
                turn.close()
    while not control[K_STOP] and not _orphaned(int(control[K_DRIVER])):
        board[B_BEAT] += 1  # all have ended by themselves
        time.sleep(nap)


def _turn(name: str, turns: dict[str, Iterator[None]]) -> None:
    """Let a worker go on until it yields; take one out that has ended."""
    try:
        next(turns[name])
    except StopIteration:
        del turns[name]
    except Exception as error:
        raise WorkerError(f"{name}: its worker raised {error!r}") from error
    if smp.irqs_disabled():
        smp.local_irq_enable()
        raise WorkerError(f"{name}: its worker yielded with interrupts disabled")


def _orphaned(driver: int) -> bool:
    """Is the host gone that drives the run? Nobody else ever ends it."""
    slot, generation = (driver & 0xFFFFFFFF) - 1, driver >> 32
    return _core.current_machine().slot(slot).generation != generation
