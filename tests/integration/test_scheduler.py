"""shmipi.users.scheduler: tasks of run queues, their wake-ups, and where they run."""

import errno
import os
import pickle
import signal
import time

import pytest

import shmipi
from shmipi import AffinityError, CpuDiedError, NoTaskError, RemoteCallError, smp
from shmipi.machine.process import is_stopped
from shmipi.users import scheduler
from shmipi.users.scheduler import (
    TASK_INTERRUPTIBLE,
    TASK_RUNNING,
    TASK_UNINTERRUPTIBLE,
)
from tests.conftest import shared_cluster

LONG_S = 20.0
GO, DONE, SEEN, STOP = range(4)


@pytest.fixture(scope="module")
def machine():
    with shared_cluster(4, idle="halt") as cluster:
        cluster.shared("s", "i8", 16)
        yield cluster


@pytest.fixture(autouse=True)
def fresh(request):
    if "machine" not in request.fixturenames:
        return
    cluster = request.getfixturevalue("machine")
    cluster.shared("s", "i8", 16)[:] = 0
    for cpu in range(4):
        cluster.users.scheduler._machine.sched_llc(cpu, 0)


# ---- tasks ---------------------------------------------------------------------------


def steps(n):
    cpus = set()
    for _ in range(n):
        cpus.add(smp.smp_processor_id())
        yield
    return sorted(cpus)


def plain(a, b=1):
    return a + b, smp.in_task(), scheduler.current() is not None


def fails():
    yield
    raise ValueError("no")


def sleeper(shared):
    """One more for each that GO counts; the kernel's wait loop."""
    while True:
        scheduler.set_current_state(TASK_INTERRUPTIBLE)
        if shared[DONE] != shared[GO]:
            scheduler.set_current_state(TASK_RUNNING)
            shared[DONE] += 1
            shared[SEEN] = smp.smp_processor_id()
        elif scheduler.kthread_should_stop():
            scheduler.set_current_state(TASK_RUNNING)
            return int(shared[DONE])
        else:
            yield


class Steps:
    """A task that pickles: where it ran so far.

    With `shared`, only steps count that begin when that has been told to STOP.
    """

    def __init__(self, n, pause=0.0, work=0.0, shared=None):
        self.cpus, self.n, self.pause, self.work = [], n, pause, work
        self.shared = shared

    def __next__(self):
        if self.shared is not None and not self.shared[STOP]:
            self.cpus.clear()
        self.cpus.append(smp.smp_processor_id())
        end = time.monotonic() + self.work
        while time.monotonic() < end:
            pass
        if len(self.cpus) >= self.n:
            raise StopIteration(self.cpus)
        if self.pause:
            scheduler.sleep(self.pause)


class Moves:
    """A task that goes on until it has moved, and a while longer: from where, to where.

    A CPU is listed once for all the steps that follow each other there.
    """

    def __init__(self):
        self.cpus, self.left = [], 20

    def __next__(self):
        cpu = smp.smp_processor_id()
        if self.cpus[-1:] != [cpu]:
            self.cpus.append(cpu)
        self.left -= len(self.cpus) > 1
        if not self.left:
            raise StopIteration(self.cpus)
        scheduler.sleep(0.0005)


def busy(shared, seconds):
    shared[GO] = 1
    end = time.monotonic() + seconds
    while time.monotonic() < end and not shared[STOP]:
        pass
    shared[GO] = 2
    return smp.smp_processor_id()


def test_tasks_run_and_end(machine):
    sched = machine.users.scheduler
    assert sched.spawn(steps, 50, cpus=2).result(LONG_S) == [2]
    assert sched.spawn(plain, 4, b=5).result(LONG_S) == (9, True, True)
    assert sched.spawn(Steps(3), cpus="1").result(LONG_S) == [1, 1, 1]
    task = sched.spawn(fails)
    with pytest.raises(RemoteCallError, match="ValueError: no"):
        task.result(LONG_S)
    with pytest.raises(RemoteCallError):  # again, from the handle
        task.result(LONG_S)
    assert task.done()
    used, end = set(), time.monotonic() + LONG_S
    while used != {0, 1, 2, 3} and time.monotonic() < end:  # the cores are others', too
        many = [sched.spawn(steps, 20) for _ in range(40)]
        used.update(cpu for task in many for cpu in task.result(LONG_S))
    assert used == {0, 1, 2, 3}
    assert sched.ps() == []


