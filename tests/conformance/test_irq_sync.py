"""Handlers in progress, on every controller: synchronize_irq() and who frees an irq
wait for them, and what was taken for one irq is never handled by the next."""

import contextlib
import ctypes
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
    IpiTimeoutError,
    _core,
    irq,
    smp,
)
from shmipi.errors import IrqError
from shmipi.irq.chips import CHIPS
from shmipi.machine.process import is_stopped


def libc_path():
    maps = Path("/proc/self/maps").read_text().split()
    return next(part for part in maps if Path(part).name.startswith("libc.so"))


COUNT = smp.NativeHandler("count")
#: A native handler that lasts until the host lets it go: its info is a lock.
LOCK = f"{libc_path()}:pthread_spin_lock"
LIBC = ctypes.CDLL(None)
ONE = "1"


class Rig:
    def __init__(self, cluster):
        self.cluster, self.irq, self.machine = cluster, cluster.irq, cluster._machine
        self.spin = smp.NativeHandler(LOCK)
        self.locks = cluster.percpu("locks", "i8")
        self.rows = cluster.percpu("rows", "i8")
        self.go = cluster.shared("go", "i8", 4)

    def begin(self):
        for cpu in self.cluster.cpus:
            if cpu.state in ("dead", "offline"):
                self.cluster.online(cpu.id)
        self.rows[:] = 0
        self.go[:] = 0
        for cpu in range(3):
            LIBC.pthread_spin_init(self.lock(cpu), 1)
            LIBC.pthread_spin_lock(self.lock(cpu))

    def end(self):
        self.go[:] = 1
        for cpu in range(3):
            LIBC.pthread_spin_unlock(self.lock(cpu))
        for cpu in self.cluster.cpus:
            with contextlib.suppress(ProcessLookupError):
                os.kill(cpu.pid, signal.SIGCONT)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for virq in self.irq.table.virqs():
                self.irq.irq_destroy_ipi(virq)

    def lock(self, cpu):
        return ctypes.c_void_p(self.locks.ctypes.data + self.locks.strides[0] * cpu)

    def let_go(self, cpu=1):
        LIBC.pthread_spin_unlock(self.lock(cpu))

    def irq_of(self, handler, dev_id, dest=ONE):
        virq = self.irq.irq_reserve_ipi(None, dest)
        self.irq.request_percpu_irq(virq, handler, "sync", dev_id)
        self.irq.enable_percpu_irq_mask(virq)
        return virq

    def in_progress(self, virq, cpu=1):
        return self.irq.ipi_get_hwirq(virq, cpu) in self.irq.table.in_progress()

    def slices(self, cpu=1):
        pid = self.cluster.cpus[cpu].pid
        return Path(f"/proc/{pid}/schedstat").read_text().split()[2]

    def soon(self, condition):
        """Wait for it: 5 s, which begin when CPU 1 is let run.

        It may not go elsewhere, and what others did on its core has kept it from that
        for 20 s: a handler that spins has no claim to be next.
        """
        slices, end = self.slices(), time.monotonic() + 60
        while not condition():
            now = time.monotonic()
            assert now < end, "it did not happen"
            if slices != self.slices():
                slices, end = self.slices(), min(end, now + 5)
            time.sleep(0.001)

    def stop_at_line(self, virq, wait, action=_core.STEP_STOP):
        """CPU 1 has taken its line, and done nothing for it."""
        wait(lambda: self.cluster.cpus[1].state == "halted")
        self.machine.arm_step(1, "line", action)
        self.irq.ipi_send_single(virq, 1)
        wait(lambda: self.machine.step_hit(1) == "line")
        if action == _core.STEP_STOP:
            self.until_stopped(wait)

    def until_stopped(self, wait):
        """It says just before that it is at the step: SIGCONT would be too early."""
        pid = self.cluster.cpus[1].pid
        wait(lambda: is_stopped(pid))


