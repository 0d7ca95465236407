"""smp_send_stop(): every other CPU stops, each as its architecture stops it.

=============  ======================================================================
controller     by
=============  ======================================================================
apic           REBOOT_VECTOR, 1 s; then an NMI, 10 ms (native_stop_other_cpus)
gicv3          IPI_CPU_STOP, 1 s (arm64 smp_send_stop); with ``pseudo_nmi`` then
               IPI_CPU_STOP_NMI, 10 ms
gicv2          IPI_CPU_STOP, 1 s
riscv          IPI_CPU_STOP, 1 s
xive           an NMI IPI, 1 s (powerpc smp_send_stop)
mips           one call that is not waited for (mips smp_send_stop)
loongarch      the same
=============  ======================================================================

A CPU that stops is offline at once, and its process ends: what it was asked for ends
with ``CpuDiedError``, and ``Cluster.online`` boots it anew.
"""

from __future__ import annotations

import logging
import time
from functools import partial
from typing import Any

from shmipi import _core
from shmipi.cpumask import CpuMask
from shmipi.machine import controller
from shmipi.machine.arrays import Arrays, here
from shmipi.smp.cpus import cpu_online
from shmipi.users.state import state

__all__ = ["Stop", "smp_send_stop"]

_log = logging.getLogger("shmipi.stop")
_LINE_S = 1.0
_NMI_S = 0.01
_LOOK_S = 0.0005


def smp_send_stop(*, home: Arrays | None = None) -> CpuMask:
    """Stop all other CPUs (from the host: all); return those that did not stop in time.

    They are named in the log as well ("SMP: failed to stop secondary CPUs"), and stop
    when they take what was sent to them: as they enable interrupts, say. First
    caller only: while one stops the others, a second call returns an empty mask and has
    done nothing. On ``mips``, ``mips-gic`` and ``loongarch`` nobody is waited for, and
    the mask is empty; a CPU with interrupts disabled does not stop there.
    """
    home = here() if home is None else home
    machine = home.machine
    if not machine.user_offset("stop"):
        state(home, "stop", machine.send_stop_bytes())
    if not machine.send_stop_begin():
        return CpuMask()
    left: list[int] = []
    try:
        cpus = [
            cpu
            for cpu in range(machine.ncpus)
            if not (machine.is_cpu and cpu == machine.id)
            and cpu_online(cpu, machine=machine)
        ]
        way = _Way(machine, cpus)
        left = getattr(way, way.chip.stops_by)()
    finally:
        machine.send_stop_end()
    if left:
        _log.critical(f"SMP: failed to stop secondary CPUs {CpuMask(left)}")
    return CpuMask(left)


class _Way:
    """How the CPUs of a machine are stopped."""

    def __init__(self, machine: _core.Machine, cpus: list[int]) -> None:
        self.machine = machine
        self.cpus = cpus
        self.chip: Any = controller.of(machine)

    def line(self) -> list[int]:
        """Its line, and then nothing."""
        for cpu in self.cpus:
            self.machine.send_stop_line(cpu)
        return self.wait(self.cpus, _LINE_S)

    def line_nmi(self) -> list[int]:
        """Its line; an NMI to those who did not take it."""
        left = self.line()
        if self.machine.has_no_nmi():  # no pseudo-NMIs: there is no second leg
            return left
        for cpu in left:
            self.machine.send_stop_nmi(cpu)
        return self.wait(left, _NMI_S) if left else left

    def nmi(self) -> list[int]:
        """An NMI."""
        for cpu in self.cpus:
            self.machine.send_stop_nmi(cpu)
        return self.wait(self.cpus, _LINE_S)

    def call(self) -> list[int]:
        """smp_call_function(stop_this_cpu, NULL, 0)."""
        self.machine.smp_call_function(
            _core.NativeHandler("stop_this_cpu"), None, False
        )
        return []

    def wait(self, cpus: list[int], seconds: float) -> list[int]:
        """Return those that have not stopped in time."""
        deadline = time.monotonic() + seconds
        while True:
            cpus = [cpu for cpu in cpus if self.machine.send_stop_asked(cpu)]
            if not cpus or time.monotonic() >= deadline:
                return cpus
            time.sleep(_LOOK_S)


class Stop:
    """The module, for the host of one machine: ``cluster.users.stop``."""

    def __init__(self, home: Arrays) -> None:
        self.smp_send_stop = partial(smp_send_stop, home=home)
