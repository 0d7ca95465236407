"""What a stress run found: the account, and its lines in scftorture's form."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from shmipi.stress.options import PRIMITIVES

__all__ = ["Hotplug", "Report", "statistics"]

#: What makes ``errors``, by the name it has there, besides lost and duplicated.
_ERRORS = {
    "wrong_cpu": "ran on another CPU than wanted",
    "memory_order_in": "the sender's store before the call not seen by the handler",
    "memory_order_out": "the handler's store not seen after a waiting call",
    "allocation": "no room for a call",
    "stalled": "waited too long",
    "late": "ran after it had been settled",
    "died": "a CPU died by itself",
    "raised": "a handler or an invoker raised",
    "corrupt": "damaged queue entries dropped by the machine",
    "hotplug": "a CPU could not be taken off- or brought online",
}


@dataclass
class Hotplug:
    """What the driver did to the CPUs: attempts, successes, milliseconds."""

    offline_attempts: int = 0
    offline: int = 0
    online_attempts: int = 0
    online: int = 0
    offline_ms: list[float] = field(default_factory=lambda: [0.0, 0.0])
    online_ms: list[float] = field(default_factory=lambda: [0.0, 0.0])
    kills: int = 0
    stalls: int = 0

    def took(self, which: str, seconds: float) -> None:
        """Note how long a successful change took: [shortest, longest]."""
        span: list[float] = getattr(self, f"{which}_ms")
        ms = seconds * 1e3
        first = getattr(self, which) <= 1
        span[0] = ms if first else min(span[0], ms)
        span[1] = max(span[1], ms)

    def __str__(self) -> str:
        on, off = self.online_ms, self.offline_ms
        return (
            f"onoff: {self.online}/{self.online_attempts}:"
            f"{self.offline}/{self.offline_attempts}"
            f" {on[0]:.0f},{on[1]:.0f}:{off[0]:.0f},{off[1]:.0f} ms"
            f" kill: {self.kills} stall: {self.stalls}"
        )


@dataclass
class Report:
    """The account of a run.

    ``calls`` were made (``by_primitive``), of which ``offline`` (by primitive) were
    refused because the target was. ``executions`` of handlers were counted.
    ``lost`` and ``duplicated`` are executions too few and too many,
    ``in_flight_at_death`` calls that a death left undecided: no error. ``errors`` is
    the number of everything else that was wrong, by kind in ``error_counts``.
    """

    calls: int
    by_primitive: dict[str, int]
    offline: dict[str, int]
    executions: int
    lost: int
    duplicated: int
    in_flight_at_death: int
    error_counts: dict[str, int]
    hotplug: Hotplug
    seed: int
    duration_s: float
    parameters: str
    machine: dict[str, Any]
    interrupted: bool = False
    complaints: list[str] = field(default_factory=list)

    @property
    def errors(self) -> int:
        """How many errors there were besides lost and duplicated executions."""
        return sum(self.error_counts.values())

    @property
    def verdict(self) -> str:
        """SUCCESS or FAILURE."""
        return "FAILURE" if self.errors or self.lost or self.duplicated else "SUCCESS"

    @property
    def calls_per_s(self) -> float:
        """Calls per second of all CPUs together."""
        return self.calls / self.duration_s if self.duration_s else 0.0

    def end(self) -> str:
        """Return scftorture's last line."""
        return f"shmipi-stress:  --- End of test: {self.verdict}: {self.parameters}"

    def explain(self) -> list[str]:
        """Return a line for each kind of error that occurred."""
        lines = [
            f"{count} x {name}: {_ERRORS[name]}"
            for name, count in self.error_counts.items()
            if count
        ]
        if self.lost:
            lines.append(f"{self.lost} executions lost")
        if self.duplicated:
            lines.append(f"{self.duplicated} executions too many")
        return lines + self.complaints

    def as_dict(self) -> dict[str, Any]:
        """Return the fields of the JSON document."""
        fields = asdict(self)
        fields["errors"] = self.errors
        fields["verdict"] = self.verdict
        fields["calls_per_s"] = round(self.calls_per_s, 1)
        return fields


def error_counts(totals: dict[str, int], more: dict[str, int]) -> dict[str, int]:
    """Return the number of each kind of error; ``more``: what the driver found."""
    counts = dict.fromkeys(_ERRORS, 0)
    counts["wrong_cpu"] = totals["wrong_cpu"] + totals["stray"]
    counts["memory_order_in"] = totals["mb_in"]
    counts["memory_order_out"] = totals["mb_out"]
    counts["allocation"] = totals["alloc"]
    for name in ("stalled", "late", "died", "raised"):
        counts[name] = totals[name]
    for name, number in more.items():
        counts[name] += number
    return counts


def made(totals: dict[str, int]) -> dict[str, int]:
    """Return how many calls there were of each primitive."""
    return {name: totals[name] for name in PRIMITIVES}


def statistics(
    totals: dict[str, int], errors: dict[str, int], hotplug: Hotplug, *, done: bool
) -> str:
    """Return scftorture's line of statistics, ours behind it.

    ``!!!`` when anything is wrong; ``VER`` at the end of the run. ``ste`` are
    executions on a wrong CPU and errors of other kinds, ``stnmie`` and ``stnmoe``
    memory orders into and out of a handler, ``staf`` failed allocations, ``ifd`` calls
    in flight at a death.
    """
    memory = ("memory_order_in", "memory_order_out", "allocation")
    ste = sum(count for name, count in errors.items() if name not in memory)
    wrong = sum(errors.values()) + totals["lost"] + totals["duplicated"]
    t = totals
    return (
        f"shmipi-stress: {'!!! ' if wrong else ''}"
        f"scf_invoked_count {'VER' if done else 'ver'}: {t['executions']}"
        f" resched: {t['resched']}"
        f" single: {t['single']}/{t['single_wait']}"
        f" single_ofl: {t['single_ofl']}/{t['single_wait_ofl']}"
        f" single_rpc: {t['single_rpc']} single_rpc_ofl: {t['single_rpc_ofl']}"
        f" many: {t['many']}/{t['many_wait']} all: {t['all']}/{t['all_wait']}"
        f" {hotplug}"
        f" ste: {ste} stnmie: {errors['memory_order_in']}"
        f" stnmoe: {errors['memory_order_out']} staf: {errors['allocation']}"
        f" lost: {t['lost']} dup: {t['duplicated']} ifd: {t['in_flight']}"
    )
