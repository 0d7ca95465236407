"""TLB shootdown: the rules of arch/x86/mm/tlb.c, each with CPUs that have it cached."""

import contextlib
import os
import pickle
import signal
import struct
import time

import pytest

import shmipi
from shmipi import (
    AddressSpaceError,
    ClusterStateError,
    CpuDiedError,
    PageFaultError,
    RemoteCallError,
    _core,
    smp,
)
from shmipi.machine.process import is_stopped
from shmipi.users import tlb

PAGE = tlb.PAGE_SIZE
READ, RW = tlb.PROT_READ, tlb.PROT_READ | tlb.PROT_WRITE
USE, UNUSE, LOAD, STORE, SLEEP, IRQS_OFF, END = range(1, 8)


def obey(mms):
    """Task: do what the host has written into this CPU's row, until it says END."""
    from shmipi.smp import waitqueue

    # Sleeps until it is woken, and does not look by its own clock.
    waitqueue._LOOK_S = waitqueue._LOOK_EXCLUSIVE_S = waitqueue._LOOK_MAX_S = 60.0
    row = shmipi.percpu("orders")[smp.smp_processor_id()]
    off = False
    while True:
        while not row[0]:
            time.sleep(0 if off else 0.0002)
        what, arg, value = int(row[0]), int(row[1]) % (1 << 64), int(row[2])
        answer = 0
        try:
            if what == USE:
                tlb.use_mm(mms[arg])
            elif what == UNUSE:
                tlb.unuse_mm()
            elif what == LOAD:
                answer = tlb.load(arg)
            elif what == STORE:
                tlb.store(arg, value)
            elif what == SLEEP:
                row[0] = 0
                shmipi.percpu("orders")[smp.smp_processor_id(), 4] = 1
                smp.completion("wake").wait_for_completion()
                row[4] = 0
                continue  # it is told the next thing from now on
            elif what == IRQS_OFF:
                off = bool(arg)
                (smp.local_irq_disable if arg else smp.local_irq_enable)()
        except PageFaultError as error:
            answer = -error.si_code
        row[3] = answer
        row[0] = 0
        if what == END:
            return


class Rig:
    """A machine whose CPUs do what they are told."""

    def __init__(self, cluster, eventually):
        self.cluster, self.eventually = cluster, eventually
        self.tlb = cluster.users.tlb
        self.mms = [self.tlb.mm("a"), self.tlb.mm("b")]
        self.mm, self.other = self.mms
        self.orders = cluster.percpu("orders", "i8", 8)
        self.wake = cluster.completion("wake")
        self.tasks = {}

    def order(self, cpu, what, arg=0, value=0):
        row = self.orders[cpu]
        row[1], row[2] = arg if arg < 1 << 63 else arg - (1 << 64), value
        row[0] = what

    def tell(self, cpu, what, arg=0, value=0):
        self.order(cpu, what, arg, value)
        self.eventually(lambda: not self.orders[cpu, 0])
        return int(self.orders[cpu, 3])

    def begin(self, *cpus, use=0):
        for cpu in cpus:
            self.orders[cpu] = 0
            self.tasks[cpu] = self.cluster.start(obey, self.mms, cpus=[cpu])
            if use is not None:
                self.tell(cpu, USE, use)

    def sleep(self, cpu):
        """Its task sleeps: the CPU is idle, in lazy TLB mode."""
        self.order(cpu, SLEEP)
        self.eventually(
            lambda: self.orders[cpu, 4] and self.cluster.cpus[cpu].state == "halted"
        )

    def rouse(self, cpu):
        self.wake.complete()
        self.eventually(lambda: not self.orders[cpu, 4])

    def load(self, cpu, address):
        return self.tell(cpu, LOAD, address)

    def munmap_that_waits_for(self, cpu, background):
        """What this CPU has in its TLB, with interrupts off; and who unmaps it."""
        at, _ = self.mm.mmap(PAGE), self.mm.mmap(PAGE)
        self.begin(cpu)
        self.load(cpu, at)
        self.tell(cpu, IRQS_OFF, 1)
        unmap = background(self.mm.munmap, at, PAGE)
        self.eventually(lambda: self.tlb.memory_state()["limbo"] == 1)
        return at, unmap

    def counts(self, cpu):
        return self.tlb.tlb_state(cpu)

    def change(self, cpu, before):
        now = self.counts(cpu)
        return {
            name: now[name] - before[name]
            for name in now
            if name not in ("loaded_mm", "is_lazy", "mm", "asid", "tlb_gen", "rseq")
            and now[name] != before[name]
        }

    def end(self):
        machine = self.cluster._machine
        machine.set_broken(0)
        for cpu, tasks in self.tasks.items():
            with contextlib.suppress(Exception):
                if self.orders[cpu, 4]:
                    self.rouse(cpu)
                self.order(cpu, END)
                tasks.wait(5)
        self.tasks.clear()
        self.cluster.run(int)
        for mm in self.mms:
            mm.exit_mmap()
        self.tlb.reclaim()
        self.tlb.single_page_flush_ceiling = 33
        state = self.tlb.memory_state()
        assert state["pages"] == state["limbo"] == state["held"] == 0
        assert state["free"] + state["tables"] == state["frames"]
        assert state["tables"] <= 4, "init_mm's, which stay as those of vmalloc do"


