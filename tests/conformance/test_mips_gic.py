"""The MIPS GIC: shared edge interrupts, their routes and masks, the reserved IPIs."""

import errno
import os
import signal
import threading
import time

import pytest

import shmipi
from shmipi import Cluster, IrqError, _core, smp
from shmipi.irq import DomainNode
from shmipi.irq.chips import Chip
from shmipi.irq.chips.mips_gic import GIC_WEDGE_RW, MipsGic

LINE_ACK = _core.TRACE_EVENTS.index("line_ack")
CALL, RESCHED = range(250, 253), range(253, 256)  # of three CPUs
FREE = 70
GIC_NUM_LOCAL_INTRS, GIC_LOCAL_INT_TIMER = 7, 2
VIRQ = 700


@pytest.fixture(scope="module")
def machine():
    with Cluster(3, controller="mips-gic", idle="halt", trace=True) as cluster:
        cluster.shared("go", "i8", 4)
        cluster.shared("seen", "i8", (3, 8))
        quiet(cluster)
        yield cluster


@pytest.fixture
def chip(machine):
    return machine.chip


def quiet(cluster):
    """Wait until every CPU has taken what it was sent, and sleeps."""
    end = time.monotonic() + 5
    while any(
        cluster._machine.slot(n).state != _core.HALTED for n in cluster.online_mask
    ):
        assert time.monotonic() < end, "they do not come to rest"
        time.sleep(0.0005)


@pytest.fixture
def taken(machine):
    """`taken(cpu)`: the interrupts that a CPU took since the test began, in order."""
    quiet(machine)
    first = len(machine.trace_events())

    def lines(cpu):
        events = machine.trace_events()[first:]
        mine = (events["event"] == LINE_ACK) & (events["cpu"] == cpu)
        return events["arg"][mine].tolist()

    return lines


@pytest.fixture
def request_irq(machine):
    """`request_irq(handler, info, *interrupts)`: give them a handler, unmasked."""
    m, done = machine._machine, []

    def start(handler, info, *interrupts):
        with m.irq_lock():
            m.irq_request(VIRQ, handler, info)
        done.append((handler, interrupts))
        for intr in interrupts:
            m.pic_write(0, "line_virq", intr, VIRQ)
            machine.chip.write_gic_smask(intr)

    yield start
    for _, interrupts in done:
        for intr in interrupts:
            machine.chip.write_gic_rmask(intr)
            machine.chip.write_gic_wedge(intr)
            machine.chip.route_line(intr, None)
            m.pic_write(0, "line_virq", intr, 0)
    m.irq_free(VIRQ)


@pytest.fixture
def counted(machine, request_irq):
    """`counted(*interrupts)`: how often they were handled, by any CPU."""
    n = machine.shared("seen", "i8", (3, 8))
    n[:] = 0

    def start(*interrupts):
        request_irq(smp.NativeHandler("count"), n, *interrupts)
        return lambda: int(n[0, 0])

    return start


def wedge(chip, intr):
    chip.write_gic_wedge(GIC_WEDGE_RW | intr)


# ---- the reserved range --------------------------------------------------------------


@pytest.mark.parametrize(
    ("reserved", "ncpus", "first", "ipi_lines"),
    [
        # Nobody said what is reserved: the upper half of what the kernel leaves.
        (None, 1, 254, [*range(127, 254)]),
        (None, 4, 248, [*range(124, 248)]),
        (None, 128, 0, []),
        ((248, 8), 4, 248, []),
        ((40, 8), 4, 40, []),
        # What is left of the range, and no regular interrupt.
        ((40, 16), 4, 40, [*range(48, 56)]),
        ((0, 256), 2, 0, [*range(4, 256)]),
    ],
)
def test_the_range(reserved, ncpus, first, ipi_lines):
    chip = MipsGic(reserved_ipi_vectors=reserved).for_cpus(ncpus)
    lines = list(chip.lines(ncpus))
    assert [line.number for line in lines] == list(range(256 + 7))
    assert [line.name[14:] for line in lines[256:]] == [
        *("WD", "COMPARE", "TIMER", "PERFCTR", "SWINT0", "SWINT1", "FDC")
    ]
    assert len(chip.irq_lines(ncpus)) == 256 + 7 - 2 * ncpus
    calls = [line.number for line in lines if line.use == "call"]
    resched = [line.number for line in lines if line.use == "reschedule"]
    assert calls == list(range(first, first + ncpus))
    assert resched == list(range(first + ncpus, first + 2 * ncpus))
    assert list(chip.ipi_lines(ncpus)) == ipi_lines


