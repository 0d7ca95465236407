"""Tasks: their handles, their end by request, and what is told when they fail."""

import asyncio
import concurrent.futures
import contextlib
import itertools
import os
import signal
import time
import types

import numpy as np
import pytest

import shmipi
from shmipi import (
    ArenaFullError,
    CpuDiedError,
    CpuOfflineError,
    CpusFailedError,
    IpiTimeoutError,
    RemoteCallError,
    TaskCancelledError,
    TaskInterrupt,
    atomic,
    smp,
)
from shmipi.names import DOORBELLS

SOON_S = 5.0  # a lost wake-up is for ever; a loaded machine is slow


def spin():
    while True:
        pass


def running(tasks):
    return lambda: all(task.running() for task in tasks)


# ---- handles -------------------------------------------------------------------------


def test_a_handle_has_the_words_of_a_future(cluster, eventually):
    gate = cluster.shared("gate", "i8", 1)
    gate[0] = 0

    def wait(x, y=0):
        while not gate[0]:
            time.sleep(0.001)
        return smp.smp_processor_id(), x + y

    tasks = cluster.start(wait, 1, cpus="0,2", y=2)
    eventually(running(tasks))
    assert [task.cpu for task in tasks] == [0, 2]
    queued = cluster.start(int, "7", cpus=[0])[0]
    assert not queued.running()
    assert not queued.done()
    assert not tasks.done()
    assert not tasks[0].done()
    assert not tasks[0].cancelled()
    assert "running on CPUs 0,2" in repr(tasks)
    assert "pending" in repr(queued)
    with pytest.raises(IpiTimeoutError, match=r"CPU 0 has not ended in 0\.01 s"):
        tasks[0].result(timeout=0.01)
    with pytest.raises(TimeoutError, match="CPUs 0,2 has not ended"):
        tasks.results(timeout=0.01)
    assert not tasks.wait(0.01)
    gate[0] = 1
    assert tasks.results(SOON_S) == [(0, 3), (2, 3)]
    assert tasks[1].result() == (2, 3)
    assert tasks[1].exception() is None
    assert tasks.done()
    assert not tasks[0].running()
    assert not tasks[0].cancelled()
    assert queued.result(SOON_S) == 7
    assert not tasks.cancel()
    assert not queued.cancel(kill=True)
    assert [task.cpu for task in tasks[:1]] == [0]
    assert len(tasks) == 2


def test_handles_are_for_several_threads(cluster, background):
    """Each gets the one result, and a number of a call is not the next call's."""
    for _ in range(30):
        tasks = cluster.start(lambda: [time.sleep(0.001), smp.smp_processor_id()][1])
        threads = [background(task.result) for task in tasks for _ in range(3)]
        others = [background(tasks.cancel), background(cluster.run, abs, -3)]
        for thread in threads:
            with contextlib.suppress(TaskCancelledError):
                assert thread.end(SOON_S) in (0, 1, 2)
        others[0].end(SOON_S)
        assert others[1].end(SOON_S) == [3, 3, 3], "its task was cancelled"


def test_a_dropped_handle_ends_nothing(cluster, eventually):
    ran = cluster.shared("dropped", "i8", 3)
    ran[:] = 0

    def work():
        time.sleep(0.05)
        ran[smp.smp_processor_id()] += 1

    for _ in range(5):
        cluster.start(work)
    eventually(lambda: ran.tolist() == [5, 5, 5])
    assert cluster.run(int) == [0, 0, 0]


def test_run_and_start_take_keyword_arguments(cluster):
    assert cluster.run(int, "ff", base=16) == [255] * 3
    assert cluster.start(int, "77", base=8, cpus=[1]).results() == [63]


def test_an_async_function_runs_in_a_loop_of_its_own(cluster):
    async def add(x, y=0):
        await asyncio.sleep(0.001)
        return x + y + smp.smp_processor_id()

    assert cluster.run(add, 1, y=10) == [11, 12, 13]


