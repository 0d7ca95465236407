"""``shmipi bench all``, and the directories that it writes, in the other commands."""

from __future__ import annotations

import json
import sys
import types
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from shmipi.bench import controllers, irq, option, record, registry
from shmipi.cli import benches as command
from shmipi.cli import main
from shmipi.cli.options import save_json
from shmipi.errors import CommandError
from shmipi.names import BENCHES
from tests.unit.test_compare import MACHINE, row, run, saved

Runs = dict[str, Callable[[], dict[str, Any]]]


def found(name: str, factor: float = 1.0, **more: Any) -> dict[str, Any]:
    """What a bench returns."""
    document = run(row("native", factor), **more)
    del document["schema"]
    return {**document, "bench": name}


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> Callable[[Runs], None]:
    """Have these benches and no others."""

    @dataclass(frozen=True)
    class Options:
        calls: int = option.calls(5, "calls")

    def these(runs: Runs) -> None:
        for name, what in runs.items():
            module: Any = types.ModuleType(f"shmipi.bench.{name}")
            module.Options = Options
            module.run = lambda options, progress, what=what: what()
            monkeypatch.setitem(sys.modules, f"shmipi.bench.{name}", module)
        plan = {name: record.Part(1.0, {"calls": 2}) for name in runs}
        monkeypatch.setattr(record, "PLAN", plan)

    return these


def content(folder: Path, name: str) -> dict[str, Any]:
    document: dict[str, Any] = json.loads((folder / f"{name}.json").read_text())
    return document


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def raising(error: BaseException) -> Callable[[], dict[str, Any]]:
    def raise_it() -> dict[str, Any]:
        raise error

    return raise_it


# ---- the plan ------------------------------------------------------------------------


def test_every_bench_is_planned_and_all_take_less_than_five_minutes() -> None:
    assert list(record.PLAN) == list(BENCHES)
    assert sum(part.seconds for part in record.PLAN.values()) < 290
    for name, part in record.PLAN.items():
        bench = registry.load(name)
        options = bench.Options(**part.options)
        known = option.options_of(bench.Options)
        assert part.options.keys() <= known.keys(), name
        if "blocks" in known:  # a change can be told from chance
            assert options.blocks >= 5


@pytest.mark.parametrize("bench", [controllers, irq])
def test_progress_need_not_be_shown(bench: Any, monkeypatch: Any) -> None:
    """What they call where nobody asked for it takes all that `Steps` gives."""
    told = []

    class Stop(Exception):
        pass

    def rig(*args: Any, **more: Any) -> None:
        raise Stop

    monkeypatch.setattr(bench, "Rig", rig)
    monkeypatch.setattr(bench, "silent", lambda *text, **more: told.append(text))
    monkeypatch.setattr(bench, "choose_cores", lambda cores: (0, 1))
    with pytest.raises(Stop):
        bench.run(bench.Options())
    assert told
    from shmipi.bench.runner import Steps, silent

    Steps(silent, 3)("a step")
    Steps(silent, 3).keep("this")


# ---- a run ---------------------------------------------------------------------------


def test_one_that_fails_is_listed_and_the_others_go_on(
    measured: Any, tmp_path: Path, capsys: Any
) -> None:
    measured(
        {
            "limits": lambda: found("limits"),
            "latency": raising(RuntimeError("it broke\nin two")),
            "irq": raising(CommandError("a second core is needed")),
            "users": lambda: found("users"),
        }
    )
    folder = tmp_path / "out"
    assert main(["bench", "all", "--out", str(folder)]) == 1
    assert names(folder) == ["all.json", "doctor.json", "limits.json", "users.json"]
    listing = content(folder, "all")
    assert listing["schema"] == "shmipi.bench-all/1"
    entries = listing["benches"]
    assert {
        name: one.get("file") or one["missing"] for name, one in entries.items()
    } == {
        "limits": "limits.json",
        "latency": "it broke in two",
        "irq": "a second core is needed",
        "users": "users.json",
    }
    assert content(folder, "users")["schema"] == "shmipi.bench/1"
    assert content(folder, "doctor")["schema"] == "shmipi.doctor/1"
    out, err = capsys.readouterr()
    assert out.startswith(f"4 benches, about 4 s, to {folder}\n")
    assert "missing: it broke in two" in out
    assert f"2 documents in {folder}" in out
    assert f"{folder} lacks latency, irq" in err


