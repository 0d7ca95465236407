"""CPU hotplug states: what is called when, where, and what is undone."""

import errno
import os
import sys
import time
from dataclasses import replace

import pytest

import shmipi
from shmipi import (
    ClusterStateError,
    CpuDiedError,
    HotplugError,
    RemoteCallError,
    ShmipiWarning,
    smp,
)
from shmipi.irq.chips.apic import APIC_DM_INIT, APIC_DM_STARTUP, APIC_INT_ASSERT
from shmipi.machine import locks
from shmipi.smp import CpuhpState as S

PREP, START = int(S.CPUHP_BP_PREPARE_DYN), int(S.CPUHP_AP_SCHED_STARTING)
DYN = int(S.CPUHP_AP_ONLINE_DYN)
INIT = APIC_DM_INIT | APIC_INT_ASSERT


@pytest.fixture
def cluster(cluster_until_failure):
    with cluster_until_failure(3, idle="halt") as cluster:
        yield cluster


class Log:
    """What was called, in shared memory: callbacks write from everywhere."""

    def __init__(self, cluster):
        self.memory = cluster.shared("cpuhp log", "i8", 256)
        self.memory[:] = 0

    def note(self, code, fails=None):
        memory = self.memory

        def callback(cpu):
            at = memory[0]
            memory[1 + at] = code * 10 + cpu
            memory[0] = at + 1
            if fails is not None and cpu == fails[0]:
                return fails[1]
            return None

        return callback

    def take(self):
        seen = self.memory[1 : 1 + self.memory[0]].tolist()
        self.memory[:] = 0
        return seen


@pytest.fixture
def log(cluster):
    return Log(cluster)


@pytest.fixture
def setup(cluster):
    """`setup(state, startup, teardown)`: removed when the test ends."""
    numbers = []

    def start(state, startup, teardown, calls=False):
        way = "cpuhp_setup_state" if calls else "cpuhp_setup_state_nocalls"
        number = getattr(cluster.smp, way)(state, "test:x", startup, teardown)
        numbers.append(number or state)
        return number

    yield start
    for cpu in range(3):
        cluster.online(cpu, timeout=10)
    for number in numbers:
        cluster.smp.cpuhp_remove_state_nocalls(number)


def test_up_ascending_and_down_descending(cluster, log, setup):
    """Each section where it belongs, and for CPUs that have reached it."""
    setup(DYN, log.note(7), log.note(8), calls=True)
    assert log.take() == [70, 71, 72]
    setup(PREP, log.note(1), log.note(2))
    setup(START, log.note(3), log.note(4))
    setup(S.CPUHP_AP_WORKQUEUE_ONLINE, log.note(5), log.note(6))
    setup(S.CPUHP_TIMERS_PREPARE, log.note(11), log.note(12))
    cluster.offline(1)
    assert log.take() == [81, 61, 41, 21, 121]
    cluster.online(1)
    assert log.take() == [111, 11, 31, 51, 71]


def test_where_callbacks_run(cluster, setup):
    """PREPARE: on the host; STARTING: there, interrupts off; ONLINE: there, a task."""
    seen = cluster.shared("cpuhp where", "i8", (8, 4))
    seen[:] = 0

    def note(row):
        def callback(cpu):
            time.sleep(0.001)
            if row:
                seen[row] = (
                    os.getpid(),
                    smp.irqs_disabled(),
                    smp.preempt_count(),
                    smp.cpu_online(cpu),
                )
            else:
                seen[row] = os.getpid()

        return callback

    setup(PREP, note(0), note(0))
    setup(START, note(1), note(2))
    setup(DYN, note(3), note(4))
    pid = cluster.cpus[1].pid
    cluster.offline(1)
    assert seen[0][0] == os.getpid()
    assert seen[2].tolist() == [pid, 1, 1, 0]
    assert seen[4].tolist() == [pid, 0, 0, 1]
    seen[0] = 0
    cluster.online(1)
    assert seen[0][0] == os.getpid()
    assert seen[1].tolist() == [pid, 1, 0, 0]
    assert seen[3].tolist() == [pid, 0, 0, 1]


