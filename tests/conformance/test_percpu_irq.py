"""Per-CPU irqs on every controller: handlers, masks, hotplug, death, and refusals."""

import errno
import os
import signal
import time
import warnings

import pytest

import shmipi
from shmipi import ClusterStateError, ShmipiWarning, irq, smp
from shmipi.errors import IrqError
from shmipi.irq import DomainNode
from shmipi.irq.chips import CHIPS

COUNT = smp.NativeHandler("count")


class Rig:
    def __init__(self, cluster):
        self.cluster, self.irq, self.machine = cluster, cluster.irq, cluster._machine
        self.rows = cluster.percpu("counts", "i8")
        self.seen = cluster.percpu("seen", "i8", 2)

    def native(self, dest="0-2", on=True):
        virq = self.irq.irq_reserve_ipi(None, dest)
        self.rows[:] = 0
        self.irq.request_percpu_irq(virq, COUNT, "native", self.rows)
        if on:
            self.irq.enable_percpu_irq_mask(virq)
        return virq

    def settles(self, *counts, where=None):
        where = self.rows if where is None else where
        deadline = time.monotonic() + 5
        while where.tolist() != list(counts) and time.monotonic() < deadline:
            time.sleep(0.0005)
        time.sleep(0.003)
        assert where.tolist() == list(counts)

    def counter(self, name):
        return int(self.cluster.counters()[name].sum())

    def wait(self, condition):
        deadline = time.monotonic() + 5
        while not condition():
            assert time.monotonic() < deadline, "it did not happen"
            time.sleep(0.0005)

    def clear(self):
        for virq in self.irq.table.virqs():
            with self.irq.table.locked():
                self.irq.table.destroy(virq, self.irq.irq_to_desc(virq).ipi_nr)
        for domain in self.irq.domains[2:]:
            self.irq.irq_domain_remove(domain)
        self.seen[:] = 0
        for cpu in range(3):
            self.cluster.online(cpu)


@pytest.fixture(scope="module", params=CHIPS)
def booted(request):
    with shmipi.Cluster(3, idle="halt", controller=request.param) as cluster:
        yield Rig(cluster)


KINDS = pytest.mark.parametrize("booted", ["apic", "mips-gic"], indirect=True)


@pytest.fixture
def rig(booted):
    yield booted
    booted.clear()


def refused(code, call, *args, **options):
    with pytest.raises(IrqError) as caught:
        call(*args, **options)
    assert caught.value.errno == code, caught.value
    return caught.value


def note(irq, dev_id):
    """A Python handler: how often, and which irq."""
    row = shmipi.percpu("seen")[smp.smp_processor_id()]
    row[0] += 1
    row[1] = irq


# ---- masks ---------------------------------------------------------------------------


def test_what_comes_while_disabled_is_taken_once_on_enable(rig):
    virq = rig.native(on=False)
    for _ in range(3):
        rig.irq.irq_send_ipi_all(virq)
    rig.settles(0, 0, 0)
    rig.irq.enable_percpu_irq_mask(virq, "0-1")
    rig.wait(lambda: rig.rows[0] and rig.rows[1])
    # None halts before it has taken all that it was sent.
    rig.wait(lambda: {cpu.state for cpu in rig.cluster.cpus} == {"halted"})
    taken = rig.rows.tolist()
    # Once; where a source remembers that it came again (Q of an ESB), once more.
    assert set(taken[:2]) <= ({1, 2} if rig.cluster.chip.flow == "esb" else {1})
    rig.irq.disable_percpu_irq_mask(virq, [0])
    rig.irq.irq_send_ipi(virq, "0-1")
    rig.wait(lambda: rig.rows[1] > taken[1])
    time.sleep(0.003)
    assert rig.rows[0] == taken[0]
    assert not rig.rows[2]
    assert [rig.irq.irq_percpu_is_enabled(virq, cpu) for cpu in range(3)] == [
        False,
        True,
        False,
    ]
    rig.irq.enable_percpu_irq_mask(virq, [0])
    rig.wait(lambda: rig.rows[0] > taken[0])


