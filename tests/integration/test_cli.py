"""The commands that boot, show and tidy machines, with real processes."""

import contextlib
import errno
import fcntl
import io
import json
import os
import pty
import re
import secrets
import select
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from shmipi import Cluster, _core, cli
from shmipi.errors import LayoutError
from shmipi.machine import segment
from shmipi.machine.inspect import Inspector

HOME = Path(__file__).resolve().parents[2]
SHMIPI = (sys.executable, "-m", "shmipi")
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(HOME), "COLUMNS": "200", "LINES": "50"}
# With it a print() is several writes, and lines of several CPUs mix.
ENVIRONMENT.pop("PYTHONUNBUFFERED", None)


def shmipi(
    *arguments: str, status: int = 0, timeout: float = 30.0, **options: Any
) -> subprocess.CompletedProcess[str]:
    """Run a command to its end, in a process of its own."""
    done = subprocess.run(
        [*SHMIPI, *arguments],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        env=ENVIRONMENT,
        timeout=timeout,
        check=False,
        **options,
    )
    return checked(done, arguments[0], status)


def here(*arguments: str, status: int = 0) -> subprocess.CompletedProcess[str]:
    """Run a command to its end, in this process: an interpreter takes its time.

    For what is asked many times; each command also runs in a process of its own below.
    """
    out, err = io.StringIO(), io.StringIO()
    kept = {n: signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGHUP)}
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            returned = cli.main(arguments)
    finally:
        for number, handler in kept.items():
            signal.signal(number, handler)
    done = subprocess.CompletedProcess(
        arguments, returned, out.getvalue(), err.getvalue()
    )
    return checked(done, arguments[0], status)


def checked(
    done: subprocess.CompletedProcess[str], command: str, status: int
) -> subprocess.CompletedProcess[str]:
    """It ended with `status`, and with a message of one line if that is an error."""
    assert done.returncode == status, (done.stdout, done.stderr)
    if status:
        assert "Traceback" not in done.stderr
        assert done.stderr.count("\n") == 1, done.stderr
        assert done.stderr.startswith(f"shmipi {command}: ")
    else:
        assert done.stderr == ""
    return done


def entry(name: str) -> dict[str, Any] | None:
    """What `shmipi ps --json` says of a machine; None if it does not list it."""
    document = json.loads(here("ps", "--json", "-").stdout)
    assert document["schema"] == "shmipi.ps/1"
    found = [machine for machine in document["machines"] if machine["name"] == name]
    assert len(found) < 2
    return found[0] if found else None


def running(pid: int) -> bool:
    """Is there such a process, and not only its entry in its parent's books?"""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False
    return text.rpartition(")")[2].split()[0] not in "ZX"


def processes(machine: dict[str, Any]) -> list[int]:
    return [
        machine["host_pid"],
        machine["firmware_pid"],
        *(cpu["pid"] for cpu in machine["cpus"]),
    ]


def path_of(name: str) -> Path:
    return segment.SHM / segment.full_name(name)


class Launched:
    """A `shmipi launch` that is up. `text` is what it has printed so far."""

    def __init__(self, *arguments: str) -> None:
        self.name = f"t{secrets.token_hex(6)}"
        self.process = subprocess.Popen(
            [*SHMIPI, "launch", "--name", self.name, *arguments],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=ENVIRONMENT,
        )
        self.text = ""
        self.read_until("Ctrl-C ends it\n")

    def read_until(self, words: str, seconds: float = 20.0) -> None:
        assert self.process.stdout is not None
        self.text = read_until(self.process.stdout.fileno(), words, seconds, self.text)

    def end(self, seconds: float = 10.0) -> tuple[int, str, str]:
        """Wait for its end; return status, all it printed, its messages."""
        out, err = self.process.communicate(timeout=seconds)
        self.text += out.decode()
        return self.process.returncode, self.text, err.decode()

    def kill_all(self) -> None:
        """Kill host and firmware at once: neither can tidy up behind the other."""
        machine = entry(self.name)
        assert machine is not None
        # The firmware first: the host's death lets a stopped one go on.
        both = (machine["firmware_pid"], machine["host_pid"])
        for pid in both:
            os.kill(pid, signal.SIGSTOP)
        deadline = time.monotonic() + 5.0
        while not all(map(stopped, both)) and time.monotonic() < deadline:
            time.sleep(0.001)
        for pid in both:
            os.kill(pid, signal.SIGKILL)
        self.process.wait(5.0)


