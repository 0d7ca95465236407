"""The MIPS mailbox: actions, registers, what stays pending, in which order they go."""

import errno
import time
import warnings

import pytest

import shmipi
from shmipi import Cluster, IrqError, ShmipiWarning, _core, smp
from shmipi.irq.chips import mips
from shmipi.irq.chips.mips import (
    SMP_CALL_FUNCTION,
    SMP_DUMP,
    SMP_ICACHE_FLUSH,
    SMP_IPI_TIMER,
    SMP_RESCHEDULE_YOURSELF,
    Mips,
)

ROWS = ("RES", "CAL", "ICF", "DMP", "NMI", "ERR")
LINE_ACK = _core.TRACE_EVENTS.index("line_ack")
FREE = 9  # an action bit that IPI domains may have
VIRQ = 700


@pytest.fixture(scope="module")
def machine():
    with Cluster(3, controller="mips", idle="halt", trace=True) as cluster:
        cluster.shared("go", "i8", 4)
        cluster.shared("seen", "i8", 64)
        quiet(cluster)
        yield cluster


def rows(cluster, cpu):
    """What a CPU took, by row of /proc/interrupts."""
    return {name: cluster.chip.read("rows", cpu, n) for n, name in enumerate(ROWS)}


def quiet(cluster):
    """Wait until every CPU has taken what it was sent, and sleeps."""
    end = time.monotonic() + 5
    while any(
        cluster._machine.slot(n).state != _core.HALTED for n in cluster.online_mask
    ):
        assert time.monotonic() < end, "they do not come to rest"
        time.sleep(0.0005)


class Taken:
    """What each CPU took since: rows that changed, and the lines in their order."""

    def __init__(self, cluster):
        self.cluster = cluster
        self.before = [rows(cluster, cpu) for cpu in range(3)]
        self.first = len(cluster.trace_events())

    def __call__(self, cpu):
        now = rows(self.cluster, cpu)
        return {k: now[k] - v for k, v in self.before[cpu].items() if now[k] != v}

    def order(self, cpu):
        events = self.cluster.trace_events()[self.first :]
        taken = events[(events["event"] == LINE_ACK) & (events["cpu"] == cpu)]
        return taken["arg"].tolist()


@pytest.fixture
def taken(machine):
    return Taken(machine)


# ---- mp_ops --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("action", "expected"),
    [
        (SMP_RESCHEDULE_YOURSELF, {"RES": 1}),
        (SMP_CALL_FUNCTION, {"CAL": 1}),
        (SMP_ICACHE_FLUSH, {"ICF": 1}),
        (SMP_DUMP, {"DMP": 1}),
        (SMP_CALL_FUNCTION | SMP_DUMP, {"CAL": 1, "DMP": 1}),
        (0xF, {"RES": 1, "CAL": 1, "ICF": 1, "DMP": 1}),
    ],
)
def test_an_action_arrives_once_and_only_there(
    machine, taken, eventually, action, expected
):
    before = machine.host_counters()["chip_writes"]
    machine.chip.mp_ops.send_ipi_single(1, action)
    eventually(lambda: taken(1) == expected)
    quiet(machine)
    assert taken(1) == expected
    assert taken(0) == taken(2) == {}
    assert machine.host_counters()["chip_writes"] == before + 1


def test_to_itself_exactly_once(machine, taken, eventually):
    def task():
        me = smp.smp_processor_id()
        shmipi.irq.chip().mp_ops.send_ipi_single(me, 0x1)

    machine.run(task)
    quiet(machine)
    assert [taken(cpu)["RES"] for cpu in range(3)] == [1, 1, 1]


def test_a_mask_is_a_store_for_each_cpu(machine, taken, eventually):
    before = machine.host_counters()["chip_writes"]
    machine.chip.mp_ops.send_ipi_mask("0,2", SMP_ICACHE_FLUSH)
    eventually(lambda: taken(0) == taken(2) == {"ICF": 1})
    assert taken(1) == {}
    assert machine.host_counters()["chip_writes"] == before + 2
    machine.chip.mp_ops.send_ipi_mask([], SMP_ICACHE_FLUSH)
    assert machine.host_counters()["chip_writes"] == before + 2