def test_a_native_handler_is_no_task(cluster):
    for use in (cluster.run, cluster.start):
        with pytest.raises(TypeError, match="a native handler is no task"):
            use(smp.NativeHandler("noop"))
    assert cluster.run(int) == [0, 0, 0]


def test_an_async_function_is_no_handler(cluster):
    async def add(x):
        return x

    for call in (cluster.call, lambda *a: cluster.submit(*a).result(SOON_S)):
        with pytest.raises(RemoteCallError, match=r"use|give it to cluster.run\(\)"):
            call(1, add, 1)
    assert cluster.call(1, int) == 0


# ---- cancelling ----------------------------------------------------------------------


@pytest.mark.parametrize("doorbell", DOORBELLS)
def test_a_task_is_cancelled_wherever_it_is(boot, eventually, doorbell):
    """In Python code, asleep, in a system call, waiting for a CPU or an interrupt."""
    cluster = boot(3, idle="halt", doorbell=doorbell)
    held, seen = cluster.shared("held", "i8", 1), cluster.shared("seen", "i8", 4)

    def hold():
        while not held[0]:
            time.sleep(0.001)

    def wait():
        smp.smp_call_function_single(2, lambda _: None)

    def halt():
        while True:
            smp.wait_for_interrupt()

    def in_a_pipe():
        os.read(os.pipe()[0], 1)

    def noted(work):
        try:
            atomic.fetch_add(seen, 3, 1)
            work()
        except Exception:
            atomic.fetch_add(seen, 1, 1)  # it is no Exception
        except TaskInterrupt:
            atomic.fetch_add(seen, 0, 1)
            raise
        finally:
            atomic.fetch_add(seen, 2, 1)

    everywhere = [spin, lambda: time.sleep(60), in_a_pipe, wait, halt]
    cluster.submit(2, hold)
    for work in everywhere:
        tasks = cluster.start(noted, work, cpus=[0, 1])
        eventually(lambda: seen[3] == 2)
        assert running(tasks)()
        time.sleep(0.02)
        assert tasks.cancel()
        assert tasks.wait(SOON_S), f"{work} goes on"
        assert all(task.cancelled() for task in tasks)
        assert seen.tolist() == [2, 0, 2, 2]
        seen[:] = 0
        with pytest.raises(TaskCancelledError, match="CPU 0 was cancelled") as caught:
            tasks[0].result()
        assert isinstance(caught.value, concurrent.futures.CancelledError)
        assert caught.value.cpu == 0
        assert caught.value.errno == 125
        with pytest.raises(TaskCancelledError):
            tasks[1].exception()
        assert cluster.run(smp.smp_processor_id, cpus=[0, 1]) == [0, 1]
    held[0] = 1
    assert cluster.run(smp.smp_processor_id) == [0, 1, 2]


def test_a_task_that_has_not_begun_never_runs(cluster, eventually):
    ran = cluster.shared("never", "i8", 2)
    ran[:] = 0

    def work():
        ran[0] += 1

    def hold():
        while not ran[1]:
            time.sleep(0.001)

    front = cluster.start(hold, cpus=[1])
    eventually(running(front))
    behind = [cluster.start(work, cpus=[1])[0] for _ in range(20)]
    for task in behind[::2]:
        assert task.cancel()
        assert task.done()
        assert task.cancelled()
        with pytest.raises(TaskCancelledError, match="before it began"):
            task.result(0)
        assert not task.cancel(), "it has ended"
    ran[1] = 1
    for task in behind[1::2]:
        task.result(SOON_S)
    assert front.results() == [None]
    assert ran[0] == 10


