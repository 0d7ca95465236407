"""The examples are run as a reader would: programs of scripts/, code of the README."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT)}


def blocks(language: str) -> list[str]:
    """The fenced blocks of the README in a language ("python native" is one too)."""
    text = (ROOT / "README.md").read_text()
    return re.findall(rf"^```{re.escape(language)}\n(.*?)^```$", text, re.M | re.S)


def run(*command: str, cwd: Path, timeout: float = 40.0) -> str:
    """Run it; return what it printed. It must succeed and complain of nothing."""
    done = subprocess.run(
        command,
        cwd=cwd,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, ""), done.stdout + done.stderr
    return done.stdout


def run_block(text: str, folder: Path) -> str:
    path = folder / "program.py"
    path.write_text(text)
    return run(sys.executable, "-W", "error", str(path), cwd=folder)


@pytest.mark.parametrize("number", range(len(blocks("python"))))
def test_python_of_the_readme_works_as_pasted(number: int, tmp_path: Path) -> None:
    text = blocks("python")[number]
    printed = run_block(text, tmp_path)
    # What a comment behind print() promises is printed, up to its first dots.
    for promise in re.findall(r"print\(.*\)  # (\[.*\]|\w+\(\S+ \w+)", text):
        assert promise in printed


def test_the_readme_has_its_programs() -> None:
    """Else the test above runs nothing and passes."""
    assert len(blocks("python")) >= 2
    assert len(blocks("python native")) == len(blocks("c")) == 1


def test_every_program_of_the_readme_has_a_guard() -> None:
    """A CPU may import a program, whose top level must not boot its machine again."""
    for text in [*blocks("python"), *blocks("python native")]:
        lines = text.splitlines()
        [guard] = [n for n, line in enumerate(lines) if line.startswith("if __name__")]
        boots = [n for n, line in enumerate(lines) if "with Cluster(" in line]
        assert boots
        assert min(boots) > guard
        assert all(lines[n].startswith("    ") for n in boots)


def test_tests_that_the_readme_names_exist() -> None:
    """A promise stands on its test: one that was renamed is named anew."""
    named = set(re.findall(r"`(test_\w+)`", (ROOT / "README.md").read_text()))
    files = (ROOT / "tests").glob("*/test_*.py")
    defined = set(re.findall(r"def (test_\w+)", "".join(f.read_text() for f in files)))
    assert len(named) > 30
    assert named <= defined, named - defined


def test_tables_of_the_readme_render() -> None:
    """GitHub's: a header, a line of dashes, rows of as many cells, nothing between."""
    text = re.sub(
        r"^```.*?^```$", "", (ROOT / "README.md").read_text(), flags=re.M | re.S
    )
    tables = 0
    for block in re.split(r"\n\s*\n", text):
        lines = block.strip().splitlines()
        if not any(line.startswith("|") for line in lines):
            continue
        tables += 1
        assert all(line.startswith("|") and line.endswith("|") for line in lines), block
        cells = [len(re.findall(r"(?<!\\)\|", line)) for line in lines]
        assert set(cells) == {cells[0]}, block
        assert re.fullmatch(r"\|(-+\|)+", lines[1]), block
        assert len(lines) > 2
    assert tables >= 5


def test_native_handler_of_the_readme(tmp_path: Path) -> None:
    named = os.environ.get("CC", "cc").split()[0]
    compiler = shutil.which(named) or shutil.which("gcc")
    if compiler is None:
        pytest.skip("no C compiler")
    [source], [program] = blocks("c"), blocks("python native")
    (tmp_path / "highest.c").write_text(source)
    lines = [line for text in blocks("sh") for line in text.splitlines()]
    [line] = [line for line in lines if " -o " in line]
    run(compiler, *line.split()[1:], cwd=tmp_path)
    assert run_block(program, tmp_path) == "9\n"


def test_commands_of_the_readme_exist() -> None:
    """Every command is in its table, with options that it has."""
    from importlib import import_module

    from shmipi import cli

    text = (ROOT / "README.md").read_text()
    rows = re.findall(r"^\| `shmipi (\w+)(.*?)` \|", text, re.M)
    assert list(dict(rows)) == list(cli.COMMANDS)  # one may have several rows
    for name, arguments in rows:
        parser = cli.Parser(prog=f"shmipi {name}")
        import_module(f"shmipi.cli.{name}").prepare_parser(parser)
        known = parser.format_help()
        for option in re.findall(r"--?[a-z-]+", arguments):
            assert option == "--" or re.search(rf"{option}\b", known), (name, option)


PROGRAMS = {
    "block_completion.py": ("3", "20"),
    "cpumap_redirect.py": ("3", "20000"),
    "crash_dump.py": (),
    "csd_stall.py": ("1000", "60"),
    "scheduler.py": ("300",),
    "contexts.py": ("xive",),
    "icache.py": ("3", "30"),
    "ipi_matrix.py": ("3", "100"),
    "ipistorm.py": ("--cpus", "4", "--seconds", "0.2"),
    "membarrier.py": ("20000",),
    "nohz_full.py": (),
    "own_controller.py": ("4",),
    "receive_steering.py": ("3", "4000"),
    "stop_machine.py": (),
    "rcu.py": ("3", "50"),
    "tick_broadcast.py": ("3", "10"),
    "tlb_shootdown.py": ("3", "100"),
}


