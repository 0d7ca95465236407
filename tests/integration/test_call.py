"""Cluster.call, submit and run: results, errors, functions, payloads, time-outs."""

import concurrent.futures
import functools
import itertools
import os
import signal
import threading
import time
from pathlib import Path

import numpy as np
import pytest

import shmipi
from shmipi import ArenaFullError, IpiTimeoutError, RemoteCallError, smp

# ---- results -------------------------------------------------------------------------


@pytest.mark.parametrize(
    "value",
    [
        None,
        True,
        False,
        0,
        -1,
        2**63 - 1,
        -(2**63),
        2**63,
        10**40,
        1.5,
        float("inf"),
        b"",
        b"x" * 24,
        b"x" * 25,
        "text",
        (),
        (1, (2.5, "x")),
        {"a": [1, None]},
        {1, 2},
        1j,
        Path("/x"),
        bytearray(b"ab"),
        b"z" * 4000,
        b"z" * 5000,
    ],
    ids=lambda value: repr(value)[:20],
)
def test_values_come_back_as_they_went(cluster, value):
    result = cluster.call(1, lambda x: x, value)
    assert result == value
    assert type(result) is type(value)


def test_nan_and_negative_zero_keep_their_bits(cluster):
    assert str(cluster.call(1, lambda x: x, -0.0)) == "-0.0"
    assert np.isnan(cluster.call(1, lambda x: x, float("nan")))


def test_arguments_by_position_and_keyword(cluster):
    def f(*args, **kwargs):
        return args, kwargs

    assert cluster.call(1, f) == ((), {})
    assert cluster.call(1, f, 1) == ((1,), {})
    assert cluster.call(1, f, 1, "b", c=3) == ((1, "b"), {"c": 3})
    # Names of call()'s own parameters that it does not take are the function's.
    assert cluster.call(1, f, cpu=1, func=2) == ((), {"cpu": 1, "func": 2})


def test_it_runs_on_that_cpu_in_interrupt_context(cluster):
    def where():
        here = smp.smp_processor_id(), smp.in_hardirq(), smp.irqs_disabled()
        return os.getpid(), *here, smp.in_task(), smp.in_nmi()

    for cpu in cluster.cpus:
        assert cluster.call(cpu.id, where) == (
            cpu.pid,
            cpu.id,
            True,
            True,
            False,
            False,
        )
        assert cluster.submit(cpu.id, where).result(5)[1:] == (
            cpu.id,
            True,
            True,
            False,
            False,
        )


def test_builtins_classes_methods_and_partials(cluster):
    class Adder:
        def __init__(self, n):
            self.n = n

        def add(self, m):
            return self.n + m

        def __call__(self, m):
            return self.n * m

    adder = Adder(3)
    assert cluster.call(1, len, "abc") == 3
    assert cluster.call(1, int, "17") == 17
    assert cluster.call(1, "a-b".split, "-") == ["a", "b"]
    assert cluster.call(1, adder.add, 4) == 7
    assert cluster.call(1, adder, 4) == 12
    adder.n = 5  # such callables are pickled at each call: the change is seen
    assert cluster.call(1, adder.add, 4) == 9
    assert cluster.call(1, adder, 4) == 20
    assert cluster.call(1, functools.partial(pow, 2), 5) == 32
    assert cluster.call(1, np.arange, 3).tolist() == [0, 1, 2]


# ---- exceptions ----------------------------------------------------------------------


def boom(message):
    raise ValueError(message)


def test_an_exception_arrives_with_cause_and_traceback(cluster):
    with pytest.raises(RemoteCallError) as caught:
        cluster.call(1, boom, "loud")
    error = caught.value
    assert error.cpu == 1
    assert type(error.__cause__) is ValueError
    assert error.__cause__.args == ("loud",)
    text = str(error)
    assert "ValueError('loud')" in text
    assert "Traceback (most recent call last)" in text
    assert "in boom" in text
    assert isinstance(error, shmipi.ShmipiError)
    assert isinstance(error, RuntimeError)


