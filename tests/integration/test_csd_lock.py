"""csd lock debugging: what is said of a wait that lasts (csd_lock_wait_toolong)."""

import contextlib
import logging
import os
import pickle
import re
import signal
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from shmipi import Cluster, IpiStallError, IpiTimeoutError, smp
from shmipi.machine.process import is_stopped

TIMEOUT = 80  # ms


class Log(logging.Handler):
    """What was said, line by line."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines += record.getMessage().splitlines()

    def having(self, *words: str) -> list[str]:
        return [line for line in self.lines if all(word in line for word in words)]

    def wait(self, *words: str, count: int = 1) -> list[str]:
        end = time.monotonic() + 20
        while len(self.having(*words)) < count:
            assert time.monotonic() < end, (words, self.lines)
            time.sleep(0.005)
        return self.having(*words)


@pytest.fixture
def log(cluster: Cluster) -> Iterator[Log]:
    handler, logger = Log(), logging.getLogger("shmipi.csd")
    logger.addHandler(handler)
    assert (cluster.csd_lock_timeout, cluster.panic_on_ipistall) == (5000, 0)
    cluster.csd_lock_timeout = TIMEOUT
    yield handler
    logger.removeHandler(handler)
    cluster.csd_lock_timeout, cluster.panic_on_ipistall = 5000, 0


@contextlib.contextmanager
def stopped(cluster: Cluster, cpu: int) -> Iterator[None]:
    pid = cluster.cpus[cpu].pid
    os.kill(pid, signal.SIGSTOP)
    try:
        end = time.monotonic() + 20
        while not is_stopped(pid):  # it stops when it is on a core
            assert time.monotonic() < end
            time.sleep(0.001)
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


def one(info: object = None) -> None: ...
def two(info: object = None) -> None: ...
def three(info: object = None) -> None: ...
def four(info: object = None) -> None: ...
def five(info: object = None) -> None: ...
def six(info: object = None) -> None: ...
def seven(info: object = None) -> None: ...


def spin(until: str) -> None:
    while not os.path.exists(until):
        pass


def keep_irqs_off(until: str, off: Any) -> None:
    flags = smp.local_irq_save()
    off[0] = 1
    spin(until)
    smp.local_irq_restore(flags)


class Heard(Log):
    """Tells the host how many of them it has."""

    def __init__(self, number: Any) -> None:
        super().__init__()
        self.number = number

    def emit(self, record: logging.LogRecord) -> None:
        super().emit(record)
        self.number[0] = len(self.having("Detected"))


def listened(cpu: int, heard: Any) -> list[str]:
    """On a CPU: what a wait of its own says."""
    handler, logger = Heard(heard), logging.getLogger("shmipi.csd")
    logger.addHandler(handler)
    smp.smp_call_function_single(cpu, seven, None, True)
    logger.removeHandler(handler)
    return handler.lines


def test_every_kind_of_wait_is_reported(
    cluster: Cluster, log: Log, eventually: Callable[..., float]
) -> None:
    """Who waits for whom, how long and for what: from host, guest and task. row 81"""
    heard = cluster.shared("heard", "i8", 1)
    heard[0] = 0
    cluster.run(listened, 2, heard, cpus=[0])  # what it imports takes long
    heard[0] = 0
    with Cluster.attach(cluster.name) as guest:
        with stopped(cluster, 1):
            task = cluster.start(listened, 1, heard, cpus=[0])
            future = cluster.submit(1, two)
            waits = [
                lambda: cluster.call(1, one),
                lambda: cluster.smp.smp_call_function_single(1, three, None, True),
                lambda: cluster.smp.smp_call_function_many([1, 2], four, None, True),
                lambda: cluster.smp.on_each_cpu(five, None, True),
                lambda: cluster.run(six, cpus=[1]),
                lambda: guest.call(1, seven),
            ]
            threads = [threading.Thread(target=wait) for wait in waits]
            for thread in threads:
                thread.start()
            for name in ("one", "two", "three", "four", "five", "six", "seven"):
                line = log.wait("Detected", f"for CPU#01 {name}(")[0]
                found = re.fullmatch(
                    r"csd: Detected non-responsive CSD lock \(#\d+\) on the host,"
                    rf" waiting (\d+) ns for CPU#01 {name}\(None\)\.",
                    line,
                )
                assert found, line
                assert int(found[1]) >= TIMEOUT * 1e6
            assert cluster.smp.csd_lock_is_stuck()
            assert cluster.cpus[1].state != "dead"  # it is stalled
            eventually(lambda: heard[0], 20)  # the task's wait, too
        for thread in threads:
            thread.join()
    future.result()
    (said,) = task.results()
    assert any("Detected" in line and "on CPU#0, waiting" in line for line in said)
    assert any("got unstuck on CPU#0" in line for line in said)
    log.wait("got unstuck on the host, CPU#01 released the lock", count=7)
    assert not cluster.smp.csd_lock_is_stuck()


def test_a_stopped_cpu_is_unresponsive_and_rung_again(
    cluster: Cluster, log: Log
) -> None:
    """SIGSTOP: nothing runs there, so the IPI is sent again. row 81"""
    with stopped(cluster, 1):
        future = cluster.submit(1, one)
        sent = cluster.host_counters()["chip_writes"]
        log.wait("unresponsive.")
        log.wait("CPU#01 is stopped by a signal")
        log.wait("Re-sending CSD lock", "IPI from the host to CPU#01")
        log.wait("Re-sending CSD lock", count=2)  # so the first was sent
        assert cluster.host_counters()["chip_writes"] > sent
    future.result()


def test_a_cpu_with_interrupts_off_says_so(
    cluster: Cluster, log: Log, tmp_path, eventually: Callable[..., float]
) -> None:
    """A stall as test_csd_lock injects it: the text is another one. row 83"""
    until, off = tmp_path / "until", cluster.shared("off", "i8", 1)
    off[0] = 0
    task = cluster.start(keep_irqs_off, str(until), off, cpus=[1])
    eventually(lambda: off[0])
    future = cluster.submit(1, one)
    log.wait("CPU#01 has interrupts disabled.")
    assert log.having("unresponsive.")
    log.wait("Re-sending")
    until.touch()
    future.result()
    task.results()


def test_a_handler_that_does_not_end_is_named(
    cluster: Cluster, log: Log, tmp_path
) -> None:
    """cur_csd: this request, or a prior one; no IPI is sent again. row 81, row 82"""
    until = tmp_path / "until"
    cluster.csd_lock_timeout = 0  # until it runs: before, nothing executes there
    first = cluster.submit(1, spin, str(until))
    while cluster.cpus[1].handler != "spin":
        time.sleep(0.001)
    cluster.csd_lock_timeout = TIMEOUT
    second = cluster.submit(1, one)
    this = log.wait("handling this request.")
    prior = log.wait("handling prior spin(...) request.")
    log.wait("CPU#01 has run spin for ")
    number = re.search(r"#\d+", prior[0])
    assert number
    assert log.having("Detected", f"({number[0]})", " one(None)")
    assert this[0] != prior[0]
    assert not log.having("Re-sending")
    until.touch()
    first.result()
    second.result()


def test_nothing_is_executed_after_the_unlock(cluster: Cluster) -> None:
    """cur_csd is NULL again, just after the unlock: of Python and of C. row 82"""
    for func in (one, smp.NativeHandler("noop")):
        cluster.smp.smp_call_function_single(1, func, 7, True)
        end = time.monotonic() + 20
        while cluster._machine.cur_csd(1) is not None:
            assert time.monotonic() < end


def test_reports_of_one_wait_back_off(cluster: Cluster, log: Log) -> None:
    """The n-th is n timeouts after the one before, times ilog2(CPUs) / 2 + 1."""
    with stopped(cluster, 1):
        future = cluster.submit(1, one)
        log.wait("Continued", count=2)
    future.result()
    said = [
        int(re.search(r"waiting (\d+) ns", line)[1]) for line in log.having("waiting")
    ]
    steps = [said[0], said[1] - said[0], said[2] - said[1]]
    for n, step in enumerate(steps, 1):
        assert step >= n * TIMEOUT * 1e6 * 0.95, steps
    # One number for all of them, and one stack of the waiter.
    assert len({re.search(r"#\d+", line)[0] for line in log.having("waiting")}) == 1
    assert len(log.having("the host waits here")) == 1


def test_no_timeout_says_nothing(cluster: Cluster, log: Log) -> None:
    """csd_lock_timeout=0: never complain; nor give up."""
    cluster.csd_lock_timeout, cluster.panic_on_ipistall = 0, 1
    with stopped(cluster, 1):
        future = cluster.submit(1, one)
        with pytest.raises(IpiTimeoutError) as caught:
            cluster.call(1, two, timeout=0.2)
        assert type(caught.value) is IpiTimeoutError
    future.result()
    assert not log.lines
    assert not cluster.smp.csd_lock_is_stuck()


def test_panic_on_ipistall_gives_up(cluster: Cluster, log: Log) -> None:
    """The wait ends with who did not answer, and what it was asked for. row 81"""
    cluster.panic_on_ipistall = 1000  # within that the others answer the broadcast
    with stopped(cluster, 1):
        for wait in (
            lambda: cluster.call(1, one),
            lambda: cluster.submit(1, one).result(),
            lambda: cluster.run(one, cpus=[1]),
            lambda: cluster.smp.on_each_cpu(one, None, True),
        ):
            with pytest.raises(
                IpiStallError, match="CPU 1 has not answered one"
            ) as caught:
                wait()
            error = caught.value
            assert (error.cpu, error.function) == (1, "one")
            assert isinstance(error, TimeoutError)
            assert "is stopped by a signal" in str(error)
            again = pickle.loads(pickle.dumps(error))
            assert (str(again), again.cpu, again.function) == (str(error), 1, "one")
        assert not cluster.smp.csd_lock_is_stuck()
    cluster.panic_on_ipistall = 0  # what is looked at is that it answers
    cluster.call(1, one)  # it was stalled, not dead


@pytest.mark.parametrize("bad", [-1, 1 << 32])
def test_timeouts_that_cannot_be_are_refused(cluster: Cluster, bad: int) -> None:
    with pytest.raises(ValueError, match="milliseconds"):
        cluster.csd_lock_timeout = bad
    with pytest.raises(ValueError, match="panic_on_ipistall"):
        Cluster(1, panic_on_ipistall=bad)
    with pytest.raises(TypeError):
        cluster.csd_lock_timeout = 1.5  # type: ignore[assignment]
