"""Handlers on top of a task: its signals, its imports and its depth are its own."""

import asyncio
import contextlib
import errno
import importlib
import os
import select
import signal
import sys
import textwrap
import threading
import time

import pytest

import shmipi
from shmipi import smp

LOST_S = 10.0


class Alarm(Exception):
    """What the task's signal handler raises."""


def on_alarm(*args):
    raise Alarm


def rings(x):
    """A handler in whose time the task's signal comes, before and in the middle."""
    signal.raise_signal(signal.SIGALRM)
    for _ in range(1000):
        pass
    return x


# ---- where the task may be when its signal comes on top of a handler -----------------


def spinning(state):
    end = time.monotonic() + LOST_S
    while time.monotonic() < end:
        pass


def asleep(state):
    time.sleep(LOST_S)


def selecting(state):
    r, _ = os.pipe()
    select.select([r], [], [], LOST_S)


def waiting(state):
    end = time.monotonic() + LOST_S
    while time.monotonic() < end:
        smp.smp_call_function_single(2, time.sleep, 1.5)


def halted(state):
    smp.wait_for_interrupt()
    smp.wait_for_interrupt(LOST_S)


def masked(state):
    smp.local_irq_disable()
    end = time.monotonic() + 0.2
    while time.monotonic() < end:
        pass
    smp.local_irq_enable()
    asleep(state)


WHERE = [spinning, asleep, selecting, waiting, halted, masked]


@pytest.mark.parametrize("how", ["call", "nowait", "submit", "nmi"])
@pytest.mark.parametrize("where", WHERE, ids=lambda f: f.__name__)
def test_the_task_s_alarm_is_the_task_s(cluster, eventually, where, how):
    state = cluster.shared("state", "i8", 8)
    state[:] = 0

    def task():
        old = signal.signal(signal.SIGALRM, on_alarm)
        try:
            start = time.monotonic()
            state[0] = 1
            where(state)
            return "not raised", 0.0
        except Alarm:
            return "raised", time.monotonic() - start
        finally:
            signal.signal(signal.SIGALRM, old)

    call = cluster._machine.post(1, task, (), None, True)
    eventually(lambda: state[0])
    time.sleep(0.02)
    unraisable = cluster.counters()["unraisable"].sum()
    if how == "call":
        assert cluster.call(1, rings, 5) == 5
    elif how == "submit":
        assert cluster.submit(1, rings, 5).result(5) == 5
    elif how == "nmi":
        cluster.smp.smp_send_nmi_ipi(1, rings, 0)
    else:
        cluster.smp.smp_call_function_single(1, rings, 5, False)
    what, took = cluster._machine.collect(call, 1, 3 * LOST_S)
    assert what == "raised"
    assert took < LOST_S / 2
    assert cluster.counters()["unraisable"].sum() == unraisable


def test_an_idle_cpu_has_no_task_to_raise_in(cluster):
    """What a task left installed does not fail the handlers of others."""
    cluster.run(signal.signal, signal.SIGALRM, on_alarm, cpus=[1])
    try:
        assert [cluster.call(1, rings, n) for n in range(5)] == list(range(5))
    finally:
        cluster.run(signal.signal, signal.SIGALRM, signal.SIG_DFL, cpus=[1])


def test_signal_and_getsignal_tell_what_was_installed(cluster):
    def task():
        def mine(*args):
            hits.append(args[0])

        hits = []
        first = signal.signal(signal.SIGUSR1, mine)
        found = signal.getsignal(signal.SIGUSR1)
        signal.raise_signal(signal.SIGUSR1)
        second = signal.signal(signal.SIGUSR1, signal.SIG_IGN)
        third = signal.signal(signal.SIGUSR1, first)
        with contextlib.suppress(TypeError):
            signal.signal(signal.SIGUSR1, "nothing")
        return (
            first is signal.SIG_DFL,
            found is mine,
            second is mine,
            third is signal.SIG_IGN,
            hits,
            signal.getsignal(signal.SIGUSR1) is signal.SIG_DFL,
        )

    assert cluster.run(task, cpus=[1]) == [
        (True, True, True, True, [signal.SIGUSR1], True)
    ]


