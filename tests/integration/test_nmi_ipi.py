"""smp_send_nmi_ipi from everywhere: who waits here never waits for himself."""

import contextlib
import errno
import os
import signal
import threading
import time

import pytest

import shmipi
from shmipi import Cluster, IrqError, _core, atomic, smp
from shmipi.machine.process import is_stopped

LONG = 20_000_000  # us: far more than any of this takes
COUNT = smp.NativeHandler("count")


def note(regs):
    atomic.fetch_add(shmipi.shared("seen"), smp.smp_processor_id(), 1)


def ways():
    """Send to CPU 2 by each kind of function; what was returned."""
    return (
        smp.smp_send_nmi_ipi(2, note, LONG),
        smp.smp_send_nmi_ipi(2, COUNT, LONG, shmipi.shared("seen")[2:3]),
    )


@pytest.fixture
def seen(cluster):
    for cpu in cluster.cpus:
        if cpu.state in ("dead", "offline"):
            cluster.online(cpu.id)
    found = cluster.shared("seen", "i8", 8)
    cluster.run(int)
    found[:] = 0
    return found


@pytest.fixture
def of(cluster_until_failure):
    """`of(controller)`: a machine with it, for several tests, and its `seen`."""
    with contextlib.ExitStack() as stack:

        def use(controller):
            options = {"idle": "halt", "controller": controller}
            cluster = stack.enter_context(cluster_until_failure(3, **options))
            seen = cluster.shared("seen", "i8", 8)
            seen[:] = 0
            return cluster, seen

        yield use


@contextlib.contextmanager
def stopped(cluster, cpu):
    pid = cluster.cpus[cpu].pid
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


# ---- from everywhere -----------------------------------------------------------------


@pytest.mark.parametrize("idle", [True, False], ids=["idle", "busy"])
def test_from_an_interrupt_handler(cluster, seen, background, eventually, idle):
    go = cluster.shared("go", "i8", 2)
    go[:] = 0

    def busy():
        go[0] = 1
        while not go[1]:
            pass

    task = None if idle else background(lambda: cluster.run(busy, cpus=[1]))
    eventually(lambda: idle or go[0])
    assert cluster.call(1, ways, timeout=20) == (1, 1)
    go[1] = 1
    if task:
        task.end()
    eventually(lambda: seen[2] == 2)


def test_with_interrupts_disabled(cluster, seen, eventually):
    def task():
        smp.local_irq_disable()
        done = ways()
        still = smp.irqs_disabled()
        smp.local_irq_enable()
        return done, still

    assert cluster.run(task, cpus=[1]) == [((1, 1), True)]
    eventually(lambda: seen[2] == 2)


def test_from_an_nmi_handler(cluster, seen, eventually):
    done = cluster.shared("done", "i8", 2)
    done[:] = 0

    def handler(regs):
        assert smp.in_nmi()
        done[:] = ways()

    assert cluster.smp.smp_send_nmi_ipi(1, handler, LONG) == 1
    eventually(lambda: seen[2] == 2)
    eventually(lambda: done.tolist() == [1, 1])
    assert not cluster.counters()["unraisable"].any()


def test_from_an_attached_host(cluster, seen, eventually):
    with Cluster.attach(cluster.name) as guest:
        assert guest.smp.smp_send_nmi_ipi(smp.NMI_IPI_ALL_OTHERS, note, LONG) == 1
        mine = guest.shared("seen", "i8", 8)
        assert guest.smp.smp_send_nmi_ipi(2, COUNT, LONG, mine[2:3]) == 1
        eventually(lambda: seen[:3].tolist() == [1, 1, 2])


def test_not_to_itself_from_anywhere(cluster, seen):
    def itself():
        with pytest.raises(IrqError, match="can not send") as error:
            smp.smp_send_nmi_ipi(1, note)
        return error.value.errno

    assert cluster.call(1, itself) == errno.EINVAL
    assert cluster.run(itself, cpus=[1]) == [errno.EINVAL]
    with pytest.raises(ValueError, match="delay_us"):
        cluster.smp.smp_send_nmi_ipi(1, note, -1)
    with pytest.raises(TypeError, match="no function"):
        cluster.smp.smp_send_nmi_ipi(1, 5)
    with pytest.raises(TypeError, match="a native handler takes None"):
        cluster.smp.smp_send_nmi_ipi(1, COUNT, LONG, 0.5)
    assert not seen.any()


