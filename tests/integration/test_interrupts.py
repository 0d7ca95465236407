"""Interrupting a CPU that runs Python: the kick, the soft mask, native handlers."""

import ctypes
import itertools
import os
import shutil
import signal
import subprocess
import time

import pytest

import shmipi
from shmipi import BootError, RemoteCallError, smp


@pytest.fixture
def running(cluster, background, eventually):
    """`running(func)`: func runs as a task of CPU 1 and has said so."""
    flag = cluster.shared("running", "i8", 2)
    threads = []

    def start(func, where=cluster):
        flag_there = where.shared("running", "i8", 2)
        flag_there[:] = 0
        threads.append(background(lambda: where.run(func, cpus=[1])[0]))
        eventually(lambda: flag_there[0])
        return threads[-1]

    yield start
    flag[1] = 1
    for thread in threads:
        thread.join(5)


def spin():
    """A task that never sleeps, until it is told to end."""
    flag = shmipi.shared("running")
    flag[0] = 1
    turns = 0
    end = time.monotonic() + 20
    while not flag[1] and time.monotonic() < end:
        turns += 1
    return turns


# ---- the kick ------------------------------------------------------------------------


def test_a_python_loop_is_interrupted(cluster, running, eventually):
    task = running(spin)
    eventually(lambda: cluster.cpus[1].state == "running")
    before = cluster.counters()["kicks_received"][1]
    start = time.perf_counter()
    for n in range(50):
        assert cluster.call(1, lambda x: (x, smp.in_hardirq()), n) == (n, True)
    assert time.perf_counter() - start < 5
    assert cluster.counters()["kicks_received"][1] > before
    eventually(lambda: cluster.cpus[1].state == "running")
    shmipi.shared("running")[1] = 1
    assert task.end() > 0


def test_a_sleeping_task_is_interrupted_and_sleeps_its_full_time(cluster, running):
    def sleep():
        shmipi.shared("running")[0] = 1
        start = time.monotonic()
        time.sleep(3.0)
        return time.monotonic() - start

    task = running(sleep)
    for n in range(10):
        assert cluster.call(1, abs, -n) == n
    assert task.is_alive(), "the calls waited for the sleep's end"
    assert 3.0 <= task.end(10) < 6.0


def test_a_blocked_read_is_interrupted_and_goes_on(cluster, running):
    def read():
        r, w = os.pipe()
        shmipi.shared("fd")[0] = w
        shmipi.shared("running")[0] = 1
        try:
            return os.read(r, 10)
        finally:
            os.close(r)
            os.close(w)

    cluster.shared("fd", "i8", 1)
    task = running(read)
    assert cluster.call(1, abs, -5) == 5

    def write():
        os.write(int(shmipi.shared("fd")[0]), b"done")

    cluster.call(1, write)
    assert task.end() == b"done"


def test_a_handlers_exception_does_not_reach_the_task(cluster, running):
    def boom():
        raise KeyboardInterrupt

    task = running(spin)
    for _ in range(20):
        with pytest.raises(RemoteCallError):
            cluster.call(1, boom)
    shmipi.shared("running")[1] = 1
    assert task.end() > 0


def test_handlers_do_not_nest(cluster, running):
    """Interrupts are off while one runs: the next waits for its end."""
    depth = cluster.shared("depth", "i8", 2)

    def handler(_):
        depth[0] += 1
        depth[1] = max(depth[1], depth[0])
        for _ in range(200):
            pass
        depth[0] -= 1

    running(spin)
    for _ in range(200):
        cluster.smp.smp_call_function_single(1, handler, wait=False)
    cluster.call(1, int)
    cluster.call(1, int)
    assert depth.tolist() == [0, 1]


def test_many_senders_and_a_running_target(cluster, running):
    """Nothing is lost or run twice, whatever the target is doing at the moment."""
    n = cluster.shared("storm", "i8", 1)
    n[0] = 0

    def handler(_):
        n[0] += 1

    def sender():
        for _ in range(500):
            smp.smp_call_function_single(1, handler)
            smp.smp_call_function_single(1, handler, None, False)
        smp.smp_call_function_single(1, handler)

    running(spin)
    cluster.run(sender, cpus=[0, 2])
    cluster.call(1, int)
    cluster.call(1, int)
    assert n[0] == 2002