@pytest.fixture(params=CHIPS)
def rig(request, cluster_until_failure):
    options = {"controller": request.param, "steps": True, "handlers": [LOCK]}
    with cluster_until_failure(3, idle="halt", **options) as cluster:
        rig = Rig(cluster)
        rig.begin()
        try:
            yield rig
        finally:
            rig.end()


FEW = pytest.mark.parametrize("rig", ["apic", "mips-gic"], indirect=True)
ONE_CONTROLLER = pytest.mark.parametrize("rig", ["apic"], indirect=True)


def until_go(irq, dev_id):
    """A Python handler that lasts until the host lets it go."""
    go = shmipi.shared("go")
    go[1] = 1
    end = time.monotonic() + 20
    while not go[0] and time.monotonic() < end:
        time.sleep(0.001)
    go[2] += 1


def assert_waits_for(rig, thread, let_go):
    time.sleep(0.05)
    assert thread.is_alive()
    let_go()
    rig.soon(lambda: not thread.is_alive())
    return thread.end(5)


# ---- waiting -------------------------------------------------------------------------


def test_a_native_handler_is_waited_for(rig, background):
    virq = rig.irq_of(rig.spin, rig.locks)
    rig.irq.synchronize_irq(virq)  # none is in progress
    rig.irq.ipi_send_single(virq, 1)
    rig.soon(lambda: rig.in_progress(virq))
    with pytest.raises(IpiTimeoutError) as caught:
        rig.irq.synchronize_irq(virq, timeout=0.01)
    assert caught.value.cpu == 1
    assert f"irq {virq}" in str(caught.value)
    thread = background(lambda: rig.irq.synchronize_irq(virq, timeout=60))
    assert_waits_for(rig, thread, rig.let_go)
    assert not rig.in_progress(virq)


def test_a_python_handler_is_waited_for_by_a_cpu(rig, background, eventually):
    virq = rig.irq_of(until_go, 7)

    def task(virq):
        irq.synchronize_irq(virq)
        return int(shmipi.shared("go")[2])

    rig.irq.ipi_send_single(virq, 1)
    eventually(lambda: rig.go[1])
    thread = background(lambda: rig.cluster.run(task, virq, cpus=[0]))
    assert assert_waits_for(rig, thread, lambda: rig.go.__setitem__(0, 1)) == [1]


@FEW
@pytest.mark.parametrize("how", ["free", "destroy"])
def test_who_frees_it_waits(rig, how, background):
    virq = rig.irq_of(rig.spin, rig.locks)
    rig.irq.ipi_send_single(virq, 1)
    rig.soon(lambda: rig.in_progress(virq))
    rig.irq.disable_percpu_irq_mask(virq)
    if how == "free":
        thread = background(
            lambda: rig.irq.free_percpu_irq(virq, rig.locks, timeout=60)
        )
        assert_waits_for(rig, thread, rig.let_go)
        assert not rig.irq.table.action(virq)
    else:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it is requested still
            thread = background(lambda: rig.irq.irq_destroy_ipi(virq, timeout=60))
            assert_waits_for(rig, thread, rig.let_go)
        assert rig.irq.irq_to_desc(virq) is None


@FEW
def test_death_ends_the_wait_and_a_timeout_that_for_a_stopped_cpu(
    rig, background, eventually
):
    virq = rig.irq_of(COUNT, rig.rows)
    rig.stop_at_line(virq, eventually)
    with pytest.raises(IpiTimeoutError):
        rig.irq.synchronize_irq(virq, timeout=0.02)
    thread = background(rig.irq.synchronize_irq, virq)
    time.sleep(0.02)
    assert thread.is_alive()
    os.kill(rig.cluster.cpus[1].pid, signal.SIGKILL)
    thread.end(5)
    eventually(lambda: rig.cluster.cpus[1].state == "dead")
    rig.cluster.online(1)
    assert not rig.in_progress(virq)
    rig.irq.ipi_send_single(virq, 1)
    eventually(lambda: rig.rows[1] == 1)


