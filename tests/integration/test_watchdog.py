"""Rings that were lost, and nobody who waits: the firmware's watchdog rings again.

A sender stopped between its push and its ring, a signal queue that is full. Nothing
here calls a waiting function on the target before what was stranded has run: a waiter
rings by itself.
"""

import os
import resource
import signal
import subprocess
import time
import warnings

import psutil
import pytest

import shmipi
from shmipi import CallSingleData, IpiDeadlockError, _core, atomic, smp
from shmipi.names import DOORBELLS

FIRST, SENDER, TARGET = 0, 1, 2


def hit(place):
    atomic.fetch_add(shmipi.shared("hits"), place, 1)


def sends(place):
    smp.smp_call_function_single(TARGET, hit, place, False)


def sleeps():
    shmipi.shared("hits")[9] = 1
    while not shmipi.shared("hits")[8]:
        time.sleep(0.02)


class Rig:
    def __init__(self, cluster):
        self.cluster, self.machine = cluster, cluster._machine
        self.hits = cluster.shared("hits", "i8", 10)
        for cpu in (FIRST, SENDER, TARGET):
            cluster.call(cpu, hit, 0)
        cluster.run(sends, 0, cpus=[SENDER])
        while self.hits[0] < 4:
            time.sleep(0.001)
        self.hits[:] = 0
        self.stopped = None
        self.tasks = []

    def task(self, cpu, func, *args):
        self.tasks.append((cpu, self.machine.post(cpu, func, args, None, True)))

    def running_target(self, eventually):
        self.task(TARGET, sleeps)
        eventually(lambda: self.hits[9])

    def at_rest(self, eventually):
        """The target is one that has to be rung."""
        want = "running" if self.hits[9] else "halted"
        eventually(lambda: self.cluster.cpus[TARGET].state == want)

    def strand(self, step, eventually):
        """Stop the sender on its way to ring the target."""
        before = int(self.hits[1])

        def stops():
            return self.machine.step_hit(SENDER) == step

        def sent():
            return self.hits[1] > before and self.cluster.cpus[SENDER].state == "halted"

        for _ in range(5):
            self.at_rest(eventually)
            self.machine.arm_step(SENDER, step, _core.STEP_STOP)
            self.task(SENDER, sends, 1)
            # A late ring of whoever made an earlier one good may have woken the target
            # since: then it sees the request by itself, and the sender rings nobody.
            eventually(lambda: stops() or sent())
            if stops():
                break
            self.machine.collect(*reversed(self.tasks.pop()), 5.0)
            self.hits[1] = before
        self.await_stopped(step, eventually)

    def await_stopped(self, step, eventually):
        """The sender says that it is there just before it stops."""
        eventually(lambda: self.machine.step_hit(SENDER) == step)
        self.stopped = self.cluster.cpus[SENDER].pid
        eventually(lambda: psutil.Process(self.stopped).status() == "stopped")

    def end(self):
        if self.stopped:
            os.kill(self.stopped, signal.SIGCONT)
        self.hits[8] = 1
        for cpu, task in self.tasks:
            self.machine.collect(task, cpu, 5.0)


@pytest.fixture
def rig(boot):
    made = []

    def make(**options):
        made.append(Rig(boot(3, idle="halt", steps=True, **options)))
        return made[-1]

    yield make
    for found in made:
        found.end()


def by_submit(cluster, place):
    cluster.submit(TARGET, hit, place)


def by_nowait(cluster, place):
    cluster.smp.smp_call_function_single(TARGET, hit, place, False)


def by_csd(cluster, place):
    csd = by_csd.csd = CallSingleData(hit, place)
    cluster.smp.smp_call_function_single_async(TARGET, csd)


def by_task(cluster, place):
    by_task.call = cluster._machine.post(TARGET, hit, (place,), None, True)


@pytest.mark.parametrize("doorbell", DOORBELLS)
@pytest.mark.parametrize("target", ["halted", "running"])
def test_a_lost_ring_is_made_good_without_a_waiter(rig, eventually, target, doorbell):
    found = rig(doorbell=doorbell)
    if target == "running":
        found.running_target(eventually)
    for step in ("pushed", "raise", "ring"):
        found.strand(step, eventually)
        took = eventually(lambda: found.hits[1] == 1)
        ways = [by_submit, by_nowait, by_csd]
        if target == "halted":
            ways.append(by_task)  # a running one has a task
        for place, way in enumerate(ways, 2):
            way(found.cluster, place)
        last = 1 + len(ways)
        took = max(took, eventually(lambda end=last: all(found.hits[1 : end + 1] == 1)))
        print(f"{target} {doorbell} {step}: {took * 1e3:.0f} ms")
        os.kill(found.stopped, signal.SIGCONT)
        found.stopped = None
        found.machine.collect(*reversed(found.tasks.pop()), 5.0)
        assert found.hits[1] == 1  # once
        found.hits[:8] = 0


