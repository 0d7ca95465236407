"""The README's list of where a thing is added is true, and complete."""

import re
from pathlib import Path

import pytest

from shmipi import _core, names
from shmipi.irq.chips import base

ROOT = Path(__file__).resolve().parents[2]
CORE = ROOT / "shmipi" / "_core"
README = (ROOT / "README.md").read_text()
PLACES = README.partition("\n## Where to add a thing\n")[2].partition("\n## ")[0]

#: Names that are a doorbell's and no word of anything else.
OWN = [name for name in names.DOORBELLS if name not in ("futex", "signal")]


def rows():
    lines = [line for line in PLACES.splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[1:]]


def test_what_the_list_names_is_there():
    things = [row[0] for row in rows()]
    assert things == [
        "doorbell",
        "controller on a flow that there is",
        "flow of controllers",
        "bench",
        "user of IPIs",
    ]
    for row in rows():
        files = re.findall(r"`([\w./*]+/[\w./*]*|\w+\.toml)`", " ".join(row))
        assert files
        assert all(list(ROOT.glob(file)) for file in files), files
        for word, file in re.findall(r"`(?:enum )?(\w+)` in `([\w./]+)`", row[2]):
            assert re.search(rf"\b{word}\b", (ROOT / file).read_text()), word


def lists_of(thing):
    """The files in which a thing is listed, beside its own."""
    [row] = [row for row in rows() if row[0] == thing]
    return {ROOT / file for file in re.findall(r"`([\w./]+\.\w+)`", " ".join(row[1:]))}


@pytest.mark.parametrize("name", OWN)
def test_no_other_file_knows_a_doorbell_by_name(name):
    own = {CORE / "irq" / f"db_{name}.c"}
    quoted = re.compile(rf"[\"']{name}[\"']")
    for path in (ROOT / "shmipi").rglob("*.py"):
        if path not in lists_of("doorbell"):
            assert not quoted.search(path.read_text()), path
    symbol = re.compile(rf"\b(?:shi_db|SHI_DB)_{name}\b|\bX\({name}\)|\"{name}\"")
    for path in CORE.rglob("*.[ch]"):
        if path not in own | lists_of("doorbell"):
            assert not symbol.search(path.read_text()), path


@pytest.mark.parametrize("name", _core.FLOWS)
def test_no_other_file_knows_a_flow_by_its_table(name):
    symbol = re.compile(rf"\bshi_flow_{name}\b")
    knows = {path for path in CORE.rglob("*.[ch]") if symbol.search(path.read_text())}
    own = knows - lists_of("flow of controllers")
    assert len(own) == 1
    assert own.pop().name.startswith("flow_")
    assert re.search(rf"^{name}  ", base.__doc__, re.MULTILINE)


def test_every_bench_is_in_the_commands():
    [row] = re.findall(r"^\| `shmipi bench KIND` \| measures (.*) \|$", README, re.M)
    assert row == ", ".join(f"`{name}`" for name in names.BENCHES)
