"""irq_work: kernel/irq_work.c, as shmipi.smp keeps it."""

import errno
import os
import signal
import time
import warnings

import pytest

import shmipi
from shmipi import (
    ClusterStateError,
    CpuDiedError,
    CpuOfflineError,
    IpiDeadlockError,
    NativeHandler,
    smp,
)

# What happens is written into the shared array "log": entry 0 is how much.


def note(what):
    log = shmipi.shared("log")
    log[1 + shmipi.atomic.fetch_add(log, 0, 1)] = what


def entries(cluster=None):
    log = cluster.shared("log", "i8", 4096) if cluster else shmipi.shared("log")
    return log[1 : 1 + log[0]].tolist()


@pytest.fixture(autouse=True)
def empty_log(request):
    if "cluster" in request.fixturenames:
        request.getfixturevalue("cluster").shared("log", "i8", 4096)[:] = 0


def run_on(cluster, func, cpu=1):
    return cluster.run(func, cpus=[cpu])[0]


def iwi(cluster, cpu):
    rows = [line.split() for line in cluster.interrupts().splitlines()]
    return next(int(row[1 + cpu]) for row in rows if row and row[0] == "IWI:")


def test_once_while_pending_and_last_in_first_out(cluster):
    """One interrupt for three, in hard-irq context, when interrupts are on; row 65."""

    def handler(number):
        note(number)
        note(smp.in_hardirq() and smp.irqs_disabled() and not smp.in_task())

    def task():
        works = [smp.irq_work(handler, n) for n in (10, 20, 30)]
        smp.local_irq_disable()
        queued = [smp.irq_work_queue(work) for work in (*works, works[0])]
        state = {(work.pending, work.busy) for work in works}
        note(1000)
        smp.local_irq_enable()
        after = {(work.pending, work.busy) for work in works}
        return queued, state, after, entries()

    before = iwi(cluster, 1)
    assert run_on(cluster, task) == (
        [True, True, True, False],
        {(True, True)},
        {(False, False)},
        [1000, 30, 1, 20, 1, 10, 1],
    )
    assert iwi(cluster, 1) == before + 1


def test_first_in_first_out_on_another_cpu(cluster):
    """By its call_single_queue: function calls, no IRQ work interrupt; row 66."""

    def task():
        works = [smp.irq_work(note, n) for n in range(3)]
        queued = [smp.irq_work_queue_on(work, 2) for work in works]
        for work in works:
            smp.irq_work_sync(work)
        return queued

    before = iwi(cluster, 2)
    assert run_on(cluster, task) == [True] * 3
    assert entries(cluster) == [0, 1, 2]
    assert iwi(cluster, 2) == before
    work = cluster.smp.irq_work(note, 3)  # and from the host
    assert cluster.smp.irq_work_queue_on(work, cpu=2)
    cluster.smp.irq_work_sync(work)
    assert entries(cluster) == [0, 1, 2, 3]


def test_sync_calls_overtake_it(cluster):
    """The queue's passes: SYNC, then ASYNC and irq_work as they came; row 17."""
    gate = cluster.shared("gate", "i8", 2)
    gate[:] = 0

    def task():
        smp.local_irq_disable()
        shmipi.shared("gate")[0] = 1
        end = time.monotonic() + 10
        while not shmipi.shared("gate")[1] and time.monotonic() < end:
            pass
        smp.local_irq_enable()
        return entries()

    running = cluster.start(task, cpus=[1])
    while not gate[0]:
        time.sleep(0.001)
    call = cluster.smp
    call.smp_call_function_single(1, note, 1, False)
    work = call.irq_work(note, 2)
    assert call.irq_work_queue_on(work, 1)
    call.smp_call_function_single(1, note, 3, False)
    csd = cluster.submit(1, note, 4)
    gate[1] = 1
    csd.result(10)
    call.irq_work_sync(work)
    assert running.results(10) == [[4, 1, 2, 3]]


def test_pending_is_cleared_before_the_function(cluster):
    """It may queue itself again, and BUSY is cleared when it does not."""

    def again(left):
        work = shmipi.the_work
        note(work.pending * 2 + work.busy)
        if len(entries()) < 3:
            note(10 + smp.irq_work_queue(work))

    def task():
        shmipi.the_work = smp.irq_work(again)
        smp.irq_work_queue(shmipi.the_work)
        smp.irq_work_sync(shmipi.the_work)
        work = shmipi.the_work
        del shmipi.the_work
        return entries(), work.pending, work.busy

    # BUSY alone, queued again; so once more, and that is the last time.
    assert run_on(cluster, task) == ([1, 11, 1], False, False)


def test_queued_by_an_nmi_it_runs_after_it(cluster):
    """With interrupts disabled there, too: when they are on again."""

    def nmi(kind, regs):
        note(10 + smp.irq_work_queue(shmipi.the_work))
        note(10 + smp.irq_work_queue(shmipi.the_work))
        return smp.NMI_HANDLED

    def task():
        shmipi.the_work = smp.irq_work(note, 5)
        smp.local_irq_disable()
        shmipi.shared("gate")[0] = 1
        end = time.monotonic() + 10
        while len(entries()) < 2 and time.monotonic() < end:
            pass
        note(1000)
        smp.local_irq_enable()
        smp.irq_work_sync(shmipi.the_work)
        del shmipi.the_work
        return entries()

    gate = cluster.shared("gate", "i8", 2)
    gate[:] = 0
    cluster.smp.register_nmi_handler(smp.NMI_LOCAL, nmi, 0, "irq_work")
    running = cluster.start(task, cpus=[1])
    while not gate[0]:
        time.sleep(0.001)
    cluster.chip.send_nmi(1)
    try:
        assert running.results(10) == [[11, 10, 1000, 5]]
    finally:
        cluster.smp.unregister_nmi_handler(smp.NMI_LOCAL, "irq_work")