@pytest.fixture
def rig(cluster_with_steps, eventually):
    made = Rig(cluster_with_steps, eventually)
    yield made
    made.end()


def breaking(rig, rule):
    number = [f"{user}.{name}" for user, name, *_ in _core.RULES].index(rule)
    rig.cluster._machine.set_broken(1 << number)


# ---- translation ---------------------------------------------------------------------


def test_loads_and_stores_go_through_page_tables_and_a_tlb(rig):
    """row 68"""
    at = rig.mm.mmap(3 * PAGE)
    elsewhere = rig.other.mmap(PAGE, address=at)
    assert elsewhere == at
    rig.begin(0, 1)
    rig.begin(2, use=1)
    assert rig.tell(0, STORE, at + 8, 7) == 0
    assert (rig.load(1, at + 8), rig.load(2, at + 8)) == (7, 0)
    before = rig.counts(1)
    for _ in range(5):
        assert rig.load(1, at + 8) == 7
    assert rig.change(1, before) == {}, "a hit walks nothing"
    data = bytes(range(128)) * 64
    rig.mm.write(at + 100, data)
    assert rig.mm.read(at + 100, len(data)) == data
    assert rig.load(0, at + PAGE - 4) == struct.unpack_from("<Q", data, PAGE - 104)[0]

    def by_bytes(mm, at, data):
        with tlb.using(mm):
            tlb.store_bytes(at + 3, data)
            return tlb.load_bytes(at + 3, len(data)), tlb.current_mm() == mm

    assert rig.cluster.run(by_bytes, rig.mm, at, data, cpus=[3]) == [(data, True)]
    assert rig.mm.read(at + 3, len(data)) == data


def test_a_fault_says_where_what_and_why(rig):
    at = rig.mm.mmap(PAGE, READ)
    none = rig.mm.mmap(PAGE, tlb.PROT_NONE)

    def task(mm):
        found = []
        tlb.use_mm(mm)
        for access in (
            lambda: tlb.store(at, 1),
            lambda: tlb.load(none),
            lambda: tlb.load(1 << 40),
            lambda: tlb.load(1 << 50),
            lambda: tlb.load_bytes(at + PAGE - 8, 16),
        ):
            try:
                access()
            except PageFaultError as error:
                error = pickle.loads(pickle.dumps(error))
                found.append((error.errno, error.address, error.access, error.si_code))
        tlb.unuse_mm()
        with pytest.raises(PageFaultError):
            tlb.load(at)
        return found

    assert rig.cluster.run(task, rig.mm, cpus=[0])[0] == [
        (14, at, "write", tlb.SEGV_ACCERR),
        (14, none, "read", tlb.SEGV_ACCERR),
        (14, 1 << 40, "read", tlb.SEGV_MAPERR),
        (14, 1 << 50, "read", tlb.SEGV_MAPERR),
        (14, at + PAGE, "read", tlb.SEGV_ACCERR),
    ]


