"""NMIs: what they come through, what collapses, and who waits for them."""

import os
import signal
import time

import pytest

import shmipi
from shmipi import Cluster, CpuOfflineError, IrqError, atomic, smp
from shmipi.names import DOORBELLS

NMI_S = 5_000_000  # us: far more than any of this takes


def note(regs):
    cpu = smp.smp_processor_id()
    seen = shmipi.shared("seen")
    seen[cpu, 1] = smp.in_nmi()
    seen[cpu, 2] = smp.in_interrupt() and not smp.in_task()
    atomic.fetch_add(seen, (cpu, 0), 1)


def spin_masked(seconds):
    """Spin with interrupts off until told to stop; True if it was told in time."""
    smp.local_irq_disable()
    told = spin(seconds)
    smp.local_irq_enable()
    return told


def spin(seconds):
    go = shmipi.shared("go")
    go[0] = 1
    end = time.monotonic() + seconds
    while not go[1] and time.monotonic() < end:
        pass
    return bool(go[1])


class Rig:
    def __init__(self, cluster):
        self.cluster = cluster
        self.seen = cluster.shared("seen", "i8", (4, 3))
        self.go = cluster.shared("go", "i8", 2)


@pytest.fixture
def rig(boot):
    return lambda **options: Rig(boot(3, **{"idle": "halt", **options}))


@pytest.mark.parametrize("doorbell", DOORBELLS)
def test_all_others_whatever_they_sleep_on(rig, doorbell):
    found = rig(doorbell=doorbell)
    send = found.cluster.smp.smp_send_nmi_ipi
    assert send(smp.NMI_IPI_ALL_OTHERS, note, NMI_S) == 1
    found.cluster.run(int)  # every handler has returned
    assert found.seen[:3].tolist() == [[1, 1, 1]] * 3
    assert found.cluster.counters()["nmi"].tolist() == [1, 1, 1]


def test_from_a_cpu_to_all_others_and_not_to_itself(rig):
    found = rig()

    def task():
        with pytest.raises(IrqError, match="CPU 1 can not send"):
            smp.smp_send_nmi_ipi(1, note)
        return smp.smp_send_nmi_ipi(smp.NMI_IPI_ALL_OTHERS, note, NMI_S)

    assert found.cluster.run(task, cpus=[1]) == [1]
    found.cluster.run(int)
    assert found.seen[:3, 0].tolist() == [1, 0, 1]


@pytest.mark.parametrize("handler", ["python", "native"])
def test_comes_through_disabled_interrupts(rig, background, eventually, handler):
    """Proves row 50."""
    found = rig()
    counted = found.cluster.shared("counted", "i8", 1)
    thread = background(lambda: found.cluster.run(spin_masked, 20.0, cpus=[0]))
    eventually(lambda: found.go[0])
    sent = (
        found.cluster.smp.smp_send_nmi_ipi(0, note, NMI_S)
        if handler == "python"
        else found.cluster.smp.smp_send_nmi_ipi(
            0, smp.NativeHandler("count"), NMI_S, counted
        )
    )
    assert sent == 1
    eventually(lambda: found.seen[0, 0] + counted[0] == 1)
    found.go[1] = 1
    assert all(thread.end(30))


def test_comes_in_the_middle_of_an_ipi_handler(rig, background, eventually):
    found = rig()

    def handler():
        spin(20.0)
        return int(shmipi.shared("seen")[1, 0])

    thread = background(found.cluster.call, 1, handler)
    eventually(lambda: found.go[0])
    assert found.cluster.smp.smp_send_nmi_ipi(1, note, NMI_S) == 1
    eventually(lambda: found.seen[1, 0] == 1)
    found.go[1] = 1
    assert thread.end(30) == 1


@pytest.mark.parametrize("controller", ["mips", "riscv"])
def test_maskable_where_there_is_none(rig, background, eventually, controller):
    found = rig(controller=controller)
    thread = background(lambda: found.cluster.run(spin_masked, 20.0, cpus=[0]))
    eventually(lambda: found.go[0])
    assert found.cluster.smp.smp_send_nmi_ipi(0, note, 50_000) == 0
    assert found.seen[0, 0] == 0
    found.go[1] = 1
    thread.end(30)
    # It arrives when interrupts are on, and finds no handler any more.
    eventually(lambda: found.cluster.counters()["nmi"][0] == 1)
    assert found.seen[0, 0] == 0
    assert found.cluster.smp.smp_send_nmi_ipi(0, note, NMI_S) == 1


def test_a_target_that_dies_ends_the_wait(rig, background, eventually):
    found = rig()
    pid = found.cluster.cpus[1].pid
    os.kill(pid, signal.SIGSTOP)
    thread = background(found.cluster.smp.smp_send_nmi_ipi, 1, note)
    eventually(lambda: found.cluster.chip.read("nmi", 1))
    assert thread.is_alive()
    os.kill(pid, signal.SIGKILL)
    assert thread.end() == 1  # nobody is left to enter it
    assert found.seen[1, 0] == 0
    with pytest.raises(CpuOfflineError):
        found.cluster.smp.smp_send_nmi_ipi(1, note)


