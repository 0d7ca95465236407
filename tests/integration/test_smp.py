"""The contracts of kernel/smp.c, as shmipi.smp keeps them."""

import errno
import os
import time
import warnings

import pytest

import shmipi
from shmipi import (
    ClusterStateError,
    CpuOfflineError,
    CsdBusyError,
    IpiDeadlockError,
    NoMachineError,
    RemoteCallError,
    ShmipiWarning,
    atomic,
    smp,
)

# Handlers write what they did into the shared array "log": entry 0 is how many.


def note(what):
    log = shmipi.shared("log")
    log[1 + shmipi.atomic.fetch_add(log, 0, 1)] = what


def entries(cluster):
    log = cluster.shared("log", "i8", 4096)
    return log[1 : 1 + log[0]].tolist()


@pytest.fixture(autouse=True)
def empty_log(cluster):
    cluster.shared("log", "i8", 4096)[:] = 0


def flush(cluster, cpu=1):
    """All that was queued has run: a waiting call overtakes the rest, a second not."""
    cluster.call(cpu, int)
    cluster.call(cpu, int)


def run_on(cluster, cpu, func, *args):
    return cluster.run(func, *args, cpus=[cpu])[0]


# ---- smp_call_function_single --------------------------------------------------------


def test_single_runs_there_and_returns_none(cluster):
    """Proves row 1."""

    def f(info):
        note(100 * smp.smp_processor_id() + info)

    assert cluster.smp.smp_call_function_single(1, f, 7) is None
    assert (
        cluster.smp.smp_call_function_single(cpu=2, func=f, info=8, wait=True) is None
    )
    assert entries(cluster) == [107, 208]


def test_info_defaults_to_none(cluster):
    def f(info):
        note(info is None)

    cluster.smp.smp_call_function_single(1, f)
    assert entries(cluster) == [1]


def test_a_handlers_exception_is_raised_at_the_waiting_caller(cluster):
    def f(info):
        raise LookupError(info)

    def task():
        try:
            smp.smp_call_function_single(2, f, 5)
        except RemoteCallError as error:
            return error.cpu, type(error.__cause__), error.__cause__.args

    with pytest.raises(RemoteCallError) as caught:
        cluster.smp.smp_call_function_single(1, f, 3)
    assert caught.value.__cause__.args == (3,)
    assert run_on(cluster, 1, task) == (2, LookupError, (5,))


def test_self_runs_inline_with_interrupts_off_and_without_a_doorbell(cluster):
    """Proves row 5."""

    def task(calls):
        def here(info):
            seen.append((info, smp.irqs_disabled(), smp.smp_processor_id()))

        seen = []
        for wait in (True, False)[:calls]:
            smp.smp_call_function_single(smp.smp_processor_id(), here, 5, wait)
            assert seen.pop() == (5, True, smp.smp_processor_id())
        return smp.irqs_disabled(), len(seen)

    def counted(calls):
        before = cluster.counters()
        assert run_on(cluster, 1, task, calls) == (False, 0)
        after = cluster.counters()
        names = ("calls_self", "csd_queued", "doorbells_sent", "kicks_sent")
        return [int(after[name][1] - before[name][1]) for name in names]

    nothing, two = counted(0), counted(2)
    assert two == [2, *nothing[1:]]


def test_self_shares_the_very_object(cluster):
    def task():
        box = []
        smp.smp_call_function_single(1, box.append, "x")
        return box

    assert run_on(cluster, 1, task) == ["x"]


def test_self_raises_as_another_cpu_would(cluster, capfd):
    def f(info):
        raise ValueError("inline")

    def task():
        try:
            smp.smp_call_function_single(1, f, None, True)
        except RemoteCallError as error:
            caught = type(error.__cause__) is ValueError
        smp.smp_call_function_single(1, f, None, False)  # nobody waits: unraisable
        return caught, smp.irqs_disabled()

    before = cluster.counters()["unraisable"][1]
    assert run_on(cluster, 1, task) == (True, False)
    assert cluster.counters()["unraisable"][1] == before + 1


@pytest.mark.parametrize("cpu", [3, 4095, -1, 2**40, -(2**70)])
def test_enxio_for_cpus_that_do_not_exist(cluster, cpu):
    """Proves row 4."""
    csd = cluster.smp.CallSingleData(id)
    for call in (
        lambda: cluster.smp.smp_call_function_single(cpu, id),
        lambda: cluster.smp.smp_call_function_single_async(cpu, csd),
        lambda: cluster.smp.smp_send_reschedule(cpu),
        lambda: cluster.call(cpu, int),
        lambda: cluster.submit(cpu, int),
    ):
        with pytest.raises(CpuOfflineError, match="does not exist") as caught:
            call()
        assert caught.value.errno == errno.ENXIO
        assert isinstance(caught.value, OSError)
    assert not csd.locked