def test_a_cpu_enables_for_itself(rig):
    virq = rig.native(on=False)

    def switch(virq, on):
        (irq.enable_percpu_irq if on else irq.disable_percpu_irq)(virq)
        return irq.irq().irq_percpu_is_enabled(virq)

    assert rig.cluster.run(switch, virq, True, cpus="1-2") == [True, True]
    rig.irq.irq_send_ipi_all(virq)
    rig.settles(0, 1, 1)
    assert rig.cluster.run(switch, virq, False, cpus=[1]) == [False]
    rig.irq.irq_send_ipi(virq, "1-2")
    rig.settles(0, 1, 2)


def test_masks_follow_a_cpu_offline_and_back(rig):
    virq = rig.native()
    rig.irq.disable_percpu_irq_mask(virq, [2])
    for cpu in (1, 2):
        rig.cluster.offline(cpu)
    rig.irq.irq_send_ipi_all(virq)
    rig.settles(1, 0, 0)
    for cpu in (1, 2):
        rig.cluster.online(cpu)
    rig.settles(1, 0, 0)  # lost, as everything sent to a CPU that is not there
    rig.irq.irq_send_ipi_all(virq)
    rig.settles(2, 1, 0)
    rig.irq.enable_percpu_irq_mask(virq, [2])
    rig.settles(2, 1, 1)


def test_enabling_on_a_cpu_that_is_offline_waits_for_it(rig):
    virq = rig.native(on=False)
    rig.cluster.offline(1)
    rig.irq.enable_percpu_irq_mask(virq, [1])
    rig.cluster.online(1)
    rig.irq.irq_send_ipi(virq, [1])
    rig.settles(0, 1, 0)


@pytest.mark.parametrize("controller", CHIPS)
def test_masks_survive_a_kill_and_a_new_process(boot, controller):
    rig = Rig(boot(3, idle="halt", controller=controller))
    virq = rig.native()
    rig.irq.disable_percpu_irq_mask(virq, [2])
    rig.irq.irq_send_ipi(virq, [1])
    rig.settles(0, 1, 0)
    for cpu in (1, 2):
        os.kill(rig.cluster.cpus[cpu].pid, signal.SIGKILL)
    rig.wait(lambda: [c.state for c in rig.cluster.cpus[1:]] == ["dead", "dead"])
    rig.irq.irq_send_ipi_all(virq)
    rig.settles(1, 1, 0)
    for cpu in (1, 2):
        rig.cluster.online(cpu)
    rig.settles(1, 1, 0)
    rig.irq.irq_send_ipi_all(virq)
    rig.settles(2, 2, 0)
    rig.irq.enable_percpu_irq_mask(virq, [2])
    rig.settles(2, 2, 1)


# ---- handlers ------------------------------------------------------------------------


def test_a_python_handler_idle_and_in_a_task(rig):
    virq = rig.irq.irq_reserve_ipi(None, "0-2")
    rig.irq.request_percpu_irq(virq, note, "note", rig.seen)
    rig.irq.enable_percpu_irq_mask(virq)
    rig.irq.irq_send_ipi_all(virq)
    rig.settles([1, virq], [1, virq], [1, virq], where=rig.seen)

    def busy(virq):
        seen = shmipi.percpu("seen")
        end = time.monotonic() + 5
        irq.irq_send_ipi(virq, [smp.smp_processor_id()])  # to itself, too
        while seen[1, 0] < 3 and time.monotonic() < end:
            pass
        return int(seen[1, 0])

    call = rig.machine.post(1, busy, (virq,), None, True)
    rig.wait(lambda: rig.seen[1, 0] == 2)
    rig.irq.irq_send_ipi(virq, [1])
    assert rig.machine.collect(call, 1, 10.0) == 3
    rig.settles([1, virq], [3, virq], [1, virq], where=rig.seen)


class Handler:
    """Callable, and no function."""

    def __call__(self, irq, dev_id):
        dev_id[smp.smp_processor_id()] += irq


