"""RPS and RFS: which CPU a packet goes to, its backlog, and the IPIs between them."""

import contextlib
import errno
import os
import signal
import sys
import time

import numpy as np
import pytest

import shmipi
from shmipi import smp
from shmipi.errors import ClusterStateError, SteeringError
from shmipi.users import rps
from shmipi.users.rps import NET_RX_DROP, NET_RX_SUCCESS

HASH = 0x80000001  # with two CPUs in the map: the second


@pytest.fixture
def steer(cluster):
    """RPS of the module's machine, to CPU 1."""
    steer = cluster.users.rps
    steer.set_map([1])
    yield steer
    steer.set_map([])
    steer.set_sock_flow_entries(0)
    steer.set_flow_cnt(0)
    steer.set_max_backlog(1000)
    steer.set_weight(64)
    steer.set_budget(300)
    steer.set_flow_limit([])
    steer.sockets(False)
    settled(steer)


def settled(steer, seconds=10.0):
    start = time.monotonic()
    while True:  # CPU by CPU: what a dead one leaves may go behind the look's back
        stats = steer.stats()
        ended = stats.delivered + stats.dropped + stats.died
        if not stats.queued and stats.in_ == ended:
            return stats
        assert time.monotonic() - start < seconds, stats
        time.sleep(0.001)


def grown(after, before):
    return type(after)(*(b - a for a, b in zip(before, after, strict=True)))


def no_interrupts(turn):
    """Task: take none, from when it says so until it is told."""
    smp.local_irq_disable()
    turn[0] = 1
    end = time.monotonic() + 30
    while not turn[1] and time.monotonic() < end:
        pass
    smp.local_irq_enable()


@contextlib.contextmanager
def busy(cluster, cpu):
    """The CPU takes no interrupts meanwhile: its backlog is not emptied."""
    turn = cluster.shared("busy", "i8", 2)
    turn[:] = 0
    task = cluster.start(no_interrupts, turn, cpus=[cpu])
    try:
        end = time.monotonic() + 20
        while not turn[0]:
            assert time.monotonic() < end, "the task does not begin"
            time.sleep(0.001)
        yield
    finally:
        turn[1] = 1
    task.results()


def hand_in(count, hash=HASH, receive=False):
    function = rps.netif_receive_skb if receive else rps.netif_rx
    return [function(hash) for _ in range(count)]


def test_a_protocol_in_python_gets_the_packets_in_the_softirq(cluster, steer):
    """netif_receive_skb's ptype: on the CPU that they were steered to, in order, each
    once; on an idle one, on top of a task, and directly."""
    log = cluster.shared("protocol", "i8", 2048)

    def protocol(packets):
        log = shmipi.shared("protocol")
        log[1] |= not smp.in_serving_softirq() or len(packets) > 64
        for hash, data in packets:
            log[2 + log[0]] = (smp.smp_processor_id() << 32) + data
            log[0] += 1
            log[1] |= hash != HASH

    def hand_in_numbered(count, receive):
        function = rps.netif_receive_skb if receive else rps.netif_rx
        for number in range(count):
            assert function(HASH, number) == NET_RX_SUCCESS

    def spin(log):
        while log[0] < 300:
            pass

    def arrived(cpu, count):
        settled(steer)
        end = time.monotonic() + 10
        while log[0] < count and time.monotonic() < end:
            time.sleep(0.001)
        assert log[0] == count
        assert log[1] == 0
        assert (log[2 : 2 + count] == (cpu << 32) + np.arange(count)).all()
        log[:] = 0

    log[:] = 0
    steer.dev_add_pack(protocol)
    try:
        before = steer.stats(1)
        cluster.run(hand_in_numbered, 300, False, cpus=[0])
        arrived(1, 300)
        task = cluster.start(spin, log, cpus=[1])
        cluster.run(hand_in_numbered, 300, False, cpus=[0])
        task.results(10)
        arrived(1, 300)
        assert grown(steer.stats(1), before).delivered == 600
        steer.set_map([])
        cluster.run(hand_in_numbered, 200, True, cpus=[2])
        arrived(2, 200)
    finally:
        steer.dev_remove_pack()
    steer.set_map([1])
    cluster.run(hand_in_numbered, 50, False, cpus=[0])
    settled(steer)
    assert log[0] == 0


