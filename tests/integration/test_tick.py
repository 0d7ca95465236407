"""Timers and tick broadcast: kernel/time/hrtimer.c, kernel/time/tick-broadcast.c."""

import errno
import os
import pickle
import signal
import time

import pytest

import shmipi
from shmipi import (
    ClusterStateError,
    CpuOfflineError,
    CsdBusyError,
    IpiDeadlockError,
    IrqError,
    NativeHandler,
    smp,
)
from shmipi.users import tick

MS = 1_000_000
CPUS = 4
#: A timer that comes when its CPU has long been asleep, also on a busy computer.
LATER_MS = 500


def note(row, timer):
    """Handler: when and where it ran, in which context."""
    log = shmipi.shared("log")
    log[row] = (
        tick.ktime_get() - timer.due,
        smp.smp_processor_id(),
        smp.in_hardirq() and not smp.in_task(),
        log[row, 3] + 1,
    )


def start(name, ms, sleep_s=0.0):
    tick.hrtimer_start(tick.hrtimer(name), ms * MS)
    if sleep_s:
        smp.wait_for_interrupt(sleep_s)


def _bound(row):
    return lambda timer: note(row, timer)


def _prepare(cluster):
    timers = cluster.users.tick
    try:
        timers.hrtimer("native")
    except KeyError:
        count = cluster.shared("count", "u8", 4)
        cluster.shared("log", "i8", (8, 4))
        timers.hrtimer("native", NativeHandler("count"), count)
        for row in range(CPUS):
            timers.hrtimer(f"note{row}", _bound(row))


@pytest.fixture
def rig(cluster_until_failure):
    with cluster_until_failure(CPUS, idle="halt") as cluster:
        _prepare(cluster)
        cluster.shared("log", "i8", (8, 4))[:] = 0
        cluster.shared("count", "u8", 4)[:] = 0
        yield cluster
        for row in range(CPUS):
            cluster.online(row)
            tick.hrtimer_cancel(cluster.users.tick.hrtimer(f"note{row}"))
        tick.hrtimer_cancel(cluster.users.tick.hrtimer("native"))


def on(cluster, cpu, func, *args):
    return cluster.run(func, *args, cpus=[cpu])[0]


def take_broadcast(cluster, cpu, eventually):
    """Let ``cpu`` sleep with a timer far away: the broadcast device is bound to it."""
    timers = cluster.users.tick
    for _ in range(10):
        if timers.stats().bound_on not in (None, cpu):
            # It goes to the next CPU that is online when its owner goes.
            for other in range(CPUS):
                if other != cpu:
                    cluster.offline(other)
            for other in range(CPUS):
                cluster.online(other)
        on(cluster, cpu, start, f"note{cpu}", 60_000)
        # Who goes to sleep takes the device, if nobody has it, before it is halted.
        eventually(lambda: cluster.cpus[cpu].state == "halted")
        if timers.stats().bound_on == cpu:
            break  # else it had no core for so long that another has it by now
    assert timers.stats().bound_on == cpu


def test_a_sleeping_cpus_timer_comes_through_the_timer_line(rig, eventually):
    """Its own timer is stopped, and another CPU's device fires it: row 67.

    tick_handle_oneshot_broadcast, tick_do_broadcast.
    """
    log = rig.shared("log", "i8", (8, 4))
    for _ in range(10):
        log[:] = 0
        take_broadcast(rig, 0, eventually)
        stalls = rig.users.tick.stats().stalls
        before = rig.users.tick.stats().cpus
        on(rig, 2, start, "note2", LATER_MS)
        eventually(lambda: log[2, 3] == 1)
        assert log[2, 0] >= 0
        assert log[2, 1] == 2
        assert log[2, 2]
        after = rig.users.tick.stats().cpus
        if rig.users.tick.stats().stalls == stalls:
            break  # else CPU 0 had no core for so long that another broadcasts
    assert after[2].broadcast == before[2].broadcast + 1
    assert after[0].sent >= before[0].sent + 1
    assert after[2].sent == before[2].sent