@KINDS
def test_what_a_handler_gets(rig):
    shared = rig.cluster.shared("dev", "i8", 3)
    shared[:] = 0
    virq = rig.irq.irq_reserve_ipi(None, "0-2")

    def with_request(handler, dev_id):
        rig.irq.request_percpu_irq(virq, handler, "h", dev_id)
        rig.irq.enable_percpu_irq_mask(virq)
        rig.irq.irq_send_ipi(virq, "1-2")

    def done():
        rig.irq.disable_percpu_irq_mask(virq)

    with_request(Handler(), shared)  # an object, and a shared array as it is
    rig.settles(0, virq, virq, where=shared)
    done()
    with pytest.warns(ShmipiWarning, match="already-free"):
        rig.irq.free_percpu_irq(virq, rig.rows)  # requested with another dev_id
    rig.irq.free_percpu_irq(virq, shared)

    def row(irq, dev):
        assert dev.shape == (2,)
        dev[0] += 7

    with_request(row, rig.seen)  # a per-CPU array: this CPU's row
    rig.settles([0, 0], [7, 0], [7, 0], where=rig.seen)
    done()
    rig.irq.free_percpu_irq(virq, rig.seen)
    rig.rows[:] = 0

    def number(irq, dev):
        dev += 5

    with_request(number, rig.rows)  # a number for each CPU: an array of one
    rig.settles(0, 5, 5)
    done()
    rig.irq.free_percpu_irq(virq, rig.rows)
    with_request(COUNT, shared[:1])  # native, and one word for all
    rig.settles(2, virq, virq, where=shared)


def test_a_handler_that_raises_harms_nobody(boot, capfd):
    rig = Rig(boot(3, idle="halt"))
    virq = rig.irq.irq_reserve_ipi(None, "0")

    def bad(irq, dev_id):
        raise ValueError("from the handler")

    rig.irq.request_percpu_irq(virq, bad, "bad", 0)
    rig.irq.enable_percpu_irq_mask(virq)
    before = rig.counter("unraisable")
    for _ in range(2):
        rig.irq.irq_send_ipi_all(virq)
        rig.wait(lambda n=before: rig.counter("unraisable") > n)
        before = rig.counter("unraisable")
    assert rig.cluster.call(0, os.getpid) == rig.cluster.cpus[0].pid
    assert "from the handler" in capfd.readouterr().err


@pytest.mark.parametrize("controller", ["apic", "mips-gic"])
def test_a_python_handler_dies_with_its_requester(boot, controller):
    rig = Rig(boot(3, idle="halt", controller=controller))

    def request(virq):
        irq.request_percpu_irq(virq, note, "theirs", 0)

    virq = rig.irq.irq_reserve_ipi(None, "0-2")
    rig.cluster.run(request, virq, cpus=[1])
    rig.irq.enable_percpu_irq_mask(virq)
    rig.irq.irq_send_ipi(virq, "0,2")
    rig.settles([1, virq], [0, 0], [1, virq], where=rig.seen)
    os.kill(rig.cluster.cpus[1].pid, signal.SIGKILL)
    rig.wait(lambda: rig.cluster.cpus[1].state == "dead")
    for back in (False, True):
        if back:
            rig.cluster.online(1)
        before = rig.counter("irq_other"), rig.counter("irq_handled")
        rig.irq.irq_send_ipi(virq, "0,2")
        rig.wait(lambda n=before[0]: rig.counter("irq_other") == n + 2)
        assert rig.counter("irq_handled") == before[1]
    rig.settles([1, virq], [0, 0], [1, virq], where=rig.seen)
    # Still requested; whoever comes frees it and takes it over.
    refused(errno.EBUSY, rig.irq.request_percpu_irq, virq, note, "", 0)
    rig.irq.disable_percpu_irq_mask(virq)
    rig.irq.free_percpu_irq(virq)
    rig.irq.request_percpu_irq(virq, note, "ours", 0)
    rig.irq.enable_percpu_irq_mask(virq)
    rig.irq.irq_send_ipi_all(virq)
    rig.settles([2, virq], [1, virq], [2, virq], where=rig.seen)


# ---- refusals ------------------------------------------------------------------------