def test_the_kernels_half_is_everybodys(rig):
    kernel = rig.tlb.init_mm
    at = kernel.mmap(2 * PAGE)
    kernel.write(at, b"\x05" + bytes(7))
    rig.begin(0)
    rig.begin(1, use=None)
    assert (rig.load(0, at), rig.load(1, at)) == (5, 5)
    kernel.munmap(at, 2 * PAGE)
    assert (rig.load(0, at), rig.load(1, at)) == (-1, -1)
    again = kernel.mmap(PAGE * 40)
    assert rig.load(0, again) == 0
    kernel.munmap(again, PAGE * 40)
    assert rig.load(0, again) == -1
    with pytest.raises(AddressSpaceError) as caught:
        kernel.exit_mmap()
    assert caught.value.errno == 16


# ---- shootdown -----------------------------------------------------------------------


def test_no_cpu_translates_through_what_munmap_took_away(rig):
    """row 68"""
    at = rig.mm.mmap(2 * PAGE)
    rig.begin(0, 1)
    assert (rig.load(0, at), rig.load(1, at)) == (0, 0)
    before = rig.cluster.counters()["irq_tlb"]
    rig.mm.munmap(at, 2 * PAGE)
    assert (rig.load(0, at), rig.load(1, at)) == (-1, -1)
    taken = rig.cluster.counters()["irq_tlb"] - before
    assert list(taken) == [1, 1, 0, 0], "counted where it was taken: the TLB row"
    lines = rig.cluster.interrupts().splitlines()
    (words,) = [line for line in lines if "TLB shootdown" in line]
    assert int(words.split()[1]) >= 1


def test_without_the_shootdown_the_old_entry_is_used(rig):
    """The TLB is a real one: what is not flushed is stale."""
    at = rig.mm.mmap(PAGE)
    rig.begin(0)
    rig.tell(0, STORE, at, 9)
    breaking(rig, "tlb.shootdown")
    rig.mm.munmap(at, PAGE)
    assert rig.load(0, at) == 9
    rig.cluster._machine.set_broken(0)
    rig.mm.flush_tlb()
    assert rig.load(0, at) == -1


def test_a_narrowing_mprotect_flushes_and_a_widening_one_does_not(rig):
    at = rig.mm.mmap(PAGE)
    rig.begin(0)
    assert rig.tell(0, STORE, at, 1) == 0
    before = rig.counts(0)
    rig.mm.mprotect(at, PAGE, READ)
    assert rig.change(0, before)["remote_flush_received"] == 1
    assert (rig.tell(0, STORE, at, 2), rig.load(0, at)) == (-2, 1)
    before = rig.counts(0)
    rig.mm.mprotect(at, PAGE, RW)
    assert "remote_flush_received" not in rig.change(0, before)
    assert rig.tell(0, STORE, at, 3) == 0, "the refused entry is looked up again"
    rig.mm.mprotect(at, PAGE, tlb.PROT_NONE)
    assert rig.load(0, at) == -2
    rig.mm.mprotect(at, PAGE, RW)
    assert rig.load(0, at) == 3


@pytest.mark.parametrize("pages", [33, 34])
def test_33_pages_are_flushed_one_by_one_and_34_all(rig, pages):
    """row 68"""
    rig.begin(0)
    before = rig.counts(0)
    rig.mm.flush_tlb_range(0, pages)
    name = "partial" if pages == 33 else "full"
    assert rig.change(0, before) == {"remote_flush_received": 1, name: 1}
    rig.tlb.single_page_flush_ceiling = pages if pages == 34 else 32
    before = rig.counts(0)
    rig.mm.flush_tlb_range(0, pages)
    other = "full" if pages == 33 else "partial"
    assert rig.change(0, before) == {"remote_flush_received": 1, other: 1}


def send(rig, cpu, start, generation, pages=1, mm=1):
    """A flush request as if from another CPU: struct flush_tlb_info."""
    info = struct.pack("<QQIHBB", start, generation, pages, mm, 0, 0)
    rig.cluster.smp.smp_call_function_single(
        cpu, smp.NativeHandler("flush_tlb_func"), info
    )


