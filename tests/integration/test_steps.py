"""Kill and stop at every labelled step of the protocol, of sender and of target.

What holds each time: nobody hangs, who waited for the dead hears of it, the others go
on, a dead CPU can be booted again and a stopped one goes on as if nothing had been.
"""

import contextlib
import os
import signal
import struct
import time
from pathlib import Path

import pytest

import shmipi
from shmipi import (
    BootError,
    CpuDiedError,
    CpuOfflineError,
    IpiTimeoutError,
    _core,
    smp,
)
from shmipi.names import DOORBELLS

SENDER, TARGET, THIRD = 0, 1, 2
LIMIT_S = 2.0  # hard; the promise is 0.1, printed as measured

KILL, STOP = _core.STEP_KILL, _core.STEP_STOP
ACTIONS = pytest.mark.parametrize("action", [KILL, STOP], ids=["kill", "stop"])


# ---- what makes a CPU pass a step ----------------------------------------------------
# Each takes the machine's parts, starts a task on the sender (or the target) that leads
# there, and returns the numbers of the calls it posted as (cpu, call).


def plain_call(rig):
    """The sender calls a native handler on the halted target."""

    def task():
        smp.smp_call_function_single(1, smp.NativeHandler("count"), shmipi.shared("n"))

    return [rig.task(SENDER, task)]


def nowait_then_call(rig):
    """An asynchronous and a waiting call."""

    def task():
        n = shmipi.shared("n")
        smp.smp_call_function_single(1, smp.NativeHandler("count"), n, False)
        smp.smp_call_function_single(1, smp.NativeHandler("count"), n)

    return [rig.task(SENDER, task)]


def long_call(rig):
    """The sender waits long enough to park; its wake-up is the target's to send."""
    before = rig.machine.step_hit(SENDER)

    def handler(_):
        machine, end = _core.current_machine(), time.monotonic() + 2
        while machine.slot(SENDER).state != _core.HALTED and time.monotonic() < end:
            if machine.step_hit(SENDER) != before:
                break  # it is killed or stopped on the way
            time.sleep(0.001)
        shmipi.atomic.fetch_add(shmipi.shared("n"), 0, 1)

    def task():
        smp.smp_call_function_single(1, handler)

    return [rig.task(SENDER, task)]


def call_to_running(rig):
    """The target runs a task: the sender kicks it."""

    def busy():
        n = shmipi.shared("n")
        shmipi.shared("busy")[0] = 1
        end = time.monotonic() + 5
        while not n[0] and time.monotonic() < end:
            pass

    calls = [rig.task(TARGET, busy)]
    rig.wait(lambda: rig.busy[0])
    return calls + plain_call(rig)


def task_on_target(rig):
    def task():
        shmipi.atomic.fetch_add(shmipi.shared("n"), 0, 1)

    return [rig.task(TARGET, task)]


# (step, who passes it, what leads there, how often it is passed before)
CASES = [
    ("push", SENDER, plain_call, 0),
    ("aim", SENDER, plain_call, 0),
    ("pushed", SENDER, plain_call, 0),
    ("raise", SENDER, plain_call, 0),
    ("ring", SENDER, plain_call, 0),
    ("rung", SENDER, plain_call, 0),
    ("pushed", SENDER, nowait_then_call, 0),
    ("ring", SENDER, nowait_then_call, 0),
    ("push", SENDER, call_to_running, 0),
    ("pushed", SENDER, call_to_running, 0),
    ("raise", SENDER, call_to_running, 0),
    ("ring", SENDER, call_to_running, 0),
    ("rung", SENDER, call_to_running, 0),
    ("park", SENDER, long_call, 0),
    ("parked", SENDER, long_call, 0),
    ("halted", SENDER, long_call, 0),
    ("wake", SENDER, long_call, 1),
    ("wake", TARGET, plain_call, 0),
    ("drain", TARGET, plain_call, 0),
    ("line", TARGET, plain_call, 0),
    ("line", TARGET, call_to_running, 1),
    ("run", TARGET, plain_call, 0),
    ("unlock", TARGET, plain_call, 0),
    ("halt", TARGET, plain_call, 0),
    ("halted", TARGET, plain_call, 0),
    ("drain", TARGET, long_call, 0),
    ("unlock", TARGET, long_call, 0),
    ("unlock_ring", TARGET, long_call, 0),
    ("ring", TARGET, long_call, 0),
    ("rung", TARGET, long_call, 0),
    ("ack", TARGET, call_to_running, 0),
    ("drain", TARGET, call_to_running, 1),
    ("run", TARGET, call_to_running, 0),
    ("task", TARGET, task_on_target, 0),
]
NAMES = [
    f"{step}-{'target' if who else 'sender'}-{f.__name__}" for step, who, f, _ in CASES
]


