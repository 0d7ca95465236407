"""The frame of the command line: help, usage errors, statuses, what is imported."""

import argparse
import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from shmipi import cli, errors
from shmipi.cli import options
from shmipi.cpumask import CpuMask

SHMIPI = [sys.executable, "-m", "shmipi"]


def shmipi(*arguments: str, **kwargs) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*SHMIPI, *arguments], capture_output=True, text=True, check=False, **kwargs
    )


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch):
    """Put a command of the test's own in the place of `ps`."""

    def install(run, prepare=lambda parser: None) -> None:
        module = SimpleNamespace(
            HELP="What it does.", EXAMPLE="shmipi ps", prepare_parser=prepare, run=run
        )
        monkeypatch.setitem(sys.modules, "shmipi.cli.ps", module)

    return install


def test_help_lists_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--help"]) == 0
    text = capsys.readouterr().out
    for name, line in cli.COMMANDS.items():
        assert f"  {name} " in text
        assert line in text
    assert cli.main([]) == 0
    assert capsys.readouterr().out == text


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    import shmipi as package

    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"shmipi {package.__version__}\n"


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_every_command_has_help_with_an_example(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main([name, "--help"]) == 0
    text = capsys.readouterr().out
    assert text.startswith(f"usage: shmipi {name}")
    examples = text.partition("\nexample")[2]
    assert f"  shmipi {name}" in examples


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_every_example_is_accepted_by_its_parser(name: str) -> None:
    module = importlib.import_module(f"shmipi.cli.{name}")
    for line in module.EXAMPLE.strip().splitlines():
        program, named, *arguments = line.split()
        assert (program, named) == ("shmipi", name)
        parser = cli.Parser(prog=f"shmipi {name}")
        module.prepare_parser(parser)
        parser.parse_args(arguments)  # raises SystemExit if it is not


@pytest.mark.alone  # who shares a core's caches with others takes more of its time
def test_help_is_light() -> None:
    """Under 100 ms of CPU time, and nothing of what takes long is imported."""
    script = (
        "import sys; sys.argv[1:] = ['--help']\n"
        "from shmipi.cli import main; status = main()\n"
        "heavy = {'numpy', 'rich', 'psutil', 'posix_ipc', 'cloudpickle', 'asyncio',"
        " 'multiprocessing', 'shmipi._core', 'shmipi.cluster'} & set(sys.modules)\n"
        "sys.exit(str(sorted(heavy)) if heavy else status)"
    )
    best = 1.0
    for _ in range(5):  # the least of a few: the first may compile bytecode
        before = os.times()
        done = subprocess.run(
            [sys.executable, "-c", script], capture_output=True, text=True, check=False
        )
        after = os.times()
        assert done.returncode == 0, done.stderr
        spent = after.children_user - before.children_user
        spent += after.children_system - before.children_system
        best = min(best, spent)
    assert best < 0.1


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["frobnicate"], "there is no command 'frobnicate'; it is one of demo"),
        (["strss"], "did you mean 'stress'?"),
        (["--json"], "unrecognized option: --json"),
        (["--frob", "doctor"], "unrecognized option: --frob"),
        (["doctor", "--frob"], "unrecognized arguments: --frob"),
        (["doctor", "extra"], "unrecognized arguments: extra"),
        (["doctor", "--cpus", "0"], "0 is too small: at least 1"),
        (["doctor", "--cpus", "many"], "'many' is not a whole number"),
        (["doctor", "--cpus", "9" * 5000], "is not a whole number"),
        (["doctor", "--cp", "4"], "unrecognized arguments: --cp 4"),
        (["doctor", "--json"], "expected one argument"),
        (["doctor", "--json", "/nowhere/file"], "there is no directory '/nowhere'"),
        (["doctor", "--json", "/"], "'/' is not the name of a file"),
        (["doctor", "--json", ""], "'' is not the name of a file"),
    ],
)
def test_wrong_usage_is_one_line_and_status_2(
    arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert words in captured.err
    assert captured.err.count("\n") == 1
    assert captured.err.endswith("--help)\n")


@pytest.mark.parametrize(
    ("error", "status", "text"),
    [
        (errors.CommandError("no such machine", status=2), 2, "no such machine"),
        (errors.CommandError("three calls lost"), 1, "three calls lost"),
        (errors.CpuOfflineError("CPU 3 is offline", cpu=3), 1, "CPU 3 is offline"),
        (errors.BootError("make /dev/shm larger"), 1, "make /dev/shm larger"),
        (PermissionError(13, "Permission denied", "/x"), 1, "/x: Permission denied"),
        (OSError("strange"), 1, "strange"),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
)
def test_errors_are_one_line(command, capsys, error, status: int, text: str) -> None:
    def run(args: argparse.Namespace) -> int:
        raise error

    command(run)
    assert cli.main(["ps"]) == status
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == f"shmipi ps: {text}\n"


def test_the_commands_status_is_the_status(command) -> None:
    command(lambda args: 1)
    assert cli.main(["ps"]) == 1


def test_without_the_c_core_it_says_so(monkeypatch, capsys) -> None:
    def missing(name: str):
        raise ModuleNotFoundError("No module named 'shmipi._core'", name="shmipi._core")

    monkeypatch.setattr(cli, "import_module", missing)
    assert cli.main(["ps"]) == 1
    assert "is not built for this Python" in capsys.readouterr().err


def test_a_closed_pipe_is_no_traceback() -> None:
    with subprocess.Popen(
        [*SHMIPI, "doctor"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as child:
        child.stdout.close()
        assert child.stderr.read() == ""
    assert child.returncode == 141


def test_a_full_disk_is_one_line() -> None:
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [*SHMIPI, "doctor"],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    assert "No space left on device" in done.stderr


def test_without_standard_output_it_still_works() -> None:
    done = subprocess.run(
        ["sh", "-c", 'exec "$@" >&-', "sh", *SHMIPI, "doctor"],
        stderr=subprocess.PIPE,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        *(("10s", 10), ("5m", 300), ("500ms", 0.5), ("2h", 7200), ("3", 3)),
        *(("1.5s", 1.5), ("0", 0), ("50us", 5e-5), ("1min", 60)),
    ],
)
def test_durations(text: str, seconds: float) -> None:
    assert options.duration(text) == pytest.approx(seconds)


@pytest.mark.parametrize(
    ("parse", "text"),
    [
        *((options.duration, t) for t in ("", "s", "-1s", "1d", "nan", "inf", "1e9h")),
        *((options.duration, t) for t in ("999999999999h", "1 s", "10S", "\u0663s")),
        *((options.count, t) for t in ("", "0", "-1", "1.5", "1T", "k", "9" * 30)),
        *((options.cpu_mask, t) for t in ("x", "3-1", "-1", "99999999")),
        *((options.core_list, t) for t in ("", ",", "auto,1", "0;1")),
        *((options.integer(1, 8), t) for t in ("", "0", "9", "-1", "1.0", "0x1")),
    ],
)
def test_parsers_refuse(parse, text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError) as caught:
        parse(text)
    assert "\n" not in str(caught.value)


def test_parsers_accept() -> None:
    assert [options.count(text) for text in ("7", "20k", "3M")] == [
        7,
        20_000,
        3_000_000,
    ]
    assert options.core_list("auto") == "auto"
    assert options.core_list("2,0-1,2") == [2, 0, 1, 2]
    assert options.cpu_mask("0-2,5") == CpuMask([0, 1, 2, 5])
    assert [options.integer(1, 8)(text) for text in ("1", "8")] == [1, 8]


def test_machine_options() -> None:
    parser = cli.Parser(prog="shmipi x")
    options.add_machine_options(parser)
    assert options.machine_kwargs(parser.parse_args([])) == {
        "ncpus": None,
        "idle": "auto",
        "doorbell": "futex",
        "controller": "apic",
        "kick": True,
        "cores": "auto",
        "name": None,
        "nohz_full": None,
    }
    line = "--cpus 4 --idle halt --doorbell sem --controller xive --cores 1,0"
    line += " --kick off --name lab --nohz-full 2-3"
    assert options.machine_kwargs(parser.parse_args(line.split())) == {
        "ncpus": 4,
        "idle": "halt",
        "doorbell": "sem",
        "controller": "xive",
        "kick": False,
        "cores": [1, 0],
        "name": "lab",
        "nohz_full": CpuMask("2-3"),
    }
    with pytest.raises(SystemExit):
        parser.parse_args(["--doorbell", "bell"])


def test_subparsers_are_like_their_parent(capsys) -> None:
    parser = cli.Parser(prog="shmipi bench", description="d")
    kinds = parser.add_subparsers(dest="kind", required=True)
    kinds.add_parser("limits", help="raw", example="shmipi bench limits")
    with pytest.raises(SystemExit):
        parser.parse_args(["limits", "--help"])
    assert "example:\n  shmipi bench limits" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        parser.parse_args(["other"])
    assert capsys.readouterr().err.count("\n") == 1


def test_json_documents(tmp_path: Path, capsys) -> None:
    content = options.document(
        "x", mask=CpuMask("0-1"), n=np.int64(3), row=np.arange(2), path=tmp_path
    )
    file = tmp_path / "x.json"
    file.write_text("an older and longer text" * 99)
    options.write_json(str(file), content)
    assert json.loads(file.read_text()) == {
        "schema": "shmipi.x/1",
        "mask": "0-1",
        "n": 3,
        "row": [0, 1],
        "path": str(tmp_path),
    }
    options.write_json("-", content)
    assert json.loads(capsys.readouterr().out)["n"] == 3
    options.write_json(None, content)
    assert capsys.readouterr().out == ""
    with pytest.raises(ValueError, match="JSON"):
        options.write_json("-", {"x": float("nan")})
    with pytest.raises(errors.CommandError, match=r"cannot write .*full: No space"):
        options.write_json("/dev/full", content)
    assert options.human_stream(argparse.Namespace(json="-")) is sys.stderr
    assert options.human_stream(argparse.Namespace(json=None)) is sys.stdout


def test_python_m_shmipi() -> None:
    done = shmipi("--version")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("shmipi ")
