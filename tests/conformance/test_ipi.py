"""IPI domains on every controller: reserve, send, destroy, and every refusal."""

import contextlib
import errno
import os
import signal
import time

import pytest

import shmipi
from shmipi import ClusterStateError, CpuMask, _core, smp
from shmipi.errors import DeviceTreeError, IrqError, LayoutError
from shmipi.irq import (
    INVALID_HWIRQ,
    NR_IRQS,
    DomainNode,
    IrqFlags,
    __ipi_send_mask,
    __ipi_send_single,
    irq_data_get_affinity_mask,
    irq_data_get_irq_chip,
    irq_data_get_irq_chip_data,
    irq_desc_get_irq_data,
    irqd_is_global_ipi,
)
from shmipi.irq.chips import CHIPS

NCPUS = 4
COUNT = smp.NativeHandler("count")


class Rig:
    """A machine, and an IPI whose interrupts each CPU counts."""

    def __init__(self, cluster):
        self.cluster, self.irq, self.machine = cluster, cluster.irq, cluster._machine
        self.routed = cluster.chip.flow == "shared"
        self.rows = cluster.percpu("counts", "i8")
        self.default = self.irq.domain()

    def reserve(self, domain, dest, **options):
        return self.irq.irq_reserve_ipi(domain, dest, **options)

    def counting(self, domain, dest, **options):
        """An IPI that is requested and enabled everywhere."""
        virq = self.reserve(domain, dest, **options)
        self.rows[:] = 0
        self.irq.request_percpu_irq(virq, COUNT, "counting", self.rows)
        self.irq.enable_percpu_irq_mask(virq)
        return virq

    def settles(self, *counts):
        """Exactly so many interrupts were taken, and no more come."""
        deadline = time.monotonic() + 5
        while self.rows.tolist() != list(counts) and time.monotonic() < deadline:
            time.sleep(0.0005)
        time.sleep(0.003)
        assert self.rows.tolist() == list(counts)

    def domain_of(self, shape):
        return self.irq.irq_domain_create(DomainNode(f"test-{shape}", shape))

    def clear(self):
        """As it was, whatever a test did."""
        for virq in self.irq.table.virqs():
            with self.irq.table.locked():
                self.irq.table.destroy(virq, self.irq.irq_to_desc(virq).ipi_nr)
        for domain in self.irq.domains[::-1] * 3:  # children before their parents
            if domain.parent_index >= 0 and domain != self.default:
                with contextlib.suppress(IrqError):
                    self.irq.irq_domain_remove(domain)
        assert len(self.irq.domains) == 2
        for cpu in range(NCPUS):
            self.cluster.online(cpu)


@pytest.fixture(scope="module", params=CHIPS)
def booted(request):
    with shmipi.Cluster(NCPUS, idle="halt", controller=request.param) as cluster:
        yield Rig(cluster)


#: What is the same on all controllers is tested on one of each kind: a hwirq for all
#: CPUs, and one for each.
KINDS = pytest.mark.parametrize("booted", ["apic", "mips-gic"], indirect=True)


@pytest.fixture
def rig(booted):
    yield booted
    booted.clear()


def shapes(rig):
    return ["block", "cpumap"] if rig.routed else ["single", "block", "cpumap"]


def refused(code, call, *args, **options):
    with pytest.raises(IrqError) as caught:
        call(*args, **options)
    assert caught.value.errno == code, caught.value
    return caught.value


# ---- the hierarchy -------------------------------------------------------------------


def test_the_ipi_domain_is_the_controllers_child(rig):
    root, child = rig.irq.domains
    assert rig.irq.domain() == child
    assert (root.parent, child.parent) == (None, root)
    assert root.children == [child]
    assert (root.is_ipi, child.is_ipi) == (False, True)
    assert rig.irq.domain("root") == rig.irq.root == root
    assert rig.irq.domain({"interrupt-parent": child.name}) == child
    chip = rig.cluster.chip
    assert root.hwirqs() == chip.irq_lines(NCPUS)
    assert child.hwirqs() == chip.ipi_lines(NCPUS)
    assert (child.hwirqs() == root.hwirqs()) == (not rig.routed)
    assert child.mapping == ("block" if rig.routed else "single")


@KINDS
def test_a_descriptor_has_data_at_each_level(rig):
    virq = rig.reserve(None, "1-2", name="it")
    desc = rig.irq.irq_to_desc(virq)
    data = irq_desc_get_irq_data(desc)
    assert (data.irq, data.domain, desc.name) == (virq, rig.default, "it")
    assert irq_data_get_irq_chip(data).send_ipi is not None
    assert irq_data_get_irq_chip_data(data) == desc.mapping
    assert irq_data_get_affinity_mask(data) == CpuMask("1-2")
    assert (data.parent.domain, data.parent.hwirq) == (rig.irq.root, data.hwirq)
    assert data.hwirq == rig.irq.ipi_get_hwirq(virq, 1)
    assert not irqd_is_global_ipi(data)
    flags = IrqFlags.IRQ_PER_CPU_DEVID | IrqFlags.IRQ_NO_BALANCING
    assert desc.flags & flags == flags
    assert rig.irq.irq_to_desc(0) is rig.irq.irq_to_desc(NR_IRQS) is None
    with pytest.raises(TypeError, match="a virq is an integer"):
        rig.irq.irq_to_desc("1")


# ---- both shapes ---------------------------------------------------------------------