def test_the_arch_functions_are_made_of_mp_ops(machine, taken, eventually):
    sent = []

    class Noted(Mips):
        @property
        def mp_ops(self):
            return mips.PlatSmpOps(
                lambda cpu, action: sent.append((cpu, action)),
                lambda mask, action: sent.append((list(mask), action)),
            )

    noted = Noted().bind(machine._machine)
    for chip in (noted, machine.chip):
        chip.smp_send_reschedule(1)
        chip.arch_send_call_function_single_ipi(1)
        chip.arch_send_call_function_ipi_mask([0, 2])
    assert sent == [(1, 0x1), ([1], 0x2), ([0, 2], 0x2)]
    eventually(lambda: taken(1) == {"RES": 1, "CAL": 1})
    eventually(lambda: taken(0) == taken(2) == {"CAL": 1})


def test_a_call_function_ipi_runs_the_queue(machine, taken):
    """And the layers above count what they send by the same lines."""
    quiet(machine)  # what the test before sent was taken, but perhaps just now
    assert machine.call(1, abs, -5) == 5
    quiet(machine)  # else it polls still, and needs no interrupt
    machine.smp.on_each_cpu(smp.NativeHandler("noop"))
    assert [taken(cpu)["CAL"] for cpu in range(3)] == [1, 2, 1]


def test_the_timer_shares_its_bits(machine, taken, eventually, monkeypatch):
    monkeypatch.setattr(Mips, "_timer_warned", False)
    with pytest.warns(ShmipiWarning, match="SMP_ICACHE_FLUSH 0x4 and SMP_DUMP 0x8"):
        machine.chip.mp_ops.send_ipi_single(1, SMP_IPI_TIMER)
    eventually(lambda: taken(1) == {"ICF": 1, "DMP": 1})
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # once
        machine.chip.mp_ops.send_ipi_mask([2], SMP_IPI_TIMER)
    eventually(lambda: taken(2) == {"ICF": 1, "DMP": 1})
    assert taken.order(1) == taken.order(2) == [2, 3]


# ---- the order, and what collapses ---------------------------------------------------


def test_least_bit_first(machine, masked, taken, eventually):
    for action in (0x8, 0x2, 0x4, 0x1, 0x2, 0x8):
        machine.chip.mp_ops.send_ipi_single(1, action)
    assert machine.chip.mailbox(1).STATUS == 0xF
    masked()
    eventually(lambda: taken(1) == {"RES": 1, "CAL": 1, "ICF": 1, "DMP": 1})
    assert taken.order(1)[:4] == [0, 1, 2, 3]


def test_what_comes_while_it_acts_is_taken_afterwards(
    machine, request_irq, taken, eventually
):
    """Read and clear all, dispatch all of it, and only then read again."""

    def handler(irq):
        if shmipi.shared("go")[2] == 0:
            shmipi.shared("go")[2] = 1
            shmipi.irq.chip().mailbox(1).SET = 0x1 | 1 << FREE

    machine.shared("go", "i8", 4)[:] = 0
    request_irq(handler)
    machine.chip.mailbox(1).SET = 1 << FREE | 1 << 30
    eventually(lambda: taken(1) == {"RES": 1, "ERR": 1})
    # 9 and 30 were read together: the least bit, sent by 9's handler, waits for 30.
    eventually(lambda: taken.order(1) == [FREE, 30, 0, FREE])


def test_the_same_action_sent_before_it_is_taken_is_one(machine, masked, taken):
    for _ in range(10):
        machine.chip.smp_send_reschedule(1)
    assert machine.chip.pending_lines(1) == [0]
    masked()
    quiet(machine)
    assert taken(1)["RES"] == 1


# ---- masks ---------------------------------------------------------------------------


def test_sent_after_interrupts_were_disabled(machine, masked, taken, eventually):
    machine.chip.mp_ops.send_ipi_single(1, SMP_DUMP)
    time.sleep(0.05)
    assert taken(1) == {}
    assert machine.chip.mailbox(1).STATUS == SMP_DUMP
    masked()
    assert taken(1)["DMP"] == 1
    assert machine.chip.mailbox(1).STATUS == 0