def test_on_top_of_a_task_that_runs_python(cluster, setup, eventually):
    n = cluster.shared("cpuhp busy", "i8", 3)
    n[:] = 0

    def busy():
        while not n[1]:
            n[0] += 1
        return "ended"

    def sleeps(cpu):
        smp.wait_for_interrupt(0.001)  # what may sleep may
        n[2] += 1

    tasks = cluster.start(busy, cpus=[1])
    eventually(lambda: n[0])
    setup(DYN, sleeps, sleeps, calls=True)
    cluster.offline(1, timeout=10)
    cluster.online(1, timeout=10)
    n[1] = 1
    assert tasks.results(5) == ["ended"]
    assert n[2] == 5


def test_a_failure_rolls_back(cluster, log, setup):
    """Going up, going down, and when a state is set up: nothing is left half done."""
    setup(PREP, log.note(1), log.note(2))
    setup(DYN, log.note(3), log.note(4))
    failing = int(S.CPUHP_AP_WORKQUEUE_ONLINE)
    setup(failing, log.note(5), log.note(6, fails=(1, -errno.EBUSY)))
    with pytest.raises(HotplugError, match="test:x") as caught:
        cluster.offline(1)
    assert (caught.value.errno, caught.value.cpu) == (errno.EBUSY, 1)
    assert log.take() == [41, 61, 31]  # down to the failing one, and up again
    assert cluster.call(1, abs, -3) == 3
    cluster.offline(2)
    assert log.take() == [42, 62, 22]
    cluster.online(2)
    log.take()
    number = cluster.smp.cpuhp_setup_state_nocalls(
        DYN, "test:up", log.note(7, fails=(2, -errno.ENOMEM)), log.note(8)
    )
    cluster.offline(2)
    log.take()
    with pytest.raises(HotplugError) as caught:
        cluster.online(2)
    assert caught.value.errno == errno.ENOMEM
    assert log.take() == [12, 52, 32, 72, 42, 62, 22]
    assert str(cluster.online_mask) == "0-1"
    cluster.smp.cpuhp_remove_state_nocalls(number)
    cluster.online(2)
    log.take()
    with pytest.raises(HotplugError, match="returned 5"):
        cluster.smp.cpuhp_setup_state(DYN, "f", log.note(7, fails=(2, 5)), log.note(8))
    assert log.take() == [70, 71, 72, 80, 81]

    def raises(cpu):
        raise KeyError(cpu)

    with pytest.raises(HotplugError, match="raised RemoteCallError") as caught:
        cluster.smp.cpuhp_setup_state(DYN, "f", raises, None)
    assert caught.value.errno == errno.EIO
    assert isinstance(caught.value.__cause__, RemoteCallError)


def test_numbers_and_refusals(cluster, setup):
    """A second callback is -EBUSY, DYN returns its number; bad input does nothing."""
    assert setup(START, None, None) == 0
    first = setup(DYN, None, None)
    assert (first, setup(DYN, None, None)) == (DYN, DYN + 1)
    assert setup(PREP, None, None) == PREP
    for state in (START, first + 1, S.CPUHP_AP_SMPCFD_DYING, S.CPUHP_TEARDOWN_CPU):
        if state == first + 1:
            continue
        with pytest.raises(HotplugError) as caught:
            cluster.smp.cpuhp_setup_state(state, "again", None, None)
        assert caught.value.errno == errno.EBUSY
    for state in (0, -1, int(S.CPUHP_ONLINE), 10_000):
        with pytest.raises(HotplugError) as caught:
            cluster.smp.cpuhp_setup_state(state, "none", None, None)
        assert caught.value.errno == errno.EINVAL
    with pytest.raises(HotplugError) as caught:
        cluster.smp.cpuhp_remove_state(100)
    assert caught.value.errno == errno.EINVAL
    with pytest.raises(TypeError):
        cluster.smp.cpuhp_setup_state(DYN, "x", 5, None)
    with pytest.raises(HotplugError, match="native"):
        cluster.smp.cpuhp_setup_state(PREP, "x", smp.NativeHandler("noop"), None)
    last = int(S.CPUHP_BP_PREPARE_DYN_END)
    taken = [
        cluster.smp.cpuhp_setup_state_nocalls(PREP, "many", None, None)
        for _ in range(last - PREP)
    ]
    assert taken == list(range(PREP + 1, last + 1))
    with pytest.raises(HotplugError) as caught:
        cluster.smp.cpuhp_setup_state_nocalls(PREP, "many", None, None)
    assert caught.value.errno == errno.ENOSPC
    for number in taken:
        cluster.smp.cpuhp_remove_state(number)
    with pytest.raises(RemoteCallError, match="by hosts"):
        cluster.call(1, smp.cpuhp_remove_state, DYN)