def test_an_interrupt_is_only_for_the_task_that_it_was_asked_of(cluster):
    """Cancelled around its end: never the next task, a handler, or the idle loop."""
    for turn in range(150):
        task = cluster.start(time.sleep, 0.0005 * (turn % 3), cpus=[1])[0]
        behind = cluster.start(lambda: sum(range(2000)), cpus=[1])[0]
        future = cluster.submit(1, lambda: sum(range(1000)))
        time.sleep(0.0001 * (turn % 7))
        asked = task.cancel()
        assert behind.result(SOON_S) == 1999000
        assert future.result(SOON_S) == 499500
        assert task._settle(SOON_S)
        assert asked or not task.cancelled()


def test_a_task_may_catch_it_and_end_well(cluster, eventually):
    inside = cluster.shared("inside", "i8", 1)
    inside[0] = 0

    def stubborn():
        for turn in (1, 2, 3):
            try:
                inside[0] = turn
                time.sleep(60)
            except TaskInterrupt:
                pass
        return "well"

    task = cluster.start(stubborn, cpus=[0])[0]
    for turn in (1, 2, 3):
        eventually(lambda turn=turn: inside[0] == turn)
        assert task.cancel()
    assert task.result(SOON_S) == "well"
    assert not task.cancelled()


def test_it_is_not_lost_where_exceptions_are(cluster, eventually):
    """In a ``__del__``, which the interpreter ignores the exceptions of."""
    inside = cluster.shared("in_del", "i8", 2)
    inside[:] = 0

    class Late:
        def __del__(self):
            inside[0] = 1
            while True:
                pass

    def work():
        Late()
        inside[1] = 1
        time.sleep(60)

    task = cluster.start(work, cpus=[1])[0]
    eventually(lambda: inside[0])
    assert task.cancel()
    assert task._settle(SOON_S)
    assert task.cancelled()


def test_not_while_interrupts_are_disabled(cluster, eventually):
    log = cluster.shared("masked_log", "i8", 3)
    log[:] = 0

    def masked():
        smp.local_irq_disable()
        log[0] = 1
        end = time.monotonic() + 30
        while not log[2] and time.monotonic() < end:
            pass
        log[1] = 1
        smp.local_irq_enable()
        time.sleep(60)

    task = cluster.start(masked, cpus=[2])[0]
    eventually(lambda: log[0])
    assert task.cancel()
    time.sleep(0.05)  # as it would come by now, if it came
    assert not task.done()
    log[2] = 1
    assert task._settle(SOON_S)
    assert task.cancelled()
    assert log[1] == 1


def test_a_handler_is_not_interrupted_but_what_it_interrupted(cluster, eventually):
    went = cluster.shared("went", "i8", 2)
    went[:] = 0

    def slow():
        went[0] = 1
        end = time.monotonic() + 0.1
        while time.monotonic() < end:
            pass
        went[1] = 1
        return "whole"

    task = cluster.start(spin, cpus=[1])[0]
    eventually(task.running)
    future = cluster.submit(1, slow)
    eventually(lambda: went[0])
    assert task.cancel()
    assert future.result(SOON_S) == "whole"
    assert task._settle(SOON_S)
    assert task.cancelled()
    assert went[1] == 1


def test_a_cooperative_task_is_cancelled_where_it_yields(boot, eventually):
    cluster = boot(2, kick=False, idle="halt")
    polls = cluster.shared("polls", "i8", 1)

    def work(yields):
        while True:
            polls[0] += 1
            if yields:
                smp.cond_resched()
            elif polls[0] > 200_000:
                return "well"

    task = cluster.start(work, True, cpus=[1])[0]
    eventually(lambda: polls[0] > 10)
    task.cancel()
    assert task._settle(SOON_S)
    assert task.cancelled()
    polls[0] = 0
    task = cluster.start(work, False, cpus=[1])[0]
    eventually(lambda: polls[0] > 10)
    task.cancel()
    assert task.result(30) == "well"


