"""The stopper: stop_machine and friends, and what deaths and stalls do to them."""

import errno
import os
import signal
import threading
import time

import pytest

import shmipi
from shmipi import (
    ClusterStateError,
    CpuDiedError,
    CpuOfflineError,
    CsdBusyError,
    IpiTimeoutError,
    RemoteCallError,
    _core,
    smp,
)
from shmipi.machine.process import is_stopped

KILL, STOP = _core.STEP_KILL, _core.STEP_STOP
NCPUS = 4
COUNT = smp.NativeHandler("count")


@pytest.fixture
def cluster(cluster_until_failure):
    with cluster_until_failure(NCPUS, idle="halt") as cluster:
        yield cluster


def where(arg):
    return (smp.smp_processor_id(), arg)


def number(arg):
    return smp.smp_processor_id() * 10 + arg


# ---- stop_machine --------------------------------------------------------------------


def test_the_function_runs_on_the_first_cpu_unless_others_are_named(cluster):
    """multi_cpu_stop, row 56: active_cpus NULL is the first that is online."""
    ran = cluster.percpu("ran", "i8")

    def function(arg):
        ran[smp.smp_processor_id()] += arg
        return smp.irqs_disabled() and not smp.in_hardirq() and -3

    for cpus, expected in (
        (None, [2, 0, 0, 0]),
        ("1,3", [0, 2, 0, 2]),
        ("0-3", [2, 2, 2, 2]),
    ):
        ran[:] = 0
        assert cluster.smp.stop_machine(function, 2, cpus) == -3
        assert ran.tolist() == expected
    cluster.offline(0)
    assert cluster.smp.stop_machine(where) == (1, None)
    assert cluster.smp.stop_machine(where, cpus="0") == 0  # nobody's
    cluster.online(0)


def test_any_result_that_is_not_zero_comes_back(cluster):
    """stop_cpus: "any non zero return value if any returned non zero"."""

    def only(cpu):
        return 7 if smp.smp_processor_id() == cpu else 0

    for cpu in range(NCPUS):
        assert cluster.smp.stop_machine(only, cpu, "0-3") == 7
        assert cluster.smp.stop_cpus("0-3", only, cpu) == 7
    assert cluster.smp.stop_machine(only, 9, "0-3") == 0
    assert cluster.smp.stop_machine(COUNT, cluster.shared("n", "i8", 1)) == 0
    assert cluster.shared("n", "i8", 1)[0] == 1

    def fails(arg):
        raise KeyError(arg)

    with pytest.raises(RemoteCallError, match="KeyError: 'x'"):
        cluster.smp.stop_machine(fails, "x", "1")
    assert cluster.smp.stop_machine(len, "x" * 100_000, "2") == 100_000
    assert len(cluster.smp.stop_machine(bytes, 1_000_000)) == 1_000_000


def test_nothing_else_runs_meanwhile_but_nmis(cluster, background, eventually):
    """No task, handler or softirq, on any CPU; and NMIs do (stop_machine, fidelity)."""
    work = cluster.percpu("work", "i8")
    end = cluster.shared("end", "i8", 4)
    work[:] = end[:] = 0

    def task():
        me = smp.smp_processor_id()
        while not end[0]:
            for _ in range(100):
                work[me] += 1
            smp.smp_call_function_single((me + 1) % NCPUS, COUNT, work)

    def function(_):
        before = work.copy()
        end[1] = 1
        deadline = time.monotonic() + 20
        while not end[2] and time.monotonic() < deadline:
            time.sleep(0.001)
        time.sleep(0.005)
        end[1] = 0
        return before.tolist() == work.tolist() and bool(end[2])

    tasks = cluster.start(task)
    eventually(lambda: work.all())
    for _ in range(5):
        end[1] = end[2] = 0
        thread = background(cluster.smp.stop_machine, function)
        eventually(lambda: end[1])
        # A native NMI is taken by a CPU that is stopped with interrupts off.
        assert cluster.smp.smp_send_nmi_ipi(2, COUNT, 10_000_000, end[3:]) == 1
        eventually(lambda: end[3])  # entered is not yet counted
        calls = [cluster.submit(cpu, abs, -cpu) for cpu in range(NCPUS)]
        time.sleep(0.005)
        assert not any(call.done() for call in calls)
        end[2] = 1
        assert thread.end() is True
        assert [call.result(5) for call in calls] == list(range(NCPUS))
    end[0] = 1
    tasks.results(10)


