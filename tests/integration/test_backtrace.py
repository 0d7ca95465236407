"""Backtraces: the rules of lib/nmi_backtrace.c, and what a stack shows."""

import json
import logging
import os
import re
import signal
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import shmipi
from shmipi import Cluster, smp
from shmipi.cli import main
from shmipi.users import backtrace


@pytest.fixture
def log() -> Iterator[list[str]]:
    lines: list[str] = []
    handler, logger = logging.Handler(), logging.getLogger("shmipi.nmi")
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore
    logger.addHandler(handler)
    yield lines
    logger.removeHandler(handler)


@pytest.fixture
def until(tmp_path: Path) -> Iterator[Path]:
    """Tasks go on until this is there: after a test that failed, too."""
    path = tmp_path / "until"
    yield path
    path.touch()


# os.access is C: os.path.exists would be a frame of its own, now and then.
def inner(until: str) -> None:
    shmipi.percpu("there")[smp.smp_processor_id()] = 1
    while not os.access(until, os.F_OK):
        time.sleep(0.001)


def outer(until: str) -> None:
    inner(until)


def keep_irqs_off(until: str) -> None:
    flags = smp.local_irq_save()
    shmipi.percpu("there")[smp.smp_processor_id()] = 1
    while not os.access(until, os.F_OK):
        pass
    smp.local_irq_restore(flags)


def begin(cluster: Cluster, cpu: int, task: Any, until: Path) -> Any:
    """Start a task; it is at its loop when this returns."""
    there = cluster.percpu("there", "i8")
    there[cpu] = 0
    started = cluster.start(task, str(until), cpus=[cpu])
    end = time.monotonic() + 20
    while not there[cpu]:
        assert time.monotonic() < end
        time.sleep(0.001)
    return started


def idle(cluster: Cluster, *cpus: int) -> None:
    """Wait until they idle: whose task has given its result may not yet."""
    end = time.monotonic() + 20
    while any(cluster.cpus[cpu].state != "halted" for cpu in cpus):
        assert time.monotonic() < end
        time.sleep(0.001)


