"""Sending IPIs of domains in the core: what is sent, refused and counted."""

import errno
import gc
import sys
import time

import pytest

import shmipi
from shmipi import CpuMask, smp
from shmipi.errors import IrqError
from shmipi.irq import DomainNode
from shmipi.irq.chips import CHIPS, Apic
from shmipi.irq.table import IrqTable

NCPUS = 4
COUNT = smp.NativeHandler("count")


class Rig:
    def __init__(self, cluster):
        self.cluster, self.irq = cluster, cluster.irq
        self.rows = cluster.percpu("counts", "i8")
        self.shapes = ["block", "cpumap"]
        if cluster.chip.flow != "shared":
            self.shapes.insert(0, "single")
        for shape in self.shapes:
            self.irq.irq_domain_create(DomainNode(shape, shape))

    def counting(self, domain, dest):
        virq = self.irq.irq_reserve_ipi(domain, dest)
        self.rows[:] = 0
        self.irq.request_percpu_irq(virq, COUNT, "counting", self.rows)
        self.irq.enable_percpu_irq_mask(virq)
        return virq

    def drop(self, virq):
        self.irq.disable_percpu_irq_mask(virq)
        self.irq.free_percpu_irq(virq, self.rows)
        self.irq.irq_destroy_ipi(virq)

    def took(self, *counts):
        deadline = time.monotonic() + 5
        while self.rows.tolist() != list(counts) and time.monotonic() < deadline:
            time.sleep(0.0005)
        time.sleep(0.002)
        assert self.rows.tolist() == list(counts)
        self.rows[:] = 0

    def asleep(self):
        """All have taken what was sent: who is rung is not halted any more."""
        halted, machine = 3, self.cluster._machine  # enum shi_state
        return all(machine.slot(cpu).state == halted for cpu in range(NCPUS))

    def writes(self):
        return self.cluster.host_counters()["chip_writes"]


@pytest.fixture(scope="module", params=CHIPS)
def rig(request):
    with shmipi.Cluster(NCPUS, idle="halt", controller=request.param) as cluster:
        yield Rig(cluster)


KINDS = pytest.mark.parametrize("rig", ["apic", "mips-gic"], indirect=True)


def refused(call, *args):
    with pytest.raises(IrqError) as caught:
        call(*args)
    assert caught.value.errno == errno.EINVAL
    return caught.value


def python_calls(call, *args):
    """How many Python functions does a call run, without a collector's?"""
    calls = []
    gc.disable()
    sys.setprofile(lambda frame, event, arg: event == "call" and calls.append(frame))
    try:
        call(*args)
    finally:
        sys.setprofile(None)
        gc.enable()
    return len(calls)


def test_a_send_is_one_call_of_the_core(rig):
    """Verified and sent without one Python function beside the one that was called."""
    for shape in rig.shapes:
        virq = rig.counting(shape, "0-3")
        for call, *args in (
            (rig.irq.ipi_send_single, 1),
            (rig.irq.ipi_send_mask, "1"),
            (rig.irq.ipi_send_mask, [1]),
            (rig.irq.irq_send_ipi, CpuMask("1")),
            (rig.irq.irq_send_ipi, (1,)),
        ):
            assert python_calls(call, virq, *args) == 1
            rig.took(0, 1, 0, 0)
        assert python_calls(rig.irq.irq_send_ipi_all, virq) == 1
        rig.took(1, 1, 1, 1)
        rig.drop(virq)


def test_it_sends_and_counts_what_the_hierarchy_does(rig, monkeypatch, eventually):
    """The same interrupts and register writes as domain by domain, in Python."""
    masks = ["0", "1-2", "0,2-3", "0-3", "", "all"]
    for shape in rig.shapes:
        virq = rig.counting(shape, "0-3")
        for mask in masks:
            cpus = CpuMask(mask, NCPUS)
            counted = []
            for quick in (True, False):
                with monkeypatch.context() as patch:
                    if not quick:
                        table = rig.irq.table
                        patch.setattr(table, "send_mask", lambda *_: False)
                        patch.setattr(table, "send_all", lambda *_: False)
                        patch.setattr(table, "send_single", lambda *_: False)
                    before = rig.writes()
                    rig.irq.ipi_send_mask(virq, mask)
                    rig.irq.irq_send_ipi(virq, cpus)
                    for cpu in cpus:
                        rig.irq.ipi_send_single(virq, cpu)
                    if cpus == CpuMask("0-3"):
                        rig.irq.irq_send_ipi_all(virq)
                    counted.append(rig.writes() - before)
                each = [cpu in cpus for cpu in range(NCPUS)]
                eventually(rig.asleep)  # a call may be taken before what is pending
                assert (rig.rows > 0).tolist() == each
                rig.rows[:] = 0
            assert counted[0] == counted[1], (shape, mask)
        rig.drop(virq)


@KINDS
@pytest.mark.parametrize(
    "mask",
    [
        *("1", "1-2", "0,2-3", "2-N", "all", "0-3:1/2", ""),
        *([1], [3, 1, 1], (0, 2), {2, 3}, range(1, 3), CpuMask("3"), []),
        pytest.param(iter([2]), id="iterator"),  # its str() is another in each process
    ],
    ids=str,
)
def test_every_spelling_of_a_mask_is_understood(rig, mask):
    virq = rig.counting("block", "0-3")
    if isinstance(mask, type(iter([]))):
        cpus, mask = CpuMask("2"), iter([2])
    else:
        cpus = CpuMask(mask, NCPUS)
    rig.irq.ipi_send_mask(virq, mask)
    rig.took(*(int(cpu in cpus) for cpu in range(NCPUS)))
    rig.drop(virq)


