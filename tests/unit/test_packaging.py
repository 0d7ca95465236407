"""pyproject.toml against the tree: what it lists by hand must not drift."""

import tomllib
from pathlib import Path

import shmipi

ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
(EXTENSION,) = PROJECT["tool"]["setuptools"]["ext-modules"]


def in_core(pattern: str) -> list[str]:
    core = ROOT / "shmipi" / "_core"
    return sorted(str(path.relative_to(ROOT)) for path in core.glob(pattern))


def test_every_c_file_is_built() -> None:
    assert EXTENSION["sources"] == in_core("*/*.c")


def test_every_header_is_depended_on() -> None:
    assert EXTENSION["depends"] == in_core("*/*.h")


def first_header(file: Path) -> str:
    """Return the first header that a C file includes, which includes none itself."""
    for line in file.read_text().splitlines():
        if line.startswith("#include <"):
            return line.partition("<")[2].rstrip(">")
        if line.startswith('#include "'):
            inner = line.split('"')[1]
            return first_header(ROOT / "shmipi" / "_core" / inner) or inner
    return ""


def test_every_c_file_asks_the_platform_first() -> None:
    """Else it is compiled without what sys.h defines, or fails with other words."""
    files = [ROOT / name for name in EXTENSION["sources"]]
    others = {f.name: head for f in files if (head := first_header(f)) != "base/sys.h"}
    assert not others


def test_versions_agree() -> None:
    assert shmipi.__version__ == PROJECT["project"]["version"]


def test_c_sources_are_no_package() -> None:
    assert not (ROOT / "shmipi" / "_core" / "__init__.py").exists()
    assert (ROOT / "shmipi" / "_core.pyi").exists()
    assert (ROOT / "shmipi" / "py.typed").exists()


def test_every_ruff_rule_that_is_off_says_why() -> None:
    text = (ROOT / "pyproject.toml").read_text()
    section = text.partition("[tool.ruff.lint]")[2].partition("[tool.mypy]")[0]
    for rule in PROJECT["tool"]["ruff"]["lint"]["ignore"]:
        (line,) = [line for line in section.splitlines() if f'"{rule}"' in line]
        assert "#" in line, f"{rule} is ignored without a word"