def test_a_cause_keeps_its_own_cause_in_the_text(cluster):
    def f():
        try:
            1 / 0  # noqa: B018
        except ZeroDivisionError as error:
            raise KeyError("outer") from error

    with pytest.raises(RemoteCallError) as caught:
        cluster.call(1, f)
    assert type(caught.value.__cause__) is KeyError
    assert "ZeroDivisionError" in str(caught.value)


def test_an_exception_that_cannot_be_pickled(cluster):
    def f():
        class Local(Exception):
            def __init__(self):
                super().__init__("x")
                self.lock = threading.Lock()

            def __repr__(self):
                return "Local with a lock"

        raise Local

    with pytest.raises(RemoteCallError) as caught:
        cluster.call(1, f)
    assert caught.value.__cause__ is None
    assert caught.value.remote_repr == "Local with a lock"
    assert "Local with a lock" in str(caught.value)
    assert cluster.call(1, int) == 0


def test_an_exception_that_cannot_be_unpickled(cluster):
    def f():
        raise NeedsTwo("a", "b")

    with pytest.raises(RemoteCallError) as caught:
        cluster.call(1, f)
    assert caught.value.__cause__ is None
    assert "NeedsTwo" in str(caught.value)


class NeedsTwo(Exception):
    def __init__(self, one, two):
        super().__init__(one)  # pickle calls NeedsTwo(one) and fails


def test_an_exception_whose_repr_raises(cluster):
    def f():
        class Bad(Exception):
            def __repr__(self):
                raise RuntimeError

            __str__ = __repr__

        raise Bad

    with pytest.raises(RemoteCallError, match="Bad"):
        cluster.call(1, f)


@pytest.mark.parametrize("kind", [SystemExit, KeyboardInterrupt, GeneratorExit])
def test_exceptions_that_end_programs_end_no_cpu(cluster, kind):
    def f():
        raise kind

    pid = cluster.cpus[1].pid
    with pytest.raises(RemoteCallError) as caught:
        cluster.call(1, f)
    assert type(caught.value.__cause__) is kind
    with pytest.raises(RemoteCallError):
        cluster.run(f, cpus=[1])
    assert cluster.call(1, os.getpid) == pid


def test_a_large_exception(cluster):
    with pytest.raises(RemoteCallError) as caught:
        cluster.call(1, boom, "m" * 300_000)
    assert caught.value.__cause__.args == ("m" * 300_000,)


def test_nobody_waiting_is_unraisable_there_and_counted(boot, capfd):
    cluster = boot(2, idle="halt")

    def hook(info):
        shmipi.shared("seen")[0] += type(info.exc_value) is ZeroDivisionError

    def install():
        import sys

        sys.unraisablehook = hook

    def f(info):
        1 / 0  # noqa: B018

    seen = cluster.shared("seen", "i8", 1)
    cluster.call(1, install)
    before = cluster.counters()["unraisable"]
    cluster.smp.smp_call_function_single(1, f, None, wait=False)
    cluster.smp.smp_call_function_many([1], f, None, wait=False)
    cluster.smp.smp_call_function_single_async(1, cluster.smp.CallSingleData(f))
    cluster.call(1, int)
    cluster.call(1, int)  # the first overtakes what nobody waits for
    assert seen[0] == 3
    after = cluster.counters()["unraisable"]
    assert (after - before).tolist() == [0, 3]
    assert capfd.readouterr().err == ""


def test_without_a_hook_the_traceback_is_on_stderr(boot, capfd):
    cluster = boot(2, idle="halt")
    cluster.smp.smp_call_function_single(1, boom, "unseen", wait=False)
    cluster.call(1, int)
    cluster.call(1, int)
    cluster.shutdown()
    assert "ValueError: unseen" in capfd.readouterr().err


# ---- what cannot be sent -------------------------------------------------------------


