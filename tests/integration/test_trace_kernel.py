"""``shmipi trace kernel``: this kernel's IPIs, where one may record them."""

import errno
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from shmipi import TracefsError, cli
from shmipi.machine.topology import usable_cores
from shmipi.trace import ftrace, matching, script, tracefs

# Two threads, on a core each, that wake each other: in front of whatever runs there.
BUSY = """
import os, sys, threading
cores = [int(core) for core in sys.argv[1:]]
bells = threading.Semaphore(0), threading.Semaphore(0)
def play(own):
    os.sched_setaffinity(0, {cores[own]})
    os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1))
    for _ in range(100):
        if own == 0:
            bells[1].release()
        bells[own].acquire()
        if own == 1:
            bells[0].release()
threads = [threading.Thread(target=play, args=(own,)) for own in (0, 1)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
"""
HERE = [sys.executable, "-m", "shmipi"]
#: Where a test switches nothing on: what others have there stays as it is.
GLOBAL = ("tracing_on", "trace_clock", "buffer_size_kb", "set_event", "trace_options")


@pytest.fixture(scope="module")
def root():
    """Return the root of tracefs. Skips where there is none, or one may not."""
    try:
        path, mount = tracefs._opened()
    except TracefsError as error:
        pytest.skip(str(error))
    yield path
    if mount >= 0:
        os.close(mount)


def state_of(root):
    instances = {n for n in os.listdir(root / "instances") if n.startswith("shmipi.")}
    return instances, [(root / name).read_text() for name in GLOBAL]


def of_program(root, pid):
    names = os.listdir(root / "instances")
    return [name for name in names if name.startswith(f"shmipi.{pid}.")]


@pytest.fixture
def recorder(root, tmp_path, eventually):
    """Return what starts one whose command runs, as (recorder, pid of the command)."""
    started = []

    def start(*words, output="out.ftrace", **options):
        told = tmp_path / "pid"
        script = 'echo $$ >"$0.new"; mv "$0.new" "$0"; exec "$@"'
        command = ["sh", "-c", script, str(told), *words]
        arguments = ["trace", "kernel", "-o", str(tmp_path / output), "--", *command]
        program = subprocess.Popen(
            [*HERE, *arguments], stderr=subprocess.PIPE, text=True, **options
        )
        started.append(program)
        eventually(told.exists, 20)
        return program, int(told.read_text())

    yield start
    for program in started:
        if program.poll() is None:
            program.kill()
        program.communicate()


def test_a_command_is_recorded_imported_and_replayed(root, tmp_path, capfd):
    before = state_of(root)
    cores = [str(core) for core in usable_cores()[:2]]
    if len(cores) < 2:
        pytest.skip("one core interrupts nobody")
    target = tmp_path / "busy.ftrace.xz"
    program = [sys.executable, "-c", f"{BUSY}\nprint('ran'); raise SystemExit(3)"]
    args = ["trace", "kernel", "-o", str(target), "--", *program, *cores]
    assert cli.main(args) == 3
    assert state_of(root) == before
    trace = ftrace.read(target)
    out, err = capfd.readouterr()
    assert out == "ran\n"
    assert err == f"{target}: {len(trace.records)} events\n"
    assert trace.warnings == []
    assert trace.in_buffer == trace.written == len(trace.records)
    for event in ("sched_switch", "sched_waking", "sched_wakeup"):
        assert trace.events[event] >= 100, event
    traffic = matching.match(trace)
    # Each wakes the other a hundred times: by an IPI, or by a store to one that polls.
    woken = traffic.entered.total() + trace.events["sched_wake_idle_without_ipi"]
    assert woken >= 100
    told = traffic.as_dict()
    assert told["entries_unmatched"] <= 2 * trace.ncpus  # under way when it began
    for vector, counts in told["ipi"].items():
        assert counts["entries_without_send"] <= 2 * trace.ncpus, vector
    written = script.write(trace, traffic)
    assert sum(map(len, written.steps)) > len(traffic.sent)
    assert cli.main(["trace", "import", str(target)]) == 0
    assert cli.main(["replay", str(target), "--asap"]) == 0
    assert "calls queued" in capfd.readouterr().out
    assert cli.main(args) == 2
    assert "is there already: -f overwrites it" in capfd.readouterr().err