def test_a_flush_is_ranged_only_if_it_is_the_next_and_the_last(rig):
    """row 68: new == local + 1 == mm_gen, else all; new <= local: nothing."""
    rig.begin(0)
    mm = rig.counts(0)["mm"]
    at = rig.mm.mmap(2 * PAGE)
    rig.load(0, at)
    rig.load(0, at + PAGE)
    local = rig.counts(0)["tlb_gen"]
    assert local == rig.mm.state()["tlb_gen"]
    before = rig.counts(0)
    send(rig, 0, at, local, mm=mm)
    assert rig.change(0, before) == {"remote_flush_received": 1, "up_to_date": 1}
    # Generations that no request for has arrived yet.
    breaking(rig, "tlb.shootdown")
    for _ in range(3):
        rig.mm.flush_tlb_range(at, 1)
    rig.cluster._machine.set_broken(0)
    assert rig.counts(0)["tlb_gen"] == local
    before = rig.counts(0)
    send(rig, 0, at, local + 1, mm=mm)  # the next, and not the last: all at once
    assert rig.change(0, before) == {"remote_flush_received": 1, "full": 1}
    assert rig.counts(0)["tlb_gen"] == local + 3
    before = rig.counts(0)
    send(rig, 0, at, local + 2, mm=mm)  # overtaken by that
    send(rig, 0, at, local + 3, mm=mm)
    assert rig.change(0, before) == {"remote_flush_received": 2, "up_to_date": 2}
    # The last, and not the next: what came before was missed.
    breaking(rig, "tlb.shootdown")
    for _ in range(2):
        rig.mm.flush_tlb_range(at, 1)
    rig.cluster._machine.set_broken(0)
    before = rig.counts(0)
    send(rig, 0, at, local + 3, mm=mm)  # done, and the two since are not here yet
    assert rig.change(0, before) == {"remote_flush_received": 1, "up_to_date": 1}
    assert rig.counts(0)["tlb_gen"] == local + 3
    before = rig.counts(0)
    send(rig, 0, at, local + 5, mm=mm)
    assert rig.change(0, before) == {"remote_flush_received": 1, "full": 1}
    before = rig.counts(0)
    send(rig, 0, at, 0, mm=mm)  # of no generation, as of a batch: nothing is missing
    assert rig.change(0, before) == {"remote_flush_received": 1, "up_to_date": 1}


def test_a_lazy_cpu_is_skipped_and_catches_up_when_it_goes_on(rig):
    """row 68"""
    at, keep = rig.mm.mmap(PAGE), rig.mm.mmap(PAGE)
    rig.begin(0, 1)
    rig.load(0, at)
    rig.sleep(0)
    assert rig.counts(0)["is_lazy"] == 1
    before = rig.counts(0), rig.cluster.counters()["irq_tlb"]
    rig.mm.munmap(at, PAGE)  # its neighbour keeps the page table: none is freed
    assert rig.change(0, before[0]) == {}
    assert list(rig.cluster.counters()["irq_tlb"] - before[1]) == [0, 1, 0, 0]
    rig.rouse(0)
    assert rig.change(0, before[0]) == {"lazy_stale": 1}
    assert (rig.load(0, at), rig.load(0, keep)) == (-1, 0)
    before = rig.counts(0)
    rig.sleep(0)
    rig.rouse(0)
    assert rig.change(0, before) == {"lazy_fresh": 1}


def test_a_lazy_cpu_that_does_not_look_uses_the_old_entry(rig):
    at, keep = rig.mm.mmap(PAGE), rig.mm.mmap(PAGE)
    rig.begin(0)
    rig.tell(0, STORE, at, 5)
    rig.sleep(0)
    breaking(rig, "tlb.lazy")
    rig.mm.munmap(at, PAGE)
    rig.rouse(0)
    assert rig.load(0, at) == 5
    assert rig.load(0, keep) == 0


def test_freed_page_tables_reach_lazy_cpus_too(rig):
    at = rig.mm.mmap(PAGE)
    rig.begin(0)
    rig.load(0, at)
    rig.sleep(0)
    before = rig.counts(0)
    rig.mm.munmap(at, PAGE)  # the only page: its tables go, too
    change = rig.change(0, before)
    assert (change["remote_flush_received"], change["lazy_left"]) == (1, 1)
    rig.rouse(0)
    assert rig.load(0, at) == -1