def test_a_daemons_entry_is_free_at_its_end(machine, eventually):
    sched = machine.users.scheduler
    sched.spawn(steps, 3, daemon=True, name="daemon")
    eventually(lambda: not sched.ps())


def test_bad_tasks_are_refused(machine):
    sched = machine.users.scheduler
    with pytest.raises(shmipi.ArenaFullError) as raised:
        sched.spawn(plain, bytes(20000))
    assert raised.value.errno == errno.E2BIG
    with pytest.raises(TypeError, match="function that makes it"):
        sched.spawn(steps(3))
    with pytest.raises(TypeError, match="a function or an iterator"):
        sched.spawn(7)
    with pytest.raises(ValueError, match="CPU 4"):
        sched.spawn(steps, 1, cpus=4)
    with pytest.raises(shmipi.RemoteCallError, match="at most 16384 bytes"):
        sched.spawn(lambda: bytes(20000)).result(LONG_S)
    with pytest.raises(shmipi.ClusterStateError, match="none"):
        machine.users.scheduler._machine.sched_set_state(TASK_INTERRUPTIBLE)
    assert sched.ps() == []


def test_a_wake_up_of_an_unknown_or_dead_task_is_ESRCH(machine):
    sched = machine.users.scheduler
    task = sched.spawn(steps, 1)
    task.result(LONG_S)
    forever = sched.kthread_create(steps, 1)
    for bad in (task, 0, 1 << 20, 99, forever.id + (1 << 32)):
        for refused in (
            lambda bad=bad: sched.wake_up_process(bad),
            lambda bad=bad: sched.sched_setaffinity(bad, "0-3"),
            lambda bad=bad: sched.sched_getaffinity(bad),
            lambda bad=bad: sched.kick_process(bad),
            lambda bad=bad: machine.call(
                1, scheduler.wake_up_process, getattr(bad, "id", bad)
            ),
        ):
            with pytest.raises((NoTaskError, RemoteCallError)) as raised:
                refused()
            error = raised.value
            error = error.__cause__ if isinstance(error, RemoteCallError) else error
            assert isinstance(error, ProcessLookupError)
            assert error.errno == errno.ESRCH
    zombie = sched.spawn(steps, 1)
    while not zombie.done():
        time.sleep(0.001)
    with pytest.raises(NoTaskError):
        sched.wake_up_process(zombie)
    assert zombie.result() == zombie.result()
    assert forever.wake()
    forever.result(LONG_S)


# ---- waking --------------------------------------------------------------------------


def test_no_wake_up_is_lost(machine):
    """row 35: by wake list and by run queue, from host, task and handler."""
    sched, shared = machine.users.scheduler, machine.shared("s", "i8", 16)
    task = sched.spawn(sleeper, shared, cpus=1)
    total = 0

    def wake(n):
        for _ in range(n):
            shared[GO] += 1
            scheduler.wake_up_process(task)
            end = time.monotonic() + LONG_S
            while shared[DONE] != shared[GO]:
                assert time.monotonic() < end, "a wake-up was lost"

    for where in ("host", "task", "handler", "same cpu"):
        n = 300
        total += n
        if where == "host":
            for _ in range(n):
                shared[GO] += 1
                task.wake()
                end = time.monotonic() + LONG_S
                while shared[DONE] != shared[GO]:
                    assert time.monotonic() < end, "a wake-up was lost"
        elif where == "handler":
            for _ in range(n):
                shared[GO] += 1
                machine.call(2, scheduler.wake_up_process, task)
                end = time.monotonic() + LONG_S
                while shared[DONE] != shared[GO]:
                    assert time.monotonic() < end, "a wake-up was lost"
        else:
            machine.run(wake, n, cpus=[2 if where == "task" else 1])
    assert sched.kthread_stop(task, LONG_S) == total


def hold(shared):
    """Interrupts off until told: what comes for this CPU stays queued."""
    smp.local_irq_disable()
    shared[SEEN] = 1
    while not shared[STOP]:
        pass
    smp.local_irq_enable()