def test_a_sender_with_interrupts_disabled_sends(machine, taken, eventually):
    def task():
        chip = shmipi.irq.chip()
        before = chip.read("rows", 1, 2)
        smp.local_irq_disable()
        chip.mp_ops.send_ipi_mask([0, 1], SMP_ICACHE_FLUSH)
        end = time.monotonic() + 5
        while chip.read("rows", 1, 2) == before and time.monotonic() < end:
            pass
        own = chip.mailbox(0).STATUS
        smp.local_irq_enable()
        return own, chip.mailbox(0).STATUS

    assert machine.run(task, cpus=[0]) == [(SMP_ICACHE_FLUSH, 0)]
    assert taken(0)["ICF"] == taken(1)["ICF"] == 1


def test_en_holds_back_and_lets_through_once(machine, taken, eventually):
    box = machine.chip.mailbox(1)
    was = box.EN
    assert was & 0xF == 0xF
    quiet(machine)
    doorbells = machine.counters()["doorbells_received"][1]
    box.EN = was & ~SMP_DUMP
    for _ in range(3):
        box.SET = SMP_DUMP
    time.sleep(0.05)
    assert (box.STATUS, taken(1)) == (SMP_DUMP, {})
    # Masked at the mailbox: the CPU is not even woken.
    assert machine.counters()["doorbells_received"][1] == doorbells
    box.SET = SMP_ICACHE_FLUSH
    eventually(lambda: taken(1) == {"ICF": 1})
    assert box.STATUS == SMP_DUMP
    box.EN = was
    eventually(lambda: taken(1) == {"ICF": 1, "DMP": 1})
    assert box.STATUS == 0
    enabled = box.EN
    assert enabled == was


def test_the_own_en(machine, taken):
    """A CPU that unmasks takes it before its next step."""

    def task():
        box = shmipi.irq.chip().mailbox(1)
        was = box.EN
        box.EN = was & ~0x8
        box.SET = 0x8
        held = box.STATUS
        box.EN = was
        return held, box.STATUS, shmipi.irq.chip().read("rows", 1, 3)

    before = rows(machine, 1)["DMP"]
    assert machine.run(task, cpus=[1]) == [(0x8, 0, before + 1)]


def test_unmask_against_send(machine, request_irq, eventually):
    """Neither side leaves a bit behind: 1,000 rounds of one against the other."""
    n = machine.shared("seen", "i8", 64)
    n[:] = 0
    request_irq(smp.NativeHandler("count"), n, cpus=[1])

    def task():
        chip, go = shmipi.irq.chip(), shmipi.shared("go")
        seen = shmipi.shared("seen")
        for turn in range(1000):
            end = time.monotonic() + 5
            shmipi.atomic.fetch_add(go, 2, 1)  # both start from here
            while go[2] < 2 * (turn + 1) and time.monotonic() < end:
                pass
            if chip.cpu() == 0:
                chip.raise_line(FREE, 1)
                while seen[0] <= turn and time.monotonic() < end:
                    pass
                go[3] = turn + 1 if seen[0] == turn + 1 else -1
            else:
                chip.mask_line(FREE, 1)
                chip.unmask_line(FREE, 1)
                while 0 <= go[3] <= turn and time.monotonic() < end:
                    pass
            if go[3] < 0:
                return turn
        return 1000

    go = machine.shared("go", "i8", 4)
    go[:] = 0
    assert machine.run(task, cpus=[0, 1]) == [1000, 1000]
    assert n[0] == 1000


# ---- registers -----------------------------------------------------------------------


def test_clear_takes_back(machine, masked, taken):
    box = machine.chip.mailbox(1)
    box.SET = 0xC
    assert box.STATUS == box.SET == box.CLEAR == 0xC
    box.CLEAR = 0x4
    assert box.STATUS == 0x8
    assert repr(box) == f"Mailbox(cpu=1, STATUS=0x8, EN={box.EN:#x})"
    masked()
    quiet(machine)
    assert {k: v for k, v in taken(1).items() if k in ("ICF", "DMP")} == {"DMP": 1}


