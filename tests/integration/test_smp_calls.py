"""The rest of kernel/smp.c: on CPUs, and bound to the host."""

import errno
import os
import signal
import time

import pytest

import shmipi
from shmipi import (
    ClusterStateError,
    CpuDiedError,
    CpuOfflineError,
    RemoteCallError,
    smp,
)
from shmipi.machine import topology
from shmipi.users import scheduler


def note(info):
    where = shmipi.percpu("where")
    where[smp.smp_processor_id()] += 1


@pytest.fixture
def where(cluster):
    array = cluster.percpu("where", "i8")
    array[:] = 0
    return lambda: array.reshape(-1).tolist()


def run_on(cluster, func, cpu=1):
    return cluster.run(func, cpus=[cpu])[0]


def test_any_takes_this_cpu_first(cluster, where):
    """Else one that is online, of equals the first; the host is none of them; row 6."""

    def task():
        smp.smp_call_function_any([0, 1, 2], note)
        smp.smp_call_function_any([0, 2], note, None, wait=True)

    run_on(cluster, task)
    assert where() == [1, 1, 0]
    cluster.smp.smp_call_function_any("1-2", note)
    assert where() == [1, 2, 0]
    cluster.offline(1)
    try:
        cluster.smp.smp_call_function_any([1, 2], note)
        assert where() == [1, 2, 1]
        for mask in ([1], []):
            with pytest.raises(CpuOfflineError) as raised:
                cluster.smp.smp_call_function_any(mask, note)
            assert raised.value.errno == errno.ENXIO
    finally:
        cluster.online(1)


def test_any_takes_the_nearest_by_numa_distance(tmp_path):
    """What the system says of its nodes decides: not their numbers; row 6."""
    for node, cores, distance in (
        (0, "0-1", "10 40 20"),
        (1, "2-3", "40 10 20"),
        (2, "4", "20 20 10"),
    ):
        folder = tmp_path / "devices/system/node" / f"node{node}"
        folder.mkdir(parents=True)
        (folder / "cpulist").write_text(cores + "\n")
        (folder / "distance").write_text(distance + "\n")

    def far(core):
        return [topology.numa_distance(core, n, sys=tmp_path) for n in range(5)]

    assert far(0) == [10, 10, 40, 40, 20]
    assert far(3) == [40, 40, 10, 10, 20]
    assert topology.numa_distance(0, 0, sys=tmp_path / "none") == 10


def test_each_cpu_for_which_the_condition_holds(cluster, where):
    """Asked once of each, the calling CPU too; row 10."""

    def task():
        asked = []

        def even(cpu, info):
            asked.append((cpu, info))
            return cpu % 2 == 0

        smp.on_each_cpu_cond(even, note, 7)
        return asked

    assert sorted(run_on(cluster, task, 2)) == [(0, 7), (1, 7), (2, 7)]
    assert where() == [1, 0, 1]
    cluster.smp.on_each_cpu_cond(lambda cpu, info: cpu == 1, note, wait=True)
    assert where() == [1, 1, 1]


def test_on_cpu_runs_in_task_context_and_returns(cluster):
    """It may wait, which a handler may not; row 28."""

    def there(par):
        smp.might_sleep()
        smp.wait_for_interrupt(0.001)
        return par, smp.smp_processor_id(), smp.in_task(), smp.preemptible()

    def fails(par):
        raise LookupError(par)

    assert cluster.smp.smp_call_on_cpu(1, there, 5) == (5, 1, True, True)
    assert run_on(cluster, lambda: smp.smp_call_on_cpu(2, there, 6))[1] == 2
    assert run_on(cluster, lambda: smp.smp_call_on_cpu(1, there, 7, True))[1] == 1
    with pytest.raises(RemoteCallError) as raised:
        cluster.smp.smp_call_on_cpu(1, fails, 8)
    assert isinstance(raised.value.__cause__, LookupError)
    cluster.offline(2)
    try:
        for cpu in (2, 3, -1):
            with pytest.raises(CpuOfflineError) as offline:
                cluster.smp.smp_call_on_cpu(cpu, there)
            assert offline.value.errno == errno.ENXIO
    finally:
        cluster.online(2)

    def atomic():
        smp.preempt_disable()
        try:
            smp.smp_call_on_cpu(2, there)
        except ClusterStateError:
            return True
        finally:
            smp.preempt_enable()

    assert run_on(cluster, atomic)


def meet(there, parties):
    """All are here."""
    smp.might_sleep()
    array = shmipi.shared("met")
    shmipi.atomic.fetch_add(array, there, 1)
    end = time.monotonic() + 10
    while array[there] < parties:
        assert time.monotonic() < end
    return smp.smp_processor_id()


