"""The pytest plugin, as a project that uses shmipi meets it."""

import re
import subprocess
import sys

import pytest

from shmipi import cli
from shmipi.trace.record import load

PROJECT = """
import os
import pytest

def test_two_cpus(cluster):
    assert cluster.ncpus == 2
    assert not cluster.tracing.on

@pytest.mark.shmipi(3, idle="halt")
class TestMarked:
    def test_trace(self, cluster, ipi_trace):
        cluster.call(2, os.getpid)
        ipi_trace.clear()
        for _ in range(5):
            cluster.call(1, os.getpid)
        queued = ipi_trace.events("csd_queue_cpu")
        assert [event.fields["cpu"] for event in queued] == [1] * 5
        (row,) = ipi_trace.summary()["calls"]
        assert (row["function"], row["queued"], row["run"]) == ("getpid", 5, 5)
        assert row["rung"] + row["elided"] == 5
        assert cluster.ncpus == 3

    @pytest.mark.shmipi(trace_records=64)
    def test_fails(self, cluster, ipi_trace):
        assert cluster.tracing.size == 64
        cluster.call(1, os.getpid)
        assert cluster.call(2, os.getppid) == 0, "what it says itself"

def test_without_a_trace(cluster):
    assert cluster.ncpus == 5
"""


def run(folder, text, *options):
    """What pytest says of a test file."""
    (folder / "test_it.py").write_text(text)
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider"]
    done = subprocess.run(
        [*command, *options, "test_it.py"],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=60,
    )
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """The folder of a project's tests, and what pytest says of them."""
    folder = tmp_path_factory.mktemp("project")
    return folder, run(folder, PROJECT, "--shmipi-traces", "kept")


def test_the_fixtures_boot_and_record(ran):
    _, said = ran
    assert re.search(r"=+ 2 failed, 2 passed in", said), said


def test_the_trace_of_a_failed_test_is_a_file_that_the_report_names(
    ran, monkeypatch, capfd
):
    folder, said = ran
    monkeypatch.chdir(folder)
    assert "what it says itself" in said
    assert said.count("- shmipi trace -") == 1  # of the one that has a trace
    (path,) = (folder / "kept").iterdir()
    assert re.search(rf"^kept/{re.escape(path.name)}: \d+ records$", said, re.MULTILINE)
    assert "TestMarked" in path.name
    assert "test_fails" in path.name
    assert cli.main(["trace", "summary", f"kept/{path.name}"]) == 0
    out, _ = capfd.readouterr()
    assert "getppid" in out
    assert "2 calls queued: " in out


FIXTURES = """
import pytest

@pytest.fixture
def before(cluster, ipi_trace):
    cluster.call(1, int)
    raise ValueError

@pytest.fixture
def after(cluster, ipi_trace):
    yield
    cluster.call(1, str)
    raise ValueError

def test_begins(before):
    pass

@pytest.mark.parametrize("what", ["a/b", "a b"])
def test_ends(after, what):
    pass
"""


def test_each_failed_fixture_has_a_trace_in_a_file_of_its_own(tmp_path):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "test_it.py").write_text(FIXTURES)
    options = ("--import-mode=importlib", "--shmipi-traces", "kept", "one", "two")
    said = run(tmp_path, "", *options)
    assert "4 passed, 6 errors in" in said
    traces = [load(path) for path in (tmp_path / "kept").iterdir()]
    names = [trace.about["names"] for trace in traces]
    kept = [name for each in names for name in ("int", "str") if name in each]
    assert sorted(kept) == ["int"] * 2 + ["str"] * 4


def test_no_option_is_needed(tmp_path):
    text = """
def test_fails(cluster, ipi_trace):
    cluster.call(1, int)
    raise ValueError
"""
    said = run(tmp_path, text, "--basetemp", str(tmp_path / "base"))
    assert "1 failed" in said
    (path,) = (tmp_path / "base" / "shmipi0").iterdir()
    assert f"{path}: " in said
    assert len(load(path).records) > 5