@KINDS
def test_requesting_what_cannot_be(rig):
    request = rig.irq.request_percpu_irq
    assert refused(errno.EINVAL, request, 0, note, "", 0).irq == 0
    assert refused(errno.EINVAL, request, 99, note, "", 0).irq == 99
    virq = rig.irq.irq_reserve_ipi(None, "0-1")
    error = refused(errno.EINVAL, request, virq, None, "", 0)
    assert (error.irq, error.domain) == (virq, rig.irq.domain().name)
    with pytest.raises(TypeError, match="an irq handler is"):
        request(virq, 3, "", 0)
    with pytest.raises(TypeError, match="a native irq handler takes"):
        request(virq, COUNT, "x", b"text")
    request(virq, note, "first", 0)
    error = refused(errno.EBUSY, request, virq, note, "second", 0)
    assert (error.irq, error.domain) == (virq, rig.irq.domain().name)
    assert rig.irq.irq_to_desc(virq).name == "first"
    block = rig.irq.irq_domain_create(DomainNode("block", "block"))
    part = rig.irq.irq_reserve_ipi(block, "0-1") + 1
    for call in (request, rig.irq.enable_percpu_irq_mask):
        args = (part, note, "", 0) if call == request else (part,)
        assert refused(errno.EINVAL, call, *args).irq == part


@KINDS
def test_enabling_what_cannot_be(rig):
    virq = rig.native("0-1")
    for call in (rig.irq.enable_percpu_irq_mask, rig.irq.disable_percpu_irq_mask):
        error = refused(errno.EINVAL, call, virq, "1-2")
        assert (error.irq, error.cpu, error.domain) == (
            virq,
            2,
            rig.irq.domain().name,
        )
        assert refused(errno.EINVAL, call, 77).irq == 77

    def on_a_foreign_cpu(virq):
        irq.enable_percpu_irq(virq)

    with pytest.raises(shmipi.RemoteCallError) as caught:
        rig.cluster.run(on_a_foreign_cpu, virq, cpus=[2])
    assert caught.value.__cause__.cpu == 2
    with pytest.raises(ClusterStateError, match="the host is no CPU"):
        rig.irq.irq_percpu_is_enabled(virq)


@KINDS
def test_freeing_what_is_in_use_only_warns(rig):
    virq = rig.native("0-2")
    rig.irq.disable_percpu_irq_mask(virq, "0-1")
    with pytest.warns(ShmipiWarning, match=f"IRQ {virq} still enabled on CPU2!"):
        rig.irq.free_percpu_irq(virq, rig.rows)
    rig.irq.ipi_send_single(virq, 2)
    rig.settles(0, 0, 1)
    rig.irq.disable_percpu_irq_mask(virq, [2])
    rig.irq.free_percpu_irq(virq, rig.rows)
    with pytest.warns(ShmipiWarning, match="already-free IRQ"):
        rig.irq.free_percpu_irq(virq, rig.rows)
    assert rig.irq.free_percpu_irq(99) is None  # manage.c: returns silently


@KINDS
def test_destroying_a_requested_irq_withdraws_it(rig):
    virq = rig.native("0-2")
    with pytest.warns(ShmipiWarning, match="destroyed while it was requested"):
        rig.irq.irq_destroy_ipi(virq)
    again = rig.irq.irq_reserve_ipi(None, "0-2")
    assert again == virq
    rig.irq.irq_send_ipi_all(again)
    rig.settles(0, 0, 0)
    assert not any(rig.irq.irq_percpu_is_enabled(again, cpu) for cpu in range(3))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        rig.irq.request_percpu_irq(again, COUNT, "new", rig.rows)


def test_a_spurious_percpu_irq_is_disabled_where_it_came(rig):
    """handle_percpu_devid_irq: "Spurious and unmasked percpu IRQ"."""
    virq = rig.irq.irq_reserve_ipi(None, "0-2")
    rig.irq.enable_percpu_irq_mask(virq)
    before = rig.counter("irq_other")
    rig.irq.irq_send_ipi(virq, "0-1")
    rig.wait(lambda: rig.counter("irq_other") == before + 2)

    def enabled():
        return [rig.irq.irq_percpu_is_enabled(virq, cpu) for cpu in range(3)]

    # It is disabled after it was counted.
    rig.wait(lambda: enabled() == [False, False, True])
    # It comes no more, and when somebody has requested it and enables it, once.
    for _ in range(3):
        rig.irq.irq_send_ipi(virq, "0-1")
    rig.cluster.smp.on_each_cpu(id)
    assert rig.counter("irq_other") == before + 2
    rig.rows[:] = 0
    rig.irq.request_percpu_irq(virq, COUNT, "late", rig.rows)
    rig.settles(0, 0, 0)
    rig.irq.enable_percpu_irq_mask(virq)
    rig.settles(1, 1, 0)