def test_a_protocol_that_raises_gets_the_packets_that_follow(cluster, steer):
    """Those that were delivered before it raised, and that nothing follows."""
    log = cluster.shared("test.raised", "i8", 2)

    def protocol(packets):
        log[0] += len(packets)
        log[1] += 1
        raise ValueError("what the protocol says itself")

    def hand_in(count):
        sys.unraisablehook = lambda unraisable: None
        smp.local_bh_disable()  # one softirq for all
        for number in range(count):
            assert rps.netif_receive_skb(HASH, number) == NET_RX_SUCCESS
        smp.local_bh_enable()

    with pytest.raises(TypeError, match="not callable"):
        steer.dev_add_pack(None)
    log[:] = 0
    steer.set_map([])
    steer.dev_add_pack(protocol)
    try:
        cluster.run(hand_in, 200, cpus=[2])
        end = time.monotonic() + 5
        while log[0] < 200 and time.monotonic() < end:
            time.sleep(0.001)
    finally:
        steer.dev_remove_pack()
    assert log[0] == 200
    assert log[1] >= 4  # 64 at most


# ---- get_rps_cpu -----------------------------------------------------------------


def test_a_map_alone_steers_by_the_hash_of_the_flow(cluster, steer):
    """reciprocal_scale(hash, map->len): row 73."""
    steer.set_map([0, 2])
    assert [steer.get_rps_cpu(hash) for hash in (1, 0x7FFFFFFF)] == [0, 0]
    assert [steer.get_rps_cpu(hash) for hash in (0x80000000, 0xFFFFFFFF)] == [2, 2]
    assert steer.get_rps_cpu(0) == -1  # no hash, no flow
    steer.set_map([])
    assert steer.get_rps_cpu(HASH) == -1


def test_a_cpu_that_is_offline_is_not_steered_to(cluster, steer):
    cluster.offline(1)
    try:
        assert steer.get_rps_cpu(HASH) == -1
    finally:
        cluster.online(1)
    assert steer.get_rps_cpu(HASH) == 1


def test_without_a_cpu_to_steer_to_netif_rx_queues_and_receive_delivers(cluster, steer):
    """get_rps_cpu < 0: this CPU's backlog, or at once."""
    steer.set_map([])

    def at_once(receive):
        smp.local_irq_disable()  # no softirq runs meanwhile
        before = _counts()
        hand_in(1, receive=receive)
        after = _counts()
        smp.local_irq_enable()
        return after[1] - before[1], after[4] - before[4]

    def _counts():
        from shmipi import _core

        return _core.current_machine().rps_counts(0)

    assert cluster.run(at_once, False, cpus=[0]) == [(0, 1)]
    settled(steer)
    assert cluster.run(at_once, True, cpus=[0]) == [(1, 0)]


def rfs(steer, cpu):
    steer.set_sock_flow_entries(256)
    steer.set_flow_cnt(256)
    steer.record(HASH, cpu)


def test_two_flow_tables_steer_to_where_the_flow_is_read(cluster, steer):
    """RFS: rps_sock_flow_table and rps_dev_flow_table."""
    steer.set_sock_flow_entries(256)
    steer.record(HASH, 2)
    assert steer.get_rps_cpu(HASH) == 1  # one table alone: RPS
    steer.set_flow_cnt(256)
    assert steer.get_rps_cpu(HASH) == 2
    assert (
        steer.get_rps_cpu(HASH ^ 0x100) == 1
    )  # another flow, the same entry: no match
    steer.record(HASH, 0)
    assert steer.get_rps_cpu(HASH) == 0  # nothing is queued on CPU 2: moved at once


