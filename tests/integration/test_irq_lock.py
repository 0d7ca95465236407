"""The lock of the irq tables: whoever holds it is stopped, killed or interrupted.

What holds each time: it is free again, or an error says who holds it; and what was
under change is all there or not there at all.
"""

import contextlib
import gc
import os
import signal
import sys
import threading
import time

import pytest

import shmipi
from shmipi import ClusterStateError, IpiDeadlockError, IpiTimeoutError, _core, smp
from shmipi.irq.bound import BoundIrq
from shmipi.irq.chips import powerpc_smp
from shmipi.machine import controller

LIMIT_S = 3.0  # hard; a lock that is never given back is waited for 5 s


@pytest.fixture
def lab(cluster_until_failure):
    with cluster_until_failure(3, idle="halt", steps=True) as made:
        yield made


def is_free(lab):
    """Reserve and destroy: it takes the lock twice. In which time?"""
    start = time.monotonic()
    lab.irq.irq_destroy_ipi(lab.irq.irq_reserve_ipi(None, "0-1"))
    assert time.monotonic() - start < LIMIT_S
    assert lab._machine.pic_read(0, "undo") == 0


def whole(lab):
    """Every irq there is can be used and destroyed; nothing else is taken."""
    left = lab.irq.table.virqs()
    for virq in left:
        lab.irq.irq_destroy_ipi(virq)
    table = lab.irq.table
    assert not table._desc["used"][1:].any()
    assert not table._line_virq.any()
    return left


def stopped(pid):
    with open(f"/proc/{pid}/stat") as file:
        return file.read().rpartition(")")[2].split()[0] == "T"


# ---- holders that end ----------------------------------------------------------------


def hold_and_die(mailbox):
    """In a coprocessor: change the tables, and be killed in the middle of it."""
    machine = mailbox._machine
    irq = BoundIrq(machine, controller.of(machine))
    with irq.table.locked():
        irq.table._store("undo", 0, 7 | 1 << 32)
        os.kill(os.getpid(), signal.SIGKILL)


def test_a_killed_coprocessor_loses_the_lock(lab):
    dsp = lab.irq.add_coprocessor("dying", hold_and_die)
    assert dsp.join(LIMIT_S)
    is_free(lab)
    whole(lab)


GUEST = """
import os, signal, sys
from shmipi import Cluster
lab = Cluster.attach(sys.argv[1])
with lab.irq.table.locked():
    print(os.getpid(), flush=True)
    os.kill(os.getpid(), getattr(signal, sys.argv[2]))
"""


def test_a_killed_attached_host_loses_the_lock(lab, script):
    script(GUEST, lab.name, "SIGKILL", status=-9)
    is_free(lab)


def test_a_killed_cpu_loses_the_lock_and_who_tidies_up_may_die_of_it(lab):
    """One CPU dies with a block half made; the next dies while it frees that."""
    virq = lab.irq.irq_reserve_ipi("apic-ipi", "0-2")
    hwirq = lab.irq.ipi_get_hwirq(virq, 0)

    def half(virq):
        from shmipi import irq

        table = irq.irq().table
        with table.locked():
            table._store("undo", 0, virq | 1 << 32)
            os.kill(os.getpid(), signal.SIGKILL)

    def take():
        from shmipi import irq

        with irq.irq().table.locked():
            pass

    with pytest.raises(shmipi.CpuDiedError):
        lab.run(half, virq, cpus=[1])
    for skip in range(5):  # two of a line, action, used, undo: before each of them
        lab._machine.arm_step(2, "undo", _core.STEP_KILL, skip)
        with pytest.raises(shmipi.CpuDiedError):
            lab.run(take, cpus=[2])
        assert lab._machine.step_hit(2) == "undo"
        lab.online(2)
        if skip < 4:  # the next one finds something to do, too
            assert lab._machine.pic_read(0, "undo") == virq | 1 << 32
            lab.irq.table._line_virq[hwirq] = virq
    is_free(lab)
    assert whole(lab) == []
    lab.online(1)


def test_an_error_says_which_process_holds_it(lab, script):
    def hold():
        from shmipi import irq

        with irq.irq().table.locked():
            os.kill(os.getpid(), signal.SIGSTOP)

    machine, pid = lab._machine, lab.cpus[1].pid
    call = machine.post(1, hold, (), None, True)
    guest = None
    try:
        deadline = time.monotonic() + 5
        while not stopped(pid):
            assert time.monotonic() < deadline
            time.sleep(0.001)
        with (
            pytest.raises(IpiTimeoutError, match=rf"CPU 1 \(pid {pid}\)") as caught,
            machine.irq_lock(0.02),
        ):
            pass
        assert caught.value.cpu == 1
        with machine.irq_lock(0.02, False) as held:
            assert not held
    finally:
        os.kill(pid, signal.SIGCONT)
    machine.collect(call, 1, 5.0)
    guest = script(GUEST, lab.name, "SIGSTOP", wait=False)
    number = int(guest.stdout.readline())
    with (
        pytest.raises(IpiTimeoutError, match=rf"an attached host \(pid {number}\)"),
        machine.irq_lock(0.02),
    ):
        pass
    guest.kill()
    guest.wait()
    is_free(lab)

    def keep(mailbox):
        machine = mailbox._machine
        with BoundIrq(machine, controller.of(machine)).table.locked():
            os.kill(os.getpid(), signal.SIGSTOP)

    with lab.irq.add_coprocessor("keeper", keep) as dsp:
        deadline = time.monotonic() + 5
        while not stopped(dsp.pid):
            assert time.monotonic() < deadline
            time.sleep(0.001)
        with (
            pytest.raises(IpiTimeoutError, match=rf"keeper \(pid {dsp.pid}"),
            machine.irq_lock(0.02),
        ):
            pass
        # Here kill() gives its irq back under that lock: it waits for the dead.
    is_free(lab)


