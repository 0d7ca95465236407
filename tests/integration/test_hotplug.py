"""cluster.offline and cluster.online: in order, and nothing is lost."""

import os
import time

import pytest

import shmipi
from shmipi import CpuOfflineError, IpiTimeoutError, smp
from shmipi.names import DOORBELLS


def test_offline_parks_and_online_brings_back(boot):
    cluster = boot(3, idle="halt")
    before = cluster.cpus[1]
    assert cluster.offline(1) is None
    assert cluster.cpus[1].state == "offline"
    assert cluster.cpus[1].pid == before.pid
    assert str(cluster.online_mask) == "0,2"
    with pytest.raises(CpuOfflineError, match=r"cluster\.online\(1\)"):
        cluster.call(1, int)
    assert cluster.run(smp.smp_processor_id) == [0, 2]
    cluster.smp.on_each_cpu(id)
    cluster.offline(1)  # is offline already
    cluster.online(1)
    cluster.online(1)  # is online already
    assert (cluster.cpus[1].pid, cluster.cpus[1].generation) == (before.pid, 1)
    assert cluster.run(smp.smp_processor_id) == [0, 1, 2]
    assert str(cluster.online_mask) == "0-2"


@pytest.mark.parametrize("idle", ["poll", "haltpoll", "halt"])
@pytest.mark.parametrize("doorbell", DOORBELLS)
def test_again_and_again(boot, idle, doorbell):
    cluster = boot(2, idle=idle, doorbell=doorbell)
    for n in range(10):
        cluster.offline(1, timeout=5)
        cluster.online(1, timeout=5)
        assert cluster.call(1, abs, -n, timeout=5) == n


def test_whatever_was_queued_has_run(boot, background, eventually):
    cluster = boot(2, idle="halt")
    log = cluster.shared("log", "i8", 2)

    def hold():
        log[1] = 1
        time.sleep(0.2)

    def note(_):
        log[0] += 1

    future = cluster.submit(1, hold)
    eventually(lambda: log[1])
    for _ in range(40):
        cluster.smp.smp_call_function_single(1, note, wait=False)
    thread = background(cluster.offline, 1)
    thread.end()
    assert log[0] == 40
    future.result(5)
    cluster.online(1)
    assert log[0] == 40


def test_under_fire_every_call_runs_or_is_refused(boot, background):
    cluster = boot(3, idle="halt")
    n = cluster.shared("n", "i8", 1)
    stop = cluster.shared("stop", "i8", 1)

    def sender():
        ran = refused = 0
        while not stop[0]:
            try:
                smp.smp_call_function_single(1, smp.NativeHandler("count"), n)
                ran += 1
            except CpuOfflineError:
                refused += 1
        return ran, refused

    thread = background(lambda: cluster.run(sender, cpus=[0, 2]))
    end = time.monotonic() + 1.0
    while time.monotonic() < end:
        cluster.offline(1, timeout=5)
        time.sleep(0.002)
        cluster.online(1, timeout=5)
        time.sleep(0.002)
    stop[0] = 1
    results = thread.end()
    assert sum(ran for ran, _ in results) == n[0] > 0
    assert sum(refused for _, refused in results) > 0


def test_a_running_task_stops_where_it_stands(boot, background, eventually):
    cluster = boot(2, idle="halt")
    n = cluster.shared("n", "i8", 2)

    def task():
        while not n[1]:
            n[0] += 1
        return "ended"

    thread = background(lambda: cluster.run(task, cpus=[1]))
    eventually(lambda: n[0])
    cluster.offline(1, timeout=5)
    at = int(n[0])
    time.sleep(0.05)
    assert n[0] == at
    with pytest.raises(CpuOfflineError):
        cluster.call(1, int)
    cluster.online(1, timeout=5)
    eventually(lambda: n[0] > at)
    assert cluster.call(1, abs, -3, timeout=5) == 3
    n[1] = 1
    assert thread.end() == ["ended"]


def test_a_timeout_withdraws_the_request(boot, background, eventually):
    cluster = boot(2, idle="halt")
    n = cluster.shared("n", "i8", 2)

    def task():
        smp.local_irq_disable()
        n[0] = 1
        while not n[1]:
            pass
        smp.local_irq_enable()
        return smp.smp_processor_id()

    thread = background(lambda: cluster.run(task, cpus=[1]))
    eventually(lambda: n[0])
    with pytest.raises(IpiTimeoutError, match="interrupts disabled"):
        cluster.offline(1, timeout=0.1)
    n[1] = 1
    assert thread.end() == [1]
    time.sleep(0.05)
    assert cluster.call(1, abs, -3, timeout=5) == 3
    assert str(cluster.online_mask) == "0-1"


def test_all_cpus_offline(boot):
    cluster = boot(2, idle="halt")
    cluster.offline(0)
    cluster.offline(1)
    assert not cluster.online_mask
    with pytest.raises(CpuOfflineError, match="CPU 0 is offline"):
        cluster.run(int)
    cluster.smp.on_each_cpu(id)  # nobody
    cluster.online(1)
    assert cluster.run(smp.smp_processor_id) == [1]


def test_a_parked_cpu_that_is_killed(boot, eventually):
    cluster = boot(2, idle="halt")
    cluster.offline(1)
    os.kill(cluster.cpus[1].pid, 9)
    eventually(lambda: cluster.cpus[1].state == "dead")
    cluster.online(1)
    assert cluster.cpus[1].generation == 2
    assert cluster.call(1, smp.smp_processor_id) == 1


def test_the_machine_ends_with_cpus_parked(boot):
    cluster = boot(3, idle="halt")
    cluster.offline(0)
    cluster.offline(2)
    start = time.monotonic()
    cluster.shutdown()
    assert time.monotonic() - start < 1.5


@pytest.mark.parametrize("cpu", [-1, 2, 4096, 10**20])
def test_cpus_that_do_not_exist(cluster, cpu):
    cpu = 3 if cpu == 2 else cpu
    for call in (cluster.offline, cluster.online):
        with pytest.raises(CpuOfflineError, match="does not exist"):
            call(cpu)


def test_threads_at_once(boot, background):
    cluster = boot(3, idle="halt")

    def flip(cpu):
        for _ in range(15):
            cluster.offline(cpu, timeout=10)
            cluster.online(cpu, timeout=10)

    threads = [background(flip, cpu) for cpu in (0, 1, 2, 1)]
    for thread in threads:
        thread.end(30)
    assert cluster.run(smp.smp_processor_id) == [0, 1, 2]
    assert shmipi.CpuMask("0-2") == cluster.online_mask
