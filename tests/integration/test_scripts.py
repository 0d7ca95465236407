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
    assert [name for name, _ in rows] == list(cli.COMMANDS)
    for name, arguments in rows:
        parser = cli.Parser(prog=f"shmipi {name}")
        import_module(f"shmipi.cli.{name}").prepare_parser(parser)
        known = parser.format_help()
        for option in re.findall(r"--?[a-z-]+", arguments):
            assert option == "--" or re.search(rf"{option}\b", known), (name, option)


PROGRAMS = {
    "ipi_matrix.py": ("3", "100"),
    "own_controller.py": ("4",),
    "tlb_shootdown.py": ("3", "100"),
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
    rows = [line.split() for line in printed.splitlines()]
    if name == "ipi_matrix.py":
        cells = [[float(cell) for cell in row[2:]] for row in rows[2:]]
        assert [len(row) for row in cells] == [3, 3, 3]
        assert all(0.0 < cell < 1e6 for row in cells for cell in row)
        # A call to oneself is inline: no way to another process is as short.
        for number, row in enumerate(cells):
            assert row[number] <= 2 * min(row)
    elif name == "own_controller.py":
        assert printed.startswith("calls ran on [0, 1, 2, 3]; letters: [0, 1, 1, 1]\n")
        taken = {row[0]: row[1:5] for row in rows[2:]}
        assert taken["FUN:"] == ["1"] * 4
        assert taken["1:"] == ["0", "1", "1", "1"]
    else:
        assert [int(row[2]) for row in rows[1:]] == [200, 100, 100]
        assert float(rows[2][1]) > 0.0


def test_programs_are_short() -> None:
    for name in PROGRAMS:
        path = ROOT / "scripts" / name
        assert len(path.read_text().splitlines()) <= 60
        assert os.access(path, os.X_OK)