def test_an_async_task_is_cancelled_and_cleans_up(cluster, eventually):
    cleaned = cluster.shared("cleaned", "i8", 3)
    cleaned[:] = 0

    async def other():
        try:
            while True:
                cleaned[2] = 1
                await asyncio.sleep(0)
        finally:
            cleaned[0] += 1

    async def work():
        try:
            await asyncio.create_task(other())
        finally:
            cleaned[1] += 1

    task = cluster.start(work, cpus=[0])[0]
    eventually(lambda: cleaned[2])
    task.cancel()
    assert task._settle(SOON_S)
    assert task.cancelled()
    assert cleaned[:2].tolist() == [1, 1]


def test_cancel_by_force_boots_the_cpu_anew(boot, eventually):
    cluster = boot(3, idle="halt")
    masked = cluster.percpu("masked", "i8")

    def spin_masked():
        smp.local_irq_disable()
        masked[smp.smp_processor_id()] = 1
        while True:
            pass

    tasks = cluster.start(spin_masked, cpus=[0, 1])
    eventually(lambda: masked.sum() == 2)
    begun = time.monotonic()
    assert tasks.cancel(kill=True, grace=0.1)
    assert time.monotonic() - begun < SOON_S
    assert tasks.done()
    assert all(task.cancelled() for task in tasks)
    with pytest.raises(TaskCancelledError, match="its CPU killed for it"):
        tasks[0].result()
    assert [cpu.generation for cpu in cluster.cpus] == [2, 2, 1]
    assert cluster.run(smp.smp_processor_id) == [0, 1, 2]
    # One that ends in time is not killed for it.
    task = cluster.start(time.sleep, 60, cpus=[2])[0]
    eventually(task.running)
    assert task.cancel(kill=True, grace=10 * SOON_S)
    assert task.cancelled()
    assert cluster.cpus[2].generation == 1


def test_cancel_of_a_stopped_and_of_an_offline_cpu_is_bounded(boot, eventually):
    cluster = boot(3, idle="halt")
    tasks = cluster.start(spin, cpus=[0, 1])
    eventually(running(tasks))
    cluster.offline(1)  # for which all others have to stop for a moment
    os.kill(cluster.cpus[0].pid, signal.SIGSTOP)
    begun = time.monotonic()
    assert tasks.cancel()
    assert not tasks.wait(0.2)
    assert tasks[0].cancel(kill=True, grace=0.1)
    assert tasks[0].cancelled()
    cluster.online(1)
    assert tasks[1]._settle(SOON_S)
    assert tasks[1].cancelled()
    stays = cluster.start(spin, cpus=[1])[0]
    eventually(stays.running)
    cluster.offline(1)
    assert stays.cancel(kill=True, grace=0.1)
    assert stays.cancelled()
    assert [cpu.state for cpu in cluster.cpus][1] == "dead"
    assert time.monotonic() - begun < 4 * SOON_S
    cluster.online(1)
    assert cluster.run(smp.smp_processor_id) == [0, 1, 2]


def test_cancel_under_fire_loses_no_task(boot):
    """Each task ends once: it has returned, or was cancelled, begun or not."""
    cluster = boot(3, idle="haltpoll")
    begun, ended = cluster.shared("begun", "i8", 3), cluster.shared("ended", "i8", 3)

    def work():
        cpu = smp.smp_processor_id()
        begun[cpu] += 1
        time.sleep(0.0003)
        ended[cpu] += 1

    withdrawn = returned = interrupted = 0
    for turn in range(60):
        groups = [cluster.start(work) for _ in range(3)]
        time.sleep(0.0002 * (turn % 4))
        for group in groups:
            group.cancel()
        for task in itertools.chain(*groups):
            try:
                task.result(SOON_S)
                returned += 1
            except TaskCancelledError as error:
                withdrawn += "before it began" in str(error)
                interrupted += "before it began" not in str(error)
    assert withdrawn + returned + interrupted == 60 * 9
    assert ended.sum() >= returned
    assert begun.sum() <= returned + interrupted
    print(f"{withdrawn} withdrawn, {interrupted} interrupted, {returned} returned")


