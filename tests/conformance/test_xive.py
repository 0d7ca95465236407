"""powerpc's XIVE: sources and ESBs, the event queue, muxed messages, doorbells."""

import contextlib
import os
import pickle
import signal
import threading
import time

import numpy as np
import psutil
import pytest

import shmipi
from shmipi import (
    ClusterStateError,
    CpuOfflineError,
    IrqError,
    RemoteCallError,
    _core,
    smp,
)
from shmipi.irq.chips import CHIPS, Xive
from shmipi.irq.chips.powerpc_smp import (
    IRQ_HANDLED,
    NMI_IPI_ALL_OTHERS,
    PACA_IRQ_DBELL,
    PACA_IRQ_EE,
    PACA_IRQ_HARD_DIS,
    PPC_MSG_CALL_FUNCTION,
    PPC_MSG_NMI_IPI,
    PPC_MSG_RESCHEDULE,
    PPC_MSG_RM_HOST_ACTION,
    PPC_MSG_TICK_BROADCAST,
)
from shmipi.irq.chips.xive import (
    DOORBELL_LINE,
    IPI_LINE,
    XIVE_ESB_GET,
    XIVE_ESB_LOAD_EOI,
    XIVE_ESB_SET_PQ_00,
    XIVE_ESB_SET_PQ_01,
    XIVE_ESB_SET_PQ_10,
    XIVE_ESB_SET_PQ_11,
    XIVE_ESB_STORE_EOI,
    EsbState,
)

MESSAGES = {
    PPC_MSG_CALL_FUNCTION: "CAL",
    PPC_MSG_RESCHEDULE: "RES",
    PPC_MSG_TICK_BROADCAST: "TBI",
    PPC_MSG_NMI_IPI: "NIP",
    PPC_MSG_RM_HOST_ACTION: "RMH",
}
LINE, LINE2 = 8, 27  # the first and the last that IPI domains may have
VIRQ, VIRQ2 = 900, 901
RESET, OFF, PENDING, QUEUED = EsbState
XIVE_ESB_LD_ST_MO = 0x40


# ---- tools ---------------------------------------------------------------------------


class Rig:
    """A cluster of two cores of two threads, seen from the host."""

    def __init__(self, cluster):
        self.cluster = cluster
        self.chip = cluster.chip
        self.machine = cluster._machine
        self.flag = cluster.shared("flag", "i8", 2)
        self.handlers = []

    def rows(self, cpu):
        """What /proc/interrupts has for a CPU, by label."""
        lines = self.cluster.interrupts().splitlines()[1:]
        return {
            label.strip(): int(counts.split()[cpu])
            for label, _, counts in (line.partition(":") for line in lines)
        }

    def settle(self):
        """Return when every CPU has taken what it can, and is back at what it did."""
        try:
            self.wait(lambda: all(map(self.is_quiet, range(self.chip.ncpus))))
        except AssertionError as error:
            raise AssertionError([*map(self.describe, range(4))]) from error

    def describe(self, cpu):
        """Its word and its registers: one that is halted and rung has lost nothing."""
        names = ("irr", "isr", "iar", "enable", "eq_at", "eq_put", "threshold")
        registers = {name: hex(self.chip.read(name, cpu)) for name in names}
        return cpu, hex(self.machine.slot(cpu).word), registers, self.rows(cpu)

    def is_quiet(self, cpu):
        quiet = not self.chip.interrupt_asserted(cpu) and not self.chip.in_service(cpu)
        # A CPU in an interrupt is polling; so nothing comes between these two looks.
        state = self.cluster.cpus[cpu].state
        return quiet and state in ("halted", "running", "offline")

    @staticmethod
    def wait(condition, seconds=5.0):
        end = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < end, "it did not happen"
            time.sleep(0.0005)

    def source(self, cpu, line=IPI_LINE):
        return self.chip.irq_data(line, cpu)

    def state(self, cpu, line=IPI_LINE):
        return self.source(cpu, line).esb_state

    @contextlib.contextmanager
    def handler(self, line, virq, handler, info=None):
        """Give `line` a handler, and unmask it everywhere."""
        self.handlers.append(handler)
        with self.machine.irq_lock():
            self.machine.irq_request(virq, handler, info)
        self.machine.pic_write(0, "line_virq", line, virq)
        for cpu in range(self.chip.ncpus):
            self.chip.unmask_line(line, cpu)
        try:
            yield
        finally:
            for cpu in range(self.chip.ncpus):
                self.chip.mask_line(line, cpu)
            self.machine.pic_write(0, "line_virq", line, 0)
            self.machine.irq_free(virq)

    def counted(self, line=LINE, virq=VIRQ):
        """`line` with a native handler that counts; the array that it counts in."""
        stack = contextlib.ExitStack()
        n = self.cluster.shared(f"n{line}", "u8", 1)
        n[0] = 0
        stack.enter_context(self.handler(line, virq, smp.NativeHandler("count"), n))
        return stack, n

    def start(self, background, func, cpu=1):
        """Run `func` as a task; it says with flag[0] = 1 how far it is."""
        self.flag[:] = 0
        thread = background(lambda: self.cluster.run(func, cpus=[cpu])[0])
        self.wait(lambda: self.flag[0] == 1 or not thread.is_alive())
        return thread

    def run(self, background, func, cpu=1):
        """Run `func` as a task; its result, and the rows of its CPU when it began."""

        def task():
            flag = shmipi.shared("flag")
            flag[0] = 1
            while not flag[1]:
                pass
            return func()

        thread = self.start(background, task, cpu)
        self.settle()
        before = self.rows(cpu)
        self.flag[1] = 1
        result = thread.end()
        self.settle()
        return result, before

    def events(self, since=0):
        """Tracepoints since then: (slot, name, cpu, arg)."""
        return [
            (e["slot"], _core.TRACE_EVENTS[e["event"]], e["cpu"], int(e["arg"]))
            for e in self.cluster.trace_events()
            if e["stamp"] > since
        ]


def hold():
    """A task with interrupts off until flag[1]; turned on, it stays for a moment."""
    flag = shmipi.shared("flag")
    smp.local_irq_disable()
    flag[0] = 1
    end = time.monotonic() + 10
    while not flag[1] and time.monotonic() < end:
        pass
    smp.local_irq_enable()


def spin():
    """A task with interrupts on until flag[1]."""
    flag = shmipi.shared("flag")
    flag[0] = 1
    end = time.monotonic() + 10
    while not flag[1] and time.monotonic() < end:
        pass


