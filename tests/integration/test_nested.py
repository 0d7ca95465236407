"""A machine that a task of another machine boots: each stays what it is."""

import os
import signal
import time

import psutil
import pytest

import shmipi
from shmipi import (
    Cluster,
    ClusterStateError,
    CpuDiedError,
    MachineDiedError,
    RemoteCallError,
    atomic,
    smp,
)
from shmipi.names import DOORBELLS

# The names of the machines that tasks boot: of none is anything left.
NAME = f"inner{os.getpid()}"


def same(value):
    return value


def who():
    return smp.smp_processor_id(), smp.in_task(), smp.irqs_disabled()


@pytest.fixture
def inner(eventually):
    """What is left of machines that tasks booted, which no leak check knows."""
    yield
    eventually(lambda: not [x for x in os.listdir("/dev/shm") if f".{NAME}" in x], 5)


@pytest.mark.parametrize("doorbell", DOORBELLS)
def test_a_task_boots_a_machine(boot, eventually, inner, doorbell):
    """It is a CPU of the one and host of the other, before, in, and after."""
    cluster = boot(3, idle="halt", doorbell=doorbell)
    level = cluster.shared("level", "i8", 1)
    seen = cluster.percpu("seen", "i8")

    def task():
        before = who()
        with Cluster(2, idle="halt", doorbell=doorbell, name=NAME) as own:
            deep = own.shared("level", "i8", 1)

            def work(n):
                atomic.fetch_add(shmipi.shared("level"), 0, n)  # both CPUs at once
                return smp.smp_processor_id()

            # Module-level names are the machine's that this is a CPU of ...
            shmipi.percpu("seen")[smp.smp_processor_id()] += 1
            smp.smp_call_function_single(0, same, None, True)
            # ... and the cluster's own are its own.
            numbers = own.run(work, 5), own.call(1, work, 1)
            own.smp.on_each_cpu(same)
            try:
                own.smp.smp_processor_id()
                errors = "none"
            except ClusterStateError as error:
                errors = str(error)
            inside = who()
            level[0] = 1
            while level[0] == 1:  # interrupted here by the host
                time.sleep(0.001)
            total = int(deep[0])
        return before, inside, who(), numbers, total, "host is no CPU" in errors

    tasks = cluster.start(task, cpus=[1])
    eventually(lambda: level[0] == 1, 20)
    try:
        assert cluster.call(1, who, timeout=5) == (1, False, True)
        assert cluster.submit(1, os.getpid).result(5) == cluster.cpus[1].pid
        cluster.smp.smp_call_function_single(1, same, None, True)
    finally:
        level[0] = 2
    (task,) = tasks
    state = (1, True, False)
    assert task.result(20) == (state, state, state, ([0, 1], 1), 11, True)
    assert seen.tolist() == [0, 1, 0]
    assert cluster.run(who) == [(n, True, False) for n in range(3)]
    assert cluster.call(1, os.getpid) == cluster.cpus[1].pid


def test_machines_side_by_side_and_one_in_another(boot, inner):
    cluster = boot(2, idle="halt")

    def leaf(name):
        with Cluster(1, idle="halt", name=name) as own:
            return own.call(0, who), who()

    def task():
        me = smp.smp_processor_id()
        names = [f"{NAME}-{me}{n}" for n in "ab"]
        with (
            Cluster(2, idle="halt", name=names[0]) as one,
            Cluster(1, idle="halt", name=names[1]) as two,
        ):
            both = one.call(1, who), two.call(0, who)
            deeper = one.run(leaf, f"{NAME}-{me}c", cpus=[1])
            one.shutdown()
            both += (two.call(0, who), who())
        return both, deeper, who()

    for cpu, (both, deeper, after) in enumerate(cluster.run(task)):
        handler, running = (0, False, True), (cpu, True, False)
        assert both == ((1, False, True), handler, handler, running)
        assert deeper == [(handler, (1, True, False))]
        assert after == running


def test_the_inner_machine_dies(boot, inner):
    """Its death is its own: the CPU that booted it goes on."""
    cluster = boot(2, idle="halt")

    def task():
        with Cluster(2, idle="halt", name=NAME) as own:
            os.kill(own._machine.firmware_pid, signal.SIGKILL)
            try:
                own.call(1, time.sleep, 10)
                return "no error"
            except MachineDiedError:
                pass
        return who()

    assert cluster.run(task, cpus=[1]) == [(1, True, False)]
    assert cluster.call(1, who) == (1, False, True)
    assert cluster.run(who) == [(0, True, False), (1, True, False)]


@pytest.mark.parametrize("end", ["killed", "shutdown", "returned"])
def test_the_cpu_that_booted_a_machine_ends(boot, eventually, inner, end):
    """Killed, or stopped with its own machine: what its task booted ends, too."""
    cluster = boot(2, idle="halt")
    pids = cluster.shared("pids", "i8", 3)

    def task(stays):
        own = Cluster(2, idle="halt", name=NAME)
        pids[1:] = [cpu.pid for cpu in own.cpus]
        pids[0] = own._machine.firmware_pid
        if stays:
            time.sleep(60)
        shmipi.kept_by_the_test = own  # left open, and referred to
        return who()

    if end == "returned":
        assert cluster.run(task, False, cpus=[1]) == [(1, True, False)]
        assert cluster.call(1, who) == (1, False, True)
        assert cluster.run(who) == [(0, True, False), (1, True, False)]
        assert all(map(psutil.pid_exists, pids.tolist()))
        cluster.shutdown()
    else:
        (running,) = cluster.start(task, True, cpus=[1])
        eventually(lambda: pids[0], 20)
        if end == "killed":
            os.kill(cluster.cpus[1].pid, signal.SIGKILL)
            with pytest.raises(CpuDiedError):
                running.result(5)
            cluster.online(1)
            assert cluster.call(1, who) == (1, False, True)
        else:
            cluster.shutdown()
    eventually(lambda: not any(map(psutil.pid_exists, pids.tolist())), 10)


@pytest.mark.parametrize("way", ["call", "submit", "single", "in a task"])
def test_a_handler_cannot_boot_a_machine(boot, background, way):
    cluster = boot(2, idle="halt")

    def handler(info=None):
        Cluster(2, name=NAME)

    if way == "in a task":
        cluster.start(time.sleep, 1, cpus=[1])
    ways = {
        "call": lambda: cluster.call(1, handler),
        "submit": lambda: cluster.submit(1, handler).result(10),
        "single": lambda: cluster.smp.smp_call_function_single(1, handler, None, True),
        "in a task": lambda: cluster.call(1, handler),
    }
    with pytest.raises(RemoteCallError, match=r"in a task \(cluster.run\)") as caught:
        ways[way]()
    assert type(caught.value.__cause__) is ClusterStateError
    assert not [x for x in os.listdir("/dev/shm") if f".{NAME}" in x]
    assert cluster.call(1, who) == (1, False, True)