def test_a_range_of_its_own(boot):
    """Calls and reschedules travel there, and what is left over is free."""
    cluster = boot(2, controller=MipsGic(reserved_ipi_vectors=(60, 10)), idle="halt")
    chip = cluster.chip
    assert [chip.map_vp(n) for n in range(59, 66)] == [None, 0, 1, 0, 1, None, None]
    assert chip.MASK >> 60 & 0xFF == 0xF
    assert cluster.call(1, abs, -1) == 1
    assert chip.line("IPI call 1").number == 61
    assert list(chip.ipi_lines(2)) == [64, 65, 66, 67, 68, 69]
    chip.mp_ops.send_ipi_mask([0, 1], 0x1)
    quiet(cluster)
    assert [chip.read("rows", cpu, 0) for cpu in (0, 1)] == [1, 1]


def test_domains_take_what_is_left_of_the_range_and_no_more(boot, eventually):
    """gic_ipi_domain_alloc; what they reserve is routed, sent by WEDGE and taken."""
    cluster = boot(2, controller=MipsGic(reserved_ipi_vectors=(60, 6)), idle="halt")
    irq, chip = cluster.irq, cluster.chip
    first = irq.irq_reserve_ipi(None, [0, 1])
    assert [irq.ipi_get_hwirq(first, cpu) for cpu in (0, 1)] == [64, 65]
    # The range is used up: the regular interrupts are devices'.
    for dest in ([0, 1], [0]):
        with pytest.raises(IrqError, match=r"has no .*hwirq.* left") as caught:
            irq.irq_reserve_ipi(None, dest)
        assert (caught.value.errno, caught.value.domain) == (
            errno.EBUSY,
            "mips-gic-ipi",
        )
    with pytest.raises(IrqError, match="hwirq 0 is not domain mips-gic-ipi's"):
        irq.irq_reserve_ipi(None, [0], hwirq=0)
    assert [chip.map_vp(n) for n in (64, 65, 0, 1)] == [0, 1, None, None]
    # A device gets no interrupt of the range, reserved or not (gic_irq_domain_map).
    devices = irq.irq_domain_create(DomainNode("devices", "none"))
    for taken in (60, 64):
        with pytest.raises(IrqError) as caught:
            irq.irq_create_mapping(devices, taken)
        assert caught.value.errno == (errno.EINVAL if taken == 60 else errno.EBUSY)
    virq = irq.irq_create_mapping(devices, 3)
    assert chip.map_vp(3) == 0
    irq.irq_dispose_mapping(virq)
    seen = cluster.shared("seen", "i8", 1)
    count = smp.NativeHandler("count")
    irq.request_percpu_irq(first, count, "mine", seen)
    cluster.smp.on_each_cpu(lambda _: shmipi.irq.enable_percpu_irq(first))
    irq.irq_send_ipi_all(first)
    eventually(lambda: seen[0] == 2)
    wedge(chip, 65)  # the same as the hardware has it
    eventually(lambda: seen[0] == 3)


@pytest.mark.parametrize("reserved", [(-1, 8), (0, 0), (0, 257), (250, 7), (256, 1)])
def test_a_range_that_cannot_be(reserved):
    with pytest.raises(ValueError, match=r"reserved_ipi_vectors=.*0 to 255"):
        MipsGic(reserved_ipi_vectors=reserved)