def know():
    return shmipi.shared("n").sum() + shmipi.shared("busy").sum()


class Rig:
    def __init__(self, cluster, eventually):
        self.cluster = cluster
        self.machine = cluster._machine
        self.wait = eventually
        for cpu in cluster.cpus:
            if cpu.state in ("dead", "offline"):  # as a test before left it
                cluster.online(cpu.id)
        self.n = cluster.shared("n", "i8", 1)
        self.busy = cluster.shared("busy", "i8", 1)
        self.n[0] = self.busy[0] = 0
        # Everybody knows these by now: what is tested is not the first meeting.
        cluster.run(know)
        eventually(lambda: {cpu.state for cpu in cluster.cpus} == {"halted"})
        self.before = cluster.counters()

    def grown(self, counter):
        return int((self.cluster.counters()[counter] - self.before[counter]).sum())

    def task(self, cpu, func):
        return cpu, self.machine.post(cpu, func, (), None, True)

    def arm(self, who, step, action, skip):
        self.pid = self.cluster.cpus[who].pid
        self.machine.arm_step(who, step, action, skip)

    def await_hit(self, who, step):
        self.wait(lambda: self.machine.step_hit(who) == step)

    def await_stopped(self):
        self.wait(lambda: state_of(self.pid) in "T")

    def boot_target(self, action, background):
        """Boot the target anew, to its end or a stop at "online": the thread."""
        os.kill(self.cluster.cpus[TARGET].pid, signal.SIGKILL)
        self.wait(lambda: self.cluster.cpus[TARGET].state == "dead")
        self.machine.arm_step(TARGET, "online", action)
        thread = background(self.cluster.online, TARGET)
        self.wait(lambda: self.machine.step_hit(TARGET) == "online")
        self.pid = self.machine.slot(TARGET).pid
        return thread

    def resume(self):
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGCONT)


def state_of(pid):
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


@pytest.fixture
def doorbell():
    """Of the rig's machine, unless a test chooses another."""
    return "futex"


@pytest.fixture
def rig(cluster_until_failure, eventually, doorbell):
    options = {"idle": "halt", "steps": True, "doorbell": doorbell}
    with cluster_until_failure(3, **options) as cluster:
        yield Rig(cluster, eventually)


def within(seconds, func, *args):
    """Call `func`, which must be back in time; print what it took."""
    start = time.monotonic()
    try:
        return func(*args)
    finally:
        took = time.monotonic() - start
        print(f"{getattr(func, '__name__', func)}: {took * 1e3:.1f} ms", flush=True)
        assert took < seconds


@pytest.mark.parametrize(("step", "who", "leads_there", "skip"), CASES, ids=NAMES)
def test_killed_at(rig, step, who, leads_there, skip):
    cluster = rig.cluster
    rig.arm(who, step, KILL, skip)
    calls = leads_there(rig)
    rig.await_hit(who, step)
    died_at = time.monotonic()
    # Who waited for the dead CPU, its tasks' callers included, hears of it.
    for cpu, call in calls:
        if cpu == who:
            with pytest.raises(CpuDiedError):
                within(LIMIT_S, rig.machine.collect, call, cpu, 10.0)
    for cpu, call in calls:
        if cpu != who and leads_there is not call_to_running:
            # Its own task waited for the dead: told, or done before it.
            try:
                within(LIMIT_S, rig.machine.collect, call, cpu, 10.0)
            except shmipi.RemoteCallError as error:
                if not isinstance(error.__cause__, CpuDiedError):
                    raise
    print(f"heard of it {1e3 * (time.monotonic() - died_at):.1f} ms after", flush=True)
    rig.wait(lambda: cluster.cpus[who].state == "dead", LIMIT_S)
    with pytest.raises(CpuOfflineError):
        cluster.call(who, int)
    # The others go on: a third CPU and the host call what is left.
    other = TARGET if who == SENDER else SENDER

    def third():
        smp.smp_call_function_single(other, smp.NativeHandler("noop"))
        smp.smp_call_function(lambda _: None)

    if leads_there is call_to_running:
        # Let the task on the target end, whatever became of the call to it.
        rig.n[0] += 1
        for cpu, call in calls:
            if cpu != who:
                try:
                    within(LIMIT_S, rig.machine.collect, call, cpu, 10.0)
                except shmipi.RemoteCallError as error:
                    if not isinstance(error.__cause__, CpuDiedError):
                        raise
    within(LIMIT_S, rig.machine.collect, rig.task(THIRD, third)[1], THIRD, LIMIT_S)
    assert within(LIMIT_S, lambda: cluster.call(other, int, timeout=5)) == 0
    before = cluster.cpus[who].generation
    within(10, cluster.online, who)
    assert cluster.cpus[who].generation == before + 1
    assert cluster.run(smp.smp_processor_id) == [0, 1, 2]
    within(LIMIT_S, cluster.smp.on_each_cpu, id)