def test_the_time_limit_is_kept(rig):
    """Proves row 55."""
    found = rig()
    pid = found.cluster.cpus[1].pid
    os.kill(pid, signal.SIGSTOP)
    try:
        assert found.cluster.smp.smp_send_nmi_ipi(1, note, 20_000) == 0
    finally:
        os.kill(pid, signal.SIGCONT)


def test_a_registered_handler_runs_for_each_until_it_is_removed(rig, eventually):
    found = rig()
    cluster = found.cluster

    class Handler:
        def __call__(self, type, regs):
            note(regs)

    cluster.smp.register_nmi_handler(smp.NMI_LOCAL, Handler(), 0, "note")
    for count in (1, 2):
        cluster.chip.send_nmi(2)
        eventually(lambda count=count: found.seen[2, 0] == count)
        eventually(lambda: not cluster.chip.read("nmi", 2))
    cluster.smp.unregister_nmi_handler(smp.NMI_LOCAL, "note")
    cluster.chip.send_nmi(2)
    eventually(lambda: cluster.counters()["nmi"][2] == 3)
    assert found.seen[2, 0] == 2


def test_a_handler_that_raises_spoils_nothing(rig, eventually, capfd):
    found = rig()

    def broken(regs):
        raise ValueError("from the NMI")

    assert found.cluster.smp.smp_send_nmi_ipi(1, broken, NMI_S) == 1
    eventually(lambda: found.cluster.counters()["unraisable"][1] == 1)
    assert found.cluster.call(1, smp.smp_processor_id) == 1
    assert "from the NMI" in capfd.readouterr().err


def test_of_one_machine_among_several(rig):
    first, second = rig(), rig()
    assert isinstance(first.cluster, Cluster)
    assert first.cluster.smp.smp_send_nmi_ipi(1, note, NMI_S) == 1
    assert second.cluster.counters()["nmi"].sum() == 0


def test_a_handler_that_forks_makes_no_second_cpu(rig, eventually):
    found = rig()
    children = found.cluster.shared("children", "i8", 2)

    def fork(regs):
        pid = os.fork()
        if pid:
            shmipi.shared("children")[0] = pid

    assert found.cluster.smp.smp_send_nmi_ipi(1, fork, NMI_S) == 1
    eventually(lambda: children[0])
    pid = int(children[0])

    def wait(pid):
        end = time.monotonic() + 20.0
        while time.monotonic() < end:
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                return status
            time.sleep(0.01)
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        return None

    assert found.cluster.run(wait, pid, cpus=[1]) == [0]


def test_what_came_in_the_middle_of_a_handler_is_taken_after_it(rig, eventually):
    found = rig()
    cluster = found.cluster
    inside = cluster.shared("inside", "i8", 2)
    counted = cluster.shared("counted", "i8", 1)

    def busy():
        go = shmipi.shared("go")  # from here on no call into the core
        go[0] = 1
        end = time.monotonic() + 20.0
        while not go[1] and time.monotonic() < end:
            pass
        return bool(go[1])

    def handler(regs):
        inside = shmipi.shared("inside")
        inside[0] = 1
        while not inside[1]:
            pass

    # Posted, not run: nobody waits, so nobody rings again.
    task = cluster._machine.post(0, busy, (), None, True)
    eventually(lambda: found.go[0])
    assert cluster.smp.smp_send_nmi_ipi(0, handler, NMI_S) == 1
    eventually(lambda: inside[0])
    kicks = cluster.counters()["kicks_received"][0]
    cluster.smp.smp_call_function_single(
        0, smp.NativeHandler("count"), counted, wait=False
    )
    eventually(lambda: cluster.counters()["kicks_received"][0] > kicks)
    assert not counted[0]  # it runs with interrupts off
    inside[1] = 1
    eventually(lambda: counted[0])
    found.go[1] = 1
    assert cluster._machine.collect(task, 0, None)


def test_a_task_cannot_leave_nmis_off(rig):
    found = rig()

    def block():
        signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())

    def ignore():
        for number in range(signal.SIGRTMIN, signal.SIGRTMAX + 1):
            signal.signal(number, signal.SIG_IGN)

    for count, (task, words) in enumerate(
        [(block, "blocked"), (ignore, "replaced")], start=1
    ):
        found.cluster.run(task, cpus=[1])
        assert found.cluster.smp.smp_send_nmi_ipi(1, note, NMI_S) == 1, words
        found.cluster.run(int)
        assert found.seen[1, 0] == count


def test_a_sender_does_not_park_with_the_lock(rig, background, eventually):
    found = rig()
    cluster = found.cluster
    pid = cluster.cpus[0].pid
    os.kill(pid, signal.SIGSTOP)
    try:
        thread = background(
            lambda: cluster.run(smp.smp_send_nmi_ipi, 0, note, NMI_S, cpus=[1])
        )
        eventually(lambda: cluster.chip.read("nmi", 0))  # it waits, and has the lock
        with pytest.raises(shmipi.IpiTimeoutError):
            cluster.offline(1, timeout=0.3)
    finally:
        os.kill(pid, signal.SIGCONT)
    assert thread.end(30) == [1]
    cluster.offline(1, timeout=5)
    cluster.online(1)