def stopped(pid: int) -> bool:
    """Do all its threads stand still? The signal alone does not say so."""
    states = [
        (task / "stat").read_text().rpartition(")")[2].split()[0]
        for task in Path(f"/proc/{pid}/task").iterdir()
    ]
    return all(state in "TtZ" for state in states)


def read_until(fd: int, words: str, seconds: float, text: str = "") -> str:
    deadline = time.monotonic() + seconds
    while words not in text:
        ready, _, _ = select.select([fd], [], [], max(0.0, deadline - time.monotonic()))
        assert ready, f"no {words!r} after {seconds} s, but:\n{text}"
        try:
            data = os.read(fd, 65536)
        except OSError:  # a pty whose other side is closed
            data = b""
        assert data, f"it ended without {words!r}:\n{text}"
        text += data.decode()
    return text


@pytest.fixture
def launch() -> Iterator[Callable[..., Launched]]:
    started: list[Launched] = []

    def start(*arguments: str) -> Launched:
        started.append(Launched(*arguments))
        return started[-1]

    yield start
    for launched in started:
        process = launched.process
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(10.0)
            except subprocess.TimeoutExpired:
                process.kill()
        process.communicate()


@pytest.fixture
def terminal() -> Iterator[Callable[..., Any]]:
    """`terminal(*arguments)`: a command on a terminal: its process, the other end."""
    opened: list[tuple[subprocess.Popen[bytes], int]] = []

    def start(*arguments: str) -> tuple[subprocess.Popen[bytes], int]:
        master, slave = pty.openpty()
        process = subprocess.Popen(
            [*SHMIPI, *arguments],
            stdin=slave,
            stdout=slave,
            stderr=slave,
            env={**ENVIRONMENT, "TERM": "xterm"},
            start_new_session=True,
        )
        os.close(slave)
        opened.append((process, master))
        return process, master

    yield start
    for process, master in opened:
        if process.poll() is None:
            process.kill()
        process.wait(10.0)
        os.close(master)


# ---- launch --------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_launch_stays_up_until_a_signal_and_leaves_nothing(
    launch: Any, number: signal.Signals
) -> None:
    launched = launch("--cpus", "3", "--idle", "halt", "--doorbell", "eventfd")
    machine = entry(launched.name)
    assert machine is not None
    everyone = processes(machine)
    assert all(map(running, everyone))
    # It is printed at once: one may still be on its way to halt.
    states = "halted|polling|running"
    rows = re.findall(rf"^ +(\d+) +(\d+) +\d+  (?:{states}) +1 ", launched.text, re.M)
    assert rows == [(str(cpu["id"]), str(cpu["pid"])) for cpu in machine["cpus"]]
    launched.process.send_signal(number)
    status, text, messages = launched.end()
    assert (status, messages) == (0, "")
    assert text.endswith(f"machine {launched.name} ended\n")
    assert not any(map(running, everyone))
    assert not path_of(launched.name).exists()


@pytest.mark.parametrize("victim", ["host_pid", "firmware_pid"])
def test_killing_host_or_firmware_leaves_nothing(
    launch: Any, eventually: Any, victim: str
) -> None:
    launched = launch("--cpus", "3", "--doorbell", "sem")
    machine = entry(launched.name)
    assert machine is not None
    os.kill(machine[victim], signal.SIGKILL)
    # The host is our child: a zombie until it is waited for, which counts as gone.
    eventually(lambda: not any(map(running, processes(machine))), 2.0)
    eventually(lambda: not path_of(launched.name).exists(), 2.0)
    status, _, messages = launched.end()
    if victim == "host_pid":
        assert status == -signal.SIGKILL
    else:
        assert status == 1
        assert messages.count("\n") == 1
        assert f"the machine {launched.name} died" in messages


def test_launch_tells_of_a_cpu_that_dies(launch: Any) -> None:
    launched = launch("--cpus", "2")
    machine = entry(launched.name)
    assert machine is not None
    pid = machine["cpus"][1]["pid"]
    os.kill(pid, signal.SIGKILL)
    launched.read_until(f"CPU 1 is dead (pid {pid})\n", 5.0)
    after = entry(launched.name)
    assert after is not None
    assert (after["online"], after["cpus"][1]["state"]) == ("0", "dead")