def locked_csds(machine, slot, count=64):
    """How many of a slot's first csds are locked: their lock words are their first."""
    view = memoryview(machine)
    _, _, _, first, region = struct.unpack_from("<5Q", view, 80)  # struct shi_header
    words = [
        struct.unpack_from("<Q", view, first + slot * region + i * 64)[0]
        for i in range(count)
    ]
    return sum(word & 1 for word in words)


def test_a_csd_locked_and_never_pushed_is_free_at_its_senders_death(rig):
    rig.arm(SENDER, "push", STOP, 0)
    rig.task(SENDER, lambda: smp.smp_call_function_single(1, lambda _: None))
    rig.await_hit(SENDER, "push")
    rig.await_stopped()
    assert locked_csds(rig.machine, SENDER) == 1
    os.kill(rig.pid, signal.SIGKILL)
    rig.wait(lambda: rig.cluster.cpus[SENDER].state == "dead", LIMIT_S)
    rig.wait(lambda: locked_csds(rig.machine, SENDER) == 0, LIMIT_S)
    within(10, rig.cluster.online, SENDER)
    assert rig.cluster.run(smp.smp_processor_id) == [0, 1, 2]


def until_told(_=None):
    n, end = shmipi.shared("n"), time.monotonic() + 10
    while not n[0] and time.monotonic() < end:
        time.sleep(0.002)
    return int(n[0])


def until_raised():
    with contextlib.suppress(InterruptedError):
        smp.wait_for_interrupt(10)
    return int(shmipi.shared("n")[0])


@pytest.mark.parametrize(
    ("step", "wait"),
    [
        ("parked", lambda: smp.smp_call_on_cpu(1, until_told, None)),
        ("parked", lambda: smp.smp_call_function_single(1, until_told) or until_told()),
        ("halt", until_raised),
    ],
    ids=["on_cpu", "single", "interrupt"],
)
def test_a_signal_that_comes_just_before_a_wait_sleeps_is_handled_in_it(
    rig, step, wait
):
    """Nothing interrupts the sleep: the signal's C handler has run before."""

    def told(*_):
        shmipi.shared("n")[0] = time.monotonic() < shmipi.shared("end")[0]
        raise InterruptedError

    def task():
        shmipi.shared("end")[0] = time.monotonic() + 8
        before = signal.signal(signal.SIGUSR1, told)
        try:
            return wait()
        except InterruptedError:
            return int(shmipi.shared("n")[0])
        finally:
            signal.signal(signal.SIGUSR1, before)

    rig.cluster.shared("end", "f8", 1)
    rig.arm(SENDER, step, STOP, 0)
    cpu, call = rig.task(SENDER, task)
    rig.await_hit(SENDER, step)
    rig.await_stopped()
    os.kill(rig.pid, signal.SIGUSR1)
    rig.resume()
    assert rig.machine.collect(call, cpu, 20.0) == 1


@pytest.mark.parametrize(("step", "who", "leads_there", "skip"), CASES, ids=NAMES)
def test_stopped_at(rig, step, who, leads_there, skip):
    cluster = rig.cluster
    rig.arm(who, step, STOP, skip)
    calls = leads_there(rig)
    rig.await_hit(who, step)
    rig.await_stopped()
    try:
        if who == SENDER:
            # Whatever it had in hand: a third CPU's call to the target returns.

            def third():
                start = time.monotonic()
                smp.smp_call_function_single(1, smp.NativeHandler("noop"))
                return time.monotonic() - start

            took = rig.machine.collect(rig.task(THIRD, third)[1], THIRD, LIMIT_S)
            print(f"a third CPU's call: {took * 1e3:.1f} ms")
            assert took < LIMIT_S
            assert within(LIMIT_S, lambda: cluster.call(TARGET, int, timeout=5)) == 0
        else:
            # SIGSTOP is not death: a call to it waits.
            assert cluster.cpus[who].state not in ("dead", "offline")
            with pytest.raises(IpiTimeoutError):
                cluster.call(TARGET, int, timeout=0.05)
            assert within(LIMIT_S, lambda: cluster.call(THIRD, int, timeout=5)) == 0
    finally:
        rig.resume()
    # Afterwards everything ends as if nothing had been, and exactly once.
    for cpu, call in calls:
        within(LIMIT_S, rig.machine.collect, call, cpu, 10.0)
    expected = {nowait_then_call: 2}.get(leads_there, 1)
    assert rig.n[0] == expected
    assert cluster.run(smp.smp_processor_id) == [0, 1, 2]
    within(LIMIT_S, cluster.smp.on_each_cpu, id)
    assert rig.grown("corrupt") == rig.grown("died") == 0


