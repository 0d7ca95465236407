"""membarrier(): who is interrupted, what is refused, and what it is good for."""

import contextlib
import errno
import os
import time

import numpy as np
import pytest

import shmipi
from shmipi import AddressSpaceError, ClusterStateError, RemoteCallError, smp
from shmipi.users import membarrier as mb
from shmipi.users import rcu, tlb
from shmipi.users.membarrier import membarrier

QUERY, GLOBAL = mb.MEMBARRIER_CMD_QUERY, mb.MEMBARRIER_CMD_GLOBAL
PRIVATE = mb.MEMBARRIER_CMD_PRIVATE_EXPEDITED
REGISTER = mb.MEMBARRIER_CMD_REGISTER_PRIVATE_EXPEDITED
CORE = mb.MEMBARRIER_CMD_PRIVATE_EXPEDITED_SYNC_CORE
REGISTER_CORE = mb.MEMBARRIER_CMD_REGISTER_PRIVATE_EXPEDITED_SYNC_CORE
RSEQ = mb.MEMBARRIER_CMD_PRIVATE_EXPEDITED_RSEQ
REGISTER_RSEQ = mb.MEMBARRIER_CMD_REGISTER_PRIVATE_EXPEDITED_RSEQ
EVERYWHERE = mb.MEMBARRIER_CMD_GLOBAL_EXPEDITED
REGISTER_EVERYWHERE = mb.MEMBARRIER_CMD_REGISTER_GLOBAL_EXPEDITED
FLAG_CPU = mb.MEMBARRIER_CMD_FLAG_CPU


def stay(mm):
    """Task: be in an address space until the host says go."""
    if mm is not None:
        tlb.use_mm(mm)
    shmipi.percpu("there")[smp.smp_processor_id()] = 1
    end = time.monotonic() + 20
    while not shmipi.shared("go")[0] and time.monotonic() < end:
        time.sleep(0.0005)


class Rig:
    def __init__(self, cluster, eventually):
        self.cluster, self.eventually = cluster, eventually
        self.mm, self.other = (cluster.users.tlb.mm(name) for name in "ab")
        self.there = cluster.percpu("there", "i8")
        self.go = cluster.shared("go", "i8", 1)
        self.there[:] = self.go[:] = 0
        self.tasks = []

    def begin(self, cpu, mm):
        self.tasks.append(self.cluster.start(stay, mm, cpus=[cpu]))
        self.eventually(lambda: self.there[cpu])

    def do(self, *calls, mm="a", cpu=0):
        """Make calls in a task that uses the address space; what they return."""
        handle = {"a": self.mm, "b": self.other, None: None}[mm]

        def task(mm):
            if mm is not None:
                tlb.use_mm(mm)
            out = []
            for call in calls:
                try:
                    out.append(membarrier(*call))
                except AddressSpaceError as error:
                    out.append(-error.errno)
            return out

        return self.cluster.run(task, handle, cpus=[cpu])[0]

    def interrupted(self, *calls, **where):
        """The CPUs that ran a native handler for the last of the calls."""
        self.do(*calls[:-1], **where)
        before = self.cluster.counters()["native_run"].copy()
        assert self.do(calls[-1], **where) == [0]
        return list(self.cluster.counters()["native_run"] - before)

    def end(self):
        self.go[0] = 1
        for tasks in self.tasks:
            with contextlib.suppress(Exception):
                tasks.wait(5)
        self.cluster.run(int)
        self.mm.exit_mmap()
        self.other.exit_mmap()


@pytest.fixture
def rig(cluster, eventually):
    made = Rig(cluster, eventually)
    yield made
    made.end()


def test_unregistered_is_eperm_and_bad_flags_are_einval(rig):
    """row 71"""
    assert rig.do((PRIVATE,), (CORE,), (RSEQ,)) == [-errno.EPERM] * 3
    flags = (PRIVATE, 1), (QUERY, 1), (RSEQ, 2), (REGISTER, FLAG_CPU)
    assert rig.do(*flags, (1 << 20,), (3,), (-1,)) == [-errno.EINVAL] * 7
    assert rig.do((GLOBAL,)) == [-errno.EINVAL], "there is no RCU in it"
    assert rig.do((REGISTER,), (REGISTER,), (PRIVATE,), (CORE,)) == [
        0,
        0,
        0,
        -errno.EPERM,
    ]
    assert rig.do((PRIVATE,), mm="b") == [-errno.EPERM], "each mm for itself"
    assert rig.do((PRIVATE,), (REGISTER,), mm=None) == [-errno.ESRCH] * 2