@FEW
def test_a_line_that_comes_all_the_time_is_not_waited_for_ever(rig, background):
    virq = rig.irq_of(COUNT, rig.rows)

    def storm(virq):
        go = shmipi.shared("go")
        while not go[0]:
            irq.ipi_send_single(virq, 1)

    thread = background(lambda: rig.cluster.run(storm, virq, cpus=[0]))
    for _ in range(50):
        rig.irq.synchronize_irq(virq, timeout=5)
    rig.go[0] = 1
    thread.end(5)


@ONE_CONTROLLER
def test_a_handler_that_has_written_eoi_is_waited_for(rig, background, eventually):
    """EOI lets another of its kind come; the handler goes on, and with what it uses."""

    def ended_early(virq, dev_id):
        irq.chip().write_eoi()
        go = shmipi.shared("go")
        go[1] = 1
        end = time.monotonic() + 20
        while not go[0] and time.monotonic() < end:
            time.sleep(0.001)

    virq = rig.irq_of(ended_early, 7)
    rig.irq.ipi_send_single(virq, 1)
    eventually(lambda: rig.go[1])
    assert rig.in_progress(virq)
    thread = background(rig.irq.synchronize_irq, virq)
    assert_waits_for(rig, thread, lambda: rig.go.__setitem__(0, 1))
    assert not rig.in_progress(virq)


# ---- where it would hang -------------------------------------------------------------


def refusals(virq, other):
    """What each way of waiting raises here."""
    found = []
    for call, which in (
        (irq.synchronize_irq, virq),
        (irq.synchronize_hardirq, virq),
        (irq.synchronize_irq, other),
        (irq.synchronize_hardirq, other),
        (irq.free_percpu_irq, virq),
        (irq.irq_destroy_ipi, virq),
    ):
        try:
            found.append(call(which))
        except shmipi.errors.ShmipiError as error:
            found.append(type(error).__name__)
    return found


@ONE_CONTROLLER
def test_in_its_own_handler_it_is_a_deadlock(rig, eventually):
    other = rig.irq_of(COUNT, rig.rows, "0")
    said = rig.cluster.shared("said", "u1", 1000)

    def handler(virq, other):
        text = ",".join(map(str, refusals(virq, other))).encode()
        out = shmipi.shared("said")
        out[1 : 1 + len(text)] = list(text)
        out[0] = len(text)

    virq = rig.irq_of(handler, other)
    rig.irq.ipi_send_single(virq, 1)
    eventually(lambda: said[0])
    assert bytes(said[1 : 1 + said[0]]).decode() == (
        "IpiDeadlockError,IpiDeadlockError,ClusterStateError,True,"
        "ClusterStateError,ClusterStateError"
    )

    def masked(virq):
        smp.local_irq_disable()
        try:
            irq.synchronize_irq(virq)
        finally:
            smp.local_irq_enable()

    with pytest.raises(shmipi.RemoteCallError) as caught:
        rig.cluster.run(masked, virq, cpus=[0])
    assert isinstance(caught.value.__cause__, ClusterStateError)
    rig.irq.synchronize_irq(999)  # no such irq: nothing
    assert issubclass(IpiDeadlockError, OSError)


# ---- a line given to another irq -----------------------------------------------------


