"""The Arm GIC, versions 2 and 3: after arm/gic.c of kvm-unit-tests."""

import errno
import pickle
import time

import numpy as np
import psutil
import pytest

import shmipi
from shmipi import irq, smp
from shmipi.irq.chips import Gicv2, Gicv3
from shmipi.irq.chips.gic import (
    GICD_INT_DEF_PRI,
    GICV3_PRIO_NMI,
    INTID_SPURIOUS,
    IPI_CPU_BACKTRACE,
    IPI_CPU_STOP_NMI,
    IPI_KGDB_ROUNDUP,
    MAX_IPI,
)

NCPUS = 4
SENDER = 1
GICV3_PRIO_IRQ = 0xC0
SGI, OTHER = 8, 9


@pytest.fixture(scope="module")
def machines():
    """One machine for each version, for the module."""
    with (
        shmipi.Cluster(NCPUS, controller="gicv2", idle="halt") as v2,
        shmipi.Cluster(NCPUS, controller="gicv3", idle="halt") as v3,
    ):
        yield {"gicv2": v2, "gicv3": v3}


@pytest.fixture(params=["gicv2", "gicv3"])
def gic(machines, request):
    """Both versions, one after the other."""
    return machines[request.param]


@pytest.fixture
def v2(machines):
    return machines["gicv2"]


@pytest.fixture
def v3(machines):
    return machines["gicv3"]


@pytest.fixture
def taken(lines):
    """`taken(cluster)`: SGI 8 and 9 note in its arrays who took what, from whom."""

    def start(cluster, sender=SENDER):
        log = cluster.shared("log", "i8", (NCPUS, 64))
        here = {
            name: cluster.shared(name, "i8", NCPUS)
            for name in ("acked", "wrong_irq", "wrong_sender", "nlog")
        }
        for array in (log, *here.values()):
            array[:] = 0
        acked, wrong_irq, wrong_sender, nlog = here.values()
        banked = cluster.controller == "gicv2"

        def note(sgi):
            def handler(_):
                me = smp.smp_processor_id()
                chip = irq.chip()
                source = chip.sender(sgi) if banked else 0
                log[me, nlog[me]] = sgi | source << 10
                nlog[me] += 1
                wrong_irq[me] += sgi != SGI or chip.in_service(me) != [sgi]
                wrong_sender[me] += banked and source != sender
                acked[me] += 1  # last: who sees it sees the others

            return handler

        requested = lines(cluster)
        for sgi in (SGI, OTHER):
            requested.request(sgi, note(sgi))
        return Taken(log, **here)

    return start


class Taken:
    def __init__(self, log, acked, wrong_irq, wrong_sender, nlog):
        self.log, self.acked, self.nlog = log, acked, nlog
        self.wrong = (wrong_irq, wrong_sender)

    def of(self, cpu):
        """What a CPU took: SGI | sender << 10, in order."""
        return [int(n) for n in self.log[cpu, : self.nlog[cpu]]]


