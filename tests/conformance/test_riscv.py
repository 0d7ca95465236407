"""RISC-V: ipi-mux, bit by bit, and the software interrupt under it."""

import errno
import os
import signal
import time

import psutil
import pytest

import shmipi
from shmipi import Cluster, IrqError, _core, smp
from shmipi.irq.chips.riscv import SBI_ERR_INVALID_PARAM, SBI_SUCCESS, Riscv

EVENTS = list(_core.TRACE_EVENTS)
RESCHEDULE, CALL_FUNC, STOP, CRASH_STOP, IRQ_WORK, TIMER, BACKTRACE, KGDB = range(8)
SSI = 8  # the row
FREE = 20
VIRQ = 700


@pytest.fixture(scope="module")
def machine():
    with Cluster(3, controller="riscv", idle="halt", trace=True) as cluster:
        cluster.shared("go", "i8", 4)
        cluster.shared("seen", "i8", 8)
        quiet(cluster)
        yield cluster


@pytest.fixture
def chip(machine):
    return machine.chip


def quiet(cluster):
    """Wait until every CPU has taken what it was sent, and sleeps."""
    m, end = cluster._machine, time.monotonic() + 5
    while any(m.slot(n).state != _core.HALTED for n in cluster.online_mask):
        assert time.monotonic() < end, "they do not come to rest"
        time.sleep(0.0005)


class Trace:
    """What was sent to and taken by a CPU since the test began."""

    def __init__(self, cluster):
        self.cluster = cluster
        self.first = len(cluster.trace_events())

    def __call__(self, event, cpu):
        found = self.cluster.trace_events()[self.first :]
        mine = (found["event"] == EVENTS.index(event)) & (found["cpu"] == cpu)
        return found["arg"][mine].tolist()

    def taken(self, cpu):
        return self("line_ack", cpu)

    def raised(self, cpu):
        """The IPIs that raised the software interrupt (mux_send was called)."""
        return self("line_set", cpu)


@pytest.fixture
def trace(machine):
    quiet(machine)
    return Trace(machine)


# ---- ipi_mux_create ------------------------------------------------------------------


def test_create_once():
    chip = Riscv()
    assert chip.nr_ipi == 0
    first = chip.ipi_mux_create(12, chip.sbi_send_ipi)
    assert first > 0
    assert chip.nr_ipi == 12
    with pytest.raises(IrqError, match="12 IPIs") as caught:
        chip.ipi_mux_create(12, chip.sbi_send_ipi)
    assert caught.value.errno == errno.EEXIST
    with pytest.raises(IrqError) as caught:
        chip.ipi_mux_create(99, None)  # the kernel looks for one first
    assert caught.value.errno == errno.EEXIST
    other = Riscv()
    assert other.ipi_mux_create(32, other.clint_send_ipi) == first


@pytest.mark.parametrize("nr", [33, 64, 7, 0, -1])
def test_create_with_a_bad_number(nr):
    chip = Riscv()
    with pytest.raises(IrqError, match=f"8 to 32 IPIs, not {nr}") as caught:
        chip.ipi_mux_create(nr, chip.clint_send_ipi)
    assert (caught.value.errno, caught.value.domain) == (errno.EINVAL, "riscv")
    assert chip.nr_ipi == 0


@pytest.mark.parametrize("send", [None, 5, print])
def test_create_without_a_callback(send):
    with pytest.raises(IrqError, match="mux_send") as caught:
        Riscv().ipi_mux_create(8, send)
    assert caught.value.errno == errno.EINVAL


def test_every_machine_has_one(machine, chip):
    assert chip.nr_ipi == 32
    assert list(chip.ipi_lines(3)) == list(range(8, 32))
    with pytest.raises(IrqError, match="the mux is there already") as caught:
        chip.ipi_mux_create(8, chip.sbi_send_ipi)
    assert caught.value.errno == errno.EEXIST


def test_a_smaller_one(boot):
    chip = Riscv()
    chip.ipi_mux_create(10, chip.clint_send_ipi)
    cluster = boot(2, controller=chip, idle="halt")
    assert cluster.call(1, abs, -1) == 1
    assert list(cluster.chip.ipi_lines(2)) == [8, 9]
    assert cluster.chip.enable(0) == 0xFF
    cluster.chip.ipi_mux_send_mask(9, [1])
    with pytest.raises(IrqError, match="no IPI 10: the mux has 0 to 9") as caught:
        cluster.chip.ipi_mux_send_mask(10, [1])
    assert caught.value.errno == errno.EINVAL
    # Two machines of one description each have theirs.
    assert boot(1, controller=chip).chip.nr_ipi == 10
    assert chip.nr_ipi == 10


