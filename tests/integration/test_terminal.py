"""What commands show on terminals of every kind, in pipes, and where nothing fits."""

import contextlib
import fcntl
import json
import os
import pty
import re
import secrets
import select
import signal
import struct
import subprocess
import sys
import termios
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

HOME = Path(__file__).resolve().parents[2]
SHMIPI = (sys.executable, "-m", "shmipi")
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(HOME)}
for name in ("PYTHONUNBUFFERED", "COLUMNS", "LINES", "TERM"):
    ENVIRONMENT.pop(name, None)
CONTROL = re.compile(r"\x1b\[[0-9;?]*[a-zA-Z]")


def shmipi(
    *arguments: str, status: int | None = 0, columns: int = 0, **options: Any
) -> str:
    """Run a command to its end: its output, or its messages if it is to fail."""
    done = subprocess.run(
        [*SHMIPI, *arguments],
        stdin=subprocess.DEVNULL,
        stdout=options.pop("stdout", subprocess.PIPE),
        stderr=subprocess.PIPE,
        text=True,
        env={**ENVIRONMENT, **({"COLUMNS": str(columns)} if columns else {})},
        timeout=40.0,
        check=False,
        **options,
    )
    assert "Traceback" not in done.stderr
    if status is None:  # what it says to people is not looked at
        assert done.returncode == 0, (done.stdout, done.stderr)
        return str(done.stdout)
    assert done.returncode == status, (done.stdout, done.stderr)
    if status == 0:
        assert done.stderr == ""
        return str(done.stdout)
    return done.stderr


class Terminal:
    """A command on a terminal. `text` is what it has shown so far."""

    def __init__(self, *arguments: str, term: str, width: int = 80) -> None:
        self.screen, slave = pty.openpty()
        size = struct.pack("HHHH", 24, width, 0, 0)
        fcntl.ioctl(slave, termios.TIOCSWINSZ, size)
        self.process = subprocess.Popen(
            [*SHMIPI, *arguments],
            stdin=slave,
            stdout=slave,
            stderr=slave,
            env={**ENVIRONMENT, "TERM": term},
            start_new_session=True,
        )
        os.close(slave)
        self.text = ""

    def read_until(self, words: str, seconds: float = 20.0) -> str:
        deadline = time.monotonic() + seconds
        while words not in self.text:
            left = max(0.0, deadline - time.monotonic())
            ready, _, _ = select.select([self.screen], [], [], left)
            assert ready, f"no {words!r}, but:\n{self.text}"
            self.text += os.read(self.screen, 65536).decode().replace("\r\n", "\n")
        return self.text

    def interrupt(self) -> int:
        """Press Ctrl-C; its status."""
        os.killpg(self.process.pid, signal.SIGINT)
        return self.process.wait(10.0)


@pytest.fixture
def terminal() -> Iterator[Callable[..., Terminal]]:
    opened: list[Terminal] = []

    def start(*arguments: str, **options: Any) -> Terminal:
        opened.append(Terminal(*arguments, **options))
        return opened[-1]

    yield start
    for made in opened:
        if made.process.poll() is None:
            made.process.kill()
        made.process.wait(10.0)
        os.close(made.screen)


@contextlib.contextmanager
def started(*arguments: str, **options: Any) -> Iterator[subprocess.Popen[str]]:
    """A command with pipes, which is gone afterwards."""
    with subprocess.Popen(
        [*SHMIPI, *arguments],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=ENVIRONMENT,
        **options,
    ) as process:
        try:
            yield process
        finally:
            if process.poll() is None:
                process.kill()


def new_name() -> str:
    return f"t{secrets.token_hex(6)}"


def machine(name: str) -> dict[str, Any]:
    """What `shmipi ps` says of it."""
    listed = json.loads(shmipi("ps", "--json", "-"))["machines"]
    [found] = [entry for entry in listed if entry["name"] == name]
    return dict(found)


def first_table(shown: Terminal) -> str:
    """What `shmipi launch` shows first: later ones may have been read with it."""
    end = "Ctrl-C ends it"
    return CONTROL.sub("", shown.read_until(end).partition(end)[0])


# ---- terminals -----------------------------------------------------------------------


def test_launch_where_nothing_can_be_redrawn(terminal: Any) -> None:
    name = new_name()
    shown = terminal("launch", "--name", name, "--cpus", "2", term="")
    text = shown.read_until("Ctrl-C ends it\n")
    assert "\x1b" not in text
    assert "DOORBELLS" in text
    assert len(re.findall(r"^ +[01] +\d+ +\d+  (halted|polling) ", text, re.M)) == 2
    os.kill(machine(name)["cpus"][1]["pid"], signal.SIGKILL)
    shown.read_until("CPU 1 is dead ")
    assert shown.interrupt() == 0