def hears(state):
    """An asyncio program that counts its alarms."""

    async def main():
        hits = []
        loop = asyncio.get_running_loop()
        loop.add_signal_handler(signal.SIGALRM, hits.append, 1)
        state[0] = 1
        while not state[1]:
            await asyncio.sleep(0.01)
            state[2] = len(hits)
        await asyncio.sleep(0.05)
        return len(hits)

    return asyncio.run(main())


def test_asyncio_hears_of_a_signal_during_a_handler_once(cluster, eventually):
    state = cluster.shared("state", "i8", 8)
    state[:] = 0
    call = cluster._machine.post(1, hears, (state,), None, True)
    eventually(lambda: state[0])
    try:
        for n in range(5):
            assert cluster.call(1, rings, n) == n
            # Two that come before the task has run again are one, as anywhere.
            eventually(lambda n=n: state[2] > n)
    finally:
        state[1] = 1
    assert cluster._machine.collect(call, 1, LOST_S) == 5


def test_kicks_leave_a_task_s_wakeup_fd_alone(cluster, eventually):
    """A loop that is busy while calls come still hears of its own signal."""
    state = cluster.shared("state", "i8", 8)
    state[:] = 0

    def task():
        r, w = os.pipe2(os.O_NONBLOCK)
        hits = []
        blocking = os.pipe()
        with contextlib.suppress(ValueError):
            signal.set_wakeup_fd(blocking[1])
            hits.append("a blocking one was taken")
        first = signal.set_wakeup_fd(w, warn_on_full_buffer=False)
        old = signal.signal(signal.SIGALRM, lambda *args: hits.append(args[0]))
        state[0] = 1
        while not state[1]:
            pass
        time.sleep(0.01)
        signal.raise_signal(signal.SIGALRM)
        signal.siginterrupt(signal.SIGALRM, False)
        signal.raise_signal(signal.SIGALRM)
        signal.signal(signal.SIGALRM, old)
        second = signal.set_wakeup_fd(-1)
        return first, second == w, list(os.read(r, 100)), hits

    call = cluster._machine.post(1, task, (), None, True)
    eventually(lambda: state[0])
    for n in range(50):
        assert cluster.call(1, triple, n) == [n] * 3
    state[1] = 1
    twice = [signal.SIGALRM] * 2
    assert cluster._machine.collect(call, 1, LOST_S) == (-1, True, twice, twice)


def test_only_the_main_thread_sets_handlers(cluster):
    def task():
        errors = []

        def other():
            for function, args in (
                (signal.signal, (signal.SIGALRM, on_alarm)),
                (signal.set_wakeup_fd, (-1,)),
            ):
                try:
                    function(*args)
                except ValueError as error:
                    errors.append("main thread" in str(error))

        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
        return errors, signal.getsignal(signal.SIGALRM)

    assert cluster.run(task, cpus=[1]) == [([True, True], signal.SIG_DFL)]


# ---- imports -------------------------------------------------------------------------

SLOW = """
import time, shmipi
shmipi.shared("state")[0] = 1
end = time.monotonic() + 0.2
while time.monotonic() < end:
    pass
{body}
value = 1
"""


@pytest.fixture
def module(tmp_path, monkeypatch, boot):
    """`module(body)`: a machine whose CPUs can import a slow `halfway`."""
    monkeypatch.syspath_prepend(tmp_path)

    def make(body="pass"):
        (tmp_path / "halfway.py").write_text(textwrap.dedent(SLOW.format(body=body)))
        return boot(3, idle="halt")

    return make


def sees():
    found = sys.modules.get("halfway")
    return None if found is None else hasattr(found, "value")


def imports():
    with contextlib.suppress(ZeroDivisionError):
        import halfway  # noqa: F401
    return time.monotonic()