def test_a_lazy_one_waits_for_the_tick(cluster):
    """No interrupt of its own on a busy CPU; an idle one has stopped its tick."""

    def task():
        end = time.monotonic() + 20
        while True:
            shmipi.shared("log")[:] = 0
            lazy = smp.irq_work(note, 1, smp.IRQ_WORK_LAZY)
            smp.local_irq_disable()
            queued = smp.irq_work_queue(lazy)
            smp.local_irq_enable()
            note(1000)
            smp.irq_work_sync(lazy)
            # Once more where the tick came just then; at once it would be first always.
            if entries() == [1000, 1] or time.monotonic() > end:
                return queued

    before = iwi(cluster, 1)
    assert run_on(cluster, task)
    assert entries(cluster) == [1000, 1]
    assert iwi(cluster, 1) == before

    def handler(info):
        shmipi.the_work = smp.irq_work(note, 2, smp.IRQ_WORK_LAZY)
        smp.irq_work_queue(shmipi.the_work)

    cluster.smp.smp_call_function_single(1, handler)
    end = time.monotonic() + 5
    while entries(cluster)[2:] != [2]:
        assert time.monotonic() < end


@pytest.mark.parametrize("controller", ["mips", "mips-gic", "xive"])
def test_without_a_line_as_the_architecture_does(boot, controller):
    """By the tick or the decrementer, also while the task waits, or never yields."""
    cluster = boot(2, controller=controller, idle="halt")
    cluster.shared("log", "i8", 4096)

    def task():
        busy, waiting = smp.irq_work(note, 1), smp.irq_work(note, 2)
        smp.irq_work_queue(busy)
        end = time.monotonic() + 10
        while not entries() and time.monotonic() < end:
            pass
        smp.irq_work_queue(waiting)
        smp.wait_for_interrupt(0.05)
        smp.irq_work_sync(waiting)
        native = smp.irq_work(NativeHandler("count"), shmipi.shared("log")[3:4])
        smp.irq_work_queue(native)
        smp.irq_work_sync(native)
        return entries(), int(shmipi.shared("log")[3])

    assert run_on(cluster, task) == ([1, 2], 1)


def test_sync_waits_for_the_function(cluster):
    def slow(info):
        time.sleep(0.02)
        note(1)

    work = cluster.smp.irq_work(slow)
    cluster.smp.irq_work_queue_on(work, 1)
    cluster.smp.irq_work_sync(work)
    assert entries(cluster) == [1]
    assert not work.busy


def test_offline_and_from_an_nmi_it_warns(cluster):
    """Nothing is queued on an offline CPU, where the kernel's would wait there."""
    work = cluster.smp.irq_work(note, 1)
    cluster.offline(2)
    try:
        with pytest.warns(shmipi.ShmipiWarning, match="irq_work for offline CPU 2"):
            assert cluster.smp.irq_work_queue_on(work, 2) is False
    finally:
        cluster.online(2)
    assert not work.pending
    cluster.smp.irq_work_sync(work)
    with pytest.raises(CpuOfflineError) as raised:
        cluster.smp.irq_work_queue_on(work, 3)
    assert raised.value.errno == errno.ENXIO

    def nmi(info):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            smp.irq_work_queue_on(smp.irq_work(note, 5), 2)
        note(len(caught))

    cluster.smp.smp_send_nmi_ipi(1, nmi)
    end = time.monotonic() + 5
    while sorted(entries(cluster)) != [1, 5]:
        assert time.monotonic() < end


def test_bad_input(cluster):
    with pytest.raises(ValueError, match="IRQ_WORK_LAZY"):
        cluster.smp.irq_work(note, 1, 1)
    with pytest.raises(TypeError):
        cluster.smp.irq_work(7)
    with pytest.raises(ClusterStateError):
        cluster.smp.irq_work_queue(cluster.smp.irq_work(note))
    with pytest.raises(TypeError, match="an irq_work"):
        cluster.smp.irq_work_sync(7)

    def task():
        work = smp.irq_work(note, 1)
        smp.local_irq_disable()
        smp.irq_work_queue(work)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                smp.irq_work_sync(work)
            except IpiDeadlockError as error:
                number = error.errno
        smp.local_irq_enable()
        return number, len(caught), entries()

    assert run_on(cluster, task) == (errno.EDEADLK, 1, [1])


@pytest.mark.parametrize("begun", [False, True])
def test_a_cpu_dies_with_it(boot, begun):
    """Pending or running there: who waits for it is told, and may queue it again."""
    cluster = boot(3)
    cluster.shared("log", "i8", 4096)
    pid = cluster.cpus[1].pid

    def work_there(info):
        note(1)
        time.sleep(30)

    work = cluster.smp.irq_work(work_there)
    if not begun:
        os.kill(pid, signal.SIGSTOP)
    assert cluster.smp.irq_work_queue_on(work, 1)
    end = time.monotonic() + 5
    while begun and not entries(cluster):
        assert time.monotonic() < end
    os.kill(pid, signal.SIGKILL)
    with pytest.raises(CpuDiedError) as raised:
        cluster.smp.irq_work_sync(work)
    assert raised.value.cpu == 1
    assert not work.pending
    assert not work.busy
    cluster.smp.irq_work_sync(cluster.smp.irq_work(note))