def test_two_tasks_ask_each_others_cpu_at_once(cluster):
    """Who waits lets the other's work run, also when that asks in turn; row 28."""
    cluster.shared("met", "i8", 64)[:] = 0

    def back(home):
        return smp.smp_processor_id(), smp.smp_call_on_cpu(home, lambda par: par, home)

    def task():
        cpu = smp.smp_processor_id()
        other = 3 - cpu
        got = []
        for i in range(20):
            meet(i, 2)
            got.append(smp.smp_call_on_cpu(other, back, cpu))
        return got

    assert cluster.start(task, cpus=[1, 2]).results(20) == [
        [(2, 1)] * 20,
        [(1, 2)] * 20,
    ]


def test_on_cpu_preempts_a_task_that_computes(cluster):
    """From the host and from a task, though a task of that CPU never waits; row 28."""
    flag = cluster.shared("met", "i8", 64)
    flag[:] = 0

    def compute():
        flag = shmipi.shared("met")
        flag[0] = 1
        end = time.monotonic() + 20
        n = 0
        while flag[1] == 0 and time.monotonic() < end:
            n += 1
        return int(flag[1])

    def who(par):
        names = {task.name for task in scheduler.ps() if task.running}
        return par, smp.smp_processor_id(), names, smp.in_task()

    running = cluster.start(compute, cpus=[1])
    while not flag[0]:
        time.sleep(0.001)
    want = 1, {"kworker/1"}, True
    assert cluster.smp.smp_call_on_cpu(1, who, b"x" * 100000)[1:] == want
    assert run_on(cluster, lambda: smp.smp_call_on_cpu(1, who, 5)[1:], 2) == want
    assert len(cluster.smp.smp_call_on_cpu(1, lambda n: b"y" * n, 200000)) == 200000
    with pytest.raises(TypeError, match="native"):
        cluster.smp.smp_call_on_cpu(1, shmipi.NativeHandler("noop"))
    assert not running.done()
    flag[1] = 7
    assert running.results(10) == [7]


def test_death_ends_a_wait_on_cpu(boot):
    """Of the CPU that is asked, while its kworker runs, and before; row 28."""
    cluster = boot(3)
    met = cluster.shared("met", "i8", 64)

    def dies(par):
        os.kill(os.getpid(), signal.SIGKILL)

    with pytest.raises(CpuDiedError) as died:
        cluster.smp.smp_call_on_cpu(1, dies)
    assert died.value.cpu == 1
    cluster.online(1)

    def blocks():
        smp.preempt_disable()
        shmipi.shared("met")[0] = 1
        while True:
            pass

    cluster.start(blocks, cpus=[1])
    while not met[0]:
        time.sleep(0.001)

    def asks():
        try:
            smp.smp_call_on_cpu(1, dies)
        except CpuDiedError as error:
            return error.cpu
        return None

    asking = cluster.start(asks, cpus=[2])
    ps = cluster.users.scheduler.ps
    while not any(task.name == "kworker/1" for task in ps()):
        time.sleep(0.001)  # queued, and it cannot run
    os.kill(cluster.cpus[1].pid, signal.SIGKILL)
    assert asking.results(10) == [1]
    cluster.online(1)
    assert cluster.smp.smp_call_on_cpu(1, lambda par: par, 3) == 3


def test_kick_all_waits_for_handlers_that_run(cluster):
    """Who is in a handler is interrupted after it: it is over then; row 25."""
    inside = cluster.shared("inside", "i8", 1)
    inside[0] = 0

    def handler(info):
        shmipi.shared("inside")[0] = 1
        time.sleep(0.05)
        shmipi.shared("inside")[0] = 2

    cluster.smp.smp_call_function_single(1, handler, None, False)
    while not inside[0]:
        time.sleep(0.0001)
    cluster.smp.kick_all_cpus_sync()
    assert inside[0] == 2
    before = cluster.counters()["native_run"]
    run_on(cluster, smp.kick_all_cpus_sync)
    assert (cluster.counters()["native_run"] - before)[:3].tolist() == [1, 0, 1]


def test_only_idle_cpus_are_woken(cluster):
    """A CPU that runs something is left alone, and so is the caller; row 26."""
    go = cluster.shared("go", "i8", 2)
    go[:] = 0

    def busy():
        shmipi.shared("go")[0] = 1
        end = time.monotonic() + 10
        while not shmipi.shared("go")[1] and time.monotonic() < end:
            pass
        return smp.need_resched()

    def sent():
        counters = cluster.counters()
        return counters["irq_resched"][:3].tolist()

    def task():
        smp.wake_up_all_idle_cpus()
        smp.wake_up_if_idle(0)

    running = cluster.start(busy, cpus=[0])
    while not go[0]:
        time.sleep(0.001)
    end = time.monotonic() + 5
    while cluster.cpus[2].state != "halted":
        assert time.monotonic() < end
    before = sent()
    run_on(cluster, task)
    go[1] = 1
    assert running.results(10) == [False]
    cluster.call(2, int)
    after = sent()
    assert after[0] == before[0]
    assert after[2] == before[2] + 1
    with pytest.raises(CpuOfflineError):
        cluster.smp.wake_up_if_idle(3)
    cluster.smp.wake_up_all_idle_cpus()