# ---- nobody waits for himself --------------------------------------------------------


@pytest.mark.parametrize("controller", ["apic", "riscv", "xive"])
def test_nmi_handlers_that_send_to_each_other(of, controller, eventually):
    """Each is in an NMI's handler, which takes no NMI, and both wait for the other."""
    cluster, seen = of(controller)
    met = cluster.shared("met", "i8", 3)
    before = cluster.counters()

    def grown(name):
        return (cluster.counters()[name] - before[name])[:2]

    def cross(regs):
        me = smp.smp_processor_id()
        atomic.fetch_add(met, 0, 1)
        while met[0] < 2 * met[2]:  # both are in it
            pass
        assert smp.smp_send_nmi_ipi(1 - me, note) == 1
        atomic.fetch_add(met, 1, 1)

    for turn in range(1, 11):
        met[2] = turn
        for cpu in (0, 1):
            assert cluster.smp.smp_send_nmi_ipi(cpu, cross, LONG) == 1
        eventually(lambda turn=turn: met[1] == 2 * turn, 20)
        eventually(lambda turn=turn: seen[:2].tolist() == [turn, turn])
        # Each had an NMI for each, one of which had been entered from a wait before.
        # Taken, too: with one pending in a handler the next turn's is one with that.
        eventually(lambda turn=turn: grown("nmi").tolist() == [2 * turn] * 2)
    assert not cluster.counters()["unraisable"].any()
    assert grown("nmi_swallowed").sum() > 0
    assert not grown("nmi_unknown").any()


@pytest.mark.parametrize("controller", ["apic", "riscv"])
def test_senders_that_cross_with_interrupts_disabled(of, controller, eventually):
    """Where NMIs can be masked, both are deaf to them, and both wait for the other."""
    cluster, seen = of(controller)
    at = cluster.shared("at", "i8", (2, 1))
    at[:] = 0
    rounds = 10

    def cross():
        me = smp.smp_processor_id()
        for turn in range(1, rounds + 1):
            at[me] = turn
            while at[1 - me] < turn:
                pass
            smp.local_irq_disable()
            assert (
                smp.smp_send_nmi_ipi(
                    1 - me,
                    note if turn % 2 else COUNT,
                    0,
                    None if turn % 2 else seen[1 - me : 2 - me],
                )
                == 1
            )
            smp.local_irq_enable()

    cluster.run(cross, cpus=[0, 1], timeout=30)
    eventually(lambda: seen[:2].tolist() == [rounds, rounds])


def test_an_nmi_on_top_of_a_sender_sends_its_own(cluster, seen, background, eventually):
    """It takes the lock from what it has interrupted, which asks again after it."""
    inner = cluster.shared("inner", "i8", 2)
    inner[:] = 0

    def on_top(type, regs):
        if smp.smp_processor_id() == 0:
            inner[0] = smp.smp_send_nmi_ipi(2, note)

    cluster.smp.register_nmi_handler(smp.NMI_LOCAL, on_top, 0, "on top")
    try:
        with stopped(cluster, 1):
            sender = background(
                lambda: cluster.run(smp.smp_send_nmi_ipi, 1, note, LONG, cpus=[0])
            )
            eventually(lambda: cluster.chip.read("nmi_request", 1))
            first = cluster.chip.read("nmi_request", 1)
            cluster.chip.send_nmi(0)
            eventually(lambda: inner[0] == 1)
            eventually(lambda: seen[2] == 1)
            eventually(lambda: cluster.chip.read("nmi_request", 1) > first + 1)
            assert seen[1] == 0
        assert sender.end(20) == [1]
        eventually(lambda: seen[1] == 1)
        assert seen[:3].tolist() == [0, 1, 1]
    finally:
        cluster.smp.unregister_nmi_handler(smp.NMI_LOCAL, "on top")


