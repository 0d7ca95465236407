"""Ctrl-C, and kill -9, at any moment of a machine's boot and of its end."""

import contextlib
import os
import random
import signal
import time

import pytest

#: Raises KeyboardInterrupt at a chosen line of the package: what Ctrl-C can do between
#: two bytecodes, but at the same place each time.
INTERRUPT = """
import contextlib, gc, linecache, os, sys, threading, time
from shmipi import Cluster, smp
import shmipi
home = os.path.dirname(shmipi.__file__)
# In a callback of a weak reference nobody gets it: Python says so, and drops it.
sys.unraisablehook = lambda what: None

class Interrupted:
    lines = 0
    def __init__(self, at):
        self.left = at
        self.places = set()
    def __enter__(self):
        self.main = threading.get_ident()
        sys.settrace(self.look)
    def __exit__(self, kind, *_):
        sys.settrace(None)
        self.places.clear()
        Interrupted.lines = max(Interrupted.lines, self.seen)
        return kind is KeyboardInterrupt
    seen = 0
    def look(self, frame, event, arg):
        if not frame.f_code.co_filename.startswith(home):
            return None
        if event == "line":
            # Not where a `with` is left by an exception, which is another visit of its
            # line: raising from there, as only a tracer can, leaks that exception.
            place = frame, frame.f_lineno
            text = linecache.getline(frame.f_code.co_filename, frame.f_lineno)
            if place in self.places and text.lstrip().startswith("with "):
                return self.look
            self.places.add(place)
            self.seen += 1
            if self.seen == self.left:
                raise KeyboardInterrupt
        return self.look

def children():
    with open(f"/proc/self/task/{os.getpid()}/children") as file:
        return file.read().split()

def look_for_rest(name, at):
    for _ in range(500):
        gc.collect()
        with open("/proc/self/maps") as maps:
            mapped = [line for line in maps if "shmipi." in line]
        objects = [x for x in os.listdir("/dev/shm") if name in x]
        threads = [t.name for t in threading.enumerate()][1:]
        descriptors = sorted(os.listdir("/proc/self/fd"))
        if not mapped + objects + threads + children() and descriptors == usual:
            return
        time.sleep(0.01)
    print("left at", at, mapped, objects, threads, children(), descriptors)

usual = sorted(os.listdir("/proc/self/fd"))
"""

SHUTDOWN = """
def hold():
    time.sleep(30)

for at in map(int, sys.argv[2].split(",")):
    cluster = Cluster(2, idle="halt", name=sys.argv[1])
    cluster.call(1, int)
    pending = [cluster.submit(1, hold) for _ in range(3 * (at % 5 == 0))]
    with Interrupted(at):
        cluster.shutdown()
    if not cluster.closed:
        cluster.shutdown()
    if not cluster.closed:
        print("not closed", at)
    cluster.shutdown()
    for future in pending:
        if type(future.exception(5)) is not shmipi.MachineDiedError:
            print("future", at, future)
    del cluster, pending
    future = None
    look_for_rest(sys.argv[1], at)
print("lines", Interrupted.lines)
"""

BOOT = """
for at in map(int, sys.argv[2].split(",")):
    cluster = None
    with Interrupted(at):
        cluster = Cluster(2, idle="halt", name=sys.argv[1])
    if cluster is not None:  # it is up, and works
        cluster.call(1, int)
        cluster.shutdown()
        del cluster
    look_for_rest(sys.argv[1], at)
print("lines", Interrupted.lines)
"""


HOTPLUG = """
cluster = Cluster(2, idle="halt", name=sys.argv[1])
for at in map(int, sys.argv[2].split(",")):
    with Interrupted(at):
        cluster.offline(1)
        cluster.online(1)
    cluster.online(1, timeout=10)
    if cluster.call(1, int, "7", timeout=10) != 7:
        print("at", at)
cluster.shutdown()
del cluster
look_for_rest(sys.argv[1], 0)
print("lines", Interrupted.lines)
"""


