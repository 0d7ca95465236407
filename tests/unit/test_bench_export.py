"""What benches write for other programs, clocks of two cores, pairs of many."""

import csv
import io
import itertools
from collections import Counter

import pytest

from shmipi import _core
from shmipi.bench import matrix
from shmipi.bench.clocks import Clocks
from shmipi.bench.hist import described
from shmipi.bench.runner import Progress, Steps
from shmipi.cpumask import CpuMask
from shmipi.errors import CommandError
from shmipi.machine.topology import Core
from shmipi.report import export


def hist(*values):
    made = _core.Hist()
    for value in values:
        made.record(value)
    return made


def document():
    rows = [
        {
            "bench": "matrix",
            "sender_core": core,
            "target_core": 1 - core,
            "target_state": "halted",
            "rtt_ns": described(hist(1000 + core, 2000, 3000)),
            "one_way_ns": None,
            "valid": not core,
            **({"why": ["it moved", "time was stolen"]} if core else {}),
        }
        for core in (0, 1)
    ]
    limits = {"futex": described(hist(500, 600)) | {"calls": 2}}
    return {"bench": "matrix", "rows": rows, "limits": limits}


def test_csv_has_every_figure_and_no_histogram():
    rows = list(csv.DictReader(io.StringIO(export.as_csv(document()))))
    assert [row["rtt_ns.min"] for row in rows] == ["1000", "1001", ""]
    assert rows[1]["why"] == "it moved; time was stolen"
    assert rows[0]["valid"] == "True"
    assert (rows[2]["limit"], rows[2]["p50"], rows[2]["calls"]) == ("futex", "500", "2")
    assert not [name for name in rows[0] if name.endswith("hist")]


def test_markdown_is_a_table():
    text = export.as_markdown(["a", "b"], [["1", "x|y"]], ["", "a note"])
    assert text == "| a | b |\n| --- | --- |\n| 1 | x\\|y |\n\n- a note\n"


def test_percentiles_are_hdrhistogram_s(tmp_path):
    written = export.write_hgrm(document(), tmp_path / "new")
    assert [path.name for path in written] == [
        "matrix-sender_core-0-target_core-1-halted-rtt_ns.hgrm",
        "matrix-sender_core-1-target_core-0-halted-rtt_ns.hgrm",
        "matrix-limit-futex.hgrm",
    ]
    lines = written[0].read_text().splitlines()
    assert lines[0].split() == [
        *("Value", "Percentile", "TotalCount", "1/(1-Percentile)")
    ]
    first = next(line.split() for line in lines[1:] if line.strip())
    assert (float(first[0]), int(first[2])) == (1.0, 1)  # 1,000 ns are 1 us
    assert any("#[Max     =        3.00" in line for line in lines)
    same = document()
    same["rows"][1]["sender_core"], same["rows"][1]["target_core"] = 0, 1
    assert len(set(export.write_hgrm(same, tmp_path))) == 3  # no row replaces another
    (tmp_path / "file").write_text("")
    with pytest.raises(CommandError, match="cannot write"):
        export.write_hgrm(document(), tmp_path / "file")


# ---- clocks --------------------------------------------------------------------------


def test_clocks_that_agree_say_how_far():
    clocks = Clocks()
    assert clocks.one_way(hist(5))["one_way_ns"] is None  # nobody has looked
    clocks.add(None)
    clocks.add((-90, 40))
    clocks.add((-50, 70))
    assert (clocks.least, clocks.most, clocks.error_ns) == (-50, 40, 50.0)
    found = clocks.one_way(hist(5))
    assert found["one_way_ns"]["p50"] == 5
    assert found["one_way_error_ns"] == 50.0
    assert found["clock_offset_ns"] == [-50, 40]
    back = clocks.reversed()
    assert (back.least, back.most) == (-40, 50)


@pytest.mark.parametrize("bounds", [(200, 400), (-900, -1)])
def test_one_way_is_not_given_by_clocks_that_are_apart(bounds):
    clocks = Clocks()
    clocks.add(bounds)
    found = clocks.one_way(hist(5))
    assert found["one_way_ns"] is found["one_way_error_ns"] is None
    assert f"{bounds[0]} to {bounds[1]} ns" in found["one_way_note"]


# ---- pairs of many cores -------------------------------------------------------------


def computer(ncores, threads=2, per_node=72):
    cores = []
    for number in range(ncores):
        first = number - number % threads
        cores.append(
            Core(
                number=number,
                package=number // per_node,
                core_id=number // threads,
                node=number // per_node,
                siblings=CpuMask(range(first, first + threads)),
            )
        )
    return cores


def test_all_pairs_where_they_fit():
    pairs = matrix.choose_pairs(computer(8), 56)
    assert [pair[:2] for pair in pairs] == list(itertools.permutations(range(8), 2))
    assert Counter(pair[2] for pair in pairs) == {"smt": 8, "core": 48}


def test_of_576_cores_some_pairs_of_every_distance_and_each_core():
    pairs = matrix.choose_pairs(computer(576), 6000)
    assert len(pairs) == len(set(pairs)) <= 6000
    assert len(pairs) > 5900
    distances = Counter(pair[2] for pair in pairs)
    assert distances["smt"] == 576  # the rarest: all
    assert distances["core"] > 2000
    assert distances["node"] > 2000
    for side in (0, 1):
        times = Counter(pair[side] for pair in pairs)
        assert len(times) == 576
        assert max(times.values()) - min(times.values()) <= 4


# ---- progress ------------------------------------------------------------------------


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_a_bar_on_a_terminal(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "80")
    stream = Terminal()
    steps = Steps(Progress("bench matrix", stream), 4)
    steps.keep("2 of 2 pairs, about 1 s")
    for _ in range(3):
        steps("core 0 to 1")
    lines = stream.getvalue().split("\r\x1b[K")
    assert lines[1] == "bench matrix: 2 of 2 pairs, about 1 s\n"
    assert lines[2] == f"[{'.' * 20}]   0% bench matrix: core 0 to 1"
    assert lines[4] == f"[{'#' * 10}{'.' * 10}]  50% bench matrix: core 0 to 1"


def test_none_on_a_pipe():
    stream = io.StringIO()
    steps = Steps(Progress("bench matrix", stream), 2)
    steps.keep("how long")
    steps("a step")
    assert stream.getvalue() == ""