def test_launch_of_a_name_that_is_taken(launch: Any) -> None:
    launched = launch("--cpus", "1")
    done = shmipi("launch", "--name", launched.name, status=1)
    assert f"a machine named {launched.name} exists already" in done.stderr
    machine = entry(launched.name)
    assert machine is not None
    assert machine["state"] == "up"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--name", "a/b"], "a machine's name has 1 to 32"),
        (["--name", ""], "a machine's name has 1 to 32"),
        (["--cpus", "0"], "0 is too small"),
        (["--cpus", "5000"], "a machine has 1 to 4096 CPUs"),
        (["--idle", "sleep"], "invalid choice: 'sleep'"),
        (["--cores", "4000"], "core 4000 cannot be used"),
    ],
)
def test_launch_of_what_cannot_be(arguments: list[str], words: str) -> None:
    assert words in here("launch", *arguments, status=2).stderr


def test_launch_on_a_terminal(terminal: Any) -> None:
    name = f"t{secrets.token_hex(6)}"
    process, screen = terminal("launch", "--name", name, "--cpus", "2")
    text = read_until(screen, "Ctrl-C ends it", 20.0)
    assert "DOORBELLS" in text
    machine = entry(name)
    assert machine is not None
    assert str(machine["cpus"][1]["pid"]) in text
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: the whole group
    read_until(screen, f"machine {name} ended", 10.0)
    assert process.wait(5.0) == 0
    assert not any(map(running, processes(machine)))


# ---- ps ------------------------------------------------------------------------------


def test_ps_shows_a_machine_as_it_is(
    boot: Any, background: Any, eventually: Any
) -> None:
    name = f"t{secrets.token_hex(6)}"
    cluster = boot(4, name=name, idle="halt", doorbell="signal")
    cluster.offline(2)
    os.kill(cluster.cpus[3].pid, signal.SIGKILL)
    eventually(lambda: cluster.cpus[3].state == "dead")
    go_on = cluster.shared("go_on", "i8")
    task = background(lambda: cluster.run(wait_for, go_on, cpus=[1]))
    eventually(lambda: (cluster.cpus[1].task or "").endswith(".wait_for"))
    eventually(
        lambda: (
            [cpu.state for cpu in cluster.cpus]
            == ["halted", "running", "offline", "dead"]
        )
    )
    machine = entry(name)
    text = shmipi("ps", "-v").stdout
    go_on[...] = 1
    task.end()
    assert machine is not None
    assert machine["cpus"] == [
        {
            "id": cpu.id,
            "pid": cpu.pid,
            "core": cpu.core,
            "state": "running" if cpu.id == 1 else cpu.state,
            "generation": cpu.generation,
            "idle": "halt",
            "queued": False,
            "task": f"{__name__}.wait_for" if cpu.id == 1 else None,
            "waits_for": None,
            "handler": None,
            "since": None,
            "ended": "killed by SIGKILL" if cpu.id == 3 else None,
        }
        for cpu in cluster.cpus
    ]
    assert 0 < machine.pop("uptime_s") < 60
    assert machine.pop("memory_bytes") == os.stat(path_of(name)).st_blocks * 512
    assert running(machine.pop("firmware_pid"))
    del machine["cpus"]
    assert machine == {
        "name": name,
        "state": "up",
        "alive": True,
        "abi": _core.ABI,
        "path": str(path_of(name)),
        "message": None,
        "ncpus": 4,
        "idle": "halt",
        "doorbell": "signal",
        "controller": "apic",
        "kick_signal": signal.SIGRTMIN + 8,
        "host_pid": os.getpid(),
        "attached": [],
        "online": "0-1",
    }
    row = next(line for line in text.splitlines() if line.startswith(name))
    assert row.split()[:7] == [name, "up", "4", "0-1", "halt", "signal", "apic"]
    assert re.search(rf"^ +1 +{cluster.cpus[1].pid} .*runs .*wait_for", text, re.M)


def wait_for(flag: Any) -> None:
    while not flag:
        time.sleep(0.001)


def test_ps_json_goes_to_a_file_and_the_table_beside_it(
    launch: Any, tmp_path: Path
) -> None:
    launched = launch("--cpus", "1")
    file = tmp_path / "ps.json"
    assert launched.name in here("ps", "--json", str(file)).stdout
    names = [machine["name"] for machine in json.loads(file.read_text())["machines"]]
    assert launched.name in names


def pages_of(name: str) -> dict[int, bytes]:
    """What is in an object, without its zeros: most of it nobody ever wrote to."""
    found, at, size = {}, 0, 4096
    with open(path_of(name), "rb", buffering=0) as file:
        end = os.fstat(file.fileno()).st_size
        while at < end:
            try:
                at = os.lseek(file.fileno(), at, os.SEEK_DATA)
            except OSError as error:
                if error.errno != errno.ENXIO:  # no data from here to the end
                    raise
                break
            for page in range(at, os.lseek(file.fileno(), at, os.SEEK_HOLE), size):
                data = os.pread(file.fileno(), size, page)
                at = page + len(data)
                if data.strip(b"\0"):
                    found[page] = data
    return found


