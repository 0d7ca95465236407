"""What a machine finds where it is started: signals, programs imported, limits.

Each test is a program of its own: what it changes is the process's.
"""

import os
import subprocess
import sys

import pytest

from shmipi.machine import doorbells

DESCRIPTORS = [bell.name for bell in doorbells.BY_NAME.values() if bell.is_descriptor]

# ---- signals that are ignored or blocked ---------------------------------------------


@pytest.mark.parametrize(
    "before",
    [
        "signal.signal(signal.SIGCHLD, signal.SIG_IGN)",
        "signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGCHLD, signal.SIGTERM})",
    ],
    ids=["ignored", "blocked"],
)
def test_deaths_are_noticed_where_sigchld_is_ignored_or_blocked(script, before):
    """As daemons are started: a CPU's death is seen, and a task sees its children's."""
    done = script(
        f"""
        import os, signal, subprocess, sys, time
        {before}
        from shmipi import Cluster, CpuDiedError, CpuOfflineError

        def status():
            code = "raise SystemExit(3)"
            return subprocess.run([sys.executable, "-c", code]).returncode

        with Cluster(3, idle="halt") as cluster:
            print(cluster.run(status, cpus=[2]))
            future = cluster.submit(1, time.sleep, 30)
            os.kill(cluster.cpus[1].pid, signal.SIGKILL)
            print(type(future.exception(10)).__name__)
            end = time.monotonic() + 10  # the others may be on their way to sleep
            while time.monotonic() < end:
                states = [cpu.state for cpu in cluster.cpus]
                if states == ["halted", "dead", "halted"]:
                    break
                time.sleep(0.001)
            print(states)
            cluster.online(1)
            print(cluster.call(1, int, "7", timeout=10), cluster.cpus[1].generation)
            firmware = cluster._machine.firmware_pid
        print(os.path.exists(f"/proc/{{firmware}}"))
        """,
        timeout=40,
    )
    assert done.text.splitlines() == [
        "[3]",
        "CpuDiedError",
        "['halted', 'dead', 'halted']",
        "7 2",
        "False",
    ]


# ---- a program that boots at its top level -------------------------------------------

#: It counts how often it is begun: one that is imported by the CPUs that it boots must
#: not go on for ever where nothing stops it.
PROGRAM = """
import os, sys
from shmipi import Cluster, smp
with open({count!r}, "a") as file:
    file.write("x")
if os.path.getsize({count!r}) > 12:
    os._exit(9)

def work(*args):
    return smp.smp_processor_id()

with Cluster(2, idle="halt") as cluster:
    print(cluster.call(1, work))
"""


@pytest.fixture
def program(tmp_path):
    """The folder of `prog.py`, which boots unguarded, and how often it has begun."""
    count = tmp_path / "count"
    (tmp_path / "prog.py").write_text(PROGRAM.format(count=str(count)))
    return tmp_path, lambda: len(count.read_text())


def run_in(folder, *words):
    return subprocess.run(
        [sys.executable, *words],
        cwd=folder,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
    )


@pytest.mark.parametrize("target", ["prog.py", "prog.py:work", "prog:work"])
def test_run_of_a_program_that_boots_at_its_top_level(program, target):
    """One error that shows the idiom, and no process: each CPU has begun it once."""
    folder, begun = program
    done = run_in(folder, "-m", "shmipi", "run", "--cpus", "3", target)
    assert done.returncode == 1, done
    assert done.stdout == ""
    assert done.stderr.startswith("shmipi run: ")
    assert done.stderr.count('if __name__ == "__main__":') == 1
    assert "prog.py, line 12" in done.stderr
    assert "Traceback" not in done.stderr
    assert begun() == 3


@pytest.mark.parametrize("words", [("prog.py",), ("-m", "prog")])
def test_a_program_without_a_guard_works_where_nobody_imports_it(program, words):
    folder, begun = program
    done = run_in(folder, *words)
    assert (done.returncode, done.stdout, done.stderr) == (0, "1\n", "")
    assert begun() == 1