# ---- as in kernel/irq/manage.c -------------------------------------------------------


def test_the_second_argument_of_enable_percpu_irq_is_a_type(rig):
    """It acts on this CPU only; 0 is IRQ_TYPE_NONE and no CPU."""
    virq = rig.native(on=False)

    def enabled():
        return [rig.irq.irq_percpu_is_enabled(virq, cpu) for cpu in range(3)]

    def enable(virq, *type):
        irq.enable_percpu_irq(virq, *type)
        return irq.irq_percpu_is_enabled(virq)

    assert rig.cluster.run(enable, virq, 0, cpus=[1]) == [True]
    assert enabled() == [False, True, False]
    assert rig.cluster.call(2, enable, virq, irq.IRQ_TYPE_EDGE_RISING)
    assert enabled() == [False, True, True]
    rig.cluster.run(irq.disable_percpu_irq, virq, cpus=[1])
    assert enabled() == [False, False, True]
    rig.irq.irq_send_ipi_all(virq)
    rig.settles(0, 0, 1)
    for call in (rig.irq.enable_percpu_irq, rig.irq.disable_percpu_irq):
        with pytest.raises(ClusterStateError, match="percpu_irq_mask"):
            call(virq)


@pytest.mark.parametrize("booted", ["apic", "gicv3"], indirect=True)
def test_a_type_that_the_chip_cannot_set(rig):
    """gic_set_type: an SGI is edge triggered; a chip without irq_set_type takes any."""
    virq = rig.native(on=False)
    edge_only = rig.cluster.controller == "gicv3"

    def enable(virq):
        with warnings.catch_warnings(record=True) as given:
            warnings.simplefilter("always")
            irq.enable_percpu_irq(virq, irq.IRQ_TYPE_LEVEL_HIGH)
        return irq.irq_percpu_is_enabled(virq), [str(w.message) for w in given]

    ((on, told),) = rig.cluster.run(enable, virq, cpus=[0])
    assert on is not edge_only
    assert [f"failed to set type for IRQ{virq}" in text for text in told] == [
        True
    ] * edge_only


@KINDS
def test_no_dev_id_is_refused_and_no_such_irq_is_nothing(rig):
    virq = rig.irq.irq_reserve_ipi(None, "0-2")
    refused(errno.EINVAL, rig.irq.request_percpu_irq, virq, note, "note")
    refused(errno.EINVAL, rig.irq.request_percpu_irq, virq, COUNT, "native", None)
    refused(errno.EINVAL, rig.irq.request_percpu_irq, 99, COUNT, "none", rig.rows)
    refused(errno.EINVAL, rig.irq.request_percpu_nmi, virq, COUNT, "nmi", rig.rows)

    def nothing(virq):
        irq.enable_percpu_irq(virq)
        irq.disable_percpu_irq(virq)
        irq.free_percpu_irq(virq, 0)
        return irq.irq_percpu_is_enabled(virq)

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for other in (99, 0, 5000):
            assert rig.cluster.run(nothing, other, cpus=[1]) == [False]
            assert rig.irq.free_percpu_irq(other, 0) is None
            assert not rig.irq.irq_percpu_is_enabled(other, 0)


@KINDS
def test_irqs_are_found_by_their_hwirq(rig):
    virq = rig.irq.irq_reserve_ipi(None, "0-2")
    desc = rig.irq.irq_to_desc(virq)
    data = rig.irq.irq_get_irq_data(virq)
    assert irq.irqd_to_hwirq(data) == desc.hwirq == rig.irq.ipi_get_hwirq(virq, 0)
    for domain in (desc.domain, rig.irq.root):
        assert rig.irq.irq_find_mapping(domain, desc.hwirq) == virq
    if desc.mapping.shape == "block":
        hwirq = rig.irq.ipi_get_hwirq(virq, 2)
        assert rig.irq.irq_find_mapping(None, hwirq) == virq + 2
    assert rig.cluster.run(irq.irq_find_mapping, None, desc.hwirq, cpus=[1]) == [virq]
    rig.irq.irq_destroy_ipi(virq)
    assert rig.irq.irq_find_mapping(None, desc.hwirq) == 0
    assert rig.irq.irq_get_irq_data(virq) is None