def queue_and_ask(cpu):
    """Hand in a packet, record another CPU for its flow: where would the next go?"""
    from shmipi import _core

    machine = _core.current_machine()
    rps.netif_rx(HASH)
    machine.rps_record(HASH, cpu)
    return machine.rps_cpu(HASH)


@pytest.mark.parametrize("start", [0, 2**31 - 1, 2**32 - 1])
def test_a_flow_moves_when_its_packets_have_left_the_old_backlog(cluster, steer, start):
    """(int)(head - last_qtail) >= 0, also where the counts come round."""
    rfs(steer, 2)
    for cpu in (0, 2):
        assert cluster._machine.rps_set_count(cpu, start) == 0
    with busy(cluster, 2):
        assert cluster.call(0, queue_and_ask, 0) == 2  # it has one there that waits
    settled(steer)
    assert steer.get_rps_cpu(HASH) == 0


def test_what_the_map_has_sent_is_not_what_a_flow_waits_for(cluster, steer):
    """last_qtail is of what the tables have sent: and that is no fault of the order."""
    hash, before = 0x80000123, steer.flow(0x80000123)
    rfs(steer, 2)
    steer.set_max_backlog(10)
    with busy(cluster, 1):
        # By the map to 1; by the tables to 1, which is full; to 2.
        for cpu in (None, 1, 2):
            if cpu is not None:
                steer.record(hash, cpu)
            cluster.run(rps.generate, hash, 20, cpus=[0])
        assert steer.stats(1).queued == 11
    settled(steer)
    after = steer.flow(hash)
    assert after.sent - before.sent == 60
    assert after.delivered > before.delivered
    assert (after.disorder, after.doubles) == (before.disorder, before.doubles)


def test_a_flow_moves_at_once_from_a_cpu_that_is_offline(cluster, steer):
    rfs(steer, 2)
    assert steer.get_rps_cpu(HASH) == 2
    cluster.run(rps.generate, HASH, 5, cpus=[0])
    settled(steer)
    cluster.offline(2)
    try:
        # As if its queue had not come so far: nobody waits for it.
        assert cluster._machine.rps_set_count(2, 0) == 0
        steer.record(HASH, 0)
        assert steer.get_rps_cpu(HASH) == 0
    finally:
        cluster.online(2)


def test_reading_is_what_rfs_follows(cluster, steer):
    rfs(steer, 1)
    steer.sockets()
    cluster.call(0, hand_in, 3)
    settled(steer)
    assert cluster.call(1, rps.recv) == [(HASH, 0)] * 3
    steer.record(HASH, 2)
    cluster.call(0, hand_in, 1)
    settled(steer)
    assert cluster.call(2, rps.recv) == [(HASH, 0)]


# ---- enqueue_to_backlog ----------------------------------------------------------


def test_a_backlog_takes_one_packet_more_than_its_limit(cluster, steer):
    """qlen <= max_backlog is looked at before the packet is queued."""
    steer.set_max_backlog(10)
    with busy(cluster, 1):
        before = steer.stats()
        got = cluster.call(0, hand_in, 20)
        assert got == [NET_RX_SUCCESS] * 11 + [NET_RX_DROP] * 9
    after = grown(settled(steer), before)
    assert (after.in_, after.delivered, after.dropped) == (20, 11, 9)


def test_one_ipi_until_the_backlog_is_empty(cluster, steer):
    """One for each 0 to 1 of NAPI_STATE_SCHED: row 73."""
    before = steer.stats()
    with busy(cluster, 1):
        cluster.call(0, hand_in, 50)
        cluster.call(2, hand_in, 50)
    settled(steer)
    cluster.run(int)  # a task begins when the softirqs have ended, and have counted
    after = grown(steer.stats(), before)
    assert (after.delivered, after.ipis, after.received_rps) == (100, 1, 1)
    cluster.call(0, hand_in, 1)
    settled(steer)
    cluster.run(int)
    assert grown(steer.stats(), before).ipis == 2