def test_an_ended_task_leaves_its_cpu_lazy(rig):
    at = rig.mm.mmap(PAGE)

    def task(mm):
        tlb.use_mm(mm)
        return tlb.load(at)

    assert rig.cluster.run(task, rig.mm, cpus=[2]) == [0]
    rig.eventually(lambda: rig.counts(2)["is_lazy"])
    assert rig.counts(2)["mm"] == 0
    assert 2 in rig.mm.state()["cpumask"]


def test_a_cpu_between_two_address_spaces_is_waited_for(rig, background):
    """LOADED_MM_SWITCHING: it may have either's entries."""
    at, keep = rig.mm.mmap(PAGE), rig.mm.mmap(PAGE)
    rig.begin(1)
    rig.load(1, at)
    rig.mm.flush_tlb_range(at, 1)  # once in a second all of the mask are sent to
    machine = rig.cluster._machine
    pid = rig.cluster.cpus[1].pid
    machine.arm_step(1, "switch_mm", _core.STEP_STOP)
    try:
        rig.order(1, USE, 1)
        rig.eventually(lambda: machine.tlb_state(1)["loaded_mm"] == 0xFFFF)
        rig.eventually(lambda: is_stopped(pid))  # else SIGCONT could come before
        unmap = background(rig.mm.munmap, at, PAGE)
        time.sleep(0.1)
        assert unmap.is_alive(), "it is asked, and has not answered"
    finally:
        os.kill(pid, signal.SIGCONT)
    unmap.end()
    rig.eventually(lambda: not rig.orders[1, 0])
    assert rig.counts(1)["loaded_mm"] not in (0xFFFF, 1)
    assert rig.load(1, keep) == -1, "it is in the other one"


def test_who_has_gone_to_another_mm_leaves_the_mask(rig):
    at, _ = rig.mm.mmap(PAGE), rig.mm.mmap(PAGE)
    rig.begin(0, 1)
    rig.load(0, at)
    rig.tell(0, USE, 1)
    assert rig.mm.state()["cpumask"] == [0, 1]
    before = rig.counts(0)
    rig.mm.flush_tlb_page(at)  # trims once a second, and the first time
    assert rig.change(0, before) == {"remote_flush_received": 1, "wrong_mm": 1}
    assert rig.mm.state()["cpumask"] == [1]
    rig.mm.flush_tlb_page(at)
    assert rig.change(0, before) == {"remote_flush_received": 1, "wrong_mm": 1}
    rig.tell(0, USE, 0)
    assert rig.load(0, at) == 0


def test_entries_outlive_a_visit_elsewhere_unless_something_changed(rig):
    at, second = rig.mm.mmap(PAGE), rig.mm.mmap(PAGE)
    rig.begin(0)
    rig.load(0, at)
    before = rig.counts(0)
    rig.tell(0, USE, 1)
    rig.tell(0, USE, 0)
    rig.load(0, at)
    assert "walks" not in rig.change(0, before)
    rig.tell(0, USE, 1)
    rig.mm.munmap(at, PAGE)
    rig.tell(0, USE, 0)
    assert (rig.load(0, at), rig.load(0, second)) == (-1, 0)


def test_a_page_is_used_again_only_when_all_have_flushed(rig, background):
    at, _ = rig.mm.mmap(PAGE), rig.mm.mmap(PAGE)
    rig.begin(0)
    rig.tell(0, STORE, at, 77)
    rig.tell(0, IRQS_OFF, 1)
    before = rig.tlb.memory_state()
    unmap = background(rig.mm.munmap, at, PAGE)
    rig.eventually(lambda: rig.tlb.memory_state()["limbo"] == 1)
    assert rig.tlb.memory_state()["free"] == before["free"]
    # Nothing was promised yet, and it is still its own page that is read.
    other = rig.other.mmap(8 * PAGE)
    rig.other.write(other, b"\xff" * 8 * PAGE)
    assert rig.load(0, at) == 77
    assert unmap.is_alive()
    rig.tell(0, IRQS_OFF, 0)
    unmap.end()
    assert rig.load(0, at) == -1
    assert rig.tlb.memory_state()["limbo"] == 0