@pytest.fixture(scope="module")
def machine():
    """Two cores of two threads, that halt, traced."""
    controller = Xive(threads_per_core=2)
    with shmipi.Cluster(4, controller=controller, idle="halt", trace=True) as cluster:
        yield Rig(cluster)


@pytest.fixture
def rig(machine):
    """The machine, left as it was found: nothing pending, all sources RESET."""
    machine.settle()  # just booted, it may not sleep yet
    yield machine
    machine.flag[1] = 1
    machine.settle()
    for cpu in range(4):
        assert machine.state(cpu) is RESET
        assert machine.chip.xive_cpu(cpu).cppr == 0xFF
        assert machine.chip.pending_lines(cpu) == []
        assert machine.chip.in_service(cpu) == []


# ---- messages ------------------------------------------------------------------------


@pytest.mark.parametrize("msg", MESSAGES, ids=MESSAGES.values())
@pytest.mark.parametrize("cpu", [0, 3])
def test_each_message_arrives_once_and_is_counted(rig, cpu, msg):
    """Proves row 36."""
    before = rig.rows(cpu)
    rig.chip.do_message_pass(cpu, msg)
    rig.wait(lambda: rig.rows(cpu) != before and rig.state(cpu) is RESET)
    rig.settle()
    changed = {k: n - before[k] for k, n in rig.rows(cpu).items() if n != before[k]}
    changed.pop("WAK")
    expected = {"IPI": 1, MESSAGES[msg]: 1}
    if msg == PPC_MSG_NMI_IPI:
        expected["NMI"] = 1  # the NMI's handler, reached by a line that can be masked
    assert changed == expected


def test_a_message_without_an_ipi_is_found_by_the_next_demux(rig):
    """Proves row 36."""
    before = rig.rows(2)
    rig.chip.smp_muxed_ipi_set_message(2, PPC_MSG_RM_HOST_ACTION)
    assert rig.chip.xive_cpu(2).messages == [PPC_MSG_RM_HOST_ACTION]
    assert rig.chip.pending_lines(2) == [PPC_MSG_RM_HOST_ACTION]
    assert rig.rows(2)["RMH"] == before["RMH"]
    rig.chip.do_message_pass(2, PPC_MSG_TICK_BROADCAST)
    rig.wait(lambda: rig.rows(2)["TBI"] == before["TBI"] + 1)
    rig.settle()
    after = rig.rows(2)
    assert after["RMH"] == before["RMH"] + 1
    assert after["IPI"] == before["IPI"] + 1


@pytest.mark.parametrize("name", ["smp_ipi_demux", "xive_muxed_ipi_action"])
def test_demux_by_hand(rig, background, name):
    """It takes what is stored, with no IPI, and leaves the rest to interrupts."""

    def task():
        chip = shmipi.irq.chip()
        smp.local_irq_disable()
        for msg in (PPC_MSG_RESCHEDULE, PPC_MSG_TICK_BROADCAST):
            chip.smp_muxed_ipi_set_message(1, msg)
        chip.xive_cause_ipi(1)
        handled = getattr(chip, name)()
        there = chip.xive_cpu(1).messages, chip.xive_cpu(1).ipi_data.esb_state.name
        smp.local_irq_enable()
        return handled, there, chip.xive_cpu(1).ipi_data.esb_state.name

    (handled, there, then), before = rig.run(background, task)
    assert handled == IRQ_HANDLED
    assert there == ([], "PENDING")  # the IPI itself is still to be taken
    assert then == "RESET"
    after = rig.rows(1)
    assert [after[k] - before[k] for k in ("RES", "TBI", "IPI")] == [1, 1, 1]


def test_a_demux_looks_again_until_nothing_is_left(rig):
    """Proves row 38: what it takes, and then that there is no more."""
    mark = time.monotonic_ns()
    for msg in (PPC_MSG_RM_HOST_ACTION, PPC_MSG_TICK_BROADCAST):
        rig.chip.smp_muxed_ipi_set_message(2, msg)
    rig.chip.xive_cause_ipi(2)
    rig.wait(lambda: rig.state(2) is RESET and not rig.chip.xive_cpu(2).messages)
    rig.settle()
    taken = [
        arg
        for slot, name, _, arg in rig.events(mark)
        if (slot, name) == (2, "chip_demux")
    ]
    assert taken[:2] == [1 << PPC_MSG_RM_HOST_ACTION | 1 << PPC_MSG_TICK_BROADCAST, 0]


def test_demux_by_hand_runs_a_call(rig):
    """The queue is flushed for PPC_MSG_CALL_FUNCTION, though interrupts are off."""
    log = rig.cluster.shared("log", "i8", 2)
    log[:] = 0

    def demux():
        chip = shmipi.irq.chip()
        flag = shmipi.shared("flag")
        smp.local_irq_disable()
        flag[0] = 1
        end = time.monotonic() + 5
        while not chip.xive_cpu().messages and time.monotonic() < end:
            pass
        chip.smp_ipi_demux_relaxed()
        ran = int(shmipi.shared("log")[0])
        smp.local_irq_enable()
        return ran

    def call():
        smp.smp_call_function_single(
            1, smp.NativeHandler("count"), shmipi.shared("log")
        )

    results = []
    rig.flag[:] = 0
    thread = threading.Thread(
        target=lambda: results.extend(rig.cluster.run(demux, cpus=[1]))
    )
    thread.start()
    rig.wait(lambda: rig.flag[0] == 1)
    rig.cluster.run(call, cpus=[2])
    thread.join(10)
    assert results == [1]


def test_a_host_action_is_taken_before_a_function_call(rig):
    """Proves row 39."""
    mark = time.monotonic_ns()
    for msg in (0, 1, 2, 4):
        rig.chip.smp_muxed_ipi_set_message(3, msg)
    rig.chip.xive_cause_ipi(3)
    rig.wait(lambda: rig.state(3) is RESET and not rig.chip.xive_cpu(3).messages)
    rig.settle()
    taken = [
        arg
        for slot, name, _, arg in rig.events(mark)
        if (slot, name) == (3, "line_ack")
    ]
    assert taken[:5] == [IPI_LINE, PPC_MSG_RM_HOST_ACTION, 0, 1, 2]


