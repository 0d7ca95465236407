"""Did other work hold a core meanwhile? What the kernel counts for the process on it.

Three signs, of a process that is pinned to its core: it was pushed off it (an
involuntary context switch); it was ready to run and waited for it, longer than waking
up takes; the hypervisor took the core away (steal, in ticks of 10 ms).
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final, NamedTuple

from shmipi.machine.facts import steal_seconds

__all__ = ["SWITCHES_NS", "WAKING_NS", "Held", "Look", "held", "look"]

#: A process that wakes up is on the list of those that are ready for as long as its
#: core needs to come out of its sleep: in a virtual machine up to a tenth of a
#: millisecond. Only a longer wait is other work's.
WAKING_NS: Final = 100_000
#: Other work comes to a core and leaves it by two context switches. What took a shorter
#: time than these do had the core to itself.
SWITCHES_NS: Final = 1_000


class Look(NamedTuple):
    """What was counted for a process so far; zeros where the kernel does not count."""

    preempted: int  #: involuntary context switches
    waited_ns: int  #: ready, and not running
    stolen_s: float  #: of its core, by the hypervisor


@dataclass(frozen=True)
class Held:
    """How other work held a CPU's core between two looks."""

    preempted: int
    waited_ns: int
    stolen_s: float

    @property
    def why(self) -> str:
        """The same in words."""
        found = []
        if self.preempted:
            times = "once" if self.preempted == 1 else f"{self.preempted} times"
            found.append(f"was pushed off its core {times}")
        if self.waited_ns > WAKING_NS:
            found.append(f"waited {self.waited_ns / 1e6:.1f} ms for it")
        if self.stolen_s:
            found.append(f"lost it to the hypervisor for {self.stolen_s * 1000:.0f} ms")
        return " and ".join(found)


def look(pid: int, core: int, *, proc: Path = Path("/proc")) -> Look:
    """Look at what the kernel has counted for a process and its core."""
    preempted = waited = 0
    with suppress(OSError, ValueError):
        for line in (proc / str(pid) / "status").read_text().splitlines():
            if line.startswith("nonvoluntary_ctxt_switches:"):
                preempted = int(line.split()[1])
    with suppress(OSError, ValueError, IndexError):
        # Ran, was ready and waited, in ns; and how often it was given the core.
        waited = int((proc / str(pid) / "schedstat").read_text().split()[1])
    return Look(preempted, waited, steal_seconds([core], proc=proc) or 0.0)


def held(before: Look, after: Look) -> Held | None:
    """Return how other work held the core between two looks, ``None`` if it did not."""
    found = Held(
        after.preempted - before.preempted,
        after.waited_ns - before.waited_ns,
        max(0.0, after.stolen_s - before.stolen_s),
    )
    return found if found.why else None
