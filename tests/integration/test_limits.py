"""A limit that is in the way is named, with what to do about it."""

import errno
import os
import threading

import pytest

from shmipi import BootError
from shmipi.machine import doorbells
from shmipi.machine.limits import start_thread
from shmipi.names import DOORBELLS

BOOT = """
import os, resource, sys, threading, time
import numpy, posix_ipc, shmipi.cluster
from shmipi import BootError, Cluster, NoMachineError, smp
from shmipi.errors import ShmipiOSError
name = "lim" + str(os.getpid())

def boot(ncpus=2, **options):
    try:
        with Cluster(ncpus, idle="halt", name=name, **options) as cluster:
            print("booted", cluster.call(ncpus - 1, abs, -1))
    except BootError as error:
        print(error.errno, error)
    assert not [x for x in os.listdir("/dev/shm") if name in x]
    assert threading.active_count() == 1
"""


def lines(script, text):
    return script(BOOT + text).text.splitlines()


@pytest.mark.parametrize("files", [5, 8, 12])
def test_too_few_files(script, files):
    (line,) = lines(
        script,
        f"""
resource.setrlimit(resource.RLIMIT_NOFILE, ({files}, {files}))
try:
    boot()
finally:
    resource.setrlimit(resource.RLIMIT_NOFILE, ({files}, {files}))
""",
    )
    if not line.startswith("booted"):
        assert line.startswith(f"{errno.EMFILE} ")
        assert f"{files} files" in line
        assert "ulimit -n" in line
        assert "seccomp" not in line


@pytest.mark.parametrize("size", [1 << 30, 8 << 30, 60 << 30, 70 << 30])
def test_too_little_address_space(script, size):
    (line,) = lines(
        script,
        f"""
resource.setrlimit(resource.RLIMIT_AS, ({size}, {size}))
boot()
""",
    )
    if not (size == 70 << 30 and line.startswith("booted")):
        assert line.startswith(f"{errno.ENOMEM} ")
        assert "ulimit -v" in line
        assert "RLIMIT_NPROC" not in line


def test_a_working_directory_that_is_gone(script, tmp_path):
    """It is the CPUs', too, and no reason not to boot."""
    gone = tmp_path / "gone"
    gone.mkdir()
    text = lines(
        script,
        f"""
os.chdir({str(gone)!r})
os.rmdir({str(gone)!r})
boot()
""",
    )
    assert text == ["booted 1"]


def test_no_thread_more(script):
    """As under the cgroup's pids.max: Python says "can't start new thread"."""
    text = lines(
        script,
        """
start = threading.Thread.start

def refused(thread):
    if thread.name.startswith("shmipi") and thread.name.endswith(which):
        raise RuntimeError("can't start new thread")
    start(thread)

threading.Thread.start = refused
which = "watch"
boot()
which = "futures"
with Cluster(2, idle="halt") as cluster:
    try:
        cluster.submit(1, int)
    except ShmipiOSError as error:
        print(error.errno, error)
    which = "none"
    print(cluster.submit(1, int, "7").result(10))
""",
    )
    assert [line.split()[0] for line in text] == [*[str(errno.EAGAIN)] * 2, "7"]
    for line in text[:2]:
        assert "thread" in line
        for word in ("RLIMIT_NPROC", "ulimit -u", "pids.max"):
            assert word in line


def test_no_thread_while_the_interpreter_ends(monkeypatch):
    """Python 3.12 refuses threads then: no limit of the system is in the way."""
    thread = threading.Thread(target=int)
    words = "can't create new thread at interpreter shutdown"
    monkeypatch.setattr(
        thread, "start", lambda: (_ for _ in ()).throw(RuntimeError(words))
    )
    with pytest.raises(BootError, match="the interpreter is shutting down") as caught:
        start_thread(thread)
    assert "RLIMIT" not in str(caught.value)


def test_why_there_is_no_machine_here(script):
    text = lines(
        script,
        """
def why():
    try:
        smp.smp_call_function(int)
    except NoMachineError as error:
        return str(error)

def child():
    r, w = os.pipe()
    if os.fork() == 0:
        os.write(w, why().encode())
        os._exit(0)
    os.close(w)
    os.wait()
    return os.read(r, 1000).decode()

print(why())
with Cluster(1, idle="halt") as one:
    print(child())
    print(one.run(child)[0])
    with Cluster(1, idle="halt"):
        print(why())
print(why())
""",
    )
    none, child, cpus_child, several, after = text
    assert "no Cluster is open" in none
    assert "fork's child" in child
    assert "fork's child" in cpus_child
    assert "several Clusters" in several
    assert after == none


def test_a_call_that_a_shutdown_cuts_short(script):
    """It is told as what it is, and not as a death."""
    text = lines(
        script,
        """
cluster = Cluster(2, idle="halt")

def run():
    try:
        cluster.call(1, time.sleep, 30)
    except shmipi.MachineDiedError as error:
        print(error)

thread = threading.Thread(target=run)
thread.start()
while not cluster.cpus[1].handler:  # for half a minute
    time.sleep(0.001)
cluster._host.hurry()  # no two seconds for what is busy
cluster.shutdown()
thread.join()
""",
    )
    assert len(text) == 1
    assert "was shut down with this call in hand" in text[0]


# ---- a task that closes all descriptors ----------------------------------------------

CLOSES = """
import os, sys
from shmipi import Cluster, CpuDiedError, smp

def task(path):
    os.closerange(3, 5000)
    files = [os.open(path, os.O_RDWR) for _ in range(60)]  # these have our numbers now
    for _ in range(3):
        smp.smp_call_function_single(0, len, bytes(3 << 20), True)
    return bytes(4 << 20)

def answer(size):
    return b"a" * size

doorbell, path = sys.argv[1:]
with Cluster(2, idle="halt", doorbell=doorbell) as cluster:
    cells = cluster.shared("cells", "i8", 4)
    try:
        print([len(result) for result in cluster.run(task, path, cpus=[1])])
    except CpuDiedError:
        print("CPU 1 died")
        cluster.online(1)
    for size in (1 << 20, 3 << 20):
        print(len(cluster.call(1, answer, size)), cluster.call(1, len, bytes(size)))
    print(len(cluster.submit(1, answer, 2 << 20).result(10)))
    print(cluster.run(smp.smp_processor_id))
"""


@pytest.mark.parametrize("doorbell", DOORBELLS)
def test_a_task_that_closes_all_descriptors(script, tmp_path, doorbell):
    """Its own files stay as they are; where the doorbells were descriptors, it ends."""
    path = tmp_path / "file"
    content = os.urandom(1 << 20) * 3
    path.write_bytes(content)
    done = script(CLOSES, doorbell, str(path))
    text = done.text.splitlines()
    if doorbells.BY_NAME[doorbell].is_descriptor:
        assert "closed the descriptors of its CPU's doorbells" in text.pop(0)
        assert text.pop(0) == "CPU 1 died"
    else:
        assert text.pop(0) == f"[{4 << 20}]"
    assert text == ["1048576 1048576", "3145728 3145728", "2097152", "[0, 1]"]
    assert path.read_bytes() == content
