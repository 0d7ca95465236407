"""The tracepoints of a machine, as its CPUs record them."""

from __future__ import annotations

from collections.abc import Sequence
from enum import IntEnum
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shmipi import _core

__all__ = ["FOUND", "RECORD", "TraceEvent", "in_order", "read", "with_slot"]


class TraceEvent(IntEnum):
    """What a record of ``trace_events()`` is of: its field ``event``.

    ``records[records["event"] == TraceEvent.ipi_entry]``, and the other way round
    ``TraceEvent(records["event"][0]).name``.
    """

    none = 0  #: never recorded
    csd_queue_cpu = 1  #: a csd was queued
    csd_function_entry = 2
    csd_function_exit = 3
    ipi_send_cpu = 4
    ipi_entry = 5
    ipi_exit = 6
    wake_idle_without_ipi = 7  #: not rung: the target was polling
    cpu_halt = 8
    cpu_wake = 9
    call_entry = 10  #: arg: 0 single, 1 many, 2 and 3 reschedule; cpu: (first) target
    call_begin = 11  #: a sender has a csd filled
    queue_push = 12  #: the csd is locked and goes to the target's queue
    csd_coalesced = 13  #: not rung: the queue was not empty, somebody has
    call_ipi = 14  #: the controller is asked to interrupt one CPU; arg: the line
    ipi_send_cpumask = 15  #: the same for several; cpu: how many, func: register writes
    call_end = 16  #: a waiting sender has seen its csd unlocked
    csd_unlock = 17
    call_interrupt = 18  #: a function call interrupt; arg: its line
    flush = 19  #: the whole queue was taken
    scheduler_ipi = 20  #: a reschedule interrupt; arg: its line
    resched_idle = 21  #: a polling CPU found that it needs to reschedule
    irq_entry = 22  #: the kick signal's handler acknowledged
    irq_exit = 23
    irq_masked = 24  #: it found interrupts off: replayed later
    line_set = 25  #: arg: the line made pending
    line_kept = 26  #: arg: a line that needed no ring: pending already, or masked
    chip_message = 27  #: arg: the message stored behind a muxed line
    chip_trigger = 28  #: arg: P and Q of the source before | line << 8
    rung = 29  #: arg: 0 not, 1 doorbell, 2 kick signal, 3 NMI signal
    chip_demux = 30  #: arg: messages taken from behind a line, a bit each
    chip_eoi = 31  #: arg: 1 if the source was triggered again | line << 8
    line_ack = 32  #: arg: the line taken from the controller
    line_eoi = 33  #: arg: the line given back to the controller
    nmi_send = 34
    nmi_entry = 35
    nmi_handler = 36
    nmi_exit = 37
    softirq_raise = 38  #: arg: its number
    softirq_entry = 39  #: arg: its number
    softirq_exit = 40  #: arg: its number
    softirqd_wake = 41  #: what is left is ksoftirqd's; arg: softirqs, a bit each
    vector_entry = 42  #: the handler of a line begins; arg: line | what for << 16
    vector_exit = 43
    reschedule_ipi = 44  #: the controller is asked to nudge a CPU; arg: the line
    irq_work_ipi = 45  #: a CPU interrupts itself; csd, func: the work's
    cpumask = 46  #: of ipi_send_cpumask; csd: from that CPU on, func | arg << 32: bits
    cpu_online = 47
    cpu_offline = 48
    cpu_dead = 49  #: the firmware has found it dead; arg: how it ended


#: A record as the core writes it (``struct shi_trace_record``).
RECORD = np.dtype(
    [
        ("stamp", "u8"),
        ("event", "u1"),
        ("flags", "u1"),
        ("cpu", "u2"),
        ("csd", "u4"),
        ("func", "u4"),
        ("arg", "u4"),
        ("site", "u4"),
        ("seq", "u4"),
    ]
)
assert RECORD.itemsize == _core.TRACE_RECORD_BYTES
#: The same with who wrote it: ``slot``.
FOUND = np.dtype([("slot", "u2"), *RECORD.descr])


def read(machine: _core.Machine) -> NDArray[Any]:
    """Return what the rings hold, oldest first: FOUND, ``stamp`` in ns.

    It is left there. Records that are written or overwritten while they are copied are
    left out.
    """
    if machine.trace_rings() is None:
        return np.empty(0, FOUND)
    parts = [
        with_slot(slot, machine.trace_take(slot, 0, True)[0])
        for slot in range(machine.nslots)
    ]
    return in_order(parts)


def with_slot(slot: int, raw: bytes) -> NDArray[Any]:
    """Return raw records of one slot as FOUND, ``stamp`` as it was written."""
    records = np.frombuffer(raw, RECORD)
    found = np.empty(len(records), FOUND)
    found["slot"] = slot
    for name in RECORD.names or ():
        found[name] = records[name]
    return found


def in_order(parts: Sequence[NDArray[Any]]) -> NDArray[Any]:
    """Put records of several slots in one order; ``stamp`` in ns of CLOCK_MONOTONIC."""
    found = np.concatenate(parts) if parts else np.empty(0, FOUND)
    found = found[np.argsort(found["stamp"], kind="stable")]
    found["stamp"] = [_core.stamp_to_mono(int(stamp)) for stamp in found["stamp"]]
    return found