@pytest.mark.parametrize("bit", [24, 28, 31])
def test_an_unknown_bit_is_reported_on_arrival(machine, taken, eventually, bit):
    other = machine.counters()["irq_other"][2]
    machine.chip.mailbox(2).SET = 1 << bit
    eventually(lambda: taken(2) == {"ERR": 1})
    quiet(machine)  # the row is counted first
    assert machine.counters()["irq_other"][2] == other + 1
    assert machine.chip.mailbox(2).STATUS == 0
    assert machine.call(2, abs, -2) == 2


def test_a_free_bit_waits_for_somebody_to_request_it(machine, request_irq, eventually):
    machine.chip.mailbox(1).SET = 1 << FREE
    time.sleep(0.02)
    assert machine.chip.pending_lines(1) == [FREE]
    n = machine.shared("seen", "i8", 64)
    n[:] = 0
    request_irq(smp.NativeHandler("count"), n, cpus=[1])
    eventually(lambda: n[0] == 1)
    assert machine.chip.pending_lines(1) == []


def test_bits_for_domains(machine):
    assert list(machine.chip.ipi_lines(3)) == list(range(5, 24))
    uses = {line.use for line in machine.chip.lines(3) if line.number in range(5, 24)}
    assert uses == {"irq"}


# ---- a handler that is put off -------------------------------------------------------


def test_a_put_off_handler_runs_once_for_each_taken(
    machine, request_irq, stuck, eventually
):
    """While the task makes no bytecode step, what is sent again stays pending."""
    n = machine.shared("seen", "i8", 64)
    n[:] = 0

    def handler(irq):
        shmipi.shared("seen")[0] += 1

    request_irq(handler, cpus=[1])
    free = stuck(machine, 1)
    box = machine.chip.mailbox(1)

    def put_off():
        eventually(lambda: FREE not in machine.chip.in_service(1))
        before = n[0]
        box.SET = 1 << FREE
        eventually(lambda: n[0] > before or FREE in machine.chip.in_service(1))
        return n[0] == before

    assert put_off() or put_off()
    handled, done = machine.counters()["irq_handled"][1], n[0]
    assert box.STATUS & 1 << FREE == 0
    for _ in range(5):
        box.SET = 1 << FREE
    # Others are not held up by it.
    before = rows(machine, 1)["RES"]
    box.SET = 0x1
    eventually(lambda: rows(machine, 1)["RES"] == before + 1)
    assert n[0] == done
    assert box.STATUS & 1 << FREE
    free()
    quiet(machine)
    assert n[0] == done + 2
    assert machine.counters()["irq_handled"][1] == handled + 2
    assert machine.chip.in_service(1) == []
    assert box.STATUS == 0


# ---- senders that die, CPUs that go --------------------------------------------------


@pytest.mark.alone  # it measures
@pytest.mark.parametrize("state", ["halted", "running"])
@pytest.mark.parametrize("step", ["raise", "ring"])
def test_a_sender_that_dies_before_it_rings(boot, eventually, background, step, state):
    cluster = boot(3, controller="mips", idle="halt", steps=True)
    cluster.shared("go", "i8", 2)[:] = 0
    go = cluster.shared("go", "i8", 2)
    chip = cluster.chip
    if state == "running":

        def busy():
            flag = shmipi.shared("go")
            flag[0] = 1
            end = time.monotonic() + 10
            while not flag[1] and time.monotonic() < end:
                pass

        thread = background(lambda: cluster.run(busy, cpus=[1]))
        eventually(lambda: go[0])
    eventually(lambda: cluster.cpus[1].state == state)
    cluster._machine.arm_step(0, step, _core.STEP_KILL)

    def send():
        shmipi.irq.chip().mp_ops.send_ipi_single(1, 0x8)

    with pytest.raises(shmipi.CpuDiedError):
        cluster.run(send, cpus=[0])
    eventually(lambda: chip.read("rows", 1, 3) == 1, 1.0)
    assert chip.mailbox(1).STATUS == 0
    go[1] = 1
    if state == "running":
        thread.end()