def test_peek_sees_what_is_queued(cluster):
    """And nothing of other CPUs; row 27."""
    go = cluster.shared("go", "i8", 2)
    go[:] = 0

    def task():
        smp.local_irq_disable()
        shmipi.shared("go")[0] = 1
        end = time.monotonic() + 10
        while not shmipi.shared("go")[1] and time.monotonic() < end:
            pass
        seen = smp.cpus_peek_for_pending_ipi([1])
        smp.local_irq_enable()
        return seen, smp.cpus_peek_for_pending_ipi([1])

    running = cluster.start(task, cpus=[1])
    while not go[0]:
        time.sleep(0.001)
    assert not cluster.smp.cpus_peek_for_pending_ipi("0-2")
    cluster.smp.smp_call_function_single(1, int, 0, False)
    assert cluster.smp.cpus_peek_for_pending_ipi("0-2")
    assert not cluster.smp.cpus_peek_for_pending_ipi([0, 2])
    go[1] = 1
    assert running.results(10) == [(True, False)]


def test_a_cpu_that_is_offline_is_not_warned(boot):
    """A dying callback runs with interrupts off, and may send: it is over; row 23.

    Nobody waits for a CPU that is offline, so none waits for this one in a circle.
    """
    cluster = boot(2)
    seen = cluster.shared("seen", "i8", 4)

    def sent(info):
        seen[1] += 1

    def dying(cpu):
        import warnings

        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            seen[2] = smp.irqs_disabled() and not smp.cpu_online(cpu)
            smp.smp_call_function_single(0, sent, None, False)
        seen[3] = 1 + len(caught)

    state = smp.CpuhpState.CPUHP_AP_SCHED_STARTING
    cluster.smp.cpuhp_setup_state_nocalls(state, "test:dying", None, dying)
    cluster.offline(1)
    cluster.call(0, int)
    cluster.call(0, int)
    assert seen.tolist() == [0, 1, 1, 1]


def test_ipis_that_are_put_off_until_a_schedule_point(cluster, eventually):
    """flag_ipi, signal_pending_ipi (Zephyr, kernel/ipi.c): row 79.

    One for each CPU, however often it was flagged and by whomever; none for the CPU
    itself, nor for one that is offline.
    """
    ncpus = cluster.ncpus

    def sent():
        cpus = int(cluster.counters()["resched_sent"].sum())
        return cpus + cluster.host_counters()["resched_sent"]

    def flags(point):
        for _ in range(5):
            smp.flag_ipi(range(ncpus))
        if point == "cond_resched":
            smp.cond_resched()
        elif point == "preempt_enable":
            smp.preempt_disable()
            smp.preempt_enable()
        elif point == "signal":
            assert smp.signal_pending_ipi() == ncpus - 1
            assert smp.signal_pending_ipi() == 0

    for point in ("cond_resched", "preempt_enable", "signal", "idle"):
        # Who is on its way to sleep would send what is flagged: each has taken what the
        # point before sent it (a rung CPU is a halted one still), and sleeps.
        cluster.run(int)
        eventually(lambda: {cpu.state for cpu in cluster.cpus} == {"halted"})
        before = sent()
        cluster.run(flags, point, cpus=[1])
        eventually(lambda before=before: sent() == before + ncpus - 1)

    def holds():
        smp.flag_ipi([2])
        seen = shmipi.shared("held")
        seen[0] = 1
        while seen[0] != 2:
            pass

    held = cluster.shared("held", "i8", 1)
    held[0] = 0
    cluster.offline(0)
    try:
        eventually(lambda: cluster.cpus[2].state == "halted")
        before = sent()
        task = cluster.start(holds, cpus=[1])  # no schedule point: it sends nothing
        eventually(lambda: held[0] == 1)
        cluster.smp.flag_ipi("0,2")  # nor does the host, which has none
        assert sent() == before
        assert cluster.smp.signal_pending_ipi() == 1
        assert sent() == before + 1
        held[0] = 2
        task.results()
    finally:
        held[0] = 2
        cluster.online(0)
    assert cluster.smp.signal_pending_ipi() == 0


def test_an_nmi_flags_and_does_not_send(cluster, eventually):
    got = cluster.shared("got", "i8", 2)
    got[:] = 0

    def nmi(info):
        smp.flag_ipi([0])
        try:
            smp.signal_pending_ipi()
        except ClusterStateError:
            shmipi.shared("got")[0] = 1

    cluster.smp.smp_send_nmi_ipi(1, nmi)
    eventually(lambda: got[0])
    cluster.smp.signal_pending_ipi()
