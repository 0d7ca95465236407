"""`shmipi bench users`: rows, the raw rows and the counterparts beside them."""

import json
import sys
import types

import pytest

from shmipi import _core, smp
from shmipi.bench import limits, tasks, users
from shmipi.bench.user_rows.base import PACKETS, RAW, STATES, PacketRow, UserRow
from shmipi.cli import main
from shmipi.report.bench import table


class Call(UserRow):
    """A call, as the raw rows make it: it cannot be dearer than itself."""

    def __init__(self, **about):
        for name, value in about.items():
            setattr(self, name, value)
        self.log = []

    def prepare(self, rig):
        self.log.append(f"prepared {rig.cluster.ncpus}")

    def block(self, rig, calls, warmup, gap_ns):
        self.log.append(calls)
        if self.raw == "broadcast":
            state = _core.HALTED
            return rig.run(0, tasks.broadcasts, self.flavour, calls, gap_ns, state)
        if self.rate:
            return [rig.run(0, nowait, calls)]
        state = {"polling": _core.POLLING, "halted": _core.HALTED}[self.state]
        how = {"warmup": warmup, "gap_ns": gap_ns, "state": state}
        return rig.run(0, tasks.native_calls, 1, calls, how)[0]

    def finish(self, rig):
        self.log.append("finished")

    def extra(self):
        return {"doorbells_per_call": 1.0}


def nowait(calls):
    start = _core.stamp()
    for _ in range(calls):
        smp.smp_call_function_single(1, tasks.noop, None, False)
    smp.smp_call_function_single(1, tasks.noop)
    return (_core.stamp() - start) / calls


ROWS = (
    {"what": "halted", "beside": "membarrier"},
    {"what": "polling", "state": "polling", "share": 0.5},
    {"what": "many", "ncpus": 4, "raw": "broadcast", "at_most": None},
    {"what": "rate", "flavour": "python", "raw": "nowait", "rate": True},
    {"what": "batch", "raw": "batch", "state": "polling"},
)


@pytest.fixture(autouse=True)
def rows(monkeypatch):
    made = [Call(**{**about}) for about in ROWS]
    module = types.ModuleType("shmipi.bench.user_rows.echo")
    module.rows = lambda: made
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return made


def test_rows_stand_beside_raw_rows_and_counterparts(rows):
    options = users.Options(calls=60, warmup=5, blocks=5, which=("echo",))
    found = users.run(options)
    assert [row["what"] for row in found["rows"]] == [
        "halted",
        "polling",
        "rate",
        "batch",
        "many",
    ]
    by_what = {row["what"]: row for row in found["rows"]}
    for row in found["rows"]:
        assert row["user"] == "echo"
        assert row["raw"] in RAW
        low, high = row["ratio_spread"]
        assert 0 < low <= row["ratio"] <= high
        assert row["ns"]["p50"] > 0
        assert row["doorbells_per_call"] == 1.0
        assert row["valid"] or row["why"]
    assert by_what["halted"]["calls"] == 60
    assert by_what["polling"]["calls"] == 30
    assert by_what["rate"]["per_s"] == pytest.approx(
        1e9 / by_what["rate"]["typical_ns"]
    )
    assert by_what["halted"]["per_s"] is None
    assert by_what["many"]["ncpus"] == 4
    assert by_what["many"]["met"]  # nothing is promised
    halted = by_what["halted"]
    assert halted["beside"] == "membarrier"
    assert halted["beside_ratio"] is None or halted["beside_ratio"] > 0
    assert rows[0].log == ["prepared 2", 12, 12, 12, 12, 12, "finished"]
    assert rows[2].log[0] == "prepared 4"
    header, cells, notes = users.table(found)
    assert all(len(row) == len(header) for row in cells)
    assert any(note.startswith("membarrier: ") for note in notes)
    table(header, cells, sys.stdout)


