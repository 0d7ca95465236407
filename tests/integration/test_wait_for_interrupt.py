"""smp.wait_for_interrupt: a task that halts until its CPU has taken an interrupt."""

import os
import signal
import time
from pathlib import Path

import pytest

import shmipi
from shmipi import ClusterStateError, CpuDiedError, RemoteCallError, _core, atomic, smp
from shmipi.names import DOORBELLS

LONG_S = 20.0  # a wake-up that is lost is not made good by chance in that time


def count(*_):
    atomic.fetch_add(shmipi.shared("n"), smp.smp_processor_id(), 1)


@pytest.fixture
def halted(boot, background, eventually):
    """`halted(func, **options)`: a machine whose CPU 1 waits in task `func`."""

    def start(func, ncpus=3, **options):
        cluster = boot(ncpus, **{"idle": "halt", **options})
        cluster.shared("n", "i8", ncpus)
        cluster.percpu("mark", "i8")
        cluster.run(int)
        thread = background(lambda: cluster.run(func, cpus=[1]))
        eventually(lambda: is_waiting(cluster))
        return cluster, thread

    return start


def is_waiting(cluster, cpu=1):
    busy = cluster._machine.slot(cpu).task  # the task's name
    return busy and cluster.cpus[cpu].state == "halted"


def wait_once():
    return smp.wait_for_interrupt(LONG_S)


# ---- what ends it --------------------------------------------------------------------


@pytest.mark.parametrize("doorbell", DOORBELLS)
def test_every_kind_of_interrupt_ends_it(boot, background, eventually, doorbell):
    cluster = boot(3, idle="halt", doorbell=doorbell)
    n = cluster.shared("n", "i8", 3)
    cells = cluster.shared("cells", "i8", 1)
    virq = cluster.irq.irq_reserve_ipi(None, "1")
    cluster.irq.request_percpu_irq(virq, count, "mine", 0)
    cluster.irq.enable_percpu_irq_mask(virq)
    native, noop = smp.NativeHandler("count"), smp.NativeHandler("noop")
    ways = {
        "call": lambda: cluster.call(1, count),
        "native": lambda: cluster.smp.smp_call_function_single(1, native, cells),
        "no wait": lambda: cluster.smp.smp_call_function_single(1, count, None, False),
        "submit": lambda: cluster.submit(1, count),
        "many": lambda: cluster.smp.smp_call_function_many([1], count),
        "own csd": lambda: cluster.smp.smp_call_function_single_async(1, csd),
        "irq": lambda: cluster.irq.ipi_send_single(virq, 1),
        "reschedule": lambda: cluster.smp.smp_send_reschedule(1),
        "nmi": lambda: cluster.smp.smp_send_nmi_ipi(1, count, 10**7),
        "native nmi": lambda: cluster.smp.smp_send_nmi_ipi(1, noop, 10**7),
        "from a cpu": lambda: cluster.run(from_there, cpus=[2]),
    }
    csd = cluster.smp.CallSingleData(count)

    def from_there():
        # Nobody waits: who does so for 10 ms rings once more.
        smp.smp_call_function_single(1, count, None, False)

    for name, send in ways.items():
        before = int(n[1] + cells[0])
        thread = background(lambda: cluster.run(wait_once, cpus=[1]))
        eventually(lambda: is_waiting(cluster))
        send()
        assert thread.end() == [True], name
        handled = int(n[1] + cells[0]) - before
        assert handled == (name not in ("reschedule", "native nmi")), name
    assert cluster.counters()["rekicked"].sum() == 0


def test_after_its_time_it_returns_false(halted):
    def nap(seconds):
        start = time.monotonic()
        came = smp.wait_for_interrupt(seconds)
        return came, time.monotonic() - start

    def naps():
        came = smp.wait_for_interrupt(timeout=0.3)
        while not came and not shmipi.shared("n")[0]:  # it was not seen yet
            came = smp.wait_for_interrupt(timeout=0.3)
        return came

    cluster, thread = halted(naps)
    shmipi.shared("n")[0] = 1
    assert thread.end() == [False]
    ((came, took),) = cluster.run(nap, 0.1, cpus=[2])
    assert not came
    assert took >= 0.1
    ((came, took),) = cluster.run(nap, 0, cpus=[2])
    assert not came
    for wrong in (-1, float("nan")):
        with pytest.raises(RemoteCallError) as error:
            cluster.run(nap, wrong, cpus=[2])
        assert isinstance(error.value.__cause__, ValueError)


