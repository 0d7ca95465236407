"""What every interrupt controller has to do, whatever it is made of.

After the interrupt tests of kvm-unit-tests (x86/apic.c, x86/smptest.c, arm/gic.c) and
the kernel's xapic_ipi_test. Only what ``Chip`` has is used: a controller of one's own
can be put to the same tests by adding it to CONTROLLERS.
"""

import concurrent.futures
import contextlib
import errno
import os
import signal
import time

import pytest

import shmipi
from shmipi import CpuMask, NativeHandler, _core, irq, smp
from shmipi.irq.chips import CHIPS, Apic, Chip, Gicv3, Line, MipsGic, Row
from shmipi.users import scheduler, tick

NCPUS = 4
CONTROLLERS = list(CHIPS)
#: 100,000 over all controllers when there is time for it.
ROUNDS = 100_000 // len(CONTROLLERS) + 1 if os.environ.get("SHMIPI_STRESS") else 300
POLL, HALT = 0, 2  # enum shi_idle


@pytest.fixture(scope="module", params=CONTROLLERS)
def cluster(request):
    """A machine for each controller, one after the other."""
    with shmipi.Cluster(NCPUS, controller=request.param, idle="halt") as made:
        yield made


@pytest.fixture
def taken(cluster):
    """Array of (CPU, handler): what was taken."""
    array = cluster.percpu("taken", "i8", 4)
    array[:] = 0
    return array


@pytest.fixture
def counting(cluster, lines, taken):
    """A line for each CPU with a Python handler that counts in `taken`."""
    wanted = lines(cluster)

    def count(_):
        taken[smp.smp_processor_id(), 0] += 1

    wanted.here = wanted.request_all(count)
    return wanted


@pytest.fixture
def put(cluster, eventually):
    """`put(cpu, state)`: make it halted, polling or running."""
    polling = []
    with contextlib.ExitStack() as stack:

        def start(cpu, state):
            if state == "running":
                stack.enter_context(spinning(cluster, cpu))
            elif state == "polling":
                cluster._machine.set_idle(cpu, POLL)
                polling.append(cpu)
                cluster.call(cpu, int)
            eventually(lambda: cluster.cpus[cpu].state == state)

        yield start
    for cpu in polling:
        cluster._machine.set_idle(cpu, HALT)
        cluster.call(cpu, int)


def real_nmis(chip: Chip) -> bool:
    """Has it NMIs that nothing masks, or a line that stands in for them?"""
    return chip.describe(NCPUS)["nmi"] is None


def row_of(cluster, use):
    """What is counted in the row of a line of this use, by CPU."""
    [label] = {line.row for line in cluster.chip.lines(NCPUS) if line.use == use}
    return next(
        counts for name, _, counts in cluster._counters.interrupts() if name == label
    )


def printed(cluster):
    """The rows of interrupts(): label -> counts by CPU."""
    rows = [line.split() for line in cluster.interrupts().splitlines()[1:]]
    return {row[0].rstrip(":"): [int(n) for n in row[1 : NCPUS + 1]] for row in rows}


# ---- it boots ------------------------------------------------------------------------


def test_it_names_itself(cluster):
    name = cluster.controller
    assert name in CONTROLLERS
    assert f"controller={name}" in repr(cluster)
    assert (cluster.chip.name, type(cluster.chip)) == (name, CHIPS[name])
    assert cluster.chip.ncpus == NCPUS
    assert cluster.run(lambda: (irq.chip().name, irq.chip().cpu())) == [
        (name, cpu) for cpu in range(NCPUS)
    ]
    assert cluster.chip.description
    with pytest.raises(shmipi.ClusterStateError, match="the host is no CPU"):
        cluster.chip.cpu()
    with pytest.raises(shmipi.ClusterStateError, match="no machine's"):
        CHIPS[name]().raise_line(1, 1)
    with pytest.raises(KeyError, match=f"controller {name} has no line nix"):
        cluster.chip.line("nix")
    uses = {line.use for line in cluster.chip.lines(NCPUS)}
    assert uses >= {"call", "reschedule", "irq"}
    assert all(cluster.chip.in_service(cpu) == [] for cpu in range(NCPUS))


