"""Booting: what a machine is, what its CPUs find, how many there may be."""

import os
import random
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest

from shmipi import BootError, Cluster, CpuMask, smp
from shmipi.machine import topology
from shmipi.names import DOORBELLS


def test_the_default_machine(boot):
    cluster = boot(None)
    assert cluster.ncpus == max(2, topology.default_ncpus())
    assert len(cluster.cpus) == cluster.ncpus
    assert cluster.controller == "apic"
    assert cluster.doorbell == "futex"
    assert str(cluster.ncpus) in repr(cluster)
    assert cluster.name in repr(cluster)


def test_modules_are_imported_before_cpus_are_forked(boot):
    cluster = boot(2, idle="halt", preload=["colorsys", "xml.dom"])

    def there():
        return [name in sys.modules for name in ("colorsys", "xml.dom", "chunk")]

    assert cluster.run(there) == [[True, True, False]] * 2
    with pytest.raises(BootError, match="no_such_module"):
        boot(1, preload=["no_such_module"])
    for wrong in ("colorsys", [3], [""]):
        with pytest.raises(TypeError, match="preload"):
            boot(1, preload=wrong)


def test_cpus_say_what_they_are(boot, eventually):
    cluster = boot(3, idle="halt", cores=[0, 1] if os.cpu_count() > 1 else [0])
    # Online, each has still to come to where it has nothing to do.
    eventually(lambda: all(cpu.state != "running" for cpu in cluster.cpus))
    for cpu in cluster.cpus:
        process = psutil.Process(cpu.pid)
        assert process.cpu_affinity() == [cpu.core]
        assert process.ppid() == cluster._machine.firmware_pid
        assert cpu.generation == 1
        assert cpu.state in ("halted", "polling")
    assert [cpu.id for cpu in cluster.cpus] == [0, 1, 2]
    if os.cpu_count() > 1:
        assert [cpu.core for cpu in cluster.cpus] == [0, 1, 0]
    assert isinstance(cluster.online_mask, CpuMask)
    assert str(cluster.online_mask) == "0-2"
    slot = cluster._machine.slot(1)
    stat = Path(f"/proc/{slot.pid}/stat").read_text().rpartition(")")[2].split()
    assert slot.start_time == int(stat[19])  # start time: field 22


def test_cores_as_a_cpulist(boot):
    assert [cpu.core for cpu in boot(2, cores="0").cpus] == [0, 0]


def test_cpus_have_the_hosts_surroundings(script, tmp_path):
    (tmp_path / "beside.py").write_text("VALUE = 17\n")
    done = script(
        f"""
        import os, sys, warnings
        os.chdir({str(tmp_path)!r})
        sys.path.insert(0, {str(tmp_path)!r})
        os.environ["SHMIPI_TEST_X"] = "from the host"
        os.environ.pop("OMP_NUM_THREADS", None)
        os.environ["MKL_NUM_THREADS"] = "3"
        warnings.simplefilter("ignore")
        warnings.filterwarnings("error", message="this one")
        from shmipi import Cluster

        def look():
            import beside
            try:
                warnings.warn("this one")
                filters = "lost"
            except UserWarning:
                warnings.warn("another")
                filters = "kept"
            e = os.environ
            return (
                beside.VALUE, os.getcwd(), sys.path[0], e["SHMIPI_TEST_X"], filters,
                e.get("OMP_NUM_THREADS"), e.get("MKL_NUM_THREADS"),
            )

        with Cluster(2, idle="halt") as cluster:
            for cpu in (0, 1):
                print(*cluster.call(cpu, look))
        """,
        flags=(),
    )
    line = f"17 {tmp_path} {tmp_path} from the host kept None 3"
    assert done.text.splitlines() == [line, line]


def test_randomness_is_everybodys_own(boot):
    cluster = boot(3, idle="halt")
    random.seed(1)
    np.random.seed(1)

    def draw():
        return np.random.randint(2**60), random.getrandbits(60), os.urandom(4)

    columns = list(zip(*cluster.run(draw), strict=True))
    assert all(len(set(column)) == 3 for column in columns)


def test_cpus_have_one_thread_and_no_stray_descriptors(boot):
    cluster = boot(2, idle="halt")

    def look():
        return len(os.listdir("/proc/self/task")), sorted(
            os.readlink(f"/proc/self/fd/{fd}")
            for fd in os.listdir("/proc/self/fd")
            if os.path.exists(f"/proc/self/fd/{fd}")
        )

    threads, descriptors = cluster.call(1, look)
    assert threads == 1
    others = [d for d in descriptors if "socket:" in d or "pidfd" in d]
    assert not others, "the firmware's own descriptors are open in a CPU"