def test_the_owner_of_the_device_is_taken_out_of_the_mask_and_runs_locally(
    rig, eventually
):
    """tick_do_broadcast: no IPI to itself."""
    log = rig.shared("log", "i8", (8, 4))
    for _ in range(10):
        log[:] = 0
        take_broadcast(rig, 0, eventually)
        stalls = rig.users.tick.stats().stalls
        before = rig.users.tick.stats().cpus[0]
        tick.hrtimer_start(rig.users.tick.hrtimer("note1"), LATER_MS * MS, cpu=0)
        eventually(lambda: log[1, 3] == 1)
        assert log[1, 1] == 0
        assert log[1, 0] >= 0
        after = rig.users.tick.stats().cpus[0]
        if rig.users.tick.stats().stalls == stalls:
            break  # else it had no core for so long that another broadcasts
    assert after.handlers > before.handlers
    assert (after.sent, after.broadcast) == (before.sent, before.broadcast)


def busy(name, ms):
    timer = tick.hrtimer(name)
    fires = timer.fired
    tick.hrtimer_start(timer, ms * MS)
    end = time.monotonic() + 5
    while timer.fired == fires and time.monotonic() < end:
        pass
    return tick.ktime_get() - timer.expires


def masked(name):
    timer = tick.hrtimer(name)
    smp.local_irq_disable()
    tick.hrtimer_start(timer, 2 * MS)
    time.sleep(0.02)
    held = timer.fired
    smp.local_irq_enable()
    return held, timer.fired


def test_a_running_cpu_is_interrupted_for_its_own_timer(rig):
    """And not while it has interrupts disabled."""
    assert on(rig, 1, busy, "native", 3) >= 0
    held, fired = on(rig, 1, masked, "native")
    assert fired == held + 1
    held, fired = on(rig, 1, masked, "note1")
    assert fired == held + 1


def sequence(order):
    """Of timers that are due in this order: the order they ran in."""
    log, now = shmipi.shared("log"), tick.ktime_get()
    due = {n: now + (20 + 5 * place) * MS for place, n in enumerate(order)}
    smp.local_irq_disable()  # none comes before all are in the queue
    for n in sorted(due):  # they are started in another
        tick.hrtimer_start(tick.hrtimer(f"note{n}"), due[n], tick.HRTIMER_MODE_ABS)
    smp.local_irq_enable()
    while not all(log[n, 3] for n in order):
        pass
    return sorted(order, key=lambda n: due[n] + log[n, 0])


def test_the_queue_is_sorted(rig):
    assert on(rig, 3, sequence, [2, 0, 3, 1]) == [2, 0, 3, 1]


def cancel_words(name):
    timer = tick.hrtimer(name)
    idle = tick.hrtimer_try_to_cancel(timer)
    tick.hrtimer_start(timer, 10_000 * MS)
    active = tick.hrtimer_active(timer)
    return idle, active, tick.hrtimer_cancel(timer), tick.hrtimer_active(timer)


def slow(timer):
    log = shmipi.shared("log")
    log[5, 0] = 1
    end = time.monotonic() + 20
    while not log[5, 3] and time.monotonic() < end:
        time.sleep(0.001)
    time.sleep(0.05)
    shmipi.shared("log")[5, 1] = tick.hrtimer_try_to_cancel(timer)
    try:
        tick.hrtimer_cancel(timer)
    except IpiDeadlockError:
        shmipi.shared("log")[5, 2] = 1


def again(timer):
    log = shmipi.shared("log")
    log[6, 0] += 1
    log[6, 1] += tick.hrtimer_forward_now(timer, 2 * MS) >= 1
    return tick.HRTIMER_RESTART if log[6, 0] < 4 else tick.HRTIMER_NORESTART


def test_the_words_of_cancelling(rig, eventually):
    """1: it was queued; 0: it was not; -1: its function runs, and cancel waits."""
    assert on(rig, 1, cancel_words, "note1") == (0, True, 1, False)
    timer = rig.users.tick.hrtimer("slow", slow)
    log = rig.shared("log", "i8", (8, 4))
    tick.hrtimer_start(timer, 0, cpu=2)
    eventually(lambda: log[5, 0] == 1)
    assert tick.hrtimer_try_to_cancel(timer) == -1
    log[5, 3] = 1
    assert tick.hrtimer_cancel(timer) == 0
    assert list(log[5, 1:3]) == [-1, 1]
    assert not tick.hrtimer_active(timer)


