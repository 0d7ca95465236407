"""The firmware, when it is refused something, and when a CPU does not come online."""

import errno
import types

import pytest

from shmipi import _core
from shmipi.machine import firmware, process

REFUSED = """
import errno, os, resource, time

import numpy

from shmipi import _core
from shmipi.irq.chips.apic import Apic
from shmipi.machine.firmware import Firmware

fd = os.memfd_create("machine")
_core.format_segment(
    fd=fd, name="refused", cores=[0, 0], idle=2, doorbell=0, kick=True, kick_signal=42,
    nmi_signal=43, chip=Apic().describe(2), cookie=1, sum_key=1, oversubscribed=True,
    boot_time=time.time_ns(),
)
firmware = Firmware.__new__(Firmware)
firmware.machine = machine = _core.Machine(fd, 3)
firmware.pids, firmware.generations = {}, {}
firmware.private = list
firmware.check_host = lambda: None
for cpu in (0, 1):
    machine.reap_mark(cpu)
if os.getuid() == 0:  # whom the limit does not bind
    os.setgroups([])
    os.setgid(65534)
    os.setuid(54321)
resource.setrlimit(resource.RLIMIT_NPROC, (0, 0))
try:
    firmware.boot([0, 1])
except OSError as error:
    assert error.errno == errno.EAGAIN, error
    print("refused")
assert [machine.slot(cpu).state for cpu in (0, 1)] == [_core.CPU_DEAD] * 2
assert not firmware.pids
"""


def test_a_cpu_that_gets_no_process_stays_dead(script):
    """Offline, it would be waited for by who brings it online, and for ever."""
    assert script(REFUSED).text == "refused\n"


# ---- CPUs that do not come online ----------------------------------------------------


class Boot:
    """A firmware that waits for CPU 1, on a clock of the test's own."""

    def __init__(self, monkeypatch, seen, comes_at=1e9, jumps=()):
        self.now, self.jumps = 1000.0, list(jumps)
        clock = types.SimpleNamespace(monotonic=lambda: self.now, sleep=self.pass_by)
        monkeypatch.setattr(firmware, "time", clock)
        monkeypatch.setattr(process, "core_time", lambda pid: seen)
        self.looks = 0
        made = firmware.Firmware.__new__(firmware.Firmware)
        made.pids = {4321: 1}
        made.unreaped = set()
        made.check_host = made.reap = lambda: None
        made.controller = types.SimpleNamespace(bring_up=lambda cpu: None)

        def state():
            self.looks += 1
            online = self.looks > comes_at
            return _core.HALTED if online else _core.OFFLINE

        made.machine = types.SimpleNamespace(
            hotplug_event=0,
            slot=lambda number: types.SimpleNamespace(state=state(), core=0),
            wait_hotplug=lambda seen, seconds: self.pass_by(seconds),
            look_after=lambda: None,
        )
        self.firmware = made

    def pass_by(self, seconds):
        self.now += self.jumps.pop(0) if self.jumps else seconds

    def awaited(self):
        """What it says of CPU 1 that does not come, and after how many seconds."""
        begun = self.now
        with pytest.raises(OSError, match="CPU 1 does not come online") as caught:
            self.firmware.await_online([1])
        assert caught.value.errno == errno.ETIMEDOUT
        return str(caught.value), self.now - begun


def test_a_computer_that_stood_gives_its_cpus_time(monkeypatch):
    """A guest that was paused: who looks was stopped for as long as who comes up."""
    boot = Boot(monkeypatch, ("R", 10**9), comes_at=20, jumps=[100.0, 50.0])
    boot.firmware.await_online([1])
    assert boot.now - 1000 > 150


@pytest.mark.parametrize(
    ("seen", "says", "seconds"),
    [
        (("R", 3_000_000), "waits for core 0, which others have", 50),
        (("R", 10**9), "is in state R", 30),
        (("S", 3_000_000), "is in state S", 30),
        (("T", 3_000_000), "is stopped", 30),
    ],
)
def test_of_a_cpu_that_does_not_come_is_said_what_it_does(
    monkeypatch, seen, says, seconds
):
    """And it has the longer the less it had its core, but not for ever."""
    text, took = Boot(monkeypatch, seen).awaited()
    assert says in text
    assert "process 4321" in text
    assert f"for {seen[1] / 1e6:.0f} ms" in text
    assert seconds <= took < seconds + 1