def test_an_unpicklable_argument_is_a_clear_error(cluster):
    with pytest.raises(TypeError, match="lock") as caught:
        cluster.call(1, id, threading.Lock())
    assert any("pickled" in note for note in caught.value.__notes__)
    assert cluster.call(1, int) == 0


def test_an_unpicklable_closure_is_a_clear_error(cluster):
    lock = threading.Lock()
    with pytest.raises(TypeError, match="lock"):
        cluster.call(1, lambda: lock)


def test_an_unpicklable_result_is_the_callers_error(cluster):
    with pytest.raises(RemoteCallError) as caught:
        cluster.call(1, threading.Lock)
    assert isinstance(caught.value.__cause__, TypeError)
    assert cluster.call(1, int) == 0


def test_an_argument_that_does_not_unpickle_there(cluster):
    class Evil:
        def __reduce__(self):
            return int, ("no number",)

    with pytest.raises(RemoteCallError) as caught:
        cluster.call(1, id, Evil())
    assert isinstance(caught.value.__cause__, ValueError)
    assert cluster.call(1, int) == 0


def test_not_callable(cluster):
    for wrong in (None, 3, "print"):
        with pytest.raises(TypeError, match="callable"):
            cluster.call(1, wrong)
        with pytest.raises(TypeError, match="callable"):
            cluster.submit(1, wrong)
        with pytest.raises(TypeError, match="callable"):
            cluster.run(wrong)


# ---- functions -----------------------------------------------------------------------


def test_functions_of_main_and_their_globals(script):
    done = script(
        """
        import sys
        from shmipi import Cluster

        factor = 6

        class Point:
            def __init__(self, x):
                self.x = x

        def helper(x):
            return x * factor

        def f(point):
            return Point(helper(point.x))

        if __name__ == "__main__":
            with Cluster(2, idle="halt") as cluster:
                print(cluster.call(1, f, Point(7)).x)
                print(cluster.call(1, lambda: helper(1)))
                print(type(cluster.call(1, f, Point(7))) is Point)
                print(cluster.run(f.__class__.__name__.upper), sys.argv[1:])
                print(cluster.call(1, lambda: sys.argv[1:]))
        """,
        "a",
        "b",
    )
    assert done.text.split("\n")[:5] == [
        "42",
        "6",
        "True",
        "['FUNCTION', 'FUNCTION'] ['a', 'b']",
        "['a', 'b']",
    ]


class CountPickles:
    """Says how often it was pickled; unpickles as a number."""

    def __init__(self):
        self.times = 0

    def __reduce__(self):
        self.times += 1
        return int, (self.times,)


def test_a_function_is_sent_once_to_each_machine_and_then_is_an_id(cluster):
    probe = CountPickles()
    payload = b"p" * 100_000

    def f(_x, p=probe, q=payload):
        return p

    assert [cluster.call(cpu, f, 0) for cpu in (0, 1, 2, 1, 0)] == [1] * 5
    cluster.smp.on_each_cpu(f, None)
    assert cluster.run(f, 0) == [1, 1, 1]
    assert probe.times == 1


def test_the_copy_on_a_cpu_stays_the_same_object(cluster):
    """Unpickled once there: state a function keeps on itself is kept."""

    def f():
        f.calls = getattr(f, "calls", 0) + 1
        return f.calls

    assert [cluster.call(1, f) for _ in range(3)] == [1, 2, 3]
    assert cluster.call(2, f) == 1


def test_a_changed_default_travels(cluster):
    def f(x=1):
        return x

    assert cluster.call(1, f) == 1
    f.__defaults__ = (2,)
    assert cluster.call(1, f) == 2
    f.__defaults__ = None
    with pytest.raises(RemoteCallError):
        cluster.call(1, f)


def test_a_changed_keyword_default_travels(cluster):
    def f(*, x=1):
        return x

    assert cluster.call(1, f) == 1
    f.__kwdefaults__ = {"x": 2}
    assert cluster.call(1, f) == 2


def test_changed_code_travels(cluster):
    def f():
        return 1

    def g():
        return 2

    assert cluster.call(1, f) == 1
    f.__code__ = g.__code__
    assert cluster.call(1, f) == 2