# ---- run: time-outs and Ctrl-C -------------------------------------------------------


def test_run_with_a_timeout_cancels_and_keeps_what_there_is(cluster):
    def work():
        cpu = smp.smp_processor_id()
        if cpu:
            time.sleep(60)
        return cpu

    with pytest.raises(IpiTimeoutError, match="CPUs 1-2 has not ended") as caught:
        cluster.run(work, timeout=SOON_S)
    assert caught.value.cpu == 1
    assert caught.value.results == {0: 0}
    assert isinstance(caught.value, TimeoutError)
    assert cluster.run(int, timeout=SOON_S) == [0, 0, 0]
    for wrong in (-1, float("nan")):
        with pytest.raises(ValueError, match="timeout"):
            cluster.run(int, timeout=wrong)


def test_run_gives_up_behind_a_task_that_goes_on(cluster, eventually):
    """Cancelled before they began: that they are late is said all the same."""
    first = cluster.start(time.sleep, 30, cpus=[1])
    eventually(running(first))
    with pytest.raises(IpiTimeoutError, match="CPU 1 has not ended") as caught:
        cluster.run(smp.smp_processor_id, cpus="0-1", timeout=SOON_S)
    assert caught.value.results == {0: 0}
    with pytest.raises(IpiTimeoutError, match="CPU 1 has not ended") as caught:
        cluster.run(smp.smp_processor_id, cpus=[1], timeout=0.1)
    assert caught.value.results == {}
    first.cancel()
    assert first.wait(SOON_S)
    assert cluster.run(smp.smp_processor_id, cpus=[1], timeout=SOON_S) == [1]


def test_late_tasks_do_not_hide_what_others_failed_with(cluster):
    def work():
        cpu = smp.smp_processor_id()
        if cpu == 0:
            raise ValueError("of CPU 0")
        time.sleep(30 if cpu == 1 else 0)
        return cpu

    with pytest.raises(IpiTimeoutError, match="CPU 1 has") as caught:
        cluster.run(work, cpus="0-2", timeout=SOON_S)
    assert caught.value.results == {2: 2}
    assert isinstance(caught.value.__cause__, RemoteCallError)
    assert isinstance(caught.value.__cause__.__cause__, ValueError)


def test_ctrl_c_in_run_cancels_its_tasks(script):
    """`interrupted_run`: the next run() runs, and nothing goes on behind its back."""
    done = script(
        """
        import os, signal, threading, time
        from shmipi import Cluster, smp

        def spin():
            while True:
                pass

        if __name__ == "__main__":
            with Cluster(2) as cluster:
                beats = cluster.shared("beats", "i8", 2)
                begun = cluster.shared("begun", "i8", 2)

                def noted(work):
                    begun[smp.smp_processor_id()] = 1
                    work()

                def interrupt(main=threading.main_thread().ident):
                    while begun.sum() < 2:
                        time.sleep(0.01)
                    time.sleep(0.1)
                    signal.pthread_kill(main, signal.SIGINT)

                def sleep():
                    while True:
                        beats[smp.smp_processor_id()] += 1
                        time.sleep(0.001)
                for work in (spin, sleep, lambda: time.sleep(60)):
                    begun[:] = 0
                    threading.Thread(target=interrupt).start()
                    try:
                        cluster.run(noted, work)
                    except KeyboardInterrupt as error:
                        print("interrupted", getattr(error, "__notes__", ""))
                    before = beats.tolist()
                    print(cluster.run(smp.smp_processor_id, timeout=10))
                    assert beats.tolist() == before
        """
    )
    assert done.text.splitlines() == ["interrupted ", "[0, 1]"] * 3


