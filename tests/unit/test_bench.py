"""What measuring is made of, without a machine: histograms, blocks, facts, tables."""

import io
import math
import pickle

import pytest
from hdrh.histogram import HdrHistogram
from hypothesis import given, settings
from hypothesis import strategies as st

from shmipi import _core
from shmipi.bench import boot, controllers, death, limits, runner
from shmipi.bench.hist import described
from shmipi.cli import main
from shmipi.machine.facts import throttled
from shmipi.report import bench as report

# ---- Hist ----------------------------------------------------------------------------


@given(st.lists(st.integers(0, 2**42 - 1), min_size=1, max_size=200))
def test_a_hist_has_three_digits(values):
    hist = _core.Hist()
    for value in values:
        hist.record(value)
    ordered = sorted(values)
    stats = hist.stats()
    assert hist.count == len(values)
    assert (stats["min"], stats["max"]) == (ordered[0], ordered[-1])
    assert math.isclose(stats["mean"], sum(values) / len(values), rel_tol=1e-9)
    for quantile in (0.5, 0.9, 0.99, 0.999, 1.0):
        rank = max(1, int(quantile * len(values) + 0.5))
        exact = ordered[rank - 1]
        assert exact <= hist.quantile(quantile) <= exact * 1.001 + 1


@given(st.lists(st.integers(0, 2**40), max_size=50), st.lists(st.integers(0, 2**40)))
def test_a_hist_pickles_and_merges(first, second):
    left, right, both = _core.Hist(), _core.Hist(), _core.Hist()
    for value in first:
        left.record(value)
        both.record(value)
    for value in second:
        right.record(value)
        both.record(value)
    left.merge(pickle.loads(pickle.dumps(right)))
    assert left.stats() == both.stats()
    assert left.buckets() == both.buckets()
    assert sum(count for _, _, count in left.buckets()) == len(first) + len(second)


@settings(max_examples=20)  # each makes a histogram of theirs, 33,792 counts in Python
@given(st.lists(st.integers(0, 2**43), max_size=50))
def test_a_hist_is_another_library_s_without_loss(values):
    hist = _core.Hist()
    for value in values:
        hist.record(value)
    told = described(hist)
    theirs = HdrHistogram.decode(told["hist"])
    assert theirs.get_total_count() == told["count"] == len(values)
    for lowest, highest, count in hist.buckets():
        assert theirs.get_count_at_value(lowest) == count
        assert theirs.get_count_at_value(highest) == count
    steps = [s.count_added_in_this_iter_step for s in theirs.get_recorded_iterator()]
    assert steps == [count for _, _, count in hist.buckets()]


def test_an_empty_hist_is_all_zero():
    assert set(_core.Hist().stats().values()) == {0}


@pytest.mark.parametrize("state", [b"", b"x" * 48, b"\0" * 47, b"\xff" * 64])
def test_a_damaged_hist_is_refused(state):
    with pytest.raises(ValueError, match="not the state of a Hist"):
        _core.Hist(state)


def test_a_hist_counts_what_is_recorded_n_times():
    hist = _core.Hist()
    hist.record(100, 7)
    assert hist.buckets() == [(100, 100, 7)]
    with pytest.raises(OverflowError):
        hist.record(-1)
    with pytest.raises(TypeError):
        hist.merge({})


def test_stamps_follow_the_monotonic_clock():
    import time

    before = time.monotonic_ns()
    stamp = _core.stamp()
    after = time.monotonic_ns()
    assert before - 100_000 <= stamp <= after + 100_000
    assert 0 < _core.timer_cost_ns() < 10_000
    assert _core.clock_source() in ("tsc", "cntvct", "monotonic")


def test_loops_are_for_cpus_only():
    for call in (
        lambda: _core.bench_calls(1, 10),
        lambda: _core.bench_await(1, 0, 0),
        lambda: _core.bench_flood(1, 10, 10),
        lambda: _core.bench_broadcast(1),
        lambda: _core.bench_spin(None),
    ):
        with pytest.raises(RuntimeError):
            call()