@pytest.mark.parametrize("shape", ["single", "block", "cpumap"])
def test_exactly_the_cpus_of_the_mask_take_it(rig, shape):
    if shape not in shapes(rig):
        with pytest.raises(DeviceTreeError, match="interrupts one CPU"):
            rig.domain_of(shape)
        return
    virq = rig.counting(rig.domain_of(shape), "1-3")
    rig.irq.irq_send_ipi(virq, "1,3")
    rig.settles(0, 1, 0, 1)
    rig.irq.irq_send_ipi_all(virq)
    rig.settles(0, 2, 1, 2)
    rig.irq.ipi_send_single(virq, 2)
    rig.settles(0, 2, 2, 2)
    rig.irq.ipi_send_mask(virq, "2-3")
    rig.settles(0, 2, 3, 3)
    rig.irq.ipi_send_mask(virq, ())
    rig.settles(0, 2, 3, 3)
    hwirqs = [rig.irq.ipi_get_hwirq(virq, cpu) for cpu in range(-1, NCPUS + 1)]
    assert hwirqs[0] == hwirqs[1] == hwirqs[-1] == INVALID_HWIRQ
    assert len(set(hwirqs[2:5])) == (1 if shape == "single" else 3)
    assert INVALID_HWIRQ not in hwirqs[2:5]


def test_a_block_has_consecutive_hwirqs(rig):
    domain = rig.domain_of("block")
    rig.reserve(domain, "0-1")
    virq = rig.reserve(domain, "1-3")
    mapping = rig.irq.irq_to_desc(virq).mapping
    for cpu in (1, 2, 3):
        hwirq = mapping.hwirq_base + cpu - mapping.cpu_offset
        assert rig.irq.ipi_get_hwirq(virq, cpu) == hwirq
        assert rig.irq.irq_to_desc(virq + cpu - 1).hwirq == hwirq
    assert (mapping.cpu_offset, mapping.nr_hwirqs) == (1, 3)
    error = refused(errno.EINVAL, rig.irq.irq_reserve_ipi, domain, "0-1,3")
    assert (error.cpu, error.domain) == (2, domain.name)


@KINDS
def test_a_cpumap_has_gaps(rig):
    domain = rig.domain_of("cpumap")
    virq = rig.counting(domain, "0,3")
    assert rig.irq.irq_to_desc(virq).mapping.cpumap[1:3] == (INVALID_HWIRQ,) * 2
    rig.irq.irq_send_ipi_all(virq)
    rig.settles(1, 0, 0, 1)
    error = refused(errno.EINVAL, rig.irq.irq_send_ipi, virq, "0,2")
    assert (error.irq, error.cpu, error.domain) == (virq, 2, domain.name)
    rig.settles(1, 0, 0, 1)


# ---- reserving -----------------------------------------------------------------------


@KINDS
def test_reserving_what_cannot_be(rig):
    """Proves row 41."""
    reserve = rig.irq.irq_reserve_ipi
    assert refused(errno.EINVAL, reserve, "root", "0").domain == rig.irq.root.name
    error = refused(errno.EINVAL, reserve, None, [0, NCPUS])
    assert (error.domain, error.cpu) == (rig.default.name, NCPUS)
    assert refused(errno.EINVAL, reserve, None, ()).domain == rig.default.name
    assert refused(errno.EINVAL, reserve, "nowhere", "0").domain == "nowhere"
    refused(errno.EINVAL, reserve, {"compatible": "x"}, "0")
    wrong = refused(errno.EINVAL, reserve, None, "0", hwirq=9999)
    assert wrong.domain == rig.default.name
    with pytest.raises(TypeError, match="a domain is"):
        reserve(3, "0")
    assert rig.irq.table.virqs() == []


@KINDS
def test_arguments_of_the_wrong_kind(rig):
    """A TypeError that says what is wanted, and nothing has changed."""
    calls, virq = rig.irq, rig.irq.irq_reserve_ipi(None, "1-2")
    for name in (5, None, b"x"):
        with pytest.raises(TypeError, match="an irq's name is a string"):
            calls.irq_reserve_ipi(None, "3", name=name)
        with pytest.raises(TypeError, match="an irq's name is a string"):
            calls.request_percpu_irq(virq, COUNT, name, 0)
        with pytest.raises(TypeError, match="a domain's name is a string"):
            calls.add_coprocessor(name, print)
    with pytest.raises(ValueError, match="printable"):
        calls.request_percpu_irq(virq, COUNT, "two\nrows", 0)
    with pytest.raises(TypeError, match="a coprocessor runs a function, not 5"):
        calls.add_coprocessor("test", 5)
    with pytest.raises(TypeError, match="made from a DomainNode, not 'test'"):
        calls.irq_domain_create("test")
    with pytest.raises(DeviceTreeError, match="printable"):
        calls.add_coprocessor("\ud800", print)
    for number in (True, "1", 1.5):
        with pytest.raises(TypeError, match="a hwirq is an integer"):
            calls.irq_reserve_ipi(None, "3", hwirq=number)
        with pytest.raises(TypeError, match="a CPU number is an integer"):
            calls.ipi_get_hwirq(virq, number)
    assert calls.table.virqs() == [virq]
    assert len(calls.domains) == 2
    calls.request_percpu_irq(virq, COUNT, "n" * 40, rig.rows)
    calls.free_percpu_irq(virq, rig.rows)