def test_ctrl_c_in_run_is_bounded_and_says_what_goes_on(script):
    done = script(
        """
        import signal, threading, time
        from shmipi import Cluster, smp

        if __name__ == "__main__":
            with Cluster(2) as cluster:
                flag = cluster.shared("flag", "i8", 1)

                def masked():
                    smp.local_irq_disable()
                    flag[0] = 1
                    while True:
                        pass

                def interrupt(main=threading.main_thread().ident):
                    while not flag[0]:
                        time.sleep(0.01)
                    signal.pthread_kill(main, signal.SIGINT)

                threading.Thread(target=interrupt).start()
                begun = time.monotonic()
                try:
                    cluster.run(masked, cpus=[1])
                except KeyboardInterrupt as error:
                    print(time.monotonic() - begun < 10, *error.__notes__)
        """
    )
    assert done.text.startswith("True shmipi: cancelled, and not ended yet on CPU 1")


# ---- one payload for all -------------------------------------------------------------


def test_a_large_argument_is_one_copy_for_all_cpus(boot):
    """`run_partial`: 5 MB for 16 CPUs are more than an arena, 16 times."""
    cluster = boot(16, idle="halt")
    ran = cluster.percpu("ran", "i8")

    def work(data):
        ran[smp.smp_processor_id()] += 1
        return int(data.sum())

    assert cluster.run(work, np.ones(5_000_000, "u1")) == [5_000_000] * 16
    assert ran.tolist() == [1] * 16
    # And it is gone with the last of them, also when it is cancelled.
    for _ in range(8):
        tasks = cluster.start(work, np.ones(20_000_000, "u1"), cpus="0-3")
        tasks.cancel()
        assert tasks.wait(30)
    # Results of every size come back, whatever the argument's size was.
    for size in (10, 3000, 100_000):
        assert (
            cluster.run(lambda data, size=size: bytes(size), bytes(100_000))
            == [bytes(size)] * 16
        )


def test_what_does_not_fit_is_refused_before_any_task_runs(boot, eventually):
    cluster = boot(4, idle="halt", arena_bytes=1 << 20)
    ran = cluster.percpu("ran", "i8")

    def work(data):
        ran[smp.smp_processor_id()] += 1
        return len(data)

    for start in (cluster.run, cluster.start):
        with pytest.raises(ArenaFullError, match=r"600\d\d\d bytes pickled"):
            start(work, bytes(600_000))
    front = cluster.start(time.sleep, 60)
    eventually(running(front))
    kept = cluster.start(work, bytes(400_000))
    with pytest.raises(
        ArenaFullError, match=r"\(1048576 bytes\) is full.* 400\d\d\d bytes"
    ):
        cluster.run(work, bytes(400_000))
    assert ran.tolist() == [0] * 4
    front.cancel()
    assert kept.results(SOON_S) == [400_000] * 4
    assert ran.tolist() == [1] * 4
    assert cluster.run(work, bytes(400_000)) == [400_000] * 4


def test_results_have_room_however_many_cpus_there_are(boot):
    """4,096 bytes for each are the whole arena: `stress --cpus 1024` has no more."""
    cluster = boot(48, idle="halt", arena_bytes=128 << 10)
    work = cluster.run(lambda x: [x, smp.smp_processor_id(), "text"], 7)
    assert work == [[7, n, "text"] for n in range(48)]
    assert cluster.run(bytes, 2000) == [bytes(2000)] * 48


# ---- what is told when they fail -----------------------------------------------------


