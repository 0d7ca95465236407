"""What help(), completion and inspect find: without a machine."""

import builtins
import inspect
import pickle
import pydoc
import rlcompleter
import subprocess
import sys

import pytest

import shmipi
from shmipi import _core, atomic, irq, smp
from shmipi.irq.chips import CHIPS

MODULES = [shmipi, smp, irq, atomic]
PUBLIC = [
    pytest.param(getattr(module, name), id=f"{module.__name__}.{name}")
    for module in MODULES
    for name in module.__all__
    if callable(getattr(module, name))
]


@pytest.mark.parametrize("thing", PUBLIC)
def test_every_public_name_has_a_docstring_and_a_signature(thing):
    assert thing.__doc__
    if isinstance(thing, type) and issubclass(thing, Exception):
        return  # of those the interpreter has none, unless they take more than text
    assert str(inspect.signature(thing)).startswith("(")


@pytest.mark.parametrize("cls", [_core.CallSingleData, _core.NativeHandler])
def test_every_method_of_the_cores_public_types_is_documented(cls):
    for name in dir(cls):
        if not name.startswith("_"):
            assert inspect.getdoc(getattr(cls, name)), name


def test_help_of_the_atomics_shows_their_names_and_arguments():
    text = pydoc.plain(pydoc.render_doc(atomic))
    assert "compare_exchange(array, index, expected, new, /)" in text
    assert "atomic_" not in text
    for name in atomic.__all__:
        function = getattr(atomic, name)
        assert function.__name__ == name
        assert pickle.loads(pickle.dumps(function)) is function


def test_dir_has_every_public_name_before_it_is_used():
    program = (
        "import shmipi; found = dir(shmipi); assert found == sorted(found)\n"
        "print(*(set(shmipi.__all__) - set(found)))"
    )
    run = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert run.stdout.split() == []


@pytest.mark.parametrize("module", MODULES, ids=lambda module: module.__name__)
def test_completion_offers_every_public_name(module):
    complete = rlcompleter.Completer({"module": module})
    complete.complete("module.", 0)
    offered = {match.partition("(")[0] for match in complete.matches}
    wanted = {f"module.{name}" for name in module.__all__ if not name.startswith("__")}
    assert wanted <= offered


def test_the_names_of_the_face_are_listed_once():
    assert len(set(shmipi.__all__)) == len(shmipi.__all__)
    assert not set(shmipi.__all__) & set(dir(builtins))


def test_trace_events_are_the_cores():
    assert tuple(event.name for event in shmipi.TraceEvent) == _core.TRACE_EVENTS
    assert list(shmipi.TraceEvent) == list(range(len(_core.TRACE_EVENTS)))


def test_chips_say_what_they_are():
    for name, kind in CHIPS.items():
        chip = kind()
        text = repr(chip)
        assert text == f"<{kind.__name__}: {kind.description}>", name
        assert kind.description