def test_what_was_taken_for_one_irq_is_not_handled_by_the_next(rig, eventually):
    """Acknowledged, and not looked up whose it is, when the line changes hands."""
    old = rig.irq_of(rig.spin, rig.locks)
    line = rig.irq.ipi_get_hwirq(old, 1)
    rig.stop_at_line(old, eventually)
    rig.irq.disable_percpu_irq_mask(old)
    with pytest.raises(IpiTimeoutError):
        rig.irq.free_percpu_irq(old, rig.locks, timeout=0.02)
    with pytest.raises(IpiTimeoutError):
        rig.irq.irq_destroy_ipi(old, timeout=0.02)
    with pytest.raises(IrqError) as caught:
        rig.irq.irq_reserve_ipi(None, ONE, hwirq=line)
    assert caught.value.errno == errno.EBUSY
    new = rig.irq_of(COUNT, rig.rows)
    assert rig.irq.ipi_get_hwirq(new, 1) != line
    before = rig.machine.slot(1).pid
    os.kill(before, signal.SIGCONT)
    eventually(lambda: not rig.irq.table.in_progress())
    assert rig.cluster.call(1, os.getpid, timeout=5) == before
    assert rig.rows.tolist() == [0, 0, 0]
    again = rig.irq.irq_reserve_ipi(None, ONE, hwirq=line)
    assert rig.irq.ipi_get_hwirq(again, 1) == line


def test_of_two_taken_at_once_the_second_is_not_handled_by_the_next(
    rig, background, eventually
):
    """They come together; while the first is handled both lines change hands."""
    olds = [rig.irq_of(rig.spin, rig.locks) for _ in range(2)]

    def task():
        go = shmipi.shared("go")
        smp.local_irq_disable()
        go[1] = 1
        end = time.monotonic() + 10
        while not go[0] and time.monotonic() < end:
            pass
        smp.local_irq_enable()

    thread = background(lambda: rig.cluster.run(task, cpus=[1]))
    eventually(lambda: rig.go[1])
    for old in olds:
        rig.irq.ipi_send_single(old, 1)
    rig.go[0] = 1
    eventually(lambda: rig.irq.table.in_progress())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for old in olds:
            with contextlib.suppress(IpiTimeoutError):
                rig.irq.irq_destroy_ipi(old, timeout=0)
    for _ in olds:
        rig.irq_of(COUNT, rig.rows)
    rig.let_go()
    thread.end(5)
    assert rig.cluster.call(1, int, timeout=5) == 0
    assert rig.rows.tolist() == [0, 0, 0]
    assert not rig.irq.table.in_progress()


# ---- spurious ------------------------------------------------------------------------


def requested_while_held_back(rig, eventually):
    """An irq that came to CPU 1 before its request: it is stopped, not masked yet."""
    virq = rig.irq.irq_reserve_ipi(None, ONE)
    rig.irq.enable_percpu_irq_mask(virq)
    eventually(lambda: rig.cluster.cpus[1].state == "halted")
    rig.machine.arm_step(1, "spurious", _core.STEP_STOP)
    rig.irq.ipi_send_single(virq, 1)
    eventually(lambda: rig.machine.step_hit(1) == "spurious")
    rig.until_stopped(eventually)
    rig.irq.request_percpu_irq(virq, COUNT, "late", rig.rows)
    return virq


def test_an_irq_enabled_while_it_is_held_back_as_spurious_is_enabled(rig, eventually):
    """It came before anybody had requested it, and another process does so just now."""
    virq = requested_while_held_back(rig, eventually)
    rig.irq.enable_percpu_irq_mask(virq)
    os.kill(rig.cluster.cpus[1].pid, signal.SIGCONT)
    eventually(lambda: not rig.irq.table.in_progress())
    assert rig.irq.irq_percpu_is_enabled(virq, 1)
    rig.irq.ipi_send_single(virq, 1)
    eventually(lambda: rig.rows[1] == 1)


def test_an_irq_disabled_while_it_is_held_back_as_spurious_is_disabled(rig, eventually):
    """As above, but it is not to be let through: only what was enabled before is."""
    virq = requested_while_held_back(rig, eventually)
    rig.irq.disable_percpu_irq_mask(virq)
    os.kill(rig.cluster.cpus[1].pid, signal.SIGCONT)
    eventually(lambda: not rig.irq.table.in_progress())
    assert not rig.irq.irq_percpu_is_enabled(virq, 1)
    rig.irq.free_percpu_irq(virq, rig.rows)  # without a warning
    assert not rig.irq.table.action(virq)