def test_what_did_not_fit_is_counted_and_said(root, tmp_path, capfd):
    target = tmp_path / "lost.ftrace.gz"
    cores = [str(core) for core in usable_cores()[:2]] * 2
    program = [sys.executable, "-c", BUSY, *cores[:2]]
    args = ["trace", "kernel", "-o", str(target), "--buffer-kib", "16", "--", *program]
    assert cli.main(args) == 0
    err = capfd.readouterr().err
    trace = ftrace.read(target)
    lost = trace.written - trace.in_buffer
    assert lost > 0
    assert f"{len(trace.records)} events, {lost} lost: give more --buffer-kib" in err
    assert any("were overwritten" in warning for warning in trace.warnings)


def test_signals_end_the_command_and_keep_what_was_recorded(recorder, tmp_path, root):
    """SIGTERM and SIGHUP are passed on, Ctrl-C the terminal gives to both."""
    before = state_of(root)
    for number in (signal.SIGTERM, signal.SIGHUP):
        program, pid = recorder("sleep", "60", output=f"{number}.ftrace")
        program.send_signal(number)
        assert program.wait(20) == 128 + number
        assert not Path(f"/proc/{pid}").exists()
        assert ftrace.read(tmp_path / f"{number}.ftrace").records
        (tmp_path / "pid").unlink()
    program, pid = recorder("sleep", "60", output="int", start_new_session=True)
    program.send_signal(signal.SIGINT)  # this one alone: it waits for the command
    time.sleep(0.1)
    assert program.poll() is None
    os.killpg(program.pid, signal.SIGINT)
    assert program.wait(20) == 130
    assert ftrace.read(tmp_path / "int").records
    (tmp_path / "pid").unlink()
    program, pid = recorder("sleep", "60", output="killed")
    os.kill(pid, signal.SIGKILL)
    assert program.wait(20) == 137
    assert ftrace.read(tmp_path / "killed").records
    assert state_of(root) == before


def test_what_a_killed_recorder_leaves_is_cleaned(root, recorder, capfd):
    program, pid = recorder("sleep", "60")
    (name,) = of_program(root, program.pid)
    assert name not in tracefs.leftovers()
    assert name not in tracefs.clean()  # its owner lives
    assert of_program(root, program.pid) == [name]
    program.kill()
    program.wait()
    os.kill(pid, signal.SIGKILL)
    assert of_program(root, program.pid) == [name]
    assert cli.main(["clean", "--dry-run"]) == 0
    assert f"would remove instance {name} of tracefs\n" in capfd.readouterr().out
    assert of_program(root, program.pid) == [name]
    assert cli.main(["clean"]) == 0
    assert f"removed instance {name} of tracefs\n" in capfd.readouterr().out
    assert not of_program(root, program.pid)


def test_a_cleaner_that_is_faster_than_the_lock(root, monkeypatch):
    """An owner whose instance was taken for a dead one's makes another."""
    locked, cleaned = tracefs._locked, []

    def late(path):
        if not cleaned:
            cleaned.extend(tracefs.clean())
            assert path.name in cleaned
        return locked(path)

    monkeypatch.setattr(tracefs, "_locked", late)
    instance = tracefs.Instance(buffer_kib=64)
    try:
        assert instance.path.name not in cleaned
        assert instance.path.is_dir()
        assert instance.path.name not in tracefs.leftovers()
    finally:
        instance.close()
    assert not instance.path.exists()


