"""smp_send_stop(), as each architecture does it."""

import logging
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from shmipi import Cluster, CpuDiedError, smp
from shmipi.irq.chips import CHIPS
from shmipi.irq.chips.gic import Gicv3
from shmipi.users import stop


def keep_irqs_off(until: str, off: Any) -> None:
    flags = smp.local_irq_save()
    off[0] = 1
    while not os.path.exists(until):
        pass
    smp.local_irq_restore(flags)


@pytest.fixture
def log() -> Iterator[list[str]]:
    lines: list[str] = []
    handler, logger = logging.Handler(), logging.getLogger("shmipi.stop")
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore
    logger.addHandler(handler)
    yield lines
    logger.removeHandler(handler)


def until_dead(cluster: Cluster, cpus: list[int]) -> None:
    end = time.monotonic() + 20
    while any(cluster.cpus[cpu].state != "dead" for cpu in cpus):
        assert time.monotonic() < end, cluster.cpus
        time.sleep(0.002)


# What keeps interrupts off on CPU 1: an NMI stops it, an interrupt does not.
@pytest.mark.parametrize(
    ("controller", "left", "least", "most"),
    [
        ("apic", [], 1.0, 20),  # REBOOT_VECTOR for 1 s, then the NMI
        ("gicv2", [1], 1.0, 20),  # no pseudo-NMI: no second leg
        ("xive", [], 0.0, 10),  # an NMI from the start
        ("mips", None, 0.0, 10),  # one call, asynchronous
    ],
)
def test_stop_as_its_architecture(
    controller: str,
    left: list[int] | None,
    least: float,
    most: float,
    tmp_path: Path,
    log: list[str],
    monkeypatch,
) -> None:
    """Normal IPI for 1 s, then an NMI, where there is one. row 53

    Who is asked stops when it takes that, also when nobody waits any more.
    """
    # As long as it takes on a busy computer; that it is 10 ms is another test's.
    monkeypatch.setattr(stop, "_NMI_S", 10.0)
    if not least:  # who waited for the line, which is not taken, would do so for long
        monkeypatch.setattr(stop, "_LINE_S", 20.0)
    if left == [1]:  # in vain only for CPU 1: the others as long as it takes
        real = stop._Way.wait

        def wait(way: Any, cpus: list[int], seconds: float) -> list[int]:
            late = real(way, cpus, seconds)
            others = real(way, [cpu for cpu in late if cpu != 1], 10.0)
            return others + [cpu for cpu in late if cpu == 1]

        monkeypatch.setattr(stop._Way, "wait", wait)
    until = tmp_path / "until"
    with Cluster(3, idle="halt", controller=controller) as cluster:
        off = cluster.shared("off", "i8", 1)
        task = cluster.start(keep_irqs_off, str(until), off, cpus=[1])
        end = time.monotonic() + 20
        while not off[0]:
            assert time.monotonic() < end, "the task does not begin"
            time.sleep(0.001)
        begun = time.monotonic()
        found = cluster.users.stop.smp_send_stop()
        took = time.monotonic() - begun
        assert least <= took < most
        stopped = [0, 2] if left == [1] or left is None else [0, 1, 2]
        until_dead(cluster, stopped)
        if left is None:  # nobody is waited for, and nobody named
            assert not found
            assert not log
        else:
            assert list(found) == left
            failed = ["SMP: failed to stop secondary CPUs 1"] if left else []
            assert log == failed
        if 1 not in stopped:
            assert cluster.cpus[1].state != "dead"
            until.touch()
        with pytest.raises(CpuDiedError, match="stopped by smp_send_stop"):
            task.results()
        until_dead(cluster, [0, 1, 2])
        if controller == "gicv2":
            assert "CPU stop interrupts" in cluster.interrupts()
        # Not for ever: a CPU can be booted anew, and nothing is asked of that one.
        for cpu in (0, 1):
            cluster.online(cpu)
            assert cluster.call(cpu, int, "7") == 7
            assert not cluster._machine.send_stop_asked(cpu)


def test_the_nmi_is_waited_for_ten_ms(monkeypatch, log: list[str]) -> None:
    """native_stop_other_cpus: 1 s by the line, 10 ms by the NMI; who is left is named.

    CPU 1 is stopped by a signal: it takes neither.
    """
    waits = []

    def wait(way, cpus, seconds):
        waits.append((list(cpus), seconds))
        return real(way, cpus, min(seconds, 0.05))

    real = stop._Way.wait
    monkeypatch.setattr(stop._Way, "wait", wait)
    with Cluster(2, idle="halt") as cluster:
        pid = cluster.cpus[1].pid
        os.kill(pid, signal.SIGSTOP)
        try:
            assert 1 in cluster.users.stop.smp_send_stop()
        finally:
            os.kill(pid, signal.SIGCONT)
        until_dead(cluster, [0, 1])
        assert waits[0] == ([0, 1], 1.0)
        assert waits[1][1] == 0.01
        assert 1 in waits[1][0]
        assert log[0].startswith("SMP: failed to stop secondary CPUs ")


def others() -> list[int]:
    stop._LINE_S = 20.0  # as long as it takes on a busy computer
    return list(stop.smp_send_stop())


def test_a_cpu_stops_all_but_itself_and_the_first_caller_counts() -> None:
    """stopping_cpu: while one stops the others, a second call does nothing."""
    with Cluster(3, idle="halt") as cluster:
        machine = cluster._machine
        assert cluster.run(others, cpus=[2]) == [[]]
        until_dead(cluster, [0, 1])
        assert list(cluster.online_mask) == [2]
        cluster.online(0)
        assert machine.send_stop_begin()
        assert not cluster.users.stop.smp_send_stop()
        assert list(cluster.online_mask) == [0, 2]
        machine.send_stop_end()


def test_every_controller_has_its_way() -> None:
    """By the table of shmipi.users.stop, and with the line that it needs."""
    ways = {name: chip.stops_by for name, chip in CHIPS.items()}
    assert ways == {
        "apic": "line_nmi",
        "xive": "nmi",
        "mips": "call",
        "mips-gic": "call",
        "gicv2": "line",
        "gicv3": "line_nmi",
        "riscv": "line",
        "loongarch": "call",
    }
    for name, chip in CHIPS.items():
        uses = [line.use for line in chip().lines(2)]
        assert ("stop" in uses) == ways[name].startswith("line")
        if ways[name].endswith("nmi"):
            own = Gicv3(pseudo_nmi=True) if name == "gicv3" else chip()
            assert own.for_cpus(2).describe(2)["nmi"] is None
