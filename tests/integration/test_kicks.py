"""Kicks that find a task on its way into a system call are looked at all the same.

The interpreter looks for what it was asked between two bytecodes. These tasks are past
that look for a while before they block: `select` asks its argument for its descriptor,
in C, and that takes the time the caller needs to come in between.
"""

import errno
import functools
import os
import select
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

import shmipi
from shmipi import CallSingleData, smp
from shmipi.names import DOORBELLS

LOST_S = 5.0  # a kick that nobody looks at waits for ever
BUSY = 4_000_000  # numbers to look through in C: 50 ms and more


class Slow:
    """Has a descriptor that takes long to say, without a bytecode in between."""

    def __init__(self, fd: int) -> None:
        self.fileno = functools.partial(min, range(fd, fd + BUSY))


def blocks(turn):
    """Goes to sleep in select until a handler writes: False when none did."""
    ready = shmipi.shared("ready")
    r, smp.PIPE = os.pipe()
    slow = Slow(r)
    ready[0] = turn
    got = select.select([slow], [], [], LOST_S)[0]
    os.close(r)
    os.close(smp.PIPE)
    return bool(got)


def wakes(_=None):
    os.write(smp.PIPE, b"x")


def by_submit(cluster):
    cluster.submit(1, wakes)


def by_nowait(cluster):
    cluster.smp.smp_call_function_single(1, wakes, None, False)


def by_csd(cluster):
    csd = by_csd.csd = CallSingleData(wakes)
    cluster.smp.smp_call_function_single_async(1, csd)


def by_mask(cluster):
    cluster.smp.on_each_cpu_mask([1], wakes, None, False)


def by_call(cluster):
    cluster.call(1, wakes)


def from_a_cpu(cluster):
    cluster.run(smp.smp_call_function_single, 1, wakes, None, False, cpus=[2])


def by_nmi(cluster):
    cluster.smp.smp_send_nmi_ipi(1, wakes, 0)


WAYS = [by_submit, by_nowait, by_csd, by_mask, by_call, from_a_cpu, by_nmi]


def meets_the_window(cluster, way):
    """Have `way` interrupt the task before it blocks: was it looked at?"""
    ready = cluster.shared("ready", "i8", 1)
    ready[0] = 0
    for turn in range(1, 9):
        before = cluster.counters()["kicks_timed"][1]
        task = cluster._machine.post(1, blocks, (turn,), None, True)
        while ready[0] != turn:
            time.sleep(0.0005)
        way(cluster)
        while not cluster._machine.done(task):
            time.sleep(0.001)  # a waiting call would ring by itself
        if not cluster._machine.collect(task, 1, 0.0):
            return False
        if cluster.counters()["kicks_timed"][1] > before:
            return True
        # This process was held up, and the kick ended select itself: once more.
    pytest.skip("the caller never came before the task blocked")


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
def test_a_kick_before_a_system_call(cluster, way):
    assert meets_the_window(cluster, way)


@pytest.mark.parametrize("doorbell", DOORBELLS[1:])
def test_a_kick_before_a_system_call_whatever_the_doorbell(boot, doorbell):
    cluster = boot(3, doorbell=doorbell, idle="halt")
    for way in (by_submit, from_a_cpu):
        assert meets_the_window(cluster, way)


def test_a_request_to_go_offline_before_a_system_call(cluster):
    ready = cluster.shared("ready", "i8", 1)
    ready[0] = 0
    task = cluster._machine.post(1, blocks, (1,), None, True)
    while ready[0] != 1:
        time.sleep(0.0005)
    cluster.offline(1, timeout=LOST_S)  # its stopper is woken once
    assert cluster.cpus[1].state == "offline"
    cluster.online(1)
    cluster.call(1, wakes, timeout=LOST_S)
    assert cluster._machine.collect(task, 1, 2 * LOST_S)


def test_what_was_put_off_while_interrupts_were_off(cluster):
    """local_irq_enable() takes it, and no timer runs meanwhile."""
    ready = cluster.shared("ready", "i8", 1)
    sent = cluster.shared("sent", "i8", 1)
    ready[0] = sent[0] = 0

    def masked():
        smp.local_irq_disable()
        ready[0] = 1
        end = time.monotonic() + 20
        while not sent[0] and time.monotonic() < end:
            time.sleep(0.01)
        end = time.monotonic() + 0.1
        while time.monotonic() < end:
            time.sleep(0.01)
        ready[0] = 3
        end = time.monotonic() + 20
        while sent[0] != 2 and time.monotonic() < end:
            time.sleep(0.01)
        smp.local_irq_enable()
        return int(ready[0])

    def note():
        ready[0] = 2

    task = cluster._machine.post(1, masked, (), None, True)
    while ready[0] != 1:
        time.sleep(0.0005)
    before = cluster.counters()["kicks_timed"][1]
    future = cluster.submit(1, note)
    sent[0] = 1
    while ready[0] != 3:
        time.sleep(0.0005)
    assert cluster.counters()["kicks_timed"][1] == before
    sent[0] = 2
    assert cluster._machine.collect(task, 1, 30.0) == 2
    future.result(5)


