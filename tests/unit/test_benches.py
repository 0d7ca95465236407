"""One place to add a bench: its module, and its line in ``shmipi.names``."""

import dataclasses
import json
import subprocess
import sys
import types
from pathlib import Path

import pytest

import shmipi.bench
from shmipi import names
from shmipi.bench import option, registry
from shmipi.cli import bench as command
from shmipi.cli import main
from shmipi.irq.chips import CHIPS

FOLDER = Path(shmipi.bench.__file__).parent
#: What measuring is made of, and no bench itself.
SHARED = {
    *("__init__", "agree", "breaks", "clocks", "effects", "hist", "option"),
    *("peering", "record", "registry", "runner", "tasks"),
}


def test_every_module_that_measures_is_listed():
    assert {path.stem for path in FOLDER.glob("*.py")} - SHARED == set(names.BENCHES)


@pytest.mark.parametrize("name", names.BENCHES)
def test_a_bench_has_what_the_command_needs(name, capsys):
    bench = registry.load(name)
    assert bench.HELP
    assert all(f"shmipi bench {name}" in line for line in bench.EXAMPLE.splitlines())
    assert callable(bench.run)
    assert callable(bench.table)
    assert bench.Options.__dataclass_params__.frozen
    assert bench.Options() == bench.Options()  # a default for every field
    options = option.options_of(bench.Options)
    assert options
    with pytest.raises(SystemExit):
        command_parser().parse_args([name, "--help"])
    shown = capsys.readouterr().out
    assert names.BENCHES[name] in shown
    assert bench.HELP.splitlines()[0] in shown
    for one, _ in options.values():
        assert f"\n  {one.flag}" in shown
    # Without an option, the command line is Options().
    args = command_parser().parse_args([name])
    given = {field: getattr(args, field) for field in options}
    assert bench.Options(**given) == bench.Options()


def command_parser():
    from shmipi.cli import Parser

    parser = Parser(prog="shmipi bench")
    command.prepare_parser(parser)
    return parser


def test_every_kind_of_option_is_one_that_is_parsed():
    used = {
        one.kind
        for name in names.BENCHES
        for one, _ in option.options_of(registry.load(name).Options).values()
    }
    assert used == set(command._KINDS)


def test_the_names_for_options_are_those_of_what_they_name():
    assert tuple(CHIPS) == names.CONTROLLERS
    assert ("auto", *names.IDLE) == names.IDLE_POLICIES


def test_a_bench_is_added_in_one_place(monkeypatch, capsys):
    """A module and a name: parsed, run, written and printed by what all share."""

    @dataclasses.dataclass(frozen=True)
    class Options:
        calls: int = option.calls(5, "calls of each row")
        quiet: bool = False

    module = types.ModuleType("shmipi.bench.echo")
    module.HELP, module.EXAMPLE = "Says it again.", "shmipi bench echo"
    module.Options = Options
    module.run = lambda options, progress=None: {
        "bench": "echo",
        "machine": dict.fromkeys(("cpu_model", "cores", "kernel", "python"), "x"),
        "rows": [{"calls": options.calls}],
    }
    module.table = lambda result: (
        ["calls", "valid"],
        [[str(row["calls"]), "yes"] for row in result["rows"]],
        ["that is all"],
    )
    monkeypatch.setitem(sys.modules, "shmipi.bench.echo", module)
    monkeypatch.setitem(names.BENCHES, "echo", "what was said")
    assert main(["bench", "echo", "--calls", "2k", "--json", "-"]) == 0
    assert json.loads(capsys.readouterr().out)["rows"] == [{"calls": 2000}]
    assert main(["bench", "echo"]) == 0
    shown = capsys.readouterr().out
    assert "calls  valid\n    5  yes\nthat is all\n" in shown
    assert main(["bench", "--help"]) == 0
    assert "what was said" in capsys.readouterr().out
    assert main(["bench", "echo", "--quiet"]) == 2  # no option: for run() alone


def test_help_and_wrong_usage_import_nothing_heavy():
    program = (
        "import sys; from shmipi.cli import main;"
        "heavy = {'numpy', 'shmipi._core'};"
        "print(main(sys.argv[1:]), sorted(heavy & set(sys.modules)))"
    )
    for arguments, status in ((["bench", "--help"], 0), (["bench", "lattency"], 2)):
        done = subprocess.run(
            [sys.executable, "-c", program, *arguments],
            capture_output=True,
            text=True,
            timeout=30,
        )
        assert done.stdout.splitlines()[-1] == f"{status} []", done.stderr