def test_the_wake_list_is_one_batch_of_pass_3(machine, eventually):
    """row 35: one IPI for an empty queue, one sched_ttwu_pending for all that came."""
    sched, shared = machine.users.scheduler, machine.shared("s", "i8", 16)
    sched._machine.sched_llc(1, 7)  # CPU 1 shares no cache with others: its wake list
    tasks = [sched.kthread_create(steps, 1, cpus=1) for _ in range(5)]
    holder = machine.start(hold, shared, cpus=[1])
    eventually(lambda: shared[SEEN])
    before, counts = sched.rq(1), machine.counters()
    assert not before.ttwu_pending

    def wake(tasks):
        return [scheduler.wake_up_process(task) for task in tasks]

    assert machine.run(wake, tasks, cpus=[0]) == [[True] * 5]
    now = sched.rq(1)
    assert now.ttwu_pending
    assert (now.nr_queued, now.wakelist) == (0, before.wakelist)
    after = machine.counters()
    sent = [int((after[n] - counts[n])[0]) for n in ("kicks_sent", "coalesced")]
    assert sent == [1, 4]
    shared[STOP] = 1
    holder.results(LONG_S)
    assert [task.result(LONG_S) for task in tasks] == [[1]] * 5
    after = sched.rq(1)
    assert (after.wakelist - before.wakelist, after.batches - before.batches) == (5, 1)
    assert not after.ttwu_pending


def test_a_cpu_with_a_pending_wake_up_is_not_idle(machine, eventually):
    """idle_cpu(): nothing is queued yet, but it is on its way (ttwu_pending)."""
    sched = machine.users.scheduler
    pid = machine.cpus[1].pid
    eventually(lambda: sched.idle_cpu(1))
    os.kill(pid, signal.SIGSTOP)
    try:
        eventually(lambda: is_stopped(pid))
        task = sched.spawn(steps, 1, cpus=1)
        assert sched.rq(1).ttwu_pending
        assert sched.rq(1).nr_queued == 0
        assert not sched.idle_cpu(1)
        # So the next goes elsewhere, although CPU 1 looks empty.
        for _ in range(3):
            eventually(lambda: sched.idle_cpu(2))  # the one before has quite ended
            assert sched.spawn(steps, 1, cpus="1-2").result(LONG_S) == [2]
    finally:
        os.kill(pid, signal.SIGCONT)
    assert task.result(LONG_S) == [1]
    assert not sched.rq(1).ttwu_pending


def test_ttwu_queue_cond(machine, eventually):
    """row 35: itself, and the busy beside the cache: run queue; others: wake list."""
    sched, shared = machine.users.scheduler, machine.shared("s", "i8", 16)

    def by_list(cpu, waker):
        task = sched.kthread_create(steps, 1, cpus=cpu)
        before = sched.rq(cpu).wakelist
        if waker is None:
            task.wake()
        else:
            machine.run(scheduler.wake_up_process, task, cpus=[waker])
        task.result(LONG_S)
        return sched.rq(cpu).wakelist - before

    eventually(lambda: sched.idle_cpu(1))
    assert by_list(1, 0) == 1  # nr_running == 0
    eventually(lambda: sched.idle_cpu(1))
    assert by_list(1, None) == 1
    assert by_list(1, 1) == 0  # itself
    worker = machine.start(busy, shared, LONG_S, cpus=[1])
    eventually(lambda: shared[GO] == 1)
    assert by_list(1, 0) == 0  # busy, and it shares a cache
    sched._machine.sched_llc(1, 7)
    assert by_list(1, 0) == 1  # busy, and it does not
    shared[STOP] = 1
    worker.results(LONG_S)


def test_try_to_wake_up_asks_for_the_state(machine, eventually):
    sched, shared = machine.users.scheduler, machine.shared("s", "i8", 16)

    def waits(shared):
        scheduler.set_current_state(TASK_UNINTERRUPTIBLE)
        shared[GO] = 1
        yield
        return "woken"

    task = sched.spawn(waits, shared)
    eventually(lambda: task.info().state == "sleeping")
    assert not sched.try_to_wake_up(task, 1 << TASK_INTERRUPTIBLE)
    assert task.info().state == "sleeping"
    assert sched.try_to_wake_up(task, 1 << TASK_UNINTERRUPTIBLE)
    assert task.result(LONG_S) == "woken"


def test_a_sleep_is_not_short(machine):
    sched = machine.users.scheduler

    def naps():
        least = 9.0
        for _ in range(5):
            began = time.monotonic()
            yield scheduler.sleep(0.003)
            least = min(least, time.monotonic() - began)
        return least

    tasks = [sched.spawn(naps) for _ in range(6)]
    assert all(0.003 <= task.result(LONG_S) < 1.0 for task in tasks)


def never_yields(shared):
    shared[SEEN] = 1
    while not shared[STOP]:
        pass


def passes_points(shared):
    shared[SEEN] = 1
    while not shared[STOP]:
        smp.cond_resched()