def test_a_message_sent_again_is_taken_once_and_its_trigger_is_kept(rig, background):
    """Four messages of a kind, and four triggers: two interrupts, one message."""
    task = rig.start(background, hold)
    before = rig.rows(1)
    for _ in range(4):
        rig.chip.do_message_pass(1, PPC_MSG_TICK_BROADCAST)
    assert rig.state(1) is QUEUED
    rig.flag[1] = 1
    task.end()
    rig.settle()
    after = rig.rows(1)
    assert after["TBI"] == before["TBI"] + 1  # a byte
    assert after["IPI"] == before["IPI"] + 2  # and the trigger that Q kept


def test_nothing_is_lost_in_a_storm(rig):
    """Two send to one that turns interrupts off and on; each waits for each."""
    rounds = 400
    seen = rig.cluster.shared("seen", "i8", 8)
    seen[:] = 0

    def answer(irq):
        log = shmipi.shared("seen")
        log[4:6] = log[0:2]  # what was stored before the trigger is seen here

    def task():
        me = smp.smp_processor_id()
        log = shmipi.shared("seen")
        chip = shmipi.irq.chip()
        if me == 3:
            while log[6] < 2:
                smp.local_irq_disable()
                smp.local_irq_enable()
                time.sleep(0)
            return 0
        worst = 0.0
        for n in range(1, rounds + 1):
            log[me] = n
            chip.do_message_pass(3, n % 3)
            chip.raise_line(LINE, 3)
            start = time.monotonic()
            while log[4 + me] < n:
                assert time.monotonic() - start < 5, f"lost in round {n}"
                time.sleep(0)  # the cores are shared
            worst = max(worst, time.monotonic() - start)
        shmipi.atomic.fetch_add(log, 6, 1)
        return worst

    with rig.handler(LINE, VIRQ, answer):
        try:
            rig.cluster.run(task, cpus=[0, 1, 3])
        finally:
            seen[6] = 2
        rig.settle()
        assert rig.state(3, LINE) is RESET
    assert list(seen[4:6]) == [rounds, rounds]


def test_the_call_chain_of_a_call_to_another_core(rig):
    """do_message_pass ... xive_cause_ipi there, xive_muxed_ipi_action ... here."""
    rig.wait(lambda: rig.cluster.cpus[2].state == "halted")
    mark = time.monotonic_ns()

    def call():
        smp.smp_call_function_single(2, smp.NativeHandler("noop"))

    rig.cluster.run(call, cpus=[0])
    rig.settle()  # RESET it is before its EOI is in the trace
    events = rig.events(mark)
    sent = [(name, arg) for slot, name, cpu, arg in events if (slot, cpu) == (0, 2)]
    names = [name for name, _ in sent]
    chain = ["csd_queue_cpu", "ipi_send_cpu", "chip_message", "chip_trigger"]
    chain += ["line_set"]
    assert [name for name in names if name in chain] == chain
    assert dict(sent)["chip_message"] == PPC_MSG_CALL_FUNCTION
    assert dict(sent)["chip_trigger"] == IPI_LINE << 8 | RESET
    taken = [(name, arg) for slot, name, _, arg in events if slot == 2]
    names = [name for name, _ in taken]
    at = names.index("ipi_entry")
    assert taken[at + 1 : at + 4] == [
        ("line_ack", IPI_LINE),
        ("chip_demux", 1 << PPC_MSG_CALL_FUNCTION),
        ("line_ack", PPC_MSG_CALL_FUNCTION),
    ]
    chain = ["flush", "csd_function_entry", "csd_function_exit", "csd_unlock"]
    rest = [
        name for name in names[at + 4 :] if name in (*chain, "line_eoi", "chip_eoi")
    ]
    assert rest[:6] == [*chain, "line_eoi", "chip_eoi"]


# ---- sources -------------------------------------------------------------------------


def test_p_and_q_through_all_states(rig, background):
    task = rig.start(background, hold)
    before = rig.rows(1)["IPI"]
    mark = time.monotonic_ns()
    assert rig.state(1) is RESET
    rig.chip.xive_cause_ipi(1)
    assert rig.state(1) is PENDING
    for _ in range(3):
        rig.chip.xive_cause_ipi(1)
        assert rig.state(1) is QUEUED
    found = [arg & 3 for _, name, _, arg in rig.events(mark) if name == "chip_trigger"]
    assert found == [RESET, PENDING, QUEUED, QUEUED]
    assert rig.rows(1)["IPI"] == before  # masked
    rig.flag[1] = 1
    task.end()
    rig.settle()
    # Taken once, and once more because its EOI found Q.
    assert rig.rows(1)["IPI"] == before + 2
    assert rig.state(1) is RESET
    eoi = [arg & 1 for slot, name, _, arg in rig.events(mark) if name == "chip_eoi"]
    assert eoi == [1, 0]

    rig.chip.xive_cleanup_cpu_ipi(1)
    for _ in range(2):
        rig.chip.do_message_pass(1, PPC_MSG_TICK_BROADCAST)
        assert rig.state(1) is OFF
    rig.settle()
    assert rig.rows(1)["IPI"] == before + 2  # lost
    assert rig.chip.xive_request_ipi(1) == 0
    assert rig.state(1) is RESET
    rig.chip.xive_cause_ipi(1)
    rig.wait(lambda: rig.rows(1)["IPI"] == before + 3)


SETS = {
    RESET: XIVE_ESB_SET_PQ_00,
    OFF: XIVE_ESB_SET_PQ_01,
    PENDING: XIVE_ESB_SET_PQ_10,
    QUEUED: XIVE_ESB_SET_PQ_11,
}


@pytest.mark.parametrize("line", [IPI_LINE, LINE, LINE2])
def test_the_esb_page(rig, line):
    source = rig.source(2, line)
    page = source.eoi_mmio
    before = rig.rows(2)["IPI"]
    for old, make in SETS.items():
        for new, offset in SETS.items():
            page.read(make)
            assert page.read(offset) == old
            assert page.read(XIVE_ESB_GET) == new
            assert source.esb_state is new
    page.read(XIVE_ESB_SET_PQ_00)
    rig.settle()
    assert rig.rows(2)["IPI"] == before  # P by hand is no notification
    for old, eoi in ((RESET, RESET), (OFF, OFF), (PENDING, RESET)):
        page.read(SETS[old])
        assert page.read(XIVE_ESB_LOAD_EOI) == 0
        assert source.esb_state is eoi
        page.read(SETS[old])
        page.write(0, XIVE_ESB_STORE_EOI)
        assert source.esb_state is eoi
    page.read(XIVE_ESB_SET_PQ_00)
    for other in (IPI_LINE, LINE, LINE2):
        if other != line:
            assert rig.state(2, other) is RESET