def test_a_changed_closure_cell_travels(cluster):
    n = 1

    def f():
        return n

    assert cluster.call(1, f) == 1
    n = 2
    assert cluster.call(1, f) == 2
    assert cluster.call(2, f) == 2
    n = [3]
    assert cluster.call(1, f) == [3]
    n = 1
    assert cluster.call(1, f) == 1


def test_what_a_cell_holds_is_compared_by_identity(cluster):
    """A mutable content that changes in place is, as documented, not sent anew."""
    n = [1]

    def f():
        return n

    assert cluster.call(1, f) == [1]
    n.append(2)
    assert cluster.call(1, f) == [1]
    n = [1, 2]
    assert cluster.call(1, f) == [1, 2]


def test_a_freed_functions_id_is_never_the_next_ones(cluster):
    """Objects of the same address, ids of the same number: each runs its own code."""
    for n in range(300):
        assert cluster.call(1, lambda n=n: n) == n
        assert cluster.call(2, eval(f"lambda: {n} + 1")) == n + 1


def test_twenty_thousand_functions_leave_nothing_behind(boot):
    cluster = boot(2, idle="haltpoll")

    def memory():
        import gc

        gc.collect()
        status = Path("/proc/self/status").read_text()
        return int(status.partition("RssAnon:")[2].split()[0])

    def backed():
        return os.stat(f"/dev/shm/shmipi.{os.getuid()}.{cluster.name}").st_blocks * 512

    for n in range(2_000):
        assert cluster.call(1, lambda n=n: n) == n
    there, here, shm = cluster.call(1, memory), memory(), backed()
    for n in range(20_000):  # more than the table of functions has places
        assert cluster.call(1, lambda n=n: n) == n
    assert cluster.call(1, memory) - there < 2_000
    assert memory() - here < 4_000
    assert backed() - shm < 1 << 20


def test_a_function_freed_before_it_runs_still_runs(cluster):
    """A number is kept until every queued call that names it has ended."""
    futures = []
    cluster.smp.smp_call_function_single(1, lambda _: time.sleep(0.05), wait=False)
    for n in range(50):
        futures.append(cluster.submit(1, lambda n=n: n))  # nothing else holds it
    for _ in range(50):
        cluster.call(2, lambda: None)  # takes numbers that are free
    assert [future.result(5) for future in futures] == list(range(50))


def test_recursion_and_self_reference(cluster):
    def fib(n):
        return n if n < 2 else fib(n - 1) + fib(n - 2)

    assert cluster.call(1, fib, 10) == 55


# ---- payloads ------------------------------------------------------------------------


@pytest.mark.parametrize("size", [4_000, 4_096, 5_000, 1 << 20, 10 << 20])
def test_large_arguments_and_results(cluster, size):
    data = os.urandom(size)
    assert cluster.call(1, lambda x: x, data) == data
    assert cluster.call(1, len, data) == size
    assert cluster.call(1, bytes, size) == bytes(size)
    array = np.frombuffer(data, np.uint8)
    assert np.array_equal(cluster.call(1, lambda x: x, array), array)


def test_many_large_results_at_once(cluster):
    futures = [cluster.submit(n % 3, bytes, 1_000_000 + n) for n in range(20)]
    assert [len(f.result(10)) for f in futures] == [1_000_000 + n for n in range(20)]


def test_beyond_the_arena_is_an_error_that_says_so(boot):
    cluster = boot(2, idle="halt", arena_bytes=1 << 20)
    assert cluster.payload_max == 1 << 19
    with pytest.raises(ArenaFullError, match=r"524288.*cluster\.shared") as caught:
        cluster.call(1, len, bytes(1 << 20))
    assert caught.value.errno in (7, 105)  # E2BIG, ENOBUFS
    with pytest.raises(ArenaFullError):
        cluster.smp.smp_call_function_single(1, id, bytes(2 << 20))
    with pytest.raises(ArenaFullError):
        cluster.smp.CallSingleData(id, bytes(2 << 20))
    with pytest.raises(RemoteCallError) as remote:
        cluster.call(1, bytes, 2 << 20)
    assert isinstance(remote.value.__cause__, ArenaFullError)
    with pytest.raises(ArenaFullError):
        cluster.call(1, lambda data=bytes(2 << 20): None)
    # Nothing of all that is left in the arena.
    for _ in range(20):
        assert cluster.call(1, len, bytes(400_000)) == 400_000