def poll(steps):
    """A driver's poll, BH off: how many IPIs were sent before it ended, and after."""
    from shmipi import _core

    machine = _core.current_machine()
    before = machine.rps_counts(0)[5]
    _core.local_bh_disable()
    for hash in steps:
        rps.netif_rx(hash)
    inside = machine.rps_counts(0)[5] - before
    _core.local_bh_enable()
    return inside, machine.rps_counts(0)[5] - before


def test_ipis_of_a_poll_are_sent_together_when_it_ends(cluster, steer):
    """net_rps_send_ipi at the end of net_rx_action, one for each CPU."""
    steer.set_map([1, 2])
    assert cluster.run(poll, [1, 0x80000001] * 8, cpus=[0]) == [(0, 2)]
    settled(steer)


def test_a_softirq_that_runs_out_of_budget_goes_on(cluster, steer):
    steer.set_weight(4)
    steer.set_budget(8)
    before = steer.stats(1)
    with busy(cluster, 1):
        cluster.call(0, hand_in, 100)
    settled(steer)
    after = grown(steer.stats(1), before)
    assert (after.delivered, after.processed) == (100, 100)
    assert after.time_squeeze >= 100 // 8 - 1


def test_the_flow_limit_drops_of_the_flow_that_fills_the_backlog(cluster, steer):
    """skb_flow_limit: more than half of the last 128 packets, the backlog half full."""
    steer.set_flow_limit([0])
    with busy(cluster, 1):
        before = steer.stats()
        large = cluster.call(0, hand_in, 600)
        small = cluster.call(0, hand_in, 3, 0x90000007)
    after = grown(settled(steer), before)
    assert large == [NET_RX_SUCCESS] * (500 + 64) + [NET_RX_DROP] * 36
    assert after.flow_limited == after.dropped == 36
    assert small == [NET_RX_SUCCESS] * 3


def test_settings_that_the_kernel_refuses(cluster, steer):
    def refused(code, function, *args):
        with pytest.raises(SteeringError) as caught:
            function(*args)
        assert caught.value.errno == code

    refused(errno.EINVAL, steer.set_flow_limit_table_len, 0)
    refused(errno.EINVAL, steer.set_flow_limit_table_len, 3)
    refused(errno.EINVAL, steer.set_sock_flow_entries, -1)
    refused(errno.EINVAL, steer.set_sock_flow_entries, 4097)
    refused(errno.EINVAL, steer.set_flow_cnt, 1 << 30)
    refused(errno.EINVAL, steer.set_weight, 0)
    refused(errno.EINVAL, steer.set_max_backlog, 1001)
    refused(errno.ENXIO, steer.set_map, [1, 3])
    assert steer.get_rps_cpu(HASH) == 1  # nothing half done
    # What the kernel takes: 0 is none, and what is no power of two is rounded up.
    rfs(steer, 2)
    steer.set_sock_flow_entries(3)
    steer.record(HASH, 2)
    assert steer.get_rps_cpu(HASH) == 2
    steer.set_sock_flow_entries(0)
    assert steer.get_rps_cpu(HASH) == 1
    with pytest.raises(ClusterStateError, match="no CPU"):
        cluster._machine.netif_rx(1, 2, 0)


# ---- CPUs that go ----------------------------------------------------------------


def test_what_a_cpu_leaves_that_is_taken_offline_goes_to_others(cluster, steer):
    """dev_cpu_dead, after a takedown in order."""
    cluster.offline(1)
    cluster.online(1)
    cluster.call(0, hand_in, 5)
    stats = settled(steer)
    assert stats.died == 0


def stuck(begun):
    smp.local_irq_disable()
    begun[0] = 1
    while True:
        pass