def test_enxio_for_an_offline_cpu(boot):
    """Proves rows 4 and 34."""
    cluster = boot(2, idle="halt")
    cluster.offline(1)
    csd = cluster.smp.CallSingleData(id)
    for wait in (True, False):
        with pytest.raises(CpuOfflineError, match=r"cluster\.online\(1\)") as caught:
            cluster.smp.smp_call_function_single(1, id, None, wait)
        assert caught.value.errno == errno.ENXIO
        assert caught.value.cpu == 1
    with pytest.raises(CpuOfflineError):
        cluster.smp.smp_call_function_single_async(1, csd)
    assert not csd.locked
    with pytest.warns(ShmipiWarning, match="offline CPU#1"):
        cluster.smp.smp_send_reschedule(1)
    cluster.online(1)
    cluster.smp.smp_call_function_single_async(1, csd)


# ---- smp_call_function_single_async --------------------------------------------------


def test_async_unlocks_before_the_function(cluster, eventually):
    """Proves row 18."""
    gate = cluster.shared("async_gate", "i8", 2)
    gate[:] = 0

    def f(info):
        gate[0] += 1
        while gate[1] < info:
            time.sleep(0.0005)

    csd = cluster.smp.CallSingleData(f, 1)
    assert (csd.func, csd.info, csd.locked) == (f, 1, False)
    cluster.smp.smp_call_function_single_async(1, csd)
    eventually(lambda: gate[0] == 1)
    assert not csd.locked  # running, and free to be submitted again
    cluster.smp.smp_call_function_single_async(1, csd)
    assert csd.locked
    gate[1] = 1
    eventually(lambda: gate[0] == 2)
    flush(cluster, 1)


def test_a_csd_in_use_is_ebusy(cluster, eventually):
    """Proves row 3."""
    gate = cluster.shared("busy_gate", "i8", 1)
    gate[0] = 0

    def hold(_):
        while not gate[0]:
            time.sleep(0.0005)

    cluster.smp.smp_call_function_single(1, hold, wait=False)
    csd = cluster.smp.CallSingleData(note, 1)
    cluster.smp.smp_call_function_single_async(1, csd)
    for cpu in (1, 2):
        with pytest.raises(CsdBusyError, match="CallSingleData") as caught:
            cluster.smp.smp_call_function_single_async(cpu, csd)
        assert caught.value.errno == errno.EBUSY
        assert isinstance(caught.value, OSError)
    gate[0] = 1
    eventually(lambda: not csd.locked)
    cluster.smp.smp_call_function_single_async(2, csd)
    flush(cluster, 1)
    flush(cluster, 2)
    assert entries(cluster) == [1, 1]


def test_a_csd_holds_what_it_was_made_with(cluster):
    """It pickles when it is made: what changes later is not seen."""
    info = [1]

    def f(x):
        note(len(x))

    csd = cluster.smp.CallSingleData(f, info)
    info.append(2)
    cluster.smp.smp_call_function_single_async(1, csd)
    flush(cluster, 1)
    assert entries(cluster) == [1]


def test_a_csd_can_be_dropped_while_it_is_queued(cluster):
    cluster.smp.smp_call_function_single(1, time.sleep, 0.05, wait=False)
    for n in range(20):
        cluster.smp.smp_call_function_single_async(
            1, cluster.smp.CallSingleData(note, n)
        )
    flush(cluster, 1)
    assert sorted(entries(cluster)) == list(range(20))


def test_a_csd_submitted_on_its_own_cpu_runs_before_it_returns(cluster):
    def task():
        seen = []
        csd = smp.CallSingleData(lambda x: x.append(smp.irqs_disabled()), seen)
        smp.smp_call_function_single_async(1, csd)
        return seen, csd.locked

    assert run_on(cluster, 1, task) == ([True], False)


def test_async_is_legal_with_interrupts_off_and_in_handlers(cluster, eventually):
    def handler(_):
        smp.smp_call_function_single_async(2, smp.CallSingleData(note, 2))

    def task():
        smp.local_irq_disable()
        smp.smp_call_function_single_async(2, smp.CallSingleData(note, 1))
        smp.local_irq_enable()

    run_on(cluster, 1, task)  # a warning would be an error there
    cluster.smp.smp_call_function_single(1, handler)
    eventually(lambda: entries(cluster) == [1, 2])


def test_a_csd_of_another_kind(cluster):
    for wrong in (None, id, 3):
        with pytest.raises(TypeError, match="CallSingleData"):
            cluster.smp.smp_call_function_single_async(1, wrong)
    with pytest.raises(TypeError):
        cluster.smp.CallSingleData(3)
    with pytest.raises(TypeError):
        cluster.smp.CallSingleData()


