"""``shmipi compare`` and ``check``: documents of benches beside each other."""

from __future__ import annotations

import copy
import json
import random
from pathlib import Path
from typing import Any

import pytest

from shmipi import _core
from shmipi.bench.hist import described
from shmipi.cli import main
from shmipi.errors import CommandError
from shmipi.report import compare

MACHINE = {"cpu_model": "X", "cores": "0-1", "ncores": 2, "kernel": "Linux 6"}


def distribution(values: list[int]) -> dict[str, Any]:
    hist = _core.Hist()
    for value in values:
        hist.record(value)
    return described(hist)


def row(handler: str, factor: float, seed: int = 1, **more: Any) -> dict[str, Any]:
    draw = random.Random(seed)
    values = [int(draw.gauss(200, 10) * factor) for _ in range(3000)]
    blocks = [draw.gauss(1.5, 0.02) * factor for _ in range(10)]
    return {
        "bench": "latency",
        "target_state": "polling",
        "handler": handler,
        "rtt_ns": distribution(values),
        "ratio": sorted(blocks)[5],
        "ratio_blocks": blocks,
        "valid": True,
        **more,
    }


def run(*rows: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {
        "schema": "shmipi.bench/1",
        "bench": "latency",
        "machine": dict(MACHINE),
        "clock": "tsc",
        "gap_us": 30.0,
        "calls": 3000,
        "rows": list(rows),
        **more,
    }


def saved(folder: Path, name: str, document: dict[str, Any]) -> str:
    path = folder / name
    path.write_text(json.dumps(document))
    return str(path)


# ---- chance --------------------------------------------------------------------------


def test_mann_whitney_is_that_of_tables() -> None:
    """U = 2 of 5 and 5: two-sided p = 8/252 exactly, 0.037 by the approximation."""
    p = compare.mann_whitney([1, 2, 3, 4, 7], [5, 6, 8, 9, 10])
    assert p is not None
    assert abs(p - 0.0367) < 0.001
    assert compare.mann_whitney([1] * 6, [1] * 6) == 1.0
    assert compare.mann_whitney([1, 2, 3, 4], [5, 6, 7, 8]) is None
    again = compare.mann_whitney([5, 6, 8, 9, 10], [1, 2, 3, 4, 7])
    assert again == pytest.approx(p)


def test_of_two_like_runs_few_differ_by_chance() -> None:
    found = [
        change
        for seed in range(100)
        for change in compare.changes(
            run(row("native", 1.0, seed)), run(row("native", 1.0, seed + 1000))
        )
        if change.figure == "ratio"
    ]
    assert sum(change.significant is True for change in found) <= 5


def test_a_change_is_found_and_judged_by_the_ratio() -> None:
    before = run(row("native", 1.0), row("python", 1.0, 2))
    after = run(row("native", 1.2, 3), row("python", 1.0, 4))
    changes = {(c.row, c.figure): c for c in compare.changes(before, after)}
    native = changes["polling native", "ratio"]
    assert native.significant
    assert native.percent == pytest.approx(20, abs=3)
    assert native.worse_than(10)
    assert not native.worse_than(30)
    assert not changes["polling python", "ratio"].significant
    # The median alone is not what decides where there is a ratio.
    assert not changes["polling native", "rtt_ns p50"].worse_than(0)


def test_more_a_second_is_better() -> None:
    before, after = ({"handler": "native", "per_s": n} for n in (10.0, 8.0))
    [change] = compare.changes(run(before), run(after))
    assert change.percent == pytest.approx(-20)
    assert change.worse_than(10)
    [change] = compare.changes(run(after), run(before))
    assert not change.worse_than(10)


def test_limits_are_the_computer_s() -> None:
    limits = [{"futex": distribution([n] * 50)} for n in (1000, 2000)]
    before, after = (run(row("native", 1.0), limits=limit) for limit in limits)
    by_row = {c.row: c for c in compare.changes(before, after)}
    assert by_row["limit futex"].percent > 90
    assert not by_row["limit futex"].worse_than(10)


# ---- the command ---------------------------------------------------------------------


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = saved(tmp_path, "a.json", run(row("native", 1.0)))
    after = saved(tmp_path, "b.json", run(row("native", 1.3, 2)))
    assert main(["compare", before, after]) == 0
    assert "polling native" in capsys.readouterr().out
    assert main(["compare", before, after, "--fail-above", "10"]) == 1
    assert "worse: polling native: ratio +" in capsys.readouterr().out
    assert main(["compare", after, before, "--fail-above", "10", "--json", "-"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["schema"] == "shmipi.compare/1"
    assert told["worse"] == []
    assert {c["figure"] for c in told["changes"]} == {"ratio", "rtt_ns p50"}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"machine": {**MACHINE, "cpu_model": "Y"}}, "cpu_model X, and Y"),
        ({"machine": {**MACHINE, "cores": "2-3"}}, "cores 0-1, and 2-3"),
        ({"gap_us": 1.0}, "gap_us 30.0, and 1.0"),
        ({"bench": "irq"}, "bench latency, and irq"),
    ],
)
def test_what_differs_is_refused(
    change: dict[str, Any],
    said: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    before = saved(tmp_path, "a.json", run(row("native", 1.0)))
    after = saved(tmp_path, "b.json", {**run(row("native", 1.0)), **change})
    assert main(["compare", before, after]) == 2
    assert said in capsys.readouterr().err
    assert main(["compare", before, after, "--force"]) == 0
    assert said in capsys.readouterr().err


def test_what_was_found_is_no_option() -> None:
    """Two runs on one computer, of which one had a peer more and a slower clock."""
    before = run(row("native", 1.0), stamp_ns=16.4, unavailable={"pyzmq": "not there"})
    after = run(row("native", 1.0), stamp_ns=16.7, unavailable={}, took_s=3.0)
    assert compare.differences(before, after) == []


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("no json", "is no JSON"),
        ("[1]", "is no document of `shmipi bench`"),
        ('{"schema": "shmipi.stress/1"}', "is no document of `shmipi bench`"),
        ('{"schema": "shmipi.bench/1", "rows": [1], "machine": {}}', "damaged"),
    ],
)
@pytest.mark.parametrize("command", ["check", "compare"])
def test_what_is_no_document(
    command: str,
    content: str,
    said: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = tmp_path / "x.json"
    path.write_text(content)
    files = [str(path)] * (1 if command == "check" else 2)
    assert main([command, *files]) == 2
    printed = capsys.readouterr().err
    assert said in printed
    assert printed.count("\n") == 1
    missing = [str(tmp_path / "missing")] * len(files)
    assert main([command, *missing]) == 2


def test_a_baseline_that_cannot_be_compared_is_refused_at_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = saved(tmp_path, "a.json", run(row("native", 1.0)))
    assert main(["bench", "latency", "--calls", "7", "--baseline", path]) == 2
    assert "calls 3000, and 7" in capsys.readouterr().err
    assert main(["bench", "irq", "--baseline", path]) == 2
    assert "bench latency, and irq" in capsys.readouterr().err
    assert main(["bench", "irq", "--fail-above", "3"]) == 2
    assert "--baseline" in capsys.readouterr().err


# ---- one run -------------------------------------------------------------------------


def test_nothing_speaks_against_a_good_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = saved(tmp_path, "a.json", run(row("native", 1.0)))
    assert main(["check", path]) == 0
    assert "nothing was found" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"machine": {**MACHINE, "steal_share": 0.1}}, "took 10.0% of the time"),
        ({"machine": {**MACHINE, "load_1m": 9.0}}, "a load of 9.0 on 2 cores"),
        ({"machine": {**MACHINE, "governors": ["powersave"]}}, "governor powersave"),
        ({"machine": {**MACHINE, "cgroup_throttled_periods": 4}}, "held back 4 times"),
        ({"machine": {**MACHINE, "pinning_error": "EINVAL"}}, "not be pinned: EINVAL"),
        ({"clock": "monotonic"}, "stamps came from monotonic"),
        ({"rows": [row("native", 1.0, valid=False, why=["stolen"])]}, "valid: stolen"),
        ({"rows": [{"rtt_ns": distribution([5] * 100)}]}, "too few samples for p99 "),
        (
            {"rows": [{"rtt_ns": distribution([100] * 2000 + [900] * 1000)}]},
            "several modes",
        ),
    ],
)
def test_what_speaks_against_a_run(
    change: dict[str, Any],
    said: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)  # by which lines are folded
    document = {**run(row("native", 1.0)), **copy.deepcopy(change)}
    assert main(["check", saved(tmp_path, "a.json", document)]) == 1
    [line] = capsys.readouterr().out.splitlines()
    assert said in line


