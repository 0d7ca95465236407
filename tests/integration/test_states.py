"""What a CPU is seen to do: its state, its handler and since when, its task."""

import functools
import os
import re
import signal
import time

import pytest

from shmipi import CpuDiedError, smp
from shmipi.machine.inspect import Inspector

SOON_S = 5.0


class Handlers:
    """Callables of every kind, that wait until they are let go."""

    def __init__(self, cluster):
        self.gate = gate = cluster.shared("gate", "i8", 1)

        def plain(*_):
            while not gate[0]:
                time.sleep(0.001)

        self.plain = plain
        self.partial = functools.partial(plain, 1)

    def method(self, *_):
        self.plain()

    def __getstate__(self):
        return {"plain": self.plain}


def views(cluster, number):
    """The CPU as the host sees it and as `shmipi ps` does."""
    with Inspector(cluster.name) as inspector:
        return cluster.cpus[number], inspector.view().cpus[number]


def seen(cluster, number, state, handler):
    def look():
        return all(
            cpu.state == state and (cpu.handler or "").endswith(handler)
            for cpu in views(cluster, number)
        )

    return look


def at_rest(cluster, number):
    cpus = views(cluster, number)
    return all(
        cpu.handler is None and cpu.since is None and cpu.state not in ("irq", "nmi")
        for cpu in cpus
    )


@pytest.mark.parametrize("idle", ["poll", "halt"])
def test_a_cpu_in_a_handler_is_seen_in_it(boot, eventually, idle):
    cluster = boot(2, idle=idle)
    handlers = Handlers(cluster)
    for handler, name in (
        (handlers.plain, ".plain"),
        (handlers.method, "Handlers.method"),
        (handlers.partial, "partial"),
    ):
        assert at_rest(cluster, 1)
        handlers.gate[0] = 0
        begun = time.monotonic()
        future = cluster.submit(1, handler)
        eventually(seen(cluster, 1, "irq", name))
        time.sleep(0.05)
        for cpu in views(cluster, 1):
            assert 0.03 < cpu.since <= time.monotonic() - begun + 0.001
            assert cpu.task is None
        handlers.gate[0] = 1
        future.result(SOON_S)
        eventually(lambda: at_rest(cluster, 1))


def test_a_handler_on_top_of_a_task_and_an_nmi_on_top_of_both(boot, eventually):
    cluster = boot(2, idle="halt")
    handlers = Handlers(cluster)
    go_on = cluster.shared("go_on", "i8", 1)

    def task_of_mine():
        while True:
            time.sleep(0.001)

    def on_nmi(_):
        while not go_on[0]:
            pass

    task = cluster.start(task_of_mine, cpus=[1])[0]
    eventually(task.running)
    future = cluster.submit(1, handlers.plain)
    eventually(seen(cluster, 1, "irq", ".plain"))
    begun = time.monotonic()
    assert cluster.smp.smp_send_nmi_ipi(1, on_nmi, 5_000_000) == 1
    eventually(seen(cluster, 1, "nmi", ".on_nmi"))
    for cpu in views(cluster, 1):
        assert cpu.task.endswith(".task_of_mine")
        assert cpu.since <= time.monotonic() - begun + 0.001
    go_on[0] = 1
    eventually(seen(cluster, 1, "irq", ".plain"))
    assert all(cpu.since > 0 for cpu in views(cluster, 1))
    handlers.gate[0] = 1
    future.result(SOON_S)
    eventually(lambda: at_rest(cluster, 1))
    assert cluster.cpus[1].task.endswith(".task_of_mine")
    assert cluster.cpus[1].state in ("running", "polling")
    task.cancel()
    assert task._settle(SOON_S)
    eventually(lambda: cluster.cpus[1].task is None)


def test_a_cpu_that_died_in_a_handler_is_dead_and_anew_at_rest(boot, eventually):
    cluster = boot(2, idle="halt")
    handlers = Handlers(cluster)
    future = cluster.submit(1, handlers.plain)
    eventually(seen(cluster, 1, "irq", ".plain"))
    os.kill(cluster.cpus[1].pid, signal.SIGKILL)
    assert isinstance(future.exception(SOON_S), CpuDiedError)
    for cpu in views(cluster, 1):
        assert cpu.state == "dead"
        assert (cpu.handler, cpu.since, cpu.task) == (None, None, None)
    with Inspector(cluster.name) as inspector:
        assert inspector.view().cpus[1].ended == "killed by SIGKILL"
        cluster.online(1)
        assert inspector.view().cpus[1].ended is None
    assert at_rest(cluster, 1)


def test_the_handler_of_an_irq_is_seen(boot, eventually):
    cluster = boot(2, idle="halt")
    gate = cluster.shared("irq_gate", "i8", 1)

    def on_irq(virq, dev_id):
        while not gate[0]:
            time.sleep(0.001)

    virq = cluster.irq.irq_reserve_ipi(None, "0-1")
    cluster.irq.request_percpu_irq(virq, on_irq, "mine", 0)
    cluster.irq.enable_percpu_irq_mask(virq, cpus="0-1")
    cluster.irq.ipi_send_single(virq, 1)
    eventually(seen(cluster, 1, "irq", ".on_irq"))
    gate[0] = 1
    eventually(lambda: at_rest(cluster, 1))


def test_ps_names_the_handler_and_how_a_dead_cpu_ended(boot, eventually, capsys):
    from shmipi.cli import main

    cluster = boot(3, idle="halt")
    handlers = Handlers(cluster)
    begun = time.monotonic()
    future = cluster.submit(1, handlers.plain)
    eventually(seen(cluster, 1, "irq", ".plain"))
    cluster.call(2, smp.smp_processor_id)
    os.kill(cluster.cpus[2].pid, signal.SIGTERM)
    eventually(lambda: cluster.cpus[2].state == "dead")
    assert main(["ps", "-v"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    found = re.search(r"plain for (\d+) s", text)
    assert found
    assert int(found[1]) <= time.monotonic() - begun
    assert "killed by SIGTERM" in text
    assert " irq " in text
    handlers.gate[0] = 1
    future.result(SOON_S)
