"""The tracepoints of a machine booted with ``trace=True``."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from shmipi import _core

__all__ = ["RECORD", "read"]

#: A record as the core writes it (``struct shi_trace_record``).
RECORD = np.dtype(
    [
        ("stamp", "u8"),
        ("event", "u2"),
        ("cpu", "u2"),
        ("csd", "u4"),
        ("func", "u4"),
        ("arg", "u4"),
        ("seq", "u8"),
    ]
)
assert RECORD.itemsize == _core.TRACE_RECORD_BYTES


def read(machine: _core.Machine) -> NDArray[Any]:
    """Return what the rings hold, oldest first: RECORD plus ``slot``, the writer.

    ``stamp`` is in ns of CLOCK_MONOTONIC, ``event`` an index of ``_core.TRACE_EVENTS``.
    Records that are overwritten while they are copied are left out.
    """
    found = np.dtype([("slot", "u2"), *RECORD.descr])
    if not machine.trace_records:
        return np.empty(0, found)
    rings = np.ndarray(
        (machine.nslots, machine.trace_records),
        RECORD,
        memoryview(machine),
        machine.trace_offset,
    )
    before = rings["seq"].copy()
    copy = rings.copy()
    # The writer clears `seq` first and sets it last: the same twice is a whole record.
    whole = (before != 0) & (before == copy["seq"]) & (before == rings["seq"])
    slots, _ = np.nonzero(whole)
    result = np.empty(len(slots), found)
    result["slot"] = slots
    for name in RECORD.names or ():
        result[name] = copy[name][whole]
    result["stamp"] = [_core.stamp_to_mono(int(stamp)) for stamp in result["stamp"]]
    result.sort(order="stamp", kind="stable")
    return result