def test_unknown_controllers_are_refused():
    for wrong in ("nix", None, 5, [], int):
        with pytest.raises(shmipi.ControllerError, match="choose from 'apic'") as got:
            shmipi.Cluster(2, controller=wrong)
        assert (got.value.errno, got.value.domain) == (errno.EINVAL, str(wrong))
    for name, chip in CHIPS.items():
        most = chip.max_cpus
        with pytest.raises(shmipi.ControllerError, match=f"{most} CPUs") as got:
            chip().for_cpus(most + 1)
        error = got.value
        assert (error.errno, error.domain, error.cpu) == (errno.EINVAL, name, most)
    for chip, most in (
        (Apic(destination="flat"), 8),
        (Apic(mode="xapic"), 255),
        (Apic(mode="xapic", destination="cluster"), 60),
        (Gicv3(aff0=1), 256),
        (MipsGic(reserved_ipi_vectors=(0, 9)), 4),
    ):
        chip.for_cpus(most)
        with pytest.raises(shmipi.ControllerError, match=f"{most + 1}") as got:
            chip.for_cpus(most + 1)
        assert (got.value.errno, got.value.cpu) == (errno.EINVAL, most)


def test_a_chip_as_a_class(cluster):
    """With the type of a controller, in the host and on a CPU, or refused."""
    for kind in CHIPS.values():
        if kind is type(cluster.chip):
            assert cluster.chip.as_a(kind) is cluster.chip
            assert cluster.call(1, lambda kind=kind: irq.chip().as_a(kind).ncpus)
        elif not isinstance(cluster.chip, kind):
            with pytest.raises(shmipi.ControllerError, match=f"no {kind.__name__}$"):
                cluster.chip.as_a(kind)


def test_cpus_and_lines_of_a_chip(cluster):
    """Named as everywhere, and what does not exist is refused with an errno."""
    chip = cluster.chip
    for line in (-1, 256, 1 << 32, 10**30):
        for use in (chip.raise_line, chip.mask_line, chip.unmask_line, chip.clear_line):
            with pytest.raises(shmipi.IrqError, match=f"no (line|SGI) {line}") as got:
                use(line, 1)
            assert (got.value.errno, got.value.domain) == (errno.EINVAL, chip.name)
    assert chip.cpus("all") == chip.cpus("0-N") == CpuMask.full(NCPUS)
    assert chip.is_online(NCPUS - 1)
    assert not any(map(chip.is_online, (NCPUS, -1, 10**30)))
    with pytest.raises(shmipi.IrqError) as got:
        chip.send_nmi([0, NCPUS])
    error = got.value
    assert (error.errno, error.domain, error.cpu) == (errno.EINVAL, chip.name, NCPUS)


class Own(Chip):
    """The least that a controller can be."""

    name = "own"
    flow = "mailbox"
    rows = (Row("RES", "reschedule"), Row("CAL", "call"))
    made_of: tuple[tuple[int, str, str], ...] = ((0, "reschedule", "RES"),)
    calls = (1, "call", "CAL")

    def lines(self, ncpus):
        for number, use, row in (*self.made_of, self.calls):
            yield Line(number, f"line {number}", use, row)


@pytest.mark.parametrize("flow", ["vector", "mailbox", "mux", "sgi", "esb"])
def test_an_own_controller_over_each_flow(boot, flow, settle, eventually):
    class Mine(Own):
        name = f"mine-{flow}"

    Mine.flow = flow
    if flow == "vector":  # what it calls illegal is never taken
        Mine.made_of, Mine.calls = ((0x50, "reschedule", "RES"),), (0x60, "call", "CAL")
    cluster = boot(2, controller=Mine, idle="halt")
    assert cluster.controller == f"mine-{flow}"
    rows = cluster._counters.interrupts

    def taken():
        return sum(counts[1] for _, _, counts in rows())

    # Halted before each: else it would be elided.
    eventually(lambda: cluster.cpus[1].state == "halted")
    assert cluster.call(1, smp.smp_processor_id) == 1
    eventually(lambda: not cluster.chip.pending_lines(1))
    eventually(lambda: cluster.cpus[1].state == "halted")
    called = taken()
    assert called >= 1  # another where the caller rang again, as nothing came of it
    cluster.smp.smp_send_reschedule(1)
    settle(taken, called + 1)


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"name": None}, "has no name"),
        ({"name": "x" * 16}, "1 to 15 characters"),
        ({"flow": "nix"}, "no flow 'nix'; there are vector, mailbox"),
        ({"calls": (1, "nix", "CAL")}, "no use 'nix'"),
        ({"calls": (1, "count", "CAL")}, "no line of use call"),
        ({"calls": (0, "call", "CAL")}, "line 0 is there twice"),
        ({"calls": (256, "call", "CAL")}, "no line 256"),
        ({"calls": (1, "call", "NIX")}, "no row 'NIX'"),
        ({"calls": (16, "call", "CAL"), "flow": "sgi"}, "lines 0 to 15"),
        ({"calls": (28, "call", "CAL"), "flow": "esb"}, "lines 0 to 27"),
        ({"rows": (*Own.rows, Row("EIGHTLET", ""))}, "1 to 7"),
        ({"rows": (*Own.rows, Row("CAL", ""))}, "'CAL' is there twice"),
        ({"rows": (*Own.rows, Row("X", "", "nix"))}, "no counter 'nix'"),
        ({"rows": [Row(f"R{n}", "") for n in range(33)]}, "32 rows"),
        ({"banked": True}, "only flow sgi"),
        ({"per_cpu": True}, "no 2 lines of use call in a row"),
        ({"max_cpus": 1}, "can address 1 CPUs"),
    ],
)
def test_what_a_controller_cannot_be(wrong, says):
    made = type("Wrong", (Own,), wrong)
    with pytest.raises(ValueError, match=says):
        shmipi.Cluster(2, controller=made)