def prio(chip, sgi, priority, cpu=None):
    """Set the priority of one SGI by its register of four."""
    register = chip.gicd_ipriorityr if chip.banked else chip.gicr_ipriorityr
    shift = 8 * (sgi % 4)
    now = register(sgi // 4, cpu=cpu)
    register(sgi // 4, now & ~(0xFF << shift) | priority << shift, cpu)


def prio_of(chip):
    """The priority that the driver gives every SGI."""
    return GICD_INT_DEF_PRI if chip.banked else GICV3_PRIO_IRQ


def pmr(chip, value=None, cpu=None):
    return (chip.gicc_pmr if chip.banked else chip.icc_pmr_el1)(value, cpu)


def iar(chip, cpu):
    return (chip.gicc_iar if chip.banked else chip.icc_iar1_el1)(cpu)


# ---- gicv2-ipi, gicv3-ipi: self, target list, broadcast ------------------------------


def sgi_self(chip):
    if chip.banked:
        chip.gicd_sgir(2 << 24 | SGI)
    else:  # no shorthand for it: the own affinity
        chip.icc_sgi1r_el1(SGI << 24 | 1 << smp.smp_processor_id())


def sgi_list(chip):
    every_other = 0b0101 | 0xF0  # and four CPUs that do not exist
    if chip.banked:
        chip.gicd_sgir(every_other << 16 | SGI)
    else:
        chip.icc_sgi1r_el1(SGI << 24 | every_other)


def sgi_broadcast(chip):
    if chip.banked:
        chip.gicd_sgir(1 << 24 | 0xFF << 16 | SGI)  # the list means nothing then
    else:
        chip.icc_sgi1r_el1(SGI << 24 | 1 << 40)


@pytest.mark.parametrize(
    ("send", "to"),
    [(sgi_self, [SENDER]), (sgi_list, [0, 2]), (sgi_broadcast, [0, 2, 3])],
)
def test_ipi(gic, taken, settle, acked, eventually, send, to):
    got = taken(gic)
    before = gic.counters()["chip_writes"][SENDER]
    gic.run(lambda: send(irq.chip()), cpus=[SENDER])
    wanted = dict.fromkeys(to, 1)
    settle(lambda: got.acked, [wanted.get(cpu, 0) for cpu in range(NCPUS)])
    assert not acked(wanted, got.acked, *got.wrong)
    assert gic.counters()["chip_writes"][SENDER] == before + 1
    # It came with that number, and is not active any more.
    assert all(iar(gic.chip, cpu) & 0x3FF == SGI for cpu in to)
    eventually(lambda: all(gic.chip.in_service(cpu) == [] for cpu in range(NCPUS)))
    assert all(gic.chip.pending_lines(cpu) == [] for cpu in range(NCPUS))


def test_the_hosts_broadcast_is_to_all(gic, taken, settle):
    got = taken(gic)
    sgi_broadcast(gic.chip)
    settle(lambda: got.acked, [1] * NCPUS)
    if gic.chip.banked:  # in CPU 0's name, and says so
        assert all(got.of(cpu) == [SGI] for cpu in range(NCPUS))


def send_nothing_to_0(cluster):
    cluster.chip.mask_line(SGI, 0)
    cluster.run(lambda: sgi_list(irq.chip()), cpus=[SENDER])


def send_twice(cluster):
    cluster.run(lambda: sgi_list(irq.chip()), cpus=[SENDER])
    while iar(cluster.chip, 2) & 0x3FF != SGI or cluster.chip.in_service(2):
        pass
    cluster.run(lambda: irq.chip().raise_line(SGI, 2), cpus=[SENDER])


def send_to_3_too(cluster):
    cluster.run(lambda: irq.chip().raise_line(SGI, [0, 2, 3]), cpus=[SENDER])


def send_another(cluster):
    cluster.run(lambda: irq.chip().raise_line(SGI, 0), cpus=[SENDER])
    cluster.run(lambda: irq.chip().raise_line(OTHER, 2), cpus=[SENDER])


def send_in_another_name(cluster):
    cluster.run(lambda: irq.chip().raise_line(SGI, 0), cpus=[SENDER])
    cluster.run(lambda: irq.chip().raise_line(SGI, 2), cpus=[3])


@pytest.mark.parametrize(
    ("fault", "found", "counts"),
    [
        (send_nothing_to_0, {"missing": {0: 1}}, [0, 0, 1, 0]),
        (send_twice, {"extra": {2: 1}}, [1, 0, 2, 0]),
        (send_to_3_too, {"unexpected": {3: 1}}, [1, 0, 1, 1]),
        (send_another, {"wrong_irq": {2: 1}}, [1, 0, 1, 0]),
        (send_in_another_name, {"wrong_sender": {2: 1}}, [1, 0, 1, 0]),
    ],
)
def test_the_checker_tells_faults_apart(
    gic, taken, settle, acked, fault, found, counts
):
    """The same check as above, of machines where one thing is wrong."""
    if fault is send_in_another_name and not gic.chip.banked:
        found = {}  # GICv3 does not know who it was
    got = taken(gic)
    # The last acknowledge of CPU 2 is not one of SGI 8 that a test before this left.
    gic.run(lambda: irq.chip().raise_line(4, 2), cpus=[SENDER])
    settle(lambda: iar(gic.chip, 2) & 0x3FF, 4)
    fault(gic)
    settle(lambda: got.acked, counts)
    verdict = acked({0: 1, 2: 1}, got.acked, *got.wrong)
    assert {name: cpus for name, cpus in vars(verdict).items() if cpus} == found
    gic.chip.unmask_line(SGI, 0)
    settle(lambda: got.acked[0], 1)


# ---- active, priorities, PMR ---------------------------------------------------------


def test_active_until_its_handler_has_returned(gic, lines, settle):
    """gicv2-active, gicv3-active: cleared by ICACTIVER, by EOIR, or by the core."""
    seen = gic.shared("seen", "i8", (3, 4))
    seen[:] = -1
    banked = gic.chip.banked

    def handler(_):
        chip, me = irq.chip(), smp.smp_processor_id()
        active = chip.gicd_icactiver if banked else chip.gicr_icactiver0
        running = chip.gicc_rpr if banked else chip.icc_rpr_el1
        before = active(), running()
        if me == 0:
            active(1 << SGI)
        elif me == 1 and banked:
            chip.gicc_eoir(iar(chip, me))
        elif me == 1:
            chip.icc_eoir1_el1(SGI)
        seen[me] = [*before, active(), running()]

    lines(gic).request(SGI, handler)
    for _ in range(2):  # the second: it is taken again after either
        seen[:] = -1
        gic.chip.raise_line(SGI, [0, 1, 2])
        busy, idle = [1 << SGI, prio_of(gic.chip)], [0, 0xFF]
        only_running = [0, prio_of(gic.chip)]
        settle(lambda: seen, [busy + only_running, busy + idle, busy + busy])
        settle(lambda: [gic.chip.in_service(cpu) for cpu in range(3)], [[], [], []])


def test_only_eoir_drops_the_running_priority(gic, lines, settle):
    """ICACTIVER deactivates, and RPR stays; sent once more, it is taken after EOIR."""
    mine = gic.shared("drops", "i8", 5)
    mine[:] = 0
    banked = gic.chip.banked

    def handler(_):
        chip, me = irq.chip(), smp.smp_processor_id()
        mine[0] += 1
        if mine[0] > 1:
            return
        running = chip.gicc_rpr if banked else chip.icc_rpr_el1
        (chip.gicd_icactiver if banked else chip.gicr_icactiver0)(1 << SGI)
        chip.raise_line(SGI, me, 1)
        mine[1] = len(chip.in_service(me))
        mine[2] = running()
        mine[3] = mine[0]
        if banked:
            chip.gicc_eoir(chip.gicc_iar())
        else:
            chip.icc_eoir1_el1(SGI)
        mine[4] = running()

    lines(gic).request(SGI, handler)
    gic.chip.raise_line(SGI, 1)
    settle(lambda: mine, [2, 0, prio_of(gic.chip), 1, 0xFF])
    settle(lambda: gic.chip.in_service(1), [])
    assert gic.chip.read("running", 1) == 0


def test_the_priorities_are_the_drivers(gic):
    """irq-gic.c: 0xa0 each; irq-gic-v3.c since 6.11: 0xc0, and 0x80 for pseudo-NMIs."""
    wanted = 0xA0 if gic.chip.banked else 0xC0
    assert [gic.chip.priority(sgi, 1) for sgi in range(16)] == [wanted] * 16
    gic.offline(1)
    gic.online(1)  # gic_cpu_config, once more
    assert gic.chip.priority(SGI, 1) == wanted


@pytest.mark.parametrize("handler", ["python", "native"])
def test_it_is_pending_again_while_active_and_taken_once_more(
    gic, lines, settle, eventually, handler
):
    """Ten sent while its handler runs are one, after it; GICv2: one of each sender."""
    n = gic.shared("again", "i8", 4)
    n[:] = 0

    def slow(_):
        n[0] += 1
        n[1] = 1
        while n[1] and n[0] == 1:
            pass

    requested = lines(gic)
    requested.request(SGI, slow)
    gic.chip.raise_line(SGI, 2)
    eventually(lambda: n[1])
    if handler == "native":  # behind the same active interrupt, by priority
        requested.request(OTHER, smp.NativeHandler("count"), n[3:])
        gic.chip.raise_line(OTHER, 2)
    for _ in range(10):
        gic.chip.raise_line(SGI, 2)
        gic.call(3, lambda: irq.chip().raise_line(SGI, 2))
    assert gic.chip.pending_lines(2)[0] == SGI
    assert gic.chip.in_service(2) == [SGI]
    assert n[[0, 3]].tolist() == [1, 0]
    n[1] = 0
    settle(lambda: n[[0, 3]], [3 if gic.chip.banked else 2, handler == "native"])


def test_active_while_its_handler_waits_for_the_interpreter(
    gic, taken, settle, stuck, eventually
):
    """Equal priorities wait behind it; a higher one is taken, and runs after it."""
    got, n = taken(gic), gic.chip
    free = stuck(gic, 2)
    prio(n, OTHER, 0x40, 2)
    while n.in_service(2) != [SGI]:  # the first may come just before it is stuck
        got.nlog[2] = 0
        gic.call(SENDER, lambda: irq.chip().raise_line(SGI, 2))
        eventually(lambda: n.in_service(2) == [SGI] or got.nlog[2])
    for cpu in (SENDER, 3):  # once more: pending beside active
        gic.call(cpu, lambda: irq.chip().raise_line(SGI, 2))
    reschedules = gic.counters()["irq_resched"][2]
    n.arch_smp_send_reschedule(2)
    gic.call(SENDER, lambda: irq.chip().raise_line(OTHER, 2))
    eventually(lambda: n.in_service(2) == [SGI, OTHER])
    assert n.pending_lines(2) == [0, SGI]
    assert gic.counters()["irq_resched"][2] == reschedules
    running = n.gicc_rpr if n.banked else n.icc_rpr_el1
    assert running(2) == 0x40
    free()
    times = [SGI, OTHER, *[SGI] * (2 if n.banked else 1)]
    settle(lambda: [sgi & 0x3FF for sgi in got.of(2)], times)
    settle(lambda: gic.counters()["irq_resched"][2], reschedules + 1)
    if n.banked:
        assert [sgi >> 10 for sgi in got.of(2)] == [SENDER, SENDER, SENDER, 3]
    eventually(lambda: n.in_service(2) == [])
    prio(n, OTHER, prio_of(n), 2)


def test_highest_priority_first_then_the_least_number(gic, taken, held):
    got = taken(gic)
    order = []
    for first, second in ((0x40, 0xA0), (0xA0, 0x40), (0xA0, 0xA0)):
        got.nlog[:] = 0
        task = held(gic, 2, lambda: None, lambda: got.of(2))
        prio(gic.chip, SGI, first, 2)
        prio(gic.chip, OTHER, second, 2)
        for sgi in (OTHER, SGI):
            gic.chip.raise_line(sgi, 2)
        before, after = task.release()
        assert before == []
        order.append(after)
    assert order == [[SGI, OTHER], [OTHER, SGI], [SGI, OTHER]]


def test_pmr_holds_back_and_lets_through(gic, taken):
    """Only what is above it in priority: equal is not above."""
    got = taken(gic)

    def task():
        chip, me = irq.chip(), smp.smp_processor_id()
        prio(chip, SGI, 0x80)
        prio(chip, OTHER, 0x40)
        seen = []
        seen.append(pmr(chip, 0x40))
        chip.raise_line(SGI, me)
        chip.raise_line(OTHER, me)
        for mask in (0x40, 0x41, 0x80, 0x81):
            pmr(chip, mask)
            seen.append((got.of(me), chip.pending_lines(me)))
        pmr(chip, 0xFF)
        # What never gets through, and what a change of its priority lets through.
        prio(chip, SGI, 0xFF)
        chip.raise_line(SGI, me)
        seen.append(chip.pending_lines(me))
        prio(chip, SGI, 0xFE)
        seen.append(chip.pending_lines(me))
        prio(chip, SGI, prio_of(chip))
        prio(chip, OTHER, prio_of(chip))
        return seen

    # GICv2: its own CPU's name; it is CPU 0, so that the log is of bare numbers.
    [seen] = gic.run(task, cpus=[0])
    assert seen == [
        0x40,
        ([], [SGI, OTHER]),
        ([OTHER], [SGI]),
        ([OTHER], [SGI]),
        ([OTHER, SGI], []),
        [SGI],
        [],
    ]
    assert got.of(0) == [OTHER, SGI, SGI]


def test_masked_before_it_was_taken_is_spurious(gic, taken, held):
    """Signalled, then masked by PMR: the acknowledge reads 1023, the SGI is kept."""
    got = taken(gic)
    spurious = gic.counters()["irq_spurious"][2]

    def work():
        pmr(irq.chip(), 0x10)

    task = held(gic, 2, work, lambda: got.of(2))
    gic.chip.raise_line(SGI, 2)
    assert task.release() == ([], [])
    assert gic.counters()["irq_spurious"][2] == spurious + 1
    assert iar(gic.chip, 2) == INTID_SPURIOUS
    assert gic.chip.pending_lines(2) == [SGI]
    gic.run(lambda: pmr(irq.chip(), 0xFF), cpus=[2])
    assert got.of(2) == [SGI]
    assert gic.counters()["irq_spurious"][2] == spurious + 1


def test_none_is_lost_while_pmr_goes_up_and_down(gic, lines):
    rounds = 100
    n = gic.shared("pmr", "i8", 3)
    n[:] = 0
    lines(gic).request(SGI, smp.NativeHandler("count"), n)

    def task():
        chip = irq.chip()
        if smp.smp_processor_id() == 2:
            while not n[1]:
                pmr(chip, prio_of(chip))
                pmr(chip, 0xFF)
            return None
        try:
            for turn in range(1, rounds + 1):
                chip.raise_line(SGI, 2)
                end = time.monotonic() + 5
                while n[0] < turn:
                    if time.monotonic() > end:
                        return turn
            return rounds
        finally:
            n[1] = 1

    assert gic.run(task, cpus=[0, 2]) == [rounds, None]
    assert n[0] == rounds


def test_system_ipis_have_priorities_too(gic, taken):
    """A reschedule held back by PMR; a call is not lost, whatever its line does."""
    before = gic.counters()["irq_resched"][3]

    def task():
        pmr(irq.chip(), 0x20)
        irq.chip().arch_smp_send_reschedule(3)
        return irq.chip().pending_lines(3)

    assert gic.run(task, cpus=[3]) == [[0]]
    assert gic.call(3, abs, -4, timeout=5) == 4
    assert gic.counters()["irq_resched"][3] == before
    gic.run(lambda: pmr(irq.chip(), 0xFF), cpus=[3])
    assert gic.counters()["irq_resched"][3] == before + 1


# ---- ISENABLER, ICENABLER ------------------------------------------------------------


def test_a_masked_sgi_wakes_nobody_and_fires_once(gic, taken, settle, eventually):
    got, chip = taken(gic), gic.chip
    mask = chip.gicd_icenabler if chip.banked else chip.gicr_icenabler0
    unmask = chip.gicd_isenabler if chip.banked else chip.gicr_isenabler0
    both = 1 << SGI | 1 << OTHER
    assert unmask(cpu=2) == 0xFF | both
    assert mask(1 << SGI, cpu=2) == 0xFF | 1 << OTHER
    eventually(lambda: gic.cpus[2].state == "halted")
    # It is counted when it has that state, and before it sleeps.
    eventually(lambda: psutil.Process(gic.cpus[2].pid).status() == "sleeping")
    halts = gic.counters()["halts"][2]
    for _ in range(5):
        chip.raise_line(SGI, 2)
    settle(lambda: chip.pending_lines(2), [SGI])
    assert gic.counters()["halts"][2] == halts  # it slept through it
    assert got.of(2) == []
    assert unmask(1 << SGI, cpu=2) == 0xFF | both
    settle(lambda: got.acked, [0, 0, 1, 0])
    assert chip.pending_lines(2) == []


# ---- banks ---------------------------------------------------------------------------


def test_senders_are_apart_in_v2_and_one_in_v3(gic, taken, held):
    got = taken(gic)
    task = held(gic, 2, lambda: None, lambda: got.of(2))
    for cpu in (3, 0, 0, 3):  # twice from each: still one each
        gic.call(cpu, lambda: irq.chip().raise_line(SGI, 2))
    if gic.chip.banked:
        assert gic.chip.gicd_spendsgir(SGI // 4, cpu=2) == 0b1001
        assert task.release() == ([], [SGI | 0 << 10, SGI | 3 << 10])
        assert gic.chip.gicc_iar(2) == SGI | 3 << 10
    else:
        assert gic.chip.gicr_ispendr0(cpu=2) == 1 << SGI
        assert task.release() == ([], [SGI])
        assert gic.chip.icc_iar1_el1(2) == SGI


def test_pending_bits_can_be_written(v2, v3, taken, held):
    got = taken(v2)
    task = held(v2, 2, lambda: None, lambda: got.of(2))
    # SGI 9 of CPUs 1 and 3, SGI 8 of CPU 2; then 9 of 3 is taken back.
    assert v2.chip.gicd_spendsgir(2, 0b1010 << 8 | 0b0100, cpu=2) == 0x0A04
    assert v2.chip.gicd_cpendsgir(2, 0b1000 << 8, cpu=2) == 0x0204
    assert v2.chip.pending_lines(2) == [SGI, OTHER]
    assert task.release() == ([], [SGI | 2 << 10, OTHER | 1 << 10])

    got = taken(v3)
    task = held(v3, 2, lambda: None, lambda: got.of(2))
    assert v3.chip.gicr_ispendr0(1 << SGI | 1 << OTHER, cpu=2) == 0x300
    assert v3.chip.gicr_icpendr0(1 << SGI, cpu=2) == 0x200
    assert task.release() == ([], [OTHER])


def test_written_pending_bits_reach_a_halted_cpu(v2, v3, taken, settle, eventually):
    for gic in (v2, v3):
        got = taken(gic)
        eventually(lambda gic=gic: gic.cpus[3].state == "halted")
        if gic is v2:
            gic.chip.gicd_spendsgir(SGI // 4, 1 << SENDER, cpu=3)
        else:
            gic.chip.gicr_ispendr0(1 << SGI, cpu=3)
        settle(lambda got=got: got.acked, [0, 0, 0, 1])


def test_every_sgi_of_every_source_is_where_the_bank_says(v2):
    """The packing of 16 SGIs x 4 sources, against the acknowledges."""
    chip = v2.chip
    for sgi in range(8, 16):  # not enabled here: they stay pending
        for source in range(NCPUS):
            bit = 1 << 8 * (sgi % 4) + source
            assert chip.gicd_spendsgir(sgi // 4, bit, cpu=1) == bit
            assert chip.pending_lines(1) == [sgi]
            assert chip.gicd_spendsgir(5 - sgi // 4, cpu=1) == 0
            assert chip.gicd_cpendsgir(sgi // 4, bit, cpu=1) == 0
    assert chip.pending_lines(1) == []


def test_two_senders_at_full_speed_lose_nothing(gic, lines, settle):
    """Each sends the next only when its last was taken: every one of them counts."""
    rounds = 400
    n = gic.percpu("sent", "i8", 2)
    n[:] = 0
    banked = gic.chip.banked

    def handler(sgi):
        def count(_):
            if banked:
                n[irq.chip().sender(sgi), 0] += 1
            else:
                n[sgi - SGI, 0] += 1

        return count

    requested = lines(gic)
    requested.request(SGI, handler(SGI))
    requested.request(OTHER, handler(OTHER))

    def send():
        me = smp.smp_processor_id()
        for turn in range(rounds):
            while n[me, 0] < turn:
                pass
            # GICv2: one SGI of two senders; GICv3, where they would be one: two SGIs.
            irq.chip().raise_line(SGI if banked else SGI + me, 2)
            n[me, 1] += 1

    gic.run(send, cpus=[0, 1])
    settle(lambda: n[:2, 0], [rounds, rounds])


# ---- the kernel's names --------------------------------------------------------------


def rows_of(cluster):
    return {label: counts for label, _, counts in cluster._counters.interrupts()}


def test_each_ipi_is_counted_in_its_row(gic, settle, eventually):
    def counts():
        rows = rows_of(gic)
        return [[int(n) for n in rows[f"IPI{ipi}"]] for ipi in range(MAX_IPI)]

    def left():
        return gic.chip.pending_lines(0) + gic.chip.pending_lines(3)

    before = np.array(counts())
    for ipi in range(MAX_IPI):
        for _ in range(ipi + 1):
            gic.chip.smp_cross_call([0, 3], ipi)
            eventually(lambda: not left())
    each = [[ipi + 1, 0, 0, ipi + 1] for ipi in range(MAX_IPI)]
    settle(lambda: np.array(counts()) - before, each)
    text = gic.interrupts().splitlines()
    assert [line.split(":")[0].strip() for line in text[1:9]] == [
        f"IPI{n}" for n in range(MAX_IPI)
    ]


def test_arch_functions(gic, settle):
    def counts():
        now = gic.counters()
        return np.array([now["irq_resched"], now["irq_call"]])

    before, queued = counts(), gic.counters()["csd_queued"].sum()
    gic.chip.arch_smp_send_reschedule(3)
    gic.chip.arch_send_call_function_single_ipi(1)
    gic.chip.arch_send_call_function_ipi_mask([2, 3])
    settle(lambda: counts() - before, [[0, 0, 0, 1], [0, 1, 1, 1]])
    assert gic.counters()["csd_queued"].sum() == queued  # an IPI, and nothing queued


@pytest.mark.parametrize("ipi", [-1, MAX_IPI, 99])
def test_unknown_ipi_message(gic, ipi):
    """Proves row 40."""
    with pytest.raises(shmipi.IrqError, match="no IPI message") as caught:
        gic.chip.smp_cross_call([1], ipi)
    assert (caught.value.errno, caught.value.domain) == (errno.EINVAL, gic.controller)


def test_an_sgi_that_nobody_handles_is_reported(gic, settle):
    """The kernel's "Unknown IPI message" at the receiver."""
    before = gic.counters()["irq_other"]
    gic.chip.unmask_line(15, 1)
    gic.chip.raise_line(15, 1)
    settle(lambda: gic.counters()["irq_other"] - before, [0, 1, 0, 0])
    gic.chip.mask_line(15, 1)


# ---- pseudo-NMI ----------------------------------------------------------------------


def test_pseudo_nmis_are_not_masked(boot, held, settle):
    cluster = boot(3, controller=Gicv3(pseudo_nmi=True), idle="halt")
    chip = cluster.chip
    nmis = (IPI_CPU_STOP_NMI, IPI_CPU_BACKTRACE, IPI_KGDB_ROUNDUP)
    assert [ipi for ipi in range(16) if chip.ipi_should_be_nmi(ipi)] == list(nmis)
    assert [chip.priority(ipi, 1) for ipi in nmis] == [GICV3_PRIO_NMI] * 3
    task = held(cluster, 1, lambda: None, lambda: None)
    for sent, ipi in enumerate(nmis, 1):
        chip.smp_cross_call([1], ipi)
        settle(lambda: cluster.counters()["nmi"], [0, sent, 0])
    assert rows_of(cluster)["NMI"].tolist() == [0, 3, 0]
    # A normal one to the same CPU is held up.
    chip.smp_cross_call([1], 4)
    settle(lambda: rows_of(cluster)["IPI4"], [0, 0, 0])
    task.release()
    settle(lambda: rows_of(cluster)["IPI4"], [0, 1, 0])
    with pytest.raises(shmipi.IrqError, match="is not a pseudo-NMI"):
        prio(chip, SGI, GICV3_PRIO_NMI, 1)
    with pytest.raises(shmipi.IrqError, match="is a pseudo-NMI"):
        chip.gicr_ipriorityr(0, 0xA0A0A0A0, 1)
    with pytest.raises(shmipi.IrqError, match="smp_cross_call"):
        chip.gicr_ispendr0(1 << IPI_CPU_BACKTRACE, 1)
    prio(chip, 4, 0x90, 1)  # next to an NMI in its register
    assert chip.gicr_ipriorityr(1, cpu=1) == 0x8080C090


def test_without_them_a_backtrace_is_a_normal_ipi(gic, held, settle):
    """Silently: ipi_should_be_nmi() is false, and interrupts off hold it up.

    Proves row 51.
    """
    before = gic.counters()["nmi"]
    row = rows_of(gic)["IPI6"]
    assert not any(gic.chip.ipi_should_be_nmi(ipi) for ipi in range(MAX_IPI))
    task = held(gic, 1, lambda: None, lambda: None)
    gic.chip.smp_cross_call([1], IPI_CPU_BACKTRACE)
    gic.chip.send_nmi(1)
    settle(lambda: gic.counters()["nmi"] - before, [0] * NCPUS)
    task.release()
    settle(lambda: gic.counters()["nmi"] - before, [0, 1, 0, 0])
    assert (rows_of(gic)["IPI6"] - row).tolist() == [0, 1, 0, 0]


# ---- affinity ------------------------------------------------------------------------


def test_affinity_routing_beyond_one_target_list(boot, settle):
    """34 CPUs in clusters of 32: Aff1 and the range selector are needed."""
    cluster = boot(34, controller=Gicv3(aff0=32), idle="halt")
    chip = cluster.chip
    assert [chip.mpidr(cpu) for cpu in (0, 17, 33)] == [
        (0, 0, 0, 0),
        (0, 0, 0, 17),
        (0, 0, 1, 1),
    ]

    def at(value):
        before = rows_of(cluster)["IPI4"]
        chip.icc_sgi1r_el1(4 << 24 | value)
        wanted = {
            0b101: [0, 2],
            1 << 44 | 0b10: [17],
            1 << 16 | 0b111: [32, 33],  # and one that does not exist
            1 << 16 | 1 << 44 | 1: [],  # Aff0 16 of a cluster that has 2
            2 << 16 | 1: [],
            2 << 44 | 1: [],  # Aff0 32: beyond the cluster
            1 << 32 | 1: [],
            1 << 48 | 1: [],
            0: [],
        }[value]
        counts = np.isin(np.arange(34), wanted).astype(int)
        settle(lambda: rows_of(cluster)["IPI4"] - before, counts)
        return len(wanted)

    reached = [
        at(value)
        for value in (
            0b101,
            1 << 44 | 0b10,
            1 << 16 | 0b111,
            1 << 16 | 1 << 44 | 1,
            2 << 16 | 1,
            2 << 44 | 1,
            1 << 32 | 1,
            1 << 48 | 1,
            0,
        )
    ]
    assert reached == [2, 1, 2, 0, 0, 0, 0, 0, 0]
    # One write for each target list, as gic_compute_target_list() has them.
    before = cluster.host_counters()["chip_writes"]
    chip.smp_cross_call([0, 1, 15, 16, 31, 32, 33], 4)
    assert cluster.host_counters()["chip_writes"] == before + 3


# ---- what cannot be ------------------------------------------------------------------


def test_gicv2_has_eight_cpus(boot):
    with pytest.raises(ValueError, match="gicv2 can address 8 CPUs, not 9"):
        shmipi.Cluster(9, controller="gicv2")
    cluster = boot(8, controller="gicv2", idle="halt")
    assert [cluster.call(cpu, smp.smp_processor_id) for cpu in range(8)] == [*range(8)]
    # CPU 7's bit of a bank, and its name in an acknowledge.
    cluster.call(7, lambda: irq.chip().gicd_sgir(1 << 16 + 6 | 15))
    assert cluster.chip.gicd_spendsgir(3, cpu=6) == 0x80 << 24
    with pytest.raises(ValueError, match="aff0"):
        Gicv3(aff0=20)
    with pytest.raises(ValueError, match="can address 256 CPUs"):
        Gicv3(aff0=1).check(257)
    Gicv3().check(4096)


BAD = {
    "gicv2": [
        (lambda chip: chip.raise_line(16, [1]), "no SGI 16"),
        (lambda chip: chip.raise_line(-1, [1]), "no SGI -1"),
        (lambda chip: chip.gicd_sgir(2 << 24 | 16), "GICD_SGIR"),
        (lambda chip: chip.gicd_sgir(3 << 24 | 1), "filter 3"),
        (lambda chip: chip.gicd_sgir(1 << 26), "GICD_SGIR"),
        (lambda chip: chip.gicd_spendsgir(4, cpu=0), "GICD_SPENDSGIR4"),
        (lambda chip: chip.gicd_spendsgir(0, 1 << 4, cpu=0), "no bits 0x10"),
        (lambda chip: chip.gicd_isenabler(1 << 16, cpu=0), "GICD_ISENABLER0"),
        (lambda chip: chip.gicd_ipriorityr(4, cpu=0), "GICD_IPRIORITYR4"),
        (lambda chip: chip.gicd_isenabler(cpu=NCPUS), f"no CPU {NCPUS}"),
        (lambda chip: chip.sender(16, 0), "no SGI 16"),
    ],
    "gicv3": [
        (lambda chip: chip.raise_line(16, [1]), "no SGI 16"),
        (lambda chip: chip.icc_sgi1r_el1(16 << 24 | 1), "ICC_SGI1R_EL1"),
        (lambda chip: chip.icc_sgi1r_el1(1 << 56), "ICC_SGI1R_EL1"),
        (lambda chip: chip.gicr_ispendr0(1 << 16, cpu=0), "GICR_ISPENDR0"),
        (lambda chip: chip.gicr_icenabler0(cpu=-1), "no CPU -1"),
    ],
}


def test_bad_input(gic):
    name = gic.controller
    for work, text in BAD[name]:
        with pytest.raises(shmipi.IrqError, match=text) as caught:
            work(gic.chip)
        assert (caught.value.errno, caught.value.domain) == (errno.EINVAL, name)
    assert all(gic.chip.pending_lines(cpu) == [] for cpu in range(NCPUS))


def test_registers_of_a_cpu_are_not_the_hosts(gic):
    for work in (
        lambda: pmr(gic.chip),
        lambda: pmr(gic.chip, 0x80, 1),
        lambda: prio(gic.chip, SGI, 0x80),
        lambda: gic.chip.gicd_sgir(2 << 24) if gic.chip.banked else gic.chip.cpu(),
    ):
        with pytest.raises(shmipi.ClusterStateError, match="the host is no CPU"):
            work()

    def task():
        chip, said = irq.chip(), []
        eoi = chip.gicc_eoir if chip.banked else chip.icc_eoir1_el1
        for work in (
            lambda: pmr(chip, 0x80, 2),
            lambda: eoi(27),
            lambda: eoi(INTID_SPURIOUS),
            lambda: eoi(SGI),  # not active: ignored
        ):
            try:
                said.append(work())
            except shmipi.IrqError as error:
                said.append(str(error).split(": ")[1])
        return said

    pmr_name, eoir_name = (
        ("GICC_PMR", "GICC_EOIR")
        if gic.chip.banked
        else ("ICC_PMR_EL1", "ICC_EOIR1_EL1")
    )
    assert gic.run(task, cpus=[1]) == [
        [f"{pmr_name} is written by its own CPU", eoir_name, None, None]
    ]


def test_chips_travel():
    """To the firmware, by pickle, with their options."""
    chip = pickle.loads(pickle.dumps(Gicv3(pseudo_nmi=True, aff0=32)))
    assert (chip.pseudo_nmi, chip.aff0, chip.group) == (True, 32, 16)
    assert chip.rows[-1].label == "NMI"
    assert Gicv2().rows[-1].label == "IPI7"