@pytest.mark.parametrize("line", [IPI_LINE, LINE2])
def test_the_esb_page_is_decoded_by_range(rig, line):
    """As QEMU's xive_source_esb_read and _write; the kernel's own load is at 0xe40."""
    source = rig.source(2, line)
    page = source.eoi_mmio
    for old in SETS:
        for new, offset in SETS.items():
            for at in (
                offset,
                offset + XIVE_ESB_LD_ST_MO,
                offset + 0x08,
                offset + 0xF8,
            ):
                page.read(SETS[old])
                assert page.read(at) == old
                assert page.read(0x808) == page.read(0xBF8) == source.esb_state == new
                page.read(SETS[old])
                page.write(0, at)
                assert source.esb_state is new
        for at in (0x000, 0x008, 0x400, 0x7F8):  # each of these loads is an EOI
            if old is not QUEUED:  # which would notify
                page.read(SETS[old])
                assert page.read(at) == 0
                assert source.esb_state is (OFF if old is OFF else RESET)
        for at in (0x400, 0x408, 0x7F8):  # and each of these stores
            if old is not QUEUED:
                page.read(SETS[old])
                page.write(0, at)
                assert source.esb_state is (OFF if old is OFF else RESET)
    # A store below is a trigger, though the page is not the trigger page.
    page.read(XIVE_ESB_SET_PQ_10)
    page.write(0, 0x3F8)
    assert source.esb_state is QUEUED
    page.read(XIVE_ESB_SET_PQ_00)
    if line == IPI_LINE:
        before = rig.rows(2)["IPI"]
        page.write(0, 0x000)
        rig.wait(lambda: rig.rows(2)["IPI"] == before + 1)
        rig.wait(lambda: rig.state(2) is RESET)


def test_an_eoi_by_hand_of_a_queued_source_notifies(rig):
    page = rig.source(2).eoi_mmio
    before = rig.rows(2)["IPI"]
    for n, eoi in enumerate((lambda: page.read(XIVE_ESB_LOAD_EOI), page.write), 1):
        page.read(XIVE_ESB_SET_PQ_11)
        assert eoi() in (1, None)
        rig.wait(lambda: rig.rows(2)["IPI"] == before + n)  # noqa: B023
        rig.wait(lambda: rig.state(2) is RESET)


def test_what_was_notified_stays_when_p_is_cleared(rig, background):
    """In hardware it is in the queue by then."""
    stack, n = rig.counted()
    with stack:
        task = rig.start(background, hold)
        rig.source(1, LINE).trig_mmio.write(0)
        assert rig.chip.xive_cpu(1).notified == [LINE]
        assert rig.source(1, LINE).eoi_mmio.read(XIVE_ESB_SET_PQ_00) == PENDING
        rig.flag[1] = 1
        task.end()
        rig.wait(lambda: n[0] == 1)
        rig.settle()
        assert n[0] == 1
        assert rig.state(1, LINE) is RESET


@pytest.mark.parametrize("line", [LINE, LINE2])
def test_a_masked_line_stays_pending_and_fires_once_on_unmask(rig, line):
    stack, n = rig.counted(line)
    with stack:
        rig.chip.mask_line(line, 2)
        mark = time.monotonic_ns()
        for _ in range(3):
            rig.chip.raise_line(line, 2)
        rig.cluster.call(2, int)  # an interrupt of another line leaves it alone
        rig.settle()
        assert n[0] == 0
        assert rig.chip.pending_lines(2) == [line]
        assert rig.state(2, line) is PENDING
        assert not rig.chip.interrupt_asserted(2)
        names = [name for _, name, _, arg in rig.events(mark) if arg == line]
        assert names.count("line_kept") == 3  # nobody was rung
        rig.chip.unmask_line(line, 2)
        rig.wait(lambda: n[0] == 1)
        rig.settle()
        assert n[0] == 1
        rig.chip.raise_line(line, 2)
        rig.wait(lambda: n[0] == 2)


def test_a_line_masked_while_it_waits_in_the_queue(rig):
    """Two are queued; the handler of the first masks the second, then unmasks it."""
    log = rig.cluster.shared("order", "i8", 4)
    log[:] = 0

    def first(irq):
        chip = shmipi.irq.chip()
        chip.mask_line(LINE2, 1)
        shmipi.shared("order")[0] += 1

    def second(irq):
        shmipi.shared("order")[1] += 1

    def task():
        chip = shmipi.irq.chip()
        order = shmipi.shared("order")
        smp.local_irq_disable()
        chip.raise_line(LINE, 1)
        chip.raise_line(LINE2, 1)
        smp.local_irq_enable()
        end = time.monotonic() + 5
        while not order[0] and time.monotonic() < end:
            pass
        held = int(order[1]), chip.pending_lines(1)
        chip.unmask_line(LINE2, 1)
        while not order[1] and time.monotonic() < end:
            pass
        return held

    with rig.handler(LINE, VIRQ, first), rig.handler(LINE2, VIRQ2, second):
        held = rig.cluster.run(task, cpus=[1])[0]
        assert held == (0, [LINE2])
        assert list(log[:2]) == [1, 1]


def test_lines_whose_python_handlers_are_put_off(rig, background):
    """They wait in the queue behind each other, and for a task's bytecode; all run."""
    log = rig.cluster.shared("runs", "i8", 64)
    lines = range(LINE, LINE2 + 1)
    log[:] = 0

    def note(irq):
        runs = shmipi.shared("runs")
        serving = shmipi.irq.chip().in_service(1)
        runs[32] = len(serving)
        runs[serving[0]] += 1

    with contextlib.ExitStack() as stack:
        for line in lines:
            stack.enter_context(rig.handler(line, VIRQ + line, note))
        for _ in range(20):
            task = rig.start(background, hold)
            for line in lines:
                rig.chip.raise_line(line, 1)
            rig.flag[1] = 1
            task.end()
        task = rig.start(background, spin)
        for line in lines:
            rig.chip.raise_line(line, 1)
        rig.wait(lambda: min(log[LINE : LINE2 + 1]) == 21)
        rig.flag[1] = 1
        task.end()
    assert set(log[LINE : LINE2 + 1]) == {21}
    assert log[32] == 1  # one at a time: they have one priority