@pytest.mark.parametrize("doorbell", ["futex", "signal"])
def test_those_behind_a_lost_ring(rig, eventually, doorbell):
    """They find the queue not empty, or the CPU rung, and trust that somebody rings."""
    found = rig(doorbell=doorbell)
    for step in ("pushed", "raise", "ring"):
        found.strand(step, eventually)
        for place, way in enumerate((by_submit, by_nowait, by_csd), 2):
            way(found.cluster, place)
        eventually(lambda: (found.hits[1:5] == 1).all())
        os.kill(found.stopped, signal.SIGCONT)
        found.stopped = None
        found.machine.collect(*reversed(found.tasks.pop()), 5.0)
        found.hits[:8] = 0


def test_run_with_a_lost_ring_behind_the_first_cpu(rig, eventually, background):
    """`run` waits for one CPU after the other: a later one's task does not start."""
    found = rig()

    def task():
        hits = shmipi.shared("hits")
        me = smp.smp_processor_id()
        hits[4 + me] = 1
        while me == FIRST and not hits[3]:
            time.sleep(0.001)

    # The target's task stands behind the sender's request.
    found.strand("pushed", eventually)
    run = background(lambda: found.cluster.run(task, cpus=[FIRST, TARGET]))
    try:
        eventually(lambda: found.hits[4 + FIRST])
        eventually(lambda: found.hits[4 + TARGET])
    finally:
        found.hits[3] = 1
    run.end(5)


@pytest.mark.parametrize("doorbell", ["futex", "signal"])
def test_who_waits_rings_when_the_watchdog_is_stopped(rig, eventually, doorbell):
    """And after each progress of the target soon again, however long it has waited."""
    found = rig(doorbell=doorbell)
    firmware = psutil.Process(found.cluster.cpus[TARGET].pid).ppid()
    os.kill(firmware, signal.SIGSTOP)
    try:
        for place in (1, 2):
            found.strand("pushed", eventually)
            start = time.monotonic()
            found.cluster.call(TARGET, hit, 2, timeout=5)
            print(f"{(time.monotonic() - start) * 1e3:.0f} ms")
            assert found.hits[2] == place
            eventually(lambda n=place: found.hits[1] == n)  # calls overtake the rest
            os.kill(found.stopped, signal.SIGCONT)
            found.stopped = None
            found.machine.collect(*reversed(found.tasks.pop()), 5.0)
    finally:
        os.kill(firmware, signal.SIGCONT)


@pytest.mark.parametrize("doorbell", ["futex", "signal"])
def test_a_stopped_target_is_not_flooded(rig, eventually, doorbell):
    """Rung again ever less often while it does nothing, at once again when it does."""
    found = rig(doorbell=doorbell)
    if doorbell == "futex":
        found.running_target(eventually)
    pid = found.cluster.cpus[TARGET].pid
    before = found.cluster.counters()["kicks_received"][TARGET]
    os.kill(pid, signal.SIGSTOP)
    try:
        for place in (1, 2):
            by_nowait(found.cluster, place)
        time.sleep(1.5)
    finally:
        os.kill(pid, signal.SIGCONT)
    eventually(lambda: (found.hits[1:3] == 1).all())
    received = found.cluster.counters()["kicks_received"][TARGET] - before
    assert received <= 12, received
    # And from anew: the pause before the next ring is short again.
    found.strand("ring", eventually)
    assert eventually(lambda: found.hits[1] == 2) < 2


def test_an_nmi_whose_sender_is_stopped(rig, eventually):
    found = rig()

    def taken():
        return found.cluster.counters()["nmi"][TARGET]

    before = taken()
    found.machine.arm_step(SENDER, "nmi", _core.STEP_STOP)
    found.task(SENDER, lambda: shmipi.irq.chip().send_nmi(TARGET))
    found.await_stopped("nmi", eventually)
    eventually(lambda: taken() == before + 1)


