"""Two runs of a bench beside each other, and whether one is to be trusted."""

from __future__ import annotations

import json
import math
import statistics
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, TypeGuard

from shmipi.errors import CommandError
from shmipi.report.export import distributions, name_of
from shmipi.report.hist import Counts

__all__ = [
    "SIGNIFICANT",
    "Change",
    "changes",
    "differences",
    "doubts",
    "hills",
    "load",
    "mann_whitney",
    "of_machine",
]

#: A change that chance alone would bring about less often than this.
SIGNIFICANT: Final = 0.01

#: What two computers, or one at two times, have to have in common.
_MACHINE: Final = (
    *("cpu_model", "arch", "ncores", "cores", "sender_core", "target_core", "smt"),
    *("virtualisation", "kernel", "clocksource", "idle_driver", "python"),
)
#: What is measured of a document, not asked for.
_RESULTS: Final = frozenset(
    (
        *("schema", "machine", "limits", "rows", "foundation", "timer_ns"),
        *("pipe_rtt_ns", "estimated_s", "took_s", "pairs", "broke"),
        *("stamp_ns", "unavailable"),
    )
)
#: Numbers of a row that are about the measuring.
_NO_FIGURES: Final = frozenset(
    ("stolen_s", "backoff_ns", "batch_backoff_ns", "one_way_error_ns")
)
_QUANTILES: Final = (("p50", 2), ("p90", 20), ("p99", 200), ("p999", 2000))
_STEAL_SHARE: Final = 0.02
_MODE_SHARE: Final = 0.1
_PER_OCTAVE: Final = 4


