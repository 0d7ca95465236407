"""Read-copy update: kernel/rcu/tree.c, tree_exp.h, rcu/update.c."""

import errno
import os
import signal
import time
import warnings
from pathlib import Path

import pytest

import shmipi
from shmipi import (
    ClusterStateError,
    IpiDeadlockError,
    NativeHandler,
    ShmipiWarning,
    _core,
    atomic,
    smp,
)
from shmipi.users import rcu

CPUS = 4


@pytest.fixture
def rig(cluster_until_failure):
    with cluster_until_failure(CPUS, idle="halt") as cluster:
        cluster.shared("log", "i8", 16)[:] = 0
        assert cluster.users.rcu is not None
        yield cluster
        for cpu in range(CPUS):
            cluster.online(cpu)


def log():
    return shmipi.shared("log")


def read_until_told(place, nested=False):
    """Task: stand in a read-side section until log[place] is 2."""
    words = log()
    rcu.rcu_read_lock()
    if nested:
        rcu.rcu_read_lock()
        rcu.rcu_read_unlock()
    words[place] = 1
    while words[place] != 2:
        pass
    words[place] = 3
    rcu.rcu_read_unlock()


def expedited():
    rcu.synchronize_rcu_expedited()
    log()[15] = 1
    return [int(word) for word in log()]


def normal():
    rcu.synchronize_rcu()
    log()[15] = 1
    return [int(word) for word in log()]


@pytest.mark.parametrize("wait", [expedited, normal])
def test_a_grace_period_waits_for_who_reads(rig, eventually, wait):
    """rcu_exp_handler finds a depth, and the outermost unlock reports: row 72."""
    words = rig.shared("log", "i8", 16)
    reader = rig.start(read_until_told, 0, True, cpus=[1])
    eventually(lambda: words[0] == 1)
    waiter = rig.start(wait, cpus=[0])
    time.sleep(0.05)
    assert words[15] == 0
    words[0] = 2
    (seen,) = waiter.results()
    assert seen[0] == 3
    reader.results()
    stats = rig.users.rcu.stats()
    assert stats.cpus[1].nesting == 0
    assert stats.seq % 2 == 0


def test_the_host_waits_too_and_one_grace_period_is_for_all(rig, eventually):
    words = rig.shared("log", "i8", 16)
    reader = rig.start(read_until_told, 0, cpus=[2])
    eventually(lambda: words[0] == 1)
    waiters = [rig.start(expedited, cpus=[cpu]) for cpu in (0, 3)]
    time.sleep(0.02)
    words[0] = 2
    rig.users.rcu.synchronize_rcu_expedited()
    assert words[0] == 3
    for waiter in waiters:
        waiter.results()
    reader.results()


def spin(place):
    words = log()
    words[place] = 1
    while words[place] != 2:
        pass


def test_cpus_that_sleep_are_not_sent_to(rig, eventually):
    """__sync_rcu_exp_select_node_cpus: rcu_watching_snap_in_eqs; row 72."""
    words = rig.shared("log", "i8", 16)
    rig.users.rcu.synchronize_rcu_expedited()  # from here on all know of it
    rig.run(int)
    eventually(lambda: all(cpu.state == "halted" for cpu in rig.cpus))
    time.sleep(0.02)
    before = rig.users.rcu.stats()
    calls = rig.counters()["irq_call_single"].sum()
    rig.users.rcu.synchronize_rcu_expedited()
    after = rig.users.rcu.stats()
    assert after.idle - before.idle == CPUS
    assert after.ipis == before.ipis
    assert rig.counters()["irq_call_single"].sum() == calls
    busy = rig.start(spin, 1, cpus=[3])
    eventually(lambda: words[1] == 1)
    before = rig.users.rcu.stats()
    rig.users.rcu.synchronize_rcu_expedited()
    after = rig.users.rcu.stats()
    assert after.ipis == before.ipis + 1
    assert after.idle == before.idle + CPUS - 1
    words[1] = 2
    busy.results()


def test_offline_cpus_are_not_waited_for(rig):
    rig.offline(2)
    before = rig.users.rcu.stats()
    rig.users.rcu.synchronize_rcu_expedited()
    assert rig.users.rcu.stats().offline == before.offline + 1


def read_and_wait(place):
    rcu.rcu_read_lock()
    log()[place] = 1
    smp.wait_for_interrupt(0.2)
    log()[place] = 3
    rcu.rcu_read_unlock()


def test_who_sleeps_in_a_read_side_section_is_no_idle_cpu(rig, eventually):
    words = rig.shared("log", "i8", 16)
    reader = rig.start(read_and_wait, 2, cpus=[1])
    eventually(lambda: words[2] == 1)
    rig.users.rcu.synchronize_rcu_expedited()
    assert words[2] == 3
    reader.results()