def test_every_cpu_says_where_it_is(
    cluster: Cluster, log: list[str], until: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its Python stack and its C function, with interrupts off too. row 50, row 52"""
    tasks = [
        begin(cluster, 0, outer, until),
        begin(cluster, 1, keep_irqs_off, until),
    ]
    idle(cluster, 2)
    before = cluster.counters()["nmi"].copy()
    assert cluster.users.backtrace.trigger_all_cpu_backtrace()
    assert log[0] == "Sending NMI from the host to CPUs 0-2:"
    first, second, third = log[1:]
    assert first.startswith("NMI backtrace for cpu 0\n")
    assert ", task " in first
    places = re.findall(r'File "(.*)", line (\d+) in (\w+)', first)
    assert [name for *_, name in places] == ["inner", "outer"]
    assert all(Path(file) == Path(__file__) for file, *_ in places)
    code = inner.__code__
    assert code.co_firstlineno < int(places[0][1]) <= code.co_firstlineno + 3
    assert re.search(r"^  C: \S+ \(\S+\)$", first, re.M)
    assert "interrupts disabled" not in first
    assert "interrupts disabled" in second
    assert re.search(r"line \d+ in keep_irqs_off$", second, re.M)
    assert re.fullmatch(
        r"NMI backtrace for cpu 2 skipped: idling at (halt|poll)", third
    )
    # One NMI each, of which the handler has handled one.
    assert (cluster.counters()["nmi"] - before).tolist() == [1, 1, 1]
    assert not cluster.counters()["nmi_unknown"].any()
    # From another process, and some of them.
    assert main(["backtrace", cluster.name, "--cpus", "0-1", "--json", "-"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert [cpu["cpu"] for cpu in document["cpus"]] == [0, 1]
    assert "in inner\n" in document["cpus"][0]["text"]
    assert main(["backtrace", cluster.name, "--cpus", "7"]) == 2
    assert main(["backtrace", "nobody-has-this-name"]) == 1
    until.touch()
    for task in tasks:
        task.results()


def me() -> tuple[dict[int, str], list[int], int]:
    count = smp.smp_processor_id()
    texts = backtrace.backtraces()
    lines = [line for line in traceback.extract_stack() if line.name == "me"]
    assert texts is not None
    return texts, [line.lineno or 0 for line in lines], count


def test_self_says_it_directly(cluster: Cluster) -> None:
    """nmi_cpu_backtrace(NULL): no NMI to oneself; the others are sent one."""
    idle(cluster, 0, 2)
    before = cluster.counters()["nmi"].copy()
    ((texts, _, cpu),) = cluster.run(me, cpus=[1])
    assert (list(texts), cpu) == ([0, 1, 2], 1)
    assert re.search(r'File ".*test_backtrace\.py", line \d+ in me$', texts[1], re.M)
    assert "idling" in texts[0]
    assert (cluster.counters()["nmi"] - before).tolist() == [1, 0, 1]
    kept = cluster.users.backtrace.backtraces([0, 1], exclude_cpu=1)
    assert kept is not None
    assert list(kept) == [0]


def here(*_: object) -> tuple[str, list[tuple[str, int]]]:
    found = backtrace.backtraces([smp.smp_processor_id()]) or {}
    stack = traceback.extract_stack()
    return found[0], [(line.name, line.lineno or 0) for line in stack]


def lines() -> tuple[str, list[tuple[str, int]]]:
    # Calls that begin on other lines than they end, and comprehensions.
    for _ in range(2):
        found = [
            here(
                0,
                len(
                    "x",
                ),
            )
            for _ in "x"
        ]
    return found[-1]


def test_lines_are_those_of_a_traceback(cluster: Cluster) -> None:
    """The interpreter's table of lines is read as the interpreter reads it."""
    ((text, stack),) = cluster.run(lines, cpus=[0])
    seen = [
        (name.rpartition(".")[2], int(line))
        for line, name in re.findall(r"line (\d+) in (\S+)", text)
        if name.startswith("lines")
    ]
    assert seen
    assert seen[::-1] == [one for one in stack if one in seen]
    assert {"lines"} <= {name for name, _ in seen}


def test_a_second_caller_returns_silently(cluster: Cluster, log: list[str]) -> None:
    """backtrace_flag: one at a time, on the whole machine; nothing is printed."""
    machine = cluster._machine
    assert cluster.users.backtrace.backtraces() is not None  # its memory is made
    assert machine.backtrace_begin()
    assert cluster.users.backtrace.backtraces() is None
    assert cluster.users.backtrace.trigger_all_cpu_backtrace()
    assert not log
    assert cluster.run(second, cpus=[2]) == [True]
    assert main(["backtrace", cluster.name]) == 1
    machine.backtrace_end()
    assert cluster.users.backtrace.backtraces() is not None


def second() -> bool:
    return backtrace.backtraces() is None


def test_a_stopped_cpu_is_read_from_outside(cluster: Cluster, until: Path) -> None:
    """It takes no NMI: nobody waits for it, and its stack is there all the same."""
    task = begin(cluster, 1, outer, until)
    pid = cluster.cpus[1].pid
    os.kill(pid, signal.SIGSTOP)
    try:
        while (
            Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "T"
        ):
            time.sleep(0.001)
        begun = time.monotonic()
        text = (cluster.users.backtrace.backtraces([1]) or {})[1]
        assert time.monotonic() - begun < 9
    finally:
        os.kill(pid, signal.SIGCONT)
    until.touch()
    task.results()
    assert text.startswith("NMI backtrace for cpu 1: it is stopped by a signal\n")
    assert "in inner\n" in text


def test_where_there_is_no_nmi_it_can_be_masked(
    log: list[str], until: Path, eventually: Callable[..., float]
) -> None:
    """gicv2: IPI_CPU_BACKTRACE is an interrupt, which can be kept off. row 51"""
    with Cluster(2, idle="halt", controller="gicv2") as cluster:
        idle(cluster, 0)
        cluster.users.backtrace.trigger_single_cpu_backtrace(0)
        assert "can be masked (gicv2 has no NMI)" in log[0]
        assert "idling" in log[1]
        task = begin(cluster, 1, keep_irqs_off, until)
        cluster.users.backtrace.backtraces([1], timeout=0.2)
        eventually(lambda: cluster._machine.masked(1))  # it has come, to no effect
        text = (cluster.users.backtrace.backtraces([1], timeout=0.2) or {})[1]
        assert "it did not answer in 0.2 s\n  it has interrupts disabled\n" in text
        assert "in keep_irqs_off\n" in text
        until.touch()
        task.results()
        idle(cluster, 1)
        text = (cluster.users.backtrace.backtraces([1]) or {})[1]
        assert "idling" in text


def test_ten_seconds_at_most() -> None:
    """The wait of nmi_trigger_cpumask_backtrace()."""
    assert backtrace._TIMEOUT_S == 10.0