def load(path: str | Path) -> dict[str, Any]:
    """Return the document that ``bench --json`` wrote. ``CommandError``, status 2."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is no text"
        raise CommandError(f"{path}: {reason}", status=2) from None
    try:
        found = json.loads(text)
    except ValueError as error:
        raise CommandError(f"{path} is no JSON: {error}", status=2) from None
    if not isinstance(found, dict) or found.get("schema") != "shmipi.bench/1":
        raise CommandError(f"{path} is no document of `shmipi bench`", status=2)
    if (what := _damage(found)) is not None:
        raise CommandError(
            f"{path}: a document of `shmipi bench`, damaged: {what}", status=2
        )
    return found


def _damage(found: dict[str, Any]) -> str | None:
    """Return the first part that is not what every bench writes there."""
    rows, limits, machine = (found.get(n) for n in ("rows", "limits", "machine"))
    if not isinstance(found.get("bench"), str):
        return "no bench is named"
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        return "rows"
    if not isinstance(limits, dict | None) or not all(
        isinstance(limit, dict) for limit in (limits or {}).values()
    ):
        return "limits"
    if not isinstance(machine, dict) or not (
        isinstance(machine.get("steal_share"), float | int | None)
        and _are(str, machine.get("governors") or [])
    ):
        return "machine"
    if not _are(str, found.get("warnings") or []):
        return "warnings"
    for name, row in _by_name(found).items():
        if (key := _damage_of_row(row)) is not None:
            return f"{name}: {key}"
    return None


def _damage_of_row(row: dict[str, Any]) -> str | None:
    if not _are(str, row.get("why") or []):
        return "why"
    for key, value in row.items():
        if key.endswith("_blocks") and not _are(float | int, value or []):
            return key
    for key, times in distributions(row):
        if not (
            isinstance(times["hist"], str)
            and isinstance(times.get("count"), int)
            and isinstance(times["p50"], float | int | None)
        ):
            return key or "hist"
    return None


def _are(kind: Any, values: object) -> bool:
    return isinstance(values, list) and all(isinstance(one, kind) for one in values)


# ---- two of them ---------------------------------------------------------------------


@dataclass(frozen=True)
class Change:
    """A figure of a row, in two runs.

    ``p`` is how often chance alone would make the blocks of the two differ so much (two
    sided, Mann and Whitney's U); None: the documents have no blocks of it. ``judged``:
    nothing else of the row says it better, as its ratio to a limit does.
    """

    row: str
    figure: str
    before: float
    after: float
    p: float | None
    judged: bool = True

    @property
    def percent(self) -> float:
        """By how many percent it is more than before."""
        return (self.after / self.before - 1) * 100

    @property
    def significant(self) -> bool | None:
        """Whether it is more than chance; None: not known."""
        return None if self.p is None else self.p < SIGNIFICANT

    def worse_than(self, percent: float) -> bool:
        """Whether it got worse by more, and not by chance as far as that is known."""
        more = -self.percent if self.figure.endswith("per_s") else self.percent
        return self.judged and more > percent and self.significant is not False


def differences(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """Return why the two should not be compared: other computers, cores, options."""
    found = []
    if before.get("bench") != after.get("bench"):
        found.append(f"bench {before.get('bench')}, and {after.get('bench')}")
    for name in _MACHINE:
        one, other = before["machine"].get(name), after["machine"].get(name)
        if one != other:
            found.append(f"machine: {name} {one}, and {other}")
    options = {*before, *after} - _RESULTS - {"bench"}
    for name in sorted(options):
        if before.get(name) != after.get(name):
            found.append(f"{name} {before.get(name)}, and {after.get(name)}")
    return found


def changes(before: dict[str, Any], after: dict[str, Any]) -> list[Change]:
    """Return each figure that both have, row by row.

    A row that was timed in turn with a limit has its ratio to it, of which what the
    computer did meanwhile has dropped out; else its blocks, or its median.
    """
    rows = _by_name(before)
    found: list[Change] = []
    for name, row in _by_name(after).items():
        if name in rows:
            found.extend(_row_changes(name, rows[name], row))
    return found


def _by_name(document: dict[str, Any]) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {}
    for row in document["rows"]:
        found.setdefault(name_of(row), row)
    for name, limit in (document.get("limits") or {}).items():
        found.setdefault(f"limit {name}", limit)
    return found


def _row_changes(
    name: str, before: dict[str, Any], after: dict[str, Any]
) -> Iterator[Change]:
    blocks = _blocks(before) & _blocks(after)
    for key, new in after.items():
        old, figure = before.get(key), key
        if isinstance(new, dict) and isinstance(old, dict):
            old, new, figure = old.get("p50"), new.get("p50"), f"{key} p50"
        elif key in _NO_FIGURES or not (
            key in ("p50", "per_s") or key.endswith(("ns", "_s", "ratio", "lost_share"))
        ):
            continue
        if not (_is_number(old) and _is_number(new) and old > 0 and new > 0):
            continue
        p = None
        if key in blocks:
            p = mann_whitney(before[f"{key}_blocks"], after[f"{key}_blocks"])
        # What a limit that was timed in turn has not dropped out of says less; and the
        # limits themselves are the computer's.
        judged = key in blocks if blocks else not name.startswith("limit ")
        yield Change(name, figure, old, new, p, judged)


def _blocks(row: dict[str, Any]) -> set[str]:
    return {
        key.removesuffix("_blocks")
        for key, value in row.items()
        if key.endswith("_blocks") and isinstance(value, list)
    }


def _is_number(value: object) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool)


def mann_whitney(first: Sequence[float], second: Sequence[float]) -> float | None:
    """Return the two-sided p of Mann and Whitney's U; None for fewer than 5 of each.

    By the normal approximation, with the corrections for ties and for continuity.
    """
    n, m = len(first), len(second)
    if min(n, m) < 5:
        return None
    ranked = sorted((*first, *second))
    ranks: dict[float, float] = {}
    position = 0
    ties = Counter(ranked)
    for value, times in sorted(ties.items()):
        ranks[value] = position + (times + 1) / 2
        position += times
    u = sum(ranks[value] for value in first) - n * (n + 1) / 2
    total = n + m
    correction = sum(t**3 - t for t in ties.values()) / (total * (total - 1))
    variance = n * m / 12 * (total + 1 - correction)
    if variance <= 0:
        return 1.0
    z = max(0.0, abs(u - n * m / 2) - 0.5) / math.sqrt(variance)
    return min(1.0, 2 * (1 - statistics.NormalDist().cdf(z)))


# ---- one of them ---------------------------------------------------------------------


def doubts(document: dict[str, Any]) -> list[str]:
    """Return why a run is not to be trusted, a sentence each; none: nothing found."""
    return [
        *_doubts_of_machine(document["machine"], document),
        *(f"the trace: {text}" for text in document.get("warnings", ())),
        *_doubts_of_rows(document),
    ]


#: How sentences begin that are about the computer and not about a row.
_OF_MACHINE: Final = (
    "the hypervisor took",
    "the control group's",
    "other work was",
    "stamps came from",
    "cores change",
    "processes could not",
)


def of_machine(doubt: str) -> bool:
    """Is it about the computer, and not about a row?"""
    return doubt.startswith(_OF_MACHINE)


def _doubts_of_machine(
    machine: dict[str, Any], document: dict[str, Any]
) -> Iterator[str]:
    share = machine.get("steal_share") or 0.0
    if share > _STEAL_SHARE:
        yield (
            f"the hypervisor took {share:.1%} of the time since boot away from this"
            " computer's cores"
        )
    if machine.get("cgroup_throttled_periods"):
        yield (
            "the control group's quota was used up and its processes were held back"
            f" {machine['cgroup_throttled_periods']} times"
        )
    load, cores = machine.get("load_1m"), machine.get("ncores")
    if _is_number(load) and _is_number(cores) and load > cores:
        yield f"other work was running: a load of {load} on {cores} cores"
    clock = document.get("clock")
    if clock is not None and clock not in ("tsc", "cntvct"):
        yield (
            f"stamps came from {clock}, a system call each: short times are mostly its"
            " cost"
        )
    governors = machine.get("governors")
    if governors and set(governors) - {"performance"}:
        yield (
            f"cores change their frequency (governor {', '.join(sorted(governors))}):"
            " what is measured first is slower"
        )
    if machine.get("pinning_error"):
        yield f"processes could not be pinned: {machine['pinning_error']}"


def _doubts_of_rows(document: dict[str, Any]) -> Iterator[str]:
    samples: dict[str, list[str]] = {}
    for name, row in _by_name(document).items():
        if row.get("valid") is False:
            why = dict.fromkeys(row.get("why") or ["it does not say why"])
            said = "; ".join(text.removeprefix(f"{name}: ") for text in why)
            yield f"{name}: not valid: {said}"
        for key, times in distributions(row):
            where = f"{name} {key}".strip()
            few = [q for q, least in _QUANTILES if times["count"] < least]
            if few:
                samples.setdefault(few[0], []).append(where)
            modes = _modes(times)
            if len(modes) > 1:
                shown = " and ".join(f"{_us(at)} ({part:.0%})" for at, part in modes)
                yield f"{where} has several modes: {shown}; a median stands for none"
    for quantile, rows in samples.items():
        least = dict(_QUANTILES)[quantile]
        yield (
            f"too few samples for {quantile} and above (fewer than {least}):"
            f" {rows[0]}" + (f" and {len(rows) - 1} more" if len(rows) > 1 else "")
        )


def _modes(times: dict[str, Any]) -> list[tuple[float, float]]:
    """Return each mode: its place in ns, and its share of all values."""
    heights: Counter[int] = Counter()
    for value, count in Counts.of(times).steps:
        heights[round(math.log2(max(1, value)) * _PER_OCTAVE)] += count
    if not heights:
        return []
    first = min(heights)
    line = [heights[at] for at in range(first, max(heights) + 1)]
    return [
        (2 ** ((first + top) / _PER_OCTAVE), share)
        for top, share in hills(line)
        if share >= _MODE_SHARE
    ]


def hills(heights: Sequence[int]) -> list[tuple[int, float]]:
    """Return each hill of a line of heights: where its top is, and its share of all.

    Two are two when what is between them is lower than half of the lower one's top.
    """
    tops = [
        at
        for at, height in enumerate(heights)
        if height > (heights[at - 1] if at else 0)
        and height >= (heights[at + 1] if at + 1 < len(heights) else 0)
    ]
    cuts = [0]
    kept: list[int] = []
    for top in tops:
        if kept:
            between = range(kept[-1], top + 1)
            valley = min(between, key=lambda at: heights[at])
            lower = min(heights[kept[-1]], heights[top])
            if heights[valley] * 2 >= lower:
                kept[-1] = max(kept[-1], top, key=lambda at: heights[at])
                continue
            cuts.append(valley)
        kept.append(top)
    total = sum(heights)
    ends = [*cuts[1:], len(heights)]
    return [
        (top, sum(heights[cut:end]) / total)
        for top, cut, end in zip(kept, cuts, ends, strict=True)
    ]


def _us(ns: float) -> str:
    return f"{ns:.0f} ns" if ns < 1000 else f"{ns / 1000:.3g} us"