def asleep(pid: int) -> bool:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "S"


def test_looking_changes_nothing(boot: Any, eventually: Any) -> None:
    name = f"t{secrets.token_hex(6)}"
    cluster = boot(2, name=name, idle="halt")
    cluster.call(1, os.getpid)
    for cpu in (0, 1):
        eventually(lambda cpu=cpu: cluster.cpus[cpu].state == "halted")
        eventually(lambda cpu=cpu: asleep(cluster.cpus[cpu].pid))
    before = pages_of(name)
    assert before[0].startswith(_core.MAGIC.encode())
    shmipi("ps", "-v")
    shmipi("interrupts", name)
    assert pages_of(name) == before


@contextlib.contextmanager
def object_of(data: bytes, *, locked: bool = True) -> Iterator[str]:
    """An object in /dev/shm that somebody holds the lock of, or nobody."""
    name = f"t{secrets.token_hex(6)}"
    path = path_of(name)
    path.write_bytes(data)
    os.utime(path, (time.time() - 60,) * 2)
    fd = os.open(path, os.O_RDONLY)
    try:
        if locked:
            fcntl.flock(fd, fcntl.LOCK_SH)
        yield name
    finally:
        os.close(fd)
        path.unlink(missing_ok=True)


def header(**fields: int) -> bytes:
    """The start of a machine's object, with some of its fields."""
    data = bytearray(1 << 20)
    given = {
        "abi": _core.ABI,
        "header_bytes": _core.HEADER_BYTES,
        "ncpus": 2,
        "slot_offset": 1 << 16,
        "machine_state": _core.UP,
        **fields,
    }
    data[:8] = _core.MAGIC.encode()
    for field, offset, size in _core.HEADER_FIELDS:
        if field in given:
            data[offset : offset + size] = given[field].to_bytes(size, "little")
    return bytes(data)


@pytest.mark.alone
def test_a_machine_of_another_version_is_named_and_let_alone() -> None:
    data = header(abi=_core.ABI + 7)
    with object_of(data) as name:
        machine = entry(name)
        assert machine is not None
        assert (machine["state"], machine["abi"]) == ("foreign", _core.ABI + 7)
        assert f"layout version {_core.ABI + 7}" in machine["message"]
        assert machine["ncpus"] is None
        assert f"{name}: foreign: " in here("ps").stdout
        assert "layout version" in here("interrupts", name, status=1).stderr
        assert name not in here("clean").stdout
        assert path_of(name).read_bytes() == data


@pytest.mark.parametrize(
    "data",
    [
        header(ncpus=0),
        header(ncpus=2**31),
        header(slot_offset=2**63),
        header(slot_offset=2**64 - 4096),
        header(header_bytes=96),
        header()[:200],
        header()[:12],
        b"",
        b"\xff" * 8192,
    ],
)
def test_a_damaged_object_is_no_crash(data: bytes) -> None:
    with object_of(data) as name:
        machine = entry(name)
        assert machine is not None
        assert machine["state"] in ("foreign", "starting")
        assert machine["message"]
        here("interrupts", name, status=1)
        with pytest.raises(LayoutError):
            Inspector(name).view()


def test_random_slots_are_shown_somehow() -> None:
    """Nothing in a machine's memory is trusted, or reaches a terminal as it is."""
    head = header(slot_offset=1 << 16)
    data = head[: 1 << 16] + secrets.token_bytes(len(head) - (1 << 16))
    with object_of(data) as name:
        text = shmipi("ps", "-v").stdout
        assert name not in text  # the name in the header is empty
        machine = entry(name)
        assert machine is not None
        assert len(machine["cpus"]) == 2
        assert all(c.isprintable() or c == "\n" for c in text)


@pytest.mark.alone
def test_an_inspector_reads_on_after_the_end_and_keeps_nothing_alive(
    launch: Any,
) -> None:
    launched = launch("--cpus", "2")
    with Inspector(launched.name) as inspector:
        assert inspector.alive
        assert str(inspector.view().online) == "0-1"
        flags = fcntl.fcntl(inspector._fd, fcntl.F_GETFL)
        assert flags & os.O_ACCMODE == os.O_RDONLY
        launched.kill_all()
        # The CPUs follow the firmware within a second, and with them their locks.
        deadline = time.monotonic() + 2.0
        while inspector.alive and time.monotonic() < deadline:
            time.sleep(0.01)
        assert not inspector.alive
        assert inspector.view().ncpus == 2
        [found] = [f for f in segment.find() if f.name == launched.name]
        assert not found.alive
        assert f"removed {launched.name}" in shmipi("clean").stdout
        assert not inspector.alive
        assert inspector.view().name == launched.name