def test_a_signal_handler_on_top_of_a_host_that_sends(script, cluster, seen):
    """The same of a host, whose signal handlers interrupt what it waits for."""
    with stopped(cluster, 1):
        script(
            """
            import os, signal, sys
            from shmipi import Cluster, smp

            with Cluster.attach(sys.argv[1]) as lab:
                done = []

                def alarm(*_):
                    done.append(lab.smp.smp_send_nmi_ipi(2, smp.NativeHandler("noop")))

                signal.signal(signal.SIGALRM, alarm)
                signal.setitimer(signal.ITIMER_REAL, 0.1)
                noop = smp.NativeHandler("noop")
                assert lab.smp.smp_send_nmi_ipi(1, noop, 1_000_000) == 0
                assert done == [1]
            """,
            cluster.name,
        )
    assert cluster.smp.smp_send_nmi_ipi(1, note, LONG) == 1


def test_hosts_threads_send_one_at_a_time(cluster, seen, background, eventually):
    send = cluster.smp.smp_send_nmi_ipi
    threads = [
        background(lambda: [send(cpu, note, LONG) for cpu in (0, 1, 2) * 10])
        for _ in range(4)
    ]
    assert [thread.end(30) for thread in threads] == [[1] * 30] * 4
    eventually(lambda: seen[:3].tolist() == [40, 40, 40])


# ---- those who do not come -----------------------------------------------------------


def test_who_is_late_does_not_enter_it_after_all(cluster, seen):
    """Proves row 55."""
    with stopped(cluster, 1):
        assert cluster.smp.smp_send_nmi_ipi(1, note, 20_000) == 0
        assert cluster.smp.smp_send_nmi_ipi(1, COUNT, 20_000, seen[1:2]) == 0
        # As long as it takes for the others to come on a busy computer.
        all_others = smp.NMI_IPI_ALL_OTHERS
        assert cluster.smp.smp_send_nmi_ipi(all_others, note, 2_000_000) == 0
        assert cluster.smp.smp_send_nmi_ipi(2, note, LONG) == 1
    cluster.run(int)
    assert seen[:3].tolist() == [1, 0, 2]


def test_ctrl_c_takes_it_back(cluster, seen, background, eventually):
    """And whoever is next finds the lock free."""

    def interrupt(*_):
        raise KeyboardInterrupt

    def press():  # when it waits
        eventually(lambda: cluster.chip.read("nmi_request", 1))
        signal.pthread_kill(threading.main_thread().ident, signal.SIGALRM)

    old = signal.signal(signal.SIGALRM, interrupt)
    try:
        with stopped(cluster, 1):
            thread = background(press)
            with pytest.raises(KeyboardInterrupt):
                cluster.smp.smp_send_nmi_ipi(1, note)
            thread.end()
            assert cluster.chip.read("nmi_request", 1) == 0
            assert cluster.smp.smp_send_nmi_ipi(2, note, LONG) == 1
    finally:
        signal.signal(signal.SIGALRM, old)
    assert cluster.smp.smp_send_nmi_ipi(1, note, LONG) == 1
    eventually(lambda: seen[:3].tolist() == [0, 1, 1])


@pytest.mark.parametrize("another", [True, False], ids=["another", "nobody"])
@pytest.mark.parametrize("func", ["native", "python"])
def test_the_lock_of_a_dead_sender_is_taken_over(
    cluster, seen, background, eventually, func, another
):
    call = (1, note, 0) if func == "python" else (1, COUNT, 0, seen[1:2])
    with stopped(cluster, 1):
        thread = background(lambda: cluster.run(smp.smp_send_nmi_ipi, *call, cpus=[0]))
        eventually(lambda: cluster.chip.read("nmi_request", 1))
        os.kill(cluster.cpus[0].pid, signal.SIGKILL)
        with pytest.raises(shmipi.CpuDiedError):
            thread.end()
        if another:  # by a number of its own
            assert cluster.smp.smp_send_nmi_ipi(2, note, LONG) == 1
    # What the dead had asked for is nobody's any more.
    eventually(lambda: cluster.chip.read("nmi_request", 1) == 0)
    cluster.run(int, cpus=[1, 2])
    assert seen[:3].tolist() == [0, 0, int(another)]
    assert cluster.smp.smp_send_nmi_ipi(1, note, LONG) == 1