def test_more_csds_than_there_are(script):
    """Thousands of live CallSingleData end in an error, never in a hang."""
    done = script(
        """
        from shmipi import ArenaFullError, Cluster

        with Cluster(2, idle="halt") as cluster:
            csds = []
            try:
                while len(csds) < 100_000:
                    csds.append(cluster.smp.CallSingleData(id, 1))
            except ArenaFullError as error:
                print(4096 < len(csds) < 100_000, "in flight" in str(error))
            csds.clear()
            print(cluster.call(1, int))
        """,
        timeout=10,
    )
    assert done.text == "True True\n0\n"


# ---- order ---------------------------------------------------------------------------


def held(cluster, cpu, queue):
    """Queue things while `cpu` is held in a handler: it drains them in one go."""
    gate = cluster.shared("held_gate", "i8", 2)
    gate[:] = 0

    def hold(_):
        gate[1] = 1
        while not gate[0]:
            time.sleep(0.0005)

    cluster.smp.smp_call_function_single(cpu, hold, wait=False)
    while not gate[1]:
        time.sleep(0.0005)
    queue()
    gate[0] = 1
    deadline = time.monotonic() + 5
    while cluster.call(cpu, lambda: shmipi.shared("log")[0]) < 1:
        assert time.monotonic() < deadline


def test_fifo_within_a_class(cluster):
    """Proves row 16."""

    def queue():
        for n in range(50):
            cluster.smp.smp_call_function_single(1, note, n, wait=False)

    held(cluster, 1, queue)
    assert entries(cluster) == list(range(50))


def test_sync_overtakes_async(cluster):
    """Proves row 17."""
    futures = []

    def queue():
        for n in range(5):
            cluster.smp.smp_call_function_single(1, note, n, wait=False)
        for n in range(100, 105):  # submit() waits: SYNC
            futures.append(cluster.submit(1, note, n))

    held(cluster, 1, queue)
    for future in futures:
        future.result(5)
    cluster.run(int, cpus=[1])  # the others have run as well
    assert entries(cluster) == [100, 101, 102, 103, 104, 0, 1, 2, 3, 4]


def test_tasks_come_after_all_interrupts(cluster, background):
    threads = []

    def queue():
        threads.append(background(run_on, cluster, 1, note, 9))
        time.sleep(0.05)
        for n in range(3):
            cluster.smp.smp_call_function_single(1, note, n, wait=False)

    held(cluster, 1, queue)
    threads[0].end()
    assert entries(cluster) == [0, 1, 2, 9]


def test_order_is_kept_from_several_senders_each(cluster):
    """Proves row 13."""

    def sender(base):
        for n in range(300):
            smp.smp_call_function_single(2, note, base + n, wait=False)
        smp.smp_call_function_single(2, lambda _: None)

    def task():
        sender(1000 * smp.smp_processor_id())

    cluster.run(task, cpus=[0, 1])
    flush(cluster, 2)
    seen = entries(cluster)
    assert len(seen) == 600
    for base in (0, 1000):
        mine = [n for n in seen if base <= n < base + 1000]
        assert mine == list(range(base, base + 300))


def test_only_the_push_that_found_the_queue_empty_rings(cluster):
    """Proves row 14."""

    def queue():
        before = cluster.host_counters()
        for n in range(30):
            cluster.smp.smp_call_function_single(1, note, n, wait=False)
        # Before anybody waits: who does rings again where the CPU is late.
        looks.append((before, cluster.host_counters()))

    looks = []
    held(cluster, 1, queue)
    [(before, after)] = looks
    assert after["coalesced"] - before["coalesced"] >= 29
    rung = after["doorbells_sent"] + after["kicks_sent"]
    assert rung - before["doorbells_sent"] - before["kicks_sent"] <= 1


# ---- many ----------------------------------------------------------------------------


def where(_):
    note(smp.smp_processor_id())


@pytest.mark.parametrize("mask", ["0-2", [2, 0, 1], shmipi.CpuMask("0,1,2"), range(3)])
def test_many_from_the_host_is_all_of_the_mask(cluster, mask):
    assert cluster.smp.smp_call_function_many(mask, where) is None
    assert sorted(entries(cluster)) == [0, 1, 2]


def test_many_never_runs_on_self(cluster):
    """Proves rows 7 and 8."""

    def task():
        smp.preempt_disable()
        smp.smp_call_function_many("0-2", where)
        smp.smp_call_function(where)
        smp.smp_call_function_many([1], where)
        smp.preempt_enable()

    run_on(cluster, 1, task)
    assert sorted(entries(cluster)) == [0, 0, 2, 2]


