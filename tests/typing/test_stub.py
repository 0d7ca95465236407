"""The stub of the C core against the core itself, and the package under mypy."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

import shmipi
from shmipi import _core

PACKAGE = Path(shmipi.__file__).resolve().parent
STUB = ast.parse((PACKAGE / "_core.pyi").read_text())


def names(body: list[ast.stmt]) -> set[str]:
    found = set()
    for node in body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.add(node.name)
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            found.add(node.target.id)
    return {name for name in found if not name.startswith("_")}


def public(thing: object) -> set[str]:
    """Return a thing's names, without those that every tuple or struct sequence has."""
    inherited: set[str] = set()
    if isinstance(thing, type) and issubclass(thing, tuple):
        inherited.update(dir(tuple))
        inherited.update(("n_fields", "n_sequence_fields", "n_unnamed_fields"))
    return {n for n in dir(thing) if not n.startswith("_")} - inherited


def test_every_name_of_the_module_is_in_the_stub() -> None:
    assert names(STUB.body) == public(_core)


@pytest.mark.parametrize(
    "cls", [n for n in STUB.body if isinstance(n, ast.ClassDef)], ids=lambda n: n.name
)
def test_every_name_of_a_class_is_in_the_stub(cls: ast.ClassDef) -> None:
    assert names(cls.body) == public(getattr(_core, cls.name))


@pytest.mark.parametrize("name", ["Slot", "Coproc"])
def test_a_struct_sequence_has_its_fields_in_the_order_of_the_stub(name: str) -> None:
    (cls,) = [n for n in STUB.body if isinstance(n, ast.ClassDef) and n.name == name]
    fields = [n for n in cls.body if isinstance(n, ast.FunctionDef)]
    assert getattr(_core, name).__match_args__ == tuple(field.name for field in fields)
    types = [ast.unparse(field.returns) for field in fields if field.returns]
    assert ast.unparse(cls.bases[0]) == f"tuple[{', '.join(types)}]"


def test_every_keyword_of_the_call_functions_is_accepted() -> None:
    """The core takes each parameter that the stub names by keyword."""
    for node in STUB.body:
        if not isinstance(node, ast.FunctionDef) or "smp_call" not in node.name:
            continue
        arguments = [argument.arg for argument in node.args.args]
        # Without a machine the only error is about that, not about a keyword.
        with pytest.raises(shmipi.NoMachineError):
            getattr(_core, node.name)(**dict.fromkeys(arguments))


def mypy(*arguments: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-m", "mypy", "--strict", *arguments],
        cwd=PACKAGE.parent,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
        timeout=110,
    )


@pytest.mark.long
def test_the_package_is_clean_under_mypy_strict() -> None:
    done = mypy("-p", "shmipi")
    assert done.returncode == 0, done.stdout


def test_a_users_program_is_typed(tmp_path: Path) -> None:
    """What users write checks, and what they get has the types they expect."""
    program = tmp_path / "user.py"
    program.write_text(
        """
import shmipi
from shmipi import Cluster, atomic, smp

def f(a: int, b: str = "") -> str:
    return b * a

with Cluster(2, idle="halt") as cluster:
    reveal_type(cluster.call(1, f, 3, b="x"))
    reveal_type(cluster.submit(1, f, 3).result(1.0))
    reveal_type(cluster.run(f, 3))
    reveal_type(atomic.fetch_add(cluster.shared("a", "i8", 4), 0, 1))
    reveal_type(cluster.cpus[0].pid)
    cluster.smp.smp_call_function_many("0-1", print, None, wait=True)
    csd = smp.CallSingleData(print, 1)
    reveal_type(csd.locked)
    smp.smp_call_function_single_async(1, csd)
    smp.on_each_cpu(smp.NativeHandler("noop"), None, True)
"""
    )
    done = mypy(str(program))
    types = [line.rpartition("is ")[2].strip('"') for line in done.stdout.splitlines()]
    assert done.returncode == 0, done.stdout
    assert [t.replace("builtins.", "").strip('"') for t in types[:-1]] == [
        "str",
        "str",
        "list[str]",
        "int",
        "int",
        "bool",
    ]


def test_programs_of_the_readme_are_typed(tmp_path: Path) -> None:
    """Their functions have no annotations; what they do with a machine checks."""
    text = (PACKAGE.parent / "README.md").read_text()
    blocks = re.findall(r"^```python(?: native)?\n(.*?)^```$", text, re.M | re.S)
    assert len(blocks) >= 5
    files = [tmp_path / f"block{number}.py" for number in range(len(blocks))]
    # Said in the files: options for all of it would make mypy forget what it knows of
    # the package, and of numpy, from one run to the next.
    untyped = "# mypy: allow-untyped-defs, allow-untyped-calls, allow-incomplete-defs\n"
    for file, block in zip(files, blocks, strict=True):
        file.write_text(untyped + block)
    done = mypy(*map(str, files))
    assert done.returncode == 0, done.stdout


def test_wrong_programs_do_not_check(tmp_path: Path) -> None:
    program = tmp_path / "user.py"
    program.write_text(
        """
from shmipi import Cluster, smp

cluster = Cluster(2, idel="halt")
smp.smp_call_function_single("1", print)
smp.CallSingleData(3)
smp.local_irq_restore()
"""
    )
    done = mypy(str(program))
    wrong = {
        line.split(":")[1] for line in done.stdout.splitlines() if ": error" in line
    }
    assert wrong == {"4", "5", "6", "7"}, done.stdout
