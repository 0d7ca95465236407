"""A host that forks does not own the machine in the child; a task that forks makes no
second CPU."""

import os
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

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


def test_a_child_that_returns_from_the_task_is_no_cpu_either(boot, eventually):
    """It must not answer in its parent's name, nor enter the idle loop."""
    cluster = boot(2, idle="halt")
    pids = cluster.shared("pids", "i8", 2)

    def task():
        parent = os.getpid()
        pid = os.fork()
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
    eventually(lambda: cluster.call(1, reap, int(pids[1])) == pids[1], 3)
    assert cluster.call(1, os.getpid) == cluster.cpus[1].pid


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
    try:
        targets = [
            os.readlink(f"/proc/{pid}/fd/{fd}") for fd in os.listdir(f"/proc/{pid}/fd")
        ]
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