# ---- the soft mask -------------------------------------------------------------------


@pytest.mark.parametrize("pair", ["enable", "restore"])
def test_interrupts_disabled_are_replayed(cluster, running, eventually, pair):
    n = cluster.shared("masked", "i8", 3)
    n[:] = 0

    def handler(_):
        n[0] += 1

    def task():
        flags = smp.local_irq_save() if pair == "restore" else smp.local_irq_disable()
        shmipi.shared("running")[0] = 1
        while not n[1]:
            pass
        held_back = int(n[0])
        if pair == "restore":
            smp.local_irq_restore(flags)
        else:
            smp.local_irq_enable()
        return held_back, int(n[0])  # at once, not some time later

    task = running(task)
    for _ in range(10):
        cluster.smp.smp_call_function_single(1, handler, wait=False)
    time.sleep(0.1)
    assert n[0] == 0
    n[1] = 1
    assert task.end() == (0, 10)


def test_native_handlers_respect_the_mask_too(cluster, running):
    n = cluster.shared("native_masked", "i8", 2)
    n[:] = 0

    def task():
        smp.local_irq_disable()
        shmipi.shared("running")[0] = 1
        while not n[1]:
            pass
        held_back = int(n[0])
        smp.local_irq_enable()
        return held_back, int(n[0])

    task = running(task)
    for _ in range(5):
        cluster.smp.smp_call_function_single(1, smp.NativeHandler("count"), n, False)
    time.sleep(0.05)
    n[1] = 1
    assert task.end() == (0, 5)


def test_a_task_that_ends_with_interrupts_disabled_is_named(boot, capfd):
    cluster = boot(2, idle="halt")

    def forgetful():
        smp.local_irq_disable()

    cluster.run(forgetful, cpus=[1])
    assert cluster.call(1, int, timeout=5) == 0
    assert cluster.run(smp.irqs_disabled) == [False, False]
    cluster.shutdown()
    text = capfd.readouterr().err
    assert "forgetful" in text
    assert "interrupts disabled" in text


# ---- foreign signals, and tasks that meddle ------------------------------------------


def test_a_foreign_kick_is_spurious_and_changes_nothing(cluster, running, eventually):
    number = cluster._machine.kick_signal

    def spurious(cpu):
        return int(cluster.counters()["kicks_spurious"][cpu])

    eventually(lambda: cluster.cpus[2].state == "halted")
    before = spurious(1), spurious(2)
    task = running(spin)
    for pid in (cluster.cpus[1].pid, cluster.cpus[2].pid):
        os.kill(pid, number)
    eventually(lambda: (spurious(1), spurious(2)) == (before[0] + 1, before[1] + 1))
    # With a value of its own, as sigqueue() sends it: the machine's cookie is not it.
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.sigqueue(cluster.cpus[1].pid, number, ctypes.c_void_p(12345)) == 0
    eventually(lambda: spurious(1) == before[0] + 2)
    assert cluster.call(1, abs, -1) == 1
    assert cluster.call(2, abs, -1) == 1
    shmipi.shared("running")[1] = 1
    task.end()


def test_foreign_kicks_with_the_signal_doorbell(boot, eventually):
    cluster = boot(2, idle="halt", doorbell="signal")
    eventually(lambda: cluster.cpus[1].state == "halted")
    for n in range(1, 4):
        os.kill(cluster.cpus[1].pid, cluster._machine.kick_signal)
        eventually(lambda n=n: cluster.counters()["kicks_spurious"][1] == n)
        assert cluster.call(1, abs, -n) == n


KICK = signal.SIGRTMIN + 8


def meddle_replace():
    signal.signal(KICK, lambda *_: None)


