"""The local APIC, as software finds it: ICR, IRR, ISR, TPR, EOI, NMI, INIT and STARTUP.

After kvm-unit-tests' ``x86/apic.c``, ``x86/eventinj.c`` and ``x86/smptest.c``, and the
kernel's ``xapic_ipi_test``; what those leave out, such as the sum of single-target
cluster IPIs, is counted here.
"""

import errno
import itertools
import os
import signal
import time

import pytest

import shmipi
from shmipi import (
    Cluster,
    ClusterStateError,
    CpuDiedError,
    CpuMask,
    IrqError,
    ShmipiWarning,
    smp,
)
from shmipi.irq import chip as this_chip
from shmipi.irq.chips import apic
from shmipi.irq.chips.apic import (
    APIC_DEST_ALLBUT,
    APIC_DEST_ALLINC,
    APIC_DEST_LOGICAL,
    APIC_DEST_SELF,
    APIC_DM_EXTINT,
    APIC_DM_INIT,
    APIC_DM_LOWEST,
    APIC_DM_NMI,
    APIC_DM_REMRD,
    APIC_DM_SMI,
    APIC_DM_STARTUP,
    APIC_EOI,
    APIC_ESR,
    APIC_ESR_SENDILL,
    APIC_ICR,
    APIC_ICR2,
    APIC_INT_ASSERT,
    APIC_INT_LEVELTRIG,
    APIC_IRR,
    APIC_ISR,
    APIC_LDR,
    APIC_SELF_IPI,
    Apic,
)

APIC_ESR_REDIR = 0x10
VECTOR = 0xA5
INIT = APIC_DM_INIT | APIC_INT_ASSERT

_virqs = itertools.count(1)
_kept = []


# ---- machines, and vectors with a handler --------------------------------------------


@pytest.fixture(scope="module")
def x2apic():
    with Cluster(3, idle="halt", controller=Apic("x2apic")) as made:
        yield made


@pytest.fixture(params=["xapic", "x2apic"])
def either(request, cluster, x2apic):
    """Three CPUs that halt, in each of the modes."""
    made = cluster if request.param == "xapic" else x2apic
    assert made.chip.mode == request.param
    return made


@pytest.fixture
def on_vector():
    """`on_vector(cluster, vector, handler, info)`: as an IPI domain will do it."""
    taken = []

    def request(where, vector, handler, info=None):
        machine, virq = where._machine, next(_virqs)
        _kept.append(handler)
        with machine.irq_lock():
            machine.irq_request(virq, handler, info)
        machine.pic_write(0, "line_virq", vector, virq)
        taken.append((where, vector, virq))
        for cpu in range(where.ncpus):
            machine.irq_enable_line(cpu, vector, True)
        return virq

    yield request
    for where, vector, virq in taken:
        if where.closed:
            continue
        machine = where._machine
        for cpu in range(where.ncpus):
            machine.irq_enable_line(cpu, vector, False)
        machine.pic_write(0, "line_virq", vector, 0)
        machine.irq_free(virq)


@pytest.fixture
def counted(on_vector, eventually):
    """`counted(cluster, vector)`: a function that says how often each CPU took it.

    It looks when nothing is pending or in service any more, so what it says is final.
    """

    def start(where, vector=VECTOR):
        on_vector(where, vector, smp.NativeHandler("noop"))
        machine, word, bit = where._machine, vector // 64, 1 << vector % 64
        before = where.counters()["irq_handled"]

        def quiet():
            return not any(
                machine.pic_read(cpu, register, word) & bit
                for cpu in range(where.ncpus)
                for register in ("irr", "isr")
            )

        def look():
            eventually(quiet)
            return (where.counters()["irq_handled"] - before).astype(int).tolist()

        return look

    return start


def on(where, cpu, func, *args):
    """Run it as a task of a CPU, where handlers interrupt it."""
    return where.run(func, *args, cpus=[cpu])[0]


# No assert and no pytest.raises where a CPU runs it: they need all of pytest there.


def until(condition, seconds=5.0):
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            raise TimeoutError("it did not happen")
        time.sleep(0)


def refusal(func, *args):
    """Return the errno and the words of the IrqError that it raises, or None."""
    try:
        func(*args)
    except IrqError as error:
        return error.errno, str(error)
    return None


def asleep(where, eventually):
    """Wait until all have taken what was sent and are halted, not polling or rung."""
    halted = 3  # enum shi_state
    eventually(
        lambda: all(
            where._machine.slot(cpu).state == halted
            for cpu in range(where.ncpus)
            if where.chip.is_online(cpu)
        )
    )


# ---- which chip it is ----------------------------------------------------------------


def test_the_mode_is_chosen_by_the_number_of_cpus():
    assert Apic().mode == "auto"
    assert Apic().for_cpus(255).mode == "xapic"
    assert Apic().for_cpus(256).mode == "x2apic"
    assert Apic("x2apic").for_cpus(2).mode == "x2apic"
    assert Apic("xapic").for_cpus(255).mode == "xapic"
    assert Apic(destination="flat").for_cpus(8).mode == "xapic"
    assert Apic(destination="cluster").for_cpus(20).mode == "x2apic"
    groups = [
        chip.for_cpus(8).group
        for chip in (
            Apic(),
            Apic(destination="flat"),
            Apic("xapic", "cluster"),
            Apic(destination="cluster"),
        )
    ]
    assert groups == [1, 8, 4, 16]


@pytest.mark.parametrize(
    ("chip", "ncpus", "words"),
    [
        (Apic(destination="flat"), 9, "8 CPUs, not 9.*physical"),
        (Apic("xapic"), 256, "255 CPUs, not 256.*x2apic"),
        (Apic("xapic", "cluster"), 61, "60 CPUs.*not 61.*x2apic"),
    ],
)
def test_more_cpus_than_it_can_address(chip, ncpus, words):
    chip.for_cpus(ncpus - 1)
    with pytest.raises(ValueError, match=words):
        chip.for_cpus(ncpus)
    with pytest.raises(ValueError, match=words):
        Cluster(ncpus, controller=chip)