# ---- send, and who is rung -----------------------------------------------------------


@pytest.mark.parametrize("ipi", [STOP, CRASH_STOP, IRQ_WORK, TIMER, KGDB, RESCHEDULE])
def test_an_ipi_arrives_once_and_only_there(machine, chip, trace, ipi):
    rows = [[chip.read("rows", cpu, n) for n in range(9)] for cpu in range(3)]
    writes = machine.host_counters()["chip_writes"]
    chip.ipi_mux_send_mask(ipi, [0, 2])
    quiet(machine)
    assert (trace.taken(0), trace.taken(1), trace.taken(2)) == ([ipi], [], [ipi])
    for cpu in range(3):
        rows[cpu][ipi] += cpu != 1
        assert [chip.read("rows", cpu, n) for n in range(9)] == rows[cpu]
    assert machine.host_counters()["chip_writes"] == writes + 2


def test_to_itself_exactly_once(machine, trace):
    def task():
        shmipi.irq.chip().ipi_mux_send_mask(5, [smp.smp_processor_id()])

    machine.run(task)
    quiet(machine)
    assert [trace.taken(cpu).count(TIMER) for cpu in range(3)] == [1, 1, 1]


def test_layers_above_use_it(machine, chip, trace):
    assert machine.call(1, abs, -5) == 5
    quiet(machine)  # else it polls still, and needs no interrupt
    machine.smp.on_each_cpu(smp.NativeHandler("noop"))
    calls = [trace.taken(cpu) for cpu in range(3)]
    assert calls == [[CALL_FUNC], [CALL_FUNC, CALL_FUNC], [CALL_FUNC]]
    chip.smp_send_reschedule(0)
    chip.arch_send_call_function_single_ipi(2)
    chip.arch_send_call_function_ipi_mask([0])
    quiet(machine)
    assert trace.taken(0) == [CALL_FUNC, RESCHEDULE, CALL_FUNC]
    assert trace.taken(2) == [CALL_FUNC] * 2


def test_one_doorbell_for_each_bit_that_goes_up(machine, chip, trace, masked):
    """Per bit, not per word: two bits raise it twice, the same one twice once."""
    base = trace.raised(1)
    for ipi in (TIMER, STOP, TIMER, TIMER, STOP, KGDB):
        chip.ipi_mux_send_mask(ipi, [1])
    assert trace.raised(1)[len(base) :] == [TIMER, STOP, KGDB]
    assert trace("line_kept", 1) == [TIMER, TIMER, STOP]
    assert chip.bits(1) == 1 << TIMER | 1 << STOP | 1 << KGDB
    assert chip.msip(1) == 1
    masked()
    quiet(machine)
    assert trace.taken(1)[len(base) :] == [STOP, TIMER, KGDB]  # least first
    assert (chip.bits(1), chip.msip(1)) == (0, 0)


def test_what_comes_while_it_processes_is_taken_afterwards(
    machine, chip, request_irq, trace
):
    def handler(irq):
        flag = shmipi.shared("go")
        if flag[2] == 0:
            flag[2] = 1
            shmipi.irq.chip().ipi_mux_send_mask(2, [1])
            shmipi.irq.chip().ipi_mux_send_mask(20, [1])

    machine.shared("go", "i8", 4)[:] = 0
    request_irq(handler)

    def both():
        smp.local_irq_disable()
        here = shmipi.irq.chip()
        here.ipi_mux_send_mask(20, [1])
        here.ipi_mux_send_mask(31, [1])
        smp.local_irq_enable()

    chip.unmask_line(31, 1)
    machine.run(both, cpus=[1])
    quiet(machine)
    chip.mask_line(31, 1)
    order = [line for line in trace.taken(1) if line not in (CALL_FUNC, RESCHEDULE)]
    assert order == [FREE, 31, STOP, FREE]


# ---- masks ---------------------------------------------------------------------------