def meddle_block():
    signal.pthread_sigmask(signal.SIG_BLOCK, {KICK})


@pytest.mark.parametrize("task", [meddle_replace, meddle_block])
def test_a_task_that_meddles_with_the_kick_is_named(boot, capfd, running, task):
    cluster = boot(2, idle="halt")
    assert cluster._machine.kick_signal == KICK
    cluster.run(task, cpus=[1])
    # Mended: the next task is interrupted as ever.
    later = running(spin, cluster)
    assert cluster.call(1, abs, -3, timeout=5) == 3
    cluster.shared("running", "i8", 2)[1] = 1
    later.end()
    cluster.shutdown()
    text = capfd.readouterr().err
    assert task.__name__ in text
    assert "kick signal" in text
    assert "CPU 1" in text


def test_the_signal_can_be_chosen(boot, running):
    number = int(signal.SIGRTMIN) + 3
    cluster = boot(2, idle="halt", kick=number)
    assert cluster._machine.kick_signal == number
    task = running(spin, cluster)
    assert cluster.call(1, abs, -3, timeout=5) == 3
    assert cluster.counters()["kicks_received"][1] > 0
    cluster.shared("running", "i8", 2)[1] = 1
    task.end()


# ---- cooperative CPUs ----------------------------------------------------------------


def test_without_kicks_a_task_is_not_interrupted(boot, running):
    """Proves row 76."""
    cluster = boot(2, idle="halt", kick=False)
    go = cluster.shared("go", "i8", 1)

    def task():
        shmipi.shared("running")[0] = 1
        while not go[0]:
            pass
        smp.cond_resched()
        while go[0] < 2:
            pass
        return True

    thread = running(task, cluster)
    with pytest.raises(shmipi.IpiTimeoutError):
        cluster.call(1, int, timeout=0.1)
    future = cluster.submit(1, abs, -4)
    time.sleep(0.05)
    assert not future.done()
    go[0] = 1
    assert future.result(5) == 4  # at cond_resched(), before the task's end
    go[0] = 2
    assert thread.end()
    assert cluster.counters()["kicks_received"].sum() == 0
    assert (
        cluster.counters()["kicks_sent"].sum() + cluster.host_counters()["kicks_sent"]
        == 0
    )


def test_without_kicks_the_end_of_a_task_takes_interrupts(boot, running):
    cluster = boot(2, idle="halt", kick=False)

    def task():
        shmipi.shared("running")[0] = 1
        time.sleep(0.2)

    thread = running(task, cluster)
    assert cluster.call(1, abs, -4, timeout=5) == 4
    thread.end()


def test_without_kicks_a_waiting_task_takes_interrupts(boot):
    cluster = boot(2, idle="halt", kick=False)

    def task():
        me = smp.smp_processor_id()
        for _ in range(100):
            smp.smp_call_function_single(1 - me, id)
        return me

    assert cluster.run(task) == [0, 1]


# ---- native handlers -----------------------------------------------------------------


def test_builtin_native_handlers(cluster):
    n = cluster.shared("native_n", "i8", 4)
    n[:] = 0
    count = smp.NativeHandler("count")
    assert repr(count) == "NativeHandler('count')"
    for _ in range(3):
        cluster.smp.smp_call_function_single(1, count, n[2:])
    cluster.smp.on_each_cpu(count, n)
    cluster.smp.smp_call_function_single(1, smp.NativeHandler("noop"))
    assert cluster.call(1, count, n[3:]) is None
    assert cluster.submit(1, count, n[3:]).result(5) is None
    cluster.smp.smp_call_function_single_async(
        1, cluster.smp.CallSingleData(count, n[1:])
    )
    cluster.call(1, int)
    cluster.call(1, int)
    assert n.tolist() == [3, 1, 3, 2]


def test_native_handlers_travel_and_run_from_cpus(cluster):
    n = cluster.shared("native_m", "i8", 1)
    n[0] = 0
    count = smp.NativeHandler("count")

    def task():
        for cpu in range(3):
            smp.smp_call_function_single(cpu, count, n)
            smp.smp_call_function_single(cpu, smp.NativeHandler("count"), n)

    cluster.run(task)
    assert n[0] == 18


