"""What ps shows of a machine's processes."""

import os
import signal
import subprocess
from pathlib import Path


def title(pid):
    return Path(f"/proc/{pid}/cmdline").read_bytes().rstrip(b"\0").decode()


def environment(pid):
    return Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")


def test_every_process_says_which_part_of_which_machine_it_is(boot, eventually):
    cluster = boot(3, name="lab-of-titles")
    firmware = cluster._machine.firmware_pid
    eventually(lambda: title(firmware) == "shmipi[lab-of-titles] firmware")
    pids = [cpu.pid for cpu in cluster.cpus]
    assert [title(pid) for pid in pids] == [
        f"shmipi[lab-of-titles] CPU {n}" for n in range(3)
    ]
    shown = subprocess.run(
        ["ps", "-o", "args=", "-p", str(pids[2])], capture_output=True, text=True
    )
    if not shown.returncode:
        assert shown.stdout.strip() == "shmipi[lab-of-titles] CPU 2"
    assert Path(f"/proc/{pids[2]}/comm").read_text().startswith("shmipi[")
    # A process in place of one that died, and the firmware after it.
    os.kill(pids[1], signal.SIGKILL)
    eventually(lambda: cluster.cpus[1].state == "dead")
    cluster.online(1)
    assert cluster.cpus[1].pid != pids[1]
    assert title(cluster.cpus[1].pid) == "shmipi[lab-of-titles] CPU 1"
    assert title(firmware) == "shmipi[lab-of-titles] firmware"


def test_the_environment_can_still_be_read_and_has_nothing_new(boot, monkeypatch):
    monkeypatch.setenv("SHMIPI_TEST_TITLE", "read me")
    cluster = boot(2)
    pid = cluster.cpus[1].pid
    assert b"SHMIPI_TEST_TITLE=read me" in environment(pid)

    def there():
        return dict(os.environ)

    assert cluster.run(there, cpus=[1]) == [dict(os.environ)]
    assert title(os.getpid()).count("shmipi[") == 0  # the host's is its own