def waits_for_an_event(shared):
    shared[SEEN] = 1
    smp.wait_queue("quiet").wait_event(lambda: shared[STOP])


def halts(shared):
    shared[SEEN] = 1
    while not shared[STOP]:
        smp.wait_for_interrupt(LONG_S)


def in_a_system_call(shared):
    shared[SEEN] = 1
    end = time.monotonic() + LONG_S
    while not shared[STOP] and time.monotonic() < end:
        time.sleep(LONG_S)


def late(times):
    """How late each of its sleeps of 3 ms ends."""
    found = []
    for _ in range(times):
        began = time.monotonic()
        yield scheduler.sleep(0.003)
        found.append(time.monotonic() - began - 0.003)
    return found


@pytest.mark.parametrize(
    "options",
    [{}, {"doorbell": "signal"}, {"kick": False}],
    ids=["futex", "signal", "cooperative"],
)
def test_a_sleep_ends_where_a_cluster_task_runs(boot, eventually, options):
    """schedule_hrtimeout: its timer interrupts the task, and needs no idle loop."""
    cluster = boot(2, idle="halt", **options)
    shared, sched = cluster.shared("s", "i8", 16), cluster.users.scheduler
    quiet = cluster.wait_queue("quiet")
    tasks = [passes_points, waits_for_an_event, halts]
    if options.get("kick", True):
        tasks += [never_yields, in_a_system_call]
    for task in tasks:
        shared[:] = 0
        running = cluster.start(task, shared, cpus=[1])
        eventually(lambda: shared[SEEN])
        found = sched.spawn(late, 8, cpus=1).result(LONG_S)
        assert not shared[STOP]
        assert min(found) >= 0, task
        assert sorted(found)[4] < 0.1, task  # a loaded computer delays some
        shared[STOP] = 1
        quiet.wake_up()
        running.cancel()


# ---- __resched_curr ------------------------------------------------------------------


def grown(machine, func, *names):
    def count():
        cpus, host = machine.counters(), machine.host_counters()
        return [int(cpus[name].sum()) + host[name] for name in names]

    before = count()
    func()
    return [now - then for now, then in zip(count(), before, strict=True)]


def test_resched_curr_sends_only_what_is_needed(machine, eventually):
    """row 33, row 32: none if set already, lazily, or polling; itself: the flag."""
    core = machine.users.scheduler._machine
    shared = machine.shared("s", "i8", 16)

    def count(cpu, lazy):
        return grown(machine, lambda: core.resched_curr(cpu, lazy), "resched_sent")

    def own():
        me = smp.smp_processor_id()
        here = scheduler._here()._machine
        here.resched_curr(me, False)
        seen = here.tsk_need_resched(me)
        smp.cond_resched()
        return seen, here.tsk_need_resched(me)

    worker = machine.start(busy, shared, LONG_S, cpus=[1])
    eventually(lambda: shared[GO] == 1)
    assert count(1, True) == [0]
    assert core.tsk_need_resched(1) == (False, True)
    assert count(1, False) == [1]  # lazily was not enough
    assert core.tsk_need_resched(1) == (True, True)
    assert count(1, False) == [0]
    assert count(1, True) == [0]
    core.set_tsk_need_resched(1, False)
    assert core.tsk_need_resched(1) == (False, False)
    core.set_tsk_need_resched(1, True)  # the flag alone, so that nobody sends now
    assert count(1, False) == [0]
    core.set_tsk_need_resched(1, False)
    shared[STOP] = 1
    worker.results(LONG_S)
    eventually(lambda: machine.cpus[1].state == "halted")
    assert count(1, True) == [1]  # of an idle CPU nothing is put off
    assert grown(machine, lambda: machine.run(own, cpus=[2]), "resched_sent") == [0]
    assert machine.run(own, cpus=[2]) == [((True, False), (False, False))]
    core.set_idle(3, 0)  # poll
    eventually(lambda: machine.users.scheduler.tsk_is_polling(3))
    names = "resched_sent", "resched_elided"
    assert grown(machine, lambda: core.resched_curr(3, False), *names) == [0, 1]
    eventually(lambda: not machine.users.scheduler.test_tsk_need_resched(3))
    core.set_idle(3, 2)  # halt
    eventually(lambda: not machine.users.scheduler.tsk_is_polling(3))