def test_a_child_of_a_task_has_no_timer(cluster):
    """A process that a task makes is no CPU, and is not interrupted as one."""

    def forks():
        ready, done = os.pipe()
        pid = os.fork()
        if not pid:
            time.sleep(0.1)
            os.write(done, b"x")
            os._exit(0)
        os.close(done)
        assert os.read(ready, 1) == b"x"
        return os.waitpid(pid, 0)[1]

    task = cluster._machine.post(1, forks, (), None, True)
    end = time.monotonic() + 0.1
    while time.monotonic() < end:
        cluster.call(1, int)
    assert cluster._machine.collect(task, 1, 5.0) == 0


@pytest.mark.parametrize("how", ["select", "read", "sleep", "lock"])
def test_how_late_a_kick_is_looked_at(cluster, how, record_property):
    """Aligned with the system call, in every way of blocking: the distribution."""
    turns = 60 if how == "sleep" else 150
    ready = cluster.shared("ready", "i8", 1)
    taken = cluster.shared("taken", "f8", 150)
    ready[0] = taken[:] = 0

    def task():
        r, smp.PIPE = os.pipe()
        smp.LOCK = lock = threading.Lock()
        lock.acquire()
        for turn in range(turns):
            ready[0] = turn + 1
            for _ in range(turn * 7 % 120):
                pass
            if how == "select":
                select.select([r], [], [])
            elif how == "lock":
                lock.acquire()
            elif how == "sleep":
                while not taken[turn]:
                    time.sleep(0.02)
            os.read(r, 1)

    def hit():
        taken[ready[0] - 1] = time.monotonic()
        smp.LOCK.release() if how == "lock" else None
        os.write(smp.PIPE, b"x")

    def queued():
        """Seconds that this thread and the CPU waited for a core, or others had it."""
        threads = (
            f"/proc/{cluster.cpus[1].pid}/schedstat",
            "/proc/thread-self/schedstat",
        )
        waited = sum(int(Path(one).read_text().split()[1]) for one in threads)
        stolen = int(Path("/proc/stat").read_text().split()[8])
        return waited / 1e9 + stolen / os.sysconf("SC_CLK_TCK")

    call = cluster._machine.post(1, task, (), None, True)
    late = []
    for turn in range(turns):
        while ready[0] <= turn:
            pass
        before = queued()
        sent = time.monotonic()
        future = cluster.submit(1, hit)
        while not taken[turn] and time.monotonic() - sent < 2 * LOST_S:
            time.sleep(0.0002)
        assert taken[turn], f"turn {turn}: not looked at, {future}"
        late.append(float(taken[turn]) - sent - (queued() - before))
    cluster._machine.collect(call, 1, 5.0)
    late.sort()
    text = f"{how}: p50 {late[turns // 2] * 1e6:.0f} us, max {late[-1] * 1e6:.0f} us"
    record_property("late", text)
    print(text)
    assert late[-1] < 1.0


# ---- the limit of queued signals -----------------------------------------------------

BOOTS = """
import resource, sys
import shmipi
from shmipi.machine import boot

def go(**options):
    with shmipi.Cluster(2, **options) as cluster:
        assert cluster.call(1, abs, -3) == 3
    print("booted")

if __name__ == "__main__":
    hard = resource.getrlimit(resource.RLIMIT_SIGPENDING)[1]
    resource.setrlimit(resource.RLIMIT_SIGPENDING, (int(sys.argv[2]), hard))
    if sys.argv[3] == "late":
        boot._check_signal_queue = lambda ncpus: None
    try:
        go(**eval(sys.argv[1]))
    except shmipi.BootError as error:
        print("BootError", error.errno, error)
"""


@pytest.mark.parametrize("when", ["early", "late"])
@pytest.mark.parametrize(
    ("options", "boots"),
    [
        ({}, False),
        ({"doorbell": "signal"}, False),
        ({"doorbell": "signal", "kick": False}, False),
        ({"doorbell": "sem", "kick": False}, True),
    ],
    ids=str,
)
def test_no_room_for_signals_is_a_boot_error(tmp_path, options, boots, when):
    program = tmp_path / "boots.py"
    program.write_text(BOOTS)
    done = subprocess.run(
        [sys.executable, program, repr(options), "0", when],
        capture_output=True,
        text=True,
        timeout=30,
    )
    if boots:
        assert done.stdout == "booted\n", done
    else:
        assert done.stdout.startswith(f"BootError {errno.EAGAIN} "), done
        assert "RLIMIT_SIGPENDING" in done.stdout
        assert "ulimit -i" in done.stdout
    assert not done.stderr