def test_the_lock_of_a_dead_guest_is_taken_over(cluster, seen, script, eventually):
    with stopped(cluster, 1):
        guest = script(
            """
            import sys
            from shmipi import Cluster, smp

            lab = Cluster.attach(sys.argv[1])
            lab.smp.smp_send_nmi_ipi(1, smp.NativeHandler("noop"))
            """,
            cluster.name,
            wait=False,
        )
        eventually(lambda: cluster.chip.read("nmi_request", 1), 20)
        guest.kill()
        assert cluster.smp.smp_send_nmi_ipi(2, note, LONG) == 1
    assert cluster.smp.smp_send_nmi_ipi(1, note, LONG) == 1


def test_a_fork_in_a_sender_leaves_it_to_the_parent(cluster, seen, script):
    with stopped(cluster, 1):
        text = script(
            """
            import os, signal, sys
            from shmipi import Cluster, ClusterStateError, smp

            lab = Cluster.attach(sys.argv[1])
            pids = []

            def fork(*_):
                pids.append(os.fork())

            signal.signal(signal.SIGALRM, fork)
            signal.setitimer(signal.ITIMER_REAL, 0.1)
            noop = smp.NativeHandler("noop")
            try:
                sent = lab.smp.smp_send_nmi_ipi(1, noop, 1_000_000)
            except ClusterStateError as error:
                assert "fork's child" in str(error)
                os._exit(7)
            assert os.waitstatus_to_exitcode(os.waitpid(pids[0], 0)[1]) == 7
            assert lab.smp.smp_send_nmi_ipi(2, noop, 5_000_000) == 1
            print("sent", sent)
            lab.shutdown()
            """,
            cluster.name,
        ).text
    assert text == "sent 0\n"


def test_the_end_of_the_machine_ends_it(boot, background, eventually):
    cluster = boot(2, idle="halt")
    os.kill(cluster.cpus[1].pid, signal.SIGSTOP)
    thread = background(cluster.smp.smp_send_nmi_ipi, 1, note)
    eventually(lambda: cluster.chip.read("nmi_request", 1))
    task = cluster.start(smp.smp_send_nmi_ipi, 1, note, cpus=[0])
    os.kill(cluster._machine.firmware_pid, signal.SIGKILL)
    with pytest.raises(shmipi.MachineDiedError):
        thread.end()
    with pytest.raises(shmipi.MachineDiedError):
        task[0].result(5)


def test_a_target_that_goes_offline_is_not_waited_for(
    cluster, seen, background, eventually
):
    with stopped(cluster, 1):
        thread = background(cluster.smp.smp_send_nmi_ipi, 1, note)
        eventually(lambda: cluster.chip.read("nmi_request", 1))
        off = background(cluster.offline, 1)
        time.sleep(0.02)
    assert thread.end() == 1
    off.end()
    with pytest.raises(shmipi.CpuOfflineError):
        cluster.smp.smp_send_nmi_ipi(1, note)
    assert cluster.smp.smp_send_nmi_ipi(smp.NMI_IPI_ALL_OTHERS, note, LONG) == 1
    cluster.online(1)
    cluster.run(int)
    assert seen[:3:2].tolist() == [1, 1]


def test_a_second_sender_waits_no_longer_than_it_may(
    cluster, seen, background, eventually
):
    with stopped(cluster, 1):
        first = background(cluster.smp.smp_send_nmi_ipi, 1, note)
        eventually(lambda: cluster.chip.read("nmi_request", 1))

        def second():
            return smp.smp_send_nmi_ipi(2, note, 50_000)

        assert cluster.run(second, cpus=[0]) == [0]
        assert first.is_alive()
    assert first.end() == 1
    assert seen[2] == 0


