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


def test_a_flow_is_its_file_and_a_line_of_the_registry():
    """Names, limits and what else Python knows of a flow are those of the C."""
    core = README.parent / "shmipi" / "_core" / "irq"
    listed = re.findall(r"X\(([A-Z]+), ([a-z]+)\)", (core / "flows.h").read_text())
    assert [name for _, name in listed] == list(_core.FLOWS) == list(_core.FLOW_LINES)
    assert [kind.lower() for kind, _ in listed] == list(_core.FLOWS)
    own = {
        name: re.search(r"\.max_lines = \w+", text[text.index(f'.name = "{name}"') :])
        for path in core.glob("flow_*.c")
        for text in [path.read_text()]
        for name in re.findall(r"struct shi_flow shi_flow_(\w+) = \{", text)
    }
    assert set(own) == set(_core.FLOWS)
    assert all(own.values())
    others = [p for p in core.glob("*.c") if not p.name.startswith("flow")]
    assert not [p.name for p in others if "shi_flow_" in p.read_text()]
    used = {chip.flow for chip in CHIPS.values()}
    assert used == set(_core.FLOWS)
    assert {chip.flow for chip in CHIPS.values() if chip.banked} == {"sgi"}
    assert set(_core.BANKED_FLOWS) == {"sgi"}
    assert set(_core.ROUTED_FLOWS) == {"shared"}
    assert all(0 < most <= _core.NLINES for most in _core.FLOW_LINES.values())
    assert all(f"\n{flow} " in (chips.base.__doc__ or "") for flow in _core.FLOWS)