def test_native_callbacks(cluster, setup):
    """On the CPU: of the ONLINE section, and of the STARTING one."""
    noop = smp.NativeHandler("noop")
    setup(START, noop, noop)
    setup(DYN, noop, noop, calls=True)
    before = cluster.counters()["calls_self"][1]
    cluster.offline(1)
    cluster.online(1)
    assert cluster.counters()["calls_self"][1] == before + 4


def _listen(memory):
    own = sys.unraisablehook

    def hook(lost):
        own(lost)  # in the end Python's, which takes only what C has made
        at = memory[0]
        told = isinstance(lost.exc_value, HotplugError | LookupError)
        told = told and "CPU hotplug callback" in lost.object
        told = told and lost.exc_traceback.tb_frame.f_code.co_name == "_nofail"
        memory[1 + at] = 70 + told
        memory[0] = at + 1

    hook.own = own
    sys.unraisablehook = hook


def _listen_no_more():
    sys.unraisablehook = sys.unraisablehook.own


def test_what_raises_where_it_can_not_fail_is_told_of(cluster, log, setup):
    """STARTING section: the CPU goes and comes all the same, and the rest is called."""

    def raises(cpu):
        raise LookupError(f"no such thing on {cpu}")

    def refuses(cpu):
        return -5

    setup(START, raises, raises)
    setup(START + 1, refuses, refuses)
    setup(START + 2, log.note(1), log.note(2))
    cluster.call(1, _listen, log.memory)
    before = cluster.counters()["unraisable"][1]
    cluster.offline(1)
    assert cluster.counters()["unraisable"][1] == before + 2
    assert log.take() == [21, 71, 71]
    cluster.online(1)
    assert cluster.counters()["unraisable"][1] == before + 4
    assert log.take() == [71, 71, 11]
    cluster.call(1, _listen_no_more)


def test_death_runs_what_is_for_the_dead(cluster, log, setup, eventually):
    """kill -9: dead callbacks run, soon, and once; dying ones can not."""
    setup(PREP, log.note(1), log.note(2))
    setup(START, log.note(3), log.note(4))
    setup(DYN, log.note(5), log.note(6))
    os.kill(cluster.cpus[2].pid, 9)
    eventually(lambda: log.memory[0])
    time.sleep(0.05)
    assert log.take() == [22]
    cluster.online(2)
    assert log.take() == [12, 32, 52]

    def suicide(cpu):
        if cpu == 1:
            os.kill(os.getpid(), 9)

    number = cluster.smp.cpuhp_setup_state_nocalls(DYN, "dies", None, suicide)
    with pytest.raises(CpuDiedError):
        cluster.offline(1, timeout=10)
    cluster.smp.cpuhp_remove_state_nocalls(number)
    cluster.online(1)
    assert log.take() == [21, 11, 31, 51]