# ---- blocks and facts ----------------------------------------------------------------


@given(st.integers(1, 10**6), st.integers(1, 100))
def test_split_loses_no_call(total, parts):
    blocks = runner.split(total, parts)
    assert len(blocks) == parts
    assert min(blocks) >= 1
    assert max(blocks) - min(blocks) <= 1
    if total >= parts:
        assert sum(blocks) == total


INTERRUPTS = """\
            CPU0       CPU1       CPU3
  0:         10         20         30   IO-APIC    2-edge      timer
RES:          1          2          3   Rescheduling interrupts
CAL:        100        200        300   Function call interrupts
TLB:       7000       7000       7000   TLB shootdowns
"""


def test_core_interrupts_by_kind(tmp_path):
    (tmp_path / "interrupts").write_text(INTERRUPTS)
    found = runner.core_interrupts([1, 3], proc=tmp_path)
    assert found == {
        1: {"RES": 2, "CAL": 200, "TLB": 7000},
        3: {"RES": 3, "CAL": 300, "TLB": 7000},
    }
    (tmp_path / "interrupts").write_text(
        "           CPU0       CPU1\n"
        "IPI0:         4          5       Rescheduling interrupts\n"
        "IPI1:        40         50       Function call interrupts\n"
        "IPI2:       400        500       CPU stop interrupts\n"
    )
    found = runner.core_interrupts([1], proc=tmp_path)
    assert found == {1: {"RES": 5, "CAL": 50, "TLB": 0}}


@pytest.mark.parametrize(
    "text",
    ["", "           CPU0\n 0:  1  timer\n", INTERRUPTS.replace("CPU3", "CPU9")],
)
def test_core_interrupts_that_cannot_be_known(tmp_path, text):
    assert runner.core_interrupts([3], proc=tmp_path) is None
    (tmp_path / "interrupts").write_text(text)
    assert runner.core_interrupts([3], proc=tmp_path) is None


def test_preemptions_and_private_memory(tmp_path):
    folder = tmp_path / "42"
    folder.mkdir()
    assert runner.preemptions(42, proc=tmp_path) == 0
    assert boot.private_kib(42, proc=tmp_path) is None
    (folder / "status").write_text(
        "Name:\tx\nvoluntary_ctxt_switches:\t5\nnonvoluntary_ctxt_switches:\t17\n"
    )
    (folder / "smaps_rollup").write_text(
        "Rss:  900 kB\nShared_Clean:  100 kB\nPrivate_Clean:  20 kB\n"
        "Private_Dirty:  300 kB\nPrivate_Hugetlb:  0 kB\n"
    )
    assert runner.preemptions(42, proc=tmp_path) == 17
    assert boot.private_kib(42, proc=tmp_path) == 320


def test_what_makes_a_row_invalid():
    seen = runner.Seen(seconds=1.0)
    assert seen.why(1000) == []
    seen.stolen_s = runner.TICK_S / 2  # one tick: how it is counted, no evidence
    seen.preempted = 2
    assert seen.why(100) == []
    seen.stolen_s, seen.preempted, seen.moved = 0.5, 11, True
    assert len(seen.why(1000)) == 3
    assert len(seen.why(None)) == 2  # where preemptions do not matter
    assert len(seen.why(10_000)) == 2
    seen.throttled = 3
    assert "3 periods" in seen.why(10_000)[-1]


def test_how_a_row_ends():
    """Real IPIs by kind for each emulated one, validity, collections."""
    seen = runner.Seen(collections=2)
    seen.target_real.update(RES=50, CAL=25)
    seen.sender_real.update(RES=100)
    row = seen.ending(100, [])
    assert row["real_ipis"] == {"RES": 0.5, "CAL": 0.25, "TLB": 0.0}
    assert row["real_ipis_per_call"] == 0.75
    assert row["valid"]
    assert row["gc_runs"] == 2
    assert "why" not in row
    row = seen.ending(100, ["it moved"], both=True)
    assert row["real_ipis"]["RES"] == 1.5
    assert (row["valid"], row["why"]) == (False, ["it moved"])
    assert seen.ending(0, [])["real_ipis"] is None
    seen.ipis_known = False
    row = seen.ending(100, [])
    assert row["real_ipis"] is row["real_ipis_per_call"] is None
    assert "/proc/interrupts" in row["real_ipis_note"]