def test_it_waits_for_sections_and_for_handlers(cluster, eventually, background):
    """Preemption, interrupts or softirqs off hold the stopper off until they are on."""
    flags = cluster.shared("flags", "i8", 2)

    def task(begin, end):
        begin()
        flags[0] = 1
        while not flags[1]:
            time.sleep(0.001)
        flags[1] = 2
        end()
        return "on"

    for begin, end in (
        (smp.preempt_disable, smp.preempt_enable),
        (smp.local_irq_disable, smp.local_irq_enable),
        (smp.local_bh_disable, smp.local_bh_enable),
    ):
        flags[:] = 0
        tasks = cluster.start(task, begin, end, cpus=[2])
        eventually(lambda: flags[0])
        thread = background(cluster.smp.stop_machine, lambda _: int(flags[1]))
        time.sleep(0.03)
        assert thread.is_alive()
        flags[1] = 1
        assert thread.end() == 2
        assert tasks.results(5) == ["on"]


def test_who_does_not_stop_is_named_and_the_others_go_on(cluster, eventually):
    """A deadline with a typed error; the function has not run, and nothing is left."""
    n = cluster.shared("late", "i8", 2)
    n[:] = 0

    def masked():
        smp.local_irq_disable()
        n[0] = 1
        while not n[1]:
            pass
        smp.local_irq_enable()
        return "on"

    tasks = cluster.start(masked, cpus=[3])
    eventually(lambda: n[0])
    for _ in range(2):
        with pytest.raises(IpiTimeoutError, match=r"CPU 3 .*has not run") as caught:
            cluster.smp.stop_machine(where, timeout=1)  # enough for the other CPUs
        assert (caught.value.cpu, caught.value.errno) == (3, errno.ETIMEDOUT)
        assert [cluster.call(cpu, abs, -1, timeout=5) for cpu in range(3)] == [1] * 3
    n[1] = 1
    assert tasks.results(5) == ["on"]
    assert cluster.smp.stop_machine(where) == (0, None)


def test_a_function_that_does_not_end_lets_the_others_go_at_the_deadline(cluster):
    n = cluster.shared("endless", "i8", 1)
    n[0] = 0

    def endless(_):
        while not n[0]:
            pass

    with pytest.raises(
        IpiTimeoutError, match=r"CPU 1 ran the function.*torn"
    ) as caught:
        cluster.smp.stop_machine(endless, cpus="1", timeout=1)
    assert caught.value.cpu == 1
    assert cluster.call(0, abs, -3, timeout=5) == 3
    n[0] = 1
    assert cluster.smp.stop_machine(where, timeout=5) == (0, None)


def test_from_a_handler_nothing_is_done(cluster):
    """Bad input: stop_machine from interrupt context, or where nobody may sleep."""
    ran = cluster.shared("ran_at_all", "i8", 1)
    ran[0] = 0

    def count(_):
        ran[0] += 1

    def attempts():
        for call in (
            lambda: smp.stop_machine(count),
            lambda: smp.stop_one_cpu(0, count),
            lambda: smp.stop_two_cpus(0, 1, count),
            lambda: smp.stop_cpus("0-1", count),
        ):
            with pytest.raises(ClusterStateError, match="cannot wait"):
                call()

    def masked():
        smp.local_irq_disable()
        attempts()
        smp.local_irq_enable()
        smp.preempt_disable()
        attempts()
        smp.preempt_enable()

    cluster.call(1, attempts)
    cluster.run(masked, cpus=[1])
    cluster.smp.stop_one_cpu(1, lambda _: attempts())  # nor in another one
    assert ran[0] == 0
    assert cluster.smp.stop_machine(where) == (0, None)


# ---- one and two CPUs ----------------------------------------------------------------


