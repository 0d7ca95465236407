"""Whether the instrument measures right: beside others, and against a known delay.

The raw limits stand beside a ping-pong of the same kind that was written without a line
of shmipi (``tests/native/pingpong.c``, where the sources and a C compiler are), and
beside ``perf bench sched pipe`` where that is installed: block by block in one run. And
a fake target that answers after 1, 10 and 100 us is to be measured to do just that.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Final

from shmipi import _core
from shmipi.bench import limits, tasks
from shmipi.bench.limits import PLACEMENTS, Limit
from shmipi.bench.runner import (
    Rig,
    Seen,
    Steps,
    Watch,
    choose_cores,
    machine_facts,
    median,
    middle,
    spread,
)
from shmipi.report.cells import Cells, Table, ratio, span, valid_for

__all__ = ["DELAYS_US", "Options", "run", "table", "within"]

#: A limit, and the kind of ping-pong that is the same.
_BESIDE: Final = {
    "cacheline": "tight",
    "floor": "floor",
    "mailbox": "mailbox",
    **{bell.limit: bell.limit for bell in limits.BELLS},
    "futex_park": "futex_park",
    "pipe_park": "pipe_park",
}
_ON_LINES: Final = ("cacheline", "floor", "mailbox")
DELAYS_US: Final = (1, 10, 100)
_DELAY_SHARE: Final = 0.02
#: Round trips of ``perf bench sched pipe`` in a block.
_PERF_LOOPS: Final = 3000
_WARMUP: Final = 20
#: What the fake target takes without a delay: until its line lies in both caches. In a
#: tighter exchange a line travels at another price.
LEAST_NS: Final = 1000
_SOURCE: Final = Path(__file__).parents[2] / "tests" / "native" / "pingpong.c"


@dataclass(frozen=True)
class Options:
    """What to measure: ``calls`` round trips of each in ``blocks``."""

    calls: int = 1000
    blocks: int = 10
    gap_us: float = 30.0
    cores: str | Sequence[int] = "auto"
    names: Sequence[str] = (*_BESIDE, "perf", "delay")


def within(theirs_ns: float) -> float:
    """Return by which share two may differ that measure the same."""
    return 0.10 if theirs_ns > 1000 else 0.15


@dataclass
class Row:
    """Two figures of one thing, block by block."""

    what: str
    beside: str
    tolerance: float | None = None
    ours: list[float] = field(default_factory=list)
    theirs: list[float] = field(default_factory=list)
    seen: Seen = field(default_factory=Seen)
    why: list[str] = field(default_factory=list)

    def as_json(self) -> dict[str, Any]:
        """Return the row of a document."""
        ratios = [a / b for a, b in zip(self.ours, self.theirs, strict=True)]
        theirs = median(self.theirs)
        tolerance = within(theirs) if self.tolerance is None else self.tolerance
        ending = self.seen.ending(0, [*self.seen.why(None), *self.why])
        kept = ("stolen_s", "throttled", "gc_runs", "valid", "why")
        return {
            "what": self.what,
            "beside": self.beside,
            "ours_ns": median(self.ours),
            "theirs_ns": theirs,
            "ratio": median(ratios),
            "ratio_spread": spread(ratios),
            "ratio_blocks": ratios,
            "within": tolerance,
            "agrees": abs(median(ratios) - 1) <= tolerance,
            **{key: ending[key] for key in kept if key in ending},
        }


class _Pingpong:
    """The ping-pong of ``tests/native``, built when it is first needed."""

    def __init__(self, folder: str) -> None:
        compiler = next(filter(shutil.which, ("cc", "gcc", "clang")), None)
        if compiler is None or not _SOURCE.exists():
            raise OSError(
                "there is no C compiler"
                if _SOURCE.exists()
                else "tests/native is not here: run it in a checkout of the sources"
            )
        self._program = os.path.join(folder, "pingpong")
        done = subprocess.run(
            [
                *(compiler, "-std=gnu11", "-O2", "-pthread", "-o", self._program),
                *(str(_SOURCE), "-lrt"),
            ],
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            raise OSError(f"{_SOURCE.name} cannot be built: {done.stderr[:200]}")

    def measure(
        self, kind: str, cores: Sequence[int], calls: int, gap_ns: int
    ) -> float:
        """Return ns of a round trip, the median. ``OSError`` where there is none."""
        words = (kind, *cores, calls, gap_ns)
        done = subprocess.run(
            [self._program, *map(str, words)],
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            raise OSError(done.stderr.strip() or f"status {done.returncode}")
        return float(done.stdout)


def _limit_block(rig: Rig, limit: Limit, block: int, calls: int, gap_ns: int) -> float:
    if limit.name in _ON_LINES:
        found = [
            limits.measure_batches(
                rig, limit, cpu=1, placement=block * PLACEMENTS + place, batches=12
            )
            for place in range(PLACEMENTS)
        ]
        return limits.best(found)
    return limits.measure(rig, limit, calls, gap_ns=gap_ns)


def _pingpong_rows(
    rig: Rig, options: Options, steps: Steps, folder: str, missing: dict[str, str]
) -> Iterator[Row]:
    names = [name for name in _BESIDE if name in options.names]
    if not names:
        return
    try:
        other = _Pingpong(folder)
    except OSError as error:
        missing["pingpong"] = str(error)
        return
    calls = max(5, options.calls // options.blocks)
    gap_ns = round(options.gap_us * 1000)
    found = {name: Row(name, "pingpong") for name in names}
    kept = {name: Limit(name) for name in names}
    for block in range(options.blocks):
        for name, row in list(found.items()):
            steps(f"{name}, block {block + 1}")
            on_lines = name in _ON_LINES
            turns: list[tuple[list[float], Callable[[], float]]] = [
                (
                    row.ours,
                    partial(_limit_block, rig, kept[name], block, calls, gap_ns),
                ),
                (
                    row.theirs,
                    partial(
                        other.measure,
                        _BESIDE[name],
                        rig.cores,
                        4 if on_lines else calls,
                        gap_ns,
                    ),
                ),
            ]
            try:
                with Watch(rig.cores, row.seen):
                    for values, measure in turns[:: 1 if block % 2 else -1]:
                        values.append(measure())
            except OSError as error:
                missing[name] = str(error)
                del found[name]
                continue
            if kept[name].unavailable is not None:
                missing[name] = str(kept[name].unavailable)
                del found[name]
    for name, row in found.items():
        row.why += [text for text in kept[name].why() if text not in row.why]
        yield row


def _perf_rows(
    core: int, options: Options, steps: Steps, missing: dict[str, str]
) -> Iterator[Row]:
    """The raw limit beside ``perf bench sched pipe``, both on one core.

    There it is defined: which cores perf's two processes get is the scheduler's choice.
    """
    if "perf" not in options.names:
        return
    perf = shutil.which("perf")
    if perf is None:
        missing["perf bench sched pipe"] = "there is no perf"
        return
    row = Row("pipe_park on one core", "perf bench sched pipe")
    words = f"bench -f simple sched pipe -l {_PERF_LOOPS}"
    command = [perf, *words.split()]
    with Rig([core, core]) as rig:
        limit = Limit("pipe_park")
        for block in range(options.blocks):
            steps(f"perf bench sched pipe, block {block + 1}")
            with Watch([core], row.seen):
                mine = limits.measure(rig, limit, _PERF_LOOPS // 3, gap_ns=0)
                done = subprocess.run(
                    ["taskset", "-c", str(core), *command],
                    capture_output=True,
                    text=True,
                    check=False,
                )
            told = re.search(r"^\s*(\d+\.\d+)\s*$", done.stdout, re.MULTILINE)
            if limit.unavailable is not None or told is None:
                missing["perf bench sched pipe"] = limit.unavailable or (
                    done.stderr.strip()[:100] or "it said nothing"
                )
                return
            row.ours.append(mine)
            row.theirs.append(float(told[1]) / _PERF_LOOPS * 1e9)
    yield row


def fake_trips(rig: Rig, calls: int, delay_ns: int) -> tuple[_core.Hist, _core.Hist]:
    """Clock a fake target that answers after so long: round trips, what it waited."""
    job = rig.start(1, tasks.fake_target, calls + _WARMUP, delay_ns)
    found = rig.run(0, tasks.timed_fake, 1, calls, {"warmup": _WARMUP})
    return found["rtt"], job.result()


def _delay_rows(rig: Rig, options: Options, steps: Steps) -> Iterator[Row]:
    """A fake target that answers after a delay, less one that does after a short one.

    What it is to find is for how long the target has waited by its own clock.
    """
    if "delay" not in options.names:
        return
    for us in DELAYS_US:
        row = Row(f"fake target, {us} us", "the delay injected", _DELAY_SHARE)
        calls = max(100, min(5 * options.calls, 50_000 // us) // options.blocks)
        for block in range(options.blocks):
            steps(f"delay of {us} us, block {block + 1}")
            with Watch(rig.cores, row.seen):
                without, least = fake_trips(rig, calls, LEAST_NS)
                found, waited = fake_trips(rig, calls, LEAST_NS + us * 1000)
            row.ours.append(middle(found) - middle(without))
            row.theirs.append(middle(waited) - middle(least))
        yield row


def run(
    options: Options, progress: Callable[..., None] | None = None
) -> dict[str, Any]:
    """Measure all pairs and return them: ``rows``, and what is ``missing`` and why.

    ``ratio`` is the median over blocks of ours / theirs; ``agrees`` is whether it is
    within ``within`` of 1. Raises ``CommandError`` for cores that cannot be used, and
    what a boot raises.
    """
    cores = choose_cores(options.cores)
    missing: dict[str, str] = {}
    pairs = sum(name in options.names for name in (*_BESIDE, "perf"))
    pairs += len(DELAYS_US) if "delay" in options.names else 0
    steps = Steps(progress, pairs * options.blocks)
    with limits.open_base(cores) as rig, tempfile.TemporaryDirectory() as folder:
        rows = [
            *_pingpong_rows(rig, options, steps, folder, missing),
            *_delay_rows(rig, options, steps),
            *_perf_rows(cores[1], options, steps, missing),
        ]
        return {
            "machine": machine_facts(sender_core=cores[0], target_core=cores[1]),
            "gap_us": options.gap_us,
            "calls": options.calls,
            "blocks": options.blocks,
            "rows": [row.as_json() for row in rows],
            "missing": missing,
        }


def table(result: dict[str, Any]) -> Table:
    """Return what was found as a table for people."""
    rows: list[Cells] = []
    notes: list[str] = []
    for row in result["rows"]:
        rows.append(
            [
                row["what"],
                span(row["ours_ns"]),
                row["beside"],
                span(row["theirs_ns"]),
                ratio(row, "ratio"),
                f"{row['within']:.0%}",
                "yes" if row["agrees"] else "NO",
                valid_for(row, notes),
            ]
        )
    notes += [f"{name} is not here: {why}" for name, why in result["missing"].items()]
    header = ["what", "ours", "beside", "theirs", "ours/theirs (spread)", "within"]
    return [*header, "agree", "valid"], rows, notes