def test_only_some_are_measured(measured: Any, tmp_path: Path, capsys: Any) -> None:
    measured({name: lambda n=name: found(n) for name in ("limits", "irq")})
    asked = ["bench", "all", "--out", str(tmp_path / "o"), "--only"]
    assert main([*asked, "irq"]) == 0
    assert list(content(tmp_path / "o", "all")["benches"]) == ["irq"]
    assert capsys.readouterr().out.startswith("1 bench, about 1 s, to ")
    assert main([*asked, "irq,lattency"]) == 2
    assert "'lattency' is not one of limits, latency" in capsys.readouterr().err


def test_ctrl_c_leaves_whole_files_and_says_what_is_missing(
    measured: Any, tmp_path: Path, capsys: Any
) -> None:
    measured(
        {
            "limits": lambda: found("limits"),
            "latency": raising(KeyboardInterrupt()),
            "users": lambda: found("users"),
        }
    )
    assert main(["bench", "all", "--out", str(tmp_path)]) == 130
    assert names(tmp_path) == ["all.json", "doctor.json", "limits.json"]
    entries = content(tmp_path, "all")["benches"]
    assert entries["limits"]["file"] == "limits.json"
    assert entries["latency"] == entries["users"] == {"missing": "interrupted"}
    assert f"{tmp_path} lacks latency, users" in capsys.readouterr().err


def test_who_is_killed_leaves_a_list_that_is_true(
    measured: Any, tmp_path: Path
) -> None:
    seen: dict[str, Any] = {}

    def look() -> dict[str, Any]:
        seen.update(content(tmp_path, "all")["benches"])
        return found("latency")

    measured({"limits": lambda: found("limits"), "latency": look})
    assert main(["bench", "all", "--out", str(tmp_path)]) == 0
    assert seen["limits"]["file"] == "limits.json"
    assert seen["latency"] == {"missing": "not measured yet"}