# ---- holders that are interrupted ----------------------------------------------------


class Interrupted:
    """Raises KeyboardInterrupt at one bytecode of those that take and hold the lock."""

    def __init__(self, at):
        self.left = at
        self.seen = 0

    def __enter__(self):
        sys.settrace(self.look)

    def __exit__(self, kind, *_):
        sys.settrace(None)
        return kind is KeyboardInterrupt

    def look(self, frame, event, arg):
        if event == "call" and frame.f_code.co_name not in (
            "irq_reserve_ipi",
            "irq_destroy_ipi",
            "locked",
        ):
            # Their callees one line after the other, each in full.
            home = os.path.dirname(shmipi.__file__)
            return self.line if frame.f_code.co_filename.startswith(home) else None
        frame.f_trace_opcodes = True
        if event == "opcode":
            self.count()
        return self.look

    def line(self, frame, event, arg):
        if event == "line" and frame.f_code.co_name in ("make", "destroy", "_store"):
            self.count()
        return self.line

    def count(self):
        self.seen += 1
        if self.seen == self.left:
            raise KeyboardInterrupt


def change(lab):
    lab.irq.irq_destroy_ipi(lab.irq.irq_reserve_ipi(None, "0-1", name="x"))


def test_interrupted_at_any_bytecode_of_a_holder(lab):
    """Also between taking it and the block, and between that and giving it back."""
    for at in range(1, 100000):
        tried = Interrupted(at)
        with tried:
            change(lab)
        if tried.seen < at:
            break
        gc.collect(0)
        with lab._machine.irq_lock(0.0):  # it is free at once
            pass
        for virq in whole(lab):  # destroyed well: it was whole
            assert virq
        assert lab._machine.pic_read(0, "undo") == 0
    assert at > 300


def test_ctrl_c_at_any_moment_of_a_holder(lab):
    """The same by real signals, whenever they come."""
    done, caught = threading.Event(), 0

    def disturb():
        while not done.is_set():
            time.sleep(0.0004)
            with contextlib.suppress(ProcessLookupError):
                os.kill(os.getpid(), signal.SIGUSR1)

    def interrupt(number, frame):
        if armed[0]:
            armed[0] = False
            raise KeyboardInterrupt

    armed = [False]
    old = signal.signal(signal.SIGUSR1, interrupt)
    thread = threading.Thread(target=disturb)
    thread.start()
    try:
        start = time.monotonic()
        while (took := time.monotonic() - start) < 0.4 or (took < 30 and caught <= 20):
            try:
                armed[0] = True
                change(lab)
            except KeyboardInterrupt:
                caught += 1
            armed[0] = False
            with lab._machine.irq_lock(0.0):
                pass
    finally:
        armed[0] = False
        done.set()
        thread.join()
        signal.signal(signal.SIGUSR1, old)
    assert caught > 20
    whole(lab)


def test_what_fails_under_the_lock_is_undone_at_once(lab, monkeypatch):
    """The lines of a block half made are free when the lock is given back."""
    table, stores = lab.irq.table, []
    original = type(table)._store

    def fail(self, what, index, value):
        if what == "used":
            raise MemoryError
        stores.append(what)
        original(self, what, index, value)

    monkeypatch.setattr(type(table), "_store", fail)
    with pytest.raises(MemoryError):
        lab.irq.irq_reserve_ipi(None, "0-1")
    assert "line_virq" in stores
    assert not table._line_virq.any()
    assert lab._machine.pic_read(0, "undo") == 0


# ---- one policy ----------------------------------------------------------------------


def test_nobody_takes_it_twice_nor_in_a_handler_but_who_says_so(lab):
    def inside(machine):
        with machine.irq_lock(0.0), machine.irq_lock(1.0, True, True):
            pass

    def task():
        from shmipi import irq

        machine = irq.irq().table.machine
        try:
            inside(machine)
        except IpiDeadlockError as error:
            return error.cpu, smp.irqs_disabled()

    assert lab.run(task, cpus=[1]) == [(1, False)]

    def handler(anywhere):
        from shmipi import irq

        with irq.irq().table.machine.irq_lock(0.0, True, anywhere) as held:
            return held

    assert lab.call(1, handler, True) is True
    with pytest.raises(shmipi.RemoteCallError) as caught:
        lab.call(1, handler, False)
    assert isinstance(caught.value.__cause__, ClusterStateError)
    is_free(lab)


def test_a_message_is_given_its_irq_with_interrupts_off(boot):
    """smp_request_message_ipi: its holder neither runs handlers nor goes offline."""
    cluster = boot(2, idle="halt", controller="xive")

    def request():
        from shmipi import irq

        seen = []
        original = powerpc_smp._irq_has_action

        def look(machine, virq):
            seen.append(smp.irqs_disabled())
            return original(machine, virq)

        powerpc_smp._irq_has_action = look
        try:
            irq.chip().smp_request_message_ipi(irq.irq_reserve_ipi(None, "0-1"), 0)
        finally:
            powerpc_smp._irq_has_action = original
        return seen, smp.irqs_disabled()

    assert cluster.run(request, cpus=[1]) == [([True], False)]
