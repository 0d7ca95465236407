"""LoongArch's IPI unit: IOCSRs, actions, mailboxes, the start of secondary cores."""

import errno
import time

import pytest

import shmipi
from shmipi import Cluster, IrqError, _core, smp
from shmipi.irq.chips.loongarch import (
    ACTION_BOOT_CPU,
    ACTION_CALL_FUNCTION,
    ACTION_CLEAR_VECTOR,
    ACTION_IRQ_WORK,
    ACTION_RESCHEDULE,
    Loongarch,
)

IPI_STATUS, IPI_EN, IPI_SET, IPI_CLEAR = 0x1000, 0x1004, 0x1008, 0x100C
MBUF0, IPI_SEND, MBUF_SEND = 0x1020, 0x1040, 0x1048
BLOCKING = 1 << 31
ROWS = ("IPI0", "IPI1", "IPI2", "IPI3", "NMI", "ERR")
LINE_ACK = _core.TRACE_EVENTS.index("line_ack")
FREE = 9  # an action that IPI domains may have


@pytest.fixture(scope="module")
def machine():
    with Cluster(3, controller="loongarch", idle="halt", trace=True) as cluster:
        cluster.shared("go", "i8", 4)
        yield cluster


@pytest.fixture
def chip(machine):
    return machine.chip


@pytest.fixture
def taken(machine):
    """`taken(cpu)`: the actions that it took since, in order, when all is quiet."""

    def quiet():
        end = time.monotonic() + 5
        slots = (machine._machine.slot(n).state for n in range(3))
        while any(state != _core.HALTED for state in slots):
            assert time.monotonic() < end, "they do not come to rest"
            time.sleep(0.0005)
            slots = (machine._machine.slot(n).state for n in range(3))

    quiet()
    first = len(machine.trace_events())

    def lines(cpu):
        quiet()
        events = machine.trace_events()[first:]
        mine = (events["event"] == LINE_ACK) & (events["cpu"] == cpu)
        return events["arg"][mine].tolist()

    return lines


def row(machine, cpu, label):
    return machine.chip.read("rows", cpu, ROWS.index(label))


# ---- sending -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("action", "label"),
    [
        (ACTION_BOOT_CPU, None),  # a core that runs ignores it
        (ACTION_RESCHEDULE, "IPI0"),
        (ACTION_CALL_FUNCTION, "IPI1"),
        (ACTION_IRQ_WORK, "IPI2"),
        (ACTION_CLEAR_VECTOR, "IPI3"),
    ],
)
def test_an_action_arrives_once_and_only_there(machine, chip, taken, action, label):
    before = [row(machine, cpu, label or "ERR") for cpu in range(3)]
    writes = machine.host_counters()["chip_writes"]
    chip.iocsr_write32(BLOCKING | 1 << 16 | action, IPI_SEND)
    assert [taken(cpu) for cpu in range(3)] == [[], [action], []]
    now = [row(machine, cpu, label or "ERR") for cpu in range(3)]
    assert [b - a for a, b in zip(before, now, strict=True)] == [0, int(bool(label)), 0]
    assert machine.host_counters()["chip_writes"] == writes + 1
    assert chip.iocsr_read32(IPI_STATUS, 1) == 0


def test_the_arch_functions_are_made_of_mp_ops(machine, chip, taken):
    writes = machine.host_counters()["chip_writes"]
    chip.arch_smp_send_reschedule(1)
    chip.arch_send_call_function_single_ipi(2)
    chip.mp_ops.send_ipi_mask("0,2", ACTION_IRQ_WORK)
    chip.arch_send_call_function_ipi_mask([0])
    assert machine.host_counters()["chip_writes"] == writes + 5
    assert sorted(taken(0)) == [ACTION_CALL_FUNCTION, ACTION_IRQ_WORK]
    assert taken(1) == [ACTION_RESCHEDULE]
    assert sorted(taken(2)) == [ACTION_CALL_FUNCTION, ACTION_IRQ_WORK]
    machine.run(lambda: shmipi.irq.chip().arch_irq_work_raise(), cpus=[1])
    assert taken(1).count(ACTION_IRQ_WORK) == 1


def test_calls_and_reschedules_of_the_machine_go_by_actions(machine, taken):
    assert machine.call(1, abs, -3) == 3
    assert taken(1) == [ACTION_CALL_FUNCTION]
    machine.smp.on_each_cpu(smp.NativeHandler("noop"))
    assert ACTION_CALL_FUNCTION in taken(2)


def test_least_bit_first_and_the_same_twice_is_one(chip, taken, masked):
    for action in (ACTION_CLEAR_VECTOR, FREE, ACTION_IRQ_WORK, ACTION_RESCHEDULE) * 2:
        chip.iocsr_write32(1 << 16 | action, IPI_SEND)
    bits = 1 << 4 | 1 << FREE | 1 << 3 | 1 << 1
    assert chip.iocsr_read32(IPI_STATUS, 1) == bits
    masked()
    actions = [action for action in taken(1) if action != ACTION_CALL_FUNCTION]
    assert actions == [ACTION_RESCHEDULE, ACTION_IRQ_WORK, ACTION_CLEAR_VECTOR]
    assert chip.iocsr_read32(IPI_STATUS, 1) == 1 << FREE  # EN has it off
    chip.iocsr_write32(1 << FREE, IPI_CLEAR, 1)
    assert chip.iocsr_read32(IPI_STATUS, 1) == 0


# ---- the other registers -------------------------------------------------------------