def test_smptest(cluster):
    """A call from every CPU to every CPU, itself as well, runs there."""
    ran = cluster.shared("ran", "i8", (NCPUS, NCPUS))
    ran[:] = -1

    def handler(sender):
        ran[sender, smp.smp_processor_id()] = smp.smp_processor_id()

    def task():
        me = smp.smp_processor_id()
        at_return = []
        for cpu in range(NCPUS):
            smp.smp_call_function_single(cpu, handler, me)
            at_return.append(int(ran[me, cpu]))
        return at_return

    for sender in range(NCPUS):
        assert cluster.run(task, cpus=[sender]) == [list(range(NCPUS))]
    assert ran.tolist() == [list(range(NCPUS))] * NCPUS
    ran[:] = -1
    cluster.smp.on_each_cpu(handler, 0)
    assert ran[0].tolist() == list(range(NCPUS))


# ---- exactly once, and nowhere else --------------------------------------------------


def test_self_ipi(cluster, counting, taken, settle):
    here = counting.here

    def task():
        me = smp.smp_processor_id()
        before = taken[me, 0]
        irq.chip().raise_line(here[me], me)
        return int(taken[me, 0] - before)  # taken before the next bytecode

    for turn in range(1, 3):
        for cpu in range(NCPUS):
            assert cluster.run(task, cpus=[cpu]) == [1]
        settle(lambda turn=turn: taken[:, 0], [turn] * NCPUS)


def test_to_each_other_cpu(cluster, counting, taken, settle, acked):
    """Proves row 89."""
    here = counting.here
    for sender in range(NCPUS):
        taken[:] = 0

        def task():
            me = smp.smp_processor_id()
            for cpu in range(NCPUS):
                if cpu != me:
                    irq.chip().raise_line(here[cpu], cpu)

        cluster.run(task, cpus=[sender])
        wanted = {cpu: 1 for cpu in range(NCPUS) if cpu != sender}
        settle(lambda wanted=wanted: taken[:, 0].sum(), len(wanted))
        assert not acked(wanted, taken[:, 0])


def test_broadcast(cluster, counting, taken, settle):
    """To all CPUs, the sender as well; from the host, from CPUs."""
    here = counting.here

    def broadcast(chip):
        if chip.flow == "shared":  # an interrupt is one CPU's there
            for cpu in range(NCPUS):
                chip.raise_line(here[cpu], cpu)
        else:
            chip.raise_line(here[0], range(NCPUS))

    broadcast(cluster.chip)
    settle(lambda: taken[:, 0], [1] * NCPUS)
    for sender, turn in enumerate((2, 3)):
        cluster.run(lambda: broadcast(irq.chip()), cpus=[sender])
        settle(lambda turn=turn: taken[:, 0], [turn] * NCPUS)


def test_targets_that_do_not_exist_are_ignored(cluster, counting, taken, settle):
    line = counting.here[1]
    cluster.chip.raise_line(line, [1, NCPUS, 4095])
    settle(lambda: taken[:, 0], [0, 1, 0, 0])
    cluster.chip.raise_line(line, [NCPUS])
    cluster.chip.raise_line(line, [])
    settle(lambda: taken[:, 0], [0, 1, 0, 0])


@pytest.mark.parametrize("fault", ["none", "missing", "extra", "unexpected"])
def test_the_checker_tells_faults_apart(cluster, counting, taken, settle, acked, fault):
    """What the tests above rely on, of machines where one thing is wrong.

    Proves row 89.
    """
    here, chip = counting.here, cluster.chip
    counts = [0, 1, 1, 0]
    found = {}
    if fault == "missing":
        chip.mask_line(here[1], 1)
        counts[1], found = 0, {"missing": {1: 1}}
    for cpu in (1, 2):
        chip.raise_line(here[cpu], cpu)
    settle(lambda: taken[:, 0], counts)
    if fault in ("extra", "unexpected"):
        cpu = 2 if fault == "extra" else 3
        chip.raise_line(here[cpu], cpu)
        counts[cpu] += 1
        found = {fault: {cpu: 1}}
    settle(lambda: taken[:, 0], counts)
    verdict = acked({1: 1, 2: 1}, taken[:, 0])
    assert {name: cpus for name, cpus in vars(verdict).items() if cpus} == found
    if fault == "missing":
        chip.unmask_line(here[1], 1)
        settle(lambda: taken[1, 0], 1)


