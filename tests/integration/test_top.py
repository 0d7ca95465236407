"""``shmipi top``: on a terminal, on a pipe, and what it leaves behind: nothing."""

from __future__ import annotations

import contextlib
import fcntl
import json
import math
import os
import pty
import re
import secrets
import select
import signal
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from shmipi import Cluster, _core, smp
from shmipi.errors import LayoutError
from shmipi.machine.inspect import Glance, Inspector
from shmipi.report import live
from shmipi.trace.events import TraceEvent
from shmipi.trace.waits import KEPT, Waits

HOME = Path(__file__).resolve().parents[2]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(HOME), "TERM": "xterm"}
for unset in ("COLUMNS", "LINES", "PYTHONUNBUFFERED"):
    ENVIRONMENT.pop(unset, None)
CONTROL = re.compile(r"\x1b\[[0-9;?]*[a-zA-Z]")
ALTERNATE, NORMAL, CURSOR = "\x1b[?1049h", "\x1b[?1049l", "\x1b[?25h"


def storm() -> None:
    """Call CPU 2 a hundred times a second or so, until cancelled."""
    noop = smp.NativeHandler("noop")
    while True:
        smp.smp_call_function_single(2, noop, None, True)
        time.sleep(0.01)


@pytest.fixture(scope="module")
def machine() -> Iterator[Cluster]:
    """A machine of which CPU 1 calls CPU 2."""
    with Cluster(4, idle="halt", name=f"top{secrets.token_hex(3)}") as cluster:
        task = cluster.start(storm, cpus=[1])
        while not (cluster.cpus[1].task or "").endswith("storm"):
            time.sleep(0.001)
        yield cluster
        task.cancel(kill=True)


class Terminal:
    """``shmipi top`` on a terminal. ``text`` is all that it has written."""

    def __init__(self, name: str, width: int = 110, height: int = 20) -> None:
        self.screen, slave = pty.openpty()
        self.resize(width, height)
        self.before = termios.tcgetattr(slave)
        self.slave = slave
        self.process = subprocess.Popen(
            [sys.executable, "-m", "shmipi", "top", name, "--interval", "50ms"],
            stdin=slave,
            stdout=slave,
            stderr=slave,
            env=ENVIRONMENT,
            start_new_session=True,
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
        )
        self.text = ""

    def resize(self, width: int, height: int) -> None:
        size = struct.pack("HHHH", height, width, 0, 0)
        fcntl.ioctl(self.screen, termios.TIOCSWINSZ, size)

    def read(self, seconds: float) -> bool:
        ready, _, _ = select.select([self.screen], [], [], seconds)
        if ready:
            with contextlib.suppress(OSError):
                self.text += os.read(self.screen, 65536).decode("utf-8", "replace")
        return bool(ready)

    def until(self, true: Callable[[str], object], seconds: float = 20.0) -> None:
        deadline = time.monotonic() + seconds
        while not true(self.text):
            assert time.monotonic() < deadline, self.text[-2000:]
            self.read(0.1)

    def shows(self, words: str) -> None:
        """Wait until it writes these words from now on."""
        self.text = ""
        self.until(lambda text: words in CONTROL.sub("", text))

    def type(self, keys: str) -> None:
        os.write(self.screen, keys.encode())

    def end(self) -> int:
        """Wait for its end, and look whether the terminal is as it was."""
        status = self.process.wait(20)
        while self.read(0.05):
            pass
        assert self.text.count(NORMAL) >= 1
        assert self.text.rindex(NORMAL) > self.text.rfind(ALTERNATE)
        assert CURSOR in self.text
        assert termios.tcgetattr(self.slave) == self.before
        assert "Traceback" not in self.text
        return status

    def __enter__(self) -> Terminal:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self.slave)
        os.close(self.screen)


def top(*arguments: str, status: int = 0) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "shmipi", "top", *arguments],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        env=ENVIRONMENT,
        timeout=40,
    )
    assert done.returncode == status, done.stderr
    assert "Traceback" not in done.stderr
    return done.stderr if status else done.stdout


# ---- on a pipe -----------------------------------------------------------------------


def test_a_pipe_gets_one_look_in_plain_text(machine: Cluster) -> None:
    shown = top(machine.name)
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f]", shown)
    header, *rows = shown.splitlines()
    assert header.split()[:3] == ["CPU", "CORE", "STATE"]
    assert [row.split()[0] for row in rows] == ["0", "1", "2", "3"]
    assert "storm" in rows[1]


