"""Block requests complete on the CPU that has submitted them, once."""

import errno
import os
import signal
import time

import pytest

from shmipi import smp
from shmipi.errors import SteeringError
from shmipi.users import blk


@pytest.fixture
def device(cluster):
    """The block device of the module's machine."""
    device = cluster.users.blk
    device.set()
    yield device
    device.set()


def grown(after, before):
    return type(after)(*(b - a for a, b in zip(before, after, strict=True)))


def submit(count):
    return [blk.submit(number) for number in range(count)]


def complete(tags):
    return [blk.complete(tag) for tag in tags]


def test_a_request_completes_on_the_cpu_that_has_submitted_it(
    cluster, device, eventually
):
    before = device.stats(1)
    tags = cluster.call(1, submit, 5)
    assert cluster.call(1, blk.end) == []
    assert cluster.call(0, complete, tags) == [False] * 5
    eventually(lambda: device.stats(1).completed == before.completed + 5)
    done = cluster.call(1, blk.end)
    assert sorted(done) == [(tag, number, 1) for number, tag in enumerate(tags)]
    assert device.stats().wrong == 0


def stuck(tags):
    """Complete them while their CPU takes no interrupts: how many IPIs?"""
    from shmipi import _core

    before = _core.current_machine().blk_counts(0)[5]
    complete(tags)
    return _core.current_machine().blk_counts(0)[5] - before


def masked(go):
    smp.local_irq_disable()
    go[0] = 1
    end = time.monotonic() + 20
    while go[0] == 1 and time.monotonic() < end:
        pass
    smp.local_irq_enable()


def test_one_ipi_for_all_that_wait(cluster, device, eventually):
    """llist_add says that the list was empty: blk_mq_complete_send_ipi."""
    tags = cluster.call(1, submit, 20)
    go = cluster.shared("go", "i8", 1)
    go[0] = 0
    task = cluster.start(masked, go, cpus=[1])
    eventually(lambda: go[0] == 1)
    try:
        assert cluster.call(0, stuck, tags) == 1
    finally:
        go[0] = 2
    task.results()
    eventually(lambda: device.stats(1).waiting == 0)
    assert len(cluster.call(1, blk.end)) == 20


@pytest.mark.parametrize(
    ("flags", "where"), [(0, 0), (blk.QUEUE_FLAG_SAME_COMP | 2, 1)]
)
def test_the_queues_flags_say_where(cluster, device, eventually, flags, where):
    device.set(flags)
    tags = cluster.call(1, submit, 3)
    assert cluster.call(0, complete, tags) == [where == 0] * 3
    eventually(lambda: device.stats(1).waiting == 0)
    assert {one.cpu for one in cluster.call(1, blk.end)} == {where}
    assert device.stats().wrong == 0


def test_with_one_hardware_queue_the_softirq_completes(cluster, device, eventually):
    """blk_mq_raise_softirq: not in the interrupt itself."""
    device.set(0, 1)
    tags = cluster.call(1, submit, 3)
    assert cluster.call(0, complete, tags) == [False] * 3
    eventually(lambda: device.stats(1).waiting == 0)
    assert {one.cpu for one in cluster.call(1, blk.end)} == {0}


def test_where_its_cpu_is_offline_it_completes_here(cluster, device, eventually):
    tags = cluster.call(1, submit, 2)
    cluster.offline(1)
    try:
        before = device.stats(1).reported
        assert cluster.call(0, complete, tags) == [True] * 2
        assert device.stats(1).reported == before + 2
    finally:
        cluster.online(1)
    assert device.stats().wrong == 0
    assert cluster.call(1, blk.end) == []


def test_a_request_completes_once(cluster, device, eventually):
    tags = cluster.call(1, submit, 1)
    cluster.call(0, complete, tags)
    with pytest.raises(Exception, match="already in progress") as caught:
        cluster.call(2, complete, tags)
    assert caught.value.__cause__.errno == errno.EALREADY
    eventually(lambda: device.stats(1).waiting == 0)
    assert len(cluster.call(1, blk.end)) == 1
    assert device.stats().doubles == 0


def test_tags_are_as_many_as_there_are(cluster, device, eventually):
    tags = cluster.call(1, submit, 66)
    assert tags.count(None) == 2
    assert len({tag for tag in tags if tag is not None}) == 64
    cluster.call(0, complete, tags[:64])
    eventually(lambda: device.stats(1).waiting == 0)
    assert len(cluster.call(1, blk.end)) == 64


def test_what_it_refuses(cluster, device):
    for flags, queues in ((4, 1), (-1, 1), (0, 0)):
        with pytest.raises(SteeringError) as caught:
            device.set(flags, queues)
        assert caught.value.errno == errno.EINVAL
    with pytest.raises(Exception, match="request 1000000") as remote:
        cluster.call(1, blk.complete, 1000000)
    assert remote.value.__cause__.errno == errno.EINVAL


def forever():
    while True:
        blk.generate(20)


def rest():
    while blk.interrupt() + len(blk.end()):
        pass


@pytest.mark.parametrize("victim", [0, 1])
def test_requests_of_a_killed_cpu_complete_and_are_reported(boot, victim, eventually):
    """In the midst of submitting and completing, ten times."""
    cluster = boot(3)
    device = cluster.users.blk
    for _ in range(10):
        before = [device.stats(cpu).submitted for cpu in range(3)]
        tasks = [cluster.start(forever, cpus=[cpu]) for cpu in range(3)]
        for cpu in range(3):
            enough = before[cpu] + 40  # 10 times 3 of them are more than 1000
            eventually(lambda c=cpu, n=enough: device.stats(c).submitted > n, 30)
        os.kill(cluster.cpus[victim].pid, signal.SIGKILL)
        while cluster.cpus[victim].state != "dead":
            time.sleep(0.001)
        cluster.online(victim)
        for task in tasks:
            task.cancel()
            task.wait()
    cluster.run(rest)
    eventually(lambda: device.stats().in_flight + device.stats().waiting == 0)
    stats = device.stats()
    assert (stats.wrong, stats.doubles) == (0, 0)
    assert stats.submitted > 1000
    before = device.stats()
    cluster.run(blk.generate, 10)
    assert grown(device.stats(), before).completed > 0