def test_a_row_that_misses_what_it_promises_says_so(rows):
    del rows[1:]
    rows[0].at_most, rows[0].beside = 0.0001, ""
    rows[0].miss = "it is far away"
    found = users.run(users.Options(calls=10, warmup=2, blocks=5, which=("echo",)))
    assert not found["rows"][0]["met"]
    _, cells, notes = users.table({**found, "rows": found["rows"] * 2})
    assert all(any(cell.endswith("missed (a)") for cell in row) for row in cells)
    said = [note for note in notes if "far away" in note]
    assert said == ["(a) more than 0.0001 times: it is far away"]
    rows[0].at_most, rows[0].rate, rows[0].least_rate = None, True, 1e12
    rows[0].flavour = "python"
    found = users.run(users.Options(calls=10, warmup=2, blocks=5, which=("echo",)))
    assert not found["rows"][0]["met"]
    rows[0].least_rate, rows[0].most_ns = None, 1e9
    found = users.run(users.Options(calls=10, warmup=2, blocks=5, which=("echo",)))
    assert found["rows"][0]["met"]
    assert found["rows"][0]["most_ns"] == 1e9
    rows[0].most_ns = 1.0
    found = users.run(users.Options(calls=10, warmup=2, blocks=5, which=("echo",)))
    assert not found["rows"][0]["met"]


def test_rows_of_what_is_no_call_of_a_function(capfd):
    """Tasks, softirqs, timers, grace periods, backtraces and a crash, on two CPUs.

    Packets, too. What the machines that crash say of it is not for who measures.
    """
    which = ("cpumap", "crash", "nmi", "rcu", "rps", "sched", "softirq", "tick")
    options = users.Options(calls=5, warmup=1, blocks=5, which=which, most_cpus=2)
    document = users.run(options)
    found = document["rows"]
    assert capfd.readouterr().err == ""
    assert {row["user"] for row in found} == set(which)
    for row in found:
        assert row["ns"]["min"] > 0, row["what"]
        assert row["calls"] >= 5, row["what"]
    flavours = {row["flavour"] for row in found if row["user"] == "sched"}
    assert flavours == {"native", "python"}
    by_user = {row["user"]: row for row in found}
    # The timer's CPU slept: another one sent it the interrupt.
    assert by_user["tick"]["broadcasts_per_timer"] > 0.5
    assert by_user["crash"]["most_ns"] == 1e9
    notes = users.table(document)[2]
    for user in ("cpumap", "rps"):
        row = by_user[user]
        assert 0 <= row["doorbells_per_packet"] < 1
        said = f"{row['what']}: {row['doorbells_per_packet']:.2g} doorbells a packet"
        assert said in notes
    assert 0 < by_user["rps"]["ipis_per_packet"] < 1


def test_doorbells_are_those_of_the_packets():
    class Sends(PacketRow):
        what, least_batches, calls_per_batch = "packets", 2, 10

        def send(self, rig, batches):
            rig.rung["doorbells_sent"] += 30 * batches
            rig.rung["kicks_sent"] += 10 * batches
            return [5.0] * batches

    rung = {"doorbells_sent": 1000, "kicks_sent": 7}
    rig = types.SimpleNamespace(rung=rung, counters=lambda cpu: dict(rung))
    row = Sends()
    assert row.block(rig, 40, 0, 0) == [5.0] * 4
    assert row.block(rig, 1, 0, 0) == [5.0] * 2
    assert row.extra() == {"doorbells_per_packet": 40 / PACKETS}


def test_norovs_rows(monkeypatch):
    """Proves row 87: dry run, self, normal, broadcast, broadcast with a lock."""
    chosen = users.Options(calls=50, blocks=5, warmup=2, which=("smp",), most_cpus=2)
    found = users.run(chosen)["rows"]
    assert [row["what"] for row in found] == [
        "dry run",
        "self-IPI",
        "normal IPI",
        "broadcast IPI",
        "broadcast lock",
    ]
    ns = {row["what"]: row["ns"]["min"] for row in found}
    # A dry run is a call; oneself is called without an IPI, others are woken.
    assert ns["dry run"] < ns["self-IPI"] < ns["normal IPI"]
    assert ns["self-IPI"] < ns["broadcast lock"]


def test_the_command_chooses_among_the_users_that_have_rows(capsys):
    assert main(["bench", "users", "--users", "nobody"]) == 2
    assert "'nobody' is not one of" in capsys.readouterr().err
    assert main(["bench", "users", "--most-cpus", "1"]) == 2
    assert "1 is too small" in capsys.readouterr().err


def test_every_row_that_there_is_can_be_made_and_names_what_there_is():
    for row in users.load(users.Options()):
        assert row.raw in RAW, row.what
        assert row.state in STATES, row.what
        assert row.flavour in ("native", "python"), row.what
        assert not row.beside or row.beside in limits.ROUND_TRIPS, row.what
        assert row.ncpus == 2 or row.state == "halted", row.what
        assert 0 < row.share <= 1, row.what
        json.dumps(row.extra())