def test_query_names_the_commands_and_get_registrations_what_was_registered(rig):
    (known,) = rig.do((QUERY,))
    for command in (PRIVATE, REGISTER, CORE, RSEQ, EVERYWHERE, REGISTER_EVERYWHERE):
        assert known & command
    assert not known & GLOBAL
    get = mb.MEMBARRIER_CMD_GET_REGISTRATIONS
    assert rig.do((get,), (REGISTER_EVERYWHERE,), (get,), (REGISTER_RSEQ,), (get,)) == [
        0,
        0,
        REGISTER_EVERYWHERE,
        0,
        REGISTER_EVERYWHERE | REGISTER | REGISTER_RSEQ,
    ]


def test_only_cpus_that_run_the_mm_are_interrupted_and_not_the_caller(rig):
    """row 71"""
    rig.begin(1, rig.mm)
    rig.begin(2, rig.other)
    assert rig.interrupted((REGISTER,), (PRIVATE,)) == [0, 1, 0]
    assert rig.interrupted((REGISTER_RSEQ,), (RSEQ,)) == [0, 1, 0]


def test_sync_core_includes_the_caller(rig):
    """Another task of the mm may run there next; the other commands leave it out."""
    rig.begin(1, rig.mm)

    def synced():
        states = [rig.cluster.users.tlb.tlb_state(cpu) for cpu in range(3)]
        return np.array([state["sync_core"] for state in states])

    seen, before = synced(), rig.cluster.counters()["native_run"].copy()
    assert rig.do((REGISTER_CORE,), (CORE,)) == [0, 0]
    # The registration's and the command's; the caller's part is no interrupt.
    assert list(rig.cluster.counters()["native_run"] - before) == [0, 2, 0]
    assert list(synced() - seen) == [1, 1, 0]
    assert rig.do((REGISTER,), (PRIVATE,), (REGISTER_RSEQ,), (RSEQ,)) == [0] * 4
    assert list(synced() - seen) == [1, 1, 0]


@pytest.mark.parametrize("alone", ["user", "cpu"])
def test_with_one_user_or_one_cpu_nothing_is_done(rig, alone):
    """mm_users == 1 || num_online_cpus() == 1: not even to the CPU that is named."""
    word = rig.cluster.shared("word", "u8", 1)

    def commits(mm):
        tlb.use_mm(mm)
        assert membarrier(REGISTER_RSEQ) == 0
        begun = mb.rseq_begin()
        assert membarrier(RSEQ, FLAG_CPU, smp.smp_processor_id()) == 0
        return mb.rseq_commit(begun, word, 6)

    rig.begin(1, rig.other if alone == "user" else rig.mm)
    if alone == "cpu":
        assert rig.cluster.run(commits, rig.mm, cpus=[0]) == [False]
        rig.cluster.offline(1)
        rig.cluster.offline(2)
    try:
        assert rig.cluster.run(commits, rig.mm, cpus=[0]) == [True]
    finally:
        rig.cluster.online(1)
        rig.cluster.online(2)


def test_one_user_needs_no_interrupt_but_for_sync_core(rig):
    rig.begin(1, rig.other)
    assert rig.interrupted((REGISTER,), (PRIVATE,)) == [0, 0, 0]
    assert rig.do((REGISTER_CORE,), (CORE,)) == [0, 0]


def test_global_expedited_reaches_registered_address_spaces_only(rig):
    """row 71"""
    rig.begin(1, rig.mm)
    rig.begin(2, rig.other)
    assert rig.interrupted((EVERYWHERE,)) == [0, 0, 0]
    assert rig.interrupted((REGISTER_EVERYWHERE,), (EVERYWHERE,)) == [0, 1, 0]
    assert rig.interrupted((REGISTER_EVERYWHERE,), (EVERYWHERE,), mm="b") == [0, 1, 1]


def test_flag_cpu_interrupts_that_one_and_is_silent_where_it_runs_something_else(rig):
    rig.begin(1, rig.mm)
    rig.begin(2, rig.other)
    rig.do((REGISTER_RSEQ,))
    assert rig.interrupted((RSEQ, FLAG_CPU, 1)) == [0, 1, 0]
    assert rig.interrupted((RSEQ, FLAG_CPU, 2)) == [0, 0, 0]
    assert rig.interrupted((RSEQ, FLAG_CPU, 99)) == [0, 0, 0]
    assert rig.interrupted((RSEQ, FLAG_CPU, -5)) == [0, 0, 0]