# ---- masks ---------------------------------------------------------------------------


@pytest.mark.parametrize("state", ["halted", "polling", "running"])
def test_a_masked_line_fires_once_on_unmask(
    cluster, counting, taken, settle, put, state
):
    line = counting.here[2]
    put(2, state)
    cluster.chip.mask_line(line, 2)
    for _ in range(5):
        cluster.chip.raise_line(line, 2)
    # Others come through meanwhile.
    assert cluster.call(2, abs, -2) == 2
    settle(lambda: taken[:, 0], [0] * NCPUS)
    cluster.chip.unmask_line(line, 2)
    settle(lambda: taken[:, 0], [0, 0, 1, 0])
    cluster.chip.mask_line(line, 2)
    cluster.chip.unmask_line(line, 2)
    settle(lambda: taken[:, 0], [0, 0, 1, 0])


def test_no_line_is_lost_that_comes_as_it_is_unmasked(cluster, lines):
    """A sender looks at the mask after its store, who unmasks at the line after his."""
    rounds = 150
    n = cluster.shared("unmasked", "i8", 2)
    n[:] = 0
    line = lines(cluster).request_all(smp.NativeHandler("count"), n)[1]

    def until(index, turn):
        end = time.monotonic() + 5
        while n[index] < turn:
            if time.monotonic() > end:
                raise TimeoutError(f"round {turn}: {n.tolist()}")

    def task():
        chip, sends = irq.chip(), smp.smp_processor_id() == 0
        for turn in range(1, rounds + 1):
            if sends:
                until(1, turn)
                for _ in range(turn % 20):
                    pass
                chip.raise_line(line, 1)
            else:
                chip.mask_line(line, 1)
                n[1] = turn
                for _ in range(turn % 70):
                    pass
                chip.unmask_line(line, 1)
            until(0, turn)  # nobody looks again: who was last has to ring
        return int(n[0])

    assert cluster.run(task, cpus=[0, 2]) == [rounds, rounds]


def test_a_cpu_unmasks_its_own_line(cluster, counting, taken):
    line = counting.here[3]

    def task():
        chip, me = irq.chip(), smp.smp_processor_id()
        chip.mask_line(line, me)
        for _ in range(3):
            chip.raise_line(line, me)
        before = int(taken[me, 0])
        chip.unmask_line(line, me)
        return before, int(taken[me, 0])

    assert cluster.run(task, cpus=[3]) == [(0, 1)]


def test_interrupts_off_hold_a_line_and_on_lets_it_in_once(
    cluster, counting, taken, held
):
    line = counting.here[1]
    task = held(cluster, 1, lambda: None, lambda: int(taken[1, 0]))
    cluster.chip.raise_line(line, 1)
    cluster.call(0, lambda: irq.chip().raise_line(line, 1))
    # Once: GICv2 takes the host's for CPU 0's own. A XIVE source remembers in Q that it
    # was triggered again.
    times = 2 if cluster.chip.flow == "esb" else 1
    assert task.release() == (0, times)
    assert taken[:, 0].tolist() == [0, times, 0, 0]


# ---- what the kernel sends -----------------------------------------------------------


@pytest.mark.parametrize("state", ["halted", "running"])
def test_reschedule_is_counted_in_its_row(cluster, settle, put, state, eventually):
    put(1, state)
    before = row_of(cluster, "reschedule")
    for sent in range(1, 6):
        eventually(lambda: cluster.cpus[1].state == state)
        cluster.smp.smp_send_reschedule(1)
        eventually(
            lambda sent=sent: row_of(cluster, "reschedule")[1] - before[1] == sent
        )
    settle(lambda: row_of(cluster, "reschedule") - before, [0, 5, 0, 0])


