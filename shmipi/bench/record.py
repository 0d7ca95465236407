"""All benches in a row, each with fewer calls than by itself: a computer's record."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from shmipi.bench import registry
from shmipi.bench.runner import machine_facts
from shmipi.names import DOORBELLS

__all__ = ["LISTING", "PLAN", "SCHEMA", "Part", "file_of", "run"]

#: The document that lists the others: it is there from the beginning.
LISTING: Final = "all"
SCHEMA: Final = "shmipi.bench-all/1"
_NOT_YET: Final = "not measured yet"
_INTERRUPTED: Final = "interrupted"


@dataclass(frozen=True)
class Part:
    """A bench of a record: about how long it takes on two cores, and its options."""

    seconds: float
    options: Mapping[str, Any] = field(default_factory=dict)


#: Together under five minutes on two cores.
PLAN: Final[dict[str, Part]] = {
    "limits": Part(5, {"calls": 500, "blocks": 5}),
    "latency": Part(25, {"calls": 1000, "blocks": 5}),
    "controllers": Part(20, {"calls": 1000, "blocks": 5}),
    "irq": Part(20, {"calls": 100, "blocks": 5}),
    "throughput": Part(5, {"calls": 200_000}),
    "boot": Part(15),
    "broadcast": Part(8, {"calls": 10}),
    "death": Part(5, {"calls": 3}),
    "matrix": Part(3, {"calls": 500, "seconds": 10}),
    "gap": Part(
        22,
        {
            "gaps_us": (1, 10, 100, 1000, 10_000, 100_000),
            "doorbells": DOORBELLS[:2],
            "calls": 100,
            "seconds": 10,
        },
    ),
    "storm": Part(6),
    "victim": Part(12, {"ms": 20}),
    "norov": Part(3, {"calls": 300, "blocks": 5}),
    "scale": Part(25, {"calls": 10, "sizes": (2, 4, 16, 64, 256)}),
    "peers": Part(5, {"calls": 200}),
    "kernel": Part(2, {"calls": 500, "blocks": 5}),
    "trace": Part(1, {"calls": 50_000, "blocks": 5}),
    "users": Part(50, {"calls": 200, "blocks": 5, "most_cpus": 64}),
}


def file_of(name: str) -> str:
    """Return the name of a document's file."""
    return f"{name}.json"


class _Bar:
    """Tells what share of all is done, where a bench tells what of its own is."""

    def __init__(self, tell: Callable[..., None] | None, total: float) -> None:
        self._tell, self._total, self._before = tell, max(total, 1e-9), 0.0
        self._name, self._seconds = "", 0.0

    def begin(self, name: str, seconds: float) -> None:
        """The next one."""
        self._before += self._seconds
        self._name, self._seconds = name, seconds
        self("")

    def __call__(self, text: str, share: float = 0.0, keep: bool = False) -> None:
        """What a bench calls: of what stays to be read there is no room here."""
        if self._tell is None or keep:
            return
        done = (self._before + share * self._seconds) / self._total
        words = ": ".join(word for word in (self._name, text) if word)
        self._tell(words, share=min(1.0, done))


def run(
    save: Callable[[str, dict[str, Any]], None],
    *,
    plan: Mapping[str, Part] = PLAN,
    progress: Callable[..., None] | None = None,
    told: Callable[[str, dict[str, Any]], None] | None = None,
) -> dict[str, Any]:
    """Run each bench of ``plan`` and give its document to ``save(name, document)``.

    One that fails, or that cannot be had here, is listed with the reason, and the
    others go on. Returns the list, which ``save`` gets as ``LISTING``, first of all and
    after each: who is killed leaves one that is true. ``told(name, entry)`` hears of
    each that is done. What ``save`` raises ends it.
    """
    bar = _Bar(progress, sum(part.seconds for part in plan.values()))
    benches: dict[str, dict[str, Any]] = {name: {"missing": _NOT_YET} for name in plan}
    listing = {
        "schema": SCHEMA,
        "machine": machine_facts(),
        "estimated_s": sum(part.seconds for part in plan.values()),
        "took_s": 0.0,
        "benches": benches,
    }
    save(LISTING, listing)
    begun = time.monotonic()
    for name, part in plan.items():
        bar.begin(name, part.seconds)
        started = time.monotonic()
        try:
            entry = _one(save, name, part, bar)
        except KeyboardInterrupt:
            for entry in benches.values():
                if entry.get("missing") == _NOT_YET:
                    entry["missing"] = _INTERRUPTED
            save(LISTING, listing)
            raise
        now = time.monotonic()
        entry["took_s"] = round(now - started, 2)
        listing["took_s"] = round(now - begun, 2)
        benches[name] = entry
        save(LISTING, listing)
        if told is not None:
            told(name, entry)
    return listing


def _one(
    save: Callable[[str, dict[str, Any]], None], name: str, part: Part, bar: _Bar
) -> dict[str, Any]:
    try:
        bench = registry.load(name)
        found = bench.run(bench.Options(**part.options), bar)
    except Exception as error:  # whatever it is, it is this one's
        return {"missing": _why(error)}
    save(name, {"schema": "shmipi.bench/1", **found})
    return {"file": file_of(name)}


def _why(error: Exception) -> str:
    text = " ".join(str(error).split())
    return text or type(error).__name__
