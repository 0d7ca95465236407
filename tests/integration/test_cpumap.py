"""cpumap: bounded rings between CPUs, that lose no packet and count each."""

import errno
import os
import signal
import time

import pytest

import shmipi
from shmipi import _core, smp
from shmipi.errors import ArenaFullError, ClusterStateError, SteeringError
from shmipi.users import cpumap


@pytest.fixture
def made(cluster, request):
    """A map of the module's machine with an entry for CPU 1."""
    made = cluster.users.cpumap.create(request.node.name[:60])
    made.update_elem(1, 192)
    yield made
    for cpu in range(3):
        made.delete_elem(cpu)


def settled(made, seconds=10.0):
    """Wait until nothing is queued; what was handed in is accounted for."""
    start = time.monotonic()
    while True:  # a ring and the bulks before it are not read at one moment
        stats = made.stats
        ended = stats.delivered + stats.dropped + stats.died
        if not stats.queued and stats.in_ == ended:
            return stats
        assert time.monotonic() - start < seconds, stats
        time.sleep(0.001)


def hand_in(made, cpu, count, flush=True):
    for number in range(count):
        assert made.enqueue(cpu, 77, number)
    return made.flush() if flush else made.stats


def test_packets_go_through_a_ring_and_a_thread_of_the_other_cpu(cluster, made):
    """A bounded ring and a wake-up: row 74."""
    assert cluster.call(0, hand_in, made, 1, 20) == 1
    stats = settled(made)
    assert (stats.in_, stats.delivered, stats.dropped) == (20, 20, 0)
    assert stats.entries == 1


def test_a_bulk_of_eight_goes_into_the_ring_and_the_flush_wakes_once(
    cluster, made, eventually
):
    eventually(lambda: made.stats.sleeps)  # its thread, which is woken when it is made
    before = cluster.call(0, hand_in, made, 1, 8, False)
    assert before.flushes == 0  # CPU_MAP_BULK_SIZE
    before = cluster.call(0, hand_in, made, 1, 1, False)
    assert (before.flushes, before.wakes, before.delivered) == (1, 0, 0)
    before = cluster.call(0, hand_in, made, 1, 7, False)
    assert (before.flushes, before.queued) == (1, 16)  # nobody was woken: in the ring
    assert cluster.call(0, hand_in, made, 1, 0) == 1
    stats = settled(made)
    assert (stats.flushes, stats.wakes, stats.delivered) == (2, 1, 16)
    assert (
        cluster.call(0, hand_in, made, 1, 0) == 0
    )  # nothing to flush: nobody is woken


def flood(made, count):
    """More than the ring has room for, while its thread cannot run."""
    for number in range(count):
        made.enqueue(1, 9, number)
    made.flush()
    return made.stats


def busy(words):
    """Keep interrupts disabled until told to stop."""
    smp.local_irq_disable()
    words[0] = 1
    end = time.monotonic() + 30
    while not words[1] and time.monotonic() < end:
        pass
    smp.local_irq_enable()


@pytest.fixture
def busy_cpu(cluster, eventually):
    """CPU 1 has interrupts disabled; `busy_cpu()` ends it."""
    words = cluster.shared("busy", "i8", 2)
    words[:] = 0
    task = cluster.start(busy, words, cpus=[1])
    eventually(lambda: words[0])

    def end():
        words[1] = 1
        task.results()

    yield end
    words[1] = 1


def test_a_full_ring_drops_and_counts(cluster, made, busy_cpu):
    """A full ring's policy is to drop and say so: row 75."""
    made.update_elem(1, 24)
    stats = cluster.call(0, flood, made, 100)
    busy_cpu()
    assert stats.dropped >= 100 - 24 - 8
    stats = settled(made)
    assert stats.dropped + stats.delivered == stats.in_ == 100