def test_rows_add_up_to_what_was_sent(cluster, eventually):
    """Each call is in one row: an interrupt taken, elided, or behind another."""
    calls = 60

    def send():
        longest = 0.0
        for _ in range(calls):
            begun = time.monotonic()
            smp.smp_call_function_single(1, smp.NativeHandler("noop"))
            longest = max(longest, time.monotonic() - begun)
        return longest

    def send_many():
        # Several targets are each sent the interrupt, also one that polls: there it
        # could be one with that of the call before, if the queue is emptied first.
        machine, longest = _core.current_machine(), 0.0
        for _ in range(calls):
            while any(machine.slot(cpu).state != _core.HALTED for cpu in (1, 2)):
                time.sleep(0)
            smp.preempt_disable()
            begun = time.monotonic()
            smp.smp_call_function_many([1, 2], smp.NativeHandler("noop"))
            longest = max(longest, time.monotonic() - begun)
            smp.preempt_enable()
        return longest

    use = {line.use for line in cluster.chip.lines(NCPUS)}
    single = "call_single" if "call_single" in use else "call"
    for func, kind, to in ((send, single, [1]), (send_many, "call", [1, 2])):
        end, longest = time.monotonic() + 30, 1.0
        # Once more where one had no core: after 10 ms who waits interrupts it again.
        while longest > 0.008 and time.monotonic() < end:
            eventually(lambda: not any(map(cluster.chip.pending_lines, range(NCPUS))))
            eventually(lambda: all(cpu.state == "halted" for cpu in cluster.cpus))
            rows, words = row_of(cluster, kind), printed(cluster)
            [longest] = cluster.run(func, cpus=[0])
            eventually(lambda: all(cpu.state == "halted" for cpu in cluster.cpus))
        now = printed(cluster)
        got = [int(n) for n in row_of(cluster, kind) - rows]
        sent_otherwise = sum(
            now[label][0] - words[label][0] for label in ("ELI", "COA")
        )
        # CPU 0 takes the interrupt that its task came with.
        assert [cpu for cpu in range(1, NCPUS) if got[cpu]] == to
        assert sum(got[1:]) + sent_otherwise == calls * len(to)
        # And they are printed so.
        labels = {line.row for line in cluster.chip.lines(NCPUS) if line.use == kind}
        assert all(
            now[label][cpu] - words[label][cpu] == got[cpu]
            for label in labels
            for cpu in range(NCPUS)
        )


def test_elided_calls_are_in_a_row_of_their_own(cluster, put, eventually):
    put(1, "polling")
    cluster.call(1, int)  # the nudge that had it poll has been taken
    calls = 50

    def send():
        longest = 0.0
        for _ in range(calls):
            begun = time.monotonic()
            smp.smp_call_function_single(1, smp.NativeHandler("noop"))
            longest = max(longest, time.monotonic() - begun)
        return longest

    end, longest = time.monotonic() + 30, 1.0
    # Once more where CPU 1 had no core: after 10 ms who waits interrupts it.
    while longest > 0.008 and time.monotonic() < end:
        eventually(lambda: not cluster.chip.pending_lines(1))
        eventually(lambda: cluster.cpus[1].state == "polling")
        rows, writes = printed(cluster), cluster.counters()["chip_writes"][0]
        [longest] = cluster.run(send, cpus=[0])
        now = printed(cluster)
    assert now["ELI"][0] - rows["ELI"][0] == calls
    assert cluster.counters()["chip_writes"][0] == writes
    own = [label for label, _, _ in cluster._counters.interrupts()]
    assert own
    assert all(now[label][1] == rows[label][1] for label in own)


# ---- handlers ------------------------------------------------------------------------


@pytest.mark.parametrize("state", ["halted", "polling", "running"])
def test_handlers(cluster, lines, settle, put, state):
    """Python's and native ones, ended after each: they come again."""
    python = cluster.percpu("python", "i8")
    native = cluster.shared("native", "i8", 1)
    python[:], native[:] = 0, 0

    def handler(_):
        # No assert where a CPU runs it: pytest's need all of pytest there.
        python[smp.smp_processor_id()] += smp.in_hardirq() and smp.irqs_disabled()

    wanted = lines(cluster)
    by_python = wanted.request_all(handler, which=0)[2]
    by_native = wanted.request_all(smp.NativeHandler("count"), native, which=1)[2]
    before = cluster.counters()
    put(2, state)
    for turn in range(1, 11):
        cluster.chip.raise_line(by_python, 2)
        cluster.chip.raise_line(by_native, 2)
        end = time.monotonic() + 5
        while (native[0], python[2]) != (turn, turn) and time.monotonic() < end:
            pass
    settle(lambda: [*python, *native], [0, 0, 10, 0, 10])
    # A native one is counted when it has returned.
    settle(
        lambda: cluster.counters()["irq_handled"] - before["irq_handled"], [0, 0, 20, 0]
    )
    now = cluster.counters()
    assert (now["irq_other"] - before["irq_other"]).sum() == 0
    settle(lambda: cluster.chip.in_service(2), [])