def test_watching_where_nothing_can_be_redrawn(boot: Any, terminal: Any) -> None:
    name = new_name()
    boot(2, name=name, idle="halt")
    shown = terminal(
        *("interrupts", name, "--watch", "--interval", "50ms"), term="dumb"
    )
    text = shown.read_until("BAD:")
    assert "CPU1" in text
    assert "\x1b" not in text
    assert shown.interrupt() == 0


@pytest.mark.parametrize("width", [80, 40])
def test_launch_cuts_nothing(terminal: Any, width: int) -> None:
    """Its nine columns have no room side by side on the narrower one."""
    shown = terminal(
        *("launch", "--cpus", "3", "--idle", "halt"), term="xterm", width=width
    )
    text = first_table(shown)
    assert max(len(line) for line in text.splitlines()) <= width
    for column in (
        *("CPU", "PID", "CORE", "STATE", "GENERATION"),
        *("CALLS", "DOORBELLS", "KICKS", "HALTS"),
    ):
        assert column in text
    tables = 1 if width == 80 else 2
    assert len(re.findall(r"^  2 ", text, re.M)) == tables
    assert shown.interrupt() == 0


def test_more_cpus_than_the_screen_has_lines(terminal: Any) -> None:
    shown = terminal("launch", "--cpus", "30", "--idle", "halt", term="xterm")
    text = first_table(shown)
    [more] = re.findall(r"^and (\d+) more", text, re.M)
    # One that has just come up may not sleep yet.
    rows = len(re.findall(r"^ +\d+ +\d+ +\d+  (halted|polling)", text, re.M))
    assert rows + int(more) == 30
    assert shown.interrupt() == 0


@pytest.mark.parametrize("width", [80, 40])
def test_watching_cuts_nothing_silently(boot: Any, terminal: Any, width: int) -> None:
    name = new_name()
    call_halted(boot(9, name=name, idle="halt"), 8)
    shown = terminal("interrupts", name, "--watch", term="xterm", width=width)
    shown.read_until("more lines")
    text = CONTROL.sub("", shown.text)
    assert max(len(line) for line in text.splitlines()) <= width
    assert "CPU0" in text
    assert shown.interrupt() == 0
    narrow = ("--nonzero", "--cpus", "8")
    shown = terminal("interrupts", name, "--watch", *narrow, term="xterm", width=width)
    text = CONTROL.sub("", shown.read_until("CAL"))
    assert "CPU8" in text
    assert "more lines" not in text
    assert shown.interrupt() == 0


@pytest.mark.parametrize("width", [80, 40])
def test_ps_fits(boot: Any, width: int) -> None:
    name = new_name()
    cluster = boot(3, name=name, idle="halt", controller="mips-gic")
    text = shmipi("ps", "-v", columns=width)
    # What is not of this machine is somebody else's: only the width is ours.
    assert max(len(line) for line in text.splitlines()) <= width
    assert "mips-gic" in text
    for cpu in cluster.cpus:
        assert str(cpu.pid) in text
    wide = shmipi("ps", "-v")  # a pipe: one line for each machine
    assert re.search(rf"^{name} .* mips-gic .* KiB$", wide, re.M)


# ---- interrupts ----------------------------------------------------------------------


def call_halted(cluster: Any, cpu: int) -> None:
    """Call it until that was an interrupt: a CPU that still polls needs none."""
    while not counts(cluster.interrupts())["CAL"][cpu]:
        cluster.smp.smp_call_function_single(cpu, bool)
        time.sleep(0.005)


def counts(text: str) -> dict[str, list[int]]:
    """The rows of a text, of all its tables."""
    found: dict[str, list[int]] = {}
    for label, cells in re.findall(r"^ *(\w+):((?: +\d+\b)+)", text, re.M):
        found.setdefault(label, []).extend(map(int, cells.split()))
    return found


