"""Crash dumps: who dies stops the others, and each saves what it was doing."""

import contextlib
import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from shmipi import Cluster, CpuDiedError, NativeHandler, smp
from shmipi.cli import main
from shmipi.machine.inspect import Inspector
from shmipi.machine.process import is_stopped
from shmipi.users import crash


def keep_irqs_off(seconds: float, off: Any) -> None:
    flags = smp.local_irq_save()
    off[0] = 1
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        pass
    smp.local_irq_restore(flags)


def noop(info: object = None) -> None: ...


def wait_for(cpu: int) -> None:
    smp.smp_call_function_single(cpu, noop, None, True)


def running(cluster: Cluster, cpu: int) -> None:
    end = time.monotonic() + 20
    while not cluster.cpus[cpu].task:
        assert time.monotonic() < end
        time.sleep(0.001)


def read(file: Path) -> dict[str, Any]:
    end = time.monotonic() + 20
    while not file.exists():
        assert time.monotonic() < end
        time.sleep(0.001)
    found: dict[str, Any] = json.loads(file.read_text())
    return found


@pytest.mark.alone  # as the one that does not answer
def test_a_native_handlers_segv_is_dumped_whole(
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    eventually: Callable[..., float],
) -> None:
    """All CPUs are in the file, the dead one and one with interrupts off. row 54"""
    with Cluster(4, idle="halt", crash=tmp_path) as cluster:
        file = cluster.users.crash.armed()
        assert file == tmp_path / f"shmipi-crash-{cluster.name}.json"
        off = cluster.shared("off", "i8", 1)
        cluster.start(keep_irqs_off, 60, off, cpus=[1])
        eventually(lambda: off[0], 20)
        cluster.start(wait_for, 1, cpus=[2])
        with Inspector(cluster.name) as inspector:
            eventually(lambda: inspector.view().cpus[2].waits_for == 1, 20)
        begun = time.time()
        with pytest.raises(CpuDiedError, match="killed by SIGSEGV"):
            cluster.call(3, NativeHandler("count"), 8)  # adds 1 to what lies at 8
        found = read(file)
        assert found["time"] - begun < 1
        assert found["waited_s"] < 0.9
        end = time.monotonic() + 20
        while any(cpu.state != "dead" for cpu in cluster.cpus):
            assert time.monotonic() < end
        assert cluster.users.crash.armed() is None  # there is one
        cluster.online(0)
        assert cluster.call(0, int, "7") == 7
    assert (found["cause"]["kind"], found["cause"]["cpu"]) == ("signal", 3)
    assert (found["dead"], found["missing"]) == ([3], [])
    idle, off, waits, dead = found["cpus"]
    assert all(cpu["saved"] for cpu in found["cpus"])
    assert "idling" in idle["stack"][0]
    assert off["interrupts_disabled"]
    assert any("in keep_irqs_off" in line for line in off["stack"])
    assert off["pending_lines"] == ["CALL_FUNCTION_SINGLE_VECTOR"]
    calls = [(call["from"], call["function"], call["type"]) for call in off["queue"]]
    assert ("CPU 2", "noop", "sync") in calls
    assert ("host", "keep_irqs_off", "task") in calls
    assert (waits["waits_for"]["cpu"], waits["waits_for"]["function"]) == (1, "noop")
    assert any("in wait_for" in line for line in waits["stack"])
    assert (dead["signal"], dead["address"]) == (signal.SIGSEGV, 8)
    assert dead["executing"]["function"] == "count"
    assert dead["executing"]["from"] == "host"
    assert any(line.startswith("  C: ") for line in dead["stack"])
    assert dead["counters"]["native_run"] >= 1
    capfd.readouterr()
    assert main(["crash", str(file)]) == 0
    out = capfd.readouterr().out
    assert "CPU 2 waited for CPU 1: noop (task" in out
    assert "host waited for CPU 3: count (handler count" in out
    assert main(["crash", str(file), "--json", "-"]) == 0
    assert json.loads(capfd.readouterr().out)["dump"] == found


@pytest.mark.alone  # a second is a promise: nobody else has the firmware's core
def test_who_does_not_answer_is_missing(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """kill -9, beside a CPU that is stopped: in a second, and it is named. row 54"""
    file = tmp_path / "dump"
    with Cluster(3, idle="halt") as cluster:
        assert cluster.users.crash.arm(file) == file
        pid = cluster.cpus[1].pid
        os.kill(pid, signal.SIGSTOP)
        try:
            end = time.monotonic() + 20
            while not is_stopped(pid):
                assert time.monotonic() < end
            begun = time.time()
            os.kill(cluster.cpus[2].pid, signal.SIGKILL)
            found = read(file)
            assert file.stat().st_mtime - begun < 1.5
            # A second death finds it done: nmi_shootdown_cpus() warns, the file stays.
            os.kill(pid, signal.SIGKILL)
            end = time.monotonic() + 20
            while cluster.cpus[1].state != "dead":
                assert time.monotonic() < end
            assert read(file) == found
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)
    assert (found["dead"], found["missing"]) == ([2], [1])
    states = [cpu["state"] for cpu in found["cpus"]]
    assert states == ["stopped", "missing", "killed by SIGKILL"]
    assert [cpu["saved"] for cpu in found["cpus"]] == [True, False, False]
    assert found["cpus"][1]["process_stopped"]
    assert 0.5 < found["waited_s"] < 1
    assert "CPUs that did not answer: 1" in capfd.readouterr().err