def test_a_range_too_small():
    chip = MipsGic(reserved_ipi_vectors=(100, 7))
    with pytest.raises(ValueError, match=r"\(100, 7\): 4 CPUs need 8 vectors, not 7"):
        Cluster(4, controller=chip)
    with pytest.raises(ValueError, match="128 CPUs, not 129"):
        Cluster(129, controller="mips-gic")


def test_local_interrupts_are_each_cpus_own(boot, eventually):
    """GIC_LOCAL_INT_*: masked by VL_SMASK, VL_RMASK; dispatched before shared ones."""
    cluster = boot(2, controller="mips-gic", idle="halt", trace=True)
    irq, chip = cluster.irq, cluster.chip
    devices = irq.irq_domain_create(DomainNode("devices", "none"))
    lines = [256 + n for n in range(GIC_NUM_LOCAL_INTRS)]
    assert [n for n in devices.hwirqs() if n >= 256] == lines
    assert not set(lines) & set(irq.domain().hwirqs())
    seen = cluster.percpu("seen", "i8")
    count = smp.NativeHandler("count")
    timer = irq.irq_create_mapping(devices, 256 + GIC_LOCAL_INT_TIMER, "timer")
    irq.request_percpu_irq(timer, count, "timer", seen)
    assert irq.irq_to_desc(timer).irq_data.hwirq == 258
    # Masked at both, then at one: each holds what it was sent.
    chip.raise_local(GIC_LOCAL_INT_TIMER, 0)
    chip.raise_local(GIC_LOCAL_INT_TIMER, 1)
    chip.raise_local(GIC_LOCAL_INT_TIMER, 1)
    assert [chip.read_gic_vl_pend(cpu) for cpu in (0, 1)] == [4, 4]
    assert chip.pending_lines(1) == [258]
    assert chip.PEND == 0
    irq.enable_percpu_irq_mask(timer, [1])
    eventually(lambda: seen.tolist() == [0, 1])
    assert [chip.read_gic_vl_mask(cpu) for cpu in (0, 1)] == [0, 4]
    assert [irq.irq_percpu_is_enabled(timer, cpu) for cpu in (0, 1)] == [False, True]
    chip.write_gic_vl_smask(1 << GIC_LOCAL_INT_TIMER, 0)
    eventually(lambda: seen.tolist() == [1, 1])
    chip.write_gic_vl_rmask(1 << GIC_LOCAL_INT_TIMER, 1)
    chip.raise_local(GIC_LOCAL_INT_TIMER, 1)
    assert chip.read_gic_vl_pend(1) == 4
    assert not irq.irq_percpu_is_enabled(timer, 1)
    # With shared ones pending below it: the local one is first.
    shared = irq.irq_reserve_ipi(None, [1])
    irq.request_percpu_irq(shared, count, "shared", seen)
    irq.enable_percpu_irq_mask(shared)
    first = len(cluster.trace_events())
    line = irq.ipi_get_hwirq(shared, 1)

    def both():
        smp.local_irq_disable()
        here = shmipi.irq.chip()
        here.raise_line(line, 1)
        here.write_gic_vl_smask(1 << 2)
        here.raise_local(2)
        smp.local_irq_enable()

    cluster.run(both, cpus=[1])
    events = cluster.trace_events()[first:]
    taken = events["arg"][(events["event"] == LINE_ACK) & (events["cpu"] == 1)].tolist()
    assert [n for n in taken if n in (258, line)] == [258, line]
    cluster.offline(1)
    chip.raise_local(GIC_LOCAL_INT_TIMER, 1)
    cluster.online(1)
    assert chip.read_gic_vl_pend(1) == 0  # lost
    assert chip.read_gic_vl_mask(1) == 4
    for wrong in (-1, 7):
        with pytest.raises(IrqError, match="no local interrupt"):
            chip.raise_local(wrong, 1)
        with pytest.raises(IrqError, match="no local interrupts"):
            chip.write_gic_vl_smask(wrong << 7, 1)
    with pytest.raises(IrqError, match="no line 258 that another CPU"):
        chip.raise_line(258, 1)