def test_an_ipi_waits_for_a_python_handler_and_a_doorbell_does_not(rig):
    """CPPR is that of the line in service; a doorbell has none."""
    log = rig.cluster.shared("inside", "i8", 4)
    log[:] = 0

    def handler(irq):
        chip = shmipi.irq.chip()
        inside = shmipi.shared("inside")
        inside[0] = chip.xive_cpu().cppr
        inside[1] = chip.in_service(1)[0]
        chip.xive_cause_ipi(1)
        inside[2] = chip.interrupt_asserted()
        chip.doorbell_core_ipi(1)
        inside[3] = chip.interrupt_asserted()

    with rig.handler(LINE, VIRQ, handler):
        before = rig.rows(1)
        rig.chip.raise_line(LINE, 1)
        rig.wait(lambda: rig.rows(1)["DBL"] == before["DBL"] + 1)
        rig.wait(lambda: rig.rows(1)["IPI"] == before["IPI"] + 1)
    assert list(log) == [7, LINE, 0, 1]


def test_an_eoi_in_the_handler_lets_the_line_come_again(rig):
    log = rig.cluster.shared("turns", "i8", 2)
    log[:] = 0

    def handler(irq):
        chip = shmipi.irq.chip()
        turns = shmipi.shared("turns")
        turns[0] += 1
        if turns[0] == 1:
            chip.machine.irq_end(LINE)
            chip.raise_line(LINE, 1)
            chip.raise_line(LINE, 1)
            turns[1] = chip.irq_data(LINE, 1).esb_state  # no later EOI may touch it

    with rig.handler(LINE, VIRQ, handler):
        rig.chip.raise_line(LINE, 1)
        rig.wait(lambda: log[0] == 3)
        rig.settle()
        assert list(log) == [3, QUEUED]
        assert rig.state(1, LINE) is RESET


# ---- the event queue -----------------------------------------------------------------


def test_the_generation_flips_when_the_queue_wraps(rig):
    queue = rig.chip.xive_cpu(2).queue
    stack, n = rig.counted()
    toggles = []
    with stack:
        for i in range(1, 3 * 64 + 20):
            at, toggle, produced = queue.idx, queue.toggle, queue.produced
            rig.chip.raise_line(LINE, 2)
            rig.wait(lambda: n[0] == i and rig.state(2, LINE) is RESET)  # noqa: B023
            assert queue.qpage[at] == LINE | (1 - toggle) << 31
            assert queue.produced == produced + 1
            assert queue.idx == (at + 1) % 64
            assert queue.toggle == (toggle if queue.idx else 1 - toggle)
            toggles.append(queue.toggle)
    flips = np.flatnonzero(np.diff(toggles))
    assert len(flips) >= 3
    assert set(np.diff(flips)) == {64}


def test_the_queue_is_first_in_first_out(rig, background):
    """xive_read_eq: in the order of the triggers, whatever the sources' numbers are.

    An entry is written at trigger time. One more trigger of a queued source moves
    nothing; a source that is masked when its entry is read is queued anew on unmask.
    """
    sent = [20, 12, 8, 27, 9, 26, IPI_LINE, 10, 25, 11, *range(13, 20)]
    sources = [line for line in sent if line != IPI_LINE]
    queue = rig.chip.xive_cpu(1).queue
    count = smp.NativeHandler("noop")
    with contextlib.ExitStack() as stack:
        stack.enter_context(rig.handler(sources[0], VIRQ, count))
        for line in sources[1:]:
            rig.machine.pic_write(0, "line_virq", line, VIRQ)
            stack.callback(rig.machine.pic_write, 0, "line_virq", line, 0)
            rig.chip.unmask_line(line, 1)
            stack.callback(rig.chip.mask_line, line, 1)

        def taken_after(act):
            """`act()` with interrupts off on CPU 1; what it takes when they are on."""
            rig.settle()
            task = rig.start(background, hold)
            mark = time.monotonic_ns()
            act()
            rig.flag[1] = 1
            task.end()
            rig.settle()
            acks = [e[3] for e in rig.events(mark) if (e[1], e[2]) == ("line_ack", 1)]
            return [line for line in acks if line >= LINE or line == IPI_LINE]

        def trigger(*lines):
            at, produced = queue.idx, queue.produced
            for line in lines:
                rig.source(1, line).trig_mmio.write(0)
            first = list(dict.fromkeys(lines))  # the others found P: only Q is set
            assert queue.produced == produced + len(first)
            page = [queue.qpage[(at + i) % 64] & 0x7FFFFFFF for i in range(len(first))]
            assert page == rig.chip.xive_cpu(1).notified == first

        for _ in range(3):  # the last is across the wrap of turns, and of the queue
            assert taken_after(lambda: trigger(*sent)) == sent
        # Q: once more, in the order of the EOIs.
        order = taken_after(lambda: trigger(20, 12, 20, 8, 12))
        assert order == [20, 12, 8, 20, 12]

        def unmask_between():
            rig.chip.raise_line(12, 1)
            rig.chip.raise_line(8, 1)
            rig.chip.unmask_line(20, 1)
            rig.chip.raise_line(9, 1)

        rig.chip.mask_line(20, 1)
        rig.chip.raise_line(20, 1)
        rig.chip.raise_line(IPI_LINE, 1)  # it looks, and holds 20
        assert taken_after(unmask_between) == [12, 8, 20, 9]


# ---- CPPR ----------------------------------------------------------------------------


def on_own_cppr():
    """A task that sets its CPPR as flag[1] says (less one), until that is 1000."""
    flag = shmipi.shared("flag")
    own = shmipi.irq.chip().xive_cpu()
    own.cppr = 0
    flag[0] = 1
    end = time.monotonic() + 10
    while (asked := int(flag[1])) < 1000 and time.monotonic() < end:
        if asked:
            own.cppr = asked - 1
            flag[1] = 0
    own.cppr = 0xFF


def set_cppr(rig, value):
    rig.flag[1] = value + 1
    rig.wait(lambda: rig.flag[1] == 0)


def test_cppr_holds_back_and_lets_through_once(rig, background):
    stack, n = rig.counted()
    with stack:
        task = rig.start(background, on_own_cppr)
        assert rig.chip.xive_cpu(1).cppr == 0
        before = rig.rows(1)
        rig.chip.raise_line(LINE, 1)
        rig.chip.do_message_pass(1, PPC_MSG_TICK_BROADCAST)
        for value in (0, 7, 1):
            set_cppr(rig, value)
            assert rig.chip.xive_cpu(1).cppr == value
            assert rig.chip.pending_lines(1) == [PPC_MSG_TICK_BROADCAST, IPI_LINE, LINE]
            assert not rig.chip.interrupt_asserted(1)
            after = rig.rows(1)
            assert (n[0], after["IPI"]) == (0, before["IPI"])
            assert after["KIC"] == before["KIC"]  # not even rung
        set_cppr(rig, 8)
        rig.wait(lambda: n[0] == 1 and rig.rows(1)["TBI"] == before["TBI"] + 1)
        set_cppr(rig, 0xFF)
        rig.settle()
        assert n[0] == 1
        assert rig.rows(1)["IPI"] == before["IPI"] + 1
        rig.flag[1] = 1000
        task.end()