def test_many_skips_offline_cpus(boot):
    """Proves row 11."""
    cluster = boot(4, idle="halt")
    cluster.shared("log", "i8", 64)
    cluster.offline(2)
    cluster.smp.smp_call_function_many("1-3", where)
    cluster.smp.smp_call_function(where)
    cluster.smp.on_each_cpu(where)
    log = cluster.shared("log", "i8", 64)
    assert sorted(log[1 : 1 + log[0]].tolist()) == [0, 0, 1, 1, 1, 3, 3, 3]


def test_an_empty_mask_is_nobody(cluster):
    """As in the kernel: nothing is sent, and that is no error."""
    cluster.smp.smp_call_function_many([], where)
    cluster.smp.on_each_cpu_mask("", where)
    flush(cluster, 1)
    assert entries(cluster) == []


def test_others_in_the_host_means_all(cluster):
    cluster.smp.smp_call_function(where)
    cluster.smp.on_each_cpu(where)
    assert sorted(entries(cluster)) == [0, 0, 1, 1, 2, 2]


def test_many_without_waiting(cluster, gate, eventually):
    work, let_go = gate
    cluster.smp.smp_call_function_many("0-2", work, None, wait=False)
    cluster.smp.on_each_cpu(where, None, False)
    assert entries(cluster) == []
    let_go()
    eventually(lambda: sorted(entries(cluster)) == [0, 1, 2])


def test_many_waits_for_all(cluster):
    """Proves row 18."""

    def slow(_):
        time.sleep(0.05 * smp.smp_processor_id())
        note(smp.smp_processor_id())

    cluster.smp.smp_call_function_many("0-2", slow)
    assert len(entries(cluster)) == 3


def test_many_raises_after_all_have_run(cluster):
    def f(_):
        if smp.smp_processor_id() == 0:
            raise ValueError("first")
        time.sleep(0.05)
        note(smp.smp_processor_id())

    with pytest.raises(RemoteCallError, match="first") as caught:
        cluster.smp.smp_call_function_many("0-2", f)
    assert caught.value.cpu == 0
    assert sorted(entries(cluster)) == [1, 2]


def test_one_payload_for_all_of_a_mask(boot):
    """One copy however many targets, and it is given back with the last of them."""
    cluster = boot(3, idle="halt", arena_bytes=1 << 20)
    cluster.shared("log", "i8", 4096)
    data = os.urandom(300_000)  # three copies would not fit

    def f(x):
        note(len(x))

    for _ in range(8):
        cluster.smp.on_each_cpu(f, data)
    assert entries(cluster) == [300_000] * 24
    for _ in range(8):
        cluster.smp.smp_call_function_many("0-2", f, data, wait=False)
        for cpu in range(3):
            flush(cluster, cpu)


def test_on_each_cpu_runs_the_local_part_while_the_others_run(cluster):
    """After the doorbells, before the wait: the local part waits for a remote one.

    Proves row 9.
    """
    meet = cluster.shared("meet", "i8", 3)
    meet[:] = 0

    def f(_):
        meet[smp.smp_processor_id()] = 1
        deadline = time.monotonic() + 5
        while not meet.all():
            assert time.monotonic() < deadline, "they do not run at the same time"
            time.sleep(0.0005)

    run_on(cluster, 1, lambda: smp.on_each_cpu(f))
    assert meet.tolist() == [1, 1, 1]


def test_the_local_part_has_interrupts_off_and_may_fail(cluster):
    def f(_):
        note(smp.irqs_disabled())
        if smp.smp_processor_id() == 1:
            raise LookupError("local")

    def task():
        try:
            smp.on_each_cpu(f)
        except RemoteCallError as error:
            return error.cpu, str(error.__cause__), smp.irqs_disabled()

    assert run_on(cluster, 1, task) == (1, "local", False)
    assert entries(cluster) == [1, 1, 1]


def test_on_each_cpu_mask_includes_self_only_if_in_it(cluster):
    def task():
        smp.on_each_cpu_mask("0,1", where)
        smp.on_each_cpu_mask([0, 2], where)

    run_on(cluster, 1, task)
    assert sorted(entries(cluster)) == [0, 0, 1, 2]


def test_cond_is_asked_once_per_cpu_and_for_self_last(cluster):
    """Proves row 10."""

    def task():
        asked = []

        def cond(cpu, info):
            asked.append((cpu, info))
            return cpu != 0

        smp.on_each_cpu_cond_mask(cond, where, 5)
        smp.on_each_cpu_cond_mask(lambda cpu, _: cpu == 2, where, None, True, "0,2")
        return asked

    assert run_on(cluster, 1, task) == [(0, 5), (2, 5), (1, 5)]
    assert sorted(entries(cluster)) == [1, 2, 2]


def test_cond_that_raises(cluster):
    def cond(cpu, _):
        if cpu == 1:
            raise LookupError("cond")
        return True

    with pytest.raises(LookupError, match="cond"):
        cluster.smp.on_each_cpu_cond_mask(cond, where)
    flush(cluster, 0)
    assert entries(cluster) == [0]  # was queued before, and has been waited for