def test_the_quota_of_a_control_group_is_noticed(tmp_path):
    folder = tmp_path / "fs/cgroup/box"
    folder.mkdir(parents=True)
    (tmp_path / "self").mkdir()
    (tmp_path / "self/cgroup").write_text("0::/box\n")
    assert throttled(sys=tmp_path, proc=tmp_path) == 0
    (folder / "cpu.stat").write_text("nr_periods 9\nnr_throttled 4\n")
    assert throttled(sys=tmp_path, proc=tmp_path) == 4


# ---- the command line, where it needs no machine -------------------------------------


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["speed"],
        ["latency", "--calls", "0"],
        ["latency", "--calls", "1e9"],
        ["latency", "--calls", "900G"],
        ["latency", "--blocks", "4"],
        ["latency", "--warmup", "0"],
        ["latency", "--gap", "-1"],
        ["latency", "--gap", "nan"],
        ["latency", "--handler", "rust"],
        ["latency", "--doorbell", "bell"],
        ["latency", "--doorbell", ""],
        ["latency", "--cores", "0"],
        ["latency", "--cores", "0,0"],
        ["latency", "--cores", "0,99999"],
        ["throughput", "--handler", "native,"],
        ["throughput", "--cores", "0,1,2"],
        ["controllers", "--calls", "0"],
        ["controllers", "--blocks", "4"],
        ["controllers", "--controllers", "apic,8259"],
        ["controllers", "--controllers", ""],
        ["controllers", "--cores", "1,1"],
        ["boot", "--cpus", "0"],
        ["boot", "--cpus", "4097"],
        ["boot", "--cpus", "2,,4"],
        ["boot", "--idle", "sleep"],
        ["broadcast", "--cpus", "4096"],
        ["broadcast", "--doorbell", "none"],
        ["limits", "--json", "/nowhere/x.json"],
    ],
    ids=" ".join,
)
def test_nonsense_is_one_line_and_status_2(capfd, monkeypatch, arguments):
    monkeypatch.setattr("shmipi.machine.topology.usable_cores", lambda: [0, 1])
    assert main(["bench", *arguments]) == 2
    out, err = capfd.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert err.startswith("shmipi bench")


@pytest.mark.parametrize("what", ["limits", "latency", "controllers", "throughput"])
def test_one_core_is_told(capfd, monkeypatch, what):
    monkeypatch.setattr("shmipi.machine.topology.usable_cores", lambda: [3])
    assert main(["bench", what]) == 1
    out, err = capfd.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert "core 3 only" in err


@pytest.mark.parametrize(
    "what",
    ["limits", "latency", "controllers", "throughput", "boot", "broadcast", "death"],
)
def test_help_has_an_example(capfd, what):
    assert main(["bench", what, "--help"]) == 0
    assert f"shmipi bench {what}" in capfd.readouterr().out.partition("example")[2]


def test_so_many_broadcast_as_there_is_memory_for():
    """A page of page tables for each pair of CPUs: 64 GiB at 4,096."""
    assert death.senders(1024, 1 << 34) == 1024
    assert death.senders(4096, 1 << 34) == 512
    assert death.senders(4096, 0) == 1


# ---- the report ----------------------------------------------------------------------