def test_a_reschedule_of_an_offline_cpu(machine):
    """row 34: native_smp_send_reschedule warns; resched_cpu does nothing."""
    machine.offline(3)
    try:
        with pytest.warns(shmipi.ShmipiWarning, match="reschedule of offline CPU#3"):
            machine.smp.smp_send_reschedule(3)
        assert grown(machine, lambda: machine.smp.resched_cpu(3), "resched_sent") == [0]
        assert not machine.users.scheduler.test_tsk_need_resched(3)
    finally:
        machine.online(3)


def test_kick_process_is_for_a_task_that_runs_elsewhere(machine, eventually):
    sched, shared = machine.users.scheduler, machine.shared("s", "i8", 16)
    task = sched.kthread_create(busy, shared, LONG_S, cpus=1)
    assert grown(machine, lambda: sched.kick_process(task), "resched_sent") == [0]
    task.wake()
    eventually(lambda: shared[GO] == 1)
    assert grown(machine, lambda: sched.kick_process(task), "resched_sent") == [1]
    shared[STOP] = 1
    assert task.result(LONG_S) == 1


# ---- preemption ----------------------------------------------------------------------


def test_what_runs_is_preempted_at_its_next_bytecode(machine, eventually):
    """row 32: scheduler_ipi: a Cluster task and a task of the scheduler alike."""
    sched, shared = machine.users.scheduler, machine.shared("s", "i8", 16)
    for below in (
        lambda: machine.start(busy, shared, LONG_S, cpus=[1])[0],
        lambda: sched.spawn(busy, shared, LONG_S, cpus=1),
    ):
        shared[:] = 0
        task = below()
        eventually(lambda: shared[GO] == 1)
        for rt in (False, True):
            assert sched.spawn(steps, 20, cpus=1, rt=rt).result(LONG_S) == [1]
        assert shared[GO] == 1, "it ended first"
        shared[STOP] = 1
        assert task.result(LONG_S) == 1


def test_preempt_disable_holds_the_scheduler_off(machine, eventually):
    sched, shared = machine.users.scheduler, machine.shared("s", "i8", 16)

    def section(shared):
        smp.preempt_disable()
        shared[GO] = 1
        while not shared[STOP]:
            pass
        inside = int(shared[DONE])
        smp.preempt_enable()  # preempt_schedule()
        return inside, int(shared[DONE])

    def other(shared):
        shared[DONE] = 1

    holder = machine.start(section, shared, cpus=[1])
    eventually(lambda: shared[GO] == 1)
    task = sched.spawn(other, shared, cpus=1)
    eventually(lambda: sched.rq(1).nr_queued == 1)
    time.sleep(0.02)
    assert not task.done()
    shared[STOP] = 1
    assert holder.results(LONG_S) == [(0, 1)]
    task.result(LONG_S)


def test_none_starves(machine, eventually):
    """One that never sleeps, one that never yields, and others on one CPU."""
    sched, shared = machine.users.scheduler, machine.shared("s", "i8", 16)

    def greedy(shared):
        while not shared[STOP]:
            yield

    hogs = [sched.spawn(greedy, shared, cpus=1) for _ in range(3)]
    try:
        assert machine.run(smp.smp_processor_id, cpus=[1], timeout=LONG_S) == [1]
        hogs.append(sched.spawn(busy, shared, LONG_S, cpus=1))
        eventually(lambda: shared[GO] == 1)
        assert sched.spawn(steps, 30, cpus=1).result(LONG_S) == [1]
        assert machine.call(1, smp.smp_processor_id) == 1
        assert shared[GO] == 1, "the one that never yields ended first"
    finally:
        shared[STOP] = 1
    for hog in hogs:
        hog.result(LONG_S)


def test_a_task_behind_a_step_that_never_ends_gets_on(machine, eventually):
    """It comes on top, as itself: cancelled, failing, preempted in its turn."""
    sched, shared = machine.users.scheduler, machine.shared("s", "i8", 16)
    hog = sched.spawn(busy, shared, LONG_S, cpus=1)
    eventually(lambda: shared[GO] == 1)

    def who():
        return scheduler.current(), smp.in_task(), smp.preempt_count()

    def with_company():
        other = scheduler.spawn(steps, 3, cpus=1)
        while not other.done():  # without a yield: it is preempted
            pass
        return other.result()

    try:
        for _ in range(3):
            assert machine.run(who, cpus=[1], timeout=LONG_S) == [(None, True, 0)]
        assert machine.submit(1, smp.smp_processor_id).result(LONG_S) == 1
        assert machine.run(with_company, cpus=[1], timeout=LONG_S) == [[1]]
        with pytest.raises(RemoteCallError, match="division"):
            machine.run(lambda: 1 / 0, cpus=[1], timeout=LONG_S)
        long = machine.start(time.sleep, LONG_S, cpus=[1])[0]
        eventually(lambda: machine.cpus[1].task.endswith("sleep"))
        assert long.cancel()
        with pytest.raises(shmipi.TaskCancelledError):
            long.result(LONG_S)
        eventually(lambda: machine.cpus[1].task.endswith("busy"))
        assert shared[GO] == 1, "the step ended first"
    finally:
        shared[STOP] = 1
    assert hog.result(LONG_S) == 1
    assert machine.run(who, cpus=[1], timeout=LONG_S) == [(None, True, 0)]


