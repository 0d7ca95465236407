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