def test_a_restartable_sequence_is_ended_by_the_rseq_command(rig):
    word = rig.cluster.shared("word", "u8", 1)

    def task(mm):
        tlb.use_mm(mm)
        begun = mb.rseq_begin()
        first = mb.rseq_commit(begun, word, 5)
        shmipi.percpu("there")[1] = 1
        while shmipi.shared("go")[0] == 0:
            time.sleep(0.0005)
        return first, mb.rseq_commit(begun, word, 6), int(word[0])

    (tasks,) = rig.cluster.start(task, rig.mm, cpus=[1])
    rig.eventually(lambda: rig.there[1])
    assert rig.do((REGISTER_RSEQ,), (RSEQ,)) == [0, 0]
    rig.go[0] = 1
    assert tasks.result(5) == (True, False, 5)


def test_a_sequence_does_not_commit_when_its_cpu_was_offline_meanwhile(rig):
    """The barrier passes an offline CPU by: its task was preempted to go there."""
    word = rig.cluster.shared("word", "u8", 1)
    word[0] = 0

    def task(mm):
        tlb.use_mm(mm)
        begun = mb.rseq_begin()
        shmipi.percpu("there")[1] = 1
        end = time.monotonic() + 20
        while shmipi.shared("go")[0] == 0 and time.monotonic() < end:
            time.sleep(0.0005)
        return mb.rseq_commit(begun, word, 6), int(word[0])

    (tasks,) = rig.cluster.start(task, rig.mm, cpus=[1])
    rig.eventually(lambda: rig.there[1])
    rig.cluster.offline(1)
    assert rig.do((REGISTER_RSEQ,), (RSEQ,)) == [0, 0]
    rig.cluster.online(1)
    rig.go[0] = 1
    assert tasks.result(5) == (False, 0)


def test_membarrier_is_for_tasks_with_interrupts(rig):
    with pytest.raises(ClusterStateError):
        membarrier(QUERY)
    with pytest.raises(RemoteCallError) as caught:
        rig.cluster.call(0, membarrier, QUERY)
    assert isinstance(caught.value.__cause__, ClusterStateError)


@pytest.mark.skipif(os.cpu_count() == 1, reason="needs two cores")
def test_the_store_buffer_shows_0_0_without_membarrier_and_never_with_it(rig):
    """row 71"""
    words = rig.cluster.shared("litmus", "u8", mb.LITMUS_WORDS)

    def fast(mm, rounds):
        tlb.use_mm(mm)
        return mb.store_buffer(words, rounds, slow=False)

    def slow(mm, rounds, barrier):
        tlb.use_mm(mm)
        membarrier(REGISTER)
        return mb.store_buffer(words, rounds, slow=True, cmd=PRIVATE if barrier else 0)

    def both(rounds, barrier):
        words[:] = 0
        first = rig.cluster.start(fast, rig.mm, rounds, cpus=[0])
        done, zero = rig.cluster.run(slow, rig.mm, rounds, barrier, cpus=[1])[0]
        first.wait(5)
        return done, zero

    end = time.monotonic() + 10
    seen = 0
    while not seen and time.monotonic() < end:
        seen += both(50_000, False)[1]
    assert seen, "a full barrier on one side alone is not enough: it is not seen here"
    done, zero = 0, 0
    while done < 2000 and time.monotonic() < end + 10:
        more = both(2000, True)
        done, zero = done + more[0], zero + more[1]
    assert done
    assert zero == 0


def reads_for_a_while():
    rcu.rcu_read_lock()
    shmipi.percpu("there")[smp.smp_processor_id()] = 1
    end = time.monotonic() + 0.2
    while time.monotonic() < end:
        pass
    shmipi.percpu("there")[smp.smp_processor_id()] = 2
    rcu.rcu_read_unlock()


def passes(cpu):
    membarrier(GLOBAL)
    return int(shmipi.percpu("there")[cpu])


def test_global_is_a_grace_period_of_rcu_where_no_cpu_is_isolated(boot, eventually):
    """synchronize_rcu(), or EINVAL if tick_nohz_full_enabled().  row 71"""
    with boot(3, idle="halt") as cluster:
        there = cluster.percpu("there", "i8")
        assert cluster.users.rcu
        known = cluster.run(membarrier, QUERY, cpus=[0])
        assert known[0] & GLOBAL
        reader = cluster.start(reads_for_a_while, cpus=[1])
        eventually(lambda: there[1])
        assert cluster.run(passes, 1, cpus=[0]) == [2], "it waits for who reads"
        reader.results()
        cluster.users.nohz.tick_nohz_full_setup("2")
        assert not cluster.run(membarrier, QUERY, cpus=[0])[0] & GLOBAL
        with pytest.raises(RemoteCallError) as raised:
            cluster.run(membarrier, GLOBAL, cpus=[0])
        assert raised.value.__cause__.errno == errno.EINVAL