def test_who_waits_for_page_tables_does_not_blame_for_his_own_stop(rig, background):
    """His limit is time in which he could look, not what a clock says after it."""
    _, unmap = rig.munmap_that_waits_for(0, background)
    (stopped,) = rig.cluster.start(rig.mm.mmap, PAGE, cpus=[1])
    (waits,) = rig.cluster.start(rig.mm.mmap, PAGE, cpus=[2])
    time.sleep(0.2)
    pid = rig.cluster.cpus[1].pid
    os.kill(pid, signal.SIGSTOP)
    try:
        with pytest.raises(RemoteCallError, match=r"Timeout.*the host in slot"):
            waits.result(30)
        rig.tell(0, IRQS_OFF, 0)
        unmap.end()
    finally:
        os.kill(pid, signal.SIGCONT)
    rig.mm.munmap(stopped.result(10), PAGE)


def test_a_munmap_that_was_interrupted_keeps_its_page_until_the_next(rig):
    at, second = rig.mm.mmap(PAGE), rig.mm.mmap(PAGE)
    rig.begin(0, 1)
    rig.load(0, at)
    rig.tell(0, IRQS_OFF, 1)

    def unmap(mm):
        mm.munmap(at, PAGE)

    (task,) = rig.cluster.start(unmap, rig.mm, cpus=[2])
    rig.eventually(lambda: rig.tlb.memory_state()["limbo"] == 1)
    assert task.cancel()
    with contextlib.suppress(Exception):
        task.result(5)
    assert rig.tlb.memory_state()["limbo"] == 1
    rig.tell(0, IRQS_OFF, 0)
    rig.mm.mprotect(second, PAGE, READ)
    assert rig.load(0, at) == -1
    rig.mm.munmap(second, PAGE)
    assert rig.tlb.memory_state()["limbo"] == 0


def test_a_cpu_that_was_offline_comes_back_without_its_entries(rig):
    at, _ = rig.mm.mmap(PAGE), rig.mm.mmap(PAGE)
    kernel = rig.tlb.init_mm.mmap(PAGE)
    rig.begin(3)
    assert (rig.load(3, at), rig.load(3, kernel)) == (0, 0)
    rig.cluster.offline(3)
    rig.mm.munmap(at, PAGE)
    rig.tlb.init_mm.munmap(kernel, PAGE)
    rig.cluster.online(3)
    before = rig.counts(3)
    assert (rig.load(3, at), rig.load(3, kernel)) == (-1, -1)
    assert rig.change(3, before)["was_offline"] == 1


def test_tlb_remove_table_sync_one_interrupts_everybody(rig):
    before = rig.cluster.counters()["native_run"]
    rig.tlb.tlb_remove_table_sync_one()
    assert list(rig.cluster.counters()["native_run"] - before) == [1, 1, 1, 1]


def test_many_page_tables_need_one_interrupt_of_all(rig):
    before = rig.tlb.tlb_state(0)["table_sync"], rig.tlb.memory_state()
    host = rig.cluster._machine.id
    synced = rig.cluster._machine.tlb_state(host)["table_sync"]
    for _ in range(21):  # three tables each
        at = rig.mm.mmap(PAGE)
        rig.mm.munmap(at, PAGE)
    assert rig.cluster._machine.tlb_state(host)["table_sync"] == synced
    assert rig.tlb.memory_state()["waiting"] == 63 + before[1]["waiting"]
    rig.mm.munmap(rig.mm.mmap(PAGE), PAGE)
    assert rig.cluster._machine.tlb_state(host)["table_sync"] == synced + 1
    assert rig.tlb.memory_state()["waiting"] == 0


# ---- batches -------------------------------------------------------------------------


def test_many_unmaps_need_one_flush(rig):
    """row 69"""
    pages = [rig.mm.mmap(PAGE) for _ in range(12)]
    rig.begin(0)
    for at in pages:
        rig.load(0, at)
    before = rig.counts(0), rig.tlb.memory_state()["free"]
    for at in pages[:10]:
        assert rig.mm.try_to_unmap(at, PAGE) == 1
    assert rig.change(0, before[0]) == {}
    assert rig.load(0, pages[0]) == 0, "until the flush it may be used"
    state = rig.mm.state()
    assert (state["pending"], state["flushed"]) == (10, 0)
    assert rig.tlb.memory_state()["free"] == before[1]
    assert rig.tlb.try_to_unmap_flush() == 10
    assert rig.change(0, before[0])["remote_flush_received"] == 1
    assert [rig.load(0, at) for at in pages] == [-1] * 10 + [0] * 2
    assert rig.tlb.memory_state()["free"] == before[1] + 10
    assert rig.tlb.try_to_unmap_flush() == 0