@pytest.mark.parametrize("width", [0, 80, 40])
def test_interrupts_fold(boot: Any, eventually: Any, width: int) -> None:
    name = new_name()
    cluster = boot(13, name=name, idle="halt")
    for cpu in range(13):
        for _ in range(cpu):
            time.sleep(0.001)
            cluster.smp.smp_call_function_single(cpu, bool)
    halted = 3  # enum shi_state: nothing that was sent is still to be taken
    slot = cluster._machine.slot
    eventually(lambda: all(slot(cpu).state == halted for cpu in range(13)))
    text = shmipi("interrupts", name, columns=width)
    whole = cluster.interrupts()
    assert counts(text) == counts(whole)
    assert re.findall(r"CPU\d+", text) == [f"CPU{n}" for n in range(13)]
    for line in whole.splitlines()[1:]:
        words = line.rsplit("  ", 1)[1].split()
        assert " ".join(words) in " ".join(text.split())
    if width:
        assert max(len(line) for line in text.splitlines()) <= width
    else:
        assert text == whole


def test_interrupts_of_some_cpus_and_rows(boot: Any) -> None:
    name = new_name()
    cluster = boot(4, name=name, idle="halt")
    call_halted(cluster, 2)
    assert counts(shmipi("interrupts", name, "--nonzero", "--cpus", "3")) == {}
    rows = counts(shmipi("interrupts", name, "--nonzero", "--cpus", "2-3"))
    assert rows["CAL"] == [counts(cluster.interrupts())["CAL"][2], 0]
    assert "NMI" not in rows
    document = json.loads(
        shmipi("interrupts", name, "--nonzero", "--cpus", "2-3", "--json", "-")
    )
    assert document["schema"] == "shmipi.interrupts/1"
    assert (document["ncpus"], document["cpus"]) == (4, [2, 3])
    assert document["seconds"] is None
    assert {row["label"]: row["counts"] for row in document["rows"]} == rows
    wrong = shmipi("interrupts", name, "--cpus", "2-4", status=2)
    assert wrong == (f"shmipi interrupts: --cpus is 2-4: machine {name} has CPUs 0-3\n")
    shmipi("interrupts", name, "--watch", "--json", "-", status=2)


def test_deltas_are_what_came_meanwhile(boot: Any) -> None:
    name = new_name()
    cluster = boot(2, name=name, idle="halt")
    for _ in range(50):
        cluster.smp.smp_call_function_single(1, bool)
    options = ("--delta", "--interval", "1500ms", "--json", "-")
    with started("interrupts", name, *options) as process:
        # Its first look is somewhere in here; the calls after it are few.
        for _ in range(20):
            time.sleep(0.1)
            cluster.smp.smp_call_function_single(1, bool)
        out, messages = process.communicate(timeout=20.0)
    assert (process.returncode, messages) == (0, "")
    document = json.loads(out)
    rows = {row["label"]: row["counts"] for row in document["rows"]}
    assert 1.4 < document["seconds"] < 30.0
    assert rows["CAL"][0] == 0
    assert rows["CAL"][1] + rows["ELI"][0] <= 20


# ---- explain -------------------------------------------------------------------------


def test_explain_fits_the_terminal() -> None:
    """What a step is in shmipi goes below the kernel's function, and nothing is cut."""
    options = ("explain", "--controller", "xive")
    wide = shmipi(*options, columns=400)
    assert max(map(len, wide.splitlines())) > 80
    for columns in (80, 50):
        narrow = shmipi(*options, columns=columns).splitlines()
        assert max(map(len, narrow)) <= columns
        text = "".join("".join(narrow).split())
        for words in (
            "smp_muxed_ipi_set_message(1, PPC_MSG_CALL_FUNCTION)",
            "a call_single_data is filled",
            "func has returned",
            "in the kernel",
        ):
            assert "".join(words.split()) in text


# ---- run -----------------------------------------------------------------------------


@pytest.fixture
def program(tmp_path: Path) -> str:
    path = tmp_path / "program.py"
    path.write_text(
        textwrap.dedent(
            """
            import os, subprocess, sys, time
            from shmipi import irq, smp

            def main():
                me = smp.smp_processor_id()
                for n in range(300):
                    print(n, "x" * 300)
                for n in range(100):
                    os.write(1, b"half of ")
                    os.write(1, b"a line\\n")
                print("to stderr", file=sys.stderr)
                subprocess.run(["sh", "-c", "echo a child; printf 'no end'"])
                return me

            def flood():
                while True:
                    print("x" * 100)

            def one_dies():
                if not smp.smp_processor_id():
                    os.kill(os.getpid(), 9)
                time.sleep(60)

            def chip():
                return type(irq.chip()).__name__
            """
        )
    )
    return str(path)