def test_cpus_are_out_of_the_terminals_reach(boot):
    """A session of their own: Ctrl-C at a terminal reaches only the host."""
    cluster = boot(2, idle="halt")
    session = os.getsid(cluster._machine.firmware_pid)
    assert session == cluster._machine.firmware_pid
    assert {os.getsid(cpu.pid) for cpu in cluster.cpus} == {session}
    assert os.getsid(0) != session


@pytest.mark.alone
@pytest.mark.parametrize("ncpus", [1, 2, 17, 256])
def test_many_cpus(boot, ncpus):
    start = time.monotonic()
    cluster = boot(ncpus, idle="halt")
    print(f"boot of {ncpus}: {time.monotonic() - start:.2f} s")
    assert cluster.run(smp.smp_processor_id) == list(range(ncpus))
    n = cluster.shared("n", "i8", 1)
    cluster.smp.on_each_cpu(smp.NativeHandler("count"), n)
    assert n[0] == ncpus
    start = time.monotonic()
    cluster.shutdown()
    print(f"shutdown of {ncpus}: {time.monotonic() - start:.2f} s")


@pytest.mark.alone
def test_a_thousand_cpus(boot):
    """1,024 CPUs on however few cores: they boot, answer, and end."""
    cluster = boot(1024, idle="halt")
    n = cluster.shared("n", "i8", 1)
    cluster.smp.on_each_cpu(smp.NativeHandler("count"), n)
    assert n[0] == 1024
    assert cluster.call(1023, smp.smp_processor_id) == 1023
    assert str(cluster.online_mask) == "0-1023"


def test_boot_and_shutdown_leave_nothing_in_the_host():
    def load():
        maps = Path("/proc/self/maps").read_text().count("shmipi")
        import threading

        return len(os.listdir("/proc/self/fd")), threading.active_count(), maps

    with Cluster(2, idle="halt") as cluster:
        cluster.call(1, int)
    before = load()
    for doorbell in DOORBELLS:
        with Cluster(2, idle="halt", doorbell=doorbell) as cluster:
            cluster.submit(1, int).result(5)
            cluster.run(lambda: None)
    del cluster
    assert all(now <= then for now, then in zip(load(), before, strict=True))


def test_the_context_manager(boot):
    with boot(1) as cluster:
        assert not cluster.closed
        cluster.call(0, int)
    assert cluster.closed
    cluster.shutdown()
    assert "closed" in repr(cluster)


def test_two_machines_at_once(boot):
    one, two = boot(2, idle="halt"), boot(2, idle="halt")
    assert one.name != two.name
    pids = {cpu.pid for machine in (one, two) for cpu in machine.cpus}
    assert len(pids) == 4
    a, b = one.shared("same", "i8", 1), two.shared("same", "i8", 1)
    one.call(1, a.__setitem__, 0, 1)
    two.call(1, b.__setitem__, 0, 2)
    assert (a[0], b[0]) == (1, 2)


def test_names_of_semaphores_and_queues_are_gone_once_booted(boot):
    for doorbell in ("sem", "mqueue"):
        cluster = boot(2, idle="halt", doorbell=doorbell)
        left = [
            path.name
            for folder in ("/dev/shm", "/dev/mqueue")
            if os.path.isdir(folder)
            for path in Path(folder).iterdir()
            if cluster.name in path.name
        ]
        assert left == [f"shmipi.{os.getuid()}.{cluster.name}"]
        # A CPU that is booted later opens them all the same.
        os.kill(cluster.cpus[1].pid, 9)
        deadline = time.monotonic() + 5
        while cluster.cpus[1].state != "dead":
            assert time.monotonic() < deadline
            time.sleep(0.001)
        cluster.online(1)
        assert cluster.call(1, smp.smp_processor_id, timeout=5) == 1


def test_the_segment_is_private(boot):
    cluster = boot(1)
    path = Path(f"/dev/shm/shmipi.{os.getuid()}.{cluster.name}")
    assert path.stat().st_mode & 0o777 == 0o600
    with open(path, "rb") as file:
        assert file.read(8) == b"shmipi\n\x1a"