@KINDS
def test_masks_are_named_as_everywhere(rig):
    calls = rig.irq
    virq = calls.irq_reserve_ipi(None, "all")
    assert irqd_is_global_ipi(calls.irq_to_desc(virq).irq_data)
    for send in (calls.ipi_send_mask, calls.irq_send_ipi):
        send(virq, "2-N")
    calls.enable_percpu_irq_mask(virq, "all")
    refused(errno.EINVAL, calls.enable_percpu_irq_mask, virq, "0-9")
    calls.disable_percpu_irq_mask(virq, "all")
    calls.irq_destroy_ipi(virq, "all")


@KINDS
def test_the_same_hwirq_is_not_reserved_twice(rig):
    for shape in shapes(rig):
        domain = rig.domain_of(shape)
        base = domain.hwirqs()[4]
        virq = rig.reserve(domain, "1-2", hwirq=base)
        assert rig.irq.ipi_get_hwirq(virq, 1) == base
        error = refused(errno.EBUSY, rig.irq.irq_reserve_ipi, domain, "1-2", hwirq=base)
        assert (error.irq, error.domain) == (virq, domain.name)
        rig.irq.irq_destroy_ipi(virq)
        assert rig.reserve(domain, "1-2", hwirq=base) == virq
        rig.irq.irq_destroy_ipi(virq)


@pytest.mark.parametrize("booted", ["apic"], indirect=True)
def test_a_vector_is_available_on_all_target_cpus(rig):
    """x86: each CPU has its own table of vectors (kernel/irq/matrix.c, vector_irq).

    What one irq has on CPUs 0 and 1 another may have on 2 and 3, and is that CPU's: its
    handler, its count, its mask. It is taken for a mask with any CPU of either.
    """
    irq, table = rig.irq, rig.irq.table
    low, high = rig.reserve(None, "0-1"), rig.reserve(None, "2-3")
    vector = irq.ipi_get_hwirq(low, 0)
    assert irq.ipi_get_hwirq(high, 3) == vector == rig.default.hwirqs()[0]
    assert sorted(table.owners(vector)) == [low, high]
    for dest in ("1-2", "all"):
        error = refused(errno.EBUSY, irq.irq_reserve_ipi, None, dest, hwirq=vector)
        assert error.irq in (low, high)
    for dest, owner in (("0", low), ("3", high)):
        error = refused(errno.EBUSY, irq.irq_reserve_ipi, None, dest, hwirq=vector)
        assert error.irq == owner
    other = rig.reserve(None, "1-2")
    assert irq.ipi_get_hwirq(other, 1) == rig.default.hwirqs()[1]
    counts = [rig.cluster.percpu(name, "i8") for name in ("low", "high")]

    def settles(*wanted):
        deadline = time.monotonic() + 5
        while [c.tolist() for c in counts] != list(wanted):
            assert time.monotonic() < deadline, [c.tolist() for c in counts]
            time.sleep(0.0005)

    def python(virq, dev_id):
        shmipi.percpu("high")[smp.smp_processor_id()] += virq * 1000

    def row_of(virq):
        [row] = [
            line.split()[1 : 1 + NCPUS]
            for line in rig.cluster.interrupts().splitlines()
            if line.split()[0] == f"{virq}:"
        ]
        return [int(n) for n in row]

    for array in counts:
        array[:] = 0
    irq.request_percpu_irq(low, COUNT, "low", counts[0])
    irq.enable_percpu_irq_mask(low)
    irq.request_percpu_irq(high, COUNT, "high", counts[1])
    assert not irq.irq_percpu_is_enabled(high, 2)
    irq.enable_percpu_irq_mask(high)
    irq.ipi_send_mask(low, "0-1")
    irq.ipi_send_mask(high, "2-3")
    settles([1, 1, 0, 0], [0, 0, 1, 1])
    irq.ipi_send_single(high, 3)
    settles([1, 1, 0, 0], [0, 0, 1, 2])
    rig.cluster.run(int)
    assert (row_of(low), row_of(high)) == ([1, 1, 0, 0], [0, 0, 1, 2])
    refused(errno.EINVAL, irq.ipi_send_single, low, 2)
    # The one that is destroyed takes nothing of the other's along, nor does the next.
    irq.disable_percpu_irq_mask(low)
    irq.free_percpu_irq(low, counts[0])
    irq.irq_destroy_ipi(low)
    assert table.owners(vector) == [high]
    irq.ipi_send_single(high, 2)
    settles([1, 1, 0, 0], [0, 0, 2, 2])
    again = rig.reserve(None, "0", hwirq=vector)
    assert irq.irq_percpu_is_enabled(high, 2)
    assert not irq.irq_percpu_is_enabled(again, 0)
    irq.request_percpu_irq(again, python, "again", 0)
    irq.enable_percpu_irq_mask(again)
    irq.ipi_send_single(again, 0)
    irq.ipi_send_single(high, 2)
    settles([1, 1, 0, 0], [again * 1000, 0, 3, 2])
    rig.cluster.run(int)
    assert (row_of(again), row_of(high)) == ([1, 0, 0, 0], [0, 0, 3, 2])
    irq.irq_destroy_ipi(other)
    with pytest.warns(shmipi.ShmipiWarning, match="destroyed while it was requested"):
        irq.irq_destroy_ipi(high)
    assert table.owners(vector) == [again]
    # All of them are taken on CPU 1, and none on CPU 3.
    full = [rig.reserve(None, "1") for _ in rig.default.hwirqs()]
    refused(errno.EBUSY, irq.irq_reserve_ipi, None, "1")
    refused(errno.EBUSY, irq.irq_reserve_ipi, None, "1,3")
    assert irq.ipi_get_hwirq(rig.reserve(None, "3"), 3) == vector
    assert len({irq.ipi_get_hwirq(virq, 1) for virq in full}) == len(full)


