"""Results of any size: the caller's own, whole, or an error that is true.

A result larger than its block lies in the arena of the CPU that made it until its
sender has read it. What is kept there is bounded by back-pressure and never by
dropping, and no second interrupt is needed to get it.
"""

import collections
import contextlib
import functools
import gc
import os
import random
import signal
import threading
import time

import pytest

from shmipi import (
    CpuDiedError,
    CpuOfflineError,
    IpiTimeoutError,
    RemoteCallError,
    _core,
    atomic,
    smp,
)
from shmipi.machine.process import is_stopped
from shmipi.names import DOORBELLS


def tagged(tag, size):
    return tag, b"x" * size


def post(cluster, cpu, func, *args, task=False):
    """A call that nobody collects unless the test does."""
    return cluster._machine.post(cpu, func, args, None, task)


def finished(cluster, *calls):
    return all(cluster._machine.done(call) for call in calls)


def stop(cluster, cpu, eventually):
    """SIGSTOP: returns when it has."""
    pid = cluster.cpus[cpu].pid
    os.kill(pid, signal.SIGSTOP)
    eventually(lambda: is_stopped(pid))


def kill(cluster, cpu, eventually):
    os.kill(cluster.cpus[cpu].pid, signal.SIGKILL)
    eventually(lambda: cluster.cpus[cpu].state == "dead")


# ---- none is lost --------------------------------------------------------------------


@pytest.mark.parametrize("size", [5_000, 100_000])
def test_no_large_result_is_lost(cluster, size):
    futures = [cluster.submit(0, tagged, n, size) for n in range(2_000)]
    assert all(f.result(30) == (n, b"x" * size) for n, f in enumerate(futures))


@pytest.mark.parametrize("doorbell", DOORBELLS)
def test_results_wait_for_room_and_all_arrive(boot, background, eventually, doorbell):
    """Far more than the arena holds, from handlers and a task, read by and by."""
    cluster = boot(2, idle="halt", doorbell=doorbell, arena_bytes=1 << 20)
    calls = [post(cluster, 1, tagged, n, 100_000) for n in range(20)]
    task = post(cluster, 1, tagged, "task", 200_000, task=True)
    eventually(lambda: finished(cluster, calls[0]))
    time.sleep(0.05)
    assert not finished(cluster, *calls)
    # The rest waits, which holds up nobody: not small ones, not an exception.
    assert cluster.call(1, tagged, "small", 3_000, timeout=5)[0] == "small"
    with pytest.raises(RemoteCallError, match="divmod expected"):
        cluster.smp.smp_call_function_single(1, divmod)
    for n, call in enumerate(calls):
        assert cluster._machine.collect(call, 1, 5.0) == tagged(n, 100_000)
    assert cluster._machine.collect(task, 1, 5.0) == tagged("task", 200_000)
    assert cluster.call(1, tagged, 0, 400_000, timeout=5) == tagged(0, 400_000)


def test_results_wait_for_room_while_a_task_runs(boot, eventually):
    """A sender that has read one rings a busy CPU, too."""
    cluster = boot(2, idle="halt", arena_bytes=1 << 20)
    gate = cluster.shared("gate", "i4", 2)

    def busy():
        gate[1] = 1
        while not gate[0]:
            pass

    task = post(cluster, 1, busy, task=True)
    eventually(lambda: gate[1])
    futures = [cluster.submit(1, tagged, n, 100_000) for n in range(30)]
    assert [f.result(10)[0] for f in futures] == list(range(30))
    calls = [post(cluster, 1, tagged, n, 100_000) for n in range(20)]
    eventually(lambda: finished(cluster, calls[0]))
    for n, call in enumerate(calls):
        assert cluster._machine.collect(call, 1, 5.0)[0] == n
    gate[0] = 1
    cluster._machine.collect(task, 1, 5.0)


