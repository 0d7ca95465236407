"""Softirqs and contexts: kernel/softirq.c and linux/preempt.h, as in shmipi.smp."""

import errno
import os
import signal
import time
import warnings
from functools import partial

import pytest

import shmipi
from shmipi import ClusterStateError, IrqError, NativeHandler, _core, smp
from shmipi.users import scheduler

HI, TIMER, RX, TASKLET = (
    smp.HI_SOFTIRQ,
    smp.NET_TX_SOFTIRQ,
    smp.IRQ_POLL_SOFTIRQ,
    smp.TASKLET_SOFTIRQ,
)

# What happens is written into the shared array "log": entry 0 is how much.


def note(what):
    log = shmipi.shared("log")
    log[1 + shmipi.atomic.fetch_add(log, 0, 1)] = what


def entries(cluster=None):
    log = cluster.shared("log", "i8", 4096) if cluster else shmipi.shared("log")
    return log[1 : 1 + log[0]].tolist()


def raises(*numbers):
    """A handler that raises softirqs."""

    def handler(info):
        for nr in numbers:
            smp.raise_softirq(nr)
        note(100)

    return handler


def noting(nr):
    return lambda: note(nr)


def spin(condition, seconds=10.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
    return True


def ksoftirqd(tasks, cpu=1):
    """The thread of a CPU among `tasks`, None: it was not needed yet."""
    return next((task for task in tasks if task.name == f"ksoftirqd/{cpu}"), None)


@pytest.fixture(autouse=True)
def actions(cluster):
    cluster.shared("log", "i8", 4096)[:] = 0
    for nr in (HI, TIMER, RX):
        cluster.smp.open_softirq(nr, noting(nr))
    yield
    assert cluster.run(smp.local_softirq_pending) == [0, 0, 0]


def run_on(cluster, func, cpu=1):
    return cluster.run(func, cpus=[cpu])[0]


# ---- when they run -------------------------------------------------------------------


@pytest.mark.parametrize("doorbell", ["futex", "signal"])
def test_lowest_first_when_the_handler_has_returned(boot, doorbell):
    """On an idle CPU, and on top of a task: with interrupts on, and neither handler
    nor task."""
    cluster = boot(2, doorbell=doorbell)
    cluster.shared("log", "i8", 4096)
    where = cluster.shared("where", "i8", 6)
    for nr in (HI, TIMER):
        cluster.smp.open_softirq(nr, noting(nr))

    def rx():
        shmipi.shared("where")[:] = (
            smp.in_serving_softirq(),
            smp.in_softirq() and smp.in_interrupt(),
            smp.in_task(),
            smp.in_hardirq(),
            smp.irqs_disabled(),
            smp.preempt_count(),
        )
        note(RX)

    cluster.smp.open_softirq(RX, rx)
    cluster.smp.smp_call_function_single(1, raises(RX, TIMER, HI))
    # An entry is counted before it is written.
    spin(lambda: entries(cluster) == [100, HI, TIMER, RX])
    assert entries(cluster) == [100, HI, TIMER, RX]
    assert where.tolist() == [1, 1, 0, 0, 0, 0x100]

    def task():
        note(1000)
        return spin(lambda: len(entries()) == 9) and entries()[4:]

    running = cluster.start(task, cpus=[1])
    spin(lambda: 1000 in entries(cluster))
    cluster.smp.smp_call_function_single(1, raises(RX, TIMER, HI))
    assert running.results(10) == [[1000, 100, HI, TIMER, RX]]
    assert [cluster.smp.kstat_softirqs_cpu(nr, 1) for nr in (HI, TIMER, RX, 9)] == [
        2,
        2,
        2,
        0,
    ]


def test_never_nested_and_interrupts_come_in_between(cluster):
    """What a handler on top of a softirq raises runs after it, also a lower one.

    By ksoftirqd or the next interrupt, for the first one takes more than 2 ms.
    """

    def rx():
        note(RX)
        spin(lambda: 100 in entries()[1:])  # the second handler's
        end = time.monotonic() + 0.003
        spin(lambda: time.monotonic() > end)
        note(-RX)

    cluster.smp.open_softirq(RX, rx)

    def task():
        # The end of any interrupt, the tick's too, runs it before ksoftirqd comes.
        spin(lambda: -RX in entries())
        spin(lambda: HI in entries() or smp.cond_resched())
        return entries()

    running = cluster.start(task, cpus=[1])
    cluster.smp.smp_call_function_single(1, raises(RX))
    spin(lambda: RX in entries(cluster))
    cluster.smp.smp_call_function_single(1, raises(HI))
    assert running.results(10) == [[100, RX, 100, -RX, HI]]


def test_a_handler_on_top_of_a_softirq_gives_its_place_back(cluster):
    """Who looks from outside then sees the softirq's action again."""

    def softirq_action():
        note(RX)
        spin(lambda: 100 in entries()[1:])  # the handler on top
        note(-RX)
        spin(lambda: 5000 in entries())
        note(6000)

    cluster.smp.open_softirq(RX, softirq_action)
    for task in (False, True):
        cluster.shared("log", "i8", 4096)[:] = 0
        running = task and cluster.start(
            lambda: spin(lambda: 6000 in entries()), cpus=[1]
        )
        cluster.smp.smp_call_function_single(1, raises(RX))
        spin(lambda: RX in entries(cluster))
        before = cluster._machine.doing(1)[:3]  # which, its name, and since when
        cluster.smp.smp_call_function_single(1, raises())
        spin(lambda: -RX in entries(cluster))
        after = cluster._machine.doing(1)[:3]
        note_host = cluster.shared("log", "i8", 4096)
        note_host[1 + shmipi.atomic.fetch_add(note_host, 0, 1)] = 5000
        spin(lambda: 6000 in entries(cluster))
        assert (before[1] or "").endswith("softirq_action")
        assert after == before
        if running:
            assert running.results(10) == [True]


def test_an_idle_cpu_takes_interrupts_while_it_runs_one(cluster):
    """The same on a CPU without a task: its softirq is interrupted, too."""

    def rx():
        note(RX)
        spin(lambda: 100 in entries()[1:])
        note(-RX)

    cluster.smp.open_softirq(RX, rx)
    cluster.smp.smp_call_function_single(1, raises(RX))
    spin(lambda: RX in entries(cluster))
    cluster.smp.smp_call_function_single(1, raises(HI))
    wanted = [100, RX, 100, -RX, HI]
    spin(lambda: entries(cluster) == wanted or len(entries(cluster)) > len(wanted))
    assert entries(cluster) == wanted


def test_ten_times_and_the_rest_is_ksoftirqds(cluster):
    """It goes on where the task lets others run, and when the CPU is idle: ten times a
    step of the thread, at most."""
    left = cluster.shared("left", "i8", 1)

    def tasklet():
        note(TASKLET)
        shmipi.shared("left")[0] -= 1
        if shmipi.shared("left")[0]:
            smp.raise_softirq(TASKLET)

    cluster.smp.open_softirq(TASKLET, tasklet)

    def task():
        def interrupts():
            return _core.current_machine().interrupt_causes(1)[2]

        most = 0
        for _ in range(500):  # 2 ms may be over before it has run ten times
            shmipi.shared("log")[:] = 0
            shmipi.shared("left")[0] = 25
            smp.smp_call_function_single(1, raises(), None, True)
            before = interrupts()
            smp.local_bh_disable()
            smp.raise_softirq(TASKLET)
            smp.local_bh_enable()
            once = entries().count(TASKLET)
            pending = smp.local_softirq_pending()
            steps = ksoftirqd(scheduler.ps()).switches
            alone = interrupts() == before  # the end of any, a tick's, runs more
            if alone:
                assert once <= 10
                assert pending == 1 << TASKLET
            smp.cond_resched()
            assert not alone or once < entries().count(TASKLET)
            while smp.local_softirq_pending():
                smp.cond_resched()
            assert entries().count(TASKLET) == 25
            if interrupts() != before:
                continue
            most = max(most, once)
            assert ksoftirqd(scheduler.ps()).switches >= steps + -(-(25 - once) // 10)
            if most == 10:
                break
        left = shmipi.shared("left")
        left[0] = 25
        smp.raise_softirq(TASKLET)
        return most

    assert run_on(cluster, task) == 10
    spin(lambda: left[0] == 0)


def test_ksoftirqd_and_a_task_take_turns(boot):
    """A thread of its CPU, on its run queue: softirqs that never end and a task that
    never waits both get on, whether the task runs first or comes behind."""
    cluster = boot(2)
    ran, go = cluster.shared("ran", "i8", 1), cluster.shared("go", "i8", 1)
    go[0] = 1

    def tasklet():
        shmipi.shared("ran")[0] += 1
        if shmipi.shared("go")[0]:
            smp.raise_softirq(TASKLET)

    cluster.smp.open_softirq(TASKLET, tasklet)

    def busy(begin):
        if begin:
            smp.raise_softirq(TASKLET)
        turns, lost = 0, 0.0
        now, had = time.monotonic(), time.thread_time()
        end = now + 0.3
        while now < end:
            was, used = now, had
            now, had = time.monotonic(), time.thread_time()
            lost = max(lost, now - was - (had - used))
            turns += 1
        return turns, lost

    sched = cluster.users.scheduler
    for begin in (True, False):
        for _ in range(5):  # again where the CPU, or we, had no core for long
            before = ran[0], ksoftirqd(sched.ps()), time.monotonic_ns()
            turns, lost = run_on(cluster, partial(busy, begin))
            wall = time.monotonic_ns() - before[2]
            thread = ksoftirqd(sched.ps())
            if lost < 0.05 and wall < 0.4e9:
                break
        assert turns > 1000
        assert ran[0] > before[0] + 100
        assert (thread.name, thread.cpu, thread.bound) == ("ksoftirqd/1", 1, True)
        shared = thread.runtime_ns - (before[1].runtime_ns if before[1] else 0)
        assert 0.1 * wall < shared < 0.9 * wall
    os.kill(cluster.cpus[1].pid, signal.SIGKILL)
    spin(lambda: cluster.cpus[1].state == "dead")
    cluster.online(1)
    assert run_on(cluster, partial(busy, True))[0] > 1000
    # The same thread, of a new process.
    assert ksoftirqd(sched.ps()).id == thread.id
    go[0] = 0
    spin(lambda: ksoftirqd(sched.ps()).state == "sleeping")


def test_held_off_until_the_last_enable(cluster):
    def task():
        smp.local_bh_disable()
        smp.local_bh_disable()
        inside = smp.in_task(), smp.in_softirq(), smp.in_serving_softirq()
        smp.raise_softirq(RX)
        smp.raise_softirq(HI)
        count = smp.preempt_count()
        smp.cond_resched()
        note(1000)
        smp.local_bh_enable()
        note(1001)
        smp.local_bh_enable()
        note(1002)
        return inside, count, entries()

    assert run_on(cluster, task) == (
        (True, True, False),
        0x400,
        [1000, 1001, HI, RX, 1002],
    )


def test_raised_in_a_task_it_waits_for_ksoftirqd(cluster):
    """raise_softirq() wakes it: at once it does not run, nor is the task preempted."""

    def answers_late(info):
        spin(lambda: entries().count(HI) == 2)
        note(100)

    def task():
        smp.local_irq_disable()  # the end of any interrupt would run it
        smp.raise_softirq(HI)
        note(1000)
        smp.local_irq_enable()
        smp.cond_resched()
        note(1001)
        smp.raise_softirq(HI)
        smp.smp_call_function_single(2, answers_late)  # a wait lets others run
        return entries()

    assert run_on(cluster, task) == [1000, HI, 1001, HI, 100]


def test_also_after_a_drain_in_a_task(cluster):
    """flush_smp_call_function_queue() runs what the calls have raised."""

    def task():
        smp.local_irq_disable()
        smp.smp_call_function_single_async(
            1, smp.CallSingleData(raises(RX))
        )  # here: raised in a task, so ksoftirqd's
        note(1000)
        smp.local_irq_enable()
        smp.flush_smp_call_function_queue()
        note(1001)
        return entries()

    assert run_on(cluster, task) == [100, 1000, RX, 1001]


def test_a_native_action_gets_its_info(cluster):
    counted = cluster.shared("counted", "i8", 1)
    counted[0] = 0
    cluster.smp.open_softirq(TIMER, NativeHandler("count"), counted)
    cluster.smp.smp_call_function_single(1, raises(TIMER, RX))
    spin(lambda: entries(cluster) == [100, RX])  # counted before it is written
    assert counted[0] == 1


# ---- what they may not ---------------------------------------------------------------


def test_calls_from_a_softirq_warn(boot):
    """WARN_ON_ONCE(!in_task()), also of a call that nobody waits for."""
    cluster = boot(3)
    cluster.shared("log", "i8", 4096)

    def rx():
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            smp.smp_call_function_single(2, int, 0, False)
            smp.might_sleep()
            note(sum("interrupt context" in str(w.message) for w in caught))
            note(sum("sleeping function called" in str(w.message) for w in caught))
        try:
            smp.wait_for_interrupt(0.1)
        except ClusterStateError as error:
            note("a softirq cannot wait" in str(error))

    cluster.smp.open_softirq(RX, rx)
    cluster.smp.smp_call_function_single(1, raises(RX))
    spin(lambda: len(entries(cluster)) == 4 and entries(cluster)[-1])
    assert entries(cluster) == [100, 1, 1, 1]


@pytest.mark.parametrize(
    ("enter", "leave", "count"),
    [
        ("preempt_disable", "preempt_enable", 1),
        ("local_bh_disable", "local_bh_enable", 0x200),
        ("local_irq_disable", "local_irq_enable", 0),
    ],
)
def test_might_sleep_warns_where_nothing_may_wait(cluster, enter, leave, count):
    def task():
        assert smp.preemptible()
        smp.might_sleep()
        getattr(smp, enter)()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            smp.might_sleep()
        seen = smp.preemptible(), smp.preempt_count()
        getattr(smp, leave)()
        return seen, [w.category.__name__ for w in caught]

    assert run_on(cluster, task) == ((False, count), ["ShmipiWarning"])


def test_the_tasks_signal_is_raised_in_the_task(cluster):
    """Not in the softirq on top of it, which goes on to its end."""

    def rx():
        os.kill(os.getpid(), signal.SIGUSR1)
        end = time.monotonic() + 0.01
        while time.monotonic() < end:
            pass
        note(RX)

    cluster.smp.open_softirq(RX, rx)

    def task():
        def handler(number, frame):
            raise LookupError(number)

        old = signal.signal(signal.SIGUSR1, handler)
        try:
            smp.smp_call_function_single(2, int, 0)
            smp.local_bh_disable()
            smp.raise_softirq(RX)
            smp.local_bh_enable()
            spin(lambda: False, 1)
        except LookupError:
            return entries()
        finally:
            signal.signal(signal.SIGUSR1, old)

    assert run_on(cluster, task) == [RX]


def test_what_an_action_raises_is_unraisable(cluster):
    """The next one runs, and the task goes on."""
    before = cluster.counters()["unraisable"][1]

    def hi():
        smp.local_irq_disable()
        smp.preempt_disable()
        raise LookupError

    cluster.smp.open_softirq(HI, hi)

    def task():
        smp.local_bh_disable()
        smp.raise_softirq(RX)
        smp.raise_softirq(HI)
        smp.local_bh_enable()
        return entries(), smp.preemptible()

    assert run_on(cluster, task) == ([RX], True)
    assert cluster.counters()["unraisable"][1] == before + 1


def test_softirqs_held_off_hold_off_the_takedown(cluster, background):
    """local_bh_disable() counts as preempt_disable() does: the stopper waits."""

    def task():
        smp.local_bh_disable()
        note(1000)
        end = time.monotonic() + 0.2
        while time.monotonic() < end:
            smp.cond_resched()
        note(1001)
        smp.local_bh_enable()
        note(1002)

    running = cluster.start(task, cpus=[1])
    spin(lambda: entries(cluster))
    taking = background(cluster.offline, 1)
    taking.end(10)
    seen = entries(cluster)
    cluster.online(1)
    running.results(10)
    assert 1001 in seen


# ---- bad input -----------------------------------------------------------------------


def test_bad_input(cluster):
    for nr, action in ((10, int), (-1, int), (RX, None)):
        with pytest.raises(IrqError) as raised:
            cluster.smp.open_softirq(nr, action)
        assert raised.value.errno == errno.EINVAL
    with pytest.raises(ValueError, match="softirq 10"):
        cluster.smp.kstat_softirqs_cpu(10, 0)
    with pytest.raises(ClusterStateError):
        cluster.smp.raise_softirq(HI)
    with pytest.raises(ClusterStateError):
        cluster.smp.local_bh_disable()
    assert not cluster.smp.in_softirq()
    assert cluster.smp.might_sleep() is None

    def task():
        for wrong, error in (
            (lambda: smp.raise_softirq(10), ValueError),
            (lambda: smp.raise_softirq(smp.SCHED_SOFTIRQ), ClusterStateError),
            (smp.local_bh_enable, ClusterStateError),
        ):
            with pytest.raises(error):
                wrong()
        return smp.preempt_count()

    assert run_on(cluster, task) == 0


def test_a_task_that_ends_with_softirqs_disabled_is_warned_of(boot, capfd):
    cluster = boot(2)
    assert run_on(cluster, smp.local_bh_disable) is None
    assert run_on(cluster, smp.preempt_count) == 0
    assert "ended with local_bh_disable() in force" in capfd.readouterr().err