def test_a_timer_restarts_itself_and_one_with_an_interval_goes_on(rig, eventually):
    timer = rig.users.tick.hrtimer("again", again)
    log = rig.shared("log", "i8", (8, 4))
    tick.hrtimer_start(timer, MS, cpu=1)
    eventually(lambda: log[6, 0] == 4)
    eventually(lambda: not tick.hrtimer_active(timer))
    assert log[6, 1] == 4
    native = rig.users.tick.hrtimer("native")
    tick.hrtimer_start(native, MS, interval=MS, cpu=3)
    eventually(lambda: rig.shared("count", "u8", 4)[0] >= 5)
    assert tick.hrtimer_cancel(native) == 1


def receive():
    try:
        tick.tick_receive_broadcast()
    except IrqError as error:
        return error.errno
    return 0


def test_receive_broadcast_without_a_device_or_a_handler(rig, boot):
    """tick_receive_broadcast: -ENODEV, -EINVAL."""
    with boot(2) as cluster:
        assert on(cluster, 1, receive) == errno.ENODEV
        assert cluster.users.tick.stats().bound_on is None
        assert on(cluster, 1, receive) == errno.EINVAL
        tick.hrtimer_start(
            cluster.users.tick.hrtimer("t", NativeHandler("noop")), 0, cpu=1
        )
        deadline = time.monotonic() + 5
        while on(cluster, 1, receive) and time.monotonic() < deadline:
            pass
        assert on(cluster, 1, receive) == 0


@pytest.mark.parametrize("way", ["offline", "killed", "stopped"])
def test_the_broadcast_is_handed_over(rig, eventually, way):
    """hotplug_cpu__broadcast_tick_pull; and of a CPU that is killed, or stopped."""
    log, timer = rig.shared("log", "i8", (8, 4)), rig.users.tick.hrtimer("note2")
    for _ in range(10):
        log[:] = 0
        take_broadcast(rig, 0, eventually)
        before = rig.users.tick.stats()
        on(rig, 2, start, "note2", LATER_MS)
        eventually(lambda: rig.cpus[2].state == "halted")
        now = rig.users.tick.stats()
        if (now.bound_on, now.stalls) == (0, before.stalls):
            pid = rig._machine.slot(0).pid
            if way == "offline":
                rig.offline(0)
            else:
                os.kill(pid, signal.SIGKILL if way == "killed" else signal.SIGSTOP)
            if tick.ktime_get() < timer.expires:
                break  # it was gone before it had to broadcast
            if way == "stopped":
                os.kill(pid, signal.SIGCONT)
            elif way == "killed":
                eventually(lambda: rig.cpus[0].state == "dead")
            rig.online(0)
        # else it had no core for so long that another has it already
        tick.hrtimer_cancel(timer)
    try:
        eventually(lambda: log[2, 3] == 1)
        after = rig.users.tick.stats()
        assert log[2, :2].tolist() >= [0, 2]
        assert log[2, 1] == 2
        assert after.bound_on not in (None, 0)
        stalls = after.stalls - before.stalls
        if way == "stopped":
            assert stalls > 0
        else:  # who took it over may be late, and that a stall of its own
            assert after.handovers - before.handovers > stalls
        assert after.handovers > before.handovers
    finally:
        if way == "stopped":
            os.kill(pid, signal.SIGCONT)


@pytest.mark.parametrize("way", ["offline", "killed"])
def test_timers_of_a_cpu_that_is_gone_move(rig, eventually, way):
    """hrtimers_cpu_dying: none is lost."""
    log, timer = rig.shared("log", "i8", (8, 4)), rig.users.tick.hrtimer("note3")
    for _ in range(10):
        log[:] = 0
        on(rig, 3, start, "note3", LATER_MS)
        if way == "offline":
            rig.offline(3)
        else:
            os.kill(rig._machine.slot(3).pid, signal.SIGKILL)
        if tick.ktime_get() < timer.expires:
            break  # it was gone before the timer was due
        if way == "killed":
            eventually(lambda: rig.cpus[3].state == "dead")
        rig.online(3)
        tick.hrtimer_cancel(timer)
    eventually(lambda: log[3, 3] == 1)
    assert log[3, 0] >= 0
    assert log[3, 1] != 3