def test_a_doorbell_comes_in_whatever_cppr_is(rig, background):
    task = rig.start(background, on_own_cppr)
    before = rig.rows(1)
    rig.chip.do_message_pass(1, PPC_MSG_TICK_BROADCAST)
    rig.chip.doorbell_global_ipi(1)
    rig.wait(lambda: rig.rows(1)["TBI"] == before["TBI"] + 1)
    assert rig.state(1) is PENDING  # whose message the doorbell took
    assert rig.rows(1)["IPI"] == before["IPI"]
    rig.flag[1] = 1000
    task.end()
    rig.wait(lambda: rig.rows(1)["IPI"] == before["IPI"] + 1)
    assert rig.rows(1)["TBI"] == before["TBI"] + 1


def test_an_interrupt_that_cppr_holds_back_at_the_last_moment_is_spurious(
    rig, background
):

    def task():
        chip = shmipi.irq.chip()
        smp.local_irq_disable()
        chip.xive_cause_ipi(1)
        chip.xive_cpu().cppr = 0
        smp.local_irq_enable()
        held = chip.xive_cpu().ipi_data.esb_state.name
        chip.xive_cpu().cppr = 0xFF
        return held, chip.xive_cpu().ipi_data.esb_state.name

    result, before = rig.run(background, task)
    assert result == ("PENDING", "RESET")
    after = rig.rows(1)
    assert after["SPU"] == before["SPU"] + 1
    assert after["IPI"] == before["IPI"] + 1


def test_a_halted_cpu_that_lets_nothing_through_goes_offline_and_comes_back(rig):
    def shut(_):
        shmipi.irq.chip().xive_cpu().cppr = 0

    rig.cluster.call(3, shut, None)
    rig.wait(lambda: rig.cluster.cpus[3].state == "halted")
    rig.chip.do_message_pass(3, PPC_MSG_RESCHEDULE)
    assert rig.chip.pending_lines(3) == [PPC_MSG_RESCHEDULE, IPI_LINE]
    rig.cluster.offline(3, timeout=5)
    rig.cluster.online(3, timeout=5)
    assert rig.chip.xive_cpu(3).cppr == 0xFF
    assert rig.chip.pending_lines(3) == []


# ---- doorbells -----------------------------------------------------------------------


def test_siblings_ring_and_others_are_sent_an_ipi(rig):
    def call():
        for cpu in (0, 2, 3):
            smp.smp_call_function_single(cpu, smp.NativeHandler("noop"))

    rig.wait(lambda: {c.state for c in rig.cluster.cpus} == {"halted"})
    before = [rig.rows(cpu) for cpu in range(4)]
    mark = time.monotonic_ns()
    rig.cluster.run(call, cpus=[1])
    rig.settle()
    after = [rig.rows(cpu) for cpu in range(4)]
    triggered = [cpu for s, name, cpu, _ in rig.events(mark) if name == "chip_trigger"]
    assert 0 not in triggered
    assert {2, 3} <= set(triggered)
    assert after[0]["DBL"] > before[0]["DBL"]
    for cpu in (2, 3):
        assert after[cpu]["DBL"] == before[cpu]["DBL"]
        assert after[cpu]["IPI"] > before[cpu]["IPI"]


def test_doorbell_functions(rig, background):
    chip = rig.chip
    assert list(chip.cpu_sibling_mask(3)) == [2, 3]
    assert [chip.cpu_thread_in_core(cpu) for cpu in range(4)] == [0, 1, 0, 1]
    assert chip.smp_ops.message_pass is None
    assert chip.smp_ops.cause_ipi == chip.dbell_or_ic_cause_ipi

    def task():
        chip = shmipi.irq.chip()
        tried = [chip.doorbell_try_core_ipi(cpu) for cpu in range(4)]
        chip.doorbell_core_ipi(2)  # its thread number, in this core: CPU 0
        chip.doorbell_global_ipi(2)
        for cpu in range(4):
            chip.do_message_pass(cpu, PPC_MSG_TICK_BROADCAST)
            chip.dbell_or_ic_cause_ipi(cpu)
        return tried

    before = [rig.rows(cpu) for cpu in range(4)]
    tried, before[1] = rig.run(background, task)
    assert tried == [1, 1, 0, 0]
    after = [rig.rows(cpu) for cpu in range(4)]

    def more(label):
        return [after[cpu][label] - before[cpu][label] for cpu in range(4)]

    assert more("TBI") == [1, 1, 1, 1]
    assert all(n >= 1 for n in more("DBL")[:3])
    assert more("DBL")[3] == 0
    assert more("IPI")[:2] == [0, 0]
    assert all(n >= 1 for n in more("IPI")[2:])
    assert chip.doorbell_try_core_ipi(0) == 0  # the host is in no core


# ---- lazy masking --------------------------------------------------------------------


def test_irq_happened_and_the_order_of_its_replay(rig, background):
    """Proves row 48."""
    chip = rig.chip
    task = rig.start(background, hold)
    before = rig.rows(1)
    assert chip.irq_happened(1) == 0
    mark = time.monotonic_ns()
    chip.smp_muxed_ipi_set_message(1, PPC_MSG_TICK_BROADCAST)
    chip.doorbell_global_ipi(1)
    rig.wait(lambda: chip.irq_happened(1) == PACA_IRQ_DBELL)
    chip.xive_cause_ipi(1)
    happened = PACA_IRQ_DBELL | PACA_IRQ_EE | PACA_IRQ_HARD_DIS
    rig.wait(lambda: chip.irq_happened(1) == happened)
    assert rig.rows(1)["TBI"] == before["TBI"]
    rig.flag[1] = 1
    task.end()
    assert chip.irq_happened(1) == 0
    taken = [
        arg
        for slot, name, _, arg in rig.events(mark)
        if (slot, name) == (1, "line_ack")
    ]
    assert taken[:3] == [IPI_LINE, PPC_MSG_TICK_BROADCAST, DOORBELL_LINE]
    after = rig.rows(1)
    assert [after[k] - before[k] for k in ("IPI", "DBL", "TBI")] == [1, 1, 1]