# ---- wait=False: the pool ------------------------------------------------------------


def test_a_pool_of_at_least_64_requests(cluster, background):
    """Proves rows 2 and 75."""
    gate = cluster.shared("pool_gate", "i8", 1)
    gate[0] = 0

    def hold(_):
        while not gate[0]:
            time.sleep(0.0005)

    def first():
        cluster.smp.smp_call_function_single(1, hold, wait=False)
        for n in range(63):
            cluster.smp.smp_call_function_single(1, note, n, wait=False)

    background(first).end(20)  # it waits for nothing

    def more():
        for n in range(63, 300):
            cluster.smp.smp_call_function_single(1, note, n, wait=False)

    thread = background(more)
    time.sleep(0.1)
    assert thread.is_alive()  # the pool is empty: it waits
    gate[0] = 1
    thread.end()
    flush(cluster, 1)
    assert entries(cluster) == list(range(300))


def test_each_sender_has_requests_of_its_own_for_broadcasts(
    cluster, background, eventually
):
    """Proves row 12: one whose target does not come waits, and nobody else."""
    gate = cluster.shared("slots_gate", "i8", 3)
    gate[:] = 0

    def hold(_):
        gate[1] = 1
        while not gate[0]:
            time.sleep(0.0005)

    def many(calls):
        for n in range(calls):
            smp.preempt_disable()
            smp.smp_call_function_many([2], note, n, False)
            smp.preempt_enable()
            gate[2] = n + 1

    cluster.smp.smp_call_function_single(2, hold, wait=False)
    while not gate[1]:
        time.sleep(0.0005)
    thread = background(run_on, cluster, 1, many, 100)
    eventually(lambda: gate[2] >= 64)
    time.sleep(0.3)
    assert thread.is_alive()
    assert gate[2] < 100  # its requests are all in flight: it waits for one
    run_on(cluster, 0, many, 10)
    for _ in range(10):
        cluster.smp.smp_call_function_many([1, 2], id, None, wait=False)
    gate[0] = 1
    thread.end()
    flush(cluster, 2)
    seen = entries(cluster)
    assert sorted(seen) == sorted([*range(100), *range(10)])
    assert [n for n in seen if n >= 10] == list(range(10, 100))  # none out of order


def test_all_cpus_meet_in_their_handlers(cluster):
    """Proves row 78: setup, action and teardown, each by all before the next by any."""
    steps = cluster.shared("meeting", "i8", 4)
    steps[:] = 0

    def meet(ncpus):
        for step in range(3):
            if step and steps[step - 1] != ncpus:
                atomic.fetch_add(steps, 3, 1)
            atomic.fetch_add(steps, step, 1)
            deadline = time.monotonic() + 5
            while atomic.load(steps, step) < ncpus:
                assert time.monotonic() < deadline, f"not all came to step {step}"
                time.sleep(0)

    for turn in range(20):
        steps[:3] = 0
        run_on(cluster, turn % 3, lambda: smp.on_each_cpu(meet, 3))
        assert steps.tolist() == [3, 3, 3, 0]


# ---- smp_send_reschedule -------------------------------------------------------------


def test_reschedule_nudges_and_is_counted(boot, eventually):
    """Proves row 32."""
    cluster = boot(2, idle="halt")
    eventually(lambda: cluster.cpus[1].state == "halted")
    before = cluster.counters()
    assert cluster.smp.smp_send_reschedule(1) is None
    eventually(
        lambda: cluster.counters()["irq_resched"][1] == before["irq_resched"][1] + 1
    )
    assert cluster.counters()["doorbells_received"][1] > before["doorbells_received"][1]
    assert cluster.host_counters()["resched_sent"] == 1


@pytest.fixture
def polling(boot):
    """Three CPUs that poll and never halt."""
    return boot(3, idle="poll")


def grown(cluster, work, *names):
    """Work, and return by how much the sum of each counter grew, host included."""

    def look():
        cpus, host = cluster.counters(), cluster.host_counters()
        return [int(cpus[name].sum()) + host[name] for name in names]

    before = look()
    work()
    return [now - was for now, was in zip(look(), before, strict=True)]


def test_smp_send_reschedule_always_sends(polling, eventually):
    """linux/smp.h: it traces and sends, also to a CPU that polls, and to itself."""
    before = polling.counters()["irq_resched"]

    def to_self():
        for _ in range(3):
            smp.smp_send_reschedule(1)
            time.sleep(0.01)

    sent = grown(polling, lambda: polling.smp.smp_send_reschedule(2), "resched_sent")
    assert sent == [1]
    assert grown(polling, lambda: run_on(polling, 1, to_self), "resched_sent") == [3]
    eventually(
        lambda: (polling.counters()["irq_resched"] - before).tolist() == [0, 3, 1]
    )
    assert polling.host_counters()["resched_elided"] == 0


