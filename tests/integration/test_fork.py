"""A host that forks does not own the machine in the child; a task that forks makes no
second CPU."""

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import psutil
import pytest

import shmipi
from shmipi import smp
from shmipi.names import DOORBELLS

SCRIPT = """
import os, sys, warnings
from shmipi import Cluster, ClusterStateError, NoMachineError, smp
import shmipi

warnings.simplefilter("ignore")
cluster = Cluster(2, idle="halt", doorbell={doorbell!r})
array = cluster.shared("a", "i8", 4)
csd = cluster.smp.CallSingleData(id)
assert cluster.call(1, abs, -1) == 1
pid = os.fork()
if pid == 0:
    for call in (
        lambda: cluster.call(1, int),
        lambda: cluster.submit(1, int),
        lambda: cluster.run(int),
        lambda: cluster.online(1),
        lambda: cluster.offline(1),
        lambda: cluster.cpus,
        lambda: cluster.shared("b", "i8"),
        lambda: cluster.counters(),
        lambda: cluster.smp.smp_call_function_single(1, id),
        lambda: cluster.smp.smp_call_function_single_async(1, csd),
        lambda: cluster.smp.CallSingleData(id),
        lambda: cluster.__enter__(),
    ):
        try:
            call()
            print("no error", call)
        except ClusterStateError as error:
            if "fork" not in str(error):
                print("unclear", error)
    try:
        smp.smp_call_function_single(1, id)
    except NoMachineError:
        print("child: no machine")
    print("child: closed", cluster.closed)
    array[0] = 7
    cluster.shutdown()
    {child}
    del cluster, csd
    {end}
os.waitpid(pid, 0)
print("parent:", cluster.call(1, abs, -2), cluster.run(smp.smp_processor_id), array[0])
cluster.smp.smp_call_function_single_async(1, csd)
cluster.shutdown()
"""
PARENT = "parent: 2 [0, 1] 7\n"


@pytest.mark.parametrize("doorbell", [bell for bell in DOORBELLS if bell != "signal"])
def test_fork_in_the_host(script, doorbell):
    """Both ways in which the child ends; they do not wait for each other."""
    hosts = {
        end: script(SCRIPT.format(end=end, child="pass", doorbell=doorbell), wait=False)
        for end in ("sys.stdout.flush(); os._exit(0)", "sys.exit(0)")
    }
    for end, host in hosts.items():
        text, _ = host.communicate(timeout=30)
        assert host.returncode == 0, (end, text)
        expected = "child: no machine\nchild: closed True\n" + PARENT
        assert text == expected, end


def test_a_child_of_the_host_may_make_a_machine_of_its_own(script):
    child = """
    with Cluster(2, idle="halt") as own:
        print("child:", own.call(1, abs, -5), own.run(smp.smp_processor_id))
        smp.on_each_cpu(id)
    """
    done = script(
        SCRIPT.format(end="sys.exit(0)", child=child.strip(), doorbell="futex"),
    )
    assert "child: 5 [0, 1]\n" in done.text
    assert done.text.endswith(PARENT)


def test_a_child_that_outlives_the_host_keeps_no_machine(boot, eventually):
    cluster = boot(1, idle="halt")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pid = os.fork()
    if pid == 0:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        time.sleep(20)
        os._exit(0)
    try:
        start = time.monotonic()
        cluster.shutdown()
        assert time.monotonic() - start < 2
        from shmipi.machine import segment

        assert cluster.name not in {m.name for m in segment.find()}
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