@pytest.mark.parametrize("count", [1, 500])
def test_the_backlog_of_a_killed_cpu_is_queued_anew(boot, count, eventually):
    """dev_cpu_dead for kill -9: nothing is lost but what the dead had in hand."""
    cluster = boot(3)
    steer = cluster.users.rps
    steer.set_map([1])
    begun = cluster.shared("begun", "i8", 1)
    task = cluster.start(stuck, begun, cpus=[1])
    eventually(lambda: begun[0])
    cluster.call(0, hand_in, count)
    assert steer.stats(1).queued == count
    os.kill(cluster.cpus[1].pid, signal.SIGKILL)
    eventually(lambda: cluster.cpus[1].state == "dead")
    stats = settled(steer)
    assert (stats.delivered, stats.requeued, stats.died) == (count, count, 0)
    task.wait()
    cluster.online(1)
    cluster.call(0, hand_in, 7)
    assert settled(steer).delivered == count + 7


def hold_the_ipi(turn):
    """A poll's end with the IPI not sent yet, until the host says go."""
    smp.local_bh_disable()
    rps.netif_rx(1)
    turn[0] = 1
    end = time.monotonic() + 20
    while turn[0] != 2 and time.monotonic() < end:
        pass
    smp.local_bh_enable()


@pytest.mark.parametrize("dies", [True, False])
def test_no_ipi_is_sent_to_a_cpu_that_has_gone(boot, eventually, dies):
    """net_rps_send_ipi: cpu_online(remsd->cpu), when the list is sent."""
    cluster = boot(3)
    steer = cluster.users.rps
    steer.set_map([1])
    turn = cluster.shared("turn", "i8", 1)
    holder = cluster.start(hold_the_ipi, turn, cpus=[0])
    eventually(lambda: turn[0] == 1)
    if dies:
        os.kill(cluster.cpus[1].pid, signal.SIGKILL)
        eventually(lambda: cluster.cpus[1].state == "dead")
    turn[0] = 2
    holder.results()
    assert steer.stats(0).ipis == (0 if dies else 1)
    settled(steer)


def forever():
    while True:
        rps.generate(smp.smp_processor_id() * 16 + 1, 256, 8)


@pytest.mark.parametrize("victim", [0, 1])
def test_kills_in_the_midst_of_it_leave_an_account(boot, victim):
    cluster = boot(3)
    steer = cluster.users.rps
    steer.set_map([0, 1, 2])
    steer.set_max_backlog(300)
    for _ in range(10):
        tasks = [cluster.start(forever, cpus=[cpu]) for cpu in (0, 2)]
        time.sleep(0.02)
        os.kill(cluster.cpus[victim].pid, signal.SIGKILL)
        while cluster.cpus[victim].state != "dead":
            time.sleep(0.001)
        cluster.online(victim)
        for task in tasks:
            task.cancel()
            task.wait()
    settled(steer)
    for cpu in (0, 2):
        for hash in range(cpu * 16 + 1, cpu * 16 + 9):
            flow = steer.flow(hash)
            assert (flow.disorder, flow.doubles) == (0, 0), flow


def test_flows_stay_in_order_while_their_readers_move(cluster, steer):
    """Per-flow order is what the rule of RFS is for: row 73."""
    rfs(steer, 1)
    steer.set_map([0, 1, 2])
    before = [steer.flow(hash) for hash in range(201, 209)]
    enough = sum(flow.sent for flow in before) + 1000
    stop = cluster.shared("stop", "i8", 1)
    stop[0] = 0
    tasks = cluster.start(_load, stop, cpus=[0])
    start = time.monotonic()
    number = 0
    while (took := time.monotonic() - start) < 0.4 or (
        took < 30 and sum(steer.flow(hash).sent for hash in range(201, 209)) <= enough
    ):
        for _ in range(100):
            number += 1
            steer.record(201 + number % 8, number // 8 % 3)
    stop[0] = 1
    tasks.results()
    settled(steer)
    after = [steer.flow(hash) for hash in range(201, 209)]
    assert sum(flow.sent for flow in after) > enough
    assert [(f.disorder, f.doubles) for f in after] == [
        (f.disorder, f.doubles) for f in before
    ]


def _load(stop):
    while not stop[0]:
        rps.generate(201, 64, 8)