def test_resched_cpu_looks_whether_the_target_polls(polling, eventually):
    """__resched_curr: who polls is told by the flag alone, and looks at it."""
    eventually(lambda: polling.cpus[1].state == "polling")
    names = "resched_elided", "resched_sent", "irq_resched"
    calls = {
        "host": lambda: polling.smp.resched_cpu(1),
        "handler": lambda: polling.call(2, smp.resched_cpu, 1),
        "task": lambda: polling.run(smp.resched_cpu, 1, cpus=[2]),
    }
    for name, call in calls.items():
        done = []
        eventually(lambda: polling.cpus[1].state == "polling")
        # None at all while the flag of the one before is still to be looked at.

        def look(call=call, done=done):
            done.append(grown(polling, call, *names))
            return any(done[-1])

        eventually(look)
        assert done[-1] == [1, 0, 0], name
        assert not any(map(any, done[:-1])), name


def test_resched_cpu_sets_need_resched_and_interrupts_once(cluster, eventually):
    """Set already: no IPI.  A task sees it until it lets others run."""
    seen = cluster.shared("seen", "i8", 4)
    seen[:] = 0

    def task():
        seen[0] = 1
        while not seen[1]:
            time.sleep(0)
        seen[2] = smp.need_resched()
        smp.smp_call_function_single(2, id)  # a wait for an answer is no schedule()
        seen[3] = smp.need_resched()
        smp.cond_resched()
        after = smp.need_resched()
        smp.resched_cpu(smp.smp_processor_id())  # to itself: the flag alone
        mine = smp.need_resched()
        smp.wait_for_interrupt(0.0)
        return after, mine, smp.need_resched()

    before = cluster.counters()["irq_resched"][1]
    tasks = cluster.start(task, cpus=[1])
    eventually(lambda: seen[0])
    assert grown(cluster, lambda: cluster.smp.resched_cpu(1), "resched_sent") == [1]
    eventually(lambda: cluster.counters()["irq_resched"][1] == before + 1)
    assert grown(cluster, lambda: cluster.smp.resched_cpu(1), "resched_sent") == [0]
    seen[1] = 1
    assert tasks.results(10) == [(False, True, False)]
    assert seen.tolist() == [1, 1, 1, 1]
    assert cluster.counters()["irq_resched"][1] == before + 1
    assert cluster.run(smp.need_resched, cpus=[1]) == [False]


def test_resched_cpu_wakes_a_task_that_waits_and_an_idle_cpu(cluster, eventually):
    begun = cluster.shared("begun", "i8", 1)
    begun[0] = 0

    def wait():
        smp.local_irq_disable()
        begun[0] = 1
        came = smp.wait_for_interrupt(10)
        smp.local_irq_enable()
        return came

    tasks = cluster.start(wait, cpus=[1])
    eventually(lambda: begun[0] and cluster.cpus[1].state == "halted")
    cluster.smp.resched_cpu(1)
    assert tasks.results(5) == [True]
    eventually(lambda: cluster.cpus[2].state == "halted")
    cluster.smp.resched_cpu(2)
    cluster.offline(2)
    try:
        assert cluster.smp.resched_cpu(2) is None  # offline: nothing, not even a word
    finally:
        cluster.online(2)
    with pytest.raises(shmipi.CpuOfflineError):
        cluster.smp.resched_cpu(3)


# ---- many: who is interrupted --------------------------------------------------------


def test_many_to_several_polling_cpus_interrupts_each(polling, eventually):
    """With more than one target nobody asks whether they poll."""
    eventually(lambda: {c.state for c in polling.cpus} == {"polling"})
    names = "elided", "irq_call", "irq_call_single"
    noop = smp.NativeHandler("noop")
    calls = {
        "many": lambda: polling.smp.smp_call_function_many("0-2", noop),
        "all": lambda: polling.smp.smp_call_function(noop),
        "nowait": lambda: polling.smp.on_each_cpu(noop, None, False),
        "python": lambda: polling.smp.on_each_cpu_mask("0-2", id),
    }
    for name, call in calls.items():
        before = polling.counters()["irq_call"]

        def send(call=call, before=before):
            call()
            eventually(
                lambda: (polling.counters()["irq_call"] - before).tolist() == [1, 1, 1]
            )

        assert grown(polling, send, *names) == [0, 3, 0], name


