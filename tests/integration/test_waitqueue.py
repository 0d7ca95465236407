"""smp.Completion and smp.WaitQueue: tasks and the host that wait for each other."""

import os
import pickle
import signal
import statistics
import time
from pathlib import Path

import pytest

import shmipi
from shmipi import (
    ClusterStateError,
    CpuDiedError,
    NoMachineError,
    RemoteCallError,
    TaskCancelledError,
    _core,
    atomic,
    smp,
)
from shmipi.names import DOORBELLS

LONG_S = 20.0
LIMIT_S = 3.0  # a wake-up that is made good takes far less


class Rig:
    """A machine, and tasks that are started one after the other has halted."""

    def __init__(self, cluster, background, eventually):
        self.cluster = cluster
        self.background, self.eventually = background, eventually
        self.cpus = cluster.ncpus
        cluster.shared("n", "i8", 8)

    def task(self, cpu, func, *args, halted=True):
        thread = self.background(lambda: self.cluster.run(func, *args, cpus=[cpu])[0])
        if halted:
            self.eventually(lambda: self.waits(cpu))
        return thread

    def waits(self, cpu):
        """Does it run a task, and halts in it?"""
        return self.cluster._machine.slot(cpu).task and (
            self.cluster.cpus[cpu].state == "halted"
        )


@pytest.fixture
def rig(boot, background, eventually):
    def start(ncpus=4, **options):
        cluster = boot(ncpus, **{"idle": "halt", **options})
        cluster.run(int)
        return Rig(cluster, background, eventually)

    return start


def be_patient():
    """From here on this CPU looks when it is woken, and not by its own clock."""
    from shmipi.smp import waitqueue

    waitqueue._LOOK_S = waitqueue._LOOK_EXCLUSIVE_S = waitqueue._LOOK_MAX_S = 60.0


def wait_for(done):
    return done.wait_for_completion()


def wait_patiently_for(done):
    be_patient()
    return done.wait_for_completion()


def stopped(pid):
    text = Path(f"/proc/{pid}/stat").read_text()
    return text.rpartition(")")[2].split()[0] == "T"


# ---- completions ---------------------------------------------------------------------


def test_a_completion_counts_and_a_wait_takes_one(boot):
    done = boot(2).completion("counts")
    assert repr(done) == "<Completion 'counts' done=0>"
    assert not done.completion_done()
    assert not done.try_wait_for_completion()
    done.complete()
    done.complete()
    assert done.completion_done()
    assert repr(done) == "<Completion 'counts' done=2>"
    assert done.try_wait_for_completion()
    done.wait_for_completion()
    assert not done.completion_done()
    start = time.monotonic()
    left = done.wait_for_completion_timeout(0.05)
    assert (left, type(left)) == (0.0, float)
    assert time.monotonic() - start >= 0.05
    assert done.wait_for_completion_timeout(0) == 0.0
    done.complete()
    assert 0 < done.wait_for_completion_timeout(5) <= 5
    for wrong in (-1, float("nan")):
        with pytest.raises(ValueError, match="timeout"):
            done.wait_for_completion_timeout(wrong)


def test_complete_all_lasts_until_it_is_made_new(rig):
    found = rig()
    done = found.cluster.completion("all")
    tasks = [found.task(cpu, wait_for, done) for cpu in range(4)]
    done.complete_all()
    assert [task.end() for task in tasks] == [None] * 4
    assert repr(done) == "<Completion 'all' done=all>"
    done.complete()
    for _ in range(3):
        done.wait_for_completion()
        assert done.completion_done()
    done.reinit_completion()
    assert not done.try_wait_for_completion()


@pytest.mark.parametrize("doorbell", DOORBELLS)
def test_each_complete_wakes_one_who_has_waited_longest(rig, doorbell):
    found = rig(doorbell=doorbell)
    done = found.cluster.completion("one")
    order = [2, 0, 3, 1]
    tasks = {cpu: found.task(cpu, wait_patiently_for, done) for cpu in order}
    before = found.cluster.host_counters()["doorbells_sent"]
    for turn, cpu in enumerate(order):
        done.complete()
        tasks[cpu].end()
        assert [c for c in order if tasks[c].is_alive()] == order[turn + 1 :]
    assert found.cluster.counters()["rekicked"].sum() == 0
    assert found.cluster.host_counters()["doorbells_sent"] - before >= 4


