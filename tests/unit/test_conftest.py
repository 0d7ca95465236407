"""What tests/conftest.py promises to every test, tried on small test files."""

import os
import re
import signal
import subprocess
import sys
import time
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
            *("-p", "xdist", "-p", "timeout", "-p", "rerunfailures", "-p", "conftest"),
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
from pathlib import Path

left = []

def test_leaves_one():
    left.append(subprocess.Popen(["sleep", "60"]))
    stat = Path(f"/proc/{left[0].pid}/stat")
    while stat.read_text().rpartition(")")[2].split()[0] != "S":
        pass  # it has no core yet

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
from pathlib import Path
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
    end = time.monotonic() + 30
    while Path({log!r}).read_text().count("short") < 10 and time.monotonic() < end:
        time.sleep(0.01)
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


STOOD_STILL = """
import os, time

tries = []

def stand_still():
    now = time.monotonic()
    with open(os.environ["SHMIPI_TESTS_PULSE"], "a") as book:
        book.write(f"{now - 0.25} {now}\\n")

def test_loses_its_time():
    stand_still()
    tries.append("loses")
    assert tries.count("loses") > 1

def test_always_fails():
    stand_still()
    tries.append("always")
    assert False

def test_fails_by_itself():
    tries.append("by itself")
    assert tries.count("by itself") > 1

def test_loses_and_passes():
    stand_still()
    tries.append("passes")

def test_how_often():
    counted = {name: tries.count(name) for name in tries}
    assert counted == {"loses": 2, "always": 2, "by itself": 1, "passes": 1}
"""


@pytest.mark.parametrize("how", [(), ("-n", "1")])
def test_what_fails_while_the_computer_stands_still_runs_once_more(
    tmp_path: Path, how: tuple[str, ...]
) -> None:
    """And only that, and only once."""
    printed = run(tmp_path, *how, one=STOOD_STILL)
    assert re.search(r"=+ 2 failed, 3 passed, 2 rerun in ", printed), printed
    assert re.search(r"The computer stood still for 1\.\d s", printed), printed


def test_who_watches_notices_and_ends_with_who_started_it(tmp_path: Path) -> None:
    book = tmp_path / "book"
    book.touch()
    watcher = subprocess.Popen(
        [sys.executable, "-S", ROOT / "tests" / "pulse.py", book], stdin=subprocess.PIPE
    )
    cores = len(os.sched_getaffinity(0))
    late = time.monotonic() + 30
    try:
        while len(os.listdir(f"/proc/{watcher.pid}/task")) <= cores:
            assert time.monotonic() < late, "it watches no core"
            time.sleep(0.01)
        time.sleep(1.0)
        begin = time.monotonic()
        watcher.send_signal(signal.SIGSTOP)
        time.sleep(3.5)  # more than either limit of its
        watcher.send_signal(signal.SIGCONT)
        across: list[float] = []
        while len(across) < cores and time.monotonic() < late:
            time.sleep(0.5)
            lines = book.read_text().split("\n")[:-1]  # the last one may be half there
            spans = [list(map(float, line.split())) for line in lines]
            across = [end - since for since, end in spans if since < begin + 0.1 < end]
    finally:
        watcher.communicate(timeout=10)
    assert len(across) == cores
    assert all(3.4 < seconds < 10 for seconds in across), spans
    assert not book.exists()