def test_a_reader_that_is_taken_offline_reads_on(rig, eventually):
    words = rig.shared("log", "i8", 16)
    reader = rig.start(read_until_told, 3, cpus=[1])
    eventually(lambda: words[3] == 1)
    rig.offline(1)
    waiter = rig.start(expedited, cpus=[0])
    time.sleep(0.03)
    assert words[15] == 0
    rig.online(1)
    words[3] = 2
    waiter.results()
    assert words[3] == 3
    reader.results()


def test_a_readers_death_ends_its_section_and_is_counted(rig, eventually):
    words = rig.shared("log", "i8", 16)
    rig.start(read_until_told, 4, cpus=[1])
    eventually(lambda: words[4] == 1)
    died = rig.users.rcu.stats().died_readers
    waiter = rig.start(expedited, cpus=[0])
    eventually(lambda: rig.users.rcu.stats().seq % 2 == 1)
    os.kill(rig._machine.slot(1).pid, signal.SIGKILL)
    waiter.results()
    eventually(lambda: rig.users.rcu.stats().died_readers == died + 1)
    assert words[4] == 1


def test_a_driver_that_dies_leaves_a_grace_period_that_goes_on(rig, eventually):
    words = rig.shared("log", "i8", 16)
    reader = rig.start(read_until_told, 5, cpus=[1])
    eventually(lambda: words[5] == 1)
    rig.start(expedited, cpus=[2])
    eventually(lambda: rig.users.rcu.stats().seq % 2 == 1)
    os.kill(rig._machine.slot(2).pid, signal.SIGKILL)
    eventually(lambda: rig.cpus[2].state == "dead")
    waiter = rig.start(expedited, cpus=[0])
    words[5] = 2
    waiter.results()
    assert words[5] == 3
    reader.results()


def test_a_stall_says_who_holds_it_up(rig, eventually, monkeypatch):
    """synchronize_rcu_expedited_wait()."""
    words = rig.shared("log", "i8", 16)
    reader = rig.start(read_until_told, 6, cpus=[3])
    eventually(lambda: words[6] == 1)
    monkeypatch.setattr(rcu, "rcu_cpu_stall_timeout", 0.05)
    stalls = rig.users.rcu.stats().stalls

    eventually(lambda: {cpu.state for cpu in rig.cpus[:3]} == {"halted"})
    end = time.monotonic() + 30

    def let_go(*_):
        if caught or time.monotonic() > end:
            words[6] = 2

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        signal.signal(signal.SIGALRM, let_go)
        signal.setitimer(signal.ITIMER_REAL, 0.2, 0.2)
        try:
            rig.users.rcu.synchronize_rcu_expedited()
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            words[6] = 2
    assert rig.users.rcu.stats().stalls > stalls
    texts = [str(w.message) for w in caught if w.category is ShmipiWarning]
    assert "expedited stalls on CPUs/tasks: { 3-... }" in texts[0]
    assert "CPU 3: in a read-side section, 1 deep" in texts[0]
    reader.results()


def note_callback(place):
    words = log()
    words[place] = 3 if smp.in_serving_softirq() else 2
    words[place + 1] = smp.smp_processor_id()


def call(place, func, info):
    rcu.call_rcu(func, info)
    return int(log()[place])


def test_callbacks_run_in_rcu_softirq_after_a_grace_period(rig, eventually):
    """call_rcu, rcu_barrier."""
    words = rig.shared("log", "i8", 16)
    reader = rig.start(read_until_told, 0, cpus=[1])
    eventually(lambda: words[0] == 1)
    words[10] = 7
    assert rig.run(call, 8, note_callback, 8, cpus=[2]) == [0]
    free = NativeHandler("rcu_free_object")
    assert rig.run(call, 10, free, words[10:11], cpus=[2]) == [7]
    time.sleep(0.05)
    assert words[8] == 0
    assert words[10] == 7
    words[0] = 2
    reader.results()
    rig.users.rcu.rcu_barrier()
    assert list(words[8:11]) == [3, 2, 0]
    rig.run(rcu.rcu_barrier, cpus=[0])
    one = rig.users.rcu.stats().cpus[2]
    assert one.queued == one.invoked == 2


def queue_four(place, func):
    """Two native callbacks round two of Python's."""
    words = log()
    free = NativeHandler("rcu_free_object")
    for at, one in enumerate((free, func, func, free)):
        words[place + at] = 7
        rcu.call_rcu(one, words[place + at : place + at + 1])


def own(word):
    word[0] = 10 + smp.smp_processor_id()