def test_masked_bits_stay_and_do_not_ring(machine, chip, trace):
    """Proves row 37."""
    assert machine.run(lambda: shmipi.irq.chip().ipi_mux_mask(5), cpus=[1]) == [None]
    quiet(machine)
    assert not chip.enable(1) & 1 << TIMER
    bells = machine.counters()["doorbells_received"][1]
    base = trace.raised(1)
    for _ in range(4):
        chip.ipi_mux_send_mask(TIMER, [1])
    time.sleep(0.02)
    assert (chip.bits(1), chip.msip(1)) == (1 << TIMER, 0)
    assert trace.raised(1) == base
    assert machine.counters()["doorbells_received"][1] == bells
    # Others pass.
    chip.ipi_mux_send_mask(STOP, [1])
    quiet(machine)
    assert (trace.taken(1)[-1], chip.bits(1)) == (STOP, 1 << TIMER)

    def unmask():
        here = shmipi.irq.chip()
        before = here.read("rows", 1, 5)
        here.ipi_mux_unmask(5)
        return here.read("rows", 1, 5) - before, here.bits(1)

    assert machine.run(unmask, cpus=[1]) == [(1, 0)], "at once, and once"
    quiet(machine)
    assert trace.taken(1).count(TIMER) == 1


def test_unmask_with_interrupts_disabled_waits_for_them(machine, chip):
    def task():
        here = shmipi.irq.chip()
        rows = [here.read("rows", 1, 5)]
        here.ipi_mux_mask(5)
        here.ipi_mux_send_mask(5, [1])
        smp.local_irq_disable()
        here.ipi_mux_unmask(5)
        rows.append(here.read("rows", 1, 5))
        pending = here.msip(1)
        smp.local_irq_enable()
        rows.append(here.read("rows", 1, 5))
        return rows[1] - rows[0], pending, rows[2] - rows[0]

    assert machine.run(task, cpus=[1]) == [(0, 1, 1)]


def test_unmask_against_send(machine, chip, request_irq):
    """Dekker: neither leaves a bit behind with nobody to ring. 1,000 rounds.

    Proves row 37.
    """
    seen, go = machine.shared("seen", "i8", 8), machine.shared("go", "i8", 4)
    seen[:] = 0
    go[:] = 0
    request_irq(smp.NativeHandler("count"), seen, cpus=[1])

    def task():
        here = shmipi.irq.chip()
        for turn in range(1000):
            end = time.monotonic() + 5
            shmipi.atomic.fetch_add(go, 2, 1)  # both start from here
            while go[2] < 2 * (turn + 1) and time.monotonic() < end:
                pass
            if here.cpu() == 0:
                here.ipi_mux_send_mask(FREE, [1])
                while seen[0] <= turn and time.monotonic() < end:
                    pass
                go[3] = turn + 1 if seen[0] == turn + 1 else -1
            else:
                here.ipi_mux_mask(FREE)
                here.ipi_mux_unmask(FREE)
                while 0 <= go[3] <= turn and time.monotonic() < end:
                    pass
            if go[3] < 0:
                return turn
        return 1000

    assert machine.run(task, cpus=[0, 1]) == [1000, 1000]
    assert seen[0] == 1000


def test_a_masked_reschedule_does_not_hold_up_the_machine(boot, eventually):
    """Neither going offline nor the end of the machine hangs on an interrupt."""
    cluster = boot(3, controller="riscv", idle="halt")
    for cpu in (1, 2):
        cluster.chip.mask_line(RESCHEDULE, cpu)
        cluster.chip.mask_line(CALL_FUNC, cpu)
    quiet(cluster)
    cluster.offline(1)
    cluster.online(1)
    assert cluster.call(1, abs, -1) == 1  # as after power-on
    start = time.monotonic()
    cluster.shutdown()
    assert time.monotonic() - start < 2


def test_a_put_off_handler_runs_once_for_each_taken(
    machine, chip, request_irq, stuck, eventually
):
    seen = machine.shared("seen", "i8", 8)
    seen[:] = 0

    def handler(irq):
        shmipi.shared("seen")[0] += 1

    request_irq(handler, cpus=[1])
    free = stuck(machine, 1)

    def put_off():
        before = seen[0]
        chip.ipi_mux_send_mask(FREE, [1])
        eventually(lambda: seen[0] > before or chip.in_service(1) == [FREE])
        return seen[0] == before

    assert put_off() or put_off()
    done = seen[0]
    for _ in range(5):
        chip.ipi_mux_send_mask(FREE, [1])
    chip.ipi_mux_send_mask(TIMER, [1])  # others are not held up by it
    eventually(lambda: chip.bits(1) == 1 << FREE)
    assert seen[0] == done
    free()
    quiet(machine)
    assert (seen[0], chip.bits(1), chip.in_service(1)) == (done + 2, 0, [])