FORK_IN_A_WAIT = """
import ctypes, os, signal, sys, time, warnings
import shmipi
from shmipi import Cluster, smp

warnings.simplefilter("ignore")


def until_forked(_=None):
    forks = shmipi.shared("forks")
    end = time.monotonic() + 5
    while not forks[0] and time.monotonic() < end:
        time.sleep(0.002)
    time.sleep(0.05)


def slow_bytes(n):
    until_forked()
    return bytes(n)


def answers(call, fork):
    # What `call` gives this process, and a child that a signal's handler forks in its
    # wait. One child: the flag is set before the fork, the timer rings once, and who is
    # not the process that set it up does not fork.
    me, forked, pids = os.getpid(), [], []
    fork = os.fork if fork == "python" else ctypes.PyDLL(None).fork
    r, w = os.pipe()

    def fork_once(*_):
        if forked or os.getpid() != me:
            return
        forked.append(True)
        pids.append(fork())
        if os.getpid() == me:
            shmipi.shared("forks")[0] = 1
        else:
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
            signal.alarm(5)  # whatever it waits for, it ends

    before = signal.signal(signal.SIGALRM, fork_once)
    signal.setitimer(signal.ITIMER_REAL, 0.05)
    try:
        answer = str(call())
    except Exception as error:
        answer = f"{type(error).__name__}: {error}"
    if os.getpid() != me:
        os.write(w, answer.encode())
        os._exit(0)
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, before)
    os.close(w)
    child = os.read(r, 1000).decode()
    os.close(r)
    for pid in pids:
        os.waitpid(pid, 0)
    return len(pids), answer, child


def report(what, found):
    forks, parent, child = found
    told = "fork's child" in child and child.startswith("ClusterStateError")
    print(what, forks, parent, "told" if told else child, flush=True)


def waits(how, fork):
    if how == "call":
        return answers(lambda: smp.smp_call_function_single(1, until_forked), fork)
    return answers(lambda: smp.wait_for_interrupt(timeout=5), fork)


if __name__ == "__main__":
    fork = sys.argv[1]
    with Cluster(2, idle="halt") as cluster:
        forks = cluster.shared("forks", "i8", 1)
        for what, call in (
            ("host large", lambda: len(cluster.call(1, slow_bytes, 100_000))),
            ("host many", lambda: cluster.smp.on_each_cpu(until_forked)),
            ("host run", lambda: cluster.run(slow_bytes, 3, cpus=[1])),
        ):
            forks[0] = 0
            report(what, answers(call, fork))
        for how in ("call", "wait_for_interrupt"):
            pid, forks[0] = cluster.cpus[0].pid, 0
            tasks = cluster.start(waits, how, fork, cpus=[0])
            while not tasks.wait(0.03):
                if forks[0]:  # a signal that comes while an IPI is served is put off
                    assert cluster.call(0, os.getpid, timeout=5) == pid
            report("task " + how, tasks.results(5)[0])
        print(len(cluster.call(1, bytes, 100_000)), cluster.run(smp.smp_processor_id))
        print(cluster.counters()["corrupt"].sum())
"""


@pytest.mark.parametrize("fork", ["python", "c"])
def test_a_handler_forks_in_a_wait(script, fork):
    """The wait is the parent's: its child neither takes the answer nor gives it back,
    nor serves the CPU's queue, nor says what the CPU is doing."""
    assert script(FORK_IN_A_WAIT, fork, timeout=20).text.splitlines() == [
        "host large 1 100000 told",
        "host many 1 None told",
        "host run 1 [b'\\x00\\x00\\x00'] told",
        "task call 1 None told",
        "task wait_for_interrupt 1 True told",
        "100000 [0, 1]",
        "0",
    ]


# ---- in a task -----------------------------------------------------------------------


def test_a_task_that_forks_makes_no_second_cpu(cluster):
    def task():
        r, w = os.pipe()
        pid = os.fork()
        if pid == 0:
            answers = []
            for call in (
                smp.smp_processor_id,
                lambda: smp.smp_call_function_single(0, id),
                smp.local_irq_disable,
                lambda: smp.CallSingleData(id),
            ):
                try:
                    call()
                    answers.append("no error")
                except shmipi.NoMachineError:
                    answers.append("none")
            os.write(w, " ".join(answers).encode())
            os._exit(0)
        os.close(w)
        text = b""
        while part := os.read(r, 1000):
            text += part
        os.close(r)
        os.waitpid(pid, 0)
        return text.decode(), smp.smp_processor_id()

    for _ in range(3):
        assert cluster.run(task) == [("none none none none", n) for n in range(3)]
    assert cluster.call(1, smp.smp_processor_id) == 1


@pytest.mark.parametrize("how", ["python", "c"])
def test_a_child_that_returns_from_the_task_is_no_cpu_either(boot, eventually, how):
    """It must not answer in its parent's name, nor enter the idle loop."""
    cluster = boot(2, idle="halt")
    pids = cluster.shared("pids", "i8", 2)

    def task():
        parent = os.getpid()
        pid = os.fork() if how == "python" else ctypes.PyDLL(None).fork()
        if pid == 0:
            pids[0] = os.getpid()
            return "child"
        pids[1] = pid
        time.sleep(0.3)  # the child would be first
        return "parent", os.getpid() == parent

    assert cluster.run(task, cpus=[1]) == [("parent", True)]
    assert cluster.run(smp.smp_processor_id) == [0, 1]

    def reap(pid):
        return os.waitpid(pid, os.WNOHANG)[0]

    # The child has ended: it is not in somebody's idle loop.
    eventually(lambda: cluster.call(1, reap, int(pids[1])) == pids[1])
    assert cluster.call(1, os.getpid) == cluster.cpus[1].pid