def test_states_of_users_are_states(cluster, log, setup, monkeypatch, eventually):
    """dev_cpu_dead and blk_softirq_cpu_dead: listed, in order, whoever goes how."""
    setup(40, None, log.note(1))
    setup(20, None, log.note(4))
    states = cluster.smp.cpuhp_states()
    assert list(states) == sorted(states)
    assert states[S.CPUHP_NET_DEV_DEAD] == "net/dev:dead"
    assert states[S.CPUHP_BLOCK_SOFTIRQ_DEAD] == "block/softirq:dead"
    assert (states[S.CPUHP_TEARDOWN_CPU], states[40]) == ("cpu:teardown", "test:x")
    for state in (S.CPUHP_NET_DEV_DEAD, S.CPUHP_BLOCK_SOFTIRQ_DEAD):
        with pytest.raises(HotplugError) as caught:
            cluster.smp.cpuhp_setup_state_nocalls(state, "mine", None, print)
        assert caught.value.errno == errno.EBUSY
    places = {"net/dev:dead": 2, "block/softirq:dead": 3}
    noted = [
        replace(step, teardown=log.note(places[step.name]))
        for step in cluster._cpuhp._users
    ]
    monkeypatch.setattr(cluster._cpuhp, "_users", noted)
    cluster.offline(1)
    assert log.take() == [11, 21, 31, 41]
    cluster.online(1)
    os.kill(cluster.cpus[2].pid, 9)
    eventually(lambda: log.memory[0] == 4)
    assert log.take() == [12, 22, 32, 42]


def test_a_raw_startup_is_no_hotplug(cluster, log, setup, eventually):
    """INIT and STARTUP as hardware has them: no lock, no callback but the CPU's own."""
    setup(PREP, log.note(1), log.note(2))
    setup(START, log.note(3), log.note(4))
    setup(DYN, log.note(5), log.note(6))
    cluster.chip.write_icr(INIT, 1)
    eventually(lambda: log.memory[0])
    assert log.take() == [21]  # it is as one that was killed
    with locks.held(cluster._machine, "hotplug", 5):
        cluster.chip.write_icr(APIC_DM_STARTUP | 0x9A, 1)
        eventually(lambda: cluster.cpus[1].state == "halted")
    assert cluster.call(1, abs, -3) == 3
    assert log.take() == [31]
    # From here on it is one that is online: it goes as any other.
    cluster.offline(1)
    assert log.take() == [61, 41, 21]


def test_cpus_read_lock_inside_a_callback_is_refused(cluster, setup):
    """It would wait for who has called it; stop_machine_cpuslocked is for them."""
    ran = cluster.shared("cpuhp locked", "i8", 2)
    ran[:] = 0

    def callback(cpu):
        with pytest.raises(ClusterStateError, match="waits for itself"):
            smp.stop_machine(abs, -1)
        ran[0] += smp.stop_machine_cpuslocked(abs, -1)

    setup(DYN, None, callback)
    cluster.offline(1, timeout=10)
    assert ran[0] == 1
    cluster.online(1)


def test_a_dead_callback_that_fails_is_warned_of(cluster, log, setup):
    setup(PREP, None, log.note(2, fails=(1, -5)))
    with pytest.warns(ShmipiWarning, match="returned -5"):
        cluster.offline(1)
    assert cluster.cpus[1].state == "offline"


def test_a_cpu_that_goes_sends_one_last_call(cluster, log, setup, eventually):
    """Proves row 62: when it is dying, no longer online, with interrupts off."""

    def last(cpu):
        memory = shmipi.shared("cpuhp log")

        def tell(info):
            memory[1], memory[2] = info, smp.smp_processor_id()
            memory[0] += 1

        offline = not smp.cpu_online(cpu) and smp.irqs_disabled()
        smp.smp_call_function_single_async(0, smp.CallSingleData(tell, 100 + offline))

    setup(START, None, last)
    cluster.offline(2)
    eventually(lambda: log.memory[0] == 1)
    assert log.take() == [101]
    cluster.online(2)


def test_a_late_doorbell_finds_an_empty_queue(cluster):
    """Proves row 61: a kick to a CPU that has gone, and to one that is back."""
    pid = cluster.cpus[1].pid
    cluster.offline(1)
    before = cluster.counters()["kicks_received"][1]
    machine = cluster._machine
    machine.make_room(1)  # whoever rings it now finds it offline
    time.sleep(0.01)
    assert cluster.counters()["kicks_received"][1] == before
    cluster.online(1)
    assert cluster.cpus[1].pid == pid
    assert cluster.call(1, abs, -4) == 4
