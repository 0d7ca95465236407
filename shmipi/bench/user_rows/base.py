"""What a row of ``shmipi bench users`` has.

The rows of user ``tlb`` are what ``rows()`` of ``shmipi/bench/user_rows/tlb.py``
returns::

    class Shootdown(UserRow):
        what = "flush_tlb_mm_range, 1 page"
        flavour = "native"
        state = "halted"
        ncpus = 2
        raw = "broadcast"
        beside = "mprotect"

        def prepare(self, rig: Rig) -> None:
            self.mm = rig.cluster.users.tlb.mm_alloc()

        def block(self, rig: Rig, calls: int, warmup: int, gap_ns: int) -> Took:
            return rig.run(0, shootdowns, self.mm, calls, warmup, gap_ns)


    def shootdowns(mm, calls, warmup, gap_ns) -> _core.Hist: ...  # a task, on CPU 0


    def rows() -> list[UserRow]:
        return [Shootdown()]

In each block the raw call-function row is measured first, then the row, then what
stands beside it, all on the same machine: ratios are medians over the blocks.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any, ClassVar, Final, TypeAlias

if TYPE_CHECKING:
    from shmipi import _core
    from shmipi.bench.runner import Rig

__all__ = ["AT_MOST", "PACKETS", "RAW", "STATES", "PacketRow", "Took", "UserRow"]

#: What a block took: a time for each operation in ns, or ns an operation of batches.
Took: TypeAlias = "_core.Hist | list[float]"

#: The raw call-function rows, by name: what one is.
RAW: Final = {
    "single": "smp_call_function_single(wait=True) of a no-op, each call clocked",
    "batch": "the same in batches, without a clock inside",
    "nowait": "smp_call_function_single(wait=False) of a no-op, until all have run",
    "broadcast": "smp_call_function(wait=True) of a no-op on all other CPUs",
}
#: Packets of a batch.
PACKETS: Final = 20_000
STATES: Final = ("polling", "halted", "running")
#: The most times the raw row that one made of one call may take.
AT_MOST: Final = 1.5


class UserRow(ABC):
    """One row. ``what`` says in a few words what one operation is.

    ``state`` is what the targets, CPUs from 1 on, do when nothing comes; the rig sees
    to it: polling and running with 2 CPUs only, where each has a core. ``raw`` is one
    of ``RAW``, of the same flavour and state, taken ``raw_times`` times; ``at_most`` is
    how often that the row may take, None: nothing is promised. ``beside`` names a limit
    of ``shmipi.bench.limits`` that is its counterpart in the real world, "" for none.
    ``rate`` says that operations are counted by the second; ``least_rate`` is what is
    promised.
    """

    what: str
    flavour: str = "native"
    state: str = "halted"
    ncpus: int = 2
    raw: str = "single"
    raw_times: float = 1.0
    at_most: float | None = AT_MOST
    beside: str = ""
    rate: bool = False
    least_rate: float | None = None
    #: What no operation may take longer than, in ns.
    most_ns: float | None = None
    #: Where it misses what is promised: why, in a sentence.
    miss: str = ""
    #: Fewer calls than the option says: this part of them, for what takes long.
    share: float = 1.0
    #: That of the module; the frame sets it.
    user: ClassVar[str]

    # Most rows have nothing to do here.

    def prepare(self, rig: Rig) -> None:  # noqa: B027
        """Make what it needs on the machine, once; other rows share the machine."""

    @abstractmethod
    def block(self, rig: Rig, calls: int, warmup: int, gap_ns: int) -> Took:
        """Do ``calls`` operations from CPU 0, with a pause before each that clocks it.

        Targets are in their state when it begins. Called from the host.
        """

    def finish(self, rig: Rig) -> None:  # noqa: B027
        """Take back what would disturb other rows."""

    def extra(self) -> dict[str, Any]:
        """Return more figures for the JSON, such as doorbells an operation."""
        return {}


class PacketRow(UserRow):
    """Packets a second, sent by CPU 0 in batches of ``PACKETS``, and what it rang."""

    state = "polling"
    raw = "nowait"
    at_most = None
    rate = True
    #: The fewest batches of a block, and the calls that make one more.
    least_batches = 5
    calls_per_batch = 500

    def __init__(self) -> None:
        self._packets = self._rings = 0

    @abstractmethod
    def send(self, rig: Rig, batches: int) -> list[float]:
        """Send so many batches; return ns for each packet, by batch."""

    def block(self, rig: Rig, calls: int, warmup: int, gap_ns: int) -> Took:
        """Send, and count how often CPU 0 rang."""
        batches = max(self.least_batches, calls // self.calls_per_batch)
        before = rig.counters(0)
        took = self.send(rig, batches)
        after = rig.counters(0)
        self._packets += batches * PACKETS
        self._rings += sum(
            after[name] - before[name] for name in ("doorbells_sent", "kicks_sent")
        )
        return took

    def extra(self) -> dict[str, Any]:
        """Return how often CPU 0 rang, for each packet."""
        return {"doorbells_per_packet": self._rings / max(1, self._packets)}