@pytest.mark.parametrize("way", ["offline", "killed"])
def test_callbacks_of_a_cpu_that_is_gone_run_elsewhere(rig, eventually, way):
    """rcutree_migrate_callbacks: native ones, after their grace period, once.

    Those of Python are their process's: they run when it is back, or die with it.
    """
    words, users = rig.shared("log", "i8", 16), rig.users.rcu
    reader = rig.start(read_until_told, 0, cpus=[1])
    eventually(lambda: words[0] == 1)
    before = users.stats()
    rig.run(queue_four, 8, own, cpus=[2])
    if way == "offline":
        rig.offline(2)
    else:
        os.kill(rig._machine.slot(2).pid, signal.SIGKILL)
        eventually(lambda: rig.cpus[2].state == "dead")
    assert list(words[8:12]) == [7, 7, 7, 7]
    assert users.stats().cpus[2].natives == 2
    words[0] = 2
    reader.results()
    users.rcu_barrier()
    assert list(words[8:12]) == [0, 7, 7, 0]
    words[8] = words[11] = 5  # used again: it must not be freed a second time
    rig.online(2)
    lost = 0 if way == "offline" else 2
    eventually(lambda: users.stats().cpus[2].queued == users.stats().cpus[2].invoked)
    users.rcu_barrier()
    stats = users.stats()
    assert list(words[8:12]) == [5, *((7, 7) if lost else (12, 12)), 5]
    assert stats.migrated == before.migrated + 2
    assert stats.cpus[2].lost == before.cpus[2].lost + lost


def queue_and_die(words):
    for place in (8, 9, 10):
        rcu.call_rcu(NativeHandler("rcu_free_object"), words[place : place + 1])
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize("who", ["host", "task"])
def test_a_barrier_has_another_take_what_was_left_to_who_is_stopped(
    rig, eventually, background, who
):
    """rcu_barrier() entrains callbacks of CPUs that are gone by itself."""
    words = rig.shared("log", "i8", 16)
    words[8:11] = 7
    rig.run(int)  # each goes to sleep anew, and tells RCU
    eventually(lambda: all(cpu.state == "halted" for cpu in rig.cpus))
    pid = rig.cpus[2].pid
    os.kill(pid, signal.SIGSTOP)  # the first after CPU 1, which is told
    try:
        rig.start(queue_and_die, words, cpus=[1])
        eventually(lambda: rig.cpus[1].state == "dead")
        if who == "host":
            background(rig.users.rcu.rcu_barrier).end(15)
        else:
            rig.start(rcu.rcu_barrier, cpus=[0]).results(15)
        assert list(words[8:11]) == [0, 0, 0]
    finally:
        os.kill(pid, signal.SIGCONT)


def die_in_callback(word):
    word[0] = 1
    os.kill(os.getpid(), signal.SIGKILL)


def queue_death(place):
    words = log()
    rcu.call_rcu(die_in_callback, words[place : place + 1])
    rcu.call_rcu(NativeHandler("rcu_free_object"), words[place + 1 : place + 2])


def test_a_callback_that_a_death_cuts_off_is_not_run_again(rig, eventually):
    words, users = rig.shared("log", "i8", 16), rig.users.rcu
    words[13] = 7
    lost = users.stats().cpus[3].lost
    rig.start(queue_death, 12, cpus=[3])
    eventually(lambda: rig.cpus[3].state == "dead" and not words[13])
    assert words[12] == 1
    words[12] = 0
    rig.online(3)
    users.rcu_barrier()
    assert users.stats().cpus[3].lost == lost + 1
    assert words[12] == 0


DRIVER = """
import sys, time
from shmipi import Cluster

if __name__ == "__main__":
    with Cluster.attach(sys.argv[1]) as here:
        words, rcu = here.shared("log", "i8", 16), here.users.rcu
        rcu.synchronize_rcu_expedited()
        print(here._machine.id, flush=True)
        while words[14] != 1:
            time.sleep(0.001)
        rcu.synchronize_rcu_expedited()
        words[14] = 2
"""


def spin_and_read():
    """Run; read from when words[0] is 1 until it is 2."""
    words = log()
    words[1] = 1
    while words[0] != 1:
        pass
    rcu.rcu_read_lock()
    words[1] = 2
    while words[0] != 2:
        pass
    words[1] = 3
    rcu.rcu_read_unlock()


@pytest.mark.parametrize("back", [False, True], ids=["gone", "back"])
def test_an_expedited_ipi_finds_its_cpu_offline(boot, script, eventually, back):
    """__sync_rcu_exp_select_node_cpus: -ENXIO, and looked at again; row 72.

    The CPU goes between the look at it and the push. If it is offline still, it is
    reported in its place; if it is back, it is asked again, and its reader waited for.
    """
    for _ in range(10):
        if finds_it_offline(boot, script, eventually, back):
            return
    pytest.fail("it has always reported before its reader began")