def test_what_there_is_no_apic_of():
    with pytest.raises(ValueError, match="no logical flat mode"):
        Apic("x2apic", "flat")
    with pytest.raises(ValueError, match="choose 'auto', 'xapic' or 'x2apic'"):
        Apic("pic")
    with pytest.raises(ValueError, match="'physical', 'flat' or 'cluster'"):
        Apic(destination="round")


@pytest.mark.alone
def test_x2apic_by_itself_above_255_cpus(boot, counted):
    cluster = boot(260, idle="halt")
    chip = cluster.chip
    assert chip.mode == "x2apic"
    assert chip.read_register(apic.APIC_ID, 259) == 259
    taken = counted(cluster)
    chip.write_icr(VECTOR, 0xFF)  # a CPU's id here, and no broadcast
    chip.write_icr(VECTOR, 259)
    chip.write_icr(VECTOR, 260)
    assert taken() == [int(cpu in (255, 259)) for cpu in range(260)]
    chip.write_icr(VECTOR, 0xFFFFFFFF)
    assert sum(taken()) == 262


# ---- to whom -------------------------------------------------------------------------


def test_self_ipi_is_taken_exactly_once(either, on_vector):
    n = either.shared("self", "i8", 1)
    n[:] = 0
    on_vector(either, VECTOR, smp.NativeHandler("count"), n)

    def task():
        chip, me = this_chip(), smp.smp_processor_id()
        ways = [
            lambda: chip.apic_send_IPI_self(VECTOR),
            lambda: chip.write_icr(VECTOR | APIC_DEST_SELF),
            lambda: chip.write_icr(VECTOR, me),
        ]
        if chip.x2apic:
            ways.append(lambda: chip.write(APIC_SELF_IPI, VECTOR))
        seen = []
        for turn in range(200):
            ways[turn % len(ways)]()
            until(lambda turn=turn: n[0] != turn)
            seen.append(int(n[0]))
        return seen, chip.read_irr(me), chip.read_isr(me)

    assert on(either, 1, task) == (list(range(1, 201)), 0, 0)
    assert n[0] == 200


def test_broadcasts_are_taken_by_each_exactly_once(either, counted):
    """Proves row 46."""
    taken = counted(either)
    everyone = 0xFFFFFFFF if either.chip.x2apic else 0xFF

    def send(low, dest=0):
        this_chip().write_icr(low, dest)

    on(either, 0, send, VECTOR, everyone)
    assert taken() == [1, 1, 1], "the sender too"
    on(either, 1, send, VECTOR | APIC_DEST_ALLINC)
    assert taken() == [2, 2, 2], "the sender too"
    on(either, 1, send, VECTOR | APIC_DEST_ALLBUT)
    assert taken() == [3, 2, 3]
    on(either, 2, send, VECTOR | APIC_DEST_LOGICAL, everyone)
    assert taken() == [4, 3, 4]
    either.chip.write_icr(VECTOR | APIC_DEST_ALLBUT)  # the host is none of them
    assert taken() == [5, 4, 5]


def test_targets_that_do_not_exist_ignore_it(either, counted):
    taken = counted(either)
    chip = either.chip
    for dest in range(3, 255):
        chip.write_icr(VECTOR, dest)
    for dest in (0x30001, 0xFFFF0001, 0xFFFF) if chip.x2apic else range(1, 255):
        # x2APIC: clusters without CPUs, and CPUs; xAPIC, physical: no logical ids.
        chip.write_icr(VECTOR | APIC_DEST_LOGICAL, dest)
    assert taken() == ([1, 1, 1] if chip.x2apic else [0, 0, 0])


def test_logical_flat_exhaustively(boot, counted):
    """Proves row 45."""
    cluster = boot(8, idle="halt", controller=Apic(destination="flat"))
    chip = cluster.chip
    assert [chip.read_ldr(cpu) >> 24 for cpu in range(8)] == [1 << n for n in range(8)]
    taken = counted(cluster)
    expected = [0] * 8
    writes = cluster.host_counters()["chip_writes"]
    for dest in range(256):
        chip.write_icr(VECTOR | APIC_DEST_LOGICAL, dest)
        for cpu in range(8):
            expected[cpu] += dest >> cpu & 1
        assert taken() == expected, f"destination {dest:#x}"
    assert cluster.host_counters()["chip_writes"] - writes == 256


def test_xapic_clusters_exhaustively(boot, counted):
    """All 15 clusters of 4, one and several targets; and cluster 15, which is none."""
    cluster = boot(60, idle="halt", controller=Apic("xapic", "cluster"))
    chip = cluster.chip
    assert chip.read_ldr(59) >> 24 == 0xE8
    taken = counted(cluster)
    expected, single = [0] * 60, 0
    for dest in range(255):
        chip.write_icr(VECTOR | APIC_DEST_LOGICAL, dest)
        number, bits = dest >> 4, dest & 15
        for bit in range(4):
            if number < 15 and bits >> bit & 1:
                expected[4 * number + bit] += 1
                single += bits.bit_count() == 1
        assert taken() == expected, f"destination {dest:#x}"
    assert single == 60
    chip.write_icr(VECTOR | APIC_DEST_LOGICAL, 0xFF)
    assert taken() == [n + 1 for n in expected]


@pytest.fixture(scope="module")
def clusters():
    """20 CPUs in two x2APIC clusters, of 16 and of 4."""
    with Cluster(20, idle="halt", controller=Apic(destination="cluster")) as made:
        yield made