def test_handlers_run_while_it_halts_and_interrupts_are_on(halted):
    def task():
        before = smp.irqs_disabled()
        while shmipi.shared("n")[1] < 3:
            assert smp.wait_for_interrupt(LONG_S)
        return before, smp.irqs_disabled(), smp.in_task()

    cluster, thread = halted(task)
    assert cluster.call(1, smp.in_hardirq)
    assert cluster.call(1, smp.irqs_disabled)
    for _ in range(3):
        cluster.call(1, count)
    assert thread.end() == [(False, False, True)]


def test_the_task_is_kicked_again_afterwards(halted, eventually):
    def task():
        smp.wait_for_interrupt(LONG_S)
        shmipi.percpu("mark")[1] = 1
        end = time.monotonic() + LONG_S
        while not shmipi.shared("n")[1] and time.monotonic() < end:
            pass
        return time.monotonic() < end

    cluster, thread = halted(task)
    cluster.smp.smp_send_reschedule(1)
    eventually(lambda: shmipi.percpu("mark")[1])
    assert cluster.cpus[1].state == "running"
    cluster.call(1, count)
    assert thread.end() == [True]
    assert cluster.counters()["kicks_received"][1] > 0


def test_of_cooperative_cpus_it_is_a_point_where_interrupts_are_taken(
    halted, eventually
):
    def task():
        came = smp.wait_for_interrupt(LONG_S)
        shmipi.percpu("mark")[1] = 1
        end = time.monotonic() + 5
        while not shmipi.shared("n")[0] and time.monotonic() < end:
            pass  # what comes here waits
        return came, smp.wait_for_interrupt(0), time.monotonic() < end

    cluster, thread = halted(task, kick=False)
    cluster.call(1, count)
    eventually(lambda: shmipi.percpu("mark")[1])
    future = cluster.submit(1, count)
    time.sleep(0.1)
    assert not future.done()
    cluster.call(0, count)
    assert thread.end() == [(True, True, True)]
    future.result(5)


# ---- no wake-up is lost --------------------------------------------------------------


def test_one_that_came_while_interrupts_were_disabled_makes_it_return(boot, eventually):
    cluster = boot(2, idle="halt")
    go = cluster.shared("go", "i8", 2)

    def task():
        results = []
        for handler in range(2):
            smp.local_irq_disable()
            atomic.store(go, 0, handler + 1)
            while atomic.load(go, 1) <= handler:
                pass
            start = time.monotonic()
            came = smp.wait_for_interrupt(LONG_S)
            results += [came, smp.irqs_disabled(), time.monotonic() - start < 5]
            # Disabled: no more handler runs, nor is what came taken twice.
            results.append(smp.wait_for_interrupt(0))
            smp.local_irq_enable()
        return results

    call = cluster._machine.post(1, task, (), None, True)
    for turn, func in enumerate([smp.NativeHandler("noop"), id]):
        eventually(lambda turn=turn: go[0] == turn + 1)
        cluster.smp.smp_call_function_single(1, func, None, False)
        atomic.store(go, 1, turn + 1)
    assert cluster._machine.collect(call, 1, 10.0) == [True, True, True, False] * 2


@pytest.mark.parametrize("doorbell", DOORBELLS)
@pytest.mark.parametrize("handler", ["python", "native"])
def test_a_condition_looked_at_with_interrupts_disabled_is_never_missed(
    boot, doorbell, handler
):
    """The kernel's idle loop: each interrupt comes at another moment of it."""
    cluster = boot(2, idle="halt", doorbell=doorbell)
    cells = cluster.shared("n", "i8", 2)
    func = smp.NativeHandler("count") if handler == "native" else count
    rounds = 400

    def sleeper():
        late = 0
        for turn in range(1, rounds + 1):
            smp.local_irq_disable()
            while cells[1] < turn:
                late += not smp.wait_for_interrupt(5.0)
            smp.local_irq_enable()
            atomic.store(cells, 0, turn)
            for _ in range(turn * 7 % 50):
                pass
        return late

    def sender():
        for turn in range(1, rounds + 1):
            smp.smp_call_function_single(1, func, cells[1:], False)
            end = time.monotonic() + 10
            while atomic.load(cells, 0) < turn and time.monotonic() < end:
                pass
            for _ in range(turn * 13 % 400):  # it may be anywhere between two halts
                pass

    results = cluster.run(
        lambda: sender() if smp.smp_processor_id() == 0 else sleeper()
    )
    assert results == [None, 0]
    assert cells[1] == rounds