@KINDS
def test_not_in_an_interrupt_handler_but_masks(rig):
    virq = rig.irq.irq_reserve_ipi(None, "0-2")

    def request(virq):
        irq.request_percpu_irq(virq, note, "", 0)

    def free(virq):
        irq.free_percpu_irq(virq)

    for call in (request, free):
        with pytest.raises(shmipi.RemoteCallError) as caught:
            rig.cluster.call(1, call, virq)
        assert isinstance(caught.value.__cause__, ClusterStateError)

    def enable(virq):
        irq.enable_percpu_irq(virq)

    rig.cluster.call(1, enable, virq)
    assert rig.irq.irq_percpu_is_enabled(virq, 1)


# ---- /proc/interrupts ----------------------------------------------------------------


def irq_rows(text):
    found = {}
    for line in text.splitlines()[1:]:
        label, _, rest = line.partition(":")
        if label.strip().isdigit():
            words = rest.split()
            found[int(label)] = [int(n) for n in words[:3]], " ".join(words[3:])
    return found


def test_requested_irqs_have_rows(rig):
    assert irq_rows(rig.cluster.interrupts()) == {}
    virq = rig.irq.irq_reserve_ipi(None, "0-2")
    other = rig.irq.irq_reserve_ipi(None, "1")
    rig.irq.request_percpu_irq(virq, COUNT, "counter", rig.rows)
    rig.rows[:] = 0
    rig.irq.enable_percpu_irq_mask(virq)
    for cpu in (0, 0, 2):
        before = rig.rows[cpu]
        rig.irq.ipi_send_single(virq, cpu)
        rig.wait(lambda cpu=cpu, n=before: rig.rows[cpu] == n + 1)
    rows = irq_rows(rig.cluster.interrupts())
    assert list(rows) == [virq]
    counts, text = rows[virq]
    assert counts == [2, 0, 1]
    assert text.startswith(rig.irq.domain().name)
    assert text.endswith(" counter")
    rig.irq.request_percpu_irq(other, note, "other", 0)
    assert irq_rows(rig.cluster.interrupts())[other][0] == [0, 0, 0]
    # From outside, by a reader that maps nothing, it is the same.
    from shmipi.machine.inspect import Inspector

    with Inspector(rig.cluster.name) as inspector:
        views = inspector.irqs()
    assert [(v.virq, v.counts.tolist()) for v in views] == [
        (virq, [2, 0, 1]),
        (other, [0, 0, 0]),
    ]
    rig.irq.disable_percpu_irq_mask(virq)
    rig.irq.free_percpu_irq(virq, rig.rows)
    rig.irq.irq_destroy_ipi(virq)
    again = rig.native("0-2")
    assert irq_rows(rig.cluster.interrupts())[again][0] == [0, 0, 0]


def test_a_native_handler_runs_in_the_middle_of_a_long_c_call(rig, stuck):
    """In the signal handler: the interpreter reaches no bytecode until that returns."""
    cluster, irq = rig.cluster, rig.irq
    taken = cluster.percpu("taken-in-c", "i8")
    seen = cluster.percpu("seen-in-python", "i8")
    native, python = (irq.irq_reserve_ipi(None, "0-1") for _ in range(2))
    irq.request_percpu_irq(native, smp.NativeHandler("count"), "native", taken)

    def note(virq, row):
        row[0] += 1

    irq.request_percpu_irq(python, note, "python", seen)
    irq.enable_percpu_irq_mask(native)
    irq.enable_percpu_irq_mask(python)
    free = stuck(cluster, 1)
    for count in (1, 2, 3):
        irq.ipi_send_single(native, 1)
        rig.wait(lambda n=count: taken[1] >= n)
    irq.ipi_send_single(python, 1)  # the last: it is in service until it has run
    time.sleep(0.002)
    assert seen[1] == 0  # it is still there, and Python waits
    free()
    rig.wait(lambda: seen[1])
    for virq, dev_id in ((native, taken), (python, seen)):
        irq.disable_percpu_irq_mask(virq)
        irq.free_percpu_irq(virq, dev_id)
        irq.irq_destroy_ipi(virq)