def test_a_csd_that_a_killed_cpu_never_queued_comes_home(boot):
    """With its payload: a CPU's slot has the same arena again and again."""
    with boot(2, idle="halt", steps=True) as cluster:
        payload = bytes(cluster.payload_max // 2 + 1)

        def send():
            smp.smp_call_function_single(1, len, payload)

        # More often than the arena has room for it.
        for _ in range(9):
            cluster._machine.arm_step(0, "aim", KILL)
            with pytest.raises(CpuDiedError):
                cluster.run(send, cpus=[0])
            cluster.online(0)
        cluster.run(send, cpus=[0])
        assert cluster.counters()["corrupt"].sum() == 0


@pytest.mark.parametrize("step", ["pushed", "raise", "ring"])
@pytest.mark.parametrize("doorbell", DOORBELLS[1:])
def test_a_ring_dies_with_its_ringer_whatever_the_doorbell(rig, step, doorbell):
    """A third CPU's call to a halted target whose ringer is stopped returns."""
    rig.arm(SENDER, step, STOP, 0)
    calls = plain_call(rig)
    rig.await_hit(SENDER, step)
    rig.await_stopped()
    try:

        def third():
            start = time.monotonic()
            smp.smp_call_function_single(1, smp.NativeHandler("noop"))
            return time.monotonic() - start

        took = rig.machine.collect(rig.task(THIRD, third)[1], THIRD, LIMIT_S)
        print(f"{took * 1e3:.1f} ms")
        assert took < LIMIT_S
    finally:
        rig.resume()
    for cpu, call in calls:
        rig.machine.collect(call, cpu, 5.0)
    assert rig.n[0] == 1


@pytest.mark.parametrize("step", ["unlock", "unlock_ring"])
@ACTIONS
def test_while_a_large_result_is_handed_over(rig, background, action, step):
    """Before the unlock it is the call's end as of any other; after it, it is read."""
    cluster = rig.cluster

    def large(timeout):
        return len(cluster.call(TARGET, bytes, 500_000, timeout=timeout))

    assert large(5) == 500_000
    rig.arm(TARGET, step, action, 0)
    if step == "unlock_ring":
        # Parked from the start, so that its end rings.
        call = rig.machine.post(TARGET, bytes, (500_000,), None, False)
        rig.await_hit(TARGET, step)
        try:
            assert len(rig.machine.collect(call, TARGET, LIMIT_S)) == 500_000
        finally:
            rig.resume()
    else:
        # Of one that dies it is told; only of one that is stopped it gives up.
        thread = background(large, 10 if action == KILL else 1)
        rig.await_hit(TARGET, step)
        try:
            with pytest.raises(CpuDiedError if action == KILL else IpiTimeoutError):
                thread.end(LIMIT_S)
        finally:
            rig.resume()
    if action == KILL:
        rig.wait(lambda: cluster.cpus[TARGET].state == "dead")
        cluster.online(TARGET)
    assert large(5) == 500_000


@ACTIONS
def test_offline_step(rig, action):
    cluster = rig.cluster
    rig.arm(TARGET, "offline", action, 0)
    if action == KILL:
        with pytest.raises(CpuDiedError, match="before it was offline"):
            within(LIMIT_S, cluster.offline, TARGET)
        assert cluster.cpus[TARGET].state == "dead"
    else:
        for _ in range(5):  # withdrawn before it came so far, where one had no core
            with pytest.raises(IpiTimeoutError):
                cluster.offline(TARGET, timeout=1)
            if rig.machine.step_hit(TARGET) == "offline":
                break
        rig.await_stopped()
        rig.resume()
        # The request was withdrawn: it comes back by itself.
        rig.wait(lambda: cluster.cpus[TARGET].state == "halted")
    cluster.online(TARGET)
    assert cluster.call(TARGET, smp.smp_processor_id, timeout=5) == TARGET


@ACTIONS
def test_online_step(rig, background, action):
    cluster = rig.cluster
    thread = rig.boot_target(action, background)
    if action == KILL:
        with pytest.raises(BootError, match="CPU 1"):
            thread.end()
        rig.wait(lambda: cluster.cpus[TARGET].state == "dead")
        with pytest.raises(CpuOfflineError):
            cluster.call(TARGET, int)
        cluster.online(TARGET)
    else:
        rig.await_stopped()
        with pytest.raises(CpuOfflineError):
            cluster.call(TARGET, int)
        assert cluster.call(SENDER, int, timeout=5) == 0
        rig.resume()
        thread.end()
    assert cluster.call(TARGET, smp.smp_processor_id, timeout=5) == TARGET


def test_the_firmware_reaps_while_a_booting_cpu_is_stopped(rig, background):
    """A death is told even while another CPU hangs in its boot."""
    cluster = rig.cluster
    thread = rig.boot_target(STOP, background)
    try:
        call = rig.machine.post(THIRD, time.sleep, (30,), None, False)
        os.kill(cluster.cpus[THIRD].pid, signal.SIGKILL)
        with pytest.raises(CpuDiedError):
            within(LIMIT_S, rig.machine.collect, call, THIRD, 5.0)
    finally:
        rig.resume()
    thread.end()


@ACTIONS
def test_nmi_step(rig, action):
    """Its sender stops or dies between making an NMI pending and signalling it."""
    cluster = rig.cluster

    def taken():
        return cluster.counters()["nmi"][TARGET]

    before = taken()
    rig.arm(SENDER, "nmi", action, 0)
    _, call = rig.task(SENDER, lambda: shmipi.irq.chip().send_nmi(1))
    rig.await_hit(SENDER, "nmi")
    if action == KILL:  # the reaper signals for it
        rig.wait(lambda: taken() == before + 1)
        with pytest.raises(CpuDiedError):
            rig.machine.collect(call, SENDER, 5.0)
        cluster.online(SENDER)
    else:
        rig.await_stopped()
        rig.wait(lambda: taken() == before + 1)  # the watchdog signals for it
        rig.resume()
        rig.machine.collect(call, SENDER, 5.0)
        assert taken() == before + 1
    assert cluster.call(TARGET, smp.smp_processor_id, timeout=5) == TARGET


@ACTIONS
def test_resched_step(rig, action):
    """Its sender stops or dies between NEED_RESCHED and the interrupt."""
    cluster = rig.cluster
    rig.wait(lambda: cluster.cpus[TARGET].state == "halted")
    halts = cluster.counters()["halts"][TARGET]
    rig.arm(SENDER, "resched", action, 0)
    _, call = rig.task(SENDER, lambda: smp.resched_cpu(1))
    rig.await_hit(SENDER, "resched")
    # Rung by the reaper, or by the watchdog: it has looked, and sleeps again.
    rig.wait(lambda: cluster.counters()["halts"][TARGET] > halts)
    if action == KILL:
        with pytest.raises(CpuDiedError):
            rig.machine.collect(call, SENDER, 5.0)
        cluster.online(SENDER)
    else:
        rig.await_stopped()
        rig.resume()
        rig.machine.collect(call, SENDER, 5.0)
    before = cluster.counters()["irq_resched"][TARGET]
    rig.wait(lambda: cluster.cpus[TARGET].state == "halted")
    cluster.smp.resched_cpu(TARGET)  # the flag of before does not silence this one
    rig.wait(lambda: cluster.counters()["irq_resched"][TARGET] > before)


def test_every_step_has_a_case():
    text = {step for step, *_ in CASES} | {"offline", "online", "nmi", "resched"}
    text.add("complete")  # test_waitqueue.py
    text |= {"switch_mm", "unmap", "unmap_free"}  # test_tlb.py
    text.add("undo")  # test_irq_lock.py
    text.add("rcu_enxio")  # test_rcu.py
    text |= {"purge", "requeue"}  # tests/native/test_net_steps.c
    # tests/native/test_wake_steps.c
    text |= {f"ttwu{x}" for x in ("", "_look", "_turn", "_list", "_queued")}
    text |= {
        f"multi_{x}" for x in ("queue", "ack", "state", "park", "run")
    }  # test_stop
    text.add("spurious")  # test_irq_sync.py
    text |= {"nmi_ask", "nmi_wait", "nmi_take"}  # test_nmi_ipi.py
    source = (
        Path(__file__).resolve().parents[2] / "shmipi" / "_core" / "base" / "step.h"
    )
    lines = source.read_text().splitlines()
    named = {line.split("X(")[1].split(")")[0] for line in lines if "    X(" in line}
    assert text == named