def test_x2apic_clusters(clusters, counted):
    """Proves row 45."""
    chip = clusters.chip
    assert [chip.read_ldr(cpu) for cpu in (0, 15, 16, 19)] == [
        0x00001,
        0x08000,
        0x10001,
        0x10008,
    ]
    taken = counted(clusters)
    expected = [0] * 20
    dests = [1 << bit for bit in range(16)]  # each one of the first cluster
    dests += [1 << 16 | bits for bits in range(64)]  # all of the second, and no more
    dests += [0xA5C3, 0xFFFF, 2 << 16 | 0xFFFF, 0x10 << 16 | 1]
    for dest in dests:
        chip.write_icr(VECTOR | APIC_DEST_LOGICAL, dest)
        for cpu in range(20):
            if dest >> 16 == cpu >> 4:
                expected[cpu] += dest >> (cpu & 15) & 1
        assert taken() == expected, f"destination {dest:#x}"


def test_a_write_for_each_cluster(clusters, counted, eventually):
    """What the chip is written for an IPI to many, by hand and by the core."""
    chip = clusters.chip
    taken = counted(clusters)

    def writes(send, *args):
        asleep(clusters, eventually)
        before = clusters.host_counters()["chip_writes"]
        send(*args)
        return clusters.host_counters()["chip_writes"] - before

    assert writes(chip.apic_send_IPI_mask, "0-19", VECTOR) == 2
    assert writes(chip.apic_send_IPI_mask, "3,5,7", VECTOR) == 1
    assert writes(chip.apic_send_IPI_mask, "15-16", VECTOR) == 2
    assert writes(chip.apic_send_IPI_allbutself, VECTOR) == 1
    expected = [2] * 20
    for cpu in (3, 5, 7, 15, 16):
        expected[cpu] += 1
    assert taken() == expected
    noop = smp.NativeHandler("noop")
    many = clusters.smp.smp_call_function_many
    assert writes(many, "1-10", noop) == 1
    assert writes(many, "1-17", noop) == 2
    assert writes(many, "0-19", noop) == 1, "by shorthand"
    clusters.offline(9)
    assert writes(many, "0-8,10-19", noop) == 1, "all that are online"
    clusters.online(9)


def test_without_broadcasts_each_is_written_to(boot, counted, eventually):
    cluster = boot(3, idle="halt", controller=Apic(no_ipi_broadcast=True))
    taken = counted(cluster)
    before = cluster.host_counters()["chip_writes"]
    cluster.chip.apic_send_IPI_allbutself(VECTOR)
    assert cluster.host_counters()["chip_writes"] == before + 3
    assert taken() == [1, 1, 1]
    assert not cluster.chip.apic_use_ipi_shorthand()
    asleep(cluster, eventually)
    before = cluster.host_counters()["chip_writes"]
    cluster.smp.smp_call_function(smp.NativeHandler("noop"))
    assert cluster.host_counters()["chip_writes"] == before + 3


def test_lowest_priority_goes_to_the_cpu_with_the_lowest_ppr(cluster, counted):
    taken = counted(cluster)

    def task(tpr):
        this_chip().write_tpr(tpr)

    low, everyone = VECTOR | APIC_DM_LOWEST, 0xFF
    cluster.chip.write_icr(low, everyone)
    assert taken() == [1, 0, 0], "the least id of those that are alike"
    on(cluster, 0, task, 0x40)
    on(cluster, 1, task, 0x20)
    cluster.chip.write_icr(low, everyone)
    assert taken() == [1, 0, 1]
    on(cluster, 2, task, 0x30)
    assert [cluster.chip.read_ppr(cpu) for cpu in range(3)] == [0x40, 0x20, 0x30]
    cluster.chip.write_icr(low, everyone)
    assert taken() == [1, 1, 1]
    cluster.offline(1)
    cluster.chip.write_icr(low, everyone)
    cluster.chip.write_icr(low, 1)
    assert taken() == [1, 1, 2]
    cluster.online(1)
    assert taken() == [1, 1, 2], "what an offline CPU was sent is lost"
    cluster.run(task, 0)
    assert [cluster.chip.read_tpr(cpu) for cpu in range(3)] == [0, 0, 0]


class Early(Apic):
    """Broadcasts while it brings the machine up, and writes down what came of it."""

    def __init__(self, book):
        super().__init__()
        self.book = book

    def bring_up(self, cpu):
        if self.read("startup", cpu) != shmipi._core.STARTUP_WAITING:
            return  # it is about to come up: at any moment all have
        # In order, so that each in turn is the least that has not booted.
        turn = cpu - 1 in self.cpus_booted_once_mask()
        with open(self.book, "a") as book:
            try:
                self.write_icr(VECTOR | APIC_DEST_ALLBUT)
                print("sent", file=book)
            except IrqError as error:
                print(errno.errorcode[error.errno], error.cpu, file=book)
            print(self.apic_use_ipi_shorthand(), file=book)
        self.apic_send_IPI_allbutself(VECTOR)  # one by one
        if turn:
            super().bring_up(cpu)


def test_no_broadcast_before_every_cpu_has_booted_once(boot, tmp_path, counted):
    """Proves row 47."""
    book = tmp_path / "book"
    cluster = boot(3, idle="halt", controller=Early(str(book)))
    said = book.read_text().splitlines()
    # The least of the CPUs that were not up yet; CPU 0 needs nobody to start it.
    assert {"EPERM 1", "EPERM 2", "False"} <= set(said)
    assert set(said) <= {"EPERM 0", "EPERM 1", "EPERM 2", "False"}
    chip = cluster.chip
    assert chip.cpus_booted_once_mask() == CpuMask("0-2")
    assert chip.apic_use_ipi_shorthand()
    taken = counted(cluster)
    before = taken()
    chip.write_icr(VECTOR | APIC_DEST_ALLBUT)
    assert taken() == [n + 1 for n in before]
    # One that is down has booted once all the same.
    cluster.offline(1)
    chip.write_icr(VECTOR | APIC_DEST_ALLBUT)
    assert taken() == [before[0] + 2, before[1] + 1, before[2] + 2]
    cluster.online(1)


# ---- in which order, and how often ---------------------------------------------------


@pytest.fixture
def log(cluster):
    """`log[0]` is how many entries follow; `note(log, x)` adds one."""
    made = cluster.shared("log", "i8", 64)
    made[:] = 0
    return made