def stopped_in_a_step(shared):
    shared[GO] = os.getpid()
    os.kill(os.getpid(), signal.SIGSTOP)
    end = time.thread_time() + 0.004
    while time.thread_time() < end:
        pass  # a short one, if what others took of its time is not counted
    return "ended"


def test_a_short_step_that_was_stopped_ends_before_a_task_that_takes_for_ever(
    machine, eventually
):
    """Below that it would never: it is the step's own time that is taken for long."""
    sched, shared = machine.users.scheduler, machine.shared("s", "i8", 16)
    short = sched.spawn(stopped_in_a_step, shared, cpus=1)
    eventually(lambda: machine.cpus[1].pid == shared[GO])
    eventually(lambda: is_stopped(shared[GO]))
    hog = machine.start(busy, shared, LONG_S, cpus=[1])[0]
    time.sleep(0.03)
    os.kill(machine.cpus[1].pid, signal.SIGCONT)
    try:
        assert short.result(5) == "ended"
        eventually(lambda: shared[GO] == 1)
    finally:
        shared[STOP] = 1
    assert hog.result(LONG_S) == 1


def test_a_step_is_preempted_within_c_that_calls_python(machine, eventually):
    """A sort that has half run lies below whom it lets run, and goes on as it was."""
    sched, shared = machine.users.scheduler, machine.shared("s", "i8", 16)

    def sorter(shared):
        def key(number):
            shared[GO] += 1
            while shared[GO] == 50 and not shared[STOP]:
                pass  # in the middle, for as long as it takes
            return -number

        numbers = list(range(100))
        result = sorted(numbers, key=key)
        yield
        return result == numbers[::-1]

    task = sched.spawn(sorter, shared, cpus=1)
    eventually(lambda: shared[GO] == 50)
    assert sched.spawn(steps, 20, cpus=1).result(LONG_S) == [1]
    nested = sched.spawn(sorted, [3, 1, 2], cpus=1, key=lambda number: -number)
    assert nested.result(LONG_S) == [3, 2, 1]
    assert machine.run(sorted, "cab", cpus=[1], timeout=LONG_S) == [["a", "b", "c"]]
    assert shared[GO] == 50, "the sort has ended first"
    shared[STOP] = 1
    assert task.result(LONG_S)


def test_yielding_while_atomic_is_warned_of(boot, capfd):
    cluster = boot(2, idle="halt")

    def atomic_yield():
        smp.preempt_disable()
        yield
        return smp.in_task()

    assert cluster.users.scheduler.spawn(atomic_yield, cpus=1).result(LONG_S)
    assert "scheduling while atomic" in capfd.readouterr().err


def test_a_step_that_blocks_the_kick_is_found_before_the_next_task(boot, capfd):
    cluster = boot(2, idle="halt")

    def thief(signals):
        signal.pthread_sigmask(signal.SIG_BLOCK, signals)
        yield

    def blocked():
        return {int(number) for number in signal.pthread_sigmask(signal.SIG_BLOCK, [])}

    kick = cluster._machine.kick_signal
    for _ in range(3):  # steps are short: not each of them is looked at by itself
        cluster.users.scheduler.spawn(thief, [kick], cpus=1).result(LONG_S)
        assert kick not in cluster.run(blocked, cpus=[1])[0]
    text = "CPU 1: the task of the scheduler blocked the kick signal"
    assert capfd.readouterr().err.count(text) >= 1


# ---- where they run ------------------------------------------------------------------


def test_affinity_is_kept_and_an_iterator_moves(machine, eventually):
    sched = machine.users.scheduler
    task = sched.spawn(Moves(), cpus=1)
    assert set(sched.sched_getaffinity(task)) == {1}
    eventually(lambda: task.info().switches > 5)
    sched.sched_setaffinity(task, "2-3")
    first, *others = task.result(LONG_S)
    assert first == 1
    assert others
    assert set(others) <= {2, 3}


