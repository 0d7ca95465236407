"""Every native test is one C program (see scripts/native); here each is one test."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "scripts" / "native"
NAMES = sorted(path.stem for path in Path(__file__).parent.glob("*.c"))

pytestmark = pytest.mark.native


def native(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(SCRIPT), *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )


#: Two processes that spin, on a core each: beside other tests that takes three times as
#: long, and is in their way.
ALONE = ("pingpong", "test_limits")


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[pytest.mark.alone] * (name in ALONE)) for name in NAMES],
)
def test_program(name: str) -> None:
    done = native("--timeout", "90", name)
    if done.returncode == 77:
        pytest.skip(done.stdout.strip())
    assert done.returncode == 0, done.stdout


def test_there_are_programs() -> None:
    assert NAMES
    assert native("--list").stdout.split() == NAMES


def test_unknown_name_is_wrong_usage() -> None:
    done = native("no_such_program")
    assert done.returncode == 2
    assert "no native test 'no_such_program'" in done.stdout