STATS = {"min": 90, "p50": 100, "p90": 2_000, "p99": 30_000, "p999": 4e6, "max": 5e9}
STATS["mean"] = 120.5
MACHINE = {"cpu_model": "A [Model]", "cores": "0-1", "kernel": "Linux", "python": "C"}
LATENCY = {
    "bench": "latency",
    "machine": MACHINE,
    "timer_ns": 9.6,
    "clock": "tsc",
    "gap_us": 30.0,
    "limits": {
        "floor": {**STATS, "batch_ns": 80},
        "mailbox": {**STATS, "batch_ns": 85},
        "mqueue": {"unavailable": "no"},
    },
    "rows": [
        {
            "target_state": "polling",
            "doorbell": "none",
            "sender_wait": "spin",
            "handler": "python",
            "rtt_ns": STATS,
            "one_way_ns": STATS,
            "limit": "mailbox",
            "ratio": 1.234,
            "ratio_spread": [1.1, 1.5],
            "floor_ratio": 1.678,
            "floor_ratio_spread": [1.6, 1.9],
            "valid": False,
            "why": ["time was stolen", "time was stolen"],
            "batch_ns": 98.7,
            "times_faster_than_pipe": 250.0,
            "pipe_rtt_ns": STATS,
        },
        {
            "target_state": "halted",
            "doorbell": "mqueue",
            "sender_wait": "park",
            "handler": "native",
            "rtt_ns": STATS,
            "one_way_ns": STATS,
            "limit": "mqueue",
            "ratio": None,
            "ratio_spread": None,
            "valid": True,
        },
    ],
    "unavailable": {"sem": "no semaphores here"},
}


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize(
    ("stream", "term"),
    [(io.StringIO, "xterm"), (Terminal, "dumb"), (Terminal, "xterm")],
)
def test_a_latency_table(monkeypatch, stream, term):
    monkeypatch.setenv("COLUMNS", "60")  # too narrow: nothing is cut all the same
    monkeypatch.setenv("TERM", term)
    text = stream()
    report.render(LATENCY, text)
    shown = text.getvalue()
    assert "1.23 (1.10-1.50)" in shown  # clocked, beside mailbox
    assert "1.68 (1.60-1.90)" in shown  # in batches, beside floor
    assert "polling, in batches" in shown
    assert "no [1]" in shown
    assert shown.count("time was stolen") == 1
    assert "250 times faster than a multiprocessing.Pipe" in shown
    assert "halted mqueue park" in shown
    assert "no semaphores here" in shown
    assert "A [Model]" in shown  # is not taken for markup
    assert "10 ns, which is not subtracted" in shown


def test_the_best_back_off_counts():
    limit = limits.Limit("mailbox")
    for backoff, batches in ((0, [300, 310]), (25, [250, 900]), (50, [400]), (100, [])):
        limit.tries[backoff].batches = list(batches)
    limit.tries[100].rtt.record(200, 5)
    limit.tries[0].rtt.record(210, 5)
    found = limit.as_json()
    assert (found["batch_ns"], found["batch_backoff_ns"]) == (305, 0)
    assert (found["p50"], found["backoff_ns"]) == (200, 100)
    assert found["batch_ns_by_backoff"] == {"0": 305, "25": 575, "50": 400}
    # Over placements, of each back-off apart, and never a mixture of them.
    at = [{0: 100.0, 25: 90.0}, {0: 100.0, 25: 300.0}, {0: 110.0, 25: 310.0}]
    assert limits.best(at) == 100
    assert list(limits.Limit("futex").tries) == [0]


def test_the_middle_of_values_that_come_in_steps():
    hist = _core.Hist()
    assert runner.middle(hist) == float("inf")
    hist.record(90, 20)
    hist.record(100, 60)
    hist.record(110, 19)
    hist.record(10_000_000, 1)
    # The middle half: 5 of 90 are out, so are the largest; none of 90 is in it.
    assert runner.middle(hist) == 100
    hist.record(90, 40)
    assert 90 < runner.middle(hist) < 100


# ---- controllers ---------------------------------------------------------------------


def measured(controller, blocks, kind=("call", "polling", "native"), **more):
    row = controllers.Row(controllers.Kind(*kind), controller, blocks, **more)
    row.calls = row.samples = 100
    row.seen.counted = {"elided": 100, "kicks_sent": 100, "chip_writes": 100}
    return row