@pytest.mark.parametrize("doorbell", DOORBELLS)
@pytest.mark.parametrize("step", ["halt", "halted", "wake"])
def test_stopped_at_each_step_of_the_halt(boot, eventually, doorbell, step):
    cluster = boot(2, idle="halt", doorbell=doorbell, steps=True)
    cluster.shared("n", "i8", 2)
    cluster.run(count)
    pid = cluster.cpus[1].pid

    def task():
        shmipi.shared("n")[1] = 5
        while not smp.wait_for_interrupt(0.05):  # it halts again until it is stopped
            pass
        return True

    call = cluster._machine.post(1, task, (), None, True)
    eventually(lambda: shmipi.shared("n")[1] == 5)
    cluster._machine.arm_step(1, step, _core.STEP_STOP)
    eventually(lambda: cluster._machine.step_hit(1) == step)
    eventually(lambda: stopped(pid))
    cluster.smp.smp_call_function_single(1, smp.NativeHandler("noop"), None, False)
    time.sleep(0.02)
    start = time.monotonic()
    os.kill(pid, signal.SIGCONT)
    assert cluster._machine.collect(call, 1, 10.0)
    assert time.monotonic() - start < 5


def stopped(pid):
    text = Path(f"/proc/{pid}/stat").read_text()
    return text.rpartition(")")[2].split()[0] == "T"


# ---- where it may not be, and what ends it otherwise ---------------------------------


def test_not_in_a_handler_nor_on_the_host(boot):
    cluster = boot(2, idle="halt")
    for where in (smp, cluster.smp):
        with pytest.raises(ClusterStateError, match="the host is no CPU"):
            where.wait_for_interrupt(1.0)
    with pytest.raises(RemoteCallError) as error:
        cluster.call(1, smp.wait_for_interrupt, 1.0)
    assert isinstance(error.value.__cause__, ClusterStateError)
    assert "IPI handler" in str(error.value)


def test_a_signal_of_the_tasks_own_ends_it(halted, eventually):
    def task():
        def handler(*_):
            shmipi.percpu("mark")[1] += 1
            raise LookupError("mine")

        signal.signal(signal.SIGUSR1, handler)
        smp.wait_for_interrupt(LONG_S)

    cluster, thread = halted(task)
    os.kill(cluster.cpus[1].pid, signal.SIGUSR1)
    with pytest.raises(RemoteCallError) as error:
        thread.end()
    assert isinstance(error.value.__cause__, LookupError)
    assert cluster.call(1, int) == 0
    assert shmipi.percpu("mark")[1] == 1


def test_offline_and_online_while_it_waits(halted, eventually):
    def task():
        while not shmipi.shared("n")[1]:
            smp.wait_for_interrupt(LONG_S)
        return True

    cluster, thread = halted(task)
    cluster.offline(1)
    assert cluster.cpus[1].state == "offline"
    cluster.online(1)
    cluster.call(1, count, timeout=5)
    assert thread.end() == [True]


def test_killed_while_it_waits(halted):
    cluster, thread = halted(wait_once)
    os.kill(cluster.cpus[1].pid, signal.SIGKILL)
    with pytest.raises(CpuDiedError):
        thread.end()
    cluster.online(1)
    assert cluster.call(1, int) == 0


def test_the_machines_end_is_not_held_up(halted):
    cluster, thread = halted(lambda: smp.wait_for_interrupt())
    start = time.monotonic()
    cluster.shutdown()
    assert time.monotonic() - start < 1.5  # a busy CPU is killed after two
    with pytest.raises((RemoteCallError, shmipi.ShmipiError)):
        thread.end()


@pytest.mark.parametrize("idle", ["poll", "haltpoll"])
def test_it_polls_first_where_an_idle_cpu_does(boot, idle):
    cluster = boot(2, idle=idle)

    def task():
        return [smp.wait_for_interrupt(LONG_S) for _ in range(50)]

    call = cluster._machine.post(1, task, (), None, True)
    while not cluster._machine.done(call):
        cluster.call(1, int)
    assert cluster._machine.collect(call, 1, 5.0) == [True] * 50
    assert (cluster.counters()["halts"][1] == 0) == (idle == "poll")
