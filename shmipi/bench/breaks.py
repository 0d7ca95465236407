"""The first call that took too long: what both CPUs did around it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

from shmipi.bench.runner import Rig, Seen
from shmipi.report.cells import span
from shmipi.trace import TraceEvent

__all__ = ["Broke", "around", "lines"]

#: What is shown of before and after the call.
_BEFORE_NS: Final = 50_000
_AFTER_NS: Final = 20_000
_MOST: Final = 400


@dataclass
class Broke(Exception):
    """A call took longer than ``--break`` allows: its number in the block, its stamps.

    All in ns of CLOCK_MONOTONIC; ``arrived`` is 0 where the handler said nothing.
    """

    number: int
    sent: int
    arrived: int
    over: int


def around(
    broke: Broke, rig: Rig, row: str, target: int, seen: Seen, break_us: float
) -> dict[str, Any]:
    """Return the ``broke`` of a document: the call, and what was recorded around it.

    ``seen`` has looked at the block that ended with it. Times are in ns from when the
    call was sent.
    """
    records = rig.cluster.trace_events()
    ours = (records["slot"] == 0) | (records["slot"] == target)
    stamps = records["stamp"].astype("i8")
    ours &= (stamps >= broke.sent - _BEFORE_NS) & (stamps <= broke.over + _AFTER_NS)
    events = [
        {
            "ns": int(record["stamp"]) - broke.sent,
            "cpu": int(record["slot"]),
            "event": TraceEvent(int(record["event"])).name,
            "to": int(record["cpu"]),
            "arg": int(record["arg"]),
        }
        for record in records[ours][-_MOST:]
    ]
    return {
        "row": row,
        "break_us": break_us,
        "call": broke.number,
        "took_ns": broke.over - broke.sent,
        "arrived_ns": broke.arrived - broke.sent if broke.arrived else None,
        "sender_core": rig.cores[0],
        "target_core": rig.cores[target],
        "block": {
            "seconds": seen.seconds,
            "stolen_s": seen.stolen_s,
            "target_preempted": seen.preempted,
            "throttled": seen.throttled,
            "gc_runs": seen.collections,
            "sender_real_ipis": dict(seen.sender_real),
            "target_real_ipis": dict(seen.target_real),
        },
        "events": events,
    }


def lines(broke: dict[str, Any]) -> list[str]:
    """Return it as lines for people."""
    took, block = span(broke["took_ns"]), broke["block"]
    found = [
        f"stopped: {broke['row']}, call {broke['call']} took {took}, more than"
        f" {broke['break_us']:g} us"
    ]
    if broke["arrived_ns"] is not None:
        there = span(broke["arrived_ns"])
        found.append(f"  its handler was entered after {there}")
    found.append(
        f"  in its block of {block['seconds']:.3f} s: {block['stolen_s']:.2f} s stolen,"
        f" the target preempted {block['target_preempted']} times, real interrupts of"
        f" the sender's core {_kinds(block['sender_real_ipis'])}, of the target's"
        f" {_kinds(block['target_real_ipis'])}, {block['gc_runs']} collections"
    )
    found.append("  what both CPUs did, in us from when it was sent:")
    for event in broke["events"]:
        column = "" if event["cpu"] == 0 else " " * 28
        found.append(
            f"  {event['ns'] / 1000:12.3f}  {column}CPU {event['cpu']}"
            f" {event['event']} cpu={event['to']} arg={event['arg']}"
        )
    return found


def _kinds(kinds: dict[str, int]) -> str:
    return ", ".join(f"{name} {n}" for name, n in kinds.items() if n) or "none"