def test_other_chips_give_out_their_free_lines():
    class Two(Chip):
        name = "two"
        flow = "mailbox"

        def lines(self, ncpus):
            for n, use in enumerate(["call", "irq", "reschedule", "irq", "count"]):
                yield shmipi.irq.chips.Line(n, use, use)

    assert list(Two().ipi_lines(2)) == [1, 3]


# ---- WEDGE ---------------------------------------------------------------------------


def test_the_kernels_two_ipis(machine, chip, taken):
    before = machine.host_counters()["chip_writes"]
    chip.mp_ops.send_ipi_single(1, 0x2)
    chip.mp_ops.send_ipi_mask("0,2", 0x1)
    chip.smp_send_reschedule(1)
    chip.arch_send_call_function_single_ipi(2)
    chip.arch_send_call_function_ipi_mask([0, 1])
    quiet(machine)
    assert machine.host_counters()["chip_writes"] == before + 7
    assert sorted(taken(0)) == [CALL[0], RESCHED[0]]
    # A call that came before the first was taken is the same.
    assert sorted(taken(1)) in (
        [CALL[1], RESCHED[1]],
        [CALL[1], CALL[1], RESCHED[1]],
    )
    assert sorted(taken(2)) == [CALL[2], RESCHED[2]]
    assert chip.PEND == 0


def test_to_itself_exactly_once(machine, taken):
    def task():
        here = shmipi.irq.chip()
        here.mp_ops.send_ipi_single(smp.smp_processor_id(), 0x1)

    machine.run(task)
    quiet(machine)
    assert [taken(cpu).count(RESCHED[cpu]) for cpu in range(3)] == [1, 1, 1]


def test_layers_above_use_them(machine, taken):
    assert machine.call(1, abs, -5) == 5
    assert taken(1) == [CALL[1]]
    quiet(machine)  # else it polls still, and needs no interrupt
    machine.smp.on_each_cpu(smp.NativeHandler("noop"))
    assert [taken(cpu) for cpu in range(3)] == [[CALL[0]], [CALL[1]] * 2, [CALL[2]]]


def test_a_device_interrupt_goes_where_it_is_routed(chip, taken, counted, machine):
    handled = counted(FREE)
    chip.map_to_vp(FREE, 2)
    assert chip.map_vp(FREE) == 2
    for n in range(1, 4):
        wedge(chip, FREE)
        quiet(machine)
        assert handled() == n
    assert (taken(0), taken(1), taken(2)) == ([], [], [FREE] * 3)
    chip.map_to_vp(FREE, 0)
    wedge(chip, FREE)
    quiet(machine)
    assert (taken(0), taken(1), taken(2)) == ([FREE], [], [FREE] * 3)


def test_sent_while_masked_stays_pending_and_fires_once(machine, chip, taken, counted):
    handled = counted(FREE)
    chip.map_to_vp(FREE, 1)
    chip.write_gic_rmask(FREE)
    assert not chip.MASK >> FREE & 1
    bells = machine.counters()["doorbells_received"][1]
    for _ in range(5):
        wedge(chip, FREE)
    time.sleep(0.03)
    assert chip.PEND == 1 << FREE
    assert chip.pending_lines(1) == [FREE]
    assert chip.pending_lines(0) == []
    assert (taken(1), handled()) == ([], 0)
    assert machine.counters()["doorbells_received"][1] == bells
    chip.write_gic_smask(FREE)
    quiet(machine)
    assert (chip.PEND, taken(1), handled()) == (0, [FREE], 1)
    chip.write_gic_smask(FREE)
    quiet(machine)
    assert handled() == 1


def test_what_is_masked_can_be_taken_back(machine, chip, taken, counted):
    handled = counted(FREE)
    chip.map_to_vp(FREE, 1)
    chip.write_gic_rmask(FREE)
    wedge(chip, FREE)
    chip.write_gic_wedge(FREE)  # without the bit: clear
    assert chip.PEND == 0
    chip.write_gic_smask(FREE)
    quiet(machine)
    assert (taken(1), handled()) == ([], 0)