@pytest.mark.parametrize(
    "send",
    [
        "cluster.call(1, {f})",
        "cluster.run({f}, cpus=[1])",
        "cluster.submit(1, {f}).result(30)",
        "cluster.smp.smp_call_function_single(1, {f}, None, True)",
    ],
)
def test_a_function_of_a_module_that_boots_at_its_top_level(program, send):
    """By name it travels, so the CPU imports its module: refused, and typed."""
    folder, begun = program
    (folder / "main.py").write_text(
        f"""
import sys, types
from shmipi import Cluster, ImportBootError, RemoteCallError
# Known here without being imported, as if it had booted its machine already.
prog = types.ModuleType("prog")
exec("def work(*args): return 1", prog.__dict__)
sys.modules["prog"] = prog
with Cluster(2, idle="halt") as cluster:
    try:
        {send.format(f="prog.work")}
    except RemoteCallError as error:
        cause = error.__cause__
        print(type(cause).__name__, "if __name__ ==" in str(cause))
    print(cluster.call(1, abs, -1))
"""
    )
    done = run_in(folder, "main.py")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == "ImportBootError True\n1\n"
    assert begun() == 1


# ---- standard files that are closed --------------------------------------------------


@pytest.mark.parametrize(
    "closed", [(1,), (2,), (0, 1, 2), (0,)], ids=["stdout", "stderr", "all", "stdin"]
)
@pytest.mark.parametrize("doorbell", ["futex", *DESCRIPTORS])
def test_standard_files_that_are_closed(tmp_path, closed, doorbell):
    """A machine boots, and what is printed gets into no file and no socket of ours."""
    program = tmp_path / "prog.py"
    program.write_text(
        f"""
import os, sys
from shmipi import Cluster, smp
mine = os.open("mine", os.O_RDWR | os.O_CREAT)  # takes the first number of these

def say(text):
    print(text + "\\n", end="", flush=True)
    print(text + "\\n", end="", file=sys.stderr, flush=True)
    os.system("echo system")  # the C library's idea of standard output
    return smp.smp_processor_id()

with Cluster(2, idle="halt", doorbell={doorbell!r}, name=sys.argv[1]) as cluster:
    answers = cluster.run(say, "from a task"), cluster.call(1, say, "from a handler")
    os.kill(cluster.cpus[0].pid, 9)
    while cluster.cpus[0].state != "dead":
        pass
    cluster.online(0)
    answers += (cluster.submit(0, int, "7").result(10),)
assert os.pread(mine, 100, 0) == b"", os.pread(mine, 100, 0)
with open("answers", "w") as file:
    file.write(repr(answers))
"""
    )
    command = f'exec "$@" {" ".join(f"{n}>&-" for n in closed)}'
    done = subprocess.run(
        ["sh", "-c", command, "sh", sys.executable, program.name, f"cl{os.getpid()}"],
        cwd=tmp_path,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        timeout=60,
    )
    assert done.returncode == 0, done
    assert (tmp_path / "answers").read_text() == "([0, 1], 1, 7)"
    text = b"from a task\nfrom a task\nfrom a handler\n"
    if 1 not in closed:
        assert sorted(done.stdout.replace(b"system\n", b"").split()) == sorted(
            text.split()
        )
    if 2 not in closed:
        assert sorted(done.stderr.split()) == sorted(text.split())


# ---- where modules are found ---------------------------------------------------------


def test_what_a_program_added_to_its_path_is_there_for_the_machine_too(tmp_path):
    """As in a PEX file: no module is where the interpreter looks by itself."""
    long = [str(tmp_path / ("x" * 200 + str(n))) for n in range(1000)]
    (tmp_path / "json.py").write_text("raise SystemExit('the wrong json')")
    program = f"""
import sys
sys.path[:] = {sys.path!r} + {long!r}
import os
from shmipi import Cluster
with Cluster(2, idle="halt") as cluster:
    print(cluster.call(1, os.getpid) == cluster.cpus[1].pid)
    print(cluster.call(1, lambda: sys.path[-1]) == {long[-1]!r})
"""
    file = tmp_path / "program.py"
    file.write_text(program)
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-S", str(file)],
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=40,
        check=False,
    )
    assert (done.stdout, done.stderr) == ("True\nTrue\n", "")