ATTACH = """
def all_slots():
    held = []
    try:
        for _ in range(6):
            held.append(Cluster.attach(sys.argv[1]))
        return True
    except shmipi.AttachError:
        return False
    finally:
        for cluster in held:
            cluster.shutdown()

owner = Cluster(2, idle="halt", name=sys.argv[1])
all_slots()  # and what is imported for it
for at in map(int, sys.argv[2].split(",")):
    cluster = None
    with Interrupted(at):
        cluster = Cluster.attach(sys.argv[1])
    if cluster is not None:
        cluster.call(1, int)
        cluster.shutdown()
        del cluster
    for _ in range(100):
        gc.collect()
        if all_slots():
            break
        time.sleep(0.05)
    else:
        print("a slot is taken", at)
owner.shutdown()
del owner
print("lines", Interrupted.lines)
"""


@pytest.mark.parametrize(
    ("program", "lines", "tries"),
    [(SHUTDOWN, 100, 9), (BOOT, 6300, 9), (HOTPLUG, 120, 9), (ATTACH, 1000, 100)],
    ids=["shutdown", "boot", "hotplug", "attach"],
)
def test_interrupted_at_any_line(script, program, lines, tries):
    """Wholly closed, at once or by a second shutdown(); and nothing is left."""
    chosen = ",".join(["5", *(str(random.randrange(1, lines)) for _ in range(tries))])
    done = script(INTERRUPT + program, f"ir{os.getpid()}", chosen, timeout=100)
    assert done.text.startswith("lines "), (chosen, done.text)


DESCRIPTORS = """
class WhileMade(Interrupted):
    makers = ("_keep", "_above", "_writable", "create", "open_segment", "_locked")
    def look(self, frame, event, arg):
        if frame.f_code.co_name in self.makers:
            super().look(frame, event, arg)
        return self.look

at = 0
while at <= Interrupted.lines:
    at += 1
    cluster = None
    with WhileMade(at):
        cluster = Cluster(1, idle="halt", name=sys.argv[1])
    if cluster is not None:
        cluster.shutdown()
        del cluster
    look_for_rest(sys.argv[1], at)
print("lines", at > 30)
"""


def test_interrupted_while_a_descriptor_is_made(script):
    """At each line of it: on the way to whom it is for, it is closed by somebody."""
    done = script(INTERRUPT + DESCRIPTORS, f"id{os.getpid()}", timeout=100)
    assert done.text == "lines True\n"


def test_interrupted_while_it_waits_for_a_busy_cpu(script):
    """A Ctrl-C shortens the wait for a CPU that is busy, and the end is whole."""
    done = script(
        """
        import os, signal, sys, threading, time
        from shmipi import Cluster, MachineDiedError, smp

        def busy():
            smp.local_irq_disable()
            masked[0] = 1
            time.sleep(30)

        def run():
            try:
                cluster.run(busy, cpus=[1])
            except MachineDiedError as error:
                print("run:", "shut down" in str(error))

        cluster = Cluster(2, idle="halt", name=sys.argv[1])
        masked = cluster.shared("masked", "i8", 1)
        thread = threading.Thread(target=run)
        thread.start()
        while not masked[0]:
            time.sleep(0.001)
        pending = cluster.submit(1, int)
        host = cluster._host
        close = host.close
        host.close = lambda: close(20.0)  # longer than others may keep the cores

        def press():
            while not host.closing:  # in shutdown(), which waits from here on
                time.sleep(0.001)
            time.sleep(0.3)
            os.kill(os.getpid(), signal.SIGINT)

        presses = threading.Thread(target=press)
        presses.start()
        try:
            cluster.shutdown()
        except KeyboardInterrupt:
            left = [x for x in os.listdir("/dev/shm") if sys.argv[1] in x]
            print("interrupted", cluster.closed, left)
        thread.join()
        presses.join()
        print(type(pending.exception(5)).__name__, threading.active_count())
        cluster.shutdown()
        """,
        f"bz{os.getpid()}",
    )
    assert sorted(done.text.splitlines()) == [
        "MachineDiedError 1",
        "interrupted True []",
        "run: True",
    ]


# ---- the host is killed while it boots -----------------------------------------------