def test_native_handlers_run_at_once_in_the_signal_handler(cluster, running):
    """Also while the task holds the interpreter and reaches no bytecode boundary."""
    n = cluster.shared("native_k", "i8", 1)
    n[0] = 0

    def task():
        flag = shmipi.shared("running")
        flag[0] = 1
        start = time.monotonic()
        # One call into C, which ends when the host says so; or by itself, late.
        any(map(flag.__getitem__, itertools.repeat(1, 100_000_000)))
        return start, time.monotonic()

    thread = running(task)
    time.sleep(0.02)
    count = smp.NativeHandler("count")
    for _ in range(10):
        cluster.smp.smp_call_function_single(1, count, n)
    ended = time.monotonic()
    shmipi.shared("running")[1] = 1
    begin, end = thread.end(20)
    assert n[0] == 10
    assert begin < ended < end, "they ran after the C call, not during it"


@pytest.mark.parametrize("info", ["text", 1.5, 2**70, b"x" * 25, [1], (1,)])
def test_what_a_native_handler_does_not_take(cluster, info):
    with pytest.raises(TypeError, match="native handler takes"):
        cluster.smp.smp_call_function_single(1, smp.NativeHandler("noop"), info)
    with pytest.raises(TypeError):
        cluster.call(1, smp.NativeHandler("noop"), 1, 2)


def test_unknown_native_handlers(boot, tmp_path):
    with pytest.raises(LookupError, match="no native handler"):
        smp.NativeHandler("nix")
    with pytest.raises(ValueError, match=r"FILE\.so:symbol"):
        boot(1, handlers=["nix"])
    with pytest.raises(TypeError):
        boot(1, handlers="noop")
    with pytest.raises(BootError, match="there is no file"):
        boot(1, handlers=[f"{tmp_path}/no.so:f"])
    bad = tmp_path / "bad.so"
    bad.write_text("no library")
    with pytest.raises(BootError, match=r"bad\.so"):
        boot(1, handlers=[f"{bad}:f"])


SOURCE = """
#include <stdint.h>
#include <string.h>

void add(void *info) { __atomic_fetch_add((int64_t *)info, 5, __ATOMIC_SEQ_CST); }

int64_t *last;
void keep(void *info) { last = info; }
void set(void *info) { *last = (int64_t)info; }
void none(void *info) { *last = info == 0 ? -1 : -2; }
void text(void *info) { memcpy(last, info, 8); }
"""


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        pytest.skip("no C compiler")
    folder = tmp_path_factory.mktemp("native")
    (folder / "h.c").write_text(SOURCE)
    subprocess.run(
        [compiler, "-shared", "-fPIC", "-O1", "-o", folder / "h.so", folder / "h.c"],
        check=True,
    )
    return folder / "h.so"


def test_handlers_of_a_library(boot, library, running):
    names = [f"{library}:{s}" for s in ("add", "keep", "set", "none", "text")]
    cluster = boot(2, idle="halt", handlers=names)
    add, keep, put, none, text = map(smp.NativeHandler, names)
    n = cluster.shared("lib", "i8", 2)
    single = cluster.smp.smp_call_function_single
    single(1, add, n)
    cluster.smp.on_each_cpu(add, n)
    assert n[0] == 15
    single(1, keep, n[1:])
    single(1, put, -(2**62))
    assert n[1] == -(2**62)
    single(1, none)
    assert n[1] == -1
    single(1, text, b"\1\0\0\0\0\0\0\1")
    assert n[1] == (1 << 56) + 1
    task = running(spin, cluster)
    single(1, add, n)
    assert n[0] == 20
    cluster.shared("running", "i8", 2)[1] = 1
    task.end()


def test_a_library_without_the_symbol(boot, library):
    with pytest.raises(BootError, match="nix"):
        boot(1, handlers=[f"{library}:nix"])