def test_affinity_that_cannot_be_is_refused(machine, eventually):
    """EINVAL without an online CPU; EBUSY for a generator that has begun elsewhere."""
    sched, shared = machine.users.scheduler, machine.shared("s", "i8", 16)
    task = sched.spawn(sleeper, shared, cpus="1-2")
    eventually(lambda: task.info().state == "sleeping")
    here = task.info().cpu
    machine.offline(3)
    try:
        for bad in ("", "3"):
            with pytest.raises(AffinityError) as raised:
                sched.sched_setaffinity(task, bad)
            assert raised.value.errno == errno.EINVAL
        with pytest.raises(AffinityError) as raised:
            sched.spawn(steps, 1, cpus=3)
        assert raised.value.errno == errno.EINVAL
        with pytest.raises(AffinityError) as raised:
            sched.sched_setaffinity(task, {1, 2} - {here})
        assert raised.value.errno == errno.EBUSY
        assert set(sched.sched_getaffinity(task)) == {1, 2}
    finally:
        machine.online(3)
    sched.kthread_stop(task, LONG_S)
    assert sched.ps() == []


def test_an_idle_cpu_takes_a_task_too_many(machine, eventually):
    sched, shared = machine.users.scheduler, machine.shared("s", "i8", 16)
    worker = machine.start(busy, shared, LONG_S, cpus=[1])
    eventually(lambda: shared[GO] == 1)
    tasks = [sched.spawn(Steps(200), cpus="1-2") for _ in range(6)]
    seen = [set(task.result(LONG_S)) for task in tasks]
    shared[STOP] = 1
    worker.results(LONG_S)
    assert any(2 in cpus for cpus in seen)


def test_tasks_leave_a_cpu_that_goes_offline(machine, eventually):
    """select_fallback_rq: what sleeps there is queued elsewhere when it is woken."""
    sched, shared = machine.users.scheduler, machine.shared("s", "i8", 16)
    free = sched.spawn(Steps(60, 0.002, shared=shared), cpus="2-3")
    eventually(lambda: free.info().switches > 3)
    machine.offline(3)
    shared[STOP] = 1
    try:
        assert 3 not in free.result(LONG_S)[-5:]
        assert sched.spawn(Steps(20, 0.001), cpus="2-3").result(LONG_S) == [2] * 20
    finally:
        machine.online(3)


def test_who_may_run_on_an_offline_cpu_only_moves_all_the_same(machine, eventually):
    """select_fallback_rq: asleep, queued, or in a step when its only CPU goes."""
    sched, shared = machine.users.scheduler, machine.shared("s", "i8", 16)
    only = [
        sched.spawn(Steps(60, 0.002, shared=shared), cpus=3),
        sched.spawn(Steps(40, 0.001, work=0.004, shared=shared), cpus=3),
        sched.spawn(Steps(40, work=0.004, shared=shared), cpus=3),
    ]
    eventually(lambda: all(task.info().switches > 3 for task in only))
    machine.offline(3)
    shared[STOP] = 1
    try:
        for task in only:
            assert 3 not in task.result(5.0)[-5:]
    finally:
        machine.online(3)
    assert sched.spawn(Steps(3), cpus=3).result(LONG_S) == [3] * 3
    assert sched.rq(3).active


def test_ttwu_queue_cond_outside_the_mask_and_offline(machine, eventually):
    """Who may not run where it is woken, and whose CPU is not active: no wake list."""
    sched, shared = machine.users.scheduler, machine.shared("s", "i8", 16)
    task = sched.spawn(sleeper, shared, cpus=3)  # pinned, from its first step on
    eventually(lambda: task.info().state == "sleeping")
    guest = sched.kthread_create(Steps(1), cpus=3)
    machine.offline(3)
    try:
        eventually(lambda: all(sched.idle_cpu(cpu) for cpu in range(3)))
        before = [sched.rq(cpu).wakelist for cpu in range(4)]
        assert guest.wake()
        assert guest.result(LONG_S)[0] != 3
        assert task.wake()
        assert [sched.rq(cpu).wakelist for cpu in range(4)] == before
        assert not sched.rq(3).ttwu_pending
    finally:
        machine.online(3)
    assert sched.kthread_stop(task, LONG_S) == 0


