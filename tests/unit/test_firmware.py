"""What the firmware does when the system refuses it something."""

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
    trace_records=0, boot_time=time.time_ns(),
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