def test_what_the_arena_is_said_to_hold_fits(boot):
    """`arena_bytes` is "the most that one pickled argument or result may have"."""
    cluster = boot(2, idle="halt", arena_bytes=1 << 20)
    most = cluster.payload_max - 200  # the pickle's own frame
    assert cluster.call(1, len, bytes(most)) == most
    assert len(cluster.call(1, bytes, most)) == most


def test_a_full_arena_is_an_error_and_passes(boot, eventually):
    """Full of payloads not yet taken up: an error at once, room again afterwards."""
    cluster = boot(2, idle="halt", arena_bytes=1 << 20)
    gate = cluster.shared("gate", "i4", 1)

    def hold():
        while not gate[0]:
            time.sleep(0.001)

    futures = [cluster.submit(1, hold)]

    def fill():
        while len(futures) < 100:
            futures.append(cluster.submit(1, len, bytes(100_000)))

    with pytest.raises(ArenaFullError, match="full"):
        fill()
    assert 1 < len(futures) < 12
    assert cluster.submit(0, int).result(5) == 0  # what needs little still goes
    gate[0] = 1
    assert [f.result(5) for f in futures[1:]] == [100_000] * (len(futures) - 1)
    assert cluster.call(1, len, bytes(400_000)) == 400_000


def test_abandoned_large_results_do_not_pile_up(boot):
    """Results that nobody fetched after a time-out are dropped in the end."""
    cluster = boot(2, idle="halt")
    given_up = cluster.shared("given_up", "i8", 1)

    def slow(turn):
        while given_up[0] < turn:  # however late the caller looks at its clock
            time.sleep(0.0005)
        return bytes(1_000_000)

    def memory():
        status = Path("/proc/self/status").read_text()
        return int(status.partition("VmRSS:")[2].split()[0])

    before = cluster.call(1, memory)
    for turn in range(1, 151):
        with pytest.raises(IpiTimeoutError):
            cluster.call(1, slow, turn, timeout=0.001)
        given_up[0] = turn
    assert cluster.call(1, memory) - before < 100_000  # KiB; all: 150,000


# ---- submit --------------------------------------------------------------------------


def test_a_future_is_a_concurrent_future(cluster):
    futures = [cluster.submit(n % 3, divmod, n, 7) for n in range(100)]
    assert all(isinstance(f, concurrent.futures.Future) for f in futures)
    done, late = concurrent.futures.wait(futures, timeout=10)
    assert not late
    assert len(done) == 100
    assert [f.result() for f in futures] == [divmod(n, 7) for n in range(100)]


def test_a_futures_exception(cluster):
    future = cluster.submit(1, boom, "x")
    assert isinstance(future.exception(5), RemoteCallError)
    assert isinstance(future.exception().__cause__, ValueError)
    called = []
    cluster.submit(1, int).add_done_callback(called.append)
    assert cluster.submit(1, int).result(5) == 0


def test_submit_does_not_wait(cluster, gate):
    work, let_go = gate
    future = cluster.submit(1, work, 7)
    assert not future.done()
    assert not future.cancel()
    with pytest.raises(TimeoutError):
        future.result(0.05)
    let_go()
    assert future.result(5) == 7