def test_a_generator_waits_for_its_offline_cpu(machine, eventually):
    sched, shared = machine.users.scheduler, machine.shared("s", "i8", 16)
    task = sched.spawn(sleeper, shared, cpus="1-3")
    eventually(lambda: task.info().state == "sleeping")
    cpu = task.info().cpu
    machine.offline(cpu)
    shared[GO] = 1
    try:
        assert task.wake()
        time.sleep(0.01)
        assert shared[DONE] == 0
    finally:
        machine.online(cpu)
    eventually(lambda: shared[DONE] == 1)
    assert sched.kthread_stop(task, LONG_S) == 1


# ---- death ---------------------------------------------------------------------------


def test_who_ran_on_a_killed_cpu_is_dead_and_who_was_queued_moves(machine, eventually):
    sched, shared = machine.users.scheduler, machine.shared("s", "i8", 16)
    begun = sched.spawn(sleeper, shared, cpus=1)
    moving = sched.spawn(Steps(30, 0.002), cpus="1,3")
    eventually(lambda: begun.info().pinned and begun.info().state == "sleeping")
    while True:
        running = sched.spawn(busy, shared, LONG_S, cpus=1)
        eventually(lambda: shared[GO] == 1)
        info = moving.info()
        if not (info.running and info.cpu == 1):
            break
        # It was in a step there and lies below: it would rightly die with the CPU.
        shared[STOP] = 1
        running.result(LONG_S)
        shared[:] = 0
    # So that nothing begins there any more.
    os.kill(machine.cpus[1].pid, signal.SIGSTOP)
    queued = [sched.spawn(steps, 3, cpus="1") for _ in range(3)]
    for task in queued:
        sched.sched_setaffinity(task, "1-2") if task is queued[0] else None
    os.kill(machine.cpus[1].pid, signal.SIGKILL)
    for task in (begun, running):
        with pytest.raises(CpuDiedError) as raised:
            task.result(LONG_S)
        assert raised.value.cpu == 1
        with pytest.raises(NoTaskError):
            task.wake()
    for task in queued:
        assert 1 not in task.result(LONG_S)
    assert len(moving.result(LONG_S)) == 30
    eventually(lambda: machine.cpus[1].state == "dead")
    machine.online(1)
    assert sched.spawn(steps, 3, cpus=1).result(LONG_S) == [1]
    assert sched.ps() == []


def test_a_stopped_cpu_stops_no_others_tasks(machine, eventually):
    sched = machine.users.scheduler
    os.kill(machine.cpus[1].pid, signal.SIGSTOP)
    try:
        stuck = sched.spawn(steps, 3, cpus=1)
        others = [sched.spawn(Steps(50), cpus="2-3") for _ in range(5)]
        for task in others:
            assert 1 not in task.result(LONG_S)
        assert not stuck.done()
        with pytest.raises(shmipi.IpiTimeoutError):
            stuck.result(0.01)
    finally:
        os.kill(machine.cpus[1].pid, signal.SIGCONT)
    assert stuck.result(LONG_S) == [1]


def test_tasks_wait_for_each_other_and_travel(machine):
    sched = machine.users.scheduler

    def parent():
        child = scheduler.spawn(steps, 5, cpus=2)
        assert pickle.loads(pickle.dumps(child)) == child
        got = yield from child.join()
        return got

    assert sched.spawn(parent, cpus=1).result(LONG_S) == [2]
    handle = machine.run(lambda: scheduler.spawn(plain, 1), cpus=[3])[0]
    assert handle.result(LONG_S) == (2, True, True)


@pytest.mark.parametrize("controller", ["xive", "mips", "gicv3"])
def test_other_controllers_and_cooperative_machines(boot, controller, eventually):
    cluster = boot(3, idle="halt", controller=controller, kick=controller != "mips")
    sched, shared = cluster.users.scheduler, cluster.shared("s", "i8", 16)
    task = sched.spawn(sleeper, shared, cpus=1)
    for _ in range(50):
        shared[GO] += 1
        cluster.call(2, scheduler.wake_up_process, task)
        eventually(lambda: shared[DONE] == shared[GO])
    assert sched.kthread_stop(task, LONG_S) == 50

    def lets_others(shared):
        while not shared[STOP]:
            smp.cond_resched()

    worker = cluster.start(lets_others, shared, cpus=[1])
    assert sched.spawn(steps, 5, cpus=1).result(LONG_S) == [1]
    shared[STOP] = 1
    worker.results(LONG_S)