def test_pending_that_is_not_flushed_forces_munmap_to_flush(rig):
    """row 69: flush_tlb_batched_pending()"""
    at, _ = rig.mm.mmap(PAGE), rig.mm.mmap(PAGE)
    rig.begin(0)
    rig.tell(0, STORE, at, 4)
    rig.mm.try_to_unmap(at, PAGE)
    rig.mm.munmap(at, PAGE)  # finds nothing in the page tables
    assert rig.load(0, at) == -1
    state = rig.mm.state()
    assert (state["pending"], state["flushed"]) == (1, 1)
    before = rig.counts(0)
    rig.mm.munmap(at, PAGE)
    assert rig.change(0, before) == {}, "flushed already"
    rig.tlb.try_to_unmap_flush()
    again = rig.mm.mmap(PAGE, address=at)
    rig.tell(0, STORE, again, 6)
    rig.mm.try_to_unmap(at, PAGE)
    breaking(rig, "tlb.batched")
    rig.mm.munmap(at, PAGE)
    assert rig.load(0, at) == 6, "without the rule"
    rig.cluster._machine.set_broken(0)
    rig.tlb.try_to_unmap_flush()


# ---- deaths --------------------------------------------------------------------------


@pytest.mark.parametrize("step", ["unmap", "unmap_free"])
def test_a_cpu_killed_in_munmap_leaves_nothing_that_hangs(rig, step):
    at, _ = rig.mm.mmap(4 * PAGE), rig.mm.mmap(PAGE)
    rig.begin(0)
    rig.tell(0, STORE, at, 3)
    found = rig.tlb.memory_state()["torn_found"]
    rig.cluster._machine.arm_step(1, step, _core.STEP_KILL)

    def unmap(mm):
        mm.munmap(at, 4 * PAGE)

    with pytest.raises(CpuDiedError):
        rig.cluster.run(unmap, rig.mm, cpus=[1], timeout=5)
    state = rig.tlb.memory_state()
    assert state["limbo"] == 4
    second = rig.mm.mmap(PAGE)
    assert rig.load(0, at) == -1
    state = rig.tlb.memory_state()
    assert (state["limbo"], state["pages"]) == (0, 2)
    assert state["torn_found"] == found + 1
    assert rig.load(0, second) == 0
    rig.cluster.online(1)


def test_what_a_dead_cpu_had_in_its_batch_is_flushed_and_freed(rig):
    at, _ = rig.mm.mmap(2 * PAGE), rig.mm.mmap(PAGE)
    rig.begin(0)
    rig.tell(0, STORE, at, 8)
    before = rig.tlb.memory_state()

    def leave(mm):
        mm.try_to_unmap(at, 2 * PAGE)
        os.kill(os.getpid(), signal.SIGKILL)

    with pytest.raises(CpuDiedError):
        rig.cluster.run(leave, rig.mm, cpus=[1], timeout=5)
    assert rig.tlb.memory_state()["held"] == 2
    assert rig.tlb.reclaim() >= 2
    assert rig.load(0, at) == -1
    state = rig.tlb.memory_state()
    assert state["held"] == 0
    assert state["frames_found"] >= before["frames_found"] + 2
    rig.cluster.online(1)


def test_a_cpu_that_dies_in_a_flush_is_not_waited_for(rig, background):
    at, unmap = rig.munmap_that_waits_for(1, background)
    os.kill(rig.cluster.cpus[1].pid, signal.SIGKILL)
    unmap.end()
    assert rig.tlb.memory_state()["limbo"] == 0
    rig.eventually(lambda: rig.cluster.cpus[1].state == "dead")
    rig.tasks.pop(1)
    rig.cluster.online(1)
    rig.begin(1)
    assert rig.load(1, at) == -1


# ---- bad input -----------------------------------------------------------------------