def test_stop_one_cpu_preempts_its_task(cluster, eventually):
    """Row 57: its value; above the task, which goes on; -ENOENT for one offline."""
    n = cluster.shared("busy", "i8", 2)
    n[:] = 0

    def busy():
        while not n[1]:
            n[0] += 1
        return "ended"

    def look(_):
        before = int(n[0])
        time.sleep(0.005)
        return (smp.in_task(), smp.irqs_disabled(), smp.preempt_count(), n[0] == before)

    tasks = cluster.start(busy, cpus=[1])
    eventually(lambda: n[0])
    assert cluster.smp.stop_one_cpu(1, look) == (True, False, 1, True)
    at = int(n[0])
    eventually(lambda: n[0] > at)
    n[1] = 1
    assert tasks.results(5) == ["ended"]
    assert cluster.run(smp.stop_one_cpu, 2, number, 4, cpus=[2]) == [24]
    cluster.offline(1)
    for call in (
        lambda: cluster.smp.stop_one_cpu(1, where),
        lambda: cluster.smp.stop_two_cpus(0, 1, where),
        lambda: cluster.smp.stop_cpus("1", where),
    ):
        with pytest.raises(CpuOfflineError) as caught:
            call()
        assert caught.value.errno == errno.ENOENT
    assert cluster.smp.stop_cpus("0-1", number, 5) == 5
    cluster.online(1)
    with pytest.raises(CpuOfflineError, match="does not exist"):
        cluster.smp.stop_one_cpu(99, where)


def test_stop_one_cpu_nowait(cluster, eventually):
    """True when it was queued; from a handler, too; the caller's work buffer."""
    n = cluster.shared("nowait", "i8", 2)
    n[:] = 0

    def count(arg):
        n[0] += arg
        while n[1]:
            pass

    work = cluster.smp.CallSingleData(int)
    assert cluster.smp.stop_one_cpu_nowait(2, count, 5, work) is True
    eventually(lambda: n[0] == 5)
    cluster.offline(2)
    assert cluster.smp.stop_one_cpu_nowait(2, count, 5, work) is False
    cluster.online(2)

    def handler():
        work = smp.CallSingleData(int)
        return smp.stop_one_cpu_nowait(2, count, 7, work)

    assert cluster.call(1, handler) is True
    eventually(lambda: n[0] == 12)

    def held():
        smp.preempt_disable()
        n[1] = 1
        while n[1]:
            pass
        smp.preempt_enable()

    tasks = cluster.start(held, cpus=[3])
    eventually(lambda: n[1])
    assert cluster.smp.stop_one_cpu_nowait(3, count, 1, work) is True
    with pytest.raises(CsdBusyError):
        cluster.smp.stop_one_cpu_nowait(3, count, 1, work)
    n[1] = 0
    tasks.results(5)
    eventually(lambda: not work.locked and n[0] == 13)


def test_stops_of_several_do_not_wait_for_each_other(cluster, background):
    """stop_two_cpus in both orders, stop_machine and stop_cpus, from everywhere."""
    n = cluster.shared("unlocked", "i8", 1)
    n[0] = 0

    def two(a, b):
        for _ in range(30):
            assert smp.stop_two_cpus(a, b, number, 1) == 10 * a + 1

    def add(_):
        at = int(n[0])
        time.sleep(0)
        n[0] = at + 1  # torn, unless nobody else runs

    def machine():
        for _ in range(30):
            smp.stop_machine(add)

    def all_of_them():
        for _ in range(30):
            assert smp.stop_cpus("0-3", number, 1) in (1, 11, 21, 31)

    works = [(two, 1, 2), (two, 2, 1), (machine,), (all_of_them,)]
    tasks = [cluster.start(*work, cpus=[cpu]) for cpu, work in enumerate(works)]
    threads = [
        background(lambda: [cluster.smp.stop_machine(add, cpus="3") for _ in range(30)])
        for _ in range(2)
    ]
    for thread in threads:
        thread.end(30)
    for task in tasks:
        task.results(30)
    assert n[0] == 90


def test_a_call_with_preemption_disabled_is_answered_by_who_waits_to_be_stopped(
    cluster, background, eventually
):
    """In PREPARE interrupts are on: Python handlers run, on top of a task, too."""
    n = cluster.shared("crossed", "i8", 3)
    n[:] = 0

    def caller():
        smp.preempt_disable()
        n[0] = 1
        while not n[1]:
            pass
        time.sleep(0.02)  # everybody else has come by now
        smp.on_each_cpu_mask("1-2", lambda _: shmipi.atomic.fetch_add(n, 2, 1))
        smp.preempt_enable()

    def busy():
        while not n[2]:
            pass

    busy_one = cluster.start(busy, cpus=[1])
    tasks = cluster.start(caller, cpus=[0])
    eventually(lambda: n[0])
    thread = background(cluster.smp.stop_machine, where)
    time.sleep(0.02)
    n[1] = 1
    assert thread.end() == (0, None)
    tasks.results(5)
    busy_one.results(5)
    assert n[2] == 2