def test_rates_are_those_of_the_counters(machine: Cluster) -> None:
    before = machine.counters()
    began = time.monotonic()
    found = json.loads(top(machine.name, "--json", "-", "--interval", "1s"))
    passed = time.monotonic() - began
    after = machine.counters()
    assert found["schema"] == "shmipi.top/1"
    one, two, three = found["cpus"][1], found["cpus"][2], found["cpus"][3]
    most = (after["csd_queued"][1] - before["csd_queued"][1]) * passed
    assert 0 < one["calls_out_per_s"] <= most
    assert two["cal_in_per_s"] > 0
    # Each call that was sent is run by the one it was for, but for those on the way.
    assert two["ran_per_s"] == pytest.approx(one["calls_out_per_s"], abs=4)
    assert three["in_per_s"] == three["out_per_s"] == 0
    assert one["task"].endswith("storm")
    assert 0.9 < found["seconds"] <= passed


def test_who_cannot_be_looked_at(machine: Cluster) -> None:
    assert machine.name in top("nosuchmachine", status=1)
    assert "there is no machine" in top("nosuchmachine", status=1)
    assert "letters" in top("no/name", status=2)
    assert "too short" in top(machine.name, "--interval", "1ms", status=2)


# ---- on a terminal -------------------------------------------------------------------


def test_keys(machine: Cluster) -> None:
    with Terminal(machine.name) as terminal:
        terminal.shows("4 online")
        assert ALTERNATE in terminal.text
        terminal.shows("storm")
        terminal.type("s")
        terminal.shows("sorted by in")
        terminal.type("s")
        terminal.shows("sorted by out")
        terminal.type("r")
        terminal.shows("sorted by out backwards")
        terminal.type("rsss")
        terminal.shows("sorted by state")
        terminal.type("s")
        terminal.shows("sorted by cpu")
        terminal.type("j\x1b[Bk\r")
        terminal.shows("CPU 1, core")
        terminal.shows("csd_queued")
        terminal.type("\r")
        terminal.shows("sorted by cpu")
        terminal.type("f")
        terminal.shows("FROZEN")
        while terminal.read(0.2):
            pass
        terminal.text = ""
        terminal.read(0.5)
        assert terminal.text == ""  # nothing changed: nothing is written
        terminal.type(" ")
        terminal.shows("a second")
        terminal.type("q")
        assert terminal.end() == 0


def test_only_what_changed_is_written(machine: Cluster) -> None:
    with Terminal(machine.name) as terminal:
        terminal.shows("q quit")
        terminal.shows("storm")
        while len(terminal.text) < 2000:
            terminal.read(1.0)
        lines = re.findall(r"\x1b\[(\d+);1H", terminal.text)
        assert lines
        # The title, the header, the idle CPUs 0 and 3, and the keys stay as they are.
        assert not {"1", "3", "7", "20"} & set(lines[8:])
        assert "\x1b[2J" not in terminal.text
        terminal.type("q")
        assert terminal.end() == 0


def test_another_size(machine: Cluster) -> None:
    with Terminal(machine.name) as terminal:
        terminal.shows("HALTS")
        terminal.resize(44, 6)
        terminal.text = ""
        terminal.until(lambda text: "CPU" in text.partition("\x1b[2J")[2])
        terminal.read(0.3)
        terminal.text = terminal.text[terminal.text.rfind("\x1b[2J") :]
        shown = re.split(r"\x1b\[\d+;1H", terminal.text)
        assert all(len(CONTROL.sub("", line)) <= 44 for line in shown)
        assert max(map(int, re.findall(r"\x1b\[(\d+);1H", terminal.text))) <= 6
        terminal.resize(120, 30)
        terminal.shows("HALTS")
        terminal.type("q")
        assert terminal.end() == 0


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_leaves_the_terminal_as_it_was(
    machine: Cluster, number: signal.Signals
) -> None:
    with Terminal(machine.name) as terminal:
        terminal.shows("storm")
        if number == signal.SIGINT:
            terminal.type("\x03")
        else:
            terminal.process.send_signal(number)
        assert terminal.end() == 0


def test_a_stop_gives_the_terminal_back_meanwhile(machine: Cluster) -> None:
    with Terminal(machine.name) as terminal:
        terminal.shows("storm")
        terminal.text = ""
        # A session of its own is an orphan, which the kernel does not stop: it gives
        # the terminal back, and takes it again at once.
        terminal.process.send_signal(signal.SIGTSTP)
        terminal.until(lambda text: ALTERNATE in text)
        assert terminal.text.index(NORMAL) < terminal.text.index(ALTERNATE)
        terminal.shows("a second")
        assert termios.tcgetattr(terminal.slave) != terminal.before
        terminal.type("q")
        assert terminal.end() == 0