@pytest.mark.parametrize("way", ["tasks", "calls"])
def test_who_waits_reads_what_others_have_not(boot, way):
    """The last is asked for first: what fills the CPU's arena is read for it."""
    cluster = boot(2, idle="halt", arena_bytes=1 << 20)
    if way == "tasks":
        tasks = [cluster.start(tagged, n, 200_000, cpus=[1]) for n in range(12)]
        got = [task.results(10)[0] for task in reversed(tasks)]
    else:
        calls = [post(cluster, 1, tagged, n, 200_000) for n in range(12)]
        got = [cluster._machine.collect(call, 1, 10.0) for call in reversed(calls)]
    assert got == [tagged(n, 200_000) for n in reversed(range(12))]
    # Of those that nobody asks for nothing is kept.
    tasks = [cluster.start(tagged, n, 200_000, cpus=[1]) for n in range(12)]
    assert tasks[-1].results(10) == [tagged(11, 200_000)]
    del tasks
    calls = [post(cluster, 1, tagged, n, 200_000) for n in range(12)]
    assert cluster._machine.collect(calls.pop(), 1, 10.0) == tagged(11, 200_000)
    for call in calls:
        cluster._machine.abandon(call)
    assert cluster.call(1, tagged, 0, 400_000, timeout=5) == tagged(0, 400_000)


def test_a_slow_callback_loses_no_result(boot):
    """Nobody reads while a done-callback dawdles: the CPUs keep what they have."""
    cluster = boot(2, idle="halt", arena_bytes=1 << 20)
    gate = threading.Event()
    cluster.submit(0, int).add_done_callback(lambda _: gate.wait(10))
    futures = [cluster.submit(1, tagged, n, 50_000) for n in range(100)]
    time.sleep(0.05)
    gate.set()
    assert [f.result(10) for f in futures] == [tagged(n, 50_000) for n in range(100)]


def test_who_submits_while_the_futures_are_looked_at(boot):
    """A finalizer, or another thread, which a collection in the look lets run."""
    cluster = boot(2, idle="halt")
    futures = [cluster.submit(1, time.sleep, 0.005) for _ in range(400)]

    def collected(phase, info):
        if phase == "start" and threading.current_thread() is looker:
            futures.append(cluster.submit(1, int))

    def look():
        with contextlib.suppress(Exception):
            for _ in range(20):
                cluster._futures._stalls_look = 0.0
                cluster._futures._look_for_stalls()
            looked.append(True)

    looked = []
    looker = threading.Thread(target=look)
    before = gc.get_threshold()
    gc.callbacks.append(collected)
    gc.set_threshold(50)
    try:
        looker.start()
        looker.join(30)
    finally:
        gc.set_threshold(*before)
        gc.callbacks.remove(collected)
    assert looked
    for future in futures:
        assert not future.result(30)


def test_a_callback_that_exits_holds_up_no_future(cluster, monkeypatch):
    told = []
    monkeypatch.setattr(threading, "excepthook", lambda a: told.append(a.exc_type))

    def leave(_):
        raise SystemExit

    go = cluster.shared("go", "i4", 1)
    go[0] = 0

    def waits():
        end = time.monotonic() + 20
        while not go[0] and time.monotonic() < end:
            time.sleep(0.001)

    slow = cluster.submit(0, waits)
    slow.add_done_callback(leave)
    go[0] = 1
    slow.result(5)
    assert [cluster.submit(1, abs, -n).result(5) for n in range(3)] == [0, 1, 2]
    assert told == [SystemExit]


# ---- they are the caller's own -------------------------------------------------------


@pytest.mark.parametrize("known", [True, False])
def test_a_result_is_never_another_calls(boot, eventually, known):
    """Results not read yet, then a new process in the slot, with results of its own.

    It keeps the places of what the dead has answered. If it knew nothing of them it
    would write there, and then it is said that the result is gone.
    """
    cluster = boot(2, idle="halt")
    old = [post(cluster, 1, tagged, f"old-{n}", 5_000) for n in range(5)]
    eventually(lambda: finished(cluster, *old))
    kill(cluster, 1, eventually)
    if not known:
        lends = {name: at for name, at, _ in _core.SLOT_FIELDS}["lends"]
        at = cluster._machine.slot_offset + _core.SLOT_BYTES + lends
        with memoryview(cluster._machine) as memory:
            assert memory[at] == 1
            memory[at] = 0
    cluster.online(1)
    new = [post(cluster, 1, tagged, f"new-{n}", 5_000) for n in range(5)]
    eventually(lambda: finished(cluster, *new))
    for n, call in enumerate(old):
        if known:
            assert cluster._machine.collect(call, 1, 5.0) == tagged(f"old-{n}", 5_000)
            continue
        with pytest.raises(CpuDiedError, match="had run, and its result with it"):
            cluster._machine.collect(call, 1, 5.0)
    for n, call in enumerate(new):
        assert cluster._machine.collect(call, 1, 5.0) == tagged(f"new-{n}", 5_000)