# ---- deaths and stalls ---------------------------------------------------------------


@pytest.fixture
def stepped(cluster_until_failure):
    with cluster_until_failure(3, idle="halt", steps=True) as cluster:
        yield cluster


TARGET = 1
STEPS = [
    ("multi_ack", 0, False),
    ("multi_ack", 0, True),
    ("multi_ack", 1, False),
    ("multi_ack", 1, True),
    ("multi_park", 0, False),
    ("multi_run", 0, True),
]


def until_stopped(cluster, eventually):
    """It says what step it is at just before it stops: SIGCONT would be too early."""
    pid = cluster.cpus[TARGET].pid
    eventually(lambda: is_stopped(pid))


def patience(action):
    """A death ends the wait; the stopped are waited for as long as others may need."""
    return 20 if action == KILL else 1


def recover(cluster, eventually, action):
    if action == STOP:
        until_stopped(cluster, eventually)
        os.kill(cluster.cpus[TARGET].pid, signal.SIGCONT)
    else:
        eventually(lambda: cluster.cpus[TARGET].state == "dead")
        cluster.online(TARGET, timeout=10)
    assert cluster.smp.stop_machine(where, timeout=10) == (0, None)


@pytest.mark.parametrize("action", [KILL, STOP], ids=["kill", "stop"])
@pytest.mark.parametrize(("step", "skip", "active"), STEPS)
def test_a_cpu_of_it_is_killed_or_stopped(
    stepped, eventually, step, skip, action, active
):
    """In any state: never hung, and the error names it, or it had no more to do."""
    ran = stepped.shared("ran", "i8", 1)
    ran[0] = 0

    def function(_):
        ran[0] += 1
        # Who has yet to go to sleep would find it over, and never sleep.
        here, end = _core.current_machine(), time.monotonic() + 10
        while step == "multi_park" and here.step_hit(TARGET) != step:
            assert time.monotonic() < end
            time.sleep(0.001)
        time.sleep(0.01)  # everybody else sleeps by then
        return 5

    stepped._machine.arm_step(TARGET, step, action, skip)
    cpus = str(TARGET) if active else None
    # At multi_park nobody is waited for in vain: the function ends when it is there.
    timeout = 20 if step == "multi_park" else patience(action)
    start = time.monotonic()
    error = result = None
    try:
        result = stepped.smp.stop_machine(function, cpus=cpus, timeout=timeout)
    except (CpuDiedError, IpiTimeoutError) as caught:
        error = caught
    if error is None:
        assert (result, ran[0], active) == (5, 1, False)
    else:
        assert error.cpu == TARGET
        assert isinstance(error, CpuDiedError) == (action == KILL)
        assert active or ran[0] == 0
    assert time.monotonic() - start < 3 + (0 if action == KILL else patience(action))
    eventually(lambda: stepped._machine.step_hit(TARGET) == step)
    assert [stepped.call(cpu, abs, -1, timeout=5) for cpu in (0, 2)] == [1, 1]
    recover(stepped, eventually, action)


@pytest.mark.parametrize("order", ["dies first", "dies last", "two die"])
def test_others_that_run_the_function_are_not_let_go_when_one_dies(
    cluster, order, eventually
):
    """Nothing runs anywhere until all that live have done; each runs it once."""
    seen = cluster.shared("seen", "f8", (2, NCPUS))  # its end, and the first call after
    runs = cluster.percpu("runs", "i8")
    runs[:] = seen[:] = 0
    gone = {"dies first": (1,), "dies last": (1,), "two die": (1, 2)}[order]

    def function(_):
        cpu = smp.smp_processor_id()
        shmipi.atomic.fetch_add(runs, cpu, 1)
        if cpu in gone:
            time.sleep(0.3 if order == "dies last" else 0.02 * cpu)
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(0.02 if order == "dies last" else 0.3)
        seen[0, cpu] = time.monotonic()

    def note(_):
        seen[1, smp.smp_processor_id()] = time.monotonic()

    def call():
        # Once one runs it, all have their interrupts off.
        eventually(lambda: sum(runs))
        cluster.smp.smp_call_function(note, None, False)

    calls = threading.Thread(target=call)
    calls.start()
    with pytest.raises(CpuDiedError, match="half done") as caught:
        cluster.smp.stop_machine(function, cpus="0-2", timeout=5)
    calls.join()
    assert caught.value.cpu in gone
    living = [cpu for cpu in range(NCPUS) if cpu not in gone]
    for cpu in living:
        assert cluster.call(cpu, abs, -1, timeout=5) == 1
    # They were queued while all were stopped; a call that waits may overtake them.
    eventually(lambda: all(seen[1, cpu] for cpu in living))
    done = max(seen[0, cpu] for cpu in living)
    assert all(seen[1, cpu] > done for cpu in living), seen
    assert list(runs) == [1, 1, 1, 0]
    for cpu in gone:
        cluster.online(cpu, timeout=10)
    assert cluster.smp.stop_machine(where, timeout=10) == (0, None)