# ---- clean ---------------------------------------------------------------------------


@pytest.mark.alone
def test_clean_removes_the_dead_and_only_those(launch: Any, eventually: Any) -> None:
    live = launch("--cpus", "2")
    dead = launch("--cpus", "2")
    machine = entry(dead.name)
    assert machine is not None
    dead.kill_all()
    eventually(lambda: not any(map(running, processes(machine))), 2.0)
    after = entry(dead.name)
    assert after is not None
    assert (after["state"], after["alive"]) == ("dead", False)
    assert "shmipi clean" in after["message"]
    assert "is dead" in here("interrupts", dead.name, status=1).stderr

    printed = here("clean", "--dry-run").stdout.splitlines()
    assert f"would remove {dead.name}" in printed
    assert f"would remove {live.name}" not in printed
    assert path_of(dead.name).exists()

    printed = shmipi("clean").stdout.splitlines()
    assert f"removed {dead.name}" in printed
    assert f"removed {live.name}" not in printed
    assert not path_of(dead.name).exists()
    assert entry(dead.name) is None
    still = entry(live.name)
    assert still is not None
    assert still["state"] == "up"
    assert dead.name not in here("clean").stdout


@pytest.mark.alone
def test_clean_finds_semaphores_whose_machine_is_gone() -> None:
    import posix_ipc

    name = f"t{secrets.token_hex(6)}"
    full = segment.full_name(name)
    for cpu in range(2):
        posix_ipc.Semaphore(f"/{full}.{cpu}", posix_ipc.O_CREX, mode=0o600).close()
    files = [segment.SHM / f"sem.{full}.{cpu}" for cpu in range(2)]
    try:
        # A machine that boots just now has some, too: they are left alone for a while.
        assert name not in here("clean", "--dry-run").stdout
        assert name not in here("clean").stdout
        for file in files:
            os.utime(file, (time.time() - 60,) * 2)
        assert f"would remove {name}\n" in here("clean", "--dry-run").stdout
        assert all(file.exists() for file in files)
        assert f"removed {name}\n" in shmipi("clean").stdout
        assert not any(file.exists() for file in files)
    finally:
        for file in files:
            file.unlink(missing_ok=True)


@pytest.mark.alone
def test_clean_lets_another_versions_live_machine_be() -> None:
    with object_of(header(abi=99)) as name:
        assert name not in here("clean").stdout
        assert path_of(name).exists()
    with object_of(header(abi=99), locked=False) as name:
        assert f"removed {name}\n" in here("clean").stdout
        assert not path_of(name).exists()


# ---- interrupts ----------------------------------------------------------------------


def nothing(info: object) -> None:
    pass


def test_interrupts_are_the_machines_own(boot: Any, eventually: Any) -> None:
    name = f"t{secrets.token_hex(6)}"
    cluster: Cluster = boot(3, name=name, idle="halt")
    for cpu, calls in ((1, 5), (2, 2)):
        for _ in range(calls):  # each finds it halted
            eventually(lambda cpu=cpu: cluster.cpus[cpu].state == "halted", 5.0)
            cluster.smp.smp_call_function_single(cpu, nothing)
    eventually(lambda: {cpu.state for cpu in cluster.cpus} == {"halted"}, 5.0)
    text = shmipi("interrupts", name).stdout
    assert text == cluster.interrupts()
    lines = text.splitlines()
    assert lines[0].split() == ["CPU0", "CPU1", "CPU2"]
    cells = [line.split(":") for line in lines[1:]]
    rows = {label.strip(): words.split() for label, words in cells}
    assert rows["CAL"] == ["0", "5", "2", "Function", "call", "interrupts"]
    assert rows["WAK"][:3] == ["0", "5", "2"]


def test_interrupts_of_nobody(launch: Any) -> None:
    launched = launch("--cpus", "1")
    words = shmipi("interrupts", "nobody", status=1).stderr
    assert "there is no machine nobody; running: " in words
    assert launched.name in words
    shmipi("interrupts", "no/body", status=2)
    here("interrupts", launched.name, "--interval", "1us", status=2)