@pytest.mark.parametrize("idle", ["poll", "haltpoll", "halt"])
def test_from_everywhere_to_everywhere_none_is_lost(rig, idle):
    """Tasks, handlers and the host complete, tasks and the host wait: it comes out."""
    found = rig(idle=idle)
    cluster = found.cluster
    requests, answers = cluster.completion("requests"), cluster.completion("answers")
    rounds = 100

    def server():
        for _ in range(rounds):
            requests.wait_for_completion()
            answers.complete()

    def client():
        for _ in range(rounds):
            requests.complete()
            answers.wait_for_completion()

    tasks = [found.task(cpu, server, halted=False) for cpu in (0, 1)]
    tasks += [found.task(2, client, halted=False)]
    for turn in range(rounds):
        if turn % 2:
            requests.complete()
        else:
            cluster.call(3, requests.complete)  # in a handler
        assert answers.wait_for_completion_timeout(LONG_S)
    for task in tasks:
        task.end(30)
    assert not requests.completion_done()
    assert not answers.completion_done()


def test_threads_of_the_host_wait_beside_each_other(rig, eventually):
    found = rig(2)
    done = found.cluster.completion("threads")
    threads = [found.background(done.wait_for_completion) for _ in range(6)]
    task = found.task(1, wait_for, done)
    for left in range(6, -1, -1):
        time.sleep(0.01)
        done.complete()
        eventually(
            lambda left=left: sum(t.is_alive() for t in [*threads, task]) == left
        )
    assert not done.completion_done()


def test_it_is_the_same_by_name_in_a_closure_and_as_an_argument(boot):
    cluster = boot(2)
    done = cluster.completion("same")
    queue = cluster.wait_queue("same")  # of another kind: another one
    assert cluster.completion("same") == done == pickle.loads(pickle.dumps(done))
    assert done != queue
    assert len({done, cluster.completion("same"), queue}) == 2

    def by_name():
        smp.completion("same").complete()
        return smp.wait_queue("same") == queue

    def by_argument(given):
        given.complete()
        return given == done == smp.completion("same")

    assert cluster.run(by_name) == [True, True]
    assert cluster.call(1, by_argument, done)
    assert smp.completion("same") == done  # of the only open Cluster
    for _ in range(3):
        assert done.try_wait_for_completion()
    assert not done.completion_done()
    with pytest.raises(KeyError, match=r"cluster\.completion\('other'\)"):
        smp.completion("other")
    cluster.shutdown()
    with pytest.raises(NoMachineError):
        smp.completion("same")
    with pytest.raises(ClusterStateError):
        done.complete()
    assert repr(done) == "<Completion 'same'>"
    with pytest.raises(TypeError):
        smp.Completion([0] * 100)


def test_what_cannot_sleep_may_not_wait(boot):
    cluster = boot(2)
    done, queue = cluster.completion("sleep"), cluster.wait_queue("sleep")
    done.complete_all()

    def with_interrupts_disabled():
        smp.local_irq_disable()
        try:
            done.wait_for_completion()
        finally:
            smp.local_irq_enable()

    def with_preemption_disabled():
        smp.preempt_disable()
        try:
            queue.wait_event(lambda: True)
        finally:
            smp.preempt_enable()

    for start, func in [
        (lambda func: cluster.call(1, func), done.wait_for_completion),
        (lambda func: cluster.run(func), with_interrupts_disabled),
        (lambda func: cluster.run(func, cpus=[1]), with_preemption_disabled),
    ]:
        with pytest.raises((RemoteCallError, ExceptionGroup)) as error:
            start(func)
        errors = getattr(error.value, "exceptions", [error.value])
        assert {type(e.__cause__) for e in errors} == {ClusterStateError}


# ---- wait queues ---------------------------------------------------------------------


def test_wait_event_returns_when_its_condition_is_true(rig):
    found = rig()
    n, queue = shmipi.shared("n"), found.cluster.wait_queue("q")

    def sleeper():
        looks = 0

        def condition():
            nonlocal looks
            looks += 1
            return n[0] >= 2

        queue.wait_event(condition)
        return looks

    tasks = [found.task(cpu, sleeper) for cpu in range(3)]
    assert queue.waitqueue_active()
    n[0] = 1
    assert queue.wake_up() == 3
    found.eventually(lambda: all(found.waits(cpu) for cpu in range(3)))
    n[0] = 2
    found.cluster.call(3, queue.wake_up)  # in a handler
    looks = [task.end() for task in tasks]
    assert all(3 <= count < 100 for count in looks), looks
    assert not queue.waitqueue_active()
    assert queue.wake_up() == queue.wake_up_all() == 0
    queue.wait_event(lambda: True)