def test_nothing_is_noted_after_an_external_interrupt_and_it_comes_all_the_same(
    rig, background
):
    chip = rig.chip
    task = rig.start(background, hold)
    before = rig.rows(1)
    chip.xive_cause_ipi(1)
    rig.wait(lambda: chip.irq_happened(1) == PACA_IRQ_EE | PACA_IRQ_HARD_DIS)
    kicks = rig.cluster.counters()["kicks_received"][1]
    chip.doorbell_global_ipi(1)
    rig.wait(lambda: rig.cluster.counters()["kicks_received"][1] > kicks)
    assert chip.irq_happened(1) == PACA_IRQ_EE | PACA_IRQ_HARD_DIS
    assert chip.pending_lines(1) == [IPI_LINE, DOORBELL_LINE]
    rig.flag[1] = 1
    task.end()
    after = rig.rows(1)
    assert [after[k] - before[k] for k in ("IPI", "DBL")] == [1, 1]


def test_prep_irq_for_idle(rig):
    def task():
        chip = shmipi.irq.chip()
        smp.local_irq_disable()
        quiet = chip.lazy_irq_pending(), chip.prep_irq_for_idle(), smp.irqs_disabled()
        smp.local_irq_disable()
        chip.xive_cause_ipi(1)
        busy = chip.lazy_irq_pending(), chip.prep_irq_for_idle(), smp.irqs_disabled()
        smp.local_irq_enable()
        smp.local_irq_disable()
        chip.doorbell_core_ipi(1)
        rung = chip.lazy_irq_pending(), chip.prep_irq_for_idle(), smp.irqs_disabled()
        smp.local_irq_enable()
        return quiet, busy, rung, chip.lazy_irq_pending()

    assert rig.cluster.run(task, cpus=[1])[0] == (
        (False, True, False),
        (True, False, True),
        (True, False, True),
        False,
    )


@pytest.mark.parametrize("way", ["xive_cause_ipi", "doorbell_global_ipi"])
def test_the_idle_loop_does_not_sleep_on_what_has_happened(boot, way):
    """Stopped between its last look and HALTED: the interrupt rings nobody.

    Proves row 31.
    """
    rig = Rig(boot(2, controller="xive", idle="halt", steps=True))
    row = {"xive_cause_ipi": "IPI", "doorbell_global_ipi": "DBL"}[way]
    rig.wait(lambda: rig.cluster.cpus[1].state == "halted")
    rig.machine.arm_step(1, "halt", _core.STEP_STOP)
    rig.chip.do_message_pass(1, PPC_MSG_TICK_BROADCAST)
    pid = rig.cluster.cpus[1].pid

    def stops_at(step):
        """It says so just before it stops."""
        rig.wait(lambda: rig.machine.step_hit(1) == step)
        rig.wait(lambda: psutil.Process(pid).status() == "stopped")

    stops_at("halt")
    before, halts = rig.rows(1)[row], rig.cluster.counters()["halts"][1]
    getattr(rig.chip, way)(1)
    assert rig.chip.interrupt_asserted(1)
    rig.machine.arm_step(1, "halted", _core.STEP_STOP)
    os.kill(pid, signal.SIGCONT)
    # It gets to HALTED, but for that it must have taken the interrupt.
    stops_at("halted")
    assert rig.rows(1)[row] == before + 1
    assert rig.cluster.counters()["halts"][1] <= halts + 1
    os.kill(pid, signal.SIGCONT)
    assert rig.cluster.call(1, abs, -1, timeout=5) == 1


# ---- NMIs ----------------------------------------------------------------------------


def test_a_system_reset_is_not_masked_and_the_message_is(rig, background):
    ops = rig.chip.smp_ops
    task = rig.start(background, hold)
    before = rig.rows(1)
    rig.chip.do_message_pass(1, PPC_MSG_NMI_IPI)
    assert ops.cause_nmi_ipi(1) == 1
    rig.wait(lambda: rig.rows(1)["NMI"] == before["NMI"] + 1)
    assert rig.rows(1)["NIP"] == before["NIP"]
    rig.flag[1] = 1
    task.end()
    rig.settle()
    after = rig.rows(1)
    assert (after["NIP"], after["NMI"]) == (before["NIP"] + 1, before["NMI"] + 2)


def test_a_system_reset_of_all_others(rig):
    before = [rig.rows(cpu)["NMI"] for cpu in range(4)]

    def task():
        return shmipi.irq.chip().smp_ops.cause_nmi_ipi(NMI_IPI_ALL_OTHERS)

    assert rig.cluster.run(task, cpus=[2]) == [1]
    expected = [before[cpu] + (cpu != 2) for cpu in range(4)]
    rig.wait(lambda: [rig.rows(cpu)["NMI"] for cpu in range(4)] == expected)
    assert rig.chip.smp_ops.cause_nmi_ipi(-1) == 0
    assert rig.chip.smp_ops.cause_nmi_ipi(4) == 0


# ---- offline, and death --------------------------------------------------------------


def test_what_is_sent_to_an_offline_cpu_is_lost_and_masks_stay(rig):
    stack, n = rig.counted()
    with stack:
        rig.chip.mask_line(LINE, 3)
        rig.cluster.offline(3)
        before = rig.rows(3)
        rig.chip.do_message_pass(3, PPC_MSG_TICK_BROADCAST)
        rig.chip.doorbell_global_ipi(3)
        rig.chip.raise_line(LINE, 3)
        rig.chip.raise_line(LINE, 3)
        assert rig.chip.smp_ops.cause_nmi_ipi(3) == 0
        rig.cluster.online(3)
        after = rig.rows(3)
        assert [after[k] - before[k] for k in ("IPI", "DBL", "TBI")] == [0, 0, 0]
        assert rig.chip.pending_lines(3) == []
        assert rig.chip.xive_cpu(3).queue.produced == 0
        rig.chip.raise_line(LINE, 3)
        rig.chip.do_message_pass(3, PPC_MSG_TICK_BROADCAST)
        rig.wait(lambda: rig.rows(3)["TBI"] == after["TBI"] + 1)
        assert n[0] == 0  # masked still
        rig.chip.unmask_line(LINE, 3)
        rig.wait(lambda: n[0] == 1)