def test_two_lines_at_once_are_both_taken(cluster, lines, taken, held):
    wanted = lines(cluster)

    def first(_):
        taken[smp.smp_processor_id(), 0] += 1

    def second(_):
        taken[smp.smp_processor_id(), 1] += 1

    here = [wanted.request_all(h, which=n)[1] for n, h in enumerate((first, second))]
    task = held(cluster, 1, lambda: None, lambda: taken[1, :2].tolist())
    for line in here:
        cluster.chip.raise_line(line, 1)
    assert task.release() == ([0, 0], [1, 1])


def test_a_handlers_exception_ends_the_line_all_the_same(cluster, lines, settle, taken):
    # What it prints is its CPU's: the hook there keeps quiet.
    def quiet():
        import sys

        sys.unraisablehook = lambda what: None

    def loud():
        import sys

        sys.unraisablehook = sys.__unraisablehook__

    def boom(_):
        taken[smp.smp_processor_id(), 0] += 1
        raise ValueError("boom")

    line = lines(cluster).request_all(boom)[1]
    cluster.call(1, quiet)
    before = cluster.counters()["unraisable"][1]
    for turn in range(1, 4):
        cluster.chip.raise_line(line, 1)
        settle(lambda turn=turn: taken[1, 0], turn)
    settle(lambda: cluster.counters()["unraisable"][1], before + 3)
    cluster.call(1, loud)


def test_a_line_that_nobody_handles_is_reported(cluster, lines, settle):
    """Proves row 40."""
    wanted = lines(cluster)
    line = wanted.of_cpu()[1]
    before = cluster.counters()
    bad = printed(cluster)["BAD"][1]
    cluster.chip.unmask_line(line, 1)
    cluster.chip.raise_line(line, 1)
    settle(lambda: cluster.counters()["irq_other"] - before["irq_other"], [0, 1, 0, 0])
    assert cluster.counters()["irq_handled"][1] == before["irq_handled"][1]
    assert printed(cluster)["BAD"][1] == bad + 1
    cluster.chip.mask_line(line, 1)


# ---- NMIs ----------------------------------------------------------------------------


@pytest.fixture
def on_nmi(cluster):
    """`on_nmi(handler, info)`: until the test ends."""
    yield lambda handler, info=None: cluster.smp.register_nmi_handler(
        smp.NMI_LOCAL, handler, 0, "test", info
    )
    cluster.smp.unregister_nmi_handler(smp.NMI_LOCAL, "test")


def test_ten_nmis_inside_the_handler_are_one_more(cluster, on_nmi, taken, settle):
    """pending nmi: one is in service, one more stays pending."""

    def handler(type, regs):
        me = smp.smp_processor_id()
        taken[me, 0] += 1
        if taken[me, 0] == 1:
            for _ in range(10):
                irq.chip().send_nmi(me)
            taken[me, 1] = taken[me, 0]  # none of them interrupted this one

    on_nmi(handler)
    for turn in (1, 2):
        taken[:] = 0
        cluster.chip.send_nmi(turn)
        settle(lambda turn=turn: taken[turn, :2], [2, 1])


def test_nmis_of_two_senders_are_two(cluster, on_nmi, settle, held):
    """multiple nmi: both pending at once, and both received; a line is one."""
    n = cluster.shared("nmis", "i8", 4)
    n[:] = 0
    rounds = 100
    on_nmi(smp.NativeHandler("count"), n)

    def send(which):
        for turn in range(rounds):
            n[1 + which] = turn + 1
            while n[2 - which] < turn + 1:
                pass
            irq.chip().send_nmi(3)
            end = time.monotonic() + 5
            while n[0] < 2 * (turn + 1):
                if time.monotonic() > end:
                    raise TimeoutError(f"round {turn}: {n[0]} NMIs")
            while irq.chip().read("nmi", 3):  # over, too: one in service leaves one
                if time.monotonic() > end:
                    raise TimeoutError(f"round {turn}: it is not over")

    def both():
        me = smp.smp_processor_id()
        if me < 2:
            send(me)

    if real_nmis(cluster.chip):
        cluster.run(both, cpus=[0, 1])
        settle(lambda: n[0], 2 * rounds)
        assert cluster.chip.read("nmi", 3) == 0
        return

    # The maskable stand-in: as many as the line can be pending.
    task = held(cluster, 3, lambda: None, lambda: int(n[0]))
    for cpu in (0, 1):
        cluster.call(cpu, lambda: irq.chip().send_nmi(3))
    assert task.release() == (0, 2 if cluster.chip.banked else 1)