@pytest.mark.parametrize(
    ("doorbell", "target"), [("futex", "running"), ("signal", "halted")]
)
def test_a_full_signal_queue_loses_nothing(rig, eventually, doorbell, target):
    """EAGAIN for as long as it lasts; then everything runs, and nobody has to wait."""
    found = rig(doorbell=doorbell)
    if target == "running":
        found.running_target(eventually)
    found.at_rest(eventually)
    pid = found.cluster.cpus[TARGET].pid
    # It has that state before it sleeps, and looks at its word once more.
    eventually(lambda: psutil.Process(pid).status() == "sleeping")
    limit = resource.prlimit(pid, resource.RLIMIT_SIGPENDING)
    # The kernel asks the limit of who is signalled.
    resource.prlimit(pid, resource.RLIMIT_SIGPENDING, (0, limit[1]))
    retried = found.cluster.host_counters()["kicks_retried"]
    for place, way in enumerate((by_submit, by_nowait, by_csd), 1):
        way(found.cluster, place)
    time.sleep(0.05)
    assert found.cluster.host_counters()["kicks_retried"] > retried
    assert not found.hits[1:4].any()
    resource.prlimit(pid, resource.RLIMIT_SIGPENDING, limit)
    print(eventually(lambda: (found.hits[1:4] == 1).all()))


@pytest.mark.alone
def test_idle_cpus_are_not_woken_by_it(boot, eventually):
    cluster = boot(64, idle="halt")
    eventually(lambda: all(cpu.state == "halted" for cpu in cluster.cpus))
    # It is counted when it has that state, and before it sleeps.
    processes = [psutil.Process(cpu.pid) for cpu in cluster.cpus]
    eventually(lambda: {p.status() for p in processes} == {"sleeping"})
    halts = cluster.counters()["halts"].copy()
    time.sleep(0.2)
    assert (cluster.counters()["halts"] == halts).all()


def test_a_damaged_pid_is_nobody_s_death(boot, eventually):
    """INIT ends the CPU's process, whatever pid stands in the segment."""
    cluster = boot(2, idle="halt")
    machine = cluster._machine
    stranger = subprocess.Popen(["sleep", "60"])
    pid = cluster.cpus[1].pid
    try:
        offset = dict((name, at) for name, at, _ in _core.SLOT_FIELDS)["pid"]
        at = machine.slot_offset + _core.SLOT_BYTES + offset
        memoryview(machine)[at : at + 4] = stranger.pid.to_bytes(4, "little")
        from shmipi.irq.chips.apic import APIC_DM_INIT, APIC_INT_ASSERT

        cluster.chip.write_icr(APIC_DM_INIT | APIC_INT_ASSERT, 1)
        eventually(lambda: not os.path.exists(f"/proc/{pid}"))
        assert stranger.poll() is None
    finally:
        stranger.kill()
        stranger.wait()


def test_a_circle_is_seen_after_a_wait_within_the_wait(boot, eventually):
    """An NMI's handler that waits interrupts a wait with interrupts off."""
    cluster = boot(4, idle="halt")
    state = cluster.shared("state", "i8", 4)

    def off_and_call(other):
        me = smp.smp_processor_id()
        smp.local_irq_disable()
        state[me] = 1
        while not state[2 + me]:
            time.sleep(0.0005)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                smp.smp_call_function_single(other, id)
        except IpiDeadlockError:
            return True
        finally:
            smp.local_irq_enable()
        return False

    def waits(_=None):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            smp.smp_call_function_single(2, time.sleep, 0.02)
        state[0] = 2

    tasks = [
        cluster._machine.post(n, off_and_call, (1 - n,), None, True) for n in (0, 1)
    ]
    eventually(lambda: (state[:2] == 1).all())
    state[2] = 1  # CPU 0 waits for CPU 1
    time.sleep(0.05)
    cluster.smp.smp_send_nmi_ipi(0, waits)
    eventually(lambda: state[0] == 2)
    time.sleep(0.02)
    state[3] = 1  # and CPU 1 for CPU 0
    told = [cluster._machine.collect(task, n, 10.0) for n, task in enumerate(tasks)]
    assert any(told)


def test_those_who_wait_for_a_stopped_cpu_do_not_pile_signals_up_there(rig, eventually):
    """Neither the many, nor who gives up and calls anew: ever fewer ring."""
    found = rig()
    found.running_target(eventually)
    pid = found.cluster.cpus[TARGET].pid
    before = found.cluster.host_counters()["rekicked"]
    os.kill(pid, signal.SIGSTOP)
    try:
        for _ in range(60):
            with pytest.raises(shmipi.IpiTimeoutError):
                found.cluster.call(TARGET, hit, 1, timeout=0.025)
        rung = found.cluster.host_counters()["rekicked"] - before
    finally:
        os.kill(pid, signal.SIGCONT)
    assert rung < 30  # by those who wait, and by the watchdog
    eventually(lambda: found.hits[1] == 60)