def note(log, what):
    log[1 + log[0]] = what
    log[0] += 1


def noting(log, what):
    return lambda irq: note(log, what)


def entries(log):
    return log[1 : 1 + log[0]].tolist()


def test_pending_vectors_are_delivered_highest_first(cluster, on_vector, log):
    """Proves row 42."""
    for vector in (32, 33, 0x90):
        on_vector(cluster, vector, noting(log, vector))

    def task():
        chip = this_chip()
        chip.apic_send_IPI_self(33)
        alone = entries(log)
        smp.local_irq_disable()
        chip.apic_send_IPI_self(32)
        chip.apic_send_IPI_self(0x90)
        chip.apic_send_IPI_self(33)
        pending = chip.read_irr(1)
        held = entries(log)
        smp.local_irq_enable()
        return alone, held, pending, entries(log)

    alone, held, pending, vectors = on(cluster, 1, task)
    assert alone == [33]
    assert held == [33], "interrupts are off"
    assert pending == 1 << 32 | 1 << 33 | 1 << 0x90
    assert vectors == [33, 0x90, 33, 32]


def test_tpr_holds_a_class_back_and_lets_the_higher_through(cluster, on_vector, log):
    """Proves row 42."""
    for vector in (32, 62):
        on_vector(cluster, vector, noting(log, vector))

    def task():
        chip, seen = this_chip(), []
        chip.write_tpr(0xF0)
        chip.apic_send_IPI_self(32)
        chip.apic_send_IPI_self(62)
        seen.append((entries(log), chip.read_ppr(1)))
        chip.write_tpr(0x20)  # class 3 is above it, class 2 is not
        seen.append((entries(log), chip.read_ppr(1)))
        irr = chip.read_irr(1)
        chip.write(apic.APIC_TASKPRI, 0)
        seen.append((entries(log), chip.read_register(apic.APIC_PROCPRI)))
        return seen, irr

    seen, irr = on(cluster, 1, task)
    assert seen == [([], 0xF0), ([62], 0x20), ([62, 32], 0)]
    assert irr == 1 << 32


def test_an_interrupt_withdrawn_by_tpr_is_spurious(cluster, counted):
    """INTR was up; by the time it is acknowledged, TPR holds the vector back."""
    taken = counted(cluster)
    before = cluster.counters()["irq_spurious"][1]

    def task():
        chip = this_chip()
        smp.local_irq_disable()
        chip.apic_send_IPI_self(VECTOR)
        chip.write_tpr(0xF0)
        smp.local_irq_enable()
        held, serving = chip.read_irr(1), chip.read_isr(1)
        chip.write_tpr(0)
        return held, serving, chip.read_irr(1)

    assert on(cluster, 1, task) == (1 << VECTOR, 0, 0)
    assert taken() == [0, 1, 0]
    assert cluster.counters()["irq_spurious"][1] == before + 1
    assert row(cluster, "SPU")[1] >= 1


def row(where, label):
    for line in where.interrupts().splitlines():
        name, _, rest = line.partition(":")
        if name.strip() == label:
            return [int(word) for word in rest.split()[: where.ncpus]]
    raise KeyError(label)


def test_at_most_one_pending_and_one_in_service(cluster, on_vector, log):
    """Proves row 43."""

    def handler(irq):
        chip = this_chip()
        note(log, chip.read_isr(1).bit_length() - 1)
        if log[0] == 1:
            for _ in range(10):
                chip.apic_send_IPI_self(VECTOR)
            note(log, chip.read_irr(1).bit_length() - 1)

    on_vector(cluster, VECTOR, handler)

    def task():
        this_chip().apic_send_IPI_self(VECTOR)
        end = time.monotonic() + 0.05  # for what must not come
        while time.monotonic() < end:
            pass
        return this_chip().read_irr(1), this_chip().read_isr(1)

    assert on(cluster, 1, task) == (0, 0)
    assert entries(log) == [VECTOR, VECTOR, VECTOR], "ten gave exactly one more"