def test_the_machines_end_is_its_end() -> None:
    with Cluster(2, idle="halt", name=f"top{secrets.token_hex(3)}") as cluster:
        terminal = Terminal(cluster.name)
        terminal.shows("2 online")
    with terminal:
        assert terminal.end() == 0
        assert f"machine {cluster.name} ended" in terminal.text


def test_it_only_reads(machine: Cluster) -> None:
    with Terminal(machine.name) as terminal:
        terminal.shows("storm")
        process = Path(f"/proc/{terminal.process.pid}")
        maps = (process / "maps").read_text().splitlines()
        assert not [line for line in maps if "/dev/shm/shmipi" in line]
        flags = [
            int(
                re.search(
                    r"flags:\s+(\d+)", (process / "fdinfo" / fd.name).read_text()
                )[1],
                8,
            )
            for fd in (process / "fd").iterdir()
            if "/dev/shm" in os.readlink(fd)
        ]
        assert flags
        assert all(flag & os.O_ACCMODE == os.O_RDONLY for flag in flags)
        with Inspector(machine.name) as inspector:
            assert inspector.view().attached == ()
        terminal.type("q")
        assert terminal.end() == 0


def once(name: str, interval: str = "300ms") -> dict[str, Any]:
    """What `shmipi top --json -` finds."""
    found: dict[str, Any] = json.loads(top(name, "--interval", interval, "--json", "-"))
    return found


def test_how_long_calls_wait_is_read_where_it_is_recorded(machine: Cluster) -> None:
    """Not stamped by itself; from the rings of a machine that is traced."""
    found = once(machine.name)
    assert not found["traced"]
    assert {cpu["p50_ns"] for cpu in found["cpus"]} == {None}
    assert {cpu["p99_ns"] for cpu in found["cpus"]} == {None}
    with Terminal(machine.name, 140) as terminal:
        terminal.shows(f"P50 P99: shmipi trace start {machine.name}")
        terminal.type("q")
        assert terminal.end() == 0
    machine.tracing.start(1 << 14)
    try:
        found = once(machine.name, "1s")
        records = machine.trace_events()
    finally:
        machine.tracing.stop()
    assert found["traced"]
    # The same by hand: each begin of a function beside its csd's last queueing.
    queued: dict[int, int] = {}
    took = []
    for record in records:
        if record["event"] == TraceEvent.csd_queue_cpu and record["cpu"] == 2:
            queued[record["csd"]] = record["stamp"]
        elif (
            record["event"] == TraceEvent.csd_function_entry
            and record["slot"] == 2
            and record["csd"] in queued
        ):
            took.append(int(record["stamp"]) - int(queued.pop(record["csd"])))
    assert took
    called = found["cpus"][2]
    assert min(took) * 0.99 - 1 <= called["p50_ns"] <= called["p99_ns"]
    assert called["p99_ns"] <= max(took) * 1.01 + 1
    assert found["cpus"][3]["p50_ns"] is None  # nobody calls it


def deaf(flag: Any) -> None:
    """Take no interrupt until told."""
    smp.local_irq_disable()
    flag[0] = 1
    while flag[0] == 1:
        time.sleep(0.001)
    smp.local_irq_enable()


def test_waits_are_those_of_the_newest_calls() -> None:
    """A call that waits for 20 ms; then so many that it is none of the newest."""
    noop = smp.NativeHandler("noop")
    with (
        Cluster(2, idle="halt", name=f"top{secrets.token_hex(3)}") as cluster,
        Inspector(cluster.name) as inspector,
    ):
        flag = cluster.shared("flag", "i8", 1)
        waits = Waits(inspector)
        assert waits.look() is None
        cluster.tracing.start(1 << 14, events="kernel")
        first = waits.look()
        assert first is not None
        assert np.isnan(first.p50).all()
        task = cluster.start(deaf, flag, cpus=[1])
        while not flag[0]:
            time.sleep(0.001)
        cluster.smp.smp_call_function_single(1, noop, None, False)
        time.sleep(0.02)
        flag[0] = 2
        task.wait(20)
        # What may be half written is left to the next look.
        slow, deadline = waits.look(), time.monotonic() + 20
        while slow is None or math.isnan(slow.p99[1]):
            assert time.monotonic() < deadline
            slow = waits.look()
        assert slow.p99[1] > 10e6
        assert math.isnan(slow.p99[0])
        newest = None
        while newest is None or slow.p99[1] in waits._kept[1]:
            assert time.monotonic() < deadline
            for _ in range(8):
                cluster.smp.smp_call_function_single(1, noop, None, True)
            newest = waits.look()
        assert 0 < newest.p50[1] <= newest.p99[1]
        assert waits.kept(1) == KEPT
        cluster.tracing.start(events=["cpu_halt"])
        assert waits.look() is None  # not of calls


