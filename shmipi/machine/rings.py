"""The rings that tracepoints are recorded in: in a machine's memory, one for each slot.

They are made when somebody first asks for them, before the boot or while the machine
runs. Which events are recorded is a word of the header (``Machine.set_tracing``), which
every CPU reads at each tracepoint: nothing else is told to it.
"""

from __future__ import annotations

from shmipi import _core
from shmipi.errors import ClusterStateError
from shmipi.machine.arrays import Arrays

__all__ = ["MOST_RECORDS", "RECORDS", "check_records", "make", "prepare"]

#: Of each slot, where nobody says otherwise: 256 KiB.
RECORDS = 8192
MOST_RECORDS = 1 << 24
_NAME = "trace"


def check_records(records: object) -> int:
    """Return the size of a ring, the next power of two. ``TypeError, ValueError``."""
    if isinstance(records, bool) or not isinstance(records, int):
        raise TypeError(f"the size of trace rings is {records!r}: give records per CPU")
    if not 2 <= records <= MOST_RECORDS:
        raise ValueError(
            f"trace rings of {records} records: give 2 to {MOST_RECORDS} per CPU"
        )
    return 1 << (records - 1).bit_length()


def make(home: Arrays, records: int) -> None:
    """Give the machine rings of ``records`` for each slot, if it has others or none.

    What others hold stays in memory until the machine ends, and is read no more.
    Raises ``ArenaFullError`` (ENOSPC) when /dev/shm is full, ``ClusterStateError``
    while somebody takes records out of those of another size.
    """
    machine = home.machine
    rings = machine.trace_rings()
    if rings is not None and rings[0] == records:
        return
    if rings is not None:
        if not machine.trace_reader(True):
            raise ClusterStateError(
                f"this machine is recorded already, in rings of {rings[0]} records: its"
                " recorder would get no more of them"
            )
        machine.trace_reader(False)  # the lock is one of the rings that go
    name = f"{_NAME}.{records}"
    memory = home.make("user", name, "u1", machine.trace_bytes(records))
    memory[:4].view("<u4")[0] = records
    offset = home.offset_of(memory)
    assert offset is not None
    machine.publish_user(_NAME, offset)


def prepare(machine: _core.Machine, records: int) -> None:
    """Rings for a machine that is not up yet, and everything recorded in them."""
    home = Arrays(machine)
    try:
        make(home, records)
    finally:
        home.close()
    machine.set_tracing((1 << len(_core.TRACE_EVENTS)) - 1)
