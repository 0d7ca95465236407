"""The core's timed idle, and the native handler that takes as long as it is told."""

import time

import pytest

from shmipi import ClusterStateError, RemoteCallError, _core, smp
from shmipi.names import DOORBELLS

LONG_S = 20.0
STATES = {"halted": _core.HALTED, "polling": _core.POLLING, "running": _core.RUNNING}


def waits(state, seconds, calls):
    """Task: (did an interrupt end it, ns late) of each of two waits."""
    found = []
    for _ in range(calls):
        until = time.monotonic_ns() + int(seconds * 1e9)
        came = _core.idle_until(until, STATES[state])
        found.append((came, time.monotonic_ns() - until))
    return found


@pytest.mark.parametrize("doorbell", DOORBELLS)
def test_timed_idle_ends_by_time_and_by_an_interrupt(
    boot, background, eventually, doorbell
):
    cluster = boot(2, doorbell=doorbell, idle="halt")
    for state in STATES:
        ((came, late),) = cluster.run(waits, state, 0.02, 1, cpus=[1])[0]
        assert not came
        assert late >= 0
        thread = background(
            lambda state=state: cluster.run(waits, state, LONG_S, 2, cpus=[1])[0]
        )
        eventually(lambda state=state: cluster.cpus[1].state == state)
        while thread.is_alive():  # the first may come before it waits
            cluster.call(1, int)
            time.sleep(0.01)
        assert [came for came, _ in thread.result] == [True, True]


def test_what_ends_a_timed_idle_besides(cluster, eventually):
    for state in STATES:
        tasks = cluster.start(waits, state, LONG_S, 1, cpus=[1])
        eventually(lambda tasks=tasks: tasks[0].running())
        tasks.cancel()
        assert tasks.wait(10)
    with pytest.raises(ClusterStateError):
        _core.idle_until(0, _core.HALTED)
    with pytest.raises(RemoteCallError, match="interrupts disabled"):
        cluster.run(irqs_off, cpus=[0])
    with pytest.raises(RemoteCallError, match="RUNNING, POLLING or HALTED"):
        cluster.run(no_state, cpus=[0])


def irqs_off():
    smp.local_irq_disable()
    try:
        _core.idle_until(0, _core.HALTED)
    finally:
        smp.local_irq_enable()


def no_state():
    _core.idle_until(0, _core.CPU_DEAD)


def burns(ns):
    """Task on CPU 0: what a call of `burn` on CPU 1 took."""
    start = time.monotonic_ns()
    smp.smp_call_function_single(1, smp.NativeHandler("burn"), ns, True)
    return time.monotonic_ns() - start


def test_burn_takes_as_long_as_it_is_told(cluster):
    for ns in (0, 200_000, 3_000_000):
        assert cluster.run(burns, ns, cpus=[0])[0] >= ns
    assert cluster.run(burns, -1, cpus=[0])[0] < 1e9  # no time, not all