def test_many_to_one_polling_cpu_is_elided(polling, eventually):
    """Proves row 30."""
    names = "elided", "irq_call", "irq_call_single"
    noop = smp.NativeHandler("noop")

    def send():
        polling.smp.smp_call_function_many("1", noop)

    end, took = time.monotonic() + 30, 1.0
    # Once more where CPU 1 had no core: after 10 ms who waits interrupts it.
    while took > 0.008 and time.monotonic() < end:
        eventually(lambda: not polling.chip.pending_lines(1))
        eventually(lambda: {c.state for c in polling.cpus} == {"polling"})
        begun = time.monotonic()
        found = grown(polling, send, *names)
        took = time.monotonic() - begun
    assert found == [1, 0, 0]


def test_many_warns_once_with_preemption_enabled(boot):
    """lockdep_assert_preemption_disabled(), of tasks; the host is no CPU."""
    cluster = boot(2, idle="halt")

    def task(prepare, undo):
        import warnings

        with warnings.catch_warnings(record=True) as given:
            warnings.simplefilter("always")
            prepare()
            for _ in range(3):
                smp.smp_call_function_many([0], id)
            undo()
        return [
            (w.category is ShmipiWarning, "preemption" in str(w.message)) for w in given
        ]

    fine = [
        (smp.preempt_disable, smp.preempt_enable),
        (smp.get_cpu, smp.put_cpu),
    ]
    for pair in fine:
        assert cluster.run(task, *pair, cpus=[1]) == [[]]
    assert cluster.run(task, int, int, cpus=[1]) == [[(True, True)]]

    def others():
        import warnings

        with warnings.catch_warnings():
            warnings.simplefilter("error")
            smp.smp_call_function(id)  # these disable it themselves
            smp.on_each_cpu(id)
            smp.on_each_cpu_mask("0-1", id)

    cluster.run(others, cpus=[0])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        cluster.smp.smp_call_function_many("0-1", id)


# ---- interrupts disabled, warnings, deadlock -----------------------------------------


def test_irq_flags_nest(cluster):
    """Proves row 49."""

    def task():
        seen = [smp.irqs_disabled()]
        outer = smp.local_irq_save()
        inner = smp.local_irq_save()
        seen.append(smp.irqs_disabled())
        smp.local_irq_restore(inner)
        seen.append(smp.irqs_disabled())
        smp.local_irq_restore(outer)
        seen.append(smp.irqs_disabled())
        smp.local_irq_disable()
        seen.append(smp.irqs_disabled())
        smp.local_irq_enable()
        seen.append(smp.irqs_disabled())
        try:
            smp.local_irq_restore(7)
        except ValueError:
            seen.append("ValueError")
        return seen

    assert run_on(cluster, 1, task) == [
        False,
        True,
        True,
        False,
        True,
        False,
        "ValueError",
    ]


def test_preempt_count(cluster):
    def task():
        smp.preempt_disable()
        smp.preempt_disable()
        smp.preempt_enable()
        smp.preempt_enable()
        try:
            smp.preempt_enable()
        except ClusterStateError:
            return True

    assert run_on(cluster, 1, task)


def test_contexts(cluster):
    def look(box):
        box[:] = [smp.in_task(), smp.in_hardirq(), smp.in_interrupt(), smp.in_nmi()]

    def task():
        box = []
        look(box)
        return box

    assert run_on(cluster, 1, task) == [True, False, False, False]
    assert cluster.call(1, task) == [False, True, True, False]


def test_warned_once_with_interrupts_disabled_and_the_call_goes_on(boot):
    """Proves row 22."""
    cluster = boot(2, idle="halt")

    def task():
        import warnings

        with warnings.catch_warnings(record=True) as given:
            warnings.simplefilter("always")
            for _ in range(3):
                smp.local_irq_disable()
                smp.smp_call_function_single(0, id)
                smp.smp_call_function_many([0], id)
                smp.local_irq_enable()
        return [(w.category is ShmipiWarning, str(w.message)) for w in given]

    ((is_ours, text),) = run_on(cluster, 1, task)
    assert is_ours
    assert "interrupts disabled" in text


def test_warned_once_in_interrupt_context(boot):
    """Proves row 22."""
    cluster = boot(2, idle="halt")

    def handler():
        import warnings

        with warnings.catch_warnings(record=True) as given:
            warnings.simplefilter("always")
            for wait in (True, False, True):
                smp.smp_call_function_single(0, id, None, wait)
        return [(w.category is ShmipiWarning, str(w.message)) for w in given]

    ((is_ours, text),) = cluster.call(1, handler)
    assert is_ours
    assert "interrupt context" in text


