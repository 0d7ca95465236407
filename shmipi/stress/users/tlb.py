"""TLB shootdown under fire: no CPU translates through an entry that was taken away.

CPUs map, use, unmap, protect and reclaim pages of one address space. Each place has a
serial that is odd while it is mapped and even when munmap has returned; a page holds
the serial that it was mapped with. So who reads the serial, loads, and finds a smaller
one has translated through an entry of before; and who stores after mprotect to read
only has returned must fault.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from random import Random
from typing import TYPE_CHECKING, ClassVar, Final

from shmipi import atomic
from shmipi.errors import AddressSpaceError, PageFaultError, ShmipiOSError
from shmipi.stress.users.base import Outcome, UserCheck, Violations, Worker
from shmipi.users import tlb

if TYPE_CHECKING:
    from shmipi.cluster import Cluster
    from shmipi.machine.arrays import SharedArray

PLACES: Final = 12
_APART: Final = 2 * tlb.PAGE_SIZE
_LOADS: Final = 60
# Columns of the tally.
_LOADED, _FAULTED, _CHANGED, _STORED, _RECLAIMED, _REFUSED = range(6)


class Check(UserCheck):
    """Loads and stores beside munmap, mprotect and reclaim."""

    name: ClassVar[str] = "tlb"

    def __init__(self, cluster: Cluster, seed: int) -> None:
        super().__init__(cluster, seed)
        self.tlb = cluster.users.tlb
        self.mm = self.tlb.mm("stress.tlb")
        #: Of each: serial; 1 + who changes it; left by a dead one; serial if read-only.
        self.places = self.shared("places", "i8", (PLACES, 16))
        self.base = 1 << 30
        self.tally = self.percpu("tally", "i8", 6)

    def work(self) -> Worker:
        """Return what runs on every CPU."""
        return partial(
            worker, self.mm, self.base, self.places, self.tally, self.violations
        )

    def died(self, cpu: int) -> None:
        """Let others change the place that it was changing."""
        for place in range(PLACES):
            owner = cpu + 1
            if atomic.load(self.places, (place, 1)) == owner:
                # What it was doing is not known: from now on it is mapped anew.
                atomic.store(self.places, (place, 2), 1)
                atomic.compare_exchange(self.places, (place, 1), owner, 0)

    def finish(self) -> None:
        """Flush what each CPU has put off, and free everything."""
        self.cluster.run(tlb.try_to_unmap_flush)
        self.mm.exit_mmap()
        self.tlb.reclaim()

    def outcome(self) -> Outcome:
        """Return the account: at the end no page is anybody's."""
        sums = [int(n) for n in self.tally.sum(axis=0)]
        names = ("loads", "faults", "changes", "stores", "reclaimed", "refused")
        state = self.tlb.memory_state()
        left = state["limbo"] + state["held"]
        wrong = [f"{left} pages wait for a flush that nobody does"] if left else []
        return Outcome(
            dict(zip(names, sums, strict=True)),
            {"stale": self.violations.count, "pages_left": left},
            wrong,
        )


def worker(
    mm: tlb.Mm,
    base: int,
    places: SharedArray,
    tally: SharedArray,
    violations: Violations,
    cpu: int,
    seed: int,
) -> Iterator[None]:
    """Look at places, and now and then change one."""
    random = Random(seed)
    # Whoever changes something waits for all: of hundreds on few cores few may do so.
    changes = 0.4 * min(1, 8 / len(tally))
    turn = 0
    while True:
        turn += 1
        try:
            with tlb.using(mm):
                _look(base, places, tally, violations, cpu, random)
            # A lazy CPU from here on: what it misses it has to notice above.
            if random.random() < changes:
                _change(mm, base, places, tally, cpu, random)
        except AddressSpaceError:
            tally[cpu, _REFUSED] += 1
        yield


def _look(
    base: int,
    places: SharedArray,
    tally: SharedArray,
    violations: Violations,
    cpu: int,
    random: Random,
) -> None:
    """Load and store, each beside what is known of the place before."""
    load = tlb.load
    for _ in range(_LOADS):
        place = random.randrange(PLACES)
        at = base + place * _APART
        before = atomic.load(places, (place, 0))
        try:
            found = load(at)
        except PageFaultError:
            tally[cpu, _FAULTED] += 1
            continue
        tally[cpu, _LOADED] += 1
        # 0: mapped just now, and its serial is not in it yet.
        if 0 < found < before:
            violations.report(
                f"CPU {cpu} translated page {at:#x} through the entry of mapping"
                f" {found}, after the change to {before} had returned"
            )
        closed = atomic.load(places, (place, 3))
        if closed and random.random() < 0.5:
            try:
                tlb.store(at + 8, cpu)
            except PageFaultError:
                continue
            tally[cpu, _STORED] += 1
            if atomic.load(places, (place, 3)) == closed:
                violations.report(
                    f"CPU {cpu} stored to page {at:#x} through a writable entry, after"
                    f" mprotect had made mapping {closed} read-only"
                )


def _change(
    mm: tlb.Mm,
    base: int,
    places: SharedArray,
    tally: SharedArray,
    cpu: int,
    random: Random,
) -> None:
    """Go on to the next state of one place, if nobody else does."""
    place = random.randrange(PLACES)
    if atomic.compare_exchange(places, (place, 1), 0, cpu + 1) != 0:
        return
    at = base + place * _APART
    try:
        serial = atomic.load(places, (place, 0))
        if atomic.load(places, (place, 2)):  # of one who was killed
            mm.munmap(at, tlb.PAGE_SIZE)
            atomic.store(places, (place, 3), 0)
            serial += 2 - serial % 2
            atomic.store(places, (place, 0), serial)
            atomic.store(places, (place, 2), 0)
        if serial % 2 == 0:
            _map(mm, at, places, place, serial + 1)
        elif random.random() < 0.3 and not atomic.load(places, (place, 3)):
            mm.mprotect(at, tlb.PAGE_SIZE, tlb.PROT_READ)
            atomic.store(places, (place, 3), serial)
        else:
            atomic.store(places, (place, 3), 0)
            way = random.random()
            if way < 0.6:
                tally[cpu, _RECLAIMED] += mm.try_to_unmap(at, tlb.PAGE_SIZE)
            if way < 0.3:
                # A flush of another page comes before the one that was put off.
                mm.flush_tlb_page(base + random.randrange(PLACES) * _APART)
                tlb.try_to_unmap_flush()
            else:  # munmap has to see that a flush is due
                mm.munmap(at, tlb.PAGE_SIZE)
            atomic.store(places, (place, 0), serial + 1)
            if random.random() < 0.5:
                tlb.try_to_unmap_flush()
        tally[cpu, _CHANGED] += 1
    except ShmipiOSError:
        atomic.store(places, (place, 2), 1)
        raise
    finally:
        atomic.store(places, (place, 1), 0)


def _map(mm: tlb.Mm, at: int, places: SharedArray, place: int, serial: int) -> None:
    """Map a page; its serial is in it before anybody is told."""
    mm.mmap(tlb.PAGE_SIZE, address=at)
    mm.write(at, serial.to_bytes(8, "little"))
    atomic.store(places, (place, 0), serial)