def check_stop_machine(printed: str, rows: list[list[str]]) -> None:
    assert re.search(r"\d looks at it, 0 of them torn\n", printed)
    assert [row[3] for row in rows[1:]] == ["teardown"] * 3 + ["startup"] * 3


def check_matrix(printed: str, rows: list[list[str]]) -> None:
    cells = [[float(cell) for cell in row[2:]] for row in rows[2:]]
    assert [len(row) for row in cells] == [3, 3, 3]
    assert all(0.0 < cell < 1e6 for row in cells for cell in row)
    # A call to oneself is inline: no way to another process is as short.
    for number, row in enumerate(cells):
        assert row[number] <= 2 * min(row)


def check_controller(printed: str, rows: list[list[str]]) -> None:
    assert printed.startswith("calls ran on [0, 1, 2, 3]; letters: [0, 1, 1, 1]\n")
    taken = {row[0]: row[1:5] for row in rows[2:]}
    assert taken["FUN:"] == ["1"] * 4
    assert taken["1:"] == ["0", "1", "1", "1"]


def check_shootdown(printed: str, rows: list[list[str]]) -> None:
    line = r"([1-9]\d*) loads, (\d+) stale, flushes \[(\d+) +(\d+) +(\d+)\]"
    with_it, without = (re.fullmatch(line, text) for text in printed.splitlines())
    assert with_it
    assert without
    assert with_it.groups()[1:] == ("0", "200", "0", "0"), "CPU 0's alone"
    assert without[3] == "200", "and without the rule none"
    assert int(without[2]) > 0


def check_stalls(printed: str, rows: list[list[str]]) -> None:
    """Proves row 83."""
    handler, masked, stopped, given_up = printed.split("--- ")[1:]
    assert "handling prior spin(...) request." in handler
    assert "Re-sending" not in handler
    assert "has interrupts disabled." in masked
    assert "Re-sending CSD lock" in masked
    assert "is stopped by a signal" in stopped
    assert all("got unstuck" in text for text in (handler, masked, stopped))
    assert "has not answered nop" in given_up
    assert printed.endswith("7 is what it answers now\n")


def check_crash(printed: str, rows: list[list[str]]) -> None:
    backtraces, dump = printed.split("\nmachine ")
    assert "task __main__.never_again, interrupts disabled" in backtraces
    assert "CPU 3 was killed by SIGSEGV\nmissing: none" in dump
    assert "CPU 2 waited for CPU 1: nop" in dump
    assert "host waited for CPU 3: count" in dump


#: What is looked at in what a program prints, beside its exit status.
CHECKS = {
    "crash_dump.py": check_crash,
    "csd_stall.py": check_stalls,
    "ipi_matrix.py": check_matrix,
    "own_controller.py": check_controller,
    "stop_machine.py": check_stop_machine,
    "tlb_shootdown.py": check_shootdown,
}


def test_every_program_of_scripts_is_run_here() -> None:
    assert {path.name for path in (ROOT / "scripts").glob("*.py")} == set(PROGRAMS)


@pytest.mark.parametrize("name", PROGRAMS)
def test_program(name: str, tmp_path: Path) -> None:
    printed = run(
        sys.executable,
        *("-W", "error", str(ROOT / "scripts" / name), *PROGRAMS[name]),
        cwd=tmp_path,
    )
    assert printed.count("\n") > 1
    check = CHECKS.get(name)  # those of users fail by their status
    if check is not None:
        check(printed, [line.split() for line in printed.splitlines()])


@pytest.mark.parametrize(
    ("arguments", "pairs"),
    [
        ([], ["0 -> CPU 1", "1 -> CPU 2", "2 -> CPU 3", "3 -> CPU 0"]),
        (["--mask", "1"], ["0 -> CPU 1", "1 -> CPU 0", "2 -> CPU 3", "3 -> CPU 2"]),
        (["--offset", "3", "--cpulist", "1,2"], ["1 -> CPU 0", "2 -> CPU 1"]),
        (["--all", "--no-wait"], [f"{cpu} -> all others" for cpu in range(4)]),
    ],
    ids=" ".join,
)
def test_a_storm(arguments: list[str], pairs: list[str], tmp_path: Path) -> None:
    """Proves row 88: what each of a storm has sent, to whom it is told, has run."""
    program = str(ROOT / "scripts" / "ipistorm.py")
    printed = run(
        *(sys.executable, "-W", "error", program, "--seconds", "0.1", *arguments),
        cwd=tmp_path,
    )
    found = re.findall(r"CPU (\d+ -> .*): (\d+) calls, (\d+) ran", printed)
    assert [pair for pair, _, _ in found] == pairs
    for _, sent, ran in found:
        assert int(ran) == int(sent) * (3 if "--all" in arguments else 1) > 0


def test_programs_are_short() -> None:
    for name in PROGRAMS:
        path = ROOT / "scripts" / name
        assert len(path.read_text().splitlines()) <= 60
        assert os.access(path, os.X_OK)
