"""cluster.offline and cluster.online: in order, and nothing is lost."""

import errno
import os
import signal
import time
from pathlib import Path

import pytest

import shmipi
from shmipi import CpuOfflineError, HotplugError, IpiTimeoutError, _core, smp
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
    """Proves row 58."""
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


def test_what_comes_in_the_stop_has_run_when_it_is_offline(
    cluster_with_steps, background, eventually
):
    """smpcfd_dying_cpu(): its queue, with interrupts off, waiting for no doorbell.

    The host is not stopped with the CPUs: it calls when the CPU is about to go. Row 58.
    """
    cluster, core = cluster_with_steps, cluster_with_steps._machine
    count = cluster.shared("count in the stop", "i8", 1)
    count[0] = 0
    handler = smp.NativeHandler("count")
    core.arm_step(1, "multi_run", _core.STEP_STOP)
    pid = cluster.cpus[1].pid
    takedown = background(cluster.offline, 1)
    eventually(lambda: core.step_hit(1) == "multi_run")
    eventually(lambda: Path(f"/proc/{pid}/stat").read_text().split()[2] == "T")
    for _ in range(4):
        cluster.smp.smp_call_function_single(1, handler, count, False)
    assert core.cpus_peek_for_pending_ipi("1")
    os.kill(pid, signal.SIGCONT)
    takedown.end(5)
    assert count[0] == 4
    assert cluster.cpus[1].state == "offline"
    cluster.online(1)


def test_under_fire_every_call_runs_or_is_refused(boot, background):
    """Proves rows 60 and 63: what is taken is run, by one that comes up, too."""
    cluster = boot(3, idle="halt")
    n = cluster.shared("n", "i8", 1)
    stop = cluster.shared("stop", "i8", 1)
    heard = cluster.percpu("heard", "i8")

    def sender():
        ran = refused = 0
        while not stop[0]:
            try:
                smp.smp_call_function_single(1, smp.NativeHandler("count"), n)
                ran += 1
            except CpuOfflineError:
                refused += 1
                heard[smp.smp_processor_id()] = refused
        return ran, refused

    thread = background(lambda: cluster.run(sender, cpus=[0, 2]))
    start = time.monotonic()
    while (took := time.monotonic() - start) < 1.0 or (
        took < 30 and not (n[0] and heard.any())
    ):
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


def test_the_last_cpu_stays(boot, eventually):
    """_cpu_down: -EBUSY.  Killed, it is gone nevertheless, and nobody is left."""
    cluster = boot(2, idle="halt")
    cluster.offline(0)
    with pytest.raises(HotplugError, match="the last one") as caught:
        cluster.offline(1)
    assert (caught.value.errno, caught.value.cpu) == (errno.EBUSY, 1)
    assert cluster.run(smp.smp_processor_id) == [1]
    os.kill(cluster.cpus[1].pid, 9)
    eventually(lambda: cluster.cpus[1].state == "dead")
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


# ---- what holds it off ---------------------------------------------------------------


@pytest.mark.parametrize(
    "inside",
    ["spins", "blocks", "waits for an interrupt", "waits for an answer", "handlers"],
)
def test_a_section_with_preemption_disabled_holds_the_takedown_off(
    cluster, background, eventually, inside
):
    """kernel/cpu.c, takedown_cpu: the stopper does not run in it.

    Proves row 60.
    """
    n = cluster.shared("section", "i8", 3)
    n[:] = 0

    def task():
        smp.preempt_disable()
        me = smp.get_cpu()  # they nest
        n[0] = 1
        while not n[1]:
            if inside == "blocks":
                time.sleep(0.001)
            elif inside == "waits for an interrupt":
                smp.wait_for_interrupt(0.005)
            elif inside == "waits for an answer":
                smp.smp_call_function_single(0, time.sleep, 0.001)
            smp.cond_resched()
        smp.put_cpu()
        n[2] = smp.cpu_online(me)  # still inside
        smp.preempt_enable()
        return me

    tasks = cluster.start(task, cpus=[1])
    eventually(lambda: n[0])
    thread = background(cluster.offline, 1)
    end = time.monotonic() + 0.15
    while time.monotonic() < end:
        assert cluster.smp.cpu_online(1)
        if inside == "handlers":  # a handler's end is no end of the section
            assert cluster.call(1, smp.smp_processor_id) == 1
        time.sleep(0.002)
    with pytest.raises(IpiTimeoutError):
        cluster.offline(1, timeout=0.01)  # one change at a time: nor has the first
    n[1] = 1
    thread.end()
    assert not cluster.smp.cpu_online(1)
    cluster.online(1)
    assert tasks.results(5) == [1]
    assert n[2] == 1