def test_a_ring_that_lies_outside_is_damage() -> None:
    with (
        Cluster(1, name=f"top{secrets.token_hex(3)}", trace=True) as cluster,
        Inspector(cluster.name) as inspector,
    ):
        at = inspector.trace_rings()
        assert at is not None
        memory = memoryview(cluster._machine).cast("B")
        memory[at.at : at.at + 4] = (1 << 30).to_bytes(4, "little")
        with pytest.raises(LayoutError, match="rings"):
            inspector.trace_rings()


# ---- what is shown -------------------------------------------------------------------


def glance(at: float, states: list[str], **counted: list[int]) -> Glance:
    counters = np.zeros((len(states), len(_core.COUNTERS)), np.uint64)
    for name, values in counted.items():
        counters[:, _core.COUNTERS.index(name)] = values
    nothing: list[Any] = [None] * len(states)
    cores = [0] * len(states)
    return Glance(at, states, cores, nothing, nothing, nothing, counters)


def rates() -> live.Rates:
    states = ["halted", "running", "halted"]
    return live.Rates.between(
        glance(10.0, states, irq_call=[5, 0, 100], elided=[0, 0, 0], nmi=[0, 9, 0]),
        glance(12.0, states, irq_call=[25, 0, 8], elided=[2, 4, 6], nmi=[0, 9, 2]),
    )


def test_rates_are_by_the_second_and_begin_anew_with_a_cpu() -> None:
    found = rates()
    assert found.columns["cal_in"].tolist() == [10, 0, 4]  # CPU 2 was booted anew
    assert found.columns["nmi_in"].tolist() == [0, 0, 1]
    assert found.columns["in"].tolist() == [10, 0, 5]
    assert found.columns["elided"].tolist() == [1, 2, 3]


def test_the_order_of_lines() -> None:
    found = rates()
    assert live.View().order(found) == [0, 1, 2]
    assert live.View(sort="in").order(found) == [0, 2, 1]
    assert live.View(sort="elided").order(found) == [2, 1, 0]
    assert live.View(sort="elided", backwards=True).order(found) == [0, 1, 2]
    assert live.View(sort="state").order(found) == [1, 0, 2]


def test_the_chosen_line_stays_in_sight() -> None:
    view = live.View()
    for _ in range(12):
        view = view.moved(1, 10, 4)
    assert (view.chosen, view.top) == (9, 6)
    view = view.moved(-5, 10, 4)
    assert (view.chosen, view.top) == (4, 4)
    assert view.moved(0, 10, 20).top == 0  # a larger terminal
    assert view.moved(-99, 10, 4) == live.View()


@pytest.mark.parametrize(
    ("ns", "text"),
    [
        (None, "-"),
        (0.4, "0ns"),
        (999.4, "999ns"),
        (999.6, "1.0us"),
        (9_960, "10us"),
        (123_456, "123us"),
        (7.77e6, "7.8ms"),
        (30e9, "30s"),
        (1e15, "9999s"),
    ],
)
def test_times_are_short(ns: float | None, text: str) -> None:
    assert live.soon(ns) == text
    assert len(text) <= 5


@pytest.mark.parametrize(
    ("value", "text"),
    [
        *((0, "0"), (999, "999"), (1000, "1.00k"), (9994, "9.99k"), (9999, "10.0k")),
        *(
            (99_999, "100k"),
            (999_499, "999k"),
            (999_600, "1.00M"),
            (12_345_678, "12.3M"),
        ),
        (2**62, "lots"),
    ],
)
def test_numbers_are_short(value: int, text: str) -> None:
    assert live.short(value) == text
    assert len(text) <= 5


@pytest.mark.parametrize("width", [1, 20, 44, 80, 110, 300])
def test_no_line_is_longer_than_the_terminal(width: int) -> None:
    states = ["halted"] * 5
    now = glance(2.0, states, irq_call=[2**40] * 5)
    now.tasks[2] = "a\x1b[31mname\twith\x07 \N{CJK UNIFIED IDEOGRAPH-4E00}" * 9
    found = live.Rates.between(glance(1.0, states), now)
    heading = live.Heading("lab", "idle=halt")
    for height in (1, 2, 5, 30):
        for view in (live.View(), live.View(open=2)):
            lines = live.picture(heading, found, view, width, height)
            assert len(lines) <= height
            for text, _ in lines:
                assert len(text) <= width
                assert text.isprintable()
                assert "\N{CJK UNIFIED IDEOGRAPH-4E00}" not in text
