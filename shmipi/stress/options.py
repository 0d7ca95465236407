"""What a stress run is told: its options, and the kernel's rules for weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

__all__ = ["HANDLERS", "PRIMITIVES", "Options", "selection"]

#: The kinds of call, in the order of their numbers: scftorture's ``SCF_PRIM_*``.
PRIMITIVES: Final = (
    "resched",
    "single",
    "single_wait",
    "single_rpc",
    "many",
    "many_wait",
    "all",
    "all_wait",
)
HANDLERS: Final = ("mix", "python", "native")

#: scftorture's default weights: a number, and whether it is for each CPU.
_DEFAULTS: Final = {
    "resched": (2, True),
    "single": (2, True),
    "single_wait": (2, True),
    "single_rpc": (2, True),
    "many": (2, False),
    "many_wait": (2, False),
    "all": (1, False),
    "all_wait": (1, False),
}


@dataclass(frozen=True)
class Options:
    """A stress run; times are in seconds.

    ``weights`` maps primitives to weights, -1 (the default) as ``selection`` says.
    ``nthreads`` is the number of CPUs with an invoker, the first ones; -1: all.
    ``stutter`` is how long invokers run, and then pause, in turn; 0: no pauses.
    ``onoff_interval`` and ``kill_interval`` are the times between hotplug events and
    between ``kill -9`` of a random CPU; 0: none. ``kills`` ends the kills after that
    many. ``stall_interval`` is the time between SIGSTOPs of a random CPU, for up to a
    tenth of a second each. ``longwait`` is the longest that a handler may burn, once in
    a while.
    ``seed`` makes each invoker's choices the same again; None: a random one, which the
    report names. ``handler`` is one of ``HANDLERS``: Python handlers check the CPU and
    both memory orders, native ones are counted only. ``machine`` holds arguments of
    ``Cluster``.
    """

    duration: float = 10.0
    nthreads: int = -1
    longwait: float = 0.0
    stutter: float = 0.02
    stat_interval: float = 5.0
    onoff_interval: float = 0.0
    kill_interval: float = 0.0
    kills: int | None = None
    stall_interval: float = 0.0
    seed: int | None = None
    handler: str = "mix"
    weights: Mapping[str, int] = field(default_factory=dict)
    machine: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.handler not in HANDLERS:
            raise ValueError(
                f"handler is {self.handler!r}: choose from {', '.join(HANDLERS)}"
            )
        check_times(self, "stutter")
        if not 0 <= self.longwait <= 3600:
            raise ValueError(f"longwait is {self.longwait!r}: give 0 to 3600 seconds")
        if self.nthreads != -1 and self.nthreads < 1:
            raise ValueError(f"nthreads is {self.nthreads}: give 1 or more, or -1")
        unknown = set(self.weights) - set(PRIMITIVES)
        if unknown:
            raise ValueError(f"there is no primitive {min(unknown)!r}")
        selection(self.weights, 2)  # whether they make sense does not depend on n

    def senders(self, ncpus: int) -> int:
        """Return how many CPUs get an invoker. ``ValueError``: more than there are."""
        if self.nthreads > ncpus:
            raise ValueError(
                f"nthreads is {self.nthreads}, but a CPU runs one invoker and there are"
                f" {ncpus} CPUs"
            )
        return ncpus if self.nthreads == -1 else self.nthreads


def check_times(options: object, *more: str) -> None:
    """Check the times of every run, and ``more`` that may be 0. ``ValueError``."""
    for name in (*more, "onoff_interval", "kill_interval", "stall_interval"):
        value = getattr(options, name)
        if not 0 <= value < 1e9:
            raise ValueError(f"{name} is {value!r}: give seconds, 0 or more")
    for name in ("duration", "stat_interval"):
        value = getattr(options, name)
        if not 0 < value < 1e9:
            raise ValueError(f"{name} is {value!r}: give seconds above 0")


def selection(weights: Mapping[str, int], ncpus: int) -> tuple[int, ...]:
    """Return the weight of each of ``PRIMITIVES`` by scftorture's rules.

    With no weight above 0, -1 means the default (2 for each CPU for resched and the
    singles, 2 for the manys, 1 for the alls) and 0 removes that primitive; with any
    above 0, -1 means 0. Raises ``ValueError`` when nothing is left, and for weights
    below -1.
    """
    given = {name: weights.get(name, -1) for name in PRIMITIVES}
    for name, weight in given.items():
        if not -1 <= weight <= 1_000_000_000:
            raise ValueError(f"weight_{name} is {weight}: give -1 (default), 0 or more")
    if all(weight <= 0 for weight in given.values()):
        chosen = tuple(
            0 if given[name] == 0 else number * (ncpus if each else 1)
            for name, (number, each) in _DEFAULTS.items()
        )
    else:
        chosen = tuple(max(0, weight) for weight in given.values())
    if not any(chosen):
        raise ValueError("all zero weights makes no sense")
    return chosen
