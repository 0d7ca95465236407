"""What tests/conftest.py promises to every test, tried on small test files."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def run(folder: Path, *arguments: str, **files: str) -> str:
    """Run pytest on these files as on those of tests/; what it printed."""
    for name, text in files.items():
        (folder / f"test_{name}.py").write_text(text)
    done = subprocess.run(
        [
            *(sys.executable, "-m", "pytest", "-p", "no:cacheprovider"),
            *("-c", str(ROOT / "pyproject.toml"), "--rootdir", str(ROOT)),
            *("-p", "xdist", "-p", "timeout", "-p", "conftest"),
            *(*arguments, str(folder)),
        ],
        env={
            **os.environ,
            "PYTHONPATH": f"{ROOT / 'tests'}:{ROOT}",
            # Hypothesis takes each process a second to load.
            "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
        },
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    return done.stdout + done.stderr


def test_what_tests_leave_behind(tmp_path: Path) -> None:
    """Not the sockets of one that failed; a process is a failure of its own."""
    printed = run(
        tmp_path,
        processes="""
import subprocess

left = []

def test_leaves_one():
    left.append(subprocess.Popen(["sleep", "60"]))

def test_ends_its_own():
    assert left.pop().wait(5) == -9
    with subprocess.Popen(["true"]):
        pass
""",
        sockets="""
import gc, socket

def test_fails():
    cycle = [socket.socket()]
    cycle.append(cycle)
    assert False

def test_collects():
    gc.collect()
""",
    )
    assert "1 failed, 3 passed, 1 error" in printed, printed
    assert re.search(r"left behind: processes \['\d+: S sleep 60 '\]", printed), printed


DOORBELLS = """
import pytest

@pytest.mark.parametrize("doorbell", ["futex", "pipe", "signal"])
@pytest.mark.parametrize("word", ["pipe"])
def test_each(doorbell, word):
    pass

def test_other():
    pass
"""


def test_some_doorbells_are_chosen(tmp_path: Path) -> None:
    printed = run(tmp_path, "-v", "--doorbells", "futex,signal", one=DOORBELLS)
    assert "3 passed, 1 deselected" in printed, printed
    assert "test_each[pipe-futex]" in printed
    assert "test_each[pipe-signal]" in printed
    assert "test_other" in printed


SHARED = """
import os, time
import pytest

def note(kind):
    with open({log!r}, "a") as file:
        file.write(f"{{kind}} {{os.getpid()}}\\n")

@pytest.mark.parametrize("n", range(50))
def test_waits(n):
    note("begins")
    time.sleep(0.02)
    note("ends")

@pytest.mark.alone
@pytest.mark.parametrize("n", range(3))
def test_measures(n):
    note("alone")
"""


@pytest.mark.long
@pytest.mark.parametrize("workers", ["2", "3"])
def test_what_is_alone_runs_when_all_others_have_ended(
    tmp_path: Path, workers: str
) -> None:
    log = tmp_path / "log"
    text = SHARED.format(log=str(log))
    how = ("-n", workers, "--dist", "loadscope", "--no-loadscope-reorder")
    printed = run(tmp_path, *how, one=text, two=text)
    assert re.search(r"=+ 106 passed in ", printed), printed
    lines = [line.split() for line in log.read_text().splitlines()]
    kinds = [kind for kind, _ in lines]
    assert kinds[-6:] == ["alone"] * 6
    assert len({pid for kind, pid in lines if kind == "alone"}) == 1
    assert kinds.count("ends") == 100
    assert len({pid for kind, pid in lines}) == int(workers)


DYING = """
import os
import pytest

def note(kind):
    with open({log!r}, "a") as file:
        file.write(kind + "\\n")

@pytest.mark.parametrize("n", range(5))
def test_waits(n):
    note(f"waits {{n}}")
    if n == 3:
        os._exit(1)

@pytest.mark.alone
@pytest.mark.parametrize("n", range(3))
def test_measures(n):
    note(f"measures {{n}}")
    if n == 1:
        os._exit(1)
"""


@pytest.mark.long
def test_who_ends_a_worker_fails_and_all_others_run_once(tmp_path: Path) -> None:
    """As a test does that hangs: at its time limit it takes its worker with it."""
    log = tmp_path / "log"
    how = ("-n", "2", "--dist", "loadscope", "--no-loadscope-reorder")
    printed = run(tmp_path, *how, one=DYING.format(log=str(log)))
    assert re.search(r"=+ 2 failed, 6 passed in ", printed), printed
    for name in ("test_waits[3]", "test_measures[1]"):
        assert re.search(rf"FAILED .*{re.escape(name)}", printed), printed
    assert sorted(log.read_text().splitlines()) == [
        *(f"measures {n}" for n in range(3)),
        *(f"waits {n}" for n in range(5)),
    ]


LONG = """
import os, time
import pytest

def note(kind):
    with open({log!r}, "a") as file:
        file.write(f"{{kind}} {{os.getpid()}}\\n")

@pytest.mark.parametrize("n", range(30))
def test_short(n):
    note("short")
    time.sleep(0.01)

@pytest.mark.long
def test_long():
    note("long")
    time.sleep(0.4)
"""


def test_what_is_long_begins_first(tmp_path: Path) -> None:
    log = tmp_path / "log"
    how = ("-n", "2", "--dist", "loadscope", "--no-loadscope-reorder")
    printed = run(tmp_path, *how, one=LONG.format(log=str(log)))
    assert re.search(r"=+ 31 passed in ", printed), printed
    lines = [line.split() for line in log.read_text().splitlines()]
    by = next(pid for kind, pid in lines if kind == "long")
    assert next(kind for kind, pid in lines if pid == by) == "long"
    assert sum(pid != by for _, pid in lines) >= 10  # the other goes on meanwhile