def test_a_task_that_ends_inside_the_section_holds_nothing_off(cluster):
    cluster.run(smp.preempt_disable, cpus=[1])
    cluster.offline(1, timeout=5)
    cluster.online(1)
    with pytest.raises(shmipi.RemoteCallError, match="without preempt_disable"):
        cluster.run(smp.put_cpu, cpus=[1])


def test_cpus_read_lock_holds_hotplug_off(cluster, background, eventually):
    """From the host and from a task; readers do not keep each other out."""
    n = cluster.shared("readers", "i8", 2)
    n[:] = 0

    def task():
        smp.cpus_read_lock()
        smp.cpus_read_lock()  # once more, also with a writer that waits
        n[0] = 1
        while not n[1]:
            time.sleep(0.001)
        smp.cpus_read_unlock()
        online = str(smp.cpu_online_mask)
        smp.cpus_read_unlock()
        return online

    cluster.smp.cpus_read_lock()
    tasks = cluster.start(task, cpus=[1])
    eventually(lambda: n[0])
    cluster.smp.cpus_read_unlock()
    for change in (cluster.offline, cluster.online):
        with pytest.raises(IpiTimeoutError, match=r"CPU 1 holds cpus_read_lock"):
            change(2, timeout=0.05)
    thread = background(cluster.offline, 2)
    time.sleep(0.05)
    assert cluster.smp.cpu_online(2)
    n[1] = 1
    assert tasks.results(5) == ["0-2"]
    thread.end()
    assert str(cluster.smp.cpu_online_mask) == "0-1"
    cluster.online(2)
    with pytest.raises(shmipi.ClusterStateError, match="without cpus_read_lock"):
        cluster.smp.cpus_read_unlock()
    with pytest.raises(shmipi.RemoteCallError, match="may have to wait"):
        cluster.call(1, smp.cpus_read_lock)


def test_who_dies_or_ends_with_cpus_read_lock_held_loses_it(cluster, eventually):
    def task():
        smp.cpus_read_lock()
        os.kill(os.getpid(), 9)

    with pytest.raises(shmipi.CpuDiedError):
        cluster.run(task, cpus=[1])
    eventually(lambda: cluster.cpus[1].state == "dead")
    cluster.online(1, timeout=5)
    cluster.run(smp.cpus_read_lock, cpus=[1])
    cluster.offline(2, timeout=5)
    cluster.online(2, timeout=5)


def test_readers_and_hotplug_under_fire(cluster, background):
    """Inside the lock nothing changes, whoever holds it; and both sides get on."""
    rounds = cluster.shared("rounds", "i8", 3)
    rounds[:] = 0

    def reader():
        while not rounds[2]:
            smp.cpus_read_lock()
            seen = smp.cpu_online_mask
            for _ in range(20):
                assert smp.cpu_online_mask == seen
            smp.cpus_read_unlock()
            rounds[smp.smp_processor_id()] += 1

    thread = background(lambda: cluster.run(reader, cpus=[0, 1]))
    changes, end = 0, time.monotonic() + 20
    while changes < 20 or min(rounds[:2]) < 20:
        assert time.monotonic() < end, (changes, rounds)
        cluster.offline(2, timeout=10)
        cluster.online(2, timeout=10)
        changes += 2
        time.sleep(0.001)
    rounds[2] = 1
    thread.end(10)