def test_hills() -> None:
    assert compare.hills([1, 5, 1]) == [(1, 1.0)]
    assert compare.hills([6, 4, 5, 0]) == [(0, 1.0)]
    assert compare.hills([6, 1, 6, 1]) == [(0, 6 / 14), (2, 8 / 14)]
    assert compare.hills([0, 0, 3, 3, 0]) == [(2, 1.0)]
    assert [top for top, _ in compare.hills([9, 1, 8, 1, 9])] == [0, 2, 4]


DATA = Path(__file__).parents[1] / "data" / "bench"
GONE = object()


@pytest.mark.parametrize("name", ["latency", "matrix", "users"])
def test_whatever_part_is_damaged_it_is_said(name: str, tmp_path: Path) -> None:
    """Each key that a document has, in turn gone or of another kind."""
    whole = json.loads((DATA / f"{name}.json").read_text())
    whole["rows"] = whole["rows"][:1]
    whole["limits"] = dict(list((whole.get("limits") or {}).items())[:1])
    hurt = tmp_path / "hurt.json"
    damaged = 0
    for place in places(whole):
        for wrong in (None, [1, None], {"p50": "x", "hist": []}, "x", GONE):
            document = copy.deepcopy(whole)
            inner = document
            for key in place[:-1]:
                inner = inner[key]
            if wrong is GONE:
                del inner[place[-1]]
            else:
                inner[place[-1]] = wrong
            hurt.write_text(json.dumps(document))
            try:
                found = compare.load(hurt)
                compare.doubts(found)
                compare.differences(whole, found)
                compare.changes(whole, found)
                compare.changes(found, whole)
            except CommandError as error:
                damaged += "damaged" in str(error)
    assert damaged > 10


def places(document: Any) -> list[list[Any]]:
    """The keys to each part, of a list's the first only."""
    found: list[list[Any]] = []
    parts = document.items() if isinstance(document, dict) else enumerate(document[:1])
    for key, value in parts:
        found.append([key])
        if isinstance(value, dict | list):
            found.extend([key, *more] for more in places(value))
    return found