@pytest.mark.parametrize("step", ["raise", "ring", "rung"])
def test_a_sender_that_dies_on_the_way(boot, step):
    """What it had triggered is taken, once; the line works for the next one."""
    rig = Rig(boot(3, controller="xive", idle="halt", steps=True))
    stack, n = rig.counted()
    with stack:
        rig.wait(lambda: rig.cluster.cpus[1].state == "halted")
        rig.machine.arm_step(0, step, _core.STEP_KILL)
        rig.machine.post(0, _core_raise, (LINE, 1), None, False)
        rig.wait(lambda: rig.cluster.cpus[0].state == "dead")
        rig.wait(lambda: n[0] == 1)
        rig.chip.raise_line(LINE, 1)
        rig.wait(lambda: n[0] == 2)
        rig.cluster.call(1, int)
        assert n[0] == 2
        assert rig.state(1, LINE) is RESET


def _core_raise(line, cpu):
    shmipi.irq.chip().raise_line(line, cpu)


# ---- messages with irqs of their own -------------------------------------------------


def test_a_message_may_have_an_irq_of_its_own(rig):
    """smp_request_message_ipi, for controllers with an IPI for each message."""
    lines = {PPC_MSG_CALL_FUNCTION: LINE, PPC_MSG_RESCHEDULE: LINE2}
    virqs = {PPC_MSG_CALL_FUNCTION: VIRQ, PPC_MSG_RESCHEDULE: VIRQ2}
    for msg, line in lines.items():
        assert rig.chip.smp_request_message_ipi(virqs[msg], msg) == 0
        rig.machine.pic_write(0, "line_virq", line, virqs[msg])
        rig.chip.unmask_line(line, 2)
    with pytest.raises(IrqError, match="has a handler") as info:
        rig.chip.smp_request_message_ipi(VIRQ, PPC_MSG_CALL_FUNCTION)
    assert (info.value.errno, info.value.irq) == (16, VIRQ)
    counters = ("irq_call", "irq_resched", "irq_handled", "irq_other")
    for msg, line in lines.items():
        before, rows = rig.cluster.counters(), rig.rows(2)
        rig.chip.raise_line(line, 2)
        rig.wait(lambda: rig.rows(2)[MESSAGES[msg]] == rows[MESSAGES[msg]] + 1)  # noqa: B023
        rig.wait(lambda: rig.state(2, line) is RESET)  # noqa: B023
        after = rig.cluster.counters()
        call = msg == PPC_MSG_CALL_FUNCTION
        more = [int(after[name][2] - before[name][2]) for name in counters]
        assert more == [call, not call, 1, 0]
        assert rig.rows(2)["IPI"] == rows["IPI"]
    for msg, line in lines.items():
        rig.chip.mask_line(line, 2)
        rig.machine.pic_write(0, "line_virq", line, 0)
        rig.machine.irq_free(virqs[msg])


# ---- what it refuses -----------------------------------------------------------------


@pytest.mark.parametrize("msg", [-1, 5, 7, 256])
def test_no_such_message(rig, msg):
    for send in (
        rig.chip.do_message_pass,
        rig.chip.smp_muxed_ipi_set_message,
        rig.chip.smp_muxed_ipi_message_pass,
    ):
        with pytest.raises(IrqError, match=f"no message {msg}") as info:
            send(1, msg)
        assert (info.value.errno, info.value.domain) == (22, "xive")
    with pytest.raises(IrqError, match=f"message {msg} has no irq") as info:
        rig.chip.smp_request_message_ipi(VIRQ, msg)
    assert (info.value.errno, info.value.irq) == (22, VIRQ)


@pytest.mark.parametrize("cpu", [-1, 4, 4096])
def test_no_such_cpu(rig, cpu):
    chip = rig.chip
    for use in (
        lambda: chip.do_message_pass(cpu, 0),
        lambda: chip.smp_muxed_ipi_set_message(cpu, 0),
        lambda: chip.xive_cause_ipi(cpu),
        lambda: chip.doorbell_global_ipi(cpu),
        lambda: chip.doorbell_try_core_ipi(cpu),
        lambda: chip.xive_request_ipi(cpu),
        lambda: chip.irq_data(LINE, cpu),
    ):
        with pytest.raises(CpuOfflineError, match=f"no CPU {cpu}") as info:
            use()
        assert (info.value.errno, info.value.cpu) == (6, cpu)


def test_what_else_is_refused(rig):
    chip = rig.chip
    for line in (-1, 0, 6, 7, 28):
        with pytest.raises(IrqError, match="has no source"):
            chip.irq_data(line, 1)
    page = rig.source(1).eoi_mmio
    for offset in (0x801, 0xC04, 0x1000, -8):
        with pytest.raises(IrqError, match="no load"):
            page.read(offset)
    for offset in (0x800, 0xB08, 0x404, 0x1000, -8):
        with pytest.raises(IrqError, match="no store"):
            page.write(0, offset)
    with pytest.raises(IrqError, match="irq 1024") as info:
        chip.smp_request_message_ipi(1024, PPC_MSG_RESCHEDULE)
    assert info.value.errno == 22
    with pytest.raises(IrqError, match="has no irq"):  # the kernel's range ends before
        chip.smp_request_message_ipi(VIRQ, PPC_MSG_RM_HOST_ACTION)
    for use in (
        chip.smp_ipi_demux,
        chip.lazy_irq_pending,
        chip.prep_irq_for_idle,
        chip.xive_cpu,
        lambda: chip.doorbell_core_ipi(1),
        lambda: setattr(chip.xive_cpu(1), "cppr", 0),
    ):
        with pytest.raises(ClusterStateError):
            use()
    with pytest.raises(IrqError, match="a byte"):
        chip.xive_cpu(1).cppr = 256
    with pytest.raises(ValueError, match="threads_per_core"):
        Xive(threads_per_core=0)


def test_a_cppr_is_its_own_cpus_to_write(rig):
    def other(_):
        shmipi.irq.chip().xive_cpu(2).cppr = 0

    with pytest.raises(RemoteCallError, match="its own to write") as info:
        rig.cluster.call(1, other, None)
    assert isinstance(info.value.__cause__, ClusterStateError)


def test_without_config_nmi_ipi():
    chip = pickle.loads(pickle.dumps(Xive(4, nmi_ipi=False)))
    assert (chip.threads_per_core, chip.nmi_ipi) == (4, False)
    names = [line.name for line in chip.lines(4)]
    assert "PPC_MSG_NMI_IPI" not in names
    assert chip.smp_request_message_ipi(VIRQ, PPC_MSG_NMI_IPI) == 1
    assert chip.describe(4)["nmi"] is None
    assert CHIPS["xive"]().describe(4)["nmi"] is None  # system resets, not the message