@pytest.mark.parametrize("body", ["pass", "1 / 0"], ids=["loads", "raises"])
def test_no_handler_in_the_middle_of_an_import(module, eventually, body):
    cluster = module(f"while not shmipi.shared('state')[4]:\n    pass\n{body}")
    state = cluster.shared("state", "i8", 8)
    cluster.call(1, sees)
    task = cluster._machine.post(1, imports, (), None, True)
    eventually(lambda: state[0])
    calls = [cluster.submit(1, sees) for _ in range(3)]
    # A native one does run.
    cluster.smp.smp_call_function_single(1, smp.NativeHandler("count"), state[1:])
    assert not any(call.done() for call in calls)
    state[4] = 1
    seen = [call.result(5) for call in calls]
    assert seen == [True if body == "pass" else None] * 3
    cluster._machine.collect(task, 1, 5.0)


def test_an_import_that_waits_serves(module, eventually):
    """Two CPUs whose imports call each other do not wait for ever."""
    cluster = module(
        "from shmipi import smp\nsmp.smp_call_function_single(2, int, '1')"
    )
    state = cluster.shared("state", "i8", 8)

    def other():
        state[1] = 1
        smp.smp_call_function_single(1, int, "2")

    task = cluster._machine.post(1, imports, (), None, True)
    eventually(lambda: state[0])
    assert cluster.run(other, cpus=[2]) == [None]
    cluster._machine.collect(task, 1, 5.0)


def test_an_offline_request_waits_for_the_import(module, eventually):
    cluster = module()
    state = cluster.shared("state", "i8", 8)
    task = cluster._machine.post(1, imports, (), None, True)
    eventually(lambda: state[0])
    cluster.offline(1, timeout=5)
    assert cluster.cpus[1].state == "offline"
    cluster.online(1)
    cluster._machine.collect(task, 1, 5.0)


SLOWER = """
import time, shmipi
shmipi.shared("state")[2] = 1
time.sleep(0.1)
shmipi.shared("state")[2] = 0
x = 1
"""


@pytest.mark.parametrize("how", ["thread", "reload"])
def test_handlers_that_import_leave_a_task_s_imports_whole(
    boot, tmp_path, monkeypatch, how
):
    """Also of what another thread imports, and of what is there already."""
    monkeypatch.syspath_prepend(tmp_path)
    rounds, most, fresh = 10, 200, 300
    for n in range(most):
        (tmp_path / f"slow{n}.py").write_text(SLOWER)
    for n in range(fresh):
        (tmp_path / f"fresh{n}.py").write_text("y = 1\n")

    def in_thread():
        failed = []
        for n in range(most):
            if n >= rounds and state[4]:
                break
            other = threading.Thread(target=importlib.import_module, args=[f"slow{n}"])
            other.start()
            while f"slow{n}" not in sys.modules:
                time.sleep(0.001)
            try:
                exec(f"import slow{n}; assert slow{n}.x")  # not importlib's own way
            except BaseException as error:
                failed.append(repr(error))
            other.join()
        return failed

    def reloads():
        import slow0

        seen = []
        for n in range(most):
            if n >= rounds and state[4]:
                break
            importlib.reload(slow0)
            seen += [repr(error) for error in ([] if slow0.x else [ValueError])]
        return seen

    def imports_too(n):
        state[3] += state[2]
        return importlib.import_module(f"fresh{n}").y

    cluster = boot(2, idle="halt")
    state = cluster.shared("state", "i8", 8)
    function = in_thread if how == "thread" else reloads
    task = cluster.start(function, cpus=[1])[0]
    n = 0
    while not task.done() and n < fresh:
        assert cluster.call(1, imports_too, n, timeout=10) == 1
        n += 1
        state[4] = n > 5
        time.sleep(0.003)
    assert task.result(20) == []
    assert n > 5
    if how == "reload":
        assert not state[3]  # none in the middle of one