def test_wait_event_timeout_says_what_is_left(rig):
    found = rig(2)
    n, queue = shmipi.shared("n"), found.cluster.wait_queue("q")
    assert queue.wait_event_timeout(lambda: False, 0.03) == 0.0
    assert queue.wait_event_timeout(lambda: True, 0) > 0

    def sleeper():
        return queue.wait_event_timeout(lambda: n[0], LONG_S)

    task = found.task(1, sleeper)
    n[0] = 1
    queue.wake_up()
    assert 0 < task.end() < LONG_S


def test_of_exclusive_waiters_wake_up_wakes_one(rig):
    found = rig(5)
    n, queue = shmipi.shared("n"), found.cluster.wait_queue("q")

    def taker():
        def take():
            found = atomic.load(n, 0)
            return found and atomic.compare_exchange(n, 0, found, found - 1) == found

        be_patient()
        queue.wait_event_interruptible_exclusive(take)

    def watcher():
        queue.wait_event(lambda: n[1])

    order = [3, 1, 0, 2]
    tasks = {cpu: found.task(cpu, taker) for cpu in order}
    watch = found.task(4, watcher)
    for turn, cpu in enumerate(order[:2]):
        atomic.fetch_add(n, 0, 1)
        # And who is not exclusive, if it is back in the queue by now.
        assert queue.wake_up() in ((2,) if turn == 0 else (1, 2))
        tasks[cpu].end()
        assert sum(task.is_alive() for task in tasks.values()) == 3 - turn
    n[1] = 1
    atomic.fetch_add(n, 0, 2)
    assert queue.wake_up_nr(2) in (2, 3)
    for task in [*tasks.values(), watch]:
        task.end()
    assert queue.wake_up_nr(0) == 0
    with pytest.raises(ValueError, match="nr"):
        queue.wake_up_nr(-1)


def test_given_up_with_a_wake_up_in_hand_it_is_passed_on(rig):
    """A handler of its own signal ends the wait of the one that was chosen."""
    found = rig(3, steps=True)
    done = found.cluster.completion("passed")
    pid = found.cluster.cpus[0].pid

    def interrupted():
        def handler(*_):
            raise LookupError("mine")

        signal.signal(signal.SIGUSR1, handler)
        done.wait_for_completion()

    first = found.task(0, interrupted)
    second = found.task(1, wait_patiently_for, done)
    found.cluster._machine.arm_step(0, "wake", _core.STEP_STOP)
    # A reschedule wakes it up to the step; then both, the wake-up and the signal, come.
    found.cluster.smp.smp_send_reschedule(0)
    found.eventually(lambda: stopped(pid))
    os.kill(pid, signal.SIGUSR1)
    done.complete()
    os.kill(pid, signal.SIGCONT)
    with pytest.raises(RemoteCallError) as error:
        first.end()
    assert isinstance(error.value.__cause__, LookupError)
    assert second.end(LIMIT_S) is None
    assert not done.completion_done()


def test_a_wake_up_after_the_last_look_is_passed_on(rig):
    """It is for the next, when who is chosen has found its condition true before."""
    found = rig(3)
    n, queue = found.cluster.shared("n", "i8", 8), found.cluster.wait_queue("q")

    def looks_long():
        def condition():
            if not n[0]:
                n[0] = 1  # before it stands in the queue
                return False
            n[0] = 2
            while not n[1]:
                time.sleep(0.001)
            return True

        queue.wait_event_interruptible_exclusive(condition)

    def waits():
        be_patient()
        queue.wait_event_interruptible_exclusive(lambda: n[2])

    first = found.task(0, looks_long, halted=False)
    found.eventually(lambda: n[0] == 2)
    second = found.task(1, waits)
    n[2] = 1
    assert queue.wake_up() == 1
    n[1] = 1
    first.end()
    second.end(LIMIT_S)
    assert not queue.waitqueue_active()


@pytest.mark.parametrize("step", ["waitq_prepare", "waitq_sleep"])
def test_an_exception_between_two_bytecodes_leaves_nobody_in_the_queue(rig, step):
    """As a signal's handler raises it: when C has returned and nothing is stored."""
    found = rig(2)
    queue = found.cluster.wait_queue("q")

    class Interrupted:
        def __init__(self, machine):
            self.machine = machine

        def __getattr__(self, name):
            method = getattr(self.machine, name)
            if name != step:
                return method

            def then_raise(*args):
                method(*args)
                raise KeyboardInterrupt

            return then_raise

    def wait():
        queue._machine = Interrupted(queue._machine)
        try:
            queue.wait_event(lambda: False)
        except KeyboardInterrupt:
            return "interrupted"

    assert found.cluster.run(wait, cpus=[1]) == ["interrupted"]
    assert not queue.waitqueue_active()
    assert queue.wake_up() == 0
    machine = queue._machine
    assert wait() == "interrupted"
    queue._machine = machine
    assert not queue.waitqueue_active()