def test_more_futures_than_requests(script):
    """Beyond all requests of a sender submit() waits for room, and all complete."""
    done = script(
        """
        import threading, time
        from shmipi import Cluster

        with Cluster(2, idle="halt") as cluster:
            gate = cluster.shared("gate", "i4", 1)

            def hold():
                while not gate[0]:
                    time.sleep(0.001)

            def release():
                gate[0] = 1

            first = cluster.submit(1, hold)
            threading.Timer(1.0, release).start()
            futures = [cluster.submit(1, abs, -n) for n in range(10_000)]
            print([f.result(10) for f in futures] == list(range(10_000)))
        """,
        timeout=10,
    )
    assert done.text == "True\n"


def test_futures_of_one_sender_complete_in_order(cluster, eventually):
    order = []
    futures = [cluster.submit(1, int, n) for n in range(500)]
    for n, future in enumerate(futures):
        future.add_done_callback(lambda _, n=n: order.append(n))
    concurrent.futures.wait(futures, 10)
    assert cluster.call(1, lambda: True)
    eventually(lambda: len(order) >= 500)  # callbacks come after their results
    assert sorted(order) == list(range(500))


# ---- run -----------------------------------------------------------------------------


def test_run_gives_results_in_cpu_order(cluster):
    def f(x):
        time.sleep(0.03 * (2 - smp.smp_processor_id()))
        return smp.smp_processor_id(), x, smp.in_task(), smp.irqs_disabled()

    assert cluster.run(f, 5) == [(n, 5, True, False) for n in range(3)]
    assert [r[0] for r in cluster.run(f, 5, cpus="2,0")] == [0, 2]
    assert [r[0] for r in cluster.run(f, 5, cpus=shmipi.CpuMask([1]))] == [1]


def test_run_runs_them_at_the_same_time(cluster):
    here = cluster.shared("here", "i8", 3)
    here[:] = 0

    def wait_for_the_others():
        here[smp.smp_processor_id()] = 1
        end = time.monotonic() + 10
        while not here.all() and time.monotonic() < end:
            time.sleep(0.001)
        return bool(here.all())

    assert cluster.run(wait_for_the_others) == [True] * 3


def test_tasks_of_one_cpu_queue_up(cluster, background):
    log = cluster.shared("task_log", "f8", (4, 2))

    def f(n):
        log[n] = time.monotonic(), 0
        time.sleep(0.03)
        log[n, 1] = time.monotonic()

    threads = [background(cluster.run, f, n) for n in range(4)]
    for thread in threads:
        thread.end()

    def one(n):
        return cluster.run(f, n, cpus=[1])

    threads = [background(one, n) for n in range(4)]
    for thread in threads:
        thread.end()
    spans = sorted(map(tuple, log.tolist()))
    for (_, end), (start, _) in itertools.pairwise(spans):
        assert start >= end, "two tasks of one CPU overlap"


def test_one_failure_comes_as_itself(cluster):
    def f():
        if smp.smp_processor_id() == 1:
            raise LookupError("on one")

    with pytest.raises(RemoteCallError, match="on one") as caught:
        cluster.run(f)
    assert caught.value.cpu == 1


def test_several_failures_come_as_a_group(cluster):
    def f():
        if smp.smp_processor_id() != 1:
            raise LookupError(smp.smp_processor_id())

    with pytest.raises(ExceptionGroup) as caught:
        cluster.run(f)
    assert [type(e) for e in caught.value.exceptions] == [RemoteCallError] * 2
    assert [e.cpu for e in caught.value.exceptions] == [0, 2]
    assert [e.__cause__.args for e in caught.value.exceptions] == [(0,), (2,)]


def test_run_waits_for_all_before_it_raises(cluster):
    ended = cluster.shared("ended", "i8", 3)
    ended[:] = 0

    def f():
        cpu = smp.smp_processor_id()
        if cpu == 0:
            raise ValueError
        time.sleep(0.1)
        ended[cpu] = 1

    with pytest.raises(RemoteCallError):
        cluster.run(f)
    assert ended.tolist() == [0, 1, 1]