def test_offline_loses_and_starts_anew(boot, eventually):
    cluster = boot(2, controller="mips", idle="halt")
    chip, box = cluster.chip, cluster.chip.mailbox(1)
    box.EN &= ~0x8
    box.SET = 0x8
    cluster.offline(1)
    box.SET = 0x5
    chip.mp_ops.send_ipi_single(1, 0x1)
    before = [chip.read("rows", 1, n) for n in range(6)]
    cluster.online(1)
    assert cluster.call(1, abs, -1) == 1
    assert box.STATUS == 0
    assert box.EN & 0xF == 0xF, "as after power-on"
    assert [chip.read("rows", 1, n) for n in (0, 2, 3)] == [
        before[n] for n in (0, 2, 3)
    ]
    box.SET = 0x8
    eventually(lambda: chip.read("rows", 1, 3) == before[3] + 1)


def test_the_one_that_stands_in_for_an_nmi_is_masked(machine, masked, taken):
    machine.chip.send_nmi([1])
    time.sleep(0.05)
    assert taken(1) == {}
    assert machine.chip.pending_lines(1) == [4]
    nmis = machine.counters()["nmi"][1]
    masked()
    quiet(machine)
    assert machine.counters()["nmi"][1] == nmis + 1


# ---- bad input -----------------------------------------------------------------------


@pytest.mark.parametrize("action", [0, 0x10, 0x18, 1 << 31, 1 << 32, -1])
def test_bad_actions(machine, taken, action):
    for send in (
        lambda: machine.chip.mp_ops.send_ipi_single(1, action),
        lambda: machine.chip.mp_ops.send_ipi_mask([0, 1], action),
        lambda: machine.chip.mp_ops.send_ipi_mask([], action),
    ):
        with pytest.raises(IrqError, match=r"mips.*action .*known are") as caught:
            send()
        assert caught.value.errno == errno.EINVAL
        assert caught.value.domain == "mips"
    quiet(machine)
    assert [taken(cpu) for cpu in range(3)] == [{}] * 3


def test_bad_cpus(machine, taken):
    chip = machine.chip
    for bad in (
        lambda: chip.mp_ops.send_ipi_single(3, 1),
        lambda: chip.mp_ops.send_ipi_mask([0, 3], 1),
        lambda: chip.smp_send_reschedule(3),
        lambda: chip.arch_send_call_function_single_ipi(3),
        lambda: chip.arch_send_call_function_ipi_mask([1, 3]),
        lambda: chip.mailbox(3),
    ):
        with pytest.raises(IrqError, match="no CPU 3") as caught:
            bad()
        assert (caught.value.errno, caught.value.cpu) == (errno.EINVAL, 3)
    with pytest.raises(ValueError, match="-1"):
        chip.mp_ops.send_ipi_single(-1, 1)
    with pytest.raises(TypeError):
        chip.mp_ops.send_ipi_single(1, "1")
    assert [taken(cpu) for cpu in range(3)] == [{}] * 3


@pytest.mark.parametrize("register", ["SET", "CLEAR", "EN"])
@pytest.mark.parametrize("value", [1 << 32, -1])
def test_a_register_has_32_bits(machine, register, value):
    with pytest.raises(IrqError, match="32 bits") as caught:
        setattr(machine.chip.mailbox(1), register, value)
    assert caught.value.errno == errno.EINVAL


def test_status_is_read_only(machine):
    with pytest.raises(AttributeError):
        machine.chip.mailbox(1).STATUS = 1


def test_a_mailbox_is_a_mips(boot):
    cluster = boot(1, controller="riscv")
    with pytest.raises(ValueError, match=r"riscv has no mailbox with bits 0x1$"):
        cluster._machine.irq_mailbox(0, 1)


def test_bits_that_no_mailbox_has_are_named(boot):
    bits = 1 << 63 | 0xAB
    with pytest.raises(ValueError, match=f"mips has no mailbox with bits {bits:#x}$"):
        boot(1, controller="mips")._machine.irq_mailbox(0, bits)