def test_nmi_ipis_are_sent_from_handlers(cluster, settle):
    """In an IPI's and in an NMI's, with interrupts off in both."""
    n = cluster.shared("nmi_ipis", "i8", 4)
    n[:] = 0

    def send(regs=None):
        n = shmipi.shared("nmi_ipis")
        assert smp.irqs_disabled()
        count = smp.NativeHandler("count")
        n[0] += smp.smp_send_nmi_ipi(2, count, 10_000_000, n[1:2])
        n[0] += smp.smp_send_safe_nmi_ipi(3, lambda regs: None, 10_000_000)

    cluster.call(1, send)
    settle(lambda: n[:2], [2, 1])
    assert cluster.smp.smp_send_nmi_ipi(1, send, 10_000_000) == 1
    settle(lambda: n[:2], [4, 2])


@pytest.mark.parametrize("handler", ["native", "python"])
def test_interrupts_off_hold_up_no_real_nmi(cluster, on_nmi, held, settle, handler):
    n = cluster.shared("masked_nmi", "i8", 1)
    n[:] = 0

    def count(type, regs):
        n[0] += smp.in_nmi()

    on_nmi(smp.NativeHandler("count") if handler == "native" else count, n)
    task = held(cluster, 2, lambda: None, lambda: int(n[0]))
    cluster.chip.send_nmi(2)
    during = int(real_nmis(cluster.chip))
    settle(lambda: n[0], during)
    assert task.release() == (during, 1)


# ---- the halted target ---------------------------------------------------------------


def test_it_wakes_counts_and_goes_back_to_sleep(cluster, lines, eventually):
    """xapic_ipi_test: received, woke and halted all advance, every time.

    Proves row 89.
    """
    n = cluster.shared("rounds", "i8", 1)
    n[:] = 0
    line = lines(cluster).request_all(smp.NativeHandler("count"), n)[1]
    names = ("irq_handled", "doorbells_received", "halts")

    def counts():
        now = cluster.counters()
        return [int(now[name][1]) for name in names]

    eventually(lambda: cluster.cpus[1].state == "halted")
    machine = cluster._machine
    before = counts()
    for turn in range(1, ROUNDS + 1):
        machine.irq_raise(line, [1], 1)
        end = time.monotonic() + 5
        wanted = [was + turn for was in before]
        while (now := counts()) != wanted or machine.slot(1).state != 3:
            assert time.monotonic() < end, f"round {turn}: {names} {now}, not {wanted}"
    assert n[0] == ROUNDS


# ---- CPUs that go and come back ------------------------------------------------------


def test_a_line_to_an_offline_cpu_is_lost(cluster, counting, taken, settle):
    line = counting.here[2]
    cluster.offline(2, timeout=10)
    for _ in range(3):
        cluster.chip.raise_line(line, 2)
    cluster.online(2, timeout=10)
    settle(lambda: taken[:, 0], [0] * NCPUS)
    assert cluster.chip.pending_lines(2) == []
    # The mask is what it was, and so is everything else.
    cluster.chip.raise_line(line, 2)
    settle(lambda: taken[:, 0], [0, 0, 1, 0])
    assert cluster.call(2, abs, -1) == 1


@pytest.mark.parametrize("controller", CONTROLLERS)
def test_a_sender_that_dies_before_it_rings(boot, lines, settle, controller):
    """The line is there already: somebody rings for it, and it is taken, once."""
    cluster = boot(3, controller=controller, idle="halt", steps=True)
    n = cluster.shared("orphans", "i8", 1)
    line = lines(cluster).request_all(smp.NativeHandler("count"), n)[1]
    sent = 0

    def run_into(who, step, send):
        cluster._machine.arm_step(who, step, _core.STEP_KILL)
        future = cluster.submit(0, send)
        settle(lambda: cluster.cpus[who].state, "dead")
        return future

    def send_line():
        irq.chip().raise_line(line, 1)

    for state in ("halted", "running"):
        with contextlib.ExitStack() as stack:
            if state == "running":
                stack.enter_context(spinning(cluster, 1))
            settle(lambda: cluster.cpus[1].state, state)
            for step in ("raise", "ring", "rung"):
                settle(lambda: cluster.cpus[1].state, state)  # else nobody rings it
                future = run_into(0, step, send_line)
                with pytest.raises(shmipi.CpuDiedError):
                    future.result(5)
                sent += 1
                settle(lambda: n[0], sent)
                cluster.online(0, timeout=10)
            nmis = cluster.counters()["nmi"][1]
            step = "nmi" if real_nmis(cluster.chip) else "raise"
            with pytest.raises(shmipi.CpuDiedError):
                run_into(0, step, lambda: irq.chip().send_nmi(1)).result(5)
            settle(lambda: cluster.counters()["nmi"][1], nmis + 1)
            cluster.online(0, timeout=10)
    # The target, with the line in its hand.
    run_into(1, "line", send_line).result(5)
    cluster.online(1, timeout=10)
    settle(lambda: n[0], sent)
    assert (cluster.chip.pending_lines(1), cluster.chip.in_service(1)) == ([], [])
    cluster.chip.raise_line(line, 1)
    settle(lambda: n[0], sent + 1)


