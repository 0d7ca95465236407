"""Code that is replaced while CPUs run it."""

import os
import signal
import time
from functools import partial

import pytest

from shmipi import (
    AddressSpaceError,
    ArenaFullError,
    ClusterStateError,
    CpuDiedError,
    IpiDeadlockError,
    RemoteCallError,
    _core,
    smp,
)
from shmipi.users import icache


def number(n, *_):
    return n


@pytest.fixture
def text(cluster):
    """A function of the table, back to returning 0."""
    table = cluster.users.icache
    try:
        found = table.text("f")
    except KeyError:
        found = table.define("f", partial(number, 0))
    cluster._machine.set_broken(0)
    found.text_poke(partial(number, 0))
    return found


def breaking(cluster, rule):
    index = [f"{user}.{name}" for user, name, *_ in _core.RULES].index(rule)
    cluster._machine.set_broken(1 << index)


def test_a_replaced_function_runs_everywhere_when_the_call_has_returned(cluster, text):
    assert cluster.run(text) == [0, 0, 0]
    before = cluster.users.icache.cpu_state(1)
    assert cluster.run(text) == [0, 0, 0]
    assert cluster.users.icache.cpu_state(1) == before, "it is cached"
    text.text_poke(partial(number, 1))
    assert cluster.run(text) == [1, 1, 1]
    assert cluster.users.icache.cpu_state(1)["fetches"] == before["fetches"] + 1

    def poke(text):
        text.text_poke(partial(number, 2))
        return text()

    assert cluster.run(poke, text, cpus=[1]) == [2]
    assert cluster.call(2, text) == 2, "in a handler, too"


def test_without_the_flush_the_old_function_runs(cluster, text):
    assert cluster.run(text) == [0, 0, 0]
    breaking(cluster, "icache.ipi")
    text.text_poke(partial(number, 7))
    assert cluster.run(text) == [0, 0, 0]
    cluster._machine.set_broken(0)
    text.text_poke(partial(number, 8))
    assert cluster.run(text) == [8, 8, 8]


def long(flag):
    flag[0] = 1
    while flag[0] == 1:
        time.sleep(0.0005)
    flag[0] = 3
    return "old"


def test_a_call_that_began_before_is_waited_for(cluster, text, background, eventually):
    flag = cluster.shared("flag", "i8", 1)
    flag[0] = 0
    text.text_poke(long)
    (task,) = cluster.start(text, flag, cpus=[1])
    eventually(lambda: flag[0])
    flushes = cluster.users.icache.cpu_state(2)["flushes"]
    poke = background(text.text_poke, partial(number, 5))
    eventually(lambda: cluster.users.icache.cpu_state(2)["flushes"] > flushes)
    time.sleep(0.05)
    assert poke.is_alive()
    assert cluster.run(text, cpus=[2]) == [5], "later calls run the new one meanwhile"
    flag[0] = 2
    poke.end()
    assert flag[0] == 3
    assert task.result(5) == "old"


def test_a_dead_cpus_call_is_not_waited_for(cluster, text, background, eventually):
    flag = cluster.shared("flag", "i8", 1)
    flag[0] = 0
    text.text_poke(long)
    (task,) = cluster.start(text, flag, cpus=[1])
    eventually(lambda: flag[0])
    poke = background(text.text_poke, partial(number, 5))
    os.kill(cluster.cpus[1].pid, signal.SIGKILL)
    poke.end()
    with pytest.raises(CpuDiedError):
        task.result(5)
    cluster.online(1)
    assert cluster.run(text) == [5, 5, 5]


def test_native_functions_are_replaced_by_and_for_python_ones(cluster, text):
    n = cluster.shared("n", "u8", 1)
    n[0] = 0
    text.text_poke(smp.NativeHandler("count"))
    assert cluster.run(text, n) == [None] * 3
    assert n[0] == 3
    text.text_poke(smp.NativeHandler("noop"))
    assert cluster.run(text) == [None] * 3
    assert n[0] == 3
    text.text_poke(partial(number, 4))
    assert cluster.run(text) == [4, 4, 4]


def test_an_offline_cpu_comes_back_to_the_new_function(cluster, text):
    assert cluster.run(text) == [0, 0, 0]
    cluster.offline(2)
    text.text_poke(partial(number, 3))
    cluster.online(2)
    assert cluster.run(text) == [3, 3, 3]


def test_the_controllers_line_flushes_where_it_has_one(boot):
    cluster = boot(3, controller="mips", idle="halt")
    text = cluster.users.icache.define("f", partial(number, 0))
    assert cluster.run(text) == [0, 0, 0]
    words = {label: row for label, _, row in rows(cluster)}
    before = words["ICF"].copy()
    text.text_poke(partial(number, 1))
    assert cluster.run(text) == [1, 1, 1]
    now = {label: row for label, _, row in rows(cluster)}["ICF"]
    assert all(now - before >= 1)  # one that is late is interrupted again


def rows(cluster):
    from shmipi.trace.counters import Counters

    return Counters(cluster._machine).interrupts()


def test_refusals(cluster, text):
    table = cluster.users.icache
    with pytest.raises(AddressSpaceError) as caught:
        table.define("f", partial(number, 1))
    assert caught.value.errno == 17
    with pytest.raises(KeyError):
        table.text("nothing")
    with pytest.raises(ArenaFullError):
        text.text_poke(partial(number, bytes(5000)))
    with pytest.raises(AddressSpaceError):
        text.text_poke(5)
    assert cluster.run(text) == [0, 0, 0]

    def inside(text):
        def replace():
            return text.text_poke(partial(number, 1))

        other = icache.define("g", replace)
        return other()

    with pytest.raises(RemoteCallError) as remote:
        cluster.run(inside, text, cpus=[0])
    assert isinstance(remote.value.__cause__, IpiDeadlockError)
    assert cluster.run(text) == [0, 0, 0]

    def off(text):
        smp.local_irq_disable()
        try:
            text.text_poke(partial(number, 1))
        finally:
            smp.local_irq_enable()

    with pytest.raises(RemoteCallError) as remote:
        cluster.run(off, text, cpus=[0])
    assert isinstance(remote.value.__cause__, ClusterStateError)
    with pytest.raises(ClusterStateError):
        text()