# ---- death, stops, hotplug -----------------------------------------------------------


@pytest.mark.parametrize("doorbell", DOORBELLS)
@pytest.mark.parametrize("step", ["halted", "wake"])
def test_a_waiter_killed_with_a_wake_up_in_hand_keeps_it_from_nobody(
    rig, doorbell, step
):
    found = rig(3, steps=True, doorbell=doorbell)
    cluster = found.cluster
    done = cluster.completion("killed")
    first, second = (found.task(cpu, wait_patiently_for, done) for cpu in (0, 1))
    # The reschedule leads it there; its place in the queue it keeps.
    cluster._machine.arm_step(0, step, _core.STEP_STOP)
    cluster.smp.smp_send_reschedule(0)
    found.eventually(lambda: stopped(cluster.cpus[0].pid))
    done.complete()  # for the first, which has waited longest
    time.sleep(0.02)
    os.kill(cluster.cpus[0].pid, signal.SIGKILL)
    with pytest.raises(CpuDiedError):
        first.end()
    assert second.end(LIMIT_S) is None
    assert not done.completion_done()
    cluster.online(0)
    # Its successor has the slot, and what the dead left there is not its.
    again = found.task(0, wait_for, done)
    done.complete()
    assert again.end(LIMIT_S) is None


@pytest.mark.parametrize("doorbell", DOORBELLS)
@pytest.mark.parametrize("step", ["complete", "ring"])
@pytest.mark.parametrize("how", ["kill", "stop"])
def test_a_waker_that_ends_in_the_middle_keeps_nobody_asleep(rig, doorbell, step, how):
    found = rig(3, steps=True, doorbell=doorbell)
    cluster = found.cluster
    done, pid = cluster.completion("waker"), cluster.cpus[0].pid
    # Of a death the firmware knows; of one that is stopped nobody does.
    wait = wait_patiently_for if how == "kill" else wait_for
    tasks = [found.task(cpu, wait, done) for cpu in (1, 2)]
    action = _core.STEP_KILL if how == "kill" else _core.STEP_STOP

    cluster._machine.arm_step(0, step, action)
    waker = found.background(lambda: cluster.run(done.complete_all, cpus=[0]))
    assert [task.end(LIMIT_S) for task in tasks] == [None, None]
    assert cluster._machine.step_hit(0) == step
    if how == "kill":
        with pytest.raises(CpuDiedError):
            waker.end()
    else:
        found.eventually(lambda: stopped(pid))
        os.kill(pid, signal.SIGCONT)
        waker.end()


def test_who_waits_may_be_offline_for_a_while(rig):
    found = rig(3)
    cluster = found.cluster
    done = cluster.completion("offline")
    first, second = found.task(0, wait_for, done), found.task(1, wait_for, done)
    cluster.offline(0)
    done.complete()
    assert second.end(LIMIT_S) is None
    done.complete()
    assert first.is_alive()
    cluster.online(0)
    assert first.end(LIMIT_S) is None


def test_kills_at_random_lose_no_wake_up(rig):
    """Whoever lives gets what was completed for it, whatever moment others die at."""
    found = rig(4)
    cluster = found.cluster
    slot = cluster._machine.slot
    done = cluster.completion("random")

    def consumer():
        taken = 0
        while done.wait_for_completion_timeout(LONG_S):
            taken += 1
            if atomic.load(shmipi.shared("n"), 0):
                return taken
        return -1

    survivor = found.task(0, consumer)
    for turn in range(12):
        victim = found.background(lambda: cluster.run(consumer, cpus=[1]))
        other = found.background(lambda: cluster.run(consumer, cpus=[2]))
        # Both are sent: a CPU that is dead before is none to run on.
        found.eventually(lambda: slot(1).busy and slot(2).busy, LIMIT_S)
        for _ in range(turn % 4 + 1):
            cluster.call(3, done.complete)
        os.kill(cluster.cpus[1 + turn % 2].pid, signal.SIGKILL)
        done.complete()
        with pytest.raises(CpuDiedError):
            (victim, other)[turn % 2].end()
        os.kill(cluster.cpus[2 - turn % 2].pid, signal.SIGKILL)
        with pytest.raises(CpuDiedError):
            (other, victim)[turn % 2].end()
        cluster.online(1)
        cluster.online(2)
        # What the dead had not taken is the survivor's.
        found.eventually(lambda: not done.completion_done(), LIMIT_S)
    atomic.store(shmipi.shared("n"), 0, 1)
    done.complete()
    assert survivor.end(LIMIT_S) > 0