# ---- the safe one --------------------------------------------------------------------


@pytest.mark.parametrize("controller", ["xive", "apic", "riscv"])
def test_the_safe_one_can_be_masked_where_there_is_a_message(
    of, controller, background, eventually
):
    cluster, seen = of(controller)
    go = cluster.shared("go", "i8", 2)
    go[:] = 0

    def off():
        smp.local_irq_disable()
        go[0] = 1
        while not go[1]:
            pass
        smp.local_irq_enable()

    safe = cluster.smp.smp_send_safe_nmi_ipi
    assert safe(1, note, LONG) == 1
    eventually(lambda: seen[1] == 1)
    task = background(lambda: cluster.run(off, cpus=[1]))
    eventually(lambda: go[0])
    comes = int(controller == "apic")
    assert safe(1, note, LONG if comes else 50_000) == comes
    not_safe = int(controller in ("apic", "xive"))
    limit = LONG if not_safe else 50_000
    assert cluster.smp.smp_send_nmi_ipi(1, COUNT, limit, seen[1:2]) == not_safe
    eventually(lambda: seen[1] == 1 + comes + not_safe)
    go[1] = 1
    task.end()
    assert safe(1, note, LONG) == 1
    eventually(lambda: seen[1] == 2 + comes + not_safe)
    if controller == "xive":
        assert cluster.chip.line("PPC_MSG_NMI_IPI").use == "nmi"


# ---- deaths at each step -------------------------------------------------------------


@pytest.fixture(scope="module")
def steps(request):
    make = request.getfixturevalue("cluster_until_failure")
    return lambda: make(3, idle="halt", steps=True)


@pytest.mark.parametrize("action", [_core.STEP_KILL, _core.STEP_STOP])
@pytest.mark.parametrize(
    ("step", "who", "func"),
    [
        ("nmi_ask", 0, "native"),
        ("nmi_wait", 0, "native"),
        ("nmi_wait", 0, "python"),
        ("nmi", 0, "python"),
        ("nmi_take", 1, "native"),
        ("nmi_take", 1, "python"),
    ],
)
def test_a_death_at_each_step(steps, eventually, step, who, func, action):
    """Killed or stopped there, sender or target: the others go on sending."""
    with steps() as cluster:
        for cpu in cluster.cpus:
            if cpu.state in ("dead", "offline"):
                cluster.online(cpu.id)
        seen = cluster.shared("seen", "i8", 8)
        cluster.run(int)
        seen[:] = 0
        info = None if func == "python" else seen[1:2]
        handler = note if func == "python" else COUNT
        machine = cluster._machine
        machine.arm_step(who, step, action, 0)
        pid = cluster.cpus[who].pid
        task = cluster.start(smp.smp_send_nmi_ipi, 1, handler, LONG, info, cpus=[0])
        eventually(lambda: machine.step_hit(who) == step)
        if action == _core.STEP_KILL:
            eventually(lambda: cluster.cpus[who].state == "dead")
            if who == 0:
                with pytest.raises(shmipi.CpuDiedError):
                    task[0].result(5)
            else:
                assert task[0].result(5) == 1
            assert cluster.smp.smp_send_nmi_ipi(2, note, LONG) == 1
            cluster.online(who)
            cluster.run(int)  # who had entered it has returned
        else:
            eventually(lambda: is_stopped(pid))  # which it tells of before
            others = 0 if who == 0 and step != "nmi_take" else 1
            limit = LONG if others else 50_000
            assert cluster.smp.smp_send_nmi_ipi(2, note, limit) == others
            os.kill(pid, signal.SIGCONT)
            assert task[0].result(5) == 1
            eventually(lambda: seen[1] == 1)
        before = int(seen[1])
        assert cluster.smp.smp_send_nmi_ipi(1, note, LONG) == 1
        eventually(lambda: seen[1] == before + 1)
        assert not cluster.counters()["unraisable"].any()