def test_what_the_dead_have_answered_can_be_read(boot, eventually):
    cluster = boot(2, idle="halt")

    def fail(size):
        raise ValueError("y" * size)

    calls = [post(cluster, 1, tagged, n, 300_000) for n in range(3)]
    failed = post(cluster, 1, fail, 300_000)
    task = post(cluster, 1, tagged, "task", 70_000, task=True)
    eventually(lambda: finished(cluster, *calls, failed, task))
    kill(cluster, 1, eventually)
    for n, call in enumerate(calls):
        assert cluster._machine.collect(call, 1, 5.0) == tagged(n, 300_000)
    with pytest.raises(RemoteCallError, match="yyy"):
        cluster._machine.collect(failed, 1, 5.0)
    assert cluster._machine.collect(task, 1, 5.0) == tagged("task", 70_000)


# ---- what is said about them is true -------------------------------------------------


@pytest.mark.parametrize("way", ["offline", "kill"])
def test_cpu_offline_error_means_that_it_has_not_run(boot, background, eventually, way):
    cluster = boot(2, idle="halt")
    ran = cluster.shared("ran", "i8", 1_000_000)
    seen: collections.Counter = collections.Counter()
    stop = threading.Event()

    def large(number):
        atomic.fetch_add(ran, number, 1)
        return b"x" * 6_000

    def caller(number):
        while not stop.is_set():
            number += 1
            try:
                cluster.call(1, large, number)
                name = "ok"
            except (CpuOfflineError, CpuDiedError) as error:
                name = type(error).__name__
                time.sleep(0.0005)
            seen[name, int(ran[number])] += 1

    threads = [background(caller, n * 300_000) for n in range(3)]
    start = time.monotonic()
    while (took := time.monotonic() - start) < 0.8 or (
        took < 30 and seen["ok", 1] <= 100
    ):
        time.sleep(random.random() * 0.01)
        if way == "offline":
            cluster.offline(1)
        else:
            kill(cluster, 1, eventually)
        cluster.online(1)
    stop.set()
    for thread in threads:
        thread.end()
    print(seen)
    assert seen["ok", 1] > 100
    assert not [key for key in seen if key[0] == "CpuOfflineError" and key[1]]
    assert not [key for key in seen if key[0] == "ok" and key[1] != 1]


def test_a_cpu_goes_offline_when_its_results_are_sent(boot, background, eventually):
    """Who asks for it reads what it has; the CPU need not wait for more."""
    cluster = boot(3, idle="halt", arena_bytes=1 << 20)
    calls = [post(cluster, 1, tagged, n, 100_000) for n in range(12)]
    eventually(lambda: finished(cluster, calls[0]))
    assert not finished(cluster, *calls)
    cluster.offline(1, timeout=5)
    assert finished(cluster, *calls)
    for n, call in enumerate(calls):
        assert cluster._machine.collect(call, 1, 5.0) == tagged(n, 100_000)
    cluster.online(1)
    assert cluster.call(1, tagged, 1, 9_000, timeout=5) == tagged(1, 9_000)


def test_a_cpu_that_goes_offline_waits_for_room(boot, background, eventually):
    """Another sender has not read what it was sent: it serves until that has."""
    cluster = boot(3, idle="halt", arena_bytes=1 << 20)
    at = cluster.shared("at", "i4", 1)

    def fail(_):
        at[0] = 1
        end = time.monotonic() + 20
        while at[0] == 1 and time.monotonic() < end:
            time.sleep(0.001)
        raise ValueError("e" * 120_000)

    def sender():
        try:
            smp.smp_call_function_single(1, fail)
        except RemoteCallError as error:
            return len(error.__cause__.args[0])

    task = post(cluster, 0, sender, task=True)
    eventually(lambda: at[0])
    pid = cluster.cpus[0].pid
    try:
        stop(cluster, 0, eventually)
        at[0] = 2
        waits = post(cluster, 1, tagged, "waits", 200_000)
        with pytest.raises(IpiTimeoutError):
            cluster.offline(1, timeout=0.5)
        assert cluster.cpus[1].state != "offline"
        assert not finished(cluster, waits)
        assert cluster.call(1, abs, -1, timeout=5) == 1
        thread = background(cluster.offline, 1, 10)
        time.sleep(0.05)
        assert thread.is_alive()
    finally:
        os.kill(pid, signal.SIGCONT)
    thread.end()
    assert cluster.cpus[1].state == "offline"
    assert cluster._machine.collect(waits, 1, 5.0) == tagged("waits", 200_000)
    assert cluster._machine.collect(task, 0, 5.0) == 120_000