def panics() -> None:
    crash.panic("attempted to kill init!")


@pytest.mark.alone  # who has no core for 0.9 s has not answered
@pytest.mark.parametrize("who", ["CPU 1", "the host"])
def test_panic_stops_the_machine(who: str, tmp_path: Path) -> None:
    """panic(), of a CPU or a host, says why."""
    file = tmp_path / "dump"
    with Cluster(2, idle="halt", crash=file) as cluster:
        if who == "the host":
            cluster.users.crash.panic("attempted to kill init!")
        else:
            with pytest.raises(CpuDiedError, match="killed by SIGABRT"):
                cluster.run(panics, cpus=[1])
        found = read(file)
    text = f"{who} called panic(): attempted to kill init!"
    assert found["cause"]["text"] == text
    assert found["missing"] == []
    if who == "CPU 1":
        assert any("in panics" in line for line in found["cpus"][1]["stack"])
        assert found["cpus"][1]["signal"] == signal.SIGABRT


@pytest.fixture
def unarmed() -> Iterator[Cluster]:
    with Cluster(3, idle="halt") as cluster:
        yield cluster


def test_by_default_a_death_is_its_own(unarmed: Cluster, tmp_path: Path) -> None:
    """Nobody is stopped, also where it was armed once; nor by an exit, or an order."""
    unarmed.users.crash.arm(tmp_path)
    unarmed.users.crash.disarm()
    with pytest.raises(CpuDiedError, match="SIGSEGV"):
        unarmed.call(1, NativeHandler("count"), 8)
    assert unarmed.call(2, int, "7") == 7
    unarmed.online(1)
    file = unarmed.users.crash.arm(tmp_path)
    with pytest.raises(CpuDiedError, match="exited with status 3"):
        unarmed.run(os._exit, 3, cpus=[1])
    unarmed.online(1)
    task = unarmed.start(time.sleep, 60, cpus=[1])
    running(unarmed, 1)
    task.cancel(kill=True, grace=0)  # the firmware was told to
    assert unarmed.call(2, int, "7") == 7
    assert not file.exists()


def test_where_there_can_be_no_file(unarmed: Cluster, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        unarmed.users.crash.arm(tmp_path / "none" / "dump")
    with pytest.raises(OSError, match="File name too long"):
        unarmed.users.crash.arm("x" * 1001)
    assert unarmed.users.crash.armed() is None
    with pytest.raises(FileNotFoundError):
        Cluster(1, crash=tmp_path / "none" / "dump")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "is no crash dump, or is cut short"),
        (b"\xff\xfe", "is no crash dump, or is cut short"),
        (b"[" * 100_000, "is no crash dump, or is cut short"),
        (b'{"machine": "x"}', "is no crash dump of shmipi"),
        (b'{"format": "shmipi-crash", "version": 9}', "is a crash dump of version 9"),
        (b'{"format": "shmipi-crash", "version": 1}', "is damaged: machine is None"),
    ],
)
def test_a_damaged_file_is_one_line(
    content: bytes, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "dump"
    file.write_bytes(content)
    assert main(["crash", str(file)]) == 1
    error = capsys.readouterr().err
    assert words in error
    assert error.count("\n") == 1


def test_each_part_that_is_damaged_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole: dict[str, Any] = {
        "format": "shmipi-crash",
        "version": 1,
        "machine": "m",
        "controller": "apic",
        "ncpus": 1,
        "waited_s": 0.1,
        "cause": {"text": "why"},
        "dead": [],
        "missing": [],
        "cpus": [
            {
                "cpu": 0,
                "state": "stopped",
                "task": None,
                "handler": None,
                "executing": None,
                "queue": [{"to": 0, "from": "host", "type": "sync", "function": None}],
                "pending_lines": [],
                "counters": {},
                "saved": True,
                "interrupts_disabled": False,
                "stack": ["CPU 0"],
            }
        ],
    }
    file = tmp_path / "dump"

    def status(document: Any) -> int:
        file.write_text(json.dumps(document))
        return main(["crash", str(file)])

    assert status(whole) == 0
    capsys.readouterr()
    for name in whole:
        assert (
            status({**whole, name: 1.5j.imag * 3 if name != "waited_s" else "x"}) == 1
        )
    for name in whole["cpus"][0]:
        assert status({**whole, "cpus": [{**whole["cpus"][0], name: 3.5}]}) == 1
    assert status({**whole, "cpus": [3]}) == 1
    assert capsys.readouterr().err.count("Traceback") == 0
    assert main(["crash", str(tmp_path / "none")]) == 1