@pytest.mark.parametrize("action", [KILL, STOP], ids=["kill", "stop"])
@pytest.mark.parametrize(
    ("step", "skip"),
    [("multi_queue", 0), ("multi_queue", 1), ("multi_queue", 2)],
)
def test_the_sender_is_killed_or_stopped(stepped, eventually, step, skip, action):
    """A CPU that calls it: what it has queued, or not, holds nobody for ever."""
    stepped._machine.arm_step(TARGET, step, action, skip)

    def task():
        return smp.stop_machine(where, timeout=0.3)

    tasks = stepped.start(task, cpus=[TARGET])
    eventually(lambda: stepped._machine.step_hit(TARGET) == step)
    if action == KILL:
        with pytest.raises(CpuDiedError):
            tasks.results(5)
    eventually(
        lambda: [stepped.call(cpu, abs, -1, timeout=5) for cpu in (0, 2)] == [1, 1]
    )
    if action == STOP:
        time.sleep(0.35)
        until_stopped(stepped, eventually)
        os.kill(stepped.cpus[TARGET].pid, signal.SIGCONT)
        with pytest.raises(RemoteCallError, match="IpiTimeoutError"):
            tasks.results(5)
    else:
        eventually(lambda: stepped.cpus[TARGET].state == "dead")
        stepped.online(TARGET, timeout=10)
    assert stepped.smp.stop_machine(where, timeout=10) == (0, None)


@pytest.mark.parametrize("what", ["stop_machine", "stop_cpus"])
def test_who_queues_for_several_cpus_is_alone_at_it(
    stepped, background, eventually, what
):
    """stop_cpus_mutex: works stand in one order everywhere, however long that takes.

    The first sender is stopped when one of its works is queued. Were the second's to
    stand before its others, each would wait on one CPU for the other.
    """
    met = stepped.shared(f"met.{what}", "i8", 2)
    met[:] = 0

    def meet(who):
        shmipi.atomic.fetch_add(met, who, 1)
        end = time.monotonic() + 10
        while shmipi.atomic.load(met, who) < 2:
            assert time.monotonic() < end, "the other CPU runs another's work"
        return who + 1

    def send(who, stop=None):
        if what == "stop_machine":
            return (stop or smp).stop_machine(meet, who, "0,2", timeout=20)
        return (stop or smp).stop_cpus("0,2", meet, who, timeout=20)

    step = "multi_queue" if what == "stop_machine" else "pushed"
    stepped._machine.arm_step(TARGET, step, STOP, 0)
    tasks = stepped.start(send, 0, cpus=[TARGET])
    eventually(lambda: stepped._machine.step_hit(TARGET) == step)
    thread = background(send, 1, stepped.smp)
    time.sleep(0.05)  # the second would have queued all of its works by now
    until_stopped(stepped, eventually)
    os.kill(stepped.cpus[TARGET].pid, signal.SIGCONT)
    assert tasks.results(30) == [1]
    assert thread.end(30) == 2
    assert list(met) == [2, 2]


@pytest.mark.parametrize("action", [KILL, STOP], ids=["kill", "stop"])
def test_who_was_to_move_to_the_next_state_is_killed_or_stopped(
    stepped, eventually, action
):
    """The last one to acknowledge advances; if it does not come to it, others do."""
    stepped._machine.arm_step(TARGET, "multi_state", action, 0)
    kind = CpuDiedError if action == KILL else IpiTimeoutError
    with pytest.raises(kind) as caught:
        stepped.smp.stop_machine(where, cpus=str(TARGET), timeout=patience(action))
    assert caught.value.cpu == TARGET
    assert stepped._machine.step_hit(TARGET) == "multi_state"
    assert [stepped.call(cpu, abs, -1, timeout=5) for cpu in (0, 2)] == [1, 1]
    recover(stepped, eventually, action)