def test_an_ipi_can_be_masked_too(machine, chip, taken):
    chip.write_gic_rmask(RESCHED[1])
    chip.smp_send_reschedule(1)
    chip.smp_send_reschedule(1)
    time.sleep(0.02)
    assert (taken(1), chip.PEND) == ([], 1 << RESCHED[1])
    chip.write_gic_smask(RESCHED[1])
    quiet(machine)
    assert taken(1) == [RESCHED[1]]


def test_least_number_first(machine, chip, counted, masked):
    lines = (3, 130, 64, 63, 5)
    for intr in lines:
        chip.map_to_vp(intr, 1)
    handled = counted(*lines)
    first = len(machine.trace_events())
    for intr in lines:
        wedge(chip, intr)
    chip.smp_send_reschedule(1)
    assert chip.pending_lines(1) == [*sorted(lines), RESCHED[1]]
    masked()
    quiet(machine)
    events = machine.trace_events()[first:]
    mine = (events["event"] == LINE_ACK) & (events["cpu"] == 1)
    assert events["arg"][mine].tolist() == [*sorted(lines), RESCHED[1]]
    assert handled() == 5


def test_what_is_pending_is_copied_once(machine, chip, request_irq):
    """gic_handle_shared_int: one that sends itself again does not starve those above.

    What comes again waits for the next copy, though its number is less; and what is
    masked or taken back while it stands in the copy is not dispatched from it.
    """
    start, low, high, hidden, back = 5, 10, 20, 30, 40

    def handler(irq):  # on an idle CPU: right where the interrupt is dispatched
        here, log = shmipi.irq.chip(), shmipi.shared("order")
        [intr] = here.in_service(1)
        log[0] += 1
        log[log[0]] = intr
        if intr == 5:
            for pending in (40, 30, 20, 10):
                here.write_gic_wedge(1 << 31 | pending)
        if intr == 10 and log[0] < 10:
            here.write_gic_wedge(1 << 31 | 10)
            here.write_gic_rmask(30)
            here.write_gic_wedge(40)

    log = machine.shared("order", "i8", 32)
    log[:] = 0
    for intr in (start, low, high, hidden, back):
        chip.map_to_vp(intr, 1)
    request_irq(handler, None, start, low, high, hidden, back)
    wedge(chip, start)
    quiet(machine)
    taken = [start, low, high, *[low] * 7]
    assert log[1 : 1 + log[0]].tolist() == taken
    assert [1 << hidden] == [chip.PEND]
    chip.write_gic_smask(hidden)
    quiet(machine)
    assert log[1 : 1 + log[0]].tolist() == [*taken, hidden]


def test_acknowledged_before_it_is_handled(machine, chip, request_irq):
    """Sent once more by its own handler: taken once more, after it."""

    def handler(irq):
        here, seen = shmipi.irq.chip(), shmipi.shared("seen")
        seen[0, 1] += here.PEND >> 70 & 1
        seen[0, 2] += seen[0, 3]
        seen[0, 3] = 1
        if seen[0, 0] < 3:
            here.write_gic_wedge(1 << 31 | 70)
        seen[0, 0] += 1
        seen[0, 3] = 0

    seen = machine.shared("seen", "i8", (3, 8))
    seen[:] = 0
    chip.map_to_vp(FREE, 2)
    request_irq(handler, None, FREE)
    wedge(chip, FREE)
    quiet(machine)
    assert seen[0, :3].tolist() == [4, 0, 0]