@KINDS
def test_what_is_no_mask_and_no_cpu_is_refused_as_before(rig):
    virq = rig.counting("block", "0-2")
    for wrong in ("1,", "-1", "x", "1 2", "2-1", "0-", [-1], [True]):
        with pytest.raises(ValueError, match=r"CPU|range"):
            rig.irq.ipi_send_mask(virq, wrong)
    for wrong in (1, None, ["1"], b"1"):
        with pytest.raises(TypeError):
            rig.irq.ipi_send_mask(virq, wrong)
    for wrong in ("3", [0, 3], "0-3", [64], CpuMask([4000]), "all", [70, 3]):
        error = refused(rig.irq.ipi_send_mask, virq, wrong)
        assert (error.irq, error.domain) == (virq, "block")
    assert refused(rig.irq.ipi_send_single, virq, 3).cpu == 3
    assert refused(rig.irq.ipi_send_single, virq + 1, 1).irq == virq + 1  # of the block
    assert refused(rig.irq.ipi_send_single, 0, 1).irq == 0
    with pytest.raises(TypeError):
        rig.irq.ipi_send_single(str(virq), 1)
    with pytest.raises(ValueError, match="truth value"):
        rig.irq.ipi_send_single(virq, True)
    rig.took(0, 0, 0, 0)
    rig.drop(virq)


@KINDS
def test_nothing_that_changed_is_sent_by_what_was(rig):
    """Freed, reserved again, given back for a CPU, hotplugged: each seen at once."""
    virq = rig.counting("block", "0-3")
    send = rig.irq.ipi_send_single
    send(virq, 2)
    rig.took(0, 0, 1, 0)
    rig.drop(virq)
    refused(send, virq, 2)
    refused(rig.irq.irq_send_ipi_all, virq)
    again = rig.counting("cpumap", "1,3")  # the same number, other CPUs, other lines
    assert again == virq
    assert refused(send, virq, 2).domain == "cpumap"
    refused(rig.irq.ipi_send_mask, virq, "1-3")
    rig.irq.irq_send_ipi_all(virq)
    rig.took(0, 1, 0, 1)
    rig.irq.irq_destroy_ipi(virq, "3")  # given back for that CPU
    refused(send, virq, 3)
    rig.irq.irq_send_ipi_all(virq)
    rig.took(0, 1, 0, 0)
    rig.cluster.offline(1)
    send(virq, 1)  # nobody asks whether it is online; it is lost
    rig.cluster.online(1)
    rig.took(0, 0, 0, 0)
    send(virq, 1)
    rig.took(0, 1, 0, 0)
    rig.drop(virq)


@KINDS
def test_what_another_process_changed_is_seen_in_a_handler_and_in_a_task(rig, script):
    """A CPU that has sent before, an attached host destroys: no sender keeps a copy."""
    virq = rig.counting("block", "0-3")

    def send(virq):
        from shmipi import irq

        try:
            irq.ipi_send_single(virq, 2)
        except IrqError as error:
            return error.errno

    assert rig.cluster.call(1, send, virq) is None  # from a handler
    rig.took(0, 0, 1, 0)
    assert rig.cluster.run(send, virq, cpus=[0]) == [None]
    rig.took(0, 0, 1, 0)
    program = """
    import sys
    from shmipi import Cluster
    with Cluster.attach(sys.argv[1]) as lab:
        virq = int(sys.argv[2])
        lab.irq.ipi_send_single(virq, 3)
        lab.call(3, int)  # taken
        lab.irq.irq_destroy_ipi(virq, "2")
    """
    script(program, rig.cluster.name, str(virq))
    rig.took(0, 0, 0, 1)
    assert rig.cluster.call(1, send, virq) == errno.EINVAL
    assert rig.cluster.run(send, virq, cpus=[0]) == [errno.EINVAL]
    rig.drop(virq)


def test_a_controllers_own_raise_line_is_asked(boot):
    class Own(Apic):
        raised = ()

        def raise_line(self, line, cpus, writes=None):
            self.raised = (*self.raised, line)
            super().raise_line(line, cpus, writes)

    assert Apic.core_raises
    assert not Own.core_raises
    cluster = boot(2, idle="halt", controller=Own())
    virq = cluster.irq.irq_reserve_ipi(None, "0-1")
    line = cluster.irq.ipi_get_hwirq(virq, 0)
    cluster.irq.ipi_send_single(virq, 1)
    cluster.irq.ipi_send_mask(virq, "0-1")
    assert cluster.chip.raised == (line, line)


def test_more_cpus_than_a_word_has_bits(boot):
    cluster = boot(66, idle="halt")
    rows = cluster.percpu("counts", "i8")
    virq = cluster.irq.irq_reserve_ipi(None, "1-65")
    cluster.irq.request_percpu_irq(virq, COUNT, "counting", rows)
    cluster.irq.enable_percpu_irq_mask(virq)
    assert isinstance(cluster.irq.table, IrqTable)
    cluster.irq.ipi_send_single(virq, 65)
    cluster.irq.ipi_send_mask(virq, [1, 64])
    cluster.irq.ipi_send_mask(virq, CpuMask("63"))
    error = refused(cluster.irq.ipi_send_mask, virq, "0-65")
    assert error.cpu == 0
    assert refused(cluster.irq.ipi_send_mask, virq, CpuMask([66, 200])).cpu == 66
    deadline = time.monotonic() + 5
    while rows.sum() < 4 and time.monotonic() < deadline:
        time.sleep(0.001)
    assert [cpu for cpu in range(66) if rows[cpu]] == [1, 63, 64, 65]