def test_tagged_lines_are_whole_and_in_order(program: str) -> None:
    with started("run", "--tag", "--cpus", "3", program) as process:
        out, messages = process.communicate(timeout=40.0)
    assert process.returncode == 0, messages
    lines = out.splitlines()
    assert lines[-3:] == [f"CPU {cpu}: {cpu}" for cpu in range(3)]
    for cpu in range(3):
        mine = [line for line in lines if line.startswith(f"CPU {cpu}| ")]
        own = [line.removeprefix(f"CPU {cpu}| ") for line in mine]
        assert own == [
            *(f"{n} {'x' * 300}" for n in range(300)),
            *["half of a line"] * 100,
            "a child",
            "no end",
        ]
    assert len(lines) == 3 * 402 + 3
    assert sorted(messages.splitlines()) == [
        f"CPU {cpu}| to stderr" for cpu in range(3)
    ]


@pytest.mark.parametrize("end", [signal.SIGTERM, signal.SIGHUP, signal.SIGKILL])
def test_a_tagged_run_that_is_killed_leaves_no_pipes(
    program: str, tmp_path: Path, end: signal.Signals
) -> None:
    folder = tmp_path / "pipes"
    folder.mkdir()
    with subprocess.Popen(
        [*SHMIPI, "run", "--tag", "--cpus", "2", f"{program}:flood"],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**ENVIRONMENT, "TMPDIR": str(folder)},
    ) as process:
        assert process.stdout is not None
        process.stdout.readline()
        process.send_signal(end)
        process.communicate(timeout=20.0)
    assert process.returncode == -end
    assert list(folder.iterdir()) == []


def test_a_tagged_run_of_too_many_cpus_is_wrong_usage() -> None:
    """Before a pipe is made for each of them."""
    words = shmipi("run", "--tag", "--cpus", "9" * 12, "os:getpid", status=2)
    assert "a machine has 1 to 4096 CPUs" in words


def test_a_timeout_does_not_hide_that_a_cpu_died(program: str) -> None:
    with started("run", "--timeout", "5s", "--cpus", "2", f"{program}:one_dies") as run:
        _, messages = run.communicate(timeout=40.0)
    assert run.returncode == 124
    assert messages.splitlines() == [
        "shmipi run: CPU 0 died: killed by SIGKILL",
        "shmipi run: CPU 1 did not end in time",
    ]


@pytest.mark.parametrize("tag", [[], ["--tag"]])
def test_run_into_a_pipe_that_is_closed(program: str, tag: list[str]) -> None:
    """As of any program: quiet, and at once."""
    with started("run", *tag, "--cpus", "2", f"{program}:flood") as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.readline()
        process.stdout.close()
        messages = process.stderr.read()
        process.wait(20.0)
    assert (process.returncode, messages) == (141, "")


@pytest.mark.parametrize("tag", [[], ["--tag"]])
def test_run_onto_a_full_disk(program: str, tag: list[str]) -> None:
    with open("/dev/full", "w") as full:
        words = shmipi("run", *tag, "--cpus", "2", program, status=1, stdout=full)
    assert words.splitlines()[-1] == "shmipi run: No space left on device"


def test_machines_of_run_and_stress_have_names() -> None:
    name = new_name()
    options = ("--name", name, "--cpus", "1")
    printed = shmipi("run", *options, "os:listdir", "--", "/dev/shm")
    assert f"shmipi.{os.getuid()}.{name}" in printed
    printed = shmipi(
        "stress", *options, "--duration", "100ms", "--json", "-", status=None
    )
    assert json.loads(printed)["machine"]["name"] == name


def test_a_controller_of_ones_own(program: str) -> None:
    own = f"{HOME}/scripts/own_controller.py:Postbox"
    target = f"{program}:chip"
    printed = shmipi("run", "--controller", own, "--cpus", "2", target)
    assert printed == "CPU 0: 'Postbox'\nCPU 1: 'Postbox'\n"
    printed = shmipi(
        *("run", "--controller", "own_controller:Postbox", "--cpus", "1", target),
        cwd=HOME / "scripts",
    )
    assert printed == "CPU 0: 'Postbox'\n"
    document = json.loads(
        shmipi("bench", "boot", "--cpus", "2", "--controller", own, "--json", "-")
    )
    assert document["rows"][0]["controller"] == "postbox"


