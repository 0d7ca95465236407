"""What the firmware does when the system refuses it something."""

import errno

import pytest

from shmipi.machine.firmware import Firmware


class Machine:
    """Of a firmware that may make no process more."""

    def __init__(self):
        self.states = {0: "dead", 1: "dead"}

    def reap_reset(self, cpu):
        self.states[cpu] = "offline"

    def reap_mark(self, cpu, end=0):
        self.states[cpu] = "dead"

    def fork_cpu(self, cpu, firmware, descriptors):
        raise OSError(errno.EAGAIN, "too many processes")


def test_a_cpu_that_gets_no_process_stays_dead(monkeypatch):
    """Offline, it would be waited for by who brings it online, and for ever."""
    firmware = Firmware.__new__(Firmware)
    firmware.machine = Machine()
    firmware.pids, firmware.generations = {}, {}
    monkeypatch.setattr(firmware, "private", list)
    monkeypatch.setattr(firmware, "before_fork", lambda: None)
    monkeypatch.setattr(firmware, "check_host", lambda: None)
    monkeypatch.setattr(firmware, "show", lambda role: None)
    with pytest.raises(OSError, match="too many processes"):
        firmware.boot([0, 1])
    assert firmware.machine.states == {0: "dead", 1: "dead"}
    assert not firmware.pids