@pytest.mark.parametrize(
    ("args", "status", "said"),
    [
        ([], 2, "give -- and a command, such as -- sleep 5"),
        (["--"], 2, "give -- and a command"),
        (["--", "/no/such/program"], 127, "/no/such/program: No such file"),
        (["--", "/etc/passwd"], 127, "/etc/passwd: Permission denied"),
        (["--", "a\0b"], 127, "embedded null byte"),
        (["--", ""], 127, ""),
        (["-o", "/no/such/dir/file", "--", "true"], 2, "no directory '/no/such/dir'"),
        (["-o", "/tmp", "-f", "--", "true"], 2, "is not the name of a file"),
        (["-o", "", "--", "true"], 2, "is not the name of a file"),
        (["--buffer-kib", "0", "--", "true"], 2, "0 is too small: at least 16"),
        (["--buffer-kib", "x", "--", "true"], 2, "'x' is not a whole number"),
        (["--bogus", "--", "true"], 2, "--bogus"),
    ],
)
def test_what_cannot_be_recorded(
    root, args, status, said, tmp_path, monkeypatch, capfd
):
    monkeypatch.chdir(tmp_path)
    before = state_of(root)
    assert cli.main(["trace", "kernel", *args]) == status
    err = capfd.readouterr().err
    assert said in err
    assert err.count("\n") == 1
    assert state_of(root) == before
    assert not os.listdir(tmp_path)


def test_a_file_that_cannot_be_written_leaves_no_instance(root, capfd):
    if not os.path.exists("/dev/full"):
        pytest.skip("no /dev/full")
    before = state_of(root)
    args = ["trace", "kernel", "-f", "-o", "/dev/full", "--", "true"]
    assert cli.main(args) == 1
    assert "cannot write /dev/full: No space left" in capfd.readouterr().err
    assert state_of(root) == before
    assert Path("/dev/full").exists()


#: Somebody who is not root, and may not even read this tree: all is imported before.
NOBODY = """
import os, sys
import shmipi.cli.clean, shmipi.cli.trace, shmipi.machine.inspect, shmipi.trace.tracefs
from shmipi import cli
if os.geteuid() == 0:
    os.setgroups([])
    os.setgid(65534)
    os.setuid(65534)
raise SystemExit(cli.main(sys.argv[1:]))
"""


def test_without_root_it_says_what_to_do():
    def ran(*args):
        done = subprocess.run(
            [sys.executable, "-c", NOBODY, *args],
            check=False,
            capture_output=True,
            text=True,
            cwd="/tmp",
        )
        return done.returncode, done.stderr

    assert ran("trace", "kernel", "-o", "/tmp/never", "--", "true") == (
        1,
        "shmipi trace: the kernel's tracefs cannot be had: it takes root"
        " (CAP_SYS_ADMIN), as with sudo\n",
    )
    assert not os.path.exists("/tmp/never")
    assert ran("clean") == (0, "")


def test_where_there_is_no_tracefs(monkeypatch, tmp_path, capfd):
    for code, said in (
        (errno.ENODEV, "this kernel has no tracefs"),
        (errno.ENOSYS, "mount -t tracefs"),
        (errno.EIO, os.strerror(errno.EIO)),
    ):

        def refuse(code=code):
            raise OSError(code, os.strerror(code))

        monkeypatch.setattr(tracefs, "_mount", refuse)
        monkeypatch.setattr(tracefs, "_mounted", lambda: None)
        with pytest.raises(TracefsError, match=said) as raised:
            tracefs.Instance()
        assert raised.value.errno == code
        assert isinstance(raised.value, OSError)
        target = str(tmp_path / "never")
        assert cli.main(["trace", "kernel", "-o", target, "--", "true"]) == 1
        assert said in capfd.readouterr().err
        assert tracefs.clean() == tracefs.leftovers() == []
    assert not os.listdir(tmp_path)


def test_a_mounted_tracefs_is_found_where_it_is(monkeypatch, tmp_path):
    """By the list of mounts: to look at debugfs' would mount it, for everybody."""
    here = tmp_path / "a b"
    (here / "instances").mkdir(parents=True)
    mounts = tmp_path / "mounts"
    escaped = str(here).replace(" ", "\\040")
    mounts.write_text(
        "proc /proc proc rw 0 0\nnodev /no/such/place tracefs ro 0 0\n"
        f"nodev {escaped} tracefs rw 0 0\n"
    )
    monkeypatch.setattr(tracefs, "_MOUNTS", mounts)
    assert tracefs._opened() == (here, -1)