def test_a_put_off_handler_runs_once_for_each_taken(
    machine, chip, request_irq, stuck, eventually
):
    seen = machine.shared("seen", "i8", (3, 8))
    seen[:] = 0

    def handler(irq):
        shmipi.shared("seen")[0, 0] += 1

    chip.map_to_vp(FREE, 1)
    request_irq(handler, None, FREE)
    free = stuck(machine, 1)

    def put_off():
        before = seen[0, 0]
        wedge(chip, FREE)
        eventually(lambda: seen[0, 0] > before or chip.in_service(1) == [FREE])
        return seen[0, 0] == before

    assert put_off() or put_off()
    done = seen[0, 0]
    assert chip.PEND == 0
    for _ in range(5):
        wedge(chip, FREE)
    chip.smp_send_reschedule(1)  # others are not held up by it
    eventually(lambda: chip.PEND == 1 << FREE)
    assert seen[0, 0] == done
    free()
    quiet(machine)
    assert (seen[0, 0], chip.PEND, chip.in_service(1)) == (done + 2, 0, [])


# ---- routes --------------------------------------------------------------------------


def test_routed_to_nobody_it_waits(machine, chip, counted, taken):
    handled = counted(FREE)
    assert chip.map_vp(FREE) is None
    wedge(chip, FREE)
    time.sleep(0.02)
    assert (chip.PEND, handled()) == (1 << FREE, 0)
    chip.map_to_vp(FREE, 0)  # and what is pending goes with it
    quiet(machine)
    assert (chip.PEND, handled(), taken(0)) == (0, 1, [FREE])


def test_what_is_pending_goes_with_its_route(machine, chip, counted, taken, masked):
    handled = counted(FREE)
    chip.map_to_vp(FREE, 1)
    wedge(chip, FREE)  # CPU 1 has its interrupts disabled
    assert chip.pending_lines(1) == [FREE]
    chip.map_to_vp(FREE, 2)
    deadline = time.monotonic() + 5
    while not handled() and time.monotonic() < deadline:
        pass
    assert taken(2) == [FREE]
    masked()
    quiet(machine)
    assert (handled(), FREE in taken(1)) == (1, False)


def test_the_cpu_that_is_named_does_not_matter(machine, chip, counted, taken):
    """WEDGE knows no target: it is the map's."""
    handled = counted(FREE)
    chip.map_to_vp(FREE, 2)
    chip.raise_line(FREE, 0)
    quiet(machine)
    assert (handled(), taken(0), taken(2)) == (1, [], [FREE])
    chip.mask_line(FREE, 0)
    chip.raise_line(FREE, 1)
    chip.unmask_line(FREE, 0)
    quiet(machine)
    assert (handled(), taken(0), taken(1), taken(2)) == (2, [], [], [FREE] * 2)


def test_routes_that_change_while_it_is_sent(machine, chip, counted):
    """1,000 sends while the route changes for ever: each is taken, and once."""
    handled = counted(FREE)
    chip.map_to_vp(FREE, 1)
    go = machine.shared("go", "i8", 4)
    go[:] = 0
    seen = machine.shared("seen", "i8", (3, 8))

    def sender():
        here = shmipi.irq.chip()
        for turn in range(1000):
            here.write_gic_wedge(GIC_WEDGE_RW | FREE)
            end = time.monotonic() + 5
            while seen[0, 0] <= turn and time.monotonic() < end:
                pass
            if seen[0, 0] != turn + 1:
                break
        go[3] = 1
        return int(seen[0, 0])

    def router():
        turn = 0
        while not go[3]:
            turn += 1
            chip.map_to_vp(FREE, 1 + turn % 2)

    thread = threading.Thread(target=router)
    thread.start()
    try:
        assert machine.run(sender, cpus=[0]) == [1000]
    finally:
        go[3] = 1
        thread.join(10)
    assert handled() == 1000


# ---- senders that die, CPUs that go --------------------------------------------------


@pytest.mark.parametrize("step", ["raise", "ring"])
def test_a_sender_that_dies_before_it_rings(boot, eventually, step):
    cluster = boot(3, controller="mips-gic", idle="halt", steps=True)
    chip = cluster.chip
    quiet(cluster)
    cluster._machine.arm_step(0, step, _core.STEP_KILL)
    with pytest.raises(shmipi.CpuDiedError):
        cluster.run(lambda: shmipi.irq.chip().smp_send_reschedule(1), cpus=[0])
    eventually(lambda: chip.read("rows", 1, 0) == 1)
    assert chip.PEND == 0