# ---- no second interrupt -------------------------------------------------------------


def test_a_slow_cpu_holds_up_no_other_future(cluster, eventually):
    """A large result of a CPU that is busy by then, and another CPU's future."""
    gate = cluster.shared("gate", "i4", 2)
    gate[:] = 0

    def hold():
        gate[1] = 1
        while not gate[0]:
            time.sleep(0.001)

    calls = [cluster.submit(0, tagged, 1, 5_000), cluster.submit(0, hold)]
    eventually(lambda: gate[1])
    try:
        assert cluster.submit(1, abs, -7).result(5) == 7
        assert calls[0].result(5) == tagged(1, 5_000)
    finally:
        gate[0] = 1
    calls[1].result(5)


def test_an_exception_comes_without_a_second_interrupt(cluster):
    """Of each of the smp_call_function family, and of `call` when it is large."""

    def fail(info):
        raise ValueError(f"from {info}")

    def queued():
        return int(cluster.host_counters()["csd_queued"])

    ways = [
        (1, lambda: cluster.smp.smp_call_function_single(1, fail, 1)),
        (3, lambda: cluster.smp.smp_call_function_many("0-2", fail, 2)),
        (3, lambda: cluster.smp.smp_call_function(fail, 3)),
        (3, lambda: cluster.smp.on_each_cpu(fail, 4)),
        (2, lambda: cluster.smp.on_each_cpu_mask("0-1", fail, 5)),
        (1, lambda: cluster.call(1, fail, "q" * 9_000)),
    ]
    for count, way in ways:
        before = queued()
        with pytest.raises((RemoteCallError, ExceptionGroup)) as caught:
            way()
        errors = getattr(caught.value, "exceptions", [caught.value])
        assert len(errors) == count
        assert all(isinstance(e.__cause__, ValueError) for e in errors)
        assert queued() - before == count


# ---- what nobody reads comes back ----------------------------------------------------


def test_blocks_of_abandoned_calls_come_back(boot):
    """Two results fill what a CPU may lend here; a hundred are left unread."""
    cluster = boot(2, idle="halt", arena_bytes=1 << 20)

    def slow(size):
        time.sleep(0.002)
        return bytes(size)

    for turn in range(50):
        with contextlib.suppress(IpiTimeoutError):
            cluster.call(1, slow, 200_000, timeout=0.0015 + turn % 5 * 0.0005)
        call = post(cluster, 1, bytes, 200_000)
        if turn % 2:
            time.sleep(0.001)
        cluster._machine.abandon(call)
    assert cluster.call(1, len, b"", timeout=5) == 0
    assert len(cluster.call(1, bytes, 500_000, timeout=5)) == 500_000


def test_blocks_of_dead_senders_come_back(boot, eventually):
    """A CPU that dies before or after its call has raised what is large."""
    cluster = boot(3, idle="halt", arena_bytes=1 << 20)
    at = cluster.shared("at", "i4", 1)

    def fail(_):
        at[0] += 1
        time.sleep(0.02)
        raise ValueError("z" * 200_000)

    def sender():
        smp.smp_call_function_single(1, fail)

    for turn in range(8):
        task = post(cluster, 0, sender, task=True)
        eventually(lambda turn=turn: at[0] == turn + 1)
        if turn % 2:
            time.sleep(0.02)
        kill(cluster, 0, eventually)
        with contextlib.suppress(CpuDiedError, RemoteCallError):
            cluster._machine.collect(task, 0, 5.0)
        if turn % 4 < 2:
            cluster.online(0)
        else:
            assert cluster.call(1, len, b"", timeout=5) == 0
            assert len(cluster.call(1, bytes, 500_000, timeout=5)) == 500_000
            cluster.online(0)
    assert len(cluster.call(1, bytes, 500_000, timeout=5)) == 500_000