def test_a_circle_of_waiters_with_interrupts_off_is_edeadlk(boot):
    cluster = boot(3, idle="halt")
    ready = cluster.shared("ready", "i8", 3)

    def task():
        import warnings

        me = smp.smp_processor_id()
        smp.local_irq_disable()
        ready[me] = 1
        while not ready.all():
            time.sleep(0.0005)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                smp.smp_call_function_single((me + 1) % 3, id)
        except IpiDeadlockError as error:
            return error.errno, str(error)
        finally:
            smp.local_irq_enable()
        return 0, ""

    start = time.monotonic()
    results = cluster.run(task)
    assert time.monotonic() - start < 5
    told = [text for code, text in results if code == errno.EDEADLK]
    assert told  # one is enough to break the circle
    assert all("interrupts disabled" in text for text in told)
    cluster.smp.on_each_cpu(id)


def test_no_circle_no_deadlock(boot):
    """Interrupts off, but the last of the chain answers: an ordinary wait."""
    cluster = boot(3, idle="halt")

    def slow(_):
        time.sleep(0.1)

    def task():
        import warnings

        me = smp.smp_processor_id()
        smp.local_irq_disable()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            smp.smp_call_function_single(2, slow)
        smp.local_irq_enable()
        return me

    assert cluster.run(task, cpus=[0, 1]) == [0, 1]


def test_a_waiter_serves_its_own_queue(cluster):
    """CPU 1 waits for CPU 2, whose handler waits for nobody but calls CPU 1.

    Proves row 77.
    """

    def back(_):
        smp.smp_call_function_single_async(1, smp.CallSingleData(note, 1))
        deadline = time.monotonic() + 5
        while not shmipi.shared("log")[0]:
            assert time.monotonic() < deadline, "the waiter does not look"
            time.sleep(0.0005)

    run_on(cluster, 1, lambda: smp.smp_call_function_single(2, back))
    assert entries(cluster) == [1]


# ---- where it may be used ------------------------------------------------------------


def test_the_host_is_no_cpu(cluster):
    for name in (
        "smp_processor_id",
        "local_irq_disable",
        "local_irq_enable",
        "local_irq_save",
        "irqs_disabled",
    ):
        for place in (smp, cluster.smp):
            with pytest.raises(ClusterStateError, match="host is no CPU"):
                getattr(place, name)()
    for place in (smp, cluster.smp):
        with pytest.raises(ClusterStateError):
            place.local_irq_restore(0)
        assert place.in_task()
        assert not place.in_hardirq()
        assert not place.in_interrupt()
        assert not place.in_nmi()


def test_module_level_smp_acts_on_the_only_cluster(script):
    done = script(
        """
        from shmipi import Cluster, NoMachineError, smp
        import shmipi

        def expect():
            try:
                smp.smp_call_function_single(1, id)
            except NoMachineError as error:
                return "cluster.smp" in str(error)

        print(expect())
        with Cluster(2, idle="halt") as one:
            smp.smp_call_function_single(1, id)
            csd = smp.CallSingleData(id)
            with Cluster(2, idle="halt") as two:
                print(expect())
                try:
                    smp.CallSingleData(id)
                except NoMachineError:
                    print("neither")
                try:
                    shmipi.shared("x")
                except NoMachineError:
                    print("nor")
                one.smp.smp_call_function_single(1, id)
                two.smp.smp_call_function_single(1, id)
                try:
                    two.smp.smp_call_function_single_async(1, csd)
                except ValueError as error:
                    print(error)
            smp.smp_call_function_single_async(1, csd)
            smp.on_each_cpu(id)
        print(expect())
        """
    )
    assert done.text.split("\n")[:6] == [
        "True",
        "True",
        "neither",
        "nor",
        "this CallSingleData belongs to another machine",
        "True",
    ]


def test_without_any_machine_it_is_an_error_and_no_crash(script):
    """Before anything else of shmipi was used in the process."""
    done = script(
        """
        import shmipi.smp as smp

        for name in ("smp_processor_id", "irqs_disabled", "in_task", "cond_resched"):
            try:
                getattr(smp, name)()
            except RuntimeError as error:
                print(type(error).__name__, "cluster.smp" in str(error))
        for make in (smp.CallSingleData, smp.NativeHandler):
            try:
                make("no such")
            except (RuntimeError, LookupError) as error:
                print(type(error).__name__)
        """
    )
    assert done.text.split("\n")[:-1] == ["NoMachineError True"] * 4 + [
        "NoMachineError",
        "LookupError",
    ]


def test_on_a_cpu_smp_is_the_main_threads(cluster):
    def task():
        import threading

        def other():
            for call in (
                lambda: smp.smp_call_function_single(0, id),
                smp.smp_processor_id,
                smp.local_irq_disable,
                lambda: smp.CallSingleData(id),
            ):
                try:
                    call()
                except RuntimeError as error:
                    seen.append("main thread" in str(error))

        seen = []
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
        return seen

    assert run_on(cluster, 1, task) == [True] * 4


def test_no_machine_error_is_typed():
    assert issubclass(NoMachineError, RuntimeError)
    assert issubclass(NoMachineError, shmipi.ShmipiError)