def test_offline_loses_and_starts_anew(boot):
    cluster = boot(2, controller="mips-gic", idle="halt")
    chip = cluster.chip
    resched = chip.ipi(1, 0x1)
    chip.write_gic_rmask(resched)
    cluster.offline(1)
    wedge(chip, resched)
    before = chip.read("rows", 1, 0)
    cluster.online(1)
    assert cluster.call(1, abs, -1) == 1
    quiet(cluster)
    assert (chip.PEND, chip.read("rows", 1, 0)) == (0, before)
    assert chip.MASK >> resched & 1, "as after power-on"
    assert chip.map_vp(resched) == 1, "the map is the machine's"
    wedge(chip, resched)
    quiet(cluster)
    assert chip.read("rows", 1, 0) == before + 1


def test_a_killed_cpu_leaves_nothing_in_service(boot, eventually):
    cluster = boot(2, controller="mips-gic", idle="halt")
    chip, m = cluster.chip, cluster._machine

    def handler(irq):
        if not shmipi.shared("killed")[0]:
            shmipi.shared("killed")[0] = 1
            os.kill(os.getpid(), signal.SIGKILL)
        shmipi.shared("killed")[0] += 1

    killed = cluster.shared("killed", "i8", 1)
    with m.irq_lock():
        m.irq_request(VIRQ, handler, None)
    m.pic_write(0, "line_virq", FREE, VIRQ)
    chip.map_to_vp(FREE, 1)
    chip.write_gic_smask(FREE)
    wedge(chip, FREE)
    eventually(lambda: killed[0] == 1 and cluster.cpus[1].state == "dead")
    cluster.online(1)
    assert chip.in_service(1) == []
    wedge(chip, FREE)
    eventually(lambda: killed[0] == 2)


# ---- bad input -----------------------------------------------------------------------


@pytest.mark.parametrize("intr", [-1, 256, 1 << 20])
def test_bad_interrupts(machine, chip, intr):
    for use in (
        chip.write_gic_smask,
        chip.write_gic_rmask,
        chip.map_vp,
        lambda n: chip.map_to_vp(n, 0),
        lambda n: chip.route_line(n, None),
    ):
        with pytest.raises(IrqError, match=r"mips-gic: no interrupt") as caught:
            use(intr)
        assert (caught.value.errno, caught.value.domain) == (errno.EINVAL, "mips-gic")
    if intr > 0:
        with pytest.raises(IrqError, match=r"no interrupt"):
            wedge(chip, intr)


def test_bad_cpus(machine, chip):
    for use in (
        lambda: chip.map_to_vp(FREE, 3),
        lambda: chip.mp_ops.send_ipi_single(3, 1),
        lambda: chip.mp_ops.send_ipi_mask([0, 3], 1),
    ):
        with pytest.raises(IrqError, match="no CPU 3") as caught:
            use()
        assert (caught.value.errno, caught.value.cpu) == (errno.EINVAL, 3)
    with pytest.raises(shmipi.CpuOfflineError):
        machine._machine.pic_write(0, "route", FREE, 4)
    assert chip.map_vp(FREE) is None


@pytest.mark.parametrize("action", [0, 0x3, 0x4, 0x8, 0xC, 0x10])
def test_actions_that_the_generic_kernel_has_not(machine, chip, taken, action):
    for send in (
        lambda: chip.mp_ops.send_ipi_single(1, action),
        lambda: chip.mp_ops.send_ipi_mask([0, 1], action),
        lambda: chip.mp_ops.send_ipi_mask([], action),
    ):
        with pytest.raises(IrqError, match=r"mips-gic: action .*known are") as caught:
            send()
        assert caught.value.errno == errno.EINVAL
    quiet(machine)
    assert (taken(0), taken(1), taken(2)) == ([], [], [])