def limit_of(*blocks):
    return limits.Limit("floor", blocks=list(blocks))


def test_a_ratio_is_the_median_over_blocks_to_the_fastest():
    fast = measured("mips", [100.0, 200.0, 400.0])
    slow = measured("xive", [150.0, 500.0, 600.0])
    other = measured("apic", [99.0, 290.0, 580.0])  # the fastest of one block only
    beside, limit = [slow, fast, other], limit_of(100, 100, 100)
    found = controllers._row_json(slow, beside, limit)
    assert found["fastest"] == "mips"
    assert found["ns"] == 500
    assert found["ratio_blocks"] == [1.5, 2.5, 1.5]
    assert (found["ratio"], found["ratio_spread"]) == (1.5, [1.5, 2.5])
    assert (found["at_most"], found["met"], found["valid"]) == (2.0, True, True)
    assert found["limit_ratio"] == 5.0
    judged = controllers._row_json(other, beside, limit)
    assert (judged["ratio"], judged["at_most"], judged["met"]) == (1.45, 1.3, False)
    rows = [controllers._row_json(row, beside, limit) for row in beside]
    base = controllers._foundation(rows)
    assert base == {
        "controller": "mips",
        "limit": "floor",
        "ratio": 2.0,
        "ratio_spread": [1.0, 4.0],
        "at_most": 1.6,
        "met": False,
    }


def test_only_native_calls_to_a_polling_target_are_judged():
    for kind in (
        ("call", "polling", "python"),
        ("call", "running", "native"),
        ("line", "polling", "native"),
    ):
        row, quick = (measured(name, [9.0], kind) for name in ("apic", "riscv"))
        found = controllers._row_json(row, [row, quick], limit_of(1))
        assert (found["at_most"], found["met"]) == (None, None)
        assert ("limit_ratio" in found) == (kind[1] == "polling")
    alone = measured("apic", [9.0])
    assert controllers._row_json(alone, [alone], limit_of(1))["met"] is None


def test_a_row_that_was_disturbed_says_so():
    row = measured("apic", [100.0], missed=50, moved=True)
    row.seen.counted["elided"] = 10
    row.seen.preempted = 30
    why = " ".join(controllers._row_json(row, [row], limit_of(1))["why"])
    assert "changed its core" in why
    assert "not polling at 50 of 100 calls" in why
    assert "only 10 of 100 calls were counted as elided" in why
    assert "preempted 30 times" in why


def test_every_controller_has_a_target():
    from shmipi.irq.chips import CHIPS

    assert controllers.AT_MOST.keys() == CHIPS.keys()
    assert controllers.Options().controllers == tuple(CHIPS)


def test_a_controllers_table():
    rows = [measured("mips", [100.0]), measured("apic", [140.0])]
    rows[0].moved = rows[1].moved = True
    found = [controllers._row_json(row, rows, limit_of(80)) for row in rows]
    text = io.StringIO()
    document = {
        **LATENCY,
        "bench": "controllers",
        "rows": found,
        "foundation": controllers._foundation(found),
    }
    report.render(document, text)
    shown = text.getvalue()
    assert "1.40 (1.40-1.40)" in shown
    assert "missed" in shown
    assert shown.count("the sender changed its core") == 1  # one note for both
    assert shown.count("no [1]") == 2
    assert "the fastest, mips, takes 1.25 (1.25-1.25) times floor" in shown


def test_every_column_of_the_text_lines_up():
    text = io.StringIO()
    report.table(["name", "p50"], [["a", "1 ns"], ["longer", "12.3 us"]], text)
    assert text.getvalue() == "name        p50\na          1 ns\nlonger  12.3 us\n"


def test_the_progress_line_is_for_terminals():
    for stream, shown in ((io.StringIO(), False), (Terminal(), True)):
        progress = runner.Progress("bench latency", stream)
        progress("polling")
        progress.clear()
        assert ("polling" in stream.getvalue()) == shown
        assert not shown or stream.getvalue().endswith("\r\x1b[K")