def finds_it_offline(boot, script, eventually, back):
    """False: the CPU was quiescent as it came back, as it may, and nobody asked it."""
    rig = boot(2, idle="halt", steps=True)
    words, users, core = rig.shared("log", "i8", 16), rig.users.rcu, rig._machine
    driver = script(DRIVER, rig.name, wait=False)
    guest = int(driver.stdout.readline())
    state = Path(f"/proc/{driver.pid}/stat")

    def stops_at(step):
        eventually(lambda: core.step_hit(guest) == step)
        eventually(lambda: " T " in state.read_text())

    runs = rig.start(spin_and_read, cpus=[1])
    eventually(lambda: words[1] == 1)
    eventually(lambda: rig.cpus[0].state == "halted")  # nobody sends to it
    before = users.stats()
    core.arm_step(guest, "push", _core.STEP_STOP)
    words[14] = 1
    stops_at("push")
    rig.offline(1)
    core.arm_step(guest, "rcu_enxio", _core.STEP_STOP)
    driver.send_signal(signal.SIGCONT)
    stops_at("rcu_enxio")
    assert users.stats().seq % 2 == 1
    alone = False
    if back:
        rig.online(1)
        words[0] = 1
        eventually(lambda: words[1] == 2)
        alone = users.stats().cpus[1].reports > before.cpus[1].reports
    driver.send_signal(signal.SIGCONT)
    if back and not alone:
        eventually(lambda: users.stats().ipis > before.ipis)  # a tick later, again
        time.sleep(0.02)
        assert words[14] == 1, "a reader was not waited for"
        words[0] = 2
    eventually(lambda: words[14] == 2)
    after = users.stats()
    assert (after.gone - before.gone, after.retried - before.retried) == (
        (0, 1) if back else (1, 0)
    )
    if not back:
        rig.online(1)
        words[0] = 1
        eventually(lambda: words[1] == 2)
    words[0] = 2
    runs.results()
    return not alone


def refusals():
    seen = []
    rcu.rcu_read_lock()
    assert rcu.rcu_read_lock_held()
    for wait in (rcu.synchronize_rcu, rcu.synchronize_rcu_expedited):
        try:
            wait()
        except IpiDeadlockError as error:
            seen.append(error.errno)
    rcu.rcu_read_unlock()
    try:
        rcu.rcu_read_unlock()
    except ClusterStateError:
        seen.append("unlock")
    smp.local_irq_disable()
    try:
        rcu.synchronize_rcu_expedited()
    except ClusterStateError:
        seen.append("irqs")
    smp.local_irq_enable()
    return seen


def in_handler():
    try:
        rcu.synchronize_rcu()
    except ClusterStateError:
        return "handler"


def without_rcu():
    try:
        rcu.rcu_read_lock()
    except ClusterStateError as error:
        return "no RCU" if "no RCU" in str(error) else str(error)


def test_wrong_contexts_say_so(rig, boot):
    assert rig.run(refusals, cpus=[1]) == [
        [errno.EDEADLK, errno.EDEADLK, "unlock", "irqs"]
    ]
    assert rig.call(1, in_handler) == "handler"
    with pytest.raises(ClusterStateError):
        rcu.rcu_read_lock()
    with boot(2) as cluster:
        assert cluster.run(without_rcu, cpus=[1]) == ["no RCU"]


def churn(turns):
    """Task: publish, remove, wait, free, and use the memory again."""
    words = shmipi.shared("objects")
    for turn in range(turns):
        old, new = atomic.load(words, 0), turn % 64
        if new == old:
            continue
        atomic.store(words, new + 3, 1)
        atomic.store(words, 0, new)
        rcu.synchronize_rcu_expedited()
        atomic.store(words, old + 3, 0)


def read_natively(cpus):
    words = shmipi.shared("objects")
    start = time.monotonic()
    while (took := time.monotonic() - start) < 0.3 or (took < 30 and words[1] <= 100):
        for cpu in cpus:
            smp.smp_call_function_single(
                cpu, NativeHandler("rcu_read_object"), words, True
            )


def test_native_readers_never_see_freed_memory(rig):
    """Handlers in hard interrupt context read while one task frees."""
    words = rig.shared("objects", "u8", 3 + 64)
    words[:] = 0
    words[3] = 1
    reader = rig.start(read_natively, [0, 2, 3], cpus=[1])
    rig.run(churn, 200, cpus=[0])
    reader.results()
    assert words[1] > 100
    assert words[2] == 0