@pytest.mark.parametrize(
    ("end", "words"),
    [
        (lambda: os._exit(3), "exited with status 3"),
        (lambda: os.kill(os.getpid(), signal.SIGKILL), "killed by SIGKILL"),
        (lambda: os.kill(os.getpid(), signal.SIGSEGV), "killed by SIGSEGV"),
    ],
)
def test_how_a_cpu_died_is_told_everywhere(boot, eventually, end, words):
    """By run, call and submit, and later calls; other CPUs' results are kept."""
    cluster = boot(3, idle="halt")

    def work():
        cpu = smp.smp_processor_id()
        if cpu == 1:
            end()
        return f"of {cpu}"

    with pytest.raises(CpuDiedError, match=rf"CPU 1 died \({words}\)") as caught:
        cluster.run(work)
    assert caught.value.results == {0: "of 0", 2: "of 2"}
    assert any("ended well on CPUs 0,2" in note for note in caught.value.__notes__)
    for use in (cluster.call, cluster.submit, cluster.smp.smp_call_function_single):
        with pytest.raises(CpuOfflineError, match=rf"dead, {words}: cluster.online\(1"):
            use(1, int)
    for use in (cluster.run, cluster.start):
        with pytest.raises(CpuOfflineError, match=f"CPU 1 is dead, {words}"):
            use(int, cpus=[0, 1])
    cluster.online(1)
    cluster.offline(1)
    with pytest.raises(CpuOfflineError, match="CPU 1 is offline: bring it back"):
        cluster.call(1, int)  # what the process before it ended by is not told of it
    cluster.online(1)
    for use in (cluster.call, lambda *a: cluster.submit(*a).result(SOON_S)):
        with pytest.raises(CpuDiedError, match=rf"\({words}\) with this call in hand"):
            use(1, end)
        cluster.online(1)
    with pytest.raises(CpuDiedError, match=words):
        cluster.smp.smp_call_function_single(1, lambda _: end())


def test_how_it_died_is_of_that_process_also_after_a_reboot(boot):
    cluster = boot(2, idle="halt")
    gate = cluster.shared("gate", "i8", 1)

    def leave():
        while not gate[0]:
            time.sleep(0.001)
        os._exit(3)

    first = cluster.start(leave, cpus=[1])[0]
    queued = cluster.start(int, cpus=[1])[0]
    gate[0] = 1
    while not first.done():
        time.sleep(0.001)
    cluster.online(1)
    second = cluster.start(lambda: os._exit(4), cpus=[1])[0]
    while not second.done():
        time.sleep(0.001)
    cluster.online(1)
    assert "(exited with status 3) while it ran this task" in str(first.exception())
    assert "exited with status 3" in str(queued.exception())
    assert "it has not run" in str(queued.exception())
    assert "exited with status 4" in str(second.exception())


def test_several_failures_keep_the_results_of_the_others(cluster):
    def work():
        cpu = smp.smp_processor_id()
        if cpu != 1:
            raise LookupError(cpu)
        return "kept"

    with pytest.raises(ExceptionGroup) as caught:
        cluster.run(work)
    assert isinstance(caught.value, CpusFailedError)
    assert caught.value.results == {1: "kept"}
    matched, rest = caught.value.split(RemoteCallError)
    assert matched.results == {1: "kept"}
    assert rest is None


def test_what_several_cpus_fail_with_is_a_group(cluster):
    """Of the broadcasts too, from the host and from a CPU, its own failure included."""

    def fail(numbers):
        if smp.smp_processor_id() in numbers:
            raise LookupError(smp.smp_processor_id())

    def from_a_cpu(numbers):
        try:
            smp.on_each_cpu(fail, numbers)
        except ExceptionGroup as group:
            return type(group).__name__, [error.cpu for error in group.exceptions]
        except RemoteCallError as error:
            return "one", error.cpu

    for send in (
        cluster.smp.on_each_cpu,
        cluster.smp.smp_call_function,
        lambda *what: cluster.smp.on_each_cpu_mask("0-2", *what),
        lambda *what: cluster.smp.smp_call_function_many("0-2", *what),
        lambda *what: cluster.smp.on_each_cpu_cond_mask(lambda *_: True, *what),
    ):
        with pytest.raises(CpusFailedError, match="several CPUs failed") as caught:
            send(fail, [0, 2])
        assert [error.cpu for error in caught.value.exceptions] == [0, 2]
        assert [error.__cause__.args for error in caught.value.exceptions] == [
            (0,),
            (2,),
        ]
        with pytest.raises(RemoteCallError) as caught:
            send(fail, [1])
        assert caught.value.cpu == 1
    for cpu in range(3):
        assert cluster.run(from_a_cpu, [0, 1, 2], cpus=[cpu]) == [
            ("CpusFailedError", [0, 1, 2])
        ]
        assert cluster.run(from_a_cpu, [cpu], cpus=[cpu]) == [("one", cpu)]
    assert cluster.run(from_a_cpu, [1, 2], cpus=[0]) == [("CpusFailedError", [1, 2])]


