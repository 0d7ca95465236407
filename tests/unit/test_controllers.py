"""One place to add a controller: its class, and a line in shmipi.names.CHIPS."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from shmipi import _core, names
from shmipi.irq import chips
from shmipi.irq.chips import CHIPS, Chip, Line, Row
from shmipi.irq.chips.chain import CALLS
from shmipi.trace import chains

README = Path(__file__).resolve().parents[2] / "README.md"


def test_the_names_are_the_classes():
    assert tuple(CHIPS) == names.CONTROLLERS == tuple(names.CHIPS)
    assert len(CHIPS) == len(set(CHIPS.values()))
    for name, chip in CHIPS.items():
        assert chip.name == name
        assert getattr(chips, chip.__name__) is chip
        assert chip.__name__ in dir(chips)
    with pytest.raises(KeyError):
        CHIPS["nix"]
    with pytest.raises(ImportError):
        from shmipi.irq.chips import Nix  # noqa: F401


@pytest.mark.parametrize("name", names.CONTROLLERS)
def test_a_controller_is_whole(name):
    """What `explain`, `interrupts`, the benches and the README say of it is there."""
    chip = CHIPS[name]
    assert chip.description
    assert chip.__doc__
    assert chip.at_most >= 1
    assert set(chip.chains) == set(CALLS) == set(chains.CALLS)
    assert chains.CHAINS[name] is chip.chains
    assert {"line_set", "line_ack"} <= set(chip.hardware)
    for event, words in chip.hardware.items():
        assert event.partition("=")[0] in _core.TRACE_EVENTS
        assert words.format(cpu=1, line="A LINE")
    assert re.search(rf"^\| `{name}` \| ", README.read_text(), re.M)


def test_a_name_is_known_before_any_controller_is_imported():
    """--help and a wrong name load none of them; a right one loads its own."""
    text = (
        "import sys; from shmipi.cli import options;"
        "from shmipi.irq.chips import CHIPS;"
        "loaded = lambda: sorted(n for n in sys.modules if n.startswith("
        "'shmipi.irq.chips.') and n.split('.')[-1] in set(names.CHIPS.values()));"
        "from shmipi import names; assert 'xive' in CHIPS and list(CHIPS);"
        "print(loaded()); CHIPS['gicv2']; print(loaded())"
    )
    done = subprocess.run(
        [sys.executable, "-c", text], capture_output=True, text=True, check=True
    )
    assert done.stdout.split("\n")[:2] == ["[]", "['shmipi.irq.chips.gic']"]


def test_a_controller_is_added_in_one_place(monkeypatch):
    """A module and its name: everything that goes over the controllers has it."""

    class Extra(Chip):
        """One of a test."""

        name = "extra"
        flow = "mailbox"
        rows = (Row("ONE", "one"),)

        def lines(self, ncpus):
            yield Line(0, "call", "call", "ONE")
            yield Line(1, "resched", "reschedule")

    module = type(sys)("shmipi.irq.chips.extra")
    module.Extra = Extra
    module.Chip = Chip  # what a module imports is not taken for its own
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(names, "CHIPS", {**names.CHIPS, "extra": "extra"})
    assert CHIPS["extra"] is Extra
    assert chips.Extra is Extra
    assert list(CHIPS)[-1] == "extra"
