"""One place to add a doorbell: its C file, its class, and the lists held here."""

from pathlib import Path

import pytest

from shmipi import _core, names
from shmipi.bench import latency, limits
from shmipi.cli import main
from shmipi.machine import doorbells
from shmipi.machine.doorbells import BY_NAME, Doorbell, Limits

ROOT = Path(__file__).resolve().parents[2]
BELLS = list(BY_NAME.values())


def test_every_class_is_listed_by_its_number():
    assert tuple(BY_NAME) == names.DOORBELLS
    assert {type(bell) for bell in BELLS} == set(Doorbell.__subclasses__())
    assert (
        tuple(
            (bell.name, bell.by_signal, bell.is_inherited, bell.is_handed)
            for bell in BELLS
        )
        == _core.DOORBELLS
    )


def test_each_has_a_file_of_its_own():
    folder = ROOT / "shmipi" / "_core" / "irq"
    files = {path.stem.removeprefix("db_") for path in folder.glob("db_*.c")}
    assert files == set(names.DOORBELLS)


@pytest.mark.parametrize("bell", BELLS, ids=lambda bell: bell.name)
def test_a_doorbell_says_what_it_is(bell):
    for word in ("about", "rings", "sleeps", "limit", "limit_about"):
        assert getattr(bell, word)
    # Made by one of the two, or nothing that is made.
    assert not (bell.is_inherited and bell.folder)
    if bell.is_inherited:
        assert bell.is_descriptor
    if bell.is_descriptor:
        assert bell.is_handed
    none = Limits({}, {})
    assert all(need.name and need.why for need in bell.needs(none, 2))


def test_each_has_a_row_of_the_readme():
    text = (ROOT / "README.md").read_text()
    table = text.partition("| doorbell | what each CPU has |")[2].partition("\n\n")[0]
    rows = [
        tuple(cell.replace("`", "").strip() for cell in line.strip("|").split("|"))
        for line in table.splitlines()[2:]
    ]
    assert rows == [(bell.name, bell.about, bell.rings, bell.limit) for bell in BELLS]


def test_each_stands_beside_its_own_raw_limit():
    assert {bell.limit for bell in BELLS} <= limits.ABOUT.keys()
    assert len({bell.limit for bell in BELLS}) == len(BELLS)
    assert ("none", *(bell.name for bell in limits.BELLS)) == latency.DOORBELLS
    assert set(latency.DOORBELLS) == {"none", *BY_NAME}


def test_each_is_an_option(capsys):
    for command in ("launch", "explain"):
        assert main([command, "--help"]) == 0
        shown = " ".join(capsys.readouterr().out.split())
        assert f"{{{','.join(names.DOORBELLS)}}}" in shown


@pytest.mark.parametrize(
    "bell", [bell for bell in BELLS if bell.folder], ids=lambda bell: bell.name
)
def test_what_bears_a_name_is_found_and_taken_away(bell):
    full = "shmipi.0.unit"
    found = f"{full}.3"
    bell.create(found)
    try:
        with pytest.raises(OSError, match="exists"):  # never another machine's
            bell.create(found)
        if bell.folder.is_dir():
            path = bell.folder / f"{bell.prefix}{found}"
            assert (full, path) in list(doorbells.named())
            assert (full, path) not in list(doorbells.named(r"shmipi\.1\..*"))
    finally:
        assert doorbells.unlink(full, 4) == 1
    assert doorbells.unlink(full, 4) == 0
    with pytest.raises(OSError, match="exist"):
        bell.unlink(found)