def test_a_group_names_a_cpu_that_died_of_it(boot):
    cluster = boot(3, idle="halt")

    def fail(_):
        if smp.smp_processor_id() == 1:
            os._exit(7)
        raise LookupError

    with pytest.raises(CpusFailedError) as caught:
        cluster.smp.on_each_cpu(fail)
    kinds = [type(error) for error in caught.value.exceptions]
    assert kinds == [RemoteCallError, CpuDiedError, RemoteCallError]
    assert "exited with status 7" in str(caught.value.exceptions[1])


def test_without_an_online_cpu_there_is_nothing_to_run_on(boot, eventually):
    with boot(2) as cluster:
        cluster.offline(0)
        os.kill(cluster.cpus[1].pid, signal.SIGKILL)  # the last one stays online
        eventually(lambda: cluster.cpus[1].state == "dead")
        for use in (cluster.run, cluster.start):
            with pytest.raises(CpuOfflineError, match="CPU 0"):
                use(int)
            with pytest.raises(ValueError, match="cpus is empty"):
                use(int, cpus=[])


def test_an_unknown_cpu_is_the_same_error_everywhere(cluster):
    info = cluster.smp.CallSingleData(id)
    uses = [
        lambda cpu: cluster.call(cpu, int),
        lambda cpu: cluster.submit(cpu, int),
        lambda cpu: cluster.run(int, cpus=[cpu]),
        lambda cpu: cluster.start(int, cpus=[0, cpu]),
        lambda cpu: cluster.offline(cpu),
        lambda cpu: cluster.online(cpu),
        lambda cpu: cluster.smp.smp_call_function_single(cpu, id),
        lambda cpu: cluster.smp.smp_call_function_single_async(cpu, info),
        lambda cpu: cluster.smp.smp_call_function_many([cpu], id),
        lambda cpu: cluster.smp.on_each_cpu_mask([cpu], id),
        lambda cpu: cluster.smp.smp_send_reschedule(cpu),
        lambda cpu: cluster.smp.smp_send_nmi_ipi(cpu, id),
    ]
    for use, cpu in itertools.product(uses, (3, 99, -1)):
        text = rf"^CPU {cpu} does not exist: this machine has CPUs 0-2$"
        with pytest.raises(shmipi.UnknownCpuError, match=text) as caught:
            use(cpu)
        assert isinstance(caught.value, CpuOfflineError)
        assert isinstance(caught.value, ValueError)
        assert caught.value.cpu == cpu or cpu < 0
        assert caught.value.errno == 6


def test_a_machine_that_is_closed_while_its_death_is_noted(cluster, eventually):
    """By another thread, just after this one's wait has ended with MachineDiedError."""
    (task,) = cluster.start(spin, cpus=[1])
    eventually(task.running)
    owner, real = task._cluster, cluster._machine

    class Closed:
        def await_call(self, *args):
            raise shmipi.MachineDiedError("the machine was shut down")

        def abandon(self, call):
            real.cancel(call, 1)
            raise shmipi.ClusterStateError("this cluster is closed")

    task._cluster = types.SimpleNamespace(_machine=Closed())
    try:
        assert not task._await(1.0)
        with pytest.raises(shmipi.MachineDiedError, match="shut down"):
            task.result(1)
    finally:
        task._cluster = owner
        real.abandon(task._call)  # cancelled above
        eventually(lambda: not cluster.cpus[1].task)
