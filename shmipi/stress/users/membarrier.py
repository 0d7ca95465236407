"""Membarrier under fire: what it has ended does not go on behind its back.

Every CPU does restartable sequences: it reads which era it is, computes, and commits.
Who begins a new era calls MEMBARRIER_CMD_PRIVATE_EXPEDITED_RSEQ, and says when that
has returned that the old one is over. Then no sequence that has begun in it may commit.
An address space beside that is registered for nothing: there all has to be refused.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator
from functools import partial
from random import Random
from typing import TYPE_CHECKING, ClassVar, Final

from shmipi import atomic
from shmipi.errors import AddressSpaceError, ShmipiOSError
from shmipi.stress.users.base import Outcome, UserCheck, Violations, Worker
from shmipi.users import tlb
from shmipi.users.membarrier import (
    MEMBARRIER_CMD_PRIVATE_EXPEDITED,
    MEMBARRIER_CMD_PRIVATE_EXPEDITED_RSEQ,
    MEMBARRIER_CMD_PRIVATE_EXPEDITED_SYNC_CORE,
    MEMBARRIER_CMD_REGISTER_PRIVATE_EXPEDITED_RSEQ,
    membarrier,
    rseq_begin,
    rseq_commit,
)

if TYPE_CHECKING:
    from shmipi.cluster import Cluster
    from shmipi.machine.arrays import SharedArray

_SEQUENCES: Final = 20
_LONGEST: Final = 1000
# Words of `eras`: which it is; which began with a membarrier that has returned; 1 + who
# begins one.
_ERA, _OVER, _OWNER = 0, 16, 32
# Columns of the tally.
_COMMITTED, _ENDED, _BARRIERS, _REFUSED, _GIVEN_UP = range(5)


class Check(UserCheck):
    """Restartable sequences beside membarriers."""

    name: ClassVar[str] = "membarrier"

    def __init__(self, cluster: Cluster, seed: int) -> None:
        super().__init__(cluster, seed)
        users = cluster.users.tlb
        self.mm = users.mm("stress.membarrier")
        self.bare = users.mm("stress.membarrier.bare")
        self.eras = self.shared("eras", "i8", 48)
        self.word = self.shared("word", "u8", 1)
        self.tally = self.percpu("tally", "i8", 5)

    def work(self) -> Worker:
        """Return what runs on every CPU."""
        return partial(
            worker,
            (self.mm, self.bare),
            self.eras,
            self.word,
            self.tally,
            self.violations,
        )

    def died(self, cpu: int) -> None:
        """Let others begin the next era."""
        atomic.compare_exchange(self.eras, _OWNER, cpu + 1, 0)

    def finish(self) -> None:
        """Free the address spaces."""
        self.mm.exit_mmap()
        self.bare.exit_mmap()

    def outcome(self) -> Outcome:
        """Return the account."""
        sums = [int(n) for n in self.tally.sum(axis=0)]
        names = ("committed", "ended", "barriers", "refused", "given_up")
        return Outcome(
            dict(zip(names, sums, strict=True)), {"late": self.violations.count}
        )


def worker(
    mms: tuple[tlb.Mm, tlb.Mm],
    eras: SharedArray,
    word: SharedArray,
    tally: SharedArray,
    violations: Violations,
    cpu: int,
    seed: int,
) -> Iterator[None]:
    """Do sequences, and now and then end those of the others."""
    random = Random(seed)
    mm, bare = mms
    while True:
        try:
            with tlb.using(mm):
                membarrier(MEMBARRIER_CMD_REGISTER_PRIVATE_EXPEDITED_RSEQ)
                for _ in range(_SEQUENCES):
                    _sequence(eras, word, tally, violations, cpu, random)
                    if random.random() < 0.1:
                        _barrier(eras, tally, cpu)
            if random.random() < 0.2:
                with tlb.using(bare):
                    _refused(tally, violations, cpu, random)
        except ShmipiOSError:  # by others: their CPU died, or they take the mm away
            tally[cpu, _GIVEN_UP] += 1
        yield


def _sequence(
    eras: SharedArray,
    word: SharedArray,
    tally: SharedArray,
    violations: Violations,
    cpu: int,
    random: Random,
) -> None:
    length = random.randrange(_LONGEST)
    begun = rseq_begin()
    era = atomic.load(eras, _ERA)
    for _ in range(length):
        pass
    over = atomic.load(eras, _OVER)
    if not rseq_commit(begun, word, era):
        tally[cpu, _ENDED] += 1
        return
    tally[cpu, _COMMITTED] += 1
    if over > era:
        violations.report(
            f"CPU {cpu} committed a sequence of era {era}, and the membarrier with"
            f" which era {over} began had returned before"
        )


def _barrier(eras: SharedArray, tally: SharedArray, cpu: int) -> None:
    """Begin an era, if nobody else does."""
    if atomic.compare_exchange(eras, _OWNER, 0, cpu + 1) != 0:
        return
    try:
        era = atomic.fetch_add(eras, _ERA, 1) + 1
        membarrier(MEMBARRIER_CMD_PRIVATE_EXPEDITED_RSEQ)
        atomic.store(eras, _OVER, era)
        tally[cpu, _BARRIERS] += 1
    finally:
        atomic.store(eras, _OWNER, 0)


def _refused(
    tally: SharedArray, violations: Violations, cpu: int, random: Random
) -> None:
    """Ask for what this address space is not registered for."""
    command = random.choice(
        (
            MEMBARRIER_CMD_PRIVATE_EXPEDITED,
            MEMBARRIER_CMD_PRIVATE_EXPEDITED_RSEQ,
            MEMBARRIER_CMD_PRIVATE_EXPEDITED_SYNC_CORE,
        )
    )
    try:
        membarrier(command)
    except AddressSpaceError as error:
        if error.errno != errno.EPERM:
            raise
        tally[cpu, _REFUSED] += 1
        return
    violations.report(
        f"CPU {cpu} did membarrier({command}) in an address space that is not"
        " registered for it: who runs there has not been told to expect it"
    )