def test_refusals_have_the_kernels_errno_and_change_nothing(rig):
    mm = rig.mm
    at = mm.mmap(2 * PAGE)
    before = rig.tlb.memory_state(), mm.state()["tlb_gen"]

    def refused(function, *args, **kwargs):
        with pytest.raises(AddressSpaceError) as caught:
            function(*args, **kwargs)
        return caught.value.errno

    einval, enomem, eexist = 22, 12, 17
    assert refused(mm.mmap, 0) == einval
    assert refused(mm.mmap, PAGE, 8) == einval
    assert refused(mm.mmap, PAGE, address=at + 1) == einval
    assert refused(mm.mmap, PAGE, address=0) == einval
    assert refused(mm.mmap, 2 * PAGE, address=at + PAGE) == eexist
    assert refused(mm.mmap, PAGE, address=1 << 47) == enomem
    assert refused(mm.mmap, 1 << 46) == enomem
    assert refused(mm.mmap, 5000 * PAGE) == enomem
    assert refused(mm.mmap, -1) == einval
    assert refused(mm.munmap, at + 1, PAGE) == einval
    assert refused(mm.munmap, at, 0) == einval
    assert refused(mm.munmap, 1 << 47, PAGE) == einval
    assert refused(mm.munmap, at, 1 << 63) == einval
    assert refused(mm.mprotect, at + 8, PAGE, READ) == einval
    assert refused(mm.mprotect, at, 3 * PAGE, READ) == enomem
    assert refused(mm.mprotect, at, PAGE, 16) == einval
    assert refused(mm.flush_tlb_range, 5, 1) == einval
    assert (rig.tlb.memory_state(), mm.state()["tlb_gen"]) == before
    mm.write(at, b"x")  # the rights are as they were
    mm.munmap(at + 16 * PAGE, PAGE)  # nothing there: munmap() returns 0
    with pytest.raises(PageFaultError) as caught:
        mm.read(at + 2 * PAGE - 2, 4)
    assert caught.value.address == at + 2 * PAGE
    assert refused(setattr, rig.tlb, "single_page_flush_ceiling", -1) == einval


def test_an_address_space_in_use_stays_and_a_gone_one_is_gone(rig):
    gone = rig.tlb.mm("gone")
    gone.mmap(5 * PAGE)
    free = rig.tlb.memory_state()["free"]

    def task(mm):
        tlb.use_mm(mm)
        try:
            mm.exit_mmap()
        except AddressSpaceError as error:
            return error.errno
        return 0

    assert rig.cluster.run(task, gone, cpus=[0]) == [16]
    rig.cluster.run(int)
    gone.exit_mmap()
    rig.tlb.reclaim()
    assert rig.tlb.memory_state()["free"] >= free + 6
    for call in (gone.state, lambda: gone.mmap(PAGE), gone.exit_mmap):
        with pytest.raises(AddressSpaceError) as caught:
            call()
        assert caught.value.errno == 3
    assert rig.tlb.mm("gone") != gone
    rig.tlb.mm("gone").exit_mmap()


def test_only_tasks_with_interrupts_change_and_use_address_spaces(rig):
    def off(mm):
        smp.local_irq_disable()
        try:
            mm.mmap(PAGE)
        finally:
            smp.local_irq_enable()

    with pytest.raises(RemoteCallError) as caught:
        rig.cluster.run(off, rig.mm, cpus=[0])
    assert isinstance(caught.value.__cause__, ClusterStateError)
    with pytest.raises(RemoteCallError) as caught:
        rig.cluster.call(0, tlb.use_mm, rig.mm)
    assert isinstance(caught.value.__cause__, ClusterStateError)
    with pytest.raises(ClusterStateError, match="host"):
        tlb.load(0)


def test_a_machine_without_address_spaces_says_so(boot):
    cluster = boot(2)
    for call in (lambda: tlb.memory_state(), lambda: tlb.load(0), lambda: tlb.mm("a")):
        with pytest.raises(RemoteCallError) as caught:
            cluster.run(call, cpus=[0])
        assert isinstance(caught.value.__cause__, ClusterStateError)
        assert "cluster.users.tlb" in str(caught.value.__cause__)