def test_what_handlers_need_is_there_from_boot(boot):
    cluster = boot(1)
    needed = ["shmipi.smp", "shmipi.atomic", "shmipi.irq", "cloudpickle", "numpy"]

    def missing(names):
        return [name for name in names if name not in sys.modules]

    assert cluster.call(0, missing, needed) == []


# ---- the recursion limit -------------------------------------------------------------


def hit(place):
    shmipi.atomic.fetch_add(shmipi.shared("state"), place, 1)


def triple(x):
    return [x] * 3


def fails(x):
    raise KeyError(x)


def deep(room):
    """Spin with `room` frames left, until told to stop: how often it was disturbed."""
    state = shmipi.shared("state")

    def free():
        try:
            return 1 + free()
        except RecursionError:
            return 1

    def down():
        if free() > room:
            return down()
        state[0] = 1
        bad = 0
        while not state[1]:
            try:
                while not state[1]:
                    pass
            except RecursionError:
                bad += 1
        return bad

    return down()


@pytest.mark.parametrize("room", [1, 2, 3, 5, 9])
def test_a_handler_on_top_of_a_task_at_the_recursion_limit(cluster, eventually, room):
    state = cluster.shared("state", "i8", 8)
    state[:] = 0
    cluster.call(1, hit, 7)
    task = cluster._machine.post(1, deep, (room,), None, True)
    eventually(lambda: state[0])
    unraisable = cluster.counters()["unraisable"].sum()
    try:
        for n in range(10):
            cluster.call(1, hit, 2, timeout=5)
            assert cluster.call(1, triple, n, timeout=5) == [n] * 3
            with pytest.raises(shmipi.RemoteCallError) as caught:
                cluster.call(1, fails, n, timeout=5)
            assert isinstance(caught.value.__cause__, KeyError)
            cluster.smp.smp_call_function_single(1, hit, 3, False)
        assert cluster.call(1, lambda x: x, 5, timeout=5) == 5  # never seen before
    finally:
        state[1] = 1
    assert cluster._machine.collect(task, 1, 5.0) == 0
    assert state[2:4].tolist() == [10, 10]
    assert cluster.counters()["unraisable"].sum() == unraisable
    assert cluster.run(sys.getrecursionlimit, cpus=[1]) == [sys.getrecursionlimit()]


def test_a_handler_may_set_the_recursion_limit(cluster):
    """And the task has that one afterwards, not less."""

    def task():
        state = shmipi.shared("state")
        state[0] = 1
        while not state[1]:
            pass
        depth = 0

        def down():
            nonlocal depth
            depth += 1
            down()

        with contextlib.suppress(RecursionError):
            down()
        sys.setrecursionlimit(1000)
        return depth

    def sets():
        sys.setrecursionlimit(3000)
        shmipi.shared("state")[1] = 1

    state = cluster.shared("state", "i8", 8)
    state[:] = 0
    call = cluster._machine.post(1, task, (), None, True)
    while not state[0]:
        time.sleep(0.001)
    cluster.call(1, sets)
    assert 2900 < cluster._machine.collect(call, 1, 5.0) < 3000


# ---- memory --------------------------------------------------------------------------


@pytest.mark.parametrize("wait", ["call", "smp"])
def test_a_cpu_without_memory_is_no_damaged_segment(boot, wait):
    """Its own trouble to say what a handler raised is told as that."""
    testcapi = pytest.importorskip("_testcapi")
    if not hasattr(testcapi, "set_nomemory"):
        pytest.skip("this Python was built without it")
    cluster = boot(2, idle="halt")

    def starves(_):
        import _testcapi

        _testcapi.set_nomemory(0, 400)  # the next 400 allocations fail
        raise KeyError

    function = cluster.call if wait == "call" else cluster.smp.smp_call_function_single
    with pytest.raises(shmipi.ArenaFullError, match="no memory") as caught:
        function(1, starves, None)
    assert caught.value.errno == errno.ENOMEM
    assert caught.value.cpu == 1