def test_a_child_that_returns_from_a_native_handler_is_no_cpu_either(boot, eventually):
    maps = psutil.Process().memory_maps()
    libc = next(m.path for m in maps if os.path.basename(m.path).startswith("libc."))
    cluster = boot(2, idle="halt", handlers=[f"{libc}:fork"])
    fork, count = smp.NativeHandler(f"{libc}:fork"), smp.NativeHandler("count")
    n = cluster.shared("n", "i8", 1)
    cluster.call(0, fork)  # which has run no Python
    cluster.smp.smp_call_function_single(1, fork, None, False)
    cluster.call(1, smp.smp_processor_id)
    cluster.call(1, fork)

    def states(cpu):
        children = psutil.Process(cluster.cpus[cpu].pid).children()
        return [child.status() for child in children]

    eventually(lambda: [states(0), states(1)] == [["zombie"], ["zombie"] * 2])
    for _ in range(100):
        cluster.smp.on_each_cpu(count, n)
    assert n[0] == 200
    assert cluster.run(os.getpid) == [cpu.pid for cpu in cluster.cpus]


def test_a_child_that_c_code_forked_touches_nothing_of_its_parents(boot):
    """Python has not heard of it there: every call is refused, what it lets go of
    (functions, csds) stays its parent's, and it does not say what the CPU is doing."""
    cluster = boot(2, idle="halt")
    said = cluster.shared("said", "i8", 2)

    def echo(value):
        return value

    def task():
        here, there = shmipi.shared("said"), [lambda value: value]
        csds = [smp.CallSingleData(echo, 5)]
        smp.smp_call_function_single(1, there[0], 1)
        r, w = os.pipe()
        pid = ctypes.PyDLL(None).fork()
        if pid == 0:
            answers = []
            for call in (
                smp.smp_processor_id,
                lambda: smp.smp_call_function_single(1, echo, 1),
                lambda: smp.smp_call_function_single_async(1, csds[0]),
                lambda: smp.on_each_cpu(echo, 1),
                lambda: smp.wait_for_interrupt(timeout=0.01),
                lambda: smp.smp_send_reschedule(1),
            ):
                try:
                    answers.append(f"no error {call()}")
                except shmipi.ClusterStateError as error:
                    answers.append("fork's child" in str(error) and "told")
            there.clear()
            csds.clear()
            os.write(w, repr(answers).encode())
            os._exit(0)
        os.close(w)
        text = b""
        while part := os.read(r, 1000):
            text += part
        os.close(r)
        os.waitpid(pid, 0)
        here[0] = 1
        while not here[1]:
            pass
        smp.smp_call_function_single(1, there[0], 1)
        smp.smp_call_function_single_async(1, csds[0])
        return text.decode()

    tasks = cluster.start(task, cpus=[0])
    deadline = time.monotonic() + 5
    while not said[0] and time.monotonic() < deadline:
        time.sleep(0.01)
    assert cluster.cpus[0].state == "running"
    said[1] = 1
    assert tasks.results(5) == [repr(["told"] * 6)]
    assert not cluster.counters()["corrupt"].any()


def test_a_kick_to_a_forked_child_is_harmless(cluster, eventually):
    kick = cluster._machine.kick_signal

    def task():
        pid = os.fork()
        if pid == 0:
            time.sleep(0.2)
            os._exit(7)
        time.sleep(0.05)
        os.kill(pid, kick)
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

    assert cluster.run(task, cpus=[1]) == [7]


def test_a_task_that_starts_a_program(cluster):
    def task():
        done = subprocess.run(
            [sys.executable, "-c", "print(6 * 7)"], capture_output=True, check=True
        )
        return done.stdout

    assert cluster.run(task) == [b"42\n"] * 3


def test_a_program_that_outlives_the_machine_does_not_hold_it(boot, eventually):
    """It inherits no descriptor of the segment: the machine is not kept alive by it."""
    cluster = boot(1, idle="halt", name=f"outlived{os.getpid()}")

    def task():
        return subprocess.Popen(
            ["sleep", "20"], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL
        ).pid

    (pid,) = cluster.run(task)
    targets = []
    try:
        for fd in os.listdir(f"/proc/{pid}/fd"):
            # It may be loading its libraries yet, and close one of them meanwhile.
            with contextlib.suppress(FileNotFoundError):
                targets.append(os.readlink(f"/proc/{pid}/fd/{fd}"))
        assert not [t for t in targets if "shmipi" in t or "eventfd" in t]
        cluster.shutdown()
    finally:
        os.kill(pid, signal.SIGKILL)

    def ended():  # whose child it is by now may take its time to wait for it
        try:
            stat = Path(f"/proc/{pid}/stat").read_text()
        except (FileNotFoundError, ProcessLookupError):
            return True
        return stat.rpartition(")")[2].split()[0] in "ZX"

    eventually(ended)