def test_what_update_refuses_is_what_the_kernel_refuses(cluster, made):
    def refused(code, cpu, qsize, flags=cpumap.BPF_ANY):
        with pytest.raises(SteeringError) as caught:
            made.update_elem(cpu, qsize, flags)
        assert caught.value.errno == code
        assert isinstance(caught.value, (OSError, ValueError))
        assert made.lookup_elem(1) == 192  # nothing half done

    refused(errno.EOVERFLOW, 1, 16385)
    refused(errno.E2BIG, 3, 64)
    refused(errno.EEXIST, 1, 64, cpumap.BPF_NOEXIST)
    refused(errno.EINVAL, 1, 64, 3)
    refused(errno.EINVAL, 1, -1)
    # The order of the checks is the kernel's too.
    refused(errno.E2BIG, 3, 16385, cpumap.BPF_NOEXIST)
    refused(errno.EEXIST, 1, 16385, cpumap.BPF_NOEXIST)
    with pytest.raises(SteeringError) as caught:
        made.delete_elem(3)
    assert caught.value.errno == errno.EINVAL
    made.update_elem(0, 16384)
    assert made.lookup_elem(0) == 16384
    made.update_elem(0, 0)  # as deleting
    assert made.lookup_elem(0) is None
    assert made.lookup_elem(7) is None
    for most, code in ((0, errno.EINVAL), (4, errno.E2BIG)):
        with pytest.raises(SteeringError) as caught:
            cluster.users.cpumap.create("bad", most)
        assert caught.value.errno == code
    with pytest.raises(ClusterStateError, match="no CPU"):
        made.enqueue(1, 5)


def test_an_entry_more_costs_one_array_more(cluster, monkeypatch):
    """Not a look at all that there are: hundreds of CPUs have hundreds of entries."""
    made = cluster.users.cpumap.create("grows")
    names, make = [], made._home.make

    def counted(kind, name, *rest):
        names.append(name)
        return make(kind, name, *rest)

    monkeypatch.setattr(made._home, "make", counted)
    for _ in range(8):
        made._add(64)
    assert len(names) == len(set(names)) == 8


def redirect_to_nobody(made):
    return made.enqueue(2, 5), made.generate(2, 5, 10), made.flush()


def test_a_cpu_without_an_entry_gets_nothing(cluster, made):
    assert cluster.call(0, redirect_to_nobody, made) == (False, 0, 0)
    assert made.stats.in_ == 0


def load(made, seconds):
    end = time.monotonic() + seconds
    done = made.generate(1, smp.smp_processor_id() + 100, 64)
    while time.monotonic() < end:
        done += made.generate(1, smp.smp_processor_id() + 100, 64)
    return done


def load_until(made, stop):
    done = 0
    while not stop[0]:
        done += made.generate(1, smp.smp_processor_id() + 100, 64)
    return done


def test_replacing_and_deleting_under_load_drains(cluster, made, eventually):
    """No packet is lost or doubled while its entry is replaced; no thread is left."""
    stop = cluster.shared("load.stop", "i8", 1)
    stop[0] = 0
    tasks = cluster.start(load_until, made, stop, cpus=[0, 2])
    try:
        eventually(lambda: made.stats.in_ > 1000, 30)
        for number in range(100):
            made.update_elem(1, 64 << number % 3)
            time.sleep(0.002)
        made.delete_elem(1)
    finally:
        stop[0] = 1
    handed_in = sum(tasks.results())
    eventually(lambda: made.stats.entries == 0)
    stats = settled(made)
    assert stats.in_ == handed_in > 1000
    assert stats.died == 0
    for cpu in (0, 2):
        flow = cluster.users.cpumap.flow(cpu + 100)
        assert flow.doubles == 0


def test_packets_of_a_sender_stay_in_order(cluster, made):
    before = cluster.users.cpumap.flow(100)
    handed_in = cluster.call(0, load, made, 0.2)
    stats = settled(made)
    flow = cluster.users.cpumap.flow(100)
    assert stats.in_ == handed_in
    assert (flow.disorder, flow.doubles) == (before.disorder, before.doubles)
    assert flow.delivered == before.delivered + stats.delivered


def hold(made):
    """Use all packets of this CPU up."""
    count = 0
    try:
        while made.enqueue(1, 3):
            count += 1
            if count % 64 == 0:
                made.flush()
    except ArenaFullError as error:
        made.flush()
        return error.errno, count
    return 0, count


def test_a_cpu_that_has_no_packet_left_is_told(cluster, made, busy_cpu):
    made.update_elem(1, 16384)
    refused = cluster._machine.net_nobufs(0)
    code, count = cluster.call(0, hold, made)
    assert (code, count) == (errno.ENOBUFS, 4096)
    assert cluster._machine.net_nobufs(0) == refused + 1
    busy_cpu()
    settled(made)