def test_a_handlers_eoi_ends_its_vector_and_is_not_written_twice(
    cluster, on_vector, log
):
    def handler(irq):
        chip = this_chip()
        note(log, chip.read_register(APIC_ISR + 0x10 * (VECTOR // 32)))
        note(log, chip.read_ppr(1))
        chip.write(APIC_EOI, 0)
        note(log, chip.read_isr(1))
        note(log, chip.read_ppr(1))
        chip.write_eoi()  # nothing is in service

    on_vector(cluster, VECTOR, handler)

    def task():
        this_chip().write_eoi()  # nor here
        this_chip().apic_send_IPI_self(VECTOR)
        return this_chip().read_isr(1)

    assert on(cluster, 1, task) == 0
    assert entries(log) == [1 << VECTOR % 32, VECTOR & 0xF0, 0, 0]


def test_eoi_leaves_a_higher_vector_alone_that_waits_for_python(
    cluster, on_vector, log, background, eventually
):
    """Both were taken from the APIC while the task was in a long call into C."""
    low, high = 0x30, 0x50

    def handler_of(vector):
        def handler(irq):
            chip = this_chip()
            note(log, vector)
            before = chip.read_isr(1)
            chip.write_eoi()
            note(log, (before & ~chip.read_isr(1)).bit_length() - 1)

        return handler

    for vector in (low, high):
        on_vector(cluster, vector, handler_of(vector))
    go = cluster.shared("go", "i8", 2)
    go[:] = 0

    def task():
        go[0] = 1
        end = time.monotonic() + 20
        while not go[1] and time.monotonic() < end:
            sum(range(5_000_000))

    thread = background(on, cluster, 1, task)
    eventually(lambda: go[0])
    chip, both = cluster.chip, []

    def ended():
        if chip.read_isr(1) == 1 << low | 1 << high and not log[0]:
            both.append(True)
        return log[0] == 4

    try:
        while not both:
            log[:] = 0
            chip.write_icr(low, 1)
            eventually(lambda: chip.read_isr(1) or log[0])
            chip.write_icr(high, 1)
            eventually(ended)
            eventually(lambda: not chip.read_isr(1))
            assert entries(log) in ([low, low, high, high], [high, high, low, low])
            assert thread.is_alive(), "they were never both taken and put off"
    finally:
        go[1] = 1
    thread.end(10)


def test_a_masked_vector_stays_pending_and_fires_once(cluster, counted):
    taken = counted(cluster)
    chip = cluster.chip
    chip.mask_line(VECTOR, 2)
    for _ in range(3):
        chip.write_icr(VECTOR, 2)
    assert chip.read_irr(2) == 1 << VECTOR
    assert chip.read_register(APIC_IRR + 0x10 * (VECTOR // 32), 2) == 1 << VECTOR % 32
    chip.unmask_line(VECTOR, 2)
    assert taken() == [0, 0, 1]


def test_a_vector_is_not_taken_for_other_bits_of_the_icr(cluster):
    for vector in (256, 0x100 | VECTOR, -1, 10**30):
        for use in (
            lambda vector: cluster.chip.apic_send_IPI(1, vector),
            lambda vector: cluster.chip.apic_send_IPI_mask("1", vector),
            cluster.chip.apic_send_IPI_all,
        ):
            with pytest.raises(IrqError, match=f"vector {vector} is illegal") as got:
                use(vector)
            assert (got.value.errno, got.value.domain) == (errno.EINVAL, "apic")


def test_system_vectors_are_counted_in_their_rows(cluster, eventually):
    vectors = {
        "LOC": apic.LOCAL_TIMER_VECTOR,
        "IWI": apic.IRQ_WORK_VECTOR,
        "RES": apic.RESCHEDULE_VECTOR,
        "CAL": apic.CALL_FUNCTION_SINGLE_VECTOR,
        "TRM": apic.THERMAL_APIC_VECTOR,
    }
    for label, vector in vectors.items():
        before = row(cluster, label)
        for _ in range(3):
            cluster.chip.apic_send_IPI(1, vector)
            eventually(lambda: not cluster.chip.read_irr(1))
        after = [before[0], before[1] + 3, before[2]]
        eventually(lambda label=label, after=after: row(cluster, label) == after)
    assert row(cluster, "TLB") == [0, 0, 0]
    # A vector that is an exception's, legal to send: nobody's, and said so.
    before = row(cluster, "BAD")[1]
    cluster.chip.write_icr(0x10, 1)
    eventually(lambda: row(cluster, "BAD")[1] == before + 1)


def test_the_kernels_numbers():
    assert {
        "NMI_VECTOR": 0x02,
        "LOCAL_TIMER_VECTOR": 0xEC,
        "IRQ_WORK_VECTOR": 0xF6,
        "X86_PLATFORM_IPI_VECTOR": 0xF7,
        "REBOOT_VECTOR": 0xF8,
        "CALL_FUNCTION_SINGLE_VECTOR": 0xFB,
        "CALL_FUNCTION_VECTOR": 0xFC,
        "RESCHEDULE_VECTOR": 0xFD,
        "ERROR_APIC_VECTOR": 0xFE,
        "SPURIOUS_APIC_VECTOR": 0xFF,
    }.items() <= vars(apic).items()
    lines = {line.number: line for line in Apic().lines(2)}
    assert lines[0xFB].use == "call_single"
    assert lines[0xFC].use == "call"
    assert lines[0xFD].use == "reschedule"
    assert set(apic.SYSVEC) == {n for n, line in lines.items() if line.use != "irq"}
    assert apic.SYSVEC[0xFB] == "sysvec_call_function_single"
    assert all(0x20 <= n < 0xEB for n, line in lines.items() if line.use == "irq")


# ---- NMI -----------------------------------------------------------------------------


@pytest.fixture
def on_nmi():
    """`on_nmi(cluster, handler, info)`: until the test has ended."""
    where = []

    def request(cluster, handler, info=None):
        where.append(cluster)
        cluster.smp.register_nmi_handler(smp.NMI_LOCAL, handler, 0, "test", info)

    yield request
    for cluster in where:
        cluster.smp.unregister_nmi_handler(smp.NMI_LOCAL, "test")


def test_ten_nmis_inside_the_handler_give_exactly_one_more(cluster, on_nmi, log):
    def handler(type, regs):
        note(log, smp.in_nmi())
        if log[0] == 1:
            for _ in range(10):
                this_chip().write_icr(APIC_DM_NMI, 1)

    on_nmi(cluster, handler)
    before = cluster.counters()

    def task():
        this_chip().apic_send_IPI_self(apic.NMI_VECTOR)
        until(lambda: log[0] == 2)
        end = time.monotonic() + 0.05
        while time.monotonic() < end:
            pass

    on(cluster, 1, task)
    after = cluster.counters()
    assert entries(log) == [1, 1]
    assert after["nmi"][1] - before["nmi"][1] == 2
    assert after["nmi_collapsed"][1] - before["nmi_collapsed"][1] == 9


def test_two_nmi_senders_two_nmis(cluster, on_nmi):
    """As often as they send at the same time: one in service, or none, and two pending.

    A fixed IPI sent after its NMI shows that both were taken.
    """
    n = cluster.shared("two", "i8", 1)
    at = cluster.shared("at", "i8", (3, 1))
    n[:], at[:] = 0, 0
    on_nmi(cluster, smp.NativeHandler("count"), n)
    rounds = 30

    def task():
        chip, me = this_chip(), smp.smp_processor_id()
        for turn in range(1, rounds + 1):
            at[me] = turn
            until(lambda turn=turn: at[2 - me] >= turn)
            chip.apic_send_IPI(1, apic.NMI_VECTOR)
            until(lambda turn=turn: n[0] >= 2 * turn)
            until(lambda: not chip.read("nmi", 1))  # over: two may be pending again
        return int(n[0])

    assert max(cluster.run(task, cpus=[0, 2])) == 2 * rounds
    smp_call = cluster.smp.smp_call_function_single
    smp_call(1, smp.NativeHandler("noop"))
    assert n[0] == 2 * rounds


def test_an_nmi_is_held_back_neither_by_irqs_off_nor_by_tpr(cluster, on_nmi, counted):
    """Proves rows 44 and 50."""
    n = cluster.shared("held", "i8", 1)
    n[:] = 0
    on_nmi(cluster, smp.NativeHandler("count"), n)
    taken = counted(cluster)

    def task():
        chip = this_chip()
        smp.local_irq_disable()
        chip.write_tpr(0xF0)
        chip.write_icr(VECTOR, 1)
        chip.write_icr(APIC_DM_NMI, 1)
        until(lambda: n[0] == 1)
        held = chip.read_irr(1)
        chip.write_tpr(0)
        smp.local_irq_enable()
        return held

    assert on(cluster, 1, task) == 1 << VECTOR
    assert taken() == [0, 1, 0]
    # To all but the sender, in one write; offline CPUs take none.
    cluster.offline(2)
    writes = cluster.host_counters()["chip_writes"]
    before = cluster.counters()["nmi"]
    cluster.chip.write_icr(APIC_DM_NMI | APIC_DEST_ALLBUT)
    until(lambda: n[0] == 3)
    assert (cluster.counters()["nmi"] - before).tolist() == [1, 1, 0]
    assert cluster.host_counters()["chip_writes"] == writes + 1
    cluster.online(2)


# ---- INIT and STARTUP ----------------------------------------------------------------


def generation(where, cpu):
    return where.cpus[cpu].generation


def is_up(where, cpu, number):
    seen = where.cpus[cpu]
    return seen.generation == number and seen.state in ("halted", "polling")


def test_secondary_cpus_were_started_by_ipi(cluster):
    started = [cluster.chip.startup_address(cpu) for cpu in range(3)]
    assert started == [0, apic.TRAMPOLINE_START_EIP, apic.TRAMPOLINE_START_EIP]


def test_init_resets_a_cpu_and_startup_brings_up_the_next(boot, counted, eventually):
    """Proves row 44."""
    cluster = boot(3, idle="halt")
    chip, taken = cluster.chip, counted(cluster)

    def busy():
        while True:
            pass

    future = cluster.submit(1, busy)
    pid = cluster.cpus[1].pid
    chip.write_icr(INIT, 1)
    with pytest.raises(CpuDiedError):
        future.result(5)
    assert cluster.cpus[1].state == "dead"
    chip.write_icr(VECTOR, 1)
    chip.write_icr(APIC_DM_NMI, 1)
    chip.write_icr(INIT, 1)  # it is in reset already
    time.sleep(0.05)
    assert (cluster.cpus[1].state, generation(cluster, 1)) == ("dead", 1)
    assert chip.read("startup", 1) == 4  # SHI_SU_RESET
    chip.write_icr(APIC_DM_STARTUP | 0x9A, 1)
    eventually(lambda: is_up(cluster, 1, 2))
    assert cluster.cpus[1].pid != pid
    assert chip.startup_address(1) == 0x9A000
    assert cluster.call(1, abs, -3) == 3
    assert chip.read_irr(1) == 0
    chip.write_icr(VECTOR | APIC_DEST_ALLBUT)
    assert taken() == [1, 1, 1]


def test_startup_finds_nobody_who_waits(boot):
    cluster = boot(2, idle="halt")
    chip = cluster.chip
    before = cluster.cpus[1]
    for _ in range(3):
        chip.write_icr(APIC_DM_STARTUP | 0x12, 1)
    chip.write_icr(APIC_DM_INIT | APIC_INT_LEVELTRIG, 1)  # a de-assert
    chip.write_icr(APIC_DM_STARTUP | 0x12, 5)
    chip.write_icr(INIT, 5)
    assert cluster.call(1, os.getpid) == before.pid
    assert chip.startup_address(1) == apic.TRAMPOLINE_START_EIP
    # Nor does a CPU that is offline, until INIT resets it.
    cluster.offline(1)
    chip.write_icr(APIC_DM_STARTUP | 0x12, 1)
    time.sleep(0.05)
    assert cluster.cpus[1].state == "offline"
    cluster.online(1)
    assert cluster.call(1, os.getpid) == before.pid


def test_init_and_startup_at_once(boot, eventually):
    """The STARTUP comes before the process that INIT has ended is buried."""
    cluster = boot(3, idle="halt")
    for number in range(2, 12):
        cluster.chip.write_icr(INIT, 1)
        cluster.chip.write_icr(APIC_DM_STARTUP | number, 1)
        eventually(lambda number=number: is_up(cluster, 1, number))
        assert cluster.chip.startup_address(1) == number << 12
    assert cluster.call(1, abs, -3) == 3
    cluster.chip.write_icr(INIT, 2)  # a machine can end with a CPU in reset


def test_a_cpu_resets_others_and_itself(boot, eventually):
    cluster = boot(3, idle="halt")

    def others():
        chip = this_chip()
        chip.write_icr(INIT | APIC_DEST_ALLBUT)
        chip.write_icr(APIC_DM_STARTUP | 0x33 | APIC_DEST_ALLBUT)

    on(cluster, 0, others)
    eventually(lambda: is_up(cluster, 1, 2) and is_up(cluster, 2, 2))
    assert generation(cluster, 0) == 1
    assert cluster.counters()["chip_writes"][0] == 2

    def myself():
        this_chip().write_icr(INIT, smp.smp_processor_id())
        time.sleep(10)

    with pytest.raises(CpuDiedError):
        on(cluster, 2, myself)
    eventually(lambda: cluster.cpus[2].state == "dead")
    cluster.online(2)  # the kernel's way: the same two IPIs
    assert is_up(cluster, 2, 3)
    # The bootstrap processor does not wait for anybody.
    cluster.chip.write_icr(INIT, 0)
    eventually(lambda: is_up(cluster, 0, 2))
    assert cluster.run(abs, -3) == [3, 3, 3]


def test_startup_of_dead_and_parked_cpus(boot, eventually):
    cluster = boot(3, idle="halt")
    os.kill(cluster.cpus[1].pid, signal.SIGKILL)
    eventually(lambda: cluster.cpus[1].state == "dead")
    cluster.chip.write_icr(APIC_DM_STARTUP | 0x44, 1)
    eventually(lambda: is_up(cluster, 1, 2))
    cluster.offline(2)
    cluster.chip.write_icr(INIT, 2)
    eventually(lambda: cluster.cpus[2].state == "dead")
    cluster.chip.write_icr(APIC_DM_STARTUP | 0x44, 2)
    eventually(lambda: is_up(cluster, 2, 2))
    assert cluster.run(abs, -3) == [3, 3, 3]


def test_init_of_a_cpu_that_nearly_went_offline(boot, eventually):
    cluster = boot(2, idle="halt", steps=True)
    machine = cluster._machine
    machine.arm_step(1, "offline", shmipi._core.STEP_STOP)
    with pytest.raises(shmipi.IpiTimeoutError):
        cluster.offline(1, timeout=2)  # the request is withdrawn: it has not parked
    assert machine.step_hit(1) == "offline"
    os.kill(cluster.cpus[1].pid, signal.SIGCONT)
    assert cluster.call(1, abs, -3, timeout=5) == 3
    eventually(lambda: cluster.cpus[1].state != "offline")
    cluster.chip.write_icr(INIT, 1)
    eventually(lambda: cluster.cpus[1].state == "dead")


# ---- what the kernel has over it -----------------------------------------------------


def test_the_kernels_functions(cluster, counted):
    taken = counted(cluster)

    def task(way):
        chip = this_chip()
        if way == "__apic_send_IPI":
            apic.__apic_send_IPI(0, VECTOR)
            getattr(chip, way)(2, VECTOR)
        elif "mask" in way:
            getattr(chip, way)([0, 1], VECTOR)
        else:
            getattr(chip, way)(VECTOR)

    for way, expected in (
        ("__apic_send_IPI", [1, 0, 1]),
        ("apic_send_IPI_mask", [2, 1, 1]),
        ("apic_send_IPI_mask_allbutself", [3, 1, 1]),
        ("apic_send_IPI_allbutself", [4, 1, 2]),
        ("apic_send_IPI_all", [5, 2, 3]),
    ):
        on(cluster, 1, task, way)
        assert taken() == expected, way


def test_call_function_ipis(cluster, eventually):
    def calls():
        return cluster.counters()["irq_call"].astype(int)

    def task(mask):
        this_chip().native_send_call_func_ipi(mask)

    def sent(mask):
        before = calls(), cluster.counters()["chip_writes"][1]
        on(cluster, 1, task, mask)
        asleep(cluster, eventually)
        writes = cluster.counters()["chip_writes"][1] - before[1]
        return (calls() - before[0]).tolist(), int(writes)

    assert sent([0, 2]) == ([1, 0, 1], 1), "all but self: a shorthand"
    assert sent([0, 1, 2]) == ([1, 1, 1], 1), "all"
    assert sent([0, 1]) == ([1, 1, 0], 2), "one by one"
    single = int(cluster.counters()["irq_call_single"][2])
    cluster.chip.native_send_call_func_single_ipi(2)
    eventually(lambda: cluster.counters()["irq_call_single"][2] == single + 1)


def test_reschedule(cluster, eventually):
    before = row(cluster, "RES")[2]
    cluster.chip.native_smp_send_reschedule(2)
    eventually(lambda: row(cluster, "RES")[2] == before + 1)
    cluster.offline(2)
    try:
        writes = cluster.host_counters()["chip_writes"]
        with pytest.warns(ShmipiWarning, match="reschedule of offline CPU#2!"):
            cluster.chip.native_smp_send_reschedule(2)
        assert cluster.host_counters()["chip_writes"] == writes
    finally:
        cluster.online(2)


# ---- what is refused -----------------------------------------------------------------


def test_an_x2apic_has_no_lowest_priority(x2apic, counted):
    """SDM figure 10-18: reserved. ESR says "redirectable IPI", and nothing is sent."""
    taken = counted(x2apic)
    writes = x2apic.host_counters()["chip_writes"]
    for low, dest in ((APIC_DM_LOWEST, 1), (APIC_DM_LOWEST | APIC_DEST_LOGICAL, 6)):
        with pytest.raises(IrqError, match="reserved on an x2APIC") as caught:
            x2apic.chip.write_icr(VECTOR | low, dest)
        assert caught.value.errno == errno.EINVAL
    assert taken() == [0, 0, 0]
    assert x2apic.host_counters()["chip_writes"] == writes

    def task():
        chip = this_chip()

        def esr():
            chip.write(APIC_ESR, 0)
            return chip.read_register(APIC_ESR)

        esr()
        refused = refusal(chip.write, APIC_ICR, 1 << 32 | VECTOR | APIC_DM_LOWEST)
        return refused[0], esr(), esr()

    assert on(x2apic, 1, task) == (errno.EINVAL, APIC_ESR_REDIR, 0)


def test_vectors_below_16_are_illegal(either):
    def state():
        machine = either._machine
        return [machine.pic_read(cpu, "irr", 0) for cpu in range(3)]

    writes = either.host_counters()["chip_writes"]
    for vector in range(16):
        for mode in (0, APIC_DM_LOWEST):
            with pytest.raises(IrqError, match="16 to 255") as caught:
                either.chip.write_icr(vector | mode, 1)
            assert caught.value.errno == errno.EINVAL
            assert caught.value.domain == "apic"
    assert state() == [0, 0, 0]
    assert either.host_counters()["chip_writes"] == writes

    def task():
        chip = this_chip()

        def esr():  # written first, as the SDM has it: that latches what was noted
            chip.write(APIC_ESR, 0)
            return chip.read_register(APIC_ESR)

        esr()
        refused = refusal(chip.write_icr, APIC_DEST_SELF | 3)
        return refused[0], chip.read_register(APIC_ESR), esr(), esr()

    assert on(either, 1, task) == (errno.EINVAL, 0, APIC_ESR_SENDILL, 0)


@pytest.mark.parametrize(
    ("low", "dest", "words"),
    [
        (APIC_DM_SMI, 1, "SMI is reserved here"),
        (APIC_DM_REMRD, 1, "remote read is reserved here"),
        (APIC_DM_EXTINT, 1, "ExtINT is reserved here"),
        (VECTOR | APIC_DM_NMI | APIC_DEST_ALLINC, 0, "fixed delivery alone"),
        (VECTOR | APIC_DM_LOWEST | APIC_DEST_SELF, 0, "fixed delivery alone"),
        (VECTOR | 1 << 13, 1, "reserved bits: 0x2000"),
        (VECTOR | 1 << 32, 1, "reserved bits"),
        (-1, 1, "reserved bits"),
        (VECTOR, -1, "does not fit"),
        (VECTOR, 1 << 32, "does not fit"),
    ],
)
def test_commands_that_are_refused(either, low, dest, words):
    before = either.counters()["irq_other"].tolist()
    with pytest.raises(IrqError, match=words) as caught:
        either.chip.write_icr(low, dest)
    assert caught.value.errno == errno.EINVAL
    assert either.counters()["irq_other"].tolist() == before


def test_destinations_that_do_not_fit_an_xapic(cluster):
    with pytest.raises(IrqError, match="8 bits"):
        cluster.chip.write_icr(VECTOR, 0x100)


def test_registers_that_are_not_there(cluster, x2apic):
    def task(accesses):
        return [refusal(getattr(this_chip(), name), *args) for name, *args in accesses]

    for where, accesses in (
        (
            cluster,
            [
                ("write", APIC_SELF_IPI, VECTOR),
                ("write", APIC_LDR, 1 << 24),
                ("write", 0x123, 0),
                ("read_register", APIC_EOI),
                ("read_register", 0x204),
            ],
        ),
        (
            x2apic,
            [
                ("write", APIC_ICR2, 1 << 24),
                ("write", apic.APIC_DFR, 0),
                ("read_register", apic.APIC_DFR),
                ("read_register", APIC_ICR2),
            ],
        ),
    ):
        for access, refused in zip(accesses, on(where, 1, task, accesses), strict=True):
            assert refused, access
            assert refused[0] == errno.EINVAL
            assert f"no register {access[1]:#x}" in refused[1]
    values = [
        ("write", APIC_EOI, 1),
        ("write", APIC_ESR, 1),
        ("write", APIC_SELF_IPI, 0x100),
        ("write", apic.APIC_TASKPRI, 0x100),
        ("write", APIC_ICR, 1 << 64),
    ]
    for access, refused in zip(values, on(x2apic, 1, task, values), strict=True):
        assert refused, access
        assert refused[0] == errno.EINVAL
        assert "can not take" in refused[1]


def test_registers_by_offset(cluster, x2apic, counted):
    taken = counted(cluster), counted(x2apic)

    def two_writes():
        chip = this_chip()
        chip.write(APIC_ICR2, 2 << 24)
        chip.write(APIC_ICR, VECTOR)
        return [chip.read_register(r) for r in (APIC_ICR, APIC_ICR2, apic.APIC_ID)]

    def one_write():
        chip = this_chip()
        chip.write(APIC_ICR, 2 << 32 | VECTOR)
        return [chip.read_register(r) for r in (APIC_ICR, apic.APIC_ID, apic.APIC_TMR)]

    assert on(cluster, 1, two_writes) == [VECTOR, 2 << 24, 1 << 24]
    assert on(x2apic, 1, one_write) == [2 << 32 | VECTOR, 1, 0]
    assert [look() for look in taken] == [[0, 0, 1], [0, 0, 1]]
    assert cluster.chip.read_register(apic.APIC_DFR, 1) == apic.APIC_DFR_FLAT
    assert cluster.chip.read_register(apic.APIC_SPIV, 1) == 0x1FF


def test_what_the_host_is_not(cluster):
    chip = cluster.chip
    for refuse in (
        lambda: chip.write_icr(VECTOR | APIC_DEST_SELF),
        lambda: chip.apic_send_IPI_self(VECTOR),
        lambda: chip.write_tpr(0),
        lambda: chip.write_eoi(),
        lambda: chip.write(APIC_ESR, 0),
        lambda: chip.read_register(apic.APIC_ID),
        lambda: chip.read_register(APIC_ICR, 1),
    ):
        with pytest.raises(ClusterStateError, match="the host is no CPU"):
            refuse()


def test_cpus_that_are_not_there(cluster):
    chip = cluster.chip
    for refuse in (
        lambda: chip.apic_send_IPI(3, VECTOR),
        lambda: chip.apic_send_IPI_mask([1, 3], VECTOR),
        lambda: chip.native_send_call_func_ipi([7]),
        lambda: chip.native_smp_send_reschedule(-1),
    ):
        with pytest.raises(IrqError) as caught:
            refuse()
        assert caught.value.errno == errno.EINVAL
    with pytest.raises(shmipi.CpuOfflineError, match="CPU 3 does not exist"):
        chip.read_irr(3)
    with pytest.warns(ShmipiWarning, match="empty IPI mask"):
        chip.apic_send_IPI_mask([], VECTOR)


def test_another_controller_has_no_apic(boot):
    cluster = boot(1, idle="halt", controller="riscv")

    def task():
        return refusal(apic.__apic_send_IPI, 0, VECTOR)

    code, words = on(cluster, 0, task)
    assert code == errno.EINVAL
    assert "no local APIC" in words