def test_tasks_call_each_other(cluster):
    """Crossed waiting calls between tasks: a waiter services its own queue."""

    def f():
        me = smp.smp_processor_id()
        for n in range(300):
            smp.smp_call_function_single((me + 1 + n % 2) % 3, lambda _: None)
        return me

    assert cluster.run(f) == [0, 1, 2]


# ---- time-outs -----------------------------------------------------------------------


def test_a_timeout_ends_the_wait_and_the_call_may_still_run(
    cluster, gate, own_time, eventually
):
    work, let_go = gate
    ran = cluster.shared("ran", "i8", 1)
    ran[0] = 0

    def f():
        work()
        ran[0] += 1

    start, own_start = time.monotonic(), own_time()
    with pytest.raises(IpiTimeoutError, match="CPU 1") as caught:
        cluster.call(1, f, timeout=0.05)
    assert time.monotonic() - start >= 0.05
    assert own_time() - own_start < 0.18
    let_go()
    assert isinstance(caught.value, TimeoutError)
    assert caught.value.cpu == 1
    assert cluster.call(2, int, timeout=5) == 0  # its request is not used again
    eventually(lambda: ran[0] == 1)
    assert cluster.call(1, int, timeout=5) == 0


def test_timeout_zero_and_infinity(cluster, gate):
    work, let_go = gate
    with pytest.raises(IpiTimeoutError):
        cluster.call(1, work, timeout=0)
    let_go()
    assert cluster.call(1, int, timeout=float("inf")) == 0
    assert cluster.call(1, int, timeout=5) == 0


def test_hundreds_of_timeouts_leak_nothing(cluster):
    pid = cluster.cpus[1].pid
    os.kill(pid, signal.SIGSTOP)
    try:
        for _ in range(300):
            with pytest.raises(IpiTimeoutError):
                cluster.call(1, time.sleep, 0.001, timeout=0.0001)
    finally:
        os.kill(pid, signal.SIGCONT)
    assert cluster.call(1, len, bytes(100_000), timeout=10) == 100_000


@pytest.mark.parametrize("timeout", [-1, float("nan")])
def test_wrong_timeouts(cluster, timeout):
    with pytest.raises(ValueError, match="timeout"):
        cluster.call(1, int, timeout=timeout)


def test_timeout_of_a_wrong_type(cluster):
    with pytest.raises(TypeError):
        cluster.call(1, int, timeout="1")


# ---- threads and signals of the host -------------------------------------------------


def test_threads_of_the_host_all_call_at_once(cluster, background):
    def caller(seed):
        for n in range(200):
            x = seed * 1000 + n
            assert cluster.call(x % 3, lambda a: a, x) == x
            if n % 10 == 0:
                assert cluster.submit(x % 3, str, x).result(10) == str(x)
            if n % 25 == 0:
                cluster.smp.on_each_cpu(id, x)
            if n % 50 == 0:
                assert cluster.run(abs, -x) == [x] * 3
        return seed

    threads = [background(caller, n) for n in range(8)]
    assert [t.end(60) for t in threads] == list(range(8))