def forever(made, cpu):
    while True:
        made.generate(cpu, 50 + smp.smp_processor_id(), 512)


@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_cpu_leaves_an_account_and_a_ring_that_goes_on(boot, victim):
    """Killed in the midst of handing in or of delivering, ten times."""
    cluster = boot(3)
    made = cluster.users.cpumap.create("death")
    made.update_elem(1, 256)
    for _ in range(10):
        task = cluster.start(forever, made, 1, cpus=[0])
        other = cluster.start(forever, made, 1, cpus=[2])
        time.sleep(0.02)
        os.kill(cluster.cpus[victim].pid, signal.SIGKILL)
        while cluster.cpus[victim].state != "dead":
            time.sleep(0.001)
        cluster.online(victim)
        for one in (task, other):
            one.cancel()
            one.wait()
    before = settled(made)
    cluster.call(0, load, made, 0.05)
    stats = settled(made)
    assert stats.delivered > before.delivered
    for cpu in (0, 2):
        assert cluster.users.cpumap.flow(50 + cpu).doubles == 0


def test_a_map_is_found_by_name_and_travels(cluster, made):
    def found(name, other):
        here = cpumap.cpu_map(name)
        return here.lookup_elem(1), other.lookup_elem(1), here.name

    assert cluster.call(2, found, made.name, made) == (192, 192, made.name)
    with pytest.raises(
        shmipi.RemoteCallError, match=r"users\.cpumap\.create"
    ) as caught:
        cluster.call(2, cpumap.cpu_map, "none of these")
    assert isinstance(caught.value.__cause__, KeyError)


def through(broken):
    """Boot two CPUs with a rule off, let a load go through, and look what is left."""
    rules = [f"{user}.{rule}" for user, rule, _, _ in _core.RULES]
    with shmipi.Cluster(2) as cluster:
        made = cluster.users.cpumap.create("rule")
        made.update_elem(1, 64)
        machine = cluster._machine
        machine.set_broken(1 << rules.index(broken))
        words = cluster.shared("busy", "i8", 2)
        task = cluster.start(busy, words, cpus=[1])
        while not words[0]:
            time.sleep(0.001)
        cluster.call(0, hand_in, made, 1, 20)  # in the ring, its thread held off
        made.update_elem(1, 64)
        words[1] = 1
        task.results()
        end = time.monotonic() + 10
        while made.stats.entries > 1:  # the old thread has ended
            assert time.monotonic() < end
            time.sleep(0.001)
        stats = made.stats
        return stats.in_ - stats.delivered - stats.dropped - stats.died


@pytest.mark.parametrize("rule", ["cpumap.drain"])
def test_without_its_rule_packets_are_left(rule):
    assert through(rule) > 0


# ---- programs ------------------------------------------------------------------------

FLOW = 1234


def verdict_of(data):
    """Of each eight: 4 pass, 2 are dropped, 1 goes to CPU 2, 1 has it raise."""
    return (2, 2, 1, 2, 4, 2, 1, 0)[data % 8]


def program(flow, data):
    log = shmipi.shared("xdp")
    assert flow == FLOW
    log[0] += 1
    log[1] |= not (smp.in_softirq() and smp.in_task() and not smp.irqs_disabled())
    log[2] |= smp.smp_processor_id() != 1 or log[3] != data
    log[3] = data + 1
    verdict = verdict_of(data)
    if verdict == cpumap.XDP_ABORTED:
        raise ArithmeticError("no")
    if verdict == cpumap.XDP_REDIRECT:
        return cpumap.bpf_redirect_map(cpumap.cpu_map("programs"), 2)
    return verdict


def hand_in_flow(made, count, first=0):
    for number in range(first, first + count):
        assert made.enqueue(1, FLOW, number)
        if number % 64 == 63:
            made.flush()
    return made.flush()


@pytest.fixture
def programs(cluster):
    made = cluster.users.cpumap.create("programs")
    log = cluster.shared("xdp", "i8", 4)
    log[:] = 0
    yield made, log
    for cpu in range(3):
        made.delete_elem(cpu)