def test_en_holds_back_and_lets_through_once(machine, chip, taken):
    en = chip.iocsr_read32(IPI_EN, 2)
    assert en == 0xFF00003F  # all but what IPI domains may have
    chip.iocsr_write32(en & ~(1 << ACTION_IRQ_WORK), IPI_EN, 2)
    for _ in range(3):
        chip.mp_ops.send_ipi_single(2, ACTION_IRQ_WORK)
    assert taken(2) == []
    assert chip.pending_lines(2) == [ACTION_IRQ_WORK]
    chip.iocsr_write32(en, IPI_EN, 2)
    assert taken(2) == [ACTION_IRQ_WORK]


def test_set_is_the_own_core_s_and_takes_bits(machine, taken):
    def task():
        chip = shmipi.irq.chip()
        chip.iocsr_write32(1 << ACTION_IRQ_WORK | 1 << ACTION_CLEAR_VECTOR, IPI_SET)
        return chip.iocsr_read32(IPI_STATUS)

    assert machine.run(task, cpus=[1]) == [0]
    assert taken(1)[-2:] == [ACTION_IRQ_WORK, ACTION_CLEAR_VECTOR]


def test_an_unknown_bit_is_reported(machine, chip, taken):
    before = machine.counters()["irq_other"][1], row(machine, 1, "ERR")
    chip.iocsr_write32(1 << 16 | 31, IPI_SEND)
    assert taken(1) == [31]
    now = machine.counters()["irq_other"][1], row(machine, 1, "ERR")
    assert now == (before[0] + 1, before[1] + 1)


def test_mailboxes_hold_64_bits_and_are_sent_in_halves(machine, chip):
    for box in range(4):
        chip.csr_mail_send(0x0123_4567_89AB_CDE0 + box, 2, box)
    values = [chip.iocsr_read64(MBUF0 + 8 * box, 2) for box in range(4)]
    assert values == [0x0123_4567_89AB_CDE0 + box for box in range(4)]
    assert chip.iocsr_read32(MBUF0 + 12, 2) == 0x0123_4567
    assert [chip.iocsr_read64(MBUF0 + 8, cpu) for cpu in (0, 1)] == [0, 0]
    chip.iocsr_write64(7 << 32 | 2 << 16 | 1 << 2, MBUF_SEND)  # the high half of MBUF0
    assert chip.iocsr_read64(MBUF0, 2) == 7 << 32 | 0x89AB_CDE0

    def task():  # loongson_smp_finish
        here = shmipi.irq.chip()
        here.iocsr_write64(0, MBUF0)
        return here.iocsr_read64(MBUF0), here.iocsr_read64(MBUF0 + 24)

    assert machine.run(task, cpus=[2]) == [(0, 0x0123_4567_89AB_CDE3)]


# ---- secondary cores -----------------------------------------------------------------


def test_a_secondary_core_waits_for_boot_cpu(boot, eventually):
    """As loongson_boot_secondary: an address to mailbox 0, then ACTION_BOOT_CPU."""
    cluster = boot(2, controller=Loongarch(), idle="halt")
    chip = cluster.chip
    assert [chip.iocsr_read64(MBUF0, cpu) >> 60 for cpu in (0, 1)] == [0, 9]
    assert [chip.read("startup", cpu) for cpu in (0, 1)] == [_core.STARTUP_STARTED] * 2
    generation = cluster.cpus[1].generation
    cluster.offline(1)
    chip.mp_ops.send_ipi_single(1, ACTION_IRQ_WORK)  # lost
    cluster.online(1)
    assert cluster.call(1, abs, -1) == 1
    assert row(cluster, 1, "IPI2") == 0
    assert cluster.cpus[1].generation >= generation


# ---- what is refused -----------------------------------------------------------------


def test_what_is_refused(machine, chip):
    for use in (
        lambda: chip.iocsr_read32(IPI_SEND, 1),
        lambda: chip.iocsr_read32(IPI_SET, 1),
        lambda: chip.iocsr_read64(IPI_STATUS, 1),
        lambda: chip.iocsr_write32(1, IPI_STATUS, 1),
        lambda: chip.iocsr_write32(1 << 32, IPI_SET, 1),
        lambda: chip.iocsr_write32(-1, IPI_SET, 1),
        lambda: chip.iocsr_write32(1 << 5, IPI_SEND),
        lambda: chip.iocsr_write32(1 << 26, IPI_SEND),
        lambda: chip.iocsr_write64(1 << 64, MBUF_SEND),
        lambda: chip.iocsr_write64(1, MBUF_SEND),
        lambda: chip.iocsr_write64(1, IPI_SEND),
        lambda: chip.iocsr_read32(IPI_STATUS, 3),
        lambda: chip.mp_ops.send_ipi_single(1, 5),
        lambda: chip.mp_ops.send_ipi_single(1, -1),
        lambda: chip.mp_ops.send_ipi_mask([0, 3], ACTION_RESCHEDULE),
    ):
        with pytest.raises(IrqError, match=r"^loongarch: ") as caught:
            use()
        assert (caught.value.errno, caught.value.domain) == (errno.EINVAL, "loongarch")
    with pytest.raises(shmipi.ClusterStateError, match="the host is no CPU"):
        chip.iocsr_read32(IPI_STATUS)
    chip.iocsr_write32(3 << 16 | ACTION_RESCHEDULE, IPI_SEND)  # no such core: nobody
    chip.iocsr_write64(3 << 16, MBUF_SEND)
    with pytest.raises(shmipi.ControllerError, match="1024 CPUs, not 1025"):
        Loongarch().for_cpus(1025)