def test_a_file_is_whole_at_any_time(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    save_json(path, {"a": 1})
    with pytest.raises(ValueError, match="JSON"):
        save_json(path, {"a": float("nan")})
    assert json.loads(path.read_text()) == {"a": 1}
    assert names(tmp_path) == ["a.json"]
    with pytest.raises(CommandError, match="cannot write"):
        save_json(tmp_path / "no" / "a.json", {})


def test_documents_that_are_there_are_not_mixed_with_new_ones(
    measured: Any, tmp_path: Path, capsys: Any
) -> None:
    measured({name: lambda n=name: found(n) for name in ("limits", "users")})
    asked = ["bench", "all", "--out", str(tmp_path)]
    assert main(asked) == 0
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    assert main(asked) == 2
    assert "has 4 documents already: --force" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before
    assert main([*asked, "--force", "--only", "users"]) == 0
    assert names(tmp_path) == ["all.json", "doctor.json", "users.json"]
    (tmp_path / "mine.json").write_text('{"schema": "shmipi.bench/1"}')
    assert main([*asked, "--force"]) == 2
    assert "mine.json, which `shmipi bench all` has not" in capsys.readouterr().err
    assert (tmp_path / "users.json").exists()
    file = tmp_path / "mine.json"
    assert main(["bench", "all", "--out", str(file)]) == 2
    assert main(["bench", "all", "--out", str(tmp_path / "no" / "where")]) == 2
    assert main(["bench", "all"]) == 2


def test_the_bar_says_what_share_of_all_is_done() -> None:
    told: list[tuple[str, float]] = []
    bar = record._Bar(lambda text, share: told.append((text, share)), 10.0)
    bar.begin("one", 4.0)
    bar("half of it", share=0.5)
    bar("not for here", keep=True)
    bar.begin("two", 6.0)
    bar("all", share=1.0)
    assert told == [
        ("one", 0.0),
        ("one: half of it", 0.2),
        ("two", 0.4),
        ("two: all", 1.0),
    ]


def test_how_long_it_takes_is_said_in_words() -> None:
    said = [command._about(seconds) for seconds in (4, 89, 180, 272)]
    assert said == ["about 4 s", "about 89 s", "about 3 min", "about 4 min 30 s"]


# ---- directories in the other commands -----------------------------------------------


def directory(folder: Path, missing: dict[str, str], **factors: float) -> str:
    folder.mkdir()
    for name, factor in factors.items():
        saved(folder, f"{name}.json", {**run(row("native", factor)), "bench": name})
    entries = {name: {"missing": why} for name, why in missing.items()}
    saved(folder, "all.json", {"schema": record.SCHEMA, "benches": entries})
    return str(folder)


def test_directories_are_compared_bench_by_bench(tmp_path: Path, capsys: Any) -> None:
    before = directory(tmp_path / "a", {"gap": "no time"}, latency=1.0, irq=1.0)
    after = directory(tmp_path / "b", {"irq": "it broke"}, latency=1.3, gap=1.0)
    assert main(["compare", before, after]) == 0
    out, err = capsys.readouterr()
    assert out.startswith("latency:\n")
    assert "polling native" in out
    assert "\n1 of 1 figures that have blocks changed by more than chance" in out
    assert f"warning: irq is not in {after}: it broke\n" in err
    assert f"warning: gap is not in {before}: no time\n" in err
    assert main(["compare", before, after, "--fail-above", "10"]) == 1
    assert "worse: polling native: ratio +" in capsys.readouterr().out
    assert main(["compare", after, before, "--fail-above", "10", "--json", "-"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["schema"] == "shmipi.compare/1"
    assert list(told["benches"]) == ["latency"]
    assert told["benches"]["latency"]["worse"] == []
    assert len(told["alone"]) == 2
    # A file beside a directory: the document of its bench.
    assert main(["compare", f"{before}/latency.json", after, "--fail-above", "9"]) == 1


def test_directories_that_cannot_be_compared(tmp_path: Path, capsys: Any) -> None:
    one = directory(tmp_path / "a", {}, latency=1.0, irq=1.0)
    other = directory(tmp_path / "b", {}, latency=1.0, irq=1.0)
    document = run(row("native", 1.0), machine={**MACHINE, "cpu_model": "Y"})
    saved(tmp_path / "b", "irq.json", {**document, "bench": "irq", "gap_us": 1.0})
    assert main(["compare", one, other]) == 2
    said = capsys.readouterr().err
    assert "machine: cpu_model X, and Y; irq: gap_us 30.0, and 1.0 (--force)" in said
    assert main(["compare", one, other, "--force"]) == 0
    third = directory(tmp_path / "c", {}, gap=1.0)
    assert main(["compare", one, third]) == 2
    assert "no bench is in both" in capsys.readouterr().err
    saved(tmp_path / "c", "again.json", {**run(row("native", 1.0)), "bench": "gap"})
    assert main(["compare", one, third]) == 2
    assert (
        "two documents of bench gap: again.json and gap.json" in capsys.readouterr().err
    )
    (tmp_path / "empty").mkdir()
    assert main(["check", str(tmp_path / "empty")]) == 2


def test_check_takes_a_directory(tmp_path: Path, capsys: Any) -> None:
    good = directory(tmp_path / "a", {}, latency=1.0, irq=1.0)
    assert main(["check", good]) == 0
    assert "nothing was found" in capsys.readouterr().out
    bad = directory(tmp_path / "b", {"users": "it broke"}, latency=1.0, irq=1.0)
    for name in ("latency", "irq"):
        loaded = {"machine": {**MACHINE, "load_1m": 9.0}}
        saved(
            tmp_path / "b",
            f"{name}.json",
            {**run(row("n", 1.0), **loaded), "bench": name},
        )
    document = content(tmp_path / "b", "irq")
    document["rows"][0] |= {"valid": False, "why": ["it moved"]}
    saved(tmp_path / "b", "irq.json", document)
    assert main(["check", bad, "--json", str(tmp_path / "told.json")]) == 1
    assert capsys.readouterr().out.splitlines() == [
        "- users is missing: it broke",
        "- other work was running: a load of 9.0 on 2 cores",
        "- irq: polling n: not valid: it moved",
    ]
    told = content(tmp_path, "told")
    assert told["missing"] == {"users": "it broke"}
    assert [len(doubts) for doubts in told["benches"].values()] == [1, 2]


def test_a_report_says_what_a_directory_lacks(tmp_path: Path, capsys: Any) -> None:
    folder = directory(tmp_path / "a", {"users": "it <broke>"}, echo=1.0)
    assert main(["report", folder, "--text"]) == 0
    assert "- users is missing: it <broke>" in capsys.readouterr().out
    assert main(["report", folder]) == 0
    page = (tmp_path / "a" / "report.html").read_text()
    assert "users is missing: it &lt;broke&gt;" in page