def verdicts(made, before=None):
    now = made.stats
    row = (now.xdp_pass, now.xdp_drop, now.xdp_redirect, now.xdp_aborted)
    if before is None:
        return row
    return tuple(n - m for n, m in zip(row, before, strict=True))


@pytest.mark.parametrize("runs", [False, True], ids=["idle", "on top of a task"])
def test_a_program_runs_on_each_packet_in_the_entrys_thread(cluster, programs, runs):
    """cpu_map_bpf_prog_run: PASS, DROP, REDIRECT, and what raises is ABORTED."""
    made, log = programs
    made.update_elem(1, 192, prog=program)
    made.update_elem(2, 192)
    stop = cluster.shared("xdp.stop", "i8", 1)
    stop[0] = 0
    task = cluster.start(until, stop, cpus=[1]) if runs else None
    before, was = verdicts(made), made.stats
    cluster.run(hand_in_flow, made, 160, cpus=[0])
    stats = settled(made)
    stop[0] = 1
    if task:
        task.results()
    assert verdicts(made, before) == (80, 40, 20, 20)
    assert list(log) == [160, 0, 0, 160]
    assert stats.in_ - was.in_ == 160 + 20  # redirected: handed in once more
    assert stats.delivered - was.delivered == 80 + 20 + 20
    assert stats.dropped - was.dropped == 40 + 20
    assert stats.died == was.died


def until(stop):
    while not stop[0]:
        pass


def test_a_redirect_to_nobody_and_a_wrong_verdict(cluster, programs):
    """bpf_redirect_map() returns its flags; an unknown action is ABORTED, and said."""
    made, _ = programs
    made.update_elem(1, 192, prog=astray)
    before, said = verdicts(made), int(cluster.counters()["unraisable"][1])
    cluster.run(hand_in_flow, made, 40, cpus=[0])
    settled(made)
    assert verdicts(made, before) == (10, 10, 0, 20)
    assert cluster.counters()["unraisable"][1] == said + 20


def astray(flow, data):
    nobody = cpumap.bpf_redirect_map(cpumap.cpu_map("programs"), 0, cpumap.XDP_DROP)
    return (cpumap.XDP_PASS, nobody, 3, cpumap.XDP_REDIRECT)[data % 4]


def test_a_program_is_replaced_with_its_entry(cluster, programs):
    """Whose ring is drained by its own program; and then there is none."""
    made, log = programs
    made.update_elem(1, 192, prog=program)
    cluster.run(hand_in_flow, made, 32, cpus=[0])
    made.update_elem(1, 192, prog=lambda flow, data: cpumap.XDP_DROP)
    before = settled(made)
    cluster.run(hand_in_flow, made, 32, 32, cpus=[0])
    now = settled(made)
    assert (now.dropped - before.dropped, log[0]) == (32, 32)
    made.update_elem(1, 192)
    cluster.run(hand_in_flow, made, 32, cpus=[0])
    assert settled(made).delivered - now.delivered == 32
    assert log[0] == 32


def deadly(flow, data):
    if data == 20:
        os.kill(os.getpid(), signal.SIGKILL)
    return cpumap.XDP_PASS if data % 2 else cpumap.XDP_DROP


def test_a_packet_whose_program_dies_is_counted_as_died(cluster, programs, eventually):
    made, _ = programs
    made.update_elem(1, 192, prog=deadly)
    before = made.stats
    cluster.run(hand_in_flow, made, 40, cpus=[0])
    eventually(lambda: cluster.cpus[1].state == "dead")
    cluster.online(1)  # the thread begins again
    now = settled(made)
    assert now.died - before.died == 1
    assert now.delivered - before.delivered == 20
    assert now.dropped - before.dropped == 19


def large(blob):
    return lambda flow, data: len(blob)


def test_bad_programs_are_refused(programs):
    made, _ = programs
    with pytest.raises(TypeError, match="prog is 5"):
        made.update_elem(1, 192, prog=5)
    with pytest.raises(ArenaFullError, match="16384 bytes") as got:
        made.update_elem(1, 192, prog=large(os.urandom(20000)))
    assert got.value.errno == errno.E2BIG
    assert made.lookup_elem(1) is None