def test_a_backtrace_is_masked(machine, chip, masked):
    """IPI_CPU_BACKTRACE stands in for an NMI: there is none on riscv."""
    nmis = machine.counters()["nmi"][1]
    chip.send_nmi([1])
    time.sleep(0.03)
    assert chip.bits(1) == 1 << BACKTRACE
    assert machine.counters()["nmi"][1] == nmis
    masked()
    quiet(machine)
    assert machine.counters()["nmi"][1] == nmis + 1


# ---- the SBI and the CLINT -----------------------------------------------------------


def test_sbi_one_two_and_all(machine, chip, trace):
    def arrived(call):
        before = [chip.read("rows", cpu, SSI) for cpu in range(3)]
        assert call() == SBI_SUCCESS
        quiet(machine)
        return [chip.read("rows", cpu, SSI) - n for cpu, n in enumerate(before)]

    assert arrived(lambda: chip.sbi_send_ipi(0b010)) == [0, 1, 0]
    assert arrived(lambda: chip.sbi_send_ipi(1, 2)) == [0, 0, 1]
    assert arrived(lambda: chip.sbi_send_ipi(0b101)) == [1, 0, 1]
    assert arrived(lambda: chip.sbi_send_ipi(0b11, 1)) == [0, 1, 1]
    assert arrived(lambda: chip.sbi_send_ipi(0, -1)) == [1, 1, 1]
    assert arrived(lambda: chip.sbi_send_ipi(1 << 63, (1 << 64) - 1)) == [1, 1, 1]
    # No targets: success, and nothing is sent, whatever the base.
    assert arrived(lambda: chip.sbi_send_ipi(0)) == [0, 0, 0]
    assert arrived(lambda: chip.sbi_send_ipi(0, 77)) == [0, 0, 0]


def test_sbi_from_a_hart_to_itself_and_others(machine, chip):
    before = [chip.read("rows", cpu, SSI) for cpu in range(3)]
    assert machine.run(lambda: shmipi.irq.chip().sbi_send_ipi(0, -1)) == [0, 0, 0]
    quiet(machine)
    got = [chip.read("rows", cpu, SSI) - n for cpu, n in enumerate(before)]
    # Three senders; what is pending already stays one.
    assert all(1 <= n <= 3 for n in got)


@pytest.mark.parametrize(
    ("mask", "base"), [(0b1000, 0), (0b1001, 0), (1, 3), (0b100, 1), (1 << 63, 0)]
)
def test_sbi_invalid_harts(machine, chip, trace, mask, base):
    assert chip.sbi_send_ipi(mask, base) == SBI_ERR_INVALID_PARAM == -3
    quiet(machine)
    assert [trace.taken(cpu) for cpu in range(3)] == [[], [], []], "none was sent"


@pytest.mark.parametrize("mask", [1 << 64, -1])
def test_sbi_a_mask_is_a_register(chip, mask):
    with pytest.raises(ValueError, match="64 bits"):
        chip.sbi_send_ipi(mask)


def test_msip(machine, chip, masked):
    row = chip.read("rows", 1, SSI)
    assert chip.msip(1) == 0
    chip.clint_send_ipi(1)
    chip.clint_send_ipi(1)  # one bit
    assert chip.msip(1) == 1
    assert chip.bits(1) == 0, "no IPI is behind it"
    masked()
    quiet(machine)
    assert (chip.msip(1), chip.read("rows", 1, SSI)) == (0, row + 1)


# ---- senders that die, CPUs that go --------------------------------------------------