def test_ctrl_c_and_the_machines_end_end_a_wait(rig, script):
    host = script(
        """
        import os, signal, threading, time
        from shmipi import Cluster, MachineDiedError, ClusterStateError

        if __name__ == "__main__":
            cluster = Cluster(2)
            done = cluster.completion("never")

            def when_it_waits(end):
                while not cluster._machine.waitq_active(done._at):
                    time.sleep(0.01)
                time.sleep(0.1)
                end()

            for end in (lambda: os.kill(os.getpid(), signal.SIGINT), cluster.shutdown):
                thread = threading.Thread(target=when_it_waits, args=(end,))
                thread.start()
                try:
                    done.wait_for_completion()
                except (KeyboardInterrupt, MachineDiedError, ClusterStateError) as e:
                    print(type(e).__name__)
                thread.join()
        """
    )
    first, second = host.text.split()
    assert first == "KeyboardInterrupt"
    assert second in ("MachineDiedError", "ClusterStateError")


def test_a_damaged_queue_is_no_crash(boot):
    cluster = boot(2)
    done, queue = cluster.completion("damaged"), cluster.wait_queue("damaged")
    for victim in (done, queue):
        memory = cluster._arrays.find(victim._kind, "damaged")
        memory[:] = 0xFFFFFFFFFFFFFFFF
        assert done.wait_for_completion_timeout(0.01) >= 0
        assert queue.wait_event_timeout(lambda: False, 0.01) == 0.0
        queue.wake_up()
        queue.wake_up_all()
        done.complete()
        cluster.call(1, queue.wake_up_all)
    for at in (0, 4, 2**63, 2**64 - 8, done._at + 4):
        with pytest.raises(ValueError, match="no wait queue"):
            cluster._machine.waitq_wake(at, 1)


# ---- what a barrier costs ------------------------------------------------------------


def barrier_of(queue, ncpus, rounds):
    n = shmipi.shared("n")
    for turn in range(1, rounds + 1):
        if atomic.fetch_add(n, 0, 1) + 1 == ncpus * turn:
            atomic.store(n, 1, turn)
            queue.wake_up_all()
        else:
            queue.wait_event(lambda turn=turn: atomic.load(n, 1) >= turn)


def barrier_with_sleeps(_, ncpus, rounds):
    n = shmipi.shared("n")
    for turn in range(1, rounds + 1):
        if atomic.fetch_add(n, 0, 1) + 1 == ncpus * turn:
            atomic.store(n, 1, turn)
        while atomic.load(n, 1) < turn:
            time.sleep(0.001)


def test_a_barrier_costs_its_wake_ups(rig):
    """8 CPUs on the cores there are; printed with -s, beside one that polls."""
    found = rig(8)
    n, queue = shmipi.shared("n"), found.cluster.wait_queue("barrier")
    medians = {}
    for barrier in (barrier_of, barrier_with_sleeps):
        times = []
        for _ in range(5):
            n[:] = 0
            start = time.monotonic()
            found.cluster.run(barrier, queue, 8, 20)
            times.append((time.monotonic() - start) / 20)
            assert n[:2].tolist() == [160, 20]
        medians[barrier.__name__] = statistics.median(times)
    print({name: f"{1e6 * t:.0f} us a round" for name, t in medians.items()})


def test_a_task_that_waits_can_be_cancelled(rig):
    found = rig(3)
    cluster = found.cluster
    done, queue = cluster.completion("cancel"), cluster.wait_queue("cancel")
    for wait in (
        smp.wait_for_interrupt,
        done.wait_for_completion,
        lambda: queue.wait_event(lambda: False),
    ):
        tasks = cluster.start(wait, cpus=[0, 1])
        found.eventually(lambda: found.waits(0) and found.waits(1))
        tasks[0].cancel()
        with pytest.raises(TaskCancelledError):
            tasks[0].result(LIMIT_S)
        assert not tasks[1].done()
        tasks[1].cancel()
        assert tasks.wait(LIMIT_S)
    assert cluster.run(smp.smp_processor_id) == [0, 1, 2]
    again = found.task(0, wait_for, done)
    done.complete()  # what the cancelled left there is nobody's
    again.end(LIMIT_S)