def test_the_kick_is_chosen(terminal: Any) -> None:
    from shmipi.cli import options

    assert [options.kick(text) for text in ("on", "off", "60")] == [True, False, 60]
    for text in ("SIGRTMIN+3", "RTMIN+3"):
        assert options.kick(text) == signal.SIGRTMIN + 3
    for given, expected in (("off", None), ("RTMAX-2", signal.SIGRTMAX - 2)):
        name = new_name()
        shown = terminal(
            *("launch", "--cpus", "1", "--name", name, "--kick", given), term="dumb"
        )
        shown.read_until("Ctrl-C ends it")
        assert machine(name)["kick_signal"] == expected
        assert shown.interrupt() == 0


# ---- wrong usage, and what cannot be written -----------------------------------------


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("launch --controller gicv2 --cpus 9", "gicv2 can address 8 CPUs, not 9"),
        ("stress --controller gicv2 --cpus 9", "gicv2 can address 8 CPUs, not 9"),
        ("bench boot --controller gicv2 --cpus 9", "can address 8 CPUs, not 9"),
        ("run --controller a/b.py:C os:getpid", "there is no file a/b.py"),
        ("run --controller no_such:C os:getpid", "No module named 'no_such'"),
        ("run --controller os:getpid os:getpid", "getpid is no class derived from"),
        ("run --controller pic os:getpid", "'pic' is not one of apic, xive"),
        ("run --kick SIGUSR1 os:getpid", "'SIGUSR1' is no signal"),
        ("run --kick 10 os:getpid", "10 is no real-time signal"),
        ("run --kick SIGRTMAX+1 os:getpid", "SIGRTMAX+1 is no real-time signal"),
        ("stress --duration 0", "'0' is no time"),
        ("stress --duration 0ms", "'0ms' is no time"),
        ("stress --stat-interval 0", "'0' is no time"),
        ("stress --seed -1", "-1 is too small"),
        ("stress --seed 18446744073709551616", "is too large"),
        ("stress --seed 1_0", "'1_0' is not a whole number"),
        ("stress --longwait -1s", "expected one argument"),
        ("stress --longwait 2h", "give 0 to 3600 seconds"),
        ("launch --cpus 1_0", "'1_0' is not a whole number"),
    ],
)
def test_what_cannot_be_meant_is_wrong_usage(
    arguments: str, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    from shmipi import cli

    kept = {n: signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGHUP)}
    try:
        assert cli.main(arguments.split()) == 2
    finally:
        for number, handler in kept.items():
            signal.signal(number, handler)
    captured = capsys.readouterr()
    assert words in captured.err
    assert captured.err.count("\n") == 1


def test_stress_accepts_the_seed_that_it_prints() -> None:
    from shmipi import cli
    from shmipi.cli import stress

    parser = cli.Parser(prog="shmipi stress")
    stress.prepare_parser(parser)
    for text, seed in (("seed=77", 77), ("77", 77), ("0xffFF", 0xFFFF)):
        assert parser.parse_args(["--seed", text]).seed == seed
    assert parser.parse_args(["--longwait", "250ms"]).longwait == 0.25
    options = ("--duration", "200ms", "--stutter", "0", "--longwait", "10ms")
    text = shmipi("stress", "--cpus", "1", "--seed", "seed=77", *options)
    assert " seed=77 " in text
    assert " longwait=0.01 " in text


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_stress_that_is_ended_gives_its_account(number: signal.Signals) -> None:
    options = ("--cpus", "2", "--duration", "1h", "--stat-interval", "100ms")
    with started("stress", *options) as process:
        assert process.stdout is not None
        while " ver: " not in process.stdout.readline():
            assert process.poll() is None
        process.send_signal(number)
        out, messages = process.communicate(timeout=30.0)
    assert process.returncode == 130, messages
    assert re.search(r"^shmipi-stress: scf_invoked_count VER: \d+ ", out, re.M)
    assert "--- End of test: SUCCESS" in out


@pytest.mark.parametrize(
    "arguments",
    [
        *("--help", "--version", "demo --help", "ps", "ps --json -", "clean --dry-run"),
        *("explain", "launch --cpus 1", "run --cpus 1 os:getpid"),
        *("stress --cpus 1 --duration 100ms", "bench boot --cpus 1"),
        *("ps --json /dev/full", "doctor --json /dev/full"),
        "bench boot --cpus 1 --json /dev/full",
    ],
)
def test_what_cannot_be_written_is_one_line(arguments: str) -> None:
    with open("/dev/full", "w") as full:
        stdout = subprocess.DEVNULL if "/dev/full" in arguments else full
        words = shmipi(*arguments.split(), status=1, stdout=stdout)
    assert words.count("\n") == 1
    assert words.endswith("No space left on device\n")