@pytest.mark.alone  # it measures
@pytest.mark.parametrize("again", [False, True])
@pytest.mark.parametrize("step", ["raise", "ring"])
def test_a_sender_that_dies_before_it_rings(boot, eventually, step, again):
    """Also when another has sent the same bit since: that one does not ring."""
    cluster = boot(3, controller="riscv", idle="halt", steps=True)
    chip = cluster.chip
    quiet(cluster)
    action = _core.STEP_STOP if again else _core.STEP_KILL
    cluster._machine.arm_step(0, step, action)
    firmware = psutil.Process(cluster.cpus[0].pid).ppid()
    if again:  # it would ring for what is left lying if this took long
        os.kill(firmware, signal.SIGSTOP)
    try:
        future = cluster.submit(0, lambda: shmipi.irq.chip().ipi_mux_send_mask(5, [1]))
        if again:
            eventually(lambda: cluster._machine.step_hit(0) == step)
            chip.ipi_mux_send_mask(TIMER, [1])
            assert chip.bits(1) == 1 << TIMER
            os.kill(cluster.cpus[0].pid, signal.SIGKILL)
    finally:
        os.kill(firmware, signal.SIGCONT)
    with pytest.raises(shmipi.CpuDiedError):
        future.result(5)
    eventually(lambda: chip.read("rows", 1, TIMER) == 1, 1.0)
    assert (chip.bits(1), chip.msip(1)) == (0, 0)


def test_a_sender_that_dies_before_it_rings_holds_up_no_hotplug(boot, eventually):
    """Its bit is set, so that who asks the CPU to go has nothing to ring for."""
    cluster = boot(3, controller="riscv", idle="halt", steps=True)
    quiet(cluster)
    cluster._machine.arm_step(0, "raise", _core.STEP_KILL)
    cluster.submit(0, lambda: shmipi.smp.smp_send_reschedule(1))
    eventually(lambda: cluster._machine.step_hit(0) == "raise")
    cluster.offline(1, timeout=5)
    cluster.online(1)


def test_offline_loses_and_starts_anew(boot):
    cluster = boot(2, controller="riscv", idle="halt")
    chip = cluster.chip
    chip.mask_line(TIMER, 1)
    chip.ipi_mux_send_mask(TIMER, [1])
    cluster.offline(1)
    chip.ipi_mux_send_mask(TIMER, [1])
    chip.ipi_mux_send_mask(STOP, [1])
    assert chip.sbi_send_ipi(2) == SBI_SUCCESS
    rows = [chip.read("rows", 1, n) for n in (STOP, TIMER, SSI)]
    cluster.online(1)
    assert cluster.call(1, abs, -1) == 1
    assert (chip.bits(1), chip.msip(1)) == (0, 0)
    assert chip.enable(1) == 0xFF, "as after power-on"
    assert [chip.read("rows", 1, n) for n in (STOP, TIMER, SSI)] == rows
    # A bit left set would keep every later sender from ringing.
    chip.ipi_mux_send_mask(TIMER, [1])
    quiet(cluster)
    assert chip.read("rows", 1, TIMER) == rows[1] + 1


# ---- bad input -----------------------------------------------------------------------


@pytest.mark.parametrize("ipi", [-1, 32, 33, 1 << 40])
def test_bad_ipis(machine, chip, ipi):
    with pytest.raises(IrqError, match=r"riscv: no IPI .*0 to 31") as caught:
        chip.ipi_mux_send_mask(ipi, [1])
    assert (caught.value.errno, caught.value.domain) == (errno.EINVAL, "riscv")

    def mask():
        try:
            shmipi.irq.chip().ipi_mux_mask(ipi)
        except IrqError as error:
            return error.errno

    assert machine.run(mask, cpus=[1]) == [errno.EINVAL]


def test_bad_cpus(machine, chip, trace):
    for use in (
        lambda: chip.ipi_mux_send_mask(TIMER, [0, 3]),
        lambda: chip.clint_send_ipi(3),
        lambda: chip.msip(3),
        lambda: chip.bits(3),
        lambda: chip.enable(3),
        lambda: chip.smp_send_reschedule(3),
    ):
        with pytest.raises(IrqError, match="no CPU 3") as caught:
            use()
        assert (caught.value.errno, caught.value.cpu) == (errno.EINVAL, 3)
    chip.ipi_mux_send_mask(TIMER, [])
    quiet(machine)
    assert [trace.taken(cpu) for cpu in range(3)] == [[], [], []]


def test_the_host_masks_nothing_of_its_own(chip):
    for use in (chip.ipi_mux_mask, chip.ipi_mux_unmask):
        with pytest.raises(shmipi.ClusterStateError, match="the host is no CPU"):
            use(TIMER)