def test_what_does_not_work_says_so(rig):
    timers = rig.users.tick
    timer = timers.hrtimer("note0")
    assert pickle.loads(pickle.dumps(timer)) == timer
    with pytest.raises(ClusterStateError, match="host is no CPU"):
        tick.hrtimer_start(timer, MS)
    with pytest.raises(CpuOfflineError):
        tick.hrtimer_start(timer, MS, cpu=CPUS)
    rig.offline(3)
    with pytest.raises(CpuOfflineError) as caught:
        tick.hrtimer_start(timer, MS, cpu=3)
    assert caught.value.errno == errno.ENXIO
    assert not tick.hrtimer_active(timer)
    for wrong in ({"tim": MS, "mode": 7}, {"tim": MS, "interval": -1}):
        with pytest.raises(ValueError, match="is"):
            tick.hrtimer_start(timer, **wrong, cpu=1)
    with pytest.raises(FileExistsError):
        timers.hrtimer("note0", note)
    with pytest.raises(KeyError):
        timers.hrtimer("nobody")
    with pytest.raises(TypeError):
        timers.hrtimer("x", 7)
    with pytest.raises(ValueError, match="name"):
        timers.hrtimer("x" * 40, note)


def fill(names):
    for place, name in enumerate(names):
        try:
            tick.hrtimer_start(tick.hrtimer(name), 60_000 * MS)
        except CsdBusyError as error:
            return place, error.errno
    return len(names), 0


def test_a_full_queue_says_so(rig):
    """-ENOSPC: the queue of one CPU; the timer is as it was."""
    timers = rig.users.tick
    noop = NativeHandler("noop")
    made = [timers.hrtimer(f"fill{n}", noop) for n in range(258)]
    try:
        names = [timer.name for timer in made]
        assert on(rig, 1, fill, names) == (256, errno.ENOSPC)
        assert not tick.hrtimer_active(made[-1])
        assert tick.hrtimer_cancel(made[0]) == 1
        # What is cancelled makes room.
        assert on(rig, 1, fill, names[-1:]) == (1, 0)
    finally:
        for timer in made:
            tick.hrtimer_cancel(timer)


@pytest.mark.parametrize("controller", ["xive", "gicv3", "riscv", "mips", "loongarch"])
def test_every_controller_broadcasts_ticks(boot, eventually, controller):
    """By its line for it; mips and loongarch, which have none, by a function call."""
    for _ in range(10):
        with boot(2, idle="halt", controller=controller) as cluster:
            timers = cluster.users.tick
            far, near = (
                timers.hrtimer(name, NativeHandler("noop")) for name in ("far", "near")
            )
            tick.hrtimer_start(far, 60_000 * MS, cpu=0)
            eventually(lambda timers=timers: timers.stats().bound_on == 0)
            eventually(lambda cluster=cluster: cluster.cpus[0].state == "halted")
            calls = cluster.counters()["csd_async"].sum()
            tick.hrtimer_start(near, LATER_MS * MS, cpu=1)
            eventually(lambda near=near: near.fired == 1)
            after = timers.stats()
            called = cluster.counters()["csd_async"].sum() - calls
            assert tick.hrtimer_cancel(far) == 1
        if not after.stalls:
            break  # else CPU 0 had no core for so long that CPU 1 broadcasts
    assert after.cpus[0].sent == after.cpus[1].broadcast == 1
    assert called == (1 if controller in ("mips", "loongarch") else 0)


def _fires_again(times):
    timer, lost = tick.hrtimer("again"), 0
    for _ in range(times):
        for asleep in (True, False):
            before, end = timer.fired, time.monotonic() + 10
            tick.hrtimer_start(timer, 2 * MS)
            while timer.fired == before and time.monotonic() < end and not lost:
                if asleep:
                    smp.wait_for_interrupt(10)
            lost += timer.fired == before
    return lost


def test_a_timer_whose_signal_a_doorbell_took_is_set_anew(boot):
    """sigtimedwait() took it as it takes rings: nothing was set for the next timer."""
    with boot(2, idle="halt", doorbell="signal") as cluster:
        cluster.users.tick.hrtimer("again", NativeHandler("noop"))
        assert cluster.run(_fires_again, 5, cpus=[1]) == [0]