def test_watching_ends_with_the_machine(launch: Any) -> None:
    launched = launch("--cpus", "2")
    with subprocess.Popen(
        [*SHMIPI, "interrupts", launched.name, "--watch", "--interval", "50ms"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=ENVIRONMENT,
    ) as watcher:
        assert watcher.stdout is not None
        read_until(watcher.stdout.fileno(), "KIC", 10.0)
        read_until(watcher.stdout.fileno(), "KIC", 10.0)
        launched.process.send_signal(signal.SIGTERM)
        launched.end()
        _, messages = watcher.communicate(timeout=5.0)
    assert (watcher.returncode, messages.decode()) == (
        0,
        f"machine {launched.name} ended\n",
    )


def test_watching_ends_with_ctrl_c_and_the_machine_goes_on(
    launch: Any, terminal: Any
) -> None:
    launched = launch("--cpus", "2")
    process, screen = terminal("interrupts", launched.name, "--watch")
    text = read_until(screen, "Kick signals taken", 10.0)
    assert "CPU1" in text
    os.killpg(process.pid, signal.SIGINT)
    assert process.wait(5.0) == 0
    machine = entry(launched.name)
    assert machine is not None
    assert machine["state"] == "up"


# ---- run -----------------------------------------------------------------------------


@pytest.fixture
def program(tmp_path: Path) -> Path:
    """A program of a user's, with functions that do what users' functions do."""
    path = tmp_path / "program.py"
    path.write_text(
        textwrap.dedent(
            """
            import asyncio, os, sys, time
            import helper  # beside it
            from shmipi import smp

            seen = []

            def hit(info):
                seen.append(info)

            def main(*args):
                me = smp.smp_processor_id()
                smp.smp_call_function(hit, me)
                print("hello from", me, *args)
                return sys.argv[1:], helper.VALUE

            def each():
                return smp.smp_processor_id() * 10

            def some():
                return None if smp.smp_processor_id() == 0 else "x"

            def boom():
                raise ValueError("no such luck")

            def one_booms():
                if smp.smp_processor_id() == 1:
                    boom()
                return "fine"

            def leave():
                sys.exit(3)

            def leave_with_words():
                sys.exit("words")

            def die():
                os._exit(1)

            def one_dies():
                cpu = smp.smp_processor_id()
                if cpu == 1:
                    os._exit(9)
                return f"of {cpu}"

            def one_is_slow():
                if smp.smp_processor_id() == 0:
                    return "quick"
                try:
                    time.sleep(60)
                finally:
                    print("cleaned up")

            async def slowly():
                await asyncio.sleep(0.001)
                return "at last"

            def forever():
                print("started", flush=True)
                while True:
                    time.sleep(0.01)

            class Thing:
                @staticmethod
                def method():
                    return 5

            number = 7
            """
        )
    )
    (tmp_path / "helper.py").write_text("VALUE = 42\n")
    return path


def test_run_calls_main_on_every_cpu(program: Path) -> None:
    lines = shmipi(
        "run", str(program), "--cpus", "3", "--idle", "halt", "--", "a", "--b"
    ).stdout.splitlines()
    assert sorted(lines[:3]) == [f"hello from {cpu} a --b" for cpu in range(3)]
    assert lines[3:] == [f"CPU {cpu}: (['a', '--b'], 42)" for cpu in range(3)]


def test_run_of_other_targets(program: Path) -> None:
    folder = program.parent
    printed = shmipi("run", "--cpus", "2", f"{program}:each").stdout
    assert printed == "CPU 0: 0\nCPU 1: 10\n"
    printed = shmipi("run", "--cpus", "2", "program.py:Thing.method", cwd=folder).stdout
    assert printed == "CPU 0: 5\nCPU 1: 5\n"
    printed = shmipi("run", "--cpus", "2", "program:some", cwd=folder).stdout
    assert printed == "CPU 1: 'x'\n"
    printed = shmipi("run", "os.path:join", "--cpus", "1", "--", "a", "--", "b").stdout
    assert printed == "CPU 0: 'a/--/b'\n"


def test_run_of_a_file_with_a_name_of_the_standard_librarys(program: Path) -> None:
    """It is run, and takes nobody's place: not the host's, nor the firmware's."""
    for name in ("random", "signal", "numpy"):
        path = program.with_name(f"{name}.py")
        path.write_text(program.read_text())
        printed = shmipi("run", "--cpus", "2", f"{path}:each").stdout
        assert printed == "CPU 0: 0\nCPU 1: 10\n"


def failing(*arguments: str, status: int = 1) -> str:
    done = subprocess.run(
        [*SHMIPI, "run", "--cpus", "3", *arguments],
        capture_output=True,
        text=True,
        env=ENVIRONMENT,
        timeout=30,
        check=False,
    )
    assert done.returncode == status, done.stderr
    return done.stderr


def test_the_users_exception_is_shown_once_with_the_users_frames(program: Path) -> None:
    text = failing(f"{program}:boom")
    assert text.startswith("CPUs 0-2 raised:\nTraceback (most recent call last):\n")
    assert text.count("Traceback") == 1
    assert text.endswith("\nValueError: no such luck\n")
    files = re.findall(r'File "(.*?)"', text)
    assert files == [str(program)]
    text = failing(f"{program}:one_booms")
    assert text.startswith("CPU 1 raised:\n")
    assert text.count("Traceback") == 1


def test_a_file_that_does_not_load(program: Path) -> None:
    program.write_text("def main(:\n")
    text = failing(str(program))
    assert text.startswith("CPUs 0-2 raised:\n")
    assert "SyntaxError" in text
    assert "importlib" not in text
    program.write_text("import no_such_module\n")
    text = failing(str(program))
    assert text.endswith("ModuleNotFoundError: No module named 'no_such_module'\n")
    assert re.findall(r'File "(.*?)"', text) == [str(program)]


def test_exit_status_of_the_user(program: Path) -> None:
    assert failing(f"{program}:leave", status=3) == ""
    assert failing(f"{program}:leave_with_words") == "words\n"


def test_a_cpu_that_dies_of_it_is_one_line(program: Path) -> None:
    words = shmipi("run", "--cpus", "2", f"{program}:die", status=1).stderr
    assert words == "shmipi run: CPUs 0-1 died: exited with status 1\n"


@pytest.mark.parametrize(
    ("target", "words"),
    [
        ("{file}:nope", "{file} has no function 'nope'"),
        ("{file}:number", "'number' of {file} is not a function"),
        ("{file}x.py", "there is no file {file}x.py"),
        ("{folder}/", "there is no file {folder}/"),
        ("no_such_module:main", "there is no module 'no_such_module'"),
        ("no_such_package.module:main", "there is no module 'no_such_package.module'"),
        ("os:no_such_function", "os has no function 'no_such_function'"),
        ("os", "'os' is neither FILE.py nor FILE.py:FUNC nor MODULE:FUNC"),
        ("", "'' is neither"),
        (":main", "is neither"),
    ],
)
def test_run_of_what_is_not_there(program: Path, target: str, words: str) -> None:
    names = {"file": program, "folder": program.parent}
    done = here("run", target.format(**names), status=2)
    assert words.format(**names) in done.stderr


def test_wrong_usage_of_run(program: Path) -> None:
    assert "arguments are required" in here("run", status=2).stderr
    done = here("run", str(program), "a", "b", status=2)
    assert "unrecognized arguments: a b: the function's own arguments go" in done.stderr
    done = here("run", str(program), "--cpus", "0", status=2)
    assert "0 is too small" in done.stderr


def test_run_tells_how_a_cpu_died_and_what_the_others_returned(program: Path) -> None:
    done = shmipi("run", "--cpus", "3", f"{program}:one_dies", status=1)
    assert done.stdout == "CPU 0: 'of 0'\nCPU 2: 'of 2'\n"
    assert done.stderr == "shmipi run: CPU 1 died: exited with status 9\n"


def test_run_with_a_timeout_interrupts_it(program: Path) -> None:
    done = shmipi(
        "run", "--cpus", "2", "--timeout", "3s", f"{program}:one_is_slow", status=124
    )
    assert done.stdout == "cleaned up\nCPU 0: 'quick'\n"
    assert done.stderr == "shmipi run: CPU 1 did not end in time\n"


def test_run_of_an_async_function(program: Path) -> None:
    done = shmipi("run", "--cpus", "2", f"{program}:slowly")
    assert done.stdout == "CPU 0: 'at last'\nCPU 1: 'at last'\n"


def test_ctrl_c_of_run_is_130_and_leaves_nothing(program: Path) -> None:
    with subprocess.Popen(
        [*SHMIPI, "run", "--cpus", "2", f"{program}:forever"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=ENVIRONMENT,
    ) as process:
        assert process.stdout is not None
        read_until(process.stdout.fileno(), "started", 20.0)
        process.send_signal(signal.SIGINT)
        _, messages = process.communicate(timeout=15.0)
    assert process.returncode == 130
    assert messages.decode() == "shmipi run: interrupted\n"


@pytest.mark.parametrize("module", ["argparse", "concurrent", "numpy"])
@pytest.mark.parametrize("how", ["program", "module"])
def test_ctrl_c_while_a_command_is_imported(
    tmp_path: Path, module: str, how: str
) -> None:
    """Before and after the command line is read: one line, and no traceback."""
    (tmp_path / f"{module}.py").write_text(
        "import os, signal\nos.kill(os.getpid(), signal.SIGINT)\n"
    )
    paths = os.pathsep.join([str(tmp_path), ENVIRONMENT["PYTHONPATH"]])
    command = SHMIPI
    if how == "program":
        command = (sys.executable, str(Path(sys.executable).with_name("shmipi")))
    done = subprocess.run(
        [*command, "interrupts", "nobody"],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        env={**ENVIRONMENT, "PYTHONPATH": paths},
        timeout=30.0,
        check=False,
    )
    assert done.returncode == 130
    assert re.fullmatch(r"shmipi( interrupts)?: interrupted\n", done.stderr), (
        done.stderr
    )


# ---- demo ----------------------------------------------------------------------------


@pytest.mark.parametrize("after", ["machine ", "calls: ", "stress: "])
def test_ctrl_c_of_demo_leaves_nothing(after: str) -> None:
    """What is left behind, `no_leaks` finds."""
    with subprocess.Popen(
        [*SHMIPI, "demo", "--cpus", "2"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**ENVIRONMENT, "PYTHONUNBUFFERED": "1"},
    ) as process:
        assert process.stdout is not None
        read_until(process.stdout.fileno(), after, 20.0)
        process.send_signal(signal.SIGINT)
        _, messages = process.communicate(timeout=15.0)
    assert process.returncode == 130, messages.decode()
    assert messages.decode() == "shmipi demo: interrupted\n"


@pytest.mark.parametrize("where", ["shmipi.cli._run", "shmipi.cli.main"])
def test_ctrl_c_while_text_is_executed_is_one_like_any_other(
    where: str, tmp_path: Path
) -> None:
    """As dataclasses do at an import: CPython remembers it until a `-m` ends."""
    (tmp_path / "prog.py").write_text(
        f"""
import sys
from unittest import mock
import shmipi.cli
from shmipi.__main__ import main
def interrupted(*_):
    exec("raise KeyboardInterrupt")
with mock.patch({where!r}, interrupted):
    status = main()
sys.exit(status)
"""
    )
    done = subprocess.run(
        [sys.executable, "-m", "prog"],
        capture_output=True,
        text=True,
        timeout=60,
        cwd=tmp_path,
    )
    assert (done.returncode, done.stderr) == (130, "shmipi: interrupted\n")


def test_demo_shows_it_all() -> None:
    lines = shmipi("demo", "--cpus", "3", timeout=100.0).stdout.splitlines()
    assert re.match(r"machine \w+: 3 CPUs on \d cores?, idle=\w+, doorbell=", lines[0])
    text = "\n".join(lines)
    for call, came, travelled in (
        ("call(2, os.getpid)", r"pid \d+", r"1 csd"),
        ("call(2, lambda x: x * factor, 7)", "42", "1 csd"),
        ("call(2, int, 'seven')", "ValueError", "1 csd"),
        ("submit(cpu, sum, range(1000)) to all", "1498500 of 3", "3 csds"),
        ("run(whoami): a task on every CPU", "0-2", "3 csds"),
        ("on_each_cpu(count, wait=True)", "ran on 3 of 3", "3 csds"),
        ("256 calls to one CPU, wait=False", "256 ran", "256 csds"),
        ("CPU 0 calls CPU 2, then itself", r"\[2, 0\]", "1 run inline"),
        ("call(2, ...) while it sleeps in a task", r"\d us", "1 kick signal"),
        ("online(2)", r"back as pid \d+", "1 csd"),
    ):
        row = next(line for line in lines if line.startswith(f"  {call} "))
        assert re.search(f"{came}.* {travelled}", row[len(call) :])
    assert "  lost 0, duplicated 0, errors 0\n" in text
    if len(os.sched_getaffinity(0)) > 1:
        rows = re.findall(r"^(polling|halted|running), .* us ", text, re.M)
        assert set(rows) == {"polling", "halted", "running"}
        assert re.match(r"SUCCESS: \d+ calls, .* us to a polling CPU, ", lines[-1])