HOST = """
import os, signal, sys
import shmipi.cluster
from shmipi.machine import boot
cpus, name, moment, doorbell = sys.argv[1:]
os.environ["SHMIPI_TEST_NAME"] = name
popen = boot.subprocess.Popen

def killed(*args, **kwargs):
    if moment == "before":
        os.kill(os.getpid(), signal.SIGKILL)
    started = popen(*args, **kwargs)
    os.kill(os.getpid(), signal.SIGKILL)

if moment != "later":
    boot.subprocess.Popen = killed
print("begins", flush=True)
with shmipi.Cluster(int(cpus), idle="halt", name=name, doorbell=doorbell):
    signal.pause()
"""


def processes(name):
    found = []
    for pid in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError), open(f"/proc/{pid}/environ", "rb") as file:
            if f"SHMIPI_TEST_NAME={name}".encode() in file.read():
                found.append(pid)
    return found


def objects(name):
    found = []
    for folder in ("/dev/shm", "/dev/mqueue"):
        with contextlib.suppress(OSError):
            found += [x for x in os.listdir(folder) if f".{name}" in x]
    return found


def killed_in_boot(script, cpus, moment, doorbell="futex", after=0.0):
    """Return name and Popen of a host that is killed at that moment of its boot."""
    name = f"kb{random.randrange(1 << 40):x}"
    host = script(
        HOST,
        *(str(cpus), name, moment, doorbell),
        wait=False,
    )
    assert host.stdout.readline() == "begins\n"
    if moment == "later":
        time.sleep(after)
        host.kill()
    return name, host


def nothing_left(name, host, eventually):
    at = time.monotonic()
    eventually(lambda: not processes(name), 10)
    print(f"{name}: gone {time.monotonic() - at:.2f} s after it was looked for")
    assert objects(name) == []
    text, _ = host.communicate()
    assert text == "", "the firmware has nothing to complain of"


@pytest.mark.parametrize("moment", ["before", "after"])
@pytest.mark.parametrize("doorbell", ["futex", "sem", "mqueue"])
def test_a_host_killed_around_the_start_of_the_firmware(
    script, eventually, moment, doorbell
):
    """There is no moment at which a name in /dev/shm belongs to nobody."""
    nothing_left(*killed_in_boot(script, 2, moment, doorbell), eventually)


@pytest.mark.parametrize("cpus", [2, 256])
def test_a_host_killed_at_any_moment_of_its_boot(script, eventually, cpus):
    longest, count = (0.3, 6) if cpus == 2 else (0.9, 2)
    for _ in range(count):
        doorbell = random.choice(["futex", "sem", "mqueue"] if cpus == 2 else ["futex"])
        after = random.uniform(0, longest)
        nothing_left(
            *killed_in_boot(script, cpus, "later", doorbell, after), eventually
        )


# ---- a firmware that is stopped ------------------------------------------------------


@pytest.mark.parametrize("end", ["killed", "shutdown", "interrupted"])
def test_a_stopped_firmware_does_not_outlive_its_host(script, eventually, end):
    """SIGSTOP does not keep it from its duty: the host's end continues it."""
    name = f"sf{random.randrange(1 << 40):x}"
    host = script(
        """
        import os, psutil, signal, sys, time
        from shmipi import Cluster
        os.environ["SHMIPI_TEST_NAME"] = sys.argv[1]
        with Cluster(2, idle="halt", name=sys.argv[1]) as cluster:
            firmware = cluster._machine.firmware_pid
            os.kill(firmware, signal.SIGSTOP)
            while psutil.Process(firmware).status() != "stopped":
                time.sleep(0.001)
            print(cluster.call(1, int, "7"), flush=True)  # CPUs do not need it
            while sys.argv[2] != "shutdown":
                time.sleep(0.1)
        """,
        *(name, end),
        wait=False,
    )
    assert host.stdout.readline() == "7\n"
    if end != "shutdown":
        host.send_signal(signal.SIGKILL if end == "killed" else signal.SIGINT)
    eventually(lambda: host.poll() is not None, 5)
    eventually(lambda: not processes(name), 5)
    assert objects(name) == []
