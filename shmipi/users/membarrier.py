"""membarrier(): a full barrier on every CPU that runs a task of this address space.

So the other side of a protocol (a lock that one task takes all the time, a reader) gets
by without any fence, and pays nothing. The rules are those of
kernel/sched/membarrier.c: who may be interrupted has to be registered, who is
interrupted is who runs a task of the same ``mm`` (``tlb.use_mm``)::

    def reader():  # often
        tlb.use_mm(mm)
        x[0] = 1  # and no fence
        return y[0]


    def writer():  # rarely
        tlb.use_mm(mm)
        membarrier(MEMBARRIER_CMD_REGISTER_PRIVATE_EXPEDITED)
        y[0] = 1
        membarrier(MEMBARRIER_CMD_PRIVATE_EXPEDITED)
        return x[0]  # one of the two has seen the other

Errors are ``AddressSpaceError``: EPERM (not registered), EINVAL (no such command, or
flags), ESRCH (the task has no address space). For tasks on CPUs.
"""

from __future__ import annotations

import errno
from typing import Any, Final

from shmipi import _core
from shmipi._core import litmus_fast, litmus_slow, rseq_begin
from shmipi.errors import AddressSpaceError
from shmipi.machine.arrays import SharedArray, home_of
from shmipi.users import nohz, rcu

__all__ = [
    "LITMUS_WORDS",
    "MEMBARRIER_CMD_FLAG_CPU",
    "MEMBARRIER_CMD_GET_REGISTRATIONS",
    "MEMBARRIER_CMD_GLOBAL",
    "MEMBARRIER_CMD_GLOBAL_EXPEDITED",
    "MEMBARRIER_CMD_PRIVATE_EXPEDITED",
    "MEMBARRIER_CMD_PRIVATE_EXPEDITED_RSEQ",
    "MEMBARRIER_CMD_PRIVATE_EXPEDITED_SYNC_CORE",
    "MEMBARRIER_CMD_QUERY",
    "MEMBARRIER_CMD_REGISTER_GLOBAL_EXPEDITED",
    "MEMBARRIER_CMD_REGISTER_PRIVATE_EXPEDITED",
    "MEMBARRIER_CMD_REGISTER_PRIVATE_EXPEDITED_RSEQ",
    "MEMBARRIER_CMD_REGISTER_PRIVATE_EXPEDITED_SYNC_CORE",
    "membarrier",
    "rseq_begin",
    "rseq_commit",
    "store_buffer",
]

# include/uapi/linux/membarrier.h
MEMBARRIER_CMD_QUERY: Final = 0
MEMBARRIER_CMD_GLOBAL: Final = 1 << 0
MEMBARRIER_CMD_GLOBAL_EXPEDITED: Final = 1 << 1
MEMBARRIER_CMD_REGISTER_GLOBAL_EXPEDITED: Final = 1 << 2
MEMBARRIER_CMD_PRIVATE_EXPEDITED: Final = 1 << 3
MEMBARRIER_CMD_REGISTER_PRIVATE_EXPEDITED: Final = 1 << 4
MEMBARRIER_CMD_PRIVATE_EXPEDITED_SYNC_CORE: Final = 1 << 5
MEMBARRIER_CMD_REGISTER_PRIVATE_EXPEDITED_SYNC_CORE: Final = 1 << 6
MEMBARRIER_CMD_PRIVATE_EXPEDITED_RSEQ: Final = 1 << 7
MEMBARRIER_CMD_REGISTER_PRIVATE_EXPEDITED_RSEQ: Final = 1 << 8
MEMBARRIER_CMD_GET_REGISTRATIONS: Final = 1 << 9
MEMBARRIER_CMD_FLAG_CPU: Final = 1 << 0

#: 64-bit words of a shared array that ``store_buffer`` needs.
LITMUS_WORDS: Final = 80


def membarrier(cmd: int, flags: int = 0, cpu_id: int = 0) -> int:
    """Do what the system call does; return what it returns, 0 where it is done.

    ``MEMBARRIER_CMD_QUERY``: the commands there are. MEMBARRIER_CMD_GLOBAL is
    ``rcu.synchronize_rcu()``, and one of them on a machine that has RCU and no
    nohz_full CPU; else it is EINVAL.
    ``flags`` is 0, or with MEMBARRIER_CMD_PRIVATE_EXPEDITED_RSEQ
    MEMBARRIER_CMD_FLAG_CPU: only ``cpu_id`` is interrupted.
    """
    has_global = _has_global()
    if cmd == MEMBARRIER_CMD_GLOBAL and not flags and has_global:
        rcu.synchronize_rcu()
        return 0
    return _core.membarrier(cmd, flags, cpu_id, has_global)


def _has_global() -> bool:
    rcu_at = _core.current_machine().user_offset("rcu")
    return rcu_at != 0 and not nohz.tick_nohz_full_enabled()


def rseq_commit(begun: int, array: SharedArray, value: int) -> bool:
    """Store ``value`` in the array's first word, as the last of a restartable sequence.

    ``begun`` is what ``rseq_begin()`` gave on this CPU. False, and nothing stored, if
    the sequence has been ended since by MEMBARRIER_CMD_PRIVATE_EXPEDITED_RSEQ: begin
    again.
    """
    return _core.rseq_commit(begun, _words(array, 1), value)


def store_buffer(
    array: SharedArray, rounds: int, *, slow: bool, cmd: int = 0
) -> tuple[int, int]:
    """Run one side of the store-buffer litmus test, in C; the other on another CPU.

    Fast side: ``x = 1; r1 = y`` without a fence. Slow side: ``y = 1``;
    ``membarrier(cmd)``, or with 0 a full barrier of its own; ``r2 = x``. Returns the
    rounds that were done, fewer if the other side was not there for 20 ms; and (slow
    side) in how many both read 0. ``array``: u8, ``LITMUS_WORDS`` long, zeroed.
    """
    at = _words(array, LITMUS_WORDS)
    return litmus_slow(at, rounds, cmd) if slow else (litmus_fast(at, rounds), 0)


def _words(array: SharedArray, n: int) -> int:
    offset: Any = home_of(array).offset_of(array)
    if array.nbytes < 8 * n or offset % 8:
        raise AddressSpaceError(
            f"an array of at least {n} words of 8 bytes", errno=errno.EINVAL
        )
    return int(offset)