def test_ctrl_c_ends_a_wait_and_leaves_the_machine_usable(script):
    """Every kind of wait, each on a machine of its own.

    What is waited for cannot end before the wait was interrupted. That comes at once:
    what counts is not the clock alone, but less what the computer had no time for.
    """
    done = script(
        """
        import os, signal, threading, time
        from contextlib import ExitStack
        from pathlib import Path
        from shmipi import Cluster, atomic

        def of_threads(pid):
            files = Path(f"/proc/{pid}/task").glob("*/schedstat")
            return sum(int(file.read_text().split()[1]) for file in files) / 1e9

        def kept_waiting(cluster):
            # Seconds in which threads of this process, and each CPU (`run` waits until
            # its tasks have ended there), could run and were not let: by others here,
            # and by others on the computer that this one is a guest of.
            cpus = [of_threads(cpu.pid) for cpu in cluster.cpus]
            stolen = int(Path("/proc/stat").read_text().split()[8])
            here = of_threads("self") + stolen / os.sysconf("SC_CLK_TCK")
            return here, *cpus

        def lost(before, after):
            here, *cpus = (new - old for new, old in zip(after, before))
            return here + max(cpus)

        def clock(cluster):
            while True:  # both of one moment: not kept from the core between the looks
                before, at = kept_waiting(cluster), time.monotonic()
                if lost(before, kept_waiting(cluster)) < 0.001:
                    return at, before

        sent = []

        def interrupt(cluster, begun, tasks):
            while begun[0] < tasks:  # then the call has been sent
                time.sleep(0.001)
            time.sleep(0.1)
            sent[:] = clock(cluster)
            signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
            sent.append("yes")

        with ExitStack() as stack:
            machines = {}
            for what in ("call", "run", "single", "future"):
                cluster = stack.enter_context(Cluster(2, idle="halt"))
                ran = cluster.shared("ran", "i8", 1)
                go = cluster.shared("go", "i8", 1)
                begun = cluster.shared("begun", "i8", 1)

                def slow(_=None, ran=ran, go=go, begun=begun):
                    atomic.fetch_add(begun, 0, 1)
                    end = time.monotonic() + 20
                    while not go[0] and time.monotonic() < end:
                        time.sleep(0.01)
                    atomic.fetch_add(ran, 0, 1)

                for _ in range(2):
                    go[0] = begun[0] = 0
                    asked = cluster, begun, 2 if what == "run" else 1
                    thread = threading.Thread(target=interrupt, args=asked)
                    thread.start()
                    try:
                        if what == "call":
                            cluster.call(1, slow)
                        elif what == "run":
                            cluster.run(slow)
                        elif what == "single":
                            cluster.smp.smp_call_function_single(1, slow)
                        else:
                            cluster.submit(1, slow).result()
                    except KeyboardInterrupt:
                        at, waited = clock(cluster)
                        took = at - sent[0] - lost(sent[1], waited)
                        before = int(ran[0])
                        print(what, "interrupted", took < 0.25, before, flush=True)
                    thread.join()
                    go[0] = 1
                    # Handlers heard nothing of it, and what was left behind still
                    # runs; tasks of `run` were cancelled.
                    assert cluster.call(1, lambda: "usable") == "usable"
                machines[what] = cluster, ran
            for what, (cluster, ran) in machines.items():
                print(what, cluster.run(int), int(ran[0]))
        """
    )
    each = {"call": 1, "run": 0, "single": 1, "future": 1}
    assert done.text.splitlines() == [
        *[
            f"{what} interrupted True {n * ran}"
            for what, ran in each.items()
            for n in range(2)
        ],
        *[f"{what} [0, 0] {2 * ran}" for what, ran in each.items()],
    ]


def test_signal_handlers_of_the_host_run_during_a_wait(script):
    done = script(
        """
        import os, signal, time
        from shmipi import Cluster

        with Cluster(2, idle="halt") as cluster:
            seen = cluster.shared("seen", "i8", 1)

            def until_seen():
                end = time.monotonic() + 20
                while not seen[0] and time.monotonic() < end:
                    time.sleep(0.001)
                there = int(seen[0])
                time.sleep(0.3)
                return there

            def note(*_):
                seen[0] += 1

            signal.signal(signal.SIGALRM, note)
            signal.setitimer(signal.ITIMER_REAL, 0.1)
            print(cluster.call(1, until_seen), seen[0])  # it waits on behind it
        """
    )
    assert done.text == "1 1\n"


def test_the_interpreter_is_free_while_a_call_waits(cluster, background, own_time):
    """Other threads of the host go on: spinning holds the GIL for microseconds."""
    thread = background(cluster.call, 1, time.sleep, 1.0)
    turns, longest, last = 0, 0.0, own_time()
    while thread.is_alive():
        end = time.perf_counter() + 0.01
        while time.perf_counter() < end:
            turns += 1
        now = own_time()
        longest, last = max(longest, now - last), now
    assert turns > 1000
    assert longest < 0.1
    thread.end()