def test_no_hwirqs_are_left(rig):
    lines = rig.irq.root.hwirqs()[:5]
    for shape in shapes(rig):
        node = DomainNode(f"small-{shape}", shape, None, frozenset(lines))
        domain = rig.irq.irq_domain_create(node)
        weight = 1 if shape == "single" else 2
        mine = [rig.reserve(domain, "0-1") for _ in range(5 // weight)]
        error = refused(errno.EBUSY, rig.irq.irq_reserve_ipi, domain, "0-1")
        assert error.domain == domain.name
        assert set(domain.hwirqs()) == set(lines)
        for virq in mine:
            rig.irq.irq_destroy_ipi(virq)
        assert len(domain.free_hwirqs()) == 5
        rig.irq.irq_domain_remove(domain)


@KINDS
def test_no_descriptors_are_left(rig):
    used = rig.irq.table._desc["used"]
    used[1 : NR_IRQS - 1] = 1
    try:
        domain = rig.domain_of("block")
        error = refused(errno.ENOMEM, rig.irq.irq_reserve_ipi, domain, "0-1")
        assert error.domain == domain.name
        assert rig.reserve(domain, "0") == NR_IRQS - 1
        rig.irq.irq_destroy_ipi(NR_IRQS - 1)
    finally:
        used[1 : NR_IRQS - 1] = 0


@KINDS
def test_a_damaged_descriptor_is_an_error(rig):
    virq = rig.reserve(None, "0-1")
    for field, value in (("ipi_nr", 0), ("ipi_nr", 1 << 31), ("ipi_base", virq + 1)):
        record = rig.irq.table._desc[field]
        was, record[virq] = int(record[virq]), value
        for call in (rig.irq.irq_to_desc, rig.irq.irq_send_ipi_all):
            with pytest.raises(LayoutError, match=f"irq {virq} is damaged"):
                call(virq)
        record[virq] = was
    rig.irq.irq_send_ipi_all(virq)
    # A lock that is taken with nonsense to undo frees what there is, and no more.
    rig.machine.pic_write(0, "undo", 0, 0xFFFFFFFF_FFFFFFFF)
    rig.machine.irq_request(virq, COUNT, None)
    assert rig.reserve(None, "0") > virq
    assert rig.irq.irq_to_desc(virq) is not None


# ---- destroying ----------------------------------------------------------------------


@KINDS
def test_destroying_what_cannot_be(rig):
    """Proves row 41."""
    destroy = rig.irq.irq_destroy_ipi
    for virq in (0, 7, NR_IRQS, -1):
        assert refused(errno.EINVAL, destroy, virq, "0").irq == virq
    for shape in shapes(rig):
        virq = rig.reserve(rig.domain_of(shape), "1-2")
        error = refused(errno.EINVAL, destroy, virq, "2-3")
        assert (error.irq, error.cpu, error.domain) == (virq, 3, f"test-{shape}")
        refused(errno.EINVAL, destroy, virq, ())
        if shape != "single":
            assert refused(errno.EINVAL, destroy, virq + 1, "1").irq == virq + 1
            refused(errno.EINVAL, rig.irq.irq_send_ipi, virq + 1, "1")
            refused(errno.EINVAL, rig.irq.ipi_send_single, virq + 1, 1)
            assert rig.irq.ipi_get_hwirq(virq + 1, 1) == INVALID_HWIRQ
        destroy(virq, "1-2")
        assert refused(errno.EINVAL, destroy, virq, "1-2").irq == virq


@KINDS
def test_what_was_destroyed_is_refused(rig):
    virq = rig.reserve(None, "0-1")
    desc = rig.irq.irq_to_desc(virq)
    rig.irq.irq_destroy_ipi(virq)
    for again in (False, True):  # and also once the virq is another's
        if again:
            assert rig.reserve(None, "0-1") == virq
        assert not desc.alive
        assert refused(errno.EINVAL, rig.irq.irq_desc_send_ipi, desc, "0").irq == virq
    rig.irq.irq_destroy_ipi(virq)
    for call in (rig.irq.irq_send_ipi, rig.irq.ipi_send_mask, rig.irq.ipi_send_single):
        assert refused(errno.EINVAL, call, virq, 0).irq == virq
    refused(errno.EINVAL, rig.irq.irq_send_ipi_all, virq)
    assert rig.irq.ipi_get_hwirq(virq, 0) == INVALID_HWIRQ


def test_a_part_is_destroyed_where_each_cpu_has_its_own(rig):
    for shape in shapes(rig):
        domain = rig.domain_of(shape)
        virq = rig.counting(domain, "0-2")
        free = len(domain.free_hwirqs())
        if shape == "single":
            rig.irq.disable_percpu_irq_mask(virq)
            rig.irq.free_percpu_irq(virq, rig.rows)
            rig.irq.irq_destroy_ipi(virq, "1")
            assert rig.irq.irq_to_desc(virq) is None
            continue
        rig.irq.irq_destroy_ipi(virq, "0-1")
        assert len(domain.free_hwirqs()) == free + 2
        assert rig.irq.ipi_get_hwirq(virq, 0) == INVALID_HWIRQ
        refused(errno.EINVAL, rig.irq.irq_send_ipi, virq, "0")
        refused(errno.EINVAL, rig.irq.irq_destroy_ipi, virq, "1")
        rig.irq.irq_send_ipi_all(virq)
        rig.settles(0, 0, 1, 0)
        rig.irq.disable_percpu_irq_mask(virq)
        rig.irq.free_percpu_irq(virq, rig.rows)
        rig.irq.irq_destroy_ipi(virq, "2")
        assert rig.irq.irq_to_desc(virq) is None


def test_what_was_sent_before_is_not_the_next_ones(rig):
    virq = rig.reserve(None, "0-3")
    rig.irq.irq_send_ipi_all(virq)  # enabled nowhere: it stays pending
    rig.irq.irq_destroy_ipi(virq)
    again = rig.counting(None, "0-3")
    assert again == virq
    rig.settles(0, 0, 0, 0)
    rig.irq.irq_send_ipi_all(again)
    rig.settles(1, 1, 1, 1)


@KINDS
def test_what_was_put_off_is_not_the_next_ones(rig, stuck, eventually):
    """Destroyed while its handler waits for the interpreter of a CPU."""
    seen = rig.cluster.shared("seen", "i8", 2)
    seen[:] = 0

    def first(virq, dev_id):
        shmipi.shared("seen")[0] += 1

    def second(virq, dev_id):
        shmipi.shared("seen")[1] += 1

    free = stuck(rig.cluster, 1)
    virq = rig.reserve(None, "0-3")
    rig.irq.request_percpu_irq(virq, first, "", 0)
    rig.irq.enable_percpu_irq_mask(virq, "1")
    line = rig.irq.ipi_get_hwirq(virq, 1)

    def put_off():
        eventually(lambda: not rig.cluster.chip.in_service(1))
        before = seen[0]
        rig.irq.ipi_send_single(virq, 1)
        eventually(lambda: seen[0] > before or rig.cluster.chip.in_service(1))
        return seen[0] == before and rig.cluster.chip.in_service(1)

    # The first may still come before the task is in C.
    assert put_off() or put_off()
    rig.irq.disable_percpu_irq_mask(virq, "1")
    rig.irq.free_percpu_irq(virq, 0)
    rig.irq.irq_destroy_ipi(virq)
    taken = int(seen[0])
    assert rig.reserve(None, "0-3") == virq
    assert rig.irq.ipi_get_hwirq(virq, 1) == line
    rig.irq.request_percpu_irq(virq, second, "", 0)
    rig.irq.enable_percpu_irq_mask(virq, "1")
    free()
    assert seen.tolist() == [taken, 0]
    rig.irq.ipi_send_single(virq, 1)
    deadline = time.monotonic() + 5
    while seen.tolist() != [taken, 1] and time.monotonic() < deadline:
        time.sleep(0.001)
    assert seen.tolist() == [taken, 1]


def test_a_line_is_nobodys_before_and_after(rig):
    """What the hardware does to a line that no irq has reaches no irq."""
    virq = rig.reserve(None, "0-3")
    lines = [rig.irq.ipi_get_hwirq(virq, cpu) for cpu in range(NCPUS)]
    rig.irq.enable_percpu_irq_mask(virq)
    rig.irq.irq_destroy_ipi(virq)

    def others():
        return int(rig.cluster.counters()["irq_other"].sum())

    before = others()
    for cpu, line in enumerate(lines):
        rig.cluster.chip.raise_line(line, cpu)
    time.sleep(0.02)
    assert others() == before
    assert rig.counting(None, "0-3") == virq
    assert [rig.irq.ipi_get_hwirq(virq, cpu) for cpu in range(NCPUS)] == lines
    rig.settles(0, 0, 0, 0)


# ---- sending -------------------------------------------------------------------------


@KINDS
def test_masks_are_verified(rig):
    """Proves row 41."""
    virq = rig.counting(None, "1-2")
    for call in (rig.irq.irq_send_ipi, rig.irq.ipi_send_mask):
        error = refused(errno.EINVAL, call, virq, "0-1")
        assert (error.irq, error.cpu, error.domain) == (virq, 0, rig.default.name)
    assert refused(errno.EINVAL, rig.irq.ipi_send_single, virq, 3).cpu == 3
    assert refused(errno.EINVAL, rig.irq.ipi_send_single, virq, 77).cpu == 77
    rig.settles(0, 0, 0, 0)


def test_masks_of_global_ipis_are_not_but_by_the_kernels_calls(rig):
    virq = rig.counting(None, range(NCPUS))
    assert irqd_is_global_ipi(rig.irq.irq_to_desc(virq).irq_data)
    rig.irq.irq_send_ipi(virq, [1, 60])  # there is no CPU 60, and nobody looks
    rig.settles(0, 1, 0, 0)
    assert refused(errno.EINVAL, rig.irq.ipi_send_mask, virq, [1, 60]).cpu == 60
    assert refused(errno.EINVAL, rig.irq.ipi_send_single, virq, 60).cpu == 60
    rig.settles(0, 1, 0, 0)


def test_the_unverified_way(rig):
    for shape in shapes(rig):
        virq = rig.counting(rig.domain_of(shape), "0-2")
        desc = rig.irq.irq_to_desc(virq)
        __ipi_send_single(desc, 1)
        rig.settles(0, 1, 0, 0)
        __ipi_send_mask(desc, "0,2")
        rig.settles(1, 1, 1, 0)


def test_a_chip_without_send_ipi(rig):
    domain = rig.irq.irq_domain_create(DomainNode("timer", "none"))
    hwirq = domain.hwirqs()[3]
    virq = rig.irq.irq_create_mapping(domain, hwirq, "timer")
    assert rig.irq.irq_create_mapping(domain, hwirq) == virq
    for call, to in (
        (rig.irq.irq_send_ipi, "0"),
        (rig.irq.ipi_send_mask, "0"),
        (rig.irq.ipi_send_single, 0),
    ):
        error = refused(errno.EINVAL, call, virq, to)
        assert (error.irq, error.domain) == (virq, "timer")
    refused(errno.EINVAL, rig.irq.irq_reserve_ipi, domain, "0")
    refused(errno.EINVAL, rig.irq.irq_destroy_ipi, virq, "0")
    refused(errno.EINVAL, rig.irq.irq_create_mapping, domain, 9999)
    refused(errno.EINVAL, rig.irq.irq_create_mapping, None, hwirq)
    refused(errno.EBUSY, rig.irq.irq_domain_remove, domain)
    # It is for devices, which raise it.
    rig.rows[:] = 0
    rig.irq.request_percpu_irq(virq, COUNT, "timer", rig.rows)
    rig.irq.enable_percpu_irq_mask(virq, [0])
    rig.cluster.chip.raise_line(hwirq, 0)
    rig.settles(1, 0, 0, 0)
    rig.irq.disable_percpu_irq_mask(virq, [0])
    rig.irq.free_percpu_irq(virq, rig.rows)
    rig.irq.irq_dispose_mapping(virq)
    assert rig.irq.irq_to_desc(virq) is None
    ipi = rig.reserve(None, "0")
    refused(errno.EINVAL, rig.irq.irq_dispose_mapping, ipi)
    taken = rig.irq.ipi_get_hwirq(ipi, 0)
    assert refused(errno.EBUSY, rig.irq.irq_create_mapping, domain, taken).irq == ipi


# ---- several domains -----------------------------------------------------------------


@KINDS
def test_domains_with_lines_of_their_own(rig):
    root = rig.irq.root
    first, second = root.hwirqs()[:2], root.hwirqs()[2:5]
    create = rig.irq.irq_domain_create
    shape = shapes(rig)[0]
    a = create(DomainNode("a", shape, None, frozenset(first)))
    b = create(DomainNode("b", shape, None, frozenset(second)))
    assert (a.hwirqs(), b.hwirqs()) == (first, second)
    assert not {*first, *second} & {*rig.default.hwirqs()}
    virq = rig.reserve("b", "0")
    assert rig.irq.ipi_get_hwirq(virq, 0) == second[0]
    assert rig.irq.irq_to_desc(virq).domain == b
    error = refused(errno.EBUSY, create, DomainNode("c", "", None, frozenset(first)))
    assert error.domain == "c"
    assert refused(errno.EEXIST, create, DomainNode("a")).domain == "a"
    refused(errno.EEXIST, create, DomainNode("root"))
    refused(errno.EINVAL, create, DomainNode("c", parent="nowhere"))
    refused(errno.EINVAL, create, DomainNode("c", "", None, frozenset([9999])))
    refused(errno.EINVAL, create, DomainNode("c", parent="a"))
    child = create(DomainNode("child", shape, "a", frozenset(first[:1])))
    assert (child.hwirqs(), a.hwirqs()) == (first[:1], first[1:])
    inner = rig.counting(child, "2")
    rig.irq.irq_send_ipi_all(inner)
    rig.settles(0, 0, 1, 0)
    assert [
        data.domain.name
        for data in (
            rig.irq.irq_to_desc(inner).irq_data,
            rig.irq.irq_to_desc(inner).irq_data.parent,
            rig.irq.irq_to_desc(inner).irq_data.parent.parent,
        )
    ] == ["child", "a", root.name]
    for busy in ("a", "b", "child"):
        assert refused(errno.EBUSY, rig.irq.irq_domain_remove, busy).domain == busy
    refused(errno.EINVAL, rig.irq.irq_domain_remove, "root")
    # Lines that an irq has are not delegated behind its back.
    taken = rig.reserve(None, "0")
    line = rig.irq.ipi_get_hwirq(taken, 0)
    refused(errno.EBUSY, create, DomainNode("d", "", None, frozenset([line])))


@KINDS
def test_a_machine_has_no_end_of_domains_but_64(rig):
    left = _core.NDOMAINS - len(rig.irq.domains)
    for n in range(left):
        rig.irq.irq_domain_create(DomainNode(f"n{n}"))
    error = refused(errno.ENOMEM, rig.irq.irq_domain_create, DomainNode("more"))
    assert error.domain == "more"


# ---- every process sees the same -----------------------------------------------------


def reserve_and_request(rows):
    from shmipi import irq

    virq = irq.irq_reserve_ipi(None, "0-2", name="theirs")
    irq.request_percpu_irq(virq, smp.NativeHandler("count"), "count", rows)
    irq.enable_percpu_irq(virq)
    return virq


def test_a_cpu_reserves_and_all_send(rig):
    rig.rows[:] = 0
    (virq,) = rig.cluster.run(reserve_and_request, rig.rows, cpus=[1])
    rig.irq.irq_send_ipi_all(virq)
    rig.settles(0, 1, 0, 0)  # enable_percpu_irq is for the CPU that calls it
    rig.irq.enable_percpu_irq_mask(virq, "0,2")
    rig.settles(1, 1, 1, 0)

    def send(virq):
        from shmipi import irq

        me = smp.smp_processor_id()
        irq.irq_send_ipi(virq, "0-2")
        return me, irq.irq_to_desc(virq).name, irq.ipi_get_hwirq(virq, 0)

    for cpu in (3, 1):
        (seen,) = rig.cluster.run(send, virq, cpus=[cpu])
        assert seen == (cpu, "count", rig.irq.ipi_get_hwirq(virq, 0))
        rig.settles(*([2, 2, 2, 0] if cpu == 3 else [3, 3, 3, 0]))


@KINDS
def test_a_domain_travels_by_name(rig):
    domain = rig.domain_of("cpumap")

    def there(domain):
        from shmipi import irq

        return irq.irq_reserve_ipi(domain, "0,2"), domain

    ((virq, back),) = rig.cluster.run(there, domain, cpus=[2])
    assert back == domain
    assert rig.irq.irq_to_desc(virq).domain == domain
    assert rig.irq.irq_to_desc(virq).mapping.shape == "cpumap"


@KINDS
def test_an_error_reaches_the_caller_of_a_remote_call(rig):
    def bad():
        from shmipi import irq

        irq.irq_reserve_ipi("root", "0")

    with pytest.raises(shmipi.RemoteCallError) as caught:
        rig.cluster.run(bad, cpus=[0])
    assert isinstance(caught.value.__cause__, IrqError)
    assert caught.value.__cause__.domain == rig.irq.root.name


@KINDS
def test_not_in_an_interrupt_handler(rig):
    def in_handler():
        from shmipi import irq

        irq.irq_reserve_ipi(None, "0")

    with pytest.raises(shmipi.RemoteCallError) as caught:
        rig.cluster.call(0, in_handler)
    assert isinstance(caught.value.__cause__, ClusterStateError)

    def masked():
        smp.local_irq_disable()
        try:
            in_handler()
        finally:
            smp.local_irq_enable()

    with pytest.raises(shmipi.RemoteCallError, match="interrupts disabled"):
        rig.cluster.run(masked, cpus=[0])
    virq = rig.counting(None, "0-1")

    def send(virq):
        from shmipi import irq

        irq.irq_send_ipi(virq, [1])

    rig.cluster.call(0, send, virq)  # sending is what handlers may do
    rig.settles(0, 1, 0, 0)


def test_an_offline_cpu_is_no_error(rig):
    virq = rig.counting(None, "0-3")
    rig.cluster.offline(2)
    try:
        rig.irq.irq_send_ipi_all(virq)
        rig.irq.ipi_send_single(virq, 2)
        rig.settles(1, 1, 0, 1)
    finally:
        rig.cluster.online(2)
    rig.settles(1, 1, 0, 1)
    rig.irq.ipi_send_single(virq, 2)
    rig.settles(1, 1, 1, 1)


# ---- a holder that dies --------------------------------------------------------------


def die_at(store, shape, what):
    """Do something, and be killed before that store into the table.

    Destroying begins with one in Python; the others are steps of the core's.
    """
    from shmipi import _core, irq
    from shmipi.irq.table import IrqTable

    original, left = IrqTable._store, [store]

    def count(self, *args):
        if left[0] == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        left[0] -= 1
        original(self, *args)

    virq, machine = None, irq.irq().table.machine
    if what == "destroy":
        virq = irq.irq_reserve_ipi(shape, "1-2")
        if store:
            machine.arm_step(machine.id, "undo", _core.STEP_KILL, store - 1)
    IrqTable._store = count
    try:
        if what == "destroy":
            irq.irq_destroy_ipi(virq)
            return -1
        return irq.irq_reserve_ipi(shape, "1-2")
    finally:
        IrqTable._store = original


@pytest.mark.parametrize("what", ["reserve", "destroy"])
@pytest.mark.parametrize("controller", ["apic", "mips-gic"])
def test_a_holder_of_the_lock_is_killed_at_every_store(boot, controller, what):
    """Nothing is half there afterwards: all of it, or nothing."""
    rig = Rig(boot(NCPUS, idle="halt", controller=controller, steps=True))
    domain = rig.domain_of(shapes(rig)[0])
    free = domain.free_hwirqs()
    deaths = 0
    for store in range(100):
        try:
            (virq,) = rig.cluster.run(die_at, store, domain.name, what, cpus=[3])
        except shmipi.CpuDiedError:
            deaths += 1
        else:
            if virq > 0:
                rig.irq.irq_destroy_ipi(virq)
            break
        # The next one to take the lock finds the holder dead, and tidies up.
        start = time.monotonic()
        probe = rig.irq.irq_reserve_ipi(domain, "0")
        assert time.monotonic() - start < 2
        rig.irq.irq_destroy_ipi(probe)
        left = rig.irq.table.virqs()
        if left:  # killed before the first store of a destroy, or after the last of all
            assert len(left) == 1
            assert rig.irq.irq_to_desc(left[0]).alive
            rig.irq.irq_destroy_ipi(left[0])
        assert domain.free_hwirqs() == free
        assert rig.machine.pic_read(0, "undo") == 0
        assert not rig.irq.table._desc["used"][1:].any()
        rig.cluster.online(3)
    assert deaths >= (6 if what == "destroy" else 15)
    virq = rig.counting(domain, "1-2")
    rig.irq.irq_send_ipi_all(virq)
    rig.settles(0, 1, 1, 0)


@pytest.mark.parametrize("what", ["reserve", "destroy"])
def test_an_irq_of_the_same_vector_outlives_a_killed_holder(boot, what):
    """x86: CPU 0's irq has the vector that is being given to others, or taken back."""
    rig = Rig(boot(NCPUS, idle="halt", steps=True))
    same = rig.counting(None, "0")
    vector = rig.irq.ipi_get_hwirq(same, 0)
    name, deaths = rig.default.name, 0
    for store in range(100):
        try:
            (virq,) = rig.cluster.run(die_at, store, name, what, cpus=[3])
        except shmipi.CpuDiedError:
            deaths += 1
        else:
            if virq > 0:
                rig.irq.irq_destroy_ipi(virq)
            break
        with rig.irq.table.locked():  # finds the holder dead, and tidies up
            left = [virq for virq in rig.irq.table.virqs() if virq != same]
        for virq in left:
            assert rig.irq.table.owners(vector) == [virq, same]
            rig.irq.irq_destroy_ipi(virq)
        assert rig.irq.table.owners(vector) == [same]
        rig.irq.ipi_send_single(same, 0)
        rig.settles(deaths, 0, 0, 0)
        rig.cluster.online(3)
    assert deaths >= (6 if what == "destroy" else 15)


def test_a_stopped_holder_is_waited_for(boot, monkeypatch):
    rig = Rig(boot(2, idle="halt"))
    table = type(rig.irq.table)
    monkeypatch.setattr(table, "locked", lambda self: self.machine.irq_lock(0.05))

    def hold():
        from shmipi import irq

        with irq.irq().table.locked():
            os.kill(os.getpid(), signal.SIGSTOP)

    pid = rig.cluster.cpus[1].pid
    call = rig.machine.post(1, hold, (), None, True)
    try:
        deadline = time.monotonic() + 5
        while rig.machine.pic_read(0, "undo") or not stopped(pid):
            assert time.monotonic() < deadline
            time.sleep(0.001)
        with pytest.raises(shmipi.IpiTimeoutError, match="stopped"):
            rig.irq.irq_reserve_ipi(None, "0")
    finally:
        os.kill(pid, signal.SIGCONT)
    rig.machine.collect(call, 1, 5.0)
    rig.reserve(None, "0")


def test_a_cpu_goes_offline_after_it_has_let_go(boot, background):
    """A task that stands still while its CPU is offline does not hold the lock."""
    cluster = boot(2, idle="halt")
    at = cluster.shared("at", "i8", 2)

    def hold(at):
        from shmipi import irq

        with irq.irq().table.locked():
            at[0] = 1
            while at[0] == 1:  # who takes the time below has not begun
                pass
            end = time.monotonic() + 0.3
            while time.monotonic() < end:
                pass
        while not at[1]:
            time.sleep(0.001)

    call = cluster._machine.post(1, hold, (at,), None, True)
    while not at[0]:
        time.sleep(0.001)
    offline = background(cluster.offline, 1)
    start = time.monotonic()
    at[0] = 2
    cluster.irq.irq_reserve_ipi(None, "0")
    assert 0.3 <= time.monotonic() - start < 3
    offline.end()
    at[1] = 1
    cluster.online(1)
    cluster._machine.collect(call, 1, 5.0)


def stopped(pid):
    with open(f"/proc/{pid}/stat") as file:
        return file.read().rpartition(")")[2].split()[0] == "T"


# ---- descriptions of whole machines --------------------------------------------------


def test_a_machine_with_several_ipi_controllers(boot):
    text = """
        fast { compatible = "shmipi,ipi-per-cpu"; reserved-ipi-vectors = <0x40 4>;
               shmipi,default; };
        slow { compatible = "shmipi,ipi-single"; interrupt-parent = <&root>; };
    """
    cluster = boot(2, idle="halt", domains=text)
    names = [domain.name for domain in cluster.irq.domains]
    assert names == ["apic vector", "apic-ipi", "fast", "slow"]
    default = cluster.irq.irq_reserve_ipi(None, "0-1")
    assert [cluster.irq.ipi_get_hwirq(default, cpu) for cpu in (0, 1)] == [64, 65]
    slow = cluster.irq.irq_reserve_ipi("slow", "0-1")
    assert cluster.irq.ipi_get_hwirq(slow, 0) == cluster.irq.ipi_get_hwirq(slow, 1)
    assert cluster.irq.ipi_get_hwirq(slow, 0) not in range(64, 68)
    own = cluster.irq.irq_reserve_ipi("apic-ipi", "0-1")
    cluster.irq.irq_reserve_ipi(None, "0-1")
    error = refused(errno.EBUSY, cluster.irq.irq_reserve_ipi, None, "0-1")
    assert error.domain == "fast"
    assert len({default, slow, own}) == 3


def test_a_description_that_cannot_be_boots_nothing():
    with pytest.raises(DeviceTreeError, match="hwirq 3 is not gicv3's"):
        shmipi.Cluster(
            2,
            controller="gicv3",
            domains={"a": {"compatible": "shmipi,ipi", "reserved-ipi-vectors": [3, 1]}},
        )