@contextlib.contextmanager
def spinning(cluster, cpu):
    """A task that keeps a CPU running."""
    flag = cluster.shared("spinning", "i8", 1)
    flag[0] = 0

    def spin():
        end = time.monotonic() + 20
        while not flag[0] and time.monotonic() < end:
            pass

    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        done = pool.submit(cluster.run, spin, cpus=[cpu])
        try:
            yield
        finally:
            flag[0] = 1
        done.result(10)


@pytest.mark.parametrize("controller", CONTROLLERS)
def test_a_killed_cpu_comes_back_clean(
    boot, lines, settle, eventually, held, controller
):
    """Whatever was pending, masked or in service there is not any more."""
    cluster = boot(2, controller=controller, idle="halt")
    wanted, chip = lines(cluster), cluster.chip
    taken = cluster.shared("taken", "i8", 2)
    busy = cluster.shared("busy", "i8", 1)

    def handler(_):
        taken[0] += 1
        while busy[0]:
            pass

    line = wanted.request_all(handler)[1]
    other = wanted.request_all(smp.NativeHandler("count"), taken[1:], which=1)[1]

    def die(*, while_masked=False):
        pid = cluster.cpus[1].pid
        os.kill(pid, signal.SIGKILL)
        eventually(lambda: cluster.cpus[1].state == "dead")
        busy[0] = 0
        cluster.online(1, timeout=10)
        assert cluster.cpus[1].pid != pid
        if while_masked:
            chip.unmask_line(line, 1)
        settle(lambda: taken, before)
        assert (chip.pending_lines(1), chip.in_service(1)) == ([], [])
        for each in (line, other):  # and it takes what comes now
            chip.raise_line(each, 1)
        settle(lambda: taken, [before[0] + 1, before[1] + 1])
        assert cluster.call(1, abs, -1, timeout=5) == 1

    # In a handler, with its own line and another one behind it.
    busy[0] = 1
    chip.raise_line(line, 1)
    eventually(lambda: taken[0])
    chip.raise_line(line, 1)
    chip.raise_line(other, 1)
    before = taken.tolist()
    die()
    # With interrupts off; one line masked as well.
    task = held(cluster, 1, lambda: None, lambda: None)
    chip.mask_line(line, 1)
    for each in (line, other):
        chip.raise_line(each, 1)
    before = taken.tolist()
    die(while_masked=True)
    with pytest.raises(shmipi.CpuDiedError):
        task.release()


def _all_kinds():
    """Task of CPU 0: interrupt the others, in each way that there is."""
    noop = NativeHandler("noop")
    works = [smp.irq_work(noop) for _ in range(NCPUS)]
    for cpu in (1, 2, 3):
        smp.smp_send_reschedule(cpu)
        smp.smp_call_function_single(cpu, noop, None, wait=True)
        assert smp.irq_work_queue_on(works[cpu], cpu)
        smp.stop_one_cpu(cpu, _nothing)
    smp.smp_call_function(noop, None, wait=True)
    assert smp.irq_work_queue(works[0])
    for work in works:
        smp.irq_work_sync(work)
    scheduler.spawn(_nothing, None, cpus=1).result(20)
    tick.hrtimer_start(tick.hrtimer("causes"), 1_000_000, cpu=2)


def _nothing(_):
    return None


def test_interrupts_by_cause_add_up_to_the_counters(cluster, counting, eventually):
    """Of all tests before this, too: each has its cause, whatever its line."""
    machine, timers = cluster._machine, cluster.users.tick
    timer = timers.hrtimer("causes", NativeHandler("noop"))

    def causes():
        found = [machine.interrupt_causes(cpu) for cpu in range(NCPUS)]
        rest = [before - sum(known) for before, known, _ in found]
        return rest, [dict(zip(_core.CAUSES, one[1], strict=True)) for one in found]

    rest, before = causes()  # a test that killed a CPU may have left some
    assert max(rest) <= 8
    cluster.run(_all_kinds, cpus=[0])
    for cpu, line in enumerate(counting.here):
        cluster.chip.raise_line(line, cpu)
    eventually(lambda: timer.fired == 1)
    eventually(lambda: all("irq" in kinds for kinds in grown(causes()[1], before)))
    eventually(lambda: causes()[0] == rest)
    kinds = grown(causes()[1], before)
    assert kinds[2] >= {"reschedule", "timer"}
    assert "irq_work" in set().union(*kinds)


def grown(now, before):
    """Causes of each CPU that are more than they were."""
    return [
        {cause for cause in one if one[cause] > was[cause]}
        for one, was in zip(now, before, strict=True)
    ]