def test_a_senders_death_makes_room(boot, eventually):
    """What it was lent is free, and nobody but the firmware is there to say so."""
    cluster = boot(3, idle="halt", arena_bytes=1 << 20)
    at = cluster.shared("at", "i4", 1)

    def fail(_):
        at[0] = 1
        end = time.monotonic() + 20
        while at[0] == 1 and time.monotonic() < end:
            time.sleep(0.001)
        raise ValueError("e" * 120_000)

    def sender():
        smp.smp_call_function_single(1, fail)

    task = post(cluster, 0, sender, task=True)
    eventually(lambda: at[0])
    stop(cluster, 0, eventually)
    at[0] = 2
    waits = post(cluster, 1, tagged, "waits", 200_000)
    time.sleep(0.15)
    assert not finished(cluster, waits)
    os.kill(cluster.cpus[0].pid, signal.SIGKILL)
    eventually(lambda: finished(cluster, waits))
    assert cluster._machine.collect(waits, 1, 5.0) == tagged("waits", 200_000)
    with pytest.raises(CpuDiedError):
        cluster._machine.collect(task, 0, 5.0)


# ---- under fire ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("doorbell", "kick"), [("futex", True), ("signal", True), ("mqueue", False)]
)
def test_results_under_fire(boot, background, eventually, doorbell, kick):
    """Every way to call, small and large results; CPUs that die, park and return."""
    cluster = boot(3, idle="halt", doorbell=doorbell, kick=kick, arena_bytes=1 << 21)
    ran = cluster.shared("ran", "i8", 1 << 20)
    seen: collections.Counter = collections.Counter()
    stop = threading.Event()
    sizes = [0, 100, 4_000, 4_200, 30_000, 150_000]

    def work(number, size):
        atomic.fetch_add(ran, number, 1)
        return number, size, "r" * size

    def fails(info):
        atomic.fetch_add(ran, info[0], 1)
        raise ValueError(*info, "r" * info[1])

    def sender(target, number, size):
        try:
            smp.smp_call_function_single(target, fails, (number, size))
        except RemoteCallError as error:
            return error.__cause__.args
        except (CpuOfflineError, CpuDiedError) as error:
            return type(error).__name__

    def outcome(way, number, size, get):
        name = "ok"
        try:
            got = get()
        except RemoteCallError as error:
            got = error.__cause__.args
        except (CpuOfflineError, CpuDiedError, IpiTimeoutError) as error:
            name = type(error).__name__
        else:
            name = got if isinstance(got, str) else "ok"
        count = int(ran[number])
        seen[way, name] += 1
        assert name != "ok" or got == (number, size, "r" * size), way
        assert count == 1 or name != "ok", (way, count)
        assert count == 0 or name != "CpuOfflineError", (way, count)
        assert count <= 1, (way, count)

    def impatient(cpu, number, size):
        # Given up, a call keeps its place in the arena until it has run: a CPU may have
        # no core for a second. Now and then one waits for those before it.
        timeout = 0.002 if number % 10 else None
        return cluster.call(cpu, work, number, size, timeout=timeout)

    smp_single = cluster.smp.smp_call_function_single
    how = {
        "call": lambda cpu, *what: cluster.call(cpu, work, *what),
        "timeout": impatient,
        "run": lambda cpu, *what: cluster.run(work, *what, cpus=[cpu])[0],
        "single": lambda cpu, *what: smp_single(cpu, fails, what),
        "from a CPU": lambda cpu, *what: cluster.run(
            sender, what[0] % 3, *what, cpus=[cpu]
        )[0],
    }

    def caller(way, number):
        rng = random.Random(number)
        while not stop.is_set():
            cpu, size = rng.randrange(3), rng.choice(sizes)
            if way != "submit":
                number += 1
                outcome(
                    way, number, size, functools.partial(how[way], cpu, number, size)
                )
                continue
            futures = []
            for _ in range(8):
                number += 1
                with contextlib.suppress(CpuOfflineError):
                    futures.append((number, cluster.submit(cpu, work, number, size)))
            for each, future in futures:
                outcome(way, each, size, functools.partial(future.result, 20))

    ways = [*how, "submit", "submit"]
    threads = [background(caller, way, n * 100_000) for n, way in enumerate(ways)]
    rng = random.Random(5)
    start = time.monotonic()
    while (took := time.monotonic() - start) < 1.5 or (
        took < 30 and any(seen[way, "ok"] <= 5 for way in ways)
    ):
        cpu = rng.randrange(3)
        time.sleep(rng.random() * 0.02)
        if rng.random() < 0.4:
            kill(cluster, cpu, eventually)
        else:
            with contextlib.suppress(IpiTimeoutError):
                cluster.offline(cpu, timeout=5)
        cluster.online(cpu)
    stop.set()
    for thread in threads:
        thread.end(20)
    print(dict(seen))
    assert all(seen[way, "ok"] > 5 for way in ways)
